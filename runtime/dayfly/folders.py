"""The folders of a step: what it is given, what it leaves, and what it shares with others.

Mounted at `Load`, from the stores that the sandbox was started with, before any user code runs:

    /in/NAME            an artifact, or several at /in/NAME/0 and so on; read-only
    /out                empty; what lies in it when the step is dead is its output
    /workspaces/NAME    what earlier steps left, and what this one changes, in an overlay (if there
                        is anything, else a folder as /out); for one
                        that decides how branches join, NAME.branches/0 and so on are what each of
                        them left, read-only, and NAME.conflicts the paths that they disagree about
    the stores          covered, for steps and for whoever else becomes a sandbox that had them

Without isolation the first is made of symbolic links, and there is no third.
"""

import json
import os
import re

from dayfly import lockdown
from dayfly.context import FOLDERS
from dayfly.record import Record

INPUTS_MAX, WORKSPACES_MAX, BRANCHES_MAX = 1000, 32, 256
STORES = {"artifacts": "/artifacts", "steps": "/steps", "layers": "/layers"}
OVERLAY_OPTIONS = "userxattr,redirect_dir=nofollow,metacopy=off,index=off,xino=off"
IN, OUT, WORKSPACES = FOLDERS

_INPUT = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,62}(/[0-9]{1,6})?")
_PLACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?/(file|tree)-[0-9a-f]{64}/content")
_STEP = re.compile(r"[a-z0-9][-a-z0-9]{0,62}")
_WORKSPACE = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,62}")
_BRANCH = re.compile(r"([A-Za-z_][A-Za-z0-9_-]{0,62})/[0-9]{1,3}")
_LOWER = re.compile(r"lowerdir=/layers/[0-9a-f]{16}/tree(:/layers/[0-9a-f]{16}/tree)*")
_SEEN = re.compile(rf"(lowerdir=(/layers/[0-9a-f]{{16}}/tree:)+/empty,{OVERLAY_OPTIONS})?")


class Mounts(Record):
    """What the pool says: see `dayfly_pool.models.Mounts`."""

    step: str
    inputs: list[list[str]]
    workspaces: list[list[str]]
    file_bytes_max: int
    branches: list[list[str]]


def read(body: bytes) -> Mounts:
    """What `Load` says in its body. Raises ValueError: the server cannot mean it."""
    mounts = Mounts(**json.loads(body))
    _check(_STEP, mounts.step)
    if len(mounts.inputs) > INPUTS_MAX or len(mounts.workspaces) > WORKSPACES_MAX:
        raise ValueError(f"over {INPUTS_MAX} inputs, or {WORKSPACES_MAX} workspaces")
    if len(mounts.branches) > BRANCHES_MAX:
        raise ValueError(f"over {BRANCHES_MAX} branches")
    for name, place in mounts.inputs:
        _check(_INPUT, name)
        _check(_PLACE, place)
    for name, options in mounts.workspaces:
        _check(_WORKSPACE, name)
        if not options:
            continue
        lower, own = options.partition(",")[::2]
        _check(_LOWER, lower)
        upper = f"/steps/{mounts.step}/workspaces/{name}"
        if own != f"upperdir={upper}/upper,workdir={upper}/work,{OVERLAY_OPTIONS},volatile":
            raise ValueError(f"not the options of workspace {name}: {options!r}")
    names = {name for name, _ in mounts.workspaces}
    for name, options in mounts.branches:
        _check(_BRANCH, name)
        _check(_SEEN, options)
        if name.partition("/")[0] not in names:
            raise ValueError(f"a branch of no workspace of the step: {name!r}")
    for named in (mounts.inputs, mounts.workspaces, mounts.branches):
        if len({name for name, _ in named}) < len(named):
            raise ValueError("two of a step's folders have the same name")
    return mounts


def _check(form: re.Pattern[str], text: str) -> None:
    if not form.fullmatch(text):
        raise ValueError(f"not in a step's folders: {text!r}")


def prepare() -> None:
    """What every step needs, before it is known which: two more file systems take a while."""
    workspaces = 3 * WORKSPACES_MAX + BRANCHES_MAX
    for place, entries in ((IN, 2 * INPUTS_MAX), (WORKSPACES, workspaces)):
        options = f"size=1m,nr_inodes={entries + 1},mode=755"
        lockdown.mount("dayfly", place, "tmpfs", lockdown.MS_NOSUID | lockdown.MS_NODEV, options)


def mount(mounts: Mounts, prepared: lockdown.Prepared) -> None:
    """Have them in this mount namespace, and let the ruleset allow to write where it may."""
    flags = lockdown.MS_NOSUID | lockdown.MS_NODEV
    for name, place in mounts.inputs:
        _mount_input(f"{IN}/{name}", f"{STORES['artifacts']}/{place}")
    lockdown.mount(f"{STORES['steps']}/{mounts.step}/out", OUT, None, lockdown.MS_BIND)
    lockdown.remount(OUT, flags)
    lockdown.allow_writing(prepared, OUT)
    for name, options in mounts.workspaces:
        place = f"{WORKSPACES}/{name}"
        os.mkdir(place, 0o755)
        if options:
            lockdown.mount("overlay", place, "overlay", flags, options)
        else:
            upper = f"{STORES['steps']}/{mounts.step}/workspaces/{name}/upper"
            lockdown.mount(upper, place, None, lockdown.MS_BIND)
            lockdown.remount(place, flags)
        lockdown.allow_writing(prepared, place)
    _mount_branches(mounts)


def _mount_branches(mounts: Mounts) -> None:
    flags = lockdown.MS_RDONLY | lockdown.MS_NOSUID | lockdown.MS_NODEV
    for name, options in mounts.branches:
        workspace, _, number = name.partition("/")
        folder = f"{WORKSPACES}/{workspace}.branches"
        if not os.path.isdir(folder):
            os.mkdir(folder, 0o755)
            told = f"{STORES['steps']}/{mounts.step}/workspaces/{workspace}/conflicts"
            _mount_read_only(f"{WORKSPACES}/{workspace}.conflicts", told)
        os.mkdir(f"{folder}/{number}", 0o755)
        if options:
            lockdown.mount("overlay", f"{folder}/{number}", "overlay", flags, options)


def _mount_input(target: str, source: str) -> None:
    parent = os.path.dirname(target)
    if parent != IN and not os.path.isdir(parent):
        os.mkdir(parent, 0o755)
    _mount_read_only(target, source)


def _mount_read_only(target: str, source: str) -> None:
    if os.path.isdir(source):
        os.mkdir(target, 0o755)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
    lockdown.mount(source, target, None, lockdown.MS_BIND)
    flags = lockdown.MS_RDONLY | lockdown.MS_NOSUID | lockdown.MS_NODEV
    lockdown.remount(target, flags)


def close() -> None:
    """Whether there was anything to mount or not: no place can be added any more, and the stores
    are out of reach. Without capabilities nobody lifts their covers again.
    """
    for place in (IN, WORKSPACES):
        flags = lockdown.MS_RDONLY | lockdown.MS_NOSUID | lockdown.MS_NODEV
        lockdown.remount(place, flags)
    for place in STORES.values():
        lockdown.mount(lockdown.EMPTY, place, None, lockdown.MS_BIND)


def link(mounts: Mounts, stores: dict[str, str]) -> tuple[str, str, str]:
    """The same in the open, as far as it goes; where the three are. *stores* are folders.

    Raises OSError when they cannot be made. The links go with the step's own folder.
    """
    if mounts.workspaces:
        raise OSError("workspaces need isolation: use the driver linux")
    own = f"{stores['steps']}/{mounts.step}"
    os.mkdir(f"{own}/in", 0o755)
    for name, place in mounts.inputs:
        target = f"{own}/in/{name}"
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(f"{stores['artifacts']}/{place}", target)
    return f"{own}/in", f"{own}/out", f"{own}/workspaces"
