"""MQTT 5: a session that the broker keeps, and topics; both with QoS 1.

The client acknowledges in the order in which messages came, as MQTT demands: what is done with
before another that came earlier is remembered, and told when that is done with too.
"""

import asyncio
import contextlib
import ssl
from collections.abc import Coroutine, Iterator, Mapping
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from aiomqtt import Client, Message, MqttError, ProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from dayfly_gateway.triggers.held import Held, Window
from dayfly_gateway.triggers.source import (
    CALL_S_MAX,
    EVENT_TYPE,
    LEASE_S,
    Delivery,
    SourceFailed,
    while_there,
)
from dayfly_pool.brokers import MqttSource, MqttTopic

T = TypeVar("T")
UNDER_WAY_MAX: Final = 256
"""Messages that the broker gives us before the first of them is acknowledged."""

PASSING_MAX: Final = 256
"""Messages with QoS 0, of which nobody promises anything, that wait to be fetched."""

PING_S: Final = 5
PORTS: Final = {"mqtt": 1883, "mqtts": 8883}
SEND_IF_NEW: Final = SubscribeOptions.RETAIN_SEND_IF_NEW_SUB
REFUSED: Final = 128
"""And higher: a reason code that is a refusal."""


def _properties(packet: int, values: Mapping[str, Any]) -> Properties:
    about = Properties(packet)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        setattr(about, name, value)
    return about


class _Client(Client):
    """aiomqtt's client, with two things that paho's can do and it does not show."""

    def acknowledge(self, number: int) -> None:
        """Send PUBACK. The broker need not have it yet."""
        self._client.ack(number, 1)

    def by_hand(self, connect_s: float) -> None:
        """Acknowledge nothing that one has not asked to, and wait no longer for a connection."""
        self._client.manual_ack_set(True)
        self._client.connect_timeout = connect_s

    async def cut(self) -> None:
        """Disconnect, in whatever state it is: aiomqtt leaves a socket whose CONNECT failed."""
        self._client.disconnect()
        await asyncio.sleep(0)  # aiomqtt asks then to be told when it can write
        self._client.loop_write()
        self._client._sock_close()
        if (task := self._misc_task) is not None:
            task.cancel()
            await asyncio.wait((task,))
        if self._disconnected.done() and not self._disconnected.cancelled():
            self._disconnected.exception()  # it has been told, or nobody asked


class _Link:
    """A connection that ends when it is lost, and says so to whoever waits on it."""

    def __init__(self, spec: MqttSource | MqttTopic, secret: str, call_s: float) -> None:
        self._url, self._secret, self.call_s = spec.url, secret, call_s
        self.client: _Client | None = None
        self._connecting: asyncio.Task[Client] | None = None
        self._reading: asyncio.Task[None] | None = None

    async def open(self, name: str = "", session_s: int = 0) -> _Client:
        with self._named("address"):
            parts = urlsplit(self._url)
            port = parts.port or PORTS[parts.scheme]
        user, _, password = self._secret.partition(":")
        kept = {"SessionExpiryInterval": session_s, "ReceiveMaximum": UNDER_WAY_MAX}
        tls = (
            await asyncio.to_thread(ssl.create_default_context) if parts.scheme != "mqtt" else None
        )
        self.client = _Client(
            parts.hostname or "",
            port,
            username=user if self._secret else None,
            password=password if self._secret else None,
            identifier=name or None,
            protocol=ProtocolVersion.V5,
            clean_start=not session_s,
            properties=_properties(PacketTypes.CONNECT, kept if session_s else {}),
            keepalive=PING_S,
            timeout=self.call_s,
            tls_context=tls,
        )
        self.client.pending_calls_threshold = UNDER_WAY_MAX
        self.client.by_hand(self.call_s)
        # It uses a thread, which cannot be cancelled: who closes waits for it.
        self._connecting = asyncio.create_task(self.client.__aenter__(), name="mqtt-connect")
        with self._named("connect"):
            await asyncio.shield(self._connecting)
        return self.client

    def read(self, work: Coroutine[Any, Any, None]) -> None:
        """Run *work* for as long as the connection is there; it ends when that is lost."""
        self._reading = asyncio.create_task(work, name="mqtt-read")

    async def close(self) -> None:
        client, self.client = self.client, None
        if self._connecting is not None:
            await asyncio.gather(self._connecting, return_exceptions=True)
        if client is not None:
            await client.cut()
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait((self._reading,))

    def check(self) -> None:
        """Raises `SourceFailed` if the connection is lost, or closed."""
        if self._reading is None or self._reading.done():
            raise SourceFailed(f"MQTT broker at {self._url} has gone")

    async def call(self, what: str, work: Coroutine[Any, Any, T]) -> T:
        """Await *work* for as long as the connection is there. Raises `SourceFailed`."""
        with self._named(what):
            return await while_there(work, *([] if self._reading is None else [self._reading]))

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except (MqttError, OSError, TimeoutError, ValueError) as error:
            why = str(error) or type(error).__name__
            raise SourceFailed(f"MQTT broker at {self._url}, {what}: {why}") from None


class Source:
    """A session, as `triggers.source.Source` promises. *name* is `NAMESPACE_TRIGGER`.

    Who opens it while another has it takes it from that one.
    """

    def __init__(
        self,
        spec: MqttSource,
        name: str,
        secret: str = "",
        lease_s: float = LEASE_S,
        call_s: float = CALL_S_MAX,
    ) -> None:
        self.extend_s: float | None = None
        self._spec, self._name = spec, spec.client or f"dayfly-{name}"
        self._link = _Link(spec, secret, call_s)
        self._held, self._window = Held(), Window[int]()
        self._client: _Client

    async def open(self) -> None:
        """See `triggers.source.Source`."""
        self._client = await self._link.open(self._name, self._spec.session_seconds)
        self._link.read(self._read())
        await self._link.call("subscribe", self._subscribe())

    async def _subscribe(self) -> None:
        options = SubscribeOptions(qos=1, retainHandling=SEND_IF_NEW)
        for code in await self._client.subscribe(self._spec.topic, options=options):
            if (code if isinstance(code, int) else code.value) >= REFUSED:
                raise MqttError(f"{self._spec.topic}: {code}")

    async def _read(self) -> None:
        with contextlib.suppress(MqttError):  # the connection is lost
            async for message in self._client.messages:
                self._came(message)

    def _came(self, message: Message) -> None:
        ours = message.topic.matches(self._spec.topic)
        if message.qos:
            self._window.give(message.mid)
            if not ours:  # of what the session was subscribed to when it was declared otherwise
                self._over(message.mid)
        if ours and (message.qos or len(self._held) < PASSING_MAX):
            self._held.put(_delivery(message))

    def _over(self, number: int) -> bool:
        over = self._window.done(number)
        for each in over:
            self._client.acknowledge(each)
        return bool(over)

    async def close(self) -> None:
        """See `triggers.source.Source`."""
        await self._link.close()

    async def fetch(self, most: int, wait_s: float) -> list[Delivery]:
        """See `triggers.source.Source`."""
        self._link.check()
        end = asyncio.get_running_loop().time() + wait_s
        await self._link.call("fetch", self._held.wait(end))
        return self._held.take(most)

    async def ack(self, delivery: Delivery) -> None:
        """See `triggers.source.Source`.

        PUBACK has no answer, so something is asked that has one, and does nothing: what comes to
        the broker comes in order.
        """
        self._link.check()
        if delivery.token is None or not self._over(delivery.token):
            return
        await self._link.call("ack", self._client.unsubscribe(f"dayfly/{self._name}/nothing"))

    async def nak(self, delivery: Delivery, delay_s: float) -> None:
        """See `triggers.source.Source`."""
        self._link.check()
        self._held.put(delivery, delay_s)

    async def extend(self, delivery: Delivery) -> None:
        """Nothing: it is ours for as long as we are connected."""

    async def lag(self) -> int | None:
        """Nobody knows."""
        return None


def _delivery(message: Message) -> Delivery:
    about = message.properties
    headers = {name.lower(): value for name, value in getattr(about, "UserProperty", ())}
    if kind := getattr(about, "ContentType", ""):
        headers.setdefault("content-type", kind)
    topic = message.topic.value
    return Delivery(
        id="",
        topic=topic,
        group=topic,
        body=message.payload if isinstance(message.payload, bytes) else b"",
        headers=headers,
        token=message.mid if message.qos else None,
    )


class Topic:
    """A topic, as `triggers.source.Topic` promises."""

    def __init__(self, spec: MqttTopic, secret: str = "", call_s: float = CALL_S_MAX) -> None:
        self._spec, self._link = spec, _Link(spec, secret, call_s)
        self._client: _Client

    async def open(self) -> None:
        """See `triggers.source.Topic`."""
        self._client = await self._link.open()

    async def close(self) -> None:
        """See `triggers.source.Topic`."""
        await self._link.close()

    async def tell(self, id_: str, body: bytes) -> None:
        """See `triggers.source.Topic`."""
        about = _properties(PacketTypes.PUBLISH, {"ContentType": EVENT_TYPE})
        told = self._client.publish(self._spec.topic, body, qos=1, properties=about)
        await self._link.call("publish", told)
