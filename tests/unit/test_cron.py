"""When schedules fire: nothing twice, nothing silently left out, whatever the clocks do."""

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dayfly_gateway.triggers.cron import MISSED_MAX, PUNCTUAL_S, checked, firings
from dayfly_pool.errors import BadInput
from dayfly_pool.models import Cron

HOURLY = Cron(schedule="0 * * * *")
START = 1_790_000_000 - 1_790_000_000 % 3600
"""A full hour."""


def at(text: str, zone: str = "Europe/Berlin") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


def hours(*numbers: float) -> list[float]:
    return [START + 3600 * number for number in numbers]


# ---- an ordinary day ----------------------------------------------------------------------------


def test_it_fires_when_its_time_has_come_and_says_when_the_next_one_will():
    assert firings(HOURLY, START, START + 3599) == ([], 0, START + 3600)
    assert firings(HOURLY, START, START + 3600) == (hours(1), 0, START + 7200)


def test_what_was_seen_does_not_fire_again():
    assert firings(HOURLY, START + 3600, START + 3601).due == []
    assert firings(HOURLY, START + 3600.5, START + 3601).due == []


def test_a_schedule_may_have_seconds():
    every = Cron(schedule="*/10 * * * * *")

    assert firings(every, START, START + 25).due == [START + 10, START + 20]


def test_one_that_never_fires_again_says_so():
    past = Cron(schedule="0 0 30 2 *")
    with pytest.raises(BadInput, match=r"cron[.]schedule"):
        checked(past)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"schedule": "61 * * * *"}, "write minute, hour, day of month"),
        ({"schedule": "not a schedule"}, "write minute, hour, day of month"),
        ({"schedule": "* * * * *", "time_zone": "Mars/Base"}, "no IANA time zone"),
        ({"schedule": "* * * * *", "time_zone": "../../etc/passwd"}, "no IANA time zone"),
        ({"schedule": "* * * * *", "time_zone": ""}, "no IANA time zone"),
    ],
)
def test_what_is_no_schedule_is_refused_with_what_to_write(changed: dict[str, str], message: str):
    with pytest.raises(BadInput, match=message):
        checked(Cron(**changed))


# ---- firings that were missed -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("catch_up", "due", "left_out"),
    [("none", [], 5), ("last", hours(5), 4), ("all", hours(1, 2, 3, 4, 5), 0)],
)
def test_what_was_missed_is_made_up_for_as_declared_and_the_rest_is_counted(
    catch_up: str, due: list[float], left_out: int
):
    """The server was down from before one until half past five."""
    cron = Cron(schedule="0 * * * *", catch_up=catch_up)

    assert firings(cron, START, START + 5.5 * 3600) == (due, left_out, START + 6 * 3600)


@pytest.mark.parametrize(
    ("catch_up", "due"), [("none", hours(5)), ("last", hours(5)), ("all", hours(4, 5))]
)
def test_one_that_is_due_now_is_no_missed_one_and_stands_for_the_last(
    catch_up: str, due: list[float]
):
    cron = Cron(schedule="0 * * * *", catch_up=catch_up)

    assert firings(cron, START + 3 * 3600, START + 5 * 3600 + PUNCTUAL_S).due == due


def test_no_more_is_made_up_for_than_there_is_a_limit():
    """It was down for a month, and fires each second."""
    cron = Cron(schedule="* * * * * *", catch_up="all")
    found = firings(cron, START, START + 30 * 86400)

    assert len(found.due) == MISSED_MAX + PUNCTUAL_S + 1
    assert found.due[-1] == START + 30 * 86400
    assert found.next_at == START + 30 * 86400 + 1
    assert found.left_out > 10_000


# ---- clocks that change -------------------------------------------------------------------------


def test_in_spring_what_would_be_skipped_fires_an_hour_later():
    """02:30 does not exist on this day in Berlin."""
    cron = Cron(schedule="30 2 * * *", time_zone="Europe/Berlin")
    found = firings(cron, at("2026-03-28T12:00"), at("2026-03-29T12:00"))

    assert [*found.due, found.next_at] == [at("2026-03-29T03:00"), at("2026-03-30T02:30")]


def test_in_autumn_what_would_come_twice_fires_once():
    """02:30 exists twice on this day in Berlin."""
    cron = Cron(schedule="30 2 * * *", time_zone="Europe/Berlin", catch_up="all")
    found = firings(cron, at("2026-10-24T12:00"), at("2026-10-25T12:00"))

    assert len(found.due) == 1
    assert found.next_at == at("2026-10-26T02:30")


def test_in_autumn_every_half_hour_is_every_half_hour():
    cron = Cron(schedule="*/30 * * * *", time_zone="Europe/Berlin", catch_up="all")
    found = firings(cron, at("2026-10-25T01:30"), at("2026-10-25T03:00"))

    assert [later - earlier for earlier, later in zip(found.due, found.due[1:], strict=False)] == [
        1800
    ] * 4


def test_a_clock_that_goes_back_an_hour_fires_nothing_again():
    assert firings(HOURLY, START + 3600, START) == ([], 0, START + 2 * 3600)


def test_a_clock_that_jumps_on_by_an_hour_leaves_nothing_out_silently():
    found = firings(Cron(schedule="*/10 * * * *", catch_up="none"), START, START + 3600 + 300)

    assert len(found.due) + found.left_out == 6


@settings(deadline=None)
@given(
    st.sampled_from(["*/2 * * * *", "*/7 * * * *", "30 2 * * *", "0 0 * * 1", "*/30 * * * * *"]),
    st.sampled_from(["none", "last", "all"]),
    st.lists(st.floats(-4000, 30_000), min_size=1, max_size=8),
)
def test_however_the_clock_moves_nothing_fires_twice_and_all_is_accounted_for(
    schedule: str, catch_up: str, moves: list[float]
):
    """As the schedules do it: what was looked at is not looked at again."""
    cron = Cron(schedule=schedule, catch_up=catch_up, time_zone="Europe/Berlin")
    whole = Cron(schedule=schedule, catch_up="all", time_zone="Europe/Berlin")
    seen, now = float(START), float(START)
    fired: list[float] = []
    left_out = 0
    for move in moves:
        now += move
        found = firings(cron, seen, now)
        fired += found.due
        left_out += found.left_out
        if found.due or found.left_out:
            seen = now
    everything = firings(whole, START, seen)

    assert fired == sorted(set(fired))
    assert len(fired) + left_out == len(everything.due) + everything.left_out
