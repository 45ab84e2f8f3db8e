"""From one shard and gateway to four and back, as processes under load: who runs what.

    python -m bench.scale [FUNCTIONS]

Every function tells which shard runs it, and is called through every gateway each time after some
have come or gone. The minimum that must move is the functions of the shards that left, or an even
share for those that came. Meanwhile clients call on and on, as a load balancer does that passes
over who refuses a connection. All of it is on this machine, with one PostgreSQL: what is counted is
who runs what, not what more machines would bring.
"""

import itertools
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from tests.cluster import Cluster, Gateway, Load
from tests.harness import eventually
from tests.servers import Postgres

from bench import harness

FUNCTIONS = 200
SIZES = (4, 2, 1, 2, 4)
SHARDS = tuple(f"pool-{n}" for n in range(max(SIZES)))
CODE = "import os\ndef handler(event, context):\n    return str(os.getppid())\n"
"""Whoever runs it: a shard's functions have one parent."""


def resize(cluster: Cluster, before: int, size: int) -> list[Gateway]:
    """Start or end them one after the other; the gateways that are there then."""
    for name, gateway in zip(SHARDS[before:size], cluster.gateways[before:size], strict=True):
        cluster.shards[name].start()
        gateway.start()
    for name, gateway in zip(SHARDS[size:before], cluster.gateways[size:before], strict=True):
        gateway.stop()
        cluster.shards[name].stop()
    names, running = {*SHARDS[:size]}, cluster.gateways[:size]
    if not eventually(lambda: all(cluster.live(each) == names for each in running), 60):
        sys.exit(f"not every gateway found {sorted(names)}")
    return running


def homes(running: list[Gateway], functions: list[str]) -> list[frozenset[bytes]]:
    """Who ran each function, as each gateway had it run."""

    def ask(function: str) -> frozenset[bytes]:
        replies = [gateway.call(function, b"{}") for gateway in running]
        return frozenset(each.body if each.status == 200 else b"failed" for each in replies)

    with ThreadPoolExecutor(4) as threads:
        return list(threads.map(ask, functions))


def main(number: int) -> None:
    """Measure and report."""
    report = harness.Report("scale")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        database = stack.enter_context(Postgres())
        cluster = Cluster(folder, database, stack, names=SHARDS, gateways=max(SIZES))
        functions = [f"f{n}" for n in range(number)]
        for function in functions:
            cluster.gateways[0].deploy("", function, files={"main.py": CODE}, keepAliveSeconds=5)
        cluster.deploy("always", CODE, keepAliveSeconds=60)
        with Load(cluster.gateways, "/fn/always", "GET", 2) as load:
            found = []
            for before, size in itertools.pairwise((SIZES[0], *SIZES)):
                found.append(homes(resize(cluster, before, size), functions))
                load.more()
        _judge(report, found)
    report.row("requests meanwhile", answered=load.statuses["200"])
    report.bar("requests that failed meanwhile", sum(load.failed.values()), 0)
    report.finish()


def _judge(report: harness.Report, found: list[list[frozenset[bytes]]]) -> None:
    ratios = []
    for (old, before), (new, after) in itertools.pairwise(zip(SIZES, found, strict=True)):
        moved = sum(a != b for a, b in zip(before, after, strict=True))
        if new > old:
            least = len(after) * (new - old) / new
        else:
            least = sum(home not in {*after} for home in before)
        ratios.append(moved / least)
        report.row(f"{old} to {new}", moved=moved, minimum=round(least), shards=len({*after}))
    doubles = sum(len(home) != 1 for homes in found for home in homes)
    report.bar("functions moved, of the minimum", max(ratios), 1.2)
    report.bar("functions that two gateways had run in two shards, or failed", doubles, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else FUNCTIONS)
