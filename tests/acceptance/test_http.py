"""A function over HTTP: what it is given, and what becomes of what it returns."""

import base64
import json

import pytest
from tests.harness import Server, together


def test_a_function_answers_get_and_post(anywhere: Server):
    """The first request is answered by a sandbox that was not this function before."""
    name = anywhere.deploy("hello")

    assert anywhere.call(name).body == b"Hello, world!"
    assert anywhere.call(name, path="?name=Ada").body == b"Hello, Ada!"
    assert anywhere.call(name, b"{}").status == 200


def test_the_event_has_the_shape_of_payload_2(anywhere: Server):
    """Method, path, query, cookies and headers arrive as API Gateway would give them."""
    name = anywhere.deploy("echo")
    headers = {
        "X-Twice": "a",
        "Cookie": "one=1; two=2",
        "User-Agent": "tester",
        "Host": "shop.test",
    }

    event = anywhere.call(
        name, b'{"n": 1}', path="/a%20b/c?x=1&x=2&y=", method="PATCH", headers=headers
    ).json()["event"]
    http = event["requestContext"]["http"]

    assert event["version"] == "2.0"
    assert event["routeKey"] == event["requestContext"]["routeKey"] == "$default"
    assert event["rawPath"] == http["path"] == "/a%20b/c"
    assert event["rawQueryString"] == "x=1&x=2&y="
    assert event["queryStringParameters"] == {"x": "1,2", "y": ""}
    assert event["cookies"] == ["one=1", "two=2"]
    assert event["headers"]["x-twice"] == "a"
    assert "cookie" not in event["headers"]
    assert http["method"] == "PATCH"
    assert http["sourceIp"] == "127.0.0.1"
    assert http["userAgent"] == "tester"
    assert event["requestContext"]["domainName"] == "shop.test"


def test_text_bodies_arrive_as_text_and_others_in_base64(anywhere: Server):
    """`isBase64Encoded` says which, by the request's content type."""
    name = anywhere.deploy("echo")

    def body(content: bytes, kind: str) -> tuple[str, bool]:
        event = anywhere.call(name, content, headers={"Content-Type": kind}).json()["event"]
        return event["body"], event["isBase64Encoded"]

    assert body(b'{"a": 1}', "application/json") == ('{"a": 1}', False)
    assert body("ü".encode(), "text/plain; charset=utf-8") == ("ü", False)
    assert body(b"\x00\xff", "application/octet-stream") == ("AP8=", True)
    assert body(b"\xff\xfe", "text/plain") == (base64.b64encode(b"\xff\xfe").decode(), True)


def test_a_compressed_body_arrives_as_it_was_sent(anywhere: Server):
    """The gateway never unpacks: a bomb stays small, and the content-encoding header stays true."""
    name = anywhere.deploy("echo")
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    import gzip

    packed = gzip.compress(b"{}", mtime=0)
    event = anywhere.call(name, packed, headers=headers).json()["event"]

    assert event["headers"]["content-encoding"] == "gzip"
    assert base64.b64decode(event["body"]) == packed


def test_forwarding_headers_of_strangers_are_not_passed_on(anywhere: Server):
    """Only a trusted proxy may say who the client is; internal headers come from nobody."""
    name = anywhere.deploy("echo")
    forged = {"X-Forwarded-For": "1.2.3.4", "Forwarded": "for=1.2.3.4", "X-Real-Ip": "1.2.3.4"}
    forged |= {"Dayfly-Function": "other", "X_Forwarded_For": "1.2.3.4"}

    event = anywhere.call(name, headers=forged).json()["event"]

    assert not {h for h in event["headers"] if "forward" in h or "real" in h or "dayfly" in h}
    assert event["requestContext"]["http"]["sourceIp"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("kind", "status", "content_type", "body"),
    [
        ("json", 200, "application/json", '{"a":[1,"ü",null]}'.encode()),
        ("str", 200, "text/plain; charset=utf-8", "plain ü".encode()),
        ("bytes", 200, "application/octet-stream", b"\x00\xff"),
        ("none", 200, "application/json", b"null"),
        ("list", 200, "application/json", b"[1,2]"),
        ("status", 201, "text/plain; charset=utf-8", b"made"),
        ("status text", 418, "text/plain; charset=utf-8", b"teapot"),
        ("headers", 200, "text/csv", b"a,b"),
        ("cookies", 200, "text/plain; charset=utf-8", b""),
        ("binary", 200, "image/png", b"\x89PNG\r\n\x1a\n"),
        ("object body", 200, "application/json", b'{"x":1}'),
        ("no body", 200, None, b""),
        ("no content", 204, "text/plain; charset=utf-8", b""),
        ("1 MiB", 200, "text/plain; charset=utf-8", b"x" * (1 << 20)),
    ],
)
def test_what_a_handler_returns_becomes_the_response(
    anywhere: Server, kind: str, status: int, content_type: str | None, body: bytes
):
    """A dict with statusCode is a whole response; any other value is the body of a 200."""
    name = anywhere.deploy("respond")

    reply = anywhere.call(name, kind)

    assert (reply.status, reply.headers["Content-Type"], reply.body) == (status, content_type, body)


def test_headers_and_cookies_of_the_response_are_passed_on(anywhere: Server):
    """Also several of the same name."""
    name = anywhere.deploy("respond")

    reply = anywhere.call(name, "headers")

    assert (reply.headers["X-One"], reply.headers["X-Number"]) == ("1", "7")
    assert reply.headers.get_all("X-Many") == ["a", "b"]
    assert anywhere.call(name, "cookies").headers.get_all("Set-Cookie") == ["a=1; HttpOnly", "b=2"]


def test_a_function_cannot_forge_our_headers_nor_those_of_the_connection(anywhere: Server):
    """Hop-by-hop and internal response headers are ours alone."""
    name = anywhere.deploy("respond")

    reply = anywhere.call(name, "internal headers")

    assert reply.body == b"whole"
    assert reply.headers.get_all("Server") == ["Dayfly"]
    assert reply.headers.get_all("Dayfly-Start") in (["generic"], ["warm"], ["created"])
    assert reply.headers.get_all("Content-Length") == ["5"]
    assert "Transfer-Encoding" not in reply.headers


def test_a_direct_invoke_gives_and_takes_json(anywhere: Server):
    """The event is the JSON that was sent, the response the JSON of what was returned."""
    name = anywhere.deploy("echo")

    reply = anywhere.invoke(name, {"deep": [1, {"ü": None}]})

    assert reply.headers["Content-Type"] == "application/json"
    assert reply.json()["event"] == {"deep": [1, {"ü": None}]}
    assert anywhere.invoke(anywhere.deploy("respond"), "bytes").status == 502
    assert (
        anywhere.ask(
            "POST", f"/namespaces/default/functions/{name}/invocations", b"{not json"
        ).status
        == 400
    )


def test_the_context_tells_of_this_invocation(anywhere: Server):
    """Lambda's names; the request id is the one in the response's header."""
    name = anywhere.deploy("echo", timeoutSeconds=9, limits={"memoryMb": 64})

    reply = anywhere.call(name)
    context = reply.json()["context"]

    assert context["aws_request_id"] == reply.headers["Dayfly-Invocation"]
    assert context["function_name"] == name
    assert context["namespace"] == "default"
    assert context["memory_limit_in_mb"] == 64
    assert 0 < context["remaining"] <= 9000
    assert name in context["repr"]


def test_ten_invocations_of_an_async_handler_overlap_in_one_sandbox(anywhere: Server):
    """Each waits for the nine others: had they not run at once, none would have ended."""
    name = anywhere.deploy("overlap", concurrency=10, maxScale=1)

    replies = together(10, lambda _: anywhere.call(name))

    assert sorted(reply.json()["place"] for reply in replies) == list(range(10))
    for reply in replies:
        assert reply.json()["id"] == reply.headers["Dayfly-Invocation"]


def test_the_start_kind_is_told_and_so_is_where_the_time_went(anywhere: Server):
    """First a cold start on a generic sandbox (or a created one), then a warm one."""
    name = anywhere.deploy("hello", "starts")

    first, second = anywhere.call(name), anywhere.call(name)

    assert first.headers["Dayfly-Start"] in ("generic", "created")
    assert "specialize;dur=" in first.headers["Server-Timing"]
    assert second.headers["Dayfly-Start"] == "warm"
    assert "specialize" not in second.headers["Server-Timing"]
    assert "handler;dur=" in second.headers["Server-Timing"]


def test_a_request_id_is_kept_or_made(anywhere: Server):
    """A valid one comes back, an invalid one is replaced; errors carry one too."""
    name = anywhere.deploy("hello")

    def id_of(given: str, path: str = "") -> str:
        return str(
            anywhere.call(name, path=path, headers={"X-Request-Id": given}).headers["X-Request-Id"]
        )

    assert id_of("mine-1") == "mine-1"
    assert len(id_of("with space")) == 32
    assert len(id_of("x" * 129)) == 32
    assert anywhere.ask("GET", "/nowhere", plane="http").headers["X-Request-Id"]


def test_an_unknown_function_is_a_problem_document(anywhere: Server):
    """RFC 9457, with a remedy, and without a word about the server's inside."""
    for path in ("/fn/nobody", "/fn/", "/", "/ns/else/fn/nobody", "/fn/No%20Body"):
        reply = anywhere.ask("GET", path, plane="http")

        assert reply.status == 404
        assert reply.headers["Content-Type"] == "application/problem+json"
        assert reply.json()["status"] == 404
        assert "/work" not in json.dumps(reply.json())


def test_environment_variables_are_delivered_and_not_shown(anywhere: Server):
    """The function has them, the API shows their names only."""
    name = anywhere.deploy("echo", "secretive", env={"PASSWORD": "hunter2", "EMPTY": ""})

    env = anywhere.call(name).json()["env"]

    assert (env["PASSWORD"], env["EMPTY"]) == ("hunter2", "")
    assert anywhere.describe(name)["spec"]["env"] == {"PASSWORD": "***", "EMPTY": "***"}
    assert b"hunter2" not in anywhere.ask("GET", "/functions").body


def test_the_users_own_modules_win_over_ours(anywhere: Server):
    """pool.py, runtime.py, protocol.py, msgpack.py and a package called dayfly are the user's."""
    name = anywhere.deploy("own_names")

    assert anywhere.invoke(name).json() == ["mine"] * 5
