"""From a source into the queue, and the word back to the source when the event is over.

A message is acknowledged when its event has ended: its function succeeded, or it lies among our
dead letters, or it was cancelled. Until then both have it, the source and the queue, and it is
known by a key: if the source gives it out again (we were killed, or lost the connection), it is the
event that it was, and does not run again.

No more is fetched than the function has room for: what is over waits at the source.
"""

import asyncio
import hashlib
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Final, NamedTuple, TypeVar

from msgspec import Struct

from dayfly.protocol import BODY_BYTES_MAX
from dayfly_gateway import cloudevents
from dayfly_gateway.cloudevents import BadCloudEvent
from dayfly_gateway.triggers.filters import Filter, FilterFailed
from dayfly_gateway.triggers.source import Delivery, Source, SourceFailed
from dayfly_pool import retry
from dayfly_pool.errors import PlatformError
from dayfly_pool.events import Events
from dayfly_pool.ids import new_id
from dayfly_pool.models import Invocation, InvocationId, function_id
from dayfly_pool.store.declarations import StoredTrigger

log = logging.getLogger("dayfly.triggers")
T = TypeVar("T")
FETCH_S: Final = 5.0
"""How long a fetch waits for the first message."""

FETCH_MAX: Final = 256
HELD_MAX: Final = 1000
"""Messages of one trigger that are fetched and not acknowledged, those in a backoff too."""

HELD_BYTES_MAX: Final = 64 * 1024 * 1024
USUAL_BYTES: Final = 1024 * 1024
"""How long a message is taken to be, before one has come."""

LOOK_S: Final = 0.25
"""How soon it is seen that a function has room again, if nothing of ours has ended."""

KEY_S: Final = 86400.0
"""For how long a message is known after its event may live."""

KEPT_KEY_S: Final = 10 * 365 * 86400.0
"""For how long files that stay where they are are known."""

LAG_S: Final = 5.0
LEAVE_S: Final = 2.0
"""For giving back what is not needed any more."""

OVER_S: Final = 60.0
EXTEND_AT_ONCE: Final = 16
REOPEN_FIRST_S, REOPEN_MAX_S = 0.25, 30.0
"""Between an error of the source and the next try."""


class Counts(Struct):
    """What a trigger has done since this server started."""

    fetched: int = 0
    acknowledged: int = 0
    known: int = 0
    """Messages that had been given out before, and were not run again for it."""

    filtered: int = 0
    filter_errors: int = 0
    refused: int = 0
    """Messages that could be given to no function; they are dead letters."""

    failures: int = 0
    """Of the source."""


class Item(NamedTuple):
    """A message as an event. *key* is what it is known by, *refused* why it must not be run."""

    delivery: Delivery
    body: bytes
    key: str
    trace: str = ""
    hops: int = 0
    refused: str = ""


class _Lane(Struct):
    """What waits for its turn: all of one group, or of a trigger that wants batches."""

    items: deque[Item]
    is_full: asyncio.Event


def room(places: int, busy: int, coming: int, held: int, held_bytes: int, usual: float) -> int:
    """How many more messages to fetch. Pure.

    *places* is how many events of the function run at once, *busy* how many of its events wait or
    run, *coming* how many of ours are on their way to the queue, *held* all that are ours, and
    *usual* how many bytes a message has.
    """
    fitting = (HELD_BYTES_MAX - held_bytes) / max(usual, 1.0)
    if not held and places > busy:
        fitting = max(fitting, 1.0)  # one, whatever its size
    return max(0, min(places - busy - coming, HELD_MAX - held, FETCH_MAX, int(fitting)))


def _heed() -> None:
    """Raise the cancellation that whom we awaited took for an answer, or for an error."""
    if (task := asyncio.current_task()) is not None and task.cancelling():
        raise asyncio.CancelledError


class Pump:
    """One trigger. *make* gives a new, closed source."""

    def __init__(self, trigger: StoredTrigger, events: Events, make: Callable[[], Source]) -> None:
        self.trigger, self.counts = trigger, Counts()
        self.is_up, self.lag = False, None  # type: bool, int | None
        self._failure = self._obstacle = ""
        """What is wrong with the source, and why nothing can be taken from it."""

        self._failures = 0
        """Of the source, since it gave something out."""

        self._events, self._make = events, make
        self._name = f"{trigger.namespace}/{trigger.name}"
        self._function = function_id(trigger.namespace, trigger.spec.function)
        self._filter: Filter
        self._usual = float(USUAL_BYTES)
        self._forget()

    def _forget(self) -> None:
        """Nothing is held: the source gives it out again."""
        self._held: dict[int, Delivery] = {}
        self._coming: dict[int, Delivery] = {}
        """Those of them that are not in the queue yet."""

        self._bytes = 0
        self._lanes: dict[str, _Lane] = {}
        self._freed = asyncio.Event()

    async def run(self) -> None:
        """For ever; what goes wrong is told in `error`, and tried again."""
        while True:
            try:
                self._filter = Filter(self.trigger.spec.filter)
                source = self._make()
                try:
                    await source.open()
                    log.info("a trigger listens", extra={"trigger": self._name})
                    self.is_up = True
                    await self._pump(source)
                finally:
                    self.is_up, self.lag, coming = False, None, self._coming
                    self._forget()
                    await self._leave(source, list(coming.values()))
            except Exception as error:  # whatever it is, this trigger goes on, and the others
                _heed()  # a task group prefers its errors
                self._note(error)
            self._failures += 1
            self.counts.failures += 1
            draw = 0.5 + random.random() / 2
            wait_s = retry.backoff_s(REOPEN_FIRST_S, REOPEN_MAX_S, self._failures, draw)
            await asyncio.sleep(wait_s)

    @property
    def held(self) -> int:
        """How many messages we have that the source does not know to be done with."""
        return len(self._held)

    @property
    def error(self) -> str:
        """Why nothing comes; empty when it does."""
        return self._failure or self._obstacle

    async def _leave(self, source: Source, coming: Sequence[Delivery]) -> None:
        """Give back what is not in the queue, so that nobody need wait for it, and disconnect."""
        try:
            async with asyncio.timeout(LEAVE_S):
                for delivery in coming:
                    await source.nak(delivery, 0.0)
        except (SourceFailed, TimeoutError):
            pass  # it comes again by itself
        await source.close()

    def _note(self, error: Exception) -> None:
        first: BaseException = error
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        why = first.detail or str(first) if isinstance(first, PlatformError) else repr(first)
        extra = {"trigger": self._name, "why": why}
        if not isinstance(first, PlatformError):
            log.error("a trigger failed", extra=extra, exc_info=first)
        elif why != self._failure:
            log.warning("a trigger cannot reach its source", extra=extra)
        self._failure = why

    async def _pump(self, source: Source) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._measure(source), name="lag")
            if source.extend_s is not None:
                tasks.create_task(self._extend(source, source.extend_s), name="extend")
            while True:
                _heed()
                most = self._room()
                if most:
                    found = await source.fetch(most, FETCH_S)
                    _heed()
                    self._failure, self._failures = "", 0
                    for delivery in found:
                        self._take(source, tasks, delivery)
                    continue
                self._freed.clear()
                try:
                    async with asyncio.timeout(LOOK_S):
                        await self._freed.wait()
                except TimeoutError:
                    pass

    def _room(self) -> int:
        work, queue = self._events.work_of(self._function), self._events.queue
        if work is None:
            self._obstacle = f"no function {self._function!r}: deploy it"
            return 0
        if queue.failure:
            self._obstacle = queue.failure
            return 0
        self._obstacle = ""
        busy = queue.running_now[self._function] + queue.waiting[self._function]
        batch = self.trigger.spec.batch
        size = batch.size if batch is not None else 1  # a batch has one place
        held = len(self._held)
        return room(
            work.places * size, busy * size, len(self._coming), held, self._bytes, self._usual
        )

    # ---- one message --------------------------------------------------------------------------

    def _take(self, source: Source, tasks: asyncio.TaskGroup, delivery: Delivery) -> None:
        self.counts.fetched += 1
        self._held[id(delivery)] = delivery
        self._bytes += len(delivery.body)
        self._usual += (len(delivery.body) - self._usual) / 8
        item = self._item(delivery)
        if item is None:
            tasks.create_task(self._done(source, [delivery]))
            return
        self._coming[id(delivery)] = delivery
        spec = self.trigger.spec
        if item.refused or not (spec.ordered or spec.batch):
            tasks.create_task(self._carry(source, [item]))
            return
        group = delivery.group if spec.ordered else ""
        lane = self._lanes.get(group)
        if lane is None:
            lane = self._lanes[group] = _Lane(deque(), asyncio.Event())
            tasks.create_task(self._drive(source, tasks, group, lane))
        lane.items.append(item)
        if spec.batch is None or len(lane.items) >= spec.batch.size:
            lane.is_full.set()

    def _item(self, delivery: Delivery) -> Item | None:
        """The message as an event; None for one that the filter does not mean."""
        key = self._key(delivery)
        if delivery.unread:
            why = f"{delivery.unread} bytes, limit {BODY_BYTES_MAX}: it was left where it was"
            return Item(delivery, delivery.body, key, refused=why)
        try:
            return self._event(delivery, key)
        except BadCloudEvent as error:
            return Item(delivery, delivery.body, key, refused=f"no CloudEvent: {error.detail}")
        except Exception as error:  # or it would come again for ever, and those behind it never
            extra = {"trigger": self._name, "source_id": delivery.id}
            log.exception("a message is dead for a defect of ours", extra=extra)
            why = f"a defect of ours, {type(error).__name__}: the log has the cause"
            return Item(delivery, delivery.body, key, refused=why)

    def _key(self, delivery: Delivery) -> str:
        """By what it is known. Of an id only its digest: who publishes may choose what it holds."""
        if not delivery.id:
            return f"trigger {self._name} once {new_id()}"  # for us: its batch, and a second try
        digest = hashlib.blake2b(digest_size=16)
        digest.update(f"{len(delivery.id)} {delivery.id} ".encode(errors="surrogatepass"))
        digest.update(delivery.body)
        return f"trigger {self._name} message {digest.hexdigest()}"

    def _event(self, delivery: Delivery, key: str) -> Item | None:
        """The same. Raises `BadCloudEvent`."""
        event = cloudevents.of_delivery(delivery, self.trigger.spec.source, self._name)
        body = cloudevents.encode(event)
        try:
            if not self._filter.matches(event, len(body)):
                self.counts.filtered += 1
                return None
        except FilterFailed as error:
            self.counts.filter_errors += 1
            extra = {"trigger": self._name, "source_id": delivery.id, "why": str(error)}
            log.debug("a filter has no value for an event", extra=extra)
            return None
        if len(body) + 2 > BODY_BYTES_MAX:  # a batch of one has brackets
            why = f"{len(body)} bytes as a CloudEvent, limit {BODY_BYTES_MAX}"
            return Item(delivery, delivery.body, key, refused=why)
        trace = str(event.get("traceparent", ""))[:128]
        return Item(delivery, body, key, trace, cloudevents.hops(event))

    async def _drive(
        self, source: Source, tasks: asyncio.TaskGroup, group: str, lane: _Lane
    ) -> None:
        """Give out what is in a lane: one after the other where there is an order."""
        spec = self.trigger.spec
        size = spec.batch.size if spec.batch else 1
        while lane.items:
            if spec.batch and len(lane.items) < size:
                lane.is_full.clear()
                try:
                    async with asyncio.timeout(spec.batch.window_seconds):
                        await lane.is_full.wait()
                except TimeoutError:
                    pass
            items = [lane.items.popleft()]
            length = len(items[0].body)
            while lane.items and len(items) < size:
                length += len(lane.items[0].body) + 1
                if length + 2 > BODY_BYTES_MAX:
                    break
                items.append(lane.items.popleft())
            if spec.ordered:
                await self._carry(source, items)
            else:
                tasks.create_task(self._carry(source, items))
        del self._lanes[group]

    async def _carry(self, source: Source, items: Sequence[Item]) -> None:
        """Have it accepted, wait until it is over, and tell the source."""
        is_batch = self.trigger.spec.batch is not None and not items[0].refused
        if not is_batch:
            await self._run_one(items[0])
            await self._done(source, [items[0].delivery])
            return
        ids = await self._accept_batch(items)
        left = list(items)
        while left:
            await self._over(ids[item.key] for item in left)
            # what failed of it goes on as another event
            keys = [item.key for item in left]
            known = partial(self._events.queue.known, self._function, keys)
            now = ids | await self._trying(known)
            done = [item for item in left if now[item.key] == ids[item.key]]
            await self._done(source, [item.delivery for item in done])
            left, ids = [item for item in left if now[item.key] != ids[item.key]], now

    async def _run_one(self, item: Item) -> None:
        """Have it accepted, and wait until it is over."""
        if item.refused:
            self.counts.refused += 1
        new = new_id()
        invocation = Invocation(new, self._function, item.body, None, item.trace)
        accept = partial(
            self._events.accept,
            invocation,
            priority=self.trigger.spec.priority,
            key=(item.key, "trigger"),
            key_s=self._key_s(stays=bool(item.delivery.unread)),
            refused=item.refused,
            hops=item.hops,
        )
        with self._events.queue.watching(new) as ended:
            accepted = await self._trying(accept)
            self.counts.known += not accepted.is_new
            self._coming.pop(id(item.delivery), None)
            if accepted.id == new:
                await asyncio.wait((ended,), timeout=OVER_S)
            if not ended.done():  # long, or another server's, or not new
                await self._over([accepted.id])

    async def _accept_batch(self, items: Sequence[Item]) -> dict[str, InvocationId]:
        """Which event each is part of: those that are known of theirs, the others of a new one."""
        id_ = new_id()
        found = await self._trying(lambda: self._accept_new(id_, items))
        self.counts.known += sum(known != id_ for known in found.values())
        for item in items:
            self._coming.pop(id(item.delivery), None)
        return found

    async def _accept_new(
        self, id_: InvocationId, items: Sequence[Item]
    ) -> dict[str, InvocationId]:
        """The same. Raises `PlatformError`; then nobody knows but who asks again."""
        known = await self._events.queue.known(self._function, [item.key for item in items])
        new = {item.key: item for item in items if item.key not in known}
        if new:
            body = b"[" + b",".join([item.body for item in new.values()]) + b"]"
            trace = next(iter(new.values())).trace
            invocation = Invocation(id_, self._function, body, None, trace)
            await self._events.accept(
                invocation,
                priority=self.trigger.spec.priority,
                items=list(new),
                key_s=self._key_s(),
                hops=max(item.hops for item in new.values()),
            )
        return known | dict.fromkeys(new, id_)

    def _key_s(self, *, stays: bool = False) -> float:
        """For how long what comes is known: while its event lives, it may come again."""
        folder, work = self.trigger.spec.folder, self._events.work_of(self._function)
        if stays or (folder is not None and folder.afterwards == "keep"):
            return KEPT_KEY_S
        return KEY_S + (work.retry.max_age_seconds if work is not None else 0.0)

    async def _trying(self, work: Callable[[], Awaitable[T]]) -> T:
        """The store may be away, or the function: then what we hold waits, and is extended."""
        while True:
            try:
                return await work()
            except PlatformError as error:
                self._obstacle = error.detail or str(error)
                await asyncio.sleep(LOOK_S)

    async def _over(self, ids: Iterable[InvocationId]) -> None:
        """Return when all of these events are over; one that nobody knows any more is."""
        for id_ in set(ids):
            while True:
                shown = await self._trying(partial(self._events.queue.get, id_, OVER_S))
                if shown is None or shown.state.is_over:
                    break

    async def _done(self, source: Source, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            await source.ack(delivery)
            self.counts.acknowledged += 1
            del self._held[id(delivery)]
            self._bytes -= len(delivery.body)
        self._freed.set()

    # ---- beside -------------------------------------------------------------------------------

    async def _extend(self, source: Source, every_s: float) -> None:
        """Keep what we hold. One that is lost is no harm: its event goes on, and is known."""
        while True:
            await asyncio.sleep(every_s)
            held = list(self._held.values())
            for at in range(0, len(held), EXTEND_AT_ONCE):
                some = held[at : at + EXTEND_AT_ONCE]
                still = [delivery for delivery in some if id(delivery) in self._held]
                await asyncio.gather(*(self._keep(source, delivery) for delivery in still))

    async def _keep(self, source: Source, delivery: Delivery) -> None:
        try:
            await source.extend(delivery)
        except SourceFailed:
            if id(delivery) in self._held:
                raise

    async def _measure(self, source: Source) -> None:
        while True:
            self.lag = await source.lag()
            await asyncio.sleep(LAG_S)
