"""A job's tasks: which runs next, and what its end means. The rules of Kubernetes' Indexed Job."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dayfly_pool.batch.indices import parse, up_to
from dayfly_pool.batch.model import JobSpec
from dayfly_pool.batch.tasks import (
    FAILURES_TOLD_MAX,
    RETRYING_MAX,
    Segment,
    Snapshot,
    Task,
    TaskFailed,
    Tasks,
    Verdict,
    check,
)
from dayfly_pool.errors import BadInput

WRONG = TaskFailed("Raised", "ValueError: no")
OURS = TaskFailed("NoCapacity", "", is_ours=True)


def spec_of(**fields: Any) -> JobSpec:
    return msgspec.convert({"function": "f"} | fields, JobSpec)


def tasks_of(size: int = 3, **fields: Any) -> Tasks:
    return Tasks(spec_of(**fields), up_to(size), size - 1)


def taken(tasks: Tasks, now: float = 0.0) -> list[int]:
    """All that may be begun."""
    found = []
    while (task := tasks.take(now)) is not None:
        found.append(task.index)
    return found


def fail(tasks: Tasks, index: int, why: TaskFailed = WRONG, now: float = 0.0) -> None:
    tasks.fail(index, why, now, 1.0)


def run_again(tasks: Tasks, now: float = 1e9) -> Task:
    task = tasks.take(now)
    assert task is not None
    return task


# ---- complete -----------------------------------------------------------------------------------


def test_a_job_is_complete_when_each_of_its_indices_has_succeeded() -> None:
    tasks = Tasks(spec_of(), parse("1,3,6-7"), 7)
    assert taken(tasks) == [1, 3, 6, 7]
    for index in (7, 3, 1):
        tasks.succeed(index)
        assert tasks.verdict is None
    tasks.succeed(6)
    assert tasks.verdict == Verdict("Complete", "CompletionsReached")
    assert str(tasks.succeeded) == "1,3,6-7"


def test_an_index_is_begun_once_while_it_runs() -> None:
    tasks = tasks_of(2)
    assert taken(tasks) == [0, 1]
    assert taken(tasks) == []
    tasks.succeed(0)
    assert taken(tasks) == []


def test_what_ends_after_the_job_has_changes_nothing() -> None:
    tasks = tasks_of(2)
    taken(tasks)
    tasks.end(Verdict("Cancelled", "Cancelled"))
    tasks.succeed(0)
    fail(tasks, 1)
    assert tasks.verdict == Verdict("Cancelled", "Cancelled")
    assert (len(tasks.succeeded), tasks.failures, tasks.running) == (0, 0, set())
    assert taken(tasks, 1e9) == []


# ---- the limits of failures ---------------------------------------------------------------------


def test_without_a_limit_the_seventh_failure_of_a_job_is_its_end() -> None:
    tasks = tasks_of(10)
    taken(tasks)
    for index in range(6):
        fail(tasks, index)
    assert tasks.verdict is None
    fail(tasks, 6)
    assert tasks.verdict == Verdict("Failed", "BackoffLimitExceeded", "7 failures, backoffLimit 6")


def test_a_backoff_limit_of_none_ends_the_job_with_the_first_failure() -> None:
    tasks = tasks_of(2, backoffLimit=0)
    taken(tasks)
    fail(tasks, 1)
    assert tasks.verdict is not None
    assert tasks.verdict.reason == "BackoffLimitExceeded"


def test_an_index_that_failed_is_tried_again_later_each_time_after_twice_as_long() -> None:
    tasks = tasks_of(1, backoffSeconds=2, backoffLimit=100)
    now, waits = 0.0, []
    for retry in range(10):
        assert run_again(tasks, now) == Task(0, retry)
        fail(tasks, 0, now=now)
        assert tasks.due_at is not None
        assert tasks.take(tasks.due_at - 0.01) is None
        waits.append(tasks.due_at - now)
        now = tasks.due_at
    assert waits == [2, 4, 8, 16, 32, 64, 128, 256, 360, 360]


def test_with_a_limit_per_index_one_index_fails_and_the_others_go_on() -> None:
    tasks = tasks_of(2, backoffLimitPerIndex=1)
    taken(tasks)
    fail(tasks, 0)
    assert run_again(tasks) == Task(0, 1)
    fail(tasks, 0)
    assert str(tasks.failed) == "0"
    assert tasks.verdict is None
    tasks.succeed(1)
    assert tasks.verdict == Verdict("Failed", "FailedIndexes", "1 of 2 indices failed")


def test_with_a_limit_per_index_the_job_itself_has_none() -> None:
    tasks = tasks_of(20, backoffLimitPerIndex=0)
    for index in taken(tasks)[:-1]:
        fail(tasks, index)
    assert tasks.verdict is None
    assert tasks.failures == 19


def test_both_limits_hold_together() -> None:
    tasks = tasks_of(20, backoffLimitPerIndex=0, backoffLimit=2)
    for index in taken(tasks)[:3]:
        fail(tasks, index)
    assert tasks.verdict is not None
    assert tasks.verdict.reason == "BackoffLimitExceeded"


def test_more_failed_indices_than_allowed_end_the_job() -> None:
    tasks = tasks_of(5, backoffLimitPerIndex=0, maxFailedIndexes=1)
    taken(tasks)
    fail(tasks, 0)
    assert tasks.verdict is None
    fail(tasks, 3)
    assert tasks.verdict == Verdict(
        "Failed", "MaxFailedIndexesExceeded", "2 indices failed, maxFailedIndexes 1"
    )


# ---- rules about failures -----------------------------------------------------------------------


def policy(*rules: dict[str, Any]) -> dict[str, Any]:
    return {"failurePolicy": {"rules": list(rules)}}


def codes(action: str, operator: str, *values: int) -> dict[str, Any]:
    return {"action": action, "onExitCodes": {"operator": operator, "values": list(values)}}


def kinds(action: str, *values: str) -> dict[str, Any]:
    return {"action": action, "onKinds": {"operator": "In", "values": list(values)}}


def test_the_first_rule_that_matches_counts() -> None:
    rules = policy(codes("Ignore", "In", 3), codes("FailJob", "In", 3, 4))
    tasks = tasks_of(2, **rules)
    taken(tasks)
    fail(tasks, 0, TaskFailed("Exited", "", 3))
    assert (tasks.verdict, tasks.failures) == (None, 0)
    fail(tasks, 1, TaskFailed("Exited", "four", 4))
    assert tasks.verdict == Verdict("Failed", "FailurePolicy", "index 1: Exited: four")


def test_what_is_ignored_runs_again_and_never_counts() -> None:
    tasks = tasks_of(1, backoffLimit=0, **policy(kinds("Ignore", "Raised")))
    for _ in range(20):
        assert run_again(tasks) == Task(0, 0)
        fail(tasks, 0)
    assert (tasks.verdict, tasks.failures) == (None, 0)


def test_an_index_can_fail_at_once() -> None:
    tasks = tasks_of(2, backoffLimitPerIndex=5, **policy(codes("FailIndex", "NotIn", 1)))
    taken(tasks)
    fail(tasks, 0, TaskFailed("Exited", "", 2))
    assert str(tasks.failed) == "0"
    fail(tasks, 1, TaskFailed("Exited", "", 1))
    assert run_again(tasks) == Task(1, 1)


def test_exit_code_zero_and_none_match_no_rule_about_exit_codes() -> None:
    tasks = tasks_of(2, **policy(codes("FailJob", "NotIn", 7)))
    taken(tasks)
    fail(tasks, 0, TaskFailed("Exited", "", 0))
    fail(tasks, 1, TaskFailed("TimedOut"))
    assert (tasks.verdict, tasks.failures) == (None, 2)


def test_what_can_never_run_ends_the_job_unless_a_rule_says_otherwise() -> None:
    gone = TaskFailed("CannotRun", "the sandbox has no ./x", 127)
    tasks = tasks_of(2, backoffLimitPerIndex=5)
    run_again(tasks)
    fail(tasks, 0, gone)
    assert tasks.verdict == Verdict("Failed", "CannotRun", f"index 0: CannotRun: {gone.message}")

    tasks = tasks_of(2, backoffLimitPerIndex=0, **policy(codes("FailIndex", "In", 127)))
    run_again(tasks)
    fail(tasks, 0, gone)
    assert (str(tasks.failed), tasks.verdict) == ("0", None)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        (policy(codes("Count", "In", 0)), "exit code 0 is no failure"),
        (policy(codes("FailIndex", "In", 1)), "FailIndex goes with backoffLimitPerIndex"),
        (policy({"action": "Count"}), "one of onExitCodes and onKinds"),
        (policy(*[kinds("Count", "Raised")] * 21), "length <= 20"),
        (policy(codes("Count", "In", 1, 1)), "different exit codes"),
        ({"maxFailedIndexes": 1}, "maxFailedIndexes goes with backoffLimitPerIndex"),
        ({"size": 0}, ">= 1"),
        ({"size": 10_000_001}, "<= 10000000"),
        ({"size": 1, "indices": "1"}, "only one of size, indices, items"),
        ({"command": ["true"]}, "one of function, command, script"),
        ({"successPolicy": {"rules": [{}]}}, "one of succeededIndexes and succeededCount"),
    ],
)
def test_a_job_that_makes_no_sense_is_refused(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=why):
        spec_of(**fields)


@pytest.mark.parametrize(
    ("size", "fields", "why"),
    [
        (3, {"backoffLimitPerIndex": 1, "maxFailedIndexes": 4}, "4 of 3 indices cannot fail"),
        (200_000, {"backoffLimitPerIndex": 1, "maxFailedIndexes": 10_001}, "at most 10000"),
        (3, {"minCount": 4}, "4 tasks together, but there are 3"),
        (3, {"successPolicy": {"rules": [{"succeededIndexes": "1-3"}]}}, "3 is no index"),
        (
            3,
            {"successPolicy": {"rules": [{"succeededIndexes": "1", "succeededCount": 2}]}},
            "2 of 1 indices",
        ),
    ],
)
def test_what_does_not_go_with_its_indices_is_refused(
    size: int, fields: dict[str, Any], why: str
) -> None:
    with pytest.raises(BadInput, match=why):
        check(spec_of(**fields), up_to(size))


# ---- our own failures ---------------------------------------------------------------------------


def test_what_fails_on_our_side_is_tried_again_and_never_counts() -> None:
    tasks = tasks_of(1, backoffLimit=0, backoffLimitPerIndex=0)
    for _ in range(50):
        assert run_again(tasks) == Task(0, 0)
        fail(tasks, 0, OURS)
    assert (tasks.verdict, tasks.failures) == (None, 0)
    assert tasks.due_at is not None
    assert 0 < tasks.due_at <= 5.0


def test_a_killed_sandbox_counts_from_the_fourth_time_on() -> None:
    tasks = tasks_of(1, backoffLimit=0)
    for _ in range(3):
        run_again(tasks)
        fail(tasks, 0, TaskFailed("Crashed", was_killed=True))
        assert tasks.verdict is None
    run_again(tasks)
    fail(tasks, 0, TaskFailed("Crashed", was_killed=True))
    assert tasks.verdict is not None


def test_what_was_stopped_runs_again_at_once_as_the_same_try() -> None:
    tasks = tasks_of(1)
    taken(tasks)
    tasks.give_back(0, 5.0)
    assert tasks.take(5.0) == Task(0, 0)


# ---- rules about success ------------------------------------------------------------------------


def test_enough_successes_complete_a_job_that_has_more_indices() -> None:
    tasks = tasks_of(5, successPolicy={"rules": [{"succeededCount": 2}]})
    taken(tasks)
    tasks.succeed(4)
    assert tasks.verdict is None
    tasks.succeed(0)
    assert tasks.verdict is not None
    assert (tasks.verdict.state, tasks.verdict.reason) == ("Complete", "SuccessPolicy")


def test_with_indices_and_a_count_only_the_listed_ones_count() -> None:
    rule = {"succeededIndexes": "1,3-4", "succeededCount": 2}
    tasks = tasks_of(5, successPolicy={"rules": [rule]})
    taken(tasks)
    for index in (0, 2, 1):
        tasks.succeed(index)
        assert tasks.verdict is None
    tasks.succeed(4)
    assert tasks.verdict is not None


def test_any_one_rule_is_enough() -> None:
    rules = [{"succeededIndexes": "0-3"}, {"succeededIndexes": "4"}]
    tasks = tasks_of(5, successPolicy={"rules": rules})
    taken(tasks)
    tasks.succeed(4)
    assert tasks.verdict is not None


def test_all_succeeding_is_success_whatever_the_rules() -> None:
    tasks = tasks_of(2, successPolicy={"rules": [{"succeededCount": 2}]})
    taken(tasks)
    tasks.succeed(0)
    tasks.succeed(1)
    assert tasks.verdict is not None
    assert tasks.verdict.state == "Complete"


# ---- limits -------------------------------------------------------------------------------------


def test_with_many_to_be_tried_again_no_new_one_is_begun() -> None:
    tasks = tasks_of(RETRYING_MAX + 5, backoffLimitPerIndex=100)
    for _ in range(RETRYING_MAX):
        task = tasks.take(0.0)
        assert task is not None
        fail(tasks, task.index)
    assert tasks.take(0.0) is None
    assert run_again(tasks).retry == 1


def test_only_the_first_failures_are_told() -> None:
    tasks = tasks_of(FAILURES_TOLD_MAX + 5, backoffLimitPerIndex=0)
    for index in taken(tasks):
        fail(tasks, index)
    assert len(tasks.told) == FAILURES_TOLD_MAX
    assert tasks.told[0].index == 0


# ---- the journal --------------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(st.sampled_from(["succeed", "fail", "ours", "stop", "commit"]), st.integers(0, 30)),
    max_size=60,
)


@given(STEPS, st.integers(0, 3))
def test_what_was_written_down_makes_the_same_state_again(
    steps: list[tuple[str, int]], per_index: int
) -> None:
    fields = {"backoffLimitPerIndex": per_index, "maxFailedIndexes": 20}
    tasks, now = tasks_of(30, **fields), 0.0
    journal: list[Segment] = []
    snapshots: list[tuple[Snapshot, int]] = []
    for what, index in steps:
        now += 1000.0
        while len(tasks.running) < 5 and tasks.take(now) is not None:
            pass
        if what == "commit":
            journal.append(
                msgspec.msgpack.decode(msgspec.msgpack.encode(tasks.drain()), type=Segment)
            )
            snapshots.append((tasks.snapshot(), len(journal)))
        elif tasks.running:
            chosen = sorted(tasks.running)[index % len(tasks.running)]
            if what == "succeed":
                tasks.succeed(chosen)
            elif what == "stop":
                tasks.give_back(chosen, now)
            else:
                fail(tasks, chosen, WRONG if what == "fail" else OURS, now)
    journal.append(tasks.drain())
    starts: list[tuple[Snapshot | None, int]] = [(None, 0), *snapshots[-1:]]
    for snapshot, after in starts:
        again = tasks_of(30, **fields)
        again.replay(snapshot, journal[after:], 0.0)
        assert again.succeeded == tasks.succeeded
        assert again.failed == tasks.failed
        assert again.failures == tasks.failures
        assert again.told == tasks.told
        left = set(taken(again, 1e9))
        over = {*tasks.succeeded, *tasks.failed}
        assert left == (set() if again.verdict else set(range(30)) - over)


@given(st.lists(st.sampled_from(["ok", "bad", "ours", "killed"]), max_size=200))
def test_every_job_ends_and_no_index_ends_twice(outcomes: list[str]) -> None:
    tasks, now, ends = tasks_of(8, backoffLimitPerIndex=2), 0.0, []
    failures = {"bad": WRONG, "ours": OURS, "killed": TaskFailed("Crashed", was_killed=True)}
    queue = iter(outcomes)
    while tasks.verdict is None:
        now = max(now, tasks.due_at or now)
        task = tasks.take(now)
        assert task is not None
        what = next(queue, "ok")
        if what == "ok":
            tasks.succeed(task.index)
        else:
            fail(tasks, task.index, failures[what], now)
        is_over = task.index in tasks.succeeded or task.index in tasks.failed
        ends += [task.index] if is_over else []
    assert sorted(ends) == list(range(8))
    assert not {*tasks.succeeded} & {*tasks.failed}


def test_a_journal_of_another_job_is_refused() -> None:
    with pytest.raises(ValueError, match="index 9 in the journal of a job up to 2"):
        tasks_of(3).replay(None, [Segment(succeeded=[(0, 9)])], 0.0)


def test_a_success_policy_is_met_again_after_a_restart() -> None:
    fields = {"successPolicy": {"rules": [{"succeededCount": 2}]}}
    tasks = tasks_of(5, **fields)
    taken(tasks)
    tasks.succeed(0)
    first = tasks.drain()
    again = tasks_of(5, **fields)
    again.replay(None, [first], 0.0)
    assert again.verdict is None
    again.take(0.0)
    again.succeed(1)
    assert again.verdict is not None
