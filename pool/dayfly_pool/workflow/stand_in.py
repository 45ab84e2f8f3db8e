"""STAND-IN, to be deleted at the merge: what `references` and `graph` are going to say.

The engine and `plan` ask for these names and nothing else:

    Unresolved, needs, bind, substitute, by_reference, text, seconds
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import msgspec

from dayfly_pool.errors import BadInput
from dayfly_pool.workflow.facts import LARGE
from dayfly_pool.workflow.model import Param, Step

Lookup = Callable[[str], Any]
"""What the words between `$(` and `)` stand for. Raises `KeyError` if they are not known."""

_REFERENCE: Final = re.compile(r"\$\(([A-Za-z_][^()\s]{0,511})\)")
_CEL_STEP: Final = re.compile(r"""steps(?:\.([A-Za-z_]\w*)|\[["']([a-z0-9-]+)["']\])(?:\.(\w+))?""")
_PART: Final = re.compile(r"([\d.]+)(ms|h|m|s|d)")
_SECONDS: Final = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3}


class Unresolved(BadInput):
    """A step left no such result.

    Declare it, write it, or guard the step that uses it with `when`.
    """

    def __init__(self, step: str, what: str) -> None:
        super().__init__(f"step {step!r} left no {what}")
        self.step = step


def seconds(duration: str | float) -> float:
    """A duration in seconds."""
    if isinstance(duration, str):
        return sum(float(n) * _SECONDS[unit] for n, unit in _PART.findall(duration))
    return float(duration)


def needs(step: Step) -> tuple[set[str], set[str]]:
    """The steps whose results or outputs it uses; those that it only comes after."""
    data: set[str] = set()
    order = set(step.run_after)
    values: list[Any] = [step.params, step.inputs, step.env, step.script, step.command]
    values += [step.matrix and [step.matrix.params, step.matrix.include]]
    for condition in step.when:
        values += [condition.input, condition.values]
        for dotted, quoted, what in _CEL_STEP.findall(condition.cel):
            (order if what == "status" else data).add(dotted or quoted)
    for path in _mentioned(values):
        match path.split("."):
            case ["steps", name, "results" | "outputs", *_]:
                data.add(name)
            case ["steps", name, *_]:
                order.add(name)
    return data, order


def _mentioned(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if "$(" in value:
            yield from _REFERENCE.findall(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _mentioned(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _mentioned(item)


def substitute(value: Any, lookup: Lookup, *, leave_unknown: bool = False) -> Any:
    """*value* with what its references stand for. Raises `Unresolved`, `BadInput`."""
    if isinstance(value, str):
        return _substituted(value, lookup, leave_unknown) if "$(" in value else value
    if isinstance(value, Mapping):
        return {k: substitute(v, lookup, leave_unknown=leave_unknown) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [substitute(item, lookup, leave_unknown=leave_unknown) for item in value]
    return value


def _substituted(value: str, lookup: Lookup, leave_unknown: bool) -> Any:
    def found(match: re.Match[str]) -> Any:
        try:
            return lookup(match[1].removesuffix("[*]"))
        except KeyError:
            if leave_unknown:
                return match[0]
            raise BadInput(f"{match[0]} is not known: correct its name") from None

    if whole := _REFERENCE.fullmatch(value):
        return found(whole)
    return _REFERENCE.sub(lambda match: text(found(match)), value)


def by_reference(value: Any) -> bool:
    """Whether it stands for a value that is too large."""
    return isinstance(value, Mapping) and LARGE in value


def text(value: Any) -> str:
    """As it is written among other text. Raises `BadInput`."""
    if isinstance(value, str):
        return value
    if by_reference(value):
        raise BadInput("a value this large cannot be in text or in a condition: use it whole")
    return msgspec.json.encode(value).decode()


def bind(params: Iterable[Param], given: Mapping[str, Any]) -> dict[str, Any]:
    """What *params* are, with defaults. Raises `BadInput` for what is missing or not allowed."""
    bound = dict(given)
    for param in params:
        if param.name not in bound:
            if param.is_required and param.default is None:
                raise BadInput(f"parameter {param.name!r} is not given, and has no default")
            bound[param.name] = param.default
        if param.enum and bound[param.name] not in param.enum:
            raise BadInput(
                f"parameter {param.name!r} is none of {', '.join(map(text, param.enum))}"
            )
    return bound
