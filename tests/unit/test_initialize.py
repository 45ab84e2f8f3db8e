"""A function's zygote, which is forked after the import: who gets one, who waits for it, and what
happens to whom when it does not come, fails, grows old or is not needed any more.
"""

from collections.abc import Iterable
from typing import Any

import pytest
from msgspec import structs

from dayfly_pool.commands import Assign, Command, Create, Destroy, Refuse, Retire, Specialize, Warm
from dayfly_pool.models import Failure, Function, InvocationId, Mold, SandboxId, function_id
from dayfly_pool.records import ZygoteLimits, own_mold
from dayfly_pool.state import SPARE_IDLE_S, PoolState
from dayfly_pool.testing import function

BASE = Mold("base", "none", "own")
"""What the environment's zygote forks for namespace `own`."""

I1, I2, I3, I4, I5 = (InvocationId(f"i{n}") for n in range(1, 6))
BROKEN = Failure("ImportFailed", "ModuleNotFoundError: numpy")
LIMITS = ZygoteLimits(forks=3, age_s=200, idle_s=50, once_s=1.0)
HEAVY_S = 2.0
"""An import that is worth a zygote."""


def of(name: str = "heavy", tenant: str = "own", **spec: Any) -> Function:
    """A function of *tenant*'s whose sandboxes may be forked."""
    each = function(name, namespace=tenant, **spec)
    return structs.replace(each, id=function_id(tenant, name))


AUTO, ONCE, EACH = of(), of(initialize="once"), of(initialize="each")
AUTO_2, ONCE_2 = of(version="2"), of(version="2", initialize="once")
BESIDE = of("beside", initialize="each")


def pool(
    *functions: Function, starts_max: int = 8, forks: int = 3, generic_max: int = 0
) -> PoolState:
    """*functions* are deployed."""
    state = PoolState(
        generic_max=generic_max,
        sandboxes_max=50,
        starts_max=starts_max,
        zygotes=structs.replace(LIMITS, forks=forks),
    )
    for each in functions:
        deploy(state, each, 0)
    return state


def deploy(state: PoolState, each: Function, now: float) -> list[Command]:
    """As `Pool.deploy` does."""
    commands = []
    if each.mold not in state.molds:
        commands = state.add_mold(each.mold, 0, now, pinned=False)
    return commands + state.deploy(each, now)


def based(*functions: Function, **limits: int) -> PoolState:
    """*functions* are deployed, and the zygote of their environment is ready."""
    state = pool(*functions, **limits)
    for warm in warms(state.tick(0)):
        state.warmed(warm.zygote, 0)
    assert base_of(state)
    return state


def base_of(state: PoolState) -> SandboxId:
    """The zygote of the environment."""
    zygote = state.molds[BASE].zygote
    assert zygote is not None
    return zygote.id


def kept(each: Function = ONCE, *beside: Function, **limits: int) -> PoolState:
    """*each* has a zygote that is ready, and nobody waits."""
    state = based(each, *beside, **limits)
    play(state, state.submit(I5, each.id, 0), 0)
    (box,) = (box for box in state.sandboxes.values() if I5 in box.running)
    state.finished(box.id, I5, 0.01, 0)
    state.died(box.id, 0)
    assert own_zygote(state, each)
    assert not state.sandboxes
    return state


def own_zygote(state: PoolState, each: Function = ONCE) -> SandboxId | None:
    """The zygote that holds *each*, if it is ready."""
    mold = state.molds.get(own_mold(each))
    return mold.zygote.id if mold is not None and mold.zygote is not None else None


def play(state: PoolState, commands: Iterable[Command], now: float) -> None:
    """Carry out *commands*, and what follows from them, all successful."""
    todo = list(commands)
    while todo:
        match todo.pop(0):
            case Create(sandbox):
                todo += state.ready(sandbox, now)
            case Specialize(sandbox):
                todo += state.loaded(sandbox, 1, now)
            case Warm(zygote):
                todo += state.warmed(zygote, now)


def learn(
    state: PoolState, each: Function, import_s: float, leftovers: str = "", now: float = 0
) -> list[Command]:
    """The function is imported in a sandbox of its environment; what follows from that."""
    name = InvocationId(f"learn-{each.id}-{now}")
    (made,) = creates(state.submit(name, each.id, now))
    assert made.mold == each.mold
    state.ready(made.sandbox, now)
    commands = state.loaded(made.sandbox, 1, now, import_s=import_s, leftovers=leftovers)
    state.finished(made.sandbox, name, 0.01, now)
    state.died(made.sandbox, now)
    return commands


def warms(commands: Iterable[Command]) -> list[Warm]:
    return [command for command in commands if isinstance(command, Warm)]


def creates(commands: Iterable[Command]) -> list[Create]:
    return [command for command in commands if isinstance(command, Create)]


def retired(commands: Iterable[Command]) -> list[SandboxId]:
    return [command.zygote for command in commands if isinstance(command, Retire)]


def decided(state: PoolState, each: Function = AUTO) -> tuple[bool | None, str]:
    """What is known of it, as the management shows it."""
    record = state.functions[each.id]
    return record.once, record.once_why


# ---- who gets one -------------------------------------------------------------------------------


def test_a_function_that_says_nothing_is_undecided_until_it_is_imported():
    """Its first sandbox is made as any other's."""
    state = based(AUTO)

    assert decided(state) == (None, "it has not been loaded yet")
    assert [made.mold for made in creates(state.submit(I1, AUTO.id, 1))] == [BASE]


@pytest.mark.parametrize(
    ("import_s", "leftovers", "once", "why"),
    [
        (0.0, "", False, "its import took 0 s, under 1"),
        (0.999, "", False, "its import took 0.999 s, under 1"),
        (1.0, "", True, "its import took 1 s"),
        (2.5, "", True, "its import took 2.5 s"),
        (2.5, "3 threads", False, "its import took 2.5 s, but left 3 threads"),
        (0.5, "3 threads", False, "its import took 0.5 s, under 1"),
    ],
)
def test_an_import_decides_by_how_long_it_took_and_what_it_has_left_behind(
    import_s: float, leftovers: str, once: bool, why: str
):
    state = based(AUTO)
    warmed = warms(learn(state, AUTO, import_s, leftovers))

    assert decided(state) == (once, why)
    assert [warm.mold for warm in warmed] == ([own_mold(AUTO)] if once else [])


def test_an_import_that_is_heavy_only_later_decides_then():
    """The first was lucky, or the machine idle: each import of a sandbox is looked at."""
    state = based(AUTO)
    learn(state, AUTO, 0.5)
    learn(state, AUTO, HEAVY_S, "1 open files or sockets", now=1)
    assert decided(state)[0] is False
    learn(state, AUTO, HEAVY_S, now=2)

    assert decided(state)[0] is True


def test_a_decision_for_a_zygote_stands_though_a_later_import_is_short():
    """Until there is one it is imported in sandboxes, which a warm cache makes fast."""
    state = based(AUTO)
    (warm,) = warms(learn(state, AUTO, HEAVY_S))
    state.chilled(warm.zygote, 1)
    learn(state, AUTO, 0.1, "3 threads", now=1)

    assert decided(state) == (True, "its import took 2 s")


def test_the_zygote_of_a_heavy_function_is_warmed_at_once_and_forked_from_its_environments():
    """So that the next start finds it; with its parent, and the version that it is to load."""
    state = based(AUTO)

    (warm,) = warms(learn(state, AUTO, HEAVY_S))
    assert warm == Warm(warm.zygote, own_mold(AUTO), AUTO, base_of(state))
    assert own_mold(AUTO) == Mold("base", "none", "own", "own/heavy@1")
    state.warmed(warm.zygote, 1)
    (made,) = creates(state.submit(I1, AUTO.id, 2))
    assert made == Create(made.sandbox, own_mold(AUTO), claimed=True, zygote=warm.zygote)


def test_a_function_that_declares_once_gets_its_zygote_with_its_first_claim():
    """Not before: a function that nobody calls costs nothing."""
    state = based(ONCE)
    assert decided(state) == (True, "it is declared so")
    assert warms(state.tick(1)) == []

    commands = state.submit(I1, ONCE.id, 2)

    assert [type(command) for command in commands] == [Warm]
    assert warms(commands)[0].parent == base_of(state)


def test_a_function_that_declares_each_never_has_one():
    """However long its import takes."""
    state = based(EACH)

    assert decided(state, EACH) == (False, "it is declared so")
    assert warms(learn(state, EACH, 100.0)) == []
    assert decided(state, EACH) == (False, "it is declared so")


@pytest.mark.parametrize("initialize", ["auto", "once"])
@pytest.mark.parametrize(
    ("network", "tenant", "why"),
    [
        ("none", "", "its sandboxes are started, not forked"),
        ("host", "own", "its network is the host's"),
    ],
)
def test_what_may_not_be_forked_never_has_one(initialize: str, network: str, tenant: str, why: str):
    """Foreign code and `isolation: exec`; and a zygote is less confined than its forks are."""
    each = function("heavy", namespace=tenant, initialize=initialize, network=network)
    state = pool(each)
    play(state, state.tick(0), 0)
    commands = learn(state, each, 100.0)

    assert decided(state, each) == (False, why)
    assert [warm for warm in warms(commands + state.tick(1)) if warm.function] == []
    assert [made.mold for made in creates(state.submit(I1, each.id, 2))] == [each.mold]


def test_a_fork_says_nothing_about_the_import():
    """It took no time there, because the zygote did it."""
    state = kept()
    (made,) = creates(state.submit(I1, ONCE.id, 1))
    state.ready(made.sandbox, 1)
    state.loaded(made.sandbox, 1, 1, import_s=0.001, busy_s=0.001, leftovers="2 threads")

    assert decided(state, ONCE) == (True, "it is declared so")
    assert state.functions[ONCE.id].load_weight == 1.0


# ---- who waits for it ---------------------------------------------------------------------------


def test_claims_wait_for_a_zygote_that_is_coming_and_are_forked_from_it():
    """One import for all of them, and none of them is started meanwhile."""
    state = based(ONCE)
    commands = [c for i in (I1, I2, I3) for c in state.submit(i, ONCE.id, 1)]
    (warm,) = warms(commands)
    assert creates(commands + state.tick(2)) == []

    made = creates(state.warmed(warm.zygote, 3))

    assert [each.zygote for each in made] == [warm.zygote] * 3
    (load,) = state.ready(made[0].sandbox, 4)
    assert load == Specialize(made[0].sandbox, ONCE)
    assert state.loaded(made[0].sandbox, 1, 5)[0] == Assign(made[0].sandbox, I1, "forked")


def test_the_first_claim_of_all_waits_for_both_zygotes():
    """Its environment's comes first, and only then is there one to fork it from."""
    state = pool(ONCE)
    (base,) = warms(state.submit(I1, ONCE.id, 0))
    assert (base.mold, base.parent) == (BASE, None)
    assert state.tick(1) == []

    (own,) = warms(state.warmed(base.zygote, 2))

    assert (own.mold, own.parent) == (own_mold(ONCE), base.zygote)


def test_those_that_wait_when_it_is_decided_wait_for_the_zygote():
    """Of a burst of first calls two import it, and the others are forked."""
    state = based(AUTO, starts_max=2)
    names = [InvocationId(f"burst{n}") for n in range(10)]
    commands = [c for name in names for c in state.submit(name, AUTO.id, 0)]
    loading: list[SandboxId] = []
    while len(loading) < 2:
        box = creates(commands).pop(0).sandbox
        commands.pop(0)
        answer = state.ready(box, 0)
        loading += [c.sandbox for c in answer if isinstance(c, Specialize)]
        commands += creates(answer)
    record = state.functions[AUTO.id]
    waited = record.claims
    commands = state.loaded(loading[0], 1, 2, import_s=HEAVY_S, busy_s=HEAVY_S)

    assert record.home == own_mold(AUTO)
    assert (state.molds[BASE].claims, record.claims > 0) == (type(state.molds[BASE].claims)(), True)
    assert record.claims <= waited
    (warm,) = warms(commands + state.loaded(loading[1], 1, 2, import_s=HEAVY_S, busy_s=HEAVY_S))
    assert {made.zygote for made in creates(state.warmed(warm.zygote, 4))} == {warm.zygote}


def test_a_warm_sandbox_serves_while_the_zygote_is_coming():
    """Whichever is free first takes the head of the queue, as always."""
    state = based(AUTO)
    (made,) = creates(state.submit(I1, AUTO.id, 0))
    state.ready(made.sandbox, 0)
    commands = state.loaded(made.sandbox, 1, 0, import_s=HEAVY_S)
    assert warms(commands)
    state.submit(I2, AUTO.id, 1)

    assert state.finished(made.sandbox, I1, 0.01, 1) == [Assign(made.sandbox, I2, "warm")]
    assert state.functions[AUTO.id].claims == 0


def test_the_minimum_is_forked_as_well():
    """Nobody waits for it, and it costs no import of its own."""
    each = of(initialize="once", min_scale=2)
    state = pool()
    play(state, deploy(state, each, 0), 0)
    boxes = list(state.functions[each.id].sandboxes.values())

    assert [box.zygote for box in boxes] == [own_zygote(state, each)] * 2


def test_nothing_is_kept_ready_that_only_one_function_could_use():
    """Forking is fast; what is left over of forks goes. Its environment's are kept as ever."""
    state = kept(generic_max=4)
    (made,) = creates(state.submit(I1, ONCE.id, 1))
    state.abandon(I1)
    state.ready(made.sandbox, 1)

    assert state.tick(2) == [Destroy(made.sandbox, "surplus")]
    assert state.tick(3) == []
    assert [kept.mold for kept in creates(state.add_mold(BASE, 1, 3))] == [BASE]


# ---- what when it does not come -----------------------------------------------------------------


def test_claims_move_to_the_environment_when_the_zygote_does_not_come():
    """It was killed, say: they are made at once, from the zygote that all share."""
    state = based(ONCE)
    (warm,) = warms(state.submit(I1, ONCE.id, 1))

    commands = state.chilled(warm.zygote, 2)

    assert [(made.mold, made.zygote) for made in creates(commands)] == [(BASE, base_of(state))]
    assert decided(state, ONCE)[0] is True


def test_it_is_tried_again_after_a_pause_that_doubles_and_claims_come_back():
    """Meanwhile the function is imported in each sandbox."""
    state, now, waits = based(ONCE), 0.0, []
    (warm,) = warms(state.submit(I1, ONCE.id, now))
    for _ in range(4):
        state.chilled(warm.zygote, now)
        waits.append(state.molds[own_mold(ONCE)].zygote_retry_at - now)
        assert warms(state.tick(now + waits[-1] - 0.01)) == []
        now += waits[-1]
        (warm,) = warms(state.tick(now))
    assert waits == [0.5, 1.0, 2.0, 4.0]
    made = creates(state.submit(I2, ONCE.id, now))
    assert [each.mold for each in made] == [BASE]

    state.warmed(warm.zygote, now)

    assert state.functions[ONCE.id].home == own_mold(ONCE)
    made = creates(state.submit(I3, ONCE.id, now))
    assert [each.zygote for each in made] == [warm.zygote]


def test_a_zygote_that_comes_late_answers_the_claims_that_still_wait():
    """What is being forked for them in the environment is not needed there any more, and goes."""
    state = based(ONCE)
    (warm,) = warms(state.submit(I1, ONCE.id, 0))
    commands = state.chilled(warm.zygote, 0) + state.submit(I2, ONCE.id, 0)
    assert len(creates(commands)) == 2
    (again,) = warms(state.tick(0.5))

    forked = creates(state.warmed(again.zygote, 1))

    assert [made.zygote for made in forked] == [again.zygote] * 2
    for made in creates(commands):
        assert state.ready(made.sandbox, 2) == []
    assert {c.sandbox for now in (3, 4) for c in state.tick(now) if isinstance(c, Destroy)} == {
        made.sandbox for made in creates(commands)
    }


def test_an_import_that_fails_in_the_zygote_is_told_to_all_who_wait():
    """It was never loaded anywhere: there is no reason to think that it would load elsewhere."""
    state = based(ONCE)
    commands = [c for i in (I1, I2) for c in state.submit(i, ONCE.id, 1)]
    (warm,) = warms(commands)

    assert state.chilled(warm.zygote, 2, failure=BROKEN) == [
        Refuse(I1, BROKEN),
        Refuse(I2, BROKEN),
    ]
    assert state.waiting == 0
    assert state.submit(I3, ONCE.id, 2.4) == [Refuse(I3, BROKEN)]


def test_what_failed_in_the_zygote_is_tried_in_a_sandbox_after_the_pause():
    """Either may work; the zygote is tried again as well, and the function stays what it is."""
    state = based(ONCE)
    (warm,) = warms(state.submit(I1, ONCE.id, 1))
    state.chilled(warm.zygote, 1, failure=BROKEN)

    commands = state.tick(1.5) + state.submit(I2, ONCE.id, 1.5)

    assert [made.mold for made in creates(commands)] == [BASE]
    assert [again.mold for again in warms(commands)] == [own_mold(ONCE)]
    assert decided(state, ONCE)[0] is True


def test_while_a_function_is_left_alone_its_zygote_is_too():
    """It has failed more often than the zygote has."""
    state = based(ONCE)
    (warm,) = warms(state.submit(I1, ONCE.id, 0))
    state.chilled(warm.zygote, 0, failure=BROKEN)
    commands = state.tick(0.5) + state.submit(I2, ONCE.id, 0.5)
    (warm,), (made,) = warms(commands), creates(commands)
    state.ready(made.sandbox, 0.5)
    state.load_failed(made.sandbox, BROKEN, 0.5)
    state.chilled(warm.zygote, 0.5, failure=BROKEN)
    assert state.molds[own_mold(ONCE)].zygote_retry_at == 1.5

    assert warms(state.tick(2.4)) == []
    assert [again.function for again in warms(state.tick(2.5))] == [ONCE]


def test_an_import_that_fails_only_in_the_zygote_ends_the_attempt():
    """It loads in sandboxes: so be it there, and whoever asks is told why."""
    state = based(AUTO)
    (warm,) = warms(learn(state, AUTO, HEAVY_S))
    assert creates(state.submit(I1, AUTO.id, 1)) == []

    commands = state.chilled(warm.zygote, 2, failure=BROKEN)

    assert [type(command) for command in commands] == [Create]
    assert creates(commands)[0].mold == BASE
    why = "the import failed in its zygote: ModuleNotFoundError: numpy"
    assert decided(state) == (False, why)
    never(state, AUTO)


def test_an_import_that_cannot_be_forked_ends_the_attempt():
    """Threads, say; also before it was ever loaded, which it may well be elsewhere."""
    state = based(ONCE)
    (warm,) = warms(state.submit(I1, ONCE.id, 1))

    commands = state.chilled(warm.zygote, 2, unfit="its import left 3 threads")

    assert [made.mold for made in creates(commands)] == [BASE]
    assert decided(state, ONCE) == (False, "its import left 3 threads")
    never(state, ONCE)


def never(state: PoolState, each: Function) -> None:
    """It is never tried again, however heavy its imports are, and leaves no mold behind."""
    commands: list[Command] = []
    for now in (100, 10_000, 1_000_000):
        play(state, state.tick(now), now)
        commands += learn(state, each, 100.0, now=now) + state.tick(now)

    assert [warm for warm in warms(commands) if warm.function] == []
    assert own_mold(each) not in state.molds


@pytest.mark.parametrize(
    "how", [{"unfit": "its import left 3 threads"}, {"failure": BROKEN}], ids=["unfit", "failed"]
)
@pytest.mark.parametrize(
    ("first", "second"), [(AUTO, AUTO_2), (ONCE, ONCE_2)], ids=["auto", "once"]
)
def test_a_new_version_is_judged_anew(how: dict[str, Any], first: Function, second: Function):
    """The fix is not punished for the fault."""
    state = based(first)
    if first is AUTO:
        (warm,) = warms(learn(state, first, HEAVY_S))
    else:
        (warm,) = warms(state.submit(I1, first.id, 0))
        state.abandon(I1)
    state.chilled(warm.zygote, 1, **how)
    deploy(state, second, 2)
    commands = learn(state, second, HEAVY_S, now=3) if first is AUTO else []
    commands += state.submit(I2, second.id, 3)

    assert [warm.function for warm in warms(commands)] == [second]


def test_without_its_environments_zygote_a_function_loads_like_any_other():
    """The environment's modules start threads, say: nothing comes that could be waited for."""
    state = pool(ONCE)
    (base,) = warms(state.submit(I1, ONCE.id, 0))

    made = creates(state.chilled(base.zygote, 1, unfit="3 threads run in it"))

    assert [(each.mold, each.zygote) for each in made] == [(BASE, None)]
    assert [each.mold for each in creates(state.submit(I2, ONCE.id, 100))] == [BASE]


def test_claims_do_not_wait_for_an_environments_zygote_that_never_comes_back():
    """Its successor was unfit while it still forked well itself, and then it was let go."""
    state = based(ONCE, BESIDE)
    base = base_of(state)
    commands = [c for i in (I1, I2, I3) for c in state.submit(i, BESIDE.id, 0)]
    (successor,) = warms(commands)
    state.chilled(successor.zygote, 0, unfit="3 threads run in it")
    for made in creates(commands):
        play(state, [made], 0)
        state.died(made.sandbox, 1)
    assert retired(state.tick(60)) == [base]
    assert state.molds[BASE].zygote_failures == 0

    made_now = creates(state.submit(I4, ONCE.id, 61))

    assert [(made.mold, made.zygote) for made in made_now] == [(BASE, None)]


def test_a_zygote_that_is_there_is_used_though_its_environments_cannot_be_warmed():
    """That one was let go; only a successor would need it."""
    state = kept()
    old, own = own_zygote(state), state.molds[own_mold(ONCE)]
    own.used_at = 40.0  # it is in use
    state.tick(50)
    (base,) = warms(state.add_mold(BASE, 1, 60))
    state.chilled(base.zygote, 61)

    assert [made.zygote for made in creates(state.submit(I1, ONCE.id, 62))] == [old]


def test_claims_do_not_wait_for_an_environments_zygote_that_has_died():
    """It may take long to come back; when it has, the function's is forked from the new one."""
    state = based(ONCE)
    (own,) = warms(state.submit(I1, ONCE.id, 1))
    commands = state.chilled(base_of(state), 2)
    state.chilled(own.zygote, 2)  # it ends with its parent

    assert [(made.mold, made.zygote) for made in creates(commands)] == [(BASE, None)]
    (base,) = (warm for warm in warms(state.tick(2.5)) if warm.function is None)
    (again,) = warms(state.warmed(base.zygote, 3))
    assert (again.function, again.parent) == (ONCE, base.zygote)


def test_a_fork_that_fails_lets_the_zygote_go_and_is_followed_by_one_of_the_environments():
    """At once: nobody waits out a pause, and the zygote is tried again after one."""
    state = kept()
    old = own_zygote(state)
    (made,) = creates(state.submit(I1, ONCE.id, 1))

    commands = state.died(made.sandbox, 2)

    assert retired(commands) == [old]
    assert Destroy(made.sandbox, "failed") in commands
    assert [(each.mold, each.zygote) for each in creates(commands)] == [(BASE, base_of(state))]
    assert warms(state.tick(2.4)) == []
    assert [warm.mold for warm in warms(state.tick(2.5))] == [own_mold(ONCE)]


def test_a_function_that_is_killed_in_its_forks_again_and_again_is_told_as_broken():
    """In whatever it is loaded, a few may be killed from outside, and no more."""
    state = kept()
    commands = state.submit(I1, ONCE.id, 1)
    for now in range(1, 10):
        (made,) = creates(commands)
        state.ready(made.sandbox, now)
        commands = state.died(made.sandbox, now)
        if not creates(commands):
            break

    assert [c.failure.kind for c in commands if isinstance(c, Refuse) and c.failure] == [
        "InitCrashed"
    ]


# ---- versions -----------------------------------------------------------------------------------


def test_a_new_version_never_uses_an_old_zygote():
    """It goes at once, and who waits is forked from the new version's."""
    state = kept()
    old = own_zygote(state)
    (made,) = creates(state.submit(I1, ONCE.id, 1))
    commands = deploy(state, ONCE_2, 2)

    assert retired(commands) == [old]
    (warm,) = warms(commands)
    assert (warm.function, warm.mold) == (ONCE_2, own_mold(ONCE_2))
    assert state.ready(made.sandbox, 3) == []  # forked after the old import: of no use
    assert Destroy(made.sandbox, "surplus") in state.tick(3)
    forked = creates(state.warmed(warm.zygote, 4))
    assert [each.zygote for each in forked] == [warm.zygote]


def test_a_zygote_that_is_ready_for_an_old_version_goes_at_once():
    """It was being warmed when the new one was deployed."""
    state = based(ONCE)
    (old,) = warms(state.submit(I1, ONCE.id, 1))
    (new,) = warms(deploy(state, ONCE_2, 2))

    assert state.warmed(old.zygote, 3) == [Retire(old.zygote)]
    assert own_zygote(state, ONCE) is None
    assert creates(state.warmed(new.zygote, 3))


@pytest.mark.parametrize("how", [{}, {"failure": BROKEN}, {"unfit": "threads"}])
def test_a_zygote_that_fails_for_an_old_version_is_nothing_to_the_new_one(how: dict[str, Any]):
    """Neither refuses it anybody, nor does it end the attempt."""
    state = based(ONCE)
    (old,) = warms(state.submit(I1, ONCE.id, 1))
    deploy(state, ONCE_2, 2)

    assert state.chilled(old.zygote, 3, **how) == []
    assert state.waiting == 1
    assert decided(state, ONCE_2) == (True, "it is declared so")
    state.tick(4)
    assert own_mold(ONCE) not in state.molds


def test_a_version_that_declares_each_lets_the_zygote_go():
    state = kept()
    old = own_zygote(state)
    plain = of(version="2", initialize="each")
    commands = deploy(state, plain, 1) + state.tick(1)

    assert retired(commands) == [old]
    assert [made.mold for made in creates(state.submit(I1, plain.id, 2))] == [BASE]
    state.tick(3)
    assert list(state.molds) == [BASE]


def test_the_next_version_of_a_heavy_function_is_undecided_again():
    """It may import less, or something that cannot be forked."""
    state = based(AUTO)
    play(state, learn(state, AUTO, HEAVY_S), 0)
    deploy(state, AUTO_2, 1)

    assert decided(state) == (None, "it has not been loaded yet")
    assert [made.mold for made in creates(state.submit(I1, AUTO_2.id, 2))] == [BASE]


def test_a_removed_function_leaves_neither_zygote_nor_mold():
    state = kept()
    old, base = own_zygote(state), base_of(state)

    assert set(retired(state.remove(ONCE.id, 1))) == {old, base}
    state.tick(2)
    state.tick(3)
    assert (state.molds, state.zygotes) == ({}, {})


def test_a_function_that_is_removed_while_its_zygote_is_warmed_leaves_nothing():
    state = based(ONCE, BESIDE)
    (warm,) = warms(state.submit(I1, ONCE.id, 1))
    assert Refuse(I1, None) in state.remove(ONCE.id, 2)

    assert state.warmed(warm.zygote, 3) == [Retire(warm.zygote)]
    state.tick(4)
    assert list(state.molds) == [BASE]
    assert state._turns.under_way("own") == 0


# ---- time, wear and memory ----------------------------------------------------------------------


def test_a_worn_zygote_is_replaced_and_forks_until_the_other_is_ready():
    """After its forks, as an environment's is; the successor imports the function itself."""
    state = kept()
    old, base = own_zygote(state), base_of(state)
    commands = [c for i in (I1, I2, I3) for c in state.submit(i, ONCE.id, 1)]
    (warm,) = warms(commands)
    assert (warm.mold, warm.function, warm.parent) == (own_mold(ONCE), ONCE, base)
    assert {made.zygote for made in creates(commands)} == {old}
    (made,) = creates(state.submit(I4, ONCE.id, 2))
    assert made.zygote == old

    assert state.warmed(warm.zygote, 3) == [Retire(old)]
    assert own_zygote(state) == warm.zygote
    state.abandon(I4)


def test_at_its_age_a_zygote_is_replaced():
    """Its environment's had nothing to do and has gone: another comes first, to fork it from."""
    state = kept()
    old = own_zygote(state)
    state.molds[own_mold(ONCE)].used_at = 190.0  # it is in use
    assert old not in retired(state.tick(50) + state.tick(199.9))

    (base,) = warms(state.tick(200))
    (warm,) = warms(state.warmed(base.zygote, 201))

    assert warm == Warm(warm.zygote, own_mold(ONCE), ONCE, base.zygote)
    assert retired(state.warmed(warm.zygote, 202)) == [old]


def test_a_zygote_that_nobody_needed_for_long_goes_and_comes_back_with_the_next_claim():
    """Which waits for it: importing it elsewhere would take as long."""
    state = kept(ONCE, BESIDE)
    old = own_zygote(state)

    assert old not in retired(state.tick(49.9))
    assert old in retired(state.tick(50))
    assert warms(state.tick(60)) == []
    play(state, state.add_mold(BASE, 1, 60), 60)
    commands = state.submit(I1, ONCE.id, 61)
    assert creates(commands) == []
    assert [warm.mold for warm in warms(commands)] == [own_mold(ONCE)]


def test_a_zygote_in_use_stays():
    """A fork counts, and so does a claim."""
    state = kept()
    old = own_zygote(state)
    play(state, state.submit(I1, ONCE.id, 49), 49)
    for box in list(state.sandboxes):
        state.died(box, 49)

    assert old not in retired(state.tick(98.9))
    assert old in retired(state.tick(99))


def test_while_memory_is_short_a_functions_zygote_that_is_not_in_use_goes_after_seconds():
    """It holds an import's worth of memory; its environment's, which all share, stays."""
    state = kept()
    old, base = own_zygote(state), base_of(state)

    assert retired(state.tick(SPARE_IDLE_S - 0.1, is_short_of_memory=True)) == []
    assert retired(state.tick(SPARE_IDLE_S, is_short_of_memory=True)) == [old]
    assert base_of(state) == base
    assert retired(state.tick(49, is_short_of_memory=True)) == []


def test_while_memory_is_short_none_is_warmed_and_a_function_loads_like_any_other():
    """And has one again when there is memory, with the next claim."""
    state = based(ONCE)
    state.tick(1, is_short_of_memory=True)

    commands = state.submit(I1, ONCE.id, 2)
    assert (warms(commands), [made.mold for made in creates(commands)]) == ([], [BASE])
    state.tick(3)
    assert [warm.mold for warm in warms(state.submit(I2, ONCE.id, 4))] == [own_mold(ONCE)]


def test_a_heavy_function_waits_for_memory_to_have_its_zygote():
    """It is decided when it is imported, and warmed as soon as the machine has room."""
    state = based(AUTO)
    state.tick(1, is_short_of_memory=True)
    assert warms(learn(state, AUTO, HEAVY_S, now=2)) == []
    assert decided(state)[0] is True
    assert warms(state.tick(3, is_short_of_memory=True)) == []

    assert [warm.function for warm in warms(state.tick(4))] == [AUTO]


def test_claims_do_not_wait_for_a_zygote_that_lack_of_memory_keeps_from_coming():
    """Its turn had not come when the memory ran short: now it would wait for as long as that."""
    state = based(ONCE, BESIDE, starts_max=2)
    made = creates([c for i in (I1, I2) for c in state.submit(i, BESIDE.id, 0)])
    loads = [c for each in made for c in state.ready(each.sandbox, 0)]
    assert [type(command) for command in loads] == [Specialize, Specialize]
    assert state.submit(I3, ONCE.id, 1) == []

    commands = state.tick(2, is_short_of_memory=True)
    for load in loads:
        assert isinstance(load, Specialize)
        commands += state.loaded(load.sandbox, 1, 3)

    assert [each.mold for each in creates(commands)] == [BASE]


# ---- turns --------------------------------------------------------------------------------------


def test_warming_is_cold_work_and_waits_for_its_turn():
    """An import keeps a processor busy wherever it is done."""
    state = based(ONCE, BESIDE, starts_max=1)
    (made,) = creates(state.submit(I1, BESIDE.id, 0))
    assert state.submit(I2, ONCE.id, 0) == []

    commands = state.ready(made.sandbox, 1)

    assert [warm.function for warm in warms(commands)] == [ONCE]
    assert [type(command) for command in commands] == [Warm, Specialize]
    assert state._turns.under_way("own") == 2.0


@pytest.mark.parametrize("how", ["warmed", "chilled", "unfit", "failed"])
def test_the_end_of_warming_is_the_end_of_its_work(how: str):
    """However it ended: what waited for its turn has it."""
    state = based(ONCE, BESIDE, starts_max=1)
    (warm,) = warms(state.submit(I1, ONCE.id, 0))
    assert state.submit(I2, BESIDE.id, 0) == []
    match how:
        case "warmed":
            commands = state.warmed(warm.zygote, 1)
        case "unfit":
            commands = state.chilled(warm.zygote, 1, unfit="threads")
        case "failed":
            commands = state.chilled(warm.zygote, 1, failure=BROKEN)
        case _:
            commands = state.chilled(warm.zygote, 1)

    assert own_mold(ONCE) not in state.molds or not state.molds[own_mold(ONCE)].warming
    assert BASE in [made.mold for made in creates(commands)]
    weight = sum(box.work[1] for box in state.sandboxes.values() if box.work)
    assert state._turns.under_way("own") == weight


def test_another_tenants_warming_waits_for_nobody_elses():
    """Each has room for one piece of work."""
    theirs = of(tenant="theirs", initialize="once")
    state = based(ONCE, theirs, starts_max=1)
    assert [warm.function for warm in warms(state.submit(I1, ONCE.id, 0))] == [ONCE]

    assert [warm.function for warm in warms(state.submit(I2, theirs.id, 0))] == [theirs]


def test_a_load_whose_import_is_done_weighs_little():
    """As many forks' loads at once as would be four imports, or more."""
    state = kept(starts_max=2, forks=99)
    loading = 0
    todo = [c for n in range(20) for c in state.submit(InvocationId(f"n{n}"), ONCE.id, 0)]
    while made := creates(todo):
        todo = [c for each in made for c in state.ready(each.sandbox, 0)]
        loading += sum(isinstance(command, Specialize) for command in todo)

    assert loading > 4


def test_an_import_that_sleeps_leaves_its_turn_to_others():
    """It waits for a network nine tenths of the time: so may nine others meanwhile."""
    state = based(EACH, starts_max=1)
    (made,) = creates(state.submit(I1, EACH.id, 0))
    state.ready(made.sandbox, 0)
    state.loaded(made.sandbox, 1, 10, import_s=10.0, busy_s=1.0)
    assert state.functions[EACH.id].load_weight == pytest.approx(0.1)
    todo = [c for n in range(9) for c in state.submit(InvocationId(f"n{n}"), EACH.id, 20)]
    loading = 0
    while made_now := creates(todo):
        todo = [c for each in made_now for c in state.ready(each.sandbox, 20)]
        loading += sum(isinstance(command, Specialize) for command in todo)

    assert loading >= 5
