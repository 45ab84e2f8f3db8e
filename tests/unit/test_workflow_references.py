"""References: what they stand for, what is left alone, and how little can be done with them."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dayfly import graphs
from dayfly_pool.errors import BadInput
from dayfly_pool.workflow import references
from dayfly_pool.workflow.conditions import expression, holds
from dayfly_pool.workflow.model import Condition
from dayfly_pool.workflow.references import (
    Malformed,
    Scope,
    StepEnd,
    Unresolved,
    arguments,
    in_text,
    literal,
    parse,
    substitute,
    substitute_text,
    whole,
)

SCOPE = Scope(
    params={"url": "http://x", "n": 3, "list": ["a", "b"], "obj": {"key": {"deep": [1.5]}}},
    steps={
        "fetch": StepEnd(
            results={"count": 7, "rows": [1, 2]}, outputs={"data": {"uri": "dayfly:1"}}
        ),
        "two-words": StepEnd(status="Failed"),
    },
    workspaces={"repo": "/workspace/repo"},
    inputs={"data": "/in/data"},
    outputs={"model": "/out/model"},
    results={"version": "/results/version"},
    item={"kind": "tree"},
    run={"id": "r1", "name": "nightly-1"},
    retry={"count": 2, "limit": 3},
    status="Succeeded",
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
SHELL = st.text(alphabet="$(){}[].*'\" \nparmstepsurlx-0", max_size=60)


# ---- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$(params.url)", "http://x"),
        ("$(params.n)", 3),
        ('$(params["n"])', 3),
        ("$(params.list)", ["a", "b"]),
        ("$(params.list[*])", ["a", "b"]),
        ("$(params.list[1])", "b"),
        ("$(params.obj.key)", {"deep": [1.5]}),
        ("$(params.obj.key.deep[0])", 1.5),
        ("$(steps.fetch.results.count)", 7),
        ("$(tasks.fetch.results.count)", 7),
        ("$(steps.fetch.results.rows[*])", [1, 2]),
        ("$(steps.fetch.outputs.data)", {"uri": "dayfly:1"}),
        ("$(steps.two-words.status)", "Failed"),
        ("$(tasks.status)", "Succeeded"),
        ("$(workspaces.repo.path)", "/workspace/repo"),
        ("$(inputs.data.path)", "/in/data"),
        ("$(outputs.model.path)", "/out/model"),
        ("$(results.version.path)", "/results/version"),
        ("$(item)", "tree"),
        ("$(item.kind)", "tree"),
        ("$(run.id)", "r1"),
        ("$(context.pipelineRun.name)", "nightly-1"),
        ("$(context.task.retry-count)", 2),
        ("$(retry.limit)", 3),
    ],
)
def test_a_whole_text_stands_for_the_value_with_its_type(text: str, value: Any):
    assert substitute(text, SCOPE) == value


def test_one_among_other_text_stands_for_its_text():
    written = "$(params.url)/$(params.n)?q=$(params.list)"

    assert substitute(written, SCOPE) == 'http://x/3?q=["a","b"]'


def test_all_of_a_list_is_put_among_other_items():
    assert substitute(["x", "$(params.list[*])"], SCOPE) == ["x", "a", "b"]
    assert substitute(["x", "$(params.list)"], SCOPE) == ["x", ["a", "b"]]
    assert arguments(["echo", "$(params.list)", "$(params.n)"], SCOPE) == ["echo", "a", "b", "3"]


@pytest.mark.parametrize(
    "text",
    [
        "$(date)",
        "$(context.task2.status)",
        "$(cat $(which sh))",
        "$((1 + 2))",
        "$(params.url",
        "$ (params.url)",
        "$(paramsurl)",
        "$(steps)",
        "$(steps.fetch)",
        "$(run now)",
        "${params.url}",
    ],
)
def test_what_is_no_word_of_ours_is_left_to_the_shell(text: str):
    script = f"echo {text} $(params.n)"

    assert substitute_text(script, SCOPE) == f"echo {text} 3"


def test_two_dollars_are_the_text_of_a_reference():
    assert substitute("a $$(params.url) b", SCOPE) == "a $(params.url) b"
    assert substitute("$$(params.url)", SCOPE) == "$(params.url)"
    assert substitute("kill $$(date)", SCOPE) == "kill $$(date)"


def test_what_was_put_in_is_not_looked_at_again():
    """So nothing that a user says becomes a reference."""
    scope = Scope(params={"a": "$(params.b) $$(params.b)", "b": "secret"})

    assert substitute("x $(params.a)", scope) == "x $(params.b) $$(params.b)"
    assert substitute(["$(params.a)"], scope) == ["$(params.b) $$(params.b)"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("$(params.nope)", "there is no 'nope' here"),
        ("$(steps.nope.results.x)", "step 'nope' has left nothing"),
        ("$(steps.fetch.results.x)", "step 'fetch' has left no 'x'"),
        ("$(params.list[2])", "the value has no 2"),
        ("$(params.url.key)", "the value has no 'key'"),
        ("$(params.url[0])", "the value has no 0"),
        ("$(params.n[*])", "the value is no list"),
    ],
)
def test_what_has_no_value_is_named(text: str, why: str):
    with pytest.raises(Unresolved) as caught:
        substitute({"x": [text]}, SCOPE)

    assert str(caught.value) == f"{text}: {why}"


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("$(steps.fetch)", "$(steps.NAME.results.RESULT)"),
        ("$(steps.fetch.result.x)", "$(steps.NAME.results.RESULT)"),
        ("$(params)", "$(params.NAME)"),
        ("$(params.x[*].y)", "$(params.NAME)"),
        ("$(workspaces.w)", "$(workspaces.NAME.path)"),
        ("$(run.user)", "$(run.id)"),
        ("$(item..x)", "$(item.NAME)"),
        ("$(params" + ".x" * 18 + ")", "$(params.NAME)"),
    ],
)
def test_what_begins_as_ours_and_is_none_is_told_how_it_is_written(text: str, form: str):
    with pytest.raises(Malformed) as caught:
        list(in_text(text))

    assert form in str(caught.value)
    assert list(in_text(text, is_script=True)) == []


# ---- limits -------------------------------------------------------------------------------------


def test_what_is_written_has_a_limit():
    scope = Scope(params={"x": "a" * 1000})

    assert len(substitute_text("$(params.x)" * 900, scope)) == 900_000
    with pytest.raises(BadInput, match="over 1048576 bytes: hand it over as an output"):
        substitute_text("$(params.x)" * 1100, scope)
    with pytest.raises(BadInput, match="over 1048576 bytes"):
        substitute(["$(params.x)"] * 1100, scope)


@pytest.mark.parametrize(
    "text", ["$(" * 200_000, "$(params." * 50_000, "$$" * 200_000, "$(params.x[" * 40_000]
)
def test_a_hostile_text_takes_no_more_than_its_length(text: str):
    began = time.process_time()
    list(in_text(text, is_script=True))
    substitute_text(text, SCOPE)

    assert time.process_time() - began < 1


# ---- laws ---------------------------------------------------------------------------------------


@given(SHELL)
def test_a_text_can_be_written_so_that_it_stands_for_itself(text: str):
    assert substitute_text(literal(text), Scope()) == text


@given(JSON)
def test_a_value_goes_through_as_it_is(value: Any):
    scope = Scope(params={"v": value})

    assert substitute("$(params.v)", scope) == value
    assert substitute({"a": ["$(params.v)"]}, scope) == {"a": [value]}


@given(JSON)
def test_a_value_among_text_is_its_json(value: Any):
    found = substitute("=$(params.v)", Scope(params={"v": value}))

    said = value if isinstance(value, str) else json.loads(found[1:])
    assert found.startswith("=")
    assert said == value


@given(SHELL)
def test_a_reference_is_written_as_it_is_read(text: str):
    for found in in_text(text, is_script=True):
        assert whole(str(found)) == found


def test_the_sdk_and_the_server_mean_the_same_texts():
    """The SDK imports nothing of the server, so both have it."""
    assert references.WORDS.pattern == graphs.REFERENCE


# ---- conditions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cel", "is_true"),
    [
        ("'$(params.url)' == 'http://x'", True),
        ("'$(params.n)' == '3' && params.n == 3", True),
        ("$(params.n) > 5", False),
        ("steps.fetch.results.count > 6", True),
        ('steps["two-words"].status in ["Failed"]', True),
        ("$(steps.two-words.status) == 'Succeeded'", False),
        ("params.list.exists(each, each == 'b')", True),
        ("params.url.startsWith('http')", True),
        ("'$(tasks.status)' == 'Succeeded'", True),
        ("$(steps.status) in ['Failed']", False),
    ],
)
def test_a_condition_in_cel_sees_values_and_not_their_text(cel: str, is_true: bool):
    assert holds([Condition(cel=cel)], SCOPE) is is_true


def test_a_value_in_a_condition_is_never_read_as_cel():
    scope = Scope(params={"branch": "' == '' || true || '"})

    assert holds([Condition(cel="'$(params.branch)' == 'main'")], scope) is False


@pytest.mark.parametrize(
    ("operator", "given_", "values", "is_true"),
    [
        ("in", "$(params.n)", ("1", "3"), True),  # Tekton knows texts only
        ("in", "$(params.n)", (3.0,), True),
        ("in", "$(params.n)", (True,), False),
        ("notin", "$(params.url)", ("$(params.list[*])",), True),
        ("in", "b", "$(params.list)", True),
        ("in", "b", "$(params.list[*])", True),
    ],
)
def test_three_words_compare_values_or_their_texts(
    operator: Any, given_: str, values: Any, is_true: bool
):
    condition = Condition(input=given_, operator=operator, values=values)

    assert holds([condition], SCOPE) is is_true


@pytest.mark.parametrize(
    ("cel", "why"),
    [
        ("steps.fetch.count > 1", "is none of params.NAME"),
        ("steps.two-words.status == 'x'", "for names with dashes"),
        ("steps[params.n].status == 'x'", "is none of params.NAME"),
        ("'x-$(params.n)' == 'x-3'", "alone in its quotes"),
        ("$(item) == 3", "when in CEL sees params and steps"),
    ],
)
def test_a_condition_that_names_nothing_is_refused(cel: str, why: str):
    with pytest.raises(BadInput) as caught:
        expression(cel)

    assert why in str(caught.value)


def test_a_condition_is_true_or_false():
    with pytest.raises(BadInput, match="neither true nor false"):
        holds([Condition(cel="params.n")], SCOPE)


def test_a_condition_over_what_is_not_there_says_so():
    with pytest.raises(Unresolved):
        holds([Condition(cel="steps.gone.results.x == 1")], SCOPE)


def test_names_in_texts_of_cel_are_no_references():
    assert expression("'steps.a.results.b' == \"params.x\"").references == ()
    assert parse("item") is not None
