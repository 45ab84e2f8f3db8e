"""Tries to reach whoever else there is: the process it was forked from, and others like it."""

import ctypes
import os
import signal
import socket

PIDS = range(2, 1 << 16)
PTRACE_SEIZE, PTRACE_ATTACH = 0x4206, 16
libc = ctypes.CDLL(None)


def mine():
    return {os.getpid(), os.getppid()} | {int(task) for task in os.listdir("/proc/self/task")}


def tried(work, *arguments):
    try:
        return work(*arguments) is not False
    except OSError:
        return False


def signals():
    """To every number there may be, one by one and as groups; it lives on itself."""
    return [
        [name, pid]
        for name, work in (("kill", os.kill), ("killpg", os.killpg))
        for pid in set(PIDS) - mine()
        if tried(work, pid, signal.SIGKILL)
    ]


def memories():
    return [
        [name, pid]
        for pid in set(PIDS) - mine()
        for name in ("mem", "maps", "environ", "root", "fd")
        if os.path.lexists(f"/proc/{pid}/{name}") or not libc.ptrace(PTRACE_SEIZE, pid, 0, 0)
    ]


def parent():
    """Pid 1 is its own and may be seen, but not entered."""
    found = [["ptrace", 1]] if libc.ptrace(PTRACE_ATTACH, 1, 0, 0) == 0 else []
    for name in ("mem", "environ", "fd/3", "root/tmp", "cwd/tmp"):
        if tried(lambda name=name: os.close(os.open(f"/proc/1/{name}", os.O_RDONLY))):
            found.append([name, 1])
    for name in ("ns/pid", "ns/mnt", "ns/net"):
        if tried(os.readlink, f"/proc/1/{name}"):
            found.append([name, 1])
    return found


def sockets():
    found = []
    with open("/proc/net/unix") as file:
        names = [line.split()[7] for line in file.readlines()[1:] if len(line.split()) > 7]
    for name in names:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
            if tried(client.connect, name.replace("@", "\0")):
                found.append(["connect", name])
    for number in range(4, 256):
        if tried(os.fstat, number) and tried(socket.socket, -1, -1, -1, number):
            found.append(["socket", number])
    return found


def handler(event, context):
    if event == "everybody":  # in its process group: it may well be its own end
        os.kill(0, signal.SIGKILL)
    if event == "all":
        tried(os.kill, -1, signal.SIGKILL)
        tried(os.kill, 1, signal.SIGKILL)
        tried(os.kill, 1, signal.SIGTERM)
        return []
    return {"signals": signals, "memories": memories, "parent": parent, "sockets": sockets}[event]()
