"""Processes that die without a word: the guest, its keeper, the launcher, the server."""

import contextlib
import http.client
import os
import signal
import threading

import pytest
from tests.harness import (
    Process,
    Reply,
    Server,
    cgroup_folders,
    eventually,
    eventually_none,
    family,
    stat,
    together,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="finds processes by control group")


class Callers:
    """*number* invocations of `wait` that run at the same time, and what they were answered."""

    def __init__(self, server: Server, name: str, number: int, seconds: float = 30) -> None:
        self._replies: list[Reply] = []

        def ask() -> None:
            self._replies.append(server.invoke(name, {"seconds": seconds}))

        self._threads = [threading.Thread(target=ask) for _ in range(number)]
        for thread in self._threads:
            thread.start()
        eventually(lambda: server.describe(name)["status"]["busy"] >= number)

    def replies(self) -> list[Reply]:
        """All of them, once the last has come."""
        for thread in self._threads:
            thread.join(30)
        return self._replies


@pytest.mark.parametrize(
    ("isolation", "victim"),
    [
        *(("exec", victim) for victim in ("guest", "pid 1", "bwrap", "all")),
        *(("fork", victim) for victim in ("guest", "pid 1", "all")),
    ],
)
def test_a_killed_sandbox_is_told_at_once_with_its_cause(
    server: Server, isolation: str, victim: str
):
    """Not at the timeout, which has another name; and the next call is served."""
    name = f"victim-{isolation}-{victim.replace(' ', '-')}"
    server.deploy("wait", name, isolation=isolation)
    caller = Callers(server, name, 1)
    (box,) = server.sandboxes(name)
    pids = sorted(server.processes(box["id"]), key=lambda pid: len(family(pid)))
    chosen = {"guest": pids[:1], "pid 1": pids[1:2], "bwrap": pids[2:3], "all": pids}[victim]

    for pid in chosen:
        with contextlib.suppress(ProcessLookupError):  # it follows its guest, maybe already now
            os.kill(pid, signal.SIGKILL)
    (reply,) = caller.replies()

    assert len(pids) == {"exec": 3, "fork": 2}[isolation]
    assert (reply.status, reply.json()["title"]) == (502, "Crashed")
    assert server.invoke(name, {"seconds": 0}).status == 200
    assert not eventually_none(lambda: [p for p in pids if stat(p)])
    server.delete(name)


def test_a_hundred_deaths_are_all_told_and_none_leaves_a_trace(server: Server):
    """Handlers that die at a random moment: every caller is told, no place is lost."""
    code = (
        "import os, random, threading, time\n"
        "def handler(event, context):\n"
        "    threading.Timer(random.random() / 50, os._exit, (9,)).start()\n"
        "    time.sleep(random.random() / 50)\n"
        "    return 'alive'\n"
    )
    name = server.deploy("mortal", files={"main.py": code}, maxScale=4, timeoutSeconds=20)

    replies = [r for _ in range(5) for r in together(20, lambda _: server.invoke(name))]
    kinds = {reply.status for reply in replies}

    assert kinds <= {200, 502}
    assert 502 in kinds
    server.deploy("hello", "mortal")
    assert server.call("mortal").status == 200
    assert not eventually_none(lambda: server.sandboxes("mortal")[1:])
    server.delete("mortal")


def test_a_killed_server_takes_everything_with_it_and_comes_back(new_server):
    """kill -9 while stubborn functions run: no process lives on; after a restart no folder."""
    server: Server = new_server()
    name = server.deploy("stubborn", timeoutSeconds=60, limits={"processes": 32})
    kept = server.deploy("hello")

    def call() -> None:
        with pytest.raises(ConnectionError):
            server.call(name)

    caller = threading.Thread(target=call)
    caller.start()
    eventually(lambda: [b for b in server.sandboxes(name) if len(server.processes(b["id"])) >= 7])
    doomed = server.family()
    dead_pid = server.pid
    server.kill(signal.SIGKILL)
    server.wait()
    caller.join(20)

    assert len(doomed) > 10
    assert not eventually_none(lambda: [p for p in doomed if p.is_alive], within_s=2)
    server.start()
    assert not cgroup_folders(dead_pid)
    assert server.call(kept).status == 200
    assert server.describe(name)["status"]["version"] == 1


def test_a_server_killed_again_and_again_keeps_its_declarations(new_server):
    """Four kills at awkward moments: what was acknowledged is there, the data folder is well."""
    server: Server = new_server()
    acknowledged: list[str] = []

    def deploy(round_: int) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException, AssertionError):
            for i in range(1000):
                acknowledged.append(server.deploy("hello", f"kept-{round_}-{i}"))  # noqa: PERF401

    for round_ in range(4):
        before = len(acknowledged)
        deployer = threading.Thread(target=deploy, args=(round_,))
        deployer.start()
        eventually(lambda before=before: len(acknowledged) > before + 2)
        server.kill(signal.SIGKILL)
        server.wait()
        deployer.join(20)
        server.start()
        names = {f["metadata"]["name"] for f in server.ask("GET", "/functions").json()}

        assert set(acknowledged) <= names
    assert len(acknowledged) >= 12
    assert server.call(acknowledged[-1]).status == 200


def test_a_killed_launcher_is_replaced(new_server):
    """Its sandboxes die with it and their callers are told; then there are new ones."""
    server: Server = new_server()
    name = server.deploy("wait")
    callers = Callers(server, name, 2)
    launcher = next(p for p in family(server.pid) if stat(p.pid)[1] == str(server.pid))
    below = [p for p in family(launcher.pid) if p != launcher]

    os.kill(launcher.pid, signal.SIGKILL)
    replies = callers.replies()
    again = eventually(lambda: (r := server.invoke(name, {"seconds": 0})).status == 200 and r)

    assert [(r.status, r.json()["title"]) for r in replies] == [(502, "Crashed")] * 2
    assert again.status == 200
    assert not eventually_none(lambda: [p for p in below if p.is_alive])
    assert [e for e in server.errors() if "launcher died" in e]
    server.log[:] = [line for line in server.log if "launcher died" not in line]


def test_an_orderly_end_fails_no_request_under_way(new_server):
    """SIGTERM with twenty running and ten waiting: thirty answers, then the port is closed."""
    server: Server = new_server()
    name = server.deploy("wait", maxScale=20)
    together(20, lambda _: server.invoke(name, {"seconds": 0.1}))
    running = Callers(server, name, 20, seconds=1.5)
    waiting = Callers(server, name, 10, seconds=0.1)
    eventually(lambda: server.describe(name)["status"]["waiting"] >= 10)

    server.kill(signal.SIGTERM)
    refused = eventually(lambda: not server.is_ready)
    code = server.wait()

    assert refused
    assert [reply.status for reply in running.replies()] == [200] * 20
    assert [reply.status for reply in waiting.replies()] == [200] * 10
    assert code == 0


def test_an_orderly_end_fails_no_client_that_keeps_its_connection(new_server):
    """Under load on kept connections: each answer is a 200, the last one says `close`."""
    server: Server = new_server()
    name = server.deploy("hello")
    server.call(name)
    host, _, port = server.http.rpartition(":")
    failed: list[object] = []
    served = [0] * 4

    def load(i: int) -> None:
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        while True:
            connection.request("GET", f"/fn/{name}")
            reply = connection.getresponse()
            reply.read()
            served[i] += 1
            if reply.status != 200:
                failed.append(reply.status)
            if reply.headers.get("Connection") == "close":
                connection.close()
                return

    threads = [threading.Thread(target=load, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    eventually(lambda: min(served) > 20)
    server.kill(signal.SIGTERM)
    for thread in threads:
        thread.join(20)

    assert not failed
    assert not [thread for thread in threads if thread.is_alive()]
    assert server.wait() == 0


def test_a_follower_of_a_log_does_not_hold_up_the_end(new_server):
    """Nor does a connection that nobody uses: the server does not wait for its limit."""
    server: Server = new_server(settings={"generic_min": 1, "drain_s_max": 600.0})
    name = server.deploy("hello")
    host, _, port = server.admin.rpartition(":")
    follower = http.client.HTTPConnection(host, int(port), timeout=30)
    follower.request("GET", f"/namespaces/default/functions/{name}/logs?follow")
    follower.getresponse()
    with server.connection():
        code = server.stop()
    follower.close()

    assert code == 0


def test_what_survives_of_a_dead_process_is_told_from_a_living_one():
    """The helper that these tests stand on: a process is its number and its start."""
    us = family(os.getpid())[0]

    assert us.is_alive
    assert not Process(us.pid, "0").is_alive
