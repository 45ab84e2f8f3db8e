"""Declarations in PostgreSQL, for several servers at once: the extra `dayfly[postgres]`.

A name keeps its row when it is deleted, with the number of its last version and of its last
change. Changes are counted by whoever holds the one row of `declared`, so that they become visible
in the order of their numbers: who asks for those after N misses nothing.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import msgspec

from dayfly_pool.errors import StoreFailed
from dayfly_pool.models import (
    Environment,
    EnvironmentSpec,
    FunctionId,
    FunctionSpec,
    InvocationId,
    TriggerSpec,
    function_id,
)
from dayfly_pool.store.declarations import (
    CHANGES_MAX,
    Change,
    Changes,
    Kind,
    StoredEnvironment,
    StoredFunction,
    StoredTrigger,
)
from dayfly_pool.store.postgres import Cursor, Postgres

log = logging.getLogger("dayfly.store")
T = TypeVar("T")
CHANNEL: Final = "dayfly_declarations"
MIGRATIONS: Final = (
    # A script that was released is never edited: append one. `declarations_version` counts those
    # applied.
    """
    CREATE TABLE dayfly.declared (revision bigint NOT NULL); -- one row: how many changes there were
    INSERT INTO dayfly.declared VALUES (0);
    CREATE TABLE dayfly.declarations (
        kind text NOT NULL,
        namespace text NOT NULL,
        name text NOT NULL,
        revision bigint NOT NULL UNIQUE, -- of its last change
        spec bytea, -- NULL: it was deleted
        version integer NOT NULL DEFAULT 0, -- of a function, over all its lives
        environment bytea NOT NULL DEFAULT '', -- of a function its digest; what was built
        locked text NOT NULL DEFAULT '',
        updated double precision NOT NULL DEFAULT 0,
        seen double precision NOT NULL DEFAULT 0, -- up to when a trigger's source was looked at
        last text NOT NULL DEFAULT '', -- the event that it made last
        PRIMARY KEY (kind, namespace, name)
    );
    """,
)
ROW: Final = "kind, namespace, name, spec, version, environment, locked, updated, seen, last"
SAVE: Final = f"""
    INSERT INTO dayfly.declarations AS d ({ROW}, revision)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
    ON CONFLICT (kind, namespace, name) DO UPDATE SET revision = excluded.revision,
        spec = excluded.spec, version = excluded.version, environment = excluded.environment,
        locked = excluded.locked, updated = excluded.updated,
        seen = CASE WHEN d.spec IS NULL THEN excluded.seen ELSE d.seen END,
        last = CASE WHEN d.spec IS NULL THEN excluded.last ELSE d.last END
"""
DELETE: Final = """
    UPDATE dayfly.declarations SET spec = NULL, environment = '', locked = '', revision = %s
    WHERE kind = %s AND namespace = %s AND name = %s AND spec IS NOT NULL
"""


class PostgresDeclarations:
    """See `SharedStore`. *dsn* is what libpq takes; it is never logged."""

    def __init__(self, dsn: str) -> None:
        self._postgres = Postgres(dsn, MIGRATIONS, "declarations_version")

    def __repr__(self) -> str:
        return f"<PostgresDeclarations {self._postgres}>"

    async def open(self) -> None:
        """Connect, and bring the tables up to date."""
        await self._postgres.open()

    async def close(self) -> None:
        """After what is under way."""
        await self._postgres.close()

    # ---- functions ----------------------------------------------------------------------------

    async def save_function(
        self, function: FunctionId, spec: FunctionSpec, environment: str, now: float
    ) -> int:
        """Declare a function; return its version."""
        content = msgspec.json.encode(spec, order="deterministic")
        key = ("Function", *function.split("/", 1))
        async with self._postgres.transaction() as cursor:
            revision = await _turn(cursor)
            await cursor.execute(
                "SELECT version, spec, environment FROM dayfly.declarations"
                " WHERE kind = %s AND namespace = %s AND name = %s",
                key,
            )
            version, before, used = await cursor.fetchone() or (0, None, b"")
            if before == content and used == environment.encode():
                return int(version)
            row = (*key, content, version + 1, environment.encode(), "", now, 0, "")
            await _save(cursor, row, revision)
            return int(version) + 1

    async def delete_function(self, function: FunctionId) -> bool:
        """Forget a function, all but its version."""
        return await self._delete("Function", *function.split("/", 1))

    async def functions(self) -> list[StoredFunction]:
        """All functions, by id."""
        found = [_function(row) for row in await self._rows("Function")]
        return sorted(found, key=lambda stored: stored.id)

    # ---- environments -------------------------------------------------------------------------

    async def save_environment(self, environment: StoredEnvironment) -> None:
        """Declare an environment; its folder is nobody else's business."""
        built = msgspec.structs.replace(environment.environment, path="")
        row = (
            "Environment",
            environment.namespace,
            environment.name,
            msgspec.json.encode(environment.spec),
            0,
            msgspec.json.encode(built),
            environment.locked,
            environment.updated,
            0,
            "",
        )
        await self._change(row)

    async def delete_environment(self, namespace: str, name: str) -> bool:
        """Forget an environment."""
        return await self._delete("Environment", namespace, name)

    async def environments(self) -> list[StoredEnvironment]:
        """All environments, by namespace and name."""
        return [_environment(row) for row in await self._rows("Environment")]

    # ---- triggers -----------------------------------------------------------------------------

    async def save_trigger(self, trigger: StoredTrigger) -> None:
        """Declare a trigger; what it has seen stays."""
        spec = msgspec.json.encode(trigger.spec)
        key = "Trigger", trigger.namespace, trigger.name
        await self._change((*key, spec, 0, b"", "", trigger.updated, trigger.seen, trigger.last))

    async def note_seen(self, namespace: str, name: str, seen: float, last: InvocationId) -> None:
        """Its source has been looked at up to *seen*, and it made the event *last*."""
        async with self._postgres.transaction() as cursor:
            revision = await _turn(cursor)
            await cursor.execute(
                "UPDATE dayfly.declarations SET seen = %s, last = %s, revision = %s"
                " WHERE kind = 'Trigger' AND namespace = %s AND name = %s AND spec IS NOT NULL",
                (seen, last, revision, namespace, name),
            )
            if cursor.rowcount:
                await _count(cursor, revision)

    async def delete_trigger(self, namespace: str, name: str) -> bool:
        """Forget a trigger."""
        return await self._delete("Trigger", namespace, name)

    async def triggers(self) -> list[StoredTrigger]:
        """All triggers, by namespace and name."""
        return [_trigger(row) for row in await self._rows("Trigger")]

    # ---- whatever has nothing but a spec ------------------------------------------------------

    async def save_spec(self, kind: Kind, namespace: str, name: str, spec: bytes) -> None:
        """Declare something of *kind*."""
        await self._change((kind, namespace, name, spec, 0, b"", "", 0, 0, ""))

    async def delete_spec(self, kind: Kind, namespace: str, name: str) -> bool:
        """Forget it."""
        return await self._delete(kind, namespace, name)

    async def specs(self, kind: Kind) -> list[tuple[str, str, bytes]]:
        """(namespace, name, spec) of all of *kind*, in order."""
        return [(row[1], row[2], bytes(row[3])) for row in await self._rows(kind)]

    # ---- what others change -------------------------------------------------------------------

    async def revision(self) -> int:
        """How many changes there were."""
        async with self._postgres.reader() as cursor:
            await cursor.execute("SELECT revision FROM dayfly.declared")
            (revision,) = await cursor.fetchone() or (0,)
            return int(revision)

    async def changes(self, since: int) -> Changes:
        """What has changed after the revision *since*; what cannot be read is left out."""
        async with self._postgres.reader() as cursor:
            await cursor.execute(
                f"SELECT {ROW}, revision FROM dayfly.declarations WHERE revision > %s"
                " ORDER BY revision LIMIT %s",
                (since, CHANGES_MAX),
            )
            found = await cursor.fetchall()
        changes = []
        for *row, _ in found:
            try:
                changes.append(Change(row[0], row[1], row[2], _stored(row)))
            except StoreFailed as error:
                log.error("a declaration is passed over", extra={"why": error.detail})
        is_all = len(found) < CHANGES_MAX
        return Changes(int(found[-1][-1]) if found else since, changes, is_all)

    async def listen(self, told: Callable[[], None]) -> None:
        """Call *told* when something was changed, by whomever; for ever."""
        await self._postgres.listen(CHANNEL, lambda _: told(), ready=told)

    # ---- parts --------------------------------------------------------------------------------

    async def _change(self, row: Sequence[Any]) -> None:
        async with self._postgres.transaction() as cursor:
            await _save(cursor, row, await _turn(cursor))

    async def _delete(self, kind: Kind, namespace: str, name: str) -> bool:
        async with self._postgres.transaction() as cursor:
            revision = await _turn(cursor)
            await cursor.execute(DELETE, (revision, kind, namespace, name))
            if is_gone := cursor.rowcount > 0:
                await _count(cursor, revision)
            return is_gone

    async def _rows(self, kind: Kind) -> list[Any]:
        async with self._postgres.reader() as cursor:
            await cursor.execute(
                f"SELECT {ROW} FROM dayfly.declarations WHERE kind = %s AND spec IS NOT NULL"
                ' ORDER BY namespace COLLATE "C", name COLLATE "C"',
                (kind,),
            )
            return await cursor.fetchall()


async def _turn(cursor: Cursor) -> int:
    """Wait for the right to change something; the number of that change."""
    await cursor.execute("SELECT revision + 1 FROM dayfly.declared FOR UPDATE")
    (revision,) = await cursor.fetchone() or (0,)
    return int(revision)


async def _count(cursor: Cursor, revision: int) -> None:
    """Something was changed; the others are told when it is visible."""
    await cursor.execute("UPDATE dayfly.declared SET revision = %s", (revision,))
    await cursor.execute("SELECT pg_notify(%s, '')", (CHANNEL,))


async def _save(cursor: Cursor, row: Sequence[Any], revision: int) -> None:
    await cursor.execute(SAVE, (*row, revision))
    await _count(cursor, revision)


def _stored(
    row: Sequence[Any],
) -> StoredFunction | StoredEnvironment | StoredTrigger | bytes | None:
    if row[3] is None:
        return None
    match row[0]:
        case "Function":
            return _function(row)
        case "Environment":
            return _environment(row)
        case "Trigger":
            return _trigger(row)
        case _:
            return bytes(row[3])


def _function(row: Sequence[Any]) -> StoredFunction:
    _, namespace, name, spec, version, environment, _, updated, _, _ = row
    id_ = function_id(namespace, name)
    read = _read(spec, FunctionSpec, f"function {id_}")
    return StoredFunction(id_, version, read, bytes(environment).decode(), updated)


def _environment(row: Sequence[Any]) -> StoredEnvironment:
    _, namespace, name, spec, _, environment, locked, updated, _, _ = row
    what = f"environment {namespace}/{name}"
    declared = _read(spec, EnvironmentSpec, what)
    built = _read(environment, Environment, what)
    return StoredEnvironment(namespace, name, declared, built, updated, locked)


def _trigger(row: Sequence[Any]) -> StoredTrigger:
    _, namespace, name, spec, _, _, _, updated, seen, last = row
    read = _read(spec, TriggerSpec, f"trigger {namespace}/{name}")
    return StoredTrigger(namespace, name, read, updated, seen, InvocationId(last))


def _read(content: bytes, kind: type[T], what: str) -> T:
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.DecodeError as error:
        raise StoreFailed(
            f"{what} in PostgreSQL cannot be read ({error}): delete that row and deploy again"
        ) from error
