"""What a run is made of: its definition, and each workflow's graph as the engine walks it. Pure."""

from functools import cached_property
from itertools import chain

from msgspec import Struct

from dayfly_pool.workflow.conditions import expression
from dayfly_pool.workflow.graph import check
from dayfly_pool.workflow.model import Step, TaskSpec, WorkflowSpec, duration_s
from dayfly_pool.workflow.references import Reference, in_text, texts


class Definition(Struct, frozen=True):
    """All that a run is made of, as it was when the run began: nothing of it changes meanwhile."""

    root: WorkflowSpec
    workflows: dict[str, WorkflowSpec] = {}
    tasks: dict[str, TaskSpec] = {}


class Plan:
    """One workflow. Its steps are known by their place, those that run finally behind the others.

    Raises `BadDefinition`.
    """

    def __init__(self, spec: WorkflowSpec, definition: Definition) -> None:
        self.spec = spec
        self.graph = check(spec, definition.tasks, definition.workflows)
        self.steps = self.graph.steps
        self.finals = range(self.graph.finally_from, len(self.steps))
        self.missing = [len(needs) for needs in self.graph.needs]
        self.sources = [n for n in range(self.finals.start) if not self.missing[n]]
        self.waits = [n for n in range(self.finals.start) if self.steps[n].wait]
        timeouts = spec.timeouts
        finally_ = timeouts.finally_
        self.timeout_s = duration_s(timeouts.workflow)
        self.final_timeout_s = None if finally_ is None else duration_s(finally_)
        self.steps_timeout_s = max(0.0, self.timeout_s - (self.final_timeout_s or 0.0))
        if timeouts.steps is not None:
            self.steps_timeout_s = min(self.timeout_s, duration_s(timeouts.steps))
        self._uses: dict[int, Uses] = {}

    def uses(self, place: int) -> "Uses":
        """What the references of a step are to."""
        found = self._uses.get(place)
        if found is None:
            found = self._uses[place] = Uses(self.steps[place])
        return found


class Uses:
    """What the references of one step are to. Looked at when somebody asks."""

    def __init__(self, step: Step) -> None:
        self._step = step

    @cached_property
    def data(self) -> frozenset[str]:
        """The steps whose results or outputs it needs; not those whose end it asks for."""
        step = self._step
        matrix = (step.matrix.params, step.matrix.include) if step.matrix else ()
        when = [(condition.input, condition.values) for condition in step.when]
        held = (step.params, step.inputs, step.env, step.script, step.command, matrix, when)
        cel = (expression(condition.cel).references for condition in step.when if condition.cel)
        return frozenset(
            each.name
            for each in (*_named(held), *chain.from_iterable(cel))
            if each.root == "steps" and each.field in ("results", "outputs")
        )

    @cached_property
    def is_common(self) -> bool:
        """Whether all instances of its matrix, at all attempts, are given the same beside it."""
        held = [self._step.params, self._step.inputs]
        return not any(each.root in ("item", "retry") for each in _named(held))


def _named(held: object) -> list[Reference]:
    return [each for text in texts(held) for each in in_text(text, is_script=True)]
