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

from dayfly import hooks, invoker, loader, output
from dayfly.context import FOLDERS
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
    Result,
    decode,
    encode,
)
from dayfly.record import Record

TYPE_CHECKING = False  # see `record`
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from dayfly.keeper import Seat
    from dayfly.porter import Line

SOCKET = 3
LEFTOVERS_S = 0.02
"""An import that took longer is looked at for what it has left behind."""

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
    zygote_seccomp: str
    packages: str
    libraries: list[str]
    preload: list[str]
    late: list[str]
    limit_memory: bool
    zygote: bool
    has_network: bool
    stores: dict[str, str]
    """What steps' folders are made from; empty where there are none."""

    pod: dict[str, Any] | None = None
    """A porter's post, where the guest is in a pod: it cannot mount there, and need not."""

    parcel: str = ""
    """The digest of the environment, where it has to be sent to the pod."""

    line: int = 0
    """Where a guest that has started itself again has its line to the porter."""


class Guest:
    """One sandbox seen from inside: generic until `Load`, then one function until its end.

    *failures* are the modules that could not be preloaded. With a *seat* it is to be a function's
    zygote: it imports the function, and every fork of it is a sandbox that waits for `Load` again.
    With a *line* it is in a pod and lives on when the connection is gone: there may be another.
    """

    def __init__(
        self,
        settings: Settings,
        failures: list[str],
        seat: Seat | None = None,
        line: Line | None = None,
    ) -> None:
        self._settings, self._failures, self._seat = settings, failures, seat
        self._line, self._is_loading = line, False
        self._connections = 0
        """How many there were before this one."""

        self._channel = output.Channel(SOCKET)
        self._channel.may_break = line is not None
        self._output = output.Output(self._channel)
        self._reader = FrameReader()
        self._prepared: Any = None
        self._lockdown: Any = None
        """The module, which a package's own of that name must not replace."""

        self._function: invoker.Function | None = None
        self._slots = 0
        """How many invocations of it may run here at once."""

    def run(self) -> None:
        """Live until the pool closes the connection; in a pod, until the porter ends it."""
        frames = self._frames()
        if not self._become_function(frames):
            return
        if self._seat is not None:
            gc.collect()
            gc.freeze()
            self._seat.serve()  # returns in each sandbox that it forks
            self._seat = None
            self._reader = FrameReader()
            self._output.renew()
            frames = self._frames()
            if not self._become_function(frames):
                return
        assert self._function is not None
        if self._function.is_async:
            import asyncio

            frames.close()  # the reader is `_serve`'s now, and must not hold `Load` any more
            asyncio.run(self._serve(asyncio.get_running_loop))
            return
        for frame in frames:
            request = decode(frame, is_trusted=True)
            assert isinstance(request, Invoke), request
            self._answer(frame, request)

    def _become_function(self, frames: Any) -> bool:
        """Say that it is up, wait for `Load`, and answer that; False when it could not be done."""
        self._become_generic()
        frame = next(frames)
        load = decode(frame, is_trusted=True)
        if not isinstance(load, Load):
            raise SystemExit(f"expected Load, got {type(load).__name__}")
        try:
            loaded = self._specialize(load, frame.body, frames)
        except loader.LoadFailure as failure:
            self._output.flush(0)
            text = (failure.kind, failure.message[:2048], failure.traceback)
            kind, message, trace = (t.encode(errors="replace").decode() for t in text)
            self._reply(0, Failed(kind=kind, message=message, traceback=trace))
            return False
        self._output.flush(0)
        self._channel.send(encode(loaded))
        return True

    def _become_generic(self) -> None:
        settings = self._settings
        if settings.isolated and len(os.listdir("/proc/self/task")) > 1:
            _restart_with_late_preload(settings, self._line)
        self._say_hello()
        # what follows is done while the pool takes note, and sends `Load` if somebody waits
        if settings.isolated:
            if self._lockdown is None:
                from dayfly import lockdown

                self._lockdown = lockdown
                if settings.stores:  # now, before there can be a package's own of that name
                    from dayfly import folders

                    folders.prepare()
            is_zygote = self._seat is not None
            with open(settings.zygote_seccomp if is_zygote else settings.seccomp, "rb") as file:
                program = file.read()
            if self._line is not None:
                from dayfly import folders, parcel  # noqa: F401  (now, see above)

                self._prepared = self._lockdown.prepare_in_pod(program)
            else:
                self._prepared = self._lockdown.prepare(program, is_zygote=is_zygote)
        self._output.prepare()
        gc.freeze()
        gc.enable()

    def _say_hello(self) -> None:
        slots = 0
        if self._line is not None and self._function is not None and not self._is_loading:
            slots = self._slots  # elsewhere what is forked of a function waits for `Load`
        hello = Hello(
            protocol=PROTOCOL,
            python=".".join(map(str, sys.version_info[:3])),
            preload_failures=self._failures,
            slots=slots,
        )
        self._channel.send(encode(hello))

    def _specialize(self, load: Load, mounts: bytes, frames: Any) -> Loaded:
        started = time.perf_counter()
        confirmed = (0, 0, 0, 0)
        code = os.path.join(self._settings.packages, load.digest)
        places = FOLDERS
        if self._line is not None:
            confirmed, code = self._settle_in_pod(load, mounts, frames)
        elif self._settings.isolated:
            confirmed, code = self._lock_down(load, mounts)
        elif mounts:
            places = self._link_folders(mounts)
        locked = time.perf_counter()
        if self._function is None:
            self._function = self._import(load, code, places)
            if self._seat is not None:
                _run(hooks.before, code)
        else:
            os.chdir(code)
            self._output.capture()
            _run(hooks.after, code)
        import_s = time.perf_counter() - locked
        threads, children, descriptors, busy_s = 0, 0, 0, import_s
        is_long = import_s >= LEFTOVERS_S
        if self._settings.isolated and (is_long or self._seat is not None):
            threads, children, descriptors = self._leftovers()
            busy_s = min(import_s, _busy_s())
        cap_eff, no_new_privs, seccomp, landlock = confirmed
        self._slots = load.concurrency if self._function.is_async else 1
        self._is_loading = False
        return Loaded(
            slots=self._slots,
            lockdown_s=locked - started,
            import_s=import_s,
            busy_s=busy_s,
            threads=threads,
            children=children,
            descriptors=descriptors,
            cap_eff=cap_eff,
            no_new_privs=no_new_privs,
            seccomp=seccomp,
            landlock=landlock,
        )

    def _import(self, load: Load, code: str, places: tuple[str, str, str]) -> invoker.Function:
        settings = self._settings
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
        return invoker.Function(
            name=load.function,
            namespace=load.namespace,
            version=load.version,
            memory_mb=load.memory_mb,
            code=code,
            handler=handler,
            folders=places,
        )

    def _leftovers(self) -> tuple[int, int, int]:
        """(threads, children, open descriptors) that are user code's."""
        tasks = os.listdir("/proc/self/task")
        children = 0
        for task in tasks:
            try:
                with open(f"/proc/self/task/{task}/children") as file:
                    children += len(file.read().split())
            except OSError:
                pass  # it has ended, or this kernel does not tell
        ours = {0, 1, 2, SOCKET} | self._output.descriptors
        if self._seat is not None:
            ours.add(self._seat.fileno())
        opened = os.listdir("/proc/self/fd")  # and the one that lists them
        descriptors = sum(int(descriptor) not in ours for descriptor in opened) - 1
        return max(0, len(tasks) - 2), children, descriptors

    def _mount_folders(self, body: bytes) -> int:
        """A step's folders, and the stores covered in any case; how large its files may be.

        Raises `LoadFailure`.
        """
        from dayfly import folders

        try:
            mounts = folders.read(body) if body else None
            if mounts is not None:
                folders.mount(mounts, self._prepared)
            folders.close()
        except (OSError, ValueError) as error:
            raise _no_folders(error) from None
        return mounts.file_bytes_max if mounts is not None else 0

    def _link_folders(self, body: bytes) -> tuple[str, str, str]:
        """The same without isolation; where they are. Raises `LoadFailure`."""
        from dayfly import folders

        try:
            return folders.link(folders.read(body), self._settings.stores)
        except (OSError, ValueError) as error:
            raise _no_folders(error) from None

    def _lock_down(self, load: Load, mounts: bytes) -> tuple[tuple[int, int, int, int], str]:
        """Become untrusted; a guest that the kernel does not confirm as such ends here."""
        lockdown = self._lockdown
        memory = load.memory_mb << 20 if self._settings.limit_memory else None
        if self._seat is None and self._function is None:
            lockdown.mount_code(load.digest, load.tmp_mb)  # a zygote's keeper has done it
        largest = 0
        if self._settings.stores:
            largest = self._mount_folders(mounts)
        elif mounts:
            raise _no_folders("this sandbox was not made for steps")
        lockdown.limit(open_files=load.open_files, memory_bytes=memory, file_bytes=largest)
        if self._seat is None:
            lockdown.lock_down(self._prepared, load.processes)
        else:
            lockdown.lock_down_zygote(self._prepared)
        return self._confirmed(lockdown.LOCKED if self._seat is None else lockdown.LOCKED_ZYGOTE)

    def _confirmed(self, expected: Any) -> tuple[tuple[int, int, int, int], str]:
        rights = self._lockdown.rights()
        if rights != expected:
            raise SystemExit(f"the lock-down did not hold: {rights}")
        abi = self._prepared.landlock_abi
        return (rights.cap_eff, rights.no_new_privs, rights.seccomp, abi), self._lockdown.CODE

    def _settle_in_pod(
        self, load: Load, mounts: bytes, frames: Any
    ) -> tuple[tuple[int, int, int, int], str]:
        """Have the package sent, and a step's folders, and become untrusted."""
        from dayfly import parcel

        assert self._line is not None
        self._is_loading = True
        self._line.take()
        lockdown = self._lockdown
        self._channel.send(encode(Fetch(digest=load.digest)))
        try:
            parcel.unpack(parcel.receive(frames, load.digest, lockdown.CODE), lockdown.CODE)
        except Exception as error:  # a damaged one, or no room for it
            why = f"the package cannot be unpacked: {error}"
            raise loader.LoadFailure("ImportFailed", why, "") from None
        largest = self._fetch_folders(mounts, frames) if mounts else 0
        lockdown.limit(open_files=load.open_files, memory_bytes=None, file_bytes=largest)
        lockdown.lock_down_in_pod(self._prepared, load.processes)
        self._line.taken()
        return self._confirmed(lockdown.LOCKED)

    def _fetch_folders(self, body: bytes, frames: Any) -> int:
        """Have a step's folders sent; how large its files may be. Raises `LoadFailure`."""
        from dayfly import folders, parcel

        try:
            mounts = folders.read(body)
            self._channel.send(encode(Fetch(digest=mounts.step)))
            pieces = parcel.bodies(frames)
            folders.receive(mounts, lambda: next(pieces, b""), self._prepared)
            for _ in pieces:
                pass  # the last is empty
        except (OSError, ValueError) as error:
            raise _no_folders(error) from None
        return mounts.file_bytes_max

    def _answer(self, frame: Frame, request: Invoke) -> None:
        assert self._function is not None
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
            kind, text, ended = "BadResponse", f"the response cannot be sent: {error}"[:500], -1
            if isinstance(message, Failed):
                kind, text, ended = message.kind, message.message[:500], message.exit_code
            took_s = message.handler_s
            failed = Failed(
                kind=kind, message=text, traceback="", handler_s=took_s, exit_code=ended
            )
            frame = encode(failed, number)
        self._channel.send(frame)

    async def _serve(self, running_loop: Callable[[], Any]) -> None:
        """The loop for a coroutine handler: several invocations at once."""
        loop = running_loop()
        ended = loop.create_future()
        running = set()

        async def answer(frame: Frame, request: Invoke) -> None:
            assert self._function is not None
            connection = self._connections
            output.current.set(frame.invocation)
            self._output.running = frame.invocation
            message, body = await invoker.call_async(self._function, request, frame.body)
            if connection != self._connections:
                return  # who asked is gone, and its numbers mean others now
            self._output.flush(frame.invocation)
            self._reply(frame.invocation, message, body)

        def reconnect() -> None:
            loop.remove_reader(self._channel.socket)
            self._reconnect()
            loop.add_reader(self._channel.socket, readable)

        def readable() -> None:
            data = self._receive()
            if not data:
                loop.remove_reader(self._channel.socket)
                if self._line is None:
                    ended.set_result(None)
                return
            for frame in self._reader.feed(data):
                request = decode(frame, is_trusted=True)
                assert isinstance(request, Invoke), request
                task = loop.create_task(answer(frame, request))
                running.add(task)
                task.add_done_callback(running.discard)

        loop.add_reader(self._channel.socket, readable)
        if self._line is not None:
            loop.add_reader(self._line, reconnect)
        await ended
        for task in running:
            task.cancel()

    def _frames(self) -> Any:
        readable, either = select.poll(), select.poll()
        for poll in (readable, either):
            poll.register(SOCKET, select.POLLIN)
        if self._line is not None:
            either.register(self._line, select.POLLIN)
        while ready := (readable if self._is_loading else either).poll():
            if ready[0][0] != SOCKET or len(ready) > 1:
                self._reconnect()
            elif data := self._receive():
                yield from self._reader.feed(data)
            elif self._line is None:
                break
            else:
                self._reconnect()
        raise SystemExit(0)

    def _receive(self) -> bytes:
        try:
            data: bytes = self._channel.socket.recv(RECEIVE_BYTES)
            return data
        except OSError:
            if self._line is None:
                raise
            return b""

    def _reconnect(self) -> None:
        """The pool is another one, or comes again: wait for it if need be, and tell it who is here.

        One that is lost while a function loads is not waited for: nobody knows what is here then.
        """
        assert self._line is not None
        if self._is_loading:
            raise SystemExit(0)
        self._line.connect()
        self._connections += 1
        self._reader = FrameReader()
        self._channel.renew()
        self._say_hello()


def warm_up(settings: Settings) -> list[str]:
    """All that every sandbox of the environment has in common; the preloads that failed."""
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


def _run(called: list[Callable[[], Any]], code: str) -> None:
    """Call the user's hooks. Raises `LoadFailure`."""
    for hook in called:
        try:
            hook()
        except BaseException as error:
            trace = loader.user_traceback(error, code)
            raise loader.LoadFailure("ImportFailed", loader.said(error), trace) from None


def _no_folders(why: object) -> loader.LoadFailure:
    return loader.LoadFailure("ImportFailed", f"the step's folders cannot be mounted: {why}", "")


def _busy_s() -> float:
    """How long this process has had, or waited for, a processor."""
    try:
        with open("/proc/self/schedstat") as file:
            ran, waited, _ = file.read().split()
    except (OSError, ValueError):
        return time.process_time()
    return (int(ran) + int(waited)) / 1e9


def _restart_with_late_preload(settings: Settings, line: Line | None) -> None:
    """A preloaded module started threads: start again, and import them after the lock-down."""
    again = settings.__dict__ | {"preload": [], "late": settings.preload}
    if line is not None:
        again["line"] = line.fileno()
        for descriptor in (SOCKET, line.fileno()):
            os.set_inheritable(descriptor, True)
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


def _let_in(settings: Settings) -> Line:
    """In a pod: wait for the pool, and have it send the environment that the image has not.

    Returns in the guest; the porter has forked it before there was anything but our own code.
    """
    from dayfly import porter

    if settings.line:
        return porter.Line.inherited(settings.line)
    assert settings.pod is not None
    line = porter.serve(porter.Post(**settings.pod))
    if settings.parcel:
        from dayfly import parcel

        parcel.bring(SOCKET, settings.parcel, settings.libraries[0])
    return line


def main() -> None:
    """Entry point; the settings are the last argument, as JSON."""
    gc.disable()  # nothing of the start-up is garbage
    settings = Settings(**json.loads(sys.argv.pop()))
    _yield_to_the_server()
    if not settings.line:
        os.closerange(SOCKET + 1, 1024)
    try:
        seat = line = None
        if settings.pod is not None:
            line = _let_in(settings)
        failures = warm_up(settings)
        if settings.zygote:
            from dayfly import zygote

            # returns in every forked sandbox
            seat = zygote.serve(has_network=settings.has_network)
        Guest(settings, failures, seat, line).run()
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the pool went away: nobody is left to tell


if __name__ == "__main__":
    main()
