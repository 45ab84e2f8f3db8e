"""The chart on the cluster that DAYFLY_TEST_KUBECONFIG names: installed, upgraded, removed.

What its pods need is brought by $DAYFLY_TEST_IMAGE_LOADER; without one only what needs no pod runs.
"""

import base64
import json
import os
import secrets
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from tests.kubernetes import images
from tests.kubernetes.conftest import REAL
from tests.kubernetes.tools import Missing, tool

CHART = Path(__file__).parents[2] / "charts/dayfly"
WAIT_S_MAX = 90
SMALL = [
    f"--set=image.tag={images.TAG},image.pullPolicy=Never",
    "--set=gateway.replicas=1,gateway.resources.requests.cpu=10m",
    "--set=pool.replicas=1,pool.resources.requests.cpu=10m",
    f"--set=postgresql.image=dayfly-postgres:{images.TAG},postgresql.pullPolicy=Never",
    "--set=postgresql.user=65532,postgresql.resources.requests.cpu=10m",
]
needs_images = pytest.mark.skipif(
    images.LOADER not in os.environ, reason=f"{images.LOADER} names nothing that loads images"
)
pytestmark = pytest.mark.cluster


def ask(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "KUBECONFIG": REAL}
    command = [tool(name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)


def run(name: str, *arguments: str) -> str:
    done = ask(name, *arguments)

    assert done.returncode == 0, done.stderr
    return done.stdout


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S_MAX
    while not true():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def installed() -> Iterator[str]:
    """The namespace, and name, of a release."""
    try:
        tool("helm")
    except Missing as missing:
        pytest.skip(str(missing))
    if images.LOADER in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            images.load(images.postgres(Path(folder)))
    name = f"dayfly-{secrets.token_hex(3)}"
    run("kubectl", "apply", "--server-side", "--force-conflicts", "-f", str(CHART / "crds"))
    run("kubectl", "create", "namespace", name)
    try:
        run("helm", "install", name, str(CHART), "-n", name, "--skip-crds", *SMALL)
        yield name
    finally:
        run("helm", "uninstall", name, "-n", name, "--ignore-not-found")
        run("kubectl", "delete", "namespace", name, "--wait=false")


def kept(namespace: str) -> dict[str, dict[str, str]]:
    """What is in the release's secrets, in base64."""
    names = [f"{namespace}-{part}" for part in ("admin", "gateway-tls", "pool-tls", "postgresql")]
    found = json.loads(run("kubectl", "-n", namespace, "get", "secret", "-o", "json", *names))
    return {item["metadata"]["name"]: item["data"] for item in found["items"]}


def test_an_upgrade_keeps_every_secret_that_was_made(installed: str):
    """Another password would lock the pool out; another authority, gateways from shards."""
    before = kept(installed)
    upgrade = ["upgrade", installed, str(CHART), "-n", installed, "--skip-crds", *SMALL]
    run("helm", *upgrade, "--set=sandboxes.environments.science=science:1")
    settings = run("kubectl", "-n", installed, "get", "cm", f"{installed}-pods", "-o", "json")

    assert "science:1" in settings
    assert len(before) == 4
    assert kept(installed) == before


@pytest.mark.parametrize(
    ("account", "may", "what"),
    [
        ("pool", True, "create pods -n {sandboxes}"),
        ("pool", True, "create secrets -n {sandboxes}"),
        ("pool", True, "patch leases -n {release}"),
        ("pool", False, "update leases -n {release}"),
        ("pool", True, "patch functions.dayfly.dev --subresource=status -n {release}"),
        ("pool", True, "get secrets -n {sandboxes}"),
        ("pool", False, "patch secrets -n {sandboxes}"),
        ("pool", False, "get functions.dayfly.dev -n {release}"),
        ("pool", False, "create pods -n {release}"),
        ("pool", False, "get secrets -n {release}"),
        ("pool", False, "list pods -n kube-system"),
        ("pool", False, "create pods --subresource=exec -n {sandboxes}"),
        ("gateway", True, "watch leases -n {release}"),
        ("gateway", False, "get leases -n {release}"),
        ("gateway", False, "patch leases -n {release}"),
        ("gateway", False, "list pods -n {sandboxes}"),
        ("sandbox", False, "list pods -n {sandboxes}"),
    ],
)
def test_an_account_may_do_what_it_must_and_no_more(
    installed: str, account: str, may: bool, what: str
):
    """As the API server decides it."""
    sandboxes = f"{installed}-sandboxes"
    home = sandboxes if account == "sandbox" else installed
    command = ["auth", "can-i"]
    command += what.format(sandboxes=sandboxes, release=installed).split()
    command += [f"--as=system:serviceaccount:{home}:{installed}-{account}"]
    done = ask("kubectl", *command)

    assert done.stdout.strip() == ("yes" if may else "no"), done.stderr


def test_another_release_does_not_get_the_same_namespace_for_its_sandboxes(installed: str):
    """Each would delete the other's pods, as it knows nothing of them."""
    other = f"--set=sandboxes.namespace.name={installed}-sandboxes,sandboxes.namespace.create=false"
    command = ["install", "other", str(CHART), "-n", installed, "--skip-crds", "--dry-run=server"]
    done = subprocess.run(
        [tool("helm"), *command, other], capture_output=True, text=True, timeout=120, check=False
    )

    assert done.returncode
    assert f"has the sandboxes of release {installed}/{installed}" in done.stderr


@needs_images
def test_the_bundled_database_takes_the_address_that_the_pool_is_given(installed: str):
    """Where there is no DNS, with the pod's own address for its name."""
    pod = f"{installed}-postgresql-0"

    def address() -> str:
        found = json.loads(run("kubectl", "-n", installed, "get", "pod", pod, "-o", "json"))
        status = found["status"].get("containerStatuses", [{}])[0]
        return str(found["status"].get("podIP", "")) if status.get("ready") else ""

    until(lambda: bool(address()))
    dsn = base64.b64decode(kept(installed)[f"{installed}-postgresql"]["dsn"]).decode()
    with psycopg.connect(dsn, hostaddr=address(), connect_timeout=10) as connection:
        row = connection.execute("SELECT current_user, current_database()").fetchone()

    assert row == ("dayfly", "dayfly")
