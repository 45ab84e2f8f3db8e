"""What the engine remembers of a run: one node for each step, instance and nested workflow.

All of it can be encoded: a snapshot is this, and nothing besides.
"""

from collections.abc import Mapping
from enum import IntEnum
from typing import Any, Final, Literal

from msgspec import Struct, field

from dayfly_pool.workflow.facts import FORMAT, Artifact, Report, Status
from dayfly_pool.workflow.versions import Marks


class Phase(IntEnum):
    """Where in its life a node is. The numbers are in snapshots: never change one."""

    NEW = 0
    ASKED = 1
    """An attempt was commanded, and has no sandbox yet."""

    RUNNING = 2
    DELAYED = 3
    """Failed, and is tried again at a time."""

    EXPECTING = 4
    """Of a wait: nothing is under way for it."""

    OPEN = 5
    """Of a matrix or a nested workflow: what is in it is under way."""

    STOPPING = 6
    """Whoever runs it was told to stop it, and has not said that it has."""

    SUCCEEDED = 7
    FAILED = 8
    SKIPPED = 9
    CANCELLED = 10

    @property
    def is_over(self) -> bool:
        """Whether nothing happens to it any more, unless the run is retried."""
        return self >= Phase.SUCCEEDED


_OVER: Final = frozenset({Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED})
NEXT: Final[Mapping[Phase, frozenset[Phase]]] = {
    Phase.NEW: frozenset({Phase.ASKED, Phase.EXPECTING, Phase.OPEN, Phase.FAILED, Phase.SKIPPED}),
    Phase.ASKED: frozenset({Phase.RUNNING, Phase.DELAYED, Phase.STOPPING}) | _OVER,
    Phase.RUNNING: frozenset({Phase.RUNNING, Phase.DELAYED, Phase.STOPPING}) | _OVER,
    Phase.DELAYED: frozenset({Phase.ASKED, Phase.OPEN, Phase.FAILED, Phase.CANCELLED}),
    Phase.EXPECTING: _OVER,
    Phase.OPEN: frozenset({Phase.DELAYED}) | _OVER,
    Phase.STOPPING: frozenset({Phase.SUCCEEDED, Phase.CANCELLED}),
    Phase.SUCCEEDED: frozenset(),
    Phase.FAILED: frozenset({Phase.OPEN}),  # the run is retried, and it has parts that are not
    Phase.SKIPPED: frozenset(),
    Phase.CANCELLED: frozenset({Phase.OPEN}),
}


class Stage(IntEnum):
    """What of a workflow is under way. The numbers are in snapshots."""

    STEPS = 0
    FINALLY = 1
    OVER = 2


Stop = Literal["", "failed", "cancelled", "timed out"]


class Flow(Struct, array_like=True):
    """One execution of a workflow: the run itself, or a nested one."""

    workflow: str
    """The name of the definition; of the run's own, ""."""

    params: dict[str, Any]
    workspaces: dict[str, str]
    """By its name for it: the run's."""

    missing: list[int]
    """By step: how many it comes after that are not over; below 0 once nothing releases it."""

    origin: int = 0
    """The mark (see `Marks`) that it began with."""

    base: int = 0
    """The mark that what comes after no other step starts from."""

    began_at: float = 0.0
    stage: Stage = Stage.STEPS
    under_way: int = 0
    """Steps that are released and not over."""

    is_closed: bool = False
    """Whether nothing new starts."""

    is_stopped: bool = False
    """Whether what is under way was told to stop, too."""

    stop: Stop = ""
    has_failed: bool = False
    has_skipped: bool = False
    steps_status: str = "None"
    """Of all steps, as what runs finally sees it."""

    failure: tuple[str, str] = ("", "")
    status: Status | None = None


class Fan(Struct, array_like=True):
    """The instances of a step with a matrix."""

    total: int
    next: int = 0
    under_way: int = 0
    failed: int = 0
    is_closed: bool = False
    failure: tuple[str, str] = ("", "")


class Node(Struct, array_like=True):
    """One thing that can be under way, by its key. The run itself has the key ""."""

    key: str
    owner: str
    """The key of the nested workflow that it is a step of."""

    place: int
    """Its step's number in the plan."""

    index: int = -1
    """Of an instance: which one."""

    phase: Phase = Phase.NEW
    attempt: int = 0
    retries: int = 0
    """Failures that counted."""

    faults: int = 0
    """Failures that did not."""

    base: int = 0
    """The mark of the workspaces' versions that it starts from."""

    mark: int = 0
    """The mark of those that are there after it."""

    asked_at: float = 0.0
    began_at: float = 0.0
    ended_at: float = 0.0
    due: float | None = None
    """When something happens to it by itself."""

    results: dict[str, Any] = {}
    outputs: dict[str, Artifact] = {}
    failure: tuple[str, str] = ("", "")
    """Kind and message; of what was skipped, why."""

    was_cached: bool = False
    report: Report = Report()
    reserved: int = 0
    """Of the run's limit of instances."""

    flow: Flow | None = None
    fan: Fan | None = None

    def move(self, phase: Phase) -> None:
        """Into *phase*; an illegal move is our defect."""
        assert phase in NEXT[self.phase], f"{self.key}: {self.phase.name} to {phase.name}"
        self.phase = phase


class State(Struct, array_like=True):
    """All of a run."""

    format: int = FORMAT
    taken: int = 0
    """Facts that it took notice of."""

    instances: int = 0
    run: dict[str, str] = {}
    """What `$(run...)` stands for."""

    nodes: dict[str, Node] = {}
    commanded: dict[str, None] = {}
    """Keys of which a command is outstanding, in the order of these."""

    attempts: dict[str, int] = {}
    """Of nodes that were forgotten because they run again: so that no attempt comes twice."""

    marks: Marks = field(default_factory=Marks)
