"""What asks a broker for events promises, and what tells it one.

Each adapter is thin: it holds a connection of the broker's own client, and no event but those that
it has given out. `tests/contract/test_sources.py` holds every one of them to this, against the
real broker.
"""

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, Final, Protocol, TypeVar

from msgspec import Struct

from dayfly_pool.errors import PlatformError

T = TypeVar("T")
LEASE_S: Final = 30.0
"""What has been fetched is given to somebody else after this, unless it is extended."""

CALL_S_MAX: Final = 10.0
"""No call of an adapter waits longer for its broker, a fetch besides what it may wait."""

EVENT_TYPE: Final = "application/cloudevents+json"
"""The media type of what is told to a topic, where the broker has such a thing."""


class SourceFailed(PlatformError):
    """The broker is not there, or refuses us.

    It is tried again by and by. `dayfly trigger list` shows the last error.
    """

    status = 503
    retryable = True


async def while_there(work: Coroutine[Any, Any, T], *ends: asyncio.Future[Any]) -> T:
    """Await *work* until one of *ends* is done: then `ConnectionError`, and *work* is cancelled."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((task, *ends), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ConnectionError("the connection is lost")
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait((task,), timeout=1.0)
        if task.done() and not task.cancelled():
            task.exception()  # some clients turn being cancelled into an error


class Delivery(Struct, frozen=True, kw_only=True):
    """One message, ours until it is acknowledged or given back.

    *id* is the same each time the message is given out, and no other message's ever, or empty when
    the broker has no such thing. *topic* is where it was published, *at* when (Unix seconds; 0 when
    unknown). *headers* have lower-case names. Messages of the same *group* have an order, if the
    broker keeps one. *attempt* counts from 1. *token* is the adapter's own. *unread* is how long
    a body is that was too long to be read: *body* is empty, and the broker's is never deleted.
    """

    id: str
    topic: str
    body: bytes
    headers: Mapping[str, str] = {}
    at: float = 0.0
    group: str = ""
    attempt: int = 1
    unread: int = 0
    token: Any = None


class Source(Protocol):
    """A broker as it is asked: `Source(spec, name, secret, lease_s, call_s)`.

    What it makes at the broker is called after *name*. Every method may raise `SourceFailed`; then
    it is closed and left. What it had given out and was not acknowledged comes again: to the next
    that is opened, or to whoever shares the queue, group or consumer. None of the methods waits for
    ever, and `fetch` may be cancelled without loss.
    """

    extend_s: float | None
    """How often what is under way must be extended; None when that is not needed."""

    async def open(self) -> None:
        """Connect, and make what is missing and may be made."""

    async def close(self) -> None:
        """Disconnect. Closing twice is harmless; it does not raise."""

    async def fetch(self, most: int, wait_s: float) -> list[Delivery]:
        """At most *most* messages: what is there, or the first that come within *wait_s*."""

    async def ack(self, delivery: Delivery) -> None:
        """It is done with; it does not come again."""

    async def nak(self, delivery: Delivery, delay_s: float) -> None:
        """Give it back. It comes again after *delay_s*, or at once where the broker cannot wait."""

    async def extend(self, delivery: Delivery) -> None:
        """It is still under way: keep it for us."""

    async def lag(self) -> int | None:
        """How many messages wait that nobody was given; None where nobody knows."""


class Topic(Protocol):
    """Where an event is told: `Topic(spec, secret, call_s)`.

    Every method may raise `SourceFailed`; then it is closed and left.
    """

    async def open(self) -> None:
        """Connect."""

    async def close(self) -> None:
        """Disconnect. Closing twice is harmless; it does not raise."""

    async def tell(self, id_: str, body: bytes) -> None:
        """Publish *body*, a CloudEvent in JSON; the broker has it when this returns.

        The broker may use *id_* to know it again when it is told twice.
        """
