"""Workflows that are declared, and their runs: those that there are, and those that go on here."""

import asyncio
import logging
import secrets
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import msgspec
from msgspec import Struct, structs

from dayfly_pool.errors import (
    BadInput,
    NameTaken,
    PlatformError,
    RunIsOver,
    RunNotFound,
    WorkflowNotFound,
)
from dayfly_pool.ids import names_again, new_id
from dayfly_pool.models import FunctionId, Invocation, Metadata, Mounts, Outcome
from dayfly_pool.ours import Ours
from dayfly_pool.store.journals import Entry, Journal, JournalId, NewEntry, Wish
from dayfly_pool.workflow import facts, run
from dayfly_pool.workflow.artifacts import SCHEME
from dayfly_pool.workflow.attempts import Means, StoredRun
from dayfly_pool.workflow.bodies import Body
from dayfly_pool.workflow.engine import RETRIABLE, Run
from dayfly_pool.workflow.garbage import Garbage
from dayfly_pool.workflow.graph import check
from dayfly_pool.workflow.model import TaskSpec, WorkflowSpec
from dayfly_pool.workflow.plan import Definition
from dayfly_pool.workflow.run import Asked, LiveRun, RunStatus
from dayfly_pool.workflow.tree import Shown
from dayfly_pool.workflow.values import bind, check_json, meant

log = logging.getLogger("dayfly.runs")
RUNS_MAX: Final = 1000
"""Of one server, that are not over."""

FUNCTION_IDLE_S: Final = 60.0
WROTE_MAX: Final = 1000
"""Functions that are gone, whose last lines are kept in memory."""

LOOK_FIRST_S: Final = 0.005
LOOK_S: Final = 0.25
SWEEP_S: Final = 10.0
PAGE: Final = 500
KEPT_S: Final = 7 * 86400.0
NESTED_MAX: Final = 100
"""Different workflows that one is made of."""

RETRIES_MAX: Final = 100


class View(Struct, frozen=True):
    """One run, as it is known."""

    journal: Journal
    stored: StoredRun
    status: RunStatus


class Runs:
    """The runs of one server. Use it inside `async with runs.running():`.

    *workflows* and *tasks* are those that are declared, by namespace and name; the service's own.
    """

    def __init__(
        self,
        means: Means,
        workflows: Mapping[tuple[str, str], WorkflowSpec],
        tasks: Mapping[tuple[str, str], TaskSpec],
    ) -> None:
        self._means = structs.replace(means, prepare=self._prepared, once=self._run_once)
        self._pool, self._journals, self._prepare = means.pool, means.journals, means.prepare
        self._once = means.once
        self._workflows, self._declared_tasks = workflows, tasks
        journals = means.journals
        self._clock = journals.clock
        self._live: dict[JournalId, LiveRun] = {}
        self._named: dict[tuple[str, str], LiveRun] = {}
        self._used: dict[FunctionId, float] = {}
        """Functions of steps, and when a run had them last."""

        self._wrote: deque[tuple[str, FunctionId]] = deque()
        """Functions that are gone, whose lines are still there; with the run, if it was one's."""

        self.ended: Counter[str] = Counter()
        """Runs that have ended here, by how."""

        self._steps_ended: Counter[str] = Counter()
        """Attempts of runs that do not go on any more."""

        self._is_held = False
        self._ours = Ours(journals, "run", RUNS_MAX, self._go_on, self._heard)
        self._garbage = Garbage(journals, means.handover, means.cache, means.garbage_s)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Runs"]:
        """Go on with runs while the block runs. Those that are not over then go on later."""
        async with asyncio.TaskGroup() as group:
            sweeping = group.create_task(self._sweep(), name="runs-sweep")
            collecting = group.create_task(self._garbage.run(), name="runs-garbage")
            try:
                async with self._ours.running():
                    yield self
            finally:
                sweeping.cancel()
                collecting.cancel()

    def hold(self) -> None:
        """Begin nothing more."""
        self._is_held = True
        for live in self._live.values():
            live.hold()
            live.left.set()  # nobody waits here any more

    # ---- for callers --------------------------------------------------------------------------

    def definition(self, namespace: str, name: str) -> Definition:
        """A workflow with all that it refers to, as it is now. Raises `WorkflowNotFound`."""
        found: dict[str, WorkflowSpec] = {}
        tasks: dict[str, TaskSpec] = {}
        todo = [name]
        while todo:
            each = todo.pop()
            spec = self._workflows.get((namespace, each))
            if spec is None:
                raise WorkflowNotFound(f"no workflow {namespace}/{each}")
            found[each] = spec
            if len(found) > NESTED_MAX:
                raise BadInput(f"workflow {name!r} is made of over {NESTED_MAX} others")
            for step in (*spec.steps, *spec.finally_):
                if step.workflow is not None and step.workflow not in found:
                    todo.append(step.workflow)
                if step.task is not None and (namespace, step.task) in self._declared_tasks:
                    tasks[step.task] = self._declared_tasks[namespace, step.task]
        return Definition(found[name], found, tasks)

    async def start(
        self, namespace: str, workflow: str, params: dict[str, Any], name: str = "", by: str = ""
    ) -> View:
        """Begin a run; it is on the disk, and will go on, when this returns.

        Raises `WorkflowNotFound`, `BadInput`, `NameTaken`, `StoreFailed`.
        """
        definition = self.definition(namespace, workflow)
        root, tasks = definition.root, definition.tasks
        await asyncio.to_thread(check, root, tasks, definition.workflows, workflow)
        bound = bind(definition.root.params, params)
        name = name or f"{workflow[:50]}-{secrets.token_hex(3)}"
        metadata = _metadata(namespace, name)
        id_ = new_id()
        now = self._clock.now()
        about = {"id": id_, "name": name, "namespace": namespace, "workflow": workflow}
        began = facts.RunBegan(at=now, params=bound, run=about, by=by)
        stored = StoredRun(
            metadata=metadata,
            workflow=workflow,
            definition=definition,
            secret=secrets.token_bytes(32),
        )
        return await self._create(JournalId(id_), stored, [began], now, params=bound)

    async def retry(self, namespace: str, name: str, by: str = "") -> View:
        """Another run, with what succeeded in this. Raises `RunNotFound`, `BadInput`."""
        view = await self.get(namespace, name)
        if view.status.state not in RETRIABLE:
            raise BadInput(f"run {name!r} is {view.status.state}: only what failed is tried again")
        entries = await run.log_of(self._journals, view.journal.id)
        engine, _ = await asyncio.to_thread(run.replayed, view.stored.definition, entries)
        now = self._clock.now()
        before = engine.taken
        asked = facts.RetryAsked(at=now, by=by)
        engine.feed(asked)
        if engine.taken == before:
            raise BadInput(f"run {name!r} never began: start another")
        for part in (run.LEFT, run.KEPT):
            entries += await run.log_of(self._journals, view.journal.id, part)
        id_ = JournalId(new_id())
        for another in names_again(name, RETRIES_MAX):
            stored = msgspec.structs.replace(
                view.stored,
                metadata=_metadata(namespace, another),
                secret=secrets.token_bytes(32),
            )
            with suppress(NameTaken):
                return await self._create(id_, stored, [asked], now, entries)
        raise BadInput(f"run {name!r} was retried {RETRIES_MAX} times: delete some of these runs")

    async def _create(
        self,
        id_: JournalId,
        stored: StoredRun,
        new: list[facts.Fact],
        now: float,
        before: Sequence[Entry] = (),
        params: Any = None,
    ) -> View:
        status = RunStatus(workflow=stored.workflow, started_at=now)
        copied = [NewEntry(entry.part, body=entry.body) for entry in before]
        if uris := artifacts_in(params, stored.metadata.namespace):
            copied.append(NewEntry(run.KEPT, body=msgspec.msgpack.encode(uris)))
        journal = await self._journals.create(
            Journal(
                id=id_,
                kind="run",
                namespace=stored.metadata.namespace,
                name=stored.metadata.name,
                created_at=now,
                head=msgspec.json.encode(status),
                spec=msgspec.json.encode(stored),
            ),
            [*copied, run.entry_of([facts.encode(fact) for fact in new])],
        )
        return View(journal, stored, status)

    async def get(self, namespace: str, name: str) -> View:
        """One run. Raises `RunNotFound`."""
        journal = await self._journals.store.find("run", namespace, name)
        if journal is None:
            raise RunNotFound(f"no run {namespace}/{name}")
        stored = msgspec.json.decode(journal.spec, type=StoredRun)
        return View(journal, stored, self._status(journal))

    async def brief(self, namespace: str, name: str) -> tuple[Journal, RunStatus]:
        """How far a run is. Raises `RunNotFound`.

        Of one that goes on here nothing is read: whoever waits for its end asks again and again.
        """
        if (live := self._named.get((namespace, name))) is not None and not live.status.ended_at:
            return live.journal, self._status(live.journal)
        journal = await self._journals.store.find("run", namespace, name)
        if journal is None:
            raise RunNotFound(f"no run {namespace}/{name}")
        return journal, self._status(journal)

    async def over(self, namespace: str, name: str, wait_s: float) -> tuple[Journal, RunStatus]:
        """As `brief`, when the run is over, or after *wait_s*. Raises `RunNotFound`."""
        pause_s = LOOK_FIRST_S
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while not self._is_held:
                    if (live := self._named.get((namespace, name))) is not None:
                        await live.left.wait()
                    elif (await self.brief(namespace, name))[1].ended_at:
                        break
                    else:
                        await asyncio.sleep(pause_s)  # another server has it, or nobody yet
                        pause_s = min(LOOK_S, pause_s * 2)
        return await self.brief(namespace, name)

    async def page(
        self, namespace: str | None, limit: int, before: JournalId | None
    ) -> Sequence[tuple[Journal, RunStatus]]:
        """The newest first."""
        found = await self._journals.store.page("run", namespace, limit, before)
        return [(journal, self._status(journal)) for journal in found]

    def _status(self, journal: Journal) -> RunStatus:
        live = self._live.get(journal.id)
        if live is not None and not journal.is_over:
            return msgspec.structs.replace(live.status, state="Running", ended_at=0.0, results={})
        return msgspec.json.decode(journal.head, type=RunStatus)

    async def tree(self, view: View) -> Shown | None:
        """Its steps, as they are now."""
        return (await self.engine(view)).tree()

    async def engine(self, view: View) -> Run:
        """What its facts amount to. Not to be fed."""
        live = self._live.get(view.journal.id)
        if live is not None and live.is_ready:
            return live.engine
        entries = await run.log_of(self._journals, view.journal.id)
        engine, _ = await asyncio.to_thread(run.replayed, view.stored.definition, entries)
        return engine

    async def results(self, view: View) -> dict[str, Any]:
        """What it has left; nothing before it is over."""
        if not view.status.is_cut:
            return view.status.results
        commands = (await self.engine(view)).outstanding()
        return next((each.results for each in commands if isinstance(each, facts.Finish)), {})

    async def told(self, view: View) -> list[facts.Fact]:
        """What its journal tells, but for what a snapshot has taken the place of."""
        return list(run.facts_in(await run.log_of(self._journals, view.journal.id)))

    async def provenance(self, namespace: str, name: str) -> bytes:
        """What was signed at its end, a DSSE envelope. Raises `RunNotFound`, `BadInput`."""
        view = await self.get(namespace, name)
        entries = await run.log_of(self._journals, view.journal.id, run.PROVENANCE)
        if not entries:
            raise BadInput(f"run {name!r} is {view.status.state}: it has no provenance (yet)")
        return entries[-1].body

    def expected(self, journal: Journal) -> list[facts.Expect]:
        """What somebody outside is waited for."""
        live = self._live.get(journal.id)
        return list(live.expected.values()) if live is not None else []

    def functions(self, view: View) -> list[FunctionId]:
        """Those of the pool that have run its steps, as far as they are known."""
        live = self._live.get(view.journal.id)
        if live is not None:
            return sorted(live.functions)
        id_ = view.journal.id
        return sorted({*self._used, *(name for run, name in self._wrote if run in (id_, ""))})

    async def ask(self, namespace: str, name: str, asked: Asked) -> View:
        """Want something of a run; whoever goes on with it hears of it.

        Raises `RunNotFound`, `BadInput`.
        """
        view = await self.get(namespace, name)
        if view.journal.is_over:
            raise RunIsOver(f"run {name!r} is over: {view.status.state}")
        await self._journals.wish(view.journal.id, msgspec.json.encode(asked))
        return view

    async def call_back(self, namespace: str, name: str, token: str, value: Any) -> None:
        """Whoever holds the *token* of a callback has called. Raises `RunNotFound`, `BadInput`."""
        view = await self.get(namespace, name)
        engine = await self.engine(view)
        for command in engine.outstanding():
            if not isinstance(command, facts.Expect) or command.kind != "callback":
                continue
            expected = run.token_of(view.stored, command.key, command.attempt)
            if secrets.compare_digest(token.encode(), expected.encode()):
                check_json(value, "$")
                asked = run.Call(command.key, command.attempt, value)
                await self.ask(namespace, name, asked)
                return
        raise BadInput("nobody waits for this callback: it was answered, or the run is over")

    async def decide(self, namespace: str, name: str, key: str, decided: run.Decide) -> None:
        """Somebody approves or refuses. Raises `RunNotFound`, `BadInput`."""
        view = await self.get(namespace, name)
        if view.journal.is_over:
            raise RunIsOver(f"run {name!r} is over: {view.status.state}")
        waiting = []
        for command in (await self.engine(view)).outstanding():
            if not isinstance(command, facts.Expect) or command.kind != "approval":
                continue
            if command.key == key:
                asked = msgspec.structs.replace(decided, key=key, attempt=command.attempt)
                await self.ask(namespace, name, asked)
                return
            waiting.append(command.key)
        hint = meant(key, waiting, "those that do:") if waiting else ""
        raise BadInput(f"step {key!r} of run {name!r} waits for no approval{hint}")

    async def delete(self, namespace: str, name: str) -> None:
        """Forget a run that is over. Raises `RunNotFound`, `BadInput`."""
        view = await self.get(namespace, name)
        if not await self._journals.delete(view.journal.id):
            raise BadInput(f"run {name!r} is not over: cancel it first")

    async def packages(self) -> set[str]:
        """The digests of those that runs need which are not over."""
        found: set[str] = set()
        before: JournalId | None = None
        while page := await self._journals.store.page("run", None, PAGE, before, is_over=False):
            before = page[-1].id
            for journal in page:
                whole = await self._journals.store.get(journal.id)
                if whole is not None:
                    stored = msgspec.json.decode(whole.spec, type=StoredRun)
                    found |= packages_of(stored.definition)
        return found

    # ---- what is ours -------------------------------------------------------------------------

    @property
    def under_way(self) -> int:
        """Runs that go on here."""
        return len(self._live)

    def steps_ended(self) -> Counter[str]:
        """Attempts that have ended here, by how."""
        return sum((live.steps_ended for live in self._live.values()), self._steps_ended)

    async def _go_on(self, journal: Journal) -> None:
        if (ready := self._means.ready) is not None:
            definition = msgspec.json.decode(journal.spec, type=StoredRun).definition
            await ready(journal.namespace, packages_of(definition), environments_of(definition))
        live = LiveRun(journal, self._means)
        self._live[journal.id] = self._named[journal.namespace, journal.name] = live
        for wish in self._ours.wishes(journal.id):
            live.hear(wish)
        if self._is_held:
            live.hold()
        try:
            await live.run()
            if live.status.ended_at:
                self.ended[live.status.state] += 1
        finally:
            del self._live[journal.id], self._named[journal.namespace, journal.name]
            live.left.set()
            self._steps_ended += live.steps_ended

    def _heard(self, id_: JournalId, wish: Wish) -> bool:
        if (live := self._live.get(id_)) is None:
            return False
        live.hear(wish)
        return True

    def _prepared(self, namespace: str, workflow: str, body: Body) -> FunctionId:
        id_ = self._prepare(namespace, workflow, body)
        if not body.function:
            self._used[id_] = time.monotonic()
        return id_

    async def _run_once(
        self,
        id_: FunctionId,
        body: Body,
        mounts: Mounts,
        invocation: Invocation,
        returned: Callable[[Outcome], None],
    ) -> Outcome:
        try:
            return await self._once(id_, body, mounts, invocation, returned)
        finally:
            self._keep_lines(invocation.id.partition("/")[0], id_)

    async def _sweep(self) -> None:
        """Forget runs that ended long ago, and functions of steps that nobody has needed lately."""
        while True:
            await asyncio.sleep(SWEEP_S)
            self._drop_functions(time.monotonic())
            try:
                await self._forget_old()
            except PlatformError as error:
                log.warning("old runs are still there", extra={"why": str(error)})
            except Exception:
                log.exception("old runs are still there, for a defect of ours")

    def _drop_functions(self, now: float) -> None:
        needed = set().union(*(live.functions for live in self._live.values()))
        for id_, at in list(self._used.items()):
            if id_ not in needed and now - at >= FUNCTION_IDLE_S:
                del self._used[id_]
                self._pool.remove(id_, keep_logs=True)
                self._keep_lines("", id_)

    def _keep_lines(self, run: str, id_: FunctionId) -> None:
        """Have what a function wrote for as long as few others have written since."""
        self._wrote.append((run, id_))
        if len(self._wrote) > WROTE_MAX:
            _, oldest = self._wrote.popleft()
            if oldest not in self._used:
                self._pool.logs.forget(oldest)

    async def _forget_old(self) -> None:
        """Ids are in the order of time, so that only those that can be old are looked at."""
        at = self._clock.now() - KEPT_S
        before = JournalId(f"{int(at * 1000):012x}")
        while page := await self._journals.store.page("run", None, PAGE, before, is_over=True):
            before = page[-1].id
            for journal in page:
                if journal.ended_at <= at:
                    await self._journals.delete(journal.id)


def artifacts_in(value: Any, namespace: str) -> list[str]:
    """The URIs of the namespace's artifacts that a JSON value refers to."""
    found, todo = [], [value]
    while todo:
        each = todo.pop()
        if isinstance(each, dict):
            todo += each.values()
            uri = each.get("uri")
            if isinstance(uri, str) and uri.startswith(f"{SCHEME}{namespace}/"):
                found.append(uri)
        elif isinstance(each, list | tuple):
            todo += each
    return found


def packages_of(definition: Definition) -> set[str]:
    """The digests of all that its steps need."""
    specs: list[WorkflowSpec | TaskSpec] = [definition.root, *definition.workflows.values()]
    return {spec.package for spec in [*specs, *definition.tasks.values()] if spec.package}


def environments_of(definition: Definition) -> set[str]:
    """The names of those that its steps run in."""
    specs = [definition.root, *definition.workflows.values()]
    names = {spec.environment for spec in specs}
    names |= {task.environment for task in definition.tasks.values()}
    steps = [step for spec in specs for step in (*spec.steps, *spec.finally_)]
    return names | {step.environment for step in steps if step.environment}


def _metadata(namespace: str, name: str) -> Metadata:
    try:
        return msgspec.convert({"namespace": namespace, "name": name}, Metadata)
    except msgspec.ValidationError as error:
        raise BadInput(
            f"{error}: names are lower-case letters, digits and dashes, at most 63"
        ) from None
