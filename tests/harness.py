"""A real server as a child process, and the few words in which tests speak to it.

Nothing here knows Dayfly's code: what a test sees is what a user's client sees, plus what the
kernel says of the server's processes.
"""

import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

ROOT: Final = Path(__file__).parents[1]
FUNCTIONS: Final = ROOT / "tests" / "functions"
DAYFLY: Final = Path(sys.executable).parent / "dayfly"
READY_S_MAX: Final = 60.0
EPOCH: Final = (2020, 1, 1, 0, 0, 0)
T = TypeVar("T")


def eventually(question: Callable[[], T], within_s: float = 15.0) -> T:
    """The first true answer; the last one when none was true in time."""
    end = time.monotonic() + within_s
    while not (answer := question()) and time.monotonic() < end:
        time.sleep(0.02)
    return answer


def together(number: int, work: Callable[[int], T]) -> list[T]:
    """*work*(0), *work*(1), ... at the same moment, each in a thread; the results in order."""
    barrier = threading.Barrier(number)

    def one(i: int) -> T:
        barrier.wait(60)
        return work(i)

    with ThreadPoolExecutor(number) as threads:
        return list(threads.map(one, range(number)))


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pack(code: Path | Mapping[str, str | bytes]) -> bytes:
    """A package: the files of a folder, or those given by name."""
    if isinstance(code, Path):
        paths = sorted(p for p in code.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        code = {str(path.relative_to(code)): path.read_bytes() for path in paths}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in code.items():
            archive.writestr(zipfile.ZipInfo(name, EPOCH), content)
    return packed.getvalue()


class Reply(NamedTuple):
    """One HTTP response."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        """The body, decoded."""
        return json.loads(self.body)


class Process(NamedTuple):
    """One process, told from a later one with the same number."""

    pid: int
    started: str

    @property
    def is_alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        fields = stat(self.pid)
        return bool(fields) and fields[19] == self.started and fields[0] not in "ZX"


def stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return []


def status(pid: int) -> dict[str, str]:
    """The lines of /proc/PID/status."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {}


def family(pid: int) -> list[Process]:
    """The process *pid* and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := stat(int(entry))):
            children.setdefault(int(fields[1]), []).append(int(entry))
    found, open_ = [], [pid]
    while open_:
        at = open_.pop()
        if fields := stat(at):
            found.append(Process(at, fields[19]))
        open_ += children.get(at, [])
    return found


def cgroup_folders(pid: int) -> list[str]:
    """The control group folders that the server *pid* made for its sandboxes, where they exist."""
    found = []
    for place, folders, _ in os.walk("/sys/fs/cgroup"):
        for name in {f"dayfly-{pid}", f"dayfly-{pid}-apart"} & {*folders}:
            found.append(os.path.join(place, name))
            folders.remove(name)
    return found


class Server:
    """One `dayfly up`. Use it as a context manager: at its end nothing of it may be left."""

    def __init__(
        self,
        data: Path,
        *arguments: str,
        driver: str = "linux",
        env: Mapping[str, str] | None = None,
        settings: Mapping[str, Any] | None = None,
        http: str = "",
        admin: str = "",
        token: str = "",
        prefix: Sequence[str] = (),
    ) -> None:
        self.data, self.driver, self.token = data, driver, token
        self.http = http or f"127.0.0.1:{free_port()}"
        self.admin = admin or f"127.0.0.1:{free_port()}"
        self.log: list[str] = []
        self.seen: set[Process] = set()
        self._arguments, self._settings, self._prefix = arguments, settings, list(prefix)
        self._env = dict(env or {})
        self._process: subprocess.Popen[str]

    # ---- life ---------------------------------------------------------------------------------

    def start(self) -> "Server":
        """Start it and wait until it is ready."""
        self.launch()
        eventually(lambda: self.is_ready or self._process.poll() is not None, READY_S_MAX)
        assert self.is_ready, "the server is not up:\n" + "\n".join(self.log[-30:])
        return self

    def launch(self) -> None:
        """Start it and do not wait."""
        self.log = []
        self._process = subprocess.Popen(
            self._command(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            env=os.environ | self._env,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _command(self) -> list[str]:
        if self._settings is not None:
            settings = {"data": str(self.data), "driver": self.driver} | dict(self._settings)
            where = {"http": self.http, "admin": self.admin}
            program = str(ROOT / "tests" / "serve.py")
            started = [sys.executable, program, json.dumps(settings), json.dumps(where)]
            return self._prefix + started
        places = ["--data", str(self.data), "--http", self.http, "--admin", self.admin]
        command = [str(DAYFLY), "up", *places, "--driver", self.driver, "--log", "json"]
        return self._prefix + command + list(self._arguments)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self.log.append(line.rstrip("\n"))

    @property
    def is_ready(self) -> bool:
        """Whether the admin plane says so."""
        try:
            return self.ask("GET", "/ready").status == 200
        except OSError:
            return False

    @property
    def pid(self) -> int:
        """The server's process."""
        return self._process.pid

    def family(self) -> list[Process]:
        """The server's process and all below it; remembered for the check at the end."""
        found = family(self.pid)
        self.seen.update(found)
        return found

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal."""
        self.family()
        os.kill(self.pid, number)

    def wait(self, within_s: float = 40.0) -> int:
        """Its exit code. Raises when it does not end in time."""
        code = self._process.wait(within_s)
        self._reader.join(5)
        return code

    def stop(self) -> int:
        """SIGTERM, then its exit code."""
        if self._process.poll() is None:
            self.kill(signal.SIGTERM)
        return self.wait()

    def remains(self) -> list[str]:
        """What is still there of an ended server: processes, control groups, mounts."""
        alive = [f"process {p.pid} {stat(p.pid)}" for p in self.seen if p.is_alive]
        mounts = Path("/proc/self/mountinfo").read_text()
        mounted = ["a mount"] if str(self.data) in mounts else []
        return alive + cgroup_folders(self.pid) + mounted

    def errors(self) -> list[str]:
        """Lines of its log that tell of a defect."""
        return [line for line in self.log if '"level": "error"' in line or "Traceback" in line]

    def __enter__(self) -> "Server":
        return self.start()

    def __exit__(self, *_: object) -> None:
        try:
            code = self.stop()
        except subprocess.TimeoutExpired:
            self.kill()
            self.wait()
            raise AssertionError("the server does not end:\n" + "\n".join(self.log[-30:])) from None
        assert code == 0, self.log[-30:]
        assert not (left := eventually_none(self.remains)), left
        told = [line for line in self.log if "the driver says" in line]
        assert not self.errors(), "\n".join(self.errors() + told)

    # ---- the two planes -----------------------------------------------------------------------

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        plane: str = "admin",
        timeout_s: float = 60.0,
    ) -> Reply:
        """One request on a connection of its own; a body that is not bytes goes as JSON."""
        host, _, port = (self.admin if plane == "admin" else self.http).rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=timeout_s)
        given = dict(headers or {})
        if self.token and plane == "admin":
            given.setdefault("Authorization", f"Bearer {self.token}")
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            given.setdefault("Content-Type", "application/json")
        with contextlib.closing(connection):
            connection.request(method, path, body, given)
            answer = connection.getresponse()
            return Reply(answer.status, answer.headers, answer.read())

    def call(self, name: str, body: Any = None, *, path: str = "", **more: Any) -> Reply:
        """The function *name* over HTTP: POST when there is a body, else GET."""
        method = more.pop("method", "GET" if body is None else "POST")
        return self.ask(method, f"/fn/{name}{path}", body, plane="http", **more)

    def invoke(self, name: str, event: Any = None, namespace: str = "default") -> Reply:
        """The function *name* with a JSON event."""
        path = f"/namespaces/{namespace}/functions/{name}/invocations"
        return self.ask("POST", path, json.dumps(event).encode())

    def deploy(
        self,
        case: str,
        name: str = "",
        *,
        namespace: str = "default",
        files: Mapping[str, str | bytes] | None = None,
        **spec: Any,
    ) -> str:
        """Deploy tests/functions/*case* (or *files*) with *spec* in camelCase; returns its name."""
        name = name or case.replace("_", "-")
        code = FUNCTIONS / case if files is None else files
        uploaded = self.ask("POST", "/packages", pack(code))
        assert uploaded.status == 201, uploaded.body
        whole = {"handler": "main:handler", "package": uploaded.json()["digest"]} | spec
        done = self.ask("PUT", f"/namespaces/{namespace}/functions/{name}", whole)
        assert done.status == 200, done.body
        return name

    def logs(self, name: str, namespace: str = "default") -> list[dict[str, Any]]:
        """The last lines that the function wrote."""
        path = f"/namespaces/{namespace}/functions/{name}/logs?tail=1000"
        lines: list[dict[str, Any]] = self.ask("GET", path).json()
        return lines

    def describe(self, name: str) -> Any:
        """The function as the API shows it."""
        return self.ask("GET", f"/namespaces/default/functions/{name}").json()

    def delete(self, name: str) -> Reply:
        """Delete the function."""
        return self.ask("DELETE", f"/namespaces/default/functions/{name}")

    def pool(self) -> Any:
        """Every sandbox, and the counts."""
        return self.ask("GET", "/pool").json()

    def sandboxes(self, name: str) -> list[dict[str, Any]]:
        """The live sandboxes of a function."""
        return [box for box in self.pool()["sandboxes"] if box["function"] == f"default/{name}"]

    def metric(self, series: str) -> float:
        """The value of one series, 0 when it is not there."""
        for line in self.ask("GET", "/metrics").body.decode().splitlines():
            if line.rpartition(" ")[0] == series:
                return float(line.rpartition(" ")[2])
        return 0.0

    @contextlib.contextmanager
    def connection(self) -> Iterator[socket.socket]:
        """A raw connection to the data plane."""
        host, _, port = self.http.rpartition(":")
        with socket.create_connection((host, int(port)), 30) as opened:
            yield opened

    # ---- what the kernel says -----------------------------------------------------------------

    def has_zygote(self, namespace: str) -> bool:
        """Whether one of the namespace's is ready."""
        zygotes = self.pool()["zygotes"]
        return any(z["namespace"] == namespace and z["isReady"] for z in zygotes)

    def processes(self, sandbox: str) -> list[int]:
        """Every process in the sandbox, by its control group."""
        for folder in cgroup_folders(self.pid):
            with contextlib.suppress(OSError):  # it is going away
                return [int(p) for p in Path(folder, sandbox, "cgroup.procs").read_text().split()]
        return []

    def guests(self, sandbox: str) -> list[int]:
        """The processes in it that are not there to keep it."""
        names = {pid: status(pid).get("Name", "gone") for pid in self.processes(sandbox)}
        return [pid for pid, name in names.items() if name not in ("bwrap", "dayfly-init", "gone")]


def eventually_none(question: Callable[[], Sequence[T]], within_s: float = 15.0) -> Sequence[T]:
    """What is left of *question* once it is empty, or after the time."""
    end = time.monotonic() + within_s
    while (answer := question()) and time.monotonic() < end:
        time.sleep(0.05)
    return answer
