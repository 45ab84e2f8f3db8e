"""NATS JetStream: a durable pull consumer, and subjects of a stream."""

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from typing import Any, Final, TypeVar

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig
from nats.js.errors import NotFoundError

from dayfly_gateway.triggers.source import (
    CALL_S_MAX,
    EVENT_TYPE,
    LEASE_S,
    Delivery,
    SourceFailed,
    while_there,
)
from dayfly_pool.brokers import NatsSource, NatsTopic

T = TypeVar("T")
UNDER_WAY_MAX: Final = 10_000
"""Messages of one consumer that are neither acknowledged nor waiting, for all servers together."""

PING_S: Final = 5
SHORTEST_S: Final = 0.01
"""The client refuses to wait for nothing at all."""

MORE_S: Final = 0.25
"""For the rest of a batch, which the broker has."""


class _Link:
    """A connection that ends when it is lost, and says so to whoever waits on it."""

    def __init__(self, spec: NatsSource | NatsTopic, secret: str, call_s: float) -> None:
        self._url, self._secret, self.call_s = spec.url, secret, call_s
        self._client: Client | None = None
        self._lost: asyncio.Future[None]

    async def open(self) -> JetStreamContext:
        self._lost = asyncio.get_running_loop().create_future()
        user, colon, password = self._secret.partition(":")
        login = {"user": user, "password": password} if colon else {"token": user}

        async def lost(error: Exception | None = None) -> None:
            if not self._lost.done():
                self._lost.set_result(None)

        async def quiet(error: Exception) -> None:
            """The call that is under way tells of it."""

        with self._named("connect"):
            async with asyncio.timeout(self.call_s):
                self._client = await nats.connect(
                    self._url.split(","),
                    allow_reconnect=False,
                    connect_timeout=max(1, int(self.call_s)),
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    ping_interval=PING_S,
                    disconnected_cb=lost,
                    closed_cb=lost,
                    error_cb=quiet,
                    **(login if self._secret else {}),
                )
        return self._client.jetstream(timeout=self.call_s)

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(Error, OSError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await client.close()

    async def call(self, what: str, work: Coroutine[Any, Any, T]) -> T:
        """Await *work* for as long as the connection is there. Raises `SourceFailed`."""
        with self._named(what):
            return await while_there(work, self._lost)

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except (Error, OSError, TimeoutError) as error:
            why = str(error) or type(error).__name__
            raise SourceFailed(f"NATS at {self._url}, {what}: {why}") from None


class Source:
    """A durable consumer, as `triggers.source.Source` promises. *name* is `NAMESPACE_TRIGGER`."""

    def __init__(
        self,
        spec: NatsSource,
        name: str,
        secret: str = "",
        lease_s: float = LEASE_S,
        call_s: float = CALL_S_MAX,
    ) -> None:
        self.extend_s: float | None = lease_s / 3
        self._spec, self._consumer, self._lease_s = spec, spec.consumer or f"dayfly-{name}", lease_s
        self._link = _Link(spec, secret, call_s)
        self._stream = spec.stream
        self._context: JetStreamContext
        self._pull: JetStreamContext.PullSubscription

    async def open(self) -> None:
        """See `triggers.source.Source`."""
        self._context = await self._link.open()
        await self._link.call("consumer", self._bind())

    async def _bind(self) -> None:
        context = self._context
        self._stream = self._spec.stream or await context.find_stream_name_by_subject(
            self._spec.subject
        )
        config = ConsumerConfig(
            durable_name=self._consumer,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=self._lease_s,
            filter_subject=self._spec.subject,
            max_ack_pending=UNDER_WAY_MAX,
            max_deliver=-1,
        )
        try:
            known = await context.consumer_info(self._stream, self._consumer)
        except NotFoundError:
            known = await context.add_consumer(self._stream, config)
        if not self._spec.consumer and known.config.filter_subject != self._spec.subject:
            known = await context.add_consumer(self._stream, config)  # ours: it may be changed
        self.extend_s = (known.config.ack_wait or LEASE_S) / 3
        self._pull = await context.pull_subscribe_bind(self._consumer, self._stream)

    async def close(self) -> None:
        """See `triggers.source.Source`."""
        await self._link.close()

    async def fetch(self, most: int, wait_s: float) -> list[Delivery]:
        """See `triggers.source.Source`."""
        return await self._link.call("fetch", self._fetch(most, wait_s))

    async def _fetch(self, most: int, wait_s: float) -> list[Delivery]:
        # The client waits for all that it was asked for: so for one, and then for what is there.
        try:
            messages = await self._pull.fetch(1, timeout=max(wait_s, SHORTEST_S))
        except TimeoutError:
            return []
        more = min(most - 1, messages[0].metadata.num_pending)
        if more:
            with contextlib.suppress(TimeoutError):
                messages += await self._pull.fetch(more, timeout=MORE_S)
        return [_delivery(message) for message in messages]

    async def ack(self, delivery: Delivery) -> None:
        """See `triggers.source.Source`."""
        await self._link.call("ack", delivery.token.ack_sync(timeout=self._link.call_s))

    async def nak(self, delivery: Delivery, delay_s: float) -> None:
        """See `triggers.source.Source`."""
        await self._link.call("nak", delivery.token.nak(delay=delay_s or None))

    async def extend(self, delivery: Delivery) -> None:
        """See `triggers.source.Source`."""
        await self._link.call("extend", delivery.token.in_progress())

    async def lag(self) -> int | None:
        """See `triggers.source.Source`."""
        info = self._context.consumer_info(self._stream, self._consumer)
        return int((await self._link.call("lag", info)).num_pending)


def _delivery(message: Msg) -> Delivery:
    about = message.metadata
    at = about.timestamp.timestamp()
    return Delivery(
        # a stream that was made anew counts from 1 again, at another time
        id=f"{about.stream}/{about.sequence.stream}/{at:.6f}",
        topic=message.subject,
        group=message.subject,
        body=message.data,
        headers={name.lower(): value for name, value in (message.headers or {}).items()},
        at=at,
        attempt=about.num_delivered,
        token=message,
    )


class Topic:
    """A subject of a stream, as `triggers.source.Topic` promises."""

    def __init__(self, spec: NatsTopic, secret: str = "", call_s: float = CALL_S_MAX) -> None:
        self._spec, self._link = spec, _Link(spec, secret, call_s)
        self._context: JetStreamContext

    async def open(self) -> None:
        """See `triggers.source.Topic`."""
        self._context = await self._link.open()

    async def close(self) -> None:
        """See `triggers.source.Topic`."""
        await self._link.close()

    async def tell(self, id_: str, body: bytes) -> None:
        """See `triggers.source.Topic`."""
        headers = {"Nats-Msg-Id": id_, "Content-Type": EVENT_TYPE}
        told = self._context.publish(
            self._spec.subject, body, timeout=self._link.call_s, headers=headers
        )
        await self._link.call("publish", told)
