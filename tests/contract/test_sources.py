"""What every adapter of a broker promises (`triggers.source`), against the real broker."""

import asyncio
import gc
import importlib
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import msgspec
import pytest
from tests.brokers import Broker, Place
from tests.harness import free_port

from dayfly_gateway.triggers.source import Delivery, Source, SourceFailed

pytestmark = pytest.mark.waits

BROKERS: Final = {
    "folder": "Folder",
    "nats": "Nats",
    "kafka": "Kafka",
    "mqtt": "Mqtt",
    "rabbitmq": "RabbitMq",
    "redis": "Redis",
    "postgres": "Postgres",
    "sqs": "Sqs",
}
SOON_S: Final = 0.3
"""What is to be shown not to come has not come by then."""

LONG_S: Final = 20.0
CALL_S: Final = 1.5
PORT: Final = re.compile(r"(?<=127\.0\.0\.1:)\d+|(?<=port=)\d+")


T = TypeVar("T", bound=Callable[..., Any])


def needs(flag: str) -> Callable[[T], T]:
    """For a claim that is none for brokers without this, see `tests.brokers.Broker`."""

    def mark(claim: T) -> T:
        claim.needs = flag  # type: ignore[attr-defined]
        return claim

    return mark


def broker_class(name: str) -> type[Broker]:
    found: type[Broker] = getattr(importlib.import_module(f"tests.brokers.{name}"), BROKERS[name])
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every claim for every broker of which it is one."""
    if "broker" in metafunc.fixturenames:
        flag = getattr(metafunc.function, "needs", "")
        names = [name for name in BROKERS if not flag or getattr(broker_class(name), flag)]
        metafunc.parametrize("broker", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    with broker_class(request.param)() as up:
        yield up


@pytest.fixture
async def place(broker: Broker, request: pytest.FixtureRequest) -> Place:
    name = request.node.originalname.removeprefix("test_").replace("_", "-")[:60]
    return await broker.place(name)


@pytest.fixture(autouse=True)
async def nothing_fails_unseen() -> AsyncIterator[None]:
    """A task of a client's that ends in an error nobody asks for."""
    unseen: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, told: unseen.append(told))
    yield
    gc.collect()
    await asyncio.sleep(0)
    assert not unseen


@asynccontextmanager
async def opened(
    place: Place, lease_s: float = 30.0, call_s: float = 10.0
) -> AsyncIterator[Source]:
    source = place.source(lease_s, call_s)
    await source.open()
    try:
        yield source
    finally:
        await source.close()


async def fetched(source: Source, number: int, wait_s: float = LONG_S) -> list[Delivery]:
    """That many messages, in as many fetches as it takes."""
    found: list[Delivery] = []
    async with asyncio.timeout(wait_s):
        while len(found) < number:
            found += await source.fetch(number - len(found), 1.0)
    return found


async def test_what_is_published_is_fetched_whole(broker: Broker, place: Place):
    async with opened(place) as source:
        bodies = [b"", b"plain", bytes(range(256)), "süß".encode(), b"x" * 200_000]
        for body in bodies:
            await place.publish(body, {"ce-type": "a.b", "X-More": "1"})
        found = await fetched(source, len(bodies))

        assert sorted(d.body for d in found) == sorted(bodies)
        assert {d.attempt for d in found} == {1}
        if broker.has_headers:
            assert all(d.headers["ce-type"] == "a.b" and d.headers["x-more"] == "1" for d in found)
        if broker.has_ids:
            assert len({d.id for d in found} - {""}) == len(bodies)
        if broker.has_order:
            assert [d.body for d in found] == bodies
        for delivery in found:
            await source.ack(delivery)


@needs("has_past")
async def test_what_was_there_before_a_new_source_is_fetched(broker: Broker, place: Place):
    await place.publish(b"early")
    async with opened(place) as source:
        assert [d.body for d in await fetched(source, 1)] == [b"early"]


async def test_a_fetch_gives_no_more_than_was_asked_for_and_the_rest_later(place: Place):
    async with opened(place) as source:
        for number in range(5):
            await place.publish(b"%d" % number)
        first = await fetched(source, 2)
        found = await source.fetch(2, 5.0)

        assert len(first) == 2
        assert 1 <= len(found) <= 2
        rest = found + await fetched(source, 3 - len(found))
        assert sorted(d.body for d in first + rest) == [b"0", b"1", b"2", b"3", b"4"]


async def test_a_fetch_that_waits_ends_with_the_first_message_and_not_later(place: Place):
    async with opened(place) as source:
        assert await source.fetch(10, 0.05) == []
        waiting = asyncio.create_task(source.fetch(10, LONG_S))
        await asyncio.sleep(0)
        await place.publish(b"now")
        async with asyncio.timeout(LONG_S / 2):
            assert [d.body for d in await waiting] == [b"now"]


async def test_a_cancelled_fetch_loses_nothing(broker: Broker, place: Place):
    async with opened(place, lease_s=1.0) as source:
        fetching = asyncio.create_task(source.fetch(10, LONG_S))
        await asyncio.wait((fetching,), timeout=0.1)
        fetching.cancel()
        await asyncio.wait((fetching,))
        await place.publish(b"kept")

        assert [d.body for d in await fetched(source, 1)] == [b"kept"]


async def test_what_is_acknowledged_does_not_come_again(place: Place):
    async with opened(place, lease_s=1.0) as source:
        await place.publish(b"done")
        (delivery,) = await fetched(source, 1)
        await source.ack(delivery)
    async with opened(place, lease_s=1.0) as source:
        assert await source.fetch(1, 1.5) == []


async def test_what_is_not_acknowledged_comes_again_when_the_connection_is_lost(
    broker: Broker, place: Place
):
    async with opened(place, lease_s=1.0) as source:
        await place.publish(b"again")
        (first,) = await fetched(source, 1)
    async with opened(place, lease_s=1.0) as source:
        (second,) = await fetched(source, 1)

        assert second.body == b"again"
        if broker.has_ids:
            assert second.id == first.id
        if broker.counts_attempts:
            assert second.attempt == 2
        await source.ack(second)


async def test_what_is_given_back_comes_again(broker: Broker, place: Place):
    async with opened(place) as source:
        await place.publish(b"later")
        (first,) = await fetched(source, 1)
        await source.nak(first, 0.0)
        (second,) = await fetched(source, 1)
        if broker.delays:
            await source.nak(second, 1.0)
            assert await source.fetch(1, SOON_S) == []
            (second,) = await fetched(source, 1)

        assert second.body == b"later"
        if broker.has_ids:
            assert second.id == first.id
        await source.ack(second)


@needs("leases")
async def test_what_is_extended_stays_ours_and_what_is_not_is_given_to_another(
    broker: Broker, place: Place
):
    async with opened(place, lease_s=1.0) as source, opened(place, lease_s=1.0) as other:
        await place.publish(b"long")
        (delivery,) = await fetched(source, 1)
        assert source.extend_s is not None
        assert source.extend_s < 1.0
        for _ in range(5):
            assert await other.fetch(1, source.extend_s) == []
            await source.extend(delivery)
        (taken,) = await fetched(other, 1)

        assert taken.id == delivery.id
        await other.ack(taken)


async def test_what_was_acknowledged_out_of_order_does_not_come_again(broker: Broker, place: Place):
    async with opened(place, lease_s=1.0) as source:
        for body in (b"a", b"b", b"c"):
            await place.publish(body)
        found = await fetched(source, 3)
        for delivery in reversed(found):
            await source.ack(delivery)
    async with opened(place, lease_s=1.0) as source:
        assert await source.fetch(3, 1.5) == []


async def lagging(source: Source, number: int) -> None:
    """Return when that many wait: some brokers say so a little later."""
    async with asyncio.timeout(LONG_S):
        while await source.lag() != number:  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(0.05)


async def test_what_waits_is_counted(broker: Broker, place: Place):
    async with opened(place) as source:
        if not broker.has_lag:
            assert await source.lag() is None
            return
        assert await source.lag() == 0
        for _ in range(3):
            await place.publish(b"waits")
        await lagging(source, 3)
        await fetched(source, 3)
        await lagging(source, 0)


async def test_nothing_waits_for_a_fetch_that_waits(place: Place):
    async with opened(place, call_s=CALL_S) as source:
        await place.publish(b"one")
        (delivery,) = await fetched(source, 1)
        fetching = asyncio.create_task(source.fetch(10, LONG_S))
        await asyncio.wait((fetching,), timeout=0.1)
        async with asyncio.timeout(LONG_S / 2):
            await source.extend(delivery)
            await source.lag()
            await source.ack(delivery)
        assert not fetching.done()
        await place.publish(b"two")
        assert [d.body for d in await fetching] == [b"two"]


async def test_who_waits_in_a_fetch_is_told_when_the_source_is_closed(place: Place):
    async with opened(place) as source:
        fetching = asyncio.create_task(source.fetch(1, LONG_S))
        await asyncio.wait((fetching,), timeout=0.1)
    async with asyncio.timeout(LONG_S / 2):
        with pytest.raises(SourceFailed):
            await fetching


async def test_nothing_is_left_of_a_source_that_is_closed(place: Place):
    """Nor of a fetch that was cancelled; and who asks it then is told."""
    before = asyncio.all_tasks()
    async with opened(place) as source:
        await place.publish(b"held")
        (delivery,) = await fetched(source, 1)
        fetching = asyncio.create_task(source.fetch(1, LONG_S))
        await asyncio.wait((fetching,), timeout=0.05)
        fetching.cancel()
        await asyncio.wait((fetching,))
    assert asyncio.all_tasks() == before
    with pytest.raises(SourceFailed):
        await source.fetch(1, 0.0)
    with pytest.raises(SourceFailed):
        await source.ack(delivery)


@needs("leases")
async def test_two_sources_share_what_comes(broker: Broker, place: Place):
    async with opened(place) as one, opened(place) as other:
        for number in range(10):
            await place.publish(b"%d" % number)
        bodies: list[bytes] = []
        async with asyncio.timeout(LONG_S):
            while len(bodies) < 10:
                for source in (one, other):
                    for delivery in await source.fetch(2, 0.2):
                        bodies.append(delivery.body)
                        await source.ack(delivery)

        assert sorted(bodies) == sorted(b"%d" % number for number in range(10))


@needs("has_topic")
async def test_a_topic_is_told_and_its_source_gives_that_out(place: Place):
    async with opened(place) as source:
        topic = place.topic()
        await topic.open()
        await topic.tell("an-id", b'{"specversion": "1.0"}')
        await topic.close()
        await topic.close()
        with pytest.raises(SourceFailed):
            await topic.tell("another-id", b"{}")

        (delivery,) = await fetched(source, 1)
        assert delivery.body == b'{"specversion": "1.0"}'
        await source.ack(delivery)


@needs("is_process")
async def test_a_broker_that_is_not_there_is_named_and_no_secret_is(broker: Broker, place: Place):
    spec = moved(place, free_port())
    source = type(place.source())(spec, "nobody", "user:hunter2", call_s=CALL_S)

    async with asyncio.timeout(LONG_S):
        with pytest.raises(SourceFailed) as caught:
            await source.open()
        await source.close()
    assert "127.0.0.1" in caught.value.detail
    assert "hunter2" not in str(caught.value)


@needs("is_process")
async def test_who_listens_and_says_nothing_is_given_up(broker: Broker, place: Place):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        source = type(place.source())(
            moved(place, silent.getsockname()[1]), "nobody", call_s=CALL_S
        )
        async with asyncio.timeout(LONG_S):
            with pytest.raises(SourceFailed):
                await source.open()
            await source.close()


async def failing(source: Source) -> None:
    """Fetch until that fails with the one error that it may."""
    try:
        while True:
            await source.fetch(1, 0.5)
    except SourceFailed:
        return


def moved(place: Place, port: int) -> object:
    """The same declaration with another port."""
    text = msgspec.json.encode(place.spec).decode()
    old = next(iter(set(PORT.findall(text))))
    return msgspec.json.decode(text.replace(old, str(port)), type=type(place.spec))


@needs("is_process")
async def test_a_broker_that_goes_is_told_and_when_it_is_back_nothing_is_lost(
    broker: Broker, place: Place
):
    source = place.source(1.0)
    await source.open()
    await place.publish(b"first")
    await place.publish(b"second")
    (one,) = await source.fetch(1, LONG_S)
    broker.stop()
    try:
        async with asyncio.timeout(2 * LONG_S):
            await failing(source)
            with pytest.raises(SourceFailed):
                await source.ack(one)
        await source.close()
        await source.close()
    finally:
        broker.start()
    if not broker.survives:
        return
    async with asyncio.timeout(2 * LONG_S):
        bodies: set[bytes] = set()
        while bodies != {b"first", b"second"}:
            try:
                async with opened(place, 1.0) as source:
                    while bodies != {b"first", b"second"}:
                        for delivery in await source.fetch(2, 1.0):
                            bodies.add(delivery.body)
                            await source.ack(delivery)
            except SourceFailed:
                await asyncio.sleep(0.1)  # it is still coming up


@needs("is_process")
async def test_a_broker_that_stands_still_holds_nobody_for_ever(broker: Broker, place: Place):
    async with opened(place, call_s=CALL_S) as source:
        await place.publish(b"held")
        (delivery,) = await fetched(source, 1)
        broker.pause()
        try:
            async with asyncio.timeout(2 * LONG_S):
                with pytest.raises(SourceFailed):
                    await source.ack(delivery)
        finally:
            broker.resume()
