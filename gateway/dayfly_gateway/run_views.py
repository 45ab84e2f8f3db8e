"""A run as the admin API shows it: the form of its JSON, and words that people read.

Nothing of the pool is imported here: the command reads these too.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, NotRequired, TypedDict

if TYPE_CHECKING:
    from dayfly_pool.workflow.facts import Fact
    from dayfly_pool.workflow.tree import Shown

OVER: Final = ("succeeded", "failed", "skipped", "cancelled", "not run")
UNDER_WAY: Final = ("asked", "running", "delayed", "expecting", "open", "stopping")
MARKS: Final = {
    "succeeded": "✓",
    "failed": "✗",
    "skipped": "–",  # noqa: RUF001 - a dash, as tables have it
    "cancelled": "⊘",
    "not run": "–",  # noqa: RUF001
    "asked": "◌",
    "running": "▶",
    "delayed": "↻",
    "expecting": "‖",
    "open": "▶",
    "stopping": "◼",
}
"""So that no state is said by colour alone."""


class AttemptView(TypedDict):
    """One attempt of a step. Times are Unix seconds; 0: not yet, or nobody wrote it down."""

    attempt: int
    state: str
    beganAt: float
    endedAt: float
    start: NotRequired[str | None]
    reason: NotRequired[str]


class StepView(TypedDict):
    """`Shown` in JSON: a step, an instance, a nested workflow, or (the key is "") the run.

    *attempts* are those before the last one, the oldest first. *of*: of a matrix, how many there
    are going to be; *children* may be fewer.
    """

    key: str
    name: str
    state: str
    attempt: NotRequired[int]
    retries: NotRequired[int]
    askedAt: NotRequired[float]
    beganAt: NotRequired[float]
    endedAt: NotRequired[float]
    start: NotRequired[str | None]
    wasCached: NotRequired[bool]
    bytesMoved: NotRequired[int]
    why: NotRequired[str]
    reason: NotRequired[list[str]]
    isFinal: NotRequired[bool]
    of: NotRequired[int]
    attempts: NotRequired[list[AttemptView]]
    children: NotRequired[list["StepView"]]


class RunView(TypedDict):
    """A run and, as its server's clock says, when it was like this."""

    namespace: str
    name: str
    workflow: str
    status: NotRequired[str]
    now: float
    tree: StepView


def step_view(shown: "Shown", attempts: dict[str, list[AttemptView]] | None = None) -> StepView:
    """A tree as JSON has it; what is as it always is, is left out. *attempts* are by key."""
    before = [
        each for each in (attempts or {}).get(shown.key, []) if each["attempt"] < shown.attempt
    ]
    optional: dict[str, Any] = {
        "attempt": shown.attempt,
        "retries": shown.retries,
        "askedAt": shown.asked_at,
        "beganAt": shown.began_at,
        "endedAt": shown.ended_at,
        "start": shown.start,
        "wasCached": shown.was_cached,
        "bytesMoved": shown.bytes_moved,
        "why": shown.why,
        "reason": [part for part in shown.reason if part],
        "isFinal": shown.is_final,
        "of": shown.of,
        "attempts": before,
        "children": [step_view(child, attempts) for child in shown.children],
    }
    view: Any = {"key": shown.key, "name": shown.name, "state": shown.state}
    view |= {name: value for name, value in optional.items() if value}
    found: StepView = view
    return found


def run_view(document: Mapping[str, Any], now: float) -> RunView:
    """A run as the admin API answers with it, its `tree` made by `step_view`."""
    metadata, status = document["metadata"], document["status"]
    waiting: StepView = {"key": "", "name": "", "state": "waiting"}
    return {
        "namespace": metadata["namespace"],
        "name": metadata["name"],
        "workflow": status["workflow"],
        "status": status["state"],
        "now": now,
        "tree": document.get("tree") or waiting,
    }


def attempts_of(facts: "Iterable[Fact]") -> dict[str, list[AttemptView]]:
    """Every attempt that a journal tells of, by its step's key."""
    from dayfly_pool.workflow.facts import Ended, Failed, Started

    found: dict[str, dict[int, AttemptView]] = {}
    for fact in facts:
        if not isinstance(fact, Started | Ended | Failed):
            continue
        of = found.setdefault(fact.key, {})
        number = fact.attempt
        if number not in of:
            of[number] = {"attempt": number, "state": "running", "beganAt": 0.0, "endedAt": 0.0}
        view = of[number]
        if fact.report.start is not None:
            view["start"] = fact.report.start
        if isinstance(fact, Started):
            view["beganAt"] = view["beganAt"] or fact.at
        elif not view["endedAt"]:  # what is told twice happened the first time
            view["endedAt"] = fact.at
            view["beganAt"] = view["beganAt"] or fact.at - fact.report.duration_s
            view["state"] = "succeeded" if isinstance(fact, Ended) else "failed"
            if isinstance(fact, Failed):
                view["reason"] = f"{fact.kind}: {fact.message}"
    return {key: [of[number] for number in sorted(of)] for key, of in found.items()}


def step_of(invocation: str) -> str:
    """The key of the step that it is an attempt of: an invocation is called RUN/KEY/ATTEMPT."""
    return "/".join(invocation.split("/")[1:-1])


def keys(step: StepView) -> Iterator[str]:
    """Of all that is below it; in order."""
    for child in step.get("children", []):
        yield child["key"]
        yield from keys(child)


def leaves(step: StepView) -> Iterator[StepView]:
    """What runs, and is not made of others; in order."""
    todo = [step]
    while todo:
        each = todo.pop()
        if children := each.get("children"):
            todo += reversed(children)
        elif each["key"]:
            yield each


def counted(steps: Iterable[StepView], total: int = 0) -> dict[str, int]:
    """How many are in each state, failures first; those of *total* that are missing wait."""
    found: dict[str, int] = {}
    number = 0
    for number, step in enumerate(steps, 1):  # noqa: B007 - how many there were
        found[step["state"]] = found.get(step["state"], 0) + 1
    if total > number:
        found["waiting"] = found.get("waiting", 0) + total - number
    order = ("failed", *UNDER_WAY, "succeeded", "skipped", "cancelled", "not run", "waiting")
    return {state: found[state] for state in order if state in found}


def began(step: StepView) -> float:
    """When it was first heard of; 0 if it has not been."""
    return step.get("askedAt") or step.get("beganAt") or 0.0


def duration_s(step: StepView, now: float) -> float | None:
    """How long it has been at it, without what it waited for; None before."""
    start = step.get("beganAt") or (began(step) if step.get("children") else 0.0)
    return max((step.get("endedAt") or now) - start, 0.0) if start else None


def duration(seconds: float) -> str:
    """For people: three digits or so."""
    if seconds < 0.0995:
        return f"{seconds * 1000:.1f} ms"
    if seconds < 9.95:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def size(number: float) -> str:
    """Bytes, for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1023.5:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def reason(step: StepView) -> str:
    """Why it failed or was skipped, on one line."""
    return " ".join(": ".join(step.get("reason", [])).split())
