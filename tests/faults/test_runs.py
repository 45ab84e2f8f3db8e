"""Twenty runs of workflows at a time while their server is killed, or stopped, again and again.

What steps did is written down here, not asked of the server. What had ended is read from the
journal's own file while the server is dead: whatever begins later and is among it has run again
though it was finished. More, and the same again:
DAYFLY_KILLS=300 DAYFLY_SEED=7 pytest tests/faults/test_runs.py, or python -m bench.run_kills 300
"""

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import msgspec
import pytest
from tests.faults.test_history import Notes
from tests.harness import DAYFLY, Server, cgroup_folders, eventually

from dayfly_pool.store.journals import PAGE_MAX
from dayfly_pool.store.sqlite_journals import SqliteJournals
from dayfly_pool.workflow import facts
from dayfly_pool.workflow.run import LOG

pytestmark = [
    pytest.mark.waits,
    pytest.mark.skipif(os.geteuid() != 0, reason="finds processes by control group"),
    pytest.mark.timeout(1800),
]
KILLS = int(os.environ.get("DAYFLY_KILLS", "8"))
SEED = int(os.environ.get("DAYFLY_SEED", "0")) or random.randrange(1, 1 << 30)
RUNS = 20
LINES_MAX = 120
"""Said by steps until the next strike; a quarter of the kills comes while the server starts."""

START_S, STRIKE_S = 0.8, 3.0

OVER_S = 120.0
STATES = {"fan": "Succeeded", "chain": "Succeeded", "flaky": "Completed", "nest": "Succeeded"}
CODE = """
import json, os, socket, time

from dayfly import finally_, sleep, step, workflow

PORT = %d


def tell(what):
    line = [what, *(os.environ[name] for name in ("DAYFLY_RUN", "DAYFLY_STEP", "DAYFLY_ATTEMPT"))]
    with socket.create_connection(("127.0.0.1", PORT)) as told:
        told.sendall(json.dumps([*line, time.monotonic()]).encode() + b"\\n")


def done(value):
    time.sleep(0.003)
    tell("ended")
    return value


@step(network="host")
def add(n: int, to: int = 1) -> int:
    tell("began")
    return done(n + to)


@step(network="host")
def total(numbers: list[int]) -> int:
    tell("began")
    return done(sum(numbers))


@step(network="host", retries={"limit": 3, "backoffSeconds": 0.02})
def flaky(n: int, fails: int) -> int:
    tell("began")
    if int(os.environ["DAYFLY_ATTEMPT"]) <= fails:
        tell("failed")
        raise ValueError("as it should")
    return done(n)


@workflow
def fan(most: int = 30):
    return total(add.map(n=list(range(30)), to=most))


@workflow
def chain():
    n = add(0)
    for _ in range(24):
        n = add(n)
    return n


@workflow(name="flaky")
def flaky_():
    first = flaky(1, 2)
    flaky(2, 9).on_error("continue").named("never")
    third = flaky(first, 1).after(sleep("60ms"))
    add(third).when(third > 100).named("skipped")
    finally_(add(7).named("end"))
    return {"third": third}


@workflow
def inner(n: int):
    many = add.map(n=[1, 2, 3, 4])
    return total(many).after(sleep("40ms"), add(n))


@workflow
def nest():
    first = inner(1)
    second = inner(first)
    return total([first, second])
"""


class Finished(NamedTuple):
    """One attempt of a step whose end is on the disk."""

    run: str
    key: str
    attempt: int


async def finished_in(journals: Path) -> set[Finished]:
    """What a dead server's journals say; a copy of them is read."""
    with TemporaryDirectory() as folder:
        shutil.copytree(journals, folder, dirs_exist_ok=True)
        store = SqliteJournals(Path(folder, "journals.sqlite"), Path(folder, "bodies"))
        await store.open("reader")
        found: set[Finished] = set()
        for journal in await store.page("run", limit=PAGE_MAX):
            name = f"{journal.namespace}/{journal.name}"
            after = 0
            while entries := await store.entries(journal.id, part=LOG, after=after):
                after = entries[-1].number
                for entry in entries:
                    assert not entry.damage, entry
                    is_snapshot, new, *_ = msgspec.msgpack.decode(entry.body)
                    assert not is_snapshot
                    for fact in map(facts.decode, new):
                        if isinstance(fact, facts.Ended | facts.Failed):
                            found.add(Finished(name, fact.key, fact.attempt))
        await store.close()
        return found


class Runs:
    """Twenty at a time, all kinds; each is compared with one that nobody disturbed."""

    def __init__(self, server: Server) -> None:
        self.server, self.notes = server, Notes()
        self.started = 0
        self.open: dict[str, str] = {}
        """Names of those that are not known to be over, and what they are runs of."""

        self.finished: dict[Finished, float] = {}
        """Since when that is known to be so: a server that was dead then had it on the disk."""

        self.hits = 0
        """Strikes while runs were under way."""

        self._declare()
        for name in STATES:
            self._start(name, f"calm-{name}")
        self.calm = {name: self._outcome(f"calm-{name}") for name in STATES}

    def _declare(self) -> None:
        with TemporaryDirectory() as folder:
            (Path(folder) / "flows.py").write_text(CODE % self.notes.server_address[1])
            command = [DAYFLY, "--url", f"http://{self.server.admin}", "workflow", "deploy"]
            subprocess.run([*command, "flows.py"], cwd=folder, check=True, capture_output=True)

    def _start(self, workflow: str, name: str) -> None:
        path = f"/namespaces/default/workflows/{workflow}/runs"
        reply = self.server.ask("POST", path, {"name": name})
        assert reply.status == 201, reply.body

    def _outcome(self, name: str) -> Any:
        """State, results, and how each step went; when it is over."""
        path = f"/namespaces/default/runs/{name}"
        if not eventually(lambda: self.server.ask("GET", path).json()["status"]["endedAt"], OVER_S):
            raise AssertionError(f"seed {SEED}: {name} does not end: {self.server.log[-20:]}")
        view = self.server.ask("GET", path).json()
        steps: dict[str, tuple[str, int]] = {}

        def look(shown: Any) -> None:
            for child in shown.get("children", []):
                steps[child["key"]] = child["state"], child.get("retries", 0)
                look(child)

        look(view["view"]["tree"])
        status = view["status"]
        counts = status["succeeded"], status["failed"]
        return status["state"], status["results"], status["kind"], counts, steps

    def fill(self) -> None:
        """Have twenty that are not over."""
        states = {}
        for view in self.server.ask("GET", "/runs?limit=1000").json():
            states[view["metadata"]["name"]] = view["status"]["state"]
        for name in [name for name in self.open if states[name] in ("Pending", "Running")]:
            states.pop(name)
        for name in self.open.keys() & states.keys():
            self.check(name)
        while len(self.open) < RUNS:
            kind = sorted(STATES)[self.started % len(STATES)]
            name = f"{kind}-{self.started}"
            self._start(kind, name)
            self.open[name] = kind
            self.started += 1

    def check(self, name: str) -> None:
        """It ended as it should have."""
        kind = self.open.pop(name)
        assert self._outcome(name) == self.calm[kind], (SEED, name)
        path = f"/namespaces/default/runs/{name}"
        assert self.server.ask("DELETE", path).status == 204

    def look_at_the_dead(self) -> None:
        """What its journals say has ended is finished, from now on."""
        finished = asyncio.run(finished_in(self.server.data / "journals"))
        self.hits += bool(self.open)
        moment = time.monotonic()
        for each in finished:
            self.finished.setdefault(each, moment)

    @property
    def again(self) -> list[Any]:
        """What was begun though it was finished."""
        begun = [line[1:] for line in self.notes.lines if line[0] == "began"]
        return [
            (run, key, attempt)
            for run, key, attempt, at in begun
            if at >= self.finished.get(Finished(run, key, int(attempt)), float("inf"))
        ]

    @property
    def repeated(self) -> int:
        """Attempts that were begun more than once: they were under way when the server died."""
        begun = Counter(tuple(line[1:4]) for line in self.notes.lines if line[0] == "began")
        return sum(number - 1 for number in begun.values())


def kill(server: Server) -> None:
    """-9, and wait until nothing of it is left."""
    dead = server.pid
    server.kill(signal.SIGKILL)
    server.wait()
    assert eventually(lambda: not cgroup_folders(dead) or not any(
        path.read_text() for folder in cgroup_folders(dead)
        for path in Path(folder).rglob("cgroup.procs")))  # fmt: skip


def disturb(
    runs: Runs,
    draw: random.Random,
    number: int,
    strike: Callable[[Server], None],
    said: Callable[[int], None] | None = None,
) -> None:
    """So many strikes, at random moments; then all runs end, as if nothing had been."""
    server = runs.server
    for done in range(number):
        if strike is not kill or done == 0 or draw.random() < 0.75:  # else: while it starts
            assert eventually(lambda: server.is_ready, 60), server.log[-20:]
            runs.fill()
            lines = len(runs.notes.lines) + draw.randrange(LINES_MAX)
            eventually(lambda lines=lines: len(runs.notes.lines) >= lines, STRIKE_S)
            time.sleep(draw.random() / 100)
        else:
            time.sleep(draw.random() * START_S)
        strike(server)
        runs.look_at_the_dead()
        server.launch()
        if said is not None:
            said(done + 1)
    assert eventually(lambda: server.is_ready, 60), server.log[-20:]
    for name in list(runs.open):
        runs.check(name)


def test_runs_whose_server_is_killed_end_as_if_nothing_had_been(new_server: Any):
    """Every run ends, and as it should; what had ended is not run again."""
    runs = Runs(new_server())
    disturb(runs, random.Random(SEED), KILLS, kill)
    told = f"{runs.hits} kills, {runs.started} runs, {len(runs.finished)} attempts had ended"
    print(f"seed {SEED}: {told}, {runs.repeated} were under way and ran again", file=sys.stderr)

    assert runs.again == []
    assert runs.hits >= KILLS * 0.9
    assert len(runs.finished) > 10 * KILLS


def test_runs_whose_server_is_stopped_in_order_run_nothing_twice(new_server: Any):
    """SIGTERM: what runs may end, what ended is written, and who comes next goes on with it."""

    def stop(server: Server) -> None:
        assert server.stop() == 0, server.log[-20:]

    runs = Runs(new_server())
    disturb(runs, random.Random(SEED), max(3, KILLS // 4), stop)

    assert runs.hits >= 3
    assert runs.again == []
    assert runs.repeated == 0
