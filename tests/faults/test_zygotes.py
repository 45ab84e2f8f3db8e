"""Zygotes that die, wear out or cannot fork; functions that are not forked, or try to reach one."""

import itertools
import os
import shutil
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.faults.disk import failing
from tests.harness import (
    Reply,
    Server,
    cgroup_folders,
    eventually,
    eventually_none,
    family,
    stat,
    status,
    together,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="finds processes by control group")


def zygote(server: Server, namespace: str = "default") -> str:
    """The id of the namespace's zygote, once it is ready."""

    def ready() -> list[str]:
        zygotes = server.pool()["zygotes"]
        return [z["id"] for z in zygotes if z["namespace"] == namespace and z["isReady"]]

    return eventually(ready)[0]


def called(pids: list[int], name: str) -> list[int]:
    """Those of the processes that are called *name*."""
    return [pid for pid in pids if status(pid).get("Name") == name]


def is_forked(server: Server, sandbox: str) -> bool:
    """By its pid 1: that of a started sandbox is bwrap, and so is the keeper outside."""
    names = {status(pid).get("Name") for pid in server.processes(sandbox)}
    assert ("dayfly-init" in names) != ("bwrap" in names), names
    return "dayfly-init" in names


def cold(server: Server, names: list[str], namespace: str = "default") -> list[Reply]:
    """One invocation of each function, all at once."""
    return together(len(names), lambda i: server.invoke(names[i], None, namespace))


def deploy(server: Server, number: int, prefix: str, namespace: str = "default") -> list[str]:
    """That many functions of one namespace, none of which has run."""
    names = [f"{prefix}-{i}" for i in range(number)]
    return [server.deploy("instance", name, namespace=namespace) for name in names]


class Running:
    """*number* invocations of the namespace's `wait` that run now, and what they are answered."""

    def __init__(
        self, server: Server, namespace: str, name: str, number: int, seconds: float = 30
    ) -> None:
        self._replies: list[Reply] = []

        def ask() -> None:
            self._replies.append(server.invoke(name, {"seconds": seconds}, namespace))

        self._threads = [threading.Thread(target=ask) for _ in range(number)]
        for thread in self._threads:
            thread.start()
        eventually(lambda: len(self._busy(server, f"{namespace}/{name}")) >= number)
        self.sandboxes = self._busy(server, f"{namespace}/{name}")

    def _busy(self, server: Server, function: str) -> list[str]:
        all_ = server.pool()["sandboxes"]
        return [b["id"] for b in all_ if b["function"] == function and b["phase"] == "busy"]

    def replies(self) -> list[Reply]:
        """All of them, once the last has come."""
        for thread in self._threads:
            thread.join(30)
        return self._replies


def forks_again(server: Server, namespace: str, prefix: str) -> bool:
    """Whether a function that has not run yet is served by a forked sandbox; tried once a call."""
    name = f"{prefix}-{next(fresh)}"
    server.deploy("instance", name, namespace=namespace)
    reply = server.invoke(name, None, namespace)
    assert reply.status == 200, reply.body
    boxes = [b for b in server.pool()["sandboxes"] if b["function"] == f"{namespace}/{name}"]
    return reply.headers["Dayfly-Start"] in ("forked", "generic") and is_forked(
        server, boxes[0]["id"]
    )


fresh = itertools.count()


# ---- deaths -------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["dayfly-zygote", "bwrap"])
def test_a_killed_zygote_takes_its_own_sandboxes_and_no_other(server: Server, victim: str):
    """Who ran in them is told at once; started ones and other tenants go on; then another forks."""
    namespace, other = f"kills-{victim}", f"neighbours-{victim}"
    server.deploy("wait", "forked", namespace=namespace)
    server.deploy("wait", "started", namespace=namespace, isolation="exec")
    server.deploy("wait", "forked", namespace=other)
    first, neighbour = zygote(server, namespace), zygote(server, other)
    doomed = Running(server, namespace, "forked", 2)
    kept = Running(server, namespace, "started", 1, seconds=1)
    apart = Running(server, other, "forked", 1, seconds=1)
    boxes = (*doomed.sandboxes, *kept.sandboxes, *apart.sandboxes)
    assert [is_forked(server, box) for box in boxes] == [True, True, False, True]

    for pid in called(server.processes(first), victim):
        with suppress(ProcessLookupError):  # one of two may take the other with it
            os.kill(pid, signal.SIGKILL)
    told = doomed.replies()
    after = server.invoke("forked", {"seconds": 0}, namespace)

    assert [(r.status, r.json()["title"]) for r in told] == [(502, "Crashed")] * 2
    assert after.status == 200
    assert [r.status for r in kept.replies() + apart.replies()] == [200, 200]
    assert zygote(server, other) == neighbour
    assert zygote(server, namespace) != first
    assert eventually(lambda: forks_again(server, namespace, "again"))
    assert not eventually_none(lambda: server.processes(first))


def test_a_zygote_killed_in_a_burst_of_cold_starts_fails_only_what_ran_in_it(server: Server):
    """Killed with the first answer of each of three bursts: nobody is told but that it crashed."""
    for round_ in range(3):
        names = deploy(server, 12, f"burst-{round_}", "bursts")
        first = zygote(server, "bursts")
        (victim,) = called(server.processes(first), "dayfly-zygote")
        killed = threading.Event()

        def invoke(i: int, names=names, victim=victim, killed=killed) -> Reply:
            reply = server.invoke(names[i], None, "bursts")
            if not killed.is_set():
                killed.set()
                os.kill(victim, signal.SIGKILL)
            return reply

        replies = together(12, invoke)
        again = eventually(
            lambda names=names: {r.status for r in cold(server, names, "bursts")} == {200}
        )

        failed = [r.json()["title"] for r in replies if r.status != 200]
        assert set(failed) <= {"Crashed", "InitCrashed"}, failed
        assert len(failed) < 12
        assert again
        assert zygote(server, "bursts") != first
    assert eventually(lambda: forks_again(server, "bursts", "burst-again"))


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("error", ["ENOMEM", "EAGAIN"])
def test_a_zygote_that_cannot_fork_for_want_of_memory_costs_nobody_an_answer(
    server: Server, error: str
):
    """Or of process ids: sandboxes are started instead, until it can again."""
    namespace = f"short-{error.lower()}"
    names = deploy(server, 8, "short", namespace)
    (pid,) = called(server.processes(zygote(server, namespace)), "dayfly-zygote")
    with failing(pid, "clone", error):
        replies = cold(server, names, namespace)

    assert [reply.status for reply in replies] == [200] * 8
    assert "created" in {reply.headers["Dayfly-Start"] for reply in replies}
    assert eventually(lambda: forks_again(server, namespace, "again"))


def test_a_zygote_killed_while_a_function_loads_is_not_held_against_the_function(server: Server):
    """Its code has not failed: who calls next is served, and not told of a failed import."""
    code = "import time\ntime.sleep(0.5)\ndef handler(event, context):\n    return 'loaded'\n"
    server.deploy("slow", "slow", files={"main.py": code}, namespace="loads")
    first = zygote(server, "loads")
    replies: list[Reply] = []
    caller = threading.Thread(target=lambda: replies.append(server.invoke("slow", None, "loads")))
    caller.start()
    assert eventually(lambda: phases(server, "loads/slow") == ["loading"])

    for pid in called(server.processes(first), "dayfly-zygote"):
        os.kill(pid, signal.SIGKILL)
    caller.join(30)
    following = server.invoke("slow", None, "loads")

    assert replies[0].status in (200, 502)
    assert following.status == 200, following.body


def phases(server: Server, function: str) -> list[str]:
    """What the function's sandboxes are doing."""
    return [b["phase"] for b in server.pool()["sandboxes"] if b["function"] == function]


def test_a_killed_launcher_comes_back_with_a_zygote(new_server):
    """All die with it; afterwards everything is forked as before."""
    server: Server = new_server()
    name = server.deploy("wait")
    first = zygote(server)
    callers = Running(server, "default", name, 2)
    launcher = next(p for p in family(server.pid) if stat(p.pid)[1] == str(server.pid))
    below = [p for p in family(launcher.pid) if p != launcher]

    os.kill(launcher.pid, signal.SIGKILL)
    replies = callers.replies()
    again = eventually(lambda: server.invoke(name, {"seconds": 0}).status == 200)

    assert [(r.status, r.json()["title"]) for r in replies] == [(502, "Crashed")] * 2
    assert again
    assert eventually(lambda: server.has_zygote("default"))
    assert zygote(server) != first
    assert eventually(lambda: forks_again(server, "default", "again"))
    assert not eventually_none(lambda: [p for p in below if p.is_alive])
    assert [e for e in server.errors() if "launcher died" in e]
    server.log[:] = [line for line in server.log if "launcher died" not in line]


# ---- wear ---------------------------------------------------------------------------------------


def test_worn_zygotes_are_replaced_under_load_and_nobody_notices(new_server):
    """200 cold starts from zygotes that fork five times each: not one fails, nothing stays."""
    server: Server = new_server("--zygote-forks-max", "5")
    digest = server.describe(server.deploy("instance"))["spec"]["package"]
    names = [f"worn-{i}" for i in range(40)]
    first = zygote(server)
    spec = {"handler": "main:handler", "package": digest}

    def work(i: int) -> list[int]:
        """New versions of five functions, and an invocation of each, five times."""
        codes = []
        for version in range(5):
            for name in names[i::8]:
                path = f"/namespaces/default/functions/{name}"
                server.ask("PUT", path, spec | {"env": {"VERSION": str(version)}})
                reply = server.invoke(name)
                codes.append(reply.status)
                assert reply.status != 200 or reply.json()["version"] == str(version)
        return codes

    codes = [code for part in together(8, work) for code in part]
    zygotes = {line.partition('"zygote": "')[2].partition('"')[0] for line in server.log
               if '"zygote ready"' in line}  # fmt: skip
    for name in (*names, "instance"):
        server.delete(name)

    assert codes == [200] * 200
    assert len(zygotes) >= 5
    assert zygote(server) != first
    assert len(eventually_none(lambda: too_many(server))) <= 2
    assert not eventually_none(lambda: unknown_groups(server))


def too_many(server: Server) -> list[int]:
    """The zygotes' processes, if they are more than one at work and one that follows it."""
    found = called([p.pid for p in family(server.pid)], "dayfly-zygote")
    return found if len(found) > 2 else []


def unknown_groups(server: Server) -> list[str]:
    """Control groups of sandboxes and zygotes that the server does not know of.

    A retired zygote may stay as long as one of its sandboxes does, and be it a generic one.
    """
    found = [
        os.path.join(root, name)
        for root in cgroup_folders(server.pid)
        for name in os.listdir(root)
        if name.startswith("sb-")
    ]
    pool = server.pool()
    known = {box["id"] for box in pool["sandboxes"] + pool["zygotes"]}
    unknown = {os.path.basename(folder) for folder in found} - known
    needed = {id_ for id_ in unknown if has_sandbox(server, id_)}
    return [folder for folder in found if os.path.basename(folder) in unknown - needed]


def has_sandbox(server: Server, zygote: str) -> bool:
    """Whether one that it forked lives."""
    pids = called(server.processes(zygote), "dayfly-zygote")
    return any(len(family(pid)) > 1 for pid in pids)


# ---- want ---------------------------------------------------------------------------------------


def test_a_zygote_that_may_not_fork_costs_no_request(server: Server):
    """The kernel refuses it one process more: a sandbox is started; then another zygote forks."""
    (name,) = deploy(server, 1, "refused", "narrow")
    first = zygote(server, "narrow")
    folders = [Path(root, first, "pids.max") for root in cgroup_folders(server.pid)]
    (limit,) = [path for path in folders if path.exists()]
    limit.write_text("1")
    reply = server.invoke(name, None, "narrow")
    (box,) = [b for b in server.pool()["sandboxes"] if b["function"] == f"narrow/{name}"]

    assert (reply.status, reply.headers["Dayfly-Start"]) == (200, "created")
    assert not is_forked(server, box["id"])
    assert zygote(server, "narrow") != first
    assert eventually(lambda: forks_again(server, "narrow", "unrefused"))
    assert not eventually_none(lambda: server.processes(first))


# ---- who is not forked --------------------------------------------------------------------------


def boxes(server: Server) -> dict[str, list[bool]]:
    """Of every function's sandboxes, and of the generic ones (""): which were forked."""
    found: dict[str, list[bool]] = {}
    for box in server.pool()["sandboxes"]:
        if server.processes(box["id"]):
            found.setdefault(box["function"] or "", []).append(is_forked(server, box["id"]))
    return found


def test_what_must_not_be_forked_is_started(new_server):
    """By its spec, its operator's word on the namespace, or because its code is anybody's."""
    strict = ("--exec-namespace", "apart", "--foreign-namespace", "strangers")
    server: Server = new_server(*strict)
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "ordinary": ("default", {}),
        "by-spec": ("default", {"isolation": "exec"}),
        "by-operator": ("apart", {}),
        "foreign": ("strangers", {}),
    }
    zygote(server)
    for name, (namespace, spec) in cases.items():
        server.deploy("instance", name, namespace=namespace, minScale=2, **spec)
        assert server.invoke(name, None, namespace).status == 200
    wanted = {f"{namespace}/{name}" for name, (namespace, _) in cases.items()}

    assert eventually(lambda: all(len(boxes(server).get(name, ())) >= 2 for name in wanted))
    found = boxes(server)
    assert all(found["default/ordinary"])
    for name in wanted - {"default/ordinary"}:
        assert not any(found[name]), name
    assert {z["namespace"] for z in server.pool()["zygotes"]} == {"default"}


def test_an_operator_who_wants_no_forks_has_no_zygote(new_server):
    server: Server = new_server("--prewarm", "exec")
    names = deploy(server, 6, "started")
    replies = cold(server, names)
    found = boxes(server)

    assert [r.status for r in replies] == [200] * 6
    assert {r.headers["Dayfly-Start"] for r in replies} <= {"generic", "created"}
    assert len(found) >= 6
    assert not any(itertools.chain(*found.values()))
    assert server.pool()["zygotes"] == []
    assert not called([p.pid for p in server.family()], "dayfly-zygote")


# ---- attacks ------------------------------------------------------------------------------------


def test_a_hostile_function_reaches_neither_its_zygote_nor_its_siblings(server: Server):
    """Signals to every number, memory, sockets, its group: none finds anybody, nobody is harmed."""
    namespace = "hostile"
    server.deploy("wait", "sibling", namespace=namespace)
    server.deploy("reaches_out", "hostile", namespace=namespace, timeoutSeconds=20)
    before = zygote(server, namespace)
    caller = Running(server, namespace, "sibling", 1, seconds=1.5)
    found = {
        event: server.invoke("hostile", event, namespace).json()
        for event in ("signals", "memories", "parent", "sockets", "all")
    }
    everybody = server.invoke("hostile", "everybody", namespace)
    (reply,) = caller.replies()

    assert found == {event: [] for event in found}
    assert [is_forked(server, box) for box in caller.sandboxes] == [True]
    assert (everybody.status, everybody.json()["title"]) == (502, "Crashed")
    assert reply.status == 200
    assert zygote(server, namespace) == before
