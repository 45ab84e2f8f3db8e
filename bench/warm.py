"""Warm calls: latency and throughput, against functions-framework and a bare aiohttp "ok" server.

    python -m bench.warm [SECONDS]

All three are driven by wrk with the same settings, in turn, in the same run.
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


def wrk(url: str, connections: int, seconds: int) -> dict[str, float]:
    """Requests per second and latencies in milliseconds, as wrk measures them."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", url]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
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
        source = Path(folder) / "main.py"
        source.write_text(FRAMEWORK)
        bare_port, framework_port = harness.free_port(), harness.free_port()
        framework = [f"{Path(sys.executable).parent}/functions-framework", "--target", "main"]
        framework += ["--source", str(source), "--port", str(framework_port), "--host", "127.0.0.1"]
        with (
            other([sys.executable, "-c", BARE, str(bare_port)], bare_port) as bare_url,
            other(framework, framework_port) as framework_url,
        ):
            url = f"http://127.0.0.1:{server.port}/fn/small"
            for _ in range(3):
                for name, target in (
                    ("dayfly", url),
                    ("bare aiohttp", bare_url),
                    ("functions-framework", framework_url),
                ):
                    for connections in (1, 32):
                        wrk(target, connections, 1)
                        measured = wrk(target, connections, seconds)
                        figures.setdefault((name, connections), []).append(measured)
    best = {
        key: sorted(runs, key=lambda run: run["requests_per_s"])[1] for key, runs in figures.items()
    }
    for (name, connections), run in best.items():
        report.row(f"{name}, {connections} connections", **run)
    rate = {name: best[name, 32]["requests_per_s"] for name, _ in best}
    report.bar(
        "throughput / functions-framework",
        rate["dayfly"] / rate["functions-framework"],
        3,
        at_least=True,
    )
    report.bar(
        "throughput / bare aiohttp", rate["dayfly"] / rate["bare aiohttp"], 0.35, at_least=True
    )
    alone = best["dayfly", 1]["p50_ms"] / best["bare aiohttp", 1]["p50_ms"]
    report.bar("latency p50, 1 connection / bare aiohttp", alone, 4)
    report.finish()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
