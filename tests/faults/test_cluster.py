"""Two gateways, two shards, one PostgreSQL, all real processes: what dies or restarts, and what of
it clients see.
"""

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import pytest
from tests.cluster import SHARDS, Cluster, Load
from tests.harness import Server, eventually
from tests.servers import Postgres

pytestmark = pytest.mark.waits

WHO = "import os\ndef handler(event, context):\n    return str(os.getppid())\n"
NAP = "import time\ndef handler(event, context):\n    time.sleep(0.2)\n    return 'slept'\n"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ExitStack() as stack:
        database = stack.enter_context(Postgres())
        yield Cluster(tmp_path_factory.mktemp("cluster"), database, stack)


def came(server: Server, path: str, body: bytes) -> bool:
    return server.ask("GET", path, plane="http").body == body


def idle(server: Server) -> bool:
    return server.pool()["underWay"] == 0


def restarted(server: Server, work: Callable[[], None] = lambda: None) -> None:
    assert server.stop() == 0, server.log[-20:]
    assert not server.errors(), server.errors()
    work()
    server.start()


# ---- what it does -------------------------------------------------------------------------------


def test_both_gateways_bring_a_function_to_the_one_shard_that_has_it(cluster: Cluster):
    name = cluster.deploy("who", WHO)
    answers = {g.call(name, b"{}").body for g in cluster.gateways for _ in range(5)}
    boxes = {n: len(shard.sandboxes(name)) for n, shard in cluster.shards.items()}

    assert len(answers) == 1
    assert [n for n, number in boxes.items() if number] == [cluster.home(name).name]
    pool = cluster.gateways[0].pool()
    assert {box["shard"] for box in pool["sandboxes"]} == {*SHARDS}


def test_routes_deploys_and_logs_go_through_any_gateway(cluster: Cluster):
    code = "def handler(event, context):\n    print('said')\n    return 'routed'\n"
    cluster.gateways[1].deploy("routed", files={"main.py": code}, routes=[{"path": "/way/{in}"}])
    for gateway in cluster.gateways:
        assert eventually(partial(came, gateway, "/way/x", b"routed"))
        assert gateway.describe("routed")["status"]["sandboxes"] == 1
        assert eventually(partial(gateway.logs, "routed"))[0]["text"] == "said"
        gone = gateway.call("nobody")
        assert (gone.status, gone.json()["error"]) == (404, "FunctionNotFound")
    assert cluster.gateways[0].ask("GET", "/functions?shard=nobody").status == 400
    home = cluster.home("routed").name
    assert cluster.gateways[0].ask("GET", f"/metrics?shard={home}").body.count(b"dayfly_pool")


def test_what_is_accepted_by_one_gateway_is_told_by_the_other(cluster: Cluster):
    name = cluster.deploy("later", WHO)
    headers = {"Prefer": "respond-async", "Idempotency-Key": "once"}
    one, other = cluster.gateways
    accepted = [g.call(name, b"{}", headers=headers) for g in (one, other)]
    path = accepted[0].headers["Location"]
    told = other.ask("GET", path, headers={"Prefer": "wait=30"}, plane="http")

    assert [reply.status for reply in accepted] == [202, 202]
    assert accepted[1].headers["Idempotency-Replayed"] == "true"
    assert accepted[0].json() == accepted[1].json()
    assert (told.status, told.json()["state"]) == (200, "succeeded")
    assert one.ask("GET", "/invocations/nobody", plane="http").status == 404
    assert one.ask("POST", "/hooks/default/nobody", b"{}", plane="http").status == 404


def test_what_is_kept_ready_is_kept_by_its_shard_alone(cluster: Cluster):
    name = cluster.deploy("ready", WHO, minScale=2, keepAliveSeconds=0)
    home = cluster.home(name)
    others = [shard for shard in cluster.shards.values() if shard is not home]

    assert eventually(lambda: len(home.sandboxes(name)) == 2)
    assert [len(shard.sandboxes(name)) for shard in others] == [0]


# ---- what dies ----------------------------------------------------------------------------------


def test_a_killed_shards_functions_answer_from_the_other_at_once(cluster: Cluster):
    """Of what it had only requests that may change something are told of it."""
    name = cluster.deploy("survives", WHO)
    home = cluster.home(name)
    with Load(cluster.gateways, f"/fn/{name}") as load:
        home.kill(signal.SIGKILL)
        home.wait()
        assert load.more()
        failed = Counter(load.failed)
        home.start()
        cluster.whole()
        assert load.more()

    assert set(failed) <= {"502 ShardLost"}  # which were running there
    assert failed["502 ShardLost"] <= 4
    assert set(load.failed) <= {"502 ShardLost"}


def test_safe_requests_survive_a_killed_shard(cluster: Cluster):
    name = cluster.deploy("safe", WHO)
    home = cluster.home(name)
    with Load(cluster.gateways, f"/fn/{name}", "GET") as load:
        home.kill(signal.SIGKILL)
        home.wait()
        assert load.more()
        home.start()
        cluster.whole()

    assert not load.failed


def test_a_shard_that_stands_still_is_passed_over_and_comes_back(cluster: Cluster):
    """Nothing breaks, nothing answers: it is known by its silence."""
    name = cluster.deploy("frozen", WHO)
    home = cluster.home(name)
    os.kill(home.pid, signal.SIGSTOP)
    try:
        gateway = cluster.gateways[0]
        assert eventually(lambda: home.name not in cluster.live(gateway))
        assert gateway.call(name, b"{}").status == 200
    finally:
        os.kill(home.pid, signal.SIGCONT)
    cluster.whole()

    assert cluster.gateways[0].call(name, b"{}").status == 200


def test_a_killed_gateway_takes_nothing_but_its_own_requests(cluster: Cluster):
    name = cluster.deploy("stays", NAP)
    one, other = cluster.gateways
    with Load([one], f"/fn/{name}") as doomed, Load([other], f"/fn/{name}") as load:
        one.kill(signal.SIGKILL)
        one.wait()
        assert load.more(20)
        one.start()
        cluster.whole()
        assert doomed.more(20)

    assert not load.failed
    assert sum(doomed.failed.values()) <= 8  # four clients: a request each, and one just connected
    assert all(eventually(partial(idle, shard)) for shard in cluster.shards.values())


def test_accepted_events_survive_the_shard_that_accepted_them(cluster: Cluster):
    name = cluster.deploy("kept", NAP)
    home = cluster.home(name)
    headers = {"Prefer": "respond-async"}
    paths = [
        cluster.gateways[n % 2].call(name, b"{}", headers=headers).headers["Location"]
        for n in range(30)
    ]
    home.kill(signal.SIGKILL)
    home.wait()
    gateway = cluster.gateways[0]
    wait = {"Prefer": "wait=60"}
    states = {
        json.loads(gateway.ask("GET", p, headers=wait, plane="http", timeout_s=90).body)["state"]
        for p in paths
    }
    home.start()
    cluster.whole()

    assert states == {"succeeded"}


# ---- what restarts ------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [WHO, NAP], ids=["quick", "slow"])
def test_no_request_fails_while_everything_restarts_in_turn(cluster: Cluster, code: str):
    """Shards and gateways, with SIGTERM, under load."""
    name = cluster.deploy("rolling", code)
    with Load(cluster.gateways, f"/fn/{name}") as load:
        for shard in cluster.shards.values():
            restarted(shard, load.more)
            cluster.whole()
        for gateway in cluster.gateways:
            restarted(gateway, load.more)
            cluster.whole()
        assert load.more()

    assert not load.failed
