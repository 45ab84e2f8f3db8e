"""The admin plane's part for jobs."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, Final

import msgspec
from aiohttp import web

from dayfly_gateway import answers
from dayfly_gateway.app import BodyTooSlow, read_body
from dayfly_gateway.config import GatewayConfig
from dayfly_pool.batch.indices import INDEX_MAX
from dayfly_pool.batch.job import Asked, Cancel, SetParallelism, SetSuspended, Status
from dayfly_pool.batch.jobs import ITEM_BYTES_MAX, View
from dayfly_pool.batch.model import JobManifest, JobSpec
from dayfly_pool.batch.tasks import Tasks
from dayfly_pool.errors import BadInput
from dayfly_pool.events import rfc3339
from dayfly_pool.models import API_VERSION
from dayfly_pool.service import Service
from dayfly_pool.store.journals import Journal, JournalId

MANIFEST_BYTES_MAX: Final = 2 << 20
LINES: Final = "application/x-ndjson"


class JobsPlane:
    """Handlers under `/jobs` and `/namespaces/NS/jobs`."""

    def __init__(self, service: Service, config: GatewayConfig) -> None:
        self._service, self._config = service, config

    def routes(self) -> list[web.RouteDef]:
        """What this plane answers."""
        job = "/namespaces/{namespace}/jobs/{name}"
        return [
            web.get("/jobs", self._list),
            web.put(job, self._create),
            web.get(job, self._show),
            web.patch(job, self._change),
            web.delete(job, self._delete),
            web.get(f"{job}/results", self._results),
            web.post(f"{job}/retry", self._retry),
        ]

    async def _list(self, request: web.Request) -> web.Response:
        query, limit = request.query, answers.limit(request)
        before = JournalId(query["before"]) if "before" in query else None
        page = await self._service.jobs.page(query.get("namespace"), limit, before)
        return answers.json([_listed(journal, status) for journal, status in page])

    async def _create(self, request: web.Request) -> web.Response:
        """Keep a job. As lines of JSON, the first is its spec, and each other one an item."""
        metadata = answers.metadata(request)
        if request.content_type != LINES:
            spec = msgspec.json.decode(await self._body(request), type=JobSpec)
            manifest = JobManifest(metadata=metadata, spec=spec)
            return answers.json(view_of(await self._service.create_job(manifest)), 201)
        lines = self._lines(request)
        try:
            spec = msgspec.json.decode(await anext(lines, b""), type=JobSpec)
            manifest = JobManifest(metadata=metadata, spec=spec)
            return answers.json(view_of(await self._service.create_job(manifest, lines)), 201)
        finally:
            await lines.aclose()

    async def _body(self, request: web.Request) -> bytes:
        return await read_body(request, self._config, MANIFEST_BYTES_MAX)

    async def _lines(self, request: web.Request) -> AsyncGenerator[bytes, None]:
        """Its lines, each of them when it has come."""
        rest = b""
        async for part in self._parts(request):
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                yield line
            if len(rest) > max(MANIFEST_BYTES_MAX, ITEM_BYTES_MAX):
                raise BadInput("a line is too long: an item has at most 256 KiB")
        if rest:
            yield rest

    async def _parts(self, request: web.Request) -> AsyncIterator[bytes]:
        """What comes, as long as it does come."""
        while True:
            try:
                async with asyncio.timeout(self._config.body_s_grace):
                    part = await request.content.readany()
            except TimeoutError:
                raise BodyTooSlow(f"nothing came for {self._config.body_s_grace:g} s") from None
            if not part:
                return
            yield part

    async def _show(self, request: web.Request) -> web.Response:
        view = await self._named(request)
        is_brief = "brief" in request.query
        shown = view_of(view, None if is_brief else await self._service.jobs.details(view))
        if waits_for := self._service.jobs.waits_for(view.journal.id):
            shown["status"]["waitsFor"] = waits_for
        return answers.json(shown)

    async def _named(self, request: web.Request) -> View:
        info = request.match_info
        return await self._service.jobs.get(info["namespace"], info["name"])

    async def _change(self, request: web.Request) -> web.Response:
        """Suspend, resume, cancel, or run more or fewer tasks at once."""
        change = msgspec.json.decode(await self._body(request), type=Change)
        info = request.match_info
        view = await self._service.jobs.ask(info["namespace"], info["name"], change.asked())
        return answers.json(view_of(view))

    async def _delete(self, request: web.Request) -> web.Response:
        info = request.match_info
        await self._service.jobs.delete(info["namespace"], info["name"])
        return web.Response(status=204)

    async def _retry(self, request: web.Request) -> web.Response:
        wanted = msgspec.json.decode(await self._body(request) or b"{}", type=Retry)
        namespace, name = (request.match_info[key] for key in ("namespace", "name"))
        if wanted.name:
            answers.named(namespace, wanted.name)
        return answers.json(
            view_of(await self._service.retry_job(namespace, name, wanted.name)), 201
        )

    async def _results(self, request: web.Request) -> web.Response:
        """Lines of {"index", "result"}; of all tasks, or of one."""
        info, query = request.match_info, request.query
        index = answers.number(request, "index", 0, INDEX_MAX) if "index" in query else None
        after = answers.number(request, "after", 0, 1 << 32)
        found, then = await self._service.jobs.results(
            info["namespace"], info["name"], index, after
        )
        lines = [b'{"index":%d,"result":%s}\n' % each for each in found]
        headers = {"Content-Type": LINES} | ({"Dayfly-After": str(then)} if then else {})
        return web.Response(body=b"".join(lines), headers=headers)


class Change(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One of the three."""

    suspend: bool | None = None
    parallelism: int | None = None
    cancel: str | None = None

    def asked(self) -> Asked:
        """As jobs hear it. Raises `BadInput`."""
        if [self.suspend, self.parallelism, self.cancel].count(None) != 2:
            raise BadInput("change one of suspend, parallelism, cancel")
        if self.suspend is not None:
            return SetSuspended(self.suspend)
        if self.parallelism is not None:
            if not 1 <= self.parallelism <= 100_000:
                raise BadInput("parallelism is a number from 1 to 100000")
            return SetParallelism(self.parallelism)
        if self.cancel not in ("hard", "soft"):
            raise BadInput("cancel is hard or soft")
        return Cancel(hard=self.cancel == "hard")


class Retry(msgspec.Struct, forbid_unknown_fields=True):
    """What the other job is to be called; the server makes a name if it is empty."""

    name: str = ""


def view_of(view: View, details: Tasks | None = None) -> dict[str, Any]:
    """One job as the API shows it: its manifest and its status. Values of env are left out."""
    spec = msgspec.to_builtins(view.stored.spec)
    spec["env"] = dict.fromkeys(view.stored.spec.env, "***")
    shown = _listed(view.journal, view.status) | {"spec": spec}
    if details is not None:
        shown["status"] |= {
            "succeededIndexes": str(details.succeeded),
            "failedIndexes": str(details.failed),
            "failedTasks": [
                {
                    "index": told.index,
                    "retry": told.retry,
                    "at": rfc3339(told.at),
                    "kind": told.kind,
                    "message": told.message,
                }
                for told in details.told
            ],
        }
    return shown


def _listed(journal: Journal, status: Status) -> dict[str, Any]:
    shown = msgspec.to_builtins(status)
    del shown["most"], shown["ttlS"]
    shown["createdAt"] = rfc3339(journal.created_at)
    for name in ("startedAt", "endedAt"):
        shown[name] = rfc3339(shown[name]) if shown[name] else None
    return {
        "apiVersion": API_VERSION,
        "kind": "Job",
        "metadata": {"namespace": journal.namespace, "name": journal.name, "id": journal.id},
        "status": shown,
    }
