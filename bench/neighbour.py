"""A noisy neighbour: cold starts of tenant B while tenant A bursts with cold starts of its own.

    python -m bench.neighbour [CALLS]

B calls a function that is at zero, one call at a time; alone, and while A has many cold starts
under way all the time. In turns, so that a machine that changes changes both.
"""

import asyncio
import sys
import time

import aiohttp

from bench import harness

OTHERS, PARALLEL, TURNS, WARM_UP_S = 300, 8, 6, 1.0


async def noise(server: harness.Server) -> None:
    """Cold calls of A's functions, several at once, for ever."""
    async with aiohttp.ClientSession() as session:

        async def caller(first: int) -> None:
            at = first
            while True:
                url = f"http://127.0.0.1:{server.port}/ns/a/fn/f{at % OTHERS}"
                async with session.get(url) as response:
                    await response.read()
                at += PARALLEL

        await asyncio.gather(*(caller(i) for i in range(PARALLEL)))


async def cold_calls(server: harness.Server, calls: int) -> tuple[list[float], int]:
    """(seconds of B's cold calls, how many were warm)."""
    times, warm = [], 0
    async with aiohttp.ClientSession() as session:
        for i in range(calls):
            url = f"http://127.0.0.1:{server.port}/ns/b/fn/g{i}"
            started = time.perf_counter()
            async with session.get(url) as response:
                await response.read()
                if response.status != 200:
                    raise RuntimeError(await response.text())
                warm += response.headers["Dayfly-Start"] == "warm"
            times.append(time.perf_counter() - started)
            await asyncio.sleep(0.03)
    return times, warm


async def beside_noise(server: harness.Server, calls: int) -> tuple[list[float], int]:
    """The same while A is noisy."""
    task = asyncio.create_task(noise(server))
    await asyncio.sleep(WARM_UP_S)
    try:
        return await cold_calls(server, calls)
    finally:
        task.cancel()
        await asyncio.wait({task})


def deploy(server: harness.Server, namespace: str, name: str, package: str) -> None:
    """A function that is at zero again after every call."""
    body = f'{{"handler":"main:handler","package":"{package}","keepAliveSeconds":0}}'
    server.admin("PUT", f"/namespaces/{namespace}/functions/{name}", body.encode())


def main(calls: int) -> None:
    """Measure and report."""
    each = -(-calls // TURNS)
    alone: list[float] = []
    beside: list[float] = []
    warm = 0
    report = harness.Report("neighbour")
    with harness.server() as server:
        package = server.upload(harness.HELLO)
        for i in range(OTHERS):
            deploy(server, "a", f"f{i}", package)
        for i in range(each):
            deploy(server, "b", f"g{i}", package)
        for _ in range(TURNS):
            time.sleep(WARM_UP_S)
            for found, measured in ((alone, cold_calls), (beside, beside_noise)):
                times, not_cold = asyncio.run(measured(server, each))
                found += times
                warm += not_cold
    report.row("B's cold start, alone", **harness.milliseconds(alone))
    report.row("B's cold start, A bursting", **harness.milliseconds(beside))
    report.bar("calls that were warm", warm, 0)
    ratio = harness.percentile(beside, 95) / harness.percentile(alone, 95)
    report.bar("p95 beside A / alone", ratio, 1.5)
    report.finish()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 600)
