"""What becomes of an event when a run of it has ended. Pure.

User code's failures are attempts, and there is a limit to these. What fails on our side (no
sandbox in time, a sandbox that was killed, a server that goes down) costs no attempt: it is tried
again for as long as the event may live.
"""

from typing import Final

import msgspec

from dayfly_pool.errors import BadInput, BodyTooLarge, FunctionNotFound, PlatformError
from dayfly_pool.models import Failure, Outcome, Retry, Success
from dayfly_pool.store.events import Attempt, Ended, Lease, State

KILLS_MAX: Final = 3
"""Runs of an event that may end with a killed sandbox before that counts as its own doing."""

THROTTLE_FIRST_S: Final = 0.05
THROTTLE_MAX_S: Final = 5.0
SERVER_ERROR: Final = 500
MESSAGE_CHARACTERS_MAX: Final = 4096
HOPELESS: Final = (FunctionNotFound, BadInput, BodyTooLarge)
"""What trying again does not help against."""


def backoff_s(first_s: float, max_s: float, number: int, random: float) -> float:
    """How long to wait after failure *number*, with *random* from [0, 1).

    Exponential with full jitter: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    return random * min(max_s, first_s * 2.0 ** min(number - 1, 60))


def verdict(
    lease: Lease,
    outcome: Outcome | PlatformError,
    retry: Retry,
    started_at: float,
    now: float,
    random: float,
) -> Ended:
    """What the event is now, after a run of it from *started_at* until *now*.

    A run for which there was no room leaves no trace, or a long queue would be full of them.
    """
    if isinstance(outcome, Success):
        if outcome.status < SERVER_ERROR:
            return Ended(
                row=lease.row,
                fence=lease.fence,
                state=State.SUCCEEDED,
                at=now,
                is_counted=True,
                result=msgspec.msgpack.encode([outcome.status, outcome.headers]),
                body=outcome.body,
            )
        outcome = Failure("ServerError", f"the function answered with status {outcome.status}")
    kind = type(outcome).__name__ if isinstance(outcome, PlatformError) else outcome.kind
    message = outcome.detail if isinstance(outcome, PlatformError) else outcome.message
    tries = lease.fence - lease.attempts
    is_counted = isinstance(outcome, Failure) and not (outcome.was_killed and tries <= KILLS_MAX)
    attempt = Attempt(
        fence=lease.fence,
        started_at=started_at,
        ended_at=now,
        is_counted=is_counted,
        kind=kind,
        message=message[:MESSAGE_CHARACTERS_MAX],
    )
    attempts = lease.attempts + is_counted
    if is_counted:
        wait_s = backoff_s(retry.backoff_seconds, retry.backoff_max_seconds, attempts, random)
    else:
        wait_s = backoff_s(THROTTLE_FIRST_S, THROTTLE_MAX_S, tries, random)
    is_dead = isinstance(outcome, HOPELESS) or attempts >= retry.attempts
    at = now + wait_s
    is_old = at >= lease.expires_at
    return Ended(
        row=lease.row,
        fence=lease.fence,
        state=State.DEAD if is_dead or is_old else State.DELAYED,
        at=now if is_dead or is_old else at,
        attempt=attempt if isinstance(outcome, Failure) or is_dead or is_old else None,
        is_counted=is_counted,
    )


def unfit(lease: Lease, now: float) -> Ended | None:
    """What becomes of an event that must not be run at all; None for one that may."""
    if lease.damage:
        kind, message = "Damaged", lease.damage
    elif now >= lease.expires_at:
        kind, message = "Expired", "it was not run before its maximum age"
    else:
        return None
    return _dead(lease, kind, message, now, now)


def broken(lease: Lease, error: Exception, started_at: float, now: float) -> Ended:
    """What becomes of an event over which we failed for a defect of ours.

    Trying again would not help; when that is mended it can be redriven. The error's own text may
    hold what is none of the caller's business: the log has it.
    """
    message = f"{type(error).__name__}: the server's log has the cause"
    return _dead(lease, "InternalError", message, started_at, now)


def _dead(lease: Lease, kind: str, message: str, started_at: float, now: float) -> Ended:
    attempt = Attempt(
        fence=lease.fence,
        started_at=started_at,
        ended_at=now,
        is_counted=False,
        kind=kind,
        message=message,
    )
    return Ended(row=lease.row, fence=lease.fence, state=State.DEAD, at=now, attempt=attempt)
