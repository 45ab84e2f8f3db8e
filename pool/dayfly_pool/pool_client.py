"""The gateway's end of the wire: a connection to every shard, and which of them has a call.

`PoolClient.invoke` is `Pool.invoke` at a distance: the same outcomes, the same errors. What
certainly did not begin goes to the next shard; what may have begun when its shard was lost is tried
once more only where that is harmless.
"""

import asyncio
import logging
import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeVar

from dayfly.protocol import Frame, ProtocolError
from dayfly_pool import tls, wire
from dayfly_pool.cluster.members import Address, Members
from dayfly_pool.cluster.shards import Ring, Spread, choose
from dayfly_pool.errors import (
    BadInput,
    Draining,
    FunctionNotFound,
    NoShard,
    NotReadyHere,
    PlatformError,
    QueueFull,
    ShardLost,
    StoreFailed,
)
from dayfly_pool.models import Failure, FunctionId, Invocation, InvocationId, Outcome
from dayfly_pool.peers import BEAT_S, QUIET_S, SILENT_S, Wire
from dayfly_pool.store.events import Accepted
from dayfly_pool.tls import Identity

log = logging.getLogger("dayfly.pool_client")
CONNECT_S: Final = 3.0
BACKOFF_S, BACKOFF_S_MAX = 0.05, 1.0
"""A shard that restarts is to be found again within a second."""

GATHER_S: Final = 1.5
"""How long a start waits for those shards that do not answer."""

CALLS_MAX: Final = 20_000
FUNCTIONS_MAX: Final = 1_000_000
READY_S: Final = 0.1
"""Between two looks whether a shard has fetched a function."""

SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
"""RFC 9110: what a client did not ask to change anything may be asked again."""

A = TypeVar("A", Outcome, Accepted)


class NotBegun(Exception):
    """The call certainly did not begin: another shard may have it."""


class Lost(Exception):
    """The shard was lost after it had been sent the call. Nobody knows what it did with it."""


class Peer:
    """One shard as a gateway sees it: its connection, kept up while `run` runs.

    *changed* is called when it can be given calls, or no longer; *heard* when it has listed its
    functions, or changes of them.
    """

    def __init__(
        self,
        name: str,
        address: Address,
        identity: Identity,
        own_name: str,
        changed: Callable[[], None],
        heard: Callable[["Peer"], None],
    ) -> None:
        self.name, self.address = name, address
        self.queue_s_max = 0.0
        self.why = "not connected yet"
        """Why it is not up."""

        self.functions: dict[FunctionId, wire.Listed] | None = None
        """Those that it has; None until it has listed them all."""

        self.under_way: Counter[FunctionId] = Counter()
        self._listing: dict[FunctionId, wire.Listed] = {}
        self._identity, self._own_name = identity, own_name
        self._changed, self._heard = changed, heard
        self._wire: Wire | None = None
        self._is_greeted = self._is_draining = self._is_quiet = self._is_retired = False
        self._over = asyncio.Event()
        self._number = 0
        self._pending: dict[int, asyncio.Future[tuple[wire.Message, bytes]]] = {}

    # ---- life ---------------------------------------------------------------------------------

    @property
    def is_live(self) -> bool:
        """Whether calls may be sent to it."""
        return self._is_greeted and not (self._is_draining or self._is_quiet or self._is_retired)

    async def run(self) -> None:
        """Be connected until it is retired, and has answered."""
        backoff_s = BACKOFF_S
        while not self._is_retired:
            if await self._connect():
                backoff_s = BACKOFF_S
                await self._keep()
                log.info("a shard has gone", extra={"shard": self.name, "why": self.why})
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1))
            backoff_s = min(2 * backoff_s, BACKOFF_S_MAX)

    async def _connect(self) -> bool:
        loop = asyncio.get_running_loop()
        self._over.clear()
        self._number, self._is_draining, self._is_quiet = 0, False, False
        connection = Wire(self._take, self._end)
        try:
            async with asyncio.timeout(CONNECT_S):
                await loop.create_connection(
                    lambda: connection,
                    *self.address,
                    ssl=self._identity.connecting(tls.CALLS),
                    server_hostname="pool",
                )
        except TimeoutError:
            self.why = f"no connection within {CONNECT_S:g} s"
        except OSError as error:  # also: a certificate that is not believed
            self.why = f"no connection: {error}"
        except PlatformError as error:
            self.why = error.detail
        else:
            self._wire = connection
            connection.send(wire.encode(wire.Hello(wire.WIRE, self._own_name)))
            connection.send(wire.encode(wire.Watch()))
            return not connection.is_over
        connection.end(self.why)
        return False

    async def _keep(self) -> None:
        """Say that we are here, and look whether it is, until it is over."""
        beat, connection = wire.encode(wire.Beat()), self._wire
        assert connection is not None
        try:
            while not self._over.is_set() and (self._pending or not self._is_retired):
                before = time.monotonic()
                connection.send(beat)
                try:
                    async with asyncio.timeout(BEAT_S / 2):
                        await self._over.wait()
                except TimeoutError:
                    pass
                if time.monotonic() - before < BEAT_S:  # else it was we who did not listen
                    self._judge(connection)
        finally:
            connection.end("we end")

    def _judge(self, connection: Wire) -> None:
        silent_s = connection.silent_s
        is_quiet = silent_s > QUIET_S
        if is_quiet != self._is_quiet:
            self._is_quiet = is_quiet
            log.warning(
                "a shard says nothing" if is_quiet else "a shard speaks again",
                extra={"shard": self.name},
            )
            self._changed()
        if silent_s > SILENT_S:
            connection.end("it says nothing any more")

    def _end(self, why: str) -> None:
        self.why = why
        self._is_greeted, self._wire, self.functions = False, None, None
        pending, self._pending = self._pending, {}
        for future in pending.values():
            if not future.done():
                future.set_exception(Lost(why))
        self._over.set()
        self._changed()

    def retire(self) -> None:
        """It is no member any more: what it has it may answer, and nothing more is sent to it."""
        self._is_retired = True

    def stand_aside(self) -> None:
        """It has said of itself that it takes no more."""
        self._is_draining = True
        self._changed()

    # ---- calls --------------------------------------------------------------------------------

    async def invoke(self, invocation: Invocation, queue_s_max: float) -> Outcome:
        """Run it there. Raises `PlatformError`, `NotBegun`, `Lost`."""
        self.under_way[invocation.function] += 1
        try:
            message, body = await self._ask(wire.asked(invocation, queue_s_max), invocation.body)
        except ProtocolError as error:
            return Failure("BadRequest", f"the request cannot be passed on: {error}"[:500])
        finally:
            self.under_way[invocation.function] -= 1
            if not self.under_way[invocation.function]:
                del self.under_way[invocation.function]
        if isinstance(message, wire.Refused):
            raise wire.error_of(message, body)
        assert isinstance(message, wire.Succeeded | wire.Failed)  # `_take` has looked
        return wire.outcome_of(message, body)

    async def accept(self, invocation: Invocation, key: tuple[str, str] | None) -> Accepted:
        """Have it kept there. Raises `PlatformError`, `NotBegun`, `Lost`."""
        asked = wire.Accept(
            invocation.id, invocation.function, invocation.http, invocation.trace, key
        )
        try:
            message, body = await self._ask(asked, invocation.body)
        except ProtocolError as error:
            raise BadInput(f"the request cannot be passed on: {error}"[:500]) from None
        if isinstance(message, wire.Refused):
            raise wire.error_of(message, body)
        assert isinstance(message, wire.Accepted)
        return Accepted(InvocationId(message.id), message.is_new, message.is_other)

    async def _ask(
        self, message: wire.Invoke | wire.Accept, body: bytes
    ) -> tuple[wire.Message, bytes]:
        connection = self._wire
        if connection is not None and not connection.has_room:
            await connection.room()
        if connection is None or not self.is_live or connection is not self._wire:
            raise NotBegun
        number = self._number + 1
        frame = wire.encode(message, number, body)
        self._number = number
        future: asyncio.Future[tuple[wire.Message, bytes]]
        future = self._pending[number] = asyncio.get_running_loop().create_future()
        connection.send(frame)
        try:
            return await future
        finally:
            if self._pending.pop(number, None) is not None:  # nobody waits for it any more
                connection.send(wire.encode(wire.Cancel(), number))

    def _take(self, frame: Frame) -> None:
        message = wire.decode(frame)
        if isinstance(message, wire.Hello):
            self._greeted(message)
            return
        if not self._is_greeted:
            raise ProtocolError("no Hello")
        match message:
            case wire.Succeeded() | wire.Failed() | wire.Refused() | wire.Accepted():
                self._answered(frame, message)
            case wire.Beat():
                pass
            case wire.Functions():
                self._list(message, wire.unpack(frame.body, wire.Part))
            case wire.Draining():
                self.stand_aside()
                assert self._wire is not None
                self._wire.send(wire.encode(wire.Left()))
            case _:
                raise ProtocolError(f"unasked {type(message).__name__}")

    def _list(self, message: wire.Functions, part: wire.Part) -> None:
        if message.is_anew:
            self._listing = {}
        self._listing.update((FunctionId(each.id), each) for each in part.listed)
        for id_ in part.gone:
            self._listing.pop(FunctionId(id_), None)
        if len(self._listing) > FUNCTIONS_MAX:
            raise ProtocolError(f"over {FUNCTIONS_MAX} functions")
        if message.is_last:
            self.functions = self._listing
            self._heard(self)

    def _greeted(self, message: wire.Hello) -> None:
        if self._is_greeted or message.wire != wire.WIRE:
            raise ProtocolError(f"Hello of wire {message.wire}, ours is {wire.WIRE}")
        if message.name != self.name:
            raise ProtocolError(f"it is {message.name!r}, not {self.name!r}")
        self.queue_s_max = message.queue_s_max
        self._is_greeted, self.why = True, ""
        log.info("a shard has come", extra={"shard": self.name})
        self._changed()

    def _answered(
        self, frame: Frame, message: wire.Succeeded | wire.Failed | wire.Refused | wire.Accepted
    ) -> None:
        if not 0 < frame.invocation <= self._number:
            raise ProtocolError(f"an answer to {frame.invocation}, which nobody asked")
        future = self._pending.pop(frame.invocation, None)  # none: it has been given up
        if future is not None and not future.done():
            future.set_result((message, frame.body))


class PoolClient:
    """The whole pool, from a gateway. Use it inside `async with client.running():`.

    *changed* is called when the functions have changed.
    """

    def __init__(
        self,
        members: Members,
        identity: Identity,
        name: str,
        *,
        queue_s_max: float = 30.0,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.functions: dict[FunctionId, wire.Listed] = {}
        self.peers: dict[str, Peer] = {}
        self.retried: Counter[str] = Counter()
        """Calls that another shard was given, by why."""

        self.queue_s_max = queue_s_max
        self._members, self._identity, self._name = members, identity, name
        self._changed = changed
        self._ring, self._spread = Ring(), Spread()
        self._under_way: dict[FunctionId, int] = {}
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._runs: set[asyncio.Task[None]] = set()
        self._told: asyncio.Event = asyncio.Event()
        self._source: Peer | None = None
        """Whose list of functions we go by."""

        self._tasks: asyncio.TaskGroup

    @asynccontextmanager
    async def running(self) -> AsyncIterator["PoolClient"]:
        """Be connected while the block runs; those shards that answer at once are there."""
        async with asyncio.TaskGroup() as self._tasks:
            self._members.watch(self._adjust)
            self._adjust()
            try:
                async with asyncio.timeout(GATHER_S):
                    while not (self.is_ready and all(p.is_live for p in self.peers.values())):
                        await self._change()
            except TimeoutError:
                pass
            try:
                yield self
            finally:
                for task in list(self._runs):
                    task.cancel()

    @property
    def is_ready(self) -> bool:
        """Whether a shard is there, and we know what there is to be called."""
        return bool(self._ring.shards) and self._source is not None

    @property
    def under_way(self) -> int:
        """Calls that are not answered."""
        return self._calls

    async def drain(self, timeout_s: float) -> bool:
        """Wait until every call is answered; False when some were not in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def some(self) -> None:
        """Wait until a shard is there."""
        while not self._ring.shards:
            await self._change()

    def live(self) -> frozenset[str]:
        """The shards that calls may be sent to."""
        return self._ring.shards

    def order(self, function: FunctionId) -> list[Peer]:
        """The live shards, the one that has the function first."""
        return [self.peers[name] for name in self._ring.order(function)]

    # ---- who is there -------------------------------------------------------------------------

    def _adjust(self) -> None:
        """Have a connection to each member, and to no other."""
        wanted = self._members.current()
        for name, peer in list(self.peers.items()):
            if wanted.get(name) != peer.address:
                self.peers.pop(name).retire()
        for name in wanted.keys() - self.peers.keys():
            peer = self.peers[name] = Peer(
                name, wanted[name], self._identity, self._name, self._look, self._heard
            )
            task = self._tasks.create_task(peer.run(), name=f"peer {name}")
            self._runs.add(task)
            task.add_done_callback(self._runs.discard)
        self._look()

    def _look(self) -> None:
        """Something has changed about a shard."""
        self._ring.become(name for name, peer in self.peers.items() if peer.is_live)
        if self._source is None or self._source.functions is None:
            # what was listed stays, until another shard has listed all
            live = [self.peers[name] for name in self._ring.shards]
            self._source = next((peer for peer in live if peer.functions is not None), None)
            if self._source is not None:
                self._heard(self._source)
        told, self._told = self._told, asyncio.Event()
        told.set()

    async def _change(self) -> None:
        await self._told.wait()

    def _heard(self, peer: Peer) -> None:
        """A shard has listed functions; we go by one of them."""
        if self._source is None and peer.is_live:
            self._look()
        elif self._source is peer and peer.functions is not None:
            self.functions = peer.functions
            self._changed()

    # ---- calls --------------------------------------------------------------------------------

    async def invoke(self, invocation: Invocation) -> Outcome:
        """Run *invocation* to its outcome, as `Pool.invoke`. Raises `PlatformError`.

        Besides: `NoShard`, and `ShardLost` when nobody knows whether it ran.
        """
        function = invocation.function
        may_repeat = (invocation.http or {}).get("method") in SAFE
        self._under_way[function] = self._under_way.get(function, 0) + 1
        try:
            return await self._placed(
                function,
                invocation.queue_s_max,
                lambda peer, queue_s_max: peer.invoke(invocation, queue_s_max),
                repeats=1 if may_repeat else 0,
            )
        except Lost as lost:
            raise ShardLost(str(lost)) from None
        finally:
            left = self._under_way[function] - 1
            if left:
                self._under_way[function] = left
            else:
                del self._under_way[function]

    async def accept(self, invocation: Invocation, key: tuple[str, str] | None = None) -> Accepted:
        """Have it kept and run later, as `Events.accept`; it is on the disk when this returns.

        Raises `PlatformError`; `StoreFailed` when a shard was lost and nobody knows.
        """
        try:
            return await self._placed(
                invocation.function,
                self.queue_s_max,
                lambda peer, _: peer.accept(invocation, key),
                repeats=math.inf if key else 0,  # with it it is the same event, whoever has it
            )
        except Lost as lost:
            raise StoreFailed(f"shard {lost}") from None

    async def _placed(
        self,
        function: FunctionId,
        queue_s_max: float,
        ask: Callable[[Peer, float], Awaitable[A]],
        repeats: float,
    ) -> A:
        """What one shard says to *ask*, whose second argument is how long it may still wait there.

        Raises `Lost` when the shard was lost that had it, after so many *repeats* elsewhere.
        """
        if self._calls >= CALLS_MAX:
            raise QueueFull(f"{self._calls} calls are under way in this gateway")
        self._calls += 1
        self._idle.clear()
        end = time.monotonic() + queue_s_max
        tried: set[str] = set()
        try:
            while True:
                peer = self._choose(function, tried)
                if peer is None:
                    peer = await self._wait(function, tried, end)
                try:
                    return await ask(peer, queue_s_max)
                except NotBegun:
                    why = "not begun"
                except Draining:
                    why = "draining"
                    peer.stand_aside()
                except (FunctionNotFound, NotReadyHere) as error:
                    why = "not ready"
                    await self._pass_over(peer, function, error, tried, end)
                except Lost as lost:
                    if not repeats:
                        raise Lost(f"{peer.name}: {lost}") from None
                    why, repeats = "lost", repeats - 1
                self.retried[why] += 1
                queue_s_max = round(max(0.1, end - time.monotonic()), 1)
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    def _choose(self, function: FunctionId, tried: set[str]) -> Peer | None:
        """The shard for the next call of *function*; None when none is there."""
        order = self._ring.order(function)
        if tried:
            order = [name for name in order if name not in tried]
        if not order:
            return None
        width = 1
        if len(order) > 1 and (listed := self.functions.get(function)) is not None:
            under_way = self._under_way.get(function, 1) - 1
            width = self._spread.width(function, under_way, listed.places, time.monotonic())
        if width == 1:
            return self.peers[order[0]]
        loads = {name: self.peers[name].under_way[function] for name in order[:width]}
        return self.peers[choose(order, width, loads)]

    async def _pass_over(
        self,
        peer: Peer,
        function: FunctionId,
        error: PlatformError,
        tried: set[str],
        end: float,
    ) -> None:
        """It has not heard of the function yet, or has not fetched it; another one may have.

        When all have been asked they are asked again, until *end*. Raises *error* when it is right.
        """
        if isinstance(error, FunctionNotFound) and function not in self.functions:
            raise error
        tried.add(peer.name)
        if self._ring.shards <= tried:
            if isinstance(error, FunctionNotFound) or time.monotonic() + READY_S > end:
                raise error
            await asyncio.sleep(READY_S)
            tried.clear()

    async def _wait(self, function: FunctionId, tried: set[str], end: float) -> Peer:
        """The first shard that is there before *end* (of `time.monotonic`). Raises `NoShard`."""
        try:
            async with asyncio.timeout(end - time.monotonic()):
                while (peer := self._choose(function, tried)) is None:
                    tried.clear()
                    await self._change()
                return peer
        except TimeoutError:
            raise NoShard("; ".join(self._whys()) or "no shard is known") from None

    def _whys(self) -> list[str]:
        return [f"{name}: {peer.why or 'says nothing'}" for name, peer in self.peers.items()][:5]
