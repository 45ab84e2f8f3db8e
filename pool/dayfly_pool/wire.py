"""The wire between gateway and pool: messages, in the frames of `dayfly.protocol`. No I/O.

The meta is a msgpack array with exactly the fields of its message; the number in the header is the
call's, counted up by the gateway on each connection, 0 outside any call. Both ends are ours, and
neither believes what the other sends before it has looked. See docs/protocol.md.
"""

from collections.abc import Iterable
from typing import Annotated, Any, Final, TypeVar

import msgpack
import msgspec
from msgspec import Meta, Raw, Struct

from dayfly.protocol import (
    BODY_BYTES_MAX,
    HEADER,
    META_BYTES_MAX,
    Frame,
    FrameReader,
    ProtocolError,
)
from dayfly_pool import errors
from dayfly_pool.errors import PlatformError, ShardFailed
from dayfly_pool.models import (
    Failure,
    FunctionId,
    Invocation,
    InvocationId,
    Outcome,
    Route,
    Success,
    Timing,
)

WIRE: Final = 1
"""The number of this protocol. Who hears another one hangs up."""

PART_BYTES: Final = 256 * 1024
"""What is listed and would make a frame longer goes on in the next one."""

_Id = Annotated[str, Meta(max_length=256)]
_Name = Annotated[str, Meta(max_length=253)]
_Seconds = Annotated[float, Meta(ge=0, le=1e7)]
_Headers = list[Annotated[list[str], Meta(min_length=2, max_length=2)]]


class _Message(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What all messages are: an array of exactly their fields."""


class Hello(_Message, frozen=True):
    """Both ways, first: who speaks. The gateway waits for at most *queue_s_max* of the shard's."""

    wire: int
    name: _Name
    queue_s_max: _Seconds = 0.0


class Beat(_Message, frozen=True):
    """Both ways, twice a second: I am here."""


class Invoke(_Message, frozen=True):
    """Gateway to pool: run this. The body is the invocation's."""

    id: _Id
    function: _Id
    http: dict[str, Any] | None
    trace: str
    queue_s_max: _Seconds
    env: dict[str, str] | None
    timeout_s: _Seconds | None


class Accept(_Message, frozen=True):
    """Gateway to pool: keep this and run it later. *key* is as for `Events.accept`."""

    id: _Id
    function: _Id
    http: dict[str, Any] | None
    trace: str
    key: tuple[str, str] | None


class Cancel(_Message, frozen=True):
    """Gateway to pool: nobody waits for this call any more."""


class Watch(_Message, frozen=True):
    """Gateway to pool: tell me which functions there are, and go on telling."""


class Left(_Message, frozen=True):
    """Gateway to pool, after `Draining`: no further call comes on this connection."""


class Succeeded(_Message, frozen=True):
    """Pool to gateway: a `Success`. The body is its body."""

    status: int
    headers: _Headers
    timing: Timing


class Failed(_Message, frozen=True):
    """Pool to gateway: a `Failure`. The body is its message and its traceback."""

    kind: str
    timing: Timing
    was_killed: bool
    exit_code: int | None


class Refused(_Message, frozen=True):
    """Pool to gateway: a `PlatformError` of this name. The body is its detail and its fields."""

    error: Annotated[str, Meta(max_length=128)]


class Accepted(_Message, frozen=True):
    """Pool to gateway: it is on the disk; as `store.events.Accepted`."""

    id: _Id
    is_new: bool
    is_other: bool


class Functions(_Message, frozen=True):
    """Pool to gateway: the body lists functions, and those that are gone.

    *is_anew* begins the whole list, else it is part of that list or of a change; *is_last* ends it.
    """

    is_anew: bool
    is_last: bool


class Draining(_Message, frozen=True):
    """Pool to gateway: send me no further call. What comes before `Left` is answered."""


class Listed(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a gateway knows of a function, last *updated* when. *places* run at once in a shard."""

    id: _Id
    places: int
    updated: float = 0.0
    routes: tuple[Route, ...] = ()


class Part(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The body of `Functions`."""

    listed: list[Listed] = []
    gone: list[_Id] = []


Message = (
    Hello | Beat | Invoke | Accept | Cancel | Watch | Left
    | Succeeded | Failed | Refused | Accepted | Functions | Draining
)  # fmt: skip
KINDS: Final[dict[int, type[Message]]] = {
    1: Hello,
    2: Beat,
    3: Invoke,
    4: Accept,
    5: Cancel,
    6: Watch,
    7: Left,
    33: Succeeded,
    34: Failed,
    35: Refused,
    36: Accepted,
    37: Functions,
    38: Draining,
}
_NUMBERS: Final = {message: number for number, message in KINDS.items()}
_DECODERS: Final = {number: msgspec.msgpack.Decoder(kind) for number, kind in KINDS.items()}
_ENCODER: Final = msgspec.msgpack.Encoder()
_REPLACING: Final = msgpack.Packer(unicode_errors="replace")
_BAD = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
T = TypeVar("T")


def reader() -> FrameReader:
    """What cuts this wire's bytes into frames."""
    return FrameReader(KINDS)


def encode(message: Message, call: int = 0, body: bytes = b"") -> bytes:
    """One frame, ready to send. Raises `ProtocolError` when it would break a limit."""
    meta = pack(message)
    if len(meta) > META_BYTES_MAX:
        raise ProtocolError(f"meta of {len(meta)} bytes, limit {META_BYTES_MAX}")
    if len(body) > BODY_BYTES_MAX:
        raise ProtocolError(f"body of {len(body)} bytes, limit {BODY_BYTES_MAX}")
    head = HEADER.pack(len(meta) + len(body), _NUMBERS[type(message)], 0, len(meta), call)
    return b"".join((head, meta, body))


def decode(frame: Frame) -> Message:
    """The message in *frame*, every field present and of its type; else `ProtocolError`."""
    try:
        return _DECODERS[frame.kind].decode(frame.meta)
    except (*_BAD, KeyError) as error:
        raise ProtocolError(f"frame of kind {frame.kind}: {error}") from error


def pack(value: Any) -> bytes:
    """*value* in msgpack; text that is not Unicode (a lone surrogate) has `?` there."""
    try:
        return _ENCODER.encode(value)
    except UnicodeEncodeError:
        plain = msgspec.to_builtins(value)
        return bytes(_REPLACING.pack(plain))


def unpack(data: bytes, type_: type[T]) -> T:
    """What was packed, of its type; else `ProtocolError`."""
    try:
        return msgspec.msgpack.decode(data, type=type_)
    except _BAD as error:
        raise ProtocolError(str(error)) from error


# ---- what is sent of our own --------------------------------------------------------------------


def asked(invocation: Invocation, queue_s_max: float) -> Invoke:
    """The message that has *invocation* run, which may wait so long."""
    return Invoke(
        invocation.id,
        invocation.function,
        invocation.http,
        invocation.trace,
        queue_s_max,
        invocation.env,
        invocation.timeout_s,
    )


def invocation_of(message: Invoke | Accept, body: bytes) -> Invocation:
    """The invocation that was asked for."""
    id_, function = InvocationId(message.id), FunctionId(message.function)
    if isinstance(message, Accept):
        return Invocation(id_, function, body, message.http, message.trace)
    return Invocation(
        id_,
        function,
        body,
        message.http,
        message.trace,
        message.queue_s_max,
        message.env,
        message.timeout_s,
    )


def answer(call: int, outcome: Outcome) -> bytes:
    """The frame that tells *outcome*."""
    if isinstance(outcome, Success):
        told = Succeeded(outcome.status, outcome.headers, outcome.timing)
        try:
            return encode(told, call, outcome.body)
        except ProtocolError as error:
            outcome = Failure("BadResponse", str(error), "", outcome.timing)
    failed = Failed(outcome.kind, outcome.timing, outcome.was_killed, outcome.exit_code)
    return encode(failed, call, pack([outcome.message, outcome.traceback]))


def outcome_of(message: Succeeded | Failed, body: bytes) -> Outcome:
    """The outcome that was told. Raises `ProtocolError`."""
    if isinstance(message, Succeeded):
        return Success(body, message.timing, message.status, message.headers)
    why, traceback = unpack(body, tuple[str, str])
    return Failure(
        message.kind, why, traceback, message.timing, message.was_killed, message.exit_code
    )


def refusal(call: int, error: PlatformError) -> bytes:
    """The frame that tells *error*; what cannot be told of its fields is left out."""
    try:
        body = pack([error.detail, error.fields])
    except TypeError:
        body = pack([error.detail, {}])
    if len(body) > META_BYTES_MAX:
        body = pack([error.detail[: META_BYTES_MAX // 4], {}])
    return encode(Refused(type(error).__name__), call, body)


def error_of(message: Refused, body: bytes) -> PlatformError:
    """The error that was told; a `ShardFailed` when we do not know it. Raises `ProtocolError`."""
    detail, fields = unpack(body, tuple[str, dict[str, Any]])
    kind = _known(message.error)
    if kind is None:
        return ShardFailed(f"{message.error}: {detail}")
    error = kind(detail)
    error.fields = fields
    return error


def _known(name: str) -> type[PlatformError] | None:
    """The pool's own error of that name: no other class is ever made of what came."""
    found = getattr(errors, name, None)
    is_one = isinstance(found, type) and issubclass(found, PlatformError)
    return found if is_one else None


def parts(
    listed: Iterable[Listed], gone: Iterable[FunctionId] = (), *, is_anew: bool = True
) -> list[bytes]:
    """The frames that tell the whole list, or if it is not *is_anew* what of it has changed.

    What may be declared of one function fits into a frame many times: see `FunctionSpec`.
    """
    bodies, size = [(list[Raw](), list[Raw]())], 0
    for at, entries in enumerate((listed, gone)):
        for entry in entries:
            packed = pack(entry)
            if size and size + len(packed) > PART_BYTES:
                bodies.append(([], []))
                size = 0
            bodies[-1][at].append(Raw(packed))
            size += len(packed)
    last = len(bodies) - 1
    return [
        encode(Functions(is_anew and at == 0, at == last), 0, pack(body))
        for at, body in enumerate(bodies)
    ]
