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

from collections import deque
from collections.abc import Mapping
from heapq import heapify, heappop, heappush
from typing import Final, Literal, assert_never

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
    Expect,
    Fact,
    Failed,
    Finish,
    Passed,
    RetryAsked,
    RunBegan,
    Started,
    Status,
)
from dayfly_pool.workflow.model import Retries
from dayfly_pool.workflow.nodes import Fan, Flow, Node, Phase, Stage, State
from dayfly_pool.workflow.plan import Definition, Plan
from dayfly_pool.workflow.stand_in import Unresolved, bind, seconds
from dayfly_pool.workflow.tree import Shown, tree
from dayfly_pool.workflow.words import EMPTY, MISSING, Cel, Words

DEPTH_MAX: Final = 10
INSTANCES_MAX: Final = 100_000
FACTS_MAX: Final = 5_000_000
FINALLY_S_MIN: Final = 60.0
STOP_S: Final = 30.0
"""Who was told to stop and has not said that it has is taken for stopped after this long."""

FAULT_FIRST_S: Final = 0.05
FAULT_MAX_S: Final = 5.0
BACKOFF_DOUBLINGS_MAX: Final = 60
MORE: Final = -1
"""In place of a step: a matrix may have room for further instances."""

RETRIABLE: Final = ("Failed", "TimedOut", "Cancelled")
UNDER_WAY: Final = frozenset({Phase.ASKED, Phase.RUNNING, Phase.STOPPING})


class Run:
    """One run of a workflow. Takes any fact at any time, and never raises for one.

    *definition* must be the one that the run began with, and have been checked.
    """

    def __init__(self, definition: Definition, cel: Cel | None = None) -> None:
        self._definition = definition
        self._cel = cel
        self._set(State())

    def _set(self, state: State) -> None:
        self._state = state
        self._nodes = state.nodes
        self._commanded = state.commanded
        self._words = Words(self._definition, state, self._cel)
        self._timers = [
            (node.due, node.key) for node in state.nodes.values() if node.due is not None
        ]
        heapify(self._timers)
        self._todo: deque[tuple[str, int]] = deque()
        self._commands: list[Command] = []
        self._now = 0.0

    @classmethod
    def restore(cls, snapshot: bytes, definition: Definition, cel: Cel | None = None) -> "Run":
        """The run that said this of itself. Raises `BadInput` if this version cannot read it."""
        try:
            state = msgspec.msgpack.decode(snapshot, type=State)
        except msgspec.DecodeError as error:
            raise BadInput(f"no run that this version of Dayfly knows: {error}") from error
        if state.format != FORMAT:
            raise BadInput(f"written by another version of Dayfly (format {state.format})")
        run = cls(definition, cel)
        run._set(state)
        return run

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
        while self._timers:
            due, key = self._timers[0]
            node = self._nodes.get(key)
            if node is not None and node.due == due:
                return due
            heappop(self._timers)
        return None

    def outstanding(self) -> list[Command]:
        """All that was commanded and has not ended, as it was commanded."""
        commands: list[Command] = []
        for key in self._commanded:
            node = self._nodes[key]
            if node.phase is Phase.EXPECTING:
                commands.append(self._expect(node))
            elif node.phase is Phase.STOPPING:
                commands.append(Cancel(key, node.attempt))
            else:
                commands.append(self._words.invoke(node))
        root = self._nodes.get("")
        if root is not None and root.phase.is_over:
            commands.append(self._finish_of(root))
        return commands

    def tree(self) -> Shown | None:
        """What people see of it; None before it began."""
        return tree(self._state, self._words)

    # ---- facts --------------------------------------------------------------------------------

    def feed(self, fact: Fact) -> list[Command]:
        """What is to be done now that this has happened."""
        self._now = fact.at
        if self._takes(fact):
            self._state.taken += 1
            self._work()
            if self._state.taken >= FACTS_MAX and not self.status:
                self._end_at_once("Failed", "TooManyFacts", f"{FACTS_MAX} facts and no end")
        commands, self._commands = self._commands, []
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
        root = self._nodes[""] = Node("", "", 0, began_at=fact.at, asked_at=fact.at)
        plan = self._words.plan("")
        workspaces = {name: name for name in plan.spec.workspaces}
        root.flow = Flow("", 0, dict(fact.params), workspaces, [])
        try:
            params = bind(plan.spec.params, fact.params)
            self._reserve(root, len(plan.steps))
        except BadInput as error:
            root.move(Phase.OPEN)
            self._end_at_once("Failed", "BadInput", error.detail)
        else:
            self._open(root, plan, Flow("", 1, params, workspaces, []))
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
        self._succeeded(node)
        return True

    def _attempt_failed(self, fact: Failed) -> bool:
        node = self._commanded_attempt(fact)
        if node is None or node.phase not in UNDER_WAY:
            return False
        node.report = fact.report
        if node.phase is Phase.STOPPING:
            self._over(node, Phase.CANCELLED)
            return True
        node.failure = (fact.kind, fact.message[:MESSAGE_CHARACTERS_MAX])
        self._failed(node, is_counted=fact.is_counted, is_hopeless=fact.is_hopeless)
        return True

    def _answered(self, fact: Called | Decided) -> bool:
        node = self._commanded_attempt(fact)
        if node is None or node.phase is not Phase.EXPECTING:
            return False
        step = self._words.step_of(node)
        assert step.wait is not None
        if isinstance(fact, Called) != step.wait.callback:
            return False
        if isinstance(fact, Called):
            node.results = {"result": fact.value}
            if isinstance(fact.value, Mapping):
                declared = (each.name for each in step.results)
                node.results |= {name: fact.value[name] for name in declared if name in fact.value}
            self._succeeded(node)
        else:
            node.results = {"by": fact.by, "note": fact.note}
            if fact.is_approved:
                self._succeeded(node)
            else:
                self._fail(node, "Refused", f"{fact.by} refused: {fact.note}")
        return True

    def _passed(self, now: float) -> bool:
        """Everything that is due by *now* happens, in the order in which it fell due."""
        is_news = False
        while (due := self.wake_at) is not None and due <= now:
            node = self._nodes[heappop(self._timers)[1]]
            node.due = None
            is_news = True
            self._fell_due(node)
            self._work()  # before the next: what is done now may undo it
        return is_news

    def _fell_due(self, node: Node) -> None:
        match node.phase:
            case Phase.DELAYED:
                self._start(node)
            case Phase.STOPPING:
                self._commanded.pop(node.key, None)
                self._over(node, Phase.CANCELLED)
            case Phase.EXPECTING:
                wait = self._words.step_of(node).wait
                if wait is not None and wait.timer is not None:
                    self._succeeded(node)
                else:
                    self._command(Cancel(node.key, node.attempt))
                    self._fail(node, "TimedOut", "nobody answered in time")
            case Phase.OPEN:
                self._time_is_up(node)

    def _cancel_asked(self, fact: CancelAsked) -> bool:
        root = self._nodes.get("")
        if root is None or root.flow is None or root.phase.is_over:
            return False
        by = f"cancelled by {fact.by}" if fact.by else "cancelled"
        if fact.is_hard:
            self._end_at_once("Cancelled", "Cancelled", by)
            return True
        if root.flow.stage is not Stage.STEPS or root.flow.stop == "cancelled":
            return False
        root.flow.failure = ("Cancelled", by)
        self._stop(root, "cancelled")
        return True

    def _retry_asked(self) -> bool:
        root = self._nodes.get("")
        if root is None or root.flow is None or not root.flow.missing:
            return False  # it never got as far as its first step
        if root.flow.status not in RETRIABLE:
            return False
        self._retry(root)
        return True

    # ---- whose turn it is -----------------------------------------------------------------------

    def _work(self) -> None:
        """Whose turn has come does what it does, in the order in which it came."""
        todo = self._todo
        while todo:
            key, place = todo.popleft()
            if place == MORE:
                self._start_instances(self._nodes[key])
            else:
                self._take_turn(self._nodes[key], place)

    def _open(self, node: Node, plan: Plan, flow: Flow) -> None:
        """A workflow begins."""
        node.flow = flow
        flow.missing = list(plan.missing)
        flow.origin = flow.base = node.base
        flow.unreleased, flow.began_at = plan.first_final, self._now
        node.move(Phase.OPEN)
        self._set_due(node, self._now + min(plan.steps_timeout_s, self._timeout_s(node, plan)))
        self._release(node, plan.sources)

    def _timeout_s(self, node: Node, plan: Plan) -> float:
        """Of all that a workflow does."""
        timeout = self._words.step_of(node).timeout if node.key else None
        return plan.timeout_s if timeout is None else min(plan.timeout_s, seconds(timeout))

    def _release(self, owner: Node, places: list[int]) -> None:
        """These come after nothing that is not over; if there are none, that stage is over."""
        flow = owner.flow
        assert flow is not None
        if flow.stage is Stage.STEPS:
            flow.unreleased -= len(places)
        flow.under_way += len(places)
        self._todo.extend((owner.key, place) for place in places)
        if not flow.under_way:
            self._end_stage(owner)

    def _take_turn(self, owner: Node, place: int) -> None:
        """All that this step comes after is over."""
        flow = owner.flow
        assert flow is not None
        if flow.is_closed:
            self._leave(owner)
            return
        key = self._words.key_of(owner, place)
        node = self._nodes.get(key)
        if node is not None:  # the run is retried, and it has parts that stay
            self._retry(node)
            return
        node = self._nodes[key] = Node(
            key, owner.key, place, attempt=self._state.attempts.pop(key, 0), asked_at=self._now
        )
        node.base = node.mark = self._mark_before(owner, place)
        try:
            why = self._words.why_skipped(owner, place)
            if why:
                self._skip(node, why)
            elif self._words.step_of(node).matrix:
                self._fan_out(node)
            else:
                self._start(node)
        except Unresolved as error:
            self._unresolved(node, error)
        except BadInput as error:
            self._fail(node, "BadInput", error.detail)

    def _mark_before(self, owner: Node, place: int) -> int:
        flow = owner.flow
        assert flow is not None
        after = self._words.plan_of(owner).after[place]
        if not after or not flow.workspaces:
            return flow.base
        nodes = (self._words.node_of(owner, other) for other in after)
        return self._state.marks.join(node.mark for node in nodes if node is not None)

    def _leave(self, owner: Node) -> None:
        """One that was under way in it is so no more."""
        assert owner.flow is not None
        owner.flow.under_way -= 1
        if not owner.flow.under_way:
            self._end_stage(owner)

    # ---- one step -------------------------------------------------------------------------------

    def _start(self, node: Node) -> None:
        """An attempt, a wait, a nested workflow."""
        step = self._words.step_of(node)
        try:
            if step.workflow is not None and node.flow is None:
                self._start_nested(node)
                return
            node.attempt += 1
            if node.flow is not None:
                self._reopen(node)
                return
            if step.wait is not None:
                self._start_wait(node)
                return
            command = self._words.invoke(node)
        except Unresolved as error:
            self._unresolved(node, error)
        except BadInput as error:
            self._fail(node, "BadInput", error.detail)
        else:
            node.move(Phase.ASKED)
            node.asked_at, node.began_at = self._now, 0.0
            self._commanded[node.key] = None
            self._commands.append(command)

    def _start_wait(self, node: Node) -> None:
        step = self._words.step_of(node)
        assert step.wait is not None
        node.move(Phase.EXPECTING)
        node.asked_at = node.began_at = self._now
        if step.wait.timer is not None:
            self._set_due(node, self._now + seconds(step.wait.timer))
            return
        if step.timeout is not None:
            self._set_due(node, self._now + seconds(step.timeout))
        self._commanded[node.key] = None
        self._commands.append(self._expect(node))

    def _expect(self, node: Node) -> Expect:
        wait = self._words.step_of(node).wait
        assert wait is not None
        kind: Literal["callback", "approval"] = "callback" if wait.callback else "approval"
        return Expect(node.key, node.attempt, kind, wait.approval)

    def _start_nested(self, node: Node) -> None:
        owner = self._nodes[node.owner]
        assert owner.flow is not None
        if owner.flow.depth >= DEPTH_MAX:
            raise BadInput(f"workflows are nested more than {DEPTH_MAX} deep")
        plan, params, workspaces = self._words.nested(node)
        self._reserve(node, len(plan.steps))
        node.attempt += 1
        node.asked_at = node.began_at = self._now
        name = self._words.step_of(node).workflow
        assert name is not None
        self._open(node, plan, Flow(name, owner.flow.depth + 1, params, workspaces, []))

    def _reserve(self, node: Node, number: int) -> None:
        if self._state.instances + number > INSTANCES_MAX:
            raise BadInput(
                f"a run has at most {INSTANCES_MAX} steps and instances: make it smaller"
            )
        self._state.instances += number
        node.reserved = number

    def _set_due(self, node: Node, at: float) -> None:
        node.due = at
        heappush(self._timers, (at, node.key))

    def _succeeded(self, node: Node) -> None:
        step = self._words.step_of(node)
        if node.flow is None and node.fan is None and step.workspaces:
            workspaces = self._words.left_by(step, self._nodes[node.owner])
            node.mark = self._state.marks.leave(node.base, node.key, workspaces)
        node.failure = ("", "")
        self._over(node, Phase.SUCCEEDED)

    def _failed(self, node: Node, *, is_counted: bool = True, is_hopeless: bool = False) -> None:
        """It is tried again, or is over."""
        retries = self._words.step_of(node).retries
        tries = retries if isinstance(retries, Retries) else Retries(limit=retries)
        if is_counted:
            node.retries += 1
            first_s, max_s, number = tries.backoff_seconds, tries.backoff_max_seconds, node.retries
        else:
            node.faults += 1
            first_s, max_s, number = FAULT_FIRST_S, FAULT_MAX_S, node.faults
        owner = self._nodes[node.owner].flow
        assert owner is not None
        if is_hopeless or node.retries > tries.limit or owner.is_stopped:
            self._over(node, Phase.FAILED)
            return
        node.move(Phase.DELAYED)
        self._commanded.pop(node.key, None)
        pause_s = min(max_s, first_s * 2.0 ** min(number - 1, BACKOFF_DOUBLINGS_MAX))
        if pause_s > 0:
            self._set_due(node, self._now + pause_s)
        else:
            node.due = None
            self._start(node)

    def _fail(self, node: Node, kind: str, message: str) -> None:
        """Another attempt would make no difference."""
        node.failure = (kind, message[:MESSAGE_CHARACTERS_MAX])
        self._over(node, Phase.FAILED)

    def _unresolved(self, node: Node, error: Unresolved) -> None:
        owner = self._nodes[node.owner]
        assert owner.flow is not None
        plan = self._words.plan_of(owner)
        other = self._words.node_of(owner, plan.numbers[error.step])
        is_skip = owner.flow.stage is Stage.FINALLY or other is None or other.phase is Phase.SKIPPED
        if is_skip and node.phase is Phase.NEW and node.index < 0:
            self._skip(node, MISSING)
        else:
            self._fail(node, "MissingResult", error.detail)

    def _skip(self, node: Node, why: str) -> None:
        node.failure = (why, "")
        self._over(node, Phase.SKIPPED)

    def _over(self, node: Node, phase: Phase) -> None:
        """A node is done; whoever comes after it may have its turn."""
        node.move(phase)
        node.ended_at, node.due = self._now, None
        self._commanded.pop(node.key, None)
        if node.index >= 0:
            self._instance_over(node)
        else:
            self._step_over(node)

    def _step_over(self, node: Node) -> None:
        owner = self._nodes[node.owner]
        flow, plan = owner.flow, self._words.plan_of(owner)
        assert flow is not None
        if node.phase is Phase.SKIPPED:
            flow.has_skipped = True
        elif node.phase is Phase.FAILED and plan.steps[node.place].on_error == "stopAndFail":
            flow.has_failed = True
            if not flow.failure[0]:
                kind, message = node.failure
                flow.failure = (kind, f"step {plan.steps[node.place].name!r}: {message}")
            if flow.stage is Stage.STEPS and not flow.is_closed:
                flow.is_closed, flow.stop = True, "failed"
                self._give_up_waits(owner, plan)
        ready = []
        for place in plan.dependents[node.place]:
            flow.missing[place] -= 1
            if not flow.missing[place]:
                ready.append(place)
        if ready:
            self._release(owner, ready)
        self._leave(owner)

    # ---- a matrix -------------------------------------------------------------------------------

    def _fan_out(self, node: Node) -> None:
        total = len(self._words.combinations(node))
        if not total:
            self._skip(node, EMPTY)
            return
        self._words.params(node)  # what is missing for all concerns the step, not its instances
        self._reserve(node, total - 1)
        node.fan = Fan(total)
        node.move(Phase.OPEN)
        node.began_at = self._now
        self._todo.append((node.key, MORE))

    def _start_instances(self, node: Node) -> None:
        """As many as there is room for; if none is under way then, the step is over."""
        fan, owner = node.fan, self._nodes[node.owner]
        assert fan is not None
        assert owner.flow is not None
        if node.phase is not Phase.OPEN:
            return
        matrix = self._words.step_of(node).matrix
        room = (matrix.parallelism if matrix else 0) or fan.total
        while fan.next < fan.total and fan.under_way < room:
            if fan.is_closed or owner.flow.is_closed:
                break
            index, fan.next = fan.next, fan.next + 1
            self._start_instance(node, fan, index)
        if not fan.under_way:
            self._fan_over(node, fan)

    def _start_instance(self, node: Node, fan: Fan, index: int) -> None:
        key = f"{node.key}[{index}]"
        child = self._nodes.get(key)
        if child is not None:  # the run is retried
            if child.phase is not Phase.SUCCEEDED:
                fan.under_way += 1
                self._retry(child)
            return
        child = self._nodes[key] = Node(
            key, node.owner, node.place, index, attempt=self._state.attempts.pop(key, 0)
        )
        child.base = child.mark = node.base
        fan.under_way += 1
        self._start(child)

    def _instance_over(self, child: Node) -> None:
        key = child.key.removesuffix(f"[{child.index}]")
        node = self._nodes[key]
        fan = node.fan
        assert fan is not None
        fan.under_way -= 1
        if child.phase is Phase.FAILED:
            fan.failed += 1
            if fan.failed == 1:
                fan.failure = (child.failure[0], f"instance {child.index}: {child.failure[1]}")
            fan.is_closed |= self._words.step_of(node).on_error == "stopAndFail"
        self._todo.append((key, MORE))

    def _fan_over(self, node: Node, fan: Fan) -> None:
        owner = self._nodes[node.owner].flow
        assert owner is not None
        if owner.workspaces:
            keys = (f"{node.key}[{index}]" for index in range(fan.next))
            marks = [self._nodes[key].mark for key in keys if key in self._nodes]
            node.mark = self._state.marks.join(marks)
        if fan.failed:
            kind, message = fan.failure
            self._fail(node, kind, f"{fan.failed} of {fan.total} instances failed; {message}")
        elif fan.next < fan.total or fan.is_closed:
            self._over(node, Phase.CANCELLED)
        else:
            self._over(node, Phase.SUCCEEDED)

    # ---- a workflow ends ------------------------------------------------------------------------

    def _end_stage(self, owner: Node) -> None:
        """Nothing is under way in it any more."""
        flow, plan = owner.flow, self._words.plan_of(owner)
        assert flow is not None
        if flow.stage is Stage.STEPS:
            if flow.unreleased and not flow.is_closed:
                flow.has_failed = True
                flow.failure = ("BadInput", "steps come after themselves: check the workflow")
            self._begin_finally(owner, flow, plan)
        else:
            self._finish(owner)

    def _begin_finally(self, owner: Node, flow: Flow, plan: Plan) -> None:
        flow.stage, flow.is_closed, flow.is_stopped = Stage.FINALLY, False, False
        flow.base = self._mark_after(owner, plan)
        if flow.has_failed or flow.stop == "timed out":
            flow.steps_status = "Failed"
        elif flow.stop == "cancelled":
            flow.steps_status = "None"
        else:
            flow.steps_status = "Completed" if flow.has_skipped else "Succeeded"
        if plan.final_timeout_s is not None:
            self._set_due(owner, self._now + plan.final_timeout_s)
        else:
            due = flow.began_at + self._timeout_s(owner, plan)
            self._set_due(owner, max(due, self._now + FINALLY_S_MIN))
        self._release(owner, plan.final_sources)

    def _mark_after(self, owner: Node, plan: Plan) -> int:
        flow = owner.flow
        assert flow is not None
        if not flow.workspaces:
            return flow.base
        nodes = (self._words.node_of(owner, place) for place in range(len(plan.steps)))
        return self._state.marks.join([flow.base, *(node.mark for node in nodes if node)])

    def _finish(self, owner: Node) -> None:
        flow, plan = owner.flow, self._words.plan_of(owner)
        assert flow is not None
        flow.stage = Stage.OVER
        if flow.stop == "cancelled":
            flow.status = "Cancelled"
        elif flow.stop == "timed out":
            flow.status = "TimedOut"
        elif flow.has_failed:
            flow.status = "Failed"
        else:
            flow.status = "Completed" if flow.has_skipped else "Succeeded"
        owner.results = self._words.results(owner)
        owner.failure = flow.failure
        owner.due = None
        if flow.status in ("Succeeded", "Completed"):
            owner.mark = self._mark_after(owner, plan)
            self._end_workflow(owner, Phase.SUCCEEDED)
        elif flow.status == "Cancelled":
            self._end_workflow(owner, Phase.CANCELLED)
        else:
            self._end_workflow(owner, Phase.FAILED)

    def _end_workflow(self, owner: Node, phase: Phase) -> None:
        if not owner.key:
            owner.move(phase)
            owner.ended_at, owner.due = self._now, None
            self._commands.append(self._finish_of(owner))
        elif phase is Phase.FAILED:
            self._failed(owner)
        else:
            self._over(owner, phase)

    @staticmethod
    def _finish_of(root: Node) -> Finish:
        assert root.flow is not None
        assert root.flow.status is not None
        return Finish(root.flow.status, root.results, *root.failure)

    # ---- stopping -------------------------------------------------------------------------------

    def _time_is_up(self, node: Node) -> None:
        flow = node.flow
        assert flow is not None
        flow.has_failed = True
        if not flow.failure[0]:
            what = "its steps were" if flow.stage is Stage.STEPS else "what runs finally was"
            flow.failure = ("TimedOut", f"{what} not done in time")
        self._stop(node, "timed out")

    def _stop(self, owner: Node, why: Literal["cancelled", "timed out"]) -> None:
        """Nothing new starts in this stage of it; what is under way is stopped."""
        flow, plan = owner.flow, self._words.plan_of(owner)
        assert flow is not None
        flow.is_closed = flow.is_stopped = True
        if why == "cancelled" or not flow.stop:
            flow.stop = why
        flow.under_way += 1  # so that it does not end before all were told
        first, last = 0, plan.first_final
        if flow.stage is Stage.FINALLY:
            first, last = plan.first_final, len(plan.steps)
        for place in range(first, last):
            node = self._words.node_of(owner, place)
            if node is not None and not node.phase.is_over:
                self._stop_node(node)
        self._leave(owner)

    def _stop_node(self, node: Node) -> None:
        match node.phase:
            case Phase.ASKED | Phase.RUNNING:
                node.move(Phase.STOPPING)
                self._set_due(node, self._now + STOP_S)
                self._command(Cancel(node.key, node.attempt))
            case Phase.EXPECTING:
                if node.key in self._commanded:
                    self._command(Cancel(node.key, node.attempt))
                self._over(node, Phase.CANCELLED)
            case Phase.DELAYED:
                self._over(node, Phase.CANCELLED)
            case Phase.OPEN if node.fan is not None:
                self._stop_fan(node, node.fan)
            case Phase.OPEN if node.flow is not None and node.flow.stage is Stage.STEPS:
                if not node.flow.failure[0]:
                    node.flow.failure = ("Cancelled", "the workflow that it is part of was stopped")
                self._stop(node, "cancelled")

    def _stop_fan(self, node: Node, fan: Fan) -> None:
        fan.is_closed = True
        for index in range(fan.next):
            child = self._nodes.get(f"{node.key}[{index}]")
            if child is not None and not child.phase.is_over:
                self._stop_node(child)
        self._todo.append((node.key, MORE))

    def _give_up_waits(self, owner: Node, plan: Plan) -> None:
        for place in plan.waits:
            node = self._words.node_of(owner, place)
            if node is not None and not node.phase.is_over:
                self._stop_node(node)

    def _command(self, command: Command) -> None:
        self._commands.append(command)

    def _end_at_once(self, status: Status, kind: str, message: str) -> None:
        """Also what runs finally does not run any more."""
        self._todo.clear()
        for key in self._commanded:
            self._command(Cancel(key, self._nodes[key].attempt))
        self._commanded.clear()
        for node in self._nodes.values():
            node.due = None
            if node.key and not node.phase.is_over:
                node.phase, node.ended_at = Phase.CANCELLED, self._now
            if node.flow is not None and node.flow.stage is not Stage.OVER:
                node.flow.stage, node.flow.under_way = Stage.OVER, 0
                node.flow.status = "Cancelled"
        root = self._nodes[""]
        assert root.flow is not None
        root.flow.status = status
        root.flow.failure = root.failure = (kind, message)
        self._end_workflow(root, Phase.CANCELLED if status == "Cancelled" else Phase.FAILED)

    # ---- the run goes on after it failed --------------------------------------------------------

    def _retry(self, node: Node) -> None:
        """As if it had not failed before."""
        node.retries = node.faults = 0
        self._reopen(node)

    def _reopen(self, node: Node) -> None:
        """A matrix or a workflow goes on; what has succeeded in it stays."""
        node.move(Phase.OPEN)
        node.ended_at = 0.0
        node.results, node.failure, node.mark = {}, ("", ""), node.base
        self._words.forget(node.key)
        if node.flow is not None:
            self._reopen_flow(node, node.flow)
        elif node.fan is not None:
            self._reopen_fan(node, node.fan)

    def _reopen_flow(self, node: Node, flow: Flow) -> None:
        plan = self._words.plan_of(node)
        stays = [False] * len(plan.steps)
        for place, step in enumerate(plan.steps):
            child = self._words.node_of(node, place)
            if child is None:
                continue
            is_ignored = child.phase is Phase.FAILED and step.on_error == "continue"
            if place < plan.first_final and (child.phase is Phase.SUCCEEDED or is_ignored):
                stays[place] = True
            elif place >= plan.first_final or (child.flow is None and child.fan is None):
                self._forget(child)
        flow.missing = [
            -1 if stays[place] else sum(not stays[other] for other in after)
            for place, after in enumerate(plan.after)
        ]
        flow.stage, flow.status, flow.stop = Stage.STEPS, None, ""
        flow.is_closed = flow.is_stopped = flow.has_failed = flow.has_skipped = False
        flow.failure, flow.steps_status = ("", ""), "None"
        flow.base, flow.began_at, flow.under_way = flow.origin, self._now, 0
        flow.unreleased = plan.first_final - sum(stays)
        self._set_due(node, self._now + min(plan.steps_timeout_s, self._timeout_s(node, plan)))
        ready = [place for place in range(plan.first_final) if not flow.missing[place]]
        self._release(node, ready)

    def _reopen_fan(self, node: Node, fan: Fan) -> None:
        for index in range(fan.next):
            child = self._nodes.get(f"{node.key}[{index}]")
            if child is not None and child.phase is not Phase.SUCCEEDED and child.flow is None:
                self._forget(child)
        fan.next = fan.under_way = fan.failed = 0
        fan.is_closed, fan.failure = False, ("", "")
        self._todo.append((node.key, MORE))

    def _forget(self, node: Node) -> None:
        """It is as if it had not been, but that its attempts' numbers are not used again."""
        self._forget_parts(node)
        self._state.attempts[node.key] = node.attempt
        del self._nodes[node.key]
        self._words.forget(node.key)

    def _forget_parts(self, node: Node) -> None:
        parts: list[Node | None] = []
        if node.flow is not None:
            places = range(len(self._words.plan_of(node).steps))
            parts = [self._words.node_of(node, place) for place in places]
        elif node.fan is not None:
            parts = [self._nodes.get(f"{node.key}[{n}]") for n in range(node.fan.total)]
        for part in parts:
            if part is not None:
                self._forget(part)
        self._state.instances -= node.reserved
        node.reserved = 0
