"""What people see of a run: the tree of its steps, for the terminal and for a timeline. Pure."""

from collections.abc import Iterator

from msgspec import Struct

from dayfly_pool.workflow.nodes import Node, Phase, State
from dayfly_pool.workflow.words import Words


class Shown(Struct, frozen=True):
    """One step, instance or nested workflow. Times are Unix seconds; 0: not yet.

    *state*: waiting, asked, running, delayed, expecting, open, stopping, succeeded, failed,
    skipped, cancelled; of a step that never had its turn in a run that is over, `not run`.
    *reason* is why it failed or was skipped; *why*, why it ran where it ran.
    """

    key: str
    name: str
    state: str
    attempt: int = 0
    retries: int = 0
    asked_at: float = 0.0
    began_at: float = 0.0
    ended_at: float = 0.0
    start: str | None = None
    was_cached: bool = False
    bytes_moved: int = 0
    why: str = ""
    reason: tuple[str, str] = ("", "")
    is_final: bool = False
    of: int = 0
    """Of a matrix: how many instances there are going to be."""

    children: tuple["Shown", ...] = ()


def tree(state: State, words: Words) -> Shown | None:
    """The run, and all that is in it in the order of the definition; None before it began."""
    root = state.nodes.get("")
    return None if root is None else _shown(root, "", state, words)


def _shown(node: Node, name: str, state: State, words: Words, is_final: bool = False) -> Shown:
    report = node.report
    children = tuple(_children(node, state, words))
    return Shown(
        key=node.key,
        name=name,
        state="waiting" if node.phase is Phase.NEW else node.phase.name.lower(),
        attempt=node.attempt,
        retries=node.retries,
        asked_at=node.asked_at,
        began_at=node.began_at or (node.ended_at - report.duration_s if node.attempt else 0.0),
        ended_at=node.ended_at,
        start=report.start,
        was_cached=node.was_cached,
        bytes_moved=report.bytes_moved + sum(child.bytes_moved for child in children),
        why=report.why,
        reason=node.failure,
        is_final=is_final,
        of=node.fan.total if node.fan else 0,
        children=children,
    )


def _children(node: Node, state: State, words: Words) -> Iterator[Shown]:
    if node.fan is not None:
        for index in range(node.fan.next):
            child = state.nodes.get(f"{node.key}[{index}]")
            if child is not None:
                yield _shown(child, f"[{index}]", state, words)
    elif node.flow is not None and node.flow.missing:  # else it never got as far
        plan = words.plan_of(node)
        for place, step in enumerate(plan.steps):
            child, is_final = words.node_of(node, place), place in plan.finals
            if child is not None:
                yield _shown(child, step.name, state, words, is_final)
            else:
                label = "not run" if node.phase.is_over else "waiting"
                yield Shown(words.key_of(node, place), step.name, label, is_final=is_final)
