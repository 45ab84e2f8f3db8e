"""One server process: the service and its two HTTP planes, from start to drained end."""

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from aiohttp import web

from dayfly_gateway.app import DataPlane
from dayfly_gateway.behind import Local
from dayfly_gateway.config import GatewayConfig
from dayfly_gateway.destinations import Teller
from dayfly_gateway.life import HttpServer, Life, admin_runner, emptied, http_server
from dayfly_gateway.management import Management
from dayfly_gateway.triggers.triggers import Triggers
from dayfly_pool.config import Config
from dayfly_pool.service import Service

log = logging.getLogger("dayfly.server")


class Server(Life):
    """`dayfly up`."""

    def __init__(self, config: Config, gateway: GatewayConfig) -> None:
        super().__init__()
        self._gateway = gateway
        self.service = Service(config)
        self.service.tell = self._teller = Teller(self.service.secrets)
        self._local = Local(self.service)
        self._data = DataPlane(self._local, gateway)

    async def run(self, on_ready: Callable[["Server"], Coroutine[Any, Any, None]]) -> None:
        """Serve until SIGTERM or SIGINT, then drain: no accepted request fails.

        A second signal ends the waiting for them.
        """
        self._heed_signals()
        async with self._teller.running(), self.service.running():
            self.service.watch(self._data.reroute)
            triggers = Triggers(self.service, self._local.hooks.counts)
            management = Management(self.service, self._gateway, self._is_ready, triggers)
            server = http_server(
                self._data.handle, self._gateway, self.service.config.sandboxes_max
            )
            runner = web.ServerRunner(server, shutdown_timeout=2.0)
            async with (
                self._listening(admin_runner(management.application()), self._gateway.admin),
                self._listening(runner, self._gateway.http) as data,
            ):
                await self._until_stopped(
                    self._watch_the_loop(self._note_lag), triggers.run(), on_ready(self)
                )
                await self._drain(data, server)

    def _note_lag(self, lag_s: float) -> None:
        self.service.pool.metrics.loop_lag_s = lag_s

    def _is_ready(self) -> bool:
        return not (self._stopping.is_set() or self.service.events.queue.failure)

    async def _drain(self, data: web.TCPSite, server: HttpServer) -> None:
        """Stop accepting, answer what was accepted, close connections as they fall idle."""
        log.info("draining", extra={"under_way": self.service.pool.under_way})
        self._data.is_draining = True
        await data.stop()
        await self._unless_hurried(self._answer_all(server))
        if under_way := self.service.pool.under_way:
            log.warning("not all ended in time", extra={"under_way": under_way})

    async def _answer_all(self, server: HttpServer) -> None:
        await self.service.drain(self._gateway.drain_s_max)
        await emptied(server)
