"""A step's folders there and back, between the stores and a pod that has none of them."""

import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dayfly import folders, freight
from dayfly.lockdown import Prepared as Locked
from dayfly_pool.drivers import cargo
from dayfly_pool.errors import BadTree
from dayfly_pool.models import Mounts
from dayfly_pool.workflow import facts
from dayfly_pool.workflow.handover import Given, Handover, Prepared, Taking, Versions
from dayfly_pool.workflow.model import Output, Step

LOCKED = Locked(seccomp=b"", landlock=None, landlock_abi=0)
Work = Callable[[Path], None]


class Pod:
    """The folders of one pod, and what its guest and its porter do with them."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = root
        for name in ("IN", "OUT", "WORKSPACES"):
            place = root / name.lower()
            place.mkdir(parents=True)
            patch.setattr(folders, name, str(place))
        patch.setattr(folders, "GIVEN", str(root / "in" / ".given"))

    def receive(self, data: Path, mounts: Mounts) -> None:
        read = folders.Mounts(
            step=mounts.step,
            inputs=[list(each) for each in mounts.inputs],
            workspaces=[list(each) for each in mounts.workspaces],
            file_bytes_max=0,
            branches=[list(each) for each in mounts.branches],
        )
        pieces = cargo.sent(data, mounts)
        folders.receive(read, lambda: next(pieces, b""), LOCKED)
        assert not list(pieces)

    def leave(self, data: Path, mounts: Mounts) -> None:
        ours, theirs = socket.socketpair()
        porter = threading.Thread(target=self._hand_over, args=(theirs,), daemon=True)
        porter.start()
        try:
            cargo.take(ours, data, mounts)
        finally:
            ours.close()
            porter.join(10)

    @staticmethod
    def _hand_over(end: socket.socket) -> None:
        with end:
            try:
                for piece in folders.left():
                    end.sendall(piece)
                end.recv(1)
            except OSError:
                pass


class House:
    """The stores, and steps that run in pods."""

    def __init__(self, data: Path, patch: pytest.MonkeyPatch) -> None:
        self.data, self._patch = data, patch
        self.handover = Handover(data, os.geteuid())
        self.handover.open()
        self.versions: Versions = {}
        self._number = 0

    def run(
        self,
        work: Work,
        *,
        inputs: dict[str, Any] | None = None,
        outputs: tuple[Output, ...] = (),
        merge: tuple[str, ...] = (),
        policy: Any = None,
        has_workspace: bool = False,
        shared: bool = False,
    ) -> Given:
        self._number += 1
        key = f"step{self._number}"
        views = {"w": facts.View("w", merge)} if has_workspace else {}
        invoke = facts.Invoke(
            key=key,
            attempt=1,
            step=Step(name="s", script="true", outputs=outputs, merge=policy),
            params={},
            inputs=inputs or {},
            workspaces=views,
        )
        prepared = self.handover.prepare(
            "default", invoke, self.versions, frozenset({"w"} if shared else ())
        )
        try:
            self._in_pod(prepared, work)
            given = self.handover.take("default", invoke, prepared, {}, Taking(None))
        finally:
            self.handover.drop(prepared)
        for left in given.left:
            self.versions[left.workspace, left.key] = left.version
        return given

    def _in_pod(self, prepared: Prepared, work: Work) -> None:
        pod = Pod(self.data / f"pod{self._number}", self._patch)
        pod.receive(self.data, prepared.mounts)
        work(pod.root)
        pod.leave(self.data, prepared.mounts)

    def close(self) -> None:
        self.handover.close()


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    found = House(tmp_path, monkeypatch)
    yield found
    found.close()


def value_of(given: Given, name: str) -> Any:
    return given.outputs[name].as_value()


def test_what_a_step_leaves_is_what_the_next_one_finds(house: House):
    def make(pod: Path) -> None:
        (pod / "out" / "tree" / "empty").mkdir(parents=True)
        (pod / "out" / "tree" / "run").write_text("#!/bin/sh\n")
        (pod / "out" / "tree" / "run").chmod(0o750)
        (pod / "out" / "tree" / "link").symlink_to("../../elsewhere")
        (pod / "out" / "large").write_bytes(b"0123456789" * 300_000)
        (pod / "out" / "unasked").write_text("for")

    found = {}

    def look(pod: Path) -> None:
        given = pod / "in" / "tree"
        found["names"] = sorted(os.listdir(given))
        found["link"] = os.readlink(given / "link")
        found["modes"] = [stat.S_IMODE((given / n).stat().st_mode) for n in ("run", "empty")]
        found["large"] = (pod / "in" / "many" / "1").read_bytes()

    left = house.run(make, outputs=(Output(name="tree"), Output(name="large")))
    tree, large = value_of(left, "tree"), value_of(left, "large")
    house.run(look, inputs={"tree": tree, "many": [tree, large]})

    assert found == {
        "names": ["empty", "link", "run"],
        "link": "../../elsewhere",
        "modes": [0o555, 0o555],
        "large": b"0123456789" * 300_000,
    }


def test_a_stream_is_read_from_what_the_step_wrote(house: House):
    def make(pod: Path) -> None:
        (pod / "out" / "data").write_bytes(b"x" * 3_000_000)

    left = house.run(make, outputs=(Output(name="data", stream=True),))

    assert left.outputs["data"].size_bytes == 3_000_000


def test_a_workspace_goes_from_step_to_step(house: House):
    def begin(pod: Path) -> None:
        place = pod / "workspaces" / "w"
        for path in ("kept", "gone", "folder/old", "turned/inside"):
            (place / path).parent.mkdir(exist_ok=True)
            (place / path).write_text(path)

    def change(pod: Path) -> None:
        place = pod / "workspaces" / "w"
        (place / "gone").unlink()
        (place / "folder").rename(place / "moved")
        (place / "folder").mkdir()
        (place / "folder" / "new").write_text("new")
        (place / "turned" / "inside").unlink()
        (place / "turned").rmdir()
        (place / "turned").write_text("a file")

    found: dict[str, str] = {}

    def look(pod: Path) -> None:
        place = pod / "workspaces" / "w"
        for path in place.rglob("*"):
            if path.is_file():
                found[str(path.relative_to(place))] = path.read_text()

    house.run(begin, has_workspace=True)
    house.run(change, has_workspace=True, merge=("step1",))
    left = house.run(look, has_workspace=True, merge=("step2",))

    assert found == {
        "kept": "kept",
        "moved/old": "folder/old",
        "folder/new": "new",
        "turned": "a file",
    }
    assert left.left[0].version == house.versions["w", "step2"], "looking changes nothing"


def test_a_step_decides_between_branches_in_a_pod(house: House):
    def write(text: str) -> Work:
        return lambda pod: (pod / "workspaces" / "w" / "x").write_text(text) and None

    found = {}

    def decide(pod: Path) -> None:
        place = pod / "workspaces"
        found["conflicts"] = (place / "w.conflicts").read_text()
        found["branches"] = [(place / "w.branches" / n / "x").read_text() for n in "01"]
        (place / "w" / "x").write_text("both")

    house.run(write("base"), has_workspace=True)
    for text in ("one", "two"):
        house.run(write(text), has_workspace=True, merge=("step1",), shared=True)
    house.run(decide, has_workspace=True, merge=("step2", "step3"), policy="reduce")

    assert found == {"conflicts": "x\n", "branches": ["one", "two"]}


def test_what_is_no_output_is_said_as_on_one_machine(house: House):
    def pipe(pod: Path) -> None:
        os.mkfifo(pod / "out" / "x")

    with pytest.raises(BadTree, match="x is a pipe: leave a file or a folder"):
        house.run(pipe, outputs=(Output(name="x"),))
    with pytest.raises(BadTree, match="the output x is not there"):
        house.run(lambda pod: None, outputs=(Output(name="x"),))


def test_a_porter_that_says_why_is_heard_and_one_that_breaks_off_is_lost(tmp_path: Path):
    for words, error, text in (
        (freight.unfit("x is mostly holes"), BadTree, "mostly holes"),
        (freight.HEADER.pack(freight.FOLDER, 0, 0o755, 0, 0), ConnectionError, "broke off"),
        (b"\xff" * 100, ConnectionError, "not an entry"),
    ):
        ours, theirs = socket.socketpair()
        (tmp_path / "steps" / "steps" / "s" / "out").mkdir(parents=True, exist_ok=True)
        theirs.sendall(words)
        theirs.close()
        with ours, pytest.raises(error, match=text):
            cargo.take(ours, tmp_path, Mounts("s"))
