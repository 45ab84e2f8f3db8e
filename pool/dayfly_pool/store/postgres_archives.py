"""Packages in PostgreSQL, in rows of a mebibyte: the extra `dayfly[postgres]`."""

import hashlib
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Final

import psycopg

from dayfly_pool.errors import StoreFailed
from dayfly_pool.store.postgres import CONNECT_S_MAX, MIGRATING

PIECE_BYTES: Final = 1 << 20
STATEMENT_MS_MAX: Final = 60_000
"""Each statement moves at most one piece."""

SCHEMA: Final = """
    CREATE SCHEMA IF NOT EXISTS dayfly;
    CREATE TABLE IF NOT EXISTS dayfly.packages (
        digest text PRIMARY KEY,
        pieces integer NOT NULL,
        noted timestamptz NOT NULL
    );
    CREATE TABLE IF NOT EXISTS dayfly.package_pieces (
        digest text NOT NULL REFERENCES dayfly.packages ON DELETE CASCADE,
        number integer NOT NULL,
        content bytea NOT NULL,
        PRIMARY KEY (digest, number)
    );
    -- A zip does not get smaller by being packed again.
    ALTER TABLE dayfly.package_pieces ALTER COLUMN content SET STORAGE EXTERNAL;
"""


class PostgresArchives:
    """See `Archives`. *dsn* is what libpq takes; it is never logged."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection: psycopg.Connection[Any] | None = None
        self._lock = threading.Lock()
        self._has_tables = False

    def __repr__(self) -> str:
        return "<PostgresArchives>"

    def put(self, digest: str, archive: bytes) -> None:
        """Keep it, in one transaction; only pieces that differ are sent."""
        view = memoryview(archive)
        with self._transaction() as cursor:
            cursor.execute(
                "INSERT INTO dayfly.packages VALUES (%s, %s, now())"
                " ON CONFLICT (digest) DO UPDATE SET noted = now()",
                (digest, -(-len(view) // PIECE_BYTES)),
            )
            cursor.execute(
                "SELECT number, sha256(content) FROM dayfly.package_pieces WHERE digest = %s",
                (digest,),
            )
            there = {number: bytes(sum_) for number, sum_ in cursor.fetchall()}
            for number, at in enumerate(range(0, len(view), PIECE_BYTES)):
                piece = view[at : at + PIECE_BYTES]
                if hashlib.sha256(piece).digest() != there.get(number):
                    cursor.execute(
                        "INSERT INTO dayfly.package_pieces VALUES (%s, %s, %b)"
                        " ON CONFLICT (digest, number) DO UPDATE SET content = excluded.content",
                        (digest, number, bytes(piece)),
                    )

    def get(self, digest: str) -> bytes | None:
        """The whole of it, fetched piece by piece."""
        archive = bytearray()
        with self._transaction() as cursor:
            cursor.execute("SELECT pieces FROM dayfly.packages WHERE digest = %s", (digest,))
            found = cursor.fetchone()
            if found is None:
                return None
            for number in range(found[0]):
                cursor.execute(
                    "SELECT content FROM dayfly.package_pieces WHERE digest = %s AND number = %s",
                    (digest, number),
                    binary=True,
                )
                (piece,) = cursor.fetchone() or (b"",)
                archive += piece
        return bytes(archive)

    def note(self, digest: str) -> bool:
        """Somebody is about to refer to it."""
        with self._transaction() as cursor:
            cursor.execute("UPDATE dayfly.packages SET noted = now() WHERE digest = %s", (digest,))
            return cursor.rowcount > 0

    def drop(self, used: Collection[str], idle_s: float) -> int:
        """Forget those not among *used* that nobody has put or noted for *idle_s*."""
        with self._transaction() as cursor:
            cursor.execute(
                "DELETE FROM dayfly.packages WHERE digest != ALL(%s)"
                " AND noted < now() - make_interval(secs => %s)",
                (list(used), idle_s),
            )
            return cursor.rowcount

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._drop_connection()

    @contextmanager
    def _transaction(self) -> Iterator[psycopg.Cursor[Any]]:
        with self._lock:
            try:
                connection = self._connected()
                with connection.transaction(), connection.cursor() as cursor:
                    yield cursor
            except (psycopg.Error, OSError) as error:
                self._drop_connection()
                why = " ".join(str(error).split())[:500]
                raise StoreFailed(f"packages in PostgreSQL: {why}") from error
            except BaseException:
                self._drop_connection()
                raise

    def _connected(self) -> psycopg.Connection[Any]:
        if self._connection is None or self._connection.closed:
            self._connection = psycopg.connect(
                self._dsn, connect_timeout=CONNECT_S_MAX, autocommit=True
            )
            self._connection.execute("SET synchronous_commit = on")
            self._connection.execute(f"SET statement_timeout = {STATEMENT_MS_MAX}")
        if not self._has_tables:
            with self._connection.transaction():
                self._connection.execute("SELECT pg_advisory_xact_lock(%s)", (MIGRATING,))
                self._connection.execute(SCHEMA)
            self._has_tables = True
        return self._connection

    def _drop_connection(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
