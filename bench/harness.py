"""What the benchmarks share: a real server, ways to call it, statistics, the table and the JSON."""

import http.client
import io
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

HELLO = """
import json

def handler(event, context):
    name = json.loads(event["body"])["name"] if event.get("body") else "world"
    return {"statusCode": 200, "body": "Hello, " + name}
"""
RESULTS = Path(__file__).parent / "results"
PYTHON = os.path.realpath(sys.executable)
KTHREADD = 2
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Server:
    """A `dayfly up` of its own, with an empty data folder, and clients for both planes."""

    def __init__(self, *options: str) -> None:
        self.data = tempfile.mkdtemp(prefix="dayfly-bench-")
        self.port, self.admin_port = free_port(), free_port()
        command = [
            *(f"{Path(sys.executable).parent}/dayfly", "up", "--data", self.data, "--log", "json"),
            *("--http", f"127.0.0.1:{self.port}", "--admin", f"127.0.0.1:{self.admin_port}"),
            *options,
        ]
        self.log = Path(self.data) / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self._connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    @property
    def launcher(self) -> int:
        """The process that starts its sandboxes."""
        (pid,) = _children(self.process.pid)
        return pid

    def sandbox_pids(self) -> dict[str, list[int]]:
        """The processes in which each function is, by its id; empty without control groups."""
        names = {box["id"]: box["function"] for box in self.admin("GET", "/pool")["sandboxes"]}
        found: dict[str, list[int]] = {}
        for pid in descendants(self.process.pid):
            with suppress(OSError):
                groups = Path(f"/proc/{pid}/cgroup").read_text()
                if name := names.get("sb-" + groups.partition("/sb-")[2].partition("\n")[0]):
                    found.setdefault(name, []).append(pid)
        return found

    def processors_s(self) -> dict[str, float]:
        """Processor seconds so far, by who used them: kernel threads, the sandboxes, others.

        The server and whoever asks are nobody of these.
        """
        sandboxes = set(descendants(self.process.pid))
        used = {"kernel": 0.0, "sandboxes": 0.0, "here": 0.0}
        for folder in Path("/proc").glob("[0-9]*"):
            pid = int(folder.name)
            with suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if KTHREADD in (pid, int(fields[1])):
                    whose = "kernel"
                elif pid in sandboxes:
                    whose = "sandboxes"
                elif pid in (self.process.pid, os.getpid()):
                    whose = "here"
                else:
                    continue
                used[whose] += (int(fields[11]) + int(fields[12])) / TICKS_PER_S
        user, nice, system, _, _, *interrupts = Path("/proc/stat").read_text().split()[1:8]
        busy_s = sum(map(int, (user, nice, system, *interrupts))) / TICKS_PER_S
        used["others"] = busy_s - sum(used.values())
        del used["here"]
        return used

    def admin(self, method: str, path: str, body: bytes | None = None) -> Any:
        """One call of the admin plane; raises RuntimeError with the answer when it is an error."""
        connection = http.client.HTTPConnection("127.0.0.1", self.admin_port, timeout=600)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        if response.status >= 400:
            raise RuntimeError(f"{method} {path}: {response.status} {data.decode()[:2000]}")
        is_json = "json" in (response.headers["Content-Type"] or "")
        is_lines = "ndjson" in (response.headers["Content-Type"] or "")
        if is_lines:
            return [json.loads(line) for line in data.splitlines()]
        return json.loads(data) if is_json and data else data

    def wait(self, condition: Callable[[dict[str, Any]], bool], timeout_s: float = 60) -> None:
        """Until the pool's view satisfies *condition*."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if condition(self.admin("GET", "/pool")):
                    return
            except OSError:
                pass
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"not reached in {timeout_s} s\n{self.log.read_text()[-2000:]}")
            time.sleep(0.02)

    def wait_generic(self, number: int) -> None:
        """Until *number* generic sandboxes are ready and nothing is starting."""
        self.wait(
            lambda pool: (
                pool["phases"].get("generic", 0) >= number and not pool["phases"].get("starting")
            )
        )

    def upload(self, source: str) -> str:
        """Upload a package of one file, main.py."""
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            archive.writestr(zipfile.ZipInfo("main.py"), source)
        return str(self.admin("POST", "/packages", data.getvalue())["digest"])

    def deploy(self, name: str, package: str, **spec: Any) -> None:
        """Deploy main:handler of an uploaded package."""
        body = json.dumps({"handler": "main:handler", "package": package} | spec)
        self.admin("PUT", f"/namespaces/default/functions/{name}", body.encode())

    def call(
        self, name: str, body: str = '{"name":"Ada"}'
    ) -> tuple[float, http.client.HTTPResponse]:
        """(seconds, response) of one request, on a connection that is open already."""
        self._connection.close()  # the server closes what is idle for 10 s
        self._connection.connect()
        started = time.perf_counter()
        self._connection.request("POST", f"/fn/{name}", body)
        response = self._connection.getresponse()
        response.body = response.read()  # type: ignore[attr-defined]
        took_s = time.perf_counter() - started
        if response.status != 200:
            raise RuntimeError(f"{name}: {response.status} {response.body!r}")  # type: ignore[attr-defined]
        return took_s, response

    def metrics(self) -> dict[str, float]:
        """The metrics page, by series."""
        text = self.admin("GET", "/metrics").decode()
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {series: float(value) for series, _, value in lines}

    def stop(self) -> None:
        """SIGTERM, wait, remove the data."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        shutil.rmtree(self.data, ignore_errors=True)


@contextmanager
def server(*options: str) -> Iterator[Server]:
    """A running server that is up, and gone afterwards."""
    running = Server(*options)
    try:
        running.wait(lambda pool: True)
        yield running
    finally:
        running.stop()


def processor_us(pids: Sequence[int]) -> float:
    """Processor time of *pids* so far, in microseconds."""
    return _schedstat_us(pids, 0)


def waited_us(pids: Sequence[int]) -> float:
    """How long *pids* were ready to run and waited for a processor so far, in microseconds."""
    return _schedstat_us(pids, 1)


def _schedstat_us(pids: Sequence[int], field: int) -> float:
    total = 0.0
    for pid in pids:
        with suppress(OSError):
            total += int(Path(f"/proc/{pid}/schedstat").read_text().split()[field]) / 1000
    return total


def descendants(pid: int) -> list[int]:
    """Every process below *pid*."""
    found = _children(pid)
    return found + [below for child in found for below in descendants(child)]


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):  # it has just ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def pss_kib(pid: int) -> int:
    """The proportional set size of one process."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))


def private_kib(pid: int) -> int:
    """Memory that belongs to the process alone, in KiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def run_s(command: Sequence[str]) -> float:
    """Seconds that *command* takes as a process."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def start_python() -> float:
    """The yardstick: `python -I -S -c pass`."""
    return run_s([PYTHON, "-I", "-S", "-c", "pass"])


def start_bwrap_python() -> float:
    """The other yardstick: the same inside `bwrap --unshare-all`."""
    sandbox = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev"]
    return run_s([*sandbox, PYTHON, "-I", "-S", "-c", "pass"])


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def milliseconds(values: Sequence[float]) -> dict[str, float]:
    """n, p50, p90, p99 and max, in milliseconds."""
    figures = {f"p{p}": percentile(values, p) for p in (50, 90, 99)} | {"max": max(values)}
    return {"n": len(values)} | {key: round(value * 1000, 2) for key, value in figures.items()}


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


class Report:
    """Rows of measured figures and bars, printed as tables and kept as JSON."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: list[dict[str, Any]] = []
        self.bars: list[dict[str, Any]] = []

    def row(self, what: str, **figures: Any) -> None:
        """One measured line."""
        self.rows.append({"what": what} | figures)

    def bar(self, what: str, measured: float, bar: float, *, at_least: bool = False) -> None:
        """A promise and what was measured, as a ratio or a count."""
        met = measured >= bar if at_least else measured <= bar
        sign = ">=" if at_least else "<="
        self.bars.append(
            {"what": what, "measured": round(measured, 3), "bar": f"{sign} {bar:g}", "met": met}
        )

    def finish(self) -> None:
        """Print everything and write results/NAME.json."""
        print(
            f"\n{self.name}   ({platform.machine()}, {os.cpu_count()} cores,"
            f" Python {platform.python_version()})"
        )
        for table in (self.rows, self.bars):
            _print_table(table)
        RESULTS.mkdir(exist_ok=True)
        content = {"name": self.name, "rows": self.rows, "bars": self.bars}
        (RESULTS / f"{self.name}.json").write_text(json.dumps(content, indent=2) + "\n")


def _print_table(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *[[_cell(row.get(column, "")) for column in columns] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    print()
    for row in cells:
        first, *rest = [
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join([first, *rest]).rstrip())


def _cell(value: Any) -> str:
    return {True: "met", False: "MISSED"}.get(value, "") if isinstance(value, bool) else str(value)
