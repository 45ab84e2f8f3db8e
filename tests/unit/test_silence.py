"""Who has gone silent, by our own clock."""

from dayfly_pool.silence import Silence


def test_who_is_silent_is_told_by_our_own_clock():
    silence = Silence("us")
    assert silence.over({"us": 1, "other": 7}, 100.0) == []
    assert silence.over({"us": 1, "other": 8}, 109.0) == []
    assert silence.over({"us": 1, "other": 8}, 118.9) == []

    assert silence.over({"us": 1, "other": 8}, 119.0) == ["other"]


def test_who_was_forgotten_and_comes_again_is_not_silent_at_once():
    silence = Silence("us")
    assert silence.over({"us": 1, "other": 8}, 100.0) == []
    assert silence.over({"us": 1}, 105.0) == []

    assert silence.over({"us": 1, "other": 8}, 120.0) == []
