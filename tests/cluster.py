"""Gateways and shards as real processes, and load on them, for the tests that need several."""

import contextlib
import http.client
import json
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

from tests.harness import DAYFLY, Reply, Server, eventually, free_port
from tests.servers import Postgres

from dayfly_pool.cluster.shards import first
from dayfly_pool.models import FunctionId

SHARDS: Final = ("pool-0", "pool-1")
TOKEN: Final = "a token for tests"


class Shard(Server):
    """One `dayfly pool`."""

    def __init__(self, cluster: "Cluster", name: str) -> None:
        super().__init__(cluster.folder / name, driver="process", env=cluster.env)
        self.name, self.wire, self._cluster = name, f"127.0.0.1:{free_port()}", cluster

    def _command(self) -> list[str]:
        certificates = str(self._cluster.folder / "certificates" / "pool")
        where = ["--name", self.name, "--wire", self.wire, "--admin", self.admin]
        kept = ["--data", str(self.data), "--events-dsn-file", str(self._cluster.dsn)]
        how = ["--driver", "process", "--generic-min", "1", "--log", "json"]
        where += self._cluster.members()
        return [str(DAYFLY), "pool", *where, *kept, *how, "--tls", certificates]


class Gateway(Server):
    """One `dayfly gateway`."""

    def __init__(self, cluster: "Cluster") -> None:
        super().__init__(cluster.folder, env={**cluster.env, "DAYFLY_ADMIN_TOKEN": TOKEN})
        self._cluster, self.token = cluster, TOKEN

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> Reply:
        """As somebody does from another machine: by a name."""
        return super().ask(
            method, path, body, {"Host": "dayfly.example", **(headers or {})}, **more
        )

    def _command(self) -> list[str]:
        certificates = str(self._cluster.folder / "certificates" / "gateway")
        where = ["--http", self.http, "--admin", self.admin, "--log", "json"]
        where += self._cluster.members()
        return [str(DAYFLY), "gateway", *where, "--tls", certificates]


class Cluster:
    """All of it, started; with a *kubeconfig* the shards have Leases there."""

    def __init__(
        self,
        folder: Path,
        database: Postgres,
        stack: ExitStack,
        kubeconfig: str = "",
        names: Sequence[str] = SHARDS,
        gateways: int = 2,
    ) -> None:
        self.folder, self.dsn = folder, folder / "dsn"
        self.env = {"KUBECONFIG": kubeconfig} if kubeconfig else {}
        self.dsn.write_text(database.dsn)
        self.dsn.chmod(0o600)
        made = [str(DAYFLY), "certificates", str(folder / "certificates")]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL, timeout=60)
        self.shards = {name: Shard(self, name) for name in names}
        self.gateways = [Gateway(self) for _ in range(gateways)]
        for each in (*self.shards.values(), *self.gateways):
            stack.enter_context(each)
        self.whole()

    def members(self) -> list[str]:
        """What tells each of them which shards there are."""
        if self.env:
            return ["--members", "kubernetes"]
        return [o for s in self.shards.values() for o in ("--shard", f"{s.name}={s.wire}")]

    def whole(self) -> None:
        """Wait until every gateway has every shard."""
        assert eventually(lambda: all(self.live(g) == {*self.shards} for g in self.gateways))

    def live(self, gateway: Server) -> set[str]:
        """The shards that *gateway* sends calls to."""
        with contextlib.suppress(OSError):
            return {s["name"] for s in gateway.ask("GET", "/shards").json() if s["isLive"]}
        return set()

    def deploy(self, name: str, code: str, **spec: Any) -> str:
        """Declare it with one gateway; then every shard is to have it."""
        self.gateways[0].deploy(name, name, files={"main.py": code}, **spec)
        for shard in self.shards.values():
            assert eventually(partial(knows, shard, name))
        for gateway in self.gateways:
            for _ in range(3):
                assert gateway.call(name, b"{}").status == 200
        return name

    def home(self, name: str) -> Shard:
        """The shard that has the function while all live."""
        found = first(FunctionId(f"default/{name}"), self.shards)
        assert found is not None
        return self.shards[found]


class Load:
    """Clients that call on and on, each with a connection that it keeps, as a load balancer has
    them: who refuses a connection is passed over, and nothing was asked then.
    """

    def __init__(self, gateways: list[Gateway], path: str, method: str = "POST", number: int = 4):
        self.statuses: Counter[str] = Counter()
        self.told: list[str] = []
        self._gateways, self._path, self._method = gateways, path, method
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(n,)) for n in range(number)]

    def _call(self, at: int) -> None:
        connection = None
        while not self._is_over.is_set():
            if connection is None:
                at += 1
                host, _, port = self._gateways[at % len(self._gateways)].http.rpartition(":")
                connection = http.client.HTTPConnection(host, int(port), timeout=30)
                try:
                    connection.connect()
                except OSError:
                    connection = None
                    time.sleep(0.005)
                    continue
            try:
                body = b"{}" if self._method == "POST" else None
                connection.request(self._method, self._path, body)
                answer = connection.getresponse()
                told = answer.read()
                why = "" if answer.status == 200 else f" {json.loads(told)['error']}"
                self.statuses[f"{answer.status}{why}"] += 1
                if why:
                    self.told.append(told.decode())
                if answer.getheader("Connection") == "close":
                    connection.close()
                    connection = None
            except (OSError, http.client.HTTPException) as error:
                self.statuses[type(error).__name__] += 1
                connection.close()
                connection = None
        if connection is not None:
            connection.close()

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        assert self.more()
        return self

    def more(self, number: int = 20) -> int:
        """Wait until so many more were answered well."""
        wanted = self.statuses["200"] + number
        return eventually(lambda: self.statuses["200"] >= wanted, 30)

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(40)

    @property
    def failed(self) -> Counter[str]:
        """All that was not answered well."""
        return Counter({what: n for what, n in self.statuses.items() if what != "200"})


def knows(server: Server, name: str) -> bool:
    return server.ask("GET", f"/namespaces/default/functions/{name}").status == 200
