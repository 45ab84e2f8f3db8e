"""What makes a graph of a workflow's function: handles, conditions, calls. See `steps`.

A handle stands for what is not known before a run, so all that would need its value (`if`, `for`,
text, arithmetic) is refused with what to use instead: a graph cannot see hidden control flow.
"""

from __future__ import annotations

import re
from functools import lru_cache

from dayfly.steps import OUTPUT, File, Folder, GraphError, Step, Workflow, open_graphs
from dayfly.steps import Workspace as WorkspaceAnnotation

TYPE_CHECKING = False  # see `record`
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any, NoReturn

RESULT = "result"
"""What a step returns, as a result."""

REFERENCE = (
    r"(\$?)\$\(((?:params|steps|tasks|finally|workspaces|item|run|retry|inputs|outputs|results"
    r"|context)(?:[.\[][^()$\s]{0,400})?)\)"
)
"""What the server takes for a reference; `dayfly_pool.workflow.references` has the same."""

_KEY = r"[A-Za-z_][A-Za-z0-9_-]{0,62}\Z"
_QUOTABLE = r"""[^()$\s"'\]]{1,200}\Z"""


def _literal(value: Any) -> Any:
    """A value from Python, so written that nothing in it is a reference."""
    if isinstance(value, str):
        return re.sub(REFERENCE, lambda m: "$" + m[0], value) if "$(" in value else value
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    return [_literal(item) for item in value] if isinstance(value, list) else value


# ---- handles ------------------------------------------------------------------------------------


class Handle:
    """What a step will leave, or a parameter of the workflow; part of it with `handle["key"]`."""

    __slots__ = ("_field", "_graph", "_node", "_pieces", "_type")

    def __init__(
        self, graph: Graph, node: Node | None, field: str, pieces: tuple[Any, ...], kind: str
    ) -> None:
        self._graph, self._node, self._field = graph, node, field
        self._pieces, self._type = pieces, kind

    def __getitem__(self, key: str | int) -> Handle:
        """A key of the mapping, or an item of the list, that it will be."""
        if type(key) not in (str, int) or (isinstance(key, int) and key < 0):
            raise GraphError(f"{key!r}: a handle is indexed with a key or with 0, 1, 2 ...")
        if isinstance(key, str) and not (re.match(_KEY, key) or re.match(_QUOTABLE, key)):
            raise GraphError(f"key {key!r} cannot be named in a graph: take it in a step")
        node = self._node
        if node is not None and self._field == "results" and not self._pieces:
            kind = node.results.get(str(key))
            if kind is not None or node.is_named:
                kind = "array" if node.matrix else kind or "any"
                return Handle(self._graph, node, "results", (key,), kind)
            return Handle(self._graph, node, "results", (RESULT, key), "any")
        return Handle(self._graph, node, self._field, (*self._pieces, key), "any")

    @property
    def outputs(self) -> Outputs:
        """Its outputs by name: `handle.outputs["model"]`."""
        return Outputs(self)

    @property
    def status(self) -> Handle:
        """Succeeded, Failed or None, as text."""
        return Handle(self._graph, self._its_step("status"), "status", (), "string")

    # What is said about the call itself; each returns the handle.

    def when(self, *conditions: Condition) -> Handle:
        """Run it only if all *conditions* hold: `.when(h["score"] > 0.5)`."""
        for condition in conditions:
            if not isinstance(condition, Condition):
                raise GraphError(
                    f"when({condition!r}): compare a handle, as in h['score'] > 0.5, or use cel()"
                )
        self._its_step("when").when += conditions
        return self

    def retry(self, limit: int, *, backoff: float = 0.0, backoff_max: float = 300.0) -> Handle:
        """Try it again up to *limit* times, the first after up to *backoff* seconds."""
        self._its_step("retry").options["retries"] = _retries(limit, backoff, backoff_max)
        return self

    def timeout(self, duration: str | float) -> Handle:
        """End it after this time: seconds, or text like `15m`."""
        self._its_step("timeout").options["timeout"] = duration
        return self

    def after(self, *others: Handle) -> Handle:
        """Run it after others of which it takes nothing."""
        node = self._its_step("after")
        node.after += [self._graph.own(other)._its_step("after") for other in others]
        return self

    def named(self, name: str) -> Handle:
        """Call the step so."""
        node = self._its_step("named")
        self._graph.rename(node, name)
        return self

    def on_error(self, what: str) -> Handle:
        """`continue`: its failure does not end the run."""
        self._its_step("on_error").options["onError"] = what
        return self

    def in_(self, values: Iterable[Any] | Handle) -> Condition:
        """A condition: it is one of *values*."""
        return Condition(self, "in", values if isinstance(values, Handle) else list(values))

    def not_in(self, values: Iterable[Any] | Handle) -> Condition:
        """A condition: it is none of *values*."""
        return Condition(self, "notin", values if isinstance(values, Handle) else list(values))

    def _its_step(self, what: str) -> Node:
        if self._node is None or self._pieces or self._field == "status":
            raise GraphError(f".{what} is for what a step's call returns, and {self!r} is not that")
        return self._node

    def _reference(self) -> str:
        """As `$(...)`."""
        node = self._node
        pieces = self._pieces
        if node is None and self._field == "status":
            start = "steps.status"
        elif node is None:
            start, pieces = f"params.{pieces[0]}", pieces[1:]
        elif self._field == "status":
            start = f"steps.{node.name}.status"
        else:
            name, pieces = self._named_piece(node)
            start = f"steps.{node.name}.{self._field}.{name}"
        return f"$({start}{''.join(map(_index, pieces))})"

    def _named_piece(self, node: Node) -> tuple[str, tuple[Any, ...]]:
        if self._pieces:
            return self._pieces[0], self._pieces[1:]
        if node.is_named:
            some = ", ".join(node.results) or "none that are known here"
            raise GraphError(
                f"step {node.name!r} has several results ({some}): take one: h['NAME']"
            )
        return RESULT, ()

    def _cel(self) -> str:
        node = self._node
        if node is None and self._field == "status":
            raise GraphError("status() is not compared with > or <, & or |: use ==, != or in_()")
        if node is None:
            return "params" + "".join(map(_quoted, self._pieces))
        start = f"steps[{_json(node.name)}].{self._field}"
        if self._field == "status":
            return start
        name, pieces = self._named_piece(node)
        return start + "".join(map(_quoted, (name, *pieces)))

    def __repr__(self) -> str:
        try:
            return f"<{self._reference()}>"
        except GraphError:
            return f"<step {self._node.name if self._node else ''}>"

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> Condition:  # type: ignore[override]
        return _compared(self, "==", other)

    def __ne__(self, other: object) -> Condition:  # type: ignore[override]
        return _compared(self, "!=", other)

    def __lt__(self, other: object) -> Condition:
        return _compared(self, "<", other)

    def __le__(self, other: object) -> Condition:
        return _compared(self, "<=", other)

    def __gt__(self, other: object) -> Condition:
        return _compared(self, ">", other)

    def __ge__(self, other: object) -> Condition:
        return _compared(self, ">=", other)

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise GraphError(f"a handle has no {name!r}: take a key as h[{name!r}], the rest in a step")


_REFUSED = {
    "an `if`, `while`, `and`, `or` or `not`": ("bool",),
    "a `for`, or unpacking": ("iter", "next", "reversed"),
    "len()": ("len",),
    "`in`": ("contains",),
    "text, as in an f-string": ("str", "format"),
    "a call": ("call",),
    "a number": ("int", "float", "index", "complex", "round"),
    "arithmetic": (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "neg", "abs"),
        *("radd", "rsub", "rmul", "rtruediv", "rfloordiv", "rmod", "rpow", "and", "or", "xor"),
    ),
}
_INSTEAD = {
    "an `if`, `while`, `and`, `or` or `not`": "use .when(condition)",
    "a `for`, or unpacking": "use STEP.map(...), or each(handle) in it",
    "`in`": "use handle.in_([...])",
    "text, as in an f-string": "use text('.../{}', handle)",
}


def _refusing(what: str) -> Callable[..., NoReturn]:
    def refuse(self: Handle, *_: Any) -> NoReturn:
        instead = _INSTEAD.get(what, "do it in a step")
        raise GraphError(
            f"{self!r} is used in {what}, but has no value yet: a graph cannot see that; {instead}"
        )

    return refuse


for _what, _methods in _REFUSED.items():
    for _method in _methods:
        setattr(Handle, f"__{_method}__", _refusing(_what))


class Outputs:
    """The outputs of a step, by name."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def __getitem__(self, name: str) -> Handle:
        """One of them, to be given to a File's or Folder's parameter."""
        node = self._handle._its_step("outputs")
        if node.outputs is not None and name not in node.outputs:
            some = ", ".join(node.outputs) or "none"
            raise GraphError(f"step {node.name!r} has no output {name!r}; it has {some}")
        kind = "artifacts" if node.matrix else "artifact"
        return Handle(self._handle._graph, node, "outputs", (name,), kind)


def _json(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)


def _index(key: str | int) -> str:
    if isinstance(key, int):
        return f"[{key}]"
    return f".{key}" if re.match(_KEY, key) else f'["{key}"]'


def _quoted(key: str | int) -> str:
    return f"[{_json(key)}]"


class Text:
    """Text with handles among it."""

    def __init__(self, form: str, handles: tuple[Any, ...]) -> None:
        parts = form.split("{}") if handles else [form]
        if handles and len(parts) != len(handles) + 1:
            raise GraphError(f"text({form!r}) has {len(parts) - 1} {{}} for {len(handles)} handles")
        self.parts: list[Any] = [parts[0]]
        for handle, part in zip(handles, parts[1:], strict=False):
            if not isinstance(handle, (Handle, Text, str, int, float)):
                raise GraphError(f"text() takes handles, and {handle!r} is none")
            self.parts += handle.parts if isinstance(handle, Text) else [handle]
            self.parts.append(part)
        self.parts = [p if isinstance(p, Handle) else str(p) for p in self.parts]

    def __str__(self) -> str:
        raise GraphError("a text() is given to a step as it is: it has no value yet")


def text(form: str, *handles: Handle) -> Any:
    """*form* with each `{}` replaced by what a handle will be; references in *form* are taken."""
    if not open_graphs:
        return form.format(*handles) if handles else form
    return Text(form, handles)


# ---- conditions ---------------------------------------------------------------------------------


class Condition:
    """What `.when` takes; combined with `&`, `|` and `~`."""

    def __init__(self, left: Any, sign: str, right: Any = None) -> None:
        self.left, self.sign, self.right = left, sign, right

    def __and__(self, other: Condition) -> Condition:
        return Condition(self, "&&", _condition(other))

    def __or__(self, other: Condition) -> Condition:
        return Condition(self, "||", _condition(other))

    def __invert__(self) -> Condition:
        return Condition(self, "!")

    def __bool__(self) -> NoReturn:
        raise GraphError(
            "a condition has no value yet: use .when(condition) for `if`, and & | ~ for `and`, "
            "`or`, `not`; `0 < h < 1` is (0 < h) & (h < 1)"
        )

    def cel(self) -> str:
        """As CEL."""
        if self.sign == "cel":
            return str(self.left)
        if self.sign == "!":
            return f"!({self.left.cel()})"
        if self.sign in ("&&", "||"):
            return f"({self.left.cel()}) {self.sign} ({self.right.cel()})"
        left, right = _cel(self.left), _cel(self.right)
        if self.sign == "notin":
            return f"!({left} in {right})"
        return f"{left} {self.sign} {right}"

    def rendered(self) -> dict[str, Any]:
        """As the model has it: Tekton's words where these can say it."""
        word = {"==": "in", "!=": "notin", "in": "in", "notin": "notin"}.get(self.sign)
        is_whole = not isinstance(self.right, Handle) or self.sign in ("in", "notin")
        if word is None or not isinstance(self.left, Handle) or not is_whole:
            return {"cel": self.cel()}
        values = self.right if self.sign in ("in", "notin") else [self.right]
        return {"input": _rendered(self.left), "operator": word, "values": _rendered(values)}

    def holds(self, resolve: Callable[[Any], Any]) -> bool:
        """Whether it is true of values that are known."""
        import operator

        if self.sign == "cel":
            raise GraphError("cel() is for servers: a workflow with it cannot be run here")
        if self.sign in ("&&", "||", "!"):
            left = self.left.holds(resolve)
            if self.sign == "!":
                return not left
            if left == (self.sign == "||"):
                return bool(left)
            return bool(self.right.holds(resolve))
        left, right = resolve(self.left), resolve(self.right)
        if self.sign in ("in", "notin"):
            return (left in right) == (self.sign == "in")
        signs = {"==": "eq", "!=": "ne", "<": "lt", "<=": "le", ">": "gt", ">=": "ge"}
        return bool(getattr(operator, signs[self.sign])(left, right))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<condition {self.cel()}>"


def _condition(other: Any) -> Condition:
    if not isinstance(other, Condition):
        raise GraphError(f"{other!r} is no condition: put brackets around each, as & binds tighter")
    return other


def _compared(left: Handle, sign: str, right: object) -> Condition:
    if isinstance(right, Text):
        raise GraphError("a text() is not compared: compare the handles in it")
    return Condition(left, sign, right)


def _cel(value: Any) -> str:
    if isinstance(value, Handle):
        return value._cel()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_cel, value))}]"
    return _json(value).replace("$(", "\\u0024(")  # a text, and no reference


def cel(expression: str) -> Condition:
    """A condition in CEL over `params` and `steps`, as it is."""
    return Condition(expression, "cel")


def in_(handle: Handle, values: Iterable[Any] | Handle) -> Condition:
    """The condition that *handle* is one of *values*."""
    return handle.in_(values)


# ---- the graph ----------------------------------------------------------------------------------


class Workspace:
    """A mutable folder of a run. Also an annotation: a step's parameter of it is a `pathlib.Path`.

    Steps that are given the same one run one after the other, as they are called. Those that are
    given branches of it, from `branch()`, run beside one another, and whoever is given the
    workspace itself afterwards runs after all of them, on what they have made together.
    """

    def __init__(self, graph: Graph, name: str) -> None:
        self.graph, self.name = graph, name
        self.last: list[Node] = []
        self.branches: list[Workspace] = []

    def branch(self) -> Workspace:
        """A view of it as it is now, for one of several steps that run beside one another."""
        branch = Workspace(self.graph, self.name)
        branch.last = list(self.last)
        self.branches.append(branch)
        return branch

    def used_by(self, node: Node) -> None:
        """*node* comes after whoever has had it."""
        others = [*self.last, *(last for branch in self.branches for last in branch.last)]
        node.after += [other for other in others if other is not node and other not in node.after]
        self.last, self.branches = [node], []


class Each:
    """A handle of a list, of which each item is a run of the step."""

    def __init__(self, handle: Handle) -> None:
        self.handle = handle


def each(handle: Handle) -> Each:
    """In `.map`: one run for each item of the list that *handle* will be."""
    return Each(handle)


class Node:
    """One step of a graph that is being made."""

    def __init__(self, name: str, body: dict[str, Any], options: dict[str, Any]) -> None:
        self.name, self.body, self.options = name, body, options
        self.params: dict[str, Any] = {}
        self.inputs: dict[str, Any] = {}
        self.workspaces: dict[str, str] = {}
        self.matrix: dict[str, Any] = {}
        self.after: list[Any] = []
        self.when: tuple[Any, ...] = ()
        self.results: dict[str, str] = {}
        self.outputs: tuple[str, ...] | None = ()
        self.declared: dict[str, Any] = {}
        self.is_named = False
        self.is_artifact = False
        self.is_final = False
        self.local: Callable[..., Any] | None = None

    def rendered(self) -> dict[str, Any]:
        """As the model has a step."""
        step: dict[str, Any] = {"name": self.name, **self.body}
        step |= {"params": _rendered(self.params), "inputs": _rendered(self.inputs)}
        step |= {**self.declared, "workspaces": self.workspaces}
        after = [o.name if isinstance(o, Node) else o for o in self.after]
        step["runAfter"] = list(dict.fromkeys(after))
        step["when"] = [_when(condition) for condition in self.when]
        step["matrix"] = _rendered(self.matrix)
        step |= self.options
        return {key: value for key, value in step.items() if not _is_empty(value)}


def _is_empty(value: Any) -> bool:
    return value is None or value == "" or value == [] or value == {} or value is False


def _when(condition: Any) -> Any:
    return condition.rendered() if isinstance(condition, Condition) else _rendered(condition)


def _rendered(value: Any) -> Any:
    """A value of the graph as JSON with references."""
    if isinstance(value, Handle):
        return value._reference()
    if isinstance(value, Each):
        return value.handle._reference()
    if isinstance(value, Text):
        return "".join([p._reference() if isinstance(p, Handle) else p for p in value.parts])
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise GraphError(f"{key!r}: keys of what is given to steps are text")
        return {key: _rendered(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rendered(item) for item in value]
    if isinstance(value, str):
        return _literal(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise GraphError(
        f"a {type(value).__name__} cannot be given to a step: give JSON values, or a File"
    )


class Graph:
    """A workflow while its function runs."""

    def __init__(self, flow: Workflow) -> None:
        self.flow = flow
        self.nodes: list[Node] = []
        self.names: set[str] = set()
        self.numbers: dict[str, int] = {}
        self.workspaces: dict[str, Workspace] = {}
        self.params: dict[str, Handle] = {}
        self.nested: list[Workflow] = []
        self.returned: Any = None

    def own(self, handle: Any) -> Handle:
        """*handle*, if it is one of this graph."""
        if not isinstance(handle, Handle):
            raise GraphError(f"{handle!r} is no handle: give what a step's call returned")
        if handle._graph is not self:
            raise GraphError(f"{handle!r} belongs to another workflow: give it as a parameter")
        return handle

    def add(self, node: Node) -> Handle:
        """Take *node* in, under a name of its own."""
        name = node.name
        while node.name in self.names:
            self.numbers[name] = self.numbers.get(name, 1) + 1
            node.name = f"{name[:56]}-{self.numbers[name]}"
        self.names.add(node.name)
        self.nodes.append(node)
        for value in (node.params, node.inputs, node.matrix):
            for handle in _handles(value):
                self.own(handle)
        return self.handle(node)

    def handle(self, node: Node) -> Handle:
        """What a call of *node* returns."""
        if node.is_artifact:
            kind = "artifacts" if node.matrix else "artifact"
            return _Artifact(self, node, "outputs", (), kind)
        kind = "array" if node.matrix else node.results.get(RESULT, "any")
        return Handle(self, node, "results", (), kind)

    def rename(self, node: Node, name: str) -> None:
        """Give *node* another name."""
        if name in self.names and name != node.name:
            raise GraphError(f"there is a step {name!r} already")
        self.names.discard(node.name)
        self.names.add(name)
        node.name = name

    def workspace(self, name: str) -> Workspace:
        """The workspace *name*."""
        return self.workspaces.setdefault(name, Workspace(self, name))

    def rendered(self) -> dict[str, Any]:
        """The spec."""
        flow = self.flow
        spec: dict[str, Any] = {
            "params": [p.rendered() for p in flow_parameters(flow)],
            "workspaces": list(self.workspaces),
            "steps": [node.rendered() for node in self.nodes if not node.is_final],
            "finally": [node.rendered() for node in self.nodes if node.is_final],
            "results": self.results(),
            **flow.options,
        }
        if not spec["steps"]:
            raise GraphError(f"workflow {flow.name!r} calls no step")
        return {key: value for key, value in spec.items() if not _is_empty(value)}

    def results(self) -> dict[str, Any]:
        """What the workflow's function returned: a mapping is results by name."""
        value = self.returned
        if value is None:
            return {}
        rendered = _rendered(value)
        return rendered if isinstance(value, dict) else {RESULT: rendered}


class _Artifact(Handle):
    """What a step returns that returns a file: its output."""

    __slots__ = ()

    def __getitem__(self, key: str | int) -> Handle:
        """One of several, of a step that was mapped."""
        if self._type != "artifacts" or not isinstance(key, int):
            raise GraphError(f"{self!r} is a file or folder: look into it in a step")
        return Handle(self._graph, self._node, "outputs", (OUTPUT, key), "artifact")

    def _named_piece(self, node: Node) -> tuple[str, tuple[Any, ...]]:
        return OUTPUT, ()


def _handles(value: Any) -> Iterable[Handle]:
    if isinstance(value, Handle):
        yield value
    elif isinstance(value, Each):
        yield value.handle
    elif isinstance(value, Text):
        yield from (part for part in value.parts if isinstance(part, Handle))
    elif isinstance(value, dict):
        for item in value.values():
            yield from _handles(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _handles(item)


def _retries(limit: int, backoff: float, backoff_max: float = 300.0) -> Any:
    if not backoff:
        return limit
    found: dict[str, Any] = {"limit": limit, "backoffSeconds": backoff}
    return found | ({"backoffMaxSeconds": backoff_max} if backoff_max != 300.0 else {})


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
    if next(iter(_handles(value)), None) is not None:
        raise GraphError(f"{name}: a default is a plain value")
    return _unreferenced(_rendered(value))


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
    node.after += [a if isinstance(a, str) else graph.own(a)._its_step("after") for a in after]
    node.when = tuple(when) if isinstance(when, (list, tuple)) else (when,)
    return handle


OPTIONS = ("name", "retries", "timeout", "cache", "on_error", "environment", "network", "env",
           "merge")  # fmt: skip
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
    rendered = [w if isinstance(w, str) else _rendered(w) for w in words]
    return _add("command()", words[0] if words else "command", {"command": rendered}, **given)


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
        graph.own(handle)._its_step("finally_").is_final = True


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
    graph = Graph(flow)
    for found in flow_parameters(flow):
        kind = found.type
        graph.params[found.name] = Handle(graph, None, "", (found.name,), kind)
    open_graphs.append(graph)
    try:
        graph.returned = flow.func(**graph.params)
    finally:
        open_graphs.pop()
    for handle in _handles(graph.returned):
        graph.own(handle)
    return graph


def flow_parameters(flow: Workflow) -> list[Parameter]:
    """What a workflow is given."""
    known, _ = parameters(flow.func, f"workflow {flow.name!r}")
    return list(known.values())


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
