"""A run's timeline as one file: an SVG that needs nothing else, or a page around it.

No script, no font, no address: it can be mailed, archived, and opened from a disk. Light and dark
follow the reader's system; colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/),
and no state is said by colour alone. A row is a step; of a matrix with many instances, a few that
matter and how many ran at a time. The critical path is found by what was observed: from the step
that ended last, back to the one whose end had it asked for. Names and messages are strangers'.
"""

import html
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from dayfly_gateway.client import printable
from dayfly_gateway.run_views import (
    MARKS,
    OVER,
    RunView,
    StepView,
    began,
    counted,
    duration,
    duration_s,
    leaves,
    reason,
    size,
)

INSTANCES_SHOWN: Final = 12
"""A matrix with more is summed up."""

NOTABLE_SHOWN: Final = 5
ROWS_MAX: Final = 2000
BINS: Final = 200
TITLE_CHARACTERS_MAX: Final = 1000
PATH_SHOWN: Final = 8

# Geometry, in pixels.
WIDTH: Final = 1200.0
MARGIN: Final = 16.0
CHART_LEFT: Final = 340.0
CHART_RIGHT: Final = 960.0
NOTE_LEFT: Final = 972.0
HEAD: Final = 118.0
ROW: Final = 22.0
BAR: Final = 12.0
INDENT: Final = 14.0
CHARACTER: Final = 7.3
"""At most, of a monospaced font of 12 pixels."""

BAR_MIN: Final = 1.5
TICKS_MAX: Final = 8
NEAR_S: Final = 1e-6
_STEPS_S: Final = (
    *(base * 10.0**power for power in range(-6, 1) for base in (1, 2, 5)),
    *(10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 900.0, 1800.0),
    *(3600.0 * hours for hours in (1, 2, 3, 6, 12, 24, 48, 96, 168, 336, 720, 2400, 8760)),
)

PALETTES: Final = {
    "light": {
        "page": "#ffffff", "ink": "#1a1a1a", "dim": "#5c5c5c", "rule": "#d4d4d4",
        "succeeded": "#00694b", "running": "#0072b2", "failed": "#b83a00", "still": "#767676",
        "start": "#c78500", "path": "#a8327d",
    },
    "dark": {
        "page": "#16181b", "ink": "#ececec", "dim": "#a9a9a9", "rule": "#3f444b",
        "succeeded": "#1fbf8f", "running": "#56b4e9", "failed": "#ff8a4c", "still": "#9a9a9a",
        "start": "#e69f00", "path": "#e58cc5",
    },
}  # fmt: skip
_CLASSES: Final = {
    ".page": "fill: page",
    "text": "fill: ink",
    ".dim": "fill: dim",
    ".rule": "stroke: rule",
    ".band, .waiting": "fill: rule",
    ".delayed, .cancelled, .skipped, .expecting": "fill: still",
    ".starting": "fill: page; stroke: start",
    ".succeeded": "fill: succeeded",
    ".running, .open, .asked, .stopping": "fill: running",
    ".failed": "fill: failed",
    ".cached": "fill: page; stroke: succeeded",
    ".path": "fill: path",
}
_FONTS: Final = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"


def _coloured(palette: dict[str, str]) -> str:
    """Rules with the colours in them: what only shows SVG knows no custom properties."""
    rules = []
    for classes, said in _CLASSES.items():
        parts = [part.split(": ") for part in said.split("; ")]
        body = "; ".join(f"{name}: {palette[colour]}" for name, colour in parts)
        rules.append(f"{', '.join(f'.tl {each}' for each in classes.split(', '))} {{ {body} }}")
    return "\n".join(rules)


STYLE: Final = f"""
.tl text {{ font-family: {_FONTS}; font-size: 12px; }}
.tl text.h {{ font-size: 16px; font-weight: bold; }}
.tl .critical-name {{ font-weight: bold; }}
.tl .group {{ opacity: 0.6; }}
.tl .amount {{ opacity: 0.8; }}
{_coloured(PALETTES["light"])}
@media (prefers-color-scheme: dark) {{
{_coloured(PALETTES["dark"])}
}}
"""
LEGEND: Final = (
    ("waiting", "waits"),
    ("starting", "starts"),
    ("running", "runs"),
    ("succeeded", "✓ succeeded"),
    ("failed", "✗ failed"),
    ("cancelled", "⊘ cancelled"),
    ("cached", "◇ from the cache"),
    ("path", "critical path"),
)


class Bar(NamedTuple):
    """A piece of time, in seconds since the run began."""

    kind: str
    start: float
    end: float
    title: str = ""


class Row(NamedTuple):
    """A line of the chart. *amounts*: how many ran, in each of `BINS` equal parts of the time."""

    depth: int
    state: str
    label: str
    note: str
    title: str
    bars: tuple[Bar, ...] = ()
    amounts: tuple[int, ...] = ()
    is_critical: bool = False


class Chart(NamedTuple):
    """What is drawn, before it has pixels."""

    rows: list[Row]
    length_s: float
    critical: list[StepView]
    left_out: int


def page(view: RunView) -> str:
    """A whole HTML document."""
    title = _escaped(f"{view['workflow']} {view['name']}", 200)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n"
        "<style>body { margin: 0; overflow-x: auto; background: #fff } "
        "@media (prefers-color-scheme: dark) { body { background: #16181b } }</style></head>\n"
        f"<body>\n{svg(view)}</body></html>\n"
    )


def svg(view: RunView) -> str:
    """The drawing, as a file or as a part of a page."""
    drawn = chart(view)
    height = HEAD + ROW * (len(drawn.rows) + (drawn.left_out > 0)) + MARGIN
    title = f"{view['workflow']} {view['name']}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="tl" role="img" '
        f'viewBox="0 0 {WIDTH:.0f} {height:.0f}" width="{WIDTH:.0f}" height="{height:.0f}" '
        f'aria-label="{_escaped("Timeline of " + title)}">\n<style>{STYLE}</style>\n',
        f'<rect width="{WIDTH:.0f}" height="{height:.0f}" class="page"/>\n',
        *_head(view, drawn),
        *_axis(drawn.length_s, height - MARGIN),
    ]
    for number, row in enumerate(drawn.rows):
        parts += _row(row, HEAD + ROW * number, drawn.length_s)
    if drawn.left_out:
        y = HEAD + ROW * len(drawn.rows)
        parts.append(_text(MARGIN, y, f"and {drawn.left_out} more rows", WIDTH, "dim"))
    return "".join([*parts, "</svg>\n"])


# ---- what is drawn ------------------------------------------------------------------------------


def chart(view: RunView) -> Chart:
    """Rows and bars of a run, the critical path among them."""
    root, now = view["tree"], view["now"]
    origin = began(root) or now
    end = max([root.get("endedAt") or now, *(_end(leaf, now) for leaf in leaves(root))])
    path = critical(root, now)
    keys = {step["key"] for step in path}
    rows: list[Row] = []
    left_out = 0
    for row in _rows(root, -1, origin, max(end - origin, 1e-3), now, keys):
        if len(rows) < ROWS_MAX:
            rows.append(row)
        else:
            left_out += 1
    return Chart(rows, max(end - origin, 1e-3), path, left_out)


def critical(root: StepView, now: float) -> list[StepView]:
    """The chain of steps that the run's length is made of, the first one first."""
    begun = sorted(
        (leaf for leaf in leaves(root) if began(leaf) and leaf["state"] != "skipped"),
        key=lambda leaf: (_end(leaf, now), -began(leaf)),
    )
    times = [_end(leaf, now) for leaf in begun]
    found: list[StepView] = []
    place = len(begun) - 1
    while place >= 0:
        found.append(begun[place])
        place = min(bisect_right(times, _first_asked(begun[place]) + NEAR_S) - 1, place - 1)
    return found[::-1]


def _first_asked(step: StepView) -> float:
    """When it first could; of what was tried again, before all that."""
    before = [each["beganAt"] for each in step.get("attempts", []) if each["beganAt"]]
    return min([began(step), *before])


def _end(step: StepView, now: float) -> float:
    return step.get("endedAt") or (now if began(step) else 0.0)


def _rows(
    step: StepView, depth: int, origin: float, length_s: float, now: float, critical: set[str]
) -> Iterator[Row]:
    todo = [(step, depth)]
    while todo:
        each, level = todo.pop()
        children = each.get("children", [])
        is_large = each.get("of", 0) > INSTANCES_SHOWN
        if level >= 0:
            bars = _group(each, origin, now) if children else _bars(each, origin, now)
            amounts = _amounts(children, origin, length_s, now) if is_large and children else ()
            yield Row(
                level,
                each["state"],
                _label(each),
                _note(each, now),
                _title(each, now),
                tuple(bars),
                amounts,
                each["key"] in critical,
            )
        if is_large:
            children = _notable(children, critical)
        todo += [(child, level + 1) for child in reversed(children)]


def _notable(instances: list[StepView], critical: set[str]) -> list[StepView]:
    """Those of a large matrix that have a row of their own."""
    failed = [each for each in instances if each["state"] == "failed"][:NOTABLE_SHOWN]
    keys = {each["key"] for each in failed}
    on_path = [
        each for each in instances
        if each["key"] not in keys and any(leaf["key"] in critical for leaf in leaves(each))
    ]  # fmt: skip
    return failed + on_path[-NOTABLE_SHOWN:]


def _bars(step: StepView, origin: float, now: float) -> Iterator[Bar]:
    asked, start, end = began(step), step.get("beganAt", 0.0), _end(step, now)
    before = step.get("attempts", [])
    first = min([t for t in (asked, *(a["beganAt"] for a in before)) if t], default=0.0)
    if not first:
        return
    yield Bar("waiting", 0.0, max(first - origin, 0.0), "waits for others")
    last = 0.0
    for each in before:
        if each["beganAt"] and each["endedAt"] >= each["beganAt"]:
            if last:
                yield _bar("delayed", last, each["beganAt"], origin, "is to be tried again")
            title = f"attempt {each['attempt']}: {each['state']} {each.get('reason', '')}"
            yield _bar(each["state"], each["beganAt"], each["endedAt"], origin, title)
            last = each["endedAt"]
    if last:
        until = asked if asked >= last else (start or end)
        yield _bar("delayed", last, max(until, last), origin, "is to be tried again")
        asked = max(asked, last)
    state = step["state"]
    if step.get("wasCached"):
        yield _bar("cached", end, end, origin, "from the cache")
    elif state == "expecting" or not start:
        yield _bar("expecting" if state == "expecting" else "starting", asked, end, origin, state)
    else:
        if start > asked:
            how = step.get("start") or ""
            yield _bar("starting", asked, start, origin, f"starts {how}")
        yield _bar(
            state, max(start, last), end, origin, f"attempt {step.get('attempt', 1)}: {state}"
        )


def _bar(kind: str, start: float, end: float, origin: float, title: str) -> Bar:
    since = max(start - origin, 0.0)
    return Bar(kind, since, max(end - origin, since), title.strip())


def _group(step: StepView, origin: float, now: float) -> Iterator[Bar]:
    if start := began(step):
        yield _bar(f"{step['state']} group", start, _end(step, now), origin, step["state"])


def _amounts(
    instances: list[StepView], origin: float, length_s: float, now: float
) -> tuple[int, ...]:
    """How many ran in each part of the time: differences, then their sum."""
    changes = [0] * (BINS + 1)
    for each in instances:
        start = each.get("beganAt") or began(each)
        if start:
            first = _bin(start - origin, length_s)
            changes[first] += 1
            changes[max(_bin(_end(each, now) - origin, length_s), first) + 1] -= 1
    amounts, running = [], 0
    for change in changes[:BINS]:
        running += change
        amounts.append(running)
    return tuple(amounts)


def _bin(at: float, length_s: float) -> int:
    return min(max(int(at / length_s * BINS), 0), BINS - 1)


def _label(step: StepView) -> str:
    mark = MARKS.get(step["state"], "·")
    return f"{mark} {step['name']}{' (finally)' if step.get('isFinal') else ''}"


def _note(step: StepView, now: float) -> str:
    """What is said beside the bars: how long, how it was started, what was moved."""
    if of := step.get("of", 0):
        said = [f"{n} {state}" for state, n in counted(step.get("children", []), of).items()]
        return ", ".join(said)
    took = duration_s(step, now)
    parts = ["" if took is None else duration(took)]
    if step.get("wasCached"):
        parts = ["cached"]
    elif how := step.get("start"):
        parts.append(how)
    if step.get("retries"):
        parts.append(f"{step['retries']} retr{'y' if step['retries'] == 1 else 'ies'}")
    if moved := step.get("bytesMoved"):
        parts.append(size(moved))
    return ", ".join(part for part in parts if part) or step["state"]


def _title(step: StepView, now: float) -> str:
    lines = [f"{step['key']}: {step['state']}", _note(step, now)]
    lines += [text for text in (step.get("why", ""), reason(step)) if text]
    return "\n".join(lines)


# ---- how it is drawn ----------------------------------------------------------------------------


def _head(view: RunView, drawn: Chart) -> Iterator[str]:
    root = view["tree"]
    state = view.get("status") or root["state"]
    yield _text(MARGIN, 12, f"{view['workflow']} {view['name']}", WIDTH * 0.72, "h")
    moved = size(root.get("bytesMoved", 0))
    steps = counted(leaves(root))
    said = ", ".join(f"{number} {what}" for what, number in steps.items())
    line = f"{view['namespace']} | {state} | {duration(drawn.length_s)} | {moved} moved | {said}"
    yield _text(MARGIN, 36, line, WIDTH - MARGIN, "dim")
    if drawn.critical:
        names = [step["key"] for step in drawn.critical]
        if len(names) > PATH_SHOWN:
            half = PATH_SHOWN // 2
            names = [*names[:half], f"({len(names) - PATH_SHOWN} more)", *names[-half:]]
        yield _text(MARGIN, 54, f"critical path: {' > '.join(names)}", WIDTH - MARGIN, "dim")
    x = MARGIN
    for kind, meaning in LEGEND:
        height = 3.0 if kind in ("path", "waiting") else 10.0
        y = 84 - height / 2 - (kind == "path" and -3)
        yield _rect(x, y, 14, height, kind)
        yield _text(x + 20, 72, meaning, x + 200, "dim")
        x += 20 + CHARACTER * len(meaning) + 18


def _axis(length_s: float, bottom: float) -> Iterator[str]:
    step = next((s for s in _STEPS_S if length_s / s <= TICKS_MAX), length_s)
    number = 0
    while number * step <= length_s:
        x = _x(number * step, length_s)
        ends = f'x1="{x:.1f}" y1="{HEAD - 4:.1f}" x2="{x:.1f}" y2="{bottom:.1f}"'
        yield f'<line class="rule" {ends}/>'
        label = _tick(number * step)
        yield _text(x - CHARACTER * len(label) / 2, HEAD - 24, label, x + 200, "dim")
        number += 1
    yield "\n"


def _tick(at: float) -> str:
    number, _, unit = duration(at).partition(" ")
    if not at:
        return "0"
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}"


def _row(row: Row, y: float, length_s: float) -> Iterator[str]:
    yield f"<g><title>{_escaped(row.title)}</title>"
    yield _rect(MARGIN, y + ROW - 1, WIDTH - 2 * MARGIN, 1, "band")
    indent = MARGIN + INDENT * min(row.depth, 10)
    name = "critical-name" if row.is_critical else ""
    yield _text(indent, y, row.label, CHART_LEFT - 6, name)
    top = y + (ROW - BAR) / 2
    is_summed = bool(row.amounts)
    for bar in row.bars:
        thin = bar.kind in ("waiting", "delayed") or bar.kind.endswith("group")
        height = 3.0 if thin else BAR
        place = y + ROW - 4 - height / 2 if is_summed else y + (ROW - height) / 2
        left = _x(bar.start, length_s)
        width = max(_x(bar.end, length_s) - left, BAR_MIN)
        left = min(left, CHART_RIGHT - width)
        if bar.kind == "cached":
            yield _diamond(left, y + ROW / 2, bar.title)
        elif not (thin and bar.end <= bar.start):
            yield _rect(left, place, width, height, bar.kind, bar.title)
    if is_summed:
        yield _area(row.amounts, row.state, top, BAR)
    if row.is_critical and row.bars:
        done = [bar for bar in row.bars if bar.kind != "waiting"] or row.bars
        left = min(_x(done[0].start, length_s), CHART_RIGHT - 4)
        width = max(_x(done[-1].end, length_s) - left, 4)
        yield _rect(left, y + ROW - 4.5, width, 3, "path")
    yield _text(NOTE_LEFT, y, row.note, WIDTH - MARGIN, "dim")
    yield "</g>\n"


def _diamond(x: float, y: float, title: str) -> str:
    r = BAR / 2 - 1
    x = min(max(x, CHART_LEFT + r), CHART_RIGHT - r)
    shape = f"M{x - r:.1f} {y:.1f} L{x:.1f} {y - r:.1f} L{x + r:.1f} {y:.1f} L{x:.1f} {y + r:.1f} z"
    return f'<path class="cached" d="{shape}"><title>{_escaped(title)}</title></path>'


def _area(amounts: Iterable[int], state: str, top: float, height: float) -> str:
    """How many at a time, as steps; the most of them is the whole height."""
    found = list(amounts)
    most = max(found) or 1
    wide = (CHART_RIGHT - CHART_LEFT) / BINS
    kind = state if state in OVER else "running"
    points = [f"M{CHART_LEFT:.1f} {top + height:.1f}"]
    last = -1
    for number, amount in enumerate(found):
        if amount != last:
            y = top + height * (1 - amount / most)
            points.append(f"H{CHART_LEFT + number * wide:.1f}V{y:.1f}")
            last = amount
    points.append(f"H{CHART_RIGHT:.1f}V{top + height:.1f}z")
    title = f"at most {most} at a time"
    return f'<path class="{_kind(kind)} amount" d="{"".join(points)}"><title>{title}</title></path>'


def _rect(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> str:
    inner = f"<title>{_escaped(title)}</title>" if title else ""
    return (
        f'<rect class="{_kind(kind)}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
        f'height="{height:.1f}" rx="1">{inner}</rect>'
    )


def _text(x: float, y: float, text: str, until: float, kind: str = "") -> str:
    """One line whose row begins at *y*, cut where it would come to *until*."""
    wide = CHARACTER * (1.34 if kind == "h" else 1.0)
    shown = _escaped(_cut(text, max(int((until - x) / wide), 1)))
    return f'<text class="{kind}" x="{x:.1f}" y="{y + 15:.1f}">{shown}</text>'


def _x(at: float, length_s: float) -> float:
    return CHART_LEFT + (CHART_RIGHT - CHART_LEFT) * min(max(at / length_s, 0.0), 1.0)


def _kind(kind: str) -> str:
    """A class of ours: states come over the wire, and stand in an attribute."""
    return kind if all(part.isascii() and part.isalpha() for part in kind.split()) else "waiting"


def _cut(text: str, most: int) -> str:
    """*text* in at most *most* columns: some characters take two."""
    shown, taken = [], 0
    whole = unicodedata.normalize("NFC", text[: 4 * most + 4])
    for character in printable(whole).replace("\n", " ").replace("\t", " "):
        if unicodedata.combining(character):
            continue
        taken += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        shown.append((character, taken))
    if taken <= most and len(text) <= 4 * most + 4:
        return "".join(character for character, _ in shown)
    return "".join(character for character, at in shown if at < most) + "…"


def _escaped(text: str, most: int = TITLE_CHARACTERS_MAX) -> str:
    cut = text if len(text) <= most else text[: most - 1] + "…"
    return html.escape(printable(cut), quote=True)
