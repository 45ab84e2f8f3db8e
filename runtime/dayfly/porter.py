"""Pid 1 of a pod: lets the pool in and hands its connection to the guest, whom it outlives.

It never runs user code nor imports an environment's, and the guest never knows what it knows: it
forks first, and reads the pod's secret then. So it is believed about the one thing that counts when
a pool comes anew: whether this guest was ever given a function.

    porter (pid 1) -- fork --> the guest (see `dayfly.__main__`)
      | listens; greets whoever calls (see `greeting`)
      | GUEST: the connection goes to the guest, and nothing stays between it and the pool
      | LINE: stays here: the pool's orders, and word of the guest's end
      | LEFT: everything in the pod is killed, and what a step has left goes to the pool

A pool that comes later takes the place of the one before.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time

from dayfly import folders, greeting, lockdown
from dayfly.record import Record

TYPE_CHECKING = False  # see `record`
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

CONNECTION = 3
"""Where the guest has its connection to the pool."""

TAKEN, NOTED = b"L", b"N"
GREETING_S_MAX = 5.0
CALLERS_MAX = 64
"""Who are not known yet; when there is another, whoever has waited longest goes."""

BACKLOG = 128
HANDING_S_MAX = 60.0
"""A pool that takes nothing for so long is gone."""

NODELAY = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Post(Record):
    """Where a porter stands. The file *secret* can be read by it and by no guest."""

    port: int
    secret: str
    host: str = ""
    """Where it listens: at every address of the pod, if nothing is said."""


class Line:
    """The guest's way to its porter."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._is_taken = False

    @classmethod
    def inherited(cls, descriptor: int) -> Line:
        """The line of a guest that has started itself again; no child of it has what it kept."""
        for kept in (CONNECTION, descriptor):
            os.set_inheritable(kept, False)
        return cls(socket.socket(fileno=descriptor))

    def fileno(self) -> int:
        """Readable when there is another connection to be had."""
        return self._end.fileno()

    def connect(self) -> None:
        """Wait for a connection to a pool; it is descriptor `CONNECTION` then."""
        while True:
            data, descriptors, _, _ = socket.recv_fds(self._end, 1, 1)
            if not data:
                raise SystemExit(0)  # the porter is gone, and everything goes with it
            for descriptor in descriptors:
                if descriptor != CONNECTION:
                    os.dup2(descriptor, CONNECTION, inheritable=False)
                    os.close(descriptor)
                os.set_inheritable(CONNECTION, False)
                return

    def take(self) -> None:
        """Tell the porter that a function comes; it does not wait for its answer."""
        self._end.send(TAKEN)

    def taken(self) -> None:
        """Return when the porter has noted it. No user code may run before."""
        while True:
            data, descriptors, _, _ = socket.recv_fds(self._end, 1, 1)
            for descriptor in descriptors:  # whoever calls now is a pool that knows nothing of this
                os.close(descriptor)
            if data == NOTED:
                return
            if not data:
                raise SystemExit(0)


class _Caller:
    """Somebody who has connected and is not known yet."""

    def __init__(self, end: socket.socket) -> None:
        self.end, self.until = end, time.monotonic() + GREETING_S_MAX
        self.data = b""
        self.kind = 0
        self.theirs, self.ours = b"", os.urandom(greeting.NONCE_BYTES)


class _Porter:
    """The porter's loop; see the module."""

    def __init__(self, post: Post, guest: int, line: socket.socket) -> None:
        self._guest, self._line = guest, line
        with open(post.secret, "rb") as file:
            self._secret = file.read()
        if len(self._secret) < greeting.SECRET_BYTES_MIN:
            raise SystemExit(f"{post.secret} holds no secret")
        self._has_function = self._is_leaving = False
        self._callers: dict[int, _Caller] = {}
        self._pool: socket.socket | None = None
        """The pool's end of its line to us."""

        self._listener = socket.create_server((post.host, post.port), backlog=BACKLOG)
        self._listener.setblocking(False)
        line.setblocking(False)
        self._woken, waker = os.pipe()
        for end in (self._woken, waker):
            os.set_blocking(end, False)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        self._readers: dict[int, Callable[[], None]] = {}
        self._poll = select.poll()
        self._watch(self._listener.fileno(), self._accept)
        self._watch(line.fileno(), self._hear_guest)
        self._watch(self._woken, self._hear_signals)

    def serve(self) -> NoReturn:
        """Until the guest has ended, or the pod is to."""
        while True:
            soonest = min((c.until for c in self._callers.values()), default=None)
            wait_ms = None
            if soonest is not None:
                wait_ms = max(0.0, soonest - time.monotonic()) * 1000 + 1
            for descriptor, _ in self._poll.poll(wait_ms):
                if reader := self._readers.get(descriptor):
                    reader()
            now = time.monotonic()
            for caller in [c for c in self._callers.values() if c.until <= now]:
                self._turn_away(caller)

    def _watch(self, descriptor: int, reader: Callable[[], None]) -> None:
        self._poll.register(descriptor, select.POLLIN)
        self._readers[descriptor] = reader

    def _unwatch(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)
        del self._readers[descriptor]

    # ---- who calls ----------------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(CALLERS_MAX):
            try:
                end, _ = self._listener.accept()
            except OSError:
                return  # that was all, or it has gone already
            self._listen_to(end)

    def _listen_to(self, end: socket.socket) -> None:
        if len(self._callers) >= CALLERS_MAX:
            self._turn_away(next(iter(self._callers.values())))
        end.setblocking(False)
        end.setsockopt(*NODELAY)
        caller = self._callers[end.fileno()] = _Caller(end)
        self._watch(end.fileno(), lambda: self._greet(caller))

    def _greet(self, caller: _Caller) -> None:
        """Go on with the greeting as far as its words are there."""
        size = greeting.MAC_BYTES if caller.kind else greeting.OPENING.size
        try:
            data = caller.end.recv(size - len(caller.data))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._turn_away(caller)
            return
        caller.data += data
        if len(caller.data) < size:
            return
        data, caller.data = caller.data, b""
        try:
            if caller.kind:
                self._admit(caller, data)
            else:
                caller.kind, caller.theirs = greeting.read_opening(data)
                words = (self._secret, caller.kind, caller.theirs, caller.ours)
                caller.end.send(greeting.answer(*words, has_function=self._has_function))
        except (OSError, ValueError):
            self._turn_away(caller)

    def _admit(self, caller: _Caller, proof: bytes) -> None:
        words = (self._secret, caller.kind, caller.theirs, caller.ours, proof)
        if not greeting.is_pool(*words, has_function=self._has_function):
            raise ValueError("this is no pool")
        self._unwatch(caller.end.fileno())
        del self._callers[caller.end.fileno()]
        if caller.kind == greeting.GUEST:
            caller.end.setblocking(True)
            try:
                socket.send_fds(self._line, [b"C"], [caller.end.fileno()])
            except OSError:
                pass  # the guest is busy and several wait for it already, or it is gone
            caller.end.close()
            return
        if caller.kind == greeting.LEFT:
            self._hand_over(caller.end)
        if self._pool is not None:
            self._hang_up()
        self._pool = caller.end
        self._watch(caller.end.fileno(), self._hear_pool)
        if self._is_leaving:
            self._report(greeting.LEAVING)

    def _turn_away(self, caller: _Caller) -> None:
        self._unwatch(caller.end.fileno())
        del self._callers[caller.end.fileno()]
        caller.end.close()

    # ---- what is said -------------------------------------------------------------------------

    def _hear_guest(self) -> None:
        try:
            data = self._line.recv(16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._unwatch(self._line.fileno())  # its end is seen by SIGCHLD
        elif data == TAKEN and not self._has_function:
            self._has_function = True
            try:
                self._line.send(NOTED)
            except OSError:
                pass  # it has ended meanwhile, which SIGCHLD tells

    def _hear_pool(self) -> None:
        assert self._pool is not None
        try:
            orders = self._pool.recv(16)
        except BlockingIOError:
            return
        except OSError:
            orders = b""
        if not orders:
            self._hang_up()
        elif greeting.KILL in orders:
            self._end(-signal.SIGKILL)
        elif greeting.TERMINATE in orders:
            os.kill(self._guest, signal.SIGTERM)

    def _hang_up(self) -> None:
        assert self._pool is not None
        self._unwatch(self._pool.fileno())
        self._pool.close()
        self._pool = None

    def _hear_signals(self) -> None:
        try:
            numbers = os.read(self._woken, 64)
        except BlockingIOError:
            return
        if signal.SIGTERM in numbers:
            self._leave()
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if pid == self._guest:
                self._end(os.waitstatus_to_exitcode(status))

    def _leave(self) -> None:
        """The pod is to end: at once, unless a pool can still let end what runs here."""
        if self._pool is None or not self._has_function:
            self._end(-signal.SIGTERM)
        if not self._is_leaving:  # user code may be able to send this signal too, and often
            self._is_leaving = True
            self._report(greeting.LEAVING)

    def _report(self, what: int, code: int = 0) -> None:
        if self._pool is None:
            return
        kills, peak = _memory()
        try:
            self._pool.send(greeting.REPORT.pack(what, code, kills, peak))
        except OSError:
            self._hang_up()

    def _hand_over(self, end: socket.socket) -> NoReturn:
        """Send what a step has left, when nobody is there any more who could change it."""
        code = self._kill(-signal.SIGKILL)
        end.settimeout(HANDING_S_MAX)
        try:
            for piece in folders.left():
                end.sendall(piece)
            end.recv(1)  # what is still on its way would go with the pod
        except OSError:
            pass  # the pool is gone, or wants no more
        self._finish(code)

    def _end(self, code: int) -> NoReturn:
        """Kill what is left, say how the guest ended, and end."""
        self._finish(self._kill(code))

    def _kill(self, code: int) -> int:
        """Kill what is left; how the guest ended, if that is not known."""
        try:
            os.kill(-1 if os.getpid() == 1 else self._guest, signal.SIGKILL)
        except ProcessLookupError:
            pass
        while True:
            try:
                pid, status = os.waitpid(-1, 0)
            except ChildProcessError:
                break
            if pid == self._guest and code == -signal.SIGKILL:
                code = os.waitstatus_to_exitcode(status)
        return code

    def _finish(self, code: int) -> NoReturn:
        self._report(greeting.ENDED, code)
        os._exit(code if code >= 0 else 128 - code)


def _memory() -> tuple[int, int]:
    """(processes that the kernel killed for their memory, most bytes in use) in this pod."""
    base = "/sys/fs/cgroup"
    kills = _field(f"{base}/memory.events", "oom_kill") or _field(
        f"{base}/memory/memory.oom_control", "oom_kill"
    )
    for name in ("memory.peak", "memory/memory.max_usage_in_bytes"):
        try:
            with open(f"{base}/{name}") as file:
                return kills, int(file.read())
        except (OSError, ValueError):
            pass
    return kills, 0


def _field(path: str, name: str) -> int:
    try:
        with open(path) as file:
            for line in file:
                key, _, value = line.partition(" ")
                if key == name:
                    return int(value)
    except (OSError, ValueError):
        pass
    return 0


def serve(post: Post) -> Line:
    """Be the porter; returns only in the guest, once it has its first connection."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sys.stdout.flush()
    guest = os.fork()
    if guest == 0:
        ours.close()
        line = Line(theirs)
        line.connect()
        return line
    theirs.close()
    lockdown.prctl(lockdown.PR_SET_DUMPABLE, 0)  # its memory is nobody's to read
    _Porter(post, guest, ours).serve()
