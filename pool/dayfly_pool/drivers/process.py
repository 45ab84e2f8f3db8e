"""Sandboxes as plain child processes: no isolation at all, for laptops that cannot do better.

Chosen by name only, never as a fallback. It still gives separate processes, time limits and the
same protocol, so functions behave the same.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Final

from dayfly_pool.config import Config
from dayfly_pool.driver import Exit, OnThisMachine
from dayfly_pool.drivers import guest
from dayfly_pool.errors import SandboxStartFailed, ZygoteUnfit
from dayfly_pool.models import Environment, Function, Limits, Mold, SandboxId

log = logging.getLogger("dayfly.driver")
END_WITH_PARENT: Final = "import ctypes; ctypes.CDLL(None).prctl(1, 9); "
"""PR_SET_PDEATHSIG, SIGKILL: busy with a handler, it would not see that the server is gone."""


class ProcessDriver(OnThisMachine):
    """See `Driver`."""

    isolated = False
    can_fork = False
    sets_apart = False

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._data = config.data
        self._guest = Path()
        self._python = os.path.realpath(sys.executable)
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._exits: dict[str, asyncio.Task[Exit]] = {}
        self.steps_owner = os.geteuid()

    async def open(self) -> None:
        """Nothing of an earlier server can be found again; its guests ended with it."""
        log.warning("driver process: functions run WITHOUT isolation, with this user's rights")
        self._guest = await asyncio.to_thread(guest.install, self._data)
        await asyncio.to_thread(guest.install_stores, self._data)

    async def close(self) -> None:
        """Kill every sandbox."""
        for sandbox in list(self._processes):
            await self.destroy(SandboxId(sandbox))

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
        """Start one guest; raises `SandboxStartFailed`."""
        assert zygote is None
        ours, theirs = socket.socketpair()
        packages = str(self._data / "packages" / "unpacked")
        command = guest.command(
            self._python,
            str(self._guest),
            packages,
            environment.path,
            environment,
            isolated=False,
            limit_memory=False,
            stores={name: str(self._data / store) for name, store in guest.STORES.items()},
        )
        number = theirs.fileno()
        boot = f"import os; os.dup2({number}, 3); "
        if sys.platform == "linux":
            boot += END_WITH_PARENT
        command[-2] = boot + command[-2]
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *command, env={}, pass_fds=[number], stdin=-3, start_new_session=True
                )
        except OSError as error:
            ours.close()
            raise SandboxStartFailed(str(error)) from error
        ours.setblocking(False)
        self._processes[sandbox] = process
        self._exits[sandbox] = asyncio.create_task(_watch(process, ours), name=f"watch-{sandbox}")
        return ours

    async def warm(self, zygote: SandboxId, mold: Mold, environment: Environment) -> None:
        """Nothing is forked here: raises `ZygoteUnfit`."""
        raise ZygoteUnfit("the driver process starts every sandbox")

    async def retire(self, zygote: SandboxId) -> None:
        """There is none."""

    def limit(self, sandbox: SandboxId, limits: Limits) -> None:
        """Nothing is limited here; the time limits are the pool's."""

    def give_way(self, sandbox: SandboxId, *, background: bool) -> None:
        """Nothing goes first here."""

    async def terminate(self, sandbox: SandboxId) -> None:
        """Send SIGTERM to the guest."""
        with contextlib.suppress(ProcessLookupError, KeyError):
            self._processes[sandbox].terminate()

    async def destroy(self, sandbox: SandboxId) -> Exit:
        """Kill the guest's process group (a child that made a session of its own escapes)."""
        process = self._processes.get(sandbox)
        if process is None:
            return Exit(0)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        exit_ = await self.exited(sandbox)
        self._processes.pop(sandbox, None)
        self._exits.pop(sandbox, None)
        return exit_

    async def exited(self, sandbox: SandboxId) -> Exit:
        """How it ended, as soon as it has."""
        if sandbox not in self._exits:
            return Exit(0)
        return await asyncio.shield(self._exits[sandbox])

    def memory_bytes(self, sandbox: SandboxId) -> int:
        """Resident memory, where /proc tells it; else 0."""
        process = self._processes.get(sandbox)
        if process is None:
            return 0
        try:
            pages = Path(f"/proc/{process.pid}/statm").read_text().split()[1]
        except OSError:
            return 0
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def oom_kills(self, sandbox: SandboxId) -> int:
        """None: its memory has no limit."""
        return 0


async def _watch(process: asyncio.subprocess.Process, ours: socket.socket) -> Exit:
    """How it ended. Its connection ends with it, though a child of it may keep a copy.

    What it said before that can still be read. *ours* is the pool's now, which may have closed it.
    """
    exit_ = Exit(await process.wait())
    with contextlib.suppress(OSError):
        ours.shutdown(socket.SHUT_RDWR)
    return exit_
