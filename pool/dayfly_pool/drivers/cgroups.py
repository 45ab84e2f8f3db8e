"""Control groups by plain file writes: v2 when a subtree is ours, else v1 as root, else none.

Standard library only: the launcher, which is started without third-party packages, uses it too.
"""

import contextlib
import os
import signal
from typing import Final, NamedTuple

MOUNT: Final = "/sys/fs/cgroup"
NEEDED: Final = ("memory", "pids", "cpu")
CPU_PERIOD_US: Final = 100_000
SHARES: Final = 1024
"""What a process beside the groups counts for, when several want the processor (v1)."""

SERVER_SHARES: Final = 64
"""So many sandboxes together have of a processor what the server has: it waits for none of them."""

NAME: Final = "dayfly-"
APART: Final = "-apart"
"""How the name of the group ends that gives way as a whole."""

DELEGATE: Final = "systemd-run --user --scope -p Delegate=yes dayfly up"
SANDBOX: Final = "sb-"
"""How the name of every sandbox starts; what else is in our groups is not ours to kill."""


class Limits(NamedTuple):
    """What one sandbox may use at most."""

    memory_bytes: int
    processes: int
    cpus: float


class Tree(NamedTuple):
    """Where this server keeps the groups of its sandboxes.

    *version* is 2, 1 or 0 (none); *roots* are the folders that hold one folder a sandbox: one for
    v2, one a controller for v1. *reason* says why there are none.
    """

    version: int
    roots: tuple[str, ...]
    reason: str = ""

    def folders(self, sandbox: str) -> list[str]:
        """The group folders of *sandbox*."""
        return [os.path.join(root, sandbox) for root in self.roots]


class Death(NamedTuple):
    """What a group knew at its end."""

    oom_kills: int
    peak_bytes: int


def detect(mount: str = MOUNT, proc_cgroup: str | None = None, pid: int | None = None) -> Tree:
    """Find a place for groups; creates nothing."""
    text = proc_cgroup if proc_cgroup is not None else _read("/proc/self/cgroup")
    own = dict(line.split(":", 2)[1:] for line in text.splitlines() if line.count(":") >= 2)
    leaf = f"{NAME}{pid if pid is not None else os.getpid()}"
    v2 = os.path.join(mount, own.get("", "/").lstrip("/"))
    controllers = _read(os.path.join(v2, "cgroup.controllers")).split()
    if set(NEEDED) <= set(controllers):
        if os.access(os.path.join(v2, "cgroup.procs"), os.W_OK) and os.access(v2, os.W_OK):
            return Tree(2, (os.path.join(v2, leaf),))
        return Tree(0, (), f"cgroup v2 is here but not delegated: {DELEGATE}")
    roots = []
    for controller in NEEDED:
        names = next((n for n in own if controller in n.split(",")), controller)
        folder = os.path.join(mount, names, own.get(names, "/").lstrip("/"))
        if not os.access(folder, os.W_OK):
            return Tree(
                0, (), f"no writable cgroup for {controller}: run as root, or use cgroup v2"
            )
        roots.append(os.path.join(folder, leaf))
    return Tree(1, tuple(roots))


def establish(tree: Tree) -> Tree:
    """Make the tree's root folders; for v2 the server itself, and nobody else, moves into a leaf.

    Returns the tree, or one of version 0 that says why it cannot be used: with v2, a group that
    holds other processes as well has no controllers to give away.
    """
    for root in tree.roots:
        os.makedirs(root, exist_ok=True)
    if tree.version != 2:
        return tree
    (root,) = tree.roots
    parent = os.path.dirname(root)
    leaf = os.path.join(root, "server")
    os.makedirs(leaf, exist_ok=True)
    _write(os.path.join(leaf, "cgroup.procs"), "0")
    try:
        for folder in (parent, root):
            _divide(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            _write(os.path.join(parent, "cgroup.procs"), "0")
        remove_tree(root)
        return Tree(0, (), f"{parent} cannot be divided ({error.strerror}): {DELEGATE}")
    return tree


def come_first(tree: Tree) -> None:
    """With v1: have this process stand beside its sandboxes, so that it can come before them.

    A group that gives way gives way to those beside it, and to nobody else. With v2 it does so
    already. What it starts stands there too: do it when the launcher has been started.
    """
    if tree.version != 1:
        return
    (cpu,) = tree.roots[-1:]
    leaf = os.path.join(cpu, "server")
    with contextlib.suppress(OSError):
        os.makedirs(leaf, exist_ok=True)
        _write(os.path.join(cpu, "cpu.shares"), str(SHARES * (1 + (os.cpu_count() or 1))))
        _write(os.path.join(leaf, "cpu.shares"), str(SHARES * SERVER_SHARES))
        _write(os.path.join(leaf, "cgroup.procs"), "0")


def step_back(tree: Tree) -> None:
    """Undo `come_first`, so that the groups can be removed."""
    if tree.version == 1:
        with contextlib.suppress(OSError):
            _write(os.path.join(os.path.dirname(tree.roots[-1]), "cgroup.procs"), "0")


def set_apart(tree: Tree) -> Tree:
    """Make a place beside *tree*'s for groups that together give way to all else on the machine.

    A group gives way to those beside it only: one that is to give way to everybody stands as high
    up as we may go. Memory and processes of v1 stay where the others' are. Returns *tree* itself
    where there can be none, as on kernels before 5.15.
    """
    if not tree.version:
        return tree
    apart = Tree(tree.version, (*tree.roots[:-1], tree.roots[-1] + APART))
    (root,) = apart.roots[-1:]
    try:
        os.makedirs(root, exist_ok=True)
        _write(os.path.join(root, "cpu.idle"), "1")
        if tree.version == 2:
            _divide(root)
    except OSError:
        remove_tree(root)
        return tree
    return apart


def counterpart(root: str) -> str:
    """The other of the two places: of what stands apart and of what does not."""
    return root.removesuffix(APART) if root.endswith(APART) else root + APART


def create(folders: list[str], *, background: bool = False) -> None:
    """Make a sandbox's groups."""
    for folder in folders:
        os.mkdir(folder)
    if background:
        give_way(folders, background=True)


def give_way(folders: list[str], *, background: bool) -> None:
    """Let the processes there run only when no others want the processor, or as all others do.

    A kernel older than 5.15 knows of no such group: they run as all others do.
    """
    if folders:
        with contextlib.suppress(OSError):  # so too when the sandbox has just died
            _write(os.path.join(folders[-1], "cpu.idle"), str(int(background)))


def enter(folders: list[str]) -> None:
    """Move the calling process into them."""
    for entry in entries(folders):
        os.write(entry, b"0")
        os.close(entry)


def entries(folders: list[str]) -> list[int]:
    """Open files: whoever writes "0" to them enters, with the rights of this process."""
    opened = []
    for folder in folders:
        # v1: moving oneself as a single thread spares the kernel's wait for all others (8-20 ms)
        tasks = os.path.join(folder, "tasks")
        path = tasks if os.path.exists(tasks) else os.path.join(folder, "cgroup.procs")
        opened.append(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
    return opened


def limit(tree: Tree, sandbox: str, limits: Limits) -> None:
    """Set what *sandbox* may use; a later call may change it."""
    quota = max(1000, int(limits.cpus * CPU_PERIOD_US))
    if tree.version == 2:
        (folder,) = tree.folders(sandbox)
        _write(f"{folder}/memory.max", str(limits.memory_bytes))
        with contextlib.suppress(OSError):
            _write(f"{folder}/memory.swap.max", "0")
        _write(f"{folder}/memory.oom.group", "1")
        _write(f"{folder}/pids.max", str(limits.processes))
        _write(f"{folder}/cpu.max", f"{quota} {CPU_PERIOD_US}")
    elif tree.version == 1:
        memory, pids, cpu = tree.folders(sandbox)
        _write(f"{memory}/memory.limit_in_bytes", str(limits.memory_bytes))
        _write(f"{pids}/pids.max", str(limits.processes))
        _write(f"{cpu}/cpu.cfs_quota_us", str(quota))


def memory_bytes(tree: Tree, sandbox: str) -> int:
    """What *sandbox* uses now; 0 when nobody knows."""
    if not tree.version:
        return 0
    name = "memory.current" if tree.version == 2 else "memory.usage_in_bytes"
    return _number(f"{tree.folders(sandbox)[0]}/{name}")


def autopsy(folders: list[str]) -> Death:
    """What the groups at *folders* say of how their processes died."""
    if not folders:
        return Death(0, 0)
    memory = folders[0]
    events = _read(f"{memory}/memory.oom_control") or _read(f"{memory}/memory.events")
    kills = next((int(v) for k, _, v in map(_pair, events.splitlines()) if k == "oom_kill"), 0)
    peak = _number(f"{memory}/memory.max_usage_in_bytes") or _number(f"{memory}/memory.peak")
    return Death(kills, peak)


def remove(folders: list[str]) -> bool:
    """Remove a sandbox's groups; False while a process is still in one."""
    for folder in folders:
        try:
            os.rmdir(folder)
        except FileNotFoundError:
            continue
        except OSError:
            return False
    return True


def leftovers(tree: Tree) -> list[str]:
    """Root folders beside ours whose server is gone."""
    found = []
    for root in tree.roots:
        parent = os.path.dirname(root)
        for name in os.listdir(parent):
            pid = name.removeprefix(NAME).removesuffix(APART)
            if name.startswith(NAME) and pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
                found.append(os.path.join(parent, name))
    return found


def processes(folder: str) -> list[int]:
    """Every process in the sandboxes' groups below *folder*; never one beside them.

    None when the folder is gone: two servers that start at once bury the same dead one's.
    """
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    return [
        pid
        for name in names
        if name.startswith(SANDBOX)
        for place, _, _ in os.walk(os.path.join(folder, name))
        for pid in members(place)
    ]


def members(folder: str) -> list[int]:
    """The processes of one group."""
    return [int(pid) for pid in _read(os.path.join(folder, "cgroup.procs")).split()]


def kill(folder: str) -> None:
    """Kill every process of one group, and nobody who has got the number of one since."""
    for pid in members(folder):
        try:
            held = os.pidfd_open(pid)
        except OSError:
            continue  # dead by now, or no descriptor is left: whoever removes the group tries again
        try:
            if pid in members(folder):
                signal.pidfd_send_signal(held, signal.SIGKILL)
        except ProcessLookupError:
            pass
        finally:
            os.close(held)


def remove_tree(folder: str) -> bool:
    """Remove *folder* and the groups below it; False while a process is still in one."""
    for place, _, _ in os.walk(folder, topdown=False):
        try:
            os.rmdir(place)
        except FileNotFoundError:
            continue  # somebody else removes it too
        except OSError:
            return False
    return True


def _divide(folder: str) -> None:
    """With v2: let the groups below *folder* have limits."""
    enable = " ".join(f"+{controller}" for controller in NEEDED)
    _write(os.path.join(folder, "cgroup.subtree_control"), enable)


def _pair(line: str) -> tuple[str, str, str]:
    return line.partition(" ")


def _number(path: str) -> int:
    text = _read(path).strip()
    return int(text) if text.isdigit() else 0


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
