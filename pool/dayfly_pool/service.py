"""Everything one server does with declarations: keep them, build what they need, tell the pool."""

import asyncio
import base64
import fcntl
import hashlib
import logging
import os
import platform
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import msgspec

from dayfly_pool import driver as drivers
from dayfly_pool.batch.job import Stored
from dayfly_pool.batch.jobs import Jobs, View, machine
from dayfly_pool.batch.metrics import JobMetrics
from dayfly_pool.batch.model import JobManifest, JobSpec
from dayfly_pool.batch.quota import QueueSpec
from dayfly_pool.config import Config
from dayfly_pool.environments import EnvironmentStore
from dayfly_pool.errors import (
    BadInput,
    DataFolderUnusable,
    EnvironmentNotFound,
    FunctionNotFound,
    PackageDamaged,
    PlatformError,
    TriggerNotFound,
    WorkflowNotFound,
)
from dayfly_pool.events import Events, Tell, nobody
from dayfly_pool.journal import Journals, Keep
from dayfly_pool.metrics import EventMetrics
from dayfly_pool.models import (
    BASE,
    Environment,
    EnvironmentManifest,
    Function,
    FunctionId,
    FunctionManifest,
    FunctionSpec,
    Invocation,
    InvocationId,
    Isolation,
    Mold,
    Mounts,
    Network,
    Outcome,
    TriggerManifest,
    function_id,
)
from dayfly_pool.packages import PackageStore
from dayfly_pool.pool import Pool
from dayfly_pool.store.secrets import Secrets
from dayfly_pool.store.sqlite import (
    Declarations,
    StoredEnvironment,
    StoredFunction,
    StoredTrigger,
)
from dayfly_pool.stores import journals_of
from dayfly_pool.workflow import graph
from dayfly_pool.workflow.artifacts import Artifacts
from dayfly_pool.workflow.attempts import Means
from dayfly_pool.workflow.bodies import Body, identity
from dayfly_pool.workflow.cache import StepCache
from dayfly_pool.workflow.handover import Handover, owner_of
from dayfly_pool.workflow.metrics import RunMetrics
from dayfly_pool.workflow.model import TaskSpec, WorkflowSpec
from dayfly_pool.workflow.runs import Runs
from dayfly_pool.workflow.signing import InstallationKey

log = logging.getLogger("dayfly.service")
Progress = Callable[[str], None]
DEFAULT_NAMESPACE: Final = "default"
COMMAND: Final = "dayfly.process:run"
"""The handler of tasks that are commands or scripts."""

KEPT_S: Final = 100 * 365 * 86400.0
"""Jobs say themselves for how long they are kept."""

EMPTY_PACKAGE: Final = base64.b64decode(
    "UEsDBBQAAAAAAAAAIQDTHk7xFgAAABYAAAAGAAAAUkVBRE1FVGhpcyBmb2xkZXIgaXMgZW1wdHkuClBLAQIUAxQA"
    "AAAAAAAAIQDTHk7xFgAAABYAAAAGAAAAAAAAAAAAAACkAQAAAABSRUFETUVQSwUGAAAAAAEAAQA0AAAAOgAAAAAA"
)
"""A zip with nothing but a README: for commands that bring no files."""

BASE_ENVIRONMENT: Final = Environment(digest=BASE)


class Service:
    """One server's functions and environments. Use it inside `async with service.running():`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.tell: Tell = nobody
        """How destinations outside are told; to be set before it runs."""

        self.functions: dict[FunctionId, StoredFunction] = {}
        self.environments: dict[tuple[str, str], StoredEnvironment] = {}
        self.queues: dict[tuple[str, str], QueueSpec] = {}
        """Those of which something is declared."""

        self.triggers: dict[tuple[str, str], StoredTrigger] = {}
        self.pool: Pool
        self.journals: Journals
        self.jobs: Jobs
        self.runs: Runs
        self.workflows: dict[tuple[str, str], WorkflowSpec] = {}
        self.tasks: dict[tuple[str, str], TaskSpec] = {}
        self._empty_package = ""
        self.key = InstallationKey(config.data / "provenance")
        """What provenance is signed with."""

        self._handover = Handover(config.data, owner_of(config.uid_first))
        self.events: Events
        self.event_metrics: EventMetrics
        self.packages: PackageStore
        self.secrets = Secrets(config.data / "secrets")
        self._builds: EnvironmentStore
        self._declarations: Declarations
        self._changing = asyncio.Lock()
        self._watchers: list[Callable[[], None]] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Service"]:
        """Serve while the block runs; what was declared before is there again."""
        config = self.config
        with _owned(config.data):
            driver = self._driver = drivers.load(config.driver, config.data, config.uid_first)
            self._can_fork = driver.can_fork and config.prewarm == "fork"
            self.packages = await asyncio.to_thread(PackageStore, config.data / "packages")
            self._builds = await asyncio.to_thread(EnvironmentStore, config.data / "environments")
            self._declarations = Declarations(config.data / "dayfly.sqlite")
            await self._declarations.open()
            try:
                self.pool = Pool(config, driver)
                self.events = Events(config, self.pool, self.functions, self.tell)
                self.event_metrics = EventMetrics(self.events.queue, self.pool.metrics.registry)
                self.journals = Journals(
                    journals_of(config),
                    owner=secrets.token_hex(8),
                    is_alone=not config.events_dsn,
                    keep_for=Keep(over_s=KEPT_S),
                )
                self.jobs = Jobs(self.pool, self.journals, self._prepare_job, machine(config))
                self._empty_package = await self.put_package(EMPTY_PACKAGE)
                self.runs = Runs(self._means(), self.workflows, self.tasks)
                JobMetrics(self.jobs, self.pool.metrics.registry)
                RunMetrics(self.runs, self.pool.metrics.registry)
                self._handover.open()
                async with self.pool.running():
                    await self._restore()
                    async with self.journals.running():
                        await self._drop_packages()
                        async with (
                            self.events.running(),
                            self.jobs.running(),
                            self.runs.running(),
                        ):
                            yield self
            finally:
                await self._declarations.close()
                self._handover.close()

    # ---- jobs ---------------------------------------------------------------------------------

    async def create_job(
        self, manifest: JobManifest, items: AsyncIterator[bytes] | None = None
    ) -> View:
        """Keep a job, to be run: see `Jobs.create`. What its tasks are is what it is now."""
        function = await self._task(manifest.spec, manifest.metadata.namespace)
        return await self.jobs.create(manifest, function, items)

    async def retry_job(self, namespace: str, name: str, new_name: str = "") -> View:
        """Have another job do what has not succeeded: see `Jobs.retry`."""
        view = await self.jobs.get(namespace, name)
        function = await self._task(view.stored.spec, namespace)
        return await self.jobs.retry(view, function, new_name)

    async def _task(self, spec: JobSpec, namespace: str) -> FunctionSpec:
        """What each task of a job is now."""
        if spec.function is not None:
            id_ = function_id(namespace, spec.function)
            if id_ not in self.functions:
                raise FunctionNotFound(f"no function {id_!r}: deploy it first")
            function = self.functions[id_].spec
        else:
            function = FunctionSpec(
                handler=COMMAND,
                package=spec.package or self._empty_package,
                environment=spec.environment,
                env=spec.env,
                network=spec.network,
                limits=spec.limits,
            )
        await self._check_package(function.package)
        self._environment(namespace, function.environment)
        return function

    async def set_queue(self, namespace: str, name: str, spec: QueueSpec | None) -> None:
        """Declare what the jobs of a queue may have; None: forget what was declared."""
        async with self._changing:
            if spec is None:
                await self._declarations.delete_spec("Queue", namespace, name)
                self.queues.pop((namespace, name), None)
            else:
                content = msgspec.json.encode(spec)
                await self._declarations.save_spec("Queue", namespace, name, content)
                self.queues[namespace, name] = spec
            self.jobs.set_queue(f"{namespace}/{name}", spec)

    def _prepare_job(self, id_: FunctionId, stored: Stored, spec: FunctionSpec) -> Function:
        """Have the pool know the function that a job's tasks are."""
        namespace = stored.metadata.namespace
        environment = self._environment(namespace, spec.environment)
        self.packages.path(spec.package)
        mold = self._mold(environment, namespace, spec.network, spec.isolation)
        mold = msgspec.structs.replace(mold, batch=self._driver.sets_apart)
        function = Function(id_, "1", spec, mold, is_batch=True)
        self.pool.deploy(function, environment)
        return function

    async def _check_package(self, digest: str) -> None:
        try:
            await asyncio.to_thread(self.packages.path, digest)
        except PackageDamaged as error:  # also: never uploaded
            raise BadInput(f"spec.package: {error.detail}") from error

    async def _restore(self) -> None:
        mold = self._mold(BASE_ENVIRONMENT, DEFAULT_NAMESPACE, "none", "fork")
        self.pool.keep_generic(mold, BASE_ENVIRONMENT, self.config.generic_min)
        for environment in await self._declarations.environments():
            self.environments[environment.namespace, environment.name] = environment
        for namespace, name, content in await self._declarations.specs("Queue"):
            spec = self.queues[namespace, name] = msgspec.json.decode(content, type=QueueSpec)
            self.jobs.set_queue(f"{namespace}/{name}", spec)
        for namespace, name, content in await self._declarations.specs("Workflow"):
            flow = msgspec.json.decode(content, type=WorkflowSpec)
            self.workflows[namespace, name] = flow
        for namespace, name, content in await self._declarations.specs("Task"):
            self.tasks[namespace, name] = msgspec.json.decode(content, type=TaskSpec)
        for trigger in await self._declarations.triggers():
            self.triggers[trigger.namespace, trigger.name] = trigger
        for stored in await self._declarations.functions():
            try:
                await asyncio.to_thread(self.packages.path, stored.spec.package)
                self._deploy(stored)
            except PlatformError as error:
                extra = {"function": stored.id, "why": str(error)}
                log.error("function not restored", extra=extra)
            self.functions[stored.id] = stored

    async def _drop_packages(self) -> None:
        """Remove those that no function, job or workflow needs any more."""
        used = {stored.spec.package for stored in self.functions.values()}
        used.add(self._empty_package)
        used |= await self.jobs.packages() | await self.runs.packages()
        used |= {spec.package for spec in self.workflows.values()}
        used |= {spec.package for spec in self.tasks.values()}
        for digest in self.packages.digests():
            if digest not in used:
                await asyncio.to_thread(self.packages.remove, digest)

    async def drain(self, timeout_s: float) -> bool:
        """Let end what is under way, and start nothing more; False when some did not in time."""
        self.events.queue.hold()
        self.jobs.hold()
        self.runs.hold()
        return await self.pool.drain(timeout_s)

    def watch(self, changed: Callable[[], None]) -> None:
        """Have *changed* called before a change of the functions is final; it may refuse it."""
        self._watchers.append(changed)

    # ---- functions ----------------------------------------------------------------------------

    async def put_package(self, data: bytes) -> str:
        """Keep a package; returns its digest. Raises `BadPackage`."""
        return await asyncio.to_thread(self.packages.put, data)

    async def deploy(self, manifest: FunctionManifest) -> StoredFunction:
        """Declare a function. When this returns, no new invocation runs an older version.

        Raises `BadInput` or `EnvironmentNotFound`, and then changes nothing.
        """
        spec, metadata = manifest.spec, manifest.metadata
        if not spec.package:
            raise BadInput("spec.package is missing: upload the code first, or use `dayfly deploy`")
        spec = msgspec.structs.replace(spec, source=None)
        await self._check_package(spec.package)
        id_ = function_id(metadata.namespace, metadata.name)
        async with self._changing:
            environment = self._environment(metadata.namespace, spec.environment)
            before = self.functions.get(id_)
            now = time.time()
            trial = StoredFunction(id_, 0, spec, environment.digest, now)
            self._change(id_, trial)
            try:
                version = await self._declarations.save_function(id_, spec, environment.digest, now)
            except BaseException:
                self._change(id_, before)
                raise
            stored = StoredFunction(id_, version, spec, environment.digest, now)
            self.functions[id_] = stored
            if before is None or before.version != version:
                self._deploy(stored)
        self.events.queue.look()  # at what waited for it, or for one of the places that it has now
        log.info("function deployed", extra={"function": id_, "version": version})
        return stored

    def _change(self, id_: FunctionId, stored: StoredFunction | None) -> None:
        """Put *stored* in place if every watcher agrees; else raise and change nothing."""
        before = self.functions.get(id_)
        _put(self.functions, id_, stored)
        try:
            for changed in self._watchers:
                changed()
        except PlatformError:
            _put(self.functions, id_, before)
            for changed in self._watchers:
                changed()
            raise

    def _deploy(self, stored: StoredFunction) -> None:
        namespace = stored.id.partition("/")[0]
        environment = self._environment(namespace, stored.spec.environment)
        spec = stored.spec
        mold = self._mold(environment, namespace, spec.network, spec.isolation)
        function = Function(stored.id, str(stored.version), stored.spec, mold)
        self.pool.deploy(function, environment)

    def _mold(
        self, environment: Environment, namespace: str, network: Network, isolation: Isolation
    ) -> Mold:
        """What its sandboxes are made of: forked where the operator and the function allow it."""
        may_fork = (
            self._can_fork
            and isolation == "fork"
            and environment.early
            and namespace not in self.config.foreign_namespaces
            and namespace not in self.config.exec_namespaces
        )
        return Mold(environment.digest, network, namespace if may_fork else "")

    async def delete(self, id_: FunctionId) -> None:
        """Forget a function. Raises `FunctionNotFound`."""
        async with self._changing:
            if id_ not in self.functions:
                raise FunctionNotFound(f"no function {id_!r}")
            await self._declarations.delete_function(id_)
            self._change(id_, None)
            self.pool.remove(id_)
            self.events.forget(id_)

    # ---- environments -------------------------------------------------------------------------

    async def build(self, manifest: EnvironmentManifest, progress: Progress) -> StoredEnvironment:
        """Declare and build an environment; functions that use it move to it at once."""
        spec, metadata = manifest.spec, manifest.metadata
        if metadata.name == BASE:
            raise BadInput(f"{BASE!r} is the built-in environment: choose another name")
        early = metadata.namespace not in self.config.foreign_namespaces
        path, digest = "", BASE
        if spec.requirements.strip():
            digest, folder, _ = await self._builds.build(spec.requirements, progress=progress)
            path = str(folder)
        whole = msgspec.json.encode([digest, spec.preload, early])
        environment = Environment(
            digest=hashlib.sha256(whole).hexdigest(),
            path=path,
            preload=spec.preload,
            early=early,
            generic_min=spec.generic_min,
        )
        now = time.time()
        async with self._changing:
            namespace, name = metadata.namespace, metadata.name
            await self._declarations.save_environment(namespace, name, spec, environment, now)
            stored = StoredEnvironment(namespace, name, spec, environment, now)
            before = self.environments.get((namespace, name))
            self.environments[namespace, name] = stored
            if before is not None and before.environment != environment:
                await self._move_users(namespace, name)
        return stored

    async def _move_users(self, namespace: str, name: str) -> None:
        """Give the functions of a changed environment a new version on the new one."""
        for stored in list(self.functions.values()):
            if stored.spec.environment != name:
                continue
            used = self._environment(stored.id.partition("/")[0], name)
            if used.digest != stored.environment:
                now = time.time()
                version = await self._declarations.save_function(
                    stored.id, stored.spec, used.digest, now
                )
                moved = StoredFunction(stored.id, version, stored.spec, used.digest, now)
                self.functions[stored.id] = moved
                self._deploy(moved)

    async def delete_environment(self, namespace: str, name: str) -> None:
        """Forget an environment that no function uses. Raises `EnvironmentNotFound`, `BadInput`."""
        async with self._changing:
            if (namespace, name) not in self.environments:
                raise EnvironmentNotFound(f"no environment {namespace}/{name}")
            digest = self.environments[namespace, name].environment.digest
            users = [s.id for s in self.functions.values() if s.environment == digest]
            if users:
                raise BadInput(f"environment {name!r} is used by {', '.join(sorted(users)[:5])}")
            await self._declarations.delete_environment(namespace, name)
            del self.environments[namespace, name]

    def _environment(self, namespace: str, name: str) -> Environment:
        """The environment called *name*: the namespace's own, else one of the operator's."""
        if name == BASE:
            return BASE_ENVIRONMENT
        for where in (namespace, DEFAULT_NAMESPACE):
            if (where, name) in self.environments:
                return self.environments[where, name].environment
        raise EnvironmentNotFound(f"no environment {name!r} in namespace {namespace!r}")

    # ---- workflows ----------------------------------------------------------------------------

    async def set_workflow(self, namespace: str, name: str, spec: WorkflowSpec) -> None:
        """Declare a workflow; runs that have begun go on as they were.

        Raises `BadInput` or `EnvironmentNotFound`, and then changes nothing.
        """
        spec = msgspec.structs.replace(spec, source=None)
        steps = (*spec.steps, *spec.finally_)
        if spec.package:
            await self._check_package(spec.package)
        elif any(step.handler is not None for step in steps):
            raise BadInput("spec.package is missing: use `dayfly workflow deploy` for handlers")
        async with self._changing:
            there = {n: flow for (where, n), flow in self.workflows.items() if where == namespace}
            tasks = {n: task for (where, n), task in self.tasks.items() if where == namespace}
            await asyncio.to_thread(graph.check, spec, tasks, there | {name: spec}, name)
            for environment in sorted({spec.environment, *(s.environment or BASE for s in steps)}):
                self._environment(namespace, environment)
            content = msgspec.json.encode(spec)
            await self._declarations.save_spec("Workflow", namespace, name, content)
            self.workflows[namespace, name] = spec

    async def delete_workflow(self, namespace: str, name: str) -> None:
        """Forget a workflow; its runs go on. Raises `WorkflowNotFound`."""
        async with self._changing:
            if self.workflows.pop((namespace, name), None) is None:
                raise WorkflowNotFound(f"no workflow {namespace}/{name}")
            await self._declarations.delete_spec("Workflow", namespace, name)

    async def set_task(self, namespace: str, name: str, spec: TaskSpec) -> None:
        """Declare a task. Raises `BadInput` or `EnvironmentNotFound`, and then changes nothing."""
        spec = msgspec.structs.replace(spec, source=None)
        if spec.package:
            await self._check_package(spec.package)
        graph.check_task(spec)
        async with self._changing:
            self._environment(namespace, spec.environment)
            await self._declarations.save_spec("Task", namespace, name, msgspec.json.encode(spec))
            self.tasks[namespace, name] = spec

    async def delete_task(self, namespace: str, name: str) -> None:
        """Forget a task that no workflow uses. Raises `WorkflowNotFound`, `BadInput`."""
        async with self._changing:
            if (namespace, name) not in self.tasks:
                raise WorkflowNotFound(f"no task {namespace}/{name}")
            users = [
                n
                for (where, n), flow in self.workflows.items()
                if where == namespace
                and any(step.task == name for step in (*flow.steps, *flow.finally_))
            ]
            if users:
                raise BadInput(f"task {name!r} is used by {', '.join(sorted(users)[:5])}")
            await self._declarations.delete_spec("Task", namespace, name)
            del self.tasks[namespace, name]

    @property
    def artifacts(self) -> Artifacts:
        """What steps have left."""
        return self._handover.artifacts

    def _means(self) -> Means:
        cache = StepCache(self.config.data / "cache")
        cache.open()
        return Means(
            pool=self.pool,
            journals=self.journals,
            clock=self.journals.clock,
            prepare=self._prepare_step,
            identify=self._identify_step,
            once=self._run_step,
            verify=lambda namespace, body: self.packages.path(
                self._spec_of_step(namespace, body).package
            ),
            handover=self._handover,
            cache=cache,
            environment=self._environment,
            sign=self.key.sign,
            internal={
                "driver": self.config.driver,
                "prewarm": self.config.prewarm,
                "host": platform.node(),
                "kernel": platform.release(),
                "machine": platform.machine(),
            },
            empty_package=self._empty_package,
            flights={},
            garbage_s=self.config.garbage_s,
        )

    def _identify_step(self, namespace: str, workflow: str, body: Body) -> FunctionId:
        """What the pool calls the function that a step is."""
        if body.spec is None:
            return function_id(namespace, body.function)
        environment = self._environment(namespace, body.spec.environment)
        return FunctionId(identity(namespace, workflow, body, environment.digest))

    async def _run_step(
        self,
        id_: FunctionId,
        body: Body,
        mounts: Mounts,
        invocation: Invocation,
        returned: Callable[[Outcome], None],
    ) -> Outcome:
        """Run a step in a sandbox of its own. Raises `PlatformError`."""
        namespace = id_.partition("/")[0]
        spec = self._spec_of_step(namespace, body)
        spec = msgspec.structs.replace(spec, initialize="each", max_scale=1, min_scale=0)
        environment = self._environment(namespace, spec.environment)
        mold = self._mold(environment, namespace, spec.network, spec.isolation)
        function = Function(id_, "1", spec, mold, mounts=mounts)
        return await self.pool.run_once(function, environment, invocation, returned)

    def _spec_of_step(self, namespace: str, body: Body) -> FunctionSpec:
        if body.spec is not None:
            return body.spec
        stored = self.functions.get(function_id(namespace, body.function))
        if stored is None:
            raise FunctionNotFound(f"no function {body.function!r}: deploy it first")
        return stored.spec

    def _prepare_step(self, namespace: str, workflow: str, body: Body) -> FunctionId:
        """Have the pool know the function that a step is."""
        if body.spec is None:
            id_ = function_id(namespace, body.function)
            if id_ not in self.functions:
                raise FunctionNotFound(f"no function {id_!r}: deploy it first")
            return id_
        environment = self._environment(namespace, body.spec.environment)
        named = FunctionId(identity(namespace, workflow, body, environment.digest))
        if named not in self.pool.state.functions:
            self.packages.path(body.spec.package)
            mold = self._mold(environment, namespace, body.spec.network, body.spec.isolation)
            self.pool.deploy(Function(named, "1", body.spec, mold), environment)
        return named

    # ---- triggers -----------------------------------------------------------------------------

    async def set_trigger(self, manifest: TriggerManifest, seen: float) -> StoredTrigger:
        """Declare a trigger. What its source has for it after *seen* counts, for a new one.

        Raises `FunctionNotFound` if there is nothing to be run.
        """
        spec, metadata = manifest.spec, manifest.metadata
        key = metadata.namespace, metadata.name
        async with self._changing:
            if (id_ := function_id(metadata.namespace, spec.function)) not in self.functions:
                raise FunctionNotFound(f"no function {id_!r}: deploy it first")
            before = self.triggers.get(key)
            since = before.seen if before is not None else seen
            last = before.last if before is not None else InvocationId("")
            stored = StoredTrigger(*key, spec, time.time(), since, last)
            await self._declarations.save_trigger(stored)
            self.triggers[key] = stored
        return stored

    async def note_seen(self, trigger: StoredTrigger, seen: float, last: InvocationId) -> None:
        """Its source has been looked at up to *seen*; what it had was accepted, *last* as last."""
        key = trigger.namespace, trigger.name
        await self._declarations.note_seen(*key, seen, last)
        if key in self.triggers:
            self.triggers[key] = msgspec.structs.replace(self.triggers[key], seen=seen, last=last)

    async def delete_trigger(self, namespace: str, name: str) -> None:
        """Forget a trigger; what it has made already is run. Raises `TriggerNotFound`."""
        async with self._changing:
            if (namespace, name) not in self.triggers:
                raise TriggerNotFound(f"no trigger {namespace}/{name}")
            await self._declarations.delete_trigger(namespace, name)
            del self.triggers[namespace, name]


def _put(
    functions: dict[FunctionId, StoredFunction], id_: FunctionId, stored: StoredFunction | None
) -> None:
    if stored is None:
        functions.pop(id_, None)
    else:
        functions[id_] = stored


@contextmanager
def _owned(data: Path):  # type: ignore[no-untyped-def]
    """Have the data folder for ourselves. Raises `DataFolderUnusable`."""
    try:
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DataFolderUnusable(f"{data}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataFolderUnusable(f"another server is using {data}") from None
        yield
    finally:
        os.close(lock)
