"""Where several servers keep their packages: what a place for them promises."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import psycopg
import pytest
from tests.servers import Postgres

from dayfly_pool.errors import StoreFailed
from dayfly_pool.store.archives import Archives
from dayfly_pool.store.postgres_archives import PIECE_BYTES, PostgresArchives

DAY_S = 86400.0
fresh = count()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with Postgres() as started:
        yield started


@pytest.fixture
def dsn(postgres: Postgres) -> str:
    """An empty database."""
    name = f"archives_{next(fresh)}"
    with psycopg.connect(postgres.dsn, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return postgres.dsn.replace("dbname=postgres", f"dbname={name}")


@pytest.fixture
def archives(dsn: str) -> Iterator[Archives]:
    made = PostgresArchives(dsn)
    yield made
    made.close()


def archive(size: int) -> tuple[str, bytes]:
    content = os.urandom(size)
    return hashlib.sha256(content).hexdigest(), content


def changed(dsn: str, statement: str) -> int:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(statement.encode()).rowcount


@pytest.mark.parametrize("size", [1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 7])
def test_what_is_put_is_given_back(archives: Archives, dsn: str, size: int):
    """Whole, to another server, and however often it was put."""
    digest, content = archive(size)
    archives.put(digest, content)
    archives.put(digest, content)
    another = PostgresArchives(dsn)

    assert another.get(digest) == content
    another.close()


def test_what_is_not_there_is_told_from_what_is(archives: Archives):
    digest, content = archive(10)
    assert archives.get(digest) is None
    assert not archives.note(digest)
    archives.put(digest, content)
    assert archives.note(digest)


def test_putting_it_again_repairs_what_was_damaged(archives: Archives, dsn: str):
    """One piece changed, one gone."""
    digest, content = archive(3 * PIECE_BYTES)
    archives.put(digest, content)
    changed(dsn, "UPDATE dayfly.package_pieces SET content = 'x' WHERE number = 0")
    changed(dsn, "DELETE FROM dayfly.package_pieces WHERE number = 2")
    assert archives.get(digest) != content

    archives.put(digest, content)
    assert archives.get(digest) == content


def test_only_what_nobody_uses_and_nobody_has_noted_lately_is_dropped(archives: Archives, dsn: str):
    """Another server may just have put it, and be about to refer to it."""
    (used, a), (old, b), (noted, c), (new, d) = (archive(10) for _ in range(4))
    for digest, content in ((used, a), (old, b), (noted, c)):
        archives.put(digest, content)
    changed(dsn, "UPDATE dayfly.packages SET noted = now() - interval '2 days'")
    archives.put(new, d)
    archives.note(noted)

    assert archives.drop({used}, DAY_S) == 1
    assert [archives.get(digest) for digest in (used, old, noted, new)] == [a, None, c, d]
    assert changed(dsn, "SELECT FROM dayfly.package_pieces") == 3


def test_many_threads_may_use_it_at_once(archives: Archives):
    some = dict(archive(PIECE_BYTES + n) for n in range(8))
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(archives.put, some.keys(), some.values()))
        assert dict(zip(some, threads.map(archives.get, some), strict=True)) == some


def test_a_connection_that_is_lost_is_made_anew(archives: Archives, dsn: str):
    """One call fails, with our name for it; the next one works."""
    digest, content = archive(10)
    archives.put(digest, content)
    changed(
        dsn,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid != pg_backend_pid()",
    )
    with pytest.raises(StoreFailed, match="PostgreSQL"):
        archives.get(digest)
    assert archives.get(digest) == content
