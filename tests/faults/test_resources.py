"""A function that takes all it can get: it gets its own share, and its neighbours keep theirs."""

import os
import time

import pytest
from tests.harness import Server, cgroup_folders, eventually, eventually_none, status, together

with_cgroups = pytest.mark.skipif(os.geteuid() != 0, reason="needs control groups: root here")


@pytest.fixture(scope="module")
def name(server: Server) -> str:
    limits = {"memoryMb": 128, "openFiles": 100, "tmpMb": 8}
    return server.deploy("exhausts", limits=limits, timeoutSeconds=60)


@pytest.fixture(scope="module")
def neighbour(server: Server) -> str:
    """An ordinary function, warm."""
    name = server.deploy("hello", "neighbour", minScale=1)
    server.call(name)
    return name


def answers(server: Server, neighbour: str, over: list[object]) -> int:
    """How often the neighbour answers, one call after the other, until *over* holds something."""
    number = 0
    while not over:
        assert server.call(neighbour).status == 200
        number += 1
    return number


def beside(server: Server, neighbour: str, attack) -> tuple[object, int]:
    """(*attack*'s result, how often the neighbour answered meanwhile)."""
    over: list[object] = []

    def run(i: int) -> object:
        if i:
            return answers(server, neighbour, over)
        try:
            return attack()
        finally:
            over.append(True)

    result, answered = together(2, run)
    return result, answered


@with_cgroups
def test_a_fork_bomb_fills_its_own_sandbox_only(server: Server, neighbour: str):
    """pids.max holds, the server and a neighbour go on, and afterwards not one process is left."""
    name = server.deploy("fork_bomb", timeoutSeconds=1.5, limits={"processes": 40})
    most = [0]

    def attack():
        def watch(i: int):
            if i == 0:
                return server.call(name, timeout_s=20)
            end = time.monotonic() + 1.4
            while time.monotonic() < end:
                for box in server.sandboxes(name):
                    most[0] = max(most[0], len(server.processes(box["id"])))
            return None

        return together(2, watch)[0]

    reply, answered = beside(server, neighbour, attack)

    assert (reply.status, reply.json()["title"]) == (504, "TimedOut")
    assert 20 < most[0] <= 44
    assert answered > 3
    assert not eventually_none(lambda: server.sandboxes(name), 5)
    server.delete(name)


@with_cgroups
def test_a_function_over_its_memory_is_named_out_of_memory_every_time(server: Server):
    """Twelve of twelve, with the peak; never "unknown", never a neighbour."""
    name = server.deploy("glutton", limits={"memoryMb": 48}, timeoutSeconds=30)

    replies = [reply for _ in range(3) for reply in together(4, lambda _: server.invoke(name))]

    assert [(r.status, r.json()["title"]) for r in replies] == [(502, "OutOfMemory")] * 12
    assert all("peak" in r.json()["detail"] or "Memory" in r.json()["detail"] for r in replies)
    server.delete(name)


@with_cgroups
def test_an_import_over_the_memory_is_named_so_too(server: Server):
    """The same cause while loading."""
    code = "held = [b'x' * (8 << 20) for _ in range(100)]\n"
    name = server.deploy("fat", files={"main.py": code}, limits={"memoryMb": 48})

    assert server.invoke(name).json()["title"] == "OutOfMemory"
    server.delete(name)


@with_cgroups
def test_a_function_that_spins_leaves_its_neighbours_the_processor(server: Server, neighbour: str):
    """Eight busy processes of one function have no more than its share (here half a processor)."""
    code = (
        "import os\n"
        "def handler(event, context):\n"
        "    for _ in range(7):\n"
        "        if os.fork() == 0: break\n"
        "    while True: pass\n"
    )
    name = server.deploy("spins", files={"main.py": code}, timeoutSeconds=2, limits={"cpu": 0.5})

    reply, answered = beside(server, neighbour, lambda: server.invoke(name))

    assert reply.json()["title"] == "TimedOut"
    assert answered > 3
    server.delete(name)


@with_cgroups
def test_going_to_zero_and_back_leaks_nothing(server: Server):
    """Sixty starts and ends: as many descriptors, threads and children as before."""
    name = server.deploy("hello", "crossing", keepAliveSeconds=0)
    server.call(name)

    def held() -> tuple[int, str]:
        return len(os.listdir(f"/proc/{server.pid}/fd")), status(server.pid)["Threads"]

    before = held()
    replies = [reply for _ in range(15) for reply in together(4, lambda _: server.call(name))]

    assert {reply.status for reply in replies} == {200}
    assert eventually(lambda: held()[0] <= before[0] + 8), (before, held())
    assert int(held()[1]) <= int(before[1]) + 4
    server.delete(name)


@with_cgroups
def test_the_server_itself_is_not_what_the_kernel_would_kill_first(server: Server, name: str):
    """A sandbox is worth less than the server, and cannot make itself worth more."""
    told, score = server.invoke(name, "oom_score").json()

    assert "lowered" not in told
    assert score >= 500
    with open(f"/proc/{server.pid}/oom_score_adj") as file:
        assert int(file.read()) < score


@pytest.mark.parametrize("by", ["descriptor", "print"])
def test_a_gigabyte_of_output_blocks_nobody(server: Server, neighbour: str, by: str):
    """What is over the rate is dropped and counted; the handler ends, the server answers others."""
    mib = 1024 if by == "descriptor" else 256
    name = server.deploy("flood", f"flood-{by}", timeoutSeconds=60)
    before = server.metric("dayfly_log_dropped_bytes_total")
    resident_kib = int(status(server.pid)["VmRSS"].split()[0])

    reply, answered = beside(server, neighbour, lambda: server.invoke(name, {"mib": mib, "by": by}))
    dropped = server.metric("dayfly_log_dropped_bytes_total") - before
    lines = server.logs(name)

    assert reply.status == 200
    assert reply.json() < 30
    assert answered > 3
    assert dropped > (mib - 32) << 20
    assert any("bytes of output dropped" in line["text"] for line in lines)
    assert len(lines) <= 1000
    assert int(status(server.pid)["VmRSS"].split()[0]) - resident_kib < 64 << 10
    server.delete(name)


def test_what_functions_write_cannot_forge_a_line_nor_move_a_cursor(server: Server):
    """Control characters are shown as their codes; one line stays one line, in both logs."""
    name = server.deploy("forger")
    server.invoke(name)
    texts = [line["text"] for line in server.logs(name)]

    assert not [
        t for t in texts if any((ord(c) < 32 and c != "\t") or 127 <= ord(c) < 160 for c in t)
    ]
    assert not [t for t in texts if "\u2028" in t or "\u2029" in t]
    assert not [t for t in texts if t.startswith(('{"level"', "forged"))]
    assert any("\\x1b[2J\\x1b[31mred" in t for t in texts)
    assert not [line for line in server.log if "forged" in line and '"error"' in line]


@with_cgroups
@pytest.mark.parametrize(
    ("way", "most", "refusal"),
    [
        ("files", 100, "EMFILE"),
        ("inotify", 128, "EMFILE"),
        ("pipes", 100, None),
        ("space", 8, "ENOSPC"),
        ("shm", 8, "ENOSPC"),
        ("inodes", 2048, "ENOSPC"),
    ],
)
def test_what_a_sandbox_can_take_is_bounded(
    server: Server, name: str, way: str, most: int, refusal: str | None
):
    """The limit is its own: it gets an error, and the machine does not notice."""
    free = os.statvfs("/tmp").f_bavail

    taken, error = server.invoke(name, way).json()

    assert taken <= most
    assert error == refusal or (refusal is None and error)
    assert abs(os.statvfs("/tmp").f_bavail - free) * 4096 < 512 << 20
    assert server.invoke(name, "files").json()[0] == server.invoke(name, "files").json()[0]


@with_cgroups
def test_zombies_do_not_accumulate(server: Server, name: str):
    """Pid 1 of each sandbox buries what lost its parent."""
    assert server.invoke(name, "zombies").json() < 20


def test_the_least_limits_that_may_be_declared_are_enough_to_run(server: Server):
    """What the runtime itself uses comes on top."""
    name = server.deploy("hello", "tiny", limits={"memoryMb": 16, "processes": 2, "openFiles": 32})

    assert [server.call(name).status for _ in range(3)] == [200] * 3


@with_cgroups
def test_nothing_of_a_dead_sandbox_stays(server: Server):
    """Its control groups go with it."""
    name = server.deploy("hello", "buried", keepAliveSeconds=0)
    server.call(name)

    def leftovers() -> list[str]:
        pool = server.pool()
        alive = {each["id"] for each in (*pool["sandboxes"], *pool["zygotes"])}
        kept = [set(os.listdir(folder)) for folder in cgroup_folders(server.pid)]
        return sorted({n for names in kept for n in names if n.startswith("sb-")} - alive)

    assert cgroup_folders(server.pid)
    assert not eventually_none(leftovers)
