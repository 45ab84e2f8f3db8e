"""Telling a destination outside what became of an event: a signed POST, or a broker's topic.

It runs as an event of the durable queue: what could not be told is tried again for three days, and
is a dead letter then. Whoever is told may be told twice, and knows it by the event's id.
"""

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Final, cast

import aiohttp
from standardwebhooks.webhooks import EmptyWebhookSecretError, Webhook

from dayfly_gateway.cloudevents import STRUCTURED
from dayfly_gateway.triggers.source import SourceFailed, Topic
from dayfly_gateway.triggers.triggers import adapter
from dayfly_pool.errors import BadInput, PlatformError
from dayfly_pool.models import Destination, Failure, InvocationId, Outcome, Success, Timing
from dayfly_pool.store.secrets import Secrets

log = logging.getLogger("dayfly.destinations")
ANSWER_S_MAX: Final = 30.0
TOPICS_MAX: Final = 32
"""Connections to brokers that are kept for the next word."""

NOT_TOLD: Final = "NotTold"


class Teller:
    """Tells destinations outside. Use it inside `async with teller.running():`."""

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets
        self._session: aiohttp.ClientSession | None = None
        self._topics: OrderedDict[tuple[str, str], _Kept] = OrderedDict()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Teller"]:
        """Hold connections while the block runs."""
        try:
            yield self
        finally:
            if self._session is not None:
                await self._session.close()
            while self._topics:
                _, topic = self._topics.popitem()
                await topic.leave()

    async def __call__(
        self, destination: Destination, namespace: str, id_: InvocationId, body: bytes
    ) -> Outcome:
        """Tell it once; a `Failure` says why it does not know."""
        try:
            if destination.url is not None:
                return await self._post(destination, namespace, id_, body)
            return await self._publish(destination, namespace, id_, body)
        except PlatformError as error:
            return Failure(NOT_TOLD, error.detail or str(error))

    async def _post(
        self, destination: Destination, namespace: str, id_: InvocationId, body: bytes
    ) -> Outcome:
        url = destination.url
        assert url is not None
        headers = {"Content-Type": STRUCTURED, "User-Agent": "Dayfly"}
        headers |= await self._signed(destination, namespace, id_, body)
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=ANSWER_S_MAX),
                auto_decompress=False,
                connector=aiohttp.TCPConnector(limit=0),  # the queue has one
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        try:
            async with self._session.post(
                url, data=body, headers=headers, allow_redirects=False
            ) as answer:
                if 200 <= answer.status < 300:
                    return Success(b"", Timing())
                return Failure(NOT_TOLD, f"{url} answered with status {answer.status}")
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            return Failure(NOT_TOLD, f"{url}: {error or type(error).__name__}"[:1000])

    async def _signed(
        self, destination: Destination, namespace: str, id_: InvocationId, body: bytes
    ) -> dict[str, str]:
        """The headers of https://www.standardwebhooks.com; no signature without a secret."""
        now = datetime.now(UTC)
        headers = {"webhook-id": id_, "webhook-timestamp": str(int(now.timestamp()))}
        if destination.secret is None:
            return headers
        secret = await asyncio.to_thread(self._secrets.get, namespace, destination.secret)
        signature = signer(secret).sign(msg_id=id_, timestamp=now, data=body.decode())
        return headers | {"webhook-signature": signature}

    async def _publish(
        self, destination: Destination, namespace: str, id_: InvocationId, body: bytes
    ) -> Outcome:
        declared = getattr(destination, destination.kind)
        secret = ""
        if declared.secret is not None:
            secret = await asyncio.to_thread(self._secrets.get, namespace, declared.secret)
        key = repr(declared), secret
        topic = self._topics.get(key)
        if topic is None:
            made = adapter(destination.kind).Topic(declared, secret)
            topic = self._topics[key] = _Kept(cast("Topic", made))
        self._topics.move_to_end(key)
        try:
            await topic.tell(id_, body)
        except SourceFailed:
            if self._topics.get(key) is topic:
                del self._topics[key]
            await topic.leave()
            raise
        finally:
            while len(self._topics) > TOPICS_MAX:
                _, oldest = self._topics.popitem(last=False)
                await oldest.leave()
        return Success(b"", Timing())


class _Kept:
    """A topic that is opened by whoever needs it first, and closed when it is left by all."""

    def __init__(self, topic: Topic) -> None:
        self._topic, self._turn = topic, asyncio.Lock()
        self._is_open = self._is_left = False
        self._users = 0
        self._failure = ""
        """Why it could not be opened."""

    async def tell(self, id_: str, body: bytes) -> None:
        """Raises `SourceFailed`."""
        self._users += 1
        try:
            async with self._turn:
                await self._open()  # once
            await self._topic.tell(id_, body)
        finally:
            self._users -= 1
            await self._close_if_left()

    async def leave(self) -> None:
        """Nobody begins to tell it anything any more; who does may end."""
        self._is_left = True
        await self._close_if_left()

    async def _open(self) -> None:
        if self._failure:  # of whoever had the turn before us
            raise SourceFailed(self._failure)
        if not self._is_open:
            try:
                await self._topic.open()
            except SourceFailed as error:
                self._failure = error.detail
                raise
            self._is_open = True

    async def _close_if_left(self) -> None:
        if self._is_left and not self._users:
            await self._topic.close()


def signer(secret: str) -> Webhook:
    """Signs and checks with *secret*: `whsec_` and base64, else the text itself.

    Raises `BadInput` for base64 of nothing.
    """
    if secret.startswith("whsec_"):
        with contextlib.suppress(ValueError):  # not base64 after all
            try:
                return Webhook(secret)
            except EmptyWebhookSecretError:
                raise BadInput("the secret holds no key, only whsec_: put another") from None
    return Webhook(secret.encode())
