"""Laws of the engine, on random workflows with random outcomes, kills and repeated facts."""

import zlib
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from dayfly_pool.workflow.engine import Run
from dayfly_pool.workflow.facts import (
    Called,
    Cancel,
    CancelAsked,
    Command,
    Decided,
    Ended,
    Expect,
    Fact,
    Failed,
    Finish,
    Invoke,
    Passed,
    RetryAsked,
    RunBegan,
    Started,
    decode,
    encode,
)
from dayfly_pool.workflow.model import (
    Condition,
    Matrix,
    Param,
    Retries,
    Step,
    Timeouts,
    Wait,
    WorkflowSpec,
)
from dayfly_pool.workflow.plan import Definition
from dayfly_pool.workflow.tree import Shown

MOVES_MAX = 3000
"""Far more than any of these runs has; who needs them does not end."""


# ---- random workflows ---------------------------------------------------------------------------


@st.composite
def steps(draw: st.DrawFn, *, most: int, is_calm: bool, nested: tuple[str, ...]) -> list[Step]:
    """Up to *most*; in *is_calm* ones nothing fails for good, so that all orders end alike."""
    made: list[Step] = []
    for number in range(draw(st.integers(1, most))):
        names = [step.name for step in made]
        used = draw(st.lists(st.sampled_from(names), max_size=2, unique=True)) if names else []
        after = draw(st.lists(st.sampled_from(names), max_size=2, unique=True)) if names else []
        kind = draw(st.sampled_from(["handler"] * 6 + ["wait", *nested]))
        fields: dict[str, Any] = {"name": f"s{number}", "run_after": tuple(after)}
        fields["params"] = {f"p-{name}": f"$(steps.{name}.results.result)" for name in used}
        fields["on_error"] = "continue" if is_calm else draw(
            st.sampled_from(["stopAndFail", "stopAndFail", "continue"])
        )  # fmt: skip
        fields["retries"] = 100 if is_calm else draw(
            st.sampled_from([0, 1, Retries(limit=2, backoff_seconds=1.0)])
        )  # fmt: skip
        if names and draw(st.integers(0, 4)) == 0:
            other = draw(st.sampled_from(names))
            fields["when"] = (
                Condition(
                    input=f"$(steps.{other}.results.result)",
                    operator="in",
                    values=draw(st.sampled_from([("0", "1"), ("2", "3", "4")])),
                ),
            )
        if draw(st.integers(0, 3)) == 0:
            axis = st.sampled_from([[], [1], [1, 2, 3], ["a", "b"]])
            values: Any = draw(axis)
            if used and draw(st.booleans()):
                values = f"$(steps.{used[0]}.results.result)"  # no array, unless of a matrix
            fields["matrix"] = Matrix(
                params={"m": values}, parallelism=draw(st.sampled_from([0, 1, 2]))
            )
        if "matrix" in fields and not is_calm and draw(st.integers(0, 3)) == 0:
            fields["params"] |= {"no": "$(item.m.nope)"}  # fails before it runs
        match kind:
            case "handler":
                fields["handler"] = "work:do"
                if draw(st.booleans()):
                    fields["workspaces"] = {"w": "w"}
            case "wait":
                wait = st.sampled_from([Wait(timer=5), Wait(callback=True), Wait(approval="go?")])
                fields["wait"] = draw(wait)
                fields["timeout"] = None if is_calm else draw(st.sampled_from([None, 3.0]))
            case _:
                fields["workflow"] = kind
                fields["params"] = {}
                fields["workspaces"] = {"w": "w"}
        made.append(Step(**fields))
    return made


def as_final(step: Step, last: str) -> Step:
    """It comes after nothing but all, and asks how that went."""
    matrix = step.matrix if step.matrix and isinstance(step.matrix.params["m"], list) else None
    params = {"s": "$(steps.status)", "r": f"$(steps.{last}.results.result)"}
    if matrix and "no" in step.params:
        params["no"] = step.params["no"]
    return structs.replace(
        step, name=f"f{step.name}", run_after=(), params=params, when=(), matrix=matrix
    )


@st.composite
def definitions(draw: st.DrawFn, *, is_calm: bool = False) -> Definition:
    def workflow(most: int, nested: tuple[str, ...]) -> WorkflowSpec:
        made = draw(steps(most=most, is_calm=is_calm, nested=nested))
        finals = draw(steps(most=2, is_calm=is_calm, nested=())) if draw(st.booleans()) else []
        last = made[-1].name
        return WorkflowSpec(
            steps=tuple(made),
            finally_=tuple(as_final(step, last) for step in finals),
            workspaces=("w",),
            params=(Param(name="m", type="any", default=0),),
            results={"result": f"$(steps.{last}.results.result)", "all": "$(steps.s0.status)"},
            timeouts=Timeouts() if is_calm else draw(
                st.sampled_from([Timeouts(), Timeouts(steps=4.0), Timeouts(workflow=9.0)])
            ),
        )  # fmt: skip

    inner = {"inner": workflow(3, ()), "outer": workflow(2, ("inner",))}
    return Definition(workflow(6, ("inner", "outer")), inner)


def chance(key: str, attempt: int, seed: int) -> int:
    return zlib.crc32(f"{key} {attempt} {seed}".encode()) % 100


def value(command: Invoke) -> int:
    """What a step makes of what it is given: the same of the same."""
    given = [command.step.name, command.params, sorted(command.workspaces.items())]
    return zlib.crc32(repr(given).encode()) % 5


def outcome(command: Command, at: float, seed: int) -> Fact | None:
    match command:
        case Invoke(key=key, attempt=attempt):
            luck = chance(key, attempt, seed)
            if luck < 15:
                return Failed(at=at, key=key, attempt=attempt, kind="Raised")
            if luck < 25:
                return Failed(at=at, key=key, attempt=attempt, kind="Lost", is_counted=False)
            return Ended(at=at, key=key, attempt=attempt, results={"result": value(command)})
        case Cancel(key=key, attempt=attempt):
            return Failed(at=at, key=key, attempt=attempt, kind="Cancelled")
        case Expect(key=key, attempt=attempt, kind="callback"):
            return Called(at=at, key=key, attempt=attempt, value=3)
        case Expect(key=key, attempt=attempt):
            return Decided(at=at, key=key, attempt=attempt, is_approved=True)
        case _:
            return None


# ---- a shell that is killed ---------------------------------------------------------------------


class Shell:
    """Carries out commands in any order, and keeps a journal; *choose* says what comes next."""

    def __init__(self, definition: Definition, seed: int, choose: Callable[[int], int]) -> None:
        self.definition, self.seed, self.choose = definition, seed, choose
        self.run, self.now = Run(definition), 1.0
        self.journal: list[Fact] = []
        self.batch: list[Fact] = []
        self.held: list[Command] = []
        self.todo: list[Command] = []
        self.told: list[Fact] = []
        self.finished: list[Finish] = []
        self.ended: set[str] = set()

    def tell(self, fact: Fact) -> None:
        """One fact of a batch: what follows from it waits until the batch is on the disk."""
        before = self.run.taken
        self.held += self.run.feed(fact)
        if self.run.taken > before:
            self.batch.append(fact)
        self.told.append(fact)

    def commit(self) -> None:
        self.journal += self.batch
        for fact in self.batch:
            if isinstance(fact, Ended) and "fs" not in fact.key:  # what runs finally may again
                self.ended.add(fact.key)
        self.batch.clear()
        for command in self.held:
            self.accept(command)
        self.held.clear()

    def accept(self, command: Command) -> None:
        match command:
            case Finish():
                self.finished.append(command)
                self.todo.clear()
            case Cancel(key=key):
                self.todo = [each for each in self.todo if getattr(each, "key", "") != key]
                self.todo.append(command)
            case Invoke():
                assert command.key not in self.ended, f"{command.key} ended, and was asked for"
                self.check_order(command)
                self.todo.append(command)
            case _:
                self.todo.append(command)

    def check_order(self, command: Invoke) -> None:
        """All that it comes after is over."""
        shown = self.run.tree()
        assert shown is not None
        siblings = siblings_of(shown, command.key)
        for name in (*command.step.run_after, *(p.removeprefix("p-") for p in command.params)):
            if name in siblings:
                assert siblings[name] in ("succeeded", "failed", "skipped"), (command.key, name)

    def die(self) -> None:
        """Kill -9: what was not on the disk is gone, and what was under way with it."""
        for lost in (self.batch, self.held, self.todo):
            lost.clear()
        self.run = Run(self.definition)
        for fact in self.journal:
            self.run.feed(decode(encode(fact)))
        self.finished.clear()
        for command in self.run.outstanding():
            self.accept(command)

    def move(self) -> None:
        """Something happens."""
        self.now += self.choose(3)
        due = self.run.wake_at
        if due is not None and (due <= self.now or not (self.todo or self.held or self.batch)):
            self.now = max(self.now, due)
            self.tell(Passed(at=self.now))
        elif self.todo:
            command = self.todo.pop(self.choose(len(self.todo)))
            if isinstance(command, Invoke) and self.choose(2):
                self.tell(Started(at=self.now, key=command.key, attempt=command.attempt))
            fact = outcome(command, self.now, self.seed)
            if fact is not None:
                self.tell(fact)
        if not self.choose(3) or not self.todo:
            self.commit()

    def play(self, *, kills: int = 0) -> Finish:
        self.tell(RunBegan(at=self.now))
        self.commit()
        for _ in range(MOVES_MAX):
            if self.finished and not self.batch:
                return self.finished[-1]
            self.move()
            if kills and not self.choose(6):
                kills -= 1
                self.die()
            if kills and self.told and not self.choose(4):
                self.tell(self.told[self.choose(len(self.told))])
        raise AssertionError(f"no end: {self.run!r} {self.run.outstanding()}")


def siblings_of(shown: Shown, key: str) -> dict[str, str]:
    here = shown
    for part in key.split("/")[:-1]:
        name, _, index = part.partition("[")
        here = next(child for child in here.children if child.name == name)
        if index:
            here = next(child for child in here.children if child.name == f"[{index}")
    return {child.name: child.state for child in here.children}


def in_order(number: int) -> int:
    return 0


def chooser(draw: st.DataObject) -> Callable[[int], int]:
    random = draw.draw(st.randoms(use_true_random=False))
    return lambda number: random.randrange(number) if number > 1 else 0


# ---- laws ---------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(definitions(), st.integers(0, 1000), st.data())
def test_every_run_ends_whatever_fails_and_whenever_it_is_killed(
    definition: Definition, seed: int, data: st.DataObject
):
    """And no step that ended is commanded again, and none before what it comes after."""
    end = Shell(definition, seed, chooser(data)).play(kills=5)

    assert end.status in ("Succeeded", "Completed", "Failed", "TimedOut")


@settings(max_examples=40)
@given(definitions(is_calm=True), st.integers(0, 1000), st.data())
def test_what_is_killed_ends_as_what_is_left_alone(
    definition: Definition, seed: int, data: st.DataObject
):
    """In any order of events, with facts that come twice and late: same status, same results."""
    alone = Shell(definition, seed, in_order).play()

    assert Shell(definition, seed, chooser(data)).play(kills=5) == alone


@settings(max_examples=40)
@given(definitions(), st.integers(0, 1000), st.data())
def test_replay_and_snapshots_say_what_the_run_says(
    definition: Definition, seed: int, data: st.DataObject
):
    shell = Shell(definition, seed, chooser(data))
    shell.play()
    cut = data.draw(st.integers(0, len(shell.journal)))
    replayed, first = Run(definition), Run(definition)
    commands = [replayed.feed(decode(encode(fact))) for fact in shell.journal]
    for fact in shell.journal[:cut]:
        first.feed(fact)
    restored = Run.restore(first.snapshot(), definition)

    assert restored.snapshot() == first.snapshot()
    assert restored.outstanding() == first.outstanding()
    assert restored.wake_at == first.wake_at
    assert [restored.feed(fact) for fact in shell.journal[cut:]] == commands[cut:]
    assert restored.snapshot() == replayed.snapshot() == shell.run.snapshot()
    assert restored.tree() == shell.run.tree()


@settings(max_examples=40)
@given(definitions(), st.integers(0, 1000), st.booleans(), st.data())
def test_a_cancelled_run_ends_and_goes_on_when_asked(
    definition: Definition, seed: int, is_hard: bool, data: st.DataObject
):
    """What has succeeded of its steps does not run again."""
    shell = Shell(definition, seed, chooser(data))
    shell.tell(RunBegan(at=1.0))
    for _ in range(data.draw(st.integers(0, 20))):
        if not shell.finished:
            shell.move()
    shell.tell(CancelAsked(at=shell.now, is_hard=is_hard))
    shell.commit()
    for _ in range(MOVES_MAX):
        if shell.finished:
            break
        shell.move()
    status = shell.finished[-1].status
    if status in ("Failed", "TimedOut", "Cancelled"):
        shell.finished.clear()
        shell.tell(RetryAsked(at=shell.now))
        shell.commit()
        for _ in range(MOVES_MAX):
            if shell.finished:
                break
            shell.move()

    assert shell.finished


KEYS = st.sampled_from(["", "s0", "s1", "s1[0]", "s2/s0", "fs0", "nowhere"])
TIMES = st.floats(0, 100)
ANY_FACT = st.one_of(
    st.builds(Started, at=TIMES, key=KEYS, attempt=st.integers(0, 3)),
    st.builds(Ended, at=TIMES, key=KEYS, attempt=st.integers(0, 3)),
    st.builds(Failed, at=TIMES, key=KEYS, attempt=st.integers(0, 3), kind=st.just("Raised")),
    st.builds(Passed, at=TIMES),
    st.builds(Called, at=TIMES, key=KEYS, attempt=st.integers(0, 3)),
    st.builds(Decided, at=TIMES, key=KEYS, attempt=st.integers(0, 3), is_approved=st.booleans()),
    st.builds(CancelAsked, at=TIMES, is_hard=st.booleans()),
    st.builds(RetryAsked, at=TIMES),
    st.builds(RunBegan, at=TIMES),
)


@settings(max_examples=60)
@given(definitions(), st.lists(ANY_FACT, max_size=40))
def test_no_fact_at_any_time_is_too_much(definition: Definition, facts: list[Fact]):
    """It takes it or not, and never raises; twice the same at once is never news."""
    run = Run(definition)
    run.feed(RunBegan(at=0.0))
    for fact in facts:
        run.feed(fact)
        taken = run.taken
        if not isinstance(fact, Passed | RetryAsked | CancelAsked):
            assert run.feed(fact) == []
            assert run.taken == taken
    run.outstanding()

    assert Run.restore(run.snapshot(), definition).snapshot() == run.snapshot()
