"""Journals in memory, by the rules of `Store`: for tests, and gone with the process."""

import asyncio
from collections.abc import Callable, Collection, Iterator, Sequence

from msgspec import Struct, structs

from dayfly_pool.errors import NameTaken, TooManyWishes
from dayfly_pool.store.journals import (
    CLAIMS_MAX,
    PAGE_BYTES_MAX,
    PAGE_MAX,
    WISHES_MAX,
    Append,
    Entry,
    Journal,
    JournalId,
    Kind,
    NewEntry,
    Size,
    Wish,
)


class _Row(Struct):
    journal: Journal
    entries: dict[int, Entry]
    wishes: list[Wish]

    @property
    def is_open(self) -> bool:
        return not (self.journal.is_over or self.journal.is_draft)

    def change(self, **changed: object) -> None:
        self.journal = structs.replace(self.journal, **changed)


class MemoryJournals:
    """See `Store`. What it holds outlives `close`, as a file would.

    *broken* is raised by every write while it is set; nothing is written then.
    """

    def __init__(self) -> None:
        self.broken: Exception | None = None
        self.writes = 0
        self._owner = ""
        self._rows: dict[JournalId, _Row] = {}
        self._beats: dict[str, int] = {}
        self._wished = 0
        self._listeners: list[Callable[[], None]] = []

    async def open(self, owner: str) -> None:
        """Be *owner*."""
        self._owner = owner
        self._beats.setdefault(owner, 0)

    async def close(self) -> None:
        """There is nothing to be done."""

    async def create(
        self, journal: Journal, entries: Sequence[NewEntry] = (), *, is_ours: bool = False
    ) -> Journal:
        """Keep a new journal with its first entries."""
        self._check()
        if (known := self._rows.get(journal.id)) is not None:
            return known.journal
        if (other := await self.find(journal.kind, journal.namespace, journal.name)) is not None:
            raise NameTaken(f"{journal.kind} {other.namespace}/{other.name}")
        is_ours = is_ours or journal.is_draft
        row = _Row(structs.replace(journal, owner="", fence=0, last=len(entries)), {}, [])
        row.entries.update(_numbered(entries, 0))
        self._rows[journal.id] = row
        if is_ours:
            self._give(row)
        else:
            self._tell()
        return row.journal

    async def publish(self, id_: JournalId, *, is_ours: bool = False) -> Journal | None:
        """Let a draft be free, or *is_ours*."""
        self._check()
        if (row := self._rows.get(id_)) is None:
            return None
        if row.journal.is_draft:
            row.change(is_draft=False)
            self._give(row) if is_ours else self._free(row)
        return row.journal

    async def take(self, id_: JournalId) -> Journal | None:
        """Have the right to append to a draft."""
        self._check()
        row = self._rows.get(id_)
        if row is None or not row.journal.is_draft:
            return None
        self._give(row)
        return row.journal

    async def append(self, appends: Sequence[Append]) -> set[JournalId]:
        """All of them; returns those that came too late."""
        self._check()
        self.writes += 1
        assert len({append.id for append in appends}) == len(appends), "a journal twice"
        return {append.id for append in appends if not self._append(append)}

    def _append(self, append: Append) -> bool:
        row = self._rows.get(append.id)
        if row is None or row.journal.fence != append.fence or row.journal.last < append.after:
            return False
        row.entries = dict(_numbered(append.entries, append.after)) | row.entries
        row.entries = {n: row.entries[n] for n in sorted(row.entries.keys() - {*append.replaces})}
        row.wishes = [wish for wish in row.wishes if wish.number > append.heard]
        row.change(last=max(row.journal.last, append.last))
        if append.head is not None:
            row.change(head=append.head)
        if append.ended_at is not None:
            row.change(ended_at=append.ended_at, owner="")
            row.wishes = []
        return True

    async def claim(self, kind: Kind, most: int) -> list[Journal]:
        """Have free journals, the oldest first."""
        self._check()
        free = [
            row
            for _, row in sorted(self._rows.items())
            if row.is_open and row.journal.kind == kind and not row.journal.owner
        ]
        for row in free[: min(most, CLAIMS_MAX)]:
            self._give(row)
        return [row.journal for row in free[: min(most, CLAIMS_MAX)]]

    async def release(self, but: Collection[tuple[JournalId, int]] = ()) -> int:
        """Let all of ours be free but *but*."""
        self._check()
        kept = set(but)
        ours = [
            row for row in self._of(self._owner) if (row.journal.id, row.journal.fence) not in kept
        ]
        for row in ours:
            self._free(row)
        return len(ours)

    async def beat(self) -> dict[str, int]:
        """Say that our owner lives."""
        self._check()
        self._beats[self._owner] = self._beats.get(self._owner, 0) + 1
        return dict(self._beats)

    async def fence(self, owner: str) -> int:
        """Let all journals of *owner* be free."""
        self._check()
        if owner != self._owner:
            self._beats.pop(owner, None)
        theirs = self._of(owner)
        for row in theirs:
            self._free(row)
        return len(theirs)

    async def wish(self, id_: JournalId, body: bytes) -> int:
        """Want something of the owner."""
        self._check()
        row = self._rows.get(id_)
        if row is None or not row.is_open:
            return 0
        if len(row.wishes) >= WISHES_MAX:
            raise TooManyWishes(f"{row.journal.kind} {row.journal.namespace}/{row.journal.name}")
        self._wished += 1
        row.wishes.append(Wish(self._wished, body))
        self._tell()
        return self._wished

    async def wishes(self) -> dict[JournalId, list[Wish]]:
        """What is wanted of us and was not heard."""
        return {row.journal.id: list(row.wishes) for row in self._of(self._owner) if row.wishes}

    async def get(self, id_: JournalId) -> Journal | None:
        """One journal."""
        row = self._rows.get(id_)
        return None if row is None else row.journal

    async def find(self, kind: Kind, namespace: str, name: str) -> Journal | None:
        """The one of that name."""
        wanted = (kind, namespace, name)
        for row in self._rows.values():
            if (row.journal.kind, row.journal.namespace, row.journal.name) == wanted:
                return row.journal
        return None

    async def page(
        self,
        kind: Kind,
        namespace: str | None = None,
        limit: int = 100,
        before: JournalId | None = None,
        is_over: bool | None = None,
    ) -> list[Journal]:
        """The newest first, without specs."""
        found = [
            structs.replace(row.journal, spec=b"")
            for id_, row in sorted(self._rows.items(), reverse=True)
            if row.journal.kind == kind
            and not row.journal.is_draft
            and namespace in (None, row.journal.namespace)
            and (before is None or id_ < before)
            and is_over in (None, row.journal.is_over)
        ]
        return found[: min(limit, PAGE_MAX)]

    async def entries(
        self,
        id_: JournalId,
        part: int | None = None,
        after: int = 0,
        limit: int = PAGE_MAX,
        covering: int | None = None,
    ) -> list[Entry]:
        """In the order of their numbers."""
        row = self._rows.get(id_)
        found: list[Entry] = []
        long = 0
        for entry in row.entries.values() if row is not None else ():
            is_asked = part in (None, entry.part) and entry.number > after
            if not is_asked or not (covering is None or entry.low <= covering <= entry.high):
                continue
            long += len(entry.body)
            if len(found) >= min(limit, PAGE_MAX) or (found and long > PAGE_BYTES_MAX):
                break
            found.append(entry)
        return found

    async def size(self, id_: JournalId) -> Size:
        """Looks at every entry."""
        row = self._rows.get(id_)
        entries = row.entries.values() if row is not None else ()
        return Size(len(entries), sum(len(entry.body) for entry in entries))

    async def delete(self, id_: JournalId) -> bool:
        """Forget one that is over or a draft."""
        self._check()
        row = self._rows.get(id_)
        if row is None or row.is_open:
            return False
        del self._rows[id_]
        return True

    async def sweep(self, now: float, over_s: float, draft_s: float) -> int:
        """Forget what is old."""
        self._check()
        old = [
            id_
            for id_, row in self._rows.items()
            if (row.journal.is_over and row.journal.ended_at <= now - over_s)
            or (row.journal.is_draft and row.journal.created_at <= now - draft_s)
        ]
        for id_ in old:
            del self._rows[id_]
        return len(old)

    async def listen(self, told: Callable[[], None]) -> None:
        """Whoever writes is in this process."""
        self._listeners.append(told)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._listeners.remove(told)

    def _check(self) -> None:
        if self.broken is not None:
            raise self.broken

    def _of(self, owner: str) -> list[_Row]:
        return [row for row in self._rows.values() if row.is_open and row.journal.owner == owner]

    def _give(self, row: _Row) -> None:
        self._beats.setdefault(self._owner, 0)
        row.change(owner=self._owner, fence=row.journal.fence + 1)

    def _free(self, row: _Row) -> None:
        row.change(owner="", fence=row.journal.fence + 1)
        self._tell()

    def _tell(self) -> None:
        for told in self._listeners:
            told()


def _numbered(entries: Sequence[NewEntry], after: int) -> Iterator[tuple[int, Entry]]:
    for number, new in enumerate(entries, start=after + 1):
        yield number, Entry(number, new.part, new.low, new.high, new.body)
