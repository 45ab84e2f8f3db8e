"""Invocations that are accepted now and run later, over HTTP."""

import base64
import json
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.harness import DAYFLY, Reply, Server, eventually, together

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
    name = anywhere.deploy("hello", "later-hello")
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
    name = anywhere.deploy("echo", "later-echo")
    headers = {"X-Twice": "a", "Content-Type": "application/json"}
    more: dict[str, Any] = {"path": "/a/b?x=1", "method": "PUT"}
    now = anywhere.call(name, b'{"n": 1}', headers=headers, **more).json()["event"]
    reply = anywhere.call(name, b'{"n": 1}', headers=headers | LATER, **more)
    later = json.loads(outcome(anywhere, accepted(reply))["result"]["body"])["event"]

    for name_ in ("rawPath", "rawQueryString", "body", "isBase64Encoded", "routeKey"):
        assert later[name_] == now[name_]
    assert later["headers"]["x-twice"] == "a"


def test_a_body_that_is_no_text_comes_back_in_base64(anywhere: Server):
    code = "def handler(event, context):\n    return {'statusCode': 201, 'body': b'\\x00\\xff'}\n"
    name = anywhere.deploy("later-bytes", files={"main.py": code})
    result = outcome(anywhere, accepted(ask(anywhere, name)))["result"]

    assert (result["status"], result["isBase64Encoded"]) == (201, True)
    assert base64.b64decode(result["body"]) == b"\x00\xff"


def test_a_long_body_and_a_long_result_survive(anywhere: Server):
    code = "def handler(event, context):\n    return {'statusCode': 200, 'body': event['body']}\n"
    name = anywhere.deploy("later-mirror", files={"main.py": code})
    body = b"0123456789" * 100_000
    reply = ask(anywhere, name, body, **{"Content-Type": "text/plain; charset=utf-8"})

    assert outcome(anywhere, accepted(reply))["result"]["body"].encode() == body


def test_a_handler_that_raises_is_tried_as_often_as_declared(anywhere: Server):
    code = "def handler(event, context):\n    raise ValueError('no')\n"
    retry = {"attempts": 2, "backoffSeconds": 0.01}
    name = anywhere.deploy("later-raises", files={"main.py": code}, retry=retry)
    end = outcome(anywhere, accepted(ask(anywhere, name)))

    assert (end["state"], end["attempts"]) == ("dead", 2)
    assert [(f["kind"], f["message"], f["counted"]) for f in end["failures"]] == [
        ("Raised", "ValueError: no", True)
    ] * 2


def test_a_server_error_is_a_failure_too(anywhere: Server):
    code = "def handler(event, context):\n    return {'statusCode': 503, 'body': 'busy'}\n"
    name = anywhere.deploy("later-busy", files={"main.py": code}, retry={"attempts": 1})
    end = outcome(anywhere, accepted(ask(anywhere, name)))

    assert (end["state"], end["failures"][0]["kind"]) == ("dead", "ServerError")


def test_the_same_idempotency_key_is_the_same_invocation(anywhere: Server):
    name = anywhere.deploy("hello", "later-hello")
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
    name = anywhere.deploy("hello", "later-hello")

    assert ask(anywhere, name, b"{}", **{"Idempotency-Key": key}).status == 400


def test_a_trace_that_is_no_text_is_left_out_and_the_invocation_is_run(anywhere: Server):
    name = anywhere.deploy("hello", "later-hello")
    reply = ask(anywhere, name, b"{}", traceparent="00-\xff")

    assert outcome(anywhere, accepted(reply))["state"] == "succeeded"


def test_what_is_not_there_cannot_be_accepted_or_asked_for(anywhere: Server):
    assert ask(anywhere, "nobody").status == 404
    for id_ in ("nothing", "../functions", "a" * 5000):
        told = anywhere.ask("GET", f"/invocations/{id_}", plane="http")
        assert (told.status, told.json()["error"]) == (404, "InvocationNotFound")
    posted = anywhere.ask("POST", "/invocations/nothing", b"", plane="http")
    assert (posted.status, posted.headers["Allow"]) == (405, "GET, HEAD")


def test_who_asks_for_a_result_gets_its_request_id_back(anywhere: Server):
    """As with every answer."""
    name = anywhere.deploy("hello", "later-hello")
    mine = {"X-Request-Id": "mine-1"}
    id_ = accepted(ask(anywhere, name, **mine))
    outcome(anywhere, id_)
    for path in (f"/invocations/{id_}", "/invocations/nothing"):
        told = anywhere.ask("GET", path, headers=mine, plane="http")
        assert told.headers["X-Request-Id"] == "mine-1"


def test_who_asks_before_it_is_over_is_told_how_far_it_is(anywhere: Server):
    name = anywhere.deploy("wait", "later-wait", timeoutSeconds=30)
    id_ = accepted(ask(anywhere, name, b""))
    told = outcome(anywhere, id_, wait_s=0)
    assert told["state"] in ("waiting", "running")
    assert "result" not in told

    assert outcome(anywhere, id_)["state"] in ("succeeded", "dead")


def test_a_burst_on_one_place_loses_nothing_and_costs_no_attempts(anywhere: Server):
    """The queue of the function itself is shorter than the burst."""
    name = anywhere.deploy(
        "instance", "later-instance", maxScale=1, queueMax=5, retry={"attempts": 1}
    )
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
    name = anywhere.deploy("later-doomed", files={"main.py": code}, maxScale=1)
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


# ---- destinations -------------------------------------------------------------------------------

LISTENS = "def handler(event, context):\n    return event\n"


def heard(server: Server, name: str) -> Any:
    """What the destination was told last."""
    function = f"default/{name}"

    def last() -> Any:
        found = server.ask("GET", f"/events?function={function}&state=succeeded&limit=1").json()
        return found[0] if found else None

    event = eventually(last)
    return json.loads(outcome(server, event["id"])["result"]["body"])


def test_a_destination_is_told_what_succeeded(anywhere: Server):
    """In the words of Lambda's destinations, so that code for these works."""
    listener = anywhere.deploy("listener", files={"main.py": LISTENS})
    code = "def handler(event, context):\n    return {'sum': sum(event)}\n"
    name = anywhere.deploy("adds", files={"main.py": code}, onSuccess={"function": listener})
    path = f"/namespaces/default/functions/{name}/invocations"
    id_ = accepted(anywhere.ask("POST", path, b"[1, 2, 3]", headers=LATER))

    told = heard(anywhere, listener)
    assert told["requestContext"] | {"functionVersion": ""} == {
        "requestId": id_,
        "function": f"default/{name}",
        "functionVersion": "",
        "condition": "Success",
        "approximateInvokeCount": 1,
    }
    assert (told["requestPayload"], told["responsePayload"]) == ([1, 2, 3], {"sum": 6})
    anywhere.delete(name)
    anywhere.delete(listener)


def test_a_destination_is_told_what_died_and_why(anywhere: Server):
    listener = anywhere.deploy("mourner", files={"main.py": LISTENS})
    code = "def handler(event, context):\n    raise ValueError('no')\n"
    more = {"retry": {"attempts": 2, "backoffSeconds": 0.01}, "onFailure": {"function": listener}}
    name = anywhere.deploy("mourned", files={"main.py": code}, **more)
    accepted(ask(anywhere, name, b"\x00\xff"))

    told = heard(anywhere, listener)
    assert told["requestContext"]["condition"] == "RetriesExhausted"
    assert told["requestContext"]["approximateInvokeCount"] == 2
    assert told["responsePayload"] == {"errorType": "Raised", "errorMessage": "ValueError: no"}
    assert told["requestPayload"] == {"body": "AP8=", "isBase64Encoded": True}
    anywhere.delete(name)
    anywhere.delete(listener)


def test_destinations_in_a_circle_come_to_an_end(server: Server):
    """Each is told of the other's success; the ninth hop is dead, and says why."""
    for name, other in (("ping", "pong"), ("pong", "ping")):
        there = {"onSuccess": {"function": other}}
        server.deploy(name, files={"main.py": LISTENS}, **there)
    accepted(ask(server, "ping", b"{}"))

    def dead() -> Any:
        return server.ask("GET", "/events?function=default/pong&state=dead").json()

    (found,) = eventually(dead)
    shown = outcome(server, found["id"])
    assert [failure["kind"] for failure in shown["failures"]] == ["TooManyHops"]
    for name in ("ping", "pong"):
        server.delete(name)


# ---- for operators ------------------------------------------------------------------------------


def dayfly(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(DAYFLY), *arguments, "--url", f"http://{server.admin}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def said(server: Server, *arguments: str) -> Any:
    """What the command answers a script."""
    done = dayfly(server, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


FRAGILE = """
import os
def handler(event, context):
    if not event.get("well"):
        raise ValueError("not well")
    return {"well": True}
"""


def test_a_dead_event_is_found_shown_mended_and_redriven(server: Server):
    """An operator's story: the payload is there, and so is the reason; one command mends it."""
    retry = {"attempts": 2, "backoffSeconds": 0.01}
    name = server.deploy("later-fragile", files={"main.py": FRAGILE}, retry=retry)
    id_ = dayfly(server, "invoke", name, "-d", '{"order": 7}', "--later").stdout.strip()
    assert outcome(server, id_)["state"] == "dead"

    (listed,) = said(server, "events", "list", name, "--state", "dead")
    assert (listed["id"], listed["attempts"], listed["function"]) == (id_, 2, f"default/{name}")
    shown = said(server, "events", "show", id_)
    assert json.loads(shown["event"]["body"]) == {"order": 7}
    assert [failure["message"] for failure in shown["failures"]] == ["ValueError: not well"] * 2
    assert id_ in dayfly(server, "events", "list").stdout
    assert "not well" in dayfly(server, "events", "show", id_).stdout

    server.deploy("fragile", name, files={"main.py": FRAGILE.replace("if not", "if False and not")})
    assert said(server, "events", "redrive", name) == {"redriven": 1}
    end = outcome(server, id_)
    assert (end["state"], json.loads(end["result"]["body"])) == ("succeeded", {"well": True})
    assert said(server, "events", "list", name, "--state", "dead") == []
    server.delete(name)


def test_an_event_that_waits_can_be_cancelled_and_one_that_is_over_cannot(server: Server):
    code = "import time\ndef handler(event, context):\n    time.sleep(2)\n"
    name = server.deploy("later-slow", files={"main.py": code}, maxScale=1)
    ids = [dayfly(server, "invoke", name, "--later").stdout.strip() for _ in range(2)]
    done = dayfly(server, "events", "cancel", ids[1])
    assert (done.returncode, done.stdout) == (0, f"{ids[1]} cancelled\n")

    assert outcome(server, ids[0])["state"] == "succeeded"
    assert outcome(server, ids[1])["state"] == "cancelled"
    again = dayfly(server, "events", "cancel", *ids)
    assert again.returncode == 2
    assert again.stdout == f"{ids[0]} is succeeded already\n{ids[1]} is cancelled already\n"
    server.delete(name)


def test_what_is_not_there_or_not_meant_is_told_in_one_line(server: Server):
    for arguments in (("show", "nothing"), ("cancel", "nothing"), ("redrive", "nobody")):
        done = dayfly(server, "events", *arguments)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
    for query in ("state=lost", "limit=0", "limit=1001", "limit=x"):
        assert server.ask("GET", f"/events?{query}").status == 400
    assert server.ask("POST", "/namespaces/default/functions/nobody/redrive", {}).status == 404
    assert dayfly(server, "invoke", "x", "--key", "k").returncode == 2


def test_a_page_goes_on_where_the_last_one_ended(server: Server):
    name = server.deploy("hello", "paged")
    ids = [accepted(ask(server, name, b"{}")) for _ in range(5)]
    path = f"/events?function=default/{name}&limit=2"
    first = [event["id"] for event in server.ask("GET", path).json()]
    second = [event["id"] for event in server.ask("GET", f"{path}&before={first[-1]}").json()]

    assert [*first, *second] == ids[:0:-1]
    server.delete(name)


def test_the_queue_can_be_watched(server: Server):
    """Everything that an alarm would need: what came, what died, what waits and for how long."""
    code = "import time\ndef handler(event, context):\n    time.sleep(1)\n"
    name = server.deploy("later-watched", files={"main.py": code}, maxScale=1)
    key = {"Idempotency-Key": "watched"}
    ids = [accepted(ask(server, name, b"{}", **key)) for _ in range(2)]
    ids += [accepted(ask(server, name, b"{}")) for _ in range(2)]
    text = server.ask("GET", "/metrics").body.decode()
    label = f'{{function="default/{name}"}}'

    assert f"dayfly_events_running{label} 1.0" in text
    assert f"dayfly_events_waiting{label} 2.0" in text
    assert f"dayfly_events_oldest_seconds{label} " in text
    assert "dayfly_events_store_up 1.0" in text
    for id_ in ids:
        outcome(server, id_)
    text = server.ask("GET", "/metrics").body.decode()
    runs = f'dayfly_events_runs_total{{function="default/{name}",state="succeeded"}}'
    assert f"{runs} 3.0" in text
    server.delete(name)
    assert runs not in server.ask("GET", "/metrics").body.decode()


# ---- schedules ----------------------------------------------------------------------------------


def trigger(server: Server, name: str, function: str, **cron: str) -> Reply:
    spec = {"function": function, "cron": {"schedule": "* * * * * *"} | cron, "data": {"n": 1}}
    return server.ask("PUT", f"/namespaces/default/triggers/{name}", spec)


def status(server: Server, name: str) -> Any:
    views = server.ask("GET", "/triggers").json()
    return next(v for v in views if v["metadata"]["name"] == name)["status"]


def test_a_schedule_fires_with_a_cloud_event_and_survives_a_restart(new_server):
    """What is fired is an event like any other: kept, run, and to be seen."""
    server: Server = new_server()
    listener = server.deploy("ticked", files={"main.py": LISTENS})
    assert trigger(server, "tick", listener).status == 200
    told = heard(server, listener)
    assert (told["specversion"], told["type"], told["data"]) == ("1.0", "dev.dayfly.cron", {"n": 1})
    assert told["source"] == "/triggers/default/tick"

    server.stop()
    server.start()
    assert eventually(lambda: status(server, "tick")["fired"])
    times = [
        json.loads(outcome(server, event["id"])["result"]["body"])["time"]
        for event in server.ask("GET", "/events?state=succeeded").json()
    ]
    assert len(times) == len(set(times))


def test_a_trigger_is_paused_resumed_listed_and_deleted(server: Server):
    listener = server.deploy("ticking", files={"main.py": LISTENS})
    made = dayfly(
        server, "trigger", "cron", "tock", "--function", listener, "--schedule", "* * * * * *"
    )
    assert made.returncode == 0, made.stderr
    assert eventually(lambda: status(server, "tock")["fired"])
    assert f"{listener}" in dayfly(server, "trigger", "list").stdout

    assert dayfly(server, "trigger", "pause", "tock").returncode == 0
    assert "paused" in dayfly(server, "trigger", "list").stdout
    fired = status(server, "tock")["fired"]
    assert dayfly(server, "trigger", "resume", "tock").returncode == 0
    assert eventually(lambda: status(server, "tock")["fired"] > fired)
    assert dayfly(server, "trigger", "delete", "tock").returncode == 0
    assert dayfly(server, "trigger", "delete", "tock").returncode == 1
    server.delete(listener)


def test_a_schedule_skips_while_its_last_firing_is_not_over(server: Server):
    code = "import time\ndef handler(event, context):\n    time.sleep(2.5)\n"
    slow = server.deploy("slow-tick", files={"main.py": code})
    assert trigger(server, "slowly", slow, overlap="skip").status == 200
    assert eventually(lambda: status(server, "slowly")["skipped"])
    server.ask("DELETE", "/namespaces/default/triggers/slowly")

    events = server.ask("GET", f"/events?function=default/{slow}").json()
    assert sum(event["state"] in ("waiting", "running") for event in events) <= 1
    server.delete(slow)


def test_a_trigger_that_cannot_work_is_refused_with_the_remedy(server: Server):
    hello = server.deploy("hello", "later-hello")
    for reply, status_, words in (
        (trigger(server, "bad", hello, schedule="61 * * * *"), 400, "write minute"),
        (trigger(server, "bad", hello, timeZone="Mars/Base"), 400, "IANA"),
        (trigger(server, "bad", "nobody"), 404, "deploy it first"),
    ):
        assert (reply.status, words in reply.json()["detail"]) == (status_, True), reply.body
    assert "bad" not in [v["metadata"]["name"] for v in server.ask("GET", "/triggers").json()]


def test_manifests_declare_functions_and_what_triggers_them(server: Server, tmp_path: Path):
    """In one file, in any order."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "main.py").write_text(LISTENS)
    (tmp_path / "all.yaml").write_text("""
apiVersion: dayfly.dev/v1
kind: Trigger
metadata: {name: applied}
spec:
  function: applied
  cron: {schedule: "* * * * * *", timeZone: Europe/Berlin}
---
apiVersion: dayfly.dev/v1
kind: Function
metadata: {name: applied}
spec: {source: code, handler: main:handler}
""")
    done = dayfly(server, "apply", "-f", str(tmp_path / "all.yaml"))
    assert done.returncode == 0, done.stderr
    assert heard(server, "applied")["source"] == "/triggers/default/applied"
    server.ask("DELETE", "/namespaces/default/triggers/applied")
    server.delete("applied")


def test_a_long_payload_is_shown_in_part_and_written_whole(server: Server):
    server.deploy("import_raises", "long-dead", retry={"attempts": 1})
    body = bytes(range(256)) * 4000
    id_ = accepted(ask(server, "long-dead", body))
    assert outcome(server, id_)["state"] == "dead"
    short = dayfly(server, "events", "show", id_).stdout
    command = [str(DAYFLY), "events", "show", id_, "--payload", "--url", f"http://{server.admin}"]

    assert "more characters)" in short
    assert len(short) < 10_000
    assert subprocess.run(command, capture_output=True, check=True).stdout == body
    done = accepted(ask(server, server.deploy("hello", "short-lived"), b'{"name": "Ada"}'))
    assert outcome(server, done)["state"] == "succeeded"
    assert "is not kept" in dayfly(server, "events", "show", done, "--payload").stderr
