"""Folders on their way into a pod and out of it: the format, who writes it, who reads it.

A tree is a row of entries, each a header, a name and content:

    0      1          3      5          13     21
    | kind | name len | mode | mtime ns | size | name ... | content ... |

    FOLDER      what follows is in it, until CLOSED, which has its mode and time
    REPLACED    the same; nothing of what was there before is in it
    FILE        *size* bytes of content
    LINK        the content is where it leads
    PIPE        and sockets, which are sent as pipes
    REMOVED     what was there before
    NOTHING     in place of a tree: nothing of it has changed
    UNFIT       in place of any entry: the content says why there is no more

All integers are big-endian. A name is that of an entry in its folder, never a path, so no name
leads elsewhere; the tree's own is not looked at. Who reads believes nothing.
"""

from __future__ import annotations

import errno
import os
import stat
import struct

TYPE_CHECKING = False  # see `record`
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

HEADER = struct.Struct("!BHHqQ")
FOLDER, REPLACED, CLOSED, FILE, LINK, PIPE, REMOVED, NOTHING, UNFIT = range(1, 10)
CHUNK_BYTES = 256 << 10
PIECE_BYTES = 1 << 20
NAME_BYTES_MAX, TARGET_BYTES_MAX, WHY_BYTES_MAX = 255, 4095, 4096
DEPTH_MAX, ENTRIES_MAX = 128, 250_000
PATH_BYTES_MAX = 3072
"""Below the 4096 of the kernel, so that it can be named from the root as well."""

BYTES_MAX = 64 << 30
"""Of all files together, holes counted as well: hashing them takes as long."""

HOLES_MAX = 1 << 30
"""Of a tree's big files: holes cost nobody a byte, and who hashes them as long as bytes would."""

BLOCK_BYTES = 512
"""In which stat(2) tells what a file occupies, whatever the file system's own blocks are."""

OPAQUE = "user.overlay.opaque"
_MODE = 0o777
_NOTE = struct.Struct("!HQqI")


class Unfit(Exception):
    """A tree cannot travel; the message names the path."""


class Malformed(Exception):
    """What comes is no tree, or not all of one."""


# ---- who sends ----------------------------------------------------------------------------------


def pieces(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same, in pieces of at least PIECE_BYTES, but for the last."""
    held: list[bytes] = []
    size = 0
    for chunk in chunks:
        held.append(chunk)
        size += len(chunk)
        if size >= PIECE_BYTES:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)


def nothing() -> Iterator[bytes]:
    """There is no such tree."""
    yield HEADER.pack(NOTHING, 0, 0, 0, 0)


def unfit(why: str) -> bytes:
    """What ends a tree that cannot travel."""
    said = why.encode(errors="replace")[:WHY_BYTES_MAX]
    return HEADER.pack(UNFIT, 0, 0, 0, len(said)) + said


def tree(parts: Sequence[str]) -> Iterator[bytes]:
    """What is seen through *parts*, layers of one folder, the uppermost first, or one file.

    Raises `Unfit`, OSError. Nobody may change it meanwhile.
    """
    found = [os.fsencode(part) for part in parts]
    return _Sending().entry(b"", found, os.lstat(found[0]), b"", FOLDER)


class Given:
    """What a folder held when it was made: written as it is unpacked, read when it is sent back."""

    def __init__(self, data: bytes = b"") -> None:
        self._found: dict[bytes, tuple[int, int, int]] = {}
        self._inside: dict[bytes, list[bytes]] = {}
        at = 0
        while at < len(data):
            size, inode, ctime, kind = _NOTE.unpack_from(data, at)
            at += _NOTE.size
            path = data[at : at + size]
            at += size
            self._found[path] = inode, ctime, kind
            parent, _, name = path.rpartition(b"/")
            if path:
                self._inside.setdefault(parent, []).append(name)

    @staticmethod
    def note(path: bytes, status: os.stat_result) -> bytes:
        """To be written, one after the other."""
        kind = stat.S_IFMT(status.st_mode)
        return _NOTE.pack(len(path), status.st_ino, status.st_ctime_ns, kind) + path

    def has(self, path: bytes) -> bool:
        """Whether there was anything."""
        return path in self._found

    def is_same(self, path: bytes, status: os.stat_result) -> bool:
        """Whether it is untouched since; what is in a folder may not be."""
        found = status.st_ino, status.st_ctime_ns, stat.S_IFMT(status.st_mode)
        return self._found.get(path) == found

    def is_folder(self, path: bytes, status: os.stat_result) -> bool:
        """Whether it is the same folder."""
        inode, _, kind = self._found.get(path, (0, 0, 0))
        return inode == status.st_ino and stat.S_ISDIR(kind) and stat.S_ISDIR(status.st_mode)

    def inside(self, path: bytes) -> list[bytes]:
        """The names that were in a folder."""
        return self._inside.get(path, [])


def changes(folder: str, given: Given) -> Iterator[bytes]:
    """What is different in *folder* from what was *given*. Raises `Unfit`, OSError."""
    where = os.fsencode(folder)
    status = os.lstat(where)
    if not stat.S_ISDIR(status.st_mode):
        raise Unfit(f"{folder} is no folder any more")
    found = _Sending(given).changed(b"", where, status, b"")
    first = next(found, None)
    if first is None:
        yield from nothing()
        return
    yield first
    yield from found


class _Sending:
    """One walk. With what was *given* it sends what has changed."""

    def __init__(self, given: Given | None = None) -> None:
        self._given = given or Given()
        self._entries = self._holes = 0

    def entry(
        self,
        name: bytes,
        parts: Sequence[bytes],
        status: os.stat_result,
        path: bytes,
        folder: int,
    ) -> Iterator[bytes]:
        """All of it."""
        self._count(path)
        mode, kind = status.st_mode & _MODE, stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFDIR:
            yield _header(folder, name)
            _open_up(parts[0], status)
            for below, inside in _seen(parts):
                found = os.lstat(inside[0])
                yield from self.entry(below, inside, found, _below(path, below), FOLDER)
            yield _header(CLOSED, b"", mode, status.st_mtime_ns)
        elif kind == stat.S_IFREG:
            yield from self._file(name, parts[0], path)
        elif kind == stat.S_IFLNK:
            target = os.readlink(parts[0])
            yield _header(LINK, name, mode, status.st_mtime_ns, len(target)) + target
        elif kind in (stat.S_IFIFO, stat.S_IFSOCK):
            yield _header(PIPE, name, mode, status.st_mtime_ns)
        else:
            raise Unfit(f"{_shown(path)} is a device: leave files and folders")

    def changed(
        self, name: bytes, where: bytes, status: os.stat_result, path: bytes
    ) -> Iterator[bytes]:
        """What differs of it, if anything does."""
        given = self._given
        if given.is_folder(path, status):
            self._count(path)
            _open_up(where, status)
            inner = self._inside(where, path)
            first = next(inner, None)
            if first is None and given.is_same(path, status):
                return
            yield _header(FOLDER, name)
            if first is not None:
                yield first
                yield from inner
            yield _header(CLOSED, b"", status.st_mode & _MODE, status.st_mtime_ns)
        elif not given.is_same(path, status):
            kind = REPLACED if given.has(path) else FOLDER
            yield from self.entry(name, [where], status, path, kind)

    def _inside(self, where: bytes, path: bytes) -> Iterator[bytes]:
        names = sorted(os.listdir(where))
        for name in names:
            inside = b"%s/%s" % (where, name)
            yield from self.changed(name, inside, os.lstat(inside), _below(path, name))
        for name in sorted(set(self._given.inside(path)) - set(names)):
            yield _header(REMOVED, name)

    def _file(self, name: bytes, where: bytes, path: bytes) -> Iterator[bytes]:
        file = _opened(where)
        try:
            status = os.fstat(file)
            self._holes += holes(file, status)
            if self._holes > HOLES_MAX:
                raise Unfit(f"{_shown(path)} is mostly holes: write what is in it")
            left = status.st_size
            yield _header(FILE, name, status.st_mode & _MODE, status.st_mtime_ns, left)
            while left:
                data = os.read(file, min(left, CHUNK_BYTES))
                if not data:
                    raise Unfit(f"{_shown(path)} was changed while it was read")
                left -= len(data)
                yield data
        finally:
            os.close(file)

    def _count(self, path: bytes) -> None:
        self._entries += 1
        if self._entries > ENTRIES_MAX + 1:
            raise Unfit(f"it holds over {ENTRIES_MAX} files and folders: leave fewer, or pack them")
        if len(path) > PATH_BYTES_MAX:
            raise Unfit(f"{_shown(path[:80])}... has a path of over {PATH_BYTES_MAX} bytes")
        if path.count(b"/") >= DEPTH_MAX:
            raise Unfit(f"{_shown(path)} lies deeper than {DEPTH_MAX} folders")


def _header(kind: int, name: bytes, mode: int = 0, mtime: int = 0, size: int = 0) -> bytes:
    return HEADER.pack(kind, len(name), mode, mtime, size) + name


def _below(path: bytes, name: bytes) -> bytes:
    return b"%s/%s" % (path, name) if path else name


def _shown(path: bytes) -> str:
    text = ascii(os.fsdecode(path))[1:-1] if path else "."
    return text if len(text) <= 300 else f"{text[:300]}..."


def _open_up(folder: bytes, status: os.stat_result) -> None:
    """Be able to look into it, even if its owner closed it to himself."""
    if status.st_mode & 0o500 != 0o500 and os.geteuid():
        os.chmod(folder, 0o700)


def _opened(where: bytes) -> int:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(where, flags)
    except PermissionError:
        os.chmod(where, os.lstat(where).st_mode & _MODE | 0o400)
        return os.open(where, flags)


def _seen(parts: Sequence[bytes]) -> Iterator[tuple[bytes, list[bytes]]]:
    """What is in a folder of which these are the layers, as overlayfs shows it: (name, parts)."""
    found: dict[bytes, list[bytes]] = {}
    closed: set[bytes] = set()
    for part in parts:
        with os.scandir(part) as entries:
            for entry in entries:
                name = entry.name
                inside = found.setdefault(name, [])
                if name in closed:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    inside.append(entry.path)
                    if len(parts) > 1 and _is_opaque(entry.path):
                        closed.add(name)
                    continue
                closed.add(name)
                if not inside and not _is_whiteout(entry):
                    inside.append(entry.path)
    for name in sorted(found):
        if found[name]:
            yield name, found[name]


def _is_whiteout(entry: os.DirEntry[bytes]) -> bool:
    if entry.is_file(follow_symlinks=False) or entry.is_symlink():
        return False
    status = entry.stat(follow_symlinks=False)
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _is_opaque(folder: bytes) -> bool:
    try:
        return os.getxattr(folder, OPAQUE, follow_symlinks=False) == b"y"
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise
        return False


def holes(file: int, status: os.stat_result) -> int:
    """How many bytes of a big open file nobody wrote; it stops counting above HOLES_MAX.

    A file system that compresses or writes later says that a file occupies little, so what
    it occupies is no proof.
    """
    size, found, at = status.st_size, 0, 0
    if size < CHUNK_BYTES or status.st_blocks * BLOCK_BYTES >= size:
        return 0
    while at < size and found <= HOLES_MAX:
        try:
            data = os.lseek(file, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            found += size - at  # no more data
            break
        found += data - at
        at = os.lseek(file, data, os.SEEK_HOLE)
    os.lseek(file, 0, os.SEEK_SET)
    return found


# ---- who receives -------------------------------------------------------------------------------


class Source:
    """Bytes that come in chunks, from *pull*: one or more, or none at the end."""

    def __init__(self, pull: Callable[[], bytes]) -> None:
        self._pull = pull
        self._chunk = memoryview(b"")

    def some(self, most: int) -> memoryview:
        """At least one byte, at most *most*. Raises `Malformed` at the end."""
        if not self._chunk:
            self._chunk = memoryview(self._pull())
            if not self._chunk:
                raise Malformed("it broke off")
        found, self._chunk = self._chunk[:most], self._chunk[most:]
        return found

    def exactly(self, size: int) -> bytes:
        """So many bytes. Raises `Malformed` when there are fewer."""
        found = bytearray()
        while len(found) < size:
            found += self.some(size - len(found))
        return bytes(found)


class Unpacking:
    """Makes trees of what comes from *source*, each at most of so many *entries* and *bytes*.

    Those of *layers* may say what is removed and replaced, as overlayfs writes it down. *note* is
    told of all that was made, by path. As root all of it is *owner*'s.
    """

    def __init__(
        self,
        source: Source,
        *,
        entries_max: int = ENTRIES_MAX,
        bytes_max: int = BYTES_MAX,
        owner: int | None = None,
        note: Callable[[bytes, os.stat_result], None] | None = None,
    ) -> None:
        self._source = source
        self._entries_max, self._bytes_max = entries_max, bytes_max
        self._owner = owner
        self._note = note
        self._entries = self._bytes = 0
        self._layers = False

    def tree(self, folder: int, name: str, *, layers: bool = False) -> None:
        """Make the next tree, as *name* in the open *folder*; a folder that is there is filled.

        Where a file comes and somebody has put a pipe in such a folder, it is written to the pipe.
        Raises `Unfit`, `Malformed`, OSError; what was made until then is to be removed.
        """
        self._entries = self._bytes = 0
        self._layers = layers
        head = self._head()
        if head[0] == NOTHING:
            return
        names: list[bytes] = []
        stack: list[int] = []
        try:
            self._make(head, folder, os.fsencode(name), names, stack)
            while stack:
                kind, below, mode, mtime, size = self._head()
                if kind == CLOSED:
                    self._close(mode, mtime, names, stack)
                else:
                    _check(below)
                    self._make((kind, below, mode, mtime, size), stack[-1], below, names, stack)
        finally:
            for descriptor in stack:
                os.close(descriptor)

    def _head(self) -> tuple[int, bytes, int, int, int]:
        kind, length, mode, mtime, size = HEADER.unpack(self._source.exactly(HEADER.size))
        if kind == UNFIT and size <= WHY_BYTES_MAX:
            why = self._source.exactly(size).decode(errors="replace")
            raise Unfit(why if why.isprintable() else ascii(why))
        if not FOLDER <= kind <= NOTHING or length > NAME_BYTES_MAX:
            raise Malformed("not an entry of a tree")
        if size and kind not in (FILE, LINK):
            raise Malformed("content of something that has none")
        return kind, self._source.exactly(length), mode & _MODE, mtime, size

    def _make(
        self,
        head: tuple[int, bytes, int, int, int],
        folder: int,
        name: bytes,
        names: list[bytes],
        stack: list[int],
    ) -> None:
        kind, _, mode, mtime, size = head
        path = b"/".join([*names[1:], name]) if stack else b""
        self._count(path, size)
        if kind in (FOLDER, REPLACED):
            if len(stack) > DEPTH_MAX:
                raise Unfit(f"{_shown(path)} lies deeper than {DEPTH_MAX} folders")
            if kind == REPLACED and not (self._layers and stack):
                raise Malformed("an entry that cannot be here")
            stack.append(self._folder(kind, folder, name, is_top=not stack))
            names.append(name)
            return
        if kind == FILE:
            self._file(folder, name, (mode, mtime, size), path, is_in_top=len(stack) == 1)
            return
        if kind == LINK:
            if not 0 < size <= TARGET_BYTES_MAX:
                raise Malformed("a link that leads nowhere")
            target = self._source.exactly(size)
            if b"\0" in target:
                raise Malformed("a link that leads nowhere")
            os.symlink(target, name, dir_fd=folder)
        elif kind == PIPE:
            os.mkfifo(name, 0o600, dir_fd=folder)
        elif kind == REMOVED and self._layers and stack:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=folder)
        else:
            raise Malformed("an entry that cannot be here")
        if self._owner is not None:
            os.chown(name, self._owner, self._owner, dir_fd=folder, follow_symlinks=False)
        if self._note is not None:
            self._note(path, os.lstat(name, dir_fd=folder))

    def _folder(self, kind: int, folder: int, name: bytes, *, is_top: bool) -> int:
        try:
            os.mkdir(name, 0o700, dir_fd=folder)
        except FileExistsError:
            if not is_top:
                raise
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        made = os.open(name, flags, dir_fd=folder)
        if kind == REPLACED:
            os.setxattr(made, OPAQUE, b"y")
        return made

    def _close(self, mode: int, mtime: int, names: list[bytes], stack: list[int]) -> None:
        made = stack[-1]
        self._furnish(made, mode, mtime)
        if self._note is not None:
            self._note(b"/".join(names[1:]), os.fstat(made))
        os.close(stack.pop())
        names.pop()

    def _file(
        self,
        folder: int,
        name: bytes,
        told: tuple[int, int, int],
        path: bytes,
        *,
        is_in_top: bool,
    ) -> None:
        mode, mtime, left = told
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        is_pipe = False
        try:
            file = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
        except FileExistsError:
            if not is_in_top:
                raise
            file = os.open(name, flags | os.O_NONBLOCK, dir_fd=folder)  # ENXIO: nobody reads it
            is_pipe = True
        try:
            if is_pipe:
                if not stat.S_ISFIFO(os.fstat(file).st_mode):
                    raise FileExistsError(errno.EEXIST, "it is there already", name)
                os.set_blocking(file, True)
            while left:
                data = self._source.some(min(left, CHUNK_BYTES))
                left -= len(data)
                try:
                    while data:
                        data = data[os.write(file, data) :]
                except BrokenPipeError:
                    pass  # who reads the pipe wants no more, and says why
            if not is_pipe:
                self._furnish(file, mode, mtime)
                if self._note is not None:
                    self._note(path, os.fstat(file))
        finally:
            os.close(file)

    def _furnish(self, made: int, mode: int, mtime: int) -> None:
        if self._owner is not None:
            os.fchown(made, self._owner, self._owner)
        os.fchmod(made, mode)
        os.utime(made, ns=(mtime, mtime))

    def _count(self, path: bytes, size: int) -> None:
        self._entries += 1
        self._bytes += size
        if self._entries > self._entries_max + 1:
            most = self._entries_max
            raise Unfit(f"it holds over {most} files and folders: leave fewer, or pack them")
        if len(path) > PATH_BYTES_MAX:
            raise Unfit(f"{_shown(path[:80])}... has a path of over {PATH_BYTES_MAX} bytes")
        if self._bytes > self._bytes_max:
            raise Unfit(f"with {_shown(path)} it is over {self._bytes_max} bytes: leave less")


def _check(name: bytes) -> None:
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise Malformed("a name that is none")
