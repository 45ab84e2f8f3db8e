"""Declarations that survive a restart, in one SQLite file.

Law: when a save returns, it is on the disk (WAL, `synchronous=FULL`). One connection, used by one
thread of its own, so the event loop never waits for the disk and writes come one after the other.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from dayfly_pool.errors import DataFolderUnusable
from dayfly_pool.models import (
    Environment,
    EnvironmentSpec,
    FunctionId,
    FunctionSpec,
    InvocationId,
    TriggerSpec,
)
from dayfly_pool.store.database import connect
from dayfly_pool.store.declarations import Kind, StoredEnvironment, StoredFunction, StoredTrigger

T = TypeVar("T")

MIGRATIONS: Final = (
    # A script that was released is never edited: append one. `user_version` counts those applied.
    """
    CREATE TABLE functions (
        id TEXT PRIMARY KEY,
        version INTEGER NOT NULL,
        spec BLOB NOT NULL,
        environment TEXT NOT NULL,
        updated REAL NOT NULL
    ) STRICT;
    -- Outlives its function, so that a version is never used twice.
    CREATE TABLE generations (id TEXT PRIMARY KEY, last INTEGER NOT NULL) STRICT;
    CREATE TABLE environments (
        namespace TEXT NOT NULL,
        name TEXT NOT NULL,
        spec BLOB NOT NULL,
        environment BLOB NOT NULL,
        updated REAL NOT NULL,
        PRIMARY KEY (namespace, name)
    ) STRICT;
    """,
    """
    CREATE TABLE triggers (
        namespace TEXT NOT NULL,
        name TEXT NOT NULL,
        spec BLOB NOT NULL,
        updated REAL NOT NULL,
        seen REAL NOT NULL, -- up to when its source has been looked at
        last TEXT NOT NULL, -- the event that it made last
        PRIMARY KEY (namespace, name)
    ) STRICT;
    """,
    """
    CREATE TABLE specs ( -- of whatever has nothing but a spec
        kind TEXT NOT NULL,
        namespace TEXT NOT NULL,
        name TEXT NOT NULL,
        spec BLOB NOT NULL,
        PRIMARY KEY (kind, namespace, name)
    ) STRICT, WITHOUT ROWID;
    """,
    "ALTER TABLE environments ADD COLUMN locked TEXT NOT NULL DEFAULT '';",
)


class SqliteDeclarations:
    """See `Store`. In the SQLite file *path*.

    Every method may raise DataFolderUnusable; what it was to write is then not written.
    A caller that is cancelled while saving does not stop the save.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread: ThreadPoolExecutor | None = None
        self._open_connection: sqlite3.Connection | None = None

    def __repr__(self) -> str:
        return f"<SqliteDeclarations {self._path} {'open' if self._thread else 'closed'}>"

    async def open(self) -> None:
        """Open the file, create or migrate it, and check that it is sound."""
        assert self._thread is None, "already open"
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="declarations")
        try:
            await self._call(self._connect)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close the file, after what is under way. Closing twice is harmless."""
        thread, self._thread = self._thread, None
        if thread is not None:
            closing = asyncio.get_running_loop().run_in_executor(thread, self._disconnect)
            thread.shutdown(wait=False)
            await asyncio.shield(closing)

    async def save_function(
        self, function: FunctionId, spec: FunctionSpec, environment: str, now: float
    ) -> int:
        """Declare a function; return its version: 1, 2, 3... over all its lives.

        The same spec and environment as before return the version that they have: nothing changes.
        """
        return await self._call(lambda: self._save_function(function, spec, environment, now))

    async def delete_function(self, function: FunctionId) -> bool:
        """Forget a function, all but its version. False if there was none."""
        return await self._call(
            lambda: self._write("DELETE FROM functions WHERE id = ?", (function,)) > 0
        )

    async def functions(self) -> list[StoredFunction]:
        """All functions, by id."""
        return await self._call(self._functions)

    async def save_environment(self, environment: StoredEnvironment) -> None:
        """Declare an environment, in the place of one of that name."""
        row = (
            environment.namespace,
            environment.name,
            msgspec.json.encode(environment.spec),
            msgspec.json.encode(environment.environment),
            environment.updated,
            environment.locked,
        )
        statement = "INSERT OR REPLACE INTO environments VALUES (?, ?, ?, ?, ?, ?)"
        await self._call(lambda: self._write(statement, row))

    async def delete_environment(self, namespace: str, name: str) -> bool:
        """Forget an environment. False if there was none."""
        statement = "DELETE FROM environments WHERE namespace = ? AND name = ?"
        return await self._call(lambda: self._write(statement, (namespace, name)) > 0)

    async def environments(self) -> list[StoredEnvironment]:
        """All environments, by namespace and name."""
        return await self._call(self._environments)

    async def save_trigger(self, trigger: StoredTrigger) -> None:
        """Declare a trigger, in the place of one of that name; what it has seen stays."""
        spec = msgspec.json.encode(trigger.spec)
        row = (trigger.namespace, trigger.name, spec, trigger.updated, trigger.seen, trigger.last)
        statement = (
            "INSERT INTO triggers VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET spec = excluded.spec, updated = excluded.updated"
        )
        await self._call(lambda: self._write(statement, row))

    async def note_seen(self, namespace: str, name: str, seen: float, last: InvocationId) -> None:
        """Its source has been looked at up to *seen*, and it made the event *last*."""
        statement = "UPDATE triggers SET seen = ?, last = ? WHERE namespace = ? AND name = ?"
        await self._call(lambda: self._write(statement, (seen, last, namespace, name)))

    async def save_spec(self, kind: Kind, namespace: str, name: str, spec: bytes) -> None:
        """Declare something of *kind*, in the place of one of that name."""
        statement = "INSERT OR REPLACE INTO specs VALUES (?, ?, ?, ?)"
        await self._call(lambda: self._write(statement, (kind, namespace, name, spec)))

    async def delete_spec(self, kind: Kind, namespace: str, name: str) -> bool:
        """Forget it. False if there was none."""
        statement = "DELETE FROM specs WHERE kind = ? AND namespace = ? AND name = ?"
        return await self._call(lambda: self._write(statement, (kind, namespace, name)) > 0)

    async def specs(self, kind: Kind) -> list[tuple[str, str, bytes]]:
        """(namespace, name, spec) of all of *kind*, in order."""
        return await self._call(lambda: self._specs(kind))

    async def delete_trigger(self, namespace: str, name: str) -> bool:
        """Forget a trigger. False if there was none."""
        statement = "DELETE FROM triggers WHERE namespace = ? AND name = ?"
        return await self._call(lambda: self._write(statement, (namespace, name)) > 0)

    async def triggers(self) -> list[StoredTrigger]:
        """All triggers, by namespace and name."""
        return await self._call(self._triggers)

    async def _call(self, work: Callable[[], T]) -> T:
        """Do *work* on the connection's own thread; what SQLite raises gets our name."""
        assert self._thread is not None, "not open"
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (sqlite3.Error, OSError) as error:
            raise DataFolderUnusable(
                f"the database {self._path} failed ({error}): free space, repair its rights, "
                "or put a good copy in its place"
            ) from error

    # Below: on the connection's own thread.

    @property
    def _connection(self) -> sqlite3.Connection:
        assert self._open_connection is not None
        return self._open_connection

    def _connect(self) -> None:
        self._open_connection = connect(self._path, MIGRATIONS)

    def _disconnect(self) -> None:
        if self._open_connection is not None:
            self._open_connection.close()
            self._open_connection = None

    def _write(self, statement: str, row: Sequence[object]) -> int:
        return self._connection.execute(statement, row).rowcount

    def _save_function(
        self, function: FunctionId, spec: FunctionSpec, environment: str, now: float
    ) -> int:
        content = msgspec.json.encode(spec, order="deterministic")
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        with connection:  # commits, or rolls back
            found = connection.execute(
                "SELECT version FROM functions WHERE id = ? AND spec = ? AND environment = ?",
                (function, content, environment),
            ).fetchone()
            if found:
                return int(found[0])
            (version,) = connection.execute(
                "INSERT INTO generations VALUES (?, 1)"
                " ON CONFLICT DO UPDATE SET last = last + 1 RETURNING last",
                (function,),
            ).fetchone()
            row = (function, version, content, environment, now)
            self._write("INSERT OR REPLACE INTO functions VALUES (?, ?, ?, ?, ?)", row)
            return int(version)

    def _functions(self) -> list[StoredFunction]:
        rows = self._connection.execute(
            "SELECT id, version, spec, environment, updated FROM functions ORDER BY id"
        )
        return [
            StoredFunction(id, version, self._spec(spec, FunctionSpec, f"function {id}"), *rest)
            for id, version, spec, *rest in rows
        ]

    def _environments(self) -> list[StoredEnvironment]:
        rows = self._connection.execute(
            "SELECT namespace, name, spec, environment, updated, locked FROM environments"
            " ORDER BY namespace, name"
        )
        found = []
        for namespace, name, spec, environment, *rest in rows:
            row = f"environment {namespace}/{name}"
            declared = self._spec(spec, EnvironmentSpec, row)
            built = self._spec(environment, Environment, row)
            found.append(StoredEnvironment(namespace, name, declared, built, *rest))
        return found

    def _specs(self, kind: str) -> list[tuple[str, str, bytes]]:
        return self._connection.execute(
            "SELECT namespace, name, spec FROM specs WHERE kind = ? ORDER BY namespace, name",
            (kind,),
        ).fetchall()

    def _triggers(self) -> list[StoredTrigger]:
        rows = self._connection.execute(
            "SELECT namespace, name, spec, updated, seen, last FROM triggers"
            " ORDER BY namespace, name"
        )
        return [
            StoredTrigger(
                namespace,
                name,
                self._spec(spec, TriggerSpec, f"trigger {namespace}/{name}"),
                *rest,
            )
            for namespace, name, spec, *rest in rows
        ]

    def _spec(self, content: bytes, kind: type[T], row: str) -> T:
        try:
            return msgspec.json.decode(content, type=kind)
        except msgspec.DecodeError as error:
            raise DataFolderUnusable(
                f"{row} in {self._path} cannot be read ({error}): delete that row and deploy again"
            ) from error
