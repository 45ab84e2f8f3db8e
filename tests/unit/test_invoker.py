"""One call of a handler: the event that it is given, and what its result means."""

import asyncio
import base64
import functools
import json
import os
import time
from collections.abc import Callable
from typing import Any

import pytest

from dayfly.context import Context
from dayfly.invoker import Function, call, call_async, http_event, make_event
from dayfly.protocol import BODY_BYTES_MAX, META_BYTES_MAX, Failed, Invoke, Result, encode

AWS_EXAMPLE = {
    "version": "2.0",
    "routeKey": "$default",
    "rawPath": "/my/path",
    "rawQueryString": "parameter1=value1&parameter1=value2&parameter2=value",
    "cookies": ["cookie1", "cookie2"],
    "headers": {"header1": "value1", "header2": "value1,value2"},
    "queryStringParameters": {"parameter1": "value1,value2", "parameter2": "value"},
    "requestContext": {
        "accountId": "anonymous",
        "apiId": "id",
        "domainName": "",
        "domainPrefix": "",
        "http": {
            "method": "POST",
            "path": "/my/path",
            "protocol": "HTTP/1.1",
            "sourceIp": "192.0.2.1",
            "userAgent": "",
        },
        "requestId": "id",
        "routeKey": "$default",
        "stage": "$default",
        "time": "12/Mar/2020:19:03:58 +0000",
        "timeEpoch": 1584039838500,
    },
    "body": "Hello from Lambda",
    "pathParameters": {"parameter1": "value1"},
    "isBase64Encoded": False,
}
"""docs.aws.amazon.com/apigateway/latest/developerguide/http-api-develop-integrations-lambda.html,
without what nobody configured here (authentication, authorizer, stageVariables)."""


def http(**changed: Any) -> dict[str, Any]:
    """The meta map of a plain GET, as the gateway makes it."""
    meta = {
        "method": "GET",
        "path": "/",
        "query": "",
        "pairs": [],
        "headers": [],
        "source": "192.0.2.1",
        "protocol": "HTTP/1.1",
        "route": "$default",
        "parameters": {},
        "time": 1584039838.5,
    }
    return meta | changed


def direct(remaining_s: float = 30) -> Invoke:
    return Invoke(id="id", remaining_s=remaining_s)


def over_http(**changed: Any) -> Invoke:
    return Invoke(id="id", remaining_s=30, http=http(**changed))


def function(handler: Callable[..., Any]) -> Function:
    return Function(
        name="greet",
        namespace="default",
        version="7",
        memory_mb=256,
        code=os.path.dirname(__file__),
        handler=handler,
    )


def returning(value: Any, request: Invoke) -> tuple[Result | Failed, bytes]:
    return call(function(lambda event, context: value), request, b"")


# ---- the event ----------------------------------------------------------------------------------


def test_the_event_of_an_http_request_is_aws_own_example():
    """Payload 2.0, field by field, so that handlers written for Lambda run unchanged."""
    meta = http(
        method="POST",
        path="/my/path",
        query="parameter1=value1&parameter1=value2&parameter2=value",
        pairs=[["parameter1", "value1"], ["parameter1", "value2"], ["parameter2", "value"]],
        headers=[
            ["header1", "value1"],
            ["header2", "value1"],
            ["cookie", "cookie1; cookie2"],
            ["header2", "value2"],
        ],
        parameters={"parameter1": "value1"},
    )

    assert http_event(direct(), meta, b"Hello from Lambda") == AWS_EXAMPLE


def test_the_host_and_the_agent_are_in_the_request_context():
    headers = [["host", "api.example.com"], ["user-agent", "curl/8"]]
    context = http_event(direct(), http(headers=headers), b"")["requestContext"]

    assert (context["domainName"], context["domainPrefix"]) == ("api.example.com", "api")
    assert context["http"]["userAgent"] == "curl/8"


def test_what_a_request_does_not_have_its_event_does_not_have():
    """As on AWS: no body, no cookies, no parameters, no keys for them."""
    event = http_event(direct(), http(), b"")

    assert not event.keys() & {"body", "cookies", "queryStringParameters", "pathParameters"}


def test_cookies_of_several_headers_are_separate():
    """HTTP/2 clients may split them; a comma is no separator there."""
    headers = [["cookie", "a=1; b=2"], ["cookie", "c=3"]]

    assert http_event(direct(), http(headers=headers), b"")["cookies"] == ["a=1", "b=2", "c=3"]


@pytest.mark.parametrize(
    ("kind", "body", "is_text"),
    [
        ("text/plain", b"Gr\xc3\xbc\xc3\x9fe", True),
        ("application/json; charset=utf-8", b"{}", True),
        ("application/problem+json", b"{}", True),
        ("image/svg+xml", b"<svg/>", True),
        ("application/x-www-form-urlencoded", b"a=1", True),
        ("APPLICATION/JSON", b"{}", True),
        ("", b"abc", False),
        ("image/png", b"\x89PNG", False),
        ("application/octet-stream", b"abc", False),
        ("multipart/form-data; boundary=x", b"--x", False),
        ("text/plain", b"\xff\xfe", False),
    ],
)
def test_a_body_is_text_when_its_type_and_its_bytes_are(kind: str, body: bytes, is_text: bool):
    """Everything else is base64, so that no byte is lost on the way through a JSON-like event."""
    event = http_event(direct(), http(headers=[["content-type", kind]]), body)
    plain = body.decode() if is_text else base64.b64encode(body).decode()

    assert (event["body"], event["isBase64Encoded"]) == (plain, not is_text)


def test_a_body_without_a_type_is_text_if_it_can_be():
    """As curl -d sends it."""
    assert http_event(direct(), http(), b"a=1")["body"] == "a=1"


@pytest.mark.parametrize(
    ("body", "event"), [(b'{"name": "Ada"}', {"name": "Ada"}), (b"", None), (b"5", 5)]
)
def test_a_direct_invoke_gets_the_json_that_was_sent(body: bytes, event: Any):
    assert make_event(direct(), body) == event


def test_the_context_is_lambdas():
    """The attributes that AWS documents, and the milliseconds that are left."""
    seen: list[Context] = []
    call(function(lambda event, context: seen.append(context)), direct(remaining_s=30), b"")
    (context,) = seen

    assert context.aws_request_id == "id"
    assert (context.function_name, context.function_version) == ("greet", "7")
    assert context.memory_limit_in_mb == 256
    assert 29_000 < context.get_remaining_time_in_millis() <= 30_000
    assert context.deadline == pytest.approx(time.monotonic() + 30, abs=1)


def test_the_remaining_time_is_never_negative():
    seen: list[Context] = []
    call(function(lambda event, context: seen.append(context)), direct(remaining_s=0), b"")

    assert seen[0].get_remaining_time_in_millis() == 0


# ---- the result ---------------------------------------------------------------------------------

RESULTS = [
    ("hi", 200, "text/plain; charset=utf-8", b"hi"),
    (b"\x89", 200, "application/octet-stream", b"\x89"),
    ({"a": 1}, 200, "application/json", b'{"a":1}'),
    ([1, "\u00fc"], 200, "application/json", b'[1,"\xc3\xbc"]'),
    (None, 200, "application/json", b"null"),
    ({"statusCode": 204}, 204, None, b""),
    ({"statusCode": 201, "body": "made"}, 201, "text/plain; charset=utf-8", b"made"),
    ({"statusCode": "404", "body": {"no": 1}}, 404, "application/json", b'{"no":1}'),
    ({"statusCode": 200, "body": "aGk=", "isBase64Encoded": True}, 200,
     "application/octet-stream", b"hi"),
    ({"statusCode": 200, "body": "<p>", "headers": {"Content-Type": "text/html"}}, 200,
     "text/html", b"<p>"),
    ({"statusCode": 200, "body": 5, "headers": None}, 200, "application/json", b"5"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "status", "kind", "body"), RESULTS, ids=str)
def test_every_result_has_its_response(value: Any, status: int, kind: str | None, body: bytes):
    """A dict with statusCode is a response; anything else is a body with status 200."""
    result, sent = returning(value, over_http())

    assert isinstance(result, Result)
    headers = {name.lower(): value for name, value in result.headers}
    assert (result.status, headers.get("content-type"), sent) == (status, kind, body)


def test_headers_and_cookies_of_a_response_keep_their_order():
    value = {
        "statusCode": 302,
        "headers": {"Location": "/", "X-Number": 5},
        "multiValueHeaders": {"Via": ["a", "b"]},
        "cookies": ["a=1; Secure", "b=2"],
    }
    result, _ = returning(value, over_http())

    assert isinstance(result, Result)
    assert result.headers == [
        ["Location", "/"],
        ["X-Number", "5"],
        ["Via", "a"],
        ["Via", "b"],
        ["set-cookie", "a=1; Secure"],
        ["set-cookie", "b=2"],
    ]


def cyclic() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


BAD = [
    object(),
    {1, 2},
    cyclic(),
    "\udcff",
    {"a": "\udcff"},
    {"statusCode": "ok"},
    {"statusCode": None},
    {"statusCode": True},
    {"statusCode": 99},
    {"statusCode": 600},
    {"statusCode": 200.5},
    {"statusCode": "\u00b2"},
    {"statusCode": -200},
    {"statusCode": 200, "headers": "a"},
    {"statusCode": 200, "headers": 5},
    {"statusCode": 200, "multiValueHeaders": {"a": 5}},
    {"statusCode": 200, "cookies": 5},
    {"statusCode": 200, "body": 5, "isBase64Encoded": True},
    {"statusCode": 200, "body": "a", "isBase64Encoded": True},
    {"statusCode": 200, "body": object()},
    {"statusCode": 200, "headers": {"a": "\udcff"}},
    {"statusCode": 200, "headers": {"a": "x" * META_BYTES_MAX}},
    {"statusCode": 200, "headers": {str(n): "" for n in range(5000)}},
    {"statusCode": 200, "cookies": ["\U0001f600" * 1000] * 20},
    "x" * (BODY_BYTES_MAX + 1),
]


@pytest.mark.parametrize("value", BAD, ids=lambda value: repr(value)[:50])
def test_what_cannot_be_sent_is_a_bad_response(value: Any):
    """The sandbox lives on; the failure says what is wrong with the value."""
    failed, body = returning(value, over_http())

    assert isinstance(failed, Failed)
    assert failed.kind == "BadResponse"
    assert failed.message
    assert body == b""
    encode(failed)


def test_a_direct_result_is_json():
    assert returning({"a": "\u00fc"}, direct())[1] == '{"a":"\u00fc"}'.encode()
    assert returning(b"bytes", direct())[1] == b'"bytes"'
    assert returning(None, direct())[1] == b"null"
    failed, _ = returning({1, 2}, direct())
    assert isinstance(failed, Failed)
    assert failed.kind == "BadResponse"


def test_a_large_direct_result_is_refused_in_words():
    failed, _ = returning("x" * BODY_BYTES_MAX, direct())

    assert isinstance(failed, Failed)
    assert "limit" in failed.message


# ---- failures -----------------------------------------------------------------------------------


def raising(error: BaseException) -> Function:
    def handle(event: Any, context: Any) -> None:
        raise error

    return function(handle)


class Silent(Exception):
    """Its message cannot be made."""

    def __str__(self) -> str:
        raise RuntimeError


class Exiting(Exception):
    """Making its message ends the process."""

    def __str__(self) -> str:
        raise SystemExit


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("no"), "Raised", "ValueError: no"),
        (SystemExit(3), "Exited", "SystemExit: 3"),
        (KeyboardInterrupt(), "Raised", "KeyboardInterrupt: "),
        (MemoryError(), "OutOfMemory", "MemoryError: "),
        (RecursionError("deep"), "Raised", "RecursionError: deep"),
        (Silent(), "Raised", "Silent"),
        (Exiting(), "Raised", "Exiting"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_a_handler_raises_is_an_answer(error: BaseException, kind: str, message: str):
    failed, body = call(raising(error), direct(), b"")

    assert isinstance(failed, Failed)
    assert (failed.kind, failed.message, body) == (kind, message, b"")
    assert failed.handler_s >= 0


@pytest.mark.parametrize("text", ["x" * 10**6, "\U0001f600" * 10**5, "\udcff"])
def test_a_failure_of_any_size_can_be_sent(text: str):
    """Its frame has a limit of 64 KiB; a guest that could not say it would crash."""
    failed, _ = call(raising(ValueError(text)), direct(), b"")

    assert encode(failed)


def test_a_traceback_begins_with_the_users_own_frame():
    failed, _ = call(raising(ValueError("no")), direct(), b"")

    assert isinstance(failed, Failed)
    assert "dayfly/invoker.py" not in failed.traceback
    assert failed.traceback.startswith("Traceback (most recent call last):\n")
    assert "in handle\n    raise error\nValueError: no" in failed.traceback


def test_a_handler_of_the_wrong_shape_is_told_so():
    failed, _ = call(function(lambda: None), direct(), b"")

    assert isinstance(failed, Failed)
    assert "takes 0 positional arguments but 2 were given" in failed.message


def test_an_event_that_is_no_json_is_an_answer_too():
    failed, _ = call(function(lambda event, context: None), direct(), b"{")

    assert isinstance(failed, Failed)


# ---- coroutines ---------------------------------------------------------------------------------


async def coroutine(event: Any, context: Any) -> Any:
    return event


class Callable_:
    async def __call__(self, event: Any, context: Any) -> Any:
        return event


def plain(event: Any, context: Any) -> Any:
    return event


@pytest.mark.parametrize(
    ("handler", "is_async"),
    [
        (coroutine, True),
        (functools.partial(coroutine), True),
        (functools.partial(functools.partial(coroutine)), True),
        (Callable_(), True),
        (Callable_().__call__, True),
        (plain, False),
        (functools.partial(plain), False),
        (len, False),
        (dict, False),
    ],
)
def test_coroutine_handlers_are_recognized(handler: Callable[..., Any], is_async: bool):
    """Without `inspect`, which costs every sandbox 12 ms."""
    assert function(handler).is_async is is_async


async def test_a_coroutine_handler_answers():
    result, body = await call_async(function(coroutine), direct(), b'{"a": 1}')

    assert isinstance(result, Result)
    assert json.loads(body) == {"a": 1}


async def test_a_coroutine_handler_that_fails_answers():
    async def handle(event: Any, context: Any) -> None:
        raise ValueError("no")

    failed, _ = await call_async(function(handle), direct(), b"")

    assert isinstance(failed, Failed)
    assert (failed.kind, failed.message) == ("Raised", "ValueError: no")


async def test_coroutine_handlers_run_at_the_same_time():
    both = asyncio.Barrier(2)

    async def meet(event: Any, context: Any) -> int:
        return await both.wait()

    calls = [call_async(function(meet), direct(), b"") for _ in range(2)]
    async with asyncio.timeout(5):
        answers = await asyncio.gather(*calls)

    assert sorted(body for _, body in answers) == [b"0", b"1"]


# ---- processes ----------------------------------------------------------------------------------


def test_a_forked_child_that_comes_back_gives_no_answer():
    """It ends with code 0 inside `call`: two answers to one invocation would break the protocol."""

    def handle(event: Any, context: Any) -> int:
        return os.fork()

    answer, body = call(function(handle), direct(), b"")
    child = json.loads(body)
    _, status = os.waitpid(child, 0)

    assert isinstance(answer, Result)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_forked_child_that_raises_gives_no_answer():
    def handle(event: Any, context: Any) -> int:
        child = os.fork()
        if not child:
            raise ValueError
        return child

    _, body = call(function(handle), direct(), b"")
    _, status = os.waitpid(json.loads(body), 0)

    assert os.waitstatus_to_exitcode(status) == 1
