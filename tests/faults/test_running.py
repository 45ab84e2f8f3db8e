"""Handlers that do what they should not: that invocation fails, with its cause, and no other."""

import pytest
from tests.harness import Process, Server, eventually, eventually_none, stat, together

BAD = "BadResponse"


@pytest.fixture(scope="module")
def name(server: Server) -> str:
    return server.deploy("misbehaves", limits={"memoryMb": 128})


def fine(server: Server) -> bool:
    """Whether an ordinary function is served."""
    return server.call(server.deploy("hello")).status == 200


@pytest.mark.parametrize(
    ("way", "kind"),
    [
        ("raises", "Raised"),
        ("raises_hostile", "Raised"),
        ("raises_much", "Raised"),
        ("recursion", "Raised"),
        ("exits", "Exited"),
        ("dies", "Crashed"),
        ("dies_with_heirs", "Crashed"),
        ("segfaults", "Crashed"),
        ("aborts", "Crashed"),
        ("kills_everybody", "Crashed"),
        ("closes_everything", "Crashed"),
        ("covers_the_socket", "Crashed"),
        ("unserializable", BAD),
        ("circular", BAD),
        ("deep", BAD),
        ("surrogates", BAD),
        ("surrogate_body", BAD),
        ("bad_base64", BAD),
        ("bad_status", BAD),
        ("odd_status", BAD),
        ("big", BAD),
        ("many_headers", BAD),
        ("some_headers", BAD),
        ("injects_value", BAD),
        ("injects_newline", BAD),
        ("injects_name", BAD),
        ("injects_cookie", BAD),
        ("injects_type", BAD),
        ("injects_nul", BAD),
    ],
)
def test_a_handler_that_fails_is_a_502_with_its_cause(
    server: Server, name: str, way: str, kind: str
):
    """Told at once, not at the timeout; nothing forged reaches the client; then all is well."""
    reply = server.call(name, path=f"/{way}", timeout_s=10)

    assert (reply.status, reply.json()["title"]) == (502, kind)
    assert not {"X-Evil", "Set-Cookie"} & set(reply.headers)
    assert server.call(name, path="/behaves").body == b"well"


def test_a_value_that_raises_when_it_is_looked_at_is_the_handlers_failure(
    server: Server, name: str
):
    """User code runs while its result is read; what it raises there is told as what it is."""
    reply = server.call(name, path="/hostile_value")

    assert reply.status == 502
    assert reply.json()["title"] in ("Raised", BAD)


def test_only_the_process_that_was_asked_answers(server: Server, name: str):
    """A child that comes back from the handler ends; its answer is nobody's."""
    replies = [server.call(name, path="/returns_in_a_child") for _ in range(3)]

    assert [reply.body for reply in replies] == [b"true"] * 3


def test_nobody_inside_can_end_pid_1(server: Server, name: str):
    """It is the sandbox's own init; signals from within do not reach it."""
    assert server.call(name, path="/kills_pid_1").body == b"still here"


def test_threads_left_behind_end_at_the_limit_of_processes_and_nowhere_else(server: Server):
    """Each call leaves 20; the fourth is told that there are no more."""
    name = server.deploy("misbehaves", "threads", limits={"processes": 70})

    replies = [server.call(name, path="/leaves_threads") for _ in range(4)]

    assert [reply.status for reply in replies] == [200, 200, 200, 502]
    assert fine(server)
    server.delete(name)


def test_a_sandbox_that_stops_itself_is_ended_at_its_deadline(server: Server):
    """SIGSTOP is no way to hold a place for ever."""
    name = server.deploy("misbehaves", "stopped", timeoutSeconds=0.5)

    reply = server.call(name, path="/stops_itself", timeout_s=15)

    assert (reply.status, reply.json()["title"]) == (504, "TimedOut")
    assert eventually(lambda: not server.sandboxes(name))
    server.delete(name)


def test_nothing_survives_a_timeout(impatient: Server):
    """SIGTERM ignored, children that left session and parent: all are dead after the grace."""
    name = impatient.deploy("stubborn", timeoutSeconds=1, limits={"processes": 32})
    seen: set[Process] = set()

    def watch() -> bool:
        for box in impatient.sandboxes(name):
            for pid in impatient.processes(box["id"]):
                if fields := stat(pid):
                    seen.add(Process(pid, fields[19]))
        return len(seen) >= 6

    replies = together(
        2, lambda i: impatient.call(name, timeout_s=15) if i else eventually(watch, 8)
    )

    assert replies[0], "the children were never seen"
    assert (replies[1].status, replies[1].json()["title"]) == (504, "TimedOut")
    assert not eventually_none(lambda: [p for p in seen if p.is_alive], within_s=5)
    assert fine(impatient)
    impatient.delete(name)


def test_a_timeout_is_told_at_the_deadline_not_after_the_grace(server: Server):
    """The caller does not wait until the last process is dead (a grace of 2 s)."""
    name = server.deploy("stubborn", "prompt", timeoutSeconds=0.3)

    reply = server.call(name, timeout_s=15)
    handler_ms = float(reply.headers["Server-Timing"].rpartition("handler;dur=")[2])

    assert reply.status == 504
    assert 290 < handler_ms < 1800
    server.delete(name)
