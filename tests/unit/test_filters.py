"""Filters: CEL over CloudEvents."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dayfly_gateway.triggers.filters import Filter, FilterFailed
from dayfly_pool.errors import BadInput

EVENT: dict[str, Any] = {
    "id": "1",
    "type": "order",
    "subject": "shop/7",
    "data": {"total": 42, "items": [{"n": 1}]},
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ('event.type == "order"', True),
        ('event.type == "refund"', False),
        ("event.data.total > 40 && event.data.items[0].n == 1", True),
        ("has(event.data.coupon) && event.data.coupon.value > 1", False),
        ('event.subject.startsWith("shop/")', True),
        ('event.subject.matches("^shop/[0-9]+$")', True),
        ('event.type in ["order", "refund"]', True),
    ],
)
def test_a_filter_says_whether_the_event_is_meant(text: str, expected: bool):
    assert Filter(text).matches(EVENT, 100) is expected


@pytest.mark.parametrize(
    "text",
    [
        "size([event.type].map(b, b + b).map(b, b + b)[0]) == 20",
        'event.type + event.type == "x"',
        "size([1] + [2]) == 2",
        "event.data.items.map(item, [item, item]) == []",
        "event.data.items.map(item, true, [item, item]) == []",
        "event.data.items.filter(item, true) == []",
        'bytes(event.type) == b"order"',
    ],
)
def test_nothing_larger_is_made_of_an_event_than_it_is(text: str):
    """Twenty doublings of a thousand characters are a gigabyte, and the end of the server."""
    with pytest.raises(BadInput, match="undeclared reference"):
        Filter(text)


@pytest.mark.parametrize("text", ["event.type ==", "type == 'order'", "\0", "(" * 4000, "event."])
def test_what_is_no_expression_is_refused_with_the_reason(text: str):
    with pytest.raises(BadInput, match="filter: "):
        Filter(text)


@pytest.mark.parametrize(
    "text",
    [
        "event.nope == 1",
        "event.type",
        "event.data.total - 1",
        "1 / 0 == 1",
        'event.data.total.startsWith("x")',
        "event.many.all(a, event.many.all(b, event.many.all(c, a - b - c <= a)))",
    ],
)
def test_an_expression_without_a_value_for_the_event_fails_and_nothing_else(text: str):
    with pytest.raises(FilterFailed):
        Filter(text).matches(EVENT | {"many": list(range(200))}, 1000)


@given(st.dictionaries(st.text(), JSON))
def test_no_event_breaks_a_filter(event: dict[str, Any]):
    found = Filter('has(event.data) && event.data == event.data || event.type == "x"')
    try:
        assert found.matches(event, 100) in (True, False)
    except FilterFailed:
        pass


def test_the_data_of_a_long_event_is_not_shown_and_its_attributes_are():
    """A step of an evaluation may search all of it, and there may be thousands."""
    assert Filter('event.type == "order"').matches(EVENT, 10_000_000)
    with pytest.raises(FilterFailed):
        Filter("event.data.total > 1").matches(EVENT, 10_000_000)


def test_no_regular_expression_is_tried_for_each_of_many():
    with pytest.raises(BadInput, match="matches"):
        Filter('event.data.items.exists(i, i.name.matches("(a|b)*c"))')
