"""The two faces of a workflow: each is made of the other, and nothing gets lost between them."""

# ruff: noqa: E501 -- messages and modules are compared as they are

import json
import runpy
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dayfly import workflow
from dayfly.steps import Workflow
from dayfly_gateway.cli import cli
from dayfly_gateway.faces import Flow, from_python, from_yaml, to_python, to_yaml
from dayfly_pool.errors import BadInput
from dayfly_pool.models import Metadata
from dayfly_pool.workflow.graph import check
from dayfly_pool.workflow.model import plain
from dayfly_pool.workflow.shapes import workflow_of

PIPELINE = '''
from typing import Literal

from dayfly import File, finally_, script, step, text, workflow


@step(retries=2)
def fetch(url: str) -> File: ...


@step
def train(data: File, kind: str) -> dict: ...


@step
def tell(what: str) -> None: ...


@workflow
def inner(kind: Literal["a", "b"]):
    """Of one script."""
    return script("""#!/bin/sh
echo "it's $(date)" $(params.kind)
""", kind=kind, results={"day": str})["day"]


@workflow(name="the-pipeline", timeouts={"workflow": "2h"})
def pipeline(url: str = "http://x", most: float = 0.5):
    print("this goes nowhere")
    models = train.map(kind=["linear", "tree"], data=fetch(url))
    told = tell(text("{} of {}", inner("a"), models)).when(models[0]["score"] > most)
    finally_(tell("over"))
    return {"told": told}
'''


def written(folder: Path, text: str, name: str = "flows.py") -> Path:
    file = folder / name
    file.write_text(textwrap.dedent(text))
    return file


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["workflow", "compile", *arguments])


def refused(result: Result) -> str:
    assert result.exit_code == 2, result.output
    return result.stderr.removeprefix("dayfly: ").strip()


# ---- Python, YAML, Python -----------------------------------------------------------------------


def test_each_face_is_made_of_the_other(tmp_path: Path):
    """And is the same when it is made again."""
    first = run(str(written(tmp_path, PIPELINE)))
    assert first.exit_code == 0, first.output
    python = run(str(written(tmp_path, first.stdout, "a.yaml")))
    again = run(str(written(tmp_path, python.stdout, "again.py")))
    python_again = run(str(written(tmp_path, again.stdout, "b.yaml")))

    assert first.stdout == again.stdout
    assert python.stdout == python_again.stdout
    assert "this goes nowhere" not in first.stdout


def test_yaml_is_written_as_people_read_it(tmp_path: Path):
    shown = run(f"{written(tmp_path, PIPELINE)}:inner").stdout

    assert shown == textwrap.dedent(
        """\
        apiVersion: dayfly.dev/v1
        kind: Workflow
        metadata:
          name: inner
        spec:
          params:
          - name: kind
            enum:
            - a
            - b
          steps:
          - name: script
            script: |
              #!/bin/sh
              echo "it's $(date)" $(params.kind)
            params:
              kind: $(params.kind)
            results:
            - name: day
          results:
            result: $(steps.script.results.day)
        """
    )


def test_python_is_written_as_people_write_it(tmp_path: Path):
    file = written(
        tmp_path,
        """
        apiVersion: dayfly.dev/v1
        kind: Workflow
        metadata: {name: clone-and-build}
        spec:
          params: [{name: repo}, {name: depth, type: integer, default: 1}]
          workspaces: [code]
          steps:
          - name: build
            runAfter: [clone]
            workspaces: {src: code}
            when: [{input: $(steps.clone.results.sha), operator: notin, values: [""]}]
            command: [make, "V=$(steps.clone.results.sha)"]
            outputs: [binary]
          - name: clone
            workspaces: {src: code}
            script: |
              cd $(workspaces.src.path)
              git clone --depth $(params.depth) $(params.repo) .
            results: [sha]
          finally:
          - {name: tell, function: notify, params: {what: $(steps.status), class: "$(run.id)"}}
        """,
        "flow.yaml",
    )

    assert run(str(file)).stdout == textwrap.dedent(
        '''\
        """Made by `dayfly workflow compile`."""

        from dayfly import command, finally_, function, script, status, text, workflow, workspace


        @workflow(name="clone-and-build")
        def clone_and_build(repo: str, depth: int = 1):
            workspace("code")
            clone = script(
                """cd $(workspaces.src.path)
        git clone --depth $(params.depth) $(params.repo) .
        """,
                name="clone",
                workspaces={"src": "code"},
                results={"sha": "string"},
            )
            build = command(
                "make", "V=$(steps.clone.results.sha)",
                name="build",
                workspaces={"src": "code"},
                outputs={"binary": ""},
                after=[clone],
                when=[clone["sha"] != ""],
            )
            tell = function(
                "notify",
                name="tell",
                params={"what": status(), "class": text("$(run.id)")},
            )
            finally_(tell)
        '''
    )


# ---- what is wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import sys\nprint('x')\nsys.exit(3)\n", "importing it failed: it ended with code 3"),
        ("import os\nos._exit(0)\n", "importing it failed: it ended with code 0"),
        (
            "x = 1\ny = x / 0\n",
            ", line 2: importing it failed: ZeroDivisionError: division by zero",
        ),
        ("def f(:\n", ", line 1: importing it failed: SyntaxError: invalid syntax"),
        ("import nowhere_at_all\n", "No module named 'nowhere_at_all'"),
        ("x = 1\n", "has no workflow: put @workflow before the function"),
        (
            "from dayfly import *\n@workflow\ndef w():\n  if script('x'): pass\n",
            "use .when(condition)",
        ),
        (
            "from dayfly import *\n@workflow\ndef w():\n  script('x', name='A b')\n",
            "workflow 'w': steps[0].name: names are lower-case letters, digits and dashes",
        ),
        (
            "from dayfly import *\n@workflow\ndef w():\n  script('echo $(params.x)')\n",
            "workflow 'w': steps[0].script: step 'script': $(params.x): there is no parameter 'x'",
        ),
    ],
)
def test_what_is_wrong_with_python_is_told(tmp_path: Path, text: str, said: str):
    file = written(tmp_path, text)
    told = refused(run(str(file)))

    assert told.startswith(str(file))
    assert said in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "kind: Function\n",
            ", line 1 (document 1): kind: 'Function' is unknown; there are Workflow and Task",
        ),
        ("kind: Task\nmetadata: {name: a}\nspec: {script: x}\n", " has no `kind: Workflow`"),
        (
            "kind: Workflow\nmetadata: {name: a}\nspec:\n  steps:\n  - name: a\n    script: x\n"
            "  - name: b\n    script: y\n    params:\n      x: $(steps.c.status)\n",
            ", line 10 (document 1): spec.steps.1.params.x: step 'b': there is no step 'c'; there are a, b",
        ),
        (
            "kind: Workflow\nmetadata: {name: a}\nspec:\n  steps:\n  - name: a\n    taskRef:\n"
            "      bundle: x\n",
            ", line 7 (document 1): spec.steps.0.taskRef.bundle: step 'a': bundle is not here: only tasks",
        ),
        (
            "kind: Workflow\nmetadata: {name: a}\nspec:\n  steps:\n  - name: a\n    retry: 3\n    script: x\n",
            ", line 6 (document 1): spec.steps.0: step 'a': Object contains unknown field `retry`",
        ),
        (
            "kind: Workflow\nmetadata: {name: a}\nspec:\n  steps:\n  - {name: a, script: x, runAfter: [b]}\n"
            "  - {name: b, script: x, runAfter: [a]}\n",
            ", line 5 (document 1): spec.steps.0: steps wait for one another: a -> b -> a",
        ),
        (
            "kind: Workflow\napiVersion: tekton.dev/v1\n",
            ", line 2 (document 1): apiVersion: Tekton's are not taken",
        ),
        (
            "kind: Task\nmetadata: {name: t}\nspec: {script: 'echo $(params.x)'}\n---\n"
            "kind: Workflow\nmetadata: {name: a}\nspec: {steps: [{name: a, task: t}]}\n",
            ", line 3 (document 1): spec.script: $(params.x): there is no parameter 'x'",
        ),
        (
            "a: &a [x, x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]\n",
            "kind: None is unknown",
        ),
    ],
)
def test_what_is_wrong_with_yaml_is_told_with_its_line(tmp_path: Path, text: str, said: str):
    file = written(tmp_path, text, "flow.yaml")
    told = refused(run(str(file)))

    assert told.startswith(f"{file}")
    assert said.replace(".0", "[0]").replace(".1.", "[1].") in told or said in told


def test_text_that_grows_by_its_aliases_is_refused():
    """A billion laughs: a little text of YAML, and more values than there is memory for."""
    lines = ["kind: Workflow", "metadata: {name: a}", "spec:", "  steps:", "  - name: a"]
    lines += ["    script: x", "    params:", "      a: &a0 [x]"]
    lines += [f"      a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]

    with pytest.raises(BadInput, match="over 1000000 values"):
        from_yaml("\n".join(lines), "flow.yaml")


def test_a_name_that_is_not_there_is_told(tmp_path: Path):
    file = written(tmp_path, PIPELINE)

    assert "has no workflow 'pipelin': did you mean 'pipeline'?" in refused(run(f"{file}:pipelin"))
    assert "there is no file nowhere.py" in refused(run("nowhere.py"))
    assert "cannot be imported" in refused(run(str(written(tmp_path, "", "a-b.py"))))
    assert [f.metadata.name for f in from_python(file, "the-pipeline")] == ["inner", "the-pipeline"]


# ---- laws ---------------------------------------------------------------------------------------

WORDS = st.sampled_from(["a", "b-c", "x_1", "name", "class", "params", "Z9", "result", "script"])
TEXTS = st.text(max_size=8) | st.sampled_from(
    [
        "$(date)",
        "$$(params.a)",
        "$$$(item)",
        "{}",
        "a\nb\n",
        "it's \"",
        "\\",
        "null",
        "3",
        "$$(run)x",
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-1, 1) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
TYPES = st.sampled_from(["string", "integer", "number", "boolean", "array", "object", "any"])
DEFAULTS = {"string": "it's", "integer": 3, "number": 0.5, "boolean": False, "array": [1, {"a": None}],
            "object": {"k": [1]}, "any": None}  # fmt: skip


@st.composite
def values(draw: Any, params: list[str], earlier: list[dict[str, Any]], *, mapped: bool) -> Any:
    """JSON, a reference to what there is, or text with one."""
    there = [f"params.{name}" for name in params] + ["run.id", "retry.count"]
    for step in earlier:
        there.append(f"steps.{step['name']}.status")
        there += [
            f"steps.{step['name']}.results.{each['name']}" for each in step.get("results", ())
        ]
        there += [
            f"steps.{step['name']}.outputs.{each['name']}" for each in step.get("outputs", ())
        ]
        if step.keys() & {"handler", "function", "wait"}:
            there += [f"tasks.{step['name']}.results.result"]
    there += ["item"] * mapped
    reference = f"$({draw(st.sampled_from(there))})"
    return draw(
        st.one_of(
            JSON,
            st.just(reference),
            st.just([reference, {"deep": reference}]),
            TEXTS.map(lambda text: text + reference),
        )
    )


@st.composite
def steps(draw: Any, name: str, params: list[str], earlier: list[dict[str, Any]]) -> dict[str, Any]:
    """One step that is in order."""
    body = draw(
        st.sampled_from(
            [{"handler": "main:do"}, {"function": "f"}, {"script": "#!/bin/sh\necho $(date) \"'\n"},
             {"script": "\\ x\t"}, {"command": ["echo", "$(params.a)" if "a" in params else "$(x)"]},
             {"wait": {"timer": "5m"}}, {"wait": {"approval": "now?"}}, {"wait": {"callback": True}}]
        )
    )  # fmt: skip
    step: dict[str, Any] = {"name": name, **body}
    is_mapped = draw(st.booleans())
    if is_mapped:
        step["matrix"] = {"params": {"axis": [1, "two"]}, "parallelism": draw(st.integers(0, 2))}
        if draw(st.booleans()):
            step["matrix"]["include"] = [{"axis": "two", "more": draw(JSON)}]
    given_ = st.dictionaries(WORDS, values(params, earlier, mapped=is_mapped), max_size=3)
    step["params"] = draw(given_)
    step["runAfter"] = sorted({each["name"] for each in earlier if draw(st.booleans())})
    step |= draw(st.fixed_dictionaries({}, optional={
        "retries": st.sampled_from([2, {"limit": 1, "backoffSeconds": 2.0}]),
        "timeout": st.sampled_from(["5m", 3.5]),
        "onError": st.just("continue"),
    }))  # fmt: skip
    if "wait" not in step:
        step |= draw(st.fixed_dictionaries({}, optional={
            "env": st.just({"A": "b"}),
            "cache": st.just(True),
            "environment": st.just("science"),
            "merge": st.just("ordered"),
            "workspaces": st.just({"src": "repo"}),
            "results": st.lists(WORDS, unique=True, max_size=2).map(
                lambda names: [{"name": each, "type": "array"} for each in names]),
            "outputs": st.just([{"name": "o"}, {"name": "p", "path": "a/b", "isBuild": True}]),
        }))  # fmt: skip
        if draw(st.booleans()) and not {"function", "workflow"} & step.keys():
            step["limits"] = {"memoryMb": 512, "cpu": 0.5}
        outputs = [each["name"] for each in earlier if each.get("outputs")]
        if outputs and draw(st.booleans()):
            step["inputs"] = {"data": f"$(steps.{draw(st.sampled_from(outputs))}.outputs.o)"}
    if earlier and draw(st.booleans()):
        other = earlier[-1]["name"]
        step["when"] = draw(st.lists(st.sampled_from([
            {"input": f"$(steps.{other}.status)", "operator": "in", "values": ["Failed"]},
            {"input": f"$(steps.{other}.status)", "operator": "notin", "values": ["$$(item)", 2]},
            {"input": "x", "operator": "in", "values": [f"$(steps.{other}.status)"]},
            {"cel": f"steps[\"{other}\"].status != 'it\\'s'"},
        ]), max_size=2))  # fmt: skip
    return step


@st.composite
def flows(draw: Any) -> Flow:
    """A workflow that is in order."""
    params = []
    for name in draw(st.lists(WORDS, unique=True, max_size=3)):
        kind = draw(TYPES)
        has_default = {"default": DEFAULTS[kind]} if draw(st.booleans()) else {}
        params.append({"name": name, "type": kind, **has_default})
    names = draw(st.lists(st.sampled_from(["s", "fetch-it", "text", "1st", "for", "a"]), unique=True, min_size=1, max_size=4))  # fmt: skip
    made: list[dict[str, Any]] = []
    for name in names:
        made.append(draw(steps(name, [param["name"] for param in params], made)))
    spec = {"params": params, "workspaces": ["repo"], "steps": made}
    if draw(st.booleans()):
        spec["finally"] = [{"name": "last", "script": "x", "params": {"s": "$(steps.status)"}}]
    spec["results"] = draw(
        st.dictionaries(WORDS, values([p["name"] for p in params], made, mapped=False), max_size=2)
    )
    spec["results"] = {
        name: value
        for name, value in spec["results"].items()
        if "$(run." not in json.dumps(value) and "$(retry." not in json.dumps(value)
    }
    flow = Flow(msgspec.convert({"name": "flow"}, Metadata), workflow_of(spec))
    check(flow.spec, {}, {})
    return flow


def run_here(text: str) -> dict[str, Any]:
    """The spec that a module makes."""
    with tempfile.TemporaryDirectory() as folder:
        file = written(Path(folder), text)
        found = runpy.run_path(str(file)).values()
    (flow,) = [each for each in found if isinstance(each, Workflow)]
    return workflow.compile(flow)


@settings(max_examples=50, suppress_health_check=list(HealthCheck), deadline=None)
@given(flows())
def test_nothing_gets_lost_between_the_faces(flow: Flow):
    python = to_python([flow])

    assert from_yaml(to_yaml([flow]), "flow.yaml") == [flow]
    made = workflow_of(run_here(python))
    assert plain(made) == plain(flow.spec), python
    assert to_python([Flow(flow.metadata, made)]) == python


def test_a_module_is_loaded_in_a_process_of_its_own(tmp_path: Path):
    from_python(written(tmp_path, PIPELINE, "only_there.py"))

    assert "only_there" not in sys.modules
