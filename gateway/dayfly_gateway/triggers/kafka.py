"""Kafka: a consumer group, and topics.

A partition has one position that is committed: all before it is done with. What is done with after
something that is not is remembered, and comes again if this ends first.
"""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Coroutine, Iterable, Iterator
from typing import Any, Final, NamedTuple, TypeVar

from aiokafka import (
    AIOKafkaConsumer,
    AIOKafkaProducer,
    ConsumerRebalanceListener,
    ConsumerRecord,
    TopicPartition,
)
from aiokafka.conn import create_conn
from aiokafka.errors import (
    CommitFailedError,
    ConsumerStoppedError,
    IllegalStateError,
    KafkaConnectionError,
    KafkaError,
)
from msgspec.structs import replace

from dayfly_gateway.triggers.held import Held, Window
from dayfly_gateway.triggers.source import (
    CALL_S_MAX,
    EVENT_TYPE,
    LEASE_S,
    Delivery,
    SourceFailed,
)
from dayfly_pool.brokers import KafkaSource, KafkaTopic

T = TypeVar("T")
SESSION_S_MAX: Final = 6.0
"""Who is silent for so long loses its partitions; brokers take no less, if not told to."""

BUSY_S_MAX: Final = 7 * 86400
"""aiokafka leaves the group when nobody fetches for this long: an event may take its time."""

AHEAD_MAX: Final = 10_000
"""Messages of a partition that are done with, or under way, after one that is not done with."""

PARTITION_BYTES: Final = 1 << 20
ANSWER_BYTES: Final = 8 << 20
MESSAGE_BYTES_MAX: Final = 64 << 20
"""Read before it is asked for; and told: there the broker has a limit of its own."""

PING_S: Final = 3.0
"""Who has nothing to give is asked this often whether it is there: the client would not say."""

GET_MS: Final = 1000
FULL_S: Final = 0.1
FAILURES: Final = (
    KafkaError,
    ConsumerStoppedError,
    OSError,
    TimeoutError,
    ValueError,  # a record that the client cannot read
    LookupError,  # a login that is refused, with SCRAM
    AssertionError,  # the client's own
)

logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # it is said once, by who calls


class _Link:
    """The way to the brokers; once it has failed, it has for ever."""

    def __init__(self, spec: KafkaSource | KafkaTopic, secret: str, call_s: float) -> None:
        self._servers, self._tls, self._login = spec.servers, spec.tls, spec.login
        self._secret, self.call_s = secret, call_s
        self._gone: str | None = None

    async def settings(self, request_s: float) -> dict[str, Any]:
        """What the clients are made with. Must be called in the loop that they run in."""
        user, _, password = self._secret.partition(":")
        sasl, tls = "SASL_" if self._secret else "", "SSL" if self._tls else "PLAINTEXT"
        return {
            "client_id": "dayfly",
            "request_timeout_ms": int(1000 * request_s),
            "security_protocol": sasl + tls,
            "ssl_context": await asyncio.to_thread(ssl.create_default_context)
            if self._tls
            else None,
            "sasl_mechanism": self._login,
            "sasl_plain_username": user if self._secret else None,
            "sasl_plain_password": password if self._secret else None,
        }

    async def start(self, client: AIOKafkaConsumer | AIOKafkaProducer) -> None:
        """Connect. aiokafka does not say why it cannot: then one broker is asked again."""
        try:
            await self.call("connect", client.start())
        except SourceFailed as error:
            if not isinstance(error.__context__, KafkaConnectionError):
                raise
            host, _, port = self._servers.split(",")[0].rpartition(":")
            about = await self.settings(self.call_s)
            with self._named("connect"):
                async with asyncio.timeout(self.call_s):
                    (await create_conn(host.strip("[]"), int(port), **about)).close()
            raise

    def check(self) -> None:
        """Raises `SourceFailed` if it has failed, or is closed."""
        if self._gone is not None:
            raise SourceFailed(self._gone)

    async def call(self, what: str, work: Coroutine[Any, Any, T], wait_s: float = 0.0) -> T:
        """Await *work*, for *wait_s* besides what a call may take. Raises `SourceFailed`."""
        try:
            self.check()
        except SourceFailed:
            work.close()
            raise
        with self._named(what):
            async with asyncio.timeout(wait_s + self.call_s):
                return await work

    async def close(self, client: AIOKafkaConsumer | AIOKafkaProducer | None) -> None:
        """Disconnect; it takes no longer than a request may. No call is made any more."""
        self._gone = self._gone or f"Kafka at {self._servers}: closed"
        if client is None:
            return
        stopping = asyncio.ensure_future(client.stop())
        await asyncio.wait((stopping,))
        if stopping.cancelled() or stopping.exception() is not None:
            # aiokafka's consumer takes a fetch that is to be tried again, and which it has itself
            # cancelled, for its own end: the rest is left to us.
            for task in client._fetcher._pending_tasks if client._fetcher else ():
                task.cancel()
            await client._client.close()

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            why = str(error) if isinstance(error, KafkaError | OSError) else ""
            why = why or repr(error)
            self._gone = f"Kafka at {self._servers}, {what}: {why}"
            raise SourceFailed(self._gone) from None


class _Part:
    """A partition for as long as it is ours: what was given out of it, and what is committed."""

    def __init__(self) -> None:
        self.window = Window[int]()
        self.over = self.committed = -1


class _Token(NamedTuple):
    partition: TopicPartition
    part: _Part
    offset: int


async def _shielded(work: Coroutine[Any, Any, T]) -> T:
    """Await what aiokafka goes on with though it is cancelled; what comes of it then is seen."""
    task = asyncio.ensure_future(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return await asyncio.shield(task)


class Source:
    """A member of a consumer group, as `triggers.source.Source` promises.

    *name* is `NAMESPACE_TRIGGER`. When somebody joins the group or leaves it, the partitions are
    given out anew, and with them all that is not committed.
    """

    def __init__(
        self,
        spec: KafkaSource,
        name: str,
        secret: str = "",
        lease_s: float = LEASE_S,
        call_s: float = CALL_S_MAX,
    ) -> None:
        self.extend_s: float | None = None
        self._spec, self._group = spec, spec.group or f"dayfly-{name}"
        self._session_s = min(lease_s, SESSION_S_MAX)
        self._link = _Link(spec, secret, call_s)
        self._held, self._committing = Held(), asyncio.Lock()
        self._parts: dict[TopicPartition, _Part] = {}
        self._new: set[TopicPartition] = set()
        self._joined = asyncio.Event()
        self._heard_at = 0.0
        self._consumer: AIOKafkaConsumer | None = None

    async def open(self) -> None:
        """See `triggers.source.Source`.

        Others of the group may take their time until there are partitions for us: later ones will
        do.
        """
        # A broker answers who joins when all have joined, or were waited for: no sooner.
        request_s = max(self._link.call_s, 1.5 * self._session_s)
        end = asyncio.get_running_loop().time() + self._link.call_s
        self._consumer = AIOKafkaConsumer(
            bootstrap_servers=self._spec.servers,
            group_id=self._group,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            isolation_level="read_committed",
            session_timeout_ms=int(1000 * self._session_s),
            heartbeat_interval_ms=int(1000 * self._session_s / 3),
            max_poll_interval_ms=1000 * BUSY_S_MAX,
            max_partition_fetch_bytes=PARTITION_BYTES,
            fetch_max_bytes=ANSWER_BYTES,
            **await self._link.settings(request_s),
        )
        await self._link.start(self._consumer)
        await self._link.call(f"topic {self._spec.topic}", self._ping())
        self._consumer.subscribe([self._spec.topic], listener=_Rebalance(self))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(end):
                await self._joined.wait()
        await self._link.call("begin", self._begin())

    async def _ping(self) -> None:
        """Return when those who have our partitions, and our group, are there."""
        first = TopicPartition(self._spec.topic, 0)
        await self._ours.end_offsets(list(self._parts) or [first])
        await self._ours.committed(first)
        self._heard_at = asyncio.get_running_loop().time()

    @property
    def _ours(self) -> AIOKafkaConsumer:
        if self._consumer is None:
            raise SourceFailed(f"Kafka at {self._spec.servers}: closed")
        return self._consumer

    async def _begin(self) -> None:
        """Commit where we begin, if it is the end: else it would be another one next time."""
        for each in list(self._new) if self._spec.start == "latest" else ():
            if await self._ours.committed(each) is None:
                end = (await self._ours.end_offsets([each]))[each]
                with contextlib.suppress(CommitFailedError, IllegalStateError):  # not ours any more
                    self._ours.seek(each, end)
                    await _shielded(self._ours.commit({each: end}))
            self._new.discard(each)

    def revoked(self) -> None:
        """Nothing is ours: what was, and is not committed, is given out again."""
        self._parts, self._new = {}, set()
        self._held.clear()

    def assigned(self, partitions: Iterable[TopicPartition]) -> None:
        """Those are ours."""
        self._parts = {each: _Part() for each in partitions}
        self._new = set(self._parts)
        self._joined.set()

    async def close(self) -> None:
        """See `triggers.source.Source`."""
        consumer, self._consumer = self._consumer, None
        await self._link.close(consumer)

    async def fetch(self, most: int, wait_s: float) -> list[Delivery]:
        """See `triggers.source.Source`."""
        self._link.check()
        if found := self._held.take(most):
            return found
        await self._link.call("fetch", self._wait(most, wait_s), wait_s)
        found = self._held.take(most)
        if not found and asyncio.get_running_loop().time() > self._heard_at + PING_S:
            await self._link.call("ping", self._ping())
        return found

    async def _wait(self, most: int, wait_s: float) -> None:
        """Return when something has come, or is due that was given back, or after *wait_s*."""
        end = asyncio.get_running_loop().time() + wait_s
        waiting = asyncio.ensure_future(self._held.wait(end))
        receiving = asyncio.ensure_future(self._receive(most))
        try:
            await asyncio.wait((waiting, receiving), return_when=asyncio.FIRST_COMPLETED)
            if receiving.done():
                receiving.result()
        finally:
            receiving.cancel()
            waiting.cancel()

    async def _receive(self, most: int) -> None:
        """Hold what comes, when something does. What has left the client is held at once."""
        found: dict[TopicPartition, list[ConsumerRecord]] = {}
        while not any(found.values()):
            await self._begin()
            free = [each for each, part in self._parts.items() if len(part.window) < AHEAD_MAX]
            if self._parts and not free:
                await asyncio.sleep(FULL_S)
                continue
            some = free if len(free) < len(self._parts) else ()
            found = await self._ours.getmany(*some, timeout_ms=GET_MS, max_records=most)
        self._heard_at = asyncio.get_running_loop().time()
        for partition, records in found.items():
            part = self._parts[partition]
            for record in records:
                part.window.give(record.offset)
                self._held.put(_delivery(record, _Token(partition, part, record.offset)))

    def _is_ours(self, token: _Token) -> bool:
        return self._parts.get(token.partition) is token.part

    async def ack(self, delivery: Delivery) -> None:
        """See `triggers.source.Source`."""
        token: _Token = delivery.token
        if over := token.part.window.done(token.offset):
            token.part.over = over[-1] + 1
        await self._link.call("commit", self._commit())

    async def _commit(self) -> None:
        """Commit all that may be: one does it for all who wait."""
        async with self._committing:
            parts = self._parts
            owed = {each: p.over for each, p in parts.items() if p.over > p.committed}
            if not owed:
                return
            try:
                await _shielded(self._ours.commit(owed))
            except (CommitFailedError, IllegalStateError):
                return  # they are given out anew
            for each, over in owed.items():
                parts[each].committed = over

    async def nak(self, delivery: Delivery, delay_s: float) -> None:
        """See `triggers.source.Source`."""
        self._link.check()
        if self._is_ours(delivery.token):
            self._held.put(replace(delivery, attempt=delivery.attempt + 1), delay_s)

    async def extend(self, delivery: Delivery) -> None:
        """Nothing: it is ours for as long as we are connected, and the group is what it is."""

    async def lag(self) -> int | None:
        """See `triggers.source.Source`. Of the partitions that are ours."""
        return await self._link.call("lag", self._lag())

    async def _lag(self) -> int:
        try:
            ends = await self._ours.end_offsets(list(self._parts))
            return sum([end - await self._ours.position(each) for each, end in ends.items()])
        except IllegalStateError:  # they are given out anew
            return 0


class _Rebalance(ConsumerRebalanceListener):  # type: ignore[misc]
    """Tells a source what is its own."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        self._source.revoked()

    def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        self._source.assigned(assigned)


def _delivery(record: ConsumerRecord, token: _Token) -> Delivery:
    headers = {
        name.lower(): (value or b"").decode(errors="replace") for name, value in record.headers
    }
    if record.key:
        with contextlib.suppress(UnicodeDecodeError):
            headers["kafka-key"] = record.key.decode()
    return Delivery(
        # a topic that was made anew counts from 0 again, at another time
        id=f"{record.topic}/{record.partition}/{record.offset}/{record.timestamp}",
        topic=record.topic,
        group=str(record.partition),
        body=record.value or b"",
        headers=headers,
        at=max(record.timestamp, 0) / 1000,
        token=token,
    )


class Topic:
    """A topic, as `triggers.source.Topic` promises."""

    def __init__(self, spec: KafkaTopic, secret: str = "", call_s: float = CALL_S_MAX) -> None:
        self._spec, self._link = spec, _Link(spec, secret, call_s)
        self._producer: AIOKafkaProducer | None = None

    async def open(self) -> None:
        """See `triggers.source.Topic`."""
        self._producer = AIOKafkaProducer(
            bootstrap_servers=self._spec.servers,
            acks="all",
            max_request_size=MESSAGE_BYTES_MAX,
            **await self._link.settings(self._link.call_s),
        )
        await self._link.start(self._producer)

    async def close(self) -> None:
        """See `triggers.source.Topic`."""
        producer, self._producer = self._producer, None
        await self._link.close(producer)

    async def tell(self, id_: str, body: bytes) -> None:
        """See `triggers.source.Topic`."""
        if self._producer is None:
            raise SourceFailed(f"Kafka at {self._spec.servers}: closed")
        headers = [("content-type", EVENT_TYPE.encode())]
        told = self._producer.send_and_wait(self._spec.topic, body, headers=headers)
        await self._link.call("publish", told)
