"""Environments: an interpreter's libraries, resolved, hashed and installed by uv, by digest.

Nothing that is installed is run here: only wheels are taken, and their code is only compiled, in
bounded processes. uv never sees a requirements text as it was sent: it sees what was understood of
it, written anew, so that no option, path or URL can hide in it.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import resource
import secrets
import shutil
import signal
import stat
import sys
import zipfile
from asyncio.subprocess import PIPE
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import uv
from msgspec import Struct
from msgspec.structs import replace

from dayfly_pool.errors import (
    BadInput,
    DataFolderUnusable,
    EnvironmentBuildFailed,
    EnvironmentNotFound,
)
from dayfly_pool.models import Parcel

log = logging.getLogger(__name__)
T = TypeVar("T")
Progress = Callable[[str], None]

REQUIREMENTS_BYTES_MAX: Final = 256 << 10
REQUIREMENTS_MAX: Final = 1_000
"""Lines, once those that end in a backslash are joined: a lock lists dozens of hashes for one."""
BUILD_S_MAX: Final = 600.0
BUILDS_MAX: Final = 2
"""Builds at the same moment, in the whole server."""
COMPILE_S_MAX: Final = 240.0
COMPILE_MEMORY_BYTES_MAX: Final = 1 << 30
KILL_S_MAX: Final = 10.0
ANSWER_BYTES_MAX: Final = 8 << 20
LINE_CHARACTERS_MAX: Final = 500
LINES_KEPT: Final = 30
BLOCK_BYTES: Final = 4096
"""What a file takes beyond its own size, at most."""

_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_PASSED: Final = re.compile(
    r"PATH|HOME|TMPDIR|NETRC|XDG_(CACHE|CONFIG|DATA)_HOME|SSL_CERT_(FILE|DIR)|SSL_CLIENT_CERT"
    r"|(HTTPS?|ALL|NO)_PROXY|(https?|all|no)_proxy|UV_.*"
)
_CREDENTIALS: Final = re.compile(r"(?<=://)[^/@\s]+@")
_IDENTITY: Final = (
    "import platform, sys; print(sys.implementation.cache_tag, platform.python_version(),"
    " platform.machine(), *platform.libc_ver())"
)

# --- Requirements --------------------------------------------------------------------------------

_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_VERSION: Final = re.compile(r" ?(===|~=|==|!=|<=|>=|<|>) ?[A-Za-z0-9.*+!_-]+ ?")
_MARKER: Final = re.compile(r"(?!.* -)[A-Za-z0-9_. <>=!~()'\",+*-]+")
_HASH: Final = re.compile(r"sha256:[0-9a-f]{64}|sha384:[0-9a-f]{96}|sha512:[0-9a-f]{128}")
_LINE: Final = re.compile(r"([A-Za-z0-9._-]+) ?(?:\[([^]]*)\])? ?([^;]*)(?:;(.*))?")


class Requirement(Struct, frozen=True):
    """One requirement, understood; its text is what uv gets to see."""

    name: str
    extras: tuple[str, ...]
    versions: tuple[str, ...]
    marker: str
    hashes: tuple[str, ...]

    def __str__(self) -> str:
        extras = f"[{','.join(self.extras)}]" if self.extras else ""
        marker = f" ; {self.marker}" if self.marker else ""
        hashes = "".join(f" --hash={digest}" for digest in self.hashes)
        return f"{self.name}{extras}{','.join(self.versions)}{marker}{hashes}"


def parse(text: str) -> list[Requirement]:
    """Understand a requirements text: names, extras, versions, markers, hashes; nothing else.

    :raises BadInput: naming the line, and what to do about it.
    """
    if len(text.encode("utf-8", "replace")) > REQUIREMENTS_BYTES_MAX:
        raise BadInput(f"the requirements are over {REQUIREMENTS_BYTES_MAX >> 10} KiB: list fewer")
    lines = _lines(text)
    if len(lines) > REQUIREMENTS_MAX:
        raise BadInput(f"there are {len(lines)} requirements, limit {REQUIREMENTS_MAX}: list fewer")
    return [_requirement(line) for line in lines]


def _lines(text: str) -> list[str]:
    """The lines without comments and needless spaces, joined where they end in a backslash."""
    joined = re.sub(r"\\\r?\n", " ", text)
    lines = (re.sub(r"(^|\s)#.*", "", line) for line in joined.splitlines())
    return [" ".join(line.split()) for line in lines if line.strip()]


def _requirement(line: str) -> Requirement:
    stated, *hashes = re.split(r" --hash[= ]", line)
    found = _LINE.fullmatch(stated)
    if found is None:
        raise BadInput(f"requirement {_shown(line)} {_wrong_with(line)}")
    name, listed, limits, marker = (part.strip() if part else part for part in found.groups())
    extras = [] if listed is None else [extra.strip() for extra in listed.split(",")]
    if limits.startswith("(") and limits.endswith(")"):
        limits = limits[1:-1]
    versions = limits.split(",") if limits else []
    if not (
        all(map(_NAME.fullmatch, [name, *extras]))
        and all(map(_VERSION.fullmatch, versions))
        and (marker is None or _MARKER.fullmatch(marker))
        and all(map(_HASH.fullmatch, hashes))
    ):
        raise BadInput(f"requirement {_shown(line)} {_wrong_with(line)}")
    return Requirement(
        _normal(name),
        tuple(sorted(map(_normal, extras))),
        tuple(version.replace(" ", "") for version in versions),
        marker or "",
        tuple(sorted(set(hashes))),
    )


def _normal(name: str) -> str:
    """PEP 503. No dots: uv takes a name like `six.tar.gz` for a file and reads it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _wrong_with(line: str) -> str:
    """The likeliest reason, for the message only: what is taken is decided before."""
    if line.startswith("-"):
        return "is an option: list only names, versions, markers and hashes"
    if "@" in line or ":/" in line or re.match(r"(file|git|hg|svn|bzr)[:+]", line):
        return "names a URL: list a package of the index, or put the code into the function"
    if "/" in line or "\\" in line or line.startswith((".", "~")):
        return "names a path: list a package of the index, or put the code into the function"
    return "is not understood: write it like `name[extra]>=1.2,<2 ; python_version > '3.8'`"


def _shown(line: str) -> str:
    return ascii(line) if len(line) <= 80 else ascii(line[:77] + "...")


def _with_pinned_hashes(resolved: list[Requirement], wanted: list[Requirement]) -> str:
    """The resolved text, where hashes that the user stated stand in the place of the index's.

    `uv pip compile` reads them and forgets them; installing then refuses any other file.
    """
    stated: dict[str, set[str]] = {}
    for requirement in wanted:
        stated.setdefault(requirement.name, set()).update(requirement.hashes)
    lines = []
    for found in resolved:
        hashes = tuple(sorted(stated.get(found.name) or found.hashes))
        lines.append(str(replace(found, hashes=hashes)))
    return "".join(f"{line}\n" for line in sorted(lines))


# --- The store -----------------------------------------------------------------------------------


class EnvironmentStore:
    """Environments under *root*, by digest, for the interpreter *python*. One server a folder.

    *environ* is what uv may know of the surroundings (index, proxy, certificates); only variables
    of those kinds are passed on. A disk that fails is DataFolderUnusable. What is not `async`
    blocks, the constructor included: call it by `asyncio.to_thread`.
    """

    def __init__(
        self,
        root: Path,
        python: str = sys.executable,
        *,
        environ: Mapping[str, str] = os.environ,
        build_s_max: float = BUILD_S_MAX,
    ) -> None:
        self._root = root
        self._python = python
        self._environ = {k: v for k, v in environ.items() if _PASSED.fullmatch(k)}
        self._build_s_max = build_s_max
        self._identity = ""
        self._turns = asyncio.Semaphore(BUILDS_MAX)
        # Weak: a lock lives while someone holds or awaits it, so names do not pile up.
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        with self._disk():
            self._resolutions.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary.mkdir()
            self._parcels.mkdir(exist_ok=True)
            for folder in (self._temporary, self._resolutions, self._parcels):
                folder.chmod(0o700)

    def __repr__(self) -> str:
        return f"<EnvironmentStore {self._root}>"

    async def build(
        self, requirements: str, *, progress: Progress = lambda line: None
    ) -> tuple[str, Path, str]:
        """Resolve and install; return the digest, the folder of the libraries, the resolved text.

        What was resolved before stays so, and what was built before is taken as it is: then no
        network is needed. Builds of the same thing wait for each other. *progress* gets sentences.

        :raises BadInput: if the requirements hold anything but packages of the index.
        :raises EnvironmentBuildFailed: with uv's last lines; also after *build_s_max* seconds.
        """
        wanted = parse(requirements)
        async with self._building():
            return await self._build(wanted, progress)

    async def resolve(self, requirements: str, *, progress: Progress = lambda line: None) -> str:
        """The resolved text alone: every version and hash. Raises as `build`."""
        wanted = parse(requirements)
        async with self._building():
            return await self._resolve(wanted, progress)

    async def pack(self, digest: str) -> Parcel:
        """An environment that is built, as one file; it is packed once.

        :raises EnvironmentNotFound: if it is not built.
        """
        target = self._parcels / f"{digest}.zip"
        async with self._building(), self._alone(digest):
            folder = await asyncio.to_thread(self.path, digest)
            if not await asyncio.to_thread(target.is_file):
                async with self._scratch() as scratch:
                    await _in_thread(_pack, folder, scratch / "zip", target)
            return await asyncio.to_thread(_parcel, target)

    async def install(self, resolved: str, *, progress: Progress = lambda line: None) -> Path:
        """The folder of the libraries in a text that `build` has resolved, here or elsewhere.

        What is there is taken as it is. Raises `EnvironmentBuildFailed`.
        """
        _understood(resolved.encode())
        async with self._building():
            self._identity = self._identity or await self._identify()
            return (await self._installed(resolved, progress))[1]

    @contextlib.asynccontextmanager
    async def _building(self) -> AsyncIterator[None]:
        with self._disk():
            try:
                async with asyncio.timeout(self._build_s_max):
                    yield
            except TimeoutError as error:
                raise EnvironmentBuildFailed(
                    f"not built within {self._build_s_max:g} s: list fewer packages, or retry"
                ) from error

    def path(self, digest: str) -> Path:
        """The folder of an environment's libraries.

        :raises EnvironmentNotFound: if it is not built.
        """
        folder = self._root / digest
        if not _DIGEST.fullmatch(digest) or not folder.is_dir():
            raise EnvironmentNotFound(f"no environment {_shown(digest)} is built: deploy again")
        return folder

    def digests(self) -> list[str]:
        """What is built, sorted."""
        with self._disk():
            return sorted(p.name for p in self._root.iterdir() if _DIGEST.fullmatch(p.name))

    def remove(self, digest: str) -> None:
        """Delete an environment; nothing happens if it is not built. No sandbox may be using it."""
        with self._disk(), contextlib.suppress(EnvironmentNotFound):
            # Out of its name at once: half an environment is never seen under it.
            doomed = self._scratch_path()
            (self._parcels / f"{digest}.zip").unlink(missing_ok=True)
            self.path(digest).rename(doomed)
            shutil.rmtree(doomed)

    async def _build(self, wanted: list[Requirement], progress: Progress) -> tuple[str, Path, str]:
        resolved = await self._resolve(wanted, progress)
        return *(await self._installed(resolved, progress)), resolved

    async def _resolve(self, wanted: list[Requirement], progress: Progress) -> str:
        self._identity = self._identity or await self._identify()
        text = "".join(f"{line}\n" for line in sorted(map(str, wanted)))
        key = self._digest(text)
        async with self._alone(key):
            return await self._resolved(key, wanted, text, progress)

    async def _installed(self, resolved: str, progress: Progress) -> tuple[str, Path]:
        digest = self._digest(resolved)
        folder = self._root / digest
        async with self._alone(digest):
            if not await asyncio.to_thread(folder.is_dir):
                async with self._turns:
                    await self._install(folder, resolved, progress)
        return digest, folder

    async def _identify(self) -> str:
        """What compiled libraries depend on: interpreter, version, machine, C library."""
        ran = await _run([self._python, "-I", "-S", "-c", _IDENTITY], {}, lambda line: None)
        if ran.code or not ran.answer:
            raise EnvironmentBuildFailed(f"{self._python} does not run: {ran.last_lines}")
        return ran.answer.decode()

    def _digest(self, text: str) -> str:
        return hashlib.sha256(f"{self._identity}\n{text}".encode()).hexdigest()

    async def _resolved(
        self, key: str, wanted: list[Requirement], text: str, progress: Progress
    ) -> str:
        known = self._resolutions / f"{key}.txt"
        if await asyncio.to_thread(known.is_file):
            return await asyncio.to_thread(known.read_text)
        resolved = ""
        if wanted:
            progress("resolving")
            command = ("pip", "compile", "-", "--generate-hashes", "--no-header", "--no-annotate")
            async with self._turns:
                answer = await self._uv(command, progress, text.encode())
            resolved = _with_pinned_hashes(_understood(answer), wanted)
        async with self._scratch() as scratch:
            await _in_thread(_write_durably, scratch, known, resolved)
        return resolved

    async def _install(self, folder: Path, resolved: str, progress: Progress) -> None:
        async with self._scratch() as scratch:
            libraries, listed = scratch / "lib", scratch / "requirements.txt"
            await _in_thread(libraries.mkdir)
            await _in_thread(listed.write_text, resolved)
            if resolved:
                progress(f"installing {_counted(resolved.count(chr(10)), 'package')}")
                # Copies, not links: what is made readable here is not also uv's cache.
                target = ("--target", str(libraries), "--link-mode", "copy", "-r", str(listed))
                command = ("pip", "install", "--require-hashes", "--no-deps", *target)
                await self._uv(command, progress)
                await _in_thread(_clean, libraries)
                progress("compiling")
                await self._compile(libraries)
            await _in_thread(_seal, libraries, folder)

    async def _uv(self, command: Sequence[str], progress: Progress, text: bytes = b"") -> bytes:
        """Run uv; its own lines go to *progress*, and into the error if it fails."""
        try:
            binary = await asyncio.to_thread(uv.find_uv_bin)
        except FileNotFoundError as error:
            raise EnvironmentBuildFailed("uv is missing: `pip install uv`") from error
        common = ("--only-binary", ":all:", "--python", self._python, "--color", "never")
        full = [binary, *command, *common, "--no-progress", "--no-python-downloads"]
        ran = await _run(full, self._environ, progress, text)
        if ran.code:
            raise EnvironmentBuildFailed(ran.last_lines or f"uv ended with code {ran.code}")
        if len(ran.answer) > ANSWER_BYTES_MAX:
            raise EnvironmentBuildFailed("uv's answer is too long: list fewer packages")
        return ran.answer

    async def _compile(self, libraries: Path) -> None:
        """Byte-compile, with unchecked hashes: file times never matter. Without it, just slower."""
        workers = str(min(BUILDS_MAX, os.cpu_count() or 1))
        command = [self._python, "-I", "-S", "-m", "compileall", "-q", "-q", "-j", workers]
        mode = ["--invalidation-mode", "unchecked-hash", str(libraries)]
        limit = (resource.RLIMIT_AS, COMPILE_MEMORY_BYTES_MAX)
        try:
            async with asyncio.timeout(COMPILE_S_MAX):
                await _run([*command, *mode], {}, lambda line: None, limit=limit)
        except (TimeoutError, EnvironmentBuildFailed):
            log.warning("environment not wholly byte-compiled")

    @property
    def _temporary(self) -> Path:
        return self._root / "tmp"

    @property
    def _parcels(self) -> Path:
        return self._root / "parcels"

    @property
    def _resolutions(self) -> Path:
        return self._root / "resolutions"

    def _scratch_path(self) -> Path:
        return self._temporary / secrets.token_hex(8)

    @contextlib.asynccontextmanager
    async def _scratch(self) -> AsyncIterator[Path]:
        """A new folder that is gone afterwards, also when cancelled."""
        scratch = self._scratch_path()
        try:
            await _in_thread(scratch.mkdir)
            yield scratch
        finally:
            await _in_thread(partial(shutil.rmtree, scratch, ignore_errors=True))

    @contextlib.asynccontextmanager
    async def _alone(self, key: str) -> AsyncIterator[None]:
        """Only one at a time for each *key*."""
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            yield

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataFolderUnusable(
                f"the environments in {self._root} failed ({error}): free space, repair its rights"
            ) from error


def _understood(answer: bytes) -> list[Requirement]:
    try:
        return [_requirement(line) for line in _lines(answer.decode("utf-8", "replace"))]
    except BadInput as error:
        raise EnvironmentBuildFailed(f"uv resolved to something unknown: {error}") from error


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _clean(libraries: Path) -> None:
    """Refuse what is neither file nor folder; drop uv's lock and bytecode that came along."""
    (libraries / ".lock").unlink(missing_ok=True)
    for folder, folders, files in os.walk(libraries):
        for name in (*folders, *files):
            mode = os.lstat(os.path.join(folder, name)).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise EnvironmentBuildFailed(f"a package brought {_shown(name)}: a link or device")
        if "__pycache__" in folders:
            folders.remove("__pycache__")
            shutil.rmtree(os.path.join(folder, "__pycache__"))


def _seal(libraries: Path, folder: Path) -> None:
    """Make it readable by every user and give it its name: from here on it is complete."""
    for at, _, files in os.walk(libraries):
        os.chmod(at, 0o755)
        for name in files:
            path = os.path.join(at, name)
            os.chmod(path, 0o755 if os.stat(path).st_mode & stat.S_IXUSR else 0o644)
    # The name must not outlive a power loss that the contents do not. One call for all files:
    # syncing each of 10,000 takes longer than the build.
    os.sync()
    libraries.rename(folder)


def _pack(folder: Path, made: Path, target: Path) -> None:
    """Zip what `_seal` has sealed: there are no links in it. Quick to make and to read."""
    with zipfile.ZipFile(made, "x", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for at, folders, files in os.walk(folder):
            folders.sort()
            for name in sorted(files):
                path = Path(at, name)
                entry = zipfile.ZipInfo(path.relative_to(folder).as_posix())
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = path.stat().st_mode << 16
                with path.open("rb") as source, archive.open(entry, "w", force_zip64=True) as put:
                    shutil.copyfileobj(source, put, 1 << 20)
    with made.open("rb") as file:
        os.fsync(file.fileno())
    made.rename(target)


def _parcel(path: Path) -> Parcel:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with zipfile.ZipFile(path) as archive:
        sizes = [entry.file_size for entry in archive.infolist()]
    room = path.stat().st_size + sum(size + BLOCK_BYTES for size in sizes)
    return Parcel(path=str(path), digest=digest, room_bytes=room)


def _write_durably(scratch: Path, target: Path, text: str) -> None:
    with (scratch / "text").open("x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    (scratch / "text").rename(target)


# --- Processes -----------------------------------------------------------------------------------


class _Ran(NamedTuple):
    code: int
    answer: bytes
    last_lines: str


async def _run(
    command: Sequence[str],
    environ: Mapping[str, str],
    progress: Progress,
    text: bytes = b"",
    limit: tuple[int, int] | None = None,
) -> _Ran:
    """Run a command to its end. If we are cancelled, its whole process group is killed first."""
    process = await _start(command, environ)
    try:
        if limit:
            _bound(process.pid, *limit)
        async with asyncio.TaskGroup() as tasks:
            answer = tasks.create_task(_answer(_present(process.stdout)))
            lines = tasks.create_task(_tell(_present(process.stderr), progress))
            tasks.create_task(_feed(_present(process.stdin), text))
        return _Ran(await process.wait(), answer.result(), "\n".join(lines.result()))
    except BaseException:
        await _kill(process)
        raise


async def _start(command: Sequence[str], environ: Mapping[str, str]) -> asyncio.subprocess.Process:
    """Start a command in a process group of its own.

    Its folder is `/`, so that uv finds no project's configuration above it.
    """
    start = partial(asyncio.create_subprocess_exec, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    try:
        return await start(*command, cwd="/", env=environ, start_new_session=True)
    except OSError as error:
        raise EnvironmentBuildFailed(f"cannot start {command[0]} ({error})") from error


def _present(pipe: T | None) -> T:
    assert pipe is not None, "we asked for all three pipes"
    return pipe


async def _kill(process: asyncio.subprocess.Process) -> None:
    """Kill a process and all that it started, and read its pipes out, so that they close."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(KILL_S_MAX):
            await process.communicate()


def _bound(pid: int, what: int, most: int) -> None:
    """Lower a child's limit. From outside: no code of ours runs between fork and exec."""
    with contextlib.suppress(ProcessLookupError):
        hard = resource.prlimit(pid, what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(hard, most)
        resource.prlimit(pid, what, (most, most))


async def _feed(stdin: asyncio.StreamWriter, text: bytes) -> None:
    with contextlib.suppress(ConnectionError):  # it ended without reading: its code says why
        if not stdin.is_closing():  # uvloop: to write to a closed pipe is an error of ours
            stdin.write(text)
            await stdin.drain()
    stdin.close()


async def _answer(stdout: asyncio.StreamReader) -> bytes:
    """All that is written, or, if that is too long, a little more than the limit."""
    answer = bytearray()
    while chunk := await stdout.read(1 << 16):
        if len(answer) <= ANSWER_BYTES_MAX:
            answer += chunk
    return bytes(answer)


async def _tell(stderr: asyncio.StreamReader, progress: Progress) -> list[str]:
    """Pass each line on, cut to size and without passwords; return the last ones."""
    kept: deque[str] = deque(maxlen=LINES_KEPT)
    rest = b""
    while chunk := await stderr.read(1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        rest = rest[: 1 << 16]
        for line in lines:
            kept.append(_told(line, progress))
    if rest:
        kept.append(_told(rest, progress))
    return list(kept)


def _told(line: bytes, progress: Progress) -> str:
    text = _CREDENTIALS.sub("***@", line.decode("utf-8", "replace")).rstrip()
    text = text[:LINE_CHARACTERS_MAX]
    if text:
        progress(text)
    return text


async def _in_thread(call: Callable[..., T], *arguments: object) -> T:
    """As `asyncio.to_thread`, but when cancelled, the call has ended before this does."""
    running = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise
