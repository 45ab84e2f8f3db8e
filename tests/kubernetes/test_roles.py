"""Gateways and shards that find each other by Leases, in the cluster that DAYFLY_TEST_KUBECONFIG
names.
"""

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from tests.cluster import SHARDS, Cluster, Load
from tests.harness import eventually
from tests.kubernetes.conftest import REAL
from tests.servers import Postgres

pytestmark = pytest.mark.cluster

HELLO = "def handler(event, context):\n    return 'hello'\n"


@pytest.fixture
def cluster(tmp_path: Path, namespace: str) -> Iterator[Cluster]:
    config = yaml.safe_load(Path(REAL).read_text())
    for context in config["contexts"]:
        context["context"]["namespace"] = namespace
    own = tmp_path / "kubeconfig"
    own.write_text(yaml.safe_dump(config))
    own.chmod(0o600)
    with ExitStack() as stack:
        database = stack.enter_context(Postgres())
        yield Cluster(tmp_path, database, stack, str(own))


def test_shards_with_leases_are_found_and_what_dies_is_passed_over(cluster: Cluster):
    """And what one kept ready is kept by the other when its lease is over."""
    name = cluster.deploy("found", HELLO)
    home = cluster.home(name)
    kept = next(n for n in map("kept-{}".format, range(99)) if cluster.home(n) is home)
    cluster.gateways[0].deploy(kept, files={"main.py": HELLO}, minScale=1)
    assert eventually(lambda: home.sandboxes(kept))
    (other,) = [shard for shard in cluster.shards.values() if shard is not home]
    with Load(cluster.gateways, f"/fn/{name}", "GET") as load:
        home.kill(signal.SIGKILL)
        home.wait()
        assert load.more()
        assert eventually(lambda: other.sandboxes(kept), 30)
        home.start()
        cluster.whole()
        assert home.stop() == 0
        assert load.more()
        home.start()
        cluster.whole()

    assert not load.failed, load.told
    assert all(cluster.live(gateway) == {*SHARDS} for gateway in cluster.gateways)
