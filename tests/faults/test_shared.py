"""Several servers with one PostgreSQL: what one accepted another runs, and a database that dies."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.harness import Reply, Server, eventually
from tests.servers import Postgres

pytestmark = pytest.mark.waits

LATER = {"Prefer": "respond-async"}
NAP = "import time\ndef handler(event, context):\n    time.sleep(0.05)\n    return 'slept'\n"


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with Postgres() as started:
        yield started


@pytest.fixture
def sharing(
    database: Postgres, tmp_path: Path, new_server: Callable[..., Server]
) -> Callable[[str], Server]:
    """Starts a server that keeps its events there."""
    file = tmp_path / "dsn"
    file.write_text(database.dsn)
    file.chmod(0o600)

    def start(name: str) -> Server:
        return new_server("--events-dsn-file", str(file), data=tmp_path / name)

    return start


def send(server: Server, name: str) -> Reply:
    return server.call(name, b"{}", headers=LATER)


def outcome(server: Server, id_: str) -> Any:
    told = server.ask("GET", f"/invocations/{id_}", headers={"Prefer": "wait=60"}, plane="http")
    assert told.status == 200, told.body
    return told.json()


def test_what_a_dead_server_had_is_run_by_another(sharing: Callable[[str], Server]):
    """Within the ten seconds that it may be silent; and nobody's attempts suffer."""
    one, other = sharing("one"), sharing("other")
    for server in (one, other):
        server.deploy("nap", files={"main.py": NAP}, maxScale=2, retry={"attempts": 1})
    ids = [send(one, "nap").json()["id"] for _ in range(200)]
    ids += [send(other, "nap").json()["id"] for _ in range(20)]
    one.kill(signal.SIGKILL)
    one.wait()
    ended = [outcome(other, id_) for id_ in ids]
    one.start()

    assert {(end["state"], end["attempts"]) for end in ended} == {("succeeded", 1)}
    assert outcome(one, ids[0])["state"] == "succeeded"


def test_a_server_that_stood_still_for_too_long_loses_its_leases_and_its_results(
    sharing: Callable[[str], Server],
):
    """SIGSTOP for longer than the lease: the other's run counts, the late one is refused."""
    one, other = sharing("one"), sharing("other")
    code = {"main.py": NAP.replace("0.05", "2")}
    one.deploy("long-nap", files=code, retry={"attempts": 1})
    id_ = send(one, "long-nap").json()["id"]
    assert eventually(lambda: one.describe("long-nap")["status"]["busy"])
    os.kill(one.pid, signal.SIGSTOP)
    try:
        other.deploy("long-nap", files=code, retry={"attempts": 1})
        end = outcome(other, id_)
    finally:
        os.kill(one.pid, signal.SIGCONT)

    assert (end["state"], end["attempts"]) == ("succeeded", 1)
    late = "dayfly_events_late_results_total 1.0"
    assert eventually(lambda: late in one.ask("GET", "/metrics").body.decode())
    assert outcome(one, id_)["finishedAt"] == end["finishedAt"]


def test_a_database_that_dies_accepts_nothing_and_loses_nothing(
    sharing: Callable[[str], Server], database: Postgres
):
    """503 while it is away; what was accepted before and after is run."""
    server = sharing("one")
    server.deploy("nap-again", files={"main.py": NAP}, maxScale=1, retry={"attempts": 1})
    ids = [send(server, "nap-again").json()["id"] for _ in range(30)]
    database.stop()
    refused = send(server, "nap-again")
    database.start()
    assert (refused.status, refused.json()["error"]) == (503, "StoreFailed")
    assert eventually(lambda: send(server, "nap-again").status == 202)
    ids.append(send(server, "nap-again").json()["id"])

    ended = [outcome(server, id_) for id_ in ids]
    assert {(end["state"], end["attempts"]) for end in ended} == {("succeeded", 1)}
    server.log[:] = [line for line in server.log if "events cannot be written" not in line]
