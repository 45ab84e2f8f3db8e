"""What people see: tables that fit the terminal, progress, timings. Colours only on a terminal."""

import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import click

from dayfly_gateway.client import printable

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.table import Table

    from dayfly_gateway.deploy import Progress

COLUMN_MIN: Final = 8
BAR_BYTES_MIN: Final = 1 << 20
"""Smaller uploads are over before a bar is drawn."""
STREAM_COLOURS: Final = {"stderr": "red", "platform": "yellow"}
PHASE_COLOURS: Final = {
    "busy": "green",
    "loading": "cyan",
    "idle": "blue",
    "generic": "white",
    "starting": "yellow",
    "dead": "red",
}
START_MEANS: Final = {
    "warm": "it already held the function",
    "generic": "a generic sandbox was specialized",
    "forked": "forked from a zygote for this request",
    "created": "no generic sandbox was ready",
}


def width() -> int | None:
    """The terminal's width; None when stdout is none, and nothing need be cut."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def bold(text: str) -> str:
    """*text* in bold, where it is shown in colours at all."""
    return click.style(text, bold=True)


def line(text: str) -> None:
    """One line of strangers' text."""
    click.echo(printable(text).replace("\n", " "))


def heading(text: str) -> None:
    """What comes below."""
    click.echo(f"\n{bold(text)}")


# ---- tables -------------------------------------------------------------------------------------


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]], err: bool = False) -> None:
    """Print columns; the last one wraps when the terminal is too narrow."""
    for line in lines_of(headers, [[printable(str(c)) for c in row] for row in rows], width()):
        click.echo(line, err=err)


def lines_of(
    headers: Sequence[str], rows: Sequence[Sequence[str]], most: int | None
) -> Iterator[str]:
    """The lines of a table, the header first, none longer than *most* if that can be."""
    sizes = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    if most is not None:
        sizes = fitted(sizes, most)
    for number, row in enumerate([headers, *rows]):
        *cells, last = row
        padded = [cut(cell, size).ljust(size) for cell, size in zip(cells, sizes, strict=False)]
        indent = sum(sizes[:-1]) + 2 * len(cells)
        wrapped = textwrap.wrap(last, sizes[-1], break_on_hyphens=False) if most else [last]
        first = "  ".join([*padded, wrapped[0] if wrapped else ""]).rstrip()
        yield bold(first) if number == 0 else first
        yield from (" " * indent + line for line in wrapped[1:])


def fitted(sizes: Sequence[int], most: int) -> list[int]:
    """Column widths that fit into *most*: the widest gives way first."""
    fit = list(sizes)
    while sum(fit) + 2 * (len(fit) - 1) > most and max(fit) > COLUMN_MIN:
        over = sum(fit) + 2 * (len(fit) - 1) - most
        widest = fit.index(max(fit))
        second = max([size for n, size in enumerate(fit) if n != widest], default=0)
        fit[widest] = max(COLUMN_MIN, min(fit[widest] - 1, max(fit[widest] - over, second)))
    return fit


def cut(text: str, size: int) -> str:
    """*text* in at most *size* characters."""
    return text if len(text) <= size else text[: size - 1] + "…"


def functions(views: Sequence[Mapping[str, Any]]) -> None:
    """`dayfly list`."""
    headers = ("NAMESPACE", "NAME", "VERSION", "SANDBOXES", "BUSY", "UPDATED", "URL")
    rows = [
        (
            *(view["metadata"][key] for key in ("namespace", "name")),
            *(view["status"][key] for key in ("version", "sandboxes", "busy")),
            when(view["status"]["updated"]),
            view["status"]["url"] if "failure" not in view["status"] else failing(view),
        )
        for view in views
    ]
    table(headers, rows)


def failing(view: Mapping[str, Any]) -> str:
    """Why the function cannot be loaded."""
    failure = view["status"]["failure"]
    return f"{failure['kind']}: {failure['message']}"


def environments(views: Sequence[Mapping[str, Any]]) -> None:
    """`dayfly list environments`."""
    rows = [
        (
            *(view["metadata"][key] for key in ("namespace", "name")),
            view["status"]["digest"][:12],
            " ".join(view["spec"]["preload"]),
            " ".join(view["spec"]["requirements"].split()),
        )
        for view in views
    ]
    table(("NAMESPACE", "NAME", "DIGEST", "PRELOAD", "REQUIREMENTS"), rows)


def events(found: Sequence[Mapping[str, Any]]) -> None:
    """`dayfly events list`."""
    headers = ("ID", "FUNCTION", "STATE", "ATTEMPTS", "ACCEPTED")
    names = ("id", "function", "state", "attempts", "acceptedAt")
    table(headers, [[event[name] for name in names] for event in found])


def secrets(found: Sequence[Mapping[str, Any]]) -> None:
    """`dayfly secret list`."""
    table(("NAMESPACE", "NAME"), [[each["namespace"], each["name"]] for each in found])


PLACES: Final = (
    "schedule",
    "subject",
    "stream",
    "queue",
    "topic",
    "table",
    "channel",
    "path",
    "scheme",
)
"""Which field of a trigger's source says best where it listens."""


def listens_to(view: Mapping[str, Any]) -> str:
    """A trigger's source, and where in it: `nats orders`."""
    source = view["status"]["source"]
    declared = view["spec"][source]
    where = next((str(declared[key]) for key in PLACES if declared.get(key)), "")
    return f"{source} {where}".rstrip()


def triggers(views: Sequence[Mapping[str, Any]]) -> None:
    """`dayfly trigger list`."""
    headers = ("NAMESPACE", "NAME", "FUNCTION", "SOURCE", "EVENTS", "LAG", "STATE")
    rows = []
    for view in views:
        metadata, spec, status = view["metadata"], view["spec"], view["status"]
        if status["source"] == "cron":
            number = status["fired"]
            state = f"next {status['next']}" if "next" in status else "never fires"
        else:
            number = status.get("fetched", "")
            state = "listens" if status.get("up", True) else "does not listen"
        if spec["paused"]:
            state = "paused"
        names = (metadata["namespace"], metadata["name"], spec["function"])
        lag = status.get("lag")
        row = (listens_to(view), number, "" if lag is None else lag)
        rows.append((*names, *row, status.get("lastError") or state))
    table(headers, rows)


def described(view: Mapping[str, Any]) -> None:
    """`dayfly describe`: every field on its line, nested ones with dots."""
    rows = [(name, value) for name, value in _flat("", view) if value not in ("", None)]
    size = max(len(name) for name, _ in rows)
    for name, value in rows:
        shown = when(value) if name == "status.updated" else str(value)
        for number, line in enumerate(printable(shown).splitlines() or [""]):
            click.echo(f"{bold(name.ljust(size)) if not number else ' ' * size}  {line}")


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else key, inner)
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value):
            yield from _flat(f"{prefix}[{number}]", item)
    else:
        yield prefix, ", ".join(map(str, value)) if isinstance(value, list) else value


def when(timestamp: float) -> str:
    """A moment, in local time."""
    return datetime.fromtimestamp(timestamp).strftime("%Y-%m-%d %H:%M:%S")


# ---- invocations --------------------------------------------------------------------------------


def phases(server_timing: str) -> dict[str, float]:
    """Milliseconds by phase, from a Server-Timing header."""
    found = {}
    for part in server_timing.split(","):
        name, _, duration = part.strip().partition(";dur=")
        try:
            found[name] = float(duration)
        except ValueError:
            continue
    return found


def timing(start: str, took: Mapping[str, float], total_ms: float) -> None:
    """`invoke --timing`: where the time went, on stderr."""
    rows = [("start", start, START_MEANS.get(start, ""))]
    rows += [(name, f"{ms:.3f} ms", "") for name, ms in took.items()]
    rows += [("total", f"{total_ms:.3f} ms", "as seen here, with the way there and back")]
    for name, value, note in rows:
        click.echo(f"{bold(name.ljust(10))}  {value:>12}  {note}".rstrip(), err=True)


def log_line(line: Mapping[str, Any], label: str | None = None, size: int = 8) -> None:
    """One line of a log: its *label*, in *size* characters, tells whose it is.

    Without one the invocation does.
    """
    moment = datetime.fromtimestamp(line["time"]).strftime("%H:%M:%S.%f")[:-3]
    stream = str(line["stream"])
    colour = STREAM_COLOURS.get(stream)
    whose = printable(str(line["invocation"])[:8] if label is None else label) or "-"
    head = click.style(f"{moment} {whose:{size}} {stream:8}", dim=True)
    click.echo(f"{head} {click.style(printable(str(line['text'])), fg=colour)}")


# ---- progress -----------------------------------------------------------------------------------


class Lines:
    """Progress where no terminal is: the server's sentences, a line each, on stderr."""

    def uploaded(self, done: int, total: int) -> None:
        """Nothing: there is no line to draw over."""

    def building(self, environment: str, text: str) -> None:
        """One line."""
        click.echo(f"environment {environment}: {printable(text)}", err=True)


class Drawn:
    """Progress on a terminal, drawn over itself."""

    def __init__(self, bars: "Bars") -> None:
        self._bars = bars
        self._upload = bars.add_task("uploading", total=1, visible=False)
        self._build = bars.add_task("building", total=None, visible=False)

    def uploaded(self, done: int, total: int) -> None:
        """Move the bar."""
        self._bars.update(self._upload, completed=done, total=total, visible=total > BAR_BYTES_MIN)

    def building(self, environment: str, text: str) -> None:
        """Say what is being done beside a pulsing bar."""
        from rich.markup import escape

        told = escape(printable(f"environment {environment}: {text}"))
        self._bars.update(self._build, description=told, visible=True)


@contextmanager
def progress() -> "Iterator[Progress]":
    """Something that shows how a deployment goes on, on stderr."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield Drawn(bars)


@contextmanager
def tasks(name: str) -> "Iterator[Callable[[Mapping[str, Any]], None]]":
    """What shows how far a job is, given its status: a bar on a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield lambda status: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(name, total=None, told="")

        def moved(status: Mapping[str, Any]) -> None:
            told = f"{status['running']} running"
            if status["failed"]:
                told += f", {status['failed']} failed"
            if status["state"] in ("Pending", "Suspended"):
                told = status["state"].lower()
            done = status["succeeded"] + status["failed"]
            bars.update(bar, total=status["total"], completed=done, told=told)

        yield moved


STATE_COLOURS: Final = {
    "Complete": "green",
    "Completed": "green",
    "Succeeded": "green",
    "succeeded": "green",
    "Failed": "red",
    "failed": "red",
    "TimedOut": "red",
    "Cancelled": "yellow",
    "cancelled": "yellow",
    "running": "cyan",
}


def state(text: str) -> str:
    """A state in its colour."""
    return click.style(text, fg=STATE_COLOURS.get(text))


def took(status: Mapping[str, Any]) -> str:
    """How long something ran, or runs, in words."""
    if not status.get("startedAt"):
        return "-"
    started = datetime.fromisoformat(status["startedAt"])
    ended = status.get("endedAt")
    end = datetime.fromisoformat(ended) if ended else datetime.now(started.tzinfo)
    seconds = max(0.0, (end - started).total_seconds())
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


# ---- top ----------------------------------------------------------------------------------------

_ORDER: Final = {phase: number for number, phase in enumerate(PHASE_COLOURS)}
TOP_HEADERS: Final = ("SANDBOX", "PHASE", "FOR", "RUNNING", "MEMORY", "ENVIRONMENT", "FUNCTION")


def summary(pool: Mapping[str, Any]) -> str:
    """The pool in one line."""
    counts = ", ".join(f"{n} {phase}" for phase, n in pool["phases"].items()) or "no sandboxes"
    return (
        f"{counts} (limit {pool['sandboxesMax']}) | {pool['waiting']} waiting, "
        f"{pool['underWay']} under way, {pool['misses']} pool misses"
    )


def sandbox_rows(pool: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row a sandbox, those that work first; then the zygotes."""
    boxes = sorted(pool["sandboxes"], key=lambda b: (_ORDER.get(b["phase"], 9), b["forSeconds"]))
    return [
        (
            box["id"],
            box["phase"],
            f"{box['forSeconds']:.1f} s",
            str(box["running"]),
            f"{box['memoryBytes'] / (1 << 20):.1f} MiB" if box["memoryBytes"] else "-",
            f"{box['environment']}/{box['network']}",
            f"{box['function']} v{box['version']}" if box["function"] else "-",
        )
        for box in boxes
    ] + [
        (
            zygote["id"],
            "zygote" if zygote["isReady"] else "warming",
            f"{zygote['forSeconds']:.1f} s",
            "-",
            f"{zygote['memoryBytes'] / (1 << 20):.1f} MiB" if zygote["memoryBytes"] else "-",
            f"{zygote['environment']}/{zygote['network']}",
            f"{zygote['function'] or zygote['namespace']}, {zygote['forks']} forks",
        )
        for zygote in pool["zygotes"]
    ]


def top_once(pool: Mapping[str, Any]) -> None:
    """The pool, printed."""
    click.echo(summary(pool))
    if pool["sandboxes"] or pool["zygotes"]:
        table(TOP_HEADERS, sandbox_rows(pool))


def top_table(pool: Mapping[str, Any], rows_max: int) -> "Table":
    """The pool, drawn; rows that do not fit are counted."""
    from rich.table import Table
    from rich.text import Text

    rows = sandbox_rows(pool)
    hidden = len(rows) - rows_max
    caption = f"and {hidden} more" if hidden > 0 else None
    drawn = Table(title=summary(pool), caption=caption, box=None, title_justify="left")
    for header in TOP_HEADERS:
        is_number = header in ("FOR", "RUNNING", "MEMORY")
        drawn.add_column(header, justify="right" if is_number else "left", no_wrap=True)
    for row in rows[: max(rows_max, 0)]:
        colour = PHASE_COLOURS.get(row[1], "")
        drawn.add_row(*(Text(printable(cell), style=colour) for cell in row))
    return drawn


def is_colourless() -> bool:
    """Whether the user wants no colours anywhere (https://no-color.org)."""
    return bool(os.environ.get("NO_COLOR"))
