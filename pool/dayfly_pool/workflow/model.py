"""What a workflow is: steps, what they take from one another, and when they run. Data only.

Both faces, the SDK in `dayfly` and YAML, make this. A value may hold references: `$(params.NAME)`,
`$(steps.NAME.results.RESULT)`, `$(steps.NAME.outputs.OUTPUT)`; one that is the whole string stands
for the value with its type, one among other text for its text.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta

from dayfly_pool.declared import Model, Name
from dayfly_pool.models import API_VERSION, Metadata, Network

ParamType = Literal["string", "integer", "number", "boolean", "array", "object"]
Word = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_-]{0,62}\Z")]
"""What parameters, results, outputs and workspaces are called."""

Duration = Annotated[str, Meta(max_length=32)] | float
"""Seconds, or text like `90s`, `15m`, `1h30m`."""


class Param(Model, frozen=True):
    """A parameter that is asked for; without a *default* it must be given."""

    name: Word
    type: ParamType = "string"
    default: Any = None
    is_required: bool = True  # set by validation: no default was written
    enum: tuple[Any, ...] = ()
    description: str = ""


class Declared(Model, frozen=True):
    """A result of a task, with its type."""

    name: Word
    type: ParamType = "string"
    description: str = ""


class Output(Model, frozen=True):
    """A file or folder that a step leaves under `/out`: an artifact. A *stream* is written once."""

    name: Word
    path: str = ""  # below /out; the name if empty
    stream: bool = False
    is_build: bool = False  # subject of the provenance


class Condition(Model, frozen=True):
    """A guard: Tekton's three words, or an expression in CEL over `params` and `steps`."""

    input: Any = None
    operator: Literal["in", "notin"] | None = None
    values: tuple[Any, ...] | str = ()
    cel: Annotated[str, Meta(max_length=4096)] = ""


class Matrix(Model, frozen=True):
    """One run of the step for each combination of *params*; *include* adds to them."""

    params: dict[Word, Any] = {}
    include: tuple[dict[Word, Any], ...] = ()
    parallelism: Annotated[int, Meta(ge=0, le=100_000)] = 0  # 0: as the pool has room


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


class Step(Model, frozen=True):
    """One unit: a handler of the workflow's own package, a deployed function, a script, a command,
    a Task, another Workflow, or a wait; exactly one of them.
    """

    name: Name
    handler: Annotated[str, Meta(max_length=256)] | None = None
    function: Name | None = None
    script: Annotated[str, Meta(max_length=1 << 20)] | None = None
    command: tuple[str, ...] | None = None
    task: Name | None = None
    workflow: Name | None = None
    wait: Wait | None = None
    params: dict[Word, Any] = {}
    inputs: dict[Word, Any] = {}  # artifacts, mounted at /in/NAME
    outputs: tuple[Output, ...] = ()
    results: tuple[Declared, ...] = ()
    workspaces: dict[Word, str] = {}  # the step's name for it: the workflow's
    run_after: tuple[Name, ...] = ()
    when: tuple[Condition, ...] = ()
    matrix: Matrix | None = None
    retries: int | Retries = 0
    timeout: Duration | None = None
    on_error: Literal["stopAndFail", "continue"] = "stopAndFail"
    environment: Annotated[str, Meta(max_length=64)] | None = None
    env: dict[str, str] = {}
    network: Network | None = None
    cache: bool = False
    merge: Literal["fail", "ordered"] | None = None  # how branches of its workspaces are joined


class Timeouts(Model, frozen=True):
    """Of the whole run, of its steps, and of what runs finally."""

    workflow: Duration = 86400.0
    steps: Duration | None = None
    finally_: Duration | None = None


class WorkflowSpec(Model, frozen=True, rename={"finally_": "finally"}):
    """Steps and what they have in common. *package* holds handlers' code, as of a function."""

    steps: tuple[Step, ...]
    finally_: tuple[Step, ...] = ()
    params: tuple[Param, ...] = ()
    workspaces: tuple[Word, ...] = ()
    results: dict[Word, Any] = {}
    timeouts: Timeouts = Timeouts()
    package: str = ""
    source: str | None = None
    environment: Annotated[str, Meta(max_length=64)] = "base"


class TaskSpec(Model, frozen=True):
    """A step that workflows share: what it takes, what it leaves, how it is done."""

    params: tuple[Param, ...] = ()
    results: tuple[Declared, ...] = ()
    inputs: tuple[Word, ...] = ()
    outputs: tuple[Output, ...] = ()
    workspaces: tuple[Word, ...] = ()
    handler: Annotated[str, Meta(max_length=256)] | None = None
    function: Name | None = None
    script: Annotated[str, Meta(max_length=1 << 20)] | None = None
    command: tuple[str, ...] | None = None
    environment: Annotated[str, Meta(max_length=64)] = "base"
    env: dict[str, str] = {}
    network: Network = "none"
    cache: bool = False
    package: str = ""
    source: str | None = None


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
