"""The wall clock of a real server jumps: no lease ends for it, and no schedule fires twice."""

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tests.harness import Server, eventually
from tests.servers import Postgres

LIBRARIES = sorted(Path("/usr/lib").glob("**/faketime/libfaketime.so.1"))
pytestmark = [pytest.mark.waits, pytest.mark.skipif(not LIBRARIES, reason="needs faketime")]
LATER = {"Prefer": "respond-async"}
NAP = (
    "import os, time\n"
    "def handler(event, context):\n"
    "    began = time.monotonic()\n"
    "    while not os.path.exists('/tmp/never') and time.monotonic() < began + 1.5:\n"
    "        time.sleep(0.01)\n"
    "    return 'slept'\n"
)
QUICK = "def handler(event, context):\n    return 'done'\n"
HOUR_S = 3600


class Clock:
    """The wall clock of one server. It can be set while the server runs; monotonic time is true."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "clock"
        self.env = {
            "LD_PRELOAD": str(LIBRARIES[-1]),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            # else every wait for the interpreter's lock is over at once, and begun again
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
        }
        self.offset_s = 0.0
        self.set(0)

    def set(self, offset_s: float) -> None:
        """So many seconds off the true time."""
        part = self._file.with_suffix(".part")
        part.write_text(f"{offset_s:+.3f}\n")
        part.replace(self._file)
        self.offset_s = offset_s

    def set_to(self, moment: datetime) -> None:
        """To this time, for now."""
        self.set(moment.timestamp() - time.time())


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path)


def outcome(server: Server, id_: str) -> Any:
    told = server.ask("GET", f"/invocations/{id_}", headers={"Prefer": "wait=60"}, plane="http")
    assert told.status == 200, told.body
    return told.json()


def run(server: Server, function: str) -> list[str]:
    """The ids of the events that the function has run for."""
    page = server.ask("GET", f"/events?function=default/{function}&limit=1000").json()
    return [event["id"] for event in page if event["state"] == "succeeded"]


def fired(server: Server, function: str) -> list[str]:
    """For which times a schedule has fired, as the handlers' events say, in order."""
    return sorted(
        server.ask("GET", f"/events/{id_}").json()["result"]["body"].strip('"')
        for id_ in run(server, function)
    )


def upcoming(server: Server) -> str:
    """When the one trigger fires next."""
    return str(server.ask("GET", "/triggers").json()[0]["status"]["next"])


def times_of(server: Server, name: str, schedule: str, **cron: str) -> None:
    """A function that tells for which time it fires, and its trigger."""
    code = {"main.py": "def handler(event, context):\n    return event['time']\n"}
    server.deploy("", name, files=code)
    spec = {"function": name, "cron": {"schedule": schedule} | cron}
    reply = server.ask("PUT", f"/namespaces/default/triggers/{name}", spec)
    assert reply.status == 200, reply.body


@pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S])
def test_no_run_loses_its_lease_when_the_clock_jumps(
    clock: Clock, new_server: Callable[..., Server], jump_s: int
):
    server = new_server(env=clock.env)
    server.deploy("", "nap", files={"main.py": NAP}, retry={"attempts": 1})
    ids = [server.call("nap", b"{}", headers=LATER).json()["id"] for _ in range(3)]
    assert eventually(lambda: server.describe("nap")["status"]["busy"])
    clock.set(jump_s)
    ended = [outcome(server, id_) for id_ in ids]
    later = server.call("nap", b"{}", headers=LATER).json()["id"]

    assert {(end["state"], end["attempts"]) for end in ended} == {("succeeded", 1)}
    assert outcome(server, later)["state"] == "succeeded"
    assert "dayfly_events_late_results_total 0.0" in server.ask("GET", "/metrics").body.decode()


def test_no_server_takes_anothers_leases_for_its_clock(
    tmp_path: Path, new_server: Callable[..., Server]
):
    """Two of them with one database, an hour apart and jumping."""
    clocks = [Clock(tmp_path / name) for name in ("one", "other") if not os.mkdir(tmp_path / name)]
    with Postgres() as database:
        (tmp_path / "dsn").write_text(database.dsn)
        servers = [
            new_server(
                "--events-dsn-file", str(tmp_path / "dsn"), data=tmp_path / f"data{n}", env=each.env
            )
            for n, each in enumerate(clocks)
        ]
        ids = []
        for server in servers:
            server.deploy("", "nap", files={"main.py": NAP}, maxScale=2, retry={"attempts": 1})
        for offset in (HOUR_S, -HOUR_S, 0):
            clocks[0].set(offset)
            clocks[1].set(-offset)
            ids += [s.call("nap", b"{}", headers=LATER).json()["id"] for s in servers]
        ended = [outcome(servers[0], id_) for id_ in ids]
        for server in servers:
            metrics = server.ask("GET", "/metrics").body.decode()
            assert "dayfly_events_late_results_total 0.0" in metrics
        for server in servers:
            server.stop()

    assert {(end["state"], end["attempts"]) for end in ended} == {("succeeded", 1)}


def test_what_a_jump_leaves_out_is_made_up_for_once_and_nothing_fires_twice(
    clock: Clock, new_server: Callable[..., Server]
):
    server = new_server(env=clock.env)
    clock.set_to(datetime(2026, 6, 1, 12, 0, 30, tzinfo=UTC))
    times_of(server, "each-minute", "* * * * *", catchUp="all")
    clock.set_to(datetime(2026, 6, 1, 13, 0, 1, tzinfo=UTC))
    assert eventually(lambda: len(run(server, "each-minute")) == 60, 50)
    clock.set_to(datetime(2026, 6, 1, 12, 30, 59, tzinfo=UTC))
    times_of(server, "witness", "* * * * * *")  # who is new counts from here
    assert eventually(lambda: fired(server, "witness")[-1:] > ["2026-06-01T12:31:00Z"], 30)
    assert len(run(server, "each-minute")) == 60
    assert server.ask("DELETE", "/namespaces/default/triggers/witness").status == 204
    clock.set_to(datetime(2026, 6, 1, 13, 0, 59, 500_000, tzinfo=UTC))
    assert eventually(lambda: len(run(server, "each-minute")) > 60, 30)

    expected = [f"2026-06-01T12:{minute:02}:00Z" for minute in range(1, 60)]
    assert fired(server, "each-minute") == [
        *expected,
        "2026-06-01T13:00:00Z",
        "2026-06-01T13:01:00Z",
    ]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        # the clocks go forward: there is no 02:30, so it fires when the hour is over
        ("2026-03-29T00:59:59", "2026-03-29T01:45:00", ["2026-03-29T01:00:00Z"]),
        # they go back: 02:30 comes twice, and it fires the first time
        ("2026-10-25T00:29:59", "2026-10-25T01:45:00", ["2026-10-25T00:30:00Z"]),
    ],
)
def test_a_schedule_of_each_day_fires_once_on_the_days_that_are_an_hour_off(
    clock: Clock, new_server: Callable[..., Server], before: str, after: str, expected: list[str]
):
    server = new_server(env=clock.env)
    clock.set_to(datetime.fromisoformat(before + "+00:00"))
    times_of(server, "daily", "30 2 * * *", timeZone="Europe/Berlin")
    assert eventually(lambda: fired(server, "daily") == expected, 30)
    clock.set_to(datetime.fromisoformat(after + "+00:00"))
    moved = f"{after[:10]}T02"
    assert eventually(lambda: upcoming(server) > moved)

    assert fired(server, "daily") == expected
