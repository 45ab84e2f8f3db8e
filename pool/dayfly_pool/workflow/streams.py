"""Outputs that are hashed and stored while a step writes them: pipes that the server reads.

Two threads a stream: one moves the bytes from the pipe into the store's file, the other hashes
them. A pipe is open here for reading and for writing, so it ends when the step has ended and not
when one of its programs closes it; several may write to it one after the other.
"""

import contextlib
import fcntl
import hashlib
import os
import queue
import select
import stat
import threading
from pathlib import Path
from typing import Final

from dayfly_pool.errors import BadTree
from dayfly_pool.workflow import trees

PIPE_BYTES: Final = 1 << 20
BUFFERS: Final = 8
_F_SETPIPE_SZ: Final = 1031


class Stream:
    """Reads the pipe *output*, which it makes in *folder* for the user *owner*, into *target*."""

    def __init__(self, folder: Path, output: str, owner: int, target: int, most: int) -> None:
        self._target = target
        self._most = most
        self._output = output
        self._size = 0
        self._digest = hashlib.sha256()
        self._error: Exception | None = None
        self._buffer: bytearray | None = None
        self._filled = 0
        """How much of the buffer is."""

        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._pipe = -1
        try:
            os.mkfifo(output, 0o600, dir_fd=self._folder)
            self._pipe = os.open(
                output, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC,
                dir_fd=self._folder,
            )  # fmt: skip
            os.fchown(self._pipe, owner, owner)
            self._widen()
        except BaseException:
            self._close()
            raise
        self._stop = os.eventfd(0)
        self._full: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
        self._made = 0
        """Of BUFFERS: a step that writes little, or declares more than it writes, has few."""

        self._threads = [
            threading.Thread(target=self._move, name="stream-move", daemon=True),
            threading.Thread(target=self._hash, name="stream-hash", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _widen(self) -> None:
        try:
            fcntl.fcntl(self._pipe, _F_SETPIPE_SZ, PIPE_BYTES)
        except PermissionError:
            pass  # this user has many pipes: it stays as it is

    def finish(self) -> tuple[int, str]:
        """How many bytes there were and their sha256, when all writers are dead. Call it once.

        :raises BadTree: if it was too much, or the pipe is not there any more.
        """
        os.eventfd_write(self._stop, 1)
        for thread in self._threads:
            thread.join()
        try:
            if self._error is not None:
                raise self._error
            if not self._is_in_place():
                raise BadTree(f"{trees.shown(self._output)} is declared a stream: write to it as"
                              " it is, and do not replace it")  # fmt: skip
        finally:
            os.close(self._stop)
            self._close()
        return self._size, self._digest.hexdigest()

    def _is_in_place(self) -> bool:
        try:
            found = os.lstat(self._output, dir_fd=self._folder)
        except FileNotFoundError:
            return False
        if not stat.S_ISFIFO(found.st_mode) or self._pipe < 0:
            return False
        if found.st_ino != os.fstat(self._pipe).st_ino:
            return False
        os.unlink(self._output, dir_fd=self._folder)
        return True

    def _close(self) -> None:
        for descriptor in (self._pipe, self._folder, self._target):
            if descriptor >= 0:
                os.close(descriptor)
        self._pipe = self._folder = self._target = -1

    def _move(self) -> None:
        poll = select.poll()
        poll.register(self._pipe, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        try:
            while True:
                ready = dict(poll.poll())
                if self._pipe in ready:
                    self._take()
                elif self._stop in ready:
                    self._pass_on()
                    return
        except Exception as error:  # whatever it is: part of a stream is no stream
            self._error = error
            os.close(self._pipe)  # whoever writes gets EPIPE: nobody reads any more
            self._pipe = -1
        finally:
            self._full.put(None)

    def _take(self) -> None:
        """What there is, into the buffer; a full one goes on.

        A pipe gives what a program wrote at once, often little: each part by itself would be a
        dozen changes of threads.
        """
        if self._buffer is None:
            self._buffer, self._filled = self._next(), 0
        with contextlib.suppress(BlockingIOError):
            while self._filled < PIPE_BYTES:
                rest = memoryview(self._buffer)[self._filled :]
                self._filled += os.readv(self._pipe, [rest])
                if self._size + self._filled > self._most:
                    what = trees.shown(self._output)
                    raise BadTree(f"{what} is over {self._most} bytes: write less")
            self._pass_on()

    def _next(self) -> bytearray:
        """A buffer that is free, when there is one or all have been made; else another."""
        if self._made == BUFFERS:
            return self._free.get()
        with contextlib.suppress(queue.Empty):
            return self._free.get_nowait()
        self._made += 1
        return bytearray(PIPE_BYTES)

    def _pass_on(self) -> None:
        """The buffer into the file, and on to be hashed."""
        if self._buffer is None or not self._filled:
            return
        buffer, size, self._buffer = self._buffer, self._filled, None
        view = memoryview(buffer)[:size]
        done = 0
        while done < size:
            done += os.write(self._target, view[done:])
        self._full.put(view)  # the other thread's from here on
        before, self._size = self._size, self._size + size
        step = trees.WRITE_BACK_BYTES
        if before // step != self._size // step:
            trees.begin_writing(self._target, before // step * step)

    def _hash(self) -> None:
        while (view := self._full.get()) is not None:
            self._digest.update(view)
            whole = view.obj
            view.release()
            assert isinstance(whole, bytearray)
            self._free.put(whole)
