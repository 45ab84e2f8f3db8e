"""What every driver promises, asked of each: the fake one, plain processes, isolated sandboxes."""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from msgspec import structs
from tests.harness import Process, eventually_none, family, pack, stat, status

from dayfly.capabilities import ZYGOTE_CAP_EFF
from dayfly.protocol import (
    PROTOCOL,
    Failed,
    Fetch,
    FrameReader,
    Hello,
    Invoke,
    Load,
    Loaded,
    Log,
    Message,
    Piece,
    Result,
    decode,
    encode,
)
from dayfly_pool import driver as drivers
from dayfly_pool.config import Config
from dayfly_pool.driver import Driver, Exit
from dayfly_pool.drivers.cgroups import Tree
from dayfly_pool.drivers.linux import LinuxDriver, find_bwrap
from dayfly_pool.errors import SandboxStartFailed, ZygoteUnfit
from dayfly_pool.models import BASE, Environment, Function, Limits, Mold, SandboxId
from dayfly_pool.testing import Ended, FakeDriver, FakeGuest, function

SOON_S = 20.0
BASE_MOLD, BASE_ENVIRONMENT = Mold(BASE), Environment(digest=BASE)
TENANT_MOLD = Mold(BASE, namespace="default")
S1, S2 = SandboxId("sb-1"), SandboxId("sb-2")
Z1, Z2 = SandboxId("sb-z1"), SandboxId("sb-z2")
K1, K2 = SandboxId("sb-z8"), SandboxId("sb-z9")
"""Zygotes that keep a function."""

MARK = f"86400.{os.getpid()}"
"""How long the functions' child processes sleep: by it they are found, whatever sees them."""

UID_FIRST = 3_500_000
GROUP, SESSION, NICE = 2, 3, 16
"""Where /proc/PID/stat has them, counted from the state on."""

CODE = f"""
import ctypes, errno, json, os, signal, socket, subprocess, sys, time

TOKEN = os.urandom(8).hex()

def greet(event, context):
    return f"hello {{event}}"

def leave(event, context):
    os._exit(event)

def die(event, context):
    os.kill(os.getpid(), event)

def obey(event, context):
    signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
    print("ready", flush=True)
    time.sleep(86400)

def defy(event, context):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("ready", flush=True)
    time.sleep(86400)

def breed(event, context):
    for _ in range(3):
        subprocess.Popen(["sleep", "{MARK}"])
    return len(mine())

def bequeath(event, context):
    # a child that knows no parent and no SIGTERM keeps the connection
    ready, unready = os.pipe()
    if os.fork() == 0:
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.set_inheritable(3, True)
            os.execvp("sleep", ["sleep", "{MARK}"])
        os._exit(0)
    os.close(unready)
    os.read(ready, 1)
    os.write(3, b"last words")
    os._exit(5)

def end(event, context):
    children = [subprocess.Popen(["sleep", "{MARK}"]) for _ in range(2)]
    children[0].terminate()
    children[1].send_signal(signal.SIGINT)
    time.sleep(0.2)
    return [child.poll() for child in children]

def mine():
    return [pid for pid in os.listdir("/proc") if pid.isdigit()]

def daemonize(event, context):
    # in a session of its own, and its parent is gone; returns when all of them are programs
    wait, go = os.pipe()
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.execvp("sleep", ["sleep", "{MARK}"])
            os._exit(0)
        os.wait()
    os.close(go)
    os.read(wait, 1)

def abandon(event, context):
    # children of the dead, who die themselves: is one of them left after a while?
    wait, go = os.pipe()
    for _ in range(5):
        if os.fork() == 0:
            if os.fork() == 0:
                os.close(go)
                os.read(wait, 1)
            os._exit(0)
        os.wait()
    before = len(mine())
    os.close(go)
    end = time.monotonic() + 10
    while len(mine()) > 2 and time.monotonic() < end:
        time.sleep(0.01)
    return [before, len(mine())]

def swallow(event, context):
    return len(b"x" * (1 << 30))

PLACES = ("/tmp", "/dev/shm", "/dev/pts")
kept = []

def look(event, context):
    seen = [sorted(os.listdir(place)) for place in PLACES]
    return [sorted(mine()), sum(seen, []), sorted(os.listdir("/code"))]

def write(event, context):
    open("/tmp/secret", "w").close()
    open("/dev/shm/secret", "w").close()
    kept.append(os.open("/dev/ptmx", os.O_RDONLY | os.O_NOCTTY))
    return [len(os.listdir(place)) for place in PLACES]

def who(event, context):
    return os.getpid()

def serve(event, context):
    kept.append(socket.create_server(("127.0.0.1", 8080)))
    socket.create_connection(("127.0.0.1", 8080)).close()
    return True

def visit(event, context):
    try:
        socket.create_connection(("127.0.0.1", 8080)).close()
    except OSError as error:
        return type(error).__name__

def christen(event, context):
    try:
        socket.sethostname("mine")
    except OSError as error:
        return [type(error).__name__, socket.gethostname()]

def trespass(event, context):
    # what of these can be done to a process with one of these numbers?
    libc = ctypes.CDLL(None)
    PTRACE_SEIZE = 0x4206
    done = []
    for pid in event:
        if libc.ptrace(PTRACE_SEIZE, pid, 0, 0) == 0:
            done.append(["ptrace", pid])
        for attempt in (
            lambda: os.kill(pid, 0),
            lambda: os.killpg(pid, 0),
            lambda: os.sched_setaffinity(pid, os.sched_getaffinity(0)),
            lambda: os.setpriority(os.PRIO_PROCESS, pid, 1),
            lambda: os.setpriority(os.PRIO_PGRP, pid, 1),
            lambda: os.pidfd_open(pid),
            lambda: open(f"/proc/{{pid}}/stat"),
            lambda: open(f"/proc/{{pid}}/mem"),
        ):
            try:
                attempt()
            except OSError:
                continue
            done.append([attempt.__code__.co_names[:2], pid])
    return done

def token(event, context):
    # of the import: who is forked after it has it in common
    return TOKEN

def renice(event, context):
    # all of its process group, whoever is in there and lets itself be told
    try:
        os.setpriority(os.PRIO_PGRP, 0, 7)
    except OSError:
        pass
    return os.getpriority(os.PRIO_PROCESS, 0)

def connect(event, context):
    with socket.socket(socket.AF_UNIX) as end:
        if event == "listen":
            end.bind("\\0meeting")
            return True
        try:
            end.connect("\\0meeting")
        except OSError as error:
            return type(error).__name__

broken = None
"""
CHATTY = """
print("importing")

def greet(event, context):
    return f"hello {event}"
"""
GREEDY = """
ALL = b"x" * (1 << 30)

def greet(event, context):
    pass
"""
UNTIDY = """
import os, random, sys, types

numpy = types.ModuleType("numpy.random")  # known by its name; this one tells who has seeded it
seeded = []
numpy.seed = lambda: seeded.append(os.getpid())
sys.modules["numpy.random"] = numpy
for place in ("/tmp", "/dev/shm"):
    open(f"{place}/of-the-import", "w").close()

def look(event, context):
    return [os.listdir("/tmp"), os.listdir("/dev/shm"), random.random(), seeded == [os.getpid()]]
"""
MODULES = {"main.py": CODE, "chatty.py": CHATTY, "greedy.py": GREEDY, "untidy.py": UNTIDY}
ARCHIVE = pack(MODULES)
DIGEST = hashlib.sha256(ARCHIVE).hexdigest()


async def fake_greet(guest: FakeGuest, request: Invoke, body: bytes) -> bytes:
    return json.dumps(f"hello {json.loads(body)}").encode()


async def fake_leave(guest: FakeGuest, request: Invoke, body: bytes) -> None:
    raise Ended(Exit(json.loads(body)))


async def fake_die(guest: FakeGuest, request: Invoke, body: bytes) -> None:
    raise Ended(Exit(-json.loads(body)))


async def fake_obey(guest: FakeGuest, request: Invoke, body: bytes) -> None:
    guest.ignores_terminate = True
    await guest.log("ready\n", 1)
    await guest.terminated.wait()
    raise Ended(Exit(7))


async def fake_defy(guest: FakeGuest, request: Invoke, body: bytes) -> None:
    guest.ignores_terminate = True
    await guest.log("ready\n", 1)
    await asyncio.Event().wait()


async def fake_end(guest: FakeGuest, request: Invoke, body: bytes) -> bytes:
    return b"[-15, -2]"


async def fake_breed(guest: FakeGuest, request: Invoke, body: bytes) -> bytes:
    return b"1"


async def fake_swallow(guest: FakeGuest, request: Invoke, body: bytes) -> None:
    raise Ended(Exit(-9, oom_kills=1))


async def fake_token(guest: FakeGuest, request: Invoke, body: bytes) -> bytes:
    """Of whoever has imported it."""
    driver = guest._driver
    zygote = driver.forked.get(guest.sandbox)
    return json.dumps(zygote if zygote in driver.kept else guest.sandbox).encode()


async def fake_bequeath(guest: FakeGuest, request: Invoke, body: bytes) -> None:
    await guest.send(b"last words")
    raise Ended(Exit(5))


FAKES = {
    "main:greet": fake_greet,
    "chatty:greet": fake_greet,
    "main:leave": fake_leave,
    "main:die": fake_die,
    "main:obey": fake_obey,
    "main:defy": fake_defy,
    "main:breed": fake_breed,
    "main:end": fake_end,
    "main:daemonize": fake_breed,
    "main:bequeath": fake_bequeath,
    "main:token": fake_token,
    "main:swallow": fake_swallow,
}
M = TypeVar("M", bound=Message)


class Guest:
    """Our end of a sandbox's connection."""

    def __init__(self, end: socket.socket) -> None:
        self._socket, self._reader = end, FrameReader()
        self._heard: list[tuple[Message, bytes]] = []
        self.passed: list[tuple[Message, bytes]] = []
        """What was heard while another kind was waited for."""

    async def hear(self, kind: type[M]) -> tuple[M, bytes]:
        """The next message of *kind*; others before it are passed over."""
        async with asyncio.timeout(SOON_S):
            while True:
                while self._heard:
                    message, body = self._heard.pop(0)
                    if isinstance(message, Fetch):
                        await self.say(Piece(is_last=True), body=ARCHIVE)
                        continue
                    if isinstance(message, kind):
                        return message, body
                    self.passed.append((message, body))
                data = await asyncio.get_running_loop().sock_recv(self._socket, 65536)
                assert data, f"the guest is gone, and has not said {kind.__name__}"
                self._heard += [(decode(f), f.body) for f in self._reader.feed(data)]

    async def at_end(self) -> bytes:
        """Wait until the connection has ended; what came before that."""
        heard = b""
        async with asyncio.timeout(SOON_S):
            with contextlib.suppress(ConnectionResetError):
                while data := await asyncio.get_running_loop().sock_recv(self._socket, 65536):
                    heard += data
        return heard

    async def say(self, message: Message, number: int = 0, body: bytes = b"") -> None:
        frame = encode(message, number, body)
        await asyncio.get_running_loop().sock_sendall(self._socket, frame)

    async def load(self, name: str, *, as_zygote: bool = False) -> Loaded:
        await self.say(load(name, as_zygote=as_zygote))
        return (await self.hear(Loaded))[0]

    async def start(self, event: Any, number: int = 1) -> None:
        body = json.dumps(event).encode()
        await self.say(Invoke(id=f"i{number}", remaining_s=60.0), number, body)

    async def call(self, event: Any, number: int = 1) -> Any:
        await self.start(event, number)
        return json.loads((await self.hear(Result))[1])

    def close(self) -> None:
        self._socket.close()


def load(name: str, *, as_zygote: bool = False) -> Load:
    return Load(
        digest=DIGEST,
        handler=name if ":" in name else f"main:{name}",
        namespace="default",
        function="greet",
        version="1",
        env={},
        network="none",
        memory_mb=256,
        processes=64,
        open_files=256,
        tmp_mb=64,
        concurrency=1,
        preload=[],
        init_timeout_s=10.0,
        as_zygote=as_zygote,
    )


# ---- the drivers --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with one package; shared, because its first use copies the interpreter."""
    folder = tmp_path_factory.mktemp("data")
    package = folder / "packages" / "unpacked" / DIGEST
    package.mkdir(parents=True)
    for name, code in MODULES.items():
        (package / name).write_text(code)
    for path in (folder / "packages", folder / "packages" / "unpacked", package):
        path.chmod(0o755)
    return folder


def make_linux(data: Path) -> Driver:
    if find_bwrap() is None:
        why = "bwrap is missing: apt-get install bubblewrap"
        if os.environ.get("DAYFLY_TEST_NO_LINUX"):
            pytest.skip(f"{why} (DAYFLY_TEST_NO_LINUX is set)")
        pytest.fail(f"{why}, or set DAYFLY_TEST_NO_LINUX if this machine shall do without")
    return drivers.load(Config(data=data, uid_first=UID_FIRST))


def make_kubernetes(data: Path) -> Driver:
    """On a fake cluster, whose pods are processes."""
    if find_bwrap() is None:
        pytest.skip("bwrap is missing")
    return clusters().OnFakeCluster(data)


def clusters() -> Any:
    """The module, which needs an extra."""
    pytest.importorskip("kubernetes")
    from tests.kubernetes import clusters

    return clusters


MAKE: dict[str, Callable[[Path], Driver]] = {
    "fake": lambda data: FakeDriver(FAKES),
    "process": lambda data: drivers.load(Config(data=data, driver="process")),
    "linux": make_linux,
    "kubernetes": make_kubernetes,
    "real kubernetes": lambda data: clusters().OnRealCluster(data),
}
KINDS = [pytest.param(kind, marks=[pytest.mark.cluster] if "real" in kind else []) for kind in MAKE]
WAYS = (*KINDS, "fake, forked", "linux, forked", "fake, kept", "linux, kept")
"""The drivers, and those that fork twice more: with every sandbox forked from a zygote, and from
one that holds the sandbox's function.
"""


@contextlib.asynccontextmanager
async def opened(way: str, data: Path) -> AsyncIterator[Driver]:
    """The driver, with a zygote where it shall fork."""
    kind, _, forks = way.partition(", ")
    made = MAKE[kind](data)
    await made.open()
    if forks:
        await within(SOON_S, made.warm(Z1, TENANT_MOLD, BASE_ENVIRONMENT))
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
async def driver(way: str, data: Path) -> AsyncIterator[Driver]:
    async with opened(way, data) as made:
        yield made


@pytest.fixture(params=["linux", "linux, forked", "linux, kept"])
def linux_way(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
async def linux(linux_way: str, data: Path) -> AsyncIterator[Driver]:
    async with opened(linux_way, data) as made:
        yield made


@pytest.fixture
async def guests() -> AsyncIterator[list[Guest]]:
    """Whoever is put in here is closed at the end."""
    opened: list[Guest] = []
    yield opened
    for guest in opened:
        guest.close()


@pytest.fixture
def create(way: str, driver: Driver, guests: list[Guest]) -> Callable[..., Any]:
    return creator(driver, guests, way)


@pytest.fixture
def create_linux(linux_way: str, linux: Driver, guests: list[Guest]) -> Callable[..., Any]:
    return creator(linux, guests, linux_way)


def called(name: str, **spec: Any) -> Function:
    """The function *name*, as the pool would have it kept."""
    return function(name, namespace="default", package=DIGEST, initialize="once", **spec)


def mold_of(kept: Function) -> Mold:
    return structs.replace(kept.mold, function=f"{kept.id}@{kept.version}")


async def keep(
    driver: Driver,
    guests: list[Guest],
    zygote: SandboxId = K1,
    name: str = "greet",
    *,
    parent: SandboxId = Z1,
    **spec: Any,
) -> Loaded:
    """Have *parent* fork a zygote, and the function *name* loaded into it."""
    kept = called(name, **spec)
    made = driver.create(zygote, mold_of(kept), BASE_ENVIRONMENT, parent, kept)
    guests.append(guest := Guest(await within(SOON_S, made)))
    await guest.hear(Hello)
    return await guest.load(name, as_zygote=True)


def creator(driver: Driver, guests: list[Guest], way: str) -> Callable[..., Any]:
    zygotes: dict[str, tuple[SandboxId, Mold]] = {}
    keeping = asyncio.Lock()

    async def source(name: str) -> tuple[SandboxId | None, Mold]:
        """The zygote to fork it from, if any, and what it is made of."""
        if way.endswith("forked"):
            return Z1, TENANT_MOLD
        if not way.endswith("kept"):
            return None, BASE_MOLD
        async with keeping:
            if name not in zygotes:
                zygotes[name] = SandboxId(f"sb-z{8 + len(zygotes)}"), mold_of(called(name))
                await keep(driver, guests, zygotes[name][0], name)
        return zygotes[name]

    async def create(sandbox: SandboxId = S1, name: str = "", *, background: bool = False) -> Guest:
        """A sandbox that waits for `Load`; one that is the function *name*, if it is given."""
        zygote, mold = await source(name or "greet")
        made = driver.create(sandbox, mold, BASE_ENVIRONMENT, zygote, background=background)
        async with asyncio.timeout(SOON_S):
            guest = Guest(await made)
        guests.append(guest)
        if name:
            await guest.hear(Hello)
            await guest.load(name)
        return guest

    return create


def children() -> set[str]:
    """The processes that this one has, zombies included."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {pid for task in tasks for pid in task.read_text().split()}


def sleepers() -> list[str]:
    """Every process on this machine, in whatever namespace, that the functions have started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if MARK.encode() in arguments:
            found.append(folder.name)
    return found


def descriptors() -> dict[str, str]:
    return {
        fd: os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{fd}")
    }


def launcher(linux: Driver) -> int:
    """Its process, the parent of everything that the driver starts."""
    assert isinstance(linux, LinuxDriver)
    assert linux._launcher is not None
    return linux._launcher.pid


def keepers(linux: Driver, name: str = "dayfly-zygote") -> list[int]:
    """The processes called *name* below the driver's launcher."""
    return [p.pid for p in family(launcher(linux)) if status(p.pid).get("Name") == name]


def groups(linux: Driver) -> list[str]:
    """The control groups of its sandboxes and zygotes."""
    assert isinstance(linux, LinuxDriver)
    return [f"{root}/{name}" for root in linux._roots() for name in os.listdir(root)
            if os.path.isdir(f"{root}/{name}") and name.startswith("sb-")]  # fmt: skip


def inside(linux: Driver, sandbox: SandboxId) -> list[int]:
    """Every process in the sandbox; not bwrap's, which is outside and waits for it."""
    assert isinstance(linux, LinuxDriver)
    if not linux._tree.version:
        pytest.skip("finds processes by control group")
    pids = Path(linux._tree.folders(sandbox)[0], "cgroup.procs").read_text().split()
    return [int(pid) for pid in pids if len(status(int(pid)).get("NSpid", "").split()) > 1]


def gives_way(linux: Driver, sandbox: SandboxId) -> bool:
    """What the kernel says of its control group."""
    assert isinstance(linux, LinuxDriver)
    folders = linux._tree.folders(sandbox)
    if not folders or not Path(folders[-1], "cpu.idle").exists():
        pytest.skip("this kernel has no groups that give way")
    return is_idle(folders[-1])


def is_idle(folder: str) -> bool:
    return Path(folder, "cpu.idle").read_text().strip() == "1"


async def within(seconds: float, waited: Any) -> Any:
    async with asyncio.timeout(seconds):
        return await waited


# ---- living -------------------------------------------------------------------------------------


async def test_a_created_sandbox_says_hello(create: Any):
    guest = await create()
    hello, _ = await guest.hear(Hello)

    assert hello.protocol == PROTOCOL
    assert hello.python.startswith("3.")
    assert hello.preload_failures == []


async def test_a_loaded_sandbox_answers_its_invocations(create: Any):
    """One after the other in the same sandbox."""
    guest = await create(S1, "greet")

    assert await guest.call("Ada", 1) == "hello Ada"
    assert await guest.call("Bob", 2) == "hello Bob"


async def test_an_isolated_sandbox_confirms_its_lock_down_before_user_code(
    driver: Driver, create: Any
):
    """The kernel's word, not the guest's intention."""
    guest = await create()
    await guest.hear(Hello)
    loaded = await guest.load("greet")
    confirmed = (loaded.cap_eff, loaded.no_new_privs, loaded.seccomp)

    assert confirmed == ((0, 1, 2) if driver.isolated else (0, 0, 0))


async def test_a_sandbox_in_the_background_answers_as_any_other(driver: Driver, create: Any):
    """As long as nobody else wants the processor; and what is gone gives way to nobody."""
    guest = await create(S1, "greet", background=True)
    assert await guest.call("Ada", 1) == "hello Ada"
    driver.give_way(S1, background=False)
    driver.give_way(S1, background=True)
    assert await guest.call("Bob", 2) == "hello Bob"

    await within(SOON_S, driver.destroy(S1))
    driver.give_way(S1, background=False)
    driver.give_way(S1, background=True)


async def test_the_kernel_knows_who_is_in_the_background(linux: Driver, create_linux: Any):
    await create_linux(S1, background=True)
    await create_linux(S2)
    assert (gives_way(linux, S1), gives_way(linux, S2)) == (True, False)

    linux.give_way(S1, background=False)
    linux.give_way(S2, background=True)
    assert (gives_way(linux, S1), gives_way(linux, S2)) == (False, True)


@pytest.mark.parametrize("forked", [False, True], ids=["started", "forked"])
async def test_what_is_for_batch_gives_way_to_the_whole_machine(data: Path, forked: bool):
    """With limits and accounts as any other has; and all comes forward while one is to."""
    mold = Mold(BASE, namespace="default" if forked else "", batch=True)
    async with opened("linux", data) as linux:
        assert isinstance(linux, LinuxDriver)
        if not linux.sets_apart:
            pytest.skip("this kernel has no groups that give way")
        (root,) = linux._apart.roots[-1:]
        folder = Path(root, S1)
        assert is_idle(root)
        if forked:
            warming = asyncio.ensure_future(linux.warm(Z1, mold, BASE_ENVIRONMENT))
            await asyncio.sleep(0)
            linux.give_way(Z1, background=False)  # a busy machine would keep us waiting
            await within(SOON_S, warming)
        zygote = Z1 if forked else None
        guest = Guest(await linux.create(S1, mold, BASE_ENVIRONMENT, zygote, background=True))
        linux.give_way(S1, background=False)
        await guest.hear(Hello)
        assert (folder / "cgroup.procs").read_text().split()
        assert not is_idle(root)
        linux.limit(S1, Limits(cpu=0.5))
        if (quota := folder / "cpu.cfs_quota_us").exists():
            assert quota.read_text().strip() == "50000"
        assert linux.memory_bytes(S1) > 1 << 18

        linux.give_way(Z1, background=True)
        assert not is_idle(root)  # for the other
        linux.give_way(S1, background=True)
        assert is_idle(root)
        linux.give_way(S1, background=False)
        await within(SOON_S, linux.destroy(S1))  # who dies forward keeps nobody there
        assert is_idle(root)
        guest.close()
        left = folder.parent
    assert not left.exists()


async def test_memory_is_known_without_control_groups(
    linux: Driver, linux_way: str, create_linux: Any, monkeypatch: pytest.MonkeyPatch
):
    """By what the kernel says of its processes."""
    if linux_way.endswith("kept"):
        pytest.skip("there are no zygotes of functions without control groups")
    monkeypatch.setattr(linux, "_tree", Tree(0, (), "none are delegated"))
    await create_linux(S1, "greet")
    assert 1 << 20 < linux.memory_bytes(S1) < 100 << 20

    await within(SOON_S, linux.destroy(S1))
    assert linux.memory_bytes(S1) == 0


async def test_who_came_forward_while_it_was_made_is_not_kept_back(
    linux: Driver, create_linux: Any
):
    making = asyncio.ensure_future(create_linux(S1, background=True))
    while not making.done():
        linux.give_way(S1, background=False)
        await asyncio.sleep(0)
    await making

    assert not gives_way(linux, S1)


async def test_a_handler_that_is_missing_is_told(create: Any, way: str):
    if way.endswith("kept"):
        pytest.skip("its zygote has found it; see the zygotes of functions")
    guest = await create()
    await guest.hear(Hello)
    await guest.say(load("nothere"))
    failed, _ = await guest.hear(Failed)

    assert failed.kind == "HandlerMissing"


async def test_several_are_created_at_once(driver: Driver, create: Any):
    names = [SandboxId(f"sb-{n}") for n in range(1, 5)]
    guests = await asyncio.gather(*(create(name) for name in names))

    hellos = await asyncio.gather(*(guest.hear(Hello) for guest in guests))
    assert len(hellos) == 4
    exits = await within(SOON_S, asyncio.gather(*(driver.destroy(name) for name in names)))
    assert len(exits) == 4


async def test_a_limit_can_be_set_for_a_sandbox_and_for_one_that_is_gone(
    driver: Driver, create: Any
):
    guest = await create()
    await guest.hear(Hello)
    driver.limit(S1, Limits(memory_mb=512, processes=32, cpu=0.5))
    driver.limit(S2, Limits())


async def test_the_memory_of_a_sandbox_is_known_or_0(driver: Driver, create: Any):
    guest = await create()
    await guest.hear(Hello)
    used = driver.memory_bytes(S1)

    is_known = driver.shares_machine and not isinstance(driver, FakeDriver)
    assert 1 << 18 < used < 1 << 28 if is_known else used == 0
    assert driver.memory_bytes(S2) == 0


# ---- ending -------------------------------------------------------------------------------------


async def test_destroy_ends_a_sandbox_whatever_it_does(driver: Driver, create: Any):
    guest = await create(S1, "defy")
    await guest.start(None)
    exit_ = await within(SOON_S, driver.destroy(S1))
    await guest.at_end()

    assert exit_.code in (-signal.SIGKILL, 128 + signal.SIGKILL)
    assert exit_.oom_kills == 0


async def test_destroy_is_idempotent(driver: Driver, create: Any):
    """Twice at once, again later, and for one that never was: it never raises."""
    guest = await create()
    await guest.hear(Hello)
    first, second = await within(SOON_S, asyncio.gather(driver.destroy(S1), driver.destroy(S1)))

    assert first == second
    assert isinstance(await within(SOON_S, driver.destroy(S1)), Exit)
    assert isinstance(await within(SOON_S, driver.destroy(S2)), Exit)


async def test_destroy_ends_a_sandbox_that_is_not_up_yet(driver: Driver, create: Any):
    guest = await create()
    await within(SOON_S, driver.destroy(S1))

    await guest.at_end()


@pytest.mark.parametrize("name", ["breed", "daemonize"])
async def test_destroy_takes_every_process_with_it(
    driver: Driver, create: Any, way: str, name: str
):
    """Children of the function too, in sessions of their own and orphaned; then they are gone."""
    if (way, name) == ("process", "daemonize"):
        pytest.skip("what makes a session of its own escapes the driver that isolates nothing")
    guest = await create(S1, name)
    await guest.call(None)
    assert len(sleepers()) == (0 if isinstance(driver, FakeDriver) else 3)
    await within(SOON_S, driver.destroy(S1))
    if way == "process":
        await asyncio.to_thread(eventually_none, sleepers)  # killed, but not our children

    assert sleepers() == []


async def test_a_name_can_be_used_again(driver: Driver, create: Any):
    """After a destroy nothing of the old sandbox stands in the way."""
    for _ in range(2):
        guest = await create(S1, "greet")
        assert await guest.call("Ada") == "hello Ada"
        await within(SOON_S, driver.destroy(S1))


@pytest.mark.parametrize("code", [0, 3])
async def test_exited_tells_the_code_of_one_that_ended_by_itself(
    driver: Driver, create: Any, code: int
):
    guest = await create(S1, "leave")
    await guest.start(code)

    assert (await within(SOON_S, driver.exited(S1))).code == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
async def test_exited_tells_the_signal_that_killed_it(
    driver: Driver, create: Any, number: signal.Signals
):
    """Negative, or over 128, as shells do."""
    guest = await create(S1, "die")
    await guest.start(int(number))

    assert (await within(SOON_S, driver.exited(S1))).code in (-number, 128 + number)


async def test_exited_tells_that_the_kernel_killed_it_for_its_memory(
    driver: Driver, create: Any, way: str
):
    """What the function asked for was more than its limit."""
    if way == "process" or (isinstance(driver, LinuxDriver) and not driver._tree.version):
        pytest.skip("without control groups nobody is killed: MemoryError is raised")
    if way == "kubernetes":
        pytest.skip("nothing limits the memory of the fake kubelet's pods")
    guest = await create(S1, "swallow")
    await guest.start(None)
    exit_ = await within(SOON_S, driver.exited(S1))

    assert exit_.code in (-signal.SIGKILL, 128 + signal.SIGKILL)
    assert exit_.oom_kills == 1


async def test_the_connection_ends_with_the_guest_whoever_keeps_a_copy_of_it(
    driver: Driver, create: Any
):
    """Nobody waits for a child of the dead; what the guest said before is heard all the same."""
    guest = await create(S1, "bequeath")
    await guest.start(None)
    exit_ = await within(SOON_S, driver.exited(S1))
    heard = await guest.at_end()
    await within(SOON_S, driver.destroy(S1))

    assert exit_.code == 5
    assert heard == b"last words"
    assert not await asyncio.to_thread(eventually_none, sleepers)  # killed, but not our children


async def test_exited_waits_for_the_end_and_tells_everybody(driver: Driver, create: Any):
    guest = await create()
    await guest.hear(Hello)
    waiting = [asyncio.ensure_future(driver.exited(S1)) for _ in range(2)]
    await asyncio.sleep(0.01)
    assert not any(each.done() for each in waiting)
    killed = await within(SOON_S, driver.destroy(S1))

    assert await within(SOON_S, asyncio.gather(*waiting)) == [killed, killed]


async def test_a_caller_of_exited_that_gives_up_disturbs_nobody(driver: Driver, create: Any):
    guest = await create()
    await guest.hear(Hello)
    patient = asyncio.ensure_future(driver.exited(S1))
    with pytest.raises(TimeoutError):
        await within(0.01, driver.exited(S1))
    killed = await within(SOON_S, driver.destroy(S1))

    assert await within(SOON_S, patient) == killed


async def test_a_guest_whose_connection_is_closed_ends_by_itself(driver: Driver, create: Any):
    """A pool that was killed leaves nobody behind."""
    if driver.outlives:
        pytest.skip("it waits for the next pool")
    guest = await create(S1, "greet")
    guest.close()

    assert (await within(SOON_S, driver.exited(S1))).code == 0


async def test_terminate_lets_the_guest_end_by_itself(driver: Driver, create: Any):
    """Its handler of SIGTERM runs, and decides how it ends."""
    guest = await create(S1, "obey")
    await guest.start(None)
    await ready(guest)
    await within(SOON_S, driver.terminate(S1))

    assert (await within(SOON_S, driver.exited(S1))).code == 7


async def test_terminate_ends_one_that_has_nothing_to_say(
    driver: Driver, create: Any, request: pytest.FixtureRequest
):
    await create(S1, "greet")
    await within(SOON_S, driver.terminate(S1))
    exit_ = await within(1, driver.exited(S1))

    assert exit_.code in (-signal.SIGTERM, 128 + signal.SIGTERM)


async def test_signals_mean_to_functions_what_they_always_mean(
    driver: Driver, create: Any, request: pytest.FixtureRequest
):
    """Whoever starts a process can end it: `terminate()` of subprocess and multiprocessing."""
    guest = await create(S1, "end")

    assert await guest.call(None) == [-signal.SIGTERM, -signal.SIGINT]


async def test_terminate_does_not_end_one_that_defies_it(driver: Driver, create: Any):
    """That is what destroy is for."""
    guest = await create(S1, "defy")
    await guest.start(None)
    await ready(guest)
    await within(SOON_S, driver.terminate(S1))
    with pytest.raises(TimeoutError):
        await within(0.1, driver.exited(S1))

    await within(SOON_S, driver.destroy(S1))


async def test_terminate_of_one_that_is_gone_does_nothing(driver: Driver):
    await within(SOON_S, driver.terminate(S1))


async def ready(guest: Guest) -> None:
    _, body = await guest.hear(Log)
    assert body == b"ready\n"


# ---- the driver's own end -----------------------------------------------------------------------


async def test_close_leaves_nothing(way: str, data: Path, guests: list[Guest]):
    """No process, no group, no descriptor; neither of one that works, nor of one that starts."""
    before, family = descriptors(), children()
    opening = opened(way, data)
    driver = await opening.__aenter__()
    if driver.outlives:
        await opening.__aexit__(None, None, None)
        pytest.skip("its sandboxes live on")
    create = creator(driver, guests, way)
    guest = await create(S1, "breed")
    await guest.call(None)
    await create(S2)
    await create(SandboxId("sb-3"), "greet")
    await driver.destroy(SandboxId("sb-3"))
    roots = driver._tree.roots if isinstance(driver, LinuxDriver) else ()
    assert all(map(os.path.isdir, [f"{root}/{S1}" for root in roots]))
    await within(SOON_S, opening.__aexit__(None, None, None))
    for each in guests:
        each.close()
    await asyncio.sleep(0)

    assert sleepers() == []
    assert children() == family
    assert not any(map(os.path.exists, roots))
    assert descriptors() == before


@pytest.mark.parametrize("kind", KINDS)
async def test_a_driver_that_was_never_opened_can_be_closed(kind: str, data: Path):
    """Opening may fail half way."""
    await within(SOON_S, MAKE[kind](data).close())


# ---- isolation ----------------------------------------------------------------------------------


async def test_two_sandboxes_do_not_see_each_other(create_linux: Any):
    """Neither processes nor files, shared memory or terminals."""
    looker, writer = await create_linux(S1, "look"), await create_linux(S2, "write")
    assert await writer.call(None) == [1, 1, 2]
    pids, files, code = await looker.call(None)

    assert len(pids) == 2  # pid 1 and the guest
    assert files == ["ptmx"]
    assert set(code) <= {*MODULES, "__pycache__"}


async def test_sandboxes_share_no_abstract_sockets(create_linux: Any):
    """They belong to the network namespace, and each has its own."""
    first, second = await create_linux(S1, "connect"), await create_linux(S2, "connect")
    assert await first.call("listen")

    assert await second.call("connect") == "ConnectionRefusedError"


async def test_sandboxes_share_no_loopback_interface(create_linux: Any):
    """Each has its own, which is up; what one serves there no other reaches."""
    server, visitor = await create_linux(S1, "serve"), await create_linux(S2, "visit")
    assert await server.call(None)

    assert await visitor.call(None) == "ConnectionRefusedError"


async def test_a_sandbox_cannot_give_itself_a_name(create_linux: Any):
    guest = await create_linux(S1, "christen")

    assert await guest.call(None) == ["PermissionError", "dayfly"]


async def test_sandboxes_bury_what_is_orphaned_in_them(create_linux: Any):
    """Nothing stays as a zombie: it would count against the function's processes."""
    guest = await create_linux(S1, "abandon")

    assert await guest.call(None) == [7, 2]


async def test_a_signal_or_a_priority_for_the_whole_group_stays_in_the_sandbox(
    linux: Driver, create_linux: Any
):
    """The kernel looks at a process group's members, not at their namespaces."""
    first, second = await create_linux(S1, "renice"), await create_linux(S2, "greet")
    assert await second.call("Ada") == "hello Ada"
    own = inside(linux, S1)
    others = [p.pid for p in family(launcher(linux)) if p.pid not in own]
    before = {pid: stat(pid)[NICE] for pid in others}
    assert await first.call(None) == 7

    assert {pid: stat(pid)[NICE] for pid in others} == before
    for field in (GROUP, SESSION):
        assert not {stat(pid)[field] for pid in others} & {stat(pid)[field] for pid in own}


async def test_sandboxes_run_as_users_whom_nobody_knows(linux_way: str, create_linux: Any):
    """As root: each started one as another, forked ones as their zygote's.

    Else they are all whoever runs the server.
    """
    for sandbox in (S1, S2):
        guest = await create_linux(sandbox, "breed")
        await guest.call(None)
    owners = {os.stat(f"/proc/{pid}").st_uid for pid in sleepers()}

    if os.geteuid() == 0:
        assert len(owners) == (2 if linux_way == "linux" else 1)
        assert all(UID_FIRST <= owner < UID_FIRST + 100 for owner in owners)
    else:
        assert owners == {os.geteuid()}


async def test_what_a_dead_server_left_is_buried_by_the_next(data: Path):
    """Its groups and the processes in them, found by its pid."""
    tree_owner = make_linux(data)
    assert isinstance(tree_owner, LinuxDriver)
    await tree_owner.open()
    roots = tree_owner._tree.roots
    await tree_owner.close()
    if not roots:
        pytest.skip("no groups on this machine, so a dead server can leave none")
    ended = await asyncio.create_subprocess_exec("true")
    await ended.wait()
    dead = [Path(root).with_name(f"dayfly-{ended.pid}") / "sb-1" for root in roots]
    orphan = await asyncio.create_subprocess_exec("sleep", MARK)
    for folder in dead:
        folder.mkdir(parents=True)
        (folder / "cgroup.procs").write_text(str(orphan.pid))
    following = make_linux(data)
    await following.open()
    code = await within(SOON_S, orphan.wait())
    await following.close()

    assert code == -signal.SIGKILL
    assert not any(folder.parent.exists() for folder in dead)


# ---- zygotes ------------------------------------------------------------------------------------


@pytest.fixture(params=["fake", "linux"])
async def forking(request: pytest.FixtureRequest, data: Path) -> AsyncIterator[Driver]:
    """A driver that can fork, with one zygote."""
    async with opened(f"{request.param}, forked", data) as made:
        yield made


@pytest.fixture
async def zygotic(data: Path) -> AsyncIterator[Driver]:
    """The linux driver, with one zygote."""
    async with opened("linux, forked", data) as made:
        yield made


@pytest.fixture
def fork(request: pytest.FixtureRequest, guests: list[Guest]) -> Callable[..., Any]:
    name = "forking" if "forking" in request.fixturenames else "zygotic"
    return creator(request.getfixturevalue(name), guests, "forked")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_driver_that_cannot_fork_warms_no_zygote(kind: str, data: Path):
    """It says so by a flag and by an error; there is nothing to be retired or destroyed then."""
    driver = MAKE[kind](data)
    await driver.open()
    told: list[type[Exception]] = []
    try:
        await within(SOON_S, driver.warm(Z1, TENANT_MOLD, BASE_ENVIRONMENT))
    except ZygoteUnfit as unfit:
        told.append(type(unfit))
    await within(SOON_S, driver.retire(Z1))
    await within(SOON_S, driver.destroy(Z1))
    await driver.close()

    assert told == ([] if driver.can_fork else [ZygoteUnfit])
    assert driver.can_fork == (kind in ("fake", "linux"))


async def test_a_zygote_forks_many_at_once(forking: Driver, fork: Any):
    """All of them work, each is told apart, and the zygote goes on."""
    names = [SandboxId(f"sb-{n}") for n in range(12)]
    forked = await asyncio.gather(*(fork(name, "greet") for name in names))
    greetings = await asyncio.gather(*(guest.call(n) for n, guest in enumerate(forked)))
    gone = [await within(SOON_S, forking.destroy(name)) for name in names[:6]]
    again = await fork(S1, "greet")

    assert greetings == [f"hello {n}" for n in range(12)]
    assert len(gone) == 6
    assert await again.call("Ada") == "hello Ada"
    assert await forked[-1].call("Bob", 2) == "hello Bob"


async def test_nothing_is_forked_from_a_zygote_that_never_was(forking: Driver):
    with pytest.raises(SandboxStartFailed):
        await within(1, forking.create(S1, TENANT_MOLD, BASE_ENVIRONMENT, Z2))

    assert isinstance(await within(1, forking.destroy(S1)), Exit)
    await within(1, forking.retire(Z2))
    assert isinstance(await within(1, forking.destroy(Z2)), Exit)


async def test_a_retired_zygote_forks_no_more_and_ends_after_its_last_sandbox(
    forking: Driver, fork: Any
):
    """Those that it has forked go on; who asks for another is told so at once."""
    first, second = await fork(S1, "greet"), await fork(S2, "greet")
    await within(SOON_S, forking.retire(Z1))
    with pytest.raises(SandboxStartFailed):
        await within(1, fork(SandboxId("sb-3")))
    ended = asyncio.ensure_future(forking.exited(Z1))
    assert await first.call("Ada") == "hello Ada"
    await within(SOON_S, forking.destroy(S1))
    assert await second.call("Bob") == "hello Bob"
    assert not ended.done()
    await within(SOON_S, forking.destroy(S2))

    assert (await within(SOON_S, ended)).code == 0
    assert (await within(SOON_S, forking.destroy(Z1))).code == 0


async def test_a_retired_zygote_without_sandboxes_ends_at_once(forking: Driver):
    """Also if it is told twice."""
    await within(SOON_S, forking.retire(Z1))
    await within(SOON_S, forking.retire(Z1))

    assert (await within(SOON_S, forking.exited(Z1))).code == 0


async def test_another_zygote_takes_over_while_the_retired_one_lasts(
    forking: Driver, guests: list[Guest], fork: Any
):
    old = await fork(S1, "greet")
    await within(SOON_S, forking.warm(Z2, TENANT_MOLD, BASE_ENVIRONMENT))
    await within(SOON_S, forking.retire(Z1))
    end = await within(SOON_S, forking.create(S2, TENANT_MOLD, BASE_ENVIRONMENT, Z2))
    guests.append(Guest(end))
    await guests[-1].hear(Hello)
    await guests[-1].load("greet")
    await within(SOON_S, forking.destroy(Z2))

    assert await old.call("Ada") == "hello Ada"
    assert await within(SOON_S, forking.exited(S2))


async def test_who_destroys_a_zygote_destroys_its_sandboxes(forking: Driver, fork: Any):
    """Whatever they do; afterwards nothing can be forked from it."""
    busy, idle = await fork(S1, "defy"), await fork(S2)
    await busy.start(None)
    await ready(busy)
    await within(SOON_S, forking.destroy(Z1))
    exits = [await within(SOON_S, forking.exited(sandbox)) for sandbox in (S1, S2)]
    await busy.at_end()
    await idle.at_end()
    with pytest.raises(SandboxStartFailed):
        await within(1, fork(SandboxId("sb-3")))

    assert [exit_.code for exit_ in exits] == [-signal.SIGKILL] * 2
    assert isinstance(await within(SOON_S, forking.destroy(Z1)), Exit)


@pytest.mark.parametrize("answered", [0, 1, 4, 8])
async def test_a_zygote_killed_while_it_forks_leaves_nothing(
    zygotic: Driver, guests: list[Guest], fork: Any, answered: int
):
    """Each of eight starts succeeds or is refused; no process, group or descriptor stays.

    Killed when *answered* of the eight have been made.
    """
    names = [SandboxId(f"sb-{n}") for n in range(8)]
    await zygotic.destroy(Z1)
    await asyncio.to_thread(eventually_none, lambda: groups(zygotic))
    before = held(zygotic)
    await within(SOON_S, zygotic.warm(Z1, TENANT_MOLD, BASE_ENVIRONMENT))
    (zygote,) = keepers(zygotic)
    starts = [asyncio.ensure_future(fork(name)) for name in names]
    while sum(start.done() for start in starts) < answered:
        await asyncio.wait(starts, return_when=asyncio.FIRST_COMPLETED, timeout=SOON_S)
        await asyncio.sleep(0)
    os.kill(zygote, signal.SIGKILL)
    outcomes = await within(SOON_S, asyncio.gather(*starts, return_exceptions=True))
    await within(SOON_S, zygotic.destroy(Z1))
    for name in names:
        await within(SOON_S, zygotic.destroy(name))
    for guest in guests:
        await guest.at_end()
        guest.close()

    assert sum(isinstance(outcome, Guest) for outcome in outcomes) >= answered
    assert {type(outcome) for outcome in outcomes} <= {Guest, SandboxStartFailed}
    assert not await asyncio.to_thread(eventually_none, lambda: groups(zygotic))
    assert not await asyncio.to_thread(eventually_none, lambda: family(launcher(zygotic))[1:])
    assert held(zygotic) == before
    await within(SOON_S, zygotic.warm(Z2, TENANT_MOLD, BASE_ENVIRONMENT))


def held(linux: Driver) -> tuple[int, int]:
    """How many descriptors this process and the launcher have open."""
    return len(descriptors()), len(os.listdir(f"/proc/{launcher(linux)}/fd"))


@contextlib.contextmanager
def paused(pid: int) -> Iterator[None]:
    """Whatever happens meanwhile, the process sees it all at once."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_the_launcher_survives_the_death_of_a_zygote_with_all_its_sandboxes(
    zygotic: Driver, fork: Any
):
    """However many of these deaths it learns of at the same moment, a sandbox's before its own."""
    names = [SandboxId(f"sb-{n}") for n in range(4)]
    for name in names:
        await fork(name, "greet")
    doomed = [p for pid in keepers(zygotic) for p in family(pid)]
    (zygote,) = keepers(zygotic)
    served_by = launcher(zygotic)
    init = next(Process(p, stat(p)[19]) for p in inside(zygotic, names[0]) if is_init(p))
    with paused(served_by):
        os.kill(init.pid, signal.SIGKILL)
        await asyncio.to_thread(eventually_none, lambda: [init] if init.is_alive else [])
        os.kill(zygote, signal.SIGKILL)
        alive = await asyncio.to_thread(eventually_none, lambda: [p for p in doomed if p.is_alive])
    exits = [await within(SOON_S, zygotic.exited(name)) for name in (*names, Z1)]
    await within(SOON_S, zygotic.warm(Z2, TENANT_MOLD, BASE_ENVIRONMENT))

    assert not alive
    assert [exit_.code for exit_ in exits[:-1]] == [-signal.SIGKILL] * 4
    assert launcher(zygotic) == served_by


async def test_the_launcher_survives_an_order_to_kill_who_has_just_died(zygotic: Driver, fork: Any):
    guest = await fork(S1, "leave")
    await fork(S2, "greet")
    doomed = [Process(pid, stat(pid)[19]) for pid in inside(zygotic, S1)]
    with paused(launcher(zygotic)):
        destroyed = asyncio.ensure_future(zygotic.destroy(S1))
        await asyncio.sleep(0)  # the order is on its way, before the news
        await guest.start(3)
        alive = await asyncio.to_thread(eventually_none, lambda: [p for p in doomed if p.is_alive])
    exit_ = await within(SOON_S, destroyed)

    assert not alive
    assert exit_.code in (3, -signal.SIGKILL)
    assert await within(SOON_S, fork(SandboxId("sb-3"), "greet"))


async def test_destroy_does_not_raise_when_the_launcher_has_just_died(
    create_linux: Any, linux: Driver
):
    """Before anybody has noticed; with the launcher, every sandbox is dead."""
    guest = await create_linux(S1, "greet")
    doomed = family(launcher(linux))
    os.kill(launcher(linux), signal.SIGKILL)
    alive = eventually_none(lambda: [p for p in doomed if p.is_alive])
    exit_ = await within(SOON_S, linux.destroy(S1))
    await guest.at_end()

    assert not alive
    assert exit_.code == -signal.SIGKILL


async def test_a_fork_that_nobody_waits_for_any_more_is_undone(zygotic: Driver):
    """Given up while the zygote was busy: what it forks then does not stay."""
    (zygote,) = keepers(zygotic)
    with paused(zygote):
        start = asyncio.ensure_future(zygotic.create(S1, TENANT_MOLD, BASE_ENVIRONMENT, Z1))
        await asyncio.wait({start}, timeout=0.05)
        start.cancel()
        await asyncio.wait({start})
        destroyed = asyncio.ensure_future(zygotic.destroy(S1))
        await asyncio.wait({destroyed}, timeout=0.05)
    await within(SOON_S, destroyed)

    assert not await asyncio.to_thread(eventually_none, lambda: family(zygote)[1:])


async def test_a_zygote_that_cannot_fork_refuses_and_keeps_what_it_has(zygotic: Driver, fork: Any):
    """Its group may hold no process more: the start fails at once, and leaves no group."""
    working = await fork(S1, "greet")
    allow(zygotic, Z1, "1")
    with pytest.raises(SandboxStartFailed, match="cannot fork"):
        await within(SOON_S, fork(S2))
    left = [name for name in groups(zygotic) if name.endswith(f"/{S2}")]
    allow(zygotic, Z1, "max")

    assert left == []
    assert await working.call("Ada") == "hello Ada"
    assert await (await fork(S2, "greet")).call("Bob") == "hello Bob"


def allow(linux: Driver, zygote: SandboxId, processes: str) -> None:
    """Have the kernel refuse it more processes than that."""
    assert isinstance(linux, LinuxDriver)
    limits = [Path(folder, "pids.max") for folder in linux._tree.folders(zygote)]
    found = [path for path in limits if path.exists()]
    if not found:
        pytest.skip("no control group for processes")
    found[0].write_text(processes)


async def test_an_environment_whose_preload_starts_a_thread_is_unfit(
    linux: Driver, guests: list[Guest], data: Path
):
    """A forked process would have the thread's locks without the thread. Started, it works."""
    place = data / "environments" / "threads"
    place.mkdir(parents=True, exist_ok=True)
    code = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()"
    (place / "threaded.py").write_text(code)
    for path in (place.parent, place):
        path.chmod(0o755)
    environment = Environment(digest="threads", path=str(place), preload=("threaded",))
    with pytest.raises(ZygoteUnfit, match="1 thread"):
        await within(SOON_S, linux.warm(Z2, Mold("threads", namespace="default"), environment))
    await within(SOON_S, linux.destroy(Z2))
    guest = Guest(await within(SOON_S, linux.create(S1, Mold("threads"), environment)))
    guests.append(guest)
    hello, _ = await guest.hear(Hello)
    await guest.load("greet")

    assert hello.preload_failures == []
    assert await guest.call("Ada") == "hello Ada"


async def test_siblings_have_no_namespace_in_common(zygotic: Driver, fork: Any):
    """Nor with their zygote; of users too, once they hold user code."""
    for sandbox in (S1, S2):
        await fork(sandbox, "greet")
    guests = [pid for s in (S1, S2) for pid in inside(zygotic, s) if not is_init(pid)]
    seen = [namespaces(pid) for pid in (*keepers(zygotic), *guests)]

    assert len(seen) == 3
    for kind in ("mnt", "pid", "ipc", "uts", "cgroup", "net", "user"):
        assert len({each[kind] for each in seen}) == 3, kind


async def test_siblings_with_the_hosts_network_share_that_and_nothing_else(
    zygotic: Driver, guests: list[Guest]
):
    mold = Mold(BASE, "host", "default")
    await within(SOON_S, zygotic.warm(Z2, mold, BASE_ENVIRONMENT))
    for sandbox in (S1, S2):
        end = await within(SOON_S, zygotic.create(sandbox, mold, BASE_ENVIRONMENT, Z2))
        guests.append(Guest(end))
        await guests[-1].hear(Hello)
        await guests[-1].load("greet")
    seen = [namespaces(pid) for s in (S1, S2) for pid in inside(zygotic, s) if not is_init(pid)]

    assert {kind for kind in seen[0] if seen[0][kind] == seen[1][kind]} - {"time"} == {"net"}
    assert seen[0]["net"] == namespaces(os.getpid())["net"]


def is_init(pid: int) -> bool:
    """Whether it is pid 1 of its namespace."""
    return status(pid)["NSpid"].split()[-1] == "1"


def namespaces(pid: int) -> dict[str, str]:
    folder = f"/proc/{pid}/ns"
    names = [name for name in os.listdir(folder) if not name.endswith("_for_children")]
    return {name: os.readlink(f"{folder}/{name}") for name in names}


async def test_siblings_have_process_numbers_of_their_own(zygotic: Driver, fork: Any):
    """Libraries tell by it that they have been forked. (One in 10^9 times all three agree.)"""
    guests = [await fork(SandboxId(f"sb-{n}"), "who") for n in range(3)]
    pids = [await guest.call(None) for guest in guests]

    assert len(set(pids)) > 1


async def test_a_forked_sandbox_reaches_neither_its_zygote_nor_a_sibling(
    zygotic: Driver, fork: Any
):
    """By whatever number somebody calls them: this machine, the zygote, or they themselves."""
    intruder, sibling = await fork(S1, "trespass"), await fork(S2, "greet")
    others = [p.pid for p in family(launcher(zygotic)) if p.pid not in inside(zygotic, S1)]
    numbers = {int(n) for pid in others for n in status(pid)["NSpid"].split()} | set(others)
    own = {int(n) for pid in inside(zygotic, S1) for n in status(pid)["NSpid"].split()[-1:]}
    niceness = {pid: stat(pid)[NICE] for pid in others}
    done = await intruder.call(sorted(numbers - own))

    assert len(numbers - own) >= 4
    assert done == []
    assert {pid: stat(pid)[NICE] for pid in others} == niceness
    assert await sibling.call("Ada") == "hello Ada"


# ---- zygotes of functions -----------------------------------------------------------------------


async def fork_of(
    driver: Driver, guests: list[Guest], sandbox: SandboxId, name: str = "greet", zygote: Any = K1
) -> Guest:
    """A sandbox that *zygote* has forked, and that was told to be the function that it holds."""
    made = driver.create(sandbox, mold_of(called(name)), BASE_ENVIRONMENT, zygote)
    guests.append(guest := Guest(await within(SOON_S, made)))
    await guest.hear(Hello)
    await guest.load(name)
    return guest


def process_of(linux: Driver, zygote: SandboxId) -> int:
    """The process that holds the function; its keeper is pid 1 of the same jail."""
    (found,) = (pid for pid in inside(linux, zygote) if not is_init(pid))
    return found


async def test_what_a_functions_zygote_forks_holds_the_function(
    forking: Driver, guests: list[Guest], fork: Any
):
    """Nothing is imported again; who is forked from the environment's imports for itself."""
    await keep(forking, guests, K1, "token")
    tokens = [
        await (await fork_of(forking, guests, SandboxId(f"sb-{n}"), "token")).call(None)
        for n in range(3)
    ]
    other = await (await fork(SandboxId("sb-9"), "token")).call(None)

    assert len(set(tokens)) == 1
    assert other not in tokens


async def test_a_functions_zygote_says_which_rights_it_has_and_its_forks_have_none(
    forking: Driver, guests: list[Guest], fork: Any
):
    """They confirm what any sandbox does, though they were forked from one that has more."""
    kept = await keep(forking, guests)
    made = forking.create(S1, mold_of(called("greet")), BASE_ENVIRONMENT, K1)
    guests.append(guest := Guest(await within(SOON_S, made)))
    await guest.hear(Hello)
    forked = await guest.load("greet")
    other = await fork(S2)
    await other.hear(Hello)
    plain = await other.load("greet")

    assert (kept.cap_eff, kept.no_new_privs, kept.seccomp) == (ZYGOTE_CAP_EFF, 1, 2)
    assert (forked.cap_eff, forked.no_new_privs, forked.seccomp) == (0, 1, 2)
    assert (forked.slots, forked.landlock) == (plain.slots, plain.landlock)


async def test_every_functions_zygote_forks_for_its_own_function(
    forking: Driver, guests: list[Guest], fork: Any
):
    """Of one environment, beside each other; the end of one is nothing to the others."""
    await keep(forking, guests, K1, "token")
    await keep(forking, guests, K2, "greet")
    token = await fork_of(forking, guests, S1, "token", K1)
    greet = await fork_of(forking, guests, S2, "greet", K2)
    plain = await fork(SandboxId("sb-3"), "greet")
    assert await greet.call("Ada") == "hello Ada"
    assert await token.call(None)
    await within(SOON_S, forking.destroy(K1))
    await token.at_end()

    assert await greet.call("Bob", 2) == "hello Bob"
    assert await plain.call("Eve") == "hello Eve"
    again = await fork_of(forking, guests, SandboxId("sb-4"), "greet", K2)
    assert await again.call("Ann") == "hello Ann"


async def test_what_the_import_writes_is_heard_of_the_zygote_and_not_of_its_forks(
    forking: Driver, guests: list[Guest]
):
    if isinstance(forking, FakeDriver):
        forking.on_load = say_importing
    await keep(forking, guests, K1, "chatty:greet")
    (zygote,) = guests
    made = forking.create(S1, mold_of(called("greet")), BASE_ENVIRONMENT, K1)
    guests.append(forked := Guest(await within(SOON_S, made)))
    await forked.hear(Hello)
    await forked.say(load("chatty:greet"))
    await forked.hear(Loaded)

    assert [body for kind, body in zygote.passed if isinstance(kind, Log)] == [b"importing\n"]
    assert [kind for kind, _ in forked.passed if isinstance(kind, Log)] == []


async def say_importing(guest: FakeGuest) -> None:
    await guest.log("importing\n")


async def test_an_import_that_fails_in_a_functions_zygote_is_told(
    forking: Driver, guests: list[Guest]
):
    """As in any sandbox; then there is nothing to fork from, and it can be destroyed."""
    kept = called("nothere")
    made = forking.create(K1, mold_of(kept), BASE_ENVIRONMENT, Z1, kept)
    guests.append(guest := Guest(await within(SOON_S, made)))
    await guest.hear(Hello)
    await guest.say(load("nothere", as_zygote=True))
    failed, _ = await guest.hear(Failed)

    assert failed.kind == "HandlerMissing"
    assert isinstance(await within(SOON_S, forking.destroy(K1)), Exit)


async def test_a_functions_zygote_forks_many_at_once(forking: Driver, guests: list[Guest]):
    """However few processes its function may have: those are a sandbox's, not all of theirs."""
    names = [SandboxId(f"sb-{n}") for n in range(12)]
    await keep(forking, guests, limits=Limits(processes=2, memory_mb=32))
    made = await asyncio.gather(*(fork_of(forking, guests, name) for name in names))

    greetings = await asyncio.gather(*(guest.call(n) for n, guest in enumerate(made)))

    assert greetings == [f"hello {n}" for n in range(12)]


async def test_a_retired_zygote_of_a_function_ends_after_its_last_sandbox(
    forking: Driver, guests: list[Guest]
):
    """It forks no more meanwhile; its environment's goes on."""
    await keep(forking, guests)
    first, second = [await fork_of(forking, guests, sandbox) for sandbox in (S1, S2)]
    await within(SOON_S, forking.retire(K1))
    with pytest.raises(SandboxStartFailed):
        await fork_of(forking, guests, SandboxId("sb-3"))
    ended = asyncio.ensure_future(forking.exited(K1))
    assert await first.call("Ada") == "hello Ada"
    await within(SOON_S, forking.destroy(S1))
    assert await second.call("Bob") == "hello Bob"
    assert not ended.done()
    await within(SOON_S, forking.destroy(S2))

    assert (await within(SOON_S, ended)).code == 0
    assert (await within(SOON_S, forking.destroy(K1))).code == 0
    await keep(forking, guests, K2)


async def test_a_retired_zygote_of_a_function_without_sandboxes_ends_at_once(
    forking: Driver, guests: list[Guest]
):
    """Also if it is told twice."""
    await keep(forking, guests)
    await within(SOON_S, forking.retire(K1))
    await within(SOON_S, forking.retire(K1))

    assert (await within(SOON_S, forking.exited(K1))).code == 0


async def test_a_retired_environments_zygote_lasts_as_long_as_a_functions(
    forking: Driver, guests: list[Guest]
):
    """Which is a sandbox of its, and forks on."""
    await keep(forking, guests)
    await within(SOON_S, forking.retire(Z1))
    ended = asyncio.ensure_future(forking.exited(Z1))
    guest = await fork_of(forking, guests, S1)
    assert await guest.call("Ada") == "hello Ada"
    assert not ended.done()
    await within(SOON_S, forking.destroy(K1))

    assert (await within(SOON_S, ended)).code == 0


@pytest.mark.parametrize("victim", [K1, Z1], ids=["the function's", "the environment's"])
async def test_who_destroys_a_zygote_destroys_all_that_was_forked_from_it(
    forking: Driver, guests: list[Guest], victim: SandboxId
):
    """Whatever they do, and forks of forks too; afterwards nothing can be forked from it."""
    await keep(forking, guests, K1, "defy")
    busy = await fork_of(forking, guests, S1, "defy")
    await busy.start(None)
    await ready(busy)
    idle = await fork_of(forking, guests, S2, "defy")
    await within(SOON_S, forking.destroy(victim))
    exits = [await within(SOON_S, forking.exited(sandbox)) for sandbox in (S1, S2)]
    await busy.at_end()
    await idle.at_end()
    await guests[0].at_end()
    with pytest.raises(SandboxStartFailed):
        await fork_of(forking, guests, SandboxId("sb-3"))

    assert [exit_.code for exit_ in exits] == [-signal.SIGKILL] * 2
    assert isinstance(await within(SOON_S, forking.destroy(K1)), Exit)
    if victim == K1:
        await keep(forking, guests, K2)


async def test_exited_tells_that_a_functions_zygote_has_died(forking: Driver, guests: list[Guest]):
    """By itself, or killed by the kernel: who waits for that is told, and can bury the rest."""
    await keep(forking, guests)
    guest = await fork_of(forking, guests, S1)
    if isinstance(forking, FakeDriver):
        await forking.guests[K1].end(Exit(-signal.SIGKILL))
    else:
        os.kill(process_of(forking, K1), signal.SIGKILL)
    exit_ = await within(SOON_S, forking.exited(K1))
    await within(SOON_S, forking.destroy(K1))
    await guest.at_end()

    assert exit_.code == -signal.SIGKILL
    assert (await within(SOON_S, forking.exited(S1))).code == -signal.SIGKILL


async def test_a_functions_zygote_can_be_destroyed_before_it_holds_anything(
    forking: Driver, guests: list[Guest], fork: Any
):
    """Its import hangs, say; the environment's zygote has no part in it."""
    kept = called("greet")
    made = forking.create(K1, mold_of(kept), BASE_ENVIRONMENT, Z1, kept)
    guests.append(guest := Guest(await within(SOON_S, made)))
    await within(SOON_S, forking.destroy(K1))
    await guest.at_end()

    assert await (await fork(S1, "greet")).call("Ada") == "hello Ada"


async def test_no_functions_zygote_is_forked_from_one_that_never_was(
    forking: Driver, guests: list[Guest]
):
    with pytest.raises(SandboxStartFailed):
        await keep(forking, guests, parent=Z2)

    assert isinstance(await within(SOON_S, forking.destroy(K1)), Exit)
    await keep(forking, guests)


async def test_forks_of_a_function_have_no_namespace_in_common(
    zygotic: Driver, guests: list[Guest]
):
    """Nor with the zygote, its keeper, or the environment's."""
    await keep(zygotic, guests)
    for sandbox in (S1, S2):
        await fork_of(zygotic, guests, sandbox)
    forks = [pid for s in (S1, S2) for pid in inside(zygotic, s) if not is_init(pid)]
    jail = [process_of(zygotic, K1), *keepers(zygotic)]
    seen = [namespaces(pid) for pid in (*jail, *forks)]

    assert len(seen) == 4
    for kind in ("mnt", "pid", "ipc", "uts", "cgroup", "net"):
        assert len({each[kind] for each in seen}) == 4, kind
    assert len({each["user"] for each in seen[1:]}) == 3


async def test_a_functions_zygote_and_its_keeper_are_in_the_same_jail_and_no_other(
    zygotic: Driver, guests: list[Guest]
):
    """Two processes, of which one runs user code; no other function's is among them."""
    await keep(zygotic, guests, K1, "greet")
    await keep(zygotic, guests, K2, "token")
    jails = [inside(zygotic, zygote) for zygote in (K1, K2)]
    names = [[status(pid)["Name"] for pid in jail] for jail in jails]

    assert [sorted(each) for each in names] == [["dayfly-guest", "dayfly-keeper"]] * 2
    for jail in jails:
        assert len({namespaces(pid)["pid"] for pid in jail}) == 1
    assert len({namespaces(pid)["mnt"] for jail in jails for pid in jail}) == 2


async def test_what_the_import_wrote_is_not_in_its_forks_and_their_randomness_is_their_own(
    zygotic: Driver, guests: list[Guest]
):
    """Their /tmp and /dev/shm are empty, as any sandbox's; what Dayfly knows of is reseeded."""
    await keep(zygotic, guests, K1, "untidy:look")
    told = [
        await (await fork_of(zygotic, guests, sandbox, "untidy:look")).call(None)
        for sandbox in (S1, S2)
    ]

    assert [each[:2] for each in told] == [[[], []]] * 2
    assert told[0][2] != told[1][2]
    assert [each[3] for each in told] == [True, True]


async def test_a_fork_of_a_function_reaches_neither_its_zygote_nor_a_sibling(
    zygotic: Driver, guests: list[Guest]
):
    """By whatever number somebody calls them: this machine, the zygote, or they themselves."""
    await keep(zygotic, guests, K1, "trespass")
    intruder = await fork_of(zygotic, guests, S1, "trespass")
    await fork_of(zygotic, guests, S2, "trespass")
    others = [p.pid for p in family(launcher(zygotic)) if p.pid not in inside(zygotic, S1)]
    numbers = {int(n) for pid in others for n in status(pid)["NSpid"].split()} | set(others)
    own = {int(n) for pid in inside(zygotic, S1) for n in status(pid)["NSpid"].split()[-1:]}
    niceness = {pid: stat(pid)[NICE] for pid in others}
    done = await intruder.call(sorted(numbers - own))

    assert len(numbers - own) >= 4
    assert done == []
    assert {pid: stat(pid)[NICE] for pid in others} == niceness


async def test_an_import_that_takes_more_memory_than_its_function_may_is_killed_for_it(
    zygotic: Driver, guests: list[Guest]
):
    """In the zygote as in a sandbox; nothing else is."""
    if not groups(zygotic):
        pytest.skip("without control groups there is no zygote of a function")
    kept = called("greet")
    made = zygotic.create(K1, mold_of(kept), BASE_ENVIRONMENT, Z1, kept)
    guests.append(guest := Guest(await within(SOON_S, made)))
    await guest.hear(Hello)
    await guest.say(load("greedy:greet", as_zygote=True))
    exit_ = await within(SOON_S, zygotic.exited(K1))

    assert exit_.code == -signal.SIGKILL
    assert exit_.oom_kills >= 1
    await keep(zygotic, guests, K2)


@pytest.mark.parametrize("answered", [0, 4, 8])
@pytest.mark.parametrize("victim", ["the zygote", "its keeper"])
async def test_a_functions_zygote_killed_while_it_forks_leaves_nothing(
    zygotic: Driver, guests: list[Guest], victim: str, answered: int
):
    """Each of eight starts succeeds or is refused; no process, group or descriptor stays."""
    names = [SandboxId(f"sb-{n}") for n in range(8)]
    mold = mold_of(called("greet"))
    left = set(groups(zygotic))
    before, family_before = held(zygotic), family(launcher(zygotic))
    await keep(zygotic, guests)
    doomed = process_of(zygotic, K1)
    if victim == "its keeper":
        (doomed,) = (pid for pid in inside(zygotic, K1) if is_init(pid))
    starts = [
        asyncio.ensure_future(zygotic.create(name, mold, BASE_ENVIRONMENT, K1)) for name in names
    ]
    while sum(start.done() for start in starts) < answered:
        await asyncio.wait(starts, return_when=asyncio.FIRST_COMPLETED, timeout=SOON_S)
        await asyncio.sleep(0)
    os.kill(doomed, signal.SIGKILL)
    outcomes = await within(SOON_S, asyncio.gather(*starts, return_exceptions=True))
    for name in (K1, *names):
        await within(SOON_S, zygotic.destroy(name))
    guests.extend(Guest(each) for each in outcomes if isinstance(each, socket.socket))
    for guest in guests:
        await guest.at_end()
        guest.close()

    assert {type(each) for each in outcomes} <= {socket.socket, SandboxStartFailed}
    assert sum(isinstance(each, socket.socket) for each in outcomes) >= answered
    assert not await asyncio.to_thread(eventually_none, lambda: set(groups(zygotic)) - left)
    new = lambda: [p for p in family(launcher(zygotic)) if p not in family_before]  # noqa: E731
    assert not await asyncio.to_thread(eventually_none, new)
    assert held(zygotic) == before


async def test_a_functions_zygote_that_cannot_fork_refuses_and_keeps_what_it_has(
    zygotic: Driver, guests: list[Guest]
):
    """Its group may hold no process more: the start fails, and leaves no group."""
    await keep(zygotic, guests)
    working = await fork_of(zygotic, guests, S1)
    allow(zygotic, K1, "1")
    with pytest.raises(SandboxStartFailed, match="cannot fork"):
        await fork_of(zygotic, guests, S2)
    left = [name for name in groups(zygotic) if name.endswith(f"/{S2}")]
    allow(zygotic, K1, "max")

    assert left == []
    assert await working.call("Ada") == "hello Ada"
    assert await (await fork_of(zygotic, guests, S2)).call("Bob") == "hello Bob"


async def test_without_control_groups_a_function_cannot_be_kept(
    zygotic: Driver, guests: list[Guest], monkeypatch: pytest.MonkeyPatch
):
    """Nothing would limit what an import that may fork takes; nothing is made, either."""
    before = family(launcher(zygotic))
    with monkeypatch.context() as patch:
        patch.setattr(zygotic, "_tree", Tree(0, (), "none are delegated"))
        with pytest.raises(ZygoteUnfit, match="none are delegated"):
            await keep(zygotic, guests)

    assert family(launcher(zygotic)) == before
    assert isinstance(await within(SOON_S, zygotic.destroy(K1)), Exit)
