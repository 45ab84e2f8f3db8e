"""A history of many events while everything is killed, stopped, cut off or broken; it is checked.

Half of them are sent over HTTP, half come from a broker; they are kept in a file, or in PostgreSQL.

What clients were told and what handlers did is written down here, not asked of the server. More,
and the same again: DAYFLY_EVENTS=100000 DAYFLY_SEED=7 pytest tests/faults/test_history.py
"""

import asyncio
import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socketserver
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.js import JetStreamContext
from tests.brokers.nats import Nats
from tests.faults.disk import failing
from tests.faults.proxy import Proxy
from tests.harness import Server, eventually
from tests.servers import Postgres

pytestmark = [
    pytest.mark.waits,
    pytest.mark.skipif(os.geteuid() != 0, reason="finds processes by control group"),
    pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace"),
    pytest.mark.timeout(1800),
]
EVENTS = int(os.environ.get("DAYFLY_EVENTS", "1000"))
SEED = int(os.environ.get("DAYFLY_SEED", "0")) or random.randrange(1, 1 << 30)
CLIENTS, FAULTS_EACH = 8, max(100, EVENTS // 100)
FAILS_EVERY, RETRIES = 50, 100
HANDLER = """
import json, os, socket, time

told = socket.create_connection(("127.0.0.1", %d))

def tell(what, event, context):
    event = event.get("data", event)  # a CloudEvent, or what was sent
    line = [what, event["n"], context.aws_request_id, os.urandom(8).hex(), time.monotonic()]
    told.sendall(json.dumps(line).encode() + b"\\n")

def handler(event, context):
    tell("began", event, context)
    if event.get("data", event)["n"] %% %d == 0 and os.urandom(1)[0] %% 2:
        tell("failed", event, context)
        raise ValueError("sometimes")
    tell("ended", event, context)
    return "done"
"""


class Notes(socketserver.ThreadingTCPServer):
    """Writes down what handlers say: (what, number, event's id, nonce, moment)."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self) -> None:
        self.lines: list[list[Any]] = []
        notes = self.lines

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    for line in self.rfile:
                        if line.endswith(b"\n"):
                            notes.append(json.loads(line))

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Clients:
    """Send every number until it was accepted, always with its own key."""

    def __init__(self, server: Server, name: str) -> None:
        self.server, self.name = server, name
        self.accepted: dict[int, set[str]] = defaultdict(set)
        self.refused: Counter[int] = Counter()
        self._numbers = iter(range(1, EVENTS + 1, 2))
        self._lock = threading.Lock()
        self.threads = [threading.Thread(target=self._send) for _ in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def _send(self) -> None:
        while True:
            with self._lock:
                number = next(self._numbers, None)
            if number is None:
                return
            path = f"/namespaces/default/functions/{self.name}/invocations"
            headers = {"Prefer": "respond-async", "Idempotency-Key": f"n-{number}"}
            body = json.dumps({"n": number}).encode()
            while True:
                with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                    reply = self.server.ask("POST", path, body, headers=headers, timeout_s=10)
                    if reply.status == 202:
                        self.accepted[number].add(reply.json()["id"])
                        break
                    self.refused[reply.status] += 1
                time.sleep(0.05)

    @property
    def number(self) -> int:
        return len(self.accepted)


class Publisher:
    """Publish every other number to the broker until it has it."""

    def __init__(self, port: int) -> None:
        self.url, self.number = f"nats://127.0.0.1:{port}", 0
        self.thread = threading.Thread(target=lambda: asyncio.run(self._publish()))
        self.thread.start()

    async def _publish(self) -> None:
        for number in range(2, EVENTS + 1, 2):
            while True:
                with contextlib.suppress(nats.errors.Error, OSError):  # TimeoutError is one
                    async with asyncio.timeout(2):
                        context = await self._connected()
                        headers = {"Nats-Msg-Id": str(number)}
                        await context.publish("history", b'{"n": %d}' % number, headers=headers)
                        break
                await asyncio.sleep(0.05)
            self.number += 1
        await self._client.close()

    async def _connected(self) -> JetStreamContext:
        if not hasattr(self, "_client") or not self._client.is_connected:
            self._client = await nats.connect(
                self.url, allow_reconnect=False, max_reconnect_attempts=1, error_cb=self._quiet
            )
        return self._client.jetstream(timeout=1)

    async def _quiet(self, error: Exception) -> None:
        pass


class Nemesis:
    """What happens to everybody, as the seed says. *wires* lead from the server to others."""

    def __init__(
        self, server: Server, broker: Nats, wires: list[Proxy], draw: random.Random
    ) -> None:
        self.server, self.broker, self.wires, self.draw = server, broker, wires, draw
        self.done: Counter[str] = Counter()

    def strike(self) -> None:
        """One of them."""
        strikes: list[Callable[[], None]] = [self.kill, self.stop, self.sandboxes, self.disk]
        strikes += [self.broker_killed, self.broker_stopped, self.held, self.cut]
        chosen = self.draw.choice(strikes)
        chosen()
        self.done[chosen.__name__] += 1

    def kill(self) -> None:
        """The server and all below it."""
        self.server.kill(signal.SIGKILL)
        self.server.wait()
        self.server.start()

    def stop(self) -> None:
        """The server stands still for a while, its sandboxes do not."""
        os.kill(self.server.pid, signal.SIGSTOP)
        time.sleep(self.draw.uniform(0.1, 1.0))
        os.kill(self.server.pid, signal.SIGCONT)

    def disk(self) -> None:
        """Nothing can be written down for a while."""
        with failing(self.server.pid, "fdatasync,fsync"):
            time.sleep(self.draw.uniform(0.1, 1.0))
        assert eventually(lambda: self.server.is_ready, 30)

    def broker_killed(self) -> None:
        """The broker, and it comes back with what it had."""
        self.broker.stop()
        time.sleep(self.draw.uniform(0.0, 1.0))
        self.broker.start()

    def broker_stopped(self) -> None:
        """The broker stands still for a while."""
        self.broker.pause()
        time.sleep(self.draw.uniform(0.1, 1.0))
        self.broker.resume()

    def held(self) -> None:
        """Nothing passes between the server and the broker, or the database; nobody is told."""
        wire = self.draw.choice(self.wires)
        wire.hold()
        time.sleep(self.draw.uniform(0.1, 2.0))
        wire.mend()

    def cut(self) -> None:
        """The same, but both are told."""
        wire = self.draw.choice(self.wires)
        wire.cut()
        time.sleep(self.draw.uniform(0.1, 2.0))
        wire.mend()

    def sandboxes(self) -> None:
        """Some sandboxes, in the middle of whatever they do."""
        with contextlib.suppress(OSError, KeyError, ValueError):
            boxes = self.server.ask("GET", "/pool").json()["sandboxes"]
            for box in self.draw.sample(boxes, min(3, len(boxes))):
                for pid in self.server.processes(box["id"]):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


class World:
    """A server with a broker, and perhaps a database, behind wires that can be cut."""

    def __init__(self, stack: ExitStack, kept: str, folder: Path, new_server: Any) -> None:
        self.broker = Nats()
        stack.enter_context(self.broker)
        self.wires = [stack.enter_context(Proxy(self.broker.port))]
        arguments = []
        if kept == "postgres":
            database = stack.enter_context(Postgres())
            self.wires.append(stack.enter_context(Proxy(database.port)))
            (folder / "dsn").write_text(
                database.dsn.replace(f"port={database.port}", f"port={self.wires[1].port}")
            )
            arguments = ["--events-dsn-file", str(folder / "dsn")]
        self.server: Server = new_server(*arguments)

    def listen(self, name: str) -> None:
        """Have the broker's messages run by the function *name*."""
        asyncio.run(self._make_stream())
        source = {"url": f"nats://127.0.0.1:{self.wires[0].port}", "subject": "history"}
        spec = {"function": name, "nats": source}
        reply = self.server.ask("PUT", "/namespaces/default/triggers/history", spec)
        assert reply.status == 200, reply.body

    async def left(self) -> int:
        """How many messages the broker has that nobody has told it to be done with."""
        client = await nats.connect(f"nats://127.0.0.1:{self.broker.port}")
        info = await client.jetstream().consumer_info("history", "dayfly-default_history")
        await client.close()
        return int(info.num_pending or 0) + int(info.num_ack_pending or 0)

    async def _make_stream(self) -> None:
        client = await nats.connect(f"nats://127.0.0.1:{self.broker.port}")
        await client.jetstream().add_stream(
            name="history", subjects=["history"], duplicate_window=3600
        )
        await client.close()


@pytest.fixture(params=["sqlite", "postgres"])
def world(request: pytest.FixtureRequest, tmp_path: Path, new_server: Any) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(stack, request.param, tmp_path, new_server)


def test_a_history_of_events_among_faults_is_one_that_was_promised(world: World):
    """Nothing lost, nothing ended twice, no two runs of one event at once; doubles are counted."""
    notes, draw = Notes(), random.Random(SEED)
    server = world.server
    retry = {"attempts": RETRIES, "backoffSeconds": 0.05, "backoffMaxSeconds": 1}
    code = {"main.py": HANDLER % (notes.server_address[1], FAILS_EVERY)}
    name = server.deploy("history", files=code, network="host", maxScale=6, retry=retry)
    world.listen(name)
    clients, publisher = Clients(server, name), Publisher(world.broker.port)
    nemesis = Nemesis(server, world.broker, world.wires, draw)
    for at in range(FAULTS_EACH, EVENTS, FAULTS_EACH):
        assert eventually(lambda at=at: clients.number + publisher.number >= at, 300), SEED
        nemesis.strike()
    for thread in (*clients.threads, publisher.thread):
        thread.join()
    assert eventually(lambda: asyncio.run(world.left()) == 0, 600), SEED
    states = final_states(server, name)
    ids = {number: next(iter(found)) for number, found in clients.accepted.items()}
    # which event a message became is told by its first run
    ids |= {number: id_ for _, number, id_, *_ in reversed(notes.lines) if number % 2 == 0}

    problems = [
        *(
            f"{n} was accepted as {found}"
            for n, found in clients.accepted.items()
            if len(found) > 1
        ),
        *(f"{n} is {states.get(id_)}" for n, id_ in ids.items() if states.get(id_) != "succeeded"),
        *(f"{id_} is nobody's" for id_ in states.keys() - set(ids.values())),
        *unlike_promised(notes.lines, ids),
    ]
    again = Counter(number for what, number, *_ in notes.lines if what == "ended")
    doubles = sum(count > 1 for count in again.values())
    print(f"\nseed {SEED}: {EVENTS} events, {dict(nemesis.done)}, {doubles} run to the end twice")
    notes.shutdown()
    notes.server_close()
    server.log[:] = [line for line in server.log if "events cannot be written" not in line]
    assert not problems, (SEED, problems[:20])
    assert len(ids) == EVENTS


def final_states(server: Server, name: str) -> dict[str, str]:
    """The state of every event, by id, once none is under way."""
    label = f'{{function="default/{name}"}}'

    def is_over() -> bool:
        text = server.ask("GET", "/metrics").body.decode()
        under_way = (f"dayfly_events_waiting{label}", f"dayfly_events_running{label}")
        left = server.ask("GET", "/events?state=waiting&limit=1").json()
        left += server.ask("GET", "/events?state=running&limit=1").json()  # perhaps by the dead
        return not (left or any(series in text for series in under_way))

    assert eventually(is_over, 600)
    states: dict[str, str] = {}
    before = ""
    while page := server.ask("GET", f"/events?limit=1000{before}").json():
        states |= {event["id"]: event["state"] for event in page}
        before = f"&before={page[-1]['id']}"
    return states


def unlike_promised(lines: list[list[Any]], ids: dict[int, str]) -> list[str]:
    """What handlers did that must not be."""
    problems: list[str] = []
    runs: dict[int, list[tuple[str, float]]] = defaultdict(list)
    for what, number, id_, _, at in sorted(lines, key=lambda line: line[4]):
        if ids.get(number) != id_:
            problems.append(f"{number} ran as {id_}, and was accepted as {ids.get(number)}")
        runs[number].append((what, at))
    for number in ids:
        if not any(what == "ended" for what, _ in runs[number]):
            problems.append(f"{number} never ran to its end")
        is_under_way = False
        for what, _ in runs[number]:
            if what == "began":
                is_under_way = True  # one that began before was killed, and says no more
            elif not is_under_way:
                problems.append(f"{number} {what} beside another run of it")
            else:
                is_under_way = False
    return problems
