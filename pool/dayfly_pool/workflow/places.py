"""Folders in which things appear whole or not at all, whenever the power goes.

What is put together lies in `incoming`, then gets its final name by a rename; what is removed is
renamed into `trash` first. `open` empties both.
"""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dayfly_pool.errors import DataFolderUnusable, DiskFull
from dayfly_pool.workflow import trees

NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


class Places:
    """The folder *root*, with *shelf* in it for what is finished."""

    def __init__(self, root: Path, shelf: str) -> None:
        self.root = root
        self._shelf = shelf
        self._open: dict[str, int] = {}

    def open(self) -> None:
        """Have the folders, and remove what a crash left half done."""
        with self.disk():
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.root.chmod(0o700)  # other users of the machine have nothing to look for in it
            # A sandbox may pass through the shelf, where it is mounted, and list nothing.
            for name, mode in ((self._shelf, 0o711), ("incoming", 0o700), ("trash", 0o700)):
                place = self.root / name
                place.mkdir(mode=0o700, exist_ok=True)
                with trees.opened_folder(None, place) as folder:
                    os.fchmod(folder, mode)  # whatever the umask
                    self._open[name] = os.dup(folder)
            for name in ("incoming", "trash"):
                for left in os.listdir(self._open[name]):
                    trees.erase(self._open[name], left)

    def close(self) -> None:
        """Let go of the folders."""
        while self._open:
            os.close(self._open.popitem()[1])

    @property
    def shelf(self) -> int:
        """The open folder of what is finished."""
        return self._open[self._shelf]

    @property
    def incoming(self) -> int:
        """The open folder of what is being put together."""
        return self._open["incoming"]

    @contextlib.contextmanager
    def scratch(self) -> Iterator[tuple[str, int]]:
        """A folder to put something together in, by name and descriptor.

        It is gone afterwards, unless it has been renamed.
        """
        name = self.begin()
        try:
            with trees.opened_folder(self.incoming, name) as folder:
                yield name, folder
        finally:
            self.give_up(name)

    def begin(self) -> str:
        """The name of a new folder in `incoming`."""
        name = secrets.token_hex(8)
        os.mkdir(name, 0o700, dir_fd=self.incoming)
        return name

    def give_up(self, name: str) -> None:
        """Erase a folder in `incoming`, if it is there."""
        trees.erase(self.incoming, name)

    def discard(self, folder: int, name: str) -> None:
        """What is called *name* in the open *folder* goes to the trash, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            trash = secrets.token_hex(8)
            os.rename(name, trash, src_dir_fd=folder, dst_dir_fd=self._open["trash"])

    def empty_trash(self) -> None:
        """Erase what was discarded: as long as that takes."""
        for left in os.listdir(self._open["trash"]):
            trees.erase(self._open["trash"], left)

    @contextlib.contextmanager
    def disk(self) -> Iterator[None]:
        """What the system says of the disk, in our words."""
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                raise DiskFull(
                    f"there is no room left in {self.root} ({error.strerror})"
                ) from error
            raise DataFolderUnusable(
                f"{self.root} failed ({error}): repair the disk, or the rights to the folder"
            ) from error


def write(folder: int, name: str, content: bytes, *, is_synced: bool = False) -> None:
    """Make a file of ours in the open *folder*."""
    with open(os.open(name, NEW, 0o600, dir_fd=folder), "wb") as file:
        file.write(content)
        if is_synced:
            file.flush()
            os.fsync(file.fileno())
