"""Every example on a real cluster, the one that $KUBECONFIG names, as a reader runs them: with the
`dayfly` command and HTTP, at the gateway of a release.

What its pods need is brought by $DAYFLY_TEST_IMAGE_LOADER. Brokers run here, and are reached at the
address that this machine has for pods.
"""

import asyncio
import importlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
from tests.brokers.folder import Place as FolderPlace
from tests.brokers.kafka import Kafka
from tests.brokers.sqs import SECRET
from tests.contract.test_sources import BROKERS
from tests.examples import (
    ADDRESSES,
    EXAMPLES,
    KEY,
    LISTENING,
    LONG_S,
    copied,
    dayfly,
    fires,
    listens,
    takes_events,
    takes_webhooks,
)
from tests.faults.proxy import Proxy
from tests.harness import Server, eventually
from tests.kubernetes import images
from tests.kubernetes.release import CLASS, NO_SERVICES, Release, run, services
from tests.kubernetes.tools import Missing, tool

INBOX: Final = "/tmp/dayfly-inbox"
INDEX: Final = "/index"
IMAGE: Final = "dayfly-runtime-git"
is_here: Final = NO_SERVICES in os.environ
"""Whether the cluster's node is this machine, and has its folders."""

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        images.LOADER not in os.environ, reason=f"{images.LOADER} names nothing that loads images"
    ),
]


class Cluster(NamedTuple):
    """A release, as those see it who use it."""

    release: Release
    server: Server
    """Its gateway."""

    folder: Path
    """Of this machine; shards have what is in it, too, if the cluster is here."""

    address: str
    """Of this machine, as pods see it."""

    tmp_path: Path

    def __call__(self, *arguments: str) -> str:
        """What the command says."""
        return dayfly(self.server, *arguments)


# ---- the release --------------------------------------------------------------------------------


def load_images(folder: Path) -> None:
    """Sandboxes have git, as docs/kubernetes.md says that an image of one's own may have it."""
    images.load(images.runtime(folder / "runtime", f"{IMAGE}:{images.TAG}", ("git",)))
    images.load(images.server(folder / "server"))
    images.load(images.postgres(folder / "postgres"))


def shared(folder: Path) -> dict[str, Any]:
    """Values that give shards what is in *folder*: files, and the library of an example."""
    if not is_here:
        return {}
    places = {"inbox": INBOX, "index": INDEX}
    (folder / "inbox").mkdir()
    (folder / "inbox").chmod(0o777)  # shards run as somebody else
    wheels = folder / "index/humanize"
    wheels.mkdir(parents=True)
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    wanted = ["-d", str(wheels), "-r", str(EXAMPLES / "humanize/requirements.txt")]
    subprocess.run([*fetch, *wanted], check=True, timeout=120)
    links = [f'<a href="{wheel.name}">{wheel.name}</a>' for wheel in wheels.glob("*.whl")]
    (wheels / "index.html").write_text("\n".join(links))
    volumes = [{"name": n, "hostPath": {"path": str(folder / n)}} for n in places]
    mounts = [{"name": name, "mountPath": path} for name, path in places.items()]
    return {
        "pool.extraVolumes": volumes,
        "pool.extraVolumeMounts": mounts,
        "pool.extraEnv": [{"name": "UV_DEFAULT_INDEX", "value": f"file://{INDEX}"}],
    }


def seen_by(pod: str) -> str:
    """This machine's address on the way to that one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((pod, 9))  # sends nothing
        return str(probe.getsockname()[0])


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    try:
        tool("helm")
    except Missing as missing:
        pytest.skip(str(missing))
    with tempfile.TemporaryDirectory() as made:
        load_images(Path(made))
    folder = tmp_path_factory.mktemp("cluster")
    release = Release(f"dayfly-{secrets.token_hex(3)}")
    few = (
        "gateway.replicas=1",
        "pool.replicas=2",
        "pool.genericMin=1",
        "pool.genericMax=2",
        "pool.sandboxesMax=6",
        "sandboxes.images.runAsUser=65532",
    )
    with services(), ExitStack() as stack:
        stack.callback(release.remove)
        run("kubectl", "create", "namespace", release.name)
        logins = [f"--from-literal=sqs={SECRET}", f"--from-literal=webhook={KEY}"]
        release.kubectl("create", "secret", "generic", "dayfly-secrets", *logins)
        release.install(
            *few,
            f"sandboxes.image.repository={IMAGE}",
            classes=({**CLASS, "stepsMb": 128},),
            values=shared(folder),
        )
        http = stack.enter_context(release.reached("gateway", 80))
        admin = stack.enter_context(release.reached("admin", 8081))
        server = Server(folder, http=http, admin=admin, token=release.token)
        address = seen_by(release.pods("pool")[0]["status"]["podIP"])
        yield Cluster(release, server, folder, address, folder)


@pytest.fixture
def cluster(installed: Cluster, tmp_path: Path) -> Cluster:
    return installed._replace(tmp_path=tmp_path)


# ---- what is done with each ---------------------------------------------------------------------


def called(cluster: Cluster, folder: str, body: Any) -> Any:
    """What the function of an example answers, once it is deployed."""
    cluster("deploy", str(EXAMPLES / folder))
    answer = cluster.server.call(folder.replace("_", "-"), body)
    assert answer.status == 200, answer.body
    return answer.json()


def hello(cluster: Cluster) -> None:
    assert called(cluster, "hello", {"name": "Ada"}) == {"message": "Hello, Ada!"}
    by_query = cluster.server.ask("GET", "/fn/hello?name=Ada", plane="http")
    assert by_query.json() == {"message": "Hello, Ada!"}
    assert "greeting Ada" in cluster("logs", "hello")


def counter(cluster: Cluster) -> None:
    assert called(cluster, "counter", None)["calls"] == 1
    again = cluster.server.call("counter")
    assert (again.json()["calls"], again.headers["Dayfly-Start"]) == (2, "warm")
    assert json.loads(cluster("invoke", "counter"))["calls"] == 3
    id_ = cluster("invoke", "counter", "--later").strip()
    assert eventually(lambda: "succeeded" in cluster("events", "show", id_))


def async_fanout(cluster: Cluster) -> None:
    answer = called(cluster, "async_fanout", {"width": 100})
    assert answer == {"sum": sum(n * n for n in range(100)), "width": 100}


def humanize(cluster: Cluster) -> None:
    assert called(cluster, "humanize", {"bytes": 123456789})["said"] == "117.7 MiB"


def on_kubernetes(cluster: Cluster) -> None:
    """With kubectl, and so in the release's namespace."""
    cluster.release.kubectl("apply", "-f", str(EXAMPLES / "on_kubernetes/greet.yaml"))
    ready = ("--for=condition=Ready", "--timeout=60s", "function/greet")
    cluster.release.kubectl("wait", *ready)
    path = f"/ns/{cluster.release.name}/fn/greet?name=Ada"
    assert cluster.server.ask("GET", path, plane="http").body == b"Hello, Ada, from a pod"


def container(cluster: Cluster) -> None:
    """The image is what the Dockerfile makes, but for where its interpreter is from."""
    with tempfile.TemporaryDirectory() as made:
        image = images.runtime(Path(made), "registry.example/container:1")
        shutil.copy(EXAMPLES / "container/app/server.py", image.root)
        images.load(image._replace(command=["python3", "/server.py"]))
    cluster("apply", "-f", str(EXAMPLES / "container/function.yaml"))
    answer = cluster.server.ask("GET", "/fn/container/deep?er", plane="http")
    assert re.fullmatch(rb"hello from dayfly-\S+ at /deep\?er\n", answer.body), answer
    cluster("delete", "container", "--yes")


def array_job(cluster: Cluster) -> None:
    cluster("apply", "-f", str(EXAMPLES / "array_job"))
    assert eventually(lambda: "Complete" in cluster("job", "show", "primes"), LONG_S)
    assert "primes from 990000 to 999999" in cluster("job", "logs", "primes")
    results = map(json.loads, cluster("job", "results", "primes").splitlines())
    assert sum(each["result"] for each in results) == 78498
    cluster("job", "delete", "primes", "--yes")


def artifact(cluster: Cluster, run_name: str, result: str) -> Path:
    """The file that a run has for a result."""
    found = json.loads(cluster("run", "show", run_name, "--json"))["status"]["results"]
    file = cluster.tmp_path / result
    cluster("artifact", "get", found[result]["uri"], "-o", str(file))
    return file


def pipeline(cluster: Cluster) -> None:
    cluster("workflow", "deploy", str(EXAMPLES / "pipeline/main.py"))
    cluster("run", "start", "houses", "--name", "first")
    cluster("run", "start", "houses", "--name", "second")
    assert cluster("run", "explain", "second").count("it left the same in run first") == 4
    report = artifact(cluster, "second", "report").read_text()
    assert "| neighbours | 24922 euros |" in report


def clone_build(cluster: Cluster) -> None:
    cluster("apply", "-f", str(EXAMPLES / "clone_build"))
    cluster("run", "start", "clone-build", "--name", "greet")
    program = artifact(cluster, "greet", "program")
    command = [sys.executable, str(program), "Ada"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert said == "Hello, Ada!\n"
    assert "clone-build" in cluster("provenance", "show", "greet")


def on_folder(cluster: Cluster) -> Coroutine[Any, Any, None]:
    """Unchanged: shards have the folder, as it is in `pool.extraVolumes`."""
    if not is_here:
        pytest.skip("the cluster's nodes have no folder of this machine's")
    place = FolderPlace(cluster.folder / "inbox")
    return listens(cluster.server, copied("on_folder", cluster.tmp_path), place)


def on_webhook(cluster: Cluster) -> None:
    """Its secret is the cluster's, and `dayfly secret put` would tell one shard alone."""
    path = "/namespaces/default/secrets/webhook"
    refused = cluster.server.ask("PUT", path, KEY.encode())
    assert (refused.status, refused.json()["error"]) == (409, "SecretsAreMounted")
    takes_webhooks(cluster.server, copied("on_webhook", cluster.tmp_path))


async def listening(cluster: Cluster, broker: str) -> None:
    """The same with a broker of this machine's; its place is in the manifest."""
    Broker = getattr(importlib.import_module(f"tests.brokers.{broker}"), BROKERS[broker])
    with Broker() as up, Proxy(up.port, at=cluster.address):
        place = await up.place(LISTENING[broker].place)
        there = next(getattr(place.spec, f) for f in ADDRESSES if hasattr(place.spec, f))
        folder = copied(
            f"on_{broker}", cluster.tmp_path, there.replace("127.0.0.1", cluster.address)
        )
        await asyncio.to_thread(asyncio.run, listens(cluster.server, folder, place))


WAYS: Final[dict[str, Callable[[Cluster], Coroutine[Any, Any, None] | None]]] = {
    "array_job": array_job,
    "async_fanout": async_fanout,
    "clone_build": clone_build,
    "container": container,
    "counter": counter,
    "hello": hello,
    "humanize": humanize,
    "on_event": lambda c: takes_events(c.server, copied("on_event", c.tmp_path)),
    "on_folder": on_folder,
    "on_kafka": lambda c: listening(c, "kafka"),
    "on_kubernetes": on_kubernetes,
    "on_mqtt": lambda c: listening(c, "mqtt"),
    "on_nats": lambda c: listening(c, "nats"),
    "on_postgres": lambda c: listening(c, "postgres"),
    "on_rabbitmq": lambda c: listening(c, "rabbitmq"),
    "on_redis": lambda c: listening(c, "redis"),
    "on_sqs": lambda c: listening(c, "sqs"),
    "on_webhook": on_webhook,
    "pipeline": pipeline,
    "report": lambda c: fires(c.server, copied("report", c.tmp_path)),
}


@pytest.mark.parametrize("example", sorted(p.name for p in EXAMPLES.iterdir() if p.is_dir()))
async def test_an_example_runs_on_the_cluster(
    cluster: Cluster, example: str, monkeypatch: pytest.MonkeyPatch
):
    """Each folder of examples/: one that is not among WAYS is not known to run there."""
    monkeypatch.setattr(Kafka, "advertised", cluster.address)
    if (rest := WAYS[example](cluster)) is not None:
        await rest
