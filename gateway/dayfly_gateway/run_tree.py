"""A run's tree in the terminal: redrawn in place, or a line for each change where there is none.

What does not fit is summed up, what matters least first: instances of a matrix that are over or
wait, what is inside of what is over, steps that succeeded, steps that wait.
"""

import sys
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Final, NamedTuple

import click

from dayfly_gateway import show
from dayfly_gateway.client import printable
from dayfly_gateway.run_views import (
    MARKS,
    OVER,
    UNDER_WAY,
    RunView,
    StepView,
    counted,
    duration,
    duration_s,
    leaves,
    reason,
    size,
)

if TYPE_CHECKING:
    from rich.text import Text

COLOURS: Final = {
    "succeeded": "green",
    "failed": "red",
    "running": "cyan",
    "open": "cyan",
    "asked": "cyan",
    "stopping": "yellow",
    "delayed": "yellow",
    "expecting": "magenta",
    "cancelled": "yellow",
}
NOTABLE_SHOWN: Final = 3
"""Instances of each state that have a line of their own when not all have."""

LEVELS: Final = 5
"""How much is summed up: 0 is nothing."""

NODES_MAX: Final = 2000
"""A tree of more is never drawn whole, however long the terminal."""

LABEL_MIN: Final = 12


class Line(NamedTuple):
    """One line: its branches, mark and name to the left, what is said of it to the right."""

    branch: str
    mark: str
    name: str
    note: str
    state: str


def lines(view: RunView, height: int) -> list[Line]:
    """At most *height* lines of a run, the first one of itself."""
    root = view["tree"]
    first = Line("", MARKS.get(root["state"], "·"), f"{view['workflow']} {view['name']}",
                 _summary(view), root["state"])  # fmt: skip
    room = min(max(height - 1, 0), NODES_MAX)
    found: list[Line] = []
    for level in range(LEVELS):
        found = []
        for line in _below(root, "", level, view["now"]):
            found.append(line)
            if len(found) > room:
                break
        else:
            return [first, *found]
    return [first, *_most_telling(view, room)]


def _summary(view: RunView) -> str:
    root = view["tree"]
    parts = [view.get("status") or root["state"]]
    took = duration_s(root, view["now"])
    parts += [] if took is None else [duration(took)]
    parts += [f"{number} {state}" for state, number in counted(leaves(root)).items()]
    if moved := root.get("bytesMoved"):
        parts.append(f"{size(moved)} moved")
    return ", ".join(parts)


def _below(step: StepView, indent: str, level: int, now: float) -> Iterator[Line]:
    """Lines of what is in *step*, the more summed up the higher *level* is."""
    children = step.get("children", [])
    shown: list[StepView] = children
    hidden: list[StepView] = []
    if level >= 1 and step.get("of"):
        shown, hidden = _notable(children)
    elif level >= 3:
        quiet = ("succeeded", "skipped", "waiting", "not run")
        dull = quiet[:2] if level == 3 else quiet
        shown = [child for child in children if child["state"] not in dull]
        hidden = [child for child in children if child["state"] in dull]
    for number, child in enumerate(shown):
        is_last = number == len(shown) - 1 and not hidden
        yield _line(child, indent + ("└ " if is_last else "├ "), now)
        if level < 2 or child["state"] not in OVER or child["state"] == "failed":
            yield from _below(child, indent + ("  " if is_last else "│ "), level, now)
    if hidden:
        yield Line(f"{indent}└ ", "…", _counts(hidden), "", "")


def _notable(instances: list[StepView]) -> tuple[list[StepView], list[StepView]]:
    """Those that failed or are under way, a few of each; and the rest."""
    seen: dict[str, int] = {}
    shown: list[StepView] = []
    hidden: list[StepView] = []
    for each in instances:
        state = each["state"]
        seen[state] = seen.get(state, 0) + 1
        is_notable = state == "failed" or state in UNDER_WAY
        (shown if is_notable and seen[state] <= NOTABLE_SHOWN else hidden).append(each)
    return shown, hidden


def _most_telling(view: RunView, room: int) -> list[Line]:
    """Where not even the summed up tree fits: what failed, what runs, then what ended last."""
    found = list(leaves(view["tree"]))
    if room <= 0 or not found:
        return []
    order = {"failed": 0, "running": 1, "stopping": 1, "expecting": 2, "delayed": 2, "asked": 3}
    now = view["now"]
    found.sort(key=lambda leaf: (order.get(leaf["state"], 4), -leaf.get("endedAt", 0.0)))
    shown, hidden = found[: room - 1], found[room - 1 :]
    drawn = [_line(leaf, "├ ", now, leaf["key"]) for leaf in shown]
    return [*drawn, Line("└ ", "…", _counts(hidden), "", "")]


def _counts(steps: Iterable[StepView]) -> str:
    return ", ".join(f"{number} {state}" for state, number in counted(steps).items())


def _line(step: StepView, branch: str, now: float, name: str = "") -> Line:
    mark = MARKS.get(step["state"], "·")
    return Line(branch, mark, name or step["name"], note(step, now), step["state"])


def note(step: StepView, now: float) -> str:
    """What is said of a step: how long, how it was started, what was moved, what went wrong."""
    state = step["state"]
    if of := step.get("of", 0):
        counts = counted(step.get("children", []), of)
        said = [f"{number} {which}" for which, number in counts.items()]
    else:
        said = [] if state in ("succeeded", "running", "open", "waiting") else [state]
    took = None if step.get("wasCached") else duration_s(step, now)
    said += [] if took is None else [duration(took)]
    if step.get("wasCached"):
        said.append("cached")
    elif how := step.get("start"):
        said.append(how)
    if step.get("retries"):
        said.append(f"attempt {step.get('attempt', 1)}")
    if moved := step.get("bytesMoved"):
        said.append(size(moved))
    if why := reason(step):
        said.append(why)
    return ", ".join(said)


# ---- drawing ------------------------------------------------------------------------------------


def drawn(view: RunView, width: int, height: int) -> "Text":
    """The tree, in *width* columns and *height* lines at most."""
    from rich.cells import cell_len, set_cell_size
    from rich.text import Text

    found = lines(view, height)
    labels = [f"{line.branch}{line.mark} {_flat(line.name)}" for line in found]
    longest = max(map(cell_len, labels))
    room = min(longest, max(width // 2, LABEL_MIN), width)
    text = Text(no_wrap=True, end="")
    for number, (line, label) in enumerate(zip(found, labels, strict=True)):
        if number:
            text.append("\n")
        label = _fit(label, room)
        colour = COLOURS.get(line.state, "bright_black")
        head = len(line.branch)
        text.append(label[:head], style="bright_black")
        text.append(set_cell_size(label[head:], room - cell_len(label[:head])), style=colour)
        if width - room - 2 > 0:
            text.append(_fit(f"  {_flat(line.note)}", width - room))
    return text


def _fit(text: str, most: int) -> str:
    from rich.cells import cell_len, set_cell_size

    return text if cell_len(text) <= most else set_cell_size(text, most - 1) + "…"


def _flat(text: str) -> str:
    return " ".join(printable(text).split())


def watch(views: Iterable[RunView]) -> RunView | None:
    """Show a run as it goes on, until *views* end; the last one of them."""
    return _redrawn(views) if sys.stdout.isatty() else _told(views)


def _redrawn(views: Iterable[RunView]) -> RunView | None:
    from rich.console import Console
    from rich.live import Live

    console = Console()
    last = None
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        for last in views:
            width, height = console.size
            live.update(drawn(last, width - 1, height - 1), refresh=True)
    return last


def _told(views: Iterable[RunView]) -> RunView | None:
    """A line for each step that began or ended since the last view."""
    told: dict[str, tuple[str, int]] = {}
    last = None
    for last in views:
        for text in changes(told, last):
            click.echo(text)
    if last is not None:
        click.echo(f"{printable(last['name'])}: {_flat(_summary(last))}")
    return last


def changes(told: dict[str, tuple[str, int]], view: RunView) -> Iterator[str]:
    """What is new since *told*, which is brought up to date: a line a step, the oldest first."""
    fresh = []
    for leaf in leaves(view["tree"]):
        now = leaf["state"], leaf.get("attempt", 0)
        if now[0] in ("waiting", "asked", "not run") or told.get(leaf["key"]) == now:
            continue
        told[leaf["key"]] = now
        fresh.append((leaf.get("endedAt") or leaf.get("beganAt") or view["now"], leaf))
    for at, leaf in sorted(fresh, key=lambda each: each[0]):
        moment = datetime.fromtimestamp(at).strftime("%H:%M:%S")
        said = leaf["state"] if leaf["state"] in ("succeeded", "running") else ""
        words = _flat(", ".join(part for part in (said, note(leaf, view["now"])) if part))
        yield f"{moment} {MARKS.get(leaf['state'], '·')} {_flat(leaf['key'])}  {words}"


def print_once(view: RunView) -> None:
    """The tree as it is, for `show`: on a terminal in its width and in colours, else as text."""
    width = show.width() or 200
    text = drawn(view, width, NODES_MAX)
    if show.width() is None or show.is_colourless():
        for line in text.plain.split("\n"):
            click.echo(line.rstrip())
        return
    from rich.console import Console

    Console().print(text, soft_wrap=True)
