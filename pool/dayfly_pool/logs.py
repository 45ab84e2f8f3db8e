"""What functions write: the last lines of each, and whoever follows them now. All of it bounded."""

import asyncio
import re
from collections import deque
from collections.abc import AsyncGenerator
from itertools import islice
from typing import Final

from dayfly_pool.models import FunctionId, LogLine

LINES_MAX: Final = 1000
ERROR_LINES_MAX: Final = 200
"""So far back the last line of a failed invocation is looked for."""

LINE_CHARACTERS_MAX: Final = 8192
CHARACTERS_MAX: Final = 1 << 20
FOLLOWERS_MAX: Final = 100
FOLLOWER_LINES_MAX: Final = 2000
_CONTROL: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")


def clean(text: str) -> str:
    """One line that cannot move a terminal's cursor or forge a second line."""
    text = _CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)
    return text if len(text) <= LINE_CHARACTERS_MAX else text[:LINE_CHARACTERS_MAX] + " [cut]"


class Logs:
    """The last 1,000 lines of every function, or fewer long ones, in memory."""

    def __init__(self) -> None:
        self._lines: dict[FunctionId, deque[LogLine]] = {}
        self._sizes: dict[FunctionId, int] = {}
        self._followers: dict[FunctionId, set[asyncio.Queue[LogLine]]] = {}

    def write(self, line: LogLine) -> None:
        """Keep *line*; a follower that is too slow loses it."""
        lines = self._lines.setdefault(line.function, deque())
        lines.append(line)
        size = self._sizes.get(line.function, 0) + len(line.text)
        while len(lines) > LINES_MAX or size > CHARACTERS_MAX:
            size -= len(lines.popleft().text)
        self._sizes[line.function] = size
        for follower in self._followers.get(line.function, ()):
            if not follower.full():
                follower.put_nowait(line)

    def tail(self, function: FunctionId, number: int, of: str = "") -> list[LogLine]:
        """The last *number* lines, the oldest first; of invocations that begin with *of*."""
        lines = [line for line in self._lines.get(function, ()) if line.invocation.startswith(of)]
        return lines[-number:] if number > 0 else []

    def last_error(self, function: FunctionId, invocation: str) -> str:
        """The last line that it wrote to stderr, if it is among the function's last ones."""
        for line in islice(reversed(self._lines.get(function, ())), ERROR_LINES_MAX):
            if line.invocation == invocation and line.stream == "stderr" and line.text.strip():
                return line.text.strip()
        return ""

    def forget(self, function: FunctionId) -> None:
        """Drop the lines of a deleted function."""
        self._lines.pop(function, None)
        self._sizes.pop(function, None)

    async def follow(
        self, function: FunctionId, number: int, of: str = ""
    ) -> AsyncGenerator[LogLine, None]:
        """The last *number* lines, then every new one, until the caller stops. *of*: see `tail`."""
        followers = self._followers.setdefault(function, set())
        if len(followers) >= FOLLOWERS_MAX:
            return
        queue: asyncio.Queue[LogLine] = asyncio.Queue(FOLLOWER_LINES_MAX)
        followers.add(queue)
        try:
            for line in self.tail(function, number, of):
                yield line
            while True:
                line = await queue.get()
                if line.invocation.startswith(of):
                    yield line
        finally:
            followers.discard(queue)
            if not followers:
                self._followers.pop(function, None)
