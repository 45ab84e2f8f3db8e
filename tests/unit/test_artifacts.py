"""The store of artifacts: what a hostile step may leave, and what of it is ever handed over."""

import contextlib
import ctypes
import hashlib
import mmap
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dayfly import freight
from dayfly_pool.errors import (
    ArtifactDamaged,
    ArtifactGone,
    BadInput,
    BadTree,
    DiskFull,
    PlatformError,
    TakingEnded,
    TooManyStreams,
)
from dayfly_pool.workflow import artifacts, trees
from dayfly_pool.workflow.artifacts import Artifact, Artifacts
from dayfly_pool.workflow.trees import Limits

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts and makes devices")
SMALL = Limits(entries=50, bytes=1 << 20, depth=10)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Artifacts]:
    """With limits that a test can reach."""
    opened = Artifacts(tmp_path / "store", SMALL)
    opened.open()
    yield opened
    opened.close()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where a step left something."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def fill(folder: Path) -> Path:
    """A small tree with one of everything that is allowed."""
    (folder / "sub" / "empty").mkdir(parents=True, exist_ok=True)
    (folder / "a b\nc").write_bytes(b"odd name")
    (folder / "sub" / "run").write_bytes(b"#!/bin/sh\n")
    (folder / "sub" / "run").chmod(0o4711)
    (folder / "sub.txt").write_bytes(b"x" * 300_000)
    (folder / "ümlaut").symlink_to("/etc/passwd")
    return folder


def left_in(store: Artifacts) -> list[str]:
    """What is stored, or on its way in or out."""
    root = store._places.root
    found = [*(root / "incoming").iterdir(), *(root / "trash").iterdir()]
    return sorted(path.name for path in [*found, *(root / "objects").glob("*/*")])


@pytest.mark.parametrize("mode", [None, 0o755])
def test_other_users_of_the_machine_do_not_get_in(tmp_path: Path, mode: int | None):
    """Also where an earlier version made the folder for all to read."""
    if mode is not None:
        (tmp_path / "store").mkdir(mode=mode)
    made = Artifacts(tmp_path / "store")
    made.open()
    made.close()

    assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700


# ---- digests ------------------------------------------------------------------------------------


def test_a_file_is_named_by_what_sha256sum_prints(store: Artifacts, out: Path):
    (out / "model").write_bytes(b"weights")
    printed = subprocess.run(["sha256sum", out / "model"], capture_output=True, check=True)

    kept = store.put("team", out, "model")

    assert kept.sha256 == printed.stdout.decode().split()[0]
    assert kept == Artifact(f"dayfly://team/file/sha256/{kept.sha256}", kept.sha256, "file", 7, 1)


def test_a_folder_is_named_by_what_the_documented_script_prints(store: Artifacts, out: Path):
    """Anybody can recompute it: the script is taken from the module's docstring."""
    assert artifacts.__doc__
    script = "".join(re.findall(r"^ {4}(?=find)(.*sha256sum)$", artifacts.__doc__, re.S | re.M))
    fill(out / "tree")
    printed = subprocess.run(
        ["bash", "-c", script], cwd=out / "tree", capture_output=True, check=True
    )

    kept = store.put("team", out, "tree")

    assert kept.sha256 == printed.stdout.decode().split()[0]
    assert (kept.kind, kept.files, kept.bytes) == ("tree", 3, 300_018)


def test_times_owners_and_order_are_not_part_of_a_digest(store: Artifacts, out: Path):
    for name, order in (("one", "ab"), ("two", "ba")):
        (out / name).mkdir()
        for letter in order:
            (out / name / letter).write_text(letter)
    os.utime(out / "two" / "a", (1, 1))

    assert store.put("team", out, "one") == store.put("team", out, "two")


@pytest.mark.parametrize("change", ["content", "x", "target", "name", "folder"])
def test_everything_else_is_part_of_a_digest(store: Artifacts, out: Path, change: str):
    for name in ("one", "two"):
        fill(out / name)
    two = out / "two"
    match change:
        case "content":
            (two / "sub" / "run").write_bytes(b"#!/bin/zsh")
        case "x":
            (two / "sub" / "run").chmod(0o600)
        case "target":
            (two / "ümlaut").unlink()
            (two / "ümlaut").symlink_to("/etc/group")
        case "name":
            (two / "sub.txt").rename(two / "sub.text")
        case "folder":
            (two / "sub" / "empty").rmdir()

    assert store.put("team", out, "one").sha256 != store.put("team", out, "two").sha256


# ---- taking over and sealing --------------------------------------------------------------------


def test_what_is_put_is_moved_and_not_copied(store: Artifacts, out: Path):
    (out / "big").write_bytes(b"1" * 1000)
    inode = (out / "big").stat().st_ino

    kept = store.put("team", out, "big")

    assert store.path(kept).stat().st_ino == inode
    assert list(out.iterdir()) == []


def test_nobody_may_change_what_was_put(store: Artifacts, out: Path):
    """No right to write, no set-user-ID, nothing that a digest would not tell of."""
    tree = fill(out / "tree")
    os.setxattr(tree / "sub", "user.overlay.opaque", b"y")
    os.setxattr(tree / "sub.txt", "user.secret", b"1")
    (tree / "sub").chmod(0o7000)

    path = store.path(store.put("team", out, "tree"))

    for found in [path, *path.rglob("*")]:
        status = found.lstat()
        assert status.st_uid == os.geteuid()
        if found.is_symlink():
            continue
        assert os.listxattr(found) == []
        is_open = found.is_dir() or found.name == "run"
        assert stat.S_IMODE(status.st_mode) == (0o555 if is_open else 0o444)


@AS_ROOT
def test_a_large_file_is_hashed_before_its_step_is_dead(
    store: Artifacts, out: Path, monkeypatch: pytest.MonkeyPatch
):
    """And not again; nobody but root can have changed it since."""
    content = os.urandom(trees.BIG_BYTES)
    (out / "file").write_bytes(content)
    os.chown(out / "file", 4000, 4000)
    with trees.opened_folder(None, out) as folder:
        early = trees.seal_early(folder, "file")
    assert early is not None
    status = (out / "file").stat()
    monkeypatch.setattr(trees, "hashed", lambda *_: pytest.fail("it is hashed again"))
    found = store.put("default", out, "file", early=early)
    early.close()

    assert (status.st_uid, status.st_mode & 0o777) == (0, 0o555)
    assert found.sha256 == hashlib.sha256(content).hexdigest()


@AS_ROOT
def test_what_is_not_what_was_hashed_early_is_hashed(store: Artifacts, out: Path):
    """Another file under its name, or other bytes in it."""
    for number, change in enumerate(("another", "bytes")):
        (out / f"{number}").write_bytes(b"a" * trees.BIG_BYTES)
        with trees.opened_folder(None, out) as folder:
            early = trees.seal_early(folder, f"{number}")
        assert early is not None
        if change == "another":
            (out / f"{number}").unlink()
        (out / f"{number}").write_bytes(b"b" * trees.BIG_BYTES)
        os.utime(out / f"{number}", ns=(0, number))
        found = store.put("default", out, f"{number}", early=early)
        early.close()

        assert found.sha256 == hashlib.sha256(b"b" * trees.BIG_BYTES).hexdigest()


@AS_ROOT
def test_what_somebody_writes_to_or_is_no_large_file_is_not_hashed_early(out: Path):
    (out / "small").write_bytes(b"a")
    (out / "large").write_bytes(b"a" * trees.BIG_BYTES)
    (out / "link").symlink_to("large")
    (out / "named").write_bytes(b"a" * trees.BIG_BYTES)
    (out / "twice").hardlink_to(out / "named")
    with trees.opened_folder(None, out) as folder, (out / "large").open("ab"):
        for path in ("small", "large", "link", "named", "none", "no/file", "../out/large", ""):
            assert trees.seal_early(folder, path) is None, path


@AS_ROOT
def test_files_of_other_users_become_ours(store: Artifacts, out: Path):
    fill(out / "tree")
    for found in [out / "tree", *(out / "tree").rglob("*")]:
        os.chown(found, 12345, 12345, follow_symlinks=False)

    path = store.path(store.put("team", out, "tree"))

    assert {found.lstat().st_uid for found in [path, *path.rglob("*")]} == {0}


def test_a_link_is_kept_and_never_followed(store: Artifacts, out: Path, tmp_path: Path):
    """In a sandbox it leads nowhere that the sandbox could not go by itself."""
    (tmp_path / "outside").mkdir(mode=0o777)
    (tmp_path / "outside" / "file").write_text("mine")
    (out / "tree").mkdir()
    (out / "tree" / "escape").symlink_to(tmp_path / "outside")

    kept = store.put("team", out, "tree")

    assert os.readlink(store.path(kept) / "escape") == str(tmp_path / "outside")
    assert stat.S_IMODE((tmp_path / "outside" / "file").stat().st_mode) & 0o200
    with pytest.raises(BadInput, match="there is no file escape/file"):
        store.read(kept, "escape/file")
    store.sweep(lambda uri: False, before=2**40)
    assert (tmp_path / "outside" / "file").read_text() == "mine"


def test_names_of_one_file_are_hashed_once(
    store: Artifacts, out: Path, monkeypatch: pytest.MonkeyPatch
):
    (out / "tree").mkdir()
    (out / "tree" / "a").write_bytes(b"1")
    os.link(out / "tree" / "a", out / "tree" / "b")
    hashed: list[str] = []
    true = trees.hashed
    monkeypatch.setattr(trees, "hashed", lambda *a: (hashed.append(a[1]), true(*a))[1])

    kept = store.put("team", out, "tree")

    assert hashed == ["a"]
    assert {entry.sha256 for entry in store.entries(kept)} == {"", hashlib.sha256(b"1").hexdigest()}
    store.path(kept)


def test_the_same_content_is_stored_once(store: Artifacts, out: Path):
    (out / "one").write_bytes(b"same")
    first = store.put("team", out, "one")
    inode = store.path(first).stat().st_ino
    (out / "two").write_bytes(b"same")

    assert store.put("team", out, "two") == first
    assert store.path(first).stat().st_ino == inode
    assert left_in(store) == [f"file-{first.sha256}"]


def test_many_threads_that_put_the_same_agree(store: Artifacts, out: Path):
    found: list[Artifact] = []

    def put(number: int) -> None:
        (out / str(number)).write_bytes(b"same")
        found.append(store.put("team", out, str(number)))

    threads = [threading.Thread(target=put, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 8
    assert len(set(found)) == 1
    assert left_in(store) == [f"file-{found[0].sha256}"]


# ---- what is refused ----------------------------------------------------------------------------


def _deep(tree: Path) -> None:
    here = os.open(tree, os.O_RDONLY)
    for _ in range(800):  # beyond what a path can name
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def _many(tree: Path) -> None:
    for number in range(51):
        (tree / str(number)).touch()


def _socket(tree: Path) -> None:
    os.chdir(tree)
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("sock")
    os.chdir("/")


def _linked(tree: Path) -> None:
    (tree.parent / "other").write_text("1")
    os.link(tree.parent / "other", tree / "linked")


def _long(tree: Path) -> None:
    here = tree
    for _ in range(9):
        here = here / ("n" * 250)
    here.mkdir(parents=True)
    for name in ("m" * 250, "o" * 250):
        os.chdir(here)
        here = Path(name)
        here.mkdir()
    os.chdir(here)
    for name in ("p" * 250, "q" * 250):
        os.mkdir(name)
        os.chdir(name)
    os.chdir("/")


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (lambda tree: os.mkfifo(tree / "p"), "p is a pipe: leave files"),
    "socket": (_socket, "sock is a socket"),
    "latin": (
        lambda tree: _new(Path(os.fsdecode(os.fsencode(tree) + b"/\xe4"))),
        r"\\udce4 has a name that is not UTF-8",
    ),
    "link": (lambda tree: os.symlink(b"\xe4", os.fsencode(tree) + b"/l"), "l links to a name that"),
    "hole": (lambda tree: os.truncate(_new(tree / "h"), 15 << 40), "with h it is over 1048576 byt"),
    "linked": (_linked, "linked is also linked from outside"),
    "deep": (_deep, "d/d/d lies deeper than 10 folders"),
    "many": (_many, "over 50 files and folders"),
    "long": (_long, "has a path of over|lies deeper"),
    "terminal": (lambda tree: os.mkfifo(tree / "\x1b[31m"), r"\\x1b\[31m is a pipe"),
}


def _new(path: Path) -> Path:
    path.touch()
    return path


@pytest.mark.parametrize("case", HOSTILE)
def test_what_cannot_be_handed_over_is_refused_by_name(
    store: Artifacts, out: Path, tmp_path: Path, case: str
):
    """And nothing of it stays, however deep it is; nothing else goes."""
    tree = out / "tree"
    tree.mkdir()
    make, message = HOSTILE[case]
    make(tree)

    with pytest.raises(BadTree, match=message):
        store.put("team", out, "tree")
    assert left_in(store) == []
    assert [path.name for path in out.iterdir()] == (["other"] if case == "linked" else [])


@AS_ROOT
def test_a_device_is_refused(store: Artifacts, out: Path):
    """Also the one that an overlay takes for a hole, which every user can make."""
    (out / "tree").mkdir()
    os.mknod(out / "tree" / "w", stat.S_IFCHR)

    with pytest.raises(BadTree, match="w is a device"):
        store.put("team", out, "tree")


def test_what_is_mostly_holes_is_refused_before_it_is_read(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also in several files, each of which would be fine."""
    store = Artifacts(tmp_path / "large")
    store.open()
    (out / "tree").mkdir()
    for number in range(3):
        with (out / "tree" / f"{number}").open("wb") as file:
            file.write(b"data")
            file.truncate(freight.HOLES_MAX // 2)
    with (out / "file").open("wb") as file:
        file.truncate(63 << 30)
    monkeypatch.setattr(trees, "hashed", lambda *_: "0" * 64)  # it would take minutes
    with trees.opened_folder(None, out) as folder:
        assert trees.seal_early(folder, "file") is None
    for output, path in (("file", r"\."), ("tree", "2")):
        with pytest.raises(BadTree, match=f"^{path} is mostly holes: write what is in it"):
            store.put("team", out, output)
    store.close()


@pytest.mark.parametrize("asked", [1, 2, 3, 5])
def test_what_is_being_read_can_be_stopped_at_any_chunk(
    store: Artifacts, out: Path, asked: int, monkeypatch: pytest.MonkeyPatch
):
    """Nothing is left of it then."""
    monkeypatch.setattr(trees, "CHUNK_BYTES", 100_000)
    (out / "tree").mkdir()
    (out / "tree" / "small").write_bytes(b"a" * 100)
    (out / "tree" / "large").write_bytes(b"a" * 500_000)
    left = list(range(asked))

    def go_on() -> None:
        left.pop()
        if not left:
            left.append(0)  # whoever asks again is told the same
            raise TakingEnded

    with pytest.raises(TakingEnded):
        store.put("team", out, "tree", go_on=go_on)
    assert left_in(store) == []


def test_holes_are_counted_where_the_file_system_says_they_are(out: Path):
    """And a file that occupies less than its size for another reason has none."""
    with (out / "file").open("w+b") as file:
        file.write(b"data" * 1024)
        file.seek(1 << 20)
        file.write(b"data" * 1024)
        file.truncate(2 << 20)
        status = os.fstat(file.fileno())
        assert freight.holes(file.fileno(), status) == (2 << 20) - 8192
        file.seek(0)
        file.write(b"d" * (2 << 20))
        file.flush()
        assert freight.holes(file.fileno(), status) == 0


def test_a_file_that_somebody_still_writes_to_is_refused(store: Artifacts, out: Path):
    """Through a descriptor that was passed on he could change it after it was hashed."""
    (out / "tree").mkdir()
    with (out / "tree" / "log").open("wb"), pytest.raises(BadTree, match="still writing to log"):
        store.put("team", out, "tree")

    assert left_in(store) == []


def test_a_file_that_somebody_has_mapped_to_write_is_refused(store: Artifacts, out: Path):
    (out / "file").write_bytes(b"1" * 4096)
    with (out / "file").open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 4096)
    with contextlib.closing(mapped), pytest.raises(BadTree, match="still writing"):
        store.put("team", out, "file")


@pytest.mark.parametrize("output", ["gone", "gone/file", "link", "link/passwd", "", "..", "a/../b"])
def test_an_output_is_a_file_or_folder_below_the_out_folder(
    store: Artifacts, out: Path, output: str
):
    (out / "link").symlink_to("/etc")

    with pytest.raises(BadTree):
        store.put("team", out, output)
    assert Path("/etc/passwd").exists()
    assert left_in(store) == []


@pytest.mark.parametrize("namespace", ["", "..", "a/b", "A", "x" * 64])
def test_a_namespace_is_a_name(store: Artifacts, namespace: str):
    with pytest.raises(BadInput):
        store.put_value(namespace, b"1")


# ---- what changes on the disk -------------------------------------------------------------------


def _rewrite(tree: Path) -> None:
    times = (tree / "sub.txt").stat()
    (tree / "sub.txt").chmod(0o644)
    (tree / "sub.txt").write_bytes(b"y" * 300_000)
    (tree / "sub.txt").chmod(0o444)
    os.utime(tree / "sub.txt", ns=(times.st_atime_ns, times.st_mtime_ns))


def _swap(tree: Path) -> None:
    (tree / "ümlaut").unlink()
    (tree / "ümlaut").symlink_to("/etc/group")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "rewritten, times restored": (_rewrite, "sub.txt"),
    "removed": (lambda tree: (tree / "sub" / "run").unlink(), "sub/run"),
    "added": (lambda tree: (tree / "sub" / "new").touch(), "sub/new"),
    "a link swapped": (_swap, r"\\xfcmlaut"),
    "a mode": (lambda tree: (tree / "sub.txt").chmod(0o777), "sub.txt"),
    "a pipe": (lambda tree: os.mkfifo(tree / "p"), "p is a pipe"),
    "all of it": (lambda tree: shutil.rmtree(tree), "changed on disk"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_change_on_disk_is_detected_and_named(store: Artifacts, out: Path, case: str):
    fill(out / "tree")
    kept = store.put("team", out, "tree")
    path = store.path(kept)
    for folder in [path, *path.rglob("*/")]:
        if folder.is_dir():
            folder.chmod(0o755)
    damage, named = DAMAGE[case]
    damage(path)

    for look in (store.path, store.verify):
        with pytest.raises(ArtifactDamaged, match=f"artifact changed on disk: .*{named}|{named}"):
            look(kept)


def test_another_name_of_a_file_is_no_damage(store: Artifacts, out: Path, tmp_path: Path):
    """It changes a time, so the content is looked at, once."""
    (out / "file").write_bytes(b"1")
    kept = store.put("team", out, "file")
    os.link(store.path(kept), tmp_path / "again")

    assert store.path(kept).read_bytes() == b"1"
    store.verify(kept)


def test_a_lost_record_is_damage_and_heals_when_the_step_runs_again(store: Artifacts, out: Path):
    (out / "file").write_bytes(b"1")
    kept = store.put("team", out, "file")
    (store.path(kept).parent / "record").write_bytes(b"half")

    with pytest.raises(ArtifactDamaged):
        store.path(kept)
    (out / "file").write_bytes(b"1")

    assert store.put("team", out, "file") == kept
    assert store.value(kept) == b"1"


def test_what_was_not_synced_is_read_again_after_a_power_loss(store: Artifacts, out: Path):
    """Its record may be on the disk and its content not."""
    (out / "file").write_bytes(b"1" * 4096)
    kept = store.put("team", out, "file", is_synced=False)
    path = store.path(kept)
    times = path.stat()
    path.chmod(0o755)
    path.write_bytes(b"\0" * 4096)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    store._boot = "another"

    with pytest.raises(ArtifactDamaged):
        store.path(kept)


def test_what_was_settled_outlives_a_power_loss(store: Artifacts, out: Path):
    """Also by putting it again, synced this time."""
    fill(out / "tree")
    kept = store.put("team", out, "tree", is_synced=False)
    store.settle(kept)
    value = store.put_value("team", b"1", is_synced=False)
    store.put_value("team", b"1")
    store._boot = "another"
    for artifact in (kept, value):
        place = os.open(store.path(artifact).parent, os.O_RDONLY)

        assert artifacts._record(place).boot == ""
        os.close(place)


def test_a_reference_to_nothing_says_so(store: Artifacts):
    digest = hashlib.sha256(b"").hexdigest()
    gone = Artifact(f"dayfly://team/file/sha256/{digest}", digest, "file", 0, 1)

    for look in (store.path, store.verify, store.value):
        with pytest.raises(ArtifactGone, match="run its step again"):
            look(gone)


@pytest.mark.parametrize("uri", ["", "dayfly://../file/sha256/" + "0" * 64, "dayfly://a/file/x"])
def test_a_reference_is_checked_before_it_is_a_path(store: Artifacts, uri: str):
    with pytest.raises(BadInput):
        store.path(Artifact(uri, "0" * 64, "file", 0, 1))


def test_a_file_with_the_bytes_of_a_manifest_is_not_the_folder(store: Artifacts, out: Path):
    (out / "tree").mkdir()
    (out / "tree" / "a").write_bytes(b"1")
    tree = store.put("team", out, "tree")
    forged = store.put_value("team", artifacts.manifest(store.entries(tree)))

    assert forged.sha256 == tree.sha256
    assert forged.uri != tree.uri
    assert store.path(tree).is_dir()
    with pytest.raises(BadInput):
        store.path(Artifact(tree.uri, tree.sha256, "file", 1, 1))


def test_a_path_that_no_file_can_have_is_no_path_in_a_folder(store: Artifacts, out: Path):
    tree = store.put("team", fill(out).parent, "out")

    for path in ("\0", "sub\0", "sub/\0", "sub/\ud800"):
        with pytest.raises(BadInput, match="is not a path in"):
            store.read(tree, path)


def test_a_folder_is_no_value_and_that_is_not_the_disks_fault(store: Artifacts, out: Path):
    """What is the disk's fault is tried again for ever."""
    tree = store.put("team", fill(out).parent, "out")

    with pytest.raises(BadInput, match="is a folder: a value is one file"):
        store.value(tree)


def test_values_are_checked_when_they_are_read(store: Artifacts):
    kept = store.put_value("team", b'{"a": 1}')
    assert store.value(kept) == b'{"a": 1}'
    path = store.path(kept)
    path.chmod(0o755)
    path.write_bytes(b'{"a": 2}')

    with pytest.raises(ArtifactDamaged):
        store.value(kept)


# ---- streams ------------------------------------------------------------------------------------


def write(path: Path, parts: str) -> int:
    """A step's program, which opens the pipe anew for each of *parts*; how it ended.

    A process with nothing of ours open: with our end of the pipe it could wait for itself.
    """
    program = f"for part in {parts}:\n with open({str(path)!r}, 'wb', 0) as f: f.write(part)"
    reset = "import signal; signal.signal(signal.SIGPIPE, signal.SIG_DFL)\n"
    return subprocess.run([sys.executable, "-S", "-c", reset + program], timeout=20).returncode


def test_a_stream_is_hashed_while_it_is_written(store: Artifacts, out: Path):
    stream = store.stream("team", out, "log", os.geteuid())
    assert write(out / "log", "[b'a' * 400_000, b'b' * 400_000]") == 0

    kept = stream.finish()

    assert kept.sha256 == hashlib.sha256(b"a" * 400_000 + b"b" * 400_000).hexdigest()
    assert (kept.kind, kept.bytes, kept.files) == ("file", 800_000, 1)
    store.verify(kept)
    assert list(out.iterdir()) == []
    assert left_in(store) == [f"file-{kept.sha256}"]


def test_a_stream_of_many_small_pieces_is_whole(store: Artifacts, out: Path):
    """The two threads hand buffers to each other, and none is used before it is free."""
    stream = store.stream("team", out, "log", os.geteuid())
    assert write(out / "log", "[bytes([n % 256]) * (n % 700) for n in range(2000)]") == 0
    whole = b"".join(bytes([n % 256]) * (n % 700) for n in range(2000))

    kept = stream.finish()

    assert kept.sha256 == hashlib.sha256(whole).hexdigest()
    assert store.path(kept).read_bytes() == whole


def test_a_stream_that_nobody_wrote_to_is_empty(store: Artifacts, out: Path):
    assert store.stream("team", out, "log", os.geteuid()).finish().bytes == 0


def test_a_stream_has_a_limit_and_its_writer_is_told(store: Artifacts, out: Path):
    stream = store.stream("team", out, "log", os.geteuid())

    assert write(out / "log", "[b'1' * (1 << 20), b'1' * (4 << 20)]") == -signal.SIGPIPE
    with pytest.raises(BadTree, match="log is over 1048576 bytes"):
        stream.finish()
    assert left_in(store) == []


def test_a_stream_that_the_step_replaced_is_refused(store: Artifacts, out: Path):
    """A file in its place would have been hashed by nobody."""
    stream = store.stream("team", out, "log", os.geteuid())
    (out / "log").unlink()
    (out / "log").write_text("mine")

    with pytest.raises(BadTree, match="log is declared a stream"):
        stream.finish()
    assert left_in(store) == []


def test_a_stream_has_a_buffer_when_there_is_something_to_put_into_it(store: Artifacts, out: Path):
    """And not all that it may have, which is a step's to ask for."""
    made = store.stream("team", out, "log", os.geteuid())
    stream = made._stream
    assert (stream._made, stream._free.qsize()) == (0, 0)
    assert write(out / "log", "[b'a' * 1000]") == 0

    assert made.finish().bytes == 1000
    assert stream._made == 1


def test_there_are_only_so_many_streams_at_once(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    """One that has ended, however, or that never began makes room."""
    monkeypatch.setattr(artifacts, "STREAMS_MAX", 2)
    store = Artifacts(tmp_path / "few")
    store.open()
    for _ in range(3):
        with pytest.raises(PlatformError, match="few failed"):
            store.stream("team", tmp_path / "none", "log", os.geteuid())
    first, second = (store.stream("team", out, name, os.geteuid()) for name in "ab")
    with pytest.raises(TooManyStreams, match="2 streams of steps are being written already"):
        store.stream("team", out, "c", os.geteuid())
    first.finish()
    third = store.stream("team", out, "c", os.geteuid())
    second.abandon()
    fourth = store.stream("team", out, "d", os.geteuid())
    for each in (third, fourth):
        each.abandon()
    store.close()


def test_an_abandoned_stream_leaves_nothing(store: Artifacts, out: Path):
    stream = store.stream("team", out, "log", os.geteuid())
    write(out / "log", "[b'1']")
    stream.abandon()

    assert left_in(store) == []


# ---- removing, crashing, full disks -------------------------------------------------------------


def test_sweep_removes_what_nobody_keeps_and_is_old(store: Artifacts, out: Path):
    kept = store.put_value("team", b"kept")
    fill(out / "tree")
    gone = store.put("team", out, "tree")

    assert store.sweep(lambda uri: uri == kept.uri, before=0) == 0
    assert store.sweep(lambda uri: uri == kept.uri, before=2**40) == 1
    assert left_in(store) == [f"file-{kept.sha256}"]
    with pytest.raises(ArtifactGone):
        store.path(gone)


def test_what_is_put_again_is_young_again(store: Artifacts):
    kept = store.put_value("team", b"1")
    os.utime(store.path(kept).parent, (1, 1))
    store.put_value("team", b"1")

    assert store.sweep(lambda uri: False, before=1000) == 0


CALLS = ("mkdir", "rename", "fchmod", "fchown", "fsync", "open", "utime", "rmdir", "unlink")


def _die_at(number: int) -> None:
    """End this process at its so manyth call of the system."""
    left = iter(range(number))

    def dying(true: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            if next(left, None) is None:
                os._exit(9)
            return true(*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, dying(getattr(os, name)))


def test_a_crash_at_any_point_leaves_all_of_an_artifact_or_nothing(tmp_path: Path):
    """And nothing half-moved, once the store has been opened again."""
    whole = lost = 0
    for number in range(200):
        root = tmp_path / str(number)
        (root / "out" / "tree").mkdir(parents=True)
        (root / "out" / "tree" / "a").write_bytes(b"1")
        pid = os.fork()
        if pid == 0:
            store = Artifacts(root / "store")
            store.open()
            _die_at(number)
            store.put("team", root / "out", "tree", is_synced=False)
            store.sweep(lambda uri: False, before=2**40)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        store = Artifacts(root / "store")
        store.open()
        for key in left_in(store):
            digest = key.removeprefix("tree-")
            store.verify(Artifact(f"dayfly://team/tree/sha256/{digest}", digest, "tree", 1, 1))
            whole += 1
        lost += not left_in(store)
        store.close()
        if status == 0:
            break
    else:
        raise AssertionError("it never came to its end")

    assert whole > 1
    assert lost > 3


@contextlib.contextmanager
def mounted(place: Path, options: str) -> Iterator[Path]:
    """A small disk."""
    place.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mount(b"small", bytes(place), b"tmpfs", 0, options.encode()) == 0
    try:
        yield place
    finally:
        libc.umount2(bytes(place), 2)


@AS_ROOT
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path):
    with mounted(tmp_path / "disk", "size=1m") as disk:
        store = Artifacts(disk / "store")
        store.open()
        (disk / "out" / "tree").mkdir(parents=True)
        for number in range(60):
            (disk / "out" / "tree" / f"{number:0200}").touch()
        with contextlib.suppress(OSError), (disk / "rest").open("wb", buffering=0) as rest:
            while rest.write(b"1" * 4096):
                pass

        with pytest.raises(DiskFull, match="no room left in"):
            store.put("team", disk / "out", "tree")
        assert left_in(store) == []
        store.close()


@AS_ROOT
def test_a_stream_that_fills_the_disk_is_said_and_leaves_nothing(tmp_path: Path):
    with mounted(tmp_path / "disk", "size=1m") as disk:
        store = Artifacts(disk / "store")
        store.open()
        (disk / "out").mkdir()
        stream = store.stream("team", disk / "out", "log", 0)
        write(disk / "out" / "log", "[b'1' * (4 << 20)]")

        with pytest.raises(DiskFull):
            stream.finish()
        assert left_in(store) == []
        store.close()


@AS_ROOT
def test_a_disk_without_inodes_is_said_and_leaves_nothing(tmp_path: Path):
    with mounted(tmp_path / "disk", "size=1m,nr_inodes=20") as disk:
        store = Artifacts(disk / "store")
        store.open()
        (disk / "out").mkdir()
        (disk / "out" / "file").touch()
        with contextlib.suppress(OSError):
            for number in range(30):
                (disk / str(number)).touch()

        with pytest.raises(DiskFull):
            store.put("team", disk / "out", "file")
        assert left_in(store) == []
        store.close()


def test_errors_have_a_remedy_and_a_status():
    for error in (ArtifactDamaged, ArtifactGone, BadTree, DiskFull):
        assert issubclass(error, PlatformError)
        assert error.remedy()
