"""The data plane: HTTP requests to invocations, and back. Nothing slow happens here."""

import asyncio
import logging
import os
import re
import socket
import struct
from collections.abc import Iterator
from functools import partial
from typing import Final

from aiohttp import HttpVersion11, web
from msgspec import structs

from dayfly_gateway import events, later
from dayfly_gateway.behind import Behind, is_ours
from dayfly_gateway.config import GatewayConfig
from dayfly_gateway.routing import MethodNotAllowed, Routes
from dayfly_pool.errors import BadInput, BodyTooLarge, PlatformError
from dayfly_pool.ids import in_order
from dayfly_pool.models import Invocation, InvocationId, Outcome, Success

log = logging.getLogger("dayfly.gateway")
IDS_AT_ONCE: Final = 256
REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,128}\Z")


class BodyTooSlow(PlatformError):
    """The request's body did not arrive in time.

    Send at least 1 KiB/s.
    """

    status = 408


class _Written(web.StreamResponse):
    """Stands for a response whose bytes are on their way already."""

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing is left to do."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to do."""

    @property
    def keep_alive(self) -> bool:
        """Only connections that stay open are written to directly."""
        return True


WRITTEN: Final = _Written()


def _invocation_ids() -> Iterator[InvocationId]:
    """Ids that nobody can guess. Random bytes are fetched for many at once: it is a system call."""
    while True:
        several = os.urandom(16 * IDS_AT_ONCE).hex()
        for at in range(0, len(several), 32):
            yield InvocationId(several[at : at + 32])


class DataPlane:
    """Serves the functions. `routes` is replaced when declarations change."""

    def __init__(self, behind: Behind, config: GatewayConfig) -> None:
        self._behind = behind
        self._config = config
        self._ids = _invocation_ids()
        self.routes = Routes()
        self.is_draining = False

    def reroute(self) -> None:
        """Take the declared routes anew; of two that clash the one that was declared first counts.

        Raises `BadInput` when there is a clash that there was not before.
        """
        before = self.routes.clashes
        self.routes = Routes(self._behind.routes())
        for _, clash in sorted(self.routes.clashes - before):
            raise BadInput(clash)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request; every error has its problem document."""
        id_ = next(self._ids)
        request_id = request.headers.get("X-Request-Id", "")
        if not REQUEST_ID.match(request_id):
            request_id = id_
        try:
            answer = await self._answer(request, id_, request_id)
            if answer is None:
                return WRITTEN
        except PlatformError as error:
            answer = events.platform_problem(error)
            if isinstance(error, MethodNotAllowed):
                answer.headers["Allow"] = error.fields.get("allow", "")
        answer.headers["X-Request-Id"] = request_id
        if self.is_draining or not request.content.is_eof():
            answer.force_close()
        return await self._write(request, answer)

    async def _answer(
        self, request: web.BaseRequest, id_: InvocationId, request_id: str
    ) -> web.Response | None:
        """None when it is on its way already: whatever is everyday is written at once."""
        path = request.rel_url.raw_path
        if is_ours(path):
            return await self._behind.answer(request, partial(self._read, request))
        invocation = await self._invocation(request, id_)
        if "Prefer" in request.headers and later.preferences(request.headers.getall("Prefer"))[0]:
            return await self._accept(request, invocation, request_id)
        outcome = await self._outcome(invocation)
        if self._is_direct(request, outcome, id_, request_id):
            return None
        return events.response(outcome, id_)

    async def _invocation(self, request: web.BaseRequest, id_: InvocationId) -> Invocation:
        url = request.rel_url
        match = self.routes.match(request.headers.get("Host", ""), url.raw_path, request.method)
        meta = events.http_meta(request, match, self._config.trusted_proxies)
        body = await read_body(request, self._config, self._config.body_bytes_max)
        trace = events.trace(request)
        queue_s_max = self._behind.queue_s_max
        return Invocation(id_, match.function, body, meta, trace, queue_s_max)

    async def _read(self, request: web.BaseRequest, limit: int) -> bytes:
        return await read_body(request, self._config, min(limit, self._config.body_bytes_max))

    async def _outcome(self, invocation: Invocation) -> Outcome:
        try:
            return await self._behind.invoke(invocation)
        except PlatformError as error:
            error.fields.setdefault("invocation", invocation.id)
            raise

    async def _accept(
        self, request: web.BaseRequest, invocation: Invocation, request_id: str
    ) -> web.Response | None:
        invocation = structs.replace(invocation, id=in_order(invocation.id))
        accepted = await later.accept(self._behind.accept, invocation, request)
        transport = request.transport
        if self._is_everyday(request) and accepted.is_new and transport is not None:
            transport.write(later.wire_bytes(accepted, request_id))
            return None
        return later.answer(accepted)

    def _is_direct(
        self, request: web.BaseRequest, outcome: Outcome, id_: InvocationId, request_id: str
    ) -> bool:
        """The hot path: a small success, written at once; False for whatever is not everyday."""
        transport = request.transport
        if not isinstance(outcome, Success) or not self._is_everyday(request) or transport is None:
            return False
        data = events.wire_bytes(outcome, id_, request_id)
        if data is None:
            return False
        transport.write(data)
        return True

    def _is_everyday(self, request: web.BaseRequest) -> bool:
        """Whether an answer may be written at once, on a connection that stays open."""
        return (
            not self.is_draining
            and request.method != "HEAD"
            and request.version == HttpVersion11
            and request.keep_alive
            and request.content.is_eof()
            and not request.protocol.writing_paused
        )

    async def _write(self, request: web.BaseRequest, answer: web.Response) -> web.StreamResponse:
        """Send the answer within the time limit; a client that does not read is cut off."""
        if len(answer.body or b"") < 65536:  # type: ignore[arg-type]
            return answer  # fits the socket's buffers: aiohttp sends it without waiting
        try:
            async with asyncio.timeout(self._config.write_s_max):
                await answer.prepare(request)
                await answer.write_eof()
        except TimeoutError:
            if request.transport is not None:
                # with a reset, or the kernel keeps up to 4 MiB for a client that may never read
                end = request.transport.get_extra_info("socket")
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                request.transport.abort()
        return answer


async def read_body(request: web.BaseRequest, config: GatewayConfig, limit: int) -> bytes:
    """The whole body, refused before it is buffered when too large. Raises `PlatformError`."""
    if not request.body_exists:
        return b""
    declared = request.content_length
    if declared is not None and declared > limit:
        raise BodyTooLarge(f"{declared} bytes, limit {limit}")
    if request.content.is_eof():
        return await request.content.read()
    return await _read_slowly(request, config, limit)


async def _read_slowly(request: web.BaseRequest, config: GatewayConfig, limit: int) -> bytes:
    loop = asyncio.get_running_loop()
    started, size = loop.time(), 0
    chunks: list[bytes] = []
    while True:
        deadline = started + config.body_s_grace + size / config.body_bytes_per_s_min
        try:
            async with asyncio.timeout_at(deadline):
                chunk = await request.content.readany()
        except TimeoutError:
            raise BodyTooSlow(f"{size} bytes in {loop.time() - started:.0f} s") from None
        if not chunk:
            return b"".join(chunks)
        size += len(chunk)
        if size > limit:
            raise BodyTooLarge(f"over {limit} bytes")
        chunks.append(chunk)
