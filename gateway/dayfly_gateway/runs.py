"""The admin plane's part for workflows, tasks and runs."""

import asyncio
import time
from typing import Any, Final

import msgspec
from aiohttp import web

from dayfly_gateway import answers, run_views
from dayfly_gateway.app import read_body
from dayfly_gateway.config import GatewayConfig
from dayfly_pool.errors import BadInput, WorkflowNotFound
from dayfly_pool.events import rfc3339
from dayfly_pool.logs import LINES_MAX
from dayfly_pool.models import API_VERSION
from dayfly_pool.service import Service
from dayfly_pool.store.journals import Journal, JournalId
from dayfly_pool.workflow.facts import VALUE_BYTES_MAX
from dayfly_pool.workflow.model import plain
from dayfly_pool.workflow.run import AskCancel, Decide, RunStatus, token_of
from dayfly_pool.workflow.runs import View
from dayfly_pool.workflow.shapes import task_of, workflow_of

WAIT_S_MAX: Final = 60
SPEC_BYTES_MAX: Final = 16 << 20
"""Of a graph of 100,000 steps."""

STEPS_TOLD: Final = 20

SMALL_BYTES_MAX: Final = 2 << 20


class RunsPlane:
    """Handlers under `/workflows`, `/tasks`, `/runs` and their places in namespaces."""

    def __init__(self, service: Service, config: GatewayConfig) -> None:
        self._service, self._config = service, config

    def routes(self) -> list[web.RouteDef]:
        """What this plane answers."""
        workflow = "/namespaces/{namespace}/workflows/{name}"
        task = "/namespaces/{namespace}/tasks/{name}"
        run = "/namespaces/{namespace}/runs/{name}"
        return [
            web.get("/workflows", self._workflows),
            web.get(workflow, self._workflow),
            web.put(workflow, self._set_workflow),
            web.delete(workflow, self._delete_workflow),
            web.get("/tasks", self._tasks),
            web.put(task, self._set_task),
            web.delete(task, self._delete_task),
            web.post(f"{workflow}/runs", self._start),
            web.get("/runs", self._runs),
            web.get(run, self._run),
            web.delete(run, self._delete_run),
            web.get(f"{run}/provenance", self._provenance),
            web.get("/provenance/key", self._key),
            web.get(f"{run}/logs", self._logs),
            web.post(f"{run}/cancel", self._cancel),
            web.post(f"{run}/retry", self._retry),
            web.post(f"{run}/callbacks/{{token}}", self._call_back),
            web.post(f"{run}/decisions", self._decide),
        ]

    async def _body(self, request: web.Request, most: int = SMALL_BYTES_MAX) -> bytes:
        return await read_body(request, self._config, most)

    # ---- declarations -------------------------------------------------------------------------

    async def _workflows(self, request: web.Request) -> web.Response:
        found = sorted(self._service.workflows)
        return answers.json([self._declared("Workflow", *key) for key in found])

    async def _workflow(self, request: web.Request) -> web.Response:
        named = answers.metadata(request)
        spec = self._service.workflows.get((named.namespace, named.name))
        if spec is None:
            raise WorkflowNotFound(f"no workflow {named.namespace}/{named.name}")
        view = self._declared("Workflow", named.namespace, named.name)
        return answers.json(view | {"spec": plain(spec)})

    async def _set_workflow(self, request: web.Request) -> web.Response:
        named = answers.metadata(request)
        spec = workflow_of(msgspec.json.decode(await self._body(request, SPEC_BYTES_MAX)))
        await self._service.set_workflow(named.namespace, named.name, spec)
        return answers.json(self._declared("Workflow", named.namespace, named.name))

    async def _delete_workflow(self, request: web.Request) -> web.Response:
        named = answers.metadata(request)
        await self._service.delete_workflow(named.namespace, named.name)
        return web.Response(status=204)

    async def _tasks(self, request: web.Request) -> web.Response:
        return answers.json([self._declared("Task", *key) for key in sorted(self._service.tasks)])

    async def _set_task(self, request: web.Request) -> web.Response:
        named = answers.metadata(request)
        spec = task_of(msgspec.json.decode(await self._body(request)))
        await self._service.set_task(named.namespace, named.name, spec)
        return answers.json(self._declared("Task", named.namespace, named.name))

    async def _delete_task(self, request: web.Request) -> web.Response:
        named = answers.metadata(request)
        await self._service.delete_task(named.namespace, named.name)
        return web.Response(status=204)

    def _declared(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
        view: dict[str, Any] = {
            "apiVersion": API_VERSION,
            "kind": kind,
            "metadata": {"namespace": namespace, "name": name},
        }
        if kind == "Task":
            return view | {"spec": plain(self._service.tasks[namespace, name])}
        spec = self._service.workflows[namespace, name]
        params = [param.name for param in spec.params]
        return view | {"status": {"steps": len(spec.steps), "params": params}}

    # ---- runs ---------------------------------------------------------------------------------

    async def _start(self, request: web.Request) -> web.Response:
        named = answers.metadata(request)
        wanted = msgspec.json.decode(await self._body(request) or b"{}", type=Start)
        view = await self._service.runs.start(
            named.namespace, named.name, wanted.params, wanted.name, wanted.by
        )
        return answers.json(_listed(view.journal, view.status), 201)

    async def _runs(self, request: web.Request) -> web.Response:
        query = request.query
        before = JournalId(query["before"]) if "before" in query else None
        page = await self._service.runs.page(query.get("namespace"), answers.limit(request), before)
        return answers.json([_listed(journal, status) for journal, status in page])

    async def _run(self, request: web.Request) -> web.Response:
        info = request.match_info
        runs = self._service.runs
        if "brief" in request.query:
            wait_s = answers.number(request, "wait", 0, WAIT_S_MAX)
            journal, status = await runs.over(info["namespace"], info["name"], wait_s)
            expected = [
                {"key": each.key, "kind": each.kind, "what": each.what}
                for each in runs.expected(journal)
            ]
            return answers.json(_listed(journal, status) | {"expected": expected})
        view = await runs.get(info["namespace"], info["name"])
        engine = await runs.engine(view)
        tree = engine.tree()
        attempts = run_views.attempts_of(await runs.told(view))
        shown = _listed(view.journal, view.status) | {
            "view": {
                "namespace": view.journal.namespace,
                "name": view.journal.name,
                "workflow": view.stored.workflow,
                "status": view.status.state,
                "now": time.time(),
                "tree": run_views.step_view(tree, attempts) if tree is not None else None,
            },
            "expected": [
                {
                    "key": each.key,
                    "kind": each.kind,
                    "what": each.what,
                    "token": token_of(view.stored, each.key, each.attempt)
                    if each.kind == "callback"
                    else None,
                }
                for each in runs.expected(view.journal)
            ],
        }
        return answers.json(shown)

    async def _provenance(self, request: web.Request) -> web.Response:
        info = request.match_info
        envelope = await self._service.runs.provenance(info["namespace"], info["name"])
        return web.Response(body=envelope, headers={"Content-Type": "application/json"})

    async def _key(self, request: web.Request) -> web.Response:
        pem = await asyncio.to_thread(lambda: self._service.key.public_pem)
        return web.Response(body=pem, headers={"Content-Type": "application/x-pem-file"})

    async def _logs(self, request: web.Request) -> web.Response:
        """The last lines that its steps wrote, as far as they are still there.

        Of one *step* also those of its instances, and of the steps of a workflow that it is.
        """
        info = request.match_info
        runs, logs = self._service.runs, self._service.pool.logs
        view = await runs.get(info["namespace"], info["name"])
        tail = answers.number(request, "tail", 100, 10_000)
        prefix = f"{view.journal.id}/"
        lines = [
            line
            for id_ in runs.functions(view)
            for line in logs.tail(id_, LINES_MAX)
            if line.invocation.startswith(prefix)
        ]
        step = request.query.get("step", "")
        if step:
            below = (f"{step}[", f"{step}/")
            found = [(run_views.step_of(line.invocation), line) for line in lines]
            lines = [line for key, line in found if key == step or key.startswith(below)]
            if not lines:
                await self._check_step(view, step)
        return answers.json(sorted(lines, key=lambda line: line.time)[-tail:] if tail else [])

    async def _check_step(self, view: View, step: str) -> None:
        """Raises `BadInput` when the run has no such step."""
        tree = (await self._service.runs.engine(view)).tree()
        root = view.stored.definition.root
        found = list(run_views.keys(run_views.step_view(tree))) if tree is not None else []
        found = [*dict.fromkeys([*(each.name for each in (*root.steps, *root.finally_)), *found])]
        if step not in found:
            there = ", ".join(found[:STEPS_TOLD]) + (", ..." if len(found) > STEPS_TOLD else "")
            raise BadInput(f"run {view.journal.name!r} has no step {step!r}; it has {there}")

    async def _delete_run(self, request: web.Request) -> web.Response:
        info = request.match_info
        await self._service.runs.delete(info["namespace"], info["name"])
        return web.Response(status=204)

    async def _cancel(self, request: web.Request) -> web.Response:
        wanted = msgspec.json.decode(await self._body(request) or b"{}", type=CancelRun)
        info = request.match_info
        asked = AskCancel(by=wanted.by, hard=wanted.hard)
        view = await self._service.runs.ask(info["namespace"], info["name"], asked)
        return answers.json(_listed(view.journal, view.status))

    async def _retry(self, request: web.Request) -> web.Response:
        info = request.match_info
        view = await self._service.runs.retry(info["namespace"], info["name"])
        return answers.json(_listed(view.journal, view.status), 201)

    async def _call_back(self, request: web.Request) -> web.Response:
        body = await read_body(request, self._config, VALUE_BYTES_MAX)
        value = msgspec.json.decode(body) if body else None
        info = request.match_info
        await self._service.runs.call_back(info["namespace"], info["name"], info["token"], value)
        return web.Response(status=202)

    async def _decide(self, request: web.Request) -> web.Response:
        wanted = msgspec.json.decode(await self._body(request), type=Decision)
        info = request.match_info
        decided = Decide(wanted.key, 0, wanted.approved, wanted.by, wanted.note)
        await self._service.runs.decide(info["namespace"], info["name"], wanted.key, decided)
        return web.Response(status=202)


class Start(msgspec.Struct, forbid_unknown_fields=True):
    """What a run is to begin with."""

    params: dict[str, Any] = {}
    name: str = ""
    by: str = ""


class CancelRun(msgspec.Struct, forbid_unknown_fields=True):
    """How a run is to end."""

    hard: bool = False
    by: str = ""


class Decision(msgspec.Struct, forbid_unknown_fields=True):
    """Somebody's word about a step that waits for approval."""

    key: str
    approved: bool
    by: str = ""
    note: str = ""


def _listed(journal: Journal, status: RunStatus) -> dict[str, Any]:
    shown = msgspec.to_builtins(status)
    for name in ("startedAt", "endedAt"):
        shown[name] = rfc3339(shown[name]) if shown[name] else None
    return {
        "apiVersion": API_VERSION,
        "kind": "Run",
        "metadata": {"namespace": journal.namespace, "name": journal.name, "id": journal.id},
        "status": shown,
    }
