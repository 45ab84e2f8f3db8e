"""One attempt of a step: what it is given, where it runs, what has come of it.

A step with values alone runs in a sandbox that holds its function, warm or not. One that takes or
leaves files has a sandbox of its own (see `handover`). So has one that is declared pure; it is
looked for in the cache first, and runs once, however many runs ask for it at the same moment.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import msgspec
from msgspec import Struct, structs

from dayfly_pool.clock import Clock
from dayfly_pool.errors import (
    ArtifactDamaged,
    ArtifactGone,
    BadInput,
    BadTree,
    BodyTooLarge,
    Draining,
    EnvironmentNotFound,
    FunctionNotFound,
    PackageDamaged,
    PlatformError,
    TakingEnded,
    WorkspaceConflict,
)
from dayfly_pool.ids import new_id
from dayfly_pool.journal import Journals
from dayfly_pool.models import (
    CANNOT_RUN,
    Environment,
    Failure,
    FunctionId,
    Invocation,
    InvocationId,
    Metadata,
    Mounts,
    Outcome,
)
from dayfly_pool.pool import Pool
from dayfly_pool.retry import KILLS_MAX
from dayfly_pool.store.journals import JournalId
from dayfly_pool.workflow import bodies, cache, facts, observing
from dayfly_pool.workflow.bodies import Body
from dayfly_pool.workflow.cache import Cached, StepCache
from dayfly_pool.workflow.facts import LARGE, Ended, Failed, Invoke, Report
from dayfly_pool.workflow.handover import (
    Early,
    Given,
    Handover,
    Left,
    Prepared,
    Taking,
    Versions,
    is_furnished,
)
from dayfly_pool.workflow.observing import Seen
from dayfly_pool.workflow.plan import Definition
from dayfly_pool.workflow.provenance import Statement

log = logging.getLogger("dayfly.runs")
KIND_CHARACTERS_MAX: Final = 128
CALM_S: Final = 0.5
STARTING_S: Final = 0.02
"""What a sandbox takes to begin, about."""

QUEUE_S_MAX: Final = 3600.0
HOPELESS: Final = (
    FunctionNotFound,
    BadInput,
    BodyTooLarge,
    EnvironmentNotFound,
    PackageDamaged,
    ArtifactDamaged,
    ArtifactGone,
    BadTree,
    WorkspaceConflict,
)
SEEN_MAX: Final = 10_000
"""Of more steps a run's provenance does not tell one by one."""

Prepare = Callable[[str, str, Body], FunctionId]
"""Have the pool know a step's function: (namespace, workflow, body). Raises `PlatformError`."""

Once = Callable[
    [FunctionId, Body, Mounts, Invocation, Callable[[Outcome], None]], Awaitable[Outcome]
]
"""Run it in a sandbox of its own, with these mounts; all of it is dead then. Whom it is told to
hears the outcome before that."""


class Means(Struct, frozen=True):
    """What runs need of the server. *identify* says what a step's function is called."""

    pool: Pool
    journals: Journals
    clock: Clock
    prepare: Prepare
    identify: Prepare
    once: Once
    verify: Callable[[str, Body], object]
    """A step's package, before it is run `once`; waits for the disk. (namespace, body)"""

    handover: Handover
    cache: StepCache
    environment: Callable[[str, str], Environment]
    """By namespace and name."""

    sign: Callable[[Statement], bytes]
    internal: dict[str, Any]
    """What the installation decided, for provenance."""

    empty_package: str
    flights: dict[str, asyncio.Future[None]]
    """Steps that are declared pure and run now, by key."""

    ready: Callable[[str, set[str], set[str]], Awaitable[None]] | None = None
    """Has packages and environments here, for a namespace, where another server may have made a
    run. Raises `PlatformError`."""

    garbage_s: float = 3600.0
    """What nothing refers to is kept for so long: see `garbage`."""


CANCELLED: Final = "it was cancelled"
ALONE: Final = "a sandbox of its own, which what it leaves is taken from"
PURE: Final = "a sandbox of its own: what ran before in another could decide what is cached"
WHY: Final = {
    "warm": "a sandbox that holds this function was free",
    "generic": "no sandbox held it; a ready one took it",
    "forked": "no sandbox was ready; one was forked",
    "created": "no sandbox was ready; one was started",
}


def _has_large(value: Any) -> bool:
    if isinstance(value, dict):
        return LARGE in value or any(map(_has_large, value.values()))
    return isinstance(value, list | tuple) and any(map(_has_large, value))


class StoredRun(Struct, frozen=True, kw_only=True):
    """What is written once. *secret* makes the tokens of callbacks."""

    metadata: Metadata
    workflow: str
    definition: Definition
    secret: bytes


class Attempts:
    """The attempts of one run's steps, and what they leave to be written down."""

    def __init__(self, id_: JournalId, stored: StoredRun, means: Means) -> None:
        self.id, self.stored, self._means = id_, stored, means
        self.namespace = stored.metadata.namespace
        self.name = f"{self.namespace}/{stored.metadata.name}"
        self.functions: set[FunctionId] = set()
        """Those of the pool that its steps have used."""

        self.spawn: Callable[[Coroutine[Any, Any, None]], object]
        """Has something done that nobody waits for; to be set before a step runs."""

        self.shared: frozenset[str] = frozenset()
        self.seen: list[Seen] = []
        """What all steps were made of, for the provenance."""

        self.versions: Versions = {}
        self.left: list[Left] = []
        self.uris: list[str] = []
        self.new_seen: list[Seen] = []
        """What is to be written with the next facts."""

        self._unsettled: list[Given] = []
        """What the disk must have before anything more is written."""

        self._kills: Counter[str] = Counter()
        self._preparing = 0
        self._prepared = asyncio.Event()
        """Set when no step's folders are being made."""

        self._prepared.set()
        self._unwanted: set[InvocationId] = set()
        """Attempts under way that are to end, whether their code has begun or not."""

        self._taking: dict[InvocationId, Taking] = {}

    @property
    def has_unsettled(self) -> bool:
        """Whether the disk has not got all that is to be written of."""
        return bool(self._unsettled)

    async def settle(self) -> None:
        """Have the disk have what is to be written of.

        What goes on with it comes first: while a file system writes much, it makes no folder.
        """
        if self._unsettled:
            await self._calm()
        while self._unsettled:
            given, self._unsettled = self._unsettled, []
            handover = self._means.handover
            do = handover.threads.do
            await asyncio.gather(*(do(handover.settle, each) for each in given))

    def invocation(self, key: str, attempt: int) -> InvocationId:
        """What the pool calls an attempt."""
        return InvocationId(f"{self.id}/{key}/{attempt}")

    def stop(self, key: str, attempt: int) -> None:
        """End an attempt that is under way; it fails, as one that was stopped."""
        id_ = self.invocation(key, attempt)
        self._unwanted.add(id_)
        if (taking := self._taking.get(id_)) is not None:
            taking.stop()
        self._means.pool.stop(id_, CANCELLED)

    async def end_of(self, invoke: Invoke) -> Ended | Failed:
        """Run one attempt of a step to its end. Raises `Draining`."""
        definition = self.stored.definition
        workflow = definition.workflows[invoke.workflow] if invoke.workflow else definition.root
        try:
            params = await self._whole(invoke.params)
            invoke = structs.replace(invoke, params=params)
            body = bodies.body_of(invoke, workflow, self._means.empty_package)
            if cache.is_pure(invoke):
                return await self._cached(invoke, body)
            return await self._run_step(invoke, body)
        except Draining:
            raise
        except PlatformError as error:
            is_hopeless = isinstance(error, HOPELESS)
            return self.failed(
                invoke,
                type(error).__name__,
                str(error),
                is_counted=is_hopeless,
                is_hopeless=is_hopeless,
            )
        finally:
            self._unwanted.discard(self.invocation(invoke.key, invoke.attempt))

    async def _cached(self, invoke: Invoke, body: Body) -> Ended | Failed:
        """What the same step left before, here or in another run; else it is run, once."""
        means = self._means
        identity = means.identify(self.namespace, self._workflow_of(invoke), bodies.unlimited(body))
        given = body.event + msgspec.json.encode(body.env, order="deterministic")
        key = cache.key_of(identity, given, invoke)
        while (flight := means.flights.get(key)) is not None:
            await asyncio.wait((flight,))
        flight = means.flights[key] = asyncio.get_running_loop().create_future()
        try:
            if (found := await means.handover.threads.do(self._found, key)) is not None:
                self._saw(invoke, body, found.run)
                self._keep_given(Given(found.artifacts, []))  # its run may not have settled it
                return Ended(
                    at=self._means.clock.now(),
                    key=invoke.key,
                    attempt=invoke.attempt,
                    results=found.results,
                    outputs=found.outputs,
                    was_cached=True,
                    report=Report(why=f"it left the same in run {found.run}"),
                )
            self._saw(invoke, body)
            end = await self._furnished(invoke, body)
            if isinstance(end, Ended):
                name = self.stored.metadata.name
                kept = Cached(end.results, end.outputs, name, self._means.clock.now())
                await asyncio.to_thread(means.cache.put, self.namespace, key, kept)
            return end
        finally:
            del means.flights[key]
            flight.set_result(None)

    def _found(self, key: str) -> Cached | None:
        found = self._means.cache.get(self.namespace, key)
        if found is None:
            return None
        try:
            for name, artifact in found.artifacts.items():
                self._means.handover.found(self.namespace, name, artifact.as_value())
        except (PlatformError, msgspec.ValidationError):
            return None  # an artifact of it is gone, or not what it was
        return found

    def _saw(self, invoke: Invoke, body: Body, cached_from: str = "") -> None:
        if len(self.seen) >= SEEN_MAX:
            return
        name = body.spec.environment if body.spec is not None else ""
        digest = self._means.environment(self.namespace, name).digest if name else ""
        package = body.spec.package if body.spec is not None else ""
        seen = observing.seen_of(invoke, package, name, digest, body.script, cached_from)
        self.seen.append(seen)
        self.new_seen.append(seen)

    async def _run_step(self, invoke: Invoke, body: Body) -> Ended | Failed:
        self._saw(invoke, body)
        if is_furnished(invoke):
            return await self._furnished(invoke, body)
        function = self._means.prepare(self.namespace, self._workflow_of(invoke), body)
        self.functions.add(function)
        invocation = self._invocation_of(invoke, function, body)
        if invocation.id in self._unwanted:
            return self._stopped(invoke)
        outcome = await self._means.pool.invoke(invocation)
        return await self._judged(invoke, outcome, WHY[outcome.timing.start])

    async def _furnished(self, invoke: Invoke, body: Body) -> Ended | Failed:
        """Run it with what it takes where that lies, and keep what it leaves."""
        means = self._means
        name = means.identify(self.namespace, self._workflow_of(invoke), body)
        function = FunctionId(f"{name}.{new_id()[-12:]}")
        self.functions.add(function)
        prepared = await self._prepare(invoke, body)
        invocation = self._invocation_of(invoke, function, body)
        hashing: list[asyncio.Future[Early]] = []
        taking = self._taking[invocation.id] = Taking(invocation.timeout_s)
        try:
            if invocation.id in self._unwanted:
                raise TakingEnded
            end, given = await self._taken(invoke, body, prepared, invocation, taking, hashing)
        except TakingEnded as error:
            self.spawn(self._drop(prepared, hashing))
            if taking.is_late:
                return self.failed(invoke, "TimedOut", str(error))
            return self._stopped(invoke)
        except BaseException:
            taking.stop()
            await asyncio.shield(self._drop(prepared, hashing))
            raise
        finally:
            del self._taking[invocation.id]
        self.spawn(self._drop(prepared, hashing))
        if given is None:
            return end
        self._keep_given(given)
        return structs.replace(end, outputs=given.outputs, at=self._means.clock.now())

    async def _taken(
        self,
        invoke: Invoke,
        body: Body,
        prepared: Prepared,
        invocation: Invocation,
        taking: Taking,
        hashing: list[asyncio.Future[Early]],
    ) -> tuple[Ended | Failed, Given | None]:
        """How it ended, and what it left; what is hashed before it is dead is *hashing*."""
        handover, hash_ = self._means.handover, self._means.handover.threads.hash
        where, mounts = self.namespace, prepared.mounts

        def returned(outcome: Outcome) -> None:
            if not isinstance(outcome, Failure):
                taking.ran_s = outcome.timing.handler_s
                begun = hash_(where, handover.hash_early, invoke, prepared, taking)
                hashing.append(asyncio.ensure_future(begun))

        outcome = await self._means.once(invocation.function, body, mounts, invocation, returned)
        mounted = len(mounts.inputs) + len(mounts.workspaces)
        alone = ALONE if is_furnished(invoke) else PURE
        why = f"a sandbox of its own; what it takes is mounted: {mounted}" if mounted else alone
        end = await self._judged(invoke, outcome, why)
        if not isinstance(end, Ended):
            return end, None
        early = await asyncio.shield(hashing[0]) if hashing else {}
        given = await hash_(where, handover.take, where, invoke, prepared, early, taking)
        return end, given

    async def _prepare(self, invoke: Invoke, body: Body) -> Prepared:
        def prepare() -> Prepared:
            self._means.verify(self.namespace, body)
            return self._means.handover.prepare(self.namespace, invoke, self.versions, self.shared)

        self._preparing += 1
        self._prepared.clear()
        try:
            return await self._means.handover.threads.do(prepare)
        finally:
            self._preparing -= 1
            if not self._preparing:
                self._prepared.set()

    async def _calm(self) -> None:
        """Until the steps that begin now have their folders and sandboxes, or `CALM_S`."""
        await asyncio.sleep(0)  # they are tasks that have not begun
        if not self._preparing:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CALM_S):
                await self._prepared.wait()
                await asyncio.sleep(STARTING_S)

    def _keep_given(self, given: Given) -> None:
        for left in given.left:
            self.versions[left.workspace, left.key] = left.version
        self.left += given.left
        self.uris += given.uris
        if given.left or given.outputs:
            self._unsettled.append(given)

    async def _drop(self, prepared: Prepared, hashing: list[asyncio.Future[Early]]) -> None:
        """Remove a step's folders; nobody waits for that."""
        try:
            for found in hashing:
                for early in (await found).values():
                    early.close()
            await self._means.handover.threads.do(self._means.handover.drop, prepared)
        except PlatformError:
            log.exception("a step's folders stay until the next start", extra={"run": self.name})

    def _workflow_of(self, invoke: Invoke) -> str:
        return invoke.workflow or self.stored.workflow

    def _invocation_of(self, invoke: Invoke, function: FunctionId, body: Body) -> Invocation:
        return Invocation(
            id=self.invocation(invoke.key, invoke.attempt),
            function=function,
            body=body.event,
            queue_s_max=QUEUE_S_MAX,
            timeout_s=body.timeout_s,
            env=body.env
            | {
                "DAYFLY_RUN": self.name,
                "DAYFLY_STEP": invoke.key,
                "DAYFLY_ATTEMPT": str(invoke.attempt),
            },
        )

    async def _whole(self, params: dict[str, Any]) -> dict[str, Any]:
        """With large values in place of what stands for them."""
        if not _has_large(params):
            return params
        handover = self._means.handover
        whole = await handover.threads.do(handover.whole, self.namespace, params)
        assert isinstance(whole, dict)
        return whole

    async def _judged(self, invoke: Invoke, outcome: Outcome, why: str) -> Ended | Failed:
        timing = outcome.timing
        report = Report(start=timing.start, duration_s=timing.handler_s, why=why)
        if isinstance(outcome, Failure):
            self._kills[invoke.key] += outcome.was_killed
            is_counted = not (outcome.was_killed and self._kills[invoke.key] <= KILLS_MAX)
            return self.failed(
                invoke,
                outcome.kind,
                outcome.message,
                is_counted=is_counted,
                is_hopeless=outcome.kind == CANNOT_RUN,
                report=report,
            )
        try:
            results = bodies.results_of(invoke, msgspec.json.decode(outcome.body))
            if facts.to_refer(results):
                handover = self._means.handover
                do = handover.threads.do
                results, uris = await do(handover.referred, self.namespace, results)
                self.uris += uris
            ended = Ended(
                at=self._means.clock.now(),
                key=invoke.key,
                attempt=invoke.attempt,
                results=results,
                report=report,
            )
            facts.encode(ended)
        except (BadInput, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            told = error.detail if isinstance(error, BadInput) else "what it returned is no JSON"
            return self.failed(invoke, "BadResult", told, report=report)
        return ended

    def _stopped(self, invoke: Invoke) -> Failed:
        return self.failed(invoke, "Stopped", CANCELLED, is_counted=False)

    def failed(
        self,
        invoke: Invoke,
        kind: str,
        message: str,
        *,
        is_counted: bool = True,
        is_hopeless: bool = False,
        report: Report | None = None,
    ) -> Failed:
        """How an attempt has ended that failed."""
        return Failed(
            at=self._means.clock.now(),
            key=invoke.key,
            attempt=invoke.attempt,
            kind=kind[:KIND_CHARACTERS_MAX],
            message=message[: facts.MESSAGE_CHARACTERS_MAX],
            is_counted=is_counted,
            is_hopeless=is_hopeless,
            report=report or Report(),
        )
