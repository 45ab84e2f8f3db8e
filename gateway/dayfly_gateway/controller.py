"""Custom resources to declarations, and their status back. Level-triggered.

What a resource says is declared as if it had come by `dayfly apply`; a Kubernetes namespace is the
namespace of that name. One that says nothing of where its code comes from has the code that was
uploaded under its name (`dayfly deploy`). A resource takes over what was declared under its name,
and takes it along when it is deleted; what has no resource is left alone. Which are ours is
remembered beside the declarations (`Mark`), so no finalizer is needed: one that was deleted while
nobody looked is known by its mark. While the API server is away everything stays as it is.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Literal, NamedTuple

import msgspec
from msgspec import Struct

from dayfly_gateway import routing
from dayfly_gateway.triggers.triggers import Triggers
from dayfly_pool.batch.model import JobManifest, JobSpec
from dayfly_pool.cluster import crds
from dayfly_pool.cluster.api import EVERYWHERE, Api, Kind, NotFound
from dayfly_pool.cluster.reconcile import Reconciler
from dayfly_pool.cluster.reflector import Change, Reflector
from dayfly_pool.errors import (
    BadInput,
    EnvironmentNotFound,
    FunctionNotFound,
    JobNotFound,
    PlatformError,
    StoreFailed,
    TriggerNotFound,
    WorkflowNotFound,
)
from dayfly_pool.events import rfc3339
from dayfly_pool.models import (
    Code,
    EnvironmentManifest,
    EnvironmentSpec,
    FunctionManifest,
    FunctionSpec,
    Metadata,
    TriggerManifest,
    TriggerSpec,
    function_id,
)
from dayfly_pool.service import Service
from dayfly_pool.workflow.model import TaskSpec, WorkflowSpec
from dayfly_pool.workflow.shapes import task_of, workflow_of

log = logging.getLogger("dayfly.controller")
KINDS: Final = {
    each.kind: Kind(crds.GROUP, crds.VERSION, each.plural, each.kind) for each in crds.RESOURCES
}
LOOK_S: Final = 5.0
"""How often it is looked at what nobody tells of: how far jobs are, which functions cannot be
loaded, what was deleted behind our back."""

AGAIN_S: Final = 60.0
"""After which what was refused is tried again, if nothing was declared that it may have lacked."""

STORE_AGAIN_S: Final = 1.0
MESSAGE_CHARACTERS_MAX: Final = 1024
GONE: Final = (
    EnvironmentNotFound,
    FunctionNotFound,
    JobNotFound,
    TriggerNotFound,
    WorkflowNotFound,
)
Object = Mapping[str, Any]


class SourceNotUploaded(PlatformError):
    """The code is on somebody's disk, where Kubernetes cannot read it.

    `dayfly apply -f` or `dayfly deploy` uploads it, under this name; or give it in the manifest: as
    spec.files, or by spec.packageUrl and spec.package.
    """

    status = 400


class SpecChanged(PlatformError):
    """The job runs as it was declared first: a job is not changed.

    Delete it and apply it again, or apply it under another name.
    """

    status = 409


class JobForgotten(PlatformError):
    """The job is gone: somebody deleted it, or it was over. It does not run again.

    Delete it here too, and apply it again to run it.
    """

    status = 410


class Building(PlatformError):
    """It is being built."""

    status = 503
    retryable = True


class Mark(Struct, frozen=True):
    """Of which resource a declaration is ours. *generation* is the one that was declared."""

    uid: str
    generation: int


class Build(NamedTuple):
    """An environment that is being built, longer perhaps than one look may take."""

    mark: Mark
    task: asyncio.Task[PlatformError | None]


class Word(NamedTuple):
    """A condition without its time."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str


OVER: Final = ("Complete", "Failed", "Cancelled")


class Controller:
    """Brings the resources of one namespace, or of all (`*`), to *service*.

    One server at a time runs one, once. *url* is where gateways answer, for `status.url`.
    """

    def __init__(
        self,
        api: Api,
        service: Service,
        triggers: Triggers,
        *,
        namespace: str = "",
        url: str = "",
        look_s: float = LOOK_S,
    ) -> None:
        self._api, self._service, self._triggers = api, service, triggers
        self._namespace, self._url = namespace or api.namespace, url.rstrip("/")
        self._reflectors = {
            kind: Reflector(api, what, namespace=self._namespace, changed=self._told(kind))
            for kind, what in KINDS.items()
        }
        self._queue = Reconciler(
            self._reconcile, group=_namespace_of, keys=self._keys, resync_s=look_s
        )
        self._marks: dict[str, Mark] = {}
        self._known: dict[str, tuple[Mark, Any]] = {}
        """What was declared last, of which resource: only if one of them changed it is again."""

        self._failing: set[str] = set()
        self._written: dict[str, tuple[str, Object]] = {}
        """The status that was written, and the version of the resource then."""

        self._builds: dict[str, Build] = {}
        self._tasks: asyncio.TaskGroup

    async def run(self) -> None:
        """Until cancelled. No failure of the API server's ends it, and none of the store's."""
        for (namespace, name), content in (await self._remembered()).items():
            kind, _, own = name.partition("/")
            if self._namespace in (EVERYWHERE, namespace):
                self._marks[f"{kind}/{namespace}/{own}"] = msgspec.json.decode(content, type=Mark)
        async with asyncio.TaskGroup() as self._tasks:
            for kind, reflector in self._reflectors.items():
                self._tasks.create_task(reflector.run(), name=f"reflect-{kind}")
            for reflector in self._reflectors.values():
                await reflector.synced()  # what is not there before that is not known to be gone
            await self._queue.run()

    async def _remembered(self) -> Mapping[tuple[str, str], bytes]:
        """What is ours; waits for the store."""
        while True:
            try:
                return await self._service.marks()
            except StoreFailed as error:
                log.warning("custom resources wait for the store", extra={"why": error.detail})
            await asyncio.sleep(STORE_AGAIN_S)

    def _told(self, kind: str) -> Callable[[Change], None]:
        return lambda change: self._queue.add(f"{kind}/{change.key}")

    def _keys(self) -> set[str]:
        """Those to look at; what fails has a time of its own."""
        there = {
            f"{kind}/{place}"
            for kind, reflector in self._reflectors.items()
            for place in reflector.objects
        }
        return (there | self._marks.keys()) - self._failing

    # ---- one of them --------------------------------------------------------------------------

    async def _reconcile(self, key: str) -> None:
        kind, _, place = key.partition("/")
        found = self._reflectors[kind].objects.get(place)
        mark = self._marks.get(key)
        self._failing.add(key)
        if mark is not None and (found is None or found["metadata"]["uid"] != mark.uid):
            await self._undeclare(key)
        if found is None:
            self._written.pop(key, None)
        elif (error := await self._bring(key, found)) is not None:
            if error.retryable:
                raise error
            self._queue.add(key, AGAIN_S)
            return
        self._failing.discard(key)

    async def _bring(self, key: str, found: Object) -> PlatformError | None:
        """Declare what it says, unless that is done, and tell it; why it cannot be."""
        metadata = found["metadata"]
        mark, failed = Mark(metadata["uid"], metadata["generation"]), None
        told = found.get("status", {})
        is_told = told.get("observedGeneration") == mark.generation
        if key.startswith("Job/") and is_told and told.get("state") in OVER:
            return None  # it never runs again
        try:
            known = self._known.get(key)
            if key.startswith("Job/") or known != (mark, self._declared(key)):
                await self._declare(key, found, mark)
                self._known[key] = mark, self._declared(key)
                if self._known[key] != known:
                    self._wake(key)
        except Building as error:
            words = [Word("Ready", "Unknown", "Building", str(error))]
        except PlatformError as error:
            failed = None if isinstance(error, SpecChanged) else error
            words = [Word("Ready", "False", type(error).__name__, _told_of(error))]
        else:
            words = self._words(key)
        fields = await self._fields(key)
        if isinstance(failed, JobForgotten):  # then it is known that it was there
            fields = {
                k: v for k, v in told.items() if k not in crds.Status.__struct_encode_fields__
            }
        await self._tell(key, found, words, fields)
        return failed

    def _wake(self, key: str) -> None:
        """What fails may have waited for this."""
        for other in sorted(self._failing - {key}):
            if _namespace_of(other) == _namespace_of(key):
                self._queue.add(other)

    async def _declare(self, key: str, found: Object, mark: Mark) -> None:
        """Have it declared, marked as ours. Raises `PlatformError`, and then it is as it was."""
        kind, namespace, name = key.split("/")
        spec = self._with_code(key, _spec_of(kind, found["spec"]))
        before = self._marks.get(key)
        if kind == "Job" and await self._is_there(namespace, name, found):
            if before is not None and before.generation != mark.generation:
                raise SpecChanged
            if before is not None:
                return
        if before is None or kind == "Job":
            await self._mark(key, mark)
        try:
            metadata = Metadata(name=name, namespace=namespace)
            match spec:
                case FunctionSpec():
                    routing.checked(spec.routes)
                    await self._service.deploy(FunctionManifest(metadata=metadata, spec=spec))
                case EnvironmentSpec():
                    self._build(key, EnvironmentManifest(metadata=metadata, spec=spec), mark)
                case TriggerSpec():
                    if spec.folder is not None:  # whose files are not those of a namespace
                        raise BadInput(
                            "spec.folder is a folder of the server's own: declare it with"
                            " `dayfly apply`"
                        )
                    await self._triggers.declare(TriggerManifest(metadata=metadata, spec=spec))
                case JobSpec():
                    await self._service.create_job(JobManifest(metadata=metadata, spec=spec))
                case WorkflowSpec():
                    await self._service.set_workflow(namespace, name, spec)
                case TaskSpec():
                    await self._service.set_task(namespace, name, spec)
        except Building:
            raise
        except PlatformError:
            if before is None:
                await self._mark(key, None)
            raise

    async def _is_there(self, namespace: str, name: str, found: Object) -> bool:
        """Whether there is such a job. Raises `JobForgotten` for one that has been run."""
        try:
            await self._service.jobs.get(namespace, name)
        except JobNotFound:
            if found.get("status", {}).get("state"):
                raise JobForgotten from None
            return False
        return True

    def _with_code(self, key: str, spec: Any) -> Any:
        """*spec* with the code that was uploaded under its name, if it says nothing of its own."""
        if not isinstance(spec, Code) or spec.package or spec.files or not _needs_code(spec):
            return spec
        declared = self._declared(key)
        if isinstance(spec, JobSpec) or declared is None or not declared.package:
            raise SourceNotUploaded
        return msgspec.structs.replace(spec, package=declared.package, source=None)

    def _build(self, key: str, manifest: EnvironmentManifest, mark: Mark) -> None:
        """Raises `Building` until it is built, then what came of it."""
        build = self._builds.get(key)
        if build is not None and build.mark == mark and build.task.done():
            del self._builds[key]
            if (error := build.task.result()) is not None:
                raise error
            return
        if build is None or build.mark != mark:
            self._stop_building(key)
            task = self._tasks.create_task(self._built(key, manifest), name=f"build {key}")
            self._builds[key] = Build(mark, task)
        raise Building

    async def _built(self, key: str, manifest: EnvironmentManifest) -> PlatformError | None:
        try:
            await self._service.build(manifest, lambda line: None)
        except PlatformError as error:
            return error
        finally:
            self._queue.add(key)
        return None

    def _stop_building(self, key: str) -> None:
        if (build := self._builds.pop(key, None)) is not None:
            build.task.cancel()

    async def _undeclare(self, key: str) -> None:
        """Its resource is gone. Raises `PlatformError` while something else needs it."""
        kind, namespace, name = key.split("/")
        self._stop_building(key)
        try:
            match kind:
                case "Function":
                    await self._service.delete(function_id(namespace, name))
                case "Environment":
                    await self._service.delete_environment(namespace, name)
                case "Trigger":
                    await self._triggers.delete(namespace, name)
                case "Job":
                    await self._service.jobs.delete(namespace, name)
                case "Workflow":
                    await self._service.delete_workflow(namespace, name)
                case "Task":
                    await self._service.delete_task(namespace, name)
        except GONE:
            pass
        await self._mark(key, None)
        self._known.pop(key, None)
        self._written.pop(key, None)

    async def _mark(self, key: str, mark: Mark | None) -> None:
        kind, namespace, name = key.split("/")
        content = None if mark is None else msgspec.json.encode(mark)
        await self._service.mark(namespace, f"{kind}/{name}", content)
        if mark is None:
            self._marks.pop(key, None)
        else:
            self._marks[key] = mark

    # ---- what there is ------------------------------------------------------------------------

    def _declared(self, key: str) -> Any:
        """The spec that is declared; None if there is none, or of a job."""
        kind, namespace, name = key.split("/")
        service, named = self._service, (namespace, name)
        match kind:
            case "Function":
                stored: Any = service.functions.get(function_id(namespace, name))
            case "Environment":
                stored = service.environments.get(named)
            case "Trigger":
                stored = service.triggers.get(named)
            case "Workflow":
                return service.workflows.get(named)
            case "Task":
                return service.tasks.get(named)
            case _:
                return None
        return stored and stored.spec

    def _words(self, key: str) -> list[Word]:
        """What is to be said of one that is declared."""
        kind, namespace, name = key.split("/")
        if kind == "Function":
            record = self._service.pool.state.functions.get(function_id(namespace, name))
            if record is not None and (failure := record.failure) is not None:
                return [Word("Ready", "False", failure.kind, failure.message)]
        return [Word("Ready", "True", "Declared", "It is as its spec says.")]

    async def _fields(self, key: str) -> dict[str, Any]:
        """Its status, but for the conditions."""
        kind, namespace, name = key.split("/")
        declared = self._declared(key)
        if kind == "Job":
            return await self._job(namespace, name)
        if declared is None:
            return {}
        status: Struct
        match kind:
            case "Function":
                stored = self._service.functions[function_id(namespace, name)]
                url = self._url + routing.path_of(stored.id)
                status = crds.FunctionStatus(
                    url=url, version=stored.version, package=stored.spec.package
                )
            case "Environment":
                built = self._service.environments[namespace, name].environment
                status = crds.EnvironmentStatus(digest=built.digest)
            case "Trigger":
                status = crds.TriggerStatus(source=declared.source, function=declared.function)
            case "Workflow":
                steps = len(declared.steps) + len(declared.finally_)
                status = crds.WorkflowStatus(steps=steps, package=declared.package)
            case _:
                status = crds.TaskStatus(package=declared.package)
        return dict(msgspec.to_builtins(status))

    async def _job(self, namespace: str, name: str) -> dict[str, Any]:
        try:
            now = (await self._service.jobs.get(namespace, name)).status
        except JobNotFound:
            return {}
        status = crds.JobStatus(
            state=now.state,
            total=now.total,
            succeeded=now.succeeded,
            failed=now.failed,
            started_at=rfc3339(now.started_at, "seconds") if now.started_at else "",
            ended_at=rfc3339(now.ended_at, "seconds") if now.ended_at else "",
        )
        return dict(msgspec.to_builtins(status))

    # ---- what is said of it -------------------------------------------------------------------

    async def _tell(
        self, key: str, found: Object, words: list[Word], fields: dict[str, Any]
    ) -> None:
        """Write its status, if it is another one. Raises `ApiError`."""
        kind, namespace, name = key.split("/")
        metadata = found["metadata"]
        version, before = self._written.get(key, ("", {}))
        if version != metadata["resourceVersion"]:
            before = found.get("status") or {}
        if (state := fields.get("state")) in OVER:
            words.append(Word(state, "True", state, f"The job is {state}."))
        conditions = _conditions(words, before.get("conditions", ()), metadata["generation"])
        status = {"observedGeneration": metadata["generation"], "conditions": conditions} | fields
        if status == before:
            return
        patch = {"status": {gone: None for gone in before.keys() - status.keys()} | status}
        try:
            await self._api.merge(KINDS[kind], name, patch, namespace=namespace, status=True)
        except NotFound:
            return  # it is told soon that it is gone
        self._written[key] = metadata["resourceVersion"], status


def _conditions(
    words: list[Word], before: Iterable[Mapping[str, Any]], generation: int
) -> list[dict[str, Any]]:
    """*words* as Kubernetes has them; the time is when the status of one changed last."""
    known = {each["type"]: each for each in before}
    now = rfc3339(time.time(), "seconds")
    found = []
    for word in words:
        old = known.get(word.type, {})
        since = old["lastTransitionTime"] if old.get("status") == word.status else now
        found.append(
            {
                **word._asdict(),
                "message": word.message[:MESSAGE_CHARACTERS_MAX] or word.reason,  # 1.20: not empty
                "lastTransitionTime": since,
                "observedGeneration": generation,
            }
        )
    return found


def _namespace_of(key: str) -> str:
    return key.split("/")[1]


def _told_of(error: PlatformError) -> str:
    return f"{error} {error.remedy()}".strip()


def _spec_of(kind: str, spec: Mapping[str, Any]) -> Any:
    """As the model has it. Raises `BadInput`."""
    if kind == "Workflow":
        return workflow_of(spec)
    if kind == "Task":
        return task_of(spec)
    if kind == "Environment" and isinstance(listed := spec.get("requirements"), list):
        spec = {**spec, "requirements": "\n".join(map(str, listed))}
    model = next(each.spec for each in crds.RESOURCES if each.kind == kind)
    try:
        return msgspec.convert(spec, model)
    except msgspec.ValidationError as error:
        raise BadInput(f"spec: {error}") from None


def _needs_code(spec: Code) -> bool:
    match spec:
        case FunctionSpec():
            return not spec.image
        case WorkflowSpec():
            steps = (*spec.steps, *spec.finally_)
            return spec.source is not None or any(step.handler is not None for step in steps)
        case TaskSpec():
            return spec.source is not None or spec.handler is not None
        case _:
            return spec.source is not None
