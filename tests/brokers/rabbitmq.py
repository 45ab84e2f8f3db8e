"""RabbitMQ, with a name server of Erlang's that is its own too."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import aiormq
from pamqp.commands import Basic
from tests.brokers import Broker
from tests.harness import eventually, free_port

from dayfly_gateway.triggers.rabbitmq import Source, Topic
from dayfly_pool.brokers import RabbitMqSource, RabbitMqTopic

PROGRAM = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
"""Not what is in the path: that changes to another user, and to its folder."""


class RabbitMq(Broker):
    """See `tests.brokers`."""

    name = "rabbitmq"
    leases = False  # what is under way is ours for as long as we are connected

    def __init__(self) -> None:
        super().__init__()
        names, distribution = free_port(), free_port()
        self._queues: set[bytes] = set()
        self._names: subprocess.Popen[bytes] | None = None
        self._name_server = ["epmd", "-address", "127.0.0.1", "-port", str(names)]
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "ERL_EPMD_PORT": str(names),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "plugins"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_LOG_BASE": str(self.folder),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_NODENAME": "dayfly@localhost",
            "detached": "yes",  # the program is replaced by Erlang: one process, to be killed
        }
        (self.folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\nlog.console.level = warning\n"
        )

    def command(self) -> list[str]:
        """See `Broker`."""
        return ["env", "-i", *(f"{n}={v}" for n, v in self._environment.items()), str(PROGRAM)]

    def start(self) -> None:
        """See `Broker`."""
        if self._names is None:
            self._names = subprocess.Popen(self._name_server, stdin=subprocess.DEVNULL)
        try:
            super().start()
        except BaseException:
            self._names.kill()
            raise

    def stop(self) -> None:
        """See `Broker`. RabbitMQ 3.10 forgets the queues of its last second: wait for them."""
        names = self.folder / "mnesia/dayfly@localhost/quorum/dayfly@localhost/names.dets"
        if self._queues:
            assert eventually(lambda: all(name in names.read_bytes() for name in self._queues))
        super().stop()

    def __exit__(self, *_: object) -> None:
        self._queues.clear()
        super().__exit__()
        assert self._names is not None
        self._names.kill()
        self._names.wait()

    async def place(self, name: str) -> "Place":
        """A queue that somebody has made."""
        place = Place(f"amqp://127.0.0.1:{self.port}/", name)
        async with aiormq.connect(place.spec.url) as connection:
            channel = await connection.channel()
            await channel.queue_declare(name, durable=True, arguments={"x-queue-type": "quorum"})
        self._queues.add(name.encode())
        return place


class Place:
    """See `tests.brokers.Place`."""

    def __init__(self, url: str, name: str) -> None:
        self.spec = RabbitMqSource(url=url, queue=name)
        self.topic_spec = RabbitMqTopic(url=url, routing_key=name)
        self._name = name

    async def publish(self, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """See `tests.brokers.Place`."""
        about = Basic.Properties(
            message_id=os.urandom(8).hex(), delivery_mode=2, headers=dict(headers or {})
        )
        async with aiormq.connect(self.spec.url) as connection:
            channel = await connection.channel()
            await channel.basic_publish(
                body, routing_key=self.spec.queue, properties=about, mandatory=True
            )

    def source(self, lease_s: float = 30.0, call_s: float = 10.0) -> Source:
        """See `tests.brokers.Place`."""
        return Source(self.spec, self._name, lease_s=lease_s, call_s=call_s)

    def topic(self) -> Topic:
        """See `tests.brokers.Place`."""
        return Topic(self.topic_spec)
