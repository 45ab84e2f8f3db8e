"""NATS with JetStream."""

import sys
from collections.abc import Mapping
from pathlib import Path

import nats
from tests.brokers import Broker

from dayfly_gateway.triggers.nats import Source, Topic
from dayfly_pool.brokers import NatsSource, NatsTopic


class Nats(Broker):
    """See `tests.brokers`."""

    name = "nats"

    def command(self) -> list[str]:
        """See `Broker`."""
        program = Path(sys.executable).parent / "nats-server"
        store = self.folder / "store"
        return [str(program), "-a", "127.0.0.1", "-p", str(self.port), "-js", "-sd", str(store)]

    async def place(self, name: str) -> "Place":
        """A stream with one subject."""
        url = f"nats://127.0.0.1:{self.port}"
        client = await nats.connect(url)
        await client.jetstream().add_stream(name=name, subjects=[name])
        await client.close()
        return Place(url, name)


class Place:
    """See `tests.brokers.Place`."""

    def __init__(self, url: str, name: str) -> None:
        self.spec, self.topic_spec = (
            NatsSource(url=url, subject=name),
            NatsTopic(url=url, subject=name),
        )
        self._name = name

    async def publish(self, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """See `tests.brokers.Place`."""
        client = await nats.connect(self.spec.url)
        await client.jetstream().publish(
            self.spec.subject, body, headers=dict(headers or {}) or None
        )
        await client.close()

    def source(self, lease_s: float = 30.0, call_s: float = 10.0) -> Source:
        """See `tests.brokers.Place`."""
        return Source(self.spec, self._name, lease_s=lease_s, call_s=call_s)

    def topic(self) -> Topic:
        """See `tests.brokers.Place`."""
        return Topic(self.topic_spec)
