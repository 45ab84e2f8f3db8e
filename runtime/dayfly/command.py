"""The handler of tasks and steps that are a command or a script instead of a function.

It runs in the same sandbox as any handler, in the package's folder. What the process writes is in
the log; its exit code is the outcome; what it writes to the file `$DAYFLY_RESULT` is the result.
"""

from __future__ import annotations

import os
import sys
import zlib

from dayfly.invoker import Exit

TYPE_CHECKING = False  # see `record`
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from dayfly.context import Context

FOLDER = "/tmp"
RESULT_BYTES_MAX = 256 * 1024
NOT_FOUND, NOT_EXECUTABLE = 127, 126  # a shell's exit codes
SHELL = ["/bin/sh", "-e"]


def run(event: dict[str, Any], context: Context) -> Any:
    """Run `event["command"]` or `event["script"]`, with `event["item"]` as JSON on its stdin.

    Returns what it left in the file `$DAYFLY_RESULT`: the JSON value, else the text.
    """
    command = list(event["command"] or _script(event["script"]))
    item = event.get("item")
    result, given = f"{FOLDER}/.dayfly-result", "/dev/null"
    _remove(result)
    for path in (event.get("results") or {}).values():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        _remove(path)
    if item is not None:
        import json

        given = f"{FOLDER}/.dayfly-item"
        _write(given, json.dumps(item, ensure_ascii=False).encode())
    environment = os.environ | {"DAYFLY_RESULT": result}
    actions = [(os.POSIX_SPAWN_OPEN, 0, given, os.O_RDONLY, 0)]
    try:
        child = os.posix_spawnp(command[0], command, environment, file_actions=actions)
    except FileNotFoundError:
        _refuse(NOT_FOUND, f"there is no command {command[0]!r} in this environment")
    except OSError as error:
        _refuse(NOT_EXECUTABLE, f"{command[0]!r} cannot be run: {error.strerror}")
    paths = event.get("results") or {}
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        raise Exit(128 - code, f"killed by signal {-code}")
    if code:
        raise Exit(code, f"exit code {code}")
    value = _result(result)
    if not paths:
        return value
    written = {name: text for name, path in paths.items() if (text := _text(path)) is not None}
    return {"result": value, "results": written}


def _script(text: str) -> list[str]:
    """The command that runs a script: what its `#!` names, else `/bin/sh -e`."""
    path = f"{FOLDER}/.dayfly-script-{zlib.crc32(text.encode()):08x}"
    _write(path, text.encode())
    first, _, _ = text.partition("\n")
    if not first.startswith("#!") or not first[2:].strip():
        return [*SHELL, path]
    interpreter, _, argument = (
        first[2:].strip().partition(" ")
    )  # one argument, as the kernel has it
    return [interpreter, *([argument.strip()] if argument.strip() else []), path]


def _read(path: str) -> bytes | None:
    """What a process wrote there; None if it did not. A link is its own business."""
    try:
        with open(path, "rb") as file:
            data = file.read(RESULT_BYTES_MAX + 1)
    except OSError:
        return None
    if len(data) > RESULT_BYTES_MAX:
        _refuse(1, f"the result is over {RESULT_BYTES_MAX} bytes")
    return data


def _text(path: str) -> str | None:
    data = _read(path)
    return None if data is None else data.decode(errors="replace")


def _result(path: str) -> Any:
    data = _read(path)
    if data is None:
        return None
    import json

    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return data.decode(errors="replace").removesuffix("\n")


def _refuse(code: int, why: str) -> NoReturn:
    print(why, file=sys.stderr)
    raise Exit(code, why)


def _write(path: str, data: bytes) -> None:
    """A file of ours alone, in place of whatever is there."""
    _remove(path)
    with open(path, "xb") as file:
        file.write(data)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
