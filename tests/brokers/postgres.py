"""PostgreSQL with tables that are queues."""

import contextlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import psycopg
from psycopg.sql import SQL, Identifier
from psycopg.types.json import Jsonb
from tests.brokers import Broker
from tests.servers import Postgres as Server

from dayfly_gateway.triggers.postgres import Source
from dayfly_gateway.triggers.source import Topic
from dayfly_pool.brokers import PostgresSource

ROW: Final = SQL("INSERT INTO {} (body, headers) VALUES (%s, %s)")
TABLE: Final = SQL("CREATE TABLE {} (id bigserial PRIMARY KEY, body bytea, headers jsonb)")


class Postgres(Broker):
    """See `tests.brokers`."""

    name = "postgres"
    has_topic = False
    counts_attempts = False
    leases = False

    def __init__(self) -> None:
        self._server = Server()
        self.dsn, self.port = self._server.dsn, self._server.port

    async def place(self, name: str) -> "Place":
        """A table with nothing in it."""
        table = name.replace("-", "_")
        connection = await psycopg.AsyncConnection.connect(self.dsn, autocommit=True)
        async with connection:
            await connection.execute(SQL("DROP TABLE IF EXISTS {}").format(Identifier(table)))
            await connection.execute(TABLE.format(Identifier(table)))
        return Place(self.dsn, table)

    def start(self) -> None:
        """See `Broker`."""
        self._server.start()

    def stop(self) -> None:
        """See `Broker`."""
        self._server.stop()

    def _signal(self, number: signal.Signals) -> None:
        """To the server, and then to those that serve one connection each and come and go."""
        first = self._server.process
        os.kill(first, number)
        for child in Path(f"/proc/{first}/task/{first}/children").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), number)

    def pause(self) -> None:
        """See `Broker`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """See `Broker`."""
        self._signal(signal.SIGCONT)

    def __enter__(self) -> Broker:
        self._server.__enter__()
        return self

    def __exit__(self, *about: object) -> None:
        self._server.__exit__(*about)


class Place:
    """See `tests.brokers.Place`."""

    topic_spec = None

    def __init__(self, dsn: str, table: str) -> None:
        self.spec = PostgresSource(server=dsn, table=table)
        self.table = table

    async def publish(self, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """See `tests.brokers.Place`."""
        row = (body, Jsonb(dict(headers)) if headers else None)
        await self.run(ROW.format(Identifier(self.table)), row)

    async def run(self, query: SQL, parameters: tuple[object, ...] = ()) -> None:
        """What a program of the database would do."""
        connection = await psycopg.AsyncConnection.connect(self.spec.server, autocommit=True)
        async with connection:
            await connection.execute(query, parameters)

    def source(self, lease_s: float = 30.0, call_s: float = 10.0) -> Source:
        """See `tests.brokers.Place`."""
        return Source(self.spec, self.table, lease_s=lease_s, call_s=call_s)

    def topic(self) -> Topic:
        """See `tests.brokers.Place`."""
        raise NotImplementedError
