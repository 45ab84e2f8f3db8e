"""Which versions of a workspace a step starts from. Pure.

A step that succeeds leaves a version of each workspace that it has, made from those it started
from. What comes after several branches starts from the newest of each: from no version that
another one of them was made from. A chain of steps has one newest version, and nothing to merge.

Versions that follow one another without a branch are one *line*, so that a chain is crossed in one
step whatever its length. A search ends after `LINES_MAX` lines: in a graph as tangled as that, a
version may be named beside one that was made from it. Merging it again changes nothing.
"""

from collections.abc import Iterable
from typing import Final

from msgspec import Struct, field

LINES_MAX: Final = 200


class Versions(Struct):
    """All versions of one workspace in one run, and what each was made from."""

    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By version: its line, and its place there."""

    heads: list[tuple[str, ...]] = field(default_factory=list)
    """By line: what its first version was made from."""

    lengths: list[int] = field(default_factory=list)

    def add(self, version: str, made_from: tuple[str, ...]) -> None:
        """*version* is there; one of that name, from before the run was retried, is forgotten."""
        if len(made_from) == 1 and made_from[0] in self.places:
            line, place = self.places[made_from[0]]
            if self.lengths[line] == place + 1:
                self.places[version] = (line, place + 1)
                self.lengths[line] += 1
                return
        self.places[version] = (len(self.heads), 0)
        self.heads.append(made_from)
        self.lengths.append(1)

    def newest(self, versions: Iterable[str]) -> tuple[str, ...]:
        """Those of *versions*, in order, that no other of them was made from."""
        wanted = dict.fromkeys(versions)
        if len(wanted) < 2:
            return tuple(wanted)
        last: dict[int, int] = {}
        for line, place in map(self.places.__getitem__, wanted):
            last[line] = max(place, last.get(line, -1))
        held = dict.fromkeys(last, -1)
        """By line: the last version there that another line was made from."""

        todo, seen = list(last), set(last)
        while todo and len(seen) < LINES_MAX + len(last):
            for version in self.heads[todo.pop()]:
                line, place = self.places[version]
                if line in last:
                    held[line] = max(place, held[line])
                if line not in seen:
                    seen.add(line)
                    todo.append(line)
        return tuple(
            version
            for version, (line, place) in ((v, self.places[v]) for v in wanted)
            if place == last[line] and place > held[line]
        )


class Marks(Struct):
    """Sets of versions, by workspace: what is there at one moment of one branch.

    A mark is the number of a set. Most steps share those of others, and of these only one is kept.
    Mark 0 is the empty set.
    """

    sets: list[dict[str, tuple[str, ...]]] = field(default_factory=lambda: [{}])
    versions: dict[str, Versions] = field(default_factory=dict)

    def join(self, marks: Iterable[int]) -> int:
        """Where branches meet; their versions in the order of *marks*, whichever ended first."""
        different = [mark for mark in dict.fromkeys(marks) if mark]
        if len(different) < 2:
            return different[0] if different else 0
        joined: dict[str, dict[str, None]] = {}
        for mark in different:
            for workspace, versions in self.sets[mark].items():
                joined.setdefault(workspace, {}).update(dict.fromkeys(versions))
        newest = {
            workspace: self.versions[workspace].newest(versions)
            for workspace, versions in joined.items()
        }
        for mark in different:
            if self.sets[mark] == newest:
                return mark
        return self._add(newest)

    def leave(self, mark: int, version: str, workspaces: Iterable[str]) -> int:
        """A step that started from *mark* left a *version* of each of *workspaces*."""
        there = dict(self.sets[mark])
        for workspace in workspaces:
            versions = self.versions.setdefault(workspace, Versions())
            versions.add(version, there.get(workspace, ()))
            there[workspace] = (version,)
        return self._add(there)

    def _add(self, versions: dict[str, tuple[str, ...]]) -> int:
        self.sets.append(versions)
        return len(self.sets) - 1
