"""Durable events in PostgreSQL, for several servers at once: the extra `dayfly[postgres]`.

The rules are those of `sqlite_events`, and so are the tables, in a schema of their own. Who leases
passes over what another is about to lease (SKIP LOCKED); who accepts tells the others (NOTIFY).
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from msgspec import structs

from dayfly_pool.models import FunctionId, InvocationId
from dayfly_pool.store import rows
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
from dayfly_pool.store.postgres import Cursor, Postgres, text

CHANNEL: Final = "dayfly_events"
MIGRATIONS: Final = (
    # A script that was released is never edited: append one. `dayfly.version` counts those applied.
    """
    CREATE TABLE dayfly.events (
        row bigserial PRIMARY KEY,
        id text NOT NULL UNIQUE,
        function text NOT NULL,
        state smallint NOT NULL,
        priority integer NOT NULL,
        accepted_at double precision NOT NULL,
        age_s double precision NOT NULL,
        expires_at double precision NOT NULL,
        at double precision NOT NULL,
        fence integer NOT NULL DEFAULT 0,
        attempts integer NOT NULL DEFAULT 0,
        owner text NOT NULL DEFAULT '',
        checksum bigint NOT NULL,
        meta bytea NOT NULL,
        body bytea NOT NULL,
        file text NOT NULL,
        result bytea NOT NULL DEFAULT '',
        result_body bytea NOT NULL DEFAULT '',
        result_file text NOT NULL DEFAULT ''
    );
    CREATE INDEX waiting ON dayfly.events (function, priority DESC, row) WHERE state = 0;
    CREATE INDEX delayed ON dayfly.events (at) WHERE state = 1;
    CREATE INDEX running ON dayfly.events (owner) WHERE state = 2;
    CREATE INDEX succeeded ON dayfly.events (at) WHERE state = 3;
    CREATE INDEX dead ON dayfly.events (at) WHERE state = 4;
    CREATE INDEX dead_of ON dayfly.events (function, row) WHERE state = 4;
    CREATE INDEX cancelled ON dayfly.events (at) WHERE state = 5;
    CREATE INDEX files ON dayfly.events (file) WHERE file != '';
    CREATE INDEX result_files ON dayfly.events (result_file) WHERE result_file != '';
    CREATE TABLE dayfly.bodies (digest text PRIMARY KEY, body bytea NOT NULL);
    CREATE TABLE dayfly.attempts (
        event bigint NOT NULL,
        fence integer NOT NULL,
        started_at double precision NOT NULL,
        ended_at double precision NOT NULL,
        is_counted boolean NOT NULL,
        kind text NOT NULL,
        message text NOT NULL,
        PRIMARY KEY (event, fence)
    );
    CREATE TABLE dayfly.keys (
        function text NOT NULL,
        key text NOT NULL,
        fingerprint text NOT NULL,
        event text NOT NULL,
        until double precision NOT NULL,
        PRIMARY KEY (function, key)
    );
    CREATE INDEX old_keys ON dayfly.keys (until);
    CREATE TABLE dayfly.owners (id text PRIMARY KEY, beat bigint NOT NULL);
    """,
)
END: Final = """
    UPDATE dayfly.events SET state = e.state, at = e.at, attempts = attempts + e.counted,
        owner = '', result = e.result, result_body = e.body, result_file = e.file,
        body = CASE e.state WHEN 3 THEN ''::bytea ELSE events.body END
    FROM unnest(%s::bigint[], %s::int[], %s::smallint[], %s::float8[], %s::int[], %s::bytea[],
        %s::bytea[], %s::text[]) AS e (row, fence, state, at, counted, result, body, file)
    WHERE events.row = e.row AND events.fence = e.fence AND events.state = 2
    RETURNING events.row, events.fence
"""
INSERT: Final = """
    INSERT INTO dayfly.events (id, function, state, priority, accepted_at, age_s, expires_at, at,
        checksum, meta, body, file)
    SELECT id, function, 0, priority, accepted_at, age_s, accepted_at + age_s, 0, checksum, meta,
        body, file
    FROM unnest(%s::text[], %s::text[], %s::int[], %s::float8[], %s::float8[], %s::bigint[],
        %s::bytea[], %s::bytea[], %s::text[])
        WITH ORDINALITY AS e (id, function, priority, accepted_at, age_s, checksum, meta, body,
            file, place)
    ORDER BY place
"""
LEASE: Final = """
    WITH chosen AS (SELECT row FROM dayfly.events WHERE state = 0 AND function = %s
        ORDER BY priority DESC, row LIMIT %s FOR UPDATE SKIP LOCKED)
    UPDATE dayfly.events SET state = 2, fence = fence + 1, owner = %s FROM chosen
    WHERE events.row = chosen.row
    RETURNING events.row, fence, id, meta, body, file, attempts, accepted_at, expires_at, checksum,
        priority
"""
RIPEN: Final = """
    WITH chosen AS (SELECT row FROM dayfly.events WHERE state = 1 AND at <= %s
        ORDER BY at LIMIT %s FOR UPDATE SKIP LOCKED)
    UPDATE dayfly.events SET state = 0 FROM chosen WHERE events.row = chosen.row
    RETURNING function
"""
KEY: Final = """
    INSERT INTO dayfly.keys AS k VALUES (%s, %s, %s, %s, %s)
    ON CONFLICT (function, key) DO UPDATE SET event = excluded.event,
        fingerprint = excluded.fingerprint, until = excluded.until WHERE k.until <= %s
    RETURNING event
"""
KNOWN_AS: Final = """
    INSERT INTO dayfly.keys AS k VALUES (%s, %s, %s, %s, %s)
    ON CONFLICT (function, key) DO UPDATE SET event = excluded.event,
        fingerprint = excluded.fingerprint, until = greatest(k.until, excluded.until)
"""


class PostgresEvents:
    """See `Store`. *dsn* is what libpq takes; it is never logged."""

    def __init__(self, dsn: str) -> None:
        self._postgres = Postgres(dsn, MIGRATIONS, "version")
        self._owner = ""

    def __repr__(self) -> str:
        return f"<PostgresEvents {self._postgres}>"

    async def open(self, owner: str) -> None:
        """Connect, and bring the tables up to date."""
        self._owner = owner
        await self._postgres.open()
        try:
            async with self._postgres.transaction() as cursor:
                await cursor.execute(
                    "INSERT INTO dayfly.owners VALUES (%s, 0) ON CONFLICT DO NOTHING", (owner,)
                )
        except BaseException:
            await self._postgres.close()
            raise

    async def close(self) -> None:
        """After what is under way."""
        await self._postgres.close()

    async def write(
        self,
        now: float,
        ended: Sequence[Ended] = (),
        accepted: Sequence[Event] = (),
        wanted: Mapping[FunctionId, int] | None = None,
    ) -> Written:
        """All of it or nothing, in this order, and on the disk when it returns."""
        async with self._postgres.transaction() as cursor:
            late = await self._end(cursor, ended)
            then = [event for e in ended if (e.row, e.fence) not in late for event in e.then]
            await self._accept(cursor, then)
            found = await self._accept(cursor, accepted)
            await cursor.execute(RIPEN, (now, PAGE_MAX))
            due = Counter(function for (function,) in await cursor.fetchall())
            leased = [
                lease
                for function, number in (wanted or {}).items()
                for lease in await self._lease(cursor, function, number)
            ]
            await cursor.execute("SELECT min(at) FROM dayfly.events WHERE state = 1")
            (due_at,) = await cursor.fetchone() or (None,)
            due += Counter(event.function for event in then)
        return Written(found, late, leased, due, due_at)

    async def fetch(self, lease: Lease) -> Lease:
        """The same with its long body, if it has one."""
        if not lease.is_long:
            return lease
        async with self._postgres.reader() as cursor:
            await cursor.execute("SELECT checksum FROM dayfly.events WHERE row = %s", (lease.row,))
            (checksum,) = await cursor.fetchone() or (None,)
            whole = await _whole(cursor, lease.file)
        if whole is None:
            return structs.replace(lease, damage="its body is lost")
        if rows.checksum(lease.meta, whole) != checksum:
            return structs.replace(lease, damage=rows.DAMAGED)
        return structs.replace(lease, body=whole)

    async def cancel(self, id_: InvocationId, now: float) -> Shown | None:
        """End it, unless it has ended; as it was before."""
        async with self._postgres.transaction() as cursor:
            await cursor.execute("SELECT 1 FROM dayfly.events WHERE id = %s FOR UPDATE", (id_,))
            before = await self._get(cursor, id_)
            if before is not None and not before.state.is_over:
                await cursor.execute(
                    "UPDATE dayfly.events SET state = 5, at = %s, owner = '' WHERE id = %s",
                    (now, id_),
                )
        return before

    async def redrive(
        self, function: FunctionId, ids: Sequence[InvocationId] | None, now: float
    ) -> int:
        """Let dead events wait again."""
        statement = (
            "UPDATE dayfly.events SET state = 0, attempts = 0, expires_at = %s + age_s"
            " WHERE state = 4 AND function = %s"
        )
        async with self._postgres.transaction() as cursor:
            if ids is None:
                await cursor.execute(statement, (now, function))
            else:
                await cursor.execute(f"{statement} AND id = ANY(%s)", (now, function, list(ids)))
            return cursor.rowcount

    async def get(self, id_: InvocationId) -> Shown | None:
        """One event."""
        async with self._postgres.reader() as cursor:
            return await self._get(cursor, id_)

    async def page(
        self,
        function: FunctionId | None = None,
        state: State | None = None,
        limit: int = 100,
        before: InvocationId | None = None,
    ) -> list[Shown]:
        """The newest first; without bodies."""
        tests, values = ["true"], list[object]()
        if function is not None:
            tests.append("function = %s")
            values.append(function)
        if state is not None:
            states = [0, 1] if state is State.WAITING else [int(state)]
            tests.append("state = ANY(%s)")
            values.append(states)
        if before is not None:
            tests.append("row < (SELECT row FROM dayfly.events WHERE id = %s)")
            values.append(before)
        async with self._postgres.reader() as cursor:
            await cursor.execute(
                f"SELECT {rows.SHOWN} FROM dayfly.events WHERE {' AND '.join(tests)}"
                " ORDER BY row DESC LIMIT %s",
                (*values, min(limit, PAGE_MAX)),
            )
            found = await cursor.fetchall()
        return [rows.shown(row) for row in found]

    async def counts(self) -> dict[tuple[FunctionId, State], int]:
        """How many there are of each function in each state."""
        async with self._postgres.reader() as cursor:
            await cursor.execute(
                "SELECT function, state, count(*) FROM dayfly.events GROUP BY function, state"
            )
            return {(f, State(state)): number for f, state, number in await cursor.fetchall()}

    async def oldest(self, functions: Iterable[FunctionId]) -> dict[FunctionId, float]:
        """When the next waiting event of each was accepted, where one waits."""
        oldest = {}
        async with self._postgres.reader() as cursor:
            for function in list(functions):
                await cursor.execute(
                    "SELECT accepted_at FROM dayfly.events WHERE state = 0 AND function = %s"
                    " ORDER BY priority DESC, row LIMIT 1",
                    (function,),
                )
                if row := await cursor.fetchone():
                    oldest[function] = row[0]
        return oldest

    async def known(self, function: FunctionId, keys: Sequence[str]) -> dict[str, InvocationId]:
        """Which events the *keys* stand for."""
        async with self._postgres.reader() as cursor:
            await cursor.execute(
                "SELECT key, event FROM dayfly.keys WHERE function = %s AND key = ANY(%s)",
                (function, list(keys)),
            )
            return dict(await cursor.fetchall())

    async def sweep(self, now: float, over_s: float, dead_s: float) -> int:
        """Forget what is old."""
        gone: list[tuple[int, str, str]] = []
        async with self._postgres.transaction() as cursor:
            await cursor.execute("DELETE FROM dayfly.keys WHERE until <= %s", (now,))
            for state in (State.SUCCEEDED, State.DEAD, State.CANCELLED):
                kept_s = dead_s if state is State.DEAD else over_s
                await cursor.execute(
                    "DELETE FROM dayfly.events WHERE row IN (SELECT row FROM dayfly.events"
                    f" WHERE state = {state:d} AND at <= %s ORDER BY at LIMIT %s"
                    " FOR UPDATE SKIP LOCKED) RETURNING row, file, result_file",
                    (now - kept_s, PAGE_MAX - len(gone)),
                )
                gone += await cursor.fetchall()
            events = [row for row, *_ in gone]
            await cursor.execute("DELETE FROM dayfly.attempts WHERE event = ANY(%s)", (events,))
            files = list({file for _, *files in gone for file in files if file})
            await cursor.execute(
                "DELETE FROM dayfly.bodies b WHERE digest = ANY(%s)"
                " AND NOT EXISTS (SELECT FROM dayfly.events WHERE file = b.digest)"
                " AND NOT EXISTS (SELECT FROM dayfly.events WHERE result_file = b.digest)",
                (files,),
            )
        return len(gone)

    async def beat(self) -> dict[str, int]:
        """Say that our owner lives."""
        async with self._postgres.transaction() as cursor:
            await cursor.execute(
                "INSERT INTO dayfly.owners AS o VALUES (%s, 1)"
                " ON CONFLICT (id) DO UPDATE SET beat = o.beat + 1",
                (self._owner,),
            )
            await cursor.execute("SELECT id, beat FROM dayfly.owners")
            return dict(await cursor.fetchall())

    async def fence(self, owner: str) -> Counter[FunctionId]:
        """Take all leases from *owner*."""
        async with self._postgres.transaction() as cursor:
            await cursor.execute(
                "UPDATE dayfly.events SET state = 0, owner = '' WHERE state = 2 AND owner = %s"
                " RETURNING function",
                (owner,),
            )
            taken = Counter(function for (function,) in await cursor.fetchall())
            if owner != self._owner:
                await cursor.execute("DELETE FROM dayfly.owners WHERE id = %s", (owner,))
        return taken

    async def release(self, but: Collection[tuple[int, int]]) -> Counter[FunctionId]:
        """Give back our leases but *but*."""
        kept = [row for row, _ in but], [fence for _, fence in but]
        async with self._postgres.transaction() as cursor:
            await cursor.execute(
                "UPDATE dayfly.events SET state = 0, owner = '' WHERE state = 2 AND owner = %s"
                " AND (row, fence) NOT IN (SELECT * FROM unnest(%s::bigint[], %s::int[]))"
                " RETURNING function",
                (self._owner, *kept),
            )
            return Counter(function for (function,) in await cursor.fetchall())

    async def listen(self, told: Callable[[FunctionId], None]) -> None:
        """Call *told* for every function that has new events, whoever accepted them; for ever.

        Raises `StoreFailed` when the connection is lost.
        """
        await self._postgres.listen(CHANNEL, lambda function: told(FunctionId(function)))

    # ---- parts of a write ---------------------------------------------------------------------

    async def _end(self, cursor: Cursor, ended: Sequence[Ended]) -> set[tuple[int, int]]:
        if not ended:
            return set()
        apart = [await _apart(cursor, end.body) for end in ended]
        columns: list[list[Any]] = [
            [end.row for end in ended],
            [end.fence for end in ended],
            [int(end.state) for end in ended],
            [end.at for end in ended],
            [int(end.is_counted) for end in ended],
            [end.result for end in ended],
            [body for body, _ in apart],
            [file for _, file in apart],
        ]
        await cursor.execute(END, columns)
        taken = {(row, fence) for row, fence in await cursor.fetchall()}
        failures = [
            (
                e.row,
                a.fence,
                a.started_at,
                a.ended_at,
                a.is_counted,
                text(a.kind),
                text(a.message),
            )
            for e in ended
            if (a := e.attempt) is not None and (e.row, e.fence) in taken
        ]
        if failures:
            await cursor.executemany(
                "INSERT INTO dayfly.attempts VALUES (%s, %s, %s, %s, %s, %s, %s)", failures
            )
        return {(e.row, e.fence) for e in ended} - taken

    async def _accept(self, cursor: Cursor, accepted: Sequence[Event]) -> list[Accepted]:
        found = [
            await self._keyed(cursor, event) if event.key else Accepted(event.id)
            for event in accepted
        ]
        new = [event for event, a in zip(accepted, found, strict=True) if a.is_new]
        if not new:
            return found
        more = [(e.function, k.text, k.fingerprint, e.id, k.until) for e in new for k in e.known_as]
        if more:
            await cursor.executemany(KNOWN_AS, more)
        apart = [await _apart(cursor, event.body) for event in new]
        columns: list[list[Any]] = [
            [event.id for event in new],
            [event.function for event in new],
            [event.priority for event in new],
            [event.accepted_at for event in new],
            [event.age_s for event in new],
            [rows.checksum(event.meta, event.body) for event in new],
            [event.meta for event in new],
            [body for body, _ in apart],
            [file for _, file in apart],
        ]
        await cursor.execute(INSERT, columns)
        for function in {event.function for event in new}:
            await cursor.execute("SELECT pg_notify(%s, %s)", (CHANNEL, function))
        return found

    async def _keyed(self, cursor: Cursor, event: Event) -> Accepted:
        """Which event its key stands for: this one, unless there is one that is not too old."""
        key = event.key
        assert key is not None
        row = (event.function, key.text, key.fingerprint, event.id, key.until, event.accepted_at)
        await cursor.execute(KEY, row)
        if await cursor.fetchone():
            return Accepted(event.id)
        await cursor.execute(
            "SELECT event, fingerprint FROM dayfly.keys WHERE function = %s AND key = %s", row[:2]
        )
        id_, fingerprint = await cursor.fetchone() or ("", "")
        return Accepted(InvocationId(id_), is_new=False, is_other=fingerprint != key.fingerprint)

    async def _lease(self, cursor: Cursor, function: FunctionId, most: int) -> list[Lease]:
        await cursor.execute(LEASE, (function, most, self._owner))
        return rows.leased(function, await cursor.fetchall())

    async def _get(self, cursor: Cursor, id_: InvocationId) -> Shown | None:
        await cursor.execute(f"SELECT {rows.SHOWN} FROM dayfly.events WHERE id = %s", (id_,))
        row = await cursor.fetchone()
        if row is None:
            return None
        body = await _whole(cursor, row[11]) if row[11] else row[10]
        if body is None or rows.checksum(row[9], body) != row[16]:
            body = b""
        result_body = await _whole(cursor, row[14]) if row[14] else row[13]
        await cursor.execute(
            f"SELECT {rows.ATTEMPT} FROM dayfly.attempts WHERE event = %s ORDER BY fence",
            (row[15],),
        )
        return rows.shown(row, body, result_body or b"", map(rows.attempt, await cursor.fetchall()))


async def _apart(cursor: Cursor, body: bytes) -> tuple[bytes, str]:
    """(what goes into the row, the digest of the body that is kept apart)."""
    if len(body) <= ROW_BYTES_MAX:
        return body, ""
    digest = hashlib.sha256(body).hexdigest()
    await cursor.execute(
        "INSERT INTO dayfly.bodies VALUES (%s, %s)"
        " ON CONFLICT (digest) DO UPDATE SET body = excluded.body",
        (digest, body),
    )
    return b"", digest


async def _whole(cursor: Cursor, digest: str) -> bytes | None:
    await cursor.execute("SELECT body FROM dayfly.bodies WHERE digest = %s", (digest,))
    row = await cursor.fetchone()
    return None if row is None else bytes(row[0])
