"""Deadlines: late items are told in order, those in time never, and one timer serves a length."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dayfly_pool.deadlines import SLACK_S, Deadlines


class Clock:
    """The time and the event loop's timers, moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.timers: list[tuple[float, Callable[..., None], tuple[Any, ...]]] = []
        monkeypatch.setattr(asyncio, "get_running_loop", lambda: self)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def call_later(self, delay_s: float, act: Callable[..., None], *arguments: Any) -> None:
        """As the event loop's."""
        self.timers.append((self.now + delay_s, act, arguments))

    def run_until(self, end: float) -> None:
        """Fire what is due up to *end*, each timer at its own time."""
        while due := [timer for timer in self.timers if timer[0] <= end]:
            timer = min(due, key=lambda timer: timer[0])
            self.timers.remove(timer)
            self.now = max(self.now, timer[0])
            timer[1](*timer[2])
        self.now = end


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time starts at 1000."""
    return Clock(monkeypatch)


def test_an_item_is_told_when_its_time_is_up(clock: Clock):
    late: list[str] = []
    deadlines: Deadlines[str] = Deadlines(late.append)
    deadlines.add("a", 5, clock.now)

    clock.run_until(1004.9)
    assert late == []
    clock.run_until(1005.01)
    assert late == ["a"]


def test_an_item_that_made_it_is_not_told_and_others_are_not_late_for_it(clock: Clock):
    late: list[str] = []
    deadlines: Deadlines[str] = Deadlines(late.append)
    deadlines.add("a", 5, clock.now)
    clock.run_until(1003)
    deadlines.add("b", 5, clock.now)
    deadlines.remove("a", 5)

    clock.run_until(1007.9)
    assert late == []
    clock.run_until(1008.01)
    assert late == ["b"]


def test_removing_what_was_never_there_or_is_gone_does_nothing(clock: Clock):
    deadlines: Deadlines[str] = Deadlines(lambda item: None)
    deadlines.remove("a", 5)
    deadlines.add("a", 5, clock.now)
    deadlines.remove("a", 5)
    deadlines.remove("a", 5)


def test_a_length_has_one_timer_and_none_when_nothing_is_left(clock: Clock):
    deadlines: Deadlines[int] = Deadlines(lambda item: None)
    for item in range(1000):
        deadlines.add(item, 5, clock.now)
        deadlines.remove(item, 5)

    assert len(clock.timers) == 1
    clock.run_until(1010)
    assert clock.timers == []


def test_an_item_may_come_again_when_it_is_told(clock: Clock):
    """As a retry would."""
    late: list[float] = []

    def again(item: str) -> None:
        late.append(clock.now)
        if len(late) < 3:
            deadlines.add(item, 1, clock.now)

    deadlines: Deadlines[str] = Deadlines(again)
    deadlines.add("a", 1, clock.now)
    clock.run_until(1010)

    assert [round(at, 1) for at in late] == [1001.0, 1002.0, 1003.0]
    assert clock.timers == []


@given(st.lists(st.tuples(st.floats(0, 10), st.sampled_from([0.5, 2.0, 30.0]), st.booleans())))
def test_each_is_told_once_and_never_early(plan: list[tuple[float, float, bool]]):
    """Whatever the order: exactly those that were not removed, within the loop's resolution."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        clock = Clock(monkeypatch)
        late: dict[int, float] = {}
        deadlines: Deadlines[int] = Deadlines(
            lambda item: late.setdefault(item, clock.now) and None
        )
        due: dict[int, float] = {}
        for item, (at, seconds, is_removed) in enumerate(sorted(plan)):
            clock.run_until(1000 + at)
            deadlines.add(item, seconds, clock.now)
            if is_removed:
                deadlines.remove(item, seconds)
            else:
                due[item] = clock.now + seconds
        clock.run_until(1050)

    assert late.keys() == due.keys()
    assert all(abs(late[item] - due[item]) <= 2 * SLACK_S for item in due)
    assert clock.timers == []
