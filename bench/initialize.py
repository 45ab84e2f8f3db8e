"""A burst of one function with a heavy import: initialized once and forked, or in each sandbox.

    python -m bench.initialize [SANDBOXES]

The import parses 50 MB of CSV. As many invocations as sandboxes come at once, to a
function that is at zero and has run before; each holds its sandbox. Then cold calls, one by one.
"""

import http.client
import json
import sys
import threading
import time

from bench import harness

SOURCE = """
import csv, io, time

BLOCK = "".join(f"key-{i},{i * 0.5:.6f},{i % 97}\\n" for i in range(50_000))
TEXT = BLOCK * (50_000_000 // len(BLOCK))
TABLE = {row[0]: row for row in csv.reader(io.StringIO(TEXT))}

def handler(event, context):
    time.sleep(event["seconds"])
    return len(TABLE)
"""
BAR_S = 3.0
COLD_CALLS = 10
MEMORY_MB = 512


class Burst:
    """Invocations that all run at the same time, each in a sandbox of its own."""

    def __init__(self, server: harness.Server, number: int, hold_s: float) -> None:
        self.statuses: list[int] = []
        body = json.dumps({"seconds": hold_s}).encode()

        def ask() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", server.admin_port, timeout=600)
            path = "/namespaces/default/functions/heavy/invocations"
            connection.request("POST", path, body)
            self.statuses.append(connection.getresponse().status)
            connection.close()

        self._threads = [threading.Thread(target=ask) for _ in range(number)]
        self.started = time.perf_counter()
        for thread in self._threads:
            thread.start()

    def is_running(self) -> bool:
        """Whether some are not answered yet."""
        return any(thread.is_alive() for thread in self._threads)

    def join(self) -> None:
        """Wait for all of them."""
        for thread in self._threads:
            thread.join()


def busy(server: harness.Server) -> int:
    """Sandboxes that run an invocation now."""
    return int(server.admin("GET", "/pool")["phases"].get("busy", 0))


def measure(initialize: str, number: int, hold_s: float) -> dict[str, float]:
    """When the first and the last were busy, in seconds, and how many BAR_S after the first."""
    options = ("--sandboxes-max", str(number + 50))
    with harness.server(*options) as server:
        package = server.upload(SOURCE)
        limits = {"memoryMb": MEMORY_MB}
        spec = {"initialize": initialize, "maxScale": number, "keepAliveSeconds": 0}
        server.deploy("heavy", package, timeoutSeconds=120, limits=limits, **spec)
        Burst(server, 1, 0).join()  # from now on its import has been measured
        server.wait(lambda pool: not pool["phases"].get("idle"))
        server.wait_generic(4)
        burst = Burst(server, number, hold_s)
        first_s = last_s = within = 0.0
        while burst.is_running():
            now_busy, now_s = busy(server), time.perf_counter() - burst.started
            if now_busy and not first_s:
                first_s = now_s
            if first_s and now_s <= first_s + BAR_S:
                within = max(within, now_busy)
            if now_busy == number and not last_s:
                last_s = now_s
            time.sleep(0.01)
        burst.join()
        failed = sum(status != 200 for status in burst.statuses)
        cold_s = harness.median([cold_call(server) for _ in range(COLD_CALLS)])
        return {
            "first_s": first_s,
            "last_s": last_s,
            "within": within,
            "failed": failed,
            "cold_ms": cold_s * 1000,
        }


def cold_call(server: harness.Server) -> float:
    """Seconds of a call, once the function is at zero."""
    server.wait(lambda pool: not any(box["function"] for box in pool["sandboxes"]))
    server.wait_generic(4)
    started = time.perf_counter()
    server.admin("POST", "/namespaces/default/functions/heavy/invocations", b'{"seconds":0}')
    return time.perf_counter() - started


def main(number: int) -> None:
    """Measure and report."""
    report = harness.Report("initialize")
    once = measure("once", number, BAR_S + 3)
    each = measure("each", number, BAR_S + 3)
    for label, figures in (("once", once), ("each", each)):
        row = {name: round(value, 2) for name, value in figures.items()}
        report.row(f"initialize: {label}", sandboxes=number, **row)
    report.bar("seconds from the first to the last busy", once["last_s"] - once["first_s"], BAR_S)
    report.bar("sandboxes that did not get busy in time", number - once["within"], 0)
    report.bar("invocations that failed", once["failed"], 0)
    report.finish()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
