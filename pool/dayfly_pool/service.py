"""Everything one server does with declarations: keep them, build what they need, tell the pool."""

import asyncio
import base64
import fcntl
import logging
import os
import platform
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from dayfly_pool import driver as drivers
from dayfly_pool.batch.job import Stored
from dayfly_pool.batch.jobs import Jobs, View, machine
from dayfly_pool.batch.metrics import JobMetrics
from dayfly_pool.batch.model import JobManifest, JobSpec
from dayfly_pool.batch.quota import QueueSpec
from dayfly_pool.config import Config
from dayfly_pool.downloads import fetch
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
from dayfly_pool.following import Arrivals, Follower
from dayfly_pool.journal import Journals, Keep
from dayfly_pool.libraries import BASE_ENVIRONMENT, DEFAULT_NAMESPACE, Libraries, Progress
from dayfly_pool.metrics import EventMetrics
from dayfly_pool.models import (
    BASE,
    Code,
    EnvironmentManifest,
    Function,
    FunctionId,
    FunctionManifest,
    FunctionSpec,
    Invocation,
    InvocationId,
    Mounts,
    Outcome,
    TriggerManifest,
    function_id,
)
from dayfly_pool.packages import PackageStore, pack_texts
from dayfly_pool.pool import Pool
from dayfly_pool.store import declarations
from dayfly_pool.store.declarations import (
    Change,
    SharedStore,
    StoredEnvironment,
    StoredFunction,
    StoredTrigger,
)
from dayfly_pool.store.secrets import Secrets
from dayfly_pool.stores import archives_of, declarations_of, journals_of
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
K = TypeVar("K")
V = TypeVar("V")
C = TypeVar("C", bound=Code)
COMMAND: Final = "dayfly.process:run"
"""The handler of tasks that are commands or scripts."""

MARK: Final = "Mark"
KEPT_S: Final = 100 * 365 * 86400.0
"""Jobs say themselves for how long they are kept."""

EMPTY_PACKAGE: Final = base64.b64decode(
    "UEsDBBQAAAAAAAAAIQDTHk7xFgAAABYAAAAGAAAAUkVBRE1FVGhpcyBmb2xkZXIgaXMgZW1wdHkuClBLAQIUAxQA"
    "AAAAAAAAIQDTHk7xFgAAABYAAAAGAAAAAAAAAAAAAACkAQAAAABSRUFETUVQSwUGAAAAAAEAAQA0AAAAOgAAAAAA"
)
"""A zip with nothing but a README: for commands that bring no files."""

PLAIN: Final = FunctionSpec(handler="any")
"""What is kept ready from the start is for functions that ask for nothing else."""


class Service:
    """One server's functions and environments. Use it inside `async with service.running():`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.tell: Tell = nobody
        """How destinations outside are told; to be set before it runs."""

        self.functions: dict[FunctionId, StoredFunction] = {}
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
        self.secrets = Secrets(
            config.secrets or config.data / "secrets", is_ours=not config.secrets
        )
        self.owns: Callable[[FunctionId], bool] = lambda id_: True
        """Whether the triggers of a function are run here, and its minScale is kept; call `reown`
        when that changes."""

        self._libraries: Libraries
        self._declarations: declarations.Store
        self._follower: Follower | None = None
        self._arrivals = Arrivals(self.functions, self._have_function, self._arrived, self._note)
        self._changing = asyncio.Lock()
        self._watchers: list[Callable[[], None]] = []
        self._trigger_watchers: list[Callable[[], None]] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Service"]:
        """Serve while the block runs; what was declared before is there again."""
        config = self.config
        with _owned(config.data):
            driver = self._driver = drivers.load(config)
            archives = archives_of(config)
            self.packages = await asyncio.to_thread(
                PackageStore, config.data / "packages", archives
            )
            builds = await asyncio.to_thread(EnvironmentStore, config.data / "environments")
            self._libraries = Libraries(config, driver, builds)
            self._declarations = declarations_of(config)
            await self._declarations.open()
            if isinstance(self._declarations, SharedStore):
                self._follower = Follower(self._declarations, self._changing, self._take_in)
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
                self.jobs = Jobs(
                    self.pool,
                    self.journals,
                    self._prepare_job,
                    machine(config),
                    self._have if self._follower else None,
                )
                self._empty_package = await self.put_package(EMPTY_PACKAGE)
                self.runs = Runs(self._means(), self.workflows, self.tasks)
                JobMetrics(self.jobs, self.pool.metrics.registry)
                RunMetrics(self.runs, self.pool.metrics.registry)
                self._handover.open()
                async with self.pool.running(), self._arrivals.running():
                    await self._restore()
                    self.pool.adopt()
                    async with self.journals.running():
                        await self._drop_packages()
                        async with (
                            self.events.running(),
                            self.jobs.running(),
                            self.runs.running(),
                            self._follower.running() if self._follower else nullcontext(),
                        ):
                            yield self
            finally:
                await self._declarations.close()
                if archives is not None:
                    await asyncio.to_thread(archives.close)
                self._handover.close()

    # ---- what is declared for somebody else ---------------------------------------------------

    async def marks(self) -> dict[tuple[str, str], bytes]:
        """What is remembered of declarations that are made for somebody else, by their names."""
        found = await self._declarations.specs(MARK)
        return {(namespace, name): content for namespace, name, content in found}

    async def mark(self, namespace: str, name: str, content: bytes | None) -> None:
        """Remember *content* of one, whatever becomes of it; None: nothing more."""
        if content is None:
            await self._declarations.delete_spec(MARK, namespace, name)
        else:
            await self._declarations.save_spec(MARK, namespace, name, content)

    # ---- jobs ---------------------------------------------------------------------------------

    async def create_job(
        self, manifest: JobManifest, items: AsyncIterator[bytes] | None = None
    ) -> View:
        """Keep a job, to be run: see `Jobs.create`. What its tasks are is what it is now."""
        spec = await self._stored(manifest.spec)
        if self._follower is not None:
            await self._have(manifest.metadata.namespace, set(), {spec.environment})
        function = await self._task(spec, manifest.metadata.namespace)
        manifest = msgspec.structs.replace(manifest, spec=spec)
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
        elif spec.image:
            function = FunctionSpec(
                image=spec.image,
                command=spec.command or (),
                args=spec.args,
                env=spec.env,
                network=spec.network,
                limits=spec.limits,
            )
        else:
            function = FunctionSpec(
                handler=COMMAND,
                package=spec.package or self._empty_package,
                environment=spec.environment,
                env=spec.env,
                network=spec.network,
                limits=spec.limits,
            )
        if function.image:
            self._libraries.check_images()
        else:
            await self._check_package(function.package)
        self._libraries.find(namespace, function.environment)
        return function

    async def set_queue(self, namespace: str, name: str, spec: QueueSpec | None) -> None:
        """Declare what the jobs of a queue may have; None: forget what was declared."""
        async with self._deciding():
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
        if spec.image:
            port = 0 if stored.spec.image else spec.port
            environment, mold = self._libraries.container(id_, "1", spec, port)
        else:
            environment = self._libraries.find(namespace, spec.environment)
            self.packages.path(spec.package)
            mold = self._libraries.mold(environment, namespace, spec)
        mold = msgspec.structs.replace(mold, batch=self._driver.sets_apart)
        function = Function(id_, "1", spec, mold, is_batch=True)
        self.pool.deploy(function, environment)
        return function

    async def _has_package(self, digest: str) -> bool:
        try:
            await asyncio.to_thread(self.packages.path, digest)
        except PackageDamaged:
            return False
        return True

    async def _check_package(self, digest: str) -> None:
        try:
            await asyncio.to_thread(self.packages.note, digest)
        except PackageDamaged as error:  # also: never uploaded
            raise BadInput(f"spec.package: {error.detail}") from error

    async def _restore(self) -> None:
        try:
            mold = self._libraries.mold(BASE_ENVIRONMENT, DEFAULT_NAMESPACE, PLAIN)
            self.pool.keep_generic(mold, BASE_ENVIRONMENT, self.config.generic_min)
        except BadInput as error:  # no sandbox is large enough for what a function has by default
            log.warning("nothing is kept ready", extra={"why": str(error)})
        if self._follower is not None:
            await self._follower.begin()
        declared = self._libraries.declared
        for environment in await self._declarations.environments():
            key = environment.namespace, environment.name
            declared[key] = self._libraries.here(environment) if self._follower else environment
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
        kept = set(await asyncio.to_thread(self.packages.digests))
        for stored in await self._declarations.functions():
            self.functions[stored.id] = stored
            try:
                is_coming = self._follower is not None and stored.spec.package not in kept
                if stored.spec.package and not is_coming:
                    await asyncio.to_thread(self.packages.path, stored.spec.package)
                self._put_to_use(stored)
            except PlatformError as error:
                extra = {"function": stored.id, "why": str(error)}
                log.error("function not restored", extra=extra)

    async def _drop_packages(self) -> None:
        """Remove those that no function, job or workflow needs any more."""
        used = {stored.spec.package for stored in self.functions.values()}
        used.add(self._empty_package)
        used |= await self.jobs.packages() | await self.runs.packages()
        used |= {spec.package for spec in self.workflows.values()}
        used |= {spec.package for spec in self.tasks.values()}
        await asyncio.to_thread(self.packages.drop, used)

    async def known_shards(self) -> list[str]:
        """Those that have, or had, sandboxes which outlive them."""
        return await self._driver.shards()

    async def bury_shard(self, name: str) -> None:
        """It does not come back: its sandboxes are nobody's."""
        log.info("shard is gone for good", extra={"shard": name})
        await self._driver.bury_shard(name)

    async def drain(self, timeout_s: float) -> bool:
        """Let end what is under way, and start nothing more; False when some did not in time."""
        self.events.queue.hold()
        self.jobs.hold()
        self.runs.hold()
        return await self.pool.drain(timeout_s)

    def watch(self, changed: Callable[[], None]) -> None:
        """Have *changed* called now, and before a change of the functions is final.

        It may refuse a change that is made here; what others have declared it has to live with.
        """
        self._watchers.append(changed)
        self._tell_watchers()

    def _tell_watchers(self) -> None:
        for changed in self._watchers:
            try:
                changed()
            except PlatformError as error:
                log.warning("declarations clash", extra={"why": str(error)})

    def watch_triggers(self, changed: Callable[[], None]) -> None:
        """Have *changed* called when others have changed triggers, or `owns` answers otherwise."""
        self._trigger_watchers.append(changed)

    def reown(self) -> None:
        """`owns` answers otherwise than before."""
        for id_, stored in self.functions.items():
            if stored.spec.min_scale:
                self.pool.keep(id_, self._least(stored))
        for changed in self._trigger_watchers:
            changed()

    # ---- what other servers declare -----------------------------------------------------------

    @asynccontextmanager
    async def _deciding(self) -> AsyncIterator[None]:
        """Nobody here changes declarations meanwhile, and all that others have made is known."""
        async with self._changing:
            if self._follower is not None:
                await self._follower.catch_up()
            yield

    def _take_in(self, change: Change) -> None:
        """Be as the store says; nothing happens for what is so already."""
        key, stored = (change.namespace, change.name), change.stored
        match change.kind:
            case "Function":
                assert stored is None or isinstance(stored, StoredFunction)
                self._take_in_function(function_id(*key), stored)
            case "Environment":
                assert stored is None or isinstance(stored, StoredEnvironment)
                self._take_in_environment(key, stored)
            case "Trigger":
                assert stored is None or isinstance(stored, StoredTrigger)
                before = self.triggers.get(key)
                _put(self.triggers, key, stored)
                if (before and before.spec) != (stored and stored.spec):
                    self.reown()  # not for each firing of another server's
            case "Queue":
                spec = _decoded(stored, QueueSpec)
                _put(self.queues, key, spec)
                self.jobs.set_queue("/".join(key), spec)
            case "Workflow":
                _put(self.workflows, key, _decoded(stored, WorkflowSpec))
            case "Task":
                _put(self.tasks, key, _decoded(stored, TaskSpec))
            case "Mark":
                pass  # read by who wants it

    def _take_in_function(self, id_: FunctionId, stored: StoredFunction | None) -> None:
        before = self.functions.get(id_)
        if before is not None and stored is not None and before.version == stored.version:
            return
        _put(self.functions, id_, stored)
        self._tell_watchers()
        if stored is not None:
            self._put_to_use(stored)
        elif before is not None:
            self._arrivals.forget(id_)
            self.pool.remove(id_)
            self.events.forget(id_)

    def _take_in_environment(self, key: tuple[str, str], stored: StoredEnvironment | None) -> None:
        declared = self._libraries.declared
        if stored is None:
            declared.pop(key, None)
            return
        before = declared.get(key)
        after = declared[key] = self._libraries.here(stored)
        if before is not None and before.environment == after.environment:
            return
        for user in list(self.functions.values()):
            if user.spec.environment == key[1] and user.environment == after.environment.digest:
                self._put_to_use(user)  # it was declared first, or before it was built anew

    def _put_to_use(self, stored: StoredFunction) -> None:
        """Deploy it now if all that it needs is here, else as soon as it is.

        Until then an older version goes on. Raises `PlatformError` on a server that is alone.
        """
        if self._follower is not None and not self._is_here(stored):
            self._arrivals.expect(stored.id)
            return
        self._arrivals.forget(stored.id)
        self._deploy(stored)

    def _is_here(self, stored: StoredFunction) -> bool:
        package, namespace = stored.spec.package, stored.id.partition("/")[0]
        is_built = self._libraries.is_here(namespace, stored.spec.environment)
        return is_built and (not package or self.packages.is_here(package))

    def _arrived(self, stored: StoredFunction) -> None:
        self._deploy(stored)
        self.events.queue.look()
        log.info("function arrived", extra={"function": stored.id, "version": stored.version})

    def _note(self, id_: FunctionId, why: str) -> None:
        """Why a function cannot run here; empty when it can, or is none."""
        if why and id_ not in self.pool.state.functions:
            self.pool.unready[id_] = why
        else:
            self.pool.unready.pop(id_, None)

    async def _have_function(self, stored: StoredFunction) -> None:
        spec, namespace = stored.spec, stored.id.partition("/")[0]
        self._libraries.find(namespace, spec.environment)
        await self._bring(namespace, {spec.package}, {spec.environment})

    async def _have(self, namespace: str, packages: set[str], environments: set[str]) -> None:
        """Know what was declared anywhere, and have these here. Raises `PlatformError`."""
        async with self._deciding():
            pass
        await self._bring(namespace, packages, environments)

    async def _bring(self, namespace: str, packages: set[str], environments: set[str]) -> None:
        for digest in filter(None, packages):  # an image has none
            if not self.packages.is_here(digest):
                await asyncio.to_thread(self.packages.path, digest)
        await self._libraries.bring(namespace, environments - {BASE})

    # ---- functions ----------------------------------------------------------------------------

    async def put_package(self, data: bytes) -> str:
        """Keep a package; returns its digest. Raises `BadPackage`."""
        return await asyncio.to_thread(self.packages.put, data)

    async def _stored(self, spec: C) -> C:
        """*spec* whose code is stored, however it comes, and known by its digest alone.

        Raises `BadInput`, `FetchFailed`.
        """
        package = spec.package
        if spec.files:
            archive = await asyncio.to_thread(pack_texts, spec.files)
            package = await self.put_package(archive)
        elif spec.package_url and not await self._has_package(package):
            await self.put_package(
                await fetch(spec.package_url, package, self.config.package_hosts)
            )
        elif package:
            await self._check_package(package)
        return msgspec.structs.replace(spec, package=package, package_url="", files={}, source=None)

    async def deploy(self, manifest: FunctionManifest) -> StoredFunction:
        """Declare a function. When this returns, no new invocation here runs an older version.

        On other servers that have the same declarations none does a moment later, when they have
        heard of it and have its package and its environment.
        Raises `BadInput`, `EnvironmentNotFound` or `FetchFailed`, and then changes nothing.
        """
        spec, metadata = await self._stored(manifest.spec), manifest.metadata
        if not spec.package and not spec.image:
            raise BadInput("spec.package is missing: upload the code first, or use `dayfly deploy`")
        if self._follower is not None:
            await self._have(metadata.namespace, {spec.package}, {spec.environment})
        id_ = function_id(metadata.namespace, metadata.name)
        async with self._deciding():
            environment = self._libraries.find(metadata.namespace, spec.environment)
            self._libraries.mold(environment, metadata.namespace, spec)  # or it is refused
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
            self._tell_watchers()  # who tells others tells them what is final
            if before is None or before.version != version or id_ in self.pool.unready:
                self._put_to_use(stored)
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
        namespace, spec = stored.id.partition("/")[0], stored.spec
        if spec.image:
            environment, mold = self._libraries.container(
                stored.id, str(stored.version), spec, spec.port
            )
        else:
            environment = self._libraries.find(namespace, spec.environment)
            mold = self._libraries.mold(environment, namespace, spec)
        spec = msgspec.structs.replace(spec, min_scale=self._least(stored))
        function = Function(stored.id, str(stored.version), spec, mold)
        self.pool.deploy(function, environment)

    def _least(self, stored: StoredFunction) -> int:
        """How many sandboxes are kept here though nobody calls."""
        return stored.spec.min_scale if self.owns(stored.id) else 0

    async def delete(self, id_: FunctionId) -> None:
        """Forget a function. Raises `FunctionNotFound`."""
        async with self._deciding():
            if id_ not in self.functions:
                raise FunctionNotFound(f"no function {id_!r}")
            await self._declarations.delete_function(id_)
            self._change(id_, None)
            self._arrivals.forget(id_)
            self.pool.remove(id_)
            self.events.forget(id_)

    # ---- environments -------------------------------------------------------------------------

    async def build(self, manifest: EnvironmentManifest, progress: Progress) -> StoredEnvironment:
        """Declare and build an environment; functions that use it move to it at once."""
        environment, locked = await self._libraries.make(manifest, progress)
        spec, metadata = manifest.spec, manifest.metadata
        now = time.time()
        async with self._deciding():
            namespace, name = metadata.namespace, metadata.name
            stored = StoredEnvironment(namespace, name, spec, environment, now, locked)
            await self._declarations.save_environment(stored)
            before = self._libraries.declared.get((namespace, name))
            self._libraries.declared[namespace, name] = stored
            if before is not None and before.environment != environment:
                await self._move_users(namespace, name)
        return stored

    async def _move_users(self, namespace: str, name: str) -> None:
        """Give the functions of a changed environment a new version on the new one."""
        for stored in list(self.functions.values()):
            if stored.spec.environment != name:
                continue
            used = self._libraries.find(stored.id.partition("/")[0], name)
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
        declared = self._libraries.declared
        async with self._deciding():
            if (namespace, name) not in declared:
                raise EnvironmentNotFound(f"no environment {namespace}/{name}")
            digest = declared[namespace, name].environment.digest
            users = [s.id for s in self.functions.values() if s.environment == digest]
            if users:
                raise BadInput(f"environment {name!r} is used by {', '.join(sorted(users)[:5])}")
            await self._declarations.delete_environment(namespace, name)
            del declared[namespace, name]

    # ---- workflows ----------------------------------------------------------------------------

    async def set_workflow(self, namespace: str, name: str, spec: WorkflowSpec) -> None:
        """Declare a workflow; runs that have begun go on as they were.

        Raises `BadInput` or `EnvironmentNotFound`, and then changes nothing.
        """
        spec = await self._stored(spec)
        steps = (*spec.steps, *spec.finally_)
        if not spec.package and any(step.handler is not None for step in steps):
            raise BadInput("spec.package is missing: use `dayfly workflow deploy` for handlers")
        async with self._deciding():
            there = {n: flow for (where, n), flow in self.workflows.items() if where == namespace}
            tasks = {n: task for (where, n), task in self.tasks.items() if where == namespace}
            await asyncio.to_thread(graph.check, spec, tasks, there | {name: spec}, name)
            for environment in sorted({spec.environment, *(s.environment or BASE for s in steps)}):
                self._libraries.find(namespace, environment)
            content = msgspec.json.encode(spec)
            await self._declarations.save_spec("Workflow", namespace, name, content)
            self.workflows[namespace, name] = spec

    async def delete_workflow(self, namespace: str, name: str) -> None:
        """Forget a workflow; its runs go on. Raises `WorkflowNotFound`."""
        async with self._deciding():
            if self.workflows.pop((namespace, name), None) is None:
                raise WorkflowNotFound(f"no workflow {namespace}/{name}")
            await self._declarations.delete_spec("Workflow", namespace, name)

    async def set_task(self, namespace: str, name: str, spec: TaskSpec) -> None:
        """Declare a task. Raises `BadInput` or `EnvironmentNotFound`, and then changes nothing."""
        spec = await self._stored(spec)
        graph.check_task(spec)
        async with self._deciding():
            self._libraries.find(namespace, spec.environment)
            await self._declarations.save_spec("Task", namespace, name, msgspec.json.encode(spec))
            self.tasks[namespace, name] = spec

    async def delete_task(self, namespace: str, name: str) -> None:
        """Forget a task that no workflow uses. Raises `WorkflowNotFound`, `BadInput`."""
        async with self._deciding():
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
    def environments(self) -> Mapping[tuple[str, str], StoredEnvironment]:
        """Those that are declared, by namespace and name."""
        return self._libraries.declared

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
            environment=self._libraries.find,
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
            ready=self._have if self._follower else None,
            garbage_s=self.config.garbage_s,
        )

    def _identify_step(self, namespace: str, workflow: str, body: Body) -> FunctionId:
        """What the pool calls the function that a step is."""
        if body.spec is None:
            return function_id(namespace, body.function)
        environment = self._libraries.find(namespace, body.spec.environment)
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
        environment = self._libraries.find(namespace, spec.environment)
        mold = self._libraries.mold(environment, namespace, spec)
        function = Function(id_, "1", spec, mold, mounts=mounts)
        return await self.pool.run_once(function, environment, invocation, returned)

    def _spec_of_step(self, namespace: str, body: Body) -> FunctionSpec:
        if body.spec is not None:
            return body.spec
        stored = self.functions.get(function_id(namespace, body.function))
        if stored is None:
            raise FunctionNotFound(f"no function {body.function!r}: deploy it first")
        if stored.spec.image:
            why = "is an image, whose pod has no folders for what a step takes and leaves"
            raise BadInput(f"function {body.function!r} {why}: use one with a handler")
        return stored.spec

    def _prepare_step(self, namespace: str, workflow: str, body: Body) -> FunctionId:
        """Have the pool know the function that a step is."""
        if body.spec is None:
            id_ = function_id(namespace, body.function)
            if id_ not in self.functions:
                raise FunctionNotFound(f"no function {id_!r}: deploy it first")
            return id_
        environment = self._libraries.find(namespace, body.spec.environment)
        named = FunctionId(identity(namespace, workflow, body, environment.digest))
        if named not in self.pool.state.functions:
            self.packages.path(body.spec.package)
            mold = self._libraries.mold(environment, namespace, body.spec)
            self.pool.deploy(Function(named, "1", body.spec, mold), environment)
        return named

    # ---- triggers -----------------------------------------------------------------------------

    async def set_trigger(self, manifest: TriggerManifest, seen: float) -> StoredTrigger:
        """Declare a trigger. What its source has for it after *seen* counts, for a new one.

        Raises `FunctionNotFound` if there is nothing to be run.
        """
        spec, metadata = manifest.spec, manifest.metadata
        key = metadata.namespace, metadata.name
        async with self._deciding():
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
        async with self._changing:
            await self._declarations.note_seen(*key, seen, last)
            if key in self.triggers:
                noted = msgspec.structs.replace(self.triggers[key], seen=seen, last=last)
                self.triggers[key] = noted

    async def delete_trigger(self, namespace: str, name: str) -> None:
        """Forget a trigger; what it has made already is run. Raises `TriggerNotFound`."""
        async with self._deciding():
            if (namespace, name) not in self.triggers:
                raise TriggerNotFound(f"no trigger {namespace}/{name}")
            await self._declarations.delete_trigger(namespace, name)
            del self.triggers[namespace, name]


def _put(there: dict[K, V], key: K, value: V | None) -> None:
    if value is None:
        there.pop(key, None)
    else:
        there[key] = value


def _decoded(content: object, kind: type[V]) -> V | None:
    assert content is None or isinstance(content, bytes)
    return None if content is None else msgspec.json.decode(content, type=kind)


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
