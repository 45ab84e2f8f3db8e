"""Amazon SQS, or what speaks like it: a queue that leases what it gives out.

Its bodies are text that XML allows, and never empty. Other bodies travel in base64, and the
attribute `dayfly-encoding` says so.
"""

import asyncio
import base64
import binascii
import contextlib
import functools
import hashlib
import math
import re
from collections.abc import Awaitable, Mapping
from typing import Any, Final

from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession
from botocore.exceptions import ClientError

from dayfly_gateway.triggers.source import (
    CALL_S_MAX,
    EVENT_TYPE,
    LEASE_S,
    Delivery,
    SourceFailed,
)
from dayfly_pool.brokers import SqsSource, SqsTopic

ENCODING: Final = "dayfly-encoding"
EMPTY: Final = " "
"""What stands for no bytes at all in base64: nothing is no body."""

NOT_XML: Final = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
BATCH_MAX: Final = 10
CALLS_MAX: Final = 10
"""Of one fetch: each gives at most ten."""

POLL_S_MAX: Final = 20
HIDDEN_S_MAX: Final = 12 * 3600
NOT_OURS: Final = {
    "AWS.SimpleQueueService.MessageNotInflight",
    "InvalidParameterValue",  # "the receipt handle has expired", and 12 hours that are over
    "MessageNotInflight",
    "ReceiptHandleIsInvalid",
}

ATTRIBUTES: Final = ["ApproximateReceiveCount", "MessageGroupId", "SentTimestamp"]
DEDUPLICATION: Final = re.compile(r"[\w!\"#$%&'()*+,./:;<=>?@\[\\\]^`{|}~-]{1,128}", re.ASCII)


@functools.cache
def _session() -> AioSession:
    """One for all: each of them reads a megabyte of JSON."""
    return AioSession()


class _Link:
    """A client of one queue, and the end of each call."""

    def __init__(self, spec: SqsSource | SqsTopic, secret: str, call_s: float) -> None:
        self._spec, self._secret, self._call_s = spec, secret, call_s
        self._opened = contextlib.AsyncExitStack()
        self._client: Any = None

    async def open(self) -> None:
        """Connect, and ask for the queue."""
        parts = self._secret.split(":", 2)
        if self._secret and len(parts) < 2:
            raise SourceFailed(f"SQS at {self._spec.queue}: the secret is not ACCESS:SECRET")
        names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")
        scheme, _, rest = self._spec.queue.partition("://")
        config = AioConfig(
            connect_timeout=self._call_s,
            read_timeout=self._call_s + POLL_S_MAX,
            max_pool_connections=50,
            retries={"total_max_attempts": 2, "mode": "standard"},  # within the limit of a call
            warm_up_loader_caches=True,  # in a thread
        )
        context = _session().create_client(
            "sqs",
            region_name=self._spec.region,
            endpoint_url=self._spec.endpoint or f"{scheme}://{rest.partition('/')[0]}",
            config=config,
            **(dict(zip(names, parts, strict=False)) if self._secret else {}),
        )
        self._client = await self._within("connect", self._opened.enter_async_context(context))
        await self.call("get_queue_attributes", AttributeNames=["QueueArn"])

    async def close(self) -> None:
        self._client = None
        with contextlib.suppress(Exception):
            async with asyncio.timeout(1.0):
                await self._opened.aclose()

    async def call(self, what: str, wait_s: float = 0.0, **arguments: Any) -> Mapping[str, Any]:
        """One request about the queue. Raises `SourceFailed`."""
        if self._client is None:
            raise SourceFailed(f"SQS at {self._spec.queue}: closed")
        work = getattr(self._client, what)(QueueUrl=self._spec.queue, **arguments)
        answer = await self._within(what, work, wait_s)
        return answer if isinstance(answer, dict) else {}

    async def _within(self, what: str, work: Awaitable[Any], wait_s: float = 0.0) -> Any:
        where = f"SQS at {self._spec.queue}, {what}"
        try:
            async with asyncio.timeout(self._call_s + wait_s):
                return await work
        except TimeoutError:
            raise SourceFailed(f"{where}: no answer within {self._call_s} s") from None
        except Exception as error:  # botocore has no class for what a stranger may answer
            why = " ".join(str(error).split())[:500] or type(error).__name__
            for part in filter(None, self._secret.split(":", 2)):
                why = why.replace(part, "***")
            if isinstance(error, ClientError) and error.response["Error"].get("Code") in NOT_OURS:
                raise _NotOurs(f"{where}: {why}") from None
            raise SourceFailed(f"{where}: {why}") from None


class _NotOurs(SourceFailed):
    """The lease was over: the message comes again, or somebody else has it."""


class Source:
    """A queue, as `triggers.source.Source` promises."""

    def __init__(
        self,
        spec: SqsSource,
        name: str,
        secret: str = "",
        lease_s: float = LEASE_S,
        call_s: float = CALL_S_MAX,
    ) -> None:
        self.extend_s: float | None = lease_s / 3
        self._lease_s = min(max(1, math.ceil(lease_s)), HIDDEN_S_MAX)
        self._link = _Link(spec, secret, call_s)
        self._topic = spec.queue.rstrip("/").rpartition("/")[2]

    async def open(self) -> None:
        """See `triggers.source.Source`."""
        await self._link.open()

    async def close(self) -> None:
        """See `triggers.source.Source`."""
        await self._link.close()

    async def fetch(self, most: int, wait_s: float) -> list[Delivery]:
        """See `triggers.source.Source`.

        What the queue gives in the moment of a cancellation comes again after its lease.
        """
        found = await self._first(most, wait_s)
        last = found
        for _ in range(CALLS_MAX - 1):
            if not last or len(found) >= most:
                break
            try:
                last = await self._receive(most - len(found), 0)
            except SourceFailed:
                break  # the next call says so
            found += last
        return found

    async def _first(self, most: int, wait_s: float) -> list[Delivery]:
        """Whatever comes in whole seconds of waiting; before and after less than one."""
        loop = asyncio.get_running_loop()
        if wait_s < 1:
            found = await self._receive(most, 0)
            if not found and wait_s > 0:
                await asyncio.sleep(wait_s)
                found = await self._receive(most, 0)
            return found
        end = loop.time() + wait_s
        while (left := int(end - loop.time() + 0.01)) >= 1:
            if found := await self._receive(most, min(left, POLL_S_MAX)):
                return found
        return []

    async def _receive(self, most: int, wait_s: int) -> list[Delivery]:
        answer = await self._link.call(
            "receive_message",
            wait_s,
            MaxNumberOfMessages=min(most, BATCH_MAX),
            WaitTimeSeconds=wait_s,
            VisibilityTimeout=self._lease_s,
            MessageSystemAttributeNames=ATTRIBUTES,
            MessageAttributeNames=["All"],
        )
        return [_delivery(message, self._topic) for message in answer.get("Messages") or ()]

    async def ack(self, delivery: Delivery) -> None:
        """See `triggers.source.Source`."""
        await self._about(delivery, "delete_message")

    async def nak(self, delivery: Delivery, delay_s: float) -> None:
        """See `triggers.source.Source`."""
        hidden_s = min(math.ceil(delay_s), HIDDEN_S_MAX)
        await self._about(delivery, "change_message_visibility", VisibilityTimeout=hidden_s)

    async def extend(self, delivery: Delivery) -> None:
        """See `triggers.source.Source`."""
        hidden_s = self._lease_s
        await self._about(delivery, "change_message_visibility", VisibilityTimeout=hidden_s)

    async def _about(self, delivery: Delivery, what: str, **arguments: Any) -> None:
        with contextlib.suppress(_NotOurs):
            await self._link.call(what, ReceiptHandle=delivery.token, **arguments)

    async def lag(self) -> int | None:
        """See `triggers.source.Source`."""
        name = "ApproximateNumberOfMessages"
        answer = await self._link.call("get_queue_attributes", AttributeNames=[name])
        return int(_number((answer.get("Attributes") or {}).get(name)))


def _delivery(message: Mapping[str, Any], topic: str) -> Delivery:
    about = message.get("Attributes") or {}
    headers: dict[str, str] = {}
    for name, value in (message.get("MessageAttributes") or {}).items():
        text = value.get("StringValue")
        if text is None:
            text = base64.b64encode(value.get("BinaryValue") or b"").decode()
        headers[name.lower()] = text
    body = str(message.get("Body") or "").encode(errors="replace")
    if headers.get(ENCODING) == "base64":
        with contextlib.suppress(binascii.Error):
            body = base64.b64decode(body.strip(), validate=True)
            del headers[ENCODING]
    return Delivery(
        id=message.get("MessageId") or "",
        topic=topic,
        # only a FIFO queue keeps an order of them
        group=about.get("MessageGroupId", "") if topic.endswith(".fifo") else "",
        body=body,
        headers=headers,
        at=_number(about.get("SentTimestamp")) / 1000,
        attempt=max(1, int(_number(about.get("ApproximateReceiveCount")))),
        token=message.get("ReceiptHandle"),
    )


def _number(text: str | None) -> float:
    try:
        number = float(text or 0)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) else 0.0


class Topic:
    """A queue, as `triggers.source.Topic` promises. A FIFO queue knows what is told twice."""

    def __init__(self, spec: SqsTopic, secret: str = "", call_s: float = CALL_S_MAX) -> None:
        self._spec, self._link = spec, _Link(spec, secret, call_s)

    async def open(self) -> None:
        """See `triggers.source.Topic`."""
        await self._link.open()

    async def close(self) -> None:
        """See `triggers.source.Topic`."""
        await self._link.close()

    async def tell(self, id_: str, body: bytes) -> None:
        """See `triggers.source.Topic`."""
        attributes = {"content-type": {"DataType": "String", "StringValue": EVENT_TYPE}}
        text = _plain(body)
        if text is None:
            text = base64.b64encode(body).decode() or EMPTY
            attributes[ENCODING] = {"DataType": "String", "StringValue": "base64"}
        more: dict[str, Any] = {}
        if self._spec.queue.endswith(".fifo"):
            is_fit = DEDUPLICATION.fullmatch(id_)
            once = id_ if is_fit else hashlib.sha256(id_.encode(errors="replace")).hexdigest()
            more = {"MessageGroupId": self._spec.group, "MessageDeduplicationId": once}
        await self._link.call(
            "send_message", MessageBody=text, MessageAttributes=attributes, **more
        )


def _plain(body: bytes) -> str | None:
    """*body* as text that XML allows; None when it is not that."""
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return None
    return text if text and not NOT_XML.search(text) else None
