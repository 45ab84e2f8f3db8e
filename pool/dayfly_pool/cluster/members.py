"""Who is there: the shards by name, and where each listens."""

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import NamedTuple, Protocol

from dayfly_pool.errors import BadInput


class Address(NamedTuple):
    """Where a shard's wire listens."""

    host: str
    port: int


def parsed(text: str) -> Address | None:
    """`HOST:PORT`; None when it is none."""
    host, _, port = text.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        return None
    return Address(host.strip("[]"), int(port))


class Members(Protocol):
    """The shards that are said to live. Who cannot be reached may be among them."""

    def current(self) -> Mapping[str, Address]:
        """Those there are now, by name."""

    def watch(self, changed: Callable[[], None]) -> None:
        """Have *changed* called after every change."""

    def running(self, name: str = "", address: str = "") -> AbstractAsyncContextManager[object]:
        """Follow them while the block runs; with a *name* be one of them, at *address*.

        Raises `PlatformError` when it cannot begin.
        """


class Fixed:
    """Shards that the operator names. Implements `Members`."""

    def __init__(self, shards: Mapping[str, Address]) -> None:
        self._shards = dict(shards)

    @classmethod
    def parse(cls, texts: tuple[str, ...]) -> "Fixed":
        """Of `NAME=HOST:PORT` each. Raises `BadInput`."""
        found: dict[str, Address] = {}
        for text in texts:
            name, _, where = text.partition("=")
            if not name or (address := parsed(where)) is None:
                raise BadInput(f"--shard {text}: give NAME=HOST:PORT, like pool-0=10.0.0.7:8090")
            if name in found:
                raise BadInput(f"--shard {name} is given twice")
            found[name] = address
        return cls(found)

    def current(self) -> Mapping[str, Address]:
        """See `Members`."""
        return self._shards

    def watch(self, changed: Callable[[], None]) -> None:
        """See `Members`. They never change."""

    def running(self, name: str = "", address: str = "") -> AbstractAsyncContextManager[object]:
        """See `Members`. Nobody needs to be told."""
        return nullcontext()
