"""How a run moves on: turns, matrices, ends, stops. Pure; `engine` has the rules in prose.

Every step under way holds its workflow open, and every instance its step: whoever is the last to
end, ends what it is in. Turns are taken from one queue and never from within another turn, so that
a chain of 100,000 steps that are all skipped needs no deep stack.
"""

from collections import deque
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import Any, Final, Literal

from dayfly_pool.errors import BadInput
from dayfly_pool.workflow.facts import (
    MESSAGE_CHARACTERS_MAX,
    Cancel,
    Command,
    Expect,
    Finish,
    Status,
)
from dayfly_pool.workflow.model import duration_s
from dayfly_pool.workflow.nodes import Fan, Flow, Node, Phase, Stage, State
from dayfly_pool.workflow.plan import Definition, Plan
from dayfly_pool.workflow.references import Unresolved
from dayfly_pool.workflow.values import bind
from dayfly_pool.workflow.words import EMPTY, MISSING, Words

INSTANCES_MAX: Final = 100_000
FINALLY_S_MIN: Final = 60.0
STOP_S: Final = 30.0
"""Who was told to stop and has not said that it has is taken for stopped after this long."""

FAULT_FIRST_S: Final = 0.05
FAULT_MAX_S: Final = 5.0
BACKOFF_DOUBLINGS_MAX: Final = 60
MORE: Final = -1
"""In place of a step: a matrix may have room for further instances."""


class Walk:
    """Moves the state of one run, and says in `commands` what is to be done about it.

    Whoever calls it sets `now` before, and lets it `work` after.
    """

    def __init__(self, definition: Definition, state: State) -> None:
        self.now = 0.0
        self.commands: list[Command] = []
        self.words = Words(definition, state)
        self._state = state
        self._nodes = state.nodes
        self._commanded = state.commanded
        self._todo: deque[tuple[str, int]] = deque()
        """Whose turn has come: the key of its workflow, and the step's place there."""

        self._timers = [(n.due, n.key) for n in state.nodes.values() if n.due is not None]
        heapify(self._timers)

    # ---- the run --------------------------------------------------------------------------------

    def begin(self, params: dict[str, Any], run: dict[str, str]) -> None:
        """A new run. What its definition or its params lack is its end."""
        self._state.run = run
        root = self._nodes[""] = Node("", "", 0, asked_at=self.now, began_at=self.now)
        root.flow = Flow("", params, {}, [])
        try:
            plan = self.words.plan("")
            bound = bind(plan.spec.params, params)
            self._reserve(root, len(plan.steps))
        except BadInput as error:
            root.move(Phase.OPEN)
            self.end_at_once("Failed", type(error).__name__, error.detail)
        else:
            workspaces = {name: name for name in plan.spec.workspaces}
            self._open(root, plan, Flow("", bound, workspaces, []))

    def due_at(self) -> float | None:
        """When something happens by itself."""
        while self._timers:
            due, key = self._timers[0]
            node = self._nodes.get(key)
            if node is not None and node.due == due:
                return due
            heappop(self._timers)
        return None

    def fall_due(self) -> None:
        """What `due_at` told of happens."""
        node = self._nodes[heappop(self._timers)[1]]
        node.due = None
        match node.phase:
            case Phase.DELAYED:
                self._start(node)
            case Phase.STOPPING:
                self.over(node, Phase.CANCELLED)
            case Phase.EXPECTING:
                wait = self.words.step_of(node).wait
                if wait is not None and wait.timer is not None:
                    node.results = {"result": None}
                    self.succeeded(node)
                else:
                    self.commands.append(Cancel(node.key, node.attempt))
                    self.fail(node, "TimedOut", "nobody answered in time")
            case Phase.OPEN:
                self._time_is_up(node)

    # ---- whose turn it is -----------------------------------------------------------------------

    def work(self) -> None:
        """Whose turn has come does what it does, in the order in which it came."""
        todo = self._todo
        while todo:
            key, place = todo.popleft()
            node = self._nodes.get(key)
            if place != MORE:
                assert node is not None
                self._take_turn(node, place)
            elif node is not None and node.fan is not None and node.phase is Phase.OPEN:
                self._start_instances(node, node.fan)  # else it is over by now, or even forgotten

    def _open(self, node: Node, plan: Plan, flow: Flow) -> None:
        """A workflow begins."""
        node.flow = flow
        flow.missing = list(plan.missing)
        flow.origin = flow.base = node.base
        flow.began_at = self.now
        node.move(Phase.OPEN)
        self._set_due(node, self.now + min(plan.steps_timeout_s, self._timeout_s(node, plan)))
        self._release(node, plan.sources)

    def _timeout_s(self, node: Node, plan: Plan) -> float:
        """Of all that a workflow does."""
        timeout = self.words.step_of(node).timeout if node.key else None
        return plan.timeout_s if timeout is None else min(plan.timeout_s, duration_s(timeout))

    def _release(self, owner: Node, places: Sequence[int]) -> None:
        """These come after nothing that is not over; if there are none, that stage is over."""
        flow = owner.flow
        assert flow is not None
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
        key = self.words.key_of(owner, place)
        node = self._nodes.get(key)
        if node is not None:  # the run is retried, and it has parts that stay
            self.retry(node)
            return
        node = self._nodes[key] = Node(
            key, owner.key, place, attempt=self._state.attempts.pop(key, 0), asked_at=self.now
        )
        node.base = node.mark = self._mark_before(owner, place)
        try:
            why = self.words.why_skipped(owner, place)
            if why:
                self._skip(node, why)
            elif self.words.step_of(node).matrix:
                self._fan_out(node)
            else:
                self._start(node)
        except Unresolved as error:
            self._unresolved(node, error)
        except BadInput as error:
            self.fail(node, "BadInput", error.detail)

    def _mark_before(self, owner: Node, place: int) -> int:
        flow = owner.flow
        assert flow is not None
        after = self.words.plan_of(owner).graph.needs[place]
        if not after or not flow.workspaces:
            return flow.base
        nodes = (self.words.node_of(owner, other) for other in after)
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
        step = self.words.step_of(node)
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
            command = self.words.invoke(node)
        except Unresolved as error:
            self._unresolved(node, error)
        except BadInput as error:
            self.fail(node, "BadInput", error.detail)
        else:
            node.move(Phase.ASKED)
            node.asked_at, node.began_at = self.now, 0.0
            self._commanded[node.key] = None
            self.commands.append(command)

    def _start_wait(self, node: Node) -> None:
        step = self.words.step_of(node)
        assert step.wait is not None
        node.move(Phase.EXPECTING)
        node.asked_at = node.began_at = self.now
        if step.wait.timer is not None:
            self._set_due(node, self.now + duration_s(step.wait.timer))
            return
        if step.timeout is not None:
            self._set_due(node, self.now + duration_s(step.timeout))
        self._commanded[node.key] = None
        self.commands.append(self.expect(node))

    def expect(self, node: Node) -> Expect:
        """What a wait waits for."""
        wait = self.words.step_of(node).wait
        assert wait is not None
        kind: Literal["callback", "approval"] = "callback" if wait.callback else "approval"
        return Expect(node.key, node.attempt, kind, wait.approval)

    def _start_nested(self, node: Node) -> None:
        plan, params, workspaces = self.words.nested(node)
        self._reserve(node, len(plan.steps))
        node.attempt += 1
        node.asked_at = node.began_at = self.now
        name = self.words.step_of(node).workflow
        assert name is not None
        self._open(node, plan, Flow(name, params, workspaces, []))

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

    def succeeded(self, node: Node) -> None:
        """It has left its results, and versions of its workspaces."""
        workspaces = self.words.left_by(node)
        if workspaces:
            node.mark = self._state.marks.leave(node.base, node.key, workspaces)
        node.failure = ("", "")
        self.over(node, Phase.SUCCEEDED)

    def failed(self, node: Node, *, is_counted: bool = True, is_hopeless: bool = False) -> None:
        """It is tried again, or is over."""
        tries = self.words.step_of(node).tries
        if is_counted:
            node.retries += 1
            first_s, max_s, number = tries.backoff_seconds, tries.backoff_max_seconds, node.retries
        else:
            node.faults += 1
            first_s, max_s, number = FAULT_FIRST_S, FAULT_MAX_S, node.faults
        owner = self._nodes[node.owner].flow
        assert owner is not None
        if is_hopeless or node.retries > tries.limit or owner.is_stopped:
            self.over(node, Phase.FAILED)
            return
        node.move(Phase.DELAYED)
        self._commanded.pop(node.key, None)
        pause_s = min(max_s, first_s * 2.0 ** min(number - 1, BACKOFF_DOUBLINGS_MAX))
        if pause_s > 0:
            self._set_due(node, self.now + pause_s)
        else:
            node.due = None
            self._start(node)

    def fail(self, node: Node, kind: str, message: str) -> None:
        """Another attempt would make no difference."""
        node.failure = (kind, message[:MESSAGE_CHARACTERS_MAX])
        self.over(node, Phase.FAILED)

    def _unresolved(self, node: Node, error: Unresolved) -> None:
        owner = self._nodes[node.owner].flow
        assert owner is not None
        if error.reference.root != "steps":
            self.fail(node, "BadInput", error.detail)
        elif owner.stage is Stage.FINALLY and node.phase is Phase.NEW and node.index < 0:
            self._skip(node, MISSING)
        else:
            self.fail(node, "MissingResult", error.detail)

    def _skip(self, node: Node, why: str) -> None:
        node.failure = (why, "")
        self.over(node, Phase.SKIPPED)

    def over(self, node: Node, phase: Phase) -> None:
        """A node is done; whoever comes after it may have its turn."""
        node.move(phase)
        node.ended_at, node.due = self.now, None
        self._commanded.pop(node.key, None)
        if node.index >= 0:
            self._instance_over(node)
        else:
            self._step_over(node)

    def _step_over(self, node: Node) -> None:
        owner = self._nodes[node.owner]
        flow, plan = owner.flow, self.words.plan_of(owner)
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
        for place in plan.graph.needed_by[node.place]:
            flow.missing[place] -= 1
            if not flow.missing[place]:
                ready.append(place)
        if ready:
            self._release(owner, ready)
        self._leave(owner)

    # ---- a matrix -------------------------------------------------------------------------------

    def _fan_out(self, node: Node) -> None:
        total = len(self.words.combinations(node))
        if not total:
            self._skip(node, EMPTY)
            return
        self.words.check_common(node)
        self._reserve(node, total - 1)
        node.fan = Fan(total)
        node.move(Phase.OPEN)
        node.began_at = self.now
        self._todo.append((node.key, MORE))

    def _start_instances(self, node: Node, fan: Fan) -> None:
        """As many as there is room for; if none is under way then, the step is over."""
        flow = self._nodes[node.owner].flow
        assert flow is not None
        matrix = self.words.step_of(node).matrix
        room = (matrix.parallelism if matrix else 0) or fan.total
        while fan.next < fan.total and fan.under_way < room:
            if fan.is_closed or flow.is_closed:
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
                self.retry(child)
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
            fan.is_closed |= self.words.step_of(node).on_error == "stopAndFail"
        self._todo.append((key, MORE))

    def _fan_over(self, node: Node, fan: Fan) -> None:
        owner = self._nodes[node.owner].flow
        assert owner is not None
        if owner.workspaces:
            keys = (f"{node.key}[{index}]" for index in range(fan.next))
            marks = [self._nodes[key].mark for key in keys if key in self._nodes]
            node.mark = self._state.marks.join(marks)
        self.words.forget(node.key)
        if fan.failed:
            kind, message = fan.failure
            self.fail(node, kind, f"{fan.failed} of {fan.total} instances failed; {message}")
        elif fan.next < fan.total or fan.is_closed:
            self.over(node, Phase.CANCELLED)
        else:
            self.over(node, Phase.SUCCEEDED)

    # ---- a workflow ends ------------------------------------------------------------------------

    def _end_stage(self, owner: Node) -> None:
        """Nothing is under way in it any more."""
        flow, plan = owner.flow, self.words.plan_of(owner)
        assert flow is not None
        if flow.stage is Stage.STEPS:
            self._begin_finally(owner, flow, plan)
        else:
            self._finish(owner)

    def _begin_finally(self, owner: Node, flow: Flow, plan: Plan) -> None:
        flow.stage, flow.is_closed, flow.is_stopped = Stage.FINALLY, False, False
        flow.base = self._mark_after(owner, plan)
        if flow.has_failed:
            flow.steps_status = "Failed"
        elif flow.stop == "cancelled":
            flow.steps_status = "None"
        else:
            flow.steps_status = "Completed" if flow.has_skipped else "Succeeded"
        if plan.final_timeout_s is not None:
            self._set_due(owner, self.now + plan.final_timeout_s)
        else:
            due = flow.began_at + self._timeout_s(owner, plan)
            self._set_due(owner, max(due, self.now + FINALLY_S_MIN))
        self._release(owner, plan.finals)

    def _mark_after(self, owner: Node, plan: Plan) -> int:
        flow = owner.flow
        assert flow is not None
        if not flow.workspaces:
            return flow.base
        nodes = (self.words.node_of(owner, place) for place in range(len(plan.steps)))
        return self._state.marks.join([flow.base, *(node.mark for node in nodes if node)])

    def _finish(self, owner: Node) -> None:
        flow, plan = owner.flow, self.words.plan_of(owner)
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
        owner.results = self.words.results(owner)
        owner.failure = flow.failure
        owner.due = None
        is_well = flow.status in ("Succeeded", "Completed")
        if is_well or not owner.key:
            owner.mark = self._mark_after(owner, plan)
        if is_well:
            self._end_workflow(owner, Phase.SUCCEEDED)
        elif flow.status == "Cancelled":
            self._end_workflow(owner, Phase.CANCELLED)
        else:
            self._end_workflow(owner, Phase.FAILED)

    def _end_workflow(self, owner: Node, phase: Phase) -> None:
        if not owner.key:
            owner.move(phase)
            owner.ended_at, owner.due = self.now, None
            self.commands.append(self.finish_of(owner))
        elif phase is Phase.FAILED:
            self.failed(owner)
        else:
            self.over(owner, phase)

    def finish_of(self, root: Node) -> Finish:
        """How the run ended."""
        assert root.flow is not None
        assert root.flow.status is not None
        there = self._state.marks.sets[root.mark]
        return Finish(root.flow.status, root.results, *root.failure, workspaces=there)

    # ---- stopping -------------------------------------------------------------------------------

    def _time_is_up(self, node: Node) -> None:
        flow = node.flow
        assert flow is not None
        flow.has_failed = True
        if not flow.failure[0]:
            what = "its steps were" if flow.stage is Stage.STEPS else "what runs finally was"
            flow.failure = ("TimedOut", f"{what} not done in time")
        self.stop(node, "timed out")

    def stop(self, owner: Node, why: Literal["cancelled", "timed out"]) -> None:
        """Nothing new starts in this stage of it; what is under way is stopped."""
        flow, plan = owner.flow, self.words.plan_of(owner)
        assert flow is not None
        flow.is_closed = flow.is_stopped = True
        if why == "cancelled" or not flow.stop:
            flow.stop = why
        flow.under_way += 1  # so that it does not end before all were told
        places = plan.finals if flow.stage is Stage.FINALLY else range(plan.finals.start)
        for place in places:
            node = self.words.node_of(owner, place)
            if node is not None and not node.phase.is_over:
                self._stop_node(node)
        self._leave(owner)

    def _stop_node(self, node: Node) -> None:
        match node.phase:
            case Phase.ASKED | Phase.RUNNING:
                node.move(Phase.STOPPING)
                self._set_due(node, self.now + STOP_S)
                self.commands.append(Cancel(node.key, node.attempt))
            case Phase.EXPECTING:
                if node.key in self._commanded:
                    self.commands.append(Cancel(node.key, node.attempt))
                self.over(node, Phase.CANCELLED)
            case Phase.DELAYED:
                self.over(node, Phase.CANCELLED)
            case Phase.OPEN if node.fan is not None:
                self._stop_fan(node, node.fan)
            case Phase.OPEN if node.flow is not None and node.flow.stage is Stage.STEPS:
                if not node.flow.failure[0]:
                    node.flow.failure = ("Cancelled", "the workflow that it is part of was stopped")
                self.stop(node, "cancelled")

    def _stop_fan(self, node: Node, fan: Fan) -> None:
        fan.is_closed = True
        for index in range(fan.next):
            child = self._nodes.get(f"{node.key}[{index}]")
            if child is not None and not child.phase.is_over:
                self._stop_node(child)
        self._todo.append((node.key, MORE))

    def _give_up_waits(self, owner: Node, plan: Plan) -> None:
        for place in plan.waits:
            node = self.words.node_of(owner, place)
            if node is not None and not node.phase.is_over:
                self._stop_node(node)

    def end_at_once(self, status: Status, kind: str, message: str) -> None:
        """Also what runs finally does not run any more."""
        self._todo.clear()
        for key in self._commanded:
            self.commands.append(Cancel(key, self._nodes[key].attempt))
        self._commanded.clear()
        for node in self._nodes.values():
            node.due = None
            if node.key and not node.phase.is_over:
                node.phase, node.ended_at = Phase.CANCELLED, self.now  # from whatever it was
            if node.flow is not None and node.flow.stage is not Stage.OVER:
                node.flow.stage, node.flow.under_way = Stage.OVER, 0
                node.flow.status = "Cancelled"
        root = self._nodes[""]
        assert root.flow is not None
        root.flow.status = status
        root.flow.failure = root.failure = (kind, message)
        self._end_workflow(root, Phase.CANCELLED if status == "Cancelled" else Phase.FAILED)

    # ---- the run goes on after it failed --------------------------------------------------------

    def retry(self, node: Node) -> None:
        """As if it had not failed before."""
        node.retries = node.faults = 0
        self._reopen(node)

    def _reopen(self, node: Node) -> None:
        """A matrix or a workflow goes on; what has succeeded in it stays."""
        node.move(Phase.OPEN)
        node.ended_at, node.failure = 0.0, ("", "")
        if node.flow is not None:
            self._reopen_flow(node, node.flow)
        elif node.fan is not None:
            self._reopen_fan(node, node.fan)

    def _reopen_flow(self, node: Node, flow: Flow) -> None:
        plan = self.words.plan_of(node)
        stays = [False] * len(plan.steps)
        for place, step in enumerate(plan.steps):
            child = self.words.node_of(node, place)
            if child is None:
                continue
            is_ignored = child.phase is Phase.FAILED and step.on_error == "continue"
            if place not in plan.finals and (child.phase is Phase.SUCCEEDED or is_ignored):
                stays[place] = True
            elif place in plan.finals or (child.flow is None and child.fan is None):
                self._forget(child)
        flow.missing = [
            -1 if stays[place] else sum(not stays[other] for other in after)
            for place, after in enumerate(plan.graph.needs)
        ]
        flow.stage, flow.status, flow.stop = Stage.STEPS, None, ""
        flow.is_closed = flow.is_stopped = flow.has_failed = flow.has_skipped = False
        flow.failure, flow.steps_status = ("", ""), "None"
        flow.base, flow.began_at, flow.under_way = flow.origin, self.now, 0
        self._set_due(node, self.now + min(plan.steps_timeout_s, self._timeout_s(node, plan)))
        ready = [place for place in range(plan.finals.start) if not flow.missing[place]]
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
        self.words.forget(node.key)

    def _forget_parts(self, node: Node) -> None:
        parts: list[Node | None] = []
        if node.flow is not None:
            places = range(len(self.words.plan_of(node).steps))
            parts = [self.words.node_of(node, place) for place in places]
        elif node.fan is not None:
            parts = [self._nodes.get(f"{node.key}[{n}]") for n in range(node.fan.total)]
        for part in parts:
            if part is not None:
                self._forget(part)
        self._state.instances -= node.reserved
        node.reserved = 0
