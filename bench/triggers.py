"""Events from a broker, NATS JetStream: how soon a message is in its handler, how many a second.

    python -m bench.triggers [MESSAGES]

At zero: of a function of which no sandbox is there, with a machine that does nothing else, from
before the message is published until its handler runs (both read the same clock). Warm: the same
with a sandbox that is there. Many: MESSAGES (20,000) that wait at the broker, from the moment in
which the trigger is declared until the last of them is acknowledged; each is run, written down
twice and acknowledged alone.
"""

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import nats
from rich.console import Console
from rich.progress import track
from tests.brokers.nats import Nats

from bench import harness

ONE_BY_ONE, IDLE_S = 100, 0.2
HANDLER = """
import time

def handler(event, context):
    return time.monotonic() - event["data"]["sent"]
"""


async def publish(url: str, subject: str, number: int) -> None:
    """So many messages, which say when they were sent; the broker has them when this returns."""
    client = await nats.connect(url)
    context = client.jetstream(publish_async_max_pending=256)
    told = [
        await context.publish_async(subject, json.dumps({"sent": time.monotonic()}).encode())
        for _ in range(number)
    ]
    await asyncio.gather(*told)
    await client.close()


def status(server: harness.Server, name: str) -> dict[str, Any]:
    """What a trigger has done."""
    views = server.admin("GET", "/triggers")
    return next(dict(v["status"]) for v in views if v["metadata"]["name"] == name)


@contextmanager
def listening(server: harness.Server, url: str, name: str, **spec: Any) -> Iterator[None]:
    """A stream, a function and a trigger of that name."""
    server.deploy(name, server.upload(HANDLER), **spec)
    declare(server, url, name)
    server.wait(lambda _: bool(status(server, name).get("up")))
    yield
    server.admin("DELETE", f"/namespaces/default/triggers/{name}")


def declare(server: harness.Server, url: str, name: str) -> None:
    """Have the messages of the stream of that name run."""
    spec = {"function": name, "nats": {"url": url, "subject": name}}
    server.admin("PUT", f"/namespaces/default/triggers/{name}", json.dumps(spec).encode())


def one_by_one(server: harness.Server, url: str, name: str, generic: int) -> list[float]:
    """Seconds from publishing until the handler, for each of several messages."""
    latencies = []
    console = Console(stderr=True)
    for number in track(
        range(1, ONE_BY_ONE + 1), name, console=console, disable=not sys.stderr.isatty()
    ):
        server.wait_generic(generic)
        time.sleep(IDLE_S)
        asyncio.run(publish(url, name, 1))
        server.wait(lambda _, number=number: status(server, name)["acknowledged"] == number)
        (event,) = server.admin("GET", f"/events?function=default/{name}&limit=1")
        shown = server.admin("GET", f"/events/{event['id']}")
        latencies.append(float(shown["result"]["body"]))
    return latencies


async def streams(url: str, *names: str) -> None:
    """Make a stream for each."""
    client = await nats.connect(url)
    for name in names:
        await client.jetstream().add_stream(name=name, subjects=[name])
    await client.close()


def main(number: int) -> None:
    """Measure and report."""
    report = harness.Report("triggers")
    with Nats() as broker, harness.server() as server:
        url = f"nats://127.0.0.1:{broker.port}"
        asyncio.run(streams(url, "zero", "warm", "many"))
        with listening(server, url, "zero", keepAliveSeconds=0):
            zero = one_by_one(server, url, "zero", 4)
        with listening(server, url, "warm", minScale=1):
            warm = one_by_one(server, url, "warm", 4)
        server.deploy("many", server.upload(HANDLER))
        asyncio.run(publish(url, "many", number))
        started = time.perf_counter()
        declare(server, url, "many")
        server.wait(lambda _: status(server, "many").get("acknowledged", 0) == number, 600)
        rate = number / (time.perf_counter() - started)
    report.row("message to handler, at zero", **harness.milliseconds(zero))
    report.row("message to handler, warm", **harness.milliseconds(warm))
    report.row("messages run and acknowledged", per_s=round(rate))
    report.bar("message to handler at zero, p50 in ms", harness.milliseconds(zero)["p50"], 30)
    report.finish()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
