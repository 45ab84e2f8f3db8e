"""What is declared and what is passed around: manifests, invocations, outcomes.

Manifests are Kubernetes-shaped (`apiVersion`, `kind`, `metadata`, `spec`, camelCase fields); the
same file works with `dayfly apply -f` and, in a cluster, `kubectl apply -f`.
"""

import math
import re
from typing import Annotated, Any, Final, Literal, NewType
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from dayfly_pool import brokers
from dayfly_pool.declared import Model, Name, Seconds, given

API_VERSION: Final = "dayfly.dev/v1"
BASE: Final = "base"
"""The environment that every server has: the standard library only."""

FunctionId = NewType("FunctionId", str)  # "namespace/name"
SandboxId = NewType("SandboxId", str)
InvocationId = NewType("InvocationId", str)

Digest = Annotated[str, Meta(pattern=r"^([0-9a-f]{64})?\Z")]
Network = Literal["none", "host"]
Isolation = Literal["fork", "exec"]
Initialize = Literal["auto", "once", "each"]
ENV_BYTES_MAX: Final = 32 * 1024
FILES_MAX: Final = 100
FILES_BYTES_MAX: Final = 128 * 1024
"""Of the files in one manifest: `kubectl apply` keeps a copy of it in 256 KiB of annotations."""

TRIGGER_DATA_BYTES_MAX: Final = 64 * 1024
DESTINATIONS: Final = (
    "function",
    "url",
    "nats",
    "redis",
    "rabbitmq",
    "kafka",
    "mqtt",
    "sqs",
)
SOURCES: Final = (
    "cron",
    "nats",
    "redis",
    "rabbitmq",
    "kafka",
    "mqtt",
    "sqs",
    "postgres",
    "folder",
    "webhook",
    "events",
)
_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


Image = Annotated[str, Meta(pattern=r"^([a-zA-Z0-9][^\s\x00-\x1f]*)?\Z", max_length=1024)]
Words = tuple[Annotated[str, Meta(max_length=128 * 1024)], ...]
WORDS_MAX: Final = 1000
"""Of a command, and of its arguments."""


Resource = Annotated[
    str, Meta(pattern=r"^[a-z0-9][-a-z0-9.]{0,252}/[A-Za-z0-9][-A-Za-z0-9_.]{0,62}\Z")
]


class Limits(Model, frozen=True):
    """What one sandbox of a function may use at most.

    *resources* are what else the pod of an image is given, as `nvidia.com/gpu: 1`.
    """

    memory_mb: Annotated[int, Meta(ge=16, le=1 << 20)] = 256
    cpu: Annotated[float, Meta(gt=0, le=256)] = 1.0
    processes: Annotated[int, Meta(ge=2, le=32768)] = 64
    open_files: Annotated[int, Meta(ge=32, le=65536)] = 256
    tmp_mb: Annotated[int, Meta(ge=1, le=1 << 20)] = 64
    resources: dict[Resource, Annotated[int, Meta(ge=1, le=1024)]] = {}


class Route(Model, frozen=True):
    """A way in over HTTP besides `/fn/NAME`.

    `{name}` in *path* matches one segment, `{name+}` the rest. It does not begin with
    `/invocations`, `/events` or `/hooks`: there the server itself answers.
    """

    path: Annotated[str, Meta(pattern=r"^/", max_length=1024)]
    host: Annotated[str, Meta(max_length=253)] = ""
    methods: Annotated[
        tuple[Annotated[str, Meta(pattern=r"^[A-Z]{1,16}\Z")], ...], Meta(max_length=16)
    ] = ()


class Retry(Model, frozen=True):
    """How often, how soon and for how long an event is tried.

    Between attempt n and the next passes a random time of at most *backoff_seconds* times 2 to the
    power of n - 1, and at most *backoff_max_seconds* (full jitter).
    """

    attempts: Annotated[int, Meta(ge=1, le=100)] = 3
    backoff_seconds: Seconds = 1.0
    backoff_max_seconds: Seconds = 300.0
    max_age_seconds: Annotated[float, Meta(gt=0, le=14 * 86400)] = 6 * 3600.0


class Destination(Model, frozen=True):
    """Where it is told what became of an event: one of these.

    *function* is another of the same namespace. To *url* it is posted, signed as Standard Webhooks
    has it with *secret*, if one is named. The others are topics of brokers.
    """

    function: Name | None = None
    url: Annotated[str, Meta(min_length=1, max_length=2048)] | None = None
    secret: Name | None = None
    nats: brokers.NatsTopic | None = None
    redis: brokers.RedisTopic | None = None
    rabbitmq: brokers.RabbitMqTopic | None = None
    kafka: brokers.KafkaTopic | None = None
    mqtt: brokers.MqttTopic | None = None
    sqs: brokers.SqsTopic | None = None

    def __post_init__(self) -> None:
        if len(given(self, DESTINATIONS)) != 1:
            raise ValueError(f"one destination is needed: one of {', '.join(DESTINATIONS)}")
        if self.url is not None:
            brokers.check_url(self.url, "https", "http")
        elif self.secret is not None:
            raise ValueError("secret is for url; a broker's is named with the broker")

    @property
    def kind(self) -> str:
        """Which of them it is."""
        return given(self, DESTINATIONS)[0]

    @property
    def is_outside(self) -> bool:
        """Whether it is no function of ours."""
        return self.function is None


def check_env(env: dict[str, str]) -> None:
    """Raise ValueError for variables that no process can be given, or too many of them."""
    wrong = [name for name in env if not _ENV_NAME.match(name)]
    if wrong:
        raise ValueError(f"env name {wrong[0]!r} is not letters, digits and underscores")
    if any("\0" in value for value in env.values()):
        raise ValueError("an env value holds a NUL character")
    if sum(len(k) + len(v.encode()) for k, v in env.items()) > ENV_BYTES_MAX:
        raise ValueError(f"env is over {ENV_BYTES_MAX} bytes")


class Code(Model, frozen=True, kw_only=True):
    """Where code comes from: one of these.

    *package* is the digest of one that was uploaded, or that *package_url* has. *files* are in the
    manifest itself: contents by path. *source* is on the disk of whoever applies it: only the CLI
    can read it.
    """

    package: Digest = ""
    package_url: Annotated[str, Meta(max_length=4096)] = ""
    files: dict[Annotated[str, Meta(min_length=1, max_length=1024)], str] = {}
    source: str | None = None

    def __post_init__(self) -> None:
        if self.files and (self.package or self.package_url or self.source):
            raise ValueError("files are the package: leave package, packageUrl and source out")
        if self.package_url:
            _check_package_url(self.package_url, self.package)
        if len(self.files) > FILES_MAX:
            raise ValueError(f"more than {FILES_MAX} files: upload a package")
        if sum(len(k.encode()) + len(v.encode()) for k, v in self.files.items()) > FILES_BYTES_MAX:
            raise ValueError(f"files are over {FILES_BYTES_MAX >> 10} KiB: upload a package")

    @property
    def has_own(self) -> bool:
        """Whether it says at all where code comes from."""
        return bool(self.package or self.package_url or self.files or self.source)


def _check_package_url(url: str, digest: str) -> None:
    parts = urlsplit(url)  # ValueError for what is none
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise ValueError(f"packageUrl {url[:80]!r} is not like https://HOST/PATH")
    if parts.username is not None or parts.password is not None:
        raise ValueError("packageUrl holds a login: sign the address, or upload the package")
    if not digest:
        raise ValueError("packageUrl needs package, the sha256 of what is there")


def check_image(code: Code, environment: str, command: Words, args: Words) -> None:
    """Raise ValueError for what an image has itself."""
    if code.has_own or environment != BASE:
        raise ValueError("code and environment are in the image: leave them out")
    if max(len(command), len(args)) > WORDS_MAX:
        raise ValueError(f"command and args have at most {WORDS_MAX} words each")
    if any("\0" in word for word in (*command, *args)):
        raise ValueError("a word of command or args holds a NUL character")


class FunctionSpec(Code, frozen=True, kw_only=True):
    """What a user declares of a function: code with a *handler*, or an *image*.

    The image's own program, or *command* and *args*, answers HTTP on *port*, which is also in
    `$PORT`, at the latest *startup_seconds* after it was started.
    """

    handler: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    image: Image = ""
    command: Words = ()
    args: Words = ()
    port: Annotated[int, Meta(ge=1, le=65535)] = 8080
    startup_seconds: Seconds = 60.0
    environment: Annotated[str, Meta(max_length=64)] = BASE
    env: dict[str, str] = {}
    timeout_seconds: Seconds = 30.0
    min_scale: Annotated[int, Meta(ge=0, le=10000)] = 0
    max_scale: Annotated[int, Meta(ge=1, le=10000)] = 100
    concurrency: Annotated[int, Meta(ge=1, le=1000)] = 1
    keep_alive_seconds: Annotated[float, Meta(ge=0, le=86400)] = 60.0
    queue_max: Annotated[int, Meta(ge=1, le=1_000_000)] = 1000
    network: Network = "none"
    isolation: Isolation = "fork"
    initialize: Initialize = "auto"
    limits: Limits = Limits()
    retry: Retry = Retry()
    on_success: Destination | None = None
    on_failure: Destination | None = None
    routes: tuple[Route, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.handler) == bool(self.image):
            raise ValueError("one of handler and image is needed")
        if self.image:
            check_image(self, self.environment, self.command, self.args)
            if self.isolation != "fork" or self.initialize != "auto":
                raise ValueError("isolation and initialize are for handlers, not for images")
        elif self.command or self.args or self.limits.resources:
            raise ValueError("command, args and limits.resources go with image")
        if self.min_scale > self.max_scale:
            raise ValueError("minScale is over maxScale")
        if len(self.routes) > 100:
            raise ValueError("more than 100 routes")
        if not all(map(math.isfinite, (self.timeout_seconds, self.keep_alive_seconds))):
            raise ValueError("seconds must be finite")
        check_env(self.env)


class EnvironmentSpec(Model, frozen=True):
    """An interpreter plus libraries: *requirements* in pip's format, *preload* imported early.

    Where sandboxes are pods, *image* has the libraries, if it is given: the requirements are what
    is installed elsewhere.
    """

    requirements: Annotated[str, Meta(max_length=256 * 1024)] = ""
    image: Annotated[str, Meta(pattern=r"^([A-Za-z0-9][\w./:@-]*)?\Z", max_length=512)] = ""
    preload: tuple[Annotated[str, Meta(pattern=r"^[A-Za-z_][\w.]*\Z", max_length=128)], ...] = ()
    generic_min: Annotated[int, Meta(ge=0, le=1000)] = 1


class Metadata(Model, frozen=True):
    """A declared thing's name, in a namespace (a tenant)."""

    name: Name
    namespace: Name = "default"
    labels: dict[str, str] = {}


class FunctionManifest(Model, frozen=True, tag_field="kind", tag="Function"):
    """`kind: Function`."""

    metadata: Metadata
    spec: FunctionSpec
    api_version: Literal["dayfly.dev/v1"] = API_VERSION


class EnvironmentManifest(Model, frozen=True, tag_field="kind", tag="Environment"):
    """`kind: Environment`."""

    metadata: Metadata
    spec: EnvironmentSpec
    api_version: Literal["dayfly.dev/v1"] = API_VERSION


class Cron(Model, frozen=True):
    """When: five fields as in crontab(5), or six with seconds first, in *time_zone* (IANA).

    Daylight saving time as Debian's cron has it: what would be skipped runs an hour later, what
    would be doubled runs once. *overlap* says whether to fire while the last firing still waits or
    runs; *catch_up* what to do about firings that were missed while no server was up.
    """

    schedule: Annotated[str, Meta(min_length=1, max_length=256)]
    time_zone: Annotated[str, Meta(max_length=64)] = "UTC"
    overlap: Literal["allow", "skip"] = "allow"
    catch_up: Literal["none", "last", "all"] = "last"


class Batch(Model, frozen=True):
    """Up to *size* events in one, which waits for them no longer than *window_seconds*."""

    size: Annotated[int, Meta(ge=1, le=1000)] = 100
    window_seconds: Annotated[float, Meta(ge=0, le=300)] = 1.0


class TriggerSpec(Model, frozen=True):
    """What makes events for *function*, of the same namespace: one of the sources.

    *filter* is an expression in CEL over the CloudEvent (`event.type == "order"`); what does not
    match is done with. With *ordered*, one event at a time of those that the source keeps in order.
    *data* is what a schedule's events say. Of a function's waiting events those of higher
    *priority* run first.
    """

    function: Name
    cron: Cron | None = None
    nats: brokers.NatsSource | None = None
    redis: brokers.RedisSource | None = None
    rabbitmq: brokers.RabbitMqSource | None = None
    kafka: brokers.KafkaSource | None = None
    mqtt: brokers.MqttSource | None = None
    sqs: brokers.SqsSource | None = None
    postgres: brokers.PostgresSource | None = None
    folder: brokers.FolderSource | None = None
    webhook: brokers.WebhookSource | None = None
    events: brokers.EventsSource | None = None
    filter: Annotated[str, Meta(max_length=4096)] = ""
    batch: Batch | None = None
    ordered: bool = False
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    data: Any = None
    paused: bool = False

    def __post_init__(self) -> None:
        named = given(self, SOURCES)
        if len(named) != 1:
            what = f"{' and '.join(named)} are" if named else "none is"
            raise ValueError(f"one source is needed, {what} given: one of {', '.join(SOURCES)}")
        if len(msgspec.json.encode(self.data)) > TRIGGER_DATA_BYTES_MAX:
            raise ValueError(f"data is over {TRIGGER_DATA_BYTES_MAX} bytes")
        is_asked = named[0] not in ("cron", "webhook", "events")
        if not is_asked and (self.batch or self.ordered):
            raise ValueError(f"batch and ordered are not for {named[0]}")
        if named[0] == "cron" and self.filter:
            raise ValueError("filter is not for cron")
        if named[0] != "cron" and self.data is not None:
            raise ValueError("data is for cron")

    @property
    def source(self) -> str:
        """Which of the sources it has."""
        return given(self, SOURCES)[0]


class TriggerManifest(Model, frozen=True, tag_field="kind", tag="Trigger"):
    """`kind: Trigger`."""

    metadata: Metadata
    spec: TriggerSpec
    api_version: Literal["dayfly.dev/v1"] = API_VERSION


Manifest = FunctionManifest | EnvironmentManifest | TriggerManifest


class Parcel(Model, frozen=True):
    """An environment's libraries as one zip, for sandboxes that must be sent them.

    *digest* is the file's; it and all that is in it take *room_bytes*.
    """

    path: str
    digest: str
    room_bytes: int


class Container(Model, frozen=True):
    """What a pod of the user's own image runs. With a *port* it serves HTTP there, at the latest
    *startup_seconds* after its start; with 0 it runs to its end."""

    image: str
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    port: int = 0
    startup_seconds: float = 60.0
    resources: dict[str, int] = {}


class Environment(Model, frozen=True):
    """A built environment. *path* holds its libraries, empty for `base`.

    *early* says that its modules are imported before the lock-down (the operator's own code).
    """

    digest: str
    path: str = ""
    preload: tuple[str, ...] = ()
    early: bool = True
    generic_min: int = 0
    image: str = ""
    """What its pods run, where sandboxes are pods; empty: the runtime's, and they are sent it."""

    parcel: Parcel | None = None

    container: Container | None = None
    """In place of all that: one function's own."""


class Mold(Struct, frozen=True):
    """What a generic sandbox is made of; only functions of the same mold can be loaded into it.

    With a *namespace* its sandboxes may be forked from one another's zygote, and are that tenant's
    alone; without, each is started by itself and becomes a tenant's with its first function.
    With a *function* (`namespace/name@version`) they are forked after its import. With *steps*
    the stores of artifacts and workspaces are in reach until the lock-down, and of no others.
    Those for *batch* have what everything else on the machine leaves, from their first moment on.
    *memory_mb* is their size, where it cannot be changed later. With a *container*
    (`namespace/name@version`) they are pods of that function's own image, made when it needs one.
    """

    environment: str
    network: Network = "none"
    namespace: str = ""
    function: str = ""
    steps: bool = False
    batch: bool = False
    memory_mb: int = 0
    container: str = ""

    def __str__(self) -> str:
        whose = self.container or self.function or self.namespace or "*"
        kind = "/steps" * self.steps + "/batch" * self.batch
        kind += f"/{self.memory_mb}Mi" if self.memory_mb else ""
        return f"{self.environment[:12]}/{self.network}/{whose}{kind}"


class Mounts(Struct, frozen=True):
    """The folders that a step finds. All of it is ours, none of it the user's, but for names.

    *step* is the name of its folders in `steps.Steps`, whose `out` is at `/out`. *inputs* are
    (name, place in the store of artifacts): read-only at `/in/NAME`, of several at `/in/NAME/0` and
    so on. *workspaces* are (name, what `workspaces.overlay` says), at `/workspaces/NAME`; each of
    *branches* is (NAME/0, what `workspaces.read_only` says), at `/workspaces/NAME.branches/0`. A
    file that the step writes has at most *file_bytes_max* bytes; 0: as many as there is room for.
    """

    step: str
    inputs: tuple[tuple[str, str], ...] = ()
    workspaces: tuple[tuple[str, str], ...] = ()
    file_bytes_max: int = 0
    branches: tuple[tuple[str, str], ...] = ()


class Function(Struct, frozen=True):
    """One deployed version of a function, as the pool uses it."""

    id: FunctionId
    version: str
    spec: FunctionSpec
    mold: Mold
    is_batch: bool = False
    """Whether it is to have what others leave: nobody waits for any one of its invocations."""

    mounts: Mounts | None = None
    """Of a function that is one attempt of one step; its mold has *steps* then."""

    @property
    def namespace(self) -> str:
        """The tenant that it belongs to."""
        return self.id.partition("/")[0]

    @property
    def name(self) -> str:
        """Its name within the namespace."""
        return self.id.partition("/")[2]


def function_id(namespace: str, name: str) -> FunctionId:
    """The id of a function by its full name."""
    return FunctionId(f"{namespace}/{name}")


class Invocation(Struct, frozen=True):
    """One event for one function. *http* is the request's meta map, None for a direct invoke."""

    id: InvocationId
    function: FunctionId
    body: bytes
    http: dict[str, Any] | None = None
    trace: str = ""
    queue_s_max: float = 30.0
    env: dict[str, str] | None = None
    """Variables for this one."""

    timeout_s: float | None = None
    """Less than the function's."""


class Timing(Struct):
    """Where an invocation's time went, in seconds; None for what did not happen."""

    start: Literal["warm", "generic", "forked", "created"] = "warm"
    queue_s: float = 0.0
    create_s: float | None = None
    specialize_s: float | None = None
    handler_s: float = 0.0


class Success(Struct, frozen=True):
    """The handler returned. *status* and *headers* are set for HTTP; *body* is raw."""

    body: bytes
    timing: Timing
    status: int = 0
    headers: list[list[str]] = []


CANNOT_RUN: Final = "CannotRun"
"""The kind of a failure of a command that is not there, or no program: it never will be."""


class Failure(Struct, frozen=True):
    """User code failed. Data, not an exception of ours.

    *kind*: Raised, Exited, CannotRun, BadResponse, TimedOut, OutOfMemory, Crashed,
    ProtocolViolation while running; HandlerMissing, SyntaxError, ImportFailed, InitTimedOut,
    InitCrashed while loading.
    """

    kind: str
    message: str
    traceback: str = ""
    timing: Timing = msgspec.field(default_factory=Timing)
    was_killed: bool = False
    """With SIGKILL, and not for want of memory: that may have been somebody else's doing."""

    exit_code: int | None = None
    """Of a command, or of `sys.exit`."""


Outcome = Success | Failure


class LogLine(Struct, frozen=True):
    """One line that user code wrote, or that the platform says about an invocation."""

    time: float
    function: FunctionId
    sandbox: str
    invocation: str
    stream: Literal["stdout", "stderr", "platform"]
    text: str
