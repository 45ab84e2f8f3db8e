"""The handler of tasks and steps that are a command or a script instead of a function.

It runs in the same sandbox as any handler, in the package's folder. What the process writes is in
the log; its exit code is the outcome; what it writes to the file `$DAYFLY_RESULT` is the result.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import sys
import time

from dayfly.invoker import Exit

TYPE_CHECKING = False  # see `record`
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from dayfly.context import Context

FOLDER = "/tmp"
RESULT_BYTES_MAX = 256 * 1024
DYING_S = 5.0
"""Who was killed is gone after this time, or the sandbox is given up."""

NOT_FOUND, NOT_EXECUTABLE = 127, 126  # a shell's exit codes
CANNOT_RUN = "CannotRun"
"""The kind of a failure that the next try would meet as well."""

REMEDIES = {
    errno.EACCES: ": chmod +x {0}, or run it as: sh {0}",
    errno.ENOEXEC: ": begin it with a line like #!/bin/sh",
    errno.ENOTDIR: "",
}
SHELL = ["/bin/sh", "-e"]
PLACE = "/tmp/.dayfly-PLACE"
"""In what is to be run, it stands for the folder of the task's own."""

IN, OUT = "/tmp/.dayfly-IN", "/tmp/.dayfly-OUT"
"""These stand for where a step's inputs are, and where its outputs belong."""

PATH = "/usr/local/bin:/usr/bin:/bin"


def run(event: dict[str, Any], context: Context) -> Any:
    """Run `event["command"]` or `event["script"]`, with `event["item"]` as JSON on its stdin.

    Returns what it left in the file `$DAYFLY_RESULT`: the JSON value, else the text. `python` and
    `python3` are the environment's, unless the task has a PATH of its own. What it left running
    is killed before its results are read; without isolation only what is in its process group.
    For `event["results"]`, names, it returns `{"result": ..., "results": {name: text}}`, of the
    files `PLACE/results/NAME`.
    """
    # by a name that no earlier task could know, and no process that one has left behind
    place = f"{FOLDER}/.dayfly-{os.urandom(8).hex()}"
    os.mkdir(place, 0o700)
    try:
        names = event.get("results")
        if names:
            os.mkdir(f"{place}/results")
        _run(event, {PLACE: place, IN: context.in_folder, OUT: context.out_folder})
        value = _result(f"{place}/result")
        if not names:
            return value
        found = {name: _read(f"{place}/results/{name}") for name in names}
        texts = {n: data.decode(errors="replace") for n, data in found.items() if data is not None}
        return {"result": value, "results": texts}
    finally:
        _forget(place)


def _run(event: dict[str, Any], places: dict[str, str]) -> None:
    place = places[PLACE]
    given, item = "/dev/null", event.get("item")
    if item is not None:
        import json

        given = f"{place}/item"
        _write(given, json.dumps(item, ensure_ascii=False).encode())
    environment = {name: _placed(text, places) for name, text in _environment(place).items()}
    if event["command"]:
        command = [_placed(word, places) for word in event["command"]]
    else:
        command = _script(_placed(event["script"], places), place)
    if "/" not in command[0]:
        command[0] = _found(command[0], environment["PATH"])
    _keep_ours()
    actions = [(os.POSIX_SPAWN_OPEN, 0, given, os.O_RDONLY, 0)]
    try:
        child = os.posix_spawn(command[0], command, environment, file_actions=actions, setpgroup=0)
    except FileNotFoundError:
        _refuse(NOT_FOUND, _missing(command[0], is_script=not event["command"]), CANNOT_RUN)
    except OSError as error:
        why = f"{command[0]!r} cannot be run: {error.strerror}"
        is_hopeless = error.errno in REMEDIES
        why += REMEDIES.get(error.errno or 0, "").format(command[0])
        _refuse(NOT_EXECUTABLE, why, CANNOT_RUN if is_hopeless else "Exited")
    # not reaped before its group is dead: so long nobody else has its number
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    _kill_group(child)
    _, status = os.waitpid(child, 0)
    _kill_others()
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        raise Exit(128 - code, f"killed by signal {-code}")
    if code:
        raise Exit(code, f"exit code {code}")


def _placed(text: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        text = text.replace(name, place)
    return text


def _keep_ours() -> None:
    """No process of the task's has what we have open: our way to the pool is among it."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            try:
                os.set_inheritable(int(name), False)
            except OSError:
                pass  # that of the folder itself


def _environment(place: str) -> dict[str, str]:
    """Our own variables, with a `python` that has the libraries which we have."""
    path = os.environ.get("PATH", PATH)
    libraries = [entry for entry in sys.path if _is_library(entry)]
    added = {"DAYFLY_RESULT": f"{place}/result"}
    os.mkdir(f"{place}/bin")
    for name in ("python", "python3"):
        os.symlink(sys.executable, f"{place}/bin/{name}")
    added["PATH"] = f"{place}/bin:{path}" if path == PATH else f"{path}:{place}/bin"
    if libraries and "PYTHONPATH" not in os.environ:
        added["PYTHONPATH"] = ":".join(libraries)
    return os.environ | added


def _is_library(entry: str) -> bool:
    """Whether it is on the path for the environment's sake: not Python's own, ours or the code."""
    ours = os.path.dirname(os.path.dirname(__file__))
    return not (entry.startswith((sys.prefix, sys.base_prefix)) or entry in (ours, os.getcwd()))


def _script(text: str, place: str) -> list[str]:
    """The command that runs a script: what its `#!` names, else `/bin/sh -e`."""
    path = f"{place}/script"
    _write(path, text.encode())
    first, _, _ = text.partition("\n")
    if not first.startswith("#!") or not first[2:].strip():
        return [*SHELL, path]
    interpreter, _, argument = first[2:].strip().partition(" ")
    argument = argument.strip()  # one argument, as the kernel has it
    return [interpreter, *([argument] if argument else []), path]


def _found(name: str, path: str) -> str:
    """Where on the *path* the command is."""
    for folder in path.split(":"):
        whole = os.path.join(folder, name)
        if os.access(whole, os.X_OK) and not os.path.isdir(whole):
            return whole
    return name


def _missing(name: str, *, is_script: bool) -> str:
    """Why there is nothing to run of this name, and what to do about it."""
    if is_script:
        return f"the sandbox has no {name}, which the script's first line names"
    if os.path.exists(name):
        return f"the sandbox does not have what the first line of {name} names"
    if "/" not in name:
        return f"the sandbox has no command {name!r}"
    own = f", or --script {os.path.basename(name)}" if not name.startswith("/") else ""
    return f"the sandbox has no {name}: send files with --source FOLDER{own}"


def _read(path: str) -> bytes | None:
    """What a process left there; None if it left nothing."""
    try:
        # whatever stands there now: no pipe that nobody writes to, nor what a link leads to
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        _refuse(1, f"the result cannot be read: {error.strerror}")
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        _refuse(1, "the result is no file")
    with open(opened, "rb") as file:
        data = file.read(RESULT_BYTES_MAX + 1)
    if len(data) > RESULT_BYTES_MAX:
        _refuse(1, f"the result is over {RESULT_BYTES_MAX} bytes")
    return data


def _result(path: str) -> Any:
    data = _read(path)
    if data is None:
        return None
    import json

    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return data.decode(errors="replace").removesuffix("\n")


def _refuse(code: int, why: str, kind: str = "Exited") -> NoReturn:
    print(why, file=sys.stderr)
    raise Exit(code, why, kind)


def _write(path: str, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def _kill_others() -> None:
    """Whatever else runs in a sandbox of our own; if something stays, the sandbox ends.

    No other task runs in it now: a handler that is no coroutine has one at a time.
    """
    lockdown = sys.modules.get("dayfly.lockdown")
    if lockdown is None or not lockdown.is_ours_alone:
        return
    until = time.monotonic() + DYING_S
    # at once: nobody is left that could fork again. All but pid 1 and ourselves, says the kernel
    while _is_anybody_killed():
        if time.monotonic() > until:
            os._exit(1)
        time.sleep(0.0005)


def _is_anybody_killed() -> bool:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass  # one that has made itself our child
    except ChildProcessError:
        pass
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _forget(place: str) -> None:
    """All that is there, also what the task has put there."""
    import shutil

    shutil.rmtree(place, ignore_errors=True)
