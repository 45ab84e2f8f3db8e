"""The escape battery inside a real sandbox: what is open is what is published, and nothing more.

Of a server that is root, whose sandboxes have a uid each, and of one that is not, whose sandboxes
all have its own.
"""

import json
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import CANARY
from tests.harness import DAYFLY, FUNCTIONS, Server, status, together

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the battery is x86-64's")
SECRET = "DAYFLY-SECRET-" + secrets.token_hex(8)
PROBES_MIN = 250
ORDINARY_UID = 54_321
"""Nobody whom this machine knows, and not the uid that stands for all who are not mapped."""

EVERYBODYS = "of the machine, the same for everybody; no function's, no tenant's"
OWN_INIT = "uid-equal, so the kernel allows it: harms this sandbox's own pid 1 and nobody else"
ALLOWED: dict[str, str] = {
    "read /proc/config.gz": "how the kernel was built: public",
    "read /proc/version": "which kernel this is: uname tells it too",
    "read /proc/cmdline": "the kernel's command line: keep secrets out of it",
    "read /proc/cpuinfo": EVERYBODYS,
    "read /proc/meminfo": EVERYBODYS,
    "read /proc/loadavg": EVERYBODYS,
    "read /proc/diskstats": EVERYBODYS,
    "read /proc/interrupts": EVERYBODYS,
    "read /proc/1/cmdline": "bwrap's: the words of our own command line, its arguments are hidden",
    "read /proc/1/mountinfo": "the same mounts as our own",
    "read /proc/1/status": "ids and counts of our own pid 1",
    "list /proc/1/fd": "numbers only: what they are cannot be read, let alone opened",
    "find the host's paths in the mount table": "names of folders; they lead nowhere from here",
    "reach a process by setpriority of pid 1": OWN_INIT,
    "reach a process by prlimit of pid 1": OWN_INIT,
    "reach a process by sched_setaffinity of pid 1": OWN_INIT,
    "run a program from memory": "functions may run any code, from files too",
    "write and run machine code": "functions may run any code; JIT compilers do this",
    "open a socket of AF_UNIX": "between a function's own processes; the host's are not in reach",
    "open a socket of AF_INET": "in a network namespace without any interface that is up",
    "open a socket of AF_INET6": "in a network namespace without any interface that is up",
    "type with /dev/ptmx to read": "makes a terminal in this sandbox's own devpts, of no use",
}
"""What is open inside, each with the reason why it may be."""

ALLOWED_WITHOUT_ROOT = ALLOWED | {
    "read /proc/keys": "names and sizes of the keys that the server's user holds: keyctl is closed",
}
"""The same when the server is not root: to the kernel its sandboxes are the same user."""

HOST_NETWORK = {
    "connect to the host's loopback",
    "connect to 0.0.0.0",
    "connect to the host by its address",
    "connect to ::1",
    "connect to ::ffff:127.0.0.1",
    "connect to the admin plane",
    "find the host's sockets in /proc/net",
    "find the host's resolver",
    "find the host's names",
    "see an interface of the host",
    "connect to 169.254.169.254",
    "connect to the internet",
    "send a datagram out",
    "connect to fd00:ec2::254",
    "connect to a name",
    "open a socket of ping",
    "connect to a path socket of the host",
}
"""What `network: host` opens besides, depending on the machine: for the operator's own code."""


def ordinary_user() -> tuple[list[str], dict[str, str]]:
    """(prefix, environment) with which an ordinary user runs `dayfly`; else skips, saying why."""
    if os.geteuid() != 0:
        pytest.skip("the suite itself runs without root: the other case is this one")
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is missing: apt-get install util-linux")
    # what setpriv itself starts is opened with root's capabilities, what `env` starts is not
    become = f"setpriv --reuid={ORDINARY_UID} --regid={ORDINARY_UID} --clear-groups env".split()
    library = sysconfig.get_path("stdlib")
    places = [p for p in sys.path if os.path.isdir(p) and not p.startswith(library)]
    env = {"PYTHONPATH": os.pathsep.join(places)}
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    why = []
    for python in (sys.executable, f"/usr/local/bin/{name}", f"/usr/bin/{name}"):
        prefix = [*become, python, "-S"]  # or old libraries of the machine's own come before ours
        tried = subprocess.run(
            [*prefix, str(DAYFLY), "--version"],
            env=os.environ | env,
            capture_output=True,
            text=True,
        )
        if tried.returncode == 0:
            return prefix, env
        why += tried.stderr.splitlines()[-1:]
    pytest.skip(f"uid {ORDINARY_UID} can run no {name} with Dayfly's libraries: {'; '.join(why)}")


@pytest.fixture(scope="module")
def ordinary() -> Iterator[Server]:
    """`dayfly up` of an ordinary user, on a data folder of its own."""
    prefix, env = ordinary_user()
    arguments = ("--foreign-namespace", "strangers")
    with tempfile.TemporaryDirectory(dir="/tmp") as data:
        os.chown(data, ORDINARY_UID, ORDINARY_UID)
        env |= {"DAYFLY_TEST_SECRET": CANARY}
        with Server(Path(data), *arguments, env=env, prefix=prefix) as up:
            assert owner(up) == ORDINARY_UID
            yield up


@pytest.fixture(scope="module", params=["server", "ordinary"])
def up(request: pytest.FixtureRequest) -> Server:
    """The session's server, and if that is root's, one that is not."""
    found: Server = request.getfixturevalue(request.param)
    return found


def owner(server: Server) -> int:
    return os.stat(f"/proc/{server.pid}").st_uid


def published(server: Server) -> set[str]:
    """What may be open in its sandboxes."""
    return set(ALLOWED if owner(server) == 0 else ALLOWED_WITHOUT_ROOT)


@pytest.fixture(scope="module")
def given(up: Server) -> Iterator[dict[str, Any]]:
    with planted(up) as found:
        yield found


@contextmanager
def planted(server: Server) -> Iterator[dict[str, Any]]:
    """Canaries on the host and in another function, and listeners that nobody may reach.

    The modes of file and socket stand in nobody's way: it is the sandbox that must.
    """
    other = server.deploy("echo", "secret-keeper", env={"SECRET": SECRET}, minScale=1)
    assert server.call(other).json()["env"]["SECRET"] == SECRET
    admin = int(server.admin.rpartition(":")[2])
    with planted_on_host(server.data, server.pid, owner(server), admin) as given:
        yield given
    server.delete(other)


@contextmanager
def planted_on_host(data: Path, server: int, uid: int, admin: int) -> Iterator[dict[str, Any]]:
    """The same for the process *server* of *uid*, with its data folder and admin plane."""
    abstract = "dayfly-test-" + secrets.token_hex(4)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp")))
        stack.enter_context(key_of(uid))
        (folder / "file").write_text(SECRET)
        dual = {"family": socket.AF_INET6, "dualstack_ipv6": True}
        if not socket.has_dualstack_ipv6():
            dual = {}
        listeners = [stack.enter_context(socket.create_server(("", 0), **dual))]
        for address in (f"\0{abstract}", str(folder / "socket")):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(address)
            listener.listen()
        for path, mode in ((folder, 0o755), (folder / "file", 0o644), (folder / "socket", 0o777)):
            path.chmod(mode)
        yield {
            "file": str(folder / "file"),
            "data": str(data),
            "server": server,
            "hostname": socket.gethostname(),
            "address": host_address(),
            "port": listeners[0].getsockname()[1],
            "admin": admin,
            "abstract": abstract,
            "socket": str(folder / "socket"),
            "tmp_mb": 8,
            "secrets_backwards": [CANARY[::-1], SECRET[::-1]],
            "etc_backwards": {name: telling(name) for name in ETC},
        }


@contextmanager
def key_of(uid: int) -> Iterator[None]:
    """A process of the user *uid* that holds a key in the kernel, as sessions of users do."""
    program = [sys.executable, "-c", KEY_HOLDER, str(uid)]
    with subprocess.Popen(program, stdin=-1, stdout=-1, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        yield


KEY_HOLDER = """
import ctypes, os, sys
uid, libc = int(sys.argv[1]), ctypes.CDLL(None)
if uid != os.getuid():
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
print("held" if libc.syscall(248, b"user", b"dayfly-test", b"x", 1, -2) > 0 else "", flush=True)
sys.stdin.read()
"""
ETC = ("passwd", "group", "hosts", "resolv.conf", "hostname")


def telling(name: str) -> str:
    """A line of the host's /etc/*name* that no made-up file would hold, backwards."""
    common = ("root:", "nobody:", "nogroup:", "127.0.0.1", "::1", "#")
    try:
        lines = Path("/etc", name).read_text().splitlines()
    except OSError:
        return ""
    return next((line[::-1] for line in lines if line and not line.startswith(common)), "")


def host_address() -> str:
    """The address by which this machine reaches others."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.2"
        return str(probe.getsockname()[0])


def battery(server: Server, given: dict[str, Any], name: str, **spec: Any) -> dict[str, str]:
    limits = {"tmpMb": 8, "memoryMb": 256}
    server.deploy("escape", name, timeoutSeconds=60, limits=limits, **spec)
    reply = server.invoke(name, given)
    assert reply.status == 200, reply.body
    verdicts: dict[str, str] = reply.json()
    return verdicts


def opened(verdicts: dict[str, str]) -> set[str]:
    return {name for name, verdict in verdicts.items() if verdict == "open"}


def test_what_is_open_inside_is_what_is_published(
    up: Server, given: dict[str, Any], capsys: pytest.CaptureFixture[str]
):
    """Neither more, nor less: the lists above are the documentation."""
    verdicts = battery(up, given, "escape")
    who = f"driver linux, server of uid {owner(up)}"
    with capsys.disabled():
        print(f"\nescape battery, {who}: {len(opened(verdicts))} open of {len(verdicts)}")

    assert not {name: v for name, v in verdicts.items() if v.startswith("error")}
    assert len(verdicts) >= PROBES_MIN
    assert opened(verdicts) == published(up)


def test_code_of_strangers_finds_no_more(up: Server, given: dict[str, Any]):
    """The same in a foreign namespace, whose modules run after the lock-down only."""
    limits = {"tmpMb": 8, "memoryMb": 256}
    up.deploy("escape", "foreign", namespace="strangers", timeoutSeconds=60, limits=limits)

    reply = up.invoke("foreign", given, namespace="strangers")

    assert opened(reply.json()) <= published(up)


def test_the_network_of_the_host_opens_the_network_and_nothing_else(
    up: Server, given: dict[str, Any]
):
    """`network: host` is asked for by name; files, processes and the kernel stay as closed."""
    verdicts = battery(up, given, "networked", network="host")
    more = opened(verdicts) - published(up)

    assert more <= HOST_NETWORK
    assert {"connect to the host's loopback", "connect to the admin plane"} <= more
    assert "connect to an abstract socket of the host" not in more
    up.delete("networked")


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_the_battery_has_teeth(server: Server, capsys: pytest.CaptureFixture[str]):
    """The same probes of an ordinary process of an unprivileged user: about a hundred are open."""
    with planted(server) as given:
        given_and_uid = [json.dumps(given), "65534"]
        program = [sys.executable, str(FUNCTIONS / "escape" / "main.py"), *given_and_uid]
        done = subprocess.run(
            program, capture_output=True, text=True, timeout=90, start_new_session=True, check=True
        )
    found = opened(json.loads(done.stdout))
    with capsys.disabled():
        print(f"\nthe same without a sandbox, uid 65534: {len(found)} open")

    assert len(found) > 3 * len(ALLOWED)
    assert {
        "find a file of the host",
        "connect to the host's loopback",
        "call add_key",
        "see processes that are not ours",
    } <= found
    assert "connect to an abstract socket of the host" in found
    assert "connect to a path socket of the host" in found
    assert "inherit a descriptor" in found


@pytest.mark.skipif(os.geteuid() != 0, reason="finds processes by control group")
@pytest.mark.parametrize("isolation", ["fork", "exec"])
def test_every_specialized_sandbox_is_locked_as_seen_from_outside(server: Server, isolation: str):
    """No capability, no new privileges, seccomp filters, an unused uid; read from /proc.

    A started sandbox has that uid alone, a forked one has its zygote's.
    """
    names = [server.deploy("wait", f"census-{i}", isolation=isolation) for i in range(6)]
    together(6, lambda i: server.invoke(names[i], {"seconds": 0}))
    functions = {f"default/{name}" for name in names}
    boxes = [box for box in server.pool()["sandboxes"] if box["function"] in functions]
    uids: dict[str, set[str]] = {}
    for box in boxes:
        for pid in server.guests(box["id"]):
            seen = status(pid)
            uids.setdefault(box["id"], set()).update(seen["Uid"].split() + seen["Gid"].split())

            assert {
                c: int(seen[c], 16) for c in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
            } == (dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), 0))
            assert (seen["NoNewPrivs"], seen["Seccomp"], seen["Groups"]) == ("1", "2", "")
            assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) >= 500

    assert len(uids) == len(boxes) >= 6
    assert all(len(seen) == 1 and int(min(seen)) >= 3_000_000 for seen in uids.values())
    assert len(set.union(*uids.values())) == (6 if isolation == "exec" else 1)
    for name in names:
        server.delete(name)
