"""Threads of the hand-over's own, so that the rest of the server never waits for what steps left.

What a step has left takes as long as the step likes to be hashed: that is done by some threads, and
all else, which waits for the disk alone, by others. One namespace has at most half of the first at
a time.
"""

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar, TypeVarTuple

Given = TypeVarTuple("Given")
Result = TypeVar("Result")
SHARE: Final = (os.cpu_count() or 1) + 1
"""Of one namespace: it can have all processors busy, and wait for the disk beside."""


class Threads:
    """Begun when they are needed; `close` them."""

    def __init__(self, share: int = SHARE) -> None:
        self._short = ThreadPoolExecutor(2 * share, "hand-over")
        self._long = ThreadPoolExecutor(2 * share, "sealing")
        self._share = share
        self._shares: dict[str, asyncio.Semaphore] = {}
        self._wanted: Counter[str] = Counter()
        """By namespace: how many hash, or wait for their turn."""

    def close(self) -> None:
        """Wait for what is under way; what has not begun never does."""
        self._short.shutdown(cancel_futures=True)
        self._long.shutdown(cancel_futures=True)

    async def do(self, call: Callable[[*Given], Result], *given: *Given) -> Result:
        """What *call* returns, which takes no longer than the disk does."""
        return await asyncio.get_running_loop().run_in_executor(self._short, call, *given)

    async def hash(
        self, namespace: str, call: Callable[[*Given], Result], *given: *Given
    ) -> Result:
        """What *call* returns, which may hash for minutes.

        Who is cancelled does not wait for it, but its thread counts until it has ended.
        """
        share = self._shares.setdefault(namespace, asyncio.Semaphore(self._share))
        self._wanted[namespace] += 1
        try:
            await share.acquire()
        except BaseException:
            self._left(namespace)
            raise
        working = asyncio.get_running_loop().run_in_executor(self._long, call, *given)

        def ended(_: object) -> None:
            share.release()
            self._left(namespace)

        working.add_done_callback(ended)
        return await asyncio.shield(working)

    def _left(self, namespace: str) -> None:
        self._wanted[namespace] -= 1
        if not self._wanted[namespace]:
            del self._wanted[namespace], self._shares[namespace]
