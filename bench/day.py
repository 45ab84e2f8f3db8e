"""A day in minutes: very many invocations over very many functions, few of them popular.

    python -m bench.day [INVOCATIONS]

Each function is called once, which fills the pool and what the server keeps for each of them. Then
they are called as by Zipf's law, from several callers at once, with a keep-alive of 30 s, so that
popular ones stay warm and the others come and go. Nothing may fail, nothing may be left over, and
neither the server's memory nor the launcher's may grow.
"""

import asyncio
import itertools
import random
import sys
import time
from collections import Counter

import aiohttp
from rich.console import Console
from rich.progress import Progress, TaskID

from bench import harness, soak

FUNCTIONS, CALLERS, KEEP_ALIVE_S, SAMPLES = 2000, 16, 30, 24
SOURCE = "def handler(event, context):\n    return 'I am %s'\n"


class Day:
    """What is called, and what came of it."""

    def __init__(self, server: harness.Server, invocations: int) -> None:
        self.server, self.invocations = server, invocations
        self.starts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.memory: dict[str, list[tuple[int, int]]] = {"server": [], "launcher": []}
        self.done = -FUNCTIONS
        chosen = random.Random(1)  # the same day in every run
        weights = list(itertools.accumulate(1 / rank for rank in range(1, FUNCTIONS + 1)))
        zipf = chosen.choices(range(FUNCTIONS), cum_weights=weights, k=invocations)
        self._names = itertools.chain(range(FUNCTIONS), zipf)

    async def live(self, progress: Progress, bar: TaskID) -> None:
        """All of it."""
        pids = {"server": self.server.process.pid, "launcher": self.server.launcher}
        async with aiohttp.ClientSession() as session:
            callers = [asyncio.create_task(self._call(session)) for _ in range(CALLERS)]
            while not all(caller.done() for caller in callers):
                if self.done >= self.invocations * len(self.memory["server"]) // SAMPLES:
                    for what, pid in pids.items():
                        self.memory[what].append((self.done, harness.private_kib(pid)))
                progress.update(bar, completed=max(0, self.done))
                await asyncio.sleep(0.1)
            await asyncio.gather(*callers)

    async def _call(self, session: aiohttp.ClientSession) -> None:
        for number in self._names:
            url = f"http://127.0.0.1:{self.server.port}/fn/f{number}"
            async with session.get(url) as response:
                text = await response.text()
                if (response.status, text) != (200, f"I am {number}"):
                    self.failures.append(f"{response.status} {text}")
                self.starts[response.headers.get("Dayfly-Start", "none")] += 1
            self.done += 1


def main(invocations: int) -> None:
    """Measure and report."""
    report = harness.Report("day")
    console = Console(stderr=True)
    with (
        Progress(disable=not sys.stderr.isatty(), console=console) as progress,
        harness.server() as server,
    ):
        for i in range(FUNCTIONS):
            server.deploy(f"f{i}", server.upload(SOURCE % i), keepAliveSeconds=KEEP_ALIVE_S)
        server.wait_generic(4)
        descriptors = len(list(harness.Path(f"/proc/{server.process.pid}/fd").iterdir()))
        day = Day(server, invocations)
        started = time.monotonic()
        asyncio.run(day.live(progress, progress.add_task("invocations", total=invocations)))
        took_s = time.monotonic() - started
        server.wait(lambda pool: set(pool["phases"]) == {"generic"}, KEEP_ALIVE_S * 4)
        now = len(list(harness.Path(f"/proc/{server.process.pid}/fd").iterdir()))
    report.row(f"{invocations} invocations", took_s=round(took_s), **dict(day.starts.most_common()))
    for what, points in day.memory.items():
        report.row(what, first_kib=points[0][1], last_kib=points[-1][1])
    report.bar("failures", len(day.failures), 0)
    report.bar("descriptors left over", max(0, now - descriptors - 32), 0)
    for what, points in day.memory.items():
        report.bar(f"{what}: KiB more per 1,000 invocations", soak.slope(points), 1)
    report.finish()
    for failure in day.failures[:5]:
        console.print(failure)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200_000)
