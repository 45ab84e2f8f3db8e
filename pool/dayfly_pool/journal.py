"""The journals that are ours: what many jobs and runs append at once is one write.

One task writes: all that came together goes in one transaction, so that it costs one wait for the
disk, however much it is. What failed is written again until it is done or somebody else has the
journal: the same once more does no harm (see `store.journals`), so nothing is ever half known.
Another task claims what is free, and passes on what is wished.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final, Protocol

from msgspec import Struct

from dayfly_pool.clock import Clock
from dayfly_pool.errors import BodyTooLarge, Late, NameTaken, QueueFull, StoreFailed
from dayfly_pool.silence import BEAT_S, LEASE_S, Silence
from dayfly_pool.store.journals import (
    CLAIMS_MAX,
    Append,
    Journal,
    JournalId,
    Kind,
    NewEntry,
    Store,
    Wish,
)

log = logging.getLogger("dayfly.journal")
ENTRY_BYTES_MAX: Final = 16 * 1024 * 1024
SPEC_BYTES_MAX: Final = 16 * 1024 * 1024
SMALL_BYTES_MAX: Final = 64 * 1024
"""Of a head, or a wish."""

WAITING_MAX: Final = 10_000
WAITING_BYTES_MAX: Final = 256 * 1024 * 1024
"""Appended and not on the disk yet, all together."""

BATCH_MAX: Final = 512
BATCH_BYTES_MAX: Final = 16 * 1024 * 1024
"""Of one transaction; but one append at least."""

REPAIR_S: Final = 0.5
"""Between a write that failed and the next try."""

SWEEP_S: Final = 1.0
SWEEP_AGAIN_S: Final = 0.05
"""While there is more to forget."""

RECOUNT_S: Final = 30.0
LOOK_S: Final = 1.0
DEFECT_S: Final = 5.0
"""Between tries of what failed for a defect of ours: each of them logs a traceback."""


class Keeper(Protocol):
    """Goes on with the journals of one kind. None of these may wait."""

    def room(self) -> int:
        """How many more it can go on with. When that grows, call `Journals.look`."""

    def adopt(self, journal: Journal) -> None:
        """It is ours now: read it, and go on. If it was ours before, `lost` came first."""

    def wished(self, id_: JournalId, wish: Wish) -> None:
        """Somebody wants this; once for each, and again for the next owner until it is `heard`."""

    def lost(self, id_: JournalId) -> None:
        """Somebody else has it, or will: whatever goes on for it is to stop."""


class Keep(Struct, frozen=True):
    """For how many seconds journals that are over can be asked for, and drafts wait."""

    over_s: float = 7 * 86400.0
    draft_s: float = 24 * 3600.0


class _Held(Struct):
    kind: Kind
    fence: int
    last: int
    is_draft: bool
    told: int = 0
    """The number of the last wish that was passed on."""

    is_ending: bool = False


class _Waiting(Struct, frozen=True):
    append: Append
    future: asyncio.Future[None]
    body_bytes: int


class Journals:
    """See the module. Use it inside `async with journals.running():`, once all `keep`.

    Who *is_alone* with the store takes over at once what other owners have left; else when they
    have said nothing for `LEASE_S`. To read, ask the *store* itself.
    """

    def __init__(
        self,
        store: Store,
        *,
        owner: str,
        is_alone: bool = True,
        keep_for: Keep | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.store = store
        self.keep_for = keep_for or Keep()
        self.clock = clock or Clock()
        self.writes = self.entries = self.late = 0
        self.failure = ""
        """Why the last write failed; empty when it did not."""

        self._owner, self._is_alone = owner, is_alone
        self._keepers: dict[Kind, Keeper] = {}
        self._held: dict[JournalId, _Held] = {}
        self._waiting: deque[_Waiting] = deque()
        self._writing: list[_Waiting] = []
        self._waiting_bytes = 0
        self._wake, self._looks = asyncio.Event(), asyncio.Event()
        self._claiming = asyncio.Lock()
        """Held while something becomes ours: what is ours and not held is given back."""

        self._is_doubtful = False
        """Something may be ours that we do not know of."""

        self._silence = Silence(owner)
        self._has_beaten = False
        self._is_holding = False
        self._is_open = False

    def keep(self, kind: Kind, keeper: Keeper) -> None:
        """Let *keeper* have the journals of this kind."""
        self._keepers[kind] = keeper
        self._looks.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Journals"]:
        """Write while the block runs; what is ours at its end is free for others then.

        Who appends should have ended by then: what comes later fails, what came is written.
        """
        await self.store.open(self._owner)
        try:
            await self._take_over()
            self._is_open = True
            async with asyncio.TaskGroup() as tasks:
                keeping = [
                    tasks.create_task(self._write_down(), name="journal-write"),
                    tasks.create_task(self._claim(), name="journal-claim"),
                    tasks.create_task(self._sweep(), name="journal-sweep"),
                ]
                if not self._is_alone:
                    keeping.append(tasks.create_task(self._beat(), name="journal-beat"))
                    keeping.append(tasks.create_task(self._listen(), name="journal-listen"))
                try:
                    yield self
                finally:
                    self._is_open, self._is_holding = False, True
                    for task in keeping:
                        task.cancel()
            await self._finish()
        finally:
            self._is_open = False
            await self.store.close()

    async def _take_over(self) -> None:
        """What earlier lives of this server had is free again."""
        if self._is_alone:
            for owner in (await self.store.beat()).keys() - {self._owner}:
                await self.store.fence(owner)
        self._looks.set()

    def hold(self) -> None:
        """Claim nothing more; what is ours may end."""
        self._is_holding = True

    def look(self) -> None:
        """There may be more room than there was."""
        self._looks.set()

    # ---- for callers --------------------------------------------------------------------------

    async def create(self, journal: Journal, entries: Sequence[NewEntry] = ()) -> Journal:
        """Keep a new journal; it is on the disk when this returns, and adopted if there is room.

        Whoever creates it again with the same id after `StoreFailed` gets that one. A draft is to
        be filled, and then published. Raises `NameTaken`, `BodyTooLarge`, `StoreFailed`.
        """
        _fits("spec", journal.spec, SPEC_BYTES_MAX)
        _fits("head", journal.head, SMALL_BYTES_MAX)
        for entry in entries:
            _fits("entry", entry.body, ENTRY_BYTES_MAX)
        if self.failure:
            raise StoreFailed(self.failure)
        async with self._becoming_ours():
            is_ours = journal.is_draft or self._room(journal.kind) > 0
            made = await self.store.create(journal, entries, is_ours=is_ours)
            self._note(made)
        return made

    async def publish(self, id_: JournalId) -> Journal | None:
        """Let a draft be adopted, by us if there is room; None if there is none.

        What was appended to it must be on the disk.
        """
        async with self._becoming_ours():
            draft = await self.store.get(id_)
            if draft is None:
                return None
            found = await self.store.publish(id_, is_ours=self._room(draft.kind) > 0)
            if (held := self._held.get(id_)) is not None and held.is_draft:
                self._forget(id_, held.fence)
            if found is not None:
                self._note(found)
            return found

    async def take(self, id_: JournalId) -> Journal | None:
        """Append to a draft here from now on, wherever it came from; None if it is no draft."""
        async with self._becoming_ours():
            found = await self.store.take(id_)
            if found is not None:
                self._note(found)
            return found

    async def append(
        self,
        id_: JournalId,
        entries: Sequence[NewEntry] = (),
        *,
        head: bytes | None = None,
        ended_at: float | None = None,
        replaces: Sequence[int] = (),
        heard: int = 0,
    ) -> int:
        """Write into a journal of ours, in the order of the calls; on the disk when this returns.

        Returns the number of the first of *entries*. *replaces* are numbers of entries that go with
        it, *heard* is the number of the last wish that is granted with it. While nothing can be
        written this waits. Who is cancelled does not know whether it was written.
        Raises `Late` when somebody else has the journal, or it is over: then nothing was written;
        `StoreFailed` when the server goes down; `BodyTooLarge`, `QueueFull`.
        """
        _fits("head", head or b"", SMALL_BYTES_MAX)
        for entry in entries:
            _fits("entry", entry.body, ENTRY_BYTES_MAX)
        held = self._held.get(id_)
        if not self._is_open:
            raise StoreFailed("the server goes down")
        if held is None or held.is_ending:
            raise Late(f"{id_} is not ours, or it is over")
        if len(self._waiting) >= WAITING_MAX or self._waiting_bytes > WAITING_BYTES_MAX:
            raise QueueFull(f"{self._waiting_bytes} bytes are on their way to the journals")
        append = Append(
            id=id_,
            fence=held.fence,
            after=held.last,
            entries=tuple(entries),
            head=head,
            ended_at=ended_at,
            replaces=tuple(replaces),
            heard=heard,
        )
        held.last, held.is_ending = append.last, ended_at is not None
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        body_bytes = sum(len(entry.body) for entry in entries) + len(head or b"")
        self._waiting.append(_Waiting(append, future, body_bytes))
        self._waiting_bytes += body_bytes
        self._wake.set()
        await future
        return append.after + 1

    async def wish(self, id_: JournalId, body: bytes) -> int:
        """Want something of whoever has the journal; 0 when there is none, or it is over.

        Raises `TooManyWishes`, `BodyTooLarge`, `StoreFailed`.
        """
        _fits("wish", body, SMALL_BYTES_MAX)
        number = await self.store.wish(id_, body)
        self._looks.set()
        return number

    async def delete(self, id_: JournalId) -> bool:
        """Forget one that is over or a draft; False if it is neither."""
        is_gone = await self.store.delete(id_)
        if is_gone and (held := self._held.get(id_)) is not None:
            self._forget(id_, held.fence)
        return is_gone

    # ---- the writing task ---------------------------------------------------------------------

    async def _write_down(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                self._writing = self._batch()
                await self._write(self._writing)
                self._writing = []

    def _batch(self) -> list[_Waiting]:
        """The next of what waits, as much as one transaction takes."""
        some: list[_Waiting] = []
        long = 0
        while self._waiting and len(some) < BATCH_MAX:
            long += self._waiting[0].body_bytes
            if some and long > BATCH_BYTES_MAX:
                break
            some.append(self._waiting.popleft())
            self._waiting_bytes -= some[-1].body_bytes
        return some

    async def _write(self, some: list[_Waiting]) -> None:
        """Until it is written. A defect of ours costs the journals over which it comes."""
        appends = merged([each.append for each in some])
        while True:
            try:
                late = await self.store.append(appends)
            except StoreFailed as error:
                if not self.failure:
                    log.error("journals cannot be written", extra={"why": error.detail})
                self.failure = error.detail
                await asyncio.sleep(REPAIR_S)
            except Exception as error:
                if len(appends) == 1:
                    self._give_up(appends[0], some, error)
                    return
                for append in appends:
                    await self._write([each for each in some if each.append.id == append.id])
                return
            else:
                break
        if self.failure:
            log.warning("journals can be written again")
            self.failure = ""
        self._written(appends, some, late)

    def _written(
        self, appends: Sequence[Append], some: Sequence[_Waiting], late: set[JournalId]
    ) -> None:
        self.writes += 1
        for append in appends:
            if append.id in late:
                self.late += 1
                self._lose(append.id, append.fence)
            else:
                self.entries += len(append.entries)
                held = self._held.get(append.id)
                if append.ended_at is not None and held is not None and held.is_ending:
                    del self._held[append.id]
        for each in some:
            if not each.future.done():
                if each.append.id in late:
                    each.future.set_exception(Late(f"somebody else has {each.append.id}"))
                else:
                    each.future.set_result(None)

    def _give_up(self, append: Append, some: Sequence[_Waiting], error: Exception) -> None:
        """The others go on; this one may be gone on with at the next start."""
        extra = {"journal": append.id}
        log.error("a journal cannot be written, for a defect of ours", extra=extra, exc_info=error)
        why = StoreFailed(f"a defect of ours: {type(error).__name__}")
        for each in some:
            if not each.future.done():
                each.future.set_exception(why)
        self._lose(append.id, append.fence)

    async def _finish(self) -> None:
        """Write down what is left, and give back what is ours; what cannot be is told."""
        left, self._waiting = [*self._writing, *self._waiting], deque()
        try:
            if left:
                appends = merged([each.append for each in left])
                self._written(appends, left, await self.store.append(appends))
            await self.store.release()
        except Exception as error:
            is_ours = not isinstance(error, StoreFailed)
            extra = {"number": len(left), "why": str(error)}
            level = logging.ERROR if left or is_ours else logging.WARNING
            log.log(level, "journals cannot be written at the end", extra=extra, exc_info=is_ours)
        for each in left:
            if not each.future.done():
                each.future.set_exception(StoreFailed("the server goes down"))
        self._held.clear()

    # ---- what is ours -------------------------------------------------------------------------

    def _room(self, kind: Kind) -> int:
        keeper = self._keepers.get(kind)
        return keeper.room() if keeper is not None and not self._is_holding else 0

    @asynccontextmanager
    async def _becoming_ours(self) -> AsyncIterator[None]:
        """Whatever fails in the block: perhaps something is ours now. It is found out later."""
        async with self._claiming:
            try:
                yield
            except NameTaken:
                raise
            except BaseException:
                self._is_doubtful = True
                raise
            finally:
                self._looks.set()

    def _note(self, journal: Journal) -> None:
        """It is ours, if it says so; and adopted, if it was not before."""
        held = self._held.get(journal.id)
        if journal.owner != self._owner or (held is not None and held.fence == journal.fence):
            return
        if held is not None:
            self._lose(journal.id, held.fence)
        new = _Held(journal.kind, journal.fence, journal.last, journal.is_draft)
        self._held[journal.id] = new
        if not journal.is_draft:
            try:
                self._keepers[journal.kind].adopt(journal)
            except Exception:
                extra = {"journal": journal.id}
                log.exception("a journal is not gone on with, for a defect of ours", extra=extra)

    def _forget(self, id_: JournalId, fence: int) -> bool:
        """It is not ours any more: what still waits for it is too late. Whether it was."""
        held = self._held.get(id_)
        if held is None or held.fence != fence:
            return False
        del self._held[id_]
        is_late = [each.append.id == id_ for each in self._waiting]
        if any(is_late):
            waiting, self._waiting = self._waiting, deque()
            for each in waiting:
                if each.append.id != id_:
                    self._waiting.append(each)
                    continue
                self._waiting_bytes -= each.body_bytes
                if not each.future.done():
                    each.future.set_exception(Late(f"{id_} is not ours any more"))
        return True

    def _lose(self, id_: JournalId, fence: int) -> None:
        """Somebody else has it, or nobody."""
        held = self._held.get(id_)
        if self._forget(id_, fence) and held is not None and not held.is_draft:
            log.warning("a journal is not ours any more", extra={"journal": id_})
            try:
                self._keepers[held.kind].lost(id_)
            except Exception:
                extra = {"journal": id_}
                log.exception("a lost journal goes on, for a defect of ours", extra=extra)

    async def _claim(self) -> None:
        """Have what is free, and hear what is wished, whenever there may be something."""
        while True:
            await self._looks.wait()
            self._looks.clear()
            try:
                await self._claim_all()
            except StoreFailed as error:
                log.warning("nothing can be claimed", extra={"why": error.detail})
                await asyncio.sleep(REPAIR_S)
                self._looks.set()
            except Exception:
                log.exception("nothing can be claimed, for a defect of ours")
                await asyncio.sleep(DEFECT_S)
                self._looks.set()

    async def _claim_all(self) -> None:
        async with self._claiming:
            if self._is_doubtful:
                await self.store.release({(id_, held.fence) for id_, held in self._held.items()})
                self._is_doubtful = False
            for kind in list(self._keepers):
                while (room := min(self._room(kind), CLAIMS_MAX)) > 0:
                    self._is_doubtful = True
                    claimed = await self.store.claim(kind, room)
                    self._is_doubtful = False
                    for journal in claimed:
                        self._note(journal)
                    if len(claimed) < room:
                        break
        self._hear(await self.store.wishes())

    def _hear(self, wishes: Mapping[JournalId, Sequence[Wish]]) -> None:
        for id_, wished in wishes.items():
            for wish in wished:
                held = self._held.get(id_)
                if held is None or held.is_ending or wish.number <= held.told:
                    continue
                held.told = wish.number
                try:
                    self._keepers[held.kind].wished(id_, wish)
                except Exception:
                    extra = {"journal": id_}
                    log.exception("a wish is not granted, for a defect of ours", extra=extra)

    # ---- what others do -----------------------------------------------------------------------

    async def _beat(self) -> None:
        """Say that we live, and fence off who does not."""
        while True:
            try:
                beats = await self.store.beat()
                if self._has_beaten and beats.get(self._owner) == 1:
                    await self._find_lost()
                self._has_beaten = True
                for owner in self._silence.over(beats, time.monotonic(), LEASE_S):
                    log.warning("an owner is fenced off", extra={"owner": owner})
                    await self.store.fence(owner)
                    self._looks.set()
            except StoreFailed as error:
                log.warning("we cannot say that we live", extra={"why": error.detail})
            except Exception:
                log.exception("we cannot say that we live, for a defect of ours")
            await asyncio.sleep(BEAT_S)

    async def _find_lost(self) -> None:
        """We were fenced off: others have what was ours, and we have not noticed yet."""
        for id_, held in list(self._held.items()):
            found = await self.store.get(id_)
            if found is None or found.fence != held.fence:
                self._lose(id_, held.fence)

    async def _listen(self) -> None:
        """Hear of what others leave or want, and look now and then whether something was missed."""
        while True:
            self._looks.set()
            try:
                async with asyncio.timeout(RECOUNT_S):
                    await self.store.listen(self._looks.set)
            except TimeoutError:
                continue
            except StoreFailed as error:
                log.warning("we do not hear of what others want", extra={"why": error.detail})
                await asyncio.sleep(LOOK_S)
            except Exception:
                log.exception("we do not hear of what others want, for a defect of ours")
                await asyncio.sleep(DEFECT_S)

    async def _sweep(self) -> None:
        number = 0
        while True:
            await asyncio.sleep(SWEEP_AGAIN_S if number else SWEEP_S)
            try:
                keep = self.keep_for
                number = await self.store.sweep(self.clock.now(), keep.over_s, keep.draft_s)
            except StoreFailed as error:
                number = 0
                log.warning("old journals are still there", extra={"why": error.detail})
            except Exception:
                number = 0
                log.exception("old journals are still there, for a defect of ours")
                await asyncio.sleep(DEFECT_S)


def merged(appends: Sequence[Append]) -> list[Append]:
    """One for each journal, as if they came one after the other."""
    by_id: dict[JournalId, list[Append]] = {}
    for append in appends:
        by_id.setdefault(append.id, []).append(append)
    return [some[0] if len(some) == 1 else _one(some) for some in by_id.values()]


def _one(some: Sequence[Append]) -> Append:
    heads = [append.head for append in some if append.head is not None]
    ends = [append.ended_at for append in some if append.ended_at is not None]
    return Append(
        id=some[0].id,
        fence=some[0].fence,
        after=some[0].after,
        entries=tuple(entry for append in some for entry in append.entries),
        head=heads[-1] if heads else None,
        ended_at=ends[-1] if ends else None,
        replaces=tuple(number for append in some for number in append.replaces),
        heard=max(append.heard for append in some),
    )


def _fits(what: str, body: bytes, most: int) -> None:
    if len(body) > most:
        raise BodyTooLarge(f"the {what} has {len(body)} bytes, the limit is {most}")
