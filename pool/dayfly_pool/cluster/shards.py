"""Which shard a function belongs to. Pure: names in, names out; no I/O, no clock.

Rendezvous hashing (Thaler and Ravishankar, 1998): each shard has a score for each function, and
the highest is first. Who sees the same shards gives the same answer, wherever and whenever; a
shard that comes or goes moves only the functions that it has or had.
"""

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from math import ceil
from typing import Final

from msgspec import Struct

from dayfly_pool.models import FunctionId

ORDERS_MAX: Final = 50_000
"""Functions whose order is remembered. Ids come from whoever calls."""

SHARE: Final = 32
"""Calls of one function that one shard is to have under way for one gateway, before the next
shard has some of them too."""

HOLD_S: Final = 10.0
"""How long a spread stays wide when it need not be any more: the next burst finds it warm."""


def score(function: FunctionId, shard: str) -> int:
    """How much *shard* is the one for *function*; never equal for two shards, in practice."""
    text = f"{shard}\0{function}".encode(errors="replace")
    return int.from_bytes(blake2b(text, digest_size=8).digest())


def order(function: FunctionId, shards: Iterable[str]) -> list[str]:
    """All *shards*, the one to be preferred first; the same however they are given."""
    return sorted(shards, key=lambda shard: (-score(function, shard), shard))


def first(function: FunctionId, shards: Iterable[str]) -> str | None:
    """The shard that *function* belongs to; None when there is none."""
    return max(shards, key=lambda shard: (score(function, shard), shard), default=None)


class Ring:
    """The live shards, with what was found of them remembered until they change."""

    def __init__(self, shards: Iterable[str] = ()) -> None:
        self.shards = frozenset(shards)
        self._orders: dict[FunctionId, Sequence[str]] = {}

    def become(self, shards: Iterable[str]) -> bool:
        """Be these from now on; whether that is a change."""
        now = frozenset(shards)
        if now == self.shards:
            return False
        self.shards = now
        self._orders.clear()
        return True

    def order(self, function: FunctionId) -> Sequence[str]:
        """As `order`."""
        found = self._orders.get(function)
        if found is None:
            if len(self._orders) >= ORDERS_MAX:
                self._orders.clear()
            found = self._orders[function] = order(function, self.shards)
        return found


class _Width(Struct):
    """Over how many shards one function is spread, and since when fewer would do."""

    number: int = 1
    idle_since: float | None = None


class Spread:
    """Over how many shards each function's calls go, for what one gateway has under way.

    It widens at once, and narrows when fewer shards would do for `HOLD_S`. A function that may run
    less than `SHARE` at a time stays with one.
    """

    def __init__(self, share: int = SHARE) -> None:
        self._share = share
        self._widths: dict[FunctionId, _Width] = {}

    def width(self, function: FunctionId, under_way: int, places: int, now: float) -> int:
        """How many shards are to have its calls, with *under_way* of them and one more to come.

        *places* are how many of them one shard may run at once.
        """
        wanted = min(ceil((under_way + 1) / self._share), max(1, places // self._share))
        width = self._widths.get(function)
        if width is None:
            if wanted > 1:
                self._widths[function] = _Width(wanted)
            return wanted
        if wanted >= width.number:
            width.number, width.idle_since = wanted, None
        elif width.idle_since is None:
            width.idle_since = now
        elif now - width.idle_since >= HOLD_S:
            width.number, width.idle_since = wanted, None
            if wanted == 1:
                del self._widths[function]
                return 1
        return width.number

    def __len__(self) -> int:
        return len(self._widths)


def choose(order: Sequence[str], width: int, under_way: Mapping[str, int]) -> str:
    """Of the first *width* of *order* the one that has the fewest under way; the first of several.

    There is one at least in *order*.
    """
    if width == 1:
        return order[0]
    return min(order[:width], key=lambda shard: under_way.get(shard, 0))
