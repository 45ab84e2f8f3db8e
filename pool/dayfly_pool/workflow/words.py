"""What a step is given: references become values, guards are weighed, attempts made up. Pure.

When a step runs, by Tekton's rules:

* What a guard turned away keeps nobody who only comes after it; who takes its results or outputs is
  skipped. What was skipped for any other reason skips all that comes after it.
* Who takes what a step did not leave, though it ran (it succeeded without, or was let fail), fails
  with `MissingResult`; if it runs finally, it is skipped.
* A matrix without combinations is skipped. Other than with Tekton its results are there, as lists
  of nothing, and it is in nobody's way.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from dayfly_pool.errors import BadInput
from dayfly_pool.workflow.conditions import holds
from dayfly_pool.workflow.facts import Invoke, View
from dayfly_pool.workflow.graph import combinations
from dayfly_pool.workflow.model import Output, Step, TaskSpec, duration_s
from dayfly_pool.workflow.nodes import Node, Phase, Stage, State
from dayfly_pool.workflow.plan import Definition, Plan
from dayfly_pool.workflow.references import Scope, StepEnd, substitute, substitute_text
from dayfly_pool.workflow.values import bind

GUARD, PARENT, MISSING, EMPTY = "when", "parent skipped", "result missing", "matrix empty"
"""Why a step was skipped."""

WORKSPACES_AT: Final = "/workspaces"
INPUTS_AT: Final = "/in"
OUTPUTS_AT: Final = "/out"
RESULTS_AT: Final = "/results"
"""Where a step finds things, unless whoever runs it says otherwise."""


class Words:
    """Reads what is known of a run; changes nothing."""

    def __init__(self, definition: Definition, state: State) -> None:
        self._definition = definition
        self._state = state
        self._nodes = state.nodes
        self._plans: dict[str, Plan] = {}
        self._combinations: dict[str, list[dict[str, Any]]] = {}
        self._gathered: dict[str, _Gathered] = {}
        self._common: tuple[str, dict[str, Any], dict[str, Any]] = ("", {}, {})
        """Key, params and inputs of the matrix asked for last: its instances share them."""

    # ---- who is who -------------------------------------------------------------------------

    def plan(self, workflow: str) -> Plan:
        """The plan of a nested workflow; of the run's own, "". Raises `BadInput`."""
        plan = self._plans.get(workflow)
        if plan is None:
            spec = self._definition.workflows[workflow] if workflow else self._definition.root
            plan = self._plans[workflow] = Plan(spec, self._definition)
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
        self._gathered.pop(key, None)
        self._common = ("", {}, {})

    # ---- whether it runs --------------------------------------------------------------------

    def why_skipped(self, owner: Node, place: int) -> str:
        """Why a step whose turn has come does not run; "" if it does. Raises `BadInput`."""
        plan = self.plan_of(owner)
        for other in plan.graph.needs[place]:
            node = self.node_of(owner, other)
            if node is None or node.phase is not Phase.SKIPPED or node.failure[0] == EMPTY:
                continue
            if node.failure[0] != GUARD:
                return PARENT
            if plan.steps[other].name in plan.uses(place).data:
                return MISSING
        if place in plan.finals and plan.graph.takes[place]:
            for other in plan.graph.takes[place]:
                name = plan.steps[other].name
                if name in plan.uses(place).data and _left_nothing(self.node_of(owner, other)):
                    return MISSING
        when = plan.steps[place].when
        return "" if not when or holds(when, self._scope(owner)) else GUARD

    # ---- what references stand for ----------------------------------------------------------

    def _scope(
        self, owner: Node, node: Node | None = None, item: dict[str, Any] | None = None
    ) -> Scope:
        """Of a step in *owner*."""
        flow = owner.flow
        assert flow is not None
        retry, paths = {}, {}
        if node is not None:
            step = self.step_of(node)
            retry = {"count": node.retries, "limit": step.tries.limit}
            paths = {name: f"{WORKSPACES_AT}/{name}" for name in step.workspaces}
        return Scope(
            params=flow.params,
            steps=_Ends(self, owner),
            workspaces=paths,
            item=item,
            run=self._state.run,
            retry=retry,
            status=None if flow.stage is Stage.STEPS else flow.steps_status,
        )

    def end_of(self, owner: Node, name: str) -> StepEnd:
        """How a step ended, and what it left. Raises `KeyError` if there is none of that name."""
        node = self.node_of(owner, self.plan_of(owner).graph.index[name])
        if node is None:
            return StepEnd("None")
        if node.phase is Phase.SUCCEEDED:
            status = "Succeeded"
        elif node.phase is Phase.FAILED or (node.phase is Phase.CANCELLED and node.asked_at):
            status = "Failed"
        else:
            status = "None"
        if node.phase is Phase.SKIPPED and node.failure[0] == EMPTY:
            return StepEnd(status, _NOTHING, _NOTHING)
        if node.fan is not None:
            gathered = self._gathered.get(node.key)
            if gathered is None:
                children = [self._nodes.get(f"{node.key}[{n}]") for n in range(node.fan.total)]
                gathered = self._gathered[node.key] = _Gathered(children)
            return StepEnd(status, gathered.results, gathered.outputs)
        return StepEnd(status, node.results, _outputs_of(node))

    # ---- what it is given -------------------------------------------------------------------

    def combinations(self, node: Node) -> list[dict[str, Any]]:
        """Of a step with a matrix. Raises `BadInput`."""
        known = self._combinations.get(node.key)
        if known is not None:
            return known
        matrix = self.step_of(node).matrix
        assert matrix is not None
        scope = self._scope(self._nodes[node.owner], node)
        params = substitute(matrix.params, scope)
        found = combinations(params, substitute(matrix.include, scope))
        self._combinations[node.key] = found
        return found

    def given(self, node: Node) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
        """Params, inputs and the item of a matrix that a node is given. Raises `BadInput`."""
        owner = self._nodes[node.owner]
        step = self.plan_of(owner).steps[node.place]
        if node.index < 0:
            scope = self._scope(owner, node)
            return substitute(step.params, scope), substitute(step.inputs, scope), None
        fan = self._nodes[self.key_of(owner, node.place)]
        item = self.combinations(fan)[node.index]
        if self._common[0] == fan.key:
            _, params, inputs = self._common
        else:
            scope = self._scope(owner, node, item)
            params, inputs = substitute(step.params, scope), substitute(step.inputs, scope)
            if self.plan_of(owner).uses(node.place).is_common:
                self._common = (fan.key, params, inputs)
        own = {name: value for name, value in item.items() if name not in step.inputs}
        return params | own, inputs, item

    def check_common(self, node: Node) -> None:
        """Raise what all instances of a matrix would: it concerns the step, not each of them."""
        if self.plan_of(self._nodes[node.owner]).uses(node.place).is_common:
            self.given(node)

    def nested(self, node: Node) -> tuple[Plan, dict[str, Any], dict[str, str]]:
        """Plan, params and workspaces of a nested workflow. Raises `BadInput`."""
        step, owner = self.step_of(node), self._nodes[node.owner]
        assert step.workflow is not None
        assert owner.flow is not None
        plan = self.plan(step.workflow)
        theirs = owner.flow.workspaces
        workspaces = {name: theirs[outer] for name, outer in step.workspaces.items()}
        return plan, bind(plan.spec.params, self.given(node)[0]), workspaces

    def invoke(self, node: Node) -> Invoke:
        """The attempt of a node that is under way. Raises `BadInput`."""
        step, owner = self.step_of(node), self._nodes[node.owner]
        assert owner.flow is not None
        params, inputs, item = self.given(node)
        task = self._definition.tasks[step.task] if step.task is not None else None
        env: dict[str, str] = {}
        if task is not None:
            params = bind(task.params, params)
            if step.env:
                scope = self._scope(owner, node, item)
                env = {name: substitute_text(text, scope) for name, text in step.env.items()}
        there, theirs = self._state.marks.sets[node.base], owner.flow.workspaces
        return Invoke(
            key=node.key,
            attempt=node.attempt,
            step=step,
            params=params,
            inputs=inputs,
            workspaces={
                name: View(theirs[outer], there.get(theirs[outer], ()))
                for name, outer in step.workspaces.items()
            },
            scope=self._body_scope(node, step, task, params, item),
            timeout_s=None if step.timeout is None else duration_s(step.timeout),
            workflow=owner.flow.workflow,
            task=task,
            env=env,
        )

    def _body_scope(
        self,
        node: Node,
        step: Step,
        task: TaskSpec | None,
        params: dict[str, Any],
        item: dict[str, Any] | None,
    ) -> Scope | None:
        body, owner = task or step, self._nodes[node.owner]
        if body.script is None and body.command is None and not body.env:
            return None
        assert owner.flow is not None
        takes = () if task else self.plan_of(owner).graph.takes[node.place]
        names = (self.plan_of(owner).steps[other].name for other in takes)
        return Scope(
            params=params if task else owner.flow.params | params,
            steps={name: self.end_of(owner, name) for name in names},
            workspaces={name: f"{WORKSPACES_AT}/{name}" for name in step.workspaces},
            inputs={name: f"{INPUTS_AT}/{name}" for name in step.inputs},
            outputs={each.name: _path_of(each) for each in body.outputs},
            results={each.name: f"{RESULTS_AT}/{each.name}" for each in body.results},
            item=item,
            run=self._state.run,
            retry={"count": node.retries, "limit": step.tries.limit},
            status=None if owner.flow.stage is Stage.STEPS else owner.flow.steps_status,
        )

    def left_by(self, node: Node) -> list[str]:
        """The run's workspaces that a node leaves a new version of."""
        flow = self._nodes[node.owner].flow
        assert flow is not None
        return [flow.workspaces[name] for name in self.step_of(node).workspaces.values()]

    def results(self, owner: Node) -> dict[str, Any]:
        """Results of a workflow that is over: those that can be told."""
        scope, found = self._scope(owner), {}
        for name, value in self.plan_of(owner).spec.results.items():
            try:
                found[name] = substitute(value, scope)
            except BadInput:
                continue  # of a step that failed or was skipped: left out, as in Tekton
        return found


def _path_of(output: Output) -> str:
    return f"{OUTPUTS_AT}/{output.path or output.name}"


def _outputs_of(node: Node) -> dict[str, Any]:
    return {name: artifact.as_value() for name, artifact in node.outputs.items()}


def _left_nothing(node: Node | None) -> bool:
    if node is None or (node.phase is Phase.SKIPPED and node.failure[0] != EMPTY):
        return True
    return node.phase in (Phase.FAILED, Phase.CANCELLED) and node.fan is None


class _Ends(Mapping[str, StepEnd]):
    """How the steps of a workflow ended; looked up when somebody asks."""

    def __init__(self, words: Words, owner: Node) -> None:
        self._words, self._owner = words, owner

    def __getitem__(self, name: str) -> StepEnd:
        return self._words.end_of(self._owner, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._words.plan_of(self._owner).graph.index)

    def __len__(self) -> int:
        return len(self._words.plan_of(self._owner).graph.index)


class _Gathered:
    """What the instances of a matrix left, by name: lists, in order; null where one left none."""

    def __init__(self, children: list[Node | None]) -> None:
        self.results = self._of([child.results if child else {} for child in children])
        self.outputs = self._of([_outputs_of(child) if child else {} for child in children])

    @staticmethod
    def _of(left: list[dict[str, Any]]) -> dict[str, list[Any]]:
        names = dict.fromkeys(name for each in left for name in each)
        return {name: [each.get(name) for each in left] for name in names}


class _Nothing(Mapping[str, list[Any]]):
    """What a matrix without combinations left, whatever it is called."""

    def __getitem__(self, name: str) -> list[Any]:
        return []

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


_NOTHING: Final = _Nothing()
