"""What branches changed in a workspace, and what comes of it when they join. Pure: no I/O.

A layer holds what a step changed in what lay below it, path by path. Layers put on top of each
other are the same as one layer (`stacked`), and branches whose changes do not overlap can be put
on top of each other in any order: so a join is a check (`conflicts`) and then a stack.

Two branches conflict where one changed a path that the other changed too, or that lies below what
the other removed or replaced. They agree where both removed a path, or both have the same folder.
"""

import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, Literal

from msgspec import Struct

Kind = Literal["file", "folder", "through", "replaced", "removed"]
"""A `file` is anything that is not a folder, put there whatever was there before. A `folder` is
new, or has another mode; one that is `through` is as it was, and only holds changes. What was in
a folder before is not in one that is `replaced`. What is `removed` was there before."""

Below = Callable[[str], int | None]
"""What `st_mode` has for a path in what lies below a layer; None where nothing is."""

_CLAIMS_ALL_BELOW: Final = ("file", "replaced", "removed")


class Change(Struct, frozen=True, array_like=True):
    """One path of a layer. *mode* is the permissions of a folder; *layer* says in which of several
    layers its content is."""

    path: str
    kind: Kind
    mode: int = 0
    layer: int = 0


class Conflict(Struct, frozen=True):
    """*path* was changed by each of these *branches* (numbers), or is below what one removed."""

    path: str
    branches: tuple[int, ...]


def normal(changes: Iterable[Change], below: Below) -> list[Change]:
    """The same layer, saying only what differs from what is *below* it; sorted by path.

    *changes* hold every folder on the way to each change. An overlay marks new folders as replaced,
    leaves a whiteout for what was made and removed, and copies folders that nothing is changed in.
    """
    kept: list[Change] = []
    hides: set[str] = set()
    """Folders in which nothing of what is below can be seen."""

    for change in sorted(changes, key=lambda change: change.path):
        parent = change.path.rpartition("/")[0]
        found = None if parent in hides else below(change.path)
        kind = change.kind
        if kind == "removed" and found is None:
            continue
        if kind == "replaced" and found is None:
            kind = "folder"
        if kind in ("folder", "through"):
            is_same = found is not None and stat.S_IMODE(found) == change.mode
            kind = "through" if is_same else "folder"
            if found is not None and not stat.S_ISDIR(found):
                kind = "replaced"
        if kind == "replaced" or parent in hides or found is None:
            hides.add(change.path)
        kept.append(Change(change.path, kind, change.mode, change.layer))
    needed: set[str] = set()
    for change in reversed(kept):
        if change.kind != "through" or change.path in needed:
            needed |= {change.path, change.path.rpartition("/")[0]}
    return [change for change in kept if change.path in needed]


def conflicts(branches: Sequence[Iterable[Change]]) -> tuple[Conflict, ...]:
    """Every path at which two branches do not go together, sorted. Each branch is `normal`."""
    claims: dict[str, list[tuple[int, Change]]] = {}
    for number, branch in enumerate(branches):
        for change in branch:
            if change.kind != "through":
                claims.setdefault(change.path, []).append((number, change))
    found: dict[str, set[int]] = {}
    for path, here in claims.items():
        above = [claim for folder in parents(path) for claim in claims.get(folder, ())]
        for number, change in here:
            for other, theirs in here:
                if other != number and not _agree(change, theirs):
                    found.setdefault(path, set()).update((number, other))
            for other, theirs in above:
                # also two removals: the uppermost layer would decide whether the folder is there
                if other != number and theirs.kind in _CLAIMS_ALL_BELOW:
                    found.setdefault(path, set()).update((number, other))
    return tuple(Conflict(path, tuple(sorted(found[path]))) for path in sorted(found))


def undisputed(branches: Sequence[Sequence[Change]]) -> list[list[Change]]:
    """The branches without what they disagree about: there nothing is changed, by any of them.

    What a branch did to a folder as a whole is left out with all that others did inside of it.
    """
    claims: dict[str, list[tuple[int, Change]]] = {}
    for number, branch in enumerate(branches):
        for change in branch:
            claims.setdefault(change.path, []).append((number, change))
    left_out = {conflict.path for conflict in conflicts(branches)}
    for path in list(left_out):
        whose = {number for number, _ in claims[path]}
        left_out |= {
            folder
            for folder in parents(path)
            for number, change in claims.get(folder, ())
            if change.kind in _CLAIMS_ALL_BELOW and whose != {number}
        }
    return [
        [c for c in branch if left_out.isdisjoint((c.path, *parents(c.path)))]
        for branch in branches
    ]


def _agree(one: Change, other: Change) -> bool:
    if one.kind == other.kind == "folder":
        return one.mode == other.mode
    return one.kind == other.kind == "removed"


def parents(path: str) -> Iterator[str]:
    """The folders that *path* is in, the innermost first; not the top."""
    while path := path.rpartition("/")[0]:
        yield path


class _Node:
    """A path of the stack, while it is made."""

    __slots__ = ("change", "children")

    def __init__(self, change: Change) -> None:
        self.change = change
        self.children: dict[str, _Node] = {}


def stacked(layers: Sequence[Iterable[Change]]) -> list[Change]:
    """One layer that is the same as these on top of each other, the last one uppermost.

    Each layer is `normal`; the result has to be made so. Its changes say which of *layers* has
    their content, and parents come before children.
    """
    top = _Node(Change("", "through"))
    for number, layer in enumerate(layers):
        for change in layer:
            *folders, name = change.path.split("/")
            node = top
            for folder in folders:
                node = node.children[folder]
            _put(node, name, Change(change.path, change.kind, change.mode, number))
    return list(_walk(top))


def _put(parent: _Node, name: str, change: Change) -> None:
    was = parent.children.get(name)
    if change.kind not in ("folder", "through") or was is None:
        parent.children[name] = _Node(change)
    elif was.change.kind in ("file", "removed"):  # a folder in its place: what was below stays gone
        parent.children[name] = _Node(Change(change.path, "replaced", change.mode, change.layer))
    elif change.kind == "folder":
        kind = was.change.kind if was.change.kind == "replaced" else "folder"
        was.change = Change(change.path, kind, change.mode, change.layer)


def _walk(top: _Node) -> Iterator[Change]:
    todo = [top]
    while todo:
        node = todo.pop()
        if node is not top:
            yield node.change
        todo += reversed(node.children.values())


def run_to_merge(sizes: Sequence[int], floor: int, free: int) -> int:
    """From which layer on to make one of all above it; `len(sizes)` when it is well as it is.

    *sizes* are numbers of changes, the lowest layer's first; those below *floor* stay. With more
    than *free* above it, a layer is merged with what is above while it is at most twice as large.
    So a chain of n steps has about log2(n) layers, and each change is moved about as often: the
    logarithmic method, Bentley and Saxe, J. Algorithms 1980.
    """
    if len(sizes) - floor <= free:
        return len(sizes)
    start, total = len(sizes) - 1, sizes[-1]
    while start > floor and (sizes[start - 1] <= 2 * total or start == len(sizes) - 1):
        start -= 1
        total += sizes[start]
    return start
