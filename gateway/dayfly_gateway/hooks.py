"""Events that are sent to us: webhooks (`/hooks/NAMESPACE/TRIGGER`) and CloudEvents (`/events`).

Both answer when the event is on the disk, for every function that is meant. What is sent twice is
accepted once: it is known by the sender's own id.
"""

import asyncio
import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from aiohttp import web
from standardwebhooks.webhooks import WebhookVerificationError

from dayfly.protocol import BODY_BYTES_MAX
from dayfly_gateway import cloudevents, events
from dayfly_gateway.destinations import signer
from dayfly_gateway.routing import MethodNotAllowed
from dayfly_gateway.triggers.filters import Filter, FilterFailed
from dayfly_gateway.triggers.pump import Counts
from dayfly_pool.brokers import WebhookSource
from dayfly_pool.errors import BadInput, BodyTooLarge, PlatformError, TriggerNotFound
from dayfly_pool.events import HOPS, payload, rfc3339
from dayfly_pool.ids import new_id
from dayfly_pool.models import Invocation, function_id
from dayfly_pool.service import Service
from dayfly_pool.store.declarations import StoredTrigger

HOOKS: Final = "/hooks/"
EVENTS: Final = "/events"
ID_CHARACTERS_MAX: Final = 256
EVENT_BYTES_MAX: Final = 1024 * 1024
"""Of a CloudEvent from whoever reaches us: it is parsed for nothing if nobody is meant."""


class NotSigned(PlatformError):
    """The signature is missing, wrong or too old.

    Nothing was accepted. Sender and `dayfly secret put` must have the same secret.
    """

    status = 401


class TriggerPaused(PlatformError):
    """The trigger is paused.

    Send it again later, or let it go on: dayfly trigger resume NAME.
    """

    status = 503
    retryable = True
    retry_after_s = 60


class Hooks:
    """Takes what is sent to the triggers of *service*."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._filters: dict[str, Filter] = {}
        self._counts: dict[tuple[str, str], Counts] = {}

    def counts(self) -> dict[tuple[str, str], Counts]:
        """What was sent to each trigger since this server started."""
        for key in self._counts.keys() - self._service.triggers.keys():
            del self._counts[key]
        return self._counts

    def check(self, request: web.BaseRequest) -> int:
        """How long a body may be read for it. Raises `PlatformError` when none is."""
        if request.method != "POST":
            raise MethodNotAllowed(f"{request.method} is not POST", allow="POST")
        path = request.rel_url.raw_path
        if namespace_of(path) is not None:
            return EVENT_BYTES_MAX
        self._hook(path)
        return BODY_BYTES_MAX

    async def answer(self, request: web.BaseRequest, body: bytes) -> web.Response:
        """Accept what was sent, and was checked. Raises `PlatformError`."""
        headers = {
            name.decode("latin-1").lower(): value.decode("utf-8", "replace")
            for name, value in request.raw_headers
        }
        headers["traceparent"] = events.trace(request)
        path = request.rel_url.raw_path
        namespace = namespace_of(path)
        if namespace is not None:
            accepted = await self._published(namespace, headers, body)
        else:
            accepted = await self._hooked(path, headers, body)
        told = json.dumps({"accepted": accepted}).encode()
        return web.Response(
            status=202,
            body=told,
            headers={"Content-Type": "application/json", "Server": "Dayfly"},
        )

    # ---- CloudEvents --------------------------------------------------------------------------

    async def _published(
        self, namespace: str, headers: Mapping[str, str], body: bytes
    ) -> list[str]:
        event = cloudevents.parse(headers, body)
        if headers["traceparent"]:
            event.setdefault("traceparent", headers["traceparent"])
        known_by = json.dumps([event["source"], event["id"]])
        whole = cloudevents.encode(event)
        declared = [
            trigger
            for trigger in self._service.triggers.values()
            if trigger.namespace == namespace
            and trigger.spec.events is not None
            and not trigger.spec.paused
        ]
        accepted: list[str] = []
        errors: list[PlatformError] = []
        for trigger in declared:  # each for itself: what one cannot have, the others are given
            await asyncio.sleep(0)  # a filter of a long event takes its time
            if self._means(trigger, event, len(whole)):
                try:
                    accepted.append(await self._accept(trigger, event, whole, known_by))
                except PlatformError as error:
                    errors.append(error)
        if errors:
            raise min(errors, key=lambda error: not error.retryable)
        return accepted

    # ---- webhooks -----------------------------------------------------------------------------

    async def _hooked(self, path: str, headers: Mapping[str, str], body: bytes) -> list[str]:
        trigger, webhook = self._hook(path)
        namespace, name = trigger.namespace, trigger.name
        secret = await asyncio.to_thread(self._service.secrets.get, namespace, webhook.secret)
        check = github if webhook.scheme == "github" else standard
        event = check(secret, headers, body) | {"source": f"/triggers/{namespace}/{name}"}
        if trigger.spec.paused:
            raise TriggerPaused
        if headers["traceparent"]:
            event["traceparent"] = headers["traceparent"]
        event |= {"specversion": "1.0", "time": rfc3339(self._service.events.queue.clock.now())}
        whole = cloudevents.encode(event)
        if not self._means(trigger, event, len(whole)):
            return []
        return [await self._accept(trigger, event, whole, str(event["id"]))]

    def _hook(self, path: str) -> tuple[StoredTrigger, WebhookSource]:
        namespace, _, name = path.removeprefix(HOOKS).partition("/")
        trigger = self._service.triggers.get((namespace, name))
        if trigger is None or trigger.spec.webhook is None:
            raise TriggerNotFound(f"no webhook at {path[:200]!r}")
        return trigger, trigger.spec.webhook

    def _means(self, trigger: StoredTrigger, event: Mapping[str, Any], size: int) -> bool:
        text, counts = trigger.spec.filter, self._counts_of(trigger)
        if text not in self._filters:
            if len(self._filters) > 1000:
                self._filters.clear()
            self._filters[text] = Filter(text)
        try:
            is_meant = self._filters[text].matches(event, size)
        except FilterFailed:
            counts.filter_errors += 1
            return False
        counts.filtered += not is_meant
        return is_meant

    def _counts_of(self, trigger: StoredTrigger) -> Counts:
        return self._counts.setdefault((trigger.namespace, trigger.name), Counts())

    async def _accept(
        self, trigger: StoredTrigger, event: Mapping[str, Any], body: bytes, id_: str
    ) -> str:
        name = f"{trigger.namespace}/{trigger.name}"
        digest = hashlib.blake2b(id_.encode(), digest_size=16).hexdigest()
        if len(body) > BODY_BYTES_MAX:
            raise BodyTooLarge(f"{len(body)} bytes as a CloudEvent, limit {BODY_BYTES_MAX}")
        function = function_id(trigger.namespace, trigger.spec.function)
        trace = str(event.get("traceparent", ""))[:128]
        invocation = Invocation(new_id(), function, body, None, trace)
        key = f"trigger {name} {digest}", "sent"
        accepted = await self._service.events.accept(
            invocation, priority=trigger.spec.priority, key=key, hops=cloudevents.hops(event)
        )
        counts = self._counts_of(trigger)
        counts.fetched += 1
        counts.acknowledged += 1
        counts.known += not accepted.is_new
        return accepted.id


def namespace_of(path: str) -> str | None:
    """Whose `/events` it is, `/ns/NAMESPACE/events` outside the default namespace."""
    if not path.endswith(EVENTS):  # most are a function's
        return None
    if path == EVENTS:
        return "default"
    _, ns, namespace, *rest = [*path.split("/"), "", ""]
    is_one = ns == "ns" and rest[:1] == ["events"] and path.count("/") == 3
    return namespace if is_one else None


def github(secret: str, headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """The event that a request of GitHub's is. Raises `NotSigned`, `BadInput`.

    https://docs.github.com/en/webhooks/using-webhooks/validating-webhook-deliveries
    """
    told = headers.get("x-hub-signature-256", "").removeprefix("sha256=")
    right = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    if not hmac.compare_digest(told.encode(), right.encode()):
        raise NotSigned("X-Hub-Signature-256")
    id_, kind = headers.get("x-github-delivery", ""), headers.get("x-github-event", "")
    _check(id_, "X-GitHub-Delivery")
    _check(kind, "X-GitHub-Event")
    return {"id": id_, "type": f"com.github.{kind}"} | _data(body)


def standard(secret: str, headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """The event that a request as of Standard Webhooks is. Raises `NotSigned`, `BadInput`."""
    try:
        signer(secret).verify(body, dict(headers), json_parse=False)
    except (WebhookVerificationError, ValueError, IndexError) as error:
        raise NotSigned(str(error)[:200]) from None
    id_ = headers["webhook-id"]
    _check(id_, "webhook-id")
    data = _data(body)
    told = data.get("data")
    kind = told.get("type") if isinstance(told, dict) else None
    event = {"id": id_, "type": kind if isinstance(kind, str) and kind else "webhook"} | data
    if isinstance(told, dict) and HOPS in told:  # a word of ours
        event[HOPS] = str(told[HOPS])
    return event


def _check(value: str, header: str) -> None:
    if not 0 < len(value) <= ID_CHARACTERS_MAX:
        raise BadInput(f"{header} is 1 to {ID_CHARACTERS_MAX} characters")


def _data(body: bytes) -> dict[str, Any]:
    found = payload(body)
    if isinstance(found, msgspec.Raw):
        return {"datacontenttype": "application/json", "data": msgspec.json.decode(found)}
    if isinstance(found, str):
        return {"datacontenttype": "text/plain", "data": found}
    return {"datacontenttype": "application/octet-stream", "data_base64": found["body"]}
