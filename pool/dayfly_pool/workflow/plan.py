"""A workflow as the engine walks it: steps by number, and what each releases. Pure.

Steps have the numbers 0, 1, ... as they are written; those that run finally come after them. A step
is ready when `missing` others are over; each of these releases its `dependents`.
"""

from collections.abc import Sequence

from msgspec import Struct

from dayfly_pool.workflow.model import Step, TaskSpec, WorkflowSpec
from dayfly_pool.workflow.stand_in import needs, seconds


class Definition(Struct, frozen=True):
    """All that a run is made of, as it was when the run began: nothing of it changes meanwhile.

    Every workflow in it has been checked: names are unique, and no step comes after itself.
    """

    root: WorkflowSpec
    workflows: dict[str, WorkflowSpec] = {}
    tasks: dict[str, TaskSpec] = {}


class Plan:
    """One workflow's steps, numbered."""

    def __init__(self, spec: WorkflowSpec) -> None:
        self.spec = spec
        self.steps: tuple[Step, ...] = spec.steps + spec.finally_
        self.first_final = len(spec.steps)
        self.numbers = {step.name: number for number, step in enumerate(self.steps)}
        self.after: list[tuple[int, ...]] = []
        """What must be over before it."""

        self.needs: list[frozenset[int]] = []
        """Whose results or outputs it uses; of a final step also steps."""

        self.sees: list[list[int]] = []
        """All that it names in any way."""

        self.dependents: list[list[int]] = [[] for _ in self.steps]
        for number, step in enumerate(self.steps):
            self._connect(number, step)
        self.missing = [len(after) for after in self.after]
        self.sources = self._ready(range(self.first_final))
        self.final_sources = self._ready(range(self.first_final, len(self.steps)))
        self.waits = [n for n in range(self.first_final) if self.steps[n].wait]
        timeouts = spec.timeouts
        self.timeout_s = seconds(timeouts.workflow)
        self.final_timeout_s = None if timeouts.finally_ is None else seconds(timeouts.finally_)
        self.steps_timeout_s = self.timeout_s - (self.final_timeout_s or 0.0)
        if timeouts.steps is not None:
            self.steps_timeout_s = min(self.timeout_s, seconds(timeouts.steps))

    def _connect(self, number: int, step: Step) -> None:
        data, order = needs(step)
        known = self.numbers
        used = frozenset(known[name] for name in data if name in known)
        before = used | {known[name] for name in order if name in known}
        is_final = number >= self.first_final
        after = sorted(n for n in before if (n >= self.first_final) == is_final)
        self.sees.append(sorted(before))
        self.after.append(tuple(after))
        self.needs.append(used)
        for other in after:
            self.dependents[other].append(number)

    def _ready(self, numbers: Sequence[int]) -> list[int]:
        return [number for number in numbers if not self.missing[number]]
