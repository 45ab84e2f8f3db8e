"""What every store of events promises, whatever keeps them."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import count
from pathlib import Path

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs
from tests.servers import Postgres

from dayfly_pool.errors import StoreFailed
from dayfly_pool.models import FunctionId, InvocationId
from dayfly_pool.store.events import (
    ROW_BYTES_MAX,
    Accepted,
    Attempt,
    Ended,
    Event,
    Key,
    Lease,
    State,
    Store,
)
from dayfly_pool.store.memory import MemoryEvents
from dayfly_pool.store.postgres_events import PostgresEvents
from dayfly_pool.store.sqlite_events import SqliteEvents

GREET, SHOUT = FunctionId("default/greet"), FunctionId("default/shout")
E1, E2, E3, E4 = (InvocationId(f"event-{n}") for n in range(1, 5))
KINDS = ("memory", "sqlite", "postgres")
HOUR_S = 3600.0


@pytest.fixture(scope="session")
def dsn() -> Iterator[str]:
    """A PostgreSQL of the session."""
    with Postgres() as started:
        yield started.dsn


fresh = count()


def make(kind: str, folder: Path, dsn: str) -> Store:
    """An empty one."""
    if kind == "memory":
        return MemoryEvents()
    if kind == "sqlite":
        return SqliteEvents(folder / "events.sqlite", folder / "bodies")
    name = f"events_{next(fresh)}"
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return PostgresEvents(dsn.replace("dbname=postgres", f"dbname={name}"))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def store(kind: str, tmp_path: Path, dsn: str) -> AsyncIterator[Store]:
    made = make(kind, tmp_path, dsn)
    await made.open("us")
    yield made
    await made.close()


def event(id_: InvocationId = E1, function: FunctionId = GREET, **changed: object) -> Event:
    made = Event(
        id=id_, function=function, meta=b"meta", body=b"body", accepted_at=100.0, age_s=HOUR_S
    )
    return structs.replace(made, **changed)


def succeeded(lease: Lease, at: float = 110.0, body: bytes = b"hello") -> Ended:
    return Ended(
        row=lease.row,
        fence=lease.fence,
        state=State.SUCCEEDED,
        at=at,
        is_counted=True,
        result=b"200",
        body=body,
    )


def failed(lease: Lease, state: State, at: float, *, is_counted: bool = True) -> Ended:
    attempt = Attempt(
        fence=lease.fence,
        started_at=at - 1,
        ended_at=at,
        is_counted=is_counted,
        kind="Raised",
        message=f"attempt {lease.fence}",
    )
    return Ended(
        row=lease.row,
        fence=lease.fence,
        state=state,
        at=at,
        attempt=attempt,
        is_counted=is_counted,
    )


async def accept(store: Store, *events: Event) -> list[Accepted]:
    return (await store.write(100.0, accepted=events)).accepted


async def lease(
    store: Store, function: FunctionId = GREET, most: int = 10, now: float = 105.0
) -> list[Lease]:
    return (await store.write(now, wanted={function: most})).leased


async def lease_one(store: Store, now: float = 105.0) -> Lease:
    (one,) = await lease(store, most=1, now=now)
    return one


async def end(store: Store, *ended: Ended) -> set[tuple[int, int]]:
    return (await store.write(110.0, ended)).late


async def state_of(store: Store, id_: InvocationId = E1) -> State | None:
    shown = await store.get(id_)
    return None if shown is None else shown.state


# ---- a life -------------------------------------------------------------------------------------


async def test_an_accepted_event_waits_is_leased_and_succeeds(store: Store):
    assert await accept(store, event()) == [Accepted(E1)]
    assert await state_of(store) is State.WAITING

    one = await lease_one(store)
    told = (one.id, one.function, one.meta, one.body, one.attempts, one.fence, one.expires_at)
    assert told == (E1, GREET, b"meta", b"body", 0, 1, 100.0 + HOUR_S)
    assert await state_of(store) is State.RUNNING

    assert await end(store, succeeded(one)) == set()
    shown = await store.get(E1)
    assert shown is not None
    assert (shown.state, shown.finished_at, shown.attempts) == (State.SUCCEEDED, 110.0, 1)
    assert (shown.result, shown.result_body, shown.failures) == (b"200", b"hello", [])


async def test_an_event_can_be_accepted_and_leased_in_one_write(store: Store):
    written = await store.write(100.0, accepted=[event()], wanted={GREET: 1})

    assert [one.id for one in written.leased] == [E1]


async def test_who_asks_gets_no_more_leases_than_it_wants_and_nobody_elses(store: Store):
    await accept(store, event(E1), event(E2, SHOUT), event(E3), event(E4))
    written = await store.write(105.0, wanted={GREET: 2, FunctionId("default/none"): 5})

    assert [one.id for one in written.leased] == [E1, E3]
    assert [one.id for one in await lease(store)] == [E4]
    assert [one.id for one in await lease(store, SHOUT)] == [E2]


async def test_what_is_more_important_comes_first_then_what_came_first(store: Store):
    await accept(store, event(E1), event(E2, priority=5), event(E3, priority=-1), event(E4))

    assert [one.id for one in await lease(store)] == [E2, E1, E4, E3]


async def test_a_failed_attempt_is_tried_again_when_its_time_has_come(store: Store):
    await accept(store, event())
    again = failed(await lease_one(store), State.DELAYED, at=200.0)
    written = await store.write(110.0, [again])
    assert (written.due_at, written.due) == (200.0, Counter())

    assert (await store.write(199.0, wanted={GREET: 1})).leased == []
    shown = await store.get(E1)
    assert shown is not None
    assert (shown.state, shown.ready_at, shown.attempts) == (State.DELAYED, 200.0, 1)

    written = await store.write(200.0, wanted={GREET: 1})
    assert (written.due, written.due_at) == (Counter({GREET: 1}), None)
    assert [(one.id, one.attempts, one.fence) for one in written.leased] == [(E1, 1, 2)]


async def test_a_failure_of_ours_is_no_attempt(store: Store):
    await accept(store, event())
    await end(store, failed(await lease_one(store), State.DELAYED, 111.0, is_counted=False))

    assert (await lease_one(store, now=112.0)).attempts == 0


async def test_a_dead_event_keeps_its_body_and_every_error(store: Store):
    await accept(store, event())
    await end(store, failed(await lease_one(store), State.DELAYED, 111.0))
    await end(store, failed(await lease_one(store, now=112.0), State.DEAD, 113.0))

    shown = await store.get(E1)
    assert shown is not None
    assert (shown.state, shown.body, shown.attempts) == (State.DEAD, b"body", 2)
    assert [f.message for f in shown.failures] == ["attempt 1", "attempt 2"]


async def test_a_dead_event_that_is_redriven_has_all_its_attempts_and_its_age_again(store: Store):
    await accept(store, event(E1), event(E2), event(E3, SHOUT))
    for one in [*await lease(store), *await lease(store, SHOUT)]:
        await end(store, failed(one, State.DEAD, 113.0))
    assert await store.redrive(GREET, [E1, E3], 1000.0) == 1
    assert [await state_of(store, e) for e in (E1, E2, E3)] == [State.WAITING, *[State.DEAD] * 2]

    again = await lease_one(store)
    assert (again.attempts, again.fence, again.expires_at) == (0, 2, 1000.0 + HOUR_S)
    assert await store.redrive(GREET, None, 1000.0) == 1
    shown = await store.get(E1)
    assert shown is not None
    assert len(shown.failures) == 1


async def test_only_what_is_dead_can_be_redriven(store: Store):
    await accept(store, event(E1), event(E2), event(E3))
    first, second, _ = await lease(store)
    await end(store, succeeded(first), failed(second, State.DELAYED, 200.0))

    assert await store.redrive(GREET, None, 111.0) == 0


async def test_a_cancelled_event_is_not_run(store: Store):
    await accept(store, event())
    before = await store.cancel(E1, 101.0)
    assert before is not None
    assert before.state is State.WAITING

    assert await lease(store) == []
    assert await state_of(store) is State.CANCELLED


async def test_what_is_over_or_unknown_cannot_be_cancelled(store: Store):
    await accept(store, event())
    await end(store, succeeded(await lease_one(store)))
    before = await store.cancel(E1, 120.0)
    assert before is not None
    assert before.state is State.SUCCEEDED

    assert await state_of(store) is State.SUCCEEDED
    assert await store.cancel(E2, 120.0) is None


# ---- leases -------------------------------------------------------------------------------------


async def test_an_event_ends_once(store: Store):
    await accept(store, event())
    one = await lease_one(store)
    await end(store, succeeded(one))

    assert await end(store, failed(one, State.DEAD, 111.0)) == {(one.row, one.fence)}
    shown = await store.get(E1)
    assert shown is not None
    assert (shown.state, shown.failures) == (State.SUCCEEDED, [])


async def test_the_result_of_a_cancelled_run_is_too_late(store: Store):
    await accept(store, event())
    one = await lease_one(store)
    await store.cancel(E1, 106.0)

    assert await end(store, succeeded(one)) == {(one.row, one.fence)}
    assert await state_of(store) is State.CANCELLED


async def test_who_was_fenced_off_comes_too_late(store: Store):
    """It was stopped for a while, and knows nothing of the other run; that one counts."""
    await accept(store, event())
    stopped = await lease_one(store)
    assert await store.fence("us") == Counter({GREET: 1})
    other = await lease_one(store)

    assert await end(store, succeeded(stopped, body=b"old")) == {(stopped.row, stopped.fence)}
    assert await end(store, succeeded(other, body=b"new")) == set()
    shown = await store.get(E1)
    assert shown is not None
    assert (shown.result_body, shown.attempts) == (b"new", 1)


async def test_what_follows_an_end_is_accepted_with_it_and_only_then(store: Store):
    """Both or neither: an end that comes too late has nothing follow it."""
    await accept(store, event())
    one = await lease_one(store)
    first = structs.replace(succeeded(one), then=(event(E2, SHOUT),))
    written = await store.write(110.0, [first], wanted={SHOUT: 1})
    assert (written.due, [each.id for each in written.leased]) == (Counter({SHOUT: 1}), [E2])

    again = structs.replace(succeeded(one), then=(event(E3, SHOUT),))
    written = await store.write(110.0, [again])
    assert (written.due, written.late) == (Counter(), {(one.row, one.fence)})
    assert await store.get(E3) is None


async def test_more_keys_stand_for_the_event_that_named_them_last(store: Store):
    """What is several in one can be known by each of them, also when only some of it is left."""
    a, b = Key("a", "", 1e9), Key("b", "", 1e9)
    await accept(store, event(E1, known_as=(a, b)))
    assert await store.known(GREET, ["a", "b", "c"]) == {"a": E1, "b": E1}
    assert await store.known(SHOUT, ["a"]) == {}
    again = await accept(store, event(E3, key=a))
    assert [(each.id, each.is_new) for each in again] == [(E1, False)]

    (one,) = await lease(store)
    await end(store, structs.replace(succeeded(one), then=(event(E2, known_as=(b,)),)))
    assert await store.known(GREET, ["a", "b"]) == {"a": E1, "b": E2}
    await store.sweep(2e9, HOUR_S, HOUR_S)
    assert await store.known(GREET, ["a", "b"]) == {}


async def test_a_key_that_stands_for_another_event_is_known_for_as_long_as_before(store: Store):
    """A file that stays is known for years, also when it was in a batch and failed."""
    await accept(store, event(E1, known_as=(Key("a", "", 1e9), Key("b", "", 2e9))))
    await accept(store, event(E2, known_as=(Key("a", "", 2e9), Key("b", "", 1e9))))
    await store.sweep(1.5e9, HOUR_S, HOUR_S)

    assert await store.known(GREET, ["a", "b"]) == {"a": E2, "b": E2}


async def test_leases_that_nobody_knows_of_are_given_back_and_no_others(store: Store):
    """The answer to a write may be lost, though it was done."""
    await accept(store, event(E1), event(E2), event(E3))
    first, second = await lease(store, most=2)
    assert await store.release({(second.row, second.fence)}) == Counter({GREET: 1})

    assert [one.id for one in await lease(store)] == [E1, E3]
    assert await end(store, succeeded(first), succeeded(second)) == {(first.row, first.fence)}
    assert await store.release({(first.row, first.fence)}) == Counter({GREET: 2})  # an older one
    await store.close()
    await store.open("them")
    assert await store.release(()) == Counter()


async def test_the_rest_of_a_write_is_done_though_an_end_was_too_late(store: Store):
    await accept(store, event(E1), event(E2))
    first, second = await lease(store)
    await store.cancel(E1, 106.0)

    assert await end(store, succeeded(first), succeeded(second)) == {(first.row, first.fence)}
    assert await state_of(store, E2) is State.SUCCEEDED


async def test_an_owner_that_lives_says_so_and_one_that_is_fenced_is_forgotten(
    kind: str, store: Store, tmp_path: Path
):
    assert await store.beat() == {"us": 1}
    await store.close()
    await store.open("them")
    assert await store.beat() == {"us": 1, "them": 1}
    assert await store.beat() == {"us": 1, "them": 2}

    await store.fence("us")
    assert await store.beat() == {"them": 3}


async def test_leases_outlive_who_took_them_until_it_is_fenced_off(store: Store):
    await accept(store, event())
    await lease_one(store)
    await store.close()
    await store.open("them")
    assert await lease(store) == []

    assert await store.fence("us") == Counter({GREET: 1})
    assert (await lease_one(store)).fence == 2


@pytest.fixture
async def shared(tmp_path: Path, dsn: str) -> AsyncIterator[PostgresEvents]:
    """A store that several use at once."""
    made = make("postgres", tmp_path, dsn)
    assert isinstance(made, PostgresEvents)
    await made.open("us")
    yield made
    await made.close()


async def test_who_listens_hears_of_what_others_accept(shared: PostgresEvents):
    other = PostgresEvents(shared._postgres.dsn)
    await other.open("other")
    heard: asyncio.Queue[FunctionId] = asyncio.Queue()
    listening = asyncio.ensure_future(other.listen(heard.put_nowait))
    async with asyncio.timeout(10):
        while heard.empty():
            await accept(shared, event(InvocationId(f"event-{time.monotonic_ns()}"), SHOUT))
            await asyncio.sleep(0.01)
        assert await heard.get() == SHOUT
    listening.cancel()
    await asyncio.wait({listening})
    await other.close()


async def test_two_that_lease_at_once_never_get_the_same(shared: PostgresEvents):
    other = PostgresEvents(shared._postgres.dsn)
    await other.open("other")
    ids = [InvocationId(f"many-{n}") for n in range(200)]
    await accept(shared, *map(event, ids))
    got = await asyncio.gather(*(lease(s, most=7) for _ in range(20) for s in (shared, other)))
    leased = [one.id for some in got for one in some]
    await other.close()

    assert len(leased) == len(set(leased)) == 200


async def test_a_connection_that_is_cut_is_made_again(shared: PostgresEvents, dsn: str):
    """What was under way failed, and nobody knows; what comes then works."""
    await accept(shared, event(E1))
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid != pg_backend_pid()"
        )
    with pytest.raises(StoreFailed):
        await accept(shared, event(E2))
    await accept(shared, event(E3))

    assert [one.id for one in await lease(shared)] == [E1, E3]
    assert await state_of(shared, E2) is None


# ---- idempotency --------------------------------------------------------------------------------


def keyed(id_: InvocationId, text: str = "k", fingerprint: str = "f", at: float = 100.0) -> Event:
    return event(id_, key=Key(text, fingerprint, at + 50), accepted_at=at)


async def test_the_same_key_again_is_the_same_event(store: Store):
    assert await accept(store, keyed(E1)) == [Accepted(E1)]
    assert await accept(store, keyed(E2)) == [Accepted(E1, is_new=False)]
    assert await accept(store, keyed(E3), keyed(E4, "other")) == [
        Accepted(E1, is_new=False),
        Accepted(E4),
    ]

    assert [one.id for one in await lease(store)] == [E1, E4]


async def test_the_same_key_twice_in_one_write_is_one_event(store: Store):
    assert await accept(store, keyed(E1), keyed(E2)) == [Accepted(E1), Accepted(E1, is_new=False)]


async def test_the_key_of_another_request_is_told_from_the_same_request(store: Store):
    await accept(store, keyed(E1))

    refused = Accepted(E1, is_new=False, is_other=True)
    assert await accept(store, keyed(E2, fingerprint="g")) == [refused]
    assert await store.get(E2) is None


async def test_each_function_has_keys_of_its_own(store: Store):
    await accept(store, keyed(E1))

    assert await accept(store, structs.replace(keyed(E2), function=SHOUT)) == [Accepted(E2)]


async def test_a_key_is_forgotten_in_time(store: Store):
    await accept(store, keyed(E1, at=100.0))

    assert await accept(store, keyed(E2, at=149.0)) == [Accepted(E1, is_new=False)]
    assert await accept(store, keyed(E3, at=150.0)) == [Accepted(E3)]


# ---- looking ------------------------------------------------------------------------------------


async def test_a_page_has_the_newest_first_and_goes_on_where_the_last_one_ended(store: Store):
    await accept(store, event(E1), event(E2, SHOUT), event(E3), event(E4))
    ids = [shown.id for shown in await store.page(limit=3)]
    assert ids == [E4, E3, E2]

    assert [shown.id for shown in await store.page(limit=3, before=ids[-1])] == [E1]
    assert [shown.id for shown in await store.page(GREET)] == [E4, E3, E1]
    assert await store.page(before=InvocationId("none")) == []


async def test_a_page_shows_one_state_where_delayed_ones_are_waiting(store: Store):
    await accept(store, event(E1), event(E2), event(E3))
    first, _ = await lease(store, most=2)
    await end(store, failed(first, State.DELAYED, 200.0))

    assert [shown.id for shown in await store.page(state=State.WAITING)] == [E3, E1]
    assert [shown.id for shown in await store.page(state=State.RUNNING)] == [E2]


async def test_it_knows_how_many_there_are_and_how_long_the_next_has_waited(store: Store):
    await accept(store, event(E1, accepted_at=90.0), event(E2), event(E3, SHOUT))
    await lease(store, SHOUT)

    assert await store.counts() == {(GREET, State.WAITING): 2, (SHOUT, State.RUNNING): 1}
    assert await store.oldest([GREET, SHOUT]) == {GREET: 90.0}


async def test_what_is_over_is_forgotten_in_time_and_nothing_else(store: Store):
    await accept(store, event(E1), event(E2), event(E3), event(E4), keyed(InvocationId("e5"), "x"))
    first, second, third = await lease(store, most=3)
    await end(store, succeeded(first, at=110.0), failed(second, State.DEAD, 110.0))
    await end(store, succeeded(third, at=111.0))
    await store.cancel(E4, 109.0)

    assert await store.sweep(160.0, over_s=50.0, dead_s=1000.0) == 2
    assert [shown.id for shown in await store.page()] == ["e5", E3, E2]
    assert await store.sweep(1110.0, over_s=2000.0, dead_s=1000.0) == 1
    assert [shown.id for shown in await store.page()] == ["e5", E3]
    again = keyed(E1, "x", at=1110.0)
    assert await accept(store, again) == [Accepted(E1)]


# ---- what survives ------------------------------------------------------------------------------


async def test_what_was_written_is_there_after_it_was_opened_again(store: Store):
    await accept(store, event(E1), event(E2), event(E3))
    first, second = await lease(store, most=2)
    await end(store, failed(first, State.DELAYED, 200.0), succeeded(second))
    before = [await store.get(id_) for id_ in (E1, E2, E3)]
    await store.close()
    await store.open("us")

    assert [await store.get(id_) for id_ in (E1, E2, E3)] == before
    written = await store.write(150.0)
    assert written.due_at == 200.0


@pytest.mark.parametrize("size", [ROW_BYTES_MAX, ROW_BYTES_MAX + 1, 2_000_000])
async def test_a_long_body_comes_back_whole(store: Store, size: int):
    body = bytes(range(256)) * (size // 256 + 1)
    body = body[:size]
    await accept(store, event(body=body))
    one = await store.fetch(await lease_one(store))
    assert (one.body, one.damage) == (body, "")

    await end(store, succeeded(one, body=body[::-1]))
    shown = await store.get(E1)
    assert shown is not None
    assert shown.result_body == body[::-1]


async def test_many_at_once_are_one_write(store: Store):
    """More than one statement can hold."""
    ids = [InvocationId(f"many-{n}") for n in range(300)]
    found = await accept(store, *(event(id_) for id_ in ids))
    assert found == [Accepted(id_) for id_ in ids]
    leased = await lease(store, most=1000)
    assert [one.id for one in leased] == ids

    assert await end(store, *map(succeeded, leased)) == set()
    assert await store.counts() == {(GREET, State.SUCCEEDED): 300}


# ---- any order of things ------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ("accept", "lease", "succeed", "delay", "die", "cancel", "redrive", "fence")
        ),
        st.integers(0, 7),
    ),
    max_size=40,
)


async def play(store: Store, steps: Sequence[tuple[str, int]]) -> list[object]:
    """What is to be seen after each step."""
    seen: list[object] = []
    held: list[Lease] = []
    now, number = 100.0, 0
    for what, which in steps:
        now += which
        chosen = held[which % len(held)] if held else None
        known = InvocationId(f"event-{which % max(1, number)}")
        match what:
            case "accept":
                function = (GREET, SHOUT)[which % 2]
                key = Key(f"key-{which}", "f", now + 20) if which > 4 else None
                id_ = InvocationId(f"event-{number}")
                new = event(id_, function, priority=which % 3, key=key, accepted_at=now)
                found = (await store.write(now, accepted=[new])).accepted
                number += found[0].is_new
                seen.append(found)
            case "lease":
                written = await store.write(now, wanted={GREET: which, SHOUT: 1})
                held += written.leased
                seen.append((written.leased, written.due, written.due_at))
            case "succeed" if chosen:
                seen.append((await store.write(now, [succeeded(chosen, now)])).late)
            case "delay" if chosen:
                ended = failed(chosen, State.DELAYED, now + 5, is_counted=which % 2 == 0)
                seen.append((await store.write(now, [ended])).late)
            case "die" if chosen:
                seen.append((await store.write(now, [failed(chosen, State.DEAD, now)])).late)
            case "cancel":
                seen.append(await store.cancel(known, now))
            case "redrive":
                seen.append(await store.redrive(GREET, None if which else [known], now))
            case "fence":
                seen.append(await store.fence("us"))
        seen.append(await store.counts())
        seen.append(await store.page())
    return seen


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=STEPS)
def test_the_fake_and_the_real_ones_agree(
    steps: list[tuple[str, int]], tmp_path_factory: pytest.TempPathFactory, dsn: str
):
    async def all_of_them() -> None:
        seen = []
        for kind in KINDS:
            store = make(kind, tmp_path_factory.mktemp("events"), dsn)
            await store.open("us")
            try:
                seen.append(await play(store, steps))
            finally:
                await store.close()
        assert seen[0] == seen[1]
        assert seen[0] == seen[2]

    asyncio.run(all_of_them())
