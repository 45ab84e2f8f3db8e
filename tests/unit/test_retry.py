"""What becomes of an event when a run of it has ended: whose failure it was, and what is left."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from dayfly_pool.errors import (
    BadInput,
    Draining,
    FunctionNotFound,
    NoCapacity,
    PlatformError,
    QueueFull,
    SandboxStartFailed,
)
from dayfly_pool.models import Failure, FunctionId, InvocationId, Retry, Success, Timing
from dayfly_pool.retry import KILLS_MAX, THROTTLE_MAX_S, backoff_s, broken, unfit, verdict
from dayfly_pool.store.events import Ended, Lease, State

RETRY = Retry(attempts=3, backoff_seconds=1.0, backoff_max_seconds=60.0)
OLD_S, NOW = 1000.0, 100.0
LEASE = Lease(
    row=7,
    fence=1,
    id=InvocationId("event-1"),
    function=FunctionId("default/greet"),
    meta=b"",
    body=b"",
    attempts=0,
    accepted_at=0.0,
    expires_at=OLD_S,
)
RAISED = Failure("Raised", "ValueError: no")


def ended(outcome: Failure | Success | PlatformError, random: float = 0.5, **lease: float) -> Ended:
    return verdict(structs.replace(LEASE, **lease), outcome, RETRY, NOW - 1, NOW, random)


def test_what_the_handler_returned_is_the_result():
    end = ended(Success(b"hello", Timing(), 201, [["a", "b"]]))

    assert (end.state, end.at, end.body, end.is_counted) == (State.SUCCEEDED, NOW, b"hello", True)
    assert (end.row, end.fence, end.attempt) == (7, 1, None)


@pytest.mark.parametrize(
    ("status", "state"),
    [(0, State.SUCCEEDED), (200, State.SUCCEEDED), (404, State.SUCCEEDED), (500, State.DELAYED)],
)
def test_a_server_error_is_a_failure_and_any_other_answer_is_one(status: int, state: State):
    """0: it was not called over HTTP."""
    assert ended(Success(b"", Timing(), status)).state is state


def test_a_failure_is_tried_again_after_a_random_part_of_the_backoff():
    end = ended(RAISED, random=0.25)

    assert (end.state, end.at, end.is_counted) == (State.DELAYED, NOW + 0.25, True)
    assert end.attempt is not None
    told = (end.attempt.kind, end.attempt.message, end.attempt.started_at, end.attempt.ended_at)
    assert told == ("Raised", "ValueError: no", NOW - 1, NOW)


@pytest.mark.parametrize(("attempts", "at"), [(0, NOW + 1), (1, NOW + 2)])
def test_the_backoff_doubles(attempts: int, at: float):
    assert ended(RAISED, random=1.0, attempts=attempts, fence=attempts + 1).at == at


def test_the_last_attempt_that_fails_is_the_end():
    end = ended(RAISED, attempts=2, fence=3)

    assert (end.state, end.at, end.is_counted) == (State.DEAD, NOW, True)


@pytest.mark.parametrize("error", [NoCapacity, QueueFull, Draining, SandboxStartFailed])
@pytest.mark.parametrize("fence", [1, 3, 1000])
def test_what_fails_on_our_side_costs_no_attempt_however_often(
    error: type[PlatformError], fence: int
):
    end = ended(error("busy"), random=1.0, fence=fence)

    assert (end.state, end.is_counted, end.attempt) == (State.DELAYED, False, None)
    assert NOW < end.at <= NOW + THROTTLE_MAX_S


@pytest.mark.parametrize("error", [FunctionNotFound, BadInput])
def test_what_cannot_become_better_is_not_tried_again(error: type[PlatformError]):
    end = ended(error("gone"))

    assert (end.state, end.is_counted) == (State.DEAD, False)
    assert end.attempt is not None
    assert end.attempt.kind == error.__name__


def test_a_killed_sandbox_costs_no_attempt_until_it_looks_like_the_functions_own_doing():
    killed = Failure("Crashed", "by somebody", was_killed=True)
    counted = [ended(killed, fence=fence).is_counted for fence in range(1, KILLS_MAX + 3)]

    assert counted == [False] * KILLS_MAX + [True, True]


def test_what_could_not_run_again_before_its_maximum_age_is_dead_at_once():
    assert ended(RAISED, random=0.5, expires_at=NOW + 0.5).state is State.DEAD
    end = ended(NoCapacity("full"), random=0.5, expires_at=NOW)
    assert end.attempt is not None
    assert (end.state, end.attempt.kind, end.attempt.message) == (State.DEAD, "NoCapacity", "full")


def test_what_a_function_says_is_kept_within_a_limit():
    end = ended(Failure("Raised", "x" * 100_000))

    assert end.attempt is not None
    assert len(end.attempt.message) == 4096


@given(st.integers(1, 2000), st.floats(0, 1, exclude_max=True))
def test_a_backoff_is_never_longer_than_its_most(number: int, random: float):
    assert 0 <= backoff_s(1.0, 300.0, number, random) <= 300.0


def test_a_damaged_or_old_event_is_not_run():
    assert unfit(LEASE, NOW) is None
    for lease, now, kind in (
        (structs.replace(LEASE, damage="flipped"), NOW, "Damaged"),
        (LEASE, OLD_S, "Expired"),
    ):
        end = unfit(lease, now)
        assert end is not None
        assert end.attempt is not None
        assert (end.state, end.is_counted, end.attempt.kind) == (State.DEAD, False, kind)


def test_an_event_over_which_we_failed_is_dead_without_the_errors_text():
    """It may hold what is not the caller's; it costs no attempt."""
    end = broken(LEASE, KeyError("secret"), NOW - 1, NOW)

    assert end.attempt is not None
    assert (end.state, end.at, end.is_counted) == (State.DEAD, NOW, False)
    assert (end.attempt.kind, end.attempt.started_at) == ("InternalError", NOW - 1)
    assert "KeyError" in end.attempt.message
    assert "secret" not in end.attempt.message
