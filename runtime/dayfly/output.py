"""User code's output as framed log lines with the number of the invocation that wrote them.

Python's own streams are replaced by `_Stream`, which knows the invocation exactly. What child
processes and C code write to the descriptors 1 and 2 arrives through pipes that a thread empties.
Writing never blocks the handler: what is over the rate, or what the pool is too slow to take, is
dropped and counted.
"""

import _socket  # not `socket`, which builds its enums at import
import _thread  # not `threading`, for 3 ms
import contextvars
import fcntl
import io
import os
import select
import sys
import time

from dayfly.protocol import Log, encode

LINE_BYTES_MAX = 8 * 1024
BURST_BYTES = 1024 * 1024
RATE_BYTES_PER_S = 256 * 1024
FRAME_BYTES = 64 * 1024
BURST_FRAMES = 1000
RATE_FRAMES_PER_S = 1000
"""Over this, lines wait for one another; the pool ends a sandbox that sends far more."""

PIPE_BYTES = 1024 * 1024
F_SETPIPE_SZ = 1031

current: contextvars.ContextVar[int] = contextvars.ContextVar("invocation", default=0)


class Channel:
    """The guest's end of the connection, for writing: whole frames only, from any thread."""

    def __init__(self, descriptor: int) -> None:
        self.socket = _socket.socket(fileno=descriptor)
        self._lock = _thread.allocate_lock()
        self._rest = b""
        self.may_break = False
        """Whether there can be another connection: what is said on a broken one is lost."""

    def send(self, frame: bytes) -> None:
        """Send *frame*, waiting as long as it takes."""
        with self._lock:
            if self._rest:
                frame, self._rest = self._rest + frame, b""
            try:
                self.socket.sendall(frame)
            except OSError:
                if not self.may_break:
                    raise

    def try_send(self, frame: bytes) -> bool:
        """Send *frame* if there is room for its start now; False when it was not taken at all."""
        with self._lock:
            try:
                if self._rest:
                    self._rest = self._rest[self._send_now(self._rest) :]
                if self._rest:
                    return False
                self._rest = frame[self._send_now(frame) :]
            except BlockingIOError:
                return False
            except OSError:
                self._rest = b""
                return self.may_break
            return True

    def renew(self) -> None:
        """The descriptor is another connection."""
        self._lock = _thread.allocate_lock()
        self._rest = b""

    def _send_now(self, data: bytes) -> int:
        return self.socket.send(data, _socket.MSG_DONTWAIT)


class Output:
    """Everything that user code writes, on its way to the pool."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._lock = _thread.RLock()
        self._allowance, self._frames = float(BURST_BYTES), float(BURST_FRAMES)
        self._filled_at = time.monotonic()
        self._dropped = {"stdout": 0, "stderr": 0}
        self._partial: dict[tuple[str, int, bool], bytearray] = {}
        self._pipes: dict[int, str] = {}
        self._waiting = select.poll()
        self._prepared: list[tuple[int, int]] = []
        self._raws: list[_Stream] = []
        self.running = 0
        """The invocation that owns what arrives through the pipes."""

    def prepare(self) -> None:
        """Make the pipes and streams, so that `capture` has little left to do."""
        for number, stream in ((1, "stdout"), (2, "stderr")):
            reader, writer = os.pipe()
            os.set_blocking(reader, False)
            try:
                fcntl.fcntl(reader, F_SETPIPE_SZ, PIPE_BYTES)
            except OSError:
                pass  # the per-user limit on pipe memory; the default size works too
            self._pipes[reader] = stream
            self._waiting.register(reader, select.POLLIN)
            self._prepared.append((number, writer))

    def capture(self) -> None:
        """From now on descriptors 1 and 2, `sys.stdout` and `sys.stderr` come here.

        After `renew` the streams are those that there were: user code may have kept or wrapped
        them.
        """
        for number, writer in self._prepared:
            os.dup2(writer, number)
            os.close(writer)
        self._prepared.clear()
        if not self._raws:
            for number, stream in ((1, "stdout"), (2, "stderr")):
                self._raws.append(raw := _Stream(self, stream, number))
                text = io.TextIOWrapper(
                    io.BufferedWriter(raw), "utf-8", errors="backslashreplace", line_buffering=True
                )
                setattr(sys, stream, text)
                setattr(sys, f"__{stream}__", text)
        # not `threading.Thread`, whose start waits until the thread has run
        _thread.start_new_thread(self._pump, ())

    def renew(self) -> None:
        """In a fork: share no lock, pipe or connection with the process it was forked from."""
        self._channel.renew()
        self._lock = _thread.RLock()
        self._partial.clear()
        self._dropped = {"stdout": 0, "stderr": 0}
        for reader in self._pipes:
            self._waiting.unregister(reader)
            os.close(reader)
        self._pipes.clear()
        for raw in self._raws:
            raw.owner = os.getpid()

    @property
    def descriptors(self) -> set[int]:
        """Those that are its own, besides 1 and 2."""
        return set(self._pipes)

    def write(self, stream: str, invocation: int, data: bytes, *, piped: bool = False) -> None:
        """Take *data*; whole lines go out at once, the rest with the next newline or `flush`.

        What came through a pipe is kept apart: it is late, and would end up inside a line.
        """
        with self._lock:
            self._refill()
            if len(data) > self._allowance:
                self._dropped[stream] += len(data)
                return
            self._allowance -= len(data)
            key = stream, invocation, piped
            partial = self._partial.setdefault(key, bytearray())
            partial += data
            end = partial.rfind(b"\n") + 1
            if not end and len(partial) > LINE_BYTES_MAX:
                end = len(partial)
            if end and (self._frames >= 1 or len(partial) >= FRAME_BYTES):
                lines = bytes(partial[:end])
                del partial[:end]
                if not partial:  # who writes after its invocation leaves nothing behind
                    del self._partial[key]
                self._send(stream, invocation, lines)

    def _refill(self) -> None:
        now = time.monotonic()
        passed_s, self._filled_at = now - self._filled_at, now
        self._allowance = min(BURST_BYTES, self._allowance + passed_s * RATE_BYTES_PER_S)
        self._frames = min(BURST_FRAMES, self._frames + passed_s * RATE_FRAMES_PER_S)

    def flush(self, invocation: int) -> None:
        """Send what *invocation* has written so far, the pipes' content included."""
        for name in ("stdout", "stderr"):
            try:
                getattr(sys, name).flush()
            except BaseException:
                pass  # user code closed, replaced or broke it
        with self._lock:
            for reader, _ in self._waiting.poll(0):
                self._drain(reader, self._pipes[reader])
            if not self._partial and not any(self._dropped.values()):
                return
            self._refill()
            for name in ("stdout", "stderr"):
                for piped in (True, False):
                    rest = self._partial.pop((name, invocation, piped), None)
                    if rest or self._dropped[name]:
                        self._send(name, invocation, bytes(rest or b""))

    def _send(self, stream: str, invocation: int, lines: bytes) -> None:
        start, is_last = 0, False
        while not is_last:
            end = start + FRAME_BYTES
            is_last = end >= len(lines)
            if not is_last:  # between two lines, if there is more than one
                end = lines.rfind(b"\n", start, end) + 1 or end
            message = Log(stream=stream, dropped=self._dropped[stream])
            frame = encode(message, invocation, lines[start:end])
            self._frames -= 1
            if self._frames > -BURST_FRAMES and self._channel.try_send(frame):
                self._dropped[stream] = 0
            else:
                self._dropped[stream] += len(lines) - start
                return
            start = end

    def _drain(self, reader: int, stream: str) -> bool:
        """Read what the pipe holds now; False at its end."""
        for _ in range(PIPE_BYTES // 65536 + 1):
            try:
                data = os.read(reader, 65536)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            self.write(stream, self.running, data, piped=True)
        return True

    def _pump(self) -> None:
        poll = select.poll()
        for reader in self._pipes:
            poll.register(reader, select.POLLIN)
        open_pipes = dict(self._pipes)
        while open_pipes:
            for reader, _ in poll.poll():
                with self._lock:
                    is_open = self._drain(reader, self._pipes[reader])
                if not is_open:
                    poll.unregister(reader)
                    open_pipes.pop(reader, None)


class _Stream(io.RawIOBase):
    """What is below `sys.stdout`: every write is a log write of the invocation that makes it."""

    def __init__(self, output: Output, name: str, descriptor: int) -> None:
        self._output, self._name, self._descriptor = output, name, descriptor
        self.owner = os.getpid()
        """The process that it speaks for directly; one that was forked by user code does not."""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return False

    def write(self, data: object) -> int:
        view = bytes(data)  # type: ignore[call-overload]
        if os.getpid() != self.owner:
            return os.write(self._descriptor, view)  # a forked child speaks through the pipe
        self._output.write(self._name, current.get(), view)
        return len(view)
