"""User code's output: every byte is told with its invocation, or counted; nobody ever waits for it.

What replaces the descriptors 1 and 2 runs in a process of its own.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest

import dayfly
from dayfly.output import (
    BURST_BYTES,
    BURST_FRAMES,
    FRAME_BYTES,
    LINE_BYTES_MAX,
    Channel,
    Output,
)
from dayfly.protocol import FrameReader, Log, Message, Result, decode, encode

ROOTS = [str(Path(str(module.__file__)).parents[1]) for module in (dayfly, msgpack)]
Told = list[tuple[int, str, bytes]]
GUEST = """
import json, os, sys, time
sys.path[:0] = json.loads(sys.argv[1])
from dayfly import output
out = output.Output(output.Channel(3))
out.prepare()
out.capture()
output.current.set(7)
out.running = 7
{}
out.flush(7)
os._exit(0)
"""


class Wire:
    """An `Output` and the pool's end of its connection."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.pool = ours
        self.channel = Channel(theirs.detach())
        self.output = Output(self.channel)
        self._reader = FrameReader()

    def heard(self) -> list[tuple[int, Message, bytes]]:
        """All that has arrived."""
        told = []
        with contextlib.suppress(BlockingIOError):
            while data := self.pool.recv(1 << 20):
                told += [(f.invocation, decode(f), f.body) for f in self._reader.feed(data)]
        return told

    def lines(self) -> Told:
        return [(n, m.stream, body) for n, m, body in self.heard() if isinstance(m, Log)]

    def close(self) -> None:
        self.pool.close()
        self.channel.socket.close()


@pytest.fixture
def wire() -> Iterator[Wire]:
    wire = Wire()
    yield wire
    wire.close()


def heard_of(source: str) -> list[tuple[int, Log, bytes]]:
    """What the pool hears of a guest that runs *source* for invocation 7, frame by frame."""
    pool, theirs = socket.socketpair()
    boot = f"import os; os.dup2({theirs.fileno()}, 3); "
    script = boot + GUEST.format(textwrap.dedent(source))
    command = [sys.executable, "-I", "-S", "-c", script, json.dumps(ROOTS)]
    with pool, theirs:
        child = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE)
        theirs.close()
        pool.settimeout(20)
        chunks = []
        with contextlib.suppress(ConnectionResetError):
            while data := pool.recv(1 << 20):
                chunks.append(data)
        _, error = child.communicate(timeout=20)
    assert child.returncode == 0, error.decode()
    told = []
    for frame in FrameReader().feed(b"".join(chunks)):
        message = decode(frame)
        assert isinstance(message, Log)
        told.append((frame.invocation, message, frame.body))
    return told


def guest(source: str) -> Told:
    """The same, put together by invocation and stream."""
    told: dict[tuple[int, str], bytes] = {}
    for number, message, body in heard_of(source):
        key = number, message.stream
        told[key] = told.get(key, b"") + body
    return [(number, stream, text) for (number, stream), text in sorted(told.items())]


# ---- lines --------------------------------------------------------------------------------------


def test_a_line_is_told_when_it_is_whole(wire: Wire):
    wire.output.write("stdout", 1, b"one\ntw")

    assert wire.lines() == [(1, "stdout", b"one\n")]
    wire.output.write("stdout", 1, b"o\n")
    assert wire.lines() == [(1, "stdout", b"two\n")]


def test_the_end_of_an_invocation_tells_what_has_no_newline(wire: Wire):
    wire.output.write("stderr", 1, b"unfinished")
    wire.output.flush(1)

    assert wire.lines() == [(1, "stderr", b"unfinished")]


def test_lines_of_invocations_and_streams_do_not_mix(wire: Wire):
    """Two coroutines that write halves of lines in turn; what is told is forgotten."""
    for invocation, stream, text in [
        (1, "stdout", b"a"),
        (2, "stdout", b"x"),
        (1, "stderr", b"e"),
        (1, "stdout", b"b\n"),
        (2, "stdout", b"y\n"),
    ]:
        wire.output.write(stream, invocation, text)
    wire.output.flush(1)

    assert wire.lines() == [
        (1, "stdout", b"ab\n"),
        (2, "stdout", b"xy\n"),
        (1, "stderr", b"e"),
    ]
    assert wire.output._partial == {}


def test_a_line_without_end_is_told_in_pieces(wire: Wire):
    """What is held back is bounded."""
    for _ in range(10):
        wire.output.write("stdout", 1, b"x" * (LINE_BYTES_MAX // 4 + 1))
    held = sum(map(len, wire.output._partial.values()))

    assert held <= LINE_BYTES_MAX
    assert sum(len(text) for _, _, text in wire.lines()) + held == 10 * (LINE_BYTES_MAX // 4 + 1)


def test_much_output_is_cut_between_lines(wire: Wire):
    """A frame holds 64 KiB; the pool makes a line of each piece, so no line may be in two."""
    line = "ü" * 49 + "\n"
    number = 2 * FRAME_BYTES // len(line.encode())
    wire.output.write("stdout", 1, line.encode() * number)
    told = wire.lines()

    assert len(told) > 1
    assert all(text.endswith(b"\n") for _, _, text in told)
    assert b"".join(text for _, _, text in told) == line.encode() * number


def test_a_single_line_over_a_frame_is_told_in_several(wire: Wire):
    wire.output.write("stdout", 1, b"x" * (2 * FRAME_BYTES) + b"\n")

    assert b"".join(text for _, _, text in wire.lines()) == b"x" * (2 * FRAME_BYTES) + b"\n"


# ---- limits -------------------------------------------------------------------------------------


def test_output_over_the_rate_is_dropped_and_counted(wire: Wire):
    """The burst is 1 MiB; then 256 KiB a second, which is nothing within this test."""
    text = b"x" * 65535 + b"\n"
    delivered = dropped = 0
    for _ in range(BURST_BYTES // len(text) * 2):
        wire.output.write("stdout", 1, text)
        delivered += sum(len(body) for _, _, body in wire.heard())
    wire.output.flush(1)
    for _, message, body in wire.heard():
        assert isinstance(message, Log)
        dropped += message.dropped
        delivered += len(body)

    assert dropped > 0
    assert delivered + dropped == BURST_BYTES // len(text) * 2 * len(text)


def test_one_write_over_the_burst_is_dropped_as_a_whole(wire: Wire):
    wire.output.write("stdout", 1, b"x" * (BURST_BYTES + 1))
    wire.output.flush(1)
    ((_, message, body),) = wire.heard()

    assert message == Log(stream="stdout", dropped=BURST_BYTES + 1)
    assert body == b""


def test_many_short_lines_share_frames(wire: Wire):
    """A frame for each of 3,000 lines would be far over what the pool takes in a second."""
    told = []
    for _ in range(3 * BURST_FRAMES):
        wire.output.write("stdout", 1, b"x\n")
        told += wire.lines()
    wire.output.flush(1)
    told += wire.lines()

    assert len(told) < 1.5 * BURST_FRAMES
    assert b"".join(text for _, _, text in told) == b"x\n" * (3 * BURST_FRAMES)


def test_writing_never_waits_for_the_pool(wire: Wire):
    """Nobody reads: the socket is full, `write` returns, and every byte is counted."""
    text = b"x" * 1023 + b"\n"
    written = 900
    for _ in range(written):
        wire.output.write("stdout", 1, text)
    delivered = dropped = 0
    for _ in range(3):
        for _, message, body in wire.heard():
            assert isinstance(message, Log)
            delivered, dropped = delivered + len(body), dropped + message.dropped
        wire.output.flush(1)

    assert 0 < delivered < written * len(text)
    assert delivered + dropped == written * len(text)


def test_an_answer_behind_a_frame_that_was_cut_off_arrives_whole(wire: Wire):
    """Half a log line is in the socket: the rest of it goes first, or the stream is lost."""
    pool, channel = wire.pool, wire.channel
    pool.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    frame = encode(Log(stream="stdout"), 1, b"x" * FRAME_BYTES)
    while channel.try_send(frame):
        pass
    pool.setblocking(True)
    answer = encode(Result(handler_s=0.5), 1, b"done")
    reader = FrameReader()
    heard = []
    sent = False
    while not sent or not heard or not isinstance(heard[-1][0], Result):
        heard += [(decode(f), f.body) for f in reader.feed(pool.recv(1 << 16))]
        if not sent and channel.try_send(answer):
            sent = True
    assert heard[-1] == (Result(handler_s=0.5), b"done")


# ---- a guest ------------------------------------------------------------------------------------


def test_print_is_told_with_its_invocation():
    assert guest("print('out'); print('err', file=sys.stderr)") == [
        (7, "stderr", b"err\n"),
        (7, "stdout", b"out\n"),
    ]


@pytest.mark.parametrize(
    "source",
    [
        "os.write(1, b'text')",
        "sys.stdout.write('text')",
        "sys.stdout.buffer.write(b'text')",
        "sys.__stdout__.write('text')",
        "open(1, 'w', closefd=False).write('text')",
        "os.system('printf text')",
        "import subprocess; subprocess.run(['printf', 'text'])",
        "import logging; logging.basicConfig(stream=sys.stdout, format='%(message)s'); "
        "logging.StreamHandler.terminator = ''; logging.error('text')",
    ],
)
def test_every_way_to_write_is_told(source: str):
    """Python's streams, the descriptors, child processes."""
    assert guest(source) == [(7, "stdout", b"text")]


def test_a_forked_child_is_told():
    """It speaks through the pipe: the parent's frames stay whole."""
    source = """
        if not os.fork():
            print("child")
            sys.stdout.flush()
            os._exit(0)
        os.wait()
    """
    assert guest(source) == [(7, "stdout", b"child\n")]


def test_a_thread_that_belongs_to_no_invocation_is_told_with_number_0():
    source = """
        import threading
        thread = threading.Thread(target=print, args=["background"])
        thread.start()
        thread.join()
    """
    assert guest(source) == [(0, "stdout", b"background\n")]


def test_of_much_output_of_a_child_every_byte_is_told_or_counted():
    """Half a megabyte through a pipe that a thread empties, as fast as the pool reads."""
    source = """
        os.system('head -c 500000 /dev/zero')
        out.flush(7)
        while out._channel._rest or any(out._dropped.values()):  # what an answer would push out
            out._channel.send(b"")
            out.flush(7)
    """
    heard = heard_of(source)

    assert {(number, message.stream) for number, message, _ in heard} == {(7, "stdout")}
    assert sum(len(body) + message.dropped for _, message, body in heard) == 500_000


def test_text_that_is_not_unicode_is_escaped():
    assert guest(r"print('\udcff')") == [(7, "stdout", b"\\udcff\n")]


@pytest.mark.parametrize(
    "source",
    [
        "sys.stdout = None",
        "sys.stdout.close()",
        "os.close(1)",
        "os.close(1); os.close(2)",
        "del sys.stdout",
        "class Evil:\n    def flush(self): raise RuntimeError\nsys.stdout = Evil()",
        "class Evil:\n    def flush(self): raise SystemExit\nsys.stdout = Evil()",
    ],
)
def test_a_function_that_breaks_its_own_stdout_still_answers(source: str):
    """The streams are its own; the channel is not."""
    (told,) = guest(f"os.write(2, b'x')\n{source}\n")

    assert told == (7, "stderr", b"x")


def test_a_stream_says_that_it_is_no_terminal():
    source = (
        "sys.stderr.write(repr([sys.stdout.isatty(), sys.stdout.fileno(), sys.stdout.encoding]))"
    )

    assert guest(source) == [(7, "stderr", b"[False, 1, 'utf-8']")]


def test_a_guest_whose_pool_does_not_read_goes_on():
    """200 kB of lines into a socket that holds 100: the handler is not held up."""
    ours, theirs = socket.socketpair()
    boot = f"import os; os.dup2({theirs.fileno()}, 3); "
    body = "for _ in range(2000): print('x' * 1000)\nos._exit(42)"
    command = [sys.executable, "-I", "-S", "-c", boot + GUEST.format(body), json.dumps(ROOTS)]
    with ours, theirs:
        done = subprocess.run(command, pass_fds=[theirs.fileno()], timeout=20)

    assert done.returncode == 42


def test_the_descriptors_are_pipes_that_close_with_the_guest():
    """A child that outlives its invocation may go on writing, into nothing."""
    assert os.path.exists("/proc/self/fd")
    ((_, _, text),) = guest(
        "print([os.readlink(f'/proc/self/fd/{n}').split(':')[0] for n in (1, 2)])"
    )

    assert text == b"['pipe', 'pipe']\n"


# ---- a fork of a function's zygote --------------------------------------------------------------

FORK = """
import threading
kept = sys.stdout
{before}
pid = os.fork()
if pid:
    os.waitpid(pid, 0)
    {zygote}
else:
    out.renew()
    out.prepare()
    out.capture()
    out.running = 8
    output.current.set(8)
    {fork}
    out.flush(8)
    os._exit(0)
"""


def forked(fork: str, *, before: str = "pass", zygote: str = "pass") -> Told:
    """What is heard when *before* runs in the zygote, *fork* in a fork of it, then *zygote*."""
    inside = (part.replace("\n", "\n    ") for part in (zygote, fork))
    return guest(FORK.format(**dict(zip(("zygote", "fork"), inside, strict=True)), before=before))


@pytest.mark.parametrize(
    ("before", "write"),
    [
        ("pass", "print('text')"),
        ("pass", "kept.write('text\\n')"),
        ("said = print", "said('text')"),
        ("write = sys.stdout.buffer.write", "write(b'text\\n'); sys.stdout.flush()"),
        (
            "import logging; logging.basicConfig(stream=sys.stdout, format='%(message)s')",
            "logging.error('text')",
        ),
        (
            "import io; mine = io.TextIOWrapper(sys.stdout.buffer)",
            "print('text', file=mine, flush=True)",
        ),
        ("pass", "os.write(1, b'text\\n')"),
        ("pass", "os.system('echo text')"),
    ],
)  # fmt: skip
def test_whatever_a_fork_writes_with_it_is_told_with_the_forks_invocation(before: str, write: str):
    """Also by what user code kept or wrapped when it was imported."""
    assert forked(write, before=before) == [(8, "stdout", b"text\n")]


def test_a_fork_speaks_through_its_frames_and_not_through_a_pipe():
    """Else every line of it would be told with whatever invocation runs when the pipe is read."""
    source = "out.running = 0\nprint('text')"

    assert forked(source) == [(8, "stdout", b"text\n")]


def test_the_streams_of_a_fork_are_those_of_its_zygote():
    """User code compares and restores them; `sys.__stdout__` is what `sys.stdout` was."""
    source = "print(sys.stdout is kept, sys.__stdout__ is kept, len(out._raws))"

    assert forked(source) == [(8, "stdout", b"True True 2\n")]


def test_a_stream_that_user_code_put_in_the_place_of_ours_stays_there():
    source = "print('text'); kept.write(sys.stdout.getvalue().upper())"

    assert forked(source, before="import io; sys.stdout = io.StringIO()") == [
        (8, "stdout", b"TEXT\n")
    ]


def test_a_fork_has_pipes_of_its_own_and_none_of_its_zygotes():
    """What one writes to descriptor 1 must not be read, or held up, by the other."""
    before = """def pipes():
    names = (f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd"))
    return {os.readlink(name) for name in names if os.path.islink(name)} - {"/proc/self/fd"}
mine = {name for name in pipes() if name.startswith("pipe:")}
others = len(pipes() - mine)"""
    source = """theirs = {name for name in pipes() if name.startswith("pipe:")}
kept.write(f"{len(mine)} {len(theirs)} {len(mine & theirs)} {others == len(pipes() - theirs)}")"""

    assert forked(source, before=before) == [(8, "stdout", b"2 2 0 True")]


def test_the_descriptors_that_are_an_outputs_own_are_told():
    """Of all pipes that are open, those besides 1 and 2; what else is open is user code's."""
    before = """def pipes():
    opened = (int(n) for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}"))
    links = {n: os.readlink(f"/proc/self/fd/{n}") for n in opened if n > 3}
    return {n for n, link in links.items() if link.startswith("pipe:")}
theirs = os.pipe()
first = pipes() - out.descriptors == set(theirs), len(out.descriptors)"""
    source = "print(*first, pipes() - out.descriptors == set(theirs), len(out.descriptors))"

    assert forked(source, before=before) == [(8, "stdout", b"True 2 True 2\n")]


@pytest.mark.parametrize("lock", ["out._lock", "out._channel._lock"])
def test_a_lock_that_was_held_when_it_was_forked_does_not_hold_a_fork_up(lock: str):
    """The zygote's other thread may write at that moment; it does not exist in the fork."""
    before = f"""held, done = threading.Event(), threading.Event()
def hold():
    with {lock}:
        held.set()
        done.wait()
thread = threading.Thread(target=hold)
thread.start()
held.wait()"""

    told = forked("print('text')", before=before, zygote="done.set()\nthread.join()")
    assert told == [(8, "stdout", b"text\n")]


def test_half_a_line_of_the_zygotes_is_told_by_the_zygote_alone():
    """With the number that it had there, and once, however many are forked."""
    before = "out.write('stdout', 5, b'half')"
    source = "out.flush(5)"

    assert forked(source, before=before, zygote="out.flush(5)") == [(5, "stdout", b"half")]


def test_a_frame_that_a_zygote_could_not_finish_is_not_finished_by_its_fork():
    """Its connection is another: the rest of a frame would be the start of nonsense there."""
    before = "out._channel._rest = b'rest of a frame'"
    source = "print('text')"

    assert forked(source, before=before, zygote="out._channel._rest = b''") == [
        (8, "stdout", b"text\n")
    ]


def test_what_a_zygote_dropped_is_not_counted_again_by_its_forks():
    """It was told, or will be, by the zygote."""
    before = "out._dropped['stdout'] = 1000"
    fork = FORK.format(before=before, zygote="out._dropped['stdout'] = 0", fork="print('text')")
    ((_, message, text),) = heard_of(fork)

    assert (message.dropped, text) == (0, b"text\n")


def test_a_fork_of_a_fork_is_told_too():
    """User code forks as well: that child speaks through the pipe, as in any sandbox."""
    source = """child = os.fork()
if not child:
    print("child")
    sys.stdout.flush()
    os._exit(0)
os.waitpid(child, 0)"""

    assert forked(source) == [(8, "stdout", b"child\n")]


def test_a_zygote_goes_on_as_it_was_after_a_fork():
    """Nothing that `renew` does reaches it."""
    assert forked("print('fork')", zygote="print('zygote')") == [
        (7, "stdout", b"zygote\n"),
        (8, "stdout", b"fork\n"),
    ]
