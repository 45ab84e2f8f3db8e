"""What the wire costs: a call in this process, and the same over TLS to a shard on this machine.

    python -m bench.wire [CALLS]

Nothing is run behind it: what is measured is the way there and back, one call after the other and
many at once. The shard is a process of its own, as it is in life.
"""

import asyncio
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from pathlib import Path

import uvloop

from bench import harness
from dayfly_pool import tls
from dayfly_pool.cluster.members import Address, Fixed
from dayfly_pool.models import FunctionId, Invocation, InvocationId, Outcome, Success, Timing
from dayfly_pool.peers import PoolServer
from dayfly_pool.pool_client import PoolClient
from dayfly_pool.store.declarations import StoredFunction
from dayfly_pool.store.events import Accepted

CALLS = 5000
AT_ONCE = 32
HTTP = {
    "method": "POST",
    "path": "/",
    "query": "",
    "pairs": [],
    "headers": [["host", "localhost:8080"], ["user-agent", "curl/8"], ["accept", "*/*"]],
    "source": "127.0.0.1",
    "protocol": "HTTP/1.1",
    "route": "$default",
    "parameters": {},
    "time": 1.5,
}


class Answers:
    """Answers at once with what it was given."""

    def __init__(self) -> None:
        self.functions: dict[FunctionId, StoredFunction] = {}

    async def invoke(self, invocation: Invocation) -> Outcome:
        """The body."""
        return Success(invocation.body, Timing(), 200, [["content-type", "text/plain"]])

    async def accept(self, invocation: Invocation, key: tuple[str, str] | None) -> Accepted:
        """At once, too."""
        return Accepted(invocation.id)


def shard(folder: Path, told: Connection) -> None:
    """The other process."""

    async def serve() -> None:
        server = PoolServer(Answers(), tls.Identity(folder / "pool"), "shard")
        await server.listen("127.0.0.1", 0)
        async with server.running():
            told.send(server.port)
            await asyncio.to_thread(told.recv)

    uvloop.run(serve())


async def measure(
    invoke: Callable[[Invocation], Awaitable[Outcome]], calls: int, body: bytes, at_once: int
) -> float:
    """Microseconds for each of so many calls, *at_once* under way."""

    async def some() -> None:
        for _ in range(calls // at_once):
            id_ = InvocationId("0123456789abcdef0123456789abcdef")
            await invoke(Invocation(id_, FunctionId("default/hello"), body, HTTP))

    started = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(at_once):
            tasks.create_task(some())
    return (time.perf_counter() - started) / calls * 1e6


async def compare(report: harness.Report, port: int, folder: Path, calls: int) -> None:
    """In this process, and over the wire."""
    members = Fixed({"shard": Address("127.0.0.1", port)})
    async with PoolClient(members, tls.Identity(folder / "gateway"), "bench").running() as client:
        for size in (100, 10_000, 1_000_000):
            number = calls if size < 1_000_000 else calls // 50
            for at_once in (1, AT_ONCE):
                body = bytes(size)
                here = await measure(Answers().invoke, number, body, at_once)
                there = await measure(client.invoke, number, body, at_once)
                report.row(
                    f"{size} bytes, {at_once} at once",
                    here_us=round(here, 1),
                    wire_us=round(there, 1),
                    calls_per_s=round(1e6 / there),
                )


def main() -> None:
    """Measure and report."""
    calls = int(sys.argv[1]) if len(sys.argv) > 1 else CALLS
    report = harness.Report("wire")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tls.make(folder)
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=shard, args=(folder, theirs))
        process.start()
        try:
            uvloop.run(compare(report, ours.recv(), folder, calls))
        finally:
            ours.send(None)
            process.join(10)
    report.finish()


if __name__ == "__main__":
    main()
