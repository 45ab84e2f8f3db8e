"""What an idle sandbox costs in memory: proportional set size, all of its processes.

python -m bench.density [SANDBOXES]
"""

import sys
from pathlib import Path

from bench import harness


def pss_kib(pid: int) -> int:
    """The proportional set size of one process."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))


def descendants(pid: int) -> list[int]:
    """Every process below *pid*."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [p for child in map(int, children) for p in (child, *descendants(child))]


def available_kib() -> int:
    """MemAvailable of the machine."""
    text = Path("/proc/meminfo").read_text()
    return next(
        int(line.split()[1]) for line in text.splitlines() if line.startswith("MemAvailable")
    )


def main(number: int) -> None:
    """Measure and report."""
    report = harness.Report("density")
    with harness.server("--generic-min", "0", "--generic-max", "0") as server:
        before = available_kib()
        alone = pss_kib(server.process.pid)
    with harness.server("--generic-min", str(number), "--generic-max", str(number)) as server:
        server.wait_generic(number)
        after = available_kib()
        (launcher,) = [
            int(p)
            for p in Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
            .read_text()
            .split()
        ]
        boxes = [pss_kib(pid) for pid in descendants(launcher)]
        own = pss_kib(server.process.pid)
    each = sum(boxes) / 1024 / number
    report.row(f"PSS of an idle generic sandbox ({number} of them), MiB", mib=round(each, 2))
    report.row("MemAvailable taken by each, MiB", mib=round((before - after) / 1024 / number, 2))
    report.row(
        "PSS of the server itself, none / all sandboxes, MiB",
        mib=f"{alone / 1024:.1f} / {own / 1024:.1f}",
    )
    report.bar("PSS of an idle generic sandbox, MiB", each, 12)
    report.finish()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
