"""One job while a server runs it: takes tasks, has the pool run them, writes down what came of it.

What has ended since the last commit is one entry of the job's journal, however many tasks that
are; what ended and was not written when a server dies runs again.
"""

import asyncio
import contextlib
import logging
import random
import time
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, Literal

import msgspec
from msgspec import Struct

from dayfly_pool.batch.indices import IndexSet, parse, up_to
from dayfly_pool.batch.lines import line_of
from dayfly_pool.batch.model import COMMAND_TIMEOUT_S, JobSpec
from dayfly_pool.batch.tasks import Segment, Snapshot, Task, TaskFailed, Tasks, Verdict
from dayfly_pool.clock import Clock
from dayfly_pool.errors import BadInput, BodyTooLarge, ItemDamaged, PlatformError, StoreFailed
from dayfly_pool.journal import Journals
from dayfly_pool.models import (
    Failure,
    FunctionId,
    FunctionSpec,
    Invocation,
    InvocationId,
    Metadata,
    Success,
)
from dayfly_pool.pool import Pool
from dayfly_pool.store.journals import Entry, Journal, JournalId, NewEntry, Wish

log = logging.getLogger("dayfly.jobs")
LOG, ITEMS, RESULTS = 0, 1, 2
"""Parts of a job's journal."""

COMMIT_S: Final = 0.05
"""What ends in this time is written down together."""

NEWS_MAX: Final = 8192
"""With so many ends not written yet, no further task is begun."""

SEGMENTS_MAX: Final = 256
SMALL_MAX: Final = 256
"""So many entries of few results are made one."""

ENTRY_BYTES: Final = 1 << 20
RESULT_BYTES_MAX: Final = 256 * 1024
NOTHING: Final = b"null"
QUEUE_S_MAX: Final = 3600.0
"""A task may wait this long for a sandbox: others come first."""

LAST_COMMIT_S: Final = 5.0
"""A server that goes down waits this long for what has ended to be written."""

CHUNKS_KEPT: Final = 16
JobState = Literal["Pending", "Running", "Suspended", "Complete", "Failed", "Cancelled"]


class Stored(Struct, frozen=True, kw_only=True):
    """What is written once: a job as it was declared, and what its tasks are."""

    metadata: Metadata
    spec: JobSpec
    function: FunctionSpec
    has_items: bool = False


class Status(Struct, kw_only=True, rename="camel"):
    """How far a job is. Times are Unix seconds, 0.0 for what has not happened."""

    state: JobState = "Pending"
    total: int = 0
    most: int = 0
    """The largest index."""

    succeeded: int = 0
    failed: int = 0
    running: int = 0
    failures: int = 0
    parallelism: int = 0
    suspended: bool = False
    ending: bool = False
    """It was cancelled softly: it is over when nothing of it runs any more."""

    started_at: float = 0.0
    ended_at: float = 0.0
    reason: str = ""
    message: str = ""
    ttl_s: float = 0.0
    """Kept this long after its end."""


class SetSuspended(Struct, frozen=True, tag=True):
    """Stop what runs and begin nothing; or go on."""

    suspended: bool


class SetParallelism(Struct, frozen=True, tag=True):
    """Run so many at once from now on."""

    parallelism: int


class Cancel(Struct, frozen=True, tag=True):
    """End it; *hard* stops what runs, else that may end."""

    hard: bool = True


CANCELLED: Final = Verdict("Cancelled", "Cancelled", "somebody cancelled it")
Asked = SetSuspended | SetParallelism | Cancel
_ENTRY: Final = msgspec.msgpack.Decoder(tuple[bool, msgspec.Raw])
_RESULTS: Final = msgspec.msgpack.Decoder(list[tuple[int, bytes]])


def function_of(journal: Journal) -> FunctionId:
    """What the pool calls the tasks of a job."""
    return FunctionId(f"{journal.namespace}/{journal.name}.job")


def indices_of(spec: JobSpec, total: int) -> IndexSet:
    """The indices of a job; *total* is how many items it has, if it has items."""
    if spec.indices is not None:
        return parse(spec.indices)
    if spec.size is not None:
        return up_to(spec.size)
    return up_to(total or 1)


def results_in(entries: Sequence[Entry], index: int | None = None) -> list[tuple[int, bytes]]:
    """(index, line of JSON) of all results in *entries* of the part `RESULTS`, or of that *index*.

    What was kept before it was looked at, and is no JSON, is left out. Raises `StoreFailed` when
    an entry is damaged.
    """
    found: list[tuple[int, bytes]] = []
    for entry in entries:
        if entry.damage:
            what = f"results {entry.low} to {entry.high}"
            raise StoreFailed(f"{what}, entry {entry.number}: {entry.damage}")
        for its, body in _RESULTS.decode(zlib.decompress(entry.body)):
            if index is None or its == index:
                try:
                    found.append((its, line_of(body)))
                except BadInput:
                    log.warning("a result is no JSON", extra={"index": its, "entry": entry.number})
    return found


def replayed(tasks: Tasks, entries: Sequence[Entry], now: float) -> None:
    """Have *tasks* be what the *entries* of the part `LOG` say."""
    snapshot: Snapshot | None = None
    segments: list[Segment] = []
    for entry in entries:
        is_snapshot, raw = _ENTRY.decode(entry.body)
        if is_snapshot:
            snapshot = msgspec.msgpack.decode(raw, type=Snapshot)
            segments.clear()
        else:
            segments.append(msgspec.msgpack.decode(raw, type=Segment))
    tasks.replay(snapshot, segments, now)


async def log_of(journals: Journals, id_: JournalId) -> list[Entry]:
    """All entries of the part `LOG`. Raises `StoreFailed` also when one is damaged."""
    entries: list[Entry] = []
    while found := await journals.store.entries(
        id_, part=LOG, after=entries[-1].number if entries else 0
    ):
        for entry in found:
            if entry.damage:
                raise StoreFailed(f"entry {entry.number} of job {id_}: {entry.damage}")
        entries += found
    return entries


class Results:
    """What tasks returned, on its way to the journal: few large entries in the end."""

    def __init__(self) -> None:
        self._new: list[tuple[int, bytes]] = []
        self._small: list[tuple[int, bytes]] = []
        """Of entries that are to be made one."""

        self._numbers: list[int] = []
        """Of these entries."""

        self._bytes = 0

    def __len__(self) -> int:
        return len(self._new)

    def add(self, index: int, body: bytes) -> None:
        """A task returned *body*, a line of JSON."""
        self._new.append((index, body))

    def drain(self, number: int) -> tuple[list[NewEntry], tuple[int, ...]]:
        """(entries to be written, of which the first has *number*; numbers that they replace)."""
        if not self._new:
            return [], ()
        new, self._new = self._new, []
        size = sum(len(body) + 16 for _, body in new)
        self._bytes += size
        self._small += new
        if len(self._numbers) < SMALL_MAX and self._bytes < ENTRY_BYTES:
            self._numbers.append(number)
            return [_entry(new)], ()
        replaced, whole = tuple(self._numbers), sorted(self._small)
        self._small, self._numbers, self._bytes = [], [], 0
        return [_entry(part) for part in _parts(whole)], replaced


def _parts(results: list[tuple[int, bytes]]) -> list[list[tuple[int, bytes]]]:
    parts: list[list[tuple[int, bytes]]] = [[]]
    size = 0
    for result in results:
        size += len(result[1]) + 16
        if size > ENTRY_BYTES and parts[-1]:
            parts.append([])
            size = len(result[1]) + 16
        parts[-1].append(result)
    return parts


def _entry(results: list[tuple[int, bytes]]) -> NewEntry:
    low, high = min(results)[0], max(results)[0]
    body = zlib.compress(msgspec.msgpack.encode(results), 1)
    return NewEntry(RESULTS, low, high, body)


class Job:
    """One job that is ours to run."""

    def __init__(
        self,
        journal: Journal,
        pool: Pool,
        journals: Journals,
        clock: Clock,
        processors: int,
        on_change: Callable[["Job"], None],
    ) -> None:
        self.id = journal.id
        self.stored = msgspec.json.decode(journal.spec, type=Stored)
        self.status = msgspec.json.decode(journal.head, type=Status)
        self.name = f"{journal.namespace}/{journal.name}"
        self.function_id = function_of(journal)
        self._pool, self._journals, self._clock = pool, journals, clock
        self._last, self._heard = journal.last, 0
        indices = indices_of(self.stored.spec, self.status.total)
        self.tasks = Tasks(self.stored.spec, indices, self.status.most)
        self._processors, self._on_change = processors, on_change
        self.allowed = 0
        """How many tasks may run at once, as its queue has it."""

        self._owed = 0
        """Places that it may not have any more, and has not given back yet."""

        self._wanted = 0
        self._workers = 0
        self._invocations: dict[int, InvocationId] = {}
        self._stopped: set[int] = set()
        """Indices that we have stopped: they have not failed."""

        self.ended: Counter[str] = Counter()
        """Tasks that have ended here, by how."""

        self._results = Results()
        self._segments: list[int] = []
        """Numbers of the entries of the log since the last snapshot, and its own."""

        self._chunks: OrderedDict[int, tuple[int, list[bytes]]] = OrderedDict()
        self._wake, self._news = asyncio.Event(), asyncio.Event()
        self._changed = False
        """The status is to be written, even if no task has ended."""

        self._is_fed = self._is_held = self._is_over = False
        self._moved = asyncio.Event()
        """Something was written down, or it is over."""

    @property
    def function(self) -> FunctionSpec:
        """What runs its tasks."""
        spec, stored = self.stored.spec, self.stored.function
        timeout_s = spec.timeout_seconds
        if timeout_s is None:
            timeout_s = stored.timeout_seconds if spec.function is not None else COMMAND_TIMEOUT_S
        return msgspec.structs.replace(
            stored,
            timeout_seconds=timeout_s,
            env=stored.env | self._variables(),
            min_scale=0,
            max_scale=10_000,
            concurrency=1,
            keep_alive_seconds=5.0,
            queue_max=1_000_000,
            on_success=None,
            on_failure=None,
            routes=(),
        )

    def _variables(self) -> dict[str, str]:
        spec = self.stored.spec
        per_index = spec.backoff_limit_per_index
        limit = spec.failures_max if per_index is None else per_index
        return {
            "JOB_NAME": self.stored.metadata.name,
            "JOB_ARRAY_SIZE": str(self.tasks.total),
            "JOB_RETRY_LIMIT": str(limit),
            "JOB_MODE": "task",
        }

    # ---- its life -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Run it to its end. Raises `Late`; cancelled, it goes on later."""
        try:
            await self._run()
        finally:
            self._is_over = True
            self._moved.set()

    async def _run(self) -> None:
        entries = await log_of(self._journals, self.id)
        replayed(self.tasks, entries, self._clock.now())
        self._segments = [entry.number for entry in entries]
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._keep_committing())
                try:
                    await self._feed(group)
                finally:
                    self.stop_running("the job is not run here any more")
                    self._is_fed = True
                    self._news.set()
        except ExceptionGroup as several:
            raise several.exceptions[0] from several
        except asyncio.CancelledError:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_COMMIT_S):
                    await self._commit()  # what has ended need not run again
            raise
        if self.tasks.verdict is None:
            await self._commit()
        else:
            await self._commit(ended_at=self._clock.now())
            extra = {"job": self.name, "state": self.status.state, "reason": self.status.reason}
            log.info("job over", extra=extra)

    def hold(self) -> None:
        """Begin nothing more: the server goes down, and another goes on with it."""
        self._is_held = True
        self._wake.set()

    def look(self) -> Status:
        """How far it is now; it is over when that is on the disk."""
        return self.status if self._is_over else self._summary(None)

    async def settled(self, number: int) -> None:
        """Until wish *number* was heard and that is written down, and what is to stop has."""
        while not self._is_over and (
            self._heard < number
            or self._changed
            or self.tasks.verdict is not None
            or (self.status.suspended and self._workers)
        ):
            self._moved.clear()
            await self._moved.wait()

    async def _feed(self, group: asyncio.TaskGroup) -> None:
        """Have tasks running while there are some and they may."""
        while self._workers or not (self._is_held or self.tasks.verdict is not None):
            self._wake.clear()
            now = self._clock.now()
            self._look_at_deadline(now)
            self._look_at_wanted()
            if self.status.ending and not self._workers:
                self.tasks.end(CANCELLED)
            if self.tasks.verdict is not None:
                self.stop_running("the job has ended")
            while self._may_begin() and (task := self.tasks.take(now)) is not None:
                self._workers += 1
                group.create_task(self._work(task))
            if not self._workers and (self.tasks.verdict is not None or self._is_held):
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._wait_s(now)):
                    await self._wake.wait()

    def _wait_s(self, now: float) -> float | None:
        if self.status.suspended:
            return None
        times = [at for at in (self.tasks.due_at, self._deadline) if at is not None]
        return max(0.0, min(times) - now) + 0.001 if times else None

    @property
    def _deadline(self) -> float | None:
        limit_s = self.stored.spec.active_deadline_seconds
        if limit_s is None or not self.status.started_at:
            return None
        return self.status.started_at + limit_s

    def _look_at_deadline(self, now: float) -> None:
        at = self._deadline
        if at is not None and now >= at and not self.status.suspended:
            limit_s = self.stored.spec.active_deadline_seconds
            what = f"it was active for longer than {limit_s:g} s"
            self.tasks.end(Verdict("Failed", "DeadlineExceeded", what))

    def _look_at_wanted(self) -> None:
        """Tell when it wants to run more or fewer at once than it did."""
        if (wanted := self.wanted) != self._wanted:
            self._wanted = wanted
            self._on_change(self)

    @property
    def wanted(self) -> int:
        """How many tasks it has for this moment, up to its parallelism."""
        if self.tasks.verdict is not None or self._is_stopped:
            return 0
        left = self.tasks.total - len(self.tasks.succeeded) - len(self.tasks.failed)
        most = self.status.parallelism or self.stored.spec.parallelism or self._processors
        return min(left, max(most, self.stored.spec.min_count))

    def allow(self, number: int) -> None:
        """So many tasks may run at once now; `give_back` tells when fewer do."""
        self._owed += max(0, self.allowed - number)
        if number and not self.status.started_at:
            self.status.started_at = self._clock.now()
            self._changed = True
            self._news.set()
        self.allowed = number
        self._wake.set()

    def evict(self, number: int, why: str) -> None:
        """Stop so many of those that run: they run again, and nothing is counted."""
        for index in list(self._invocations)[-number:]:
            self._stopped.add(index)
            self._pool.stop(self._invocations[index], why)

    def give_back(self) -> int:
        """How many places have become free since this was asked."""
        free = self._owed - max(0, self._workers - self.allowed)
        self._owed -= max(0, free)
        return max(0, free)

    def _may_begin(self) -> bool:
        is_full = self._workers >= self.allowed or self.tasks.has_news >= NEWS_MAX
        return not (is_full or self._is_stopped)

    @property
    def _is_stopped(self) -> bool:
        """Whether nothing more is to be begun now."""
        return self.status.suspended or self.status.ending or self._is_held

    def stop_running(self, why: str) -> None:
        """Stop its tasks: they run again, and nothing is counted."""
        self._stopped.update(self._invocations)
        for invocation in list(self._invocations.values()):
            self._pool.stop(invocation, why)

    async def _work(self, first: Task) -> None:
        """Run tasks one after the other, as long as this many may run at once."""
        task: Task | None = first
        try:
            while task is not None:
                await self._run_task(task)
                if (wait_s := self._pool.pace.wait_s(time.monotonic())) > 0:
                    await asyncio.sleep(wait_s)
                self._workers -= 1  # so that this place is one that may be taken
                task = self.tasks.take(self._clock.now()) if self._may_begin() else None
                self._workers += 1
        finally:
            self._workers -= 1
            if self._owed:
                self._on_change(self)
            self._wake.set()

    async def _run_task(self, task: Task) -> None:
        index = task.index
        id_ = InvocationId(f"{self.id}-{index}-{task.retry}")
        self._invocations[index] = id_
        try:
            invocation = Invocation(
                id=id_,
                function=self.function_id,
                body=await self._event(task),
                queue_s_max=QUEUE_S_MAX,
                env={
                    "JOB_INDEX": str(index),
                    "JOB_COMPLETION_INDEX": str(index),
                    "JOB_INDEX_RETRY_COUNT": str(task.retry),
                },
            )
            self._note(index, await self._pool.invoke(invocation))
        except PlatformError as error:
            is_ours = not isinstance(error, BodyTooLarge | ItemDamaged)
            self._failed(index, TaskFailed(type(error).__name__, str(error), is_ours=is_ours))
        finally:
            del self._invocations[index]
            self._stopped.discard(index)

    def _note(self, index: int, outcome: Success | Failure) -> None:
        if isinstance(outcome, Success):
            self._note_result(index, outcome.body)
        elif index in self._stopped:
            self.tasks.give_back(index, self._clock.now())
        else:
            why = TaskFailed(
                outcome.kind,
                outcome.message,
                outcome.exit_code,
                was_killed=outcome.was_killed,
            )
            self._failed(index, why)

    def _note_result(self, index: int, body: bytes) -> None:
        if len(body) > RESULT_BYTES_MAX:
            what = f"it returned {len(body)} bytes, a result has {RESULT_BYTES_MAX} at most"
            self._failed(index, TaskFailed("ResultTooLarge", what))
            return
        if body != NOTHING:
            try:
                body = line_of(body)
            except BadInput as error:
                self._failed(index, TaskFailed("BadResponse", error.detail))
                return
        self.tasks.succeed(index)
        self.ended["succeeded"] += 1
        if body != NOTHING and index in self.tasks.succeeded:
            self._results.add(index, body)
        self._news.set()

    def _failed(self, index: int, why: TaskFailed) -> None:
        self.ended["not run" if why.is_ours else "failed"] += 1
        self.tasks.fail(index, why, self._clock.now(), random.random())
        self._news.set()

    # ---- what a task is given -----------------------------------------------------------------

    async def _event(self, task: Task) -> bytes:
        spec = self.stored.spec
        item = await self._item(task.index) if self.stored.has_items else None
        if spec.function is None:
            return msgspec.json.encode(
                {"command": spec.command, "script": spec.script, "item": item}
            )
        if item is not None:
            return bytes(item)
        return b'{"index":%d,"size":%d,"retry":%d}' % (task.index, self.tasks.total, task.retry)

    async def _item(self, index: int) -> msgspec.Raw:
        """Its line of JSON."""
        for low, lines in reversed(self._chunks.values()):
            if low <= index < low + len(lines):
                return msgspec.Raw(lines[index - low])
        (entry,) = await self._journals.store.entries(self.id, part=ITEMS, covering=index, limit=1)
        if entry.damage:
            raise ItemDamaged(f"item {index}: {entry.damage}")
        lines = zlib.decompress(entry.body).split(b"\n")
        self._chunks[entry.number] = entry.low, lines
        if len(self._chunks) > CHUNKS_KEPT:
            self._chunks.popitem(last=False)
        return msgspec.Raw(lines[index - entry.low])

    # ---- what is wanted of it -----------------------------------------------------------------

    def hear(self, wish: Wish) -> None:
        """Somebody wants something of it."""
        if wish.number <= self._heard:
            return
        self._heard = wish.number
        match msgspec.json.decode(wish.body, type=Asked):
            case SetSuspended(suspended=suspended):
                self._suspend(suspended)
            case SetParallelism(parallelism=parallelism):
                self.status.parallelism = parallelism
            case Cancel(hard=hard):
                self.status.ending = True
                if hard:
                    self.tasks.end(CANCELLED)
                    self.stop_running("the job was cancelled")
        self._changed = True
        self._news.set()
        self._wake.set()

    def _suspend(self, suspended: bool) -> None:
        if suspended == self.status.suspended:
            return
        self.status.suspended = suspended
        self.status.started_at = 0.0 if suspended or not self.allowed else self._clock.now()
        if suspended:
            self.stop_running("the job was suspended")

    # ---- the journal --------------------------------------------------------------------------

    async def _keep_committing(self) -> None:
        while not self._is_fed:
            if not self._changed:
                await self._news.wait()
                if not self._is_fed:
                    await asyncio.sleep(COMMIT_S)
            self._news.clear()
            await self._commit()
            self._wake.set()

    async def _commit(self, ended_at: float | None = None) -> None:
        self._changed = False
        status = self._summary(ended_at)
        entries, replaced = self._written()
        self._last += len(entries)
        await self._journals.append(
            self.id,
            entries,
            head=msgspec.json.encode(status),
            ended_at=ended_at,
            replaces=replaced,
            heard=self._heard,
        )
        if ended_at is not None:
            self.status = status
        self._moved.set()

    def _written(self) -> tuple[list[NewEntry], tuple[int, ...]]:
        """What has happened as entries, and which entries they replace."""
        replaced: tuple[int, ...] = ()
        entries: list[NewEntry] = []
        if self.tasks.has_news:
            new: Segment | Snapshot = self.tasks.drain()
            is_snapshot = len(self._segments) >= SEGMENTS_MAX
            if is_snapshot:
                new = self.tasks.snapshot()
                replaced, self._segments = tuple(self._segments), []
            self._segments.append(self._last + 1)
            entries.append(NewEntry(LOG, body=msgspec.msgpack.encode((is_snapshot, new))))
        results, merged = self._results.drain(self._last + 1 + len(entries))
        return [*entries, *results], (*replaced, *merged)

    def _summary(self, ended_at: float | None) -> Status:
        """How far it is; with *ended_at* it is over."""
        tasks = self.tasks
        is_running = self.allowed or self._workers
        now = msgspec.structs.replace(
            self.status,
            state="Suspended" if self.status.suspended else "Running" if is_running else "Pending",
            succeeded=len(tasks.succeeded),
            failed=len(tasks.failed),
            failures=tasks.failures,
            running=len(tasks.running),
        )
        if tasks.verdict is not None and ended_at is not None:
            verdict = tasks.verdict
            now.state, now.reason, now.message = verdict.state, verdict.reason, verdict.message
            now.ended_at, now.running = ended_at, 0
        return now
