"""The escape battery: everything that code in a sandbox might try, each in a process of its own.

A probe that returns is "open"; one that raises OSError or `Closed`, or dies of a signal, is
"closed". Anything else is a defect of the probe and is told as "error". x86-64 only.
"""

import array
import contextlib
import ctypes
import errno
import fcntl
import glob
import encodings.idna  # noqa: F401  (before we are somebody who cannot read it)
import json
import mmap
import os
import pty
import resource
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time

libc = ctypes.CDLL(None, use_errno=True)
PROBES = {}
GIVEN = {}
PROBE_S_MAX = 3


class Closed(Exception):
    """Not refused by an error, yet of no use."""


def probe(name):
    def keep(function):
        assert name not in PROBES, name
        PROBES[name] = function
        return function

    return keep


def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def syscall(number, *arguments):
    packed = [
        a if isinstance(a, (bytes, type(None))) else ctypes.c_long(a) if isinstance(a, int) else a
        for a in arguments
    ]
    return check(libc.syscall(ctypes.c_long(number), *packed))


def every(prefix, cases):
    """One probe for each of *cases*, a map of names to functions."""
    for name, function in cases.items():
        probe(f"{prefix} {name}")(function)


def read(path, size=4096):
    with open(path, "rb", buffering=0) as file:
        return file.read(size)


def must(truth, why="nothing to be seen"):
    if not truth:
        raise Closed(why)


def write(path, text=b"x"):
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text)
    finally:
        os.close(descriptor)


# ---- files of the host -----------------------------------------------------------------------

every(
    "read",
    {
        path: lambda path=path: must(read(path))
        for path in (
            "/etc/shadow",
            "/etc/machine-id",
            "/etc/sudoers",
            "/etc/ssl/private",
            "/root/.bash_history",
            "/root/.ssh/id_rsa",
            "/var/log/dpkg.log",
            "/proc/kcore",
            "/proc/kmsg",
            "/proc/keys",
            "/proc/vmallocinfo",
            "/proc/slabinfo",
            "/proc/pagetypeinfo",
            "/proc/kpagecount",
            "/proc/kpageflags",
            "/proc/timer_list",
            "/proc/config.gz",
            "/proc/interrupts",
            "/proc/cmdline",
            "/proc/version",
            "/proc/cpuinfo",
            "/proc/meminfo",
            "/proc/loadavg",
            "/proc/diskstats",
            "/proc/1/environ",
            "/proc/1/mem",
            "/proc/1/maps",
            "/proc/1/auxv",
            "/proc/1/stack",
            "/proc/1/io",
            "/proc/1/cmdline",
            "/proc/1/mountinfo",
            "/proc/1/status",
            "/dev/mem",
            "/dev/kmsg",
            "/dev/vda",
            "/dev/sda",
            "/dev/kvm",
            "/dev/fuse",
            "/dev/net/tun",
            "/sys/kernel/notes",
            "/sys/kernel/security/lsm",
        )
    },
)


def entries(path, expected=()):
    found = set(os.listdir(path)) - set(expected)
    must(found)


every(
    "list",
    {
        "/home": lambda: entries("/home"),
        "/work": lambda: entries("/work"),
        "/root beyond the interpreter": lambda: entries("/root", [".pyenv", ".local"]),
        "/var": lambda: entries("/var"),
        "/run": lambda: entries("/run"),
        "/mnt": lambda: entries("/mnt"),
        "/srv": lambda: entries("/srv"),
        "/opt": lambda: entries("/opt"),
        "/sys": lambda: entries("/sys"),
        "/boot": lambda: entries("/boot"),
        "/packages": lambda: entries("/packages"),
        "/artifacts": lambda: entries("/artifacts"),
        "/steps": lambda: entries("/steps"),
        "/layers": lambda: entries("/layers"),
        "/empty": lambda: entries("/empty"),
        "/newroot": lambda: entries("/newroot"),
        "/oldroot": lambda: entries("/oldroot"),
        "/proc/1/fd": lambda: entries("/proc/1/fd"),
        "/proc/1/root": lambda: entries("/proc/1/root"),
        "/proc/1/cwd": lambda: entries("/proc/1/cwd"),
        "/proc/1/task/1/cwd": lambda: entries("/proc/1/task/1/cwd"),
        "/proc/1/map_files": lambda: entries("/proc/1/map_files"),
        "/tmp of the host": lambda: entries("/tmp"),
    },
)
every(
    "find",
    {
        "a file of the host": lambda: read(GIVEN["file"]),
        "it by going up": lambda: read("../" * 20 + GIVEN["file"].lstrip("/")),
        "it from pid 1's root": lambda: read("/proc/1/root" + GIVEN["file"]),
        "it from our own root": lambda: read("/proc/self/root" + GIVEN["file"]),
        "it below the old root": lambda: read("/oldroot" + GIVEN["file"]),
        "the server's database": lambda: read(GIVEN["data"] + "/dayfly.sqlite"),
        "the server's process": lambda: (
            os.stat(f"/proc/{GIVEN['server']}").st_ino and same(GIVEN["server"])
        ),
        "the host's name": lambda: must(os.uname().nodename == GIVEN["hostname"]),
        "the host's paths in the mount table": lambda: must(
            GIVEN["data"].encode() in read("/proc/self/mountinfo", 1 << 20)
        ),
        "the host's sockets in /proc/net": lambda: must(
            f":{GIVEN['port']:04X} ".encode() in read("/proc/net/tcp", 1 << 20)
        ),
        "the host's users": lambda: of_the_host("passwd"),
        "the host's groups": lambda: of_the_host("group"),
        "the host's names": lambda: of_the_host("hosts"),
        "the host's resolver": lambda: of_the_host("resolv.conf"),
        "the host's name in a file": lambda: of_the_host("hostname"),
        "what pid 1 holds": lambda: holds(1),
        "another function's code": lambda: must(glob.glob("/packages/*") or glob.glob("/mnt/*")),
    },
)


def of_the_host(name):
    """Whether the file is the host's own: it holds the host's line (given backwards)."""
    must(
        GIVEN["etc_backwards"][name]
        and GIVEN["etc_backwards"][name].encode()[::-1] in read(f"/etc/{name}", 1 << 20)
    )


def holds(pid):
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            os.readlink(f"/proc/{pid}/fd/{number}")
            return
    raise Closed("numbers only")


def same(pid):
    must(b"dayfly" in read(f"/proc/{pid}/cmdline"))


@probe("see processes that are not ours")
def _():
    own = {os.getpid(), os.getppid(), 1}
    must({int(p) for p in os.listdir("/proc") if p.isdigit()} - own)


@probe("read addresses in /proc/kallsyms")
def _():
    lines = read("/proc/kallsyms", 65536).splitlines()
    must(any(int(line.split()[0], 16) for line in lines[:200]), "zeroes only")


@probe("read addresses in /proc/iomem")
def _():
    lines = read("/proc/iomem", 65536).splitlines()
    must(any(int(line.strip().split(b"-")[0], 16) for line in lines), "zeroes only")


# ---- secrets in memory and environments -------------------------------------------------------


def backwards(data):
    """Whether one of the secrets, which we hold only backwards, stands in *data*."""
    turned = data[::-1]
    return any(secret.encode() in turned for secret in GIVEN["secrets_backwards"])


@probe("find a secret in an environment")
def _():
    must(any(backwards(read(f"/proc/{pid}/environ", 1 << 20)) for pid in readable("environ")))


@probe("find a secret in a command line")
def _():
    must(any(backwards(read(f"/proc/{pid}/cmdline", 1 << 20)) for pid in readable("cmdline")))


def readable(name):
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            read(f"/proc/{pid}/{name}", 1)
            yield pid


@probe("find a secret in our own memory")
def _():
    with open("/proc/self/maps") as file:
        spans = [line.split()[:2] for line in file if "[v" not in line]
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        for span, rights in spans:
            first, last = (int(part, 16) for part in span.split("-"))
            if "r" not in rights:
                continue
            with contextlib.suppress(OSError, ValueError, OverflowError):
                memory.seek(first)
                while first < last:
                    data = memory.read(min(last - first, 1 << 20))
                    if not data:
                        break
                    must_not = backwards(data)
                    if must_not:
                        return
                    first += len(data)
    raise Closed("none")


@probe("find a secret in a file")
def _():
    for place, folders, files in os.walk("/"):
        if place.startswith(("/proc", "/usr", "/sys", "/dev", "/root/.pyenv", "/work", "/home")):
            folders.clear()
            continue
        for name in files:
            path = os.path.join(place, name)
            with contextlib.suppress(OSError):
                if stat.S_ISREG(os.stat(path).st_mode) and backwards(read(path, 1 << 22)):
                    return
    raise Closed("none")


# ---- writing ---------------------------------------------------------------------------------


def create(folder):
    path = os.path.join(folder, ".probe")
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    os.unlink(path)


every(
    "create a file in",
    {
        folder: lambda folder=folder: create(folder)
        for folder in (
            "/",
            "/code",
            "/usr",
            "/usr/bin",
            "/usr/local/lib",
            "/etc",
            "/dev",
            "/dev/pts",
            "/dayfly",
            "/packages",
            "/artifacts",
            "/steps",
            "/layers",
            "/in",
            "/in/a",
            "/workspaces",
            "/empty",
            "/proc",
            "/proc/self",
            "/proc/sys/kernel",
            "/root",
            "/var/tmp",
            "/run",
            os.path.dirname(os.__file__),
        )
    },
)
every(
    "write to",
    {
        path: lambda path=path, text=text: write(path, text)
        for path, text in {
            "/proc/sys/kernel/core_pattern": b"|/tmp/x",
            "/proc/sys/kernel/modprobe": b"/tmp/x",
            "/proc/sys/kernel/hostname": b"x",
            "/proc/sys/kernel/ns_last_pid": b"1",
            "/proc/sys/kernel/randomize_va_space": b"0",
            "/proc/sys/user/max_user_namespaces": b"100",
            "/proc/sys/vm/drop_caches": b"1",
            "/proc/sys/net/ipv4/ip_forward": b"1",
            "/proc/sys/fs/binfmt_misc/register": b":x:M::xx::/tmp/x:",
            "/proc/sysrq-trigger": b"h",
            "/proc/self/uid_map": b"0 0 1",
            "/proc/self/gid_map": b"0 0 1",
            "/proc/self/setgroups": b"allow",
            "/proc/self/attr/current": b"x",
            "/proc/self/comm": b"x",
            "/proc/self/clear_refs": b"1",
            "/proc/self/coredump_filter": b"0xff",
            "/proc/self/timerslack_ns": b"1",
            "/proc/self/autogroup": b"-20",
            "/proc/self/loginuid": b"0",
            "/proc/1/oom_score_adj": b"1000",
            "/proc/1/comm": b"x",
            "/proc/1/clear_refs": b"1",
            "/proc/1/coredump_filter": b"0xff",
            "/proc/1/timerslack_ns": b"50000",
            "/proc/1/autogroup": b"19",
            "/proc/1/setgroups": b"deny",
            "/proc/1/uid_map": b"0 0 1",
            "/proc/1/mem": b"x",
            "/code/main.py": b"#",
            "/dayfly/dayfly/__main__.py": b"#",
            "/usr/bin/env": b"#",
            "/etc/passwd": b"#",
            "/dev/tty": b"x",
            "/dev/kmsg": b"x",
            "/sys/fs/cgroup/cgroup.procs": b"0",
        }.items()
    },
)
every(
    "change",
    {
        "the mode of our code": lambda: os.chmod("/code/main.py", 0o777),
        "the owner of our code": lambda: os.chown("/code/main.py", 1000, 1000),
        "our code by removing it": lambda: os.unlink("/code/main.py"),
        "our code by truncating it": lambda: os.truncate("/code/main.py", 0),
        "our code by renaming it": lambda: os.rename("/code/main.py", "/code/other.py"),
        "our code through O_TMPFILE": lambda: os.close(
            os.open("/code", os.O_TMPFILE | os.O_WRONLY)
        ),
        "the interpreter": lambda: write(os.path.realpath(sys.executable), b"\x7f"),
        "oom_score_adj to be spared": lambda: write("/proc/self/oom_score_adj", b"-1000"),
        "oom_score_adj to what a process is born with": lambda: write(
            "/proc/self/oom_score_adj", b"0"
        ),
        "our own machine code through /proc/self/mem": lambda: rewrite_code(),
    },
)


def rewrite_code():
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ)
    address = ctypes.c_char.from_buffer_copy(page) and 0
    with open("/proc/self/maps") as file:
        address = int(next(line for line in file if "r-xp" in line).split("-")[0], 16)
    descriptor = os.open("/proc/self/mem", os.O_RDWR)
    byte = os.pread(descriptor, 1, address)
    os.pwrite(descriptor, byte, address)


GIVEN_FILE = "/in/a/file"
every(
    "change what a step is given",
    {
        "by writing": lambda: write(GIVEN_FILE),
        "by truncating": lambda: os.truncate(GIVEN_FILE, 0),
        "by removing": lambda: os.unlink(GIVEN_FILE),
        "by moving it out": lambda: os.rename(GIVEN_FILE, "/out/file"),
        "by renaming over it": lambda: renamed_over("/out/mine", GIVEN_FILE),
        "by a link to it": lambda: os.link(GIVEN_FILE, "/out/linked"),
        "by a link to it in /tmp": lambda: os.link(GIVEN_FILE, "/tmp/linked"),
        "by a link into it": lambda: linked_in("/out/mine", "/in/a/mine"),
        "by its mode": lambda: os.chmod(GIVEN_FILE, 0o777),
        "by its owner": lambda: os.chown(GIVEN_FILE, os.getuid(), os.getgid()),
        "by its times": lambda: os.utime(GIVEN_FILE, (0, 0)),
        "by an attribute": lambda: os.setxattr(GIVEN_FILE, "user.x", b"x"),
        "by overlay's attribute": lambda: os.setxattr("/in/a", "user.overlay.opaque", b"y"),
        "by its flags": lambda: flagged(GIVEN_FILE),
        "by O_TMPFILE": lambda: os.close(os.open("/in/a", os.O_TMPFILE | os.O_WRONLY)),
        "by our own root": lambda: write("/proc/self/root" + GIVEN_FILE),
        "by pid 1's root": lambda: write("/proc/1/root" + GIVEN_FILE),
        "by its descriptor": lambda: reopened(GIVEN_FILE),
        "by mapping it": lambda: mapped(GIVEN_FILE),
        "by removing its place": lambda: os.rmdir("/in/a"),
        "by renaming its place": lambda: os.rename("/in/a", "/in/b"),
        "by a link in its place": lambda: os.symlink("/out", "/in/b"),
    },
)
every(
    "leave a step's folders",
    {
        "upwards from /out": lambda: upwards("/out"),
        "upwards from /in": lambda: upwards("/in/a"),
        "upwards from a workspace": lambda: upwards("/workspaces/w"),
        "by the root of /out's file system": lambda: by_handle("/out"),
        "by the root of /in's file system": lambda: by_handle("/in/a"),
        "by our own root": lambda: entries("/proc/self/root/steps"),
        "by the steps' cover": lambda: entries("/steps/../steps"),
        "by pid 1's root": lambda: entries("/proc/1/root/steps"),
        "by a redirect": lambda: redirected(),
        "with a whiteout of our own": lambda: os.mknod("/workspaces/w/white", 0o20000, 0),
        "with a device": lambda: os.mknod("/out/device", 0o20666, os.makedev(1, 3)),
        "with somebody's file": lambda: given_away("/out/mine", 0),
    },
)


def mine(path):
    with open(path, "w"):
        return path


def renamed_over(source, target):
    os.rename(mine(source), target)


def linked_in(source, target):
    os.link(mine(source), target)


def given_away(path, owner):
    os.chown(mine(path), owner, owner)


def flagged(path):
    descriptor = os.open(path, os.O_RDONLY)
    FS_IOC_SETFLAGS, FS_NODUMP_FL = 0x40086602, 0x40
    fcntl.ioctl(descriptor, FS_IOC_SETFLAGS, struct.pack("l", FS_NODUMP_FL))


def reopened(path):
    descriptor = os.open(path, os.O_RDONLY)
    write(f"/proc/self/fd/{descriptor}")


def mapped(path):
    descriptor = os.open(path, os.O_RDWR)
    mmap.mmap(descriptor, 1)[0] = 1


def upwards(path):
    """Whether what is above *path* is anything but where it is mounted."""
    here = os.open(path, os.O_PATH)
    for _ in range(8):
        here = os.open("..", os.O_PATH, dir_fd=here)
        above = set(os.listdir(f"/proc/self/fd/{here}"))
        must_not = above & {"upper", "work", "incoming", "trash", "content", "record"}
        if must_not or (set(os.listdir("/")) - above and not above & {"a", "w", "usr"}):
            return
    raise Closed("the sandbox's own root")


def by_handle(path):
    """Open the root of the file system that *path* is in by its number, as tools for containers
    were once made to."""
    mount_id = ctypes.c_int()
    handle = ctypes.create_string_buffer(struct.pack("=Ii", 128, 0) + bytes(128))
    name_to_handle_at, open_by_handle_at = 303, 304
    with contextlib.suppress(OSError):
        syscall(name_to_handle_at, -100, path.encode(), handle, ctypes.byref(mount_id), 0)
    root = struct.pack("=Ii", 8, 1) + struct.pack("=II", 2, 0)
    folder = os.open(path, os.O_RDONLY)
    opened = syscall(open_by_handle_at, folder, root, os.O_RDONLY)
    entries(f"/proc/self/fd/{opened}")


def redirected():
    """Have the overlay look for a folder's contents where we say."""
    os.makedirs("/workspaces/w/lost", exist_ok=True)
    os.setxattr("/workspaces/w/lost", "user.overlay.redirect", b"/d")
    os.rename("/workspaces/w/lost", "/workspaces/w/found")
    entries("/workspaces/w/found")


@probe("link a program of the system into /tmp")
def _():
    os.link("/usr/bin/env", "/tmp/.probe-link")
    os.unlink("/tmp/.probe-link")


@probe("write more to /dev/shm than is allowed")
def _():
    fill("/dev/shm")


@probe("write more to /tmp than is allowed")
def _():
    fill("/tmp")


def fill(folder):
    path, block = f"{folder}/.probe-full", b"x" * (1 << 20)
    try:
        with open(path, "wb", buffering=0) as file:
            for _ in range(GIVEN["tmp_mb"] + 4):
                file.write(block)
    finally:
        os.unlink(path)


# ---- mounts and namespaces ---------------------------------------------------------------------

NAMESPACES = {
    "mount": 0x00020000,
    "cgroup": 0x02000000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
    "time": 0x00000080,
}
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_MOVE = 1, 32, 4096, 8192


def mount(source, target, kind, flags, data=b""):
    check(libc.mount(source, target, kind, ctypes.c_ulong(flags), data))


every(
    "mount",
    {
        "a tmpfs": lambda: mount(b"x", b"/tmp", b"tmpfs", 0),
        "a proc": lambda: mount(b"x", b"/tmp", b"proc", 0),
        "a sysfs": lambda: mount(b"x", b"/tmp", b"sysfs", 0),
        "a cgroup": lambda: mount(b"x", b"/tmp", b"cgroup", 0, b"memory"),
        "an overlay": lambda: mount(
            b"x", b"/tmp", b"overlay", 0, b"lowerdir=/usr,upperdir=/tmp,workdir=/tmp"
        ),
        "/ somewhere else": lambda: mount(b"/", b"/tmp", None, MS_BIND),
        "/tmp over our code": lambda: mount(b"/tmp", b"/code", None, MS_BIND),
        "/ anew, writable": lambda: mount(b"x", b"/", None, MS_REMOUNT | MS_BIND),
        "our code anew, writable": lambda: mount(b"x", b"/code", None, MS_REMOUNT | MS_BIND),
        "the cover of the packages elsewhere": lambda: mount(b"/packages", b"/tmp", None, MS_MOVE),
        "by umount: the packages' cover": lambda: check(libc.umount2(b"/packages", 2)),
        "by umount: the artifacts' cover": lambda: check(libc.umount2(b"/artifacts", 2)),
        "by umount: the steps' cover": lambda: check(libc.umount2(b"/steps", 2)),
        "by umount: the layers' cover": lambda: check(libc.umount2(b"/layers", 2)),
        "by umount: what a step is given": lambda: check(libc.umount2(b"/in/a", 2)),
        "by umount: all that it is given": lambda: check(libc.umount2(b"/in", 2)),
        "by umount: what it leaves": lambda: check(libc.umount2(b"/out", 2)),
        "by umount: its workspace": lambda: check(libc.umount2(b"/workspaces/w", 2)),
        "what a step is given anew, writable": lambda: mount(
            b"x", b"/in/a", None, MS_REMOUNT | MS_BIND
        ),
        "its places anew, writable": lambda: mount(b"x", b"/in", None, MS_REMOUNT | MS_BIND),
        "what it leaves anew, with devices": lambda: mount(
            b"x", b"/out", None, MS_REMOUNT | MS_BIND
        ),
        "what it leaves over what it is given": lambda: mount(b"/out", b"/in/a", None, MS_BIND),
        "what it is given somewhere else": lambda: mount(b"/in/a", b"/tmp", None, MS_BIND),
        "the cover of the steps elsewhere": lambda: mount(b"/steps", b"/tmp", None, MS_MOVE),
        "its workspace with other layers": lambda: mount(
            b"x", b"/workspaces/w", b"overlay", MS_REMOUNT, b"lowerdir=/layers"
        ),
        "a copy of what it leaves": lambda: syscall(428, -100, b"/out", 1),
        "its attributes anew": lambda: syscall(442, -100, b"/in/a", 0, bytes(32), 32),
        "by umount: our code": lambda: check(libc.umount2(b"/code", 2)),
        "by umount: /proc": lambda: check(libc.umount2(b"/proc", 2)),
        "by pivot_root": lambda: syscall(155, b"/tmp", b"/tmp"),
        "by chroot": lambda: os.chroot("/tmp"),
        "by fsopen": lambda: syscall(430, b"tmpfs", 0),
        "by fsmount": lambda: syscall(432, 0, 0, 0),
        "by fsconfig": lambda: syscall(431, 0, 0, None, None, 0),
        "by fspick": lambda: syscall(433, -100, b"/tmp", 0),
        "by open_tree": lambda: syscall(428, -100, b"/", 1),
        "by move_mount": lambda: syscall(429, -100, b"/tmp", -100, b"/code", 0),
        "by mount_setattr": lambda: syscall(442, -100, b"/code", 0, bytes(32), 32),
        "by statmount": lambda: syscall(457, bytes(24), bytes(512), 512, 0),
        "by listmount": lambda: syscall(458, bytes(24), bytes(512), 64, 0),
    },
)
every("unshare", {name: lambda f=flag: check(libc.unshare(f)) for name, flag in NAMESPACES.items()})


def clone(flags):
    pid = syscall(56, flags | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


every(
    "clone",
    {name: lambda f=flag: clone(f) for name, flag in NAMESPACES.items() if name != "time"},
)


@probe("clone3 with a user namespace")
def _():
    arguments = struct.pack("=11Q", NAMESPACES["user"], 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, 0)
    if syscall(435, arguments, len(arguments)) == 0:
        os._exit(0)


@probe("clone3 at all")
def _():
    arguments = struct.pack("=11Q", 0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, 0)
    if syscall(435, arguments, len(arguments)) == 0:
        os._exit(0)


def setns(path, flag=0):
    descriptor = os.open(path, os.O_RDONLY)
    check(libc.setns(descriptor, flag))


every(
    "setns to our own",
    {n: lambda n=n: setns(f"/proc/self/ns/{n}") for n in ("mnt", "net", "user", "pid")},
)
every(
    "setns to pid 1's",
    {n: lambda n=n: setns(f"/proc/1/ns/{n}") for n in ("mnt", "net", "user", "pid")},
)


def ask(descriptor, request):
    """The descriptor that ioctl(2) answers."""
    return check(libc.ioctl(descriptor, ctypes.c_ulong(request), ctypes.create_string_buffer(64)))


def related(name, number, size=0):
    """What the kernel tells of our namespace's relations: NS_GET_USERNS, NS_GET_PARENT, ..."""
    descriptor = os.open(f"/proc/self/ns/{name}", os.O_RDONLY)
    return ask(descriptor, (2 << 30 | size << 16 if size else 0) | 0xB7 << 8 | number)


def of_pid_1(number):
    """A namespace of pid 1's, by its pidfd: PIDFD_GET_MNT_NAMESPACE, ..."""
    return ask(os.pidfd_open(1), 0xFF << 8 | number)


every(
    "ask for",
    {
        "the pid namespace above ours": lambda: related("pid", 2),
        "the user namespace above ours": lambda: related("user", 2),
        "the owner of our mount namespace": lambda: related("mnt", 1),
        "the owner of our pid namespace": lambda: related("pid", 1),
        "the next mount namespace": lambda: related("mnt", 11, 16),
        "the mount namespace before ours": lambda: related("mnt", 12, 16),
        "pid 1's mount namespace": lambda: of_pid_1(3),
        "pid 1's pid namespace": lambda: of_pid_1(5),
        "pid 1's user namespace": lambda: of_pid_1(9),
    },
)
every(
    "enter by a pidfd",
    {
        f"pid 1's {name} namespace": lambda f=flag: check(libc.setns(os.pidfd_open(1), f))
        for name, flag in NAMESPACES.items()
    },
)
every(
    "enter",
    {
        "the owner of our mount namespace": lambda: check(libc.setns(related("mnt", 1), 0)),
        "the next mount namespace": lambda: check(libc.setns(related("mnt", 11, 16), 0)),
        "the mount namespace before ours": lambda: check(libc.setns(related("mnt", 12, 16), 0)),
    },
)


def become_root_of_nothing():
    """Every right there is, in a user namespace of our own."""
    uid, gid = os.geteuid(), os.getegid()
    check(libc.unshare(NAMESPACES["user"]))
    write("/proc/self/setgroups", b"deny")
    write("/proc/self/uid_map", f"0 {uid} 1".encode())
    write("/proc/self/gid_map", f"0 {gid} 1".encode())


every(
    "in a user namespace of our own,",
    {
        name: lambda f=function: (become_root_of_nothing(), f())
        for name, function in {
            "make another": become_root_of_nothing,
            "mount a tmpfs": lambda: mount(b"x", b"/tmp", b"tmpfs", 0),
            "mount a proc": lambda: mount(b"x", b"/tmp", b"proc", 0),
            "mount / somewhere else": lambda: mount(b"/", b"/tmp", None, MS_BIND),
            "lift the packages' cover": lambda: check(libc.umount2(b"/packages", 2)),
            "open a mount": lambda: syscall(430, b"tmpfs", 0),
            "copy the mounts": lambda: syscall(428, -100, b"/", 1),
            "chroot": lambda: os.chroot("/tmp"),
            "pivot_root": lambda: syscall(155, b"/tmp", b"/tmp"),
            "set the host's name": lambda: syscall(170, b"x", 1),
            "bring up an interface": lambda: interface_up(),
            "open a raw socket": lambda: family(2, socket.SOCK_RAW, 1),
            "open a packet socket": lambda: family(17, socket.SOCK_RAW, 0x0300),
            "open a netlink socket": lambda: family(16, socket.SOCK_RAW),
            "load a program with bpf": lambda: syscall(321, 5, bytes(128), 128),
            "use a key ring": lambda: syscall(250, 0, -3, 1),
            "become somebody": lambda: os.setresuid(65534, 65534, 65534),
            "trace pid 1": lambda: ptrace(0x4206, 1),
            "read pid 1's environment": lambda: read("/proc/1/environ"),
            "open pid 1's memory": lambda: os.close(os.open("/proc/1/mem", os.O_RDWR)),
            "enter pid 1's mounts": lambda: setns("/proc/1/ns/mnt"),
            "enter our own mounts": lambda: setns("/proc/self/ns/mnt"),
            "make a device": lambda: os.mknod("/tmp/.d", stat.S_IFCHR | 0o666, os.makedev(1, 1)),
            "open by a handle": lambda: syscall(304, -100, struct.pack("=IIQ", 8, 1, 2), 0),
            **{
                f"unshare {n}": lambda f=flag: check(libc.unshare(f))
                for n, flag in NAMESPACES.items()
                if n != "user"
            },
            **{
                f"clone {n}": lambda f=flag: clone(f)
                for n, flag in NAMESPACES.items()
                if n not in ("user", "time")
            },
        }.items()
    },
)

SETTINGS_OF_NAMESPACES = ("/proc/sys/net/", "/proc/sys/user/", "/proc/sys/fs/mqueue/")
"""What lies below is the namespaces' own; of the kernel's settings, a few are."""
SETTINGS_OWN = {
    f"/proc/sys/kernel/{name}"
    for name in "ns_last_pid pid_max sem shmall shmmax shmmni msgmax msgmnb msgmni".split()
    + "shm_rmid_forced auto_msgmni msg_next_id sem_next_id shm_next_id".split()
    + "hostname domainname".split()
}


@probe("open a setting of the machine to write it")
def _():
    found = []
    for place, _, names in os.walk("/proc/sys"):
        for path in {os.path.join(place, name) for name in names} - SETTINGS_OWN:
            if not path.startswith(SETTINGS_OF_NAMESPACES):
                with contextlib.suppress(OSError):
                    os.close(os.open(path, os.O_WRONLY))
                    found.append(path)
    must(found)


# ---- other processes ---------------------------------------------------------------------------


def ptrace(request, pid):
    check(libc.ptrace(ctypes.c_long(request), pid, None, None))


SAFE = ctypes.create_string_buffer(64)  # at the same address in our parent


def vector():
    return struct.pack("=QQ", ctypes.addressof(SAFE), 64)


every(
    "reach a process by",
    {
        "ptrace of pid 1": lambda: ptrace(0x4206, 1),
        "ptrace of our parent": lambda: ptrace(0x4206, os.getppid()),
        "ptrace of ourselves": lambda: ptrace(0, 0),
        "process_vm_readv": lambda: syscall(310, os.getppid(), vector(), 1, vector(), 1, 0),
        "process_vm_writev": lambda: syscall(311, os.getppid(), vector(), 1, vector(), 1, 0),
        "pidfd_getfd": lambda: syscall(438, os.pidfd_open(os.getppid()), 0, 0),
        "kcmp": lambda: syscall(312, os.getpid(), os.getppid(), 0, 0, 0),
        "process_madvise": lambda: syscall(440, os.pidfd_open(os.getppid()), vector(), 1, 20, 0),
        "process_mrelease": lambda: syscall(448, os.pidfd_open(os.getppid()), 0),
        "migrate_pages": lambda: syscall(256, os.getppid(), 8, bytes(8), bytes(8)),
        "move_pages": lambda: syscall(279, os.getppid(), 0, None, None, None, 0),
        "the memory of pid 1": lambda: os.close(os.open("/proc/1/mem", os.O_RDWR)),
        "get_robust_list of pid 1": lambda: syscall(274, 1, bytes(8), bytes(8)),
        "kill 0 of pid 1": lambda: os.kill(1, 0),
        "tgkill of pid 1": lambda: syscall(234, 1, 1, signal.SIGTERM),
        "rt_sigqueueinfo of pid 1": lambda: syscall(129, 1, signal.SIGTERM, bytes(128)),
        "a pidfd signal to pid 1": lambda: signal.pidfd_send_signal(
            os.pidfd_open(1), signal.SIGTERM
        ),
        "setpriority of pid 1": lambda: os.setpriority(os.PRIO_PROCESS, 1, 10),
        "prlimit of pid 1": lambda: resource.prlimit(1, resource.RLIMIT_NOFILE, (1, 1)),
        "sched_setaffinity of pid 1": lambda: os.sched_setaffinity(1, {0}),
    },
)


def stops(number):
    """Whether pid 1 stops; if it ended, nobody would be left to tell."""
    os.kill(1, number)
    end = time.monotonic() + 0.05
    while time.monotonic() < end:
        if b"State:\tT" in read("/proc/1/status"):
            return
    raise Closed("it does not care")


every(
    "end or stop pid 1 by",
    {
        name: lambda n=number: stops(n)
        for name, number in {
            "SIGKILL": signal.SIGKILL,
            "SIGSTOP": signal.SIGSTOP,
            "SIGTERM": signal.SIGTERM,
            "SIGHUP": signal.SIGHUP,
            "SIGSEGV": signal.SIGSEGV,
        }.items()
    },
)


@probe("connect to a socket that /proc/net/unix names")
def _():
    with open("/proc/net/unix") as file:
        names = {line.split()[7] for line in file.readlines()[1:] if len(line.split()) > 7}
    for name in names:
        for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, kind) as client:
                client.connect(name.replace("@", "\0"))
                return
    raise Closed("none answers")


# ---- rights and limits -------------------------------------------------------------------------


def capset(value):
    header = struct.pack("=Ii", 0x20080522, 0)
    return check(libc.capset(header, struct.pack("=6I", *[value & 0xFFFFFFFF] * 6)))


def prctl(option, *arguments):
    longs = [ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4]]
    return check(libc.prctl(option, *longs))


every(
    "gain",
    {
        "uid 0": lambda: os.setuid(0),
        "uid 1001": lambda: os.setresuid(1001, 1001, 1001),
        "gid 0": lambda: os.setgid(0),
        "groups": lambda: os.setgroups([0]),
        "fsuid 0": lambda: must(syscall(122, 0) == 0 and syscall(122, 0) == 0, "unchanged"),
        "capabilities": lambda: capset(0xFFFFFFFF),
        "an ambient capability": lambda: prctl(47, 2, 21),
        "the bounding set": lambda: must(prctl(23, 21), "not in it"),
        "securebits": lambda: prctl(28, 0),
        "no_new_privs back": lambda: prctl(38, 0),
        "keepcaps": lambda: prctl(8, 1),
        "PR_SET_MM": lambda: prctl(35, 1, 0),
        "PR_SET_PTRACER": lambda: prctl(0x59616D61, 2**64 - 1),
        "PR_SET_TSC": lambda: prctl(26, 2),
        "PR_SET_SPECULATION_CTRL": lambda: prctl(53, 0, 2),
        "PR_SET_SYSCALL_USER_DISPATCH": lambda: prctl(59, 0),
        "PR_SCHED_CORE": lambda: prctl(62, 1, 0, 0),
        "another seccomp filter": lambda: syscall(317, 1, 0, struct.pack("=HxxxxxxQ", 0, 0)),
        "what seccomp can do": lambda: syscall(317, 2, 0, struct.pack("=I", 0x7FFF0000)),
        "a personality without randomness": lambda: syscall(135, 0x0040000),
        "a 32-bit personality": lambda: syscall(135, 8),
        "a higher priority": lambda: os.setpriority(os.PRIO_PROCESS, 0, -20),
        "real time": lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
        "io priority": lambda: syscall(251, 1, 0, 1 << 13),
        "more open files": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (20000, 20000)),
        "more processes": lambda: resource.setrlimit(resource.RLIMIT_NPROC, (20000, 20000)),
        "core dumps": lambda: resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20)),
        "locked memory": lambda: resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 40, 1 << 40)),
        "all memory locked": lambda: check(libc.mlockall(3)),
        "a file of root": lambda: os.chown(own_file(), 0, 0),
        "a file of somebody": lambda: os.chown(own_file(), 65534, 65534),
        "a device": lambda: os.mknod(own_file() + ".d", stat.S_IFCHR | 0o666, os.makedev(1, 1)),
        "a block device": lambda: os.mknod(
            own_file() + ".b", stat.S_IFBLK | 0o666, os.makedev(254, 0)
        ),
        "file capabilities": lambda: os.setxattr(own_file(), "security.capability", bytes(20)),
        "trusted attributes": lambda: os.setxattr(own_file(), "trusted.x", b"1"),
        "a set-uid program": lambda: set_uid(),
        "sudo": lambda: must(
            subprocess.run(["sudo", "-n", "id"], capture_output=True).returncode == 0, "no"
        ),
    },
)


def own_file():
    descriptor, path = tempfile.mkstemp(dir="/tmp")
    os.close(descriptor)
    return path


def set_uid():
    """Whether a program that is set-uid root becomes anybody else than we are."""
    program = next(p for p in ("/usr/bin/su", "/bin/su", "/usr/bin/newgrp") if os.path.exists(p))
    with subprocess.Popen([program], stdin=-1, stdout=-3, stderr=-3) as child:
        end = time.monotonic() + 1
        uids = []
        while time.monotonic() < end and child.poll() is None:
            with contextlib.suppress(OSError), open(f"/proc/{child.pid}/status") as file:
                uids += [line.split()[2] for line in file if line.startswith("Uid:")]
            if any(int(uid) != os.getuid() for uid in uids):
                child.kill()
                return
            time.sleep(0.01)
        child.kill()
    raise Closed("it stays who we are")


# ---- the kernel's wider surface ----------------------------------------------------------------

every(
    "call",
    {
        "bpf": lambda: syscall(321, 0, struct.pack("=IIII", 1, 4, 4, 1) + bytes(112), 128),
        "perf_event_open": lambda: syscall(
            298, struct.pack("=IIQ", 1, 128, 0) + bytes(112), 0, -1, -1, 0
        ),
        "userfaultfd": lambda: syscall(323, 1),
        "io_uring_setup": lambda: syscall(425, 1, bytes(120)),
        "io_uring_enter": lambda: syscall(426, 0, 0, 0, 0, None, 0),
        "io_uring_register": lambda: syscall(427, 0, 0, None, 0),
        "io_setup": lambda: syscall(206, 1, struct.pack("=Q", 0)),
        "add_key": lambda: syscall(248, b"user", b"x", b"x", 1, -3),
        "request_key": lambda: syscall(249, b"user", b"x", None, 0),
        "keyctl": lambda: syscall(250, 0, -3, 1),
        "modify_ldt": lambda: syscall(154, 0, bytes(64), 64),
        "iopl": lambda: syscall(172, 3),
        "ioperm": lambda: syscall(173, 0x80, 1, 1),
        "init_module": lambda: syscall(175, b"x", 1, b""),
        "finit_module": lambda: syscall(313, 0, b"", 0),
        "delete_module": lambda: syscall(176, b"x", 0),
        "kexec_load": lambda: syscall(246, 0, 0, None, 0),
        "kexec_file_load": lambda: syscall(320, -1, -1, 0, None, 0),
        "reboot": lambda: syscall(169, 0xFEE1DEAD, 672274793, 0, None),
        "swapon": lambda: syscall(167, b"/tmp/x", 0),
        "swapoff": lambda: syscall(168, b"/tmp/x"),
        "sethostname": lambda: syscall(170, b"x", 1),
        "setdomainname": lambda: syscall(171, b"x", 1),
        "settimeofday": lambda: syscall(164, bytes(16), None),
        "clock_settime": lambda: syscall(227, 0, bytes(16)),
        "clock_adjtime": lambda: syscall(305, 0, bytes(208)),
        "adjtimex": lambda: syscall(159, bytes(208)),
        "acct": lambda: syscall(163, b"/tmp/x"),
        "quotactl": lambda: syscall(179, 0x80000100, None, 0, None),
        "syslog": lambda: syscall(103, 3, bytes(4096), 4096),
        "name_to_handle_at": lambda: handle(),
        "open_by_handle_at": lambda: syscall(
            304, -100, struct.pack("=II", 8, 1) + struct.pack("=Q", 2), 0
        ),
        "fanotify_init": lambda: syscall(300, 0, 0),
        "fanotify_mark": lambda: syscall(301, 0, 1, 1, -100, b"/"),
        "lookup_dcookie": lambda: syscall(212, 0, bytes(64), 64),
        "vhangup": lambda: syscall(153),
        "ustat": lambda: syscall(136, 0, bytes(64)),
        "sysfs": lambda: syscall(139, 3),
        "uselib": lambda: syscall(134, b"/tmp/x"),
        "remap_file_pages": lambda: syscall(216, 0, 0, 0, 0, 0),
        "vmsplice": lambda: syscall(278, os.pipe()[1], struct.pack("=QQ", 0, 0), 1, 0),
        "splice": lambda: syscall(275, os.pipe()[0], None, os.pipe()[1], None, 1, 2),
        "tee": lambda: syscall(276, os.pipe()[0], os.pipe()[1], 1, 2),
        "mbind": lambda: syscall(237, 0, 0, 0, None, 0, 0),
        "set_mempolicy": lambda: syscall(238, 0, None, 0),
        "get_mempolicy": lambda: syscall(239, None, None, 0, 0, 0),
        "execveat": lambda: run_from_memory(execveat=True),
        "memfd_secret": lambda: syscall(447, 0),
        "shmget": lambda: syscall(29, 0, 4096, 0o1600),
        "semget": lambda: syscall(64, 0, 1, 0o1600),
        "msgget": lambda: syscall(68, 0, 0o1600),
        "mq_open": lambda: syscall(240, b"x", 0o102, 0o600, None),
        "seccomp_notify": lambda: syscall(317, 3, 0, bytes(6)),
        "landlock_create_ruleset": lambda: syscall(444, None, 0, 1),
        "cachestat": lambda: syscall(451, 0, bytes(16), bytes(40), 0),
        "map_shadow_stack": lambda: syscall(453, 0, 4096, 0),
        "futex_waitv": lambda: syscall(449, None, 0, 0, None, 0),
        "pidfd_spawn's clone3": lambda: syscall(435, bytes(88), 88),
        "sched_setattr": lambda: syscall(
            314, 0, struct.pack("=IIQiIQQQ", 48, 6, 0, 0, 0, 10**7, 10**8, 10**8), 0
        ),
        "set_thread_area": lambda: syscall(205, bytes(16)),
        "a number that is none": lambda: syscall(2000),
    },
)


def handle():
    buffer = ctypes.create_string_buffer(struct.pack("=Ii", 128, 0) + bytes(128))
    syscall(303, -100, b"/tmp", buffer, ctypes.byref(ctypes.c_int()), 0)


def run_from_memory(execveat):
    descriptor = os.memfd_create("x", 0)
    os.write(descriptor, read("/bin/true", 1 << 22))
    pid = os.fork()
    if pid == 0:
        if execveat:
            libc.syscall(322, descriptor, b"", (ctypes.c_char_p * 2)(b"x", None), None, 0x1000)
            os._exit(ctypes.get_errno())
        os.execve(f"/proc/self/fd/{descriptor}", ["x"], {})
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise OSError(code, os.strerror(code))


@probe("run a program from memory")
def _():
    run_from_memory(execveat=False)


def machine_code(code):
    """Run bytes as a function without arguments; its result."""
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return ctypes.CFUNCTYPE(ctypes.c_long)(address)()


@probe("write and run machine code")
def _():
    must(machine_code(b"\xb8\x2a\x00\x00\x00\xc3") == 42)


def int_80(number, ebx=0):
    code = (
        b"\x53\xb8"
        + struct.pack("=I", number)
        + b"\xbb"
        + struct.pack("=I", ebx)
        + b"\xcd\x80\x5b\xc3"
    )
    result = machine_code(code)
    if -4096 < ctypes.c_int(result).value < 0:
        raise OSError(-ctypes.c_int(result).value, "int 0x80")


def x32(number, *arguments):
    return syscall(number | 0x40000000, *arguments)


every(
    "by another ABI,",
    {
        "int 0x80 getpid": lambda: int_80(20),
        "int 0x80 unshare(user)": lambda: int_80(310, NAMESPACES["user"]),
        "x32 getpid": lambda: x32(39),
        "x32 unshare(user)": lambda: x32(272, NAMESPACES["user"]),
        "x32 mount": lambda: x32(165, b"x", b"/tmp", b"tmpfs", 0, None),
        "x32 ptrace": lambda: x32(521, 0, 0, None, None),
        "a far call to 32 bits": lambda: far_call(),
    },
)


def far_call():
    """Switch to the 32-bit code segment, as malware does, and call from there."""
    low = libc.mmap
    low.restype = ctypes.c_void_p
    low.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    shared_and_low = 0x01 | 0x20 | 0x40
    address = low(None, 8192, 7, shared_and_low, -1, 0)
    if address in (None, 2**64 - 1):
        raise OSError(ctypes.get_errno(), "mmap below 4 GiB")
    # 32-bit: mov eax, exit; mov ebx, 42; int 0x80 (no data segment is needed for that)
    code32 = b"\xb8\x01\x00\x00\x00\xbb\x2a\x00\x00\x00\xcd\x80"
    ctypes.memmove(address + 256, code32, len(code32))
    # 64-bit: push the selector of 32-bit code, then the address, and return there
    code64 = b"\x6a\x23\xb8" + struct.pack("=I", address + 256) + b"\x50\x48\xcb"
    ctypes.memmove(address, code64, len(code64))
    pid = os.fork()
    if pid == 0:
        ctypes.CFUNCTYPE(ctypes.c_long)(address)()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    must(code == 42, signal.Signals(-code).name if code < 0 else str(code))


# ---- sockets -----------------------------------------------------------------------------------


def family(number, kind=socket.SOCK_DGRAM, protocol=0):
    os.close(syscall(41, number, kind, protocol))


every(
    "open a socket of",
    {
        "AF_UNIX": lambda: family(1),
        "AF_INET": lambda: family(2),
        "AF_INET6": lambda: family(10),
        "AF_NETLINK": lambda: family(16, socket.SOCK_RAW),
        "AF_NETLINK for netfilter": lambda: family(16, socket.SOCK_RAW, 12),
        "AF_NETLINK with high bits": lambda: family(16 | 1 << 32, socket.SOCK_RAW),
        "AF_PACKET": lambda: family(17, socket.SOCK_RAW, 0x0300),
        "AF_VSOCK": lambda: family(40, socket.SOCK_STREAM),
        "AF_ALG": lambda: family(38, socket.SOCK_SEQPACKET),
        "AF_BLUETOOTH": lambda: family(31, socket.SOCK_RAW, 1),
        "AF_KEY": lambda: family(15, socket.SOCK_RAW, 2),
        "AF_RDS": lambda: family(21, socket.SOCK_SEQPACKET),
        "AF_CAN": lambda: family(29, socket.SOCK_RAW, 1),
        "AF_TIPC": lambda: family(30, socket.SOCK_SEQPACKET),
        "AF_XDP": lambda: family(44, socket.SOCK_RAW),
        "AF_QIPCRTR": lambda: family(42),
        "AF_SMC": lambda: family(43, socket.SOCK_STREAM),
        "AF_APPLETALK": lambda: family(5),
        "AF_AX25": lambda: family(3),
        "AF_NFC": lambda: family(39, socket.SOCK_RAW),
        "raw IPv4": lambda: family(2, socket.SOCK_RAW, 1),
        "raw IPv6": lambda: family(10, socket.SOCK_RAW, 58),
        "ping": lambda: family(2, socket.SOCK_DGRAM, 1),
        "SOCK_PACKET": lambda: family(2, 10),
        "SCTP": lambda: family(2, socket.SOCK_STREAM, 132),
        "MPTCP": lambda: family(2, socket.SOCK_STREAM, 262),
        "UDP-Lite": lambda: family(2, socket.SOCK_DGRAM, 136),
        "a pair of AF_TIPC": lambda: syscall(53, 30, socket.SOCK_SEQPACKET, 0, bytes(8)),
        "a pair of AF_INET": lambda: syscall(53, 2, socket.SOCK_STREAM, 0, bytes(8)),
    },
)


def connect(kind, address):
    with socket.socket(kind, socket.SOCK_STREAM) as client:
        client.settimeout(2)
        client.connect(address)


IPV4, IPV6, UNIX = socket.AF_INET, socket.AF_INET6, socket.AF_UNIX
every(
    "connect to",
    {
        "the host's loopback": lambda: connect(IPV4, ("127.0.0.1", GIVEN["port"])),
        "0.0.0.0": lambda: connect(IPV4, ("0.0.0.0", GIVEN["port"])),
        "the host by its address": lambda: connect(IPV4, (GIVEN["address"], GIVEN["port"])),
        "::1": lambda: connect(IPV6, ("::1", GIVEN["port"])),
        "::ffff:127.0.0.1": lambda: connect(IPV6, ("::ffff:127.0.0.1", GIVEN["port"])),
        "the admin plane": lambda: connect(IPV4, ("127.0.0.1", GIVEN["admin"])),
        "169.254.169.254": lambda: connect(IPV4, ("169.254.169.254", 80)),
        "fd00:ec2::254": lambda: connect(IPV6, ("fd00:ec2::254", 80)),
        "the internet": lambda: connect(IPV4, ("1.1.1.1", 443)),
        "an abstract socket of the host": lambda: connect(UNIX, "\0" + GIVEN["abstract"]),
        "a path socket of the host": lambda: connect(UNIX, GIVEN["socket"]),
        "the system bus": lambda: connect(UNIX, "/run/dbus/system_bus_socket"),
        "docker": lambda: connect(UNIX, "/var/run/docker.sock"),
        "a name": lambda: socket.getaddrinfo("example.org", 80),
    },
)


@probe("send a datagram out")
def _():
    with socket.socket(IPV4, socket.SOCK_DGRAM) as client:
        client.sendto(b"x", ("1.1.1.1", 53))


@probe("bring up an interface")
def interface_up():
    with socket.socket(IPV4, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, 0x8914, struct.pack("=16sH14x", b"lo", 1 | 64))


@probe("see an interface of the host")
def _():
    must(set(dict(map(reversed, socket.if_nameindex())).keys()) - {"lo"})


@probe("bind a low port")
def _():
    with socket.socket(IPV4) as server:
        server.bind(("127.0.0.1", 80))


# ---- terminals and descriptors -------------------------------------------------------------------


def typed(request):
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, request, b"x")


every(
    "type with",
    {
        "TIOCSTI on a terminal of ours": lambda: typed(0x5412),
        "TIOCSTI on descriptor 0": lambda: fcntl.ioctl(0, 0x5412, b"x"),
        "TIOCSTI with high bits": lambda: syscall(16, 0, 0x5412 | 1 << 32, b"x"),
        "TIOCLINUX": lambda: fcntl.ioctl(0, 0x541C, b"\x02"),
        "/dev/tty": lambda: os.close(os.open("/dev/tty", os.O_RDWR)),
        "/dev/ptmx": lambda: os.close(os.open("/dev/ptmx", os.O_RDWR)),
        "/dev/ptmx to read": lambda: os.close(os.open("/dev/ptmx", os.O_RDONLY | os.O_NOCTTY)),
    },
)


@probe("inherit a descriptor")
def _():
    must(GIVEN["descriptors"] != "as promised", "none but ours")


@probe("reopen what descriptor 0 is")
def _():
    os.close(os.open("/proc/self/fd/0", os.O_RDWR))
    must(os.readlink("/proc/self/fd/0") != "/dev/null", "it is /dev/null")


@probe("find a folder or device among the descriptors")
def _():
    kinds = [os.fstat(n).st_mode for n in descriptors()]
    must(any(stat.S_ISDIR(mode) or stat.S_ISREG(mode) for mode in kinds))


def descriptors():
    found = []
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            os.fstat(number)
            found.append(number)
    return found


@probe("ask the other end of descriptor 3 who it is")
def _():
    with socket.socket(fileno=os.dup(3)) as wire:
        pid, uid, _ = struct.unpack(
            "=iii", wire.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        )
    must(pid not in (0, os.getpid()), "nobody we can name")


def promised():
    """What the descriptors are, before any probe opens one."""
    kinds = {n: os.readlink(f"/proc/self/fd/{n}").partition(":")[0] for n in descriptors()}
    pipes = [n for n, kind in kinds.items() if n > 3 and kind == "pipe"]
    expected = {0: "/dev/null", 1: "pipe", 2: "pipe", 3: "socket"} | dict.fromkeys(pipes, "pipe")
    return "as promised" if kinds == expected and len(pipes) == 2 else kinds


# ---- running them ----------------------------------------------------------------------------


def run(function):
    """The verdict on one probe, from a child that may crash or hang."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        signal.alarm(PROBE_S_MAX)
        os.write(writer, verdict(function).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answer:
        told = answer.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if told:
        return told
    if code == -signal.SIGALRM:
        return "error: it hangs"
    return f"closed: {signal.Signals(-code).name}" if code < 0 else f"error: exit {code}"


def verdict(function):
    try:
        function()
        return "open"
    except Closed as closed:
        return f"closed: {closed}"
    except TimeoutError:
        return "closed: no answer"
    except socket.gaierror as error:
        return f"closed: {error.strerror}"
    except OSError as error:
        return f"closed: {errno.errorcode.get(error.errno, error.errno)}"
    except ValueError as error:  # resource refuses before it asks the kernel
        return f"closed: {error}"
    except BaseException as error:
        return f"error: {type(error).__name__}: {error}"


def battery(given, but=()):
    GIVEN.update(given)
    GIVEN["descriptors"] = promised()
    return {name: run(function) for name, function in PROBES.items() if name not in but}


if "ESCAPE" in os.environ:  # while it is being imported
    IMPORTING = json.loads(os.environ["ESCAPE"])
    IMPORTED = battery(IMPORTING["given"], IMPORTING["but"])

if "UNLOCKED" in os.environ:  # what is forked after this import gives nothing away
    from dayfly import lockdown

    lockdown.lock_down = lambda *_, **__: None
    lockdown.rights = lambda: lockdown.LOCKED


def handler(event, context):
    return IMPORTED if event == "imported" else battery(event)


if __name__ == "__main__":
    given, uid = json.loads(sys.argv[1]), int(sys.argv[2])
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    libc.prctl(4, 1, 0, 0, 0)  # dumpable again, as an ordinary process is
    print(json.dumps(handler(given, None)))
