"""What is idle: whose time is up, and what is worth least to keep. Pure: no clock, no I/O.

Values are greedy-dual (FaasCache, ASPLOS 2021): uses times what loading costs, by memory, plus a
clock that rises to the value of whatever is evicted, so that no fame lasts for ever.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from heapq import heapify, heappop, heappush, heapreplace

from dayfly_pool.models import FunctionId, SandboxId
from dayfly_pool.records import FunctionRecord, SandboxRecord


class Shelf:
    """Idle sandboxes, in the order in which their time is up, and by what they are worth."""

    def __init__(self, functions: Mapping[FunctionId, FunctionRecord]) -> None:
        self._functions = functions
        self._groups: dict[float, OrderedDict[SandboxId, SandboxRecord]] = {}
        """By keep-alive: those of one length are due in the order in which they came."""

        self._kept: OrderedDict[SandboxId, SandboxRecord] = OrderedDict()
        """Idle beyond their time, for a minScale; evicted last."""

        self._clock = 0.0
        """The value of the sandbox evicted last: what falls idle now is worth that much more."""

        self._ranking: list[tuple[float, float, FunctionId]] = []
        """A heap: every function with idle sandboxes, by the value of the oldest when looked at."""

        self._ranked: set[FunctionId] = set()

    def __len__(self) -> int:
        """How many may be evicted before their time."""
        return sum(map(len, self._groups.values()))

    def put(self, box: SandboxRecord, record: FunctionRecord) -> None:
        """*box* has fallen idle at `box.since`."""
        box.value = self._clock + record.uses * record.specialize_s / record.memory_bytes
        if record.function.is_batch:
            box.value = 0.0
        elif len(record.sandboxes) <= record.function.spec.min_scale:
            box.value = math.inf
        if record.function.id not in self._ranked:
            self._ranked.add(record.function.id)
            heappush(self._ranking, (box.value, box.since, record.function.id))
        keep_alive_s = record.function.spec.keep_alive_seconds
        self._groups.setdefault(keep_alive_s, OrderedDict())[box.id] = box

    def take(self, box: SandboxRecord, record: FunctionRecord) -> None:
        """It is idle no more."""
        self._kept.pop(box.id, None)
        keep_alive_s = record.function.spec.keep_alive_seconds
        group = self._groups.get(keep_alive_s)
        if group is not None:
            group.pop(box.id, None)
            if not group:
                del self._groups[keep_alive_s]

    def due(self, now: float) -> Iterator[SandboxRecord]:
        """Those whose time is up; each must be taken or kept before the next is asked for."""
        for keep_alive_s, group in list(self._groups.items()):
            while group and now - (box := next(iter(group.values()))).since >= keep_alive_s:
                yield box

    def keep(self, box: SandboxRecord, record: FunctionRecord) -> None:
        """Let it be beyond its time, until it has worked again."""
        self.take(box, record)
        self._kept[box.id] = box

    def last_resort(self) -> SandboxRecord | None:
        """One that is kept beyond its time."""
        return next(iter(self._kept.values()), None)

    def least(self) -> SandboxRecord | None:
        """The one to evict first.

        Values grow with every use, so the head of the ranking is looked at again and put back if
        it is worth more by now.
        """
        ranking = self._ranking
        while ranking:
            _, _, id_ = ranking[0]
            idle = self._functions[id_].idle.values()
            box = next((box for box in idle if box.id not in self._kept), None)
            if box is None:
                heappop(ranking)
                self._ranked.discard(id_)
                continue
            entry = (box.value, box.since, id_)
            if entry == ranking[0]:
                return box
            heapreplace(ranking, entry)
        return None

    def evicted(self, box: SandboxRecord) -> None:
        """It had to go before its time."""
        if box.value < math.inf:
            self._clock = max(self._clock, box.value)

    def forget(self, id_: FunctionId) -> None:
        """The function is gone."""
        if id_ in self._ranked:
            self._ranked.discard(id_)
            self._ranking = [entry for entry in self._ranking if entry[2] != id_]
            heapify(self._ranking)
