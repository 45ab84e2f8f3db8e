"""Workspaces: folders that a chain of steps changes, each seeing what the one before it left.

A workspace is a stack of layers, and each layer is what one step changed. A step sees the stack
through an overlay mount whose upper layer is its own, so steps that run beside each other see the
same and change nothing for each other, and a step that fails has changed nothing. When the step is
dead its upper layer is put on top: the workspace, a value to be kept in a journal, now names one
layer more. Where branches join, their layers are put on top of each other if they do not overlap;
what overlaps is said before anything is done. See `merging` for the rules.

    ROOT/layers/ID/tree      what is mounted, as a lower layer only
    ROOT/layers/ID/record    its changes
    ROOT/incoming/, ROOT/trash/    as in `artifacts`

Layers never change, and share files by hard links. Layers that many steps made are merged now and
then, so that no chain is too long for the kernel. Every method waits for the disk.
"""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec
from msgspec import Struct

from dayfly_pool.errors import ArtifactGone, BadInput, BadTree, WorkspaceConflict
from dayfly_pool.workflow import merging, places, trees
from dayfly_pool.workflow.artifacts import Artifact, Artifacts
from dayfly_pool.workflow.merging import Change, Conflict
from dayfly_pool.workflow.places import Places
from dayfly_pool.workflow.trees import Limits

Policy = Literal["fail", "ordered", "reduce"]
TREE: Final = "tree"
RECORD: Final = "record"
LAYERS_FREE: Final = 8
"""So many layers are never merged."""

LAYERS_MAX: Final = 64
"""Forks within forks hold on to theirs; the options of mount(2), 4096 bytes, have room for them."""

BRANCHES_MAX: Final = 256
"""That one step decides between."""

CONFLICTS_NAMED_MAX: Final = 20
OVERLAYS: Final = "user.overlay."
OPAQUE: Final = "user.overlay.opaque"
OVERLAY_OPTIONS: Final = "userxattr,redirect_dir=nofollow,metacopy=off,index=off,xino=off"
"""And `volatile` where something is written: else every unmount would synchronize the whole file
system."""

_ID: Final = re.compile(r"[0-9a-f]{16}")
_SETTING_IDS: Final = stat.S_ISUID | stat.S_ISGID


class Layer(Struct, frozen=True):
    """A layer, and how many changes are in it."""

    id: str
    changes: int


class Workspace(Struct, frozen=True):
    """What a workspace is at one moment, the lowest layer first. Those below *floor* are shared
    with other branches. An empty folder is `Workspace()`."""

    layers: tuple[Layer, ...] = ()
    floor: int = 0


def overlay(workspace: Workspace, step: str, name: str, *, layers: str, steps: str) -> str:
    """The options of mount(2) for workspace *name* of *step*, as its sandbox has these folders.

    Nothing for an empty one: what the step writes to is all there is. An overlay would have the
    kernel work half as long again for what is written in small pieces.
    """
    lower = [f"{layers}/{layer.id}/{TREE}" for layer in reversed(workspace.layers)]
    if not lower:
        return ""
    own = f"{steps}/{step}/workspaces/{name}"
    mounts = f"lowerdir={':'.join(lower)},upperdir={own}/upper,workdir={own}/work"
    return f"{mounts},{OVERLAY_OPTIONS},volatile"


def read_only(workspace: Workspace, *, layers: str, empty: str) -> str:
    """The same for one that a step only looks at; nothing for one that is empty."""
    lower = [f"{layers}/{layer.id}/{TREE}" for layer in reversed(workspace.layers)]
    return f"lowerdir={':'.join([*lower, empty])},{OVERLAY_OPTIONS}" if lower else ""


def fork(workspace: Workspace) -> Workspace:
    """What each of several branches starts from."""
    return msgspec.structs.replace(workspace, floor=len(workspace.layers))


class Record(Struct, frozen=True):
    """What is in a layer. *boot* as in `artifacts.Record`."""

    boot: str
    changes: list[Change]


class Workspaces:
    """The layers in *folder*, whose files belong to the user *owner*.

    As root, *owner* is a user that no sandbox runs as: its files are the sandbox's own by an
    id-mapped mount. Else it is this process's user, as every sandbox's.
    """

    def __init__(self, folder: Path, owner: int, limits: Limits | None = None) -> None:
        self._places = Places(folder, "layers")
        self._owner = owner
        self._limits = limits or Limits()
        self._boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    def open(self) -> None:
        """Have the folders, and remove what a crash left half done."""
        self._places.open()

    def close(self) -> None:
        """Let go of the folders."""
        self._places.close()

    # --- Steps ---

    def lower(self, workspace: Workspace) -> list[Path]:
        """What to mount as lower layers, the uppermost first, as overlayfs wants it.

        :raises ArtifactGone: if the disk has not got them; the steps that made them run again.
        """
        with self._places.disk():
            for layer in workspace.layers:
                self._changes(layer)
        return [self._tree(layer) for layer in reversed(workspace.layers)]

    def take(self, workspace: Workspace, upper: Path, *, is_synced: bool = True) -> Workspace:
        """Put what a dead step left in its *upper* layer on top of *workspace*, which it had seen.

        It is moved. A step that changed nothing leaves the workspace as it is.

        :raises BadTree: naming what cannot be kept; the step's changes are lost then.
        """
        with self._places.disk(), self._places.scratch() as (name, scratch):
            with trees.opened_folder(None, upper.parent) as parent:
                trees.take(parent, upper.name, scratch, TREE)
            below = _View([self._tree(layer) for layer in workspace.layers])
            with trees.opened_folder(scratch, TREE) as tree:
                if os.geteuid() == 0:
                    os.fchown(tree, self._owner, self._owner)
                os.fchmod(tree, 0o755)
                found = _Taking(self._limits, is_bare=not workspace.layers).changes(tree)
                changes = merging.normal(found, below.mode)
                _make_normal(tree, found, changes)
            if not changes:
                return workspace
            layer = self._publish(name, scratch, changes, is_synced=is_synced)
            grown = (*workspace.layers, layer)
            return self._merged(Workspace(grown, workspace.floor), is_synced=is_synced)

    def settle(self, workspace: Workspace) -> None:
        """After this returns all of it is on the disk: see `Artifacts.settle`.

        :raises ArtifactGone: if a layer is not stored.
        """
        with self._places.disk():
            for layer in workspace.layers:
                record = self._record(layer)
                if record.boot:
                    trees.sync(self._places.shelf, layer.id, layer.changes)
                    self._note(layer, record.changes)

    def _note(self, layer: Layer, changes: list[Change]) -> None:
        """It is on the disk."""
        record = msgspec.msgpack.encode(Record("", changes))
        content = hashlib.sha256(record).digest() + record
        unfinished = f"{RECORD}.{secrets.token_hex(4)}"
        with trees.opened_folder(self._places.shelf, layer.id) as folder:
            places.write(folder, unfinished, content, is_synced=True)
            os.rename(unfinished, RECORD, src_dir_fd=folder, dst_dir_fd=folder)
            os.fsync(folder)
        os.fsync(self._places.shelf)

    # --- Joining ---

    def conflicts(self, base: Workspace, branches: Sequence[Workspace]) -> tuple[Conflict, ...]:
        """What a join of these branches would not know; for a step that decides itself."""
        with self._places.disk():
            return merging.conflicts([self._of_branch(base, branch) for branch in branches])

    def changes(self, base: Workspace, branch: Workspace) -> list[Change]:
        """What *branch* changed since it was forked from *base*."""
        with self._places.disk():
            return self._of_branch(base, branch)

    def join(
        self,
        base: Workspace,
        branches: Sequence[Workspace],
        policy: Policy = "fail",
        names: Sequence[str] = (),
        *,
        is_synced: bool = True,
    ) -> Workspace:
        """*base* with the changes of all *branches* of its `fork`.

        Where they overlap, by `ordered` a later branch wins over an earlier one; by `reduce` all is
        as in *base*, and who asks decides; by `fail` nothing is done. *names* are what the branches
        are called in the message.

        :raises WorkspaceConflict: naming the paths, and whose they are.
        """
        with self._places.disk():
            changes = [self._of_branch(base, branch) for branch in branches]
            if policy == "fail" and (found := merging.conflicts(changes)):
                raise WorkspaceConflict(in_words(found, names))
            layers = list(base.layers)
            kept = merging.undisputed(changes) if policy == "reduce" else changes
            for branch, all_of_it, some in zip(branches, changes, kept, strict=True):
                own = branch.layers[len(base.layers) :]
                if len(some) < len(all_of_it):
                    own = self._layer(base.layers, some, own, is_synced=is_synced)
                elif len(own) > 1:  # as they are, one would remove what another branch made
                    own = self._one(branch.layers[: len(base.layers)], own, is_synced=is_synced)
                layers += own
            joined = Workspace(tuple(layers), base.floor)
            return self._merged(joined, is_synced=is_synced)

    def _of_branch(self, base: Workspace, branch: Workspace) -> list[Change]:
        if branch.layers[: len(base.layers)] != base.layers:
            raise BadInput("a branch does not come from this workspace: join what was forked of it")
        own = [self._changes(layer) for layer in branch.layers[len(base.layers) :]]
        below = _View([self._tree(layer) for layer in base.layers])
        return own[0] if len(own) == 1 else merging.normal(merging.stacked(own), below.mode)

    # --- Keeping the stack low ---

    def _merged(self, workspace: Workspace, *, is_synced: bool) -> Workspace:
        layers = workspace.layers
        sizes = [layer.changes for layer in layers]
        free = LAYERS_FREE if len(layers) < LAYERS_MAX else 0
        start = merging.run_to_merge(sizes, workspace.floor, free)
        if start >= len(layers) - 1:
            return workspace
        one = self._one(layers[:start], layers[start:], is_synced=is_synced)
        return Workspace((*layers[:start], *one), workspace.floor)

    def _one(
        self, below: Sequence[Layer], layers: Sequence[Layer], *, is_synced: bool
    ) -> tuple[Layer, ...]:
        """A layer that is the same as *layers* on top of *below*; none if they change nothing."""
        stacked = merging.stacked([self._changes(layer) for layer in layers])
        return self._layer(below, stacked, layers, is_synced=is_synced)

    def _layer(
        self,
        below: Sequence[Layer],
        changes: Sequence[Change],
        layers: Sequence[Layer],
        *,
        is_synced: bool,
    ) -> tuple[Layer, ...]:
        """A layer of these *changes*, whose content is in *layers*; none if they change nothing."""
        view = _View([self._tree(layer) for layer in below])
        changes = merging.normal(changes, view.mode)
        if not changes:
            return ()
        with self._places.scratch() as (name, scratch):
            sources = [self._tree(layer) for layer in layers]
            self._make(scratch, TREE, changes, sources, is_layer=True)
            return (self._publish(name, scratch, changes, is_synced=is_synced),)

    def snapshot(
        self, workspace: Workspace, artifacts: Artifacts, namespace: str, *, is_synced: bool = True
    ) -> Artifact:
        """What the workspace holds now, as an artifact of the same file system.

        Files that all may read and only their owner may write are linked, others copied.

        :raises BadTree: naming what cannot be in an artifact.
        """

        def make(folder: int, name: str) -> None:
            with self._places.disk():
                stacked = merging.stacked([self._changes(layer) for layer in workspace.layers])
                changes = merging.normal(stacked, lambda path: None)
                sources = [self._tree(layer) for layer in workspace.layers]
                self._make(folder, name, changes, sources, is_layer=False)

        return artifacts.adopt(namespace, make, is_synced=is_synced)

    def _make(
        self,
        folder: int,
        name: str,
        changes: Sequence[Change],
        sources: Sequence[Path],
        *,
        is_layer: bool,
    ) -> None:
        """Make tree *name* in *folder*: folders anew, all else as links to what is in *sources*."""
        os.mkdir(name, 0o700, dir_fd=folder)
        with trees.opened_folder(folder, name) as tree:
            for change in changes:
                path = change.path
                source = f"{sources[change.layer]}/{path}"
                if change.kind not in ("folder", "through", "replaced"):
                    _link(source, path, tree, is_layer=is_layer)
                    continue
                os.mkdir(path, 0o700, dir_fd=tree)
                if change.kind == "replaced" and is_layer:
                    with trees.opened_folder(tree, path) as made:
                        os.setxattr(made, OPAQUE, b"y")
            for change in reversed(changes):  # folders are closed when they are full
                if change.kind in ("folder", "through", "replaced"):
                    self._furnish(tree, change.path, change.mode if is_layer else 0o555, is_layer)
            self._furnish(folder, name, 0o755 if is_layer else 0o555, is_layer)

    def _furnish(self, folder: int, path: str, mode: int, is_layer: bool) -> None:
        if is_layer and os.geteuid() == 0:
            os.chown(path, self._owner, self._owner, dir_fd=folder, follow_symlinks=False)
        os.chmod(path, mode, dir_fd=folder)

    # --- Layers ---

    def sweep(self, keep: Callable[[str], bool], before: float) -> int:
        """Remove each layer that is older than *before* (seconds since the epoch) and whose id
        *keep* refuses; returns how many. None of them may be in use."""
        removed = 0
        with self._places.disk():
            for id_ in os.listdir(self._places.shelf):
                age = os.lstat(id_, dir_fd=self._places.shelf).st_mtime
                if age < before and not (_ID.fullmatch(id_) and keep(id_)):
                    self._places.discard(self._places.shelf, id_)
                    removed += 1
            self._places.empty_trash()
        return removed

    def _publish(
        self, name: str, scratch: int, changes: Sequence[Change], *, is_synced: bool
    ) -> Layer:
        kept = [Change(c.path, c.kind, c.mode) for c in changes]
        record = msgspec.msgpack.encode(Record("" if is_synced else self._boot, kept))
        places.write(scratch, RECORD, hashlib.sha256(record).digest() + record)
        if is_synced:
            trees.sync(self._places.incoming, name, len(changes))
        id_ = secrets.token_hex(8)
        os.fchmod(scratch, 0o711)
        os.rename(name, id_, src_dir_fd=self._places.incoming, dst_dir_fd=self._places.shelf)
        if is_synced:
            os.fsync(self._places.shelf)
        return Layer(id_, len(changes))

    def _tree(self, layer: Layer) -> Path:
        if not _ID.fullmatch(layer.id):
            raise BadInput(f"{trees.shown(layer.id)} is not a layer's id")
        return self._places.root / "layers" / layer.id / TREE

    def _changes(self, layer: Layer) -> list[Change]:
        return self._record(layer).changes

    def _record(self, layer: Layer) -> Record:
        gone = ArtifactGone(f"layer {layer.id} of a workspace is not stored: run its step again")
        try:
            text = (self._tree(layer).parent / RECORD).read_bytes()
            record = msgspec.msgpack.decode(text[32:], type=Record)
        except (FileNotFoundError, msgspec.MsgspecError) as error:
            raise gone from error
        is_lost = record.boot not in ("", self._boot)  # a power loss may have taken half of it
        if is_lost or hashlib.sha256(text[32:]).digest() != text[:32]:
            raise gone
        return record


class _View:
    """What is seen through layers, the lowest first: looked up path by path, as overlayfs does."""

    def __init__(self, trees_: Sequence[Path]) -> None:
        self._folders: dict[str, list[str]] = {"": [str(tree) for tree in reversed(trees_)]}
        """By folder: its parts in the layers, the uppermost first."""

    def mode(self, path: str) -> int | None:
        """`st_mode` of *path*; None where nothing is."""
        parent, _, name = path.rpartition("/")
        if parent not in self._folders:
            self.mode(parent)
        parts: list[str] = []
        found: int | None = None
        for part in self._folders.get(parent, ()):
            try:
                status = os.lstat(f"{part}/{name}")
            except FileNotFoundError:
                continue
            if not stat.S_ISDIR(status.st_mode):
                if found is None and not is_whiteout(status):
                    found = status.st_mode
                break
            found = status.st_mode if found is None else found
            parts.append(f"{part}/{name}")
            if _is_opaque(parts[-1]):
                break
        self._folders[path] = parts
        return found


class _Taking:
    """Reads an upper layer that a step left, and takes from it what no layer may have.

    In one that *is_bare* the step wrote without an overlay between: what is overlayfs' own language
    there, the step has said.
    """

    def __init__(self, limits: Limits, *, is_bare: bool) -> None:
        self._limits = limits
        self._is_bare = is_bare
        self._bytes = 0
        self._changes: list[Change] = []

    def changes(self, tree: int) -> list[Change]:
        """Everything in it, as overlayfs left it."""
        self._silence(tree, 0o755)
        self._enter(tree, "", 0)
        return self._changes

    def _enter(self, folder: int, path: str, depth: int) -> None:
        if depth > self._limits.depth:
            raise BadTree(f"{trees.shown(path)} lies deeper than {self._limits.depth} folders")
        for name, kind in trees.inside_of(folder, self._limits.entries):
            below = trees.checked_path(path, name)
            if len(self._changes) >= self._limits.entries:
                raise trees.too_many(self._limits.entries)
            if kind == "folder":
                with trees.opened_folder(folder, name) as inside:
                    mode = _set_mode(inside, os.fstat(inside), 0o700)
                    self._silence(inside, mode)
                    is_new = _is_opaque(inside)
                    self._changes.append(Change(below, "replaced" if is_new else "folder", mode))
                    self._enter(inside, below, depth + 1)
            elif kind == "file":
                self._seal(folder, name, below)
            else:
                self._note(below, os.lstat(name, dir_fd=folder))

    def _seal(self, folder: int, name: str, path: str) -> None:
        file, status = trees.open_file(folder, name)
        try:
            mode = _set_mode(file, status, 0o400)
            self._silence(file, mode)
            trees.refuse_writers(file, path)
        finally:
            os.close(file)
        self._bytes += status.st_size
        if self._bytes > self._limits.bytes:
            most = f"{self._limits.bytes} bytes"
            raise BadTree(f"with {trees.shown(path)} it is over {most} (holes count)")
        self._changes.append(Change(path, "file"))

    def _silence(self, file: int, mode: int) -> None:
        """Take from a file or folder what overlayfs would understand."""
        names = os.listxattr(file) if self._is_bare else []
        said = [name for name in names if name.startswith(OVERLAYS)]
        if not said:
            return
        os.fchmod(file, mode | 0o200)  # the attributes are part of what may be written
        for name in said:
            os.removexattr(file, name)
        os.fchmod(file, mode)

    def _note(self, path: str, status: os.stat_result) -> None:
        """Links, pipes and sockets do no harm; devices are the kernel's, or nobody's."""
        if is_whiteout(status):
            self._changes.append(Change(path, "removed"))
        elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            raise BadTree(f"{trees.shown(path)} is a device: leave files and folders")
        else:
            self._changes.append(Change(path, "file"))


def _set_mode(descriptor: int, status: os.stat_result, least: int) -> int:
    """No set-user-ID, and whoever owns it can read it: or without being root we could not."""
    mode = stat.S_IMODE(status.st_mode) & ~_SETTING_IDS | least
    if stat.S_IMODE(status.st_mode) != mode:
        os.fchmod(descriptor, mode)
    return mode


def _is_opaque(folder: int | str) -> bool:
    try:
        return os.getxattr(folder, OPAQUE) == b"y"
    except OSError as error:
        if error.errno != errno.ENODATA:
            raise
        return False


def is_whiteout(status: os.stat_result) -> bool:
    """Whether this stands, in a layer, for something removed."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _make_normal(tree: int, found: Sequence[Change], changes: Sequence[Change]) -> None:
    """Have a layer hold what `merging.normal` has left of it."""
    kept = {change.path: change.kind for change in changes}
    for change in reversed(found):
        kind = kept.get(change.path)
        if kind is None and change.kind == "removed":
            os.unlink(change.path, dir_fd=tree)
        elif kind is None:
            os.rmdir(change.path, dir_fd=tree)
        elif change.kind == "replaced" and kind != "replaced":
            with trees.opened_folder(tree, change.path) as folder:
                os.removexattr(folder, OPAQUE)


def _link(source: str, path: str, tree: int, *, is_layer: bool) -> None:
    """Another name for *source*; a copy where that cannot be, or would lay an artifact open."""
    status = os.lstat(source)
    is_file = stat.S_ISREG(status.st_mode)
    is_sealed = status.st_mode & 0o444 == 0o444 and not status.st_mode & 0o022
    if is_layer or is_sealed or not is_file:
        try:
            os.link(source, path, dst_dir_fd=tree, follow_symlinks=False)
        except OSError as error:
            if error.errno != errno.EMLINK or not (is_file or is_whiteout(status)):
                raise
            if not is_file:
                os.mknod(path, stat.S_IFCHR, dir_fd=tree)
                return
        else:
            return
    mode = stat.S_IMODE(status.st_mode) if is_layer else 0o444 | (status.st_mode & 0o100 and 0o111)
    with contextlib.ExitStack() as stack:
        read = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        stack.callback(os.close, read)
        write = os.open(path, places.NEW, 0o600, dir_fd=tree)
        stack.callback(os.close, write)
        while os.copy_file_range(read, write, 1 << 30):
            pass
        if is_layer:
            os.fchown(write, status.st_uid, status.st_gid)
        os.fchmod(write, mode)
        os.utime(write, ns=(status.st_atime_ns, status.st_mtime_ns))


def in_words(conflicts: Sequence[Conflict], names: Sequence[str] = ()) -> str:
    """The paths, and who changed them; at most CONFLICTS_NAMED_MAX."""

    def named() -> Iterator[str]:
        for conflict in conflicts[:CONFLICTS_NAMED_MAX]:
            who = [names[n] if n < len(names) else f"branch {n}" for n in conflict.branches]
            yield f"{trees.shown(conflict.path)} ({', '.join(who)})"

    more = len(conflicts) - CONFLICTS_NAMED_MAX
    rest = f" and {more} more" if more > 0 else ""
    return f"parallel branches changed the same paths: {'; '.join(named())}{rest}"
