"""How many sandboxes to keep ready. Pure: no clock, no I/O."""

import math
from typing import Final

RATE_WINDOW_S: Final = 10.0
WEIGHT_MIN: Final = 0.01  # an event counts for 46 s; rounded up, a trace would keep one for hours
SMOOTHING: Final = 0.2
PROOF_S: Final = 0.05
SHORT_IMPORT_S: Final = 0.02
SHORT_IMPORT_WEIGHT: Final = 0.25
"""Such a load is mostly on its way from process to process."""

BACKOFF_FIRST_S: Final = 0.5
BACKOFF_MAX_S: Final = 30.0


class Rate:
    """Events per second, older ones counting exponentially less (time constant 10 s)."""

    __slots__ = ("_at", "_weight")

    def __init__(self) -> None:
        self._weight, self._at = 0.0, 0.0

    def note(self, now: float) -> None:
        """One more event, at *now*."""
        self._weight, self._at = self._decayed(now) + 1, now

    def per_s(self, now: float) -> float:
        """The rate as seen at *now*."""
        return self._decayed(now) / RATE_WINDOW_S

    def _decayed(self, now: float) -> float:
        weight = self._weight * math.exp(min(0.0, self._at - now) / RATE_WINDOW_S)
        return weight if weight >= WEIGHT_MIN else 0.0


def smoothed(before: float | None, value: float) -> float:
    """Exponentially weighted mean; the first value stands for itself."""
    return value if before is None else before + SMOOTHING * (value - before)


def load_weight(import_s: float, busy_s: float) -> float:
    """The share of a processor that a function's import keeps busy, from 0.1 to 1.

    *busy_s* of it had, or waited for, a processor; for the rest it slept (a network, a disk).
    """
    if import_s < SHORT_IMPORT_S:
        return SHORT_IMPORT_WEIGHT
    return min(1.0, max(0.1, busy_s / import_s))


def desired_generic(arrivals_per_s: float, start_s: float, least: int, most: int) -> int:
    """Generic sandboxes to keep, so that arrivals during one start find one ready.

    Little's law: arrivals per second times seconds to start one, rounded up, within the
    operator's bounds.
    """
    return max(least, min(most, math.ceil(arrivals_per_s * start_s)))


def start_pays(
    waiting: int, serving: int, handler_s: float | None, head_waited_s: float, start_s: float
) -> bool:
    """Whether another sandbox would be ready before the busy ones have worked off the queue.

    *serving* counts the places in warm sandboxes, *handler_s* is the usual time of one
    invocation (None: not known yet, so start). A head that has waited longer than a start takes,
    and no mere moment, proves the estimate wrong. A moment does not: where the processors are the
    limit everybody waits for some, and more sandboxes would only make it longer.
    """
    if serving == 0 or handler_s is None:
        return True
    return waiting * handler_s / serving > start_s or head_waited_s > max(start_s, PROOF_S)


def backoff_s(failures: int) -> float:
    """How long to leave alone what failed *failures* times in a row: doubling, at most 30 s."""
    return min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(failures - 1, 10))
