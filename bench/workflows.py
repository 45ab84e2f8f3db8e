"""Workflows: what a durable step costs in a chain, and a fan-out of 40; and the same elsewhere.

    python -m bench.workflows [STEPS]

Ours: a chain of STEPS (1,000) steps that do nothing, each the same handler in a sandbox that is
isolated, each end on the disk (fdatasync) before the next begins; from one end to the next as the
run's tree tells it, and the whole as the client sees it, from its POST until it is told of the
end. Then 40 at once of a handler that takes 1 ms: in a run whose steps have no sandbox yet, and in
others after it.

Beside it, each in a process of its own, after a few steps to warm up, and as it comes unless said:

* DBOS: a workflow that calls a step, in SQLite. The step runs in the workflow's own process. As it
  comes its SQLite waits for the disk in a rollback journal; also with `journal_mode=WAL` and
  `synchronous=NORMAL`, which waits for no disk at each step: a crash of the machine costs steps.
* Prefect: a flow that calls a task, with its ephemeral server and SQLite; logging is off. The task
  runs in the flow's own process.
* Ray: a remote function that takes what the last returned, on workers of this machine; nothing is
  written down. The chain is handed over whole, which is the fastest that Ray can.

All take turns, so that a machine that changes changes all, and the best turn of each counts.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

from bench import harness

TURNS = 3
OTHERS_STEPS_MAX = 1000
FAN, FANS = 40, 9
WAIT_S = 60
"""For a run's end, with one request, as `dayfly run start` waits."""

NOTHING = "def handler(event, context):\n    return None\n"
MILLISECOND = "import time\ndef handler(event, context):\n    time.sleep(0.001)\n"
DBOS = """
import sys, tempfile, time
from dbos import DBOS
number, is_wal = int(sys.argv[1]), len(sys.argv) > 2
if is_wal:
    from sqlalchemy import Engine, event
    @event.listens_for(Engine, "connect")
    def relax(connection, record):
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
url = f"sqlite:///{tempfile.mkdtemp(dir=sys.path[0])}/dbos.sqlite"
DBOS(config={"name": "chain", "system_database_url": url, "log_level": "CRITICAL",
             "run_admin_server": False})
@DBOS.step()
def noop(n):
    return n
@DBOS.workflow()
def chain(number):
    n = 0
    for _ in range(number):
        n = noop(n)
    return n
DBOS.launch()
chain(20)
started = time.perf_counter()
chain(number)
print("took", time.perf_counter() - started, flush=True)
DBOS.destroy()
"""
PREFECT = """
import os, sys, tempfile, time
os.environ |= {
    "PREFECT_HOME": tempfile.mkdtemp(dir=sys.path[0]), "PREFECT_API_URL": "",
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true", "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_ENABLED": "false", "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180", "DO_NOT_TRACK": "1",
}
from prefect import flow, task
number = int(sys.argv[1])
@task
def noop(n):
    return n
@flow
def chain(number):
    n = 0
    for _ in range(number):
        n = noop(n)
    return n
chain(20)
started = time.perf_counter()
chain(number)
print("took", time.perf_counter() - started, flush=True)
"""
RAY = """
import os, sys, time
import ray
number = int(sys.argv[1])
ray.init(num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False,
         logging_level="ERROR")
@ray.remote
def noop(n):
    return n
def chain(number):
    ref = 0
    for _ in range(number):
        ref = noop.remote(ref)
    return ray.get(ref)
chain(100)
started = time.perf_counter()
chain(number)
print("took", time.perf_counter() - started, flush=True)
"""
OTHERS = {
    "DBOS, SQLite": (DBOS, []),
    "DBOS, SQLite that waits for no disk": (DBOS, ["wal"]),
    "Prefect, ephemeral server": (PREFECT, []),
    "Ray, chain of remote calls": (RAY, []),
}


def declare(server: harness.Server, name: str, source: str, steps: list[dict[str, Any]]) -> None:
    """A workflow of these steps, of one package."""
    spec = {"package": server.upload(source), "steps": steps}
    body = json.dumps(spec).encode()
    server.admin("PUT", f"/namespaces/default/workflows/{name}", body)


def run(server: harness.Server, workflow: str) -> tuple[float, Any]:
    """(seconds until we are told that it is over, its tree) of one run."""
    started = time.perf_counter()
    view = server.admin("POST", f"/namespaces/default/workflows/{workflow}/runs", b"{}")
    path = f"/namespaces/default/runs/{view['metadata']['name']}"
    while not (status := server.admin("GET", f"{path}?brief&wait={WAIT_S}")["status"])["endedAt"]:
        pass
    took_s = time.perf_counter() - started
    if status["state"] != "Succeeded":
        raise RuntimeError(status)
    return took_s, server.admin("GET", path)["view"]["tree"]


def chain(server: harness.Server) -> tuple[float, list[float]]:
    """(seconds in all, seconds from each end to the next), of a run of the chain."""
    took_s, tree = run(server, "chain")
    ends = [tree["beganAt"], *(step["endedAt"] for step in tree["children"])]
    return took_s, [after - before for before, after in itertools.pairwise(ends)]


def other(code: str, number: int, *arguments: str) -> float:
    """Seconds a step of somebody else."""
    python = os.environ.get("DAYFLY_BENCH_PYTHON", f"{sys.prefix}/bench/bin/python")
    folder = tempfile.mkdtemp(prefix="dayfly-bench-")
    place = f"{folder}/main.py"
    quiet = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
    quiet.pop("PYTHONPATH", None)
    try:
        with open(place, "w") as file:
            file.write(code)
        command = [python, place, str(number), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=quiet, timeout=900)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("took ")]
    if not found:
        raise RuntimeError(done.stdout[-1000:] + done.stderr[-2000:])
    return float(found[0]) / number


def main(number: int) -> None:
    """Measure and report."""
    report = harness.Report("workflows")
    server = harness.Server()
    ours: list[tuple[float, list[float]]] = []
    theirs: dict[str, list[float]] = {name: [] for name in OTHERS}
    try:
        server.wait_generic(1)
        same = {"handler": "main:handler"}
        after = [[], *([f"s{n}"] for n in range(number - 1))]
        steps = [{"name": f"s{n}", "runAfter": after[n]} | same for n in range(number)]
        declare(server, "chain", NOTHING, steps)
        matrix = {"params": {"n": list(range(FAN))}}
        declare(server, "fan", MILLISECOND, [{"name": "each", "matrix": matrix} | same])
        fans = [run(server, "fan")[0] for _ in range(FANS)]
        chain(server)
        for _ in range(TURNS):
            ours.append(chain(server))
            for name, (code, arguments) in OTHERS.items():
                took_s = other(code, min(number, OTHERS_STEPS_MAX), *arguments)
                theirs[name].append(took_s)
    finally:
        server.stop()
    took_s, each_s = min(ours, key=lambda turn: turn[0])
    each_s = sorted(each_s)
    p50_ms, p99_ms = each_s[len(each_s) // 2] * 1000, each_s[len(each_s) * 99 // 100] * 1000
    ours_ms = took_s / number * 1000
    report.row("Dayfly", ms_a_step=round(ours_ms, 3), p50=round(p50_ms, 3), p99=round(p99_ms, 3))
    for name, found in theirs.items():
        report.row(name, ms_a_step=round(min(found) * 1000, 3))
    report.row(f"Dayfly, fan-out of {FAN}", first_ms=round(fans[0] * 1000),
               others_ms=round(sorted(fans[1:])[len(fans) // 2] * 1000))  # fmt: skip
    report.bar("p50 of a durable step, ms", p50_ms, 2)
    ratio = {name: min(found) * 1000 / ours_ms for name, found in theirs.items()}
    report.bar("DBOS / ours", ratio["DBOS, SQLite"], 1.2, at_least=True)
    report.bar("Prefect / ours", ratio["Prefect, ephemeral server"], 8, at_least=True)
    report.bar("Ray / ours", ratio["Ray, chain of remote calls"], 1, at_least=True)
    report.bar(f"seconds of a fan-out of {FAN}, the first", fans[0], 0.3)
    report.bar(f"seconds of a fan-out of {FAN}, the slowest after", max(fans[1:]), 0.3)
    report.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("steps", type=int, nargs="?", default=1000)
    main(parser.parse_args().steps)
