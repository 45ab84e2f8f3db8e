"""What parameters and results may be: JSON, of a type, of a depth, of a size."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from dayfly_pool.errors import BadInput
from dayfly_pool.workflow.model import Param, ParamType

DEPTH_MAX: Final = 32
VALUES_MAX: Final = 1_000_000
"""Values within one; YAML's aliases can make very many of little text."""

VALUES_BYTES_MAX: Final = 1 << 20
"""Of what one step is given, or a run: what is larger is handed over as an output."""

_TYPES: Final[Mapping[type, ParamType]] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "array",
    tuple: "array",
    dict: "object",
}


class BadDefinition(BadInput):
    """What is declared cannot be run.

    Nothing was changed. Correct what the detail names and apply it again.
    """

    def __init__(self, what: str, path: str = "$") -> None:
        place = path.removeprefix("$").removeprefix(".")
        super().__init__(f"{place}: {what}" if place else what)
        self.what, self.path = what, path
        """*path* is where, from the root of what was given: `$.steps[3].params.url`."""


def type_of(value: Any) -> ParamType | None:
    """The type of a JSON value; None for null and for what is no JSON."""
    return _TYPES.get(type(value))


def is_fit(wanted: ParamType, given: ParamType | None) -> bool:
    """Whether a value of one type goes where another is asked for; None is not known."""
    if given is None or wanted == given or "any" in (wanted, given):
        return True
    return (wanted, given) == ("number", "integer")


def unfit(param: Param, value: Any) -> str:
    """Why *value* is not for *param*; empty if it is."""
    if value is None:
        return "" if param.type == "any" or param.default is None else f"null is no {param.type}"
    found = type_of(value)
    if param.type == "artifact":
        return "" if found in ("object", "string") else f"an artifact is wanted, this is {found}"
    if found is None or not is_fit(param.type, found):
        hint = ": put it in quotes" if param.type == "string" else ""
        return f"{param.type} is wanted, this is {found or type(value).__name__}{hint}"
    if param.enum and value not in param.enum:
        return f"{value!r:.100} is none of {', '.join(map(repr, param.enum))[:500]}"
    if isinstance(value, dict) and param.properties:
        missing = [key for key in param.properties if key not in value]
        if missing and not isinstance(param.default, dict):
            return f"the object has no {missing[0]!r}"
    return ""


def check_json(value: Any, path: str) -> None:
    """Raise `BadDefinition` for what is no JSON, or nested too deeply. Nothing here recurses."""
    todo: list[tuple[Any, int]] = [(value, 1)]
    seen = 0
    while todo:
        item, depth = todo.pop()
        seen += 1
        if seen + len(todo) > VALUES_MAX:
            raise BadDefinition(f"over {VALUES_MAX} values: hand it over as an artifact", path)
        if depth > DEPTH_MAX:
            raise BadDefinition(f"values are nested at most {DEPTH_MAX} deep", path)
        if isinstance(item, str):
            _check_text(item, path)
        elif isinstance(item, dict):
            for key in item:
                if not isinstance(key, str):
                    raise BadDefinition(f"key {key!r:.80} is no text: put it in quotes", path)
                _check_text(key, path)
            todo += [(child, depth + 1) for child in item.values()]
        elif isinstance(item, list | tuple):
            todo += [(child, depth + 1) for child in item]
        elif isinstance(item, float) and not math.isfinite(item):
            raise BadDefinition("a number must be finite", path)
        elif isinstance(item, int) and not -(2**63) <= item < 2**64:
            raise BadDefinition("a whole number has at most 64 bits: put it in quotes", path)
        elif item is not None and not isinstance(item, int | float):
            raise BadDefinition(f"{type(item).__name__} is no JSON: put it in quotes", path)


def _check_text(text: str, path: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadDefinition("text holds half a character (a lone surrogate)", path) from None


def json_bytes(value: Any) -> int:
    """How long *value* is as JSON."""
    return len(msgspec.json.encode(value))


def bind(
    params: Sequence[Param], given: Mapping[str, Any], path: str = "$.params"
) -> dict[str, Any]:
    """All parameters with their values, from those that are *given* and the defaults.

    An object's default fills up what is given, as in Tekton. Raises `BadDefinition`.
    """
    known = {param.name for param in params}
    for name in given:
        if name not in known:
            hint = meant(name, known) if known else ": there are no parameters here"
            raise BadDefinition(f"there is no parameter {name!r}{hint}", path)
    bound: dict[str, Any] = {}
    for param in params:
        here = f"{path}.{param.name}"
        if param.name not in given:
            if param.default is msgspec.UNSET:
                raise BadDefinition(f"parameter {param.name!r} must be given", path)
            bound[param.name] = param.default
            continue
        value = given[param.name]
        check_json(value, here)
        if why := unfit(param, value):
            if param.type in ("array", "object") and isinstance(value, str):
                why += ": write it as JSON"
                why += f", as in {param.name}=[{value:.100}]" if param.type == "array" else ""
            raise BadDefinition(why, here)
        if isinstance(value, dict) and isinstance(param.default, dict):
            value = {**param.default, **value}
        bound[param.name] = value
    if json_bytes(bound) > VALUES_BYTES_MAX:
        raise BadDefinition(f"over {VALUES_BYTES_MAX} bytes: hand it over as an artifact", path)
    return bound


def meant(name: str, known: Iterable[str], plural: str = "there are") -> str:
    """What somebody who wrote *name* may have meant, as the end of a sentence."""
    some = sorted(known)[:1000]
    if close := difflib.get_close_matches(name[:63], some, 1):
        return f": did you mean {close[0]!r}?"
    if not some:
        return ": there is none"
    more = ", ..." if len(some) > 8 else ""
    return f"; {plural} {', '.join(some[:8])}{more}"
