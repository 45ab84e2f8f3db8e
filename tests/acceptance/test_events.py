"""Invocations that are accepted now and run later, over HTTP."""

import base64
import threading
from typing import Any

import pytest
from tests.harness import Reply, Server, eventually, together

LATER = {"Prefer": "respond-async"}


def ask(server: Server, name: str, body: Any = b"", **headers: str) -> Reply:
    return server.call(name, body, headers=LATER | headers)


def outcome(server: Server, id_: str, wait_s: int = 30) -> Any:
    """The invocation as it is when it is over."""
    told = server.ask(
        "GET", f"/invocations/{id_}", headers={"Prefer": f"wait={wait_s}"}, plane="http"
    )
    assert told.status == 200, told.body
    return told.json()


def accepted(reply: Reply) -> str:
    assert reply.status == 202, reply.body
    return str(reply.json()["id"])


def test_an_accepted_invocation_says_where_its_result_will_be(anywhere: Server):
    name = anywhere.deploy("hello")
    reply = anywhere.call(name, path="?name=Ada", headers=LATER)
    told = reply.json()

    assert reply.status == 202
    assert reply.headers["Location"] == f"/invocations/{told['id']}"
    assert reply.headers["Preference-Applied"] == "respond-async"
    assert reply.headers["Dayfly-Invocation"] == told["id"]
    end = outcome(anywhere, told["id"])
    assert (end["state"], end["attempts"], end["failures"]) == ("succeeded", 1, [])
    assert (end["result"]["status"], end["result"]["body"]) == (200, "Hello, Ada!")
    assert end["function"] == f"default/{name}"
    assert end["acceptedAt"] <= end["finishedAt"] < end["expiresAt"]


def test_the_event_is_the_one_that_a_synchronous_call_gives(anywhere: Server):
    name = anywhere.deploy("echo")
    headers = {"X-Twice": "a", "Content-Type": "application/json"}
    more: dict[str, Any] = {"path": "/a/b?x=1", "method": "PUT"}
    now = anywhere.call(name, b'{"n": 1}', headers=headers, **more).json()["event"]
    reply = anywhere.call(name, b'{"n": 1}', headers=headers | LATER, **more)
    import json

    later = json.loads(outcome(anywhere, accepted(reply))["result"]["body"])["event"]

    for name_ in ("rawPath", "rawQueryString", "body", "isBase64Encoded", "routeKey"):
        assert later[name_] == now[name_]
    assert later["headers"]["x-twice"] == "a"


def test_a_body_that_is_no_text_comes_back_in_base64(anywhere: Server):
    code = "def handler(event, context):\n    return {'statusCode': 201, 'body': b'\\x00\\xff'}\n"
    name = anywhere.deploy("bytes", files={"main.py": code})
    result = outcome(anywhere, accepted(ask(anywhere, name)))["result"]

    assert (result["status"], result["isBase64Encoded"]) == (201, True)
    assert base64.b64decode(result["body"]) == b"\x00\xff"


def test_a_long_body_and_a_long_result_survive(anywhere: Server):
    code = "def handler(event, context):\n    return {'statusCode': 200, 'body': event['body']}\n"
    name = anywhere.deploy("mirror", files={"main.py": code})
    body = b"0123456789" * 100_000
    reply = ask(anywhere, name, body, **{"Content-Type": "text/plain; charset=utf-8"})

    assert outcome(anywhere, accepted(reply))["result"]["body"].encode() == body


def test_a_handler_that_raises_is_tried_as_often_as_declared(anywhere: Server):
    code = "def handler(event, context):\n    raise ValueError('no')\n"
    retry = {"attempts": 2, "backoffSeconds": 0.01}
    name = anywhere.deploy("raises", files={"main.py": code}, retry=retry)
    end = outcome(anywhere, accepted(ask(anywhere, name)))

    assert (end["state"], end["attempts"]) == ("dead", 2)
    assert [(f["kind"], f["message"], f["counted"]) for f in end["failures"]] == [
        ("Raised", "ValueError: no", True)
    ] * 2


def test_a_server_error_is_a_failure_too(anywhere: Server):
    code = "def handler(event, context):\n    return {'statusCode': 503, 'body': 'busy'}\n"
    name = anywhere.deploy("busy", files={"main.py": code}, retry={"attempts": 1})
    end = outcome(anywhere, accepted(ask(anywhere, name)))

    assert (end["state"], end["failures"][0]["kind"]) == ("dead", "ServerError")


def test_the_same_idempotency_key_is_the_same_invocation(anywhere: Server):
    name = anywhere.deploy("hello")
    key = {"Idempotency-Key": f"key-{anywhere.driver}"}
    first = ask(anywhere, name, b"{}", **key)
    again = ask(anywhere, name, b"{}", **key)
    other = ask(anywhere, name, b'{"name": "Bob"}', **key)

    assert accepted(first) == accepted(again)
    assert (first.headers["Idempotency-Replayed"], again.headers["Idempotency-Replayed"]) == (
        None,
        "true",
    )
    assert (other.status, other.json()["error"]) == (422, "KeyUsed")


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "ü".encode().decode("latin-1")])
def test_a_key_that_is_none_is_refused(anywhere: Server, key: str):
    name = anywhere.deploy("hello")

    assert ask(anywhere, name, b"{}", **{"Idempotency-Key": key}).status == 400


def test_what_is_not_there_cannot_be_accepted_or_asked_for(anywhere: Server):
    assert ask(anywhere, "nobody").status == 404
    for id_ in ("nothing", "../functions", "a" * 5000):
        told = anywhere.ask("GET", f"/invocations/{id_}", plane="http")
        assert (told.status, told.json()["error"]) == (404, "InvocationNotFound")
    posted = anywhere.ask("POST", "/invocations/nothing", b"", plane="http")
    assert (posted.status, posted.headers["Allow"]) == (405, "GET, HEAD")


def test_who_asks_before_it_is_over_is_told_how_far_it_is(anywhere: Server):
    name = anywhere.deploy("wait", timeoutSeconds=30)
    id_ = accepted(ask(anywhere, name, b""))
    told = outcome(anywhere, id_, wait_s=0)
    assert told["state"] in ("waiting", "running")
    assert "result" not in told

    assert outcome(anywhere, id_)["state"] in ("succeeded", "dead")


def test_a_burst_on_one_place_loses_nothing_and_costs_no_attempts(anywhere: Server):
    """The queue of the function itself is shorter than the burst."""
    name = anywhere.deploy("instance", maxScale=1, queueMax=5, retry={"attempts": 1})
    ids = together(100, lambda _: accepted(ask(anywhere, name)))
    ended = [outcome(anywhere, id_) for id_ in ids]

    assert len(set(ids)) == 100
    assert {(end["state"], end["attempts"]) for end in ended} == {("succeeded", 1)}


def test_what_was_accepted_survives_a_restart(new_server):
    """Waiting, or under way: whatever the server did when it was told to end."""
    server: Server = new_server()
    name = server.deploy("hello", maxScale=1)
    ids = together(30, lambda _: accepted(ask(server, name, b"{}")))
    server.stop()
    server.start()

    assert {outcome(server, id_)["state"] for id_ in ids} == {"succeeded"}


def test_a_function_that_is_deleted_lets_its_events_die_and_they_can_be_seen(anywhere: Server):
    code = "import time\ndef handler(event, context):\n    time.sleep(0.2)\n"
    name = anywhere.deploy("doomed", files={"main.py": code}, maxScale=1)
    ids = together(5, lambda _: accepted(ask(anywhere, name)))
    anywhere.delete(name)
    ended = [outcome(anywhere, id_) for id_ in ids]

    assert {end["state"] for end in ended} <= {"dead", "succeeded"}
    dead = [end for end in ended if end["state"] == "dead"]
    assert dead
    assert {end["failures"][-1]["kind"] for end in dead} == {"FunctionNotFound"}


def test_who_waits_is_told_as_soon_as_it_is_over(anywhere: Server):
    release = threading.Event()
    name = anywhere.deploy("hello", "prompt")
    id_ = accepted(ask(anywhere, name, b"{}"))
    told: list[Any] = []

    def wait() -> None:
        told.append(outcome(anywhere, id_, wait_s=60))
        release.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert eventually(release.is_set, within_s=20)
    thread.join()
    assert told[0]["state"] == "succeeded"
