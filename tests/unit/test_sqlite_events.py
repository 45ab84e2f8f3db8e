"""Events in SQLite: what is damaged on the disk is told, and costs nobody else anything."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dayfly_pool.errors import StoreFailed
from dayfly_pool.models import FunctionId, InvocationId
from dayfly_pool.store import database as module
from dayfly_pool.store.events import ROW_BYTES_MAX, Ended, Event, Lease, State
from dayfly_pool.store.sqlite_events import MIGRATIONS, SqliteEvents

GREET = FunctionId("default/greet")
E1, E2 = InvocationId("event-1"), InvocationId("event-2")
LONG = b"x" * (ROW_BYTES_MAX + 1)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteEvents]:
    made = SqliteEvents(tmp_path / "events.sqlite", tmp_path / "bodies")
    await made.open("us")
    yield made
    await made.close()


def event(id_: InvocationId = E1, body: bytes = b"body") -> Event:
    return Event(id=id_, function=GREET, meta=b"meta", body=body, accepted_at=100.0, age_s=60.0)


async def leases(store: SqliteEvents) -> list[Lease]:
    return (await store.write(110.0, wanted={GREET: 10})).leased


def change(folder: Path, statement: str) -> None:
    """As a damaged disk would."""
    with sqlite3.connect(folder / "events.sqlite") as connection:
        connection.execute(statement)
    connection.close()


def files(folder: Path) -> list[Path]:
    return sorted((folder / "bodies").iterdir())


async def test_a_row_that_was_damaged_is_told_and_the_others_are_well(
    store: SqliteEvents, tmp_path: Path
):
    await store.write(100.0, accepted=[event(E1), event(E2)])
    change(tmp_path, "UPDATE events SET body = x'00' WHERE id = 'event-1'")
    damaged, well = await leases(store)

    assert (damaged.id, "damaged" in damaged.damage) == (E1, True)
    assert (well.id, well.body, well.damage) == (E2, b"body", "")


@pytest.mark.parametrize("harm", ["lost", "flipped"])
async def test_a_long_body_that_is_lost_or_damaged_is_told(
    store: SqliteEvents, tmp_path: Path, harm: str
):
    await store.write(100.0, accepted=[event(body=LONG)])
    (path,) = files(tmp_path)
    if harm == "lost":
        path.unlink()
    else:
        path.write_bytes(b"y" + LONG[1:])
    (lease,) = await leases(store)
    fetched = await store.fetch(lease)

    assert fetched.body == b""
    assert ("lost" if harm == "lost" else "damaged") in fetched.damage


async def test_a_body_file_that_a_crash_left_half_written_is_written_again(
    store: SqliteEvents, tmp_path: Path
):
    await store.write(100.0, accepted=[event(E1, LONG)])
    (path,) = files(tmp_path)
    path.write_bytes(LONG[:1000])
    await store.write(100.0, accepted=[event(E2, LONG)])

    assert path.read_bytes() == LONG
    assert path.stat().st_mode & 0o777 == 0o600


async def test_long_bodies_are_removed_with_the_last_event_that_has_them(
    store: SqliteEvents, tmp_path: Path
):
    await store.write(100.0, accepted=[event(E1, LONG), event(E2, LONG)])
    first, second = await leases(store)
    assert len(files(tmp_path)) == 1

    for lease, at in ((first, 110.0), (second, 120.0)):
        ended = Ended(row=lease.row, fence=lease.fence, state=State.SUCCEEDED, at=at, body=b"z")
        await store.write(at, [ended])
    await store.sweep(115.0, over_s=1.0, dead_s=1.0)
    assert len(files(tmp_path)) == 1
    await store.sweep(125.0, over_s=1.0, dead_s=1.0)
    assert files(tmp_path) == []


async def test_what_a_crash_left_of_events_that_were_not_accepted_is_removed(
    store: SqliteEvents, tmp_path: Path
):
    await store.write(100.0, accepted=[event(body=LONG)])
    kept = files(tmp_path)
    await store.close()
    (tmp_path / "bodies" / ("a" * 64)).write_bytes(b"never accepted")
    (tmp_path / "bodies" / ("b" * 64 + ".part")).write_bytes(b"half")
    await store.open("us")

    assert files(tmp_path) == kept


async def test_a_failed_write_changes_nothing_and_the_next_one_works(store: SqliteEvents):
    """Everything of it, what had been done before the failure as well."""
    await store.write(100.0, accepted=[event(E1)])
    with pytest.raises(StoreFailed):
        await store.write(100.0, accepted=[event(E2), event(E1)])  # an id that is there
    assert await store.get(E2) is None

    await store.write(100.0, accepted=[event(E2)])
    assert [lease.id for lease in await leases(store)] == [E1, E2]


async def test_a_connection_that_broke_is_opened_again(store: SqliteEvents):
    store._database.into.close()
    with pytest.raises(StoreFailed):
        await store.write(100.0, accepted=[event(E1)])

    await store.write(100.0, accepted=[event(E1)])
    assert [lease.id for lease in await leases(store)] == [E1]


async def test_a_store_that_is_closed_says_so(store: SqliteEvents):
    await store.close()
    with pytest.raises(StoreFailed, match="closed"):
        await store.write(100.0)
    await store.close()


async def test_a_defect_of_a_checkpoint_is_logged_and_not_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Else the log would grow until the server ends, and nobody would know why."""
    monkeypatch.setattr(module, "CHECKPOINT_S", 0.001)
    monkeypatch.setattr(module, "DEFECT_S", 0.001)
    moved = asyncio.Event()

    class Defective(module.Database):
        def _move(self) -> None:
            if not caplog.records:
                raise ArithmeticError("what nobody thought of")
            super()._move()
            loop.call_soon_threadsafe(moved.set)

    loop = asyncio.get_running_loop()
    store = Defective(tmp_path / "events.sqlite", MIGRATIONS, "events", lambda connection: None)
    await store.open()
    try:
        async with asyncio.timeout(5):
            await moved.wait()
    finally:
        await store.close()

    assert caplog.records[0].exc_info


async def test_the_file_of_a_newer_dayfly_is_not_touched(tmp_path: Path, store: SqliteEvents):
    await store.close()
    change(tmp_path, f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    with pytest.raises(StoreFailed, match="newer Dayfly"):
        await store.open("us")


QUERIES = {
    "UPDATE events SET state = 2 WHERE row IN (SELECT row FROM events WHERE state = 0"
    " AND function = ? ORDER BY priority DESC, row LIMIT 9)": "waiting",
    "SELECT row FROM events WHERE state = 1 AND at <= ? ORDER BY at LIMIT 9": "delayed",
    "SELECT min(at) FROM events WHERE state = 1": "delayed",
    "SELECT row FROM events WHERE state = 3 AND at <= ? ORDER BY at LIMIT 9": "succeeded",
    "SELECT row FROM events WHERE state = 4 AND at <= ? ORDER BY at LIMIT 9": "dead",
    "SELECT row FROM events WHERE state = 5 AND at <= ? ORDER BY at LIMIT 9": "cancelled",
    "UPDATE events SET state = 0 WHERE state = 4 AND function = ?": "dead_of",
    "UPDATE events SET state = 0 WHERE state = 2 AND owner = ?": "running",
    "SELECT 1 FROM events WHERE file = ? AND file != ''": "files",
}


@pytest.mark.parametrize("query", QUERIES)
def test_what_is_asked_often_has_its_index(query: str):
    """SQLite uses an index of some rows only where the query says which, in the same words."""
    connection = sqlite3.connect(":memory:")
    connection.executescript(MIGRATIONS[0])
    values = ("x",) * query.count("?")
    plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}", values)]
    connection.close()

    assert any(f"INDEX {QUERIES[query]} " in f"{step} " for step in plan), plan
    assert not any(step.startswith("SCAN") for step in plan), plan
