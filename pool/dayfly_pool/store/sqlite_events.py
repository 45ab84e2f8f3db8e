"""Durable events in one SQLite file, and long bodies in files beside it.

One thread writes, with a transaction for whatever came together; another reads. Every statement
stands for a whole batch: the interpreter's lock is given up and taken back once for each, and on a
busy event loop taking it back may last longer than the statement.
"""

import asyncio
import contextlib
import json
import logging
import sqlite3
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from msgspec import structs

from dayfly_pool.errors import DataFolderUnusable, StoreFailed
from dayfly_pool.models import FunctionId, InvocationId
from dayfly_pool.store import rows
from dayfly_pool.store.bodies import Bodies
from dayfly_pool.store.database import connect
from dayfly_pool.store.events import (
    PAGE_MAX,
    Accepted,
    Ended,
    Event,
    Lease,
    Shown,
    State,
    Written,
)

log = logging.getLogger("dayfly.events")
T = TypeVar("T")
ROWS_MAX: Final = 64
"""Of one statement."""

CHECKPOINT_S: Final = 0.25
DEFECT_S: Final = 5.0
"""Before the next checkpoint after one that failed for a defect of ours, with a traceback."""

PAGE_BYTES: Final = 4096
CHECKPOINT_PAGES: Final = 16384
"""Where the log is as long as this, the one who writes waits for it to be moved into the file."""

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
        self._path, self._bodies = path, Bodies(bodies)
        self._owner = ""
        self._writer: ThreadPoolExecutor | None = None
        self._reader: ThreadPoolExecutor | None = None
        self._mover: ThreadPoolExecutor | None = None
        self._moving: asyncio.Task[None] | None = None
        self._write_connection: sqlite3.Connection | None = None
        self._read_connection: sqlite3.Connection | None = None
        self._move_connection: sqlite3.Connection | None = None
        self._next_due: float | None = None
        self._is_doubtful = False
        """Something may look written, and not be on the disk."""

    def __repr__(self) -> str:
        return f"<SqliteEvents {self._path} {'open' if self._writer else 'closed'}>"

    async def open(self, owner: str) -> None:
        """Open or create the file and check that it is sound."""
        assert self._writer is None, "already open"
        self._owner = owner
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="events-write")
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="events-read")
        self._mover = ThreadPoolExecutor(max_workers=1, thread_name_prefix="events-move")
        try:
            await self._call(self._writer, self._open)
            await self._call(self._writer, self._clear_up)
            self._moving = asyncio.create_task(self._keep_moving(), name="events-move")
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close the file, after what is under way."""
        loop = asyncio.get_running_loop()
        if self._moving is not None:
            self._moving.cancel()
            await asyncio.wait({self._moving})
            self._moving = None
        for thread, close in (
            (self._mover, self._close_mover),
            (self._reader, self._close_reader),
            (self._writer, self._close),
        ):
            if thread is not None:
                closing = loop.run_in_executor(thread, close)
                thread.shutdown(wait=False)
                await asyncio.shield(closing)
        self._writer = self._reader = self._mover = None

    async def write(
        self,
        now: float,
        ended: Sequence[Ended] = (),
        accepted: Sequence[Event] = (),
        wanted: Mapping[FunctionId, int] | None = None,
    ) -> Written:
        """All of it or nothing, in this order, and on the disk when it returns."""
        wanted = dict(wanted or {})
        return await self._write(lambda: self._do_write(now, ended, accepted, wanted))

    async def fetch(self, lease: Lease) -> Lease:
        """The same with its long body."""
        return await self._read(lambda: self._fetch(lease)) if lease.is_long else lease

    async def cancel(self, id_: InvocationId, now: float) -> Shown | None:
        """End it, unless it has ended; as it was before."""
        return await self._write(lambda: self._cancel(id_, now))

    async def redrive(
        self, function: FunctionId, ids: Sequence[InvocationId] | None, now: float
    ) -> int:
        """Let dead events wait again."""
        return await self._write(lambda: self._redrive(function, ids, now))

    async def get(self, id_: InvocationId) -> Shown | None:
        """One event."""
        return await self._read(lambda: self._get(self._read_from, id_))

    async def page(
        self,
        function: FunctionId | None = None,
        state: State | None = None,
        limit: int = 100,
        before: InvocationId | None = None,
    ) -> list[Shown]:
        """The newest first; without bodies."""
        return await self._read(lambda: self._page(function, state, limit, before))

    async def counts(self) -> dict[tuple[FunctionId, State], int]:
        """How many there are of each function in each state."""
        return await self._read(self._counts)

    async def oldest(self, functions: Iterable[FunctionId]) -> dict[FunctionId, float]:
        """When the next waiting event of each was accepted, where one waits."""
        asked = list(functions)
        return await self._read(lambda: self._oldest(asked))

    async def known(self, function: FunctionId, keys: Sequence[str]) -> dict[str, InvocationId]:
        """Which events the *keys* stand for."""
        asked = json.dumps(list(keys))
        return await self._read(lambda: self._known(function, asked))

    async def sweep(self, now: float, over_s: float, dead_s: float) -> int:
        """Forget what is old."""
        return await self._write(lambda: self._sweep(now, over_s, dead_s))

    async def beat(self) -> dict[str, int]:
        """Say that our owner lives."""
        return await self._write(self._beat)

    async def release(self, but: Collection[tuple[int, int]]) -> Counter[FunctionId]:
        """Give back our leases but *but*."""
        kept = json.dumps(list(but))
        return await self._write(lambda: self._release(kept))

    async def listen(self, told: Callable[[FunctionId], None]) -> None:
        """Nobody else writes to the file, and who does knows."""
        await asyncio.get_running_loop().create_future()

    async def fence(self, owner: str) -> Counter[FunctionId]:
        """Take all leases from *owner*."""
        return await self._write(lambda: self._fence(owner))

    # ---- threads ------------------------------------------------------------------------------

    async def _call(self, thread: ThreadPoolExecutor | None, work: Callable[[], T]) -> T:
        if thread is None:
            raise StoreFailed("it is closed")
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, work)
        except (sqlite3.Error, OSError) as error:
            raise StoreFailed(f"{self._path}: {error}") from error
        except DataFolderUnusable as error:
            raise StoreFailed(error.detail) from error

    async def _write(self, work: Callable[[], T]) -> T:
        return await self._call(self._writer, lambda: self._transaction(work))

    async def _read(self, work: Callable[[], T]) -> T:
        return await self._call(self._reader, work)

    async def _keep_moving(self) -> None:
        """Move the log into the file, beside those who write: it takes up to 0.1 s."""
        while True:
            await asyncio.sleep(CHECKPOINT_S)
            try:
                await self._call(self._mover, self._move)
            except StoreFailed:
                pass  # whoever writes will see it
            except Exception:
                log.exception("the log of events is not moved into the file, for a defect of ours")
                await asyncio.sleep(DEFECT_S)

    def _move(self) -> None:
        if self._move_connection is None:
            self._move_connection = sqlite3.connect(
                self._path, check_same_thread=False, isolation_level=None
            )
        self._move_connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def _close_mover(self) -> None:
        if self._move_connection is not None:
            self._move_connection.close()
            self._move_connection = None

    # Below: on the writer's thread.

    def _open(self) -> None:
        self._bodies.open()
        connection = connect(self._path, MIGRATIONS, is_sound=self._is_doubtful)
        try:
            if self._is_doubtful:
                _settle(connection)
            connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
            connection.execute(f"PRAGMA journal_size_limit = {CHECKPOINT_PAGES * PAGE_BYTES}")
            connection.execute(
                "INSERT INTO owners VALUES (?, 0) ON CONFLICT DO NOTHING", (self._owner,)
            )
            (self._next_due,) = connection.execute(
                "SELECT min(at) FROM events WHERE state = 1"
            ).fetchone()
        except BaseException:
            connection.close()
            raise
        self._write_connection, self._is_doubtful = connection, False

    def _clear_up(self) -> None:
        """Remove the files of events that a crash kept from being accepted."""
        for digest in self._bodies.found():
            self._drop(digest)

    def _close(self) -> None:
        if self._write_connection is not None:
            self._write_connection.close()
            self._write_connection = None

    def _transaction(self, work: Callable[[], T]) -> T:
        """*work* in one transaction, on the disk when this returns.

        After a failure the connection is opened anew, and the log is moved into the file before
        anything else is written.
        """
        if self._write_connection is None:
            self._open()
        connection = self._into
        try:
            connection.execute("BEGIN IMMEDIATE")
            result = work()
            connection.execute("COMMIT")
            return result
        except BaseException:
            self._write_connection, self._is_doubtful = None, True
            with contextlib.suppress(sqlite3.Error):
                connection.close()  # rolls back
            raise

    @property
    def _into(self) -> sqlite3.Connection:
        assert self._write_connection is not None
        return self._write_connection

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
        for some in _chunks(ended):
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
        for some in _chunks(new):
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
        if self._read_connection is None:
            self._read_connection = sqlite3.connect(
                f"file:{self._path}?mode=ro", uri=True, check_same_thread=False
            )
        return self._read_connection

    def _close_reader(self) -> None:
        if self._read_connection is not None:
            self._read_connection.close()
            self._read_connection = None

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


def _settle(connection: sqlite3.Connection) -> None:
    """Have what is in the log written into the file.

    What the system could not write once it may take for written from then on; and what comes
    after it in the log would be lost with it.
    """
    (is_busy, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if is_busy:
        raise sqlite3.OperationalError("the log cannot be moved into the file")


def _chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for at in range(0, len(items), ROWS_MAX):
        yield items[at : at + ROWS_MAX]


def _values(number: int, columns: str) -> str:
    return ", ".join([columns] * number)


_INSERT: Final = {
    n: "INSERT INTO events (id, function, state, priority, accepted_at, age_s, expires_at, at,"
    f" checksum, meta, body, file) VALUES {_values(n, '(?, ?, 0, ?, ?, ?, ?, 0, ?, ?, ?, ?)')}"
    for n in range(1, ROWS_MAX + 1)
}
_END: Final = {
    n: "WITH e (row, fence, state, at, counted, result, body, file) AS"
    f" (VALUES {_values(n, '(?, ?, ?, ?, ?, ?, ?, ?)')})"
    " UPDATE events SET state = e.state, at = e.at, attempts = attempts + e.counted, owner = '',"
    " result = e.result, result_body = e.body, result_file = e.file,"
    " body = CASE e.state WHEN 3 THEN x'' ELSE events.body END"
    " FROM e WHERE events.row = e.row AND events.fence = e.fence AND events.state = 2"
    " RETURNING events.row, events.fence"
    for n in range(1, ROWS_MAX + 1)
}
