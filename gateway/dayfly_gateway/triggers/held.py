"""What an adapter keeps in memory, for a broker that cannot: take a message back, or know that one
is done with before another.

Nothing here speaks to a broker. What is kept is bounded by what was fetched and not acknowledged.
"""

import asyncio
import contextlib
import heapq
import itertools
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from dayfly_gateway.triggers.source import Delivery

K = TypeVar("K", bound=Hashable)


class Held:
    """Deliveries to be given out: new ones, and what was given back when it is due."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Delivery]] = []
        self._turn = itertools.count()
        self._more = asyncio.Event()

    def __len__(self) -> int:
        return len(self._heap)

    def put(self, delivery: Delivery, delay_s: float = 0.0) -> None:
        """Give it out after *delay_s*, and after what is due before."""
        due = asyncio.get_running_loop().time() + delay_s
        heapq.heappush(self._heap, (due, next(self._turn), delivery))
        self._more.set()

    def take(self, most: int) -> list[Delivery]:
        """At most *most* of those that are due."""
        now, found = asyncio.get_running_loop().time(), list[Delivery]()
        while self._heap and len(found) < most and self._heap[0][0] <= now:
            found.append(heapq.heappop(self._heap)[2])
        return found

    def clear(self) -> None:
        """Forget them."""
        self._heap.clear()

    async def wait(self, until: float) -> None:
        """Return when something is due, or at *until* by the loop's clock."""
        loop = asyncio.get_running_loop()
        while (due := min([until, *(entry[0] for entry in self._heap[:1])])) > loop.time():
            self._more.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._more.wait()


class Window(Generic[K]):
    """What was given out, in its order, until it and all before it are done with."""

    def __init__(self) -> None:
        self._done: OrderedDict[K, bool] = OrderedDict()

    def __len__(self) -> int:
        return len(self._done)

    def give(self, key: K) -> None:
        """It is given out, after all others."""
        self._done[key] = False

    def done(self, key: K) -> list[K]:
        """What the broker may now be told of, in order; maybe nothing, maybe not *key* alone."""
        if key not in self._done:
            return []
        self._done[key] = True
        over = list(itertools.takewhile(self._done.__getitem__, self._done))
        for each in over:
            del self._done[each]
        return over
