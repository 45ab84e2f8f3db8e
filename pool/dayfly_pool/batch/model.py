"""What a user declares of a job: Kubernetes' Indexed Job, for tasks on the pool."""

from typing import Annotated, Any, Final, Literal

from msgspec import Meta

from dayfly_pool.batch.quota import QueueSpec
from dayfly_pool.declared import Model, Name, Seconds, given
from dayfly_pool.models import (
    API_VERSION,
    BASE,
    Code,
    Image,
    Limits,
    Metadata,
    Network,
    Words,
    check_env,
    check_image,
)

WORK: Final = ("function", "command", "script")
SIZES: Final = ("size", "indices", "items")
RULES_MAX: Final = 20
MANY: Final = 100_000
"""Of more indices than this, Kubernetes allows no more than 10,000 to fail."""

INDICES_MAX: Final = 10_000_000
FAILED_OF_MANY_MAX: Final = 10_000
BACKOFF_LIMIT: Final = 6
NO_LIMIT: Final = 2**31 - 1
ITEMS_INLINE_MAX: Final = 10_000
WEEK_S: Final = 7 * 86400.0
COMMAND_TIMEOUT_S: Final = 7200.0

Count = Annotated[int, Meta(ge=0, le=NO_LIMIT)]
Action = Literal["FailJob", "FailIndex", "Ignore", "Count"]


class ExitCodes(Model, frozen=True):
    """Whether a task's exit code is one of *values*, or none of them; success is neither."""

    operator: Literal["In", "NotIn"]
    values: Annotated[tuple[Annotated[int, Meta(ge=0, le=255)], ...], Meta(min_length=1)]

    def __post_init__(self) -> None:
        if len(set(self.values)) != len(self.values) or len(self.values) > 255:
            raise ValueError("values must be at most 255 different exit codes")
        if self.operator == "In" and 0 in self.values:
            raise ValueError("exit code 0 is no failure: leave it out of In")


class Kinds(Model, frozen=True):
    """Whether a failure's kind (`TimedOut`, `OutOfMemory`, ...) is one of *values*, or none."""

    operator: Literal["In", "NotIn"]
    values: Annotated[tuple[Annotated[str, Meta(max_length=64)], ...], Meta(min_length=1)]


class FailureRule(Model, frozen=True):
    """What to do about a failure that matches."""

    action: Action
    on_exit_codes: ExitCodes | None = None
    on_kinds: Kinds | None = None

    def __post_init__(self) -> None:
        if (self.on_exit_codes is None) == (self.on_kinds is None):
            raise ValueError("one of onExitCodes and onKinds is needed")


class FailurePolicy(Model, frozen=True):
    """The first rule that matches counts; a failure that none matches is counted."""

    rules: Annotated[tuple[FailureRule, ...], Meta(max_length=RULES_MAX)]


class SuccessRule(Model, frozen=True):
    """Enough has succeeded: all of *succeededIndexes*, or so many (of them, if both are given)."""

    succeeded_indexes: Annotated[str, Meta(max_length=64 * 1024)] | None = None
    succeeded_count: Annotated[int, Meta(ge=1, le=INDICES_MAX)] | None = None

    def __post_init__(self) -> None:
        if self.succeeded_indexes is None and self.succeeded_count is None:
            raise ValueError("one of succeededIndexes and succeededCount is needed")


class SuccessPolicy(Model, frozen=True):
    """The job is complete as soon as one rule says so; what still runs is stopped."""

    rules: Annotated[tuple[SuccessRule, ...], Meta(min_length=1, max_length=RULES_MAX)]


class Resources(Model, frozen=True):
    """What one task is given of its queue's quota."""

    cpu: Annotated[float, Meta(ge=0, le=1024)] = 0.0
    memory_mb: Annotated[int, Meta(ge=0, le=1 << 24)] = 0
    gpu: Annotated[int, Meta(ge=0, le=1024)] = 0


class JobSpec(Code, frozen=True, kw_only=True):
    """One job: what each task does, how many there are, and when that is enough.

    A task is a deployed *function*, or a *command* or *script* (`#!` is honoured, else
    `/bin/sh -e`) in the folder of the job's own *package*; or an *image*, whose program is its own
    or *command* with *args*. There is one for each index: *size* of
    them from 0, those of *indices* (`1,3,6-9`), or one for each of *items*, which is its event.
    Without *parallelism* as many run at once as there are processors.
    """

    function: Name | None = None
    command: Annotated[tuple[str, ...], Meta(min_length=1, max_length=1000)] | None = None
    script: Annotated[str, Meta(min_length=1, max_length=256 * 1024)] | None = None
    image: Image = ""
    args: Words = ()
    environment: Annotated[str, Meta(max_length=64)] = BASE
    env: dict[str, str] = {}
    network: Network = "none"
    limits: Limits = Limits()
    size: Annotated[int, Meta(ge=1, le=INDICES_MAX)] | None = None
    indices: Annotated[str, Meta(min_length=1, max_length=1 << 20)] | None = None
    items: Annotated[tuple[Any, ...], Meta(max_length=ITEMS_INLINE_MAX)] | None = None
    parallelism: Annotated[int, Meta(ge=1, le=MANY)] | None = None
    timeout_seconds: Seconds | None = None
    active_deadline_seconds: Annotated[float, Meta(gt=0, le=WEEK_S * 52)] | None = None
    backoff_limit: Count | None = None
    backoff_limit_per_index: Count | None = None
    backoff_seconds: Annotated[float, Meta(ge=0, le=3600)] = 1.0
    max_failed_indexes: Count | None = None
    failure_policy: FailurePolicy | None = None
    success_policy: SuccessPolicy | None = None
    suspend: bool = False
    ttl_seconds_after_finished: Annotated[float, Meta(ge=0, le=WEEK_S * 520)] = WEEK_S
    queue: Name | None = None
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    min_count: Annotated[int, Meta(ge=1, le=MANY)] = 1
    resources: Resources = Resources()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image:
            if given(self, ("function", "script")):
                raise ValueError("with image there is no function and no script")
            check_image(self, self.environment, self.command or (), self.args)
        elif len(given(self, WORK)) != 1:
            raise ValueError(f"one of {', '.join(WORK)}, or image, is needed")
        elif self.args or self.limits.resources:
            raise ValueError("args and limits.resources go with image")
        if len(given(self, SIZES)) > 1:
            raise ValueError(f"only one of {', '.join(SIZES)} can be given")
        if self.function is not None and (self.has_own or self.env):
            raise ValueError("code and env are the function's own: deploy it with them")
        check_env(self.env)
        per_index = self.backoff_limit_per_index is not None
        if self.max_failed_indexes is not None and not per_index:
            raise ValueError("maxFailedIndexes goes with backoffLimitPerIndex")
        rules = self.failure_policy.rules if self.failure_policy is not None else ()
        if any(rule.action == "FailIndex" for rule in rules) and not per_index:
            raise ValueError("FailIndex goes with backoffLimitPerIndex")

    @property
    def kind(self) -> str:
        """Which of function, command, script and image its tasks are."""
        return "image" if self.image else given(self, WORK)[0]

    @property
    def failures_max(self) -> int:
        """How many failures the job as a whole may have."""
        if self.backoff_limit is not None:
            return self.backoff_limit
        return BACKOFF_LIMIT if self.backoff_limit_per_index is None else NO_LIMIT


class QueueManifest(Model, frozen=True, tag_field="kind", tag="Queue"):
    """`kind: Queue`."""

    metadata: Metadata
    spec: QueueSpec
    api_version: Literal["dayfly.dev/v1"] = API_VERSION


class JobManifest(Model, frozen=True, tag_field="kind", tag="Job"):
    """`kind: Job`."""

    metadata: Metadata
    spec: JobSpec
    api_version: Literal["dayfly.dev/v1"] = API_VERSION
