"""What every process that serves has: signals that end it, a loop that is watched, listeners."""

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

from dayfly_gateway.config import Address, GatewayConfig
from dayfly_pool.errors import PlatformError

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


class HttpServer(web.Server):
    """aiohttp's server with a limit on its connections."""

    def __init__(self, handler: Handler, most: int, **options: Any) -> None:
        super().__init__(handler, **options)
        self._most, self._now = most, 0
        self._emptied = asyncio.Event()

    def connection_made(self, handler: Any, transport: asyncio.Transport) -> None:
        """See `web.Server`."""
        super().connection_made(handler, transport)
        self._now += 1
        if self._now > self._most:
            transport.abort()

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        """See `web.Server`."""
        super().connection_lost(handler, exc)
        self._now -= 1
        if self._now == 0:
            self._emptied.set()

    async def empty(self) -> None:
        """Return when no connection is open."""
        while self._now:
            self._emptied.clear()
            await self._emptied.wait()


def http_server(handler: Handler, config: GatewayConfig, descriptors: int) -> HttpServer:
    """The server of a data plane in a process that needs so many *descriptors* besides."""
    room = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - descriptors - DESCRIPTORS_KEPT
    return HttpServer(
        handler,
        min(config.connections_max, max(room, CONNECTIONS_MIN)),
        access_log=None,
        keepalive_timeout=config.header_s_max,
        lingering_time=1.0,
        auto_decompress=False,  # the body is the function's; and a bomb stays small
    )


def admin_runner(application: web.Application) -> web.AppRunner:
    """What serves an admin plane."""
    return web.AppRunner(application, access_log=None, auto_decompress=False, shutdown_timeout=2.0)


class Life:
    """One process from its start until SIGTERM or SIGINT, and a second one while it drains."""

    def __init__(self) -> None:
        self._stopping, self._hurrying = asyncio.Event(), asyncio.Event()

    def _heed_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)

    def _stop(self) -> None:
        if self._stopping.is_set():
            self._hurrying.set()
        self._stopping.set()

    async def _until_stopped(self, *works: Coroutine[Any, Any, None]) -> None:
        """Have *works* run until the process is to end."""
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(work) for work in works]
            await self._stopping.wait()
            for task in running:
                task.cancel()

    async def _unless_hurried(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for *work*, the end of which a second signal is."""
        async with asyncio.TaskGroup() as tasks:
            draining = tasks.create_task(work)
            hurrying = tasks.create_task(self._hurrying.wait())
            await asyncio.wait({draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
            draining.cancel()
            hurrying.cancel()

    async def _watch_the_loop(self, note: Callable[[float], None]) -> None:
        """Say when the event loop stood still, and what it was doing."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                faulthandler.dump_traceback_later(LOOP_STALL_S)
                expected = loop.time() + LOOP_LOOK_S
                await asyncio.sleep(LOOP_LOOK_S)
                lag_s = loop.time() - expected
                note(lag_s)
                if lag_s > LOOP_STALL_S:
                    log.warning("the event loop stood still", extra={"took_s": lag_s})
        finally:
            faulthandler.cancel_dump_traceback_later()

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


async def emptied(server: HttpServer) -> None:
    """Give clients that keep their connections a moment to hear that they close."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            await server.empty()
