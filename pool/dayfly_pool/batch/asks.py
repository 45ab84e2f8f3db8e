"""Jobs as the policy sees them, what it says of them, and their order within a queue. Pure.

The order is by priority, then by how much its owner has used lately, then by time. Where jobs want
the same they stand in one line, and if its first does not fit none of it does: so ten thousand
that wait are looked at as one.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import islice
from typing import Annotated, Any, Final

from msgspec import Meta, Struct

from dayfly_pool.batch.quota import RESOURCES_MAX, Account, Amounts, Cohort, QueueSpec
from dayfly_pool.errors import BadInput

COUNT_MAX: Final = 1_000_000
PRIORITY_MAX: Final = 1_000_000
LOOK_MAX: Final = 32
"""Lines of a queue that are looked at, at most, to find something that fits."""

SCAN_MAX: Final = 512
"""With those that ask for more than there is now."""


class Ask(Struct, frozen=True, kw_only=True):
    """A job that wants to run *count* tasks at once, each of which needs *request*.

    With *min_count* over 1 it is a gang: it has places for at least so many of them, or for none.
    What an *owner* has used lately counts against it within the queue.
    """

    id: str
    queue: str
    request: Amounts
    count: Annotated[int, Meta(ge=0)] = 1
    min_count: Annotated[int, Meta(ge=1)] = 1
    priority: int = 0
    submitted_at: float = 0.0
    owner: str = ""

    def check(self) -> None:
        """BadInput if this cannot be meant."""
        if not self.request or len(self.request) > RESOURCES_MAX:
            raise BadInput(f"job {self.id} must ask for 1 to {RESOURCES_MAX} resources")
        wrong = [name for name, amount in self.request.items() if amount <= 0]
        if wrong:
            raise BadInput(f"job {self.id} asks for no {wrong[0]}: leave it out, or ask for some")
        check_count(self.id, self.count)
        check_priority(self.id, self.priority)
        if not 1 <= self.min_count <= max(1, self.count):
            raise BadInput(f"job {self.id}: minCount must be from 1 to its count, {self.count}")


def check_count(id_: str, count: int) -> None:
    """BadInput if nobody can want so many at once."""
    if not 0 <= count <= COUNT_MAX:
        raise BadInput(f"job {id_} wants {count} tasks at once: it may be 0 to {COUNT_MAX}")


def check_priority(id_: str, priority: int) -> None:
    """BadInput if it is out of range."""
    if abs(priority) > PRIORITY_MAX:
        raise BadInput(f"priority of job {id_} must be within {PRIORITY_MAX} of 0")


class Grant(Struct, frozen=True):
    """The job may run so many tasks at once, more than before."""

    id: str
    tasks: int


class Shrink(Struct, frozen=True):
    """Let no more than so many run: what runs may end, but none follows it."""

    id: str
    tasks: int


class Evict(Struct, frozen=True):
    """Stop so many of its tasks now."""

    id: str
    tasks: int
    why: str


Command = Grant | Shrink | Evict


@dataclass(slots=True, eq=False)
class Job:
    """One job. It has *granted* + *draining* + *doomed* places."""

    id: str
    queue: "Queue"
    request: Amounts
    count: int
    min_count: int
    priority: int
    submitted_at: float
    owner: str
    number: int
    """In the order of submission."""

    shape: tuple[tuple[str, int], ...] = ()
    """Its request, to compare."""

    level: int = 0
    """So many places are promised to it."""

    granted: int = 0
    """So many tasks it may run, as was said."""

    draining: int = 0
    """Places of what may run to its end, but is not followed."""

    doomed: int = 0
    """Places of what was told to stop."""

    draining_since: float = 0.0
    taken_by: str = ""
    """Why it lost places last."""

    victim_in: int = -1
    """The epoch in which it last lost places to somebody."""

    is_due: bool = False
    """It was passed over as often as may be: others make room, and do not take it away."""

    place: tuple[int, int, int] | None = None
    """In the queue's list of those that run."""

    entry: "tuple[int, float, int, Job] | None" = None
    line: "Line | None" = None

    @property
    def need(self) -> int:
        """The fewest with which it can run. What has few tasks left is no gang of more."""
        return min(self.min_count, self.count)

    @property
    def is_gang(self) -> bool:
        """Whether it cannot run with a single task."""
        return self.min_count > 1

    @property
    def places(self) -> int:
        """What it holds."""
        return self.granted + self.draining + self.doomed

    @property
    def wants(self) -> int:
        """The number of places that would be promised next, all or none; 0 for no more."""
        if self.level >= self.count:
            return 0
        return 1 if self.level else self.need


Rank = tuple[int, float, float, int]


class Line:
    """Jobs of one queue and owner that want the same next, the first of them first."""

    __slots__ = ("heap", "is_waiting", "key", "live", "owner", "queue", "rank", "request", "step")

    def __init__(self, key: tuple[Any, ...], job: Job) -> None:
        self.key, self.queue, self.owner, self.request = key, job.queue, job.owner, job.request
        self.step, self.is_waiting = job.wants, not job.level
        self.heap: list[tuple[int, float, int, Job]] = []
        self.live = 0
        self.rank: Rank | None = None

    @property
    def first(self) -> Job:
        """Who is first; a line has one."""
        return self.heap[0][3]

    def put(self, job: Job) -> None:
        """It stands in this line."""
        job.line, job.entry = self, (-job.priority, job.submitted_at, job.number, job)
        self.live += 1
        heappush(self.heap, job.entry)

    def drop(self, job: Job) -> None:
        """It does no more; what is left of it in the heap is swept out in time."""
        job.line = job.entry = None
        self.live -= 1
        heap = self.heap
        if len(heap) > 2 * self.live + 16:
            heap[:] = [entry for entry in heap if entry[3].entry is entry]
            heapify(heap)
        while heap and heap[0][3].entry is not heap[0]:
            heappop(heap)


class Queue(Account):
    """The jobs of one queue: the lines of those that want more, and those that run."""

    def __init__(self, name: str, spec: QueueSpec, cohort: Cohort) -> None:
        super().__init__(name, spec, cohort)
        self.jobs = 0
        self.usage: dict[str, float] = {}
        """By owner: the part of the machine it has had of late."""

        self.running: list[tuple[int, int, int, Job]] = []
        """(priority, gangs last, the latest first): who would be the first to give."""

        self.head: Job | None = None
        """The first of those that have nothing and could have it."""

        self._lines: dict[tuple[Any, ...], Line] = {}
        self._order: list[tuple[int, float, float, int, Line]] = []
        self._owners: dict[str, set[Line]] = {}

    def put(self, job: Job) -> None:
        """It wants more."""
        key = (job.owner, job.shape, job.wants, not job.level)
        line = self._lines.get(key)
        is_second = False
        if line is None:
            line = self._lines[key] = Line(key, job)
            is_second = len(self._owners) == 1 and job.owner not in self._owners
            self._owners.setdefault(job.owner, set()).add(line)
        line.put(job)
        if is_second:
            self.reorder_all()
        else:
            self._place(line)

    def drop(self, job: Job) -> None:
        """It wants no more, or something else."""
        line = job.line
        if line is None:
            return
        line.drop(job)
        self._place(line)
        if not line.live:
            del self._lines[line.key]
            owned = self._owners[line.owner]
            owned.discard(line)
            if not owned:
                del self._owners[line.owner]
                if len(self._owners) == 1:
                    self._sort()

    def _place(self, line: Line) -> None:
        rank = self._rank_of(line) if line.heap else None
        if rank == line.rank:
            return
        if line.rank is not None:
            del self._order[bisect_left(self._order, line.rank, key=_rank)]
        line.rank = rank
        if rank is not None:
            insort(self._order, (*rank, line), key=_rank)

    def _rank_of(self, line: Line) -> Rank:
        priority, at, number, _ = line.heap[0]
        usage = self.usage.get(line.owner, 0.0) if len(self._owners) > 1 else 0.0
        return (priority, usage, at, number)

    def charge(self, owner: str, part: float) -> None:
        """It has used so much more."""
        self.usage[owner] = self.usage.get(owner, 0.0) + part
        if len(self._owners) > 1:
            self.reorder(owner)

    def reorder(self, owner: str) -> None:
        """What it has used is another amount."""
        owned = self._owners.get(owner, ())
        if len(owned) * 8 > len(self._lines) > LOOK_MAX:
            self._sort()
            return
        for line in owned:
            self._place(line)

    def reorder_all(self) -> None:
        """What everybody has used is another amount."""
        if len(self._owners) > 1:  # that of a single one does not matter
            self._sort()

    def _sort(self) -> None:
        order: list[tuple[int, float, float, int, Line]] = []
        for line in self._lines.values():
            line.rank = self._rank_of(line)
            order.append((*line.rank, line))
        self._order = sorted(order, key=_rank)

    def is_idle(self) -> bool:
        """Whether nobody wants more."""
        return not self._order

    def lines(self) -> Iterator[Line]:
        """In their order, until it changes."""
        return (entry[4] for entry in islice(self._order, SCAN_MAX))

    def first_waiting(self) -> Job | None:
        """The first that has nothing and could have it, as things are."""
        for line in self.lines():
            if line.is_waiting and self.could_hold(line.request, line.step):
                return line.first
        return None

    def could_hold(self, request: Amounts, number: int) -> bool:
        """Whether that would fit if nobody else had anything."""
        return all(amount * number <= self.most(r) for r, amount in request.items())

    def arrive(self, job: Job, number: int) -> None:
        """It is the latest of those that run."""
        job.place = (job.priority, job.is_gang, -number)
        insort(self.running, (*job.place, job))

    def leave(self, job: Job) -> None:
        """It runs no more."""
        if job.place is not None:
            del self.running[bisect_left(self.running, job.place, key=_place)]
            job.place = None


def _rank(entry: tuple[int, float, float, int, Line]) -> Rank:
    return entry[:4]


def _place(entry: tuple[int, int, int, Job]) -> tuple[int, int, int]:
    return entry[:3]
