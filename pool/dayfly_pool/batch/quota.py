"""Who may hold how much: quotas, what is lent and borrowed within a cohort, fair shares. Pure.

The rules are Kueue's (https://kueue.sigs.k8s.io/docs/concepts/cluster_queue/ and
.../preemption/#fair-sharing). A queue has a quota. What it does not use of it, up to its lending
limit, others of its cohort may borrow, each up to its borrowing limit. A queue's *share* is how
much it borrows, as a part of all that can be borrowed in its cohort, of the resource where that
part is the largest (dominant resource fairness, NSDI 2011), over its weight.

What no queue has as its quota belongs to the cohort `machine`, in which every queue is that says
nothing else. So queues of which nothing is declared share the whole machine alike. Where all the
quotas together are more than there is, each is that much smaller.

Everything is counted twice, by the same rules: what is *promised* (decided) and what is *held*
(places that are really taken, also by what was told to stop and has not yet).
"""

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Final, Literal

from msgspec import Meta, field

from dayfly_pool.declared import Model, Name

Amounts = dict[str, int]
"""Whole numbers by resource: cpu in thousandths of one, memory in bytes, all others counted."""

MACHINE: Final = "machine"
"""The cohort of all that say nothing else."""

PROMISED: Final = 0
HELD: Final = 1
RESOURCES_MAX: Final = 16
MEGABYTE: Final = 1 << 20

Resource = Annotated[str, Meta(pattern=r"^[a-zA-Z]([-_./a-zA-Z0-9]{0,62})\Z")]
Quantities = dict[Resource, Annotated[float, Meta(ge=0, le=1e12)]]
"""As it is declared: `cpu` in processors, `memoryMb`, all others (`gpu`) in whole numbers."""


def amounts(quantities: Mapping[str, float]) -> Amounts:
    """What is declared, in the units in which it is counted. ValueError names what is wrong."""
    if len(quantities) > RESOURCES_MAX:
        raise ValueError(f"more than {RESOURCES_MAX} resources")
    counted = {}
    for name, number in quantities.items():
        if not math.isfinite(number):
            raise ValueError(f"{name} is not a finite number")
        if name == "cpu":
            counted["cpu"] = round(number * 1000)
        elif name == "memoryMb":
            counted["memory"] = round(number * MEGABYTE)
        elif name == "memory":
            raise ValueError("memory is declared as memoryMb")
        elif number != int(number):
            raise ValueError(f"{name} is counted in whole numbers, not {number:g}")
        else:
            counted[name] = int(number)
    return counted


class Preemption(Model, frozen=True):
    """From whom a queue's jobs may take places, if there are none free.

    *within_queue*: from its own jobs of lower priority. *reclaim_within_cohort*: from queues that
    borrow, for as long as its own share stays the smaller one.
    """

    within_queue: Literal["never", "lowerPriority"] = "lowerPriority"
    reclaim_within_cohort: Literal["never", "lowerPriority", "any"] = "any"


class QueueSpec(Model, frozen=True):
    """What is declared of a queue. A namespace has one, and nothing needs to be declared of it.

    A resource that is not in *borrowing_limit* may be borrowed, one that is not in *lending_limit*
    is lent, without limit. With weight 0 it borrows what nobody else wants. In a `strictFIFO`
    queue nothing goes before the first that waits; in a `bestEffortFIFO` one what fits does, a
    limited number of times.
    """

    quota: Quantities = field(default_factory=dict)
    borrowing_limit: Quantities = field(default_factory=dict)
    lending_limit: Quantities = field(default_factory=dict)
    cohort: Name = MACHINE
    weight: Annotated[float, Meta(ge=0, le=1000)] = 1.0
    strategy: Literal["bestEffortFIFO", "strictFIFO"] = "bestEffortFIFO"
    preemption: Preemption = Preemption()

    def __post_init__(self) -> None:
        for quantities in (self.quota, self.borrowing_limit, self.lending_limit):
            amounts(quantities)
        if not math.isfinite(self.weight):
            raise ValueError("weight is not a finite number")


class Account:
    """What one queue may hold, and does."""

    def __init__(self, name: str, spec: QueueSpec, cohort: "Cohort") -> None:
        self.name = name
        self.cohort = cohort
        self.used: tuple[Amounts, Amounts] = ({}, {})
        self.nominal: Amounts = {}
        self.kept: Amounts = {}
        """The part of its quota that it never lends."""

        self.limit: Amounts = {}
        """The most that it may hold; a resource that is not there has no limit of the queue's."""

        self.declare(spec)

    def declare(self, spec: QueueSpec) -> None:
        """It has these rules from now on; its quota is reckoned by `Quotas.reckon`."""
        self.spec = spec
        self.declared = amounts(spec.quota)
        self._borrows, self._lends = amounts(spec.borrowing_limit), amounts(spec.lending_limit)

    def assign(self, nominal: Amounts) -> None:
        """Its quota is *nominal*: what was declared, or less where that is not there."""
        self.nominal = nominal
        lends = self._lends
        self.kept = {r: max(0, n - lends[r]) for r, n in nominal.items() if r in lends}
        self.limit = {r: nominal.get(r, 0) + most for r, most in self._borrows.items()}

    def move(self, request: Amounts, number: int, side: int) -> None:
        """*number* more times (or fewer, below 0) *request* is promised or held."""
        used, kept, of_all = self.used[side], self.kept, self.cohort.used[side]
        for r, amount in request.items():
            before = used.get(r, 0)
            after = used[r] = before + amount * number
            if kept and (keeps := kept.get(r, 0)):
                of_all[r] = of_all.get(r, 0) + max(0, after - keeps) - max(0, before - keeps)
            else:
                of_all[r] = of_all.get(r, 0) + after - before
        self.cohort.version += 1

    def room(self, request: Amounts, most: int, side: int) -> int:
        """How many times *request* fits beside what is there, up to *most*."""
        used, limit = self.used[side], self.limit
        quota, of_all = self.cohort.quota, self.cohort.used[side]
        for r, amount in request.items():
            mine = used.get(r, 0)
            own = max(0, self.kept.get(r, 0) - mine) if self.kept else 0
            left = own + max(0, quota.get(r, 0) - of_all.get(r, 0))
            if r in limit:
                left = min(left, limit[r] - mine)
            if left < amount * most:
                most = max(0, left // amount)
                if not most:
                    return 0
        return most

    def over(self, request: Amounts) -> tuple[list[str], list[str]]:
        """Of which of these resources too much is promised: to the queue; in the cohort."""
        used, limit = self.used[PROMISED], self.limit
        quota, of_all = self.cohort.quota, self.cohort.used[PROMISED]
        return (
            [r for r in request if r in limit and used.get(r, 0) > limit[r]],
            [r for r in request if of_all.get(r, 0) > quota.get(r, 0)],
        )

    def most(self, resource: str) -> int:
        """What it could hold of it if nobody else had any."""
        could = self.kept.get(resource, 0) + self.cohort.quota.get(resource, 0)
        return min(could, self.limit.get(resource, could))

    def share(self, request: Amounts | None = None, number: int = 0) -> float:
        """Its dominant share, with *number* times *request* more; 0 if it borrows nothing."""
        used, nominal, lendable = self.used[PROMISED], self.nominal, self.cohort.quota
        worst = 0.0
        for r in used if request is None else used | request:
            borrowed = used.get(r, 0) - nominal.get(r, 0)
            if request is not None and number and r in request:
                borrowed += request[r] * number
            if borrowed > 0:
                there = lendable.get(r, 0)
                part = borrowed / there if there > 0 else math.inf
                if part > worst:
                    worst = part
        if not worst:
            return 0.0
        return worst / self.spec.weight if self.spec.weight > 0 else math.inf

    def is_borrowing(self, request: Amounts, number: int) -> bool:
        """Whether it would, of what *request* has, with so many times that more."""
        used, nominal = self.used[PROMISED], self.nominal
        return any(used.get(r, 0) + a * number > nominal.get(r, 0) for r, a in request.items())


class Cohort:
    """Queues that lend to each other. *quota* is all that can be lent."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.quota: Amounts = {}
        self.used: tuple[Amounts, Amounts] = ({}, {})
        """Without what its queues have of what they never lend."""

        self.version = 0
        """Another after everything that moved."""


class Quotas:
    """All accounts, and what there is for them to hold."""

    def __init__(self, total: Amounts) -> None:
        self.total = dict(total)
        self.reserved: Amounts = {}
        self.available = dict(total)
        self.cohorts: dict[str, Cohort] = {MACHINE: Cohort(MACHINE)}
        self._accounts: dict[str, Account] = {}

    def cohort(self, name: str) -> Cohort:
        """The cohort of that name; there is one for every name."""
        if name not in self.cohorts:
            self.cohorts[name] = Cohort(name)
        return self.cohorts[name]

    def add(self, account: Account) -> None:
        """It counts, once `reckon` was called if it has a quota."""
        self._accounts[account.name] = account

    def remove(self, account: Account) -> None:
        """It is gone; it has held nothing."""
        del self._accounts[account.name]

    def reckon(self) -> None:
        """Share out what there is, after a total, a reserve or a queue has changed.

        What is short is cut by cumulative rounding, so that nothing is lost to rounding.
        """
        self.available = {
            r: max(0, amount - self.reserved.get(r, 0)) for r, amount in self.total.items()
        }
        accounts = sorted(self._accounts.values(), key=lambda a: (a.cohort.name, a.name))
        declared: Amounts = {}
        for account in accounts:
            _add(declared, account.declared)
        passed: Amounts = {}
        for cohort in self.cohorts.values():
            cohort.quota, cohort.used = {}, ({}, {})
            cohort.version += 1
        for account in accounts:
            nominal = {}
            for r, amount in account.declared.items():
                there, before = self.available.get(r, 0), passed.get(r, 0)
                passed[r] = before + amount
                if declared[r] > there:
                    amount = (before + amount) * there // declared[r] - before * there // declared[
                        r
                    ]
                nominal[r] = amount
            account.assign(nominal)
            cohort = account.cohort
            _add(cohort.quota, {r: n - account.kept.get(r, 0) for r, n in nominal.items()})
            for side in (PROMISED, HELD):
                used = account.used[side].items()
                _add(cohort.used[side], {r: max(0, n - account.kept.get(r, 0)) for r, n in used})
        left = {r: max(0, there - declared.get(r, 0)) for r, there in self.available.items()}
        _add(self.cohorts[MACHINE].quota, left)
        members = {account.cohort.name for account in accounts} | {MACHINE}
        self.cohorts = {name: c for name, c in self.cohorts.items() if name in members}

    def dominant(self, request: Amounts) -> float:
        """The largest part of the machine that it is, of any resource."""
        total = self.total
        return max((a / total[r] for r, a in request.items() if total.get(r)), default=0.0)


def _add(to: Amounts, more: Mapping[str, int] | Iterable[tuple[str, int]]) -> None:
    for r, amount in dict(more).items():
        to[r] = to.get(r, 0) + amount
