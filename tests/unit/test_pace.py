"""Tasks follow each other slowly while somebody waits for an answer, and else at once."""

import pytest

from dayfly_pool.pace import QUIET_S, SLACK_S, TASKS_PER_S, Pace


def test_with_nobody_there_no_task_waits():
    pace = Pace()

    assert [pace.wait_s(0.0) for _ in range(1000)] == [0.0] * 1000


def test_beside_others_so_many_begin_in_a_second_and_no_more():
    """However many ask at once: each has its turn, a little later than the one before."""
    pace = Pace()
    pace.seen_at = 10.0
    waits = [pace.wait_s(10.0) for _ in range(TASKS_PER_S)]

    assert waits == sorted(waits)
    assert waits[-1] == pytest.approx(1 - SLACK_S, abs=2 / TASKS_PER_S)
    assert sum(wait == 0 for wait in waits) <= SLACK_S * TASKS_PER_S + 1


def test_tasks_that_come_slowly_do_not_wait():
    pace = Pace()
    waits = []
    for tick in range(100):
        now = pace.seen_at = 5 + tick * 2 / TASKS_PER_S
        waits.append(pace.wait_s(now))

    assert waits == [0.0] * 100


def test_when_the_others_are_gone_nobody_waits_any_more():
    pace = Pace()
    pace.seen_at = 1.0
    for _ in range(100):
        pace.wait_s(1.0)

    assert pace.wait_s(1.0 + QUIET_S) == 0.0
