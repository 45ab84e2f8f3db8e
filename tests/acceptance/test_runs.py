"""Workflows and their runs as a user types them: in Python, in YAML, and at the command line."""

import json
import os
import signal
import subprocess
import threading
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tests.acceptance.test_jobs import Shell
from tests.harness import DAYFLY, Server, eventually

pytestmark = pytest.mark.waits  # for the command, which looks again every 0.2 s

numbers = count()
PIPELINE = '''
"""Squares, their sum, and whether that is large."""

from dayfly import finally_, function, script, status, step, text, workflow


@step
def numbers(most: int) -> list[int]:
    return list(range(most))


@step(retries=2)
def square(n: int) -> int:
    print("square of", n)
    return n * n


@step
def total(squares: list[int]) -> int:
    return sum(squares)


@step
def tell(what: str) -> str:
    print(what)
    return what


@workflow
def squares(most: int = 5, limit: int = 20):
    """All squares below a number."""
    found = total(square.map(n=numbers(most)))
    large = tell(text("{} is large", found)).when(found > limit)
    finally_(tell(text("it {}", status())).named("end"))
    return {"sum": found, "large": large}


@workflow
def twice(most: int = 3):
    first = squares(most)
    return total([first["sum"], squares(4)["sum"]])
'''


class Flows(Shell):
    """`dayfly`, and what workflows need."""

    def apply(self, text: str, code: int = 0) -> str:
        (self.folder / "flow.yaml").write_text(text)
        return self("apply", "-f", "flow.yaml", code=code)

    def try_(self, *words: str) -> subprocess.CompletedProcess[str]:
        """However it ends."""
        return subprocess.run(
            [DAYFLY, *words],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | {"DAYFLY_URL": f"http://{self.server.admin}"},
        )

    def start(self, workflow: str, *words: str, code: int = 0) -> Any:
        """A run, to its end."""
        return self.json("run", "start", workflow, *words, code=code)

    def flow(self, steps: str, more: str = "", code: int = 0) -> Any:
        """A run of these steps in YAML, to its end."""
        name = f"flow-{next(numbers)}"
        self.apply(manifest(name, steps, more))
        return self.start(name, code=code)

    def tree(self, name: str) -> dict[str, str]:
        """How each step went, by its key."""
        found = {}

        def look(shown: Any) -> None:
            for child in shown.get("children", []):
                found[child["key"]] = child["state"]
                look(child)

        look(self.json("run", "show", name)["view"]["tree"])
        return found


def manifest(name: str, steps: str, more: str = "", kind: str = "Workflow") -> str:
    """A declaration; what is not at the start of its line is of the first step."""
    head = f"apiVersion: dayfly.dev/v1\nkind: {kind}\nmetadata:\n  name: {name}\nspec:\n"
    body = f"steps:\n{steps.strip(chr(10))}\n{more.strip(chr(10))}\n"
    return head + "".join(f"  {line}\n" for line in body.splitlines())


@pytest.fixture
def dayfly(anywhere: Server, tmp_path: Path) -> Flows:
    return Flows(anywhere, tmp_path)


@pytest.fixture
def sandboxed(server: Server, tmp_path: Path) -> Flows:
    return Flows(server, tmp_path)


def results(view: Any) -> Any:
    assert view["status"]["state"] in ("Succeeded", "Completed"), view["status"]
    return view["status"]["results"]


# ---- in Python ----------------------------------------------------------------------------------


def test_a_workflow_in_python_is_deployed_and_run(dayfly: Flows):
    (dayfly.folder / "pipeline.py").write_text(PIPELINE)
    said = dayfly("workflow", "deploy", "pipeline.py")
    assert "squares: 4 steps\n" in said
    assert "twice: 3 steps\n" in said
    assert "squares" in dayfly("workflow", "list")

    told = dayfly("run", "start", "squares", "--name", f"first-{dayfly.server.driver}")
    assert told.splitlines()[0].startswith(f"first-{dayfly.server.driver} Succeeded in ")
    assert "  sum: 30" in told.splitlines()
    assert '  large: "30 is large"' in told.splitlines()
    few = dayfly.start("squares", "-p", "most=2", "--name", f"few-{dayfly.server.driver}")
    assert (few["status"]["state"], few["status"]["results"]) == ("Completed", {"sum": 1})
    assert dayfly.tree(f"few-{dayfly.server.driver}") == {
        "numbers": "succeeded",
        "square": "succeeded",
        "square[0]": "succeeded",
        "square[1]": "succeeded",
        "total": "succeeded",
        "tell": "skipped",
        "end": "succeeded",
    }
    assert results(dayfly.start("twice")) == {"result": 19}


def test_a_step_may_import_what_lies_beside_it(dayfly: Flows):
    folder = dayfly.folder / "beside"
    folder.mkdir()
    (folder / "halves.py").write_text("def half(n):\n    return n // 2\n")
    (folder / "halving.py").write_text(
        "from dayfly import step, workflow\nfrom halves import half\n\n"
        "@step\ndef halved(n: int) -> int:\n    return half(n)\n\n"
        "@workflow\ndef halving(n: int = 8):\n    return halved(n)\n"
    )
    assert f"with the folder {folder}" in dayfly("workflow", "deploy", "beside/halving.py")
    assert results(dayfly.start("halving")) == {"result": 4}


def test_each_line_of_a_log_has_its_step(dayfly: Flows):
    """Of a step also what its instances wrote, and of a workflow as a step all that is in it."""
    (dayfly.folder / "pipeline.py").write_text(PIPELINE)
    dayfly("workflow", "deploy", "pipeline.py")
    name = dayfly.start("twice", "-p", "most=2")["metadata"]["name"]

    def heads(*words: str) -> set[str]:
        lines = dayfly("run", "logs", name, *words).splitlines()
        return {line.split()[1] for line in lines if "square of" in line}

    first = {"squares/square[0]", "squares/square[1]"}
    assert heads() > first
    assert heads("--step", "squares/square") == heads("--step", "squares") == first
    assert heads("--step", "squares/square[1]") == {"squares/square[1]"}
    told = dayfly("run", "logs", name, "--step", "nosuch", code=1)
    assert f"run '{name}' has no step 'nosuch'; it has squares, " in told
    assert "squares/square[0]" in told


def test_both_faces_say_the_same(dayfly: Flows):
    """What is compiled to YAML and back is the workflow that it was."""
    (dayfly.folder / "pipeline.py").write_text(PIPELINE)
    yaml = dayfly("workflow", "compile", "pipeline.py:squares")
    (dayfly.folder / "pipeline.yaml").write_text(yaml)
    python = dayfly("workflow", "compile", "pipeline.yaml")

    assert "kind: Workflow" in yaml
    assert "@workflow" in python
    (dayfly.folder / "again.py").write_text(python)
    assert dayfly("workflow", "compile", "again.py") == yaml


def test_parameters_are_given_as_json_or_text_or_in_a_file(dayfly: Flows):
    dayfly.apply(
        manifest(
            "params",
            '- {name: a, script: \'printf "%s" "$(params.text)" >$(results.r.path)\','
            " results: [{name: r}]}",
            "params:\n- {name: text}\n- {name: n, type: integer, default: 1}\n"
            "results: {text: $(steps.a.results.r), n: $(params.n)}",
        )
    )
    assert results(dayfly.start("params", "-p", "text=a b", "-p", "n=3")) == {
        "text": "a b",
        "n": 3,
    }
    assert results(dayfly.start("params", "-p", "text=1.20"))["text"] == "1.20"
    assert results(dayfly.start("params", "-p", 'text="quoted"'))["text"] == "quoted"
    (dayfly.folder / "p.json").write_text('{"text": "x", "n": 4}')
    assert results(dayfly.start("params", "--params", "p.json", "-p", "n=5"))["n"] == 5
    whole = dayfly("run", "start", "params", "--params", "-", stdin='{"text": "in"}')
    assert '  text: "in"' in whole


# ---- what a step is -----------------------------------------------------------------------------


def test_a_step_whose_command_is_not_there_is_not_tried_again(dayfly: Flows):
    view = dayfly.flow("- {name: a, command: [./nosuch.sh], retries: 3}", code=1)
    shown = dayfly.json("run", "show", view["metadata"]["name"])["view"]["tree"]

    assert view["status"]["kind"] == "CannotRun", view["status"]
    assert shown["children"][0]["attempt"] == 1


def test_scripts_have_their_interpreter_and_leave_results(dayfly: Flows):
    """`#!` is honoured, and without one it is a shell that stops at the first error."""
    view = dayfly.flow(
        """
- name: shell
  script: |
    echo 7 >$(results.n.path)
    echo "it is $MODE" >$(results.mode.path)
  env: {MODE: "of $(params.word)"}
  results: [{name: n, type: integer}, {name: mode}]
- name: python
  script: |
    #!/usr/bin/env python3
    import json
    json.dump({"n": $(steps.shell.results.n) + 1}, open("$(results.o.path)", "w"))
  results: [{name: o, type: object}]
- name: stops
  script: |
    false
    echo not here >$(results.n.path)
  results: [{name: n}]
  onError: continue
""",
        """
params: [{name: word, default: words}]
results:
  n: $(steps.shell.results.n)
  mode: $(steps.shell.results.mode)
  o: $(steps.python.results.o.n)
  never: $(steps.stops.results.n)
""",
    )

    assert results(view) == {"n": 7, "mode": "it is of words", "o": 8}


SAYS = """
- name: say
  cache: true
  params: {word: $(params.word), then: $(params.then)}
  script: |
    printf '%s' "$(params.word)" > $(results.said.path)
    $(params.then)
  results: [{name: said}]
"""
FORGE = """
setsid sh -c 'while touch /tmp/is-up; do
  for folder in /tmp/.dayfly-*/results; do printf forged > $folder/said; done
done' &
until [ -e /tmp/is-up ]; do :; done
"""
LOOK = """
set -- /tmp/.dayfly-*/results/said
n=0; said=mine
while [ "$said" = mine ] && [ $n -lt 30000 ]; do
  read said < $1 || :; n=$((n + 1))
done
"""


def test_what_a_cached_step_left_running_changes_no_other_steps_result(sandboxed: Flows):
    """It would be kept as what that one leaves, for everybody who asks for the same."""
    more = "params: [{name: word}, {name: then}]\nresults: {said: $(steps.say.results.said)}"
    sandboxed.apply(manifest("says", SAYS, more))
    sandboxed.start("says", "-p", "word=hostile", "-p", f"then={FORGE}")

    for _ in range(2):
        run = sandboxed.start("says", "-p", "word=mine", "-p", f"then={LOOK}")
        assert run["status"]["results"] == {"said": "mine"}


def test_functions_tasks_and_workflows_are_steps(dayfly: Flows):
    dayfly.server.deploy(
        "add", files={"main.py": "def handler(event, context):\n    return event['a'] + event['b']"}
    )
    dayfly.apply(
        """
apiVersion: dayfly.dev/v1
kind: Task
metadata: {name: shout}
spec:
  params: [{name: word}]
  results: [{name: loud}]
  env: {MARK: "!"}
  script: printf '%s%s' "$(params.word)" "$MARK" | tr a-z A-Z >$(results.loud.path)
---
"""
        + manifest(
            "inner",
            "- {name: add, function: add, params: {a: $(params.a), b: 10}}",
            "params: [{name: a, type: integer}]\nresults: {sum: $(steps.add.results.result)}",
        )
    )
    view = dayfly.flow(
        """
- {name: one, function: add, params: {a: 1, b: 2}}
- {name: loud, task: shout, params: {word: "w$(steps.one.results.result)"}}
- {name: inner, workflow: inner, params: {a: $(steps.one.results.result)}}
""",
        "results: {loud: $(steps.loud.results.loud), sum: $(steps.inner.results.sum)}",
    )

    assert results(view) == {"loud": "W3!", "sum": 13}


def test_a_matrix_runs_each_combination_and_gathers_what_they_leave(dayfly: Flows):
    view = dayfly.flow(
        """
- name: each
  matrix:
    params: {os: [linux, mac], n: [1, 2]}
    include: [{os: win, n: 9}]
    parallelism: 2
  script: printf '%s' "$(params.os)-$(params.n)-$N" >$(results.r.path)
  env: {N: $(item.n)}
  results: [{name: r}]
""",
        "results: {all: $(steps.each.results.r)}",
    )

    assert results(view) == {"all": ["linux-1-1", "linux-2-2", "mac-1-1", "mac-2-2", "win-9-9"]}


# ---- how it goes on -----------------------------------------------------------------------------


def test_a_failure_ends_the_run_and_what_runs_finally_runs(dayfly: Flows):
    view = dayfly.flow(
        """
- {name: bad, script: "echo so sad >&2; exit 3", retries: 1}
- {name: never, script: "true", runAfter: [bad]}
""",
        """
finally:
- name: last
  script: printf '%s %s' "$(steps.bad.status)" "$(steps.status)" >$(results.said.path)
  results: [{name: said}]
results: {said: $(finally.last.results.said)}
""",
        code=1,
    )
    status = view["status"]

    assert status["state"] == "Failed"
    assert status["message"].startswith("step 'bad': ")
    assert (status["succeeded"], status["failed"]) == (1, 2)
    assert dayfly.tree(view["metadata"]["name"]) == {
        "bad": "failed",
        "never": "not run",
        "last": "succeeded",
    }


def test_a_failed_run_is_retried_with_what_succeeded(dayfly: Flows):
    name = f"flaky-{dayfly.server.driver}"
    (dayfly.folder / "flaky.py").write_text(
        "from dayfly import step, workflow\n"
        "import uuid\n\n"
        "@step\ndef once() -> str:\n    return uuid.uuid4().hex\n\n"
        "@step\ndef check(a: str, ok: bool) -> str:\n"
        "    if not ok:\n        raise ValueError('not today')\n    return a\n\n"
        f"@workflow(name='{name}')\ndef flow():\n"
        "    from dayfly import function\n"
        "    a = once()\n"
        "    b = function('gate')\n"
        "    return {'a': check(a, b), 'b': a}\n"
    )
    gate = "def handler(event, context):\n    return {}\n"
    dayfly.server.deploy("gate", files={"main.py": gate.format(False)})
    dayfly("workflow", "deploy", "flaky.py")
    view = dayfly.start(name, "--name", name, code=1)
    once = dayfly.json("run", "show", name)
    assert "ValueError: not today" in view["status"]["message"]
    assert once["status"]["state"] == "Failed"

    told = dayfly("run", "retry", name, code=1)
    assert told.startswith(f"{name}-r1 Failed")
    assert dayfly.tree(f"{name}-r1") == {"once": "succeeded", "gate": "succeeded",
                                         "check": "failed"}  # fmt: skip


def test_a_step_that_takes_too_long_is_ended(dayfly: Flows):
    at = time.monotonic()
    view = dayfly.flow("- {name: slow, script: sleep 60, timeout: 300ms}", code=1)

    assert view["status"]["kind"] == "TimedOut"
    assert time.monotonic() - at < 60


def test_a_run_is_cancelled(dayfly: Flows):
    name = f"cancelled-{dayfly.server.driver}"
    dayfly.apply(
        manifest(
            name,
            "- {name: slow, script: sleep 60}",
            "finally:\n- {name: last, script: 'true'}",
        )
    )
    assert dayfly("run", "start", name, "--name", name, "-d") == f"{name}\n"
    assert eventually(lambda: dayfly.tree(name).get("slow") in ("asked", "running"))
    assert dayfly("run", "delete", name, "-y", code=1).count("cancel it first") == 1
    assert dayfly("run", "cancel", name) == f"{name} is being cancelled\n"
    assert eventually(lambda: dayfly.json("run", "show", name)["status"]["state"] == "Cancelled")
    assert dayfly.tree(name) == {"slow": "cancelled", "last": "succeeded"}
    told = dayfly("run", "cancel", name, code=1)
    assert "is over: Cancelled. `dayfly run retry" in told
    assert "Correct what" not in told
    assert dayfly("run", "delete", name, "-y") == f"deleted {name}\n"
    assert f"no run default/{name}" in dayfly("run", "show", name, code=1)


def test_a_run_waits_for_an_approval_a_time_and_a_callback(dayfly: Flows):
    """And holds no sandbox meanwhile."""
    name = f"waits-{dayfly.server.driver}"
    dayfly.apply(
        manifest(
            name,
            """
- {name: timer, wait: {timer: 100ms}}
- {name: sign-off, wait: {approval: "is $(run.name) well?"}, runAfter: [timer]}
- {name: hook, wait: {callback: true}, runAfter: [sign-off]}
""",
            "results: {by: $(steps.sign-off.results.result.note),"
            " n: $(steps.hook.results.result.n)}",
        )
    )
    dayfly("run", "start", name, "--name", name, "-d")
    assert eventually(lambda: dayfly.json("run", "show", name)["expected"])
    assert "sign-off waits for approval: is" in dayfly("run", "show", name)
    assert "waits for no approval" in dayfly("run", "approve", name, "hook", code=1)
    wrong = dayfly("run", "approve", name, "nobody", code=1)
    assert "waits for no approval; those that do: sign-off" in wrong
    assert "did you mean 'sign-off'? Nothing" in dayfly("run", "approve", name, "sign-of", code=1)
    told = dayfly("run", "approve", name, "sign-off", "--note", "looks good")
    assert told == f"sign-off of {name} is approved\n"
    found = eventually(
        lambda: [e for e in dayfly.json("run", "show", name)["expected"] if e["key"] == "hook"]
    )
    token = found[0]["token"]
    assert f"hook waits for a callback: {token}" in dayfly("run", "show", name)
    path = f"/namespaces/default/runs/{name}/callbacks/"
    assert dayfly.server.ask("POST", f"{path}wrong", {"n": 1}).status == 400
    assert dayfly.server.ask("POST", f"{path}{token}", {"n": 7}).status == 202
    assert eventually(lambda: dayfly.json("run", "show", name)["status"]["state"] == "Succeeded")
    assert results(dayfly.json("run", "show", name)) == {"by": "looks good", "n": 7}
    assert dayfly.server.ask("POST", f"{path}{token}", {"n": 1}).status == 400


def test_who_waits_for_a_run_is_told_what_it_waits_for(dayfly: Flows):
    name = f"told-{dayfly.server.driver}"
    dayfly.apply(
        manifest(
            name,
            """
- {name: sign-off, wait: {approval: "well?"}}
- {name: hook, wait: {callback: true}, timeout: 2s, onError: continue}
""",
        )
    )
    env = os.environ | {"DAYFLY_URL": f"http://{dayfly.server.admin}"}
    command = [DAYFLY, "run", "start", name, "--name", name]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr is not None
        said = [process.stderr.readline() for _ in range(4)]
        dayfly("run", "approve", name, "sign-off")
        rest = process.stderr.read()

    assert said == [
        f"{name} begins\n",
        "sign-off waits for approval: well?\n",
        f"  dayfly run approve {name} sign-off\n",
        f"hook waits for a callback: dayfly run show {name}\n",
    ]
    assert "waits for" not in rest  # once is enough


def test_what_is_refused_fails(dayfly: Flows):
    name = f"refused-{dayfly.server.driver}"
    dayfly.apply(manifest(name, '- {name: ok, wait: {approval: "well?"}}'))
    dayfly("run", "start", name, "--name", name, "-d")
    assert eventually(lambda: dayfly.json("run", "show", name)["expected"])
    dayfly("run", "refuse", name, "ok", "--note", "not today")
    assert eventually(lambda: dayfly.json("run", "show", name)["status"]["state"] == "Failed")

    assert "not today" in dayfly("run", "show", name)
    assert "ATTEMPTS" in dayfly("run", "list").splitlines()[0]  # a wait makes none


def test_ctrl_c_ends_the_waiting_and_not_the_run(sandboxed: Flows):
    sandboxed.apply(manifest("goes-on", '- {name: a, wait: {approval: "On?"}}'))
    env = os.environ | {"DAYFLY_URL": f"http://{sandboxed.server.admin}"}
    command = [DAYFLY, "run", "start", "goes-on", "--name", "goes-on"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "goes-on begins\n"
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()

    assert process.returncode == 130
    assert "it goes on: dayfly run show goes-on" in told
    sandboxed("run", "approve", "goes-on", "a")
    assert eventually(
        lambda: sandboxed.json("run", "show", "goes-on")["status"]["state"] == "Succeeded"
    )


# ---- what a beginner gets wrong -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "more", "why"),
    [
        ("- {name: a, script: x, runAfter: [b]}\n- {name: b, script: x, runAfter: [a]}", "",
         "a -> b -> a"),
        ("- {name: a, script: x, runAfter: [c]}\n- {name: b, script: x}", "", "'c'"),
        ("- {name: a, script: x}\n- {name: a, script: y}", "", "'a'"),
        ("- {name: a, script: 'echo $(steps.b.results.x)'}", "", "'b'"),
        ("- {name: a, script: x}\n- {name: b, script: 'echo $(steps.a.results.x)'}", "", "'x'"),
        ("- {name: a, script: 'echo $(params.nope)'}", "", "'nope'"),
        ("- {name: a, script: x, task: y}", "", "needs one of"),
        ("- {name: a, task: nope}", "", "nope"),
        ("- {name: a, workflow: nope}", "", "nope"),
        ("- {name: a, script: x, timeout: soon}", "", "no duration"),
        ("- {name: a, script: x, retires: 3}", "", "retires"),
        ("- {name: a, handler: 'main:handler'}", "", "package"),
        ("- {name: a, script: x, environment: nope}", "", "no environment 'nope'"),
        ("- {name: a, script: x}", "environment: nope", "no environment 'nope'"),
        ("- {name: a, script: x}", "params: [{name: n, type: integer, default: x}]", "integer"),
        ("# none", "", "steps"),
    ],
)  # fmt: skip
def test_a_declaration_that_cannot_be_is_refused_with_its_place(
    sandboxed: Flows, steps: str, more: str, why: str
):
    (sandboxed.folder / "flow.yaml").write_text(manifest("wrong", steps, more))
    done = sandboxed.try_("apply", "-f", "flow.yaml")

    assert done.returncode in (1, 2)
    assert why in done.stderr
    assert "Traceback" not in done.stderr
    assert sandboxed.server.ask("GET", "/namespaces/default/workflows/wrong").status == 404


def test_a_task_needs_its_environment(sandboxed: Flows):
    task = "kind: Task\nmetadata: {name: bare}\nspec: {script: x, environment: nope}\n"

    assert "no environment 'nope'" in sandboxed.apply(task, code=1)
    assert "bare" not in {
        task["metadata"]["name"] for task in sandboxed.server.ask("GET", "/tasks").json()
    }


def test_an_environment_may_stand_behind_what_needs_it(sandboxed: Flows):
    environment = "---\nkind: Environment\nmetadata: {name: late}\nspec: {preload: [math]}\n"
    flow = manifest("early", "- {name: a, script: 'true'}", "environment: late")

    assert "default/early 1 steps" in sandboxed.apply(flow + environment)
    assert results(sandboxed.start("early")) == {}


def test_scripts_need_no_package_after_a_restart_too(new_server: Any, tmp_path: Path):
    """The empty one is there, whoever else uses it."""
    dayfly = Flows(new_server(), tmp_path)
    for _ in range(2):
        assert results(dayfly.flow("- {name: a, script: 'true'}")) == {}
        assert dayfly.server.stop() == 0
        dayfly.server.start()


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (("run", "start", "nope"), 1, "no workflow default/nope. `dayfly workflow list`"),
        (("run", "start", "small", "-p", "x=1"), 1, "there is no parameter 'x'"),
        (("run", "start", "small", "-p", "n=text"), 1, "integer is wanted, this is string"),
        (("run", "start", "small"), 1, "parameter 'n' must be given"),
        (("run", "start", "small", "-p", "n"), 2, "give NAME=VALUE"),
        (("run", "start", "small", "--params", "no.json"), 2, "no.json"),
        (("run", "start", "small", "--params", "bad.json"), 2, "not valid JSON"),
        (("run", "start", "small", "--name", "Not/A Name", "-p", "n=1"), 1, "lower-case"),
        (("run", "show", "nope"), 1, "no run default/nope. `dayfly run list`"),
        (("run", "retry", "nope"), 1, "no run default/nope"),
        (("workflow", "deploy", "no.py"), 2, "there is no file no.py"),
        (("workflow", "deploy", "bad.json"), 2, "dayfly apply -f"),
        (("workflow", "deploy", "broken.py"), 2, "broken.py"),
        (("workflow", "deploy", "empty.py"), 2, "workflow"),
        (("workflow", "compile", "no.yaml"), 2, "there is no file no.yaml"),
        (("workflow", "delete", "nope"), 1, "no workflow default/nope"),
    ],
)
def test_what_a_beginner_gets_wrong_is_said_with_its_remedy(
    sandboxed: Flows, words: tuple[str, ...], code: int, why: str
):
    folder = sandboxed.folder
    (folder / "bad.json").write_text("{")
    (folder / "broken.py").write_text("import nothing_of_that_name\n")
    (folder / "empty.py").write_text("x = 1\n")
    sandboxed.apply(
        manifest("small", "- {name: a, script: 'true'}", "params: [{name: n, type: integer}]")
    )

    done = sandboxed.try_(*words)

    assert why in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == code


def test_two_runs_of_one_name_cannot_be(sandboxed: Flows):
    sandboxed.apply(manifest("named", "- {name: a, script: 'true'}"))
    sandboxed.start("named", "--name", "taken")

    assert "taken" in sandboxed("run", "start", "named", "--name", "taken", code=1)


def test_a_run_goes_on_as_it_began_though_its_workflow_changed(sandboxed: Flows):
    wait = '- {name: w, wait: {approval: "go?"}}\n'
    sandboxed.apply(
        manifest("changes", wait + "- {name: a, script: printf old >$(results.r.path),"
                 " results: [{name: r}], runAfter: [w]}", "results: {r: $(steps.a.results.r)}")
    )  # fmt: skip
    sandboxed("run", "start", "changes", "--name", "changes", "-d")
    sandboxed.apply(manifest("changes", "- {name: b, script: 'true'}"))
    sandboxed("workflow", "delete", "changes")
    assert eventually(lambda: sandboxed.json("run", "show", "changes")["expected"])
    sandboxed("run", "approve", "changes", "w")
    assert eventually(lambda: sandboxed.json("run", "show", "changes")["status"]["endedAt"])

    assert results(sandboxed.json("run", "show", "changes")) == {"r": "old"}


def test_hostile_requests_are_answered_with_what_is_wrong(sandboxed: Flows):
    ask = sandboxed.server.ask
    for method, path, body in [
        ("PUT", "/namespaces/default/workflows/x", b"{"),
        ("PUT", "/namespaces/default/workflows/x", b"[]"),
        ("PUT", "/namespaces/default/workflows/x", b'{"steps": 3}'),
        ("PUT", "/namespaces/default/workflows/x", b"[" * 100_000),
        ("PUT", "/namespaces/default/workflows/X..", b"{}"),
        ("PUT", "/namespaces/default/tasks/x", b'{"script": 5}'),
        ("POST", "/namespaces/default/workflows/x/runs", b'{"params": []}'),
        ("POST", "/namespaces/default/workflows/x/runs", b"\xff"),
        ("POST", "/namespaces/default/runs/x/decisions", b"{}"),
        ("POST", "/namespaces/default/runs/x/cancel", b'{"hard": "very"}'),
        ("GET", "/runs?limit=no", None),
    ]:
        reply = ask(method, path, body)
        assert 400 <= reply.status < 500, (path, body, reply)
        assert reply.json()["title"], reply.body
    assert not sandboxed.server.errors()


def test_a_long_graph_is_taken_and_one_that_is_too_long_is_refused(sandboxed: Flows):
    """And meanwhile the server answers others."""
    slow: list[float] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            at = time.monotonic()
            assert sandboxed.server.ask("GET", "/ready").status == 200
            slow.append(time.monotonic() - at)
            time.sleep(0.01)

    looker = threading.Thread(target=look)
    looker.start()
    try:
        path = "/namespaces/default/workflows/long"
        steps = [{"name": f"s{n}", "script": "true"} for n in range(30_000)]
        reply = sandboxed.server.ask("PUT", path, json.dumps({"steps": steps}).encode())
        assert reply.status == 200, reply.body[:500]
        steps = [{"name": f"s{n}", "script": "true"} for n in range(100_001)]
        reply = sandboxed.server.ask("PUT", path, json.dumps({"steps": steps}).encode())
        assert reply.status == 400, reply.body[:500]
    finally:
        done.set()
        looker.join()
    sandboxed("workflow", "delete", "long")
