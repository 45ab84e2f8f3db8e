"""References: `$(params.url)`, `$(steps.fetch.results.count)` and their like, found and replaced.

One that is a whole string stands for the value with its type, one among other text for its text.
`$(...)` that is no word of ours is left as it is, for it is a shell's; `$$(params.url)` is the text
`$(params.url)`. Values are only put in: what was put in is not looked at again, so nothing that a
user or a step says becomes a reference or code. Time is linear in what is read and written.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple

import msgspec
from msgspec import Struct

from dayfly_pool.errors import BadInput
from dayfly_pool.workflow.values import VALUES_BYTES_MAX, json_bytes

Root = Literal[
    "params", "steps", "workspaces", "inputs", "outputs", "results", "item", "run", "retry"
]
TAIL_MAX: Final = 16
WORDS: Final = re.compile(
    r"(\$?)\$\(((?:params|steps|tasks|finally|workspaces|item|run|retry|inputs|outputs|results"
    r"|context)(?:[.\[][^()$\s]{0,400})?)\)"
)
"""What may be a reference of ours, and whether it is escaped. `dayfly.graphs` has the same."""

_NEARLY: Final = re.compile(r"(?<!\$)\$\(([A-Za-z]{3,20})\.([\w-]{1,100}(?:\.[\w-]{1,100}){0,8})\)")
_MISSED: Final = ("params", "steps", "results", "outputs", "inputs", "workspaces")
_PIECE: Final = re.compile(
    r"""\.([A-Za-z0-9_][A-Za-z0-9_-]{0,255})|\[(?:(\d{1,9})|(\*)|"([^"]{1,255})"|'([^']{1,255})')\]"""
)
_NAMED: Final = r"([A-Za-z0-9_][A-Za-z0-9_-]{0,255})"
_PLAIN: Final = re.compile(
    rf"params\.{_NAMED}|(?:steps|tasks)\.{_NAMED}\.(results|outputs)\.{_NAMED}"
)
"""What nearly all of them are: read in a quarter of the time."""

_KEY: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,62}\Z")
_RUN: Final = frozenset({"id", "name", "namespace", "workflow"})
_CONTEXT: Final = {
    "pipelineRun.name": "run.name",
    "pipelineRun.uid": "run.id",
    "pipelineRun.namespace": "run.namespace",
    "pipeline.name": "run.workflow",
    "taskRun.namespace": "run.namespace",
    "task.retry-count": "retry.count",
    "pipelineTask.retries": "retry.limit",
}
"""Tekton's words for ours. Others of its `context` are left as they are."""

_FORMS: Final = {
    "params": "$(params.NAME), with [*], [0] or .KEY behind",
    "steps": "$(steps.NAME.results.RESULT), $(steps.NAME.outputs.OUTPUT) or $(steps.NAME.status)",
    "workspaces": "$(workspaces.NAME.path)",
    "inputs": "$(inputs.NAME.path)",
    "outputs": "$(outputs.NAME.path)",
    "results": "$(results.NAME.path)",
    "item": "$(item) or $(item.NAME)",
    "run": "$(run.id), $(run.name), $(run.namespace) or $(run.workflow)",
    "retry": "$(retry.count) or $(retry.limit)",
}


class Reference(NamedTuple):
    """One reference, taken apart.

    *name* is the parameter, step, workspace, input or field of `run` that is meant, empty for
    `$(steps.status)` and `$(item)`; *field* is `results`, `outputs` or `status` of a step; *key*
    the result or output; *tail* what is taken of the value; *is_star* `[*]`, all of a list.
    """

    root: Root
    name: str = ""
    field: str = ""
    key: str = ""
    tail: tuple[str | int, ...] = ()
    is_star: bool = False

    def __str__(self) -> str:
        named = [part for part in (self.root, self.name, self.field, self.key) if part]
        if self.root in ("workspaces", "inputs", "outputs", "results"):
            named.append("path")
        tail = "".join(
            f"[{p}]" if isinstance(p, int) else f".{p}" if _KEY.match(p) else f'["{p}"]'
            for p in self.tail
        )
        return f"$({'.'.join(named)}{tail}{'[*]' if self.is_star else ''})"


class Unresolved(BadInput):
    """A reference has no value.

    What it names was skipped, has failed, or left nothing of that name.
    """

    def __init__(self, reference: Reference, why: str) -> None:
        super().__init__(f"{reference}: {why}")
        self.reference = reference


class Malformed(BadInput):
    """It begins as a reference of ours does, and is none.

    Write it as the detail says, or with `$$(` if it is meant literally.
    """


class StepEnd(Struct, frozen=True):
    """What others may take of a step that has ended. Outputs are artifacts' references."""

    status: str = "Succeeded"
    results: Mapping[str, Any] = {}
    outputs: Mapping[str, Any] = {}


class Scope(Struct, frozen=True):
    """What references stand for where they are replaced.

    *workspaces*, *inputs*, *outputs* and *results* are paths by name; *item* is the combination of
    a matrix that runs (`$(item)` is its value, if it has one); *status* is that of all steps.
    """

    params: Mapping[str, Any] = {}
    steps: Mapping[str, StepEnd] = {}
    workspaces: Mapping[str, str] = {}
    inputs: Mapping[str, str] = {}
    outputs: Mapping[str, str] = {}
    results: Mapping[str, str] = {}
    item: Any = None
    run: Mapping[str, str] = {}
    retry: Mapping[str, int] = {}
    status: str | None = None


# ---- reading ------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def parse(text: str) -> Reference | None:
    """The reference that the inside of `$(...)` is; None if it is no word of ours.

    Raises `Malformed` if it begins as one of ours and is none.
    """
    if plain := _PLAIN.fullmatch(text):
        param, name, field, key = plain.groups()
        return Reference("params", param) if param else Reference("steps", name, field, key)
    root, end = re.match(r"[a-z]*", text).group(), len(text)  # type: ignore[union-attr]
    if root == "context":
        known = _CONTEXT.get(text[8:])
        return parse(known) if known else None
    pieces: list[str | int | None] = []
    at = len(root)
    while at < end and (piece := _PIECE.match(text, at)):
        word, index, star, *quoted = piece.groups()
        pieces.append(None if star else int(index) if index else word or quoted[0] or quoted[1])
        at = piece.end()
    if root in ("tasks", "finally"):
        root = "steps"
    if root not in _FORMS:
        return None
    found = None
    if at == end and len(pieces) <= TAIL_MAX and None not in pieces[:-1]:
        is_star = bool(pieces) and pieces[-1] is None
        found = _reference(root, [p for p in pieces if p is not None], is_star)
    if found is None:
        raise Malformed(
            f"$({text[:200]}) is no reference: write {_FORMS[root]}; or $$( for the text"
        )
    return found


def _reference(root: Any, pieces: Sequence[str | int], is_star: bool) -> Reference | None:
    match root, [*pieces]:
        case "params", [str(name), *tail]:
            return Reference(root, name, tail=tuple(tail), is_star=is_star)
        case "item", tail:
            return Reference(root, tail=tuple(tail), is_star=is_star)
        case "steps", [str(name), ("results" | "outputs") as field, str(key), *tail]:
            return Reference(root, name, str(field), key, tuple(tail), is_star)
        case "steps", [str(name), "status"] if not is_star:
            return Reference(root, name, "status")
        case "steps", ["status"] if not is_star:
            return Reference(root, field="status")
        case (("workspaces" | "inputs" | "outputs" | "results"), [str(name), "path"]) if (
            not is_star
        ):
            return Reference(root, name)
        case "run", [str(name)] if name in _RUN and not is_star:
            return Reference(root, name)
        case "retry", [("count" | "limit") as name] if not is_star:
            return Reference(root, str(name))
    return None


def whole(text: str) -> Reference | None:
    """The reference that *text* is and nothing else. Raises `Malformed`."""
    if not text.startswith("$("):
        return None
    found = WORDS.fullmatch(text)
    return parse(found[2]) if found and not found[1] else None


def in_text(text: str, *, is_script: bool = False) -> Iterator[Reference]:
    """The references in *text*; in a script, what is malformed is none of ours."""
    if "$(" not in text:
        return
    for found in WORDS.finditer(text):
        if found[1]:
            continue
        try:
            reference = parse(found[2])
        except Malformed:
            if not is_script:
                raise
            continue
        if reference is not None:
            yield reference


def nearly(script: str, params: Mapping[str, Any]) -> Iterator[tuple[str, Reference]]:
    """What a shell would take for commands in *script*, and the references that it nearly is."""
    if "$(" not in script:
        return
    for found in _NEARLY.finditer(script):
        root = _nearest(found[1])
        try:
            reference = parse(f"{root}.{found[2]}") if root else None
        except Malformed:
            continue
        if reference is not None and (root != "params" or reference.name in params):
            yield f"{found[1]}.{found[2]}", reference


@lru_cache(maxsize=1024)
def _nearest(word: str) -> str:
    """The root of references that *word* is nearly, but not quite; empty if there is none."""
    close = difflib.get_close_matches(word.lower(), _MISSED, 1, 0.8)
    return close[0] if close and word not in (*_FORMS, "tasks", "finally", "context") else ""


def texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value. Keys are not looked at."""
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list | tuple):
            todo += item


def literal(text: str) -> str:
    """*text* so written that it stands for itself."""
    return WORDS.sub(lambda found: "$" + found[0], text) if "$(" in text else text


# ---- replacing ----------------------------------------------------------------------------------


def look_up(reference: Reference, scope: Scope) -> Any:
    """The value that is meant. Raises `Unresolved`."""
    match reference.root:
        case "steps":
            value = _of_a_step(reference, scope)
        case "item":
            value = scope.item
            if not reference.tail and isinstance(value, Mapping) and len(value) == 1:
                (value,) = value.values()
        case root:
            held: Mapping[str, Any] = getattr(scope, root)
            if reference.name not in held:
                raise Unresolved(reference, f"there is no {reference.name!r} here")
            value = held[reference.name]
    for part in reference.tail:
        try:
            if isinstance(value, str) or (isinstance(part, str) and not isinstance(value, Mapping)):
                raise TypeError
            value = value[part]
        except (KeyError, IndexError, TypeError):
            raise Unresolved(reference, f"the value has no {part!r}") from None
    if reference.is_star and not isinstance(value, list | tuple | Mapping):
        raise Unresolved(reference, "the value is no list")
    return value


def _of_a_step(reference: Reference, scope: Scope) -> Any:
    if not reference.name:
        if scope.status is None:
            raise Unresolved(reference, "it is known only finally")
        return scope.status
    end = scope.steps.get(reference.name)
    if end is None:
        raise Unresolved(reference, f"step {reference.name!r} has left nothing")
    if reference.field == "status":
        return end.status
    held = end.results if reference.field == "results" else end.outputs
    if reference.key not in held:
        raise Unresolved(reference, f"step {reference.name!r} has left no {reference.key!r}")
    return held[reference.key]


class _Room:
    """How much may still be written."""

    def __init__(self, most: int) -> None:
        self.left = self.most = most
        self._known: dict[Reference, int] = {}

    def take(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise BadInput(
                f"what references stand for is over {self.most} bytes: hand it over as an output"
            )

    def take_value(self, reference: Reference, value: Any) -> None:
        """A large value is measured once, however often it is put in."""
        size = self._known.get(reference)
        if size is None:
            size = self._known[reference] = json_bytes(value)
        self.take(size)


def substitute(value: Any, scope: Scope, bytes_max: int = VALUES_BYTES_MAX) -> Any:
    """*value* with its references replaced, at all depths.

    In a list, `$(params.list[*])` is all its items. Raises `Unresolved`, and `BadInput` when
    the result is over *bytes_max*.
    """
    return _substituted(value, scope, _Room(bytes_max))


def _substituted(value: Any, scope: Scope, room: _Room) -> Any:
    if isinstance(value, str):
        reference = _whole(value)
        if reference is None:
            return _text(value, scope, room)
        found = look_up(reference, scope)
        room.take_value(reference, found)
        return found
    if isinstance(value, dict):
        return {key: _substituted(item, scope, room) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items: list[Any] = []
        for item in value:
            reference = _whole(item) if isinstance(item, str) else None
            found = _substituted(item, scope, room)
            if reference is not None and reference.is_star and isinstance(found, list | tuple):
                items += found
            else:
                items.append(found)
        return items
    return value


def _whole(text: str) -> Reference | None:
    try:
        return whole(text)
    except Malformed:
        return None


def substitute_text(text: str, scope: Scope, bytes_max: int = VALUES_BYTES_MAX) -> str:
    """A script or another text with the text of each reference. Raises as `substitute` does."""
    return _text(text, scope, _Room(bytes_max))


def _text(text: str, scope: Scope, room: _Room) -> str:
    if "$(" not in text:
        room.take(len(text))
        return text

    def put(found: "re.Match[str]") -> str:
        if found[1]:
            return found[0][1:]
        try:
            reference = parse(found[2])
        except Malformed:
            reference = None
        if reference is None:
            return found[0]
        said = text_of(look_up(reference, scope))
        room.take(len(said))
        return said

    room.take(len(text))
    return WORDS.sub(put, text)


def text_of(value: Any) -> str:
    """How a value stands among text: text as it is, everything else as JSON."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def arguments(command: Sequence[str], scope: Scope, bytes_max: int = VALUES_BYTES_MAX) -> list[str]:
    """A command's words; one that is a whole list stands for its items."""
    room = _Room(bytes_max)
    words: list[str] = []
    for word in command:
        reference = _whole(word)
        value = look_up(reference, scope) if reference is not None else None
        if reference is not None and isinstance(value, list | tuple):
            room.take_value(reference, value)
            words += map(text_of, value)
        else:
            words.append(_text(word, scope, room))
    return words
