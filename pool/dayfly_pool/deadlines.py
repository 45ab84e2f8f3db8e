"""Time limits for very many things at once, of few different lengths."""

import asyncio
import time
from collections.abc import Callable
from typing import Generic, TypeVar

SLACK_S = 0.001
"""The event loop's own resolution: a timer may come this much early."""

T = TypeVar("T")


class Deadlines(Generic[T]):
    """Calls *on_late* with every item that is still here when its time is up.

    A timer a length of time, not a timer an item: items of one length are due in the order in
    which they came, so that adding and removing one is a dictionary's work and only the head
    needs a timer.
    """

    def __init__(self, on_late: Callable[[T], None]) -> None:
        self._on_late = on_late
        self._rows: dict[float, dict[T, float]] = {}

    def add(self, item: T, seconds: float, now: float) -> None:
        """*item* is late *seconds* after *now* (of `time.monotonic`)."""
        row = self._rows.get(seconds)
        if row is None:
            row = self._rows[seconds] = {}
            self._arm(seconds, seconds)
        row[item] = now + seconds

    def remove(self, item: T, seconds: float) -> None:
        """*item* made it, or was never here."""
        row = self._rows.get(seconds)
        if row is not None:
            row.pop(item, None)

    def _arm(self, seconds: float, delay_s: float) -> None:
        asyncio.get_running_loop().call_later(max(delay_s, SLACK_S), self._look, seconds)

    def _look(self, seconds: float) -> None:
        """The head may be due; without one the length is forgotten."""
        row = self._rows[seconds]
        due = time.monotonic() + SLACK_S
        while row:
            item, deadline = next(iter(row.items()))
            if deadline > due:
                self._arm(seconds, deadline - due + SLACK_S)
                return
            del row[item]
            self._on_late(item)
        del self._rows[seconds]
