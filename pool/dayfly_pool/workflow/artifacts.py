"""Artifacts: what steps hand over, immutable and named by what is in it.

    ROOT/objects/NAMESPACE/file-HEX/content   what is mounted in a sandbox, read-only
    ROOT/objects/NAMESPACE/file-HEX/record    how it was found on the disk when it was sealed
    ROOT/incoming/                            what is being taken over; emptied by `open`
    ROOT/trash/                               what is being removed; emptied by `open`

An artifact's reference is `dayfly://NAMESPACE/file/sha256/HEX`, or `tree` for a folder. The HEX of
a file (and of a value) is the sha256 of its bytes, as `sha256sum` prints it. A folder's is the
sha256 of its manifest: for everything below it, sorted by the bytes of the path, one of

    d PATH NUL                  a folder
    f SIZE SHA256 PATH NUL      a file
    x SIZE SHA256 PATH NUL      a file that its owner (or group, or anybody) may execute
    l PATH NUL TARGET NUL       a symbolic link

which anybody can make again, in the folder, with bash:

    find . -mindepth 1 -printf '%P\\0' | LC_ALL=C sort -z | while IFS= read -r -d '' p; do
      if [ -L "$p" ]; then printf 'l %s\\0%s\\0' "$p" "$(readlink "$p")"
      elif [ -d "$p" ]; then printf 'd %s\\0' "$p"
      else [ -x "$p" ] && k=x || k=f
        printf '%s %s %s %s\\0' $k $(stat -c %s "$p") $(sha256sum < "$p" | cut -c-64) "$p"
      fi; done | sha256sum

Times, owners, other mode bits and extended attributes are not part of it. A file could hold a
manifest's bytes and so have a folder's HEX: that is why the kind is in the reference.

What a step left is renamed, not copied, so ROOT must be on the file system of the steps' folders.
Every method waits for the disk, and may be called from any thread.
"""

import contextlib
import hashlib
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from dayfly_pool.errors import (
    ArtifactDamaged,
    ArtifactGone,
    BadInput,
    BadTree,
    BodyTooLarge,
    TooManyStreams,
)
from dayfly_pool.workflow import places, streams, trees
from dayfly_pool.workflow.places import Places
from dayfly_pool.workflow.trees import Entry, Limits

Kind = Literal["file", "tree", "value"]
SCHEME: Final = "dayfly://"
CONTENT: Final = "content"
RECORD: Final = "record"
VALUE_BYTES_MAX: Final = 64 << 20
"""Values are held in memory; what is larger is a file."""

STREAMS_MAX: Final = 64
"""At once: each has two threads, and memory."""

RECORD_BYTES_MAX: Final = 1 << 30
_NAMESPACE: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_URI: Final = re.compile(rf"{SCHEME}({_NAMESPACE.pattern})/(file|tree)/sha256/([0-9a-f]{{64}})")


class Artifact(Struct, frozen=True):
    """A reference. *bytes* and *files* are of all files together; a value is one file."""

    uri: str
    sha256: str
    kind: Kind
    bytes: int
    files: int


class Record(Struct, frozen=True):
    """How an object was found on the disk. *boot* says which run of this machine's kernel has it in
    memory still; it is empty when the disk has it."""

    boot: str
    entries: list[Entry]


def manifest(entries: list[Entry]) -> bytes:
    """The canonical text of a folder, of its sorted entries; the folder itself is left out."""
    parts = []
    for entry in entries:
        match entry.kind:
            case "d" if entry.path:
                parts.append(f"d {entry.path}\0")
            case "l":
                parts.append(f"l {entry.path}\0{entry.target}\0")
            case "f" | "x":
                parts.append(f"{entry.kind} {entry.size} {entry.sha256} {entry.path}\0")
    return "".join(parts).encode()


def artifact_of(namespace: str, entries: list[Entry]) -> Artifact:
    """The reference of a sealed file or folder."""
    is_tree = entries[0].kind == "d"
    digest = hashlib.sha256(manifest(entries)).hexdigest() if is_tree else entries[0].sha256
    kind: Kind = "tree" if is_tree else "file"
    files = [entry for entry in entries if entry.kind in "fx"]
    size = sum(entry.size for entry in files)
    return Artifact(f"{SCHEME}{namespace}/{kind}/sha256/{digest}", digest, kind, size, len(files))


class Artifacts:
    """The store in *folder*. One process uses it at a time."""

    def __init__(self, folder: Path, limits: Limits | None = None) -> None:
        self._places = Places(folder, "objects")
        self._limits = limits or Limits()
        self._lock = threading.Lock()
        """Held while the name of an object appears or goes."""

        self._streams = threading.BoundedSemaphore(STREAMS_MAX)

        self._boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    def open(self) -> None:
        """Have the folders, and remove what a crash left half done."""
        self._places.open()

    def close(self) -> None:
        """Let go of the folders."""
        self._places.close()

    # --- Putting ---

    def put(
        self,
        namespace: str,
        folder: Path,
        output: str,
        *,
        is_synced: bool = True,
        early: trees.Early | None = None,
        go_on: trees.GoOn = trees.always,
    ) -> Artifact:
        """Take over what a dead step left at the path *output* below *folder*.

        It is moved, sealed, hashed, and stored unless it is stored already. With *is_synced* it is
        on the disk when this returns; without, that can wait for `settle`, and should a power loss
        come first, `path` finds out. All of an out folder is *output* `out` of the folder above.

        :raises BadTree: naming what in it cannot be an artifact; all of it is removed then.
        :raises DiskFull: nothing is left of it. :raises TakingEnded: nor is it then, by *go_on*.
        """
        _check(namespace)
        with self._places.disk(), self._places.scratch() as (name, scratch):
            with trees.opened_folder(None, folder) as left:
                trees.take(left, output, scratch, CONTENT)
            entries = trees.seal(scratch, CONTENT, self._limits, early=early, go_on=go_on)
            return self._publish(namespace, name, scratch, entries, is_synced=is_synced)

    def put_value(self, namespace: str, value: bytes, *, is_synced: bool = True) -> Artifact:
        """Store bytes, of whatever meaning."""
        if len(value) > VALUE_BYTES_MAX:
            raise BadInput(f"a value is over {VALUE_BYTES_MAX >> 20} MiB: leave it as a file")
        _check(namespace)
        with self._places.disk(), self._places.scratch() as (name, scratch):
            places.write(scratch, CONTENT, value)
            entries = trees.seal(scratch, CONTENT, self._limits)
            found = self._publish(namespace, name, scratch, entries, is_synced=is_synced)
            return msgspec.structs.replace(found, kind="value")

    def adopt(
        self, namespace: str, make: Callable[[int, str], None], *, is_synced: bool = True
    ) -> Artifact:
        """Store the tree that *make* makes, of our own files, with this name in this open folder.

        Its files keep their modes and their other names: see `Workspaces.snapshot`.
        """
        _check(namespace)
        with self._places.disk(), self._places.scratch() as (name, scratch):
            make(scratch, CONTENT)
            entries = trees.describe(scratch, CONTENT, self._limits)
            return self._publish(namespace, name, scratch, entries, is_synced=is_synced)

    def stream(self, namespace: str, folder: Path, output: str, owner: int) -> "Output":
        """Make a pipe *output* in *folder*, and store what is written to it while it is written.

        :raises TooManyStreams: when there are STREAMS_MAX.
        """
        if not output or "/" in output or output in (".", ".."):
            raise BadInput(f"{trees.shown(output)} is not a name for a stream: give a file's name")
        _check(namespace)
        if not self._streams.acquire(blocking=False):
            raise TooManyStreams(f"{STREAMS_MAX} streams of steps are being written already")
        try:
            return self._begun(namespace, folder, output, owner)
        except BaseException:
            self._streams.release()
            raise

    def _begun(self, namespace: str, folder: Path, output: str, owner: int) -> "Output":
        with self._places.disk():
            name = self._places.begin()
            try:
                with trees.opened_folder(self._places.incoming, name) as opened:
                    scratch = os.dup(opened)
                target = os.open(CONTENT, places.NEW, 0o600, dir_fd=scratch)
                most = self._limits.bytes
                stream = streams.Stream(folder, output, owner, target, most)
            except BaseException:
                self._places.give_up(name)
                raise
            return Output(self, namespace, name, scratch, stream)

    def _publish(
        self, namespace: str, name: str, scratch: int, entries: list[Entry], *, is_synced: bool
    ) -> Artifact:
        """Give what is in *scratch*, whose name is *name*, its final name."""
        artifact = artifact_of(namespace, entries)
        if self._is_there(artifact, is_synced=is_synced):
            return artifact
        boot = "" if is_synced else self._boot
        record = msgspec.msgpack.encode(Record(boot, entries))
        places.write(scratch, RECORD, hashlib.sha256(record).digest() + record)
        if is_synced:
            trees.sync(self._places.incoming, name, len(entries))
        with self._lock, self._namespace(namespace) as objects:
            if self._is_there(artifact, is_synced=is_synced):  # somebody was faster
                return artifact
            key = _key(artifact)
            self._places.discard(objects, key)
            os.fchmod(scratch, 0o755)
            os.rename(name, key, src_dir_fd=self._places.incoming, dst_dir_fd=objects)
            if is_synced:
                os.fsync(objects)
        return artifact

    def _is_there(self, artifact: Artifact, *, is_synced: bool) -> bool:
        """Whether it is stored and looks whole; a moment's peace from `sweep` if it is."""
        try:
            with self._object(artifact) as (place, _):
                record = _record(place)
                if record.boot not in ("", self._boot) or _has_changed(place, record.entries):
                    return False
                os.utime(place)
                if is_synced:
                    self._settle(place, record)
        except (ArtifactGone, ArtifactDamaged):
            return False
        return True

    def settle(self, artifact: Artifact) -> None:
        """After this returns it is on the disk, however it was put. Call it before a reference is
        written to a journal; the next step need not wait for it.

        :raises ArtifactGone: if it is not stored.
        """
        with self._places.disk(), self._object(artifact) as (place, _):
            self._settle(place, _record(place))

    def _settle(self, place: int, record: Record) -> None:
        if record.boot == self._boot:  # of an earlier one, `path` has to read it first
            trees.sync(place, CONTENT, len(record.entries))
            self._note(place, record.entries)
            os.fsync(place)
            with trees.opened_folder(place, "..") as objects:
                os.fsync(objects)

    # --- Using ---

    def path(self, artifact: Artifact) -> Path:
        """What to mount read-only. Times, sizes and inodes are looked at, contents where these
        differ; and all contents when it was stored before the machine's last start but not synced.

        :raises ArtifactDamaged: naming the path that changed. :raises ArtifactGone: run it again.
        """
        with self._places.disk(), self._object(artifact) as (place, path):
            os.utime(place)  # a moment's peace from `sweep`
            record = _record(place)
            if record.boot not in ("", self._boot) or _has_changed(place, record.entries):
                self._verify(place, artifact)
            return path / CONTENT

    def verify(self, artifact: Artifact) -> None:
        """Read all of it again, whatever the times say.

        :raises ArtifactDamaged: naming a path that changed. :raises ArtifactGone: run it again.
        """
        with self._places.disk(), self._object(artifact) as (place, _):
            self._verify(place, artifact)

    def value(self, artifact: Artifact, most: int = VALUE_BYTES_MAX) -> bytes:
        """The bytes of a value or a file, checked against its digest.

        :raises BodyTooLarge: if they are over *most*, before they are read.
        """
        if artifact.kind == "tree":
            raise BadInput(f"{trees.shown(artifact.uri)} is a folder: a value is one file")
        with self._places.disk(), self._object(artifact) as (place, _), self._reading():
            file, status = trees.open_file(place, CONTENT)
            with open(file, "rb") as opened:
                if status.st_size > most:
                    raise BodyTooLarge(f"{artifact.uri} is over {most} bytes: read it as a file")
                found = opened.read(most + 1)
        if hashlib.sha256(found).hexdigest() != artifact.sha256:
            raise _damaged("")
        return found

    def entries(self, artifact: Artifact) -> list[Entry]:
        """What is in it, sorted by path."""
        with self._places.disk(), self._object(artifact) as (place, _):
            return _record(place).entries

    def read(self, artifact: Artifact, path: str) -> int:
        """An open descriptor of the file at *path* in a folder; follows no link, ever."""
        *parents, last = [CONTENT, *path.split("/")] if path else [CONTENT]
        if {"", ".", ".."} & {*parents, last} or "\0" in path or not trees.is_text(path):
            raise BadInput(f"{trees.shown(path)} is not a path in {artifact.uri}")
        with (
            self._places.disk(),
            self._object(artifact) as (place, _),
            contextlib.ExitStack() as stack,
        ):
            try:
                for part in parents:
                    place = stack.enter_context(trees.opened_folder(place, part))
                return trees.open_file(place, last)[0]
            except OSError as error:
                raise BadInput(f"there is no file {trees.shown(path)} in {artifact.uri}") from error

    def _verify(self, place: int, artifact: Artifact) -> None:
        """Read everything; and note how it lies on the disk now.

        A new name of a file, such as a workspace's, changes its time, and nothing else.
        """
        recorded = _record(place).entries
        with self._reading():
            found = trees.describe(place, CONTENT, self._limits)
        if changed := _difference(recorded, found):
            raise _damaged(changed[0])
        namespace = artifact.uri.removeprefix(SCHEME).partition("/")[0]
        if artifact_of(namespace, found).sha256 != artifact.sha256:
            raise ArtifactDamaged(f"artifact changed on disk: the record of {artifact.uri}")
        self._note(place, found)

    def _note(self, place: int, entries: list[Entry]) -> None:
        record = msgspec.msgpack.encode(Record("", entries))
        unfinished = f"{RECORD}.{secrets.token_hex(4)}"
        content = hashlib.sha256(record).digest() + record
        places.write(place, unfinished, content, is_synced=True)
        os.rename(unfinished, RECORD, src_dir_fd=place, dst_dir_fd=place)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Whatever cannot be read, or is not what can be an artifact, has changed."""
        try:
            yield
        except BadTree as error:
            raise ArtifactDamaged(f"artifact changed on disk: {error}") from error
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _damaged(os.fsdecode(error.filename or "")) from error

    # --- Removing ---

    def sweep(self, keep: Callable[[str], bool], before: float) -> int:
        """Remove each object that came, or was used, earlier than *before* (seconds since the
        epoch) and whose URI *keep* refuses; returns how many. None of them may be in use."""
        removed = 0
        with self._places.disk():
            for namespace in os.listdir(self._places.shelf):
                with self._namespace(namespace) as objects:
                    for key in os.listdir(objects):
                        kind, _, digest = key.partition("-")
                        uri = f"{SCHEME}{namespace}/{kind}/sha256/{digest}"
                        with self._lock:
                            is_old = os.lstat(key, dir_fd=objects).st_mtime < before
                            if not is_old or (_URI.fullmatch(uri) and keep(uri)):
                                continue
                            self._places.discard(objects, key)
                        removed += 1
            self._places.empty_trash()
        return removed

    # --- Places ---

    @contextlib.contextmanager
    def _namespace(self, namespace: str) -> Iterator[int]:
        objects = self._places.shelf
        with contextlib.suppress(FileExistsError):
            os.mkdir(namespace, 0o711, dir_fd=objects)
            os.fsync(objects)
        with trees.opened_folder(objects, namespace) as folder:
            if os.fstat(folder).st_mode & 0o777 != 0o711:
                os.fchmod(folder, 0o711)
            yield folder

    @contextlib.contextmanager
    def _object(self, artifact: Artifact) -> Iterator[tuple[int, Path]]:
        """The object's folder, open, and its path; raises `ArtifactGone`, `BadInput`."""
        name = place_of(artifact).removesuffix(f"/{CONTENT}")
        try:
            place = os.open(
                name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._places.shelf
            )
        except FileNotFoundError as error:
            raise ArtifactGone(f"{artifact.uri} is not stored: run its step again") from error
        try:
            yield place, self._places.root / "objects" / name
        finally:
            os.close(place)


class Output:
    """A stream of a step: it becomes an artifact when the step is dead."""

    def __init__(
        self, store: Artifacts, namespace: str, name: str, scratch: int, stream: streams.Stream
    ) -> None:
        self._store = store
        self._namespace = namespace
        self._name = name
        self._scratch = scratch
        self._stream = stream

    def finish(self, *, is_synced: bool = True) -> Artifact:
        """What was written to it, when nobody can write any more. Call it once.

        :raises BadTree: if it was too much, or the step replaced the pipe. :raises DiskFull:
        """
        store = self._store
        with store._places.disk():
            try:
                size, digest = self._stream.finish()
                os.chmod(CONTENT, 0o555, dir_fd=self._scratch)
                status = os.lstat(CONTENT, dir_fd=self._scratch)
                entry = Entry(
                    "", "x", size, digest, "", status.st_ino, status.st_mtime_ns, status.st_ctime_ns
                )
                return store._publish(
                    self._namespace, self._name, self._scratch, [entry], is_synced=is_synced
                )
            finally:
                self._clear()

    def abandon(self) -> None:
        """Forget it; for a step that failed."""
        with self._store._places.disk(), contextlib.suppress(BadTree, OSError):
            try:
                self._stream.finish()
            finally:
                self._clear()

    def _clear(self) -> None:
        self._store._streams.release()
        os.close(self._scratch)
        self._store._places.give_up(self._name)


def place_of(artifact: Artifact) -> str:
    """Where the content is, below ROOT/objects, or wherever a sandbox has that folder.

    :raises BadInput: for what is not a reference.
    """
    found = _URI.fullmatch(artifact.uri)
    is_tree = artifact.kind == "tree"
    if found is None or found[4] != artifact.sha256 or (found[3] == "tree") != is_tree:
        raise BadInput(f"{trees.shown(artifact.uri)} is not the reference of an artifact")
    return f"{found[1]}/{_key(artifact)}/{CONTENT}"


def uri_of(place: str) -> str:
    """The reference of what is at a `place_of` one."""
    namespace, key, _ = place.split("/")
    kind, _, digest = key.partition("-")
    return f"{SCHEME}{namespace}/{kind}/sha256/{digest}"


def _check(namespace: str) -> None:
    if not _NAMESPACE.fullmatch(namespace):
        raise BadInput(f"{trees.shown(namespace)} is not a namespace: use a-z, 0-9 and -")


def _key(artifact: Artifact) -> str:
    return f"{'tree' if artifact.kind == 'tree' else 'file'}-{artifact.sha256}"


def _record(place: int) -> Record:
    try:
        with open(trees.open_file(place, RECORD)[0], "rb") as file:
            text = file.read(RECORD_BYTES_MAX)
        if hashlib.sha256(text[32:]).digest() != text[:32]:
            raise ArtifactDamaged("artifact changed on disk: its record is damaged")
        return msgspec.msgpack.decode(text[32:], type=Record)
    except (FileNotFoundError, msgspec.MsgspecError) as error:
        raise ArtifactDamaged("artifact changed on disk: its record is lost") from error


def _has_changed(place: int, entries: list[Entry]) -> bool:
    """Whether something does not lie on the disk as recorded, judged by what lstat(2) says."""
    for entry in entries:
        try:
            path = f"{CONTENT}/{entry.path}" if entry.path else CONTENT
            found = os.lstat(path, dir_fd=place)
        except (FileNotFoundError, NotADirectoryError):
            return True
        times = found.st_ino, found.st_mtime_ns, found.st_ctime_ns
        size = entry.size if entry.kind in "dl" else found.st_size
        if times != (entry.inode, entry.mtime_ns, entry.ctime_ns) or size != entry.size:
            return True
    return False


def _difference(recorded: list[Entry], found: list[Entry]) -> list[str]:
    """Paths that are not what they were, by content."""

    def contents(entries: list[Entry]) -> dict[str, Any]:
        return {e.path: (e.kind, e.size, e.sha256, e.target) for e in entries}

    before, now = contents(recorded), contents(found)
    return sorted(path or "." for path in before.keys() | now.keys()
                  if before.get(path) != now.get(path))  # fmt: skip


def _damaged(path: str) -> ArtifactDamaged:
    return ArtifactDamaged(f"artifact changed on disk: {trees.shown(path)}")
