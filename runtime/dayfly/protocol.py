"""The wire between the pool and a guest: frames and messages.

Nothing here performs I/O. Both ends use the same `FrameReader` and `encode`. A frame is a fixed
16-byte header, a small msgpack map (the meta) and an opaque body that neither the gateway nor the
pool decodes:

    0      4      5      6         8            16
    | size | kind | zero | meta len | invocation | meta ... | body ... |

`size` counts what follows the header. All integers are big-endian. See docs/protocol.md.
"""

import struct
import types

import msgpack

from dayfly.record import Record

TYPE_CHECKING = False  # see `record`
if TYPE_CHECKING:
    from collections.abc import Container, Iterator

PROTOCOL = 4
HEADER = struct.Struct("!IBBHQ")
BODY_BYTES_MAX = 6 * 1024 * 1024
META_BYTES_MAX = 0xFFFF
_NESTED = (dict, list)
_PACKER = msgpack.Packer(unicode_errors="replace")  # one, for making it costs more than packing
ITEMS_MAX = 4096
DEPTH_MAX = 8


class ProtocolError(Exception):
    """The other end sent bytes that are not this protocol; the connection cannot go on."""


class Frame:
    """One frame as it travels: *meta* is still packed, *body* is never looked into."""

    __slots__ = ("body", "invocation", "kind", "meta")

    def __init__(self, kind: int, invocation: int, meta: bytes, body: bytes) -> None:
        self.kind, self.invocation, self.meta, self.body = kind, invocation, meta, body


class Hello(Record):
    """Guest to pool, once a connection: this sandbox is up.

    It holds no user code and waits for `Load`; in a pod it may hold a function already, of which
    *slots* invocations may run at once, from a pool that there was before.
    """

    protocol: int
    python: str
    preload_failures: list[str]
    slots: int = 0


class Load(Record):
    """Pool to guest: become this function. *digest* names the package below the package store.

    With *as_zygote* it keeps the right to fork sandboxes, and answers no invocation itself. The
    body, if there is one, names a step's folders, in JSON; see `folders`.
    """

    digest: str
    handler: str
    namespace: str
    function: str
    version: str
    env: dict[str, str]
    network: str
    memory_mb: int
    processes: int
    open_files: int
    tmp_mb: int
    concurrency: int
    preload: list[str]
    init_timeout_s: float
    as_zygote: bool


class Loaded(Record):
    """Guest to pool: the handler is imported. *slots* invocations may run here at once.

    *cap_eff*, *no_new_privs*, *seccomp* and *landlock* are what the kernel says of the guest
    after its lock-down and before any user code ran. Of the import's time it needed a processor
    for *busy_s*. *threads*, *children* and *descriptors* are how many it has left behind.
    """

    slots: int
    import_s: float
    busy_s: float
    lockdown_s: float
    threads: int
    children: int
    descriptors: int
    cap_eff: int
    no_new_privs: int
    seccomp: int
    landlock: int


class Fetch(Record):
    """Guest to pool: send me the environment, the package or a step's folders, as `Piece`s.

    Only in a pod, which sees none of the stores: an environment before `Hello`, the others while it
    loads. *digest* is what the settings or `Load` call them.
    """

    digest: str


class Piece(Record):
    """Pool to guest: a part of what was fetched, in the body; in order, *is_last* in the last."""

    is_last: bool


class Invoke(Record):
    """Pool to guest: call the handler. The body is the event (JSON) or the HTTP request's body.

    *env* are variables that are set for this invocation alone.
    """

    id: str
    remaining_s: float
    http: dict[str, object] | None = None
    trace: str = ""
    env: dict[str, str] | None = None


class Result(Record):
    """Guest to pool: the handler returned. *status* and *headers* are HTTP's; the body is raw."""

    handler_s: float
    status: int = 0
    headers: list[list[str]] = []  # noqa: RUF012  (never changed)


class Failed(Record):
    """Guest to pool: user code failed while loading (invocation 0) or in an invocation.

    *exit_code* is what a process or `sys.exit` ended with; -1 when there was no such end.
    """

    kind: str
    message: str
    traceback: str
    handler_s: float = 0.0
    exit_code: int = -1


class Log(Record):
    """Guest to pool: lines that user code wrote; the body is UTF-8, one line a newline.

    *dropped* counts the bytes that the guest threw away since the last `Log`.
    """

    stream: str
    dropped: int = 0


Message = Hello | Load | Loaded | Invoke | Result | Failed | Log | Fetch | Piece
KINDS: dict[int, type[Message]] = {
    1: Hello,
    2: Load,
    3: Loaded,
    4: Invoke,
    5: Result,
    6: Failed,
    7: Log,
    8: Fetch,
    9: Piece,
}
_NUMBERS = {message: number for number, message in KINDS.items()}


def _wire_types(hint: object) -> tuple[type, ...]:
    """The Python types that a field annotated with *hint* may have on the wire."""
    if isinstance(hint, types.UnionType):
        return tuple(t for choice in hint.__args__ for t in _wire_types(choice))
    plain = hint.__origin__ if isinstance(hint, types.GenericAlias) else hint
    assert isinstance(plain, type)
    return (float, int) if plain is float else (plain,)


_SCHEMAS = {
    message: tuple((name, _wire_types(hint)) for name, hint in message.__annotations__.items())
    for message in _NUMBERS
}


def encode(message: Message, invocation: int = 0, body: bytes = b"") -> bytes:
    """One frame, ready to send; text that is not Unicode (a lone surrogate) becomes `?`.

    Raises `ProtocolError` when it would break a limit.
    """
    meta = _PACKER.pack(message.__dict__)
    if len(meta) > META_BYTES_MAX:
        raise ProtocolError(f"meta of {len(meta)} bytes, limit {META_BYTES_MAX}")
    if len(body) > BODY_BYTES_MAX:
        raise ProtocolError(f"body of {len(body)} bytes, limit {BODY_BYTES_MAX}")
    head = HEADER.pack(len(meta) + len(body), _NUMBERS[type(message)], 0, len(meta), invocation)
    return b"".join((head, meta, body))


def decode(frame: Frame, *, is_trusted: bool = False) -> Message:
    """The message in *frame*, every field present and of its type; else `ProtocolError`.

    A trusted sender's fields are not looked at: guests trust the pool, never the other way round.
    """
    kind = KINDS.get(frame.kind)
    if kind is None:
        raise ProtocolError(f"unknown frame kind {frame.kind}")
    try:
        meta = msgpack.unpackb(frame.meta, max_array_len=ITEMS_MAX, max_map_len=ITEMS_MAX)
    except Exception as error:  # msgpack raises a dozen kinds; all mean the same here
        raise ProtocolError(f"meta is not msgpack: {error!r}") from error
    if not is_trusted:
        _check(kind, meta)
    return kind.of(meta)


def _check(kind: type[Message], meta: object) -> None:
    schema = _SCHEMAS[kind]
    if type(meta) is not dict or len(meta) != len(schema):
        raise ProtocolError(f"{kind.__name__} needs exactly {', '.join(kind.__annotations__)}")
    for name, accepted in schema:
        value = meta.get(name, _check)
        found = type(value)
        if found not in accepted or (found in _NESTED and not _is_shallow(value, DEPTH_MAX)):
            raise ProtocolError(f"{kind.__name__}.{name} is missing or not of its type")


def _is_shallow(value: object, depth: int) -> bool:
    if type(value) is dict:
        if depth == 0:
            return False
        for key, inner in value.items():
            if type(key) is not str or not (type(inner) is str or _is_shallow(inner, depth - 1)):
                return False
    elif type(value) is list:
        if depth == 0:
            return False
        for inner in value:
            if type(inner) is not str and not _is_shallow(inner, depth - 1):
                return False
    return True


class FrameReader:
    """Cuts a byte stream into frames, whatever the chunks; holds at most a frame and a chunk.

    *kinds* are those that there are.
    """

    __slots__ = ("_buffer", "_kinds")

    def __init__(self, kinds: "Container[int]" = KINDS) -> None:
        self._buffer, self._kinds = bytearray(), kinds

    def feed(self, data: bytes) -> "Iterator[Frame]":
        """Every frame completed by *data*. Raises `ProtocolError` as soon as a header is wrong."""
        rest = self._buffer
        buffer: bytes | bytearray = data  # mostly whole frames, which need not be copied first
        if rest:
            rest += data
            buffer = rest
        at = 0
        try:
            while len(buffer) - at >= HEADER.size:
                size, kind, zero, meta_len, invocation = HEADER.unpack_from(buffer, at)
                is_sized = meta_len <= size <= meta_len + BODY_BYTES_MAX
                if not is_sized or zero or kind not in self._kinds:
                    raise ProtocolError(f"bad header: {size=} {kind=} {meta_len=}")
                start = at + HEADER.size
                if len(buffer) < start + size:
                    return
                middle, at = start + meta_len, start + size
                yield Frame(kind, invocation, bytes(buffer[start:middle]), bytes(buffer[middle:at]))
        finally:
            if buffer is rest:
                del rest[:at]
            else:
                rest += buffer[at:]
