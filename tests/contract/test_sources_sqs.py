"""What the adapter of SQS promises besides what all of them do."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from msgspec import structs
from tests.brokers.sqs import SECRET, Place, Sqs
from tests.contract.test_sources import LONG_S, fetched, opened

from dayfly_gateway.triggers.source import SourceFailed
from dayfly_gateway.triggers.sqs import Source, Topic
from dayfly_pool.brokers import SqsSource

pytestmark = pytest.mark.waits

FIFO = {"FifoQueue": "true"}


@pytest.fixture(scope="module")
def broker() -> Iterator[Sqs]:
    with Sqs() as up:
        assert isinstance(up, Sqs)
        yield up


async def test_a_queue_keeps_what_came_before_anybody_asked(broker: Sqs):
    place = await broker.place("early")
    await place.publish(b"early")
    async with opened(place) as source:
        assert [d.body for d in await fetched(source, 1)] == [b"early"]


async def test_a_fetch_gives_more_than_one_answer_holds(broker: Sqs):
    place = await broker.place("many")
    async with opened(place) as source:
        for number in range(12):
            await place.publish(b"%d" % number)

        assert len(await source.fetch(12, 1.0)) == 12


async def test_a_fifo_queue_has_an_order_within_a_group_and_the_next_waits(broker: Sqs):
    place = await broker.place("groups.fifo", FIFO)
    async with opened(place) as source:
        for group, body in (("a", "a1"), ("b", "b1"), ("a", "a2")):
            await place.send(MessageBody=body, MessageGroupId=group, MessageDeduplicationId=body)
        first = await fetched(source, 1)

        assert [(d.group, d.body) for d in first] == [("a", b"a1")]
        (other,) = await source.fetch(10, 0.0)
        assert (other.group, other.body) == ("b", b"b1")
        await source.ack(first[0])
        assert [d.body for d in await fetched(source, 1)] == [b"a2"]


@pytest.mark.parametrize("id_", ["an-id", "ä b" * 100])
async def test_what_is_told_twice_comes_once_from_a_fifo_queue(broker: Sqs, id_: str):
    place = await broker.place("told.fifo", FIFO)
    async with opened(place) as source:
        topic = place.topic()
        await topic.open()
        await topic.tell(id_, b"once")
        await topic.tell(id_, b"once")
        await topic.close()
        (delivery,) = await source.fetch(10, 0.0)

        assert (delivery.group, delivery.body) == ("dayfly", b"once")


@pytest.mark.parametrize("body", [b"", b"\0", b"\xff", "\ufffe".encode(), "süß 🌞\r\n".encode()])
async def test_any_bytes_are_told_and_come_back(broker: Sqs, body: bytes):
    place = await broker.place("bytes")
    topic = place.topic()
    await topic.open()
    await topic.tell("an-id", body)
    await topic.close()
    async with opened(place) as source:
        (delivery,) = await fetched(source, 1)

        assert delivery.body == body
        assert delivery.headers == {"content-type": "application/cloudevents+json"}
        await source.ack(delivery)


async def test_what_others_send_is_taken_as_it_is(broker: Sqs):
    """Numbers and bytes as attributes, and what only says that it is base64."""
    place = await broker.place("others")
    attributes = {
        "Count": {"DataType": "Number", "StringValue": "3"},
        "Bytes": {"DataType": "Binary", "BinaryValue": b"\xff\0"},
        "dayfly-encoding": {"DataType": "String", "StringValue": "base64"},
    }
    await place.send(MessageBody="no base64 at all", MessageAttributes=attributes)
    async with opened(place) as source:
        (delivery,) = await fetched(source, 1)

        assert delivery.body == b"no base64 at all"
        assert delivery.headers == {"count": "3", "bytes": "/wA=", "dayfly-encoding": "base64"}
        assert delivery.at > 1.7e9


async def test_what_is_no_longer_ours_is_left_to_others(broker: Sqs):
    """An expired receipt is no failure of the broker: the message comes again."""
    place = await broker.place("expired")
    await place.publish(b"expired")
    async with opened(place) as source:
        (delivery,) = await fetched(source, 1)
        expired = structs.replace(delivery, token="no receipt of this queue")
        await source.ack(expired)
        await source.nak(expired, 1.0)
        await source.extend(expired)
        await source.ack(delivery)


async def test_a_queue_that_is_not_there_is_named_and_no_secret_is(broker: Sqs):
    place = await broker.place("there")
    spec = structs.replace(place.spec, queue=place.spec.queue.replace("there", "nowhere"))
    for each in (Source(spec, "nobody", SECRET), Topic(spec, SECRET)):
        with pytest.raises(SourceFailed) as caught:
            await each.open()
        await each.close()

        assert "nowhere, get_queue_attributes: An error occurred" in caught.value.detail
        assert "hunter2" not in caught.value.detail


@pytest.mark.parametrize("secret", ["hunter2", "hunter2\n:hunter2"])
async def test_a_secret_that_is_no_login_is_not_shown(broker: Sqs, secret: str):
    place = await broker.place("login")
    source = Source(place.spec, "nobody", secret)
    with pytest.raises(SourceFailed) as caught:
        await source.open()
    await source.close()

    assert "hunter2" not in str(caught.value)


@asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[int]:
    """A port where everybody is told the same."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.mark.parametrize(
    "answer",
    [
        b"no HTTP\r\n\r\n",
        b"HTTP/1.1 500 No\r\ncontent-length: 2\r\n\r\n[]",
        b"",
        b"HTTP/1.1 301\r\n",
    ],
)
async def test_a_stranger_who_answers_is_a_source_that_failed(answer: bytes):
    async with answering(answer) as port, asyncio.timeout(LONG_S):
        source = Source(SqsSource(queue=f"http://127.0.0.1:{port}/q"), "nobody", SECRET)
        with pytest.raises(SourceFailed):
            await source.open()
        await source.close()


async def test_nothing_is_left_of_a_source_that_was_closed(broker: Sqs):
    place: Place = await broker.place("closed")
    before = asyncio.all_tasks()
    async with opened(place) as source:
        fetching = asyncio.create_task(source.fetch(1, LONG_S))
        await asyncio.wait((fetching,), timeout=0.1)
        fetching.cancel()
        await asyncio.wait((fetching,))

    assert asyncio.all_tasks() == before
    with pytest.raises(SourceFailed):
        await source.fetch(1, 0.0)
