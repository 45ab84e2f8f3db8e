"""Trees on their way: what arrives is what was sent, and what strangers send leads nowhere."""

import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dayfly import freight
from dayfly.freight import CLOSED, FILE, FOLDER, HEADER, LINK, NOTHING, PIPE, REMOVED, REPLACED

NAMES = st.binary(min_size=1, max_size=8).filter(
    lambda name: name not in (b".", b"..") and not {0, 47} & set(name)
)
MODES = st.integers(0, 0o777)
FILES = st.tuples(st.just("file"), MODES, st.binary(max_size=3000))
LINKS = st.tuples(
    st.just("link"), st.just(0), st.binary(min_size=1, max_size=99).filter(lambda t: 0 not in t)
)
TREES = st.recursive(
    st.one_of(FILES, LINKS),
    lambda inside: st.tuples(st.just("folder"), MODES, st.dictionaries(NAMES, inside, max_size=5)),
    max_leaves=12,
)
FOLDERS = st.tuples(st.just("folder"), MODES, st.dictionaries(NAMES, TREES, max_size=5))


def make(where: bytes, tree: Any) -> None:
    kind, mode, content = tree
    if kind == "folder":
        os.mkdir(where, 0o700)
        for name, inside in content.items():
            make(where + b"/" + name, inside)
    elif kind == "file":
        Path(os.fsdecode(where)).write_bytes(content)
    else:
        os.symlink(content, where)
        return
    os.chmod(where, mode)


def told(where: bytes) -> Any:
    """All that travels of what is there."""
    status = os.lstat(where)
    mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISLNK(status.st_mode):
        return os.readlink(where)
    if stat.S_ISREG(status.st_mode):
        opened = os.open(where, os.O_RDONLY)
        with os.fdopen(opened, "rb") as file:
            return mode, status.st_mtime_ns, file.read()
    if stat.S_ISDIR(status.st_mode):
        return mode, {name: told(where + b"/" + name) for name in sorted(os.listdir(where))}
    return stat.S_IFMT(status.st_mode)


def source(data: bytes, chunk: int = 1 << 16) -> freight.Source:
    stream = io.BytesIO(data)
    return freight.Source(lambda: stream.read(chunk))


def unpack(data: bytes, folder: Path, *, layers: bool = False, chunk: int = 1 << 16, **more: Any):
    folder.mkdir(exist_ok=True)
    opened = os.open(folder, os.O_RDONLY)
    try:
        freight.Unpacking(source(data, chunk), **more).tree(opened, "tree", layers=layers)
    finally:
        os.close(opened)
    return folder / "tree"


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="modes that shut their owner out")


@needs_root
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(tree=TREES.filter(lambda t: t[0] != "link"), chunk=st.integers(1, 5000))
def test_what_arrives_is_what_was_sent(tmp_path_factory: Any, tree: Any, chunk: int):
    place = tmp_path_factory.mktemp("t")
    sent = os.fsencode(place / "sent")
    make(sent, tree)

    pieces = list(freight.pieces(freight.tree([os.fsdecode(sent)])))
    made = unpack(b"".join(pieces), place / "made", chunk=chunk)

    assert told(os.fsencode(made)) == told(sent)


@needs_root
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(before=FOLDERS, after=FOLDERS, data=st.data())
def test_what_has_changed_is_all_that_is_sent_back(
    tmp_path_factory: Any, before: Any, after: Any, data: Any
):
    """Seen through the difference, the folder is what the step has made of it."""
    place = tmp_path_factory.mktemp("t")
    lower, noted = place / "lower", bytearray()
    make(os.fsencode(lower), before)
    work = unpack(
        b"".join(freight.tree([str(lower)])),
        place / "work",
        note=lambda path, status: noted.extend(freight.Given.note(path, status)),
    )
    names = [*before[2]]
    for name in data.draw(st.lists(st.sampled_from(names), unique=True) if names else st.just([])):
        remove(os.fsencode(work) + b"/" + name)
    for name, inside in after[2].items():
        if not os.path.lexists(os.fsencode(work) + b"/" + name):
            make(os.fsencode(work) + b"/" + name, inside)
    if data.draw(st.booleans()) and len(present := sorted(os.listdir(work))) > 1:
        os.rename(work / present[0], place / "aside")
        os.rename(work / present[1], work / present[0])
        os.rename(place / "aside", work / present[1])

    changed = b"".join(freight.changes(str(work), freight.Given(bytes(noted))))
    (place / "back").mkdir()
    (place / "back" / "tree").mkdir()
    upper = unpack(changed, place / "back", layers=True)
    whole = b"".join(freight.tree([str(upper), str(lower)]))
    seen = unpack(whole, place / "seen")

    assert told(os.fsencode(seen))[1] == told(os.fsencode(work))[1]


def remove(where: bytes) -> None:
    if os.path.isdir(where) and not os.path.islink(where):
        for name in os.listdir(where):
            remove(where + b"/" + name)
        os.rmdir(where)
    else:
        os.unlink(where)


def test_nothing_is_sent_of_a_folder_that_nobody_has_changed(tmp_path: Path):
    (tmp_path / "lower" / "a").mkdir(parents=True)
    (tmp_path / "lower" / "a" / "file").write_text("x" * 100_000)
    noted = bytearray()
    work = unpack(
        b"".join(freight.tree([str(tmp_path / "lower")])),
        tmp_path / "work",
        note=lambda path, status: noted.extend(freight.Given.note(path, status)),
    )

    assert list(freight.changes(str(work), freight.Given(bytes(noted)))) == list(freight.nothing())

    (work / "a" / "new").write_text("y")
    changed = b"".join(freight.changes(str(work), freight.Given(bytes(noted))))
    assert b"new" in changed
    assert b"file" not in changed


def test_layers_are_seen_as_the_kernel_shows_them(tmp_path: Path):
    """The uppermost counts; what is removed or replaced hides what is below."""
    low, high = tmp_path / "low", tmp_path / "high"
    for path in ("kept", "gone", "folder/old", "replaced/old", "file/inside"):
        (low / path).parent.mkdir(parents=True, exist_ok=True)
        (low / path).write_text("low")
    for path in ("folder/new", "replaced/new", "file"):
        (high / path).parent.mkdir(parents=True, exist_ok=True)
        (high / path).write_text("high")
    os.mknod(high / "gone", stat.S_IFCHR)
    os.setxattr(high / "replaced", freight.OPAQUE, b"y")

    made = unpack(b"".join(freight.tree([str(high), str(low)])), tmp_path / "made")

    found = {str(path.relative_to(made)): path.read_text() for path in files(made)}
    assert found == {
        "kept": "low",
        "folder/old": "low",
        "folder/new": "high",
        "replaced/new": "high",
        "file": "high",
    }


def files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def entry(kind: int, name: bytes = b"x", mode: int = 0o755, mtime: int = 0, size: int = 0) -> bytes:
    return HEADER.pack(kind, len(name), mode, mtime, size) + name


TOP, END = entry(FOLDER, b""), entry(CLOSED, b"")
HOSTILE: dict[str, bytes] = {
    "it breaks off": TOP,
    "in a header": TOP + b"\x04\0",
    "in a file": TOP + entry(FILE, size=10) + b"123",
    "no kind": TOP + entry(77) + END,
    "kind 0": TOP + entry(0) + END,
    "nothing, inside": TOP + entry(NOTHING) + END,
    "a name that is a path": TOP + entry(FILE, b"a/b") + END,
    "a name from the root": TOP + entry(FILE, b"/etc/x") + END,
    "the folder above": TOP + entry(FOLDER, b"..") + END + END,
    "the folder itself": TOP + entry(FILE, b".") + END,
    "no name": TOP + entry(FILE, b"") + END,
    "a name with NUL": TOP + entry(FILE, b"a\0b") + END,
    "a name too long": TOP + entry(FILE, b"n" * 256) + END,
    "twice a file": TOP + entry(FOLDER) + END + entry(FILE, b"x") + END,
    "twice a folder": TOP + entry(FOLDER) + END + entry(FOLDER) + END + END,
    "through a link": TOP + entry(LINK, size=4) + b"/tmp" + entry(FOLDER) + END + END,
    "into a link": TOP + entry(LINK, size=9) + b"/tmp/evil" + entry(FILE, size=1) + b"!" + END,
    "a link to nowhere": TOP + entry(LINK) + END,
    "a link too long": TOP + entry(LINK, size=1 << 40) + END,
    "a link with NUL": TOP + entry(LINK, size=2) + b"a\0" + END,
    "a pipe with content": TOP + entry(PIPE, size=1) + b"x" + END,
    "into a pipe of its own": TOP + entry(PIPE) + entry(FILE, size=1) + b"x" + END,
    "removed, in no layer": TOP + entry(REMOVED) + END,
    "replaced, in no layer": TOP + entry(REPLACED) + END + END,
    "all of it replaced": entry(REPLACED, b"") + END,
    "all of it removed": entry(REMOVED, b""),
    "too deep": TOP + entry(FOLDER) * 200,
    "too large": TOP + entry(FILE, size=1 << 60),
    "over a million": TOP + b"".join(entry(FOLDER, b"%d" % n) + END for n in range(60)),
    "unfit": TOP + HEADER.pack(freight.UNFIT, 0, 0, 0, 3) + b"\x1b[m",
    "unfit, at length": TOP + HEADER.pack(freight.UNFIT, 0, 0, 0, 1 << 40),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_strangers_write_nothing_elsewhere(name: str, tmp_path: Path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "tree").mkdir()
    before = set(os.listdir("/tmp"))

    with pytest.raises((freight.Malformed, freight.Unfit, OSError)) as raised:
        unpack(HOSTILE[name], tmp_path / "made", entries_max=50, chunk=7)

    assert str(raised.value).isprintable()
    assert os.listdir(tmp_path) == ["made"]
    assert os.listdir(tmp_path / "made") == ["tree"]
    assert "evil" not in set(os.listdir("/tmp")) - before


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=200))
def test_any_bytes_are_refused_or_taken(tmp_path_factory: Any, data: bytes):
    place = tmp_path_factory.mktemp("t")
    try:
        unpack(TOP + data, place / "made", bytes_max=1000)
    except (freight.Malformed, freight.Unfit, OSError):
        pass
    assert os.listdir(place) == ["made"]


def test_rights_of_others_do_not_travel(tmp_path: Path):
    made = unpack(TOP + entry(FILE, b"x", mode=0o6755) + END, tmp_path / "made")

    assert stat.S_IMODE((made / "x").stat().st_mode) == 0o755


def test_a_file_goes_into_a_pipe_that_somebody_reads(tmp_path: Path):
    (tmp_path / "tree").mkdir()
    os.mkfifo(tmp_path / "tree" / "x")
    reader = os.open(tmp_path / "tree" / "x", os.O_RDONLY | os.O_NONBLOCK)

    unpack(TOP + entry(FILE, b"x", size=5) + b"12345" + END, tmp_path)

    assert os.read(reader, 100) == b"12345"
    os.close(reader)


def test_holes_stay_where_they_are(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / "x", "wb") as file:
        file.truncate(freight.HOLES_MAX + 1)

    with pytest.raises(freight.Unfit, match="x is mostly holes"):
        list(freight.tree([str(tmp_path / "out")]))


@needs_root
def test_devices_do_not_travel(tmp_path: Path):
    os.mknod(tmp_path / "x", stat.S_IFCHR, os.makedev(1, 3))

    with pytest.raises(freight.Unfit, match="x is a device"):
        list(freight.tree([str(tmp_path)]))
