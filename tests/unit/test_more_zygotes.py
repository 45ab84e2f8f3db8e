"""A zygote makes one fork at a time: where that is what everybody waits for, others help it."""

from collections import Counter

import pytest
from msgspec import structs

from dayfly_pool.commands import Command, Create, Retire, Warm
from dayfly_pool.models import Function, InvocationId, Mold, SandboxId, function_id
from dayfly_pool.records import ZygoteLimits
from dayfly_pool.state import SPARE_IDLE_S, ZYGOTES_MAX, PoolState
from dayfly_pool.testing import function

MOLD = Mold("base", "none", "own")
EACH = structs.replace(function("greet", namespace="own"), id=function_id("own", "greet"))
LIMITS = ZygoteLimits(forks=1000, age_s=200, idle_s=50, once_s=1.0, at_once=2)


def based(*, at_once: int = 2, **limits: float) -> PoolState:
    """The environment's zygote is ready, and nothing else is there."""
    zygotes = structs.replace(LIMITS, at_once=at_once, **limits)
    state = PoolState(generic_max=0, sandboxes_max=500, starts_max=100, zygotes=zygotes)
    state.add_mold(MOLD, 0, 0, pinned=False)
    state.deploy(EACH, 0)
    (warm,) = warms(state.tick(0))
    state.warmed(warm, 0)
    return state


def call(state: PoolState, number: int, now: float = 0, each: Function = EACH) -> list[Command]:
    """*number* first calls at the same moment."""
    names = [InvocationId(f"{each.id}-{now}-{n}") for n in range(number)]
    return [command for name in names for command in state.submit(name, each.id, now)]


def warms(commands: list[Command]) -> list[SandboxId]:
    return [command.zygote for command in commands if isinstance(command, Warm)]


def retired(commands: list[Command]) -> list[SandboxId]:
    return [command.zygote for command in commands if isinstance(command, Retire)]


def forks(commands: list[Command]) -> list[SandboxId | None]:
    return [command.zygote for command in commands if isinstance(command, Create)]


def helped(**limits: float) -> tuple[PoolState, SandboxId, SandboxId]:
    """Two forks are under way, and a second zygote is ready beside the first."""
    state = based(**limits)
    main = main_of(state)
    (second,) = warms(call(state, 2))
    assert retired(state.warmed(second, 0)) == []
    return state, main, second


def main_of(state: PoolState) -> SandboxId:
    zygote = state.molds[MOLD].zygote
    assert zygote is not None
    return zygote.id


def test_a_zygote_that_has_as_many_forks_to_make_as_it_can_is_helped_by_another():
    """Not before; and while one is being warmed there is no third."""
    state = based(at_once=3)

    assert warms(call(state, 2)) == []
    assert len(warms(call(state, 1, 1))) == 1
    assert warms(call(state, 20, 2) + state.tick(3)) == []


def test_the_one_with_the_fewest_forks_under_way_is_asked_next():
    """So that they are done at the same time."""
    state, main, second = helped()

    assert Counter(forks(call(state, 4, 1))) == {second: 3, main: 1}


def test_another_helps_only_when_each_has_as_many_as_it_can():
    """Two with one each are not too few."""
    state, main, second = helped()
    assert warms(state.tick(1)) == []
    assert warms(call(state, 1, 1)) == []

    assert len(warms(call(state, 1, 2))) == 1
    assert set(state.zygotes) > {main, second}


def test_there_are_never_more_than_so_many():
    """Each is an interpreter with all that the environment has preloaded."""
    state = based(at_once=1)
    for n in range(20):
        for zygote in warms(call(state, 5, n / 100)):
            state.warmed(zygote, n / 100)

    assert len(state.zygotes) == ZYGOTES_MAX
    assert warms(call(state, 10, 1) + state.tick(1)) == []


def test_a_functions_own_zygote_is_not_doubled():
    """Another would have to import the function as well."""
    kept = structs.replace(
        function("kept", namespace="own", initialize="once"), id=function_id("own", "kept")
    )
    state = based(at_once=1)
    state.deploy(kept, 0)
    (own,) = warms(call(state, 5, 0, kept))

    commands = state.warmed(own, 0)

    assert forks(commands) == [own] * 5
    assert warms(commands + call(state, 5, 1, kept) + state.tick(2)) == []


@pytest.mark.parametrize("end", ["ready", "dead"])
def test_a_fork_that_is_up_or_dead_is_not_under_way(end: str):
    """Else a zygote would be thought busy for ever."""
    state, main, second = helped()
    made = {c.sandbox: c.zygote for c in call(state, 2, 1) if isinstance(c, Create)}
    before = {zygote: state.zygotes[zygote].forking for zygote in (main, second)}
    box = next(iter(made))
    if end == "ready":
        state.ready(box, 2)
    else:
        state.abandon(InvocationId(f"{EACH.id}-1-0"))
        state._destroy(state.sandboxes[box], "evicted")

    assert state.zygotes[second].forking == before[second] - 1
    assert state.zygotes[main].forking == before[main]


def test_the_one_that_helped_goes_when_it_was_not_needed_for_seconds():
    """The first one stays, and forks on."""
    state, main, second = helped()
    assert forks(call(state, 1, 1)) == [second]
    for box in list(state.sandboxes):
        state.ready(box, 1)

    assert retired(state.tick(1 + SPARE_IDLE_S - 0.1)) == []
    assert retired(state.tick(1 + SPARE_IDLE_S)) == [second]
    assert list(state.zygotes) == [main]


def test_a_worn_helper_goes_and_is_not_replaced():
    state, main, second = helped(forks=4)
    call(state, 4, 1)  # three of them by the second, and one more by the first
    commands = call(state, 2, 2)

    assert second in retired(commands)
    assert second not in state.zygotes
    assert main in state.zygotes


def test_when_the_first_dies_a_helper_takes_its_place_without_a_pause():
    """Nobody waits for another to be warmed, and nothing is started meanwhile."""
    state, main, second = helped()
    state.chilled(main, 1)

    assert main_of(state) == second
    assert set(forks(call(state, 2, 1))) == {second}


def test_when_a_helper_dies_the_first_goes_on():
    state, main, second = helped()
    state.chilled(second, 1)

    assert main_of(state) == main
    assert set(forks(call(state, 3, 1))) == {main}


@pytest.mark.parametrize("is_helper", [True, False])
def test_a_fork_that_fails_dismisses_the_zygote_that_was_asked_and_no_other(is_helper: bool):
    state, main, second = helped()
    made = {c.zygote: c.sandbox for c in call(state, 4, 1) if isinstance(c, Create)}
    failed, well = (second, main) if is_helper else (main, second)

    assert retired(state.died(made[failed], 2)) == [failed]
    assert main_of(state) == well
    assert set(forks(call(state, 1, 3))) == {well}


def test_while_memory_is_short_no_other_is_warmed():
    state = based()
    state.tick(1, is_short_of_memory=True)

    assert warms(call(state, 20, 2)) == []


def test_when_nobody_needs_them_any_more_all_of_them_go():
    state, main, second = helped()
    commands = state.remove(EACH.id, 1) + state.tick(2)

    assert sorted(retired(commands)) == sorted([main, second])
    assert state.zygotes == {}


def test_a_helper_that_is_ready_when_the_first_is_worn_takes_its_place():
    """It was to be one more; now it is the successor."""
    state = based(forks=2)
    old = main_of(state)
    (second,) = warms(call(state, 2))

    assert retired(state.warmed(second, 1)) == [old]
    assert main_of(state) == second
