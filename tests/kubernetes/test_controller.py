"""Custom resources become declarations, and say what became of them; on a fake and a real cluster.

The real one is DAYFLY_TEST_KUBECONFIG's; there the custom resources are put and taken away again.
"""

import asyncio
import contextlib
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
import yaml
from tests.kubernetes.fake_api import FakeApi
from tests.kubernetes.tools import tool

from dayfly_gateway import controller as controllers
from dayfly_gateway.controller import KINDS, Controller
from dayfly_gateway.manifests import Plan, plans
from dayfly_gateway.triggers.triggers import Triggers
from dayfly_pool.cluster import crds
from dayfly_pool.cluster.api import CRD, NAMESPACE, Api, Exists, NotFound
from dayfly_pool.config import Config
from dayfly_pool.errors import StoreFailed
from dayfly_pool.models import (
    FunctionManifest,
    FunctionSpec,
    Invocation,
    InvocationId,
    Metadata,
    Success,
    function_id,
)
from dayfly_pool.service import Service

KUBECONFIG: Final = os.environ.get("DAYFLY_TEST_KUBECONFIG", "")
LIMIT_S: Final = 60.0
HELLO: Final = {"main.py": "def handle(event, context):\n    return 'hello'\n"}
BYE: Final = {"main.py": "def handle(event, context):\n    return 'bye'\n"}
CLUSTERS: Final = [
    "fake",
    pytest.param("real", marks=pytest.mark.cluster),
]
Status = dict[str, Any]


class World:
    """A server with a controller, and a namespace in a cluster of which it is told."""

    def __init__(self, api: Api, service: Service, namespace: str) -> None:
        self.api, self.service, self.namespace = api, service, namespace
        self.triggers = Triggers(service)

    @asynccontextmanager
    async def controlled(self, **settings: Any) -> AsyncIterator[None]:
        """A controller runs while the block does."""
        controller = Controller(
            self.api, self.service, self.triggers, namespace=self.namespace, look_s=0.1, **settings
        )
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(controller.run())
            yield
            running.cancel()

    async def apply(self, kind: str, name: str, **spec: Any) -> None:
        """As kubectl does: create it, or change its spec."""
        obj = {
            "apiVersion": "dayfly.dev/v1",
            "kind": kind,
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": spec,
        }
        try:
            await self.api.create(KINDS[kind], obj, namespace=self.namespace)
        except Exists:
            before = (await self.get(kind, name))["spec"]
            patch = {"spec": {gone: None for gone in before.keys() - spec.keys()} | spec}
            await self.api.merge(KINDS[kind], name, patch, namespace=self.namespace)

    async def get(self, kind: str, name: str) -> dict[str, Any]:
        """The object."""
        return await self.api.get(KINDS[kind], name, namespace=self.namespace)

    async def delete(self, kind: str, name: str) -> None:
        """Delete the object."""
        await self.api.delete(KINDS[kind], name, namespace=self.namespace)

    async def told(
        self, kind: str, name: str, so: Callable[[Status, dict[str, Any]], object]
    ) -> Status:
        """Its status when *so* of it and of its condition Ready is true, of its latest spec."""
        status: Status = {}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LIMIT_S):
                while True:
                    obj = await self.get(kind, name)
                    status = obj.get("status", {})
                    ready = condition(status, "Ready")
                    is_current = status.get("observedGeneration") == obj["metadata"]["generation"]
                    if is_current and so(status, ready):
                        return status
                    await asyncio.sleep(0.02)
        raise AssertionError(f"{kind} {name} says {status}")

    async def ready(self, kind: str, name: str) -> Status:
        """Its status when it is ready."""
        return await self.told(kind, name, lambda _, ready: ready.get("status") == "True")

    async def refused(self, kind: str, name: str, reason: str) -> str:
        """The message when it is not ready for that *reason*."""
        status = await self.told(
            kind, name, lambda _, r: (r.get("status"), r.get("reason")) == ("False", reason)
        )
        return str(condition(status, "Ready")["message"])

    async def until(self, so: Callable[[], object]) -> None:
        """Wait for something on the server."""
        async with asyncio.timeout(LIMIT_S):
            while not so():  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def call(self, name: str) -> Any:
        """What a function returns."""
        id_ = InvocationId(secrets.token_hex(8))
        function = function_id(self.namespace, name)
        outcome = await self.service.pool.invoke(Invocation(id_, function, b"{}"))
        return msgspec.json.decode(outcome.body) if isinstance(outcome, Success) else outcome

    def declared(self) -> set[str]:
        """The names of the functions of the namespace."""
        found = (id_.partition("/") for id_ in self.service.functions)
        return {name for namespace, _, name in found if namespace == self.namespace}

    async def deploy(self, name: str, files: dict[str, str]) -> None:
        """As `dayfly deploy` does."""
        metadata = Metadata(name=name, namespace=self.namespace)
        spec = FunctionSpec(handler="main:handle", files=files)
        await self.service.deploy(FunctionManifest(metadata=metadata, spec=spec))


def condition(status: Status, type_: str) -> dict[str, Any]:
    return next((each for each in status.get("conditions", ()) if each["type"] == type_), {})


@asynccontextmanager
async def cluster(which: str, folder: Path) -> AsyncIterator[tuple[str, FakeApi | None]]:
    if which == "real":
        yield KUBECONFIG, None
        return
    async with FakeApi(folder) as fake:
        yield str(fake.kubeconfig), fake


@asynccontextmanager
async def defined(api: Api, namespace: str) -> AsyncIterator[None]:
    """The custom resources are there, and the namespace."""
    for resource in crds.RESOURCES:
        with contextlib.suppress(Exists):
            await api.create(CRD, crds.definition(resource))
    async with asyncio.timeout(LIMIT_S):
        for kind in KINDS.values():
            while True:
                with contextlib.suppress(NotFound):
                    await api.page(kind, namespace=namespace)
                    break
                await asyncio.sleep(0.05)
    await api.create(NAMESPACE, {"metadata": {"name": namespace}})
    try:
        yield
    finally:
        await api.delete(NAMESPACE, namespace)


@pytest.fixture(scope="module", autouse=True)
def _undefined() -> Iterator[None]:
    """Taken away at the very end: a watch of what was defined anew may hear nothing for a while."""
    yield
    if KUBECONFIG:
        asyncio.run(_undefine())


async def _undefine() -> None:
    api = await Api.connect(KUBECONFIG)
    for resource in crds.RESOURCES:
        await api.delete(CRD, f"{resource.plural}.{crds.GROUP}")
    await api.close()


@asynccontextmanager
async def serving(which: str, folder: Path) -> AsyncIterator[tuple[World, FakeApi | None]]:
    config = Config(data=folder / "data", driver="process", generic_min=0)
    async with cluster(which, folder) as (kubeconfig, fake):
        api = await Api.connect(kubeconfig)
        try:
            namespace = f"crs-{secrets.token_hex(4)}"
            async with defined(api, namespace), Service(config).running() as service:
                yield World(api, service, namespace), fake
        finally:
            await api.close()


@pytest.mark.parametrize("which", CLUSTERS)
async def test_a_function_is_applied_changed_and_deleted(which: str, tmp_path: Path):
    async with serving(which, tmp_path) as (world, _), world.controlled(url="https://fn.example"):
        await world.apply("Function", "greet", handler="main:handle", files=HELLO)
        first = await world.ready("Function", "greet")
        assert first["url"] == f"https://fn.example/ns/{world.namespace}/fn/greet"
        assert await world.call("greet") == "hello"

        await world.apply("Function", "greet", handler="main:handle", files=BYE)
        second = await world.ready("Function", "greet")
        assert second["version"] == first["version"] + 1
        assert second["package"] != first["package"]
        assert await world.call("greet") == "bye"
        times = [condition(s, "Ready")["lastTransitionTime"] for s in (first, second)]
        assert times[0] == times[1], "it was ready all the time"

        await world.delete("Function", "greet")
        await world.until(lambda: not world.declared())


@pytest.mark.cluster
async def test_kubectl_applies_waits_for_and_deletes_the_file_that_dayfly_takes(tmp_path: Path):
    file = tmp_path / "greet.yaml"
    spec = {"handler": "main:handle", "files": HELLO}
    manifest = {"apiVersion": "dayfly.dev/v1", "kind": "Function", "metadata": {"name": "greet"}}
    file.write_text(yaml.safe_dump(manifest | {"spec": spec}))
    (applied,) = plans(str(file), file.read_text(), tmp_path, "default")
    assert isinstance(applied, Plan)
    assert applied.manifest.spec.files == HELLO
    async with serving("real", tmp_path) as (world, _), world.controlled():

        async def kubectl(*words: str) -> str:
            named = (tool("kubectl"), "--kubeconfig", KUBECONFIG, "-n", world.namespace)
            pipe = asyncio.subprocess.PIPE
            process = await asyncio.create_subprocess_exec(*named, *words, stdout=pipe)
            async with asyncio.timeout(60):
                out, _ = await process.communicate()
            assert not process.returncode
            return out.decode()

        await kubectl("apply", "-f", str(file))
        await kubectl("wait", "--for=condition=Ready", "--timeout=30s", "fn/greet")
        columns = (await kubectl("get", "fn", "--no-headers")).split()
        assert columns[:5] == ["greet", "1", f"/ns/{world.namespace}/fn/greet", "True", "Declared"]
        assert await world.call("greet") == "hello"
        await kubectl("delete", "-f", str(file))
        await world.until(lambda: not world.declared())


@pytest.mark.parametrize("which", CLUSTERS)
async def test_everything_applied_at_once_finds_together(which: str, tmp_path: Path):
    """In whatever order it comes: what lacks something is declared when that is there."""
    async with serving(which, tmp_path) as (world, _), world.controlled():
        cron = {"schedule": "0 0 1 1 *"}
        await world.apply("Trigger", "nightly", function="greet", cron=cron)
        await world.apply("Job", "some", function="greet", size=3)
        await world.apply("Workflow", "flow", steps=[{"name": "a", "task": "say"}])
        assert "deploy it first" in await world.refused("Trigger", "nightly", "FunctionNotFound")

        await world.apply("Environment", "lean", preload=["json"])
        spec = {"handler": "main:handle", "files": HELLO, "environment": "lean"}
        await world.apply("Function", "greet", **spec)
        await world.apply("Task", "say", script="echo hello")
        for kind, name in (("Environment", "lean"), ("Function", "greet"), ("Task", "say")):
            await world.ready(kind, name)
        assert (await world.ready("Trigger", "nightly"))["source"] == "cron"
        assert (await world.ready("Workflow", "flow"))["steps"] == 1
        done = await world.told("Job", "some", lambda s, _: condition(s, "Complete"))
        assert (done["state"], done["total"], done["succeeded"]) == ("Complete", 3, 3)

        for kind in reversed(KINDS):
            for obj in (await world.api.page(KINDS[kind], namespace=world.namespace))["items"]:
                await world.delete(kind, obj["metadata"]["name"])
        service = world.service
        await world.until(
            lambda: (
                not (
                    service.functions
                    or service.environments
                    or service.triggers
                    or service.workflows
                    or service.tasks
                )
            )
        )


@pytest.mark.parametrize("which", CLUSTERS)
async def test_a_restarted_controller_writes_nothing(which: str, tmp_path: Path):
    async with serving(which, tmp_path) as (world, _):
        async with world.controlled():
            await world.apply("Function", "greet", handler="main:handle", files=HELLO)
            await world.apply("Function", "lost", handler="main:handle", source=".")
            await world.apply("Job", "some", script="true", size=2)
            await world.ready("Function", "greet")
            await world.refused("Function", "lost", "SourceNotUploaded")
            await world.told("Job", "some", lambda s, _: condition(s, "Complete"))
        before = (
            world.api.writes,
            world.service.functions[function_id(world.namespace, "greet")].version,
        )
        async with world.controlled():
            for _ in range(5):  # looks take 0.1 s
                await world.api.page(KINDS["Job"], namespace=world.namespace)
                await asyncio.sleep(0.1)
        after = (
            world.api.writes,
            world.service.functions[function_id(world.namespace, "greet")].version,
        )
        assert after == before


async def test_what_is_deleted_while_nobody_looks_is_gone_afterwards(tmp_path: Path):
    async with serving("fake", tmp_path) as (world, _):
        await world.deploy("uploaded", HELLO)
        async with world.controlled():
            await world.apply("Function", "greet", handler="main:handle", files=HELLO)
            await world.ready("Function", "greet")
        await world.delete("Function", "greet")
        async with world.controlled():
            await world.until(lambda: world.declared() == {"uploaded"})


async def test_another_resource_of_the_same_name_is_another_one(tmp_path: Path):
    async with serving("fake", tmp_path) as (world, _):
        async with world.controlled():
            await world.apply("Job", "some", script="exit 1", backoffLimit=0)
            await world.told("Job", "some", lambda s, _: condition(s, "Failed"))
        await world.delete("Job", "some")
        await world.apply("Job", "some", script="true")
        async with world.controlled():
            await world.told("Job", "some", lambda s, _: condition(s, "Complete"))


async def test_code_that_only_a_disk_has_is_asked_for_and_taken_when_it_comes(tmp_path: Path):
    """`kubectl apply` and `dayfly deploy` of the same folder, in either order."""
    async with serving("fake", tmp_path) as (world, _), world.controlled():
        await world.apply("Function", "greet", handler="main:handle", source=".", maxScale=3)
        message = await world.refused("Function", "greet", "SourceNotUploaded")
        assert "dayfly apply -f" in message
        await world.deploy("greet", HELLO)
        await world.apply("Task", "say", script="true")  # somebody does something else there
        await world.ready("Function", "greet")
        assert await world.call("greet") == "hello"

        await world.deploy("greet", BYE)
        id_ = function_id(world.namespace, "greet")
        await world.until(lambda: world.service.functions[id_].spec.max_scale == 3)
        assert await world.call("greet") == "bye"


async def test_a_function_that_cannot_be_loaded_says_why(tmp_path: Path):
    async with serving("fake", tmp_path) as (world, _), world.controlled():
        await world.apply("Function", "bad", handler="main:nothing", files=HELLO, minScale=1)
        assert "nothing" in await world.refused("Function", "bad", "HandlerMissing")
        await world.apply("Function", "bad", handler="main:handle", files=HELLO, minScale=1)
        await world.ready("Function", "bad")


async def test_what_only_the_models_refuse_is_told_and_changes_nothing(tmp_path: Path):
    async with serving("fake", tmp_path) as (world, _), world.controlled():
        await world.apply("Function", "greet", handler="main:handle", files=HELLO)
        await world.ready("Function", "greet")
        spec = {"handler": "main:handle", "files": HELLO, "minScale": 2, "maxScale": 1}
        await world.apply("Function", "greet", **spec)
        assert "minScale is over maxScale" in await world.refused("Function", "greet", "BadInput")
        assert await world.call("greet") == "hello"
        steps = [{"name": "a", "script": "true", "runAfter": ["nobody"]}]
        await world.apply("Workflow", "flow", steps=steps)
        assert "nobody" in await world.refused("Workflow", "flow", "BadDefinition")


async def test_a_resource_has_no_folder_of_the_servers_watched(tmp_path: Path):
    """Who may apply resources in one namespace may not read, move and delete a shard's files."""
    async with serving("fake", tmp_path) as (world, _), world.controlled():
        await world.apply("Function", "greet", handler="main:handle", files=HELLO)
        await world.ready("Function", "greet")
        folder = {"path": str(tmp_path), "afterwards": "delete"}
        await world.apply("Trigger", "files", function="greet", folder=folder)
        assert "dayfly apply" in await world.refused("Trigger", "files", "BadInput")
        assert not world.service.triggers


async def test_a_job_is_not_changed_and_never_runs_twice(tmp_path: Path):
    async with serving("fake", tmp_path) as (world, _), world.controlled():
        await world.apply("Job", "some", script="true", size=2)
        await world.told("Job", "some", lambda s, _: condition(s, "Complete"))
        await world.apply("Job", "some", script="false", size=2)
        assert "not changed" in await world.refused("Job", "some", "SpecChanged")
        await world.service.jobs.delete(world.namespace, "some")
    (tmp_path / "other").mkdir()
    async with serving("fake", tmp_path / "other") as (world, _), world.controlled():
        await world.apply("Job", "long", command=["sleep", "1000"])
        await world.told("Job", "long", lambda s, _: s.get("state") == "Running")
        await world.service.jobs.delete(world.namespace, "long")
        assert "does not run again" in await world.refused("Job", "long", "JobForgotten")


async def test_a_deleted_job_is_cancelled(tmp_path: Path):
    async with serving("fake", tmp_path) as (world, _), world.controlled():
        await world.apply("Job", "long", command=["sleep", "1000"])
        await world.told("Job", "long", lambda s, _: s.get("state") == "Running")
        await world.delete("Job", "long")
        await world.until(lambda: not world.service.pool.under_way)


async def test_a_controller_waits_for_a_store_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One that ends for it ends its shard: whichever leads next, while PostgreSQL restarts."""
    monkeypatch.setattr(controllers, "STORE_AGAIN_S", 0.001)
    async with serving("fake", tmp_path) as (world, _):
        there, tries = world.service.marks, 0

        async def marks() -> dict[tuple[str, str], bytes]:
            nonlocal tries
            tries += 1
            if tries < 4:
                raise StoreFailed("it is away")
            return await there()

        monkeypatch.setattr(world.service, "marks", marks)
        async with world.controlled():
            await world.apply("Task", "say", script="true")
            await world.ready("Task", "say")


async def test_declarations_stay_while_the_api_server_is_away(tmp_path: Path):
    async with serving("fake", tmp_path) as (world, fake), world.controlled():
        assert fake is not None
        await world.apply("Function", "greet", handler="main:handle", files=HELLO)
        await world.ready("Function", "greet")
        await fake.down()
        assert await world.call("greet") == "hello"
        await fake.up()
        await world.apply("Function", "greet", handler="main:handle", files=BYE)
        await world.told("Function", "greet", lambda s, _: s.get("version") == 2)
        assert await world.call("greet") == "bye"
