"""Very many functions, each with an idle sandbox: whether they fit, and what warm calls cost.

    python -m bench.many [FUNCTIONS]

A kernel that looks at every page's users, and a program that looks at every process or network,
work the more the more sandboxes there are, and a call waits for the processors that they hold. So
each call is measured twice: as it is, and without the time that the client, the server and the
sandbox were ready to run and had to wait. `kernel_cpus` and `others_cpus` are the processors that
kernel threads, and programs that are not ours, kept busy during the calls; `sandboxes_cpus` those
of the sandboxes, of which one at a time is called.
"""

import os
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


class Calls:
    """Warm calls, one after the other."""

    def __init__(self, server: harness.Server) -> None:
        self._server, self._pids = server, server.sandbox_pids()
        self.times: list[float] = []
        self.waits: list[float] = []
        """Of the time of each call, how long somebody was ready and waited for a processor."""

        self.cold = 0

    def make(self, names: list[str]) -> None:
        """Call each of *names*."""
        server = self._server
        for name in names:
            pids = [os.getpid(), server.process.pid, *self._pids.get(f"default/{name}", ())]
            before = harness.waited_us(pids)
            took_s, response = server.call(name)
            self.waits.append((harness.waited_us(pids) - before) / 1e6)
            self.times.append(took_s)
            self.cold += response.headers["Dayfly-Start"] != "warm"

    @property
    def undisturbed(self) -> list[float]:
        """Seconds of each call, without its waiting."""
        return [max(0.0, t - w) for t, w in zip(self.times, self.waits, strict=True)]


def refaulted_pages() -> int:
    """Pages of files that this machine had taken from memory too early, so far."""
    for line in Path("/proc/vmstat").read_text().splitlines():
        if line.startswith("workingset_refault_file "):
            return int(line.split()[1])
    return 0


def measure(number: int) -> tuple[dict[str, float], Calls]:
    """(costs, warm calls) with *number* functions."""
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
        first, calls = Calls(server), Calls(server)
        first.make(every)
        calls.cold = first.cold
        refaults, used, started = refaulted_pages(), server.processors_s(), time.monotonic()
        calls.make(chosen.choices(every, k=CALLS))
        now, took_s = server.processors_s(), time.monotonic() - started
        costs["refaulted_pages"] = refaulted_pages() - refaults
        for whose, so_far_s in now.items():
            costs[f"{whose}_cpus"] = round((so_far_s - used[whose]) / took_s, 2)
        return costs, calls


def main(number: int) -> None:
    """Measure and report."""
    report = harness.Report("many")
    few_costs, few = measure(FEW)
    costs, many = measure(number)
    for label, calls, cost in ((FEW, few, few_costs), (number, many, costs)):
        report.row(f"warm calls, {label} functions", **harness.milliseconds(calls.times), **cost)
        undisturbed = harness.milliseconds(calls.undisturbed)
        report.row("  without waiting for a processor", **undisturbed)
    report.bar("calls that were not warm", many.cold + few.cold, 0)
    ratio = harness.percentile(many.times, 99) / harness.percentile(few.times, 99)
    report.bar(f"warm p99, {number} / {FEW} functions", ratio, 2)
    ratio = harness.percentile(many.undisturbed, 99) / harness.percentile(few.undisturbed, 99)
    report.bar("the same without waiting for a processor", ratio, 2)
    report.finish()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5000)
