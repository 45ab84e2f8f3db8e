"""Journals in PostgreSQL, for several servers at once: the extra `dayfly[postgres]`.

The rules and the tables are those of `sqlite_journals`; bodies of any length are in their rows,
where PostgreSQL itself puts long ones apart. Who sets a journal free or wishes something tells
those whom it may concern (NOTIFY, with the owner's name, or none).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

from msgspec import structs

from dayfly_pool.errors import NameTaken, TooManyWishes
from dayfly_pool.store import journal_rows, rows
from dayfly_pool.store.journals import (
    CLAIMS_MAX,
    PAGE_BYTES_MAX,
    PAGE_MAX,
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
from dayfly_pool.store.postgres import Cursor, Postgres

CHANNEL: Final = "dayfly_journals"
MIGRATIONS: Final = (
    # A script that was released is never edited: append one. `journals_version` counts those
    # applied.
    """
    CREATE TABLE dayfly.journals (
        row bigserial PRIMARY KEY,
        id text COLLATE "C" NOT NULL UNIQUE,
        kind text NOT NULL,
        namespace text NOT NULL,
        name text NOT NULL,
        created_at double precision NOT NULL,
        ended_at double precision NOT NULL DEFAULT 0,
        is_draft boolean NOT NULL,
        owner text NOT NULL,
        fence bigint NOT NULL,
        last bigint NOT NULL,
        head bytea NOT NULL,
        head_checksum bigint NOT NULL,
        spec bytea NOT NULL,
        checksum bigint NOT NULL,
        UNIQUE (kind, namespace, name)
    ) WITH (fillfactor = 70); -- a row is written anew with every append, if it can be beside itself
    CREATE INDEX journals_free ON dayfly.journals (kind, id)
        WHERE owner = '' AND ended_at = 0 AND NOT is_draft;
    CREATE INDEX journals_owned ON dayfly.journals (owner) WHERE owner != '';
    CREATE INDEX journals_over ON dayfly.journals (ended_at) WHERE ended_at > 0;
    CREATE INDEX journals_drafts ON dayfly.journals (created_at) WHERE is_draft;
    CREATE INDEX journals_shown ON dayfly.journals (kind, id);
    CREATE INDEX journals_shown_of ON dayfly.journals (kind, namespace, id);
    CREATE INDEX journals_shown_open ON dayfly.journals (kind, id) WHERE ended_at = 0;
    CREATE TABLE dayfly.journal_entries (
        journal bigint NOT NULL,
        number bigint NOT NULL,
        part bigint NOT NULL,
        low bigint NOT NULL,
        high bigint NOT NULL,
        checksum bigint NOT NULL,
        body bytea NOT NULL,
        PRIMARY KEY (journal, number)
    );
    CREATE INDEX journal_parts ON dayfly.journal_entries (journal, part, number, low, high)
        WHERE part != 0;
    CREATE TABLE dayfly.journal_wishes (
        number bigserial PRIMARY KEY,
        journal bigint NOT NULL,
        body bytea NOT NULL
    );
    CREATE INDEX journal_wished ON dayfly.journal_wishes (journal, number);
    CREATE TABLE dayfly.journals_gone (journal bigint PRIMARY KEY);
    CREATE TABLE dayfly.journal_owners (id text PRIMARY KEY, beat bigint NOT NULL);
    """,
)
CREATE: Final = """
    INSERT INTO dayfly.journals (id, kind, namespace, name, created_at, is_draft, owner, fence,
        last, head, head_checksum, spec, checksum)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
    ON CONFLICT DO NOTHING RETURNING row
"""
# %b: bodies go as they are; as text they would be twice as long
APPEND: Final = """
    WITH written AS (
        UPDATE dayfly.journals AS j SET last = greatest(j.last, a.last),
            head = coalesce(a.head, j.head),
            head_checksum = coalesce(a.head_checksum, j.head_checksum),
            ended_at = coalesce(a.ended_at, j.ended_at),
            owner = CASE WHEN a.ended_at IS NULL THEN owner ELSE '' END
        FROM unnest(%s::text[], %s::bigint[], %s::bigint[], %s::bigint[], %b::bytea[],
            %s::bigint[], %s::float8[])
            AS a (id, fence, after, last, head, head_checksum, ended_at)
        WHERE j.id = a.id AND j.fence = a.fence AND j.last >= a.after
        RETURNING j.id, j.row
    ), added AS (
        INSERT INTO dayfly.journal_entries
        SELECT row, number, part, low, high, checksum, body
        FROM unnest(%s::text[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[],
            %s::bigint[], %b::bytea[])
            AS e (id, number, part, low, high, checksum, body) JOIN written USING (id)
        ON CONFLICT (journal, number) DO NOTHING
    )
    SELECT id, row FROM written
"""
CLAIM: Final = f"""
    WITH chosen AS (SELECT row AS chosen FROM dayfly.journals
        WHERE owner = '' AND ended_at = 0 AND NOT is_draft AND kind = %s
        ORDER BY id LIMIT %s FOR UPDATE SKIP LOCKED)
    UPDATE dayfly.journals SET owner = %s, fence = fence + 1 FROM chosen WHERE row = chosen
    RETURNING {journal_rows.JOURNAL}, spec, checksum
"""
FREE: Final = """
    UPDATE dayfly.journals SET owner = '', fence = fence + 1
    WHERE owner = %s AND owner != '' AND NOT is_draft
"""
ENTRIES: Final = """
    SELECT number, part, low, high, body, checksum FROM (
        SELECT *, sum(length(body)) OVER up AS total, row_number() OVER up AS place FROM (
            SELECT number, part, low, high, body, checksum FROM dayfly.journal_entries
            WHERE journal = (SELECT row FROM dayfly.journals WHERE id = %s) AND {}
            ORDER BY number LIMIT %s
        ) AS page WINDOW up AS (ORDER BY number)
    ) AS summed WHERE place = 1 OR total <= %s ORDER BY number
"""


class PostgresJournals:
    """See `Store`. *dsn* is what libpq takes; it is never logged."""

    def __init__(self, dsn: str) -> None:
        self._postgres = Postgres(dsn, MIGRATIONS, "journals_version")
        self._owner = ""

    def __repr__(self) -> str:
        return f"<PostgresJournals {self._postgres}>"

    async def open(self, owner: str) -> None:
        """Connect, and bring the tables up to date."""
        self._owner = owner
        await self._postgres.open()
        try:
            async with self._postgres.transaction() as cursor:
                await self._be_known(cursor)
        except BaseException:
            await self._postgres.close()
            raise

    async def close(self) -> None:
        """After what is under way."""
        await self._postgres.close()

    async def create(
        self, journal: Journal, entries: Sequence[NewEntry] = (), *, is_ours: bool = False
    ) -> Journal:
        """Keep a new journal with its first entries."""
        is_ours = is_ours or journal.is_draft
        owner = self._owner if is_ours else ""
        made = structs.replace(
            journal, ended_at=0.0, owner=owner, fence=int(is_ours), last=len(entries), damage=""
        )
        values: list[object] = [made.id, made.kind, made.namespace, made.name, made.created_at]
        values += (made.is_draft, made.owner, made.fence, made.last, made.head)
        values += (journal_rows.head_checksum(made.head), made.spec, rows.checksum(b"", made.spec))
        async with self._postgres.transaction() as cursor:
            if is_ours:
                await self._be_known(cursor)
            await cursor.execute(CREATE, values)
            if await cursor.fetchone() is None:
                known = await _get(cursor, "id = %s", made.id)
            else:
                given = Append(id=made.id, fence=made.fence, after=0, entries=tuple(entries))
                if entries:
                    await cursor.execute(APPEND, _columns([given]))
                if not is_ours:
                    await _tell(cursor, "")
                known = made
        if known is None:
            raise NameTaken(f"{made.kind} {made.namespace}/{made.name}")
        return known

    async def publish(self, id_: JournalId, *, is_ours: bool = False) -> Journal | None:
        """Let a draft be free, or *is_ours*."""
        async with self._postgres.transaction() as cursor:
            if is_ours:
                await self._be_known(cursor)
            await cursor.execute(
                "UPDATE dayfly.journals SET is_draft = false, owner = %s, fence = fence + 1"
                " WHERE id = %s AND is_draft",
                (self._owner if is_ours else "", id_),
            )
            if cursor.rowcount and not is_ours:
                await _tell(cursor, "")
            return await _get(cursor, "id = %s", id_)

    async def take(self, id_: JournalId) -> Journal | None:
        """Have the right to append to a draft."""
        async with self._postgres.transaction() as cursor:
            await cursor.execute(
                "UPDATE dayfly.journals SET owner = %s, fence = fence + 1"
                " WHERE id = %s AND is_draft",
                (self._owner, id_),
            )
            return await _get(cursor, "id = %s", id_) if cursor.rowcount else None

    async def append(self, appends: Sequence[Append]) -> set[JournalId]:
        """All of them; returns those that came too late."""
        assert len({append.id for append in appends}) == len(appends), "a journal twice"
        if not any(a.replaces or a.heard or a.ended_at is not None for a in appends):
            found = dict(await self._postgres.write(APPEND, _columns(appends)))
        else:
            async with self._postgres.transaction() as cursor:
                await cursor.execute(APPEND, _columns(appends))
                found = dict(await cursor.fetchall())
                await _clear(cursor, found, [a for a in appends if a.id in found])
        return {append.id for append in appends} - found.keys()

    async def claim(self, kind: Kind, most: int) -> list[Journal]:
        """Have free journals, the oldest first."""
        async with self._postgres.transaction() as cursor:
            await self._be_known(cursor)
            await cursor.execute(CLAIM, (kind, min(most, CLAIMS_MAX), self._owner))
            return [_journal(row) for row in sorted(await cursor.fetchall())]

    async def release(self, but: Collection[tuple[JournalId, int]] = ()) -> int:
        """Let all of ours be free but *but*."""
        kept = [id_ for id_, _ in but], [fence for _, fence in but]
        async with self._postgres.transaction() as cursor:
            await cursor.execute(
                f"{FREE} AND (id, fence) NOT IN (SELECT * FROM unnest(%s::text[], %s::bigint[]))",
                (self._owner, *kept),
            )
            if number := cursor.rowcount:
                await _tell(cursor, "")
        return number

    async def beat(self) -> dict[str, int]:
        """Say that our owner lives."""
        async with self._postgres.transaction() as cursor:
            await cursor.execute(
                "INSERT INTO dayfly.journal_owners AS o VALUES (%s, 1)"
                " ON CONFLICT (id) DO UPDATE SET beat = o.beat + 1",
                (self._owner,),
            )
            await cursor.execute("SELECT id, beat FROM dayfly.journal_owners")
            return dict(await cursor.fetchall())

    async def fence(self, owner: str) -> int:
        """Let all journals of *owner* be free."""
        async with self._postgres.transaction() as cursor:
            await cursor.execute(FREE, (owner,))
            if number := cursor.rowcount:
                await _tell(cursor, "")
            if owner != self._owner:
                await cursor.execute("DELETE FROM dayfly.journal_owners WHERE id = %s", (owner,))
        return number

    async def wish(self, id_: JournalId, body: bytes) -> int:
        """Want something of the owner."""
        async with self._postgres.transaction() as cursor:
            # locked: or a later number might be there, and heard, before this one
            await cursor.execute(
                "SELECT row, owner FROM dayfly.journals"
                " WHERE id = %s AND ended_at = 0 AND NOT is_draft FOR UPDATE",
                (id_,),
            )
            if (found := await cursor.fetchone()) is None:
                return 0
            await cursor.execute(
                "INSERT INTO dayfly.journal_wishes (journal, body) SELECT %s, %s WHERE"
                " (SELECT count(*) FROM dayfly.journal_wishes WHERE journal = %s) < %s"
                " RETURNING number",
                (found[0], body, found[0], WISHES_MAX),
            )
            if (wished := await cursor.fetchone()) is not None:
                await _tell(cursor, found[1])
        if wished is None:
            raise TooManyWishes(f"{WISHES_MAX} of {id_} wait already")
        return int(wished[0])

    async def wishes(self) -> dict[JournalId, list[Wish]]:
        """What is wanted of us and was not heard."""
        async with self._postgres.reader() as cursor:
            await cursor.execute(
                "SELECT j.id, w.number, w.body FROM dayfly.journal_wishes AS w"
                " JOIN dayfly.journals AS j ON j.row = w.journal WHERE owner = %s ORDER BY number",
                (self._owner,),
            )
            found = await cursor.fetchall()
        wishes: dict[JournalId, list[Wish]] = {}
        for id_, number, body in found:
            wishes.setdefault(id_, []).append(Wish(number, body))
        return wishes

    async def get(self, id_: JournalId) -> Journal | None:
        """One journal."""
        async with self._postgres.reader() as cursor:
            return await _get(cursor, "id = %s", id_)

    async def find(self, kind: Kind, namespace: str, name: str) -> Journal | None:
        """The one of that name."""
        test = "kind = %s AND namespace = %s AND name = %s"
        async with self._postgres.reader() as cursor:
            return await _get(cursor, test, kind, namespace, name)

    async def page(
        self,
        kind: Kind,
        namespace: str | None = None,
        limit: int = 100,
        before: JournalId | None = None,
        is_over: bool | None = None,
    ) -> list[Journal]:
        """The newest first, without specs."""
        tests, values = ["kind = %s", "NOT is_draft"], list[object]([kind])
        if namespace is not None:
            tests.append("namespace = %s")
            values.append(namespace)
        if before is not None:
            tests.append("id < %s")
            values.append(before)
        if is_over is not None:
            tests.append("ended_at > 0" if is_over else "ended_at = 0")
        async with self._postgres.reader() as cursor:
            await cursor.execute(
                f"SELECT {journal_rows.JOURNAL} FROM dayfly.journals WHERE {' AND '.join(tests)}"
                " ORDER BY id DESC LIMIT %s",
                (*values, min(limit, PAGE_MAX)),
            )
            return [journal_rows.journal(row) for row in await cursor.fetchall()]

    async def entries(
        self,
        id_: JournalId,
        part: int | None = None,
        after: int = 0,
        limit: int = PAGE_MAX,
        covering: int | None = None,
    ) -> list[Entry]:
        """In the order of their numbers."""
        tests, values = ["number > %s"], list[object]([after])
        if part is not None:
            tests.append("part = %s AND part != 0" if part else "part = %s")
            values.append(part)
        if covering is not None:
            tests.append("low <= %s AND high >= %s")
            values += (covering, covering)
        statement = ENTRIES.format(" AND ".join(tests)).encode()
        async with self._postgres.reader() as cursor:
            await cursor.execute(statement, (id_, *values, min(limit, PAGE_MAX), PAGE_BYTES_MAX))
            return [_entry(row) for row in await cursor.fetchall()]

    async def size(self, id_: JournalId) -> Size:
        """Looks at every entry."""
        async with self._postgres.reader() as cursor:
            await cursor.execute(
                "SELECT count(*), coalesce(sum(length(body)), 0) FROM dayfly.journal_entries"
                " WHERE journal = (SELECT row FROM dayfly.journals WHERE id = %s)",
                (id_,),
            )
            number, body_bytes = await cursor.fetchone() or (0, 0)
        return Size(number, int(body_bytes))

    async def delete(self, id_: JournalId) -> bool:
        """Forget one that is over or a draft."""
        async with self._postgres.transaction() as cursor:
            return bool(await _forget(cursor, "id = %s AND (ended_at > 0 OR is_draft)", id_))

    async def sweep(self, now: float, over_s: float, draft_s: float) -> int:
        """Forget what is old, and some of what has been deleted."""
        old = (
            "row IN (SELECT row FROM dayfly.journals WHERE {} ORDER BY {} LIMIT %s"
            " FOR UPDATE SKIP LOCKED)"
        )
        over_test = old.format("ended_at > 0 AND ended_at <= %s", "ended_at")
        draft_test = old.format("is_draft AND created_at <= %s", "created_at")
        async with self._postgres.transaction() as cursor:
            number = await _forget(cursor, over_test, now - over_s, SWEEP_ENTRIES)
            number += await _forget(cursor, draft_test, now - draft_s, SWEEP_ENTRIES)
            await cursor.execute(
                "SELECT journal FROM dayfly.journals_gone LIMIT %s FOR UPDATE SKIP LOCKED",
                (SWEEP_ENTRIES,),
            )
            left, gone = SWEEP_ENTRIES, await cursor.fetchall()
            for (journal,) in gone:
                await cursor.execute(
                    "DELETE FROM dayfly.journal_entries WHERE journal = %s AND number IN (SELECT"
                    " number FROM dayfly.journal_entries WHERE journal = %s LIMIT %s)",
                    (journal, journal, left),
                )
                number, left = number + cursor.rowcount, left - cursor.rowcount
                if left <= 0:
                    break
                await cursor.execute(
                    "DELETE FROM dayfly.journals_gone WHERE journal = %s", (journal,)
                )
        return number + bool(gone)

    async def listen(self, told: Callable[[], None]) -> None:
        """Call *told* when something is free, or there is a wish for us; for ever."""
        ours = ("", self._owner)
        await self._postgres.listen(CHANNEL, lambda owner: told() if owner in ours else None)

    async def _be_known(self, cursor: Cursor) -> None:
        """Whoever has something is among those that are missed when they say nothing."""
        await cursor.execute(
            "INSERT INTO dayfly.journal_owners VALUES (%s, 0) ON CONFLICT DO NOTHING",
            (self._owner,),
        )


async def _tell(cursor: Cursor, owner: str) -> None:
    await cursor.execute("SELECT pg_notify(%s, %s)", (CHANNEL, owner))


async def _clear(cursor: Cursor, found: Mapping[JournalId, int], written: list[Append]) -> None:
    """Remove what was replaced, and the wishes that were heard."""
    if replaced := [(found[a.id], number) for a in written for number in a.replaces]:
        await cursor.execute(
            "DELETE FROM dayfly.journal_entries WHERE (journal, number) IN"
            " (SELECT * FROM unnest(%s::bigint[], %s::bigint[]))",
            [list(column) for column in zip(*replaced, strict=True)],
        )
    if heard := [
        (found[a.id], a.heard, a.ended_at is not None)
        for a in written
        if a.heard or a.ended_at is not None
    ]:
        await cursor.execute(
            "DELETE FROM dayfly.journal_wishes AS w"
            " USING unnest(%s::bigint[], %s::bigint[], %s::bool[])"
            " AS h (journal, heard, is_over)"
            " WHERE w.journal = h.journal AND (w.number <= h.heard OR h.is_over)",
            [list(column) for column in zip(*heard, strict=True)],
        )


async def _forget(cursor: Cursor, test: str, *values: object) -> int:
    """Those of which *test* is true; their entries are there until they are swept."""
    await cursor.execute(f"DELETE FROM dayfly.journals WHERE {test} RETURNING row", values)
    gone = [row for (row,) in await cursor.fetchall()]
    if gone:
        await cursor.execute(
            "INSERT INTO dayfly.journals_gone SELECT * FROM unnest(%s::bigint[])", (gone,)
        )
        await cursor.execute("DELETE FROM dayfly.journal_wishes WHERE journal = ANY(%s)", (gone,))
    return len(gone)


async def _get(cursor: Cursor, test: str, *values: object) -> Journal | None:
    columns = f"{journal_rows.JOURNAL}, spec, checksum"
    await cursor.execute(f"SELECT {columns} FROM dayfly.journals WHERE {test}", values)
    row = await cursor.fetchone()
    return None if row is None else _journal(row)


def _journal(row: Sequence[Any]) -> Journal:
    spec, checksum = row[12:]
    if rows.checksum(b"", spec) != checksum:
        return journal_rows.journal(row, damage=f"its spec: {rows.DAMAGED}")
    return journal_rows.journal(row, spec)


def _entry(row: Sequence[Any]) -> Entry:
    number, part, low, high, body, checksum = row
    if rows.checksum(journal_rows.place_of(number, part, low, high), body) != checksum:
        return Entry(number, part, low, high, b"", rows.DAMAGED)
    return Entry(number, part, low, high, body)


def _columns(appends: Sequence[Append]) -> list[list[Any]]:
    """What `APPEND` takes: of the journals, then of their entries."""
    entries = [(a.id, n, e) for a in appends for n, e in enumerate(a.entries, a.after + 1)]
    return [
        [a.id for a in appends],
        [a.fence for a in appends],
        [a.after for a in appends],
        [a.last for a in appends],
        [a.head for a in appends],
        [None if a.head is None else journal_rows.head_checksum(a.head) for a in appends],
        [a.ended_at for a in appends],
        [id_ for id_, _, _ in entries],
        [number for _, number, _ in entries],
        [e.part for _, _, e in entries],
        [e.low for _, _, e in entries],
        [e.high for _, _, e in entries],
        [rows.checksum(journal_rows.place(n, e), e.body) for _, n, e in entries],
        [e.body for _, _, e in entries],
    ]
