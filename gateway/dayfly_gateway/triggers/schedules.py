"""Schedules that fire: each firing is one accepted event, whatever stops in between.

A firing has an idempotency key of its own, so that a server that dies between accepting it and
noting that makes no second one.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable
from typing import Any, Final

from msgspec import Struct

from dayfly_gateway.triggers import cron
from dayfly_pool.errors import BadInput, PlatformError
from dayfly_pool.events import rfc3339
from dayfly_pool.ids import new_id
from dayfly_pool.models import Cron, Invocation, InvocationId, TriggerManifest, function_id
from dayfly_pool.service import Service
from dayfly_pool.store.declarations import StoredTrigger

log = logging.getLogger("dayfly.triggers")
LOOK_S_MAX: Final = 1.0
"""The wall clock may jump: it is looked at again after this long at the latest."""

TOGETHER_MAX: Final = 100
"""So many triggers fire at once, each its own firings in turn: one that has a lot to make up for
holds up no other, and what many accept at one moment is written to the disk once."""

DEFECT_S: Final = 5.0
"""Before the next look after one that failed for a defect of ours, with a traceback."""

KEY_S: Final = 40 * 86400.0
EVENT_TYPE: Final = "dev.dayfly.cron"


class _Life(Struct):
    """What is known of a trigger since this server started."""

    trigger: StoredTrigger
    next_at: float | None = None
    """When it fires next; None when that is not known, or never."""

    is_known: bool = False
    paused_until: float = 0.0
    fired: int = 0
    left_out: int = 0
    skipped: int = 0
    error: str = ""


class Schedules:
    """Fires the declared triggers that *service* owns. *now* is the wall clock, in Unix seconds."""

    def __init__(self, service: Service, now: Callable[[], float] = time.time) -> None:
        self._service, self._now = service, now
        self._lives: dict[tuple[str, str], _Life] = {}
        self._looked_at = 0.0
        self._wake = asyncio.Event()

    async def declare(self, manifest: TriggerManifest) -> StoredTrigger:
        """Add or change a trigger; it counts from now on. Raises `BadInput`, `FunctionNotFound`."""
        if manifest.spec.cron is not None:
            cron.checked(manifest.spec.cron)
        stored = await self._service.set_trigger(manifest, self._now())
        self._wake.set()
        return stored

    async def run(self) -> None:
        """Fire, for ever."""
        while True:
            try:
                next_at = await self.look()
            except Exception:
                log.exception("no trigger fires, for a defect of ours")
                await asyncio.sleep(DEFECT_S)
                continue
            wait_s = LOOK_S_MAX if next_at is None else next_at - self._now()
            self._wake.clear()
            try:
                async with asyncio.timeout(min(LOOK_S_MAX, max(0.0, wait_s))):
                    await self._wake.wait()
            except TimeoutError:
                pass

    def look_soon(self) -> None:
        """What is declared, or ours, may be something else."""
        self._wake.set()

    async def look(self) -> float | None:
        """Fire what is due; returns when the next one will be, None if there is none."""
        now = self._now()
        if now < self._looked_at:  # the clock went back: what was to come is not what it was
            for life in self._lives.values():
                life.is_known = False
        self._looked_at = now
        declared = {
            key: trigger
            for key, trigger in self._service.triggers.items()
            if self._service.owns(function_id(trigger.namespace, trigger.spec.function))
        }
        for key in self._lives.keys() - declared.keys():
            del self._lives[key]
        due = [found for each in declared.values() if (found := self._due(each, now))]
        for start in range(0, len(due), TOGETHER_MAX):
            some = due[start : start + TOGETHER_MAX]
            await asyncio.gather(*(self._fire_due(life, now) for life in some))
        times = [life.next_at for life in self._lives.values() if life.next_at is not None]
        return min(times, default=None)

    def _due(self, trigger: StoredTrigger, now: float) -> _Life | None:
        """The trigger's life if it may fire *now*."""
        if trigger.spec.cron is None:
            return None
        life = self._lives.setdefault((trigger.namespace, trigger.name), _Life(trigger))
        if life.trigger is not trigger:
            life.trigger, life.is_known = trigger, False
        if trigger.spec.paused:
            life.paused_until, life.is_known, life.next_at = now, False, None
            return None
        is_early = life.is_known and (life.next_at is None or now < life.next_at)
        return None if is_early else life

    async def _fire_due(self, life: _Life, now: float) -> None:
        trigger, spec = life.trigger, life.trigger.spec.cron
        assert spec is not None, "it has no schedule"
        try:
            found = cron.firings(spec, max(trigger.seen, life.paused_until), now)
            last = trigger.last
            for at in found.due:
                last = await self._fire(life, spec, at, last)
            if found.due or found.left_out:
                life.left_out += found.left_out
                await self._service.note_seen(trigger, now, last)
                life.trigger = self._service.triggers.get(
                    (trigger.namespace, trigger.name), trigger
                )
            life.next_at, life.is_known, life.error = found.next_at, True, ""
        except Exception as error:  # of this one: the others go on
            _say(life, error)
            life.next_at, life.is_known = now + LOOK_S_MAX, False

    async def _fire(self, life: _Life, spec: Cron, at: float, last: InvocationId) -> InvocationId:
        """Have the event of the firing *at* accepted; returns the last event's id."""
        trigger, service = life.trigger, self._service
        if spec.overlap == "skip" and last:
            before = await service.events.queue.get(last)
            if before is not None and not before.state.is_over:
                life.skipped += 1
                return last
        name = f"{trigger.namespace}/{trigger.name}"
        id_ = new_id()
        function = function_id(trigger.namespace, trigger.spec.function)
        event = cloud_event(id_, name, at, trigger.spec.data)
        accepted = await service.events.accept(
            Invocation(id_, function, event),
            priority=trigger.spec.priority,
            key=(f"trigger {name} {at:.0f}", "cron"),
            key_s=KEY_S,
        )
        life.fired += accepted.is_new
        return accepted.id

    def status(self, trigger: StoredTrigger) -> dict[str, Any]:
        """What is known of a trigger that fires."""
        life = self._lives.get((trigger.namespace, trigger.name), _Life(trigger))
        status: dict[str, Any] = {
            "fired": life.fired,
            "leftOut": life.left_out,
            "skipped": life.skipped,
            "lastError": life.error,
            "lastEvent": trigger.last,
        }
        if trigger.spec.cron is not None and not trigger.spec.paused:
            now = self._now()
            with contextlib.suppress(BadInput):  # it is told with the next look
                next_at = life.next_at or cron.firings(trigger.spec.cron, now, now).next_at
                if next_at is not None:
                    status["next"] = rfc3339(next_at, "seconds")
        return status


def _say(life: _Life, error: Exception) -> None:
    """Note why a trigger cannot fire, and log it when it was not known: it is tried every second.

    The text of what is no `PlatformError` is the log's alone.
    """
    is_ours = not isinstance(error, PlatformError)
    why = f"a defect of ours: {type(error).__name__}" if is_ours else str(error)
    if not life.error or (is_ours and life.error != why):
        who = {"trigger": f"{life.trigger.namespace}/{life.trigger.name}", "why": why}
        level = logging.ERROR if is_ours else logging.WARNING
        log.log(level, "a trigger cannot fire", extra=who, exc_info=error if is_ours else None)
    life.error = why


def cloud_event(id_: str, trigger: str, at: float, data: Any) -> bytes:
    """The firing *at* as a CloudEvent 1.0, in JSON."""
    told = {
        "specversion": "1.0",
        "id": id_,
        "source": f"/triggers/{trigger}",
        "type": EVENT_TYPE,
        "time": rfc3339(at, "seconds"),
        "datacontenttype": "application/json",
        "data": data,
    }
    return json.dumps(told).encode()
