"""RabbitMQ: a queue, and an exchange.

A queue is subscribed to for as long as a fetch takes, so that what was not asked for stays there.
The client closes a channel, and all that is under way comes again, when one of its calls is
cancelled: so calls go on when who made them does not wait any more, and end by themselves.
"""

import asyncio
import collections
import contextlib
import hashlib
import itertools
import logging
from collections.abc import Coroutine, Iterator, Mapping
from typing import Any, Final, TypeVar

import aiormq
from aiormq.abc import DeliveredMessage
from aiormq.channel import Channel
from aiormq.exceptions import ChannelNotFoundEntity
from msgspec.structs import replace
from yarl import URL

from dayfly_gateway.triggers.source import (
    CALL_S_MAX,
    EVENT_TYPE,
    LEASE_S,
    Delivery,
    SourceFailed,
)
from dayfly_pool.brokers import RabbitMqSource, RabbitMqTopic

logging.getLogger("aiormq").setLevel(logging.CRITICAL)  # what fails is told by us
T = TypeVar("T")
Token = tuple[Channel, int]
"""A number means another message on another channel."""

CLOSE_S: Final = 1
TURNS: Final = 20
"""Of the loop, in which tasks of the client's end that nobody can wait for."""

HEARTBEAT_S: Final = 10
LOOK_S: Final = 0.05
"""A queue has this long to give what it has, however short the wait."""

PREFETCH_MAX: Final = 65_535
DELIVERIES_MAX: Final = 1_000_000_000
"""RabbitMQ 4 throws a message away when 20 connections were lost that it was given to."""

QUORUM: Final[dict[str, Any]] = {"x-queue-type": "quorum", "x-delivery-limit": DELIVERIES_MAX}
PROPERTIES: Final = ("content_type", "content_encoding", "correlation_id", "reply_to")


class _Link:
    """A connection with one channel, which say to whoever waits on them when they are lost."""

    def __init__(self, spec: RabbitMqSource | RabbitMqTopic, secret: str, call_s: float) -> None:
        self._url, self._secret, self.call_s = spec.url, secret, call_s
        self._connection: aiormq.Connection | None = None
        self._under_way: set[asyncio.Task[Any]] = set()
        self._lost: asyncio.Future[Any] | None = None
        self.channel: Channel

    async def open(self) -> None:
        await self.call("connect", self._open())

    async def _open(self) -> None:
        url = URL(self._url)
        if "heartbeat" not in url.query:
            url = url.update_query(heartbeat=HEARTBEAT_S)
        if self._secret:
            user, _, password = self._secret.partition(":")
            url = url.with_user(user).with_password(password)
        self._connection = aiormq.Connection(url)
        self._connection.READER_CLOSE_TIMEOUT = CLOSE_S
        await self._connection.connect()
        await self.renew()

    async def renew(self) -> None:
        """Have a new channel: the broker closes one that asked for what is not there."""
        assert self._connection is not None
        channel = await self._connection.channel()
        assert isinstance(channel, Channel)
        self.channel = channel

    def watch(self) -> None:
        """From now on a channel that is lost ends whatever waits."""
        self._lost = self.channel.closing

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        under_way = list(self._under_way)
        for task in under_way:
            task.cancel()
        with contextlib.suppress(Exception):
            async with asyncio.timeout(2 * CLOSE_S):
                if connection is not None:
                    await connection.close()
                if under_way:
                    await asyncio.wait(under_way)
        for _ in range(TURNS):
            await asyncio.sleep(0)

    def begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start *work*, which goes on until it is over, or this closed."""
        task = asyncio.create_task(work)
        self._under_way.add(task)
        task.add_done_callback(self._over)
        return task

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            task.exception()  # nobody may have waited for it

    async def call(self, what: str, work: Coroutine[Any, Any, T]) -> T:
        """Await *work* for as long as a call may take. Raises `SourceFailed`."""
        return await self.wait(what, self.begin(self._limited(work)))

    async def _limited(self, work: Coroutine[Any, Any, T]) -> T:
        async with asyncio.timeout(self.call_s):
            return await work

    async def wait(self, what: str, task: asyncio.Task[T]) -> T:
        """Await *task* for as long as the connection is there. Raises `SourceFailed`."""
        waited = {task, self._lost} if self._lost else {task}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        with self._named(what):
            if task.done() and not task.cancelled():
                return task.result()
            self._check()
        raise AssertionError("unreachable")

    def check(self) -> None:
        """Raises `SourceFailed` when the connection is not there."""
        if self._lost is None or self._lost.done():
            with self._named("connection"):
                self._check()

    def _check(self) -> None:
        error = self._lost.exception() if self._lost and self._lost.done() else None
        # the client has cancellations in the place of errors, which are none of ours
        known = isinstance(error, Exception) and str(error)
        raise error if error and known else ConnectionError("it is closed")

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any kind: what the client's reader died of is given to all
            why = str(error) or type(error).__name__
            raise SourceFailed(f"RabbitMQ at {self._url}, {what}: {why}") from None


class Source:
    """A queue, as `triggers.source.Source` promises.

    What is under way is ours for as long as the connection lasts; what is given back is kept in
    memory until it is due, for the broker would give it out again at once, and count.
    """

    def __init__(
        self,
        spec: RabbitMqSource,
        name: str,
        secret: str = "",
        lease_s: float = LEASE_S,
        call_s: float = CALL_S_MAX,
    ) -> None:
        self.extend_s: float | None = None
        self._spec, self._link = spec, _Link(spec, secret, call_s)
        self._arrived = collections.deque[DeliveredMessage]()
        self._ours: set[Token] = set()
        self._given_back: dict[Token, tuple[float, Delivery]] = {}
        """When to give it out again."""

        self._enough, self._turn = asyncio.Event(), itertools.count()
        self._subscribed: asyncio.Task[None] | None = None
        self._prefetch = 0

    async def open(self) -> None:
        """See `triggers.source.Source`."""
        await self._link.open()
        await self._link.call("queue", self._bind())
        self._link.channel.on_consumer_cancel_callbacks.add(lambda _: self._enough.set())
        self._link.watch()

    async def _bind(self) -> None:
        queue, exchange = self._spec.queue, self._spec.exchange
        try:
            await self._link.channel.queue_declare(queue, passive=True)
        except ChannelNotFoundEntity:
            await self._link.renew()
            await self._link.channel.queue_declare(queue, durable=True, arguments=QUORUM)
        if exchange:
            await self._link.channel.queue_bind(queue, exchange, self._spec.routing_key)

    async def close(self) -> None:
        """See `triggers.source.Source`."""
        await self._link.close()

    async def fetch(self, most: int, wait_s: float) -> list[Delivery]:
        """See `triggers.source.Source`."""
        now = asyncio.get_running_loop().time
        end, is_over = now() + wait_s, False
        while True:
            if self._subscribed is not None:  # by a fetch that was cancelled
                await self._link.wait("fetch", self._subscribed)
            self._link.check()
            if (found := self._taken(most, now())) or is_over:
                return found
            until = min((end, *(at for at, _ in self._given_back.values())))
            self._enough.clear()
            self._subscribed = self._link.begin(self._subscribe(most, until - now()))
            try:
                await self._link.wait("fetch", self._subscribed)
            except asyncio.CancelledError:
                self._enough.set()
                raise
            self._subscribed, is_over = None, now() >= end

    async def _subscribe(self, most: int, wait_s: float) -> None:
        """Return when something has come, which is then all that comes."""
        channel, limit_s, prefetch = self._link.channel, self._link.call_s, min(most, PREFETCH_MAX)
        if self._prefetch != prefetch:
            await channel.basic_qos(prefetch_count=prefetch, timeout=limit_s)
            self._prefetch = prefetch
        tag = f"dayfly-{next(self._turn)}"
        await channel.basic_consume(
            self._spec.queue, self._arrive, consumer_tag=tag, timeout=limit_s
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(wait_s, LOOK_S)):
                await self._enough.wait()
        if tag not in channel.consumers:
            raise ConnectionError(f"queue {self._spec.queue} has gone")
        await channel.basic_cancel(tag, timeout=limit_s)

    async def _arrive(self, message: DeliveredMessage) -> None:
        self._arrived.append(message)
        self._enough.set()

    def _taken(self, most: int, now: float) -> list[Delivery]:
        due = [token for token, (at, _) in self._given_back.items() if at <= now][:most]
        found = [self._given_back.pop(token)[1] for token in due]
        while self._arrived and len(found) < most:
            found.append(_delivery(self._spec.queue, self._arrived.popleft()))
        self._ours |= {delivery.token for delivery in found}
        return found

    async def ack(self, delivery: Delivery) -> None:
        """See `triggers.source.Source`."""
        self._link.check()
        if delivery.token in self._ours:  # else the broker closes the channel
            self._ours.remove(delivery.token)
            self._given_back.pop(delivery.token, None)
            await self._link.call("ack", self._ack(*delivery.token))

    async def _ack(self, channel: Channel, tag: int) -> None:
        await channel.basic_ack(tag, wait=False)
        await channel.confirm_delivery()  # changes nothing, but is answered after it

    async def nak(self, delivery: Delivery, delay_s: float) -> None:
        """See `triggers.source.Source`."""
        self._link.check()
        if delivery.token in self._ours:
            at = asyncio.get_running_loop().time() + delay_s
            self._given_back[delivery.token] = at, replace(delivery, attempt=delivery.attempt + 1)

    async def extend(self, delivery: Delivery) -> None:
        """See `triggers.source.Source`."""
        self._link.check()

    async def lag(self) -> int | None:
        """See `triggers.source.Source`."""
        self._link.check()
        work = self._link.channel.queue_declare(self._spec.queue, passive=True)
        waiting = (await self._link.call("lag", work)).message_count
        return (waiting or 0) + len(self._arrived)


def _delivery(queue: str, message: DeliveredMessage) -> Delivery:
    about = message.header.properties
    raw: Mapping[str, Any] = about.headers or {}
    headers = {
        name.replace("_", "-"): str(value)
        for name in PROPERTIES
        if (value := getattr(about, name)) is not None
    }
    headers |= {name.lower(): _text(value) for name, value in raw.items()}
    count = raw.get("x-delivery-count")
    exchange, key = message.exchange or "", message.routing_key or ""
    digest = hashlib.blake2b(message.body, digest_size=8).hexdigest()
    return Delivery(
        # who publishes chooses ids, and may have chosen one before
        id=f"{queue}/{about.message_id}/{digest}" if about.message_id else "",
        topic=f"{exchange}/{key}" if exchange else key,
        group=key,
        body=message.body,
        headers=headers,
        at=about.timestamp.timestamp() if about.timestamp else 0.0,
        # a queue that is no quorum queue says only whether it was given out before
        attempt=1 + max(count if isinstance(count, int) else 0, bool(message.redelivered)),
        token=(message.channel, message.delivery_tag),
    )


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes | bytearray) else str(value)


class Topic:
    """An exchange, as `triggers.source.Topic` promises."""

    def __init__(self, spec: RabbitMqTopic, secret: str = "", call_s: float = CALL_S_MAX) -> None:
        self._spec, self._link = spec, _Link(spec, secret, call_s)

    async def open(self) -> None:
        """See `triggers.source.Topic`."""
        await self._link.open()
        self._link.watch()

    async def close(self) -> None:
        """See `triggers.source.Topic`."""
        await self._link.close()

    async def tell(self, id_: str, body: bytes) -> None:
        """See `triggers.source.Topic`."""
        self._link.check()
        about = aiormq.spec.Basic.Properties(
            message_id=id_, content_type=EVENT_TYPE, delivery_mode=2
        )
        told = self._link.channel.basic_publish(
            body,
            exchange=self._spec.exchange,
            routing_key=self._spec.routing_key,
            properties=about,
            mandatory=True,  # what no queue takes fails
        )
        await self._link.call("publish", told)
