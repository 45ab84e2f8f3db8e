"""What a guest takes for a step's folders: what the pool says, and nothing that could mean more."""

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dayfly import folders
from dayfly_pool.errors import BadInput
from dayfly_pool.models import Mounts
from dayfly_pool.workflow import facts, steps, words, workspaces
from dayfly_pool.workflow.handover import INPUTS_MAX, Handover, Prepared
from dayfly_pool.workflow.model import Step
from dayfly_pool.workflow.workspaces import Layer, Workspace

PLACE = f"default/tree-{'0a' * 32}/content"
LAYERS = Workspace((Layer("0" * 16, 1), Layer("f" * 16, 2)))


def overlay(workspace: Workspace = LAYERS, step: str = "s-1", name: str = "w") -> str:
    return workspaces.overlay(workspace, step, name, layers="/layers", steps="/steps")


def seen(workspace: Workspace) -> str:
    return workspaces.read_only(workspace, layers="/layers", empty="/empty")


def read(mounts: Mounts) -> folders.Mounts:
    return folders.read(msgspec.json.encode(mounts))


def test_what_the_pool_says_is_understood():
    inputs = (
        ("my_In-put", PLACE),
        ("many/0", PLACE),
        ("many/999999", PLACE.replace("tree", "file")),
    )
    shared = (("My_w-1", overlay(name="My_w-1")), ("_", overlay(Workspace(), name="_")))
    branches = (("_/0", seen(LAYERS)), ("_/255", seen(Workspace())))
    found = read(Mounts("s-1", inputs, shared, 5, branches))

    assert found.step == "s-1"
    assert found.inputs == [list(pair) for pair in inputs]
    assert found.workspaces == [list(pair) for pair in shared]
    assert found.file_bytes_max == 5
    assert found.branches == [list(pair) for pair in branches]


def test_the_deepest_stack_of_layers_is_taken():
    layers = tuple(Layer(f"{n:016x}", 1) for n in range(workspaces.LAYERS_MAX))

    assert read(Mounts("s-1", (), (("w", overlay(Workspace(layers))),)))


WRONG: list[tuple[str, Any]] = [
    *(("step", name) for name in ("", ".", "..", "a/b", "A", "a,b", "a" * 64, "a\n")),
    *(
        ("inputs", ((name, PLACE),))
        for name in ("", "..", "a/..", "a/b", "a/", "/a", "a/1/1", "1", "a.b", "a" * 64, "a\n")
    ),
    *(
        ("inputs", (("a", place),))
        for place in ("", "/etc", PLACE + "/..", "../" + PLACE, PLACE.replace("tree", "link"),
                      PLACE.replace("default", ".."), PLACE + "\n")
    ),
    ("inputs", (("a", PLACE), ("a", PLACE))),
    ("inputs", tuple((f"a{n}", PLACE) for n in range(folders.INPUTS_MAX + 1))),
    *(("workspaces", ((name, overlay(name=name)),)) for name in ("", "..", "a/b", "a,b", "1")),
    *(
        ("workspaces", (("w", options),))
        for options in (
            "x",
            overlay(step="another"),
            overlay(name="another"),
            overlay() + ",lowerdir=/steps",
            overlay().replace("lowerdir=", "lowerdir=/steps:"),
            overlay().replace("/tree", ""),
            overlay().replace("userxattr,", ""),
            overlay().replace("/layers/", "/layers/../steps/"),
            "lowerdir=/empty",
            overlay().replace("lowerdir=", "lowerdir=/empty:"),
        )
    ),
    ("workspaces", (("w", overlay()), ("w", overlay()))),
    *(
        ("branches", ((name, seen(LAYERS)),))
        for name in ("", "w", "w/", "w/a", "w/1000", "x/0", "../0")
    ),
    *(
        ("branches", (("w/0", options),))
        for options in (
            "x",
            overlay(),
            seen(LAYERS) + ",upperdir=/steps",
            seen(LAYERS).replace("/empty", "/steps"),
            seen(LAYERS).replace(":/empty", ""),
            seen(LAYERS).replace("/layers/", "/layers/../steps/"),
            seen(LAYERS).replace("userxattr,", ""),
        )
    ),
    ("branches", (("w/0", ""), ("w/0", ""))),
    ("branches", tuple((f"w/{n}", "") for n in range(folders.BRANCHES_MAX + 1))),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_what_it_cannot_mean_is_refused(field: str, value: Any):
    """Nothing is mounted then."""
    mounts: dict[str, Any] = {"step": "s-1", "workspaces": (("w", overlay()),), field: value}
    with pytest.raises(ValueError, match=r"not in|not the options|over|the same|a branch of"):
        read(Mounts(**mounts))


def test_more_inputs_than_a_guest_takes_are_refused_before_there_is_one(tmp_path: Path):
    """In lists or not: nothing has been made for them."""
    handover = Handover(tmp_path, os.geteuid())
    handover.open()
    stored = handover.artifacts.put_value("default", b"1")
    value = facts.Artifact(stored.uri, stored.sha256, stored.bytes).as_value()
    step = Step(name="s", script="true")

    def prepare(many: int) -> Prepared:
        inputs = {"all": [value] * (many - 1), "one": value}
        invoke = facts.Invoke(
            key="s", attempt=1, step=step, params={}, inputs=inputs, workspaces={}
        )
        return handover.prepare("default", invoke, {}, frozenset())

    with pytest.raises(BadInput, match="takes 1000 inputs at most, not 1001"):
        prepare(folders.INPUTS_MAX + 1)
    assert not any((tmp_path / "steps").rglob("out"))
    prepared = prepare(folders.INPUTS_MAX)
    read(prepared.mounts)
    handover.drop(prepared)
    handover.close()


def test_both_ends_say_the_same():
    """The guest cannot import what the pool is made of."""
    assert folders.INPUTS_MAX == INPUTS_MAX
    assert folders.OVERLAY_OPTIONS == workspaces.OVERLAY_OPTIONS
    assert folders.BRANCHES_MAX == workspaces.BRANCHES_MAX
    assert (folders.IN, folders.OUT, folders.WORKSPACES) == (
        words.INPUTS_AT,
        words.OUTPUTS_AT,
        words.WORKSPACES_AT,
    )
    assert folders._STEP.pattern == steps._ID.pattern
