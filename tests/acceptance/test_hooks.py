"""What is sent to us, and what we tell others: webhooks, CloudEvents, destinations outside."""

import base64
import hashlib
import hmac
import json
import subprocess
import threading
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from standardwebhooks.webhooks import Webhook
from tests.brokers.nats import Nats
from tests.harness import DAYFLY, Reply, Server, eventually

FILES = {
    "main.py": (
        "import json\n"
        "def handler(event, context):\n"
        "    print(json.dumps(event))\n"
        "    if 'fail' in str(event): raise ValueError('as asked')\n"
        "    return {'seen': event.get('id')}\n"
    )
}
KEY = "whsec_" + base64.b64encode(b"a secret of thirty-two bytes....").decode()
JSON = "application/cloudevents+json"


class Listener:
    """Somebody who is told: an HTTP server. *statuses* are its next answers, then 204."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.told: list[tuple[dict[str, str], bytes]] = []
        listener = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                listener.told.append(({k.lower(): v for k, v in self.headers.items()}, body))
                self.send_response(listener.statuses.pop(0) if listener.statuses else 204)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/told?x=1"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.close()


def put(server: Server, path: str, value: Any) -> Reply:
    reply = server.ask("PUT", f"/namespaces/default/{path}", value)
    assert reply.status in (200, 204), reply.body
    return reply


def send(
    server: Server, path: str, body: bytes, headers: Mapping[str, str], method: str = "POST"
) -> Reply:
    return server.ask(method, path, body, headers=headers, plane="http")


def told(server: Server, function: str) -> list[Any]:
    lines = [line["text"] for line in server.logs(function) if line["stream"] == "stdout"]
    return [json.loads(line) for line in lines]


def event(id_: str = "1", type_: str = "order", **more: Any) -> bytes:
    return json.dumps(
        {"specversion": "1.0", "id": id_, "source": "/shop", "type": type_} | more
    ).encode()


def over(server: Server, id_: str) -> Any:
    headers = {"Prefer": "wait=20"}
    return server.ask("GET", f"/invocations/{id_}", headers=headers, plane="http").json()


# ---- CloudEvents --------------------------------------------------------------------------------


def test_an_event_reaches_every_function_whose_filter_means_it(server: Server):
    for name, text in (
        ("all", ""),
        ("orders", 'event.type == "order"'),
        ("big", "event.data.n > 9"),
    ):
        server.deploy("", f"on-{name}", files=FILES)
        put(server, f"triggers/on-{name}", {"function": f"on-{name}", "events": {}, "filter": text})
    try:
        reply = send(server, "/events", event(data={"n": 1}), {"Content-Type": JSON})
        assert reply.status == 202
        assert reply.headers["X-Request-Id"]
        ids = reply.json()["accepted"]
        assert len(ids) == 2
        assert {over(server, id_)["state"] for id_ in ids} == {"succeeded"}
        assert [e["data"] for e in told(server, "on-all")] == [{"n": 1}]
        assert [e["type"] for e in told(server, "on-orders")] == ["order"]
        assert told(server, "on-big") == []

        again = send(server, "/events", event(data={"n": 1}), {"Content-Type": JSON})
        assert (again.status, again.json()["accepted"]) == (202, ids)
        binary = {"ce-specversion": "1.0", "ce-id": "1", "ce-source": "/shop", "ce-type": "order"}
        same = send(server, "/events", b'{"n": 1}', binary | {"Content-Type": "application/json"})
        assert same.json()["accepted"] == ids
        views = {v["metadata"]["name"]: v["status"] for v in server.ask("GET", "/triggers").json()}
        counted = [views["on-orders"][name] for name in ("fetched", "known", "filtered")]
        assert counted == [3, 2, 0]
        assert views["on-big"]["filtered"] == 3
        metrics = server.ask("GET", "/metrics").body.decode()
        assert 'dayfly_trigger_filtered_total{trigger="default/on-big"} 3.0' in metrics
    finally:
        for name in ("all", "orders", "big"):
            server.ask("DELETE", f"/namespaces/default/triggers/on-{name}")


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/events", b"", 405),
        ("POST", "/events", b"{}", 400),
        ("POST", "/events", b"\xff", 400),
        ("POST", "/events", event(id_=""), 400),
        ("POST", "/events", b'{"specversion": "1.0", "id": "\\ud800"', 400),
        ("POST", "/hooks/default/nobody", b"", 404),
        ("POST", "/hooks/", b"", 404),
        ("POST", "/hooks/a/b/c/../d", b"", 404),
        ("POST", "/ns/../events", event(), 202),
    ],
)
def test_what_is_no_event_or_for_nobody_is_refused(
    server: Server, method: str, path: str, body: bytes, status: int
):
    reply = send(server, path, body, {"Content-Type": JSON}, method)
    assert reply.status == status
    if status == 202:
        assert reply.json() == {"accepted": []}
    else:
        assert reply.json()["status"] == status


def test_an_event_with_half_a_character_is_refused(server: Server):
    server.deploy("", "on-odd", files=FILES)
    put(server, "triggers/on-odd", {"function": "on-odd", "events": {}})
    body = event(data="x").replace(b'"x"', b'"\\ud800"')
    assert send(server, "/events", body, {"Content-Type": JSON}).status == 400
    server.ask("DELETE", "/namespaces/default/triggers/on-odd")


# ---- webhooks -----------------------------------------------------------------------------------


def signed(body: bytes, key: str = KEY, at: datetime | None = None) -> dict[str, str]:
    at = at or datetime.now(UTC)
    signature = Webhook(key).sign("msg-1", at, body.decode())
    return {
        "webhook-id": "msg-1",
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": signature,
    }


@pytest.fixture
def hook(server: Server) -> str:
    server.deploy("", "on-hook", files=FILES)
    assert server.ask("PUT", "/namespaces/default/secrets/hook", KEY.encode()).status == 204
    put(server, "triggers/hook", {"function": "on-hook", "webhook": {"secret": "hook"}})
    return "/hooks/default/hook"


def test_a_signed_webhook_is_accepted_once(server: Server, hook: str):
    body = b'{"type": "invoice.paid", "data": {"n": 7}}'
    reply = send(server, hook, body, signed(body) | {"traceparent": "00-1-2-01"})
    assert reply.status == 202
    (id_,) = reply.json()["accepted"]
    assert over(server, id_)["state"] == "succeeded"
    (seen,) = told(server, "on-hook")
    assert (seen["id"], seen["type"], seen["source"]) == (
        "msg-1",
        "invoice.paid",
        "/triggers/default/hook",
    )
    assert (seen["data"], seen["traceparent"]) == (json.loads(body), "00-1-2-01")
    assert send(server, hook, body, signed(body)).json()["accepted"] == [id_]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        signed(b"{}", "whsec_" + base64.b64encode(b"another").decode()),
        signed(b"{} "),
        signed(b"{}", at=datetime(2020, 1, 1, tzinfo=UTC)),
        {"webhook-id": "1", "webhook-timestamp": "soon", "webhook-signature": "v1,x"},
        {"webhook-id": "1", "webhook-timestamp": "nan", "webhook-signature": "v1"},
        signed(b"{}") | {"webhook-signature": "nothing"},
    ],
)
def test_a_webhook_that_is_not_signed_is_refused(
    server: Server, hook: str, headers: dict[str, str]
):
    reply = send(server, hook, b"{}", headers)
    assert reply.status == 401
    assert "a secret of" not in reply.body.decode()


def test_a_webhook_of_githubs_is_checked_as_github_signs_it(server: Server):
    """With the example of its documentation."""
    server.deploy("", "on-github", files=FILES)
    server.ask("PUT", "/namespaces/default/secrets/github", b"It's a Secret to Everybody\n")
    webhook = {"secret": "github", "scheme": "github"}
    put(server, "triggers/github", {"function": "on-github", "webhook": webhook})
    right = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    headers = {"X-GitHub-Delivery": "72d3162e", "X-GitHub-Event": "push"}
    path = "/hooks/default/github"

    reply = send(server, path, b"Hello, World!", headers | {"X-Hub-Signature-256": right})
    assert reply.status == 202
    assert over(server, reply.json()["accepted"][0])["state"] == "succeeded"
    (seen,) = told(server, "on-github")
    assert (seen["type"], seen["id"], seen["data"]) == (
        "com.github.push",
        "72d3162e",
        "Hello, World!",
    )
    for wrong in ({}, {"X-Hub-Signature-256": right[:-1] + "0"}, {"X-Hub-Signature-256": "é"}):
        assert send(server, path, b"Hello, World!", headers | wrong).status == 401
    put(
        server,
        "triggers/github",
        {"function": "on-github", "webhook": webhook, "paused": True},
    )
    reply = send(server, path, b"Hello, World!", headers | {"X-Hub-Signature-256": right})
    assert (reply.status, reply.headers["Retry-After"]) == (503, "60")


# ---- destinations outside -----------------------------------------------------------------------


def test_a_url_is_told_what_became_of_an_event_signed_and_again_until_it_knows(
    server: Server, listener: Listener
):
    server.ask("PUT", "/namespaces/default/secrets/told", KEY.encode())
    where = {"url": listener.url, "secret": "told"}
    server.deploy("", "tells", files=FILES, onSuccess=where)
    listener.statuses = [500, 302]
    reply = server.ask(
        "POST",
        "/namespaces/default/functions/tells/invocations",
        b'{"id": "7"}',
        headers={"Prefer": "respond-async"},
    )
    assert over(server, reply.json()["id"])["state"] == "succeeded"
    eventually(lambda: len(listener.told) == 3)

    headers, body = listener.told[-1]
    Webhook(KEY).verify(body, headers)
    assert [sent for _, sent in listener.told] == [body] * 3
    assert len({sent["webhook-id"] for sent, _ in listener.told}) == 1
    word = json.loads(body)
    assert (word["type"], word["subject"]) == ("dev.dayfly.event.succeeded", reply.json()["id"])
    assert headers["content-type"] == JSON
    assert word["data"]["requestPayload"] == {"id": "7"}
    assert word["data"]["responsePayload"] == {"seen": "7"}
    eventually(lambda: over(server, headers["webhook-id"])["state"] == "succeeded")
    shown = server.ask("GET", "/events?function=default/tells@success").json()
    assert [each["id"] for each in shown] == [headers["webhook-id"]]


def test_who_cannot_be_told_is_told_later_and_the_function_does_not_mind(
    server: Server, listener: Listener
):
    """A sink that is down holds nothing up but its own words."""
    url = listener.url
    listener.close()
    retry = {"attempts": 1}
    server.deploy("", "mourns", files=FILES, onFailure={"url": url}, retry=retry)
    reply = server.ask(
        "POST",
        "/namespaces/default/functions/mourns/invocations",
        b'{"id": "fail"}',
        headers={"Prefer": "respond-async"},
    )
    assert over(server, reply.json()["id"])["state"] == "dead"
    path = "/events?function=default/mourns@failure"
    eventually(lambda: server.ask("GET", path).json()[0]["attempts"] > 0)
    (word,) = server.ask("GET", path).json()
    failure = server.ask("GET", f"/events/{word['id']}").json()["failures"][0]

    assert word["state"] in ("waiting", "running")
    assert failure["kind"] == "NotTold"
    server.ask("POST", f"/events/{word['id']}/cancel")


def test_a_circle_through_the_outside_ends(server: Server):
    """A function tells /events, and what is sent there runs it again."""
    where = {"url": f"http://{server.http}/events"}
    server.deploy("", "circles", files=FILES, onSuccess=where)
    spec = {
        "function": "circles",
        "events": {},
        "filter": 'event.source == "/functions/default/circles"',
    }
    put(server, "triggers/circles", spec)
    path = "/namespaces/default/functions/circles/invocations"
    server.ask("POST", path, b"{}", headers={"Prefer": "respond-async"})
    dead = "/events?function=default/circles@success&state=dead"
    assert eventually(lambda: len(server.ask("GET", dead).json()) == 1)
    (end,) = server.ask("GET", dead).json()
    failure = server.ask("GET", f"/events/{end['id']}").json()["failures"][0]
    server.ask("DELETE", "/namespaces/default/triggers/circles")

    assert failure["kind"] == "TooManyHops"
    assert len(told(server, "circles")) == 9


async def test_a_topic_is_told_too(server: Server):
    with Nats() as broker:
        place = await broker.place("told")
        topic = {"nats": {"url": place.topic_spec.url, "subject": "told"}}
        server.deploy("", "publishes", files=FILES, onSuccess=topic)
        reply = server.ask(
            "POST",
            "/namespaces/default/functions/publishes/invocations",
            b'{"id": "7"}',
            headers={"Prefer": "respond-async"},
        )
        source = place.source()
        await source.open()
        (delivery,) = await source.fetch(1, 20.0)
        await source.ack(delivery)
        await source.close()
    word = json.loads(delivery.body)
    assert (word["type"], word["subject"]) == ("dev.dayfly.event.succeeded", reply.json()["id"])
    assert delivery.headers["content-type"] == JSON


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ({}, "one destination is needed"),
        ({"function": "x", "url": "http://x"}, "one destination is needed"),
        ({"url": "ftp://x"}, "https://HOST:PORT"),
        ({"url": "http://me:pw@x"}, "dayfly secret put"),
        ({"function": "x", "secret": "y"}, "secret is for url"),
    ],
)
def test_a_wrong_destination_is_refused_with_the_reason(server: Server, where: Any, why: str):
    server.deploy("", "tells-wrong", files=FILES)
    spec = server.ask("GET", "/namespaces/default/functions/tells-wrong").json()["spec"]
    path = "/namespaces/default/functions/tells-wrong"
    reply = server.ask("PUT", path, spec | {"onSuccess": where})
    assert reply.status == 400
    assert why in reply.json()["detail"]


# ---- secrets ------------------------------------------------------------------------------------


def test_a_secret_can_be_kept_and_deleted_and_never_read(server: Server):
    path = "/namespaces/default/secrets/mine"
    assert server.ask("PUT", path, b"hunter2\n").status == 204
    assert {"namespace": "default", "name": "mine"} in server.ask("GET", "/secrets").json()
    assert server.ask("GET", path).status == 405
    file = server.data / "secrets" / "default" / "mine"
    assert (file.read_bytes(), file.stat().st_mode & 0o777) == (b"hunter2", 0o600)
    assert server.ask("DELETE", path).status == 204
    assert server.ask("DELETE", path).status == 404
    assert not any("hunter2" in line for line in server.log)


def test_secrets_on_the_command_line_come_from_standard_input(server: Server):
    def dayfly(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
        command = [str(DAYFLY), "secret", *arguments, "--url", f"http://{server.admin}"]
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=30)

    assert dayfly("put", "typed", text="user:hunter3\n").stdout == "secret typed is kept\n"
    assert (server.data / "secrets" / "default" / "typed").read_text() == "user:hunter3"
    listed = dayfly("list")
    assert "typed" in listed.stdout
    assert "hunter3" not in listed.stdout
    assert dayfly("delete", "typed").returncode == 0
    assert "no secret" in dayfly("delete", "typed").stderr.lower()


@pytest.mark.parametrize(
    ("name", "text"), [("Bad", b"x"), ("empty", b"\n"), ("long", b"x" * 70_000), ("odd", b"\xff")]
)
def test_what_is_no_secret_is_refused(server: Server, name: str, text: bytes):
    reply = server.ask("PUT", f"/namespaces/default/secrets/{name}", text)
    assert reply.status in (400, 413)


def test_the_example_of_githubs_documentation_is_what_hmac_says():
    key, body = b"It's a Secret to Everybody", b"Hello, World!"
    digest = hmac.new(key, body, hashlib.sha256).hexdigest()
    assert digest == "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
