"""A folder; there is no process to it."""

import tempfile
from collections.abc import Mapping
from itertools import count
from pathlib import Path

from tests.brokers import Broker

from dayfly_gateway.triggers.folder import Source
from dayfly_gateway.triggers.source import Topic
from dayfly_pool.brokers import FolderSource

SETTLE_S = 0.05


class Folder(Broker):
    """See `tests.brokers`."""

    name = "folder"
    has_topic = False
    is_process = False
    counts_attempts = False
    has_headers = False
    leases = False

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dayfly-broker-")
        self.folder = Path(self._folder.name)

    async def place(self, name: str) -> "Place":
        """An empty folder."""
        (self.folder / name).mkdir()
        return Place(self.folder / name)

    def __enter__(self) -> Broker:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


class Place:
    """See `tests.brokers.Place`."""

    topic_spec = None

    def __init__(self, folder: Path) -> None:
        self.spec = FolderSource(path=str(folder), settle_seconds=SETTLE_S, afterwards="move")
        self._names = (folder / f"{number:06}" for number in count())

    async def publish(self, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """See `tests.brokers.Place`."""
        next(self._names).write_bytes(body)

    def source(self, lease_s: float = 30.0, call_s: float = 10.0) -> Source:
        """See `tests.brokers.Place`."""
        return Source(self.spec, "folder", lease_s=lease_s, call_s=call_s)

    def topic(self) -> Topic:
        """See `tests.brokers.Place`."""
        raise NotImplementedError
