"""Speaks on the sandbox's own connection, descriptor 3, beside the runtime or instead of it."""

import array
import errno
import os
import socket
import struct
import time
from random import Random

HEADER = struct.Struct("!IBBHQ")
HELLO, LOAD, LOADED, INVOKE, RESULT, FAILED, LOG = range(1, 8)

wire = socket.socket(fileno=os.dup(3))


def pack(value):
    """msgpack, by hand: what the runtime's own copy could not be made to send."""
    if value is None:
        return b"\xc0"
    if value is True or value is False:
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, float):
        return b"\xcb" + struct.pack("!d", value)
    if isinstance(value, int):
        return b"\xd3" + struct.pack("!q", value)
    if isinstance(value, str):
        return b"\xdb" + struct.pack("!I", len(value.encode())) + value.encode()
    if isinstance(value, bytes):
        return b"\xc6" + struct.pack("!I", len(value)) + value
    if isinstance(value, list):
        return b"\xdd" + struct.pack("!I", len(value)) + b"".join(map(pack, value))
    items = b"".join(pack(k) + pack(v) for k, v in value.items())
    return b"\xdf" + struct.pack("!I", len(value)) + items


def frame(kind, invocation, meta, body=b"", zero=0):
    packed = meta if isinstance(meta, bytes) else pack(meta)
    head = HEADER.pack(len(packed) + len(body), kind, zero, len(packed), invocation)
    return head + packed + body


def result(number, body=b"forged", **more):
    meta = {"handler_s": 0.0, "status": 200, "headers": []} | more
    return frame(RESULT, number, meta, body)


def failed(number, **more):
    return frame(
        FAILED, number, {"kind": "Raised", "message": "m", "traceback": "", "handler_s": 0.0} | more
    )


def log(body, number=0, **more):
    return frame(LOG, number, {"stream": "stdout", "dropped": 0} | more, body)


def say(data):
    wire.sendall(data)
    time.sleep(60)


def own():
    """The number of this invocation: the runtime's own frames count them from 1."""
    return own.number


own.number = 0

ATTACKS = {
    "another invocation": lambda: say(result(own() + 1)),
    "invocation 0": lambda: say(result(0)),
    "a huge number": lambda: say(result(2**64 - 1)),
    "hello again": lambda: say(
        frame(HELLO, 0, {"protocol": 1, "python": "3", "preload_failures": []})
    ),
    "hello as the answer": lambda: say(
        frame(HELLO, own(), {"protocol": 1, "python": "3", "preload_failures": []})
    ),
    "loaded as the answer": lambda: say(
        frame(
            LOADED,
            own(),
            {"slots": 9, "import_s": 0.0, "lockdown_s": 0.0, "cap_eff": 0, "no_new_privs": 1}
            | {"seccomp": 2, "landlock": 6},
        )
    ),
    "a request": lambda: say(
        frame(INVOKE, own(), {"id": "x", "remaining_s": 1.0, "http": None, "trace": ""})
    ),
    "garbage": lambda: say(os.urandom(4096)),
    "zeroes": lambda: say(bytes(4096)),
    "text": lambda: say(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    "a huge length": lambda: say(HEADER.pack(2**32 - 1, RESULT, 0, 10, own())),
    "meta longer than the frame": lambda: say(HEADER.pack(4, RESULT, 0, 400, own()) + b"xxxx"),
    "an unknown kind": lambda: say(frame(99, own(), {})),
    "a reserved byte": lambda: say(frame(RESULT, own(), {}, zero=1)),
    "no msgpack": lambda: say(frame(RESULT, own(), b"\xc1\xc1\xc1")),
    "an array": lambda: say(frame(RESULT, own(), [1, 2, 3])),
    "a field missing": lambda: say(frame(RESULT, own(), {"handler_s": 0.0, "status": 200})),
    "a field too many": lambda: say(result(own(), extra=1)),
    "a field of another type": lambda: say(result(own(), status="200")),
    "a map of a million": lambda: say(
        frame(RESULT, own(), b"\xdf\x00\x0f\x42\x40" + b"\xc0" * 1000)
    ),
    "deep nesting": lambda: say(frame(RESULT, own(), b"\x91" * 60000)),
    "deep headers": lambda: say(result(own(), headers=[[[[[[[[[[[["x"]]]]]]]]]]]])),
    "not a number": lambda: say(result(own(), handler_s=float("nan"))),
    "for ever": lambda: say(result(own(), handler_s=float("inf"))),
    "before it began": lambda: say(result(own(), handler_s=-1.0)),
    "a made-up failure": lambda: say(failed(own(), kind="TimedOut\n" + "x" * 1000)),
    "a platform failure": lambda: say(failed(own(), kind="OutOfDisk")),
    "big logs": lambda: say(log(b"x" * 1_000_000)),
    "many logs": lambda: say(log(b"x\n") * 100_000),
}
"""Each breaks the protocol: the sandbox must end, at once, with that cause."""


def twice():
    wire.sendall(result(own(), b"first") + result(own(), b"second"))
    time.sleep(60)


def drip():
    """A frame that is good but for its speed: a byte at a time, and never the last."""
    for byte in result(own(), b"x" * 1000)[:-1]:
        wire.sendall(bytes([byte]))
    time.sleep(60)


def descriptors():
    """Open files, passed to a server that never asked for any."""
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(100)]
    data = log(b"with descriptors\n")
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", held))]
    sent = 0
    while sent < 20:
        try:
            wire.sendmsg([data], ancillary)
            sent += 1
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS:  # as many are on their way as may be open
                raise
            time.sleep(0.001)
    for descriptor in held:
        os.close(descriptor)
    return "sent"


def fuzz(seed):
    """A good stream with a few bytes changed, lost or doubled, the same for the same seed."""
    random = Random(seed)
    stream = bytearray(log(b"a line\n") + result(own(), b"x" * 100) + failed(own()) + log(b"y\n"))
    for _ in range(random.randint(1, 8)):
        at = random.randrange(len(stream))
        way = random.randrange(4)
        if way == 0:
            stream[at] = random.randrange(256)
        elif way == 1:
            del stream[at : at + random.randint(1, 20)]
        elif way == 2:
            stream[at:at] = stream[at : at + random.randint(1, 20)]
        else:
            stream[at : at + 4] = struct.pack("!I", random.choice([0, 1, 2**31, 2**32 - 1, 70000]))
    wire.sendall(stream)
    time.sleep(60)


def odd_headers(value):
    wire.sendall(result(own(), b"x", headers=value))
    time.sleep(60)


ODD = {
    "numbers": [1, 2],
    "a map": [{"a": 1, "b": 2}],
    "strings": ["ab"],
    "triples": [["a", "b", "c"]],
    "bytes": [[b"a", b"b"]],
    "none": [None],
}


def handler(event, context):
    own.number += 1
    if isinstance(event, int):
        return fuzz(event)
    if event in ATTACKS:
        return ATTACKS[event]()
    if event in ODD:
        return odd_headers(ODD[event])
    if event == "count":
        return own.number
    return {"twice": twice, "drip": drip, "descriptors": descriptors}[event]()


def over_http(event, context):
    return handler(event["queryStringParameters"]["attack"], context)
