"""A copy of what the API server has of one kind, kept current: list, then watch.

Level-triggered: what is told are differences between what was known and what is. A deletion that
was missed is told after the next list; what comes twice, or late, is not told again.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from dayfly_pool.cluster.api import Api, ApiError, Expired, Kind, Unreachable

log = logging.getLogger("dayfly.cluster")

STREAM_S_MIN: Final = 30
STREAM_S_MAX: Final = 45
"""How long a watch lasts. With `WATCH_S_GRACE` more a stream on which nothing comes is known to be
dead within a minute. Bookmarks would not do: they come about every minute, of one server, or not.
Going on with a watch costs one request, no list.
"""

STREAM_S_SHORT: Final = 1.0
"""What ends sooner has failed, or streams would follow one another without end."""

LIST_S: Final = 1.0
"""Between the beginnings of two lists, at least."""

WAIT_FIRST_S: Final = 0.2
WAIT_S_MAX: Final = 5.0
GONE_MAX: Final = 10_000
"""Deletions that are remembered, against events that come after them."""

Object = dict[str, Any]


class Change(NamedTuple):
    """One object as it was known and as it is: None before it was there, and after it is gone."""

    key: str
    before: Object | None
    after: Object | None


class Reflector:
    """*changed* is called for each change, in order, when `objects` has it; it must not wait.

    `objects` is by "namespace/name" (only the name, where there are no namespaces) and stays as it
    is while the API server is away. Objects are not to be changed.
    """

    def __init__(
        self,
        api: Api,
        kind: Kind,
        *,
        namespace: str = "",
        labels: str = "",
        changed: Callable[[Change], None] = lambda change: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.kind = kind
        self.lists = 0
        self.heard_s = 0.0
        self._api, self._namespace, self._labels = api, namespace, labels
        self._changed, self._clock = changed, clock
        self._objects: dict[str, Object] = {}
        self.objects: Mapping[str, Object] = MappingProxyType(self._objects)
        self._gone: dict[str, str] = {}
        self._since = ""
        self._synced = asyncio.Event()
        self._current_at = float("-inf")
        self._heard_at: float | None = None
        self._listed_at = float("-inf")
        self._is_failing = False

    def __repr__(self) -> str:
        return (
            f"<Reflector {self.kind.plural} [{len(self._objects)} at {self._since or 'no list'}]>"
        )

    @property
    def staleness_s(self) -> float:
        """Since the API server last showed that this is current; infinite before the first list.

        At rest that is up to a minute. `heard_s` is how many seconds this has followed the
        server for certain, all streams together: it stands still while the server is away.
        """
        return self._clock() - self._current_at

    async def synced(self) -> None:
        """Until the first list is there."""
        await self._synced.wait()

    async def run(self) -> None:
        """Keep current until cancelled. No failure of the API server's ends it."""
        failures = 0
        while True:
            began = self._clock()
            try:
                if not self._since:
                    await self._list()
                await self._watch()
            except Expired as error:
                log.info("list again", extra={"kind": self.kind.plural, "error": error.detail})
                self._since = ""
            except ApiError as error:
                self._failed(error)
                if not isinstance(error, Unreachable) and (error.status < 429 or failures > 3):
                    self._since = ""  # it does not want to, or what it sends makes no sense
            self._heard_at = None
            is_short = self._clock() - began < STREAM_S_SHORT
            failures = failures + 1 if is_short or self._is_failing else 0
            await asyncio.sleep(self._wait_s(failures))

    def _failed(self, error: ApiError) -> None:
        """Once for each time that it is away."""
        if not self._is_failing:
            fields = {"kind": self.kind.plural, "error": f"{error.status} {error.detail}"}
            log.warning("the API server cannot be followed", extra=fields)
        self._is_failing = True

    def _wait_s(self, failures: int) -> float:
        most = min(WAIT_S_MAX, WAIT_FIRST_S * 2.0 ** min(failures - 1, 10)) if failures else 0.0
        wait_s = random.uniform(most / 2, most)
        if self._since:
            return wait_s
        return max(wait_s, self._listed_at + LIST_S * random.uniform(1.0, 1.2) - self._clock())

    async def _list(self) -> None:
        """The whole of it, page by page, as of one moment."""
        self._listed_at = self._clock()
        self.lists += 1
        found: dict[str, Object] = {}
        after, version = "", ""
        while True:
            page = await self._api.page(
                self.kind, namespace=self._namespace, labels=self._labels, after=after
            )
            found |= {key_of(item): item for item in page["items"] or ()}
            version = str(page["metadata"]["resourceVersion"])
            after = page["metadata"].get("continue") or ""
            if not after:
                break
        self._gone.clear()
        for key in self._objects.keys() - found.keys():
            self._tell(key, None)
        for key, obj in found.items():
            if _version(self._objects.get(key)) != _version(obj):
                self._tell(key, obj)
        self._since = version
        self._current_at = self._clock()
        self._synced.set()

    async def _watch(self) -> None:
        timeout_s = random.randint(STREAM_S_MIN, STREAM_S_MAX)
        began = self._clock()
        events = self._api.watch(
            self.kind,
            namespace=self._namespace,
            labels=self._labels,
            since=self._since,
            timeout_s=timeout_s,
        )
        async with aclosing(events):  # type: ignore[type-var]
            async for what, obj in events:
                self._hear()
                if what != "BOOKMARK":
                    self._take(what, obj)
                self._since = _later(self._since, _version(obj))
        if self._clock() - began >= timeout_s:
            self._hear()  # it was there to the end

    def _hear(self) -> None:
        """What comes on a stream proves that all before it has come."""
        now = self._clock()
        if self._heard_at is not None:
            self.heard_s += now - self._heard_at
        self._heard_at = self._current_at = now
        if self._is_failing:
            log.info("the API server is followed again", extra={"kind": self.kind.plural})
            self._is_failing = False

    def _take(self, what: str, obj: Object) -> None:
        """One event, unless what is known is as new."""
        key, version = key_of(obj), _version(obj)
        known = _version(self._objects.get(key)) or self._gone.get(key, "")
        if known and not _is_newer(version, known):
            return
        if what != "DELETED":
            self._gone.pop(key, None)
            self._tell(key, obj)
            return
        self._gone[key] = version
        if len(self._gone) > GONE_MAX:
            del self._gone[next(iter(self._gone))]
        if key in self._objects:
            self._tell(key, None)

    def _tell(self, key: str, after: Object | None) -> None:
        before = self._objects.pop(key, None)
        if after is not None:
            self._objects[key] = after
        self._changed(Change(key, before, after))


def key_of(obj: Mapping[str, Any]) -> str:
    """As `Reflector.objects` has it."""
    metadata = obj["metadata"]
    namespace = metadata.get("namespace", "")
    return f"{namespace}/{metadata['name']}" if namespace else str(metadata["name"])


def _version(obj: Object | None) -> str:
    return str(obj["metadata"]["resourceVersion"]) if obj else ""


def _is_newer(version: str, known: str) -> bool:
    """Versions are numbers since they were made comparable; others can only be told apart.

    https://kubernetes.io/docs/reference/using-api/api-concepts/#resource-versions
    """
    if version.isdecimal() and known.isdecimal():
        return int(version) > int(known)
    return version != known


def _later(one: str, other: str) -> str:
    return other if _is_newer(other, one) else one
