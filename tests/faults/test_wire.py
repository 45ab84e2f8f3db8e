"""A sandbox that does not keep to the protocol: it ends, with that cause, and nothing else notices.

The hostile code writes on descriptor 3 itself, the one way out of a sandbox.
"""

import os

import pytest
from tests.harness import FUNCTIONS, Server, eventually, together

ATTACKS = [
    "another invocation",
    "invocation 0",
    "a huge number",
    "hello again",
    "hello as the answer",
    "loaded as the answer",
    "a request",
    "garbage",
    "zeroes",
    "text",
    "a huge length",
    "meta longer than the frame",
    "an unknown kind",
    "a reserved byte",
    "no msgpack",
    "an array",
    "a field missing",
    "a field too many",
    "a field of another type",
    "a map of a million",
    "deep nesting",
    "deep headers",
    "not a number",
    "for ever",
    "before it began",
    "a made-up failure",
    "a platform failure",
    "big logs",
    "many logs",
]


@pytest.fixture(scope="module")
def name(server: Server) -> str:
    return server.deploy("wire", timeoutSeconds=8)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_broken_protocol_ends_that_sandbox_at_once(server: Server, name: str, attack: str):
    """Well before the timeout; the next request is served by a fresh sandbox."""
    reply = server.invoke(name, attack)

    assert (reply.status, reply.json()["title"]) == (502, "ProtocolViolation")
    assert server.invoke(name, "count").json() == 1
    assert not server.errors()


def test_a_second_answer_is_taken_by_nobody(server: Server, name: str):
    """The first one counts, the sandbox ends, and the next caller gets its own answer."""
    first = server.invoke(name, "twice")
    following = eventually(lambda: (r := server.invoke(name, "count")).status == 200 and r)

    assert (first.status, first.body) == (200, b"first")
    assert following.json() == 1


def test_a_frame_that_never_ends_is_a_timeout(server: Server):
    """Dripped byte by byte it holds one place until the deadline, and no one's time."""
    name = server.deploy("wire", "dripping", timeoutSeconds=1)
    neighbour = server.deploy("hello")
    server.call(neighbour)

    def work(i: int) -> object:
        if i:
            return server.invoke(name, "drip")
        return [server.call(neighbour).status for _ in range(50)]

    served, reply = together(2, work)

    assert (reply.status, reply.json()["title"]) == (504, "TimedOut")
    assert served == [200] * 50
    server.delete(name)


@pytest.mark.parametrize("headers", ["numbers", "a map", "strings", "triples", "bytes", "none"])
def test_headers_that_are_none_are_refused_by_the_gateway(server: Server, name: str, headers: str):
    """Well-formed frames whose content makes no response: 502, never a 500 of ours."""
    server.deploy("wire", "wire-http", handler="main:over_http", timeoutSeconds=8)
    query = f"?attack={headers.replace(' ', '+')}"

    reply = server.call("wire-http", path=query)

    assert (reply.status, reply.json()["title"]) == (502, "BadResponse")
    server.delete("wire-http")
    assert not server.errors()


def test_mutated_streams_end_their_sandbox_or_are_taken_for_what_they_say(server: Server):
    """Forty seeds: whatever arrives, the answer is one of a few, and the server has no error."""
    name = server.deploy("wire", "fuzzed", timeoutSeconds=0.5, maxScale=4)

    def attack(i: int) -> list[int]:
        return [server.invoke(name, seed).status for seed in range(i * 10, i * 10 + 10)]

    statuses = {status for found in together(4, attack) for status in found}

    assert statuses <= {200, 502, 504}
    assert 502 in statuses
    assert not server.errors()
    assert server.invoke(name, "count").status == 200
    server.delete(name)


def test_descriptors_sent_to_the_server_do_not_stay_there(server: Server, name: str):
    """2,000 of them (SCM_RIGHTS): the server's table is as it was."""
    server.invoke(name, "count")

    def open_now() -> int:
        return len(os.listdir(f"/proc/{server.pid}/fd"))

    before = open_now()
    replies = [server.invoke(name, "descriptors") for _ in range(3)]

    assert {reply.body for reply in replies} == {b'"sent"'}
    assert eventually(lambda: open_now() <= before + 8), (before, open_now())
    launchers = [p for p in server.family() if p.pid != server.pid]
    assert all(len(os.listdir(f"/proc/{p.pid}/fd")) < 120 for p in launchers if p.is_alive)


@pytest.mark.parametrize("slots", [0, -1, 1000, 2**40])
def test_a_function_cannot_promise_more_places_than_were_declared(server: Server, slots: int):
    """A forged `Loaded` is no way to draw all invocations of a pool to one sandbox."""
    files = {
        "main.py": (FUNCTIONS / "forges_loaded" / "main.py").read_text(),
        "wire.py": (FUNCTIONS / "wire" / "main.py").read_text(),
    }
    name = server.deploy("forger", files=files, env={"SLOTS": str(slots)}, timeoutSeconds=5)

    reply = server.invoke(name)

    assert (reply.status, reply.json()["title"]) == (502, "ProtocolViolation")
    server.delete(name)


def test_what_a_hostile_guest_says_makes_no_new_series(server: Server, name: str):
    """Labels of the metrics are ours: their number does not depend on what functions send."""
    server.invoke(name, "a made-up failure")
    text = server.ask("GET", "/metrics").body.decode()
    outcomes = {
        line.partition('outcome="')[2].partition('"')[0]
        for line in text.splitlines()
        if line.startswith("dayfly_invocations_total")
    }

    assert "xxxx" not in text
    assert " nan" not in text.lower()
    assert len(outcomes) < 20
