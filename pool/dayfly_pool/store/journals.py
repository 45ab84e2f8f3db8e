"""What a store of journals promises. SQLite and PostgreSQL keep it, and the shipped fake does.

A journal is what one job or one run has come to: entries that are only ever added to, by its
present owner alone, so that whoever owns it next reads them and goes on.

    draft --publish--> free --claim--> owned --append(ended_at)--> over --> deleted
                        ^               |
                        +---------------+  released, or its owner was fenced off

Each time that a journal gets an owner or loses one its *fence* is one more: who appends says which
one it knows, and is late when that is not the last. Who appends also says *after* which entry, so
what may have been written already can be written again and is there once.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, Literal, NewType, Protocol

from msgspec import Struct

JournalId = NewType("JournalId", str)
"""In the order of time: 12 hex digits of milliseconds, then random ones."""

Kind = Literal["job", "run"]

ROW_BYTES_MAX: Final = 64 * 1024
"""A longer body may be kept apart from its row."""

PAGE_MAX: Final = 1000
PAGE_BYTES_MAX: Final = 16 * 1024 * 1024
"""Of entries that are read at once; but one at least."""

CLAIMS_MAX: Final = 64
SWEEP_ENTRIES: Final = 256
"""Forgotten at once: so long does a writer wait for it."""

WISHES_MAX: Final = 64
"""Not granted yet, of one journal."""


class NewEntry(Struct, frozen=True):
    """What is to be added. *part*, *low* and *high* (64 bits) and *body* are the caller's own.

    What is written most often should be of part 0: it costs least. Where ranges (*low* to *high*)
    are to be found again, it should be another.
    """

    part: int = 0
    low: int = 0
    high: int = 0
    body: bytes = b""


class Entry(Struct, frozen=True):
    """What is there. *number* counts from 1 in each journal, and is never given twice.

    *damage* says what is wrong when it is not what was written; *body* is empty then.
    """

    number: int
    part: int
    low: int
    high: int
    body: bytes
    damage: str = ""


class Wish(Struct, frozen=True):
    """What somebody wants of the owner. Later ones have higher numbers."""

    number: int
    body: bytes


class Journal(Struct, frozen=True, kw_only=True):
    """One job or run. Times are Unix seconds; *ended_at* is 0 while it is open.

    *head* is the caller's own summary, *spec* the caller's own and never changed; a page is
    without specs. The store sets *owner*, *fence*, *last* (the number of the last entry) and
    *damage* (see `Entry`). Of what exists no two have the same kind, namespace and name.
    """

    id: JournalId
    kind: Kind
    namespace: str
    name: str
    created_at: float
    ended_at: float = 0.0
    head: bytes = b""
    spec: bytes = b""
    is_draft: bool = False
    owner: str = ""
    fence: int = 0
    last: int = 0
    damage: str = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing is added to it any more."""
        return self.ended_at > 0


class Append(Struct, frozen=True, kw_only=True):
    """What its owner adds to a journal; entry *after* + 1 is the first of *entries*.

    Where *head* or *ended_at* is None it stays as it is. The entries that it *replaces* go, and
    the wishes up to number *heard*.
    """

    id: JournalId
    fence: int
    after: int
    entries: tuple[NewEntry, ...] = ()
    head: bytes | None = None
    ended_at: float | None = None
    replaces: tuple[int, ...] = ()
    heard: int = 0

    @property
    def last(self) -> int:
        """The number of the journal's last entry afterwards."""
        return self.after + len(self.entries)


class Size(Struct, frozen=True):
    """How many entries a journal has, and how long their bodies are together."""

    entries: int
    body_bytes: int


class Store(Protocol):
    """Keeps journals. Every method may raise `StoreFailed`.

    After that nobody knows what was written, and a later call works again or says so. Who does the
    same once more does no harm: what was done already is not done again.
    """

    async def open(self, owner: str) -> None:
        """Be ready to write, as *owner*."""

    async def close(self) -> None:
        """After what is under way. Closing twice is harmless."""

    async def create(
        self, journal: Journal, entries: Sequence[NewEntry] = (), *, is_ours: bool = False
    ) -> Journal:
        """Keep a new journal with its first entries; returns it as it is now.

        It is free, or *is_ours*, as a draft always is. One of that id that is there is returned,
        and nothing is written. Raises `NameTaken`.
        """

    async def publish(self, id_: JournalId, *, is_ours: bool = False) -> Journal | None:
        """Let a draft be free, or *is_ours*; returns it as it is now, None if there is none."""

    async def take(self, id_: JournalId) -> Journal | None:
        """Have the right to append to a draft, whoever had it; None if it is no draft."""

    async def append(self, appends: Sequence[Append]) -> set[JournalId]:
        """All of them in one transaction, on the disk when it returns; each journal once.

        Returns those that came too late: nothing is written for these, and the others go on.
        """

    async def claim(self, kind: Kind, most: int) -> list[Journal]:
        """Have free journals, the oldest first, at most `CLAIMS_MAX`."""

    async def release(self, but: Collection[tuple[JournalId, int]] = ()) -> int:
        """Let all of ours be free but those (id, fence) in *but*, and drafts; how many."""

    async def beat(self) -> dict[str, int]:
        """Say that our owner lives; returns how often each owner has said so."""

    async def fence(self, owner: str) -> int:
        """Let all journals of *owner* be free; how many."""

    async def wish(self, id_: JournalId, body: bytes) -> int:
        """Want something of the owner, whoever it is or will be; returns the number of the wish.

        0 when there is no such journal, or it is over or a draft. Raises `TooManyWishes`.
        """

    async def wishes(self) -> Mapping[JournalId, Sequence[Wish]]:
        """What is wanted of us and was not heard, in order."""

    async def get(self, id_: JournalId) -> Journal | None:
        """One journal, also a draft."""

    async def find(self, kind: Kind, namespace: str, name: str) -> Journal | None:
        """The one of that name, also a draft."""

    async def page(
        self,
        kind: Kind,
        namespace: str | None = None,
        limit: int = 100,
        before: JournalId | None = None,
        is_over: bool | None = None,
    ) -> list[Journal]:
        """The newest first, from the one *before* on, by id; without specs, and no drafts."""

    async def entries(
        self,
        id_: JournalId,
        part: int | None = None,
        after: int = 0,
        limit: int = PAGE_MAX,
        covering: int | None = None,
    ) -> list[Entry]:
        """In the order of their numbers, those above *after*; of one *part*, or all.

        Only those with low <= *covering* <= high, if it is given. Perhaps fewer than *limit*, by
        their size: none is the sign that there are no more.
        """

    async def size(self, id_: JournalId) -> Size:
        """Looks at every entry: not for the hot path."""

    async def delete(self, id_: JournalId) -> bool:
        """Forget one that is over or a draft, and free its name at once; False if it is neither.

        Its entries go bit by bit, with `sweep`.
        """

    async def sweep(self, now: float, over_s: float, draft_s: float) -> int:
        """Forget what ended *over_s* ago, drafts *draft_s* after they were made; in pieces.

        Returns how much was done: 0 when nothing is left to do.
        """

    async def listen(self, told: Callable[[], None]) -> None:
        """Call *told* when there is something to claim, or a wish for us, by others; for ever.

        Perhaps not always. Raises `StoreFailed` when it cannot go on.
        """
