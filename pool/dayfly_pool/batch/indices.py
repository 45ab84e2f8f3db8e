"""Sets of indices, in a bit each: ten million of them are 1.25 MB, whatever their order."""

import re
import zlib
from collections.abc import Iterator
from itertools import islice
from typing import Final

from dayfly_pool.errors import BadInput

INDEX_MAX: Final = 9_999_999
"""The largest index (IBM Code Engine's)."""

TEXT_CHARACTERS_MAX: Final = 1 << 20
INTERVALS_SHOWN: Final = 1000
_RUNS: Final = re.compile(rb"\xff+|[^\x00\xff]")
_INTERVAL: Final = re.compile(r"\s*(\d{1,8})\s*(?:-\s*(\d{1,8})\s*)?\Z", re.ASCII)


class IndexSet:
    """A set of indices from 0 to *most*. Written like `1,3,6-9`, as Kubernetes writes it."""

    __slots__ = ("_bits", "_count")

    def __init__(self, most: int) -> None:
        self._bits = bytearray((most >> 3) + 1)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, index: int) -> bool:
        at = index >> 3
        return at < len(self._bits) and bool(self._bits[at] >> (index & 7) & 1)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, IndexSet):
            return NotImplemented
        return self._bits.rstrip(b"\0") == other._bits.rstrip(b"\0")

    __hash__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[int]:
        for low, high in self.intervals():
            yield from range(low, high + 1)

    def add(self, index: int) -> bool:
        """Put it in; False when it was there."""
        at, bit = index >> 3, 1 << (index & 7)
        if self._bits[at] & bit:
            return False
        self._bits[at] |= bit
        self._count += 1
        return True

    def add_range(self, low: int, high: int) -> None:
        """Put all of them in, *high* too."""
        first, last = (low + 7) >> 3, (high + 1) >> 3
        if first < last:
            inside = self._bits[first:last]
            self._count += 8 * (last - first) - int.from_bytes(inside, "little").bit_count()
            self._bits[first:last] = b"\xff" * (last - first)
        for index in range(low, min(first << 3, high + 1)):
            self.add(index)
        for index in range(max(last << 3, low), high + 1):
            self.add(index)

    def without(self, *others: "IndexSet") -> "IndexSet":
        """What is in it and in none of *others*, which are no larger."""
        bits = int.from_bytes(self._bits, "little")
        for other in others:
            bits &= ~int.from_bytes(other._bits, "little")
        left = IndexSet((len(self._bits) << 3) - 1)
        left._bits = bytearray(bits.to_bytes(len(left._bits), "little"))
        left._count = bits.bit_count()
        return left

    def intervals(self) -> Iterator[tuple[int, int]]:
        """(lowest, highest) of each run of neighbours, in order."""
        low, high = -1, -2
        for low_here, high_here in self._pieces():
            if low_here == high + 1:
                high = high_here
                continue
            if low >= 0:
                yield low, high
            low, high = low_here, high_here
        if low >= 0:
            yield low, high

    def _pieces(self) -> Iterator[tuple[int, int]]:
        for run in _RUNS.finditer(self._bits):
            start = run.start() << 3
            if run[0][0] == 0xFF:
                yield start, (run.end() << 3) - 1
            else:
                yield from ((start + i, start + i) for i in range(8) if run[0][0] >> i & 1)

    def __str__(self) -> str:
        """All of it, unless it has more than `INTERVALS_SHOWN` intervals: then `...` follows."""
        found = [*islice(self.intervals(), INTERVALS_SHOWN + 1)]
        texts = [_text(low, high) for low, high in found[:INTERVALS_SHOWN]]
        return ",".join([*texts, "..."] if len(found) > INTERVALS_SHOWN else texts)

    def text(self) -> str:
        """All of it, as `parse` reads it."""
        return ",".join(_text(low, high) for low, high in self.intervals())

    def packed(self) -> bytes:
        """For the journal; see `unpack`."""
        return zlib.compress(self._bits, 1)

    def unpack(self, data: bytes) -> None:
        """Be what was *packed*, of a set of the same size. Raises ValueError for other data."""
        unpacking = zlib.decompressobj()
        try:
            bits = unpacking.decompress(data, len(self._bits) + 1)
        except zlib.error as error:
            raise ValueError(str(error)) from error
        if len(bits) != len(self._bits):
            raise ValueError(f"{len(bits)} bytes where {len(self._bits)} are meant")
        self._bits[:] = bits
        self._count = int.from_bytes(bits, "little").bit_count()


def _text(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"


def parse(text: str) -> IndexSet:
    """The set that *text* writes. Raises `BadInput` when it is none, or empty."""
    if len(text) > TEXT_CHARACTERS_MAX:
        raise BadInput(f"the list of indices has over {TEXT_CHARACTERS_MAX} characters")
    pairs: list[tuple[int, int]] = []
    for part in text.split(","):
        match = _INTERVAL.match(part)
        if match is None:
            raise BadInput(f"{part.strip()!r} is no index: write them like 1,3,6-9")
        low = int(match[1])
        high = int(match[2]) if match[2] else low
        if high < low:
            raise BadInput(f"{part.strip()!r} ends before it begins: write {high}-{low}")
        if high > INDEX_MAX:
            raise BadInput(f"index {high} is over the largest, {INDEX_MAX}")
        pairs.append((low, high))
    found = IndexSet(max(high for _, high in pairs))
    end = -1  # so that no index is put in twice, however often it was written
    for low, high in sorted(pairs):
        if high > end:
            found.add_range(max(low, end + 1), high)
            end = high
    return found


def up_to(size: int) -> IndexSet:
    """Indices 0 to *size* - 1. Raises `BadInput` when there are none, or too many."""
    if not 1 <= size <= INDEX_MAX + 1:
        raise BadInput(f"a job has 1 to {INDEX_MAX + 1} indices, not {size}")
    found = IndexSet(size - 1)
    found.add_range(0, size - 1)
    return found
