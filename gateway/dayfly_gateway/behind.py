"""What the data plane needs of those who run functions: here, or in shards elsewhere."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from aiohttp import web

from dayfly_gateway import later
from dayfly_gateway.hooks import EVENTS, HOOKS, Hooks, namespace_of
from dayfly_pool.models import FunctionId, Invocation, Outcome, Route
from dayfly_pool.service import Service

Read = Callable[[int], Awaitable[bytes]]
"""Reads a request's body, which may be so long. Raises `PlatformError`."""


def is_ours(path: str) -> bool:
    """Whether the server itself answers there, and no function."""
    if path.startswith((later.PATH, HOOKS)):
        return True
    return path.endswith(EVENTS) and namespace_of(path) is not None


class Behind(Protocol):
    """Who runs what the data plane takes. All of it may raise `PlatformError`."""

    @property
    def queue_s_max(self) -> float:
        """How long an invocation may wait for a sandbox."""

    @property
    def invoke(self) -> Callable[[Invocation], Awaitable[Outcome]]:
        """As `Pool.invoke`."""

    @property
    def accept(self) -> later.Accept:
        """As `Events.accept`."""

    def routes(self) -> Iterable[tuple[FunctionId, Route]]:
        """All that functions have declared, of those first that were declared first."""

    async def answer(self, request: web.BaseRequest, read: Read) -> web.Response:
        """Answer a request for one of our own paths (`is_ours`)."""


class Local:
    """The service of this very process. Implements `Behind`, without a step in between."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.hooks = Hooks(service)

    @property
    def queue_s_max(self) -> float:
        """See `Behind`."""
        return self._service.config.queue_s_max

    @property
    def invoke(self) -> Callable[[Invocation], Awaitable[Outcome]]:
        """See `Behind`."""
        return self._service.pool.invoke

    @property
    def accept(self) -> later.Accept:
        """See `Behind`."""
        return self._service.events.accept

    def routes(self) -> Iterable[tuple[FunctionId, Route]]:
        """See `Behind`."""
        declared = sorted(self._service.functions.values(), key=lambda s: (s.updated, s.id))
        return ((stored.id, route) for stored in declared for route in stored.spec.routes)

    async def answer(self, request: web.BaseRequest, read: Read) -> web.Response:
        """See `Behind`."""
        if request.rel_url.raw_path.startswith(later.PATH):
            return await later.show(self._service, request)
        return await self.hooks.answer(request, await read(self.hooks.check(request)))
