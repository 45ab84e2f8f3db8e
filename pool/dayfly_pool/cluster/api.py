"""The API server: objects as dicts, errors by name, a limit on every wait.

Configuration, credentials and TLS are `kubernetes.aio`'s. Its models and its generated methods are
not used: they take 0.6 s to import and drop the fields that they do not know.
"""

import asyncio
import logging
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple, Self
from urllib.parse import quote, urlencode

import aiohttp
import msgspec

from dayfly_pool.errors import BadInput, PlatformError

log = logging.getLogger("dayfly.cluster")

CONNECT_S_MAX: Final = 5.0
READ_S_MAX: Final = 20.0
"""Without a byte."""

CALL_S_MAX: Final = 60.0
"""With all tries of it."""

WATCH_S_GRACE: Final = 10.0
"""How much later than it was asked to a watch may end before it counts as dead."""

TRIES_MAX: Final = 5
WAIT_FIRST_S: Final = 0.1
WAIT_S_MAX: Final = 5.0
RETRY_AFTER_S_MAX: Final = 15.0
"""Who is told to wait for longer says so to its caller."""

BODY_BYTES_MAX: Final = 64 << 20
LINE_BYTES_MAX: Final = 8 << 20
"""An object has 1.5 MB at most: https://etcd.io/docs/v3.5/dev-guide/limit/"""

DETAIL_CHARACTERS_MAX: Final = 1000
CREDENTIALS_S: Final = 60.0
"""How often those of a kubeconfig are looked after: a file that changes, a token that expires."""

ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
EVERYWHERE: Final = "*"
"""As a namespace of lists and watches: all of them."""

TRANSIENT: Final = frozenset({429, 500, 503, 504})


class Kind(NamedTuple):
    """What the API server calls a kind of object; whether such objects are in namespaces."""

    group: str
    version: str
    plural: str
    name: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """As objects have it."""
        return f"{self.group}/{self.version}" if self.group else self.version


POD: Final = Kind("", "v1", "pods", "Pod")
SECRET: Final = Kind("", "v1", "secrets", "Secret")
CONFIG_MAP: Final = Kind("", "v1", "configmaps", "ConfigMap")
SERVICE: Final = Kind("", "v1", "services", "Service")
NODE: Final = Kind("", "v1", "nodes", "Node", False)
NAMESPACE: Final = Kind("", "v1", "namespaces", "Namespace", False)
LEASE: Final = Kind("coordination.k8s.io", "v1", "leases", "Lease")
CRD: Final = Kind(
    "apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", False
)


class ApiError(PlatformError):
    """The API server did not do what it was asked to.

    The detail is its own message. `kubectl auth can-i --list` shows what this account may do.
    """

    status = 500

    def __init__(
        self,
        detail: str = "",
        *,
        status: int = 0,
        reason: str = "",
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status or type(self).status
        self.reason = reason
        self.retry_after_s = retry_after_s


class NotFound(ApiError):
    """The API server has no such object."""

    status = 404


class Conflict(ApiError):
    """The object was changed by somebody else meanwhile.

    Read it again, and decide again.
    """

    status = 409


class Exists(ApiError):
    """The API server has an object of that name already."""

    status = 409


class Expired(ApiError):
    """The API server has forgotten what it was asked to go on from.

    List again.
    """

    status = 410


class Unreachable(ApiError):
    """The API server cannot be reached.

    What runs goes on. Look at its address and at the network in between.
    """

    status = 503
    retryable = True


class NoCluster(PlatformError):
    """No Kubernetes cluster is known.

    Name a kubeconfig, or run in a pod that has a service account.
    """

    status = 503


class Api:
    """Requests to one API server. Objects are dicts; *namespace* is its own by default.

    Every method raises `ApiError`. What may be repeated is, a few times, when the server is away or
    has too much to do: reads, patches, deletions, and the creation of what has a name. So `Exists`
    may mean that an earlier try has created it, and `Conflict` that one has patched it.
    """

    def __init__(self, configuration: Any, namespace: str) -> None:
        rest: Any = import_module("kubernetes.aio.client.rest")
        self.namespace = namespace
        self.writes = 0
        self.requests: Counter[tuple[str, str]] = Counter()
        self._configuration = configuration
        self._rest = rest.RESTClientObject(configuration)

    def __repr__(self) -> str:
        return f"<Api {self._configuration.host} {self.namespace}>"

    @classmethod
    async def connect(cls, kubeconfig: str = "", namespace: str = "") -> Self:
        """Read the configuration: *kubeconfig*, or a pod's service account, or kubectl's default.

        Nothing is sent yet. Raises `NoCluster`, and `BadInput` without the extra.
        """
        try:
            await asyncio.to_thread(import_module, "kubernetes.aio.config")
        except ImportError as error:
            raise BadInput(
                f"Kubernetes needs an extra ({error}): pip install 'dayfly[kubernetes]'"
            ) from None
        try:
            configuration, own = await _configuration(kubeconfig)
            return cls(configuration, namespace or own)
        except Exception as error:  # whatever a broken file brings
            why = f"the cluster's configuration: {error or type(error).__name__}"
            raise NoCluster(why) from error

    async def close(self) -> None:
        """Close every connection."""
        await self._rest.close()

    async def get(self, kind: Kind, name: str, *, namespace: str = "") -> dict[str, Any]:
        """One object. Raises `NotFound`."""
        return await self._call("GET", kind, self._path(kind, namespace, name))

    async def output(self, pod: str, *, lines: int, most: int, namespace: str = "") -> bytes:
        """The last *lines* that a pod's container wrote, of which *most* bytes. Not repeated."""
        query = _query({"tailLines": str(lines), "limitBytes": str(most)})
        self.requests["get", "pods/log"] += 1
        try:
            response = await self._send("GET", f"{self._path(POD, namespace, pod)}/log{query}")
            async with response:
                read = await _body(response)
        except (OSError, aiohttp.ClientError) as error:
            raise _unreachable(error) from error
        if response.status != 200:
            raise _error(response, read)
        return read

    async def page(
        self,
        kind: Kind,
        *,
        namespace: str = "",
        labels: str = "",
        fields: str = "",
        limit: int = 500,
        after: str = "",
    ) -> dict[str, Any]:
        """One page of a list: `items`, and in `metadata` `resourceVersion` and `continue`.

        *after* is the last page's `continue`. Raises `Expired` when that is too old.
        """
        query = {"limit": str(limit), "continue": after} | _selectors(labels, fields)
        found = await self._call("GET", kind, self._path(kind, namespace), query)
        for item in found.setdefault("items", []) or ():
            item.setdefault("apiVersion", kind.api_version)  # as watches have it
            item.setdefault("kind", kind.name)
        return found

    async def watch(
        self,
        kind: Kind,
        *,
        namespace: str = "",
        labels: str = "",
        fields: str = "",
        since: str,
        timeout_s: int,
    ) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """What happens after *since*: ADDED, MODIFIED, DELETED or BOOKMARK, and the object.

        The first is always a BOOKMARK of *since*: the server has agreed. It ends the stream after
        *timeout_s*; what is neither ended nor says anything then is `Unreachable`.
        Raises `Expired`. To be closed (`contextlib.aclosing`) by who does not read it to its end.
        """
        query = _selectors(labels, fields) | {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": since,
            "timeoutSeconds": str(timeout_s),
        }
        until = time.monotonic() + timeout_s + WATCH_S_GRACE
        self.requests["watch", kind.plural] += 1
        url = self._path(kind, namespace) + _query(query)
        try:
            async with asyncio.timeout(CONNECT_S_MAX + READ_S_MAX):
                response = await self._send("GET", url, None, "")
                if response.status != 200:
                    raise _error(response, await _body(response))
        except (OSError, aiohttp.ClientError) as error:
            raise _unreachable(error) from error
        try:
            yield "BOOKMARK", {"kind": kind.name, "metadata": {"resourceVersion": since}}
            async for line in _lines(response, until):
                yield _event(line)
        finally:
            if response.connection is not None and response.connection.transport is not None:
                response.connection.transport.abort()  # TLS would wait for the server's farewell
            response.close()

    async def create(
        self, kind: Kind, obj: Mapping[str, Any], *, namespace: str = ""
    ) -> dict[str, Any]:
        """A new object, with a name or a `generateName`. Raises `Exists`."""
        metadata = obj.get("metadata", {})
        path = self._path(kind, namespace or metadata.get("namespace", ""))
        again = bool(metadata.get("name"))
        return await self._call("POST", kind, path, body=_whole(kind, obj), again=again)

    async def merge(
        self,
        kind: Kind,
        name: str,
        patch: Mapping[str, Any],
        *,
        namespace: str = "",
        status: bool = False,
    ) -> dict[str, Any]:
        """Apply a merge patch (RFC 7386), to the status if so asked.

        With a `resourceVersion` in it, only if the object still has that one: else `Conflict`.
        """
        path = self._path(kind, namespace, name) + "/status" * status
        content = "application/merge-patch+json"
        return await self._call("PATCH", kind, path, body=patch, content=content)

    async def apply(
        self,
        kind: Kind,
        obj: Mapping[str, Any],
        *,
        manager: str = "dayfly",
        force: bool = True,
        status: bool = False,
    ) -> dict[str, Any]:
        """Server-side apply: *manager* owns what is in *obj*. Raises `Conflict` without *force*
        when somebody else does.
        """
        metadata = obj.get("metadata", {})
        path = self._path(kind, metadata.get("namespace", ""), metadata.get("name", ""))
        query = {"fieldManager": manager, "force": "true" if force else ""}
        content = "application/apply-patch+yaml"
        path += "/status" * status
        return await self._call("PATCH", kind, path, query, _whole(kind, obj), content)

    async def delete(
        self,
        kind: Kind,
        name: str,
        *,
        namespace: str = "",
        grace_s: int | None = None,
        uid: str = "",
    ) -> None:
        """Delete an object, with *uid* only that one. Gone already is well.

        A pod has *grace_s* seconds to end; it is there until it has.
        """
        options: dict[str, Any] = {"propagationPolicy": "Background"}
        if grace_s is not None:
            options["gracePeriodSeconds"] = grace_s
        if uid:
            options["preconditions"] = {"uid": uid}
        try:
            await self._call("DELETE", kind, self._path(kind, namespace, name), body=options)
        except NotFound:
            return
        except Conflict:
            if not uid or await self._is_still(kind, name, namespace, uid):
                raise

    async def _is_still(self, kind: Kind, name: str, namespace: str, uid: str) -> bool:
        try:
            found = await self.get(kind, name, namespace=namespace)
        except NotFound:
            return False
        return bool(found["metadata"]["uid"] == uid)

    def _path(self, kind: Kind, namespace: str, name: str | None = None) -> str:
        path = f"/apis/{kind.group}" if kind.group else "/api"
        path += f"/{kind.version}"
        if kind.namespaced and namespace != EVERYWHERE:
            path += f"/namespaces/{_segment(namespace or self.namespace)}"
        path += f"/{kind.plural}"
        return path if name is None else f"{path}/{_segment(name)}"

    async def _call(
        self,
        method: str,
        kind: Kind,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content: str = "application/json",
        again: bool = True,
    ) -> dict[str, Any]:
        """One request, and its answer; *again* if it may be repeated without harm."""
        url = path + _query(query or {})
        try:
            async with asyncio.timeout(CALL_S_MAX):
                for tried in range(1, TRIES_MAX + 1):
                    self.requests[method.lower(), kind.plural] += 1
                    self.writes += method != "GET"
                    try:
                        return await self._once(method, url, body, content)
                    except ApiError as error:
                        wait_s = _wait_s(error, tried, again)
                        if wait_s is None or tried == TRIES_MAX:
                            raise
                    await asyncio.sleep(wait_s)
        except TimeoutError as error:
            raise _unreachable(error) from error
        raise AssertionError("the last try returns or raises")

    async def _once(
        self, method: str, url: str, body: Mapping[str, Any] | None, content: str
    ) -> dict[str, Any]:
        try:
            response = await self._send(method, url, body, content)
            async with response:
                read = await _body(response)
        except (OSError, aiohttp.ClientError) as error:  # a TimeoutError is an OSError
            raise _unreachable(error) from error
        if not 200 <= response.status < 300:
            raise _error(response, read)
        return _decoded(read)

    async def _send(
        self, method: str, url: str, body: Mapping[str, Any] | None = None, content: str = ""
    ) -> aiohttp.ClientResponse:
        headers = {"accept": "application/json, */*", "user-agent": "dayfly"}
        if content:
            headers["Content-Type"] = content
        if token := await self._configuration.get_api_key_with_prefix("BearerToken"):
            headers["authorization"] = token
        limits = aiohttp.ClientTimeout(
            total=None, connect=CONNECT_S_MAX + READ_S_MAX, sock_connect=CONNECT_S_MAX,
            sock_read=None if "watch=true" in url else READ_S_MAX,
        )  # fmt: skip
        sent = await self._rest.request(
            method, self._configuration.host + url, headers, body, _request_timeout=limits
        )
        response: aiohttp.ClientResponse = sent.response
        return response


async def _configuration(kubeconfig: str) -> tuple[Any, str]:
    """Of the cluster that is meant, and the namespace that goes with it."""
    config: Any = import_module("kubernetes.aio.config")
    found: Any = import_module("kubernetes.aio.client").Configuration()
    found.retries = None  # ours know which request may be repeated
    if not kubeconfig and os.environ.get("KUBERNETES_SERVICE_HOST") and ACCOUNT.is_dir():
        config.load_incluster_config(found)  # its hook reads the token again each minute
        return found, (ACCOUNT / "namespace").read_text().strip() or "default"
    if kubeconfig:
        os.stat(kubeconfig)  # the loader would say nothing of a file that is not there
    loader = await config.load_kube_config(
        kubeconfig or None, client_configuration=found, persist_config=False
    )
    found.refresh_api_key_hook = _Credentials(loader).refresh
    return found, loader.current_context["context"].get("namespace") or "default"


class _Credentials:
    """A kubeconfig's, read again each minute: files change, tokens and certificates expire."""

    def __init__(self, loader: Any) -> None:
        self._loader, self._read_at, self._reading = loader, time.monotonic(), asyncio.Lock()

    async def refresh(self, configuration: Any) -> None:
        """Those that there are stay when new ones cannot be had."""
        async with self._reading:
            if time.monotonic() - self._read_at < CREDENTIALS_S:
                return
            self._read_at = time.monotonic()
            try:
                async with asyncio.timeout(READ_S_MAX):
                    await self._loader.load_and_set(configuration)
            except Exception as error:  # whatever a broken file or plugin brings
                log.warning("no new credentials", extra={"error": type(error).__name__})


def _segment(name: str) -> str:
    """*name* as a part of a path that cannot mean another path."""
    if not name or name in (".", ".."):
        raise BadInput(f"no name of an object: {name!r}")
    return quote(name, safe="")


def _query(query: Mapping[str, str]) -> str:
    given = {key: value for key, value in query.items() if value}
    return f"?{urlencode(given)}" if given else ""


def _selectors(labels: str, fields: str) -> dict[str, str]:
    return {"labelSelector": labels, "fieldSelector": fields}


def _whole(kind: Kind, obj: Mapping[str, Any]) -> dict[str, Any]:
    return {"apiVersion": kind.api_version, "kind": kind.name, **obj}


def _decoded(body: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(f"the API server's answer is no JSON object: {error}") from error


async def _body(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > BODY_BYTES_MAX:
            response.close()
            raise ApiError(f"the API server's answer is longer than {BODY_BYTES_MAX} bytes")
    return bytes(body)


async def _lines(response: aiohttp.ClientResponse, until: float) -> AsyncIterator[bytes]:
    """Until the server ends the stream, or by *until*, when it should have."""
    rest = b""
    while True:
        try:
            async with asyncio.timeout(max(0.0, until - time.monotonic())):
                piece = await response.content.readany()
        except (OSError, aiohttp.ClientError) as error:
            raise _unreachable(error) from error
        if not piece:
            return
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > LINE_BYTES_MAX:
            raise ApiError(f"an event is longer than {LINE_BYTES_MAX} bytes")
        for line in lines:
            if line.strip():
                yield line


def _event(line: bytes) -> tuple[str, dict[str, Any]]:
    event = _decoded(line)
    what, obj = event.get("type"), event.get("object")
    if not isinstance(what, str) or not isinstance(obj, dict):
        raise ApiError("the API server sent what is no event")
    if what == "ERROR":
        raise _named(obj, int(obj.get("code") or 500), None)
    return what, obj


def _error(response: aiohttp.ClientResponse, body: bytes) -> ApiError:
    try:
        status = _decoded(body)
    except ApiError:  # of a proxy in between
        status = {"message": f"status {response.status} ({response.reason})"}
    after = response.headers.get("retry-after", "")
    return _named(status, response.status, int(after) if after.isdecimal() else None)


def _named(status: Mapping[str, Any], code: int, retry_after_s: int | None) -> ApiError:
    """The API server's `Status`, as an error of ours."""
    reason = str(status.get("reason") or "")
    details = status.get("details")
    if retry_after_s is None and isinstance(details, dict):
        retry_after_s = details.get("retryAfterSeconds")
    named = {"AlreadyExists": Exists, "Conflict": Conflict}.get(reason)
    named = named or {404: NotFound, 409: Conflict, 410: Expired}.get(code, ApiError)
    detail = str(status.get("message") or reason)[:DETAIL_CHARACTERS_MAX]
    return named(detail, status=code, reason=reason, retry_after_s=retry_after_s)


def _unreachable(error: Exception) -> Unreachable:
    """Never sent, if the connection was not even made."""
    reason = "Refused" if isinstance(error, aiohttp.ClientConnectorError) else "Lost"
    return Unreachable(f"{type(error).__name__}: {error}"[:DETAIL_CHARACTERS_MAX], reason=reason)


def _wait_s(error: ApiError, tried: int, again: bool) -> float | None:
    """Until the next try; None if there must be none."""
    is_undone = error.status == 429 or error.reason == "Refused"
    if error.status not in TRANSIENT or not (again or is_undone):
        return None
    if error.retry_after_s is not None and error.retry_after_s > RETRY_AFTER_S_MAX:
        return None
    most = min(WAIT_S_MAX, WAIT_FIRST_S * 2.0**tried)
    jitter = random.uniform(most / 2, most)
    return (error.retry_after_s or 0) + jitter
