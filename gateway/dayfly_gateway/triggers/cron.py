"""When a schedule fires. Pure: times come in, times go out."""

from datetime import UTC, datetime
from typing import Final, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from dayfly_pool.errors import BadInput
from dayfly_pool.models import Cron

MISSED_MAX: Final = 100
"""Firings that are made up for; more than that were missed are left out, and counted."""

LOOKED_AT_MAX: Final = 10_000
LOOK_BACK_S: Final = 3600.0
PUNCTUAL_S: Final = 60.0
"""A firing that is no later than this was not missed."""


class Firings(NamedTuple):
    """Which firings are due (Unix times), how many are left out, and when the next one will be.

    *next_at* is None for a schedule that never fires again.
    """

    due: list[float]
    left_out: int
    next_at: float | None


def checked(cron: Cron) -> None:
    """Raises `BadInput` with what is wrong with it."""
    zone = _zone(cron)
    try:
        next(_moments(cron, datetime.now(zone)))
    except StopIteration:
        raise BadInput(f"cron.schedule: {cron.schedule!r} never fires") from None


def _zone(cron: Cron) -> ZoneInfo:
    try:
        return ZoneInfo(cron.time_zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise BadInput(
            f"cron.timeZone: {cron.time_zone!r} is no IANA time zone, such as Europe/Berlin"
        ) from None


def _moments(cron: Cron, since: datetime) -> CronSim:
    try:
        return CronSim(cron.schedule, since)
    except CronSimError as error:
        raise BadInput(
            f"cron.schedule: {error}: write minute, hour, day of month, month and day of week,"
            " such as '*/5 * * * *'"
        ) from None


def firings(cron: Cron, seen: float, now: float) -> Firings:
    """What is due after *seen* and until *now*.

    What is later than a minute was missed: *catch_up* says whether none of these is made up for,
    the last one, or all. Where very many were missed, not each of them is counted. Raises
    `BadInput`: what was a schedule when it was declared may be none for this version or machine.
    """
    due, next_at = _between(cron, seen, now)
    uncounted = 0
    if next_at is not None and next_at <= now:  # it was down for long, and fires often
        uncounted = len(due)
        due, next_at = _between(cron, now - LOOK_BACK_S, now)
    late = [at for at in due if now - at > PUNCTUAL_S]
    punctual = due[len(late) :]
    kept = {"none": 0, "last": 0 if punctual else 1, "all": MISSED_MAX}[cron.catch_up]
    chosen = late[-kept:] if kept else []
    return Firings([*chosen, *punctual], uncounted + len(late) - len(chosen), next_at)


def _between(cron: Cron, seen: float, now: float) -> tuple[list[float], float | None]:
    """(the firings after *seen* and until *now*, at most `LOOKED_AT_MAX`, the next one)."""
    zone = _zone(cron)
    found: list[float] = []
    for moment in _moments(cron, datetime.fromtimestamp(seen, UTC).astimezone(zone)):
        at = moment.timestamp()
        if at > now or len(found) >= LOOKED_AT_MAX:
            return found, at
        if at > seen:
            found.append(at)
    return found, None
