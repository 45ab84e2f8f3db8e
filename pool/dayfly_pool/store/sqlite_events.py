"""Durable events in one SQLite file, and long bodies in files beside it.

One thread writes, with a transaction for whatever came together; another reads (see `database`).
"""

import asyncio
import contextlib
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from msgspec import structs

from dayfly_pool.models import FunctionId, InvocationId
from dayfly_pool.store import rows
from dayfly_pool.store.bodies import Bodies
from dayfly_pool.store.database import ROWS_MAX, Database, chunks, tuples
from dayfly_pool.store.events import (
    PAGE_MAX,
    ROW_BYTES_MAX,
    Accepted,
    Ended,
    Event,
    Lease,
    Shown,
    State,
    Written,
)

MIGRATIONS: Final = (
    # A script that was released is never edited: append one. `user_version` counts those applied.
    """
    CREATE TABLE events (
        row INTEGER PRIMARY KEY AUTOINCREMENT, -- in the order in which they were accepted
        id TEXT NOT NULL UNIQUE,
        function TEXT NOT NULL,
        state INTEGER NOT NULL,
        priority INTEGER NOT NULL,
        accepted_at REAL NOT NULL,
        age_s REAL NOT NULL,
        expires_at REAL NOT NULL,
        at REAL NOT NULL, -- delayed: when it is ready; over: when it ended
        fence INTEGER NOT NULL DEFAULT 0,
        attempts INTEGER NOT NULL DEFAULT 0,
        owner TEXT NOT NULL DEFAULT '',
        checksum INTEGER NOT NULL, -- of meta and body
        meta BLOB NOT NULL,
        body BLOB NOT NULL,
        file TEXT NOT NULL, -- the digest of a long body
        result BLOB NOT NULL DEFAULT x'',
        result_body BLOB NOT NULL DEFAULT x'',
        result_file TEXT NOT NULL DEFAULT ''
    ) STRICT;
    CREATE INDEX waiting ON events (function, priority DESC, row) WHERE state = 0;
    CREATE INDEX delayed ON events (at) WHERE state = 1;
    CREATE INDEX running ON events (owner) WHERE state = 2;
    CREATE INDEX succeeded ON events (at) WHERE state = 3;
    CREATE INDEX dead ON events (at) WHERE state = 4;
    CREATE INDEX dead_of ON events (function, row) WHERE state = 4;
    CREATE INDEX cancelled ON events (at) WHERE state = 5;
    CREATE INDEX files ON events (file) WHERE file != '';
    CREATE INDEX result_files ON events (result_file) WHERE result_file != '';
    CREATE TABLE attempts (
        event INTEGER NOT NULL,
        fence INTEGER NOT NULL,
        started_at REAL NOT NULL,
        ended_at REAL NOT NULL,
        is_counted INTEGER NOT NULL,
        kind TEXT NOT NULL,
        message TEXT NOT NULL,
        PRIMARY KEY (event, fence)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE keys (
        function TEXT NOT NULL,
        key TEXT NOT NULL,
        fingerprint TEXT NOT NULL,
        event TEXT NOT NULL,
        until REAL NOT NULL,
        PRIMARY KEY (function, key)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX old_keys ON keys (until);
    CREATE TABLE owners (id TEXT PRIMARY KEY, beat INTEGER NOT NULL) STRICT, WITHOUT ROWID;
    """,
)


class SqliteEvents:
    """See `Store`. *path* is the database; long bodies are in the folder *bodies*."""

    def __init__(self, path: Path, bodies: Path) -> None:
        self._database = Database(path, MIGRATIONS, "events", self._prepare)
        self._bodies = Bodies(bodies, ROW_BYTES_MAX)
        self._owner = ""
        self._next_due: float | None = None

    def __repr__(self) -> str:
        return f"<SqliteEvents {self._database}>"

    async def open(self, owner: str) -> None:
        """Open or create the file and check that it is sound."""
        self._owner = owner
        await self._database.open()
        try:
            await self._database.write(self._clear_up)
        except BaseException:
            await self._database.close()
            raise

    async def close(self) -> None:
        """Close the file, after what is under way."""
        await self._database.close()

    async def write(
        self,
        now: float,
        ended: Sequence[Ended] = (),
        accepted: Sequence[Event] = (),
        wanted: Mapping[FunctionId, int] | None = None,
    ) -> Written:
        """All of it or nothing, in this order, and on the disk when it returns."""
        wanted = dict(wanted or {})
        return await self._database.write(lambda: self._do_write(now, ended, accepted, wanted))

    async def fetch(self, lease: Lease) -> Lease:
        """The same with its long body."""
        return await self._database.read(lambda: self._fetch(lease)) if lease.is_long else lease

    async def cancel(self, id_: InvocationId, now: float) -> Shown | None:
        """End it, unless it has ended; as it was before."""
        return await self._database.write(lambda: self._cancel(id_, now))

    async def redrive(
        self, function: FunctionId, ids: Sequence[InvocationId] | None, now: float
    ) -> int:
        """Let dead events wait again."""
        return await self._database.write(lambda: self._redrive(function, ids, now))

    async def get(self, id_: InvocationId) -> Shown | None:
        """One event."""
        return await self._database.read(lambda: self._get(self._read_from, id_))

    async def page(
        self,
        function: FunctionId | None = None,
        state: State | None = None,
        limit: int = 100,
        before: InvocationId | None = None,
    ) -> list[Shown]:
        """The newest first; without bodies."""
        return await self._database.read(lambda: self._page(function, state, limit, before))

    async def counts(self) -> dict[tuple[FunctionId, State], int]:
        """How many there are of each function in each state."""
        return await self._database.read(self._counts)

    async def oldest(self, functions: Iterable[FunctionId]) -> dict[FunctionId, float]:
        """When the next waiting event of each was accepted, where one waits."""
        asked = list(functions)
        return await self._database.read(lambda: self._oldest(asked))

    async def known(self, function: FunctionId, keys: Sequence[str]) -> dict[str, InvocationId]:
        """Which events the *keys* stand for."""
        asked = json.dumps(list(keys))
        return await self._database.read(lambda: self._known(function, asked))

    async def sweep(self, now: float, over_s: float, dead_s: float) -> int:
        """Forget what is old."""
        return await self._database.write(lambda: self._sweep(now, over_s, dead_s))

    async def beat(self) -> dict[str, int]:
        """Say that our owner lives."""
        return await self._database.write(self._beat)

    async def release(self, but: Collection[tuple[int, int]]) -> Counter[FunctionId]:
        """Give back our leases but *but*."""
        kept = json.dumps(list(but))
        return await self._database.write(lambda: self._release(kept))

    async def listen(self, told: Callable[[FunctionId], None]) -> None:
        """Nobody else writes to the file, and who does knows."""
        await asyncio.get_running_loop().create_future()

    async def fence(self, owner: str) -> Counter[FunctionId]:
        """Take all leases from *owner*."""
        return await self._database.write(lambda: self._fence(owner))

    # Below: on the writer's thread.

    @property
    def _into(self) -> sqlite3.Connection:
        return self._database.into

    def _prepare(self, connection: sqlite3.Connection) -> None:
        self._bodies.open()
        connection.execute(
            "INSERT INTO owners VALUES (?, 0) ON CONFLICT DO NOTHING", (self._owner,)
        )
        (self._next_due,) = connection.execute(
            "SELECT min(at) FROM events WHERE state = 1"
        ).fetchone()

    def _clear_up(self) -> None:
        """Remove the files of events that a crash kept from being accepted."""
        for digest in self._bodies.found():
            self._drop(digest)

    def _do_write(
        self,
        now: float,
        ended: Sequence[Ended],
        accepted: Sequence[Event],
        wanted: dict[FunctionId, int],
    ) -> Written:
        late = self._end(ended)
        then = [event for e in ended if (e.row, e.fence) not in late for event in e.then]
        self._accept(then)
        found = self._accept(accepted)
        due = self._ripen(now) + Counter(event.function for event in then)
        leased = [lease for each, n in wanted.items() for lease in self._lease(each, n)]
        return Written(found, late, leased, due, self._next_due)

    def _end(self, ended: Sequence[Ended]) -> set[tuple[int, int]]:
        taken: set[tuple[int, int]] = set()
        for some in chunks(ended):
            values: list[object] = []
            for each in some:
                body, file = self._bodies.apart(each.body)
                counted = each.is_counted
                values += (each.row, each.fence, each.state, each.at, counted, each.result, body)
                values.append(file)
            taken.update(self._into.execute(_END[len(some)], values).fetchall())
        failures = [
            (e.row, a.fence, a.started_at, a.ended_at, a.is_counted, a.kind, a.message)
            for e in ended
            if (a := e.attempt) is not None and (e.row, e.fence) in taken
        ]
        self._into.executemany("INSERT INTO attempts VALUES (?, ?, ?, ?, ?, ?, ?)", failures)
        times = [e.at for e in ended if e.state is State.DELAYED and (e.row, e.fence) in taken]
        self._note_due(times)
        return {(e.row, e.fence) for e in ended} - taken

    def _accept(self, accepted: Sequence[Event]) -> list[Accepted]:
        found = [self._keyed(event) if event.key else Accepted(event.id) for event in accepted]
        new = [event for event, a in zip(accepted, found, strict=True) if a.is_new]
        more = [(e.function, k.text, k.fingerprint, e.id, k.until) for e in new for k in e.known_as]
        self._into.executemany(
            "INSERT INTO keys VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET event ="
            " excluded.event, fingerprint = excluded.fingerprint,"
            " until = max(until, excluded.until)",
            more,
        )
        for some in chunks(new):
            values: list[object] = []
            for event in some:
                body, file = self._bodies.apart(event.body)
                values += (event.id, event.function, event.priority, event.accepted_at, event.age_s)
                values += (event.accepted_at + event.age_s, rows.checksum(event.meta, event.body))
                values += (event.meta, body, file)
            self._into.execute(_INSERT[len(some)], values)
        return found

    def _keyed(self, event: Event) -> Accepted:
        """Which event its key stands for: this one, unless there is one that is not too old."""
        key = event.key
        assert key is not None
        row = (event.function, key.text, key.fingerprint, event.id, key.until, event.accepted_at)
        is_new = self._into.execute(
            "INSERT INTO keys VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET event ="
            " excluded.event, fingerprint = excluded.fingerprint, until = excluded.until"
            " WHERE until <= ? RETURNING event",
            row,
        ).fetchall()
        if is_new:
            return Accepted(event.id)
        (id_, fingerprint) = self._into.execute(
            "SELECT event, fingerprint FROM keys WHERE function = ? AND key = ?", row[:2]
        ).fetchone()
        return Accepted(id_, is_new=False, is_other=fingerprint != key.fingerprint)

    def _ripen(self, now: float) -> Counter[FunctionId]:
        """Let the delayed ones wait whose time has come."""
        if self._next_due is None or self._next_due > now:
            return Counter()
        due = self._into.execute(
            "UPDATE events SET state = 0 WHERE row IN (SELECT row FROM events"
            " WHERE state = 1 AND at <= ? ORDER BY at LIMIT ?) RETURNING function",
            (now, PAGE_MAX),
        ).fetchall()
        (self._next_due,) = self._into.execute(
            "SELECT min(at) FROM events WHERE state = 1"
        ).fetchone()
        return Counter(function for (function,) in due)

    def _lease(self, function: FunctionId, most: int) -> list[Lease]:
        found = self._into.execute(
            "UPDATE events SET state = 2, fence = fence + 1, owner = ? WHERE row IN"
            " (SELECT row FROM events WHERE state = 0 AND function = ?"
            f" ORDER BY priority DESC, row LIMIT ?) RETURNING {rows.LEASED}",
            (self._owner, function, most),
        ).fetchall()
        return rows.leased(function, found)

    def _cancel(self, id_: InvocationId, now: float) -> Shown | None:
        before = self._get(self._into, id_)
        if before is not None and not before.state.is_over:
            self._into.execute(
                "UPDATE events SET state = 5, at = ?, owner = '' WHERE id = ?", (now, id_)
            )
        return before

    def _redrive(self, function: FunctionId, ids: Sequence[InvocationId] | None, now: float) -> int:
        statement = (
            "UPDATE events SET state = 0, attempts = 0, expires_at = ? + age_s"
            " WHERE state = 4 AND function = ?"
        )
        if ids is None:
            return self._into.execute(statement, (now, function)).rowcount
        one = f"{statement} AND id = ?"
        return sum(self._into.execute(one, (now, function, id_)).rowcount for id_ in ids)

    def _sweep(self, now: float, over_s: float, dead_s: float) -> int:
        self._into.execute(
            "DELETE FROM keys WHERE (function, key) IN"
            " (SELECT function, key FROM keys WHERE until <= ? LIMIT ?)",
            (now, PAGE_MAX),
        )
        gone: list[tuple[int, str, str]] = []
        for state in (State.SUCCEEDED, State.DEAD, State.CANCELLED):
            kept_s = dead_s if state is State.DEAD else over_s
            gone += self._into.execute(
                # the number is written out: an index of some states is used for no parameter
                f"DELETE FROM events WHERE row IN (SELECT row FROM events WHERE state = {state:d}"
                " AND at <= ? ORDER BY at LIMIT ?) RETURNING row, file, result_file",
                (now - kept_s, PAGE_MAX - len(gone)),
            ).fetchall()
        self._into.executemany("DELETE FROM attempts WHERE event = ?", [(row,) for row, *_ in gone])
        for file in {file for _, *files in gone for file in files if file}:
            self._drop(file)
        return len(gone)

    def _beat(self) -> dict[str, int]:
        self._into.execute(
            "INSERT INTO owners VALUES (?, 1) ON CONFLICT DO UPDATE SET beat = beat + 1",
            (self._owner,),
        )
        return dict(self._into.execute("SELECT id, beat FROM owners").fetchall())

    def _fence(self, owner: str) -> Counter[FunctionId]:
        taken = self._into.execute(
            "UPDATE events SET state = 0, owner = '' WHERE state = 2 AND owner = ?"
            " RETURNING function",
            (owner,),
        ).fetchall()
        if owner != self._owner:
            self._into.execute("DELETE FROM owners WHERE id = ?", (owner,))
        return Counter(function for (function,) in taken)

    def _release(self, kept: str) -> Counter[FunctionId]:
        taken = self._into.execute(
            "UPDATE events SET state = 0, owner = '' WHERE state = 2 AND owner = ?"
            " AND (row, fence) NOT IN (SELECT json_extract(value, '$[0]'),"
            " json_extract(value, '$[1]') FROM json_each(?))"
            " RETURNING function",
            (self._owner, kept),
        ).fetchall()
        return Counter(function for (function,) in taken)

    def _note_due(self, times: Iterable[float]) -> None:
        known = () if self._next_due is None else (self._next_due,)
        self._next_due = min((*times, *known), default=None)

    # ---- long bodies --------------------------------------------------------------------------

    def _drop(self, digest: str) -> None:
        """Remove a file that no event needs any more."""
        needed = self._into.execute(
            "SELECT 1 FROM events WHERE file = ? AND file != '' UNION ALL"
            " SELECT 1 FROM events WHERE result_file = ? AND result_file != '' LIMIT 1",
            (digest, digest),
        ).fetchone()
        if needed is None:
            self._bodies.remove(digest)

    # Below: on the reader's thread.

    @property
    def _read_from(self) -> sqlite3.Connection:
        return self._database.out_of

    def _fetch(self, lease: Lease) -> Lease:
        (checksum,) = self._read_from.execute(
            "SELECT checksum FROM events WHERE row = ?", (lease.row,)
        ).fetchone()
        body, damage = self._bodies.checked(lease.meta, b"", lease.file, checksum)
        return structs.replace(lease, body=body, damage=damage)

    def _get(self, connection: sqlite3.Connection, id_: InvocationId) -> Shown | None:
        row = connection.execute(f"SELECT {rows.SHOWN} FROM events WHERE id = ?", (id_,)).fetchone()
        if row is None:
            return None
        failures = connection.execute(
            f"SELECT {rows.ATTEMPT} FROM attempts WHERE event = ? ORDER BY fence", (row[15],)
        )
        meta, body, file, _, result_body, result_file, _, checksum = row[9:]
        body, _ = self._bodies.checked(meta, body, file, checksum)
        with contextlib.suppress(OSError):
            result_body = self._bodies.whole(result_body, result_file)
        return rows.shown(row, body, result_body, map(rows.attempt, failures))

    def _page(
        self,
        function: FunctionId | None,
        state: State | None,
        limit: int,
        before: InvocationId | None,
    ) -> list[Shown]:
        tests, values = ["true"], list[object]()
        if function is not None:
            tests.append("function = ?")
            values.append(function)
        if state is not None:
            tests.append("(state = 0 OR state = 1)" if state is State.WAITING else "state = ?")
            values += [] if state is State.WAITING else [state]
        if before is not None:
            tests.append("row < (SELECT row FROM events WHERE id = ?)")
            values.append(before)
        found = self._read_from.execute(
            f"SELECT {rows.SHOWN} FROM events WHERE {' AND '.join(tests)}"
            " ORDER BY row DESC LIMIT ?",
            (*values, min(limit, PAGE_MAX)),
        )
        return [rows.shown(row) for row in found]

    def _counts(self) -> dict[tuple[FunctionId, State], int]:
        found = self._read_from.execute(
            "SELECT function, state, count(*) FROM events GROUP BY function, state"
        )
        return {(function, State(state)): number for function, state, number in found}

    def _known(self, function: FunctionId, asked: str) -> dict[str, InvocationId]:
        return dict(
            self._read_from.execute(
                "SELECT key, event FROM keys WHERE function = ?"
                " AND key IN (SELECT value FROM json_each(?))",
                (function, asked),
            )
        )

    def _oldest(self, functions: Sequence[FunctionId]) -> dict[FunctionId, float]:
        oldest = {}
        for function in functions:
            row = self._read_from.execute(
                "SELECT accepted_at FROM events WHERE state = 0 AND function = ?"
                " ORDER BY priority DESC, row LIMIT 1",
                (function,),
            ).fetchone()
            if row is not None:
                oldest[function] = row[0]
        return oldest


_INSERT: Final = {
    n: "INSERT INTO events (id, function, state, priority, accepted_at, age_s, expires_at, at,"
    f" checksum, meta, body, file) VALUES {tuples(n, '(?, ?, 0, ?, ?, ?, ?, 0, ?, ?, ?, ?)')}"
    for n in range(1, ROWS_MAX + 1)
}
_END: Final = {
    n: "WITH e (row, fence, state, at, counted, result, body, file) AS"
    f" (VALUES {tuples(n, '(?, ?, ?, ?, ?, ?, ?, ?)')})"
    " UPDATE events SET state = e.state, at = e.at, attempts = attempts + e.counted, owner = '',"
    " result = e.result, result_body = e.body, result_file = e.file,"
    " body = CASE e.state WHEN 3 THEN x'' ELSE events.body END"
    " FROM e WHERE events.row = e.row AND events.fence = e.fence AND events.state = 2"
    " RETURNING events.row, events.fence"
    for n in range(1, ROWS_MAX + 1)
}
