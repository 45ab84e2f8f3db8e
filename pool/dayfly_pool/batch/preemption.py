"""Who gives places back, so that somebody else can have them. Pure.

Kueue's fair preemption (https://kueue.sigs.k8s.io/docs/concepts/preemption/#fair-sharing): places
are taken from the queue with the largest share, if (a) the taker's share with them is not over the
other's without them, or, for a job that has nothing yet, (b) it is below the other's as it is.
Besides, in each case, it must be below the other's as it is.

Why nobody takes places from each other in a circle: every queue that gives has a larger share than
the taker will have, so the shares, largest first, become less in the order of a dictionary. In a
queue it is always the lower priority that gives. What is left over and filled up again could undo
the first, so besides a job that has lost places takes none until something else has happened.
"""

from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from typing import Final

from dayfly_pool.batch.asks import Job, Queue
from dayfly_pool.batch.quota import PROMISED

Cuts = list[tuple[Job, int]]
"""Who gives how much, in this order; already given."""

CANDIDATES_MAX: Final = 100_000
"""Lots of places that are looked at, at most, for one job."""


def give_way(job: Job, step: int, running: Iterable[Queue]) -> Cuts:
    """Have others give what *job* lacks for *step* more, of the cohort's queues that run some.

    That is promised to its queue then. If they may not give enough, nothing has changed and the
    answer is empty. Nobody gives what is not needed: they have it back in reverse order.
    """
    queue, request = job.queue, job.request
    mine = queue.share(request, step)
    lower = _lower(job)
    others = [q for q in running if q is not queue and q.share() > mine]
    if queue.spec.preemption.reclaim_within_cohort == "never":
        others = []
    if not lower and not others:
        return []
    queue.move(request, step, PROMISED)
    cuts: Cuts = []
    rules = (False, True) if not job.level else (False,)
    is_enough = any(_take(job, others, mine, may_swing, cuts) for may_swing in rules)
    if is_enough or _take_lower(job, lower, cuts):
        _return_surplus(cuts)
        return cuts
    for victim, cut in reversed(cuts):
        _cut(victim, -cut)
    queue.move(request, -step, PROMISED)
    return []


def fit_in(queues: Iterable[Queue]) -> Cuts:
    """Have what is promised fit into quotas that have become smaller.

    Those with the largest share of what is short give first.
    """
    cuts: Cuts = []
    running = [queue for queue in queues if queue.running]
    for queue in running:
        cohort = queue.cohort
        for r in list(queue.used[PROMISED]):
            while queue.used[PROMISED][r] > queue.limit.get(r, queue.used[PROMISED][r]):
                _give(queue, r, cuts)
            while cohort.used[PROMISED].get(r, 0) > cohort.quota.get(r, 0):
                _give(_richest(running, queue, r), r, cuts)
    _return_surplus(cuts)
    return cuts


def _richest(running: list[Queue], like: Queue, r: str) -> Queue:
    members = (q for q in running if q.cohort is like.cohort)
    return max(
        (q for q in members if q.used[PROMISED].get(r, 0) > q.kept.get(r, 0)),
        key=lambda q: (
            q.used[PROMISED][r] > q.nominal.get(r, 0),
            q.share(),
            q.used[PROMISED][r],
            q.name,
        ),
    )


def _give(queue: Queue, r: str, cuts: Cuts) -> None:
    victim = next(entry[3] for entry in queue.running if r in entry[3].request and entry[3].level)
    cut = _unit(victim)
    _cut(victim, cut)
    cuts.append((victim, cut))


def _unit(victim: Job) -> int:
    """The fewest places that it can give: a gang at its fewest gives all of them."""
    return 1 if victim.level > victim.need else victim.level


def _cut(victim: Job, number: int) -> None:
    victim.level -= number
    victim.queue.move(victim.request, -number, PROMISED)


def _lower(job: Job) -> list[Job]:
    queue = job.queue
    running = queue.running
    if queue.spec.preemption.within_queue == "never":
        return []
    if not running or running[0][0] >= job.priority:
        return []
    return [entry[3] for entry in running if entry[0] < job.priority]


def _take(job: Job, others: list[Queue], mine: float, may_swing: bool, cuts: Cuts) -> bool:
    """Take from richer queues what is short in the cohort; whether it is enough."""
    only_lower = job.queue.spec.preemption.reclaim_within_cohort == "lowerPriority"
    heap = [(-q.share(), q.name, q, 0) for q in others]
    heapify(heap)
    for _ in range(CANDIDATES_MAX):
        of_queue, of_cohort = job.queue.over(job.request)
        if not of_queue and not of_cohort:
            return True
        if not heap or not of_cohort:
            return False
        share, name, queue, index = heappop(heap)
        if -share <= mine or index >= len(queue.running):
            continue
        victim = queue.running[index][3]
        index += 1
        is_open = victim.level > 0 and (not victim.is_due or mine == 0)
        is_open = is_open and not (only_lower and victim.priority >= job.priority)
        if is_open and any(r in victim.request for r in of_cohort):
            cut = _lot(victim, job, mine, -heap[0][0] if heap else 0.0)
            left = queue.share(victim.request, -cut)
            if may_swing or mine <= left:
                _cut(victim, cut)
                cuts.append((victim, cut))
                share = -left
                index -= victim.level > 0
        heappush(heap, (share, name, queue, index))
    return False


def _lot(victim: Job, job: Job, mine: float, next_share: float) -> int:
    """How many places to take at once: all that leave its queue the richest, and richer."""
    cut = _unit(victim)
    most = min(victim.level - victim.need, _short(victim, job))
    least = max(mine, next_share)
    queue, request = victim.queue, victim.request
    while cut < most:
        middle = (cut + most + 1) // 2
        if queue.share(request, -middle) > least:
            cut = middle
        else:
            most = middle - 1
    return cut


def _short(victim: Job, job: Job) -> int:
    """How many places of *victim* would be enough for *job*."""
    queue = job.queue
    of_queue, of_cohort = queue.over(job.request)
    cohort, limit = queue.cohort, queue.limit
    short = {r: cohort.used[PROMISED][r] - cohort.quota.get(r, 0) for r in of_cohort}
    for r in of_queue if victim.queue is queue else ():
        short[r] = max(short.get(r, 0), queue.used[PROMISED][r] - limit[r])
    request = victim.request
    return max((-(-n // request[r]) for r, n in short.items() if r in request), default=0)


def _take_lower(job: Job, lower: list[Job], cuts: Cuts) -> bool:
    """Take the rest from those of lower priority in its own queue; whether it is enough."""
    for victim in lower:
        if not any(job.queue.over(job.request)):
            return True
        while victim.level and (short := _short(victim, job)):
            cut = max(_unit(victim), min(victim.level - victim.need, short))
            _cut(victim, cut)
            cuts.append((victim, cut))
    return not any(job.queue.over(job.request))


def _return_surplus(cuts: Cuts) -> None:
    """Give back, last first, what turned out not to be needed."""
    for index in range(len(cuts) - 1, -1, -1):
        victim, cut = cuts[index]
        back = victim.queue.room(victim.request, cut, PROMISED)
        if back and victim.level + back >= victim.need:
            _cut(victim, -back)
            cuts[index] = (victim, cut - back)
    cuts[:] = [(victim, cut) for victim, cut in cuts if cut]
