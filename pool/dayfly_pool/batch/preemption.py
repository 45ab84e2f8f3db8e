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

CANDIDATES_MAX: Final = 1024
"""Places that are looked at, at most, for one job."""


def give_way(job: Job, running: Iterable[Queue]) -> Cuts:
    """Have others give what *job* lacks, of the queues of its cohort that have something.

    What it wants is promised to it then. If they may not give enough, nothing has changed and the
    answer is empty. Nobody gives what is not needed: they have it back in reverse order.
    """
    queue, request, step = job.queue, job.request, job.wants
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
        _return_surplus(job, cuts)
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
    for index in range(len(cuts) - 1, -1, -1):
        victim, cut = cuts[index]
        fits = victim.queue.room(victim.request, cut, PROMISED) == cut
        if fits and victim.level + cut >= victim.need:
            _cut(victim, -cut)
            cuts[index] = (victim, 0)
    return [(victim, cut) for victim, cut in cuts if cut]


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
            cut = _unit(victim)
            _cut(victim, cut)
            left = queue.share()
            if may_swing or mine <= left:
                cuts.append((victim, cut))
                share = -left
                index -= victim.level > 0
            else:
                _cut(victim, -cut)
        heappush(heap, (share, name, queue, index))
    return False


def _take_lower(job: Job, lower: list[Job], cuts: Cuts) -> bool:
    """Take the rest from those of lower priority in its own queue; whether it is enough."""
    taken = 0
    for victim in lower:
        while victim.level and taken < CANDIDATES_MAX:
            of_queue, of_cohort = job.queue.over(job.request)
            if not of_queue and not of_cohort:
                return True
            if not any(r in victim.request for r in (*of_queue, *of_cohort)):
                break
            taken += 1
            cut = _unit(victim)
            _cut(victim, cut)
            cuts.append((victim, cut))
    return not any(job.queue.over(job.request))


def _return_surplus(job: Job, cuts: Cuts) -> None:
    """Give back, last first, what turned out not to be needed."""
    for index in range(len(cuts) - 1, -1, -1):
        victim, cut = cuts[index]
        if victim.level + cut < victim.need:
            continue
        _cut(victim, -cut)
        if any(job.queue.over(job.request)) or any(victim.queue.over(victim.request)):
            _cut(victim, cut)
        else:
            cuts[index] = (victim, 0)
    cuts[:] = [(victim, cut) for victim, cut in cuts if cut]
