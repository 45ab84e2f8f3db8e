"""Folder trees that strangers made: looked at, sealed and erased without believing any of it.

Every step of a walk is relative to an open folder and follows no link, so nothing outside of the
tree is ever read, changed or removed, whatever is in it. Whoever made it should be dead by then; a
file that somebody still has open for writing is found out (a read lease is refused then, fcntl(2)),
for through that he could change it after it was sealed.

Its functions wait for the disk. They raise `BadTree`, which names the path, or `OSError`.
"""

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import secrets
import signal
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from msgspec import Struct

from dayfly.freight import (
    BYTES_MAX,
    DEPTH_MAX,
    ENTRIES_MAX,
    HOLES_MAX,
    PATH_BYTES_MAX,
    holes,
)
from dayfly_pool.errors import BadTree, TakingEnded

BIG_BYTES: Final = 256 << 10
"""From here on a file is hashed beside the walk: hashing outweighs handing it to a thread."""

UNDER_WAY_MAX: Final = 64
CHUNK_BYTES: Final = 256 << 10
WRITE_BACK_BYTES: Final = 32 << 20
SYNC_EACH_MAX: Final = 8
"""Up to so many files are synchronized one by one, more with the whole file system: 2,000 small
files took 490 ms one by one and 29 ms together."""

GoOn = Callable[[], None]
"""Asked again and again while a tree is read; raises `TakingEnded` when that is to end."""


def always() -> None:
    """Go on to the end."""


_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_ANY: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_F_SETSIG: Final = 10
_SYNC_FILE_RANGE_WRITE: Final = 2
_libc: Final = ctypes.CDLL(None, use_errno=True)


class Limits(Struct, frozen=True):
    """What a tree may be at most."""

    entries: int = ENTRIES_MAX
    bytes: int = BYTES_MAX
    depth: int = DEPTH_MAX


class Entry(Struct, frozen=True, array_like=True):
    """One path of a sealed tree, `""` for the tree itself.

    *kind* is `d` (folder), `f` (file), `x` (file that can be executed) or `l` (symbolic link). What
    follows *target* is how the file was found on the disk when it was sealed.
    """

    path: str
    kind: str
    size: int = 0
    sha256: str = ""
    target: str = ""
    inode: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0


class Early:
    """A file that was sealed and hashed while its step was being ended: see `seal_early`."""

    def __init__(self, file: int, status: os.stat_result, sha256: str) -> None:
        self._file = file  # open, so that no other file gets its inode
        self._status = status
        self.sha256 = sha256

    def is_of(self, status: os.stat_result) -> bool:
        """Whether this is the file."""
        was = self._status
        return (was.st_dev, was.st_ino, was.st_size, was.st_mtime_ns) == (
            status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
        )  # fmt: skip

    def close(self) -> None:
        """Let go of it."""
        os.close(self._file)


def seal_early(folder: int, path: str, go_on: GoOn = always) -> Early | None:
    """Hash the file at *path* below the open *folder* before its step is dead; None if that is no
    large file of one name, somebody writes to it still, or it is not to `go_on`.

    Only root can: the file is root's from here on, none of the step's processes has it open for
    writing (a read lease is had) and none may open it so, whatever they do until they are dead.
    """
    *parents, last = path.split("/")
    if os.geteuid() or not last or {"", ".", ".."} & {*parents, last}:
        return None
    try:
        with contextlib.ExitStack() as stack:
            for part in parents:
                folder = stack.enter_context(opened_folder(folder, part))
            file, status = open_file(folder, last)
        with contextlib.ExitStack() as closing:
            closing.callback(os.close, file)
            if status.st_nlink != 1 or not BIG_BYTES <= status.st_size <= BYTES_MAX:
                return None
            os.fchown(file, 0, 0)
            os.fchmod(file, 0o555)
            refuse_writers(file, path)
            status = os.fstat(file)
            if holes(file, status) > HOLES_MAX:
                return None
            digest = hashed(file, path, status, go_on)
            closing.pop_all()
            return Early(file, status, digest)
    except (OSError, BadTree, TakingEnded):
        return None  # whatever it is, `seal` says it better


def seal(
    folder: int,
    name: str,
    limits: Limits,
    *,
    threads: int = 2,
    early: Early | None = None,
    go_on: GoOn = always,
) -> list[Entry]:
    """Make *name* in the open *folder* unchangeable, and say what it holds, sorted by path.

    All of it belongs to this process's user afterwards, files 0444 or 0555 and folders 0555,
    without extended attributes. What is the *early* file is not hashed again. Symbolic links stay
    what they are, wherever they lead: nobody follows them here, and in a sandbox they lead nowhere
    that it could not go without them.
    """
    with ThreadPoolExecutor(threads, "hash") as pool:
        sealing = _Sealing(limits, pool, early, go_on)
        sealing.enter(folder, name, kind_of(os.lstat(name, dir_fd=folder).st_mode), "", 0)
        return sealing.finish()


class _Sealing:
    """One walk. Small files are hashed as they are met, big ones beside it."""

    def __init__(
        self,
        limits: Limits,
        pool: ThreadPoolExecutor | None,
        early: Early | None = None,
        go_on: GoOn = always,
    ) -> None:
        self._limits = limits
        self._early = early
        self._go_on = go_on
        self._pool = pool
        self._found: list[tuple[Entry, Future[str] | str]] = []
        self._bytes = self._holes = 0
        self._links: dict[int, tuple[list[str], int, Future[str] | str]] = {}
        """By inode, of files with several names: those found, how many there are, the digest."""

        self._under_way: list[Future[str]] = []
        self._uid, self._gid = os.geteuid(), os.getegid()

    def enter(self, folder: int, name: str, kind: str, path: str, depth: int) -> None:
        """Seal *name*, which is *path* in the tree."""
        self._go_on()
        if len(self._found) >= self._limits.entries:
            raise too_many(self._limits.entries)
        if kind == "file":
            self._seal_file(folder, name, path)
        elif kind == "folder":
            self._seal_folder(folder, name, path, depth)
        elif kind == "link" and path:
            self._seal_link(folder, name, path)
        else:
            what = what_it_is(os.lstat(name, dir_fd=folder).st_mode)
            raise BadTree(f"{shown(path)} is {what}: leave files and folders")

    def _seal_folder(self, folder: int, name: str, path: str, depth: int) -> None:
        if depth > self._limits.depth:
            raise BadTree(f"{shown(path)} lies deeper than {self._limits.depth} folders")
        with opened_folder(folder, name) as inside:
            for child, kind in inside_of(inside, self._limits.entries):
                self.enter(inside, child, kind, checked_path(path, child), depth + 1)
            self._own(inside, os.fstat(inside))
            os.fchmod(inside, 0o555)  # after its files: nothing comes or goes any more
            status = os.fstat(inside)
        self._found.append((_entry(path, "d", status, size=0), ""))

    def _seal_file(self, folder: int, name: str, path: str) -> None:
        file, status = open_file(folder, name)
        try:
            self._own(file, status)
            can_run = not path or bool(status.st_mode & 0o111)
            # A file's digest says nothing of its mode, so one that is all of an artifact can be run
            # whoever made it: the same bytes are the same artifact.
            wanted = 0o555 if can_run else 0o444
            if stat.S_IMODE(status.st_mode) != wanted:  # or its other names' times would be wrong
                os.fchmod(file, wanted)
            refuse_writers(file, path)
            status = os.fstat(file)
            self._bytes += status.st_size
            if self._bytes > self._limits.bytes:
                most = f"{self._limits.bytes} bytes"
                raise BadTree(f"with {shown(path)} it is over {most} (holes count): leave less")
            self._holes += holes(file, status)
            if self._holes > HOLES_MAX:
                raise BadTree(f"{shown(path)} is mostly holes: write what is in it")
            digest = self._digest(file, path, status)
        finally:
            os.close(file)
        self._found.append((_entry(path, "x" if can_run else "f", status), digest))

    def _seal_link(self, folder: int, name: str, path: str) -> None:
        status = os.lstat(name, dir_fd=folder)
        target = os.readlink(name, dir_fd=folder)
        if not is_text(target):
            raise BadTree(f"{shown(path)} links to a name that is not UTF-8: rename it")
        if status.st_uid != self._uid:
            os.chown(name, self._uid, self._gid, dir_fd=folder, follow_symlinks=False)
        self._found.append((_entry(path, "l", status, size=0, target=target), ""))

    def _own(self, descriptor: int, status: os.stat_result) -> None:
        """It is ours, and carries nothing that its digest would not tell of."""
        for name in os.listxattr(descriptor):
            if not name.startswith("security.") or name == "security.capability":
                os.removexattr(descriptor, name)
        if status.st_uid != self._uid:
            os.fchown(descriptor, self._uid, self._gid)

    def _digest(self, file: int, path: str, status: os.stat_result) -> Future[str] | str:
        if status.st_nlink > 1:
            if status.st_ino in self._links:
                found, _, digest = self._links[status.st_ino]
                found.append(path)
                return digest
            digest = self._hash(file, path, status)
            self._links[status.st_ino] = [path], status.st_nlink, digest
            return digest
        return self._hash(file, path, status)

    def _hash(self, file: int, path: str, status: os.stat_result) -> Future[str] | str:
        if self._early is not None and self._early.is_of(status):
            return self._early.sha256
        if self._pool is None or status.st_size < BIG_BYTES:
            return hashed(file, path, status, self._go_on)
        if len(self._under_way) >= UNDER_WAY_MAX:
            self._under_way.pop(0).result()  # so many files may be open
        own = os.dup(file)

        def work() -> str:
            try:
                return hashed(own, path, status, self._go_on)
            finally:
                os.close(own)

        future = self._pool.submit(work)
        self._under_way.append(future)
        return future

    def finish(self) -> list[Entry]:
        """What was found."""
        for found, count, _ in self._links.values():
            if len(found) != count:
                raise BadTree(
                    f"{shown(found[0])} is also linked from outside of it: leave a copy instead"
                )
        done = []
        for entry, digest in self._found:
            text = digest if isinstance(digest, str) else digest.result()
            done.append(_with_digest(entry, text) if text else entry)
        # The order of code points is that of the UTF-8 bytes.
        return sorted(done, key=lambda entry: entry.path)


def _entry(
    path: str, kind: str, status: os.stat_result, *, size: int | None = None, target: str = ""
) -> Entry:
    return Entry(
        path=path,
        kind=kind,
        size=status.st_size if size is None else size,
        target=target,
        inode=status.st_ino,
        mtime_ns=status.st_mtime_ns,
        ctime_ns=status.st_ctime_ns,
    )


def _with_digest(entry: Entry, sha256: str) -> Entry:
    return Entry(
        entry.path, entry.kind, entry.size, sha256, entry.target,
        entry.inode, entry.mtime_ns, entry.ctime_ns,
    )  # fmt: skip


def describe(folder: int, name: str, limits: Limits, *, threads: int = 2) -> list[Entry]:
    """As `seal`, of a tree that is ours: nothing is changed, and links from outside are fine."""
    with ThreadPoolExecutor(threads, "hash") as pool:
        walk = _Describing(limits, pool)
        walk.enter(folder, name, kind_of(os.lstat(name, dir_fd=folder).st_mode), "", 0)
        return walk.finish()


class _Describing(_Sealing):
    """Reads only."""

    def _seal_folder(self, folder: int, name: str, path: str, depth: int) -> None:
        with opened_folder(folder, name) as inside:
            for child, kind in inside_of(inside, self._limits.entries):
                self.enter(inside, child, kind, checked_path(path, child), depth + 1)
            status = os.fstat(inside)
        self._found.append((_entry(path, "d", status, size=0), ""))

    def _seal_file(self, folder: int, name: str, path: str) -> None:
        file, status = open_file(folder, name)
        try:
            digest = self._digest(file, path, status)
        finally:
            os.close(file)
        kind = "x" if not path or status.st_mode & 0o111 else "f"
        self._found.append((_entry(path, kind, status), digest))

    def _own(self, descriptor: int, status: os.stat_result) -> None:
        """It stays as it is."""

    def finish(self) -> list[Entry]:
        """What was found."""
        self._links.clear()
        return super().finish()


# --- Looking, without believing -------------------------------------------------------------------


def hashed(file: int, path: str, status: os.stat_result, go_on: GoOn = always) -> str:
    """The sha256 of an open file that must stay as *status* says while it is read."""
    digest, done = hashlib.sha256(), 0
    if status.st_size <= CHUNK_BYTES:
        data = os.pread(file, CHUNK_BYTES + 1, 0)
        done = len(data)
        digest.update(data)
    else:
        buffer = memoryview(bytearray(CHUNK_BYTES))
        while size := os.preadv(file, [buffer], done):
            digest.update(buffer[:size])
            done += size
            if done > status.st_size:
                break
            go_on()
    after = os.fstat(file)
    if (done, after.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
        raise BadTree(f"{shown(path)} was changed while it was read: its writer must end first")
    return digest.hexdigest()


def begin_writing(file: int, start: int) -> None:
    """Have the disk begin with the WRITE_BACK_BYTES of a file from *start* on, if they are new.

    Who synchronizes the file later waits less. The call itself waits when the disk has much to do.
    """
    offset, length = ctypes.c_int64(start), ctypes.c_int64(WRITE_BACK_BYTES)
    _libc.sync_file_range(file, offset, length, _SYNC_FILE_RANGE_WRITE)


def refuse_writers(file: int, path: str) -> None:
    """Nobody has this file open for writing, nor mapped so; raises `BadTree` if somebody has."""
    # Whoever opens it meanwhile would have us get a signal, by default a deadly one.
    fcntl.fcntl(file, _F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            raise BadTree(f"somebody is still writing to {shown(path)}: end that first") from error
        if error.errno != errno.EINVAL:  # a file system without leases
            raise
    else:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def inside_of(folder: int, most: int) -> list[tuple[str, str]]:
    """What is in an open folder, sorted: names, and `file`, `folder`, `link` or `other`."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                kind = "file"
            elif entry.is_dir(follow_symlinks=False):
                kind = "folder"
            else:
                kind = "link" if entry.is_symlink() else "other"
            found.append((entry.name, kind))
            if len(found) > most:
                raise too_many(most)
    return sorted(found)


def kind_of(mode: int) -> str:
    """As `inside_of` has it."""
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}
    return kinds.get(stat.S_IFMT(mode), "other")


def too_many(most: int) -> BadTree:
    """More than *most* entries."""
    return BadTree(f"it holds over {most} files and folders: leave fewer, or pack them")


def checked_path(path: str, name: str) -> str:
    """The path of *name* in folder *path*; raises `BadTree`."""
    below = f"{path}/{name}" if path else name
    if not is_text(name):
        raise BadTree(f"{shown(below)} has a name that is not UTF-8: rename it")
    if len(below) * 4 > PATH_BYTES_MAX and len(below.encode()) > PATH_BYTES_MAX:
        raise BadTree(f"{shown(below[:80])}... has a path of over {PATH_BYTES_MAX} bytes")
    return below


def is_text(name: str) -> bool:
    """Whether it was UTF-8 on the disk."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(path: str) -> str:
    """A stranger's path for a message: nothing in it acts on a terminal, and it has an end."""
    text = ascii(path)[1:-1] if path else "."
    return text if len(text) <= 300 else f"{text[:300]}..."


def what_it_is(mode: int) -> str:
    """A kind of file in words."""
    kinds = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFDIR: "a folder",
        stat.S_IFREG: "a file",
    }
    return kinds.get(stat.S_IFMT(mode), "of an unknown kind")


@contextlib.contextmanager
def opened_folder(folder: int | None, name: str | os.PathLike[str]) -> Iterator[int]:
    """Folder *name* in the open *folder*, opened even if its owner closed it to himself."""
    try:
        inside = os.open(name, _FOLDER, dir_fd=folder)
    except PermissionError:
        if folder is None:
            raise
        _open_up(folder, str(name), 0o700)
        inside = os.open(name, _FOLDER, dir_fd=folder)
    try:
        yield inside
    finally:
        os.close(inside)


def open_file(folder: int, name: str) -> tuple[int, os.stat_result]:
    """File *name* in the open *folder*, for reading; raises `OSError` if it is anything else."""
    try:
        file = os.open(name, _FILE, dir_fd=folder)
    except PermissionError:
        _open_up(folder, name, 0o600)
        file = os.open(name, _FILE, dir_fd=folder)
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "not a file", name)
    return file, status


def _open_up(folder: int, name: str, mode: int) -> None:
    """chmod(2) that follows no link."""
    path = os.open(name, _ANY, dir_fd=folder)
    try:
        if stat.S_ISLNK(os.fstat(path).st_mode):
            raise OSError(errno.ELOOP, "a symbolic link", name)
        os.chmod(f"/proc/self/fd/{path}", mode)
    finally:
        os.close(path)


# --- Taking over, synchronizing, erasing ----------------------------------------------------------


def take(folder: int, path: str, into: int, name: str) -> None:
    """Move the file or folder at *path* below the open *folder* to *name* in the folder *into*.

    :raises BadTree: if there is none, or a part of the path is something else.
    """
    *parents, last = path.split("/")
    if not last or {"", ".", ".."} & {*parents, last}:
        raise BadTree(f"{shown(path)} is not a path of an output: give one below the folder")
    with contextlib.ExitStack() as stack:
        at = folder
        try:
            for part in parents:
                at = stack.enter_context(opened_folder(at, part))
            mode = os.lstat(last, dir_fd=at).st_mode
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BadTree(
                f"the output {shown(path)} is not there: the step must make it"
            ) from error
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise BadTree(f"{shown(path)} leads over a symbolic link: make it a folder") from error
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise BadTree(f"{shown(path)} is {what_it_is(mode)}: leave a file or a folder")
        if os.geteuid():  # a step may have closed to itself what is ours as well
            os.fchmod(at, 0o700)
            if stat.S_ISDIR(mode):
                _open_up(at, last, 0o700)  # moving a folder writes to it
        os.rename(last, name, src_dir_fd=at, dst_dir_fd=into)


def sync(folder: int, name: str, files: int) -> None:
    """After this returns, a power loss finds *name* in the open *folder* whole."""
    if files > SYNC_EACH_MAX:
        if _libc.syncfs(folder) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return
    _sync_each(folder, name)


def _sync_each(folder: int, name: str) -> None:
    mode = os.lstat(name, dir_fd=folder).st_mode
    if stat.S_ISDIR(mode):
        with opened_folder(folder, name) as inside:
            for child in os.listdir(inside):
                _sync_each(inside, child)
            os.fsync(inside)
    elif stat.S_ISREG(mode):
        file, _ = open_file(folder, name)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def erase(folder: int, name: str) -> None:
    """Remove *name* from the open *folder*, with all that is in it; nothing happens if it is gone.

    A folder in a folder is moved to the top before it is emptied: no depth is too deep, and three
    descriptors are enough.
    """
    todo = [name]
    while todo:
        if _is_no_folder_now(folder, todo[-1]):
            todo.pop()
            continue
        _open_for_removal(folder, todo[-1])
        with opened_folder(folder, todo[-1]) as inside:
            deeper = []
            with os.scandir(inside) as entries:
                for entry in entries:
                    if not entry.is_dir(follow_symlinks=False):
                        os.unlink(entry.name, dir_fd=inside)
                        continue
                    _open_for_removal(inside, entry.name)
                    moved = f"{ERASED}{secrets.token_hex(8)}"
                    os.rename(entry.name, moved, src_dir_fd=inside, dst_dir_fd=folder)
                    deeper.append(moved)
        os.rmdir(todo.pop(), dir_fd=folder)
        todo += deeper


ERASED: Final = ".erased-"
"""How the names begin of what `erase` has under way; what a crash leaves of it is so called."""


def _is_no_folder_now(folder: int, name: str) -> bool:
    """Remove it, unless it is a folder."""
    try:
        if stat.S_ISDIR(os.lstat(name, dir_fd=folder).st_mode):
            return False
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        pass
    return True


def _open_for_removal(folder: int, name: str) -> None:
    if os.geteuid():
        _open_up(folder, name, 0o700)
