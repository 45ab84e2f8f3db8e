"""Users' own images as functions and jobs, in a real cluster.

An image with Python is brought there by $DAYFLY_TEST_IMAGE_LOADER; what it runs is given as its
arguments.
"""

import asyncio
import json
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.kubernetes import images
from tests.kubernetes.conftest import REAL
from tests.kubernetes.waiting import until

from dayfly_pool.batch.jobs import View
from dayfly_pool.batch.model import JobManifest, JobSpec
from dayfly_pool.cluster.api import POD, Api
from dayfly_pool.config import Config
from dayfly_pool.errors import NoCapacity
from dayfly_pool.models import (
    Failure,
    FunctionId,
    FunctionManifest,
    FunctionSpec,
    Invocation,
    InvocationId,
    Limits,
    Metadata,
    Outcome,
    Success,
)
from dayfly_pool.pods import Images, PodClass, Pods
from dayfly_pool.service import Service

IMAGE = "dayfly-container:test"
PROGRAM = Path(__file__).with_name("container_program.py").read_text()
RUNS: dict[str, Any] = {"image": IMAGE, "command": ("python3", "-c", PROGRAM)}
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        images.LOADER not in os.environ, reason=f"{images.LOADER} names nothing that loads images"
    ),
]


@pytest.fixture(scope="module", autouse=True)
def image() -> Iterator[None]:
    """In the cluster."""
    with tempfile.TemporaryDirectory() as folder:
        images.load(images.runtime(Path(folder), IMAGE))
        yield


def settings(data: Path, namespace: str, **images: Any) -> Config:
    pods = Pods(
        image=IMAGE,
        images=Images(**{"run_as_user": 65532} | images),
        classes=(PodClass(memory_mb=256, cpu=0.05, ephemeral_mb=64),),
        image_pull_policy="Never",
        namespace=namespace,
        kubeconfig=REAL,
    )
    return Config(data=data, driver="kubernetes", generic_min=0, pods=pods)


@asynccontextmanager
async def serving(config: Config) -> AsyncIterator[Service]:
    """A pool with its declarations; its pods outlive it."""
    service = Service(config)
    async with service.running():
        yield service


async def declare(service: Service, name: str, **spec: Any) -> FunctionId:
    declared = FunctionSpec(**RUNS | {"limits": Limits(memory_mb=256)} | spec)
    manifest = FunctionManifest(metadata=Metadata(name=name), spec=declared)
    return (await service.deploy(manifest)).id


async def ask(
    service: Service, id_: FunctionId, path: str = "/", body: bytes = b"", **given: Any
) -> Outcome:
    http = {
        "method": "POST",
        "path": path,
        "query": "a=%20b",
        "headers": [["host", "here"], ["connection", "x-hop"], ["x-hop", "1"], ["x-end", "2"]],
        "source": "192.0.2.1",
    }
    id_of = InvocationId(os.urandom(8).hex())
    return await service.pool.invoke(Invocation(id_of, id_, body, http, **given))


async def pods_of(namespace: str) -> list[dict[str, Any]]:
    api = await Api.connect(REAL, namespace)
    try:
        found = (await api.page(POD))["items"]
        return [each for each in found if "deletionTimestamp" not in each["metadata"]]
    finally:
        await api.close()


async def no_pods(namespace: str) -> None:
    async with asyncio.timeout(30):
        while await pods_of(namespace):  # noqa: ASYNC110  (the API server's own affair)
            await asyncio.sleep(0.1)


async def ended(service: Service, job: str) -> View:
    async with asyncio.timeout(90):
        while not (view := await service.jobs.get("default", job)).status.ended_at:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return view


async def test_scales_from_zero_and_back_with_requests_held(tmp_path: Path, namespace: str) -> None:
    async with serving(settings(tmp_path, namespace)) as service:
        id_ = await declare(
            service, "web", concurrency=4, max_scale=1, keep_alive_seconds=1,
            env={"STARTS_S": "0.5", "GREETING": "costs $(PORT) $$"},
        )  # fmt: skip
        assert not await pods_of(namespace)
        answers = await asyncio.gather(*(ask(service, id_, "/meet") for _ in range(4)))
        met = sorted(json.loads(each.body) for each in answers if isinstance(each, Success))
        assert met == [0, 1, 2, 3], answers  # all at once, in one pod
        said = await ask(service, id_, "/deep/er", b"12345")
        assert isinstance(said, Success)
        told = json.loads(said.body)
        assert (said.status, ["X-Own", "yes"] in said.headers) == (201, True)
        assert (told["method"], told["path"], told["size"]) == ("POST", "/deep/er?a=%20b", 5)
        assert (told["uid"], told["token"]) == (65532, False)
        assert told["greeting"] == "costs $(PORT) $$"
        headers = told["headers"]
        assert (headers["host"], headers["x-end"]) == ("here", "2")
        assert headers["x-forwarded-for"] == "192.0.2.1"
        assert "x-hop" not in headers
        (pod,) = await pods_of(namespace)
        assert pod["metadata"]["labels"]["dayfly.dev/function"] == "web"
        big = await ask(service, id_, "/", b"x" * (6 << 20))
        assert isinstance(big, Success)
        assert json.loads(big.body)["size"] == 6 << 20
        large = await ask(service, id_, "/big", str((6 << 20) + 1).encode())
        assert isinstance(large, Failure)
        assert large.kind == "BadResponse"
        await until(lambda: not service.pool.state.sandboxes)
        await no_pods(namespace)


async def test_ends_are_told_and_what_never_listens_is_left_alone(
    tmp_path: Path, namespace: str
) -> None:
    async with serving(settings(tmp_path, namespace)) as service:
        id_ = await declare(service, "web")
        crashed = await ask(service, id_, "/crash")
        assert isinstance(crashed, Failure)
        assert crashed.kind == "Crashed"
        assert crashed.message == "the container exited with code 3: last words"
        starved = await ask(service, id_, "/memory")
        assert isinstance(starved, Failure)
        assert starved.kind == "OutOfMemory", starved
        deaf = await declare(
            service, "deaf", command=("python3", "-c", "import time; time.sleep(99)"),
            startup_seconds=0.5,
        )  # fmt: skip
        failed = await ask(service, deaf)
        assert isinstance(failed, Failure)
        assert failed.kind == "InitTimedOut"
        assert failed.message == "nothing listens on port 8080 0.5 s after its start"
        short = await declare(service, "short", command=("python3", "-c", "exit('no reason')"))
        failed = await ask(service, short)
        assert isinstance(failed, Failure)
        assert failed.kind == "InitCrashed"
        assert failed.message.endswith("the container exited with code 1: no reason")
        made = service.pool.state.functions[short].failures
        again = await ask(service, short)  # at once: it is left alone
        assert isinstance(again, Failure)
        assert service.pool.state.functions[short].failures == made
        missing = await declare(service, "missing", image="dayfly-no-such:image")
        failed = await ask(service, missing)
        assert isinstance(failed, Failure)
        assert "ErrImageNeverPull" in failed.message


async def test_what_finds_no_room_is_told_and_goes_with_its_function(
    tmp_path: Path, namespace: str
) -> None:
    async with serving(settings(tmp_path, namespace)) as service:
        limits = Limits(memory_mb=256, resources={"example.com/gpu": 2})
        id_ = await declare(service, "gpu", limits=limits)
        with pytest.raises(NoCapacity, match=r"its pod waits: not scheduled: .*example.com/gpu"):
            await ask(service, id_, queue_s_max=3)
        (pod,) = await pods_of(namespace)
        amounts = pod["spec"]["containers"][0]["resources"]
        assert amounts["requests"]["example.com/gpu"] == amounts["limits"]["example.com/gpu"] == "2"
        await service.delete(id_)
        await no_pods(namespace)


async def test_root_is_refused_by_default(tmp_path: Path, namespace: str) -> None:
    async with serving(settings(tmp_path, namespace, run_as_user=0)) as service:
        failed = await ask(service, await declare(service, "root"))
        assert isinstance(failed, Failure)
        assert "non-root" in failed.message or "runAsNonRoot" in failed.message


async def test_a_pool_that_was_restarted_adopts_its_pods(tmp_path: Path, namespace: str) -> None:
    config = settings(tmp_path, namespace)
    async with serving(config) as service:
        id_ = await declare(service, "web")
        assert isinstance(await ask(service, id_), Success)
        (before,) = await pods_of(namespace)
    async with serving(config) as service:
        await until(lambda: service.pool.state.sandboxes)
        said = await ask(service, id_)
        assert isinstance(said, Success)
        assert said.timing.start == "warm"
        (after,) = await pods_of(namespace)
        assert after["metadata"]["uid"] == before["metadata"]["uid"]
        await service.delete(id_)


async def test_a_job_runs_pods_to_their_ends(tmp_path: Path, namespace: str) -> None:
    async with serving(settings(tmp_path, namespace)) as service:
        spec = JobSpec(
            **RUNS, items=("a", {"b": 1}, None), limits=Limits(memory_mb=256),
            backoff_limit_per_index=1, backoff_seconds=0, parallelism=3,
        )  # fmt: skip
        manifest = JobManifest(metadata=Metadata(name="many"), spec=spec)
        await service.create_job(manifest)
        view = await ended(service, "many")
        assert view.status.state == "Complete", view.status
        assert (view.status.succeeded, view.status.failures) == (3, 1)
        lines = service.pool.logs.tail(FunctionId("default/many.job"), 100)
        told = sorted(line.text for line in lines if line.stream == "stdout")
        assert "not yet" in told
        tries = [(0, 0), (1, 0), (1, 1), (2, 0)]
        assert {f"task {index} of 3, try {retry}" for index, retry in tries} < {*told}
        assert any("exit code 1: not yet" in line.text for line in lines)
        results, _ = await service.jobs.results("default", "many", None)
        assert sorted((index, json.loads(text)["item"]) for index, text in results)[:2] == [
            (0, '"a"'),
            (1, '{"b":1}'),
        ]
        await no_pods(namespace)


async def test_what_still_starts_does_not_hold_up_the_end(tmp_path: Path, namespace: str) -> None:
    config = settings(tmp_path, namespace)
    async with asyncio.timeout(30):
        async with serving(config) as service:
            id_ = await declare(
                service, "slow", min_scale=1, env={"STARTS_S": "99"}, startup_seconds=120
            )
            while not await pods_of(namespace):  # noqa: ASYNC110  (the API server's own affair)
                await asyncio.sleep(0.1)
        async with serving(config) as service:
            await service.delete(id_)
    await no_pods(namespace)
