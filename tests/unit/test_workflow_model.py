"""What a workflow may be: read in our words and in Tekton's, and refused with the place."""

# ruff: noqa: E501 -- messages are compared as they are told

import time
from collections.abc import Mapping
from datetime import date
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dayfly_pool.errors import BadInput
from dayfly_pool.workflow.graph import Graph, check, check_task, combinations, in_order
from dayfly_pool.workflow.model import Param, Step, WorkflowSpec, duration_s, plain
from dayfly_pool.workflow.shapes import task_of, workflow_of
from dayfly_pool.workflow.values import BadDefinition, bind

TASKS = {
    "build": task_of(
        {
            "params": [{"name": "flags", "type": "array", "default": []}, {"name": "target"}],
            "results": ["version"],
            "inputs": ["source"],
            "outputs": ["binary"],
            "workspaces": ["cache"],
            "script": "make $(params.target) > $(results.version.path)",
        }
    )
}
DO = {"handler": "main:do"}


def spec(*steps: Mapping[str, Any], **more: Any) -> WorkflowSpec:
    return workflow_of({"steps": list(steps), **more})


def checked(*steps: Mapping[str, Any], **more: Any) -> Graph:
    return check(spec(*steps, **more), TASKS, {})


def refusal(*steps: Mapping[str, Any], **more: Any) -> str:
    with pytest.raises(BadDefinition) as caught:
        checked(*steps, **more)
    return str(caught.value)


def step(name: str, **more: Any) -> dict[str, Any]:
    body = {} if more.keys() & {"script", "command", "task", "workflow", "wait", "taskRef"} else DO
    return {"name": name, **body, **more}


def deep(depth: int) -> list[Any]:
    return [deep(depth - 1)] if depth else []


def names(graph: Graph, numbers: tuple[int, ...]) -> list[str]:
    return [graph.steps[number].name for number in numbers]


# ---- the order ----------------------------------------------------------------------------------


def test_a_step_needs_those_whose_results_it_takes_and_those_that_it_comes_after():
    graph = checked(
        step("report", params={"x": "to $(steps.train.results.result)"}, runAfter=["warn"]),
        step("train", inputs={"data": "$(steps.fetch.outputs.data)"}),
        step("fetch", outputs=["data"]),
        step("warn", when=[{"cel": "steps.fetch.status == 'Failed'"}]),
    )

    assert names(graph, graph.order) == ["fetch", "train", "warn", "report"]
    assert names(graph, graph.needs[0]) == ["train", "warn"]
    assert names(graph, graph.takes[0]) == ["train"]
    assert names(graph, graph.needed_by[2]) == ["train", "warn"]


def test_a_script_needs_the_steps_that_it_names():
    graph = checked(
        step("a"), step("b", script="#!/bin/sh\necho $(steps.a.results.result) $(date)")
    )

    assert graph.needs == ((), (0,))


def test_two_steps_that_write_the_same_workspace_are_branches():
    graph = checked(
        step("a", workspaces={"src": "repo"}),
        step("b", workspaces={"src": "repo"}),
        workspaces=["repo"],
    )

    assert graph.needs == ((), ())


def test_what_runs_finally_may_use_what_steps_have_left():
    graph = checked(
        step("a"),
        **{"finally": [step("tell", params={"x": "$(steps.a.results.result) $(steps.status)"})]},
    )

    assert (graph.order, graph.needs[1], graph.takes[1]) == ((0,), (), (0,))


@given(st.lists(st.lists(st.integers(0, 30), max_size=4), min_size=1, max_size=30), st.randoms())
def test_an_order_has_every_step_behind_what_it_needs(needs: list[list[int]], random: Any):
    """Whatever the order in which they are written."""
    steps = [
        step(f"s{n}", runAfter=[f"s{other % n}" for other in needed] if n else [])
        for n, needed in enumerate(needs)
    ]
    random.shuffle(steps)
    graph = checked(*steps)

    place = {number: at for at, number in enumerate(graph.order)}
    assert sorted(graph.order) == list(range(len(steps)))
    for number, needed in enumerate(graph.needs):
        assert all(place[other] < place[number] for other in needed)
        assert all(number in graph.needed_by[other] for other in needed)
    written = [each.name for each in in_order(spec(*steps))]
    assert all(written.index(o) < written.index(s["name"]) for s in steps for o in s["runAfter"])


def result(number: int) -> str:
    return f"$(steps.s{number}.results.result)"


def chain(number: int) -> list[Step]:
    first = Step(name="s0", handler="main:do")
    return [first] + [
        Step(name=f"s{n}", handler="main:do", params={"x": result(n - 1)}) for n in range(1, number)
    ]


def fan(number: int) -> list[Step]:
    """One, from which all others take, and one that takes from all."""
    middle = [
        Step(name=f"s{n}", handler="main:do", params={"x": result(0)}) for n in range(1, number - 1)
    ]
    join = Step(
        name="join", handler="main:do", params={"all": [result(n) for n in range(number - 1)]}
    )
    return [Step(name="s0", handler="main:do"), *middle, join]


@pytest.mark.parametrize("make", [chain, fan])
def test_a_graph_of_a_hundred_thousand_steps_is_checked_at_once(make: Any):
    made = WorkflowSpec(steps=tuple(make(100_000)))
    began = time.process_time()
    graph = check(made, {}, {})

    assert time.process_time() - began < 10  # about 1 s alone on a core
    assert (len(graph.order), graph.count) == (100_000, 100_000)


def test_a_graph_of_more_steps_is_refused_at_once():
    made = WorkflowSpec(steps=(Step(name="s", script="x"),) * 100_001)

    with pytest.raises(BadDefinition, match="steps: 100001 steps, limit 100000"):
        check(made, {}, {})


def test_a_long_cycle_is_told_in_part():
    steps = chain(5000)
    steps[0] = Step(name="s0", handler="main:do", run_after=("s4999",))
    with pytest.raises(BadDefinition) as caught:
        check(WorkflowSpec(steps=tuple(steps)), {}, {})

    assert str(caught.value).endswith("s6 -> s7 -> (4992 more) -> s0")


# ---- what is refused ----------------------------------------------------------------------------

WRONG: list[tuple[str, list[dict[str, Any]], dict[str, Any], str]] = [
    ("no step", [], {}, "steps: a workflow has at least one step"),
    (
        "a name twice",
        [step("a"), step("a")],
        {},
        "steps[1].name: step 'a' is here twice: each has a name of its own",
    ),
    (
        "no body",
        [{"name": "a"}],
        {},
        "steps[0]: step 'a' needs one of handler, function, script, command, task, workflow, wait;"
        " it has none",
    ),
    (
        "two bodies",
        [{"name": "a", "script": "x", "function": "f"}],
        {},
        "steps[0]: step 'a' needs one of handler, function, script, command, task, workflow, wait;"
        " it has function and script",
    ),
    (
        "a cycle",
        [
            step("a", runAfter=["b"]),
            step("b", params={"x": "$(steps.c.results.result)"}),
            step("c", runAfter=["a"]),
        ],
        {},
        "steps[0]: steps wait for one another: a -> c -> b -> a",
    ),
    (
        "itself",
        [step("a", runAfter=["a"])],
        {},
        "steps[0].runAfter[0]: step 'a': it waits for itself: a -> a",
    ),
    (
        "an unknown step",
        [step("fetch"), step("b", params={"x": ["$(steps.fetsh.results.result)"]})],
        {},
        "steps[1].params.x: step 'b': there is no step 'fetsh': did you mean 'fetch'?",
    ),
    (
        "an unknown step to come after",
        [step("a", runAfter=["zzz"])],
        {},
        "steps[0].runAfter[0]: step 'a': there is no step 'zzz'; there are a",
    ),
    (
        "an unknown result",
        [
            step("a", script="true", results=["version"]),
            step("b", params={"x": "$(steps.a.results.versio)"}),
        ],
        {},
        "steps[1].params.x: step 'b': 'a' has no result 'versio': did you mean 'version'?",
    ),
    (
        "a result of a script that declares none",
        [step("a", script="true"), step("b", params={"x": "$(steps.a.results.result)"})],
        {},
        "steps[1].params.x: step 'b': 'a' has no result 'result': there is none",
    ),
    (
        "an unknown output",
        [step("a", outputs=["model"]), step("b", inputs={"m": "$(steps.a.outputs.data)"})],
        {},
        "steps[1].inputs.m: step 'b': 'a' has no output 'data'; there are model",
    ),
    (
        "an unknown parameter",
        [step("a", params={"x": "$(params.ulr)"})],
        {"params": ["url"]},
        "steps[0].params.x: step 'a': $(params.ulr): there is no parameter 'ulr': did you mean 'url'?",
    ),
    (
        "an unknown parameter in a script",
        [step("a", script="echo $(params.ulr)")],
        {},
        "steps[0].script: step 'a': $(params.ulr): there is no parameter 'ulr': there is none",
    ),
    (
        "an unknown workspace",
        [step("a", workspaces={"src": "repo"})],
        {"workspaces": ["code"]},
        "steps[0].workspaces.src: step 'a': there is no workspace 'repo'; there are code",
    ),
    (
        "a workspace that is not bound",
        [step("a", script="ls $(workspaces.repo.path)")],
        {"workspaces": ["repo"]},
        "steps[0].script: step 'a': $(workspaces.repo.path): it has no workspace 'repo': there is none",
    ),
    (
        "a form that is none",
        [step("a", params={"x": "$(steps.a)"})],
        {},
        "steps[0].params.x: step 'a': $(steps.a) is no reference: write $(steps.NAME.results.RESULT),"
        " $(steps.NAME.outputs.OUTPUT) or $(steps.NAME.status); or $$( for the text",
    ),
    (
        "a key of a text",
        [step("a", results={"r": "string"}), step("b", params={"x": "$(steps.a.results.r.key)"})],
        {},
        "steps[1].params.x: step 'b': $(steps.a.results.r.key): string has no 'key'",
    ),
    (
        "a key that the object has not",
        [
            step("a", results=[{"name": "r", "properties": {"uri": {}}}]),
            step("b", params={"x": "$(steps.a.results.r.url)"}),
        ],
        {},
        "steps[1].params.x: step 'b': $(steps.a.results.r.url): it has no 'url': did you mean 'uri'?",
    ),
    (
        "all of what is no list",
        [step("a", params={"x": "$(params.n[*])"})],
        {"params": [{"name": "n", "type": "integer"}]},
        "steps[0].params.x: step 'a': $(params.n[*]): integer is no array: leave out [*]",
    ),
    (
        "a result as an input",
        [step("a", results={"r": "string"}), step("b", inputs={"x": "$(steps.a.results.r)"})],
        {},
        "steps[1].inputs.x: step 'b': an input is an artifact: $(steps.NAME.outputs.OUTPUT), or a"
        " parameter of type artifact; this is string",
    ),
    (
        "text as an input",
        [step("a", inputs={"x": "/etc/passwd"})],
        {},
        "steps[0].inputs.x: step 'a': an input is an artifact: $(steps.NAME.outputs.OUTPUT), or a"
        " parameter of type artifact; this is plain text",
    ),
    (
        "a matrix over no list",
        [step("a", matrix={"params": {"x": "$(params.s)"}})],
        {"params": ["s"]},
        "steps[0].matrix.params.x: step 'a': a list is wanted, or a reference to one; this is string",
    ),
    (
        "a matrix of too many",
        [step("a", matrix={"params": {k: list(range(100)) for k in "abc"}})],
        {},
        "steps[0].matrix: step 'a': 1000000 combinations, limit 100000",
    ),
    (
        "an item without a matrix",
        [step("a", params={"x": "$(item)"})],
        {},
        "steps[0].params.x: step 'a': $(item) is for steps with a matrix",
    ),
    (
        "who depends on what runs finally",
        [step("a", runAfter=["z"])],
        {"finally": [step("z")]},
        "steps[0].runAfter[0]: step 'a': nothing may depend on 'z', which runs finally",
    ),
    (
        "finally after one another",
        [step("a")],
        {"finally": [step("y"), step("z", params={"x": "$(steps.y.results.result)"})]},
        "finally[1].params.x: step 'z': nothing may depend on 'y', which runs finally",
    ),
    (
        "finally in an order",
        [step("a")],
        {"finally": [step("z", runAfter=["a"])]},
        "finally[0].runAfter[0]: step 'z': what runs finally runs after all steps: leave it out",
    ),
    (
        "the end of all before the end",
        [step("a", params={"x": "$(steps.status)"})],
        {},
        "steps[0].params.x: step 'a': $(steps.status) is known when all steps have ended: it is for"
        " `finally`",
    ),
    (
        "the end of all in CEL",
        [step("a", when=[{"cel": "'$(tasks.status)' == 'Failed'"}])],
        {},
        "steps[0].when[0].cel: step 'a': $(steps.status) is known when all steps have ended: it is for"
        " `finally`",
    ),
    (
        "no such task",
        [step("a", task="biuld")],
        {},
        "steps[0].task: step 'a': there is no task 'biuld': did you mean 'build'?",
    ),
    (
        "a task without what it wants",
        [step("a", task="build", inputs={"source": "$(params.src)"}, workspaces={"cache": "w"})],
        {"params": {"src": "artifact"}, "workspaces": ["w"]},
        "steps[0].params: step 'a': task 'build' wants param 'target'",
    ),
    (
        "a task's parameter of another type",
        [step("a", task="build", params={"target": ["x"]})],
        {},
        "steps[0].params.target: step 'a': task 'build': string is wanted, this is array: put it in quotes",
    ),
    (
        "a result where another type is wanted",
        [
            step("n", results={"count": "integer"}),
            step("a", task="build", params={"target": "x", "flags": "$(steps.n.results.count)"}),
        ],
        {},
        "steps[1].params.flags: step 'a': task 'build': array is wanted, this is integer",
    ),
    (
        "a task's parameter that it has not",
        [step("a", task="build", params={"targt": "x"})],
        {},
        "steps[0].params.targt: step 'a': task 'build' has no param 'targt': did you mean 'target'?",
    ),
    (
        "a task's workspace",
        [step("a", task="build", params={"target": "x"}, inputs={"source": "$(params.src)"})],
        {"params": {"src": "artifact"}},
        "steps[0]: step 'a': task 'build' wants workspace 'cache': name it under `workspaces`",
    ),
    (
        "no such workflow",
        [step("a", workflow="other")],
        {},
        "steps[0].workflow: step 'a': there is no workflow 'other': there is none",
    ),
    (
        "no CEL",
        [step("a", when=[{"cel": "params.x =="}])],
        {"params": ["x"]},
        "Syntax error",
    ),
    (
        "a step in CEL that is not there",
        [step("a", when=[{"cel": "steps.b.status == 'Failed'"}])],
        {},
        "steps[0].when[0].cel: step 'a': there is no step 'b'; there are a",
    ),
    (
        "half a condition",
        [step("a", when=[{"input": "x", "operator": "in"}])],
        {},
        "steps[0].when[0]: step 'a': when with operator in needs values",
    ),
    (
        "a default of another type",
        [step("a")],
        {"params": [{"name": "n", "type": "integer", "default": "3"}]},
        "params[0].default: the default of 'n': integer is wanted, this is string",
    ),
    (
        "a result that nobody leaves",
        [step("a")],
        {"results": {"x": "$(steps.b.results.result)"}},
        "results.x: there is no step 'b'; there are a",
    ),
    (
        "a field that is not there",
        [step("a", retry=3)],
        {},
        "steps[0]: step 'a': Object contains unknown field `retry`: did you mean `retries`?",
    ),
    (
        "a word that a field does not know",
        [step("a", onError="ignore")],
        {},
        "steps[0].onError: step 'a': onError is 'ignore'; there are continue, stopAndFail",
    ),
    (
        "a type of Python's",
        [step("a")],
        {"params": [{"name": "n", "type": "int"}]},
        "params[0].type: type is 'int': did you mean 'integer'?",
    ),
    (
        "a field of a field that is not there",
        [step("a", retries={"limits": 3})],
        {},
        "steps[0].retries: step 'a': Object contains unknown field `limits`: did you mean `limit`?",
    ),
    (
        "a parameter in a script, nearly",
        [step("a", script="echo $(parms.who)")],
        {"params": [{"name": "who"}]},
        "steps[0].script: step 'a': $(parms.who) is left to the shell: did you mean $(params.who)? "
        "A command of that name is $( parms.who)",
    ),
    (
        "a result in a script, nearly",
        [step("a"), step("b", script="echo $(step.a.results.n)")],
        {},
        "steps[1].script: step 'b': $(step.a.results.n) is left to the shell: did you mean "
        "$(steps.a.results.n)? A command of that name is $( step.a.results.n)",
    ),
    (
        "a timeout of 0",
        [step("a", timeout=0)],
        {},
        "steps[0]: step 'a': timeout must be more than 0: leave it out for none",
    ),
    (
        "a timeout that is none",
        [step("a", timeout="soon")],
        {},
        "steps[0]: step 'a': 'soon' is no duration: write 90s, 15m, 1h30m or 500ms",
    ),
    (
        "limits of a function that is deployed",
        [{"name": "a", "function": "f", "limits": {"memoryMb": 512}}],
        {},
        "steps[0]: step 'a': limits are declared where its code is, in 'f'",
    ),
    (
        "limits of what runs nothing",
        [{"name": "a", "wait": {"timer": "1s"}, "limits": {"memoryMb": 512}}],
        {},
        "steps[0]: step 'a' waits and runs nothing: it has no limits",
    ),
    (
        "cached, and with a network",
        [step("a", cache=True, network="host")],
        {},
        "steps[0]: step 'a': what has a network is not cached: leave out cache or network",
    ),
    (
        "an output above its folder",
        [step("a", outputs={"x": "../x"})],
        {},
        "steps[0].outputs[0]: step 'a': output 'x': path is below /out, without `..`",
    ),
    (
        "a name with a space",
        [step("a b")],
        {},
        "steps[0].name: names are lower-case letters, digits and dashes, at most 63",
    ),
    (
        "values that are nested too deeply",
        [step("a", params={"x": deep(40)})],
        {},
        "steps[0].params: step 'a': values are nested at most 32 deep",
    ),
    (
        "a date, which YAML makes of it",
        [step("a", params={"x": date(2026, 1, 1)})],
        {},
        "steps[0].params: step 'a': date is no JSON: put it in quotes",
    ),
]


def test_a_mapping_of_steps_is_refused_with_what_to_write():
    with pytest.raises(BadDefinition, match="write `- name: greet`"):
        workflow_of({"steps": {"greet": {"script": "x"}}})


def test_one_condition_needs_no_list():
    guard = {"input": "$(params.x)", "operator": "in", "values": ["a"]}
    params = [{"name": "x"}]

    assert spec(step("a", when=guard), params=params) == spec(
        step("a", when=[guard]), params=params
    )
    assert spec(step("a", when="1 > 2")) == spec(step("a", when=[{"cel": "1 > 2"}]))


@pytest.mark.parametrize(
    "script",
    [
        "$(param.sh)",  # a command
        "$(step.sh --fast)",
        "$(parms.who | wc)",
        "$( parms.who)",
        "$(date)",
        "$(input.csv)",
        "$(git.results.x)",
        "$((results.x.path))",
    ],
)
def test_commands_in_scripts_are_the_shells(script: str):
    assert checked(step("a", script=f"echo {script}"), params=[{"name": "who"}]).count == 1


@pytest.mark.parametrize(
    ("steps", "more", "said"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG]
)
def test_what_is_wrong_is_told_with_its_place(
    steps: list[dict[str, Any]], more: dict[str, Any], said: str
):
    told = refusal(*steps, **more)

    assert said in told if said == "Syntax error" else told == said


# ---- nested workflows ---------------------------------------------------------------------------


def nested(*inner: str, number: int = 1) -> WorkflowSpec:
    plain_steps = [step(f"s{n}") for n in range(number)]
    return spec(*plain_steps, *(step(f"run-{name}", workflow=name) for name in inner))


def test_a_step_or_task_has_few_streams():
    """Each has memory and threads of the server; other outputs have not."""
    many = [{"name": f"o{n}", "stream": n < 9} for n in range(20)]
    told = "9 outputs are streams, limit 8: leave `stream` out of some"
    fine = [many[0] | {"stream": False}, *many[1:]]

    assert refusal(step("a", outputs=many)) == f"steps[0]: step 'a': {told}"
    with pytest.raises(BadDefinition, match=f"the task: {told}"):
        task_of({"script": "x", "outputs": many})
    checked(step("a", outputs=fine))
    task_of({"script": "x", "outputs": fine})


def test_workflows_that_run_one_another_are_a_cycle():
    with pytest.raises(BadDefinition) as caught:
        check(nested("b"), {}, {"b": nested("c"), "c": nested("a"), "a": nested("b")}, "a")

    assert str(caught.value) == "steps: workflows run one another: a -> b -> c -> a"


def test_workflows_are_nested_at_most_ten_deep():
    flows = {f"w{n}": nested(f"w{n + 1}") for n in range(1, 9)} | {"w9": nested()}

    assert check(nested("w1"), {}, flows, "w0").depth == 10
    with pytest.raises(BadDefinition, match="nested at most 10 deep"):
        check(nested("w1"), {}, flows | {"w9": nested("w10"), "w10": nested()}, "w0")


def test_steps_of_nested_workflows_count():
    """However they are nested, that is known at once."""
    flows = {f"w{n}": nested(*[f"w{n + 1}"], number=10) for n in range(1, 5)} | {
        "w5": nested(number=10)
    }
    flows["w1"] = msgspec.structs.replace(flows["w1"], params=(Param(name="x", default=""),))
    many = step("all", workflow="w1", matrix={"params": {"x": list(range(100_000))}})

    assert check(nested("w1"), {}, flows).count == 51
    with pytest.raises(BadDefinition, match=r"5000000 steps in all, limit 100000"):
        check(spec(many), {}, flows)


def test_a_nested_workflow_is_given_what_it_asks_for():
    flows = {
        "inner": spec(step("a"), params=["url"], results={"rows": "$(steps.a.results.result)"})
    }
    taken = step("b", params={"x": "$(steps.in.results.rows)"})

    assert (
        check(spec(step("in", workflow="inner", params={"url": "x"}), taken), {}, flows).depth == 2
    )
    for params, said in (
        ({}, "wants param 'url'"),
        ({"url": 3}, "string is wanted, this is integer"),
    ):
        with pytest.raises(BadDefinition, match=said):
            check(spec(step("in", workflow="inner", params=params)), {}, flows)


def test_what_only_the_server_has_is_believed_elsewhere():
    """All else is checked, as when a file is read that names tasks of others."""
    taken = step("b", params={"x": "$(steps.a.results.any)"}, inputs={"y": "$(steps.a.outputs.o)"})
    made = spec(step("a", task="theirs"), taken, step("c", workflow="others"))

    assert check(made, {}, {}, is_all=False).needs == ((), (0,), ())
    with pytest.raises(BadDefinition, match="there is no task 'theirs'"):
        check(made, {}, {})
    with pytest.raises(BadDefinition, match="there is no step 'x'"):
        check(spec(step("a", task="theirs", runAfter=["x"])), {}, {}, is_all=False)


# ---- Tekton's words -----------------------------------------------------------------------------


def test_tektons_shapes_mean_the_same():
    theirs = workflow_of(
        {
            "params": [{"name": "urls", "type": "array", "default": ["x"]}],
            "workspaces": [{"name": "repo", "description": "code"}],
            "tasks": [
                {
                    "name": "clone",
                    "taskRef": {"name": "git-clone", "kind": "Task"},
                    "params": [{"name": "url", "value": "$(params.urls[0])"}],
                    "workspaces": [{"name": "output", "workspace": "repo"}],
                    "retries": 3,
                    "timeout": "1h30m",
                    "onError": "continue",
                },
                {
                    "name": "build",
                    "runAfter": ["clone"],
                    "when": [
                        {
                            "input": "$(tasks.clone.status)",
                            "operator": "in",
                            "values": ["Succeeded"],
                        }
                    ],
                    "taskSpec": {
                        "params": [{"name": "flag", "default": "-v"}],
                        "results": [{"name": "digest"}],
                        "steps": [
                            {"name": "make", "env": [{"name": "A", "value": "b"}], "script": "make"}
                        ],
                    },
                    "matrix": {
                        "params": [{"name": "arch", "value": ["x", "y"]}],
                        "include": [{"name": "one", "params": [{"name": "arch", "value": "z"}]}],
                    },
                },
            ],
            "results": [{"name": "digest", "value": "$(tasks.build.results.digest)"}],
            "timeouts": {"pipeline": "2h", "tasks": "1h"},
        }
    )
    ours = workflow_of(
        {
            "params": {"urls": {"type": "array", "default": ["x"]}},
            "workspaces": ["repo"],
            "steps": [
                {
                    "name": "clone",
                    "task": "git-clone",
                    "params": {"url": "$(params.urls[0])"},
                    "workspaces": {"output": "repo"},
                    "retries": 3,
                    "timeout": "1h30m",
                    "onError": "continue",
                },
                {
                    "name": "build",
                    "script": "make",
                    "env": {"A": "b"},
                    "params": {"flag": "-v"},
                    "results": ["digest"],
                    "runAfter": ["clone"],
                    "when": [
                        {
                            "input": "$(tasks.clone.status)",
                            "operator": "in",
                            "values": ["Succeeded"],
                        }
                    ],
                    "matrix": {"params": {"arch": ["x", "y"]}, "include": [{"arch": "z"}]},
                },
            ],
            "results": {"digest": "$(tasks.build.results.digest)"},
            "timeouts": {"workflow": "2h", "steps": "1h"},
        }
    )

    assert theirs == ours
    assert workflow_of(plain(theirs)) == theirs


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"taskRef": {"resolver": "git"}},
            "resolver is not here: only tasks of the same namespace",
        ),
        (
            {"taskRef": {"name": "x", "kind": "ClusterTask"}},
            "neither cluster tasks nor custom tasks",
        ),
        (
            {"taskSpec": {"steps": [{"script": "a"}, {"script": "b"}]}},
            "a task is one step: make a workflow",
        ),
        (
            {"taskSpec": {"steps": [{"image": "alpine", "script": "a"}]}},
            "image is not here: no container images",
        ),
        ({"taskSpec": {"sidecars": [], "steps": []}}, "sidecars is not here"),
        ({"workspaces": [{"name": "a", "workspace": "b", "subPath": "c"}]}, "subPath is not here"),
        ({"pipelineRef": {"name": "x"}}, "a nested workflow is `workflow: NAME`"),
        ({"script": "x", "timeout": "$(params.t)"}, "timeout holds no reference"),
        ({"script": "x", "params": [{"name": "a"}]}, "'a' has no value"),
        (
            {"script": "x", "params": [{"name": "a", "value": 1}, {"name": "a", "value": 2}]},
            "'a' is here twice",
        ),
        ({"args": ["x"], "script": "y"}, "a script has no args: write $(params.NAME) in it"),
        ({"args": ["x"]}, "args need a command"),
    ],
)
def test_what_tekton_has_and_we_have_not_is_told_what_to_use(more: dict[str, Any], said: str):
    with pytest.raises(BadDefinition) as caught:
        workflow_of({"steps": [{"name": "a", **more}]})

    assert said in str(caught.value)


def test_unknown_words_in_a_script_are_the_shells():
    """As in Tekton, where `$(context.task2.status)` reaches the shell."""
    checked(step("a", script='echo "$(context.task2.status)" $(date) $(steps)'))


def test_a_task_refers_to_its_own_only():
    for script, said in (
        ("$(params.x)", "there is no parameter 'x'"),
        ("$(steps.a.status)", "a task knows no steps"),
        ("$(outputs.x.path)", "it has no output 'x'"),
    ):
        with pytest.raises(BadDefinition, match=said.replace("$", r"\$")):
            check_task(task_of({"script": script}))


# ---- parameters, durations, matrices ------------------------------------------------------------


def test_parameters_are_filled_up_and_checked():
    params = (
        Param(name="url"),
        Param(name="n", type="integer", default=3, enum=(1, 3)),
        Param(name="o", type="object", default={"a": 1, "b": 2}),
        Param(name="l", type="array", default=[]),
    )
    bound = {"url": "x", "n": 3, "o": {"a": 1, "b": 5}, "l": []}

    assert bind(params, {"url": "x", "o": {"b": 5}}) == bound
    with pytest.raises(BadDefinition, match="there is no parameter 'm': there are no parameters"):
        bind((), {"m": 1})
    for given_, said in (
        ({}, "params: parameter 'url' must be given"),
        ({"url": 1}, "params.url: string is wanted, this is integer: put it in quotes"),
        (
            {"url": "x", "l": "1,2"},
            "params.l: array is wanted, this is string: write it as JSON, as in l=[1,2]",
        ),
        ({"url": "x", "n": 2}, "params.n: 2 is none of 1, 3"),
        ({"url": "x", "n": True}, "params.n: integer is wanted, this is boolean"),
        ({"url": "x", "m": 2}, "params: there is no parameter 'm'; there are l, n, o, url"),
        ({"url": "x" * (1 << 20)}, "params: over 1048576 bytes: hand it over as an artifact"),
    ):
        with pytest.raises(BadDefinition) as caught:
            bind(params, given_)
        assert str(caught.value) == said


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("1h30m", 5400),
        ("500ms", 0.5),
        ("2d", 172800),
        ("1.5h", 5400),
        (7, 7),
        ("0s", 0),
    ],
)
def test_a_duration_is_seconds_or_text(text: str | float, seconds: float):
    assert duration_s(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "90", "1x", "-1s", "1h 30m", -1, float("nan"), "367d", "9" * 400 + "s"]
)
def test_what_is_no_duration_is_refused(text: str | float):
    with pytest.raises(ValueError, match=r"no duration|not between"):
        duration_s(text)


def test_a_matrix_is_every_combination_and_what_is_included():
    runs = combinations(
        {"os": ["linux", "mac"], "version": [1, 2]},
        [{"os": "mac", "version": 2, "flag": "x"}, {"os": "windows"}, {"all": True}],
    )

    assert runs == [
        {"os": "linux", "version": 1, "all": True},
        {"os": "linux", "version": 2, "all": True},
        {"os": "mac", "version": 1, "all": True},
        {"os": "mac", "version": 2, "flag": "x", "all": True},
        {"os": "windows"},
    ]
    assert combinations({"x": []}) == []
    assert combinations({}, [{"a": 1}, {"a": 1}]) == [{"a": 1}, {"a": 1}]
    with pytest.raises(BadInput, match="limit 100000"):
        combinations({"x": range_list(1000), "y": range_list(1000)})


def range_list(number: int) -> list[int]:
    return list(range(number))


def test_what_is_left_to_its_default_is_not_written():
    made = spec(step("a", retries=0, cache=False), timeouts={"workflow": 86400.0})

    assert plain(made) == {"steps": [{"name": "a", "handler": "main:do"}]}
    assert plain(Step(name="a", script="x")) == {"name": "a", "script": "x"}
