"""What is accepted to be run later, and what is told of it when it is over.

The queue keeps events and decides when they run; here it is said what running one means: a
function on the pool, or the word to a destination outside.
"""

import base64
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from dayfly_pool.config import Config
from dayfly_pool.errors import FunctionNotFound, NotReadyHere, Refused, TooManyHops
from dayfly_pool.ids import new_id
from dayfly_pool.models import (
    Destination,
    Failure,
    FunctionId,
    Invocation,
    InvocationId,
    Outcome,
    Retry,
    Success,
    function_id,
)
from dayfly_pool.pool import Pool
from dayfly_pool.queue import Queue, Work
from dayfly_pool.store.declarations import StoredFunction
from dayfly_pool.store.events import Accepted, Ended, Event, Key, Lease, State
from dayfly_pool.stores import events_of

HOPS_MAX: Final = 8
HOPS: Final = "dayflyhops"
"""The attribute of a CloudEvent that says how many destinations it has gone through."""

CONDITIONS: Final = {"Expired": "EventAgeExceeded"}
"""Why an event is dead, where Lambda has a word of its own for it."""

TELL_AT_ONCE: Final = 16
TELL_RETRY: Final = Retry(
    attempts=100, backoff_seconds=1, backoff_max_seconds=3600, max_age_seconds=3 * 86400
)
"""How a destination outside is told. Its word is dead, and can be redriven, after three days."""

Tell = Callable[[Destination, str, InvocationId, bytes], Awaitable[Outcome]]
"""Tells a destination outside: (it, its namespace, the id of the word, a CloudEvent in JSON)."""


async def nobody(
    destination: Destination, namespace: str, id_: InvocationId, body: bytes
) -> Outcome:
    """For a service without a way out."""
    return Failure("NotTold", "this server tells nobody outside")


class EventMeta(msgspec.Struct, frozen=True, array_like=True):
    """What is kept of an event beside its body: see `Invocation`."""

    http: dict[str, Any] | None
    trace: str = ""
    hops: int = 0
    """Destinations that it went through."""

    refused: str = ""
    """Why it must not be run; it is kept to be looked at."""

    items: tuple[str, ...] = ()
    """Its body is a list of as many CloudEvents: the key that each of them is known by."""


class ItemFailure(msgspec.Struct, rename="camel"):
    """One event of a batch that is to be tried again: AWS Lambda's `batchItemFailures`."""

    item_identifier: str


class BatchAnswer(msgspec.Struct, rename="camel"):
    """What a function that is given batches may answer. With nothing of it, all went well."""

    batch_item_failures: list[ItemFailure] | None = None


class Item(msgspec.Struct):
    """Of a CloudEvent, what it is told by."""

    id: str


def rfc3339(at: float, timespec: str = "milliseconds") -> str:
    """A Unix time as events tell it."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec=timespec).replace("+00:00", "Z")


def report(lease: Lease, ended: Ended, version: str) -> bytes:
    """What a destination is told, in the words of AWS Lambda's destinations."""
    is_success = ended.state is State.SUCCEEDED
    failure = ended.attempt
    kind = failure.kind if failure is not None else ""
    condition = "Success" if is_success else CONDITIONS.get(kind, "RetriesExhausted")
    told: dict[str, Any] = {
        "version": "1.0",
        "timestamp": rfc3339(ended.at),
        "requestContext": {
            "requestId": lease.id,
            "function": lease.function,
            "functionVersion": version,
            "condition": condition,
            "approximateInvokeCount": lease.attempts + ended.is_counted,
        },
        "requestPayload": payload(lease.body),
    }
    if is_success:
        status, _ = msgspec.msgpack.decode(ended.result, type=tuple[int, list[list[str]]])
        told["responseContext"] = {"statusCode": status or 200}
        told["responsePayload"] = payload(ended.body)
    elif failure is not None:
        told["responseContext"] = {"functionError": kind}
        told["responsePayload"] = {"errorType": kind, "errorMessage": failure.message}
    return msgspec.json.encode(told)


def payload(body: bytes) -> Any:
    """As JSON if it is that, else as text, else in base64."""
    try:
        msgspec.json.decode(body)
        return msgspec.Raw(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass  # or it is nested deeper than anybody reads
    try:
        return body.decode()
    except UnicodeDecodeError:
        return {"body": base64.b64encode(body).decode(), "isBase64Encoded": True}


def word(id_: InvocationId, lease: Lease, ended: Ended, told: bytes, hops: int) -> bytes:
    """The report *told* as the CloudEvent that a destination outside is given.

    It says how many *hops* there were: so that a circle through the outside ends as well.
    """
    is_success = ended.state is State.SUCCEEDED
    return msgspec.json.encode(
        {
            "specversion": "1.0",
            "id": id_,
            "source": f"/functions/{lease.function}",
            "type": f"dev.dayfly.event.{'succeeded' if is_success else 'dead'}",
            "subject": lease.id,
            HOPS: str(hops),
            "time": rfc3339(ended.at),
            "datacontenttype": "application/json",
            "data": msgspec.Raw(told),
        }
    )


def failures(batch: bytes, answer: bytes) -> list[int]:
    """Which events of a *batch* its *answer* says have failed, in order; all for an odd answer.

    As AWS Lambda reads it: https://docs.aws.amazon.com/lambda/latest/dg/services-sqs-errorhandling.html
    """
    ids = [item.id for item in msgspec.json.decode(batch, type=list[Item])]
    try:
        told = msgspec.json.decode(answer, type=BatchAnswer)
    except (msgspec.ValidationError, RecursionError):
        return list(range(len(ids))) if b"batchItemFailures" in answer else []
    except (msgspec.DecodeError, UnicodeDecodeError):
        return []  # it answered something else: all went well
    named = {failure.item_identifier for failure in told.batch_item_failures or ()}
    if not named <= set(ids):
        return list(range(len(ids)))
    return [at for at, id_ in enumerate(ids) if id_ in named]


def checked(batch: bytes, outcome: Success) -> Outcome:
    """A batch of which everything has failed is a failure."""
    failed = failures(batch, outcome.body)
    if failed and len(failed) == len(msgspec.json.decode(batch, type=list[msgspec.Raw])):
        why = f"all {len(failed)} events of the batch, or the answer names one that is not in it"
        return Failure("BatchItemFailures", why, "", outcome.timing)
    return outcome


def told_id(function: FunctionId, is_success: bool) -> FunctionId:
    """Under which name the words to a function's destination outside wait."""
    return FunctionId(f"{function}@{'success' if is_success else 'failure'}")


class Events:
    """The durable queue of one server, and what its events do. *functions* is the service's own."""

    def __init__(
        self,
        config: Config,
        pool: Pool,
        functions: Mapping[FunctionId, StoredFunction],
        tell: Tell = nobody,
    ) -> None:
        self._queue_s_max = config.queue_s_max
        self._pool, self._functions, self._tell = pool, functions, tell
        self.queue = Queue(
            events_of(config),
            self._run,
            self.work_of,
            follow=self._follow,
            owner=secrets.token_hex(8),
            is_alone=not config.events_dsn,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Events"]:
        """Accept and run while the block runs."""
        async with self.queue.running():
            yield self

    async def accept(
        self,
        invocation: Invocation,
        key: tuple[str, str] | None = None,
        *,
        priority: int = 0,
        key_s: float | None = None,
        items: Sequence[str] = (),
        refused: str = "",
        hops: int = 0,
    ) -> Accepted:
        """Keep *invocation* and run it later; it is on the disk when this returns.

        *key* is an idempotency key and the fingerprint of what it came with, known for *key_s*. A
        body that is a list of CloudEvents has a key for each of them (*items*): one that the answer
        names is tried again. What is *refused*, and why, is dead at once, and so is what has gone
        through too many destinations (*hops*). Raises `FunctionNotFound`, `QueueFull`,
        `StoreFailed`.
        """
        work = self.work_of(invocation.function)
        if work is None:
            if why := self._pool.unready.get(invocation.function):
                raise NotReadyHere(why)
            raise FunctionNotFound(f"no function {invocation.function!r}")
        now = self.queue.clock.now()
        until = now + (key_s or self.queue.keep.keys_s)
        meta = EventMeta(invocation.http, invocation.trace, hops, refused, tuple(items))
        event = Event(
            id=invocation.id,
            function=invocation.function,
            meta=msgspec.msgpack.encode(meta),
            body=invocation.body,
            accepted_at=now,
            age_s=work.retry.max_age_seconds,
            priority=priority,
            key=Key(*key, until) if key else None,
            known_as=tuple(Key(text, "", until) for text in items),
        )
        return await self.queue.accept(event)

    def forget(self, function: FunctionId) -> None:
        """It is gone: what waits for it will be dead."""
        for id_ in (function, told_id(function, True), told_id(function, False)):
            self.queue.forget(id_)

    # ---- for the queue ------------------------------------------------------------------------

    def _outside(self, id_: FunctionId) -> Destination | None:
        """The destination whose words wait as *id_*, if there is such a one."""
        name, at, which = id_.partition("@")
        stored = self._functions.get(FunctionId(name)) if at else None
        if stored is None:
            return None
        found = stored.spec.on_success if which == "success" else stored.spec.on_failure
        return found if found is not None and found.is_outside else None

    def work_of(self, id_: FunctionId) -> Work | None:
        """How its events are run; None if there is no such function or destination."""
        stored = self._functions.get(id_)
        if stored is None:
            # who is silent holds up no function
            return Work(TELL_AT_ONCE, TELL_RETRY, "outside") if self._outside(id_) else None
        if id_ not in self._pool.state.functions:
            return None  # it is being deployed: nothing can be run yet
        return Work(stored.spec.max_scale * stored.spec.concurrency, stored.spec.retry)

    async def _run(self, lease: Lease) -> Outcome:
        """Run a leased event once. Raises `PlatformError`."""
        meta = msgspec.msgpack.decode(lease.meta, type=EventMeta)
        if meta.refused:
            raise Refused(meta.refused)
        if meta.hops > HOPS_MAX:
            raise TooManyHops(f"{meta.hops} hops, the last to {lease.function}")
        if (outside := self._outside(lease.function)) is not None:
            return await self._tell(outside, lease.function.partition("/")[0], lease.id, lease.body)
        invocation = Invocation(
            lease.id, lease.function, lease.body, meta.http, meta.trace, self._queue_s_max
        )
        outcome = await self._pool.invoke(invocation)
        if meta.items and isinstance(outcome, Success):
            return checked(lease.body, outcome)
        return outcome

    def _follow(self, lease: Lease, ended: Ended) -> tuple[Event, ...]:
        """What is left of a batch, and what the destination of its function is told."""
        stored = self._functions.get(lease.function)
        meta = msgspec.msgpack.decode(lease.meta, type=EventMeta)
        told = self._told(lease, ended, meta, stored) if stored is not None else ()
        age_s = (stored.spec.retry if stored is not None else Retry()).max_age_seconds
        return (*self._left(lease, ended, meta, age_s), *told)

    def _left(self, lease: Lease, ended: Ended, meta: EventMeta, age_s: float) -> tuple[Event, ...]:
        """Those of a batch that failed while others did not: a batch of their own.

        Also when the function is gone: then they are dead, and can be redriven.
        """
        failed = failures(lease.body, ended.body) if meta.items and ended.body else []
        if ended.state is not State.SUCCEEDED or not failed:
            return ()
        raw = msgspec.json.decode(lease.body, type=list[msgspec.Raw])
        now = self.queue.clock.now()
        until = now + age_s + self.queue.keep.keys_s
        keys = tuple(meta.items[at] for at in failed)
        left = EventMeta(None, meta.trace, meta.hops, "", keys)
        return (
            Event(
                id=new_id(),
                function=lease.function,
                meta=msgspec.msgpack.encode(left),
                body=msgspec.json.encode([raw[at] for at in failed]),
                accepted_at=now,
                age_s=age_s,
                known_as=tuple(Key(text, "", until) for text in keys),
            ),
        )

    def _told(
        self, lease: Lease, ended: Ended, meta: EventMeta, stored: StoredFunction
    ) -> tuple[Event, ...]:
        is_success = ended.state is State.SUCCEEDED
        where = stored.spec.on_success if is_success else stored.spec.on_failure
        if where is None:
            return ()
        id_, now = new_id(), self.queue.clock.now()
        body = report(lease, ended, str(stored.version))
        if where.is_outside:
            function = told_id(lease.function, is_success)
            body = word(id_, lease, ended, body, meta.hops + 1)
            age_s = TELL_RETRY.max_age_seconds
        else:
            assert where.function is not None
            function = function_id(lease.function.partition("/")[0], where.function)
            age_s = stored.spec.retry.max_age_seconds
        following = EventMeta(None, meta.trace, meta.hops + 1)
        return (
            Event(
                id=id_,
                function=function,
                meta=msgspec.msgpack.encode(following),
                body=body,
                accepted_at=now,
                age_s=age_s,
            ),
        )
