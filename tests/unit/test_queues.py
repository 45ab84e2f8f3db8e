"""Which jobs may run how much of the machine: order, quotas, fair shares, preemption, gangs."""

from collections import Counter
from collections.abc import Iterable
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import ValidationError, convert

from dayfly_pool.batch import preemption, queues
from dayfly_pool.batch.queues import (
    Admission,
    Ask,
    Command,
    Evict,
    Grant,
    QueueSpec,
    Shrink,
)
from dayfly_pool.errors import BadInput

NOW = 0.0
CPU = 1000


def cpus(number: float) -> dict[str, int]:
    return {"cpu": round(number * CPU)}


def ask(id_: str, queue: str = "a", **fields: Any) -> Ask:
    return Ask(id=id_, queue=queue, **{"request": cpus(1), **fields})


def gang(id_: str, size: int, queue: str = "a", **fields: Any) -> Ask:
    return ask(id_, queue, **{"count": size, "min_count": size, **fields})


def spec(quota: float | None = None, **fields: Any) -> QueueSpec:
    """As it is declared, in processors."""
    if quota is not None:
        fields["quota"] = {"cpu": quota}
    return convert(fields, QueueSpec)


class Machine:
    """Runs what is granted, ends what is evicted, and holds the policy to its laws all the time.

    A task ends when `end` says so. A gang's tasks end together.
    """

    def __init__(
        self,
        total: dict[str, int],
        *,
        is_slow: bool = False,
        is_checked: bool = True,
        **limits: Any,
    ) -> None:
        self.total, self.reserved = total, dict.fromkeys(total, 0)
        self.policy = Admission(total, **limits)
        self.asks: dict[str, Ask] = {}
        self.left: dict[str, int] = {}
        """Tasks that have not ended."""

        self.may = Counter[str]()
        self.running = Counter[str]()
        self.dying: list[tuple[str, int]] = []
        self.is_checked = is_checked
        self.is_slow = is_slow
        """Whether what is evicted ends only with `bury`."""

        self.specs: dict[str, QueueSpec] = {}
        self.done: list[str] = []
        self.suspended: set[str] = set()
        self.evictions = Counter[str]()
        self.now = 0.0

    # ---- facts

    def submit(self, ask: Ask, tasks: int | None = None) -> list[Command]:
        self.asks[ask.id] = ask
        self.left[ask.id] = ask.count if tasks is None else tasks
        return self.carry_out(self.policy.submit(ask, self.now))

    def queue(self, name: str, spec: QueueSpec) -> list[Command]:
        self.specs[name] = spec
        return self.carry_out(self.policy.set_queue(name, spec, self.now))

    def reserve(self, reserved: dict[str, int]) -> list[Command]:
        self.reserved = reserved
        return self.carry_out(self.policy.set_reserved(reserved, self.now))

    def tick(self, passed_s: float) -> list[Command]:
        self.now += passed_s
        return self.carry_out(self.policy.tick(self.now))

    def end(self, id_: str) -> list[Command]:
        """One of its tasks ends; all of them of a gang."""
        ask = self.asks[id_]
        if ask.min_count > 1:
            self.left[id_] = 0
        else:
            self.left[id_] -= 1
            self.running[id_] -= 1
        if not self.left[id_]:
            return self.finish(id_)
        commands: list[Command] = []
        if self.left[id_] < self.may[id_]:
            commands += self.carry_out(self.policy.change(id_, self.now, count=self.left[id_]))
        if self.running[id_] >= self.may[id_]:
            commands += self.carry_out(self.policy.released(id_, 1, self.now))
        self.start(id_)
        return commands

    def finish(self, id_: str) -> list[Command]:
        """All of it has ended, or was cancelled."""
        self.done.append(id_)
        self.running[id_] = self.may[id_] = self.left[id_] = 0
        self.dying = [(other, number) for other, number in self.dying if other != id_]
        del self.asks[id_]
        return self.carry_out(self.policy.finished(id_, self.now))

    def bury(self) -> list[Command]:
        """The first of what was evicted is gone."""
        id_, number = self.dying.pop(0)
        return self.carry_out(self.policy.released(id_, number, self.now))

    # ---- commands

    def carry_out(self, commands: list[Command]) -> list[Command]:
        before = self.held() if self.is_checked else {}
        for command in commands:
            match command:
                case Grant(id=id_, tasks=tasks):
                    assert tasks > self.may[id_]
                    self.may[id_] = tasks
                    self.start(id_)
                case Shrink(id=id_, tasks=tasks):
                    assert tasks < self.may[id_]
                    self.may[id_] = tasks
                case Evict(id=id_, tasks=tasks):
                    assert tasks <= self.running[id_]
                    self.running[id_] -= tasks
                    self.may[id_] = min(self.may[id_], self.running[id_])
                    self.evictions[id_] += 1
                    self.dying.append((id_, tasks))
        if self.is_checked:
            self.check(before)
        more = list(commands)
        while self.dying and not self.is_slow:
            more += self.bury()
        return more

    def start(self, id_: str) -> None:
        self.running[id_] = max(self.running[id_], min(self.may[id_], self.left[id_]))

    # ---- laws

    def held(self) -> dict[tuple[str, str], int]:
        """By queue and resource, what really runs, also what is to end; and by "" in all."""
        held = Counter[tuple[str, str]]()
        for id_, number in [*self.running.items(), *self.dying]:
            if number:
                self._count(held, self.asks[id_], number)
        return held

    def _count(self, held: Counter[tuple[str, str]], ask: Ask, number: int) -> None:
        for r, amount in ask.request.items():
            held[ask.queue, r] += amount * number
            held["", r] += amount * number

    def check(self, before: dict[tuple[str, str], int]) -> None:
        """Also *before* these commands something may have run that has to end."""
        may, held = Counter[tuple[str, str]](), self.held()
        for id_, ask in self.asks.items():
            number = self.may[id_]
            self._count(may, ask, number)
            assert number == 0 or number >= min(ask.min_count, self.left[id_])
            assert number == self.policy.tasks(id_)
        for r, total in self.total.items():
            available = max(0, total - self.reserved[r])
            assert may["", r] <= available
            assert held["", r] <= max(available, before["", r])
            self._check_queues(r, available, may, before, held)

    def _check_queues(
        self,
        r: str,
        available: int,
        may: Counter[tuple[str, str]],
        before: dict[tuple[str, str], int],
        held: dict[tuple[str, str], int],
    ) -> None:
        named = {name: spec for name, spec in self.specs.items()}
        for ask in self.asks.values():
            named.setdefault(ask.queue, QueueSpec())
        quota = {name: counted(spec.quota).get(r, 0) for name, spec in named.items()}
        for cohort in {spec.cohort for spec in named.values()}:
            members = [name for name, spec in named.items() if spec.cohort == cohort]
            pool = max(0, available - sum(quota.values())) if cohort == "machine" else 0
            lent = sum(
                min(quota[name], counted(named[name].lending_limit).get(r, quota[name]))
                for name in members
            )
            assert sum(may[name, r] for name in members) <= sum(map(quota.get, members)) + pool
            borrowed = sum(max(0, may[name, r] - quota[name]) for name in members)
            assert borrowed <= lent + pool
        for name, spec in named.items():
            limit = counted(spec.borrowing_limit)
            if r in limit:
                most = quota[name] + limit[r]
                assert may[name, r] <= most
                assert held[name, r] <= max(most, before[name, r])


def granted(commands: Iterable[Command]) -> dict[str, int]:
    return {c.id: c.tasks for c in commands if isinstance(c, Grant)}


def counted(quantities: dict[str, float]) -> dict[str, int]:
    return {r: round(n * CPU) if r == "cpu" else int(n) for r, n in quantities.items()}


# ---- the order within a queue -------------------------------------------------------------------


def test_who_declares_nothing_may_have_the_whole_machine():
    machine = Machine(cpus(4))

    assert machine.submit(ask("1", "team", count=10)) == [Grant("1", 4)]
    assert repr(machine.policy) == "<Admission [1 running, 0 waiting | cpu 4000/4000]>"


def test_priority_goes_first_and_then_the_time_of_submission():
    machine = Machine(cpus(1))
    machine.queue("a", spec(preemption={"withinQueue": "never"}))
    machine.submit(ask("running"))
    for id_, priority, at in (("late", 0, 3), ("early", 0, 2), ("urgent", 5, 4)):
        machine.submit(ask(id_, priority=priority, submitted_at=at))
    while machine.asks:
        machine.end(next(id_ for id_ in machine.asks if machine.running[id_]))

    assert machine.done == ["running", "urgent", "early", "late"]


def test_a_best_effort_queue_lets_what_fits_go_before_its_first():
    machine = Machine(cpus(2))
    machine.submit(ask("first", request=cpus(1)))
    machine.submit(ask("large", request=cpus(2)))

    assert machine.submit(ask("small")) == [Grant("small", 1)]


def test_a_strict_queue_lets_nothing_go_before_its_first():
    machine = Machine(cpus(2))
    machine.queue("a", spec(strategy="strictFIFO"))
    machine.submit(ask("first"))
    machine.submit(ask("large", request=cpus(2)))

    assert machine.submit(ask("small")) == []
    assert machine.policy.why("small") == "order: in queue a job large is first"
    assert machine.end("first") == [Grant("large", 1)]


def test_the_first_of_a_strict_queue_blocks_also_if_others_refuse_it_what_it_could_take():
    machine = Machine(cpus(10))
    machine.queue("b", spec(strategy="strictFIFO"))
    machine.submit(ask("1", "a", count=3, request=cpus(3)), tasks=99)
    machine.submit(gang("first", 6, "b"))

    assert machine.submit(ask("small", "b")) == []
    assert machine.running == {"1": 3}


def test_who_runs_and_wants_more_blocks_nobody_in_a_strict_queue():
    machine = Machine(cpus(4) | {"gpu": 1})
    machine.queue("a", spec(strategy="strictFIFO"))
    machine.submit(ask("1", count=2, request={"gpu": 1}))

    assert machine.submit(ask("2")) == [Grant("2", 1)]


def test_what_can_never_fit_blocks_nobody():
    """Also in a strict queue, or one mistake would be the end of it."""
    machine = Machine(cpus(2))
    machine.queue("a", spec(strategy="strictFIFO"))
    machine.submit(ask("huge", request=cpus(3)))

    assert machine.submit(ask("small")) == [Grant("small", 1)]
    assert machine.policy.why("huge") == (
        "machine: it needs 3000 cpu; for jobs there are 2000 cpu in all"
    )


def test_who_has_used_little_of_late_goes_first():
    """Of owners within one queue, at equal priority."""
    machine = Machine(cpus(2), half_life_s=60)
    machine.submit(ask("1", owner="much", count=2, request=cpus(1)))
    machine.tick(0)
    machine.tick(60)
    machine.submit(ask("2", owner="much", count=2, submitted_at=1))
    machine.submit(ask("3", owner="little", count=2, submitted_at=2))

    assert machine.finish("1") == [Grant("3", 2)]


def test_what_was_used_is_halved_in_a_half_life():
    machine = Machine(cpus(2), half_life_s=60)
    machine.submit(ask("1", owner="me", count=2))
    machine.tick(0)
    machine.tick(6000)
    machine.finish("1")
    (before,) = machine.policy.queues()
    machine.tick(60)
    (after,) = machine.policy.queues()

    assert before.usage["me"] == pytest.approx(1, rel=0.01)
    assert after.usage["me"] == pytest.approx(before.usage["me"] / 2)


def test_a_burst_does_not_win_before_the_next_sample():
    """What is admitted is charged at once, so owners take turns though no time has passed."""
    machine = Machine(cpus(4))
    machine.submit(ask("block", count=4))
    for n in range(4):
        machine.submit(ask(f"mine{n}", owner="mine", submitted_at=1 + n))
    for n in range(4):
        machine.submit(ask(f"theirs{n}", owner="theirs", submitted_at=10 + n))

    assert set(granted(machine.finish("block"))) == {"mine0", "mine1", "theirs0", "theirs1"}


def test_what_a_single_owner_has_used_does_not_matter():
    """Also if there was another just now."""
    machine = Machine(cpus(4))
    machine.submit(ask("block", owner="me", count=4))
    machine.submit(ask("old", owner="me", submitted_at=1, request=cpus(2)))
    machine.submit(ask("theirs", owner="you", submitted_at=2))
    machine.finish("theirs")
    machine.submit(ask("new", owner="me", submitted_at=3, request=cpus(3)))

    assert machine.finish("block") == [Grant("old", 1)]


def test_a_job_that_changes_its_mind_all_the_time_leaves_nothing_behind():
    machine = Machine(cpus(1))
    for id_ in ("running", "first", "other"):
        machine.submit(ask(id_))
    for n in range(1000):
        machine.policy.change("other", NOW, priority=-n)
    (line,) = (line for queue in machine.policy._queues.values() for line in queue.lines())

    assert len(line.heap) < 50


# ---- quotas and borrowing -----------------------------------------------------------------------


def test_what_another_does_not_use_may_be_borrowed():
    machine = Machine(cpus(4))
    machine.queue("a", spec(2, cohort="x"))
    machine.queue("b", spec(2, cohort="x"))

    assert machine.submit(ask("1", count=10)) == [Grant("1", 4)]


def test_only_within_a_cohort_is_anything_borrowed():
    machine = Machine(cpus(4))
    machine.queue("a", spec(2, cohort="x"))
    machine.queue("b", spec(2, cohort="y"))

    assert machine.submit(ask("1", count=10)) == [Grant("1", 2)]


def test_a_queue_borrows_no_more_than_its_limit():
    machine = Machine(cpus(4))
    machine.queue("a", spec(1, cohort="x", borrowingLimit={"cpu": 1}))
    machine.queue("b", spec(3, cohort="x"))

    assert machine.submit(ask("1", count=10)) == [Grant("1", 2)]
    assert machine.policy.why("1") == "quota: it needs 1000 cpu; queue a has 2000 cpu of 2000"


def test_a_queue_lends_no_more_than_its_limit():
    machine = Machine(cpus(4))
    machine.queue("a", spec(1, cohort="x"))
    machine.queue("b", spec(3, cohort="x", lendingLimit={"cpu": 1}))

    assert machine.submit(ask("1", "a", count=10), tasks=99) == [Grant("1", 2)]
    assert machine.submit(ask("2", "b", count=10), tasks=99) == [Shrink("1", 1), Grant("2", 2)]
    assert machine.end("1") == [Grant("2", 3)]


def test_what_nobody_has_as_quota_is_everybodys():
    machine = Machine(cpus(4))
    machine.queue("a", spec(1))
    machine.queue("b", spec(1, lendingLimit={"cpu": 0}))

    assert machine.submit(ask("1", "c", count=10)) == [Grant("1", 3)]


def test_what_fits_a_quota_goes_before_what_is_borrowed():
    """Though it was submitted later."""
    machine = Machine(cpus(0))
    machine.queue("a", spec(0))
    machine.queue("b", spec(1))
    machine.submit(ask("borrower", "a", submitted_at=1, priority=9))
    machine.submit(ask("owner", "b", submitted_at=2))
    machine.total = cpus(1)

    assert machine.carry_out(machine.policy.set_total(cpus(1), NOW)) == [Grant("owner", 1)]


def test_quotas_that_are_more_than_there_is_are_each_that_much_smaller():
    machine = Machine(cpus(6))
    for name in "ab":
        machine.queue(name, spec(6, cohort="x", borrowingLimit={"cpu": 0}))
    machine.submit(ask("1", "a", count=10))
    machine.submit(ask("2", "b", count=10))
    quotas = {use.name: use.quota["cpu"] for use in machine.policy.queues()}

    assert quotas == {"a": 3000, "b": 3000}


def test_no_countable_thing_is_lost_when_quotas_are_cut():
    machine = Machine({"gpu": 1})
    for name in "abc":
        machine.queue(name, QueueSpec(quota={"gpu": 1}, cohort="x"))

    assert machine.submit(ask("1", "b", request={"gpu": 1})) == [Grant("1", 1)]


def test_a_resource_that_is_not_there_is_waited_for():
    machine = Machine(cpus(4) | {"gpu": 0})
    machine.submit(ask("1", request={"gpu": 1, **cpus(1)}))
    machine.total = cpus(4) | {"gpu": 2}

    assert "1 gpu" in machine.policy.why("1")
    assert machine.carry_out(machine.policy.set_total(machine.total, NOW)) == [Grant("1", 1)]


# ---- fair shares --------------------------------------------------------------------------------


def test_the_smallest_dominant_share_goes_first():
    """The example of the paper (NSDI 2011): 9 processors, 18 GB, so 3 tasks and 2."""
    machine = Machine({"cpu": 0, "memory": 0})
    machine.submit(ask("1", "a", count=99, request={"cpu": 1000, "memory": 4}))
    machine.submit(ask("2", "b", count=99, request={"cpu": 3000, "memory": 1}))
    machine.total = {"cpu": 9000, "memory": 18}

    commands = machine.carry_out(machine.policy.set_total(machine.total, NOW))
    assert granted(commands) == {"1": 3, "2": 2}


def test_a_weight_is_a_multiple_of_a_share():
    machine = Machine(cpus(0))
    machine.queue("a", spec(weight=3))
    machine.submit(ask("1", "a", count=99))
    machine.submit(ask("2", "b", count=99))
    machine.total = cpus(8)

    commands = machine.carry_out(machine.policy.set_total(cpus(8), NOW))
    assert granted(commands) == {"1": 6, "2": 2}


def test_who_has_no_weight_borrows_only_what_nobody_else_wants():
    machine = Machine(cpus(4))
    machine.queue("idle", spec(weight=0))
    machine.submit(ask("1", "idle", count=10))

    assert machine.running["1"] == 4
    assert machine.submit(ask("2", "b", count=3))[0] == Shrink("1", 1)


def test_who_comes_later_gets_an_equal_share():
    """Of those that borrow the one with the most gives until they are even (rule a)."""
    machine = Machine(cpus(10))
    machine.submit(ask("1", "a", count=99), tasks=1000)

    assert machine.submit(ask("2", "b", count=99)) == [Shrink("1", 5)]
    for _ in range(5):
        machine.end("1")
    assert machine.running == {"1": 5, "2": 5}


def test_growing_never_swings_a_share_past_the_others():
    """Rule a: 3 of 5 after that, when the other is left 2, is too much."""
    machine = Machine(cpus(5))
    machine.submit(ask("1", "a", count=99), tasks=1000)
    machine.submit(ask("2", "b", count=99))

    assert (machine.may["1"], machine.policy.why("2").split(":")[0]) == (3, "machine")


def test_growing_never_leaves_the_others_less():
    """3 of 6 would be less than 4, but 2 is what the other would be left with."""
    machine = Machine(cpus(6))
    machine.submit(ask("1", "a", count=2, request=cpus(2)))
    machine.submit(ask("2", "b", count=2))

    assert machine.policy.change("2", NOW, count=4) == []


def test_who_is_no_richer_than_the_taker_gives_nothing_more():
    machine = Machine(cpus(6))
    machine.submit(ask("1", "a", count=3, request=cpus(2)), tasks=99)

    assert machine.submit(ask("2", "b", request=cpus(4))) == []


def test_the_richest_give_until_they_are_level():
    machine = Machine(cpus(20))
    for name in "ab":
        machine.submit(ask(name, name, count=10), tasks=99)

    assert machine.submit(gang("gang", 4, "c")) == [Shrink("a", 8), Shrink("b", 8)]


def test_a_job_that_has_nothing_may_take_from_a_share_that_is_larger_as_it_is():
    """Rule b: 2 of 5 is less than 3, though the other is left none."""
    machine = Machine(cpus(4))
    machine.submit(ask("1", "a", request=cpus(3)))

    assert machine.submit(ask("2", "b", request=cpus(2))) == [Shrink("1", 0)]


def test_nobody_takes_from_who_has_no_larger_share():
    machine = Machine(cpus(4))
    machine.submit(ask("1", "a", request=cpus(2)))
    machine.submit(ask("2", "b", request=cpus(2)))

    assert machine.submit(ask("3", "c", request=cpus(3))) == []
    assert machine.policy.why("3") == (
        "cohort: it needs 3000 cpu; the queues of cohort machine have the rest"
    )


# ---- preemption ---------------------------------------------------------------------------------


def test_an_owner_has_its_quota_back_from_who_borrowed_it():
    machine = Machine(cpus(4))
    machine.queue("a", spec(2, cohort="x"))
    machine.queue("b", spec(2, cohort="x"))
    machine.submit(ask("1", "a", count=4), tasks=100)

    assert machine.submit(ask("2", "b", count=2)) == [Shrink("1", 2)]


@pytest.mark.parametrize(
    ("policy", "priority", "has_it"),
    [("never", 9, False), ("lowerPriority", 0, False), ("lowerPriority", 1, True)],
)
def test_a_queue_may_forgo_what_it_could_reclaim(policy: str, priority: int, has_it: bool):
    machine = Machine(cpus(4))
    machine.queue("a", spec(2, cohort="x"))
    machine.queue("b", spec(2, cohort="x", preemption={"reclaimWithinCohort": policy}))
    machine.submit(ask("1", "a", count=4), tasks=100)

    assert bool(machine.submit(ask("2", "b", priority=priority))) is has_it


def test_a_higher_priority_takes_from_a_lower_one_of_its_queue():
    machine = Machine(cpus(2))
    machine.submit(ask("low", count=2), tasks=9)

    assert machine.submit(ask("high", priority=1)) == [Shrink("low", 1)]
    assert machine.end("low") == [Grant("high", 1)]


def test_a_queue_may_say_that_its_jobs_leave_each_other_alone():
    machine = Machine(cpus(2))
    machine.queue("a", spec(preemption={"withinQueue": "never"}))
    machine.submit(ask("low", count=2), tasks=9)

    assert machine.submit(ask("high", priority=1)) == []


def test_nobody_takes_from_an_equal_priority():
    machine = Machine(cpus(4))
    machine.submit(ask("equal", priority=1, request=cpus(3)))
    machine.submit(ask("low"))

    assert machine.submit(ask("high", priority=1, request=cpus(2))) == []


def test_a_gang_gives_after_the_others_of_its_priority():
    """What is taken from it may be more than is needed."""
    machine = Machine(cpus(4))
    machine.submit(ask("1"))
    machine.submit(gang("gang", 3))

    assert machine.submit(ask("high", priority=1)) == [Shrink("1", 0)]


def test_what_others_gave_beyond_the_need_is_for_the_next():
    machine = Machine(cpus(4), grace_s=30)
    machine.queue("b", spec(preemption={"reclaimWithinCohort": "never"}))
    machine.submit(ask("large", request=cpus(4)))
    machine.submit(ask("small", "b"))
    machine.submit(ask("high", priority=1, request=cpus(3)))

    assert granted(machine.tick(30)) == {"high": 1, "small": 1}


def test_a_queue_stays_within_its_limit_while_its_own_jobs_leave():
    """Though the machine has room."""
    machine = Machine(cpus(4))
    machine.queue("a", spec(1, borrowingLimit={"cpu": 1}))
    machine.submit(ask("low", count=2), tasks=9)

    assert machine.submit(ask("high", priority=1)) == [Shrink("low", 1)]
    assert machine.end("low") == [Grant("high", 1)]


def test_who_has_just_lost_places_does_not_take_them_back(monkeypatch: pytest.MonkeyPatch):
    """Here what is left over is filled up, and makes those rich again who have just given."""
    taken: list[str] = []

    def give_way(job: Any, step: int, running: Any) -> Any:
        cuts = preemption.give_way(job, step, running)
        taken.extend([job.id] * bool(cuts))
        return cuts

    monkeypatch.setattr(queues, "give_way", give_way)
    machine = Machine({"cpu": 20_000, "gpu": 3})
    machine.submit(ask("1", "c", count=8, priority=1, request={"cpu": 4000, "gpu": 1}), tasks=99)
    machine.submit(ask("2", "b", priority=1, request=cpus(3)))
    machine.submit(ask("3", "c", count=3, request=cpus(3)), tasks=99)
    machine.submit(ask("4", "a", count=2, priority=1, request=cpus(3)), tasks=99)
    machine.submit(ask("5", "a", request=cpus(5)))

    assert len(taken) < 10


def test_the_lowest_priority_gives_first_and_then_the_latest():
    machine = Machine(cpus(3))
    for id_, priority in (("old", 1), ("new", 1), ("low", 0)):
        machine.submit(ask(id_, priority=priority))

    assert machine.submit(ask("4", priority=2)) == [Shrink("low", 0)]
    assert machine.submit(ask("5", priority=2)) == [Shrink("new", 0)]


def test_nobody_gives_what_turns_out_not_to_be_needed():
    """The small one was asked first; with the large one's places it may keep its own.

    Nor goes that to another, who was there before but has nothing.
    """
    machine = Machine(cpus(4))
    machine.submit(ask("large", request=cpus(3), submitted_at=1))
    machine.submit(ask("small", submitted_at=2))
    machine.submit(ask("waiting", submitted_at=0))

    assert machine.submit(ask("high", priority=1, request=cpus(3))) == [Shrink("large", 0)]
    machine.finish("large")
    machine.finish("high")
    assert machine.running == {"small": 1, "waiting": 1, "large": 0, "high": 0}


def test_functions_take_no_more_than_they_need():
    machine = Machine(cpus(4))
    machine.submit(ask("large", request=cpus(3), submitted_at=1))
    machine.submit(ask("small", submitted_at=2))
    machine.submit(ask("waiting", submitted_at=0))

    assert machine.reserve(cpus(3)) == [Shrink("large", 0)]


def test_a_gang_gives_what_it_can_spare_or_all():
    machine = Machine(cpus(4))
    machine.submit(ask("1", count=4, min_count=3))

    assert machine.submit(ask("2", priority=1)) == [Shrink("1", 3)]
    assert machine.submit(ask("3", priority=1))[0] == Evict(
        "1", 4, "its places went to job 3 of queue a"
    )


def test_what_is_shrunk_and_not_given_back_in_time_is_evicted():
    machine = Machine(cpus(2), grace_s=10)
    machine.submit(ask("low", count=2), tasks=9)
    machine.submit(ask("high", priority=1))

    assert machine.tick(9.9) == []
    assert machine.tick(0.1) == [
        Evict("low", 1, "its places went to job high of queue a"),
        Grant("high", 1),
    ]


def test_what_need_not_end_after_all_goes_on():
    machine = Machine(cpus(2))
    machine.submit(ask("low", count=2), tasks=9)
    machine.submit(ask("high", priority=1))

    assert machine.finish("high") == [Grant("low", 2)]
    assert machine.running["low"] == 2


# ---- functions come first -----------------------------------------------------------------------


def test_what_functions_need_is_taken_off_and_given_back():
    machine = Machine(cpus(4))
    machine.submit(ask("1", count=4), tasks=99)

    assert machine.reserve(cpus(3)) == [Shrink("1", 1)]
    assert machine.reserve(cpus(3)) == []
    assert machine.reserve(cpus(1)) == [Grant("1", 3)]


def test_the_largest_share_gives_first_to_functions():
    machine = Machine(cpus(10))
    machine.queue("a", spec(4))
    machine.submit(ask("1", "a", count=4), tasks=99)
    machine.submit(ask("2", "b", count=9), tasks=99)

    assert machine.reserve(cpus(3)) == [Shrink("2", 3)]


def test_jobs_stop_when_functions_need_everything_and_go_on_after_it():
    machine = Machine(cpus(2))
    machine.submit(ask("1", count=2), tasks=99)
    machine.submit(gang("2", 2))

    assert machine.reserve(cpus(9)) == [Shrink("1", 0)]
    assert machine.policy.why("2") == (
        "machine: it needs 2000 cpu, as 2 at once; for jobs there are 0 cpu in all"
    )
    assert machine.reserve(cpus(0)) == [Grant("1", 2)]


# ---- gangs --------------------------------------------------------------------------------------


def test_a_gang_has_all_or_nothing():
    machine = Machine(cpus(4))
    machine.submit(ask("1", count=2))

    assert machine.submit(gang("2", 3)) == []
    assert machine.policy.why("2") == (
        "gang: it needs 3000 cpu, as 3 at once; the queues of cohort machine have the rest"
    )
    assert machine.end("1") == [Shrink("1", 1), Grant("2", 3)]


def test_a_gang_holds_nothing_while_others_make_room_for_it():
    """What is free already is kept for it, though."""
    machine = Machine(cpus(4))
    machine.submit(ask("low", count=3), tasks=99)

    assert machine.submit(gang("2", 3, priority=1)) == [Shrink("low", 1)]
    assert machine.submit(ask("3", priority=2))[-1:] != [Grant("3", 1)]
    assert machine.policy.why("2").startswith("machine: all its places at once")
    assert machine.held()["", "cpu"] == 3000


def test_a_gang_grows_beyond_its_fewest_one_by_one():
    machine = Machine(cpus(4))
    machine.submit(ask("1"))

    assert machine.submit(ask("2", count=4, min_count=2)) == [Grant("2", 3)]
    assert machine.end("1") == [Grant("2", 4)]


def test_a_gang_that_was_evicted_comes_back_when_the_last_of_it_is_gone():
    """Though there would be room beside what is left of it."""
    machine = Machine(cpus(4), is_slow=True)
    machine.submit(gang("1", 2))
    machine.submit(ask("2", priority=1, request=cpus(3)))

    assert machine.finish("2") == []
    assert machine.policy.released("1", 1, NOW) == []
    assert machine.policy.released("1", 1, NOW) == [Grant("1", 2)]


def test_a_gang_with_few_tasks_left_is_a_small_gang():
    machine = Machine(cpus(4), is_slow=True)
    machine.submit(gang("1", 4))
    machine.policy.change("1", NOW, count=2)
    machine.policy.released("1", 2, NOW)

    assert machine.policy.submit(ask("2", priority=1, request=cpus(3)), NOW) == [
        Evict("1", 2, "its places went to job 2 of queue a")
    ]
    assert machine.policy.released("1", 2, NOW) == [Grant("2", 1)]
    assert machine.policy.finished("2", NOW) == [Grant("1", 2)]


def test_a_stream_of_small_jobs_does_not_starve_a_gang():
    """It is passed over so many times, and then the small ones wait."""
    machine = Machine(cpus(4), passed_max=8)
    for n in range(4):
        machine.submit(ask(f"small{n}", "ab"[n % 2]))
    machine.submit(gang("gang", 4, "c"))
    for n in range(4, 40):
        machine.submit(ask(f"small{n}", "ab"[n % 2]))
        if not machine.running["gang"]:
            machine.end(next(id_ for id_ in machine.asks if machine.running[id_]))

    assert machine.running["gang"] == 4
    assert len(machine.done) <= 8 + 4
    assert machine.policy.why("small39").startswith("cohort")


def test_a_gang_that_was_due_keeps_what_it_has():
    """Else each small job of a queue with a smaller share would end it."""
    machine = Machine(cpus(4), passed_max=0)
    machine.submit(ask("1", "a", count=4))
    machine.submit(gang("gang", 4, "b"))
    machine.finish("1")

    assert machine.running["gang"] == 4
    assert machine.submit(ask("2", "a")) == []


def test_what_is_kept_for_a_gang_is_no_hindrance_to_an_owner():
    """Within its quota a queue waits for nobody who borrows."""
    machine = Machine(cpus(5), passed_max=0)
    machine.queue("owner", spec(1))
    machine.submit(ask("1", "a", count=4))
    machine.submit(gang("gang", 4, "b"))

    assert machine.submit(ask("2", "owner")) == [Grant("2", 1)]


# ---- what is said -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"request": {}}, "must ask for"),
        ({"request": {"cpu": 0}}, "asks for no cpu"),
        ({"count": -1}, "0 to 1000000"),
        ({"count": 1_000_001}, "0 to 1000000"),
        ({"count": 2, "min_count": 3}, "minCount"),
        ({"priority": 10**9}, "priority"),
    ],
)
def test_a_job_that_cannot_be_meant_is_refused(fields: dict[str, Any], what: str):
    with pytest.raises(BadInput, match=what):
        Admission(cpus(1)).submit(ask("1", **fields), NOW)


def test_a_job_is_submitted_once_and_ends_once():
    policy = Admission(cpus(1))
    policy.submit(ask("1"), NOW)
    with pytest.raises(BadInput, match="before"):
        policy.submit(ask("1"), NOW)

    assert policy.finished("1", NOW) == policy.finished("1", NOW) == []
    assert policy.released("1", 1, NOW) == policy.change("1", NOW, count=3) == []
    assert policy.why("1").startswith("unknown")


@pytest.mark.parametrize(
    "fields",
    [
        {"quota": {"cpu": -1}},
        {"quota": {"gpu": 0.5}},
        {"quota": {"memory": 5}},
        {"quota": {"cpu": float("nan")}},
        {"quota": {f"r{n}": 1 for n in range(17)}},
        {"weight": float("inf")},
        {"strategy": "fifo"},
        {"color": "red"},
    ],
)
def test_a_queue_that_cannot_be_meant_is_refused(fields: dict[str, Any]):
    with pytest.raises(ValidationError):
        convert(fields, QueueSpec)


def test_nothing_is_remembered_of_a_queue_without_jobs():
    machine = Machine(cpus(2))
    for n in range(100):
        machine.submit(ask("1", f"namespace{n}"))
        machine.finish("1")
    machine.tick(0)
    machine.tick(100 * 3600)

    assert machine.policy.queues() == []


def test_nothing_is_remembered_of_a_cohort_without_queues():
    machine = Machine(cpus(2))
    machine.submit(ask("1"))
    for n in range(100):
        machine.queue("a", spec(1, cohort=f"c{n}"))
    policy = machine.policy

    assert len(policy._running | policy._wanting | policy._heads | policy._raises) <= 2


def test_a_suspended_job_gives_its_places_back_and_waits_for_none():
    machine = Machine(cpus(2))
    machine.submit(ask("1", count=2), tasks=9)
    machine.submit(ask("2"))

    assert machine.carry_out(machine.policy.change("1", NOW, count=0)) == [Shrink("1", 0)]
    assert machine.policy.released("1", 2, NOW) == [Grant("2", 1)]
    assert machine.policy.why("1").startswith("nothing")


# ---- laws ---------------------------------------------------------------------------------------

SPECS = st.builds(
    lambda quota, borrow, lend, cohort, weight, strategy, within, reclaim: spec(
        quota,
        borrowingLimit={} if borrow is None else {"cpu": borrow},
        lendingLimit={} if lend is None else {"cpu": lend},
        cohort=cohort,
        weight=weight,
        strategy=strategy,
        preemption={"withinQueue": within, "reclaimWithinCohort": reclaim},
    ),
    st.integers(0, 4),
    st.none() | st.integers(0, 3),
    st.none() | st.integers(0, 3),
    st.sampled_from(("machine", "machine", "x")),
    st.sampled_from((0, 1, 1, 2)),
    st.sampled_from(("bestEffortFIFO", "bestEffortFIFO", "strictFIFO")),
    st.sampled_from(("lowerPriority", "never")),
    st.sampled_from(("any", "any", "lowerPriority", "never")),
)
QUEUES = st.dictionaries(st.sampled_from("abc"), SPECS, max_size=3)
REQUESTS = st.sampled_from((cpus(1), cpus(1), cpus(0.5), cpus(2), {"gpu": 1, "cpu": 500}))


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    count = draw(st.integers(1, 6))
    return ask(
        "",
        draw(st.sampled_from("abcd")),
        count=count,
        min_count=draw(st.sampled_from((1, 1, 1, count, (count + 1) // 2))),
        request=draw(REQUESTS),
        priority=draw(st.integers(0, 2)),
        owner=draw(st.sampled_from(("me", "you"))),
    )


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), asks()),
        st.tuples(st.just("submit"), asks()),
        st.tuples(st.just("end"), st.integers(0, 20)),
        st.tuples(st.just("end"), st.integers(0, 20)),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.tuples(st.just("suspend"), st.integers(0, 20)),
        st.tuples(st.just("raise"), st.integers(0, 20)),
        st.tuples(st.just("reserve"), st.integers(0, 9)),
        st.tuples(st.just("queue"), st.tuples(st.sampled_from("abcd"), SPECS)),
        st.tuples(st.just("bury"), st.just(0)),
        st.tuples(st.just("tick"), st.integers(0, 40)),
    ),
    max_size=40,
)


def play(machine: Machine, steps: list[tuple[str, Any]]) -> None:
    """Each step that makes sense at that time."""
    for number, (what, detail) in enumerate(steps):
        ids = list(machine.asks)
        running = [id_ for id_ in ids if machine.running[id_]]
        if what == "submit":
            # Several tasks after one another, in each place.
            fields = {f: getattr(detail, f) for f in detail.__struct_fields__}
            machine.submit(Ask(**fields | {"id": str(number)}), tasks=detail.count * 2)
        elif what == "end" and running:
            machine.end(running[detail % len(running)])
        elif what == "cancel" and ids:
            machine.finish(ids[detail % len(ids)])
        elif what in ("suspend", "raise") and ids:
            id_ = ids[detail % len(ids)]
            change = {"count": 0} if what == "suspend" else {"priority": 5}
            machine.carry_out(machine.policy.change(id_, machine.now, **change))
            if what == "suspend":
                machine.suspended.add(id_)
        elif what == "reserve":
            machine.reserve(cpus(detail) | {"gpu": 0})
        elif what == "queue":
            machine.queue(*detail)
        elif what == "bury" and machine.dying:
            machine.bury()
        elif what == "tick":
            machine.tick(detail)


def settle(machine: Machine) -> int:
    """Let everything that has to end do so; the number of rounds that it took."""
    for rounds in range(20):
        while machine.dying:
            machine.bury()
        if not machine.tick(1000):
            return rounds
    raise AssertionError("jobs take places from each other for ever")


@settings(max_examples=150, deadline=None)
@given(QUEUES, STEPS, st.booleans(), st.sampled_from((0, 2, 64)))
def test_no_limit_is_ever_passed_whatever_happens(
    specs: dict[str, QueueSpec], steps: list[tuple[str, Any]], is_slow: bool, passed_max: int
):
    """The machine's, a quota with what it may borrow, a cohort's, what may be lent, a gang's."""
    machine = Machine(cpus(8) | {"gpu": 2}, is_slow=is_slow, passed_max=passed_max)
    for name, each in specs.items():
        machine.queue(name, each)
    play(machine, steps)


@settings(max_examples=100, deadline=None)
@given(QUEUES, STEPS, st.booleans(), st.sampled_from((0, 2, 64)))
def test_nobody_takes_places_from_each_other_in_a_circle(
    specs: dict[str, QueueSpec], steps: list[tuple[str, Any]], is_slow: bool, passed_max: int
):
    """When nothing more happens, it is still before long."""
    machine = Machine(cpus(8) | {"gpu": 2}, is_slow=is_slow, passed_max=passed_max)
    for name, each in specs.items():
        machine.queue(name, each)
    play(machine, steps)

    assert settle(machine) <= 3


@settings(max_examples=100, deadline=None)
@given(QUEUES, STEPS, st.booleans(), st.sampled_from((0, 2, 64)))
def test_every_job_that_can_ends_when_no_more_come(
    specs: dict[str, QueueSpec], steps: list[tuple[str, Any]], is_slow: bool, passed_max: int
):
    """There is always one that runs, until only those are left for which there is no room."""
    machine = Machine(cpus(8) | {"gpu": 2}, is_slow=is_slow, passed_max=passed_max)
    for name, each in specs.items():
        machine.queue(name, each)
    play(machine, steps)
    machine.reserve({"cpu": 0, "gpu": 0})
    for id_ in machine.suspended & machine.asks.keys():
        machine.finish(id_)
    while machine.asks:
        settle(machine)
        running = [id_ for id_ in machine.asks if machine.running[id_]]
        if not running:
            break
        machine.end(running[len(machine.done) % len(running)])

    said = [machine.policy.why(id_) for id_ in machine.asks]
    assert [why for why in said if "for jobs there are" not in why and "may hold" not in why] == []
    held = [use.held or use.promised for use in machine.policy.queues()]
    assert not any(held)


@settings(max_examples=60, deadline=None)
@given(st.permutations("abcde"), st.integers(5, 23), st.integers(2, 5))
def test_where_all_want_everything_shares_become_equal(order: list[str], number: int, many: int):
    """To one place, in whatever order they come."""
    machine = Machine(cpus(number))
    for name in order[:many]:
        machine.submit(ask(name, name, count=100), tasks=1000)
        settle(machine)
    shares = [machine.running[name] for name in order[:many]]

    assert sum(shares) == number
    assert max(shares) - min(shares) <= 1


# ---- gangs: the bar -----------------------------------------------------------------------------


def arrival_order(random: Random, number: int = 10) -> int:
    """Two gangs that each need 60 % of the machine, small jobs among them, and cancels.

    How many gangs ended; everything has, or it is stuck and an assertion fails.
    """
    machine = Machine(cpus(number), passed_max=4, is_checked=False)
    size = number * 6 // 10
    asks = [gang("gang1", size, random.choice("ab")), gang("gang2", size, random.choice("ab"))]
    for small in range(random.randrange(6)):
        count = random.randrange(1, 5)
        asks.append(ask(f"small{small}", random.choice("abc"), count=count))
    random.shuffle(asks)
    cancelled = {a.id for a in asks if random.random() < 0.1}
    while asks or machine.asks:
        if asks and random.random() < 0.5:
            machine.submit(asks.pop())
        else:
            running = [id_ for id_ in machine.asks if machine.running[id_]]
            assert running or asks or not machine.asks, machine.policy
            if running:
                machine.end(random.choice(running))
        if machine.asks and cancelled and random.random() < 0.1:
            for id_ in cancelled & machine.asks.keys():
                machine.finish(id_)
        assert sum(machine.running.values()) <= number
        assert {machine.may["gang1"], machine.may["gang2"]} <= {0, size}
    return sum(id_.startswith("gang") for id_ in machine.done)


def test_two_gangs_of_60_percent_end_in_10000_orders_of_arrival():
    """No deadlock, no partial hold (see `Machine.check`), whatever comes between."""
    random = Random(1)

    assert all(arrival_order(random) == 2 for _ in range(10_000))
