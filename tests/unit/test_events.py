"""HTTP in and out: what a client cannot smuggle in, and what a function cannot smuggle out."""

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import HttpVersion, HttpVersion11, web
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from dayfly.protocol import META_BYTES_MAX, Invoke, encode
from dayfly_gateway.events import (
    HEADER_BYTES_MAX,
    HEADERS_MAX,
    RESPONSE_HEADER_BYTES_MAX,
    RESPONSE_HEADERS_MAX,
    HeadersTooLarge,
    http_meta,
    parse_networks,
    platform_problem,
    problem,
    response,
    server_timing,
)
from dayfly_gateway.routing import Match, Routes
from dayfly_pool.errors import BadInput, BodyTooLarge, FunctionNotFound, NoCapacity, PlatformError
from dayfly_pool.models import Failure, FunctionId, Route, Success, Timing

GREET = Match(FunctionId("default/greet"), "/below")
TIMING = Timing(start="created", queue_s=0.001, create_s=0.05, specialize_s=0.002, handler_s=0.25)
LINE_BYTES_MAX = 8190
"""aiohttp takes no longer request line or header."""


PATH = URL("/fn/greet/below")


@dataclass
class Request:
    """What `http_meta` looks at."""

    raw_headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    remote: str | None = "192.0.2.9"
    rel_url: URL = PATH
    method: str = "GET"
    version: HttpVersion = HttpVersion11


def meta(*headers: tuple[str, str], trusted: tuple[str, ...] = (), **changed: Any) -> Any:
    raw = [(name.encode(), value.encode()) for name, value in headers]
    return http_meta(Request(raw, **changed), GREET, parse_networks(trusted))  # type: ignore[arg-type]


def success(*headers: Any, status: int = 200, body: bytes = b"hi") -> Success:
    return Success(body, TIMING, status, [list(pair) for pair in headers])


def document(answer: web.Response) -> dict[str, Any]:
    assert answer.content_type == "application/problem+json"
    assert isinstance(answer.body, bytes)
    parsed: dict[str, Any] = json.loads(answer.body)
    return parsed


# ---- in -----------------------------------------------------------------------------------------


def test_a_request_becomes_a_meta_map():
    """All that a guest needs to build the event; the body is not among it."""
    told = meta(("Accept", "*/*"), ("X-Two", "a"), ("x-two", "ü"), rel_url=URL("/?a=1&b=%20"))

    assert told.pop("time") > 1.7e9
    assert told == {
        "method": "GET",
        "path": "/below",
        "query": "a=1&b=%20",
        "pairs": [["a", "1"], ["b", " "]],
        "headers": [["accept", "*/*"], ["x-two", "a"], ["x-two", "ü"]],
        "source": "192.0.2.9",
        "protocol": "HTTP/1.1",
        "route": "$default",
        "parameters": {},
    }


SET_BY_US_OR_A_PROXY = (
    "Dayfly-Invocation",
    "dayfly-start",
    "DAYFLY-X",
    "X_Real_IP",
    "x_forwarded_for",
    "Forwarded",
    "X-Forwarded-For",
    "X-Forwarded-Proto",
    "X-Forwarded-Anything",
    "X-Real-IP",
)


@pytest.mark.parametrize("name", SET_BY_US_OR_A_PROXY)
def test_headers_that_only_we_or_a_proxy_may_set_are_stripped(name: str):
    """A function may believe what it is told of its caller; WSGI folds `_` and `-` into one."""
    assert meta((name, "evil"), ("x-mine", "1"))["headers"] == [["x-mine", "1"]]


def test_a_header_that_is_no_utf8_is_replaced():
    raw = [(b"x-a", b"\xff\xfe")]

    told = http_meta(Request(raw), GREET, ())  # type: ignore[arg-type]

    assert told["headers"] == [["x-a", "\ufffd\ufffd"]]


def test_too_many_headers_are_refused():
    with pytest.raises(HeadersTooLarge):
        meta(*[(f"x-{n}", "1") for n in range(HEADERS_MAX + 1)])
    assert HeadersTooLarge.status == 431


@pytest.mark.parametrize("byte", ["x", "\xff", "ü"])
def test_too_large_headers_are_refused(byte: str):
    with pytest.raises(HeadersTooLarge):
        meta(*[(f"x-{n}", byte * (HEADER_BYTES_MAX // 8)) for n in range(10)])


NAMES = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=40)
HEADERS = st.lists(
    st.tuples(
        NAMES.map(str.encode),
        st.tuples(st.binary(min_size=1, max_size=4), st.integers(0, LINE_BYTES_MAX // 4)).map(
            lambda pair: pair[0] * pair[1]
        ),
    ),
    max_size=HEADERS_MAX + 10,
)


@settings(max_examples=50, deadline=None)
@given(
    HEADERS, st.sampled_from(["?a=1", "?" + "a&" * 4000, "?" + "%ff" * 2700, "?" + "a=&" * 2700])
)
def test_whatever_is_let_in_fits_a_frame(headers: list[tuple[bytes, bytes]], query: str):
    """A request that passes here must not fail on its way to a sandbox."""
    request = Request(headers, rel_url=URL("/" + query, encoded=True))
    try:
        told = http_meta(request, GREET, ())  # type: ignore[arg-type]
    except HeadersTooLarge:
        return

    assert encode(Invoke(id="0" * 32, remaining_s=1.0, http=told, trace="x" * 128))


def test_the_longest_path_and_the_largest_headers_fit_a_frame():
    """The worst of everything at once."""
    path = "/" + "x" * (LINE_BYTES_MAX - 20)
    match = Routes([(GREET.function, Route(path="/{rest+}"))]).match("h", path, "GET")
    raw = [(f"x-{n:08}".encode(), b"\xff" * 50) for n in range(HEADERS_MAX)]
    told = http_meta(Request(raw), match, ())  # type: ignore[arg-type]
    size = len(encode(Invoke(id="0" * 32, remaining_s=1.0, http=told, trace="x" * 128)))

    assert size < META_BYTES_MAX


# ---- proxies ------------------------------------------------------------------------------------

PROXIES = ("10.0.0.0/8", "fd00::/8")


def test_a_trusted_proxy_may_say_who_the_client_is():
    told = meta(("X-Forwarded-For", "203.0.113.7"), remote="10.0.0.1", trusted=PROXIES)

    assert told["source"] == "203.0.113.7"
    assert told["headers"] == [["x-forwarded-for", "203.0.113.7"]]


def test_anybody_else_may_not():
    told = meta(("X-Forwarded-For", "203.0.113.7"), remote="192.0.2.9", trusted=PROXIES)

    assert (told["source"], told["headers"]) == ("192.0.2.9", [])


@pytest.mark.parametrize(
    ("chain", "client"),
    [
        (["1.1.1.1, 203.0.113.7"], "203.0.113.7"),  # the first was written by the client itself
        (["203.0.113.7, 10.0.0.2"], "203.0.113.7"),
        (["203.0.113.7, 10.0.0.2, fd00::1"], "203.0.113.7"),
        (["1.1.1.1", "203.0.113.7"], "203.0.113.7"),
        (["10.0.0.3, 10.0.0.2"], "10.0.0.1"),
        ([], "10.0.0.1"),
        (["2001:db8::1"], "2001:db8::1"),
    ],
)
def test_the_client_is_the_rightmost_address_that_is_no_proxy_of_ours(
    chain: list[str], client: str
):
    """Each proxy appends who spoke to it: only what ours appended can be believed."""
    headers = [("X-Forwarded-For", value) for value in chain]

    assert meta(*headers, remote="10.0.0.1", trusted=PROXIES)["source"] == client


def test_a_request_without_an_address_is_not_trusted():
    """Over a Unix socket there is none."""
    assert meta(("X-Real-IP", "1.1.1.1"), remote=None, trusted=PROXIES)["headers"] == []


@pytest.mark.parametrize("text", ["10.0.0.0/33", "example.com", "", "10.0.0.1-5"])
def test_a_malformed_network_is_refused(text: str):
    with pytest.raises(BadInput, match="--trusted-proxy"):
        parse_networks([text])


# ---- out ----------------------------------------------------------------------------------------


def test_a_success_is_passed_on_with_our_headers():
    answer = response(success(("content-type", "text/html"), status=201), "i1")

    assert (answer.status, answer.body) == (201, b"hi")
    assert answer.headers["Content-Type"] == "text/html"
    assert answer.headers["Dayfly-Invocation"] == "i1"
    assert answer.headers["Dayfly-Start"] == "created"
    assert answer.headers["Server"] == "Dayfly"


def test_server_timing_tells_the_phases_in_milliseconds():
    """The standard header; browsers show it. What did not happen is not told."""
    assert server_timing(TIMING) == (
        "queue;dur=1.000, create;dur=50.000, specialize;dur=2.000, handler;dur=250.000"
    )
    assert server_timing(Timing(handler_s=0.0005)) == "queue;dur=0.000, handler;dur=0.500"


def test_several_cookies_stay_several():
    answer = response(success(("set-cookie", "a=1"), ("Set-Cookie", "b=2")), "i1")

    assert answer.headers.getall("Set-Cookie") == ["a=1", "b=2"]


@pytest.mark.parametrize(
    "name",
    ["Connection", "Keep-Alive", "Transfer-Encoding", "TE", "Trailer", "Upgrade", "Content-Length",
     "Proxy-Authenticate", "Proxy-Connection", "Date", "Server", "Dayfly-Invocation",
     "dayfly-anything"],
)  # fmt: skip
def test_headers_of_the_connection_and_our_own_are_not_the_functions_to_set(name: str):
    """A second length or transfer coding is how responses are smuggled."""
    answer = response(success((name, "evil")), "i1")

    assert "evil" not in answer.headers.values()
    assert answer.status == 200


@pytest.mark.parametrize("status", [204, 205, 304])
def test_a_status_without_a_body_gets_none(status: int):
    assert response(success(status=status), "i1").body is None


HOSTILE_HEADERS: list[Any] = [
    ("x\r\nevil", "1"),
    ("x", "1\r\nevil: 2"),
    ("x", "1\nevil"),
    ("x", "\0"),
    ("x", "\x7f"),
    ("x y", "1"),
    ("x:", "1"),
    ("", "1"),
    ("ü", "1"),
    ("x\n", "1"),
    ("x" * 257, "1"),
    ("x",),
    ("x", "1", "2"),
    (b"x", b"1"),
    (5, "1"),
    ("x", 5),
    ("x", None),
    ("x", ["1"]),
]


@pytest.mark.parametrize("pair", HOSTILE_HEADERS, ids=repr)
def test_a_malformed_header_makes_the_whole_response_a_bad_one(pair: Any):
    """502, and nothing of it is passed on: a guess could be what the attacker wants."""
    answer = response(success(pair, ("x-good", "1")), "i1")

    assert answer.status == 502
    assert document(answer)["title"] == "BadResponse"
    assert document(answer)["invocation"] == "i1"
    assert "x-good" not in answer.headers


@pytest.mark.parametrize("headers", [["ab"], [5], [None], [{"a": "b", "c": "d"}], ["x" * 2]])
def test_a_header_that_is_no_pair_makes_a_bad_response(headers: list[Any]):
    """A string of two characters has two items as well."""
    outcome = Success(b"", TIMING, 200, headers)

    assert response(outcome, "i1").status == 502


@pytest.mark.parametrize("status", [0, 99, 100, 101, 199, 600, -1, 2**40])
def test_a_status_that_is_none_makes_a_bad_response(status: int):
    """101 would switch protocols, 1xx is no answer at all."""
    assert response(success(status=status), "i1").status == 502


def test_too_many_headers_make_a_bad_response():
    many = [(f"x-{n}", "1") for n in range(RESPONSE_HEADERS_MAX + 1)]

    assert response(success(*many), "i1").status == 502
    assert response(success(*many[1:]), "i1").status == 200


def test_too_large_headers_make_a_bad_response():
    assert response(success(("x", "1" * RESPONSE_HEADER_BYTES_MAX)), "i1").status == 502


ANYTHING = st.one_of(st.text(max_size=20), st.binary(max_size=5), st.integers(), st.none())
PAIRS = st.lists(st.one_of(ANYTHING, st.lists(ANYTHING, max_size=3)), max_size=3)


@settings(deadline=None)
@given(PAIRS, st.integers(-(2**63), 2**64 - 1), st.binary(max_size=20))
def test_no_guest_can_make_a_response_that_is_not_one(headers: Any, status: int, body: bytes):
    """Whatever it sends: a header section without control characters, and a valid status."""
    answer = response(Success(body, TIMING, status, headers), "i1")

    assert 200 <= answer.status <= 599
    for name, value in answer.headers.items():
        assert not any((ord(c) < 32 and c != "\t") or ord(c) == 127 for c in name + value)


@pytest.mark.parametrize(
    ("kind", "status"),
    [("Raised", 502), ("TimedOut", 504), ("InitTimedOut", 504), ("OutOfMemory", 502),
     ("Crashed", 502), ("ImportFailed", 502), ("BadRequest", 400), ("anything", 502)],
)  # fmt: skip
def test_every_failure_has_a_status_and_keeps_its_secrets(kind: str, status: int):
    """The message and the traceback are for the function's owner: they are in its log."""
    outcome = Failure(kind, "the password is 1234", "Traceback: 1234", TIMING)
    answer = response(outcome, "i1")
    told = document(answer)

    assert (answer.status, told["status"], told["title"]) == (status, status, kind)
    assert "1234" not in json.dumps(told)
    assert answer.headers["Dayfly-Invocation"] == told["invocation"] == "i1"
    assert "Server-Timing" in answer.headers


# ---- problems -----------------------------------------------------------------------------------


def test_a_problem_is_rfc_9457():
    assert document(problem(418, "Teapot", "short and stout", spout=1)) == {
        "type": "about:blank",
        "title": "Teapot",
        "status": 418,
        "detail": "short and stout",
        "spout": 1,
    }


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (FunctionNotFound("no function 'x'"), 404, None),
        (NoCapacity("none in 30 s"), 503, "1"),
        (BodyTooLarge(), 413, None),
    ],
)
def test_a_platform_error_tells_what_and_what_to_do(
    error: PlatformError, status: int, retry_after: str | None
):
    """Its docstring is its message; a retry is named where one helps."""
    answer = platform_problem(error)
    told = document(answer)

    assert (answer.status, told["error"]) == (status, type(error).__name__)
    assert told["title"] == error.title()
    assert told["detail"].endswith(error.remedy())
    assert answer.headers.get("Retry-After") == retry_after
    assert told["retryable"] is (retry_after is not None)
