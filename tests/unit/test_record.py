"""Records: the guest's cheap stand-in for dataclasses."""

import pytest

from dayfly.record import Record


class Point(Record):
    x: int
    y: int = 0


class Place(Record):
    x: int
    y: int = 0


def test_fields_are_given_by_name_and_defaults_fill_the_rest():
    point = Point(x=1)

    assert (point.x, point.y) == (1, 0)


@pytest.mark.parametrize("values", [{}, {"y": 1}, {"x": 1, "z": 2}])
def test_missing_and_unknown_fields_are_refused(values: dict[str, int]):
    """A message with a misspelt field must not travel."""
    with pytest.raises(TypeError, match="Point: missing or unknown"):
        Point(**values)


def test_records_are_equal_when_kind_and_fields_are():
    assert Point(x=1) == Point(x=1, y=0)
    assert Point(x=1) != Point(x=2)
    assert Point(x=1) != Place(x=1)


def test_a_record_cannot_be_a_key():
    """Its fields may change, so its hash would."""
    with pytest.raises(TypeError, match="unhashable"):
        hash(Point(x=1))


def test_a_record_shows_its_fields():
    assert repr(Point(x=1)) == "Point(y=0, x=1)"


def test_a_record_can_be_made_of_fields_that_were_checked_before():
    """The wire checks every field; to do it twice costs every invocation."""
    assert Point.of({"x": 1, "y": 0}) == Point(x=1)
