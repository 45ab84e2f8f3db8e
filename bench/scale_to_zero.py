"""Crossings from zero to one sandbox and back: nothing fails, nothing stays.

python -m bench.scale_to_zero [CROSSINGS]
"""

import os
import sys
import time

from bench import harness

PARALLEL = 10


def main(crossings: int) -> None:
    """Measure and report."""
    report = harness.Report("scale_to_zero")
    failed, times = 0, []
    with harness.server("--generic-min", "4", "--generic-max", "4") as server:
        package = server.upload(harness.HELLO)
        for i in range(PARALLEL):
            server.deploy(f"f{i}", package, keepAliveSeconds=0.0)
        for i in range(PARALLEL):
            server.call(f"f{i}")
        settled(server)
        descriptors = fewest_open(server)
        done = 0
        while done < crossings:
            for i in range(PARALLEL):
                try:
                    took_s, response = server.call(f"f{i}")
                    failed += response.headers["Dayfly-Start"] == "warm"
                    times.append(took_s)
                except RuntimeError:
                    failed += 1
                done += 1
            settled(server)
        left = len(server.admin("GET", "/pool")["sandboxes"]) - 4
        leaked = fewest_open(server) - descriptors
    report.row(f"{len(times)} crossings", **harness.milliseconds(times))
    report.bar("failed requests", failed, 0)
    report.bar("sandboxes left over", left, 0)
    report.bar("file descriptors leaked", leaked, 0)
    report.finish()


def fewest_open(server: harness.Server) -> int:
    """Descriptors that the server has open, but for those that it is just closing."""
    counts = []
    for _ in range(5):
        time.sleep(0.2)
        counts.append(len(os.listdir(f"/proc/{server.process.pid}/fd")))
    return min(counts)


def settled(server: harness.Server) -> None:
    """Until every function is at zero again and the generic sandboxes are back."""
    server.wait(lambda pool: pool["phases"] == {"generic": 4})


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
