"""PoolState against a model of the machine: random facts, and laws that hold after each of them."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Final

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from msgspec import structs

from dayfly_pool.commands import Assign, Command, Create, Destroy, Refuse, Retire, Specialize, Warm
from dayfly_pool.errors import FunctionNotFound, QueueFull
from dayfly_pool.models import Failure, Function, FunctionId, InvocationId, Mold, SandboxId
from dayfly_pool.records import Phase, ZygoteLimits
from dayfly_pool.state import PoolState
from dayfly_pool.testing import function

NAMES = ("ant", "bee", "cat")
MOLDS: Final = {"base": "", "other": "own"}
"""Environments, and the namespaces that may fork in them."""

SETTLED_AFTER_TICKS = 100
SPECS = st.fixed_dictionaries(
    {
        "max_scale": st.integers(1, 4),
        "min_scale": st.sampled_from((0, 0, 0, 1, 2)),
        "concurrency": st.sampled_from((1, 1, 2, 3)),
        "keep_alive_seconds": st.sampled_from((0, 1, 60)),
        "queue_max": st.sampled_from((2, 50)),
        "initialize": st.sampled_from(("auto", "auto", "once", "each")),
    }
)


@dataclass
class Live:
    """One sandbox of the modelled machine."""

    mold: Mold
    phase: Phase = Phase.STARTING
    function: Function | None = None
    slots: int = 1
    running: set[InvocationId] = field(default_factory=set)


class Machine(RuleBasedStateMachine):
    """Carries out every command on a modelled machine, which refuses what no machine could do."""

    @initialize(
        sandboxes_max=st.integers(1, 6),
        starts_max=st.integers(1, 3),
        generic_max=st.integers(0, 2),
        at_once=st.integers(1, 3),
    )
    def begin(self, sandboxes_max: int, starts_max: int, generic_max: int, at_once: int) -> None:
        self.state = PoolState(
            generic_max=min(generic_max, sandboxes_max),
            sandboxes_max=sandboxes_max,
            starts_max=starts_max,
            zygotes=ZygoteLimits(forks=3, age_s=200.0, idle_s=50.0, once_s=1.0, at_once=at_once),
        )
        self.zygotes: dict[SandboxId, bool] = {}
        """Those that live, and whether they are ready."""

        self.molds: dict[SandboxId, Mold] = {}
        """What the zygotes' sandboxes are made of."""

        self.now, self.numbers, self.versions = 0.0, count(1), count(1)
        self.alive: dict[SandboxId, Live] = {}
        self.gone: list[SandboxId] = []
        self.deployed: dict[FunctionId, Function] = {}
        self.waiting: dict[InvocationId, FunctionId] = {}
        self.running: dict[InvocationId, SandboxId] = {}
        self.answered: set[InvocationId] = set()
        self.dying: SandboxId | None = None

    # ---- what the machine does ------------------------------------------------------------------

    def carry_out(self, commands: Iterable[Command]) -> None:
        for command in commands:
            match command:
                case Warm(zygote, mold, function, parent):
                    assert mold.namespace, "nothing may be forked there"
                    assert zygote not in self.zygotes
                    assert (function is None) == (parent is None) == (mold.function == "")
                    if function is not None and parent is not None:
                        assert self.zygotes[parent], "it cannot fork"
                        assert self.molds[parent] == function.mold
                        assert self.deployed[function.id] is function, "an old version is loaded"
                        assert function.spec.initialize != "each"
                    self.zygotes[zygote], self.molds[zygote] = False, mold
                case Retire(zygote):
                    self.zygotes.pop(zygote, None)
                case Create(sandbox, mold, _, zygote):
                    assert zygote is None or self.zygotes[zygote], "it cannot fork"
                    assert zygote is None or self.molds[zygote] == mold
                    assert zygote is not None or not mold.function
                    assert sandbox not in self.alive
                    assert sandbox not in self.gone, "a sandbox's name is never used again"
                    self.alive[sandbox] = Live(mold)
                    assert len(self.alive) <= self.state.sandboxes_max
                case Specialize(sandbox, function):
                    live = self.alive[sandbox]
                    assert live.phase is Phase.GENERIC
                    own = f"{function.id}@{function.version}" if live.mold.function else ""
                    assert live.mold == structs.replace(function.mold, function=own)
                    assert self.deployed[function.id] is function, "an old version is loaded"
                    live.phase, live.function = Phase.LOADING, function
                case Assign(sandbox, invocation):
                    self.assign(sandbox, invocation)
                case Destroy(sandbox):
                    live = self.alive.pop(sandbox)
                    assert sandbox == self.dying or not live.running, "it was still working"
                    self.gone.append(sandbox)
                case Refuse(invocation):
                    del self.waiting[invocation]
                    self.answered.add(invocation)

    def assign(self, sandbox: SandboxId, invocation: InvocationId) -> None:
        live = self.alive[sandbox]
        id_ = self.waiting.pop(invocation)
        assert live.function is self.deployed[id_], "another function, or an old version of it"
        assert live.phase in (Phase.IDLE, Phase.BUSY)
        live.phase = Phase.BUSY
        live.running.add(invocation)
        assert len(live.running) <= live.slots
        self.running[invocation] = sandbox

    def in_phase(self, *phases: Phase) -> list[SandboxId]:
        return [sandbox for sandbox, live in self.alive.items() if live.phase in phases]

    def choose(self, data: st.DataObject, *phases: Phase) -> SandboxId:
        return data.draw(st.sampled_from(self.in_phase(*phases)))

    # ---- facts ----------------------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), mold=st.sampled_from(sorted(MOLDS)), spec=SPECS)
    def deploy(self, name: str, mold: str, spec: dict[str, int]) -> None:
        spec["min_scale"] = min(spec["min_scale"], spec["max_scale"])
        version = str(next(self.versions))
        each = function(name, version=version, environment=mold, namespace=MOLDS[mold], **spec)
        self.deployed[each.id] = each
        self.carry_out(self.state.deploy(each, self.now))

    @rule(name=st.sampled_from(NAMES))
    def remove(self, name: str) -> None:
        id_ = FunctionId(f"default/{name}")
        self.carry_out(self.state.remove(id_, self.now))
        self.deployed.pop(id_, None)
        assert id_ not in self.waiting.values()

    @rule(mold=st.sampled_from(sorted(MOLDS)), least=st.integers(0, 2))
    def add_mold(self, mold: str, least: int) -> None:
        each = Mold(mold, "none", MOLDS[mold])
        self.carry_out(self.state.add_mold(each, least, self.now))

    @precondition(lambda self: not all(self.zygotes.values()))
    @rule(data=st.data())
    def warmed(self, data: st.DataObject) -> None:
        cold = [zygote for zygote, is_ready in self.zygotes.items() if not is_ready]
        self.get_warm(data.draw(st.sampled_from(cold)))

    def get_warm(self, zygote: SandboxId) -> None:
        self.zygotes[zygote] = True
        self.carry_out(self.state.warmed(zygote, self.now))

    @precondition(lambda self: self.zygotes)
    @rule(data=st.data(), unfit=st.sampled_from(("", "no")), has_failed=st.booleans())
    def chilled(self, data: st.DataObject, unfit: str, has_failed: bool) -> None:
        zygote = data.draw(st.sampled_from(list(self.zygotes)))
        del self.zygotes[zygote]
        failure = Failure("ImportFailed", "no") if has_failed else None
        self.carry_out(self.state.chilled(zygote, self.now, unfit=unfit, failure=failure))
        assert self.state.chilled(zygote, self.now) == []

    @rule(name=st.sampled_from(NAMES), number=st.integers(1, 4))
    def submit(self, name: str, number: int) -> None:
        id_ = FunctionId(f"default/{name}")
        for _ in range(number):
            invocation = InvocationId(f"i{next(self.numbers)}")
            self.waiting[invocation] = id_
            try:
                self.carry_out(self.state.submit(invocation, id_, self.now))
            except (FunctionNotFound, QueueFull):
                del self.waiting[invocation]

    @precondition(lambda self: self.waiting or self.running)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        invocation = data.draw(st.sampled_from([*self.waiting, *self.running]))
        was_waiting = self.waiting.pop(invocation, None) is not None
        assert self.state.abandon(invocation) is was_waiting

    @precondition(lambda self: self.in_phase(Phase.STARTING))
    @rule(data=st.data())
    def ready(self, data: st.DataObject) -> None:
        self.get_ready(self.choose(data, Phase.STARTING))

    def get_ready(self, sandbox: SandboxId) -> None:
        self.alive[sandbox].phase = Phase.GENERIC
        self.carry_out(self.state.ready(sandbox, self.now))

    @precondition(lambda self: self.in_phase(Phase.LOADING))
    @rule(
        data=st.data(),
        slots=st.integers(1, 3),
        import_s=st.sampled_from((0.001, 0.1, 5.0)),
        leftovers=st.sampled_from(("", "", "2 threads")),
    )
    def loaded(self, data: st.DataObject, slots: int, import_s: float, leftovers: str) -> None:
        self.get_loaded(self.choose(data, Phase.LOADING), slots, import_s, leftovers)

    def get_loaded(
        self, sandbox: SandboxId, slots: int, import_s: float = 0.001, leftovers: str = ""
    ) -> None:
        live = self.alive[sandbox]
        assert live.function is not None
        live.phase, live.slots = Phase.IDLE, min(slots, live.function.spec.concurrency)
        facts = {"import_s": import_s, "busy_s": import_s / 2, "leftovers": leftovers}
        self.carry_out(self.state.loaded(sandbox, live.slots, self.now, **facts))  # type: ignore[arg-type]

    @precondition(lambda self: self.in_phase(Phase.LOADING))
    @rule(data=st.data())
    def load_failed(self, data: st.DataObject) -> None:
        sandbox = self.choose(data, Phase.LOADING)
        failure = Failure("ImportFailed", "no")
        self.carry_out(self.state.load_failed(sandbox, failure, self.now))
        assert sandbox not in self.alive

    @precondition(lambda self: self.running)
    @rule(data=st.data(), handler_s=st.sampled_from((0.001, 0.1, 5.0)))
    def finished(self, data: st.DataObject, handler_s: float) -> None:
        self.get_finished(data.draw(st.sampled_from(list(self.running))), handler_s)

    def get_finished(self, invocation: InvocationId, handler_s: float) -> None:
        sandbox = self.running.pop(invocation)
        self.answered.add(invocation)
        live = self.alive[sandbox]
        live.running.remove(invocation)
        live.phase = Phase.BUSY if live.running else Phase.IDLE
        self.carry_out(self.state.finished(sandbox, invocation, handler_s, self.now))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def died(self, data: st.DataObject) -> None:
        sandbox = data.draw(st.sampled_from(list(self.alive)))
        self.dying = sandbox
        for invocation in self.alive[sandbox].running:  # the connection tells them
            self.answered.add(invocation)
            del self.running[invocation]
        self.carry_out(self.state.died(sandbox, self.now))
        assert sandbox not in self.alive
        self.dying = None

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def hear_late_of_the_dead(self, data: st.DataObject) -> None:
        sandbox = data.draw(st.sampled_from(self.gone))
        state, now, invocation = self.state, self.now, InvocationId("i1")

        assert state.ready(sandbox, now) == []
        assert state.loaded(sandbox, 1, now) == []
        assert state.load_failed(sandbox, Failure("ImportFailed", "no"), now) == []
        assert state.finished(sandbox, invocation, 0.1, now) == []
        assert state.died(sandbox, now) == []

    @rule(seconds=st.sampled_from((0.0, 0.01, 0.3, 1.0, 100.0)), is_short=st.booleans())
    def tick(self, seconds: float, is_short: bool = False) -> None:
        self.now += seconds
        self.carry_out(self.state.tick(self.now, is_short_of_memory=is_short))

    # ---- laws -----------------------------------------------------------------------------------

    @invariant()
    def the_state_and_the_machine_agree(self) -> None:
        boxes = self.state.sandboxes

        assert {id_: box.phase for id_, box in boxes.items()} == {
            id_: live.phase for id_, live in self.alive.items()
        }
        assert {id_: box.running for id_, box in boxes.items()} == {
            id_: live.running for id_, live in self.alive.items()
        }

    @invariant()
    def every_invocation_is_in_one_place(self) -> None:
        queues = [i for record in self.state.functions.values() for i in record.queue]

        assert sorted(queues) == sorted(self.waiting)
        assert self.state.waiting == len(self.waiting)
        assert self.state._queued == self.waiting
        assert not self.waiting.keys() & self.running.keys()
        assert not self.answered & (self.waiting.keys() | self.running.keys())

    @invariant()
    def the_limits_hold(self) -> None:
        state = self.state

        assert len(state.sandboxes) <= state.sandboxes_max
        for record in state.functions.values():
            assert len(record.sandboxes) <= record.function.spec.max_scale
            assert len(record.queue) <= 50

    @invariant()
    def the_indexes_equal_a_recount_of_functions(self) -> None:
        current = [box for box in self.state.sandboxes.values() if box.function and not box.stale]
        for id_, record in self.state.functions.items():
            own = [box for box in current if box.function is record.function]

            assert record.function is self.deployed[id_]
            assert set(record.sandboxes) == {box.id for box in own}
            assert set(record.idle) == {box.id for box in own if box.phase is Phase.IDLE}
            assert record.loading == sum(box.phase is Phase.LOADING for box in own)
            assert set(record.open) == {
                box.id for box in own if box.phase is Phase.BUSY and len(box.running) < box.slots
            }
            assert (id_ in self.state._minimums) == (record.function.spec.min_scale > 0)
        assert {box.function.id for box in current if box.function} <= set(self.state.functions)

    @invariant()
    def the_indexes_equal_a_recount_of_molds(self) -> None:
        state = self.state
        for mold, record in state.molds.items():
            boxes = [box for box in state.sandboxes.values() if box.mold == mold]
            users = [r for r in state.functions.values() if r.home == mold]
            declared = [
                r
                for r in state.functions.values()
                if mold == r.function.mold or (r.once and mold == r.own_mold)
            ]

            assert set(record.generic) == {b.id for b in boxes if b.phase is Phase.GENERIC}
            assert record.starting == sum(box.phase is Phase.STARTING for box in boxes)
            assert record.functions == len(declared)
            assert Counter(record.claims) == Counter(
                {user.function.id: user.claims for user in users if user.claims}
            )
        shelf = state._shelf
        idle = [id_ for group in shelf._groups.values() for id_ in group] + list(shelf._kept)
        assert sorted(idle) == sorted(i for r in state.functions.values() for i in r.idle)

    @invariant()
    def what_is_idle_is_ranked_once(self) -> None:
        ranked = [id_ for _, _, id_ in self.state._shelf._ranking]
        idle = {r.function.id for r in self.state.functions.values() if r.idle}

        assert len(ranked) == len(set(ranked))
        assert set(ranked) == self.state._shelf._ranked
        assert set(ranked) <= self.state.functions.keys()
        unkept = {
            r.function.id
            for r in self.state.functions.values()
            if any(id_ not in self.state._shelf._kept for id_ in r.idle)
        }
        assert unkept <= set(ranked) | (idle - unkept)

    @invariant()
    def every_zygote_is_a_molds_and_knows_its_forks(self) -> None:
        known = {}
        for record in self.state.molds.values():
            if record.zygote is not None:
                known[record.zygote.id] = True
            if record.warming is not None:
                known[record.warming.id] = False
            known |= dict.fromkeys(record.more, True)
            assert not record.more or (record.zygote and not record.mold.function)

        forking = Counter(
            box.zygote for box in self.state.sandboxes.values() if box.phase is Phase.STARTING
        )
        assert all(each.forking == forking[each.id] for each in self.state.zygotes.values())
        assert known == self.zygotes
        assert known.keys() == self.state.zygotes.keys()

    @invariant()
    def cold_work_is_bounded_and_each_tenant_has_a_part(self) -> None:
        state = self.state
        workers = [*state.sandboxes.values(), *state.zygotes.values()]
        work: dict[str, list[float]] = {}
        for worker in workers:
            if worker.work is not None:
                tenant, weight = worker.work
                work.setdefault(tenant, []).append(weight)

        assert {t: sum(weights) for t, weights in work.items()} == pytest.approx(
            state._turns._under_way
        )
        loading = [box for box in state.sandboxes.values() if box.phase is Phase.LOADING]
        loads = Counter(box.work[0] for box in loading if box.work)
        assert loads == state._loads
        for tenant, weights in work.items():
            first_load = max(weights) if loads[tenant] else 0.0
            assert len(weights) == 1 or sum(weights) - first_load <= state._turns._most
        for box in state.sandboxes.values():
            assert (box.work is not None) == (box.phase in (Phase.STARTING, Phase.LOADING))

    @invariant()
    def nobody_waits_beside_a_free_place(self) -> None:
        for record in self.state.functions.values():
            assert not (record.queue and (record.idle or record.open))
        for mold in self.state.molds.values():
            if mold.claims and mold.generic:
                tenant = self.state.functions[mold.claims[0]].function.namespace
                assert self.state._loads[tenant], "it would be its turn"

    @invariant()
    def claims_wait_only_for_what_comes(self) -> None:
        for mold in self.state.molds.values():
            if mold.claims and mold.mold.function:
                assert not mold.zygote_failures or mold.zygote

    def teardown(self) -> None:
        """When everything succeeds everyone is answered, and what is removed leaves nothing."""
        if not hasattr(self, "state"):
            return
        self.settle()
        assert not self.waiting, f"never answered: {self.waiting} in {self.state}"
        for id_ in list(self.deployed):
            self.remove(id_.partition("/")[2])
        for mold in list(self.state.molds):
            self.carry_out(self.state.add_mold(mold, 0, self.now))
        self.settle()
        state = self.state

        assert (state.sandboxes, state.molds, state.functions) == ({}, {}, {})
        assert (state._queued, state._minimums, state._shelf._groups) == ({}, {}, {})
        assert dict(state._shelf._kept) == {}
        assert (state._turns._under_way, state._turns._total, state._cramped) == ({}, 0, {})

    def settle(self) -> None:
        """Everything that is under way succeeds, until time changes nothing any more."""
        quiet = 0
        for _ in range(SETTLED_AFTER_TICKS):
            before = len(self.gone), len(self.alive), len(self.answered)
            for zygote in [z for z, is_ready in self.zygotes.items() if not is_ready]:
                self.get_warm(zygote)
            for sandbox in self.in_phase(Phase.STARTING):
                if sandbox in self.alive:
                    self.get_ready(sandbox)
            for sandbox in self.in_phase(Phase.LOADING):
                if sandbox in self.alive:
                    self.get_loaded(sandbox, 1)
            for invocation in list(self.running):
                self.get_finished(invocation, 0.01)
            self.tick(20.0, is_short=False)
            is_quiet = before == (len(self.gone), len(self.alive), len(self.answered))
            quiet = quiet + 1 if is_quiet else 0
            if quiet > 4:  # longer than any keep-alive or backoff
                return
        raise AssertionError(f"never at rest: {self.state}, waiting {self.waiting}")


@pytest.mark.timeout(60)
def test_the_laws_of_the_pool_hold_whatever_happens():
    """See the invariants of `Machine`; every random history also ends in rest and in nothing."""
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=50, stateful_step_count=40, deadline=None)
    )
