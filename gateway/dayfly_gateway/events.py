"""HTTP in and out: a request becomes an invocation's meta map, an outcome becomes a response.

The body is never decoded here. What comes from clients and from functions is foreign: internal
headers are stripped on the way in, hop-by-hop and malformed ones on the way out.
"""

import ipaddress
import json
import re
import time
from collections.abc import Sequence
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, Final

from aiohttp import web
from multidict import CIMultiDict

from dayfly_gateway.routing import Match
from dayfly_pool.errors import BadInput, PlatformError
from dayfly_pool.models import Failure, Outcome, Success, Timing

HEADER_BYTES_MAX: Final = 32 * 1024
HEADERS_MAX: Final = 200
RESPONSE_HEADERS_MAX: Final = 100
RESPONSE_HEADER_BYTES_MAX: Final = 16 * 1024
TRACE_CHARACTERS_MAX: Final = 128
PROBLEM: Final = "application/problem+json"
STATUS_OF_FAILURE: Final = {"TimedOut": 504, "InitTimedOut": 504, "BadRequest": 400}

DIRECT_BYTES_MAX: Final = 64 * 1024
_REASONS: Final = {status.value: status.phrase for status in HTTPStatus}
_FORWARDED: Final = ("forwarded", "x-forwarded-", "x-real-ip")
_TOKEN: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,256}\Z")
_VALUE: Final = re.compile(r"[\t\x20-\x7e\x80-\U0010ffff]*\Z")
_HOP_BY_HOP: Final = frozenset(
    {
        "connection",
        "content-length",
        "date",
        "keep-alive",
        "proxy-authenticate",
        "proxy-connection",
        "server",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)

Networks = Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network]


class HeadersTooLarge(PlatformError):
    """The request's headers are over the limit.

    Send fewer or shorter headers; move data into the body.
    """

    status = 431


def trace(request: web.BaseRequest) -> str:
    """The caller's `traceparent`; none if it is not text: it could not be kept with an event."""
    given = request.headers.get("traceparent", "")[:TRACE_CHARACTERS_MAX]
    return given if given.isascii() else ""


def http_meta(request: web.BaseRequest, match: Match, trusted: Networks) -> dict[str, Any]:
    """What the guest needs to build the event. Raises `HeadersTooLarge`."""
    peer = request.remote or ""
    is_trusted = bool(trusted) and _is_within(peer, trusted)
    headers: list[list[str]] = []
    size = 0
    for raw_name, raw_value in request.raw_headers:
        name = raw_name.decode("latin-1").lower()
        if name.startswith("dayfly-") or "_" in name:
            continue
        if not is_trusted and name.startswith(_FORWARDED):
            continue
        value = raw_value.decode("utf-8", "replace")
        size += len(raw_name) + len(value.encode())  # a byte that is no UTF-8 becomes three
        headers.append([name, value])
    if size > HEADER_BYTES_MAX or len(headers) > HEADERS_MAX:
        raise HeadersTooLarge(f"{len(headers)} headers, {size} bytes")
    url = request.rel_url
    query = url.raw_query_string
    return {
        "method": request.method,
        "path": match.path,
        "query": query,
        "pairs": [[name, value] for name, value in url.query.items()] if query else [],
        "headers": headers,
        "source": _client(peer, headers, trusted) if is_trusted else peer,
        "protocol": f"HTTP/{request.version.major}.{request.version.minor}",
        "route": match.route,
        "parameters": match.parameters,
        "time": time.time(),
    }


def _is_within(address: str, networks: Networks) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return any(parsed in network for network in networks)


def _client(peer: str, headers: list[list[str]], trusted: Networks) -> str:
    """The rightmost address that is no proxy of ours."""
    chain = [v.strip() for n, value in headers if n == "x-forwarded-for" for v in value.split(",")]
    for address in reversed(chain):
        if not _is_within(address, trusted):
            return address[:64]
    return peer


def parse_networks(texts: Sequence[str]) -> Networks:
    """Networks from `10.0.0.0/8` and the like. Raises `BadInput`."""
    try:
        return [ipaddress.ip_network(text, strict=False) for text in texts]
    except ValueError as error:
        raise BadInput(f"--trusted-proxy: {error}") from None


def server_timing(timing: Timing) -> str:
    """The Server-Timing header, in milliseconds."""
    start = ""
    if timing.create_s is not None:
        start = f" create;dur={timing.create_s * 1000:.3f},"
    if timing.specialize_s is not None:
        start += f" specialize;dur={timing.specialize_s * 1000:.3f},"
    queue, handler = timing.queue_s * 1000, timing.handler_s * 1000
    return f"queue;dur={queue:.3f},{start} handler;dur={handler:.3f}"


def response(outcome: Outcome, invocation: str) -> web.Response:
    """The HTTP response for an outcome of an HTTP invocation."""
    if isinstance(outcome, Success):
        refused = _refusal(outcome)
        if refused is None:
            return _success(outcome, invocation)
        outcome = Failure("BadResponse", refused, "", outcome.timing)
    status = STATUS_OF_FAILURE.get(outcome.kind, 502)
    detail = f"the function failed; its log says why: dayfly logs, invocation {invocation}"
    answer = problem(status, outcome.kind, detail, invocation=invocation)
    answer.headers.update(_ours(invocation, outcome.timing))
    return answer


def _ours(invocation: str, timing: Timing) -> dict[str, str]:
    return {
        "Dayfly-Invocation": invocation,
        "Dayfly-Start": timing.start,
        "Server-Timing": server_timing(timing),
        "Server": "Dayfly",
    }


def _refusal(outcome: Success) -> str | None:
    """Why the guest's response must not be passed on; None when it may."""
    if not 200 <= outcome.status <= 599:
        return f"status {outcome.status}"
    headers = outcome.headers
    if len(headers) > RESPONSE_HEADERS_MAX:
        return f"{len(headers)} headers, limit {RESPONSE_HEADERS_MAX}"
    size = 0
    for pair in headers:
        if (
            type(pair) is not list
            or len(pair) != 2
            or type(pair[0]) is not str
            or type(pair[1]) is not str
        ):
            return "a header that is not a pair of strings"
        name, value = pair
        if not _TOKEN.match(name) or not _VALUE.match(value):
            return f"header {name[:100]!r} is malformed"
        size += len(name) + len(value)
    if size > RESPONSE_HEADER_BYTES_MAX:
        return f"headers of {size} bytes, limit {RESPONSE_HEADER_BYTES_MAX}"
    return None


def _success(outcome: Success, invocation: str) -> web.Response:
    headers: CIMultiDict[str] = CIMultiDict(_ours(invocation, outcome.timing))
    for name, value in outcome.headers:
        lower = name.lower()
        if lower not in _HOP_BY_HOP and not lower.startswith("dayfly-"):
            headers.add(name, value)
    has_body = outcome.status not in (204, 205, 304)
    return web.Response(
        status=outcome.status, body=outcome.body if has_body else None, headers=headers
    )


def wire_bytes(success: Success, invocation: str, request_id: str) -> bytes | None:
    """A success as the bytes of an HTTP/1.1 response on a connection that stays open.

    The same as aiohttp would assemble from `response`, in one string. None when the response is
    not of the everyday kind (no body allowed, large, malformed): then `response` is to be used.
    """
    status, body = success.status, success.body
    if status in (204, 205, 304) or len(body) > DIRECT_BYTES_MAX or _refusal(success):
        return None
    theirs = "".join([_line(name, value) for name, value in success.headers])
    timing = success.timing
    head = (
        f"HTTP/1.1 {status} {_REASONS.get(status, '')}\r\n"
        f"Dayfly-Invocation: {invocation}\r\nDayfly-Start: {timing.start}\r\n"
        f"Server-Timing: {server_timing(timing)}\r\nServer: Dayfly\r\n"
        f"X-Request-Id: {request_id}\r\n{theirs}"
        f"Content-Length: {len(body)}\r\nDate: {date()}\r\n\r\n"
    )
    return head.encode() + body


def _line(name: str, value: str) -> str:
    """The header as it is sent; nothing for one that is not the function's to set."""
    lower = name.lower()
    return "" if lower in _HOP_BY_HOP or lower.startswith("dayfly-") else f"{name}: {value}\r\n"


_last_date = (0, "")


def date() -> str:
    """The Date header, kept for the responses of the same second."""
    global _last_date
    now = int(time.time())
    if _last_date[0] != now:
        _last_date = (now, formatdate(now, usegmt=True))
    return _last_date[1]


def problem(status: int, title: str, detail: str, **fields: Any) -> web.Response:
    """An RFC 9457 problem document."""
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail} | fields
    return web.Response(
        status=status,
        body=json.dumps(body).encode(),
        headers={"Content-Type": PROBLEM, "Server": "Dayfly"},
    )


def platform_problem(error: PlatformError, **fields: Any) -> web.Response:
    """The problem document of one of our own errors."""
    end = "" if error.detail.endswith("?") else "."
    detail = f"{error.detail}{end} {error.remedy()}" if error.detail else error.remedy()
    fields |= {"error": type(error).__name__, "retryable": error.retryable} | error.fields
    answer = problem(error.status, error.title(), detail, **fields)
    if error.retry_after_s is not None:
        answer.headers["Retry-After"] = str(error.retry_after_s)
    return answer
