"""Where events come from and where they are told: what users declare of brokers, data only.

A *secret* is the name of one that the server keeps (`dayfly secret put NAME`): addresses hold no
passwords. Where it is a login, its text is `user:password`.
"""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from msgspec import Meta

from dayfly_pool.declared import Model, Name, Seconds

Text = Annotated[str, Meta(min_length=1, max_length=1024)]
Word = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,249}\Z")]
MaybeWord = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{0,249}\Z")]


def check_url(url: str, *schemes: str) -> None:
    """Raises ValueError unless each address of *url* (by commas) is as it should be."""
    for each in url.split(","):
        parts = urlsplit(each)  # ValueError for what is none
        if parts.scheme not in schemes or not parts.hostname:
            raise ValueError(f"url {each!r} is not like {schemes[0]}://HOST:PORT")
        if parts.username is not None or parts.password is not None:
            raise ValueError("url holds a login: keep it with `dayfly secret put`, and name that")


def _check_one(url: str, *schemes: str) -> None:
    """The same for a single address."""
    if "," in url:
        raise ValueError(f"url {url!r} is more than one address")
    check_url(url, *schemes)


class _Nats(Model, frozen=True, kw_only=True):
    url: Text = "nats://127.0.0.1:4222"
    secret: Name | None = None
    """A login, or a token."""

    def __post_init__(self) -> None:
        check_url(self.url, "nats", "tls", "ws", "wss")


class NatsSource(_Nats, frozen=True, kw_only=True):
    """A consumer of a JetStream stream: the one that has *subject*, if *stream* does not say.

    The *consumer* is durable, and made when it is not there: `dayfly-NAMESPACE_TRIGGER`.
    """

    subject: Text
    stream: MaybeWord = ""
    consumer: MaybeWord = ""


class NatsTopic(_Nats, frozen=True, kw_only=True):
    """A subject that a JetStream stream has."""

    subject: Text


class _Redis(Model, frozen=True, kw_only=True):
    url: Text = "redis://127.0.0.1:6379/0"
    stream: Text
    secret: Name | None = None
    """A login, or a password."""

    field: Text = "body"
    """Which field of an entry is the event; the others are its headers."""

    def __post_init__(self) -> None:
        _check_one(self.url, "redis", "rediss")


class RedisSource(_Redis, frozen=True, kw_only=True):
    """A consumer group of a stream in Redis 7 or Valkey, made when it is not there.

    The group is `dayfly-NAMESPACE_TRIGGER` if *group* does not say. A new one begins where *start*
    says. An entry without *field* is an event of all its fields, in JSON. What a consumer of the
    group that is not ours has held for longer than a lease is taken over. Entries stay in the
    stream when they are done with: whoever publishes trims it, and what is trimmed too early is
    lost.
    """

    group: MaybeWord = ""
    start: Literal["earliest", "latest"] = "earliest"


class RedisTopic(_Redis, frozen=True, kw_only=True):
    """A stream, kept to about its last *length_max* entries."""

    length_max: Annotated[int, Meta(ge=1, le=100_000_000)] = 1_000_000


class _RabbitMq(Model, frozen=True, kw_only=True):
    url: Text = "amqp://127.0.0.1:5672/"
    secret: Name | None = None

    def __post_init__(self) -> None:
        _check_one(self.url, "amqp", "amqps")


class RabbitMqSource(_RabbitMq, frozen=True, kw_only=True):
    """A queue, of quorum or classic; when it is not there, a durable quorum queue is made.

    It is bound to *exchange*, which is there, by *routing_key*, if they are given.
    """

    queue: Word
    exchange: MaybeWord = ""
    routing_key: Annotated[str, Meta(max_length=255)] = ""


class RabbitMqTopic(_RabbitMq, frozen=True, kw_only=True):
    """An exchange that is there; the default one leads to the queue that *routing_key* names."""

    exchange: MaybeWord = ""
    routing_key: Annotated[str, Meta(max_length=255)]


class _Kafka(Model, frozen=True, kw_only=True):
    servers: Text = "127.0.0.1:9092"
    """HOST:PORT of some brokers, by commas."""

    topic: Word
    tls: bool = False
    secret: Name | None = None
    login: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "PLAIN"
    """How SASL tells the secret; it is used if there is one. PLAIN needs *tls* to be hidden."""

    def __post_init__(self) -> None:
        for each in self.servers.split(","):
            if "@" in each:
                raise ValueError("servers hold a login: keep it with `dayfly secret put`")
            host, _, port = each.rpartition(":")
            if not host or not port.isdigit():
                raise ValueError(f"servers: {each!r} is not HOST:PORT")


class KafkaSource(_Kafka, frozen=True, kw_only=True):
    """A consumer group of a topic: `dayfly-NAMESPACE_TRIGGER` if *group* does not say.

    A group that has nothing committed begins where *start* says. Servers that share a group share
    the partitions of the topic.
    """

    group: MaybeWord = ""
    start: Literal["earliest", "latest"] = "earliest"


class KafkaTopic(_Kafka, frozen=True, kw_only=True):
    """A topic that is there, or that the broker makes."""


class _Mqtt(Model, frozen=True, kw_only=True):
    url: Text = "mqtt://127.0.0.1:1883"
    topic: Text
    secret: Name | None = None

    def __post_init__(self) -> None:
        check_url(self.url, "mqtt", "mqtts")


class MqttSource(_Mqtt, frozen=True, kw_only=True):
    """A subscription with QoS 1, in a session that the broker keeps: `dayfly-NAMESPACE_TRIGGER`.

    *topic* may hold `+` and `#`. One server at a time has a session. What the broker still has for
    it of a topic that was declared before is dropped.
    """

    client: MaybeWord = ""
    session_seconds: Annotated[int, Meta(ge=60, le=30 * 86400)] = 7 * 86400
    """How long the broker keeps what comes while we are not there."""


class MqttTopic(_Mqtt, frozen=True, kw_only=True):
    """A topic, published to with QoS 1."""


class _Sqs(Model, frozen=True, kw_only=True):
    queue: Text
    """The queue's URL."""

    region: Word = "us-east-1"
    endpoint: Annotated[str, Meta(max_length=1024)] = ""
    """Where it is asked; else at the host of *queue*."""

    secret: Name | None = None
    """`ACCESS_KEY:SECRET_KEY`, or those and `:SESSION_TOKEN`; else what boto finds."""

    def __post_init__(self) -> None:
        for each in filter(None, (self.queue, self.endpoint)):
            check_url(each, "https", "http")


class SqsSource(_Sqs, frozen=True, kw_only=True):
    """A queue of Amazon SQS, or of what speaks like it."""


class SqsTopic(_Sqs, frozen=True, kw_only=True):
    """A queue of Amazon SQS, or of what speaks like it; in a FIFO queue all is of one *group*."""

    group: Word = "dayfly"


class _Postgres(Model, frozen=True, kw_only=True):
    server: Text
    """As libpq has it, without a password: `host=db dbname=shop`."""

    secret: Name | None = None

    def __post_init__(self) -> None:
        if "password" in self.server or "@" in self.server:
            raise ValueError("server holds a login: keep it with `dayfly secret put`")


class PostgresSource(_Postgres, frozen=True, kw_only=True):
    """A *table* that is a queue, or a *channel* of NOTIFY; one of the two.

    The table has the columns `id` (a key), `body` (bytea, text or jsonb), and, if they are there,
    `headers` (jsonb). Rows go by `id`; each is deleted when its event is over, unless it was
    changed meanwhile, or is too long for any function: then it stays. What is notified while nobody
    listens is lost: use a table for what must not be. Names are as the database
    shows them (`orders`, also where a program says `Orders`).
    """

    table: Annotated[str, Meta(pattern=r"^([A-Za-z_][\w$]*\.)?[A-Za-z_][\w$]*\Z")] | None = None
    channel: Annotated[str, Meta(pattern=r"^[A-Za-z_][\w$]{0,62}\Z")] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.table is None) == (self.channel is None):
            raise ValueError("one of table and channel is needed")


class FolderSource(Model, frozen=True, kw_only=True):
    """Files that appear in the folder *path* or below it, on the server's machine.

    A file is taken when its path from there matches *pattern* (`*` is any text, `/` included) and
    it has not changed for *settle_seconds*; names that begin with a dot are passed over. What
    becomes of it when its event is over is *afterwards*'s to say; `move` is into `.done` beside it.
    One that is too long for any function is a dead letter, and never deleted. What is kept is given
    again by the next server, under the same id.
    """

    path: Annotated[str, Meta(pattern=r"^/", max_length=4096)]
    pattern: Annotated[str, Meta(min_length=1, max_length=255)] = "*"
    settle_seconds: Seconds = 1.0
    afterwards: Literal["keep", "move", "delete"] = "keep"


class WebhookSource(Model, frozen=True, kw_only=True):
    """Requests to `/hooks/NAMESPACE/TRIGGER`, signed with *secret* as *scheme* has it."""

    scheme: Literal["standard", "github"] = "standard"
    secret: Name


class EventsSource(Model, frozen=True, kw_only=True):
    """CloudEvents that are sent to `/events` (`/ns/NAMESPACE/events`): the filter says which."""


Source = (
    NatsSource
    | RedisSource
    | RabbitMqSource
    | KafkaSource
    | MqttSource
    | SqsSource
    | PostgresSource
    | FolderSource
)
"""What is asked for events."""

Topic = NatsTopic | RedisTopic | RabbitMqTopic | KafkaTopic | MqttTopic | SqsTopic
"""Where an event can be told."""
