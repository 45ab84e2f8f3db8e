"""Control groups on made-up trees: where a server finds its place, and what it writes there."""

import os
from pathlib import Path

import pytest

from dayfly_pool.drivers import cgroups
from dayfly_pool.drivers.cgroups import Death, Limits, Tree

LIMITS = Limits(memory_bytes=256 << 20, processes=64, cpus=0.5)
V1_OWN = "4:memory:/docker/abc\n8:pids:/docker/abc\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n"
V2_OWN = "0::/user.slice/dayfly.scope\n"


def files(folder: Path, **contents: str) -> Path:
    """*folder* with files; `__` in a name is a dot, as the kernel names them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def v2(mount: Path, controllers: str = "cpuset cpu io memory pids", *, owned: bool = True) -> Path:
    """A unified tree with this process in a scope, which is delegated to it if *owned*."""
    scope = files(mount / "user.slice/dayfly.scope", cgroup__controllers=controllers)
    if owned:
        files(scope, cgroup__procs="", cgroup__subtree_control="")
    return scope


def v1(mount: Path) -> list[Path]:
    """The old trees, as Docker mounts them."""
    names = ("memory", "pids", "cpu,cpuacct")
    return [files(mount / name / "docker/abc", cgroup__procs="", tasks="") for name in names]


# ---- detect -------------------------------------------------------------------------------------


def test_a_delegated_subtree_is_used(tmp_path: Path):
    scope = v2(tmp_path)
    tree = cgroups.detect(str(tmp_path), V2_OWN, pid=7)

    assert tree == Tree(2, (f"{scope}/dayfly-7",))
    assert tree.folders("sb-1") == [f"{scope}/dayfly-7/sb-1"]


def test_a_subtree_that_is_not_ours_is_left_alone_and_the_way_out_told(tmp_path: Path):
    """A user's login session: the controllers are there, the right to use them is not."""
    v2(tmp_path, owned=False)
    tree = cgroups.detect(str(tmp_path), V2_OWN)

    assert (tree.version, tree.roots) == (0, ())
    assert "not delegated" in tree.reason
    assert "Delegate=yes" in tree.reason


@pytest.mark.parametrize("missing", ["memory", "pids", "cpu"])
def test_a_subtree_without_a_needed_controller_is_not_used(tmp_path: Path, missing: str):
    v2(tmp_path, " ".join({"memory", "pids", "cpu"} - {missing}))

    assert cgroups.detect(str(tmp_path), V2_OWN).version == 0


def test_the_old_trees_are_used_where_they_can_be_written(tmp_path: Path):
    """One folder a controller; `cpu` is found under the name that it shares."""
    memory, pids, cpu = v1(tmp_path)
    tree = cgroups.detect(str(tmp_path), V1_OWN, pid=7)

    assert tree == Tree(1, (f"{memory}/dayfly-7", f"{pids}/dayfly-7", f"{cpu}/dayfly-7"))


def test_a_hybrid_machine_uses_the_old_trees(tmp_path: Path):
    """Debian 10 and this one: an empty unified tree beside the old ones."""
    v1(tmp_path)
    files(tmp_path / "unified", cgroup__controllers="")

    assert cgroups.detect(str(tmp_path), V1_OWN + "0::/\n").version == 1


def test_without_any_tree_there_is_none_and_the_reason_is_told(tmp_path: Path):
    tree = cgroups.detect(str(tmp_path), "")

    assert (tree.version, tree.roots) == (0, ())
    assert "no writable cgroup for memory" in tree.reason
    assert tree.folders("sb-1") == []


def test_detecting_changes_nothing(tmp_path: Path):
    v1(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    cgroups.detect(str(tmp_path), V1_OWN)

    assert sorted(tmp_path.rglob("*")) == before


# ---- limit --------------------------------------------------------------------------------------


def test_limits_of_the_unified_tree(tmp_path: Path):
    """Half a processor is 50 ms of every 100; the whole group dies of one out-of-memory."""
    tree = Tree(2, (str(tmp_path),))
    names = ("memory__max", "memory__swap__max", "memory__oom__group", "pids__max", "cpu__max")
    folder = files(tmp_path / "sb-1", **dict.fromkeys(names, ""))
    cgroups.limit(tree, "sb-1", LIMITS)

    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "memory.max": str(256 << 20),
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "pids.max": "64",
        "cpu.max": "50000 100000",
    }


def test_a_kernel_without_swap_accounting_is_no_obstacle(tmp_path: Path):
    tree = Tree(2, (str(tmp_path),))
    names = ("memory__max", "memory__oom__group", "pids__max", "cpu__max")
    folder = files(tmp_path / "sb-1", **dict.fromkeys(names, ""))
    cgroups.limit(tree, "sb-1", LIMITS)

    assert (folder / "cpu.max").read_text()


def v1_folders(root: Path) -> tuple[Tree, list[Path]]:
    folders = [
        files(root / "memory" / "sb-1", memory__limit_in_bytes=""),
        files(root / "pids" / "sb-1", pids__max=""),
        files(root / "cpu" / "sb-1", cpu__cfs_quota_us=""),
    ]
    return Tree(1, tuple(str(folder.parent) for folder in folders)), folders


def test_limits_of_the_old_trees(tmp_path: Path):
    tree, (memory, pids, cpu) = v1_folders(tmp_path)
    cgroups.limit(tree, "sb-1", LIMITS)

    assert (memory / "memory.limit_in_bytes").read_text() == str(256 << 20)
    assert (pids / "pids.max").read_text() == "64"
    assert (cpu / "cpu.cfs_quota_us").read_text() == "50000"


def test_the_least_quota_is_what_the_kernel_takes(tmp_path: Path):
    """cpu.cfs_quota_us below 1 ms is EINVAL."""
    tree, (_, _, cpu) = v1_folders(tmp_path)
    cgroups.limit(tree, "sb-1", LIMITS._replace(cpus=0.001))

    assert (cpu / "cpu.cfs_quota_us").read_text() == "1000"


def test_without_groups_there_is_nothing_to_limit():
    cgroups.limit(Tree(0, ()), "sb-1", LIMITS)

    assert cgroups.memory_bytes(Tree(0, ()), "sb-1") == 0


def test_limiting_a_group_that_is_gone_is_told(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        cgroups.limit(Tree(2, (str(tmp_path),)), "sb-1", LIMITS)


@pytest.mark.parametrize(("version", "name"), [(2, "memory.current"), (1, "memory.usage_in_bytes")])
def test_what_a_sandbox_uses_is_read(tmp_path: Path, version: int, name: str):
    (tmp_path / "sb-1").mkdir()
    (tmp_path / "sb-1" / name).write_text("4096\n")

    assert cgroups.memory_bytes(Tree(version, (str(tmp_path),)), "sb-1") == 4096
    assert cgroups.memory_bytes(Tree(version, (str(tmp_path),)), "sb-2") == 0


# ---- autopsy ------------------------------------------------------------------------------------


def test_a_death_of_memory_is_seen_in_the_unified_tree(tmp_path: Path):
    events = "low 0\nhigh 0\nmax 17\noom 1\noom_kill 2\noom_group_kill 1\n"
    folder = files(tmp_path, memory__events=events, memory__peak="268435456\n")

    assert cgroups.autopsy([str(folder)]) == Death(2, 268435456)


def test_a_death_of_memory_is_seen_in_the_old_tree(tmp_path: Path):
    control = "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n"
    usage = "268435456\n"
    folder = files(tmp_path, memory__oom_control=control, memory__max_usage_in_bytes=usage)

    assert cgroups.autopsy([str(folder), "/nowhere"]) == Death(1, 268435456)


@pytest.mark.parametrize("events", ["", "low 0\n", "oom_kill 0", "nonsense"])
def test_an_autopsy_without_a_finding_finds_nothing(tmp_path: Path, events: str):
    """Old kernels lack the line, and the folder may be gone already."""
    files(tmp_path, memory__events=events)

    assert cgroups.autopsy([str(tmp_path)]) == Death(0, 0)
    assert cgroups.autopsy([]) == Death(0, 0)


# ---- folders ------------------------------------------------------------------------------------


def test_groups_are_made_and_removed(tmp_path: Path):
    folders = [str(tmp_path / name) for name in ("a", "b")]
    cgroups.create(folders)

    assert all(Path(folder).is_dir() for folder in folders)
    assert cgroups.remove(folders)
    assert cgroups.remove(folders)  # again is fine
    assert not any(Path(folder).exists() for folder in folders)


def test_a_group_that_is_in_use_is_not_removed(tmp_path: Path):
    """The kernel says EBUSY; here a file in it says the same."""
    files(tmp_path / "a", cgroup__procs="7")

    assert not cgroups.remove([str(tmp_path / "a")])
    assert not cgroups.remove_tree(str(tmp_path))


def test_a_server_enters_the_groups_of_its_sandbox(tmp_path: Path):
    """0 is the writer itself; the old tree takes a single thread, without waiting for others."""
    unified = files(tmp_path / "v2", cgroup__procs="")
    old = files(tmp_path / "v1", cgroup__procs="", tasks="")
    cgroups.enter([str(unified), str(old)])

    assert (unified / "cgroup.procs").read_text() == "0"
    assert ((old / "tasks").read_text(), (old / "cgroup.procs").read_text()) == ("0", "")


def test_the_roots_are_made_for_the_old_trees(tmp_path: Path):
    v1(tmp_path)
    tree = cgroups.detect(str(tmp_path), V1_OWN, pid=7)

    assert cgroups.establish(tree) == tree
    assert all(Path(root).is_dir() for root in tree.roots)


def test_what_dead_servers_left_is_found_and_what_living_ones_use_is_not(tmp_path: Path):
    """Each server's folder carries its pid."""
    (parent,) = [files(tmp_path / "scope")]
    dead = 2**22 + 1  # above the kernel's largest pid
    for name in (f"dayfly-{dead}", f"dayfly-{dead}-apart", "dayfly-1", "dayfly-1-apart", "other"):
        (parent / name).mkdir()

    left = [f"{parent}/dayfly-{dead}", f"{parent}/dayfly-{dead}-apart"]
    assert sorted(cgroups.leftovers(Tree(2, (f"{parent}/dayfly-2",)))) == left


def test_only_processes_in_sandboxes_are_ours_to_kill(tmp_path: Path):
    """An administrator may have put others beside them."""
    files(tmp_path / "sb-1" / "below", cgroup__procs="12\n13\n")
    files(tmp_path / "sb-2", cgroup__procs="14\n")
    files(tmp_path / "server", cgroup__procs="99\n")
    files(tmp_path, cgroup__procs="98\n")

    assert cgroups.processes(str(tmp_path)) == [12, 13, 14]


def test_what_another_server_buries_too_may_be_gone_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    gone = tmp_path / "dayfly-7"
    assert cgroups.processes(str(gone)) == []
    assert cgroups.remove_tree(str(gone))

    gone.mkdir()
    remove = os.rmdir
    monkeypatch.setattr(os, "rmdir", lambda place: (remove(place), remove(place)))
    assert cgroups.remove_tree(str(gone))


def test_with_the_old_trees_the_server_stands_beside_its_sandboxes(tmp_path: Path):
    """A group gives way to those beside it alone; and before the end the server is back."""
    v1(tmp_path)
    tree = cgroups.establish(cgroups.detect(str(tmp_path), V1_OWN, pid=7))
    cpu = Path(tree.roots[-1])
    files(cpu, cpu__shares="1024")
    leaf = files(cpu / "server", cgroup__procs="", cpu__shares="1024")
    cgroups.come_first(tree)
    shares = [int((folder / "cpu.shares").read_text()) for folder in (leaf, cpu)]

    assert (leaf / "cgroup.procs").read_text() == "0"
    assert shares[0] >= 64 * 1024
    assert shares[1] > 1024
    cgroups.step_back(tree)
    assert (cpu.parent / "cgroup.procs").read_text() == "0"


def test_what_gives_way_to_all_stands_beside_the_others_as_a_whole(tmp_path: Path):
    """With the old trees only for the processors: memory and processes are counted as ever."""
    v1(tmp_path)
    tree = cgroups.establish(cgroups.detect(str(tmp_path), V1_OWN, pid=7))
    memory, pids, cpu = tree.roots
    files(Path(f"{cpu}-apart"), cpu__idle="0")
    apart = cgroups.set_apart(tree)

    assert apart == Tree(1, (memory, pids, f"{cpu}-apart"))
    assert Path(f"{cpu}-apart", "cpu.idle").read_text() == "1"


def test_in_the_unified_tree_it_gets_what_it_may_divide(tmp_path: Path):
    scope = v2(tmp_path)
    apart = files(scope / "dayfly-7-apart", cpu__idle="0", cgroup__subtree_control="")
    tree = cgroups.detect(str(tmp_path), V2_OWN, pid=7)

    assert cgroups.set_apart(tree) == Tree(2, (str(apart),))
    assert (apart / "cpu.idle").read_text() == "1"
    assert (apart / "cgroup.subtree_control").read_text() == "+memory +pids +cpu"


def test_where_no_group_gives_way_none_is_set_apart(tmp_path: Path):
    """A kernel before 5.15; nothing of the attempt stays."""
    tree = Tree(2, (str(v2(tmp_path) / "dayfly-7"),))

    assert cgroups.set_apart(tree) == tree
    assert not Path(f"{tree.roots[0]}-apart").exists()
    assert cgroups.set_apart(Tree(0, ())) == Tree(0, ())


def test_where_nothing_can_be_written_the_server_stays_where_it_is(tmp_path: Path):
    cgroups.come_first(Tree(1, (f"{tmp_path}/none/dayfly-7",)))
    cgroups.come_first(Tree(0, ()))
    cgroups.step_back(Tree(1, (f"{tmp_path}/none/dayfly-7",)))
