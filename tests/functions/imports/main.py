"""One way a line: what an import should not do; WAY says which. The handler says what it was."""

import json
import os
import signal
import socket
import sys
import threading
import time

SEAT = 4
held = []


def behaves():
    pass


def waits_for_a_child():
    if os.fork() == 0:
        os._exit(0)
    os.wait()


def leaves_a_child():
    if os.fork() == 0:
        signal.pause()


def leaves_a_daemon():
    """Its parent is gone, and it is in a session of its own."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.pause()
        os._exit(0)
    os.wait()


def leaves_a_thread():
    threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()


def leaves_a_socket():
    held.append(socket.create_server(("127.0.0.1", 0)))


def exits():
    os._exit(7)


def segfaults():
    import ctypes

    ctypes.string_at(0)


def raises():
    raise ValueError("told")


def hangs():
    signal.pause()


def stops_itself():
    os.kill(os.getpid(), signal.SIGSTOP)


def spins():
    while True:
        pass


def takes_memory():
    while True:
        held.append(b"x" * (8 << 20))


def is_a_fork_bomb():
    while True:
        try:
            os.fork()
        except OSError:
            time.sleep(0.001)


def leaves_a_fork_bomb():
    if os.fork() == 0:
        is_a_fork_bomb()


def closes_everything():
    os.closerange(3, 100)


def closes_its_seat():
    os.closerange(SEAT, SEAT + 1)  # where it has none, too


def fills_all_descriptors():
    try:
        while True:
            held.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        pass


def ignores_signals():
    for number in range(1, signal.NSIG):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass


def ignores_dead_children():
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def handles_dead_children():
    signal.signal(signal.SIGCHLD, lambda *_: os.wait())


def blocks_signals():
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))


def forks_no_more():
    def fork():
        raise RuntimeError("no forks")

    os.fork = fork


def forks_nothing():
    """Says that there is a child, but there is none."""
    os.fork = lambda: 12345


def takes_itself_for_the_child():
    os.fork = lambda: 0


def forks_twice():
    """Both children take themselves for the sandbox."""
    fork = os.fork
    os.fork = lambda: fork() and fork()


def say(*datagrams):
    """To the keeper, where there is one."""
    try:
        with socket.socket(fileno=os.dup(SEAT)) as seat:
            for datagram in datagrams:
                seat.send(datagram)
    except OSError as error:  # imported in a sandbox of its own, where there is none
        print(f"nobody hears: {error}")


def ended(sandbox, code):
    return json.dumps({"sandbox": sandbox, "code": code}).encode()


def says_garbage():
    say(os.urandom(200))


def says_nothing():
    say(b"")


def says_much():
    say(b"x" * 100_000)


def says_an_array():
    say(b"[]")


def says_deep_things():
    say(b"[" * 4000)


def says_numbers_that_are_none():
    say(b'{"sandbox": "sb-1", "code": NaN}')


def says_infinity():
    say(b'{"sandbox": "sb-1", "code": Infinity}')


def says_huge_numbers():
    say(b'{"sandbox": "sb-1", "code": ' + b"9" * 4000 + b"}")


def says_odd_codes():
    say(*(ended("sb-1", code) for code in (-65, 256, 2**40, "1", True, 1.5)))


def says_odd_names():
    say(*(ended(name, 1) for name in ("", "\ud800", "../sb-1", "x" * 3000, 7, None)))


def says_that_all_have_ended():
    """Of every sandbox that there may be, of whomever."""
    say(*(ended(f"sb-{kind}{i}", 99) for i in range(1, 300) for kind in ("", "z")))


def passes_descriptors():
    try:
        with socket.socket(fileno=os.dup(SEAT)) as seat:
            for _ in range(20):
                socket.send_fds(seat, [ended("sb-1", 1)], [0] * 250)
    except OSError as error:
        print(f"nobody takes them: {error}")


def talks_without_end():
    """From a process of its own, which nobody has forked but it."""
    if os.fork() == 0:
        if os.fork() == 0:
            while True:
                says_that_all_have_ended()
        os._exit(0)
    os.wait()


def kills(pid, number):
    try:
        os.kill(pid, number)
    except OSError as error:
        print(f"refused: {error}")


def kills_everybody():
    kills(-1, signal.SIGKILL)


def kills_its_group():
    kills(0, signal.SIGKILL)


def kills_pid_1():
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP):
        kills(1, number)


def interrupts_pid_1():
    kills(1, signal.SIGINT)
    time.sleep(0.2)


def wakes_pid_1():
    for _ in range(10_000):
        kills(1, signal.SIGCHLD)


def cripples_pid_1():
    import resource

    for name in ("NOFILE", "NPROC", "AS", "DATA", "STACK", "CPU"):
        try:
            resource.prlimit(1, getattr(resource, f"RLIMIT_{name}"), (1, 1))
        except OSError as error:
            print(f"refused: {error}")


def leaves_its_namespaces():
    """Its own forks are to enter others."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x10000000) < 0:
        print("refused")


def limits_itself():
    """No system call but those that it needs to go on for now."""
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))


def cannot_be_looked_at():
    import ctypes

    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)


def prints_without_end():
    for _ in range(2000):
        print("x" * 8000)


def speaks_on_the_connection():
    os.write(3, os.urandom(4096))


def breaks_the_runtime():
    for name in [name for name in sys.modules if name.split(".")[0] == "dayfly"]:
        sys.modules[name] = None
    sys.modules["json"] = sys.modules["os"] = None
    builtins = sys.modules["builtins"]
    builtins.print = builtins.len = builtins.open = None


WAYS = dict(globals())
WAY = os.environ["WAY"]
WAYS[WAY]()


def handler(event, context):
    return WAY
