"""Sandboxes on one Linux machine: bwrap's namespaces now, the guest's own lock-down at `Load`.

Works as root (then every sandbox is another unprivileged uid) and without. See `launcher` for
how bwrap is started and `dayfly.lockdown` for what the guest gives away.
"""

import asyncio
import contextlib
import errno
import json
import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import dayfly
from dayfly.folders import STORES
from dayfly_pool import memory
from dayfly_pool.config import Config
from dayfly_pool.driver import GENERIC_LIMITS, MEMORY_HEADROOM_MB, Exit, OnThisMachine
from dayfly_pool.drivers import cgroups, guest
from dayfly_pool.errors import DriverUnavailable, SandboxStartFailed, ZygoteUnfit
from dayfly_pool.models import Environment, Function, Limits, Mold, SandboxId

log = logging.getLogger("dayfly.driver")

CAPABILITIES: Final = (
    "CAP_SYS_ADMIN",
    "CAP_SYS_RESOURCE",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SETGID",
    "CAP_SETFCAP",
)
CAPABILITIES_TO_FORK: Final = (*CAPABILITIES, "CAP_NET_ADMIN", "CAP_SYS_CHROOT")
CAPABILITY_FOR_STEPS: Final = "CAP_DAC_OVERRIDE"
"""An overlay's own folder is nobody's to enter."""

PAGES_A_TABLE_PAGE: Final = 512
"""A fork has page tables of its own for all that it shares."""

FORK_BYTES: Final = 256 * 1024
"""What else the kernel keeps for a fork, charged to the zygote: stacks, descriptors, accounts."""

FORKS_PASSING_THROUGH: Final = 32
"""Processes that are in a zygote's group before they enter their own, and those of its keeper."""

ETC_NETWORK: Final = ("hosts", "resolv.conf", "nsswitch.conf", "services", "protocols", "gai.conf")
STDERR_LINES_PER_S_MAX: Final = 50
RESTART_DELAY_S: Final = 0.2


def find_bwrap() -> str | None:
    """The system's bwrap first (Ubuntu's AppArmor allows only that one), then the wheel's."""
    system = shutil.which("bwrap", path="/usr/bin:/usr/local/bin:/bin")
    if system:
        return system
    return shutil.which("bwrap", path=os.path.dirname(sys.executable))


class LinuxDriver(OnThisMachine):
    """See `Driver`."""

    isolated = True
    can_fork = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._data = config.data
        uid_first = config.uid_first
        self._uid_first = uid_first if os.geteuid() == 0 else None
        self.steps_owner = uid_first - 1 if os.geteuid() == 0 else os.geteuid()
        self._bwrap = ""
        self._sources: dict[str, str] = {}
        self._tree = self._apart = cgroups.Tree(0, ())
        self._launcher: asyncio.subprocess.Process | None = None
        self._control: socket.socket | None = None
        self._restarting: asyncio.Task[None] | None = None
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._exits: dict[str, asyncio.Future[Exit]] = {}
        self._ready: dict[str, asyncio.Future[None]] = {}
        self._uids: dict[str, int] = {}
        self._background: set[SandboxId] = set()
        self._set_apart: set[SandboxId] = set()
        self._forward: set[SandboxId] = set()
        """Of those apart: as long as there are any, all of these are like all others."""

        self._pids: dict[SandboxId, int] = {}
        """The topmost process of each."""

        self._free_uids: list[int] = []
        self._said: list[str] = []

    @property
    def sets_apart(self) -> bool:
        """Whether there is a place for what everything else on the machine comes before."""
        return self._apart.roots != self._tree.roots

    async def open(self) -> None:
        """Start the launcher; raises `DriverUnavailable` with the remedy when this cannot work."""
        bwrap = find_bwrap()
        if bwrap is None:
            raise DriverUnavailable("bwrap is not installed: apt-get install bubblewrap")
        self._bwrap = bwrap
        self._tree = cgroups.establish(cgroups.detect())
        if self._tree.version:
            await self._bury_leftovers()
            self._apart = cgroups.set_apart(self._tree)
        else:
            log.warning(
                "no cgroups: memory is limited a process only", extra={"reason": self._tree.reason}
            )
        self._sources = await asyncio.to_thread(self._find_sources)
        await self._start_launcher()
        cgroups.come_first(self._tree)

    def _find_sources(self) -> dict[str, str]:
        for name in ("packages/unpacked", "environments"):
            (self._data / name).mkdir(parents=True, exist_ok=True)
        guest.install_stores(self._data)
        return {
            "python": os.path.realpath(sys.base_prefix),
            "guest": str(guest.install(self._data)),
            "etc": str(guest.install_etc(self._data)),
            "packages": str(self._data / "packages" / "unpacked"),
            "environments": str(self._data / "environments"),
        } | {name: str(self._data / store) for name, store in guest.STORES.items()}

    async def _start_launcher(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        as_root = self._uid_first is not None
        roots = [str(Path(str(dayfly.__file__)).parents[1]), str(Path(__file__).parents[2])]
        boot = f"import sys; sys.path[:0]={roots!r}; "
        boot += "from dayfly_pool.drivers.launcher import main; main()"
        shell_free = [
            sys.executable,
            "-I",
            "-S",
            "-c",
            boot,
            json.dumps(self._sources if as_root else None),
        ]
        with theirs:
            self._launcher = await asyncio.create_subprocess_exec(
                *_with_descriptor_3(shell_free, theirs.fileno()),
                env={},
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        ours.setblocking(False)
        self._control = ours
        loop = asyncio.get_running_loop()
        loop.add_reader(ours.fileno(), self._hear)
        self._stderr = loop.create_task(self._read_stderr(), name="launcher-stderr")

    async def close(self) -> None:
        """Kill every sandbox and the launcher; nothing of this driver stays."""
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.wait({self._restarting})
        if self._control is not None:
            asyncio.get_running_loop().remove_reader(self._control.fileno())
            self._control.close()
            self._control = None
        if self._launcher is not None:
            try:
                async with asyncio.timeout(10):
                    await self._launcher.wait()
            except TimeoutError:
                self._launcher.kill()
                await self._launcher.wait()
            await self._stderr
        for future in self._exits.values():
            _set(future, Exit(-signal.SIGKILL))
        cgroups.step_back(self._tree)
        for root in self._roots():
            for _ in range(100):
                if cgroups.remove_tree(root):
                    break
                await asyncio.sleep(0.02)

    async def create(
        self,
        sandbox: SandboxId,
        mold: Mold,
        environment: Environment,
        zygote: SandboxId | None = None,
        keeps: Function | None = None,
        *,
        background: bool = False,
    ) -> socket.socket:
        """Start one sandbox, or have *zygote* fork it; raises `SandboxStartFailed`.

        Raises `ZygoteUnfit` for one that *keeps* a function where nothing limits its processes.
        """
        if keeps is not None and not self._tree.version:
            raise ZygoteUnfit(f"there are no control groups to limit it by: {self._tree.reason}")
        ours, theirs = socket.socketpair()
        self._place(sandbox, mold)
        background = background and sandbox not in self._set_apart
        request: dict[str, Any] = {"sandbox": sandbox, "folders": self._folders(sandbox)}
        request["background"] = background
        if background:
            self._background.add(sandbox)
        if zygote is None:
            request |= {"do": "create"} | self._started(sandbox, mold, environment)
        else:
            request |= {"do": "fork", "zygote": zygote, "keep": None}
            if keeps is not None:
                tmp_mb = keeps.spec.limits.tmp_mb
                request["keep"] = {"digest": keeps.spec.package, "tmp_mb": tmp_mb}
        try:
            with theirs:
                await self._made(sandbox, request, theirs.fileno())
            if background and sandbox not in self._background:  # not any more
                cgroups.give_way(self._folders(sandbox), background=False)
            if keeps is None:
                self.limit(sandbox, GENERIC_LIMITS)
            else:
                self._limit_zygote(sandbox, keeps)
        except BaseException:
            ours.close()
            raise
        ours.setblocking(False)
        return ours

    async def warm(self, zygote: SandboxId, mold: Mold, environment: Environment) -> None:
        """Start a zygote; returns when it is ready. Raises `SandboxStartFailed`, `ZygoteUnfit`."""
        self._place(zygote, mold)
        request: dict[str, Any] = {"do": "zygote", "sandbox": zygote, "background": False}
        request["folders"] = self._folders(zygote)
        request |= self._started(zygote, mold, environment, zygote=True)
        ready = self._ready[zygote] = asyncio.get_running_loop().create_future()
        try:
            await self._made(zygote, request)
            # without limits: only trusted code runs in it, and what the kernel needs for each of
            # its sandboxes is charged to it
            await ready
        finally:
            self._ready.pop(zygote, None)

    async def retire(self, zygote: SandboxId) -> None:
        """It forks no more, and ends after the last of its sandboxes."""
        with contextlib.suppress(SandboxStartFailed):
            await self._ask({"do": "retire", "sandbox": zygote})

    def _started(
        self, sandbox: SandboxId, mold: Mold, environment: Environment, *, zygote: bool = False
    ) -> dict[str, Any]:
        """What bwrap needs to know."""
        if self._uid_first is not None:
            self._uids[sandbox] = (
                self._free_uids.pop() if self._free_uids else self._uid_first + len(self._uids)
            )
        capabilities = list(CAPABILITIES_TO_FORK if zygote else CAPABILITIES)
        if mold.steps:
            capabilities.append(CAPABILITY_FOR_STEPS)
        return {
            "bwrap": self._bwrap,
            "arguments": self._arguments(mold, environment, capabilities),
            "command": self._command(mold, environment, zygote=zygote),
            "uid": self._uids.get(sandbox),
            "owner": self.steps_owner if mold.steps and self._uid_first is not None else None,
        }

    async def _made(
        self, sandbox: SandboxId, request: dict[str, Any], descriptor: int | None = None
    ) -> None:
        """Ask the launcher to make it, and wait until it has. Raises `SandboxStartFailed`."""
        loop = asyncio.get_running_loop()
        created = self._waiting[sandbox] = loop.create_future()
        self._exits[sandbox] = loop.create_future()
        try:
            await self._ask(request, descriptor)
            await created
        except SandboxStartFailed:
            _set(self._exits.get(sandbox), Exit(127))  # there is nothing to be killed
            raise
        finally:
            self._waiting.pop(sandbox, None)

    def _place(self, sandbox: SandboxId, mold: Mold) -> None:
        if mold.batch and self.sets_apart:
            self._set_apart.add(sandbox)
            self._background.discard(sandbox)  # of which it has no need

    def _tree_of(self, sandbox: SandboxId) -> cgroups.Tree:
        return self._apart if sandbox in self._set_apart else self._tree

    def _folders(self, sandbox: SandboxId) -> list[str]:
        return self._tree_of(sandbox).folders(sandbox)

    def _roots(self) -> set[str]:
        return {*self._tree.roots, *self._apart.roots}

    def _source(self, name: str) -> str:
        return f"/mnt/{name}" if self._uid_first is not None else self._sources[name]

    def _arguments(
        self, mold: Mold, environment: Environment, capabilities: Sequence[str]
    ) -> list[str]:
        python = self._sources["python"]
        arguments = ["--unshare-all", "--uid", "0", "--gid", "0", "--cap-drop", "ALL"]
        for capability in capabilities:
            arguments += ["--cap-add", capability]
        arguments += ["--die-with-parent", "--new-session", "--hostname", "dayfly"]
        arguments += ["--ro-bind", "/usr", "/usr"]
        for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
            if os.path.islink(f"/{name}"):
                arguments += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
            elif os.path.isdir(f"/{name}"):
                arguments += ["--ro-bind", f"/{name}", f"/{name}"]
        if mold.network == "host":
            arguments += ["--ro-bind", self._source("etc"), "/etc"]
            for name in ETC_NETWORK:
                arguments += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
        else:
            arguments += ["--ro-bind", self._source("etc"), "/etc"]
        if not python.startswith("/usr/"):
            arguments += ["--ro-bind", self._source("python"), python]
        arguments += ["--ro-bind", self._source("guest"), "/dayfly"]
        arguments += ["--ro-bind", self._source("packages"), "/packages"]
        arguments += ["--dir", "/code", "--dir", "/empty"]
        if mold.steps:
            arguments += ["--ro-bind", self._source("artifacts"), "/artifacts"]
            arguments += ["--bind", self._source("steps"), "/steps"]
            arguments += ["--ro-bind", self._source("layers"), "/layers"]
            arguments += ["--dir", "/in", "--dir", "/out", "--dir", "/workspaces"]
        if environment.path:
            source = f"{self._source('environments')}/{os.path.basename(environment.path)}"
            arguments += ["--ro-bind", source, "/environment"]
        if mold.network == "host":
            arguments += ["--share-net"]
        size = str(GENERIC_LIMITS.tmp_mb << 20)
        arguments += ["--proc", "/proc", "--dev", "/dev"]
        arguments += ["--perms", "1777", "--size", size, "--tmpfs", "/tmp"]
        arguments += ["--perms", "1777", "--size", size, "--tmpfs", "/dev/shm"]
        arguments += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/"]
        return arguments

    def _command(self, mold: Mold, environment: Environment, *, zygote: bool) -> list[str]:
        return guest.command(
            os.path.realpath(sys.executable),
            "/dayfly",
            "/packages",
            "/environment",
            environment,
            isolated=True,
            limit_memory=not self._tree.version,
            zygote=zygote,
            has_network=mold.network == "host",
            stores=STORES if mold.steps else None,
        )

    def limit(self, sandbox: SandboxId, limits: Limits) -> None:
        """Give *sandbox* the limits of the function that it becomes."""
        headroom = (limits.memory_mb + MEMORY_HEADROOM_MB) << 20
        # four of the sandbox's tasks are ours: bwrap's two, the guest and its thread
        groups = cgroups.Limits(headroom, limits.processes + 4, limits.cpu)
        try:
            cgroups.limit(self._tree_of(sandbox), sandbox, groups)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
            # it has just died; whoever waits for it will be told

    def give_way(self, sandbox: SandboxId, *, background: bool) -> None:
        """Let it run only when no others want the processor, or as all others do."""
        if sandbox in self._set_apart:
            self._bring_forward(sandbox, wanted=not background)
            return
        if background == (sandbox in self._background):
            return
        if background:
            self._background.add(sandbox)
        else:
            self._background.remove(sandbox)
        cgroups.give_way(self._tree.folders(sandbox), background=background)

    def _bring_forward(self, sandbox: SandboxId, *, wanted: bool) -> None:
        """All that stand apart, while it is wanted for any of them."""
        was_wanted = bool(self._forward)
        if wanted:
            self._forward.add(sandbox)
        else:
            self._forward.discard(sandbox)
        if was_wanted != bool(self._forward):
            cgroups.give_way([*self._apart.roots], background=was_wanted)

    def _limit_zygote(self, sandbox: SandboxId, function: Function) -> None:
        """The function's own limits, and what the kernel needs for each of its forks."""
        limits, forks = function.spec.limits, function.spec.max_scale
        memory_mb = limits.memory_mb + MEMORY_HEADROOM_MB
        tables = (limits.memory_mb << 20) // PAGES_A_TABLE_PAGE + FORK_BYTES
        processes = limits.processes + FORKS_PASSING_THROUGH
        groups = cgroups.Limits((memory_mb << 20) + forks * tables, processes, limits.cpu)
        cgroups.limit(self._tree_of(sandbox), sandbox, groups)

    async def terminate(self, sandbox: SandboxId) -> None:
        """Send SIGTERM to the guest."""
        await self._ask({"do": "terminate", "sandbox": sandbox})

    async def destroy(self, sandbox: SandboxId) -> Exit:
        """Kill the whole process tree."""
        if sandbox in self._exits and not self._exits[sandbox].done():
            with contextlib.suppress(SandboxStartFailed):  # without a launcher it is dead already
                await self._ask({"do": "kill", "sandbox": sandbox})
        exit_ = await self.exited(sandbox)
        if self._control is None and self._restarting is not None:
            await asyncio.wait({self._restarting})  # which makes sure that all of them are dead
        self._exits.pop(sandbox, None)
        self._background.discard(sandbox)
        self._bring_forward(sandbox, wanted=False)
        self._set_apart.discard(sandbox)
        self._pids.pop(sandbox, None)
        if sandbox in self._uids:
            self._free_uids.append(self._uids.pop(sandbox))
        return exit_

    async def exited(self, sandbox: SandboxId) -> Exit:
        """How it ended, as soon as it has."""
        if sandbox not in self._exits:
            return Exit(0)
        return await asyncio.shield(self._exits[sandbox])

    def memory_bytes(self, sandbox: SandboxId) -> int:
        """What its group uses now; without groups, what its processes do."""
        if self._tree.version:
            return cgroups.memory_bytes(self._tree_of(sandbox), sandbox)
        return memory.of_processes(self._pids[sandbox]) if sandbox in self._pids else 0

    def oom_kills(self, sandbox: SandboxId) -> int:
        """What its group has counted; 0 without groups."""
        return cgroups.autopsy(self._folders(sandbox)).oom_kills

    async def _ask(self, request: dict[str, Any], descriptor: int | None = None) -> None:
        data = json.dumps(request).encode()
        while self._control is not None:
            try:
                socket.send_fds(self._control, [data], [] if descriptor is None else [descriptor])
                return
            except BlockingIOError:
                await asyncio.sleep(0.001)
            except OSError as error:
                raise SandboxStartFailed(f"the launcher is gone: {error}") from error
        raise SandboxStartFailed("the driver is closed, or gets another launcher")

    def _hear(self) -> None:
        assert self._control is not None
        for _ in range(64):
            try:
                data = self._control.recv(65536)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._launcher_died()
                return
            self._note(json.loads(data))

    def _note(self, answer: dict[str, Any]) -> None:
        sandbox = answer["sandbox"]
        match answer["say"]:
            case "created":
                self._pids[sandbox] = answer["pid"]
                _set(self._waiting.get(sandbox), None)
            case "refused":
                _set(self._exits.get(sandbox), Exit(127))
                _fail(self._waiting.get(sandbox), SandboxStartFailed(answer["why"]))
            case "ready":
                _set(self._ready.get(sandbox), None)
            case "unfit":
                _fail(self._ready.get(sandbox), ZygoteUnfit(answer["why"]))
            case "exited":
                exit_ = Exit(answer["code"], answer["oom_kills"], answer["peak_bytes"])
                _set(self._exits.get(sandbox), exit_)
                why = SandboxStartFailed(f"the zygote ended with code {exit_.code}")
                _fail(self._ready.get(sandbox), why)

    def _launcher_died(self) -> None:
        assert self._control is not None
        log.error("the launcher died, and with it every sandbox")
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._control.fileno())
        self._control.close()
        self._control = None
        self._restarting = loop.create_task(self._restart_launcher(), name="launcher-restart")
        for future in self._exits.values():
            _set(future, Exit(-signal.SIGKILL))
        for waiting in (*self._waiting.values(), *self._ready.values()):
            _fail(waiting, SandboxStartFailed("the launcher died"))

    async def _restart_launcher(self) -> None:
        """Another launcher, once nothing is left of the dead one's sandboxes."""
        assert self._launcher is not None
        await self._launcher.wait()
        for root in self._roots():
            for name in os.listdir(root):
                if name.startswith("sb-"):
                    await self._bury(os.path.join(root, name))
        await self._stderr  # ends with the last of them
        await asyncio.sleep(RESTART_DELAY_S)
        await self._start_launcher()
        log.warning("another launcher has taken over")

    async def _read_stderr(self) -> None:
        assert self._launcher is not None
        assert self._launcher.stderr is not None
        second, lines = 0.0, 0
        while line := await self._launcher.stderr.readline():
            if (now := time.monotonic()) - second > 1:
                second, lines = now, 0
            lines += 1
            if lines <= STDERR_LINES_PER_S_MAX:
                text = line.decode(errors="replace").rstrip()[:500]
                log.warning("the driver says: %s", ascii(text)[1:-1])

    async def _bury_leftovers(self) -> None:
        for folder in cgroups.leftovers(self._tree):
            log.warning("burying what a dead server left", extra={"folder": folder})
            await self._bury(folder)

    async def _bury(self, folder: str) -> None:
        for _ in range(100):
            for pid in cgroups.processes(folder):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if cgroups.remove_tree(folder):
                break
            await asyncio.sleep(0.02)


def _set(future: asyncio.Future[Any] | None, value: Any) -> None:
    if future is not None and not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[Any] | None, error: Exception) -> None:
    if future is not None and not future.done():
        future.set_exception(error)
        future.exception()  # nobody may wait for it yet, or any more


def _with_descriptor_3(command: list[str], descriptor: int) -> list[str]:
    """*command* finds *descriptor* as its descriptor 3: its boot code moves it there."""
    boot = f"import os; os.dup2({descriptor}, 3) if {descriptor} != 3 else None; "
    return [*command[:4], boot + command[4], *command[5:]]
