"""Waits beside its zygote for each sandbox's pid 1 to be born, and tries to open its memory.

It has one moment too many if that process gives its rights away before it is out of reach.
"""

import mmap
import os
import signal

AFTER_THE_IMPORT_S = 0.03
tally = mmap.mmap(-1, 4096)
"""How many it has seen, how many it has opened, and the most descriptors that one of these had."""


def lurk(zygote):
    met = set()
    while True:
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            if pid > zygote and pid != os.getpid() and pid not in met and is_pid_1(pid):
                met.add(pid)
                tally[0] += 1
                tally[1] += opens(pid)


def is_pid_1(pid):
    """Of a sandbox: the keeper's other children."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return "PPid:\t1\n" in file.read()
    except OSError:
        return False


def opens(pid):
    """Whether its memory can be opened at one moment before it is nobody's, or gone."""
    try:
        while os.stat(f"/proc/{pid}").st_uid == os.getuid():
            for _ in range(20):
                try:
                    memory = os.open(f"/proc/{pid}/mem", os.O_RDWR)
                except PermissionError:
                    continue
                os.kill(pid, signal.SIGSTOP)
                tally[2] = max(tally[2], len(os.listdir(f"/proc/{pid}/fd")))
                os.kill(pid, signal.SIGCONT)
                os.close(memory)
                return True
    except OSError:
        pass
    return False


def begin(*_):
    zygote = os.getpid()
    if os.fork() == 0:
        lurk(zygote)


signal.signal(signal.SIGALRM, begin)
signal.setitimer(signal.ITIMER_REAL, AFTER_THE_IMPORT_S)


def handler(event, context):
    return {"seen": tally[0], "opened": tally[1], "descriptors": tally[2]}
