"""What is Redis's own of what its adapter promises."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from tests.brokers.redis import Place, Redis

from dayfly_gateway.triggers.redis import Source, Topic
from dayfly_gateway.triggers.source import SourceFailed
from dayfly_pool.brokers import RedisSource

pytestmark = pytest.mark.waits


@pytest.fixture(scope="module")
def redis() -> Iterator[Redis]:
    with Redis() as up:
        yield up


@pytest.fixture
async def place(redis: Redis, request: pytest.FixtureRequest) -> Place:
    return await redis.place(request.node.originalname)


@asynccontextmanager
async def opened(place: Place, lease_s: float = 30.0) -> AsyncIterator[Source]:
    source = place.source(lease_s)
    await source.open()
    try:
        yield source
    finally:
        await source.close()


async def test_an_entry_without_the_field_is_an_event_of_all_its_fields(place: Place):
    """Whatever bytes they are."""
    await place.command("XADD", place.spec.stream, "*", b"Kind\xff", b"\xfe", "n", "1")
    async with opened(place) as source:
        (delivery,) = await source.fetch(1, 5.0)

        assert json.loads(delivery.body) == {"Kind\ufffd": "\ufffd", "n": "1"}
        assert delivery.headers == {"kind\ufffd": "\ufffd", "n": "1"}


async def test_another_field_may_be_the_event(place: Place):
    place.spec = msgspec.structs.replace(place.spec, field="Data")
    await place.command("XADD", place.spec.stream, "*", "Data", "this", "body", "not this")
    async with opened(place) as source:
        (delivery,) = await source.fetch(1, 5.0)

        assert delivery.body == b"this"
        assert delivery.headers == {"body": "not this"}


async def test_an_entry_of_a_stream_that_was_made_anew_is_another_one(place: Place):
    """Also if it has the same id, which who publishes may choose."""
    await place.command("XADD", place.spec.stream, "5-1", "body", "old")
    async with opened(place) as source:
        (old,) = await source.fetch(1, 5.0)
        await place.command("DEL", place.spec.stream)
        await place.command("XADD", place.spec.stream, "5-1", "body", "new")
        with pytest.raises(SourceFailed, match="NOGROUP"):
            await source.fetch(1, 5.0)
    async with opened(place) as source:
        (new,) = await source.fetch(1, 5.0)

        assert new.id != old.id


async def test_an_id_that_is_no_time_is_not_taken_for_one(place: Place):
    await place.command("XADD", place.spec.stream, f"{2**64 - 1}-0", "body", "x")
    async with opened(place) as source:
        (delivery,) = await source.fetch(1, 5.0)

        assert delivery.at == 0.0


async def test_what_was_trimmed_while_it_was_under_way_holds_up_nothing(place: Place):
    async with opened(place, 0.2) as source:
        for body in (b"trimmed", b"kept"):
            await place.publish(body)
        assert len(await source.fetch(2, 5.0)) == 2
        await place.command("XTRIM", place.spec.stream, "MAXLEN", "1")

        assert [d.body for d in await source.fetch(2, 5.0)] == [b"kept"]


async def test_who_has_lost_a_message_cannot_take_it_back(place: Place):
    """Neither by extending it nor by giving it back."""
    async with opened(place, 0.2) as slow:
        await place.publish(b"one")
        (lost,) = await slow.fetch(1, 5.0)
    async with opened(place, 0.2) as taker:
        (taken,) = await taker.fetch(1, 5.0)
        async with opened(place, 30.0) as other:
            await other.extend(lost)
            await other.nak(lost, 0.0)
            assert await other.fetch(1, 0.05) == []

    assert taken.attempt == 2


async def test_a_delay_may_be_longer_than_a_lease(place: Place):
    """For as long as somebody fetches who knows of it."""
    async with opened(place, 0.6) as source, opened(place, 0.6) as other:
        await place.publish(b"later")
        (delivery,) = await source.fetch(1, 5.0)
        at = asyncio.get_running_loop().time()
        await source.nak(delivery, 1.0)
        found, others = await asyncio.gather(source.fetch(1, 1.5), other.fetch(1, 0.9))

        assert others == []
        assert [d.attempt for d in found] == [2]
        assert asyncio.get_running_loop().time() - at > 0.99


async def test_what_another_consumer_of_the_group_left_is_taken_over(place: Place):
    place.spec = msgspec.structs.replace(place.spec, group="shared")
    async with opened(place, 0.2) as source:
        await place.publish(b"left")
        reading = ("XREADGROUP", "GROUP", "shared", "theirs", "STREAMS", place.spec.stream, ">")
        await place.command(*reading)
        (delivery,) = await source.fetch(1, 5.0)

        assert (delivery.body, delivery.attempt) == (b"left", 2)


async def test_a_group_may_begin_with_what_comes(place: Place):
    await place.publish(b"before")
    place.spec = msgspec.structs.replace(place.spec, start="latest")
    async with opened(place) as source:
        await place.publish(b"after")

        assert [d.body for d in await source.fetch(9, 5.0)] == [b"after"]


async def test_a_topic_keeps_about_as_many_as_it_is_to(place: Place):
    topic = Topic(msgspec.structs.replace(place.topic_spec, length_max=10))
    await topic.open()
    for number in range(300):
        await topic.tell(str(number), b"{}")
    await topic.close()

    assert await place.command("XLEN", place.spec.stream) < 300


async def test_who_has_the_login_is_let_in_and_nobody_else(place: Place):
    await place.command("ACL", "SETUSER", "user", "on", ">pass:word", "~*", "+@all")
    source = Source(place.spec, "name", "user:pass:word")
    await source.open()
    await source.close()
    for secret in ("user:hunter2", "hunter2"):
        source = Source(place.spec, "name", secret)
        with pytest.raises(SourceFailed) as caught:
            await source.open()
        await source.close()
        assert "hunter2" not in str(caught.value)


async def test_a_server_that_repeats_the_login_does_not_get_it_told(place: Place):
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"hunter2")
        writer.write(b"-ERR unknown command 'AUTH', with args beginning with: 'hunter2'\r\n")
        await reader.read()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        source = Source(RedisSource(url=f"redis://127.0.0.1:{port}", stream="s"), "n", "hunter2")
        with pytest.raises(SourceFailed, match="unknown command") as caught:
            await source.open()
        await source.close()

    assert "hunter2" not in str(caught.value)


async def test_no_task_is_left(redis: Redis, place: Place):
    """Not by a server that stands still while its source is closed either."""
    before = asyncio.all_tasks()
    async with opened(place) as source:
        fetching = asyncio.create_task(source.fetch(1, 20.0))
        await asyncio.wait((fetching,), timeout=0.05)
        fetching.cancel()
        redis.pause()
    redis.resume()
    await asyncio.wait((fetching,))

    assert asyncio.all_tasks() == before


@pytest.mark.parametrize("url", ["redis://u:p@h", "http://h", "redis://a,redis://b", "redis://"])
def test_an_address_is_one_and_holds_no_login(url: str):
    with pytest.raises(ValueError, match="url"):
        RedisSource(url=url, stream="s")
