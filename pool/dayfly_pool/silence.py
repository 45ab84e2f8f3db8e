"""Which of the servers that share a store have gone silent. Pure: no clock, no I/O."""

from collections.abc import Mapping
from typing import Final

BEAT_S: Final = 2.0
LEASE_S: Final = 10.0
"""An owner that has said nothing for this long, by our own clock, loses what it has."""


class Silence:
    """What *owner* has seen of the others."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._beats: dict[str, tuple[int, float]] = {}
        """How often each owner has said that it lives, and when we saw that last."""

    def over(self, beats: Mapping[str, int], now: float, lease_s: float = LEASE_S) -> list[str]:
        """Who has said nothing for too long. By our own clock alone: no two of them agree."""
        for owner in self._beats.keys() - beats.keys():
            del self._beats[owner]
        for owner, beat in beats.items():
            if owner not in self._beats or self._beats[owner][0] != beat:
                self._beats[owner] = beat, now
        return [
            owner
            for owner, (_, at) in self._beats.items()
            if owner != self._owner and now - at >= lease_s
        ]
