"""Calls of steps and of all else that a workflow is made of, while its function runs."""

from __future__ import annotations

import re
from functools import lru_cache

from dayfly.graphs import (
    REFERENCE,
    RESULT,
    Each,
    Graph,
    Handle,
    Node,
    Text,
    Workspace,
    handles,
    rendered,
)
from dayfly.steps import OUTPUT, File, Folder, GraphError, Step, Workflow, open_graphs
from dayfly.steps import Workspace as WorkspaceAnnotation

TYPE_CHECKING = False  # see `record`
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any


# ---- parameters ---------------------------------------------------------------------------------


class Parameter:
    """One parameter of a step's or workflow's function, or what it returns."""

    def __init__(self, name: str, annotation: Any, default: Any, whose: str) -> None:
        self.name, self.default = name, default
        self.enum: list[Any] = []
        try:
            self.type = self._typed(annotation)
        except GraphError as error:
            raise GraphError(f"{whose}: {name}: {error}") from None

    def _typed(self, annotation: Any) -> str:
        import types
        import typing

        origin, args = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is typing.Annotated:
            return self._typed(args[0])
        if origin in (typing.Union, types.UnionType):
            kinds = {self._typed(arg) for arg in args if arg is not type(None)}
            return kinds.pop() if len(kinds) == 1 else "any"
        if origin is typing.Literal:
            self.enum = list(args)
            kinds = {_type_of(arg) for arg in args}
            return kinds.pop() if len(kinds) == 1 else "any"
        if origin is list and args in ((File,), (Folder,)):
            return "artifacts"
        if annotation in (File, Folder):
            return "artifact"
        if annotation is WorkspaceAnnotation or annotation is Workspace:
            return "workspace"
        kind = origin or annotation
        if kind in (bytes, bytearray):
            raise GraphError("bytes are no JSON: use File, or text")
        known = {str: "string", bool: "boolean", int: "integer", float: "number"}
        known |= {list: "array", tuple: "array", dict: "object"}
        if typing.is_typeddict(annotation):
            return "object"
        return known.get(kind, "any") if isinstance(kind, type) else "any"

    def rendered(self) -> dict[str, Any]:
        """As the model has a workflow's parameter."""
        if self.type in ("workspace", "artifacts"):
            raise GraphError(f"{self.name}: a workflow's parameter is JSON, a File or a Folder")
        found: dict[str, Any] = {"name": self.name, "type": self.type}
        if self.enum:
            found["enum"] = self.enum
        if self.default is not Parameter.EMPTY:
            found["default"] = _plain(self.default, self.name)
        return found

    def refuse(self, value: Any, whose: str) -> None:
        """Raise `GraphError` if *value* is not for it."""
        given = _kind_of(value)
        fits = given == self.type or "any" in (given, self.type) or value is None
        if not fits and (self.type, given) not in (("number", "integer"), ("artifacts", "array")):
            raise GraphError(
                f"{whose}: {self.name} is {self.type}, and is given {given}: {value!r}"
            )
        if self.enum and not isinstance(value, (Handle, Text)) and value not in self.enum:
            raise GraphError(f"{whose}: {self.name} is one of {self.enum}, and is given {value!r}")

    EMPTY = object()


def _type_of(value: Any) -> str:
    kinds = {str: "string", bool: "boolean", int: "integer", float: "number"}
    kinds |= {list: "array", tuple: "array", dict: "object"}
    return kinds.get(type(value), "any")


def _kind_of(value: Any) -> str:
    if isinstance(value, Handle):
        return value._type
    if isinstance(value, Text):
        return "string" if len(value.parts) > 1 else "any"
    if isinstance(value, Workspace):
        return "workspace"
    if isinstance(value, (list, tuple)) and value and all(_kind_of(v) == "artifact" for v in value):
        return "artifacts"
    return _type_of(value)


def _plain(value: Any, name: str) -> Any:
    if next(iter(handles(value)), None) is not None:
        raise GraphError(f"{name}: a default is a plain value")
    return _unreferenced(rendered(value))


def _unreferenced(value: Any) -> Any:
    """Defaults are not looked into for references, so they are not written as if they were."""
    if isinstance(value, str):
        return re.sub(REFERENCE, lambda m: m[0][1:] if m[1] else m[0], value)
    if isinstance(value, dict):
        return {key: _unreferenced(item) for key, item in value.items()}
    return [_unreferenced(item) for item in value] if isinstance(value, list) else value


@lru_cache(maxsize=1024)
def parameters(func: Callable[..., Any], whose: str) -> tuple[dict[str, Parameter], Parameter]:
    """(a function's parameters by name, what it returns). Raises `GraphError`."""
    import inspect
    import typing

    try:
        hints = typing.get_type_hints(func, include_extras=True)
    except Exception as error:
        raise GraphError(f"{whose}: its annotations cannot be read: {error}") from None
    found = {}
    for each_ in inspect.signature(func).parameters.values():
        if each_.kind in (each_.VAR_POSITIONAL, each_.VAR_KEYWORD, each_.POSITIONAL_ONLY):
            raise GraphError(f"{whose}: {each_}: each parameter has a name, without * and /")
        default = Parameter.EMPTY if each_.default is each_.empty else each_.default
        found[each_.name] = Parameter(each_.name, hints.get(each_.name), default, whose)
    return found, Parameter("return", hints.get("return"), Parameter.EMPTY, whose)


# ---- calls --------------------------------------------------------------------------------------


def _dashed(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "step"


def call(step: Step, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Handle:
    """A step's call in a workflow's function."""
    import inspect

    try:
        bound = inspect.signature(step.func).bind(*args, **kwargs)
    except TypeError as error:
        raise GraphError(f"step {step.__name__!r}: {error}") from None
    return _called(step, bound.arguments, {}, ())


def call_mapped(step: Step, rows: Any, axes: Mapping[str, Any]) -> Handle:
    """A step's `map` in a workflow's function."""
    import inspect

    known, _ = parameters(step.func, f"step {step.__name__!r}")
    over = {}
    has_each = any(isinstance(value, Each) for value in axes.values())
    for name, value in axes.items():
        is_list = name in known and known[name].type in ("array", "artifacts")
        is_whole = is_list or (has_each and isinstance(value, Handle))
        if isinstance(value, Each) or (_kind_of(value) in ("array", "artifacts") and not is_whole):
            over[name] = value
    fixed = {name: value for name, value in axes.items() if name not in over}
    rows = list(rows or ())
    if not over and not rows:
        raise GraphError(
            f"step {step.__name__!r}: nothing to map over: give a list, or each(handle) for one "
            "whose type is not known"
        )
    names = [*axes, *(name for row in rows for name in row if name not in axes)]
    try:
        inspect.signature(step.func).bind(**dict.fromkeys(names))
    except TypeError as error:
        raise GraphError(f"step {step.__name__!r}: {error}") from None
    return _called(step, fixed, over, rows)


def _called(
    step: Step, given: Mapping[str, Any], over: Mapping[str, Any], rows: Sequence[Any]
) -> Handle:
    graph, whose = open_graphs[-1], f"step {step.__name__!r}"
    if "<locals>" in step.__qualname__:
        raise GraphError(
            f"{whose} is defined inside a function: sandboxes find it in its module only"
        )
    options = dict(step.options)
    module = "main" if step.__module__ == "__main__" else step.__module__
    node = Node(
        str(options.pop("name", "") or _dashed(step.__name__)),
        {"handler": f"{module}:{step.__qualname__}"},
        {},
    )
    known, returned = parameters(step.func, whose)
    declared = dict(options.pop("results", None) or {})
    _declare(node, declared, options.pop("outputs", ()))
    if returned.type in ("artifact", "artifacts"):
        node.is_artifact = True
        node.outputs = (OUTPUT, *(node.outputs or ()))
        node.declared["outputs"] = [{"name": OUTPUT}, *node.declared.get("outputs", ())]
    elif not declared and returned.type != "any":
        _declare_result(node, RESULT, returned.type)
    node.options |= _options(options)
    node.local = step.func
    for name, value in given.items():
        known[name].refuse(value, whose)
        _give(node, name, value, known[name].type)
    for name, value in over.items():  # artifacts that differ from run to run
        if _kind_of(value.handle if isinstance(value, Each) else value) == "artifacts":
            node.inputs[name] = Text(f"$(item.{name})", ())
    _map_over(node, over, rows)
    return graph.add(node)


def _map_over(node: Node, over: Mapping[str, Any], rows: Sequence[Any]) -> None:
    if over:
        node.matrix["params"] = dict(over)
    if rows:
        node.matrix["include"] = [dict(row) for row in rows]


def _declare(node: Node, results: Mapping[str, Any], outputs: Any) -> None:
    """What a step is said to leave."""
    for name, kind in results.items():
        _declare_result(node, name, kind if isinstance(kind, (str, dict)) else _name_of(kind))
    several = {name: "" for name in outputs} if not isinstance(outputs, dict) else outputs
    node.outputs = tuple(several)
    if several:
        node.declared["outputs"] = [
            {"name": name, **(path if isinstance(path, dict) else {"path": path} if path else {})}
            for name, path in several.items()
        ]


def _declare_result(node: Node, name: str, kind: Any) -> None:
    shape = {"type": kind} if isinstance(kind, str) else dict(kind)
    node.results[name] = str(shape.get("type", "string"))
    node.declared.setdefault("results", []).append({"name": name, **shape})


def _name_of(kind: Any) -> str:
    return Parameter("result", kind, Parameter.EMPTY, "results").type


def _give(node: Node, name: str, value: Any, kind: str = "any") -> None:
    """One argument: a parameter, an artifact or a workspace."""
    if isinstance(value, Workspace):
        node.workspaces[name] = value.name
        value.used_by(node)
    elif "artifact" in kind or _kind_of(value) in ("artifact", "artifacts"):
        node.inputs[name] = value
    else:
        node.params[name] = value


_WORDS = {"on_error": "onError"}


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A step's options, as the model calls them."""
    return {_WORDS.get(name, name): value for name, value in options.items()}


def _graph(what: str) -> Graph:
    if not open_graphs:
        raise GraphError(f"{what} is called in a workflow's function: it makes a step of it")
    return open_graphs[-1]


def _add(
    what: str, default: str, body: dict[str, Any], /, *, is_named: bool = True, **given: Any
) -> Handle:
    """A step that is no function of the author's; *given* is its parameters, and its options."""
    graph = _graph(what)
    own = {key: given.pop(key) for key in (*OPTIONS, *_PARTS) if key in given}
    node = Node(str(own.pop("name", "") or _dashed(default)), body, {})
    node.is_named = is_named
    params = {**(own.pop("params", None) or {}), **given}
    node.inputs |= own.pop("inputs", None) or {}
    node.workspaces |= own.pop("workspaces", None) or {}
    over, rows = own.pop("matrix", None) or {}, own.pop("include", None) or ()
    _declare(node, own.pop("results", None) or {}, own.pop("outputs", None) or ())
    if "task" in body or "workflow" in body:
        node.outputs = None
    after, when = own.pop("after", ()), own.pop("when", ())
    node.options |= _options(own)
    for key, value in params.items():
        _give(node, key, value)
    _map_over(node, over, rows)
    if parallelism := node.options.pop("parallelism", 0):
        node.matrix["parallelism"] = parallelism
    handle = graph.add(node)
    node.after += [a if isinstance(a, str) else graph.own(a).its_step("after") for a in after]
    node.when = tuple(when) if isinstance(when, (list, tuple)) else (when,)
    return handle


OPTIONS = ("name", "retries", "timeout", "cache", "on_error", "environment", "network", "env",
           "limits", "merge")  # fmt: skip
_PARTS = ("params", "inputs", "workspaces", "matrix", "include", "parallelism", "results",
          "outputs", "after", "when")  # fmt: skip
"""What builders take besides their parameters; one that is called so is given in `params=`."""


def script(text: str, /, **given: Any) -> Handle:
    """A script: `#!` is honoured, else it is `/bin/sh -e`. References in it are taken.

    Keywords are its parameters, `$(params.NAME)` in it, but for a step's options and *params*,
    *inputs*, *workspaces*, *results*, *outputs*, *matrix*, *include*, *after*, *when*.
    """
    return _add("script()", "script", {"script": text}, **given)


def command(*words: Any, **given: Any) -> Handle:
    """A command with its words; the keywords are those of `script`."""
    written = [word if isinstance(word, str) else rendered(word) for word in words]
    return _add("command()", words[0] if words else "command", {"command": written}, **given)


def task(name_of_it: str, /, **given: Any) -> Handle:
    """A `kind: Task` by its name; the keywords are those of `script`."""
    return _add("task()", name_of_it, {"task": name_of_it}, **given)


def function(name_of_it: str, /, **given: Any) -> Handle:
    """A deployed function; its event is the parameters. The keywords are those of `script`."""
    return _add("function()", name_of_it, {"function": name_of_it}, is_named=False, **given)


def handler(place: str, /, **given: Any) -> Handle:
    """A handler `module:function` of the package; the keywords are those of `script`."""
    name = place.rpartition(":")[2]
    return _add("handler()", name, {"handler": place}, is_named=False, **given)


def nested(name_of_it: str, /, **given: Any) -> Handle:
    """Another workflow by its name; the keywords are those of `script`."""
    return _add("nested()", name_of_it, {"workflow": name_of_it}, **given)


def sleep(duration: str | float, /, **given: Any) -> Handle:
    """Wait for a time; nothing is held meanwhile."""
    return _add("sleep()", "sleep", {"wait": {"timer": duration}}, is_named=False, **given)


def approval(what: str, /, **given: Any) -> Handle:
    """Wait until somebody has approved *what*."""
    return _add("approval()", "approval", {"wait": {"approval": what}}, is_named=False, **given)


def callback(**given: Any) -> Handle:
    """Wait until somebody has called back; what they send is its result."""
    return _add("callback()", "callback", {"wait": {"callback": True}}, is_named=False, **given)


def finally_(*handles: Handle) -> None:
    """Run these steps after all others, however those have ended."""
    graph = _graph("finally_()")
    for handle in handles:
        graph.own(handle).its_step("finally_").is_final = True


def status() -> Handle:
    """What has become of all steps: Succeeded, Failed, Completed. For what runs finally."""
    return Handle(_graph("status()"), None, "status", (), "string")


def param(name: str) -> Handle:
    """A parameter of the workflow that is being made, by its name."""
    return Handle(_graph("param()"), None, "", (name,), "any")


def workspace(name: str) -> Workspace:
    """A mutable folder of the run that is being made."""
    return _graph("workspace()").workspace(name)


# ---- workflows ----------------------------------------------------------------------------------


def graph_of(flow: Workflow) -> Graph:
    """The graph that the function of *flow* makes. Raises `GraphError`."""
    if not isinstance(flow, Workflow):
        raise GraphError(f"{flow!r} is no workflow: put @workflow before the function")
    if any(graph.flow is flow for graph in open_graphs):
        around = [graph.flow.name for graph in open_graphs]
        raise GraphError(f"workflows run one another: {' -> '.join([*around, flow.name])}")
    known, _ = parameters(flow.func, f"workflow {flow.name!r}")
    graph = Graph(flow, [each_.rendered() for each_ in known.values()])
    for name, found in known.items():
        graph.params[name] = Handle(graph, None, "", (name,), found.type)
    open_graphs.append(graph)
    try:
        graph.returned = flow.func(**graph.params)
    finally:
        open_graphs.pop()
    for handle in handles(graph.returned):
        graph.own(handle)
    return graph


def call_nested(flow: Workflow, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Handle:
    """A workflow's call in the function of another."""
    import inspect

    whose = f"workflow {flow.name!r}"
    try:
        bound = inspect.signature(flow.func).bind(*args, **kwargs)
    except TypeError as error:
        raise GraphError(f"{whose}: {error}") from None
    inner = graph_of(flow)
    node = Node(flow.name, {"workflow": flow.name}, {})
    known, _ = parameters(flow.func, whose)
    for name, value in bound.arguments.items():
        known[name].refuse(value, whose)
        node.params[name] = value
    node.is_named = isinstance(inner.returned, dict)
    node.results = dict.fromkeys(inner.results(), "any")
    node.local = flow
    open_graphs[-1].nested.append(flow)
    return open_graphs[-1].add(node)


def nested_in(flow: Workflow) -> list[Workflow]:
    """The workflows in *flow*, innermost first, and itself."""
    found: dict[Workflow, None] = {}
    for inner in graph_of(flow).nested:
        for each_ in nested_in(inner) if inner not in found else ():
            found[each_] = None
    found[flow] = None
    return list(found)


def mapped_here(func: Callable[..., Any], rows: Any, axes: Mapping[str, Any]) -> list[Any]:
    """`map` outside of workflows: the calls, one after the other."""
    known, _ = parameters(func, f"step {func.__name__!r}")
    over = {
        name: list(value)
        for name, value in axes.items()
        if isinstance(value, (list, tuple))
        and not (name in known and known[name].type in ("array", "artifacts"))
    }
    fixed = {name: value for name, value in axes.items() if name not in over}
    return [func(**{**fixed, **run}) for run in combinations(over, list(rows or ()))]


def combinations(
    over: Mapping[str, Sequence[Any]], rows: Sequence[Any]
) -> Iterator[dict[str, Any]]:
    """The runs of a matrix, as `dayfly_pool.workflow.graph.combinations` has them."""
    import itertools

    runs = [dict(zip(over, each_, strict=True)) for each_ in itertools.product(*over.values())]
    runs = runs if over else []
    more = []
    for row in rows:
        shared = [name for name in row if name in over]
        agreeing = [run for run in runs if all(run[name] == row[name] for name in shared)]
        for run in agreeing:
            run.update(row)
        if (shared and not agreeing) or not over:
            more.append(dict(row))
    yield from [*runs, *more]
