"""Files of a folder and of those below it, each given once it is left alone.

Nothing but regular files is opened, and no link is followed below the folder itself. A watch only
wakes us: what is there, a scan says. A folder has one source at a time. With `keep` a new source
gives what is there once more, under the same id.
"""

import asyncio
import contextlib
import errno
import hashlib
import mimetypes
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain, count
from typing import Any, Final, NamedTuple

from watchfiles import awatch

from dayfly_gateway.triggers.source import CALL_S_MAX, LEASE_S, Delivery, SourceFailed
from dayfly_pool.brokers import FolderSource

ENTRIES_MAX: Final = 10_000
"""Of one scan, files that do not match and folders included."""

BODY_BYTES_MAX: Final = 6 * 1024 * 1024
FETCH_BYTES_MAX: Final = 32 * 1024 * 1024
RESCAN_S: Final = 2.0
"""What the watch does not see: folders below, and file systems that other machines write to."""

DONE: Final = ".done"
GONE: Final = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
"""It was there when it was looked for: a link now, or nothing."""

FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY
FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK


class _File(NamedTuple):
    """A file as it was when it was looked at."""

    path: str
    inode: int
    modified_ns: int
    size: int

    def is_still(self, found: os.stat_result) -> bool:
        return stat.S_ISREG(found.st_mode) and self == _file(self.path, found)


def _file(path: str, found: os.stat_result) -> _File:
    return _File(path, found.st_ino, found.st_mtime_ns, found.st_size)


class _Scan(NamedTuple):
    files: list[_File]
    is_whole: bool
    trouble: str


@dataclass(slots=True)
class _Known:
    """What we know of a file, for as long as it is there unchanged."""

    file: _File
    due: float
    """When it may be given."""

    attempt: int = 1
    is_given: bool = False
    is_done: bool = False


class Source:
    """A folder, as `triggers.source.Source` promises."""

    extend_s: float | None = None

    def __init__(
        self,
        spec: FolderSource,
        name: str,
        secret: str = "",
        lease_s: float = LEASE_S,
        call_s: float = CALL_S_MAX,
    ) -> None:
        self._spec, self._call_s = spec, call_s
        self._known: dict[str, _Known] = {}
        self._trouble = ""
        self._turn = asyncio.Lock()
        self._stirred, self._stop = asyncio.Event(), asyncio.Event()
        self._watching: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """See `triggers.source.Source`."""
        self._known = {}
        self._stop.clear()
        await self._look()
        self._watching = asyncio.create_task(self._watch(), name="watch-folder")

    async def close(self) -> None:
        """See `triggers.source.Source`."""
        watching, self._watching = self._watching, None
        if watching is not None:
            self._stop.set()
            await asyncio.wait((watching,), timeout=1.0)
            watching.cancel()  # it waits for a thread, if still
            await asyncio.wait((watching,), timeout=1.0)

    async def _watch(self) -> None:
        # the default filter of the client leaves out what programmers find dull
        with contextlib.suppress(Exception):  # without a watch, there are scans
            async for _ in awatch(
                self._spec.path, watch_filter=None, stop_event=self._stop, recursive=False
            ):
                self._stirred.set()

    async def fetch(self, most: int, wait_s: float) -> list[Delivery]:
        """See `triggers.source.Source`."""
        now = asyncio.get_running_loop().time
        end = now() + wait_s
        while True:
            self._stirred.clear()
            async with self._turn:
                await self._look()
                found = await self._give(most)
            if found:
                return found
            if self._trouble and not any(known.is_given for known in self._known.values()):
                raise self._failed(self._trouble)  # and not while events are under way
            if now() >= end:
                return []
            next_ = min([end, now() + RESCAN_S, *(known.due for known in self._waiting())])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.01, next_ - now())):
                    await self._stirred.wait()

    def _waiting(self) -> list[_Known]:
        return [known for known in self._known.values() if not (known.is_given or known.is_done)]

    async def _look(self) -> None:
        """Know what is there now, and since when."""
        if self._stop.is_set():
            raise self._failed("closed")
        scan = await self._call(_scan, self._spec.path, self._spec.pattern)
        due = asyncio.get_running_loop().time() + self._spec.settle_seconds
        known, self._known = self._known, {}
        for file in scan.files:
            old = known.get(file.path)
            is_same = old is not None and old.file == file
            self._known[file.path] = old if old and is_same else _Known(file, due)
        if not scan.is_whole:  # it may still be there
            under_way = {path: old for path, old in known.items() if old.is_given}
            self._known = under_way | self._known
        self._trouble = scan.trouble
        if not scan.is_whole and (self._spec.afterwards == "keep" or not self._waiting()):
            self._trouble = (
                f"over {ENTRIES_MAX} entries: let what is done be moved or deleted (afterwards),"
                " and keep other files elsewhere"
            )

    async def _give(self, most: int) -> list[Delivery]:
        now = asyncio.get_running_loop().time()
        due = sorted(
            (known for known in self._waiting() if known.due <= now),
            key=lambda known: (known.file.modified_ns, known.file.path),
        )
        found: list[Delivery] = []
        left = FETCH_BYTES_MAX
        for known in due:
            left -= min(known.file.size, BODY_BYTES_MAX)
            if len(found) == most or (found and left < 0):
                break
            try:
                read = await self._call(_read, self._spec.path, known)
            except BaseException:
                for each in found:
                    each.token.is_given = False
                raise
            if isinstance(read, Delivery):
                known.is_given = True
                found.append(read)
            self._trouble = read if isinstance(read, str) else self._trouble
        return found

    async def ack(self, delivery: Delivery) -> None:
        """See `triggers.source.Source`."""
        known: _Known = delivery.token
        if self._stop.is_set():
            raise self._failed("closed")
        if not (delivery.unread and self._spec.afterwards == "delete"):
            await self._call(_finish, self._spec, known.file)
        known.is_given, known.is_done = False, True

    async def nak(self, delivery: Delivery, delay_s: float) -> None:
        """See `triggers.source.Source`."""
        known: _Known = delivery.token
        known.due = asyncio.get_running_loop().time() + delay_s
        known.attempt += 1
        known.is_given = False
        self._stirred.set()

    async def extend(self, delivery: Delivery) -> None:
        """See `triggers.source.Source`: it is ours for as long as it is open."""

    async def lag(self) -> int | None:
        """See `triggers.source.Source`."""
        async with self._turn:
            await self._look()
            return len(self._waiting())

    async def _call(self, work: Any, *arguments: Any) -> Any:
        """*work* in a thread. A file system that hangs keeps that, but not us."""
        try:
            async with asyncio.timeout(self._call_s):
                return await asyncio.to_thread(work, *arguments)
        except TimeoutError:
            raise self._failed(f"no answer within {self._call_s} s") from None
        except (OSError, ValueError) as error:
            raise self._failed(str(error)) from None

    def _failed(self, why: str) -> SourceFailed:
        return SourceFailed(f"folder {self._spec.path}: {_shown(why)}")


@contextlib.contextmanager
def _inside(root: str, below: str) -> Iterator[int]:
    """A descriptor of the folder *below*, reached without links. Raises OSError."""
    folder = os.open(root, FOLDER)
    try:
        for part in filter(None, below.split("/")):
            inner = os.open(part, FOLDER | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        yield folder
    finally:
        os.close(folder)


def _scan(root: str, pattern: str) -> _Scan:
    files: list[_File] = []
    todo, entries, trouble = [""], 0, ""
    while todo:
        below = todo.pop()
        try:
            with _inside(root, below) as folder, os.scandir(folder) as found:
                for entry in found:
                    entries += 1
                    if entries > ENTRIES_MAX:
                        return _Scan(files, False, trouble)
                    path = f"{below}/{entry.name}" if below else entry.name
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(path)
                    elif fnmatchcase(path, pattern) and entry.is_file(follow_symlinks=False):
                        with contextlib.suppress(FileNotFoundError):
                            files.append(_file(path, entry.stat(follow_symlinks=False)))
        except OSError as error:
            if not below:
                raise
            if error.errno not in GONE:
                trouble = f"{below}: {error.strerror}"
    return _Scan(files, True, trouble)


def _read(root: str, known: _Known) -> Delivery | str | None:
    """It; or what is wrong; or None when it is no longer what it was: then a scan will tell."""
    file = known.file
    below, _, name = file.path.rpartition("/")
    try:
        with (
            _inside(root, below) as folder,
            open(name, "rb", opener=lambda n, _: os.open(n, FILE, dir_fd=folder)) as opened,
        ):
            if not file.is_still(os.fstat(opened.fileno())):
                return None
            body = opened.read(BODY_BYTES_MAX) if file.size <= BODY_BYTES_MAX else b""
            if not file.is_still(os.fstat(opened.fileno())):
                return None
    except OSError as error:
        return None if error.errno in GONE else f"{file.path}: {error.strerror}"
    kind, packing = mimetypes.guess_type(name)
    headers = {
        "content-type": kind if kind and not packing else "application/octet-stream",
        "file-path": _shown(file.path),
        "file-size": str(file.size),
        "file-modified": f"{file.modified_ns / 1e9:.6f}",
    }
    path = hashlib.sha256(os.fsencode(file.path)).hexdigest()[:32]
    return Delivery(
        id=f"{path}/{file.inode}/{file.modified_ns}/{file.size}",
        topic=root,
        group=root,
        body=body,
        headers=headers,
        at=file.modified_ns / 1e9,
        attempt=known.attempt,
        unread=file.size if file.size > BODY_BYTES_MAX else 0,
        token=known,
    )


def _finish(spec: FolderSource, file: _File) -> None:
    """Move or delete it, if it is what was given."""
    below, _, name = file.path.rpartition("/")
    if spec.afterwards == "keep":
        return
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(_inside(spec.path, below))
            found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except OSError as error:
            if error.errno in GONE:
                return
            raise
        if not file.is_still(found):
            return
        if spec.afterwards == "delete":
            os.unlink(name, dir_fd=folder)
            return
        with contextlib.suppress(FileExistsError):
            os.mkdir(DONE, dir_fd=folder)
        done = os.open(DONE, FOLDER | os.O_NOFOLLOW, dir_fd=folder)
        stack.callback(os.close, done)
        _move(file, folder, done)


def _move(file: _File, folder: int, done: int) -> None:
    name = file.path.rpartition("/")[2]
    first = f".{file.modified_ns}"
    for end in chain(("", first), (f"{first}.{number}" for number in count(1))):
        there = os.fsdecode(os.fsencode(name)[: 255 - len(end)]) + end
        try:
            # an empty file takes the name for us, and none but that is written over
            os.close(os.open(there, os.O_WRONLY | os.O_CREAT | os.O_EXCL, dir_fd=done))
        except FileExistsError:
            continue
        try:
            os.rename(name, there, src_dir_fd=folder, dst_dir_fd=done)
        except OSError:
            os.unlink(there, dir_fd=done)
            raise
        return


def _shown(text: str) -> str:
    """*text* as any header takes it: names of files may be of any bytes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
