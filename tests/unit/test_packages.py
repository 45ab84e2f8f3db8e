"""Packages: what a stranger's zip may be, how it is kept, and how one is made."""

import io
import marshal
import os
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from dayfly_pool.errors import BadInput, BadPackage, DataFolderUnusable, PackageDamaged
from dayfly_pool.packages import ENTRIES_MAX, UNPACKED_BYTES_MAX, PackageStore, check, pack

MAIN = b"def handle(event):\n    return event\n"

# --- Zips written by hand ------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One entry, each field of which may lie."""

    name: bytes = b"main.txt"
    content: bytes = b"hello"
    method: int = 0
    mode: int = 0o100644
    dos: int = 0
    flags: int = 0
    packed: bytes | None = None
    crc: int | None = None
    size: int | None = None
    local_name: bytes | None = None
    local_size: int | None = None
    offset: int | None = None
    extra: bytes = b""

    @property
    def body(self) -> bytes:
        if self.packed is not None:
            return self.packed
        return deflated(self.content) if self.method == 8 else self.content

    def numbers(self, size: int | None) -> tuple[int, ...]:
        crc = zlib.crc32(self.content) if self.crc is None else self.crc
        return (crc, len(self.body), len(self.content) if size is None else size)

    def local(self) -> bytes:
        name = self.name if self.local_name is None else self.local_name
        size = self.size if self.local_size is None else self.local_size
        start = (b"PK\3\4", 20, self.flags, self.method, 0, 0x21, *self.numbers(size))
        return struct.pack("<4s5H3L2H", *start, len(name), 0) + name

    def central(self, offset: int) -> bytes:
        start = (b"PK\1\2", 0x031E, 20, self.flags, self.method, 0, 0x21, *self.numbers(self.size))
        rest = (len(self.name), len(self.extra), 0, 0, 0, self.mode << 16 | self.dos, offset)
        return struct.pack("<4s6H3L5H2L", *start, *rest) + self.name + self.extra


def deflated(content: bytes) -> bytes:
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    return squeeze.compress(content) + squeeze.flush()


def zipped(*parts: Part, count: int | None = None, comment: bytes = b"") -> bytes:
    body, table = bytearray(), bytearray()
    for part in parts:
        table += part.central(len(body) if part.offset is None else part.offset)
        body += part.local() + part.body
    return bytes(body + table + end(len(parts) if count is None else count, body, table, comment))


def end(count: int, body: bytes, table: bytes, comment: bytes = b"") -> bytes:
    fields = (0, 0, count, count, len(table), len(body), len(comment))
    return struct.pack("<4s4H2LH", b"PK\5\6", *fields) + comment


def overlap_bomb() -> bytes:
    """Fifield's: the first entry quotes the second's header; both share one compressed kernel."""
    kernel = deflated(b"\0" * 5000)
    inner = Part(b"b.txt", b"\0" * 5000, method=8)
    quote = struct.pack("<BHH", 0, len(inner.local()), len(inner.local()) ^ 0xFFFF)
    content = inner.local() + b"\0" * 5000
    outer = Part(b"a.txt", content, method=8, packed=quote + inner.local() + kernel)
    body = outer.local() + outer.body
    inner_at = len(outer.local()) + len(quote)
    table = outer.central(0) + inner.central(inner_at)
    return body + table + end(2, body, table)


def many(count: int) -> bytes:
    return zipped(*(Part(b"%d.txt" % number, b"") for number in range(count)))


def deep(count: int) -> bytes:
    """Few entries that imply many folders."""
    return zipped(*(Part(b"%d/" % number + b"d/" * 30 + b"x.txt", b"") for number in range(count)))


def tarred() -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("main.py"))
    return target.getvalue()


COMPILED = zipped(Part(b"main.py", MAIN), Part(b"sub/a.txt"))
GOOD = zipped(Part(b"main.md", MAIN), Part(b"sub/", b"", mode=0o40755), Part(b"sub/a.txt"))
DECLARED = UNPACKED_BYTES_MAX // 2 + 1
ZIP64 = 0xFFFF_FFFF

HOSTILE = {
    "nothing": (b"", "not a zip"),
    "text": (b"hello", "not a zip"),
    "tar": (tarred(), "no tar"),
    "truncated": (GOOD[:-1], "not a zip|not where"),
    "cut in the middle": (GOOD[: len(GOOD) // 2], "not a zip"),
    "bytes after the end": (GOOD + b"x", "not where"),
    "bytes before the start": (b"#!/bin/sh\n" + GOOD, "not where"),
    "second end in the comment": (zipped(Part(), comment=end(0, b"", b"") + b"x"), "not where"),
    "no entries": (zipped(), "no source file"),
    "folders only": (zipped(Part(b"a/", b"", mode=0o40755)), "no source file"),
    "bytecode only": (zipped(Part(b"__pycache__/a.cpython-311.pyc")), "no source file"),
    "too few in the count": (zipped(Part(), Part(b"b"), count=1), "more than its entries"),
    "too many in the count": (zipped(Part(), count=2), "ends before entry 1"),
    "20,001 entries": (many(ENTRIES_MAX + 1), "20001 entries, limit 20000"),
    "more implied folders": (deep(700), "over 20000 files and folders"),
    "zip64 end": (zipped(Part(), count=0xFFFF), "zip64"),
    "zip64 end of its own": (
        zipped(Part())[:-22] + b"PK\6\7".ljust(20, b"\0") + zipped(Part())[-22:],
        "zip64",
    ),
    "zip64 entry": (zipped(Part(size=ZIP64)), "zip64"),
    "zip64 offset": (zipped(Part(offset=ZIP64)), "zip64"),
    "symbolic link": (zipped(Part(content=b"/etc/passwd", mode=0o120777)), "symbolic link"),
    "character device": (zipped(Part(mode=0o020666)), "device, pipe or socket"),
    "block device": (zipped(Part(mode=0o060666)), "device, pipe or socket"),
    "pipe": (zipped(Part(mode=0o010666)), "device, pipe or socket"),
    "socket": (zipped(Part(mode=0o140666)), "device, pipe or socket"),
    "folder by mode": (zipped(Part(mode=0o40755)), "file by name and a folder by mode"),
    "folder by dos bit": (zipped(Part(mode=0, dos=0x10)), "file by name and a folder by mode"),
    "file by mode": (zipped(Part(b"a/", b"")), "file by name and a folder by mode"),
    "folder with contents": (zipped(Part(b"a/", b"abc", mode=0o40755)), "with contents"),
    "parent": (zipped(Part(b"../evil")), r"'\.\.' part"),
    "parent inside": (zipped(Part(b"a/../../evil")), r"'\.\.' part"),
    "parent folder": (zipped(Part(b"../", b"", mode=0o40755)), r"'\.\.' part"),
    "dot": (zipped(Part(b"./evil")), r"'\.' or"),
    "empty part": (zipped(Part(b"a//evil")), "empty"),
    "empty name": (zipped(Part(b"")), "empty"),
    "only a slash": (zipped(Part(b"/", b"", mode=0o40755)), "empty"),
    "absolute": (zipped(Part(b"/tmp/evil")), "absolute"),
    "drive letter": (zipped(Part(b"C:/evil")), "absolute"),
    "drive letter alone": (zipped(Part(b"c:evil")), "absolute"),
    "backslash": (zipped(Part(b"..\\evil")), "backslash"),
    "nul": (zipped(Part(b"main.py\0.txt")), "control character"),
    "line feed": (zipped(Part(b"a\nb")), "control character"),
    "delete": (zipped(Part(b"a\x7f")), "control character"),
    "line separator": (zipped(Part("a\u2028b".encode())), "control character"),
    "not utf-8": (zipped(Part(b"\xff\xfe")), "not UTF-8"),
    "surrogate": (zipped(Part(b"\xed\xa0\x80")), "not UTF-8"),
    "long name": (zipped(Part(b"a" * 256)), "over 255 bytes"),
    "long path": (zipped(Part(b"/".join([b"a" * 200] * 6))), "over 1024 bytes"),
    "deep path": (zipped(Part(b"a/" * 32 + b"x")), "deeper than 32"),
    "same name twice": (zipped(Part(), Part()), "twice"),
    "same folder twice": (zipped(*[Part(b"a/", b"", mode=0o40755)] * 2, Part()), "twice"),
    "same but for case": (zipped(Part(b"Main"), Part(b"mAIN")), "twice"),
    "same but for accents": (
        zipped(Part("\u00e9".encode()), Part("e\u0301".encode())),
        "twice",
    ),
    "same but for sharp s": (zipped(Part("straße".encode()), Part(b"STRASSE")), "twice"),
    "folders but for case": (zipped(Part(b"A/x"), Part(b"a/y")), "only in case"),
    "file and folder": (zipped(Part(b"a"), Part(b"a/b")), "both a file and a folder"),
    "folder and file": (zipped(Part(b"a/b"), Part(b"A")), "both a file and a folder"),
    "encrypted": (zipped(Part(flags=0x1)), "encrypted"),
    "strongly encrypted": (zipped(Part(flags=0x41)), "encrypted"),
    "encrypted directory": (zipped(Part(flags=0x2000)), "encrypted"),
    "patch": (zipped(Part(flags=0x20)), "unknown flags"),
    "bzip2": (zipped(Part(method=12)), "method 12"),
    "lzma": (zipped(Part(method=14)), "method 14"),
    "overlap": (overlap_bomb(), "shares bytes"),
    "same bytes": (zipped(Part(), Part(offset=0)), "shares bytes|twice"),
    "offset outside": (zipped(Part(offset=10**6)), "outside"),
    "offset at no header": (zipped(Part(), Part(b"b", offset=3)), "where no entry begins"),
    "too large": (zipped(*(Part(b"%d" % n, size=DECLARED, method=8) for n in (1, 2))), "250 MiB"),
    "ratio": (zipped(Part(content=b"\0" * (2 << 20), method=8)), "100 times"),
    "local name": (zipped(Part(local_name=b"evil.txt")), "two different names"),
    "local size": (zipped(Part(local_size=4)), "two different ways"),
    "stored size": (zipped(Part(size=4)), "two different sizes"),
    "larger than declared": (zipped(Part(content=b"x" * 99999, size=99, method=8)), "larger than"),
    "smaller than declared": (zipped(Part(method=8, size=6)), "wrong size or checksum"),
    "checksum": (zipped(Part(crc=1)), "wrong size or checksum"),
    "deflated checksum": (zipped(Part(method=8, crc=1)), "wrong size or checksum"),
    "not deflated": (zipped(Part(method=8, packed=b"\xff" * 9)), "cannot be unpacked"),
    "deflate without end": (
        zipped(Part(method=8, packed=deflated(b"x" * 99)[:-2])),
        "end is missing",
    ),
    "bytes after deflate": (
        zipped(Part(method=8, packed=deflated(b"hello") + b"x")),
        "after its end",
    ),
    "good before bad": (zipped(Part(b"main.py", MAIN), Part(crc=1)), "wrong size or checksum"),
}


def tree_of(folder: Path) -> dict[str, bytes | None]:
    """Every path under *folder*, with a file's content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def sources_of(folder: Path) -> dict[str, bytes]:
    """The files under *folder*, without the bytecode that we made."""
    found = tree_of(folder).items()
    return {name: content for name, content in found if content is not None and ".pyc" not in name}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "inside" / "packages"


@pytest.fixture
def store(root: Path) -> PackageStore:
    return PackageStore(root)


@pytest.mark.parametrize(("archive", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_zip_is_refused_and_leaves_nothing(
    store: PackageStore, tmp_path: Path, archive: bytes, message: str
) -> None:
    """It says why and what to do; not one byte is written, inside or outside of the store."""
    before = tree_of(tmp_path)
    with pytest.raises(BadPackage, match=message) as caught:
        store.put(archive)

    assert ": " in caught.value.detail  # the remedy
    assert len(caught.value.detail) < 300
    assert tree_of(tmp_path) == before
    assert store.digests() == []


@given(some.data())
@settings(max_examples=60, deadline=None)
def test_a_zip_changed_anywhere_is_read_or_refused(data: some.DataObject) -> None:
    """No bytes make the reader fail in another way than by saying no."""
    archive = bytearray(zipped(Part(), Part(b"b/c", b"\0" * 999, method=8), comment=b"note"))
    for _ in range(data.draw(some.integers(1, 4))):
        archive[data.draw(some.integers(0, len(archive) - 1))] = data.draw(some.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        store = PackageStore(Path(folder) / "packages")
        try:
            digest = store.put(bytes(archive))
        except BadPackage:
            assert store.digests() == []
        else:
            assert len(sources_of(store.path(digest))) == 2


@pytest.mark.parametrize(
    "archive",
    [
        zipped(Part(b"main.py", MAIN, method=8)),
        zipped(Part("straße.txt".encode()), Part(b"a.txt", mode=0)),
        zipped(Part(b"a/", b"", mode=0, dos=0x10), Part(b"a/b.txt")),
        zipped(Part(), comment=b"made by somebody"),
        zipped(Part(extra=b"\x01\x00\x08\x00" + b"\xff" * 8)),
        zipped(Part(b"zeros", b"\0" * 1_000_000, method=8)),
        zipped(Part(b"a" * 255), Part(b"a/" * 31 + b"x")),
        zipped(Part(content=b"", method=8)),
    ],
)
def test_an_ordinary_zip_is_unpacked_as_others_would(store: PackageStore, archive: bytes) -> None:
    """Where we accept, the standard library sees the same files."""
    with zipfile.ZipFile(io.BytesIO(archive)) as other:
        names = [name for name in other.namelist() if not name.endswith("/")]
        expected = [other.read(name) for name in names]

    assert list(sources_of(store.path(store.put(archive))).values()) == expected


def test_a_streamed_zip_is_accepted(store: PackageStore) -> None:
    """Sizes after the contents: what `zipfile` and others write into a pipe."""

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def tell(self) -> int:
            raise OSError

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("main.py", MAIN)
        archive.writestr("a.txt", "a" * 100)

    assert sources_of(store.path(store.put(pipe.getvalue())))["main.py"] == MAIN


def test_a_package_is_readable_by_every_user_whatever_the_umask(root: Path) -> None:
    """Sandboxes run as others; only what the zip says is executable; no setuid."""
    archive = zipped(
        Part(b"sub/main.py", MAIN), Part(b"run", mode=0o104700), Part(b"e/", b"", mode=0o40700)
    )
    umask = os.umask(0o077)
    try:
        store = PackageStore(root)
        tree = store.path(store.put(archive))
    finally:
        os.umask(umask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tree.rglob("*")}

    assert modes.pop("run") == 0o755
    assert {modes.pop(name) for name in ("sub", "e", "__pycache__")} == {0o755}
    assert set(modes.values()) == {0o644}
    assert stat.S_IMODE(tree.stat().st_mode) == stat.S_IMODE(tree.parent.stat().st_mode) == 0o755


def test_source_is_compiled_as_the_sandbox_sees_it(store: PackageStore) -> None:
    """Names in tracebacks begin with /code; unchecked hashes make file times irrelevant."""
    tree = store.path(store.put(zipped(Part(b"sub/main.py", MAIN))))
    (compiled,) = tree.rglob("*.pyc")
    content = compiled.read_bytes()

    assert content[4:8] == b"\1\0\0\0"
    assert marshal.loads(content[16:]).co_filename == "/code/sub/main.py"


def test_source_that_does_not_compile_is_kept(store: PackageStore) -> None:
    """The loader reports it, with the user's own line; what compiles is compiled."""
    nested = b"x = " + b"(" * 10_000 + b")" * 10_000
    tree = store.path(
        store.put(
            zipped(
                Part(b"bad.py", b"def"),
                Part(b"bytes.py", b"\xff\0"),
                Part(b"deep.py", nested),
                Part(b"main.py", MAIN),
                Part(b"a" * 252 + b".py", MAIN),  # its bytecode's name would be too long
            )
        )
    )

    assert sources_of(tree)["deep.py"] == nested
    assert [path.name.partition(".")[0] for path in tree.rglob("*.pyc")] == ["main"]


def test_bytecode_that_comes_along_is_dropped(store: PackageStore) -> None:
    """It could be of another source than the one that is shown."""
    archive = zipped(
        Part(b"main.py", MAIN),
        Part(b"__pycache__/", b"", mode=0o40755),
        Part(b"__pycache__/main.cpython-311.pyc", b"forged"),
        Part(b"sub/__pycache__/note.txt", b"forged"),
        Part(b"lib.pyc", b"forged"),
    )
    tree = store.path(store.put(archive))

    assert b"forged" not in tree_of(tree).values()
    assert sources_of(tree) == {"main.py": MAIN}


def test_the_same_bytes_again_change_nothing(store: PackageStore, root: Path) -> None:
    """Whoever deploys in a loop costs a hash."""
    first = store.put(GOOD)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}

    assert store.put(GOOD) == PackageStore(root).put(GOOD) == first
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert store.digests() == [first]


def test_many_threads_may_put_the_same(store: PackageStore) -> None:
    """One of them does the work."""
    with ThreadPoolExecutor(8) as threads:
        digests = set(threads.map(store.put, [GOOD] * 16))

    assert digests == set(store.digests())


@pytest.mark.parametrize(
    "digest", ["", "x", "../" * 20 + "etc", "A" * 64, "a" * 63, "a" * 64 + "\n"]
)
def test_what_is_no_digest_is_no_path(store: PackageStore, digest: str) -> None:
    """A digest comes from outside and becomes a path."""
    with pytest.raises(BadInput, match="not a package digest"):
        store.path(digest)
    with pytest.raises(BadInput, match="not a package digest"):
        store.remove(digest)


def test_a_package_that_was_never_put_is_missing(store: PackageStore) -> None:
    """Not a KeyError, not an empty folder."""
    with pytest.raises(PackageDamaged, match="deploy again"):
        store.path("a" * 64)


def a_changed_file(tree: Path) -> None:
    (tree / "sub" / "a.txt").write_bytes(b"HELLO")


def a_missing_file(tree: Path) -> None:
    (tree / "main.md").unlink()


def an_extra_file(tree: Path) -> None:
    (tree / "evil.py").write_bytes(b"evil")


def an_extra_folder(tree: Path) -> None:
    (tree / "evil").mkdir()


def a_link(tree: Path) -> None:
    (tree / "main.md").rename(tree.parent.parent / "elsewhere")
    (tree / "main.md").symlink_to(tree.parent.parent / "elsewhere")


def another_mode(tree: Path) -> None:
    (tree / "main.md").chmod(0o4755)


def forged_bytecode(tree: Path) -> None:
    next(tree.rglob("main.*.pyc")).write_bytes(b"forged")


def no_tree(tree: Path) -> None:
    tree.rename(tree.parent.parent / "elsewhere")


def no_manifest(tree: Path) -> None:
    (tree.parent.parent / "manifests" / f"{tree.name}.json").unlink()


def a_changed_manifest(tree: Path) -> None:
    manifest = tree.parent.parent / "manifests" / f"{tree.name}.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"a.txt", b"b.txt"))
    (tree / "sub" / "a.txt").rename(tree / "sub" / "b.txt")


DAMAGES = [
    a_changed_file,
    a_missing_file,
    an_extra_file,
    an_extra_folder,
    a_link,
    another_mode,
    forged_bytecode,
    no_tree,
    no_manifest,
    a_changed_manifest,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tree_is_unpacked_again(store: PackageStore, root: Path, damage) -> None:
    """Found before its first use in a process; the archive is the truth."""
    tree = store.path(store.put(COMPILED if damage is forged_bytecode else GOOD))
    before = tree_of(tree)
    damage(tree)

    assert PackageStore(root).path(tree.name) == tree
    assert tree_of(tree) == before
    assert not (tree / "main.md").is_symlink()


@pytest.mark.parametrize("damage", DAMAGES[:2])
def test_a_damaged_package_without_a_good_archive_is_never_run(
    store: PackageStore, root: Path, damage
) -> None:
    """Then only a new deploy helps, and it does."""
    tree = store.path(store.put(GOOD))
    damage(tree)
    (root / "archives" / f"{tree.name}.zip").write_bytes(GOOD[:-1])
    again = PackageStore(root)

    with pytest.raises(PackageDamaged, match="damaged on disk: deploy again"):
        again.path(tree.name)
    assert again.put(GOOD) == tree.name
    assert sources_of(again.path(tree.name)) == {"main.md": MAIN, "sub/a.txt": b"hello"}


class Kept(dict[str, bytes]):
    """`Archives` in memory; *noted* are those that somebody is about to refer to."""

    noted: tuple[str, ...] = ()

    def put(self, digest: str, archive: bytes) -> None:
        self[digest] = archive

    def note(self, digest: str) -> bool:
        self.noted = (*self.noted, digest)
        return digest in self

    def drop(self, used: Collection[str], idle_s: float) -> int:
        gone = self.keys() - set(used) - set(self.noted)
        for digest in gone:
            del self[digest]
        return len(gone)

    def close(self) -> None:
        """Nothing to let go of."""


def test_what_one_server_was_given_another_has_when_it_needs_it(tmp_path: Path) -> None:
    """Unpacked as for an upload, once; until then nothing of it is there."""
    kept = Kept()
    one, other = PackageStore(tmp_path / "one", kept), PackageStore(tmp_path / "other", kept)
    digest = one.put(GOOD)
    assert not other.is_here(digest)

    assert sources_of(other.path(digest)) == {"main.md": MAIN, "sub/a.txt": b"hello"}
    assert other.is_here(digest)
    kept.clear()
    assert PackageStore(tmp_path / "other", kept).path(digest) == other.path(digest)


@pytest.mark.parametrize("damage", DAMAGES[:2])
def test_a_damaged_package_is_fetched_again(tmp_path: Path, damage) -> None:
    """Where the archive beside it is none any more."""
    kept = Kept()
    store = PackageStore(tmp_path / "one", kept)
    tree = store.path(store.put(GOOD))
    damage(tree)
    (tmp_path / "one" / "archives" / f"{tree.name}.zip").write_bytes(GOOD[:-1])

    again = PackageStore(tmp_path / "one", kept)
    assert sources_of(again.path(tree.name)) == {"main.md": MAIN, "sub/a.txt": b"hello"}


def test_what_is_fetched_and_is_not_what_its_digest_says_is_never_unpacked(tmp_path: Path) -> None:
    """Whoever can write there does not say what runs here."""
    kept = Kept()
    digest = PackageStore(tmp_path / "one", kept).put(GOOD)
    kept[digest] = zipped(Part(b"main.py", b"evil = True\n"))
    other = PackageStore(tmp_path / "other", kept)

    with pytest.raises(PackageDamaged, match="damaged where all keep it"):
        other.path(digest)
    assert other.digests() == []


def test_a_package_that_is_about_to_be_used_is_given_to_the_others_again(tmp_path: Path) -> None:
    """It had been dropped there, as nobody used it."""
    kept = Kept()
    store = PackageStore(tmp_path / "one", kept)
    digest = store.put(GOOD)
    kept.clear()
    store.note(digest)

    assert kept == {digest: GOOD}


def test_a_start_drops_what_is_not_used_but_for_what_others_have_noted(tmp_path: Path) -> None:
    """Its own folder is a cache: that may go whatever others do."""
    kept = Kept()
    store = PackageStore(tmp_path / "one", kept)
    used, noted, old = (store.put(zipped(Part(b"main.py", text))) for text in (b"1", b"2", b"3"))
    store.note(noted)
    store.drop({used})

    assert store.digests() == [used]
    assert sorted(kept) == sorted([used, noted])
    assert old not in kept


def test_a_tree_that_vanishes_is_noticed_at_once(store: PackageStore) -> None:
    """Also in the process that has verified it."""
    tree = store.path(store.put(GOOD))
    no_tree(tree)

    assert store.path(tree.name).is_dir()


def test_a_removed_package_is_gone(store: PackageStore, root: Path) -> None:
    """Removing twice is harmless, and it can be put again."""
    empty = tree_of(root)
    digest = store.put(GOOD)
    store.remove(digest)
    store.remove(digest)

    assert tree_of(root) == empty
    with pytest.raises(PackageDamaged):
        store.path(digest)
    assert store.put(GOOD) == digest


def test_leftovers_of_a_crash_are_swept(store: PackageStore, root: Path) -> None:
    """A scratch folder, a tree and a manifest without an archive: a put or remove that was cut."""
    kept = store.put(GOOD)
    other = store.put(zipped(Part()))
    (root / "archives" / f"{other}.zip").unlink()
    (root / "tmp" / "abc" / "tree").mkdir(parents=True)
    (root / "tmp" / "file").write_bytes(b"")
    again = PackageStore(root)

    assert list((root / "tmp").iterdir()) == []
    assert [path.name for path in (root / "unpacked").iterdir()] == [kept]
    assert again.digests() == [kept]


def test_a_root_that_is_a_file_is_unusable(tmp_path: Path) -> None:
    """The operator's mistake has a name."""
    (tmp_path / "packages").write_bytes(b"")

    with pytest.raises(DataFolderUnusable, match="packages"):
        PackageStore(tmp_path / "packages")


# --- Packing -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "project").mkdir()
    return tmp_path / "project"


def write(folder: Path, *names: str, content: bytes = b"x") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def packed(path: Path) -> list[str]:
    return [entry.path for entry in check(pack(path))]


# Letters of which some make trouble; all of Unicode would cost seconds to set up.
names = some.text("aAb .-_~#!*[:\\\n\x7f\u00e9\u0301ß漢🜁", min_size=1, max_size=4)
contents = some.binary(max_size=300) | some.integers(1, 20_000).map(lambda size: b"\0" * size)


@given(some.lists(some.tuples(names, names, contents), min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_what_was_packed_comes_out_again(files: list[tuple[str, str, bytes]]) -> None:
    """The same bytes under the same names; or pack itself says what is wrong with a name."""
    with tempfile.TemporaryDirectory() as name:
        folder, store = Path(name) / "project", PackageStore(Path(name) / "packages")
        for top, base, content in files:
            try:
                write(folder, f"{top}/{base}.dat", content=content)
            except (OSError, ValueError):
                continue  # this disk does not take that name either
        folder.mkdir(exist_ok=True)
        try:
            archive = pack(folder)
        except BadPackage:
            return
        expected = {n: c for n, c in sources_of(folder).items() if "__pycache__" not in n}
        assert sources_of(store.path(store.put(archive))) == expected


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    """Neither times, nor order, nor the umask leave a trace: the digest names the content."""
    write(tmp_path / "one", "b.py", "a/c.py")
    write(tmp_path / "two", "a/c.py", "b.py")
    os.utime(tmp_path / "two" / "b.py", (1, 1))
    (tmp_path / "two" / "b.py").chmod(0o600)

    assert pack(tmp_path / "one") == pack(tmp_path / "two")


def test_an_executable_stays_one(folder: Path, store: PackageStore) -> None:
    """0755 or 0644, nothing else."""
    write(folder, "run", "data")
    (folder / "run").chmod(0o700)
    tree = store.path(store.put(pack(folder)))

    assert stat.S_IMODE((tree / "run").stat().st_mode) == 0o755
    assert stat.S_IMODE((tree / "data").stat().st_mode) == 0o644


def test_one_file_is_a_package(folder: Path) -> None:
    """`dayfly deploy hello.py`."""
    write(folder, "hello.py")

    assert packed(folder / "hello.py") == ["hello.py"]


def test_zeros_are_packed_so_that_they_are_accepted(folder: Path, store: PackageStore) -> None:
    """What pack makes, put takes: above the ratio, files are stored as they are."""
    write(folder, "zeros", content=b"\0" * (2 << 20))

    assert store.path(store.put(pack(folder)))


def test_what_never_belongs_into_a_package_is_left_out(folder: Path) -> None:
    """Wherever it lies."""
    write(folder, ".git/x", "a/.git/x", ".venv/x", "__pycache__/x", "a/b.pyc", ".dayflyignore")
    write(folder, "main.py", ".env.example", "a/git")

    assert packed(folder) == [".env.example", "a/git", "main.py"]


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        ("*.txt", "a/keep.md b.md"),
        ("# no\n\n  \n*.md", "a/b/deep.txt a/x.txt top.txt"),
        ("/top.txt", "a/b/deep.txt a/keep.md a/x.txt b.md"),
        ("a/", "b.md top.txt"),
        ("b.md/", "a/b/deep.txt a/keep.md a/x.txt b.md top.txt"),
        ("*.txt\n!x.txt", "a/keep.md a/x.txt b.md"),
        ("!x.txt\n*.txt", "a/keep.md b.md"),
        ("a/\n!a/x.txt", "b.md top.txt"),  # as in git: its folder is not looked into
        ("a/*\n!a/x.txt", "a/x.txt b.md top.txt"),
        ("a/*.txt", "a/b/deep.txt a/keep.md b.md top.txt"),
        ("a/**", "b.md top.txt"),
        ("**/x.txt", "a/b/deep.txt a/keep.md b.md top.txt"),
        ("a/**/deep.txt", "a/keep.md a/x.txt b.md top.txt"),
        ("?.md", "a/b/deep.txt a/keep.md a/x.txt top.txt"),
        ("[!b].txt\n[a-c].md", "a/b/deep.txt a/keep.md top.txt"),
        ("b", "a/keep.md a/x.txt b.md top.txt"),
        ("/b", "a/b/deep.txt a/keep.md a/x.txt b.md top.txt"),
        ("\\*.txt\n\\#x", "a/b/deep.txt a/keep.md a/x.txt b.md top.txt"),
        ("[", "a/b/deep.txt a/keep.md a/x.txt b.md top.txt"),
    ],
)
def test_the_ignore_file_works_as_gits(folder: Path, rules: str, left: str) -> None:
    """The last rule that matches decides."""
    write(folder, "top.txt", "b.md", "a/x.txt", "a/keep.md", "a/b/deep.txt")
    write(folder, ".dayflyignore", content=rules.encode())

    assert packed(folder) == left.split()


def test_a_link_inside_is_followed(folder: Path) -> None:
    """The package holds what it shows."""
    write(folder, "lib/a.py")
    (folder / "b.py").symlink_to("lib/a.py")
    (folder / "more").symlink_to(folder / "lib")

    assert packed(folder) == ["b.py", "lib/a.py", "more/a.py"]


def to_a_file_outside(folder: Path) -> None:
    (folder / "passwd").symlink_to("/etc/passwd")


def to_a_folder_outside(folder: Path) -> None:
    (folder / "above").symlink_to("..")


def to_its_own_folder(folder: Path) -> None:
    write(folder, "a/x")
    (folder / "a" / "loop").symlink_to(folder)


def to_nothing(folder: Path) -> None:
    (folder / "dead").symlink_to("nowhere")


def a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


def a_name_with_a_line_feed(folder: Path) -> None:
    write(folder, "a\nb")


def a_name_that_is_not_utf8(folder: Path) -> None:
    (folder / os.fsdecode(b"\xff")).write_bytes(b"")


def names_that_differ_in_case(folder: Path) -> None:
    write(folder, "a", "A")


def rules_that_are_not_text(folder: Path) -> None:
    write(folder, ".dayflyignore", content=b"\xff")


def a_range_that_is_none(folder: Path) -> None:
    write(folder, ".dayflyignore", content=b"[z-a]")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (to_a_file_outside, "link out of the folder: copy it"),
        (to_a_folder_outside, "link out of the folder: copy it"),
        (to_its_own_folder, "link to a folder it lies in"),
        (to_nothing, "link to nothing: remove it"),
        (a_pipe, "neither a file nor a folder"),
        (a_name_with_a_line_feed, "control character"),
        (a_name_that_is_not_utf8, "not UTF-8: rename it"),
        (names_that_differ_in_case, "rename one of the two"),
        (rules_that_are_not_text, "dayflyignore is not valid"),
        (a_range_that_is_none, "dayflyignore is not valid"),
    ],
)
def test_what_cannot_be_packed_is_named(folder: Path, make, message: str) -> None:
    """With the remedy."""
    write(folder, "main.py")
    make(folder)

    with pytest.raises(BadPackage, match=message):
        pack(folder)


def test_nothing_to_pack_is_an_error(folder: Path) -> None:
    """An empty folder, or one of which all is ignored, or none at all."""
    with pytest.raises(BadPackage, match="nothing to pack"):
        pack(folder)
    write(folder, "a.py")
    write(folder, ".dayflyignore", content=b"*")
    with pytest.raises(BadPackage, match="nothing to pack"):
        pack(folder)
    with pytest.raises(BadPackage, match="there is no file or folder"):
        pack(folder / "nowhere")


def test_a_folder_over_the_limit_is_not_read(folder: Path) -> None:
    """A sparse file: it would take its size in memory."""
    with (folder / "model.bin").open("wb") as file:
        file.truncate(UNPACKED_BYTES_MAX + 1)

    with pytest.raises(BadPackage, match=r"250 MiB: name what is not needed in \.dayflyignore"):
        pack(folder)
