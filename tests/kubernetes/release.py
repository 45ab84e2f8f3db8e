"""The chart on the cluster that $KUBECONFIG names: images brought there, installed, removed.

    python -m tests.kubernetes.release    from nothing to an answered request: make kubernetes-demo

$DAYFLY_TEST_IMAGE_LOADER brings images that are made here, of this checkout; see `images`. Without
it the chart's own images must be there. With $DAYFLY_TEST_SERVICES set (a cluster on this machine
that has neither kube-proxy nor DNS; as root) `services` stands in for the one, and addresses for
the other.
"""

import base64
import contextlib
import http.client
import ipaddress
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from tests.harness import free_port
from tests.kubernetes import images
from tests.kubernetes.tools import tool

ROOT: Final = Path(__file__).parents[2]
CHART: Final = ROOT / "charts" / "dayfly"
NO_SERVICES: Final = "DAYFLY_TEST_SERVICES"
WAIT_S_MAX: Final = 180
CLASS: Final = {"memoryMb": 256, "cpu": 0.1, "ephemeralMb": 64}
OURS: Final = (
    f"image.tag={images.TAG}",
    "image.pullPolicy=Never",
    f"sandboxes.image.tag={images.TAG}",
    "sandboxes.image.pullPolicy=Never",
    f"postgresql.image=dayfly-postgres:{images.TAG}",
    "postgresql.pullPolicy=Never",
    "postgresql.user=65532",
)
SMALL: Final = (
    "gateway.resources.requests.cpu=10m",
    "pool.resources.requests.cpu=10m",
    "postgresql.resources.requests.cpu=10m",
)


def run(name: str, *arguments: str, timeout_s: float = WAIT_S_MAX) -> str:
    """One call of helm or kubectl. Raises RuntimeError with what it said."""
    done = subprocess.run(
        [tool(name), *arguments], capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(arguments[:4])}: {done.stderr.strip()}")
    return done.stdout


def until(true: Callable[[], object], what: str, within_s: float = WAIT_S_MAX) -> None:
    """Raises RuntimeError when it does not become true in time."""
    end = time.monotonic() + within_s
    while not true():
        if time.monotonic() > end:
            raise RuntimeError(f"not in {within_s:g} s: {what}")
        time.sleep(0.2)


def load_images() -> None:
    """Bring this checkout's images to the cluster, if there is a way."""
    if images.LOADER in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            for make in images.ALL:
                images.load(make(Path(folder) / make.__name__))


class Release:
    """One installation, in a namespace of its own name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.whole = name if "dayfly" in name else f"{name}-dayfly"
        """What its objects are called, before what they are."""

    def install(
        self,
        *settings: str,
        classes: tuple[Any, ...] = (CLASS,),
        values: Mapping[str, Any] | None = None,
    ) -> None:
        """Install or upgrade, and wait until gateways and shards are ready.

        *settings* are NAME=TEXT, *values* whatever else there is.
        """
        more = {"sandboxes.classes": classes, **(values or {})}
        given = [*SMALL, *(OURS if images.LOADER in os.environ else ()), *settings]
        if NO_SERVICES in os.environ:
            address = self._address()
            given += [f"postgresql.clusterIP={address}", f"postgresql.host={address}"]
        crds = ["apply", "--server-side", "--force-conflicts", "-f", str(CHART / "crds")]
        run("kubectl", *crds)  # helm would never change them again
        how = ["upgrade", "--install", self.name, str(CHART), "--namespace", self.name]
        run(
            "helm",
            *how,
            "--create-namespace",
            "--skip-crds",
            f"--set={','.join(given)}",
            *(f"--set-json={name}={json.dumps(value)}" for name, value in more.items()),
            "--wait",
            f"--timeout={WAIT_S_MAX}s",
            timeout_s=WAIT_S_MAX + 30,
        )

    def _address(self) -> str:
        """For the database's Service: what it has, else one that nobody is likely to have."""
        name = f"{self.whole}-postgresql"
        with contextlib.suppress(RuntimeError):
            return self.kubectl("get", "service", name, "-o", "jsonpath={.spec.clusterIP}")
        own = run("kubectl", "get", "service", "kubernetes", "-o", "jsonpath={.spec.clusterIP}")
        return str(ipaddress.ip_address(own) + 100 + secrets.randbelow(100))

    def remove(self) -> None:
        """Nothing of it stays."""
        run("helm", "uninstall", self.name, "--namespace", self.name, "--ignore-not-found")
        run("kubectl", "delete", "namespace", self.name, "--ignore-not-found", "--wait=false")

    def apply(self, manifest: str) -> None:
        """Declare it in its namespace."""
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            file.write(manifest)
            file.flush()
            self.kubectl("apply", "-f", file.name)

    def dsn(self, host: str, port: int) -> str:
        """How the bundled database is reached at that address."""
        what = ("get", "secret", f"{self.whole}-postgresql", "-o", "jsonpath={.data.dsn}")
        parts = urlsplit(base64.b64decode(self.kubectl(*what)).decode())
        return parts._replace(netloc=f"{parts.username}:{parts.password}@{host}:{port}").geturl()

    def kubectl(self, *arguments: str) -> str:
        """In its namespace."""
        return run("kubectl", "--namespace", self.name, *arguments)

    def pods(self, component: str) -> list[dict[str, Any]]:
        """Of gateway, pool, postgresql or sandbox."""
        where = f"{self.name}-sandboxes" if component == "sandbox" else self.name
        label = f"app.kubernetes.io/component={component}"
        found = run("kubectl", "--namespace", where, "get", "pods", "-l", label, "-o", "json")
        pods: list[dict[str, Any]] = json.loads(found)["items"]
        return pods

    @property
    def token(self) -> str:
        """The admin plane's."""
        what = ("get", "secret", f"{self.whole}-admin", "-o", "jsonpath={.data.token}")
        return base64.b64decode(self.kubectl(*what)).decode()

    @contextlib.contextmanager
    def reached(self, service: str, port: int) -> Iterator[str]:
        """HOST:PORT of one of its Services, for as long as the block runs."""
        name = f"{self.whole}-{service}"
        if NO_SERVICES in os.environ:
            address = self.kubectl("get", "service", name, "-o", "jsonpath={.spec.clusterIP}")
            yield f"{address}:{port}"
            return
        here = free_port()
        command = [tool("kubectl"), "--namespace", self.name, "port-forward", f"service/{name}"]
        with subprocess.Popen([*command, f"{here}:{port}"], stdout=subprocess.PIPE) as forward:
            assert forward.stdout is not None
            forward.stdout.readline()  # it listens
            try:
                yield f"127.0.0.1:{here}"
            finally:
                forward.terminate()


@contextlib.contextmanager
def services() -> Iterator[None]:
    """Where the cluster has no kube-proxy, something in its place."""
    if NO_SERVICES not in os.environ:
        yield
        return
    command = [sys.executable, "-m", "tests.kubernetes.services"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError("services: see above")
        try:
            yield
        finally:
            process.terminate()


def demo() -> None:
    """From nothing to an answered request, told step by step."""
    release, started = Release(os.environ.get("DAYFLY_DEMO", "dayfly-demo")), time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {text}", flush=True)

    say("images")
    load_images()
    with services():
        say("helm install")
        release.install("gateway.replicas=1", "pool.replicas=1", "pool.genericMin=2")
        say("kubectl apply -f examples/on_kubernetes/greet.yaml")
        release.kubectl("apply", "-f", str(ROOT / "examples" / "on_kubernetes" / "greet.yaml"))
        release.kubectl("wait", "--for=condition=Ready", "--timeout=60s", "function/greet")
        with release.reached("gateway", 80) as address:
            connection = http.client.HTTPConnection(address, timeout=60)
            path = f"/ns/{release.name}/fn/greet"
            say(f"curl http://{address}{path}?name=Ada")
            connection.request("GET", f"{path}?name=Ada")
            answer = connection.getresponse()
            for name in ("Dayfly-Start", "Server-Timing"):
                say(f"{name}: {answer.headers[name]}")
            say(f"{answer.status} {answer.read().decode()}")
            if answer.status != 200:
                raise SystemExit(1)
    print(f"\nremove it: helm uninstall {release.name} --namespace {release.name}")


if __name__ == "__main__":
    demo()
