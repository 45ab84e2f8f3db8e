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
In a pod all of it is sent: as files of its own, see `freight`; there the stores are not.
"""

from __future__ import annotations

import json
import os
import re
import time

from dayfly import freight, lockdown
from dayfly.context import FOLDERS
from dayfly.record import Record

TYPE_CHECKING = False  # see `record`
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

INPUTS_MAX, WORKSPACES_MAX, BRANCHES_MAX = 1000, 32, 256
STORES = {"artifacts": "/artifacts", "steps": "/steps", "layers": "/layers"}
OVERLAY_OPTIONS = "userxattr,redirect_dir=nofollow,metacopy=off,index=off,xino=off"
IN, OUT, WORKSPACES = FOLDERS
GIVEN = f"{IN}/.given"
"""In a pod: what each workspace held in the beginning, where user code cannot write."""

_COARSE_CLOCK = 5  # CLOCK_REALTIME_COARSE: what the times of files are told by

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


def receive(mounts: Mounts, pull: Callable[[], bytes], prepared: lockdown.Prepared) -> None:
    """The same in a pod: made of what the pool sends, in the order in which *mounts* names it.

    Raises OSError, and ValueError for what is none of it.
    """
    if not os.path.isdir(OUT):
        raise OSError("this sandbox was not made for steps")
    source = freight.Source(pull)
    try:
        top = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _unpack(mounts, source, top)
        finally:
            os.close(top)
    except (freight.Unfit, freight.Malformed) as error:
        raise ValueError(str(error)) from None
    lockdown.allow_writing(prepared, OUT)
    for name, _ in mounts.workspaces:
        lockdown.allow_writing(prepared, f"{WORKSPACES}/{name}")
    # a file that is changed from now on has another time than those that were made until now
    made = time.clock_gettime_ns(_COARSE_CLOCK)
    while time.clock_gettime_ns(_COARSE_CLOCK) <= made:
        time.sleep(0.001)


def _unpack(mounts: Mounts, source: freight.Source, top: int) -> None:
    plain = freight.Unpacking(source)
    for name, _ in mounts.inputs:
        parent = os.path.dirname(f"{IN}/{name}")
        os.makedirs(parent, exist_ok=True)
        plain.tree(top, f"{IN}/{name}")
    os.mkdir(GIVEN, 0o700)
    for name, _ in mounts.workspaces:
        _unpack_workspace(source, top, name)
    for name in dict.fromkeys(name.partition("/")[0] for name, _ in mounts.branches):
        os.mkdir(f"{WORKSPACES}/{name}.branches", 0o755)
        plain.tree(top, f"{WORKSPACES}/{name}.conflicts")
    for name, _ in mounts.branches:
        workspace, _, number = name.partition("/")
        place = f"{WORKSPACES}/{workspace}.branches/{number}"
        os.mkdir(place, 0o755)
        plain.tree(top, place)


def _unpack_workspace(source: freight.Source, top: int, name: str) -> None:
    place = f"{WORKSPACES}/{name}"
    os.mkdir(place, 0o755)
    with open(f"{GIVEN}/{name}", "wb") as given:

        def note(path: bytes, status: os.stat_result) -> None:
            given.write(freight.Given.note(path, status))

        freight.Unpacking(source, note=note).tree(top, place)
        if not given.tell():  # there was nothing yet
            note(b"", os.stat(place))


def left() -> Iterator[bytes]:
    """What a step has left in a pod, for the pool: its output, and by the names of the workspaces
    what it has changed in them. Nobody may be there any more who could change it.
    """
    return freight.pieces(_left())


def _left() -> Iterator[bytes]:
    try:
        yield from freight.tree([OUT])
        for name in sorted(os.listdir(GIVEN)):
            with open(f"{GIVEN}/{name}", "rb") as file:
                given = freight.Given(file.read())
            yield from freight.changes(f"{WORKSPACES}/{name}", given)
    except freight.Unfit as error:
        yield freight.unfit(str(error))
    except OSError as error:
        yield freight.unfit(f"what the step left cannot be read: {error}")
