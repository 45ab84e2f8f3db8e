"""Who may do cold work now: the processors are shared out between the tenants. Pure.

Starting a sandbox and importing a function cost processor time, and more of them at once than
there are processors only makes each slower, for everybody. A tenant's burst must not do that to
the others: each has an equal part while several want some, and always room for one piece of work.
What a tenant does of its part while it wants more than that goes behind the others' work; and
beside others who do not want more it has half a part, for even what goes behind has a processor
to itself in the kernel.
"""

from collections import OrderedDict
from typing import Final

ACTIVE_S: Final = 1.0
"""A tenant that began some work this lately has its part kept free."""

BURST_S: Final = 0.2
"""A tenant that wanted more than its part this lately wants it still."""


class Turns:
    """Admits cold work: at most *most* processors' worth of it, of all tenants together.

    A *weight* is the share of one processor that a piece of work keeps busy while it lasts.
    """

    def __init__(self, most: float) -> None:
        self._most = most
        self._total = 0.0
        self._under_way: dict[str, float] = {}
        self._active: OrderedDict[str, float] = OrderedDict()
        self._wanted: OrderedDict[str, float] = OrderedDict()
        """By tenant: when it wanted more than its part."""

    def under_way(self, tenant: str) -> float:
        """The weight of what *tenant* has under way."""
        return self._under_way.get(tenant, 0.0)

    def may(self, tenant: str, weight: float, now: float) -> bool:
        """Whether *tenant* may begin this now."""
        mine = self.under_way(tenant)
        if not mine:
            return True
        self._forget_idle(now)
        if mine + weight > self._part(tenant, now):
            self._wanted[tenant] = now
            self._wanted.move_to_end(tenant)
            return False
        return self._total + weight <= self._most

    def _part(self, tenant: str, now: float) -> float:
        while self._wanted and not self.wants_more(next(iter(self._wanted)), now):
            self._wanted.popitem(last=False)
        tenants = len(self._active.keys() | {tenant})
        is_behind = tenant in self._wanted and len(self._wanted) < tenants
        return self._most / tenants / (2 if is_behind else 1)

    def wants_more(self, tenant: str, now: float) -> bool:
        """Whether *tenant* has asked for more than its part, and still does."""
        return tenant in self._wanted and now - self._wanted[tenant] < BURST_S

    def begin(self, tenant: str, weight: float, now: float) -> None:
        """It has begun."""
        self._total += weight
        self._under_way[tenant] = self.under_way(tenant) + weight
        self._active[tenant] = now
        self._active.move_to_end(tenant)

    def end(self, tenant: str, weight: float) -> None:
        """It is done, however it ended."""
        self._total -= weight
        left = self._under_way[tenant] - weight
        if left > 1e-9:
            self._under_way[tenant] = left
        else:
            del self._under_way[tenant]
        if not self._under_way:
            self._total = 0.0  # so that rounding never adds up

    def _forget_idle(self, now: float) -> None:
        while self._active:
            tenant, at = next(iter(self._active.items()))
            if now - at < ACTIVE_S:
                return
            del self._active[tenant]
            self._wanted.pop(tenant, None)
            if tenant in self._under_way:  # still at it
                self._active[tenant] = now
