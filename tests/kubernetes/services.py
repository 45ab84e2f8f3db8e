"""Services for a cluster on this machine that has no kube-proxy: what it does, with iptables.

    python -m tests.kubernetes.services [KUBECONFIG]

Runs until SIGTERM, as root. Connections to a Service's address, from pods and from here, go to one
of its endpoints; those to the API server's Service go to where the kubeconfig says. The rules stand
in a chain of their own, which is gone at the end.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

import yaml

from dayfly_pool.cluster.api import EVERYWHERE, SERVICE, Api, Kind
from dayfly_pool.cluster.reflector import Change, Reflector

CHAIN: Final = "DAYFLY-SERVICES"
ENDPOINTS: Final = Kind("", "v1", "endpoints", "Endpoints")
OWN: Final = "default/kubernetes"
SETTLE_S: Final = 0.05


def iptables(*arguments: str, check: bool = True) -> None:
    subprocess.run(["iptables", "-w", "-t", "nat", *arguments], check=check, capture_output=True)


class Services:
    """The rules for what there is."""

    def __init__(self, api: Api, server: tuple[str, int]) -> None:
        self._server, self._changed = server, asyncio.Event()
        self._services = Reflector(api, SERVICE, namespace=EVERYWHERE, changed=self._hear)
        self._endpoints = Reflector(api, ENDPOINTS, namespace=EVERYWHERE, changed=self._hear)

    def _hear(self, change: Change) -> None:
        self._changed.set()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for reflector in (self._services, self._endpoints):
                tasks.create_task(reflector.run())
            while True:
                await self._changed.wait()
                await asyncio.sleep(SETTLE_S)
                self._changed.clear()
                await asyncio.to_thread(self._write, list(self._rules()))

    def _rules(self) -> Iterator[str]:
        for key, service in self._services.objects.items():
            address = service["spec"].get("clusterIP", "None")
            if address == "None":
                continue
            for port in service["spec"].get("ports", ()):
                places = self._places(key, port)
                for at, (host, number) in enumerate(places):
                    left = len(places) - at
                    share = f"-m statistic --mode random --probability {1 / left:.5f} "
                    yield (
                        f"-A {CHAIN} -d {address}/32 -p tcp --dport {port['port']} "
                        f"{share if left > 1 else ''}-j DNAT --to-destination {host}:{number}"
                    )

    def _places(self, key: str, port: dict[str, Any]) -> list[tuple[str, int]]:
        if key == OWN:
            return [self._server]
        subsets = self._endpoints.objects.get(key, {}).get("subsets") or ()
        return [
            (address["ip"], each["port"])
            for subset in subsets
            for each in subset.get("ports", ())
            if each.get("name") == port.get("name")
            for address in subset.get("addresses") or ()
        ]

    def _write(self, rules: list[str]) -> None:
        """All of them at once: nobody sees half."""
        text = "\n".join(["*nat", f":{CHAIN} - [0:0]", f"-F {CHAIN}", *rules, "COMMIT", ""])
        restore = ["iptables-restore", "-w", "--noflush"]
        subprocess.run(restore, input=text, text=True, check=True, capture_output=True)


@contextlib.contextmanager
def chained() -> Iterator[None]:
    """The chain, and what leads to it; pods may reach a server that listens on loopback."""
    Path("/proc/sys/net/ipv4/conf/all/route_localnet").write_text("1")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    iptables("-N", CHAIN, check=False)
    for way in ("PREROUTING", "OUTPUT"):
        iptables("-A", way, "-j", CHAIN)
    try:
        yield
    finally:
        for way in ("PREROUTING", "OUTPUT"):
            iptables("-D", way, "-j", CHAIN)
        iptables("-F", CHAIN)
        iptables("-X", CHAIN)


async def main(kubeconfig: str, url: SplitResult) -> None:
    api = await Api.connect(kubeconfig)
    try:
        running = asyncio.ensure_future(
            Services(api, (url.hostname or "127.0.0.1", url.port or 443)).run()
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, running.cancel)
        print("ready", flush=True)
        with contextlib.suppress(asyncio.CancelledError):
            await running
    finally:
        await api.close()


if __name__ == "__main__":
    config = sys.argv[1] if len(sys.argv) > 1 else os.environ["KUBECONFIG"]
    (cluster,) = (c["cluster"] for c in yaml.safe_load(Path(config).read_text())["clusters"])
    with chained():
        asyncio.run(main(config, urlsplit(cluster["server"])))
