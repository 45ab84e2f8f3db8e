"""Host + path + method -> function. Pure: no I/O.

Every function answers at `/fn/NAME/...` (`/ns/NAMESPACE/fn/NAME/...` outside the default
namespace). Routes that functions declare come first; the more exact one wins: with a host before
without, then segment by segment a literal before `{one}` before `{rest+}`, then with methods
before without. The server's own paths (`OWN`) come before all of them, so no route may be there.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from dayfly_pool.errors import BadInput, FunctionNotFound, PlatformError
from dayfly_pool.models import FunctionId, Route, function_id

_PARAMETER: Final = re.compile(r"\{([A-Za-z_]\w*)(\+?)\}\Z")
DEFAULT_ROUTE: Final = "$default"
OWN: Final = ("invocations", "events", "hooks")
"""First segments below which the server itself answers, now or soon."""


class MethodNotAllowed(PlatformError):
    """The route exists, but not for this method.

    The Allow header names the methods that it takes.
    """

    status = 405


@dataclass(frozen=True, slots=True)
class Match:
    """What a request is for. *path* is what the function sees as its raw path."""

    function: FunctionId
    path: str
    route: str = DEFAULT_ROUTE
    parameters: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Node:
    literals: dict[str, "_Node"] = field(default_factory=dict)
    one: "_Node | None" = None
    ends: list["_End"] = field(default_factory=list)
    rests: list["_End"] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _End:
    function: FunctionId
    route: Route
    names: tuple[str, ...]

    def takes(self, method: str) -> bool:
        return not self.route.methods or method in self.route.methods


def path_of(id_: FunctionId) -> str:
    """Where a function answers by its name."""
    namespace, _, name = id_.partition("/")
    return f"/fn/{name}" if namespace == "default" else f"/ns/{namespace}/fn/{name}"


class Routes:
    """An immutable table of declared routes; build a new one when declarations change.

    Of two that clash the first one counts; *clashes* has the functions of the others, and why.
    """

    def __init__(self, declared: Iterable[tuple[FunctionId, Route]] = ()) -> None:
        self.clashes: set[tuple[FunctionId, str]] = set()
        self._hosts: dict[str, _Node] = {}
        taken: dict[tuple[str, str, str], FunctionId] = {}
        for function, route in declared:
            shape = re.sub(r"\{[^}]*?(\+?)\}", r"{\1}", route.path)
            places = [(route.host.lower(), shape, method) for method in route.methods or ("*",)]
            others = {taken[place] for place in places if place in taken} - {function}
            if others:
                where = f"{route.host}{route.path}"
                why = f"route {where} already belongs to {', '.join(sorted(others))}"
                self.clashes.add((function, why))
                continue
            taken |= dict.fromkeys(places, function)
            self._add(function, route)

    def _add(self, function: FunctionId, route: Route) -> None:
        node = self._hosts.setdefault(route.host.lower(), _Node())
        names: list[str] = []
        segments = route.path[1:].split("/")
        for at, segment in enumerate(segments):
            parameter = _PARAMETER.match(segment)
            if parameter is None:
                if "{" in segment or "}" in segment:
                    raise BadInput(f"route {route.path!r}: a parameter is a whole segment")
                node = node.literals.setdefault(segment, _Node())
                continue
            name, plus = parameter.groups()
            if name in names:
                raise BadInput(f"route {route.path!r} names {name!r} twice")
            names.append(name)
            if plus:
                if at != len(segments) - 1:
                    raise BadInput(f"route {route.path!r}: {{{name}+}} must come last")
                _insert(node.rests, _End(function, route, tuple(names)))
                return
            node.one = node = node.one or _Node()
        _insert(node.ends, _End(function, route, tuple(names)))

    def match(self, host: str, path: str, method: str) -> Match:
        """The function for a request. Raises `FunctionNotFound` or `MethodNotAllowed`."""
        allowed: set[str] = set()
        if self._hosts:
            name = host.lower().rpartition(":")[0] or host.lower()
            name = name if host.rpartition(":")[2].isdigit() else host.lower()
            segments = path[1:].split("/")
            for root in (self._hosts.get(name), self._hosts.get("")):
                found = root and _walk(root, segments, 0, [], method, allowed)
                if found:
                    end, values = found
                    methods = ",".join(end.route.methods) or "ANY"
                    parameters = dict(zip(end.names, values, strict=True))
                    return Match(end.function, path, f"{methods} {end.route.path}", parameters)
        match = by_name(path)
        if match is None:
            if allowed:
                methods = ", ".join(sorted(allowed))
                raise MethodNotAllowed(f"{method} is not among {methods}", allow=methods)
            raise FunctionNotFound(f"no route for {path[:200]!r}; functions are at /fn/NAME")
        return match


def checked(routes: Iterable[Route]) -> None:
    """Raises `BadInput` for a route that nobody could reach, as the server itself answers there.

    For those that are declared anew: what was declared before may stay, and is only out of reach.
    """
    for route in routes:
        first = route.path[1:].partition("/")[0]
        if first in OWN:
            raise BadInput(
                f"route {route.path!r}: /{first} is the server's own, with all below it:"
                " choose another path"
            )


def _walk(
    node: _Node, segments: list[str], at: int, values: list[str], method: str, allowed: set[str]
) -> tuple[_End, list[str]] | None:
    if at == len(segments):
        return _choose(node.ends, values, method, allowed)
    segment = segments[at]
    if segment in node.literals:
        below = node.literals[segment]
        if found := _walk(below, segments, at + 1, values, method, allowed):
            return found
    if node.one is not None and segment:
        inside = [*values, segment]
        if found := _walk(node.one, segments, at + 1, inside, method, allowed):
            return found
    return _choose(node.rests, [*values, "/".join(segments[at:])], method, allowed)


def _insert(ends: list[_End], end: _End) -> None:
    """Those that name their methods come before those that take any."""
    ends.append(end)
    ends.sort(key=lambda end: not end.route.methods)


def _choose(
    ends: list[_End], values: list[str], method: str, allowed: set[str]
) -> tuple[_End, list[str]] | None:
    for end in ends:
        if end.takes(method):
            return end, values
        allowed.update(end.route.methods)
    return None


def by_name(path: str) -> Match | None:
    """The function that `/fn/NAME/...` or `/ns/NAMESPACE/fn/NAME/...` names, if any."""
    namespace, rest = "default", path
    if path.startswith("/ns/"):
        namespace, slash, rest = path[4:].partition("/")
        rest = slash + rest
    if not rest.startswith("/fn/"):
        return None
    name, slash, below = rest[4:].partition("/")
    return Match(function_id(namespace, name), slash + below or "/") if name else None
