"""Events in memory, by the rules of `Store`: for tests, and gone with the process."""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from msgspec import Struct, structs

from dayfly_pool.errors import StoreFailed
from dayfly_pool.models import FunctionId, InvocationId
from dayfly_pool.store.events import (
    PAGE_MAX,
    Accepted,
    Attempt,
    Ended,
    Event,
    Key,
    Lease,
    Shown,
    State,
    Written,
)


class _Row(Struct):
    row: int
    event: Event
    expires_at: float
    state: State = State.WAITING
    at: float = 0.0
    fence: int = 0
    attempts: int = 0
    owner: str = ""
    body: bytes = b""
    result: bytes = b""
    result_body: bytes = b""
    failures: list[Attempt] = []


class MemoryEvents:
    """See `Store`. What it holds outlives `close`, as a file would.

    *broken* is raised by every write while it is set; nothing is written then.
    """

    def __init__(self) -> None:
        self.broken: StoreFailed | None = None
        self.writes = 0
        self._owner = ""
        self._rows: dict[int, _Row] = {}
        self._keys: dict[tuple[FunctionId, str], tuple[Key, InvocationId]] = {}
        self._beats: dict[str, int] = {}
        self._last = 0
        self._listeners: list[Callable[[FunctionId], None]] = []

    async def open(self, owner: str) -> None:
        """Be *owner*."""
        self._owner = owner
        self._beats.setdefault(owner, 0)

    async def close(self) -> None:
        """There is nothing to be done."""

    async def write(
        self,
        now: float,
        ended: Sequence[Ended] = (),
        accepted: Sequence[Event] = (),
        wanted: Mapping[FunctionId, int] | None = None,
    ) -> Written:
        """All of it or nothing, in this order."""
        self._check()
        self.writes += 1
        late = {(end.row, end.fence) for end in ended if not self._end(end)}
        then = [event for e in ended if (e.row, e.fence) not in late for event in e.then]
        for event in then:
            self._accept(event)
        found = [self._accept(event) for event in accepted]
        due = Counter(event.function for event in then)
        for row in self._in(State.DELAYED):
            if row.at <= now:
                row.state = State.WAITING
                due[row.event.function] += 1
        leased = [lease for f, n in (wanted or {}).items() for lease in self._lease(f, n)]
        next_due = min((row.at for row in self._in(State.DELAYED)), default=None)
        return Written(found, late, leased, due, next_due)

    async def fetch(self, lease: Lease) -> Lease:
        """No body is kept apart here."""
        return lease

    async def cancel(self, id_: InvocationId, now: float) -> Shown | None:
        """End it, unless it has ended; as it was before."""
        self._check()
        row = self._find(id_)
        if row is None:
            return None
        before = _shown(row)
        if not row.state.is_over:
            row.state, row.at = State.CANCELLED, now
        return before

    async def redrive(
        self, function: FunctionId, ids: Sequence[InvocationId] | None, now: float
    ) -> int:
        """Let dead events wait again."""
        self._check()
        number = 0
        for row in self._in(State.DEAD):
            if row.event.function == function and (ids is None or row.event.id in ids):
                row.state, row.attempts = State.WAITING, 0
                row.expires_at = now + row.event.age_s
                number += 1
        return number

    async def get(self, id_: InvocationId) -> Shown | None:
        """One event."""
        row = self._find(id_)
        return None if row is None else _shown(row)

    async def page(
        self,
        function: FunctionId | None = None,
        state: State | None = None,
        limit: int = 100,
        before: InvocationId | None = None,
    ) -> list[Shown]:
        """The newest first; without bodies."""
        states = set(State) if state is None else {state}
        if state is State.WAITING:
            states.add(State.DELAYED)
        first = self._find(before) if before is not None else None
        found = [
            structs.replace(_shown(row), body=b"", result_body=b"", failures=[])
            for row in reversed(self._rows.values())
            if row.state in states
            and function in (None, row.event.function)
            and (before is None or (first is not None and row.row < first.row))
        ]
        return found[: min(limit, PAGE_MAX)]

    async def counts(self) -> dict[tuple[FunctionId, State], int]:
        """How many there are of each function in each state."""
        return dict(Counter((row.event.function, row.state) for row in self._rows.values()))

    async def oldest(self, functions: Iterable[FunctionId]) -> dict[FunctionId, float]:
        """When the next waiting event of each was accepted, where one waits."""
        waiting = {f: self._waiting(f) for f in functions}
        return {f: rows[0].event.accepted_at for f, rows in waiting.items() if rows}

    async def known(self, function: FunctionId, keys: Sequence[str]) -> dict[str, InvocationId]:
        """Which events the *keys* stand for."""
        found = {text: self._keys.get((function, text)) for text in keys}
        return {text: known[1] for text, known in found.items() if known is not None}

    async def sweep(self, now: float, over_s: float, dead_s: float) -> int:
        """Forget what is old."""
        self._check()
        self._keys = {k: (key, id_) for k, (key, id_) in self._keys.items() if key.until > now}
        old = [
            row.row
            for row in self._rows.values()
            if row.state.is_over and row.at <= now - (dead_s if row.state is State.DEAD else over_s)
        ]
        for row in old[:PAGE_MAX]:
            del self._rows[row]
        return len(old[:PAGE_MAX])

    async def beat(self) -> dict[str, int]:
        """Say that our owner lives."""
        self._check()
        self._beats[self._owner] = self._beats.get(self._owner, 0) + 1
        return dict(self._beats)

    async def release(self, but: Collection[tuple[int, int]]) -> Counter[FunctionId]:
        """Give back our leases but *but*."""
        self._check()
        ours = [row for row in self._in(State.RUNNING) if row.owner == self._owner]
        left = [row for row in ours if (row.row, row.fence) not in but]
        for row in left:
            row.state = State.WAITING
        return Counter(row.event.function for row in left)

    async def listen(self, told: Callable[[FunctionId], None]) -> None:
        """Whoever writes is in this process."""
        self._listeners.append(told)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._listeners.remove(told)

    async def fence(self, owner: str) -> Counter[FunctionId]:
        """Take all leases from *owner*."""
        self._check()
        if owner != self._owner:
            self._beats.pop(owner, None)
        taken = [row for row in self._in(State.RUNNING) if row.owner == owner]
        for row in taken:
            row.state = State.WAITING
        return Counter(row.event.function for row in taken)

    def _check(self) -> None:
        if self.broken is not None:
            raise self.broken

    def _in(self, state: State) -> list[_Row]:
        return [row for row in self._rows.values() if row.state is state]

    def _find(self, id_: InvocationId) -> _Row | None:
        return next((row for row in self._rows.values() if row.event.id == id_), None)

    def _waiting(self, function: FunctionId) -> list[_Row]:
        rows = [row for row in self._in(State.WAITING) if row.event.function == function]
        return sorted(rows, key=lambda row: (-row.event.priority, row.row))

    def _end(self, end: Ended) -> bool:
        row = self._rows.get(end.row)
        if row is None or row.fence != end.fence or row.state is not State.RUNNING:
            return False
        row.state, row.at = end.state, end.at
        row.attempts += end.is_counted
        row.result, row.result_body = end.result, end.body
        if end.attempt is not None:
            row.failures = [*row.failures, end.attempt]
        if end.state is State.SUCCEEDED:
            row.body = b""
        return True

    def _accept(self, event: Event) -> Accepted:
        if event.key is not None:
            known = self._keys.get((event.function, event.key.text))
            if known is not None and known[0].until > event.accepted_at:
                key, id_ = known
                is_other = key.fingerprint != event.key.fingerprint
                return Accepted(id_, is_new=False, is_other=is_other)
            self._keys[event.function, event.key.text] = event.key, event.id
        for each in event.known_as:
            before, _ = self._keys.get((event.function, each.text), (each, ""))
            key = structs.replace(each, until=max(each.until, before.until))
            self._keys[event.function, each.text] = key, event.id
        self._last += 1
        expires_at = event.accepted_at + event.age_s
        for told in self._listeners:
            told(event.function)
        self._rows[self._last] = _Row(self._last, event, expires_at, body=event.body)
        return Accepted(event.id)

    def _lease(self, function: FunctionId, most: int) -> list[Lease]:
        leased = []
        for row in self._waiting(function)[:most]:
            row.state, row.owner = State.RUNNING, self._owner
            row.fence += 1
            leased.append(
                Lease(
                    row=row.row,
                    fence=row.fence,
                    id=row.event.id,
                    function=function,
                    meta=row.event.meta,
                    body=row.body,
                    attempts=row.attempts,
                    accepted_at=row.event.accepted_at,
                    expires_at=row.expires_at,
                )
            )
        return leased


def _shown(row: _Row) -> Shown:
    return Shown(
        id=row.event.id,
        function=row.event.function,
        state=row.state,
        priority=row.event.priority,
        accepted_at=row.event.accepted_at,
        expires_at=row.expires_at,
        ready_at=row.at if row.state is State.DELAYED else 0.0,
        finished_at=row.at if row.state.is_over else 0.0,
        attempts=row.attempts,
        fence=row.fence,
        meta=row.event.meta,
        body=row.body,
        result=row.result,
        result_body=row.result_body,
        failures=row.failures,
    )
