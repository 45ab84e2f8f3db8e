"""The wire between gateway and pool: what is sent arrives, whatever else arrives is refused."""

import math
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dayfly.protocol import BODY_BYTES_MAX, HEADER, META_BYTES_MAX, Frame, ProtocolError
from dayfly_pool import errors, wire
from dayfly_pool.errors import NoCapacity, PlatformError, ShardFailed
from dayfly_pool.models import (
    Failure,
    FunctionId,
    FunctionSpec,
    Invocation,
    InvocationId,
    Outcome,
    Route,
    Success,
    Timing,
)
from dayfly_pool.wire import KINDS, Listed, Message, Part, decode, encode

TIMING = Timing("forked", 0.1, 0.2, 0.3, 1 / 3)
EVERY: list[Message] = [
    wire.Hello(wire.WIRE, "pool-0", 30.0),
    wire.Beat(),
    wire.Invoke("i1", "default/a", {"method": "GET"}, "00-1", 30.0, {"A": "b"}, None),
    wire.Accept("i1", "default/a", None, "", ("key", "print")),
    wire.Cancel(),
    wire.Watch(),
    wire.Left(),
    wire.Succeeded(200, [["a", "b"], ["a", "c"]], TIMING),
    wire.Failed("Raised", TIMING, True, 7),
    wire.Refused("NoCapacity"),
    wire.Accepted("i1", True, False),
    wire.Functions(True, False),
    wire.Draining(),
]
NUMBERS = {kind: number for number, kind in KINDS.items()}
texts = st.text(st.characters(exclude_categories=("Cs",)))
seconds = st.floats(0, 1e6)
timings = st.builds(
    Timing,
    st.sampled_from(["warm", "generic", "forked", "created"]),
    seconds,
    st.none() | seconds,
    st.none() | seconds,
    seconds,
)
outcomes = st.builds(
    Success,
    st.binary(),
    timings,
    st.integers(0, 999),
    st.lists(st.lists(texts, min_size=2, max_size=2)),
) | st.builds(Failure, texts, texts, texts, timings, st.booleans(), st.none() | st.integers(0, 255))


def frame(data: bytes) -> Frame:
    (found,) = wire.reader().feed(data)
    return found


@pytest.mark.parametrize("message", EVERY, ids=lambda message: type(message).__name__)
def test_every_message_arrives_as_it_was_sent(message: Message):
    found = frame(encode(message, 7, b"body"))

    assert (decode(found), found.invocation, found.body) == (message, 7, b"body")


def test_every_kind_of_message_is_tried_here():
    assert {type(message) for message in EVERY} == set(KINDS.values())


def test_a_frame_is_what_the_documentation_says():
    """Releases live side by side while one replaces the other."""
    assert encode(wire.Refused("Draining"), 9, b"x") == (
        b"\x00\x00\x00\x0b\x23\x00\x00\x0a\x00\x00\x00\x00\x00\x00\x00\x09\x91\xa8Drainingx"
    )


@given(outcomes)
def test_every_outcome_arrives_exactly(outcome: Outcome):
    found = frame(wire.answer(3, outcome))
    message = decode(found)

    assert isinstance(message, wire.Succeeded | wire.Failed)
    assert wire.outcome_of(message, found.body) == outcome


KNOWN = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, PlatformError)
]


@pytest.mark.parametrize("kind", KNOWN, ids=lambda kind: kind.__name__)
def test_every_error_arrives_as_itself(kind: type[PlatformError]):
    found = frame(wire.refusal(1, kind("why", allow="GET", number=3)))
    message = decode(found)
    assert isinstance(message, wire.Refused)
    error = wire.error_of(message, found.body)

    assert type(error) is kind
    assert (error.detail, error.fields, str(error)) == ("why", {"allow": "GET", "number": 3}, "why")


@pytest.mark.parametrize("name", ["Nobody", "Any", "PlatformError.__init__", "", "ClassVar"])
def test_an_error_that_nobody_knows_is_a_general_one(name: str):
    """Whatever name comes, only errors of the pool's are made."""
    error = wire.error_of(wire.Refused(name), wire.pack(["why", {}]))

    assert type(error) is ShardFailed
    assert error.status == 503


def test_what_cannot_be_told_of_an_error_is_left_out():
    found = frame(wire.refusal(1, NoCapacity("why", odd=object())))
    message = decode(found)
    assert isinstance(message, wire.Refused)

    assert wire.error_of(message, found.body).fields == {}


def test_an_invocation_arrives_whole_and_lone_surrogates_as_question_marks():
    sent = Invocation(
        InvocationId("i"), FunctionId("a/b"), b"x", {"path": "/\udcff", "n": 1}, "t", 3.0, {}, 1.5
    )
    message = decode(frame(encode(wire.asked(sent, 2.0), 1)))
    assert isinstance(message, wire.Invoke)
    got = wire.invocation_of(message, b"x")

    assert got.http == {"path": "/?", "n": 1}
    assert (got.id, got.function, got.body, got.trace) == ("i", "a/b", b"x", "t")
    assert (got.queue_s_max, got.env, got.timeout_s) == (2.0, {}, 1.5)


def test_a_response_that_is_too_long_for_a_frame_is_a_bad_one():
    headers = [["a", "x" * META_BYTES_MAX]]
    found = frame(wire.answer(1, Success(b"", TIMING, 200, headers)))
    message = decode(found)
    assert isinstance(message, wire.Failed)

    assert wire.outcome_of(message, found.body).kind == "BadResponse"  # type: ignore[union-attr]


def test_a_body_over_the_limit_is_not_sent():
    with pytest.raises(ProtocolError):
        encode(wire.Beat(), 0, bytes(BODY_BYTES_MAX + 1))


@given(st.integers(0, 3000), st.integers(0, 2), st.integers(0, 3000), st.booleans())
def test_a_list_of_functions_arrives_in_order_and_marked(
    number: int, routes: int, gone: int, is_anew: bool
):
    routed = (Route(path="/" + "x" * 100, methods=("GET", "PATCH")),) * routes
    listed = [Listed(f"a/{n}", n, 0.5, routed) for n in range(number)]
    names = [f"{'x' * 200}/{n}" for n in range(gone)]
    got = Part()
    marks = []
    for data in wire.parts(listed, names, is_anew=is_anew):
        found = frame(data)
        assert len(found.body) < wire.PART_BYTES + 1000
        message = decode(found)
        assert isinstance(message, wire.Functions)
        marks.append((message.is_anew, message.is_last))
        part = wire.unpack(found.body, Part)
        got.listed.extend(part.listed)
        got.gone.extend(part.gone)

    assert got == Part(listed, names)
    assert [first for first, _ in marks] == [is_anew] + [False] * (len(marks) - 1)
    assert [last for _, last in marks] == [False] * (len(marks) - 1) + [True]


def test_the_longest_declaration_there_may_be_fits_into_a_frame():
    """Else one of them would end every connection for ever."""
    methods = ("A" * 16,) * 16
    longest = Route(path="/" + "\U0001d11e" * 1023, host="\U0001d11e" * 253, methods=methods)
    spec = FunctionSpec(handler="main:handle", package="a" * 64, routes=(longest,) * 100)
    listed = [Listed(f"a/{n}", 1, 0.5, spec.routes) for n in range(20)]

    assert max(map(len, wire.parts(listed))) < BODY_BYTES_MAX / 2
    declared = msgspec.to_builtins(spec)
    assert msgspec.convert(declared, FunctionSpec) == spec
    for too_long in ({"methods": ["A"] * 17}, {"methods": ["A" * 17]}, {"path": "/" * 1025}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert({"path": "/", **too_long}, Route)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({**declared, "routes": [{"path": "/"}] * 101}, FunctionSpec)


# ---- what is refused --------------------------------------------------------------------------


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | texts
    | st.binary(),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@given(st.sampled_from(sorted(KINDS)), anything | st.lists(anything, max_size=8))
def test_whatever_comes_is_a_message_or_refused(kind: int, meta: Any):
    try:
        message = decode(Frame(kind, 1, msgpack.packb(meta), b""))
    except ProtocolError:
        return

    assert type(message) is KINDS[kind]
    assert decode(frame(encode(message))) == message or "nan" in repr(message)


@given(st.sampled_from(sorted(KINDS)), st.binary(max_size=200))
def test_bytes_of_chance_are_refused_as_one_kind_of_error(kind: int, meta: bytes):
    try:
        decode(Frame(kind, 1, meta, b""))
    except ProtocolError:
        pass


@given(st.binary(max_size=400))
def test_a_stream_of_chance_ends_as_one_kind_of_error(data: bytes):
    try:
        for found in wire.reader().feed(data):
            decode(found)
    except ProtocolError:
        pass


@given(
    st.binary(max_size=100), st.sampled_from([Part, tuple[str, str], tuple[str, dict[str, Any]]])
)
def test_a_body_of_chance_is_refused_as_the_same(body: bytes, kind: Any):
    try:
        wire.unpack(body, kind)
    except ProtocolError:
        pass


@pytest.mark.parametrize(
    "meta",
    [
        ["i", "a/b", None, "", 1.0, None],  # one too few
        ["i", "a/b", None, "", 1.0, None, None, 1],  # one too many
        ["i" * 257, "a/b", None, "", 1.0, None, None],
        ["i", "a/b", None, "", -1.0, None, None],
        ["i", "a/b", None, "", math.inf, None, None],
        ["i", "a/b", None, "", math.nan, None, None],
        ["i", "a/b", [], "", 1.0, None, None],
        ["i", "a/b", None, "", 1.0, {"A": 1}, None],
    ],
)
def test_a_call_out_of_form_is_refused(meta: list[Any]):
    with pytest.raises(ProtocolError):
        decode(Frame(NUMBERS[wire.Invoke], 1, msgpack.packb(meta), b""))


def test_a_guests_frames_are_none_of_this_wire():
    """What is meant for one is never taken for the other."""
    with pytest.raises(ProtocolError):
        list(wire.reader().feed(HEADER.pack(1, 8, 0, 1, 0) + b"\x90"))


def test_nesting_without_end_is_refused():
    deep = b"\x97\xa1i\xa3a/b" + b"\x81\xa1a" * 5000 + b"\xc0\xa0\xca\x00\x00\x00\x00\xc0\xc0"
    with pytest.raises(ProtocolError):
        decode(Frame(NUMBERS[wire.Invoke], 1, deep, b""))
