"""One server's declarations: who may be forked, and events that wait for what is deployed."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dayfly.protocol import Invoke
from dayfly_gateway.app import DataPlane
from dayfly_gateway.behind import Local
from dayfly_gateway.config import GatewayConfig
from dayfly_gateway.triggers.triggers import Triggers
from dayfly_pool import driver as drivers
from dayfly_pool import service as services
from dayfly_pool.batch.model import JobManifest, JobSpec
from dayfly_pool.brokers import FolderSource
from dayfly_pool.config import Config
from dayfly_pool.errors import BadInput, BadPackage
from dayfly_pool.events import EventMeta, failures, payload
from dayfly_pool.models import (
    BASE,
    Cron,
    EnvironmentManifest,
    EnvironmentSpec,
    FunctionManifest,
    FunctionSpec,
    Invocation,
    InvocationId,
    Metadata,
    Mold,
    Retry,
    Route,
    TriggerManifest,
    TriggerSpec,
    function_id,
)
from dayfly_pool.packages import pack, pack_texts
from dayfly_pool.service import Service
from dayfly_pool.store.declarations import Change, StoredFunction, StoredTrigger
from dayfly_pool.store.events import Ended, Event, Lease, State
from dayfly_pool.testing import FakeDriver, FakeGuest
from dayfly_pool.workflow.model import Output, Step, TaskSpec, WorkflowSpec

E1 = InvocationId("event-1")
SOURCE = "def handle(event):\n    return event\n"


class Server:
    """One server on a fake driver; *namespace* is whose functions and environments it is given."""

    def __init__(self, service: Service, package: str) -> None:
        self.service, self.package = service, package

    async def build(self, namespace: str) -> str:
        """The digest of an environment `numbers` of *namespace*."""
        manifest = EnvironmentManifest(
            Metadata("numbers", namespace), EnvironmentSpec(preload=("math",), generic_min=0)
        )
        return (await self.service.build(manifest, lambda line: None)).environment.digest

    async def deploy(self, namespace: str, **spec: Any) -> Mold:
        """What the sandboxes of a function of *namespace* are made of."""
        declared = FunctionSpec(handler="main:handle", package=self.package, **spec)
        await self.service.deploy(FunctionManifest(Metadata("greet", namespace), declared))
        return self.mold(namespace)

    def mold(self, namespace: str) -> Mold:
        return self.service.pool.state.functions[function_id(namespace, "greet")].function.mold


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    driver = FakeDriver()
    monkeypatch.setattr(drivers, "load", lambda config: driver)
    return driver


@asynccontextmanager
async def serving(data: Path, **settings: Any) -> AsyncIterator[Server]:
    source = data / "source"
    source.mkdir(exist_ok=True)
    (source / "main.py").write_text(SOURCE)
    service = Service(Config(data=data, tick_s=60, **{"generic_min": 0} | settings))
    async with service.running():
        yield Server(service, await service.put_package(pack(source)))
        await asyncio.sleep(0)  # the zygote that was wanted last begins to be warmed


async def test_functions_are_forked_from_their_own_namespaces_zygote(
    driver: FakeDriver, tmp_path: Path
):
    """The default: one mold for each namespace, environment and network."""
    async with serving(tmp_path) as server:
        assert await server.deploy("ours") == Mold(BASE, "none", "ours")
        assert await server.deploy("theirs") == Mold(BASE, "none", "theirs")
        assert await server.deploy("ours", network="host") == Mold(BASE, "host", "ours")


async def test_a_function_opts_out_by_its_isolation_and_in_again(
    driver: FakeDriver, tmp_path: Path
):
    """For itself alone; what else is in its namespace is forked as before."""
    async with serving(tmp_path) as server:
        await server.deploy("ours")
        assert await server.deploy("ours", isolation="exec") == Mold(BASE)
        assert await server.deploy("theirs") == Mold(BASE, "none", "theirs")
        assert await server.deploy("ours", isolation="fork") == Mold(BASE, "none", "ours")


@pytest.mark.parametrize("option", ["foreign_namespaces", "exec_namespaces"])
async def test_nothing_is_forked_for_the_namespaces_that_the_operator_names(
    driver: FakeDriver, tmp_path: Path, option: str
):
    """Whatever their functions ask for. The others are forked."""
    async with serving(tmp_path, **{option: ("theirs", "default")}) as server:
        assert await server.deploy("theirs", isolation="fork") == Mold(BASE)
        assert await server.deploy("default") == Mold(BASE)
        assert (await server.deploy("ours")).namespace == "ours"


async def test_prewarm_exec_forks_nothing(driver: FakeDriver, tmp_path: Path):
    async with serving(tmp_path, prewarm="exec") as server:
        assert await server.deploy("ours") == Mold(BASE)


async def test_a_driver_that_cannot_fork_is_not_asked_to(driver: FakeDriver, tmp_path: Path):
    driver.can_fork = False
    async with serving(tmp_path) as server:
        assert await server.deploy("ours") == Mold(BASE)


async def test_an_environment_of_the_operator_is_forked_for_each_namespace_apart(
    driver: FakeDriver, tmp_path: Path
):
    async with serving(tmp_path, foreign_namespaces=("theirs",)) as server:
        digest = await server.build("default")

        ours = await server.deploy("ours", environment="numbers")
        theirs = await server.deploy("theirs", environment="numbers")

        assert ours == Mold(digest, "none", "ours")
        assert theirs == Mold(digest)


async def test_an_environment_of_foreign_modules_is_not_forked_when_its_namespace_is_trusted_again(
    driver: FakeDriver, tmp_path: Path
):
    """Its modules are imported after the lock-down, which no zygote takes, until it is rebuilt."""
    async with serving(tmp_path, foreign_namespaces=("theirs",)) as server:
        foreign = await server.build("theirs")
        assert await server.deploy("theirs", environment="numbers") == Mold(foreign)
    async with serving(tmp_path) as server:
        assert server.mold("theirs") == Mold(foreign)
        trusted = await server.build("theirs")

        assert trusted != foreign
        assert server.mold("theirs") == Mold(trusted, "none", "theirs")


async def echo(guest: FakeGuest, request: Invoke, body: bytes) -> bytes:
    return body


async def accept_elsewhere(server: Server) -> None:
    """As another server does that shares its events and has the function ours/greet."""
    queue = server.service.events.queue
    queue._is_alone = False
    event = Event(
        id=E1,
        function=function_id("ours", "greet"),
        meta=msgspec.msgpack.encode(EventMeta(None)),
        body=b"{}",
        accepted_at=queue.clock.now(),
        age_s=60.0,
    )
    await queue.accept(event)
    while queue._wake.is_set():  # noqa: ASYNC110
        await asyncio.sleep(0)


async def test_what_waits_for_a_function_is_run_as_soon_as_that_is_deployed(
    driver: FakeDriver, tmp_path: Path
):
    """Another server has accepted it, where several share their events."""
    driver.functions["main:handle"] = echo
    async with serving(tmp_path) as server:
        await accept_elsewhere(server)
        await server.deploy("ours")
        shown = await server.service.events.queue.get(E1, 5.0)

    assert shown is not None
    assert (shown.state, shown.result_body) == (State.SUCCEEDED, b"{}")


async def test_what_waits_for_a_function_is_left_alone_while_that_is_being_deployed(
    driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It is declared by then, and the pool does not know it yet: its events would be dead."""
    driver.functions["main:handle"] = echo
    async with serving(tmp_path) as server:
        await accept_elsewhere(server)
        declarations, queue = server.service._declarations, server.service.events.queue
        save = declarations.save_function

        async def slowly(*given: Any) -> int:
            queue.look()
            for _ in range(100):
                await asyncio.sleep(0)
            return await save(*given)

        monkeypatch.setattr(declarations, "save_function", slowly)
        await server.deploy("ours")
        shown = await queue.get(E1, 5.0)

    assert shown is not None
    assert (shown.state, shown.failures) == (State.SUCCEEDED, [])


BATCH = b'[{"id": "a", "data": 1}, {"id": "b", "data": 2}]'
FAILED_B = b'{"batchItemFailures": [{"itemIdentifier": "b"}]}'


async def test_what_failed_of_a_batch_is_not_lost_when_its_function_is_deleted_meanwhile(
    driver: FakeDriver, tmp_path: Path
):
    """It is dead, with its payload, and can be redriven."""
    greet, began, may_end = function_id("ours", "greet"), asyncio.Event(), asyncio.Event()

    async def fail_one(guest: FakeGuest, request: Invoke, body: bytes) -> bytes:
        began.set()
        await may_end.wait()
        return FAILED_B

    driver.functions["main:handle"] = fail_one
    async with serving(tmp_path) as server:
        await server.deploy("ours")
        events = server.service.events
        await events.accept(Invocation(E1, greet, BATCH), items=["key a", "key b"])
        await began.wait()
        await server.service.delete(greet)
        may_end.set()
        whole = await events.queue.get(E1, 5.0)
        known = await events.queue.known(greet, ["key a", "key b"])
        left = await events.queue.get(known["key b"], 5.0)

    assert whole is not None
    assert left is not None
    assert (whole.state, known["key a"]) == (State.SUCCEEDED, E1)
    assert (left.state, left.body) == (State.DEAD, b'[{"id": "b", "data": 2}]')


async def test_what_failed_of_a_batch_is_known_for_longer_than_it_may_live(
    driver: FakeDriver, tmp_path: Path
):
    """Else it would be run beside itself when the source gives it out again."""
    greet, age_s = function_id("ours", "greet"), 14 * 86400.0
    meta = msgspec.msgpack.encode(EventMeta(None, items=("key a", "key b")))
    one = Lease(
        row=1, fence=1, id=E1, function=greet, meta=meta, body=BATCH, attempts=0,
        accepted_at=0.0, expires_at=9e9,
    )  # fmt: skip
    ended = Ended(row=1, fence=1, state=State.SUCCEEDED, at=1.0, body=FAILED_B)
    async with serving(tmp_path) as server:
        await server.deploy("ours", retry=Retry(max_age_seconds=age_s))
        (left,) = server.service.events._follow(one, ended)

    (key,) = left.known_as
    assert (key.text, left.age_s) == ("key b", age_s)
    assert key.until > left.accepted_at + left.age_s


@pytest.mark.parametrize(
    ("answer", "failed"),
    [
        (b"", []),
        (b"null", []),
        (b"{}", []),
        (b'{"batchItemFailures": []}', []),
        (b'{"batchItemFailures": null}', []),
        (FAILED_B, [1]),
        (FAILED_B.replace(b"}]", b'}, {"itemIdentifier": "b"}]'), [1]),
        (FAILED_B.replace(b'"b"', b'""'), [0, 1]),
        (FAILED_B.replace(b'"b"', b"null"), [0, 1]),
        (FAILED_B.replace(b'"b"', b'"c"'), [0, 1]),
        (b'{"batchItemFailures": [{"id": "a"}]}', [0, 1]),
        (b'{"other": ' + b"[" * 9999 + b"]" * 9999 + b"}", []),
    ],
)
def test_an_answer_about_a_batch_is_read_as_lambda_reads_it(answer: bytes, failed: list[int]):
    assert failures(BATCH, answer) == failed


def test_what_is_nested_deeper_than_json_is_read_is_told_as_text():
    """Or whoever is to be told of an event would never hear of it."""
    deep = b"[" * 9999 + b"]" * 9999

    assert payload(deep) == deep.decode()


async def test_more_places_are_used_as_soon_as_they_are_declared(
    driver: FakeDriver, tmp_path: Path
):
    """And not when one of the few before falls free."""
    both = asyncio.Barrier(2)

    async def meet(guest: FakeGuest, request: Invoke, body: bytes) -> bytes:
        await both.wait()
        return body

    driver.functions["main:handle"] = meet
    async with serving(tmp_path) as server:
        await server.deploy("ours", max_scale=1)
        greet, service = function_id("ours", "greet"), server.service
        ids = [InvocationId(f"event-{n}") for n in (1, 2)]
        for id_ in ids:
            await service.events.accept(Invocation(id_, greet, b"{}"))
        while both.n_waiting < 1:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await server.deploy("ours", max_scale=2)
        shown = [await service.events.queue.get(id_, 5.0) for id_ in ids]

    assert [each and each.state for each in shown] == [State.SUCCEEDED] * 2


async def test_after_a_restart_the_operators_new_word_holds_for_old_functions(
    driver: FakeDriver, tmp_path: Path
):
    async with serving(tmp_path) as server:
        await server.deploy("ours")
    async with serving(tmp_path, exec_namespaces=("ours",)) as server:
        assert server.mold("ours") == Mold(BASE)
    async with serving(tmp_path) as server:
        assert server.mold("ours") == Mold(BASE, "none", "ours")


async def test_what_is_kept_ready_is_what_functions_of_the_default_namespace_use(
    driver: FakeDriver, tmp_path: Path
):
    """Else they would be kept for nobody."""
    async with serving(tmp_path, generic_min=1) as server:
        assert list(server.service.pool.state.molds) == [Mold(BASE, "none", "default")]
    async with serving(tmp_path, generic_min=1, exec_namespaces=("default",)) as server:
        assert list(server.service.pool.state.molds) == [Mold(BASE)]


async def test_routes_that_others_have_declared_over_each_other_are_lived_with(
    driver: FakeDriver, tmp_path: Path
):
    """Who was declared first has it, at every server; and only a new clash is refused."""
    route = Route("/x")
    async with serving(tmp_path) as server:
        plane = DataPlane(Local(server.service), GatewayConfig())
        server.service.watch(plane.reroute)
        for at, name in enumerate(("first", "second")):
            spec = FunctionSpec(handler="main:handle", package=server.package, routes=(route,))
            stored = StoredFunction(function_id("ours", name), 1, spec, BASE, float(at))
            server.service._take_in(Change("Function", "ours", name, stored))

        assert plane.routes.match("", "/x", "GET").function == "ours/first"
        with pytest.raises(BadInput, match="already belongs"):
            await server.deploy("ours", routes=(route,))
        await server.deploy("ours")
        server.service._take_in(Change("Function", "ours", "first", None))
        assert plane.routes.match("", "/x", "GET").function == "ours/second"
        assert function_id("ours", "first") not in server.service.pool.state.functions


async def test_another_servers_firings_wake_nothing_here(driver: FakeDriver, tmp_path: Path):
    """But how far it has looked is known, for whoever has the trigger next."""
    every_minute = TriggerSpec(function="greet", cron=Cron("* * * * *"))
    one = StoredTrigger("ours", "tick", every_minute, 1.0, seen=1.0)
    seen = msgspec.structs.replace(one, seen=2.0)
    paused = msgspec.structs.replace(seen, spec=msgspec.structs.replace(every_minute, paused=True))
    woken = []
    async with serving(tmp_path) as server:
        service = server.service
        service.watch_triggers(lambda: woken.append(service.triggers.get(("ours", "tick"))))
        for stored in (one, one, seen, paused, None, None):
            service._take_in(Change("Trigger", "ours", "tick", stored))
            assert service.triggers.get(("ours", "tick")) == stored

    assert woken == [one, paused, None]


# ---- how code comes -----------------------------------------------------------------------------

FILES = {"main.py": SOURCE, "data/numbers.txt": "1 2 3\n"}


async def declared(service: Service, **code: Any) -> set[str]:
    """Something of each kind with that code; the packages that they have now."""
    await service.set_task("ours", "greet", TaskSpec(handler="main:handle", **code))
    step = Step(name="a", handler="main:handle")
    await service.set_workflow("ours", "greet", WorkflowSpec(steps=(step,), **code))
    manifest = FunctionManifest(
        Metadata("greet", "ours"), FunctionSpec(handler="main:handle", **code)
    )
    stored = await service.deploy(manifest)
    job = await service.create_job(
        JobManifest(metadata=Metadata("greet", "ours"), spec=JobSpec(script="cat main.py", **code))
    )
    specs = (
        stored.spec,
        service.workflows["ours", "greet"],
        service.tasks["ours", "greet"],
        job.stored.spec,
    )
    assert not any(spec.files or spec.package_url or spec.source for spec in specs)
    return {spec.package for spec in specs}


async def test_files_in_the_manifest_are_the_package(driver: FakeDriver, tmp_path: Path):
    async with serving(tmp_path) as server:
        (digest,) = await declared(server.service, files=FILES)
        tree = server.service.packages.path(digest)
        assert {name: (tree / name).read_text() for name in FILES} == FILES
        before = server.service.functions[function_id("ours", "greet")].version
        assert await declared(server.service, files=FILES) == {digest}
        assert server.service.functions[function_id("ours", "greet")].version == before


async def test_a_package_is_fetched_once_and_only_if_its_digest_is_told(
    driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    archive, asked = pack_texts(FILES), list[str]()
    digest = hashlib.sha256(archive).hexdigest()

    async def fetch(url: str, digest: str, hosts: tuple[str, ...]) -> bytes:
        asked.append(url)
        return archive

    monkeypatch.setattr(services, "fetch", fetch)
    async with serving(tmp_path) as server:
        url = "https://example.org/a.zip"
        assert await declared(server.service, package=digest, package_url=url) == {digest}
        assert asked == [url]


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.py", "a//b.py"])
async def test_files_lie_in_the_package(driver: FakeDriver, tmp_path: Path, name: str):
    async with serving(tmp_path) as server:
        spec = FunctionSpec(handler="main:handle", files={name: ""})
        with pytest.raises(BadPackage):
            await server.service.deploy(FunctionManifest(Metadata("greet", "ours"), spec))
        assert not server.service.functions


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ({"files": FILES, "package": "0" * 64}, "files are the package"),
        ({"files": FILES, "source": "."}, "files are the package"),
        ({"files": {"a": "x" * 200_000}}, "over 128 KiB"),
        ({"files": {str(n): "" for n in range(101)}}, "more than 100 files"),
        ({"packageUrl": "https://a/b.zip"}, "needs package"),
        ({"packageUrl": "ftp://a/b.zip", "package": "0" * 64}, "not like https"),
        ({"packageUrl": "https://a:b@c/d.zip", "package": "0" * 64}, "holds a login"),
    ],
)
def test_code_comes_in_one_way(code: dict[str, Any], why: str):
    for kind, body in (
        (FunctionSpec, {"handler": "m:h"}),
        (JobSpec, {"script": "a"}),
        (TaskSpec, {"script": "a"}),
        (WorkflowSpec, {"steps": []}),
    ):
        with pytest.raises(msgspec.ValidationError, match=why):
            msgspec.convert(body | code, kind)


async def test_a_step_with_outputs_cannot_be_a_function_with_an_image(
    driver: FakeDriver, tmp_path: Path
):
    driver.runs_images = True
    async with serving(tmp_path) as server:
        spec = FunctionSpec(image="example.org/web")
        await server.service.deploy(FunctionManifest(Metadata("web"), spec))
        steps = (Step(name="a", function="web", outputs=(Output(name="file"),)),)
        await server.service.set_workflow("default", "flow", WorkflowSpec(steps=steps))
        runs = server.service.runs
        await runs.start("default", "flow", {}, "one")
        async with asyncio.timeout(10):
            while not (view := await runs.get("default", "one")).journal.is_over:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        assert view.status.state == "Failed"
        assert "has no folders for what a step takes" in view.status.message


async def test_a_foreign_namespace_has_no_folder_of_the_servers_watched(
    tmp_path: Path, driver: FakeDriver
):
    async with serving(tmp_path, foreign_namespaces=("guests",)) as server:
        triggers = Triggers(server.service)
        spec = TriggerSpec(function="greet", folder=FolderSource(path=str(tmp_path)))
        for namespace in ("guests", "ours"):
            await server.deploy(namespace)
        await triggers.declare(TriggerManifest(Metadata("files", "ours"), spec))
        with pytest.raises(BadInput, match="is foreign"):
            await triggers.declare(TriggerManifest(Metadata("files", "guests"), spec))

        assert set(server.service.triggers) == {("ours", "files")}
