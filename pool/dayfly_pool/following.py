"""What other servers declare: heard of, and put to use once all that it needs is here."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Final

from dayfly_pool.errors import PlatformError, StoreFailed
from dayfly_pool.models import FunctionId
from dayfly_pool.store.declarations import Change, SharedStore, StoredFunction

log = logging.getLogger("dayfly.following")
LOOK_S: Final = 5.0
"""We look after so long, told or not: a connection may be dead and not know it."""

READ_S_MAX: Final = 10.0
REPAIR_S: Final = 0.5
DEFECT_S: Final = 5.0
"""Between tries of what failed for a defect of ours: each of them logs a traceback."""

AT_ONCE: Final = 8
"""Functions whose packages and environments are fetched at the same moment."""

AGAIN_FIRST_S, AGAIN_MAX_S = 0.5, 30.0


class Follower:
    """Has *apply* called with every change in *store*, our own too, while *changing* is held.

    *apply* does not wait. What it raises costs that change only.
    """

    def __init__(
        self, store: SharedStore, changing: asyncio.Lock, apply: Callable[[Change], None]
    ) -> None:
        self.revision = 0
        """All changes up to this one are known."""

        self.failure = ""
        """Why others' changes are not known now; empty when they are."""

        self._store, self._changing, self._apply = store, changing, apply
        self._wake = asyncio.Event()

    async def begin(self) -> None:
        """What is listed after this is followed from before it. Raises `StoreFailed`."""
        self.revision = await self._store.revision()

    async def catch_up(self) -> None:
        """Know all that was declared by now; *changing* must be held. Raises `StoreFailed`."""
        while True:
            try:
                async with asyncio.timeout(READ_S_MAX):
                    found = await self._store.changes(self.revision)
            except TimeoutError:
                raise StoreFailed(f"PostgreSQL did not answer within {READ_S_MAX:g} s") from None
            # What functions are built of comes before them, whichever was changed last.
            for change in sorted(found.changes, key=lambda change: change.kind != "Environment"):
                try:
                    self._apply(change)
                except Exception:
                    name = f"{change.kind} {change.namespace}/{change.name}"
                    log.exception("a change is not followed", extra={"declaration": name})
            self.revision = found.revision
            if found.is_all:
                return

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Follow while the block runs."""
        async with asyncio.TaskGroup() as tasks:
            following = tasks.create_task(self._follow(), name="declarations-follow")
            listening = tasks.create_task(self._listen(), name="declarations-listen")
            try:
                yield
            finally:
                following.cancel()
                listening.cancel()

    async def _follow(self) -> None:
        while True:
            self._wake.clear()
            if again_s := await self._look():
                await asyncio.sleep(again_s)
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._wake.wait()

    async def _look(self) -> float:
        """Catch up; in how many seconds to try again, when that failed."""
        try:
            async with self._changing:
                await self.catch_up()
            self.failure = ""
            return 0.0
        except StoreFailed as error:
            if not self.failure:
                log.warning("we do not know what others declare", extra={"why": error.detail})
            self.failure = error.detail
            return REPAIR_S
        except Exception:
            log.exception("we do not know what others declare, for a defect of ours")
            return DEFECT_S

    async def _listen(self) -> None:
        while True:
            try:
                await self._store.listen(self._wake.set)
            except StoreFailed as error:
                log.info("we do not hear of what others declare", extra={"why": error.detail})
                await asyncio.sleep(REPAIR_S)
            except Exception:
                log.exception("we do not hear of what others declare, for a defect of ours")
                await asyncio.sleep(DEFECT_S)


class Arrivals:
    """Declared functions whose package or environment is not here yet.

    *have* brings what one needs and says no word before it is here; *deploy* puts it to use, if it
    still is what is declared. *why* tells of each that cannot run meanwhile.
    """

    def __init__(
        self,
        functions: Mapping[FunctionId, StoredFunction],
        have: Callable[[StoredFunction], Awaitable[None]],
        deploy: Callable[[StoredFunction], None],
        why: Callable[[FunctionId, str], None],
    ) -> None:
        self._functions, self._have, self._deploy, self._why = functions, have, deploy, why
        self._expected: dict[FunctionId, asyncio.Task[None]] = {}
        self._places = asyncio.Semaphore(AT_ONCE)
        self._group: asyncio.TaskGroup

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Bring what is expected while the block runs."""
        async with asyncio.TaskGroup() as self._group:
            try:
                yield
            finally:
                for task in self._expected.values():
                    task.cancel()

    def expect(self, id_: FunctionId) -> None:
        """Deploy what is declared as *id_* when all of it is here."""
        self.forget(id_)
        self._why(id_, "it is on its way to this server")
        task = self._group.create_task(self._bring(id_), name=f"arrival {id_}")
        self._expected[id_] = task

    def forget(self, id_: FunctionId) -> None:
        """It is declared no more, or deployed already."""
        if (task := self._expected.pop(id_, None)) is not None:
            task.cancel()
        self._why(id_, "")

    async def _bring(self, id_: FunctionId) -> None:
        wait_s = AGAIN_FIRST_S
        while (stored := self._functions.get(id_)) is not None:
            try:
                async with self._places:
                    await self._have(stored)
                if self._functions.get(id_) is stored:
                    self._deploy(stored)
                    self._expected.pop(id_, None)
                    self._why(id_, "")
                    return
                continue
            except PlatformError as error:
                why = str(error)
                log.warning("a function is not here yet", extra={"function": id_, "why": why})
            except Exception as error:
                why = f"a defect of ours: {type(error).__name__}"
                log.exception("a function is not here yet", extra={"function": id_})
            self._why(id_, why)
            await asyncio.sleep(wait_s)
            wait_s = min(AGAIN_MAX_S, wait_s * 2)
