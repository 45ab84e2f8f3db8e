"""Real brokers that tests speak to, each with what it can and cannot do.

A broker is a process on a free port; it can be stopped without a word, started again with what it
had on its disk, and made to stand still. A test has a place of its own there.
"""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

from tests.harness import free_port

from dayfly_gateway.triggers.source import Source, Topic


class Place(Protocol):
    """A stream, queue or topic with nothing in it."""

    spec: Any
    """What a trigger says of it."""

    topic_spec: Any
    """What a destination says of it; None where there is no such destination."""

    async def publish(self, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Put a message there, not with the adapter but as anybody would."""

    def source(self, lease_s: float = 30.0, call_s: float = 10.0) -> Source:
        """The adapter under test; each has the same group, consumer or session."""

    def topic(self) -> Topic:
        """The same for what is told there."""


class Broker:
    """A process that is one. Use it as a context manager."""

    name: ClassVar[str]
    is_process: ClassVar[bool] = True
    """Whether there is somebody to speak to, who can be away, fall silent and be gone."""

    has_ids: ClassVar[bool] = True
    """Whether a message can be known again."""

    counts_attempts: ClassVar[bool] = True
    has_headers: ClassVar[bool] = True
    has_lag: ClassVar[bool] = True
    delays: ClassVar[bool] = True
    """Whether what is given back comes again later, and not at once."""

    leases: ClassVar[bool] = True
    """Whether what is not extended is given to somebody else while we are connected."""

    has_topic: ClassVar[bool] = True
    """Whether something can be told there."""

    has_order: ClassVar[bool] = True
    has_past: ClassVar[bool] = True
    """Whether who has never been there finds what was published before."""

    survives: ClassVar[bool] = True
    """Whether it has its messages again after it was killed."""

    def __init__(self) -> None:
        self.port = free_port()
        self._folder = tempfile.TemporaryDirectory(prefix="dayfly-broker-")
        self.folder = Path(self._folder.name)
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """What runs it in the foreground."""
        raise NotImplementedError

    async def place(self, name: str) -> Place:
        """One for a test, called *name*."""
        raise NotImplementedError

    def start(self) -> None:
        """Be there."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder
            )
        self.wait_for_port()

    def wait_for_port(self, wait_s: float = 60.0) -> None:
        """Return when it listens."""
        end = time.monotonic() + wait_s
        while True:
            assert self._process is not None
            assert self._process.poll() is None, (self.folder / "log").read_text()[-2000:]
            try:
                socket.create_connection(("127.0.0.1", self.port), 0.2).close()
                return
            except OSError:
                assert time.monotonic() < end, (self.folder / "log").read_text()[-2000:]
                time.sleep(0.02)

    def stop(self) -> None:
        """Be gone, at once and without a word."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """Stand still, with all threads when this returns."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> "Broker":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._folder.cleanup()
