"""Many different functions called once each at the same moment, with a pool of ten.

    python -m bench.burst [FUNCTIONS]

The same twice in one run: with sandboxes that are forked, and with each started by itself.
"""

import asyncio
import sys
import time
from typing import NamedTuple

import aiohttp

from bench import harness

SOURCE = "def handler(event, context):\n    return {'statusCode': 200, 'body': 'I am %s'}\n"
GENERIC = 10


class Answer(NamedTuple):
    """What one caller saw."""

    took_s: float
    status: int
    text: str
    start: str


async def call(session: aiohttp.ClientSession, url: str) -> Answer:
    """One request."""
    started = time.perf_counter()
    async with session.post(url) as response:
        text = await response.text()
    start = response.headers["Dayfly-Start"]
    return Answer(time.perf_counter() - started, response.status, text, start)


async def all_at_once(server: harness.Server, number: int) -> list[Answer]:
    """Every function, called at the same moment."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        urls = [f"http://127.0.0.1:{server.port}/fn/f{i}" for i in range(number)]
        return await asyncio.gather(*(call(session, url) for url in urls))


def burst(number: int, how: str) -> tuple[list[Answer], int]:
    """(answers, sandboxes made meanwhile) with `--prewarm` *how*."""
    options = ("--generic-min", str(GENERIC), "--sandboxes-max", str(number + 2 * GENERIC))
    with harness.server(*options, "--prewarm", how) as server:
        for i in range(number):
            server.deploy(f"f{i}", server.upload(SOURCE % i))
        server.wait_generic(GENERIC)
        before = server.metrics()["dayfly_sandboxes_created_total"]
        answers = asyncio.run(all_at_once(server, number))
        return answers, int(server.metrics()["dayfly_sandboxes_created_total"] - before)


def main(number: int) -> None:
    """Measure and report."""
    report = harness.Report("burst")
    p99_s = {}
    for how in ("exec", "fork"):
        answers, made = burst(number, how)
        report.row(
            f"{number} functions at once, {how}",
            **harness.milliseconds([answer.took_s for answer in answers]),
        )
        for kind in ("generic", "forked", "created"):
            if took := [answer.took_s for answer in answers if answer.start == kind]:
                report.row(f"  started {kind}", **harness.milliseconds(took))
        report.row("  sandboxes made meanwhile", n=made)
        wrong = sum(
            (answer.status, answer.text) != (200, f"I am {i}") for i, answer in enumerate(answers)
        )
        report.bar(f"unanswered or wrong, {how}", wrong, 0)
        report.bar(f"made meanwhile (refill visible), {how}", made, number - GENERIC, at_least=True)
        p99_s[how] = harness.percentile([answer.took_s for answer in answers], 99)
    report.bar("p99 forked, seconds", p99_s["fork"], 6)
    report.bar("p99 started / p99 forked", p99_s["exec"] / p99_s["fork"], 3, at_least=True)
    report.finish()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
