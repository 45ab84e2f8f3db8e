"""Disks that fail, and what would be on one had the power gone out (both by strace).

What was written and not synchronized may be there, or not, or in part. A change of a name (rename,
unlink) is safe when its folder was synchronized, what is in a file when the file was.
"""

import random
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from tests.harness import eventually

CALLS: Final = "pwrite64,write,fdatasync,fsync,ftruncate,rename,unlink"
STRACE: Final = ("strace", "-f", "-y", "-xx", "-s", "100000000", "-e", f"trace={CALLS}", "-o")
SECTOR: Final = 512
_START: Final = re.compile(r"(\d+) +(\w+)\((.*)$", re.DOTALL)
_RESUMED: Final = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>(.*)$", re.DOTALL)
_FILE: Final = re.compile(r"(\d+)<([^>]*)>(?:, )?(.*)$", re.DOTALL)
_TEXT: Final = re.compile(r'"([^"]*)"')


@contextmanager
def failing(pid: int, calls: str, error: str = "EIO") -> Iterator[None]:
    """Meanwhile these system calls of a process fail, as on a broken disk or with *error*."""
    inject = f"inject={calls}:error={error}"
    command = ["strace", "-f", "-q", "-o", "/dev/null", "-e", f"trace={calls}", "-e", inject]
    tracer = subprocess.Popen([*command, "-p", str(pid)])
    try:
        assert eventually(lambda: _is_traced(pid))
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(20)


def _is_traced(pid: int) -> bool:
    """With all its threads."""
    try:
        tasks = [task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/status")]
    except OSError:
        return False  # one has just ended
    return not any("TracerPid:\t0\n" in task for task in tasks)


class Change(NamedTuple):
    """One change of a file's content (*kind* write or truncate), or of a name."""

    kind: str
    path: str
    at: int = 0
    data: bytes = b""
    to: str = ""


class Step(NamedTuple):
    """What happened: a *change*, a sync of what came *before* in *synced*, or a *word*."""

    change: Change | None = None
    synced: str = ""
    before: int = 0
    word: str = ""


def read(log: Path) -> list[Step]:
    """What *log* tells, in the order in which the calls ended."""
    steps: list[Step] = []
    open_: dict[str, tuple[str, str, int]] = {}
    for line in log.read_text().splitlines():
        if found := _RESUMED.match(line):
            pid, call, rest = found.groups()
            call, arguments, before = open_.pop(pid, (call, "", 0))
            arguments += rest
        elif found := _START.match(line):
            pid, call, arguments = found.groups()
            before = len(steps)
            if arguments.endswith("<unfinished ...>"):
                open_[pid] = call, arguments.removesuffix("<unfinished ...>").rstrip(), before
                continue
        else:
            continue
        steps += _step(call, arguments, before)
    return steps


def _step(call: str, arguments: str, before: int) -> Iterator[Step]:
    arguments, _, result = arguments.rpartition(" = ")
    if result.startswith("-"):
        return
    arguments = arguments.rstrip().removesuffix(")")
    if call in ("rename", "unlink"):
        first, *second = map(_decoded, _TEXT.findall(arguments))
        to = second[0].decode() if second else ""
        yield Step(Change(call, first.decode(), to=to))
        return
    found = _FILE.match(arguments)
    if found is None:
        return
    number, path, rest = found[1], _decoded(found[2]).decode(), found[3]
    if call in ("fdatasync", "fsync"):
        yield Step(synced=path, before=before)
    elif call == "ftruncate":
        yield Step(Change("truncate", path, int(rest)))
    else:
        data = _decoded(_TEXT.findall(rest)[0])
        if number == "1":
            yield from (Step(word=word) for word in data.decode().splitlines())
        elif call == "pwrite64":
            yield Step(Change("write", path, int(rest.rpartition(", ")[2]), data))
        else:
            yield Step(Change("append", path, data=data))


def _decoded(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


class Disk:
    """The steps until the power goes out, and what is there afterwards."""

    def __init__(self, steps: list[Step], draw: random.Random, ignored: str) -> None:
        self._draw = draw
        self._luck = draw.choice((0.0, 0.5, 1.0))
        """How much of what was not synchronized is there."""

        self.words = [step.word for step in steps if step.word]
        safe: set[int] = set()
        for step in steps:
            for at in range(step.before if step.synced else 0):
                change = steps[at].change
                if change is None or at in safe:
                    continue
                where = change.path
                if change.kind in ("rename", "unlink"):
                    where = str(Path(change.path).parent)
                if where == step.synced:
                    safe.add(at)
        self.files: dict[str, bytearray] = {}
        for at, step in enumerate(steps):
            if step.change is not None and not step.change.path.endswith(ignored):
                self._apply(step.change, is_safe=at in safe)

    def _apply(self, change: Change, *, is_safe: bool) -> None:
        if not is_safe and self._draw.random() >= self._luck:
            if change.kind != "append":
                return
            change = change._replace(
                data=bytes(len(change.data))
            )  # the size is there, the data not
        if change.kind == "unlink":
            self.files.pop(change.path, None)
            return
        if change.kind == "rename":
            if change.path in self.files:
                self.files[change.to] = self.files.pop(change.path)
            return
        content = self.files.setdefault(change.path, bytearray())
        if change.kind == "truncate":
            del content[change.at :]
            return
        data = change.data
        if not is_safe and self._luck == 0.5:
            data = data[: self._draw.randrange(len(data) // SECTOR + 1) * SECTOR]  # torn
        at = len(content) if change.kind == "append" else change.at
        content.extend(bytes(max(0, at - len(content))))
        content[at : at + len(data)] = data

    def write_to(self, folder: Path, was: Path) -> None:
        """Make the files below *was* anew in *folder*."""
        for path, content in self.files.items():
            if path.startswith(f"{was}/"):
                place = folder / Path(path).relative_to(was)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)


def out_at(steps: list[Step], draw: random.Random) -> int:
    """A moment at which the power goes out: after the first word."""
    first = next(at for at, step in enumerate(steps) if step.word)
    return draw.randrange(first, len(steps) + 1)
