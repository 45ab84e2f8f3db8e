"""Keys to be brought to what they should be: level-triggered, one run of a key at a time."""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from dayfly_pool.errors import PlatformError

log = logging.getLogger("dayfly.cluster")

BACKOFF_FIRST_S: Final = 0.1
BACKOFF_S_MAX: Final = 30.0
RUN_S_MAX: Final = 60.0
"""One run of one key; what takes longer has failed."""

RESYNC_S: Final = 300.0


class Reconciler:
    """Runs *reconcile* for each key that was added, *workers* at once, no key twice at once.

    Of a *group* of keys no more than *group_max* run at once, so that a slow one leaves room for
    the others; by itself each key is its own.

    A key that is added while it waits is run once; while it runs, once more afterwards. What fails
    is run again, later each time. *keys* are added every *resync_s*: for what nobody tells of.
    The queue holds a key once, so it is as long as there are objects at most.
    """

    def __init__(
        self,
        reconcile: Callable[[str], Awaitable[None]],
        *,
        workers: int = 4,
        group: Callable[[str], str] = str,
        group_max: int = 2,
        keys: Callable[[], Iterable[str]] = tuple,
        resync_s: float = RESYNC_S,
    ) -> None:
        self._reconcile, self._workers = reconcile, workers
        self._keys, self._resync_s = keys, resync_s
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._waiting: set[str] = set()
        self._running: set[str] = set()
        self._group, self._group_max = group, group_max
        self._busy: dict[str, int] = {}
        self._held: dict[str, deque[str]] = {}
        """Those that wait for another one of their group."""

        self._again: set[str] = set()
        self._failures: dict[str, int] = {}
        self._later: dict[str, asyncio.TimerHandle] = {}

    def __repr__(self) -> str:
        counts = f"{len(self._waiting)} waiting, {len(self._running)} running"
        return f"<Reconciler [{counts}, {len(self._later)} later]>"

    @property
    def is_idle(self) -> bool:
        """Nothing waits, runs, or is to run again later."""
        return not (self._waiting or self._running or self._later)

    def add(self, key: str, after_s: float = 0.0) -> None:
        """Run *key* soon, or after *after_s* unless it is added for sooner."""
        if after_s > 0:
            due = asyncio.get_running_loop().time() + after_s
            if key in self._later and self._later[key].when() <= due:
                return
        if later := self._later.pop(key, None):
            later.cancel()
        if after_s > 0:
            loop = asyncio.get_running_loop()
            self._later[key] = loop.call_later(after_s, self.add, key)
        elif key in self._running:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            self._queue.put_nowait(key)

    async def run(self) -> None:
        """Until cancelled; then what runs is cancelled too."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for number in range(self._workers):
                    tasks.create_task(self._work(), name=f"reconcile-{number}")
                tasks.create_task(self._resync(), name="resync")
        finally:
            for later in self._later.values():
                later.cancel()
            self._later.clear()

    async def _resync(self) -> None:
        while True:
            for key in tuple(self._keys()):
                self.add(key)
            await asyncio.sleep(self._resync_s * random.uniform(0.9, 1.1))

    async def _work(self) -> None:
        while True:
            key = await self._queue.get()
            group = self._group(key)
            if self._busy.get(group, 0) >= self._group_max:
                self._held.setdefault(group, deque()).append(key)
                continue
            self._waiting.discard(key)
            self._running.add(key)
            self._busy[group] = self._busy.get(group, 0) + 1
            try:
                again_s = await self._once(key)
            finally:
                self._running.discard(key)
                self._leave(group)
            if key in self._again:
                self._again.discard(key)
                self.add(key)
            elif again_s:
                self.add(key, again_s)

    def _leave(self, group: str) -> None:
        """One of them has run: the next that is held waits in the queue again, behind others."""
        self._busy[group] -= 1
        if not self._busy[group]:
            del self._busy[group]
        if (held := self._held.get(group)) is not None:
            self._queue.put_nowait(held.popleft())
            if not held:
                del self._held[group]

    async def _once(self, key: str) -> float:
        """After how many seconds to run it again, 0 if it went well."""
        try:
            async with asyncio.timeout(RUN_S_MAX):
                await self._reconcile(key)
        except (PlatformError, TimeoutError) as error:
            log.warning("not reconciled", extra={"key": key, "error": f"{error}" or "too slow"})
        except Exception:
            log.exception("not reconciled for a defect of ours", extra={"key": key})
        else:
            self._failures.pop(key, None)
            return 0.0
        self._failures[key] = number = self._failures.get(key, 0) + 1
        return random.uniform(0.5, 1.0) * backoff_s(number)


def backoff_s(number: int) -> float:
    """The longest wait after failure *number* of a key in a row."""
    return min(BACKOFF_S_MAX, BACKOFF_FIRST_S * 2.0 ** min(number - 1, 60))
