"""One server's start and end: what is in its way, what it keeps, what it leaves."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tests.harness import DAYFLY, Server, free_port, status


def up(*arguments: str) -> tuple[int, str]:
    """`dayfly up` that is to fail: its exit code and what it says."""
    command = [str(DAYFLY), "up", "--log", "text", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_restarted_server_has_its_functions_again(new_server):
    """After SIGTERM: same functions, same versions, nothing to deploy anew."""
    server = new_server()
    name = server.deploy("instance", env={"VERSION": "kept"})
    before = server.call(name).json()
    assert server.stop() == 0
    assert not server.remains()
    server.start()

    after = server.call(name).json()

    assert after["version"] == "kept"
    assert after["instance"] != before["instance"]
    assert server.describe(name)["status"]["version"] == 1


def test_a_taken_port_is_a_clear_error_and_leaves_nothing(server: Server, tmp_path: Path):
    """The address and the way out, no traceback, a code of its own."""
    free = f"127.0.0.1:{free_port()}"
    for places in (
        ("--http", server.http, "--admin", free),
        ("--http", free, "--admin", server.admin),
    ):
        code, said = up("--data", str(tmp_path / "data"), "--generic-min", "1", *places)

        assert code != 0
        assert "Traceback" not in said
        assert (server.http if places[1] == server.http else server.admin) in said
    assert server.is_ready


def test_a_data_folder_serves_one_server_only(server: Server):
    """The second is refused and the first does not notice."""
    places = ["--http", f"127.0.0.1:{free_port()}", "--admin", f"127.0.0.1:{free_port()}"]
    code, said = up("--data", str(server.data), *places)

    assert code != 0
    assert "another server" in said
    assert "Traceback" not in said
    assert server.call(server.deploy("hello")).status == 200


@pytest.mark.parametrize("place", ["/proc/dayfly", "/dev/null/dayfly", "/dev/null"])
def test_a_data_folder_that_cannot_be_written_is_a_clear_error(place: str):
    """It names the folder and the remedy."""
    places = ["--http", f"127.0.0.1:{free_port()}", "--admin", f"127.0.0.1:{free_port()}"]
    code, said = up("--data", place, *places)

    assert code != 0
    assert place in said
    assert "--data" in said
    assert "Traceback" not in said


def test_sigint_ends_a_server_as_sigterm_does(new_server):
    """Exit code 0, nothing left; the fixture looks after the rest."""
    server: Server = new_server()
    server.call(server.deploy("hello"))
    server.kill(signal.SIGINT)

    assert server.wait() == 0
    assert not server.remains()


OPENED = """
mount --bind "$1" /mnt && mount -t tmpfs -o mode=755 tmpfs "$2" && mkdir -p "$1" &&
mount --move /mnt "$1" && shift 2 &&
exec setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps=-all --bounding-set=-all "$@"
"""
"""As uid 65534, in a mount namespace in which the interpreter's closed home is open."""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_server_needs_no_root(new_server, tmp_path: Path):
    """As an ordinary user: the same sandboxes, without control groups, and it says so."""
    python = Path(sys.base_prefix)
    closed = [p for p in reversed(python.parents) if not p.stat().st_mode & 0o001]
    where = (str(python), str(closed[0])) if closed else (str(tmp_path), str(tmp_path / "none"))
    data = Path(tempfile.mkdtemp())
    os.chown(data, 65534, 65534)
    prefix = ["unshare", "--mount", "sh", "-c", OPENED, "sh", *where]
    server: Server = new_server(data=data, prefix=prefix, env={"HOME": str(data)})

    reply = server.call(server.deploy("echo"))
    guest = next(p for p in server.family() if status(p.pid).get("Seccomp") == "2")

    assert reply.status == 200
    assert (status(guest.pid)["CapEff"].strip("0"), status(guest.pid)["NoNewPrivs"]) == ("", "1")
    assert status(guest.pid)["Uid"].split()[0] == "65534"
    assert any("no cgroups" in line for line in server.log)
    server.stop()
    shutil.rmtree(data)
