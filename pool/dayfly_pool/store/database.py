"""A SQLite file of ours: opened safely, brought to this program's tables, and written by a thread.

Every statement should stand for a whole batch: the interpreter's lock is given up and taken back
once for each, and on a busy event loop taking it back may last longer than the statement.
"""

import asyncio
import contextlib
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

from dayfly_pool.errors import DataFolderUnusable, StoreFailed

log = logging.getLogger("dayfly.store")
T = TypeVar("T")
ROWS_MAX: Final = 64
"""Of one statement."""

CHECKPOINT_S: Final = 0.25
DEFECT_S: Final = 5.0
"""Before the next checkpoint after one that failed for a defect of ours, with a traceback."""

PAGE_BYTES: Final = 4096
CHECKPOINT_PAGES: Final = 16384
"""Where the log is as long as this, the one who writes waits for it to be moved into the file."""

LOCK_S_MAX: Final = 5.0
"""How long a statement waits for another process that holds the file."""

STATEMENTS_MAX: Final = 512


def connect(path: Path, migrations: Sequence[str], *, is_sound: bool = False) -> sqlite3.Connection:
    """A connection that is durable (WAL, `synchronous=FULL`), for one thread at a time.

    Creates or migrates the file and checks that it is sound, unless that is known. Raises
    `DataFolderUnusable`, `sqlite3.Error` or `OSError`.
    """
    # Created for its owner alone: what is in it may be secret. The log inherits it.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    # isolation_level=None: transactions are written out here, not guessed by the module.
    connection = sqlite3.connect(
        path,
        timeout=LOCK_S_MAX,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=STATEMENTS_MAX,
    )
    try:
        connection.execute("PRAGMA synchronous = FULL")
        _migrate(connection, path, migrations)
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise DataFolderUnusable(f"{path} cannot have a WAL: use a local disk")
        (verdict,) = ("ok",) if is_sound else connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
    except BaseException:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection, path: Path, migrations: Sequence[str]) -> None:
    """Bring the tables to this program's version, each step whole or not at all."""
    (done,) = connection.execute("PRAGMA user_version").fetchone()
    if done > len(migrations):
        raise DataFolderUnusable(
            f"{path} was written by a newer Dayfly (schema {done}, this one knows "
            f"{len(migrations)}): update Dayfly, or use another folder"
        )
    for number, script in enumerate(migrations[done:], start=done + 1):
        try:
            connection.executescript(
                f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT;"
            )
        except sqlite3.Error:
            if connection.in_transaction:
                connection.rollback()
            raise


def chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """As many at once as a statement takes."""
    for at in range(0, len(items), ROWS_MAX):
        yield items[at : at + ROWS_MAX]


def tuples(number: int, columns: str) -> str:
    """So many rows of the same *columns*, for a statement."""
    return ", ".join([columns] * number)


class Database:
    """The file *path*: one thread writes, another reads, a third moves the log into the file.

    *prepare* is called on the writer's thread with every connection that is to be written to; a
    new one is opened after each failure. *name* is in the names of the threads.
    """

    def __init__(
        self,
        path: Path,
        migrations: Sequence[str],
        name: str,
        prepare: Callable[[sqlite3.Connection], None],
    ) -> None:
        self._path, self._migrations, self._name = path, migrations, name
        self._prepare = prepare
        self._writer: ThreadPoolExecutor | None = None
        self._reader: ThreadPoolExecutor | None = None
        self._mover: ThreadPoolExecutor | None = None
        self._moving: asyncio.Task[None] | None = None
        self._write_connection: sqlite3.Connection | None = None
        self._read_connection: sqlite3.Connection | None = None
        self._move_connection: sqlite3.Connection | None = None
        self._is_doubtful = False
        """Something may look written, and not be on the disk."""

    def __repr__(self) -> str:
        return f"{self._path} {'open' if self._writer else 'closed'}"

    async def open(self) -> None:
        """Open or create the file and check that it is sound. Raises `StoreFailed`."""
        assert self._writer is None, "already open"
        self._writer = self._thread("write")
        self._reader = self._thread("read")
        self._mover = self._thread("move")
        try:
            await self._call(self._writer, self._open)
            self._moving = asyncio.create_task(self._keep_moving(), name=f"{self._name}-move")
        except BaseException:
            await self.close()
            raise

    def _thread(self, what: str) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{self._name}-{what}")

    async def close(self) -> None:
        """Close the file, after what is under way. Closing twice is harmless."""
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

    async def write(self, work: Callable[[], T]) -> T:
        """*work*, on the writer's thread, in one transaction; on the disk when this returns.

        Raises `StoreFailed`: then nobody knows whether it was written.
        """
        return await self._call(self._writer, lambda: self._transaction(work))

    async def read(self, work: Callable[[], T]) -> T:
        """*work*, on the reader's thread. Raises `StoreFailed`."""
        return await self._call(self._reader, work)

    @property
    def into(self) -> sqlite3.Connection:
        """For what runs on the writer's thread."""
        assert self._write_connection is not None
        return self._write_connection

    @property
    def out_of(self) -> sqlite3.Connection:
        """For what runs on the reader's thread."""
        if self._read_connection is None:
            self._read_connection = sqlite3.connect(
                f"file:{self._path}?mode=ro", uri=True, check_same_thread=False
            )
        return self._read_connection

    async def _call(self, thread: ThreadPoolExecutor | None, work: Callable[[], T]) -> T:
        if thread is None:
            raise StoreFailed("it is closed")
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, work)
        except (sqlite3.Error, OSError) as error:
            raise StoreFailed(f"{self._path}: {error}") from error
        except DataFolderUnusable as error:
            raise StoreFailed(error.detail) from error

    async def _keep_moving(self) -> None:
        """Move the log into the file, beside those who write: it takes up to 0.1 s."""
        while True:
            await asyncio.sleep(CHECKPOINT_S)
            try:
                await self._call(self._mover, self._move)
            except StoreFailed:
                pass  # whoever writes will see it
            except Exception:
                what = f"the log of {self._name} is not moved into the file, for a defect of ours"
                log.exception(what)
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

    def _close_reader(self) -> None:
        if self._read_connection is not None:
            self._read_connection.close()
            self._read_connection = None

    # Below: on the writer's thread.

    def _open(self) -> None:
        connection = connect(self._path, self._migrations, is_sound=self._is_doubtful)
        try:
            if self._is_doubtful:
                _settle(connection)
            connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
            connection.execute(f"PRAGMA journal_size_limit = {CHECKPOINT_PAGES * PAGE_BYTES}")
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        self._write_connection, self._is_doubtful = connection, False

    def _close(self) -> None:
        if self._write_connection is not None:
            self._write_connection.close()
            self._write_connection = None

    def _transaction(self, work: Callable[[], T]) -> T:
        """*work* in one transaction.

        After a failure the connection is opened anew, and the log is moved into the file before
        anything else is written.
        """
        if self._write_connection is None:
            self._open()
        connection = self.into
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


def _settle(connection: sqlite3.Connection) -> None:
    """Have what is in the log written into the file.

    What the system could not write once it may take for written from then on; and what comes
    after it in the log would be lost with it.
    """
    (is_busy, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if is_busy:
        raise sqlite3.OperationalError("the log cannot be moved into the file")
