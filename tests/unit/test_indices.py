"""Sets of indices: what they hold, how they are written, and how large they get."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dayfly_pool.batch.indices import INDEX_MAX, INTERVALS_SHOWN, IndexSet, parse, up_to
from dayfly_pool.errors import BadInput

INDICES = st.integers(0, 300)


def made(indices: set[int]) -> IndexSet:
    found = IndexSet(300)
    for index in indices:
        found.add(index)
    return found


@given(st.sets(INDICES), INDICES)
def test_it_holds_what_was_put_in_and_nothing_else(indices: set[int], other: int) -> None:
    found = made(indices)
    assert list(found) == sorted(indices)
    assert len(found) == len(indices)
    assert (other in found) == (other in indices)


@given(st.lists(st.tuples(INDICES, INDICES).map(sorted), max_size=8), st.sets(INDICES))
def test_a_range_is_the_same_as_each_of_its_indices(
    ranges: list[list[int]], before: set[int]
) -> None:
    found, expected = made(before), set(before)
    for low, high in ranges:
        found.add_range(low, high)
        expected |= set(range(low, high + 1))
        assert len(found) == len(expected)
    assert found == made(expected)


@given(st.sets(INDICES, min_size=1))
def test_what_it_is_written_as_is_read_as_the_same(indices: set[int]) -> None:
    found = made(indices)
    assert parse(str(found)) == found


@given(st.sets(INDICES, min_size=1))
def test_intervals_never_touch(indices: set[int]) -> None:
    pairs = list(made(indices).intervals())
    assert all(high + 1 < low for (_, high), (low, _) in pairwise(pairs))


@given(st.sets(INDICES))
def test_what_was_packed_is_unpacked(indices: set[int]) -> None:
    found = IndexSet(300)
    found.unpack(made(indices).packed())
    assert found == made(indices)
    assert len(found) == len(indices)


def test_a_packed_set_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="bytes where"):
        IndexSet(10).unpack(IndexSet(10_000_000 - 1).packed())
    with pytest.raises(ValueError, match="header"):
        IndexSet(10).unpack(b"nothing packed")


def test_it_is_written_as_kubernetes_writes_it() -> None:
    assert str(parse(" 1, 3,6 - 9,7 ")) == "1,3,6-9"


def test_one_that_was_there_is_not_counted_again() -> None:
    found = IndexSet(9)
    assert found.add(9)
    assert not found.add(9)
    assert len(found) == 1


def test_the_largest_job_takes_a_bit_an_index_however_it_is_scattered() -> None:
    found = IndexSet(INDEX_MAX)
    for index in range(0, INDEX_MAX, 1000):
        found.add(index)
    assert str(found).endswith(f"{1000 * (INTERVALS_SHOWN - 1)},...")
    assert len(up_to(INDEX_MAX + 1)) == INDEX_MAX + 1
    assert len(found._bits) == (INDEX_MAX + 1) // 8


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "'' is no index: write them like 1,3,6-9"),
        ("1,,2", "'' is no index"),
        ("-3", "'-3' is no index"),
        ("1;2", "'1;2' is no index"),
        ("٣", "is no index"),
        ("9-6", "'9-6' ends before it begins: write 6-9"),
        ("10000000", "index 10000000 is over the largest, 9999999"),
        ("1," * (1 << 20), "over 1048576 characters"),
    ],
)
def test_what_is_no_set_of_indices_is_refused(text: str, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        parse(text)


@pytest.mark.parametrize("size", [0, -1, 10_000_001])
def test_a_job_has_one_to_ten_million_indices(size: int) -> None:
    with pytest.raises(BadInput, match=f"a job has 1 to 10000000 indices, not {size}"):
        up_to(size)
