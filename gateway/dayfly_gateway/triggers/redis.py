"""Redis or Valkey: a consumer group of a stream, and a stream.

All servers read as one consumer of the group. Whose an entry is now says how often it was given
out: who finds another count than his own has lost it.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Coroutine, Iterator, Mapping
from typing import Any, Final, TypeVar

import msgspec
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from dayfly_gateway.triggers.source import (
    CALL_S_MAX,
    EVENT_TYPE,
    LEASE_S,
    Delivery,
    SourceFailed,
)
from dayfly_pool.brokers import RedisSource, RedisTopic

T = TypeVar("T")
Entry = tuple[bytes, dict[bytes, bytes]]
CONSUMER: Final = "dayfly"
CONNECTIONS_MAX: Final = 8
"""Of one source: one waits for what comes, the others tell of what has been."""

AT_MS_MAX: Final = 253_402_300_800_000
"""The year 10000: an id from then on is no time."""


class _Link:
    """Connections that are made when needed, and never again by themselves within a call."""

    def __init__(self, spec: RedisSource | RedisTopic, secret: str, call_s: float) -> None:
        self._url, self._call_s = spec.url, call_s
        user, colon, password = secret.partition(":")
        self._user, self._password = (user, password) if colon else ("", secret)
        self._pool: BlockingConnectionPool | None = None

    async def open(self) -> Redis:
        with self._named("connect"):
            self._pool = BlockingConnectionPool.from_url(
                self._url,
                max_connections=CONNECTIONS_MAX,
                timeout=self._call_s,
                username=self._user or None,
                password=self._password or None,
                socket_timeout=None,  # `call` has the limit
                socket_connect_timeout=self._call_s,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
            )
        return Redis(connection_pool=self._pool)

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await pool.aclose()

    async def call(self, what: str, work: Awaitable[T], more_s: float = 0.0) -> T:
        """Await *work*, which may take *more_s* longer than a call. Raises `SourceFailed`."""
        if self._pool is None:  # it would connect again
            if isinstance(work, Coroutine):
                work.close()
            raise SourceFailed(f"Redis at {self._url}, {what}: it is closed")
        with self._named(what):
            async with asyncio.timeout(self._call_s + more_s):
                return await work

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except (RedisError, OSError, TimeoutError, ValueError) as error:
            why = str(error) or type(error).__name__
            if self._password:  # a server that has no AUTH repeats what it was sent
                why = why.replace(self._password, "...")
            raise SourceFailed(f"Redis at {self._url}, {what}: {why}") from None


class Source:
    """A consumer group, as `triggers.source.Source` promises. *name* is `NAMESPACE_TRIGGER`."""

    def __init__(
        self,
        spec: RedisSource,
        name: str,
        secret: str = "",
        lease_s: float = LEASE_S,
        call_s: float = CALL_S_MAX,
    ) -> None:
        self.extend_s: float | None = lease_s / 3
        self._spec, self._group = spec, spec.group or f"dayfly-{name}"
        self._look_s, self._lease_ms = lease_s / 3, max(1, int(lease_s * 1000))
        self._link = _Link(spec, secret, call_s)
        self._given_back: dict[bytes, tuple[float, int]] = {}
        """When to give it out again, and how often it had been; still pending at the broker."""

        self._look_at = 0.0
        self._client: Redis

    async def open(self) -> None:
        """See `triggers.source.Source`."""
        self._client = await self._link.open()
        self._given_back, self._look_at = {}, 0.0
        await self._link.call("group", self._bind())

    async def _bind(self) -> None:
        start = "0" if self._spec.start == "earliest" else "$"
        try:
            await self._client.xgroup_create(self._spec.stream, self._group, start, mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    async def close(self) -> None:
        """See `triggers.source.Source`."""
        await self._link.close()

    async def fetch(self, most: int, wait_s: float) -> list[Delivery]:
        """See `triggers.source.Source`."""
        return await self._link.call("fetch", self._fetch(most, wait_s), wait_s)

    async def _fetch(self, most: int, wait_s: float) -> list[Delivery]:
        now = asyncio.get_running_loop().time
        end = now() + wait_s
        while True:
            if now() >= self._look_at:
                await self._keep_given_back(now())
                found = await self._left(most)
                # more of it may be there when there was as much as was asked for
                self._look_at = now() + (self._look_s if len(found) < most else 0.0)
                if found:
                    return found
            if found := await self._due(most, now()):
                return found
            until = min((end, self._look_at, *(at for at, _ in self._given_back.values())))
            streams: Any = {self._spec.stream: ">"}
            block_ms = max(1, int((until - now()) * 1000)) if until > now() else None
            read: Any = await self._client.xreadgroup(
                self._group, CONSUMER, streams, count=most, block=block_ms
            )
            if read or now() >= end:
                return [self._delivery(entry, 1) for _, entries in read for entry in entries]

    async def _left(self, most: int) -> list[Delivery]:
        """What somebody was given who neither acknowledged nor extended it."""
        pending: Any = await self._client.xpending_range(
            self._spec.stream, self._group, "-", "+", most, idle=self._lease_ms
        )
        counts = {each["message_id"]: each["times_delivered"] for each in pending}
        return await self._claim(counts, self._lease_ms)

    async def _due(self, most: int, now: float) -> list[Delivery]:
        """What was given back, and has waited long enough."""
        due = [id_ for id_, (at, _) in self._given_back.items() if at <= now][:most]
        counts = await self._ours({id_: self._given_back[id_][1] for id_ in due})
        found = await self._claim(counts, 0)
        for id_ in due:
            del self._given_back[id_]
        return found

    async def _claim(self, counts: Mapping[bytes, int], idle_ms: int) -> list[Delivery]:
        """Give out again what nobody else took in the meantime, and what still exists."""
        if not counts:
            return []
        entries: Any = await self._client.xclaim(
            self._spec.stream, self._group, CONSUMER, idle_ms, list(counts)
        )
        return [self._delivery((id_, fields), counts[id_] + 1) for id_, fields in entries if fields]

    async def _ours(self, counts: Mapping[bytes, int]) -> dict[bytes, int]:
        """Those of *counts* that nobody was given since."""
        if not counts:
            return {}
        async with self._client.pipeline(transaction=False) as pipe:
            for id_ in counts:
                pipe.xpending_range(self._spec.stream, self._group, id_, id_, 1)
            answers = await pipe.execute()
        found = {each["message_id"]: each["times_delivered"] for each, *_ in filter(None, answers)}
        return {id_: count for id_, count in counts.items() if found.get(id_) == count}

    async def _keep(self, wanted: Mapping[bytes, tuple[float, int]]) -> dict[bytes, int]:
        """Keep each, if it is still ours, for so many seconds, at most for a lease: which are."""
        ours = await self._ours({id_: count for id_, (_, count) in wanted.items()})
        async with self._client.pipeline(transaction=False) as pipe:
            for id_ in ours:
                idle = max(0, self._lease_ms - max(0, int(wanted[id_][0] * 1000)))
                pipe.xclaim(
                    self._spec.stream, self._group, CONSUMER, 0, [id_], idle=idle, justid=True
                )
            await pipe.execute()
        return ours

    async def _keep_given_back(self, now: float) -> None:
        waiting = {
            id_: (at - now, count) for id_, (at, count) in self._given_back.items() if at > now
        }
        ours = await self._keep(waiting)
        for id_ in waiting.keys() - ours.keys():
            self._given_back.pop(id_, None)

    async def ack(self, delivery: Delivery) -> None:
        """See `triggers.source.Source`."""
        self._given_back.pop(delivery.token, None)
        work = self._client.xack(self._spec.stream, self._group, delivery.token)
        await self._link.call("ack", work)

    async def nak(self, delivery: Delivery, delay_s: float) -> None:
        """See `triggers.source.Source`."""
        id_, count = delivery.token, delivery.attempt
        at = asyncio.get_running_loop().time() + delay_s
        if await self._link.call("nak", self._keep({id_: (delay_s, count)})):
            self._given_back[id_] = at, count

    async def extend(self, delivery: Delivery) -> None:
        """See `triggers.source.Source`."""
        wanted = {delivery.token: (self._lease_ms / 1000, delivery.attempt)}
        await self._link.call("extend", self._keep(wanted))

    async def lag(self) -> int | None:
        """See `triggers.source.Source`."""
        groups = await self._link.call("lag", self._client.xinfo_groups(self._spec.stream))
        lags = [each.get("lag") for each in groups if each["name"] == self._group.encode()]
        return max(0, int(lags[0])) if lags and lags[0] is not None else None

    def _delivery(self, entry: Entry, attempt: int) -> Delivery:
        id_, fields = entry
        at_ms = int(id_.partition(b"-")[0])
        digest = hashlib.blake2b(repr(sorted(fields.items())).encode(), digest_size=8)
        headers = {_text(name).lower(): _text(value) for name, value in fields.items()}
        body = fields.get(self._spec.field.encode())
        if body is None:
            body = msgspec.json.encode({_text(n): _text(v) for n, v in fields.items()})
        else:
            del headers[self._spec.field.lower()]
        return Delivery(
            # ids are of the time; but who publishes may choose them, also those of a past stream
            id=f"{self._spec.stream}/{id_.decode()}/{digest.hexdigest()}",
            topic=self._spec.stream,
            group=self._spec.stream,
            body=body,
            headers=headers,
            at=at_ms / 1000 if at_ms < AT_MS_MAX else 0.0,
            attempt=attempt,
            token=id_,
        )


def _text(value: bytes) -> str:
    return value.decode(errors="replace")


class Topic:
    """A stream, as `triggers.source.Topic` promises."""

    def __init__(self, spec: RedisTopic, secret: str = "", call_s: float = CALL_S_MAX) -> None:
        self._spec, self._link = spec, _Link(spec, secret, call_s)
        self._client: Redis

    async def open(self) -> None:
        """See `triggers.source.Topic`."""
        self._client = await self._link.open()
        await self._link.call("connect", self._client.ping())

    async def close(self) -> None:
        """See `triggers.source.Topic`."""
        await self._link.close()

    async def tell(self, id_: str, body: bytes) -> None:
        """See `triggers.source.Topic`."""
        fields: Any = {self._spec.field: body, "content-type": EVENT_TYPE}
        work = self._client.xadd(
            self._spec.stream, fields, maxlen=self._spec.length_max, approximate=True
        )
        await self._link.call("publish", work)
