"""What a step is given: references become values, guards are weighed, attempts made up. Pure.

A step that needs a result that is not there:

* is skipped if the step that should have left it was skipped, or if it runs finally;
* else fails with `MissingResult`: that step succeeded without it, or its failure was ignored.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from dayfly_pool.errors import BadInput
from dayfly_pool.workflow.facts import Invoke, View
from dayfly_pool.workflow.matrix import combinations
from dayfly_pool.workflow.model import Condition, Step, TaskSpec
from dayfly_pool.workflow.nodes import Node, Phase, State
from dayfly_pool.workflow.plan import Definition, Plan
from dayfly_pool.workflow.stand_in import (
    Lookup,
    Unresolved,
    bind,
    by_reference,
    seconds,
    substitute,
    text,
)

Cel = Callable[[str, Mapping[str, Any]], bool]
"""Whether an expression holds, over `params` and `steps`. Raises `BadInput`, and nothing else."""

GUARD, PARENT, MISSING, EMPTY = "when", "parent skipped", "result missing", "matrix empty"
"""Why a step was skipped."""

STATUS: Final[Mapping[Phase, str]] = {Phase.SUCCEEDED: "Succeeded", Phase.FAILED: "Failed"}
"""What `$(steps.NAME.status)` says; else None, also of what was skipped or never ran."""


class Words:
    """Reads what is known of a run; changes nothing."""

    def __init__(self, definition: Definition, state: State, cel: Cel | None) -> None:
        self._definition = definition
        self._nodes = state.nodes
        self._marks = state.marks
        self._cel = cel
        self._plans: dict[str, Plan] = {}
        self._combinations: dict[str, list[dict[str, Any]]] = {}
        self._gathered: dict[tuple[str, str, str], list[Any]] = {}
        self._common: tuple[str, dict[str, Any], dict[str, Any]] = ("", {}, {})
        """Key, params and inputs of the matrix asked for last: its instances share them."""

    def plan(self, workflow: str) -> Plan:
        """The plan of a nested workflow; of the run's own, "". Raises `BadInput`."""
        plan = self._plans.get(workflow)
        if plan is None:
            spec = self._definition.workflows.get(workflow) if workflow else self._definition.root
            if spec is None:
                raise BadInput(f"there is no workflow {workflow!r}: define it, or correct the name")
            plan = self._plans[workflow] = Plan(spec)
        return plan

    def plan_of(self, owner: Node) -> Plan:
        """The plan of a node that is a workflow under way."""
        assert owner.flow is not None
        return self._plans.get(owner.flow.workflow) or self.plan(owner.flow.workflow)

    def step_of(self, node: Node) -> Step:
        """The step that it is a node of."""
        return self.plan_of(self._nodes[node.owner]).steps[node.place]

    def node_of(self, owner: Node, place: int) -> Node | None:
        """The node of a step, if it has one by now."""
        return self._nodes.get(self.key_of(owner, place))

    def key_of(self, owner: Node, place: int) -> str:
        """What a step's node is called."""
        name = self.plan_of(owner).steps[place].name
        return f"{owner.key}/{name}" if owner.key else name

    def forget(self, key: str) -> None:
        """Its node is no more, or what it left is no longer all."""
        self._combinations.pop(key, None)
        self._gathered.clear()
        self._common = ("", {}, {})

    # ---- whether it runs --------------------------------------------------------------------

    def why_skipped(self, owner: Node, place: int) -> str:
        """Why a step whose turn has come does not run; "" if it does. Raises `BadInput`.

        Tekton's rules: what a guard turned away keeps nobody who only comes after it; what was
        skipped for any other reason does. A matrix without combinations has results (none), and
        so, other than with Tekton, is in nobody's way.
        """
        plan = self.plan_of(owner)
        for other in plan.after[place]:
            node = self.node_of(owner, other)
            if node is None or node.phase is not Phase.SKIPPED or node.failure[0] == EMPTY:
                continue
            if node.failure[0] != GUARD:
                return PARENT
            if other in plan.needs[place]:
                return MISSING
        if place >= plan.first_final and any(map(self._left_nothing, self._needed(owner, place))):
            return MISSING
        when = plan.steps[place].when
        if when and not all(self._holds(condition, owner, place) for condition in when):
            return GUARD
        return ""

    def _needed(self, owner: Node, place: int) -> Iterator[Node | None]:
        return (self.node_of(owner, other) for other in self.plan_of(owner).needs[place])

    @staticmethod
    def _left_nothing(node: Node | None) -> bool:
        if node is None or (node.phase is Phase.SKIPPED and node.failure[0] != EMPTY):
            return True
        return node.phase in (Phase.FAILED, Phase.CANCELLED) and node.fan is None

    def _holds(self, condition: Condition, owner: Node, place: int) -> bool:
        assert owner.flow is not None
        if condition.cel:
            if self._cel is None:
                raise BadInput("conditions in CEL are not available here: use input and values")
            plan = self.plan_of(owner)
            steps = {
                plan.steps[other].name: {"status": self._status(node), "results": node.results}
                for other in plan.sees[place]
                if (node := self.node_of(owner, other)) is not None
            }
            return self._cel(condition.cel, {"params": owner.flow.params, "steps": steps})
        lookup = self._lookup(owner)
        value = text(substitute(condition.input, lookup))
        values = substitute(condition.values, lookup)
        flat = [
            text(item)
            for each in (values if isinstance(values, list) else [values])
            for item in (each if isinstance(each, list) else [each])
        ]
        return (value in flat) is (condition.operator == "in")

    # ---- what references stand for ----------------------------------------------------------

    def _lookup(self, owner: Node, own: Mapping[str, Any] | None = None) -> Lookup:
        """Of a step in *owner*; *own* are its parameters, which go before the workflow's."""
        flow = owner.flow
        assert flow is not None

        def look(path: str) -> Any:
            match path.split("."):
                case ["params", name]:
                    return own[name] if own is not None and name in own else flow.params[name]
                case ["steps", "status"]:
                    return flow.steps_status
                case ["steps" | "finally", name, "status"]:
                    return self._status(self.node_of(owner, self.plan_of(owner).numbers[name]))
                case ["steps" | "finally", name, "results" | "outputs" as kind, result]:
                    return self._left(owner, name, kind, result)
            raise KeyError(path)

        return look

    @staticmethod
    def _status(node: Node | None) -> str:
        if node is None:
            return "None"
        if node.phase is Phase.CANCELLED and (node.attempt or node.flow or node.fan):
            return "Failed"
        return STATUS.get(node.phase, "None")

    def _left(self, owner: Node, name: str, kind: str, result: str) -> Any:
        node = self.node_of(owner, self.plan_of(owner).numbers[name])
        if node is not None and node.fan is not None and node.phase.is_over:
            return self._gather(node, kind, result)
        if node is not None and node.phase is Phase.SKIPPED and node.failure[0] == EMPTY:
            return []
        if node is not None and kind == "outputs" and result in node.outputs:
            return node.outputs[result].as_value()
        if node is None or kind == "outputs" or result not in node.results:
            raise Unresolved(name, f"{kind[:-1]} {result!r}")
        return node.results[result]

    def _gather(self, node: Node, kind: str, result: str) -> list[Any]:
        """What all instances left, in order; null where one left nothing, for that it failed."""
        assert node.fan is not None
        known = self._gathered.get((node.key, kind, result))
        if known is not None:
            return known
        gathered: list[Any] = [None] * node.fan.total
        is_there = False
        for index in range(node.fan.total):
            child = self._nodes.get(f"{node.key}[{index}]")
            if child is None or result not in (left := getattr(child, kind)):
                continue
            is_there = True
            gathered[index] = left[result] if kind == "results" else left[result].as_value()
        if not is_there:
            raise Unresolved(self.step_of(node).name, f"{kind[:-1]} {result!r}")
        self._gathered[node.key, kind, result] = gathered
        return gathered

    # ---- what it is given -------------------------------------------------------------------

    def combinations(self, node: Node) -> list[dict[str, Any]]:
        """Of a step with a matrix. Raises `BadInput`."""
        known = self._combinations.get(node.key)
        if known is not None:
            return known
        matrix = self.step_of(node).matrix
        assert matrix is not None
        lookup = self._lookup(self._nodes[node.owner])
        axes = {name: substitute(values, lookup) for name, values in matrix.params.items()}
        for name, values in axes.items():
            if by_reference(values) or not isinstance(values, list):
                raise BadInput(f"the matrix's parameter {name!r} is no array: give it one")
        found = combinations(axes, [substitute(entry, lookup) for entry in matrix.include])
        self._combinations[node.key] = found
        return found

    def params(self, node: Node) -> tuple[dict[str, Any], dict[str, Any]]:
        """Params and inputs of a node. Raises `BadInput`."""
        step, owner = self.step_of(node), self._nodes[node.owner]
        if node.index < 0:
            lookup = self._lookup(owner)
            return substitute(step.params, lookup), substitute(step.inputs, lookup)
        fan = f"{owner.key}/{step.name}" if owner.key else step.name
        if self._common[0] != fan:
            lookup = self._lookup(owner)
            params, inputs = substitute(step.params, lookup), substitute(step.inputs, lookup)
            self._common = (fan, params, inputs)
        _, params, inputs = self._common
        return params | self.combinations(self._nodes[fan])[node.index], inputs

    def nested(self, node: Node) -> tuple[Plan, dict[str, Any], dict[str, str]]:
        """Plan, params and workspaces of a nested workflow. Raises `BadInput`."""
        step, owner = self.step_of(node), self._nodes[node.owner]
        assert step.workflow is not None
        plan = self.plan(step.workflow)
        workspaces = {
            name: self._workspace(owner, step.workspaces[name]) for name in step.workspaces
        }
        return plan, bind(plan.spec.params, self.params(node)[0]), workspaces

    def invoke(self, node: Node) -> Invoke:
        """The attempt of a node that is under way. Raises `BadInput`."""
        step, owner = self.step_of(node), self._nodes[node.owner]
        assert owner.flow is not None
        params, inputs = self.params(node)
        task = self._task(step)
        if task is not None:
            params = bind(task.params, params)
        body = task or step
        script, command, env = body.script, body.command, body.env
        if script is not None or command is not None or env:
            lookup = _only(params) if task else self._lookup(owner, params)
            script, command, env = (
                substitute(each, lookup, leave_unknown=True) for each in (script, command, env)
            )
        there = self._marks.sets[node.base]
        views = {}
        for name, outer in step.workspaces.items():
            workspace = self._workspace(owner, outer)
            views[name] = View(workspace, there.get(workspace, ()))
        return Invoke(
            key=node.key,
            attempt=node.attempt,
            step=step,
            params=params,
            inputs=inputs,
            workspaces=views,
            timeout_s=None if step.timeout is None else seconds(step.timeout),
            retries=node.retries,
            workflow=owner.flow.workflow,
            task=task,
            script=None if script is None else text(script),
            command=None if command is None else tuple(map(text, command)),
            env={name: text(value) for name, value in env.items()} if env else {},
        )

    def _task(self, step: Step) -> TaskSpec | None:
        if step.task is None:
            return None
        task = self._definition.tasks.get(step.task)
        if task is None:
            raise BadInput(f"there is no task {step.task!r}: define it, or correct the name")
        return task

    def _workspace(self, owner: Node, name: str) -> str:
        """What the run calls a workspace that a step names. Raises `BadInput`."""
        assert owner.flow is not None
        if name not in owner.flow.workspaces:
            raise BadInput(f"there is no workspace {name!r} here: declare it, or correct the name")
        return owner.flow.workspaces[name]

    def left_by(self, step: Step, owner: Node) -> list[str]:
        """The run's workspaces that a step leaves a new version of."""
        return [self._workspace(owner, name) for name in step.workspaces.values()]

    def results(self, owner: Node) -> dict[str, Any]:
        """Results of a workflow that is over: those that can be told."""
        lookup, found = self._lookup(owner), {}
        for name, value in self.plan_of(owner).spec.results.items():
            try:
                found[name] = substitute(value, lookup)
            except BadInput:
                continue  # of a step that failed or was skipped: left out, as in Tekton
        return found


def _only(params: Mapping[str, Any]) -> Lookup:
    """A task knows its own parameters, and nothing of who uses it."""

    def look(path: str) -> Any:
        kind, _, name = path.partition(".")
        if kind != "params":
            raise KeyError(path)
        return params[name]

    return look
