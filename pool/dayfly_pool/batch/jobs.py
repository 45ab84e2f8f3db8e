"""Jobs: those that are declared, and those that this server runs."""

import asyncio
import logging
import math
import os
import zlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

import msgspec

from dayfly_pool.batch import again, tasks
from dayfly_pool.batch import job as running
from dayfly_pool.batch.asks import Ask, Command, Evict
from dayfly_pool.batch.indices import IndexSet
from dayfly_pool.batch.job import Asked, Job, Status, Stored, function_of
from dayfly_pool.batch.model import INDICES_MAX, JobManifest
from dayfly_pool.batch.queues import Admission, QueueUse
from dayfly_pool.batch.quota import Amounts, QueueSpec, amounts
from dayfly_pool.config import Config
from dayfly_pool.errors import BadInput, JobNotFound, NameTaken, PlatformError, StoreFailed
from dayfly_pool.ids import names_again, new_id
from dayfly_pool.journal import Journals
from dayfly_pool.models import Function, FunctionId, FunctionSpec
from dayfly_pool.ours import Ours
from dayfly_pool.pool import Pool
from dayfly_pool.store.journals import Journal, JournalId, NewEntry, Wish

log = logging.getLogger("dayfly.jobs")
ITEM_BYTES_MAX: Final = 256 * 1024
CHUNK_BYTES: Final = 256 * 1024
CHUNK_ITEMS: Final = 4096
CHUNKS_AT_ONCE: Final = 8
LOGS_KEPT: Final = 64
"""Jobs that are over, and whose log can still be read."""

JOBS_MAX: Final = 1000
"""Of one server, that are not over."""

SWEEP_S: Final = 10.0
TICK_S: Final = 1.0
TASKS: Final = "tasks"
"""The resource that every task needs one of: a sandbox."""

DEFAULT_QUEUE: Final = "default"
HEADROOM: Final = 0.1
"""Of all sandboxes, those that jobs never have."""

PAGE: Final = 500
RETRIES_MAX: Final = 1000
STOPPED_S_MAX: Final = 5.0
Ready = Callable[[str, set[str], set[str]], Awaitable[None]]
"""Have packages and environments here, for a namespace. Raises `PlatformError`."""

Prepare = Callable[[FunctionId, Stored, FunctionSpec], Function]
"""Have the pool know what a job's tasks are. Raises `PlatformError` when that cannot be now."""


class View(msgspec.Struct, frozen=True):
    """One job, as it is known."""

    journal: Journal
    stored: Stored
    status: Status


class Jobs:
    """The jobs of one server. Use it inside `async with jobs.running():`."""

    def __init__(
        self,
        pool: Pool,
        journals: Journals,
        prepare: Prepare,
        machine: Amounts,
        ready: Ready | None = None,
    ) -> None:
        self._ready = ready
        self._admission = Admission(machine)
        self._pool, self._journals, self._prepare = pool, journals, prepare
        self._clock = journals.clock
        self._processors = os.cpu_count() or 1
        self._live: dict[JournalId, Job] = {}
        self._is_held = False
        self._tasks_ended: Counter[str] = Counter()
        """Of jobs that do not run any more."""

        self.ended: Counter[str] = Counter()
        """Jobs that have ended here, by how."""

        self._logs: deque[FunctionId] = deque()
        self._ours = Ours(journals, "job", JOBS_MAX, self._go_on, self._heard, self._lost)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Jobs"]:
        """Run jobs while the block runs. Those that are not over then go on later."""
        async with asyncio.TaskGroup() as group:
            keeping = [
                group.create_task(self._sweep(), name="jobs-sweep"),
                group.create_task(self._tick(), name="jobs-tick"),
            ]
            try:
                async with self._ours.running():
                    yield self
            finally:
                self.hold()
                for task in keeping:
                    task.cancel()

    def hold(self) -> None:
        """Begin nothing more."""
        self._is_held = True
        self._journals.hold()
        for job in self._live.values():
            job.hold()

    # ---- declarations -------------------------------------------------------------------------

    async def create(
        self,
        manifest: JobManifest,
        function: FunctionSpec,
        items: AsyncIterator[bytes] | None = None,
    ) -> View:
        """Keep a job; it is on the disk, and will be run, when this returns.

        *items* are lines of JSON, one for each task, besides none in the spec. Raises `BadInput`,
        `NameTaken`, `StoreFailed`.
        A job that is there and was declared alike is that one, if it has no items.
        """
        spec, metadata = manifest.spec, manifest.metadata
        inline = spec.items
        if items is not None and (inline or spec.size or spec.indices):
            raise BadInput("items were sent: leave size, indices and items out of the spec")
        spec = msgspec.structs.replace(spec, items=None, source=None)
        has_items = items is not None or inline is not None
        stored = Stored(metadata=metadata, spec=spec, function=function, has_items=has_items)
        if inline is not None and not inline:
            raise BadInput("spec.items is empty: a job has at least one task")
        status = _status(stored, len(inline or (0,)))
        journal = self._journal(stored, status, is_draft=items is not None)
        entries = _chunked([msgspec.json.encode(item) for item in inline or ()], 0)
        try:
            journal = await self._journals.create(journal, entries)
        except NameTaken:
            there = await self._journals.store.find("job", journal.namespace, journal.name)
            if there is None or there.is_draft or has_items:
                raise
            if (view := self._view(there)).stored != stored:
                raise
            return view
        if items is not None:
            journal, status = await self._fill(journal, stored, items)
        return View(journal, stored, status)

    async def _fill(
        self, journal: Journal, stored: Stored, items: AsyncIterator[bytes]
    ) -> tuple[Journal, Status]:
        """Keep what comes, then let the job run; nothing of it is left when that fails."""
        async with self._undone(journal):
            total = 0
            async for lines in _checked(items):
                await self._journals.append(journal.id, _chunked(lines, total))
                total += len(lines)
            if not total:
                raise BadInput("no items came: a job has at least one task")
            status = _status(stored, total)
            await self._journals.append(journal.id, head=msgspec.json.encode(status))
            return await self._publish(journal), status

    async def retry(self, view: View, function: FunctionSpec, name: str = "") -> View:
        """Have another job do all indices that have not succeeded in this, with their items.

        Without a *name* it has this one's and a number. Raises `BadInput`, `NameTaken`,
        `StoreFailed`.
        """
        own = view.journal.name
        if view.status.state not in again.RETRIABLE:
            why = "nothing is left" if view.status.state == "Complete" else "it is not over"
            raise BadInput(f"job {own!r} is {view.status.state}: {why}, so nothing is tried again")
        succeeded = (await self.details(view)).succeeded
        left = running.indices_of(view.stored.spec, view.status.total).without(succeeded)
        spec = await asyncio.to_thread(again.spec_of, view.stored.spec, left, succeeded)
        for each in [name] if name else names_again(own, RETRIES_MAX):
            metadata = msgspec.structs.replace(view.stored.metadata, name=each)
            parts = {"metadata": metadata, "spec": spec, "function": function}
            stored = msgspec.structs.replace(view.stored, **parts)
            try:
                return await self._begin_again(view.journal.id, stored, left)
            except NameTaken:
                if name:
                    raise
        raise BadInput(f"job {own!r} was retried {RETRIES_MAX} times: delete some of these jobs")

    async def _begin_again(self, of: JournalId, stored: Stored, left: IndexSet) -> View:
        """Keep the job with those items of another that are *left*."""
        status = _status(stored, len(left))
        journal = await self._journals.create(
            self._journal(stored, status, is_draft=stored.has_items), []
        )
        if stored.has_items:
            async with self._undone(journal):
                async for entries in self._items(of, left):
                    await self._journals.append(journal.id, entries)
                journal = await self._publish(journal)
        return View(journal, stored, status)

    async def _items(self, of: JournalId, left: IndexSet) -> AsyncIterator[list[NewEntry]]:
        """The entries in which a job's items are that are *left*."""
        after, store = 0, self._journals.store
        while found := await store.entries(of, part=running.ITEMS, after=after, limit=8):
            after = found[-1].number
            for entry in found:
                if entry.damage:
                    what = f"items {entry.low} to {entry.high}"
                    raise StoreFailed(f"{what}, entry {entry.number}: {entry.damage}")
            kept = [e for e in found if any(i in left for i in range(e.low, e.high + 1))]
            yield [NewEntry(running.ITEMS, e.low, e.high, e.body) for e in kept]

    def _journal(self, stored: Stored, status: Status, *, is_draft: bool) -> Journal:
        """A new one."""
        return Journal(
            id=JournalId(new_id()),
            kind="job",
            namespace=stored.metadata.namespace,
            name=stored.metadata.name,
            created_at=self._clock.now(),
            head=msgspec.json.encode(status),
            spec=msgspec.json.encode(stored),
            is_draft=is_draft,
        )

    @asynccontextmanager
    async def _undone(self, journal: Journal) -> AsyncIterator[None]:
        """Nothing of *journal* is left when the block fails."""
        try:
            yield
        except BaseException:
            with suppress(PlatformError):
                await asyncio.shield(self._journals.delete(journal.id))
            raise

    async def _publish(self, journal: Journal) -> Journal:
        """Let it run. Raises `JobNotFound` when somebody has deleted it."""
        published = await self._journals.publish(journal.id)
        if published is None:
            raise JobNotFound(f"job {journal.name!r} was deleted")
        return published

    async def get(self, namespace: str, name: str) -> View:
        """One job. Raises `JobNotFound`."""
        journal = await self._journals.store.find("job", namespace, name)
        if journal is None or journal.is_draft:
            raise JobNotFound(f"no job {namespace}/{name}")
        return self._view(journal)

    async def page(
        self, namespace: str | None, limit: int, before: JournalId | None
    ) -> Sequence[tuple[Journal, Status]]:
        """The newest first."""
        found = await self._journals.store.page("job", namespace, limit, before)
        return [(journal, self._status(journal)) for journal in found]

    def _view(self, journal: Journal) -> View:
        stored = msgspec.json.decode(journal.spec, type=Stored)
        return View(journal, stored, self._status(journal))

    def _status(self, journal: Journal) -> Status:
        if not journal.is_over and (job := self._live.get(journal.id)) is not None:
            return job.look()
        return msgspec.json.decode(journal.head, type=Status)

    async def ask(self, namespace: str, name: str, asked: Asked) -> View:
        """Want something of a job; whoever runs it hears of it. Raises `JobNotFound`, `BadInput`.

        Returns it as it is when that has been heard, or after a while.
        """
        view = await self.get(namespace, name)
        if view.journal.is_over:
            raise BadInput(f"job {name!r} is over: {view.status.state}")
        number = await self._journals.wish(view.journal.id, msgspec.json.encode(asked))
        if (job := self._live.get(view.journal.id)) is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(STOPPED_S_MAX):
                    await job.settled(number)
        return await self.get(namespace, name)

    async def delete(self, namespace: str, name: str) -> None:
        """Forget a job; one that is not over is cancelled first. Raises `JobNotFound`."""
        view = await self.get(namespace, name)
        if not view.journal.is_over:
            view = await self.ask(namespace, name, running.Cancel())
        if not await self._journals.delete(view.journal.id):
            raise BadInput(f"job {name!r} is being cancelled: delete it when that is done")
        self._pool.logs.forget(function_of(view.journal))

    async def packages(self) -> set[str]:
        """The digests of those that jobs need which are not over."""
        found: set[str] = set()
        before: JournalId | None = None
        while page := await self._journals.store.page("job", None, PAGE, before, is_over=False):
            before = page[-1].id
            for journal in page:
                whole = await self._journals.store.get(journal.id)
                if whole is not None:
                    stored = msgspec.json.decode(whole.spec, type=Stored)
                    found.add(stored.function.package)
        return found

    async def results(
        self, namespace: str, name: str, index: int | None, after: int = 0
    ) -> tuple[list[tuple[int, bytes]], int]:
        """((index, JSON) of some results, after which entry to go on; 0 when there are no more).

        With *index*, that one's alone. A task that returned nothing has none.
        """
        view = await self.get(namespace, name)
        while entries := await self._journals.store.entries(
            view.journal.id, part=running.RESULTS, after=after, limit=8, covering=index
        ):
            after = entries[-1].number
            found = await asyncio.to_thread(running.results_in, entries, index)
            if index is None:
                return found, after
            if found:
                return found, 0
        return [], 0

    async def details(self, view: View) -> tasks.Tasks:
        """Which of its indices have succeeded and failed, and how."""
        if (job := self._live.get(view.journal.id)) is not None:
            return job.tasks
        indices = running.indices_of(view.stored.spec, view.status.total)
        found = tasks.Tasks(view.stored.spec, indices, view.status.most)
        entries = await running.log_of(self._journals, view.journal.id)
        running.replayed(found, entries, self._clock.now())
        return found

    # ---- for the journals ---------------------------------------------------------------------

    def _lost(self, id_: JournalId) -> None:
        """Another server has it, and begins what ran here again."""
        if (job := self._live.get(id_)) is not None:
            job.stop_running("another server has the job")

    def _heard(self, id_: JournalId, wish: Wish) -> bool:
        if (job := self._live.get(id_)) is None:
            return False
        job.hear(wish)
        return True

    async def _go_on(self, journal: Journal) -> None:
        job = Job(
            journal, self._pool, self._journals, self._clock, self._processors, self._job_changed
        )
        if self._ready is not None:  # another server may have made it
            spec = job.function
            await self._ready(journal.namespace, {spec.package}, {spec.environment})
        function = self._prepare(job.function_id, job.stored, job.function)
        self._live[journal.id] = job
        self._carry_out(self._admission.submit(_ask(journal, job.stored), self._clock.now()))
        for wish in self._ours.wishes(journal.id):
            job.hear(wish)
        if self._is_held:
            job.hold()
        try:
            await job.run()
        finally:
            del self._live[journal.id]
            self._tasks_ended += job.ended
            if job.status.ended_at:
                self.ended[job.status.state] += 1
            self._carry_out(self._admission.finished(journal.id, self._clock.now()))
            self._pool.remove(function.id, keep_logs=True)
            self._keep_logs(function.id)

    # ---- queues -------------------------------------------------------------------------------

    def set_queue(self, name: str, spec: QueueSpec | None) -> None:
        """The queue *name* has these rules from now on; None: those of one that nobody declared."""
        self._carry_out(self._admission.set_queue(name, spec, self._clock.now()))

    def queues(self) -> list[QueueUse]:
        """How the queues stand in which there are jobs, or of which something is declared."""
        return self._admission.queues()

    def tasks_ended(self) -> Counter[str]:
        """Tasks that have ended here, by how."""
        return sum((job.ended for job in self._live.values()), self._tasks_ended)

    def waits_for(self, id_: JournalId) -> str:
        """Why a job does not run as much as it wants; empty when it does."""
        job = self._live.get(id_)
        if job is None or job.allowed >= job.wanted:
            return ""
        return self._admission.why(id_)

    def _job_changed(self, job: Job) -> None:
        """It wants more or fewer places than before, or has given some back."""
        now = self._clock.now()
        if free := job.give_back():
            self._carry_out(self._admission.released(job.id, free, now))
        self._carry_out(self._admission.change(job.id, now, count=job.wanted))

    def _carry_out(self, commands: Sequence[Command]) -> None:
        for command in commands:
            job = self._live.get(JournalId(command.id))
            if job is None:
                continue
            job.allow(self._admission.tasks(job.id))
            if isinstance(command, Evict):
                job.evict(command.tasks, command.why)
            if free := job.give_back():
                self._carry_out(self._admission.released(job.id, free, self._clock.now()))

    async def _tick(self) -> None:
        """Tell the queues what time it is, and what others need, who come first."""
        while True:
            await asyncio.sleep(TICK_S)
            now, busy = self._clock.now(), self._pool.state.interactive
            self._carry_out(self._admission.set_reserved({TASKS: busy}, now))
            self._carry_out(self._admission.tick(now))

    def _keep_logs(self, id_: FunctionId) -> None:
        self._logs.append(id_)
        if len(self._logs) > LOGS_KEPT:
            self._pool.logs.forget(self._logs.popleft())

    async def _sweep(self) -> None:
        """Forget jobs that ended long enough ago."""
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                before: JournalId | None = None
                while page := await self._journals.store.page(
                    "job", None, PAGE, before, is_over=True
                ):
                    before = page[-1].id
                    for journal in page:
                        await self._forget_old(journal)
            except PlatformError as error:
                log.warning("old jobs are still there", extra={"why": str(error)})
            except Exception:
                log.exception("old jobs are still there, for a defect of ours")

    async def _forget_old(self, journal: Journal) -> None:
        status = msgspec.json.decode(journal.head, type=Status)
        if self._clock.now() >= journal.ended_at + status.ttl_s:
            await self._journals.delete(journal.id)


def _ask(journal: Journal, stored: Stored) -> Ask:
    """What a job wants of its queue. How many at once it tells when it has been read."""
    spec = stored.spec
    needs = spec.resources
    wanted = {"cpu": needs.cpu, "memoryMb": needs.memory_mb, "gpu": needs.gpu}
    return Ask(
        id=journal.id,
        queue=f"{journal.namespace}/{spec.queue or DEFAULT_QUEUE}",
        request={TASKS: 1} | {name: n for name, n in amounts(wanted).items() if n},
        count=spec.min_count,
        min_count=spec.min_count,
        priority=spec.priority,
        submitted_at=journal.created_at,
        owner=journal.namespace,
    )


def machine(config: Config) -> Amounts:
    """What there is for jobs: some sandboxes are always left to others."""
    tasks_max = max(1, config.sandboxes_max - math.ceil(config.sandboxes_max * HEADROOM))
    memory_mb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    there = {"cpu": float(os.cpu_count() or 1), "memoryMb": float(memory_mb)}
    return {TASKS: tasks_max} | amounts(there | config.resources)


def _status(stored: Stored, total: int) -> Status:
    """How a job begins. Raises `BadInput` for one that cannot be."""
    spec = stored.spec
    indices = running.indices_of(spec, total)
    tasks.check(spec, indices)
    most = max(high for _, high in indices.intervals())
    return Status(
        state="Suspended" if spec.suspend else "Pending",
        suspended=spec.suspend,
        total=len(indices),
        most=most,
        ttl_s=spec.ttl_seconds_after_finished,
    )


def _chunked(lines: Sequence[bytes], first: int) -> list[NewEntry]:
    """Entries with the items *lines*, of which the first has the index *first*."""
    entries: list[NewEntry] = []
    at = 0
    while at < len(lines):
        end, size = at, 0
        while end < len(lines) and end - at < CHUNK_ITEMS and size < CHUNK_BYTES:
            size += len(lines[end])
            end += 1
        body = zlib.compress(b"\n".join(lines[at:end]), 1)
        entries.append(NewEntry(running.ITEMS, first + at, first + end - 1, body))
        at = end
    return entries


async def _checked(items: AsyncIterator[bytes]) -> AsyncIterator[list[bytes]]:
    """Lines of JSON, many at once; empty ones are left out. Raises `BadInput`."""
    lines: list[bytes] = []
    size = number = 0
    async for line in items:
        text = line.strip()
        number += 1
        if not text:
            continue
        if len(text) > ITEM_BYTES_MAX:
            raise BadInput(f"item in line {number}: over {ITEM_BYTES_MAX} bytes")
        try:
            msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadInput(f"item in line {number}: not valid JSON: {error}") from None
        if number > INDICES_MAX:
            raise BadInput(f"over {INDICES_MAX} items")
        lines.append(text)
        size += len(text)
        if size >= CHUNK_BYTES * CHUNKS_AT_ONCE or len(lines) >= CHUNK_ITEMS * CHUNKS_AT_ONCE:
            yield lines
            lines, size = [], 0
    if lines:
        yield lines
