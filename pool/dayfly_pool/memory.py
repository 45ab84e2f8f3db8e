"""How much memory there is left: of this machine, and of the control groups that we are in."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

MEMINFO: Final = "/proc/meminfo"
PLENTY: Final = 1 << 62
MOUNT: Final = "/sys/fs/cgroup"


class Group(NamedTuple):
    """One control group that may have a limit."""

    limit: Path
    usage: Path
    details: Path


def groups(own: str | None = None, mount: str = MOUNT) -> tuple[Group, ...]:
    """Those of this process, and all above them, that limit memory. *own* is /proc/self/cgroup."""
    text = own if own is not None else _read(Path("/proc/self/cgroup"))
    paths = dict(line.split(":", 2)[1:] for line in text.splitlines() if line.count(":") >= 2)
    found = []
    for controllers, path in paths.items():
        if controllers == "":
            root, names = Path(mount), ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root = Path(mount, "memory")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        place = Path(os.path.normpath(f"{root}/{path}"))
        for folder in (place, *place.parents):
            if (folder == root or root in folder.parents) and (folder / names[0]).exists():
                files = (folder / name for name in (*names, "memory.stat"))
                found.append(Group(*files))
    return tuple(found)


def available_bytes(limited: Iterable[Group] = ()) -> int:
    """What programs can still have without swapping; plenty where nobody says."""
    left = PLENTY
    for line in _read(Path(MEMINFO)).splitlines():
        if line.startswith("MemAvailable:"):
            left = int(line.split()[1]) << 10
    for group in limited:
        limit, usage = _read(group.limit).strip(), _read(group.usage).strip()
        if limit.isdigit() and usage.isdigit() and int(limit) < PLENTY:
            left = min(left, int(limit) - int(usage) + _reclaimable(group))
    return max(0, left)


def of_processes(pid: int) -> int:
    """What the process *pid* and all below it use, in bytes; 0 when they are gone.

    Of what they share with others their share (PSS) where the kernel tells it, else all (RSS).
    """
    total, open_ = 0, [pid]
    while open_:
        at = Path("/proc", str(open_.pop()))
        total += _used(at)
        for task in at.glob("task/*/children"):
            open_ += map(int, _read(task).split())
    return total


def _used(process: Path) -> int:
    for line in _read(process / "smaps_rollup").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    fields = _read(process / "statm").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if fields else 0


def _reclaimable(group: Group) -> int:
    """Its pages of files that were not used lately: the kernel takes those first."""
    details = dict(line.partition(" ")[::2] for line in _read(group.details).splitlines())
    # v1 counts the groups below by names of their own
    return int(details.get("total_inactive_file", details.get("inactive_file", "0")))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
