"""What nothing refers to any more goes: artifacts, layers of workspaces, and steps in the cache.

Kept is what the journal of any run that there is says must be kept for it, what cached steps left,
what a step that runs has before it, and whatever came or was used lately: between being stored and
being written down nothing else speaks for it. If a journal cannot be read nothing is removed.
"""

import asyncio
import logging
import time
from typing import Final

import msgspec
from msgspec import Struct

from dayfly_pool.errors import PlatformError, StoreFailed
from dayfly_pool.journal import Journals
from dayfly_pool.store.journals import JournalId
from dayfly_pool.workflow.cache import StepCache
from dayfly_pool.workflow.handover import Handover, Left
from dayfly_pool.workflow.run import KEPT, LEFT, log_of

log = logging.getLogger("dayfly.garbage")
PAGE: Final = 500
CREATED_LATE_S: Final = 60.0
"""A run's id is of this much before its journal is there, at most."""


class Needed(Struct, frozen=True):
    """What runs refer to: URIs of artifacts, ids of layers."""

    uris: set[str]
    layers: set[str]


async def needed(journals: Journals) -> Needed:
    """What the journals of all runs say. Raises `StoreFailed`.

    Runs that are begun meanwhile are found by a second look: they may have been retried from one
    that was deleted after that.
    """
    found = Needed(set(), set())
    first = journals.clock.now()
    seen = await _look(journals, found, JournalId(""), set())
    since = JournalId(f"{max(0, int((first - CREATED_LATE_S) * 1000)):012x}")
    await _look(journals, found, since, {id_ for id_ in seen if id_ >= since})
    return found


async def _look(
    journals: Journals, found: Needed, since: JournalId, seen: set[JournalId]
) -> set[JournalId]:
    """Take what runs with ids from *since* on need, but for those that were *seen*; their ids."""
    looked: set[JournalId] = set()
    before: JournalId | None = None
    while page := await journals.store.page("run", None, PAGE, before):
        before = page[-1].id
        for journal in page:
            if journal.id >= since and journal.id not in seen:
                await _take(journals, journal.id, found)
                looked.add(journal.id)
        if before < since:
            break
    return looked


async def _take(journals: Journals, id_: JournalId, found: Needed) -> None:
    for part in (KEPT, LEFT):
        for entry in await log_of(journals, id_, part):
            if entry.damage:
                raise StoreFailed(f"entry {entry.number} of run {id_}: {entry.damage}")
            if part == KEPT:
                found.uris.update(msgspec.msgpack.decode(entry.body, type=list[str]))
                continue
            for left in msgspec.msgpack.decode(entry.body, type=list[Left]):
                found.layers.update(layer.id for layer in left.version.layers)


class Garbage:
    """Collects it: what nothing has referred to for *grace_s* seconds, as often as that."""

    def __init__(
        self, journals: Journals, handover: Handover, cache: StepCache, grace_s: float
    ) -> None:
        self._journals, self._handover, self._cache = journals, handover, cache
        self._grace_s = grace_s

    async def run(self) -> None:
        """Collect for ever."""
        while True:
            await asyncio.sleep(self._grace_s)
            try:
                removed = await self.collect(time.time() - self._grace_s)
            except PlatformError as error:
                log.warning("what nobody needs is still there", extra={"why": str(error)})
            except Exception:
                log.exception("what nobody needs is still there, for a defect of ours")
            else:
                if removed:
                    log.info("what nobody needs is gone", extra={"objects": removed})

    async def collect(self, before: float) -> int:
        """Remove what nothing refers to and nobody used since *before* (seconds since the epoch,
        as the disk has them); returns how much that was. Raises `StoreFailed`, and
        `DataFolderUnusable`."""
        await asyncio.to_thread(self._cache.sweep)
        found = await needed(self._journals)
        found.uris.update(await asyncio.to_thread(self._cache.uris))
        return await asyncio.to_thread(self._handover.sweep, found.uris, found.layers, before)
