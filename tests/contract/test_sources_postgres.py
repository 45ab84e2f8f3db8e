"""What the adapter of PostgreSQL promises besides what all of them do: tables, and channels."""

import asyncio
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from msgspec import structs
from psycopg.sql import SQL, Identifier
from tests.brokers.postgres import Place, Postgres
from tests.contract.test_sources import LONG_S, fetched, opened

from dayfly_gateway.triggers import postgres
from dayfly_gateway.triggers.postgres import Source
from dayfly_gateway.triggers.source import SourceFailed
from dayfly_pool.brokers import PostgresSource

pytestmark = pytest.mark.waits


@pytest.fixture(scope="module")
def broker() -> Iterator[Postgres]:
    with Postgres() as up:
        assert isinstance(up, Postgres)
        yield up


# ---- tables -------------------------------------------------------------------------------------


async def test_sources_that_are_connected_at_once_never_have_the_same_row(broker: Postgres):
    place = await broker.place("shared")
    async with opened(place) as one, opened(place) as other:
        for number in range(6):
            await place.publish(b"%d" % number)
        mine = await one.fetch(2, 1.0)
        found = await other.fetch(10, 1.0)

        assert [d.body for d in mine] == [b"0", b"1"]
        assert [d.body for d in found] == [b"2", b"3", b"4", b"5"]
        assert await one.lag() == await other.lag() == 0
        await one.nak(mine[1], 0.0)
        assert await other.lag() == 1
        assert [d.body for d in await fetched(other, 1)] == [b"1"]
    async with opened(place) as source:
        assert len(await fetched(source, 6)) == 6


async def test_each_of_many_rows_is_given_once_to_sources_that_race(broker: Postgres):
    """A row that was read before its lock was free may be gone by then: it is read once more."""
    place = await broker.place("race")
    number = 300
    many = SQL("INSERT INTO race (body) SELECT n::text::bytea FROM generate_series(1, {}) AS n")
    await place.run(many.format(number))
    bodies: list[bytes] = []

    async def work() -> None:
        async with opened(place) as source:
            while len(bodies) < number:
                for delivery in await source.fetch(3, 0.1):
                    bodies.append(delivery.body)
                    await source.ack(delivery)

    async with asyncio.timeout(LONG_S), asyncio.TaskGroup() as tasks:
        for _ in range(4):
            tasks.create_task(work())

    assert sorted(bodies, key=int) == [b"%d" % n for n in range(1, number + 1)]


async def test_a_row_that_goes_before_its_lock_is_had_is_not_given(
    broker: Postgres, monkeypatch: pytest.MonkeyPatch
):
    """Somebody else ended its event: what the first look saw is no longer there."""
    place = await broker.place("gone")
    for _ in range(3):
        await place.publish(b"gone")
    rows = postgres._Link.rows

    async def late(link: postgres._Link, query: Any, *parameters: Any) -> list[Any]:
        found = await rows(link, query, *parameters)
        if "pg_try_advisory_lock" in query.as_string(None):
            await place.run(SQL("DELETE FROM gone WHERE id IN (1, 3)"))
        return found

    monkeypatch.setattr(postgres._Link, "rows", late)
    async with opened(place) as source:
        found = await source.fetch(10, 1.0)
        with psycopg.connect(broker.dsn) as connection:
            locks = connection.execute(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
            ).fetchone()

        assert len(found) == 1
        assert locks == (1,)


async def test_no_transaction_stays_open_while_an_event_is_under_way(broker: Postgres):
    place = await broker.place("vacuum")
    await place.publish(b"long")
    async with opened(place) as source:
        await fetched(source, 1)
        with psycopg.connect(broker.dsn) as connection:
            found = connection.execute(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
                " AND (backend_xid IS NOT NULL OR backend_xmin IS NOT NULL)"
            ).fetchone()

        assert found == (0,)


async def test_a_row_that_changes_while_it_is_under_way_is_another_event(broker: Postgres):
    place = await broker.place("changed")
    await place.publish(b"old")
    async with opened(place) as source:
        (old,) = await fetched(source, 1)
        await place.run(SQL("UPDATE changed SET body = 'new'"))
        await source.ack(old)
        (new,) = await fetched(source, 1)

        assert new.body == b"new"
        assert new.id != old.id
        await source.ack(new)
        assert await source.lag() == 0


async def test_a_table_that_is_made_anew_has_new_ids(broker: Postgres):
    ids = set()
    for _ in range(2):
        place = await broker.place("anew")
        await place.publish(b"same")
        async with opened(place) as source:
            (delivery,) = await fetched(source, 1)
            ids.add(delivery.id)

    assert len(ids) == 2


TYPES = [
    ("uuid", "gen_random_uuid()", "text", "'süß'", "süß".encode()),
    ("text", "repeat('k', 2000)", "jsonb", """'{"a": [1, null]}'""", b'{"a": [1, null]}'),
    ("date", "'infinity'", "bytea", "NULL", b""),
    ("bytea", "'\\xff'", "json", "'[]'", b"[]"),
]


@pytest.mark.parametrize(("key", "id_", "kind", "value", "body"), TYPES)
async def test_keys_and_bodies_are_of_many_types(
    broker: Postgres, key: str, id_: str, kind: str, value: str, body: bytes
):
    create = 'DROP SCHEMA IF EXISTS "Odd" CASCADE; CREATE SCHEMA "Odd"; CREATE TABLE "Odd"."T$"'
    with psycopg.connect(broker.dsn) as connection:
        connection.execute(f"{create} (id {key} PRIMARY KEY, body {kind})".encode())
        connection.execute(f'INSERT INTO "Odd"."T$" VALUES ({id_}, {value})'.encode())
    source = Source(PostgresSource(server=broker.dsn, table="Odd.T$"), "odd")
    await source.open()
    (delivery,) = await fetched(source, 1)
    await source.nak(delivery, 0.0)
    (again,) = await fetched(source, 1)
    await source.ack(again)

    assert (again.body, again.id, again.headers) == (body, delivery.id, {})
    assert await source.fetch(1, 0.0) == []
    await source.close()


HEADERS = [
    ("""{"A": 1, "b": {"c": null}, "d": "e"}""", {"a": "1", "b": '{"c":null}', "d": "e"}),
    ("[1]", {}),
    ("null", {}),
    ("[" * 3000 + "]" * 3000, {}),
    ('{"long": "' + "x" * 70_000 + '"}', {}),
]


@pytest.mark.parametrize(("text", "headers"), HEADERS)
async def test_headers_that_are_none_are_survived(
    broker: Postgres, text: str, headers: dict[str, str]
):
    place = await broker.place("headers")
    await place.run(SQL("INSERT INTO headers (body, headers) VALUES ('', %s::jsonb)"), (text,))
    async with opened(place) as source:
        (delivery,) = await fetched(source, 1)

        assert delivery.headers == headers


async def test_a_body_that_is_too_long_is_said_to_be(broker: Postgres):
    place = await broker.place("long")
    size = postgres.BODY_BYTES_MAX + 1
    await place.run(SQL("INSERT INTO long (body) VALUES (repeat('x', {})::bytea)").format(size))
    async with opened(place) as source:
        (delivery,) = await fetched(source, 1)

        assert (delivery.body, delivery.headers, delivery.unread) == (b"", {}, size)


async def test_a_row_that_nobody_has_read_is_not_deleted(broker: Postgres):
    place = await broker.place("unread")
    size = postgres.BODY_BYTES_MAX + 1
    await place.run(SQL("INSERT INTO unread (body) VALUES (repeat('x', {})::bytea)").format(size))
    async with opened(place) as source:
        (delivery,) = await fetched(source, 1)
        await source.ack(delivery)

        assert await source.fetch(1, 0.0) == []
    async with opened(place) as source:
        (again,) = await fetched(source, 1)

        assert again.id == delivery.id


async def test_a_cancelled_fetch_leaves_what_it_locked_to_the_next(broker: Postgres):
    place = await broker.place("cancelled")
    async with opened(place) as source:
        for number in range(100):
            await place.publish(b"%d" % number)
        bodies = []
        async with asyncio.timeout(LONG_S):
            while len(bodies) < 100:
                fetching = asyncio.create_task(source.fetch(1, 0.0))
                for _ in range(len(bodies) % 7):
                    await asyncio.sleep(0)
                fetching.cancel()
                await asyncio.wait((fetching,))
                done = [] if fetching.cancelled() else fetching.result()
                bodies += [d.body for d in done + await source.fetch(1, 0.0)]

        assert bodies == [b"%d" % number for number in range(100)]


async def test_a_row_that_somebody_else_holds_keeps_nobody_for_ever(broker: Postgres):
    place = await broker.place("held")
    await place.publish(b"held")
    async with opened(place, call_s=0.5) as source:
        (delivery,) = await fetched(source, 1)
        with psycopg.connect(broker.dsn) as connection:
            connection.execute("SELECT FROM held FOR UPDATE")
            async with asyncio.timeout(LONG_S):
                with pytest.raises(SourceFailed):
                    await source.ack(delivery)


@pytest.mark.parametrize("table", ["nowhere", "pg_class", "no.where"])
async def test_a_table_that_is_not_there_or_has_no_body_is_named(broker: Postgres, table: str):
    source = Source(PostgresSource(server=broker.dsn, table=table), "nobody", "dayfly:hunter2")
    with pytest.raises(SourceFailed) as caught:
        await source.open()
    await source.close()

    assert table.partition(".")[0] in caught.value.detail
    assert "hunter2" not in caught.value.detail


async def test_a_login_that_is_refused_is_named_without_its_password(broker: Postgres):
    spec = PostgresSource(server=broker.dsn, table="t")
    source = Source(spec, "nobody", "stranger:hunter2")
    with pytest.raises(SourceFailed) as caught:
        await source.open()
    await source.close()

    assert 'role "stranger" does not exist' in caught.value.detail
    assert "hunter2" not in caught.value.detail


async def test_a_connection_that_is_ended_by_the_server_is_told(broker: Postgres):
    place = await broker.place("ended")
    async with opened(place) as source:
        end = SQL(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
        await place.run(end)
        with pytest.raises(SourceFailed):
            await source.fetch(1, LONG_S)


async def test_nothing_is_left_of_a_source_that_was_closed(broker: Postgres):
    place = await broker.place("closed")
    before = asyncio.all_tasks()
    async with opened(place) as source:
        fetching = asyncio.create_task(source.fetch(1, LONG_S))
        await asyncio.sleep(0)
        fetching.cancel()
        await asyncio.wait((fetching,))

    assert asyncio.all_tasks() == before
    with pytest.raises(SourceFailed):
        await source.fetch(1, 0.0)


# ---- channels -----------------------------------------------------------------------------------


def channel(broker: Postgres) -> Place:
    """A place where `publish` is not used: what is notified has no id and no headers."""
    place = Place(broker.dsn, "orders")
    place.spec = PostgresSource(server=broker.dsn, channel="orders")
    return place


NOTIFY = SQL("SELECT pg_notify('orders', %s)")


async def test_what_is_notified_while_somebody_listens_is_fetched_in_order(broker: Postgres):
    place = channel(broker)
    async with opened(place) as source:
        waiting = asyncio.create_task(source.fetch(10, LONG_S))
        await asyncio.sleep(0)
        await place.run(NOTIFY, ("süß",))
        (first,) = await waiting
        for number in range(5):
            await place.run(NOTIFY, (str(number),))
        found = await fetched(source, 5)

        assert (first.body, first.id, first.topic) == ("süß".encode(), "", "orders")
        assert [d.body for d in found] == [b"0", b"1", b"2", b"3", b"4"]
        assert await source.lag() is None
        await source.ack(first)


async def test_what_is_notified_while_nobody_listens_is_lost(broker: Postgres):
    place = channel(broker)
    await place.run(NOTIFY, ("lost",))
    async with opened(place) as source:
        await place.run(NOTIFY, ("heard",))

        assert [d.body for d in await fetched(source, 1)] == [b"heard"]


async def test_a_notification_that_is_given_back_comes_again_after_its_delay(broker: Postgres):
    place = channel(broker)
    async with opened(place) as source:
        await place.run(NOTIFY, ("again",))
        (first,) = await fetched(source, 1)
        await source.nak(first, 0.3)
        assert await source.fetch(1, 0.05) == []
        (second,) = await source.fetch(1, LONG_S)

        assert second == structs.replace(first, attempt=2)


async def test_a_fetch_of_notifications_takes_no_more_than_was_asked_and_keeps_the_rest(
    broker: Postgres,
):
    place = channel(broker)
    async with opened(place) as source:
        await place.run(SQL("SELECT pg_notify('orders', n::text) FROM generate_series(1, 50) AS n"))
        bodies = [d.body for _ in range(50) for d in await source.fetch(1, LONG_S)]

        assert bodies == [b"%d" % n for n in range(1, 51)]


async def test_who_listens_to_a_server_that_is_gone_or_stands_still_is_told(broker: Postgres):
    place = channel(broker)
    async with opened(place, call_s=0.5) as source, asyncio.timeout(2 * LONG_S):
        broker.pause()
        try:
            with pytest.raises(SourceFailed):
                await source.fetch(1, 0.1)
        finally:
            broker.resume()
    async with opened(place) as source, asyncio.timeout(2 * LONG_S):
        broker.stop()
        try:
            with pytest.raises(SourceFailed):
                await source.fetch(1, LONG_S)
        finally:
            broker.start()


def test_names_are_quoted_by_the_client():
    """A declaration's pattern lets no quotes in; and if it did, nothing would come of it."""
    assert Identifier('a"; DROP TABLE b; --').as_string(None) == '"a""; DROP TABLE b; --"'
