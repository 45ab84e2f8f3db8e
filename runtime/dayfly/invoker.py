"""Call one handler for one event: what it is given, and what its result means.

For HTTP the event is AWS API Gateway's payload 2.0, built here and not in the gateway; for a
direct invoke it is the JSON that was sent.
"""

from __future__ import annotations

import binascii
import json
import os
import time

from dayfly.context import FOLDERS, Context
from dayfly.loader import said, user_traceback
from dayfly.protocol import BODY_BYTES_MAX, Failed, Invoke, Result
from dayfly.record import Record

TYPE_CHECKING = False  # see `record`
if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

    from dayfly.loader import Handler

    Answer = tuple[Result | Failed, bytes]

TEXT_TYPES = ("text/", "application/json", "application/xml", "application/javascript")
TEXT_TYPES_EXACT = "application/x-www-form-urlencoded"
HEADERS_MAX, HEADER_BYTES_MAX = 100, 16 * 1024  # what the gateway passes on
CO_COROUTINE = 0x80  # inspect.CO_COROUTINE, without the 12 ms of importing inspect


class Exit(SystemExit):
    """A process of the user's did not end well; the text is the whole message."""

    def __init__(self, code: int, why: str, kind: str = "Exited") -> None:
        super().__init__(code)
        self.why, self.kind = why, kind


class Function(Record):
    """The one function that this guest has become."""

    name: str
    namespace: str
    version: str
    memory_mb: int
    code: str
    handler: Handler
    folders: tuple[str, str, str] = FOLDERS

    @property
    def is_async(self) -> bool:
        """Whether the handler is a coroutine function (also as a callable object)."""
        handler: Any = self.handler
        while hasattr(handler, "func"):  # functools.partial
            handler = handler.func
        candidates = (handler, getattr(type(handler), "__call__", None))  # noqa: B004
        codes = [getattr(candidate, "__code__", None) for candidate in candidates]
        return any(code is not None and code.co_flags & CO_COROUTINE for code in codes)


def context(function: Function, request: Invoke) -> Context:
    """The context that the handler is given."""
    return Context(
        aws_request_id=request.id,
        function_name=function.name,
        function_version=function.version,
        memory_limit_in_mb=function.memory_mb,
        namespace=function.namespace,
        deadline=time.monotonic() + request.remaining_s,
        traceparent=request.trace,
        env=request.env,
        in_folder=function.folders[0],
        out_folder=function.folders[1],
        workspace_folder=function.folders[2],
    )


def call(function: Function, request: Invoke, body: bytes) -> Answer:
    """Run a plain handler to its end; every failure of user code is an answer."""
    started, owner = time.perf_counter(), os.getpid()
    if request.env:
        os.environ.update(request.env)
    try:
        event = make_event(request, body)
        value = function.handler(event, context(function, request))
        if os.getpid() != owner:
            os._exit(0)  # the handler forked and its child came back: the answer is not its to give
        return answer(value, request, time.perf_counter() - started)
    except BaseException as error:
        if os.getpid() != owner:
            os._exit(1)
        return failed(error, function.code, time.perf_counter() - started)
    finally:
        for name in request.env or ():
            os.environ.pop(name, None)


async def call_async(function: Function, request: Invoke, body: bytes) -> Answer:
    """The same for a coroutine handler, whose variables are in its context alone: it shares the
    process with others.
    """
    started = time.perf_counter()
    try:
        coroutine: Coroutine[Any, Any, Any] = function.handler(
            make_event(request, body), context(function, request)
        )
        return answer(await coroutine, request, time.perf_counter() - started)
    except BaseException as error:
        return failed(error, function.code, time.perf_counter() - started)


def failed(error: BaseException, code: str, handler_s: float) -> Answer:
    """What is told of an exception that left the handler."""
    kind = "Exited" if isinstance(error, SystemExit) else "Raised"
    if isinstance(error, MemoryError):
        kind = "OutOfMemory"
    if isinstance(error, Exit):
        kind, message, trace = error.kind, error.why, ""
    else:
        message, trace = said(error), user_traceback(error, code)
    ended = exit_code(error)
    return Failed.of(
        {
            "kind": kind,
            "message": message,
            "traceback": trace,
            "handler_s": handler_s,
            "exit_code": ended,
        }
    ), b""


def exit_code(error: BaseException) -> int:
    """What a process would end with for it, as `sys.exit` has it; -1 if it is no SystemExit."""
    if not isinstance(error, SystemExit):
        return -1
    code = error.code
    if code is None:
        return 0
    return code & 0xFF if type(code) is int else 1


def _bad(message: str, handler_s: float) -> Answer:
    return Failed(kind="BadResponse", message=message, traceback="", handler_s=handler_s), b""


def answer(value: Any, request: Invoke, handler_s: float) -> Answer:
    """Turn what the handler returned into a `Result`, or say why that cannot be done."""
    try:
        status = 0
        headers: list[list[str]] = []
        if request.http is None:
            body = json_bytes(value)
        else:
            status, headers, body = http_response(value)
        size = sum([len(name.encode()) + len(text.encode()) for name, text in headers])
    except (TypeError, ValueError, RecursionError, binascii.Error) as error:
        why = said(error).partition(": ")[2]
        return _bad(f"the handler returned something that cannot be sent: {why}", handler_s)
    if len(body) > BODY_BYTES_MAX:
        return _bad(f"the response has {len(body)} bytes, limit {BODY_BYTES_MAX}", handler_s)
    if len(headers) > HEADERS_MAX or size > HEADER_BYTES_MAX:
        limits = f"limits {HEADERS_MAX} and {HEADER_BYTES_MAX}"
        return _bad(f"{len(headers)} headers with {size} bytes, {limits}", handler_s)
    return Result.of({"handler_s": handler_s, "status": status, "headers": headers}), body


def json_bytes(value: Any) -> bytes:
    """JSON, where bytes and str at the top stay what they are for a direct invoke's reader."""
    if isinstance(value, (bytes, bytearray)):
        return json.dumps(bytes(value).decode("utf-8")).encode()
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def http_response(value: Any) -> tuple[int, list[list[str]], bytes]:
    """(status, headers, body) of a handler's value, by the rules of payload 2.0.

    A dict with `statusCode` is a whole response; anything else is a body with status 200.
    Raises TypeError or ValueError when it is neither.
    """
    if not (isinstance(value, dict) and "statusCode" in value):
        body, kind = _body(value)
        return 200, [["content-type", kind]], body
    status = value["statusCode"]
    if isinstance(status, bool) or not str(status).isdigit() or not 200 <= int(status) <= 599:
        raise ValueError(f"statusCode {status!r} is not a number from 200 to 599")
    headers = [[str(k), str(v)] for k, v in dict(value.get("headers") or {}).items()]
    for name, several in dict(value.get("multiValueHeaders") or {}).items():
        headers += [[str(name), str(v)] for v in several]
    headers += [["set-cookie", str(cookie)] for cookie in value.get("cookies") or ()]
    content = value.get("body")
    if content is None:
        body, kind = b"", ""
    elif value.get("isBase64Encoded"):
        body, kind = binascii.a2b_base64(content), "application/octet-stream"
    else:
        body, kind = _body(content)
    if kind and not any(name.lower() == "content-type" for name, _ in headers):
        headers.append(["content-type", kind])
    return int(status), headers, body


def _body(value: Any) -> tuple[bytes, str]:
    if isinstance(value, str):
        return value.encode(), "text/plain; charset=utf-8"
    if isinstance(value, (bytes, bytearray)):
        return bytes(value), "application/octet-stream"
    return json_bytes(value), "application/json"


def make_event(request: Invoke, body: bytes) -> Any:
    """The handler's first argument."""
    if request.http is None:
        return json.loads(body) if body else None
    return http_event(request, request.http, body)


def http_event(request: Invoke, http: dict[str, Any], body: bytes) -> dict[str, Any]:
    """API Gateway's payload 2.0 for one HTTP request."""
    headers: dict[str, str] = {}
    for name, value in http["headers"]:
        comma = "; " if name == "cookie" else ","
        headers[name] = f"{headers[name]}{comma}{value}" if name in headers else value
    cookies = headers.pop("cookie", "")
    method, path, query = http["method"], http["path"], http["query"]
    now = http["time"]
    event: dict[str, Any] = {
        "version": "2.0",
        "routeKey": http["route"],
        "rawPath": path,
        "rawQueryString": query,
        "headers": headers,
        "requestContext": {
            "accountId": "anonymous",
            "apiId": request.id,
            "domainName": headers.get("host", ""),
            "domainPrefix": headers.get("host", "").partition(".")[0],
            "http": {
                "method": method,
                "path": path,
                "protocol": http["protocol"],
                "sourceIp": http["source"],
                "userAgent": headers.get("user-agent", ""),
            },
            "requestId": request.id,
            "routeKey": http["route"],
            "stage": "$default",
            "time": _clock(int(now)),
            "timeEpoch": int(now * 1000),
        },
        "isBase64Encoded": False,
    }
    if cookies:
        event["cookies"] = [cookie.strip() for cookie in cookies.split(";")]
    if query:
        parameters: dict[str, str] = {}
        for name, value in http["pairs"]:
            parameters[name] = f"{parameters[name]},{value}" if name in parameters else value
        event["queryStringParameters"] = parameters
    if http["parameters"]:
        event["pathParameters"] = http["parameters"]
    if body:
        event["body"], event["isBase64Encoded"] = _event_body(
            body, headers.get("content-type", TEXT_TYPES_EXACT)
        )
    return event


_last_clock = (0, "")


def _clock(second: int) -> str:
    """Apache's time format, kept for the invocations of the same second."""
    global _last_clock
    if _last_clock[0] != second:
        text = time.strftime("%d/%b/%Y:%H:%M:%S +0000", time.gmtime(second))
        _last_clock = (second, text)
    return _last_clock[1]


def _event_body(body: bytes, content_type: str) -> tuple[str, bool]:
    kind = content_type.partition(";")[0].strip().lower()
    if kind.startswith(TEXT_TYPES) or kind == TEXT_TYPES_EXACT or kind.endswith(("+json", "+xml")):
        try:
            return body.decode(), False
        except UnicodeDecodeError:
            pass
    return binascii.b2a_base64(body, newline=False).decode(), True
