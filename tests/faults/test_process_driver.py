"""The driver without isolation: what it promises when a guest dies, or will not.

It promises that whoever waits is told of a guest's death at once, with its cause; that what is
left of the guest's process group is killed; that a time limit is kept; that no guest outlives the
server. It does not promise to find what left the group: a child in a session of its own escapes,
and lives on. For those there is the `linux` driver, whose sandboxes are whole process trees.
"""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import IMPATIENT
from tests.harness import Process, Reply, Server, eventually, eventually_none, stat

CODE = """
import os, signal, sys, time

def note(path, *pids):
    with open(path + ".new", "w") as file:
        file.write(" ".join(map(str, pids)))
    os.rename(path + ".new", path)

def heir(session):
    '''A grandchild that nothing of ours ends but SIGKILL; it keeps every descriptor.'''
    ready, unready = os.pipe()
    if os.fork() == 0:
        if session == "its own":
            os.setsid()
        if os.fork() == 0:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
                signal.signal(number, signal.SIG_IGN)
            os.write(unready, str(os.getpid()).encode())
            time.sleep(3600)
        os._exit(0)
    return int(os.read(ready, 32))

def dies(event, context):
    note(event["note"], heir(event["session"]))
    os._exit(4)

def hangs(event, context):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note(event["note"], os.getpid(), heir("the guest's"))
    while True:
        time.sleep(60)

async def blocks(event, context):
    note(event["note"], os.getpid(), heir("its own"))
    time.sleep(3600)
"""
SOON_S = 5
"""Far below every time limit here but the one that is to be reached."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = IMPATIENT | {"generic_min": 1}
    with Server(tmp_path_factory.mktemp("plain"), settings=settings, driver="process") as up:
        yield up


@pytest.fixture
def noted(tmp_path: Path) -> Iterator[Path]:
    """Where a function notes processes; those that still live at the end are killed."""
    path = tmp_path / "noted"
    yield path
    for process in processes(path):
        if process.is_alive:
            os.kill(process.pid, signal.SIGKILL)


def processes(noted: Path) -> list[Process]:
    """Those noted that are still there."""
    pids = map(int, noted.read_text().split()) if noted.exists() else ()
    return [Process(pid, fields[19]) for pid in pids if (fields := stat(pid))]


def deploy(server: Server, name: str, **spec: Any) -> str:
    spec = {"timeoutSeconds": 60} | spec
    return server.deploy("", name, files={"main.py": CODE}, handler=f"main:{name}", **spec)


def fine(server: Server) -> bool:
    """Whether an ordinary function is served."""
    return server.call(server.deploy("hello")).status == 200


def phases(server: Server) -> set[str]:
    return {box["phase"] for box in server.pool()["sandboxes"]}


@pytest.mark.parametrize(
    ("way", "kind", "why"),
    [
        ("exits", "Exited", "3"),
        ("dies", "Crashed", "the sandbox exited with code 4"),
        ("segfaults", "Crashed", "the sandbox was killed by signal 11"),
        ("aborts", "Crashed", "the sandbox was killed by signal 6"),
        ("closes_everything", "Crashed", "the sandbox closed its connection"),
    ],
)
def test_a_guest_that_ends_itself_is_told_at_once_with_its_cause(
    server: Server, way: str, kind: str, why: str
):
    """As by every driver. One that only leaves the connection is killed: nobody hears it again."""
    name = server.deploy("misbehaves", timeoutSeconds=60)
    reply = server.invoke(name, way)

    assert (reply.status, reply.json()["title"]) == (502, kind)
    assert why in reply.json()["detail"]
    assert fine(server)


@pytest.mark.parametrize("session", ["the guest's", "its own"])
def test_a_death_is_told_at_once_though_a_child_keeps_the_connection(
    server: Server, noted: Path, session: str
):
    """The kernel ends a connection with its last copy; the pool does not wait for that.

    A child in the guest's session is killed then. One in a session of its own escapes: it lives
    on, and may do what the server's user may.
    """
    name = deploy(server, "dies")
    reply = server.invoke(name, {"note": str(noted), "session": session})

    assert (reply.status, reply.json()["title"]) == (502, "Crashed")
    assert "exited with code 4" in reply.json()["detail"]
    if session == "its own":
        assert [heir.is_alive for heir in processes(noted)] == [True]
    else:
        assert not eventually_none(lambda: [p for p in processes(noted) if p.is_alive], SOON_S)
    assert fine(server)


def test_a_caller_whose_request_is_still_on_its_way_is_told_too(server: Server, noted: Path):
    """The guest reads nothing more, is killed, and a child of it keeps the full connection."""
    name = deploy(server, "blocks", concurrency=2)
    replies: list[Reply] = []

    def ask(filler: str) -> None:
        replies.append(server.invoke(name, {"note": str(noted), "filler": filler}))

    callers = [threading.Thread(target=ask, args=(filler,)) for filler in ("", "x" * (4 << 20))]
    callers[0].start()
    guest, heir = eventually(lambda: processes(noted))
    callers[1].start()
    eventually(lambda: [b for b in server.sandboxes(name) if b["running"] == 2])
    os.kill(guest.pid, signal.SIGKILL)
    for caller in callers:
        caller.join(60)

    assert [(r.status, r.json()["title"]) for r in replies] == [(502, "Crashed")] * 2
    assert all("killed by signal 9" in reply.json()["detail"] for reply in replies)
    assert heir.is_alive


def test_nothing_of_the_guests_group_survives_a_timeout(server: Server, noted: Path):
    """SIGTERM is ignored by the handler and by a grandchild: both are dead after the grace."""
    name = deploy(server, "hangs", timeoutSeconds=1)
    replies: list[Reply] = []
    caller = threading.Thread(
        target=lambda: replies.append(server.invoke(name, {"note": str(noted)}))
    )
    caller.start()
    doomed = eventually(lambda: processes(noted))
    caller.join(60)
    (reply,) = replies

    assert len(doomed) == 2
    assert (reply.status, reply.json()["title"]) == (504, "TimedOut")
    assert not eventually_none(lambda: [p for p in doomed if p.is_alive], SOON_S)
    assert fine(server)


def test_no_guest_outlives_a_killed_server(new_server, noted: Path):
    """Neither generic nor idle nor busy ones, deaf to SIGTERM; the next server finds a clean house.

    Children of a guest are not promised to end then: nobody is left to kill them.
    """
    server: Server = new_server(driver="process")
    kept = server.deploy("hello")
    assert server.call(kept).status == 200
    name = deploy(server, "hangs")

    def call() -> None:
        with pytest.raises(ConnectionError):
            server.invoke(name, {"note": str(noted)})

    caller = threading.Thread(target=call)
    caller.start()
    busy, _ = eventually(lambda: processes(noted))
    eventually(lambda: phases(server) == {"generic", "idle", "busy"})
    guests = [p for p in server.family() if stat(p.pid)[1] == str(server.pid)]
    server.kill(signal.SIGKILL)
    server.wait()
    caller.join(20)

    assert busy in guests
    assert len(guests) >= 3
    assert not eventually_none(lambda: [p for p in guests if p.is_alive], SOON_S)
    server.seen.clear()
    server.start()
    assert server.call(kept).status == 200
