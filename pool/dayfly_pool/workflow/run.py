"""One run while a server goes on with it: the engine decides, the pool runs, the journal remembers.

What has happened since the last write is one entry of the run's journal, and nothing that it leads
to is begun before it is on the disk (see `facts`). After a crash the entries are fed to the engine
again, and what was under way is run again; a step whose end was written never is.

One thing does not wait: a step that takes what another left as files is begun while the disk is
still at these. What it leads to is written after the other's end, so to a crash it was under way.
"""

import asyncio
import contextlib
import hashlib
import hmac
import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Final, Literal, assert_never

import msgspec
from msgspec import Struct

from dayfly_pool.errors import BadInput, Draining, PlatformError, StoreFailed
from dayfly_pool.journal import Journals
from dayfly_pool.models import FunctionId
from dayfly_pool.store.journals import Entry, Journal, JournalId, NewEntry, Wish
from dayfly_pool.workflow import facts, observing
from dayfly_pool.workflow.attempts import Attempts, Means, StoredRun
from dayfly_pool.workflow.engine import Run
from dayfly_pool.workflow.facts import (
    Called,
    Cancel,
    CancelAsked,
    Command,
    Decided,
    Ended,
    Expect,
    Fact,
    Failed,
    Finish,
    Invoke,
    Passed,
    RunBegan,
    Started,
)
from dayfly_pool.workflow.graph import Graph, check
from dayfly_pool.workflow.handover import Left
from dayfly_pool.workflow.observing import Seen
from dayfly_pool.workflow.plan import Definition
from dayfly_pool.workflow.provenance import statement
from dayfly_pool.workflow.tree import Shown

log = logging.getLogger("dayfly.runs")
LOG: Final = 0
"""The part of a run's journal that its facts are in."""

AT_ONCE: Final = 256
"""Steps of one run that may be at the pool at the same moment."""

FACTS_AT_ONCE: Final = 512
ENTRY_BYTES: Final = 4 << 20
"""Of facts that are written at once; but one at least."""

SNAPSHOT_FACTS: Final = 8192
SNAPSHOT_BYTES_MAX: Final = 12 << 20
"""Of a run with larger values every fact is kept."""

HEAD_RESULTS_BYTES_MAX: Final = 32 * 1024
LAST_WRITE_S: Final = 2.0
STARTED_S: Final = 0.5
"""A step that runs for longer than this is told to have started."""

HEAD_S: Final = 1.0
RunState = Literal[
    "Pending", "Running", "Succeeded", "Completed", "Failed", "TimedOut", "Cancelled"
]
LEFT, KEPT, PROVENANCE = 1, 2, 3
"""Parts of the journal: versions of workspaces, artifacts that must be kept for the run, and what
was signed at its end."""


class RunStatus(Struct, kw_only=True, rename="camel"):
    """How far a run is. Times are Unix seconds, 0.0 for what has not happened."""

    state: RunState = "Pending"
    workflow: str = ""
    succeeded: int = 0
    """Attempts of steps."""

    failed: int = 0
    cached: int = 0
    started_at: float = 0.0
    ended_at: float = 0.0
    kind: str = ""
    message: str = ""
    results: dict[str, Any] = {}
    is_cut: bool = False
    """Whether there are more results than go in here: the engine has them."""


class AskCancel(Struct, frozen=True, tag="cancel"):
    """End it."""

    by: str = ""
    hard: bool = False


class Call(Struct, frozen=True, tag="call"):
    """What a callback brought."""

    key: str
    attempt: int
    value: Any = None


class Decide(Struct, frozen=True, tag="decide"):
    """Somebody's approval, or not."""

    key: str
    attempt: int
    is_approved: bool
    by: str = ""
    note: str = ""


Asked = AskCancel | Call | Decide


class Counts(Struct, array_like=True):
    """How attempts ended, as far as they were written down."""

    succeeded: int = 0
    failed: int = 0
    cached: int = 0

    def take(self, fact: Fact) -> None:
        """One more, if it is the end of one."""
        if isinstance(fact, Ended):
            self.succeeded += 1
            self.cached += fact.was_cached
        elif isinstance(fact, Failed):
            self.failed += 1


_ENTRY: Final = msgspec.msgpack.Decoder(tuple[bool, msgspec.Raw, list[Seen]])
_FACTS: Final = msgspec.msgpack.Decoder(list[bytes])
_SNAPSHOT: Final = msgspec.msgpack.Decoder(tuple[bytes, Counts])


def token_of(stored: StoredRun, key: str, attempt: int) -> str:
    """What whoever is to call back must know."""
    text = f"{key}\n{attempt}".encode()
    return hmac.digest(stored.secret, text, "sha256").hex()[:40]


def entry_of(new: list[bytes], seen: Sequence[Seen] = ()) -> NewEntry:
    """What has happened, as an entry of the journal: facts, encoded."""
    return NewEntry(LOG, body=msgspec.msgpack.encode((False, new, seen)))


def facts_in(entries: Iterable[Entry]) -> Iterator[Fact]:
    """What the *entries* tell, but for what a snapshot has taken the place of."""
    for entry in entries:
        is_snapshot, raw, _ = _ENTRY.decode(entry.body)
        for encoded in () if is_snapshot else _FACTS.decode(raw):
            yield facts.decode(encoded)


def seen_in(entries: Iterable[Entry]) -> list[Seen]:
    """What the steps that the *entries* tell of were made of."""
    found: list[Seen] = []
    for entry in entries:
        is_snapshot, _, seen = _ENTRY.decode(entry.body)
        found = seen if is_snapshot else found + seen
    return found


def replayed(definition: Definition, entries: list[Entry]) -> tuple[Run, Counts]:
    """The engine as the *entries* have it. Raises `StoreFailed` for a damaged one."""
    run, counts = Run(definition), Counts()
    for entry in entries:
        if entry.damage:
            raise StoreFailed(f"entry {entry.number} of the run: {entry.damage}")
        is_snapshot, raw, _ = _ENTRY.decode(entry.body)
        if is_snapshot:
            snapshot, counts = _SNAPSHOT.decode(raw)
            run = Run.restore(snapshot, definition)
            continue
        for encoded in _FACTS.decode(raw):
            fact = facts.decode(encoded)
            counts.take(fact)
            run.feed(fact)
    return run, counts


async def log_of(journals: Journals, id_: JournalId, part: int = LOG) -> list[Entry]:
    """All entries of a part of a run's journal."""
    entries: list[Entry] = []
    while found := await journals.store.entries(
        id_, part=part, after=entries[-1].number if entries else 0
    ):
        entries += found
    return entries


def shared_in(definition: Definition) -> frozenset[str]:
    """The workspaces that steps may have beside one another: those that no chain of steps has."""
    spec = definition.root
    graph = check(spec, definition.tasks, definition.workflows)
    shared = set()
    for workspace in spec.workspaces:
        users = [n for n in graph.order if workspace in graph.steps[n].workspaces.values()]
        finals = [
            n
            for n in range(graph.finally_from, len(graph.steps))
            if workspace in graph.steps[n].workspaces.values()
        ]
        is_plain = all(
            graph.steps[n].matrix is None and graph.steps[n].workflow is None for n in users
        )
        if finals or not is_plain or not _is_chain(graph, users):
            shared.add(workspace)
    return frozenset(shared)


def _is_chain(graph: Graph, users: list[int]) -> bool:
    """Whether each comes after the one before it."""
    places = {n: at for at, n in enumerate(graph.order)}
    for first, second in pairwise(users):
        todo, seen = [second], {second}
        while todo and first not in seen:
            for other in graph.needs[todo.pop()]:
                if other not in seen and places.get(other, -1) >= places[first]:
                    seen.add(other)
                    todo.append(other)
        if first not in seen:
            return False
    return True


def _outcome(end: Ended | Failed) -> str:
    if isinstance(end, Ended):
        return "cached" if end.was_cached else "succeeded"
    return "failed" if end.is_counted else "not run"


def _fact_of(wish: Wish, now: float) -> Fact:
    match msgspec.json.decode(wish.body, type=Asked):
        case AskCancel(by=by, hard=hard):
            return CancelAsked(at=now, by=by, is_hard=hard)
        case Call(key=key, attempt=attempt, value=value):
            return Called(at=now, key=key, attempt=attempt, value=value)
        case Decide(key=key, attempt=attempt, is_approved=is_approved, by=by, note=note):
            return Decided(
                at=now, key=key, attempt=attempt, is_approved=is_approved, by=by, note=note
            )
        case wanted:
            assert_never(wanted)


class LiveRun:
    """One run that is ours to go on with."""

    def __init__(self, journal: Journal, means: Means) -> None:
        self.id, self.namespace = journal.id, journal.namespace
        self.journal = msgspec.structs.replace(journal, spec=b"")
        self.stored = msgspec.json.decode(journal.spec, type=StoredRun)
        self.status = msgspec.json.decode(journal.head, type=RunStatus)
        self.name = f"{journal.namespace}/{journal.name}"
        self._means = means
        self._pool, self._journals, self._clock = means.pool, means.journals, means.clock
        self._attempts = Attempts(journal.id, self.stored, means)
        self.engine = Run(self.stored.definition)
        self.left = asyncio.Event()
        """Set when it does not go on here any more, whether it is over or not."""

        self.is_ready = False
        """Whether the engine knows all that is written down."""

        self._counts = Counts()
        self._facts: deque[tuple[Fact, int]] = deque()
        """What has happened, each with the number of the wish that it is, or 0."""

        self._kept: list[bytes] = []
        """Fed, encoded, and not written yet."""

        self._kept_bytes = 0
        self._is_urgent = False
        """Whether what is kept is more than for people."""

        self._pending: deque[Invoke] = deque()
        self._running: dict[str, tuple[int, asyncio.Task[None]]] = {}
        """By key: the attempt, and what runs it."""

        self._dropped: set[tuple[str, int]] = set()
        """Attempts that were stopped before they began."""

        self.steps_ended: Counter[str] = Counter()
        """Attempts that have ended here, by how."""

        self.expected: dict[str, Expect] = {}
        self._finish: Finish | None = None
        self._last, self._said_at = journal.last, 0.0
        self._heard = self._fed = self._granted = 0
        """Numbers of the last wish that we know of, that the engine does, that is written down."""

        self._written: list[int] = []
        self._since_snapshot, self._is_held = 0, False
        self._wake = asyncio.Event()
        self._group: asyncio.TaskGroup

    @property
    def functions(self) -> set[FunctionId]:
        """Those of the pool that its steps have used."""
        return self._attempts.functions

    # ---- its life -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Go on with it to its end. Raises `Late`; cancelled, it goes on later."""
        entries = await log_of(self._journals, self.id)
        engine, counts = await asyncio.to_thread(replayed, self.stored.definition, entries)
        self.engine, self._counts, self.is_ready = engine, counts, True
        self._count()
        self._written = [entry.number for entry in entries]
        self._attempts.seen = seen_in(entries)
        if self.stored.definition.root.workspaces:
            self._attempts.shared = await asyncio.to_thread(shared_in, self.stored.definition)
        for entry in await log_of(self._journals, self.id, LEFT):
            for left in msgspec.msgpack.decode(entry.body, type=list[Left]):
                self._attempts.versions[left.workspace, left.key] = left.version
        self._since_snapshot = engine.taken
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                self._attempts.spawn = group.create_task
                self._carry_out(engine.outstanding())
                try:
                    await self._go_on()
                finally:
                    self._stop_all()
        except ExceptionGroup as several:
            raise several.exceptions[0] from several
        except asyncio.CancelledError:
            with contextlib.suppress(TimeoutError, PlatformError):
                async with asyncio.timeout(LAST_WRITE_S):
                    await self._write_last()  # what has ended need not run again
            raise
        if self._finish is not None:
            await self._end(self._finish)

    def hold(self) -> None:
        """Begin nothing more: the server goes down, and another goes on with it."""
        self._is_held = True
        self._wake.set()

    def hear(self, wish: Wish) -> None:
        """Somebody wants something of it."""
        if wish.number <= self._heard:
            return
        self._heard = wish.number
        try:
            asked = _fact_of(wish, self._clock.now())
            facts.encode(asked)
        except (BadInput, ValueError, OverflowError, RecursionError) as error:
            extra = {"run": self.name, "why": str(error)}
            log.warning("what is wanted of a run cannot be written down", extra=extra)
            return
        self._note(asked, wish.number)

    def tree(self) -> Shown | None:
        """Its steps, as they are now."""
        return self.engine.tree()

    async def _go_on(self) -> None:
        """Feed what happens, write it down, do what follows; until the run is over."""
        while self._finish is None and not self._is_at_rest():
            self._wake.clear()
            self._begin_some()
            if not self._facts and not self._is_due():
                wait_s = self._wait_s()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._wake.wait()
            commands = self._feed()
            if self._attempts.has_unsettled and self._fed == self._granted:
                self._carry_out(commands)
                commands = []
            await self._write()
            self._carry_out(commands)

    def _stop_all(self) -> None:
        """Nothing of it is under way here any more; its sandboxes are gone, too."""
        for key, (attempt, task) in self._running.items():
            self._pool.stop(self._attempts.invocation(key, attempt), "its run does not go on here")
            task.cancel()

    def _is_at_rest(self) -> bool:
        """Whether it is held, and all that has happened is written."""
        return self._is_held and not (self._running or self._facts or self._kept)

    def _is_due(self) -> bool:
        at = self.engine.wake_at
        return at is not None and at <= self._clock.now()

    def _wait_s(self) -> float | None:
        at = self.engine.wake_at
        return None if at is None else max(0.0, at - self._clock.now()) + 0.001

    def _feed(self) -> list[Command]:
        """What follows from what has happened; what made a difference is kept to be written."""
        commands: list[Command] = []
        if self._is_due():
            self._facts.append((Passed(at=self._clock.now()), 0))
        for _ in range(min(FACTS_AT_ONCE, len(self._facts))):
            fact, wish = self._facts.popleft()
            before = self.engine.taken
            commands += self.engine.feed(fact)
            self._fed = max(self._fed, wish)
            if self.engine.taken == before:
                continue
            self._keep(fact)
            if self._kept_bytes >= ENTRY_BYTES:
                break
        return commands

    def _keep(self, fact: Fact) -> None:
        encoded = facts.encode(fact)
        self._kept.append(encoded)
        self._kept_bytes += len(encoded)
        self._is_urgent |= not isinstance(fact, Started)
        self._counts.take(fact)
        self._count()
        if isinstance(fact, Called | Decided):
            self.expected.pop(fact.key, None)

    def _count(self) -> None:
        counts, status = self._counts, self.status
        status.succeeded, status.failed = counts.succeeded, counts.failed
        status.cached = counts.cached

    # ---- the journal --------------------------------------------------------------------------

    async def _write(self) -> None:
        if self._fed == self._granted and not self._kept:
            return
        if self._fed == self._granted and not self._is_urgent and self._running:
            return  # for people: with the next
        self._since_snapshot += len(self._kept)
        entry, replaced = None, []
        if self._since_snapshot > SNAPSHOT_FACTS:
            snapshot = await asyncio.to_thread(self.engine.snapshot)
            self._since_snapshot = 0
            if len(snapshot) <= SNAPSHOT_BYTES_MAX:
                told = (snapshot, self._counts)
                body = msgspec.msgpack.encode((True, told, self._attempts.seen))
                entry, replaced = NewEntry(LOG, body=body), self._written
                self._written = []
        if entry is None and self._kept:
            entry = entry_of(self._kept, self._attempts.new_seen)
        self._kept, self._kept_bytes, self._is_urgent = [], 0, False
        self._granted, self._attempts.new_seen = self._fed, []
        if entry is not None:
            self._written.append(self._last + 1)
        await self._attempts.settle()
        entries = [*([entry] if entry is not None else []), *self._others()]
        self._last += len(entries)
        await self._journals.append(
            self.id, entries, head=self._head(), replaces=replaced, heard=self._granted
        )

    async def _write_last(self) -> None:
        """What has happened until now. Whatever follows from it is another's to do."""
        while self._facts:
            self._feed()
            await self._write()
        self._is_urgent = True
        await self._write()

    def _others(self) -> list[NewEntry]:
        """What else is to be known after a crash."""
        entries, attempts = [], self._attempts
        if attempts.left:
            entries.append(NewEntry(LEFT, body=msgspec.msgpack.encode(attempts.left)))
        if attempts.uris:
            entries.append(NewEntry(KEPT, body=msgspec.msgpack.encode(attempts.uris)))
        attempts.left, attempts.uris = [], []
        return entries

    def _head(self) -> bytes | None:
        """The summary, now and then."""
        now = self._clock.now()
        if now - self._said_at < HEAD_S:
            return None
        self._said_at = now
        self.status.state = "Running"
        return msgspec.json.encode(self.status)

    async def _end(self, finish: Finish) -> None:
        now = self._clock.now()
        self.status.state, self.status.ended_at = finish.status, now
        self.status.kind, self.status.message = finish.kind, finish.message
        self.status.results = finish.results
        if len(msgspec.json.encode(finish.results)) > HEAD_RESULTS_BYTES_MAX:
            self.status.results, self.status.is_cut = {}, True
        head = msgspec.json.encode(self.status)
        await self._attempts.settle()
        entries = self._others()
        if self._kept:
            entries.append(entry_of(self._kept, self._attempts.new_seen))
        entries += await self._signed(finish, now)
        await self._journals.append(self.id, entries, head=head, ended_at=now, heard=self._heard)
        log.info("run over", extra={"run": self.name, "state": finish.status, "why": finish.kind})

    async def _signed(self, finish: Finish, now: float) -> list[NewEntry]:
        """The run's provenance; none if that cannot be told, which is no reason not to end."""
        try:
            entries = await log_of(self._journals, self.id)
            envelope = await asyncio.to_thread(self._sign, finish, now, entries)
        except Exception:
            log.exception("a run has no provenance", extra={"run": self.name})
            return []
        return [NewEntry(PROVENANCE, body=envelope)]

    def _sign(self, finish: Finish, now: float, entries: list[Entry]) -> bytes:
        told = [*facts_in(entries), *map(facts.decode, self._kept)]
        began = next((fact for fact in told if isinstance(fact, RunBegan)), None)
        tree = self.engine.tree()
        assert tree is not None
        history = hashlib.sha256()
        for entry in entries:
            history.update(entry.body)
        about = {"name": self.stored.metadata.name, "namespace": self.namespace}
        observed = observing.observed(
            about | {"workflow": self.stored.workflow},
            msgspec.json.encode(self.stored.definition, order="deterministic"),
            tree,
            [fact for fact in told if isinstance(fact, Ended)],
            self._attempts.seen,
            params=began.params if began is not None else {},
            results=finish.results,
            status=finish.status,
            by=began.by if began is not None else "",
            began_at=self.status.started_at,
            ended_at=now,
            internal=self._means.internal,
            history_sha256=history.hexdigest(),
        )
        return self._means.sign(statement(observed))

    # ---- commands -----------------------------------------------------------------------------

    def _carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Invoke():
                    self._pending.append(command)
                case Expect():
                    self.expected[command.key] = command
                case Cancel():
                    self._cancel(command)
                case Finish():
                    self._finish = command
                case _:
                    assert_never(command)
        self._begin_some()

    def _begin_some(self) -> None:
        stopping: list[Invoke] = []
        """Their last attempts are being stopped still."""

        while self._pending and len(self._running) < AT_ONCE and not self._is_held:
            invoke = self._pending.popleft()
            if (invoke.key, invoke.attempt) in self._dropped:
                self._dropped.discard((invoke.key, invoke.attempt))
                continue
            if invoke.key in self._running:
                stopping.append(invoke)
                continue
            task = self._group.create_task(self._attempt(invoke))
            self._running[invoke.key] = invoke.attempt, task
        self._pending.extendleft(reversed(stopping))

    def _cancel(self, command: Cancel) -> None:
        if self.expected.pop(command.key, None) is not None:
            return
        attempt, _ = self._running.get(command.key, (-1, None))
        if attempt == command.attempt:
            self._attempts.stop(command.key, command.attempt)
            return
        self._dropped.add((command.key, command.attempt))
        now = self._clock.now()
        self._note(
            Failed(
                at=now, key=command.key, attempt=command.attempt, kind="Stopped", is_counted=False
            )
        )

    # ---- steps --------------------------------------------------------------------------------

    async def _attempt(self, invoke: Invoke) -> None:
        """Run one attempt of a step; its end is a fact."""
        loop = asyncio.get_running_loop()
        began_at = self._clock.now()
        saying = loop.call_later(STARTED_S, self._say_started, invoke, began_at)
        try:
            end = await self._attempts.end_of(invoke)
            self.steps_ended[_outcome(end)] += 1
            self._note(end)
        except Draining:
            pass  # it runs again when a server goes on with it
        except Exception as error:
            log.exception("a step fails for a defect of ours", extra={"run": self.name})
            why = f"{type(error).__name__}: the server's log has the cause"
            self._note(self._attempts.failed(invoke, "InternalError", why, is_hopeless=True))
        finally:
            saying.cancel()
            del self._running[invoke.key]
            self._wake.set()

    def _say_started(self, invoke: Invoke, at: float) -> None:
        self._note(Started(at=at, key=invoke.key, attempt=invoke.attempt))

    def _note(self, fact: Fact, wish: int = 0) -> None:
        self._facts.append((fact, wish))
        self._wake.set()
