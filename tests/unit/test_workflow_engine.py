"""The engine of a run: what is told, and what it has others do about it."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from dayfly_pool.errors import BadInput
from dayfly_pool.workflow import engine as engine_module
from dayfly_pool.workflow import walk as walk_module
from dayfly_pool.workflow.engine import Run
from dayfly_pool.workflow.facts import (
    FACT_BYTES_MAX,
    FORMAT,
    VALUE_BYTES_MAX,
    Artifact,
    Called,
    Cancel,
    CancelAsked,
    Command,
    Decided,
    Ended,
    Expect,
    Fact,
    Failed,
    Finish,
    Invoke,
    Passed,
    Report,
    RetryAsked,
    RunBegan,
    Started,
    View,
    decode,
    encode,
    to_refer,
)
from dayfly_pool.workflow.model import (
    Condition,
    Declared,
    Matrix,
    Output,
    Param,
    Retries,
    Step,
    TaskSpec,
    Timeouts,
    Wait,
    WorkflowSpec,
)
from dayfly_pool.workflow.plan import Definition
from dayfly_pool.workflow.references import arguments, substitute_text
from dayfly_pool.workflow.tree import Shown
from dayfly_pool.workflow.versions import Marks
from dayfly_pool.workflow.walk import FINALLY_S_MIN, INSTANCES_MAX, STOP_S

START = 1000.0


def step(name: str, *after: str, **fields: Any) -> Step:
    """A handler, unless *fields* say otherwise."""
    if not {"script", "command", "task", "workflow", "wait", "function"} & fields.keys():
        fields["handler"] = "work:do"
    return Step(name=name, run_after=after, **fields)


def result(name: str) -> str:
    return f"$(steps.{name}.results.result)"


class Talk:
    """A run that is told facts; `said` is what it answered, in words."""

    def __init__(
        self,
        *steps: Step,
        given: dict[str, Any] | None = None,
        nested: dict[str, WorkflowSpec] | None = None,
        tasks: dict[str, TaskSpec] | None = None,
        **fields: Any,
    ) -> None:
        self.definition = Definition(WorkflowSpec(steps=steps, **fields), nested or {}, tasks or {})
        self.run, self.now = Run(self.definition), START
        self.commands: list[Command] = []
        self.journal: list[Fact] = []
        self.said = self.tell(
            RunBegan(at=self.now, params=given or {}, run={"id": "r-1"}),
        )

    def tell(self, *facts: Fact) -> list[str]:
        self.commands = []
        for fact in facts:
            self.journal.append(fact)
            self.commands += self.run.feed(fact)
        return words(self.commands)

    def ended(self, key: str, value: Any = None, attempt: int = 1, **fields: Any) -> list[str]:
        results = fields.pop("results", {"result": value})
        return self.tell(Ended(at=self.now, key=key, attempt=attempt, results=results, **fields))

    def failed(self, key: str, attempt: int = 1, kind: str = "Raised", **fields: Any) -> list[str]:
        return self.tell(Failed(at=self.now, key=key, attempt=attempt, kind=kind, **fields))

    def stopped(self, key: str, attempt: int = 1) -> list[str]:
        return self.failed(key, attempt, "Cancelled")

    def passed(self, seconds: float) -> list[str]:
        self.now += seconds
        return self.tell(Passed(at=self.now))

    def wakes_in(self) -> float | None:
        return None if self.run.wake_at is None else self.run.wake_at - self.now

    def invoked(self) -> Invoke:
        (command,) = [each for each in self.commands if isinstance(each, Invoke)]
        return command

    def finish(self) -> Finish:
        (command,) = [each for each in self.commands if isinstance(each, Finish)]
        return command

    def states(self) -> dict[str, str]:
        tree = self.run.tree()
        assert tree is not None
        return {node.key: node.state for node in flat(tree)[1:]}

    def reason(self, key: str) -> tuple[str, str]:
        tree = self.run.tree()
        assert tree is not None
        return next(node.reason for node in flat(tree) if node.key == key)


def flat(node: Shown) -> list[Shown]:
    return [node, *(each for child in node.children for each in flat(child))]


def words(commands: Sequence[Command]) -> list[str]:
    said = []
    for command in commands:
        match command:
            case Invoke(key=key, attempt=attempt):
                said.append(key if attempt == 1 else f"{key} again ({attempt})")
            case Expect(key=key, kind=kind):
                said.append(f"expect {kind} {key}")
            case Cancel(key=key):
                said.append(f"cancel {key}")
            case Finish(status=status):
                said.append(status)
    return said


# ---- order and data -----------------------------------------------------------------------------


def test_what_needs_nothing_starts_at_once_and_the_rest_when_its_turn_comes():
    talk = Talk(step("a"), step("b"), step("c", "a", "b"))

    assert talk.said == ["a", "b"]
    assert talk.ended("a") == []
    assert talk.ended("b") == ["c"]
    assert talk.ended("c") == ["Succeeded"]


def test_who_takes_a_result_comes_after_it_and_is_given_it_with_its_type():
    talk = Talk(step("a"), step("b", params={"n": result("a"), "text": f"got {result('a')}"}))
    talk.ended("a", [1, 2])

    assert talk.invoked().params == {"n": [1, 2], "text": "got [1,2]"}


def test_parameters_are_what_was_given_or_their_defaults():
    params = (Param(name="n", type="integer"), Param(name="m", type="integer", default=2))
    talk = Talk(
        step("a", params={"x": ["$(params.n)", "$(params.m)"]}), params=params, given={"n": 1}
    )

    assert talk.invoked().params == {"x": [1, 2]}


def test_a_run_without_a_parameter_it_needs_ends_before_it_begins():
    talk = Talk(step("a"), params=(Param(name="n"),))

    assert talk.said == ["Failed"]
    assert "'n' must be given" in talk.finish().message


def test_a_definition_that_is_wrong_is_the_end_of_its_run():
    talk = Talk(step("a", "b"), step("b", "a"))

    assert talk.said == ["Failed"]
    assert "a -> b -> a" in talk.finish().message
    assert talk.tell(RetryAsked(at=START)) == []


def test_outputs_are_handed_on_as_references_to_artifacts():
    talk = Talk(
        step("a", outputs=(Output(name="model"),)),
        step("b", inputs={"model": "$(steps.a.outputs.model)"}),
    )
    artifact = Artifact("file:///x", "ab" * 32, 7)
    talk.ended("a", outputs={"model": artifact})

    assert talk.invoked().inputs == {"model": artifact.as_value()}


def test_a_script_is_told_what_its_references_stand_for():
    """And where things are; what is none of our words is the shell's own."""
    script = (
        "cat $(inputs.data.path) > $(outputs.all.path); echo $(params.n) $(steps.a.status) $(ls)"
    )
    talk = Talk(
        step("a", outputs=(Output(name="data"),)),
        step(
            "b",
            script=script,
            env={"ID": "$(run.id)"},
            params={"n": 3},
            inputs={"data": "$(steps.a.outputs.data)"},
            outputs=(Output(name="all", path="sub/all.txt"),),
        ),
    )
    talk.ended("a", outputs={"data": Artifact("file:///x", "ab" * 32)})
    scope = talk.invoked().scope
    assert scope is not None

    assert (
        substitute_text(script, scope) == "cat /in/data > /out/sub/all.txt; echo 3 Succeeded $(ls)"
    )
    assert substitute_text("$(run.id)", scope) == "r-1"


def test_a_task_knows_its_own_parameters_and_their_defaults():
    task = TaskSpec(
        params=(Param(name="greeting", default="hello"), Param(name="who")),
        command=("echo", "$(params.greeting)", "$(params.who)"),
    )
    talk = Talk(
        step("a", task="greet", params={"who": "$(params.name)"}),
        tasks={"greet": task},
        params=(Param(name="name"),),
        given={"name": "you"},
    )
    command = talk.invoked()
    assert command.scope is not None
    assert task.command is not None

    assert command.params == {"greeting": "hello", "who": "you"}
    assert arguments(task.command, command.scope) == ["echo", "hello", "you"]


def test_results_of_the_workflow_are_of_its_steps_also_of_those_that_run_finally():
    talk = Talk(
        step("a"),
        finally_=(step("f"),),
        results={"a": result("a"), "both": [result("a"), "$(finally.f.results.result)"]},
    )
    talk.ended("a", 1)
    talk.ended("f", 2)

    assert talk.finish().results == {"a": 1, "both": [1, 2]}


def test_results_that_nobody_left_are_left_out():
    talk = Talk(
        step("a"),
        step("b", params={"x": result("a")}),
        results={"a": result("a"), "b": result("b")},
    )
    talk.ended("a", 1)
    talk.failed("b")

    assert talk.finish().results == {"a": 1}


def test_what_a_step_did_not_leave_fails_who_needs_it():
    talk = Talk(step("a"), step("b", params={"x": result("a")}))

    assert talk.ended("a", results={}) == ["Failed"]
    assert talk.finish().kind == "MissingResult"


# ---- guards -------------------------------------------------------------------------------------

FALSE = (Condition(input="x", operator="in", values=("y",)),)


def test_a_guard_that_does_not_hold_skips_its_step_and_the_run_is_completed():
    talk = Talk(step("a", when=FALSE))

    assert talk.said == ["Completed"]
    assert talk.reason("a") == ("when", "")


@pytest.mark.parametrize(
    ("condition", "runs"),
    [
        (Condition(input=result("a"), operator="in", values=("1", "2")), True),
        (Condition(input=result("a"), operator="notin", values=("1", "2")), False),
        (Condition(input=result("a"), operator="in", values="$(params.list)"), True),
        (Condition(input="$(params.list)", operator="in", values=("1",)), False),
        (Condition(cel="steps.a.results.result > 0 && params.list[0] == '1'"), True),
        (Condition(cel="steps.a.results.result > 1"), False),
    ],
)
def test_guards_see_parameters_and_results(condition: Condition, runs: bool):
    talk = Talk(
        step("a"),
        step("b", when=(condition,)),
        params=(Param(name="list", type="array"),),
        given={"list": ["1"]},
    )

    assert talk.ended("a", 1) == (["b"] if runs else ["Completed"])


@pytest.mark.parametrize("values", [["x" * 200_000], list(range(50_000)), [{"k": ["y"] * 90_000}]])
def test_a_guard_that_is_long_to_compare_is_no_work_for_the_server(values: list[Any]):
    talk = Talk(
        step("a", when=(Condition(input="$(params.list)", operator="in", values=("1",)),)),
        params=(Param(name="list", type="array"),),
        given={"list": values},
    )

    assert talk.said == ["Failed"]
    assert "128 KiB to compare" in talk.finish().message


def test_a_guard_that_is_neither_true_nor_false_fails_its_step():
    talk = Talk(step("a"), step("b", when=(Condition(cel="steps.a.results.result"),)))

    assert talk.ended("a", "perhaps") == ["Failed"]
    assert "neither true nor false" in talk.finish().message


def test_what_a_guard_turned_away_keeps_nobody_who_only_comes_after_it():
    talk = Talk(step("a", when=FALSE), step("b", "a"))

    assert talk.said == ["b"]
    assert talk.ended("b") == ["Completed"]


def test_who_needs_a_result_of_what_was_skipped_is_skipped_with_all_that_comes_after_it():
    talk = Talk(
        step("a", when=FALSE),
        step("b", params={"x": result("a")}),
        step("c", "b"),
        step("d", "c"),
        step("e", script=f"echo {result('a')}"),
    )

    assert talk.said == ["Completed"]
    assert [talk.reason(key)[0] for key in "abcde"] == [
        "when", "result missing", "parent skipped", "parent skipped", "result missing",
    ]  # fmt: skip


def test_who_only_asks_how_a_skipped_step_ended_runs():
    talk = Talk(step("a", when=FALSE), step("b", params={"how": "$(steps.a.status)"}))

    assert talk.invoked().params == {"how": "None"}


# ---- failures -----------------------------------------------------------------------------------


def test_when_a_step_fails_nothing_new_starts_and_what_runs_is_let_end():
    talk = Talk(step("a"), step("b"), step("c", "b"))

    assert talk.failed("a", message="no") == []
    assert talk.ended("b") == ["Failed"]
    assert talk.finish() == Finish("Failed", {}, "Raised", "step 'a': no")
    assert talk.states() == {"a": "failed", "b": "succeeded", "c": "not run"}


def test_a_step_that_may_fail_keeps_nobody_but_who_needs_its_results():
    talk = Talk(
        step("a", on_error="continue"),
        step("b", "a", params={"how": "$(steps.a.status)"}),
        step("c", params={"x": result("a")}, on_error="continue"),
    )

    assert talk.failed("a") == ["b"]
    assert talk.invoked().params == {"how": "Failed"}
    assert talk.reason("c")[0] == "MissingResult"
    assert talk.ended("b") == ["Succeeded"]


def test_a_failed_attempt_is_tried_again_as_often_as_its_retries_say():
    talk = Talk(step("a", retries=2, params={"n": "$(retry.count) of $(retry.limit)"}))

    assert talk.failed("a", 1) == ["a again (2)"]
    assert talk.failed("a", 2) == ["a again (3)"]
    assert talk.invoked().params == {"n": "2 of 2"}
    assert talk.failed("a", 3) == ["Failed"]


def test_pauses_between_attempts_double_up_to_their_most():
    retries = Retries(limit=4, backoff_seconds=10, backoff_max_seconds=30)
    talk = Talk(step("a", retries=retries))
    pauses = []
    for attempt in range(1, 5):
        assert talk.failed("a", attempt) == []
        assert talk.run.outstanding() == []
        pauses.append(talk.wakes_in())
        assert talk.passed(pauses[-1] - 1) == []
        assert talk.passed(1) == [f"a again ({attempt + 1})"]

    assert pauses == [10, 20, 30, 30]


def test_what_is_no_fault_of_the_step_uses_up_no_retry():
    talk = Talk(step("a", timeout=5.0))
    for attempt in range(1, 20):
        assert talk.failed("a", attempt, "NoCapacity", is_counted=False) == []
        pause = talk.wakes_in()
        assert pause is not None
        assert 0 < pause <= 5
        assert talk.passed(pause) == [f"a again ({attempt + 1})"]

    assert talk.invoked().timeout_s == 5
    assert talk.ended("a", attempt=20) == ["Succeeded"]


def test_what_is_hopeless_is_not_tried_again():
    talk = Talk(step("a", retries=5))

    assert talk.failed("a", 1, "FunctionNotFound", is_hopeless=True) == ["Failed"]


def test_a_step_between_two_attempts_is_under_way_when_another_fails():
    talk = Talk(step("a", retries=Retries(limit=1, backoff_seconds=10)), step("b"))
    talk.failed("a")

    assert talk.failed("b") == []
    assert talk.passed(10) == ["a again (2)"]
    assert talk.ended("a", attempt=2) == ["Failed"]


def test_waits_are_given_up_when_a_step_fails():
    talk = Talk(step("a"), step("b", wait=Wait(approval="go?")), step("c", wait=Wait(timer="1h")))

    assert talk.failed("a") == ["cancel b", "Failed"]
    assert talk.states() == {"a": "failed", "b": "cancelled", "c": "cancelled"}


# ---- finally ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tell", "statuses"),
    [
        (Talk.ended, ["Succeeded", "Succeeded"]),
        (Talk.failed, ["Failed", "Failed"]),
    ],
)
def test_what_runs_finally_runs_however_the_steps_ended_and_knows(tell: Any, statuses: list[str]):
    talk = Talk(
        step("a"),
        finally_=(
            step("f", params={"all": "$(steps.status)", "a": "$(steps.a.status)"}),
            step("g"),
        ),
    )

    assert tell(talk, "a") == ["f", "g"]
    command = talk.commands[0]
    assert isinstance(command, Invoke)
    assert list(command.params.values()) == statuses
    talk.ended("f")
    assert talk.ended("g") == [statuses[0]]


def test_with_something_skipped_the_status_of_all_is_completed():
    talk = Talk(
        step("a", when=FALSE),
        finally_=(step("f", params={"all": "$(steps.status)", "a": "$(steps.a.status)"}),),
    )

    assert talk.invoked().params == {"all": "Completed", "a": "None"}


def test_a_failure_of_what_runs_finally_is_the_runs():
    talk = Talk(step("a"), finally_=(step("f"), step("g")))
    talk.ended("a")

    assert talk.failed("f") == []
    assert talk.ended("g") == ["Failed"]


def test_what_runs_finally_is_skipped_if_it_needs_what_is_not_there():
    finals = (
        step("f", params={"x": result("a")}),
        step("h", script=f"echo {result('a')}"),
        step("g", script="echo $(steps.a.status)"),
    )
    talk = Talk(step("a"), finally_=finals)

    assert talk.failed("a") == ["g"]
    assert talk.reason("f") == talk.reason("h") == ("result missing", "")
    assert talk.ended("g") == ["Failed"]


# ---- matrices -----------------------------------------------------------------------------------


def test_a_matrix_runs_each_combination_and_its_results_are_lists_in_order():
    talk = Talk(
        step("a", matrix=Matrix(params={"x": [1, 2], "y": ["p", "q"]}), params={"z": 0}),
        step("b", params={"all": result("a")}),
    )

    assert talk.said == ["a[0]", "a[1]", "a[2]", "a[3]"]
    given = [each.params for each in talk.commands if isinstance(each, Invoke)]
    assert given[1] == {"z": 0, "x": 1, "y": "q"}
    for index in (3, 1, 0):
        assert talk.ended(f"a[{index}]", index) == []
    assert talk.ended("a[2]", 2) == ["b"]
    assert talk.invoked().params == {"all": [0, 1, 2, 3]}


def test_a_matrix_over_results_has_as_many_instances_as_there_are_then():
    talk = Talk(step("a"), step("b", matrix=Matrix(params={"x": result("a")})))

    assert talk.ended("a", ["p", "q", "r"]) == ["b[0]", "b[1]", "b[2]"]


def test_a_matrix_over_what_is_no_list_fails():
    talk = Talk(step("a"), step("b", matrix=Matrix(params={"x": result("a")})))

    assert talk.ended("a", "pqr") == ["Failed"]
    assert "'x'" in talk.finish().message


def test_what_all_instances_lack_fails_the_step_before_it_has_any():
    talk = Talk(step("a"), step("b", matrix=Matrix(params={"x": [0]}), params={"y": result("a")}))

    assert talk.ended("a", results={}) == ["Failed"]
    assert talk.states() == {"a": "succeeded", "b": "failed"}


def test_include_adds_to_the_combinations_that_agree_with_it():
    include = ({"x": 1, "fast": True}, {"x": 9, "only": True})
    talk = Talk(step("a", matrix=Matrix(params={"x": [1, 2]}, include=include)))
    given = [each.params for each in talk.commands if isinstance(each, Invoke)]

    assert given == [{"x": 1, "fast": True}, {"x": 2}, {"x": 9, "only": True}]


def test_values_of_one_combination_can_be_named_in_params_and_inputs():
    talk = Talk(
        step("a", outputs=(Output(name="m"),), matrix=Matrix(params={"n": [1, 2]})),
        step(
            "b",
            matrix=Matrix(params={"model": "$(steps.a.outputs.m)"}),
            inputs={"model": "$(item.model)"},
        ),
    )
    for index in (0, 1):
        talk.ended(f"a[{index}]", outputs={"m": Artifact(f"file:///{index}", "ab" * 32)})
    given = [(each.inputs, each.params) for each in talk.commands if isinstance(each, Invoke)]

    assert [inputs["model"]["uri"] for inputs, _ in given] == ["file:///0", "file:///1"]
    assert all(params == {} for _, params in given)


def test_a_matrix_without_combinations_is_skipped_and_in_nobodys_way():
    talk = Talk(
        step("a"),
        step("b", matrix=Matrix(params={"x": result("a")})),
        step("c", params={"all": result("b")}),
    )

    assert talk.ended("a", []) == ["c"]
    assert talk.invoked().params == {"all": []}
    assert talk.ended("c") == ["Completed"]
    assert talk.reason("b")[0] == "matrix empty"


def test_no_more_instances_run_at_once_than_its_parallelism_says():
    talk = Talk(step("a", matrix=Matrix(params={"x": [0, 1, 2, 3]}, parallelism=2)))

    assert talk.said == ["a[0]", "a[1]"]
    assert talk.ended("a[1]") == ["a[2]"]
    assert talk.ended("a[0]") == ["a[3]"]


def test_when_an_instance_fails_no_further_ones_start():
    talk = Talk(step("a", matrix=Matrix(params={"x": [0, 1, 2, 3]}, parallelism=2)), step("b", "a"))

    assert talk.failed("a[0]", message="no") == []
    assert talk.ended("a[1]") == ["Failed"]
    assert talk.finish().message == "step 'a': 1 of 4 instances failed; instance 0: no"


def test_each_instance_has_its_own_retries():
    talk = Talk(step("a", retries=1, matrix=Matrix(params={"x": [0, 1]})))

    assert talk.failed("a[0]") == ["a[0] again (2)"]
    assert talk.failed("a[1]") == ["a[1] again (2)"]


def test_where_instances_may_fail_their_results_are_null():
    talk = Talk(
        step("a", on_error="continue", matrix=Matrix(params={"x": [0, 1]})),
        step("b", params={"all": result("a")}),
    )
    talk.failed("a[0]")

    assert talk.ended("a[1]", 1) == ["b"]
    assert talk.invoked().params == {"all": [None, 1]}


def test_an_instance_that_waits_for_its_turn_does_not_start_after_another_step_failed():
    talk = Talk(step("a", matrix=Matrix(params={"x": [0, 1]}, parallelism=1)), step("b"))
    talk.failed("b")

    assert talk.ended("a[0]") == ["Failed"]


def test_a_run_has_no_more_instances_than_its_limit():
    talk = Talk(
        step("a"),
        step("b", matrix=Matrix(params={"x": result("a"), "y": result("a")})),
    )

    assert talk.ended("a", list(range(1000))) == ["Failed"]
    assert str(INSTANCES_MAX) in talk.finish().message


# ---- nested workflows ---------------------------------------------------------------------------

INNER = WorkflowSpec(
    steps=(step("x", params={"n": "$(params.n)"}), step("y", params={"x": result("x")})),
    finally_=(step("z"),),
    params=(Param(name="n", type="integer"),),
    results={"sum": result("y")},
)


def test_a_nested_workflows_results_are_its_steps():
    talk = Talk(
        step("a", workflow="inner", params={"n": 1}),
        step("b", params={"sum": "$(steps.a.results.sum)"}),
        nested={"inner": INNER},
    )

    assert talk.said == ["a/x"]
    assert talk.invoked().params == {"n": 1}
    assert talk.invoked().workflow == "inner"
    assert talk.ended("a/x", 2) == ["a/y"]
    assert talk.ended("a/y", 3) == ["a/z"]
    assert talk.ended("a/z") == ["b"]
    assert talk.invoked().params == {"sum": 3}


def test_a_nested_workflows_failure_is_its_steps():
    talk = Talk(
        step("a", workflow="inner", params={"n": 1}), step("b", "a"), nested={"inner": INNER}
    )

    assert talk.failed("a/x", message="no") == ["a/z"]
    assert talk.ended("a/z") == ["Failed"]
    assert talk.finish().message == "step 'a': step 'x': no"


def test_a_nested_workflow_is_let_end_when_a_step_beside_it_fails():
    talk = Talk(step("a", workflow="inner", params={"n": 1}), step("b"), nested={"inner": INNER})
    talk.failed("b")

    assert talk.ended("a/x") == ["a/y"]


def test_a_nested_workflow_that_is_tried_again_keeps_what_succeeded():
    talk = Talk(step("a", workflow="inner", params={"n": 1}, retries=1), nested={"inner": INNER})
    talk.ended("a/x")
    talk.failed("a/y")

    assert talk.ended("a/z") == ["a/y again (2)"]
    assert talk.ended("a/y", attempt=2) == ["a/z again (2)"]
    assert talk.ended("a/z", attempt=2) == ["Succeeded"]


def test_what_runs_finally_may_fail_before_it_runs_and_be_tried_again():
    """Its node is gone while its instances' ends are still looked at."""
    task = TaskSpec(params=(Param(name="n", type="integer", enum=(7,)),), command=("x",))
    final = step("z", task="t", matrix=Matrix(params={"n": [1, 2]}))
    inner = WorkflowSpec(steps=(step("x"),), finally_=(final,))
    talk = Talk(step("a", workflow="inner", retries=3), nested={"inner": inner}, tasks={"t": task})

    assert talk.ended("a/x") == ["Failed"]


def test_a_matrix_of_nested_workflows_is_several():
    talk = Talk(
        step("a", workflow="inner", matrix=Matrix(params={"n": [1, 2]})),
        nested={"inner": INNER},
        results={"sums": "$(steps.a.results.sum)"},
    )

    assert talk.said == ["a[0]/x", "a[1]/x"]
    for index in (1, 0):
        for name in "xyz":
            talk.ended(f"a[{index}]/{name}", index)
    assert talk.finish().results == {"sums": [0, 1]}


def test_workflows_nested_too_deeply_do_not_begin():
    nested = {f"w{n}": WorkflowSpec(steps=(step("a", workflow=f"w{n + 1}"),)) for n in range(20)}
    nested["w20"] = WorkflowSpec(steps=(step("a"),))
    talk = Talk(step("a", workflow="w0"), nested=nested)

    assert talk.said == ["Failed"]
    assert "nested at most" in talk.finish().message


# ---- waits --------------------------------------------------------------------------------------


def test_a_timer_has_nothing_under_way_until_it_fires():
    talk = Talk(step("a", wait=Wait(timer="15m")), step("b", "a"))

    assert talk.said == []
    assert talk.run.outstanding() == []
    assert talk.passed(899) == []
    assert talk.passed(1) == ["b"]


def test_a_callback_brings_its_value_as_results():
    talk = Talk(
        step("a", wait=Wait(callback=True), results=(Declared(name="n", type="integer"),)),
        step("b", params={"n": "$(steps.a.results.n)"}),
    )

    assert talk.said == ["expect callback a"]
    assert talk.tell(Called(at=START, key="a", attempt=1, value={"n": 1, "m": 2})) == ["b"]
    assert talk.invoked().params == {"n": 1}
    assert talk.tell(Called(at=START, key="a", attempt=1, value={"n": 5})) == []


def test_what_is_approved_goes_on_and_what_is_refused_fails():
    talk = Talk(step("a", wait=Wait(approval="go?")), step("b", params={"who": f"{result('a')}"}))
    yes = Decided(at=START, key="a", attempt=1, is_approved=True, by="eve", note="fine")
    no = Decided(at=START, key="a", attempt=1, is_approved=False, by="eve", note="not yet")

    assert talk.said == ["expect approval a"]
    assert talk.tell(yes) == ["b"]
    assert talk.invoked().params == {"who": {"by": "eve", "note": "fine"}}
    other = Talk(step("a", wait=Wait(approval="go?")))
    assert other.tell(no) == ["Failed"]
    assert other.finish().message == "step 'a': eve refused: not yet"


def test_a_wait_that_nobody_answers_in_time_fails():
    talk = Talk(step("a", wait=Wait(callback=True), timeout="1m"))

    assert talk.passed(60) == ["cancel a", "Failed"]
    assert talk.finish().kind == "TimedOut"


def test_who_answers_must_have_been_asked_for_that():
    talk = Talk(step("a", wait=Wait(approval="go?")), step("b", wait=Wait(timer=5)), step("c"))

    assert talk.tell(Called(at=START, key="a", attempt=1)) == []
    assert talk.tell(Decided(at=START, key="b", attempt=1, is_approved=True)) == []
    assert talk.tell(Decided(at=START, key="c", attempt=1, is_approved=True)) == []
    assert talk.tell(Ended(at=START, key="a", attempt=1)) == []
    assert talk.states() == {"a": "expecting", "b": "expecting", "c": "asked"}


# ---- time ---------------------------------------------------------------------------------------


def test_steps_that_take_too_long_are_stopped_and_what_runs_finally_runs():
    talk = Talk(
        step("a"), step("b", "a"), finally_=(step("f"),), timeouts=Timeouts(workflow=60, steps=50)
    )

    assert talk.passed(50) == ["cancel a"]
    assert talk.stopped("a") == ["f"]
    assert talk.ended("f") == ["TimedOut"]


def test_a_run_that_had_failed_when_its_time_was_up_has_failed():
    talk = Talk(step("a"), step("b"), timeouts=Timeouts(steps=10))
    talk.failed("a")
    talk.passed(10)

    assert talk.stopped("b") == ["Failed"]
    assert talk.finish().kind == "Raised"


def test_what_runs_finally_keeps_its_part_of_the_time():
    talk = Talk(step("a"), finally_=(step("f"),), timeouts=Timeouts(workflow=60, finally_=20))

    assert talk.wakes_in() == 40
    talk.passed(40)
    talk.stopped("a")
    assert talk.wakes_in() == 20
    assert talk.passed(20) == ["cancel f"]
    assert talk.stopped("f") == ["TimedOut"]


def test_without_a_part_of_its_own_what_runs_finally_has_what_is_left_and_at_least_a_minute():
    talk = Talk(step("a"), finally_=(step("f"),), timeouts=Timeouts(workflow=100, steps=90))
    talk.passed(5)
    talk.ended("a")
    assert talk.wakes_in() == 95

    late = Talk(step("a"), finally_=(step("f"),), timeouts=Timeouts(workflow=100))
    late.passed(100)
    late.stopped("a")
    assert late.wakes_in() == FINALLY_S_MIN


def test_the_timeout_of_a_nested_workflow_is_its_steps():
    talk = Talk(step("a", workflow="inner", params={"n": 1}, timeout=10.0), nested={"inner": INNER})

    assert talk.passed(10) == ["cancel a/x"]
    assert talk.stopped("a/x") == ["a/z"]
    assert talk.ended("a/z") == ["Failed"]
    assert talk.finish().kind == "TimedOut"


def test_a_nested_workflow_goes_down_with_the_steps_around_it():
    talk = Talk(
        step("a", workflow="inner", params={"n": 1}),
        nested={"inner": INNER},
        timeouts=Timeouts(steps=10),
    )

    assert talk.passed(10) == ["cancel a/x"]
    assert talk.stopped("a/x") == ["a/z"]
    assert talk.ended("a/z") == ["TimedOut"]


def test_who_does_not_say_that_it_has_stopped_is_taken_for_stopped_after_a_while():
    talk = Talk(step("a"), timeouts=Timeouts(steps=10))
    talk.passed(10)

    assert talk.wakes_in() == STOP_S
    assert talk.passed(STOP_S) == ["TimedOut"]
    assert talk.stopped("a") == []


# ---- cancelling ---------------------------------------------------------------------------------


def test_a_cancelled_run_stops_what_is_under_way_and_then_runs_what_runs_finally():
    talk = Talk(
        step("a"),
        step("b", wait=Wait(callback=True)),
        step("c", retries=Retries(limit=1, backoff_seconds=10)),
        step("d", "a"),
        finally_=(step("f", params={"all": "$(steps.status)"}),),
    )
    talk.failed("c")

    assert talk.tell(CancelAsked(at=START, by="eve")) == ["cancel a", "cancel b"]
    assert talk.stopped("a") == ["f"]
    assert talk.invoked().params == {"all": "None"}
    assert talk.ended("f") == ["Cancelled"]
    assert talk.finish().message == "cancelled by eve"


def test_who_ends_before_it_is_stopped_has_succeeded():
    talk = Talk(step("a"), step("b", "a"))
    talk.tell(CancelAsked(at=START))

    assert talk.ended("a", 1) == ["Cancelled"]
    assert talk.states() == {"a": "succeeded", "b": "not run"}


def test_a_hard_cancellation_ends_the_run_at_once():
    talk = Talk(step("a"), step("b", matrix=Matrix(params={"x": [0, 1]})), finally_=(step("f"),))
    said = talk.tell(CancelAsked(at=START, is_hard=True))

    assert said == ["cancel a", "cancel b[0]", "cancel b[1]", "Cancelled"]
    assert talk.ended("a") == []
    assert talk.run.wake_at is None
    assert words(talk.run.outstanding()) == ["Cancelled"]


def test_what_runs_finally_is_ended_by_a_hard_cancellation_only():
    talk = Talk(step("a"), finally_=(step("f"),))
    talk.ended("a")

    assert talk.tell(CancelAsked(at=START)) == []
    assert talk.tell(CancelAsked(at=START, is_hard=True)) == ["cancel f", "Cancelled"]


def test_what_a_nested_workflow_runs_finally_is_let_end_and_then_it_is_not_tried_again():
    talk = Talk(step("a", workflow="inner", params={"n": 1}, retries=5), nested={"inner": INNER})
    talk.failed("a/x")

    assert talk.tell(CancelAsked(at=START)) == []
    assert talk.ended("a/z") == ["Cancelled"]


def test_a_matrix_that_is_cancelled_starts_no_further_instances():
    talk = Talk(step("a", matrix=Matrix(params={"x": [0, 1, 2]}, parallelism=1)))

    assert talk.tell(CancelAsked(at=START)) == ["cancel a[0]"]
    assert talk.stopped("a[0]") == ["Cancelled"]


# ---- retrying a run -----------------------------------------------------------------------------


def test_a_run_that_is_retried_keeps_what_succeeded_and_runs_the_rest():
    talk = Talk(
        step("a"),
        step("b", params={"x": result("a")}),
        step("c", params={"x": result("b")}),
        finally_=(step("f"),),
        results={"c": result("c")},
    )
    talk.ended("a", 1)
    talk.failed("b")
    assert talk.ended("f") == ["Failed"]

    assert talk.tell(RetryAsked(at=START)) == ["b again (2)"]
    assert talk.invoked().params == {"x": 1}
    assert talk.ended("b", attempt=1) == []  # what comes late is of the attempt before
    assert talk.ended("b", 2, attempt=2) == ["c"]
    assert talk.ended("c", 3) == ["f again (2)"]
    assert talk.ended("f", attempt=2) == ["Succeeded"]
    assert talk.finish().results == {"c": 3}


def test_a_run_that_is_retried_runs_only_the_instances_that_did_not_succeed():
    talk = Talk(
        step("a", matrix=Matrix(params={"x": [0, 1, 2, 3]}, parallelism=2)),
        results={"all": result("a")},
    )
    talk.ended("a[0]", 0)
    talk.failed("a[1]")
    talk.ended("a[2]", 2)

    assert talk.tell(RetryAsked(at=START)) == ["a[1] again (2)", "a[3]"]
    talk.ended("a[1]", 1, attempt=2)
    talk.ended("a[3]", 3)
    assert talk.finish().results == {"all": [0, 1, 2, 3]}


def test_a_run_that_is_retried_goes_on_inside_its_nested_workflows():
    talk = Talk(step("a", workflow="inner", params={"n": 1}), nested={"inner": INNER})
    talk.ended("a/x", 1)
    talk.failed("a/y")
    talk.ended("a/z")

    assert talk.tell(RetryAsked(at=START)) == ["a/y again (2)"]


def test_a_run_that_failed_only_at_last_does_only_that_again():
    talk = Talk(step("a"), finally_=(step("f"),))
    talk.ended("a")
    talk.failed("f")

    assert talk.tell(RetryAsked(at=START)) == ["f again (2)"]


def test_a_cancelled_run_can_go_on():
    talk = Talk(step("a"), step("b", "a"))
    talk.ended("a")
    talk.tell(CancelAsked(at=START, is_hard=True))

    assert talk.tell(RetryAsked(at=START)) == ["b again (2)"]
    assert talk.ended("b", attempt=2) == ["Succeeded"]


def test_what_runs_finally_runs_again_whole(monkeypatch: pytest.MonkeyPatch):
    """Its instances too; and what is forgotten is not counted twice."""
    monkeypatch.setattr(walk_module, "INSTANCES_MAX", 4)
    talk = Talk(step("a"), finally_=(step("f", matrix=Matrix(params={"x": [0, 1, 2]})),))
    talk.failed("a")
    for index in range(3):
        talk.ended(f"f[{index}]")
    talk.tell(RetryAsked(at=START))

    assert talk.ended("a", attempt=2) == [f"f[{index}] again (2)" for index in range(3)]


def test_what_was_skipped_before_a_retry_is_not_held_against_the_run():
    talk = Talk(step("a"), finally_=(step("f", params={"x": result("a")}),))
    assert talk.failed("a") == ["Failed"]
    talk.tell(RetryAsked(at=START))
    assert talk.reason("") == ("", "")
    talk.ended("a", attempt=2)

    assert talk.ended("f") == ["Succeeded"]


def test_what_is_retried_starts_from_the_versions_that_it_started_from():
    talk = Talk(
        with_workspace("a"),
        with_workspace("b"),
        finally_=(with_workspace("f"),),
        workspaces=("w",),
    )
    talk.ended("a")
    talk.failed("b")
    talk.ended("f")
    talk.tell(RetryAsked(at=START))

    assert versions(talk) == {"b": ()}


def test_results_of_a_matrix_that_was_retried_are_all_there():
    talk = Talk(
        step("a", matrix=Matrix(params={"x": [0, 1]})),
        finally_=(step("f", params={"all": result("a")}),),
    )
    talk.failed("a[0]")
    talk.ended("a[1]", 1)
    assert talk.invoked().params == {"all": [None, 1]}
    talk.ended("f")
    talk.tell(RetryAsked(at=START))
    talk.ended("a[0]", 0, attempt=2)

    assert talk.invoked().params == {"all": [0, 1]}


def test_a_run_that_is_under_way_or_has_succeeded_is_not_retried():
    talk = Talk(step("a"))

    assert talk.tell(RetryAsked(at=START)) == []
    talk.ended("a")
    assert talk.tell(RetryAsked(at=START)) == []
    assert talk.run.status == "Succeeded"


# ---- workspaces ---------------------------------------------------------------------------------


def versions(talk: Talk) -> dict[str, tuple[str, ...]]:
    """By step that was just invoked: which versions of its only workspace it starts from."""
    return {
        each.key: view.merge
        for each in talk.commands
        if isinstance(each, Invoke)
        for view in each.workspaces.values()
    }


def with_workspace(name: str, *after: str, **fields: Any) -> Step:
    return step(name, *after, workspaces={"here": "w"}, **fields)


def test_a_chain_hands_its_workspace_down_and_has_nothing_to_merge():
    talk = Talk(with_workspace("a"), step("b", "a"), with_workspace("c", "b"), workspaces=("w",))

    assert talk.invoked().workspaces == {"here": View("w", ())}
    talk.ended("a")
    talk.ended("b")
    assert versions(talk) == {"c": ("a",)}


def test_branches_start_from_the_same_version_and_are_merged_where_they_meet():
    talk = Talk(
        with_workspace("a"),
        with_workspace("b", "a"),
        with_workspace("c", "a"),
        with_workspace("d", "b", "c", "a"),
        workspaces=("w",),
    )
    talk.ended("a")
    assert versions(talk) == {"b": ("a",), "c": ("a",)}
    talk.ended("c")
    talk.ended("b")

    assert versions(talk) == {"d": ("b", "c")}  # as they are written, whichever ended first


def test_who_failed_or_was_skipped_leaves_no_version():
    talk = Talk(
        with_workspace("a"),
        with_workspace("b", "a", on_error="continue"),
        with_workspace("c", "b", when=FALSE),
        with_workspace("d", "c"),
        workspaces=("w",),
    )
    talk.ended("a")
    talk.failed("b")

    assert versions(talk) == {"d": ("a",)}


def test_instances_of_a_matrix_are_branches():
    talk = Talk(
        with_workspace("a"),
        with_workspace("b", "a", matrix=Matrix(params={"x": [0, 1]})),
        with_workspace("c", "b"),
        workspaces=("w",),
    )
    talk.ended("a")
    assert versions(talk) == {"b[0]": ("a",), "b[1]": ("a",)}
    talk.ended("b[1]")
    talk.ended("b[0]")

    assert versions(talk) == {"c": ("b[0]", "b[1]")}


def test_a_nested_workflow_works_on_the_workspace_that_it_is_given():
    inner = WorkflowSpec(
        steps=(step("x", workspaces={"here": "mine"}), step("y", "x", workspaces={"here": "mine"})),
        workspaces=("mine",),
    )
    talk = Talk(
        with_workspace("a"),
        step("b", "a", workflow="inner", workspaces={"mine": "w"}),
        with_workspace("c", "b"),
        nested={"inner": inner},
        workspaces=("w",),
    )
    talk.ended("a")
    assert versions(talk) == {"b/x": ("a",)}
    talk.ended("b/x")
    assert versions(talk) == {"b/y": ("b/x",)}
    talk.ended("b/y")
    assert versions(talk) == {"c": ("b/y",)}


def test_what_runs_finally_has_all_that_was_left():
    talk = Talk(
        with_workspace("a"),
        with_workspace("b"),
        with_workspace("c", "a"),
        finally_=(with_workspace("f"),),
        workspaces=("w",),
    )
    talk.ended("a")
    talk.ended("b")
    talk.failed("c")

    assert versions(talk) == {"f": ("a", "b")}
    talk.ended("f")
    assert talk.finish().workspaces == {"w": ("f",)}


def test_the_newest_of_many_versions_are_found_however_long_their_history():
    """A chain is one line, whatever its length: nothing walks along it."""
    marks = Marks()
    first = marks.leave(0, "v0", ["w"])
    mark = first
    for number in range(1, 5000):
        mark = marks.leave(marks.join([mark, first]), f"v{number}", ["w"])
    other = marks.leave(first, "other", ["w"])

    assert marks.sets[marks.join([first, mark, other])] == {"w": ("v4999", "other")}
    assert marks.sets[marks.join([first, other])] == {"w": ("other",)}
    assert len(marks.versions["w"].heads) == 2


# ---- the journal --------------------------------------------------------------------------------


def test_facts_that_come_twice_or_late_or_for_nobody_are_not_news():
    talk = Talk(step("a", retries=1), step("b", "a"))
    talk.failed("a", 1)
    taken = talk.run.taken

    for attempt in (0, 1, 3):
        assert talk.ended("a", attempt=attempt) == []
    assert talk.ended("nobody") == []
    assert talk.ended("") == []
    assert talk.tell(RunBegan(at=START)) == []
    assert talk.run.taken == taken
    assert talk.ended("a", attempt=2) == ["b"]


def test_what_was_under_way_when_all_was_lost_is_told_again():
    """Also what had begun: with the same attempt. What ended is not."""
    talk = Talk(
        step("a"), step("b"), step("c", wait=Wait(approval="go?")), step("d", wait=Wait(timer=9))
    )
    talk.ended("a")
    talk.tell(Started(at=START, key="b", attempt=1))
    again = Run(talk.definition)
    for fact in talk.journal:
        again.feed(decode(encode(fact)))

    assert words(again.outstanding()) == ["b", "expect approval c"]
    assert again.wake_at == START + 9
    assert again.outstanding() == talk.run.outstanding()


def test_a_start_that_is_told_twice_is_news_once_and_another_is_news():
    talk = Talk(step("a"))
    for at, taken in ((START, 2), (START, 2), (START + 1, 3)):
        talk.tell(Started(at=at, key="a", attempt=1))

        assert talk.run.taken == taken


def test_a_start_that_was_lost_makes_no_difference():
    talk = Talk(step("a"), step("b", "a"))

    assert talk.ended("a") == ["b"]


def test_a_run_that_is_over_says_so_again():
    talk = Talk(step("a"), results={"a": result("a")})
    talk.ended("a", 1)

    assert talk.run.outstanding() == [Finish("Succeeded", {"a": 1})]


def test_a_snapshot_is_all_there_is():
    talk = Talk(
        step("a", matrix=Matrix(params={"x": [0, 1]}, parallelism=1)),
        with_workspace("b"),
        step("c", workflow="inner", params={"n": 1}),
        nested={"inner": INNER},
        workspaces=("w",),
    )
    talk.ended("c/x", 1)
    again = Run.restore(talk.run.snapshot(), talk.definition)

    assert again.snapshot() == talk.run.snapshot()
    assert again.tree() == talk.run.tree()
    assert words(again.feed(Ended(at=START, key="a[0]", attempt=1))) == ["a[1]"]


@pytest.mark.parametrize("snapshot", [b"", b"\x00", b"\x93\x02\x00\x00"])
def test_a_snapshot_of_another_version_is_refused(snapshot: bytes):
    with pytest.raises(BadInput):
        Run.restore(snapshot, Definition(WorkflowSpec(steps=(step("a"),))))


def test_a_run_with_too_many_facts_ends(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_module, "FACTS_MAX", 11)
    talk = Talk(step("a"))
    said: list[str] = []
    for attempt in range(1, 10):
        said += talk.failed("a", attempt, is_counted=False)
        said += talk.passed(5)

    assert said[-3:] == ["a again (6)", "cancel a", "Failed"]
    assert talk.run.status == "Failed"


def test_facts_are_short_and_are_read_as_they_were_written():
    facts: list[Fact] = [
        Ended(at=1.5, key="a[3]", attempt=1, results={"result": {"x": [1, None, "y"]}}),
        Ended(at=1, key="a", attempt=1, outputs={"m": Artifact("file:///x", "ab")},
              report=Report("warm", 0.1, 5, "its data is here")),
        Failed(at=1, key="a", attempt=2, kind="Raised", message="no", is_counted=False),
        Called(at=1, key="a", attempt=1, value=[1]),
        Passed(at=2),
    ]  # fmt: skip

    assert [decode(encode(fact)) for fact in facts] == facts
    assert len(encode(Ended(at=1, key="a", attempt=1))) < 40


LATER = encode(RunBegan(at=1, format=FORMAT + 1))


@pytest.mark.parametrize("encoded", [b"", b"\xff", b"\x91\xa6future", b"\x92\xa5ended\x01", LATER])
def test_what_is_no_fact_is_refused(encoded: bytes):
    with pytest.raises(BadInput):
        decode(encoded)


def nested_list(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value", ["x" * FACT_BYTES_MAX, nested_list(500), nested_list(5000), 2**70, {1, 2}.__iter__()]
)
def test_what_cannot_be_written_down_is_refused_before_the_engine_has_it(value: Any):
    with pytest.raises(BadInput):
        encode(Called(at=1, key="a", attempt=1, value=value))


def test_results_that_are_too_large_go_by_reference():
    large, small = "x" * VALUE_BYTES_MAX, "y" * (VALUE_BYTES_MAX // 2)
    many = {f"r{n}": small for n in range(20)}

    assert to_refer({"a": large, "b": small, "c": 1}) == ["a"]
    left = {name: value for name, value in many.items() if name not in to_refer(many)}
    assert 1 < len(left) < 20
    encode(Ended(at=1, key="a", attempt=1, results=left))


def test_a_result_by_reference_is_handed_on_as_it_is():
    talk = Talk(step("a"), step("b", params={"x": result("a")}))
    reference = Artifact("file:///x", "ab" * 32, 1 << 30).as_result()
    talk.ended("a", reference)

    assert talk.invoked().params == {"x": reference}


# ---- what people see ----------------------------------------------------------------------------


def test_people_see_who_ran_where_how_long_and_why():
    talk = Talk(step("a"), step("b", matrix=Matrix(params={"x": [0, 1]})), step("c", "b"))
    talk.tell(
        Started(at=START + 1, key="a", attempt=1, report=Report("warm")),
        Ended(at=START + 3, key="a", attempt=1, report=Report("warm", 2.0, 10, "its data is here")),
        Ended(at=START + 3, key="b[0]", attempt=1, was_cached=True, report=Report(bytes_moved=5)),
    )
    tree = talk.run.tree()
    assert tree is not None
    a, b, c = tree.children

    assert (a.state, a.asked_at, a.began_at, a.ended_at) == (
        "succeeded", START, START + 1, START + 3,
    )  # fmt: skip
    assert (a.start, a.bytes_moved, a.why) == ("warm", 10, "its data is here")
    assert (b.state, b.of, b.bytes_moved) == ("open", 2, 5)
    assert [(child.name, child.state, child.was_cached) for child in b.children] == [
        ("[0]", "succeeded", True),
        ("[1]", "asked", False),
    ]
    assert (c.key, c.state, tree.bytes_moved) == ("c", "waiting", 15)


def test_its_repr_shows_how_far_it_is():
    talk = Talk(step("a"), step("b"), step("c", "b"))
    talk.ended("a")

    assert repr(talk.run) == "<Run under way [1 asked, 1 succeeded]>"


# ---- size ---------------------------------------------------------------------------------------


def played(talk: Talk) -> int:
    """How many steps it took to the end, one after the other."""
    number, todo = 0, list(talk.commands)
    while todo:
        command = todo.pop()
        if isinstance(command, Invoke):
            number += 1
            todo += talk.run.feed(
                Ended(at=START, key=command.key, attempt=1, results={"result": 1})
            )
    return number


def test_a_long_chain_needs_no_deep_stack():
    """Neither when it runs, nor when all of it is skipped."""
    names = [f"s{n}" for n in range(3000)]
    chain = [step("s0")] + [step(b, params={"x": result(a)}) for a, b in pairwise(names)]
    skipped = [step("s0", when=FALSE), *chain[1:]]

    assert played(Talk(*chain)) == 3000
    assert Talk(*skipped).said == ["Completed"]


def test_a_wide_matrix_is_played_to_its_end():
    talk = Talk(
        step("a", matrix=Matrix(params={"x": list(range(5000))}, parallelism=100)),
        results={"all": result("a")},
    )

    assert played(talk) == 5000
    assert talk.run.status == "Succeeded"
