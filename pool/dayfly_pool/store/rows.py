"""What the two databases have in common: their tables are the same, and so are their rows."""

import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Final

from dayfly_pool.models import FunctionId, InvocationId
from dayfly_pool.store.events import Attempt, Lease, Shown, State

DAMAGED: Final = "it is not what was accepted: the disk or the database is damaged"
SHOWN: Final = (
    "id, function, state, priority, accepted_at, expires_at, at, attempts, fence,"
    " meta, body, file, result, result_body, result_file, row, checksum"
)
"""The columns of `shown`."""

LEASED: Final = (
    "row, fence, id, meta, body, file, attempts, accepted_at, expires_at, checksum, priority"
)
"""Those of `leased`, and the one by which they are sorted."""


ATTEMPT: Final = "fence, started_at, ended_at, is_counted, kind, message"
"""Those of `attempt`."""


def checksum(meta: bytes, body: bytes) -> int:
    """Tells whether an event is what was accepted."""
    return zlib.crc32(body, zlib.crc32(meta))


def _leased(
    function: FunctionId,
    row: int,
    fence: int,
    id_: InvocationId,
    meta: bytes,
    body: bytes,
    file: str,
    attempts: int,
    accepted_at: float,
    expires_at: float,
    checksum_: int,
) -> Lease:
    return Lease(
        row=row,
        fence=fence,
        id=id_,
        function=function,
        meta=meta,
        body=body,
        attempts=attempts,
        accepted_at=accepted_at,
        expires_at=expires_at,
        file=file,
        damage="" if file or checksum_ == checksum(meta, body) else DAMAGED,
    )


def leased(function: FunctionId, found: Iterable[Sequence[Any]]) -> list[Lease]:
    """Leases from their rows, in order; a long body is not checked before it is fetched."""
    in_order = sorted(found, key=lambda row: (-row[10], row[0]))
    return [_leased(function, *row[:10]) for row in in_order]


def attempt(row: Sequence[Any]) -> Attempt:
    """A run that did not succeed, from its row."""
    fence, started_at, ended_at, is_counted, kind, message = row
    return Attempt(
        fence=fence,
        started_at=started_at,
        ended_at=ended_at,
        is_counted=bool(is_counted),
        kind=kind,
        message=message,
    )


def shown(
    row: Sequence[Any],
    body: bytes = b"",
    result_body: bytes = b"",
    failures: Iterable[Attempt] = (),
) -> Shown:
    """An event, from its row, with the bodies that the caller has fetched and checked."""
    (id_, function, number, priority, accepted_at, expires_at, at, attempts, fence) = row[:9]
    state = State(number)
    return Shown(
        id=id_,
        function=function,
        state=state,
        priority=priority,
        accepted_at=accepted_at,
        expires_at=expires_at,
        ready_at=at if state is State.DELAYED else 0.0,
        finished_at=at if state.is_over else 0.0,
        attempts=attempts,
        fence=fence,
        meta=row[9],
        body=body,
        result=row[12],
        result_body=result_body,
        failures=list(failures),
    )
