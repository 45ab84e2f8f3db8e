"""HTTP through a gateway: shards that say no, say nothing, or are not there any more."""

import asyncio
import gc
import logging
import socket
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from dayfly_gateway import proxy as proxies
from dayfly_gateway import roles
from dayfly_gateway.config import GatewayConfig
from dayfly_gateway.life import admin_runner, http_server
from dayfly_gateway.proxy import AdminProxy, Proxy
from dayfly_pool import tls
from dayfly_pool.cluster.members import Address, Fixed
from dayfly_pool.models import FunctionId, Invocation, Outcome, Route
from dayfly_pool.peers import PoolServer
from dayfly_pool.pool_client import PoolClient
from dayfly_pool.store.declarations import StoredFunction
from dayfly_pool.store.events import Accepted
from dayfly_pool.tls import Identity
from dayfly_pool.wire import Listed

SOON_S: Final = 20.0
LOGS: Final = "/namespaces/default/functions/greet/logs"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Client = TestClient[web.Request, web.Application]


class Behind:
    """A shard without functions."""

    functions: dict[FunctionId, StoredFunction] = {}  # noqa: RUF012

    async def invoke(self, invocation: Invocation) -> Outcome:
        raise NotImplementedError

    async def accept(self, invocation: Invocation, key: tuple[str, str] | None) -> Accepted:
        raise NotImplementedError


class Gateway:
    """A gateway before shards of which each answers everything with its handler."""

    def __init__(self, client: PoolClient, proxy: Proxy, http: Client) -> None:
        self.client, self.proxy, self.http = client, proxy, http


Start = Callable[..., Awaitable[Gateway]]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    tls.make(folder)
    return folder


@pytest.fixture
async def start(certificates: Path) -> AsyncIterator[Start]:
    """Starts a gateway, and a shard for each handler."""
    async with asyncio.timeout(60), AsyncExitStack() as stack:

        async def started(*handlers: Handler, token: str = "") -> Gateway:
            addresses = {}
            for at, handler in enumerate(handlers):
                app = web.Application()
                app.router.add_route("*", "/{path:.*}", handler)
                runner = admin_runner(app)
                await runner.setup()
                stack.push_async_callback(runner.cleanup)
                assert runner.server is not None
                planes = {tls.ADMIN: runner.server, tls.DATA: runner.server}
                name = f"shard-{at}"
                server = PoolServer(Behind(), Identity(certificates / "pool"), name, planes=planes)
                await server.listen("127.0.0.1", 0)
                await stack.enter_async_context(server.running())
                addresses[name] = Address("127.0.0.1", server.port)
            identity = Identity(certificates / "gateway")
            client = PoolClient(Fixed(addresses), identity, "gateway")
            await stack.enter_async_context(client.running())
            proxy = await stack.enter_async_context(Proxy(client, identity).running())
            config = GatewayConfig(admin_token=token)
            app = AdminProxy(proxy, config, lambda: True).application()
            http: Client = TestClient(TestServer(app))
            await stack.enter_async_context(http)
            return Gateway(client, proxy, http)

        yield started


def says(status: int, text: str) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text=text)

    return handler


@pytest.fixture
def mute() -> Iterator[Address]:
    """Where nobody answers: as a node that is gone."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield Address("127.0.0.1", server.getsockname()[1])


NOBODY: Final = '{"title": "FunctionNotFound", "detail": "no function nobody"}'


async def test_who_follows_what_no_shard_has_is_told_so(start: Start):
    gateway = await start(says(404, NOBODY), says(404, NOBODY))
    reply = await gateway.http.get(f"{LOGS}?follow=1")

    assert reply.status == 404
    assert "no function nobody" in (await reply.json())["detail"]


async def test_the_lines_of_those_shards_that_have_it_are_followed(start: Start):
    line = "data: " + "x" * 60_000
    gateway = await start(says(404, NOBODY), says(200, f"{line}\n\ndata: last\n\n"))
    reply = await gateway.http.get(f"{LOGS}?follow=1")

    assert (reply.status, await reply.text()) == (200, f"{line}\n\ndata: last\n\n")


async def test_what_a_shard_was_not_asked_goes_to_the_next_one(
    start: Start, mute: Address, monkeypatch: pytest.MonkeyPatch
):
    """Its node is gone: a request that changes something has changed nothing there."""
    monkeypatch.setattr(proxies, "CONNECT_S", 0.1)
    gateway = await start(says(200, "done"), says(200, "done"))
    gateway.client.order(FunctionId(""))[0].address = mute
    reply = await gateway.http.post("/namespaces/default/runs", data=b"{}")

    assert (reply.status, await reply.text()) == (200, "done")


async def test_a_shard_that_goes_silent_is_waited_for_no_longer_than_any_build_takes(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(proxies, "QUIET_S", 0.1)
    go = asyncio.Event()

    async def silent(request: web.Request) -> web.StreamResponse:
        await go.wait()
        return web.Response(text="late")

    gateway = await start(silent)
    built = await gateway.http.post("/namespaces/default/environments/lean", data=b"{}")
    invoking = asyncio.create_task(
        gateway.http.post("/namespaces/default/functions/greet/invocations", data=b"{}")
    )
    shown = await gateway.http.get("/namespaces/default/functions/greet")
    go.set()

    assert (built.status, (await built.json())["error"]) == (502, "ShardLost")
    assert shown.status == 502
    assert await (await invoking).text() == "late"  # a function may run for a day


async def test_requests_that_wait_leave_room_for_others(start: Start):
    """However many ask for an invocation with `Prefer: wait`."""
    go, waiting = asyncio.Event(), 0

    async def wait(request: web.Request) -> web.StreamResponse:
        nonlocal waiting
        if request.path == "/wait":
            waiting += 1
            await go.wait()
        return web.Response(text="here")

    gateway = await start(wait)
    (peer,) = gateway.client.peers.values()

    async def ask(path: str) -> str:
        async with gateway.proxy.ask(peer, tls.DATA, "GET", path) as reply:
            return str(await reply.text())

    async with asyncio.TaskGroup() as tasks, asyncio.timeout(SOON_S):
        asking = [tasks.create_task(ask("/wait")) for _ in range(260)]
        assert await ask("/hook") == "here"
        while waiting < 260:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert await ask("/hook") == "here"
        go.set()

    assert {task.result() for task in asking} == {"here"}


async def test_only_who_has_the_token_chooses_a_shard(start: Start):
    """`/live` and `/ready` are everybody's, but ours: no shard is asked, and none is named."""
    gateway = await start(says(200, "a shard's"), token="secret")
    for path in ("/live", "/ready"):
        for name in ("shard-0", "nobody"):
            reply = await gateway.http.get(f"{path}?shard={name}")
            assert (reply.status, "shard" in await reply.text()) == (200, False)
    assert (await gateway.http.get("/functions?shard=shard-0")).status == 401
    headers = {"Authorization": "Bearer secret"}
    reply = await gateway.http.get("/functions?shard=shard-0", headers=headers)
    assert await reply.text() == "a shard's"


# ---- the gateway itself ------------------------------------------------------------------------


async def test_routes_that_clash_are_lived_with(
    certificates: Path, caplog: pytest.LogCaptureFixture
):
    """Shards may have been told of both at once; the first one counts, and it is no error."""
    gateway = roles.Gateway(GatewayConfig(), Identity(certificates / "gateway"), Fixed({}), 1.0)
    for at, name in enumerate(("a/first", "a/second")):
        gateway.client.functions[FunctionId(name)] = Listed(name, 1, at, (Route(path="/x"),))
    gateway._reroute()

    assert gateway._data.routes.match("", "/x", "GET").function == "a/first"
    ((_, level, text),) = caplog.record_tuples
    assert (level, text) == (logging.WARNING, "declarations clash")


async def test_a_second_signal_ends_the_waiting_for_calls(certificates: Path):
    """And leaves nothing behind that was begun."""
    gateway = roles.Gateway(GatewayConfig(), Identity(certificates / "gateway"), Fixed({}), 1.0)
    server = http_server(gateway._data.handle, GatewayConfig(), 0)
    gateway.client._idle.clear()
    gateway._hurrying.set()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        await gateway._unless_hurried(gateway._answer_all(server))
        gc.collect()

    assert not told
