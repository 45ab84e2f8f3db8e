"""What was accepted ends once, whatever dies in between, and whatever the disk says."""

import contextlib
import http.client
import os
import shutil
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.faults.disk import failing
from tests.harness import Reply, Server, eventually

LATER = {"Prefer": "respond-async"}
NAP = "import time\ndef handler(event, context):\n    time.sleep(%s)\n    return 'slept'\n"


def outcome(server: Server, id_: str, wait_s: int = 30) -> Any:
    path, headers = f"/invocations/{id_}", {"Prefer": f"wait={wait_s}"}
    told = server.ask("GET", path, headers=headers, plane="http")
    assert told.status == 200, (id_, told.body)
    return told.json()


def outcomes(server: Server, ids: set[str]) -> Counter[tuple[str, int]]:
    """How many ended how, after how many attempts."""
    ended = [outcome(server, id_) for id_ in sorted(ids)]
    return Counter((end["state"], end["attempts"]) for end in ended)


class Senders:
    """Threads that have invocations accepted until they are told to stop."""

    def __init__(self, server: Server, name: str, number: int = 4) -> None:
        self.server, self.name = server, name
        self.accepted: set[str] = set()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._send) for _ in range(number)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException):
                reply = self.server.call(self.name, b"{}", headers=LATER)
                if reply.status == 202:
                    self.accepted.add(reply.json()["id"])

    def stop(self) -> set[str]:
        self._over.set()
        for thread in self._threads:
            thread.join(30)
        return self.accepted


def test_a_server_that_is_killed_again_and_again_loses_nothing_that_it_accepted(new_server):
    """And costs nobody an attempt, though some were running each time."""
    server: Server = new_server()
    name = server.deploy(
        "accepted-nap", files={"main.py": NAP % 0.01}, maxScale=4, retry={"attempts": 1}
    )
    senders = Senders(server, name)
    for _ in range(3):
        before = len(senders.accepted)
        eventually(lambda before=before: len(senders.accepted) > before + 100)
        server.kill(signal.SIGKILL)
        server.wait()
        server.start()
    accepted = senders.stop()

    assert len(accepted) > 300
    assert outcomes(server, accepted) == {("succeeded", 1): len(accepted)}


@pytest.mark.skipif(os.geteuid() != 0, reason="finds processes by control group")
def test_a_killed_sandbox_costs_no_attempt(server: Server):
    """Its function did nothing wrong; it is run again, and the failure can be seen."""
    name = server.deploy("accepted-nap", files={"main.py": NAP % 1.0}, retry={"attempts": 1})
    id_ = server.call(name, b"", headers=LATER).json()["id"]
    eventually(lambda: server.describe(name)["status"]["busy"])
    (box,) = server.sandboxes(name)
    for pid in server.processes(box["id"]):
        os.kill(pid, signal.SIGKILL)
    end = outcome(server, id_)
    server.delete(name)

    assert (end["state"], end["attempts"]) == ("succeeded", 1)
    assert [(f["kind"], f["counted"]) for f in end["failures"]] == [("Crashed", False)]


def test_a_function_that_ends_its_sandbox_each_time_is_not_run_for_ever(anywhere: Server):
    code = "import os\ndef handler(event, context):\n    os._exit(3)\n"
    retry = {"attempts": 2, "backoffSeconds": 0.01}
    name = anywhere.deploy("accepted-exits", files={"main.py": code}, retry=retry)
    end = outcome(anywhere, anywhere.call(name, b"", headers=LATER).json()["id"])
    anywhere.delete(name)

    assert (end["state"], end["attempts"]) == ("dead", 2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 48 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounts a file system")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "none", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_accepts_nothing_and_loses_nothing(small_disk: Path):
    """It says so before it accepts, and goes on by itself when there is room again."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(32 << 20))
    with Server(small_disk / "data", "--generic-min", "1") as server:
        name = server.deploy("accepted-nap", files={"main.py": NAP % 0.0}, maxScale=1)
        accepted: set[str] = set()

        def send() -> Reply:
            return server.call(name, os.urandom(200_000), headers=LATER)

        refused = None
        for _ in range(200):
            reply = send()
            if reply.status != 202:
                refused = reply
                break
            accepted.add(reply.json()["id"])
        assert refused is not None
        assert (refused.status, refused.json()["error"]) == (503, "StoreFailed")
        assert refused.headers["Retry-After"] == "1"
        assert "full" in refused.json()["detail"]
        assert server.ask("GET", "/ready").status == 503

        ballast.unlink()
        assert eventually(lambda: send().status == 202)
        assert server.ask("GET", "/ready").status == 200
        assert len(accepted) > 10
        assert {state for state, _ in outcomes(server, accepted)} == {"succeeded"}
        server.log[:] = [line for line in server.log if "events cannot be written" not in line]


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("strace") is None, reason="needs strace")
def test_what_cannot_be_synchronized_is_not_accepted_and_nothing_else_is_lost(new_server):
    """A broken disk: 503 and not ready while it lasts; then it goes on, with all that it had."""
    server: Server = new_server()
    name = server.deploy(
        "accepted-nap", files={"main.py": NAP % 0.05}, maxScale=1, retry={"attempts": 1}
    )

    def send() -> Reply:
        return server.call(name, b"{}", headers=LATER)

    before = {send().json()["id"] for _ in range(20)}
    with failing(server.pid, "fdatasync,fsync"):
        refused = send()
        assert (refused.status, refused.json()["error"]) == (503, "StoreFailed")
        assert server.ask("GET", "/ready").status == 503
        assert send().status == 503
    assert eventually(lambda: server.ask("GET", "/ready").status == 200)
    after = {send().json()["id"] for _ in range(20)}

    assert outcomes(server, before | after) == {("succeeded", 1): 40}
    server.log[:] = [line for line in server.log if "events cannot be written" not in line]
