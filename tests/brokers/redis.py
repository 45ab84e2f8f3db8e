"""Redis that writes down whatever it says it has."""

from collections.abc import Mapping
from typing import Any

from redis.asyncio import Redis as Client
from tests.brokers import Broker

from dayfly_gateway.triggers.redis import Source, Topic
from dayfly_pool.brokers import RedisSource, RedisTopic


class Redis(Broker):
    """See `tests.brokers`."""

    name = "redis"

    def command(self) -> list[str]:
        """See `Broker`."""
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.folder),
            "save": "",
            "appendonly": "yes",
            "appendfsync": "always",
        }
        return ["redis-server", *(word for n, v in options.items() for word in (f"--{n}", v))]

    async def place(self, name: str) -> "Place":
        """A stream that is not there yet."""
        return Place(f"redis://127.0.0.1:{self.port}/0", name)


class Place:
    """See `tests.brokers.Place`."""

    def __init__(self, url: str, name: str) -> None:
        self.spec = RedisSource(url=url, stream=name)
        self.topic_spec = RedisTopic(url=url, stream=name)
        self._name = name

    async def command(self, *words: Any) -> Any:
        """What the server answers."""
        async with Client.from_url(self.spec.url, protocol=2) as client:
            return await client.execute_command(*words)

    async def publish(self, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """See `tests.brokers.Place`."""
        fields = [word for pair in (headers or {}).items() for word in pair]
        await self.command("XADD", self.spec.stream, "*", *fields, "body", body)

    def source(self, lease_s: float = 30.0, call_s: float = 10.0) -> Source:
        """See `tests.brokers.Place`."""
        return Source(self.spec, self._name, lease_s=lease_s, call_s=call_s)

    def topic(self) -> Topic:
        """See `tests.brokers.Place`."""
        return Topic(self.topic_spec)
