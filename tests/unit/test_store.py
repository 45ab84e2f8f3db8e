"""Declarations that survive a restart."""

import sqlite3
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dayfly_pool.errors import DataFolderUnusable
from dayfly_pool.models import Environment, EnvironmentSpec, FunctionId, FunctionSpec
from dayfly_pool.store.sqlite import (
    MIGRATIONS,
    Declarations,
    StoredEnvironment,
    StoredFunction,
)

GREET = FunctionId("default/greet")
SPEC = FunctionSpec(handler="main:handle", package="a" * 64, env={"B": "2", "A": "1"})
OTHER = FunctionSpec(handler="main:other", package="b" * 64)
E1, E2 = "1" * 64, "2" * 64


def content_of(path: Path) -> bytes:
    return path.read_bytes()


def overwrite(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "dayfly.db"


@pytest.fixture
async def declarations(path: Path) -> AsyncIterator[Declarations]:
    store = Declarations(path)
    await store.open()
    yield store
    await store.close()


async def test_versions_count_up_with_each_change(declarations: Declarations) -> None:
    """Another spec or another environment is another version."""
    first = await declarations.save_function(GREET, SPEC, E1, now=1.0)
    second = await declarations.save_function(GREET, OTHER, E1, now=2.0)
    third = await declarations.save_function(GREET, OTHER, E2, now=3.0)

    assert [first, second, third] == [1, 2, 3]
    assert await declarations.functions() == [StoredFunction(GREET, 3, OTHER, E2, 3.0)]


async def test_saving_the_same_again_changes_nothing(declarations: Declarations) -> None:
    """A redeploy of what runs must not restart it. The order of `env` says nothing."""
    same = FunctionSpec(handler="main:handle", package="a" * 64, env={"A": "1", "B": "2"})
    await declarations.save_function(GREET, SPEC, E1, now=1.0)
    again = await declarations.save_function(GREET, same, E1, now=2.0)

    assert again == 1
    assert await declarations.functions() == [StoredFunction(GREET, 1, SPEC, E1, 1.0)]


async def test_a_version_is_never_used_twice(declarations: Declarations) -> None:
    """Not even after a delete: a sandbox of the deleted one may still be running."""
    await declarations.save_function(GREET, SPEC, E1, now=1.0)
    assert await declarations.delete_function(GREET)
    assert not await declarations.delete_function(GREET)

    assert await declarations.save_function(GREET, SPEC, E1, now=2.0) == 2


async def test_functions_count_their_versions_apart(declarations: Declarations) -> None:
    """The same name in another namespace is another function."""
    other = FunctionId("other/greet")
    await declarations.save_function(GREET, SPEC, E1, now=1.0)
    await declarations.save_function(GREET, OTHER, E1, now=1.0)

    assert await declarations.save_function(other, SPEC, E1, now=1.0) == 1
    assert [found.id for found in await declarations.functions()] == [GREET, other]


async def test_environments_are_saved_replaced_and_deleted(declarations: Declarations) -> None:
    """The last one declared under a name counts."""
    spec = EnvironmentSpec(requirements="six", preload=("six",))
    built = Environment(digest=E2, path="/x", preload=("six",), early=False, generic_min=1)
    await declarations.save_environment("default", "web", EnvironmentSpec(), built, now=1.0)
    await declarations.save_environment("default", "web", spec, built, now=2.0)

    assert await declarations.environments() == [
        StoredEnvironment("default", "web", spec, built, 2.0)
    ]
    assert await declarations.delete_environment("default", "web")
    assert not await declarations.delete_environment("default", "web")
    assert await declarations.environments() == []


async def test_declarations_survive_a_restart(path: Path) -> None:
    """Also those whose server was killed: nothing waits for a close."""
    first = Declarations(path)
    await first.open()
    await first.save_function(GREET, SPEC, E1, now=1.0)
    second = Declarations(path)
    await second.open()

    assert await second.functions() == [StoredFunction(GREET, 1, SPEC, E1, 1.0)]
    assert await second.save_function(GREET, OTHER, E1, now=2.0) == 2
    await first.close()
    await second.close()


async def test_closing_twice_is_harmless_and_opening_again_works(path: Path) -> None:
    """A shutdown may be asked for from two sides."""
    store = Declarations(path)
    await store.open()
    await store.close()
    await store.close()
    assert repr(store) == f"<Declarations {path} closed>"
    await store.open()

    assert await store.functions() == []
    await store.close()


async def test_the_file_is_its_owners_alone(declarations: Declarations, path: Path) -> None:
    """Specs hold `env`, where secrets are; the log beside it holds them too."""
    await declarations.save_function(GREET, SPEC, E1, now=1.0)
    files = [path, path.with_name("dayfly.db-wal")]

    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


async def test_every_commit_is_synced(declarations: Declarations) -> None:
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
        await Declarations(path).open()
    assert content_of(path) == before


async def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    """With a remedy, and untouched."""
    overwrite(path, b"not a database " * 1000)

    with pytest.raises(DataFolderUnusable, match="good copy"):
        await Declarations(path).open()
    assert content_of(path) == b"not a database " * 1000


async def test_a_corrupted_database_is_refused(path: Path) -> None:
    """It is checked when it is opened, not when the broken page is first met."""
    store = Declarations(path)
    await store.open()
    large = FunctionSpec(handler="main:handle", package="a" * 64, env={"A": "a" * 30_000})
    await store.save_function(GREET, large, E1, now=1.0)
    await store.close()
    sound = content_of(path)[: 5 * 4096]  # the first pages, tables and all
    overwrite(path, sound.ljust(len(content_of(path)), b"\xee"))

    with pytest.raises(DataFolderUnusable, match="failed"):
        await Declarations(path).open()


async def test_a_row_that_cannot_be_read_is_named(declarations: Declarations, path: Path) -> None:
    """Better no start than a start with one function less."""
    await declarations.save_function(GREET, SPEC, E1, now=1.0)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE functions SET spec = ?", (b'{"handler": 7}',))
    connection.close()

    with pytest.raises(DataFolderUnusable, match=r"function default/greet in .*dayfly\.db"):
        await declarations.functions()


async def test_an_environment_row_that_cannot_be_read_is_named(
    declarations: Declarations, path: Path
) -> None:
    """The same for environments."""
    await declarations.save_environment("a", "b", EnvironmentSpec(), Environment(digest=E1), 1.0)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE environments SET environment = ?", (b"\xff",))
    connection.close()

    with pytest.raises(DataFolderUnusable, match="environment a/b in"):
        await declarations.environments()


async def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """The operator's mistake has a name and leaves no thread."""
    store = Declarations(tmp_path / "nowhere" / "dayfly.db")

    with pytest.raises(DataFolderUnusable, match="nowhere"):
        await store.open()
    assert "closed" in repr(store)
