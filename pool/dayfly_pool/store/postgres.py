"""Connections to a PostgreSQL that several servers use: one writes, one reads, one listens."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import psycopg
from psycopg import AsyncConnection, AsyncCursor

from dayfly_pool.errors import StoreFailed

CONNECT_S_MAX: Final = 10
IDLE_MS_MAX: Final = 10_000
"""Who says nothing for so long in the middle of a transaction has stopped, and may hold the lock
that all others wait for."""

STATEMENT_MS_MAX: Final = 60_000
"""Of one that writes, the wait for the locks of others included."""

MIGRATING: Final = 0x6461_7966_6C79
"""The advisory lock of whoever brings the tables up to date."""

Cursor = AsyncCursor[Any]


class Postgres:
    """*dsn* is what libpq takes; it is never logged.

    The tables are in the schema `dayfly`; its table *versions* counts the *migrations* applied.
    """

    def __init__(self, dsn: str, migrations: Sequence[str], versions: str) -> None:
        self.dsn = dsn
        self._migrations, self._versions = migrations, f"dayfly.{versions}"
        self._is_open = False
        self._write_connection: AsyncConnection[Any] | None = None
        self._read_connection: AsyncConnection[Any] | None = None
        self._is_doubtful = False
        """A write has failed: what is wrong with one connection is mostly wrong with both."""

        self._writing, self._reading = asyncio.Lock(), asyncio.Lock()

    def __repr__(self) -> str:
        return "open" if self._is_open else "closed"

    async def open(self) -> None:
        """Connect, and bring the tables up to date. Raises `StoreFailed`."""
        assert not self._is_open, "already open"
        self._is_open = True
        try:
            async with self.transaction() as cursor:
                await self._migrate(cursor)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """After what is under way. Closing twice is harmless."""
        self._is_open = False
        async with self._writing, self._reading:
            for connection in (self._write_connection, self._read_connection):
                if connection is not None:
                    await connection.close()
            self._write_connection = self._read_connection = None

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Cursor]:
        """One transaction, on the disk of the server at its end; after a failure connect anew.

        Raises `StoreFailed` for what goes wrong in the block: then nobody knows what was written.
        """
        async with (
            self._written_to() as connection,
            connection.transaction(),
            connection.cursor() as cursor,
        ):
            yield cursor

    async def write(self, statement: str, values: Sequence[Any]) -> list[Any]:
        """A transaction of one statement, in one way there and back; the rows that it returns."""
        async with self._written_to() as connection, connection.cursor() as cursor:
            await cursor.execute(statement.encode(), values)
            return await cursor.fetchall()

    @asynccontextmanager
    async def _written_to(self) -> AsyncIterator[AsyncConnection[Any]]:
        async with self._writing, _renamed():
            if self._write_connection is None or self._write_connection.closed:
                self._write_connection = await self._connect(
                    "SET synchronous_commit = on;"
                    f"SET idle_in_transaction_session_timeout = {IDLE_MS_MAX};"
                    f"SET statement_timeout = {STATEMENT_MS_MAX}"
                )
            try:
                yield self._write_connection
            except BaseException:
                connection, self._write_connection = self._write_connection, None
                self._is_doubtful = True
                await _end(connection)
                raise

    @asynccontextmanager
    async def reader(self) -> AsyncIterator[Cursor]:
        """What is there now, statement by statement. Raises `StoreFailed`."""
        async with self._reading, _renamed():
            if self._is_doubtful:
                connection, self._read_connection = self._read_connection, None
                self._is_doubtful = False
                await _end(connection)
            if self._read_connection is None or self._read_connection.closed:
                self._read_connection = await self._connect()
            try:
                async with self._read_connection.cursor() as cursor:
                    yield cursor
            except BaseException:
                connection, self._read_connection = self._read_connection, None
                await _end(connection)
                raise

    async def listen(
        self, channel: str, told: Callable[[str], None], ready: Callable[[], None] = lambda: None
    ) -> None:
        """Call *told* with all that is said there, by whomever; for ever.

        From the call of *ready* on nothing that is said is missed. Raises `StoreFailed` when the
        connection is lost.
        """
        async with _renamed(), await self._connect() as connection:
            await connection.execute(f"LISTEN {channel}".encode())
            ready()
            async for notice in connection.notifies():
                told(notice.payload)

    async def _connect(self, settings: str = "") -> AsyncConnection[Any]:
        if not self._is_open:
            raise StoreFailed("it is closed")
        connection = await AsyncConnection.connect(
            self.dsn, autocommit=True, connect_timeout=CONNECT_S_MAX
        )
        try:
            if settings:
                await connection.execute(settings.encode())
        except BaseException:  # one without them is used by nobody
            await _end(connection)
            raise
        return connection

    async def _migrate(self, cursor: Cursor) -> None:
        await cursor.execute("SET LOCAL statement_timeout = 0")  # a table may be long
        await cursor.execute("SELECT pg_advisory_xact_lock(%s)", (MIGRATING,))
        await cursor.execute("CREATE SCHEMA IF NOT EXISTS dayfly")
        await cursor.execute(f"CREATE TABLE IF NOT EXISTS {self._versions} (number int NOT NULL)")
        await cursor.execute(f"SELECT max(number) FROM {self._versions}")
        (done,) = await cursor.fetchone() or (None,)
        if (done or 0) > len(self._migrations):
            raise StoreFailed(
                f"the database was written by a newer Dayfly (schema {done}, this one knows"
                f" {len(self._migrations)}): update Dayfly, or use another database"
            )
        for number, script in enumerate(self._migrations[done or 0 :], start=(done or 0) + 1):
            await cursor.execute(script.encode())
            await cursor.execute(f"INSERT INTO {self._versions} VALUES (%s)", (number,))


async def _end(connection: AsyncConnection[Any] | None) -> None:
    if connection is not None:
        with contextlib.suppress(psycopg.Error, OSError):
            await connection.close()


@asynccontextmanager
async def _renamed() -> AsyncIterator[None]:
    """What the database or the way to it raises gets our name, and never the password."""
    try:
        yield
    except (psycopg.Error, OSError) as error:
        raise StoreFailed(f"PostgreSQL: {' '.join(str(error).split())[:500]}") from error


def text(text: str) -> str:
    """PostgreSQL keeps no NUL in a text."""
    return text.replace("\0", "\ufffd")
