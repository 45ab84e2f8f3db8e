"""Invocations that are accepted now and run later: `Prefer: respond-async`, `/invocations/ID`.

202 means that it is on the disk. What comes of it can be asked for, or waited for, by its id.
"""

import base64
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

import msgspec
from aiohttp import web

from dayfly_gateway import events
from dayfly_gateway.routing import MethodNotAllowed
from dayfly_pool.errors import BadInput, PlatformError
from dayfly_pool.events import rfc3339
from dayfly_pool.models import Invocation, InvocationId
from dayfly_pool.service import Service
from dayfly_pool.store.events import Accepted, Shown, State

PATH: Final = "/invocations/"
STATES: Final = {state.name.lower(): state for state in State if state is not State.DELAYED}
WAIT_S_MAX: Final = 60.0
_KEY: Final = re.compile(r"[\x21-\x7e]{1,255}\Z")
_WAIT: Final = re.compile(r"wait=([0-9]{1,6})\Z")


class InvocationNotFound(PlatformError):
    """There is no such invocation.

    It was never accepted, or it is over for longer than results are kept.
    """

    status = 404


class KeyUsed(PlatformError):
    """This Idempotency-Key came with another request before.

    Nothing was accepted. Use a new key for a new request.
    """

    status = 422


def preferences(headers: Iterable[str]) -> tuple[bool, float]:
    """(whether to answer before it has run, how many seconds to wait) of Prefer headers."""
    is_async, wait_s = False, 0.0
    for header in headers:
        for preference in header.split(","):
            text = preference.strip().lower()
            is_async |= text == "respond-async"
            if found := _WAIT.match(text):
                wait_s = min(WAIT_S_MAX, float(found[1]))
    return is_async, wait_s


Accept = Callable[[Invocation, tuple[str, str] | None], Awaitable[Accepted]]
"""Keeps an invocation, with its idempotency key: on the disk when it returns."""


async def accept(keep: Accept, invocation: Invocation, request: web.BaseRequest) -> Accepted:
    """Have *keep* keep *invocation* for later. Raises `PlatformError`."""
    key = None
    text = request.headers.get("Idempotency-Key")
    if text is not None:
        if not _KEY.match(text):
            raise BadInput("Idempotency-Key is 1 to 255 visible ASCII characters")
        said = f"{request.method} {request.rel_url.raw_path_qs} {len(invocation.body)}\n".encode()
        key = text, hashlib.sha256(said + invocation.body).hexdigest()
    accepted = await keep(invocation, key)
    if accepted.is_other:
        raise KeyUsed
    return accepted


def answer(accepted: Accepted) -> web.Response:
    """The 202."""
    headers = {"Location": PATH + accepted.id, "Preference-Applied": "respond-async"}
    headers |= {"Dayfly-Invocation": accepted.id, "Server": "Dayfly"}
    if not accepted.is_new:
        headers["Idempotency-Replayed"] = "true"
    body = json.dumps({"id": accepted.id}).encode()
    return web.Response(
        status=202, body=body, headers=headers | {"Content-Type": "application/json"}
    )


def wire_bytes(accepted: Accepted, request_id: str) -> bytes:
    """The same for a new one, as the bytes of a response on a connection that stays open."""
    body = f'{{"id": "{accepted.id}"}}'
    return (
        f"HTTP/1.1 202 Accepted\r\nLocation: {PATH}{accepted.id}\r\n"
        f"Preference-Applied: respond-async\r\nDayfly-Invocation: {accepted.id}\r\n"
        f"Server: Dayfly\r\nX-Request-Id: {request_id}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nDate: {events.date()}\r\n\r\n{body}"
    ).encode()


async def show(service: Service, request: web.BaseRequest) -> web.Response:
    """What is known of an invocation. Raises `InvocationNotFound`, `MethodNotAllowed`."""
    if request.method not in ("GET", "HEAD"):
        raise MethodNotAllowed(f"{request.method} is not among GET, HEAD", allow="GET, HEAD")
    id_ = InvocationId(request.rel_url.raw_path.removeprefix(PATH))
    _, wait_s = preferences(request.headers.getall("Prefer", ()))
    shown = await service.events.queue.get(id_, wait_s)
    if shown is None:
        raise InvocationNotFound(id_[:64])
    headers = {"Content-Type": "application/json", "Server": "Dayfly"}
    return web.Response(body=json.dumps(view(shown)).encode(), headers=headers)


def view(shown: Shown) -> dict[str, Any]:
    """An invocation as it is shown."""
    told: dict[str, Any] = {
        "id": shown.id,
        "function": shown.function,
        "state": "waiting" if shown.state is State.DELAYED else shown.state.name.lower(),
        "attempts": shown.attempts,
        "acceptedAt": rfc3339(shown.accepted_at),
        "expiresAt": rfc3339(shown.expires_at),
    }
    if shown.ready_at:
        told["readyAt"] = rfc3339(shown.ready_at)
    if shown.finished_at:
        told["finishedAt"] = rfc3339(shown.finished_at)
    if shown.state is State.SUCCEEDED:
        status, headers = msgspec.msgpack.decode(shown.result, type=tuple[int, list[list[str]]])
        http = {"status": status, "headers": headers} if status else {}
        told["result"] = http | body_view(shown.result_body)
    told["failures"] = [
        {
            "at": rfc3339(failure.started_at),
            "tookSeconds": round(failure.ended_at - failure.started_at, 6),
            "kind": failure.kind,
            "message": failure.message,
            "counted": failure.is_counted,
        }
        for failure in shown.failures
    ]
    return told


def body_view(body: bytes) -> dict[str, Any]:
    """Bytes in JSON, as functions get and give them."""
    try:
        return {"body": body.decode(), "isBase64Encoded": False}
    except UnicodeDecodeError:
        return {"body": base64.b64encode(body).decode(), "isBase64Encoded": True}
