"""The durable queue, with a store that can be broken and runs that do as they are told."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from msgspec import structs

from dayfly_pool import queue as module
from dayfly_pool.clock import Clock
from dayfly_pool.errors import FunctionNotFound, NoCapacity, QueueFull, StoreFailed
from dayfly_pool.models import (
    Failure,
    FunctionId,
    InvocationId,
    Outcome,
    Retry,
    Success,
    Timing,
)
from dayfly_pool.queue import Keep, Queue, Work
from dayfly_pool.store.events import (
    Accepted,
    Ended,
    Event,
    Key,
    Lease,
    Shown,
    State,
    Written,
)
from dayfly_pool.store.memory import MemoryEvents

GREET, SHOUT = FunctionId("default/greet"), FunctionId("default/shout")
E1, E2, E3, E4, E5 = (InvocationId(f"event-{n}") for n in range(1, 6))
DONE = Success(b"done", Timing())
RAISED = Failure("Raised", "no")
SOON_S = 5.0


class Runs:
    """Runs events: each as the next thing of *script* says, and then all successfully."""

    def __init__(self, *script: Outcome | Exception) -> None:
        self.script = list(script)
        self.seen: list[Lease] = []
        self.most: Counter[FunctionId] = Counter()
        """How many of each function ran at once, at most."""

        self.gate: asyncio.Event | None = None
        """No run ends before it is set."""

        self._now: Counter[FunctionId] = Counter()

    async def __call__(self, lease: Lease) -> Outcome:
        self.seen.append(lease)
        self._now[lease.function] += 1
        self.most[lease.function] = max(self.most[lease.function], self._now[lease.function])
        try:
            await asyncio.sleep(0)
            if self.gate is not None:
                await self.gate.wait()
            outcome = self.script.pop(0) if self.script else DONE
        finally:
            self._now[lease.function] -= 1
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def work(places: int = 10, **retry: Any) -> Callable[[FunctionId], Work | None]:
    return lambda function: Work(places, Retry(**retry))


@asynccontextmanager
async def running(
    runs: Runs,
    store: MemoryEvents | None = None,
    work_of: Callable[[FunctionId], Work | None] | None = None,
    **changed: Any,
) -> AsyncIterator[Queue]:
    settings: dict[str, Any] = {"owner": "us", "draw": lambda: 0.0} | changed
    queue = Queue(store or MemoryEvents(), runs, work_of or work(), **settings)
    async with asyncio.timeout(SOON_S), queue.running():
        yield queue


def event(queue: Queue, id_: InvocationId = E1, function: FunctionId = GREET, **more: Any) -> Event:
    now = queue.clock.now()
    made = Event(id=id_, function=function, meta=b"", body=b"", accepted_at=now, age_s=3600.0)
    return structs.replace(made, **more)


async def over(queue: Queue, id_: InvocationId = E1) -> Shown:
    shown = await queue.get(id_, SOON_S)
    assert shown is not None
    return shown


async def eventually(question: Callable[[], object]) -> None:
    """Let everybody else go on until it is so; the test's own deadline ends it."""
    while not question():  # noqa: ASYNC110
        await asyncio.sleep(0)


# ---- one event ----------------------------------------------------------------------------------


async def test_what_is_accepted_is_run_and_its_result_can_be_waited_for():
    runs = Runs()
    async with running(runs) as queue:
        assert await queue.accept(event(queue)) == Accepted(E1)
        shown = await over(queue)

    assert (shown.state, shown.result_body, shown.attempts) == (State.SUCCEEDED, b"done", 1)
    assert [lease.id for lease in runs.seen] == [E1]
    assert (queue.accepted, queue.outcomes[GREET, State.SUCCEEDED], queue.waiting) == (1, 1, {})


async def test_who_asks_while_it_ends_is_told_that_it_has():
    """And not what the store knew just before."""
    runs = Runs()
    runs.gate = asyncio.Event()

    class Slow(MemoryEvents):
        async def get(self, id_: InvocationId) -> Shown | None:
            shown = await super().get(id_)
            runs.gate.set()  # it ends before the answer is there
            await eventually(lambda: queue.outcomes)
            return shown

    async with running(runs, Slow()) as queue:
        await queue.accept(event(queue))
        await eventually(lambda: runs.seen)

        assert (await over(queue)).state is State.SUCCEEDED


async def test_a_failure_is_tried_again_until_it_succeeds():
    async with running(Runs(RAISED, RAISED)) as queue:
        await queue.accept(event(queue))
        shown = await over(queue)

    assert (shown.state, shown.attempts) == (State.SUCCEEDED, 3)
    assert [failure.kind for failure in shown.failures] == ["Raised", "Raised"]


async def test_a_timer_that_goes_off_a_little_early_is_believed():
    """Or nothing would look at the delayed event again."""

    class Behind(Clock):
        def now(self) -> float:
            return 100.0

    async with running(Runs(RAISED), clock=Behind(), draw=lambda: 0.001) as queue:
        await queue.accept(event(queue))

        assert (await over(queue)).state is State.SUCCEEDED


async def test_what_fails_every_time_is_dead_and_keeps_every_error():
    async with running(Runs(*[RAISED] * 9), work_of=work(attempts=4)) as queue:
        await queue.accept(event(queue, body=b"payload"))
        shown = await over(queue)

    assert (shown.state, shown.attempts, shown.body) == (State.DEAD, 4, b"payload")
    assert len(shown.failures) == 4


async def test_a_dead_event_that_is_redriven_runs_again():
    async with running(Runs(*[RAISED] * 3)) as queue:
        await queue.accept(event(queue))
        assert (await over(queue)).state is State.DEAD

        assert await queue.redrive(GREET) == 1
        assert (await over(queue)).state is State.SUCCEEDED


async def test_throttles_cost_no_attempt():
    async with running(Runs(*[NoCapacity() for _ in range(20)]), work_of=work(attempts=1)) as queue:
        await queue.accept(event(queue))
        shown = await over(queue)

    assert (shown.state, shown.attempts) == (State.SUCCEEDED, 1)


async def test_an_event_of_a_function_that_is_gone_is_dead_and_says_so():
    async with running(Runs(FunctionNotFound("gone")), work_of=lambda function: None) as queue:
        await queue.accept(event(queue))
        shown = await over(queue)

    assert (shown.state, shown.attempts) == (State.DEAD, 0)
    assert shown.failures[0].kind == "FunctionNotFound"


async def test_what_is_too_old_is_not_run():
    runs = Runs()
    async with running(runs) as queue:
        await queue.accept(event(queue, accepted_at=0.0, age_s=10.0))
        shown = await over(queue)

    assert (shown.state, shown.failures[0].kind, runs.seen) == (State.DEAD, "Expired", [])


async def test_the_same_key_again_runs_nothing_again():
    runs = Runs()
    async with running(runs) as queue:
        key = Key("k", "f", queue.clock.now() + 60)
        await queue.accept(event(queue, E1, key=key))
        assert await queue.accept(event(queue, E2, key=key)) == Accepted(E1, is_new=False)
        await over(queue)

    assert [lease.id for lease in runs.seen] == [E1]
    assert (queue.accepted, queue.duplicates) == (1, 1)


async def test_what_follows_an_end_is_run_as_well():
    def follow(lease: Lease, ended: Ended) -> tuple[Event, ...]:
        return (event(queue, E2, SHOUT),) if lease.function == GREET else ()

    runs = Runs()
    async with running(runs, follow=follow) as queue:
        await queue.accept(event(queue))
        await over(queue, E1)
        assert (await over(queue, E2)).state is State.SUCCEEDED

    assert [(lease.id, lease.function) for lease in runs.seen] == [(E1, GREET), (E2, SHOUT)]
    assert queue.waiting == {}


# ---- defects of ours ----------------------------------------------------------------------------


class Defect(Exception):
    """What nobody thought of."""


def fail(*given: object) -> Any:
    raise Defect("its text is the log's alone")


def tracebacks(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged with a traceback."""
    return [record.getMessage() for record in caplog.records if record.exc_info]


async def test_an_event_over_which_we_fail_is_dead_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture,
):
    """It costs no attempt, and can be redriven when the defect is mended."""
    async with running(Runs(Defect("its text is the log's alone"))) as queue:
        await queue.accept(event(queue, E1))
        dead = await over(queue, E1)
        await queue.accept(event(queue, E2))

        assert (await over(queue, E2)).state is State.SUCCEEDED
        assert await queue.redrive(GREET) == 1
        assert (await over(queue, E1)).state is State.SUCCEEDED
    (failure,) = dead.failures
    assert (dead.state, dead.attempts, failure.is_counted) == (State.DEAD, 0, False)
    assert (failure.kind, failure.message) == (
        "InternalError",
        "Defect: the server's log has the cause",
    )
    assert tracebacks(caplog) == ["an event is dead for a defect of ours"]
    assert "its text is the log's alone" in caplog.text


async def test_an_end_is_not_lost_when_what_follows_it_cannot_be_told(
    caplog: pytest.LogCaptureFixture,
):
    async with running(Runs(), follow=fail) as queue:
        await queue.accept(event(queue))
        shown = await over(queue)

    assert (shown.state, shown.result_body) == (State.SUCCEEDED, b"done")
    assert tracebacks(caplog) == ["what follows an event is lost for a defect of ours"]


async def test_what_follows_is_told_of_a_body_that_was_fetched():
    class Apart(MemoryEvents):
        async def write(self, *given: Any, **more: Any) -> Written:
            written = await super().write(*given, **more)
            leased = [structs.replace(each, body=b"", file="apart") for each in written.leased]
            return structs.replace(written, leased=leased)

        async def fetch(self, lease: Lease) -> Lease:
            return structs.replace(lease, body=b"long", file="")

    told: list[bytes] = []
    async with running(
        Runs(), Apart(), follow=lambda lease, _: (told.append(lease.body), ())[1]
    ) as queue:
        await queue.accept(event(queue))
        await over(queue)

    assert told == [b"long"]


async def test_a_body_that_cannot_be_fetched_now_is_fetched_later():
    """The store failed, and not the event: it costs no attempt, and nobody else anything."""

    class Apart(MemoryEvents):
        failures = 3

        async def write(self, *given: Any, **more: Any) -> Written:
            written = await super().write(*given, **more)
            leased = [structs.replace(each, file="apart") for each in written.leased]
            return structs.replace(written, leased=leased)

        async def fetch(self, lease: Lease) -> Lease:
            if self.failures:
                self.failures -= 1
                raise StoreFailed("EIO")
            return structs.replace(lease, file="")

    async with running(Runs(), Apart(), work_of=work(attempts=1)) as queue:
        await queue.accept(event(queue))
        shown = await over(queue)

    assert (shown.state, shown.attempts, shown.fence) == (State.SUCCEEDED, 1, 4)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("where", ["write", "counts", "work_of"])
async def test_a_defect_of_a_write_is_a_failed_write(caplog: pytest.LogCaptureFixture, where: str):
    """Who wanted something accepted is told, and later it goes on; the log has it once."""
    store, runs = MemoryEvents(), Runs()
    failing = where != "counts"

    class Defective(MemoryEvents):
        async def write(self, *given: Any, **more: Any) -> Written:
            if failing and where == "write":
                fail()
            return await super().write(*given, **more)

        async def counts(self) -> dict[tuple[FunctionId, State], int]:
            if failing and where == "counts":
                fail()
            return await super().counts()

    def work_of(function: FunctionId) -> Work:
        return fail() if failing and where == "work_of" else Work(10, Retry())

    store = Defective()
    async with running(runs, store, work_of) as queue:
        store.broken = StoreFailed("EIO") if where == "counts" else None
        with pytest.raises(StoreFailed, match="EIO" if store.broken else "ours: Defect"):
            await queue.accept(event(queue, E1))
        failing, store.broken = True, None
        await eventually(lambda: queue.failure == "a defect of ours: Defect")
        with pytest.raises(StoreFailed):
            await queue.accept(event(queue, E2))
        failing = False
        await eventually(lambda: not queue.failure)
        await queue.accept(event(queue, E3))

        assert (await over(queue, E3)).state is State.SUCCEEDED
    assert tracebacks(caplog) == ["events cannot be written"]
    assert [lease.id for lease in runs.seen] == [E3]


@pytest.mark.parametrize("what", ["sweep", "beat", "counts"])
async def test_a_defect_of_what_is_done_now_and_then_ends_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, what: str
):
    """It is logged, and done again."""
    for name in ("SWEEP_S", "BEAT_S", "DEFECT_S"):
        monkeypatch.setattr(module, name, 0.001)
    store = MemoryEvents()
    async with running(Runs(), store, is_alone=False) as queue:
        whole = getattr(store, what)
        setattr(store, what, fail)
        await eventually(lambda: tracebacks(caplog))
        done: list[object] = []

        async def watched(*given: Any) -> object:
            done.append(given)
            return await whole(*given)

        setattr(store, what, watched)
        await eventually(lambda: done)
        await queue.accept(event(queue))

        assert (await over(queue)).state is State.SUCCEEDED
    assert {text.partition(", ")[2] for text in tracebacks(caplog)} == {"for a defect of ours"}


async def test_results_that_a_defect_keeps_from_being_written_end_the_queue_all_the_same(
    caplog: pytest.LogCaptureFixture,
):
    store, runs = MemoryEvents(), Runs()
    runs.gate = asyncio.Event()
    async with running(runs, store) as queue:
        await queue.accept(event(queue))
        await eventually(lambda: runs.seen)
        store.write = fail  # type: ignore[method-assign]
        runs.gate.set()
        await eventually(lambda: queue.failure)

    assert "results are lost, and their events will run again" in tracebacks(caplog)


# ---- many ---------------------------------------------------------------------------------------


async def test_a_burst_on_one_place_runs_one_after_the_other_and_nothing_is_lost():
    runs = Runs()
    async with running(runs, work_of=work(places=1, attempts=1)) as queue:
        ids = [InvocationId(f"burst-{n}") for n in range(1000)]
        async with asyncio.TaskGroup() as tasks:
            for id_ in ids:
                tasks.create_task(queue.accept(event(queue, id_)))
        ended = [await over(queue, id_) for id_ in ids]

    assert {(shown.state, shown.attempts) for shown in ended} == {(State.SUCCEEDED, 1)}
    assert [lease.id for lease in runs.seen] == ids
    assert runs.most == {GREET: 1}


async def test_what_comes_together_is_written_together():
    store = MemoryEvents()
    async with running(Runs(), store) as queue:
        await eventually(lambda: store.writes)  # the first asks what is delayed, and until when
        before = store.writes
        async with asyncio.TaskGroup() as tasks:
            for n in range(100):
                tasks.create_task(queue.accept(event(queue, InvocationId(f"e{n}"))))
        assert store.writes - before == 1


async def test_a_long_backlog_of_one_function_does_not_keep_another_from_running(
    monkeypatch: pytest.MonkeyPatch,
):
    """There is room for ten runs, and thousands of one function wait."""
    monkeypatch.setattr(module, "RUNS_MAX", 10)
    runs = Runs()
    runs.gate = asyncio.Event()
    async with running(runs, work_of=work(places=100)) as queue:
        for n in range(40):
            await queue.accept(event(queue, InvocationId(f"e{n}")))
        await eventually(lambda: len(runs.seen) == 10)
        await queue.accept(event(queue, E1, SHOUT))
        runs.gate.set()
        await over(queue, E1)

    at = [lease.function for lease in runs.seen].index(SHOUT)
    assert at <= 20


async def test_more_than_can_be_on_their_way_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "ACCEPTING_MAX", 2)
    async with running(Runs()) as queue, asyncio.TaskGroup() as tasks:
        for id_ in (E1, E2):
            tasks.create_task(queue.accept(event(queue, id_)))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await queue.accept(event(queue, E3))


# ---- callers that go -----------------------------------------------------------------------------


async def test_who_does_not_wait_for_the_disk_has_its_event_run_all_the_same():
    """It may have been told to go away after the event was written."""
    async with running(Runs()) as queue:
        accepting = asyncio.ensure_future(queue.accept(event(queue)))
        await asyncio.sleep(0)
        accepting.cancel()
        await asyncio.wait({accepting})
        await eventually(lambda: queue.outcomes[GREET, State.SUCCEEDED])

        assert (await over(queue)).state is State.SUCCEEDED


async def test_who_waits_for_a_result_no_longer_leaves_nothing_behind():
    runs = Runs()
    runs.gate = asyncio.Event()
    async with running(runs) as queue:
        await queue.accept(event(queue))
        waiting = asyncio.ensure_future(queue.get(E1, SOON_S))
        await eventually(lambda: queue._watchers)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert queue._watchers == {}
        shown = await queue.get(E1, 0.001)
        assert shown is not None
        assert shown.state is State.RUNNING
        runs.gate.set()


async def test_the_result_of_a_cancelled_event_is_refused_and_counted():
    runs = Runs()
    runs.gate = asyncio.Event()
    async with running(runs) as queue:
        await queue.accept(event(queue))
        await eventually(lambda: runs.seen)
        before = await queue.cancel(E1)
        assert before is not None
        assert before.state is State.RUNNING
        runs.gate.set()
        await eventually(lambda: queue.late)

        assert (await over(queue)).state is State.CANCELLED
        assert queue.outcomes == {(GREET, State.CANCELLED): 1}


async def test_a_cancelled_event_that_waits_is_never_run():
    runs = Runs()
    runs.gate = asyncio.Event()
    async with running(runs, work_of=work(places=1)) as queue:
        await queue.accept(event(queue, E1))
        await queue.accept(event(queue, E2))
        await eventually(lambda: runs.seen)
        await queue.cancel(E2)
        runs.gate.set()
        await over(queue, E1)

        assert (await over(queue, E2)).state is State.CANCELLED
    assert [lease.id for lease in runs.seen] == [E1]
    assert queue.waiting == {}


async def test_a_cancelled_event_that_was_to_be_tried_again_is_never_run():
    """Its time comes, and nothing does."""
    runs = Runs(RAISED)
    async with running(runs, draw=lambda: 0.001) as queue:
        await queue.accept(event(queue))
        await eventually(lambda: queue.outcomes[GREET, State.DELAYED])
        before = await queue.cancel(E1)
        assert before is not None
        assert before.state is State.DELAYED
        await eventually(lambda: queue._due_at is None)

        assert (await over(queue)).state is State.CANCELLED
        assert queue.outcomes[GREET, State.CANCELLED] == 1
    assert (len(runs.seen), queue.waiting) == (1, {})


# ---- a store that fails --------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPAIR_S", 0.001)


@pytest.mark.usefixtures("impatient")
async def test_what_could_not_be_written_was_not_accepted_and_later_it_goes_on():
    store, runs = MemoryEvents(), Runs()
    async with running(runs, store) as queue:
        store.broken = StoreFailed("the disk is full")
        with pytest.raises(StoreFailed, match="the disk is full"):
            await queue.accept(event(queue, E1))
        with pytest.raises(StoreFailed):
            await queue.accept(event(queue, E2))
        assert queue.failure == "the disk is full"

        store.broken = None
        await eventually(lambda: not queue.failure)
        assert await queue.accept(event(queue, E3)) == Accepted(E3)
        assert (await over(queue, E3)).state is State.SUCCEEDED
    assert [lease.id for lease in runs.seen] == [E3]


@pytest.mark.usefixtures("impatient")
async def test_a_result_that_cannot_be_written_now_is_written_when_it_can():
    """And the event is not run again for it."""
    store, runs = MemoryEvents(), Runs()
    runs.gate = asyncio.Event()
    async with running(runs, store) as queue:
        await queue.accept(event(queue))
        await eventually(lambda: runs.seen)
        store.broken = StoreFailed("EIO")
        runs.gate.set()
        await eventually(lambda: queue.failure)
        store.broken = None

        assert (await over(queue)).state is State.SUCCEEDED
    assert len(runs.seen) == 1


class Unclear(MemoryEvents):
    """Loses the answer to a write that is done, and is broken from then on."""

    unclear = False

    async def write(self, *given: Any, **more: Any) -> Written:
        written = await super().write(*given, **more)
        if self.unclear:
            self.unclear, self.broken = False, StoreFailed("the answer was lost")
            raise self.broken
        return written


@pytest.mark.usefixtures("impatient")
async def test_a_write_that_was_done_though_it_seemed_to_fail_is_found_out():
    """Its event is run, and so is what it leased: nobody was told of either."""

    store, runs = Unclear(), Runs()
    async with running(runs, store, work_of=work(places=1)) as queue:
        store.unclear = True
        with pytest.raises(StoreFailed, match="answer was lost"):
            await queue.accept(event(queue))
        store.broken = None

        assert (await over(queue)).state is State.SUCCEEDED
    assert [lease.fence for lease in runs.seen] == [2]


@pytest.mark.usefixtures("impatient")
async def test_a_lease_that_nobody_knows_of_is_found_though_we_run_an_older_one_of_its_event():
    """We were fenced off, leased it again, and the answer was lost."""
    store, runs = Unclear(), Runs()
    runs.gate = asyncio.Event()
    async with running(runs, store) as queue:
        await queue.accept(event(queue))
        await eventually(lambda: runs.seen)
        await store.fence("us")
        store.unclear = True
        queue._told(GREET)
        await eventually(lambda: queue.failure)
        store.broken = None
        await eventually(lambda: len(runs.seen) == 2)
        runs.gate.set()

        assert (await over(queue)).state is State.SUCCEEDED
    assert [lease.fence for lease in runs.seen] == [1, 3]


@pytest.mark.usefixtures("impatient")
async def test_what_is_redriven_while_the_events_are_counted_is_counted():
    """Else some would wait until something else comes: nobody would know of them."""

    class Slow(MemoryEvents):
        async def counts(self) -> dict[tuple[FunctionId, State], int]:
            counted = await super().counts()
            if runs.gate is not None:
                assert await queue.redrive(GREET) == 2
            return counted

    store, runs = Slow(), Runs(RAISED, RAISED)
    async with running(runs, store, work(places=1, attempts=1)) as queue:
        for id_ in (E1, E2):
            await queue.accept(event(queue, id_))
            assert (await over(queue, id_)).state is State.DEAD
        runs.gate = asyncio.Event()
        for id_ in (E3, E4):
            await queue.accept(event(queue, id_))
        await eventually(lambda: len(runs.seen) == 3)
        store.broken = StoreFailed("EIO")
        with pytest.raises(StoreFailed):
            await queue.accept(event(queue, E5))
        store.broken = None
        await eventually(lambda: not queue.failure)
        runs.gate.set()

        for id_ in (E1, E2, E3, E4):
            assert (await over(queue, id_)).state is State.SUCCEEDED
    assert queue.waiting == {}


# ---- ends and beginnings -------------------------------------------------------------------------


async def test_what_ran_when_the_server_died_runs_again_and_has_lost_no_attempt():
    store, runs = MemoryEvents(), Runs()
    runs.gate = asyncio.Event()
    async with running(runs, store, work_of=work(attempts=1)) as queue:
        await queue.accept(event(queue))
        await eventually(lambda: runs.seen)
    async with running(Runs(), store, work_of=work(attempts=1), owner="again") as queue:
        shown = await over(queue)

    assert (shown.state, shown.attempts, shown.fence) == (State.SUCCEEDED, 1, 2)


async def test_what_was_to_be_tried_again_is_tried_again_after_a_restart():
    """Though nothing else waits or comes."""
    store = MemoryEvents()
    async with running(Runs(RAISED), store, draw=lambda: 0.001) as queue:
        await queue.accept(event(queue))
        await eventually(lambda: queue.outcomes[GREET, State.DELAYED])
        queue.hold()
    async with running(Runs(), store, owner="again") as queue:
        shown = await over(queue)

    assert (shown.state, shown.attempts) == (State.SUCCEEDED, 2)


async def test_what_is_held_starts_nothing_and_keeps_what_comes():
    store, runs = MemoryEvents(), Runs()
    async with running(runs, store) as queue:
        queue.hold()
        await queue.accept(event(queue))
        assert runs.seen == []
    async with running(runs, store, owner="again") as queue:
        assert (await over(queue)).state is State.SUCCEEDED


async def test_a_result_that_comes_while_the_queue_is_held_is_written_down():
    store, runs = MemoryEvents(), Runs()
    runs.gate = asyncio.Event()
    async with running(runs, store) as queue:
        await queue.accept(event(queue))
        await eventually(lambda: runs.seen)
        queue.hold()
        runs.gate.set()
        await eventually(lambda: not queue.running_now)

    shown = await store.get(E1)
    assert shown is not None
    assert shown.state is State.SUCCEEDED


async def test_who_shares_its_store_takes_over_from_who_is_silent(monkeypatch: pytest.MonkeyPatch):
    """The other is stopped, not dead: what it says when it goes on comes too late."""
    monkeypatch.setattr(module, "BEAT_S", 0.001)
    store = MemoryEvents()
    await store.open("other")
    await store.beat()
    await store.write(0.0, accepted=[_plain(E1)], wanted={GREET: 1})
    async with running(Runs(), store, is_alone=False) as queue:
        shown = await queue.get(E1, 0.01)
        assert shown is not None
        assert shown.state is State.RUNNING
        monkeypatch.setattr(module, "LEASE_S", 0.01)

        assert (await over(queue)).state is State.SUCCEEDED


async def test_who_shares_its_store_runs_what_others_accept(monkeypatch: pytest.MonkeyPatch):
    """It is told; it knows no number, and asks until nothing is left."""
    store, runs = MemoryEvents(), Runs()
    async with running(runs, store, is_alone=False) as queue:
        await eventually(lambda: store._listeners)
        ids = [InvocationId(f"e{n}") for n in range(200)]
        await store.write(0.0, accepted=[_plain(id_) for id_ in ids])
        for id_ in ids:
            await over(queue, id_)
        await eventually(lambda: not queue.waiting)

    assert [lease.id for lease in runs.seen] == ids


async def test_who_shares_its_store_tries_again_what_failed_on_a_server_that_is_gone(
    monkeypatch: pytest.MonkeyPatch,
):
    """Nobody tells of it: it waits for a time, and for nobody's word."""
    monkeypatch.setattr(module, "RECOUNT_S", 0.001)
    store = MemoryEvents()
    async with running(Runs(), store, is_alone=False) as queue:
        await store.open("other")
        (lease,) = (await store.write(0.0, accepted=[_plain(E1)], wanted={GREET: 1})).leased
        later = Ended(row=lease.row, fence=lease.fence, state=State.DELAYED, at=0.0)
        await store.write(-1.0, [later])
        await store.open("us")

        assert (await over(queue)).state is State.SUCCEEDED


async def test_a_run_that_was_taken_for_dead_and_its_successor_may_both_be_ours():
    """We stood still and were fenced off; the late one's result is refused, the other's counts."""
    store, gates = MemoryEvents(), [asyncio.Event(), asyncio.Event()]

    class Gated(Runs):
        async def __call__(self, lease: Lease) -> Outcome:
            await gates[lease.fence - 1].wait()
            return await super().__call__(lease)

    async with running(Gated(RAISED), store) as queue:
        await queue.accept(event(queue))
        await eventually(lambda: queue.running_now[GREET] == 1)
        await store.fence("us")
        queue._told(GREET)
        await eventually(lambda: queue.running_now[GREET] == 2)
        gates[0].set()
        await eventually(lambda: queue.late)
        gates[1].set()

        assert (await over(queue)).state is State.SUCCEEDED
    assert queue.running_now == {}


async def test_what_comes_to_wait_during_a_write_is_not_forgotten_at_its_end():
    """The write found nothing more: it had looked before."""

    class Overtaken(MemoryEvents):
        async def write(self, *given: Any, **more: Any) -> Written:
            written = await super().write(*given, **more)
            if queue.waiting and not self._rows:
                await super().write(0.0, accepted=[_plain(E1)])  # another's, of which we are told
            return written

    store = Overtaken()
    async with running(Runs(), store, is_alone=False) as queue:
        await eventually(lambda: store._listeners)
        queue._told(GREET)
        await eventually(lambda: store._rows)

        assert (await over(queue)).state is State.SUCCEEDED


async def test_who_shares_its_store_leaves_functions_that_it_does_not_know_to_others():
    store, runs = MemoryEvents(), Runs()
    async with running(runs, store, lambda function: None, is_alone=False) as queue:
        await queue.accept(event(queue))
        await eventually(lambda: not queue._wake.is_set())
        shown = await queue.get(E1)

    assert shown is not None
    assert (shown.state, runs.seen) == (State.WAITING, [])


def _plain(id_: InvocationId) -> Event:
    return Event(id=id_, function=GREET, meta=b"", body=b"", accepted_at=9e9, age_s=3600.0)


async def test_old_events_are_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "SWEEP_S", 0.001)
    async with running(Runs(), keep=Keep(over_s=0.0)) as queue:
        await queue.accept(event(queue))
        while await queue.get(E1):  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_results_that_can_never_be_written_end_the_queue_all_the_same(
    caplog: pytest.LogCaptureFixture,
):
    """Their events are run again at the next start."""
    store, runs = MemoryEvents(), Runs()
    runs.gate = asyncio.Event()
    async with running(runs, store) as queue:
        await queue.accept(event(queue))
        await eventually(lambda: runs.seen)
        store.broken = StoreFailed("EIO")
        runs.gate.set()
        await eventually(lambda: queue.failure)
    assert "results are lost" in caplog.text

    store.broken = None
    async with running(Runs(), store, owner="again") as queue:
        assert (await over(queue)).state is State.SUCCEEDED


async def test_those_who_share_hold_up_nobody_else(monkeypatch: pytest.MonkeyPatch):
    """Words to many who are silent: what runs beside them has room."""
    monkeypatch.setattr("dayfly_pool.queue.SHARE_MAX", 3)
    runs, silent = Runs(), [FunctionId(f"default/f{n}@success") for n in range(4)]
    runs.gate = asyncio.Event()

    def work_of(function: FunctionId) -> Work:
        return Work(2, Retry(), "outside" if "@" in function else "")

    async with running(runs, work_of=work_of) as queue:
        ids = [InvocationId(f"e{n}") for n in range(8)]
        told = [event(queue, id_, silent[n // 2]) for n, id_ in enumerate(ids)]
        async with asyncio.TaskGroup() as tasks:
            for each in told:
                tasks.create_task(queue.accept(each))
        await queue.accept(event(queue, E1))
        await eventually(lambda: queue.running_now[GREET])
        assert sum(queue.running_now[each] for each in silent) == 3
        runs.gate.set()
        for id_ in ids:
            assert (await over(queue, id_)).state is State.SUCCEEDED
