"""What the state remembers of sandboxes, functions, molds and zygotes."""

import math
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from operator import attrgetter
from typing import Final

from msgspec import Struct, structs

from dayfly_pool import autoscale
from dayfly_pool.commands import StartKind
from dayfly_pool.models import Failure, Function, FunctionId, InvocationId, Mold, SandboxId

DEFAULT_SPECIALIZE_S: Final = 0.005
DEFAULT_MEMORY_BYTES: Final = 4 << 20


class Phase(Enum):
    """Where a sandbox is in its life."""

    STARTING = "starting"
    GENERIC = "generic"
    LOADING = "loading"
    IDLE = "idle"
    BUSY = "busy"
    DEAD = "dead"

    __hash__ = object.__hash__  # Enum's own is a Python function, too slow for every move


NEXT: Final[Mapping[Phase, frozenset[Phase]]] = {
    Phase.STARTING: frozenset({Phase.GENERIC, Phase.DEAD}),
    Phase.GENERIC: frozenset({Phase.LOADING, Phase.DEAD}),
    Phase.LOADING: frozenset({Phase.IDLE, Phase.DEAD}),
    Phase.IDLE: frozenset({Phase.BUSY, Phase.DEAD}),
    Phase.BUSY: frozenset({Phase.IDLE, Phase.DEAD}),
    Phase.DEAD: frozenset(),
}


@dataclass(slots=True, eq=False)
class SandboxRecord:
    """One sandbox as the decisions see it."""

    id: SandboxId
    mold: Mold
    since: float
    phase: Phase = Phase.STARTING
    function: Function | None = None
    slots: int = 1
    running: set[InvocationId] = field(default_factory=set)
    start: StartKind = "created"
    stale: bool = False
    zygote: SandboxId | None = None
    work: tuple[str, float] | None = None
    """(tenant, weight) of the start or load that is under way."""

    value: float = 0.0
    """What it is worth to keep it, since it fell idle; comparable within one pool."""


def own_mold(function: Function) -> Mold:
    """What the sandboxes of the function's own zygote are made of."""
    return structs.replace(function.mold, function=f"{function.id}@{function.version}")


@dataclass(slots=True, eq=False)
class FunctionRecord:
    """One function: its queue and its sandboxes of the current version."""

    function: Function
    queue: OrderedDict[InvocationId, float] = field(default_factory=OrderedDict)
    sandboxes: dict[SandboxId, SandboxRecord] = field(default_factory=dict)
    idle: OrderedDict[SandboxId, SandboxRecord] = field(default_factory=OrderedDict)
    open: OrderedDict[SandboxId, SandboxRecord] = field(default_factory=OrderedDict)
    """Busy, with a free place (concurrency over 1)."""

    loading: int = 0
    claims: int = 0
    slots: int | None = None
    handler_s: float | None = None
    specialize_s: float = DEFAULT_SPECIALIZE_S
    load_weight: float = 1.0
    """The share of a processor that its import keeps busy."""

    home: Mold = field(init=False)
    """Where it makes its claims: the mold of its environment, or its own."""

    once: bool | None = None
    """Whether it initializes once; None: not known yet."""

    once_why: str = "it has not been loaded yet"
    is_unfit: bool = False
    """Whether a zygote of it was tried, and did not do."""

    uses: int = 0
    """Invocations since it had no sandbox."""

    memory_bytes: int = DEFAULT_MEMORY_BYTES
    failure: Failure | None = None
    failures: int = 0
    lost_loads: int = 0
    broken_until: float = 0.0

    def __post_init__(self) -> None:
        self.home = self.function.mold

    @property
    def own_mold(self) -> Mold:
        """What its zygote's sandboxes are made of."""
        return own_mold(self.function)

    @property
    def places(self) -> int:
        """Invocations that one sandbox of this function takes at once."""
        return self.slots or self.function.spec.concurrency


@dataclass(slots=True, eq=False)
class ZygoteRecord:
    """One zygote."""

    id: SandboxId
    mold: Mold
    since: float
    forks: int = 0
    forking: int = 0
    """Of its forks, those that are not up yet."""

    used_at: float = 0.0
    is_ready: bool = False
    work: tuple[str, float] | None = None
    """(tenant, weight) of its warming."""


@dataclass(slots=True, eq=False)
class MoldRecord:
    """The generic sandboxes of one mold, and the functions that wait for one."""

    mold: Mold
    least: int
    pinned: bool = False
    generic: OrderedDict[SandboxId, SandboxRecord] = field(default_factory=OrderedDict)
    starting: int = 0
    claims: deque[FunctionId] = field(default_factory=deque)
    functions: int = 0
    rate: autoscale.Rate = field(default_factory=autoscale.Rate)
    start_s: float | None = None
    failures: int = 0
    retry_at: float = 0.0
    zygote: ZygoteRecord | None = None
    warming: ZygoteRecord | None = None
    """The first one, the successor of `zygote`, or one more, while it is not ready."""

    more: dict[SandboxId, ZygoteRecord] = field(default_factory=dict)
    """Further zygotes, while one is the bottleneck."""

    used_at: float = -math.inf
    zygote_failures: int = 0
    zygote_retry_at: float = 0.0

    def least_busy(self) -> ZygoteRecord | None:
        """The zygote that is to fork next."""
        if self.zygote is None or not self.more:
            return self.zygote
        return min((self.zygote, *self.more.values()), key=attrgetter("forking"))

    def drop(self, zygote: ZygoteRecord) -> None:
        """It forks no more; another takes its place, if there is one."""
        self.more.pop(zygote.id, None)
        if self.warming is zygote:
            self.warming = None
        if self.zygote is zygote:
            self.zygote = self.more.pop(next(iter(self.more))) if self.more else None


class ZygoteLimits(Struct, frozen=True):
    """When a zygote is replaced, and when one that nobody needs is let go.

    A function whose import takes *once_s* or longer is to have one of its own. A zygote makes one
    fork at a time: where each has *at_once* to make, another helps.
    """

    forks: int = 5000
    age_s: float = 3600.0
    idle_s: float = 600.0
    once_s: float = 0.25
    at_once: int = 8

    def is_worn(self, zygote: ZygoteRecord, now: float) -> bool:
        """Whether a fresh one is to take its place."""
        return zygote.forks >= self.forks or now - zygote.since >= self.age_s
