"""Who is there, and who leads: leases that are renewed, judged by the watcher's own clock.

Nobody compares wall clocks. A holder is gone when its lease has not changed for as long as it is
good for, while whoever judges could see the changes of others.

`kubernetes.aio.leaderelection` is not used: it goes by the wall clock, a renewal may outlast the
lease, its leader is a task without a parent, and there is no number of the term to fence with.
"""

import asyncio
import contextlib
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from dayfly_pool.cluster.api import LEASE, Api, ApiError, Conflict, Exists, NotFound
from dayfly_pool.cluster.reflector import Change, Reflector
from dayfly_pool.errors import NameTaken

log = logging.getLogger("dayfly.cluster")

ROLE: Final = "dayfly.dev/role"
LIFE: Final = "dayfly.dev/life"
SHARD: Final = "shard"

RENEW_S: Final = 3.0
DURATION_S: Final = 10
LOOK_S: Final = 0.5
LEADER_S: Final = 15
RETRY_S: Final = 2.0
RELEASE_S_MAX: Final = 2.0


class Member:
    """The lease of one that is there: *name*, and as its holder *address*, where it can be had.

    What else others should know is in *annotations*. The lease is deleted at the end.
    """

    def __init__(
        self,
        api: Api,
        name: str,
        address: str,
        *,
        role: str = SHARD,
        namespace: str = "",
        annotations: Mapping[str, str] | None = None,
        renew_s: float = RENEW_S,
        duration_s: int = DURATION_S,
    ) -> None:
        self._api, self._name, self._namespace = api, name, namespace
        self._renew_s = renew_s
        self._life = os.urandom(8).hex()
        self._metadata = {
            "name": name,
            "labels": {ROLE: role},
            "annotations": {**(annotations or {}), LIFE: self._life},
        }
        self._spec = {"holderIdentity": address, "leaseDurationSeconds": duration_s}
        self._version = self._uid = ""
        self._is_failing = False

    async def run(self) -> None:
        """Hold the lease until cancelled, however long the API server is away.

        Raises `NameTaken` when a later life of that name has begun: there must be one only.
        """
        try:
            while True:
                await self._try()
                await asyncio.sleep(self._renew_s)
        finally:
            if self._uid:
                with contextlib.suppress(ApiError, TimeoutError):
                    async with asyncio.timeout(RELEASE_S_MAX):
                        await self._api.delete(
                            LEASE, self._name, namespace=self._namespace, uid=self._uid
                        )

    async def _try(self) -> None:
        try:
            async with asyncio.timeout(2 * self._renew_s):
                lease = await (self._renew() if self._version else self._begin())
        except (ApiError, TimeoutError) as error:
            if not self._is_failing:
                fields = {"lease": self._name, "error": f"{error}" or "too slow"}
                log.warning("a lease cannot be renewed", extra=fields)
            self._is_failing = True
            return
        self._is_failing = False
        self._version = lease["metadata"]["resourceVersion"]
        self._uid = lease["metadata"]["uid"]

    async def _begin(self) -> dict[str, Any]:
        """Whoever had the name before is of an earlier life."""
        spec = self._spec | {"acquireTime": _now(), "renewTime": _now()}
        lease = {"metadata": self._metadata, "spec": spec}
        with contextlib.suppress(Exists):
            return await self._api.create(LEASE, lease, namespace=self._namespace)
        return await self._api.merge(LEASE, self._name, lease, namespace=self._namespace)

    async def _renew(self) -> dict[str, Any]:
        patch = {
            "metadata": {"resourceVersion": self._version},
            "spec": self._spec | {"renewTime": _now()},
        }
        try:
            return await self._api.merge(LEASE, self._name, patch, namespace=self._namespace)
        except NotFound:
            return await self._begin()
        except Conflict:
            lease = await self._api.get(LEASE, self._name, namespace=self._namespace)
        if lease["metadata"].get("annotations", {}).get(LIFE) != self._life:
            self._uid = ""  # not ours to delete
            raise NameTaken(f"another {self._name} has begun")
        return lease


class Members:
    """All that are there, by name, and where: `live`. *changed* is called with each new `live`.

    Seconds count in which the API server was followed for certain. While it is away nobody can
    renew, and nobody is judged: who was a member stays one.
    """

    def __init__(
        self,
        api: Api,
        *,
        role: str = SHARD,
        namespace: str = "",
        changed: Callable[[Mapping[str, str]], None] = lambda live: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._changed = changed
        self._renewed: dict[str, float] = {}
        self.live: Mapping[str, str] = {}
        self.reflector = Reflector(
            api,
            LEASE,
            namespace=namespace,
            labels=f"{ROLE}={role}",
            changed=self._see,
            clock=clock,
        )

    async def synced(self) -> None:
        """Until all that have a lease are known."""
        await self.reflector.synced()
        self._judge()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.reflector.run(), name="leases")
            while True:
                await asyncio.sleep(LOOK_S)
                self._judge()

    def _see(self, change: Change) -> None:
        if change.after is None:
            self._renewed.pop(change.key, None)
        elif change.key not in self._renewed or _spoken(change.before) != _spoken(change.after):
            self._renewed[change.key] = self.reflector.heard_s
        self._judge()

    def _judge(self) -> None:
        live = alive(self.reflector.objects, self._renewed, self.reflector.heard_s)
        if live != self.live:
            self.live = live
            self._changed(live)


def alive(
    leases: Mapping[str, Mapping[str, Any]], renewed: Mapping[str, float], now: float
) -> dict[str, str]:
    """Holders by name, of the leases that have a holder and were *renewed* recently enough."""
    found = {}
    for key, lease in sorted(leases.items()):
        spec = lease.get("spec") or {}
        holder = spec.get("holderIdentity")
        silent_s = now - renewed.get(key, now)
        if holder and silent_s <= (spec.get("leaseDurationSeconds") or DURATION_S):
            found[str(lease["metadata"]["name"])] = str(holder)
    return found


class Leader:
    """One at a time leads, of all that name the same lease.

    A term has a number, `epoch`, that is greater than that of every earlier term for as long as
    nobody deletes the lease: what a leader writes can be fenced with it. A leader stops after two
    thirds of the time in which no other may take its place.
    """

    def __init__(
        self,
        api: Api,
        name: str,
        identity: str,
        *,
        namespace: str = "",
        duration_s: int = LEADER_S,
        retry_s: float = RETRY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.identity = f"{identity}_{os.urandom(4).hex()}"  # of this life
        self.epoch = 0
        self._api, self._name, self._namespace = api, name, namespace
        self._duration_s, self._retry_s, self._clock = duration_s, retry_s, clock
        self._version = ""
        self._until = float("-inf")
        self._seen: object = None
        self._seen_at = 0.0

    def __repr__(self) -> str:
        return f"<Leader {self.identity} [{'leads' if self.is_leading else 'waits'} {self.epoch}]>"

    @property
    def is_leading(self) -> bool:
        """Nobody else may lead now."""
        return self._clock() < self._until

    async def run(self, lead: Callable[[int], Awaitable[None]]) -> None:
        """Call *lead* with the term's number for each term, and cancel it at the term's end.

        Returns when *lead* does, and raises what it raises.
        """
        is_over = False
        while not is_over:
            if not await self._attempt():
                await asyncio.sleep(self._retry_s * random.uniform(0.8, 1.2))
                continue
            log.info("leads", extra={"lease": self._name, "epoch": self.epoch})
            try:
                is_over = await _first(lead(self.epoch), self._keep())
            finally:
                await self._release()

    async def _release(self) -> None:
        """So that another need not wait."""
        if self.is_leading:
            with contextlib.suppress(ApiError, TimeoutError):
                async with asyncio.timeout(RELEASE_S_MAX):
                    await self._write({"holderIdentity": ""})
        self._until = float("-inf")

    async def _attempt(self) -> bool:
        """Take the lease if it is free."""
        try:
            async with asyncio.timeout(self._duration_s / 3):
                return await self._take()
        except (ApiError, TimeoutError) as error:
            log.debug("no election", extra={"lease": self._name, "error": str(error)})
            return False

    async def _take(self) -> bool:
        sent_at = self._clock()
        try:
            lease = await self._api.get(LEASE, self._name, namespace=self._namespace)
        except NotFound:
            spec = self._mine(1)
            lease = {"metadata": {"name": self._name}, "spec": spec}
            self._elected(await self._api.create(LEASE, lease, namespace=self._namespace), sent_at)
            return True
        spec = lease.get("spec") or {}
        if self._is_held(spec):
            return False
        sent_at = self._clock()
        self._version = lease["metadata"]["resourceVersion"]
        self._elected(
            await self._write(self._mine((spec.get("leaseTransitions") or 0) + 1)), sent_at
        )
        return True

    def _is_held(self, spec: Mapping[str, Any]) -> bool:
        """By another, who has changed it within its duration, as far as we saw."""
        seen = (spec.get("holderIdentity"), spec.get("renewTime"), spec.get("leaseTransitions"))
        if seen != self._seen:
            self._seen, self._seen_at = seen, self._clock()
        good_s = spec.get("leaseDurationSeconds") or self._duration_s
        is_silent = self._clock() - self._seen_at > good_s
        return bool(seen[0]) and seen[0] != self.identity and not is_silent

    def _mine(self, epoch: int) -> dict[str, Any]:
        return {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": self._duration_s,
            "leaseTransitions": epoch,
            "acquireTime": _now(),
            "renewTime": _now(),
        }

    def _elected(self, lease: Mapping[str, Any], sent_at: float) -> None:
        self.epoch = lease["spec"]["leaseTransitions"]
        self._version = lease["metadata"]["resourceVersion"]
        self._until = sent_at + self._duration_s * 2 / 3

    async def _keep(self) -> None:
        """Renew until that fails for too long, or another has it."""
        wait_s = self._duration_s / 5
        while self.is_leading:
            await asyncio.sleep(min(wait_s, max(0.0, self._until - self._clock())))
            sent_at = self._clock()
            try:
                async with asyncio.timeout(max(0.0, self._until - sent_at)):
                    self._elected(await self._write({"renewTime": _now()}), sent_at)
                wait_s = self._duration_s / 5
            except (Conflict, NotFound):
                if not await self._is_ours():
                    break
                wait_s = self._duration_s / 15
            except (ApiError, TimeoutError):
                wait_s = self._duration_s / 15
        log.warning("leads no more", extra={"lease": self._name, "epoch": self.epoch})
        self._until = float("-inf")

    async def _is_ours(self) -> bool:
        """Though somebody else has changed something of it, or an earlier try of ours has."""
        try:
            async with asyncio.timeout(max(0.0, self._until - self._clock())):
                lease = await self._api.get(LEASE, self._name, namespace=self._namespace)
        except NotFound:
            return False
        except (ApiError, TimeoutError):
            return True
        self._version = lease["metadata"]["resourceVersion"]
        spec = lease["spec"]
        return (spec.get("holderIdentity"), spec.get("leaseTransitions")) == (
            self.identity,
            self.epoch,
        )

    async def _write(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Only if nobody else has written since we read."""
        patch = {"metadata": {"resourceVersion": self._version}, "spec": spec}
        return await self._api.merge(LEASE, self._name, patch, namespace=self._namespace)


async def _first(work: Awaitable[None], keeping: Awaitable[None]) -> bool:
    """Whether *work* has ended by itself; it is cancelled when *keeping* ends."""

    async def awaited(awaitable: Awaitable[None]) -> None:
        await awaitable

    tasks = [asyncio.ensure_future(awaited(work)), asyncio.ensure_future(awaited(keeping))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        is_over = tasks[0].done()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled() and (error := task.exception()):
            raise error
    return is_over


def _spoken(lease: Mapping[str, Any] | None) -> object:
    spec = (lease or {}).get("spec") or {}
    return spec.get("holderIdentity"), spec.get("renewTime"), spec.get("acquireTime")


def _now() -> str:
    """For people to read: nobody decides by it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
