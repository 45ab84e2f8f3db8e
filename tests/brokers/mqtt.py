"""MQTT: mosquitto, which writes down what it has."""

import os
import pwd
import shutil
import signal
from collections.abc import Mapping

from aiomqtt import Client, ProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from tests.brokers import Broker
from tests.harness import eventually

from dayfly_gateway.triggers.mqtt import Source, Topic
from dayfly_pool.brokers import MqttSource, MqttTopic

SETTINGS = """\
listener {port} 127.0.0.1
allow_anonymous true
persistence true
persistence_location {folder}/
user {user}
log_dest stderr
"""


class Mqtt(Broker):
    """See `tests.brokers`."""

    name = "mqtt"
    has_ids = False
    counts_attempts = False
    has_lag = False
    leases = False
    has_past = False
    settings = SETTINGS

    def command(self) -> list[str]:
        """See `Broker`."""
        program = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin")
        assert program is not None, "mosquitto is not installed"
        user = pwd.getpwuid(os.getuid()).pw_name
        file = self.folder / "mosquitto.conf"
        file.write_text(self.settings.format(port=self.port, folder=self.folder, user=user))
        return [program, "-c", str(file)]

    def stop(self) -> None:
        """See `Broker`. It writes down what it has now and then; here, before it is killed."""
        assert self._process is not None
        written = self.folder / "mosquitto.db"
        old = written.stat().st_ino if written.exists() else None
        self._process.send_signal(signal.SIGUSR1)
        assert eventually(lambda: written.exists() and written.stat().st_ino != old)
        super().stop()

    async def place(self, name: str) -> "Place":
        """A topic."""
        return Place(self.port, name)


class Place:
    """See `tests.brokers.Place`."""

    def __init__(self, port: int, name: str) -> None:
        url = f"mqtt://127.0.0.1:{port}"
        self.spec, self.topic_spec = MqttSource(url=url, topic=name), MqttTopic(url=url, topic=name)
        self._port, self._name = port, name

    async def publish(self, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """See `tests.brokers.Place`."""
        about = Properties(PacketTypes.PUBLISH)
        if headers:
            about.UserProperty = list(headers.items())
        async with Client("127.0.0.1", self._port, protocol=ProtocolVersion.V5) as client:
            await client.publish(self._name, body, qos=1, properties=about)

    def source(self, lease_s: float = 30.0, call_s: float = 10.0) -> Source:
        """See `tests.brokers.Place`."""
        return Source(self.spec, self._name, lease_s=lease_s, call_s=call_s)

    def topic(self) -> Topic:
        """See `tests.brokers.Place`."""
        return Topic(self.topic_spec)
