"""What functions write, kept and followed: bounded, and harmless to a terminal."""

import asyncio
import re
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dayfly_pool.logs import (
    FOLLOWER_LINES_MAX,
    FOLLOWERS_MAX,
    LINE_CHARACTERS_MAX,
    LINES_MAX,
    Logs,
    clean,
)
from dayfly_pool.models import FunctionId, LogLine

GREET, SHOUT = FunctionId("default/greet"), FunctionId("default/shout")


def line(text: str, function: FunctionId = GREET) -> LogLine:
    return LogLine(1.0, function, "sb-1", "i1", "stdout", text)


def written(number: int, function: FunctionId = GREET) -> Logs:
    logs = Logs()
    for n in range(number):
        logs.write(line(str(n), function))
    return logs


def texts(lines: list[LogLine]) -> list[str]:
    return [line.text for line in lines]


# ---- clean --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ü 日本 😀", "plain ü 日本 😀"),
        ("a\tb", "a\tb"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\rb", r"a\x0db"),
        ("a\x9b2J", r"a\x9b2J"),  # CSI in one character
        ("a\x85b\u2028c\u2029d", r"a\x85b\x2028c\x2029d"),
        ("\0\x7f", r"\x00\x7f"),
    ],
)
def test_control_characters_are_shown_and_not_obeyed(text: str, shown: str):
    """Whoever reads a log must not have his terminal written on by whoever wrote it."""
    assert clean(text) == shown


@given(st.text(max_size=200))
def test_no_text_can_forge_a_second_line(text: str):
    assert len(clean(text).splitlines()) <= 1
    assert not re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]", clean(text))


def test_a_long_line_is_cut():
    assert clean("x" * (LINE_CHARACTERS_MAX + 1)) == "x" * LINE_CHARACTERS_MAX + " [cut]"
    assert clean("x" * LINE_CHARACTERS_MAX) == "x" * LINE_CHARACTERS_MAX
    assert len(clean("\0" * 10**5)) < LINE_CHARACTERS_MAX + 10


# ---- kept ---------------------------------------------------------------------------------------


def test_the_last_lines_are_told_oldest_first():
    logs = written(5)

    assert texts(logs.tail(GREET, 3)) == ["2", "3", "4"]
    assert texts(logs.tail(GREET, 100)) == ["0", "1", "2", "3", "4"]
    assert logs.tail(GREET, 0) == []
    assert logs.tail(GREET, -1) == []


async def test_the_lines_of_some_invocations_are_found_and_followed():
    """As many of these as were asked for, whatever others have written since."""
    logs = Logs()
    for n in range(9):
        logs.write(LogLine(1.0, GREET, "sb-1", f"job-{n % 3}-0", "stdout", str(n)))
    async with aclosing(logs.follow(GREET, 1, "job-1-")) as following:
        first = (await anext(following)).text
        for n in (2, 1):
            logs.write(LogLine(1.0, GREET, "sb-1", f"job-{n}-1", "stdout", f"new {n}"))

        assert (first, (await anext(following)).text) == ("7", "new 1")
    assert texts(logs.tail(GREET, 3, "job-1-")) == ["4", "7", "new 1"]


def test_functions_do_not_see_each_others_lines():
    logs = written(2)

    assert logs.tail(SHOUT, 10) == []


def test_a_function_keeps_a_thousand_lines():
    """One that writes without end holds no more memory than that."""
    logs = written(LINES_MAX + 5)

    assert len(logs.tail(GREET, 10**6)) == LINES_MAX
    assert texts(logs.tail(GREET, LINES_MAX))[0] == "5"


def test_a_deleted_function_leaves_nothing():
    logs = written(5)
    logs.forget(GREET)
    logs.forget(GREET)

    assert logs.tail(GREET, 10) == []
    assert logs._lines == {}


# ---- followed -----------------------------------------------------------------------------------


async def test_a_follower_gets_the_last_lines_and_then_every_new_one():
    logs = written(3)
    async with aclosing(logs.follow(GREET, 2)) as following:
        first = [(await anext(following)).text for _ in range(2)]
        logs.write(line("new"))
        logs.write(line("other", SHOUT))
        logs.write(line("newer"))

        assert first == ["1", "2"]
        assert [(await anext(following)).text for _ in range(2)] == ["new", "newer"]


async def test_a_line_written_while_the_tail_is_read_is_told_once():
    logs = written(2)
    async with aclosing(logs.follow(GREET, 10)) as following:
        first = (await anext(following)).text
        logs.write(line("2"))

        assert [first] + [(await anext(following)).text for _ in range(2)] == ["0", "1", "2"]


async def test_a_follower_waits_for_a_function_that_has_written_nothing_yet():
    logs = Logs()
    async with aclosing(logs.follow(GREET, 10)) as following:
        waiting = asyncio.ensure_future(anext(following))
        await asyncio.sleep(0)
        logs.write(line("first"))

        assert (await waiting).text == "first"


async def test_a_slow_follower_loses_lines_and_holds_up_nobody():
    logs = Logs()
    async with aclosing(logs.follow(GREET, 1)) as following:
        logs.write(line("before"))
        await anext(following)
        for n in range(FOLLOWER_LINES_MAX + 10):
            logs.write(line(str(n)))
        (queue,) = logs._followers[GREET]

        assert queue.qsize() == FOLLOWER_LINES_MAX
        assert (await anext(following)).text == "0"


async def test_a_follower_that_leaves_leaves_nothing():
    logs = written(1)
    async with aclosing(logs.follow(GREET, 1)) as following:
        await anext(following)

    assert logs._followers == {}


async def test_followers_are_limited():
    """The one too many ends at once; the others go on."""
    logs = written(1)
    following = [logs.follow(GREET, 1) for _ in range(FOLLOWERS_MAX + 1)]
    for each in following[:-1]:
        await anext(each)

    assert [line async for line in following[-1]] == []
    for each in following:
        await each.aclose()
    assert logs._followers == {}
