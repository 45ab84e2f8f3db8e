"""Batch jobs as a user types them."""

import json
import os
import subprocess
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tests.harness import DAYFLY, FUNCTIONS, Server, eventually

SIX = (FUNCTIONS / "requires" / "requirements.txt").read_text()
SQUARE = """
import os

def handler(event, context):
    index = int(os.environ["JOB_INDEX"])
    print("square of", index)
    return index * index
"""
PICKY = """
import sys

def handler(event, context):
    if event["n"] % 3 == 0:
        sys.exit(40 + event["n"] % 2)
    return {"n": event["n"]}
"""
numbers = count()


class Shell:
    """`dayfly` in a shell."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder

    def __call__(self, *words: str, stdin: str = "", code: int = 0) -> str:
        """What it writes; *code* is how it is to end."""
        done = subprocess.run(
            [DAYFLY, *words],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=self.folder,
            timeout=100,
            env=os.environ | {"DAYFLY_URL": f"http://{self.server.admin}"},
        )
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        self.told = done.stderr
        """What it said beside the last of that."""

        return done.stdout if code in (0, 1) and done.stdout else done.stderr

    def json(self, *words: str, code: int = 0) -> Any:
        return json.loads(self(*words, "--json", code=code))

    def run(self, *words: str, code: int = 0, stdin: str = "") -> str:
        """Run a job to its end; its name."""
        name = f"job-{next(numbers)}"
        self("job", "run", "--name", name, *words, code=code, stdin=stdin)
        return name

    def script(self, text: str, *words: str, code: int = 0, stdin: str = "") -> str:
        (self.folder / "script").write_text(text)
        return self.run("--script", "script", *words, code=code, stdin=stdin)

    def results(self, name: str) -> dict[int, Any]:
        lines = [json.loads(line) for line in self("job", "results", name).splitlines()]
        return {line["index"]: line["result"] for line in lines}

    def status(self, name: str) -> Any:
        return self.json("job", "show", name)["status"]

    def log(self, name: str) -> str:
        return self("job", "logs", name, "--tail", "1000")


@pytest.fixture
def dayfly(anywhere: Server, tmp_path: Path) -> Shell:
    return Shell(anywhere, tmp_path)


@pytest.fixture
def sandboxed(server: Server, tmp_path: Path) -> Shell:
    return Shell(server, tmp_path)


# ---- what a task is -----------------------------------------------------------------------------


def test_a_function_for_each_index(dayfly: Shell):
    dayfly.server.deploy("square", files={"main.py": SQUARE})
    told = dayfly("job", "run", "--name", "squares", "--function", "square", "--size", "50")

    assert told.startswith("squares Complete: 50 of 50 tasks succeeded in ")
    assert dayfly.results("squares") == {n: n * n for n in range(50)}
    assert json.loads(dayfly("job", "results", "squares", "--index", "7")) == {
        "index": 7,
        "result": 49,
    }
    assert "square of 49" in dayfly.log("squares")
    assert dayfly.status("squares")["succeededIndexes"] == "0-49"
    assert "squares" in dayfly("job", "list")
    assert dayfly("job", "delete", "squares", "--yes") == "deleted squares\n"
    assert "no job default/squares" in dayfly("job", "show", "squares", code=1)


def test_a_command_with_its_files_and_variables(dayfly: Shell):
    """The package is the folder that it runs in; `--env` and Code Engine's variables are there."""
    (dayfly.folder / "model").mkdir()
    (dayfly.folder / "model" / "weights.txt").write_text("0.5")
    program = dayfly.folder / "model" / "simulate.sh"
    program.write_text(
        '#!/bin/sh\nset -eu\necho "using $(cat weights.txt) and $SEED"\n'
        'printf \'["%s","%s","%s","%s","%s","%s","%s"]\' "$JOB_NAME" "$JOB_INDEX"'
        ' "$JOB_COMPLETION_INDEX" "$JOB_ARRAY_SIZE" "$JOB_INDEX_RETRY_COUNT" "$JOB_RETRY_LIMIT"'
        ' "$JOB_MODE" >"$DAYFLY_RESULT"\n'
    )
    program.chmod(0o755)
    words = ("--source", "model", "--env", "SEED=7", "--indices", "1,3,6-8")
    name = dayfly.run(*words, "--", "./simulate.sh")

    assert dayfly.results(name) == {
        index: [name, str(index), str(index), "5", "0", "6", "task"] for index in (1, 3, 6, 7, 8)
    }
    assert dayfly.log(name).count("using 0.5 and 7") == 5
    assert dayfly.json("job", "show", name)["spec"]["env"] == {"SEED": "***"}


def test_a_script_of_the_shell_ends_at_its_first_failure(dayfly: Shell):
    text = "echo before\necho it is broken >&2\nfalse\necho after\n"
    name = dayfly.script(text, "--backoff-limit", "0", code=1)

    assert dayfly.status(name)["failedTasks"][0]["message"] == "exit code 1: it is broken"
    assert "before" in dayfly.log(name)
    assert "after" not in dayfly.log(name)


def test_a_script_of_python_has_the_libraries_of_its_environment(dayfly: Shell):
    path = "/namespaces/default/environments/batch-six"
    assert dayfly.server.ask("PUT", path, {"requirements": SIX}, timeout_s=110).status == 200
    text = (
        "#!/usr/bin/env python3\nimport json, os, six, sys\n"
        "where = [six.__version__, six.__file__, sys.version]\n"
        "json.dump(where, open(os.environ['DAYFLY_RESULT'], 'w'))\n"
    )
    name = dayfly.script(text, "--environment", "batch-six")
    (result,) = dayfly.results(name).values()
    command = dayfly.run("--environment", "batch-six", "--", "python", "-c", text)

    assert result[0] == "1.17.0"
    assert "dist-packages" not in result[1]
    assert dayfly.results(command)[0] == result


def test_items_are_lines_from_a_file_or_from_stdin(dayfly: Shell):
    """An item is a function's event, and what a command reads."""
    lines = "".join(json.dumps({"n": n}) + "\n" for n in (1, 2, 4, 5, 7))
    dayfly.server.deploy("picky", files={"main.py": PICKY})
    (dayfly.folder / "items.jsonl").write_text(lines)
    of_file = dayfly.run("--function", "picky", "--items", "items.jsonl")
    of_stdin = dayfly.run("--items", "-", "--", "sh", "-c", "cat >$DAYFLY_RESULT", stdin=lines)

    expected = dict(enumerate({"n": n} for n in (1, 2, 4, 5, 7)))
    assert dayfly.results(of_file) == dayfly.results(of_stdin) == expected


def test_a_manifest_says_the_same_as_options_and_runs_once(dayfly: Shell):
    """Who runs it again is told how it ended."""
    (dayfly.folder / "job.yaml").write_text(
        "apiVersion: dayfly.dev/v1\nkind: Job\nmetadata: {name: of-a-file}\nspec:\n"
        "  script: |\n    echo $JOB_INDEX >$DAYFLY_RESULT\n"
        "  size: 3\n  successPolicy: {rules: [{succeededIndexes: '0-2'}]}\n"
    )
    first = dayfly.json("job", "run", "-f", "job.yaml")
    text = (dayfly.folder / "job.yaml").read_text()
    again = json.loads(dayfly("job", "run", "-f", "-", "--memory", "256", "--json", stdin=text))

    assert first["status"]["reason"] == "SuccessPolicy"
    assert first == again
    other = dayfly("job", "run", "-f", "job.yaml", "--size", "4", code=1)
    assert "of-a-file" in other


def test_exit_codes_decide_with_a_failure_policy(dayfly: Shell):
    """40 fails its index at once, 41 is not counted, anything else is tried again."""
    (dayfly.folder / "job.yaml").write_text(
        "apiVersion: dayfly.dev/v1\nkind: Job\nmetadata: {name: policy}\nspec:\n"
        "  size: 4\n  backoffLimitPerIndex: 1\n  backoffSeconds: 0\n  failurePolicy: {rules: [\n"
        "    {action: FailIndex, onExitCodes: {operator: In, values: [40]}},\n"
        "    {action: FailJob, onKinds: {operator: In, values: [TimedOut]}}]}\n"
        "  script: |\n    case $JOB_INDEX in 1) exit 40;; 2) exit $((1 - JOB_INDEX_RETRY_COUNT));;"
        " 3) exit 3;; esac\n"
    )
    dayfly("job", "run", "-f", "job.yaml", code=1)
    status = dayfly.status("policy")

    assert (status["succeededIndexes"], status["failedIndexes"]) == ("0,2", "1,3")
    assert [
        (t["index"], t["retry"], t["message"])
        for t in sorted(status["failedTasks"], key=lambda told: (told["index"], told["retry"]))
    ] == [
        (1, 0, "exit code 40"),
        (2, 0, "exit code 1"),
        (3, 0, "exit code 3"),
        (3, 1, "exit code 3"),
    ]
    dayfly("job", "delete", "policy", "-y")


def test_a_task_that_takes_too_long_is_ended(dayfly: Shell):
    for limit in ("0.3", "300ms"):
        name = dayfly.run("--timeout", limit, "--backoff-limit", "0", "--", "sleep", "60", code=1)
        assert [told["kind"] for told in dayfly.status(name)["failedTasks"]] == ["TimedOut"]


def test_a_command_that_is_not_there_fails_at_once(dayfly: Shell):
    """However often it may be tried again: the last try would find it as little as the first."""
    name = dayfly.run("--size", "4", "--", "./nosuch.sh", code=1)
    status = dayfly.status(name)

    assert (status["state"], status["reason"]) == ("Failed", "CannotRun")
    assert "the sandbox has no ./nosuch.sh: send files with --source" in status["message"]


def test_a_job_is_shown_in_a_few_lines(dayfly: Shell):
    """What was sent is in the JSON; a script may have any number of lines."""
    words = ("--size", "8", "--backoff-limit-per-index", "0")
    name = dayfly.script("\n" * 50 + "[ $JOB_INDEX -lt 2 ]\n", *words, code=1)
    lines = dayfly("job", "show", name).splitlines()

    assert lines[0].startswith(f"{name} Failed: 2 of 8 tasks succeeded, 6 failed in ")
    assert lines[1] == "  FailedIndexes: 6 of 8 indices failed"
    assert all(line.endswith(": Exited: exit code 1") for line in lines[2:7])
    assert lines[7:] == [
        "  ...",
        "  runs: a script of 51 lines",
        "  failed indexes: 2-7",
        f"  all of it: dayfly job show {name} --json",
    ]
    name = dayfly.run("--", "echo", "a b")
    assert "  runs: echo 'a b'" in dayfly("job", "show", name).splitlines()


def test_what_has_not_succeeded_is_tried_again(dayfly: Shell):
    """With its variables, although nobody is shown them."""
    text = '[ "$JOB_INDEX" != 3 ] || [ -e "$MARK" ]\necho $JOB_INDEX >$DAYFLY_RESULT\n'
    words = ("--size", "6", "--backoff-limit", "0", "--env")
    name = dayfly.script(text, *words, "MARK=/nowhere", code=1)
    told = dayfly("job", "retry", name, code=1)
    done = dayfly.json("job", "show", name)["status"]["succeeded"]

    assert dayfly.status(name)["failedIndexes"] == ""
    assert told.startswith(f"{name}-r1 Failed: ")
    assert dayfly.status(f"{name}-r1")["total"] == 6 - done
    assert dayfly("job", "retry", name, "--name", "the-rest", "-d") == "the-rest\n"
    assert "names are lower-case" in dayfly("job", "retry", name, "--name", "No Name", code=1)
    good = dayfly.run("--", "true")
    assert f"job '{good}' is Complete: nothing is left" in dayfly("job", "retry", good, code=1)


def test_a_job_that_takes_too_long_is_ended(dayfly: Shell):
    started = time.monotonic()
    name = dayfly.run("--deadline", "0.5", "--size", "8", "--", "sleep", "60", code=1)

    assert dayfly.status(name)["reason"] == "DeadlineExceeded"
    assert time.monotonic() - started < 60


def test_each_line_of_a_log_has_its_tasks_index(dayfly: Shell):
    name = dayfly.run("--indices", "7,12", "--", "sh", "-c", "echo it is $JOB_INDEX")
    lines = [line.split() for line in dayfly.log(name).splitlines()]
    (one,) = dayfly("job", "logs", name, "--index", "12").splitlines()

    assert sorted(line[1:] for line in lines) == [
        ["12", "stdout", "it", "is", "12"],
        ["7", "stdout", "it", "is", "7"],
    ]
    assert one.endswith("it is 12")
    assert dayfly("job", "logs", name, "--index", "1") == ""
    assert dayfly("job", "logs", name, "--index", "12", "-f").splitlines() == [one]  # and ends


# ---- while it runs ------------------------------------------------------------------------------


def running(shell: Shell, name: str) -> int:
    return int(shell.status(name)["running"])


def test_a_job_is_suspended_scaled_resumed_and_cancelled(dayfly: Shell):
    name = dayfly.run("-d", "--size", "100", "--parallelism", "2", "--", "sleep", "60")
    assert eventually(lambda: running(dayfly, name) == 2)
    assert dayfly("job", "suspend", name) == f"{name} is suspended\n"
    assert (dayfly.status(name)["state"], running(dayfly, name)) == ("Suspended", 0)
    assert dayfly("job", "scale", name, "3") == f"{name} runs 3 at once\n"
    assert dayfly("job", "resume", name) == f"{name} goes on\n"
    assert eventually(lambda: running(dayfly, name) == 3)
    assert dayfly("job", "cancel", name) == f"{name} is cancelled\n"
    status = dayfly.status(name)

    assert (status["state"], status["failures"], status["succeeded"]) == ("Cancelled", 0, 0)
    assert "is over: Cancelled" in dayfly("job", "resume", name, code=1)


def test_a_softly_cancelled_job_lets_its_tasks_end(dayfly: Shell):
    words = ("-d", "--size", "100", "--parallelism", "2")
    name = dayfly.run(*words, "--", "sh", "-c", "sleep 1; echo 1 >$DAYFLY_RESULT")
    assert eventually(lambda: running(dayfly, name) == 2)
    dayfly("job", "cancel", "--soft", name)
    assert eventually(lambda: dayfly.status(name)["state"] == "Cancelled")

    assert len(dayfly.results(name)) == dayfly.status(name)["succeeded"] >= 2


def test_a_job_that_runs_is_deleted(dayfly: Shell):
    name = dayfly.run("-d", "--size", "4", "--", "sleep", "60")
    assert eventually(lambda: running(dayfly, name))
    dayfly("job", "delete", name, "--yes")

    assert name not in dayfly("job", "list")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), "what is it to run?"),
        (("--function", "nobody"), "no function 'default/nobody'"),
        (("--size", "0", "--", "true"), "0 is not in the range"),
        (("--size", "10000001", "--", "true"), "size"),
        (("--indices", "10000000", "--", "true"), "10000000"),
        (("--indices", "3-1", "--", "true"), "write 1-3"),
        (("--indices", "", "--", "true"), "--indices is empty"),
        (("--size", "2", "--indices", "1", "--", "true"), "only one of"),
        (("--items", "nowhere.jsonl", "--", "true"), "there is no such file"),
        (("--environment", "nobody", "--", "true"), "no environment 'nobody'"),
        (("--max-failed-indexes", "1", "--", "true"), "backoffLimitPerIndex"),
        (("--name", "No Name", "--", "true"), "name"),
        (("--function", "nobody", "--", "echo"), "--function and a command: give only one"),
        (("--timeout", "soon", "--", "true"), "'soon' is no duration: write 90s, 15m"),
        (("--timeout", "nan", "--", "true"), "is not between 0 and 366 days"),
        (("--memory", "512", "--function", "nobody"), "a function has its own limits"),
    ],
)
def test_what_cannot_be_is_told_in_words(dayfly: Shell, words: tuple[str, ...], why: str):
    done = subprocess.run(
        [DAYFLY, "job", "run", *words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=dayfly.folder,
        env=os.environ | {"DAYFLY_URL": f"http://{dayfly.server.admin}"},
    )

    assert done.returncode in (1, 2)
    assert why in done.stderr
    assert "Traceback" not in done.stderr


# ---- tasks that attack --------------------------------------------------------------------------


def test_a_task_cannot_write_to_the_code(sandboxed: Shell):
    """It would be there for the next task, and for other sandboxes."""
    name = sandboxed.script("touch /code/x\n", "--backoff-limit", "0", code=1)

    assert "Read-only file system" in sandboxed.log(name)


def test_a_task_has_no_network(sandboxed: Shell):
    text = (
        "#!/usr/bin/env python3\nimport socket\n"
        "try: socket.create_connection(('192.0.2.1', 80), 2)\n"
        "except OSError as error: print('refused:', error)\n"
    )

    assert "refused: " in sandboxed.log(sandboxed.script(text))


def test_a_task_that_needs_too_much_memory_is_told_what_to_raise(sandboxed: Shell):
    """Its limit is one for each task, also for a child of its own, and can be raised."""
    words = ("python3", "-c", "x = b'x' * (300 << 20)")
    for command in (words, ("sh", "-c", f'{words[0]} -c "{words[2]}"; exit $?')):
        name = sandboxed.run("--backoff-limit", "0", "--", *command, code=1)
        (told,) = sandboxed.status(name)["failedTasks"]
        assert (told["kind"], "raise limits.memoryMb" in told["message"]) == ("OutOfMemory", True)
    sandboxed.run("--memory", "400", "--", *words)
    name = sandboxed.script("kill -9 $$\n", "--backoff-limit", "0", code=1)
    assert sandboxed.status(name)["failedTasks"][0]["kind"] == "Exited"


def test_a_task_leaves_nothing_for_the_next_one(sandboxed: Shell):
    """No process, variable, item or result; all run in one sandbox, one after the other."""
    text = (
        "sleep 600 & export JOB_INDEX=77 JOB_FORGED=1\n"
        'if [ "$JOB_COMPLETION_INDEX" = 0 ]; then printf 1 >$DAYFLY_RESULT; fi\n'
    )
    name = sandboxed.script(text + "exit 0\n", "--size", "1")
    check = (
        'if [ "$JOB_COMPLETION_INDEX" = 0 ]; then\n' + text + "exit 0\nfi\n"
        'printf \'["%s","%s",%s]\' "$JOB_INDEX" "$JOB_FORGED"'
        " $(ls -d /tmp/.dayfly-* | wc -l) >$DAYFLY_RESULT\n"
        "for each in /proc/[0-9]*; do if grep -q sleep $each/comm; then exit 9; fi; done\n"
    )
    name = sandboxed.script(check, "--size", "2", "--parallelism", "1")

    assert sandboxed.results(name) == {0: 1, 1: ["1", "", 1]}


def test_no_process_outlives_its_task(sandboxed: Shell):
    """Whatever session it is in and whoever is its parent; also one that forks all the time."""
    text = """#!/usr/bin/env python3
import ctypes, os, platform, signal
others = [name for name in os.listdir("/proc") if name.isdigit() and int(name) > 1]
with open(os.environ["DAYFLY_RESULT"], "w") as file:
    file.write(str(len(others)))
CLONE, CLONE_PARENT = {"x86_64": 56, "aarch64": 220}[platform.machine()], 0x8000
reader, writer = os.pipe()

def begin(kind):
    os.setsid()
    os.write(writer, b"1")
    while kind == "forks":
        if os.fork():
            os._exit(0)
    signal.pause()

for kind in ("waits", "forks"):
    if os.fork() == 0:
        begin(kind)
if ctypes.CDLL(None).syscall(CLONE, CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0) == 0:
    begin("waits")
for _ in range(3):
    os.read(reader, 1)
"""
    name = sandboxed.script(text, "--size", "3", "--parallelism", "1")

    assert set(sandboxed.results(name).values()) == {2}, "the guest and the script itself"


def test_a_task_that_kills_its_parent_fails_and_the_others_go_on(sandboxed: Shell):
    text = 'if [ "$JOB_INDEX" = 3 ]; then kill -9 $PPID; sleep 10; fi\n'
    words = ("--size", "8", "--backoff-limit-per-index", "0")
    name = sandboxed.script(text, *words, code=1)
    status = sandboxed.status(name)

    assert (status["succeededIndexes"], status["failedIndexes"]) == ("0-2,4-7", "3")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("head -c 1G /dev/zero >$DAYFLY_RESULT", "exit code 1"),
        ("truncate -s 1G $DAYFLY_RESULT", "the result is over 262144 bytes"),
        ("ln -s /etc/passwd $DAYFLY_RESULT", "the result cannot be read"),
        ("mkfifo $DAYFLY_RESULT", "the result is no file"),
        ("ln -s /dev/zero $DAYFLY_RESULT", "the result cannot be read"),
    ],
)
def test_a_result_that_is_none_is_told(sandboxed: Shell, text: str, why: str):
    name = sandboxed.script(text, "--backoff-limit", "0", code=1)

    assert why in sandboxed.status(name)["failedTasks"][0]["message"]


def test_a_task_that_floods_its_log_harms_nobody(sandboxed: Shell):
    name = sandboxed.run("--size", "4", "--", "sh", "-c", "yes | head -c 20000000")

    assert sandboxed.status(name)["state"] == "Complete"


def test_a_fork_bomb_is_held_in_its_sandbox(sandboxed: Shell):
    words = ("--timeout", "2", "--backoff-limit", "0")
    name = sandboxed.script("bomb() { bomb | bomb & }\nbomb\nsleep 30\n", *words, code=1)

    assert sandboxed.status(name)["state"] == "Failed"


def test_a_task_has_nothing_open_that_is_not_its_own(dayfly: Shell):
    """Above all not the guest's way to the pool."""
    name = dayfly.run("--", "sh", "-c", "ls -l /proc/$$/fd >$DAYFLY_RESULT")

    assert "socket" not in dayfly.results(name)[0]


def test_a_job_is_found_by_its_namespace_alone(dayfly: Shell):
    name = dayfly.run("--", "true")

    assert f"no job other/{name}" in dayfly("-n", "other", "job", "show", name, code=1)
