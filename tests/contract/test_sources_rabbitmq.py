"""What is RabbitMQ's own of what its adapter promises."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import aiormq
import msgspec
import pytest
from aiormq.abc import ChannelFrame
from pamqp import encode
from pamqp.body import ContentBody
from pamqp.commands import Basic
from pamqp.header import ContentHeader
from tests.brokers.rabbitmq import Place, RabbitMq

from dayfly_gateway.triggers.rabbitmq import Source, Topic
from dayfly_gateway.triggers.source import SourceFailed
from dayfly_pool.brokers import RabbitMqSource

pytestmark = pytest.mark.waits


@pytest.fixture(scope="module")
def rabbitmq() -> Iterator[RabbitMq]:
    with RabbitMq() as up:
        yield up


@pytest.fixture
async def place(rabbitmq: RabbitMq, request: pytest.FixtureRequest) -> Place:
    return await rabbitmq.place(request.node.originalname)


@asynccontextmanager
async def opened(place: Place) -> AsyncIterator[Source]:
    source = place.source()
    await source.open()
    try:
        yield source
    finally:
        await source.close()


@asynccontextmanager
async def channel(place: Place) -> AsyncIterator[Any]:
    async with aiormq.connect(place.spec.url) as connection:
        yield await connection.channel()


def moved(place: Place, **changes: Any) -> Place:
    """The same place with another declaration."""
    place.spec = msgspec.structs.replace(place.spec, **changes)
    return place


async def test_a_queue_that_is_not_there_is_a_quorum_queue_bound_to_the_exchange(place: Place):
    place = moved(place, queue="made", exchange="amq.topic", routing_key="orders.#")
    async with opened(place) as source, channel(place) as other:
        await other.basic_publish(b"x", exchange="amq.topic", routing_key="orders.eu.new")
        (delivery,) = await source.fetch(1, 5.0)

        assert (delivery.topic, delivery.group) == ("amq.topic/orders.eu.new", "orders.eu.new")
    async with opened(place) as source:
        (delivery,) = await source.fetch(1, 5.0)

        assert delivery.headers["x-delivery-count"] == "1"  # only quorum queues count
        assert delivery.attempt == 2


async def test_a_classic_queue_says_that_a_message_was_given_out_before(place: Place):
    async with channel(place) as other:
        await other.queue_declare("classic", durable=True)
        await other.basic_publish(b"x", routing_key="classic")
    attempts = []
    for _ in range(3):
        async with opened(moved(place, queue="classic")) as source:
            attempts += [d.attempt for d in await source.fetch(1, 5.0)]

    assert attempts == [1, 2, 2]


async def test_two_sources_share_a_queue_and_neither_holds_what_it_was_not_asked_for(place: Place):
    async with opened(place) as one, opened(place) as other:
        for number in range(6):
            await place.publish(b"%d" % number)
        assert await one.fetch(1, 5.0)
        found: list[bytes] = []
        async with asyncio.timeout(10.0):
            while len(found) < 5:
                found += [d.body for d in await other.fetch(5, 1.0)]

        assert found == [b"1", b"2", b"3", b"4", b"5"]


async def test_a_cancelled_fetch_costs_no_attempt(place: Place):
    """Nor the connection, which the client ends with a call that is cancelled."""
    async with opened(place) as source:
        await place.publish(b"held")
        (held,) = await source.fetch(1, 5.0)
        for wait_s in (0.0, 0.001, 0.003, 0.01):
            fetching = asyncio.create_task(source.fetch(1, 30.0))
            await asyncio.wait((fetching,), timeout=wait_s)
            fetching.cancel()
            await asyncio.wait((fetching,))
            async with asyncio.timeout(10.0):
                assert await source.fetch(1, 0.0) == []
        await place.publish(b"next")
        (following,) = await source.fetch(1, 5.0)

        assert (following.body, following.attempt) == (b"next", 1)
        await source.ack(held)
        await source.ack(following)


async def test_what_was_over_before_costs_nothing(place: Place):
    """The broker numbers messages by connection, and ends one that names a wrong number."""
    async with opened(place) as source:
        await place.publish(b"x")
        (old,) = await source.fetch(1, 5.0)
    async with opened(place) as source:
        (new,) = await source.fetch(1, 5.0)
        await source.ack(old)
        await source.nak(old, 0.0)
    async with opened(place) as source:
        (new,) = await source.fetch(1, 5.0)
        for _ in range(2):
            await source.ack(new)

        assert new.body == b"x"
        assert await source.fetch(1, 0.1) == []


async def test_what_is_given_back_costs_the_broker_no_delivery(place: Place):
    """RabbitMQ 4 throws a message away after so many."""
    async with opened(place) as source:
        await place.publish(b"x")
        for attempt in range(1, 30):
            (delivery,) = await source.fetch(1, 5.0)
            assert delivery.attempt == attempt
            await source.nak(delivery, 0.0)
    async with opened(place) as source:
        (delivery,) = await source.fetch(1, 5.0)

        assert delivery.attempt == 2


async def test_headers_of_any_kind_are_text(place: Place):
    headers = {
        "N": 1,
        "No": None,
        "Yes": True,
        "Raw": bytearray(b"\xff\xfe"),
        "List": [1, "a"],
        "T": {"a": 1},
    }
    about = Basic.Properties(
        headers=headers,
        content_type="text/plain",
        correlation_id="c",
        timestamp=datetime(2020, 1, 1, tzinfo=UTC),
    )
    async with channel(place) as other, opened(place) as source:
        await other.basic_publish(b"", routing_key=place.spec.queue, properties=about)
        (delivery,) = await source.fetch(1, 5.0)

        assert all(isinstance(value, str) for value in delivery.headers.values())
        assert delivery.headers["raw"] == "\ufffd\ufffd"
        assert delivery.headers["content-type"] == "text/plain"
        assert delivery.headers["correlation-id"] == "c"
        assert delivery.at == datetime(2020, 1, 1, tzinfo=UTC).timestamp()


async def raw(place: Place, about: Basic.Properties, body: bytes = b"x") -> None:
    """Publish that as it is: the client gives each message an id."""
    async with channel(place) as other:
        frames = [
            Basic.Publish(routing_key=place.spec.queue),
            ContentHeader(body_size=len(body), properties=about),
            ContentBody(body),
        ]
        marshalled = ChannelFrame.marshall(channel_number=other.number, frames=frames)
        await other.write_queue.put(marshalled)
        await other.confirm_delivery()


async def test_a_message_has_the_id_that_its_publisher_gave_it(place: Place):
    """If it gave none there is none; if it gave it twice, these are two messages nevertheless."""
    async with opened(place) as source:
        await raw(place, Basic.Properties(delivery_mode=2))
        await raw(place, Basic.Properties(delivery_mode=2, message_id="1"), b"a")
        await raw(place, Basic.Properties(delivery_mode=2, message_id="1"), b"b")
        ids = [(await source.fetch(1, 5.0))[0].id for _ in range(3)]

        assert ids[0] == ""
        assert len(set(ids)) == 3


@pytest.mark.parametrize("kind", ["shortstr", "timestamp"])
async def test_a_message_that_the_client_cannot_read_is_told(
    place: Place, kind: str, monkeypatch: pytest.MonkeyPatch
):
    """And holds up what is behind it, until somebody takes it away."""
    about = Basic.Properties(message_id="no text", timestamp=datetime(2020, 1, 1, tzinfo=UTC))
    right, wrong = encode.METHODS[kind], {"no text": b"\x01\xff", about.timestamp: b"\xff" * 8}
    monkeypatch.setitem(
        encode.METHODS, kind, lambda value: wrong[value] if value in wrong else right(value)
    )
    async with opened(place) as source:
        await raw(place, about)
        with pytest.raises(SourceFailed, match="fetch"):
            await source.fetch(1, 5.0)


async def test_what_no_queue_takes_is_not_told(place: Place):
    spec = msgspec.structs.replace(place.topic_spec, routing_key="nobody")
    for each, why in (
        (spec, "NO_ROUTE"),
        (msgspec.structs.replace(spec, exchange="no"), "NOT_FOU"),
    ):
        topic = Topic(each)
        await topic.open()
        with pytest.raises(SourceFailed, match=why):
            await topic.tell("id", b"{}")
        await topic.close()


async def test_a_queue_that_is_deleted_ends_the_source(place: Place):
    async with opened(place) as source, channel(place) as other:
        fetching = asyncio.create_task(source.fetch(1, 20.0))
        await asyncio.wait((fetching,), timeout=0.05)
        await other.queue_delete(place.spec.queue)
        async with asyncio.timeout(10.0):
            with pytest.raises(SourceFailed):
                await fetching
            with pytest.raises(SourceFailed):
                await source.fetch(1, 5.0)


async def test_a_refused_login_is_told_without_the_secret(place: Place):
    for secret in ("guest:hunter2", "hunter2"):
        source = Source(place.spec, "name", secret)
        with pytest.raises(SourceFailed, match="ACCESS_REFUSED") as caught:
            await source.open()
        await source.close()
        assert "hunter2" not in str(caught.value)
    source = Source(place.spec, "name", "guest:guest")
    await source.open()
    await source.close()


async def test_no_task_is_left(rabbitmq: RabbitMq, place: Place):
    """Not by a server that stands still while its source is closed either."""
    before = asyncio.all_tasks()
    async with opened(place) as source:
        fetching = asyncio.create_task(source.fetch(1, 20.0))
        await asyncio.wait((fetching,), timeout=0.05)
        fetching.cancel()
        await asyncio.wait((fetching,))
        rabbitmq.pause()
    rabbitmq.resume()

    assert asyncio.all_tasks() == before


@pytest.mark.parametrize("url", ["amqp://u:p@h", "http://h", "amqp://a,amqp://b", "amqp://"])
def test_an_address_is_one_and_holds_no_login(url: str):
    with pytest.raises(ValueError, match="url"):
        RabbitMqSource(url=url, queue="q")
