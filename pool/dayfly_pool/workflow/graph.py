"""From a workflow to its graph: which step needs which, and what is wrong, before anything runs.

Every check here takes time linear in what was written: 100,000 steps take about a second. The
order is Kahn's (A. B. Kahn, Topological sorting of large networks, 1962), the first declared first.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from msgspec import UNSET, Struct

from dayfly_pool.errors import BadInput
from dayfly_pool.workflow.conditions import check_cel, expression
from dayfly_pool.workflow.model import (
    RESULT,
    STEPS_MAX,
    Declared,
    Matrix,
    Param,
    ParamType,
    Step,
    TaskSpec,
    WorkflowSpec,
)
from dayfly_pool.workflow.references import Malformed, Reference, in_text, nearly, texts, whole
from dayfly_pool.workflow.values import (
    BadDefinition,
    check_json,
    is_fit,
    meant,
    type_of,
    unfit,
)

NESTED_MAX: Final = 10
INCLUDES_MAX: Final = 1_000
"""Rows of a matrix that are matched with the combinations of its lists."""

CEL_MAX: Final = 10_000
"""Different expressions of one workflow: each costs 0.05 ms to be compiled."""

SHOWN_OF_A_CYCLE: Final = 8


class Graph(Struct, frozen=True):
    """A workflow that can be run: its steps by index, those that run finally behind the others.

    *order* has the steps (without those of finally) so that each comes after all that it needs.
    *needs* is what must have ended before a step begins; of these *takes* are those whose results,
    outputs or status it refers to. What is skipped is skipped with those that take its results,
    and not with those that only come after it. What runs finally needs nothing and is begun when
    all steps have ended; what it *takes* may be missing. *count* is how many steps run, with those
    of nested workflows and of matrices, as far as that is known; *depth* how deep they are nested.
    """

    steps: tuple[Step, ...]
    finally_from: int
    index: Mapping[str, int]
    order: tuple[int, ...]
    needs: tuple[tuple[int, ...], ...]
    needed_by: tuple[tuple[int, ...], ...]
    takes: tuple[tuple[int, ...], ...]
    count: int
    depth: int


def check(
    spec: WorkflowSpec,
    tasks: Mapping[str, TaskSpec],
    workflows: Mapping[str, WorkflowSpec],
    name: str = "",
    *,
    is_all: bool = True,
) -> Graph:
    """The graph of *spec*, which is called *name*, with what else its namespace has.

    If *tasks* and *workflows* are not *is_all* that there is, those that are missing are believed.
    Raises `BadDefinition`, which names the first wrong place in the order of writing.
    """
    checked = _Check(spec, tasks, workflows, is_all=is_all)
    checked.look()
    count, depth = _nested(spec, workflows, name)
    return checked.graph(count, depth)


def check_task(task: TaskSpec) -> None:
    """Raise `BadDefinition` if a task refers to what it does not have."""
    _unique([p.name for p in task.params], "$.params")
    _unique([r.name for r in task.results], "$.results")
    _unique([o.name for o in task.outputs], "$.outputs")
    for number, param in enumerate(task.params):
        _check_param(param, f"$.params[{number}]")
    own = _Names(
        params={param.name: param.type for param in task.params},
        inputs=set(task.inputs),
        outputs={output.name for output in task.outputs},
        results={result.name for result in task.results},
        workspaces=set(task.workspaces),
    )
    for text, path in _body_texts(task, "$"):
        own.refuse_slips(text, path)
        for reference in in_text(text, is_script=True):
            if reference.root in ("steps", "item"):
                raise BadDefinition(f"{reference}: a task knows no steps: give it a param", path)
            own.check(reference, path)


def _unique(names: Sequence[str], path: str, what: str = "name") -> None:
    if len(set(names)) == len(names):
        return
    seen: set[str] = set()
    for number, name in enumerate(names):
        if name in seen:
            raise BadDefinition(f"{what} {name!r} is here twice", f"{path}[{number}]")
        seen.add(name)


def _check_param(param: Param, path: str) -> None:
    if param.default is not UNSET:
        check_json(param.default, f"{path}.default")
        if why := unfit(param, param.default):
            raise BadDefinition(f"the default of {param.name!r}: {why}", f"{path}.default")
    for choice in param.enum:
        if not is_fit(param.type, type_of(choice)):
            raise BadDefinition(f"{choice!r:.80} of enum is no {param.type}", f"{path}.enum")


def _body_texts(step: Step | TaskSpec, path: str) -> Iterator[tuple[str, str]]:
    """What is put into a process: (text, its path)."""
    if step.script is not None:
        yield step.script, f"{path}.script"
    for number, word in enumerate(step.command or ()):
        yield word, f"{path}.command[{number}]"
    for name, value in step.env.items():
        yield value, f"{path}.env.{name}"


class _Names:
    """What a body may refer to by itself; None for parameters that may be called anything."""

    def __init__(
        self,
        params: Mapping[str, ParamType],
        inputs: Iterable[str],
        outputs: Iterable[str],
        results: Iterable[str],
        workspaces: Iterable[str],
    ) -> None:
        self.params = params
        self.held = {
            "inputs": inputs,
            "outputs": outputs,
            "results": results,
            "workspaces": workspaces,
        }

    def check(self, reference: Reference, path: str) -> None:
        """Raise `BadDefinition` for what is not here."""
        if reference.root == "params":
            _typed_param(self.params, reference, path)
            return
        known = self.held.get(reference.root)
        if known is not None and reference.name not in known:
            kind = reference.root[:-1]
            raise BadDefinition(
                f"{reference}: it has no {kind} {reference.name!r}{meant(reference.name, known)}",
                path,
            )

    def refuse_slips(self, text: str, path: str) -> None:
        """Raise `BadDefinition` for a reference whose first word was mistyped."""
        for written, reference in nearly(text, self.params):
            raise BadDefinition(
                f"$({written}) is left to the shell: did you mean {reference}? "
                f"A command of that name is $( {written})",
                path,
            )


def _typed_param(params: Mapping[str, ParamType], reference: Reference, path: str) -> ParamType:
    kind = params.get(reference.name)
    if kind is None:
        hint = meant(reference.name, params)
        raise BadDefinition(f"{reference}: there is no parameter {reference.name!r}{hint}", path)
    return _of_tail(kind, reference, path)


def _of_tail(kind: ParamType, reference: Reference, path: str) -> ParamType:
    """The type of what a reference takes of a value of type *kind*."""
    if not reference.tail:
        if reference.is_star and kind not in ("array", "object", "any"):
            raise BadDefinition(f"{reference}: {kind} is no array: leave out [*]", path)
        return kind
    first = reference.tail[0]
    if kind != "any" and kind != ("array" if isinstance(first, int) else "object"):
        raise BadDefinition(f"{reference}: {kind} has no {first!r}", path)
    return "any"


class _Source(NamedTuple):
    """What others may take of a step; None for results whose names nobody knows."""

    results: Mapping[str, ParamType]
    properties: Mapping[str, Mapping[str, Any]]
    outputs: frozenset[str]


_WAITED: Final = _Source({RESULT: "any"}, {}, frozenset())
_HANDLED: Final = _WAITED
_RUN: Final = _Source({}, {}, frozenset())


class _Check:
    """One workflow while it is checked."""

    def __init__(
        self,
        spec: WorkflowSpec,
        tasks: Mapping[str, TaskSpec],
        workflows: Mapping[str, WorkflowSpec],
        *,
        is_all: bool,
    ) -> None:
        self.spec, self.tasks, self.workflows = spec, tasks, workflows
        self.is_all = is_all
        self.steps = (*spec.steps, *spec.finally_)
        self.finally_from = len(spec.steps)
        if not spec.steps:
            raise BadDefinition("a workflow has at least one step", "$.steps")
        if len(self.steps) > STEPS_MAX:
            raise BadDefinition(f"{len(self.steps)} steps, limit {STEPS_MAX}", "$.steps")
        _unique([param.name for param in spec.params], "$.params")
        _unique(spec.workspaces, "$.workspaces")
        for number, param in enumerate(spec.params):
            _check_param(param, f"$.params[{number}]")
        self.params: dict[str, ParamType] = {param.name: param.type for param in spec.params}
        self.properties = {p.name: p.properties for p in spec.params if p.properties}
        self.index: dict[str, int] = {}
        for number, step in enumerate(self.steps):
            if self.index.setdefault(step.name, number) != number:
                raise BadDefinition(
                    f"step {step.name!r} is here twice: each has a name of its own",
                    f"{self.path(number)}.name",
                )
        self.sources: dict[int, _Source | None] = {}
        self.cels: dict[str, Sequence[Reference]] = {}
        self.takes: list[dict[int, None]] = [{} for _ in self.steps]
        self.after: list[dict[int, None]] = [{} for _ in self.steps]

    def path(self, number: int) -> str:
        """Where a step is written."""
        if number < self.finally_from:
            return f"$.steps[{number}]"
        return f"$.finally[{number - self.finally_from}]"

    def look(self) -> None:
        """Look at each step once."""
        for number, step in enumerate(self.steps):
            try:
                self.look_at(number, step)
            except BadDefinition as error:
                raise BadDefinition(f"step {step.name!r}: {error.what}", error.path) from None
        for name, value in self.spec.results.items():
            for reference, _ in self.found(value, f"$.results.{name}"):
                self.type_of(reference, f"$.results.{name}", None)

    def graph(self, count: int, depth: int) -> Graph:
        """Order the steps that were looked at."""
        needs = tuple(
            tuple(self.takes[n] | self.after[n]) if n < self.finally_from else ()
            for n in range(len(self.steps))
        )
        needed_by: list[list[int]] = [[] for _ in self.steps]
        for number, needed in enumerate(needs):
            for other in needed:
                needed_by[other].append(number)
        return Graph(
            steps=self.steps,
            finally_from=self.finally_from,
            index=self.index,
            order=self.ordered(needs, needed_by),
            needs=needs,
            needed_by=tuple(map(tuple, needed_by)),
            takes=tuple(map(tuple, self.takes)),
            count=count,
            depth=depth,
        )

    # ---- one step -------------------------------------------------------------------------------

    def look_at(self, number: int, step: Step) -> None:
        """Everything about one step, and what it takes."""
        path = self.path(number)
        self.binds(step, path)
        for place, other in enumerate(step.run_after):
            here = f"{path}.runAfter[{place}]"
            found = self.known_step(other, here)
            if number >= self.finally_from:
                raise BadDefinition("what runs finally runs after all steps: leave it out", here)
            self.nothing_final(found, number, here)
            self.after[number][found] = None
        given = self.values(number, step, path)
        self.conditions(number, step, path)
        if step.matrix is not None:
            self.matrix(number, step.matrix, f"{path}.matrix")
        if step.task is not None:
            self.of_a_task(step, given, path)
        elif step.workflow is not None:
            self.of_a_workflow(step, given, path)
        if step.script is not None or step.command is not None or step.env:
            self.body(number, step, given, path)
        if step.results or step.outputs:
            _unique([r.name for r in step.results], f"{path}.results", "result")
            _unique([o.name for o in step.outputs], f"{path}.outputs", "output")

    def binds(self, step: Step, path: str) -> None:
        """Its workspaces."""
        for name, theirs in step.workspaces.items():
            if theirs not in self.spec.workspaces:
                hint = meant(theirs, self.spec.workspaces)
                raise BadDefinition(
                    f"there is no workspace {theirs!r}{hint}", f"{path}.workspaces.{name}"
                )

    def values(self, number: int, step: Step, path: str) -> dict[str, ParamType | None]:
        """The types of what it is given by name; None for what nobody knows."""
        given: dict[str, ParamType | None] = {}
        bound = step.workspaces
        for name, value in step.params.items():
            here = f"{path}.params.{name}"
            given[name] = type_of(value) or ("any" if value is None else None)
            if type(value) in (int, bool):
                continue
            if not isinstance(value, str):
                check_json(value, here)
            for reference, is_whole in self.found(value, here):
                kind = self.takes_of(number, reference, here, bound)
                if is_whole and isinstance(value, str):
                    given[name] = kind
        for name, value in step.inputs.items():
            here = f"{path}.inputs.{name}"
            several = value if isinstance(value, list | tuple) else (value,)
            for item in several:
                one = self.whole(item, here)
                found = None if one is None else self.takes_of(number, one, here, bound)
                is_list = found == "array" and one is not None and one.field != "results"
                if found not in ("artifact", "any") and not is_list:
                    raise BadDefinition(
                        "an input is an artifact: $(steps.NAME.outputs.OUTPUT), or a parameter "
                        f"of type artifact; this is {found or 'plain text'}",
                        here,
                    )
        return given

    def whole(self, value: Any, path: str) -> Reference | None:
        """The reference that a value is, if it is one."""
        try:
            return whole(value) if isinstance(value, str) else None
        except Malformed as error:
            raise BadDefinition(error.detail, path) from None

    def found(self, value: Any, path: str) -> Iterator[tuple[Reference, bool]]:
        """The references in a value, and whether each is a whole text."""
        try:
            for text in texts(value):
                if "$(" in text:
                    one = whole(text)
                    if one is not None:
                        yield one, True
                    else:
                        for reference in in_text(text):
                            yield reference, False
        except Malformed as error:
            raise BadDefinition(error.detail, path) from None

    def takes_of(
        self, number: int, reference: Reference, path: str, bound: Mapping[str, str] | None
    ) -> ParamType:
        """The type of what step *number* refers to, which it takes from now on."""
        if reference.root == "steps" and not reference.name:
            if number < self.finally_from:
                raise BadDefinition(
                    "$(steps.status) is known when all steps have ended: it is for `finally`", path
                )
            return "string"
        if reference.root == "steps":
            other = self.known_step(reference.name, path)
            self.nothing_final(other, number, path)
            self.takes[number][other] = None
        return self.type_of(reference, path, bound, number)

    def type_of(
        self,
        reference: Reference,
        path: str,
        bound: Mapping[str, str] | None,
        number: int | None = None,
    ) -> ParamType:
        """The type of what a reference stands for. Raises `BadDefinition` if that is nothing."""
        match reference.root:
            case "params":
                kind = _typed_param(self.params, reference, path)
                _check_key(self.properties.get(reference.name), reference, path)
                return kind
            case "steps" if reference.name:
                return self.of_a_step(self.known_step(reference.name, path), reference, path)
            case "steps" | "run":
                return "string"
            case "retry":
                return "integer"
            case "item":
                if number is None or self.steps[number].matrix is None:
                    raise BadDefinition(f"{reference} is for steps with a matrix", path)
                return "any"
            case "workspaces" if bound is not None:
                if reference.name not in bound:
                    raise BadDefinition(
                        f"{reference}: the step has no workspace {reference.name!r}: "
                        "bind it under its `workspaces`",
                        path,
                    )
                return "string"
            case _:
                raise BadDefinition(f"{reference} is for scripts, commands and env", path)

    def known_step(self, name: str, path: str) -> int:
        """The step of that name."""
        found = self.index.get(name)
        if found is None:
            raise BadDefinition(f"there is no step {name!r}{meant(name, self.index)}", path)
        return found

    def nothing_final(self, other: int, number: int, path: str) -> None:
        """Raise `BadDefinition` if *other*, on which *number* depends, runs finally."""
        if other >= self.finally_from:
            raise BadDefinition(
                f"nothing may depend on {self.steps[other].name!r}, which runs finally", path
            )
        if other == number:
            name = self.steps[other].name
            raise BadDefinition(f"it waits for itself: {name} -> {name}", path)

    def of_a_step(self, number: int, reference: Reference, path: str) -> ParamType:
        """The type of a step's result, output or status."""
        if reference.field == "status":
            return "string"
        source, step = self.source(number), self.steps[number]
        if source is None:
            is_output = reference.field == "outputs" and step.matrix is None
            return "artifact" if is_output and not reference.tail else "any"
        if reference.field == "outputs":
            if reference.key not in source.outputs:
                raise BadDefinition(
                    f"{step.name!r} has no output {reference.key!r}"
                    f"{meant(reference.key, source.outputs)}",
                    path,
                )
            kind: ParamType = "artifact"
        elif reference.key not in source.results:
            raise BadDefinition(
                f"{step.name!r} has no result {reference.key!r}"
                f"{meant(reference.key, source.results)}",
                path,
            )
        else:
            kind = source.results[reference.key]
            if step.matrix is None:
                _check_key(source.properties.get(reference.key), reference, path)
        if step.matrix is not None:
            kind = "array"
        return _of_tail(kind, reference, path)

    def source(self, number: int) -> _Source | None:
        """What others may take of a step; None if nobody knows here."""
        if number not in self.sources:
            self.sources[number] = self._source(self.steps[number])
        return self.sources[number]

    def _source(self, step: Step) -> _Source | None:
        if step.workflow is not None:
            nested = self.workflows.get(step.workflow)
            if nested is None:
                return None
            return _Source(dict.fromkeys(nested.results, "any"), {}, frozenset())
        declared: Sequence[Declared] = step.results
        outputs = step.outputs
        is_run = step.script is not None or step.command is not None
        if step.task is not None:
            task = self.tasks.get(step.task)
            if task is None:
                return None
            declared, outputs = task.results, task.outputs
            is_run = task.script is not None or task.command is not None
        if not declared and not outputs:
            return _RUN if is_run else _HANDLED
        results: dict[str, ParamType] = {} if is_run else {RESULT: "any"}
        results |= {each.name: each.type for each in declared}
        properties = {each.name: each.properties for each in declared if each.properties}
        return _Source(results, properties, frozenset(output.name for output in outputs))

    def conditions(self, number: int, step: Step, path: str) -> None:
        """What its guards take."""
        for place, condition in enumerate(step.when):
            here = f"{path}.when[{place}]"
            if condition.cel:
                for reference in self.of_cel(condition.cel, f"{here}.cel"):
                    self.takes_of(number, reference, f"{here}.cel", None)
                continue
            for word in ("input", "values"):
                value = getattr(condition, word)
                check_json(value, f"{here}.{word}")
                for reference, _ in self.found(value, f"{here}.{word}"):
                    self.takes_of(number, reference, f"{here}.{word}", None)
            if isinstance(condition.values, str) and self.whole(condition.values, here) is None:
                raise BadDefinition("values is a list, or a reference to one", f"{here}.values")

    def of_cel(self, cel: str, path: str) -> Sequence[Reference]:
        """What an expression takes, which is looked at once, however often it is there."""
        if cel not in self.cels:
            if len(self.cels) >= CEL_MAX:
                raise BadDefinition(f"over {CEL_MAX} different conditions in CEL", path)
            try:
                check_cel(cel)
                self.cels[cel] = expression(cel).references
            except BadInput as error:
                raise BadDefinition(error.detail, path) from None
        return self.cels[cel]

    def matrix(self, number: int, matrix: Matrix, path: str) -> None:
        """That its lists are lists, and not too many runs."""
        for name, value in matrix.params.items():
            here = f"{path}.params.{name}"
            check_json(value, here)
            kind = type_of(value)
            for reference, is_whole in self.found(value, here):
                self.no_item(reference, here)
                of = self.takes_of(number, reference, here, None)
                if is_whole and isinstance(value, str):
                    kind = "array" if of in ("array", "any") else of
            if kind != "array":
                raise BadDefinition(
                    f"a list is wanted, or a reference to one; this is {kind}", here
                )
        for place, row in enumerate(matrix.include):
            here = f"{path}.include[{place}]"
            check_json(row, here)
            for reference, _ in self.found(row, here):
                self.no_item(reference, here)
                self.takes_of(number, reference, here, None)
        runs = combinations_at_least(matrix)
        if runs > STEPS_MAX:
            raise BadDefinition(f"{runs} combinations, limit {STEPS_MAX}", path)
        if matrix.params and len(matrix.include) > INCLUDES_MAX:
            raise BadDefinition(
                f"{len(matrix.include)} rows to include beside params, limit {INCLUDES_MAX}",
                f"{path}.include",
            )

    def no_item(self, reference: Reference, path: str) -> None:
        """Raise `BadDefinition` where items are only made."""
        if reference.root == "item":
            raise BadDefinition(f"{reference}: the items are made here: name a list", path)

    def body(
        self, number: int, step: Step, given: Mapping[str, ParamType | None], path: str
    ) -> None:
        """What its script, command and env refer to; what is none of ours is left to the shell."""
        own = {name: kind or "any" for name, kind in given.items()}
        if step.matrix is not None:
            own |= dict.fromkeys(step.matrix.params, "any")
            own |= dict.fromkeys((name for row in step.matrix.include for name in row), "any")
        names = _Names(
            params={**self.params, **own},
            inputs=step.inputs,
            outputs={output.name for output in step.outputs},
            results={result.name for result in step.results},
            workspaces=step.workspaces,
        )
        for text, here in _body_texts(step, path):
            names.refuse_slips(text, here)
            for reference in in_text(text, is_script=True):
                if reference.root in ("steps", "item"):
                    self.takes_of(number, reference, here, step.workspaces)
                else:
                    names.check(reference, here)

    # ---- what is declared elsewhere -------------------------------------------------------------

    def of_a_task(self, step: Step, given: Mapping[str, ParamType | None], path: str) -> None:
        """That a task is there and is given what it asks for."""
        assert step.task is not None
        task = self.tasks.get(step.task)
        if task is None and not self.is_all:
            return
        if task is None:
            hint = meant(step.task, self.tasks)
            raise BadDefinition(f"there is no task {step.task!r}{hint}", f"{path}.task")
        self.arguments(step, task.params, given, path, f"task {step.task!r}")
        pairs = (
            ("inputs", step.inputs, task.inputs),
            ("workspaces", step.workspaces, task.workspaces),
        )
        for word, has, wanted in pairs:
            for name in has:
                if name not in wanted:
                    raise BadDefinition(
                        f"task {step.task!r} has no {word[:-1]} {name!r}{meant(name, wanted)}",
                        f"{path}.{word}.{name}",
                    )
            for name in wanted:
                if name not in has:
                    raise BadDefinition(
                        f"task {step.task!r} wants {word[:-1]} {name!r}: name it under `{word}`",
                        path,
                    )

    def of_a_workflow(self, step: Step, given: Mapping[str, ParamType | None], path: str) -> None:
        """The same for a nested workflow."""
        assert step.workflow is not None
        nested = self.workflows.get(step.workflow)
        if nested is None and not self.is_all:
            return
        if nested is None:
            hint = meant(step.workflow, self.workflows)
            raise BadDefinition(f"there is no workflow {step.workflow!r}{hint}", f"{path}.workflow")
        if step.inputs:
            raise BadDefinition("a workflow takes artifacts as params", f"{path}.inputs")
        self.arguments(step, nested.params, given, path, f"workflow {step.workflow!r}")

    def arguments(
        self,
        step: Step,
        params: Sequence[Param],
        given: Mapping[str, ParamType | None],
        path: str,
        whose: str,
    ) -> None:
        """That each parameter is known and fits, and none is missing."""
        known = {param.name: param for param in params}
        several = set(step.matrix.params) if step.matrix else set()
        if step.matrix:
            several.update(name for row in step.matrix.include for name in row)
        several -= step.inputs.keys()
        for name in (*given, *several):
            if name not in known:
                where = "params" if name in given else "matrix"
                raise BadDefinition(
                    f"{whose} has no param {name!r}{meant(name, known)}", f"{path}.{where}.{name}"
                )
        for name, param in known.items():
            if name in given:
                value, kind = step.params[name], given[name]
                is_text = not (isinstance(value, str) and "$(" in value)
                why = unfit(param, value) if is_text and not _holds_references(value) else ""
                if not why and not is_fit(param.type, kind):
                    why = f"{param.type} is wanted, this is {kind}"
                if why:
                    raise BadDefinition(f"{whose}: {why}", f"{path}.params.{name}")
            elif param.is_required and name not in several:
                raise BadDefinition(f"{whose} wants param {name!r}", f"{path}.params")

    # ---- the order ------------------------------------------------------------------------------

    def ordered(
        self, needs: Sequence[Sequence[int]], needed_by: Sequence[Sequence[int]]
    ) -> tuple[int, ...]:
        """Kahn's order. Raises `BadDefinition` with a cycle if there is one."""
        open_ = [len(needed) for needed in needs]
        order = [n for n in range(self.finally_from) if not open_[n]]
        for number in order:  # it grows while it is walked through
            for other in needed_by[number]:
                open_[other] -= 1
                if not open_[other]:
                    order.append(other)
        if len(order) < self.finally_from:
            names = [self.steps[n].name for n in _cycle(needs, open_)]
            shown = names
            if len(names) > SHOWN_OF_A_CYCLE + 1:
                more = f"({len(names) - 1 - SHOWN_OF_A_CYCLE} more)"
                shown = [*names[:SHOWN_OF_A_CYCLE], more, names[-1]]
            path = self.path(self.index[names[0]])
            raise BadDefinition(f"steps wait for one another: {' -> '.join(shown)}", path)
        return tuple(order)


def _holds_references(value: Any) -> bool:
    return any("$(" in text for text in texts(value))


def _check_key(properties: Mapping[str, Any] | None, reference: Reference, path: str) -> None:
    """Raise `BadDefinition` for a key that an object is declared not to have."""
    if properties and reference.tail and reference.tail[0] not in properties:
        key = str(reference.tail[0])
        raise BadDefinition(f"{reference}: it has no {key!r}{meant(key, properties)}", path)


def _cycle(needs: Sequence[Sequence[int]], open_: Sequence[int]) -> list[int]:
    """One cycle, from a step back to itself: each would run before the next.

    Whoever is left over needs one that is left over, so walking along needs comes back.
    """
    at = next(n for n, left in enumerate(open_) if left)
    seen: dict[int, int] = {}
    walked: list[int] = []
    while at not in seen:
        seen[at] = len(walked)
        walked.append(at)
        at = next(other for other in needs[at] if open_[other])
    around = walked[seen[at] :][::-1]
    first = around.index(min(around))
    around = around[first:] + around[:first]
    return [*around, around[0]]


def _nested(
    spec: WorkflowSpec, workflows: Mapping[str, WorkflowSpec], name: str
) -> tuple[int, int]:
    """(steps in all, how deep) with what is nested. Each workflow is counted once, then known."""
    known: dict[str, tuple[int, int]] = {}

    def counted(spec: WorkflowSpec, above: tuple[str, ...]) -> tuple[int, int]:
        if len(above) > NESTED_MAX:
            raise BadDefinition(
                f"workflows are nested at most {NESTED_MAX} deep: {' -> '.join(above)}", "$.steps"
            )
        count, depth = 0, 0
        for number, step in enumerate((*spec.steps, *spec.finally_)):
            runs = combinations_at_least(step.matrix) if step.matrix is not None else 1
            if step.workflow is None:
                count += runs
                continue
            inner = step.workflow
            if inner in above:
                around = " -> ".join((*above[above.index(inner) :], inner))
                path = f"$.steps[{number}]" if len(above) == 1 else "$.steps"
                raise BadDefinition(f"workflows run one another: {around}", path)
            if inner not in known and inner in workflows:
                known[inner] = counted(workflows[inner], (*above, inner))
            steps, deep = known.get(inner, (1, 0))
            if len(above) + deep > NESTED_MAX:
                raise BadDefinition(
                    f"workflows are nested at most {NESTED_MAX} deep: with {inner!r} they are "
                    f"{len(above) + deep}",
                    "$.steps",
                )
            count += runs * steps
            depth = max(depth, deep)
        if count > STEPS_MAX:
            raise BadDefinition(f"{count} steps in all, limit {STEPS_MAX}", "$.steps")
        return count, depth + 1

    return counted(spec, (name,))


def in_order(spec: WorkflowSpec) -> list[Step]:
    """The steps so that each comes after those that it names; else as they are written.

    Nothing is checked: names that are not there or there twice, and cycles, are passed over.
    """
    index = {step.name: step for step in spec.steps}
    if len(index) < len(spec.steps):
        return list(spec.steps)
    done: dict[str, None] = {}
    for step in spec.steps:
        if step.name in done:
            continue
        todo = [(step, iter(named_in(step)))]
        begun = {step.name}
        while todo:
            at, names = todo[-1]
            following = next((n for n in names if n in index and n not in begun), None)
            if following is None or at.name in done:
                done[at.name] = None
                todo.pop()
            elif following not in done:
                begun.add(following)
                todo.append((index[following], iter(named_in(index[following]))))
    return [index[name] for name in done]


def named_in(step: Step) -> list[str]:
    """The steps that a step names."""
    found = dict.fromkeys(step.run_after)
    conditions = [(c.input, c.values) for c in step.when]
    matrix = (step.matrix.params, step.matrix.include) if step.matrix is not None else ()
    held = [step.params, step.inputs, conditions, matrix, step.script or "", step.command or ""]
    for text in texts([*held, step.env]):
        found |= {r.name: None for r in in_text(text, is_script=True) if r.root == "steps"}
    for condition in step.when:
        if condition.cel:
            try:
                taken = expression(condition.cel).references
            except BadInput:
                continue
            found |= {r.name: None for r in taken if r.root == "steps"}
    return list(found)


# ---- matrices -----------------------------------------------------------------------------------


def combinations_at_least(matrix: Matrix) -> int:
    """How many runs a matrix is, a list that is not known yet counted as one item."""
    lists = [len(v) if isinstance(v, list | tuple) else 1 for v in matrix.params.values()]
    return math.prod(lists) if lists else len(matrix.include)


def combinations(
    params: Mapping[str, Sequence[Any]],
    include: Sequence[Mapping[str, Any]] = (),
    most: int = STEPS_MAX,
) -> list[dict[str, Any]]:
    """The runs of a matrix whose references are replaced, the last of *params* changing fastest.

    As in Tekton, a row of *include* adds to those combinations with which it agrees; to all of
    them, if it has none of their names; and is one more if it agrees with none. Raises `BadInput`
    for more than *most*.
    """
    for name, values in params.items():
        if not isinstance(values, list | tuple):
            raise BadInput(f"matrix: {name!r} is {type_of(values)}, and a list is wanted")
    number = math.prod(map(len, params.values())) if params else 0
    if number + len(include) > most + len(include) * bool(params) or number > most:
        raise BadInput(f"matrix: {max(number, len(include))} combinations, limit {most}")
    if params and len(include) > INCLUDES_MAX:
        raise BadInput(f"matrix: {len(include)} rows to include, limit {INCLUDES_MAX}")
    if not params:
        return [dict(row) for row in include]
    runs: list[dict[str, Any]] = [{}]
    for name, values in params.items():
        runs = [{**run, name: value} for run in runs for value in values]
    added: list[dict[str, Any]] = []
    for row in include:
        shared = [(name, row[name]) for name in row if name in params]
        agreeing = [run for run in runs if all(run[name] == value for name, value in shared)]
        for run in agreeing:
            run.update(row)
        if shared and not agreeing:
            added.append(dict(row))
    if len(runs) + len(added) > most:
        raise BadInput(f"matrix: {len(runs) + len(added)} combinations, limit {most}")
    return runs + added
