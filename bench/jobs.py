"""Array jobs: tasks per second and what they cost the server's memory; and what HTTP feels of them.

    python -m bench.jobs [TASKS]

The job: TASKS (100,000) that do nothing, written down as they end. So many of the same with Ray and
with Dask (20,000), which write nothing down, each with a worker for each processor. Then a function
over HTTP at 30 % of what it can take, a new request whenever its time has come (so that no answer
that is late keeps the next one from being asked for): alone, while a job of no-ops fills the pool
(32 sandboxes, of which jobs may have 28), and while one does whose tasks keep a processor busy for
100 ms each; in turns, so that a machine that changes changes all three.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import uvloop

from bench import harness
from bench.warm import wrk

PARALLEL = 4
"""Tasks at once: more than there are processors, so that none waits for the server."""

SANDBOXES_MAX, JOBS_MAX = 32, 28
"""Of the pool, and of these those that jobs may have."""

SHARE, CONNECTIONS, SECONDS, TURNS = 0.3, 64, 5, 3
FOR_EVER = 10_000_000
OTHERS_TASKS_MAX = 20_000
NOTHING = "def handler(event, context):\n    return None\n"
BURN = """
import time

def handler(event, context):
    end = time.thread_time() + 0.1
    while time.thread_time() < end:
        pass
"""
RAY = """
import os, sys, time, ray
number, workers = map(int, sys.argv[1:])
ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
@ray.remote
def task(index):
    return None
ray.get([task.remote(index) for index in range(1000)])
started = time.perf_counter()
ray.get([task.remote(index) for index in range(number)])
print("took", time.perf_counter() - started)
"""
DASK = """
import sys, time
from distributed import Client, LocalCluster
def task(index):
    return None
if __name__ == "__main__":
    number, workers = map(int, sys.argv[1:])
    with LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None,
                      silence_logs=50) as cluster, Client(cluster) as client:
        client.gather(client.map(task, range(1000), pure=False))
        started = time.perf_counter()
        client.gather(client.map(task, range(number), pure=False))
        print("took", time.perf_counter() - started)
"""


def put(server: harness.Server, name: str, **spec: Any) -> None:
    """Declare a job."""
    body = json.dumps({"parallelism": PARALLEL} | spec).encode()
    server.admin("PUT", f"/namespaces/default/jobs/{name}", body)


def status(server: harness.Server, name: str) -> Any:
    """How far it is."""
    return server.admin("GET", f"/namespaces/default/jobs/{name}?brief")["status"]


def memory_mib(server: harness.Server) -> float:
    """What the server itself holds."""
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(next(x.split()[1] for x in text.splitlines() if x.startswith("VmRSS"))) / 1024


def array(server: harness.Server, number: int) -> dict[str, float]:
    """A job of *number* tasks that do nothing: per second, MiB that it took on top, at most."""
    before, most = memory_mib(server), 0.0
    cost = harness.processor_us([server.process.pid])
    started = time.perf_counter()
    put(server, f"array-{number}", function="nothing", size=number)
    while not (last := status(server, f"array-{number}"))["endedAt"]:
        most = max(most, memory_mib(server))
        time.sleep(0.1)
    took_s = time.perf_counter() - started
    if last["succeeded"] != number:
        raise RuntimeError(last)
    cost = harness.processor_us([server.process.pid]) - cost
    return {
        "tasks_per_s": round(number / took_s),
        "more_mib": round(most - before, 1),
        "server_us": round(cost / number, 1),
    }


def other(code: str, number: int) -> float:
    """Tasks per second of somebody else."""
    python = os.environ.get("DAYFLY_BENCH_PYTHON", f"{sys.prefix}/bench/bin/python")
    # a file, because Dask's workers import what they run
    place = Path(tempfile.mkdtemp(prefix="dayfly-bench-")) / "main.py"
    place.write_text(code)
    command = [python, str(place), str(number), str(os.cpu_count() or 1)]
    quiet = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=quiet, timeout=900)
    finally:
        shutil.rmtree(place.parent)
    found = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("took ")]
    if not found:
        raise RuntimeError(done.stdout[-1000:] + done.stderr[-2000:])
    return number / float(found[0])


# ---- HTTP beside a job --------------------------------------------------------------------------


class Caller(asyncio.Protocol):
    """One connection, on which one request at a time is made."""

    def __init__(self, free: list["Caller"], took: list[float]) -> None:
        self._free, self._took, self._due, self._got = free, took, 0.0, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It can be used."""
        self._transport: Any = transport
        self._free.append(self)

    def ask(self, request: bytes, due: float) -> None:
        """Send one that was due then."""
        self._due = due
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """An answer is there when its two bytes are."""
        self._got += data
        if self._got.endswith(b"\r\n\r\nok"):
            if not self._got.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(self._got.decode())
            self._took.append(time.perf_counter() - self._due)
            self._got = b""
            self._free.append(self)


async def load(port: int, rate: float, seconds: float) -> list[float]:
    """Seconds from when each request was due until it was answered."""
    loop = asyncio.get_running_loop()
    free: list[Caller] = []
    took: list[float] = []
    for _ in range(CONNECTIONS):
        await loop.create_connection(lambda: Caller(free, took), "127.0.0.1", port)
    request = b"GET /fn/small HTTP/1.1\r\nHost: localhost\r\n\r\n"
    start, sent = time.perf_counter() + 0.1, 0
    while sent < rate * seconds:
        due = start + sent / rate
        if (left := due - time.perf_counter()) > 0:
            await asyncio.sleep(left)
        elif not free:
            await asyncio.sleep(0)
        else:
            free.pop().ask(request, due)
            sent += 1
    while len(took) < sent:  # noqa: ASYNC110 - nobody else is there
        await asyncio.sleep(0.01)
    return took


@contextmanager
def filled(server: harness.Server, name: str, function: str) -> Iterator[None]:
    """While a job has all that the pool gives it."""
    if function:
        put(server, name, function=function, size=FOR_EVER, parallelism=100)
        while not status(server, name)["succeeded"]:
            time.sleep(0.05)
        while status(server, name)["running"] < JOBS_MAX:
            time.sleep(0.05)
        time.sleep(1)
    try:
        yield
    finally:
        if function:
            body = json.dumps({"cancel": "hard"}).encode()
            server.admin("PATCH", f"/namespaces/default/jobs/{name}", body)
            while not status(server, name)["endedAt"]:
                time.sleep(0.05)


def processors(server: harness.Server, stop: threading.Event, shares: list[float]) -> None:
    """Of the time that passes, what the server uses of one processor."""
    while not stop.is_set():
        before, at = harness.processor_us([server.process.pid]), time.perf_counter()
        stop.wait(1)
        used = harness.processor_us([server.process.pid]) - before
        shares.append(used / 1e6 / (time.perf_counter() - at))


def beside(server: harness.Server, report: harness.Report) -> dict[str, float]:
    """p99 over HTTP beside each of the jobs, over that of an idle pool."""
    url = f"http://127.0.0.1:{server.port}/fn/small"
    wrk(url, 1, 1)
    capacity = wrk(url, CONNECTIONS, SECONDS)["requests_per_s"]
    rate = capacity * SHARE
    report.row("HTTP, as much as it takes", per_s=round(capacity))
    times: dict[str, list[float]] = {"": [], "nothing": [], "burn": []}
    p99: dict[str, list[float]] = {"": [], "nothing": [], "burn": []}
    shares: dict[str, list[float]] = {"": [], "nothing": [], "burn": []}
    for turn in range(TURNS):
        for function in times:
            time.sleep(1)
            with filled(server, f"{function}-{turn}", function):
                stop = threading.Event()
                watch = threading.Thread(target=processors, args=(server, stop, shares[function]))
                watch.start()
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    found = runner.run(load(server.port, rate, SECONDS))
                stop.set()
                watch.join()
            times[function] += found
            p99[function].append(harness.percentile(found, 99))
    for function, name in {
        "": "alone",
        "nothing": "beside no-ops",
        "burn": "beside 100 ms",
    }.items():
        figures = harness.milliseconds(times[function])
        share = round(harness.median(shares[function]), 2)
        report.row(f"HTTP at {SHARE:.0%}, {name}", per_s=round(rate), **figures, server_share=share)
    idle = harness.median(p99[""])
    return {function: harness.median(p99[function]) / idle for function in ("nothing", "burn")}


def main(number: int) -> None:
    """Measure and report."""
    report = harness.Report("jobs")
    with harness.server("--sandboxes-max", str(SANDBOXES_MAX)) as server:
        server.deploy("nothing", server.upload(NOTHING))
        server.deploy("burn", server.upload(BURN))
        server.deploy("small", server.upload("def handler(event, context):\n    return 'ok'\n"))
        array(server, 5000)
        ours = array(server, number)
        report.row(f"array job of {number}", **ours)
        ratios = beside(server, report)
    others = {}
    for name, code in (("Ray", RAY), ("Dask", DASK)):
        with suppress(FileNotFoundError):  # it is not for every machine
            others[name] = other(code, min(number, OTHERS_TASKS_MAX))
            report.row(f"the same, {name}", tasks_per_s=round(others[name]))
    report.bar("tasks per second", ours["tasks_per_s"], 3000, at_least=True)
    report.bar("MiB more with all these tasks", ours["more_mib"], 16)
    for name, rate in others.items():
        report.bar(f"tasks per second / {name}", ours["tasks_per_s"] / rate, 1, at_least=True)
    report.bar("HTTP p99 beside no-ops / alone", ratios["nothing"], 1.5)
    report.bar("HTTP p99 beside tasks of 100 ms / alone", ratios["burn"], 1.5)
    report.finish()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
