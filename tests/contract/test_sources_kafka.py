"""What the adapter of Kafka promises besides: partitions, what is committed, who shares a group."""

import asyncio
import socket
from collections.abc import Iterator

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from tests.brokers.kafka import Kafka
from tests.contract.test_sources import LONG_S, SOON_S, fetched, opened

from dayfly_gateway.triggers import kafka
from dayfly_gateway.triggers.source import SourceFailed

pytestmark = pytest.mark.waits


@pytest.fixture(scope="module")
def broker() -> Iterator[Kafka]:
    with Kafka() as up:
        yield up


class Guarded(Kafka):
    """It wants a login, and knows none."""

    def command(self) -> list[str]:
        """See `Kafka`."""
        return [*super().command(), "--authentication"]


async def test_a_partition_is_a_group_and_keeps_its_order(broker: Kafka):
    place = await broker.place("partitions", 3)
    async with opened(place) as source:
        for number in range(9):
            await place.publish(b"%d" % number, partition=number % 3)
        found = await fetched(source, 9)

        for group in ("0", "1", "2"):
            bodies = [d.body for d in found if d.group == group]
            assert bodies == [b"%d" % (int(group) + step) for step in (0, 3, 6)]


async def test_what_is_strange_in_a_record_is_survived(broker: Kafka):
    place = await broker.place("strange")
    async with opened(place) as source:
        await place.publish(None, {"Blob": b"\xff\xfe", "none": None, "": "x"}, key=b"\xff")
        await place.publish(b"x", key="schlüssel".encode())
        first, second = await fetched(source, 2)

        assert first.body == b""
        assert first.headers == {"blob": "\ufffd\ufffd", "none": "", "": "x"}
        assert second.headers == {"kafka-key": "schlüssel"}


async def test_no_more_is_committed_than_everything_before_is_done_with(broker: Kafka):
    """What was done with after it is known to the source alone, and comes again to the next."""
    place = await broker.place("committed")
    async with opened(place) as source:
        for body in (b"a", b"b", b"c"):
            await place.publish(body)
        a, b, c = await fetched(source, 3)
        await source.ack(a)
        await source.ack(c)
    async with opened(place) as source:
        found = await fetched(source, 2)

        assert [d.id for d in found] == [b.id, c.id]


async def test_those_who_share_a_group_share_its_partitions_and_nothing_is_lost(broker: Kafka):
    place = await broker.place("shared", 2)
    bodies = {b"%d" % number for number in range(8)}
    async with opened(place) as one:
        for body in sorted(bodies):
            await place.publish(body, partition=int(body) % 2)
        early = await fetched(one, 4)
        async with opened(place) as other, asyncio.timeout(LONG_S):
            while bodies:  # what one had is not done with: it is given out anew with the rest
                for source in (one, other):
                    for delivery in await source.fetch(8, 0.2):
                        bodies.discard(delivery.body)
                        await source.ack(delivery)
            for delivery in early:
                await one.nak(delivery, 0.0)
                await one.ack(delivery)  # late, and harmless
            await place.publish(b"left", partition=0)
            await place.publish(b"right", partition=1)
            (left,), (right,) = await fetched(one, 1), await fetched(other, 1)

            assert {left.body, right.body} == {b"left", b"right"}


async def test_who_begins_at_the_end_has_what_comes_later_until_it_is_done(broker: Kafka):
    """Where it began is committed: else what was given out, and is not done, would be skipped."""
    place = await broker.place("latest")
    place.spec = type(place.spec)(servers=place.spec.servers, topic="latest", start="latest")
    await place.publish(b"before")
    async with opened(place) as source:
        await place.publish(b"after")
        (first,) = await fetched(source, 1)
    async with opened(place) as source:
        (second,) = await fetched(source, 1)

        assert (first.body, second.body) == (b"after", b"after")
        assert second.id == first.id


async def test_a_message_of_a_topic_that_was_made_anew_is_another(broker: Kafka):
    place = await broker.place("anew")
    await place.publish(b"same")
    async with opened(place) as source:
        (first,) = await fetched(source, 1)
    admin = AIOKafkaAdminClient(bootstrap_servers=place.spec.servers)
    await admin.start()
    await admin.delete_topics(["anew"])
    await admin.close()
    place = await broker.place("anew")
    await place.publish(b"same")
    async with opened(place) as source:
        (second,) = await fetched(source, 1)

        assert second.id != first.id


async def test_no_more_is_given_out_after_what_is_not_done_with_than_may_be_remembered(
    broker: Kafka, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kafka, "AHEAD_MAX", 3)
    place = await broker.place("ahead")
    async with opened(place) as source:
        for number in range(6):
            await place.publish(b"%d" % number)
        first, *others = await fetched(source, 3)
        for delivery in others:
            await source.ack(delivery)
        assert await source.fetch(3, SOON_S) == []
        await source.ack(first)

        assert [d.body for d in await fetched(source, 3)] == [b"3", b"4", b"5"]


@pytest.mark.parametrize("login", ["PLAIN", "SCRAM-SHA-512"])
async def test_a_login_that_is_refused_is_told_and_nothing_is_left(login: str):
    with Guarded() as guarded:
        spec = kafka.KafkaSource(servers=f"127.0.0.1:{guarded.port}", topic="x", login=login)
        source = kafka.Source(spec, "x", "user:hunter2", call_s=2.0)
        with pytest.raises(SourceFailed) as caught:
            await source.open()
        await source.close()

        assert f"127.0.0.1:{guarded.port}" in caught.value.detail
        assert "hunter2" not in str(caught.value)
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_nothing_is_left_of_a_source_whose_opening_was_cancelled():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        spec = kafka.KafkaSource(servers=f"127.0.0.1:{silent.getsockname()[1]}", topic="x")
        source = kafka.Source(spec, "x")
        opening = asyncio.create_task(source.open())
        await asyncio.wait((opening,), timeout=0.05)
        opening.cancel()
        await asyncio.wait((opening,))
        await source.close()

        assert asyncio.all_tasks() == {asyncio.current_task()}
