"""The pump: what it fetches, when it acknowledges, and what it does when either side fails."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from dayfly_gateway.triggers import pump as module
from dayfly_gateway.triggers.pump import (
    FETCH_MAX,
    HELD_BYTES_MAX,
    HELD_MAX,
    KEPT_KEY_S,
    KEY_S,
    Pump,
    room,
)
from dayfly_gateway.triggers.source import Delivery, SourceFailed
from dayfly_pool.brokers import FolderSource, NatsSource
from dayfly_pool.errors import QueueFull, StoreFailed
from dayfly_pool.events import HOPS
from dayfly_pool.models import Batch, FunctionId, Invocation, InvocationId, Retry, TriggerSpec
from dayfly_pool.queue import Work
from dayfly_pool.store.declarations import StoredTrigger
from dayfly_pool.store.events import Accepted, Shown

SOON_S = 5.0


class FakeSource:
    """A source in memory, with the promises of `triggers.source.Source`: what is not acknowledged
    is given out again by the next one. *failing* names the methods that fail now."""

    extend_s: float | None = 0.01

    def __init__(self, broker: "FakeBroker") -> None:
        self.broker = broker
        self.is_open = False
        self._given: set[str] = set()

    def _check(self, what: str) -> None:
        if what in self.broker.failing:
            raise SourceFailed(f"{what} fails")

    async def open(self) -> None:
        self._check("open")
        self.is_open = True
        self.broker.opened += 1

    async def close(self) -> None:
        self.is_open = False

    async def fetch(self, most: int, wait_s: float) -> list[Delivery]:
        self.broker.asked.append(most)
        while True:
            self._check("fetch")
            there = [id_ for id_ in self.broker.messages if id_ not in self._given][:most]
            if there:
                break
            await self.broker.changed.wait()
            self.broker.changed.clear()
        self._given.update(there)
        return [
            Delivery(
                id=id_,
                **{"topic": "t", "body": self.broker.messages[id_], "group": id_[:1]}
                | self.broker.more,
            )
            for id_ in there
        ]

    async def ack(self, delivery: Delivery) -> None:
        self._check("ack")
        del self.broker.messages[delivery.id]
        self.broker.acknowledged.append(delivery.id)
        self.broker.told.set()

    async def nak(self, delivery: Delivery, delay_s: float) -> None:
        self._check("nak")
        self.broker.given_back.append(delivery.id)
        self._given.discard(delivery.id)

    async def extend(self, delivery: Delivery) -> None:
        self._check("extend")
        self.broker.extended[delivery.id] += 1
        self.broker.told.set()

    async def lag(self) -> int | None:
        self._check("lag")
        return len(self.broker.messages)


class FakeBroker:
    """What the sources of one trigger have in common."""

    def __init__(self, **messages: bytes) -> None:
        self.messages = dict(messages)
        self.acknowledged: list[str] = []
        self.given_back: list[str] = []
        self.extended: Counter[str] = Counter()
        self.asked: list[int] = []
        self.failing: set[str] = set()
        self.more: dict[str, Any] = {}
        """What else its messages have."""

        self.opened = 0
        self.changed, self.told = asyncio.Event(), asyncio.Event()

    def put(self, id_: str, body: bytes) -> None:
        self.messages[id_] = body
        self.changed.set()


class FakeEvents:
    """A queue that ends events when it is told to. *errors* are raised by the next accepts.

    *doubts* too, but only when the event is written: as by a store whose answer was lost.
    """

    def __init__(self, places: int = 10) -> None:
        self.queue = self
        self.places, self.retry = places, Retry()
        self.failure = ""
        self.running_now: Counter[FunctionId] = Counter()
        self.waiting: Counter[FunctionId] = Counter()
        self.errors: list[Exception] = []
        self.doubts: list[Exception] = []
        self.known_errors: list[Exception] = []
        self.accepted: dict[InvocationId, Any] = {}
        self.refused: dict[InvocationId, str] = {}
        self.keys: dict[str, InvocationId] = {}
        self.over: set[InvocationId] = set()
        self.known_s: float | None = None
        self.priority = self.hops = 0
        self.watched: dict[InvocationId, asyncio.Future[None]] = {}
        self.is_over_at_once = True
        self.changed = asyncio.Event()

    def work_of(self, id_: FunctionId) -> Work | None:
        return Work(self.places, self.retry) if self.places else None

    async def accept(
        self,
        invocation: Invocation,
        *,
        key: tuple[str, str] | None = None,
        items: list[str] | None = None,
        refused: str = "",
        key_s: float | None = None,
        priority: int = 0,
        hops: int = 0,
    ) -> Accepted:
        if self.errors:
            raise self.errors.pop(0)
        if key is not None and key[0] in self.keys:
            return Accepted(self.keys[key[0]], is_new=False)
        assert invocation.id not in self.accepted, "no store takes an id twice"
        for text in [*([key[0]] if key else []), *(items or [])]:
            self.keys[text] = invocation.id
        self.known_s, self.priority, self.hops = key_s, priority, hops
        assert not refused or refused.encode()
        self.accepted[invocation.id] = invocation.body if refused else json.loads(invocation.body)
        if refused:
            self.refused[invocation.id] = refused
        self.running_now[invocation.function] += 1
        if self.is_over_at_once:
            self.end(invocation.id)
        self.changed.set()
        if self.doubts:
            raise self.doubts.pop(0)
        return Accepted(invocation.id)

    def end(self, id_: InvocationId) -> None:
        self.over.add(id_)
        if (ended := self.watched.get(id_)) is not None and not ended.done():
            ended.set_result(None)
        self.running_now[FunctionId("default/f")] -= 1
        self.changed.set()

    async def known(self, function: FunctionId, keys: list[str]) -> dict[str, InvocationId]:
        if self.known_errors:
            raise self.known_errors.pop(0)
        return {key: self.keys[key] for key in keys if key in self.keys}

    @contextmanager
    def watching(self, id_: InvocationId) -> Iterator[asyncio.Future[None]]:
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.watched[id_] = ended
        yield ended

    async def get(self, id_: InvocationId, wait_s: float = 0.0) -> Shown | None:
        while id_ not in self.over:
            await self.changed.wait()
            self.changed.clear()
        return None


@asynccontextmanager
async def pumping(
    broker: FakeBroker, events: FakeEvents, source: type[FakeSource] = FakeSource, **spec: Any
) -> AsyncIterator[Pump]:
    where = {} if "folder" in spec else {"nats": NatsSource(subject="s")}
    declared = TriggerSpec(function="f", **where, **spec)
    stored = StoredTrigger("default", "t", declared, 0.0, 0.0)
    sources: list[FakeSource] = []

    def make() -> FakeSource:
        assert not any(source.is_open for source in sources), "two at once"
        sources.append(source(broker))
        return sources[-1]

    pump = Pump(stored, events, make)  # type: ignore[arg-type]
    async with asyncio.timeout(SOON_S), asyncio.TaskGroup() as tasks:
        task = tasks.create_task(pump.run())
        yield pump
        task.cancel()
    assert not any(source.is_open for source in sources)


async def until(what: Callable[[], bool]) -> None:
    while not what():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REOPEN_FIRST_S", 0.001)
    monkeypatch.setattr(module, "REOPEN_MAX_S", 0.002)
    monkeypatch.setattr(module, "LOOK_S", 0.005)


@given(*[st.integers(0, 3000)] * 4, st.integers(0, 2 * HELD_BYTES_MAX), st.floats(0, 1e9))
def test_no_more_is_fetched_than_there_is_room_for(
    places: int, busy: int, coming: int, held: int, held_bytes: int, usual: float
):
    found = room(places, busy, coming, held, held_bytes, usual)
    assert 0 <= found <= FETCH_MAX
    assert found == 0 or busy + coming + found <= places
    assert found == 0 or held + found <= HELD_MAX
    assert found <= 1 or found * usual <= HELD_BYTES_MAX
    if not held and places > busy + coming:
        assert found >= 1  # one message always fits


async def test_a_message_is_acknowledged_when_its_event_is_over_and_not_before():
    broker, events = FakeBroker(a=b'{"n": 1}'), FakeEvents()
    events.is_over_at_once = False
    async with pumping(broker, events):
        await until(lambda: bool(events.accepted))
        await until(lambda: broker.extended["a"] > 2)
        assert broker.acknowledged == []
        events.end(next(iter(events.accepted)))
        await until(lambda: broker.acknowledged == ["a"])


async def test_who_ends_gives_back_what_the_queue_does_not_have():
    """So that others have it at once; what the queue has it runs."""
    broker, events = FakeBroker(kept=b"x"), FakeEvents()
    events.is_over_at_once = False
    async with pumping(broker, events):
        await until(lambda: bool(events.accepted))
        events.errors = [StoreFailed("disk full")] * 10_000
        broker.put("not", b"y")
        await until(lambda: len(events.errors) < 10_000)
    assert (broker.given_back, broker.acknowledged) == (["not"], [])


async def test_a_message_that_comes_again_is_the_event_that_it_was():
    broker, events = FakeBroker(a=b"x"), FakeEvents()
    broker.failing = {"ack"}
    async with pumping(broker, events) as pump:
        await until(lambda: broker.opened >= 3)
        broker.failing = set()
        await until(lambda: broker.acknowledged == ["a"])
        assert len(events.accepted) == 1
        assert pump.counts.known >= 2


async def test_a_message_of_the_same_id_and_other_content_is_another():
    """The stream was deleted and made anew: it counts from 1 again."""
    broker, events = FakeBroker(a=b"x"), FakeEvents()
    async with pumping(broker, events):
        await until(lambda: broker.acknowledged == ["a"])
    broker.messages["a"] = b"y"
    async with pumping(broker, events):
        await until(lambda: broker.acknowledged == ["a", "a"])
    assert [event["data"] for event in events.accepted.values()] == ["x", "y"]


async def test_no_more_is_asked_for_than_the_function_has_places():
    broker, events = FakeBroker(**{f"m{n}": b"x" for n in range(20)}), FakeEvents(places=3)
    events.is_over_at_once = False
    async with pumping(broker, events):
        for number in range(20):
            await until(lambda: len(events.accepted) > number)  # noqa: B023
            assert len(events.accepted) - len(events.over) <= 3
            events.end(list(events.accepted)[number])
        await until(lambda: len(broker.acknowledged) == 20)
    assert max(broker.asked) <= 3


async def test_what_the_store_does_not_take_is_kept_and_tried_again():
    broker, events = FakeBroker(a=b"x"), FakeEvents()
    events.errors = [StoreFailed("disk full"), QueueFull("many"), StoreFailed("disk full")]
    async with pumping(broker, events):
        await until(lambda: broker.acknowledged == ["a"])
    assert (events.errors, broker.opened) == ([], 1)


@pytest.mark.parametrize("more", [{}, {"batch": Batch(size=2)}])
async def test_what_was_written_though_the_store_did_not_say_so_is_not_written_again(more: Any):
    """An id that comes twice fails a whole write, with whatever others have in it."""
    broker, events = FakeBroker(a=b"x", b=b"y"), FakeEvents()
    events.doubts = [StoreFailed("connection lost")]
    async with pumping(broker, events, **more) as pump:
        await until(lambda: sorted(broker.acknowledged) == ["a", "b"])
        assert (pump.counts.failures, events.doubts) == (0, [])
    assert len(events.accepted) == (1 if more else 2)


async def test_a_message_without_an_id_is_written_once_as_well():
    broker, events = FakeBroker(**{"": b"x"}), FakeEvents()
    events.doubts = [StoreFailed("connection lost")]
    broker.more = {"group": "g"}
    async with pumping(broker, events) as pump:
        await until(lambda: broker.acknowledged == [""])
        assert pump.counts.failures == 0
    assert len(events.accepted) == 1


async def test_a_store_that_is_away_while_a_batch_ends_is_not_the_sources_failure():
    broker, events = FakeBroker(a=b"1", b=b"2"), FakeEvents()
    events.is_over_at_once = False
    async with pumping(broker, events, batch=Batch(size=2)) as pump:
        await until(lambda: bool(events.accepted))
        events.known_errors = [StoreFailed("disk full")]
        events.end(next(iter(events.accepted)))
        await until(lambda: broker.acknowledged == ["a", "b"])
        assert (pump.counts.failures, events.known_errors) == (0, [])


async def test_what_a_key_is_made_of_is_short_and_plain_whatever_an_id_holds():
    """A database that keeps no NUL, or no long index, would refuse it and all that came with it."""
    ids = ["a\0b", "\ud800", "long" * 1000]
    broker, events = FakeBroker(**dict.fromkeys(ids, b"x")), FakeEvents()
    async with pumping(broker, events):
        await until(lambda: broker.acknowledged == ids)
    assert len(events.keys) == 3
    assert all(key.isascii() and key.isprintable() and len(key) < 250 for key in events.keys)


async def test_a_message_that_comes_twice_is_in_its_batch_once():
    """The broker took it back while we held it."""

    class Again(FakeSource):
        async def fetch(self, most: int, wait_s: float) -> list[Delivery]:
            found = await super().fetch(most, wait_s)
            return [*found, *map(structs.replace, found)]

        async def ack(self, delivery: Delivery) -> None:
            self.broker.acknowledged.append(delivery.id)

    broker, events = FakeBroker(a=b"1"), FakeEvents()
    async with pumping(broker, events, source=Again, batch=Batch(size=2)):
        await until(lambda: broker.acknowledged == ["a", "a"])
    assert [[event["data"] for event in batch] for batch in events.accepted.values()] == [[1]]


class Deaf(FakeSource):
    """One whose client takes a cancellation for an answer: `asyncio.wait_for` of 3.11 may."""

    async def fetch(self, most: int, wait_s: float) -> list[Delivery]:
        try:
            return await super().fetch(most, wait_s)
        except asyncio.CancelledError:
            return []


@pytest.mark.parametrize("what", ["nothing", "extend"])
async def test_a_pump_ends_also_when_its_source_does_not_hear_that_it_is_to(what: str):
    broker, events = FakeBroker(a=b"x"), FakeEvents()
    events.is_over_at_once = False
    async with pumping(broker, events, source=Deaf) as pump:
        await until(lambda: bool(events.accepted))
        broker.failing = {what}
        await until(lambda: what == "nothing" or broker.opened > 1)
        broker.failing = set()
    assert not pump.is_up


async def test_nothing_is_fetched_while_nothing_can_be_kept_or_run():
    broker, events = FakeBroker(a=b"x"), FakeEvents()
    events.failure = "disk full"
    async with pumping(broker, events) as pump:
        await until(lambda: pump.error == "disk full")
        events.failure, events.places = "", 0
        await until(lambda: "no function" in pump.error)
        assert broker.asked == []
        events.places = 1
        await until(lambda: broker.acknowledged == ["a"])
        assert pump.error == ""


@pytest.mark.parametrize("what", ["open", "fetch", "extend", "lag", "ack"])
async def test_whatever_fails_at_the_source_it_is_opened_again_and_nothing_is_lost(what: str):
    broker, events = FakeBroker(a=b"x"), FakeEvents()
    events.is_over_at_once = False
    broker.failing = {what}
    async with pumping(broker, events) as pump:
        if what == "ack":
            await until(lambda: bool(events.accepted))
            events.end(next(iter(events.accepted)))
        await until(lambda: pump.counts.failures >= 2 and pump.error == f"{what} fails")
        broker.failing = set()
        await until(lambda: bool(events.accepted))
        if what != "ack":
            events.end(next(iter(events.accepted)))
        await until(lambda: broker.acknowledged == ["a"])
    assert len(events.accepted) == 1


async def test_a_defect_of_ours_is_logged_and_the_trigger_goes_on(
    caplog: pytest.LogCaptureFixture,
):
    broker, events = FakeBroker(a=b"x"), FakeEvents()
    events.errors = [KeyError("defect")]
    async with pumping(broker, events):
        await until(lambda: broker.acknowledged == ["a"])
    assert [r.getMessage() for r in caplog.records if r.exc_info] == ["a trigger failed"]


ODD: dict[str, tuple[bytes, dict[str, Any]]] = {
    "nested too deep": (b"[" * 100_000 + b"]" * 100_000, {}),
    "from the year 31690708": (b"x", {"at": 1e15}),
    "from no time at all": (b"x", {"at": float("nan")}),
    "half a character in a name": (
        b'{"specversion": "1.0", "id": "1", "source": "/", "type": "t", "\\ud800": "x"}',
        {"headers": {"content-type": "application/cloudevents+json"}},
    ),
}


@pytest.mark.parametrize("what", ODD)
async def test_no_message_holds_up_those_behind_it(what: str):
    body, more = ODD[what]
    broker, events = FakeBroker(odd=body), FakeEvents()
    broker.more = more
    async with pumping(broker, events) as pump:
        await until(lambda: broker.acknowledged == ["odd"])
        broker.more = {}
        broker.put("next", b"x")
        await until(lambda: broker.acknowledged == ["odd", "next"])
        assert pump.counts.failures == 0
    assert len(events.accepted) == 2
    for why in events.refused.values():
        assert why.encode()


async def test_a_message_over_which_we_fail_is_a_dead_letter_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(*_: object) -> None:
        raise KeyError("its text is the log's alone")

    broker, events = FakeBroker(a=b"x"), FakeEvents()
    with monkeypatch.context() as broken:
        broken.setattr(module.cloudevents, "of_delivery", fail)
        async with pumping(broker, events) as pump:
            await until(lambda: broker.acknowledged == ["a"])
            assert pump.counts.failures == 0
    assert list(events.refused.values()) == ["a defect of ours, KeyError: the log has the cause"]
    assert list(events.accepted.values()) == [b"x"]
    assert [r.getMessage() for r in caplog.records if r.exc_info] == [
        "a message is dead for a defect of ours"
    ]


async def test_those_of_one_group_come_in_order_and_groups_beside_each_other():
    broker = FakeBroker(a1=b"1", b1=b"1", a2=b"2", b2=b"2")
    events = FakeEvents()
    events.is_over_at_once = False
    async with pumping(broker, events, ordered=True):
        await until(lambda: len(events.accepted) == 2)
        first, second = events.accepted
        events.end(second)
        await until(lambda: broker.acknowledged == ["b1"])
        await until(lambda: len(events.accepted) == 3)
        assert [e["data"] for e in events.accepted.values()] == [1, 1, 2]
        events.end(first)
        await until(lambda: len(events.accepted) == 4)
        for id_ in list(events.accepted)[2:]:
            events.end(id_)
        await until(lambda: sorted(broker.acknowledged) == ["a1", "a2", "b1", "b2"])


async def test_a_batch_is_full_or_waits_no_longer_than_its_window():
    broker, events = FakeBroker(**{f"m{n}": b"%d" % n for n in range(5)}), FakeEvents()
    async with pumping(broker, events, batch=Batch(size=2, window_seconds=0.05)):
        await until(lambda: len(broker.acknowledged) == 5)
    found = [[event["data"] for event in batch] for batch in events.accepted.values()]
    assert found == [[0, 1], [2, 3], [4]]


async def test_what_is_left_of_a_batch_is_acknowledged_when_that_is_over():
    broker, events = FakeBroker(a=b"1", b=b"2"), FakeEvents()
    events.is_over_at_once = False
    async with pumping(broker, events, batch=Batch(size=2)):
        await until(lambda: bool(events.accepted))
        (batch,) = events.accepted
        left = InvocationId("left")
        _, key = events.keys
        events.keys[key] = left
        events.end(batch)
        await until(lambda: broker.acknowledged == ["a"])
        await until(lambda: broker.extended["b"] > 3)
        events.end(left)
        await until(lambda: broker.acknowledged == ["a", "b"])


async def test_a_batch_that_comes_again_in_other_company_is_not_run_again():
    broker, events = FakeBroker(a=b"1", b=b"2"), FakeEvents()
    broker.failing = {"ack"}
    async with pumping(broker, events, batch=Batch(size=2)):
        await until(lambda: broker.opened >= 2)
    broker.failing = set()
    broker.put("c", b"3")
    async with pumping(broker, events, batch=Batch(size=3)):
        await until(lambda: len(broker.acknowledged) == 3)
    found = [[event["data"] for event in batch] for batch in events.accepted.values()]
    assert found == [[1, 2], [3]]


async def test_what_is_too_long_for_a_function_is_a_dead_letter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BODY_BYTES_MAX", 500)
    broker, events = FakeBroker(long=b"x" * 600, short=b"x"), FakeEvents()
    async with pumping(broker, events, batch=Batch(size=2, window_seconds=0)):
        await until(lambda: sorted(broker.acknowledged) == ["long", "short"])
    (why,) = events.refused.values()
    assert "limit 500" in why


async def test_what_was_too_long_to_be_read_is_a_dead_letter_and_never_an_empty_event():
    """Whatever its headers say: those are the sender's."""
    broker, events = FakeBroker(a=b""), FakeEvents()
    broker.more = {"unread": 7_000_000}
    async with pumping(broker, events):
        await until(lambda: broker.acknowledged == ["a"])
        assert events.known_s == KEPT_KEY_S
        broker.more = {"headers": {"dayfly-body-too-long": "7000000"}}
        broker.put("b", b"x")
        await until(lambda: broker.acknowledged == ["a", "b"])
    (why,) = events.refused.values()
    assert "7000000 bytes" in why


async def test_a_batch_is_no_longer_than_a_function_may_be_given(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BODY_BYTES_MAX", 1000)
    broker, events = FakeBroker(**{f"m{n}": b"x" * 300 for n in range(4)}), FakeEvents()
    async with pumping(broker, events, batch=Batch(size=4)):
        await until(lambda: len(broker.acknowledged) == 4)
    assert [len(batch) for batch in events.accepted.values()] == [2, 2] or [
        len(batch) for batch in events.accepted.values()
    ] == [1, 1, 1, 1]


async def test_an_event_has_as_many_hops_as_it_says():
    """It is a word of ours to the outside, which has come back."""
    word = json.dumps({"specversion": "1.0", "id": "1", "source": "/", "type": "t"} | {HOPS: "7"})
    broker, events = FakeBroker(a=word.encode()), FakeEvents()
    broker.more = {"headers": {"content-type": "application/cloudevents+json"}}
    async with pumping(broker, events):
        await until(lambda: broker.acknowledged == ["a"])
    assert events.hops == 7


async def test_events_have_the_priority_of_their_trigger():
    broker, events = FakeBroker(a=b"x"), FakeEvents()
    async with pumping(broker, events, priority=7):
        await until(lambda: broker.acknowledged == ["a"])
    assert events.priority == 7


async def test_what_the_filter_does_not_mean_is_done_with():
    broker, events = FakeBroker(a=b'{"n": 1}', b=b'{"n": 2}', c=b"odd"), FakeEvents()
    async with pumping(broker, events, filter="event.data.n == 2") as pump:
        await until(lambda: len(broker.acknowledged) == 3)
        assert (pump.counts.filtered, pump.counts.filter_errors) == (1, 1)
    assert [event["data"] for event in events.accepted.values()] == [{"n": 2}]


async def test_a_filter_that_is_none_any_more_stops_its_own_trigger_and_no_server():
    """It was declared with an older library."""
    broker, events = FakeBroker(a=b"x"), FakeEvents()
    async with pumping(broker, events, filter="event.type ==") as pump:
        await until(lambda: pump.counts.failures > 1)
        assert pump.error.startswith("filter: ")
    assert (broker.asked, broker.messages) == ([], {"a": b"x"})


async def test_a_file_that_stays_is_known_for_longer_than_any_server_runs():
    """It is given out again at each start."""
    broker, events = FakeBroker(a=b"x"), FakeEvents()
    async with pumping(broker, events, folder=FolderSource(path="/in")):
        await until(lambda: broker.acknowledged == ["a"])
    assert events.known_s == KEPT_KEY_S
    broker.messages["b"] = b"x"
    async with pumping(broker, events, folder=FolderSource(path="/in", afterwards="move")):
        await until(lambda: broker.acknowledged == ["a", "b"])
    assert events.known_s == KEY_S + Retry().max_age_seconds


@pytest.mark.parametrize("more", [{}, {"batch": Batch(size=1)}])
async def test_a_message_is_known_for_longer_than_its_event_may_live(more: Any):
    """An event of two weeks outlives a day; its message must not be run beside it then."""
    broker, events = FakeBroker(a=b"x"), FakeEvents()
    events.retry = Retry(max_age_seconds=14 * 86400)
    async with pumping(broker, events, **more):
        await until(lambda: broker.acknowledged == ["a"])
    assert events.known_s == 15 * 86400
