"""Which shard has which function: everybody says the same, and little moves."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dayfly_pool.cluster.members import Address, Fixed, parsed
from dayfly_pool.cluster.shards import (
    HOLD_S,
    ORDERS_MAX,
    SHARE,
    Ring,
    Spread,
    choose,
    first,
    order,
    score,
)
from dayfly_pool.errors import BadInput
from dayfly_pool.models import FunctionId

FUNCTIONS = [FunctionId(f"team-{n % 7}/function-{n}") for n in range(2000)]
names = st.sets(st.text(min_size=1, max_size=12), min_size=1, max_size=12)


def shards(number: int) -> list[str]:
    return [f"dayfly-pool-{n}" for n in range(number)]


def moved(before: list[str], after: list[str], functions: list[FunctionId]) -> int:
    """How many functions belong to another shard *after* than *before*."""
    return sum(first(function, before) != first(function, after) for function in functions)


@given(st.text(), names)
def test_everybody_who_sees_the_same_shards_says_the_same(name: str, live: set[str]):
    """The order in which they are seen does not matter, and each is there once."""
    function = FunctionId(name)
    found = order(function, sorted(live))

    assert found == order(function, sorted(live, reverse=True))
    assert sorted(found) == sorted(live)
    assert first(function, live) == found[0]


@given(st.text(), names, st.text(max_size=12))
def test_a_shard_that_comes_changes_nothing_among_the_others(name: str, live: set[str], new: str):
    function = FunctionId(name)
    with_it = order(function, live | {new})

    assert [s for s in with_it if s != new] == order(function, live - {new})


@pytest.mark.parametrize("number", [1, 2, 4, 10, 100])
def test_a_shard_that_joins_or_leaves_moves_little_more_than_its_share(number: int):
    """1.2 times the minimum at most, by simulation; `python -m bench.shards` has more of it."""
    functions = FUNCTIONS if number < 100 else [FunctionId(f"a/{n}") for n in range(10_000)]
    before, after = shards(number), shards(number + 1)
    mine = sum(first(f, after) == after[-1] for f in functions)

    assert moved(before, after, functions) == mine  # no more than what the new one has
    assert mine <= 1.2 * len(functions) / len(after)
    assert moved(after, before, functions) == mine


def test_the_functions_are_shared_out_evenly():
    counts = Counter(first(function, shards(10)) for function in FUNCTIONS)

    assert len(counts) == 10
    assert max(counts.values()) < 1.25 * len(FUNCTIONS) / 10


def test_the_score_is_what_it_always_was():
    """Gateways and shards of two releases live side by side: another score would move all."""
    assert score(FunctionId("default/hello"), "dayfly-pool-0") == 4859677581753759254


def test_no_shard_has_no_first():
    assert first(FunctionId("a/b"), []) is None


def test_a_ring_remembers_until_its_shards_change():
    ring, function = Ring(shards(3)), FUNCTIONS[0]
    before = ring.order(function)

    assert ring.order(function) is before
    assert not ring.become(reversed(shards(3)))
    assert ring.order(function) is before
    assert ring.become([s for s in shards(3) if s != before[0]])
    assert ring.order(function) == before[1:]


def test_a_ring_forgets_what_strangers_make_up():
    ring = Ring(shards(1))
    for number in range(ORDERS_MAX + 10):
        ring.order(FunctionId(str(number)))

    assert len(ring._orders) <= ORDERS_MAX


def test_a_hot_function_widens_at_once_and_narrows_late():
    spread, hot = Spread(), FUNCTIONS[0]

    def width(under_way: int, now: float) -> int:
        return spread.width(hot, under_way, 1000, now)

    assert [width(SHARE - 1, 0), width(SHARE, 0), width(5 * SHARE, 0)] == [1, 2, 6]
    assert width(0, 1) == 6
    assert width(0, HOLD_S) == 6
    assert width(5 * SHARE, HOLD_S + 0.5) == 6  # it was needed again: the time begins anew
    assert width(0, HOLD_S + 2) == 6
    assert width(0, 2 * HOLD_S + 2) == 1
    assert not len(spread)  # what is not hot costs nothing


@pytest.mark.parametrize(("places", "widest"), [(1, 1), (2 * SHARE - 1, 1), (3 * SHARE, 3)])
def test_a_function_that_may_not_run_often_is_not_spread(places: int, widest: int):
    assert Spread().width(FUNCTIONS[0], 10_000, places, 0) == widest


def test_of_the_first_few_the_one_with_the_fewest_is_chosen():
    assert choose(["a", "b", "c"], 1, {"a": 9}) == "a"
    assert choose(["a", "b", "c"], 2, {"a": 9, "b": 3}) == "b"
    assert choose(["a", "b", "c"], 3, {"a": 1, "b": 1, "c": 1}) == "a"
    assert choose(["a"], 3, {}) == "a"


# ---- those that are named ------------------------------------------------------------------------


def test_shards_are_named_with_their_addresses():
    members = Fixed.parse(("a=10.0.0.1:8090", "b=[::1]:1"))

    assert members.current() == {"a": Address("10.0.0.1", 8090), "b": Address("::1", 1)}


@pytest.mark.parametrize("text", ["a", "a=", "=h:1", "a=h", "a=h:", "a=:1", "a=h:0", "a=h:70000"])
def test_a_shard_without_name_or_address_is_refused(text: str):
    with pytest.raises(BadInput, match="give NAME=HOST:PORT"):
        Fixed.parse((text,))


def test_a_shard_that_is_named_twice_is_refused():
    with pytest.raises(BadInput, match="twice"):
        Fixed.parse(("a=h:1", "a=h:2"))


@given(st.text())
def test_whatever_is_no_address_is_none(text: str):
    found = parsed(text)

    assert found is None or 0 < found.port < 65536
