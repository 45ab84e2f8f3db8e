"""Which jobs of which queues may run how many tasks at once. Pure: no clock, no I/O.

Facts in, commands out, as in `state`. Each fact is answered in two steps. First it is decided how
many places every job is *promised*, as if whoever has to give places had done so already:

1. Of all queues the one with the smallest share (with what it asks for) goes first; so those that
   stay within their quota go before all that borrow. Within a queue see `asks`.
2. What fits is promised. For what does not fit, others may have to give (see `preemption`).
3. A job that has nothing yet, the first of its queue, is passed over by others `passed_max` times.
   Then it is due: of what it lacks nobody is promised any more, except within a quota, until it
   fits; and having it, it gives none of it to other queues that borrow. In a cohort one is due at
   a time, the one that has waited longest.

Then promises are kept, out of what is really free: what a job still runs counts until it is
released, and what must be given and was not after `grace_s` is evicted. A gang has all that it is
promised at once. Because promises never add up to more than there is, and nobody holds anything
while waiting for more, there is no deadlock; because of 3. nobody starves.
"""

from collections import OrderedDict
from heapq import heappop, heappush
from typing import Any, Final

from msgspec import Struct

from dayfly_pool.batch.asks import (
    LOOK_MAX,
    Ask,
    Command,
    Evict,
    Grant,
    Job,
    Line,
    Queue,
    Shrink,
    check_count,
    check_priority,
)
from dayfly_pool.batch.preemption import Cuts, fit_in, give_way
from dayfly_pool.batch.quota import HELD, PROMISED, Amounts, Cohort, QueueSpec, Quotas
from dayfly_pool.errors import BadInput

__all__ = ["Admission", "Ask", "Command", "Evict", "Grant", "QueueSpec", "QueueUse", "Shrink"]

PASSED_MAX: Final = 64
GRACE_S: Final = 30.0
HALF_LIFE_S: Final = 3600.0
SAMPLE_S: Final = 10.0
"""What is admitted is charged at once for so long, until it shows in what is used."""

USAGE_MIN: Final = 1e-6
"""What has decayed to less of the machine is forgotten."""

PASSES_MAX: Final = 1000
"""Rounds of giving and taking that one fact may cause."""

FITS: Final = 1
GAVE: Final = 2


class QueueUse(Struct, frozen=True):
    """How a queue stands."""

    name: str
    cohort: str
    share: float
    quota: Amounts
    promised: Amounts
    held: Amounts
    running: int
    waiting: int
    usage: dict[str, float]
    """By owner, the decayed part of the machine."""


class Admission:
    """Decides for all queues of one pool."""

    def __init__(
        self,
        total: Amounts,
        *,
        passed_max: int = PASSED_MAX,
        grace_s: float = GRACE_S,
        half_life_s: float = HALF_LIFE_S,
    ) -> None:
        self._quotas = Quotas(total)
        self._quotas.reckon()
        self._passed_max, self._grace_s, self._half_life_s = passed_max, grace_s, half_life_s
        self._held: Amounts = {}
        self._queues: dict[str, Queue] = {}
        self._jobs: dict[str, Job] = {}
        self._running: dict[str, dict[str, Queue]] = {}
        """By cohort: the queues that are promised something."""

        self._wanting: dict[str, dict[str, Queue]] = {}
        """By cohort: the queues that want more."""

        self._heads: dict[str, OrderedDict[Job, int]] = {}
        """By cohort: the first job of each queue that has nothing, since which raise."""

        self._raises: dict[str, int] = {}
        self._tops: dict[str, tuple[int, float]] = {}
        self._owed: OrderedDict[Job, None] = OrderedDict()
        self._draining: OrderedDict[Job, None] = OrderedDict()
        self._touched: dict[Job, int] = {}
        """Whose promise this fact has changed, and what it was before."""

        self._refused: set[Queue] = set()
        """For whom nobody would give, so that it need not be looked for again and again."""

        self._numbers = self._arrivals = self._epoch = 0
        self._entry = 1 - 0.5 ** (SAMPLE_S / half_life_s)
        self._sampled_at: float | None = None

    def __repr__(self) -> str:
        running = sum(1 for job in self._jobs.values() if job.granted)
        held = ", ".join(
            f"{r} {self._held.get(r, 0)}/{amount}" for r, amount in self._quotas.available.items()
        )
        return f"<Admission [{running} running, {len(self._jobs) - running} waiting | {held}]>"

    # ---- facts ----------------------------------------------------------------------------------

    def set_total(self, total: Amounts, now: float) -> list[Command]:
        """The machine has so much."""
        return self._reckoned(total, self._quotas.reserved, now)

    def set_reserved(self, reserved: Amounts, now: float) -> list[Command]:
        """So much of it others need now, who come first: it is no more for jobs."""
        return self._reckoned(self._quotas.total, reserved, now)

    def set_queue(self, name: str, spec: QueueSpec | None, now: float) -> list[Command]:
        """The queue has these rules from now on; None: those of which nothing is declared."""
        self._epoch += 1
        queue = self._queue(name)
        before = queue.cohort
        for by_cohort in (self._running, self._wanting):
            by_cohort.get(before.name, {}).pop(name, None)
        self._no_head(queue)
        queue.declare(spec or QueueSpec())
        queue.cohort = self._quotas.cohort(queue.spec.cohort)
        if queue.running:
            self._running.setdefault(queue.cohort.name, {})[name] = queue
        if not queue.is_idle():
            self._wanting.setdefault(queue.cohort.name, {})[name] = queue
        self._quotas.reckon()
        for by_name in (self._running, self._wanting, self._heads, self._raises, self._tops):
            for gone in by_name.keys() - self._quotas.cohorts.keys():
                del by_name[gone]
        commands = self._refit(now)
        self._forget(queue)
        return commands

    def submit(self, ask: Ask, now: float) -> list[Command]:
        """There is another job. BadInput if it cannot be meant, or is there already."""
        ask.check()
        if ask.id in self._jobs:
            raise BadInput(f"job {ask.id} was submitted before: give it another id")
        self._epoch += 1
        self._numbers += 1
        queue = self._queue(ask.queue)
        job = Job(
            id=ask.id,
            queue=queue,
            request=dict(ask.request),
            count=ask.count,
            min_count=ask.min_count,
            priority=ask.priority,
            submitted_at=ask.submitted_at,
            owner=ask.owner,
            number=self._numbers,
            shape=tuple(sorted(ask.request.items())),
        )
        self._jobs[job.id] = job
        queue.jobs += 1
        self._line_up(job)
        self._set_head(queue)
        return self._settle(queue.cohort, [queue], now)

    def change(
        self, id_: str, now: float, *, count: int | None = None, priority: int | None = None
    ) -> list[Command]:
        """It wants another number of places (0: none, for now), or has another priority.

        Of a gang that runs fewer may be left than its fewest.
        """
        job = self._jobs.get(id_)
        if job is None:
            return []
        check_count(id_, job.count if count is None else count)
        check_priority(id_, job.priority if priority is None else priority)
        self._epoch += 1
        if priority is not None and priority != job.priority:
            job.priority = priority
            job.queue.leave(job)
        if count is not None:
            job.count = count
            if job.level > count:
                self._touched[job], job.taken_by = job.level, "it wants no more"
                job.queue.move(job.request, count - job.level, PROMISED)
                job.level = count
        self._line_up(job)
        self._set_head(job.queue)
        return self._settle(job.queue.cohort, self._wanting_in(job.queue.cohort), now)

    def finished(self, id_: str, now: float) -> list[Command]:
        """The job has ended, all of it, and its places are free."""
        job = self._jobs.pop(id_, None)
        if job is None:
            return []
        self._epoch += 1
        queue = job.queue
        queue.jobs -= 1
        queue.move(job.request, -job.level, PROMISED)
        self._hold(job, -job.places)
        job.level = job.granted = job.draining = job.doomed = job.count = 0
        self._owed.pop(job, None)
        self._draining.pop(job, None)
        self._line_up(job)
        self._set_head(queue)
        commands = self._settle(queue.cohort, self._wanting_in(queue.cohort), now)
        self._forget(queue)
        return commands

    def released(self, id_: str, number: int, now: float) -> list[Command]:
        """So many of its tasks have ended whose places were wanted back; they are free."""
        job = self._jobs.get(id_)
        if job is None or number <= 0:
            return []
        number = min(number, job.doomed + job.draining)
        self._hold(job, -number)
        doomed = min(number, job.doomed)
        job.doomed -= doomed
        job.draining -= number - doomed
        if not job.draining:
            self._draining.pop(job, None)
        return self._keep_promises()

    def tick(self, now: float) -> list[Command]:
        """Time has passed: what was used before counts less, and who was to give in time must."""
        self._sample(now)
        commands: list[Command] = []
        while self._draining:
            job = next(iter(self._draining))
            if now - job.draining_since < self._grace_s:
                break
            del self._draining[job]
            commands.append(Evict(job.id, job.draining, job.taken_by))
            job.doomed, job.draining = job.doomed + job.draining, 0
        return commands

    # ---- what is decided ------------------------------------------------------------------------

    def _reckoned(self, total: Amounts, reserved: Amounts, now: float) -> list[Command]:
        quotas = self._quotas
        if total == quotas.total and reserved == quotas.reserved:
            return []
        self._epoch += 1
        quotas.total, quotas.reserved = dict(total), dict(reserved)
        quotas.reckon()
        return self._refit(now)

    def _refit(self, now: float) -> list[Command]:
        """All quotas may have changed."""
        running = [queue for queues in self._running.values() for queue in queues.values()]
        self._take(fit_in(running), "there is less for jobs than before")
        commands: list[Command] = []
        for cohort in list(self._quotas.cohorts.values()):
            wanting = self._wanting_in(cohort)
            for queue in wanting:
                self._set_head(queue)
            commands += self._settle(cohort, wanting, now)
        return commands

    def _settle(self, cohort: Cohort, queues: list[Queue], now: float) -> list[Command]:
        """Promise what can be promised after a fact that concerns these queues of *cohort*."""
        for _ in range(PASSES_MAX):
            if not self._fill(cohort, queues):
                break
            queues = self._wanting_in(cohort)
        commands: list[Command] = []
        for job, before in self._touched.items():
            if job.level > before:
                name = job.queue.cohort.name
                self._raises[name] = self._raises.get(name, 0) + 1
            if job.level < job.granted:
                commands.append(self._cut_down(job, now))
            elif job.level > job.granted:
                self._owed[job] = None
            self._set_head(job.queue)
        self._touched.clear()
        return commands + self._keep_promises()

    def _fill(self, cohort: Cohort, queues: list[Queue]) -> bool:
        """Promise in order of shares; whether somebody had to give, so that others may fit now."""
        self._refused.clear()
        due = self._due(cohort)
        while due is not None and (how := self._promise(due, None, True)):
            due.is_due = True
            self._set_head(due.queue)
            if how == GAVE:
                return True
            due, queues = self._due(cohort), self._wanting_in(cohort)
        heap: list[tuple[float, int, float, int, Line, set[Line]]] = []
        has_given = False
        for queue in queues:
            self._offer(heap, queue, due, set())
        while heap:
            *_, number, line, failed = heappop(heap)
            if line.live and line.first.number == number:  # who gave may want something else now
                how = self._promise(line.first, due, not heap)
                has_given = has_given or how == GAVE
                if not how:
                    failed.add(line)
            self._offer(heap, line.queue, due, failed)
        return has_given

    def _offer(self, heap: list[Any], queue: Queue, due: Job | None, failed: set[Line]) -> None:
        """Let the queue's first that may have what it wants take part."""
        for line in queue.lines():
            if not queue.could_hold(line.request, line.step):
                continue
            job = line.first
            if line not in failed and self._may_have(job, due):
                share = queue.share(line.request, line.step)
                rank = (share, -job.priority, job.submitted_at, job.number)
                heappush(heap, (*rank, line, failed))
                return
            failed.add(line)
            is_strict = queue.spec.strategy == "strictFIFO" and line.is_waiting
            if is_strict or len(failed) > LOOK_MAX:
                return

    def _may_have(self, job: Job, due: Job | None) -> bool:
        """Whether it fits, or may be worth looking for somebody who gives."""
        queue, request, step = job.queue, job.request, job.wants
        if due is not None and not self._leaves_room(due, job, step):
            return False
        if queue.room(request, step, PROMISED) == step:
            return True
        return self._may_take(job, step)

    def _promise(self, job: Job, due: Job | None, is_alone: bool) -> int:
        """Promise *job* what it wants next: whether it FITS, others GAVE, or 0 for neither."""
        if not self._may_have(job, due):
            return 0
        queue, request, step = job.queue, job.request, job.wants
        # If nobody else asks, as many as it wants; but beside one that is due, one by one.
        most = job.count - job.level if is_alone and job.level and due is None else step
        number, how = queue.room(request, most, PROMISED), FITS
        if number >= step:
            queue.move(request, number, PROMISED)
        else:
            number, how = self._have_given(job, step, most), GAVE
            if not number:
                self._refused.add(queue)
                return 0
        self._touched.setdefault(job, job.level)
        job.level += number
        queue.charge(job.owner, self._entry * self._quotas.dominant(request) * number)
        self._line_up(job)
        return how

    def _have_given(self, job: Job, step: int, most: int) -> int:
        """How many places others have given to *job*: *most*, or a half of it, and so on."""
        queue = job.queue
        running = self._running.get(queue.cohort.name, {}).values()
        could = min(queue.most(r) // amount for r, amount in job.request.items())
        number = max(step, min(most, could))
        while not (cuts := give_way(job, number, running)):
            if number == step:
                return 0
            number = max(step, number // 2)
        self._take(cuts, f"its places went to job {job.id} of queue {queue.name}")
        return number

    def _leaves_room(self, due: Job, job: Job, step: int) -> bool:
        """Whether *due* can still have what it waits for, or *job* stays within its quota."""
        queue, request = job.queue, job.request
        if queue is not due.queue and not queue.is_borrowing(request, step):
            return True
        due.queue.move(due.request, due.need, PROMISED)
        leaves = queue.room(request, step, PROMISED) == step
        due.queue.move(due.request, -due.need, PROMISED)
        return leaves

    def _may_take(self, job: Job, step: int) -> bool:
        """Whether it may be worth looking for somebody who gives."""
        queue = job.queue
        if job.victim_in == self._epoch or queue in self._refused:
            return False
        if queue.running and queue.running[0][0] < job.priority:
            return True
        cohort = queue.cohort
        version, top = self._tops.get(cohort.name, (-1, 0.0))
        if version != cohort.version:
            running = self._running.get(cohort.name, {}).values()
            top = max((q.share() for q in running), default=0.0)
            self._tops[cohort.name] = (cohort.version, top)
        return queue.share(job.request, step) < top

    def _take(self, cuts: Cuts, why: str) -> None:
        """These have given places."""
        before: dict[Job, int] = {}
        for victim, cut in cuts:
            before[victim] = before.get(victim, victim.level) + cut
        for victim, level in before.items():
            self._touched.setdefault(victim, level)
            victim.taken_by, victim.victim_in = why, self._epoch
            victim.is_due = victim.is_due and victim.level > 0
            self._line_up(victim)

    def _due(self, cohort: Cohort) -> Job | None:
        """Who was passed over too often, and longest."""
        heads = self._heads.get(cohort.name)
        if not heads:
            return None
        head, since = next(iter(heads.items()))
        if self._raises.get(cohort.name, 0) - since < self._passed_max:
            return None
        return head

    def _line_up(self, job: Job) -> None:
        """Put it where it belongs by what it has and wants."""
        queue, name = job.queue, job.queue.cohort.name
        if job.level and job.place is None:
            self._arrivals += 1
            queue.arrive(job, self._arrivals)
            self._running.setdefault(name, {})[queue.name] = queue
        elif not job.level and job.place is not None:
            queue.leave(job)
            if not queue.running:
                del self._running[name][queue.name]
        line, wants = job.line, job.wants
        if line is not None and job.entry is not None:
            is_same = line.step == wants and line.is_waiting == (not job.level)
            if is_same and job.entry[0] == -job.priority:
                return
            queue.drop(job)
        if wants:
            queue.put(job)
            self._wanting.setdefault(name, {})[queue.name] = queue
        elif queue.is_idle():
            self._wanting.get(name, {}).pop(queue.name, None)

    def _set_head(self, queue: Queue) -> None:
        """Who waits first in it may be another."""
        head = queue.first_waiting()
        if head is queue.head:
            return
        heads = self._heads.setdefault(queue.cohort.name, OrderedDict())
        self._no_head(queue)
        queue.head = head
        if head is not None:
            heads[head] = self._raises.get(queue.cohort.name, 0)

    def _no_head(self, queue: Queue) -> None:
        if queue.head is not None:
            self._heads[queue.cohort.name].pop(queue.head, None)
            queue.head = None

    def _wanting_in(self, cohort: Cohort) -> list[Queue]:
        return list(self._wanting.get(cohort.name, {}).values())

    # ---- what is done about it ------------------------------------------------------------------

    def _cut_down(self, job: Job, now: float) -> Command:
        """Fewer are promised than run."""
        drop, job.granted = job.granted - job.level, job.level
        self._owed.pop(job, None)
        if job.is_gang and not job.level:  # what is left of a gang can do nothing
            drop += job.draining
            self._draining.pop(job, None)
            job.doomed, job.draining = job.doomed + drop, 0
            return Evict(job.id, drop, job.taken_by)
        job.draining += drop
        if job not in self._draining:
            job.draining_since = now
            self._draining[job] = None
        return Shrink(job.id, job.level)

    def _keep_promises(self) -> list[Command]:
        """Grant what is promised, as far as it is free; first who was promised first.

        What is free but not enough for one is kept for it.
        """
        commands: list[Command] = []
        ahead: Amounts = {}
        looked = 0
        for job in list(self._owed):
            before = job.granted
            if job.level > before:
                self._grant(job, ahead)
            if job.granted > before:
                commands.append(Grant(job.id, job.granted))
            missing = job.level - job.granted
            if missing <= 0:
                del self._owed[job]
                continue
            for r, amount in job.request.items():
                ahead[r] = ahead.get(r, 0) + amount * missing
            looked += 1
            if looked > LOOK_MAX:
                break
        return commands

    def _grant(self, job: Job, ahead: Amounts) -> None:
        """Let it have of its promise what is free beside what others wait for."""
        if job.is_gang and not job.granted and job.places:
            return  # the rest of its last run is not gone yet
        missing = job.level - job.granted
        back = min(missing, job.draining)  # these need not end, after all
        fresh = job.queue.room(job.request, missing - back, HELD)
        for r, amount in job.request.items():
            free = self._quotas.available.get(r, 0) - self._held.get(r, 0) - ahead.get(r, 0)
            fresh = min(fresh, max(0, free) // amount)
        if job.is_gang and not job.granted and fresh < job.need:
            return
        job.draining -= back
        if not job.draining:
            self._draining.pop(job, None)
        job.granted += back + fresh
        self._hold(job, fresh)

    def _hold(self, job: Job, number: int) -> None:
        """So many more places are really taken."""
        if number:
            job.queue.move(job.request, number, HELD)
            for r, amount in job.request.items():
                self._held[r] = self._held.get(r, 0) + amount * number

    # ---- what was used, and what is left of a queue ---------------------------------------------

    def _sample(self, now: float) -> None:
        """Let what was used decay, and add what is."""
        if self._sampled_at is None:
            self._sampled_at = now
        passed_s = now - self._sampled_at
        if passed_s <= 0:
            return
        self._sampled_at = now
        keeps = 0.5 ** (passed_s / self._half_life_s)
        for queue in list(self._queues.values()):
            usage = {owner: used * keeps for owner, used in queue.usage.items()}
            for *_, job in queue.running:
                part = self._quotas.dominant(job.request) * job.level * (1 - keeps)
                usage[job.owner] = usage.get(job.owner, 0.0) + part
            queue.usage = {owner: used for owner, used in usage.items() if used > USAGE_MIN}
            queue.reorder_all()
            self._forget(queue)

    def _queue(self, name: str) -> Queue:
        """The queue of that name; there is one for every name."""
        if name not in self._queues:
            spec = QueueSpec()
            queue = self._queues[name] = Queue(name, spec, self._quotas.cohort(spec.cohort))
            self._quotas.add(queue)
        return self._queues[name]

    def _forget(self, queue: Queue) -> None:
        """Nothing needs to be known of a queue with no jobs of which nothing is declared."""
        if not queue.jobs and not queue.usage and queue.spec == QueueSpec():
            del self._queues[queue.name]
            self._quotas.remove(queue)

    # ---- for people -----------------------------------------------------------------------------

    def tasks(self, id_: str) -> int:
        """How many tasks the job may run now."""
        job = self._jobs.get(id_)
        return job.granted if job is not None else 0

    def queues(self) -> list[QueueUse]:
        """How all queues stand."""
        return [
            QueueUse(
                name=queue.name,
                cohort=queue.cohort.name,
                share=queue.share(),
                quota=dict(queue.nominal),
                promised={r: used for r, used in queue.used[PROMISED].items() if used},
                held={r: used for r, used in queue.used[HELD].items() if used},
                running=len(queue.running),
                waiting=queue.jobs - len(queue.running),
                usage=dict(queue.usage),
            )
            for queue in self._queues.values()
        ]

    def why(self, id_: str) -> str:
        """What the job waits for, in a sentence that begins with one word for it."""
        job = self._jobs.get(id_)
        if job is None:
            return "unknown: there is no such job in any queue"
        if job.granted >= job.count:
            return f"nothing: it may run {job.granted} at once, as many as it wants"
        return _why(job, self._due(job.queue.cohort), self._quotas)


def _why(job: Job, due: Job | None, quotas: Quotas) -> str:
    """What is in the way of a job that wants more than it has."""
    queue, step = job.queue, job.wants
    if job.level > job.granted:
        what = "all its places at once" if job.is_gang and not job.granted else "its places"
        return f"machine: {what} are promised to it, others are still leaving them"
    asks = ", ".join(f"{amount * step} {r}" for r, amount in job.request.items())
    if job.is_gang and not job.level:
        asks += f", as {step} at once"
    for r, amount in job.request.items():
        if amount * step > quotas.available.get(r, 0):
            there = quotas.available.get(r, 0)
            return f"machine: it needs {asks}; for jobs there are {there} {r} in all"
        if amount * step > queue.most(r):
            return f"quota: it needs {asks}; queue {queue.name} may hold {queue.most(r)} {r}"
    head = queue.head
    if queue.spec.strategy == "strictFIFO" and head not in (None, job) and not job.level:
        return f"order: in queue {queue.name} job {head.id if head else ''} is first"
    for r, amount in job.request.items():
        used, limit = queue.used[PROMISED].get(r, 0), queue.limit.get(r)
        if limit is not None and used + amount * step > limit:
            return f"quota: it needs {asks}; queue {queue.name} has {used} {r} of {limit}"
    if queue.room(job.request, step, PROMISED) < step:
        kind = "gang" if job.is_gang and not job.level else "cohort"
        return f"{kind}: it needs {asks}; the queues of cohort {queue.cohort.name} have the rest"
    if due is not None and due is not job:
        return f"order: what is free is kept for job {due.id}, which was passed over too often"
    return f"order: others of queue {queue.name} go before it"
