"""Very many functions, each with an idle sandbox: whether they fit, and what warm calls cost.

python -m bench.many [FUNCTIONS]
"""

import random
import sys
import time
from pathlib import Path

from bench import density, harness

FEW, CALLS = 10, 2000


def fill(server: harness.Server, number: int) -> None:
    """*number* functions, each called once."""
    package = server.upload(harness.HELLO)
    for i in range(number):
        server.deploy(f"f{i}", package, keepAliveSeconds=86400)
        server.call(f"f{i}")


def warm_calls(server: harness.Server, names: list[str]) -> tuple[list[float], int]:
    """(seconds of each call, how many were not warm)."""
    times, cold = [], 0
    for name in names:
        took_s, response = server.call(name)
        times.append(took_s)
        cold += response.headers["Dayfly-Start"] != "warm"
    return times, cold


def refaulted_pages() -> int:
    """Pages of files that this machine had taken from memory too early, so far."""
    for line in Path("/proc/vmstat").read_text().splitlines():
        if line.startswith("workingset_refault_file "):
            return int(line.split()[1])
    return 0


def measure(number: int) -> tuple[dict[str, float], list[float], int]:
    """(costs, seconds of the warm calls, how many were not warm) with *number* functions."""
    chosen = random.Random(1)  # the same calls in every run
    with harness.server("--sandboxes-max", str(number + 100), "--generic-min", "4") as server:
        server.wait_generic(4)
        before, own = density.available_kib(), harness.private_kib(server.process.pid)
        started = time.monotonic()
        fill(server, number)
        took_s = time.monotonic() - started
        server.wait_generic(4)
        costs = {
            "filled_s": round(took_s, 1),
            "available_mib_each": round((before - density.available_kib()) / 1024 / number, 2),
            "server_kib_each": round((harness.private_kib(server.process.pid) - own) / number, 1),
        }
        every = [f"f{i}" for i in range(number)]
        _, cold = warm_calls(server, every)
        refaults = refaulted_pages()
        times, more = warm_calls(server, chosen.choices(every, k=CALLS))
        costs["refaulted_pages"] = refaulted_pages() - refaults
        return costs, times, cold + more


def main(number: int) -> None:
    """Measure and report."""
    report = harness.Report("many")
    few_costs, few, few_cold = measure(FEW)
    costs, many, cold = measure(number)
    for label, times, cost in ((FEW, few, few_costs), (number, many, costs)):
        report.row(f"warm calls, {label} functions", **harness.milliseconds(times), **cost)
    report.bar("calls that were not warm", cold + few_cold, 0)
    ratio = harness.percentile(many, 99) / harness.percentile(few, 99)
    report.bar(f"warm p99, {number} / {FEW} functions", ratio, 2)
    report.finish()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5000)
