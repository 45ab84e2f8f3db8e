"""One way a line: what a handler should not do."""

import os
import signal
import sys
import threading
import time


class Hostile:
    def __str__(self):
        raise RuntimeError("no words")

    __repr__ = __str__


class HostileError(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def behaves():
    return "well"


def raises():
    raise KeyError("told")


def raises_hostile():
    raise HostileError


def raises_much():
    raise ValueError("\U0001f41b" * 100_000)


def exits():
    sys.exit(3)


def dies():
    os._exit(4)


def dies_with_heirs():
    """The children keep every descriptor open, the connection too."""
    if os.fork() == 0:
        os.setsid()
        time.sleep(3600)
    os._exit(4)


def segfaults():
    import ctypes

    ctypes.string_at(0)


def aborts():
    os.abort()


def stops_itself():
    os.kill(os.getpid(), signal.SIGSTOP)


def kills_pid_1():
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(1, number)
        except PermissionError:
            pass
    return "still here"


def kills_everybody():
    try:
        os.kill(-1, signal.SIGKILL)
    except ProcessLookupError:
        pass  # nobody else is in reach
    os.kill(os.getpid(), signal.SIGKILL)


def closes_everything():
    os.closerange(0, 65536)
    time.sleep(3600)


def covers_the_socket():
    os.dup2(os.open("/dev/null", os.O_RDWR), 3)
    return "unheard"


def unserializable():
    return object()


def circular():
    loop = []
    loop.append(loop)
    return loop


def hostile_value():
    return {"statusCode": 200, "body": "x", "headers": {"X": Hostile()}}


def deep():
    value = []
    for _ in range(100_000):
        value = [value]
    return value


def surrogates():
    return {"statusCode": 200, "body": "x", "headers": {"X": "\ud800"}}


def surrogate_body():
    return "\ud800"


def bad_base64():
    return {"statusCode": 200, "isBase64Encoded": True, "body": "abc"}


def bad_status():
    return {"statusCode": 99}


def odd_status():
    return {"statusCode": "²00"}


def big():
    return "x" * (7 << 20)


def many_headers():
    return {"statusCode": 200, "headers": {f"X-{i}": "1" for i in range(100_000)}, "body": ""}


def some_headers():
    return {"statusCode": 200, "headers": {f"X-{i}": "1" for i in range(200)}, "body": ""}


def injects_value():
    return {"statusCode": 200, "headers": {"X-A": "1\r\nSet-Cookie: stolen=1"}, "body": "x"}


def injects_newline():
    return {"statusCode": 200, "headers": {"X-A": "1\nX-Evil: 1"}, "body": "x"}


def injects_name():
    return {"statusCode": 200, "headers": {"X-A\r\nX-Evil": "1"}, "body": "x"}


def injects_cookie():
    return {"statusCode": 200, "cookies": ["a=1\r\n\r\n<html>"], "body": "x"}


def injects_type():
    return {"statusCode": 200, "headers": {"Content-Type": "text/html\r\nX-Evil: 1"}, "body": "x"}


def injects_nul():
    return {"statusCode": 200, "headers": {"X-A": "1\0"}, "body": "x"}


def recursion():
    return recursion()


def returns_in_a_child():
    """Both come back from the handler: only the parent may answer."""
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
    return pid != 0


def leaves_threads():
    for _ in range(20):
        threading.Thread(target=time.sleep, args=(3600,)).start()
    return "left"


WAYS = dict(globals())


def handler(event, context):
    if isinstance(event, dict):
        event = event["rawPath"][1:]
    return WAYS[event]()
