"""What a workflow is: steps, what they take from one another, and when they run. Data only.

Both faces, the SDK in `dayfly` and YAML, make this. A value may hold references (`references`):
`$(params.NAME)`, `$(steps.NAME.results.RESULT)`, `$(steps.NAME.outputs.OUTPUT)`; one that is the
whole string stands for the value with its type, one among other text for its text.

What a handler or a function returns is its result `result`; further results that its step declares
are keys of the mapping that it returns. A script or a command writes each of its results to
`$(results.NAME.path)`. Here is what can be said of one declaration by itself; what lies between
several is checked by `graph`.
"""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from dayfly_pool.declared import Model, Name, given
from dayfly_pool.models import API_VERSION, Code, Limits, Metadata, Network

ParamType = Literal["string", "integer", "number", "boolean", "array", "object", "artifact", "any"]
Word = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_-]{0,62}\Z")]
"""What parameters, results, outputs and workspaces are called."""

Duration = Annotated[str, Meta(max_length=32)] | float
"""Seconds, or text like `90s`, `15m`, `1h30m`, `500ms`, `2d`."""

RESULT: Final = "result"
"""What a handler returns, as a result."""

DURATION_S_MAX: Final = 366 * 86400.0
STEPS_MAX: Final = 100_000
"""Steps of a run, with those of nested workflows and of matrices, as far as these are written."""

BODIES: Final = ("handler", "function", "script", "command", "task", "workflow", "wait")
COMMAND_WORDS_MAX: Final = 10_000
STREAMS_MAX: Final = 8
"""Of a step: each has memory and threads of the server while the step runs."""

_DURATION: Final = re.compile(r"(?:\d{1,9}(?:\.\d{1,9})?(?:ms|us|ns|d|h|m|s))+\Z")
_PART: Final = re.compile(r"([\d.]+)(ms|us|ns|d|h|m|s)")
_SECONDS: Final = {
    "d": 86400.0,
    "h": 3600.0,
    "m": 60.0,
    "s": 1.0,
    "ms": 1e-3,
    "us": 1e-6,
    "ns": 1e-9,
}
_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def duration_s(duration: str | float) -> float:
    """A duration in seconds, at most 366 days. Raises `ValueError`.

    Text is as Go's `time.ParseDuration` has it (so as Kubernetes and Tekton do), and `d` for days.
    """
    if isinstance(duration, str):
        if not _DURATION.match(duration):
            raise ValueError(f"{duration!r} is no duration: write 90s, 15m, 1h30m or 500ms")
        seconds = math.fsum(float(n) * _SECONDS[unit] for n, unit in _PART.findall(duration))
    else:
        seconds = float(duration)
    if not 0 <= seconds <= DURATION_S_MAX:
        raise ValueError(f"{duration!r} is not between 0 and 366 days")
    return seconds


def _check_timeout(what: str, duration: str | float | None) -> None:
    if duration is not None and duration_s(duration) <= 0:
        raise ValueError(f"{what} must be more than 0: leave it out for none")


class Param(Model, frozen=True):
    """A parameter that is asked for; without a *default* it must be given.

    *properties* names what an object holds, as in Tekton: `{key: {type: string}}`.
    """

    name: Word
    type: ParamType = "string"
    default: Any | UnsetType = UNSET
    enum: tuple[Any, ...] = ()
    properties: dict[str, Any] = {}
    description: str = ""

    @property
    def is_required(self) -> bool:
        """Whether no default was written."""
        return self.default is UNSET


class Declared(Model, frozen=True):
    """A result of a step or task, with its type."""

    name: Word
    type: ParamType = "string"
    properties: dict[str, Any] = {}
    description: str = ""


class Output(Model, frozen=True):
    """A file or folder that a step leaves under `/out`: an artifact. A *stream* is written once."""

    name: Word
    path: Annotated[str, Meta(max_length=1024)] = ""  # below /out; the name if empty
    stream: bool = False
    is_build: bool = False  # subject of the provenance

    def __post_init__(self) -> None:
        parts = self.path.split("/")
        if self.path and (self.path.startswith("/") or "\0" in self.path or ".." in parts):
            raise ValueError(f"output {self.name!r}: path is below /out, without `..`")


class Condition(Model, frozen=True):
    """A guard: Tekton's three words, or an expression in CEL over `params` and `steps`."""

    input: Any = None
    operator: Literal["in", "notin"] | None = None
    values: tuple[Any, ...] | str = ()
    cel: Annotated[str, Meta(max_length=4096)] = ""

    def __post_init__(self) -> None:
        if bool(self.cel) == (self.operator is not None):
            raise ValueError("when needs input, operator and values, or cel, and not both")
        if self.cel and (self.input is not None or self.values):
            raise ValueError("when with cel has neither input nor values")
        if self.operator is not None and not self.values:
            raise ValueError(f"when with operator {self.operator} needs values")


class Matrix(Model, frozen=True):
    """One run of the step for each combination of *params*; *include* adds to them.

    The values of a combination are params of its run, but for those whose names the step has among
    its inputs: these take them as `$(item.NAME)`. What the runs leave is a list, in their order.
    """

    params: dict[Word, Any] = {}
    include: tuple[dict[Word, Any], ...] = ()
    parallelism: Annotated[int, Meta(ge=0, le=100_000)] = 0  # 0: as the pool has room

    def __post_init__(self) -> None:
        if not self.params and not self.include:
            raise ValueError("matrix needs params or include")


class Retries(Model, frozen=True):
    """How often a step that failed is tried again, and after how long."""

    limit: Annotated[int, Meta(ge=0, le=100)] = 0
    backoff_seconds: Annotated[float, Meta(ge=0, le=3600)] = 0.0
    backoff_max_seconds: Annotated[float, Meta(ge=0, le=86400)] = 300.0


class Wait(Model, frozen=True):
    """A step that waits and holds no sandbox: one of a time, a callback, somebody's approval."""

    timer: Duration | None = None
    callback: bool = False
    approval: Annotated[str, Meta(max_length=1024)] = ""  # what is to be approved

    def __post_init__(self) -> None:
        if (self.timer is not None) + self.callback + bool(self.approval) != 1:
            raise ValueError("wait is for one of timer, callback and approval")
        if self.timer is not None:
            duration_s(self.timer)


class Step(Model, frozen=True):
    """One unit: a handler of the workflow's own package, a deployed function, a script, a command,
    a Task, another Workflow, or a wait; exactly one of them.
    """

    name: Name
    handler: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    function: Name | None = None
    script: Annotated[str, Meta(min_length=1, max_length=1 << 20)] | None = None
    command: tuple[str, ...] | None = None
    task: Name | None = None
    workflow: Name | None = None
    wait: Wait | None = None
    params: dict[Word, Any] = {}
    inputs: dict[Word, Any] = {}  # artifacts, mounted at /in/NAME
    outputs: tuple[Output, ...] = ()
    results: tuple[Declared, ...] = ()
    workspaces: dict[Word, Word] = {}  # the step's name for it: the workflow's
    run_after: tuple[Name, ...] = ()
    when: tuple[Condition, ...] = ()
    matrix: Matrix | None = None
    retries: Annotated[int, Meta(ge=0, le=100)] | Retries = 0
    timeout: Duration | None = None
    on_error: Literal["stopAndFail", "continue"] = "stopAndFail"
    environment: Annotated[str, Meta(max_length=64)] | None = None
    env: dict[str, str] = {}
    network: Network | None = None
    limits: Limits | None = None
    cache: bool = False
    merge: Literal["fail", "ordered", "reduce"] | None = None  # how branches are joined for it

    def __post_init__(self) -> None:
        self._check_body()
        try:
            _check_timeout("timeout", self.timeout)
        except ValueError as error:
            raise ValueError(f"step {self.name!r}: {error}") from None
        if self.cache and self.network == "host":
            raise ValueError(
                f"step {self.name!r}: what has a network is not cached: leave out cache or network"
            )
        if self.env:
            check_env(self.env, f"step {self.name!r}")
        if len(self.outputs) > STREAMS_MAX:
            check_streams(self.outputs, f"step {self.name!r}")

    def _check_body(self) -> None:
        # Told apart by hand: this runs for each of 100,000 steps.
        bodies = (
            (self.handler is not None)
            + (self.function is not None)
            + (self.script is not None)
            + (self.command is not None)
            + (self.task is not None)
            + (self.workflow is not None)
            + (self.wait is not None)
        )
        if bodies != 1:
            has = " and ".join(given(self, BODIES)) or "none"
            raise ValueError(f"step {self.name!r} needs one of {', '.join(BODIES)}; it has {has}")
        if self.command is not None:
            check_command(self.command, f"step {self.name!r}")
        check_limits(self.limits, f"step {self.name!r}")
        if self.limits is not None and (whose := self.function or self.workflow):
            raise ValueError(
                f"step {self.name!r}: limits are declared where its code is, in {whose!r}"
            )
        if (self.task or self.workflow) and (self.results or self.outputs):
            raise ValueError(
                f"step {self.name!r}: results and outputs are declared where its body is, "
                f"in {self.task or self.workflow!r}"
            )
        if self.wait is not None:
            for word in ("inputs", "outputs", "workspaces", "env", "environment", "network",
                         "limits", "cache"):  # fmt: skip
                if getattr(self, word):
                    raise ValueError(f"step {self.name!r} waits and runs nothing: it has no {word}")

    @property
    def body(self) -> str:
        """Which of the seven it is."""
        return given(self, BODIES)[0]

    @property
    def tries(self) -> Retries:
        """Its retries, however they were written."""
        return self.retries if isinstance(self.retries, Retries) else Retries(limit=self.retries)


class Timeouts(Model, frozen=True, rename={"finally_": "finally"}):
    """Of the whole run, of its steps, and of what runs finally."""

    workflow: Duration = 86400.0
    steps: Duration | None = None
    finally_: Duration | None = None

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            _check_timeout(f"timeouts.{name.rstrip('_')}", getattr(self, name))


class WorkflowSpec(Code, frozen=True, kw_only=True, rename={"finally_": "finally"}):
    """Steps and what they have in common; handlers are in its own code, as of a function."""

    steps: tuple[Step, ...]
    finally_: tuple[Step, ...] = ()
    params: tuple[Param, ...] = ()
    workspaces: tuple[Word, ...] = ()
    results: dict[Word, Any] = {}
    timeouts: Timeouts = Timeouts()
    environment: Annotated[str, Meta(max_length=64)] = "base"


class TaskSpec(Code, frozen=True, kw_only=True):
    """A step that workflows share: what it takes, what it leaves, how it is done."""

    params: tuple[Param, ...] = ()
    results: tuple[Declared, ...] = ()
    inputs: tuple[Word, ...] = ()
    outputs: tuple[Output, ...] = ()
    workspaces: tuple[Word, ...] = ()
    handler: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    function: Name | None = None
    script: Annotated[str, Meta(min_length=1, max_length=1 << 20)] | None = None
    command: tuple[str, ...] | None = None
    environment: Annotated[str, Meta(max_length=64)] = "base"
    env: dict[str, str] = {}
    network: Network = "none"
    limits: Limits | None = None
    cache: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        bodies = given(self, BODIES[:4])
        if len(bodies) != 1:
            has = " and ".join(bodies) or "none"
            raise ValueError(f"a task needs one of {', '.join(BODIES[:4])}; it has {has}")
        if self.command is not None:
            check_command(self.command, "the task")
        check_limits(self.limits, "the task")
        if self.limits is not None and self.function is not None:
            raise ValueError(f"limits are declared where its code is, in {self.function!r}")
        if self.cache and self.network == "host":
            raise ValueError("what has a network is not cached: leave out cache or network")
        check_env(self.env, "the task")
        check_streams(self.outputs, "the task")


def check_limits(limits: Limits | None, whose: str) -> None:
    """Raise `ValueError` for what only the pod of an image can be given."""
    if limits is not None and limits.resources:
        raise ValueError(f"{whose}: limits.resources go with an image")


def check_env(env: Mapping[str, str], whose: str) -> None:
    """Raise `ValueError` for what no process could be given as its environment."""
    for name, value in env.items():
        if not _ENV_NAME.match(name) or "\0" in value:
            raise ValueError(
                f"{whose}: env {name[:80]!r}: names are letters, digits and underscores, "
                "and values hold no NUL"
            )


def check_streams(outputs: tuple[Output, ...], whose: str) -> None:
    """Raise `ValueError` for more streams than a step may have."""
    if (number := sum(output.stream for output in outputs)) > STREAMS_MAX:
        raise ValueError(
            f"{whose}: {number} outputs are streams, limit {STREAMS_MAX}:"
            " leave `stream` out of some"
        )


def check_command(command: tuple[str, ...], whose: str) -> None:
    """Raise `ValueError` for what cannot be started."""
    if not command or not command[0]:
        raise ValueError(f"{whose}: command is empty: name a program")
    if len(command) > COMMAND_WORDS_MAX or any("\0" in word for word in command):
        raise ValueError(f"{whose}: command has over {COMMAND_WORDS_MAX} words, or a NUL in one")


class WorkflowManifest(Model, frozen=True, tag_field="kind", tag="Workflow"):
    """`kind: Workflow`."""

    metadata: Metadata
    spec: WorkflowSpec
    api_version: Literal["dayfly.dev/v1"] = API_VERSION


class TaskManifest(Model, frozen=True, tag_field="kind", tag="Task"):
    """`kind: Task`."""

    metadata: Metadata
    spec: TaskSpec
    api_version: Literal["dayfly.dev/v1"] = API_VERSION


def plain(declared: Struct) -> dict[str, Any]:
    """A declaration as it is best written: JSON values, what is left to its default left out.

    Two declarations that mean the same are the same here; reading it gives the declaration.
    """
    found = {}
    for field in msgspec.structs.fields(declared):
        value = getattr(declared, field.name)
        default = field.default
        if field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        if value is UNSET or (value == default and not field.required):
            continue
        found[field.encode_name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Struct):
        return plain(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
