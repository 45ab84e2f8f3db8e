"""The folders that a step writes to: its output, and the upper layer of each workspace.

    ROOT/ID/out                       empty; what lies in it when the step is dead is its output
    ROOT/ID/workspaces/NAME/upper     what the step changes in workspace NAME
    ROOT/ID/workspaces/NAME/work      overlayfs' own, on the same file system
    ROOT/ID/workspaces/NAME/conflicts the paths that its branches disagree about, a line each

They last as long as the step. No step outlives the server, so what `open` finds is removed.
"""

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from msgspec import Struct

from dayfly_pool.errors import BadInput
from dayfly_pool.workflow import places, trees
from dayfly_pool.workflow.places import Places

_ID: Final = re.compile(r"[a-z0-9][-a-z0-9]{0,62}")
_NAME: Final = re.compile(r"[A-Za-z_][-A-Za-z0-9_]{0,62}")
"""No character of them means anything in the options of mount(2)."""


class StepFolders(Struct, frozen=True):
    """Where a step writes. *uppers* are by workspace."""

    id: str
    out: Path
    uppers: dict[str, Path]


class Steps:
    """The steps' folders in *folder*, for the user *owner*: see `workspaces.Workspaces`."""

    def __init__(self, folder: Path, owner: int) -> None:
        self._places = Places(folder, "steps")
        self._owner = owner

    def open(self) -> None:
        """Have the folder, with nothing in it."""
        self._places.open()
        with self._places.disk():
            for left in os.listdir(self._places.shelf):
                trees.erase(self._places.shelf, left)

    def close(self) -> None:
        """Let go of the folder."""
        self._places.close()

    def make(self, step: str, workspaces: Iterable[str] = ()) -> StepFolders:
        """Folders for a step that has none yet."""
        names = list(workspaces)
        if not _ID.fullmatch(step):
            raise BadInput(f"{trees.shown(step)} is not a step's name: use a-z, 0-9 and -")
        for name in names:
            if not _NAME.fullmatch(name):
                raise BadInput(f"{trees.shown(name)} is not a workspace's name: use letters, 0-9,"
                               " - and _, a letter or _ first")  # fmt: skip
        with self._places.disk(), self._places.scratch() as (scratch, folder):
            os.fchmod(folder, 0o711)
            os.mkdir("workspaces", 0o711, dir_fd=folder)
            self._mkdir(folder, "out")
            for name in names:
                os.mkdir(f"workspaces/{name}", 0o711, dir_fd=folder)
                self._mkdir(folder, f"workspaces/{name}/upper")
                self._mkdir(folder, f"workspaces/{name}/work")
            incoming, shelf = self._places.incoming, self._places.shelf
            os.rename(scratch, step, src_dir_fd=incoming, dst_dir_fd=shelf)
        place = self._places.root / "steps" / step
        uppers = {name: place / "workspaces" / name / "upper" for name in names}
        return StepFolders(step, place / "out", uppers)

    def _mkdir(self, folder: int, name: str) -> None:
        os.mkdir(name, 0o755, dir_fd=folder)
        os.chmod(name, 0o755, dir_fd=folder)  # whatever the umask
        if os.geteuid() == 0:
            os.chown(name, self._owner, self._owner, dir_fd=folder, follow_symlinks=False)

    def tell(self, step: str, workspace: str, paths: Iterable[str]) -> None:
        """Have `conflicts` in it."""
        at = f"{step}/workspaces/{workspace}/conflicts"
        with self._places.disk():
            places.write(self._places.shelf, at, "".join(f"{p}\n" for p in paths).encode())
            os.chmod(at, 0o444, dir_fd=self._places.shelf)

    def remove(self, step: str) -> None:
        """Remove what is left of a dead step's folders; nothing happens if there are none."""
        if not _ID.fullmatch(step):
            raise BadInput(f"{trees.shown(step)} is not a step's name")
        with self._places.disk(), contextlib.suppress(FileNotFoundError):
            self._places.discard(self._places.shelf, step)
            self._places.empty_trash()
