"""The tree of a run in the terminal: it fits, and shows first what matters most."""

import contextlib
import io
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from dayfly_gateway import run_tree
from dayfly_gateway.run_tree import changes, drawn, lines, print_once, watch
from dayfly_gateway.run_views import MARKS, RunView, StepView

BEGAN = 1_795_441_200.0
HOSTILE = "\x1b[2J\r\n\x00\u202eevil\n漢"


def step(key: str, state: str = "succeeded", length_s: float = 0.0, **given: Any) -> StepView:
    view: StepView = {"key": key, "name": key.rpartition("/")[2], "state": state, **given}
    if length_s:
        view["beganAt"] = BEGAN
        if state in ("succeeded", "failed", "cancelled"):
            view["endedAt"] = BEGAN + length_s
    return view


def run(*children: StepView, state: str = "open") -> RunView:
    root = step("", state, children=list(children), beganAt=BEGAN)
    return {
        "namespace": "default",
        "name": "r1",
        "workflow": "forecast",
        "now": BEGAN + 10,
        "tree": root,
    }


def fan(key: str, number: int, **states: str) -> StepView:
    instances = [step(f"{key}[{n}]", states.get(f"i{n}", "succeeded")) for n in range(number)]
    return step(key, "open", of=number, children=instances)


def names(view: RunView, height: int = 100) -> list[str]:
    return [line.name for line in lines(view, height)][1:]


def text(view: RunView, width: int = 100, height: int = 100) -> str:
    return drawn(view, width, height).plain


# ---- what is shown ------------------------------------------------------------------------------


def test_a_step_says_how_it_went():
    view = run(step("fit", "succeeded", 1.5, start="forked", bytesMoved=1 << 20))

    assert text(view).splitlines()[1].split(maxsplit=3) == [
        "└", "✓", "fit", "1.50 s, forked, 1.0 MiB"]  # fmt: skip


def test_a_step_that_was_cached_or_failed_says_so():
    view = run(
        step("a", wasCached=True),
        step("b", "failed", 2, retries=2, attempt=3, reason=["Raised", "ValueError: no"]),
    )

    assert "✓ a" in text(view)
    assert "cached" in text(view)
    assert "failed, 2.00 s, attempt 3, Raised: ValueError: no" in text(view)


def test_what_is_inside_of_a_step_is_below_it():
    view = run(step("a", children=[step("a/b"), step("a/c")]), step("d"))
    found = [line.rstrip() for line in text(view).splitlines()[1:]]

    assert found == ["├ ✓ a", "│ ├ ✓ b", "│ └ ✓ c", "└ ✓ d"]


def test_the_first_line_sums_up_the_run():
    view = run(step("a"), step("b", "running", 1), step("c", "waiting"))

    assert "10.0 s, 1 running, 1 succeeded, 1 waiting" in text(view).splitlines()[0]


# ---- what does not fit --------------------------------------------------------------------------


def test_instances_that_are_over_are_summed_up_first():
    view = run(fan("m", 50, i7="failed", i8="running"), step("end", "waiting"))

    assert names(view, 10) == ["m", "m[7]", "m[8]", "48 succeeded", "end"]


def test_what_is_inside_of_what_is_over_goes_next():
    done = step("a", children=[step(f"a/{n}") for n in range(5)])
    going = step("b", "open", children=[step(f"b/{n}") for n in range(2)])

    assert names(run(done, going), 6) == ["a", "b", "0", "1"]


def test_steps_that_succeeded_go_before_those_that_wait():
    done = [step(f"d{n}") for n in range(5)]
    later = [step(f"w{n}", "waiting") for n in range(3)]

    assert names(run(*done, *later), 6) == ["w0", "w1", "w2", "5 succeeded"]
    assert names(run(*done, *later, step("x", "running", 1)), 4) == ["x", "5 succeeded, 3 waiting"]


def test_when_nothing_fits_what_failed_is_seen():
    many = [step(f"r{n}", "running", 1) for n in range(50)]
    view = run(*many, step("bad", "failed", 1))

    assert names(view, 4) == ["bad", "r0", "49 running"]


def steps_of(inner: Any) -> Any:
    return st.builds(
        lambda key, state, of, children: step(key, state, 1.0, of=of, children=children),
        st.text(max_size=30) | st.just(HOSTILE),
        st.sampled_from([*MARKS, "waiting"]),
        st.integers(0, 20),
        inner,
    )


@given(
    st.lists(
        st.recursive(
            steps_of(st.just([])),
            lambda inner: steps_of(st.lists(inner, max_size=5)),
            max_leaves=15,
        ),
        max_size=6,
    ),
    st.integers(10, 120),
    st.integers(1, 30),
)
@settings(max_examples=40, deadline=None)
def test_a_tree_never_needs_more_room_than_there_is(
    children: list[StepView], width: int, height: int
):
    """Or the terminal would scroll, and could not be drawn over."""
    found = text(run(*children), width, height).split("\n")

    assert len(found) <= height
    assert all(cell_len(line) <= width for line in found)
    assert not set("\x1b\r\x00\u202e") & set("".join(found))


def test_a_tree_of_many_is_drawn_only_in_part():
    view = run(*(step(f"s{n}", "running", 1) for n in range(run_tree.NODES_MAX + 10)))

    assert len(lines(view, 1_000_000)) <= run_tree.NODES_MAX + 1


# ---- as it goes on ------------------------------------------------------------------------------


def test_without_a_terminal_each_change_is_a_line_and_nothing_is_said_twice(
    capsys: pytest.CaptureFixture[str],
):
    a, b = step("a", "running", 1), step("b", "waiting")
    then = run(step("a", "succeeded", 1, start="warm"), step("b", "running", 1))
    end = run(step("a", "succeeded", 1, start="warm"), step("b", "failed", 2, reason=["Raised"]))
    last = watch(iter([run(a, b), run(a, b), then, end]))
    said = [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()]

    assert last is end
    assert said == [
        "▶ a  running, 10.0 s",
        "▶ b  running, 10.0 s",
        "✓ a  succeeded, 1.00 s, warm",
        "✗ b  failed, 2.00 s, Raised",
        "open, 10.0 s, 1 failed, 1 succeeded",
    ]


def test_another_attempt_is_a_change():
    told: dict[str, tuple[str, int]] = {}
    first = [*changes(told, run(step("a", "running", 1, attempt=1)))]
    second = [*changes(told, run(step("a", "running", 1, attempt=2, retries=1)))]

    assert len(first) == len(second) == 1
    assert "attempt 2" in second[0]


def test_a_line_of_a_change_is_one_line_whatever_is_in_it():
    (line,) = changes({}, run(step(HOSTILE, "failed", 1, reason=[HOSTILE, HOSTILE])))

    assert not set("\x1b\r\n\x00\u202e") & set(line)


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        """So it says."""
        return True


def test_on_a_terminal_it_is_drawn_over_itself(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "20")
    terminal = Terminal()
    with contextlib.redirect_stdout(terminal):
        watch(iter([run(step("a", "running", 1)), run(step("a", "succeeded", 1))]))

    assert "▶ a" in terminal.getvalue()
    assert "✓ a" in terminal.getvalue()
    assert "\x1b[1A" in terminal.getvalue()


def test_printed_once_it_is_text_for_other_programs(capsys: pytest.CaptureFixture[str]):
    print_once(run(step("a", "failed", 1)))
    out = capsys.readouterr().out

    assert "└ ✗ a" in out
    assert "\x1b" not in out
