"""The wire: what is sent arrives, and whatever else arrives is refused as one kind of error."""

import struct
from collections.abc import Callable, Iterable
from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dayfly.protocol import (
    BODY_BYTES_MAX,
    HEADER,
    ITEMS_MAX,
    KINDS,
    META_BYTES_MAX,
    PROTOCOL,
    Failed,
    Fetch,
    Frame,
    FrameReader,
    Hello,
    Invoke,
    Load,
    Loaded,
    Log,
    Message,
    Piece,
    ProtocolError,
    Result,
    decode,
    encode,
)

HELLO = Hello(protocol=PROTOCOL, python="3.11.7", preload_failures=["numpy: ImportError: no"])
LOAD = Load(
    digest="0" * 64,
    handler="main:handle",
    namespace="default",
    function="greet",
    version="7",
    env={"GREETING": "Grüß Gott"},
    network="none",
    memory_mb=256,
    processes=64,
    open_files=256,
    tmp_mb=64,
    concurrency=1,
    preload=["json"],
    init_timeout_s=10.0,
    as_zygote=False,
)
LOADED = Loaded(
    slots=1,
    import_s=0.01,
    busy_s=0.01,
    lockdown_s=0.001,
    threads=0,
    children=0,
    descriptors=0,
    cap_eff=0,
    no_new_privs=1,
    seccomp=2,
    landlock=5,
)
INVOKE = Invoke(id="abc", remaining_s=30, http={"method": "GET", "headers": [["a", "b"]]})
RESULT = Result(handler_s=0.5, status=200, headers=[["content-type", "text/plain"]])
FAILED = Failed(kind="Raised", message="ValueError: no", traceback="Traceback ...")
LOG = Log(stream="stderr", dropped=3)
FETCH = Fetch(digest="0" * 64)
PIECE = Piece(is_last=True)
EVERY: list[Message] = [HELLO, LOAD, LOADED, INVOKE, RESULT, FAILED, LOG, FETCH, PIECE]
NUMBERS = {kind: number for number, kind in KINDS.items()}


def frames(chunks: Iterable[bytes]) -> list[Frame]:
    reader = FrameReader()
    return [frame for chunk in chunks for frame in reader.feed(chunk)]


def heard(chunks: Iterable[bytes]) -> tuple[list[tuple[object, ...]], str]:
    """All that a reader makes of *chunks*: the messages until the first error, and that error."""
    reader, told = FrameReader(), []
    try:
        for chunk in chunks:
            for frame in reader.feed(chunk):
                message = repr(decode(frame))
                told += [(frame.kind, frame.invocation, message, frame.body)]
    except ProtocolError as error:
        return told, str(error)
    return told, ""


def pack(kind: int, meta: Any, body: bytes = b"", invocation: int = 0) -> bytes:
    packed = meta if isinstance(meta, bytes) else msgpack.packb(meta)
    header = HEADER.pack(len(packed) + len(body), kind, 0, len(packed), invocation)
    return header + packed + body


# ---- there and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("message", EVERY, ids=lambda message: type(message).__name__)
def test_every_message_arrives_as_it_was_sent(message: Message):
    (frame,) = frames([encode(message, 2**64 - 1, b"body \x00\xff")])

    assert decode(frame) == message
    assert (frame.invocation, frame.body) == (2**64 - 1, b"body \x00\xff")


def test_every_kind_of_message_is_tried_here():
    assert {type(message) for message in EVERY} == set(KINDS.values())


def test_a_frame_is_what_the_documentation_says():
    """Other languages implement it: a byte that moves is another protocol number."""
    assert encode(LOG, 9, b"hi\n") == (
        b"\x00\x00\x00\x1b"  # size: meta and body
        b"\x07\x00"  # kind, zero
        b"\x00\x18"  # meta
        b"\x00\x00\x00\x00\x00\x00\x00\x09"
        b"\x82\xa7dropped\x03\xa6stream\xa6stderr"
        b"hi\n"
    )


@given(st.lists(st.sampled_from(EVERY), max_size=5), st.binary(max_size=50), st.data())
def test_chunks_do_not_matter(messages: list[Message], body: bytes, data: st.DataObject):
    """However the stream is cut, the same frames come out."""
    stream = b"".join(encode(message, n, body) for n, message in enumerate(messages))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]

    assert [decode(frame) for frame in frames(chunks)] == messages
    assert heard(chunks) == heard([stream])


def test_a_body_of_the_largest_size_passes_byte_for_byte():
    body = bytes(BODY_BYTES_MAX)
    stream = encode(RESULT, 1, body)
    (frame,) = frames(stream[at : at + 65536] for at in range(0, len(stream), 65536))

    assert frame.body == body


def test_a_frame_that_is_not_whole_is_not_told():
    assert frames([encode(LOG)[:-1]]) == []


def test_text_that_is_not_unicode_is_replaced_and_not_sent():
    """A lone surrogate (a stray byte in a header, as aiohttp reads it) must not stop the pool."""
    (frame,) = frames([encode(Invoke(id="a", remaining_s=1, trace="\udcff"))])

    assert decode(frame) == Invoke(id="a", remaining_s=1, trace="?")


# ---- limits -------------------------------------------------------------------------------------


def test_too_large_a_body_is_not_sent():
    with pytest.raises(ProtocolError, match=f"body of {BODY_BYTES_MAX + 1} bytes"):
        encode(RESULT, 1, bytes(BODY_BYTES_MAX + 1))


def test_too_large_a_meta_is_not_sent():
    with pytest.raises(ProtocolError, match="meta of"):
        encode(Failed(kind="Raised", message="x" * META_BYTES_MAX, traceback=""))


@pytest.mark.parametrize(
    ("size", "meta"),
    [
        (2**32 - 1, 0),
        (META_BYTES_MAX + BODY_BYTES_MAX + 1, META_BYTES_MAX),
        (BODY_BYTES_MAX + 1, 0),  # the meta's share is not the body's
        (10, 11),
    ],
)
def test_a_length_over_the_limit_is_refused_before_anything_is_kept(size: int, meta: int):
    """From the header alone: no sender can make the other end wait for, or hold, 4 GiB."""
    with pytest.raises(ProtocolError, match="bad header"):
        frames([HEADER.pack(size, NUMBERS[Log], 0, meta, 0)])


@pytest.mark.parametrize("kind", [0, 10, 255])
def test_an_unknown_kind_is_refused(kind: int):
    with pytest.raises(ProtocolError, match="bad header"):
        frames([pack(kind, {})])


def test_the_reserved_byte_must_be_zero():
    stream = bytearray(encode(LOG))
    stream[5] = 1

    with pytest.raises(ProtocolError, match="bad header"):
        frames([bytes(stream)])


@pytest.mark.parametrize("array", [True, False])
def test_deep_nesting_is_refused(array: bool):
    """60,000 brackets in 60 kB, the same for maps: neither the stack nor the time may go."""
    deep = b"\x91" * 60_000 + b"\xc0" if array else b"\x81\xa1a" * 20_000 + b"\xc0"

    with pytest.raises(ProtocolError):
        decode(Frame(NUMBERS[Invoke], 1, deep, b""))


@pytest.mark.parametrize(("depth", "is_fine"), [(7, True), (8, False)])
def test_the_http_map_may_be_eight_deep(depth: int, is_fine: bool):
    nested: Any = {}
    for _ in range(depth):
        nested = {"a": nested}
    frame = Frame(
        4,
        1,
        msgpack.packb({"id": "", "remaining_s": 1, "http": nested, "trace": "", "env": None}),
        b"",
    )

    if is_fine:
        assert isinstance(decode(frame), Invoke)
    else:
        with pytest.raises(ProtocolError, match="http"):
            decode(frame)


def test_too_many_items_are_refused():
    meta = {"protocol": 1, "python": "", "preload_failures": [""] * (ITEMS_MAX + 1)}

    with pytest.raises(ProtocolError, match="not msgpack"):
        decode(Frame(NUMBERS[Hello], 0, msgpack.packb(meta), b""))


def test_an_error_stays_an_error():
    """A reader that has seen nonsense never finds its way back into the stream."""
    reader = FrameReader()
    for chunk in (pack(99, {}), encode(LOG)):
        with pytest.raises(ProtocolError):
            list(reader.feed(chunk))


# ---- foreign fields -----------------------------------------------------------------------------


def change(message: Message, change_it: Callable[[dict[Any, Any]], object]) -> Frame:
    meta = dict(message.__dict__)
    change_it(meta)
    return Frame(NUMBERS[type(message)], 0, msgpack.packb(meta), b"")


@pytest.mark.parametrize("message", EVERY, ids=lambda message: type(message).__name__)
def test_a_missing_field_is_refused_by_name(message: Message):
    for name in message.__dict__:
        with pytest.raises(ProtocolError, match=f"{type(message).__name__} needs.*{name}"):
            decode(change(message, lambda meta, name=name: meta.pop(name)))


@pytest.mark.parametrize("message", EVERY, ids=lambda message: type(message).__name__)
def test_an_extra_field_is_refused(message: Message):
    with pytest.raises(ProtocolError, match="needs exactly"):
        decode(change(message, lambda meta: meta.update(extra=1)))


@pytest.mark.parametrize("message", EVERY, ids=lambda message: type(message).__name__)
def test_a_field_of_another_type_is_refused(message: Message):
    """Neither true for 1, nor bytes for text, nor a string for a list."""
    for name, value in message.__dict__.items():
        for wrong in (True, b"x", object, "1", 1.5, 1, [], {}, None):
            is_number = type(value) in (int, float) and type(wrong) in (int, float)
            may_be_none = name in ("http", "env") and (wrong is None or wrong == {})
            if wrong is object or type(wrong) is type(value) or is_number or may_be_none:
                continue
            with pytest.raises(ProtocolError, match=name):
                decode(change(message, lambda meta, n=name, w=wrong: meta.update({n: w})))


@pytest.mark.parametrize("meta", [b"", b"\xc1", b"\xc0", b"\x90", b"\x80", b"\x82\xa1a", b"\xc7"])
def test_a_meta_that_is_no_map_is_refused(meta: bytes):
    with pytest.raises(ProtocolError):
        decode(Frame(NUMBERS[Log], 0, meta, b""))


# ---- fuzz ---------------------------------------------------------------------------------------


def mutated(stream: bytes, edits: list[tuple[int, int]]) -> bytes:
    changed = bytearray(stream)
    for at, value in edits:
        changed[at % len(changed)] = value
    return bytes(changed)


STREAMS = st.builds(
    mutated,
    st.lists(st.sampled_from(EVERY), min_size=1, max_size=3).map(
        lambda messages: b"".join(encode(message, 1, b"body") for message in messages)
    ),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=6),
)


@settings(max_examples=150, deadline=None)
@given(STREAMS | st.binary(max_size=200))
@example(struct.pack("!I", 2**32 - 1))
@example(b"\0" * 64)
def test_one_chunk_and_single_bytes_say_the_same(stream: bytes):
    """The same messages, then the same error; and nothing but `ProtocolError` ever escapes."""
    assert heard([stream]) == heard(stream[at : at + 1] for at in range(len(stream)))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.binary(max_size=100))
def test_any_meta_is_a_message_or_a_protocol_error(kind: int, meta: bytes):
    try:
        message = decode(Frame(kind, 0, meta, b""))
    except ProtocolError:
        return
    assert isinstance(message, KINDS[kind])


WIRE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(EVERY), st.data())
def test_any_value_in_a_field_is_taken_or_is_a_protocol_error(
    message: Message, data: st.DataObject
):
    """What is taken has the declared types, so that nobody behind it has to check again."""
    name = data.draw(st.sampled_from(sorted(message.__dict__)))
    value = data.draw(WIRE)
    try:
        taken = decode(change(message, lambda meta: meta.update({name: value})))
    except ProtocolError:
        return
    again = decode(frames([encode(taken)])[0])

    assert repr(again) == repr(taken)  # NaN is not equal to itself
