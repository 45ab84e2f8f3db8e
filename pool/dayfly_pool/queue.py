"""The durable queue: what it has accepted ends once, whatever happens in between.

Callers accept events, runs end them, and functions have room for more of them. One task writes all
of that down, everything that came together in one transaction, and starts what it got leases for:
so accepting, ending and leasing cost one wait for the disk, however many they are.
"""

import asyncio
import logging
import random
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Final

from msgspec import Struct, structs

from dayfly_pool import retry
from dayfly_pool.clock import Clock
from dayfly_pool.errors import PlatformError, QueueFull, StoreFailed
from dayfly_pool.models import FunctionId, InvocationId, Outcome, Retry
from dayfly_pool.silence import BEAT_S, LEASE_S, Silence
from dayfly_pool.store.events import Accepted, Ended, Event, Lease, Shown, State, Store, Written

log = logging.getLogger("dayfly.queue")
ACCEPTING_MAX: Final = 10_000
"""Events that may be on their way to the disk at the same moment."""

BATCH_MAX: Final = 512
RUNS_MAX: Final = 512
SHARE_MAX: Final = 128
LEASES_AT_ONCE: Final = 64
REPAIR_S: Final = 0.5
"""Between a write that failed and the next try."""

SWEEP_S: Final = 0.25
RECOUNT_S: Final = 30.0
LOOK_S: Final = 1.0
"""Where others use the store too: how often we look at what they may have done."""

DEFECT_S: Final = 5.0
"""Between tries of what failed for a defect of ours: each of them logs a traceback."""

LONG_AT_ONCE: Final = 8
"""Runs of events with long bodies, which are in memory for as long as they run."""


class Work(Struct, frozen=True):
    """How events of a function are run: at most *places* at once, tried again as *retry* says.

    Of those that say the same *share* at most `SHARE_MAX` run at once, all together.
    """

    places: int
    retry: Retry
    share: str = ""


Run = Callable[[Lease], Awaitable[Outcome]]
"""Runs an event once. Raises `PlatformError` when it could not be run.

What else it raises is a defect of ours: the event is dead, and the others go on.
"""

Follow = Callable[[Lease, Ended], tuple[Event, ...]]
"""What is to be accepted because an event has ended so; nothing for most."""


class _Accepting(Struct):
    event: Event
    future: asyncio.Future[Accepted]


class Keep(Struct, frozen=True):
    """For how many seconds events that are over can be asked for, and keys are known."""

    over_s: float = 24 * 3600.0
    dead_s: float = 14 * 86400.0
    keys_s: float = 24 * 3600.0


class Queue:
    """See the module. Use it inside `async with queue.running():`.

    *run* runs an event once; *work_of* says how a function's are run, None for one that is not
    there: its events are dead. Who *is_alone* with the store takes over at once what other owners
    have left; else when they have said nothing for `LEASE_S`.
    """

    def __init__(
        self,
        store: Store,
        run: Run,
        work_of: Callable[[FunctionId], Work | None],
        *,
        follow: Follow = lambda lease, ended: (),
        owner: str,
        is_alone: bool = True,
        keep: Keep | None = None,
        clock: Clock | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.keep = keep or Keep()
        self.clock = clock or Clock()
        self.waiting: Counter[FunctionId] = Counter()
        """Events that wait for room, by function."""

        self._came: set[FunctionId] = set()
        """Of which some have come to wait since the last write began: it may not know of them."""

        self.running_now: Counter[FunctionId] = Counter()
        self._shares: Counter[str] = Counter()
        self.accepted = self.duplicates = self.late = self.redriven = 0
        self.outcomes: Counter[tuple[FunctionId, State]] = Counter()
        """How many attempts have brought an event there."""

        self.failure = ""
        """Why the last write failed; empty when it did not."""

        self._store, self._run, self._work_of, self._owner = store, run, work_of, owner
        self._draw, self._is_alone, self._follow = draw, is_alone, follow
        self._accepting: deque[_Accepting] = deque()
        self._ended: list[tuple[Lease, Ended]] = []
        self._wake = asyncio.Event()
        self._due_at: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._is_due = False
        """The timer has gone off, perhaps a little before the clock says so."""

        self._asks_due = True
        """Nobody knows when the next delayed event is due: a write tells."""

        self._long = asyncio.Semaphore(LONG_AT_ONCE)
        self._silence = Silence(owner)
        self._watchers: dict[InvocationId, set[asyncio.Future[None]]] = {}
        self._leases: dict[tuple[int, int], tuple[Lease, asyncio.Task[None]]] = {}
        """By row and fence: of an event whose lease was taken from us we may have the next one."""

        self._tasks: asyncio.TaskGroup
        self._is_draining = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Queue"]:
        """Accept and run events while the block runs. What is not finished then waits again."""
        await self._store.open(self._owner)
        try:
            await self._take_over()
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                keeping = [
                    tasks.create_task(self._write_down(), name="queue-write"),
                    tasks.create_task(self._sweep(), name="queue-sweep"),
                    tasks.create_task(self._beat(), name="queue-beat"),
                    tasks.create_task(self._listen(), name="queue-listen"),
                ]
                try:
                    yield self
                finally:
                    self._is_draining = True
                    for _, run in list(self._leases.values()):
                        run.cancel()
                    for task in keeping:
                        task.cancel()
            await self._flush()
        finally:
            await self._store.close()

    async def _take_over(self) -> None:
        """What is there already; and what earlier lives of this server had leased waits again."""
        beats = await self._store.beat()
        if self._is_alone:
            for owner in beats.keys() - {self._owner}:
                await self._store.fence(owner)
        await self._count()
        self._wake.set()

    def hold(self) -> None:
        """Start nothing more; what runs may end, and what comes is kept for the next start."""
        self._is_draining = True

    # ---- for callers --------------------------------------------------------------------------

    async def accept(self, event: Event) -> Accepted:
        """Keep *event*; it is on the disk when this returns. Raises `QueueFull`, `StoreFailed`."""
        if len(self._accepting) >= ACCEPTING_MAX:
            raise QueueFull(f"{len(self._accepting)} events are on their way to the disk")
        if self.failure:
            raise StoreFailed(self.failure)
        future: asyncio.Future[Accepted] = asyncio.get_running_loop().create_future()
        self._accepting.append(_Accepting(event, future))
        self._wake.set()
        return await future

    async def get(self, id_: InvocationId, wait_s: float = 0.0) -> Shown | None:
        """All that is known of an event, once it is over or *wait_s* have passed."""
        with self.watching(id_) as ended:
            shown = await self._store.get(id_)
            if shown is None or shown.state.is_over or wait_s <= 0:
                return shown
            end = time.monotonic() + wait_s
            while (left_s := end - time.monotonic()) > 0:
                slice_s = left_s if self._is_alone else min(LOOK_S, left_s)
                # it may have ended while the store was asked: then this takes no time
                await asyncio.wait((ended,), timeout=slice_s)
                shown = await self._store.get(id_)
                if ended.done() or shown is None or shown.state.is_over:
                    break
            return shown

    @contextmanager
    def watching(self, id_: InvocationId) -> Iterator[asyncio.Future[None]]:
        """While the block runs, a future that is done as soon as the event is over by our doing.

        Who watches before it is accepted need not ask the store.
        """
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        watchers = self._watchers.setdefault(id_, set())
        watchers.add(ended)
        try:
            yield ended
        finally:
            watchers.discard(ended)
            if not watchers:
                self._watchers.pop(id_, None)

    async def page(
        self,
        function: FunctionId | None = None,
        state: State | None = None,
        limit: int = 100,
        before: InvocationId | None = None,
    ) -> Sequence[Shown]:
        """The newest first, from the one *before* on; without bodies."""
        return await self._store.page(function, state, limit, before)

    async def known(self, function: FunctionId, keys: Sequence[str]) -> dict[str, InvocationId]:
        """Which events those of the idempotency *keys* stand for that stand for one."""
        return await self._store.known(function, keys)

    async def cancel(self, id_: InvocationId) -> Shown | None:
        """End it, unless it is over; as it was before, None if there is none.

        A run of it goes on until it ends, and its result is refused.
        """
        before = await self._store.cancel(id_, self.clock.now())
        if before is not None and not before.state.is_over:
            self.outcomes[before.function, State.CANCELLED] += 1
            if before.state is State.WAITING:
                self.waiting.subtract({before.function: 1})
                self.waiting += Counter()  # only what is above zero stays
            self._tell(id_)
        return before

    async def redrive(self, function: FunctionId, ids: Sequence[InvocationId] | None = None) -> int:
        """Let dead events of *function* wait again, all or *ids*; returns how many."""
        number = await self._store.redrive(function, ids, self.clock.now())
        self.redriven += number
        self._come(Counter({function: number}))
        return number

    async def oldest(self) -> dict[FunctionId, float]:
        """For how many seconds the next waiting event of each function has waited."""
        waiting = [function for function, number in self.waiting.items() if number > 0]
        now = self.clock.now()
        return {f: max(0.0, now - at) for f, at in (await self._store.oldest(waiting)).items()}

    def look(self) -> None:
        """There may be more room than there was, or functions that were not there."""
        self._wake.set()

    def forget(self, function: FunctionId) -> None:
        """It is gone: its counts go too, and what waits for it will be dead."""
        for key in [key for key in self.outcomes if key[0] == function]:
            del self.outcomes[key]
        self._wake.set()

    # ---- the writing task ---------------------------------------------------------------------

    async def _write_down(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if not await self._cycle():
                await asyncio.sleep(REPAIR_S)
                self._wake.set()

    async def _cycle(self) -> bool:
        """Write down what there is, and start what it gives leases of; False when it failed."""
        accepting = [self._accepting.popleft() for _ in range(min(BATCH_MAX, len(self._accepting)))]
        ended, self._ended = self._ended[:BATCH_MAX], self._ended[BATCH_MAX:]
        events = [each.event for each in accepting]
        try:
            wanted = self._wanted(events)
            now = self.clock.now()
            if self._is_due and self._due_at is not None:
                now = max(now, self._due_at)
            is_due = self._is_due or self._asks_due
            if not (events or ended or wanted or is_due or self.failure):
                return True
            self._asks_due = False
            self._came.clear()
            written = await self._store.write(now, [end for _, end in ended], events, wanted)
            self._note(accepting, ended, written)
            self._correct(wanted, written)
        except BaseException as error:
            self._ended = [*ended, *self._ended]
            is_end = not isinstance(error, Exception)
            why = StoreFailed("the server goes down") if is_end else self._fail(error)
            for each in accepting:
                if not each.future.done():
                    each.future.set_exception(why)
            if is_end:
                raise
            return False
        if self.failure and not await self._take_stock():
            return False
        if self._accepting or self._ended or self._wanted(()):
            self._wake.set()
        return True

    def _fail(self, error: BaseException) -> StoreFailed:
        """Nothing can be written for now; returns what callers are told."""
        if isinstance(error, StoreFailed):
            if not self.failure:
                log.error("events cannot be written", extra={"why": error.detail})
            why = error
        else:
            why = StoreFailed(f"a defect of ours: {type(error).__name__}")
            if self.failure != why.detail:
                log.error("events cannot be written", exc_info=error)
        self.failure = why.detail
        return why

    async def _take_stock(self) -> bool:
        """After a failure: a write that seemed to fail may have been done, and nobody knows of it.

        False when that cannot be found out now.
        """
        held = self._leases.keys() | {(lease.row, lease.fence) for lease, _ in self._ended}
        try:
            await self._store.release(held)
            await self._count()
        except Exception as error:
            self._fail(error)
            return False
        log.warning("events can be written again")
        self.failure = ""
        return True

    async def _count(self) -> None:
        """How many wait, by function.

        What comes meanwhile may be counted twice: whoever looks for it finds out, but for what was
        not counted nobody would look.
        """
        before = Counter(self.waiting)
        counts = await self._store.counts()
        came = self.waiting - before
        self.waiting.clear()
        self.waiting.update({f: n for (f, state), n in counts.items() if state is State.WAITING})
        self.waiting.update(came)

    def _wanted(self, events: Sequence[Event]) -> dict[FunctionId, int]:
        """How many leases there is room for, of each function that has something waiting."""
        if self._is_draining:
            return {}
        room = RUNS_MAX - len(self._leases)
        coming = Counter(event.function for event in events)
        wanted: dict[FunctionId, int] = {}
        shared: Counter[str] = Counter()
        for function in [*self.waiting, *coming]:
            if room <= 0:
                break
            if function in wanted:
                continue
            number = self.waiting[function] + coming[function]
            if number and not self._is_alone:
                number = LEASES_AT_ONCE  # others accept as well: nobody knows how many there are
            work = self._work_of(function)
            if work is None:  # somebody else may have it; else its events are to die
                free = LEASES_AT_ONCE if self._is_alone else 0
            else:
                free = work.places - self.running_now[function]
            if work is not None and work.share:
                free = min(free, SHARE_MAX - self._shares[work.share] - shared[work.share])
            take = min(number, free, LEASES_AT_ONCE, room)
            if take > 0:
                wanted[function] = take
                room -= take
                if work is not None and work.share:
                    shared[work.share] += take
        return wanted

    def _note(
        self,
        accepting: Sequence[_Accepting],
        ended: Sequence[tuple[Lease, Ended]],
        written: Written,
    ) -> None:
        for each, accepted in zip(accepting, written.accepted, strict=True):
            if accepted.is_new:
                self.accepted += 1
                self.waiting[each.event.function] += 1
            else:
                self.duplicates += 1
            if not each.future.done():
                each.future.set_result(accepted)
        self.late += len(written.late)
        for lease, end in ended:
            if (end.row, end.fence) not in written.late:
                self.outcomes[lease.function, end.state] += 1
                if end.state is State.DEAD:
                    why = end.attempt.kind if end.attempt is not None else ""
                    extra = {"function": lease.function, "event": lease.id, "why": why}
                    log.warning("an event is dead", extra=extra)
                if end.state.is_over:
                    self._tell(lease.id)
        self.waiting.update(written.due)
        for lease in written.leased:
            self._begin(lease)
        for function, number in Counter(lease.function for lease in written.leased).items():
            left = self.waiting.pop(function, 0) - number
            if left > 0:
                self.waiting[function] = left  # behind the others: they have their turn
        self._set_timer(written.due_at)

    def _correct(self, wanted: Mapping[FunctionId, int], written: Written) -> None:
        """Who got less than it wanted knows that nothing is left, whatever was counted."""
        got = Counter(lease.function for lease in written.leased)
        for function, number in wanted.items():
            if got[function] < number and function not in self._came:
                self.waiting.pop(function, None)
            elif not self._is_alone and not self.waiting[function]:
                self.waiting[function] = 1  # there may be more

    def _set_timer(self, due_at: float | None) -> None:
        if due_at == self._due_at and not self._is_due:
            return
        self._due_at, self._is_due = due_at, False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due_at is not None:
            wait_s = max(0.0, due_at - self.clock.now())
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._come_due)

    def _come_due(self) -> None:
        self._is_due = True
        self._wake.set()

    # ---- runs ---------------------------------------------------------------------------------

    def _begin(self, lease: Lease) -> None:
        self.running_now[lease.function] += 1
        work = self._work_of(lease.function)
        share = work.share if work is not None else ""
        self._shares[share] += 1
        task = self._tasks.create_task(self._attempt(lease, share))
        self._leases[lease.row, lease.fence] = lease, task

    async def _attempt(self, lease: Lease, share: str) -> None:
        try:
            ended = await self._ended_by(lease)
        finally:
            self._shares[share] -= 1
            del self._leases[lease.row, lease.fence]
            self.running_now[lease.function] -= 1
            if not self.running_now[lease.function]:
                del self.running_now[lease.function]
        self._ended.append((lease, ended))
        self._wake.set()

    async def _ended_by(self, lease: Lease) -> Ended:
        """Run it, if it may be run. A defect of ours must not end the others."""
        started_at = self.clock.now()
        try:
            if not lease.is_long:
                return await self._run_once(lease)
            async with self._long:
                return await self._run_once(lease)
        except Exception as error:
            extra = {"invocation": lease.id, "function": lease.function}
            log.exception("an event is dead for a defect of ours", extra=extra)
            return self._followed(lease, retry.broken(lease, error, started_at, self.clock.now()))

    async def _run_once(self, lease: Lease) -> Ended:
        started_at = self.clock.now()
        outcome: Outcome | PlatformError
        try:
            lease = await self._store.fetch(lease) if lease.is_long else lease
            if (unfit := retry.unfit(lease, started_at)) is not None:
                return self._followed(lease, unfit)
            outcome = await self._run(lease)
        except PlatformError as error:
            outcome = error
        work = self._work_of(lease.function)
        policy = work.retry if work is not None else Retry()
        now = self.clock.now()
        ended = retry.verdict(lease, outcome, policy, started_at, now, self._draw())
        return self._followed(lease, ended)

    def _followed(self, lease: Lease, ended: Ended) -> Ended:
        """With what follows it; without when that cannot be told, or the end would be lost too."""
        if not ended.state.is_over:
            return ended
        try:
            return structs.replace(ended, then=self._follow(lease, ended))
        except Exception:
            extra = {"invocation": lease.id, "function": lease.function}
            log.exception("what follows an event is lost for a defect of ours", extra=extra)
            return ended

    def _tell(self, id_: InvocationId) -> None:
        for watching in self._watchers.get(id_, ()):
            if not watching.done():
                watching.set_result(None)

    async def _flush(self) -> None:
        """Write down the last ends; the leases that are left wait again at the next start."""
        if self._ended:
            try:
                await self._store.write(self.clock.now(), [ended for _, ended in self._ended])
            except Exception as error:
                is_ours = not isinstance(error, StoreFailed)
                extra = {"number": len(self._ended), "why": str(error)}
                text = "results are lost, and their events will run again"
                log.error(text, extra=extra, exc_info=is_ours)
            self._ended = []

    async def _beat(self) -> None:
        """Say that we live, and fence off who does not."""
        while True:
            await asyncio.sleep(BEAT_S)
            try:
                beats = await self._store.beat()
                for owner in self._silence.over(beats, time.monotonic(), LEASE_S):
                    log.warning("an owner is fenced off", extra={"owner": owner})
                    self._come(await self._store.fence(owner))
            except StoreFailed as error:
                log.warning("we cannot say that we live", extra={"why": error.detail})
            except Exception:
                log.exception("we cannot say that we live, for a defect of ours")

    async def _listen(self) -> None:
        """Hear of what others accept, and look now and then whether something was not told."""
        while not self._is_alone:
            try:
                for function, state in await self._store.counts():
                    if state is State.WAITING:
                        self._told(function)
                    elif state is State.DELAYED:  # by one that may be gone, and its timer with it
                        self._asks_due = True
                        self._wake.set()
                async with asyncio.timeout(RECOUNT_S):
                    await self._store.listen(self._told)
            except TimeoutError:
                continue
            except StoreFailed as error:
                log.warning("we do not hear of what others accept", extra={"why": error.detail})
                await asyncio.sleep(LOOK_S)
            except Exception:
                log.exception("we do not hear of what others accept, for a defect of ours")
                await asyncio.sleep(DEFECT_S)

    def _told(self, function: FunctionId) -> None:
        """There is something waiting of *function*, perhaps only what we know of."""
        self._come(Counter({function: 0 if self.waiting[function] else 1}))

    def _come(self, numbers: Counter[FunctionId]) -> None:
        """So many more wait, and a write that is under way may not know of them."""
        self.waiting.update(numbers)
        self._came.update(numbers)
        self._wake.set()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                await self._store.sweep(self.clock.now(), self.keep.over_s, self.keep.dead_s)
            except StoreFailed as error:
                log.warning("old events are still there", extra={"why": error.detail})
            except Exception:
                log.exception("old events are still there, for a defect of ours")
                await asyncio.sleep(DEFECT_S)
