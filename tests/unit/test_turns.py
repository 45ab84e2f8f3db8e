"""Whose turn it is to do cold work: equal parts of the processors, and always one for each."""

from collections import defaultdict
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dayfly_pool.turns import ACTIVE_S, BURST_S, Turns

MINE, THEIRS, OTHERS = "mine", "theirs", "others"
WEIGHTS = st.sampled_from((0.1, 0.25, 0.3, 0.5, 0.7, 1.0))
TENANTS = st.sampled_from((MINE, THEIRS, OTHERS))
STEPS = st.lists(
    st.tuples(TENANTS, WEIGHTS, st.booleans(), st.sampled_from((0.0, 0.3, ACTIVE_S, 5.0))),
    max_size=60,
)
"""(who, how much it wants, whether its oldest piece ends first, the time that passes before)."""

ROUNDING = 1e-6


class Played:
    """Turns that were asked again and again; a piece begins whenever it may."""

    def __init__(self, most: float) -> None:
        self.most, self.now = most, 0.0
        self.turns = Turns(most)
        self.under_way: dict[str, list[tuple[float, bool]]] = defaultdict(list)
        """(weight, whether it began beside another of the same tenant)."""

    def step(self, tenant: str, weight: float, has_ended: bool, passed_s: float) -> bool:
        """Whether it began."""
        self.now += passed_s
        pieces = self.under_way[tenant]
        if has_ended and pieces:
            self.turns.end(tenant, pieces.pop(0)[0])
        if not self.turns.may(tenant, weight, self.now):
            return False
        pieces.append((weight, bool(pieces)))
        self.turns.begin(tenant, weight, self.now)
        return True

    def of(self, tenant: str) -> float:
        return sum(weight for weight, _ in self.under_way[tenant])

    def end_all(self) -> None:
        for tenant, pieces in self.under_way.items():
            while pieces:
                self.turns.end(tenant, pieces.pop()[0])


def begun(turns: Turns, tenant: str, now: float, weight: float = 1.0) -> int:
    """How many pieces *tenant* may begin, and does."""
    number = 0
    while turns.may(tenant, weight, now):
        turns.begin(tenant, weight, now)
        number += 1
    return number


# ---- one tenant ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("most", "weight", "number"), [(1, 1.0, 1), (4, 1.0, 4), (2, 0.5, 4), (2, 0.25, 8), (3, 0.7, 4)]
)
def test_who_is_alone_has_all_the_processors(most: float, weight: float, number: int):
    """Weights are shares of one: twice as many of half the weight."""
    assert begun(Turns(most), MINE, 0, weight) == number


def test_what_is_over_leaves_room_for_as_much():
    turns = Turns(2)
    assert begun(turns, MINE, 0) == 2
    turns.end(MINE, 1.0)

    assert begun(turns, MINE, 0, 0.5) == 2


def test_a_piece_that_is_more_than_there_is_has_its_turn_alone():
    """Or what weighs 1 would never begin where the part is less than 1."""
    turns = Turns(0.5)

    assert begun(turns, MINE, 0) == 1
    assert not turns.may(MINE, 0.1, 0)


# ---- who goes behind ----------------------------------------------------------------------------


def test_who_asks_for_no_more_than_there_is_is_never_behind():
    turns = Turns(4)
    for _ in range(4):
        assert turns.may(MINE, 1.0, 0)
        turns.begin(MINE, 1.0, 0)

        assert not turns.wants_more(MINE, 0)


def test_who_wants_more_than_its_part_goes_behind_until_it_has_not_for_a_while():
    turns = Turns(2)
    begun(turns, MINE, 0)

    assert turns.wants_more(MINE, BURST_S - 0.01)
    assert not turns.wants_more(MINE, BURST_S)


def test_who_wants_more_has_half_a_part_beside_one_who_does_not():
    turns = Turns(4)
    begun(turns, THEIRS, 0, 0.5)
    for _ in range(8):
        turns.end(THEIRS, 0.5)
    turns.begin(THEIRS, 0.1, 1)
    assert begun(turns, MINE, 1, 0.5) == 4  # before it is known that it wants more
    for _ in range(4):
        turns.end(MINE, 0.5)

    assert begun(turns, MINE, 1.1, 0.5) == 2


def test_where_all_want_more_each_has_its_part():
    turns = Turns(4)
    for tenant in (MINE, THEIRS, MINE, THEIRS):
        begun(turns, tenant, 0, 0.5)
        for _ in range(int(turns.under_way(tenant) / 0.5) - 1):
            turns.end(tenant, 0.5)

    assert begun(turns, MINE, 0.1, 0.5) == 3
    assert begun(turns, THEIRS, 0.1, 0.5) == 3


def test_who_finds_all_taken_by_others_does_not_go_behind_for_that():
    """It has not had its part."""
    turns = Turns(2)
    begun(turns, MINE, 0)
    begun(turns, THEIRS, 0, 0.5)

    assert not turns.may(THEIRS, 0.5, 0)
    assert not turns.wants_more(THEIRS, 0)


# ---- several ------------------------------------------------------------------------------------


def test_who_has_nothing_under_way_begins_at_once():
    """Also where a burst of another's has taken all there is."""
    turns = Turns(2)
    begun(turns, MINE, 0)

    assert begun(turns, THEIRS, 0) == 1
    assert begun(turns, OTHERS, 0) == 1


@pytest.mark.parametrize(("tenants", "part"), [(2, 6), (3, 4), (4, 3), (12, 1), (30, 1)])
def test_those_that_want_the_processors_have_equal_parts(tenants: int, part: int):
    """Once what came first has ended; each has room for one, however many they are."""
    turns, names = Turns(12), [f"tenant{n}" for n in range(tenants)]
    pieces: dict[str, int] = {name: begun(turns, name, 0) for name in names}
    for name in names * 12:
        if pieces[name] > 1:
            turns.end(name, 1.0)
            pieces[name] -= 1
        for each in names:
            pieces[each] += begun(turns, each, 0.1)

    assert pieces == dict.fromkeys(names, part)


def test_the_part_of_who_has_just_begun_something_is_kept_free():
    """It comes back before long: a start is followed by a load."""
    turns = Turns(4)
    begun(turns, THEIRS, 0)
    for _ in range(4):
        turns.end(THEIRS, 1.0)

    assert begun(turns, MINE, ACTIVE_S - 0.01) == 2


def test_an_idle_tenants_part_is_given_to_the_others():
    turns = Turns(4)
    begun(turns, THEIRS, 0)
    for _ in range(4):
        turns.end(THEIRS, 1.0)

    assert begun(turns, MINE, ACTIVE_S) == 4


def test_who_is_still_at_it_keeps_its_part_however_long_it_takes():
    """An import of ten seconds does not make its tenant idle."""
    turns = Turns(4)
    turns.begin(THEIRS, 1.0, 0)

    assert begun(turns, MINE, 100 * ACTIVE_S) == 2
    assert begun(turns, THEIRS, 100 * ACTIVE_S) == 1


def test_the_work_of_one_does_not_keep_another_active():
    """Each has a time of its own, whoever asks."""
    turns = Turns(6)
    for tenant in (OTHERS, THEIRS):
        turns.begin(tenant, 1.0, 0)
        turns.end(tenant, 1.0)
    turns.begin(THEIRS, 1.0, ACTIVE_S / 2)
    turns.end(THEIRS, 1.0)

    assert begun(turns, MINE, ACTIVE_S) == 3
    assert begun(turns, MINE, 1.5 * ACTIVE_S) == 3


def test_asking_changes_nothing():
    """Who is only asked about wants nothing of the others' part."""
    turns = Turns(4)
    turns.begin(MINE, 1.0, 0)
    for _ in range(10):
        assert turns.may(THEIRS, 1.0, 0)

    assert begun(turns, MINE, 0) == 3
    assert turns.under_way(THEIRS) == 0


# ---- laws ---------------------------------------------------------------------------------------


@given(st.sampled_from((0.5, 1, 2, 3.5, 8)), STEPS)
@example(2, [(MINE, 1.0, False, 0.0), (MINE, 1.0, False, 0.0), (THEIRS, 1.0, False, 0.0)])
def test_what_is_over_the_limit_is_one_piece_a_tenant(
    most: float, steps: list[tuple[str, float, bool, float]]
):
    """Whoever has more than one piece has had room for them, in all and in its own part."""
    played = Played(most)
    for step in steps:
        began = played.step(*step)
        pieces = played.under_way[step[0]]
        total = sum(map(played.of, played.under_way))
        further = sum(
            w for each in played.under_way.values() for w, is_further in each if is_further
        )

        assert further <= most + ROUNDING
        assert len(pieces) < 2 or played.of(step[0]) <= most + ROUNDING
        if began and pieces[-1][1]:
            assert total <= most + ROUNDING


@given(st.sampled_from((0.5, 1, 2, 8)), STEPS)
def test_nobody_with_nothing_under_way_is_ever_refused(
    most: float, steps: list[tuple[str, float, bool, float]]
):
    """However much the others have under way, and whatever it wants."""
    played = Played(most)
    for step in steps:
        began = played.step(*step)

        assert began or played.under_way[step[0]]


@given(st.sampled_from((0.5, 1, 2, 8)), STEPS)
def test_what_has_begun_and_ended_leaves_nothing_behind(
    most: float, steps: list[tuple[str, float, bool, float]]
):
    """In any order, and though weights are no whole numbers: it is as if nothing had been."""
    played = Played(most)
    for step in steps:
        played.step(*step)
        for tenant in played.under_way:
            assert played.turns.under_way(tenant) == pytest.approx(played.of(tenant), abs=ROUNDING)
    played.end_all()
    later, fresh = played.now + 2 * ACTIVE_S, Turns(most)

    assert (played.turns._under_way, played.turns._total) == ({}, 0)
    for tenant, weight in [(MINE, 0.5), (THEIRS, 1.0), (MINE, 0.25), (MINE, 1.0)]:
        assert played.turns.may(tenant, weight, later) == fresh.may(tenant, weight, later)
        played.turns.begin(tenant, weight, later)
        fresh.begin(tenant, weight, later)


@given(st.sampled_from((1, 2, 8)), STEPS)
def test_an_idle_tenant_is_forgotten_and_its_part_comes_back(
    most: float, steps: list[tuple[str, float, bool, float]]
):
    """When everybody else has been still for so long, who is left has all of it."""
    played = Played(most)
    for step in steps:
        played.step(*step)
    played.end_all()

    assert begun(played.turns, MINE, played.now + 2 * ACTIVE_S) == most


@given(st.sampled_from((1, 2, 8)), STEPS)
def test_the_oldest_activity_comes_first_whatever_happens(
    most: float, steps: list[tuple[str, float, bool, float]]
):
    """So that looking for the idle ends with the first that is not."""
    played = Played(most)
    for step in steps:
        played.step(*step)

        assert all(a <= b for a, b in pairwise(played.turns._active.values()))
