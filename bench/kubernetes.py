"""Cold starts on a cluster: on a warm generic pod, on a fresh one, without the API server.

    KUBECONFIG=... DAYFLY_RUNTIME_IMAGE=... python -m bench.kubernetes [ROUNDS]

The server runs here and its sandboxes are pods of the cluster that $KUBECONFIG names, in a
namespace of their own, of the image that $DAYFLY_RUNTIME_IMAGE names. Every round calls a function
that no sandbox holds on a warm generic pod, and another on a server that keeps none and makes a pod
for it; some rounds at once one after the other, most when the pods of the last have come and gone.
Then the way to the API server is cut: cold starts that are answered still have needed no write.
At last 100 functions are called once each where there may be 10 pods.
"""

import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml
from tests.faults.proxy import Proxy
from tests.kubernetes.tools import tool

from bench import harness

NAMESPACE = "dayfly-bench"
CPUS = float(os.environ.get("DAYFLY_BENCH_CPUS", "1.6"))
"""What the cluster has for all pods of one phase: a pod has its share, and no more than that."""
GENERIC, COLD_PODS = 2, 4
BUSY = 10
"""So many rounds follow at once on one another, while pods of those before are made and deleted on
the same processors; the others wait until that is over."""

IDLE, LOOK_S, REST_S_MAX = 0.8, 0.3, 60.0
WITHOUT_API = 8
PODS, FUNCTIONS, AT_ONCE = 10, 100, 4
COLD = {"keepAliveSeconds": 0.5}


class Cluster:
    """What `kubectl` says of the pods of one shard."""

    def __init__(self, kubeconfig: str) -> None:
        self._command = [tool("kubectl"), "--kubeconfig", kubeconfig, "--namespace", NAMESPACE]

    def kubectl(self, *arguments: str) -> str:
        """Raises `CalledProcessError`."""
        return harness.subprocess.run(
            [*self._command, *arguments], check=True, capture_output=True, text=True
        ).stdout

    def pods(self, shard: str) -> list[dict[str, Any]]:
        """Those that are there, or are being made."""
        found = self.kubectl("get", "pods", "-l", f"dayfly.dev/shard={shard}", "-o", "json")
        return [pod for pod in json.loads(found)["items"] if pod["status"]["phase"] in ALIVE]

    def bury(self, shard: str) -> int:
        """Delete what owns its pods, which outlive their server; how many are left after that."""
        self.kubectl("delete", "lease", f"dayfly-shard-{shard}")
        deadline = time.monotonic() + BURY_S_MAX
        while (left := len(self.pods(shard))) and time.monotonic() < deadline:
            time.sleep(0.5)
        return left


ALIVE = ("Pending", "Running")
BURY_S_MAX = 60.0


def main(rounds: int) -> None:
    """Measure and report."""
    report = harness.Report("kubernetes")
    kubeconfig = Path(os.environ["KUBECONFIG"])
    with _namespace(kubeconfig) as cluster, _proxied(kubeconfig) as (proxy, through):
        _cold_starts(report, through, rounds)
        left = cluster.bury("warm") + cluster.bury("fresh")
        _without_the_api(report, through, proxy)
        left += cluster.bury("away")
        _many(report, through, cluster)
        report.bar("pods left over", left + cluster.bury("many"), 0)
    report.finish()


@contextmanager
def _namespace(kubeconfig: Path) -> Iterator[Cluster]:
    cluster = Cluster(str(kubeconfig))
    cluster.kubectl("create", "namespace", NAMESPACE)
    try:
        yield cluster
    finally:
        cluster.kubectl("delete", "namespace", NAMESPACE)


@contextmanager
def _proxied(kubeconfig: Path) -> Iterator[tuple[Proxy, Path]]:
    """A way to the API server that can be cut, and the kubeconfig that takes it."""
    config = yaml.safe_load(kubeconfig.read_text())
    (cluster,) = (each["cluster"] for each in config["clusters"])
    host, _, port = cluster["server"].removeprefix("https://").rpartition(":")
    with Proxy(int(port), host) as proxy, tempfile.TemporaryDirectory() as folder:
        cluster |= {"server": f"https://127.0.0.1:{proxy.port}", "tls-server-name": host}
        path = Path(folder) / "kubeconfig"
        path.touch(0o600)
        path.write_text(yaml.safe_dump(config))
        yield proxy, path


@contextmanager
def _server(kubeconfig: Path, shard: str, *options: str, pods: int) -> Iterator[harness.Server]:
    """A shard whose pods are so large that there can be so many *pods*."""
    size = {"memoryMb": 256, "cpu": round(min(1.0, CPUS / pods), 2), "ephemeralMb": 64}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        image = os.environ.get("DAYFLY_RUNTIME_IMAGE", "dayfly-runtime:test")
        settings = {"image": image, "imagePullPolicy": "IfNotPresent", "namespace": NAMESPACE}
        settings |= {"classes": [size], "kubeconfig": str(kubeconfig)}
        json.dump(settings, file)
        file.flush()
        kind = ("--driver", "kubernetes", "--kubernetes", file.name, "--name", shard)
        with harness.server(*kind, *options) as server:
            yield server


def _cold_starts(report: harness.Report, kubeconfig: Path, rounds: int) -> None:
    times: dict[str, list[float]] = {}
    with (
        _server(kubeconfig, "warm", "--generic-min", str(GENERIC), pods=COLD_PODS) as warm,
        _server(
            kubeconfig, "fresh", "--generic-min", "0", "--generic-max", "0", pods=COLD_PODS
        ) as fresh,
    ):
        for which in (warm, fresh):
            package = which.upload(harness.HELLO)
            for number in range(rounds):
                which.deploy(f"small{number}", package, **COLD)
        for number in range(rounds):
            warm.wait_generic(GENERIC)
            if number >= BUSY:
                _wait_for_rest()
            for label, server, start in (
                ("cold, warm generic pod", warm, "generic"),
                ("cold, a fresh pod", fresh, "created"),
            ):
                if server is fresh and (number < BUSY or number % 5):
                    continue  # it takes seconds each
                if number < BUSY:
                    label = "cold, while pods start and end"
                took_s, response = server.call(f"small{number}")
                if response.headers["Dayfly-Start"] != start:
                    raise RuntimeError(f"{label}: {response.headers['Dayfly-Start']}, not {start}")
                times.setdefault(label, []).append(took_s)
            took_s, _ = warm.call(f"small{number}")
            times.setdefault("warm", []).append(took_s)
    for label, values in times.items():
        report.row(label, **harness.milliseconds(values))
    cold, made = times["cold, warm generic pod"], times["cold, a fresh pod"]
    report.bar("cold p50, ms", harness.median(cold) * 1000, 15)
    report.bar("cold p99, ms", harness.percentile(cold, 99) * 1000, 60)
    report.bar(
        "a fresh pod / cold, p50", harness.median(made) / harness.median(cold), 20, at_least=True
    )


def _wait_for_rest() -> None:
    """Until the processors are idle. Raises `TimeoutError`."""
    deadline = time.monotonic() + REST_S_MAX
    while time.monotonic() < deadline:
        before = psutil.cpu_times()
        time.sleep(LOOK_S)
        after = psutil.cpu_times()
        spent = sum(after) - sum(before)
        if after.idle - before.idle >= IDLE * spent:
            return
    raise TimeoutError(f"this machine was busy for {REST_S_MAX:g} s: nothing else may run beside")


def _without_the_api(report: harness.Report, kubeconfig: Path, proxy: Proxy) -> None:
    """Each cold start takes one of the pods that are there; nothing can be written meanwhile."""
    with _server(kubeconfig, "away", "--generic-min", str(WITHOUT_API), pods=WITHOUT_API) as server:
        package = server.upload(harness.HELLO)
        for number in range(WITHOUT_API):
            server.deploy(f"small{number}", package)
        server.wait_generic(WITHOUT_API)
        proxy.cut()
        try:
            starts = [
                server.call(f"small{n}")[1].headers["Dayfly-Start"] for n in range(WITHOUT_API)
            ]
        finally:
            proxy.mend()
    report.bar(
        "cold starts without the API server", starts.count("generic"), WITHOUT_API, at_least=True
    )


def _many(report: harness.Report, kubeconfig: Path, cluster: Cluster) -> None:
    options = ("--generic-min", "2", "--generic-max", "4", "--sandboxes-max", str(PODS))
    most, done = 0, threading.Event()

    def look() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, len(cluster.pods("many")))

    with (
        _server(kubeconfig, "many", *options, pods=PODS) as server,
        ThreadPoolExecutor(AT_ONCE + 1) as threads,
    ):
        package = server.upload(harness.HELLO)
        for number in range(FUNCTIONS):
            server.deploy(f"small{number}", package)
        server.wait_generic(2)
        looking = threads.submit(look)
        started = time.perf_counter()
        answers = list(threads.map(lambda n: _called(server, n), range(FUNCTIONS)))
        took_s = time.perf_counter() - started
        done.set()
        looking.result()
    report.row(f"{FUNCTIONS} functions on {PODS} pods", took_s=round(took_s, 1))
    for status, number in Counter(answers).items():
        report.row(f"answered with {status}", n=number)
    report.bar("functions that were answered", answers.count(200), FUNCTIONS, at_least=True)
    report.bar("pods at most", most, PODS)


def _called(server: harness.Server, number: int) -> int:
    """The status of one call, on a connection of its own."""
    connection = harness.http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    try:
        connection.request("POST", f"/fn/small{number}", '{"name":"Ada"}')
        return connection.getresponse().status
    finally:
        connection.close()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
