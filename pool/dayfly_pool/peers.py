"""The pool's end of the wire: gateways connect, have invocations run, and hear what there is.

A gateway shows a certificate. Which of three protocols it speaks it says as the connection is made
(ALPN): calls, or HTTP for one of the two planes, whose handlers are given to us.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, Protocol, cast

from dayfly.protocol import Frame, ProtocolError
from dayfly_pool import tls, wire
from dayfly_pool.errors import PlatformError
from dayfly_pool.models import FunctionId, Invocation, Outcome
from dayfly_pool.store.declarations import StoredFunction
from dayfly_pool.store.events import Accepted
from dayfly_pool.tls import Identity

log = logging.getLogger("dayfly.peers")
BEAT_S: Final = 0.5
QUIET_S: Final = 1.25
"""Who has said nothing for this long is given nothing new."""

SILENT_S: Final = 5.0
"""Who has said nothing for this long is cut off."""

CALLS_MAX: Final = 20_000
"""Of one gateway at once, as many as a pool takes in all."""

GATEWAYS_MAX: Final = 1000
LEAVE_S: Final = 2.0
"""How long gateways have to turn to other shards before we go."""

HANDSHAKE_S: Final = 5.0
REFRESH_S: Final = 5.0
WRITE_BYTES_MAX: Final = 1024 * 1024


class Wire(asyncio.Protocol):
    """One connection, either end. Frames of one turn of the event loop leave in one write.

    *on_end* is called once, with why it is over.
    """

    def __init__(self, on_frame: Callable[[Frame], None], on_end: Callable[[str], None]) -> None:
        self._reader = wire.reader()
        self._on_frame, self._on_end = on_frame, on_end
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self._room = asyncio.Event()
        self._room.set()
        self.heard_at = time.monotonic()
        self.is_over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_BYTES_MAX)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self.heard_at = time.monotonic()
        try:
            for frame in self._reader.feed(data):
                if self.is_over:
                    return
                self._on_frame(frame)
        except ProtocolError as error:
            self.end(f"it broke the protocol: {error}")

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self._room.clear()

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self._room.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self.end(str(exc or "the connection was closed"))

    @property
    def has_room(self) -> bool:
        """Whether the other end takes what is sent about as fast as it is sent."""
        return self._room.is_set()

    async def room(self) -> None:
        """Wait until there is, or it is over."""
        await self._room.wait()

    @property
    def silent_s(self) -> float:
        """For how long nothing has come."""
        return time.monotonic() - self.heard_at

    def send(self, frame: bytes) -> None:
        """Send *frame* with whatever else is sent in this turn; nothing when it is over."""
        if self.is_over:
            return
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(frame)

    def _flush(self) -> None:
        out, self._out = self._out, []
        if self._transport is not None and not self.is_over:
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))

    def close(self) -> None:
        """Send what is to be sent, and end."""
        if self._out:
            self._flush()
        if self._transport is not None:
            self._transport.close()

    def end(self, why: str) -> None:
        """It is over: nothing is sent or heard any more."""
        if self.is_over:
            return
        self.is_over = True
        self._room.set()
        if self._transport is not None:
            self._transport.abort()
        self._on_end(why)


class Behind(Protocol):
    """What runs calls, and what there is to be called."""

    @property
    def functions(self) -> Mapping[FunctionId, StoredFunction]:
        """Those that are declared."""

    async def invoke(self, invocation: Invocation) -> Outcome:
        """As `Pool.invoke`."""

    async def accept(self, invocation: Invocation, key: tuple[str, str] | None) -> Accepted:
        """As `Events.accept`."""


class PoolServer:
    """Serves gateways. Use it inside `async with server.running():`, after
    `listen`.

    *planes* are makers of HTTP protocols, by what the connection is to speak (`tls.DATA`,
    `tls.ADMIN`).
    """

    def __init__(
        self,
        behind: Behind,
        identity: Identity,
        name: str,
        *,
        queue_s_max: float = 30.0,
        planes: Mapping[str, Callable[[], asyncio.Protocol]] | None = None,
    ) -> None:
        self.name, self.queue_s_max = name, queue_s_max
        self.is_draining = False
        self.behind = behind
        self._identity, self._planes = identity, dict(planes or {})
        self._gateways: set[_Gateway] = set()
        self._listed: dict[FunctionId, StoredFunction] = {}
        self._tasks: asyncio.TaskGroup
        self._listener: asyncio.Server

    async def listen(self, host: str, port: int) -> None:
        """Take the address. Raises `OSError`, `CertificatesUnusable`."""
        self._listener = await asyncio.get_running_loop().create_server(
            lambda: _Door(self),
            host,
            port,
            ssl=self._identity.accepting(),
            ssl_handshake_timeout=HANDSHAKE_S,
            backlog=256,
            start_serving=False,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator["PoolServer"]:
        """Serve where it listens while the block runs."""
        self._listed = dict(self.behind.functions)
        async with asyncio.TaskGroup() as self._tasks:
            await self._listener.start_serving()
            own = [self._tasks.create_task(work) for work in (self._beat(), self._refresh())]
            try:
                yield self
            finally:
                self._listener.close()
                for task in own:
                    task.cancel()
                for gateway in list(self._gateways):
                    gateway.wire.end("the shard has ended")

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listener.sockets[0].getsockname()[1])

    @property
    def gateways(self) -> list[str]:
        """Those that are connected."""
        return sorted(gateway.name for gateway in self._gateways)

    async def leave(self) -> None:
        """Have every gateway turn to other shards. What they have sent before is still answered."""
        self.is_draining = True
        self._listener.close()
        for gateway in list(self._gateways):
            gateway.wire.send(wire.encode(wire.Draining()))
        end = time.monotonic() + LEAVE_S
        waiting = [gateway.left for gateway in self._gateways if not gateway.left.done()]
        if waiting:
            await asyncio.wait(waiting, timeout=max(0.0, end - time.monotonic()))

    async def finish(self) -> None:
        """Let the last answers be given, and leave."""
        calls = [task for gateway in self._gateways for task in gateway.calls.values()]
        if calls:
            await asyncio.wait(calls, timeout=LEAVE_S)
        for gateway in list(self._gateways):
            gateway.wire.close()
        waiting = [gateway.gone for gateway in self._gateways]
        if waiting:
            await asyncio.wait(waiting, timeout=LEAVE_S)

    @property
    def under_way(self) -> int:
        """Calls that are not answered."""
        return sum(len(gateway.calls) for gateway in self._gateways)

    def look_soon(self) -> None:
        """Functions are about to change."""
        asyncio.get_running_loop().call_soon(self.look)

    def look(self) -> None:
        """Tell gateways which functions have changed, if any have."""
        now = self.behind.functions
        changed = [found for id_, found in now.items() if self._listed.get(id_) is not found]
        gone = [id_ for id_ in self._listed if id_ not in now]
        if not (changed or gone):
            return
        frames = wire.parts(map(listed, changed), gone, is_anew=False)
        self._listed = dict(now)
        for gateway in self._gateways:
            if gateway.is_watching:
                for frame in frames:
                    gateway.wire.send(frame)

    async def _beat(self) -> None:
        beat = wire.encode(wire.Beat())
        while True:
            before = time.monotonic()
            await asyncio.sleep(BEAT_S)
            self.look()
            is_late = time.monotonic() - before > 2 * BEAT_S  # then it was we who heard nothing
            for gateway in list(self._gateways):
                gateway.wire.send(beat)
                if gateway.wire.silent_s > SILENT_S and not is_late:
                    gateway.wire.end("it says nothing any more")

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                if self._identity.refresh():
                    log.info("the certificates have changed")
            except PlatformError as error:
                log.warning("the certificates have not changed", extra={"why": error.detail})

    # ---- for gateways -------------------------------------------------------------------------

    def plane(self, protocol: str | None) -> asyncio.Protocol | None:
        """What speaks *protocol* on a new connection."""
        if protocol == tls.CALLS:
            if len(self._gateways) >= GATEWAYS_MAX:
                return None
            gateway = _Gateway(self)
            self._gateways.add(gateway)
            return gateway.wire
        make = self._planes.get(protocol or "")
        return make() if make is not None else None

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task of ours."""
        return self._tasks.create_task(work)

    def whole(self) -> list[bytes]:
        """The frames that list every function."""
        return wire.parts(map(listed, self._listed.values()))

    def forget(self, gateway: "_Gateway") -> None:
        """It has gone."""
        self._gateways.discard(gateway)


def listed(stored: StoredFunction) -> wire.Listed:
    """What gateways are told of a function."""
    spec = stored.spec
    return wire.Listed(stored.id, spec.max_scale * spec.concurrency, stored.updated, spec.routes)


class _Door(asyncio.Protocol):
    """Looks at who has connected, and hands over to what it wants to speak."""

    def __init__(self, server: PoolServer) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        inside = transport.get_extra_info("ssl_object")
        plane = None
        if tls.has_role(transport.get_extra_info("peercert"), "gateway"):
            plane = self._server.plane(inside.selected_alpn_protocol())
        if plane is None:
            log.warning("turned away: no gateway, or one of another release")
            cast("asyncio.Transport", transport).abort()
            return
        cast("asyncio.Transport", transport).set_protocol(plane)
        plane.connection_made(transport)


class _Gateway:
    """One gateway's connection, and its calls."""

    def __init__(self, server: PoolServer) -> None:
        loop = asyncio.get_running_loop()
        self.name, self.is_watching = "", False
        self.calls: dict[int, asyncio.Task[None]] = {}
        self.left: asyncio.Future[None] = loop.create_future()
        """Done when no further call comes."""

        self.gone: asyncio.Future[None] = loop.create_future()
        self.wire = Wire(self._take, self._end)
        self._server, self._last = server, 0

    def _take(self, frame: Frame) -> None:
        message = wire.decode(frame)
        if not self.name:
            self._greet(message)
            return
        match message:
            case wire.Beat():
                pass
            case wire.Invoke() | wire.Accept():
                self._call(frame, message)
            case wire.Cancel():
                if (task := self.calls.get(frame.invocation)) is not None:
                    task.cancel()
            case wire.Watch():
                self._server.look()
                self.is_watching = True
                for part in self._server.whole():
                    self.wire.send(part)
            case wire.Left():
                if not self.left.done():
                    self.left.set_result(None)
            case _:
                raise ProtocolError(f"unasked {type(message).__name__}")

    def _greet(self, message: wire.Message) -> None:
        if not isinstance(message, wire.Hello) or message.wire != wire.WIRE or not message.name:
            raise ProtocolError(f"no Hello of wire {wire.WIRE}")
        self.name = message.name
        server = self._server
        self.wire.send(wire.encode(wire.Hello(wire.WIRE, server.name, server.queue_s_max)))
        if server.is_draining:
            self.wire.send(wire.encode(wire.Draining()))
        log.info("a gateway has come", extra={"gateway": self.name})

    def _call(self, frame: Frame, message: wire.Invoke | wire.Accept) -> None:
        number = frame.invocation
        if number <= self._last or len(self.calls) >= CALLS_MAX or self.left.done():
            raise ProtocolError(f"call {number} after {self._last}, {len(self.calls)} under way")
        self._last = number
        invocation = wire.invocation_of(message, frame.body)
        if isinstance(message, wire.Accept):
            work = partial(self._accept, number, invocation, message.key)
        else:
            work = partial(self._invoke, number, invocation)
        task = self.calls[number] = self._server.spawn(self._answered(number, work))
        task.add_done_callback(partial(self._done, number))

    def _done(self, number: int, task: asyncio.Task[None]) -> None:
        del self.calls[number]

    async def _answered(self, number: int, work: Callable[[], Awaitable[bytes]]) -> None:
        """Answer it; a defect of ours must not end the others."""
        try:
            frame = await work()
        except PlatformError as error:
            frame = wire.refusal(number, error)
        except Exception:
            log.exception("a call failed for a defect of ours")
            frame = wire.encode(wire.Refused("Defect"), number, wire.pack(["", {}]))
        self.wire.send(frame)

    async def _invoke(self, number: int, invocation: Invocation) -> bytes:
        return wire.answer(number, await self._server.behind.invoke(invocation))

    async def _accept(
        self, number: int, invocation: Invocation, key: tuple[str, str] | None
    ) -> bytes:
        accepted = await self._server.behind.accept(invocation, key)
        told = wire.Accepted(accepted.id, accepted.is_new, accepted.is_other)
        return wire.encode(told, number)

    def _end(self, why: str) -> None:
        self._server.forget(self)
        for task in self.calls.values():
            task.cancel()
        for future in (self.left, self.gone):
            if not future.done():
                future.set_result(None)
        if not self._server.is_draining:
            log.info("a gateway has gone", extra={"gateway": self.name, "why": why})
