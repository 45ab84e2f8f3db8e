"""Functions that are initialized once and forked: what their sandboxes share, how they fail, and
what a hostile import can do in its zygote and after it.

The two lists of the latter are `IN_THE_ZYGOTE`, below, and `published` of `test_escape`.
"""

import itertools
import json
import os
import platform
import signal
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from tests.conftest import CANARY
from tests.faults.test_escape import PROBES_MIN, opened, ordinary_user, planted, published
from tests.faults.test_zygotes import Running, called, unknown_groups
from tests.harness import (
    Process,
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

SETTINGS = {"generic_min": 1, "init_timeout_s": 3.0, "start_timeout_s": 4.0, "grace_s": 1.5}
"""Deadlines that a test can wait for."""

on_x86_64 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the battery is x86-64's")
fresh = itertools.count()


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server of this module: what is hostile here is not to disturb other tests."""
    with Server(tmp_path_factory.mktemp("zygotes"), settings=SETTINGS) as server:
        yield server


@pytest.fixture
def namespace(up: Server) -> Iterator[str]:
    """One that nobody else uses, so that its zygotes are the test's own."""
    name = f"tenant-{next(fresh)}"
    yield name
    clear(up, name)


def clear(server: Server, namespace: str) -> None:
    """Delete what a failed test has left, so that it is not held against the next."""
    for function in server.ask("GET", "/functions").json():
        found = function["metadata"]
        if found["namespace"] == namespace:
            server.ask("DELETE", f"/namespaces/{namespace}/functions/{found['name']}")


# ---- what the kernel, and the server, say of them ------------------------------------------------


def zygotes(server: Server, namespace: str, name: str) -> list[str]:
    """The ids of the namespace's zygotes in which a process is called *name*."""
    known = [z["id"] for z in server.pool()["zygotes"] if z["namespace"] == namespace]
    return [id_ for id_ in known if called(server.processes(id_), name)]


def keepers(server: Server, namespace: str) -> list[str]:
    """The zygotes of functions."""
    return zygotes(server, namespace, "dayfly-keeper")


def environments(server: Server, namespace: str) -> list[str]:
    """The zygotes of environments."""
    return zygotes(server, namespace, "dayfly-zygote")


def keeper_of(server: Server, zygote: str) -> int:
    """The process that keeps it."""
    (pid,) = called(server.processes(zygote), "dayfly-keeper")
    return pid


def imported_in(server: Server, zygote: str) -> int:
    """The process that has imported the function, and forks."""
    keeper = str(keeper_of(server, zygote))
    (pid,) = (pid for pid in server.processes(zygote) if stat(pid)[1:2] == [keeper])
    return pid


def launcher_of(server: Server) -> Process:
    """The server's own child."""
    return next(p for p in family(server.pid) if stat(p.pid)[1] == str(server.pid))


def alive(pids: list[int]) -> list[Process]:
    """The same processes, to be told from later ones of these numbers."""
    return [Process(pid, fields[19]) for pid in pids if (fields := stat(pid))]


def boxes(server: Server, namespace: str, name: str) -> list[str]:
    """The sandboxes of a function."""
    found = server.pool()["sandboxes"]
    return [box["id"] for box in found if box["function"] == f"{namespace}/{name}"]


def remove(server: Server, namespace: str, name: str) -> None:
    """Delete the function; at the end nothing of it is left."""
    path = f"/namespaces/{namespace}/functions/{name}"
    assert server.ask("DELETE", path).status in (200, 204)
    assert not eventually_none(lambda: boxes(server, namespace, name) + keepers(server, namespace))
    assert not eventually_none(lambda: unknown_groups(server))


def siblings(server: Server, namespace: str, name: str, number: int) -> dict[str, Any]:
    """What *number* different sandboxes of `twin` say of themselves, by their `fork`."""
    found: dict[str, Any] = {}

    def ask() -> bool:
        event = {"seconds": 0.1}
        for reply in together(number, lambda _: server.invoke(name, event, namespace)):
            assert reply.status == 200, reply.body
            found[reply.json()["differs"]["fork"]] = reply.json()
        return len(found) >= number

    assert eventually(ask), f"{len(found)} sandboxes"
    return found


def cold(server: Server, namespace: str, name: str, event: Any = None) -> Reply:
    """An invocation that no sandbox of before answers; the function keeps none alive."""
    assert not eventually_none(lambda: boxes(server, namespace, name))
    return server.invoke(name, event, namespace)


def lines(server: Server, namespace: str, name: str) -> list[str]:
    """What the function wrote."""
    return [line["text"] for line in server.logs(name, namespace)]


def verdict(reply: Reply) -> str:
    """ "served", or the failure's name."""
    return "served" if reply.status == 200 else str(reply.json()["title"])


# ---- one import, many sandboxes ------------------------------------------------------------------


def test_sandboxes_of_one_import_share_what_it_made_and_nothing_else(up: Server, namespace: str):
    """The import ran once; names, numbers, files, namespaces and rights are each sandbox's own."""
    up.deploy("twin", namespace=namespace, initialize="once", maxScale=4)
    first = up.invoke("twin", {}, namespace)
    found = list(siblings(up, namespace, "twin", 4).values())
    differs = [sibling["differs"] for sibling in found]
    alike = {
        name: [d[name] for d in differs]
        for name in differs[0]
        if len({d[name] for d in differs}) < len(differs)
    }

    assert first.headers["Dayfly-Start"] in ("forked", "generic")
    assert len({sibling["token"] for sibling in found}) == 1
    assert lines(up, namespace, "twin").count("imported") == 1
    assert not alike
    assert [sibling["jail"] for sibling in found] == [JAIL] * len(found)
    remove(up, namespace, "twin")


JAIL = {
    "processes": 2,
    "parent": 0,
    "temporary files": [],
    "shared files": [],
    "packages": [],
    "working folder": "/code",
    "the import's socket": False,
    "host name": "dayfly",
    "ids": [1000, 1000],
    "CapInh": 0,
    "CapPrm": 0,
    "CapEff": 0,
    "CapBnd": 0,
    "CapAmb": 0,
    "NoNewPrivs": "1",
    "Seccomp": "2",
}


def test_a_generator_of_the_modules_own_goes_on_alike_in_every_fork(up: Server, namespace: str):
    """As documented: it is for `after_fork` to seed it, we do not know of it."""
    up.deploy("twin", namespace=namespace, initialize="once", minScale=3)
    found = siblings(up, namespace, "twin", 3).values()

    assert len({sibling["alike"] for sibling in found}) == 1
    remove(up, namespace, "twin")


SLOW = "import time\ntime.sleep(0.3)\n"
HANDLER = "import os\nTOKEN = os.urandom(8).hex()\ndef handler(event, context):\n    return TOKEN\n"


def status_of(server: Server, namespace: str, name: str) -> dict[str, Any]:
    """What the API says of the function's state."""
    path = f"/namespaces/{namespace}/functions/{name}"
    found: dict[str, Any] = server.ask("GET", path).json()["status"]
    return found


def test_a_function_with_a_slow_import_gets_a_zygote_by_itself(up: Server, namespace: str):
    """The first sandbox imports; later ones are forked, and have one import in common."""
    code = {"main.py": SLOW + HANDLER}
    up.deploy("slow", "slow", namespace=namespace, files=code, keepAliveSeconds=0)
    first = up.invoke("slow", None, namespace).json()
    assert eventually(lambda: keepers(up, namespace))
    assert eventually(lambda: status_of(up, namespace, "slow").get("zygoteMemoryBytes"))
    tokens = [cold(up, namespace, "slow").json() for _ in range(3)]

    assert status_of(up, namespace, "slow")["initialize"] == "once"
    assert len(set(tokens)) == 1
    assert first not in tokens
    remove(up, namespace, "slow")


@pytest.mark.parametrize(
    ("left", "code"),
    [
        ("a quick import", ""),
        ("a thread", "import threading\nthreading.Thread(target=time.sleep, args=(99,)).start()\n"),
        ("a socket", "import socket\ns = socket.create_server(('127.0.0.1', 0))\n"),
        ("a child", "import os\npid = os.fork()\nif pid == 0:\n    while True: time.sleep(99)\n"),
    ],
)
def test_what_no_fork_could_share_keeps_a_function_from_being_forked(
    up: Server, namespace: str, left: str, code: str
):
    """Each sandbox imports for itself, as ever; the API says why."""
    slow = "import time\n" if left == "a quick import" else SLOW
    files = {"main.py": slow + code + HANDLER}
    up.deploy("left", "left", namespace=namespace, files=files, keepAliveSeconds=0)
    tokens = [cold(up, namespace, "left").json() for _ in range(3)]
    says = status_of(up, namespace, "left")

    assert len(set(tokens)) == 3
    assert says["initialize"] == "each", says
    assert not keepers(up, namespace)
    remove(up, namespace, "left")


def test_who_declares_it_may_leave_files_and_sockets_open(up: Server, namespace: str):
    """`once` is the user's word for it that the forks can do with them."""
    env = {"WAY": "leaves_a_socket"}
    up.deploy("imports", namespace=namespace, initialize="once", env=env)

    assert verdict(up.invoke("imports", None, namespace)) == "served"
    assert keepers(up, namespace)
    remove(up, namespace, "imports")


@pytest.mark.parametrize("spec", [{"isolation": "exec"}, {"network": "host"}])
def test_who_is_not_forked_has_no_zygote_and_is_served(
    up: Server, namespace: str, spec: dict[str, Any]
):
    """Whatever it declares: the zygote is less confined than its forks are."""
    up.deploy("twin", namespace=namespace, initialize="once", **spec)
    reply = up.invoke("twin", {}, namespace)

    assert reply.status == 200, reply.body
    assert not keepers(up, namespace)
    remove(up, namespace, "twin")


def test_a_driver_that_isolates_nothing_imports_in_each(process_server: Server):
    process_server.deploy("hello", "declares-once", initialize="once")

    assert process_server.call("declares-once").status == 200
    assert process_server.pool()["zygotes"] == []
    process_server.delete("declares-once")


def test_a_server_without_control_groups_imports_in_each():
    """Nothing would limit what the import takes; it says so, and serves."""
    prefix, env = ordinary_user()
    with TemporaryDirectory(prefix="dayfly-once-") as data:
        os.chown(data, 54_321, 54_321)
        with Server(Path(data), "--generic-min", "1", env=env, prefix=prefix) as server:
            server.deploy("hello", "once", initialize="once")

            assert server.call("once").status == 200
            assert server.describe("once")["status"]["initialize"] == "each"


def test_a_packages_own_names_win_in_its_forks_too(up: Server, namespace: str):
    """A module that is called as one of ours is: the runtime still finds its own."""
    up.deploy("own_names", namespace=namespace, initialize="once")
    reply = up.invoke("own-names", None, namespace)

    assert (reply.status, reply.body) == (200, b'["mine","mine","mine","mine","mine"]')
    remove(up, namespace, "own-names")


@pytest.mark.parametrize(
    ("way", "most", "refusal"),
    [
        ("files", 250, "EMFILE"),
        ("inotify", 128, "EMFILE"),
        ("space", 8, "ENOSPC"),
        ("shm", 8, "ENOSPC"),
        ("inodes", 2048, "ENOSPC"),
    ],
)
def test_what_a_fork_can_take_is_bounded_as_ever(up: Server, way: str, most: int, refusal: str):
    """The limits of its spec, though it did not start with them."""
    name = up.deploy("exhausts", namespace="bounded", initialize="once", limits={"tmpMb": 8})

    taken, error = up.invoke(name, way, "bounded").json()

    assert keepers(up, "bounded")
    assert (error, taken <= most) == (refusal, True), taken


def test_orphans_of_a_fork_are_buried(up: Server):
    """By pid 1 of its sandbox, which is not its parent."""
    name = up.deploy("exhausts", namespace="bounded", initialize="once", limits={"tmpMb": 8})

    assert up.invoke(name, "zombies", "bounded").json() < 20


# ---- hooks ---------------------------------------------------------------------------------------


def test_hooks_run_once_in_the_zygote_and_once_in_every_fork(up: Server, namespace: str):
    """And in this order; the one in the fork before its first event."""
    up.deploy("hooked", namespace=namespace, initialize="once", keepAliveSeconds=0)
    replies = [cold(up, namespace, "hooked") for _ in range(3)]
    ran = [reply.json()["ran"] for reply in replies]
    texts = lines(up, namespace, "hooked")

    assert [[name for name, _ in each] for each in ran] == [["before", "after"]] * 3
    assert len({before for (_, before), _ in ran}) == 1
    assert [after for _, (_, after) in ran] == [reply.json()["pid"] for reply in replies]
    assert (texts.count("before"), texts.count("after")) == (1, 3)
    remove(up, namespace, "hooked")


def test_hooks_do_not_run_where_nothing_is_forked(up: Server, namespace: str):
    up.deploy("hooked", namespace=namespace, initialize="each")

    assert up.invoke("hooked", None, namespace).json()["ran"] == []
    remove(up, namespace, "hooked")


@pytest.mark.parametrize("hook", ["before", "after"])
def test_a_hook_that_raises_is_the_functions_failure(up: Server, namespace: str, hook: str):
    """Told with its cause and its traceback, as an import that fails."""
    env = {"RAISES": hook}
    up.deploy("hooked", namespace=namespace, initialize="once", env=env)
    reply = up.invoke("hooked", None, namespace)

    assert (reply.status, reply.json()["title"]) == (502, "ImportFailed")
    assert reply.json()["detail"] == f"ValueError: {hook} is broken"
    assert f"in {hook}" in reply.json()["traceback"]
    remove(up, namespace, "hooked")


# ---- versions ------------------------------------------------------------------------------------


def test_a_new_version_is_never_forked_from_an_old_zygote(up: Server, namespace: str):
    """Deployed again and again under load: each caller gets the version that is deployed."""
    tokens: dict[str, set[str]] = {}

    def ask(_: int) -> Reply:
        return up.invoke("twin", {}, namespace)

    for version in map(str, range(6)):
        env = {"VERSION": version}
        up.deploy("twin", namespace=namespace, initialize="once", env=env, keepAliveSeconds=0)
        for reply in together(4, ask):
            assert reply.status == 200, reply.body
            assert reply.json()["version"] == version
            tokens.setdefault(version, set()).add(reply.json()["token"])

    everybody = [token for found in tokens.values() for token in found]
    assert len(set(everybody)) == len(everybody)
    assert len(eventually_none(lambda: keepers(up, namespace)[1:])) == 0
    remove(up, namespace, "twin")


def test_a_deleted_function_leaves_no_zygote(up: Server, namespace: str):
    """Nor its processes and groups; one that runs is served to its end."""
    up.deploy("wait", namespace=namespace, initialize="once")
    running = Running(up, namespace, "wait", 1, seconds=1)
    (zygote,) = keepers(up, namespace)
    seen = alive(up.processes(zygote))

    remove(up, namespace, "wait")

    assert [reply.status for reply in running.replies()] == [200]
    assert len(seen) == 2
    assert not eventually_none(lambda: [process for process in seen if process.is_alive])


# ---- deaths --------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["zygote", "keeper", "environment", "init", "guest"])
def test_who_ends_with_whom(up: Server, namespace: str, victim: str):
    """A zygote's death is that of its sandboxes, a sandbox's its own; then all is served again."""
    all_end = victim in ("zygote", "keeper", "environment")
    other = f"{namespace}-other"
    up.deploy("until_told", "once", namespace=namespace, initialize="once")
    up.deploy("until_told", "each", namespace=namespace, initialize="each")
    up.deploy("until_told", "once", namespace=other, initialize="once")
    doomed = Running(up, namespace, "once", 2)
    beside, apart = Running(up, namespace, "each", 1), Running(up, other, "once", 1)
    (zygote,), (environment,) = keepers(up, namespace), environments(up, namespace)
    box = up.processes(doomed.sandboxes[0])
    ended = alive([pid for id_ in doomed.sandboxes for pid in up.processes(id_)])
    (pid,) = {
        "zygote": lambda: [imported_in(up, zygote)],
        "keeper": lambda: [keeper_of(up, zygote)],
        "environment": lambda: called(up.processes(environment), "dayfly-zygote"),
        "init": lambda: called(box, "dayfly-init"),
        "guest": lambda: up.guests(doomed.sandboxes[0]),
    }[victim]()

    os.kill(pid, signal.SIGKILL)
    after = up.invoke("once", {"seconds": 0}, namespace)
    assert not eventually_none(lambda: up.processes(doomed.sandboxes[0]))
    for id_ in (*doomed.sandboxes, *beside.sandboxes, *apart.sandboxes):
        for guest in up.guests(id_):
            os.kill(guest, signal.SIGUSR1)
    told = sorted(verdict(reply) for reply in doomed.replies())

    assert told == (["Crashed"] * 2 if all_end else ["Crashed", "served"])
    assert verdict(beside.replies()[0]) == ("Crashed" if victim == "environment" else "served")
    assert verdict(apart.replies()[0]) == "served"
    assert after.status == 200, after.body
    assert not eventually_none(lambda: [p for p in ended[:2] if p.is_alive])
    again = eventually(lambda: keepers(up, namespace))
    assert (again == [zygote]) != all_end
    for name in ("once", "each"):
        remove(up, namespace, name)
    remove(up, other, "once")


def test_deaths_leave_nothing_open_in_launcher_and_server(up: Server, namespace: str):
    """Zygotes, keepers and sandboxes, killed again and again: as many descriptors as before."""
    up.deploy("wait", namespace=namespace, initialize="once", keepAliveSeconds=0)
    launcher = launcher_of(up)

    def at_rest() -> bool:
        up.invoke("wait", {"seconds": 0}, namespace)
        return bool(keepers(up, namespace) and not boxes(up, namespace, "wait"))

    def held() -> list[int]:
        """Descriptors, besides those of each sandbox and zygote that there is."""
        pool, pids = up.pool(), (launcher.pid, up.pid)
        there = len(pool["sandboxes"]) + len(pool["zygotes"])
        return [len(os.listdir(f"/proc/{pid}/fd")) - 2 * there for pid in pids]

    assert eventually(at_rest)
    before = held()
    for find in [imported_in, keeper_of] * 2:
        (zygote,) = eventually(lambda: keepers(up, namespace))
        running = Running(up, namespace, "wait", 1)
        os.kill(find(up, zygote), signal.SIGKILL)
        assert [verdict(reply) for reply in running.replies()] == ["Crashed"]
        assert eventually(at_rest)

    assert eventually(lambda: max(map(int.__sub__, held(), before)) <= 2), (before, held())
    assert launcher.is_alive
    remove(up, namespace, "wait")


@pytest.mark.parametrize(
    ("way", "told"),
    [
        ("dies", "the sandbox exited with code 4"),
        ("dies_with_heirs", "the sandbox exited with code 4"),
        ("segfaults", "the sandbox was killed by signal 11"),
        ("aborts", "the sandbox was killed by signal 6"),
        ("kills_everybody", "the sandbox was killed by signal 9"),
        ("closes_everything", "the sandbox closed its connection"),
    ],
)
def test_a_handler_that_dies_in_a_fork_is_told_how(up: Server, way: str, told: str):
    """Its sandbox is gone with all that it had forked; the zygote is not."""
    name = up.deploy("misbehaves", namespace="mortals", initialize="once")
    assert up.invoke(name, {"rawPath": "/behaves"}, "mortals").status == 200
    (box,), (zygote,) = boxes(up, "mortals", name), keepers(up, "mortals")
    seen = alive(up.processes(box))

    def die() -> bool:
        reply = up.invoke(name, {"rawPath": f"/{way}"}, "mortals")
        assert (reply.status, reply.json()["title"]) == (502, "Crashed")
        return bool(reply.json()["detail"] == told)  # if it is known in time

    assert die() or eventually(die)
    after = up.invoke(name, {"rawPath": "/behaves"}, "mortals")

    assert after.status == 200
    assert len(seen) == 2
    assert not eventually_none(lambda: [process for process in seen if process.is_alive])
    assert not eventually_none(lambda: up.processes(box))
    assert keepers(up, "mortals") == [zygote]


def test_memory_that_runs_out_in_a_fork_is_told_and_costs_no_sibling(up: Server, namespace: str):
    up.deploy("glutton", namespace=namespace, initialize="once", limits={"memoryMb": 48})
    titles = [verdict(up.invoke("glutton", None, namespace)) for _ in range(3)]

    assert titles == ["OutOfMemory"] * 3
    assert len(keepers(up, namespace)) == 1
    remove(up, namespace, "glutton")


@pytest.mark.parametrize("event", ["alone", "with a child", "with an orphan"])
def test_a_fork_is_asked_to_end_at_its_deadline_and_then_made_to(
    up: Server, namespace: str, event: str
):
    """SIGTERM reaches the process that runs the handler, whatever it has forked; then all die."""
    up.deploy("asked_to_end", namespace=namespace, initialize="once", timeoutSeconds=0.5)
    seen: set[Process] = set()

    def is_asked() -> bool:
        for box in known:
            seen.update(alive(up.processes(box)))
        return bool(called([process.pid for process in seen], "was-asked"))

    known: set[str] = set()

    def work(i: int) -> Any:
        if i == 0:
            return up.invoke("asked-to-end", event, namespace)
        known.update(eventually(lambda: boxes(up, namespace, "asked-to-end")))
        return eventually(is_asked, within_s=4)

    reply, was_asked = together(2, work)

    assert verdict(reply) == "TimedOut"
    assert len(seen) >= (2 if event == "alone" else 3)
    assert not eventually_none(lambda: [process for process in seen if process.is_alive])
    assert was_asked
    remove(up, namespace, "asked-to-end")


# ---- want ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("file", "limit"), [("pids.max", 1), ("memory.limit_in_bytes", 0)])
def test_a_zygote_that_may_not_fork_costs_no_request(
    up: Server, namespace: str, file: str, limit: int
):
    """The kernel refuses it a process, or memory for one: its function is served without it."""
    up.deploy("twin", namespace=namespace, initialize="once", keepAliveSeconds=0)
    assert up.invoke("twin", {}, namespace).status == 200
    assert not eventually_none(lambda: boxes(up, namespace, "twin"))
    (zygote,) = keepers(up, namespace)
    paths = [Path(root, zygote, file) for root in cgroup_folders(up.pid)]
    (path,) = [path for path in paths if path.exists()]
    usage = path.with_name("memory.usage_in_bytes")
    path.write_text(str(limit or int(usage.read_text()) + 16384))

    codes = [reply.status for reply in together(4, lambda _: up.invoke("twin", {}, namespace))]

    assert codes == [200] * 4
    assert eventually(lambda: keepers(up, namespace) not in ([], [zygote]))
    assert up.invoke("twin", {}, namespace).status == 200
    remove(up, namespace, "twin")


def test_a_machine_that_is_short_of_memory_still_serves(tmp_path: Path):
    """No zygote is made for it then; its sandboxes import for themselves."""
    settings = SETTINGS | {"memory_reserve_mb": 1 << 24}
    with Server(tmp_path / "data", settings=settings) as server:
        assert eventually(lambda: [line for line in server.log if "is short of memory" in line])
        server.deploy("twin", initialize="once")

        assert server.invoke("twin", {}).status == 200
        assert not keepers(server, "default")


# ---- imports that should not be ------------------------------------------------------------------

FAILURES = {
    "exits": {"InitCrashed"},
    "segfaults": {"InitCrashed"},
    "raises": {"ImportFailed"},
    "hangs": {"InitTimedOut"},
    "stops_itself": {"InitTimedOut"},
    "spins": {"InitTimedOut"},
    "is_a_fork_bomb": {"InitTimedOut"},
    "takes_memory": {"OutOfMemory"},
    "closes_everything": {"InitCrashed"},
    "fills_all_descriptors": {"InitCrashed"},
    "forks_twice": {"ProtocolViolation", "InitCrashed", "Crashed", "served"},  # whoever is first
    "kills_its_group": {"InitCrashed"},
    "speaks_on_the_connection": {"ProtocolViolation"},
    "breaks_the_runtime": {"InitCrashed"},
}
"""What the callers are told; those of the others are served, by its zygote or without it."""

WAYS = (
    *FAILURES,
    *("behaves", "waits_for_a_child", "leaves_a_child", "leaves_a_daemon", "leaves_a_thread"),
    *("leaves_a_fork_bomb", "closes_its_seat", "ignores_signals", "ignores_dead_children"),
    *("handles_dead_children", "blocks_signals", "forks_no_more", "forks_nothing"),
    *("takes_itself_for_the_child", "says_garbage", "says_nothing", "says_much", "says_an_array"),
    *("says_deep_things", "says_numbers_that_are_none", "says_infinity", "says_huge_numbers"),
    *("says_odd_codes", "says_odd_names", "says_that_all_have_ended", "passes_descriptors"),
    *("talks_without_end", "kills_everybody", "kills_pid_1", "interrupts_pid_1", "wakes_pid_1"),
    *("cripples_pid_1", "leaves_its_namespaces", "limits_itself", "cannot_be_looked_at"),
    "prints_without_end",
)


@pytest.fixture(scope="module")
def street(up: Server) -> str:
    """A namespace with an ordinary function, each of whose calls starts a sandbox."""
    up.deploy("instance", "neighbour", namespace="street", keepAliveSeconds=0)
    assert up.invoke("neighbour", None, "street").status == 200
    assert eventually(lambda: environments(up, "street"))
    return "street"


@pytest.mark.parametrize("way", WAYS)
def test_an_import_that_does_what_it_should_not_harms_itself_only(
    up: Server, street: str, way: str
):
    """Its caller is answered; a neighbour, the environment's zygote, the launcher do not notice."""
    name = way.replace("_", "-")
    spec: dict[str, Any] = {"initialize": "once", "env": {"WAY": way}, "limits": {"memoryMb": 64}}
    before = (launcher_of(up), environments(up, street))
    up.deploy("imports", name, namespace=street, timeoutSeconds=10, **spec)
    reply, beside = together(2, lambda i: up.invoke("neighbour" if i else name, None, street))
    again = up.invoke(name, None, street)
    after = cold(up, street, "neighbour")

    assert verdict(reply) in FAILURES.get(way, {"served"}), reply.body
    assert verdict(again) in FAILURES.get(way, {"served"}), again.body
    assert [beside.status, after.status] == [200, 200]
    assert (launcher_of(up), environments(up, street)) == before
    assert launcher_of(up).is_alive
    remove(up, street, name)


@pytest.mark.parametrize("way", ["leaves_a_child", "leaves_a_thread"])
def test_what_a_quick_import_leaves_behind_is_seen_too(up: Server, namespace: str, way: str):
    """No fork would have it: as documented, each sandbox imports, however short that is."""
    env = {"WAY": way}
    up.deploy("imports", namespace=namespace, initialize="once", env=env)

    assert up.invoke("imports", None, namespace).status == 200
    assert status_of(up, namespace, "imports")["initialize"] == "each"
    remove(up, namespace, "imports")


def test_a_zygote_speaks_for_no_sandbox_but_its_own(up: Server, namespace: str):
    """How others end is told as it was, whatever a zygote has said of all that there may be."""
    env = {"WAY": "talks_without_end"}
    other = f"{namespace}-other"
    up.deploy("imports", "talker", namespace=namespace, initialize="once", env=env)
    up.invoke("talker", None, namespace)  # which it may well say has ended: it is its own
    assert eventually(lambda: keepers(up, namespace))
    victims = [(namespace, "each"), (other, "each"), (other, "once")]
    for where, initialize in victims:
        up.deploy("misbehaves", f"dies-{initialize}", namespace=where, initialize=initialize)

    def die(i: int) -> Reply:
        where, initialize = victims[i % len(victims)]
        return up.invoke(f"dies-{initialize}", {"rawPath": "/dies"}, where)

    told = {reply.json()["detail"] for _ in range(20) for reply in together(6, die)}

    # on a busy machine the code may come too late to be told, but never a wrong one
    assert "the sandbox exited with code 4" in told
    assert told <= {"the sandbox exited with code 4", "the sandbox closed its connection"}
    clear(up, other)
    remove(up, namespace, "talker")


@pytest.mark.parametrize("who", ["a child", "one after the other", "itself", "its keeper"])
def test_nobody_stays_in_the_groups_of_a_sandbox_that_has_ended(
    up: Server, namespace: str, who: str
):
    """Or each start would give a hostile zygote the memory and processes of one sandbox more."""
    spec: dict[str, Any] = {"env": {"WHO": who}, "initialize": "once", "keepAliveSeconds": 0}
    up.deploy("haunts", namespace=namespace, **spec)
    told = [cold(up, namespace, "haunts") for _ in range(3)]

    assert [reply.status for reply in told] == [200] * 3
    assert not eventually_none(lambda: boxes(up, namespace, "haunts"))
    assert not eventually_none(lambda: unknown_groups(up), within_s=5)
    remove(up, namespace, "haunts")


def test_a_zygote_has_no_moment_to_enter_the_pid_1_of_its_sandboxes(up: Server, namespace: str):
    """That process has no filter, and for a while the launcher's connection.

    It has the rights of its keeper, which keep the zygote out, until it is out of reach for good.
    """
    up.deploy("lurks", namespace=namespace, initialize="once", keepAliveSeconds=0)
    assert eventually(lambda: cold(up, namespace, "lurks").json()["seen"] >= 40, within_s=30)
    tally = cold(up, namespace, "lurks").json()

    assert keepers(up, namespace)
    assert tally["opened"] == 0, tally
    remove(up, namespace, "lurks")


# ---- the escape battery --------------------------------------------------------------------------

ITS_OWN = "its own, which Landlock keeps other sandboxes from writing, and nobody else reads"
ITS_KEEPER = "its keeper's, which it can end anyway: all that ends with that is the function's"
WHERE_IT_IS = "it is there already; its forks enter their own so"
NO_SIGNAL = (
    "as pid 1 the keeper gets none but SIGINT, which ends it with all that is the function's"
)
IN_THE_ZYGOTE: dict[str, str] = {
    "call landlock_create_ruleset": "its forks confine themselves with it",
    "change oom_score_adj to what a process is born with": "not harmless: when the machine has no "
    "memory left the kernel spares it; closed where the launcher has CAP_SYS_RESOURCE",
    "change our own machine code through /proc/self/mem": "it may write and run any as it is",
    "gain a file of root": "its own user: uid 0 is what it is called before the lock-down",
    "gain more processes": "its control group holds it, and not this limit",
    "gain the bounding set": "the four capabilities that it has",
    "in a user namespace of our own, make another": "32 deep, and nothing else is open there; "
    "how many there are in all should be bounded",
    "inherit a descriptor": "4, the seat, on which its keeper believes it nothing of others",
    "reach a process by a pidfd signal to pid 1": NO_SIGNAL,
    "reach a process by kill 0 of pid 1": NO_SIGNAL,
    "reach a process by tgkill of pid 1": NO_SIGNAL,
    "setns to our own mnt": WHERE_IT_IS,
    "setns to our own net": WHERE_IT_IS,
    "setns to our own pid": WHERE_IT_IS,
    "type with /dev/ptmx": "makes a terminal in its own devpts, of no use",
    "unshare user": "its forks do; for what is open in there see `in a user namespace of our own`",
    "write to /proc/1/autogroup": ITS_KEEPER,
    "write to /proc/1/clear_refs": ITS_KEEPER,
    "write to /proc/1/coredump_filter": ITS_KEEPER,
    "write to /proc/1/oom_score_adj": ITS_KEEPER,
    "write to /proc/self/clear_refs": ITS_OWN,
    "write to /proc/self/comm": ITS_OWN,
    "write to /proc/self/coredump_filter": ITS_OWN,
    "write to /proc/self/loginuid": ITS_OWN,
    "write to /proc/self/timerslack_ns": ITS_OWN,
    "write to /proc/sys/kernel/ns_last_pid": "the numbers of the processes in its own namespace",
}
"""What is open in a function's zygote besides what is open in every sandbox, and why it may be.

A hostile import decides what its forks do, so it is open in them too.
"""

NOT_IN_THE_ZYGOTE = {
    "reach a process by setpriority of pid 1",
    "reach a process by sched_setaffinity of pid 1",
}
"""What is open in a sandbox only: its pid 1 has no more rights than it has itself."""

NOT_TRIED = {"reach a process by prlimit of pid 1"}
"""It is open, and ends the keeper: see `cripples_pid_1`."""

CAP_SYS_RESOURCE = 24


@pytest.fixture(scope="module")
def besieged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that lets an import take as long as the battery takes."""
    settings = {"generic_min": 1, "init_timeout_s": 60.0}
    env = {"DAYFLY_TEST_SECRET": CANARY}
    with Server(tmp_path_factory.mktemp("besieged"), settings=settings, env=env) as server:
        yield server


@pytest.fixture(scope="module")
def given(besieged: Server) -> Iterator[dict[str, Any]]:
    with planted(besieged) as found:
        yield found


def battery(server: Server, name: str, event: Any, initialize: str, **env: str) -> dict[str, str]:
    """The verdict on each probe."""
    spec: dict[str, Any] = {
        "initialize": initialize,
        "env": env,
        "limits": {"tmpMb": 8, "memoryMb": 256},
    }
    server.deploy("escape", name, timeoutSeconds=60, **spec)
    reply = server.invoke(name, event)
    assert reply.status == 200, reply.body
    assert server.describe(name)["status"]["initialize"] == initialize
    assert bool(keepers(server, "default")) == (initialize == "once")
    remove(server, "default", name)
    verdicts: dict[str, str] = reply.json()
    assert not {name: v for name, v in verdicts.items() if v.startswith("error")}
    assert len(verdicts) >= PROBES_MIN
    return verdicts


def open_in_a_zygote(server: Server) -> set[str]:
    """What is published."""
    rights = int(status(launcher_of(server).pid)["CapEff"], 16)
    spared = {"change oom_score_adj to what a process is born with"}
    closed = spared if rights >> CAP_SYS_RESOURCE & 1 else set()
    return published(server) | IN_THE_ZYGOTE.keys() - closed


@on_x86_64
def test_what_is_open_during_the_import_is_what_is_published(
    besieged: Server, given: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    """Neither more nor less, in the zygote itself, while it imports."""
    told = json.dumps({"given": given, "but": sorted(NOT_TRIED)})
    verdicts = battery(besieged, "imported", "imported", "once", ESCAPE=told)
    wanted = open_in_a_zygote(besieged) - NOT_IN_THE_ZYGOTE - NOT_TRIED
    with capsys.disabled():
        print(f"\nescape battery, importing: {len(opened(verdicts))} open of {len(verdicts)}")

    assert opened(verdicts) == wanted


@on_x86_64
def test_a_fork_of_a_function_is_as_closed_as_any_sandbox(besieged: Server, given: dict[str, Any]):
    """Verdict by verdict, with the same errors: it took the same lock-down."""
    forked = battery(besieged, "forked", given, "once")
    ordinary = battery(besieged, "ordinary", given, "each")

    assert opened(forked) == published(besieged)
    assert forked == ordinary


@on_x86_64
def test_a_fork_that_was_kept_from_its_lock_down_can_no_more_than_the_import(
    besieged: Server, given: dict[str, Any]
):
    """A hostile import skips it: then it is in a sandbox as in the zygote, and reaches nobody.

    Its pid 1 there has a namespace's rights no more, and no filter: it must be out of reach.
    """
    verdicts = battery(besieged, "unlocked", given, "once", UNLOCKED="1")

    assert "call landlock_create_ruleset" in opened(verdicts)  # it has not taken the filter
    assert opened(verdicts) - open_in_a_zygote(besieged) == set()
