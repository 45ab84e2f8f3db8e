"""Users' own images: what may be declared, the pods made of it, and the exchange with one."""

import asyncio
from collections.abc import Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from dayfly.protocol import Invoke, Loaded, Result
from dayfly_pool import containers, pods
from dayfly_pool.batch.model import JobManifest, JobSpec
from dayfly_pool.config import Config
from dayfly_pool.driver import Exit
from dayfly_pool.errors import BadInput
from dayfly_pool.models import (
    Container,
    Environment,
    Failure,
    Function,
    FunctionManifest,
    FunctionSpec,
    Limits,
    Metadata,
    Mold,
    SandboxId,
    function_id,
)
from dayfly_pool.service import Service

ID = SandboxId("sb-1")
POSIX = pods.Pods(image="runtime", classes=(pods.PodClass(memory_mb=256, cpu=0.5),))


def declared(**spec: Any) -> FunctionSpec:
    return msgspec.convert({"image": "registry/app:1"} | spec, FunctionSpec)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"handler": "main:f"}, "one of handler and image"),
        ({"image": ""}, "one of handler and image"),
        ({"environment": "mine"}, "in the image"),
        ({"files": {"main.py": ""}}, "in the image"),
        ({"isolation": "exec"}, "for handlers"),
        ({"image": "", "handler": "main:f", "args": ["x"]}, "go with image"),
        ({"image": "", "handler": "main:f", "limits": {"resources": {"a.b/c": 1}}}, "go with"),
        ({"args": ["a\0"]}, "NUL"),
        ({"image": "a b"}, "regex"),
        ({"limits": {"resources": {"cpu": 1}}}, "regex"),
        ({"port": 0}, ">= 1"),
    ],
)
def test_what_makes_no_sense_is_refused(spec: dict[str, Any], why: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=why):
        declared(**spec)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"image": "a", "script": "true"}, "no script"),
        ({"image": "a", "function": "f"}, "no function"),
        ({"command": ["true"], "args": ["x"]}, "go with image"),
        ({"image": "a", "environment": "mine"}, "in the image"),
        ({}, "or image, is needed"),
    ],
)
def test_jobs_have_one_kind_of_work(spec: dict[str, Any], why: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=why):
        msgspec.convert(spec, JobSpec)


def made(container: Container, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    spec = declared()
    mold = Mold("d", memory_mb=256, container="default/web@1")
    function = Function(function_id("default", "web"), "1", spec, mold)
    return pods.container_pod(
        POSIX, name="p", shard="s", owner={}, function=function, container=container, env=env or {}
    )


def test_a_served_pod_is_its_functions_from_the_beginning() -> None:
    container = Container(
        "app", args=("$(HOME)",), env={"A": "$x"}, port=80, resources={"nvidia.com/gpu": 1}
    )
    pod = made(container)
    assert pods.holds(pod) == ("default/web", "1")
    assert pods.mold_of(pod) == Mold("d", memory_mb=256, container="default/web@1")
    (runs,) = pod["spec"]["containers"]
    assert runs["args"] == ["$$(HOME)"]
    assert runs["env"] == [{"name": "A", "value": "$$x"}, {"name": "PORT", "value": "80"}]
    assert runs["resources"]["limits"] == runs["resources"]["requests"]
    assert runs["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["spec"]["securityContext"]["runAsNonRoot"]
    assert not pod["spec"]["automountServiceAccountToken"]
    assert runs["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }


def test_a_task_s_pod_is_nobody_s_to_adopt() -> None:
    pod = made(Container("app"), {"JOB_INDEX": "3"})
    assert pods.holds(pod) is None
    (runs,) = pod["spec"]["containers"]
    assert {"name": "JOB_INDEX", "value": "3"} in runs["env"]
    assert {"name": "DAYFLY_RESULT", "value": runs["terminationMessagePath"]} in runs["env"]


def test_how_it_ended_is_what_the_kubelet_says() -> None:
    told = {"exitCode": 137, "reason": "OOMKilled", "message": "last"}
    pod = {"status": {"containerStatuses": [{"state": {"terminated": told}}]}}
    assert pods.ended(pod) == pods.End(137, "OOMKilled", "last")
    assert pods.ended({"status": {"phase": "Failed", "reason": "Evicted"}}) == (-9, "Evicted", "")
    assert pods.ended({"status": {"phase": "Running"}}) is None


# ---- the exchange -------------------------------------------------------------------------------


class OnePod:
    """A driver whose only pod is a server of the test's."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        self.address, self.destroyed = address, False
        self.end: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self.envs: list[Mapping[str, str]] = []

    async def run(self, sandbox: SandboxId, function: Function, container: Container,
                  env: Mapping[str, str]) -> str:  # fmt: skip
        self.envs.append(env)
        return self.address

    async def exited(self, sandbox: SandboxId) -> Exit:
        return await asyncio.shield(self.end)

    async def output(self, sandbox: SandboxId) -> bytes:
        return b"one\ntwo\n"

    async def destroy(self, sandbox: SandboxId) -> Exit:
        self.destroyed = True
        return Exit(0)

    def trouble(self, sandbox: SandboxId) -> str:
        return ""


class Pod:
    """A sandbox of *kind*, and what it told the pool."""

    def __init__(self, kind: Any, port: int, driver: OnePod | None = None, **spec: Any) -> None:
        self.driver = driver or OnePod()
        self.logged: list[bytes] = []
        self.dead: list[str] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.function = Function(
            function_id("default", "web"), "1",
            declared(port=port or 1, startupSeconds=0.3, **spec), Mold("d", container="x"),
        )  # fmt: skip
        self.container = Environment("d", container=Container("app", port=port))
        self.sandbox = kind(
            ID, self.driver,
            on_log=lambda id_, number, message, body: self.logged.append(body),
            on_death=lambda id_, why: self.dead.append(why),
            spawn=lambda work: self.tasks.add(asyncio.create_task(work)),
        )  # fmt: skip

    async def load(self) -> Any:
        return await self.sandbox.load(self.function, self.container, 5.0)

    async def invoke(self, body: bytes = b"", **given: Any) -> tuple[Any, bytes]:
        answered: asyncio.Future[tuple[Any, bytes]] = asyncio.get_running_loop().create_future()
        request = Invoke(id="i", remaining_s=5.0, **given)
        self.sandbox.invoke(
            request, body, lambda message, found: answered.set_result((message, found))
        )
        async with asyncio.timeout(10):
            return await answered

    async def end(self) -> None:
        await self.sandbox.destroy()
        self.driver.end.cancel()
        if self.tasks:
            await asyncio.wait(self.tasks)


@asynccontextmanager
async def served(handler: Any, **spec: Any) -> Any:
    app = web.Application(client_max_size=10 << 20)
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    pod = Pod(containers.Served, runner.addresses[0][1], **spec)
    try:
        assert isinstance(await pod.load(), Loaded)
        yield pod
    finally:
        await pod.end()
        await runner.cleanup()


HTTP = {"method": "PUT", "path": "/a%2Fb", "query": "q=%31", "headers": [
    ["connection", "x-mine"], ["x-mine", "1"], ["x-two", "a"], ["x-two", "b"],
    ["transfer-encoding", "chunked"]]}  # fmt: skip


async def test_a_request_goes_on_as_it_came_and_comes_back_as_it_is() -> None:
    async def echo(request: web.Request) -> web.Response:
        said = [request.method, request.raw_path, request.headers.getall("x-two")]
        assert "x-mine" not in request.headers
        assert request.headers["content-length"] == "3"
        body = msgspec.json.encode([said, (await request.read()).decode()])
        return web.Response(status=418, body=body, headers={"X-Theirs": "yes"})

    async with served(echo) as pod:
        message, body = await pod.invoke(b"abc", http=HTTP)
        assert isinstance(message, Result)
        assert message.status == 418
        assert ["X-Theirs", "yes"] in message.headers
        assert msgspec.json.decode(body) == [["PUT", "/a%2Fb?q=%31", ["a", "b"]], "abc"]


async def test_an_event_is_posted_and_its_answer_is_json() -> None:
    async def handler(request: web.Request) -> web.Response:
        assert (request.method, request.path) == ("POST", "/")
        body = await request.read()
        return web.Response(status=200 if body == b"1" else 500, text=f"said {body.decode()}")

    async with served(handler) as pod:
        assert (await pod.invoke(b"1"))[1] == b'"said 1"'
        message, _ = await pod.invoke(b"2")
        assert (message.kind, message.message) == ("Raised", "status 500: said 2")


async def test_what_is_too_large_is_no_answer() -> None:
    async def handler(request: web.Request) -> web.Response:
        if request.path == "/body":
            return web.Response(body=b"x" * ((6 << 20) + 1))
        return web.Response(headers={f"X-{n}": "x" * 100 for n in range(150)})

    async with served(handler) as pod:
        for path in ("/body", "/headers"):
            message, _ = await pod.invoke(http=HTTP | {"path": path})
            assert message.kind == "BadResponse", message


async def test_its_death_is_told_to_whoever_waits_and_to_the_pool() -> None:
    async def handler(request: web.Request) -> web.Response:
        pod.driver.end.set_result(Exit(137, 1, 0, "OOMKilled", ""))
        await asyncio.Event().wait()
        raise AssertionError

    async with served(handler) as pod:
        message, _ = await pod.invoke()
        assert message.kind == "OutOfMemory"
        assert pod.dead
        assert pod.sandbox.is_over
        assert (await pod.invoke())[0].kind == "Crashed"


async def test_a_pod_that_is_left_lives_on_and_whoever_waits_is_told() -> None:
    async def handler(request: web.Request) -> web.Response:
        pod.sandbox.leave()
        await asyncio.Event().wait()
        raise AssertionError

    async with served(handler) as pod:
        message, _ = await pod.invoke()

        assert message.kind == "Crashed"
        assert not pod.driver.destroyed
        assert not pod.dead


async def test_what_never_listens_has_failed() -> None:
    pod = Pod(containers.Served, 1)
    failed = await pod.load()
    assert isinstance(failed, Failure)
    assert failed.message == "nothing listens on port 1 0.3 s after its start: two"
    pod.driver.end.set_result(Exit(2, why="Error", said="bad flag\n"))
    failed = await pod.load()
    assert failed.message == "before it listened, the container exited with code 2: bad flag"
    await pod.end()


@pytest.mark.parametrize(
    ("exit_", "kind", "said"),
    [
        (Exit(0, said='{"a": 1}'), None, b'{"a": 1}'),
        (Exit(0, said="text\n"), None, b'"text"'),
        (Exit(0), None, b"null"),
        (Exit(0, said="x" * 4096), "ResultTooLarge", b""),
        (Exit(4), "Exited", b""),
        (Exit(137, 1, why="OOMKilled"), "OutOfMemory", b""),
        (Exit(128, why="StartError", said="no such file"), "CannotRun", b""),
        (Exit(-9, why="Evicted"), "Crashed", b""),
    ],
)
async def test_the_end_of_a_task_is_its_outcome(exit_: Exit, kind: str | None, said: bytes) -> None:
    pod = Pod(containers.Ran, 0)
    pod.driver.end.set_result(exit_)
    await pod.load()
    message, body = await pod.invoke(b'{"item": {"a": 1}}', env={"JOB_INDEX": "2"})
    assert getattr(message, "kind", None) == kind
    assert body == said
    assert pod.driver.envs == [{"JOB_INDEX": "2", "JOB_ITEM": '{"a":1}'}]
    assert pod.driver.destroyed
    if kind == "Exited":
        assert message.message == "exit code 4: two"
    assert bool(pod.dead) == (kind == "Crashed")


async def test_a_driver_without_pods_refuses_images_and_changes_nothing(tmp_path: Path) -> None:
    service = Service(Config(data=tmp_path, driver="process", generic_min=0))
    async with service.running():
        spec, metadata = declared(), Metadata(name="web")
        with pytest.raises(BadInput, match="an image needs pods"):
            await service.deploy(FunctionManifest(metadata=metadata, spec=spec))
        with pytest.raises(BadInput, match="an image needs pods"):
            await service.create_job(JobManifest(metadata=metadata, spec=JobSpec(image="app")))
        assert not service.functions


def test_limits_of_handlers_stay_what_they_were() -> None:
    assert Limits() == FunctionSpec(handler="main:f").limits
