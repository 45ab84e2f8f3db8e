"""What the adapter of MQTT promises besides: order, sessions, what is retained, QoS 0."""

import asyncio
import socket
from collections.abc import Iterator

import pytest
from aiomqtt import Client, ProtocolVersion
from tests.brokers.mqtt import SETTINGS, Mqtt
from tests.contract.test_sources import SOON_S, failing, fetched, opened

from dayfly_gateway.triggers import mqtt
from dayfly_gateway.triggers.source import SourceFailed
from dayfly_pool.brokers import MqttSource

pytestmark = pytest.mark.waits


class Guarded(Mqtt):
    """It wants a login, and knows none."""

    settings = SETTINGS.replace("allow_anonymous true", "allow_anonymous false")


@pytest.fixture(scope="module")
def broker() -> Iterator[Mqtt]:
    with Mqtt() as up:
        yield up


async def test_the_broker_is_told_in_order_and_what_it_was_not_told_of_comes_again(broker: Mqtt):
    """MQTT-4.6.0-2: PUBACK in the order of PUBLISH. So `b` waits for `a`."""
    place = await broker.place("in-order")
    async with opened(place) as source:
        for body in (b"a", b"b", b"c"):
            await place.publish(body)
        _, b, _ = await fetched(source, 3)
        await source.ack(b)
    async with opened(place) as source:
        a, b, c = await fetched(source, 3)
        assert [a.body, b.body, c.body] == [b"a", b"b", b"c"]
        await source.ack(b)
        await source.ack(a)
    async with opened(place) as source:
        assert [d.body for d in await fetched(source, 1)] == [b"c"]


async def test_no_more_is_sent_than_may_be_under_way(broker: Mqtt, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mqtt, "UNDER_WAY_MAX", 3)
    place = await broker.place("under-way")
    async with opened(place) as source:
        for number in range(5):
            await place.publish(b"%d" % number)
        found = await fetched(source, 3)
        assert await source.fetch(5, SOON_S) == []
        for delivery in found:
            await source.ack(delivery)

        assert [d.body for d in await fetched(source, 2)] == [b"3", b"4"]


async def test_a_session_of_another_topic_gives_out_nothing_of_that(broker: Mqtt):
    """The broker keeps what the session was subscribed to, and nobody can ask what that was."""
    old, new = await broker.place("old/a"), await broker.place("new/a")
    new.spec = MqttSource(url=new.spec.url, topic="new/+", client="one")
    old.spec = MqttSource(url=old.spec.url, topic="old/#", client="one")
    async with opened(old):
        pass
    await old.publish(b"old")
    async with opened(new) as source:
        await new.publish(b"new")
        (delivery,) = await fetched(source, 1)
        await source.ack(delivery)

        assert (delivery.body, delivery.topic, delivery.group) == (b"new", "new/a", "new/a")
    async with opened(new) as source:
        assert await source.fetch(1, SOON_S) == []


async def test_what_is_retained_is_given_out_once(broker: Mqtt):
    place = await broker.place("retained")
    async with Client("127.0.0.1", broker.port, protocol=ProtocolVersion.V5) as client:
        await client.publish("retained", b"kept", qos=1, retain=True)
    async with opened(place) as source:
        (delivery,) = await fetched(source, 1)
        await source.ack(delivery)
    async with opened(place) as source:
        assert await source.fetch(1, SOON_S) == []


async def test_what_is_sent_without_a_promise_is_given_out_and_needs_none(broker: Mqtt):
    place = await broker.place("passing")
    async with opened(place) as source:
        async with Client("127.0.0.1", broker.port, protocol=ProtocolVersion.V5) as client:
            await client.publish("passing", b"by", qos=0)
        (delivery,) = await fetched(source, 1)
        await source.nak(delivery, 0.0)
        (delivery,) = await fetched(source, 1)
        await source.ack(delivery)

        assert delivery.body == b"by"


async def test_who_opens_a_session_takes_it_with_what_is_not_done(broker: Mqtt):
    place = await broker.place("taken")
    async with opened(place) as one:
        await place.publish(b"mine")
        (delivery,) = await fetched(one, 1)
        async with opened(place) as other:
            await failing(one)
            with pytest.raises(SourceFailed):
                await one.ack(delivery)

            assert [d.body for d in await fetched(other, 1)] == [b"mine"]


async def test_a_login_that_is_refused_is_told_and_nothing_is_left():
    with Guarded() as guarded:
        spec = MqttSource(url=f"mqtt://127.0.0.1:{guarded.port}", topic="x")
        source = mqtt.Source(spec, "x", "user:hunter2")
        with pytest.raises(SourceFailed) as caught:
            await source.open()
        await source.close()

        assert f"127.0.0.1:{guarded.port}" in caught.value.detail
        assert "uthorized" in caught.value.detail
        assert "hunter2" not in str(caught.value)
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_word_says_what_it_is(broker: Mqtt):
    place = await broker.place("word")
    topic = place.topic()
    async with opened(place) as source:
        await topic.open()
        await topic.tell("an-id", b"{}")
        await topic.close()
        (delivery,) = await fetched(source, 1)

        assert delivery.headers == {"content-type": "application/cloudevents+json"}
        await source.ack(delivery)


async def test_nothing_is_left_of_a_source_whose_opening_was_cancelled():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        spec = MqttSource(url=f"mqtt://127.0.0.1:{silent.getsockname()[1]}", topic="x")
        source = mqtt.Source(spec, "x", call_s=0.3)
        opening = asyncio.create_task(source.open())
        await asyncio.wait((opening,), timeout=0.05)
        opening.cancel()
        await asyncio.wait((opening,))
        await source.close()

        assert asyncio.all_tasks() == {asyncio.current_task()}
