"""Array jobs while their server is killed, or told to stop, again and again.

What tasks did is written down here, not asked of the server. More, and the same again:
DAYFLY_KILLS=300 DAYFLY_SEED=7 pytest tests/faults/test_jobs.py
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.faults.test_history import Notes
from tests.harness import Reply, Server, cgroup_folders, eventually
from tests.servers import Postgres

pytestmark = [
    pytest.mark.waits,
    pytest.mark.skipif(os.geteuid() != 0, reason="finds processes by control group"),
    pytest.mark.timeout(1800),
]
KILLS = int(os.environ.get("DAYFLY_KILLS", "4"))
SEED = int(os.environ.get("DAYFLY_SEED", "0")) or random.randrange(1, 1 << 30)
SIZE, ITEMS, FAILS_EVERY, NEVER = 300 * KILLS, 15 * KILLS, 50, 97
HANDLER = """
import json, os, socket, time

told = socket.create_connection(("127.0.0.1", %d))

def tell(what, index):
    told.sendall(json.dumps([what, index, os.environ["JOB_NAME"]]).encode() + b"\\n")

def handler(event, context):
    index = event["index"]
    tell("began", index)
    time.sleep(0.002)
    if index %% %d == 0 and event["retry"] == 0 or index %% %d == 0:
        tell("failed", index)
        raise ValueError("as it should")
    tell("ended", index)
    return {"index": index, "squared": index * index}
"""
SCRIPT = """
[ "$JOB_INDEX_RETRY_COUNT$(($JOB_INDEX % 10))" = 00 ] && exit 3
cat >$DAYFLY_RESULT
"""


@pytest.fixture(params=["sqlite", "postgres"])
def server(request: pytest.FixtureRequest, tmp_path: Path, new_server: Any) -> Iterator[Server]:
    """A server for this test alone, whose jobs are in its own file or in a database."""
    with ExitStack() as stack:
        arguments = []
        if request.param == "postgres":
            (tmp_path / "dsn").write_text(stack.enter_context(Postgres()).dsn)
            arguments = ["--events-dsn-file", str(tmp_path / "dsn")]
        started: Server = new_server(*arguments)
        yield started
        started.stop()  # before its database


class Jobs:
    """Two jobs: one of a function, and one of a script with items."""

    def __init__(self, server: Server) -> None:
        self.server, self.notes = server, Notes()
        code = HANDLER % (self.notes.server_address[1], FAILS_EVERY, NEVER)
        name = server.deploy("tells", files={"main.py": code}, network="host")
        common = {"parallelism": 4, "backoffLimitPerIndex": 1, "backoffSeconds": 0}
        self._put("many", common | {"function": name, "size": SIZE})
        items = [{"n": n, "text": "x" * n} for n in range(ITEMS)]
        self._put("items", common | {"script": SCRIPT, "items": items})
        self.items = items

    def _put(self, name: str, spec: Any) -> None:
        reply = self.server.ask("PUT", f"/namespaces/default/jobs/{name}", spec)
        assert reply.status == 201, reply.body

    def status(self, name: str) -> Any:
        return self._get(name, "").json()["status"]

    def _get(self, name: str, path: str) -> Reply:
        reply = self.server.ask("GET", f"/namespaces/default/jobs/{name}{path}")
        assert reply.status == 200, reply.body
        return reply

    @property
    def done(self) -> int:
        """How many tasks have ended."""
        states = [self.status(name) for name in ("many", "items")]
        return sum(status["succeeded"] + status["failed"] for status in states)

    @property
    def are_over(self) -> bool:
        return all(self.status(name)["endedAt"] for name in ("many", "items"))

    def results(self, name: str) -> list[tuple[int, Any]]:
        """As they stand there, page by page."""
        found, after = [], "0"
        while True:
            reply = self._get(name, f"/results?after={after}")
            lines = [json.loads(line) for line in reply.body.splitlines()]
            found += [(line["index"], line["result"]) for line in lines]
            if not (after := reply.headers.get("Dayfly-After", "")):
                return found

    def check(self) -> None:
        """All is as in a run that nobody disturbed."""
        never = [n for n in range(SIZE) if n % NEVER == 0]
        once = [n for n in range(0, SIZE, FAILS_EVERY) if n not in never]
        many, items = self.status("many"), self.status("items")
        assert (many["state"], many["reason"]) == ("Failed", "FailedIndexes")
        assert (many["succeeded"], many["failed"]) == (SIZE - len(never), len(never))
        assert many["failures"] == 2 * len(never) + len(once)
        told = Counter((each["index"], each["retry"]) for each in many["failedTasks"])
        expected = [(n, 0) for n in once] + [(n, retry) for n in never for retry in (0, 1)]
        assert told == Counter(expected)
        squares = {n: {"index": n, "squared": n * n} for n in range(SIZE) if n not in never}
        found = self.results("many")
        assert len(found) == len(squares)
        assert dict(found) == squares
        assert (items["state"], items["succeeded"]) == ("Complete", ITEMS)
        assert items["failures"] == len(range(0, ITEMS, 10))
        assert sorted(self.results("items"), key=lambda each: each[0]) == list(
            enumerate(self.items)
        )
        assert {n for what, n, *_ in self.notes.lines if what == "began"} == {*range(SIZE)}

    @property
    def ran_again(self) -> int:
        """Tasks of the first that ended more often than is written."""
        ends = Counter(n for what, n, *_ in self.notes.lines if what != "began")
        expected = {n: 1 for n in range(SIZE)} | {n: 2 for n in range(0, SIZE, NEVER)}
        expected |= {n: 2 for n in range(0, SIZE, FAILS_EVERY)}
        return sum(ends[n] - times for n, times in expected.items())

    def forget(self) -> None:
        """Nothing is left of them."""
        for name in ("many", "items"):
            path = f"/namespaces/default/jobs/{name}"
            assert self.server.ask("DELETE", path).status == 204
        assert self.server.ask("GET", "/jobs").json() == []


def disturb(jobs: Jobs, draw: random.Random, number: int, strike: Callable[[Server], None]) -> int:
    """*number* strikes, spread over the jobs' lives; returns how many hit them."""
    server, hits = jobs.server, 0
    for round_ in range(number):
        done = (SIZE + ITEMS) * (round_ + draw.random()) / number
        if not eventually(lambda done=done: jobs.done >= done or jobs.are_over, 120):
            raise AssertionError(f"seed {SEED}: {jobs.status('many')} {jobs.status('items')}")
        time.sleep(draw.random() / 10)
        hits += not jobs.are_over
        dead = server.pid
        strike(server)
        assert eventually(lambda dead=dead: not cgroup_folders(dead))
    assert eventually(lambda: jobs.are_over, 120), (SEED, jobs.status("many"))
    return hits


def test_a_job_whose_server_is_killed_ends_as_if_nothing_had_been(server: Server):
    """Every index ends once in the books, whatever had been written; some tasks ran twice."""

    def kill(server: Server) -> None:
        server.kill(signal.SIGKILL)
        server.wait()
        server.start()

    jobs = Jobs(server)
    hits = disturb(jobs, random.Random(SEED), KILLS, kill)
    jobs.check()

    assert hits > KILLS / 2
    print(f"seed {SEED}: {hits} kills, {jobs.ran_again} tasks of {SIZE} ran again", file=sys.stderr)
    jobs.forget()


def test_a_job_whose_server_is_stopped_in_order_runs_nothing_twice(server: Server):
    """SIGTERM: what runs may end, what ended is written, and who comes next goes on with it."""

    def stop(server: Server) -> None:
        assert server.stop() == 0, server.log[-20:]
        server.start()

    jobs = Jobs(server)
    hits = disturb(jobs, random.Random(SEED), max(3, KILLS // 3), stop)
    jobs.check()

    assert hits > 1
    assert jobs.ran_again == 0
    jobs.forget()
