"""A run's timeline: what is drawn lies where it should, and strangers' words stay words."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dayfly_gateway import timeline
from dayfly_gateway.run_views import (
    RunView,
    StepView,
    attempts_of,
    counted,
    duration,
    leaves,
    run_view,
    size,
    step_view,
)
from dayfly_gateway.timeline import BINS, INSTANCES_SHOWN, chart, critical, page, svg
from dayfly_pool.workflow.engine import Run
from dayfly_pool.workflow.facts import Ended, Fact, Failed, Report, RunBegan, Started
from dayfly_pool.workflow.model import Matrix, Step, WorkflowSpec
from dayfly_pool.workflow.plan import Definition
from dayfly_pool.workflow.tree import Shown

BEGAN = 1_795_441_200.0
SVG = "{http://www.w3.org/2000/svg}"
STATES = ("succeeded", "failed", "running", "skipped", "cancelled", "waiting", "asked", "expecting",
          "delayed", "not run", "stopping", "open")  # fmt: skip
HOSTILE = "</text></svg><script>alert(1)</script>\"'&\x00\x1b[2J\ud800\u202e漢" * 3


def step(key: str, state: str = "succeeded", times: Any = (), **given: Any) -> StepView:
    """*times*: asked, began, ended, in seconds since the run began."""
    names = ("askedAt", "beganAt", "endedAt")
    at = {name: BEGAN + second for name, second in zip(names, times, strict=False)}
    view: StepView = {"key": key, "name": key.rpartition("/")[2], "state": state, **at, **given}
    return view


def run(*children: StepView, length_s: float = 10.0, state: str = "succeeded") -> RunView:
    root = step("", state, (0, 0, length_s), children=list(children))
    return {
        "namespace": "default",
        "name": "r1",
        "workflow": "forecast",
        "now": BEGAN + length_s,
        "tree": root,
    }


def fan(key: str, number: int, **states: str) -> StepView:
    """Instances that begin a tenth of a second after one another, and take a second."""
    instances = [
        step(f"{key}[{n}]", states.get(f"i{n}", "succeeded"), (n / 10, n / 10, n / 10 + 1))
        for n in range(number)
    ]
    return step(key, "failed" if states else "succeeded", (0, 0, number / 10 + 1),
                of=number, children=instances)  # fmt: skip


def labels(view: RunView) -> list[str]:
    return [row.label for row in chart(view).rows]


def bars(view: RunView, number: int = 0) -> list[tuple[str, float, float]]:
    return [
        (bar.kind, round(bar.start, 3), round(bar.end, 3)) for bar in chart(view).rows[number].bars
    ]


# ---- what is drawn ------------------------------------------------------------------------------


def test_a_step_waits_then_starts_then_runs():
    view = run(step("a", times=(1, 1.5, 4), start="forked"))

    assert bars(view) == [("waiting", 0, 1), ("starting", 1, 1.5), ("succeeded", 1.5, 4)]


def test_each_attempt_is_a_bar_and_between_them_it_waits():
    failed = {"attempt": 1, "state": "failed", "beganAt": BEGAN + 1, "endedAt": BEGAN + 2}
    view = run(step("a", times=(5, 5.5, 6), attempt=2, retries=1, attempts=[failed]))

    assert bars(view) == [
        ("waiting", 0, 1),
        ("failed", 1, 2),
        ("delayed", 2, 5),
        ("starting", 5, 5.5),
        ("succeeded", 5.5, 6),
    ]


def test_what_came_from_the_cache_took_no_time():
    assert bars(run(step("a", times=(1, 0, 1), wasCached=True)))[-1] == ("cached", 1, 1)


def test_what_is_under_way_goes_on_until_now():
    view = run(step("a", "running", (1, 2)), step("b", "expecting", (3,)), step("c", "asked", (4,)))

    assert bars(view, 0)[-1] == ("running", 2, 10)
    assert bars(view, 1)[-1] == ("expecting", 3, 10)
    assert bars(view, 2)[-1] == ("starting", 4, 10)


def test_what_has_not_had_its_turn_has_no_bar():
    assert bars(run(step("a", "waiting"))) == []


def test_rows_of_a_nested_workflow_are_inside_of_its_own():
    inner = step("a", times=(0, 0, 5), children=[step("a/b", times=(0, 1, 5))])
    rows = chart(run(inner, step("c", times=(5, 5, 6)))).rows

    assert [(row.label, row.depth) for row in rows] == [("✓ a", 0), ("✓ b", 1), ("✓ c", 0)]


def test_a_small_matrix_has_a_row_for_each_instance():
    assert len(labels(run(fan("m", INSTANCES_SHOWN)))) == INSTANCES_SHOWN + 1


def test_a_large_matrix_is_summed_up_with_what_failed_and_what_was_critical():
    view = run(fan("m", 1000, i7="failed", i400="failed"), length_s=101)
    rows = chart(view).rows

    assert rows[0].note == "2 failed, 998 succeeded"
    assert {"✗ m[7]", "✗ m[400]", "✓ m[999]"} <= set(labels(view))
    assert len(rows) < 20


def test_amounts_are_how_many_ran_at_a_time():
    """Ten at a time, in the middle."""
    row = chart(run(fan("m", 1000), length_s=101)).rows[0]

    assert len(row.amounts) == BINS
    assert 10 <= row.amounts[BINS // 2] <= 16
    assert row.amounts[0] < row.amounts[BINS // 2] > row.amounts[-1]


def test_rows_have_an_end_and_the_others_are_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timeline, "ROWS_MAX", 10)
    view = run(*(step(f"s{n}", times=(n, n, n + 1)) for n in range(25)), length_s=25)

    assert len(chart(view).rows) == 10
    assert "and 15 more rows" in svg(view)


def test_the_critical_path_goes_back_from_the_last_to_what_had_it_asked_for():
    a, b = step("a", times=(0, 0, 3)), step("b", times=(0, 0, 2))
    c, d = step("c", times=(3, 3.1, 7)), step("d", times=(2, 2, 4))
    end = step("end", times=(7, 7, 8))
    view = run(a, b, c, d, end, length_s=8)

    assert [each["key"] for each in critical(view["tree"], view["now"])] == ["a", "c", "end"]
    assert [row.is_critical for row in chart(view).rows] == [True, False, True, False, True]


def test_of_what_was_tried_again_the_first_attempt_counts_for_the_path():
    """What came before its last attempt was a failure of its own, and no other step."""
    failed = {"attempt": 1, "state": "failed", "beganAt": BEGAN + 3, "endedAt": BEGAN + 4}
    view = run(step("a", times=(0, 0, 3)), step("other", times=(0, 0, 5)),
               step("b", times=(6, 6, 9), attempts=[failed]))  # fmt: skip

    assert [each["key"] for each in critical(view["tree"], view["now"])] == ["a", "b"]


# ---- how it is drawn ----------------------------------------------------------------------------


def parsed(view: RunView) -> ET.Element:
    return ET.fromstring(svg(view))


def rectangles(root: ET.Element) -> Iterator[tuple[str, float, float, float, float]]:
    for rect in root.iter(f"{SVG}rect"):
        x, y, width, height = (float(rect.get(name, 0)) for name in ("x", "y", "width", "height"))
        yield rect.get("class", ""), x, y, x + width, y + height


def check_geometry(view: RunView) -> None:
    root = parsed(view)
    _, _, width, height = map(float, root.get("viewBox", "").split())
    for kind, left, top, right, bottom in rectangles(root):
        assert 0 <= left <= right <= width, kind
        assert 0 <= top <= bottom <= height, kind
    for number, group in enumerate(root.findall(f"{SVG}g")):
        top = timeline.HEAD + timeline.ROW * number
        for kind, left, upper, right, lower in rectangles(group):
            assert top <= upper <= lower <= top + timeline.ROW + 0.1, kind
            if kind != "band":
                assert left >= timeline.CHART_LEFT - 0.1, kind
                assert right <= timeline.CHART_RIGHT + 0.1, kind
        for text in group.findall(f"{SVG}text"):
            x, shown = float(text.get("x", 0)), text.text or ""
            end = timeline.CHART_LEFT if x < timeline.CHART_LEFT else width
            assert x + timeline.CHARACTER * len(shown) <= end + timeline.CHARACTER, shown
        for path in group.findall(f"{SVG}path"):
            for x in re.findall(r"[MLH](-?[\d.]+)", path.get("d", "")):
                assert timeline.CHART_LEFT - 0.1 <= float(x) <= timeline.CHART_RIGHT + 0.1


def test_bars_of_one_row_follow_one_another():
    failed = [{"attempt": n, "state": "failed", "beganAt": BEGAN + n, "endedAt": BEGAN + n + 0.5}
              for n in (1, 2, 3)]  # fmt: skip
    view = run(step("a", times=(5, 5.5, 6), attempt=4, attempts=failed))
    (row,) = chart(view).rows

    assert all(a.end <= b.start for a, b in zip(row.bars, row.bars[1:], strict=False))
    check_geometry(view)


times = st.lists(st.floats(-5, 20), min_size=0, max_size=3)
leaf = st.builds(
    lambda key, state, at, more: step(key, state, at, **more),
    st.text(max_size=40),
    st.sampled_from(STATES),
    times,
    st.fixed_dictionaries(
        {},
        optional={
            "wasCached": st.booleans(),
            "bytesMoved": st.integers(0, 2**60),
            "start": st.sampled_from(["warm", HOSTILE]),
            "reason": st.lists(st.text(max_size=20), max_size=2),
            "retries": st.integers(0, 3),
            "of": st.integers(0, 30),
            "attempts": st.lists(
                st.fixed_dictionaries(
                    {
                        "attempt": st.integers(1, 3),
                        "state": st.sampled_from(STATES),
                        "beganAt": st.floats(-5, 20).map(lambda at: BEGAN + at),
                        "endedAt": st.floats(-5, 20).map(lambda at: BEGAN + at),
                    }
                ),
                max_size=3,
            ),
        },
    ),
)
trees = st.recursive(
    leaf,
    lambda inner: st.builds(
        lambda view, children: {**view, "children": children},
        leaf,
        st.lists(inner, max_size=15),
    ),
    max_leaves=20,
)


@given(st.lists(trees, max_size=4))
@settings(max_examples=25, deadline=None)
def test_whatever_a_run_was_like_it_is_drawn_inside_of_its_frame(children: list[Any]):
    """Clocks that jumped, times that are missing, names of anything: it parses, and fits."""
    check_geometry(run(*children))


def test_nothing_of_strangers_becomes_markup():
    view = run(step(HOSTILE, times=(0, 1, 2), why=HOSTILE, start=HOSTILE, reason=[HOSTILE, "x"],
                    attempts=[{"attempt": 1, "state": HOSTILE, "beganAt": BEGAN,
                               "endedAt": BEGAN + 1, "reason": HOSTILE}]))  # fmt: skip
    view["name"] = view["workflow"] = view["status"] = HOSTILE
    root = parsed(view)
    tags = {element.tag.removeprefix(SVG) for element in root.iter()}
    drawn = page(view)

    assert tags <= {"svg", "style", "rect", "text", "line", "g", "title", "path"}
    assert "<script" not in drawn
    assert not set("\x00\x1b\u202e") & set(drawn)
    drawn.encode()


def test_a_state_that_nobody_knows_is_no_attribute():
    view = run(step("a", 'x" onload="alert(1)', (0, 1, 2)))

    assert "onload=" not in svg(view).replace("onload=&quot;", "")


def test_the_file_needs_nothing_else():
    """No address, no script, no font: it opens from a disk, offline."""
    drawn = page(run(fan("m", 50), step("a", times=(0, 1, 2))))
    without = drawn.replace("http://www.w3.org/2000/svg", "")

    assert not re.search(
        r"https?:|//|url\(|@import|<link|<img|href|src=", without.split("<body>")[1]
    )
    assert "default-src 'none'" in drawn
    assert "prefers-color-scheme: dark" in drawn


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("palette", timeline.PALETTES.values(), ids=timeline.PALETTES)
def test_every_colour_can_be_told_from_the_page(palette: dict[str, str]):
    """WCAG 2.1: 4.5 for text, 3 for what is drawn."""
    page_ = luminance(palette["page"])

    for name, colour in palette.items():
        light, dark = sorted((page_, luminance(colour)), reverse=True)
        least = {"ink": 7, "dim": 4.5, "page": 1, "rule": 1}.get(name, 3)
        assert (light + 0.05) / (dark + 0.05) >= least, name


def test_a_run_of_ten_thousand_instances_is_drawn_small():
    drawn = svg(run(fan("m", 10_000), length_s=1001))

    assert len(drawn) < 100_000


# ---- views --------------------------------------------------------------------------------------


def test_a_tree_keeps_what_is_said_and_leaves_out_what_is_not():
    inner = Shown("a[0]", "[0]", "failed", attempt=2, retries=1, began_at=2.0, ended_at=3.0,
                  reason=("Raised", "no"))  # fmt: skip
    shown = Shown("a", "a", "open", of=3, children=(inner,))

    assert step_view(shown) == {
        "key": "a", "name": "a", "state": "open", "of": 3, "children": [{
            "key": "a[0]", "name": "[0]", "state": "failed", "attempt": 2, "retries": 1,
            "beganAt": 2.0, "endedAt": 3.0, "reason": ["Raised", "no"]}]}  # fmt: skip


def test_attempts_are_found_in_the_journal():
    """Told twice, or without its start: the first word counts, and the report fills in."""
    facts = [
        Started(at=1.0, key="a", attempt=1, report=Report("forked")),
        Failed(at=2.0, key="a", attempt=1, kind="Raised", message="no"),
        Failed(at=2.5, key="a", attempt=1, kind="Raised", message="no"),
        Ended(at=5.0, key="a", attempt=2, report=Report("warm", 1.5)),
    ]
    found = attempts_of(facts)
    shown = Shown("a", "a", "succeeded", attempt=2)

    assert found == {"a": [
        {"attempt": 1, "state": "failed", "beganAt": 1.0, "endedAt": 2.0, "start": "forked",
         "reason": "Raised: no"},
        {"attempt": 2, "state": "succeeded", "beganAt": 3.5, "endedAt": 5.0, "start": "warm"},
    ]}  # fmt: skip
    assert step_view(shown, found)["attempts"] == found["a"][:1]


def test_a_run_as_the_engine_has_it_is_drawn_with_its_attempts():
    """From the journal's facts to bars: nothing is lost on the way."""
    first = Step(name="first", handler="work:do", retries=1)
    many = Step(name="many", handler="work:do", run_after=("first",),
                matrix=Matrix(params={"n": [1, 2]}))  # fmt: skip
    facts: list[Fact] = [
        RunBegan(at=BEGAN),
        Started(at=BEGAN + 1, key="first", attempt=1, report=Report("created")),
        Failed(at=BEGAN + 2, key="first", attempt=1, kind="Raised", message="no"),
        Started(at=BEGAN + 3, key="first", attempt=2),
        Ended(at=BEGAN + 4, key="first", attempt=2, report=Report("warm", 1.0, 1024)),
        Ended(at=BEGAN + 4.5, key="many[0]", attempt=1, was_cached=True),
        Started(at=BEGAN + 5, key="many[1]", attempt=1),
    ]
    engine = Run(Definition(WorkflowSpec(steps=(first, many))))
    for fact in facts:
        engine.feed(fact)
    shown = engine.tree()
    assert shown is not None
    view: RunView = {**run(), "tree": step_view(shown, attempts_of(facts))}

    assert labels(view) == ["✓ first", "▶ many", "✓ [0]", "▶ [1]"]
    assert [kind for kind, _, _ in bars(view)] == [
        "waiting", "failed", "delayed", "starting", "succeeded"]  # fmt: skip
    assert bars(view, 2)[-1] == ("cached", 4.5, 4.5)
    assert bars(view, 3)[-1] == ("running", 5, 10)
    check_geometry(view)


def test_a_run_that_has_not_begun_is_drawn_empty():
    document = {
        "metadata": {"namespace": "default", "name": "r1", "id": "1"},
        "status": {"workflow": "forecast", "state": "Running"},
        "tree": None,
    }
    view = run_view(document, BEGAN)

    assert labels(view) == []
    check_geometry(view)


def test_leaves_are_what_runs_in_the_order_of_the_definition():
    view = run(fan("m", 2), step("a", children=[step("a/b")]), step("c"))

    assert [each["key"] for each in leaves(view["tree"])] == ["m[0]", "m[1]", "a/b", "c"]


def test_what_a_matrix_has_not_begun_is_counted_as_waiting():
    assert counted([step("a"), step("b", "failed")], 5) == {
        "failed": 1,
        "succeeded": 1,
        "waiting": 3,
    }


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 ms"), (0.0021, "2.1 ms"), (0.0999, "0.10 s"), (9.949, "9.95 s"), (59.94, "59.9 s"),
     (59.96, "1 min 00 s"), (3599.6, "1 h 00 min"), (90061, "1 d 1 h")],
)  # fmt: skip
def test_durations_are_short_and_never_of_sixty_seconds(seconds: float, text: str):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1048575, "1.0 MiB"), (2**50, "1024.0 TiB")],
)
def test_sizes_are_short_and_never_of_1024(number: int, text: str):
    assert size(number) == text
