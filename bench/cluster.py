"""Two gateways and two shards on a cluster, under load: what clients see of kills and upgrades.

    KUBECONFIG=... python -m bench.cluster [SECONDS]

Installs the chart (see `tests/kubernetes/release.py` for how images and Services come there) and
calls three functions on and on, as a load balancer does that passes over who refuses a connection:
plain requests, and some to be run later. Meanwhile, for SECONDS each: nothing happens; a gateway, a
shard, a sandbox or the database's connections are killed every 5 s in turn; everything is restarted
in turn, twice; and, if $DAYFLY_TEST_API_PID names the API server's process, that stands still.
"""

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import aiohttp
import psycopg
from tests.kubernetes.release import Release, load_images, run, services

from bench import harness
from dayfly_pool.cluster.api import POD, Api
from dayfly_pool.cluster.reflector import Reflector

API_PID = "DAYFLY_TEST_API_PID"
NAMES = ("one", "two", "three")
CODE = "def handler(event, context):\n    return {'statusCode': 200, 'body': 'well'}\n"
EVERY_S, PER_S, LATER_SHARE = 5.0, 60, 10
READY_S_MAX = 10.0
"""How soon all is to be as it was when the API server is back."""


class Load:
    """Requests at a steady rate, and what became of them."""

    def __init__(self, gateways: Reflector, namespace: str) -> None:
        self._gateways, self._namespace = gateways, namespace
        self.good, self.bad, self.why = 0, 0, dict[str, int]()
        self.took: list[float] = []
        self.failing_since: dict[str, float] = {}
        self.longest_s = 0.0
        self.later: list[str] = []

    def addresses(self) -> list[str]:
        """The gateways that a load balancer would know."""
        found = [
            pod["status"]["podIP"]
            for pod in self._gateways.objects.values()
            if "deletionTimestamp" not in pod["metadata"] and _is_ready(pod)
        ]
        random.shuffle(found)
        return found

    async def run(self, session: aiohttp.ClientSession) -> None:
        """Until it is cancelled."""
        loop, number = asyncio.get_running_loop(), 0
        begun = loop.time()
        async with asyncio.TaskGroup() as tasks:
            while True:
                name = NAMES[number % len(NAMES)]
                is_later = number % LATER_SHARE == 0
                tasks.create_task(self._one(session, name, is_later=is_later))
                number += 1
                await asyncio.sleep(max(0.0, begun + number / PER_S - loop.time()))

    async def _one(self, session: aiohttp.ClientSession, name: str, *, is_later: bool) -> None:
        headers = {"Prefer": "respond-async"} if is_later else {}
        if is_later:
            headers["Idempotency-Key"] = os.urandom(8).hex()
        path, started, why = f"/ns/{self._namespace}/fn/{name}", time.monotonic(), "no gateway"
        for address in self.addresses():
            try:
                how = session.post if is_later else session.get
                async with how(f"http://{address}:8080{path}", headers=headers) as answer:
                    body = await answer.json() if is_later else await answer.read()
                    why = "" if answer.status in (200, 202) else f"{answer.status} {body!r}"[:200]
                    if is_later and not why:
                        self.later.append(body["id"])
                    break
            except aiohttp.ClientConnectorError as error:
                why = str(error)[:100]  # it was not asked
            except (aiohttp.ClientError, TimeoutError) as error:
                why = type(error).__name__
                break
        self._note(name, started, why)

    def _note(self, name: str, started: float, why: str) -> None:
        now = time.monotonic()
        if why:
            self.bad += 1
            self.why[why] = self.why.get(why, 0) + 1
            self.failing_since.setdefault(name, started)
            return
        self.good += 1
        self.took.append(now - started)
        if (since := self.failing_since.pop(name, None)) is not None:
            self.longest_s = max(self.longest_s, now - since)

    async def lost(self, session: aiohttp.ClientSession) -> int:
        """Of those that were accepted, how many have not succeeded in the end."""
        lost = 0
        for id_ in self.later:
            url = f"http://{self.addresses()[0]}:8080/invocations/{id_}"
            async with session.get(url, headers={"Prefer": "wait=30"}) as answer:
                told = await answer.json()
                lost += told.get("state") != "succeeded"
        return lost


def _is_ready(pod: dict[str, Any]) -> bool:
    conditions = pod["status"].get("conditions") or ()
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


class Bench:
    """One release, and the load on it."""

    def __init__(self, report: harness.Report, release: Release, api: Api) -> None:
        self._report, self._release = report, release
        component = "app.kubernetes.io/component=gateway"
        self._gateways = Reflector(
            api, POD, namespace=release.name, labels=component, changed=lambda change: None
        )

    @asynccontextmanager
    async def loaded(self, what: str) -> AsyncIterator[Load]:
        """The load while the block runs, and a row of what became of it."""
        load = Load(self._gateways, self._release.name)
        limits = aiohttp.ClientTimeout(total=40, sock_connect=2)
        # one connection a request, as from many clients: none is kept with who has gone
        async with aiohttp.ClientSession(
            timeout=limits, connector=aiohttp.TCPConnector(force_close=True, limit=0)
        ) as session:
            running = asyncio.create_task(load.run(session))
            try:
                yield load
            finally:
                running.cancel()
                with suppress(asyncio.CancelledError, BaseExceptionGroup):
                    await running
            lost = await load.lost(session)
        share = 100 * load.good / max(1, load.good + load.bad)
        figures = {
            "requests": load.good + load.bad,
            "failed": load.bad,
            "success": f"{share:.2f} %",
        }
        figures |= {"accepted": len(load.later), "lost": lost}
        figures["failing"] = f"{load.longest_s:.1f} s at most"
        self._report.row(what, **figures | harness.milliseconds(load.took))
        for why, number in sorted(load.why.items(), key=lambda item: -item[1])[:5]:
            print(f"    {what}: {number} x {why}", flush=True)
        self._report.bar(f"{what}: accepted and lost", lost, 0)

    async def run(self, seconds: float) -> None:
        """All of it, in turn."""
        following = asyncio.create_task(self._gateways.run())
        try:
            await self._gateways.synced()
            async with self.loaded("nothing happens") as load:
                await asyncio.sleep(min(seconds, 20))
            self._judge("nothing happens", load, 100, 0)
            async with self.loaded("kills") as load:
                await self._for(seconds, self._kill())
            self._judge("kills", load, 99, 2)
            async with self.loaded("restarts") as load:
                for _ in range(2):
                    await asyncio.to_thread(self._restart)
            self._judge("restarts", load, 100, 0)
            if API_PID in os.environ:
                await self._without_api(seconds)
        finally:
            following.cancel()

    def _judge(self, what: str, load: Load, share: float, failing_s: float) -> None:
        good = 100 * load.good / max(1, load.good + load.bad)
        self._report.bar(f"{what}: success, %", good, share, at_least=True)
        self._report.bar(f"{what}: failing, s", load.longest_s, failing_s)

    async def _for(self, seconds: float, work: Coroutine[Any, Any, None]) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await work

    async def _kill(self) -> None:
        """Every 5 s the next of them, with SIGKILL."""
        turn = 0
        while True:
            started = time.monotonic()
            component = ("pool", "gateway", "sandbox", "postgresql")[turn % 4]
            if component == "postgresql":
                await asyncio.to_thread(self._disconnect)
            else:
                pods = await asyncio.to_thread(self._release.pods, component)
                if pods:
                    pod = pods[(turn // 4) % len(pods)]["metadata"]
                    where = ("--namespace", pod["namespace"], "delete", "pod", pod["name"])
                    kill = ("--force", "--grace-period=0", "--wait=false")
                    with suppress(RuntimeError):  # it has gone by itself
                        await asyncio.to_thread(run, "kubectl", *where, *kill)
            turn += 1
            await asyncio.sleep(EVERY_S - (time.monotonic() - started))

    def _disconnect(self) -> None:
        """End every connection to the database but our own."""
        with self._release.reached("postgresql", 5432) as address:
            host, _, port = address.rpartition(":")
            with psycopg.connect(self._release.dsn(host, int(port)), autocommit=True) as connection:
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE pid <> pg_backend_pid() AND usename = current_user"
                )

    def _restart(self) -> None:
        """As an upgrade does: each shard and each gateway, one after the other."""
        whole = self._release.whole
        for what in (f"statefulset/{whole}-pool", f"deployment/{whole}-gateway"):
            self._release.kubectl("rollout", "restart", what)
            self._release.kubectl("rollout", "status", what, "--timeout=180s")

    async def _without_api(self, seconds: float) -> None:
        """It stands still: nobody gets an answer from it."""
        pid = int(os.environ[API_PID])
        async with self.loaded("no API server") as load:
            os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(seconds)
            finally:
                os.kill(pid, signal.SIGCONT)
            started = time.monotonic()
            while not await asyncio.to_thread(self._is_whole):
                pass  # it asks the API server: that takes its time
            took_s = time.monotonic() - started
        self._judge("no API server", load, 99.9, 2)
        self._report.bar("no API server: as before after, s", took_s, READY_S_MAX)

    def _is_whole(self) -> bool:
        """Whether every shard has its generic sandboxes again."""
        with suppress(RuntimeError):
            pods = self._release.pods("sandbox")
            return sum(map(_is_ready, pods)) >= 2 * len(self._release.pods("pool"))
        return False


async def main(seconds: float) -> None:
    """Measure and report."""
    report = harness.Report("cluster")
    release = Release("dayfly-bench")
    load_images()
    with services():
        try:
            release.install("gateway.replicas=2", "pool.replicas=2", "pool.genericMin=2")
            manifest = {"apiVersion": "dayfly.dev/v1", "kind": "Function"}
            spec = {"handler": "main:handler", "files": {"main.py": CODE}}
            for name in NAMES:
                function = manifest | {"metadata": {"name": name}, "spec": spec}
                release.apply(json.dumps(function))
                release.kubectl("wait", "--for=condition=Ready", f"functions.dayfly.dev/{name}")
            api = await Api.connect()
            try:
                await Bench(report, release, api).run(seconds)
            finally:
                await api.close()
        finally:
            release.remove()
    report.finish()


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]) if len(sys.argv) > 1 else 120))
