"""Workspaces: what branches changed, whether that goes together, and real overlays on top of it."""

import ctypes
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dayfly_pool.errors import ArtifactGone, BadInput, BadTree, WorkspaceConflict
from dayfly_pool.workflow import merging, workspaces
from dayfly_pool.workflow.artifacts import Artifacts
from dayfly_pool.workflow.merging import Change, Conflict
from dayfly_pool.workflow.steps import Steps
from dayfly_pool.workflow.workspaces import Workspace, Workspaces, fork

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")
FOLDER = stat.S_IFDIR

# ---- the rules, against a model -----------------------------------------------------------------

State = dict[str, int | str]
"""A folder's mode, or a file's content, by path."""

Edit = tuple[str, str, int]
PATHS = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map("/".join)
WORDS = st.sampled_from(["write", "write", "folder", "remove", "renew", "chmod"])
EDITS = st.lists(st.tuples(WORDS, PATHS, st.integers(0, 2)), max_size=6)


def without(state: State, path: str) -> State:
    return {p: v for p, v in state.items() if p != path and not p.startswith(f"{path}/")}


def edited(state: State, edits: Sequence[Edit], who: str) -> tuple[State, set[str]]:
    """The state after *edits*, and the folders that were made anew on the way."""
    renewed: set[str] = set()
    for at, (word, path, number) in enumerate(edits):
        if any(isinstance(state.get(folder, 0), str) for folder in merging.parents(path)):
            continue  # below a file
        missing = [folder for folder in merging.parents(path) if folder not in state]
        if missing and word in ("remove", "chmod"):
            continue
        state = state | dict.fromkeys(missing, 0o755)
        if word == "write" and not isinstance(state.get(path), int):
            state = state | {path: f"{who}{at}"}
        elif word == "folder" and path not in state:
            state = state | {path: 0o755}
        elif word == "remove":
            state = without(state, path)
        elif word == "renew":
            state = without(state, path) | {path: 0o755}
            renewed.add(path)
        elif word == "chmod" and isinstance(state.get(path), int):
            state = state | {path: (0o755, 0o700, 0o750)[number]}
    return state, renewed


def below(state: State) -> Callable[[str], int | None]:
    def mode(path: str) -> int | None:
        found = state.get(path)
        return FOLDER | found if isinstance(found, int) else found and stat.S_IFREG

    return mode


def layer_of(base: State, edits: Sequence[Edit], who: str) -> tuple[list[Change], State]:
    """What overlayfs would leave in an upper layer, and what is seen through it."""
    state, renewed = edited(base, edits, who)
    renewed = {path for path in renewed if path in state and path in base}
    hidden = {p for p in base if any(r in renewed for r in merging.parents(p))}
    raw: dict[str, Change] = {}
    for path, value in state.items():
        if isinstance(value, int):
            if path in renewed or isinstance(base.get(path, 0), str) or path not in base:
                raw[path] = Change(path, "replaced", value)
            elif value != base[path] or path in hidden:
                raw[path] = Change(path, "folder", value)
        elif value != base.get(path) or path in hidden:
            raw[path] = Change(path, "file")
    for path in base:
        if path not in state and path not in hidden:
            folder = path.rpartition("/")[0]
            if not folder or isinstance(state.get(folder), int):
                raw[path] = Change(path, "removed")
    for path in list(raw):
        for folder in merging.parents(path):
            mode = state[folder]
            assert isinstance(mode, int)
            raw.setdefault(folder, Change(folder, "folder", mode))
    return merging.normal(raw.values(), below(base)), state


def applied(state: State, layer: Sequence[Change], contents: Sequence[State]) -> State:
    for change in layer:
        match change.kind:
            case "removed":
                state = without(state, change.path)
            case "file":
                content = contents[change.layer][change.path]
                state = without(state, change.path) | {change.path: content}
            case "replaced":
                state = without(state, change.path) | {change.path: change.mode}
            case "folder":
                state = state | {change.path: change.mode}
            case "through":
                assert isinstance(state.get(change.path), int)
    return state


def stacked(base: State, layers: Sequence[Sequence[Change]]) -> list[Change]:
    return merging.normal(merging.stacked(layers), below(base))


@given(EDITS, EDITS)
@settings(max_examples=100, deadline=None)
def test_a_layer_says_all_that_a_step_changed(before: list[Edit], edits: list[Edit]):
    base, _ = edited({}, before, "base")
    layer, state = layer_of(base, edits, "a")

    assert applied(base, layer, [state]) == state
    assert state != base or layer == [] or "replaced" in {change.kind for change in layer}


@given(EDITS, st.lists(EDITS, min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_layers_on_top_of_each_other_are_one_layer(before: list[Edit], chain: list[list[Edit]]):
    base, _ = edited({}, before, "base")
    layers, states, state = [], [], base
    for number, edits in enumerate(chain):
        layer, state = layer_of(state, edits, f"s{number}-")
        layers.append(layer)
        states.append(state)

    assert applied(base, stacked(base, layers), states) == state


@given(EDITS, st.lists(EDITS, min_size=2, max_size=4), st.permutations(range(4)))
@settings(max_examples=120, deadline=None)
def test_branches_without_conflict_lose_nothing_in_any_order(
    before: list[Edit], branches: list[list[Edit]], order: list[int]
):
    """The law of the join: its result is every branch's edits, whichever comes first."""
    base, _ = edited({}, before, "base")
    made = [layer_of(base, edits, f"b{number}-") for number, edits in enumerate(branches)]
    layers, states = [layer for layer, _ in made], [state for _, state in made]
    joined = applied(base, stacked(base, layers), states)
    order = [number for number in order if number < len(layers)]
    again = applied(base, stacked(base, [layers[n] for n in order]), [states[n] for n in order])

    if not merging.conflicts(layers):
        assert joined == again
        for layer, state in made:
            for change in layer:
                assert joined.get(change.path) == state.get(change.path) or change.kind == "through"


@given(EDITS, EDITS, EDITS)
@settings(max_examples=120, deadline=None)
def test_a_path_that_two_branches_changed_is_named(
    before: list[Edit], one: list[Edit], other: list[Edit]
):
    base, _ = edited({}, before, "base")
    (first, state), (second, other_state) = layer_of(base, one, "1-"), layer_of(base, other, "2-")
    found = {conflict.path for conflict in merging.conflicts([first, second])}
    files = [{c.path for c in layer if c.kind == "file"} for layer in (first, second)]
    claimed = {change.path for change in second if change.kind != "through"}

    assert files[0] & files[1] <= found
    assert files[0] & claimed <= found
    lost = applied(base, stacked(base, [first, second]), [state, other_state])
    for path in files[0]:
        is_named = any(path == p or p.startswith(f"{path}/") for p in found)
        assert lost.get(path) == state[path] or is_named or found & set(merging.parents(path))


@given(EDITS, st.lists(EDITS, min_size=2, max_size=4))
@settings(max_examples=150, deadline=None)
def test_what_branches_disagree_about_can_be_left_as_it_was(
    before: list[Edit], branches: list[list[Edit]]
):
    base, _ = edited({}, before, "base")
    made = [layer_of(base, edits, f"b{number}-") for number, edits in enumerate(branches)]
    layers, states = [layer for layer, _ in made], [state for _, state in made]
    named = {conflict.path for conflict in merging.conflicts(layers)}
    kept = [merging.normal(layer, below(base)) for layer in merging.undisputed(layers)]

    assert merging.conflicts(kept) == ()
    joined = applied(base, stacked(base, kept), states)
    assert {path: joined.get(path) for path in named} == {path: base.get(path) for path in named}
    if not named:
        assert kept == layers
    for layer, state, rest in zip(layers, states, kept, strict=True):
        for change in layer:
            about = [change.path, *merging.parents(change.path)]
            is_of_it = named & set(about) or any(p.startswith(f"{change.path}/") for p in named)
            is_kept = is_of_it or change in rest or change.kind == "through"
            assert is_kept or any(is_claim(each, about) for each in layers), change
            if change in rest and change.kind != "through":
                assert joined.get(change.path) == state.get(change.path)


def is_claim(layer: Sequence[Change], folders: Sequence[str]) -> bool:
    """Whether it removes or replaces one of them."""
    return any(c.path in folders and c.kind in ("removed", "replaced", "file") for c in layer)


def test_a_file_removed_in_a_folder_that_another_branch_removed_is_a_conflict():
    """Whose layer lies above would decide whether the folder is there."""
    inside = [Change("b", "through"), Change("b/a", "removed")]

    for branches in ([inside, [Change("b", "removed")]], [[Change("b", "removed")], inside]):
        assert [conflict.path for conflict in merging.conflicts(branches)] == ["b/a"]


def test_disjoint_edits_never_conflict():
    edits: list[list[Edit]] = [
        [("write", f"{letter}/{name}", 0) for name in "abc"] + [("renew", f"{letter}/c", 0)]
        for letter in "abcd"
    ]
    layers = [layer_of({"a": 0o755}, branch, "x")[0] for branch in edits]

    assert merging.conflicts(layers) == ()


def file(path: str) -> Change:
    return Change(path, "file")


CASES: dict[str, tuple[list[Change], list[Change], list[str]]] = {
    "the same file": ([file("a")], [file("a")], ["a"]),
    "different files": ([file("a")], [file("b")], []),
    "both removed": ([Change("a", "removed")], [Change("a", "removed")], []),
    "removed and written": ([Change("a", "removed")], [file("a")], ["a"]),
    "a folder gone": ([Change("a", "removed")], [Change("a", "through"), file("a/b")], ["a/b"]),
    "a folder replaced": (
        [Change("a", "replaced")],
        [Change("a", "through"), Change("a/b", "removed")],
        ["a/b"],
    ),
    "part of a folder gone": (
        [Change("a", "removed")],
        [Change("a", "through"), Change("a/b", "removed")],
        ["a/b"],
    ),
    "the same new folder": (
        [Change("a", "folder", 0o755), file("a/b")],
        [Change("a", "folder", 0o755), file("a/c")],
        [],
    ),
    "another mode": ([Change("a", "folder", 0o700)], [Change("a", "folder", 0o755)], ["a"]),
    "file and folder": ([file("a")], [Change("a", "folder", 0o755), file("a/b")], ["a", "a/b"]),
}


@pytest.mark.parametrize("case", CASES)
def test_two_branches_agree_or_conflict_as_documented(case: str):
    one, other, paths = CASES[case]

    assert [c.path for c in merging.conflicts([one, other])] == paths
    assert [c.path for c in merging.conflicts([other, [], one])] == paths


def test_a_conflict_says_whose_and_the_message_has_an_end():
    branches = [[file(f"f{number:03}") for number in range(100)]] * 3
    found = merging.conflicts(branches)

    assert found[0] == Conflict("f000", (0, 1, 2))
    text = workspaces.in_words(found, ["lint", "test"])
    assert "f000 (lint, test, branch 2); f001" in text
    assert text.endswith("and 80 more")


@given(st.lists(st.integers(1, 50), min_size=1, max_size=300))
@settings(max_examples=50, deadline=None)
def test_a_chain_of_steps_has_few_layers_and_moves_each_change_seldom(sizes: list[int]):
    """About log2 of the changes, and as often."""
    layers: list[int] = []
    moved = 0
    for size in sizes:
        layers.append(size)
        start = merging.run_to_merge(layers, 0, 8)
        if start < len(layers) - 1:
            moved += sum(layers[start:])
            layers[start:] = [sum(layers[start:])]

        assert len(layers) <= 8 + sum(sizes).bit_length()
    assert moved <= 2 * sum(sizes) * sum(sizes).bit_length()


def test_layers_that_branches_share_are_never_merged():
    assert merging.run_to_merge([1] * 20, 20, 8) == 20
    assert merging.run_to_merge([1] * 20, 15, 0) == 15


# ---- on the disk ---------------------------------------------------------------------------------


class House:
    """Workspaces, steps and artifacts on one disk, and steps that run in this process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.owner = os.geteuid()
        self.workspaces = Workspaces(root / "workspaces", self.owner)
        self.steps = Steps(root / "steps", self.owner)
        self.artifacts = Artifacts(root / "artifacts")
        self.stores = (self.workspaces, self.steps, self.artifacts)
        for store in self.stores:
            store.open()
        (root / "empty").mkdir(exist_ok=True)
        (root / "seen").mkdir(exist_ok=True)
        self.number = 0

    @contextmanager
    def mounted(self, workspace: Workspace) -> Iterator[tuple[Path, Path]]:
        """(what a step sees, its upper layer)."""
        self.number += 1
        step = f"step-{self.number}"
        upper = self.steps.make(step, ["w"]).uppers["w"]
        options = workspaces.overlay(
            workspace, step, "w",
            layers=f"{self.root}/workspaces/layers",
            steps=f"{self.root}/steps/steps",
        )  # fmt: skip
        libc = ctypes.CDLL(None, use_errno=True)
        seen = bytes(self.root / "seen")
        if options:
            assert libc.mount(b"w", seen, b"overlay", 6, options.encode()) == 0, ctypes.get_errno()
        else:
            assert libc.mount(bytes(upper), seen, None, 4096, None) == 0, ctypes.get_errno()
        try:
            yield self.root / "seen", upper
        finally:
            assert libc.umount2(seen, 0) == 0

    def step(self, workspace: Workspace, work: Callable[[Path], object]) -> Workspace:
        """What *workspace* is after a step."""
        with self.mounted(workspace) as (seen, upper):
            work(seen)
        after = self.workspaces.take(workspace, upper, is_synced=False)
        self.steps.remove(f"step-{self.number}")
        return after

    def seen(self, workspace: Workspace) -> dict[str, str]:
        """What a step would find."""
        with self.mounted(workspace) as (seen, _):
            return contents(seen)


def contents(folder: Path) -> dict[str, str]:
    """Every path, with the mode of a folder or the content of a file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = f"{path.stat().st_mode & 0o777:o}" if path.is_dir() else path.read_text()
    return found


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    yield made
    for store in made.stores:
        store.close()


def writes(**files: str) -> Callable[[Path], None]:
    def work(folder: Path) -> None:
        for name, text in files.items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return work


@AS_ROOT
def test_a_step_sees_what_the_one_before_it_left(house: House):
    one = house.step(Workspace(), writes(a="1", d__b="2"))
    two = house.step(one, lambda w: [(w / "a").unlink(), (w / "d" / "b").write_text("3")])

    assert house.seen(two) == {"d": "755", "d/b": "3"}
    assert house.seen(one) == {"a": "1", "d": "755", "d/b": "2"}


@AS_ROOT
def test_a_step_that_changes_nothing_makes_no_layer(house: House):
    """Also one that makes something and removes it: overlayfs leaves traces of that."""

    def work(folder: Path) -> None:
        (folder / "d" / "t").mkdir()
        shutil.rmtree(folder / "d" / "t")

    one = house.step(Workspace(), writes(d__b="2"))

    assert house.step(one, work) == one


@AS_ROOT
def test_eight_branches_lose_nothing(house: House):
    def branch(number: int) -> Callable[[Path], None]:
        def work(folder: Path) -> None:
            (folder / "shared" / f"own{number}").write_text(f"{number}")
            (folder / "new").mkdir()  # every branch makes it
            (folder / "new" / f"n{number}").write_text(f"{number}")
            (folder / "shared" / f"old{number}").unlink()
            shutil.rmtree(folder / f"tree{number}")

        return work

    files = {f"shared__old{n}": "old" for n in range(8)} | {f"tree{n}__t": "t" for n in range(8)}
    base = house.step(Workspace(), writes(keep="k", **files))
    branches = [house.step(fork(base), branch(number)) for number in range(8)]

    joined = house.workspaces.join(base, branches, is_synced=False)

    expected = {"keep": "k", "shared": "755", "new": "755"}
    for number in range(8):
        expected |= {f"shared/own{number}": f"{number}", f"new/n{number}": f"{number}"}
    assert house.seen(joined) == dict(sorted(expected.items()))


@AS_ROOT
def test_a_conflict_is_named_before_anything_is_done(house: House):
    base = house.step(Workspace(), writes(a="1", d__x="1"))
    branches = [
        house.step(fork(base), writes(a="2", own="1")),
        house.step(fork(base), writes(a="3")),
        house.step(fork(base), lambda w: shutil.rmtree(w / "d")),
        house.step(fork(base), writes(d__y="1")),
    ]

    with pytest.raises(WorkspaceConflict, match=r": a \(one, two\); d/y \(three, branch 3\)$"):
        house.workspaces.join(base, branches, names=["one", "two", "three"])
    found = house.workspaces.conflicts(base, branches)
    assert [conflict.path for conflict in found] == ["a", "d/y"]


@AS_ROOT
def test_in_order_a_later_branch_wins(house: House):
    base = house.step(Workspace(), writes(a="1", d__x="1"))
    branches = [
        house.step(fork(base), writes(a="2", own="1", d__z="1")),
        house.step(fork(base), lambda w: [(w / "a").unlink(), shutil.rmtree(w / "d")]),
        house.step(fork(base), writes(d__y="1")),
    ]

    joined = house.workspaces.join(base, branches, "ordered", is_synced=False)

    assert house.seen(joined) == {"d": "755", "d/y": "1", "own": "1"}


@AS_ROOT
def test_what_a_step_is_to_decide_is_as_it_was_before_the_branches(house: House):
    base = house.step(Workspace(), writes(a="1", d__x="1", keep="k"))
    branches = [
        house.step(fork(base), writes(a="2", own="1", d__z="1")),
        house.step(fork(base), lambda w: [(w / "a").unlink(), shutil.rmtree(w / "d")]),
        house.step(house.step(fork(base), writes(d__y="1", more="3")), writes(e="4")),
    ]

    joined = house.workspaces.join(base, branches, "reduce")

    expected = {"a": "1", "d": "755", "d/x": "1", "e": "4", "keep": "k", "more": "3", "own": "1"}
    assert house.seen(joined) == expected


@AS_ROOT
def test_a_branch_that_made_and_removed_a_file_does_not_remove_anothers(house: House):
    """Its second layer holds a whiteout that must not reach across."""
    base = house.step(Workspace(), writes(a="1"))
    first = house.step(fork(base), writes(x="mine"))
    second = house.step(house.step(fork(base), writes(x="tmp")), lambda w: (w / "x").unlink())

    for branches in ([first, second], [second, first]):
        joined = house.workspaces.join(base, branches, is_synced=False)
        assert house.seen(joined) == {"a": "1", "x": "mine"}


@AS_ROOT
def test_random_chains_and_branches_are_what_a_copied_folder_would_be(house: House, tmp_path: Path):
    """The whole, against plain copies of plain folders."""
    draw = random.Random(7)

    def work(folder: Path, number: int) -> None:
        rule = random.Random(number)
        for at in range(4):
            path = folder / rule.choice("ab") / rule.choice("cd") / rule.choice("ef")
            match rule.choice(["write", "write", "remove", "renew", "chmod"]):
                case "write":
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(f"{number}-{at}")
                case "remove" if path.exists():
                    path.unlink()
                case "renew" if path.parent.exists():
                    shutil.rmtree(path.parent)
                    path.parent.mkdir()
                case "chmod" if path.parent.exists():
                    path.parent.chmod(rule.choice([0o700, 0o755]))

    plain = tmp_path / "plain"
    plain.mkdir()
    workspace = Workspace()
    for number in range(60):
        workspace = house.step(workspace, lambda w, n=number: work(w, n))
        work(plain, number)
        if number % 10 == 9:
            branches = [
                house.step(fork(workspace), writes(**{f"b{n}__{number}": str(n)})) for n in range(3)
            ]
            draw.shuffle(branches)
            workspace = house.workspaces.join(workspace, branches, is_synced=False)
            for n in range(3):
                writes(**{f"b{n}__{number}": str(n)})(plain)

            assert house.seen(workspace) == contents(plain)
    assert len(workspace.layers) <= 16
    assert workspace.floor == 0


@AS_ROOT
def test_a_snapshot_is_the_artifact_that_a_copy_would_be(house: House):
    def work(folder: Path) -> None:
        (folder / "d" / "x").unlink()
        (folder / "run").chmod(0o755)
        (folder / "secret").chmod(0o600)
        (folder / "link").symlink_to("run")

    base = house.step(Workspace(), writes(run="1", secret="2", d__x="3", d__y="4"))
    now = house.step(base, work)
    copy = house.root / "copy"
    with house.mounted(now) as (seen, _):
        shutil.copytree(seen, copy / "tree", symlinks=True)

    kept = house.workspaces.snapshot(now, house.artifacts, "team", is_synced=False)

    assert kept == house.artifacts.put("team", copy, "tree")
    house.artifacts.path(kept)
    assert house.seen(now)["secret"] == "2"


@AS_ROOT
def test_a_layer_takes_nothing_hostile(house: House):
    def work(folder: Path) -> None:
        (folder / "f").write_text("1")
        (folder / "f").chmod(0o4755)
        os.symlink("/etc", folder / "link")
        os.setxattr(folder, "user.overlay.opaque", b"y")
        (folder / "shut").mkdir(mode=0)

    workspace = house.step(Workspace(), work)
    (lower,) = house.workspaces.lower(workspace)

    assert stat.S_IMODE((lower / "f").stat().st_mode) == 0o755
    assert stat.S_IMODE((lower / "shut").stat().st_mode) == 0o700
    assert "user.overlay.opaque" not in os.listxattr(lower)
    assert os.readlink(lower / "link") == "/etc"


@AS_ROOT
def test_a_device_in_a_workspace_is_refused(house: House):
    upper = house.steps.make("s", ["w"]).uppers["w"]
    os.mknod(upper / "null", stat.S_IFCHR, os.makedev(1, 3))

    with pytest.raises(BadTree, match="null is a device"):
        house.workspaces.take(Workspace(), upper)
    assert list((house.root / "workspaces" / "incoming").iterdir()) == []


def test_a_workspace_that_somebody_still_writes_to_is_refused(house: House):
    upper = house.steps.make("s", ["w"]).uppers["w"]
    with (upper / "log").open("w"), pytest.raises(BadTree, match="still writing to log"):
        house.workspaces.take(Workspace(), upper)


def test_layers_that_nobody_keeps_are_removed(house: House):
    made = []
    for number in range(2):
        upper = house.steps.make(f"s{number}", ["w"]).uppers["w"]
        (upper / "f").write_text(f"{number}")
        made.append(house.workspaces.take(Workspace(), upper))
    kept = {layer.id for layer in made[0].layers}

    assert house.workspaces.sweep(kept.__contains__, before=0) == 0
    assert house.workspaces.sweep(kept.__contains__, before=2**40) == 1
    house.workspaces.lower(made[0])
    with pytest.raises(ArtifactGone, match="run its step again"):
        house.workspaces.lower(made[1])


def test_what_was_not_synced_does_not_outlive_a_power_loss(house: House):
    upper = house.steps.make("s", ["w"]).uppers["w"]
    (upper / "f").write_text("1")
    workspace = house.workspaces.take(Workspace(), upper, is_synced=False)
    house.workspaces._boot = "another"

    with pytest.raises(ArtifactGone):
        house.workspaces.lower(workspace)


def test_what_was_settled_outlives_a_power_loss(house: House):
    workspace = Workspace()
    for number in range(2):
        upper = house.steps.make(f"s{number}", ["w"]).uppers["w"]
        (upper / f"f{number}").write_text("1")
        workspace = house.workspaces.take(workspace, upper, is_synced=False)
    house.workspaces.settle(workspace)
    house.workspaces._boot = "another"

    assert len(house.workspaces.lower(workspace)) == 2


def test_only_branches_of_a_workspace_are_joined(house: House):
    upper = house.steps.make("s", ["w"]).uppers["w"]
    (upper / "f").write_text("1")
    workspace = house.workspaces.take(Workspace(), upper)

    with pytest.raises(BadInput, match="does not come from this workspace"):
        house.workspaces.join(workspace, [Workspace()])


@pytest.mark.parametrize("name", ["", "..", "a/b", "a,b", "a:b", "ä", "x" * 64])
def test_names_in_mount_options_mean_nothing_there(house: House, name: str):
    with pytest.raises(BadInput):
        house.steps.make(name)
    with pytest.raises(BadInput):
        house.steps.make("s", [name])
    with pytest.raises(BadInput):
        house.steps.remove(name)


def test_folders_of_steps_do_not_outlive_the_server(house: House):
    left = house.steps.make("s", ["w"])
    (left.out / "deep" / "er").mkdir(parents=True)
    again = Steps(house.root / "steps", house.owner)
    again.open()
    again.close()

    assert not left.out.exists()
    house.steps.make("s")
    house.steps.remove("s")
    house.steps.remove("s")
