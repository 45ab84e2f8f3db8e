"""The code store: packages by digest, and the check that a stranger's zip must pass.

A package is a zip, named by the sha256 of its bytes. The archive is the truth: what lies under
`unpacked/DIGEST` follows from it alone, and is made again from it when it no longer matches its
manifest. Nothing of a refused zip reaches its final place.

The zip's own tables are read here with `struct`, not by `zipfile`: that one follows the table's
size instead of its count, takes zip64 fields at their word, rewrites names and allows overlaps.
Left out silently: `__pycache__` and `*.pyc`, which could be bytecode that is not its source's.
"""

import contextlib
import hashlib
import io
import logging
import os
import re
import resource
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import unicodedata
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

import msgspec
from msgspec import Struct

from dayfly_pool.errors import BadInput, BadPackage, DataFolderUnusable, PackageDamaged
from dayfly_pool.store.archives import Archives

log = logging.getLogger(__name__)

ENTRIES_MAX: Final = 20_000
"""Files and folders together; folders that a path only implies count too."""
UNPACKED_BYTES_MAX: Final = 250 << 20
ARCHIVE_BYTES_MAX: Final = UNPACKED_BYTES_MAX
RATIO_MAX: Final = 100
RATIO_FREE_BYTES: Final = 1 << 20
"""Below this size unpacked, the ratio is not looked at: a small file of zeros harms nobody."""
PATH_BYTES_MAX: Final = 1024
COMPONENT_BYTES_MAX: Final = 255
DEPTH_MAX: Final = 32
CHUNK_BYTES: Final = 64 << 10
DROP_S: Final = 86400.0
"""A package that several servers have is kept for so long after somebody put or noted it."""

COMPILE_S_MAX: Final = 60
COMPILE_MEMORY_BYTES_MAX: Final = 1 << 30
CODE_FOLDER: Final = "/code"
"""Where a sandbox sees the package; the names in tracebacks begin with it."""

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")

# --- Reading a zip that may be hostile -----------------------------------------------------------

# APPNOTE.TXT 4.3.16, 4.3.12 and 4.3.7: end of central directory, central entry, local header.
_END: Final = struct.Struct("<4s4H2LH")
_CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
_LOCAL: Final = struct.Struct("<4s5H3L2H")
_ZIP64_LOCATOR: Final = b"PK\6\7"
_COMMENT_BYTES_MAX: Final = 0xFFFF
_STORED: Final = 0
_DEFLATED: Final = 8
_ENCRYPTED: Final = 0x0001 | 0x0040 | 0x2000
_SIZES_FOLLOW: Final = 0x0008
_UTF8: Final = 0x0800
_KNOWN_FLAGS: Final = 0x0006 | _SIZES_FOLLOW | _UTF8
"""Deflate's level, sizes after the contents, UTF-8 name. Every other flag changes the format."""
_DOS_FOLDER: Final = 0x10


class Entry(Struct, frozen=True):
    """One file or folder of a checked zip. *start* and *packed* frame its contents, in bytes."""

    path: str
    is_folder: bool
    is_executable: bool
    is_deflated: bool
    crc: int
    packed: int
    size: int
    offset: int
    start: int


class _Central(NamedTuple):
    """A record of the central directory, as it stands there."""

    raw_name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    attributes: int
    offset: int


def check(archive: bytes) -> list[Entry]:
    """Read a zip's tables and refuse all that a package must not be; the contents are not inflated.

    :raises BadPackage: naming the entry and the remedy.
    """
    if len(archive) > ARCHIVE_BYTES_MAX:
        raise BadPackage(f"the zip is over {ARCHIVE_BYTES_MAX >> 20} MiB: send less")
    count, table, end = _end_record(archive)
    entries = [_entry(archive, record) for record in _central_records(archive, count, table, end)]
    if all(entry.is_folder or _is_bytecode(entry.path) for entry in entries):
        raise BadPackage("the zip holds no source file: put the function's code into it")
    _refuse_overlaps(entries, table)
    _refuse_collisions(entries)
    _refuse_bombs(entries, len(archive))
    return entries


def _end_record(archive: bytes) -> tuple[int, int, int]:
    """The number of entries, and where the central directory starts and ends."""
    at = archive.rfind(b"PK\5\6", max(0, len(archive) - _END.size - _COMMENT_BYTES_MAX))
    if at < 0 or at + _END.size > len(archive):
        raise BadPackage("this is not a zip, or its end is missing: send a whole zip (no tar)")
    _, disk, first_disk, here, count, size, table, comment = _END.unpack_from(archive, at)
    zip64 = archive.startswith(_ZIP64_LOCATOR, max(0, at - 20))
    if zip64 or 0xFFFF in (disk, here, count) or 0xFFFF_FFFF in (size, table):
        raise BadPackage("the zip is a zip64: make it without (Info-ZIP: `zip -fz-`)")
    if disk or first_disk or here != count:
        raise BadPackage("the zip is one part of several: send it in one piece")
    if count > ENTRIES_MAX:
        raise BadPackage(f"the zip has {count} entries, limit {ENTRIES_MAX}: pack fewer files")
    # The directory must end where the end record starts: two readers then see the same one.
    if table + size != at or at + _END.size + comment != len(archive):
        raise BadPackage("the zip's directory is not where the zip says: make the zip anew")
    return count, table, at


def _central_records(archive: bytes, count: int, table: int, end: int) -> Iterator[_Central]:
    at = table
    for number in range(count):
        if at + _CENTRAL.size > end:
            raise BadPackage(f"the zip's directory ends before entry {number}: make the zip anew")
        fields = _CENTRAL.unpack_from(archive, at)
        signature, _, _, flags, method, _, _, crc, packed, size = fields[:10]
        name_size, extra_size, comment_size, disk, _, attributes, offset = fields[10:]
        name_at = at + _CENTRAL.size
        at = name_at + name_size + extra_size + comment_size
        if signature != b"PK\1\2" or at > end or disk:
            raise BadPackage(f"the zip's directory is broken at entry {number}: make the zip anew")
        raw_name = archive[name_at : name_at + name_size]
        if 0xFFFF_FFFF in (packed, size, offset):
            _refuse(raw_name, "is a zip64 entry", "make the zip without (Info-ZIP: `zip -fz-`)")
        yield _Central(raw_name, flags, method, crc, packed, size, attributes, offset)
    if at != end:
        raise BadPackage("the zip's directory holds more than its entries: make the zip anew")


def _entry(archive: bytes, record: _Central) -> Entry:
    _refuse_format(record)
    path, is_folder = _checked_path(record.raw_name)
    mode = record.attributes >> 16
    _refuse_kind(record, mode, is_folder)
    if record.method == _STORED and record.packed != record.size:
        _refuse(path, "is stored with two different sizes", "make the zip anew")
    return Entry(
        path=path,
        is_folder=is_folder,
        is_executable=bool(mode & 0o111),
        is_deflated=record.method == _DEFLATED,
        crc=record.crc,
        packed=record.packed,
        size=record.size,
        offset=record.offset,
        start=_start_of_contents(archive, record),
    )


def _refuse_format(record: _Central) -> None:
    if record.flags & _ENCRYPTED:
        _refuse(record.raw_name, "is encrypted", "make the zip without a password")
    if record.flags & ~_KNOWN_FLAGS:
        _refuse(record.raw_name, f"has the unknown flags {record.flags:#06x}", "make the zip anew")
    if record.method not in (_STORED, _DEFLATED):
        why = f"is packed by method {record.method}"
        _refuse(record.raw_name, why, "use only `stored` and `deflated`")


def _refuse_kind(record: _Central, mode: int, is_folder: bool) -> None:
    """Only regular files and folders; the Unix mode, where there is one, must say the same."""
    kind = stat.S_IFMT(mode)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        what = "a symbolic link" if kind == stat.S_IFLNK else "a device, pipe or socket"
        _refuse(record.raw_name, f"is {what}", "pack only regular files and folders")
    says_folder = kind == stat.S_IFDIR or (not kind and bool(record.attributes & _DOS_FOLDER))
    if says_folder != is_folder and (kind or says_folder):
        _refuse(record.raw_name, "is a file by name and a folder by mode", "make the zip anew")
    if is_folder and (record.size or record.packed > 2):  # an empty deflate stream is 2 bytes
        _refuse(record.raw_name, "is a folder with contents", "make the zip anew")


def _checked_path(raw_name: bytes) -> tuple[str, bool]:
    """An entry's path without the slash that marks a folder, and whether it is one."""
    try:
        # Names without the UTF-8 flag are code page 437 by the book, but UTF-8 from macOS.
        name = raw_name.decode("utf-8")
    except UnicodeDecodeError:
        _refuse(raw_name, "has a name that is not UTF-8", "rename it")
    path = name.removesuffix("/")
    if why := _wrong_with_path(path):
        _refuse(name, why, "rename it, and use relative paths only")
    return path, path != name


def _wrong_with_path(path: str) -> str:
    """Why a relative path must not be unpacked, or nothing."""
    parts = path.split("/")
    kinds = {unicodedata.category(character) for character in path}
    if "Cs" in kinds:  # how Python shows bytes of a file name that are not UTF-8
        return "has a name that is not UTF-8"
    if kinds & {"Cc", "Zl", "Zp"}:
        return "has a control character in its name"
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        return "has an absolute path"
    if "\\" in path:
        return "has a backslash in its name"
    if not all(parts) or {".", ".."} & set(parts):
        return "has an empty, '.' or '..' part in its path"
    if len(path.encode()) > PATH_BYTES_MAX:
        return f"has a path of over {PATH_BYTES_MAX} bytes"
    if max(len(part.encode()) for part in parts) > COMPONENT_BYTES_MAX:
        return f"has a name of over {COMPONENT_BYTES_MAX} bytes"
    if len(parts) > DEPTH_MAX:
        return f"lies deeper than {DEPTH_MAX} folders"
    return ""


def _start_of_contents(archive: bytes, record: _Central) -> int:
    """Where the contents begin, after a local header that says the same as the directory."""
    name_at = record.offset + _LOCAL.size
    if name_at > len(archive):
        _refuse(record.raw_name, "lies outside of the zip", "make the zip anew")
    fields = _LOCAL.unpack_from(archive, record.offset)
    signature, _, flags, method, _, _, crc, packed, size, name_size, extra_size = fields
    if signature != b"PK\3\4":
        _refuse(record.raw_name, "lies where no entry begins", "make the zip anew")
    if archive[name_at : name_at + name_size] != record.raw_name:
        _refuse(record.raw_name, "has two different names in the zip", "make the zip anew")
    sizes = (record.crc, record.packed, record.size)
    # With _SIZES_FOLLOW, the local header holds zeros and the true values come after the contents.
    same_sizes = (crc, packed, size) == sizes or bool(flags & _SIZES_FOLLOW)
    if flags & ~_KNOWN_FLAGS or method != record.method or not same_sizes:
        _refuse(record.raw_name, "is described in two different ways", "make the zip anew")
    return name_at + int(name_size) + int(extra_size)


def _refuse_overlaps(entries: list[Entry], table: int) -> None:
    """Entries must lie one after the other, before the directory.

    Quoted-overlap bombs (Fifield, WOOT 2019) reach a ratio of 28 million by sharing bytes.
    """
    free = 0
    for entry in sorted(entries, key=lambda entry: entry.offset):
        if entry.offset < free:
            _refuse(entry.path, "shares bytes with another entry", "make the zip anew")
        free = entry.start + entry.packed
        if free > table:
            _refuse(entry.path, "reaches into the zip's directory", "make the zip anew")


def _refuse_collisions(entries: list[Entry]) -> None:
    """No path twice, not even in another case or normal form; no file where a folder is."""
    taken: set[str] = set()
    folders: dict[str, str] = {}
    for entry in entries:
        folded = _folded(entry.path)
        if folded in taken:
            _refuse(entry.path, "is there twice (case and accents aside)", "rename one of the two")
        taken.add(folded)
        _add_folders(entry, folders)
        if len(folders) > ENTRIES_MAX:
            break
    files = [entry.path for entry in entries if not entry.is_folder]
    if len(files) + len(folders) > ENTRIES_MAX:
        raise BadPackage(f"the zip has over {ENTRIES_MAX} files and folders: pack fewer")
    for path in files:
        if _folded(path) in folders:
            _refuse(path, "is both a file and a folder", "rename one of the two")


def _add_folders(entry: Entry, folders: dict[str, str]) -> None:
    """Note the folders that *entry* needs, from the innermost to the first known."""
    path = entry.path if entry.is_folder else entry.path.rpartition("/")[0]
    while path:
        known = folders.setdefault(_folded(path), path)
        if known is not path:
            if known != path:
                why = f"differs from {_shown(known)} only in case or accents"
                _refuse(path, why, "rename one of the two")
            return  # its parents were noted with it
        path = path.rpartition("/")[0]


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _refuse_bombs(entries: list[Entry], archive_bytes: int) -> None:
    """Declared sizes are enough to judge by: unpacking stops where an entry exceeds its own."""
    total = sum(entry.size for entry in entries)
    if total > UNPACKED_BYTES_MAX:
        most = UNPACKED_BYTES_MAX >> 20
        raise BadPackage(f"the zip unpacks to {total} bytes, limit {most} MiB: pack less")
    if _is_bomb(total, archive_bytes):
        raise BadPackage(
            f"the zip unpacks to over {RATIO_MAX} times its size: store such files uncompressed"
        )


def _is_bomb(total: int, archive_bytes: int) -> bool:
    return total > RATIO_FREE_BYTES and total > RATIO_MAX * archive_bytes


def _is_bytecode(path: str) -> bool:
    return path.endswith(".pyc") or "__pycache__" in path.split("/")


def _inflate(archive: memoryview, entry: Entry) -> Iterator[bytes]:
    """An entry's contents in pieces of at most CHUNK_BYTES, checked against size and CRC."""
    packed = archive[entry.start : entry.start + entry.packed]
    size = crc = 0
    try:
        for chunk in _inflated(packed) if entry.is_deflated else _pieces(packed):
            size += len(chunk)
            if size > entry.size:
                _refuse(entry.path, "is larger than it says", "make the zip anew")
            crc = zlib.crc32(chunk, crc)
            yield chunk
    except (zlib.error, EOFError) as error:
        _refuse(entry.path, f"cannot be unpacked ({error})", "make the zip anew", error)
    if size != entry.size or crc != entry.crc:
        _refuse(entry.path, "has a wrong size or checksum", "the zip was damaged: make it anew")


def _pieces(view: memoryview) -> Iterator[bytes]:
    return (bytes(view[at : at + CHUNK_BYTES]) for at in range(0, len(view), CHUNK_BYTES))


def _inflated(packed: memoryview) -> Iterator[bytes]:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    for piece in _pieces(packed):
        rest = piece
        while rest and not inflater.eof:
            yield inflater.decompress(rest, CHUNK_BYTES)
            rest = inflater.unconsumed_tail
        if inflater.unused_data or (rest and inflater.eof):
            raise EOFError("bytes after its end")
    while not inflater.eof:  # all is fed, but zlib may still hold some of it back
        chunk = inflater.decompress(b"", CHUNK_BYTES)
        if not chunk:
            raise EOFError("its end is missing")
        yield chunk


def _refuse(
    name: str | bytes, why: str, remedy: str, cause: BaseException | None = None
) -> NoReturn:
    raise BadPackage(f"entry {_shown(name)} {why}: {remedy}") from cause


def _shown(name: str | bytes) -> str:
    text = name.decode("utf-8", "replace") if isinstance(name, bytes) else name
    return ascii(text) if len(text) <= 80 else ascii(text[:77] + "...")


# --- The store -----------------------------------------------------------------------------------


class Manifest(Struct, frozen=True):
    """What an unpacked tree must be: each path's kind, mode, size and sha256."""

    checksum: str
    entries: dict[str, str]


class PackageStore:
    """Packages under *root*, by digest. One server a folder; safe to call from many threads.

    With *shared* archives, several servers have the same packages: the folder then holds those
    that were needed here. Methods block, the constructor too: call them by `asyncio.to_thread`. A
    disk that fails is DataFolderUnusable, shared archives that do are StoreFailed.
    """

    def __init__(self, root: Path, shared: Archives | None = None) -> None:
        self._root = root
        self._shared = shared
        self._fetching = threading.Lock()
        self._archives = root / "archives"
        self._manifests = root / "manifests"
        self._trees = root / "unpacked"
        self._temporary = root / "tmp"
        self._verified: set[str] = set()
        # Striped, so that the locks of packages long gone take no memory.
        self._locks = tuple(threading.Lock() for _ in range(64))
        with self._disk():
            for folder in (self._archives, self._manifests, self._temporary, self._trees):
                folder.mkdir(parents=True, exist_ok=True)
                folder.chmod(0o700)
            self._trees.chmod(0o755)  # sandboxes run as other users
            self._sweep()

    def __repr__(self) -> str:
        return f"<PackageStore {self._root}>"

    def put(self, archive: bytes) -> str:
        """Check, keep and unpack a zip; return its digest. The same bytes again are cheap.

        A syntax error in its source is no error here: the loader reports it.

        :raises BadPackage: if it is refused; then nothing of it is kept.
        """
        digest = hashlib.sha256(archive).hexdigest()
        with self._lock(digest), self._disk():
            if not (self._archive(digest).is_file() and self._is_whole(digest)):
                self._store(digest, archive)
            self._verified.add(digest)
            if self._shared is not None:
                self._shared.put(digest, archive)
        return digest

    def note(self, digest: str) -> None:
        """Have it here, and kept for everybody, as something is about to refer to it.

        Raises as `path` does.
        """
        self.path(digest)
        if self._shared is not None and not self._shared.note(digest):
            with self._lock(digest), self._disk():
                log.warning("package given to the others again", extra={"package": digest})
                self._shared.put(digest, self._archive(digest).read_bytes())

    def is_here(self, digest: str) -> bool:
        """Whether `path` has nothing to do but to answer."""
        return digest in self._verified and self._tree(digest).is_dir()

    def path(self, digest: str) -> Path:
        """The unpacked tree: verified before its first use in this process, repaired if need be.

        What is missing or damaged here is fetched from the shared archives.

        :raises BadInput: if *digest* is not a digest.
        :raises PackageDamaged: if it is not stored, or nothing of it is what it was.
        """
        _refuse_digest(digest)
        tree = self._tree(digest)
        if self.is_here(digest):
            return tree
        with self._lock(digest), self._disk():
            self._verified.discard(digest)
            if not self._is_whole(digest):
                self._restore(digest)
            self._verified.add(digest)
        return tree

    def digests(self) -> list[str]:
        """What is stored, sorted."""
        with self._disk():
            names = [path.stem for path in self._archives.glob("*.zip")]
        return sorted(name for name in names if _DIGEST.fullmatch(name))

    def remove(self, digest: str) -> None:
        """Forget a package here; nothing happens if there is none. No sandbox may be using it."""
        _refuse_digest(digest)
        with self._lock(digest), self._disk():
            self._verified.discard(digest)
            # First the archive: without it, the rest is swept at the next start.
            self._archive(digest).unlink(missing_ok=True)
            self._manifest(digest).unlink(missing_ok=True)
            self._discard_tree(digest)

    def drop(self, used: Collection[str]) -> None:
        """Forget what is not *used*: here at once, as nothing runs yet that may have it.

        Where other servers keep it as well, somebody may have put it and be about to refer to it:
        there it stays until nobody has put or noted it for `DROP_S`.
        """
        for digest in self.digests():
            if digest not in used:
                self.remove(digest)
        if self._shared is not None:
            self._shared.drop(used, DROP_S)

    def _store(self, digest: str, archive: bytes) -> None:
        entries = check(archive)
        with tempfile.TemporaryDirectory(dir=self._temporary) as name:
            scratch = Path(name)
            tree = scratch / "tree"
            _unpack(archive, entries, tree)
            _compile(tree)
            _open_to_all(tree)
            manifest = _manifest_of(tree)
            _write_durably(scratch / "zip", self._archive(digest), archive)
            _write_durably(scratch / "manifest", self._manifest(digest), manifest)
            # The tree is not synced: after a power loss, the manifest finds out.
            self._discard_tree(digest)
            tree.rename(self._tree(digest))

    def _restore(self, digest: str) -> None:
        """Unpack again from an archive that still is what its name says: ours, else the shared."""
        archive = self._read(digest)
        if archive is None and self._shared is not None:
            archive = self._fetch(digest, self._shared)
        if archive is None:
            what = "is damaged on disk" if self._archive(digest).is_file() else "is not stored"
            raise PackageDamaged(f"package {digest[:12]} {what}: deploy again")
        try:
            self._store(digest, archive)
        except BadPackage as error:  # accepted by an earlier version with other limits
            raise PackageDamaged(f"package {digest[:12]} is refused now: {error}") from error

    def _read(self, digest: str) -> bytes | None:
        """Our own archive, if it is what its name says."""
        try:
            archive = self._archive(digest).read_bytes()
        except FileNotFoundError:
            return None
        if hashlib.sha256(archive).hexdigest() != digest:
            return None
        log.warning("package damaged, unpacked again", extra={"package": digest})
        return archive

    def _fetch(self, digest: str, shared: Archives) -> bytes | None:
        """The shared archive, if it is what its name says. One at a time: each is in memory."""
        with self._fetching:
            archive = shared.get(digest)
        if archive is not None and hashlib.sha256(archive).hexdigest() != digest:
            raise PackageDamaged(
                f"package {digest[:12]} is damaged where all keep it: deploy again"
            )
        return archive

    def _is_whole(self, digest: str) -> bool:
        if digest in self._verified:
            return self._tree(digest).is_dir()
        try:
            manifest = msgspec.json.decode(self._manifest(digest).read_bytes(), type=Manifest)
        except (FileNotFoundError, msgspec.DecodeError):
            return False
        if manifest.checksum != _checksum(manifest.entries) or not self._tree(digest).is_dir():
            return False
        return dict(_listing(self._tree(digest))) == manifest.entries

    def _discard_tree(self, digest: str) -> None:
        """Remove a tree so that no half of it is ever seen under its name."""
        tree = self._tree(digest)
        if tree.is_dir():
            with tempfile.TemporaryDirectory(dir=self._temporary) as scratch:
                tree.rename(Path(scratch) / "tree")

    def _sweep(self) -> None:
        """Remove what a crashed put or remove left: scratch folders, and what has no archive."""
        for path in self._temporary.iterdir():
            _erase(path)
        stored = {path.stem for path in self._archives.glob("*.zip")}
        for path in self._manifests.iterdir():
            if path.stem not in stored:
                _erase(path)
        for path in self._trees.iterdir():
            if path.name not in stored:
                _erase(path)

    def _archive(self, digest: str) -> Path:
        return self._archives / f"{digest}.zip"

    def _manifest(self, digest: str) -> Path:
        return self._manifests / f"{digest}.json"

    def _tree(self, digest: str) -> Path:
        return self._trees / digest

    def _lock(self, digest: str) -> threading.Lock:
        return self._locks[int(digest[:8], 16) % len(self._locks)]

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataFolderUnusable(
                f"the package store {self._root} failed ({error}): free space, repair its rights"
            ) from error


def _erase(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _refuse_digest(digest: str) -> None:
    if not _DIGEST.fullmatch(digest):
        raise BadInput(f"{_shown(digest)} is not a package digest: 64 hexadecimal digits")


def _unpack(archive: bytes, entries: Iterable[Entry], tree: Path) -> None:
    tree.mkdir()
    view = memoryview(archive)
    for entry in entries:
        target = tree / entry.path
        if _is_bytecode(entry.path):
            continue
        if entry.is_folder:
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            os.fchmod(file.fileno(), 0o755 if entry.is_executable else 0o644)
            for chunk in _inflate(view, entry):
                file.write(chunk)


def _compile(tree: Path) -> None:
    """Byte-compile a stranger's source, if the compiler survives it.

    If it does not, all bytecode goes: it is optional, and half-written files must not stay.
    """
    if not any(tree.rglob("*.py")):
        return
    code = _compiler_exit(tree)
    if code in (0, 1):  # 1: some file has a syntax error
        return
    log.warning("package not byte-compiled", extra={"code": code})
    for folder in list(tree.rglob("__pycache__")):
        shutil.rmtree(folder)


def _compiler_exit(tree: Path) -> int:
    """Compile in a process that can neither last, nor grow, nor see our environment.

    Unchecked hashes, so that file times never matter: the tree is read-only from here on.
    """
    command = [sys.executable, "-I", "-S", "-m", "compileall", "-q", "-q", "-d", CODE_FOLDER]
    process = subprocess.Popen(
        [*command, "--invalidation-mode", "unchecked-hash", str(tree)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={},
    )
    with process:
        try:
            _bound(process.pid, resource.RLIMIT_AS, COMPILE_MEMORY_BYTES_MAX)
            _bound(process.pid, resource.RLIMIT_CPU, COMPILE_S_MAX)
            _bound(process.pid, resource.RLIMIT_FSIZE, UNPACKED_BYTES_MAX)
            process.wait(COMPILE_S_MAX)
        except (subprocess.TimeoutExpired, OSError):
            process.kill()
    return process.returncode


def _bound(pid: int, what: int, most: int) -> None:
    """Lower a child's limit. From outside: no code of ours runs between fork and exec."""
    hard = resource.prlimit(pid, what)[1]
    most = most if hard == resource.RLIM_INFINITY else min(hard, most)
    resource.prlimit(pid, what, (most, most))


def _open_to_all(tree: Path) -> None:
    """Readable by every user, whatever the umask: sandboxes run as others."""
    for folder, _, files in os.walk(tree):
        os.chmod(folder, 0o755)
        if folder.endswith("/__pycache__"):
            for file in files:
                os.chmod(os.path.join(folder, file), 0o644)


def _inside(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as found:
        return list(found)


def _listing(tree: Path, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every path under *tree* with its kind, mode, size and sha256, links not followed."""
    for found in _inside(tree):
        name = prefix + found.name
        mode = found.stat(follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            yield name, f"{mode:o}"
            yield from _listing(Path(found.path), f"{name}/")
        elif stat.S_ISREG(mode):
            with open(found.path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
                yield name, f"{mode:o} {file.tell()} {content}"
        else:
            yield name, f"{mode:o} neither file nor folder"


def _manifest_of(tree: Path) -> bytes:
    entries = dict(_listing(tree))
    return msgspec.json.encode(Manifest(_checksum(entries), entries))


def _checksum(entries: dict[str, str]) -> str:
    text = msgspec.json.encode(entries, order="deterministic")
    return hashlib.sha256(text).hexdigest()


def _write_durably(scratch: Path, target: Path, content: bytes) -> None:
    """After this returns, a power loss finds the whole file or, before, none of it."""
    with scratch.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    scratch.rename(target)
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# --- Making a package, for the CLI ---------------------------------------------------------------

IGNORE_FILE: Final = ".dayflyignore"
_NEVER_PACKED: Final = frozenset({".git", ".venv", "__pycache__", IGNORE_FILE})
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can say


class _Rule(NamedTuple):
    """One line of the ignore file."""

    pattern: re.Pattern[str]
    folders_only: bool
    keeps: bool


def pack(path: Path) -> bytes:
    """Make a package of a file or a folder: the same files give the same bytes.

    `.dayflyignore` names what to leave out, as in `.gitignore`; `.git`, `.venv`, `__pycache__`,
    `*.pyc` and empty folders are always left out. What this returns, `PackageStore.put` accepts.

    :raises BadPackage: if there is nothing to pack, too much, or something that cannot be packed.
    """
    try:
        files = _files_of(path)
        contents = {name: files[name].read_bytes() for name in sorted(files)}
        modes = {name: files[name].stat().st_mode for name in files}
    except OSError as error:
        raise BadPackage(
            f"cannot read {error.filename} ({error.strerror}): correct that, or name it in "
            f"{IGNORE_FILE}"
        ) from error
    total = sum(map(len, contents.values()))
    archive = _zipped(contents, modes, zipfile.ZIP_DEFLATED)
    if _is_bomb(total, len(archive)):  # harmless here, but not to the one who receives it
        archive = _zipped(contents, modes, zipfile.ZIP_STORED)
    check(archive)
    return archive


def pack_texts(files: Mapping[str, str]) -> bytes:
    """The same of texts by their paths; those that begin with `#!` can be run.

    :raises BadPackage: as `pack` does.
    """
    for name in files:
        if why := _wrong_with_path(name):
            _refuse(name, why, "rename it")
    contents = {name: files[name].encode() for name in sorted(files)}
    modes = {name: 0o755 if files[name].startswith("#!") else 0o644 for name in files}
    archive = _zipped(contents, modes, zipfile.ZIP_STORED)
    check(archive)
    return archive


def _zipped(contents: dict[str, bytes], modes: dict[str, int], method: int) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in contents.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system = 3  # Unix, on every machine
            mode = 0o755 if modes[name] & stat.S_IXUSR else 0o644
            entry.external_attr = (stat.S_IFREG | mode) << 16
            archive.writestr(entry, content, method)
    return target.getvalue()


def _files_of(path: Path) -> dict[str, Path]:
    """What to pack, by its name in the package; within the limits."""
    if path.is_file():
        found: Iterable[tuple[str, Path]] = [(path.resolve().name, path)]
    elif path.is_dir():
        found = _walk(path, "", _rules(path / IGNORE_FILE), (path.resolve(),))
    else:
        raise BadPackage(f"there is no file or folder {path}: name one that exists")
    files: dict[str, Path] = {}
    total = 0
    for name, file in found:
        if why := _wrong_with_path(name):
            _refuse(name, why, "rename it")
        files[name] = file
        total += file.stat().st_size
        if len(files) > ENTRIES_MAX or total > UNPACKED_BYTES_MAX:
            raise BadPackage(
                f"{path} has over {ENTRIES_MAX} files or {UNPACKED_BYTES_MAX >> 20} MiB: "
                f"name what is not needed in {IGNORE_FILE}"
            )
    if not files:
        raise BadPackage(f"there is nothing to pack in {path}: put the function's code there")
    return files


def _walk(
    folder: Path, prefix: str, rules: list[_Rule], trail: tuple[Path, ...]
) -> Iterator[tuple[str, Path]]:
    """The files to pack under *folder*. *trail*: the true paths of the folders down to this one."""
    for item in _inside(folder):
        name, path = prefix + item.name, Path(item.path)
        is_folder = item.is_dir()
        if _is_left_out(name, is_folder, rules):
            continue
        true = path.resolve()
        if item.is_symlink() and not true.is_relative_to(trail[0]):
            _refuse(name, "is a link out of the folder", f"copy it, or name it in {IGNORE_FILE}")
        if is_folder and true in trail:
            _refuse(name, "is a link to a folder it lies in", f"name it in {IGNORE_FILE}")
        if is_folder:
            yield from _walk(path, f"{name}/", rules, (*trail, true))
        elif item.is_file():
            yield name, path
        else:
            why = "is neither a file nor a folder, or a link to nothing"
            _refuse(name, why, f"remove it, or name it in {IGNORE_FILE}")


def _is_left_out(name: str, is_folder: bool, rules: list[_Rule]) -> bool:
    """The last rule that matches decides, as git does it."""
    base = name.rpartition("/")[2]
    if base in _NEVER_PACKED or base.endswith(".pyc"):
        return True
    for rule in reversed(rules):
        if (is_folder or not rule.folders_only) and rule.pattern.fullmatch(name):
            return not rule.keeps
    return False


def _rules(file: Path) -> list[_Rule]:
    if not file.is_file():
        return []
    try:
        lines = file.read_text("utf-8").splitlines()
        return [_rule(line.rstrip()) for line in lines if line.strip() and line[0] != "#"]
    except (UnicodeDecodeError, re.error) as error:
        raise BadPackage(f"{IGNORE_FILE} is not valid ({error}): correct it") from error


def _rule(line: str) -> _Rule:
    text = line.removeprefix("!")
    bare = text.rstrip("/")
    # A slash at the start or within anchors the pattern to the top folder.
    start = "" if "/" in bare else "(?:.*/)?"
    pattern = re.compile(start + _expression(bare.removeprefix("/")), re.DOTALL)
    return _Rule(pattern, folders_only=bare != text, keeps=text != line)


_TOKEN: Final = re.compile(r"\\.|\*\*/|/\*\*\Z|\*+|\?|\[!?\]?[^\]]*\]|.", re.DOTALL)


def _expression(pattern: str) -> str:
    """A git-style pattern as a regular expression: `*` stays within a folder, `**/` does not."""
    return "".join(map(_expression_of_token, _TOKEN.findall(pattern)))


def _expression_of_token(token: str) -> str:
    if token.startswith("\\") and len(token) == 2:
        return re.escape(token[1])
    if token.startswith("[") and len(token) > 2:
        inside = re.sub(r"[\\\[&|~]", r"\\\g<0>", token[1:-1])
        return f"[^/{inside[1:]}]" if inside.startswith("!") else f"[{inside}]"
    words = {"**/": "(?:.*/)?", "/**": "/.+", "?": "[^/]"}
    return words.get(token) or ("[^/]*" if token.startswith("*") else re.escape(token))
