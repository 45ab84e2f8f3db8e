"""The admin plane: REST for functions, environments, invocations, logs and the pool's state."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final

import msgspec
from aiohttp import web
from prometheus_client import generate_latest

import dayfly
from dayfly_gateway import answers, auth, events, later, openapi, routing
from dayfly_gateway.app import read_body
from dayfly_gateway.artifacts import ArtifactsPlane
from dayfly_gateway.config import GatewayConfig
from dayfly_gateway.jobs import JobsPlane
from dayfly_gateway.queues import QueuesPlane
from dayfly_gateway.runs import RunsPlane
from dayfly_gateway.triggers.triggers import Triggers
from dayfly_pool.batch.indices import INDEX_MAX
from dayfly_pool.batch.job import function_of
from dayfly_pool.errors import BadInput, FunctionNotFound, JobNotFound, PlatformError
from dayfly_pool.ids import in_order
from dayfly_pool.models import (
    EnvironmentManifest,
    EnvironmentSpec,
    Failure,
    FunctionId,
    FunctionManifest,
    FunctionSpec,
    Invocation,
    InvocationId,
    LogLine,
    Outcome,
    SandboxId,
    TriggerManifest,
    TriggerSpec,
    function_id,
)
from dayfly_pool.service import Service
from dayfly_pool.store.declarations import StoredEnvironment, StoredFunction
from dayfly_pool.store.secrets import BYTES_MAX as SECRET_BYTES_MAX

log = logging.getLogger("dayfly.admin")
SPEC_BYTES_MAX: Final = 1024 * 1024
FOLLOW_LOOK_S: Final = 1.0
METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


async def _never() -> bool:
    return False


class Management:
    """The handlers of the admin plane."""

    def __init__(
        self,
        service: Service,
        config: GatewayConfig,
        is_ready: Callable[[], bool],
        triggers: Triggers,
    ) -> None:
        self._service = service
        self._config = config
        self._is_ready = is_ready
        self._declared = triggers

    def application(self) -> web.Application:
        """The aiohttp application of this plane."""
        app = web.Application(
            middlewares=[self._guard], client_max_size=self._config.package_bytes_max
        )
        function = "/namespaces/{namespace}/functions/{name}"
        environment = "/namespaces/{namespace}/environments/{name}"
        trigger = "/namespaces/{namespace}/triggers/{name}"
        secret = "/namespaces/{namespace}/secrets/{name}"
        app.add_routes(
            [
                web.get("/live", self._live),
                web.get("/ready", self._ready),
                web.get("/metrics", self._metrics),
                web.get("/openapi.json", self._openapi),
                web.get("/pool", self._pool),
                web.post("/packages", self._put_package),
                web.get("/functions", self._functions),
                web.get(function, self._function),
                web.put(function, self._deploy),
                web.delete(function, self._delete),
                web.post(f"{function}/invocations", self._invoke),
                web.get(f"{function}/logs", self._logs),
                web.get("/namespaces/{namespace}/jobs/{name}/logs", self._job_logs),
                *JobsPlane(self._service, self._config).routes(),
                *QueuesPlane(self._service, self._config).routes(),
                *RunsPlane(self._service, self._config).routes(),
                *ArtifactsPlane(self._service).routes(),
                web.post(f"{function}/redrive", self._redrive),
                web.get("/events", self._events),
                web.get("/events/{id}", self._event),
                web.post("/events/{id}/cancel", self._cancel),
                web.get("/triggers", self._triggers),
                web.put(trigger, self._set_trigger),
                web.delete(trigger, self._delete_trigger),
                web.get("/secrets", self._secrets),
                web.put(secret, self._put_secret),
                web.delete(secret, self._delete_secret),
                web.get("/environments", self._environments),
                web.put(environment, self._build),
                web.delete(environment, self._delete_environment),
            ]
        )
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: auth.Handler) -> web.StreamResponse:
        try:
            auth.check(request, self._config.admin_token)
            return await handler(request)
        except PlatformError as error:
            return events.platform_problem(error)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return events.platform_problem(BadInput(str(error)))

    # ---- health -------------------------------------------------------------------------------

    async def _live(self, request: web.Request) -> web.Response:
        about = {"version": dayfly.__version__, "http": str(self._config.http)}
        return answers.json({"status": "alive"} | about)

    async def _ready(self, request: web.Request) -> web.Response:
        ready = self._is_ready()
        return answers.json({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        await self._service.event_metrics.look()
        text = generate_latest(self._service.pool.metrics.registry)
        return web.Response(body=text, headers={"Content-Type": METRICS_TYPE})

    async def _openapi(self, request: web.Request) -> web.Response:
        return answers.json(openapi.document())

    async def _pool(self, request: web.Request) -> web.Response:
        pool = self._service.pool
        ids = [*pool.state.sandboxes, *pool.state.zygotes]
        # a file of the kernel's for each of them: thousands would hold up every invocation
        used = await asyncio.to_thread(lambda: {id_: pool.memory_bytes(id_) for id_ in ids})
        return answers.json(pool_view(self._service, used))

    # ---- functions ----------------------------------------------------------------------------

    async def _put_package(self, request: web.Request) -> web.Response:
        data = await read_body(request, self._config, self._config.package_bytes_max)
        return answers.json({"digest": await self._service.put_package(data)}, 201)

    async def _functions(self, request: web.Request) -> web.Response:
        stored = sorted(self._service.functions.values(), key=lambda s: s.id)
        return answers.json([function_view(s, self._service) for s in stored])

    async def _function(self, request: web.Request) -> web.Response:
        return answers.json(function_view(self._stored(request), self._service))

    async def _deploy(self, request: web.Request) -> web.Response:
        data = await read_body(request, self._config, SPEC_BYTES_MAX)
        spec = msgspec.json.decode(data, type=FunctionSpec)
        routing.checked(spec.routes)
        manifest = FunctionManifest(metadata=answers.metadata(request), spec=spec)
        stored = await self._service.deploy(manifest)
        return answers.json(function_view(stored, self._service))

    async def _delete(self, request: web.Request) -> web.Response:
        await self._service.delete(self._stored(request).id)
        return web.Response(status=204)

    async def _invoke(self, request: web.Request) -> web.Response:
        body = await read_body(request, self._config, self._config.body_bytes_max)
        if body:
            msgspec.json.decode(body)  # refused here with a clear error, not by the guest
        id_ = InvocationId(secrets.token_hex(16))
        stored = self._stored(request)
        trace = events.trace(request)
        queue_s_max = self._service.config.queue_s_max
        invocation = Invocation(id_, stored.id, body, None, trace, queue_s_max)
        if later.preferences(request.headers.getall("Prefer", ()))[0]:
            invocation = msgspec.structs.replace(invocation, id=in_order(id_))
            keep = self._service.events.accept
            return later.answer(await later.accept(keep, invocation, request))
        return _invoked(id_, await self._service.pool.invoke(invocation))

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        """The last lines as JSON; with `follow` as server-sent events until the client goes."""
        return await self._logs_of(request, self._stored(request).id)

    async def _job_logs(self, request: web.Request) -> web.StreamResponse:
        info = request.match_info
        get = partial(self._service.jobs.get, info["namespace"], info["name"])
        view, of = await get(), ""
        if "index" in request.query:
            of = f"{view.journal.id}-{answers.number(request, 'index', 0, INDEX_MAX)}-"

        async def is_over() -> bool:
            try:
                return (await get()).journal.is_over
            except JobNotFound:
                return True

        return await self._logs_of(request, function_of(view.journal), of, is_over)

    async def _logs_of(
        self,
        request: web.Request,
        id_: FunctionId,
        of: str = "",
        is_over: Callable[[], Awaitable[bool]] = _never,
    ) -> web.StreamResponse:
        tail = request.query.get("tail", "100")
        if not tail.isdigit():
            raise BadInput("tail is not a number")
        logs = self._service.pool.logs
        if "follow" not in request.query:
            return answers.json(logs.tail(id_, int(tail), of))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        async with contextlib.aclosing(logs.follow(id_, int(tail), of)) as lines:
            await self._stream(request, response, lines, is_over)
        return response

    async def _stream(
        self,
        request: web.Request,
        response: web.StreamResponse,
        lines: AsyncIterator[LogLine],
        is_over: Callable[[], Awaitable[bool]],
    ) -> None:
        """Write *lines* as they come, until the client has gone, or the server or they are over."""
        coming: asyncio.Future[LogLine] = asyncio.ensure_future(anext(lines))
        try:
            while self._is_ready() and request.transport is not None:
                if not (await asyncio.wait({coming}, timeout=FOLLOW_LOOK_S))[0]:
                    if await is_over():
                        break
                    continue  # nothing new: look whether anybody is still there
                await response.write(b"data: " + msgspec.json.encode(coming.result()) + b"\n\n")
                coming = asyncio.ensure_future(anext(lines))
        except (StopAsyncIteration, ConnectionError):
            pass
        finally:
            coming.cancel()
            await asyncio.wait({coming})

    def _stored(self, request: web.Request) -> StoredFunction:
        id_ = function_id(request.match_info["namespace"], request.match_info["name"])
        if id_ not in self._service.functions:
            raise FunctionNotFound(f"no function {id_!r}")
        return self._service.functions[id_]

    # ---- events -------------------------------------------------------------------------------

    async def _events(self, request: web.Request) -> web.Response:
        """A page of them, the newest first; the query says which."""
        query = request.query
        state = query.get("state", "")
        if state and state not in later.STATES:
            raise BadInput(f"state is one of {', '.join(later.STATES)}")
        page = await self._service.events.queue.page(
            FunctionId(query["function"]) if "function" in query else None,
            later.STATES[state] if state else None,
            answers.limit(request),
            InvocationId(query["before"]) if "before" in query else None,
        )
        return answers.json([later.view(shown) for shown in page])

    async def _event(self, request: web.Request) -> web.Response:
        shown = await self._service.events.queue.get(InvocationId(request.match_info["id"]))
        if shown is None:
            raise later.InvocationNotFound
        payload = {"event": later.body_view(shown.body)} if shown.body else {}
        return answers.json(later.view(shown) | payload)  # what has succeeded is not kept

    async def _cancel(self, request: web.Request) -> web.Response:
        """As it was before: what is over cannot be cancelled any more."""
        before = await self._service.events.queue.cancel(InvocationId(request.match_info["id"]))
        if before is None:
            raise later.InvocationNotFound
        return answers.json(later.view(before) | {"cancelled": not before.state.is_over})

    async def _redrive(self, request: web.Request) -> web.Response:
        data = await read_body(request, self._config, SPEC_BYTES_MAX)
        which = msgspec.json.decode(data or b"{}", type=Redrive)
        id_ = function_id(request.match_info["namespace"], request.match_info["name"])
        if self._service.events.work_of(id_) is None:
            raise FunctionNotFound(f"no function {id_!r}")
        number = await self._service.events.queue.redrive(id_, which.ids)
        return answers.json({"redriven": number})

    # ---- triggers -----------------------------------------------------------------------------

    async def _triggers(self, request: web.Request) -> web.Response:
        triggers = [trigger for _, trigger in sorted(self._service.triggers.items())]
        return answers.json([self._declared.view(trigger) for trigger in triggers])

    async def _set_trigger(self, request: web.Request) -> web.Response:
        data = await read_body(request, self._config, SPEC_BYTES_MAX)
        spec = msgspec.json.decode(data, type=TriggerSpec)
        manifest = TriggerManifest(metadata=answers.metadata(request), spec=spec)
        return answers.json(self._declared.view(await self._declared.declare(manifest)))

    async def _delete_trigger(self, request: web.Request) -> web.Response:
        info = request.match_info
        await self._declared.delete(info["namespace"], info["name"])
        return web.Response(status=204)

    # ---- secrets ------------------------------------------------------------------------------

    async def _secrets(self, request: web.Request) -> web.Response:
        """Their names; no way leads to a secret's text."""
        names = await asyncio.to_thread(self._service.secrets.names)
        return answers.json([{"namespace": namespace, "name": name} for namespace, name in names])

    async def _put_secret(self, request: web.Request) -> web.Response:
        text = await read_body(request, self._config, SECRET_BYTES_MAX + 2)
        named = answers.metadata(request)
        put = self._service.secrets.put
        await asyncio.to_thread(put, named.namespace, named.name, text)
        return web.Response(status=204)

    async def _delete_secret(self, request: web.Request) -> web.Response:
        named = answers.metadata(request)
        await asyncio.to_thread(self._service.secrets.delete, named.namespace, named.name)
        return web.Response(status=204)

    # ---- environments -------------------------------------------------------------------------

    async def _environments(self, request: web.Request) -> web.Response:
        return answers.json(
            [environment_view(e) for _, e in sorted(self._service.environments.items())]
        )

    async def _build(self, request: web.Request) -> web.StreamResponse:
        """Build it; progress as JSON lines, the last of which has the result or the error."""
        data = await read_body(request, self._config, SPEC_BYTES_MAX)
        spec = msgspec.json.decode(data, type=EnvironmentSpec)
        manifest = EnvironmentManifest(metadata=answers.metadata(request), spec=spec)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        lines: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

        async def build() -> None:
            try:
                stored = await self._service.build(
                    manifest, lambda text: lines.put_nowait({"progress": text})
                )
                lines.put_nowait({"environment": environment_view(stored)})
            except PlatformError as error:
                answer = events.platform_problem(error)
                lines.put_nowait({"problem": msgspec.json.decode(answer.body or b"")})  # type: ignore[arg-type]

        async with asyncio.TaskGroup() as tasks:
            building = tasks.create_task(build())
            await response.prepare(request)
            while not (building.done() and lines.empty()):
                line = await lines.get()
                await response.write(msgspec.json.encode(line) + b"\n")
                if "progress" not in line:
                    break
        return response

    async def _delete_environment(self, request: web.Request) -> web.Response:
        info = request.match_info
        await self._service.delete_environment(info["namespace"], info["name"])
        return web.Response(status=204)


class Redrive(msgspec.Struct, forbid_unknown_fields=True):
    """Which dead events are to be tried again; all, if it does not say."""

    ids: list[InvocationId] | None = None


def _invoked(id_: InvocationId, outcome: Outcome) -> web.Response:
    timing = outcome.timing
    headers = {
        "Dayfly-Invocation": id_,
        "Dayfly-Start": timing.start,
        "Server-Timing": events.server_timing(timing),
        "Content-Type": "application/json",
    }
    if isinstance(outcome, Failure):
        status = events.STATUS_OF_FAILURE.get(outcome.kind, 502)
        answer = events.problem(
            status, outcome.kind, outcome.message, invocation=id_, traceback=outcome.traceback
        )
        answer.headers.update({k: v for k, v in headers.items() if k != "Content-Type"})
        return answer
    return web.Response(body=outcome.body, headers=headers)


def function_view(stored: StoredFunction, service: Service) -> dict[str, Any]:
    """One function as the API shows it: its manifest and its status. Values of env are left out."""
    namespace, _, name = stored.id.partition("/")
    spec = msgspec.to_builtins(stored.spec)
    spec["env"] = dict.fromkeys(stored.spec.env, "***")
    record = service.pool.state.functions.get(FunctionId(stored.id))
    boxes = list(record.sandboxes.values()) if record else []
    status: dict[str, Any] = {
        "version": stored.version,
        "environmentDigest": stored.environment,
        "updated": stored.updated,
        "sandboxes": len(boxes),
        "busy": sum(bool(box.running) for box in boxes),
        "waiting": len(record.queue) if record else 0,
        "url": routing.path_of(stored.id),
    }
    if record:
        decided = {True: "once", False: "each", None: "undecided"}[record.once]
        status["initialize"], status["initializeReason"] = decided, record.once_why
        if record.once and (zygote := service.pool.zygote_of(record.function)):
            status["zygoteMemoryBytes"] = service.pool.memory_bytes(zygote)
    if record and record.failure:
        status["failure"] = {"kind": record.failure.kind, "message": record.failure.message}
    return {
        "apiVersion": "dayfly.dev/v1",
        "kind": "Function",
        "metadata": {"namespace": namespace, "name": name},
        "spec": spec,
        "status": status,
    }


def environment_view(stored: StoredEnvironment) -> dict[str, Any]:
    """One environment as the API shows it."""
    return {
        "apiVersion": "dayfly.dev/v1",
        "kind": "Environment",
        "metadata": {"namespace": stored.namespace, "name": stored.name},
        "spec": msgspec.to_builtins(stored.spec),
        "status": {"digest": stored.environment.digest, "preloadedEarly": stored.environment.early},
    }


def pool_view(service: Service, memory_bytes: Mapping[SandboxId, int]) -> dict[str, Any]:
    """The pool as `dayfly top` shows it; what is newer than *memory_bytes* has 0 of them."""
    pool = service.pool
    now = time.monotonic()
    return {
        "phases": {phase.value: n for phase, n in pool.state.phases().items() if n},
        "waiting": pool.state.waiting,
        "underWay": pool.under_way,
        "misses": pool.state.misses,
        "sandboxesMax": service.config.sandboxes_max,
        "sandboxes": [
            {
                "id": box.id,
                "phase": box.phase.value,
                "function": box.function.id if box.function else None,
                "version": box.function.version if box.function else None,
                "environment": box.mold.environment[:12],
                "network": box.mold.network,
                "forSeconds": round(now - box.since, 3),
                "running": len(box.running),
                "memoryBytes": memory_bytes.get(box.id, 0),
            }
            for box in pool.state.sandboxes.values()
        ],
        "zygotes": [
            {
                "id": zygote.id,
                "namespace": zygote.mold.namespace,
                "function": zygote.mold.function,
                "environment": zygote.mold.environment[:12],
                "network": zygote.mold.network,
                "isReady": zygote.is_ready,
                "forSeconds": round(now - zygote.since, 3),
                "forks": zygote.forks,
                "memoryBytes": memory_bytes.get(zygote.id, 0),
            }
            for zygote in pool.state.zygotes.values()
        ],
    }
