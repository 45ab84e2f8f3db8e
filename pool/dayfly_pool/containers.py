"""Pods of users' own images, as sandboxes: one that serves HTTP, one that runs to its end.

Both are to the pool what `Sandbox` is: started, loaded, invoked, stopped, destroyed. What a
container answers is foreign: its heads and bodies have limits, and no word of it passes for ours.
"""

import asyncio
import contextlib
import io
import json
import logging
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final

import aiohttp
import msgspec
from multidict import CIMultiDict
from yarl import URL

from dayfly.protocol import BODY_BYTES_MAX, PROTOCOL, Failed, Hello, Invoke, Loaded, Log, Result
from dayfly_pool.driver import Driver, Exit
from dayfly_pool.errors import SandboxStartFailed
from dayfly_pool.models import (
    CANNOT_RUN,
    Container,
    Environment,
    Failure,
    Function,
    Mold,
    SandboxId,
)
from dayfly_pool.sandbox import LOG_BYTES_MAX, MORE_MEMORY, Answer, LogSink, Lost

log = logging.getLogger("dayfly.sandbox")
KNOCK_S, KNOCK_S_MAX = 0.02, 0.25
"""Between two tries to reach a container that does not listen yet."""

CONNECT_S_MAX: Final = 3.0
KEEP_S: Final = 2.0
"""An unused connection is closed before most servers would, so that no request meets that."""

CAUSE_S_MAX: Final = 2.0
"""How long the kubelet's account of a broken connection is waited for."""

TELL_S: Final = 5.0
"""So often it is told in the log what a pod waits for, if that has changed."""

HEADERS_MAX: Final = 100
HEADER_BYTES_MAX: Final = 16 * 1024
LINE_BYTES_MAX: Final = 8190
RESULT_BYTES_MAX: Final = 4096
"""What the kubelet keeps of a container's last message."""

ITEM_BYTES_MAX: Final = 32 * 1024
SAID_CHARACTERS: Final = 500
KILLED: Final = 128 + signal.SIGKILL
NEVER_RAN: Final = ("ContainerCannotRun", "StartError")
"""The kubelet's words for a program that is not there, or is none."""

HOP_BY_HOP: Final = frozenset(
    {
        "connection",
        "content-length",
        "expect",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
OURS: Final = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
"""Headers that the client would add by itself."""


class _Pod:
    """What both have in common."""

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
        self._on_log, self._on_death = on_log, on_death
        self._pending: dict[int, Answer] = {}
        self._working: set[asyncio.Task[None]] = set()
        self._is_over = False

    @property
    def is_over(self) -> bool:
        """Whether it has ended, or is being ended; nothing is sent to it any more."""
        return self._is_over

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
        """Nothing is made before it is known for which function."""
        return _hello(0)

    def invoke(self, request: Invoke, body: bytes, answer: Answer) -> None:
        """Begin one invocation; *answer* is called once, with `Result`, `Failed` or `Lost`."""
        self.number += 1
        if self._is_over:
            why = "the sandbox died before the invocation reached it"
            gone = Lost("Crashed", why, was_killed=True)
            asyncio.get_running_loop().call_soon(answer, gone, b"")
            return
        number = self.number
        self._pending[number] = answer
        self._begin(self._work(number, request, body))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Have it done until we are done with the pod."""
        task = asyncio.create_task(work)
        self._working.add(task)
        task.add_done_callback(self._working.discard)

    async def _work(self, number: int, request: Invoke, body: bytes) -> None:
        try:
            message, found = await self._invoked(number, request, body)
        except Lost as lost:
            self._die(lost)
        except Exception as error:  # a defect of ours must not leave the caller waiting
            log.exception("an invocation of a container failed")
            self._answer(number, _failed("BadResponse", repr(error)), b"")
        else:
            self._answer(number, message, found)

    async def _invoked(
        self, number: int, request: Invoke, body: bytes
    ) -> tuple[Result | Failed, bytes]:
        raise NotImplementedError

    def _answer(self, number: int, message: Result | Failed, body: bytes) -> None:
        if answer := self._pending.pop(number, None):
            answer(message, body)

    async def stop(self, kind: str, message: str, grace_s: float) -> None:
        """End it: with SIGTERM and the pod's own grace. What is pending is `Lost` as told."""
        self._is_over = True
        self._lose(Lost(kind, message, was_killed=True))
        await self.destroy()

    async def destroy(self) -> Exit:
        """Have it end. Its pod has its grace for that, which is not waited for."""
        self._is_over = True
        self._lose(Lost("Crashed", "the sandbox was destroyed", was_killed=True))
        for task in self._working:
            task.cancel()
        return await self._driver.destroy(self.id)

    def leave(self) -> None:
        """Let go of it, and let it live: whoever comes after us sees to it."""
        self._is_over = True
        self._lose(Lost("Crashed", "the server ends", was_killed=True))
        for task in self._working:
            task.cancel()

    def _die(self, lost: Lost) -> None:
        if not self._is_over:
            self._is_over = True
            self._lose(lost)
            self._on_death(self.id, f"{lost.kind}: {lost.message}")

    def _lose(self, lost: Lost) -> None:
        pending, self._pending = self._pending, {}
        for answer in pending.values():
            answer(lost, b"")

    async def _run(
        self, function: Function, container: Container, env: Mapping[str, str], number: int = 0
    ) -> str:
        """Its address, or empty when it has ended. What it waits for is told in the log."""
        telling = asyncio.create_task(self._tell(number))
        try:
            return await self._driver.run(self.id, function, container, env)
        finally:
            telling.cancel()

    async def _tell(self, number: int) -> None:
        told = ""
        while True:
            await asyncio.sleep(TELL_S)
            if (why := self._driver.trouble(self.id)) and why != told:
                told = why
                self._write(f"the pod waits: {why}".encode(), number)

    def _write(self, output: bytes, number: int) -> None:
        """Into the function's log, whole lines at a time."""
        while output:
            cut = len(output)
            if cut > LOG_BYTES_MAX:
                cut = output.rfind(b"\n", 0, LOG_BYTES_MAX) + 1 or LOG_BYTES_MAX
            self._on_log(self.id, number, Log(stream="stdout"), output[:cut].rstrip(b"\n"))
            output = output[cut:]


class Served(_Pod):
    """A pod that serves HTTP: each invocation is a request to it, several at once."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._session: aiohttp.ClientSession | None = None
        self._base = URL()

    async def adopt(self, function: Function | None, timeout_s: float) -> Hello:
        """Take over a pod that an earlier server made. Raises `SandboxStartFailed`."""
        if function is None:
            raise SandboxStartFailed("it is no function's")
        try:
            async with asyncio.timeout(timeout_s):
                address = await self._driver.rejoin(self.id)
                await _listening(address, function.spec.port)
        except TimeoutError:
            raise SandboxStartFailed("it does not listen") from None
        self._open(address, function)
        return _hello(function.spec.concurrency)

    async def load(
        self, function: Function, environment: Environment, timeout_s: float
    ) -> Loaded | Failure | None:
        """Make its pod, and wait until that listens. A failure is the image's, or says why not.

        *timeout_s* is for room and the image; then its own `startupSeconds` begin.
        """
        assert environment.container is not None
        try:
            async with asyncio.timeout(timeout_s):
                address = await self._run(function, environment.container, {})
        except TimeoutError:
            why = self._driver.trouble(self.id)
            return Failure("InitTimedOut", f"no pod within {timeout_s:g} s{why and ': '}{why}")
        except SandboxStartFailed as error:
            return Failure("InitCrashed", error.detail)
        started = time.monotonic()
        if address and (failure := await self._await_listening(address, function)):
            return failure
        if not address:
            return self._told_of(await self._driver.exited(self.id))
        self._open(address, function)
        return Loaded(
            slots=function.spec.concurrency,
            import_s=time.monotonic() - started,
            busy_s=0.0,
            lockdown_s=0.0,
            threads=0,
            children=0,
            descriptors=0,
            cap_eff=0,
            no_new_privs=1,
            seccomp=2,
            landlock=0,
        )

    async def _await_listening(self, address: str, function: Function) -> Failure | None:
        limit_s, port = function.spec.startup_seconds, function.spec.port
        knocking = asyncio.create_task(_listening(address, port))
        ending = asyncio.create_task(self._driver.exited(self.id))
        both: set[asyncio.Task[Any]] = {knocking, ending}
        try:
            await asyncio.wait(both, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if knocking.done() and not ending.done():
                return None
            if ending.done():
                return self._told_of(ending.result())
            output = await self._driver.output(self.id)
            self._write(output, 0)
            why = f"nothing listens on port {port} {limit_s:g} s after its start"
            return Failure("InitTimedOut", f"{why}{_last_line(output)}")
        finally:
            for task in both:
                task.cancel()

    def _told_of(self, exit_: Exit) -> Failure:
        """It ended before it listened."""
        self._write(exit_.said.encode(), 0)
        lost = _lost(exit_)
        kind = lost.kind if lost.kind == "OutOfMemory" else "InitCrashed"
        return Failure(kind, f"before it listened, {lost.message}")

    def _open(self, address: str, function: Function) -> None:
        host = f"[{address}]" if ":" in address else address
        self._base = URL(f"http://{host}:{function.spec.port}")
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=function.spec.concurrency, keepalive_timeout=KEEP_S, use_dns_cache=False
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S_MAX),
            auto_decompress=False,
            skip_auto_headers=OURS,
            max_line_size=LINE_BYTES_MAX,
            max_field_size=LINE_BYTES_MAX,
        )
        self._begin(self._watch(self._session))

    async def _watch(self, session: aiohttp.ClientSession) -> None:
        """Until it ends, or we are done with it: then its connections are closed."""
        async with session:
            exit_ = await self._driver.exited(self.id)
            if not self._is_over:
                self._write(exit_.said.encode(), 0)
                self._die(_lost(exit_))

    async def _invoked(
        self, number: int, request: Invoke, body: bytes
    ) -> tuple[Result | Failed, bytes]:
        begun = time.monotonic()
        try:
            status, headers, found = await self._exchange(request, body)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CAUSE_S_MAX):
                    raise _lost(await self._driver.exited(self.id)) from error
            why = f"the container's answer is no HTTP response: {error!r}"[:SAID_CHARACTERS]
            return _failed("BadResponse", why, time.monotonic() - begun), b""
        except _TooLarge as error:
            return _failed("BadResponse", str(error), time.monotonic() - begun), b""
        took_s = time.monotonic() - begun
        if request.http is not None:
            return Result(handler_s=took_s, status=status, headers=headers), found
        if 200 <= status < 300:
            return Result(handler_s=took_s), _value(found)
        said = found[:SAID_CHARACTERS].decode(errors="replace")
        return _failed("Raised", f"status {status}: {said}", took_s), b""

    async def _exchange(self, request: Invoke, body: bytes) -> tuple[int, list[list[str]], bytes]:
        """(status, headers, body) of what it answers; what is no answer raises."""
        assert self._session is not None
        method, path, query, headers = _asked(request)
        url = self._base.with_path(path, encoded=True)
        url = url.with_query(None) if not query else URL(f"{url}?{query}", encoded=True)
        data = io.BytesIO(body) if body else None  # written in pieces, however large
        async with self._session.request(
            method, url, headers=headers, data=data, allow_redirects=False
        ) as reply:
            theirs = _headers(reply.raw_headers)
            found = bytearray()
            async for piece in reply.content.iter_any():
                found += piece
                if len(found) > BODY_BYTES_MAX:
                    raise _TooLarge(f"a body over {BODY_BYTES_MAX} bytes")
            return reply.status, theirs, bytes(found)


class Ran(_Pod):
    """A place for pods that run to their ends, one after the other: each invocation is one."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._function: Function
        self._container: Container

    async def adopt(self, function: Function | None, timeout_s: float) -> Hello:
        """None is taken over: what an earlier server ran is begun anew."""
        raise SandboxStartFailed("it runs to its end for a server that is gone")

    async def load(
        self, function: Function, environment: Environment, timeout_s: float
    ) -> Loaded | Failure | None:
        """It is ready as it is."""
        assert environment.container is not None
        self._function, self._container = function, environment.container
        return Loaded(
            slots=1, import_s=0.0, busy_s=0.0, lockdown_s=0.0, threads=0, children=0,
            descriptors=0, cap_eff=0, no_new_privs=1, seccomp=2, landlock=0,
        )  # fmt: skip

    async def _invoked(
        self, number: int, request: Invoke, body: bytes
    ) -> tuple[Result | Failed, bytes]:
        begun, env = time.monotonic(), dict(request.env or {})
        item = msgspec.json.decode(body).get("item") if body else None
        if item is not None:
            env["JOB_ITEM"] = msgspec.json.encode(item).decode()
            if len(env["JOB_ITEM"]) > ITEM_BYTES_MAX:
                why = f"an item of over {ITEM_BYTES_MAX >> 10} KiB is too large for an image"
                return _failed(CANNOT_RUN, why), b""
        try:
            await self._run(self._function, self._container, env, number)
            exit_ = await self._driver.exited(self.id)
            output = b"" if exit_.code == -signal.SIGKILL else await self._driver.output(self.id)
        except SandboxStartFailed as error:
            return _failed(CANNOT_RUN, error.detail), b""
        finally:
            if not self._is_over:
                await self._driver.destroy(self.id)
        if exit_.code and not output:  # the node's logs cannot be reached; this is their end
            output = exit_.said.encode()
        self._write(output, number)
        return _ended(exit_, output, time.monotonic() - begun)


class _TooLarge(Exception):
    """More than there may be."""


def _ended(exit_: Exit, output: bytes, took_s: float) -> tuple[Result | Failed, bytes]:
    """What the end of a container that runs to it means. Raises `Lost` if that was not its own."""
    if exit_.oom_kills:
        why = f"killed by the kernel at its memory limit: {MORE_MEMORY}"
        return _failed("OutOfMemory", why, took_s, KILLED), b""
    if exit_.why in NEVER_RAN:
        return _failed(CANNOT_RUN, exit_.said[:SAID_CHARACTERS] or exit_.why, took_s), b""
    if exit_.code < 0 or exit_.code == KILLED:
        raise _lost(exit_)
    if exit_.code:
        why = f"exit code {exit_.code}{_last_line(output)}"
        return _failed("Exited", why, took_s, exit_.code), b""
    said = exit_.said.encode()
    if len(said) >= RESULT_BYTES_MAX:
        why = f"an image's result has less than {RESULT_BYTES_MAX} bytes"
        return _failed("ResultTooLarge", why, took_s), b""
    return Result(handler_s=took_s), _value(said)


def _value(text: bytes) -> bytes:
    """*text* if it is JSON, else as a JSON string; nothing is null."""
    if not text.strip():
        return b"null"
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return json.dumps(text.decode(errors="replace").rstrip("\n")).encode()
    return text


def _asked(request: Invoke) -> tuple[str, str, str, CIMultiDict[str]]:
    """(method, path, query, headers) of what the container is asked."""
    headers: CIMultiDict[str] = CIMultiDict()
    http: Mapping[str, Any] = request.http or {"headers": [["content-type", "application/json"]]}
    named = [v for n, v in http["headers"] if n == "connection"]
    dropped = {word.strip().lower() for value in named for word in value.split(",")}
    for name, value in http["headers"]:
        if name not in HOP_BY_HOP and name not in dropped:
            headers.add(name, value)
    headers["Dayfly-Invocation"] = request.id
    if request.trace:
        headers["traceparent"] = request.trace
    if http.get("source") and "x-forwarded-for" not in headers:
        headers["X-Forwarded-For"] = http["source"]
    return http.get("method", "POST"), http.get("path") or "/", http.get("query", ""), headers


def _headers(raw: Any) -> list[list[str]]:
    """The container's, without those of its connection."""
    pairs = [[n.decode("latin-1"), v.decode("utf-8", "replace")] for n, v in raw]
    if len(pairs) > HEADERS_MAX or sum(len(n) + len(v) for n, v in raw) > HEADER_BYTES_MAX:
        raise _TooLarge(f"over {HEADERS_MAX} headers, or {HEADER_BYTES_MAX} bytes of them")
    return [pair for pair in pairs if pair[0].lower() not in HOP_BY_HOP]


async def _listening(address: str, port: int) -> None:
    """Knock until somebody opens; the caller limits how long."""
    wait_s = KNOCK_S
    while True:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(CONNECT_S_MAX):
                _, end = await asyncio.open_connection(address, port, flags=socket.AI_NUMERICHOST)
            end.transport.abort()
            return
        await asyncio.sleep(wait_s)
        wait_s = min(wait_s * 2, KNOCK_S_MAX)


def _lost(exit_: Exit) -> Lost:
    """The death of a container."""
    if exit_.oom_kills:
        why = f"the container was killed at its memory limit: {MORE_MEMORY}"
        return Lost("OutOfMemory", why)
    was_killed = exit_.code in (-signal.SIGKILL, KILLED)
    number = -exit_.code if exit_.code < 0 else exit_.code - 128
    what = f"exited with code {exit_.code}"
    if 0 < number < 65:
        what = f"was killed by signal {number}"
    if exit_.why not in ("", "Error", "Completed"):
        what += f" ({exit_.why})"
    what += _last_line(exit_.said.encode())
    return Lost("Crashed", f"the container {what}", was_killed=was_killed)


def _last_line(output: bytes) -> str:
    lines = output[-LOG_BYTES_MAX:].decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f": {last[:SAID_CHARACTERS]}" if last else ""


def _failed(kind: str, message: str, took_s: float = 0.0, code: int = -1) -> Failed:
    return Failed(kind=kind, message=message, traceback="", handler_s=took_s, exit_code=code)


def _hello(slots: int) -> Hello:
    return Hello(protocol=PROTOCOL, python="", preload_failures=[], slots=slots)
