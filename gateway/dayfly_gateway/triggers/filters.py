"""Which events a trigger is for: expressions in CEL over the CloudEvent, called `event`.

An expression has a size (`TriggerSpec.filter`), its regular expressions are RE2's, and the library
ends an evaluation after 10,000 steps of iteration. What makes new values of old ones is left out of
CEL (`+`, `map`, `filter`): each `.map(b, b + b)` doubles what it is given, and a line of them has
no room in any memory. What is compared, searched or counted stays as large as the event is; and
as each step may search all of it, the data of a long event is not shown, and no regular expression
is tried for each of many.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

from cel_expr_python import cel

from dayfly_pool.errors import BadInput

DATA_BYTES_MAX: Final = 64 * 1024
"""An event that is longer is shown to filters without its data."""

_EACH: Final = re.compile(r"\.\s*(all|exists)\s*\(")
_PATTERN: Final = re.compile(r"\bmatches\s*\(")
_SUBSET: Final = """
name: dayfly
stdlib:
  exclude_macros: [map, filter, exists_one]
  exclude_functions:
    - name: "_+_"
    - name: "bytes"
"""
_ENVIRONMENT: Final = cel.NewEnv(
    config=cel.NewEnvConfigFromYaml(_SUBSET),
    variables={"event": cel.Type.Map(cel.Type.STRING, cel.Type.DYN)},
)


class FilterFailed(Exception):
    """The expression has no value for this event: a field is missing, or of another type."""


class Filter:
    """A compiled expression. Raises `BadInput` when it is none."""

    def __init__(self, text: str) -> None:
        if _EACH.search(text) and _PATTERN.search(text):
            raise BadInput("filter: matches() is not for each of many: leave out all() or exists()")
        try:
            self._expression = _ENVIRONMENT.compile(text) if text else None
        except Exception as error:  # RuntimeError, and what the binding has for odd strings
            raise BadInput(f"filter: {str(error)[:500]}") from None

    def matches(self, event: Mapping[str, Any], size: int) -> bool:
        """Whether the event, of *size* bytes, is meant. Raises `FilterFailed`."""
        if self._expression is None:
            return True
        shown = dict(event)
        if size > DATA_BYTES_MAX:
            shown.pop("data", None)
            shown.pop("data_base64", None)
        try:
            value = self._expression.eval(data={"event": shown})
            is_bool = value.type() == cel.Type.BOOL
            found = value.value()
        except Exception as error:  # likewise
            raise FilterFailed(str(error)[:500]) from None
        if not is_bool:
            raise FilterFailed(f"it is {str(found)[:200]!r} and neither true nor false")
        return bool(found)
