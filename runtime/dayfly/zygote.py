"""A zygote: a warm interpreter that sandboxes are forked from.

It runs in a jail like any sandbox's and holds no user code and no secret: the runtime and what the
environment preloads, nothing else. Every sandbox gets namespaces, mounts, groups and a connection
of its own, and then is what a started one is: generic, waiting for `Load`, not locked down yet.

    zygote -- fork --> pid 1 of the sandbox -- fork --> the guest
    (waits for the next)  (groups; buries orphans)      (namespaces, mounts; `serve` returns)

The launcher asks on descriptor 3, in JSON datagrams: `fork` with the sandbox's name, and as
descriptors the guest's end of its connection and the groups' files to enter; and `retire`. With
`keep` what is forked is to be a function's zygote: see `keeper`.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # not `signal`, which builds enums at import
import _socket
import fcntl
import gc
import json
import os
import struct
import sys

from dayfly import lockdown

TYPE_CHECKING = False  # see `record`
if TYPE_CHECKING:
    from typing import Any

    from dayfly.keeper import Seat

CONTROL = 3
DATAGRAM_BYTES_MAX = 4096
DESCRIPTORS_MAX = 16
INIT = "dayfly-init"
"""What pid 1 of a forked sandbox is called."""

OOM_SCORE_ADJ = b"500"
"""Of a sandbox, which is killed before its zygote when the machine runs out of memory."""

CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x02000000, 0x04000000, 0x08000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
NAMESPACES = lockdown.CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
MS_NOEXEC = 8
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
PID_FIRST, PID_SPREAD = 300, 30000


def serve(*, has_network: bool) -> Seat | None:
    """Fork a sandbox for each request; returns in each of these, as their guest.

    What it returns is the seat of a guest that is to be a function's zygote. In this zygote it
    never returns: the process ends when it has been retired, or its launcher is gone, and the last
    of its sandboxes has ended.
    """
    control = _socket.socket(fileno=CONTROL)
    _signal.signal(_signal.SIGCHLD, _signal.SIG_IGN)  # the kernel buries its children
    lockdown.mount("", "/", None, lockdown.MS_REC | lockdown.MS_PRIVATE)
    own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        say(control, say="unfit", why=f"preloading started {threads - 1} threads")
        os._exit(1)
    gc.freeze()
    lockdown.rename("dayfly-zygote")
    say(control, say="ready")
    while request := receive(control):
        sandbox, descriptors = request["sandbox"], request["descriptors"]
        try:
            pid = fork(own)
            if pid == 0:
                return _become(control, sandbox, descriptors, request.get("keep"), has_network)
            announce(control, sandbox, pid)
        except OSError as error:
            say(control, say="refused", sandbox=sandbox, why=f"the zygote cannot fork: {error}")
        for descriptor in descriptors:
            os.close(descriptor)
    while True:
        try:
            os.wait()  # with SIGCHLD ignored: until there is no child any more
        except ChildProcessError:
            os._exit(0)


def announce(control: Any, sandbox: str, pid: int) -> None:
    """Tell the launcher; a child that nobody would know of ends."""
    pidfd = os.pidfd_open(pid)
    try:
        say(control, pidfd, say="forked", sandbox=sandbox)
    except OSError:
        os.kill(pid, _signal.SIGKILL)
        raise
    finally:
        os.close(pidfd)


def fork(own: int) -> int:
    """fork(2) into a new pid namespace, where the child is pid 1."""
    lockdown.unshare(CLONE_NEWPID)
    return fork_and_return(own)


def fork_and_return(own: int) -> int:
    """fork(2) into the pid namespace that was entered for children; *own* is the parent's."""
    try:
        pid = os.fork()
    except OSError:
        lockdown.setns(own, CLONE_NEWPID)
        raise
    if pid:
        lockdown.setns(own, CLONE_NEWPID)  # its own again, or it could not make another one
    return pid


def _become(
    control: Any,
    sandbox: str,
    descriptors: list[int],
    package: dict[str, Any] | None,
    has_network: bool,
) -> Seat | None:
    """As pid 1 of the new sandbox: fork the guest and wait for it; returns only in the guest.

    It does as little as it can: every page that it writes to is a copy of its own.
    """
    try:
        if package is not None:
            from dayfly import keeper

            return keeper.keep(control, sandbox, descriptors, package, has_network)
        guest, *groups = descriptors
        os.setsid()  # process groups reach across pid namespaces
        _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
        for group in groups:
            os.write(group, b"0")  # the caller itself, the only thread
        spread_pids()
        pid = os.fork()
        if pid == 0:
            os.dup2(guest, control.detach())
            os.closerange(CONTROL + 1, 1 << 20)
            furnish(has_network)
            diverge()
            return None
        os.closerange(CONTROL + 1, 1 << 20)
        lockdown.rename(INIT)
        lockdown.drop_rights()
        while (ended := os.wait())[0] != pid:
            pass  # an orphan of the guest's
        code = os.waitstatus_to_exitcode(ended[1])
        say(control, say="exited", sandbox=sandbox, code=code)
    except BaseException as error:
        os.write(2, f"zygote: {sandbox}: {error!r}\n".encode())
        os._exit(1)
    os._exit(0)


def furnish(has_network: bool, temporary: str = "") -> None:
    """In the guest: everything of its own that it was not born with.

    *temporary* are further options of its /tmp and /dev/shm, whose size is set at `Load` else.
    """
    lockdown.write("/proc/self/oom_score_adj", OOM_SCORE_ADJ)
    lockdown.rename("dayfly-guest")
    lockdown.unshare(NAMESPACES if has_network else NAMESPACES | CLONE_NEWNET)
    flags = lockdown.MS_NOSUID | lockdown.MS_NODEV
    lockdown.mount("proc", "/proc", "proc", flags | MS_NOEXEC)
    for place in ("/tmp", "/dev/shm"):
        options = f"mode=1777,{temporary}" if temporary else "mode=1777"
        lockdown.mount("tmpfs", place, "tmpfs", flags, options)
    terminals = "newinstance,ptmxmode=0666,mode=620"
    lockdown.mount("devpts", "/dev/pts", "devpts", lockdown.MS_NOSUID | MS_NOEXEC, terminals)
    if not has_network:
        interface = struct.pack("16sh14x", b"lo", IFF_UP)
        any_socket = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
        fcntl.ioctl(any_socket.fileno(), SIOCSIFFLAGS, interface)
        any_socket.close()


def spread_pids() -> None:
    """Give the guest a process id that its siblings have not.

    Libraries tell by that number that they are in a forked process, and must not go on with the
    random stream that they had.
    """
    start = PID_FIRST + int.from_bytes(os.urandom(2), "big") % PID_SPREAD
    try:
        lockdown.write("/proc/sys/kernel/ns_last_pid", str(start).encode())
    except OSError:
        pass  # a kernel without checkpoints; what we know of is reseeded by hand


def diverge() -> None:
    """In the guest: nothing random goes on as in its siblings."""
    modules = sys.modules
    for name in ("random", "numpy.random"):
        if name in modules:
            modules[name].seed()
    if "_ssl" in modules:
        modules["_ssl"].RAND_add(os.urandom(32), 32.0)
    if "uuid" in modules:
        modules["uuid"]._node = None  # type: ignore[attr-defined]
    if "tempfile" in modules:
        modules["tempfile"]._name_sequence = None  # type: ignore[attr-defined]


def say(control: Any, *descriptors: int, **answer: object) -> None:
    """Send one datagram."""
    packed = struct.pack(f"{len(descriptors)}i", *descriptors)
    rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, packed)] if descriptors else []
    control.sendmsg([json.dumps(answer).encode()], rights)


def receive(control: Any) -> dict[str, Any] | None:
    """The next request, with its `descriptors`; None to retire."""
    space = _socket.CMSG_SPACE(4 * DESCRIPTORS_MAX)
    data, ancillary, _, _ = control.recvmsg(DATAGRAM_BYTES_MAX, space)
    request: dict[str, Any] = json.loads(data or b'{"do": "retire"}')
    if request.get("do") == "retire":
        return None
    descriptors: list[int] = []
    for _, _, packed in ancillary:
        descriptors += struct.unpack(f"{len(packed) // 4}i", packed)
    request["descriptors"] = descriptors
    return request
