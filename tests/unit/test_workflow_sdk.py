"""The SDK: plain calls make the graph, hidden control flow is refused, tests need no server."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from dayfly import (
    Context,
    File,
    Folder,
    GraphError,
    Workspace,
    approval,
    callback,
    cel,
    command,
    each,
    finally_,
    function,
    handler,
    in_,
    nested,
    out,
    script,
    sleep,
    status,
    step,
    task,
    text,
    workflow,
    workspace,
)
from dayfly import steps as sdk
from dayfly.invoker import Function, call, call_async
from dayfly.loader import load
from dayfly.protocol import Invoke
from dayfly_pool.workflow.graph import check
from dayfly_pool.workflow.model import plain
from dayfly_pool.workflow.shapes import workflow_of

CONTEXT = Context(
    aws_request_id="i1",
    function_name="f",
    function_version="1",
    memory_limit_in_mb=256,
    namespace="default",
    deadline=0.0,
    traceparent="",
)


# ---- steps that tests below use -----------------------------------------------------------------


@step(retries=2, timeout="2m")
def fetch(url: str, times: int = 1) -> File:
    path = out()
    path.write_text(url * times)
    return path


@step
def count(data: File) -> int:
    return len(data.read_text())


@step(cache=True, name="fit")
def train(data: File, kind: Literal["linear", "tree"], size: int = 3) -> dict[str, Any]:
    return {"score": size + len(kind), "kind": kind, "of": data.read_text()}


@step
def choose(models: list[dict[str, Any]]) -> dict[str, Any]:
    return max(models, key=lambda model: model["score"])


@step
def untyped(x, y=None):
    return x


@step
def double(n: int) -> int:
    return 2 * n


@step
def numbers(most: int) -> list[int]:
    return list(range(most))


@step
def fail() -> None:
    raise ValueError("no")


@step
def note(what: str) -> str:
    NOTED.append(what)
    return what


@step(outputs=("model", "plot"), results={"loss": float})
def fit(data: File) -> dict[str, Any]:
    for name in ("model", "plot"):
        out(name).write_text(name)
    return {"loss": 0.5, "more": 1}


@step
def size(path: File) -> int:
    return len(path.read_text())


@step
def sizes(paths: list[File]) -> list[int]:
    return [len(path.read_text()) for path in paths]


@step
def write(repo: Workspace, name: str) -> None:
    (repo / name).write_text(name)


@step
def listed(repo: Workspace) -> list[str]:
    return sorted(path.name for path in repo.iterdir())


@step
async def later(n: int) -> int:
    await asyncio.sleep(0)
    return n + 1


NOTED: list[str] = []


def compiled(function: Any, **options: Any) -> dict[str, Any]:
    """The spec, which the server takes too."""
    spec = workflow.compile(workflow(**options)(function))
    check(workflow_of(spec), {}, {})
    return plain(workflow_of(spec))


def steps_of(function: Any) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = compiled(function)["steps"]
    return steps


# ---- calls make the graph -----------------------------------------------------------------------


@workflow
def pipeline(url: str, most: float = 100, tag: Literal["a", "b"] = "a"):
    data = fetch(url)
    models = train.map(kind=["linear", "tree"], data=data, size=count(data))
    best = choose(models)
    finally_(note(text("{} is {}", tag, status())))
    said = note(text("{} of {}", best["kind"], url)).when(best["score"] < most)
    return {"best": best["kind"], "said": said}


def test_plain_calls_make_the_graph():
    assert plain(workflow_of(workflow.compile(pipeline))) == {
        "params": [
            {"name": "url"},
            {"name": "most", "type": "number", "default": 100},
            {"name": "tag", "default": "a", "enum": ["a", "b"]},
        ],
        "steps": [
            {
                "name": "fetch",
                "handler": f"{__name__}:fetch",
                "params": {"url": "$(params.url)"},
                "outputs": [{"name": "output"}],
                "retries": 2,
                "timeout": "2m",
            },
            {
                "name": "count",
                "handler": f"{__name__}:count",
                "inputs": {"data": "$(steps.fetch.outputs.output)"},
                "results": [{"name": "result", "type": "integer"}],
            },
            {
                "name": "fit",
                "handler": f"{__name__}:train",
                "params": {"size": "$(steps.count.results.result)"},
                "inputs": {"data": "$(steps.fetch.outputs.output)"},
                "results": [{"name": "result", "type": "object"}],
                "matrix": {"params": {"kind": ["linear", "tree"]}},
                "cache": True,
            },
            {
                "name": "choose",
                "handler": f"{__name__}:choose",
                "params": {"models": "$(steps.fit.results.result)"},
                "results": [{"name": "result", "type": "object"}],
            },
            {
                "name": "note-2",
                "handler": f"{__name__}:note",
                "params": {"what": "$(steps.choose.results.result.kind) of $(params.url)"},
                "results": [{"name": "result"}],
                "when": [{"cel": 'steps["choose"].results["result"]["score"] < params["most"]'}],
            },
        ],
        "finally": [
            {
                "name": "note",
                "handler": f"{__name__}:note",
                "params": {"what": "$(params.tag) is $(steps.status)"},
                "results": [{"name": "result"}],
            }
        ],
        "results": {
            "best": "$(steps.choose.results.result.kind)",
            "said": "$(steps.note-2.results.result)",
        },
    }


def test_a_workflow_is_run_in_a_test_as_plain_python():
    NOTED.clear()
    result = pipeline("http://x")

    assert result == {"best": "linear", "said": "linear of http://x"}
    assert NOTED == ["linear of http://x", "a is Succeeded"]
    assert pipeline("http://x", most=5)["said"] is None


def test_a_step_outside_of_workflows_is_its_function():
    assert double(4) == 8
    assert double.map(n=[1, 2]) == [2, 4]
    assert asyncio.run(later(1)) == 2
    assert (double.__name__, repr(double)) == ("double", f"<step {__name__}:double>")


def test_what_runs_finally_runs_in_a_test_too_when_a_step_fails():
    @workflow
    def failing():
        finally_(note(text("{}", status())))
        return fail()

    NOTED.clear()
    with pytest.raises(ValueError, match="no"):
        failing()

    assert NOTED == ["Failed"]


def test_a_value_is_never_taken_for_a_reference():
    """What Python has as text is text, whatever is in it."""

    def flow(a: str):
        note("$(params.a) $$(params.a) $(date)")
        note(text("$(params.a) {}", a))

    first, second = (each["params"]["what"] for each in steps_of(flow))
    assert first == "$$(params.a) $$$(params.a) $(date)"
    assert second == "$(params.a) $(params.a)"


def test_names_are_the_functions_and_numbered():
    def flow():
        for n in range(3):
            double(n)
        double(4).named("last")

    assert [each["name"] for each in steps_of(flow)] == ["double", "double-2", "double-3", "last"]


def test_the_rest_of_a_call_is_said_behind_it():
    def flow():
        first = double(1)
        double(2).after(first).retry(3, backoff=1).timeout("5m").on_error("continue")

    assert steps_of(flow)[1] == {
        "name": "double-2",
        "handler": f"{__name__}:double",
        "params": {"n": 2},
        "results": [{"name": "result", "type": "integer"}],
        "runAfter": ["double"],
        "retries": {"limit": 3, "backoffSeconds": 1.0},
        "timeout": "5m",
        "onError": "continue",
    }


# ---- maps ---------------------------------------------------------------------------------------


def test_a_map_runs_over_lists_and_over_what_is_known_to_be_one():
    def flow(xs: list):
        many = double.map(n=numbers(3))
        double.map(n=many)
        untyped.map(x=each(xs), y=xs)
        untyped.map([{"x": 1}, {"x": 2, "y": 3}])

    found = steps_of(flow)
    assert [each_.get("matrix") for each_ in found] == [
        None,
        {"params": {"n": "$(steps.numbers.results.result)"}},
        {"params": {"n": "$(steps.double.results.result)"}},
        {"params": {"x": "$(params.xs)"}},
        {"include": [{"x": 1}, {"x": 2, "y": 3}]},
    ]
    assert found[3]["params"] == {"y": "$(params.xs)"}


def test_a_map_over_files_gives_each_run_one_of_them():
    @workflow
    def flow(urls: list):
        files = fetch.map(url=urls)
        return {"each": size.map(path=files), "all": sizes(files), "first": size(files[0])}

    assert plain(workflow_of(workflow.compile(flow)))["steps"][1:3] == [
        {
            "name": "size",
            "handler": f"{__name__}:size",
            "inputs": {"path": "$(item.path)"},
            "results": [{"name": "result", "type": "integer"}],
            "matrix": {"params": {"path": "$(steps.fetch.outputs.output)"}},
        },
        {
            "name": "sizes",
            "handler": f"{__name__}:sizes",
            "inputs": {"paths": "$(steps.fetch.outputs.output)"},
            "results": [{"name": "result", "type": "array"}],
        },
    ]
    assert flow(["a", "bb"]) == {"each": [1, 2], "all": [1, 2], "first": 1}


# ---- artifacts and workspaces -------------------------------------------------------------------


def test_a_step_has_outputs_besides_its_result():
    @workflow
    def flow(data: File):
        fitted = fit(data)
        return {"loss": fitted["loss"], "size": size(fitted.outputs["model"]), "all": fitted}

    spec = compiled(flow.func)
    assert spec["params"] == [{"name": "data", "type": "artifact"}]
    assert spec["steps"][0]["outputs"] == [{"name": "model"}, {"name": "plot"}]
    assert spec["steps"][1]["inputs"] == {"path": "$(steps.fit.outputs.model)"}
    assert spec["results"]["loss"] == "$(steps.fit.results.loss)"


def test_steps_with_one_workspace_run_one_after_the_other():
    @workflow
    def flow():
        repo = workspace("repo")
        write(repo, "a")
        write(repo.branch(), "b")
        write(repo.branch(), "c")
        return listed(repo)

    found = compiled(flow.func)
    assert found["workspaces"] == ["repo"]
    assert [each_.get("runAfter", []) for each_ in found["steps"]] == [
        [],
        ["write"],
        ["write"],
        ["write", "write-2", "write-3"],
    ]
    assert found["steps"][0]["workspaces"] == {"repo": "repo"}
    assert flow() == ["a", "b", "c"]


# ---- other bodies -------------------------------------------------------------------------------


def test_everything_that_a_step_may_be_can_be_called():
    @workflow(name="inner")
    def inner(n: int):
        return double(n)

    def flow(url: str):
        cloned = script("git clone $(params.url) .", url=url, name="clone", results={"sha": str})
        command("make", text("V={}", url), name="make", env={"A": "b"})
        approved = approval("Deploy it?")
        task("deploy", sha=cloned["sha"]).after(approved)
        function("thumbnail", params={"name": "x"}, retries=3)
        handler("other:do")
        nested("cleanup")
        sleep("10m")
        callback()
        inner(3)

    found = plain(workflow_of(workflow.compile(workflow(flow))))["steps"]
    bodies = [
        {k: v for k, v in each_.items() if k in (*sdk_bodies(), "params", "env", "results")}
        for each_ in found
    ]
    assert bodies == [
        {
            "script": "git clone $(params.url) .",
            "params": {"url": "$(params.url)"},
            "results": [{"name": "sha"}],
        },
        {"command": ["make", "V=$(params.url)"], "env": {"A": "b"}},
        {"wait": {"approval": "Deploy it?"}},
        {"task": "deploy", "params": {"sha": "$(steps.clone.results.sha)"}},
        {"function": "thumbnail", "params": {"name": "x"}},
        {"handler": "other:do"},
        {"workflow": "cleanup"},
        {"wait": {"timer": "10m"}},
        {"wait": {"callback": True}},
        {"workflow": "inner", "params": {"n": 3}},
    ]


def sdk_bodies() -> tuple[str, ...]:
    return ("handler", "function", "script", "command", "task", "workflow", "wait")


def test_a_nested_workflow_gives_what_it_returns():
    @workflow
    def inner(n: int):
        return {"twice": double(n), "n": n}

    @workflow
    def outer(n: int):
        return double(inner(n)["twice"])

    assert workflow.compile(outer)["steps"][1]["params"] == {"n": "$(steps.inner.results.twice)"}
    assert workflow.nested(outer) == [inner, outer]
    assert outer(3) == 12


# ---- conditions ---------------------------------------------------------------------------------


def test_comparisons_of_handles_are_conditions():
    def flow(x: str, n: int):
        a = numbers(n)
        conditions = [
            x == "main",
            x != "main",
            in_(x, ["a", "b"]),
            x.not_in(["a"]),
            a[0] >= 1.5,
            (n > 1) & ~(x == "a$(params.n)") | (n == a[1]),
            cel("size(params.x) > 3"),
        ]
        double(1).when(*conditions)

    reference = "$(params.x)"
    assert steps_of(flow)[1]["when"] == [
        {"input": reference, "operator": "in", "values": ["main"]},
        {"input": reference, "operator": "notin", "values": ["main"]},
        {"input": reference, "operator": "in", "values": ["a", "b"]},
        {"input": reference, "operator": "notin", "values": ["a"]},
        {"cel": 'steps["numbers"].results["result"][0] >= 1.5'},
        {
            "cel": '((params["n"] > 1) && (!(params["x"] == "a\\u0024(params.n)"))) || '
            '(params["n"] == steps["numbers"].results["result"][1])'
        },
        {"cel": "size(params.x) > 3"},
    ]


@pytest.mark.parametrize(
    ("misused", "said"),
    [
        (lambda h: bool(h), "use .when(condition)"),
        (lambda h: h and 1, "use .when(condition)"),
        (lambda h: list(h), "use STEP.map(...), or each(handle) in it"),
        (lambda h: f"{h}", "use text('.../{}', handle)"),
        (lambda h: str(h), "use text('.../{}', handle)"),
        (lambda h: h + 1, "arithmetic, but has no value yet"),
        (lambda h: 1 - h, "arithmetic, but has no value yet"),
        (lambda h: len(h), "len(), but has no value yet"),
        (lambda h: 1 in h, "use handle.in_([...])"),
        (lambda h: int(h), "a number, but has no value yet"),
        (lambda h: h(), "a call, but has no value yet"),
        (lambda h: h.score, "take a key as h['score']"),
        (lambda h: h[1:2], "indexed with a key or with 0, 1, 2"),
        (lambda h: h[-1], "indexed with a key or with 0, 1, 2"),
        (lambda h: 1 if h == 2 else 3, "use .when(condition) for `if`"),
        (lambda h: 0 < h < 2, "`0 < h < 1` is (0 < h) & (h < 1)"),
        (lambda h: double(2).when(h), "compare a handle"),
        (lambda h: double("x"), "n is integer, and is given string: 'x'"),
        (lambda h: double(numbers(3)), "n is integer, and is given array"),
        (lambda h: double(), "missing a required argument: 'n'"),
        (lambda h: count("x"), "data is artifact, and is given string"),
        (lambda h: train(fetch("x"), "other"), "kind is one of ['linear', 'tree']"),
        (lambda h: untyped(object()), "a object cannot be given to a step"),
        (lambda h: untyped({1: 2}), "keys of what is given to steps are text"),
        (lambda h: untyped.map(x=h), "nothing to map over"),
        (lambda h: fetch("x")["key"], "is a file or folder: look into it in a step"),
        (lambda h: fit(fetch("x")).outputs["data"], "has no output 'data'; it has model, plot"),
        (lambda h: untyped(script("x")), "has several results (none that are known here)"),
        (lambda h: h["a"].after(h), "is for what a step's call returns"),
        (lambda h: double(1).named("first"), "there is a step 'first' already"),
        (lambda h: text("{} {}", h), "has 2 {} for 1 handles"),
    ],
)
def test_what_a_graph_cannot_see_is_refused_with_what_to_use(misused: Any, said: str):
    @workflow
    def flow():
        misused(untyped(1).named("first"))

    with pytest.raises(GraphError) as caught:
        workflow.compile(flow)

    assert said in str(caught.value)


def test_what_no_sandbox_could_find_is_refused():
    @step
    def inside() -> None: ...

    @workflow
    def flow():
        inside()

    with pytest.raises(GraphError, match="is defined inside a function"):
        workflow.compile(flow)


def test_handles_belong_to_one_workflow():
    kept: list[Any] = []

    @workflow
    def first(x: str):
        kept.append(x)
        note(x)

    @workflow
    def second():
        note(kept[0])

    workflow.compile(first)
    with pytest.raises(GraphError, match="belongs to another workflow"):
        workflow.compile(second)


def test_workflows_that_run_themselves_are_refused():
    @workflow
    def again(n: int):
        return again(n)

    with pytest.raises(GraphError, match="run one another: again -> again"):
        workflow.compile(again)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: step(retry=3)(len), "@step has no 'retry'"),
        (lambda: workflow(schedule="x")(pipeline.func), "@workflow has no 'schedule'"),
        (lambda: step(len), "@step is for functions"),
        (lambda: step(outputs={"a": "b"})(fetch.func), "outputs are names"),
        (lambda: script("true"), "is called in a workflow's function"),
        (lambda: workflow.compile(lambda: 1), "put @workflow before the function"),
        (lambda: workflow.compile(workflow(lambda: None)), "calls no step"),
    ],
)
def test_what_is_misused_says_so(make: Any, said: str):
    with pytest.raises(GraphError, match=said):
        make()


def test_what_needs_a_server_says_so_in_a_test():
    @workflow
    def flow():
        return script("true")

    with pytest.raises(GraphError, match="step 'script' is a script, which needs a server"):
        flow()


# ---- in a sandbox -------------------------------------------------------------------------------


def context_in(folder: Path) -> Context:
    told = {name: getattr(CONTEXT, name) for name in Context.__slots__}
    places = {f"{name}_folder": str(folder / name) for name in ("in", "workspace", "out")}
    return Context(**told | places)


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a sandbox has its inputs, workspaces and outputs."""
    for name in ("in", "workspace", "out"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(sdk, "_folders", {})
    return tmp_path


def test_a_step_is_a_handler_whose_event_is_its_parameters(sandbox: Path):
    assert double({"n": 4}, context_in(sandbox)) == 8
    assert asyncio.run(later({"n": 4}, context_in(sandbox))) == 5
    with pytest.raises(TypeError, match="has no parameter 'm'"):
        double({"n": 1, "m": 2}, context_in(sandbox))
    with pytest.raises(TypeError, match="is given a mapping"):
        double([1], context_in(sandbox))


def test_a_handler_finds_its_artifacts_and_leaves_its_own(sandbox: Path):
    (sandbox / "in/data").write_text("four")
    (sandbox / "in/paths").mkdir()
    for n in (10, 9, 0):
        (sandbox / f"in/paths/{n}").write_text("x" * n)

    assert count({}, context_in(sandbox)) == 4
    assert sizes({}, context_in(sandbox)) == [0, 9, 10]
    assert fetch({"url": "abc"}, context_in(sandbox)) is None
    assert (sandbox / "out/output").read_text() == "abc"


def test_a_file_from_elsewhere_is_moved_to_its_output(sandbox: Path):
    @step
    def make() -> Folder:
        folder = sandbox / "mine"
        folder.mkdir()
        (folder / "a").write_text("a")
        return folder

    assert make({}, context_in(sandbox)) is None
    assert (sandbox / "out/output/a").read_text() == "a"


def test_a_step_is_loaded_and_called_as_any_handler(sandbox: Path):
    """What runs in a sandbox knows nothing of workflows."""
    (sandbox / "flow_of_two.py").write_text(
        "from dayfly import step, workflow\n@step\ndef f(n: int): return n + 1\n"
        "@step\nasync def g(n: int): return n + 2\n@workflow\ndef w(n: int): return g(f(n))\n"
    )
    request = Invoke(id="i1", http=None, remaining_s=9.0, trace="")
    answers = []
    for name in ("f", "g"):
        found = Function(
            name=name, namespace="default", version="1", memory_mb=64, code=str(sandbox),
            handler=load(str(sandbox), f"flow_of_two:{name}"),
        )  # fmt: skip
        if found.is_async:
            answers.append(asyncio.run(call_async(found, request, b'{"n": 3}')))
        else:
            answers.append(call(found, request, b'{"n": 3}'))

    assert [body for _, body in answers] == [b"4", b"5"]


RUNTIME = str(Path(sdk.__file__).parents[1])
LATER = {"dayfly.steps", "dayfly.graphs", "dayfly.calls", "typing", "inspect", "pathlib"}


def test_a_plain_function_pays_nothing_for_workflows():
    """Its sandbox imports `dayfly`, and may import a step; what makes graphs is not for it."""
    program = f"""import sys; sys.path.insert(0, {RUNTIME!r})
import dayfly
plain = sorted({LATER!r} & set(sys.modules))
from dayfly import File, step, workflow
@step
def f(x: File) -> int: return 1
@workflow
def g(): f()
print(plain, sorted({LATER!r} & set(sys.modules)))"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, check=True, timeout=60
    )

    assert done.stdout.decode().strip() == "[] ['dayfly.steps']"
