"""How fast the pool of generic sandboxes fills, forked and started, against starting Python.

    python -m bench.refill [SANDBOXES]

The rate is that of a server that fills an empty pool, from its first generic sandbox to its last,
read from its log; the single fork is the refill after a sandbox was taken, with all namespaces and
until the guest says that it is ready.
"""

import json
import sys
import time
from datetime import datetime

from bench import harness

SINGLE = 50


def ready(server: harness.Server) -> list[tuple[float, float]]:
    """(moment, seconds that it took) of every sandbox that got ready."""
    found = []
    for line in server.log.read_text().splitlines():
        if '"sandbox ready"' in line:
            entry = json.loads(line)
            found.append((datetime.fromisoformat(entry["time"]).timestamp(), entry["took_s"]))
    return found


def rate(number: int, *options: str) -> float:
    """Sandboxes per second while an empty pool is filled with *number* of them."""
    bounds = ("--generic-min", str(number), "--generic-max", str(number))
    with harness.server(*bounds, *options) as server:
        server.wait_generic(number)
        moments = [moment for moment, _ in ready(server)]
    return (len(moments) - 1) / (moments[-1] - moments[0])


def singles() -> tuple[list[float], list[float]]:
    """(seconds of each refill, seconds of `python -I -S -c pass`), in turn."""
    pythons = []
    with harness.server("--generic-min", "2", "--generic-max", "2") as server:
        package = server.upload(harness.HELLO)
        for i in range(SINGLE):
            server.deploy(f"f{i}", package)
        server.wait_generic(2)
        before = len(ready(server))
        for i in range(SINGLE):
            server.call(f"f{i}")
            server.wait_generic(2)
            time.sleep(0.02)
            pythons.append(harness.start_python())
        forks = [took_s for _, took_s in ready(server)[before:]]
    return forks, pythons


def main(number: int) -> None:
    """Measure and report."""
    report = harness.Report("refill")
    rates = {how: rate(number, "--prewarm", how) for how in ("fork", "exec")}
    for how, per_s in rates.items():
        report.row(f"generic sandboxes per second, {how}", n=number, per_s=round(per_s, 1))
    forks, pythons = singles()
    report.row("python", **harness.milliseconds(pythons))
    report.row("a single fork", **harness.milliseconds(forks))
    report.bar("generic sandboxes per second, forked", rates["fork"], 100, at_least=True)
    report.bar("a fork p50 / python p50", harness.median(forks) / harness.median(pythons), 0.5)
    report.finish()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
