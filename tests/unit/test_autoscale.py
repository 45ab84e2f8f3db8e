"""How many sandboxes to keep, start and leave alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dayfly_pool.autoscale import (
    BACKOFF_MAX_S,
    RATE_WINDOW_S,
    SHORT_IMPORT_S,
    SHORT_IMPORT_WEIGHT,
    Rate,
    backoff_s,
    desired_generic,
    load_weight,
    smoothed,
    start_pays,
)

COUNTS = st.integers(0, 100)
SECONDS = st.floats(0, 1e6)


def rate_of(per_s: float, for_s: float) -> Rate:
    """A rate that has seen *per_s* events a second, evenly, until second *for_s*."""
    rate = Rate()
    for number in range(int(per_s * for_s)):
        rate.note(number / per_s)
    return rate


@pytest.mark.parametrize("per_s", [0.5, 3, 50])
def test_steady_arrivals_are_seen_at_their_rate(per_s: float):
    """After several windows the estimate is within a tenth of the truth, or one event."""
    seen = rate_of(per_s, for_s=6 * RATE_WINDOW_S).per_s(6 * RATE_WINDOW_S)

    assert seen == pytest.approx(per_s, rel=0.1, abs=1 / RATE_WINDOW_S)


def test_nothing_is_seen_before_the_first_event():
    assert Rate().per_s(1e9) == 0


def test_a_rate_falls_by_e_within_one_window():
    rate = Rate()
    for _ in range(100):
        rate.note(5)

    assert rate.per_s(5) == 10
    assert rate.per_s(5 + RATE_WINDOW_S) == pytest.approx(10 / 2.71828, rel=1e-4)


def test_a_rate_dies_away_to_nothing():
    """A trace of an event, rounded up, would keep a sandbox for two hours (until underflow)."""
    rate = Rate()
    rate.note(0)

    assert rate.per_s(60) == 0


def test_a_clock_that_stands_still_or_goes_back_does_no_harm():
    rate = Rate()
    rate.note(100)

    assert rate.per_s(0) == 0.1


def test_the_mean_begins_with_the_first_value_and_follows_slowly():
    assert smoothed(None, 3.0) == 3.0
    assert smoothed(1.0, 2.0) == pytest.approx(1.2)


def test_as_many_are_kept_as_arrive_during_one_start():
    """Little's law, rounded up: 30 a second times 50 ms is 1.5, so 2."""
    assert desired_generic(30, 0.05, least=0, most=10) == 2
    assert desired_generic(0, 0.05, least=0, most=10) == 0


@given(st.floats(0, 1e6), st.floats(0, 100), COUNTS, COUNTS)
def test_the_operators_bounds_hold(arrivals: float, start_s: float, least: int, extra: int):
    """Whatever the demand: never fewer than the least, never more than the most."""
    wanted = desired_generic(arrivals, start_s, least, least + extra)

    assert least <= wanted <= least + extra


@given(COUNTS, SECONDS, SECONDS, SECONDS)
def test_a_function_without_sandboxes_always_gets_one(
    waiting: int, handler_s: float, waited_s: float, start_s: float
):
    assert start_pays(waiting, 0, handler_s, waited_s, start_s)


def test_a_function_whose_time_is_not_known_gets_one():
    """The second of two first calls must not wait for a handler of ten minutes."""
    assert start_pays(1, 1, None, 0, 1)


@pytest.mark.parametrize(
    ("waiting", "serving", "handler_s", "waited_s", "pays"),
    [
        (1, 1, 0.001, 0, False),  # free again in 1 ms
        (49, 1, 0.001, 0, False),  # all done in 49 ms
        (51, 1, 0.001, 0, True),
        (51, 10, 0.001, 0, False),  # ten work on it
        (1, 10, 0.001, 0.06, True),  # the estimate is wrong: it has waited longer already
    ],
)
def test_another_sandbox_pays_when_it_is_ready_before_the_queue_is_done(
    waiting: int, serving: int, handler_s: float, waited_s: float, pays: bool
):
    """A start of 50 ms against the time in which the busy ones work off the queue."""
    assert start_pays(waiting, serving, handler_s, waited_s, start_s=0.05) is pays


@pytest.mark.parametrize(
    ("import_s", "busy_s", "weight"),
    [
        (0.0, 0.0, SHORT_IMPORT_WEIGHT),
        (0.019, 0.0, SHORT_IMPORT_WEIGHT),  # on its way from process to process
        (0.02, 0.02, 1.0),
        (2.0, 2.0, 1.0),  # numpy
        (2.0, 0.5, 0.25),  # mostly a disk
        (5.0, 0.001, 0.1),  # a network: but its start and end are work as well
        (0.1, 0.3, 1.0),  # it waited for a processor: others may have had it meanwhile
    ],
)
def test_a_load_weighs_the_share_of_a_processor_that_it_keeps_busy(
    import_s: float, busy_s: float, weight: float
):
    assert load_weight(import_s, busy_s) == pytest.approx(weight)


@given(SECONDS, SECONDS)
def test_no_load_weighs_nothing_or_more_than_a_processor(import_s: float, busy_s: float):
    """Whatever a guest says of it: of what weighs nothing there could be any number."""
    assert 0.1 <= load_weight(import_s, busy_s) <= 1


def test_a_load_too_short_to_be_measured_weighs_as_what_is_not_asleep_does():
    """Its share is a matter of chance; and as it grows there is no gap in either direction."""
    just = SHORT_IMPORT_S

    assert load_weight(just * 0.999, 0) == load_weight(just * 0.999, just) == SHORT_IMPORT_WEIGHT
    assert load_weight(just, 0) < SHORT_IMPORT_WEIGHT < load_weight(just, just)


def test_a_backoff_doubles_up_to_half_a_minute():
    assert [backoff_s(n) for n in range(1, 9)] == [0.5, 1, 2, 4, 8, 16, 30, 30]


@given(st.integers(1, 10**9))
def test_a_backoff_ends_however_often_it_failed(failures: int):
    assert 0 < backoff_s(failures) <= BACKOFF_MAX_S
