"""The admin plane's part for queues."""

from typing import Any

import msgspec
from aiohttp import web

from dayfly_gateway import answers
from dayfly_gateway.app import read_body
from dayfly_gateway.config import GatewayConfig
from dayfly_pool.batch.quota import QueueSpec
from dayfly_pool.errors import QueueNotFound
from dayfly_pool.models import API_VERSION
from dayfly_pool.service import Service

SPEC_BYTES_MAX = 64 * 1024


class QueuesPlane:
    """Handlers under `/queues` and `/namespaces/NS/queues`."""

    def __init__(self, service: Service, config: GatewayConfig) -> None:
        self._service, self._config = service, config

    def routes(self) -> list[web.RouteDef]:
        """What this plane answers."""
        queue = "/namespaces/{namespace}/queues/{name}"
        return [
            web.get("/queues", self._list),
            web.put(queue, self._set),
            web.delete(queue, self._delete),
        ]

    async def _list(self, request: web.Request) -> web.Response:
        return answers.json(views(self._service))

    async def _set(self, request: web.Request) -> web.Response:
        data = await read_body(request, self._config, SPEC_BYTES_MAX)
        spec = msgspec.json.decode(data, type=QueueSpec)
        named = answers.metadata(request)
        await self._service.set_queue(named.namespace, named.name, spec)
        (view,) = [
            view
            for view in views(self._service)
            if (view["metadata"]["namespace"], view["metadata"]["name"])
            == (named.namespace, named.name)
        ]
        return answers.json(view)

    async def _delete(self, request: web.Request) -> web.Response:
        named = answers.metadata(request)
        if (named.namespace, named.name) not in self._service.queues:
            raise QueueNotFound(f"nothing is declared of queue {named.namespace}/{named.name}")
        await self._service.set_queue(named.namespace, named.name, None)
        return web.Response(status=204)


def views(service: Service) -> list[dict[str, Any]]:
    """All queues, declared or in use, as the API shows them."""
    used = {use.name: use for use in service.jobs.queues()}
    declared = {f"{namespace}/{name}": spec for (namespace, name), spec in service.queues.items()}
    found = []
    for id_ in sorted(used.keys() | declared.keys()):
        namespace, _, name = id_.partition("/")
        view: dict[str, Any] = {
            "apiVersion": API_VERSION,
            "kind": "Queue",
            "metadata": {"namespace": namespace, "name": name},
            "spec": msgspec.to_builtins(declared.get(id_, QueueSpec())),
            "status": {"isDeclared": id_ in declared},
        }
        if (use := used.get(id_)) is not None:
            view["status"] |= msgspec.to_builtins(use)
            del view["status"]["name"]
        found.append(view)
    return found
