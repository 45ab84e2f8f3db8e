"""The guest: connect, say hello, become one function, answer its invocations.

Started as `python -I -S -X utf8 -c BOOT SETTINGS`, with the pool's socket as descriptor 3. A plain
loop on a blocking socket; asyncio is imported only when the handler is a coroutine.
"""

from __future__ import annotations

import gc
import json
import os
import select
import sys
import time

from dayfly import invoker, loader, output
from dayfly.protocol import (
    PROTOCOL,
    Failed,
    Frame,
    FrameReader,
    Hello,
    Invoke,
    Load,
    Loaded,
    Result,
    decode,
    encode,
)
from dayfly.record import Record

TYPE_CHECKING = False  # see `record`
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

SOCKET = 3
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
NO_NETWORK = (
    b"dayfly: this function has `network: none`, so it reaches nothing outside its sandbox; "
    b"if it is your own code and must, deploy it with --network host\n"
)
RECEIVE_BYTES = 32 * 1024  # from 128 KiB on every receive would map and unmap fresh memory


class Settings(Record):
    """What a guest is told at its start; nothing in it is secret."""

    isolated: bool
    seccomp: str
    packages: str
    libraries: list[str]
    preload: list[str]
    late: list[str]
    limit_memory: bool
    zygote: bool
    has_network: bool


class Guest:
    """One sandbox seen from inside: generic until `Load`, then one function until its end.

    *failures* are the modules that could not be preloaded.
    """

    def __init__(self, settings: Settings, failures: list[str]) -> None:
        self._settings, self._failures = settings, failures
        self._channel = output.Channel(SOCKET)
        self._output = output.Output(self._channel)
        self._reader = FrameReader()
        self._prepared: Any = None
        self._function: invoker.Function

    def run(self) -> None:
        """Live until the pool closes the connection."""
        self._become_generic()
        frames = self._frames()
        load = decode(next(frames), is_trusted=True)
        if not isinstance(load, Load):
            raise SystemExit(f"expected Load, got {type(load).__name__}")
        try:
            loaded = self._specialize(load)
        except loader.LoadFailure as failure:
            self._output.flush(0)
            text = (failure.kind, failure.message[:2048], failure.traceback)
            kind, message, trace = (t.encode(errors="replace").decode() for t in text)
            self._reply(0, Failed(kind=kind, message=message, traceback=trace))
            return
        self._output.flush(0)
        self._channel.send(encode(loaded))
        if self._function.is_async:
            import asyncio

            frames.close()  # the reader is `_serve`'s now, and must not hold `Load` any more
            asyncio.run(self._serve(asyncio.get_running_loop))
            return
        for frame in frames:
            request = decode(frame, is_trusted=True)
            assert isinstance(request, Invoke), request
            self._answer(frame, request)

    def _become_generic(self) -> None:
        settings = self._settings
        if settings.isolated and len(os.listdir("/proc/self/task")) > 1:
            _restart_with_late_preload(settings)
        hello = Hello(
            protocol=PROTOCOL,
            python=".".join(map(str, sys.version_info[:3])),
            preload_failures=self._failures,
        )
        self._channel.send(encode(hello))
        # what follows is done while the pool takes note, and sends `Load` if somebody waits
        if settings.isolated:
            from dayfly import lockdown

            with open(settings.seccomp, "rb") as file:
                self._prepared = lockdown.prepare(file.read())
        self._output.prepare()
        gc.freeze()
        gc.enable()

    def _specialize(self, load: Load) -> Loaded:
        started = time.perf_counter()
        settings = self._settings
        confirmed = (0, 0, 0, 0)
        code = os.path.join(settings.packages, load.digest)
        if settings.isolated:
            confirmed, code = self._lock_down(load)
        locked = time.perf_counter()
        home = "/tmp" if settings.isolated else os.environ.get("HOME", "/tmp")
        os.environ.update(
            {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": home, "LANG": "C.UTF-8"}
            | {"DAYFLY_FUNCTION": load.function, "DAYFLY_VERSION": load.version}
            | load.env
        )
        os.chdir(code)
        self._output.capture()
        if settings.isolated and load.network == "none":
            _explain_network(self._output)
        preload(load.preload or settings.late)
        handler = loader.load(code, load.handler)
        self._function = invoker.Function(
            name=load.function,
            namespace=load.namespace,
            version=load.version,
            memory_mb=load.memory_mb,
            code=code,
            handler=handler,
        )
        cap_eff, no_new_privs, seccomp, landlock = confirmed
        return Loaded(
            slots=load.concurrency if self._function.is_async else 1,
            lockdown_s=locked - started,
            import_s=time.perf_counter() - locked,
            cap_eff=cap_eff,
            no_new_privs=no_new_privs,
            seccomp=seccomp,
            landlock=landlock,
        )

    def _lock_down(self, load: Load) -> tuple[tuple[int, int, int, int], str]:
        """Become untrusted; a guest that the kernel does not confirm as such ends here."""
        from dayfly import lockdown

        memory = load.memory_mb << 20 if self._settings.limit_memory else None
        lockdown.mount_code(load.digest, load.tmp_mb)
        lockdown.limit(open_files=load.open_files, memory_bytes=memory)
        lockdown.lock_down(self._prepared, load.processes)
        rights = lockdown.rights()
        if rights != lockdown.LOCKED:
            raise SystemExit(f"the lock-down did not hold: {rights}")
        abi = self._prepared.landlock_abi
        return (rights.cap_eff, rights.no_new_privs, rights.seccomp, abi), lockdown.CODE

    def _answer(self, frame: Frame, request: Invoke) -> None:
        number = frame.invocation
        token = output.current.set(number)
        self._output.running = number
        message, body = invoker.call(self._function, request, frame.body)
        self._output.flush(number)
        self._output.running = 0
        output.current.reset(token)
        self._reply(number, message, body)

    def _reply(self, number: int, message: Result | Failed, body: bytes = b"") -> None:
        """Send an answer; one that the protocol cannot carry is user code's failure."""
        try:
            frame = encode(message, number, body)
        except Exception as error:  # too many headers, text that is not Unicode
            kind, text = "BadResponse", f"the response cannot be sent: {error}"[:500]
            if isinstance(message, Failed):
                kind, text = message.kind, message.message[:500]
            took_s = message.handler_s
            frame = encode(Failed(kind=kind, message=text, traceback="", handler_s=took_s), number)
        self._channel.send(frame)

    async def _serve(self, running_loop: Callable[[], Any]) -> None:
        """The loop for a coroutine handler: several invocations at once."""
        loop = running_loop()
        ended = loop.create_future()
        running = set()

        async def answer(frame: Frame, request: Invoke) -> None:
            output.current.set(frame.invocation)
            self._output.running = frame.invocation
            message, body = await invoker.call_async(self._function, request, frame.body)
            self._output.flush(frame.invocation)
            self._reply(frame.invocation, message, body)

        def readable() -> None:
            data = self._channel.socket.recv(RECEIVE_BYTES)
            if not data:
                loop.remove_reader(self._channel.socket)
                ended.set_result(None)
                return
            for frame in self._reader.feed(data):
                request = decode(frame, is_trusted=True)
                assert isinstance(request, Invoke), request
                task = loop.create_task(answer(frame, request))
                running.add(task)
                task.add_done_callback(running.discard)

        loop.add_reader(self._channel.socket, readable)
        await ended
        for task in running:
            task.cancel()

    def _frames(self) -> Any:
        readable = select.poll()
        readable.register(SOCKET, select.POLLIN)
        while readable.poll() and (data := self._channel.socket.recv(RECEIVE_BYTES)):
            yield from self._reader.feed(data)
        raise SystemExit(0)


def warm_up(settings: Settings) -> list[str]:
    """All that every sandbox of the environment has in common; the preloads that failed."""
    _yield_to_the_server()
    os.closerange(SOCKET + 1, 1024)
    sys.path.extend(settings.libraries)
    return _preload_single_threaded(settings.preload)


def _yield_to_the_server() -> None:
    """SCHED_BATCH: a guest that wakes up does not preempt the server that woke it."""
    if hasattr(os, "SCHED_BATCH"):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _preload_single_threaded(modules: list[str]) -> list[str]:
    """Keep numerical libraries from starting threads: a threaded process cannot be locked down."""
    added = [name for name in THREAD_VARIABLES if name not in os.environ]
    os.environ.update(dict.fromkeys(added, "1"))
    failures = preload(modules)
    for name in added:
        os.environ.pop(name, None)
    return failures


def _explain_network(out: output.Output) -> None:
    """Say once, in the function's log, why it cannot connect: the error alone would not tell."""
    told = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal told
        is_address = event == "socket.connect" and isinstance(arguments[1], tuple)
        if not told and (is_address or event == "socket.getaddrinfo"):
            told = True
            out.write("stderr", output.current.get(), NO_NETWORK)

    sys.addaudithook(hook)


def _restart_with_late_preload(settings: Settings) -> None:
    """A preloaded module started threads: start again, and import them after the lock-down."""
    again = settings.__dict__ | {"preload": [], "late": settings.preload}
    os.write(2, b"preload started threads; it will be done after the lock-down\n")
    os.execv(sys.executable, [*sys.orig_argv[:-1], json.dumps(again)])


def preload(modules: list[str]) -> list[str]:
    """Import *modules*; the names of those that would not are returned, with the reason."""
    failures = []
    for name in modules:
        try:
            __import__(name)
        except BaseException as error:
            failures.append(f"{name}: {type(error).__name__}: {error}"[:300])
    return failures


def main() -> None:
    """Entry point; the settings are the last argument, as JSON."""
    gc.disable()  # nothing of the start-up is garbage
    settings = Settings(**json.loads(sys.argv.pop()))
    try:
        failures = warm_up(settings)
        if settings.zygote:
            from dayfly import zygote

            zygote.serve(has_network=settings.has_network)  # returns in every forked sandbox
        Guest(settings, failures).run()
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the pool went away: nobody is left to tell


if __name__ == "__main__":
    main()
