"""What goes on for the journals of one kind that are ours: a task for each, until it is over."""

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

from dayfly_pool.errors import Late, PlatformError
from dayfly_pool.journal import Journals
from dayfly_pool.store.journals import Journal, JournalId, Kind, Wish

log = logging.getLogger("dayfly.ours")
AGAIN_S: Final = 5.0
"""Until what could not be gone on with is tried again."""


class Ours:
    """A `Keeper`. Use it inside `async with ours.running():`.

    *go_on* is to bring one journal to its end; when it fails, it is tried again with what the
    journal has become. *heard* is told what is wished of one that goes on; False if it does not yet
    (then *wishes* has it). *lost* stops what runs of one that somebody else goes on with.
    """

    def __init__(
        self,
        journals: Journals,
        kind: Kind,
        most: int,
        go_on: Callable[[Journal], Awaitable[None]],
        heard: Callable[[JournalId, Wish], bool],
        lost: Callable[[JournalId], None] = lambda id_: None,
    ) -> None:
        self._journals, self._kind, self._most = journals, kind, most
        self._go_on, self._heard, self._lost = go_on, heard, lost
        self._group: asyncio.TaskGroup | None = None
        self._tasks: dict[JournalId, asyncio.Task[None]] = {}
        self._leaving: dict[JournalId, asyncio.Task[None]] = {}
        """Of those that somebody else has got; until their tasks have ended."""

        self._wishes: dict[JournalId, list[Wish]] = {}
        journals.keep(kind, self)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Go on with what is ours while the block runs."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            self._journals.look()
            try:
                yield
            finally:
                self._group = None
                for task in list(self._tasks.values()):
                    task.cancel()

    def wishes(self, id_: JournalId) -> list[Wish]:
        """What was wished of it before it went on; once."""
        return self._wishes.pop(id_, [])

    # ---- for the journals ---------------------------------------------------------------------

    def room(self) -> int:
        """How many more can be ours."""
        return self._most - len(self._tasks) if self._group is not None else 0

    def adopt(self, journal: Journal) -> None:
        """It is ours to go on with."""
        assert self._group is not None
        before = self._leaving.get(journal.id)
        going = self._run(journal, before)
        task = self._group.create_task(going, name=f"{self._kind} {journal.name}")
        self._tasks[journal.id] = task
        task.add_done_callback(functools.partial(self._left, journal.id))

    def wished(self, id_: JournalId, wish: Wish) -> None:
        """Somebody wants something of it."""
        if not self._heard(id_, wish):
            self._wishes.setdefault(id_, []).append(wish)

    def lost(self, id_: JournalId) -> None:
        """Somebody else has it."""
        self._lost(id_)
        if (task := self._tasks.pop(id_, None)) is not None:
            task.cancel()
            self._leaving[id_] = task
            self._wishes.pop(id_, None)

    def _left(self, id_: JournalId, task: asyncio.Task[None]) -> None:
        if self._tasks.get(id_) is task:
            del self._tasks[id_]
            self._wishes.pop(id_, None)
        if self._leaving.get(id_) is task:
            del self._leaving[id_]
        self._journals.look()

    async def _run(self, journal: Journal, before: asyncio.Task[None] | None) -> None:
        """A defect of ours over one must not end the others.

        *before* went on with it when it was ours before, and may be at its end still.
        """
        if before is not None:
            await asyncio.wait([before])
        extra = {"kind": self._kind, "journal": journal.name}
        while True:
            try:
                await self._go_on(journal)
                return
            except Late:
                log.warning("another server goes on with it", extra=extra)
                return
            except PlatformError as error:
                log.warning("it cannot go on now", extra=extra | {"why": str(error)})
            except Exception:
                log.exception("it does not go on, for a defect of ours", extra=extra)
            await asyncio.sleep(AGAIN_S)
            again = await self._again(journal)
            if again is None:
                return
            journal = again

    async def _again(self, journal: Journal) -> Journal | None:
        """As it is now, and what is wished of it; None when it is not ours any more."""
        try:
            found = await self._journals.store.get(journal.id)
            wished = (await self._journals.store.wishes()).get(journal.id, ())
        except PlatformError:
            return journal
        if found is None or found.is_over or found.fence != journal.fence:
            return None
        there = {wish.number: wish for wish in (*wished, *self._wishes.get(journal.id, ()))}
        self._wishes[journal.id] = [there[number] for number in sorted(there)]
        return found
