"""Fakes, shipped: what tests of Dayfly, and of programs built on it, use instead of processes.

`FakeDriver` is a whole `Driver`: its sandboxes are asyncio tasks that speak the real protocol
over a real socket pair, and a Python callable stands for each function's code.
"""

import asyncio
import contextlib
import os
import platform
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from dayfly.capabilities import ZYGOTE_CAP_EFF
from dayfly.protocol import (
    PROTOCOL,
    Failed,
    Frame,
    FrameReader,
    Hello,
    Invoke,
    Load,
    Loaded,
    Log,
    Message,
    ProtocolError,
    Result,
    decode,
    encode,
)
from dayfly_pool.driver import Exit, OnThisMachine
from dayfly_pool.errors import SandboxStartFailed
from dayfly_pool.models import (
    BASE,
    Environment,
    Function,
    FunctionSpec,
    Limits,
    Mold,
    SandboxId,
    function_id,
)

KILLED: Final = Exit(-9)
TERMINATED: Final = Exit(-15)
DIGEST: Final = "0" * 64
RECEIVE_BYTES: Final = 256 * 1024

Answer = bytes | Result | Failed | None
Behaviour = Callable[["FakeGuest", Invoke, bytes], Awaitable[Answer]]
Hook = Callable[["FakeGuest"], Awaitable[None]]


def function(
    name: str = "greet",
    *,
    version: str = "1",
    environment: str = BASE,
    namespace: str = "",
    **spec: Any,
) -> Function:
    """One version of the function default/*name*; *spec* are fields of `FunctionSpec`.

    With *namespace* its sandboxes may be forked.
    """
    declared = FunctionSpec(**{"handler": f"main:{name}", "package": DIGEST} | spec)
    id_ = function_id("default", name)
    return Function(id_, version, declared, Mold(environment, declared.network, namespace))


class Ended(Exception):
    """Raised in a behaviour or a hook: the whole sandbox ends now, as *exit* says."""

    def __init__(self, exit_: Exit = KILLED) -> None:
        super().__init__(exit_)
        self.exit = exit_


class FakeGuest:
    """One fake sandbox, as its behaviours see it."""

    def __init__(
        self, driver: "FakeDriver", sandbox: SandboxId, mold: Mold, end: socket.socket
    ) -> None:
        self.sandbox, self.mold = sandbox, mold
        self.load: Load | None = None
        """The function that it has become."""

        self.folders = b""
        """What `Load` said of a step's folders: a `Mounts` in JSON. Nobody has mounted them."""

        self.limits: Limits | None = None
        self.oom_kills = 0
        self.terminated = asyncio.Event()
        """Set when it was asked to end by itself."""

        self.ignores_terminate = False
        self.ended: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self._driver, self.connection = driver, end
        self._writer: asyncio.StreamWriter
        self._invocations: set[asyncio.Task[None]] = set()
        self._life = asyncio.create_task(self._live(), name=f"fake-{sandbox}")

    async def say(self, message: Message, invocation: int = 0, body: bytes = b"") -> None:
        """Send one message, asked for or not."""
        await self.send(encode(message, invocation, body))

    async def send(self, data: bytes) -> None:
        """Send any bytes."""
        self._writer.write(data)
        await self._writer.drain()

    async def log(self, text: str, invocation: int = 0, stream: str = "stdout") -> None:
        """Write to the function's output."""
        await self.say(Log(stream=stream), invocation, text.encode())

    async def end(self, exit_: Exit) -> None:
        """Be dead, unless it is already; returns when nothing of it is left."""
        self._die(exit_)
        await asyncio.wait({self._life})
        self.connection.close()

    def _die(self, exit_: Exit) -> None:
        if not self.ended.done():
            self.ended.set_result(exit_)
        self._life.cancel()

    async def _live(self) -> None:
        reader, self._writer = await asyncio.open_unix_connection(sock=self.connection)
        exit_ = Exit(0)
        try:
            await self._driver.on_start(self)
            await self.say(_hello())
            frames = FrameReader()
            while data := await reader.read(RECEIVE_BYTES):
                for frame in frames.feed(data):
                    await self._take(frame)
        except Ended as ended:
            exit_ = ended.exit
        except ProtocolError:
            exit_ = Exit(1)
        except ConnectionError:
            pass  # the pool went away
        finally:
            if not self.ended.done():
                self.ended.set_result(exit_)
            for task in self._invocations:
                task.cancel()
            self._writer.transport.abort()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()

    async def _take(self, frame: Frame) -> None:
        request = decode(frame)
        if isinstance(request, Load):
            self.load = request
            self.folders = frame.body
            await self._become(request)
        elif isinstance(request, Invoke):
            task = asyncio.create_task(self._answer(frame, request))
            self._invocations.add(task)
            task.add_done_callback(self._invocations.discard)

    async def _become(self, load: Load) -> None:
        try:
            if self._driver.forked.get(self.sandbox) not in self._driver.kept:
                await self._driver.on_load(self)
            if load.as_zygote:
                self._driver.kept.add(self.sandbox)
            if load.handler not in self._driver.functions:
                raise LookupError(f"no behaviour is called {load.handler!r}")
        except Ended:
            raise
        except Exception as error:
            kind = "HandlerMissing" if isinstance(error, LookupError) else "ImportFailed"
            await self.say(Failed(kind=kind, message=str(error), traceback=""))
            return
        confirmed = (1, 2) if self._driver.isolated else (0, 0)
        left = self._driver.leaves
        await self.say(
            Loaded(
                slots=load.concurrency,
                import_s=self._driver.import_s,
                busy_s=0.0,
                lockdown_s=0.0,
                threads=left.get("threads", 0),
                children=left.get("children", 0),
                descriptors=left.get("descriptors", 0),
                cap_eff=ZYGOTE_CAP_EFF if load.as_zygote and self._driver.isolated else 0,
                no_new_privs=confirmed[0],
                seccomp=confirmed[1],
                landlock=0,
            )
        )

    async def _answer(self, frame: Frame, request: Invoke) -> None:
        assert self.load is not None
        behaviour = self._driver.functions[self.load.handler]
        try:
            answer = await behaviour(self, request, frame.body)
        except Ended as ended:
            self._die(ended.exit)
            return
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            answer = Failed(kind="Raised", message=message, traceback="")
        with contextlib.suppress(ConnectionError):
            if isinstance(answer, bytes):
                status = 200 if request.http is not None else 0
                result = Result(handler_s=0.0, status=status)
                await self.say(result, frame.invocation, answer)
            elif answer is not None:
                await self.say(answer, frame.invocation)


class FakeDriver(OnThisMachine):
    """See `Driver`. *functions* maps handlers (`main:greet`) to what they do.

    A behaviour returns the body, a `Result`, a `Failed`, or None for no answer at all; it raises
    `Ended` to crash the sandbox and anything else to fail. *on_start* and *on_load* run before
    `Hello` and `Loaded` are said, and may take their time or raise the same.
    """

    def __init__(
        self,
        functions: Mapping[str, Behaviour] | None = None,
        *,
        isolated: bool = True,
        on_start: Hook | None = None,
        on_load: Hook | None = None,
    ) -> None:
        super().__init__()
        self.isolated = isolated
        self.can_fork = self.sets_apart = True
        self.steps_owner = os.geteuid()
        self.functions = dict(functions or {})
        self.on_start, self.on_load = on_start or _nothing, on_load or _nothing
        self.refusal: Exception | None = None
        """What `create` raises while it is set."""

        self.chill: Exception | None = None
        """What `warm` raises while it is set."""

        self.import_s = 0.0
        """What every guest says that its import took."""

        self.leaves: dict[str, int] = {}
        """What it says that its import left behind: threads, children, descriptors."""

        self.kept: set[SandboxId] = set()
        """Those that hold a function, and are zygotes."""

        self.is_open = False
        self.guests: dict[SandboxId, FakeGuest] = {}
        """Those that were created and not destroyed yet."""

        self.zygotes: dict[SandboxId, asyncio.Future[Exit]] = {}
        """Those that were warmed and are not gone yet."""

        self.retired: set[SandboxId] = set()
        self.forked: dict[SandboxId, SandboxId] = {}
        """The zygote of every sandbox that was forked."""

        self.background: set[SandboxId] = set()
        """Those that give way to the others now."""

        self.created: list[SandboxId] = []
        self.destroyed: list[SandboxId] = []

    async def open(self) -> None:
        """There is nothing that an earlier one could have left."""
        self.is_open = True

    async def close(self) -> None:
        """End every sandbox."""
        for sandbox in list(self.guests):
            await self.destroy(sandbox)
        self.is_open = False

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
        """Start one guest; raises `SandboxStartFailed`, or what `refusal` holds."""
        if self.refusal is not None:
            raise self.refusal
        if not self.is_open:
            raise SandboxStartFailed("the driver is closed")
        if zygote is not None:
            ended = self.zygotes.get(zygote)
            if ended is None or ended.done() or zygote in self.retired:
                raise SandboxStartFailed(f"{zygote} is gone")
            self.forked[sandbox] = zygote
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        guest = self.guests[sandbox] = FakeGuest(self, sandbox, mold, theirs)
        if keeps is not None:
            self.zygotes[sandbox] = guest.ended
        self.created.append(sandbox)
        self.give_way(sandbox, background=background or mold.batch)
        return ours

    async def warm(self, zygote: SandboxId, mold: Mold, environment: Environment) -> None:
        """Have a zygote; raises what `chill` holds."""
        if self.chill is not None:
            raise self.chill
        self.zygotes[zygote] = asyncio.get_running_loop().create_future()

    async def retire(self, zygote: SandboxId) -> None:
        """It forks no more, and is gone with the last of its sandboxes."""
        self.retired.add(zygote)
        self._let_go()

    def _let_go(self) -> None:
        needed = {self.forked[guest] for guest in self.guests if guest in self.forked}
        for zygote in self.retired - needed:
            if zygote in self.zygotes and not self.zygotes[zygote].done():
                self.zygotes[zygote].set_result(Exit(0))

    def limit(self, sandbox: SandboxId, limits: Limits) -> None:
        """Remember what was asked for."""
        if sandbox in self.guests:
            self.guests[sandbox].limits = limits

    def give_way(self, sandbox: SandboxId, *, background: bool) -> None:
        """Remember what was asked for."""
        if background:
            self.background.add(sandbox)
        else:
            self.background.discard(sandbox)

    async def terminate(self, sandbox: SandboxId) -> None:
        """Ask the guest to end by itself."""
        guest = self.guests.get(sandbox)
        if guest is not None:
            guest.terminated.set()
            if not guest.ignores_terminate:
                await guest.end(TERMINATED)

    async def destroy(self, sandbox: SandboxId) -> Exit:
        """End the guest's task, and with it all that it does."""
        self.background.discard(sandbox)
        if ended := self.zygotes.pop(sandbox, None):
            for forked in self._forked_from(sandbox):
                await forked.end(KILLED)
            if not ended.done():
                ended.set_result(KILLED)
            if sandbox not in self.guests:
                return ended.result()
        guest = self.guests.get(sandbox)
        if guest is None:
            return Exit(0)
        await guest.end(KILLED)
        if self.guests.pop(sandbox, None) is not None:
            self.destroyed.append(sandbox)
        self._let_go()
        return guest.ended.result()

    async def exited(self, sandbox: SandboxId) -> Exit:
        """How it ended, as soon as it has."""
        guest = self.guests.get(sandbox)
        ended = self.zygotes.get(sandbox) or (guest.ended if guest is not None else None)
        return await asyncio.shield(ended) if ended is not None else Exit(0)

    def _forked_from(self, zygote: SandboxId) -> list[FakeGuest]:
        """Its forks, and theirs."""
        own = [g for g in self.guests.values() if self.forked.get(g.sandbox) == zygote]
        return own + [below for each in own for below in self._forked_from(each.sandbox)]

    def memory_bytes(self, sandbox: SandboxId) -> int:
        """Nothing, to a good approximation."""
        return 0

    def oom_kills(self, sandbox: SandboxId) -> int:
        """As many as the guest says."""
        return self.guests[sandbox].oom_kills if sandbox in self.guests else 0


async def _nothing(guest: FakeGuest) -> None:
    """The hook of a driver that was given none."""


def _hello() -> Hello:
    return Hello(protocol=PROTOCOL, python=platform.python_version(), preload_failures=[])
