"""How much memory is left: of the machine, and of the control groups that the server is in."""

from pathlib import Path

import pytest

from dayfly_pool import memory
from dayfly_pool.memory import PLENTY, Group, available_bytes, groups

MIB = 1 << 20
V1_UNLIMITED = (1 << 63) - 4096
"""What an unlimited group of version 1 says."""


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 MiB are left of it."""
    said = tmp_path / "meminfo"
    said.write_text(f"MemTotal: 999999 kB\nMemAvailable: {100 << 10} kB\n")
    monkeypatch.setattr(memory, "MEMINFO", str(said))


def group(folder: Path, *, limit: str, usage: str, stat: str = "", version: int = 2) -> Group:
    """A made-up control group."""
    names = {
        2: ("memory.max", "memory.current"),
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    }[version]
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip((*names, "memory.stat"), (limit, usage, stat), strict=True):
        (folder / name).write_text(f"{text}\n")
    return Group(*(folder / name for name in (*names, "memory.stat")))


# ---- where they are -----------------------------------------------------------------------------


def test_every_group_above_may_have_a_limit(tmp_path: Path):
    """Version 2: this process's own, and each above it; the machine's own root has none."""
    for path in ("a/b/c", "a/b", "a"):
        group(tmp_path / path, limit="max", usage="0")

    assert [found.limit for found in groups("0::/a/b/c\n", str(tmp_path))] == [
        tmp_path / path / "memory.max" for path in ("a/b/c", "a/b", "a")
    ]


def test_groups_of_version_1_are_the_memory_controllers(tmp_path: Path):
    """Beside others of other controllers; there the root has a file too."""
    for path in ("memory/a", "memory", "cpu/a"):
        group(tmp_path / path, limit="1", usage="0", version=1)
    own = "7:cpu,cpuacct:/a\n5:memory:/a\n1:name=systemd:/a\n"

    assert [found.usage for found in groups(own, str(tmp_path))] == [
        tmp_path / path / "memory.usage_in_bytes" for path in ("memory/a", "memory")
    ]


def test_a_group_without_a_limit_of_its_own_is_passed_over(tmp_path: Path):
    """The controller is not given to it; the one above may still have one."""
    group(tmp_path / "a", limit="max", usage="0")
    (tmp_path / "a" / "b").mkdir()

    assert [found.limit.parent for found in groups("0::/a/b\n", str(tmp_path))] == [tmp_path / "a"]


@pytest.mark.parametrize("own", ["", "nonsense\n", "0::/../elsewhere\n", "0::/gone\n"])
def test_nothing_is_found_where_there_is_nothing(tmp_path: Path, own: str):
    """Also in a container, whose group is outside of what it is shown: no path leads out."""
    group(tmp_path / "elsewhere", limit="1", usage="0")
    group(tmp_path / "mount" / "a", limit="1", usage="0")

    assert groups(own, str(tmp_path / "mount")) == ()


# ---- what is left -------------------------------------------------------------------------------


def test_without_groups_it_is_what_the_machine_has():
    assert available_bytes() == 100 * MIB


@pytest.mark.parametrize(
    ("limit", "usage", "left"),
    [
        (f"{64 * MIB}", f"{40 * MIB}", 24 * MIB),
        (f"{500 * MIB}", f"{40 * MIB}", 100 * MIB),  # the machine is smaller
        (f"{64 * MIB}", f"{65 * MIB}", 0),  # it is just being reclaimed
        ("max", f"{40 * MIB}", 100 * MIB),
        (f"{V1_UNLIMITED}", f"{40 * MIB}", 100 * MIB),
        ("", "", 100 * MIB),
        (f"{64 * MIB}", "", 100 * MIB),
    ],
)
def test_a_group_that_has_less_left_than_the_machine_decides(
    tmp_path: Path, limit: str, usage: str, left: int
):
    assert available_bytes([group(tmp_path / "a", limit=limit, usage=usage)]) == left


def test_the_tightest_of_several_groups_decides(tmp_path: Path):
    """Whether it is above or below."""
    tight = group(tmp_path / "a", limit=f"{64 * MIB}", usage=f"{60 * MIB}")
    loose = group(tmp_path / "a" / "b", limit=f"{64 * MIB}", usage=f"{20 * MIB}")

    assert available_bytes([tight, loose]) == available_bytes([loose, tight]) == 4 * MIB


@pytest.mark.parametrize(
    ("version", "stat"),
    [
        (2, f"anon 1\ninactive_file {8 * MIB}\nactive_file {16 * MIB}"),
        (1, f"inactive_file 1\ntotal_inactive_file {8 * MIB}\ntotal_active_file {16 * MIB}"),
    ],
)
def test_pages_of_files_that_were_not_used_lately_are_as_good_as_free(
    tmp_path: Path, version: int, stat: str
):
    """A group that has read much looks full, and the kernel takes these when it must."""
    limits = {"limit": f"{64 * MIB}", "usage": f"{60 * MIB}"}

    found = group(tmp_path / "a", **limits, stat=stat, version=version)
    assert available_bytes([found]) == 12 * MIB


def test_a_group_that_has_gone_says_nothing(tmp_path: Path):
    found = group(tmp_path / "a", limit="1", usage="1")
    for path in found:
        path.unlink()

    assert available_bytes([found]) == 100 * MIB


def test_where_nobody_says_anything_there_is_plenty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "MEMINFO", str(tmp_path / "none"))

    assert available_bytes() == PLENTY
