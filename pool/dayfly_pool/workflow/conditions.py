"""Whether a step is to run: Tekton's `when`, with its three words or in CEL.

CEL sees `params` and `steps` as maps: `steps.score.results.result > 0.5`, and `steps["two-words"]`
for names with dashes; what became of all steps is `$(steps.status)`. Tekton puts references into
the expression's text; here a reference becomes the path of its value, so what the value says is
never read as CEL. What makes new values of old ones is left out of CEL, as in filters of triggers:
it has no room in any memory.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

from dayfly_pool.errors import BadInput
from dayfly_pool.workflow.model import Condition
from dayfly_pool.workflow.references import (
    Reference,
    Scope,
    look_up,
    parse,
    substitute,
    text_of,
)

_STRING: Final = (
    r"""[rRbB]?(?:\"\"\"(?s:.*?)(?:\"\"\"|\Z)|'{3}(?s:.*?)(?:'{3}|\Z)"""
    r"""|"(?:\\.|[^"\\\n])*+"?|'(?:\\.|[^'\\\n])*+'?)"""
)
"""A string of CEL; one that does not end is one too, so that nobody looks for its end twice."""

_NAMED: Final = r"""\s*\.\s*[A-Za-z_]\w*+(?!\s*\()|\s*\[\s*(?:"[^"\\\n]*"|'[^'\\\n]*'|\d+)\s*\]"""
_TOKENS: Final = re.compile(
    rf"(?P<string>{_STRING})|(?P<dollar>\$\([^()$\s]{{1,500}}\))"
    rf"|(?<![\w.])(?P<root>params|steps)(?P<path>(?:{_NAMED})*)(?!\w)"
)
_PIECE: Final = re.compile(r"""([A-Za-z_]\w*)|"([^"]*)"|'([^']*)'|(\d+)""")
_WHOLE: Final = re.compile(r"""(["'])\$\(([^()$\s]{1,500})\)\1\Z""")
_SUBSET: Final = """
name: dayfly
stdlib:
  exclude_macros: [map, filter, exists_one]
  exclude_functions:
    - name: "_+_"
    - name: "bytes"
"""
_EACH: Final = re.compile(r"\.\s*(all|exists)\s*\(")
_PATTERN: Final = re.compile(r"\bmatches\s*\(")


SIZE_MAX: Final = 128 << 10
"""Of what is compared, in characters; it is the server that does."""

VALUE_SIZE: Final = 8
"""As so many characters a value counts that is no text."""


class Expression(NamedTuple):
    """CEL, and what it takes."""

    text: str
    references: tuple[Reference, ...]


@lru_cache(maxsize=1024)
def expression(cel: str) -> Expression:
    """The CEL that *cel* is when its references are paths, and these. Raises `BadInput`."""
    taken: list[Reference] = []

    def put(found: "re.Match[str]") -> str:
        if found["root"]:
            taken.append(_of_a_path(found["root"], found["path"]))
            return found[0]
        if text := found["string"]:
            quoted = _WHOLE.match(text)
            if quoted is None:
                if "$(" in text and any(map(parse, re.findall(r"\$\(([^()$\s]+)\)", text))):
                    raise BadInput(f"{text[:80]}: in CEL a reference is alone in its quotes")
                return text
            return f"string({path(quoted[2])})"
        return path(found["dollar"][2:-1])

    def path(inner: str) -> str:
        reference = parse(inner)
        if reference is None or reference.root not in ("params", "steps"):
            raise BadInput(f"$({inner[:80]}): when in CEL sees params and steps")
        taken.append(reference)
        if not reference.name:
            return "status"
        pieces = [reference.name]
        if reference.root == "steps":
            pieces += [reference.field, *([reference.key] if reference.key else [])]
        return reference.root + "".join(map(_index, [*pieces, *reference.tail]))

    text = _TOKENS.sub(put, cel)
    return Expression(text, tuple(dict.fromkeys(taken)))


def _index(part: str | int) -> str:
    return f"[{part}]" if isinstance(part, int) else f'["{part}"]'


def _of_a_path(root: str, path: str) -> Reference:
    pieces = [word or one or two or digits for word, one, two, digits in _PIECE.findall(path)]
    if root == "params" and pieces:
        return Reference("params", pieces[0])
    if root == "steps" and len(pieces) > 1 and pieces[1] == "status":
        return Reference("steps", pieces[0], "status")
    if root == "steps" and len(pieces) > 2 and pieces[1] in ("results", "outputs"):
        return Reference("steps", pieces[0], pieces[1], pieces[2])
    raise BadInput(
        f"{(root + path)[:80]!r} is none of params.NAME, steps.NAME.results.RESULT, "
        'steps.NAME.outputs.OUTPUT and steps.NAME.status (steps["NAME"] for names with dashes)'
    )


@lru_cache(maxsize=1)
def _environment() -> Any:
    from cel_expr_python import cel  # costs what only conditions in CEL should

    return cel.NewEnv(
        config=cel.NewEnvConfigFromYaml(_SUBSET),
        variables={
            "params": cel.Type.Map(cel.Type.STRING, cel.Type.DYN),
            "steps": cel.Type.Map(cel.Type.STRING, cel.Type.DYN),
            "status": cel.Type.STRING,
        },
    )


@lru_cache(maxsize=1024)
def _compiled(text: str) -> Any:
    if _EACH.search(text) and _PATTERN.search(text):
        raise BadInput("when: matches() is not for each of many: leave out all() or exists()")
    try:
        return _environment().compile(text)
    except Exception as error:  # RuntimeError, and what the binding has for odd strings
        raise BadInput(f"when: {' '.join(str(error).split())[:500]}") from None


def check_cel(cel: str) -> None:
    """Raise `BadInput` if it is no CEL."""
    _compiled(expression(cel).text)


def holds(conditions: Sequence[Condition], scope: Scope) -> bool:
    """Whether all of *conditions* are true.

    Raises `Unresolved` if one takes what is not there, `BadInput` if one is neither true nor false.
    """
    return all(_holds(condition, scope) for condition in conditions)


def _holds(condition: Condition, scope: Scope) -> bool:
    if condition.cel:
        return _evaluated(condition.cel, scope)
    given = substitute(condition.input, scope)
    values = substitute(condition.values, scope)
    several = values if isinstance(values, list | tuple) else [values]
    _check_size([given, several])
    is_among = _is_among(given, several)
    return is_among if condition.operator == "in" else not is_among


def _is_among(one: Any, several: Sequence[Any]) -> bool:
    """As values, or as texts: Tekton knows texts only."""
    text, is_number = text_of(one), type(one) in (int, float)
    return any(
        text_of(each) == text or (is_number and type(each) in (int, float) and bool(each == one))
        for each in several
    )


def _check_size(value: Any) -> None:
    """Raise `BadInput` for what takes the server long to compare; looks at no more of it."""
    todo, left = [value], SIZE_MAX
    while todo:
        item = todo.pop()
        left -= len(item) if isinstance(item, str | list | tuple | dict) else VALUE_SIZE
        if left < 0:
            raise BadInput(
                f"when: over {SIZE_MAX >> 10} KiB to compare: have a step compare it, and take"
                " its result"
            )
        if isinstance(item, dict):
            todo += [*item, *item.values()]
        elif isinstance(item, list | tuple):
            todo += item


def _evaluated(text: str, scope: Scope) -> bool:
    expr = expression(text)
    compiled, seen = _compiled(expr.text), _seen(expr.references, scope)
    try:
        found = compiled.eval(data=seen).value()
    except Exception as error:  # likewise
        raise BadInput(f"when {text[:200]!r}: {str(error)[:500]}") from None
    if not isinstance(found, bool):
        raise BadInput(f"when {text[:200]!r} is {str(found)[:200]!r}, neither true nor false")
    return found


def _seen(references: Sequence[Reference], scope: Scope) -> dict[str, Any]:
    """The parts of *scope* that are meant, and no more of it."""
    params: dict[str, Any] = {}
    steps: dict[str, dict[str, Any]] = {}
    status = ""
    for reference in references:
        plain = reference._replace(tail=(), is_star=False)
        value = look_up(plain, scope)
        if not reference.name:
            status = value
        elif reference.root == "params":
            params[reference.name] = value
        elif reference.field == "status":
            steps.setdefault(reference.name, {})["status"] = value
        else:
            held = steps.setdefault(reference.name, {}).setdefault(reference.field, {})
            held[reference.key] = value
    return {"params": params, "steps": steps, "status": status}
