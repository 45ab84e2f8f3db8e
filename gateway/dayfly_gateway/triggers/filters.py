"""Which events a trigger is for: expressions in CEL over the CloudEvent, called `event`.

An expression has a size (`TriggerSpec.filter`), its regular expressions are RE2's, and the library
ends an evaluation after 10,000 steps of iteration. What makes new values of old ones is left out of
CEL (`+`, `map`, `filter`): each `.map(b, b + b)` doubles what it is given, and a line of them has
no room in any memory. What is compared, searched or counted stays as large as the event is.
"""

from collections.abc import Mapping
from typing import Any, Final

from cel_expr_python import cel

from dayfly_pool.errors import BadInput

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
        try:
            self._expression = _ENVIRONMENT.compile(text) if text else None
        except Exception as error:  # RuntimeError, and what the binding has for odd strings
            raise BadInput(f"filter: {str(error)[:500]}") from None

    def matches(self, event: Mapping[str, Any]) -> bool:
        """Whether the event is meant. Raises `FilterFailed`."""
        if self._expression is None:
            return True
        try:
            value = self._expression.eval(data={"event": dict(event)})
            is_bool = value.type() == cel.Type.BOOL
            found = value.value()
        except Exception as error:  # likewise
            raise FilterFailed(str(error)[:500]) from None
        if not is_bool:
            raise FilterFailed(f"it is {str(found)[:200]!r} and neither true nor false")
        return bool(found)
