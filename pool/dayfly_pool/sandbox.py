"""One live sandbox: its connection, its time limits, its death. The safe wrapper over any driver.

Whatever a guest sends is foreign: only answers to what is pending on this very connection are
taken, and anything else ends the sandbox (`ProtocolViolation`) and nothing else.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from dayfly.capabilities import ZYGOTE_CAP_EFF
from dayfly.freight import Unfit
from dayfly.protocol import (
    PROTOCOL,
    Failed,
    Fetch,
    Frame,
    FrameReader,
    Hello,
    Invoke,
    Load,
    Loaded,
    Log,
    Message,
    Piece,
    ProtocolError,
    Result,
    decode,
    encode,
)
from dayfly_pool.driver import GENERIC_LIMITS, Driver, Exit
from dayfly_pool.errors import PlatformError, SandboxStartFailed
from dayfly_pool.models import CANNOT_RUN, Environment, Failure, Function, Mold, Mounts, SandboxId

log = logging.getLogger("dayfly.sandbox")
LOG_BYTES_MAX: Final = 64 * 1024
LOG_FRAMES_BURST, LOG_FRAMES_PER_S_MAX = 20_000, 4000
"""More than this no guest of ours sends, even when we were slow to read."""

LOG_LINES_BURST, LOG_LINES_PER_S_MAX, LOG_LINES_KEPT = 10_000, 5000, 10
"""Lines over this are dropped, but for the last ones of a frame: they would hold up everybody."""

TIMES: Final[Mapping[type, tuple[str, ...]]] = {
    Loaded: ("import_s", "busy_s", "lockdown_s"),
    Result: ("handler_s",),
    Failed: ("handler_s",),
}
TIME_S_MAX: Final = 1e6
RUNNING_FAILURES: Final = frozenset({"Raised", "Exited", CANNOT_RUN, "BadResponse", "OutOfMemory"})
LOADING_FAILURES: Final = frozenset({"HandlerMissing", "SyntaxError", "ImportFailed"})
KILLED_CODE: Final = 128 + signal.SIGKILL
MORE_MEMORY: Final = "raise limits.memoryMb"
PIECE_BYTES: Final = 1 << 20
PYTHON: Final = f"{sys.version_info.major}.{sys.version_info.minor}"
"""What environments are built for."""

LogSink = Callable[[SandboxId, int, Log, bytes], None]
Answer = Callable[["Message | Lost", bytes], None]


class Lost(Exception):
    """The sandbox died, or was ended by us, while something was pending in it."""

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        was_killed: bool = False,
        error: PlatformError | None = None,
    ) -> None:
        super().__init__(message)
        self.kind, self.message, self.was_killed = kind, message, was_killed
        self.error = error
        """What is to be said instead, where it is no failure of the code's."""


class _Connection(asyncio.Protocol):
    """Our end of one guest's socket: frames in, at most what the limits allow."""

    def __init__(self, on_frame: Callable[[Frame], None], on_end: Callable[[str], None]) -> None:
        self._reader = FrameReader()
        self._on_frame, self._on_end = on_frame, on_end
        self._writable = asyncio.Event()
        self._writable.set()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's own class

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._reader.feed(data):
                self._on_frame(frame)
        except ProtocolError as error:
            self._on_end(str(error))

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    async def writable(self) -> None:
        """Return when there is room for more, or there is nobody any more who takes it."""
        await self._writable.wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._writable.set()
        self._on_end("")
        # nothing comes any more; the sandbox and this would keep each other until the collector's
        # turn, which for what has lived long comes after 100,000 others
        del self._on_frame, self._on_end


class Sandbox:
    """One sandbox from its creation to its end.

    *on_death* is called once, when it has ended by itself or broken the protocol, after everyone
    who was waiting for an answer has been told; *spawn* starts a task that the pool owns.
    """

    def __init__(
        self,
        id_: SandboxId,
        driver: Driver,
        *,
        on_log: LogSink,
        on_death: Callable[[SandboxId, str], None],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self.id = id_
        self.number = 0
        """The number of the invocation sent last."""

        self._driver = driver
        self._on_log, self._on_death, self._spawn = on_log, on_death, spawn
        self._connection: _Connection | None = None
        self._pending: dict[int, Answer] = {}
        self._violation = ""
        self._was_taken = False
        """Whether what keeps it was killed, which user code inside cannot do."""

        self._oom_kills = 0
        """Those of its processes that have been told of."""

        self._offered: tuple[str, Path] | None = None
        """What it may ask for now, once: the digest, and where it is."""

        self._mounts: Mounts | None = None
        """A step's folders, where they are carried to it and back."""

        self._folders_wanted: Mounts | None = None
        """The same, until it has asked for them."""

        self._loading: asyncio.Timeout | None = None
        self._load_s = 0.0
        self._collecting: asyncio.Task[None] | None = None
        self._is_over = False
        self._log_at = 0.0
        self._log_frames, self._log_lines = float(LOG_FRAMES_BURST), float(LOG_LINES_BURST)

    async def start(
        self,
        mold: Mold,
        environment: Environment,
        timeout_s: float,
        zygote: SandboxId | None = None,
        keeps: Function | None = None,
        *,
        background: bool = False,
    ) -> Hello:
        """Create it, or have *zygote* fork it, and wait until it is generic.

        In the *background* until it is told otherwise. With *keeps* it is to be that function's
        zygote. Raises `SandboxStartFailed`.
        """
        if (parcel := environment.parcel) is not None:
            self._offered = (parcel.digest, Path(parcel.path))
        message = await self._greeted(
            self._driver.create(self.id, mold, environment, zygote, keeps, background=background),
            timeout_s,
        )
        if message.slots:
            raise SandboxStartFailed("it holds a function already")
        if environment.path and message.python.rpartition(".")[0] != PYTHON:
            why = f"the environment is for Python {PYTHON}, the sandbox has {message.python}"
            raise SandboxStartFailed(why)
        for failure in message.preload_failures:
            log.warning("preload failed", extra={"environment": mold.environment, "why": failure})
        return message

    async def adopt(self, function: Function | None, timeout_s: float) -> Hello:
        """Take it over from a server that there was before; it holds *function*, or is generic.

        Waits until it has ended what it was doing. Raises `SandboxStartFailed`.
        """
        connecting = self._driver.adopt(self.id, has_function=function is not None)
        message = await self._greeted(connecting, timeout_s)
        most = function.spec.concurrency if function is not None else 0
        if not min(1, most) <= message.slots <= most:
            raise SandboxStartFailed(f"it offers {message.slots} places")
        return message

    async def _greeted(self, connecting: Awaitable[socket.socket], timeout_s: float) -> Hello:
        """Its first words, on the connection that *connecting* makes."""
        loop = asyncio.get_running_loop()
        hello = self._expect_setup()
        try:
            async with asyncio.timeout(timeout_s):
                end = await connecting
                connection = self._connection = _Connection(self._take, self._end)
                if end.family == socket.AF_UNIX:
                    await loop.create_unix_connection(lambda: connection, sock=end)
                else:
                    await loop.create_connection(lambda: connection, sock=end)
                message = await hello
        except TimeoutError:
            why = self._driver.trouble(self.id)
            raise SandboxStartFailed(f"not up within {timeout_s:g} s{why and ': '}{why}") from None
        except Lost as lost:
            raise SandboxStartFailed(lost.message) from None
        except OSError as error:  # no descriptor or memory left for one more
            raise SandboxStartFailed(str(error)) from error
        if not isinstance(message, Hello) or message.protocol != PROTOCOL:
            raise SandboxStartFailed(f"the guest does not speak protocol {PROTOCOL}")
        return message

    async def load(
        self,
        function: Function,
        environment: Environment,
        timeout_s: float,
        *,
        as_zygote: bool = False,
    ) -> Loaded | Failure | None:
        """Specialize it, or make it the function's zygote.

        What goes wrong is user code's failure and is returned.

        None: it was dead before it was asked, or was killed from outside, which is not the user
        code's doing.
        """
        if self._is_over:
            return None
        if function.spec.limits != GENERIC_LIMITS and not as_zygote:
            try:
                self._driver.limit(self.id, function.spec.limits)
            except OSError as error:  # the kernel refuses a memory limit below what is in use
                why = f"the environment alone needs more than the limits allow: {error}"
                return Failure("OutOfMemory", why)
        answer = self._expect_setup()
        archive = self._driver.archive(function.spec.package)
        self._offered = (function.spec.package, archive) if archive is not None else None
        self._mounts = self._folders_wanted = function.mounts if self._driver.carries else None
        folders = msgspec.json.encode(function.mounts) if function.mounts else b""
        load = _load(function, environment, timeout_s, as_zygote=as_zygote)
        self._send(encode(load, body=folders))
        try:
            self._load_s = timeout_s
            async with asyncio.timeout(timeout_s) as self._loading:
                message = await answer
        except TimeoutError:
            return Failure("InitTimedOut", f"the import took longer than {timeout_s:g} s")
        except Lost as lost:
            if self._was_taken:
                return None
            kind = "InitCrashed" if lost.kind == "Crashed" else lost.kind
            return Failure(kind, f"while importing the handler: {lost.message}")
        if isinstance(message, Failed):
            return Failure(message.kind, message.message, message.traceback)
        if not isinstance(message, Loaded):
            return Failure("ProtocolViolation", f"{type(message).__name__} instead of Loaded")
        capabilities = ZYGOTE_CAP_EFF if as_zygote else 0
        confirmed = (message.cap_eff, message.no_new_privs, message.seccomp)
        if self._driver.isolated and confirmed != (capabilities, 1, 2):
            return Failure("InitCrashed", "the sandbox did not confirm its lock-down")
        if not 1 <= message.slots <= function.spec.concurrency:
            return Failure("ProtocolViolation", f"the sandbox offers {message.slots} places")
        return message

    def invoke(self, request: Invoke, body: bytes, answer: Answer) -> None:
        """Send one invocation; *answer* is called once, with `Result`, `Failed` or `Lost`."""
        self.number += 1
        if self._is_over:
            why = "the sandbox died before the invocation reached it"
            gone = Lost("Crashed", why, was_killed=True)
            asyncio.get_running_loop().call_soon(answer, gone, b"")
            return
        try:
            frame = encode(request, self.number, body)
        except Exception as error:
            why = f"the request cannot be passed on: {error}"[:500]
            bad = Failed(kind="BadRequest", message=why, traceback="")
            asyncio.get_running_loop().call_soon(answer, bad, b"")
            return
        self._pending[self.number] = answer
        self._send(frame)

    @property
    def is_over(self) -> bool:
        """Whether it has ended, or is being ended; nothing is sent to it any more."""
        return self._is_over

    async def stop(self, kind: str, message: str, grace_s: float) -> None:
        """Ask with SIGTERM, then kill the whole tree; what is pending is `Lost` as told."""
        self._is_over = True
        self._lose(kind, message, was_killed=True)
        with contextlib.suppress(TimeoutError, SandboxStartFailed):
            await self._driver.terminate(self.id)
            async with asyncio.timeout(grace_s):
                await self._driver.exited(self.id)
        await self.destroy()

    async def destroy(self) -> Exit:
        """Kill what is left of it, close the connection; returns when every process is dead."""
        self._is_over = True
        self._lose("Crashed", "the sandbox was destroyed", was_killed=True)
        if self._collecting is not None:
            self._collecting.cancel()
            await asyncio.wait((self._collecting,))
        if self._connection is not None and self._connection.transport is not None:
            self._connection.transport.pause_reading()
        try:
            # killed before it can see its connection end: an interpreter that winds itself up
            # copies most of the pages that it shares with its siblings
            return await self._driver.destroy(self.id)
        finally:
            self._abort()

    def leave(self) -> None:
        """Let go of it, and let it live: whoever adopts it finds it as it is."""
        self._is_over = True
        self._lose("Crashed", "the server ends", was_killed=True)
        self._abort()

    def _expect_setup(self) -> asyncio.Future[Message]:
        """The one answer outside any invocation: `Hello`, then `Loaded` or `Failed`."""
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

        def answer(message: Message | Lost, body: bytes) -> None:
            if not future.done():
                if isinstance(message, Lost):
                    future.set_exception(message)
                    future.exception()  # a caller that has gone leaves no warning behind
                else:
                    future.set_result(message)

        if self._is_over:
            answer(Lost("Crashed", "the sandbox is gone"), b"")
        self._pending[0] = answer
        return future

    def _send(self, frame: bytes) -> None:
        if self._connection is not None and self._connection.transport is not None:
            self._connection.transport.write(frame)

    def _abort(self) -> None:
        if self._connection is not None and self._connection.transport is not None:
            self._connection.transport.abort()

    def _take(self, frame: Frame) -> None:
        if self._is_over or self._collecting is not None:
            return
        message = decode(frame)
        if isinstance(message, Log):
            self._take_log(frame, message)
            return
        if isinstance(message, Fetch):
            self._take_fetch(message)
            return
        expected = (Result, Failed) if frame.invocation else (Hello, Loaded, Failed)
        answer = self._pending.get(frame.invocation)
        if answer is None or not isinstance(message, expected):
            raise ProtocolError(f"unasked {type(message).__name__} for {frame.invocation}")
        _distrust(message, is_loading=not frame.invocation)
        if isinstance(message, Result) and self._mounts is not None:
            self._begin_collecting(frame, message, self._mounts)
            return
        del self._pending[frame.invocation]
        if isinstance(message, Failed) and message.exit_code == KILLED_CODE:
            message = self._explained(message)
        answer(message, frame.body)

    def _begin_collecting(self, frame: Frame, result: Result, mounts: Mounts) -> None:
        """It is the caller's answer when all that the step left is here, and not before."""
        if self._connection is not None and self._connection.transport is not None:
            self._connection.transport.pause_reading()
        work = self._collect(frame.invocation, result, frame.body, mounts)
        task = self._spawn(work)
        if isinstance(task, asyncio.Task):
            self._collecting = task

    async def _collect(self, number: int, result: Result, body: bytes, mounts: Mounts) -> None:
        message: Result | Lost = result
        try:
            await self._driver.collect(self.id, mounts)
        except (OSError, SandboxStartFailed) as error:
            why = f"the sandbox was lost before all that the step left was here: {error}"
            message = Lost("Crashed", why, was_killed=True)
        except PlatformError as error:
            message = Lost(type(error).__name__, error.detail, error=error)
        self._is_over = True
        if (answer := self._pending.pop(number, None)) is not None:
            answer(message, body)
        self._abort()

    def _take_fetch(self, message: Fetch) -> None:
        """Its environment, its package or its step's folders: each once, and nothing else."""
        mounts = self._folders_wanted
        if mounts is not None and message.digest == mounts.step:
            self._folders_wanted = None  # once
            self._spawn(self._send_folders(mounts))
            return
        offered, self._offered = self._offered, None
        if offered is None or message.digest != offered[0]:
            raise ProtocolError("it asks for what it is not to have")
        self._spawn(self._send_archive(offered[1]))

    async def _send_archive(self, archive: Path) -> None:
        """In pieces, as fast as they are taken. What cannot be read is not the guest's fault."""
        assert self._connection is not None
        try:
            with archive.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                while True:
                    if size <= PIECE_BYTES:  # most are, and are in the kernel's cache
                        data = file.read(PIECE_BYTES)
                    else:
                        data = await asyncio.to_thread(file.read, PIECE_BYTES)
                    size -= len(data)
                    is_last = size <= 0 or not data
                    self._send(encode(Piece(is_last=is_last), body=data))
                    if is_last:
                        return
                    await self._connection.writable()
        except OSError as error:
            log.error("archive not sent", extra={"path": str(archive), "why": str(error)})
            self._end("")

    async def _send_folders(self, mounts: Mounts) -> None:
        """Only what is not taken for too long is late."""
        assert self._connection is not None
        pieces = self._driver.folders(mounts)
        try:
            while piece := await asyncio.to_thread(next, pieces, b""):
                for at in range(0, len(piece), PIECE_BYTES):
                    body = piece[at : at + PIECE_BYTES]
                    self._send(encode(Piece(is_last=False), body=body))
                await self._connection.writable()
                self._was_taken_now()
                if self._is_over:
                    return
            self._send(encode(Piece(is_last=True)))
        except (OSError, Unfit) as error:
            log.error("folders not sent", extra={"step": mounts.step, "why": str(error)})
            self._end("")

    def _was_taken_now(self) -> None:
        loading = self._loading
        if loading is not None and not loading.expired():
            with contextlib.suppress(RuntimeError):  # it is over
                loading.reschedule(asyncio.get_running_loop().time() + self._load_s)

    def _explained(self, failed: Failed) -> Failed:
        """A process of it was killed: for its memory, if the kernel has done so just now."""
        before, self._oom_kills = self._oom_kills, self._driver.oom_kills(self.id)
        if self._oom_kills <= before:
            return failed
        why = f"{failed.message}: the kernel killed it at its memory limit: {MORE_MEMORY}"
        return Failed(**failed.__dict__ | {"kind": "OutOfMemory", "message": why})

    def _take_log(self, frame: Frame, message: Log) -> None:
        now = asyncio.get_running_loop().time()
        passed_s, self._log_at = now - self._log_at, now
        frames = self._log_frames + passed_s * LOG_FRAMES_PER_S_MAX
        self._log_frames = min(LOG_FRAMES_BURST, frames) - 1
        if self._log_frames < 0 or len(frame.body) > LOG_BYTES_MAX:
            raise ProtocolError("logs far over the rate")
        lines = self._log_lines + passed_s * LOG_LINES_PER_S_MAX
        self._log_lines = min(LOG_LINES_BURST, lines)
        most = max(LOG_LINES_KEPT, int(self._log_lines))
        kept = frame.body.rsplit(b"\n", most)
        body, dropped = frame.body, message.dropped
        if len(kept) > most:
            body = b"\n".join(kept[1:])
            dropped += len(frame.body) - len(body)
        self._log_lines = max(0.0, self._log_lines - len(kept))
        self._on_log(self.id, frame.invocation, Log(stream=message.stream, dropped=dropped), body)

    def _end(self, violation: str) -> None:
        """The connection is gone (no *violation*), or must go."""
        if self._is_over or self._collecting is not None:
            return
        self._is_over = True
        self._violation = violation
        self._abort()
        self._spawn(self._report())

    async def _report(self) -> None:
        """Find out how it ended, tell everyone who waits, then the pool."""
        exit_: Exit | None = None
        if not self._violation:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._driver.report_s):
                    exit_ = await self._driver.exited(self.id)
        if exit_ is None and not self._violation:
            exit_ = await self._finish_off()
        if exit_ is not None:
            self._was_taken = exit_.code == -signal.SIGKILL and not exit_.oom_kills
        kind, message = _cause(self._violation, exit_)
        was_killed = (
            not self._violation
            and exit_ is not None
            and exit_.code in (-signal.SIGKILL, 128 + signal.SIGKILL)
            and not exit_.oom_kills
        )
        self._lose(kind, message, was_killed=was_killed)
        self._on_death(self.id, f"{kind}: {message}")

    async def _finish_off(self) -> Exit | None:
        """It left the connection, yet it lives: killed now. Only lack of memory excuses it."""
        with contextlib.suppress(TimeoutError, SandboxStartFailed):
            async with asyncio.timeout(1):
                exit_ = await self._driver.destroy(self.id)
                return exit_ if exit_.oom_kills else None
        return None

    def _lose(self, kind: str, message: str, *, was_killed: bool) -> None:
        pending, self._pending = self._pending, {}
        for answer in pending.values():
            answer(Lost(kind, message, was_killed=was_killed), b"")


def _distrust(message: Message, *, is_loading: bool) -> None:
    """Raise `ProtocolError` for values that no guest of ours sends."""
    kinds = LOADING_FAILURES if is_loading else RUNNING_FAILURES
    if isinstance(message, Failed) and message.kind not in kinds:
        raise ProtocolError(f"failure kind {message.kind[:40]!r}")
    values = message.__dict__
    for name in TIMES.get(type(message), ()):
        if not 0 <= values[name] < TIME_S_MAX:
            raise ProtocolError("a time that cannot be")


def _load(
    function: Function, environment: Environment, timeout_s: float, *, as_zygote: bool
) -> Load:
    spec, limits = function.spec, function.spec.limits
    return Load(
        digest=spec.package,
        handler=spec.handler or "",
        namespace=function.namespace,
        function=function.name,
        version=function.version,
        env=spec.env,
        network=spec.network,
        memory_mb=limits.memory_mb,
        processes=limits.processes,
        open_files=limits.open_files,
        tmp_mb=limits.tmp_mb,
        concurrency=spec.concurrency,
        preload=[] if environment.early else list(environment.preload),
        init_timeout_s=timeout_s,
        as_zygote=as_zygote,
    )


def left_behind(loaded: Loaded) -> str:
    """What the import has left behind and no fork could share, in words; empty for nothing."""
    counts = {
        "threads": loaded.threads,
        "child processes": loaded.children,
        "open files or sockets": loaded.descriptors,
    }
    return ", ".join(f"{number} {what}" for what, number in counts.items() if number > 0)


def _cause(violation: str, exit_: Exit | None) -> tuple[str, str]:
    """(failure kind, message) of a death."""
    if violation:
        return "ProtocolViolation", f"the sandbox broke the protocol: {violation}"
    if exit_ is None:
        return "Crashed", "the sandbox closed its connection"
    if exit_.oom_kills:
        peak = exit_.peak_bytes >> 20
        why = f"killed by the kernel at its memory limit (peak {peak} MiB): {MORE_MEMORY}"
        return "OutOfMemory", why
    number = -exit_.code if exit_.code < 0 else exit_.code - 128
    if 0 < number < 65:
        return "Crashed", f"the sandbox was killed by signal {number}"
    return "Crashed", f"the sandbox exited with code {exit_.code}"
