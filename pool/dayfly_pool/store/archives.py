"""What a place for packages promises that several servers use: their zips, by digest."""

from collections.abc import Collection
from typing import Protocol


class Archives(Protocol):
    """Its methods block, and may be called from many threads. They raise `StoreFailed`.

    What it gives back may be damaged: who asked compares it with its digest.
    """

    def put(self, digest: str, archive: bytes) -> None:
        """Keep it; when this returns it survives us. The same again is cheap, and repairs it."""

    def get(self, digest: str) -> bytes | None:
        """The whole of it; None if it is not there."""
        ...

    def note(self, digest: str) -> bool:
        """Somebody is about to refer to it: it is not dropped for a while. False: not there."""
        ...

    def drop(self, used: Collection[str], idle_s: float) -> int:
        """Forget those not among *used* that nobody has put or noted for *idle_s*; how many."""
        ...

    def close(self) -> None:
        """Let go of what it holds. It may be used again."""
