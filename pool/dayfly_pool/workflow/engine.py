"""What a run does next: facts in, commands out. Nothing here performs I/O or knows the time.

A shell feeds what has happened; the state moves at once, and what is to be done is returned. When
the shell is gone, another feeds the journal's facts again, throws the commands away, and asks what
is `outstanding`: no step that ended is ever commanded again. (`facts` says what must be on the disk
before what.) The same facts always make the same commands; user code runs in steps only. The shell
looks at `wake_at` after each fact, and feeds `Passed` when that time has come.

* A step's turn comes when all that it comes after is over. It is skipped (`words` has the rules),
  or starts at once: who runs it has the queue. With a matrix, it starts its instances, in order,
  as many at once as *parallelism* says.
* A failure that counts uses up one of the retries, after exponentially longer pauses; others are
  tried again until the run's time is up. `onError: continue`: it failed, and that is all.
* When a step has failed, nothing new starts in its workflow. What is under way is let end, with
  its retries, as with Tekton, and a nested workflow is one thing under way. But waits are given up.
* Then what runs finally does, also after a cancellation or when the time was up; its failure is the
  workflow's. It has a time of its own, or what is left, and at least a minute. Only a hard
  cancellation ends the run at once.
* Who is stopped says so, so that what runs finally finds nobody at work; or half a minute passes.
* A nested workflow is all of this again, in the same journal: its results and its end are its
  step's. A step that waits holds nothing.
* Asked to go on after it failed, a run keeps what succeeded and what was let fail. All else is as
  if it had not been, but for attempts' numbers; what runs finally runs again. A nested workflow
  that has retries goes on in the same way.

Each step that has workspaces is told which versions of them it starts from (`versions`); a failed
one leaves none.
"""

from collections.abc import Mapping
from typing import Final, assert_never

import msgspec

from dayfly_pool.errors import BadInput
from dayfly_pool.workflow.facts import (
    FORMAT,
    MESSAGE_CHARACTERS_MAX,
    Called,
    Cancel,
    CancelAsked,
    Command,
    Decided,
    Ended,
    Fact,
    Failed,
    Passed,
    RetryAsked,
    RunBegan,
    Started,
    Status,
)
from dayfly_pool.workflow.nodes import Node, Phase, Stage, State
from dayfly_pool.workflow.plan import Definition
from dayfly_pool.workflow.tree import Shown, tree
from dayfly_pool.workflow.walk import Walk

FACTS_MAX: Final = 5_000_000
RETRIABLE: Final = ("Failed", "TimedOut", "Cancelled")
UNDER_WAY: Final = frozenset({Phase.ASKED, Phase.RUNNING, Phase.STOPPING})


class Run:
    """One run of a workflow. Takes any fact at any time, and never raises for one.

    *definition* must be the one that the run began with.
    """

    def __init__(self, definition: Definition, state: State | None = None) -> None:
        self._state = state or State()
        self._nodes = self._state.nodes
        self._commanded = self._state.commanded
        self._walk = Walk(definition, self._state)

    @classmethod
    def restore(cls, snapshot: bytes, definition: Definition) -> "Run":
        """The run that said this of itself. Raises `BadInput` if this version cannot read it."""
        try:
            state = msgspec.msgpack.decode(snapshot, type=State)
        except msgspec.DecodeError as error:
            raise BadInput(f"no run that this version of Dayfly knows: {error}") from error
        if state.format != FORMAT:
            raise BadInput(f"written by another version of Dayfly (format {state.format})")
        return cls(definition, state)

    def snapshot(self) -> bytes:
        """All that the facts so far amount to."""
        return msgspec.msgpack.encode(self._state)

    def __repr__(self) -> str:
        counts = {phase: 0 for phase in Phase}
        for node in self._nodes.values():
            counts[node.phase] += bool(node.key) and node.fan is None
        parts = [f"{number} {phase.name.lower()}" for phase, number in counts.items() if number]
        return f"<Run {self.status or 'under way'} [{', '.join(parts) or 'empty'}]>"

    @property
    def taken(self) -> int:
        """Facts that made a difference. What does not raise this number need not be kept."""
        return self._state.taken

    @property
    def status(self) -> Status | None:
        """How it ended; None while it has not."""
        root = self._nodes.get("")
        return root.flow.status if root and root.flow else None

    @property
    def wake_at(self) -> float | None:
        """When the next fact must be `Passed`, if none comes before; Unix seconds."""
        return self._walk.due_at()

    def outstanding(self) -> list[Command]:
        """All that was commanded and has not ended, as it was commanded."""
        commands: list[Command] = []
        for key in self._commanded:
            node = self._nodes[key]
            if node.phase is Phase.EXPECTING:
                commands.append(self._walk.expect(node))
            elif node.phase is Phase.STOPPING:
                commands.append(Cancel(key, node.attempt))
            else:
                commands.append(self._walk.words.invoke(node))
        root = self._nodes.get("")
        if root is not None and root.phase.is_over:
            commands.append(self._walk.finish_of(root))
        return commands

    def tree(self) -> Shown | None:
        """What people see of it; None before it began."""
        return tree(self._state, self._walk.words)

    # ---- facts --------------------------------------------------------------------------------

    def feed(self, fact: Fact) -> list[Command]:
        """What is to be done now that this has happened."""
        walk = self._walk
        walk.now = fact.at
        if self._takes(fact):
            self._state.taken += 1
            walk.work()
            if self._state.taken >= FACTS_MAX and not self.status:
                walk.end_at_once("Failed", "TooManyFacts", f"{FACTS_MAX} facts and no end")
        commands, walk.commands = walk.commands, []
        return commands

    def _takes(self, fact: Fact) -> bool:
        match fact:
            case Started():
                return self._started(fact)
            case Ended():
                return self._ended(fact)
            case Failed():
                return self._attempt_failed(fact)
            case Passed():
                return self._passed(fact.at)
            case RunBegan():
                return self._run_began(fact)
            case Called() | Decided():
                return self._answered(fact)
            case CancelAsked():
                return self._cancel_asked(fact)
            case RetryAsked():
                return self._retry_asked()
            case _:
                assert_never(fact)

    def _commanded_attempt(self, fact: Started | Ended | Failed | Called | Decided) -> Node | None:
        if fact.key not in self._commanded:
            return None
        node = self._nodes[fact.key]
        return node if node.attempt == fact.attempt else None

    def _run_began(self, fact: RunBegan) -> bool:
        if self._nodes:
            return False
        self._walk.begin(fact.params, fact.run)
        return True

    def _started(self, fact: Started) -> bool:
        node = self._commanded_attempt(fact)
        if node is None or node.phase not in (Phase.ASKED, Phase.RUNNING):
            return False
        if node.phase is Phase.RUNNING and node.began_at == fact.at:
            return False
        node.move(Phase.RUNNING)
        node.began_at, node.report = fact.at, fact.report
        return True

    def _ended(self, fact: Ended) -> bool:
        node = self._commanded_attempt(fact)
        if node is None or node.phase not in UNDER_WAY:
            return False
        node.results, node.outputs = fact.results, fact.outputs
        node.was_cached, node.report = fact.was_cached, fact.report
        self._walk.succeeded(node)
        return True

    def _attempt_failed(self, fact: Failed) -> bool:
        node = self._commanded_attempt(fact)
        if node is None or node.phase not in UNDER_WAY:
            return False
        node.report = fact.report
        if node.phase is Phase.STOPPING:
            self._walk.over(node, Phase.CANCELLED)
            return True
        node.failure = (fact.kind, fact.message[:MESSAGE_CHARACTERS_MAX])
        self._walk.failed(node, is_counted=fact.is_counted, is_hopeless=fact.is_hopeless)
        return True

    def _answered(self, fact: Called | Decided) -> bool:
        node = self._commanded_attempt(fact)
        if node is None or node.phase is not Phase.EXPECTING:
            return False
        step = self._walk.words.step_of(node)
        assert step.wait is not None
        if isinstance(fact, Called) != step.wait.callback:
            return False
        if isinstance(fact, Called):
            node.results = {"result": fact.value}
            if isinstance(fact.value, Mapping):
                declared = (each.name for each in step.results)
                node.results |= {name: fact.value[name] for name in declared if name in fact.value}
            self._walk.succeeded(node)
        else:
            node.results = {"result": {"by": fact.by, "note": fact.note}}
            if fact.is_approved:
                self._walk.succeeded(node)
            else:
                self._walk.fail(node, "Refused", f"{fact.by} refused: {fact.note}")
        return True

    def _passed(self, now: float) -> bool:
        """Everything that is due by *now* happens, in the order in which it fell due."""
        is_news = False
        while (due := self.wake_at) is not None and due <= now:
            self._walk.fall_due()
            is_news = True
        return is_news

    def _cancel_asked(self, fact: CancelAsked) -> bool:
        root = self._nodes.get("")
        if root is None or root.flow is None or root.phase.is_over:
            return False
        by = f"cancelled by {fact.by}" if fact.by else "cancelled"
        if fact.is_hard:
            self._walk.end_at_once("Cancelled", "Cancelled", by)
            return True
        if root.flow.stage is not Stage.STEPS or root.flow.stop == "cancelled":
            return False
        root.flow.failure = ("Cancelled", by)
        self._walk.stop(root, "cancelled")
        return True

    def _retry_asked(self) -> bool:
        root = self._nodes.get("")
        if root is None or root.flow is None or not root.flow.missing:
            return False  # it never got as far as its first step
        if root.flow.status not in RETRIABLE:
            return False
        self._walk.retry(root)
        return True
