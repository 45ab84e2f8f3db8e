"""What an idle sandbox costs: proportional set size of all its processes, and MemAvailable.

    python -m bench.density [SANDBOXES]

Generic sandboxes, forked and started, and forked ones that hold a small function and have answered.
A zygote and what keeps it count as its sandboxes'. `server_kib` is what the server needs more.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench import harness

SETTLE_S = 1.0


def available_kib() -> int:
    """MemAvailable of the machine, once it has come to rest."""
    time.sleep(SETTLE_S)
    text = Path("/proc/meminfo").read_text()
    return next(
        int(line.split()[1]) for line in text.splitlines() if line.startswith("MemAvailable")
    )


def sandboxes_kib(server: harness.Server) -> int:
    """PSS of everything below the launcher."""
    return sum(map(harness.pss_kib, harness.descendants(server.launcher)))


def each(number: int, how: str, fill: Callable[[harness.Server, int], None]) -> dict[str, float]:
    """MiB that one of *number* sandboxes costs, on a server that had none before *fill*."""
    bounds = ("--generic-min", "0", "--generic-max", str(number), "--prewarm", how)
    with harness.server(*bounds) as server:
        before, own = available_kib(), harness.private_kib(server.process.pid)
        fill(server, number)
        after = available_kib()
        return {
            "n": number,
            "pss_mib": round(sandboxes_kib(server) / 1024 / number, 2),
            "available_mib": round((before - after) / 1024 / number, 2),
            "server_kib": round((harness.private_kib(server.process.pid) - own) / number, 1),
        }


def generic(server: harness.Server, number: int) -> None:
    """*number* generic sandboxes: an environment of its own asks for them."""
    body = b'{"requirements": "", "genericMin": %d}' % number
    server.admin("PUT", "/namespaces/default/environments/mine", body)
    server.deploy("user", server.upload(harness.HELLO), environment="mine")
    server.wait_generic(number)


def used(server: harness.Server, number: int) -> None:
    """*number* functions that have answered once."""
    package = server.upload(harness.HELLO)
    for i in range(number):
        server.deploy(f"f{i}", package, keepAliveSeconds=3600)
        server.call(f"f{i}")
    server.wait(lambda pool: pool["phases"].get("idle", 0) == number)


def main(number: int) -> None:
    """Measure and report."""
    report = harness.Report("density")
    started = each(number, "exec", generic)
    forked = each(number, "fork", generic)
    holding = each(number, "fork", used)
    report.row("idle generic sandbox, started", **started)
    report.row("idle generic sandbox, forked", **forked)
    report.row("idle sandbox of a function, forked", **holding)
    report.bar("PSS of an idle generic sandbox, started, MiB", started["pss_mib"], 12)
    report.bar("PSS of an idle generic sandbox, forked, MiB", forked["pss_mib"], 2)
    report.bar("MemAvailable taken by one, forked, MiB", forked["available_mib"], 2)
    report.finish()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
