"""Many different functions called once each at the same moment.

python -m bench.burst [FUNCTIONS]
"""

import asyncio
import sys
import time

import aiohttp

from bench import harness

SOURCE = "def handler(event, context):\n    return {'statusCode': 200, 'body': 'I am %s'}\n"


async def call(session: aiohttp.ClientSession, url: str) -> tuple[float, int, str, str]:
    """(seconds, status, body, kind of start) of one request."""
    started = time.perf_counter()
    async with session.post(url) as response:
        text = await response.text()
    return time.perf_counter() - started, response.status, text, response.headers["Dayfly-Start"]


async def burst(server: harness.Server, number: int) -> list[tuple[float, int, str, str]]:
    """All functions at once."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        urls = [f"http://127.0.0.1:{server.port}/fn/f{i}" for i in range(number)]
        return await asyncio.gather(*(call(session, url) for url in urls))


def main(number: int) -> None:
    """Measure and report."""
    report = harness.Report("burst")
    with harness.server("--generic-min", "10") as server:
        for i in range(number):
            server.deploy(f"f{i}", server.upload(SOURCE % i))
        server.wait_generic(10)
        before = server.metrics()["dayfly_sandboxes_created_total"]
        results = asyncio.run(burst(server, number))
        created = server.metrics()["dayfly_sandboxes_created_total"] - before
    wrong = sum(
        status != 200 or text != f"I am {i}" for i, (_, status, text, _) in enumerate(results)
    )
    report.row(
        f"{number} functions at once", **harness.milliseconds([took for took, *_ in results])
    )
    for kind in ("generic", "created"):
        took = [took for took, _, _, start in results if start == kind]
        if took:
            report.row(f"  started {kind}", **harness.milliseconds(took))
    report.row("sandboxes created meanwhile", n=int(created))
    report.bar("unanswered or wrong", wrong, 0)
    report.bar("sandboxes created meanwhile (refill visible)", created, number - 10, at_least=True)
    report.finish()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
