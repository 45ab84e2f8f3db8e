"""One server process: the service and its two HTTP planes, from start to drained end."""

import asyncio
import contextlib
import faulthandler
import logging
import resource
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from dayfly_gateway.app import DataPlane
from dayfly_gateway.config import Address, GatewayConfig
from dayfly_gateway.destinations import Teller
from dayfly_gateway.management import Management
from dayfly_gateway.triggers.triggers import Triggers
from dayfly_pool.config import Config
from dayfly_pool.errors import PlatformError
from dayfly_pool.service import Service

log = logging.getLogger("dayfly.server")


def _is_no_clients_fault(record: logging.LogRecord) -> bool:
    """Malformed requests are answered, not logged: whoever sends them could fill the log."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


logging.getLogger("aiohttp.server").addFilter(_is_no_clients_fault)
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
DESCRIPTORS_KEPT: Final = 256
"""For files, pipes and listeners; each sandbox has one more."""

CONNECTIONS_MIN: Final = 64
LOOP_LOOK_S, LOOP_STALL_S = 0.25, 2.0
LINGER_S: Final = 2.0
"""How long the end waits for clients that keep their connections: a request of theirs may be on
its way, and is answered, with the word that the connection closes."""


class PortTaken(PlatformError):
    """The address cannot be listened on.

    Stop what uses it, or choose another with --http or --admin.
    """


class _HttpServer(web.Server):
    """aiohttp's server with a limit on its connections."""

    def __init__(self, handler: Handler, most: int, **options: Any) -> None:
        super().__init__(handler, **options)
        self._most, self._now = most, 0
        self._emptied = asyncio.Event()

    def connection_made(self, handler: Any, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self._now += 1
        if self._now > self._most:
            transport.abort()

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self._now -= 1
        if self._now == 0:
            self._emptied.set()

    async def empty(self) -> None:
        """Return when no connection is open."""
        while self._now:
            self._emptied.clear()
            await self._emptied.wait()


class Server:
    """`dayfly up`."""

    def __init__(self, config: Config, gateway: GatewayConfig) -> None:
        self._gateway = gateway
        self.service = Service(config)
        self.service.tell = self._teller = Teller(self.service.secrets)
        self._data = DataPlane(self.service, gateway)
        self._stopping, self._hurrying = asyncio.Event(), asyncio.Event()

    async def run(self, on_ready: Callable[["Server"], Coroutine[Any, Any, None]]) -> None:
        """Serve until SIGTERM or SIGINT, then drain: no accepted request fails.

        A second signal ends the waiting for them.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        async with self._teller.running(), self.service.running():
            self.service.watch(self._data.reroute)
            self._data.reroute()
            triggers = Triggers(self.service, self._data.hooks.counts)
            management = Management(self.service, self._gateway, self._is_ready, triggers)
            admin = web.AppRunner(
                management.application(),
                access_log=None,
                auto_decompress=False,
                shutdown_timeout=2.0,
            )
            server = self._data_server()
            runner = web.ServerRunner(server, shutdown_timeout=2.0)
            async with (
                self._listening(admin, self._gateway.admin),
                self._listening(runner, self._gateway.http) as data,
            ):
                async with asyncio.TaskGroup() as tasks:
                    watching = tasks.create_task(self._watch_the_loop(), name="watch-loop")
                    triggering = tasks.create_task(triggers.run(), name="triggers")
                    ready = tasks.create_task(on_ready(self), name="on-ready")
                    await self._stopping.wait()
                    ready.cancel()
                    watching.cancel()
                    triggering.cancel()
                await self._drain(data, server)

    def _stop(self) -> None:
        if self._stopping.is_set():
            self._hurrying.set()
        self._stopping.set()

    async def _watch_the_loop(self) -> None:
        """Say when the event loop stood still, and what it was doing."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                faulthandler.dump_traceback_later(LOOP_STALL_S)
                expected = loop.time() + LOOP_LOOK_S
                await asyncio.sleep(LOOP_LOOK_S)
                self.service.pool.metrics.loop_lag_s = lag_s = loop.time() - expected
                if lag_s > LOOP_STALL_S:
                    log.warning("the event loop stood still", extra={"took_s": lag_s})
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _is_ready(self) -> bool:
        return not (self._stopping.is_set() or self.service.events.queue.failure)

    def _data_server(self) -> _HttpServer:
        gateway = self._gateway
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        room = descriptors - self.service.config.sandboxes_max - DESCRIPTORS_KEPT
        return _HttpServer(
            self._data.handle,
            min(gateway.connections_max, max(room, CONNECTIONS_MIN)),
            access_log=None,
            keepalive_timeout=gateway.header_s_max,
            lingering_time=1.0,
            auto_decompress=False,  # the body is the function's; and a bomb stays small
        )

    @asynccontextmanager
    async def _listening(
        self, runner: web.BaseRunner, address: Address
    ) -> AsyncIterator[web.TCPSite]:
        await runner.setup()
        try:
            site = web.TCPSite(runner, address.host, address.port, backlog=1024)
            try:
                await site.start()
            except OSError as error:
                raise PortTaken(f"{address}: {error.strerror or error}") from error
            yield site
        finally:
            await runner.cleanup()

    async def _drain(self, data: web.TCPSite, server: _HttpServer) -> None:
        """Stop accepting, answer what was accepted, close connections as they fall idle."""
        log.info("draining", extra={"under_way": self.service.pool.under_way})
        self._data.is_draining = True
        await data.stop()
        async with asyncio.TaskGroup() as tasks:
            draining = tasks.create_task(self._answer_all(server))
            hurrying = tasks.create_task(self._hurrying.wait())
            await asyncio.wait({draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
            draining.cancel()
            hurrying.cancel()
        if under_way := self.service.pool.under_way:
            log.warning("not all ended in time", extra={"under_way": under_way})

    async def _answer_all(self, server: _HttpServer) -> None:
        await self.service.drain(self._gateway.drain_s_max)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                await server.empty()
