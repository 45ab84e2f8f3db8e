"""The admin plane's part for artifacts: what they hold, byte for byte."""

import asyncio
import os
from typing import Any, Final

from aiohttp import web

from dayfly_gateway import answers
from dayfly_pool.errors import BadInput
from dayfly_pool.service import Service
from dayfly_pool.workflow.artifacts import Artifact
from dayfly_pool.workflow.trees import Entry

PART_BYTES: Final = 1 << 20


class ArtifactsPlane:
    """Handlers under `/namespaces/NS/artifacts`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self) -> list[web.RouteDef]:
        """What this plane answers."""
        return [web.get("/namespaces/{namespace}/artifacts/{kind}/{digest}", self._get)]

    async def _get(self, request: web.Request) -> web.StreamResponse:
        """A file's bytes, or of a folder what is in it; with `path`, one of its files."""
        info, path = request.match_info, request.query.get("path", "")
        artifact = _named(info["namespace"], info["kind"], info["digest"])
        stored = self._service.artifacts
        if artifact.kind == "tree" and not path:
            await asyncio.to_thread(stored.path, artifact)
            entries = await asyncio.to_thread(stored.entries, artifact)
            return answers.json([_view(entry) for entry in entries])
        opened = await asyncio.to_thread(stored.read, artifact, path)
        try:
            size = os.fstat(opened).st_size
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
            response = web.StreamResponse(headers=headers)
            await response.prepare(request)
            while part := await asyncio.to_thread(os.read, opened, PART_BYTES):
                await response.write(part)
            return response
        finally:
            os.close(opened)


def _named(namespace: str, kind: str, digest: str) -> Artifact:
    if kind not in ("file", "tree"):
        raise BadInput("an artifact is a file or a tree: dayfly://NAMESPACE/file/sha256/HEX")
    uri = f"dayfly://{namespace}/{kind}/sha256/{digest}"
    return Artifact(uri, digest, "tree" if kind == "tree" else "file", 0, 0)


def _view(entry: Entry) -> dict[str, Any]:
    kind = {"d": "folder", "f": "file", "x": "file", "l": "link"}[entry.kind]
    view: dict[str, Any] = {"path": entry.path, "kind": kind}
    if kind == "file":
        view |= {"size": entry.size, "sha256": entry.sha256, "isExecutable": entry.kind == "x"}
    elif kind == "link":
        view["target"] = entry.target
    return view
