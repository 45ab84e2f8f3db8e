"""The pool with pods for sandboxes, on a fake cluster whose pods are processes."""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from tests.harness import pack
from tests.kubernetes.clusters import pods_of
from tests.kubernetes.fake_api import FakeApi, Fault
from tests.kubernetes.fake_kubelet import NEVER_SCHEDULED, SLOW, Kubelet
from tests.kubernetes.waiting import until

from dayfly import greeting
from dayfly_pool import pods as manifests
from dayfly_pool.cluster.api import SECRET, Api
from dayfly_pool.config import Config
from dayfly_pool.drivers import kubernetes as module
from dayfly_pool.drivers.kubernetes import KubernetesDriver
from dayfly_pool.drivers.pod_keys import COMPONENT
from dayfly_pool.errors import DriverUnavailable
from dayfly_pool.models import (
    BASE,
    Environment,
    Failure,
    Invocation,
    InvocationId,
    Mounts,
    Outcome,
    Success,
)
from dayfly_pool.pool import Pool
from dayfly_pool.testing import function
from dayfly_pool.workflow.steps import Steps

BASE_ENVIRONMENT = Environment(digest=BASE)
MOUNTS = Mounts("step")
CODE = """
import asyncio, os, signal, socket, time

def greet(event, context):
    return f"hello {event}"

def who(event, context):
    return [os.getpid(), sorted(os.listdir("/code"))]

def leave(event, context):
    os._exit(event)

def die(event, context):
    os.kill(os.getpid(), event)

def wait(event, context):
    while not os.path.exists("/tmp/go"):
        time.sleep(0.01)
    return "done"

async def meet(event, context):
    if event == "go":
        open("/tmp/go", "w").close()
        return "went"
    if event == "block":
        time.sleep(7)
    while event == "wait" and not os.path.exists("/tmp/go"):
        await asyncio.sleep(0.01)
    return len(event)

def attack(event, context):
    done = []
    def attempt(name, work):
        try:
            work()
        except (OSError, ValueError):
            return
        done.append(name)
    attempt("write code", lambda: open("/code/main.py", "a"))
    attempt("new code", lambda: open("/code/other.py", "w"))
    attempt("unlink code", lambda: os.unlink("/code/main.py"))
    attempt("read secret", lambda: open("/run/dayfly/secret").read())
    attempt("read porter", lambda: open("/proc/1/mem", "rb").read(1))
    attempt("see porter", lambda: open("/proc/1/environ", "rb").read())
    attempt("porter's files", lambda: os.listdir("/proc/1/fd"))
    attempt("end porter", lambda: os.kill(1, signal.SIGTERM))
    line = [fd for fd in range(3, 64) if is_line(fd)]
    for fd in line:  # as if another guest had begun, and ended, and begun
        end = socket.socket(fileno=os.dup(fd))
        for word in (b"", b"N", b"L", b"G", b"C" * 16, b"L"):
            attempt("", lambda: end.send(word, socket.MSG_DONTWAIT))
        end.close()
    return [len(line), [name for name in done if name]]

def is_line(fd):
    try:
        end = socket.socket(fileno=os.dup(fd))
    except OSError:
        return False
    with end:
        return end.type == socket.SOCK_SEQPACKET
"""

SLOW_CODE = """
import os, time

while not os.path.exists("/tmp/go"):
    time.sleep(0.01)

def greet(event, context):
    return 1
"""


class Cluster:
    """A cluster with what is stored for the pools on it, which come one after the other."""

    def __init__(self, fake: FakeApi, kubelet: Kubelet, data: Path) -> None:
        self.fake, self.kubelet, self.data = fake, kubelet, data
        self.package = self.put(pack({"main.py": CODE}))
        self.pool: Pool
        self._number = 0

    def put(self, archive: bytes, digest: str = "") -> str:
        digest = digest or hashlib.sha256(archive).hexdigest()
        folder = self.data / "packages" / "archives"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{digest}.zip").write_bytes(archive)
        return digest

    @asynccontextmanager
    async def running(self, *functions: Any, least: int = 0, **more: Any) -> AsyncIterator[Pool]:
        """A pool, as the service has it: what lives is adopted when the functions are known."""
        settings: dict[str, Any] = {"generic_min": 0, "generic_max": 0, "grace_s": 0.5}
        settings |= {"start_timeout_s": 10.0}
        pods = pods_of(self.fake.kubeconfig)
        config = Config(data=self.data, driver="kubernetes", pods=pods, **settings | more)
        self.pool = Pool(config, KubernetesDriver(config))
        async with self.pool.running() as pool:
            for each in functions:
                pool.deploy(each, BASE_ENVIRONMENT)
            if least:
                pool.keep_generic(functions[0].mold, BASE_ENVIRONMENT, least)
            pool.adopt()
            yield pool

    def function(self, name: str, **more: Any) -> Any:
        return function(name, **{"package": self.package} | more)

    async def call(self, name: str, event: Any = None) -> Outcome:
        self._number += 1
        invocation = Invocation(
            InvocationId(f"i{self._number}"), f"default/{name}", json.dumps(event).encode(),
            queue_s_max=12.0,
        )  # fmt: skip
        return await self.pool.invoke(invocation)

    async def value(self, name: str, event: Any = None) -> Any:
        outcome = await self.call(name, event)
        assert isinstance(outcome, Success), outcome
        return json.loads(outcome.body)

    @property
    def driver(self) -> KubernetesDriver:
        """That of the pool."""
        assert isinstance(self.pool._driver, KubernetesDriver)
        return self.pool._driver

    def names(self) -> list[str]:
        """Of the pods that there are."""
        return [pod["metadata"]["name"] for pod in self.kubelet.pods()]

    def generic(self) -> int:
        return sum(len(mold.generic) for mold in self.pool.state.molds.values())

    async def noted(self) -> None:
        """Until the labels say what the pods hold, and no others are there."""
        await until(lambda: all(manifests.holds(pod) for pod in self.kubelet.pods()))
        await until(lambda: len(self.pool.state.sandboxes) == len(self.names()))


@pytest.fixture
async def cluster(fake: FakeApi, tmp_path: Path) -> AsyncIterator[Cluster]:
    kubelet = Kubelet(fake)
    await asyncio.to_thread(kubelet.__enter__)
    try:
        yield Cluster(fake, kubelet, tmp_path / "data")
    finally:
        await asyncio.to_thread(kubelet.__exit__)


# ---- cold starts --------------------------------------------------------------------------------


async def test_a_package_comes_with_the_cold_start_and_the_next_call_is_warm(cluster: Cluster):
    async with cluster.running(cluster.function("greet")):
        first, second = await cluster.call("greet", "Ada"), await cluster.call("greet", "Bob")

    assert (first.timing.start, second.timing.start) == ("created", "warm")
    assert isinstance(second, Success)
    assert second.body == b'"hello Bob"'


async def test_a_cold_start_waits_for_no_answer_of_the_api_server(cluster: Cluster):
    async with cluster.running(cluster.function("greet"), least=1, generic_max=1):
        await until(lambda: cluster.generic() == 1)
        cluster.fake.faults.append(Fault(slow_s=30.0, times=1000))
        assert await cluster.value("greet", "Ada") == "hello Ada"
        cluster.fake.faults.clear()


async def test_a_large_package_is_whole(cluster: Cluster):
    archive = pack({"main.py": CODE, "large.bin": os.urandom(20 << 20)})
    who = cluster.function("who", package=cluster.put(archive))
    async with cluster.running(who):
        assert (await cluster.value("who"))[1] == ["large.bin", "main.py"]


@pytest.mark.parametrize("archive", [b"", b"x" * 100, pack({"main.py": "x = 1"})])
async def test_a_damaged_package_is_told_and_runs_nothing(cluster: Cluster, archive: bytes):
    cluster.put(archive, cluster.package)
    async with cluster.running(cluster.function("greet")):
        outcome = await cluster.call("greet")

    assert isinstance(outcome, Failure)
    assert outcome.kind == "ImportFailed"
    assert "damaged on its way" in outcome.message


async def test_two_functions_never_share_a_pod(cluster: Cluster):
    one, other = cluster.function("greet"), cluster.function("who")
    async with cluster.running(one, other):
        await asyncio.gather(*(cluster.value(name) for name in ("greet", "who") * 2))
        await cluster.noted()
        held = [manifests.holds(pod) for pod in cluster.kubelet.pods()]

    assert {id_ for id_, _ in filter(None, held)} == {one.id, other.id}
    assert len(held) >= 2


# ---- what a function cannot do ------------------------------------------------------------------


async def test_a_function_reaches_neither_its_porter_nor_its_own_code(cluster: Cluster):
    """And whatever it says to its porter, that does not forget it."""
    attack = cluster.function("attack")
    async with cluster.running(attack):
        lines, done = await cluster.value("attack")
        assert (lines, done) == (1, [])
        await cluster.noted()
    (name,) = cluster.names()
    with cluster.fake.state.lock:  # as if the pool had died before it could write it down
        for pod in cluster.fake.state.of(cluster.fake.state.resource("", "v1", "pods")).values():
            for label in (manifests.FUNCTION, manifests.NAMESPACE, manifests.VERSION):
                del pod["metadata"]["labels"][label]
    async with cluster.running(attack):
        assert cluster.generic() == 0
        await until(lambda: name not in cluster.names())


# ---- a pool that comes after another ------------------------------------------------------------


async def test_generic_and_loaded_pods_are_adopted(cluster: Cluster):
    greet = cluster.function("who")
    async with cluster.running(greet, least=2, generic_max=2):
        await cluster.value("who")
        await until(lambda: cluster.generic() == 2 and len(cluster.names()) == 3)
        await until(lambda: any(map(manifests.holds, cluster.kubelet.pods())))
        pids = {name: pod.pid for name, pod in cluster.kubelet.running.items()}
    async with cluster.running(greet, least=2, generic_max=2):
        await until(lambda: len(cluster.pool.state.sandboxes) == 3)
        assert (await cluster.call("who")).timing.start == "warm"
        assert {name: pod.pid for name, pod in cluster.kubelet.running.items()} == pids


async def test_a_busy_pod_is_adopted_when_it_has_ended_what_it_does(cluster: Cluster):
    """Its answer is nobody's; whoever asks next gets their own."""
    meet = cluster.function("meet", concurrency=3)
    async with cluster.running(meet):
        await cluster.value("meet", "warm")
        await cluster.noted()
        lost = [asyncio.ensure_future(cluster.call("meet", "wait")) for _ in range(2)]
        await until(lambda: any(len(b.running) == 2 for b in cluster.pool.state.sandboxes.values()))
    outcomes = await asyncio.gather(*lost)
    async with cluster.running(meet):
        await until(lambda: cluster.pool.state.sandboxes)
        first = await cluster.call("meet", "go")
        again = [await cluster.value("meet", "x" * n) for n in range(1, 4)]

    assert [isinstance(each, Failure) and each.was_killed for each in outcomes] == [True] * 2
    assert first.timing.start == "warm"
    assert again == [1, 2, 3]


async def test_a_pod_with_another_version_is_destroyed(cluster: Cluster):
    async with cluster.running(cluster.function("greet")):
        await cluster.value("greet")
        await cluster.noted()
        (name,) = cluster.names()
    newer = function("greet", version="2", package=cluster.package)
    async with cluster.running(newer):
        await until(lambda: name not in cluster.names())
        assert (await cluster.call("greet")).timing.start == "created"


async def test_a_survivor_that_goes_before_it_is_adopted_is_forgotten(cluster: Cluster):
    """And with it its key, whose Secret would never go else."""
    async with cluster.running(cluster.function("greet")):
        await cluster.value("greet")
        await cluster.noted()
    (name,) = cluster.names()
    async with driving(cluster) as driver:
        await driver.open()
        assert [survivor.holds for survivor in driver.survivors()] == [("default/greet", "1")]
        cluster.kubelet.evict(name)
        await until(lambda: not driver._survivors)
        assert (driver._named, driver._used()) == ({}, set())


async def test_a_survivor_that_goes_while_its_key_is_read_is_none(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    async with cluster.running(cluster.function("greet")):
        await cluster.value("greet")
        await cluster.noted()
    (name,) = cluster.names()
    asked, go, read = asyncio.Event(), asyncio.Event(), module.Keys.read

    async def slowly(self: module.Keys, key: manifests.Key) -> bytes | None:
        asked.set()
        await go.wait()
        return await read(self, key)

    monkeypatch.setattr(module.Keys, "read", slowly)
    async with driving(cluster) as driver:
        opening = asyncio.ensure_future(driver.open())
        await asked.wait()
        cluster.kubelet.evict(name)
        await until(lambda: not driver._reflector.objects)
        go.set()
        await opening
        assert driver.survivors() == []
        assert (driver._named, driver._survivors, driver._graves) == ({}, {}, {})


@asynccontextmanager
async def driving(cluster: Cluster) -> AsyncIterator[KubernetesDriver]:
    """A driver without a pool, closed at the end."""
    pods = pods_of(cluster.fake.kubeconfig)
    driver = KubernetesDriver(Config(data=cluster.data, driver="kubernetes", pods=pods))
    try:
        yield driver
    finally:
        await driver.close()


async def test_no_pod_is_deleted_because_its_secret_cannot_be_read_just_now(cluster: Cluster):
    async with cluster.running(cluster.function("greet"), least=1, generic_max=1):
        await until(lambda: cluster.generic() == 1)
    before = cluster.names()
    cluster.fake.faults.append(Fault("get", "secrets", status=403, times=1))
    with pytest.raises(DriverUnavailable):
        async with cluster.running(cluster.function("greet")):
            raise AssertionError("it is open")
    assert cluster.names() == before
    async with cluster.running(cluster.function("greet"), least=1, generic_max=1):
        assert cluster.generic() == 1
        assert cluster.names() == before


async def test_the_sweep_deletes_what_nobody_knows_and_no_secret_that_is_used(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "SWEEP_S", 0.2)
    async with cluster.running(cluster.function("greet"), least=1, generic_max=1):
        await until(lambda: cluster.generic() == 1)
        with cluster.fake.state.lock:
            kind = cluster.fake.state.resource("", "v1", "pods")
            stray = {**cluster.kubelet.pods()[0]}
            stray["metadata"] = {"name": "stray", "labels": stray["metadata"]["labels"]}
            cluster.fake.state.create(kind, "default", stray)
        api = await Api.connect(str(cluster.fake.kubeconfig))
        labels = manifests.labels(COMPONENT, "dayfly")
        await api.create(SECRET, {"metadata": {"name": "old", "labels": labels}})

        async def there() -> list[str]:
            return [obj["metadata"]["name"] for obj in (await api.page(SECRET))["items"]]

        async with asyncio.timeout(10):
            while "old" in await there() or "stray" in cluster.names():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        (used,) = await there()
        await api.close()
        assert used.startswith("dayfly-keys-")
        assert await cluster.value("greet", "Ada") == "hello Ada"


# ---- the API server is away ---------------------------------------------------------------------


async def test_without_the_api_server_what_is_ready_works_and_the_dead_are_deleted_later(
    cluster: Cluster,
):
    greet, leave = cluster.function("greet"), cluster.function("leave")
    async with cluster.running(greet, leave, least=2, generic_max=2):
        await until(lambda: cluster.generic() == 2)
        await cluster.fake.down()
        assert await cluster.value("greet", "Ada") == "hello Ada"
        assert await cluster.value("greet", "Bob") == "hello Bob"
        failed = await cluster.call("leave", 3)
        before = cluster.names()
        await cluster.fake.up()
        await until(lambda: len(set(before) & set(cluster.names())) == 1)
        assert await cluster.value("greet", "Eve") == "hello Eve"

    assert isinstance(failed, Failure)
    assert "exited with code 3" in failed.message


# ---- creation fails -----------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["ErrImageNeverPull", "ImagePullBackOff", NEVER_SCHEDULED])
async def test_pods_that_do_not_start_are_never_more_than_may_be(cluster: Cluster, trouble: str):
    cluster.kubelet.trouble = trouble
    settings: dict[str, Any] = {"sandboxes_max": 2, "generic_max": 2, "start_timeout_s": 0.4}
    async with cluster.running(cluster.function("greet"), least=2, **settings):
        calls = [asyncio.ensure_future(cluster.call("greet")) for _ in range(4)]
        await until(lambda: cluster.pool.metrics and len(cluster.fake.requests) > 8)
        await until(lambda: any(m.failures > 1 for m in cluster.pool.state.molds.values()))
        assert cluster.kubelet.most <= 2
        cluster.kubelet.trouble = ""
        assert [isinstance(o, Success) for o in await asyncio.gather(*calls)] == [True] * 4


async def test_pods_that_are_being_deleted_are_among_those_that_may_be(cluster: Cluster):
    """So that no quota refuses what comes in their place."""
    cluster.fake.faults.append(Fault("delete", "pods", times=9, slow_s=0.2))
    names = [f"f{number}" for number in range(5)]
    functions = [cluster.function(name, handler="main:greet") for name in names]
    async with cluster.running(*functions, sandboxes_max=2):
        said = await asyncio.gather(*[cluster.value(name, name) for name in names])
    assert said == [f"hello {name}" for name in names]
    assert cluster.kubelet.most == 2


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("lost", [False, True], ids=["refused", "lost"])
async def test_creation_that_is_refused_or_unanswered_makes_the_pods_that_are_wanted(
    cluster: Cluster, status: int, lost: bool
):
    cluster.fake.faults.append(
        Fault("post", "pods", times=2, lost=True) if lost else
        Fault("post", "pods", times=2, status=status)
    )  # fmt: skip
    async with cluster.running(cluster.function("greet"), least=3, generic_max=3):
        await until(lambda: cluster.generic() == 3)
        assert len(cluster.names()) == 3
        assert cluster.kubelet.most == 3


async def test_a_pod_that_was_given_up_before_it_was_there_is_deleted(cluster: Cluster):
    """The request was carried out when nobody waited for it any more."""
    cluster.kubelet.trouble = SLOW
    async with cluster.running(cluster.function("greet"), start_timeout_s=0.3) as pool:
        cluster.fake.faults.append(Fault("post", "pods", times=1, slow_s=0.6))
        call = asyncio.ensure_future(cluster.call("greet", "Ada"))
        await until(lambda: pool.state.molds and cluster.fake.faults[0].times == 0)
        await until(lambda: len(cluster.names()) == 1)
        await until(lambda: not cluster.names())
        cluster.kubelet.trouble = ""
        cluster.kubelet.go.set()
        await call


# ---- others end pods ----------------------------------------------------------------------------


async def test_an_idle_pod_that_others_delete_goes_and_another_comes(cluster: Cluster):
    async with cluster.running(cluster.function("greet"), least=1, generic_max=1):
        await until(lambda: cluster.generic() == 1)
        (first,) = cluster.names()
        cluster.kubelet.evict(first)
        await until(lambda: first not in cluster.names() and cluster.generic() == 1)
        await cluster.value("greet")
        await until(lambda: any(map(manifests.holds, cluster.kubelet.pods())))
        (held,) = [p["metadata"]["name"] for p in cluster.kubelet.pods() if manifests.holds(p)]
        cluster.kubelet.evict(held)
        await until(lambda: held not in cluster.names())
        assert await cluster.value("greet", "Ada") == "hello Ada"


async def test_a_busy_pod_that_others_delete_ends_what_it_does_and_takes_nothing_more(
    cluster: Cluster,
):
    meet = cluster.function("meet", concurrency=4)
    async with cluster.running(meet) as pool:
        busy = asyncio.ensure_future(cluster.call("meet", "wait"))
        await until(lambda: any(box.running for box in pool.state.sandboxes.values()))
        (name,) = cluster.names()
        cluster.kubelet.evict(name)
        await until(lambda: any(box.stale for box in pool.state.sandboxes.values()))
        assert await cluster.value("meet", "elsewhere") == len("elsewhere")
        assert not busy.done()
        let_go(cluster, name)
        outcome = await busy
        await until(lambda: name not in cluster.names())

    assert isinstance(outcome, Success)


async def test_a_pod_that_is_to_go_while_it_loads_takes_what_waits_and_goes(cluster: Cluster):
    slow = pack({"main.py": SLOW_CODE})
    async with cluster.running(cluster.function("greet", package=cluster.put(slow))) as pool:
        call = asyncio.ensure_future(cluster.call("greet"))
        await until(lambda: cluster.kubelet.running)
        (name,) = cluster.names()
        await until(lambda: any(b.phase.name == "LOADING" for b in pool.state.sandboxes.values()))
        await until(lambda: "main.py" in os.listdir(f"/proc/{guest_of(cluster, name)}/root/code"))
        cluster.kubelet.evict(name)
        await until(lambda: pool._leavers)
        let_go(cluster, name)
        assert isinstance(await call, Success)
        await until(lambda: name not in cluster.names())


def guest_of(cluster: Cluster, name: str) -> int:
    return cluster.kubelet.running[name].family()[1]


def let_go(cluster: Cluster, name: str) -> None:
    Path(f"/proc/{guest_of(cluster, name)}/root/tmp/go").touch()


# ---- how they end -------------------------------------------------------------------------------


async def test_exit_codes_and_signals_are_told(cluster: Cluster):
    async with cluster.running(cluster.function("leave"), cluster.function("die")):
        left = await cluster.call("leave", 3)
        died = await cluster.call("die", int(signal.SIGSEGV))

    assert isinstance(left, Failure)
    assert isinstance(died, Failure)
    assert "exited with code 3" in left.message
    assert "killed by signal 11" in died.message


async def test_what_was_killed_for_its_memory_is_told(cluster: Cluster):
    """By the porter, or by the API server when the kernel has killed the porter as well."""
    async with cluster.running(cluster.function("die"), cluster.function("wait")) as pool:
        waiting = asyncio.ensure_future(cluster.call("wait"))
        await until(lambda: any(box.running for box in pool.state.sandboxes.values()))
        (name,) = cluster.names()
        (cluster.kubelet.memory(name) / "memory.events").write_text("oom_kill 1\n")
        os.kill(guest_of(cluster, name), signal.SIGKILL)
        first = await waiting
        await until(lambda: name not in cluster.names())
        waiting = asyncio.ensure_future(cluster.call("wait"))
        await until(lambda: any(box.running for box in pool.state.sandboxes.values()))
        (name,) = cluster.names()
        cluster.kubelet.is_out_of_memory = True
        cluster.kubelet.running[name].kill(signal.SIGKILL)
        second = await waiting

    for outcome in (first, second):
        assert isinstance(outcome, Failure)
        assert outcome.kind == "OutOfMemory"


async def test_a_step_whose_pod_ends_before_what_it_left_is_asked_for_has_crashed(
    cluster: Cluster,
):
    """And that is told at once, not when its time is up."""
    async with cluster.running() as pool:
        driver = cluster.driver
        steps = Steps(cluster.data / "steps", driver.steps_owner)
        steps.open()
        steps.make("step")
        step = structs.replace(cluster.function("greet", timeout_seconds=5.0), mounts=MOUNTS)
        invocation = Invocation(InvocationId("i"), step.id, b'"Ada"')
        driver._carrying = carrying = asyncio.Semaphore(0)
        run = asyncio.ensure_future(pool.run_once(step, BASE_ENVIRONMENT, invocation))
        await until(lambda: carrying.locked() and carrying._waiters)
        (pod,) = driver._known.values()
        os.kill(guest_of(cluster, pod.name), signal.SIGKILL)
        await until(pod.exit.done)
        carrying.release()
        outcome = await run
        steps.close()

    assert isinstance(outcome, Failure)
    assert (outcome.kind, outcome.was_killed) == ("Crashed", True)
    assert "the pod has ended" in outcome.message


async def test_nobody_takes_what_a_step_left_any_more_when_its_end_is_told(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
):
    """Also when the connection was reset before it was given up."""
    taking, go = threading.Event(), threading.Event()

    async def greeted(*_: object, **__: object) -> socket.socket:
        return socket.socket()  # not connected: as after a reset

    def take(*_: object) -> None:
        taking.set()
        go.wait(10)

    async with cluster.running(cluster.function("greet"), least=1, generic_max=1):
        await until(lambda: cluster.generic() == 1)
        monkeypatch.setattr(module, "greeted", greeted)
        monkeypatch.setattr(module.cargo, "take", take)
        (sandbox,) = cluster.driver._known
        collecting = asyncio.ensure_future(cluster.driver.collect(sandbox, MOUNTS))
        await until(taking.is_set)
        collecting.cancel()
        done, _ = await asyncio.wait((collecting,), timeout=0.1)
        go.set()
        await asyncio.wait((collecting,))

    assert not done
    assert collecting.cancelled()


@pytest.mark.waits
async def test_a_guest_that_is_too_busy_to_read_is_not_lost(cluster: Cluster):
    """For longer than a node may say nothing: what waits for it is more than buffers hold."""
    meet = cluster.function("meet", concurrency=6, max_scale=1)
    async with cluster.running(meet):
        await cluster.value("meet", "warm")
        blocking = asyncio.ensure_future(cluster.call("meet", "block"))
        large = [asyncio.ensure_future(cluster.call("meet", "x" * (5 << 20))) for _ in range(5)]
        outcomes = await asyncio.gather(blocking, *large)

    assert [isinstance(outcome, Success) for outcome in outcomes] == [True] * 6
    assert {outcome.timing.start for outcome in outcomes} == {"warm"}


# ---- who else calls -----------------------------------------------------------------------------


async def test_an_impostor_at_a_pods_address_is_given_nothing(cluster: Cluster):
    """It does not know the secret; the pool says nothing but its nonce."""
    heard = b""

    async def pose(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        heard += await reader.read(100)
        writer.write(greeting.answer(b"x" * 32, greeting.LINE, b"n" * 16, b"m" * 16,
                                     has_function=False))  # fmt: skip
        heard += await reader.read(100)
        writer.close()

    async with cluster.running(cluster.function("greet"), start_timeout_s=2.0) as pool:
        cluster.kubelet.trouble = SLOW
        call = asyncio.ensure_future(cluster.call("greet"))
        await until(cluster.names)
        (name,) = cluster.names()
        server = await asyncio.start_server(pose, "127.0.0.77", 7000)
        cluster.fake.run_pod(name, "127.0.0.77")
        await until(lambda: "does not know" in pool._last_start_error)
        server.close()
        cluster.kubelet.trouble = ""
        cluster.kubelet.go.set()
        assert isinstance(await call, Success)

    assert len(heard) == greeting.OPENING.size


async def test_a_flood_of_silent_callers_does_not_keep_the_pool_out(cluster: Cluster):
    greet = cluster.function("greet")
    async with cluster.running(greet):
        await cluster.value("greet")
        await cluster.noted()
        (pod,) = cluster.kubelet.running.values()
    flood = []
    for _ in range(300):
        flood.append(end := socket.socket())
        end.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            end.connect((pod.address, 7000))
    async with cluster.running(greet):
        await until(lambda: cluster.pool.state.sandboxes)
        assert (await cluster.call("greet")).timing.start == "warm"
    for end in flood:
        end.close()


async def test_a_pool_whose_connection_is_half_open_gives_way_to_the_next(cluster: Cluster):
    """Nobody has told the porter, nor the guest, that the one before is gone."""
    greet = cluster.function("greet")
    async with cluster.running(greet):
        await cluster.value("greet")
        await cluster.noted()
        (pod,) = cluster.driver._known.values()
        assert pod.guest is not None
        kept = [pod.guest.dup()]  # these ends are never closed
    async with cluster.running(greet):
        await until(lambda: cluster.pool.state.sandboxes)
        assert (await cluster.call("greet")).timing.start == "warm"
    for end in kept:
        end.close()
