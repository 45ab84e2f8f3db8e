"""A SQLite file of ours: opened safely, and brought to this program's tables."""

import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dayfly_pool.errors import DataFolderUnusable

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
