"""Wall time for what lasts: it never jumps while a server lives."""

import time


class Clock:
    """What the wall clock said at the start, and what passed since."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def now(self) -> float:
        """Unix seconds."""
        return self._offset + time.monotonic()
