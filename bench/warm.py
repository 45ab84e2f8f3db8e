"""Warm calls: latency and throughput, against functions-framework and a bare aiohttp "ok" server.

    python -m bench.warm [SECONDS]

All are driven by wrk with the same settings, in turn, in the same run. Dayfly runs the same "ok"
twice: as a plain handler, one invocation at a time in a sandbox, and as a coroutine with
`concurrency: 32`. `server_us` and `guests_us` are processor time a request, as the kernel counts.
"""

import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import harness

BARE = """
import sys, uvloop
from aiohttp import web

async def handle(request):
    return web.Response(body=b"ok")

async def main():
    runner = web.ServerRunner(web.Server(handle, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(sys.argv[1])).start()
    import asyncio
    await asyncio.Event().wait()

uvloop.run(main())
"""
FRAMEWORK = (
    "import functions_framework\n@functions_framework.http\ndef main(request):\n    return 'ok'\n"
)
SMALL = "def handler(event, context):\n    return 'ok'\n"
SHARED = "async " + SMALL


@contextmanager
def other(command: list[str], port: int) -> Iterator[str]:
    """Another server, until it answers; its URL."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(url, timeout=1).read()
                break
            except OSError:
                time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(10)


def measured(server: harness.Server, url: str, connections: int, seconds: int) -> dict[str, float]:
    """`wrk` with the processor time that a request cost the server and its guests."""
    pid = server.process.pid
    guests = harness.descendants(pid)
    before = harness.processor_us([pid]), harness.processor_us(guests)
    figures = wrk(url, connections, seconds)
    requests = figures["requests_per_s"] * seconds
    after = harness.processor_us([pid]), harness.processor_us(guests)
    names = ("server_us", "guests_us")
    cost = {n: round((b - a) / requests, 1) for n, a, b in zip(names, before, after, strict=True)}
    return figures | cost


def wrk(url: str, connections: int, seconds: int) -> dict[str, float]:
    """Requests per second and latencies in milliseconds, as wrk measures them."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", url]
    return figures_of(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def figures_of(text: str) -> dict[str, float]:
    """What wrk says, in numbers. Raises RuntimeError when it was answered with errors."""
    if "Non-2xx" in text:
        raise RuntimeError(text)
    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", text)[1])  # type: ignore[index]
    units = {"us": 0.001, "ms": 1.0, "s": 1000.0}
    found = dict(re.findall(r"(50|99)%\s+([\d.]+\w+)", text))
    latency = {}
    for percent, value in found.items():
        number, unit = re.fullmatch(r"([\d.]+)(\w+)", value).groups()  # type: ignore[union-attr]
        latency[f"p{percent}_ms"] = round(float(number) * units[unit], 3)
    return {"requests_per_s": round(rate)} | latency


def main(seconds: int) -> None:
    """Measure and report."""
    report = harness.Report("warm")
    figures: dict[tuple[str, int], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, harness.server() as server:
        server.deploy("small", server.upload(SMALL))
        server.deploy("shared", server.upload(SHARED), concurrency=32)
        source = Path(folder) / "main.py"
        source.write_text(FRAMEWORK)
        bare_port, framework_port = harness.free_port(), harness.free_port()
        framework = [f"{sys.prefix}/bench/bin/functions-framework", "--target", "main"]
        framework += ["--source", str(source), "--port", str(framework_port), "--host", "127.0.0.1"]
        with (
            other([sys.executable, "-c", BARE, str(bare_port)], bare_port) as bare_url,
            other(framework, framework_port) as framework_url,
        ):
            functions = f"http://127.0.0.1:{server.port}/fn"
            for _ in range(3):
                for name, target in (
                    ("dayfly", f"{functions}/small"),
                    ("dayfly, concurrency 32", f"{functions}/shared"),
                    ("bare aiohttp", bare_url),
                    ("functions-framework", framework_url),
                ):
                    for connections in (1, 32):
                        wrk(target, connections, 1)
                        found = (
                            measured(server, target, connections, seconds)
                            if name.startswith("dayfly")
                            else wrk(target, connections, seconds)
                        )
                        figures.setdefault((name, connections), []).append(found)
    best = {
        key: sorted(runs, key=lambda run: run["requests_per_s"])[1] for key, runs in figures.items()
    }
    for (name, connections), run in best.items():
        report.row(f"{name}, {connections} connections", **run)
    rate = {name: best[name, 32]["requests_per_s"] for name, _ in best}
    for name in ("dayfly", "dayfly, concurrency 32"):
        for other_name, bar in (("functions-framework", 3), ("bare aiohttp", 0.35)):
            ratio = rate[name] / rate[other_name]
            report.bar(f"{name} throughput / {other_name}", ratio, bar, at_least=True)
    alone = best["dayfly", 1]["p50_ms"] / best["bare aiohttp", 1]["p50_ms"]
    report.bar("latency p50, 1 connection / bare aiohttp", alone, 4)
    report.finish()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
