"""A broker that is slow, goes away, or loses patience, in front of a real server."""

import asyncio
from collections.abc import Iterator
from typing import Any

import nats
import pytest
from nats.js.api import AckPolicy, ConsumerConfig
from tests.brokers.nats import Nats
from tests.faults.proxy import Proxy
from tests.harness import Server, eventually

pytestmark = pytest.mark.waits

NAP = "import time\ndef handler(event, context):\n    time.sleep({})\n    return 'slept'\n"


@pytest.fixture
def broker() -> Iterator[Nats]:
    with Nats() as up:
        yield up  # type: ignore[misc]


@pytest.fixture
def name(server: Server, request: pytest.FixtureRequest) -> Iterator[str]:
    """Of a function, a trigger and a stream of this test alone."""
    name = request.node.originalname.replace("_", "-")[5:40].strip("-")
    yield name
    server.ask("DELETE", f"/namespaces/default/triggers/{name}")


async def publish(broker: Nats, name: str, number: int, consumer: str = "") -> None:
    """A stream with so many messages, and a consumer that waits a second for each."""
    client = await nats.connect(f"nats://127.0.0.1:{broker.port}")
    context = client.jetstream()
    await context.add_stream(name=name, subjects=[name])
    if consumer:
        config = ConsumerConfig(
            durable_name=consumer, ack_policy=AckPolicy.EXPLICIT, ack_wait=1, max_deliver=-1
        )
        await context.add_consumer(name, config)
    for n in range(number):
        await context.publish(name, b'{"n": %d}' % n)
    await client.close()


def listen(server: Server, name: str, port: int, **more: Any) -> None:
    source = {"url": f"nats://127.0.0.1:{port}", "subject": name} | more
    spec = {"function": name, "nats": source}
    reply = server.ask("PUT", f"/namespaces/default/triggers/{name}", spec)
    assert reply.status == 200, reply.body


def status(server: Server, name: str) -> Any:
    views = server.ask("GET", "/triggers").json()
    return next(view["status"] for view in views if view["metadata"]["name"] == name)


def events(server: Server, name: str) -> list[Any]:
    found: list[Any] = server.ask("GET", f"/events?function=default/{name}").json()
    return found


def test_a_broker_that_is_slow_is_waited_for(server: Server, broker: Nats, name: str):
    asyncio.run(publish(broker, name, 30))
    server.deploy("", name, files={"main.py": NAP.format(0)}, maxScale=2)
    with Proxy(broker.port) as wire:
        wire.slow(0.05)
        listen(server, name, wire.port)
        while status(server, name).get("acknowledged", 0) < 30:
            assert server.call(name, path="?x=1").status == 200
        server.ask("DELETE", f"/namespaces/default/triggers/{name}")

    assert {(e["state"], e["attempts"]) for e in events(server, name)} == {("succeeded", 1)}
    assert len(events(server, name)) == 30


def test_a_run_that_is_longer_than_the_brokers_patience_is_the_only_one(
    server: Server, broker: Nats, name: str
):
    asyncio.run(publish(broker, name, 1, consumer="impatient"))
    server.deploy("", name, files={"main.py": NAP.format(3)})
    listen(server, name, broker.port, consumer="impatient")
    assert eventually(lambda: status(server, name).get("acknowledged") == 1)

    assert (status(server, name)["fetched"], status(server, name)["known"]) == (1, 0)
    (event,) = events(server, name)
    assert (event["state"], event["attempts"]) == ("succeeded", 1)


def test_a_broker_that_goes_while_its_message_runs_is_told_when_it_is_back(
    server: Server, broker: Nats, name: str
):
    """And what it gives out again then does not run again."""
    asyncio.run(publish(broker, name, 1, consumer="impatient"))
    server.deploy("", name, files={"main.py": NAP.format(1)})
    listen(server, name, broker.port, consumer="impatient")
    assert eventually(lambda: bool(events(server, name)))
    broker.stop()
    assert eventually(lambda: status(server, name)["up"] is False)
    assert eventually(lambda: events(server, name)[0]["state"] == "succeeded")
    assert "127.0.0.1" in status(server, name)["lastError"]
    broker.start()
    # the broker gives it out again when its own patience is over
    assert eventually(lambda: status(server, name)["acknowledged"] == 1)

    assert status(server, name)["known"] == 1
    (event,) = events(server, name)
    assert (event["state"], event["attempts"]) == ("succeeded", 1)
