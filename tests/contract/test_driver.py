"""What every driver promises, asked of each: the fake one, plain processes, isolated sandboxes."""

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests.harness import eventually_none

from dayfly.protocol import (
    PROTOCOL,
    Failed,
    FrameReader,
    Hello,
    Invoke,
    Load,
    Loaded,
    Log,
    Message,
    Result,
    decode,
    encode,
)
from dayfly_pool import driver as drivers
from dayfly_pool.driver import Driver, Exit
from dayfly_pool.drivers.linux import LinuxDriver, find_bwrap
from dayfly_pool.models import BASE, Environment, Limits, Mold, SandboxId
from dayfly_pool.testing import Ended, FakeDriver, FakeGuest

SOON_S = 20.0
BASE_MOLD, BASE_ENVIRONMENT = Mold(BASE), Environment(digest=BASE)
DIGEST = "c0de" * 16
S1, S2 = SandboxId("sb-1"), SandboxId("sb-2")
MARK = f"86400.{os.getpid()}"
"""How long the functions' child processes sleep: by it they are found, whatever sees them."""

UID_FIRST = 3_500_000
CODE = f"""
import json, os, signal, subprocess, sys, time

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

def look(event, context):
    return [sorted(mine()), sorted(os.listdir("/tmp")), sorted(os.listdir("/code"))]

def write(event, context):
    open("/tmp/secret", "w").close()
    return True

def connect(event, context):
    import socket
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


async def fake_bequeath(guest: FakeGuest, request: Invoke, body: bytes) -> None:
    await guest.send(b"last words")
    raise Ended(Exit(5))


FAKES = {
    "main:greet": fake_greet,
    "main:leave": fake_leave,
    "main:die": fake_die,
    "main:obey": fake_obey,
    "main:defy": fake_defy,
    "main:breed": fake_breed,
    "main:end": fake_end,
    "main:bequeath": fake_bequeath,
}
M = TypeVar("M", bound=Message)


class Guest:
    """Our end of a sandbox's connection."""

    def __init__(self, end: socket.socket) -> None:
        self._socket, self._reader = end, FrameReader()
        self._heard: list[tuple[Message, bytes]] = []

    async def hear(self, kind: type[M]) -> tuple[M, bytes]:
        """The next message of *kind*; others before it are passed over."""
        async with asyncio.timeout(SOON_S):
            while True:
                while self._heard:
                    message, body = self._heard.pop(0)
                    if isinstance(message, kind):
                        return message, body
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

    async def load(self, name: str) -> Loaded:
        await self.say(load(name))
        return (await self.hear(Loaded))[0]

    async def start(self, event: Any, number: int = 1) -> None:
        body = json.dumps(event).encode()
        await self.say(Invoke(id=f"i{number}", remaining_s=60.0), number, body)

    async def call(self, event: Any, number: int = 1) -> Any:
        await self.start(event, number)
        return json.loads((await self.hear(Result))[1])

    def close(self) -> None:
        self._socket.close()


def load(name: str) -> Load:
    return Load(
        digest=DIGEST,
        handler=f"main:{name}",
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
    )


# ---- the drivers --------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with one package; shared, because its first use copies the interpreter."""
    folder = tmp_path_factory.mktemp("data")
    package = folder / "packages" / "unpacked" / DIGEST
    package.mkdir(parents=True)
    (package / "main.py").write_text(CODE)
    for path in (folder / "packages", folder / "packages" / "unpacked", package):
        path.chmod(0o755)
    return folder


def make_linux(data: Path) -> Driver:
    if find_bwrap() is None:
        why = "bwrap is missing: apt-get install bubblewrap"
        if os.environ.get("DAYFLY_TEST_NO_LINUX"):
            pytest.skip(f"{why} (DAYFLY_TEST_NO_LINUX is set)")
        pytest.fail(f"{why}, or set DAYFLY_TEST_NO_LINUX if this machine shall do without")
    return drivers.load("linux", data, UID_FIRST)


MAKE: dict[str, Callable[[Path], Driver]] = {
    "fake": lambda data: FakeDriver(FAKES),
    "process": lambda data: drivers.load("process", data, UID_FIRST),
    "linux": make_linux,
}


@pytest.fixture(params=MAKE)
async def driver(request: pytest.FixtureRequest, data: Path) -> AsyncIterator[Driver]:
    made = MAKE[request.param](data)
    await made.open()
    yield made
    await made.close()


@pytest.fixture
async def linux(data: Path) -> AsyncIterator[Driver]:
    made = make_linux(data)
    await made.open()
    yield made
    await made.close()


@pytest.fixture
async def guests() -> AsyncIterator[list[Guest]]:
    """Whoever is put in here is closed at the end."""
    opened: list[Guest] = []
    yield opened
    for guest in opened:
        guest.close()


@pytest.fixture
def create(driver: Driver, guests: list[Guest]) -> Callable[..., Any]:
    return creator(driver, guests)


def creator(driver: Driver, guests: list[Guest]) -> Callable[..., Any]:
    async def create(sandbox: SandboxId = S1, name: str = "") -> Guest:
        """A generic sandbox; one that has become the function *name*, if it is given."""
        async with asyncio.timeout(SOON_S):
            guest = Guest(await driver.create(sandbox, BASE_MOLD, BASE_ENVIRONMENT))
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


async def test_a_handler_that_is_missing_is_told(create: Any):
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

    assert used == 0 if isinstance(driver, FakeDriver) else 1 << 20 < used < 1 << 28
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


async def test_destroy_takes_every_process_with_it(driver: Driver, create: Any):
    """Children of the function too; when it returns, they are gone."""
    guest = await create(S1, "breed")
    await guest.call(None)
    assert len(sleepers()) == (0 if isinstance(driver, FakeDriver) else 3)
    await within(SOON_S, driver.destroy(S1))

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


@pytest.mark.parametrize("kind", MAKE)
async def test_close_leaves_nothing(kind: str, data: Path, guests: list[Guest]):
    """No process, no group, no descriptor; neither of one that works, nor of one that starts."""
    before, family = descriptors(), children()
    driver = MAKE[kind](data)
    await driver.open()
    create = creator(driver, guests)
    guest = await create(S1, "breed")
    await guest.call(None)
    await create(S2)
    await create(SandboxId("sb-3"), "greet")
    await driver.destroy(SandboxId("sb-3"))
    roots = driver._tree.roots if isinstance(driver, LinuxDriver) else ()
    assert all(map(os.path.isdir, [f"{root}/{S1}" for root in roots]))
    await within(SOON_S, driver.close())
    for each in guests:
        each.close()
    await asyncio.sleep(0)

    assert sleepers() == []
    assert children() == family
    assert not any(map(os.path.exists, roots))
    assert descriptors() == before


@pytest.mark.parametrize("kind", MAKE)
async def test_a_driver_that_was_never_opened_can_be_closed(kind: str, data: Path):
    """Opening may fail half way."""
    await within(SOON_S, MAKE[kind](data).close())


# ---- isolation ----------------------------------------------------------------------------------


async def test_two_sandboxes_do_not_see_each_other(linux: Driver, guests: list[Guest]):
    """Neither processes nor files."""
    create = creator(linux, guests)
    looker, writer = await create(S1, "look"), await create(S2, "write")
    assert await writer.call(None)
    pids, tmp, code = await looker.call(None)

    assert len(pids) == 2  # bwrap's pid 1 and the guest
    assert tmp == []
    assert set(code) <= {"main.py", "__pycache__"}


async def test_sandboxes_share_no_abstract_sockets(linux: Driver, guests: list[Guest]):
    """They belong to the network namespace, and each has its own."""
    create = creator(linux, guests)
    first, second = await create(S1, "connect"), await create(S2, "connect")
    assert await first.call("listen")

    assert await second.call("connect") == "ConnectionRefusedError"


async def test_every_sandbox_runs_as_a_user_of_its_own(linux: Driver, guests: list[Guest]):
    """As root: one that this machine does not know. Else they are all whoever runs the server."""
    create = creator(linux, guests)
    for sandbox in (S1, S2):
        guest = await create(sandbox, "breed")
        await guest.call(None)
    owners = {os.stat(f"/proc/{pid}").st_uid for pid in sleepers()}

    if os.geteuid() == 0:
        assert len(owners) == 2
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
