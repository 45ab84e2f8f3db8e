"""PoolState as a conversation: facts in, commands out, and the state as it reads in between."""

from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import pytest
from msgspec import structs

from dayfly_pool.commands import (
    Assign,
    Command,
    Create,
    Destroy,
    Refuse,
    Retire,
    Specialize,
    StartKind,
    Warm,
)
from dayfly_pool.errors import FunctionNotFound, QueueFull
from dayfly_pool.models import (
    Failure,
    Function,
    InvocationId,
    Mold,
    SandboxId,
    function_id,
)
from dayfly_pool.records import NEXT, Phase, SandboxRecord, ZygoteLimits
from dayfly_pool.state import LOST_LOADS_MAX, PASSING_IDLE_S, PoolState
from dayfly_pool.testing import function

BASE = Mold("base")
OTHER = Mold("other")
GREET, SHOUT = function("greet"), function("shout")
GREET_2 = function("greet", version="2")
I1, I2, I3, I4, I5 = (InvocationId(f"i{n}") for n in range(1, 6))
S1, S2, S3, S4, S5 = (SandboxId(f"sb-{n}") for n in range(1, 6))
BROKEN = Failure("ImportFailed", "no module named nothere")

OWN, THEIRS = Mold("base", "none", "own"), Mold("base", "none", "theirs")
"""Molds that may have a zygote."""

FORKED = function("greet", namespace="own")
Z1, Z2, Z3, Z4, Z5, Z6, Z7 = (SandboxId(f"sb-z{n}") for n in range(1, 8))
ZYGOTE_LIMITS = ZygoteLimits(forks=3, age_s=200, idle_s=50)


def pool(
    *,
    generic_max: int = 0,
    sandboxes_max: int = 8,
    starts_max: int = 8,
    unknown_weight: float = 1.0,
) -> PoolState:
    """With *generic_max* 0 nothing is refilled but what `add_mold` asks for."""
    return PoolState(
        generic_max=generic_max,
        sandboxes_max=sandboxes_max,
        starts_max=starts_max,
        zygotes=ZYGOTE_LIMITS,
        unknown_weight=unknown_weight,
    )


def create(
    sandbox: SandboxId,
    mold: Mold = BASE,
    zygote: SandboxId | None = None,
    *,
    behind: bool = False,
) -> Create:
    """A start, or with *zygote* a fork, that somebody waits for."""
    return Create(sandbox, mold, claimed=True, zygote=zygote, behind=behind)


def refill(
    sandbox: SandboxId,
    mold: Mold = BASE,
    zygote: SandboxId | None = None,
    *,
    behind: bool = False,
) -> Create:
    """A start, or with *zygote* a fork, that nobody waits for yet."""
    return Create(sandbox, mold, claimed=False, zygote=zygote, behind=behind)


def deployed(*functions: Function, **limits: Any) -> PoolState:
    state = pool(**limits)
    for each in functions:
        deploy(state, each, 0)
    return state


def deploy(state: PoolState, each: Function, now: float) -> list[Command]:
    """As `Pool.deploy` does: what a function is made of is in use from then on."""
    commands = []
    if each.mold not in state.molds:
        commands = state.add_mold(each.mold, 0, now, pinned=False)
    return commands + state.deploy(each, now)


def of(tenant: str, name: str = "greet", **spec: Any) -> Function:
    """A function of *tenant*'s, as its sandboxes may be forked."""
    each = function(name, namespace=tenant, **spec)
    return structs.replace(each, id=function_id(tenant, name))


def play(state: PoolState, commands: Iterable[Command], now: float) -> None:
    """Carry out *commands*, and what follows from them, all successful: nothing is left to do."""
    todo = list(commands)
    while todo:
        match todo.pop(0):
            case Create(sandbox):
                todo += state.ready(sandbox, now)
            case Specialize(sandbox):
                todo += state.loaded(sandbox, 1, now)
            case Warm(zygote):
                todo += state.warmed(zygote, now)
            case Assign() | Destroy() | Refuse() | Retire():
                pass


def make_busy(state: PoolState, each: Function, *invocations: InvocationId, now: float = 0) -> None:
    """*invocations* are running, each in a sandbox of its own where there is none free."""
    for invocation in invocations:
        play(state, state.submit(invocation, each.id, now), now)


def warm(state: PoolState, each: Function, number: int = 1, now: float = 0) -> list[SandboxId]:
    """*number* idle sandboxes that hold the function; the last in the list was used last."""
    names = [InvocationId(f"warm-{each.id}-{n}") for n in range(number)]
    make_busy(state, each, *names, now=now)
    boxes = [box.id for n in names for box in state.sandboxes.values() if n in box.running]
    for box, name in zip(boxes, names, strict=True):
        state.finished(box, name, 0.01, now)
    return boxes


def starts(commands: Iterable[Command]) -> int:
    return sum(isinstance(command, Create) for command in commands)


# ---- one invocation -----------------------------------------------------------------------------


def test_the_first_call_of_all_creates_specializes_and_runs():
    """Nothing is there: a pool miss, told as `created`."""
    state = deployed(GREET)

    assert repr(state) == "<PoolState [empty | 0 waiting]>"
    assert state.submit(I1, GREET.id, 1.0) == [create(S1)]
    assert repr(state) == "<PoolState [1 starting | 1 waiting]>"
    assert state.ready(S1, 1.1)[:1] == [Specialize(S1, GREET)]
    assert state.loaded(S1, 1, 1.2) == [Assign(S1, I1, "created")]
    assert state.sandboxes[S1].running == {I1}
    assert state.finished(S1, I1, 0.01, 1.3) == []
    assert state.sandboxes[S1].phase.value == "idle"
    assert state.misses == 1


def test_what_survived_a_server_is_used_as_if_this_one_had_made_it():
    """A generic one, and one that holds the function: neither is made again."""
    state = pool()

    assert state.survived(S1, GREET.mold, 0) == []
    assert state.add_mold(GREET.mold, 1, 0) == []
    assert deploy(state, GREET, 0) == []
    assert state.survived_with(S2, GREET, 1, 0) == []
    assert repr(state) == "<PoolState [1 generic, 1 idle | 0 waiting]>"
    assert state.submit(I1, GREET.id, 1) == [Assign(S2, I1, "warm")]
    assert state.submit(I2, GREET.id, 1)[:1] == [Specialize(S1, GREET)]


def test_what_waits_is_run_where_the_function_survived():
    state = deployed(GREET)
    state.submit(I1, GREET.id, 0)

    assert state.survived_with(S2, GREET, 1, 0) == [Assign(S2, I1, "warm")]


def test_a_sandbox_that_others_end_takes_nothing_more():
    """Idle or generic it goes at once, busy after what it runs; it is replaced where needed."""
    state = pool()
    play(state, deploy(state, function("greet", min_scale=2), 0), 0)
    play(state, state.submit(I1, GREET.id, 0), 0)
    busy, idle = sorted(state.sandboxes.values(), key=lambda box: box.phase is Phase.IDLE)

    assert Destroy(idle.id, "leaving") in state.leaving(idle.id, 1)
    play(state, state.leaving(busy.id, 1), 1)
    assert state.leaving(busy.id, 1) == []
    assert busy.running == {I1}
    play(state, state.submit(I2, GREET.id, 1), 1)
    assert I2 not in busy.running
    assert state.finished(busy.id, I1, 0.1, 2)[:1] == [Destroy(busy.id, "updated")]
    assert busy.id not in state.sandboxes


def test_a_generic_sandbox_answers_a_claim_at_once_and_is_replaced():
    """A pool hit: the claim does not wait, and the refill starts as soon as one is taken."""
    state = deployed(GREET)
    play(state, state.add_mold(BASE, 1, 0), 0)

    assert repr(state) == "<PoolState [1 generic | 0 waiting]>"
    assert state.submit(I1, GREET.id, 1) == [Specialize(S1, GREET), refill(S2)]
    assert repr(state) == "<PoolState [1 starting, 1 loading | 1 waiting]>"
    assert state.loaded(S1, 1, 1) == [Assign(S1, I1, "generic")]
    assert state.ready(S2, 1) == []
    assert repr(state) == "<PoolState [1 generic, 1 busy | 0 waiting]>"
    assert state.misses == 0


def test_nothing_is_kept_ready_for_a_batch():
    """Nobody waits for it, and what was made for it would do for nobody else."""
    batch = structs.replace(GREET, mold=structs.replace(BASE, batch=True), is_batch=True)
    state = deployed(batch, generic_max=4)
    for second, invocation in enumerate((I1, I2, I3)):
        play(state, state.submit(invocation, batch.id, second), second)
    play(state, state.tick(3), 3)

    assert repr(state) == "<PoolState [3 busy | 0 waiting]>"


def test_a_warm_sandbox_is_preferred_to_a_generic_one():
    """A sandbox that already holds the function wins over specializing another."""
    state = deployed(GREET)
    play(state, state.add_mold(BASE, 1, 0), 0)
    (box,) = warm(state, GREET)

    assert state.submit(I1, GREET.id, 1) == [Assign(box, I1, "warm")]


def test_of_the_warm_the_one_used_last_comes_first():
    """The others grow old and can be reaped; a rotating choice would keep them all alive."""
    state = deployed(GREET)
    first, second = warm(state, GREET, 2)

    assert state.submit(I1, GREET.id, 1) == [Assign(second, I1, "warm")]
    assert state.submit(I2, GREET.id, 1) == [Assign(first, I2, "warm")]


def test_a_sandbox_that_was_loaded_for_nobody_starts_its_first_invocation_warm():
    """Only an invocation that waited for a start is told of it."""
    eager = function("greet", min_scale=1)
    state = pool()
    play(state, state.deploy(eager, 0), 0)

    assert [type(c) for c in state.tick(0)] == []
    assert state.submit(I1, eager.id, 60) == [Assign(S1, I1, "warm")]


def test_an_unknown_function_is_refused_and_nothing_kept():
    state = pool()

    with pytest.raises(FunctionNotFound):
        state.submit(I1, GREET.id, 0)
    assert repr(state) == "<PoolState [empty | 0 waiting]>"


def test_a_full_queue_refuses_the_next_and_keeps_nothing_of_it():
    """Queues are bounded: queueMax wait, whoever comes then is told at once."""
    small = function("greet", queue_max=2, max_scale=1)
    state = deployed(small)
    for invocation in (I1, I2):
        state.submit(invocation, small.id, 0)

    with pytest.raises(QueueFull):
        state.submit(I3, small.id, 0)
    assert state.waiting == 2
    assert not state.abandon(I3)


# ---- several at once ----------------------------------------------------------------------------


def test_whichever_is_free_first_takes_the_head_of_the_queue():
    """Late binding: the sandbox that is being made for an invocation may come too late for it."""
    state = deployed(GREET)
    make_busy(state, GREET, I1)
    assert state.submit(I2, GREET.id, 1) == [create(S2)]
    assert state.ready(S2, 1)[0] == Specialize(S2, GREET)

    assert state.finished(S1, I1, 0.01, 2) == [Assign(S1, I2, "warm")]
    assert state.loaded(S2, 1, 3) == []
    assert state.submit(I3, GREET.id, 4) == [Assign(S2, I3, "warm")]


def test_the_new_sandbox_takes_the_head_when_it_is_first():
    """The other side of late binding."""
    state = deployed(GREET)
    make_busy(state, GREET, I1)
    state.submit(I2, GREET.id, 1)
    state.submit(I3, GREET.id, 1)
    state.ready(S2, 1)

    assert state.loaded(S2, 1, 2) == [Assign(S2, I2, "created")]
    assert state.finished(S1, I1, 0.01, 3) == [Assign(S1, I3, "warm")]


@pytest.mark.parametrize(("calls", "max_scale", "made"), [(1, 9, 1), (5, 9, 5), (50, 3, 3)])
def test_first_calls_at_the_same_moment_make_no_more_sandboxes_than_calls(
    calls: int, max_scale: int, made: int
):
    """Single flight: never more than min(calls, maxScale) are started or specialized."""
    each = function("greet", max_scale=max_scale)
    state = deployed(each, sandboxes_max=100, starts_max=100)
    commands: list[Command] = []
    for number in range(calls):
        commands += state.submit(InvocationId(f"{number}"), each.id, 0)

    assert starts(commands) == made
    play(state, commands, 0)
    assert len(state.functions[each.id].sandboxes) == made


def test_calls_that_share_a_sandbox_make_one_together():
    """Ten calls of a function with concurrency 10 need one sandbox, not ten."""
    shared = function("greet", concurrency=10)
    state = deployed(shared)
    commands = [c for n in range(10) for c in state.submit(InvocationId(str(n)), shared.id, 0)]

    assert commands == [create(S1)]


def test_claims_are_answered_in_the_order_they_were_made():
    """Whichever sandbox gets ready first goes to the function that has waited longest."""
    state = deployed(GREET, SHOUT)
    state.submit(I1, GREET.id, 0)
    state.submit(I2, SHOUT.id, 0)

    assert state.ready(S2, 1)[0] == Specialize(S2, GREET)
    assert state.ready(S1, 1)[0] == Specialize(S1, SHOUT)


def test_a_claim_that_nobody_needs_any_more_evicts_nothing():
    """In a full pool the warm sandbox took the invocation: it must not end for it later."""
    state = deployed(GREET, sandboxes_max=1)
    make_busy(state, GREET, I1)
    assert state.submit(I2, GREET.id, 1) == []
    assert state.finished(S1, I1, 0.01, 1) == [Assign(S1, I2, "warm")]

    assert state.finished(S1, I2, 0.01, 2) == []
    assert state.tick(3) == []


def test_a_claim_that_nobody_needs_any_more_leaves_the_sandbox_generic():
    """The warm sandbox was faster: no function is loaded for nobody."""
    state = deployed(GREET)
    make_busy(state, GREET, I1)
    assert state.submit(I2, GREET.id, 1) == [create(S2)]
    assert state.finished(S1, I1, 0.01, 1) == [Assign(S1, I2, "warm")]

    assert state.ready(S2, 1) == []
    assert repr(state) == "<PoolState [1 generic, 1 busy | 0 waiting]>"


def test_a_further_start_is_not_made_when_the_busy_ones_are_faster():
    """50 ms to start one against 1 ms until the next is free: waiting is the faster way."""
    state = deployed(GREET)
    warm(state, GREET)
    state.functions[GREET.id].handler_s = 0.001
    state.molds[BASE].start_s = 0.05
    make_busy(state, GREET, I1, now=1)

    assert state.submit(I2, GREET.id, 1) == []
    assert starts(state.tick(1.02)) == 0
    assert starts(state.tick(1.2)) == 1  # it waited longer than a start takes: the estimate is off


def test_work_at_once_is_limited_and_what_is_waited_for_comes_first():
    """Each start slows the others, and so does each import: the refill waits for the claims."""
    each = of("mine")
    state = deployed(each, starts_max=2)
    state.add_mold(each.mold, 4, 0)
    assert state.chilled(Z1, 0, unfit="no") == [refill(S2, each.mold), refill(S3, each.mold)]
    for invocation in (I1, I2, I3):
        assert state.submit(invocation, each.id, 0) == []

    assert state.ready(S2, 1) == [Specialize(S2, each)]  # and a start is under way
    assert state.ready(S3, 1) == [Specialize(S3, each, behind=True)]
    waited_for = create(S4, each.mold, behind=True)
    assert state.loaded(S2, 1, 1) == [Assign(S2, I1, "created"), waited_for]
    extra = refill(S5, each.mold, behind=True)
    assert state.loaded(S3, 1, 1) == [Assign(S3, I2, "created"), extra]


def test_what_is_ready_is_loaded_before_more_is_started():
    """Of what waits for its turn, the load: who waits for it has waited for a start already."""
    each = of("mine")
    state = deployed(each, starts_max=2)
    state.chilled(Z1, 0, unfit="no")
    for invocation in (I1, I2, I3, I4):
        state.submit(invocation, each.id, 0)
    first, second = state.sandboxes

    assert state.ready(first, 1) == [Specialize(first, each)]
    assert state.ready(second, 1) == [Specialize(second, each, behind=True)]
    assert starts(state.tick(1)) == 0


def burst(state: PoolState, each: Function, number: int, now: float) -> list[Command]:
    """*number* first calls, all at the same moment."""
    names = [InvocationId(f"{each.id}-{n}") for n in range(number)]
    return [command for name in names for command in state.submit(name, each.id, now)]


def made_for(commands: Iterable[Command]) -> list[str]:
    """The namespace of every sandbox that is made."""
    return [command.mold.namespace for command in commands if isinstance(command, Create)]


def test_a_burst_of_one_tenants_does_not_keep_another_from_starting():
    """Who comes after a hundred waits for nothing: there is always room for one of its own."""
    mine = [of("mine", f"f{i}") for i in range(100)]
    theirs = of("theirs")
    state = deployed(*mine, theirs, starts_max=2, sandboxes_max=500)
    assert sum(starts(burst(state, each, 1, 0)) for each in mine) == 2

    assert made_for(burst(state, theirs, 1, 0.1)) == ["theirs"]


def behind(commands: Iterable[Command]) -> list[bool]:
    """For every start and load: whether it goes behind those of others."""
    return [c.behind for c in commands if isinstance(c, Create | Specialize)]


def test_a_burst_goes_behind_and_who_makes_none_does_not():
    """Its first ones began when nobody knew that there would be more."""
    mine, theirs = [of("mine", f"f{i}") for i in range(100)], of("theirs")
    state = deployed(*mine, theirs, starts_max=2, sandboxes_max=500)
    first = [command for each in mine for command in burst(state, each, 1, 0)]
    assert behind(first) == [False, False]
    (ready, *_) = [c.sandbox for c in first if isinstance(c, Create)]
    loads = state.ready(ready, 0.01)
    assert behind(loads) == [True]

    begun = burst(state, theirs, 1, 0.02)
    assert behind(begun) == [False]
    (theirs_ready,) = [c.sandbox for c in begun if isinstance(c, Create)]
    assert behind(state.ready(theirs_ready, 0.03)) == [False]


def test_two_tenants_that_want_the_processors_have_half_of_them_each():
    """The burst that was first gives way as its starts end, and gets no more than its part."""
    mine, theirs = of("mine"), of("theirs")
    state = deployed(mine, theirs, starts_max=4, sandboxes_max=500)
    assert made_for(burst(state, mine, 50, 0)) == ["mine"] * 4
    assert made_for(burst(state, theirs, 50, 0)) == ["theirs"]

    for _ in range(20):
        starting = [b.id for b in state.sandboxes.values() if b.phase is Phase.STARTING]
        for box in starting:
            play_one(state, box, 0.5)
    under_way = Counter(b.work[0] for b in state.sandboxes.values() if b.work)
    assert under_way == {"mine": 2, "theirs": 2}


def play_one(state: PoolState, box: SandboxId, now: float) -> None:
    """*box* gets ready, and all that can be loaded is loaded."""
    state.ready(box, now)
    while loading := [b.id for b in state.sandboxes.values() if b.phase is Phase.LOADING]:
        state.loaded(loading[0], 1, now)


def test_a_claim_of_one_tenants_does_not_wait_for_the_refills_of_another():
    """Nor do forks, which cost half, take what is kept free."""
    mine, theirs = of("mine"), of("theirs")
    state = deployed(theirs, mine, starts_max=1)
    state.tick(0)
    (zygote,) = (z.id for z in state.zygotes.values() if z.mold == mine.mold)
    state.warmed(zygote, 0)
    assert forks(state.add_mold(mine.mold, 5, 0)) == [zygote, zygote]

    assert forks(state.submit(I1, theirs.id, 0)) == [None]


def test_within_a_tenant_molds_take_turns():
    """A claim on one waits for one refill of another's, not for all."""
    here, there = of("mine"), of("mine", "shout", environment="other")
    state = deployed(here, there, starts_max=1, sandboxes_max=50)
    for zygote in warms(state.tick(0)):
        state.chilled(zygote, 0, unfit="no")
    refills = state.add_mold(here.mold, 10, 0)
    state.submit(I1, there.id, 0)
    made = [command for command in refills if isinstance(command, Create)]
    while made[-1].mold != there.mold:
        made += [c for c in state.ready(made[-1].sandbox, 0) if isinstance(c, Create)]

    assert [command.mold for command in made] == [here.mold, here.mold, there.mold]


def test_a_tenants_work_in_foreign_molds_keeps_no_other_tenants_from_starting_there():
    """Nothing is forked for either; their sandboxes are the same until they are loaded."""
    mine = structs.replace(function("greet"), id=function_id("mine", "greet"))
    theirs = function("greet", environment="other")
    state = deployed(mine, theirs, starts_max=2)
    assert starts(burst(state, mine, 4, 0)) == 2

    assert starts(burst(state, theirs, 1, 0.1)) == 1


def test_a_tenants_claims_are_passed_over_when_it_is_anothers_turn_to_load():
    """In the mold that they share, the first in the queue may have enough under way."""
    mine = structs.replace(GREET, id=function_id("mine", "greet"))
    theirs = structs.replace(GREET, id=function_id("theirs", "greet"))
    state = deployed(mine, theirs, starts_max=4)
    state.add_mold(BASE, 4, 0)
    burst(state, mine, 4, 0)
    burst(state, theirs, 1, 0)
    loaded = [c for s in (S1, S2, S3) for c in state.ready(s, 0) if isinstance(c, Specialize)]

    assert theirs in [command.function for command in loaded]


def test_an_unknown_import_keeps_none_of_its_tenants_other_molds_waiting():
    """Two of its loads are under way, which is all it may have; there is room for other work."""
    heavy, light = of("mine", "heavy"), of("mine", "light", environment="other")
    state = deployed(heavy, light, starts_max=2, unknown_weight=0.25)
    boxes = [c.sandbox for c in burst(state, heavy, 4, 0) if isinstance(c, Create)]
    while boxes:
        made = state.ready(boxes.pop(), 0)
        boxes += [c.sandbox for c in made if isinstance(c, Create)]
    assert (state.phases()[Phase.LOADING], state.phases()[Phase.GENERIC] > 0) == (2, True)

    assert starts(burst(state, light, 1, 0.1)) == 1


def test_what_an_unknown_import_kept_waiting_goes_on_as_soon_as_it_is_known():
    state = deployed(heavy := of("mine", "heavy"), starts_max=2, unknown_weight=0.25)
    boxes = [c.sandbox for c in burst(state, heavy, 4, 0) if isinstance(c, Create)]
    loads: list[Specialize] = []
    while boxes:
        made = state.ready(boxes.pop(), 0)
        boxes += [c.sandbox for c in made if isinstance(c, Create)]
        loads += [c for c in made if isinstance(c, Specialize)]
    assert len(loads) == 2

    more = state.loaded(loads[0].sandbox, 1, 1, import_s=0.01)
    assert any(isinstance(command, Specialize) for command in more)


def test_tenants_that_have_as_much_under_way_come_in_the_order_in_which_they_asked():
    """And not in an order that changes from run to run."""
    each = [of(f"tenant{i}") for i in range(20)]
    state = deployed(*each)

    warmed = [command.mold for command in state.tick(0) if isinstance(command, Warm)]
    assert warmed == [function.mold for function in each]


def test_a_generic_sandbox_that_somebody_waits_for_is_no_surplus():
    """It waits for a turn to be loaded: another would have to be started in its place."""
    mine, theirs = of("mine"), of("theirs")
    state = deployed(mine, theirs, starts_max=2)
    first, second = (c.sandbox for c in burst(state, mine, 2, 0) if isinstance(c, Create))
    burst(state, theirs, 1, 0)
    assert state.ready(first, 0) == [Specialize(first, mine)]
    assert state.ready(second, 0) == []

    assert [c for c in state.tick(0.1) if isinstance(c, Destroy)] == []
    assert state.loaded(first, 1, 0.2)[-1] == Specialize(second, mine, behind=True)


def test_a_sandbox_that_is_ready_is_loaded_though_its_tenants_starts_take_all_of_its_part():
    """Starts would otherwise go on and on, and nothing ever be loaded; further ones wait."""
    mine, theirs = of("mine"), of("theirs")
    state = deployed(mine, theirs, starts_max=4)
    first, second, *_ = (c.sandbox for c in burst(state, mine, 4, 0) if isinstance(c, Create))
    burst(state, theirs, 1, 0)

    assert state.ready(first, 0) == [Specialize(first, mine)]
    assert state.ready(second, 0) == []


def test_more_arrivals_keep_more_generic_sandboxes():
    """Little's law: what arrives during one start finds one ready."""
    state = deployed(GREET, generic_max=8, sandboxes_max=99, starts_max=99)
    state.molds[BASE].start_s = 1.0
    for number in range(38):  # 3.8 a second over the window of 10 s
        state.submit(InvocationId(str(number)), GREET.id, 1)
    waited_for = [box.id for box in state.sandboxes.values()][:38]
    for box in waited_for:
        state.ready(box, 1)

    assert repr(state) == "<PoolState [4 starting, 38 loading | 38 waiting]>"


# ---- the limit of sandboxes ---------------------------------------------------------------------


def test_at_the_limit_the_longest_idle_is_evicted():
    state = deployed(GREET, SHOUT, sandboxes_max=2)
    warm(state, GREET, now=1)
    warm(state, SHOUT, now=2)
    third = function("third")
    state.deploy(third, 3)

    assert state.submit(I1, third.id, 3) == [Destroy(S1, "evicted"), create(S3)]
    assert len(state.sandboxes) == 2


def test_at_the_limit_a_generic_sandbox_of_another_mold_makes_room():
    foreign = function("greet", environment="other")
    state = deployed(foreign, sandboxes_max=1, generic_max=1)
    play(state, state.add_mold(BASE, 1, 0), 0)

    assert state.submit(I1, foreign.id, 1) == [Destroy(S1, "evicted"), create(S2, OTHER)]


def test_at_the_limit_with_every_sandbox_busy_the_invocation_waits_for_one():
    """Nothing is evicted while it works; what finishes first makes room, and at once."""
    state = deployed(GREET, SHOUT, sandboxes_max=1)
    make_busy(state, GREET, I1)

    assert state.submit(I2, SHOUT.id, 1) == []
    assert state.finished(S1, I1, 0.01, 2) == [Destroy(S1, "evicted"), create(S2)]


def test_a_refill_never_evicts():
    """Only a waiting invocation is worth a warm sandbox."""
    state = deployed(GREET, sandboxes_max=1)
    warm(state, GREET)

    assert state.add_mold(BASE, 4, 1) == []
    assert state.tick(1) == []


def test_a_minimum_that_does_not_fit_evicts_nothing():
    """Two functions that want to stay warm in a pool of one would evict each other for ever."""
    first, second = function("first", min_scale=1), function("second", min_scale=1)
    state = pool(sandboxes_max=1)
    play(state, state.deploy(first, 0), 0)
    play(state, state.deploy(second, 0), 0)

    assert state.tick(1) == []
    assert list(state.functions[first.id].sandboxes) == [S1]


def test_a_minimum_comes_and_goes_with_the_function_that_is_ours():
    """Nothing is thrown away at once, and nothing starts anew: a shard may come back soon."""
    kept = function("kept", min_scale=2, keep_alive_seconds=10)
    state = pool()
    play(state, state.deploy(kept, 0), 0)
    assert state.keep(kept.id, 0, 1) == []
    assert [type(command) for command in state.tick(60)] == [Destroy, Destroy]
    assert state.tick(61) == []

    assert state.keep(kept.id, 0, 62) == []
    assert starts(state.keep(kept.id, 1, 63)) == 1
    assert state.keep(function("nobody").id, 1, 64) == []


def test_a_waiting_invocation_evicts_even_what_minscale_keeps():
    """A minimum is a wish, a waiting invocation is somebody; it must not wait for ever."""
    kept = function("kept", min_scale=1, keep_alive_seconds=10)
    state = pool(sandboxes_max=1)
    play(state, state.deploy(kept, 0), 0)
    assert state.tick(60) == []
    state.deploy(GREET, 60)

    assert state.submit(I1, GREET.id, 60) == [Destroy(S1, "evicted"), create(S2)]


# ---- declarations -------------------------------------------------------------------------------


def test_a_new_version_ends_idle_sandboxes_now_and_busy_ones_after_their_invocation():
    """From the moment `deploy` returns nothing starts on the old version."""
    state = deployed(GREET)
    warm(state, GREET, 2)
    assert state.submit(I1, GREET.id, 1) == [Assign(S2, I1, "warm")]

    assert state.deploy(GREET_2, 2) == [Destroy(S1, "updated")]
    assert state.submit(I2, GREET.id, 2) == [create(S3)]
    assert state.finished(S2, I1, 0.01, 3) == [Destroy(S2, "updated")]
    assert state.ready(S3, 3)[0] == Specialize(S3, GREET_2)


def test_a_sandbox_that_loads_an_old_version_ends_when_it_is_loaded():
    state = deployed(GREET)
    state.submit(I1, GREET.id, 0)
    state.ready(S1, 1)
    assert starts(state.deploy(GREET_2, 2)) == 1

    assert state.loaded(S1, 1, 3) == [Destroy(S1, "updated")]
    assert state.ready(S2, 3)[0] == Specialize(S2, GREET_2)


def test_waiting_invocations_run_the_new_version():
    """They were accepted, and nobody promised them the old one."""
    state = deployed(GREET)
    state.submit(I1, GREET.id, 0)
    commands = state.deploy(GREET_2, 1)

    assert commands == []  # the start that is under way does as well
    assert state.ready(S1, 2)[0] == Specialize(S1, GREET_2)
    assert state.loaded(S1, 1, 3) == [Assign(S1, I1, "created")]


def test_a_new_version_in_another_environment_starts_there():
    moved = function("greet", version="2", environment="other")
    state = deployed(GREET)
    state.submit(I1, GREET.id, 0)

    assert state.deploy(moved, 1) == [create(S2, OTHER)]
    assert state.ready(S1, 2) == []
    assert state.ready(S2, 2)[0] == Specialize(S2, moved)


def test_a_removed_function_refuses_what_waits_and_lets_end_what_runs():
    state = deployed(GREET)
    warm(state, GREET, 2)
    state.submit(I1, GREET.id, 1)
    state.submit(I2, GREET.id, 1)
    state.submit(I3, GREET.id, 1)

    assert state.remove(GREET.id, 2) == [Refuse(I3, None)]
    assert state.waiting == 0
    assert state.finished(S1, I2, 0.01, 3) == [Destroy(S1, "updated")]
    with pytest.raises(FunctionNotFound):
        state.submit(I4, GREET.id, 3)


def test_removing_ends_what_is_idle():
    state = deployed(GREET)
    (box,) = warm(state, GREET)

    assert state.remove(GREET.id, 1) == [Destroy(box, "removed")]
    assert state.remove(GREET.id, 1) == []


def test_nothing_is_started_for_a_function_that_is_gone():
    """Its claims go with it, also when the sandboxes that they wait for do not start."""
    state = deployed(GREET, starts_max=1)
    for invocation in (I1, I2, I3):
        state.submit(invocation, GREET.id, 0)
    state.remove(GREET.id, 1)

    assert starts(state.died(S1, 2)) == 0
    assert starts(state.tick(60)) == 0
    assert state.molds == {}


def test_deploying_again_and_again_starts_nothing_twice():
    """Whoever waits needs one sandbox, however often the function changes meanwhile."""
    state = deployed(GREET)
    commands = state.submit(I1, GREET.id, 0)
    for version in range(2, 10):
        commands += state.deploy(function("greet", version=str(version)), version)

    assert starts(commands) == 1


# ---- failures -----------------------------------------------------------------------------------


def test_a_function_that_does_not_load_tells_everyone_who_waits():
    """And is then left alone for half a second; until then the answer is the same, at once."""
    state = deployed(GREET)
    for invocation in (I1, I2):
        state.submit(invocation, GREET.id, 0)
    state.ready(S1, 1)

    commands = state.load_failed(S1, BROKEN, 2)

    assert commands == [Refuse(I1, BROKEN), Refuse(I2, BROKEN), Destroy(S1, "failed")]
    assert state.submit(I3, GREET.id, 2.4) == [Refuse(I3, BROKEN)]
    assert repr(state) == "<PoolState [1 starting | 0 waiting]>"


def test_a_broken_function_is_tried_again_after_a_backoff_that_doubles():
    """0.5 s, 1, 2, 4, ...: an import that fails costs less and less."""
    state = deployed(GREET)
    now, waits = 0.0, []
    for _ in range(4):
        play_until_loading(state, state.submit(I1, GREET.id, now), now)
        (box,) = state.functions[GREET.id].sandboxes
        state.load_failed(box, BROKEN, now)
        waits.append(state.functions[GREET.id].broken_until - now)
        assert state.submit(I2, GREET.id, now + waits[-1] - 0.01) == [Refuse(I2, BROKEN)]
        now += waits[-1]

    assert waits == [0.5, 1.0, 2.0, 4.0]


def play_until_loading(state: PoolState, commands: list[Command], now: float) -> None:
    for command in commands:
        if isinstance(command, Create):
            state.ready(command.sandbox, now)


def test_the_next_version_of_a_broken_function_is_tried_at_once():
    """The fix is not punished for the fault."""
    state = deployed(GREET)
    play_until_loading(state, state.submit(I1, GREET.id, 0), 0)
    state.load_failed(S1, BROKEN, 0)
    state.deploy(GREET_2, 0)

    assert starts(state.submit(I2, GREET.id, 0)) == 1


def test_a_broken_function_with_a_minimum_is_not_tried_in_a_loop():
    eager = function("greet", min_scale=1)
    state = pool()
    play_until_loading(state, state.deploy(eager, 0), 0)
    state.load_failed(S1, BROKEN, 0)

    assert state.tick(0.4) == []
    assert starts(state.tick(0.6)) == 1


def test_a_sandbox_that_dies_while_starting_is_replaced_after_a_backoff():
    """A mold that cannot start costs one try now and then, not all of the machine."""
    state = deployed(GREET)
    state.submit(I1, GREET.id, 0)

    assert state.died(S1, 1) == [Destroy(S1, "failed")]
    assert starts(state.tick(1.4)) == 0
    assert state.tick(1.6) == [create(S2)]
    assert state.died(S2, 2) == [Destroy(S2, "failed")]
    assert starts(state.tick(2.9)) == 0
    assert starts(state.tick(3.1)) == 1
    assert state.waiting == 1


def test_starts_that_fail_together_count_as_one_failure():
    """One bad moment of the machine must not cost the longest backoff."""
    state = deployed(GREET)
    for invocation in (I1, I2, I3):
        state.submit(invocation, GREET.id, 0)
    for sandbox in (S1, S2, S3):
        state.died(sandbox, 1)

    assert starts(state.tick(1.6)) == 3


def test_one_mold_that_cannot_start_does_not_stop_the_others():
    foreign = function("foreign", environment="other")
    state = deployed(foreign, GREET, starts_max=1)
    state.submit(I1, foreign.id, 0)
    state.died(S1, 1)

    assert state.submit(I2, GREET.id, 1) == [create(S2)]


def test_a_start_that_works_ends_the_backoff():
    state = deployed(GREET)
    state.submit(I1, GREET.id, 0)
    state.died(S1, 1)
    state.tick(2)
    state.ready(S2, 2)

    assert state.molds[BASE].failures == 0


def test_a_generic_sandbox_that_dies_is_replaced():
    state = deployed(GREET)
    play(state, state.add_mold(BASE, 1, 0), 0)

    assert state.died(S1, 1) == [Destroy(S1, "failed"), refill(S2)]


def test_a_generic_sandbox_that_dies_at_once_has_not_started_well():
    """It prepares its lock-down after it has said so: the next one would die as well."""
    state = deployed(GREET)
    play(state, state.add_mold(BASE, 1, 0), 0)

    assert state.died(S1, 0.1) == [Destroy(S1, "failed")]
    assert state.molds[BASE].failures == 1
    assert state.tick(0.7) == [refill(S2)]


def test_a_sandbox_that_dies_while_loading_makes_the_function_claim_another():
    state = deployed(GREET)
    state.submit(I1, GREET.id, 0)
    state.ready(S1, 1)

    assert state.died(S1, 2) == [Destroy(S1, "failed"), create(S2)]
    assert state.waiting == 1


def test_a_sandbox_that_dies_busy_takes_only_its_own_invocations_with_it():
    """Those are told by the connection; what waits gets another sandbox."""
    each = function("greet", max_scale=1)
    state = deployed(each)
    make_busy(state, each, I1)
    assert state.submit(I2, each.id, 1) == []

    commands = state.died(S1, 2)

    assert commands[:2] == [Destroy(S1, "failed"), create(S2)]
    assert state.finished(S1, I1, 0.01, 3) == []


def test_a_sandbox_that_dies_idle_is_forgotten():
    state = deployed(GREET)
    (box,) = warm(state, GREET)

    assert state.died(box, 1) == [Destroy(box, "failed")]
    assert state.died(box, 1) == []
    assert repr(state) == "<PoolState [empty | 0 waiting]>"


def test_late_facts_about_a_dead_sandbox_change_nothing():
    """Answers may cross with the death that was already told."""
    state = deployed(GREET)
    state.submit(I1, GREET.id, 0)
    state.died(S1, 0)

    assert state.ready(S1, 1) == []
    assert state.loaded(S1, 1, 1) == []
    assert state.load_failed(S1, BROKEN, 1) == []
    assert state.finished(S1, I1, 0.01, 1) == []
    assert state.waiting == 1


def test_an_invocation_that_was_not_running_there_cannot_finish_there():
    state = deployed(GREET)
    make_busy(state, GREET, I1)

    assert state.finished(S1, I2, 0.01, 1) == []
    assert state.sandboxes[S1].running == {I1}


# ---- several invocations in one sandbox ---------------------------------------------------------


def shared_pool(slots: int, **spec: int) -> tuple[PoolState, Function]:
    """A function of which one sandbox takes several invocations; one is running in S1."""
    shared = function("greet", concurrency=slots, **spec)
    state = deployed(shared)
    state.submit(I1, shared.id, 0)
    state.ready(S1, 0)
    state.loaded(S1, slots, 0)
    return state, shared


def test_a_sandbox_with_free_places_takes_more():
    state, shared = shared_pool(3, max_scale=1)

    assert state.submit(I2, shared.id, 1) == [Assign(S1, I2, "warm")]
    assert state.submit(I3, shared.id, 1) == [Assign(S1, I3, "warm")]
    assert state.submit(I4, shared.id, 1) == []
    assert state.finished(S1, I2, 0.01, 2) == [Assign(S1, I4, "warm")]


def test_a_sandbox_is_idle_when_its_last_invocation_has_ended():
    state, shared = shared_pool(2)
    state.submit(I2, shared.id, 1)
    state.finished(S1, I1, 0.01, 2)

    assert state.sandboxes[S1].phase.value == "busy"
    state.finished(S1, I2, 0.01, 3)
    assert state.sandboxes[S1].phase.value == "idle"
    assert not state.functions[shared.id].open


def test_a_busy_sandbox_with_a_place_is_preferred_to_an_idle_one():
    """Work is packed, so that whole sandboxes fall idle."""
    state, shared = shared_pool(2)
    state.submit(I2, shared.id, 1)
    play(state, state.submit(I3, shared.id, 1), 1)
    state.finished(S1, I1, 0.01, 2)
    state.finished(S1, I2, 0.01, 2)
    state.sandboxes[S2].slots = 2
    state.functions[shared.id].open[S2] = state.sandboxes[S2]

    assert state.submit(I4, shared.id, 3) == [Assign(S2, I4, "warm")]


def test_a_guest_that_takes_one_at_a_time_is_believed():
    """A plain function deployed with concurrency 10 still gets a sandbox for each call."""
    shared = function("greet", concurrency=10)
    state = deployed(shared)
    for invocation in (I1, I2, I3):
        state.submit(invocation, shared.id, 0)
    state.ready(S1, 0)
    commands = state.loaded(S1, 1, 0)

    assert commands[0] == Assign(S1, I1, "created")
    assert len(state.sandboxes) == 3


# ---- time ---------------------------------------------------------------------------------------


def test_idle_sandboxes_are_reaped_in_order_until_none_is_left():
    """Scale to zero: nothing of an unused function stays."""
    each = function("greet", keep_alive_seconds=10)
    state = deployed(each)
    make_busy(state, each, I1, I2)
    state.finished(S1, I1, 0.01, 5)
    state.finished(S2, I2, 0.01, 7)

    assert state.tick(14.9) == []
    assert state.tick(15.0) == [Destroy(S1, "reaped")]
    assert state.tick(17.0) == [Destroy(S2, "reaped")]
    assert repr(state) == "<PoolState [empty | 0 waiting]>"


def test_a_sandbox_that_worked_again_starts_its_keep_alive_anew():
    each = function("greet", keep_alive_seconds=10)
    state = deployed(each)
    warm(state, each, now=0)
    state.submit(I1, each.id, 9)
    state.finished(S1, I1, 0.01, 9.5)

    assert state.tick(19) == []
    assert state.tick(19.5) == [Destroy(S1, "reaped")]


def test_functions_keep_their_own_times():
    short, long = function("short", keep_alive_seconds=1), function("long")
    state = deployed(long, short)
    warm(state, long)
    warm(state, short)

    assert state.tick(30) == [Destroy(S2, "reaped")]


def test_the_minimum_is_kept_however_long_it_is_idle():
    each = function("greet", min_scale=1, keep_alive_seconds=10)
    state = pool()
    play(state, state.deploy(each, 0), 0)
    make_busy(state, each, I1, I2, now=1)
    boxes = list(state.functions[each.id].sandboxes)
    for box, invocation in zip(boxes, (I1, I2), strict=True):
        state.finished(box, invocation, 0.01, 1)

    assert state.tick(100) == [Destroy(boxes[0], "reaped")]
    assert state.tick(1000) == []


def test_the_minimum_is_made_at_once_and_again_when_one_dies():
    eager = function("greet", min_scale=2)
    state = pool()
    commands = state.deploy(eager, 0)
    assert starts(commands) == 2
    play(state, commands, 0)
    assert len(state.functions[eager.id].idle) == 2
    state.died(S1, 1)

    play(state, state.tick(1), 1)

    assert len(state.functions[eager.id].idle) == 2


def test_surplus_generic_sandboxes_end_one_at_a_time():
    """Demand comes back in waves: the pool shrinks slower than it grows."""
    state = deployed(GREET)
    play(state, state.add_mold(BASE, 3, 0), 0)
    state.add_mold(BASE, 1, 1)

    assert state.tick(1) == [Destroy(S1, "surplus")]
    assert state.tick(2) == [Destroy(S2, "surplus")]
    assert state.tick(3) == []


def test_a_mold_that_nobody_uses_is_forgotten():
    state = deployed(GREET)
    warm(state, GREET)
    state.remove(GREET.id, 1)
    for now in range(100, 110):
        state.tick(now)

    assert state.molds == {}
    assert state.sandboxes == {}


# ---- the table of a life ------------------------------------------------------------------------


@pytest.mark.parametrize("before", Phase)
@pytest.mark.parametrize("after", Phase)
def test_only_the_moves_of_the_table_are_made(before: Phase, after: Phase):
    """An illegal one is our own defect, so it is an assertion; the dead stay dead."""
    state, box = pool(), SandboxRecord(S1, BASE, 0, phase=before)
    expected = nullcontext() if after in NEXT[before] else pytest.raises(AssertionError)

    with expected:
        state._move(box, after)
    assert box.phase is (after if after in NEXT[before] else before)
    assert NEXT[Phase.DEAD] == frozenset()


# ---- callers that go away -----------------------------------------------------------------------


def test_an_abandoned_invocation_is_never_assigned():
    state = deployed(GREET)
    state.submit(I1, GREET.id, 0)

    assert state.abandon(I1)
    assert not state.abandon(I1)
    assert state.ready(S1, 1) == []
    assert repr(state) == "<PoolState [1 generic | 0 waiting]>"


def test_nothing_is_started_for_callers_that_went_away():
    """Their claims go with the last of them, before a sandbox is made or evicted for nobody."""
    state = deployed(GREET, starts_max=1)
    for invocation in (I1, I2, I3):
        state.submit(invocation, GREET.id, 0)
    for invocation in (I1, I2, I3):
        state.abandon(invocation)

    assert state.ready(S1, 1) == []
    assert starts(state.tick(2)) == 0


def test_an_invocation_that_runs_cannot_be_abandoned():
    """Its place is free when its sandbox says so, not when its caller loses patience."""
    state = deployed(GREET)
    make_busy(state, GREET, I1)

    assert not state.abandon(I1)
    assert state.sandboxes[S1].running == {I1}


def test_those_behind_an_abandoned_invocation_move_up():
    state = deployed(GREET)
    make_busy(state, GREET, I1)
    state.submit(I2, GREET.id, 1)
    state.submit(I3, GREET.id, 1)
    state.abandon(I2)

    assert state.finished(S1, I1, 0.01, 2) == [Assign(S1, I3, "warm")]


# ---- zygotes ------------------------------------------------------------------------------------


def forking(*functions: Function, **limits: int) -> PoolState:
    """*functions* (FORKED) are deployed, and Z1 is ready; the next number is 2."""
    state = deployed(*functions or (FORKED,), **limits)
    play(state, state.tick(0), 0)

    assert list(state.zygotes) == [Z1]
    return state


def worn() -> PoolState:
    """Z1 has made all its forks (2 to 4), and its successor Z5 is being warmed."""
    state = forking()
    commands = [c for i in (I1, I2, I3) for c in state.submit(i, FORKED.id, 1)]

    assert (forks(commands), warms(commands)) == ([Z1, Z1, Z1], [Z5])
    return state


def warms(commands: Iterable[Command]) -> list[SandboxId]:
    return [command.zygote for command in commands if isinstance(command, Warm)]


def retired(commands: Iterable[Command]) -> list[SandboxId]:
    return [command.zygote for command in commands if isinstance(command, Retire)]


def forks(commands: Iterable[Command]) -> list[SandboxId | None]:
    """The zygote of each sandbox that is made, None for a started one."""
    return [command.zygote for command in commands if isinstance(command, Create)]


def test_a_mold_without_a_namespace_never_has_a_zygote():
    """Foreign code, `isolation: exec`: whatever is wanted is started."""
    state = deployed(GREET, generic_max=2)
    commands = state.add_mold(BASE, 1, 0) + state.submit(I1, GREET.id, 0) + state.tick(1)

    assert (warms(commands), forks(commands)) == ([], [None, None])
    assert state.zygotes == {}


def test_the_first_function_of_a_mold_brings_its_zygote_once():
    """Single flight: while it is being warmed nobody brings another."""
    beside = function("shout", namespace="own")
    state = deployed(FORKED)

    assert state.tick(0) == [Warm(Z1, OWN)]
    commands = state.deploy(beside, 1) + state.submit(I1, beside.id, 1) + state.tick(2)
    assert warms(commands) == []
    assert warms(state.warmed(Z1, 3) + state.tick(4)) == []
    assert state.molds[OWN].zygote is state.zygotes[Z1]


def test_a_mold_that_is_kept_has_a_zygote_before_it_has_a_function():
    """And one that is only known, not kept, has none."""
    state = pool()

    assert state.add_mold(OWN, 0, 0, pinned=False) == []
    assert state.add_mold(THEIRS, 1, 0) == [Warm(Z1, THEIRS)]


def test_every_namespace_has_a_zygote_of_its_own():
    """Nothing is forked for one namespace from what the other's is made of."""
    foreign = function("shout", namespace="theirs")
    state = deployed(FORKED, foreign)
    zygotes = {c.mold: c.zygote for c in state.tick(0) if isinstance(c, Warm)}

    assert zygotes.keys() == {OWN, THEIRS}
    state.warmed(zygotes[OWN], 0)
    assert state.submit(I1, foreign.id, 1) == [create(S3, THEIRS)]
    state.warmed(zygotes[THEIRS], 1)
    assert forks(state.submit(I2, foreign.id, 2)) == [zygotes[THEIRS]]
    assert forks(state.submit(I3, FORKED.id, 2)) == [zygotes[OWN]]


def test_a_refill_waits_for_the_first_zygote_and_a_claim_does_not():
    """Forking costs less than starting, but not more than waiting for it costs somebody."""
    state = deployed(FORKED)

    assert state.add_mold(OWN, 1, 0) == [Warm(Z1, OWN)]
    assert state.tick(1) == []
    assert state.submit(I1, FORKED.id, 1) == [create(S2, OWN)]
    assert state.ready(S2, 1) == [Specialize(S2, FORKED)]
    assert state.warmed(Z1, 2) == [refill(S3, OWN, Z1)]


def test_what_is_made_while_a_zygote_is_ready_is_forked_from_it():
    state = forking()

    assert state.submit(I1, FORKED.id, 1) == [create(S2, OWN, Z1)]
    assert state.add_mold(OWN, 1, 1) == [refill(S3, OWN, Z1)]


def test_a_zygote_does_not_count_as_a_sandbox_or_as_a_start():
    """The limits are for what runs user code: a pool of one still has its one sandbox."""
    state = deployed(FORKED, sandboxes_max=1, starts_max=1)
    state.tick(0)

    assert state.submit(I1, FORKED.id, 0) == [create(S2, OWN)]
    assert repr(state) == "<PoolState [1 starting | 1 waiting]>"


def test_twice_as_many_may_be_forked_at_once_as_started():
    """A fork leaves a processor idle half the time."""
    each = of("mine")
    state = deployed(each, starts_max=2)
    assert starts(burst(state, each, 6, 0)) == 2
    state = forking(each, starts_max=2)

    assert forks(burst(state, each, 6, 0)) == [Z1] * 4


@pytest.mark.parametrize(
    ("is_warm", "least", "start"),
    [(True, 0, "forked"), (False, 0, "created"), (True, 1, "generic")],
)
def test_a_response_tells_what_its_claim_was_answered_by(
    is_warm: bool, least: int, start: StartKind
):
    """A sandbox that was ready is `generic`, however it was made."""
    state = forking() if is_warm else deployed(FORKED)
    play(state, state.add_mold(OWN, least, 0) if least else [], 0)
    commands = state.submit(I1, FORKED.id, 1)
    made = [command.sandbox for command in commands if isinstance(command, Create)]
    if not least:
        commands = state.ready(made[0], 1)
    box = next(c.sandbox for c in commands if isinstance(c, Specialize))

    assert state.loaded(box, 1, 1) == [Assign(box, I1, start)]


def test_a_claim_that_a_refill_answers_tells_how_that_was_made():
    """The claim came while it was being forked: it waited for a fork."""
    state = forking()
    state.add_mold(OWN, 1, 0)
    state.submit(I1, FORKED.id, 1)
    state.ready(S2, 1)

    assert state.loaded(S2, 1, 1) == [Assign(S2, I1, "forked")]


def test_a_sandbox_that_was_started_before_the_zygote_was_ready_stays_created():
    state = deployed(FORKED)
    state.submit(I1, FORKED.id, 0)
    state.warmed(Z1, 1)
    state.ready(S2, 1)

    assert state.loaded(S2, 1, 1) == [Assign(S2, I1, "created")]


def test_after_its_forks_a_zygote_is_replaced_and_forks_until_the_other_is_ready():
    """Nobody waits for the change: the successor is warmed beside it, once."""
    state = worn()

    assert state.submit(I4, FORKED.id, 2) == [create(SandboxId("sb-6"), OWN, Z1)]
    assert state.submit(I5, FORKED.id, 3) == [create(SandboxId("sb-7"), OWN, Z1)]
    assert state.add_mold(OWN, 1, 4) == [refill(SandboxId("sb-8"), OWN, Z1)]
    assert state.tick(4) == []
    assert state.warmed(Z5, 5) == [Retire(Z1)]
    assert list(state.zygotes) == [Z5]
    assert forks(state.submit(InvocationId("i6"), FORKED.id, 6)) == [Z5]


def test_at_its_age_a_zygote_is_replaced():
    """Counted from when it was ready; the successor starts anew."""
    state = deployed(FORKED)
    state.tick(0)
    state.warmed(Z1, 10)
    state.add_mold(OWN, 1, 200)  # it is in use

    assert warms(state.tick(209.9)) == []
    (successor,) = warms(state.tick(210))
    assert retired(state.warmed(successor, 220)) == [Z1]
    state.add_mold(OWN, 1, 400)
    assert warms(state.tick(419.9)) == []
    assert len(warms(state.tick(420))) == 1


def test_a_successor_that_cannot_be_warmed_leaves_the_old_one_in_place():
    """It forks on, and another successor is tried after a pause."""
    state = worn()

    assert state.chilled(Z5, 3) == []
    assert forks(state.submit(I4, FORKED.id, 3)) == [Z1]
    assert warms(state.tick(3.4)) == []
    assert state.tick(3.5) == [Warm(Z7, OWN)]
    assert state.warmed(Z7, 4) == [Retire(Z1)]


def test_a_zygote_that_dies_while_its_successor_is_warmed_is_followed_by_it():
    """Meanwhile sandboxes are started, also those that are only kept ready."""
    state = worn()

    assert state.chilled(Z1, 3) == []
    assert forks(state.add_mold(OWN, 1, 3)) == [None]
    assert warms(state.tick(3.9)) == []  # one is on its way
    assert state.warmed(Z5, 4) == []
    assert state.molds[OWN].zygote is state.zygotes[Z5]
    assert forks(state.submit(I4, FORKED.id, 5)) == [Z5]


def test_a_zygote_that_cannot_be_warmed_is_tried_again_after_a_backoff_that_doubles():
    """0.5 s, 1, 2, ..., at most 30."""
    state = deployed(FORKED, sandboxes_max=99)
    now, waits = 0.0, []
    for number in range(8):
        (zygote,) = warms(state.tick(now))
        state.chilled(zygote, now)
        waits.append(state.molds[OWN].zygote_retry_at - now)
        assert warms(state.tick(now + waits[-1] - 0.01)) == []
        now += waits[-1]
        state.submit(InvocationId(f"in use {number}"), FORKED.id, now - 0.01)

    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_while_a_zygote_cannot_be_warmed_sandboxes_are_started():
    """Also those that nobody waits for: who knows when it can, if ever."""
    state = deployed(FORKED)
    state.add_mold(OWN, 1, 0)

    assert state.chilled(Z1, 1) == [refill(S2, OWN)]
    assert state.submit(I1, FORKED.id, 1.1) == [refill(S3, OWN)]
    assert state.tick(1.5) == [Warm(Z4, OWN)]
    assert state.ready(S2, 1.6) == [Specialize(S2, FORKED)]
    assert state.ready(S3, 1.6) == []
    assert state.died(S3, 2.0) == [Destroy(S3, "failed"), refill(S5, OWN)]


def test_a_zygote_that_dies_is_replaced_after_a_pause():
    state = forking()

    assert state.chilled(Z1, 1) == []
    assert state.submit(I1, FORKED.id, 1) == [create(S2, OWN)]
    assert state.tick(1.4) == []
    assert state.tick(1.5) == [Warm(Z3, OWN)]


def test_a_zygote_that_forks_ends_the_backoff():
    """Its next failure is a first one again."""
    state = forking()
    state.chilled(Z1, 1)
    for now in (2, 4):
        (zygote,) = warms(state.tick(now))
        state.chilled(zygote, now)
    play(state, state.tick(8), 8)
    play(state, commands := state.submit(I1, FORKED.id, 8), 8)

    assert forks(commands) == [state.molds[OWN].zygote.id]
    assert state.molds[OWN].zygote_failures == 0


def test_an_environment_that_is_unfit_is_never_tried_again():
    """Another interpreter with the same modules in it would not do either."""
    state = deployed(FORKED)
    assert state.tick(0) == [Warm(Z1, OWN)]
    state.chilled(Z1, 1, unfit="3 threads run in it")
    commands = state.add_mold(OWN, 1, 1)
    for now in (2, 100, 10_000, 1_000_000):
        play(state, some := state.submit(InvocationId(f"at {now}"), FORKED.id, now), now)
        commands += some + state.tick(now) + state.add_mold(OWN, 1, now)

    assert warms(commands) == []
    assert set(forks(commands)) == {None}


def test_a_fork_that_fails_dismisses_the_zygote_and_a_sandbox_is_started():
    """At once: the mold itself has no part in it, and nobody waits out a pause."""
    state = forking()
    state.submit(I1, FORKED.id, 1)

    assert state.died(S2, 1) == [Retire(Z1), Destroy(S2, "failed"), create(S3, OWN)]
    assert (state.molds[OWN].failures, state.molds[OWN].retry_at) == (0, 0)
    state.ready(S3, 1.1)
    assert state.loaded(S3, 1, 1.1) == [Assign(S3, I1, "created")]
    assert warms(state.tick(1.4)) == []
    assert state.tick(1.5) == [Warm(Z4, OWN)]


def test_forks_that_fail_together_count_as_one_failure():
    """Those that a zygote leaves behind do not dismiss its successor, however late they fail."""
    state = worn()

    assert retired(state.died(S2, 1)) == [Z1]
    assert retired(state.died(S3, 1)) == []
    assert state.molds[OWN].zygote_failures == 1
    state.warmed(Z5, 2)
    assert retired(state.died(S4, 3)) == []
    assert state.molds[OWN].zygote is state.zygotes[Z5]
    assert state.molds[OWN].failures == 0


def test_a_fork_that_fails_while_a_successor_is_warmed_waits_for_no_pause():
    """The successor is on its way, and takes its place as soon as it is ready."""
    state = worn()

    assert retired(state.died(S2, 3)) == [Z1]
    assert state.warmed(Z5, 3.1) == []
    assert forks(state.submit(I4, FORKED.id, 3.2)) == [Z5]


def test_a_start_that_fails_beside_a_zygote_does_not_dismiss_it():
    """It was started before the zygote was ready: that one has no part in it."""
    state = deployed(FORKED)
    state.submit(I1, FORKED.id, 0)
    state.warmed(Z1, 1)

    assert retired(state.died(S2, 2)) == []
    assert state.tick(2.5) == [create(S3, OWN, Z1)]


def test_a_sandbox_that_was_forked_well_and_dies_later_does_not_dismiss_the_zygote():
    state = forking()
    play(state, state.add_mold(OWN, 1, 0), 0)

    assert state.died(S2, 1) == [Destroy(S2, "failed"), refill(S3, OWN, Z1)]


def test_a_zygote_that_nobody_needed_for_long_goes_and_comes_back_with_the_next_claim():
    """Warm sandboxes serve on without it, and what is asked for meanwhile is started."""
    state = forking()
    make_busy(state, FORKED, I1, now=10)
    state.finished(S2, I1, 0.01, 10)

    assert state.tick(59.9) == []
    assert state.tick(60) == [Retire(Z1)]
    assert state.zygotes == {}
    assert warms(state.tick(1000)) == []
    assert forks(commands := state.submit(I2, FORKED.id, 1000)) == [None]
    assert len(warms(commands + state.tick(1000))) == 1


def test_a_warm_call_does_not_bring_a_zygote_back():
    """It needs none."""
    state = forking()
    (box,) = warm(state, FORKED)
    state.tick(50)

    assert state.submit(I1, FORKED.id, 51) == [Assign(box, I1, "warm")]
    assert state.tick(52) == []


def test_a_zygote_that_comes_too_late_to_be_of_use_goes_at_once():
    state = deployed(FORKED)
    state.tick(0)

    assert state.warmed(Z1, 50) == [Retire(Z1)]
    assert state.zygotes == {}


def test_a_mold_that_nobody_uses_loses_its_zygote_and_is_forgotten():
    state = forking()
    (box,) = warm(state, FORKED)

    assert state.remove(FORKED.id, 1) == [Destroy(box, "removed"), Retire(Z1)]
    state.tick(2)
    assert (state.molds, state.zygotes, state.sandboxes) == ({}, {}, {})
    assert state.chilled(Z1, 3) == []
    assert state.molds == {}


@pytest.mark.parametrize("is_warmed", [True, False])
def test_a_mold_that_nobody_uses_any_more_while_its_zygote_is_warmed_is_forgotten(is_warmed: bool):
    """It is kept until the zygote is there, or is not: nothing is lost sight of."""
    state = deployed(FORKED)
    state.tick(0)
    state.remove(FORKED.id, 1)
    assert state.tick(2) == []
    assert list(state.zygotes) == [Z1]

    commands = state.warmed(Z1, 3) if is_warmed else state.chilled(Z1, 3)

    assert commands == ([Retire(Z1)] if is_warmed else [])
    assert state.tick(4) == []
    assert (state.molds, state.zygotes) == ({}, {})


def test_a_worn_zygote_that_nobody_uses_any_more_goes_with_its_successor():
    state = worn()

    assert retired(state.remove(FORKED.id, 3)) == [Z1]
    assert state.warmed(Z5, 4) == [Retire(Z5)]
    assert state.zygotes == {}


def test_a_function_that_moves_takes_the_zygote_of_its_new_mold():
    """Another environment, say: the old one's goes when no other function uses it."""
    moved = function("greet", version="2", environment="other", namespace="own")
    state = forking()

    commands = deploy(state, moved, 1) + state.tick(1)

    assert (retired(commands), warms(commands)) == ([Z1], [Z2])
    state.warmed(Z2, 2)
    assert forks(state.submit(I1, moved.id, 3)) == [Z2]
    assert state.tick(4) == []
    assert list(state.molds) == [moved.mold]


def test_what_waits_when_its_function_moves_is_made_in_the_new_mold():
    """What was forked for it in the old one is of no use to it, and ends."""
    moved = function("greet", version="2")
    state = forking()
    assert state.submit(I1, FORKED.id, 1) == [create(S2, OWN, Z1)]

    assert state.deploy(moved, 2) == [create(S3, BASE), Retire(Z1)]
    assert state.ready(S2, 3) == []
    assert state.tick(4) == [Destroy(S2, "surplus")]
    state.tick(5)
    assert list(state.molds) == [BASE]


def test_a_fork_that_fails_after_its_zygote_was_let_go_is_nobodys_failure():
    """It was asked for just before: what is needed is made again at once."""
    moved = function("greet", version="2", environment="other", namespace="own")
    state = forking()
    state.submit(I1, FORKED.id, 1)
    state.deploy(moved, 2)
    state.deploy(FORKED, 2)

    assert Destroy(S2, "failed") in state.died(S2, 2)
    assert (state.molds[OWN].failures, state.molds[OWN].zygote_failures) == (0, 0)


def test_late_facts_about_an_unknown_zygote_do_nothing_but_retire_it():
    """Whatever it is, it forks for nobody."""
    state = forking()
    before = repr(state)

    assert state.warmed(Z7, 1) == [Retire(Z7)]
    assert state.chilled(Z7, 1) == []
    assert state.chilled(Z7, 1, unfit="3 threads run in it") == []
    assert repr(state) == before
    assert list(state.zygotes) == [Z1]
    assert state.molds[OWN].zygote_failures == 0


def test_a_zygote_that_was_replaced_and_ends_is_no_failure():
    """It ends with the last of its sandboxes, when everybody has forgotten it."""
    state = worn()
    state.warmed(Z5, 3)

    assert state.chilled(Z1, 4) == []
    assert state.molds[OWN].zygote is state.zygotes[Z5]
    assert state.molds[OWN].zygote_failures == 0


def test_a_zygote_that_dies_whenever_it_is_ready_is_tried_more_and_more_rarely():
    """Else an environment whose zygotes do not last costs an interpreter every half a second."""
    state = deployed(FORKED)
    now, waits = 0.0, []
    for _ in range(4):
        (zygote,) = warms(state.tick(now))
        state.warmed(zygote, now)
        state.chilled(zygote, now)
        waits.append(state.molds[OWN].zygote_retry_at - now)
        now += waits[-1]

    assert waits == [0.5, 1.0, 2.0, 4.0]


def test_a_zygote_that_never_forks_is_tried_more_and_more_rarely():
    """Every try costs somebody the time that the fork took to fail, up to `start_timeout_s`."""
    state = deployed(FORKED)
    now, waits = 0.0, []
    for number in range(4):
        play(state, state.tick(now), now)
        commands = state.submit(InvocationId(f"try {number}"), FORKED.id, now)
        (made,) = (c.sandbox for c in commands if isinstance(c, Create) and c.zygote)
        play(state, state.died(made, now), now)
        waits.append(state.molds[OWN].zygote_retry_at - now)
        now += waits[-1]

    assert waits == [0.5, 1.0, 2.0, 4.0]


def test_the_claim_that_brings_a_zygote_back_lets_the_refill_wait_for_it():
    """As the first claim of all does."""
    state = forking()
    play(state, state.add_mold(OWN, 1, 0), 0)
    assert state.tick(50) == [Retire(Z1)]

    assert state.submit(I1, FORKED.id, 1000) == [Warm(Z3, OWN), Specialize(S2, FORKED)]


def test_a_function_is_blamed_when_sandboxes_die_again_and_again_while_importing_it():
    """A few may be killed from outside; more than that is its own doing, or would never end."""
    state = deployed(GREET)
    state.submit(I1, GREET.id, 0)
    refused: list[Command] = []
    for number in range(1, 10):
        state.ready(SandboxId(f"sb-{number}"), number)
        refused = [
            c for c in state.died(SandboxId(f"sb-{number}"), number) if isinstance(c, Refuse)
        ]
        if refused:
            break

    assert number == LOST_LOADS_MAX + 1
    assert [(c.invocation, c.failure and c.failure.kind) for c in refused] == [(I1, "InitCrashed")]


# ---- molds for steps ----------------------------------------------------------------------------


def test_a_mold_for_steps_outlives_each_of_them_for_a_while():
    """A step is a function that goes with it; the next one finds what the first has warmed."""
    for_steps = structs.replace(OWN, steps=True)
    step = structs.replace(FORKED, mold=for_steps)
    state = deployed(step)
    state.warmed(Z1, 0)
    play(state, state.submit(I1, step.id, 0), 0)
    state.remove(step.id, 1)

    assert not retired(state.tick(1 + PASSING_IDLE_S / 2))
    assert state.molds[for_steps].zygote is not None
    assert retired(state.tick(1 + PASSING_IDLE_S))
    state.tick(2 + PASSING_IDLE_S)
    for box in list(state.sandboxes):
        state.died(box, 2 + PASSING_IDLE_S)
    state.tick(3 + PASSING_IDLE_S)
    assert for_steps not in state.molds


def test_a_step_has_no_zygote_of_its_own():
    """Nobody else could use it, and it would have the folders before the sandbox has."""
    step = function("step", namespace="own", initialize="once")
    step = structs.replace(step, mold=structs.replace(step.mold, steps=True))
    state = deployed(step)

    assert state.functions[step.id].once is False
