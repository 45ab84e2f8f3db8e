"""Triggers on a real broker: from a message to a function, and the word back."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import nats
import pytest
from nats.js.errors import NotFoundError
from tests.brokers.nats import Nats
from tests.harness import Server, eventually

FILES = {
    "main.py": (
        "import json\n"
        "def handler(event, context):\n"
        "    print(json.dumps(event))\n"
        "    events = event if isinstance(event, list) else [event]\n"
        "    bad = [e['id'] for e in events if 'fail' in str(e.get('data'))]\n"
        "    if not isinstance(event, list):\n"
        "        if bad: raise ValueError('as asked')\n"
        "        return 'done'\n"
        "    return {'batchItemFailures': [{'itemIdentifier': id} for id in bad]}\n"
    )
}


@pytest.fixture(scope="module")
def broker() -> Iterator[Nats]:
    with Nats() as up:
        yield up  # type: ignore[misc]


@pytest.fixture
async def stream(broker: Nats, request: pytest.FixtureRequest) -> Any:
    """A new stream; its name is its subject."""
    return await broker.place(request.node.originalname.replace("_", "-")[5:45])


def declare(server: Server, name: str, function: str, spec: Any, **more: Any) -> Any:
    reply = server.ask(
        "PUT", f"/namespaces/default/triggers/{name}", {"function": function} | spec | more
    )
    assert reply.status == 200, reply.body
    return reply.json()


def source(place: Any) -> dict[str, Any]:
    return {"nats": {"url": place.spec.url, "subject": place.spec.subject}}


def status(server: Server, name: str) -> dict[str, Any]:
    found = server.ask("GET", "/triggers").json()
    return next(view["status"] for view in found if view["metadata"]["name"] == name)


def told(server: Server, function: str) -> list[Any]:
    """What the function was given, in order."""
    lines = [line["text"] for line in server.logs(function) if line["stream"] == "stdout"]
    return [json.loads(line) for line in lines]


def events(server: Server, function: str, state: str = "") -> list[Any]:
    query = f"&state={state}" if state else ""
    found = server.ask("GET", f"/events?function=default/{function}{query}").json()
    return [server.ask("GET", f"/events/{event['id']}").json() for event in found]


async def test_a_message_reaches_its_function_as_a_cloud_event_and_is_done_with(
    server: Server, stream: Any
):
    server.deploy("", "by-nats", files=FILES)
    declare(server, "by-nats", "by-nats", source(stream))
    await stream.publish(b'{"n": 1}', {"traceparent": "00-" + "1" * 32 + "-" + "2" * 16 + "-01"})
    eventually(lambda: status(server, "by-nats")["acknowledged"] == 1)

    (event,) = told(server, "by-nats")
    assert (event["type"], event["data"], event["subject"]) == (
        "dev.dayfly.nats",
        {"n": 1},
        stream.spec.subject,
    )
    assert event["source"] == "/triggers/default/by-nats"
    (accepted,) = events(server, "by-nats")
    assert (accepted["state"], accepted["attempts"]) == ("succeeded", 1)
    assert await unacknowledged(stream, "by-nats") == 0
    server.ask("DELETE", "/namespaces/default/triggers/by-nats")


async def unacknowledged(place: Any, trigger: str) -> int:
    client = await nats.connect(place.spec.url)
    try:
        info = await client.jetstream().consumer_info(
            place.spec.subject, f"dayfly-default_{trigger}"
        )
        return int(info.num_ack_pending or 0) + int(info.num_pending or 0)
    except NotFoundError:
        return -1
    finally:
        await client.close()


async def test_what_fails_for_good_is_a_dead_letter_with_its_payload_and_then_done_with(
    server: Server, stream: Any
):
    server.deploy("", "by-bad", files=FILES, retry={"attempts": 2, "backoffSeconds": 0.01})
    declare(server, "by-bad", "by-bad", source(stream))
    await stream.publish(b"fail")
    eventually(lambda: status(server, "by-bad")["acknowledged"] == 1)

    (dead,) = events(server, "by-bad", "dead")
    assert [failure["kind"] for failure in dead["failures"]] == ["Raised", "Raised"]
    assert json.loads(dead["event"]["body"])["data"] == "fail"
    server.ask("DELETE", "/namespaces/default/triggers/by-bad")


async def test_what_is_no_cloud_event_though_it_says_so_is_a_dead_letter(
    server: Server, stream: Any
):
    server.deploy("", "by-wrong", files=FILES)
    declare(server, "by-wrong", "by-wrong", source(stream))
    await stream.publish(b"body", {"ce-specversion": "1.0", "ce-id": "1"})
    eventually(lambda: status(server, "by-wrong")["acknowledged"] == 1)

    (dead,) = events(server, "by-wrong", "dead")
    assert dead["attempts"] == 0
    assert "no CloudEvent" in dead["failures"][0]["message"]
    assert dead["event"]["body"] == "body"
    server.ask("DELETE", "/namespaces/default/triggers/by-wrong")


async def test_a_filter_lets_through_what_it_means(server: Server, stream: Any):
    server.deploy("", "by-filter", files=FILES)
    declare(server, "by-filter", "by-filter", source(stream), filter="event.data.n > 1")
    for body in (b'{"n": 1}', b'{"n": 2}', b"text"):
        await stream.publish(body)
    eventually(lambda: status(server, "by-filter")["acknowledged"] == 3)

    assert [event["data"] for event in told(server, "by-filter")] == [{"n": 2}]
    shown = status(server, "by-filter")
    assert (shown["filtered"], shown["filterErrors"]) == (1, 1)
    server.ask("DELETE", "/namespaces/default/triggers/by-filter")


async def test_of_a_batch_only_what_failed_is_tried_again_and_ends_as_a_dead_letter(
    server: Server, stream: Any
):
    server.deploy("", "by-batch", files=FILES, retry={"attempts": 2, "backoffSeconds": 0.01})
    for body in (b"one", b"fail", b"three"):
        await stream.publish(body)
    batch = {"size": 3, "windowSeconds": 5}
    declare(server, "by-batch", "by-batch", source(stream), batch=batch)
    eventually(lambda: status(server, "by-batch")["acknowledged"] == 3)

    runs = [[event["data"] for event in run] for run in told(server, "by-batch")]
    assert runs == [["one", "fail", "three"], ["fail"], ["fail"]]
    (dead,) = events(server, "by-batch", "dead")
    assert dead["failures"][-1]["kind"] == "BatchItemFailures"
    assert len(events(server, "by-batch", "succeeded")) == 1
    server.ask("DELETE", "/namespaces/default/triggers/by-batch")


async def test_ordered_messages_come_one_after_the_other_also_when_one_fails(
    server: Server, stream: Any
):
    server.deploy("", "by-order", files=FILES, retry={"attempts": 2, "backoffSeconds": 0.2})
    for body in (b"a", b"fail", b"b", b"c"):
        await stream.publish(body)
    declare(server, "by-order", "by-order", source(stream), ordered=True)
    eventually(lambda: status(server, "by-order")["acknowledged"] == 4)

    assert [event["data"] for event in told(server, "by-order")] == ["a", "fail", "fail", "b", "c"]
    server.ask("DELETE", "/namespaces/default/triggers/by-order")


async def test_what_a_function_has_no_room_for_stays_at_the_broker(server: Server, stream: Any):
    slow = {"main.py": "import time\ndef handler(event, context):\n    time.sleep(0.3)\n"}
    server.deploy("", "by-few", files=slow, maxScale=1)
    for _ in range(5):
        await stream.publish(b"x")
    declare(server, "by-few", "by-few", source(stream))
    most = 0
    while status(server, "by-few")["acknowledged"] < 5:
        shown = status(server, "by-few")
        most = max(most, shown["fetched"] - shown["acknowledged"])
        await asyncio.sleep(0.01)

    assert most <= 2  # one has ended, and the broker's word for it is still under way
    assert [event["attempts"] for event in events(server, "by-few")] == [1] * 5
    server.ask("DELETE", "/namespaces/default/triggers/by-few")


async def test_a_trigger_is_paused_changed_and_removed_while_it_runs(server: Server, stream: Any):
    server.deploy("", "by-turns", files=FILES)
    declare(server, "by-turns", "by-turns", source(stream), paused=True)
    await stream.publish(b"1")
    assert "up" not in status(server, "by-turns")
    declare(server, "by-turns", "by-turns", source(stream))
    eventually(lambda: status(server, "by-turns").get("acknowledged") == 1)
    declare(server, "by-turns", "by-turns", source(stream), filter="false")
    await stream.publish(b"2")
    eventually(lambda: status(server, "by-turns").get("filtered") == 1)
    server.ask("DELETE", "/namespaces/default/triggers/by-turns")

    assert [event["data"] for event in told(server, "by-turns")] == [1]


def test_a_broker_that_is_not_there_is_told_and_harms_nobody(server: Server):
    server.deploy("", "by-nobody", files=FILES)
    where = {"nats": {"url": "nats://127.0.0.1:1", "subject": "x"}}
    declare(server, "by-nobody", "by-nobody", where)
    eventually(lambda: "127.0.0.1:1" in status(server, "by-nobody")["lastError"])

    assert status(server, "by-nobody")["up"] is False
    assert server.call("by-nobody", path="?x=1").status == 200
    metrics = server.ask("GET", "/metrics").body.decode()
    assert 'dayfly_trigger_up{trigger="default/by-nobody"} 0.0' in metrics
    server.ask("DELETE", "/namespaces/default/triggers/by-nobody")


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({}, "one source is needed"),
        ({"nats": {"subject": "x"}, "cron": {"schedule": "* * * * *"}}, "one source is needed"),
        ({"nats": {"subject": "x", "url": "http://x"}}, "nats://HOST:PORT"),
        ({"nats": {"subject": "x", "url": "nats://me:pw@x:1"}}, "dayfly secret put"),
        ({"nats": {"subject": "x", "secret": "nope"}}, "no secret default/nope"),
        ({"nats": {"subject": "x"}, "filter": "event.type =="}, "filter: "),
        ({"nats": {"subject": "x"}, "data": 1}, "data is for cron"),
        ({"webhook": {"secret": "x"}, "ordered": True}, "not for webhook"),
    ],
)
def test_a_wrong_trigger_is_refused_with_the_reason(server: Server, spec: Any, why: str):
    server.deploy("", "by-wrong-spec", files=FILES)
    body = {"function": "by-wrong-spec"} | spec
    reply = server.ask("PUT", "/namespaces/default/triggers/wrong", body)
    assert reply.status in (400, 404)
    assert why in reply.json()["detail"]
    assert "pw@x" not in reply.json()["detail"] or "me:pw" in str(spec)
