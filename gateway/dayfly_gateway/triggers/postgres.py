"""PostgreSQL: a table that is a queue, and a channel of NOTIFY; the extra `dayfly[postgres]`.

A row that is under way is held by an advisory lock of our session. That asks nothing of the table,
keeps no transaction open (which would keep VACUUM from its work for as long as an event runs), and
when we are gone, the server gives the rows to others at once. So the connection must be one to the
server itself, or to a pooler that gives each client a session.

A row is known by its version (`xmin`): what was changed while it was under way is another event.
"""

import asyncio
import contextlib
import hashlib
import os
import socket
from collections import deque
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

import msgspec
import psycopg
from msgspec import structs
from psycopg import AsyncConnection
from psycopg.sql import SQL, Composed, Identifier

from dayfly_gateway.triggers.source import CALL_S_MAX, LEASE_S, Delivery, SourceFailed
from dayfly_pool.brokers import PostgresSource

T = TypeVar("T")
POLL_S: Final = 0.25
ROWS_MAX: Final = 100
"""Of one fetch."""

BODY_BYTES_MAX: Final = 6 * 1024 * 1024
HEADERS_BYTES_MAX: Final = 64 * 1024
LAG_MAX: Final = 100_000
"""Rows are counted no further."""

SETTINGS: Final = """
    SELECT set_config('statement_timeout', %s, false),
           set_config('tcp_keepalives_idle', '10', false),
           set_config('tcp_keepalives_interval', '5', false),
           set_config('tcp_keepalives_count', '4', false)
"""
"""The server gives our rows to others within half a minute when the way to us is lost."""

KEY: Final = SQL("hashtextextended(tableoid::text || '/' || id::text, 0)")
TAKE: Final = """
    SELECT id, key, place FROM (
        SELECT id::text, {key} AS key, ctid::text AS place FROM {table}
        WHERE id::text <> ALL(%s) ORDER BY {table}.id OFFSET 0
    ) AS candidates
    WHERE pg_try_advisory_lock(key) LIMIT %s
"""
"""The order is the inner one's to keep: so no more rows are locked than are given out."""

READ: Final = """
    SELECT id::text, ctid::text, tableoid::text, xmin::text, octet_length({body}),
           CASE WHEN octet_length({body}) <= %s THEN {body} END,
           CASE WHEN octet_length({headers}) <= %s THEN {headers} END
    FROM {table} WHERE ctid = ANY(%s::tid[])
"""
"""A second look: who had it before us may have deleted it before we had the lock."""

DELETE: Final = "DELETE FROM {table} WHERE ctid = %s::tid AND xmin::text = %s AND id::text = %s"
UNLOCK: Final = "SELECT pg_advisory_unlock(key) FROM unnest(%s::bigint[]) AS key"
COUNT: Final = """
    SELECT count(*) FROM (SELECT {key} AS key FROM {table} LIMIT %s) AS rows
    WHERE NOT EXISTS (
        SELECT FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1
        AND (classid::bigint << 32 | objid::bigint) = key
    )
"""


class _Link:
    """A connection, and the end of each call."""

    def __init__(self, spec: PostgresSource, secret: str, call_s: float) -> None:
        self._spec, self._secret, self._call_s = spec, secret, call_s
        self._connection: AsyncConnection[Any] | None = None
        self._tasks: set[asyncio.Future[Any]] = set()

    @property
    def connection(self) -> AsyncConnection[Any]:
        """The open one. Raises `SourceFailed` when there is none."""
        if self._connection is None:
            raise self.failed("closed")
        return self._connection

    async def open(self) -> None:
        user, colon, password = self._secret.partition(":")
        login: dict[str, Any] = {"user": user} | ({"password": password} if colon else {})
        try:
            async with asyncio.timeout(self._call_s):
                self._connection = await AsyncConnection.connect(
                    self._spec.server,
                    autocommit=True,
                    prepare_threshold=None,
                    client_encoding="utf8",
                    keepalives_idle=10,
                    keepalives_interval=5,
                    keepalives_count=4,
                    **(login if self._secret else {}),
                )
        except (psycopg.Error, OSError, TimeoutError, ValueError) as error:
            raise self.failed(error) from None
        await self.call(self.rows(SQL(SETTINGS), f"{self._call_s * 900:.0f}ms"))

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            if self._tasks:
                self._cut(connection)
                await asyncio.wait(self._tasks, timeout=1.0)
            with contextlib.suppress(psycopg.Error, OSError):
                await connection.close()

    async def rows(self, query: SQL | Composed, *parameters: Any) -> list[Any]:
        """What *query* finds; nothing when it only does."""
        cursor = await self.connection.execute(query, parameters, binary=True)
        return await cursor.fetchall() if cursor.description else []

    async def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Await *work*, which goes on when we are cancelled. Raises `SourceFailed`.

        The client would wait ten seconds more for a server that stands still, so the connection is
        cut when the time is over.
        """
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        await asyncio.wait((task,), timeout=self._call_s)
        if not task.done():
            if self._connection is not None:
                self._cut(self._connection)
            raise self.failed(f"no answer within {self._call_s} s")
        try:
            return task.result()
        except (psycopg.Error, OSError, ValueError) as error:
            raise self.failed(error) from None

    def _done(self, task: asyncio.Future[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # of who was cancelled, nobody asks

    def _cut(self, connection: AsyncConnection[Any]) -> None:
        """Let whoever waits for the server hear that it is gone."""
        with (
            contextlib.suppress(psycopg.Error, OSError),
            socket.socket(fileno=os.dup(connection.pgconn.socket)) as same,
        ):
            same.shutdown(socket.SHUT_RDWR)

    def failed(self, why: Exception | str) -> SourceFailed:
        text = " ".join(str(why).split())[:500] or type(why).__name__
        password = self._secret.partition(":")[2]
        text = text.replace(password, "***") if password else text
        return SourceFailed(f"PostgreSQL at {self._spec.server}: {text}")


class _Table:
    """A table that is a queue."""

    def __init__(self, link: _Link, table: str) -> None:
        self._link, self._name = link, table
        self._table = Identifier(*table.split("."))
        self._parts: dict[str, Any] = {}
        self._ours: dict[str, int] = {}
        self._later: dict[str, float] = {}
        self._taken: list[Delivery] = []
        self._taking = asyncio.Lock()

    async def open(self) -> None:
        """See which columns it has."""
        self._ours, self._later, self._taken = {}, {}, []
        cursor = await self._link.connection.execute(
            SQL("SELECT * FROM {} LIMIT 0").format(self._table)
        )
        types = {column.name: column.type_code for column in cursor.description or ()}
        if missing := {"id", "body"} - types.keys():
            raise self._link.failed(f"table {self._name} has no column {min(missing)}")
        is_bytes = types["body"] == psycopg.adapters.types["bytea"].oid
        self._parts = {
            "table": self._table,
            "key": KEY,
            "body": SQL("body" if is_bytes else "convert_to(body::text, 'UTF8')"),
            "headers": SQL("headers::text" if "headers" in types else "NULL::text"),
        }

    def _query(self, text: str) -> Composed:
        return SQL(text).format(**self._parts)

    async def fetch(self, most: int, wait_s: float) -> list[Delivery]:
        now = asyncio.get_running_loop().time
        end = now() + wait_s
        while True:
            if not self._taken:
                await self._link.call(self._take(min(most, ROWS_MAX)))
            if self._taken or now() >= end:
                found, self._taken = self._taken[:most], self._taken[most:]
                return found
            await asyncio.sleep(min(POLL_S, max(0.0, end - now())))

    async def _take(self, most: int) -> None:
        """Lock rows and read them: for the next fetch, if this one is cancelled."""
        async with self._taking:
            now = asyncio.get_running_loop().time()
            await self._unlock([id_ for id_, at in self._later.items() if at <= now])
            if self._taken:
                return
            found = await self._link.rows(self._query(TAKE), list(self._ours), most)
            if not found:
                return
            self._ours |= {id_: key for id_, key, _ in found}
            places = [place for _, _, place in found]
            limits = BODY_BYTES_MAX, HEADERS_BYTES_MAX
            read = await self._link.rows(self._query(READ), *limits, places)
            rows = {row[0]: row for row in read}
            await self._unlock([id_ for id_, _, _ in found if id_ not in rows])
            self._taken = [self._delivery(*rows[id_]) for id_, _, _ in found if id_ in rows]

    async def _unlock(self, ids: list[str]) -> None:
        keys = [self._ours.pop(id_) for id_ in ids if id_ in self._ours]
        for id_ in ids:
            self._later.pop(id_, None)
        if keys:
            await self._link.rows(SQL(UNLOCK), keys)

    def _delivery(
        self,
        id_: str,
        place: str,
        table: str,
        version: str,
        size: int | None,
        body: bytes | None,
        headers: str | None,
    ) -> Delivery:
        about = "/".join((table, version, str(size), id_)).encode()
        return Delivery(
            # a table that was made anew has another number, and one elsewhere other bodies
            id=f"{self._name}/{hashlib.sha256(about + b'/' + (body or b'')).hexdigest()[:40]}",
            topic=self._name,
            group=self._name,
            body=body or b"",
            headers=_headers(headers),
            unread=size if size is not None and size > BODY_BYTES_MAX else 0,
            token=(place, version, id_),
        )

    async def ack(self, delivery: Delivery) -> None:
        if delivery.unread:
            return  # the row stays, and stays locked: nobody is given it while we listen
        await self._link.rows(self._query(DELETE), *delivery.token)
        await self._unlock([delivery.token[2]])  # and not before that is committed

    async def nak(self, delivery: Delivery, delay_s: float) -> None:
        id_ = delivery.token[2]
        if delay_s > 0:
            self._later[id_] = asyncio.get_running_loop().time() + delay_s
        else:
            await self._unlock([id_])

    async def lag(self) -> int | None:
        ((number,),) = await self._link.rows(self._query(COUNT), LAG_MAX)
        return int(number)


def _headers(text: str | None) -> dict[str, str]:
    try:
        found = msgspec.json.decode(text or "{}")
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        name.lower(): value if isinstance(value, str) else msgspec.json.encode(value).decode()
        for name, value in found.items()
    }


class _Channel:
    """A channel of NOTIFY: it has neither ids nor acknowledgements, and waits for nobody."""

    def __init__(self, link: _Link, channel: str) -> None:
        self._link, self._name = link, channel
        self._heard: deque[Delivery] = deque()
        self._later: list[tuple[float, Delivery]] = []

    async def open(self) -> None:
        """Listen."""
        await self._link.rows(SQL("LISTEN {}").format(Identifier(self._name)))

    async def fetch(self, most: int, wait_s: float) -> list[Delivery]:
        now = asyncio.get_running_loop().time
        end = now() + wait_s
        while True:
            self._heard += [delivery for at, delivery in self._later if at <= now()]
            self._later = [each for each in self._later if each[0] > now()]
            if not self._heard:
                first = min([end, *(at for at, _ in self._later)])
                await self._listen(max(0.0, first - now()))
            if self._heard or now() >= end:
                return [self._heard.popleft() for _ in range(min(most, len(self._heard)))]

    async def _listen(self, wait_s: float) -> None:
        try:
            async for notify in self._link.connection.notifies(timeout=wait_s, stop_after=1):
                body, name = notify.payload.encode(), notify.channel
                self._heard.append(Delivery(id="", topic=name, group=name, body=body))
        except (psycopg.Error, OSError, ValueError) as error:
            raise self._link.failed(error) from None
        if not self._heard:
            await self._link.call(self._link.rows(SQL("SELECT 1")))  # is anybody there?

    async def ack(self, delivery: Delivery) -> None:
        """Nobody wants to know."""

    async def nak(self, delivery: Delivery, delay_s: float) -> None:
        again = structs.replace(delivery, attempt=delivery.attempt + 1)
        self._later.append((asyncio.get_running_loop().time() + delay_s, again))

    async def lag(self) -> int | None:
        return None


class Source:
    """A table or a channel, as `triggers.source.Source` promises."""

    extend_s: float | None = None

    def __init__(
        self,
        spec: PostgresSource,
        name: str,
        secret: str = "",
        lease_s: float = LEASE_S,
        call_s: float = CALL_S_MAX,
    ) -> None:
        self._link = _Link(spec, secret, call_s)
        self._kind: _Table | _Channel = (
            _Table(self._link, spec.table)
            if spec.table
            else _Channel(self._link, spec.channel or "")
        )

    async def open(self) -> None:
        """See `triggers.source.Source`."""
        await self._link.open()
        await self._link.call(self._kind.open())

    async def close(self) -> None:
        """See `triggers.source.Source`."""
        await self._link.close()

    async def fetch(self, most: int, wait_s: float) -> list[Delivery]:
        """See `triggers.source.Source`."""
        return await self._kind.fetch(most, wait_s)

    async def ack(self, delivery: Delivery) -> None:
        """See `triggers.source.Source`."""
        await self._link.call(self._kind.ack(delivery))

    async def nak(self, delivery: Delivery, delay_s: float) -> None:
        """See `triggers.source.Source`."""
        await self._link.call(self._kind.nak(delivery, delay_s))

    async def extend(self, delivery: Delivery) -> None:
        """See `triggers.source.Source`: it is ours for as long as we are connected."""

    async def lag(self) -> int | None:
        """See `triggers.source.Source`."""
        return await self._link.call(self._kind.lag())
