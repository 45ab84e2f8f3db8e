"""What only a file can do to declarations."""

import sqlite3
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dayfly_pool.errors import DataFolderUnusable
from dayfly_pool.models import Environment, EnvironmentSpec, FunctionId, FunctionSpec
from dayfly_pool.store.declarations import StoredEnvironment
from dayfly_pool.store.sqlite_declarations import MIGRATIONS, SqliteDeclarations

GREET = FunctionId("default/greet")
SPEC = FunctionSpec(handler="main:handle", package="a" * 64, env={"B": "2", "A": "1"})
E1 = "1" * 64


def content_of(path: Path) -> bytes:
    return path.read_bytes()


def overwrite(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "dayfly.db"


@pytest.fixture
async def declarations(path: Path) -> AsyncIterator[SqliteDeclarations]:
    store = SqliteDeclarations(path)
    await store.open()
    yield store
    await store.close()


async def test_closing_twice_is_harmless_and_opening_again_works(path: Path) -> None:
    """A shutdown may be asked for from two sides."""
    store = SqliteDeclarations(path)
    await store.open()
    await store.close()
    await store.close()
    assert repr(store) == f"<SqliteDeclarations {path} closed>"
    await store.open()

    assert await store.functions() == []
    await store.close()


async def test_the_file_is_its_owners_alone(declarations: SqliteDeclarations, path: Path) -> None:
    """Specs hold `env`, where secrets are; the log beside it holds them too."""
    await declarations.save_function(GREET, SPEC, E1, now=1.0)
    files = [path, path.with_name("dayfly.db-wal")]

    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


async def test_every_commit_is_synced(declarations: SqliteDeclarations) -> None:
    """When a save returns, a power loss does not undo it: synchronous is FULL (2), in a WAL."""
    pragmas = ("synchronous", "journal_mode")
    found = await declarations._call(
        lambda: [declarations._connection.execute(f"PRAGMA {p}").fetchone()[0] for p in pragmas]
    )

    assert found == [2, "wal"]


async def test_a_database_of_a_newer_program_is_refused(path: Path) -> None:
    """And left as it is: an older program could only harm it."""
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()
    before = content_of(path)

    with pytest.raises(DataFolderUnusable, match="written by a newer Dayfly"):
        await SqliteDeclarations(path).open()
    assert content_of(path) == before


async def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    """With a remedy, and untouched."""
    overwrite(path, b"not a database " * 1000)

    with pytest.raises(DataFolderUnusable, match="good copy"):
        await SqliteDeclarations(path).open()
    assert content_of(path) == b"not a database " * 1000


async def test_a_corrupted_database_is_refused(path: Path) -> None:
    """It is checked when it is opened, not when the broken page is first met."""
    store = SqliteDeclarations(path)
    await store.open()
    large = FunctionSpec(handler="main:handle", package="a" * 64, env={"A": "a" * 30_000})
    await store.save_function(GREET, large, E1, now=1.0)
    await store.close()
    sound = content_of(path)[: 5 * 4096]  # the first pages, tables and all
    overwrite(path, sound.ljust(len(content_of(path)), b"\xee"))

    with pytest.raises(DataFolderUnusable, match="failed"):
        await SqliteDeclarations(path).open()


async def test_a_row_that_cannot_be_read_is_named(
    declarations: SqliteDeclarations, path: Path
) -> None:
    """Better no start than a start with one function less."""
    await declarations.save_function(GREET, SPEC, E1, now=1.0)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE functions SET spec = ?", (b'{"handler": 7}',))
    connection.close()

    with pytest.raises(DataFolderUnusable, match=r"function default/greet in .*dayfly\.db"):
        await declarations.functions()


async def test_an_environment_row_that_cannot_be_read_is_named(
    declarations: SqliteDeclarations, path: Path
) -> None:
    """The same for environments."""
    built = StoredEnvironment("a", "b", EnvironmentSpec(), Environment(digest=E1), 1.0)
    await declarations.save_environment(built)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE environments SET environment = ?", (b"\xff",))
    connection.close()

    with pytest.raises(DataFolderUnusable, match="environment a/b in"):
        await declarations.environments()


async def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """The operator's mistake has a name and leaves no thread."""
    store = SqliteDeclarations(tmp_path / "nowhere" / "dayfly.db")

    with pytest.raises(DataFolderUnusable, match="nowhere"):
        await store.open()
    assert "closed" in repr(store)
