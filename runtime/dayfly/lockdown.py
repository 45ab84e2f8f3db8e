"""From trusted to untrusted: the steps that a guest takes between `Load` and the first user code.

Until `lock_down` returns, only code of Dayfly's and the operator's has run in this process. The
order matters: mounts need the capabilities that the later steps give away for good.

    prepare    (while generic)  the seccomp filter, which the driver compiled; the Landlock ruleset
    mount_code                  the one package at /code, the package store covered, /tmp sized
    folders.mount               of a step: what it is given and leaves, the stores covered
    lock_down                   rlimits, a user namespace without rights, no capabilities,
                                no_new_privs, Landlock, seccomp; then the kernel is asked to confirm

A function's zygote takes `lock_down_zygote` before it imports user code: the same but for the
rights that its forks need to take `lock_down` in namespaces that are ready for them.
"""

import ctypes
import os
import resource
import struct

from dayfly.capabilities import ZYGOTE_CAP_EFF, ZYGOTE_CAPABILITIES
from dayfly.record import Record

CODE = "/code"
HIDDEN = ("run",)
"""Where a pod has its secret."""

PACKAGES = "/packages"
EMPTY = "/empty"
USER = 1000
MACHINE = os.uname().machine

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC = 1, 2, 4, 32, 4096, 16384
MS_PRIVATE = 1 << 18
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 24, 38, 47, 4
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36
SYS_SECCOMP = {"x86_64": 317, "aarch64": 277}
SECCOMP_SET_MODE_FILTER = 1
SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT = 444, 445, 446
LANDLOCK_VERSION, LANDLOCK_RULE_PATH_BENEATH = 1, 1

_READ = 0b1101  # execute, read a file, read a folder
_LIST = 0b1000
_WRITE = 0b10
_DEVICES = ("null", "zero", "full", "random", "urandom")
_LANDLOCK_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # file system rights known by ABI

is_ours_alone = False
"""Whether this process is locked down: all that it could signal then is of its own sandbox."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
for _name in ("capset", "mount", "setns", "syscall", "unshare"):
    getattr(_libc, _name)  # made once, in the zygote, and not again in all that it forks


def check(result: int, what: str) -> int:
    """*result* of a call of libc's; raises OSError with errno when it is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2); raises OSError that names the target."""
    packed = [v.encode() if v is not None else None for v in (source, target, kind, options)]
    check(_libc.mount(packed[0], packed[1], packed[2], flags, packed[3]), f"mount {target}")


def remount(target: str, flags: int) -> None:
    """Change the flags of a mount."""
    mount("", target, None, MS_REMOUNT | MS_BIND | flags)


def unshare(flags: int) -> None:
    """unshare(2)."""
    check(_libc.unshare(flags), "unshare")


def setns(descriptor: int, kind: int) -> None:
    """setns(2)."""
    check(_libc.setns(descriptor, kind), "setns")


def rename(name: str) -> None:
    """Call this process *name* (at most 15 characters) where processes are listed."""
    write("/proc/self/comm", name.encode())


def prctl(option: int, *args: int) -> int:
    """prctl(2)."""
    return check(_libc.prctl(option, *(*args, 0, 0, 0, 0)[:4]), f"prctl {option}")


def landlock_abi() -> int:
    """The Landlock version of this kernel, 0 when it has none."""
    return max(0, int(_libc.syscall(SYS_LANDLOCK_CREATE, None, 0, LANDLOCK_VERSION)))


class Prepared(Record):
    """What can be made before the function is known, so that `Load` need not wait for it."""

    seccomp: bytes
    landlock: int | None
    landlock_abi: int


def prepare(seccomp: bytes, *, is_zygote: bool = False) -> Prepared:
    """Build the Landlock ruleset; call it in the finished mounts. *seccomp* is the filter.

    A zygote has no ruleset: one that names its mounts would shut its forks out of theirs.
    """
    abi = 0 if is_zygote else landlock_abi()
    return Prepared(
        seccomp=seccomp,
        landlock=_ruleset(abi) if abi else None,
        landlock_abi=abi,
    )


def prepare_in_pod(seccomp: bytes) -> Prepared:
    """The same in a pod, whose mounts are as they are: what lies in `HIDDEN` is out of reach."""
    abi = landlock_abi()
    return Prepared(
        seccomp=seccomp,
        landlock=_ruleset(abi, hidden=HIDDEN) if abi else None,
        landlock_abi=abi,
    )


def _ruleset(abi: int, hidden: tuple[str, ...] = ()) -> int:
    """Reading and executing everywhere; writing only in /tmp, /dev/shm and harmless devices.

    Of the top folders that are *hidden* nothing can be read but names.
    """
    rights = (1 << _LANDLOCK_RIGHTS.get(abi, 16)) - 1
    scoped = 0b11 if abi >= 6 else 0  # abstract Unix sockets and signals stay inside
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    attributes = struct.pack("=QQQ", rights, 0, scoped)[:size]
    ruleset = check(_libc.syscall(SYS_LANDLOCK_CREATE, attributes, size, 0), "landlock")
    write_device = _READ | _WRITE | (1 << 15 if abi >= 5 else 0) | (1 << 14 if abi >= 3 else 0)
    paths = {"/": _READ}
    if hidden:
        shown = [f"/{name}" for name in os.listdir("/") if name not in hidden]
        paths = {path: _READ if os.path.isdir(path) else _READ & ~_LIST for path in shown}
        paths["/"] = _LIST
    paths |= {"/tmp": rights, "/dev/shm": rights}
    paths |= {f"/dev/{name}": write_device & ~0b1000 for name in _DEVICES}
    for path, allowed in paths.items():
        _allow(ruleset, path, allowed)
    return ruleset


def _allow(ruleset: int, path: str, rights: int) -> None:
    beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", rights, beneath)
    added = _libc.syscall(SYS_LANDLOCK_ADD, ruleset, LANDLOCK_RULE_PATH_BENEATH, rule, 0)
    check(added, f"landlock {path}")
    os.close(beneath)


def allow_writing(prepared: Prepared, path: str) -> None:
    """Below *path* as in /tmp. What is mounted there later would not be meant."""
    if prepared.landlock is not None:
        rights = (1 << _LANDLOCK_RIGHTS.get(prepared.landlock_abi, 16)) - 1
        _allow(prepared.landlock, path, rights)


def mount_code(digest: str, tmp_mb: int) -> None:
    """Bind package *digest* read-only at /code, put the store out of reach, size /tmp."""
    if len(digest) != 64 or not digest.isalnum():
        raise ValueError(f"not a package digest: {digest!r}")
    mount(f"{PACKAGES}/{digest}", CODE, None, MS_BIND)
    remount(CODE, MS_RDONLY | MS_NOSUID | MS_NODEV)
    # covered, not unmounted: that would wait 2-4 ms for every processor to have passed by (RCU),
    # and without capabilities nobody lifts the cover again
    mount(EMPTY, PACKAGES, None, MS_BIND)
    options = tmp_options(tmp_mb)
    mount("", "/tmp", None, MS_REMOUNT | MS_NOSUID | MS_NODEV, options)
    mount("", "/dev/shm", None, MS_REMOUNT | MS_NOSUID | MS_NODEV, options)


def tmp_options(tmp_mb: int) -> str:
    """For a tmpfs that holds at most so many MiB, in files of 4 KiB on average."""
    return f"size={tmp_mb}m,nr_inodes={max(1024, tmp_mb * 256)}"


def limit(*, open_files: int, memory_bytes: int | None, file_bytes: int = 0) -> None:
    """Set this process's resource limits for good.

    *memory_bytes* only where no cgroup holds it; no file may be over *file_bytes*, if there are.
    """
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: open_files,
        resource.RLIMIT_MEMLOCK: 1 << 20,
    }
    if memory_bytes is not None:
        limits[resource.RLIMIT_DATA] = memory_bytes
    if file_bytes:
        limits[resource.RLIMIT_FSIZE] = file_bytes
    _set_limits(limits)


def _set_limits(limits: dict[int, int]) -> None:
    for which, wanted in limits.items():
        hard = resource.getrlimit(which)[1]
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(which, (value, value))


def lock_down(prepared: Prepared, processes: int) -> None:
    """Give away every right, for good. What runs next may be anybody's code.

    *processes* is how many it may have besides the guest and its thread.
    """
    global is_ours_alone
    _become_nobody()
    # now, and not before: the kernel counts a user namespace's processes against the limit that its
    # maker had, and that of a forked sandbox's would count its siblings too
    _set_limits({resource.RLIMIT_NPROC: processes + 2})
    drop_rights()
    _confine(prepared)
    is_ours_alone = True


def lock_down_in_pod(prepared: Prepared, processes: int) -> None:
    """Give away every right, for good, in a pod: it has no capabilities, and a uid of its own."""
    global is_ours_alone
    _set_limits({resource.RLIMIT_NPROC: processes + 3})  # the porter is one of them, too
    drop_rights()
    _confine(prepared)
    is_ours_alone = True


def lock_down_zygote(prepared: Prepared) -> None:
    """Give away all but what its forks need to lock themselves down. User code runs next."""
    drop_rights(but=ZYGOTE_CAPABILITIES)
    _confine(prepared)


def _confine(prepared: Prepared) -> None:
    if prepared.landlock is not None:
        restricted = _libc.syscall(SYS_LANDLOCK_RESTRICT, prepared.landlock, 0)
        check(restricted, "landlock restrict")
        os.close(prepared.landlock)
    _install(prepared.seccomp)


def drop_rights(but: tuple[int, ...] = ()) -> None:
    """No capabilities, now or ever, *but* those."""
    for capability in range(64):
        dropped = capability in but or _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) >= 0
        if not dropped:
            break  # one past the last capability of this kernel
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    kept = sum(1 << capability for capability in but)
    header, sets = struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", kept, kept, 0, 0, 0, 0)
    check(_libc.capset(header, sets), "capset")
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def _become_nobody() -> None:
    """A user namespace of our own in which no further one can be made."""
    uid, gid = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER)
    write("/proc/self/setgroups", b"deny")
    write("/proc/self/uid_map", f"{USER} {uid} 1".encode())
    write("/proc/self/gid_map", f"{USER} {gid} 1".encode())
    write("/proc/sys/user/max_user_namespaces", b"0")


def write(path: str, data: bytes) -> None:
    """Write to one of the kernel's files, in one call."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def _install(filter_: bytes) -> None:
    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    program = Program(len(filter_) // 8, filter_)
    number = SYS_SECCOMP[MACHINE]
    done = _libc.syscall(number, SECCOMP_SET_MODE_FILTER, 0, ctypes.byref(program))
    check(done, "seccomp")


class Rights(Record):
    """What the kernel says this process may still do."""

    cap_eff: int
    no_new_privs: int
    seccomp: int


LOCKED = Rights(cap_eff=0, no_new_privs=1, seccomp=2)
LOCKED_ZYGOTE = Rights(cap_eff=ZYGOTE_CAP_EFF, no_new_privs=1, seccomp=2)


def rights() -> Rights:
    """Read from /proc/self/status; a locked-down guest has `LOCKED`."""
    values = dict(
        line.split(":\t", 1) for line in _read("/proc/self/status").splitlines() if ":\t" in line
    )
    return Rights(
        cap_eff=int(values["CapEff"], 16),
        no_new_privs=int(values["NoNewPrivs"]),
        seccomp=int(values["Seccomp"]),
    )


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()
