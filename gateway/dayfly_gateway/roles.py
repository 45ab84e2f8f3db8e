"""The two halves of a server that is several: `dayfly pool`, a shard, and `dayfly gateway`.

A shard is what `dayfly up` is, but that gateways bring its requests. A gateway keeps nothing: what
it knows it hears from shards.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from aiohttp import web

from dayfly_gateway.app import DataPlane
from dayfly_gateway.behind import Local
from dayfly_gateway.config import Address, GatewayConfig
from dayfly_gateway.destinations import Teller
from dayfly_gateway.life import HttpServer, Life, PortTaken, admin_runner, emptied, http_server
from dayfly_gateway.management import Management
from dayfly_gateway.proxy import AdminProxy, Proxy, Remote
from dayfly_gateway.triggers.triggers import Triggers
from dayfly_pool import tls
from dayfly_pool.cluster.members import Members
from dayfly_pool.cluster.shards import first
from dayfly_pool.config import Config
from dayfly_pool.errors import PlatformError
from dayfly_pool.models import FunctionId
from dayfly_pool.peers import PoolServer
from dayfly_pool.pool_client import PoolClient
from dayfly_pool.service import Service
from dayfly_pool.tls import Identity

log = logging.getLogger("dayfly.server")
HTTP_END_S: Final = 2.0
BURY_LOOK_S, BURY_LOOKS = 30.0, 10
"""A shard that is not there for five minutes does not come back; nobody uses its sandboxes."""


class _Served:
    """A running service as `PoolServer` sees it: see `peers.Behind`."""

    def __init__(self, service: Service) -> None:
        self.functions = service.functions
        self.invoke, self.accept = service.pool.invoke, service.events.accept


class Shard(Life):
    """`dayfly pool`."""

    def __init__(
        self,
        config: Config,
        gateway: GatewayConfig,
        wire: Address,
        identity: Identity,
        name: str,
        members: Members,
        advertised: str,
        watched: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self._watched = watched
        """The namespaces whose custom resources are ours to look after, `*`: all."""

        self._gateway, self._wire, self._identity, self._name = gateway, wire, identity, name
        self._members, self._advertised = members, advertised
        self.service = Service(config)
        self.service.owns = self._owns
        self.service.tell = self._teller = Teller(self.service.secrets)
        self._local = Local(self.service)
        self._data = DataPlane(self._local, gateway)

    def _owns(self, function: FunctionId) -> bool:
        """Whether we are its first shard among those that are there, as far as we see."""
        return first(function, self._members.current()) == self._name

    async def run(self, on_ready: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Serve until SIGTERM or SIGINT; then gateways are told first, and no request fails."""
        self._heed_signals()
        async with self._teller.running(), self.service.running():
            self.service.watch(self._data.reroute)
            triggers = Triggers(self.service, self._local.hooks.counts)
            admin = Management(self.service, self._gateway, self._is_ready, triggers)
            trusted = Management(self.service, self._for_gateways(), self._is_ready, triggers)
            inner = admin_runner(trusted.application())
            data = http_server(self._data.handle, self._gateway, self.service.config.sandboxes_max)
            await inner.setup()
            assert inner.server is not None
            server = PoolServer(
                _Served(self.service),
                self._identity,
                self._name,
                queue_s_max=self.service.config.queue_s_max,
                planes={tls.DATA: data, tls.ADMIN: inner.server},
            )
            self.service.watch(server.look_soon)
            try:
                await server.listen(self._wire.host, self._wire.port)
            except OSError as error:
                raise PortTaken(f"{self._wire}: {error.strerror or error}") from error
            async with (
                self._listening(admin_runner(admin.application()), self._gateway.admin),
                server.running(),
                self._members.running(self._name, self._advertised),
            ):
                self._members.watch(self.service.reown)
                self.service.reown()
                await self._until_stopped(
                    self._watch_the_loop(self._note_lag),
                    triggers.run(),
                    self._look_after_resources(triggers),
                    self._bury_shards(),
                    on_ready(),
                )
                log.info("draining", extra={"under_way": self.service.pool.under_way})
                self._data.is_draining = True
                await self._unless_hurried(self._drain(server, data, inner))

    async def _drain(self, server: PoolServer, data: web.Server, inner: web.AppRunner) -> None:
        await server.leave()
        if not await self.service.drain(self._gateway.drain_s_max):
            log.warning("not all ended in time")
        await data.shutdown(HTTP_END_S)
        await inner.cleanup()
        await server.finish()

    async def _look_after_resources(self, triggers: Triggers) -> None:
        """Bring custom resources to declarations, while we are the one to do it."""
        if not self._watched:
            return
        from dayfly_gateway.controller import Controller
        from dayfly_pool.cluster.api import Api
        from dayfly_pool.cluster.leases import Leader

        api = await Api.connect()

        async def lead(epoch: int) -> None:
            async with asyncio.TaskGroup() as tasks:
                for namespace in self._watched:
                    controller = Controller(api, self.service, triggers, namespace=namespace)
                    tasks.create_task(controller.run(), name=f"controller-{namespace}")

        try:
            whole = self._name.rpartition("-")[0] or self._name
            await Leader(api, f"{whole}-controller", self._name).run(lead)
        finally:
            await api.close()

    async def _bury_shards(self) -> None:
        """Have the sandboxes deleted that belong to shards which are not there any more."""
        missing: dict[str, int] = {}
        while True:
            await asyncio.sleep(BURY_LOOK_S)
            live = self._members.current()
            if self._name not in live:
                continue  # we do not see well ourselves
            gone = {name for name in await self.service.known_shards() if name not in live}
            missing = {name: missing.get(name, 0) + 1 for name in gone}
            for name in [name for name, looks in missing.items() if looks >= BURY_LOOKS]:
                await self.service.bury_shard(name)

    def _for_gateways(self) -> GatewayConfig:
        """A gateway has shown its certificate, and has asked its own clients for the token."""
        return GatewayConfig(
            body_bytes_max=self._gateway.body_bytes_max,
            package_bytes_max=self._gateway.package_bytes_max,
        )

    def _note_lag(self, lag_s: float) -> None:
        self.service.pool.metrics.loop_lag_s = lag_s

    def _is_ready(self) -> bool:
        return not (self._stopping.is_set() or self.service.events.queue.failure)


class Gateway(Life):
    """`dayfly gateway`."""

    def __init__(
        self, config: GatewayConfig, identity: Identity, members: Members, queue_s_max: float
    ) -> None:
        super().__init__()
        self._config, self._members = config, members
        name = f"{socket.gethostname()}-{os.getpid()}"
        self.client = PoolClient(
            members, identity, name, queue_s_max=queue_s_max, changed=self._reroute
        )
        self._proxy = Proxy(self.client, identity)
        self._data = DataPlane(Remote(self.client, self._proxy), config)

    async def run(self, on_ready: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Serve until SIGTERM or SIGINT, then drain: no accepted request fails."""
        self._heed_signals()
        async with self._members.running(), self.client.running(), self._proxy.running():
            admin = AdminProxy(self._proxy, self._config, self._is_ready)
            server = http_server(self._data.handle, self._config, 0)
            runner = web.ServerRunner(server, shutdown_timeout=HTTP_END_S)
            async with (
                self._listening(admin_runner(admin.application()), self._config.admin),
                self._listening(runner, self._config.http) as data,
            ):
                await self._until_stopped(self._watch_the_loop(_ignore), on_ready())
                log.info("draining", extra={"under_way": self.client.under_way})
                self._data.is_draining = True
                await data.stop()
                await self._unless_hurried(self._answer_all(server))

    async def _answer_all(self, server: HttpServer) -> None:
        await self.client.drain(self._config.drain_s_max)
        await emptied(server)

    def _reroute(self) -> None:
        try:
            self._data.reroute()
        except PlatformError as error:  # two that were declared in two places at once
            log.warning("declarations clash", extra={"why": str(error)})

    def _is_ready(self) -> bool:
        return self.client.is_ready and not self._stopping.is_set()


def _ignore(lag_s: float) -> None:
    """A gateway has no gauge for it; what stands still is logged."""
