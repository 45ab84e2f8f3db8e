"""What every store of declarations promises, and what one that servers share does besides."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import psycopg
import pytest
from tests.servers import Postgres

from dayfly_pool.errors import StoreFailed
from dayfly_pool.models import (
    Cron,
    Environment,
    EnvironmentSpec,
    FunctionId,
    FunctionSpec,
    InvocationId,
    TriggerSpec,
)
from dayfly_pool.store import postgres, postgres_declarations
from dayfly_pool.store.declarations import (
    Change,
    SharedStore,
    Store,
    StoredEnvironment,
    StoredFunction,
    StoredTrigger,
)
from dayfly_pool.store.postgres import Postgres as PostgresConnections
from dayfly_pool.store.postgres_declarations import MIGRATIONS, PostgresDeclarations
from dayfly_pool.store.sqlite_declarations import SqliteDeclarations

GREET = FunctionId("default/greet")
SPEC = FunctionSpec(handler="main:handle", package="a" * 64, env={"B": "2", "A": "1"})
OTHER = FunctionSpec(handler="main:other", package="b" * 64)
E1, E2 = "1" * 64, "2" * 64
EVERY_MINUTE = TriggerSpec(function="greet", cron=Cron("* * * * *"))
EVERY_HOUR = TriggerSpec(function="greet", cron=Cron("0 * * * *"))
fresh = count()


@pytest.fixture(scope="session")
def dsn() -> Iterator[str]:
    """A PostgreSQL of the session."""
    with Postgres() as started:
        yield started.dsn


@pytest.fixture
def database(dsn: str) -> str:
    """An empty one."""
    name = f"declarations_{next(fresh)}"
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return dsn.replace("dbname=postgres", f"dbname={name}")


@pytest.fixture(params=["sqlite", "postgres"])
def another(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    """Makes stores of the same declarations."""
    if request.param == "sqlite":
        return lambda: SqliteDeclarations(tmp_path / "dayfly.sqlite")
    database = str(request.getfixturevalue("database"))
    return lambda: PostgresDeclarations(database)


@pytest.fixture
async def store(another: Callable[[], Store]) -> AsyncIterator[Store]:
    made = another()
    await made.open()
    yield made
    await made.close()


async def test_versions_count_up_with_each_change(store: Store) -> None:
    """Another spec or another environment is another version."""
    first = await store.save_function(GREET, SPEC, E1, now=1.0)
    second = await store.save_function(GREET, OTHER, E1, now=2.0)
    third = await store.save_function(GREET, OTHER, E2, now=3.0)

    assert [first, second, third] == [1, 2, 3]
    assert await store.functions() == [StoredFunction(GREET, 3, OTHER, E2, 3.0)]


async def test_saving_the_same_again_changes_nothing(store: Store) -> None:
    """A redeploy of what runs must not restart it. The order of `env` says nothing."""
    same = FunctionSpec(handler="main:handle", package="a" * 64, env={"A": "1", "B": "2"})
    await store.save_function(GREET, SPEC, E1, now=1.0)
    again = await store.save_function(GREET, same, E1, now=2.0)

    assert again == 1
    assert await store.functions() == [StoredFunction(GREET, 1, SPEC, E1, 1.0)]


async def test_a_version_is_never_used_twice(store: Store) -> None:
    """Not even after a delete: a sandbox of the deleted one may still be running."""
    await store.save_function(GREET, SPEC, E1, now=1.0)
    assert await store.delete_function(GREET)
    assert not await store.delete_function(GREET)

    assert await store.save_function(GREET, SPEC, E1, now=2.0) == 2


async def test_functions_count_their_versions_apart(store: Store) -> None:
    """The same name in another namespace is another function."""
    other = FunctionId("other/greet")
    await store.save_function(GREET, SPEC, E1, now=1.0)
    await store.save_function(GREET, OTHER, E1, now=1.0)

    assert await store.save_function(other, SPEC, E1, now=1.0) == 1
    assert [found.id for found in await store.functions()] == [GREET, other]


async def test_environments_are_saved_replaced_and_deleted(store: Store) -> None:
    """The last one declared under a name counts."""
    spec = EnvironmentSpec(requirements="six", preload=("six",))
    built = Environment(digest=E2, preload=("six",), early=False, generic_min=1)
    first = StoredEnvironment("default", "web", EnvironmentSpec(), built, 1.0)
    second = StoredEnvironment("default", "web", spec, built, 2.0, "six==1.17.0\n")
    await store.save_environment(first)
    await store.save_environment(second)

    assert await store.environments() == [second]
    assert await store.delete_environment("default", "web")
    assert not await store.delete_environment("default", "web")
    assert await store.environments() == []


async def test_a_trigger_that_is_declared_again_has_seen_what_it_had_seen(store: Store) -> None:
    """Else it would fire for the past once more; one that was deleted begins anew."""
    first = StoredTrigger("default", "tick", EVERY_MINUTE, 1.0, seen=1.0)
    await store.save_trigger(first)
    await store.note_seen("default", "tick", 60.0, InvocationId("event-1"))
    await store.note_seen("default", "nothing", 60.0, InvocationId("event-1"))
    await store.save_trigger(StoredTrigger("default", "tick", EVERY_HOUR, 2.0, seen=2.0))

    assert await store.triggers() == [
        StoredTrigger("default", "tick", EVERY_HOUR, 2.0, 60.0, InvocationId("event-1"))
    ]
    assert await store.delete_trigger("default", "tick")
    assert not await store.delete_trigger("default", "tick")
    await store.save_trigger(first)
    assert await store.triggers() == [first]


async def test_specs_of_a_kind_are_in_the_order_of_their_names(store: Store) -> None:
    """Of another kind with the same name nothing changes."""
    for namespace, name in (("b", "x"), ("a", "y"), ("a", "x")):
        await store.save_spec("Queue", namespace, name, b"{}")
    await store.save_spec("Task", "a", "x", b"{1}")
    await store.save_spec("Queue", "a", "x", b"{2}")
    assert await store.delete_spec("Queue", "b", "x")
    assert not await store.delete_spec("Queue", "b", "x")

    assert await store.specs("Queue") == [("a", "x", b"{2}"), ("a", "y", b"{}")]
    assert await store.specs("Task") == [("a", "x", b"{1}")]


async def test_declarations_survive_a_restart(another: Callable[[], Store], store: Store) -> None:
    """Also those whose server was killed: nothing waits for a close."""
    await store.save_function(GREET, SPEC, E1, now=1.0)
    second = another()
    await second.open()

    assert await second.functions() == [StoredFunction(GREET, 1, SPEC, E1, 1.0)]
    assert await second.save_function(GREET, OTHER, E1, now=2.0) == 2
    await second.close()
    await second.close()


# ---- several servers ----------------------------------------------------------------------------


@pytest.fixture
async def ours(database: str) -> AsyncIterator[SharedStore]:
    async with opened(database) as store:
        yield store


@pytest.fixture
async def theirs(database: str, ours: SharedStore) -> AsyncIterator[SharedStore]:
    async with opened(database) as store:
        yield store


@asynccontextmanager
async def opened(database: str) -> AsyncIterator[SharedStore]:
    store = PostgresDeclarations(database)
    await store.open()
    yield store
    await store.close()


async def told(store: SharedStore, since: int) -> list[tuple[str, str, str, object]]:
    found = await store.changes(since)
    return [(c.kind, c.namespace, c.name, c.stored) for c in found.changes]


async def test_only_one_that_servers_share_counts_its_changes(
    ours: SharedStore, tmp_path: Path
) -> None:
    assert isinstance(ours, SharedStore)
    assert not isinstance(SqliteDeclarations(tmp_path / "x"), SharedStore)


async def test_what_others_have_changed_is_told_once_for_each_name(
    ours: SharedStore, theirs: SharedStore
) -> None:
    """As it is now, whatever happened to it; the last change last."""
    tick = StoredTrigger("default", "tick", EVERY_MINUTE, 1.0, seen=1.0)
    await theirs.save_function(GREET, SPEC, E1, now=1.0)
    await theirs.save_trigger(tick)
    await theirs.save_spec("Task", "a", "t", b"{}")
    await theirs.save_function(GREET, OTHER, E1, now=2.0)
    await theirs.delete_spec("Task", "a", "t")

    assert await told(ours, 0) == [
        ("Trigger", "default", "tick", tick),
        ("Function", "default", "greet", StoredFunction(GREET, 2, OTHER, E1, 2.0)),
        ("Task", "a", "t", None),
    ]
    revision = (await ours.changes(0)).revision
    assert revision == await ours.revision() == 5
    assert await told(ours, revision) == []


async def test_what_changes_nothing_is_no_change(ours: SharedStore, theirs: SharedStore) -> None:
    """A redeploy of what runs wakes nobody."""
    await theirs.save_function(GREET, SPEC, E1, now=1.0)
    revision = await ours.revision()
    await theirs.save_function(GREET, SPEC, E1, now=2.0)
    await theirs.delete_function(FunctionId("default/nothing"))
    await theirs.note_seen("default", "nothing", 1.0, InvocationId("event-1"))

    assert await ours.revision() == revision


async def test_more_changes_than_are_told_at_once_are_told_in_parts(
    ours: SharedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgres_declarations, "CHANGES_MAX", 2)
    for name in "abc":
        await ours.save_spec("Task", "default", name, b"{}")
    first = await ours.changes(0)
    second = await ours.changes(first.revision)

    assert not first.is_all
    assert [c.name for c in first.changes + second.changes] == ["a", "b", "c"]
    assert second.is_all


async def test_versions_stay_apart_when_two_servers_deploy_at_once(
    ours: SharedStore, theirs: SharedStore
) -> None:
    """One of them is the last, and both servers are told the same."""
    specs = [FunctionSpec(handler=f"main:h{n}", package="a" * 64) for n in range(20)]
    stores = [ours, theirs] * 10
    versions = await asyncio.gather(
        *(s.save_function(GREET, f, E1, 1.0) for s, f in zip(stores, specs, strict=True))
    )

    assert sorted(versions) == list(range(1, 21))
    last = specs[versions.index(20)]
    assert await ours.functions() == [StoredFunction(GREET, 20, last, E1, 1.0)]
    assert await told(theirs, 0) == await told(ours, 0)


async def test_no_change_becomes_visible_behind_one_that_was_told(
    ours: SharedStore, theirs: SharedStore, database: str
) -> None:
    """However writers overlap: who asks for what comes after the last one misses nothing."""

    async def write(store: SharedStore, prefix: str) -> None:
        for n in range(50):
            await store.save_spec("Task", "default", f"{prefix}{n}", b"{}")

    seen, since = list[str](), 0
    async with asyncio.TaskGroup() as tasks:
        writers = [tasks.create_task(write(ours, "a")), tasks.create_task(write(theirs, "b"))]
        async with opened(database) as reader:
            while len(seen) < 100:
                is_done = all(writer.done() for writer in writers)
                found = await reader.changes(since)
                seen, since = seen + [c.name for c in found.changes], found.revision
                assert found.changes or not is_done, "something was missed"

    assert sorted(seen) == sorted(f"{prefix}{n}" for prefix in "ab" for n in range(50))


async def test_who_listens_is_told_at_the_beginning_and_of_every_change(
    ours: SharedStore, theirs: SharedStore
) -> None:
    wake = asyncio.Event()
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(20):
        listening = tasks.create_task(ours.listen(wake.set))
        await wake.wait()
        wake.clear()
        await theirs.save_spec("Task", "default", "t", b"{}")
        await wake.wait()
        listening.cancel()


async def test_a_declaration_that_cannot_be_read_stops_no_other(
    ours: SharedStore, database: str
) -> None:
    """It may be a newer server's; but a server starts with all or not at all."""
    await ours.save_function(GREET, SPEC, E1, now=1.0)
    await ours.save_spec("Task", "default", "t", b"{}")
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("UPDATE dayfly.declarations SET spec = '{' WHERE kind = 'Function'")

    assert (await ours.changes(0)).changes == [Change("Task", "default", "t", b"{}")]
    with pytest.raises(StoreFailed, match="function default/greet"):
        await ours.functions()


async def test_a_database_of_a_newer_program_is_refused_and_left_alone(database: str) -> None:
    async with opened(database):
        pass
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO dayfly.declarations_version VALUES (%s)", (len(MIGRATIONS) + 1,)
        )

    with pytest.raises(StoreFailed, match="newer Dayfly"):
        await PostgresDeclarations(database).open()


# ---- the connections ---------------------------------------------------------------------------


async def test_a_server_that_stands_still_in_the_middle_of_a_change_holds_up_nobody(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its turn is taken from it; what it had not finished has not happened."""
    monkeypatch.setattr(postgres, "IDLE_MS_MAX", 50)
    async with asyncio.timeout(30), opened(database) as frozen, opened(database) as other:
        assert isinstance(frozen, PostgresDeclarations)

        async def stop_in_the_middle() -> None:
            async with frozen._postgres.transaction() as cursor:
                await cursor.execute("UPDATE dayfly.declared SET revision = revision + 7")
                await other.save_spec("Task", "default", "t", b"{}")
                await cursor.execute("SELECT 1")

        with pytest.raises(StoreFailed):
            await stop_in_the_middle()
        await frozen.save_spec("Task", "default", "u", b"{}")

        assert await other.revision() == 2


async def test_a_write_that_fails_ends_no_read_that_is_under_way(database: str) -> None:
    shared = PostgresConnections(database, (), "read_version")
    await shared.open()
    async with shared.reader() as cursor:
        before = cursor.connection
        with pytest.raises(StoreFailed):
            await shared.write("nonsense", ())
        await cursor.execute("SELECT 1")
        assert await cursor.fetchone() == (1,)
    async with shared.reader() as cursor:
        assert cursor.connection is not before  # what is wrong with one is mostly wrong with both
    assert before.closed
    await shared.close()


async def test_a_read_that_fails_leaves_no_connection_behind(database: str) -> None:
    shared = PostgresConnections(database, (), "read_version")
    await shared.open()
    failed = []

    async def read() -> None:
        async with shared.reader() as cursor:
            failed.append(cursor.connection)
            await cursor.execute("nonsense")

    with pytest.raises(StoreFailed):
        await read()

    assert failed[0].closed
    async with shared.reader() as cursor:
        await cursor.execute("SELECT 1")
    await shared.close()
