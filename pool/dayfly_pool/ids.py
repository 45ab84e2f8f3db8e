"""Ids in the order of time, and names of what is tried again."""

import os
import re
import time
from collections.abc import Iterator
from typing import Final

from dayfly_pool.models import InvocationId

NAME_CHARACTERS_MAX: Final = 63
_AGAIN: Final = re.compile(r"-r\d{1,4}\Z")


def in_order(id_: str) -> InvocationId:
    """An id in the order of time, with 80 of the random bits of *id_*: see RFC 9562, UUIDv7.

    What is added to a large table in its order costs less.
    """
    return InvocationId(f"{time.time_ns() // 1_000_000:012x}{id_[12:]}")


def new_id() -> InvocationId:
    """An id for an event, in the order of time."""
    return in_order(os.urandom(16).hex())


def names_again(name: str, most: int) -> Iterator[str]:
    """What to call a run or job that tries *name* again, the first that is free: up to *most*."""
    stem = _AGAIN.sub("", name)
    for number in range(1, most + 1):
        end = f"-r{number}"
        yield stem[: NAME_CHARACTERS_MAX - len(end)].rstrip("-") + end
