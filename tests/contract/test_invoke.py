"""What `invoke` promises: in one process, and over the wire to shards, word for word the same."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from dayfly.protocol import BODY_BYTES_MAX, Failed, Invoke, Result
from dayfly_pool import pool_client, tls
from dayfly_pool.cluster.members import Address, Fixed
from dayfly_pool.cluster.shards import first
from dayfly_pool.config import Config
from dayfly_pool.errors import (
    BadInput,
    FunctionNotFound,
    NoCapacity,
    NoShard,
    NotReadyHere,
    QueueFull,
    ShardLost,
    StoreFailed,
)
from dayfly_pool.models import (
    BASE,
    Environment,
    Failure,
    Function,
    FunctionId,
    Invocation,
    InvocationId,
    Outcome,
    Route,
    Success,
)
from dayfly_pool.peers import PoolServer
from dayfly_pool.pool import Pool
from dayfly_pool.pool_client import PoolClient
from dayfly_pool.store.declarations import StoredFunction
from dayfly_pool.store.events import Accepted
from dayfly_pool.testing import Ended, FakeDriver, FakeGuest, function
from dayfly_pool.tls import Identity

SOON_S = 10.0
NAMES = ("echo", "fails", "hangs", "dies", "full", "answers")
ECHO = FunctionId("default/echo")
OPEN: dict[str, asyncio.Event] = {}


async def echo(guest: FakeGuest, request: Invoke, body: bytes) -> bytes:
    return body


async def fails(guest: FakeGuest, request: Invoke, body: bytes) -> Failed:
    return Failed(kind="Exited", message="exit code 7: ä", traceback="a\nb", exit_code=7)


async def hangs(guest: FakeGuest, request: Invoke, body: bytes) -> bytes:
    OPEN["begun"].set()
    await OPEN["go"].wait()
    return guest.sandbox.encode()


async def dies(guest: FakeGuest, request: Invoke, body: bytes) -> None:
    raise Ended


async def answers(guest: FakeGuest, request: Invoke, body: bytes) -> Result:
    assert request.http is not None
    headers = [["x-path", str(request.http["path"])], ["set-cookie", "a=b"]]
    return Result(handler_s=0.125, status=418, headers=headers)


class Shard:
    """A pool of fake sandboxes, and what a service would say of it."""

    def __init__(self) -> None:
        self.driver = FakeDriver(
            {
                "main:echo": echo,
                "main:fails": fails,
                "main:hangs": hangs,
                "main:dies": dies,
                "main:full": hangs,
                "main:answers": answers,
            }
        )
        settings: dict[str, Any] = {"generic_min": 0, "generic_max": 0, "memory_reserve_mb": 0}
        self.pool = Pool(Config(data=Path("/nowhere"), tick_s=0.01, **settings), self.driver)
        self.functions: dict[FunctionId, StoredFunction] = {}
        self.accepted: list[tuple[Invocation, tuple[str, str] | None]] = []
        self.server: PoolServer

    def deploy(self, each: Function) -> None:
        self.pool.deploy(each, Environment(digest=BASE))
        self.functions[each.id] = StoredFunction(each.id, 1, each.spec, BASE, 0.0)

    async def invoke(self, invocation: Invocation) -> Outcome:
        return await self.pool.invoke(invocation)

    async def accept(self, invocation: Invocation, key: tuple[str, str] | None) -> Accepted:
        if invocation.function not in self.functions:
            raise FunctionNotFound(f"no function {invocation.function!r}")
        self.accepted.append((invocation, key))
        return Accepted(invocation.id, is_new=len(self.accepted) == 1)


class Cluster:
    """Shards and one client."""

    def __init__(self, shards: Mapping[str, Shard], client: PoolClient) -> None:
        self.shards, self.client = shards, client

    def home(self, id_: str) -> Shard:
        found = first(FunctionId(id_), self.client.live())
        assert found is not None
        return self.shards[found]

    async def reached(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(SOON_S):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    tls.make(folder)
    return folder


Start = Callable[..., Awaitable[Cluster]]


@pytest.fixture
async def start(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    """Starts so many shards, and a client of them."""
    monkeypatch.setattr(pool_client, "GATHER_S", SOON_S)
    OPEN.update(begun=asyncio.Event(), go=asyncio.Event())
    async with asyncio.timeout(60), AsyncExitStack() as stack:

        async def started(number: int = 1, **changed: Any) -> Cluster:
            shards, addresses = {}, {}
            for at in range(number):
                shard, name = Shard(), f"shard-{at}"
                shards[name] = shard
                await stack.enter_async_context(shard.pool.running())
                for each in NAMES:
                    more = {"queue_max": 1, "max_scale": 1} if each == "full" else {}
                    shard.deploy(function(each, **more))
                server = PoolServer(shard, Identity(certificates / "pool"), name)
                await server.listen("127.0.0.1", 0)
                shard.server = await stack.enter_async_context(server.running())
                addresses[name] = Address("127.0.0.1", server.port)
            client = PoolClient(
                Fixed(addresses), Identity(certificates / "gateway"), "gateway", **changed
            )
            await stack.enter_async_context(client.running())
            return Cluster(shards, client)

        yield started
        OPEN["go"].set()


Invoking = Callable[[Invocation], Awaitable[Outcome]]


@pytest.fixture(params=["pool", "wire"])
async def invoke(request: pytest.FixtureRequest, start: Start) -> Invoking:
    """`Pool.invoke`, and `PoolClient.invoke` of a pool elsewhere."""
    cluster = await start()
    there: Invoking = cluster.client.invoke
    return there if request.param == "wire" else cluster.shards["shard-0"].pool.invoke


def invocation(name: str, body: bytes = b"", **more: Any) -> Invocation:
    id_ = InvocationId(f"{name}-{id(more)}-{len(body)}-{asyncio.get_running_loop().time()}")
    return Invocation(id_, FunctionId(f"default/{name}"), body, **more)


async def begun() -> None:
    async with asyncio.timeout(SOON_S):
        await OPEN["begun"].wait()


# ---- the same in one process and over the wire --------------------------------------------------


@pytest.mark.parametrize("body", [b"", b"\x00\xff", b"x" * BODY_BYTES_MAX])
async def test_a_success_comes_back_with_its_body_and_its_times(invoke: Invoking, body: bytes):
    outcome = await invoke(invocation("echo", body))

    assert isinstance(outcome, Success)
    assert (outcome.body, outcome.status, outcome.headers) == (body, 0, [])
    assert outcome.timing.start == "created"
    assert outcome.timing.specialize_s is not None
    assert outcome.timing.create_s is not None


async def test_an_answer_over_http_comes_back_as_the_function_gave_it(invoke: Invoking):
    http = {"method": "GET", "path": "/\udcff", "headers": [["a", "b"]], "time": 1.5}
    outcome = await invoke(invocation("answers", http=http))

    assert isinstance(outcome, Success)
    assert (outcome.status, outcome.timing.handler_s) == (418, 0.125)
    assert outcome.headers == [["x-path", "/?"], ["set-cookie", "a=b"]]


async def test_a_failure_comes_back_word_for_word(invoke: Invoking):
    outcome = await invoke(invocation("fails"))

    assert isinstance(outcome, Failure)
    assert (outcome.kind, outcome.message) == ("Exited", "exit code 7: ä")
    assert (outcome.traceback, outcome.exit_code, outcome.was_killed) == ("a\nb", 7, False)


async def test_a_death_comes_back_as_one(invoke: Invoking):
    outcome = await invoke(invocation("dies"))

    assert isinstance(outcome, Failure)
    assert (outcome.kind, outcome.was_killed) == ("Crashed", True)


async def test_a_request_too_long_for_the_wire_is_a_bad_one(invoke: Invoking):
    outcome = await invoke(invocation("echo", http={"path": "x" * 70_000}))

    assert isinstance(outcome, Failure)
    assert outcome.kind == "BadRequest"


async def test_a_function_that_is_not_there_is_told_of(invoke: Invoking):
    with pytest.raises(FunctionNotFound, match="no function 'default/nobody'"):
        await invoke(invocation("nobody"))


async def test_a_timeout_of_its_own_is_kept_to(invoke: Invoking):
    outcome = await invoke(invocation("hangs", timeout_s=0.05))

    assert isinstance(outcome, Failure)
    assert outcome.kind == "TimedOut"


async def test_who_waits_too_long_or_behind_too_many_is_refused(invoke: Invoking):
    running = asyncio.create_task(invoke(invocation("full")))
    await begun()
    waiting = asyncio.create_task(invoke(invocation("full", queue_s_max=0.2)))
    await asyncio.sleep(0)
    with pytest.raises(QueueFull):
        await invoke(invocation("full"))
    with pytest.raises(NoCapacity, match=r"none for default/full in 0\.2 s"):
        await waiting
    OPEN["go"].set()

    assert isinstance(await running, Success)


# ---- what only the wire has ---------------------------------------------------------------------


async def test_who_gives_up_gives_up_there_too(start: Start):
    """A cancelled request leaves the queue of the shard: nothing is run for nobody."""
    cluster = await start()
    pool = cluster.shards["shard-0"].pool
    first_call = asyncio.create_task(cluster.client.invoke(invocation("full")))
    await begun()
    waiting = asyncio.create_task(cluster.client.invoke(invocation("full")))
    await cluster.reached(lambda: pool.state.waiting == 1)
    waiting.cancel()
    await cluster.reached(lambda: pool.state.waiting == 0 and pool.under_way == 1)
    OPEN["go"].set()

    assert isinstance(await first_call, Success)
    assert cluster.client.under_way == 0


async def test_each_function_has_one_home_and_all_gateways_know_it(start: Start):
    cluster = await start(3)
    for name in ("echo", "fails", "answers"):
        await cluster.client.invoke(invocation(name, http={"path": "/"}))

    for name in ("echo", "fails", "answers"):
        having = [
            shard
            for shard in cluster.shards.values()
            if shard.pool.state.functions[FunctionId(f"default/{name}")].sandboxes
        ]
        assert having == [cluster.home(f"default/{name}")]


async def test_a_shard_that_is_lost_is_told_of_and_a_safe_request_goes_to_another(start: Start):
    cluster = await start(2)
    home = cluster.home("default/hangs")
    asked = [{"method": "POST", "path": "/"}, {"method": "GET", "path": "/"}]
    calls = [asyncio.create_task(cluster.client.invoke(invocation("hangs", http=h))) for h in asked]
    await cluster.reached(lambda: home.pool.under_way == 2)
    for gateway in list(home.server._gateways):
        gateway.wire.end("torn")

    with pytest.raises(ShardLost):
        await calls[0]
    OPEN["go"].set()
    assert isinstance(await calls[1], Success)
    assert cluster.client.retried == {"lost": 1}


async def test_a_shard_that_leaves_fails_nothing(start: Start):
    """It says so first; what it has it answers, what comes goes to the other."""
    cluster = await start(2)
    home = cluster.home("default/echo")
    had = [asyncio.create_task(cluster.client.invoke(invocation("hangs"))) for _ in range(3)]
    slow_home = cluster.home("default/hangs")
    await cluster.reached(lambda: slow_home.pool.under_way == 3)

    async def calls() -> list[Outcome]:
        return [await cluster.client.invoke(invocation("echo", b"x")) for _ in range(200)]

    calling = asyncio.create_task(calls())
    await asyncio.sleep(0)
    leaving = asyncio.create_task(home.server.leave())
    outcomes = await calling
    await leaving
    OPEN["go"].set()

    assert {type(outcome) for outcome in outcomes + [await call for call in had]} == {Success}
    assert cluster.home("default/echo") is not home
    assert isinstance(await cluster.client.invoke(invocation("hangs")), Success)


async def test_without_a_shard_a_request_waits_for_one(start: Start, certificates: Path):
    """Up to its own deadline; the first shard that comes has it."""
    client = PoolClient(
        Fixed({"shard-0": Address("127.0.0.1", 1)}), Identity(certificates / "gateway"), "lonely"
    )
    pool_client.GATHER_S = 0.01
    async with client.running():
        with pytest.raises(NoShard, match="shard-0: no connection"):
            await client.invoke(invocation("echo", queue_s_max=0.2))


async def test_functions_and_routes_are_told_and_so_is_every_change(start: Start):
    cluster = await start(2)
    client = cluster.client
    await cluster.reached(lambda: len(client.functions) == len(NAMES))
    routed = function("routed", routes=(Route(path="/a/{b}"),))
    for shard in cluster.shards.values():
        shard.deploy(routed)
        del shard.functions[FunctionId("default/echo")]
        shard.server.look()
    await cluster.reached(lambda: routed.id in client.functions)

    assert client.functions[routed.id].routes == (Route(path="/a/{b}"),)
    assert "default/echo" not in client.functions


async def test_a_list_longer_than_one_frame_arrives_whole(start: Start):
    cluster = await start(1)
    shard = cluster.shards["shard-0"]
    for number in range(3000):
        each = function(f"f{number}", routes=(Route(path="/" + "x" * 900 + str(number)),))
        shard.functions[each.id] = StoredFunction(each.id, 1, each.spec, BASE, 0.0)
    for gateway in list(shard.server._gateways):  # it comes again, and is told anew
        gateway.wire.end("torn")
    await cluster.reached(lambda: len(cluster.client.functions) == 3000 + len(NAMES))


async def test_changes_longer_than_one_frame_arrive_whole(start: Start):
    """However much one tenant declares at once: the shard lives, and so does every connection."""
    cluster = await start(1)
    shard, client = cluster.shards["shard-0"], cluster.client
    before = set(shard.functions)
    routes = tuple(Route(path=f"/{n}/" + "x" * 1000) for n in range(100))
    for number in range(100):
        each = function(f"f{number}", routes=routes)
        shard.functions[each.id] = StoredFunction(each.id, 1, each.spec, BASE, 0.0)
    shard.server.look()
    await cluster.reached(lambda: len(client.functions) == 100 + len(NAMES))
    for id_ in shard.functions.keys() - before:
        del shard.functions[id_]
    shard.server.look()
    await cluster.reached(lambda: client.functions.keys() == before)

    assert client.functions.keys() == before


async def test_a_function_that_one_shard_has_not_heard_of_yet_runs_in_another(start: Start):
    cluster = await start(2)
    new = function("echo", version="2")
    id_ = FunctionId("default/fresh")
    fresh = Function(id_, "1", new.spec, new.mold)
    other = next(s for s in cluster.shards.values() if s is not cluster.home(id_))
    other.deploy(fresh)
    cluster.client.functions[id_] = cluster.client.functions[new.id]

    assert isinstance(await cluster.client.invoke(invocation("fresh")), Success)


async def test_a_function_that_no_shard_has_fetched_yet_is_waited_for(start: Start):
    """Its only shard is gone, the next one is still busy with its package."""
    cluster = await start(1)
    shard = cluster.shards["shard-0"]
    shard.pool.remove(ECHO)
    shard.pool.unready[ECHO] = "its package is being fetched"
    calling = asyncio.create_task(cluster.client.invoke(invocation("echo")))
    await cluster.reached(lambda: cluster.client.retried["not ready"])
    with pytest.raises(NotReadyHere):
        await cluster.client.invoke(invocation("echo", queue_s_max=0.01))
    del shard.pool.unready[ECHO]
    shard.deploy(function("echo"))

    assert isinstance(await calling, Success)


async def test_what_is_accepted_is_on_the_shard_with_its_key(start: Start):
    cluster = await start(1)
    http = {"method": "POST", "path": "/"}
    sent = invocation("echo", b"later", http=http, trace="00-1")
    accepted = await cluster.client.accept(sent, ("key", "print"))
    again = await cluster.client.accept(sent, None)

    assert (accepted.is_new, again.is_new) == (True, False)
    ((kept, key), _) = cluster.shards["shard-0"].accepted
    assert (kept.id, kept.body, kept.http, kept.trace) == (sent.id, b"later", http, "00-1")
    assert key == ("key", "print")
    with pytest.raises(FunctionNotFound):
        await cluster.client.accept(invocation("nobody"))
    with pytest.raises(BadInput, match="meta of"):
        await cluster.client.accept(invocation("echo", http={"path": "x" * 70_000}))


async def test_what_is_being_accepted_counts_as_a_call(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    """A gateway that ends waits for it, and takes no more of them than of others."""
    monkeypatch.setattr(pool_client, "CALLS_MAX", 1)
    cluster = await start(1)
    client, shard = cluster.client, cluster.shards["shard-0"]
    there = shard.accept

    async def slow(invocation: Invocation, key: tuple[str, str] | None) -> Accepted:
        OPEN["begun"].set()
        await OPEN["go"].wait()
        return await there(invocation, key)

    monkeypatch.setattr(shard, "accept", slow)
    accepting = asyncio.create_task(client.accept(invocation("echo")))
    await begun()

    assert not await client.drain(0)
    for refused in (client.accept, client.invoke):
        with pytest.raises(QueueFull):
            await refused(invocation("echo"))
    OPEN["go"].set()
    assert await client.drain(SOON_S)
    assert (await accepting).is_new


async def test_a_lost_shard_has_an_event_with_a_key_accepted_by_the_next(start: Start):
    """With its key it is the same event; without one nobody knows."""
    cluster = await start(2)
    home = cluster.home("default/echo")

    async def torn(invocation: Invocation, key: tuple[str, str] | None) -> Accepted:
        for gateway in list(home.server._gateways):
            gateway.wire.end("torn")
        await asyncio.Event().wait()
        raise AssertionError

    home.accept = torn  # type: ignore[method-assign]
    with pytest.raises(StoreFailed, match="shard"):
        await cluster.client.accept(invocation("echo"))
    await cluster.reached(lambda: len(cluster.client.live()) == 2)
    assert (await cluster.client.accept(invocation("echo"), ("key", "print"))).is_new
    assert cluster.client.retried["lost"] == 1


async def test_nobody_without_a_gateways_certificate_is_served(start: Start, certificates: Path):
    """Another role's certificate is not enough, and neither is another authority's."""
    cluster = await start(1)
    pool_client.GATHER_S = 0.3
    strangers = certificates / "strangers"
    tls.make(strangers)
    address = cluster.client.peers["shard-0"].address
    for folder in (certificates / "pool", strangers / "gateway"):
        client = PoolClient(Fixed({"shard-0": address}), Identity(folder), "stranger")
        async with client.running():
            assert not client.live()
            assert client.peers["shard-0"].why

    assert cluster.shards["shard-0"].server.gateways == ["gateway"]


async def test_a_shard_of_another_name_is_not_taken_for_it(start: Start, certificates: Path):
    cluster = await start(1)
    pool_client.GATHER_S = 0.3
    address = cluster.client.peers["shard-0"].address
    identity = Identity(certificates / "gateway")
    async with PoolClient(Fixed({"shard-9": address}), identity, "other").running() as client:
        assert not client.live()


async def test_certificates_that_change_are_used_from_then_on(tmp_path: Path):
    tls.make(tmp_path)
    identity = Identity(tmp_path / "gateway")
    before = identity.connecting(tls.CALLS)

    assert identity.connecting(tls.CALLS) is before
    tls.make(tmp_path)
    assert identity.connecting(tls.CALLS) is not before


async def test_many_calls_share_one_connection(start: Start):
    cluster = await start(1)
    bodies = [str(n).encode() * n for n in range(300)]
    outcomes = await asyncio.gather(
        *(cluster.client.invoke(invocation("echo", body)) for body in bodies)
    )

    assert [outcome.body for outcome in outcomes if isinstance(outcome, Success)] == bodies
    assert cluster.shards["shard-0"].server.gateways == ["gateway"]
