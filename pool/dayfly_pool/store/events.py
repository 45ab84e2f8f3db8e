"""What a store of durable events promises. SQLite keeps it, and the shipped fake does.

An event is written down once, and ends once:

    waiting --> running --> succeeded
     ^   ^        | |  |
     |   delayed <--+  +--> dead --> waiting (redriven)
     +------------+         any but an ended one --> cancelled

Who runs an event has a lease of it: the number of the lease is the event's *fence*, and only the
holder of the last one can end it. A lease belongs to an owner (one server's life); it ends with
the run, when the event is cancelled, or when the owner is fenced off.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Final, Protocol

from msgspec import Struct

from dayfly_pool.models import FunctionId, InvocationId

ROW_BYTES_MAX: Final = 256 * 1024
"""A longer body is a file, or a row apart, named by its digest."""

PAGE_MAX: Final = 1000


class State(IntEnum):
    """Where in its life an event is. The numbers are in databases: never change one."""

    WAITING = 0
    DELAYED = 1
    RUNNING = 2
    SUCCEEDED = 3
    DEAD = 4
    CANCELLED = 5

    @property
    def is_over(self) -> bool:
        """Whether nothing happens to it any more, unless it is redriven."""
        return self >= State.SUCCEEDED


class Key(Struct, frozen=True):
    """An idempotency key: the same *text* again, before *until*, is the same event.

    *fingerprint* tells whether what came with it is the same, too.
    """

    text: str
    fingerprint: str
    until: float


class Event(Struct, frozen=True, kw_only=True):
    """What is accepted: one event for one function. Times are Unix seconds.

    *meta* is the caller's own; the store never looks into it. Not run any more after *age_s*.
    """

    id: InvocationId
    function: FunctionId
    meta: bytes
    body: bytes
    accepted_at: float
    age_s: float
    priority: int = 0
    key: Key | None = None
    known_as: tuple[Key, ...] = ()
    """More keys that stand for it from now on, whatever they stood for before.

    None of them is forgotten sooner than it would have been.
    """


class Accepted(Struct, frozen=True):
    """Which event it is: with an idempotency key perhaps one that was there (not *is_new*).

    *is_other* when the key came with something else before; then nothing was accepted.
    """

    id: InvocationId
    is_new: bool = True
    is_other: bool = False


class Lease(Struct, frozen=True, kw_only=True):
    """The right to run an event, until another has it.

    *attempts* is how often user code has run for it, *fence* how often somebody set out to.
    A long body (*file*) is fetched before the run. *damage* says what is wrong when what was stored
    is not what was accepted.
    """

    row: int
    fence: int
    id: InvocationId
    function: FunctionId
    meta: bytes
    body: bytes
    attempts: int
    accepted_at: float
    expires_at: float
    file: str = ""
    damage: str = ""

    @property
    def is_long(self) -> bool:
        """Whether its body is still to be fetched."""
        return bool(self.file)


class Attempt(Struct, frozen=True, kw_only=True):
    """One run that did not succeed. *is_counted* unless it failed on our side."""

    fence: int
    started_at: float
    ended_at: float
    is_counted: bool
    kind: str
    message: str


class Ended(Struct, frozen=True, kw_only=True):
    """How a run has ended: *state* is what the event is now.

    *at* is when it may run again for a delayed one, else when it ended. *result* is the caller's
    own, like an event's meta. What is to come *then* is accepted with it, unless it is late.
    """

    row: int
    fence: int
    state: State
    at: float
    attempt: Attempt | None = None
    is_counted: bool = False
    result: bytes = b""
    body: bytes = b""
    then: tuple[Event, ...] = ()


class Written(Struct, frozen=True):
    """What came of a write.

    *late* are those (row, fence) whose lease was no longer theirs; *due* the delayed events that
    wait for nothing but room now, by function, and those that came *then*; *due_at* when the next
    delayed one will.
    """

    accepted: list[Accepted]
    late: set[tuple[int, int]]
    leased: list[Lease]
    due: Counter[FunctionId]
    due_at: float | None


class Shown(Struct, frozen=True, kw_only=True):
    """All that is known of an event. *ready_at* is set for a delayed one."""

    id: InvocationId
    function: FunctionId
    state: State
    priority: int
    accepted_at: float
    expires_at: float
    ready_at: float
    finished_at: float
    attempts: int
    fence: int
    meta: bytes
    body: bytes
    result: bytes
    result_body: bytes
    failures: list[Attempt]


class Store(Protocol):
    """Keeps events. Every method may raise `StoreFailed`.

    After that nobody knows what was written, and a later call works again or says so.
    """

    async def open(self, owner: str) -> None:
        """Be ready to write, as *owner*, who has no lease yet."""

    async def close(self) -> None:
        """After what is under way. Closing twice is harmless."""

    async def write(
        self,
        now: float,
        ended: Sequence[Ended] = (),
        accepted: Sequence[Event] = (),
        wanted: Mapping[FunctionId, int] | None = None,
    ) -> Written:
        """All of it or nothing, in this order, and on the disk when it returns.

        *wanted* is how many leases to give of each function's waiting events: by priority, then
        in the order in which they were accepted.
        """

    async def fetch(self, lease: Lease) -> Lease:
        """The same with its long body, if it has one."""

    async def cancel(self, id_: InvocationId, now: float) -> Shown | None:
        """End it, unless it has ended; returns it as it was before, None if there is none."""

    async def redrive(
        self, function: FunctionId, ids: Sequence[InvocationId] | None, now: float
    ) -> int:
        """Let dead events of *function* wait again, all or *ids*; returns how many."""

    async def get(self, id_: InvocationId) -> Shown | None:
        """One event."""

    async def page(
        self,
        function: FunctionId | None = None,
        state: State | None = None,
        limit: int = 100,
        before: InvocationId | None = None,
    ) -> list[Shown]:
        """The newest first, from the one *before* on; without bodies."""

    async def counts(self) -> dict[tuple[FunctionId, State], int]:
        """How many there are. Looks at every one: not for the hot path."""

    async def oldest(self, functions: Iterable[FunctionId]) -> dict[FunctionId, float]:
        """When the next waiting event of each was accepted, where one waits."""

    async def known(self, function: FunctionId, keys: Sequence[str]) -> dict[str, InvocationId]:
        """Which events those of the *keys* stand for that stand for one."""

    async def sweep(self, now: float, over_s: float, dead_s: float) -> int:
        """Forget what ended *over_s* ago, dead ones *dead_s*, and keys that are over.

        At most `PAGE_MAX` events at once; returns how many.
        """

    async def beat(self) -> dict[str, int]:
        """Say that our owner lives; returns how often each owner has said so."""

    async def release(self, but: Collection[tuple[int, int]]) -> Counter[FunctionId]:
        """Give back our owner's leases but those (row, fence) in *but*; how many, by function.

        After a write that failed: perhaps it gave leases that nobody knows of.
        """

    async def listen(self, told: Callable[[FunctionId], None]) -> None:
        """Call *told* with the function of what is accepted, by whomever; for ever.

        Perhaps not of everything. Raises `StoreFailed` when it cannot go on.
        """

    async def fence(self, owner: str) -> Counter[FunctionId]:
        """Take all leases from *owner*: its events wait again; returns how many, by function."""
