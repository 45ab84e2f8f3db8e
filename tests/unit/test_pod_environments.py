"""Environments in pods: which image, how much room, and what a guest is sent before `Hello`."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.harness import eventually, free_port

from dayfly import greeting, parcel
from dayfly.protocol import Fetch, Frame, FrameReader, Hello, Piece, decode, encode
from dayfly_pool import environments, pods
from dayfly_pool.config import Config
from dayfly_pool.drivers import guest
from dayfly_pool.drivers.kubernetes import KubernetesDriver
from dayfly_pool.models import Environment, Mold, Parcel
from dayfly_pool.pods import Key, Pods

MIB = 1 << 20
SENT = Environment("e" * 64, path="/built", parcel=Parcel("/built.zip", "d" * 64, 5 * MIB))
NAMED = Environment("e" * 64, image="thumbs:1")
BASE = Environment("base")
WORDS: dict[str, Any] = {"name": "p", "shard": "s", "owner": {}, "command": [], "uid": 7}


def spec(environment: Environment) -> tuple[dict[str, Any], dict[str, Any]]:
    """A pod's spec and that of its container."""
    made = pods.pod(
        Pods(image="runtime:1"),
        mold=Mold(environment.digest),
        environment=environment,
        key=Key("k", "k0"),
        **WORDS,
    )["spec"]
    return made, made["containers"][0]


def volumes(environment: Environment) -> dict[str, Any]:
    return {volume["name"]: volume for volume in spec(environment)[0]["volumes"]}


def test_what_is_sent_has_room_of_its_own() -> None:
    """And the pod may use that much more of its node's disk."""
    limits = spec(SENT)[1]["resources"]["limits"], spec(BASE)[1]["resources"]["limits"]
    places = {mount["name"]: mount["mountPath"] for mount in spec(SENT)[1]["volumeMounts"]}

    assert volumes(SENT)["environment"] == {"name": "environment", "emptyDir": {"sizeLimit": "6Mi"}}
    assert places["environment"] == "/environment"
    assert [each["ephemeral-storage"] for each in limits] == ["518Mi", "512Mi"]
    assert spec(SENT)[1]["image"] == "runtime:1"


def test_a_named_image_is_run_as_it_is() -> None:
    assert spec(NAMED)[1]["image"] == "thumbs:1"
    assert "environment" not in volumes(NAMED)
    assert "environment" not in volumes(BASE)


@pytest.mark.parametrize(
    ("environment", "libraries", "digest"),
    [(SENT, ["/environment"], "d" * 64), (NAMED, ["/environment"], ""), (BASE, [], "")],
)
def test_a_guest_is_told_what_to_ask_for(
    environment: Environment, libraries: list[str], digest: str
) -> None:
    command = guest.command(
        "python3", "/dayfly", "/code", "/environment", environment,
        isolated=True, limit_memory=False, pod={"port": 1, "secret": "s"},
    )  # fmt: skip
    settings = json.loads(command[-1])

    assert (settings["libraries"], settings["parcel"]) == (libraries, digest)


def driver(**settings: Any) -> KubernetesDriver:
    named = {"own/thumbs": "own:1", "thumbs": "all:1"}
    made = Pods(image="runtime:1", environments=named, **settings)
    return KubernetesDriver(
        Config(data=Path("/nowhere"), pods=made, foreign_namespaces=frozenset({"foreign"}))
    )


def test_the_operators_word_on_images_is_the_first() -> None:
    """What is asked for counts where nothing was said."""
    assert driver().image("own", "thumbs", "mine:1") == "own:1"
    assert driver().image("default", "thumbs", "") == "all:1"
    assert driver().image("default", "other", "mine:1") == "mine:1"
    assert driver().image("default", "other", "") == ""


def test_strangers_may_name_images_only_where_that_is_allowed() -> None:
    with pytest.raises(ValueError, match="environmentImages"):
        driver().image("foreign", "other", "mine:1")
    assert driver().image("foreign", "other", "") == ""
    assert driver(environment_images=True).image("foreign", "other", "mine:1") == "mine:1"


# ---- on its way ---------------------------------------------------------------------------------


def packed(tmp_path: Path, **files: str) -> Parcel:
    """A parcel of modules."""
    (tmp_path / "built").mkdir()
    for name, text in files.items():
        (tmp_path / "built" / f"{name}.py").write_text(text)
    (tmp_path / "built" / "deep").mkdir()
    (tmp_path / "built" / "deep" / "some.pyc").write_bytes(b"compiled")
    (tmp_path / "built" / "deep" / "tool").write_text("#!/bin/sh\n")
    (tmp_path / "built" / "deep" / "tool").chmod(0o755)
    environments._pack(tmp_path / "built", tmp_path / "made", tmp_path / "e.zip")
    return environments._parcel(tmp_path / "e.zip")


class Pool:
    """A pool's end of a guest's connection."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.end.settimeout(20)
        self._frames = self._read()

    def _read(self) -> Iterator[Frame]:
        reader = FrameReader()
        while data := self.end.recv(1 << 16):
            yield from reader.feed(data)

    def hear(self) -> Any:
        return decode(next(self._frames))

    def send(self, data: bytes, size: int = 100) -> None:
        for at in range(0, len(data), size):
            piece = Piece(is_last=at + size >= len(data))
            self.end.sendall(encode(piece, body=data[at : at + size]))


def test_an_environment_arrives_as_it_was_packed(tmp_path: Path) -> None:
    """With the bytecode that the pool has compiled, and what can be run."""
    sent = packed(tmp_path, thing="NAME = 'thing'\n" * 20_000)
    target = tmp_path / "environment"
    target.mkdir()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        Pool(ours).send(Path(sent.path).read_bytes())
        parcel.bring(theirs.fileno(), sent.digest, str(target))
        assert Pool(ours).hear() == Fetch(digest=sent.digest)

    assert (target / "thing.py").read_text().count("\n") == 20_000
    assert (target / "deep/some.pyc").read_bytes() == b"compiled"
    assert os.access(target / "deep/tool", os.X_OK)
    assert sent.room_bytes > (target / "thing.py").stat().st_size + Path(sent.path).stat().st_size


def test_a_damaged_environment_is_not_unpacked(tmp_path: Path) -> None:
    sent = packed(tmp_path, thing="")
    target = tmp_path / "environment"
    target.mkdir()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        Pool(ours).send(b"!" + Path(sent.path).read_bytes()[1:])
        with pytest.raises(ValueError, match="damaged"):
            parcel.bring(theirs.fileno(), sent.digest, str(target))

    assert list(target.iterdir()) == []


def test_half_an_environment_ends_the_guest(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with theirs, ours:
        ours.sendall(encode(Piece(is_last=False), body=b"half"))
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises(SystemExit):
            parcel.bring(theirs.fileno(), "d" * 64, str(tmp_path))


# ---- a porter and its guest ---------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[Environment], int]]:
    """Start a pod's program as a process here; its port is returned."""
    (tmp_path / "secret").write_bytes(b"s" * 32)
    root = guest.install(tmp_path)
    (tmp_path / "environment").mkdir()
    started = []

    def start(environment: Environment) -> int:
        port = free_port()
        command = guest.command(
            sys.executable, str(root), "/code", str(tmp_path / "environment"), environment,
            isolated=True, limit_memory=False,
            pod={"port": port, "secret": str(tmp_path / "secret")},
        )  # fmt: skip
        started.append(subprocess.Popen(command, start_new_session=True))
        return port

    yield start
    for process in started:
        process.terminate()
        process.wait(10)


def greeted(port: int, kind: int = greeting.GUEST) -> socket.socket:
    """A connection to the porter there."""
    ends: list[socket.socket] = []

    def connects() -> bool:
        try:
            ends.append(socket.create_connection(("127.0.0.1", port), timeout=20))
        except ConnectionRefusedError:
            return False
        return True

    assert eventually(connects, 20)
    (end,) = ends
    nonce = os.urandom(greeting.NONCE_BYTES)
    end.sendall(greeting.opening(kind, nonce))
    answer = end.recv(greeting.ANSWER.size, socket.MSG_WAITALL)
    end.sendall(greeting.read_answer(b"s" * 32, kind, nonce, answer)[1])
    return end


def test_a_guest_asks_for_its_environment_before_it_says_hello(
    start: Callable[[Environment], int], tmp_path: Path
) -> None:
    """And has imported what is to be preloaded when it does."""
    sent = packed(tmp_path, early="print('imported', flush=True)\n")
    environment = Environment("e", path="/built", parcel=sent, preload=("early", "missing"))
    with closing(greeted(start(environment))) as end:
        pool = Pool(end)
        assert pool.hear() == Fetch(digest=sent.digest)
        pool.send(Path(sent.path).read_bytes())
        hello = pool.hear()

    assert isinstance(hello, Hello)
    assert [why.partition(":")[0] for why in hello.preload_failures] == ["missing"]
    assert (tmp_path / "environment/early.py").is_file()


def test_a_preload_that_starts_threads_comes_after_the_lock_down(
    start: Callable[[Environment], int], tmp_path: Path
) -> None:
    """The guest starts itself again and keeps its connections; nothing is sent twice."""
    code = (
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    sent = packed(tmp_path, early=code)
    environment = Environment("e", path="/built", parcel=sent, preload=("early",))
    port = start(environment)
    with closing(greeted(port)) as end:
        pool = Pool(end)
        pool.hear()
        pool.send(Path(sent.path).read_bytes())
        assert pool.hear().preload_failures == []
        assert kept_by_children(tmp_path) == []
        with closing(greeted(port)) as again:
            assert isinstance(Pool(again).hear(), Hello), "a pool that comes later is let in, too"


def kept_by_children(folder: Path) -> list[int]:
    """The descriptors that a child process has of a guest that has started itself again."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (place / "cmdline").read_bytes()
            if f'"secret": "{folder}/'.encode() in command and b'"line": ' in command:
                found.append(place)
    (place,) = found
    kept = []
    for descriptor in map(int, os.listdir(place / "fdinfo")):
        flags = (place / "fdinfo" / str(descriptor)).read_text().split("flags:")[1].split()[0]
        if descriptor > 2 and not int(flags, 8) & os.O_CLOEXEC:
            kept.append(descriptor)
    return kept
