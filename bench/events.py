"""Durable events: how fast they are accepted, how fast they are run, and what waiting ones cost.

    python -m bench.events [WAITING] [--postgres]

Accepted: POST with `Prefer: respond-async` over 64 connections, each answered 202 when it is on the
disk; of a function that is busy, so that they wait. Run: of one that does nothing, from the first
that is accepted until the last has ended, while more are accepted. Then, with WAITING of them
(1,000,000) in the queue: the server's memory, and both again. The disk's own time for one
`fdatasync` of 32 KiB is measured beside it. With --postgres they are kept there, in one that is
started for it.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from tests.servers import Postgres

from bench import harness
from bench.warm import figures_of

CONNECTIONS, SECONDS, SYNCS, SYNC_BYTES = 64, 5, 500, 32 * 1024
BUSY = "import time\ndef handler(event, context):\n    time.sleep(600)\n"
NOTHING = "def handler(event, context):\n    return 'ok'\n"
LUA = """
wrk.method = "POST"
wrk.body = '{"name": "Ada"}'
wrk.headers["Prefer"] = "respond-async"
"""


def disk(folder: str) -> list[float]:
    """Seconds that `fdatasync` takes for what was appended to a file."""
    times = []
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(SYNCS):
            file.write(bytes(SYNC_BYTES))
            started = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - started)
    return times


def send(server: harness.Server, name: str, script: Path, seconds: int) -> dict[str, float]:
    """Have as many accepted as the server takes; requests per second, milliseconds."""
    url = f"http://127.0.0.1:{server.port}/fn/{name}"
    command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--latency", "-s", str(script)]
    text = subprocess.run([*command, url], check=True, capture_output=True, text=True).stdout
    return figures_of(text)


def series(server: harness.Server, name: str, **labels: str) -> float:
    """One value of the metrics page; 0 where there is none."""
    inner = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return server.metrics().get(f"dayfly_events_{name}{{{inner}}}" if inner else name, 0.0)


def run_all(server: harness.Server, script: Path) -> tuple[float, dict[str, float]]:
    """(events accepted and run to their end per second, how they were accepted)."""
    ran = {"function": "default/nothing", "state": "succeeded"}
    before, started = series(server, "runs_total", **ran), time.perf_counter()
    sent = send(server, "nothing", script, SECONDS)
    while any(series(server, name, function="default/nothing") for name in ("waiting", "running")):
        time.sleep(0.02)
    took_s = time.perf_counter() - started
    return (series(server, "runs_total", **ran) - before) / took_s, sent


def fill(server: harness.Server, script: Path, number: int) -> None:
    """Have at least *number* waiting."""
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("waiting", total=number)
        while (waiting := series(server, "waiting", function="default/busy")) < number:
            progress.update(task, completed=waiting)
            send(server, "busy", script, SECONDS)


def memory_mib(server: harness.Server) -> float:
    """What the server itself holds."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
    return int(kib) / 1024


def measure(report: harness.Report, server: harness.Server, script: Path, what: str) -> Any:
    """Both figures, as rows of the report."""
    accepted = send(server, "busy", script, SECONDS)
    report.row(f"accepted{what}", **accepted)
    rate, sent = run_all(server, script)
    report.row(f"accepted and run{what}", run_per_s=round(rate), **sent)
    return accepted, rate


def main(number: int, *, in_postgres: bool) -> None:
    """Measure and report."""
    report = harness.Report("events-postgres" if in_postgres else "events")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        options: list[str] = []
        if in_postgres:
            file = Path(folder) / "dsn"
            file.write_text(stack.enter_context(Postgres()).dsn)
            options = ["--events-dsn-file", str(file)]
        server = stack.enter_context(harness.server(*options))
        script = Path(folder) / "post.lua"
        script.write_text(LUA)
        times = disk(server.data)
        report.row("fdatasync of 32 KiB, this disk", **harness.milliseconds(times))
        server.deploy("busy", server.upload(BUSY), maxScale=1, timeoutSeconds=3600)
        server.deploy("nothing", server.upload(NOTHING))
        send(server, "nothing", script, 1)
        accepted, rate = measure(report, server, script, "")
        before_mib = memory_mib(server)
        fill(server, script, number)
        more_mib = memory_mib(server) - before_mib
        waiting = series(server, "waiting", function="default/busy")
        report.row("server's memory", waiting=waiting, more_mib=round(more_mib, 1))
        late, late_rate = measure(report, server, script, ", with all these waiting")
    report.bar("accepted per second", accepted["requests_per_s"], 5000, at_least=True)
    report.bar("accepted, p99 in ms", accepted["p99_ms"], 25)
    report.bar("accepted and run per second", rate, 2000, at_least=True)
    report.bar("accepted per second, many waiting", late["requests_per_s"], 5000, at_least=True)
    report.bar("accepted and run per second, many waiting", late_rate, 2000, at_least=True)
    report.bar("MiB more with all these waiting", more_mib, 32)
    report.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("waiting", type=int, nargs="?", default=1_000_000)
    parser.add_argument("--postgres", action="store_true")
    asked = parser.parse_args()
    main(asked.waiting, in_postgres=asked.postgres)
