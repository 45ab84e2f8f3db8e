"""How fast tasks of jobs may follow each other while somebody waits for an answer. Pure.

What ends in one turn of the event loop is dealt with in that turn: a hundred tasks that do nothing
would keep a request waiting for all hundred. So while there are requests, tasks begin a few at a
time, and as many end. Tasks that take long never come near this rate.
"""

from typing import Final

TASKS_PER_S: Final = 2000
"""Of all jobs together. Each costs the server 0.1 ms: a fifth of its time."""

SLACK_S: Final = 0.002
"""What was not used in this time may be caught up on."""

QUIET_S: Final = 0.25
"""With nobody there for so long, jobs go as fast as they can."""


class Pace:
    """The pace of one server's jobs. Times are seconds of one clock."""

    def __init__(self) -> None:
        self.seen_at = -QUIET_S
        """When somebody last asked for what is no batch."""

        self._next = 0.0

    def wait_s(self, now: float) -> float:
        """How long the next task is to wait; it has its turn then."""
        if now - self.seen_at >= QUIET_S:
            return 0.0
        turn = max(self._next, now - SLACK_S)
        self._next = turn + 1 / TASKS_PER_S
        return max(0.0, turn - now)
