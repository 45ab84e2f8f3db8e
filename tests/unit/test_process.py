"""A command or script as a task: what it is given, and what its end means."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.harness import eventually_none, stat

from dayfly import invoker, process
from dayfly.context import Context
from dayfly.invoker import Exit
from dayfly.protocol import Failed

CONTEXT = Context(
    aws_request_id="i",
    function_name="f",
    function_version="1",
    memory_limit_in_mb=256,
    namespace="default",
    deadline=0.0,
    traceparent="",
)
FOUND = {"PATH": process.PATH, "HOME": "/tmp"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The sandbox's /tmp; a task leaves nothing in it."""
    monkeypatch.setattr(process, "FOLDER", str(tmp_path))
    for name in os.environ:
        monkeypatch.delenv(name)
    for name, value in FOUND.items():
        monkeypatch.setenv(name, value)
    yield tmp_path
    assert not list(tmp_path.glob(".dayfly-*"))


def run(*words: str, item: Any = None) -> Any:
    return process.run({"command": list(words), "script": None, "item": item}, CONTEXT)


def script(text: str, item: Any = None) -> Any:
    return process.run({"command": None, "script": text, "item": item}, CONTEXT)


def refused(text: str) -> tuple[object, str]:
    """The exit code, and what is told."""
    with pytest.raises(Exit) as told:
        script(text)
    return told.value.code, told.value.why


@pytest.mark.parametrize(
    ("written", "result"),
    [
        ("", None),
        ("printf 7 >$DAYFLY_RESULT", 7),
        ("""printf '{"a": [1, null]}' >$DAYFLY_RESULT""", {"a": [1, None]}),
        ("echo some text >$DAYFLY_RESULT", "some text"),
        (r"printf '\377' >$DAYFLY_RESULT", "\N{REPLACEMENT CHARACTER}"),
        ("printf '' >$DAYFLY_RESULT", ""),
        ("head -c 100000 /dev/zero | tr '\\0' [ >$DAYFLY_RESULT", "[" * 100_000),
    ],
)
def test_what_is_in_the_file_is_the_result(written: str, result: Any):
    """JSON if it can be, else text; nothing without a file."""
    assert script(written) == result


@pytest.mark.parametrize(
    ("text", "code", "why"),
    [
        ("exit 3", 3, "exit code 3"),
        ("false; exit 0", 1, "exit code 1"),
        ("kill -9 $$", 137, "killed by signal 9"),
        ("nosuchcommand", 127, "exit code 127"),
        ("#!/no/such/interpreter\n", 127, "the sandbox has no /no/such/interpreter, which the"),
        ("#!/etc/passwd\n", 126, "'/etc/passwd' cannot be run: Permission denied"),
        ("head -c 300000 /dev/zero >$DAYFLY_RESULT", 1, "the result is over 262144 bytes"),
        ("ln -s /etc/passwd $DAYFLY_RESULT", 1, "the result cannot be read"),
        ("mkfifo $DAYFLY_RESULT", 1, "the result is no file"),
        ("mkdir $DAYFLY_RESULT", 1, "the result is no file"),
        ("echo 1 >$DAYFLY_RESULT; chmod 0 $DAYFLY_RESULT; exit 5", 5, "exit code 5"),
    ],
)
def test_a_bad_end_is_told_with_its_exit_code(text: str, code: int, why: str):
    told = refused(text)

    assert told[0] == code
    assert told[1].startswith(why)


def test_a_command_that_is_not_there_is_told_by_its_name():
    with pytest.raises(Exit) as told:
        run("nosuchcommand")

    assert (told.value.code, "'nosuchcommand'" in told.value.why) == (127, True)


@pytest.mark.parametrize(
    ("mode", "text", "name", "why"),
    [
        (0o755, None, "./s.sh", "no ./s.sh: send files with --source FOLDER, or --script s.sh"),
        (0o755, None, "/no/s.sh", "the sandbox has no /no/s.sh: send files with --source FOLDER"),
        (0o644, "#!/bin/sh\n", "./s.sh", "chmod +x ./s.sh, or run it as: sh ./s.sh"),
        (0o755, "echo\n", "./s.sh", "begin it with a line like #!/bin/sh"),
        (0o755, "#!/no/such\n", "./s.sh", "what the first line of ./s.sh names"),
        (0o755, "#!/bin/sh\n", "./s.sh/x", "'./s.sh/x' cannot be run: Not a directory"),
    ],
)
def test_a_command_that_can_never_run_is_told_with_its_remedy(
    mode: int, text: str | None, name: str, why: str, tmp_path: Path, monkeypatch: Any
):
    """As a kind of its own: another try would meet the same."""
    (tmp_path / "code").mkdir()
    monkeypatch.chdir(tmp_path / "code")
    if text is not None:
        Path("s.sh").write_text(text)
        Path("s.sh").chmod(mode)
    with pytest.raises(Exit) as told:
        run(name)

    assert told.value.why.endswith(why)
    assert told.value.kind == "CannotRun"
    assert call_failed(told.value) == "CannotRun"


def call_failed(error: Exit) -> str:
    """The kind that the pool is told."""
    failed, _ = invoker.failed(error, "/code", 0.0)
    assert isinstance(failed, Failed)
    return failed.kind


def test_a_script_runs_by_what_its_first_line_names():
    """One argument at most, as the kernel has it; without a line it is `/bin/sh -e`."""
    text = "#!/usr/bin/env  -S sh -c 'printf \"[1]\" >$DAYFLY_RESULT'\n"

    assert script(text) == [1]
    assert script("#!\nprintf 2 >$DAYFLY_RESULT") == 2
    assert script("#! /bin/sh\nfalse\nprintf 3 >$DAYFLY_RESULT") == 3


@pytest.mark.parametrize("name", ["python", "python3"])
def test_python_is_the_one_of_the_environment_with_its_libraries(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """In a script and as a command; Python's own folders, our code and the user's are not said."""
    (tmp_path / "environment").mkdir()
    (tmp_path / "environment" / "shiny.py").write_text("VALUE = 7\n")
    ours = str(Path(process.__file__).parents[1])
    path = [ours, f"{sys.prefix}/lib", f"{sys.base_prefix}/lib", str(tmp_path / "environment")]
    monkeypatch.setattr(sys, "path", path)
    body = (
        "import json, os, shiny, sys\n"
        "told = [os.path.realpath(sys.executable), shiny.VALUE, os.environ['PYTHONPATH']]\n"
        "json.dump(told, open(os.environ['DAYFLY_RESULT'], 'w'))\n"
    )
    expected = [os.path.realpath(sys.executable), 7, str(tmp_path / "environment")]

    assert script(f"#!/usr/bin/env {name}\n{body}") == expected
    assert run(name, "-c", body) == expected


def test_a_path_of_the_users_own_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    own = tmp_path / "python"
    own.write_text("#!/bin/sh\nprintf '\"mine\"' >$DAYFLY_RESULT\n")
    own.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    assert run("python") == "mine"


@pytest.mark.parametrize("item", [7, "text", {"a": "ä\u2028"}, [None], False, "x" * 200_000])
def test_an_item_is_json_on_stdin(item: Any):
    text = "cat >$DAYFLY_RESULT"

    assert script(text, item) == item


def test_without_an_item_stdin_is_empty():
    assert script("wc -c >$DAYFLY_RESULT") == 0


def test_what_a_task_leaves_running_is_killed(tmp_path: Path):
    started = time.monotonic()
    pid = script("sleep 60 & printf $! >$DAYFLY_RESULT")

    assert time.monotonic() - started < 60
    assert not eventually_none(lambda: [s for s in stat(pid)[:1] if s not in "ZX"])


def signalled(monkeypatch: pytest.MonkeyPatch, *, is_alone: bool, left: int = 0) -> list[int]:
    """Whom a task's end signals, where so many others stay for a while."""
    told: list[int] = []

    def kill(pid: int, number: int) -> None:
        told.append(pid)
        if len(told) > left:
            raise ProcessLookupError

    monkeypatch.setitem(sys.modules, "dayfly.lockdown", SimpleNamespace(is_ours_alone=is_alone))
    monkeypatch.setattr(os, "kill", kill)
    assert script("printf 7 >$DAYFLY_RESULT") == 7
    return told


def test_all_in_a_sandbox_are_killed_until_nobody_is_left(monkeypatch: pytest.MonkeyPatch):
    assert signalled(monkeypatch, is_alone=True, left=2) == [-1, -1, -1]


def test_without_a_sandbox_nobody_elses_process_is_killed(monkeypatch: pytest.MonkeyPatch):
    assert signalled(monkeypatch, is_alone=False) == []


def test_a_sandbox_in_which_somebody_stays_ends(monkeypatch: pytest.MonkeyPatch):
    class Over(BaseException):
        pass

    def end(code: int) -> None:
        raise Over

    monkeypatch.setattr(process, "DYING_S", 0.0)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Over):
        signalled(monkeypatch, is_alone=True, left=1_000_000)


def test_a_task_cannot_leave_anything_for_the_next_one():
    """Neither a result nor variables; the folder has another name each time."""
    first = script("export JOB_INDEX=9; echo $DAYFLY_RESULT >$DAYFLY_RESULT")
    second = script("""printf '["%s","%s"]' "$JOB_INDEX" "$DAYFLY_RESULT" >$DAYFLY_RESULT""")

    assert second[0] == ""
    assert second[1] != first
    assert script("") is None


def test_a_folder_that_was_filled_by_the_task_goes_too():
    assert script("mkdir -p $(dirname $DAYFLY_RESULT)/a/b; touch ${DAYFLY_RESULT}2") is None
