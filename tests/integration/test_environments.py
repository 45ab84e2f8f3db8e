"""Environments: what requirements may say, and what uv makes of them."""

import asyncio
import contextlib
import os
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvloop

from dayfly_pool import environments
from dayfly_pool.environments import REQUIREMENTS_MAX, EnvironmentStore, parse
from dayfly_pool.errors import (
    BadInput,
    DataFolderUnusable,
    EnvironmentBuildFailed,
    EnvironmentNotFound,
)

SIX = "six==1.17.0"
WRONG_HASH = f"--hash=sha256:{'0' * 64}"
MISSING = "0" * 64


@pytest.fixture
def store(tmp_path: Path) -> EnvironmentStore:
    return EnvironmentStore(tmp_path / "environments")


def only(index: str, cache: Path) -> dict[str, str]:
    """An environment in which uv knows one index and has nothing cached."""
    environ = {"PATH": os.environ["PATH"], "UV_DEFAULT_INDEX": index, "UV_HTTP_RETRIES": "0"}
    return environ | {"UV_CACHE_DIR": str(cache / "cache")}


def offline(root: Path) -> EnvironmentStore:
    """A store whose uv finds no index: whatever it builds, it had before."""
    return EnvironmentStore(root, environ=only("http://127.0.0.1:9/simple", root.parent))


def leftovers(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "environments" / "tmp").iterdir()]


def children() -> set[str]:
    """The processes that this one has, zombies included."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {pid for task in tasks for pid in task.read_text().split()}


async def test_a_requirement_becomes_a_folder_that_can_be_imported_from(
    store: EnvironmentStore, tmp_path: Path
) -> None:
    """The folder's name is the digest; nothing else is left behind."""
    said: list[str] = []
    digest, folder, resolved = await store.build(f"{SIX}\n", progress=said.append)
    code = f"import sys; sys.path.append({str(folder)!r}); import six; print(six.__version__)"
    answer = await asyncio.to_thread(subprocess.check_output, [sys.executable, "-I", "-c", code])

    assert answer == b"1.17.0\n"
    assert folder == store.path(digest)
    assert store.digests() == [digest]
    assert resolved.startswith("six==1.17.0 --hash=sha256:")
    assert said[0] == "resolving"
    assert "installing 1 package" in said
    assert leftovers(tmp_path) == []


async def test_an_environment_is_compiled_and_readable_by_every_user(
    store: EnvironmentStore,
) -> None:
    """Sandboxes run as other users; unchecked hashes (flags 1) make file times irrelevant."""
    _, folder, _ = await store.build(SIX)
    (compiled,) = folder.rglob("six.*.pyc")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}

    assert compiled.read_bytes()[4:8] == b"\1\0\0\0"
    assert modes <= {0o644, 0o755}


async def test_what_was_built_needs_neither_network_nor_uv(
    store: EnvironmentStore, tmp_path: Path
) -> None:
    """A redeploy takes the resolution and the folder that are there; comments change nothing."""
    first = await store.build(SIX)
    said: list[str] = []
    again = offline(tmp_path / "environments")
    second = await again.build("# pinned\n  Six == 1.17.0  # tiny\n", progress=said.append)

    assert second == first
    assert said == []


async def test_two_builds_of_the_same_install_once(store: EnvironmentStore) -> None:
    """The second waits and takes what the first has built."""
    said: list[str] = []
    first, second = await asyncio.gather(
        store.build(SIX, progress=said.append), store.build(SIX, progress=said.append)
    )

    assert first == second
    assert said.count("resolving") == 1
    assert said.count("installing 1 package") == 1


async def test_no_requirements_make_an_empty_environment(tmp_path: Path) -> None:
    """Nothing is asked of uv."""
    _, folder, resolved = await offline(tmp_path / "environments").build("# none\n\n")

    assert list(folder.iterdir()) == []
    assert resolved == ""


async def test_an_unknown_package_fails_in_uvs_own_words(
    store: EnvironmentStore, tmp_path: Path
) -> None:
    """The user reads the message: uv's is the best there is."""
    with pytest.raises(EnvironmentBuildFailed, match=r"no version of six==99") as caught:
        await store.build("six==99")

    assert caught.value.status == 422
    assert store.digests() == []
    assert leftovers(tmp_path) == []


async def test_a_pinned_hash_is_kept(store: EnvironmentStore, tmp_path: Path) -> None:
    """`uv pip compile` drops stated hashes; a file that differs must still be refused."""
    with pytest.raises(EnvironmentBuildFailed, match=r"(?i)hash"):
        await store.build(f"{SIX} {WRONG_HASH}")

    assert store.digests() == []
    assert leftovers(tmp_path) == []


@contextlib.asynccontextmanager
async def silent_index() -> AsyncIterator[tuple[str, asyncio.Event]]:
    """An index that takes connections and never answers: its address, and when one came."""
    connected = asyncio.Event()
    writers: list[asyncio.StreamWriter] = []

    def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        connected.set()

    async with await asyncio.start_server(connect, "127.0.0.1") as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/simple", connected
    for writer in writers:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_a_cancelled_build_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    """Cancelled while uv waits for an index that never answers: uv dies at once."""
    before = children()
    async with silent_index() as (index, connected):
        store = EnvironmentStore(tmp_path / "environments", environ=only(index, tmp_path))
        build = asyncio.ensure_future(store.build(SIX))
        await connected.wait()
        build.cancel()
        with pytest.raises(asyncio.CancelledError):
            await build

    assert children() == before
    assert leftovers(tmp_path) == []


def test_a_program_that_ends_before_it_is_fed_is_no_error_of_ours() -> None:
    async def feeds_the_dead() -> None:
        true = await environments._start(["/bin/true"], {})
        await true.wait()
        await true.stdin.wait_closed()
        await environments._feed(true.stdin, b"text")

    uvloop.run(asyncio.wait_for(feeds_the_dead(), 10))


async def test_a_build_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    """No build holds its turn for ever; the error says how long it had."""
    before = children()
    async with silent_index() as (index, _):
        environ = only(index, tmp_path)
        store = EnvironmentStore(tmp_path / "environments", environ=environ, build_s_max=0.5)
        with pytest.raises(EnvironmentBuildFailed, match=r"not built within 0\.5 s"):
            await store.build(SIX)

    assert children() == before
    assert leftovers(tmp_path) == []


async def test_passwords_of_the_index_are_not_shown(tmp_path: Path) -> None:
    """The error goes to whoever deploys; the index's password is the operator's."""
    environ = only("http://user:geheim@127.0.0.1:9/simple", tmp_path)
    with pytest.raises(EnvironmentBuildFailed) as caught:
        await EnvironmentStore(tmp_path / "environments", environ=environ).build(SIX)

    assert "127.0.0.1:9" in caught.value.detail
    assert "geheim" not in caught.value.detail


@pytest.mark.parametrize(
    "line",
    [
        "-r /etc/passwd",
        "-c constraints.txt",
        "-e .",
        "--index-url https://evil.example/simple",
        "--extra-index-url=https://evil.example",
        "--find-links /tmp",
        "--no-binary :all:",
        "six --index-url https://evil.example",
        "six ; python_version > '3' --find-links x",
        "six --hash=md5:00",
        "six --hash=sha256:../../x",
        "six @ https://evil.example/six.whl",
        "six@file:///etc/passwd",
        "git+https://evil.example/six",
        "file:six",
        "https://evil.example/six.whl",
        "./six",
        "../six",
        "/srv/six",
        "~/six",
        "C:\\six",
        "six[",
        "six[]",
        "six[a]]",
        "six[../x]",
        "six==$HOME",
        "six==${HOME}",
        "six==1.0,",
        "six 1.0",
        "six\0",
        "süß",
        "-",
        "; python_version > '3'",
    ],
)
def test_anything_but_a_package_of_the_index_is_refused(line: str) -> None:
    """An allow-list: what is not understood whole is refused, so no trick has to be foreseen."""
    with pytest.raises(BadInput, match="requirement "):
        parse(f"six\n{line}\n")


@pytest.mark.parametrize(
    ("line", "understood"),
    [
        ("Zope.Interface", "zope-interface"),
        ("six.tar.gz", "six-tar-gz"),  # uv would take it for a file in its folder
        ("a >= 1 , < 2", "a>=1,<2"),
        ("a (>=1.0)", "a>=1.0"),
        ("a[ C_d , b ]==1.*", "a[b,c-d]==1.*"),
        ("a;python_version<'4'  # why", "a ; python_version<'4'"),
        (f"a==1 \\\n  {WRONG_HASH}", f"a==1 {WRONG_HASH}"),
        ("a==1!2.0+local.1", "a==1!2.0+local.1"),
    ],
)
def test_uv_sees_what_was_understood(line: str, understood: str) -> None:
    """Its input is written anew, in one form."""
    assert [str(requirement) for requirement in parse(line)] == [understood]


def test_too_many_requirements_are_refused() -> None:
    """Every list has a limit, in number and in size."""
    with pytest.raises(BadInput, match="limit 1000"):
        parse("six\n" * (REQUIREMENTS_MAX + 1))
    with pytest.raises(BadInput, match="256 KiB"):
        parse("#" * 300_000)


def test_an_environment_that_is_not_built_is_not_found(store: EnvironmentStore) -> None:
    """Nor is anything else in the folder an environment."""
    for digest in (MISSING, "tmp", "..", "", "resolutions"):
        with pytest.raises(EnvironmentNotFound):
            store.path(digest)


async def test_a_removed_environment_is_gone(store: EnvironmentStore, tmp_path: Path) -> None:
    """Removing twice is harmless."""
    digest, folder, _ = await store.build("")
    store.remove(digest)
    store.remove(digest)

    assert store.digests() == []
    assert not folder.exists()
    assert leftovers(tmp_path) == []


def test_leftovers_of_a_crash_are_swept(store: EnvironmentStore, tmp_path: Path) -> None:
    """The next server on the folder starts clean."""
    (tmp_path / "environments" / "tmp" / "half" / "lib").mkdir(parents=True)
    EnvironmentStore(tmp_path / "environments")

    assert leftovers(tmp_path) == []


def test_a_root_that_is_a_file_is_unusable(tmp_path: Path) -> None:
    """The operator's mistake has a name."""
    (tmp_path / "environments").write_text("")

    with pytest.raises(DataFolderUnusable, match="environments"):
        EnvironmentStore(tmp_path / "environments")
