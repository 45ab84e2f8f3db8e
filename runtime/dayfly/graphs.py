"""A workflow's graph while its function makes it: handles, conditions, nodes. See `steps`.

A handle stands for what is not known before a run, so all that would need its value (`if`, `for`,
text, arithmetic) is refused with what to use instead: a graph cannot see hidden control flow.
"""

from __future__ import annotations

import re

from dayfly.steps import OUTPUT, GraphError, open_graphs

TYPE_CHECKING = False  # see `record`
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, NoReturn

    from dayfly.steps import Workflow

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
        return Handle(self._graph, self.its_step("status"), "status", (), "string")

    # What is said about the call itself; each returns the handle.

    def when(self, *conditions: Condition) -> Handle:
        """Run it only if all *conditions* hold: `.when(h["score"] > 0.5)`."""
        for condition in conditions:
            if not isinstance(condition, Condition):
                raise GraphError(
                    f"when({condition!r}): compare a handle, as in h['score'] > 0.5, or use cel()"
                )
        self.its_step("when").when += conditions
        return self

    def retry(self, limit: int, *, backoff: float = 0.0, backoff_max: float = 300.0) -> Handle:
        """Try it again up to *limit* times, the first after up to *backoff* seconds."""
        self.its_step("retry").options["retries"] = _retries(limit, backoff, backoff_max)
        return self

    def timeout(self, duration: str | float) -> Handle:
        """End it after this time: seconds, or text like `15m`."""
        self.its_step("timeout").options["timeout"] = duration
        return self

    def after(self, *others: Handle) -> Handle:
        """Run it after others of which it takes nothing."""
        node = self.its_step("after")
        node.after += [self._graph.own(other).its_step("after") for other in others]
        return self

    def named(self, name: str) -> Handle:
        """Call the step so."""
        node = self.its_step("named")
        self._graph.rename(node, name)
        return self

    def on_error(self, what: str) -> Handle:
        """`continue`: its failure does not end the run."""
        self.its_step("on_error").options["onError"] = what
        return self

    def in_(self, values: Iterable[Any] | Handle) -> Condition:
        """A condition: it is one of *values*."""
        return Condition(self, "in", values if isinstance(values, Handle) else list(values))

    def not_in(self, values: Iterable[Any] | Handle) -> Condition:
        """A condition: it is none of *values*."""
        return Condition(self, "notin", values if isinstance(values, Handle) else list(values))

    def its_step(self, what: str) -> Node:
        """The step whose call returned it. Raises `GraphError` if none did."""
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
            return "$(steps.status)"
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
        node = self._handle.its_step("outputs")
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
        return {"input": rendered(self.left), "operator": word, "values": rendered(values)}

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
        step |= {"params": rendered(self.params), "inputs": rendered(self.inputs)}
        step |= {**self.declared, "workspaces": self.workspaces}
        after = [o.name if isinstance(o, Node) else o for o in self.after]
        step["runAfter"] = list(dict.fromkeys(after))
        step["when"] = [_when(condition) for condition in self.when]
        step["matrix"] = rendered(self.matrix)
        step |= self.options
        return {key: value for key, value in step.items() if not _is_empty(value)}


def _is_empty(value: Any) -> bool:
    return value is None or value == "" or value == [] or value == {} or value is False


def _when(condition: Any) -> Any:
    return condition.rendered() if isinstance(condition, Condition) else rendered(condition)


def rendered(value: Any) -> Any:
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
        return {key: rendered(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rendered(item) for item in value]
    if isinstance(value, str):
        return _literal(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise GraphError(
        f"a {type(value).__name__} cannot be given to a step: give JSON values, or a File"
    )


class Graph:
    """A workflow while its function runs."""

    def __init__(self, flow: Workflow, declared: list[dict[str, Any]]) -> None:
        self.flow, self.declared = flow, declared
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
            for handle in handles(value):
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
            "params": self.declared,
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
        found: dict[str, Any] = rendered(value)
        return found if isinstance(value, dict) else {RESULT: found}


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


def handles(value: Any) -> Iterable[Handle]:
    """The handles in a value."""
    if isinstance(value, Handle):
        yield value
    elif isinstance(value, Each):
        yield value.handle
    elif isinstance(value, Text):
        yield from (part for part in value.parts if isinstance(part, Handle))
    elif isinstance(value, dict):
        for item in value.values():
            yield from handles(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from handles(item)


def _retries(limit: int, backoff: float, backoff_max: float = 300.0) -> Any:
    if not backoff:
        return limit
    found: dict[str, Any] = {"limit": limit, "backoffSeconds": backoff}
    return found | ({"backoffMaxSeconds": backoff_max} if backoff_max != 300.0 else {})
