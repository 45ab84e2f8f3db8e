"""HTTP from a gateway to shards, over their wire: what is no call goes to one of them as it came.

The gateway's admin plane is theirs. What only one shard knows (its sandboxes, its lines of log,
what its triggers do) is put together from all of them; `?shard=NAME` asks one.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import aiohttp
import msgspec
from aiohttp import web
from multidict import CIMultiDict
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from yarl import URL

import dayfly
from dayfly.protocol import BODY_BYTES_MAX
from dayfly_gateway import answers, auth, events, later
from dayfly_gateway.behind import Read
from dayfly_gateway.config import GatewayConfig
from dayfly_gateway.management import METRICS_TYPE
from dayfly_pool import tls
from dayfly_pool.environments import BUILD_S_MAX
from dayfly_pool.errors import BadInput, NoShard, PlatformError, ShardLost
from dayfly_pool.models import FunctionId, Invocation, Outcome, Route, function_id
from dayfly_pool.pool_client import SAFE, Peer, PoolClient
from dayfly_pool.tls import Identity

log = logging.getLogger("dayfly.proxy")
ASK_S: Final = 30.0
"""How long a shard may be silent in the middle of an answer that is put together of several."""

OWN_S: Final = 75.0
"""For our own paths: an invocation may be waited for a minute."""

QUIET_S: Final = 2 * BUILD_S_MAX + ASK_S
"""How long a shard may be silent over what is passed on: no environment is built and packed for
longer."""

CONNECT_S: Final = 3.0
_OURS: Final = frozenset(
    {
        "authorization",
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "origin",
        "te",
        "transfer-encoding",
        "upgrade",
    }
)
"""Headers that are between a client and us."""


class Remote:
    """Shards elsewhere. Implements `Behind`."""

    def __init__(self, client: PoolClient, proxy: "Proxy") -> None:
        self._client, self._proxy = client, proxy

    @property
    def queue_s_max(self) -> float:
        """See `Behind`."""
        return self._client.queue_s_max

    @property
    def invoke(self) -> Callable[[Invocation], Awaitable[Outcome]]:
        """See `Behind`."""
        return self._client.invoke

    @property
    def accept(self) -> later.Accept:
        """See `Behind`."""
        return self._client.accept

    def routes(self) -> Iterable[tuple[FunctionId, Route]]:
        """See `Behind`."""
        declared = sorted(self._client.functions.values(), key=lambda e: (e.updated, e.id))
        return ((FunctionId(each.id), route) for each in declared for route in each.routes)

    async def answer(self, request: web.BaseRequest, read: Read) -> web.Response:
        """See `Behind`. What is sent twice is accepted once, so it may be sent to another shard."""
        body = await read(events_bytes_max(request)) if request.body_exists else b""
        return await self._proxy.data(request, body)


def events_bytes_max(request: web.BaseRequest) -> int:
    """How long a body may be for a path of ours; a shard may want less."""
    return 0 if request.rel_url.raw_path.startswith(later.PATH) else BODY_BYTES_MAX


class Proxy:
    """Asks shards over HTTP. Use it inside `async with proxy.running():`."""

    def __init__(self, client: PoolClient, identity: Identity) -> None:
        self.client = client
        self._identity = identity
        self._session: aiohttp.ClientSession

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Proxy"]:
        """Hold connections while the block runs."""
        self._session = aiohttp.ClientSession(
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            connector=aiohttp.TCPConnector(limit=0),  # as many as clients have with us
        )
        async with self._session:
            yield self

    def ask(
        self,
        peer: Peer,
        protocol: str,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Any = None,
        silent_s: float | None = None,
    ) -> Any:
        """One request, as of aiohttp's session. Raises `aiohttp.ClientError`, `TimeoutError`.

        Who may ask the admin plane has been decided here: a shard takes us for its own machine.
        """
        if protocol == tls.ADMIN:
            headers = CIMultiDict(headers or {})
            headers["Host"] = "localhost"
        host, port = peer.address
        host = f"[{host}]" if ":" in host else host
        return self._session.request(
            method,
            URL(f"https://{host}:{port}{path}", encoded=True),
            headers=headers,
            data=body,
            ssl=self._identity.connecting(protocol),
            server_hostname="pool",
            allow_redirects=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=silent_s),
        )

    async def data(self, request: web.BaseRequest, body: bytes) -> web.Response:
        """What a shard answers on one of our own paths. Raises `NoShard`."""
        why = "none is there"
        for peer in await self.peers(FunctionId(request.rel_url.raw_path)):
            try:
                async with self.ask(
                    peer,
                    tls.DATA,
                    request.method,
                    request.rel_url.raw_path_qs,
                    headers=passed_on(request.raw_headers),
                    body=body or None,
                    silent_s=OWN_S,
                ) as reply:
                    whole = await reply.read()
                    return web.Response(
                        status=reply.status, headers=passed_on(reply.raw_headers), body=whole
                    )
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                why = f"{peer.name}: {error}"
        raise NoShard(why[:500])

    async def peers(self, function: FunctionId) -> Sequence[Peer]:
        """The live shards, the one with *function* first; waits for one. Raises `NoShard`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.client.queue_s_max):
                await self.client.some()
        if not (found := self.client.order(function)):
            raise NoShard
        return found

    async def from_all(self, path: str) -> dict[str, tuple[int, bytes]]:
        """What every live shard that answers says to a GET, by name."""

        async def one(peer: Peer) -> tuple[int, bytes] | None:
            try:
                async with self.ask(peer, tls.ADMIN, "GET", path, silent_s=ASK_S) as reply:
                    return reply.status, await reply.read()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                log.warning(
                    "a shard does not answer", extra={"shard": peer.name, "why": str(error)}
                )
                return None

        peers = sorted(await self.peers(FunctionId("")), key=lambda peer: peer.name)
        found = await asyncio.gather(*map(one, peers))
        return {
            peer.name: told for peer, told in zip(peers, found, strict=True) if told is not None
        }


def lies_in_one(path: str) -> bool:
    """Whether only the shard has it that made it: if one does not, another may."""
    return path.split("/")[1::2][:2] == ["namespaces", "artifacts"]


def passed_on(raw: Iterable[tuple[bytes, bytes]]) -> CIMultiDict[str]:
    """The headers that go on to the other side."""
    headers: CIMultiDict[str] = CIMultiDict()
    for name, value in raw:
        text = name.decode("latin-1")
        if text.lower() not in _OURS:
            headers.add(text, value.decode("utf-8", "surrogateescape"))
    return headers


class AdminProxy:
    """The admin plane of a gateway."""

    def __init__(self, proxy: Proxy, config: GatewayConfig, is_ready: Callable[[], bool]) -> None:
        self._proxy, self._config, self._is_ready = proxy, config, is_ready
        self._registry = CollectorRegistry()
        self._registry.register(_Counts(proxy.client))

    def application(self) -> web.Application:
        """The aiohttp application of this plane."""
        app = web.Application(
            middlewares=[self._guard], client_max_size=self._config.package_bytes_max
        )
        app.add_routes(
            [
                web.get("/live", self._live),
                web.get("/ready", self._ready),
                web.get("/metrics", self._metrics),
                web.get("/shards", self._shards),
                web.get("/pool", self._pool),
                web.get("/triggers", self._triggers),
                web.get("/namespaces/{namespace}/functions/{name}/logs", self._logs),
                web.get("/namespaces/{namespace}/jobs/{name}/logs", self._logs),
                web.route("*", "/{path:.*}", self._pass_on),
            ]
        )
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: auth.Handler) -> web.StreamResponse:
        try:
            auth.check(request, self._config.admin_token)
            if "shard" in request.query and request.path not in auth.OPEN:
                return await self._pass_on(request)
            return await handler(request)
        except PlatformError as error:
            return events.platform_problem(error)

    async def _live(self, request: web.Request) -> web.Response:
        about = {"version": dayfly.__version__, "http": str(self._config.http)}
        return answers.json({"status": "alive"} | about)

    async def _ready(self, request: web.Request) -> web.Response:
        ready = self._is_ready()
        return answers.json({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        """Our own; each shard has its own at its admin plane, or with `?shard=NAME`."""
        return web.Response(
            body=generate_latest(self._registry), headers={"Content-Type": METRICS_TYPE}
        )

    async def _shards(self, request: web.Request) -> web.Response:
        peers = sorted(self._proxy.client.peers.values(), key=lambda peer: peer.name)
        return answers.json(
            [
                {
                    "name": peer.name,
                    "address": f"{peer.address.host}:{peer.address.port}",
                    "isLive": peer.is_live,
                    "why": peer.why,
                    "underWay": sum(peer.under_way.values()),
                }
                for peer in peers
            ]
        )

    async def _pool(self, request: web.Request) -> web.Response:
        """Every shard's view in one; each sandbox says whose it is."""
        return answers.json(merged_pools(await self._told("/pool")))

    async def _triggers(self, request: web.Request) -> web.Response:
        """Each as the shard tells that runs it."""
        told = await self._told("/triggers")
        return answers.json(merged_triggers([told[name] for name in sorted(told)]))

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        """The last lines, wherever they were written; with `follow` as they come."""
        if "follow" in request.query:
            return await self._follow(request)
        answers.number(request, "tail", 100, 10**9)
        told = await self._told(request.rel_url.raw_path_qs)
        lines = [line for lines in told.values() for line in lines]
        lines.sort(key=lambda line: float(line["time"]))
        tail = int(request.query.get("tail", "100"))
        return answers.json(lines[max(0, len(lines) - tail) :])

    async def _told(self, path: str) -> dict[str, Any]:
        """What the shards say, decoded. Raises the first problem if it is everybody's."""
        told = await self._proxy.from_all(path)
        good = {
            name: msgspec.json.decode(body)
            for name, (status, body) in told.items()
            if status == 200
        }
        if not good:
            raise _Told(*next(iter(told.values()))) if told else NoShard()
        return good

    async def _follow(self, request: web.Request) -> web.StreamResponse:
        """The lines of all shards that have it. Raises a problem if it is everybody's."""
        peers = await self._proxy.peers(FunctionId(""))
        path = request.rel_url.raw_path_qs
        async with contextlib.AsyncExitStack() as stack:
            asked = await asyncio.gather(*(self._opened(stack, peer, path) for peer in peers))
            replies = [reply for reply in asked if reply is not None]
            good = [reply for reply in replies if reply.status == 200]
            if not good:
                raise _Told(replies[0].status, await replies[0].read()) if replies else NoShard()
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            async with asyncio.TaskGroup() as tasks:
                following = [tasks.create_task(_copy(reply, response)) for reply in good]
                while self._is_ready() and request.transport is not None:
                    if (await asyncio.wait(following, timeout=1.0))[1] == set():
                        break
                for task in following:
                    task.cancel()
        return response

    async def _opened(
        self, stack: contextlib.AsyncExitStack, peer: Peer, path: str
    ) -> aiohttp.ClientResponse | None:
        """What the shard begins to answer, until *stack* ends; None if it does not."""
        asking = self._proxy.ask(peer, tls.ADMIN, "GET", path)
        try:
            async with asyncio.timeout(ASK_S):
                reply: aiohttp.ClientResponse = await stack.enter_async_context(asking)
                if reply.status != 200:
                    await reply.read()  # now, while it may fail
                return reply
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            log.warning("a shard does not answer", extra={"shard": peer.name, "why": str(error)})
            return None

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        """What any shard can answer; a function's own where it has its sandboxes."""
        peers, path = await self._whom(request)
        for at, peer in enumerate(peers):
            is_last = at == len(peers) - 1
            try:
                async with self._proxy.ask(
                    peer,
                    tls.ADMIN,
                    request.method,
                    path,
                    headers=passed_on(request.raw_headers),
                    body=request.content if request.body_exists else None,
                    silent_s=_silent_s(request),
                ) as reply:
                    if reply.status != 404 or is_last or not lies_in_one(request.rel_url.raw_path):
                        return await self._answer(request, reply)
            except (
                aiohttp.ClientConnectorError,
                aiohttp.ConnectionTimeoutError,
            ) as error:  # it has not been asked
                if is_last:
                    raise NoShard(f"{peer.name}: {error}") from None
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                if is_last or request.method not in SAFE:
                    raise ShardLost(f"{peer.name}: {error}") from None
        raise NoShard

    async def _whom(self, request: web.Request) -> tuple[Sequence[Peer], str]:
        path, client = request.rel_url.raw_path_qs, self._proxy.client
        if (name := request.query.get("shard")) is not None:
            if name not in client.live():
                raise BadInput(f"no shard {name[:100]!r} is there: one of {sorted(client.live())}")
            url = request.rel_url.without_query_params("shard")
            return [client.peers[name]], url.raw_path_qs
        segments = request.rel_url.raw_path.split("/")
        if len(segments) > 4 and segments[1::2][:2] == ["namespaces", "functions"]:
            return await self._proxy.peers(function_id(segments[2], segments[4])), path
        return await self._proxy.peers(FunctionId("")), path

    async def _answer(
        self, request: web.Request, reply: aiohttp.ClientResponse
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=reply.status, headers=passed_on(reply.raw_headers))
        if reply.content_length is not None:
            response.content_length = reply.content_length
        await response.prepare(request)
        try:
            async for chunk in reply.content.iter_any():
                await response.write(chunk)
        except (aiohttp.ClientError, OSError):
            if request.transport is not None:  # half an answer must not look whole
                request.transport.abort()
        return response


def _silent_s(request: web.Request) -> float | None:
    """How long a shard may say nothing to it; None: a function runs, or writes, when it likes."""
    is_invoked = request.method == "POST" and request.rel_url.raw_path.endswith("/invocations")
    return None if is_invoked or "follow" in request.query else QUIET_S


async def _copy(reply: aiohttp.ClientResponse, response: web.StreamResponse) -> None:
    """Whole lines only: those of several shards come in between."""
    with contextlib.suppress(aiohttp.ClientError, OSError, ValueError):
        while line := await reply.content.readline():
            if line != b"\n":
                await response.write(line + b"\n")


class _Told(PlatformError):
    """What a shard said instead of an answer.

    See the detail.
    """

    def __init__(self, status: int, body: bytes) -> None:
        detail = body[:2000].decode(errors="replace")
        with contextlib.suppress(msgspec.DecodeError, AttributeError):
            detail = str(msgspec.json.decode(body).get("detail", detail))
        super().__init__(detail)
        self.status = status


def merged_pools(pools: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The views of several pools as one; what each says of itself alone is below `shards`."""
    whole: dict[str, Any] = {"phases": {}, "sandboxes": [], "zygotes": [], "shards": []}
    for name, pool in sorted(pools.items()):
        for phase, number in pool["phases"].items():
            whole["phases"][phase] = whole["phases"].get(phase, 0) + number
        for key in ("waiting", "underWay", "misses", "sandboxesMax"):
            whole[key] = whole.get(key, 0) + pool[key]
        for key in ("sandboxes", "zygotes"):
            whole[key] += [{**each, "shard": name} for each in pool[key]]
        whole["shards"].append({"name": name, "sandboxes": len(pool["sandboxes"])})
    return whole


def merged_triggers(told: Iterable[Iterable[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """What several shards say of their triggers as one list: counts are added up.

    Of the rest, one shard knows it, and the others say nothing of it.
    """
    whole: dict[tuple[str, str], dict[str, Any]] = {}
    for view in (view for views in told for view in views):
        key = view["metadata"]["namespace"], view["metadata"]["name"]
        if (known := whole.get(key)) is None:
            whole[key] = {**view, "status": dict(view["status"])}
            continue
        status = known["status"]
        for name, value in view["status"].items():
            if type(value) is int and type(status.get(name)) is int:
                status[name] += value
            else:
                status[name] = status.get(name) or value
    return [whole[key] for key in sorted(whole)]


class _Counts(Collector):
    """What a gateway counts."""

    def __init__(self, client: PoolClient) -> None:
        self._client = client

    def collect(self) -> Iterable[Metric]:
        """Every family, as it is now."""
        client = self._client
        yield GaugeMetricFamily(
            "dayfly_gateway_calls_under_way", "Calls not answered", client.under_way
        )
        live = GaugeMetricFamily("dayfly_gateway_shard_up", "Can be called", labels=("shard",))
        for name, peer in sorted(client.peers.items()):
            live.add_metric((name,), float(peer.is_live))
        yield live
        retried = CounterMetricFamily(
            "dayfly_gateway_retried", "Calls given to another shard", labels=("why",)
        )
        for why, number in sorted(client.retried.items()):
            retried.add_metric((why,), number)
        yield retried
        functions = len(client.functions)
        yield GaugeMetricFamily("dayfly_gateway_functions", "Known here", functions)
        build = GaugeMetricFamily("dayfly_build_info", "Constant 1", labels=("version",))
        build.add_metric((dayfly.__version__,), 1)
        yield build
