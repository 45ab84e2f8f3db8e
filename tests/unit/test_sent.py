"""What is sent to us: who is given it, whatever becomes of the others."""

import asyncio
import hmac
import json
from types import SimpleNamespace
from typing import Any

import pytest

from dayfly.protocol import BODY_BYTES_MAX
from dayfly_gateway.destinations import signer
from dayfly_gateway.hooks import Hooks
from dayfly_pool.brokers import EventsSource, WebhookSource
from dayfly_pool.errors import BadInput, BodyTooLarge, FunctionNotFound, PlatformError, StoreFailed
from dayfly_pool.models import Invocation, InvocationId, TriggerSpec
from dayfly_pool.store.declarations import StoredTrigger
from dayfly_pool.store.events import Accepted

HEADERS = {"content-type": "application/cloudevents+json", "traceparent": ""}


class Service:
    """What `Hooks` asks of a service. *failing* functions raise what is said."""

    def __init__(self, *names: str, **more: Any) -> None:
        spec = more or {"events": EventsSource()}
        self.triggers = {
            ("default", name): StoredTrigger(
                "default", name, TriggerSpec(function=name, **spec), 0.0, 0.0
            )
            for name in names
        }
        self.failing: dict[str, PlatformError] = {}
        self.accepted: list[str] = []
        self.events = self.secrets = self
        self.queue = SimpleNamespace(clock=SimpleNamespace(now=lambda: 0.0))
        self.text = "key"

    def get(self, namespace: str, name: str) -> str:
        return self.text

    async def accept(
        self, invocation: Invocation, key: tuple[str, str], priority: int = 0, hops: int = 0
    ) -> Accepted:
        await asyncio.sleep(0)
        name = invocation.function.partition("/")[2]
        if name in self.failing:
            raise self.failing[name]
        self.accepted.append(name)
        return Accepted(InvocationId(name))


def event(**more: Any) -> bytes:
    return json.dumps({"specversion": "1.0", "id": "1", "source": "/", "type": "t"} | more).encode()


async def publish(service: Service, body: bytes) -> list[str]:
    return await Hooks(service)._published("default", HEADERS, body)  # type: ignore[arg-type]


async def test_a_function_that_is_gone_keeps_the_others_from_nothing():
    """The sender hears of it, and may send it again: those who have it are not given it twice."""
    service = Service("a", "gone", "b", "full")
    service.failing = {"gone": FunctionNotFound("no function"), "full": StoreFailed("disk full")}
    with pytest.raises(StoreFailed):  # for which it is worth it
        await publish(service, event())

    assert service.accepted == ["a", "b"]


async def test_a_trigger_that_is_declared_meanwhile_harms_no_event():
    service = Service("a", "b")

    async def declare() -> None:
        service.triggers |= Service("c").triggers

    async with asyncio.TaskGroup() as tasks:
        sending = tasks.create_task(publish(service, event()))
        tasks.create_task(declare())

    assert sending.result() == ["a", "b"]


async def test_what_no_function_may_be_given_is_refused_and_not_accepted():
    service = Service("a")
    with pytest.raises(BodyTooLarge):
        await publish(service, event(data="\u20ac" * (BODY_BYTES_MAX // 3)))

    assert service.accepted == []


async def test_a_webhook_that_no_function_may_be_given_is_refused():
    """As its bytes are, it fits; as an event, it does not."""
    service = Service("a", webhook=WebhookSource(secret="s", scheme="github"))
    hooks, body = Hooks(service), b"\xff" * (BODY_BYTES_MAX - 1)  # type: ignore[arg-type]
    signature = "sha256=" + hmac.new(b"key", body, "sha256").hexdigest()
    headers = {"x-hub-signature-256": signature, "x-github-delivery": "1", "x-github-event": "e"}
    with pytest.raises(BodyTooLarge):
        await hooks._hooked("/hooks/default/a", headers | HEADERS, body)


@pytest.mark.parametrize("text", ["whsec_", "whsec_!!"])
async def test_a_secret_without_a_key_lets_nobody_in(text: str):
    service = Service("a", webhook=WebhookSource(secret="s"))
    service.text = text
    with pytest.raises(BadInput, match="holds no key"):
        await Hooks(service)._hooked("/hooks/default/a", HEADERS, b"{}")  # type: ignore[arg-type]
    with pytest.raises(BadInput):
        signer(text)
