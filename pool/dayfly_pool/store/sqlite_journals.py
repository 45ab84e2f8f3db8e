"""Journals in one SQLite file, and long bodies in files beside it."""

import asyncio
import json
import sqlite3
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from msgspec import structs

from dayfly_pool.errors import NameTaken, TooManyWishes
from dayfly_pool.store import journal_rows, rows
from dayfly_pool.store.bodies import Bodies
from dayfly_pool.store.database import ROWS_MAX, Database, chunks, tuples
from dayfly_pool.store.journals import (
    CLAIMS_MAX,
    PAGE_BYTES_MAX,
    PAGE_MAX,
    ROW_BYTES_MAX,
    SWEEP_ENTRIES,
    WISHES_MAX,
    Append,
    Entry,
    Journal,
    JournalId,
    Kind,
    NewEntry,
    Size,
    Wish,
)

MIGRATIONS: Final = (
    # A script that was released is never edited: append one. `user_version` counts those applied.
    """
    CREATE TABLE journals (
        row INTEGER PRIMARY KEY AUTOINCREMENT, -- never given twice: what is gone may have entries
        id TEXT NOT NULL UNIQUE,
        kind TEXT NOT NULL,
        namespace TEXT NOT NULL,
        name TEXT NOT NULL,
        created_at REAL NOT NULL,
        ended_at REAL NOT NULL DEFAULT 0,
        is_draft INTEGER NOT NULL,
        owner TEXT NOT NULL,
        fence INTEGER NOT NULL,
        last INTEGER NOT NULL,
        head BLOB NOT NULL,
        head_checksum INTEGER NOT NULL,
        UNIQUE (kind, namespace, name)
    ) STRICT;
    CREATE INDEX free ON journals (kind, id) WHERE owner = '' AND ended_at = 0 AND is_draft = 0;
    CREATE INDEX owned ON journals (owner) WHERE owner != '';
    CREATE INDEX over ON journals (ended_at) WHERE ended_at > 0;
    CREATE INDEX drafts ON journals (created_at) WHERE is_draft = 1;
    CREATE INDEX shown ON journals (kind, id);
    CREATE INDEX shown_of ON journals (kind, namespace, id);
    CREATE INDEX shown_open ON journals (kind, id) WHERE ended_at = 0;
    CREATE TABLE specs ( -- apart: a row of journals is written anew with every append
        journal INTEGER PRIMARY KEY,
        spec BLOB NOT NULL,
        file TEXT NOT NULL, -- the digest of a long spec
        checksum INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX spec_files ON specs (file) WHERE file != '';
    CREATE TABLE entries (
        journal INTEGER NOT NULL,
        number INTEGER NOT NULL,
        part INTEGER NOT NULL,
        low INTEGER NOT NULL,
        high INTEGER NOT NULL,
        size INTEGER NOT NULL,
        checksum INTEGER NOT NULL, -- of all the above but the journal and the size, and the body
        body BLOB NOT NULL,
        file TEXT NOT NULL, -- the digest of a long body
        UNIQUE (journal, number)
    ) STRICT;
    -- part 0 is what is appended to most often, and costs one page less
    CREATE INDEX parts ON entries (journal, part, number, low, high) WHERE part != 0;
    CREATE INDEX files ON entries (file) WHERE file != '';
    CREATE TABLE wishes (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        journal INTEGER NOT NULL,
        body BLOB NOT NULL
    ) STRICT;
    CREATE INDEX wished ON wishes (journal, number);
    CREATE TABLE gone (journal INTEGER PRIMARY KEY) STRICT; -- with entries that are still there
    CREATE TABLE owners (id TEXT PRIMARY KEY, beat INTEGER NOT NULL) STRICT, WITHOUT ROWID;
    """,
)


class SqliteJournals:
    """See `Store`. *path* is the database; long bodies are in the folder *bodies*."""

    def __init__(self, path: Path, bodies: Path) -> None:
        self._database = Database(path, MIGRATIONS, "journals", self._prepare)
        self._bodies = Bodies(bodies, ROW_BYTES_MAX)
        self._owner = ""
        self._loose: set[str] = set()
        """Files that perhaps nobody needs any more, once what says so is on the disk."""

    def __repr__(self) -> str:
        return f"<SqliteJournals {self._database}>"

    async def open(self, owner: str) -> None:
        """Open or create the file and check that it is sound."""
        self._owner = owner
        await self._database.open()
        try:
            await self._database.write(lambda: self._drop(self._bodies.found()))
        except BaseException:
            await self._database.close()
            raise

    async def close(self) -> None:
        """Close the file, after what is under way."""
        await self._database.close()

    async def create(
        self, journal: Journal, entries: Sequence[NewEntry] = (), *, is_ours: bool = False
    ) -> Journal:
        """Keep a new journal with its first entries."""
        is_ours = is_ours or journal.is_draft
        found = await self._database.write(lambda: self._create(journal, entries, is_ours))
        if found is None:
            raise NameTaken(f"{journal.kind} {journal.namespace}/{journal.name}")
        return found

    async def publish(self, id_: JournalId, *, is_ours: bool = False) -> Journal | None:
        """Let a draft be free, or *is_ours*."""
        return await self._database.write(lambda: self._publish(id_, is_ours))

    async def take(self, id_: JournalId) -> Journal | None:
        """Have the right to append to a draft."""
        return await self._database.write(lambda: self._take(id_))

    async def append(self, appends: Sequence[Append]) -> set[JournalId]:
        """All of them; returns those that came too late."""
        assert len({append.id for append in appends}) == len(appends), "a journal twice"
        return await self._database.write(lambda: self._append(appends))

    async def claim(self, kind: Kind, most: int) -> list[Journal]:
        """Have free journals, the oldest first."""
        return await self._database.write(lambda: self._claim(kind, min(most, CLAIMS_MAX)))

    async def release(self, but: Collection[tuple[JournalId, int]] = ()) -> int:
        """Let all of ours be free but *but*."""
        kept = json.dumps(list(but))
        return await self._database.write(lambda: self._release(kept))

    async def beat(self) -> dict[str, int]:
        """Say that our owner lives."""
        return await self._database.write(self._beat)

    async def fence(self, owner: str) -> int:
        """Let all journals of *owner* be free."""
        return await self._database.write(lambda: self._fence(owner))

    async def wish(self, id_: JournalId, body: bytes) -> int:
        """Want something of the owner."""
        number = await self._database.write(lambda: self._wish(id_, body))
        if number is None:
            raise TooManyWishes(f"{WISHES_MAX} of {id_} wait already")
        return number

    async def wishes(self) -> dict[JournalId, list[Wish]]:
        """What is wanted of us and was not heard."""
        return await self._database.read(self._wishes)

    async def get(self, id_: JournalId) -> Journal | None:
        """One journal."""
        return await self._database.read(lambda: self._read("id = ?", id_))

    async def find(self, kind: Kind, namespace: str, name: str) -> Journal | None:
        """The one of that name."""
        test = "kind = ? AND namespace = ? AND name = ?"
        return await self._database.read(lambda: self._read(test, kind, namespace, name))

    async def page(
        self,
        kind: Kind,
        namespace: str | None = None,
        limit: int = 100,
        before: JournalId | None = None,
        is_over: bool | None = None,
    ) -> list[Journal]:
        """The newest first, without specs."""
        return await self._database.read(
            lambda: self._page(kind, namespace, limit, before, is_over)
        )

    async def entries(
        self,
        id_: JournalId,
        part: int | None = None,
        after: int = 0,
        limit: int = PAGE_MAX,
        covering: int | None = None,
    ) -> list[Entry]:
        """In the order of their numbers."""
        return await self._database.read(lambda: self._entries(id_, part, after, limit, covering))

    async def size(self, id_: JournalId) -> Size:
        """Looks at every entry."""
        return await self._database.read(lambda: self._size(id_))

    async def delete(self, id_: JournalId) -> bool:
        """Forget one that is over or a draft."""
        test = "id = ? AND (ended_at > 0 OR is_draft = 1)"
        return bool(await self._database.write(lambda: self._forget(test, id_)))

    async def sweep(self, now: float, over_s: float, draft_s: float) -> int:
        """Forget what is old, and some of what has been deleted."""
        return await self._database.write(lambda: self._sweep(now - over_s, now - draft_s))

    async def listen(self, told: Callable[[], None]) -> None:
        """Nobody else writes to the file, and who does knows."""
        await asyncio.get_running_loop().create_future()

    # Below: on the writer's thread.

    @property
    def _into(self) -> sqlite3.Connection:
        return self._database.into

    def _prepare(self, connection: sqlite3.Connection) -> None:
        self._bodies.open()
        connection.execute(_OWNER, (self._owner,))

    def _create(
        self, journal: Journal, entries: Sequence[NewEntry], is_ours: bool
    ) -> Journal | None:
        known = self._get(self._into, "id = ?", journal.id)
        if known is not None:
            return known
        if is_ours:
            self._into.execute(_OWNER, (self._owner,))
        owner = self._owner if is_ours else ""
        made = structs.replace(
            journal, ended_at=0.0, owner=owner, fence=int(is_ours), last=len(entries), damage=""
        )
        values: list[object] = [made.id, made.kind, made.namespace, made.name, made.created_at]
        values += (made.is_draft, made.owner, made.fence, made.last, made.head)
        values.append(journal_rows.head_checksum(made.head))
        found = self._into.execute(
            "INSERT INTO journals (id, kind, namespace, name, created_at, is_draft, owner, fence,"
            " last, head, head_checksum) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (kind, namespace, name) DO NOTHING RETURNING row",
            values,
        ).fetchone()
        if found is None:
            return None
        spec = (*self._bodies.apart(made.spec), rows.checksum(b"", made.spec))
        self._into.execute("INSERT INTO specs VALUES (?, ?, ?, ?)", (found[0], *spec))
        self._insert([(found[0], number, entry) for number, entry in enumerate(entries, start=1)])
        return made

    def _publish(self, id_: JournalId, is_ours: bool) -> Journal | None:
        if is_ours:
            self._into.execute(_OWNER, (self._owner,))
        self._into.execute(
            "UPDATE journals SET is_draft = 0, owner = ?, fence = fence + 1"
            " WHERE id = ? AND is_draft = 1",
            (self._owner if is_ours else "", id_),
        )
        return self._get(self._into, "id = ?", id_)

    def _take(self, id_: JournalId) -> Journal | None:
        taken = self._into.execute(
            "UPDATE journals SET owner = ?, fence = fence + 1 WHERE id = ? AND is_draft = 1",
            (self._owner, id_),
        )
        return self._get(self._into, "id = ?", id_) if taken.rowcount else None

    def _append(self, appends: Sequence[Append]) -> set[JournalId]:
        found: dict[JournalId, int] = {}
        for some in chunks(appends):
            values: list[object] = []
            for a in some:
                head_checksum = None if a.head is None else journal_rows.head_checksum(a.head)
                values += (a.id, a.fence, a.after, a.last, a.head, head_checksum)
            found.update(self._into.execute(_APPEND[len(some)], values).fetchall())
        ended = [
            (a.ended_at, found[a.id]) for a in appends if a.ended_at is not None and a.id in found
        ]
        self._into.executemany("UPDATE journals SET ended_at = ?, owner = '' WHERE row = ?", ended)
        written = [a for a in appends if a.id in found]
        self._insert(
            [(found[a.id], n, e) for a in written for n, e in enumerate(a.entries, a.after + 1)]
        )
        for a in written:
            if a.replaces:
                files = self._into.execute(
                    "DELETE FROM entries WHERE journal = ? AND number IN"
                    " (SELECT value FROM json_each(?)) RETURNING file",
                    (found[a.id], json.dumps(a.replaces)),
                ).fetchall()
                self._loose.update(file for (file,) in files)
            if a.heard or a.ended_at is not None:
                self._into.execute(
                    "DELETE FROM wishes WHERE journal = ? AND (number <= ? OR ?)",
                    (found[a.id], a.heard, a.ended_at is not None),
                )
        return {a.id for a in appends} - found.keys()

    def _insert(self, entries: Sequence[tuple[int, int, NewEntry]]) -> None:
        for some in chunks(entries):
            values: list[object] = []
            for journal, number, new in some:
                body, file = self._bodies.apart(new.body)
                checksum = rows.checksum(journal_rows.place(number, new), new.body)
                values += (journal, number, new.part, new.low, new.high, len(new.body), checksum)
                values += (body, file)
            self._into.execute(_INSERT[len(some)], values)

    def _claim(self, kind: Kind, most: int) -> list[Journal]:
        self._into.execute(_OWNER, (self._owner,))
        found = self._into.execute(
            "UPDATE journals SET owner = ?, fence = fence + 1 WHERE row IN"
            " (SELECT row FROM journals INDEXED BY free"
            " WHERE owner = '' AND ended_at = 0 AND is_draft = 0"
            " AND kind = ? ORDER BY id LIMIT ?) RETURNING id",
            (self._owner, kind, most),
        ).fetchall()
        claimed = [self._get(self._into, "id = ?", id_) for (id_,) in sorted(found)]
        return [journal for journal in claimed if journal is not None]

    def _release(self, kept: str) -> int:
        return self._into.execute(
            f"{_FREE} AND (id, fence) NOT IN (SELECT json_extract(value, '$[0]'),"
            " json_extract(value, '$[1]') FROM json_each(?))",
            (self._owner, kept),
        ).rowcount

    def _fence(self, owner: str) -> int:
        number = self._into.execute(_FREE, (owner,)).rowcount
        if owner != self._owner:
            self._into.execute("DELETE FROM owners WHERE id = ?", (owner,))
        return number

    def _beat(self) -> dict[str, int]:
        self._into.execute(
            "INSERT INTO owners VALUES (?, 1) ON CONFLICT DO UPDATE SET beat = beat + 1",
            (self._owner,),
        )
        return dict(self._into.execute("SELECT id, beat FROM owners").fetchall())

    def _wish(self, id_: JournalId, body: bytes) -> int | None:
        """Its number; None when there are too many."""
        found = self._into.execute(
            "SELECT row, (SELECT count(*) FROM wishes WHERE journal = row) FROM journals"
            " WHERE id = ? AND ended_at = 0 AND is_draft = 0",
            (id_,),
        ).fetchone()
        if found is None:
            return 0
        if found[1] >= WISHES_MAX:
            return None
        return self._into.execute(
            "INSERT INTO wishes (journal, body) VALUES (?, ?)", (found[0], body)
        ).lastrowid

    def _forget(self, test: str, *values: object) -> int:
        """Those of which *test* is true; their entries are there until they are swept."""
        gone = self._into.execute(
            f"DELETE FROM journals WHERE {test} RETURNING row", values
        ).fetchall()
        for (row,) in gone:
            self._into.execute("INSERT INTO gone VALUES (?)", (row,))
            self._into.execute("DELETE FROM wishes WHERE journal = ?", (row,))
            files = self._into.execute("DELETE FROM specs WHERE journal = ? RETURNING file", (row,))
            self._loose.update(file for (file,) in files.fetchall())
        return len(gone)

    def _sweep(self, over: float, draft: float) -> int:
        # first, and only what earlier transactions have made loose
        loose = [self._loose.pop() for _ in range(min(SWEEP_ENTRIES, len(self._loose)))]
        number = self._drop(loose)
        old = "row IN (SELECT row FROM journals WHERE {} ORDER BY {} LIMIT ?)"
        over_test = old.format("ended_at > 0 AND ended_at <= ?", "ended_at")
        draft_test = old.format("is_draft = 1 AND created_at <= ?", "created_at")
        number += self._forget(over_test, over, SWEEP_ENTRIES)
        number += self._forget(draft_test, draft, SWEEP_ENTRIES)
        left = SWEEP_ENTRIES
        gone = self._into.execute("SELECT journal FROM gone LIMIT ?", (left,)).fetchall()
        for (journal,) in gone:
            files = self._into.execute(
                "DELETE FROM entries WHERE rowid IN"
                " (SELECT rowid FROM entries WHERE journal = ? LIMIT ?) RETURNING file",
                (journal, left),
            ).fetchall()
            self._loose.update(file for (file,) in files)
            number, left = number + len(files), left - len(files)
            if left <= 0:
                break
            self._into.execute("DELETE FROM gone WHERE journal = ?", (journal,))
        return number + bool(gone)

    def _drop(self, digests: Iterable[str]) -> int:
        """Remove those files that nobody needs any more; how many.

        What was written is on the disk by now: else a file might be gone, and not what needs it.
        """
        number = 0
        for digest in digests:
            needed = self._into.execute(
                "SELECT 1 FROM entries WHERE file = ? AND file != '' UNION ALL"
                " SELECT 1 FROM specs WHERE file = ? AND file != '' LIMIT 1",
                (digest, digest),
            ).fetchone()
            if digest and needed is None:
                self._bodies.remove(digest)
                number += 1
        return number

    # Below: on the reader's thread.

    def _read(self, test: str, *values: object) -> Journal | None:
        return self._get(self._database.out_of, test, *values)

    def _get(self, connection: sqlite3.Connection, test: str, *values: object) -> Journal | None:
        row = connection.execute(
            f"SELECT {journal_rows.JOURNAL}, spec, file, checksum FROM journals"
            f" CROSS JOIN specs ON specs.journal = journals.row WHERE {test}",
            values,
        ).fetchone()
        if row is None:
            return None
        spec, file, checksum = row[12:]
        spec, damage = self._bodies.checked(b"", spec, file, checksum)
        return journal_rows.journal(row, spec, damage and f"its spec: {damage}")

    def _page(
        self,
        kind: Kind,
        namespace: str | None,
        limit: int,
        before: JournalId | None,
        is_over: bool | None,
    ) -> list[Journal]:
        tests, values = ["kind = ?", "is_draft = 0"], list[object]([kind])
        if namespace is not None:
            tests.append("namespace = ?")
            values.append(namespace)
        if before is not None:
            tests.append("id < ?")
            values.append(before)
        if is_over is not None:
            tests.append("ended_at > 0" if is_over else "ended_at = 0")
        found = self._database.out_of.execute(
            f"SELECT {journal_rows.JOURNAL} FROM journals WHERE {' AND '.join(tests)}"
            " ORDER BY id DESC LIMIT ?",
            (*values, min(limit, PAGE_MAX)),
        )
        return [journal_rows.journal(row) for row in found]

    def _entries(
        self, id_: JournalId, part: int | None, after: int, limit: int, covering: int | None
    ) -> list[Entry]:
        tests, values = ["number > ?"], list[object]([after])
        index = ""
        if part is not None:
            index = "INDEXED BY parts" if part else ""
            tests.append("part = ? AND part != 0" if part else "part = ?")
            values.append(part)
        if covering is not None:
            tests.append("low <= ? AND high >= ?")
            values += (covering, covering)
        found = self._database.out_of.execute(
            f"SELECT {journal_rows.ENTRY}, size, rowid FROM entries {index} WHERE journal ="
            f" (SELECT row FROM journals WHERE id = ?) AND {' AND '.join(tests)}"
            " ORDER BY number LIMIT ?",
            (id_, *values, min(limit, PAGE_MAX)),
        )
        some: list[Sequence[Any]] = []
        long = 0
        for row in found:
            long += row[7]
            if some and long > PAGE_BYTES_MAX:
                break
            some.append(row)
        found.close()
        return [entry for row in some if (entry := self._entry(row)) is not None]

    def _entry(self, row: Sequence[Any]) -> Entry | None:
        """None when it has just gone, and its file with it."""
        number, part, low, high, body, file, checksum, _, rowid = row
        place = journal_rows.place_of(number, part, low, high)
        body, damage = self._bodies.checked(place, body, file, checksum)
        if damage and file:
            still = "SELECT 1 FROM entries WHERE rowid = ?"
            if self._database.out_of.execute(still, (rowid,)).fetchone() is None:
                return None
        return Entry(number, part, low, high, b"" if damage else body, damage)

    def _size(self, id_: JournalId) -> Size:
        return Size(
            *self._database.out_of.execute(
                "SELECT count(*), coalesce(sum(size), 0) FROM entries"
                " WHERE journal = (SELECT row FROM journals WHERE id = ?)",
                (id_,),
            ).fetchone()
        )

    def _wishes(self) -> dict[JournalId, list[Wish]]:
        found = self._database.out_of.execute(
            "SELECT journals.id, number, body FROM wishes CROSS JOIN journals"
            " ON journals.row = wishes.journal WHERE owner = ? ORDER BY number",
            (self._owner,),
        )
        wishes: dict[JournalId, list[Wish]] = {}
        for id_, number, body in found:
            wishes.setdefault(id_, []).append(Wish(number, body))
        return wishes


_OWNER: Final = "INSERT INTO owners VALUES (?, 0) ON CONFLICT DO NOTHING"
_FREE: Final = (
    "UPDATE journals SET owner = '', fence = fence + 1"
    " WHERE owner = ? AND owner != '' AND is_draft = 0"
)
# what is indexed is not in it: SQLite would write the indexes anew with every append
_APPEND: Final = {
    n: "WITH a (id, fence, after, last, head, head_checksum) AS"
    f" (VALUES {tuples(n, '(?, ?, ?, ?, ?, ?)')})"
    " UPDATE journals SET last = max(journals.last, a.last),"
    " head = coalesce(a.head, journals.head),"
    " head_checksum = coalesce(a.head_checksum, journals.head_checksum)"
    " FROM a WHERE journals.id = a.id AND journals.fence = a.fence AND journals.last >= a.after"
    " RETURNING journals.id, journals.row"
    for n in range(1, ROWS_MAX + 1)
}
_INSERT: Final = {
    n: "INSERT INTO entries (journal, number, part, low, high, size, checksum, body, file)"
    f" VALUES {tuples(n, '(?, ?, ?, ?, ?, ?, ?, ?, ?)')} ON CONFLICT (journal, number) DO NOTHING"
    for n in range(1, ROWS_MAX + 1)
}
