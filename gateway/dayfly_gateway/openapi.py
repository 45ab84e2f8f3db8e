"""The admin plane's OpenAPI document: schemas from the models, paths by hand."""

from functools import cache
from typing import Any, Final

import msgspec

import dayfly
from dayfly_pool.batch.model import JobSpec
from dayfly_pool.batch.quota import QueueSpec
from dayfly_pool.models import EnvironmentSpec, FunctionSpec, LogLine, TriggerSpec

_NAMED: Final = [
    {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
    for name in ("namespace", "name")
]
_ID: Final = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}


@cache
def document() -> dict[str, Any]:
    """OpenAPI 3.1 for the admin plane."""
    _, schemas = msgspec.json.schema_components(
        [FunctionSpec, EnvironmentSpec, TriggerSpec, JobSpec, QueueSpec, LogLine],
        ref_template="#/components/schemas/{name}",
    )
    schemas["Problem"] = {
        "type": "object",
        "properties": {
            "type": {"type": "string"},
            "title": {"type": "string"},
            "status": {"type": "integer"},
            "detail": {"type": "string"},
        },
        "required": ["type", "title", "status", "detail"],
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Dayfly admin plane", "version": dayfly.__version__},
        "paths": _paths() | _event_paths() | _job_paths() | _workflow_paths() | _run_paths(),
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }


def _paths() -> dict[str, Any]:
    function = "/namespaces/{namespace}/functions/{name}"
    environment = "/namespaces/{namespace}/environments/{name}"
    return {
        "/live": {"get": _operation("Whether the server is alive")},
        "/ready": {"get": _operation("Whether it takes requests", {"503": "Not ready"})},
        "/metrics": {"get": _operation("Prometheus metrics", content="text/plain")},
        "/pool": {"get": _operation("Every sandbox, and the pool's counts")},
        "/packages": {
            "post": _operation("Upload a package (zip)", _BAD, "201", body="application/zip")
        },
        "/functions": {"get": _operation("All functions")},
        function: {
            "parameters": _NAMED,
            "get": _operation("One function", _MISSING),
            "put": _operation("Deploy it", _BAD | _MISSING, schema="FunctionSpec"),
            "delete": _operation("Delete it", _MISSING, "204"),
        },
        f"{function}/invocations": {
            "parameters": _NAMED,
            "post": _operation("Invoke it with a JSON event", _BAD | _MISSING | _FAILED, schema=""),
        },
        f"{function}/logs": {
            "parameters": [
                *_NAMED,
                {"name": "tail", "in": "query", "schema": {"type": "integer", "minimum": 0}},
                {"name": "follow", "in": "query", "schema": {"type": "string"}},
            ],
            "get": _operation("Its last lines; with follow, server-sent events", _BAD | _MISSING),
        },
        "/environments": {"get": _operation("All environments")},
        environment: {
            "parameters": _NAMED,
            "put": _operation(
                "Build it; progress as JSON lines",
                _BAD,
                schema="EnvironmentSpec",
                content="application/x-ndjson",
            ),
            "delete": _operation("Delete it", _BAD | _MISSING, "204"),
        },
    }


def _event_paths() -> dict[str, Any]:
    function = "/namespaces/{namespace}/functions/{name}"
    return {
        f"{function}/redrive": {
            "parameters": _NAMED,
            "post": _operation("Let its dead events wait again", _BAD | _MISSING, schema=""),
        },
        "/events": {
            "parameters": [
                {"name": name, "in": "query", "schema": {"type": "string"}}
                for name in ("function", "state", "limit", "before")
            ],
            "get": _operation("A page of accepted events, the newest first", _BAD),
        },
        "/events/{id}": {
            "parameters": [_ID],
            "get": _operation("One event with its payload and every failure", _MISSING),
        },
        "/events/{id}/cancel": {
            "parameters": [_ID],
            "post": _operation("End it, unless it is over", _MISSING),
        },
        "/triggers": {"get": _operation("All triggers, with when they fire next")},
        "/namespaces/{namespace}/triggers/{name}": {
            "parameters": _NAMED,
            "put": _operation("Declare it", _BAD | _MISSING, schema="TriggerSpec"),
            "delete": _operation("Delete it", _MISSING, "204"),
        },
        "/secrets": {"get": _operation("The names of all secrets")},
        "/namespaces/{namespace}/secrets/{name}": {
            "parameters": _NAMED,
            "put": _operation("Keep it", _BAD, "204", body="text/plain", schema=""),
            "delete": _operation("Delete it", _MISSING, "204"),
        },
    }


def _job_paths() -> dict[str, Any]:
    job = "/namespaces/{namespace}/jobs/{name}"
    return {
        "/jobs": {
            "parameters": [
                {"name": name, "in": "query", "schema": {"type": "string"}}
                for name in ("namespace", "limit", "before")
            ],
            "get": _operation("A page of jobs, the newest first", _BAD),
        },
        job: {
            "parameters": _NAMED,
            "get": _operation("One job, with what its tasks have come to", _MISSING),
            "put": _operation(
                "Have it run; as lines of JSON, the first is its spec, each other one an item",
                _BAD | _MISSING | {"409": "There is another job of that name"},
                "201",
                schema="JobSpec",
            ),
            "patch": _operation("Suspend, resume, cancel or scale it", _BAD | _MISSING, schema=""),
            "delete": _operation("Cancel and forget it", _BAD | _MISSING, "204"),
        },
        f"{job}/results": {
            "parameters": _NAMED,
            "get": _operation(
                "What its tasks returned, as JSON lines",
                _BAD | _MISSING,
                content="application/x-ndjson",
            ),
        },
        f"{job}/retry": {
            "parameters": _NAMED,
            "post": _operation(
                "Have another job do what has not succeeded",
                _BAD | _MISSING | {"409": "There is another job of that name"},
                "201",
            ),
        },
        f"{job}/logs": {
            "parameters": _NAMED,
            "get": _operation("Its tasks' last lines; with follow, as events", _BAD | _MISSING),
        },
        "/queues": {"get": _operation("All queues, declared or in use")},
        "/namespaces/{namespace}/queues/{name}": {
            "parameters": _NAMED,
            "put": _operation("Declare it", _BAD, schema="QueueSpec"),
            "delete": _operation("Forget what was declared of it", _MISSING, "204"),
        },
    }


def _workflow_paths() -> dict[str, Any]:
    workflow, task = (
        "/namespaces/{namespace}/workflows/{name}",
        "/namespaces/{namespace}/tasks/{name}",
    )
    taken = {"409": "There is another run of that name"}
    return {
        "/workflows": {"get": _operation("All workflows")},
        workflow: {
            "parameters": _NAMED,
            "get": _operation("One workflow", _MISSING),
            "put": _operation("Declare it", _BAD, schema=""),
            "delete": _operation("Forget it; its runs go on", _MISSING, "204"),
        },
        f"{workflow}/runs": {
            "parameters": _NAMED,
            "post": _operation("Begin a run of it", _BAD | _MISSING | taken, "201", schema=""),
        },
        "/tasks": {"get": _operation("All tasks")},
        task: {
            "parameters": _NAMED,
            "put": _operation("Declare it", _BAD, schema=""),
            "delete": _operation("Forget it", _BAD | _MISSING, "204"),
        },
    }


def _run_paths() -> dict[str, Any]:
    run, both = "/namespaces/{namespace}/runs/{name}", _BAD | _MISSING
    pages = [
        {"name": name, "in": "query", "schema": {"type": "string"}}
        for name in ("namespace", "limit", "before")
    ]
    token = {"name": "token", "in": "path", "required": True, "schema": {"type": "string"}}
    below = {
        "cancel": ("post", _operation("End it; what runs finally does", both, schema="")),
        "retry": ("post", _operation("Begin another with what succeeded", both, "201")),
        "decisions": ("post", _operation("Approve or refuse a step", both, "202", schema="")),
        "logs": ("get", _operation("What its steps wrote last", both)),
        "provenance": ("get", _operation("What was signed at its end (DSSE)", both)),
    }
    return {
        "/runs": {"parameters": pages, "get": _operation("A page of runs, newest first", _BAD)},
        run: {
            "parameters": _NAMED,
            "get": _operation("One run, with its steps", _MISSING),
            "delete": _operation("Forget one that is over", both, "204"),
        },
        **{
            f"{run}/{name}": {"parameters": _NAMED, method: operation}
            for name, (method, operation) in below.items()
        },
        f"{run}/callbacks/{{token}}": {
            "parameters": [*_NAMED, token],
            "post": _operation("Call back a step that waits", both, "202", schema=""),
        },
        "/namespaces/{namespace}/artifacts/{kind}/{digest}": {
            "parameters": [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in ("namespace", "kind", "digest")
            ],
            "get": _operation(
                "A file's bytes, or what is in a folder",
                both | {"410": "It is not stored any more"},
                content="application/octet-stream",
            ),
        },
        "/provenance/key": {
            "get": _operation("What verifies it", content="application/x-pem-file")
        },
    }


_BAD: Final = {"400": "The input is not valid; nothing was changed", "413": "Too large"}
_MISSING: Final = {"404": "There is no such thing"}
_FAILED: Final = {
    "429": "Its queue is full",
    "502": "The function failed",
    "503": "No capacity",
    "504": "The function ran out of time",
}
_REFUSED: Final = {"401": "The token is missing or wrong", "403": "A page of another site"}


def _operation(
    summary: str,
    errors: dict[str, str] | None = None,
    success: str = "200",
    *,
    body: str = "application/json",
    schema: str | None = None,
    content: str = "application/json",
) -> dict[str, Any]:
    problem = {"schema": {"$ref": "#/components/schemas/Problem"}}
    responses: dict[str, Any] = {success: {"description": "Done"}}
    if success != "204":
        responses[success]["content"] = {content: {}}
    for status, text in (_REFUSED | (errors or {})).items():
        described = {"description": text, "content": {"application/problem+json": problem}}
        responses[status] = described
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if schema is not None or body != "application/json":
        shape = {"schema": {"$ref": f"#/components/schemas/{schema}"}} if schema else {}
        operation["requestBody"] = {"required": bool(schema), "content": {body: shape}}
    return operation
