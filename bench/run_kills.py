"""kill -9 of the server at random moments of 20 concurrent runs of workflows.

    python -m bench.run_kills [KILLS] [SEED]

Chains, fan-outs, retries with pauses, timers, nested workflows: whenever one is over, another takes
its place, until the server was killed KILLS times (300), a quarter of these while it starts. Every
run must end as one that nobody disturbed. What had ended is read from the journal's file while the
server is dead; steps say themselves when they begin, and none of those may do so later.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from tests.faults import test_runs
from tests.harness import Server

from bench import harness


def main(kills: int, seed: int) -> None:
    """Kill, look, report."""
    report = harness.Report("run-kills")
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(Path(folder) / "data", "--generic-min", "1") as server,
        Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress,
    ):
        runs = test_runs.Runs(server)
        task = progress.add_task("kills", total=kills)
        draw = random.Random(seed)
        test_runs.disturb(
            runs, draw, kills, test_runs.kill, lambda n: progress.update(task, completed=n)
        )
        report.row(
            "kills of the server",
            seed=seed,
            kills=kills,
            while_runs_were_under_way=runs.hits,
            runs=runs.started,
            attempts_known_as_ended=len(runs.finished),
            under_way_and_run_again=runs.repeated,
            took_s=round(time.monotonic() - started),
        )
    report.bar("runs that did not end as undisturbed ones", 0, 0)  # else there was an error
    report.bar("finished steps that ran again", len(runs.again), 0)
    report.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kills", type=int, nargs="?", default=300)
    parser.add_argument("seed", type=int, nargs="?", default=random.randrange(1, 1 << 30))
    asked = parser.parse_args()
    main(asked.kills, asked.seed)
