"""What a run's journal says, and what the engine has others do. Data, one encoding, its limits.

A fact is something that has happened; a run's journal is its facts in order, and nothing else is
needed to go on with it. Which of them must be on the disk before what:

* `RunBegan` before anybody is told that there is such a run.
* `Ended`, `Failed`, `Called`, `Decided`, `Passed`, `CancelAsked`, `RetryAsked` before any command
  that the engine returned for them, or for a later fact, is carried out; the last but `Passed` also
  before whoever sent them is answered. One transaction for a batch of facts will do.
* `Started` never: it is for people. When it is lost the step is commanded again with the same
  attempt, as it must be after a crash anyway. It may be left for the next batch.

Facts may come twice, late, or for what is long over: the engine takes no notice of those, and they
need not be kept. Encoded facts are arrays: a later version adds fields at the end, with defaults,
and never takes one away.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from dayfly_pool.commands import StartKind
from dayfly_pool.errors import BadInput
from dayfly_pool.workflow.model import Step, TaskSpec
from dayfly_pool.workflow.references import Scope

FORMAT: Final = 1
VALUE_BYTES_MAX: Final = 256 * 1024
"""A longer value is an artifact, and goes by reference."""

FACT_BYTES_MAX: Final = 1 << 20
NESTING_MAX: Final = 100
MESSAGE_CHARACTERS_MAX: Final = 4096
LARGE: Final = "$large"


class Artifact(Struct, frozen=True):
    """A file or folder that never changes, by its digest. Among values it is a mapping of these."""

    uri: str
    sha256: str
    size_bytes: int = 0

    def as_value(self) -> dict[str, Any]:
        """What `$(steps.NAME.outputs.OUTPUT)` stands for."""
        return {"uri": self.uri, "sha256": self.sha256, "size_bytes": self.size_bytes}

    def as_result(self) -> dict[str, Any]:
        """What stands for a result that is too large: whoever runs a step puts it back."""
        return {LARGE: self.as_value()}


class Report(Struct, frozen=True, array_like=True):
    """How an attempt went, for people: nothing is decided by it. *why* it ran where it ran."""

    start: StartKind | None = None
    duration_s: float = 0.0
    bytes_moved: int = 0
    why: str = ""


class _Fact(Struct, frozen=True, array_like=True, kw_only=True):
    at: float
    """Unix seconds."""


class RunBegan(_Fact, frozen=True, tag="run"):
    """Somebody asked for it.

    *run* is what `$(run.id)`, `name`, `namespace` and `workflow` stand for. *workspaces*: where
    each of them is; the shell's own business.
    """

    params: dict[str, Any] = {}
    workspaces: dict[str, str] = {}
    run: dict[str, str] = {}
    by: str = ""
    format: int = FORMAT


class Started(_Fact, frozen=True, tag="started"):
    """A sandbox has this attempt of a step."""

    key: str
    attempt: int
    report: Report = Report()


class Ended(_Fact, frozen=True, tag="ended"):
    """An attempt succeeded, or (*was_cached*) need not have been made."""

    key: str
    attempt: int
    results: dict[str, Any] = {}
    outputs: dict[str, Artifact] = {}
    was_cached: bool = False
    report: Report = Report()


class Failed(_Fact, frozen=True, tag="failed"):
    """An attempt failed, or was stopped as commanded.

    Not *is_counted*: for no fault of its own, and it has not used up one of its retries.
    *is_hopeless*: another attempt would fail as well.
    """

    key: str
    attempt: int
    kind: str
    message: str = ""
    is_counted: bool = True
    is_hopeless: bool = False
    report: Report = Report()


class Passed(_Fact, frozen=True, tag="passed"):
    """The time that the engine asked to be woken at has come."""


class Called(_Fact, frozen=True, tag="called"):
    """Whoever holds the token of a callback has called; the shell makes and checks tokens."""

    key: str
    attempt: int
    value: Any = None


class Decided(_Fact, frozen=True, tag="decided"):
    """Somebody approved or refused."""

    key: str
    attempt: int
    is_approved: bool
    by: str = ""
    note: str = ""


class CancelAsked(_Fact, frozen=True, tag="cancel"):
    """The run is to end. What runs finally still does, unless *is_hard*."""

    by: str = ""
    is_hard: bool = False


class RetryAsked(_Fact, frozen=True, tag="retry"):
    """A run that did not succeed is to go on: what failed or never ran, and what runs finally."""

    by: str = ""


Fact = RunBegan | Started | Ended | Failed | Passed | Called | Decided | CancelAsked | RetryAsked

Status = Literal["Succeeded", "Completed", "Failed", "TimedOut", "Cancelled"]
"""Completed: nothing failed, and something was skipped."""


class View(Struct, frozen=True):
    """A workspace as a step finds it: what the versions *merge* hold; empty if there are none.

    Each version is named by the key of the step that left it, and was made from its own view.
    """

    workspace: str
    merge: tuple[str, ...]


class Invoke(Struct, frozen=True):
    """Run one attempt of a step, on what its values stand for.

    *scope* is there if its script, command or env may hold references (`references.substitute_text`
    and `arguments`), with the usual paths: who runs it elsewhere says so in it. *workflow* names
    the definition that the step is of (the run's own: ""); *task* is there if the step refers to
    one, and then *env* is what the step adds to the task's. A key is `step`, `step[3]` in a matrix,
    `outer/inner` in a nested workflow; with the attempt it never comes twice, but for being told
    again what is under way.
    """

    key: str
    attempt: int
    step: Step
    params: dict[str, Any]
    inputs: dict[str, Any]
    workspaces: dict[str, View]
    scope: Scope | None = None
    timeout_s: float | None = None
    workflow: str = ""
    task: TaskSpec | None = None
    env: dict[str, str] = {}


class Expect(Struct, frozen=True):
    """Let a callback or a decision about *what* come in; nothing else is under way for it."""

    key: str
    attempt: int
    kind: Literal["callback", "approval"]
    what: str = ""


class Cancel(Struct, frozen=True):
    """Stop this attempt and say when it has (`Failed`, or `Ended` if it was faster); or expect no
    more what was expected.
    """

    key: str
    attempt: int


class Finish(Struct, frozen=True):
    """The run is over. *workspaces* has the versions of each that there are at the end."""

    status: Status
    results: dict[str, Any] = {}
    kind: str = ""
    message: str = ""
    workspaces: dict[str, tuple[str, ...]] = {}


Command = Invoke | Expect | Cancel | Finish

_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Fact)


def encode(fact: Fact) -> bytes:
    """One entry of a journal. Raises `BadInput` for values that are none, or too large."""
    try:
        encoded = _encoder.encode(fact)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise BadInput(f"a value cannot be written down: {error}") from error
    if len(encoded) > FACT_BYTES_MAX:
        raise BadInput(f"{len(encoded)} bytes of values, {FACT_BYTES_MAX} go in one fact")
    if len(encoded) > NESTING_MAX:
        _check_nesting(fact)
    return encoded


def decode(encoded: bytes) -> Fact:
    """The fact. Raises `BadInput` for what this version does not know."""
    try:
        fact: Fact = _decoder.decode(encoded)
    except msgspec.DecodeError as error:
        raise BadInput(f"no fact that this version of Dayfly knows: {error}") from error
    if isinstance(fact, RunBegan) and fact.format > FORMAT:
        raise BadInput(f"a run of a later version of Dayfly (format {fact.format})")
    return fact


def to_refer(results: Mapping[str, Any]) -> list[str]:
    """Which of *results* must go by reference, so that the others can be written down."""
    sizes = {name: len(_encoder.encode(value)) for name, value in results.items()}
    referred, total = [], sum(sizes.values())
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        if size > VALUE_BYTES_MAX or total > FACT_BYTES_MAX // 2:
            referred.append(name)
            total -= size
    return referred


def _check_nesting(fact: Fact) -> None:
    level: Iterable[Any] = [getattr(fact, name) for name in ("params", "results", "value")
                            if hasattr(fact, name)]  # fmt: skip
    for _ in range(NESTING_MAX):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value.values()
            elif isinstance(value, list | tuple):
                below += value
        if not below:
            return
        level = below
    raise BadInput(f"a value is nested more than {NESTING_MAX} deep: make it flatter")
