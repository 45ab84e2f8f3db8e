"""Jobs on a pool of fake sandboxes, in journals that can be broken: what is run, what is written
down, and what is not run again.
"""

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import structs

from dayfly.protocol import Failed, Invoke
from dayfly_pool import autoscale, ours
from dayfly_pool import journal as journal_module
from dayfly_pool.batch import job as job_module
from dayfly_pool.batch import jobs as module
from dayfly_pool.batch.again import spec_of
from dayfly_pool.batch.indices import IndexSet, parse
from dayfly_pool.batch.job import (
    ITEMS,
    LOG,
    RESULTS,
    Cancel,
    Job,
    SetParallelism,
    SetSuspended,
    Stored,
)
from dayfly_pool.batch.jobs import Jobs, View
from dayfly_pool.batch.model import JobManifest, JobSpec, SuccessPolicy, SuccessRule
from dayfly_pool.config import Config
from dayfly_pool.errors import BadInput, JobNotFound, NameTaken, StoreFailed
from dayfly_pool.journal import Journals
from dayfly_pool.models import (
    BASE,
    Environment,
    Function,
    FunctionId,
    FunctionSpec,
    Metadata,
    Mold,
)
from dayfly_pool.pool import Pool
from dayfly_pool.store.journals import Entry
from dayfly_pool.store.memory_journals import MemoryJournals
from dayfly_pool.testing import DIGEST, Ended, FakeDriver, FakeGuest

SOON_S = 10.0
"""What must happen happens at once; this is for a machine that is very busy."""

WORK = FunctionSpec(handler="main:work", package=DIGEST, timeout_seconds=30)
RAISED = Failed(kind="Raised", message="no", traceback="")
owners = itertools.count(1)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for half a second waits for a hundredth of one."""
    monkeypatch.setattr(autoscale, "BACKOFF_FIRST_S", 0.01)
    monkeypatch.setattr(job_module, "COMMIT_S", 0.001)
    monkeypatch.setattr(journal_module, "REPAIR_S", 0.01)
    monkeypatch.setattr(ours, "AGAIN_S", 0.01)
    monkeypatch.setattr(module, "SWEEP_S", 0.01)


class Work:
    """What tasks do: each as its index's next word of *script* says, and then return the index."""

    def __init__(self, script: Mapping[int, Iterable[Any]] | None = None) -> None:
        self.script = {index: list(words) for index, words in (script or {}).items()}
        self.ran: Counter[int] = Counter()
        self.ended: Counter[int] = Counter()
        self.bodies: dict[int, Any] = {}
        self.env: dict[int, dict[str, str]] = {}
        self.now = self.most = 0
        self.gate = asyncio.Event()
        self.gate.set()
        """No task ends before it is set."""

    async def __call__(self, guest: FakeGuest, request: Invoke, body: bytes) -> Any:
        assert request.env is not None
        index = int(request.env["JOB_INDEX"])
        self.ran[index] += 1
        self.bodies[index], self.env[index] = json.loads(body), request.env
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.gate.wait()
            await asyncio.sleep(0)
            words = self.script.get(index)
            word = words.pop(0) if words else index
            if isinstance(word, Exception):
                raise word
            self.ended[index] += 1
            return word if isinstance(word, Failed) else msgspec.json.encode(word)
        finally:
            self.now -= 1


@asynccontextmanager
async def running(
    work: Work, store: MemoryJournals | None = None, *, owner: str = "", **changed: Any
) -> AsyncIterator[Jobs]:
    """The jobs of a server that does *work*."""
    settings = {
        "data": Path("/nowhere"),
        "generic_min": 0,
        "generic_max": 0,
        "sandboxes_max": 16,
        "starts_max": 8,
        "tick_s": 0.01,
        "grace_s": 0.05,
        "memory_reserve_mb": 0,
    }
    pool = Pool(Config(**settings), FakeDriver({"main:work": work}))
    is_alone = changed.pop("is_alone", True)
    owner = owner or f"server-{next(owners)}"
    journals = Journals(store or MemoryJournals(), owner=owner, is_alone=is_alone, **changed)

    def prepare(id_: FunctionId, stored: Stored, spec: FunctionSpec) -> Function:
        function = Function(id_, "1", spec, Mold(BASE, "none", ""), is_batch=True)
        pool.deploy(function, Environment(digest=BASE))
        return function

    jobs = Jobs(pool, journals, prepare, {module.TASKS: 16})
    async with asyncio.timeout(SOON_S), pool.running(), journals.running(), jobs.running():
        yield jobs


def manifest(name: str = "sums", **spec: Any) -> JobManifest:
    given = {"function": "work", "size": 10, "parallelism": 4, "backoff_seconds": 0.0} | spec
    given = {key: value for key, value in given.items() if value is not None}
    return JobManifest(metadata=Metadata(name=name), spec=JobSpec(**given))


async def create(jobs: Jobs, name: str = "sums", **spec: Any) -> View:
    return await jobs.create(manifest(name, **spec), WORK)


async def lines(*items: bytes) -> AsyncIterator[bytes]:
    for item in items:
        yield item


async def until(question: Callable[[], object]) -> None:
    """Let everybody else go on until it is so; the test's own deadline ends it."""
    while not question():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


async def over(jobs: Jobs, name: str = "sums") -> View:
    """The job when it is over."""
    while not (view := await jobs.get("default", name)).journal.is_over:  # noqa: ASYNC110
        await asyncio.sleep(0.002)
    return view


async def ask(jobs: Jobs, wanted: Any, name: str = "sums") -> View:
    return await jobs.ask("default", name, wanted)


def live(jobs: Jobs) -> Job:
    """The one that runs."""
    (found,) = jobs._live.values()
    return found


async def results(jobs: Jobs, name: str = "sums") -> dict[int, Any]:
    """All results, page by page."""
    found: list[tuple[int, bytes]] = []
    after = 0
    while True:
        page, after = await jobs.results("default", name, None, after)
        found += page
        if not after:
            break
    assert len({index for index, _ in found}) == len(found), "a result twice"
    return {index: json.loads(body) for index, body in found}


# ---- tasks --------------------------------------------------------------------------------------


async def test_every_index_runs_once_and_its_result_is_kept():
    work = Work()
    async with running(work) as jobs:
        await create(jobs, size=200)
        view = await over(jobs)
        kept = await results(jobs)

    assert (view.status.state, view.status.reason) == ("Complete", "CompletionsReached")
    assert (view.status.succeeded, view.status.failed, view.status.running) == (200, 0, 0)
    assert work.ran == Counter(range(200))
    assert kept == {index: index for index in range(200)}


async def test_no_more_run_at_once_than_its_parallelism():
    work = Work()
    async with running(work) as jobs:
        await create(jobs, size=100, parallelism=3)
        await over(jobs)

    assert work.most == 3


async def test_a_task_is_told_who_it_is():
    """The variables of Code Engine and of Kubernetes; the event of one without an item."""
    work = Work({2: [RAISED]})
    async with running(work) as jobs:
        await create(jobs, indices="2,5-6", size=None)
        await over(jobs)

    assert work.env[2] == {
        "JOB_INDEX": "2",
        "JOB_COMPLETION_INDEX": "2",
        "JOB_INDEX_RETRY_COUNT": "1",
    }
    assert work.bodies == {2: {"index": 2, "size": 3, "retry": 1}} | {
        index: {"index": index, "size": 3, "retry": 0} for index in (5, 6)
    }


async def test_what_a_task_returned_is_found_by_its_index():
    async with running(Work({3: [None], 4: ["four"]})) as jobs:
        await create(jobs)
        await over(jobs)

        assert await jobs.results("default", "sums", 4) == ([(4, b'"four"')], 0)
        assert (await jobs.results("default", "sums", 3))[0] == []
        assert (await jobs.results("default", "sums", 99))[0] == []
        assert (await results(jobs)).keys() == {*range(10)} - {3}


async def test_small_entries_of_results_become_a_large_one(monkeypatch: pytest.MonkeyPatch):
    """And nothing is lost or there twice."""
    monkeypatch.setattr(job_module, "SMALL_MAX", 3)
    store = MemoryJournals()
    async with running(Work(), store) as jobs:
        view = await create(jobs, size=500, parallelism=2)
        await over(jobs)
        entries = await store.entries(view.journal.id, part=RESULTS)
        kept = await results(jobs)

    assert store.writes > 20
    assert len(entries) < store.writes / 2
    assert kept == {index: index for index in range(500)}


async def test_a_result_that_is_too_large_is_a_failure_of_its_task():
    work = Work({1: ["x" * job_module.RESULT_BYTES_MAX] * 2})
    async with running(work) as jobs:
        await create(jobs, size=2, backoff_limit=1)
        view = await over(jobs)
        told = (await jobs.details(view)).told

    assert (view.status.state, view.status.reason) == ("Failed", "BackoffLimitExceeded")
    assert {each.kind for each in told} == {"ResultTooLarge"}


NO_LINES = [
    b'1}\n{"index":99,"result":"forged"',
    b"",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b'"\xff"',
    b'"\xed\xa0\x80"',
    b'"\x1b[2J"',
    b"[" * 100_000,
    b"[" * 101 + b"]" * 101,
    b'{"a":' * 101 + b"1" + b"}" * 101,
]


@pytest.mark.parametrize("body", NO_LINES)
async def test_a_result_that_is_no_line_of_json_is_a_failure_of_its_task(body: bytes):
    """Whatever a sandbox sends; a function's own results are JSON that others can read."""
    work = Work({1: [msgspec.Raw(body)]})
    async with running(work) as jobs:
        await create(jobs, size=3, backoff_limit_per_index=0)
        view = await over(jobs)
        kept = await results(jobs)
        (told,) = (await jobs.details(view)).told

    assert kept == {0: 0, 2: 2}
    assert (told.index, told.kind) == (1, "BadResponse")
    assert "no JSON" in told.message or "nested more than 100 deep" in told.message


async def test_a_result_is_kept_on_one_line_as_it_was_written():
    large = b"1" * 300
    bodies = [b'[1,\r\n {"a": 1.50}]', large, b"[" * 100 + b"]" * 100, b'"%s"' % (b"[{" * 99)]
    work = Work({n: [msgspec.Raw(body)] for n, body in enumerate(bodies)})
    async with running(work) as jobs:
        await create(jobs, size=len(bodies))
        await over(jobs)
        kept, _ = await jobs.results("default", "sums", None)

    assert dict(kept) == {0: b'[1,{"a":1.50}]', **dict(enumerate(bodies[1:], 1))}


@pytest.mark.parametrize("body", NO_LINES)
async def test_what_was_kept_and_is_no_json_hides_no_other_result(
    body: bytes, monkeypatch: pytest.MonkeyPatch
):
    async with running(Work({1: [msgspec.Raw(body)]})) as jobs:
        with monkeypatch.context() as unchecked:
            unchecked.setattr(job_module, "line_of", lambda body: body)
            await create(jobs, size=3)
            await over(jobs)

        assert await results(jobs) == {0: 0, 2: 2}
        assert await jobs.results("default", "sums", 1) == ([], 0)


async def test_a_crashed_sandbox_costs_a_try():
    work = Work({3: [Ended()]})
    async with running(work) as jobs:
        await create(jobs)
        view = await over(jobs)

    assert view.status.state == "Complete"
    assert work.ran[3] == 2


async def test_what_fails_too_often_ends_the_job():
    work = Work({0: [RAISED] * 9})
    async with running(work) as jobs:
        await create(jobs, size=1, backoff_limit=2)
        view = await over(jobs)

    assert (view.status.state, view.status.reason) == ("Failed", "BackoffLimitExceeded")
    assert (work.ran[0], view.status.failures) == (3, 3)


async def test_with_a_limit_for_each_index_the_others_go_on():
    work = Work({3: [RAISED] * 9})
    async with running(work) as jobs:
        await create(jobs, backoff_limit_per_index=1)
        view = await over(jobs)
        details = await jobs.details(view)

    assert (view.status.state, view.status.reason) == ("Failed", "FailedIndexes")
    assert (str(details.succeeded), str(details.failed)) == ("0-2,4-9", "3")
    assert [(told.index, told.retry, told.kind) for told in details.told] == [
        (3, 0, "Raised"),
        (3, 1, "Raised"),
    ]


# ---- again --------------------------------------------------------------------------------------


async def test_what_has_not_succeeded_is_done_by_another_job():
    """Also what never ran; what succeeded is not done twice."""
    work = Work({3: [RAISED] * 3})
    async with running(work) as jobs:
        await create(jobs, backoff_limit=2, parallelism=1)
        first = await over(jobs)
        done = {*(await jobs.details(first)).succeeded}
        again = await jobs.retry(first, WORK)
        second = await over(jobs, "sums-r1")
        third = await jobs.retry(first, WORK)

    assert (first.status.state, 3 in done) == ("Failed", False)
    assert again.status.total == 10 - len(done) == second.status.succeeded
    assert second.status.state == "Complete"
    assert all(work.ended[index] <= 2 for index in done)
    assert third.journal.name == "sums-r2"


async def test_items_of_what_has_not_succeeded_go_with_it(monkeypatch: pytest.MonkeyPatch):
    """Each with its index."""
    monkeypatch.setattr(module, "CHUNK_ITEMS", 7)
    work = Work({index: [RAISED] for index in (0, 8, 30, 99)})
    async with running(work) as jobs:
        sent = lines(*(b'{"n": %d}' % n for n in range(100)))
        await jobs.create(manifest(size=None, backoff_limit_per_index=0), WORK, sent)
        first = await over(jobs)
        work.bodies.clear()
        await jobs.retry(first, WORK, "the-rest")
        second = await over(jobs, "the-rest")
        with pytest.raises(NameTaken):
            await jobs.retry(first, WORK, "the-rest")

    assert second.stored.spec.indices == "0,8,30,99"
    assert second.status.state == "Complete"
    assert work.bodies == {n: {"n": n} for n in (0, 8, 30, 99)}


async def test_only_a_job_that_did_not_succeed_is_tried_again():
    work = Work()
    async with running(work) as jobs:
        await create(jobs, size=1)
        await over(jobs)
        with pytest.raises(BadInput, match="is Complete: nothing is left"):
            await jobs.retry(await jobs.get("default", "sums"), WORK)
        view = await create(jobs, "later", suspend=True)
        with pytest.raises(BadInput, match="is Suspended: it is not over"):
            await jobs.retry(view, WORK)


@pytest.mark.parametrize(
    ("rule", "left"),
    [
        ({"succeeded_count": 6}, SuccessRule(succeeded_count=2)),
        ({"succeeded_indexes": "2-5"}, SuccessRule("4-5", 2)),
        ({"succeeded_indexes": "2-5", "succeeded_count": 3}, SuccessRule("4-5", 1)),
    ],
)
def test_limits_are_of_what_is_left(rule: dict[str, Any], left: SuccessRule):
    """Of ten indices four have succeeded."""
    policy = SuccessPolicy(rules=(SuccessRule(**rule),))
    limits = {"min_count": 8, "backoff_limit_per_index": 1, "max_failed_indexes": 9}
    spec = manifest(success_policy=policy, suspend=True, **limits).spec
    found = spec_of(spec, parse("4-9"), parse("0-3"))

    assert (found.indices, found.size, found.suspend) == ("4-9", None, False)
    assert (found.min_count, found.max_failed_indexes) == (6, 6)
    assert found.success_policy == SuccessPolicy(rules=(left,))


def test_a_list_of_what_is_left_has_an_end():
    left = IndexSet(999_999)
    for index in range(0, 1_000_000, 2):
        left.add(index)

    with pytest.raises(BadInput, match="500000 indices left are too scattered"):
        spec_of(manifest(size=1_000_000).spec, left, IndexSet(999_999))


# ---- items --------------------------------------------------------------------------------------


async def test_an_item_is_its_tasks_event():
    work = Work()
    async with running(work) as jobs:
        await create(jobs, size=None, items=({"n": 7}, "text", None))
        await over(jobs)

    assert work.bodies == {0: {"n": 7}, 1: "text", 2: None}


async def test_items_that_come_as_lines_are_kept_in_chunks(monkeypatch: pytest.MonkeyPatch):
    """Whatever the order in which they are asked for."""
    monkeypatch.setattr(module, "CHUNK_ITEMS", 7)
    monkeypatch.setattr(job_module, "CHUNKS_KEPT", 2)
    work = Work({index: [RAISED] for index in range(0, 100, 9)})
    async with running(work) as jobs:
        sent = lines(*(b' {"n": %d} \n' % n for n in range(100)), b"\n", b"")
        view = await jobs.create(manifest(size=None, backoff_limit=50), WORK, sent)
        assert (view.status.total, view.journal.is_draft) == (100, False)
        assert (await over(jobs)).status.state == "Complete"

    assert work.bodies == {n: {"n": n} for n in range(100)}


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        ((), "no items came"),
        ((b"\n", b"  "), "no items came"),
        ((b"1", b"{no json"), "line 2: not valid JSON"),
        ((b"1", b"\xff\xfe"), "line 2: not valid JSON"),
        ((b"[" * 100_000,), "line 1: not valid JSON"),
        ((b'"' + b"x" * module.ITEM_BYTES_MAX + b'"',), "line 1: over"),
    ],
)
async def test_items_that_cannot_be_are_refused_and_leave_nothing(
    sent: tuple[bytes, ...], why: str
):
    store = MemoryJournals()
    async with running(Work(), store) as jobs:
        with pytest.raises(BadInput, match=why):
            await jobs.create(manifest(size=None), WORK, lines(*sent))

        assert await jobs.page(None, 10, None) == []
        assert await store.find("job", "default", "sums") is None


async def test_a_job_has_one_to_ten_million_indices():
    async with running(Work()) as jobs:
        with pytest.raises(BadInput, match="at least one"):
            await create(jobs, size=None, items=())
        with pytest.raises(BadInput, match="over the largest"):
            await create(jobs, size=None, indices="10000000")
        with pytest.raises(BadInput, match="items were sent"):
            await jobs.create(manifest(size=3), WORK, lines(b"1"))
        view = await create(jobs, size=10_000_000, suspend=True)

    assert view.status.total == 10_000_000


# ---- what is wanted of it -----------------------------------------------------------------------


async def test_a_suspended_job_stops_and_what_was_stopped_is_not_counted():
    """The same tasks run again when it goes on."""
    work = Work()
    work.gate.clear()
    async with running(work) as jobs:
        await create(jobs, backoff_limit=0)
        await until(lambda: work.now == 4)
        view = await ask(jobs, SetSuspended(True))
        assert (view.status.state, view.status.running) == ("Suspended", 0)
        assert view.status.started_at == 0
        work.gate.set()
        await until(lambda: work.now == 0)
        await ask(jobs, SetSuspended(False))
        view = await over(jobs)

    assert (view.status.state, view.status.failures) == ("Complete", 0)
    assert work.ended == Counter(range(10))
    assert {index for index, times in work.ran.items() if times == 2} == {0, 1, 2, 3}


async def test_a_job_can_begin_suspended():
    work = Work()
    async with running(work) as jobs:
        await create(jobs, suspend=True)
        await until(lambda: jobs._live)
        assert (await jobs.get("default", "sums")).status.state == "Suspended"
        assert not work.ran
        await ask(jobs, SetSuspended(False))

        assert (await over(jobs)).status.state == "Complete"


async def test_more_or_fewer_tasks_run_at_once_when_that_is_wanted():
    work = Work()
    work.gate.clear()
    async with running(work) as jobs:
        await create(jobs, size=30, parallelism=2)
        await until(lambda: work.now == 2)
        await ask(jobs, SetParallelism(6))
        await until(lambda: work.now == 6)
        await ask(jobs, SetParallelism(1))
        work.gate.set()
        await until(lambda: work.now <= 1)
        work.most = 0
        view = await over(jobs)

    assert (view.status.state, work.most) == ("Complete", 1)


async def test_a_cancelled_job_is_over_and_what_ran_is_stopped():
    work = Work()
    work.gate.clear()
    async with running(work) as jobs:
        await create(jobs)
        await until(lambda: work.now == 4)
        view = await ask(jobs, Cancel())
        assert (view.status.state, view.journal.is_over) == ("Cancelled", True)
        await until(lambda: work.now == 0)

    assert not work.ended


async def test_a_softly_cancelled_job_lets_its_tasks_end_and_keeps_what_they_did():
    work = Work()
    work.gate.clear()
    async with running(work) as jobs:
        await create(jobs)
        await until(lambda: work.now == 4)
        asked = asyncio.create_task(ask(jobs, Cancel(hard=False)))
        await until(lambda: live(jobs).status.ending)
        work.gate.set()
        await asked
        view = await over(jobs)
        kept = await results(jobs)

    assert view.status.state == "Cancelled"
    assert work.ended == Counter(range(4))
    assert (view.status.succeeded, kept.keys()) == (4, {0, 1, 2, 3})


async def test_a_softly_cancelled_job_can_be_cancelled_hard():
    work = Work()
    work.gate.clear()
    async with running(work) as jobs:
        await create(jobs)
        await until(lambda: work.now == 4)
        asked = asyncio.create_task(ask(jobs, Cancel(hard=False)))
        await until(lambda: live(jobs).status.ending)
        await ask(jobs, Cancel())
        await asked

        assert (await over(jobs)).status.state == "Cancelled"


async def test_nothing_can_be_wanted_of_a_job_that_is_over():
    async with running(Work()) as jobs:
        await create(jobs)
        await over(jobs)

        with pytest.raises(BadInput, match="is over: Complete"):
            await ask(jobs, Cancel())
        with pytest.raises(JobNotFound, match="default/other"):
            await ask(jobs, Cancel(), "other")


async def test_a_job_that_takes_too_long_is_over():
    work = Work()
    work.gate.clear()
    async with running(work) as jobs:
        await create(jobs, active_deadline_seconds=0.05)
        view = await over(jobs)
        await until(lambda: work.now == 0)

    assert (view.status.state, view.status.reason) == ("Failed", "DeadlineExceeded")


async def test_time_does_not_pass_for_a_suspended_job():
    """As in Kubernetes it begins anew when the job goes on."""
    work = Work()
    async with running(work) as jobs:
        await create(jobs, active_deadline_seconds=0.2, suspend=True)
        await asyncio.sleep(0.3)
        assert (await jobs.get("default", "sums")).status.state == "Suspended"
        await ask(jobs, SetSuspended(False))

        assert (await over(jobs)).status.state == "Complete"


async def test_the_deadline_counts_from_the_first_start_after_a_restart_too():
    store, work = MemoryJournals(), Work()
    work.gate.clear()
    async with running(work, store) as jobs:
        await create(jobs, active_deadline_seconds=0.3)
        await until(lambda: work.now == 4)
        first = (await jobs.get("default", "sums")).status.started_at
        await asyncio.sleep(0.02)  # written
    async with running(work, store) as jobs:
        view = await over(jobs)

    assert view.status.reason == "DeadlineExceeded"
    assert view.status.started_at == first


# ---- restarts -----------------------------------------------------------------------------------


async def test_what_has_ended_does_not_run_again_after_a_restart():
    """What ran and did not end does, and what was decided holds."""
    store, work = MemoryJournals(), Work({0: [RAISED]})
    gates = {index: asyncio.Event() for index in range(10)}

    class Stepwise(Work):
        async def __call__(self, guest: FakeGuest, request: Invoke, body: bytes) -> Any:
            await super().__call__(guest, request, body)
            assert request.env is not None
            index = int(request.env["JOB_INDEX"])
            await gates[index].wait()
            return msgspec.json.encode(f"{index} of the first")

    first = Stepwise()
    for index in (0, 1, 3):
        gates[index].set()
    async with running(first, store) as jobs:
        await create(jobs)
        await until(lambda: first.now == 0 and first.ran.total() >= 7)
    async with running(work, store) as jobs:
        view = await over(jobs)
        kept = await results(jobs)

    assert (view.status.state, view.status.succeeded) == ("Complete", 10)
    assert work.ran.keys() == {2, *range(4, 10)}
    assert {index for index, value in kept.items() if value != index} == {0, 1, 3}
    assert kept.keys() == {*range(10)}


async def test_failures_are_counted_over_restarts():
    store, work = MemoryJournals(), Work({0: [RAISED] * 9})
    async with running(work, store) as jobs:
        await create(jobs, size=1, backoff_limit=1, backoff_seconds=0.2)
        await until(lambda: work.ended[0] == 1)
        await asyncio.sleep(0.02)
    async with running(work, store) as jobs:
        view = await over(jobs)
        told = (await jobs.details(view)).told

    assert view.status.reason == "BackoffLimitExceeded"
    assert (work.ran[0], view.status.failures) == (2, 2)
    assert [each.retry for each in told] == [0, 1]


@pytest.mark.parametrize("segments", [1, 2, 5])
async def test_many_segments_become_a_snapshot_that_says_the_same(
    monkeypatch: pytest.MonkeyPatch, segments: int
):
    monkeypatch.setattr(job_module, "SEGMENTS_MAX", segments)
    store = MemoryJournals()
    fails = {index: [RAISED] * 9 for index in range(0, 300, 50)}
    work = Work(fails)
    async with running(work, store) as jobs:
        view = await create(jobs, size=300, backoff_limit_per_index=1, parallelism=2)
        await until(lambda: work.ended.total() > 150)
    written = await store.entries(view.journal.id, part=LOG)
    async with running(work, store) as jobs:
        view = await over(jobs)
        details = await jobs.details(view)
        kept = await results(jobs)

    assert len(written) <= segments + 1
    assert (view.status.succeeded, view.status.failed) == (294, 6)
    assert {*details.failed} == fails.keys()
    assert {told.index for told in details.told} == fails.keys()
    assert kept.keys() == {*range(300)} - fails.keys()


@pytest.mark.parametrize("hard", [True, False])
async def test_what_was_decided_holds_whenever_the_server_dies(hard: bool):
    """A cancelled job that was still stopping is not begun again."""
    store, work = MemoryJournals(), Work()
    work.gate.clear()
    async with running(work, store) as jobs:
        view = await create(jobs)
        await until(lambda: work.now == 4)
        written = store.writes
        asked = asyncio.create_task(ask(jobs, Cancel(hard)))
        await until(lambda: store.writes > written)
        row = store._rows[view.journal.id]
        before = row.journal, dict(row.entries)
        with suppress(StoreFailed):
            await asked
        await until(lambda: hard is False or row.journal.is_over)
    row.journal, row.entries = structs.replace(before[0], owner="", ended_at=0.0), before[1]
    ran = work.ran.total()
    work.gate.set()
    async with running(work, store) as jobs:
        view = await over(jobs)

    assert (view.status.state, work.ran.total()) == ("Cancelled", ran)


async def test_what_was_wanted_while_nobody_ran_it_is_heard_by_who_runs_it_next():
    store, work = MemoryJournals(), Work()
    work.gate.clear()
    async with running(work, store) as jobs:
        view = await create(jobs)
        await until(lambda: work.now == 4)
    await store.wish(view.journal.id, msgspec.json.encode(SetParallelism(1)))
    work.gate.set()
    work.most = 0
    async with running(work, store) as jobs:
        view = await over(jobs)

    assert (view.status.state, view.status.parallelism) == ("Complete", 1)
    assert work.most <= 1


async def test_what_was_wanted_holds_after_a_restart():
    """It is heard once: a job that was suspended and went on is not suspended again."""
    store, work = MemoryJournals(), Work()
    work.gate.clear()
    async with running(work, store) as jobs:
        await create(jobs)
        await ask(jobs, SetParallelism(2))
        await ask(jobs, SetSuspended(True))
        await ask(jobs, SetSuspended(False))
        await ask(jobs, SetSuspended(True))
    work.gate.set()
    async with running(work, store) as jobs:
        await until(lambda: jobs._live)
        view = await jobs.get("default", "sums")
        assert (view.status.state, view.status.parallelism) == ("Suspended", 2)
        work.most = 0
        await ask(jobs, SetSuspended(False))
        await over(jobs)

    assert work.most == 2


async def test_what_another_server_wants_is_heard():
    store, work = MemoryJournals(), Work()
    work.gate.clear()
    async with running(work, store, is_alone=False) as jobs:
        view = await create(jobs)
        await until(lambda: work.now == 4)
        await store.wish(view.journal.id, msgspec.json.encode(Cancel()))

        assert (await over(jobs)).status.state == "Cancelled"


# ---- the store ----------------------------------------------------------------------------------


async def test_a_store_that_fails_for_a_while_holds_a_job_up_and_loses_nothing():
    store, work = MemoryJournals(), Work()
    work.gate.clear()
    async with running(work, store) as jobs:
        await create(jobs, size=50)
        await until(lambda: work.now == 4)
        store.broken = StoreFailed("no space left")
        work.gate.set()
        await until(lambda: work.ended.total() == 50)
        assert not (await jobs.get("default", "sums")).journal.is_over
        store.broken = None
        view = await over(jobs)

    assert (view.status.state, view.status.succeeded) == ("Complete", 50)
    assert work.ran == Counter(range(50))


async def test_what_cannot_be_written_holds_up_what_is_begun(monkeypatch: pytest.MonkeyPatch):
    """So memory has a limit: nothing new while so much has ended that is not on the disk."""
    monkeypatch.setattr(job_module, "NEWS_MAX", 5)
    store, work = MemoryJournals(), Work({index: [RAISED] for index in range(0, 50, 2)})
    work.gate.clear()
    async with running(work, store) as jobs:
        await create(jobs, size=50, backoff_limit=100)
        await until(lambda: work.now == 4)
        store.broken = StoreFailed("no space left")
        work.gate.set()
        await until(lambda: work.now == 0)
        await asyncio.sleep(0.05)
        begun = work.ran.total()
        store.broken = None
        view = await over(jobs)

    assert begun < 25
    assert view.status.state == "Complete"


async def test_a_server_ends_although_its_store_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(job_module, "LAST_COMMIT_S", 0.05, raising=False)
    store, work = MemoryJournals(), Work()
    async with running(work, store) as jobs:
        await create(jobs, size=50, parallelism=1)
        await until(lambda: work.ended.total() > 3)
        store.broken = StoreFailed("no space left")

    assert not [row for row in store._rows.values() if row.journal.is_over]


async def test_a_job_that_somebody_else_has_is_stopped_here():
    store, work = MemoryJournals(), Work()
    work.gate.clear()
    async with running(work, store) as jobs:
        view = await create(jobs)
        await until(lambda: work.now == 4)
        row = store._rows[view.journal.id]
        row.change(owner="another", fence=row.journal.fence + 1)
        live(jobs)._changed = True
        live(jobs)._news.set()
        await until(lambda: not jobs._live and work.now == 0)

        assert not (await jobs.get("default", "sums")).journal.is_over
    assert not work.ended


async def test_a_damaged_journal_is_not_run_and_harms_no_other():
    class Damaged(MemoryJournals):
        id = ""

        async def entries(self, id_: Any, **which: Any) -> list[Entry]:
            found = await super().entries(id_, **which)
            if id_ != self.id or which.get("part") != LOG:
                return found
            return [structs.replace(entry, body=b"", damage="bits fell") for entry in found]

    store, work = Damaged(), Work()
    work.gate.clear()
    async with running(work, store) as jobs:
        view = await create(jobs)
        await until(lambda: work.now == 4)
        work.gate.set()
        await until(lambda: work.ended.total() >= 5)
    store.id = view.journal.id
    ran = work.ran.total()
    async with running(work, store) as jobs:
        await create(jobs, "other", size=3)
        await over(jobs, "other")

        assert not (await jobs.get("default", "sums")).journal.is_over
    assert work.ran.total() == ran + 3


async def test_a_damaged_item_fails_its_task():
    """And is not tried for ever, as what failed on our side otherwise is."""

    class Damaged(MemoryJournals):
        async def entries(self, id_: Any, **which: Any) -> list[Entry]:
            found = await super().entries(id_, **which)
            if which.get("part") != ITEMS:
                return found
            return [structs.replace(entry, body=b"", damage="bits fell") for entry in found]

    async with running(Work(), Damaged()) as jobs:
        await create(jobs, size=None, items=(1, 2), backoff_limit=1)
        view = await over(jobs)
        told = (await jobs.details(view)).told

    assert view.status.reason == "BackoffLimitExceeded"
    assert {each.kind for each in told} == {"ItemDamaged"}


async def test_damaged_results_are_an_error_that_says_so():
    class Damaged(MemoryJournals):
        async def entries(self, id_: Any, **which: Any) -> list[Entry]:
            found = await super().entries(id_, **which)
            return [structs.replace(entry, body=b"", damage="bits fell") for entry in found]

    async with running(Work(), Damaged()) as jobs:
        await create(jobs)
        await over(jobs)

        with pytest.raises(StoreFailed, match="bits fell"):
            await jobs.results("default", "sums", None)


# ---- names, and the end -------------------------------------------------------------------------


async def test_the_same_job_again_is_the_one_that_is_there():
    """So who was not told that it was kept can ask again."""
    async with running(Work()) as jobs:
        first = await create(jobs)
        again = await create(jobs)
        await over(jobs)
        at_last = await create(jobs)

    assert first.journal.id == again.journal.id == at_last.journal.id
    assert at_last.status.state == "Complete"


async def test_another_job_of_that_name_is_refused():
    async with running(Work()) as jobs:
        await create(jobs)

        with pytest.raises(NameTaken, match="default/sums"):
            await create(jobs, size=11)
        with pytest.raises(NameTaken, match="default/sums"):
            await jobs.create(manifest(), structs.replace(WORK, package="1" * 64))
        with pytest.raises(NameTaken, match="default/sums"):
            await jobs.create(manifest(size=None), WORK, lines(b"1"))


async def test_a_deleted_job_is_forgotten_and_its_name_is_free():
    work = Work()
    async with running(work) as jobs:
        first = await create(jobs)
        await over(jobs)
        await jobs.delete("default", "sums")
        with pytest.raises(JobNotFound):
            await jobs.get("default", "sums")
        second = await create(jobs)
        await over(jobs)

    assert first.journal.id != second.journal.id
    assert work.ran == Counter(dict.fromkeys(range(10), 2))


async def test_a_job_that_runs_is_cancelled_when_it_is_deleted():
    work = Work()
    work.gate.clear()
    async with running(work) as jobs:
        await create(jobs)
        await until(lambda: work.now == 4)
        await jobs.delete("default", "sums")
        with pytest.raises(JobNotFound):
            await jobs.get("default", "sums")
        await until(lambda: work.now == 0)


async def test_a_job_is_forgotten_some_time_after_its_end():
    async with running(Work()) as jobs:
        await create(jobs, ttl_seconds_after_finished=0.05)
        await create(jobs, "kept", ttl_seconds_after_finished=3600)
        await over(jobs, "kept")
        while True:
            try:
                await jobs.get("default", "sums")
            except JobNotFound:
                break
            await asyncio.sleep(0.005)

        assert [journal.name for journal, _ in await jobs.page(None, 10, None)] == ["kept"]


async def test_packages_of_jobs_that_are_not_over_are_kept():
    async with running(Work()) as jobs:
        await create(jobs)
        await over(jobs)
        assert await jobs.packages() == set()
        await create(jobs, "waits", suspend=True)

        assert await jobs.packages() == {DIGEST}


async def test_a_server_that_goes_down_writes_what_has_ended_and_begins_nothing():
    """Held, what runs may end; then nothing of it is run again by who goes on."""
    store, work = MemoryJournals(), Work()
    work.gate.clear()
    async with running(work, store) as jobs:
        await create(jobs)
        await until(lambda: work.now == 4)
        jobs.hold()
        work.gate.set()
        await until(lambda: not jobs._live)
    assert work.ended.total() == 4
    async with running(work, store) as jobs:
        view = await over(jobs)

    assert view.status.state == "Complete"
    assert work.ran == Counter(range(10))


async def test_what_ends_while_something_is_written_is_written_too_when_it_goes_down():
    """The last commit is after the last task, whatever was under way."""
    work = Work()

    class Slow(MemoryJournals):
        async def append(self, appends: Any) -> Any:
            if work.gate.is_set():
                await asyncio.sleep(0.02)
            return await super().append(appends)

    store = Slow()
    async with running(work, store) as jobs:
        await create(jobs, size=1000)
        await until(lambda: work.ended.total() > 40)
        jobs.hold()
        await until(lambda: not jobs._live)
    ended = work.ended.total()
    async with running(work, store) as jobs:
        await over(jobs)

    assert ended < 1000
    assert work.ran == Counter(range(1000))


async def test_ten_jobs_share_the_sandboxes_and_all_end():
    work = Work()
    async with running(work) as jobs:
        for number in range(10):
            await create(jobs, f"job-{number}", size=20, parallelism=5)
        for number in range(10):
            assert (await over(jobs, f"job-{number}")).status.state == "Complete"

    assert work.most <= 16
    assert work.ended == Counter(dict.fromkeys(range(20), 10))
