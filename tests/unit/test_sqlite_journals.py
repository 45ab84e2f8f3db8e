"""Journals in SQLite: what is damaged on the disk is told, and files go when nobody needs them."""

import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dayfly_pool.errors import StoreFailed
from dayfly_pool.store.journals import ROW_BYTES_MAX, Append, Journal, JournalId, NewEntry
from dayfly_pool.store.sqlite_journals import MIGRATIONS, SqliteJournals

J1, J2 = JournalId("1" * 32), JournalId("2" * 32)
LONG, LONGER = b"x" * (ROW_BYTES_MAX + 1), b"y" * (ROW_BYTES_MAX + 2)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteJournals]:
    made = SqliteJournals(tmp_path / "journals.sqlite", tmp_path / "bodies")
    await made.open("us")
    yield made
    await made.close()


async def create(store: SqliteJournals, id_: JournalId = J1, spec: bytes = b"spec") -> None:
    made = Journal(
        id=id_, kind="job", namespace="n", name=id_, created_at=1.0, head=b"head", spec=spec
    )
    await store.create(made, is_ours=True)


async def append(
    store: SqliteJournals, after: int, *bodies: bytes, id_: JournalId = J1, **more: object
) -> None:
    entries = tuple(NewEntry(body=body) for body in bodies)
    made = Append(id=id_, fence=1, after=after, entries=entries, **more)  # type: ignore[arg-type]
    assert await store.append([made]) == set()


def change(folder: Path, statement: str) -> None:
    """As a damaged disk would."""
    with sqlite3.connect(folder / "journals.sqlite") as connection:
        connection.execute(statement)
    connection.close()


def files(folder: Path) -> list[Path]:
    return sorted((folder / "bodies").iterdir())


@pytest.mark.parametrize(
    "harm", ["body = x'00'", "low = 7", "part = 3", "checksum = checksum + 1", "number = 9"]
)
async def test_an_entry_that_was_damaged_is_told_and_the_others_are_well(
    store: SqliteJournals, tmp_path: Path, harm: str
):
    await create(store)
    await append(store, 0, b"a", b"b")
    change(tmp_path, f"UPDATE entries SET {harm} WHERE number = 2")
    well, damaged = await store.entries(J1)

    assert (well.body, well.damage) == (b"a", "")
    assert (damaged.body, "damaged" in damaged.damage) == (b"", True)


@pytest.mark.parametrize("harm", ["lost", "flipped"])
async def test_a_long_body_that_is_lost_or_damaged_is_told(
    store: SqliteJournals, tmp_path: Path, harm: str
):
    await create(store, spec=LONGER)
    await append(store, 0, LONG)
    for path in files(tmp_path):
        if harm == "lost":
            path.unlink()
        else:
            path.write_bytes(b"z" + path.read_bytes()[1:])
    (entry,) = await store.entries(J1)
    journal = await store.get(J1)
    assert journal is not None

    word = "lost" if harm == "lost" else "damaged"
    assert (entry.body, word in entry.damage) == (b"", True)
    assert (journal.spec, journal.damage.startswith("its spec"), word in journal.damage) == (
        b"",
        True,
        True,
    )


async def test_a_damaged_head_is_told_also_in_a_page(store: SqliteJournals, tmp_path: Path):
    await create(store)
    change(tmp_path, "UPDATE journals SET head = x'00'")
    (shown,) = await store.page("job")

    assert (shown.head, shown.damage.startswith("its head")) == (b"", True)


async def test_files_go_with_the_last_that_needs_them(store: SqliteJournals, tmp_path: Path):
    await create(store, J1, spec=LONG)
    await create(store, J2)
    await append(store, 0, LONG, LONGER)
    await append(store, 0, LONG, id_=J2)
    assert len(files(tmp_path)) == 2
    await append(store, 2, b"z", replaces=(1, 2))
    assert len(files(tmp_path)) == 2  # that they are not needed is to be on the disk before
    while await store.sweep(0.0, 1e9, 1e9):
        pass
    assert len(files(tmp_path)) == 1

    for id_, after in ((J1, 3), (J2, 1)):
        await append(store, after, id_=id_, ended_at=2.0)
        assert await store.delete(id_)
    while await store.sweep(0.0, 1e9, 1e9):
        pass
    assert files(tmp_path) == []


async def test_what_a_crash_left_and_nobody_needs_is_removed(store: SqliteJournals, tmp_path: Path):
    await create(store, spec=LONGER)
    await append(store, 0, LONG)
    kept = files(tmp_path)
    await store.close()
    (tmp_path / "bodies" / ("a" * 64)).write_bytes(b"never written down")
    await store.open("us")

    assert files(tmp_path) == kept


async def test_a_write_that_failed_left_nothing_and_the_same_again_works(
    store: SqliteJournals, tmp_path: Path
):
    """Also what it was to replace is still there, with its file."""
    await create(store)
    await append(store, 0, LONG)
    store._database.into.execute(
        "CREATE TEMP TRIGGER full BEFORE DELETE ON entries BEGIN SELECT raise(ABORT, 'full'); END"
    )
    with pytest.raises(StoreFailed, match="full"):
        await append(store, 1, b"b", replaces=(1,))
    await store.sweep(0.0, 1e9, 1e9)
    assert [entry.body for entry in await store.entries(J1)] == [LONG]

    await append(store, 1, b"b", replaces=(1,))
    assert [entry.body for entry in await store.entries(J1)] == [b"b"]


async def test_a_store_that_is_closed_says_so(store: SqliteJournals):
    await store.close()
    with pytest.raises(StoreFailed, match="closed"):
        await store.append([])
    await store.close()


OPEN = "owner = '' AND ended_at = 0 AND is_draft = 0"
QUERIES = {
    f"SELECT id FROM journals INDEXED BY free WHERE {OPEN} AND kind = ? LIMIT 9": "free",
    "UPDATE journals SET owner = '' WHERE owner = ? AND owner != '' AND is_draft = 0": "owned",
    "SELECT row FROM journals WHERE ended_at > 0 AND ended_at <= ? ORDER BY ended_at": "over",
    "SELECT row FROM journals WHERE is_draft = 1 AND created_at <= ? LIMIT 9": "drafts",
    "SELECT id FROM journals WHERE kind = ? AND namespace = ? AND id < ? ORDER BY id DESC":
        "shown_of",
    "SELECT id FROM journals WHERE kind = ? AND ended_at = 0 ORDER BY id DESC": "shown_open",
    "SELECT body FROM entries INDEXED BY parts WHERE journal = ? AND number > ? AND part = ?"
    " AND part != 0 AND low <= ? AND high >= ? ORDER BY number LIMIT 9": "parts",
    "SELECT 1 FROM entries WHERE file = ? AND file != ''": "files",
    "SELECT 1 FROM specs WHERE file = ? AND file != ''": "spec_files",
    "DELETE FROM wishes WHERE journal = ? AND (number <= ? OR ?)": "wished",
}  # fmt: skip


@pytest.mark.parametrize("query", QUERIES)
def test_what_is_asked_often_has_its_index(query: str):
    """SQLite uses an index of some rows only where the query says which, in the same words."""
    connection = sqlite3.connect(":memory:")
    connection.executescript(MIGRATIONS[0])
    values = ("x",) * query.count("?")
    plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}", values)]
    connection.close()

    assert any(f"INDEX {QUERIES[query]} " in f"{step} " for step in plan), plan
    assert not any("TEMP B-TREE" in step for step in plan), plan
