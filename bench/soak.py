"""Memory over very many invocations: the server's and its guests' must not grow.

    python -m bench.soak [INVOCATIONS]

wrk calls a silent function and one that writes a log line, in turn. The slope is the least-squares
line through the private memory measured after each turn, without the first third of them: caches
and the log's ring fill up first.
"""

import statistics
import sys

from rich.console import Console
from rich.progress import Progress

from bench import harness, warm

TURN_S, TURNS_MIN = 5, 6
LOUD = "def handler(event, context):\n    print('one line of log')\n    return 'ok'\n"


def slope(points: list[tuple[int, int]]) -> float:
    """KiB more for every 1,000 invocations, over the last two thirds of *points*."""
    settled = points[len(points) // 3 :]
    line = statistics.linear_regression([n for n, _ in settled], [kib for _, kib in settled])
    return line.slope * 1000


def main(invocations: int) -> None:
    """Measure and report."""
    report = harness.Report("soak")
    points: dict[str, list[tuple[int, int]]] = {"server": [], "guests": []}
    done = 0
    with (
        Progress(disable=not sys.stderr.isatty(), console=Console(stderr=True)) as progress,
        harness.server() as server,
    ):
        bar = progress.add_task("invocations", total=invocations)
        for name, source in (("small", warm.SMALL), ("loud", LOUD)):
            server.deploy(name, server.upload(source), maxScale=4, keepAliveSeconds=3600)
        while done < invocations or len(points["server"]) < TURNS_MIN:
            for name in ("small", "loud"):
                url = f"http://127.0.0.1:{server.port}/fn/{name}"
                done += round(warm.wrk(url, 32, TURN_S)["requests_per_s"] * TURN_S)
            guests = harness.descendants(server.process.pid)
            points["server"].append((done, harness.private_kib(server.process.pid)))
            points["guests"].append((done, sum(map(harness.private_kib, guests))))
            progress.update(bar, completed=done)
    for what, measured in points.items():
        first, last = measured[0], measured[-1]
        report.row(what, invocations=done, first_kib=first[1], last_kib=last[1])
    for what, measured in points.items():
        report.bar(f"{what}: KiB more per 1,000 invocations", slope(measured), 1)
    report.finish()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
