"""From a plan to a deployed function: pack, build what it needs, upload, declare."""

from pathlib import Path
from typing import Any, Protocol, assert_never

import msgspec

from dayfly_gateway import faces
from dayfly_gateway.client import Client
from dayfly_gateway.manifests import (
    Applied,
    FlowPlan,
    JobPlan,
    Plan,
    job_spec,
    with_requirements,
)
from dayfly_pool.batch.model import QueueManifest
from dayfly_pool.models import EnvironmentManifest, TriggerManifest
from dayfly_pool.packages import pack
from dayfly_pool.workflow.model import WorkflowManifest, plain


class Progress(Protocol):
    """Who is told how a deployment goes on."""

    def uploaded(self, done: int, total: int) -> None:
        """*done* of *total* bytes of the package are sent."""

    def building(self, environment: str, text: str) -> None:
        """The server says what it does for an environment."""


def order(item: Applied) -> int:
    """What is applied first: what others need."""
    return (EnvironmentManifest, Plan, TriggerManifest, QueueManifest, FlowPlan, JobPlan).index(
        type(item)
    )


def apply(client: Client, item: Applied, progress: Progress) -> dict[str, Any]:
    """Carry out one thing of a manifest; returns it as the API shows it."""
    match item:
        case Plan():
            return deploy(client, item, progress)
        case EnvironmentManifest():
            return build(client, item, progress)
        case TriggerManifest(metadata=metadata, spec=spec):
            builtins = msgspec.to_builtins(spec)
            return client.put_trigger(metadata.namespace, metadata.name, builtins)
        case QueueManifest(metadata=metadata, spec=queue):
            builtins = msgspec.to_builtins(queue)
            return client.put_queue(metadata.namespace, metadata.name, builtins)
        case FlowPlan():
            return declare(client, item, progress)
        case JobPlan():
            return run(client, item, progress)
        case _:
            assert_never(item)


def deploy(client: Client, plan: Plan, progress: Progress) -> dict[str, Any]:
    """Carry out *plan*; returns the function as the API shows it.

    What can be refused here is refused before anything is sent.
    """
    manifest = plan.manifest
    archive = pack(plan.source) if plan.source is not None else None
    if plan.environment is not None:
        build(client, plan.environment, progress)
    spec = msgspec.to_builtins(manifest.spec)
    del spec["source"]
    if archive is not None:
        spec["package"] = client.put_package(archive, progress.uploaded)
    return client.put_function(manifest.metadata.namespace, manifest.metadata.name, spec)


def declare(client: Client, plan: FlowPlan, progress: Progress) -> dict[str, Any]:
    """Declare a workflow or task; returns it as the API shows it."""
    metadata, spec = plan.manifest.metadata, plain(plan.manifest.spec)
    spec.pop("source", None)
    if plan.environment is not None:
        build(client, plan.environment, progress)
    if plan.source is not None:
        spec["package"] = client.put_package(pack(plan.source), progress.uploaded)
    kind = "workflows" if isinstance(plan.manifest, WorkflowManifest) else "tasks"
    return client.put_spec(metadata.namespace, kind, metadata.name, spec)


def declare_file(
    client: Client, file: Path, namespace: str, progress: Progress, name: str = ""
) -> list[dict[str, Any]]:
    """Declare the workflows of a Python file, or the one called *name*.

    As the API shows them, with `sent`: what code went along, if any.
    """
    views = []
    for flow in faces.from_python(file, name):
        metadata = msgspec.structs.replace(flow.metadata, namespace=namespace)
        manifest = WorkflowManifest(metadata=metadata, spec=flow.spec)
        code = file.parent / flow.spec.source if flow.spec.source else None
        plan = FlowPlan(manifest, code)
        if not flow.is_environment_named:
            plan = with_requirements(plan, file.parent)
        sent = {"sent": str(code)} if code is not None else {}
        views.append(declare(client, plan, progress) | sent)
    return views


def run(client: Client, plan: JobPlan, progress: Progress) -> dict[str, Any]:
    """Have a job run; returns it as the API shows it."""
    metadata, spec = plan.manifest.metadata, job_spec(plan.manifest)
    if plan.source is not None:
        spec["package"] = client.put_package(pack(plan.source), progress.uploaded)
    return client.put_job(metadata.namespace, metadata.name, spec)


def build(client: Client, manifest: EnvironmentManifest, progress: Progress) -> dict[str, Any]:
    """Have an environment built; returns it as the API shows it."""
    metadata, spec = manifest.metadata, msgspec.to_builtins(manifest.spec)
    return client.put_environment(
        metadata.namespace, metadata.name, spec, lambda text: progress.building(metadata.name, text)
    )


def url_of(client: Client, view: dict[str, Any]) -> str:
    """Where a function answers: on the address that the server tells, else on its usual port."""
    address = client.live().get("http") or f"{client.host}:8080"
    return f"http://{reachable(str(address))}{view['status']['url']}"


def reachable(address: str) -> str:
    """*address* as a client on this machine writes it: one that means "every" is localhost."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in ("", "0.0.0.0", "[::]") else address
