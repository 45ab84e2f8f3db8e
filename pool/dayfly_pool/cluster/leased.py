"""The shards that have a Lease in Kubernetes; see `leases` for who is judged to be there."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final

from dayfly_pool.cluster.api import Api
from dayfly_pool.cluster.leases import Member
from dayfly_pool.cluster.leases import Members as Holders
from dayfly_pool.cluster.members import Address, parsed

log = logging.getLogger("dayfly.cluster")
SYNC_S_MAX: Final = 5.0
"""How long a start waits to hear who is there; later it hears it too."""


class Leased:
    """Shards with a Lease. Implements `Members`.

    *connect* gives the API server.
    """

    def __init__(self, connect: Callable[[], Awaitable[Api]] = Api.connect) -> None:
        self._connect = connect
        self._current: Mapping[str, Address] = {}
        self._watchers: list[Callable[[], None]] = []

    def current(self) -> Mapping[str, Address]:
        """See `Members`."""
        return self._current

    def watch(self, changed: Callable[[], None]) -> None:
        """See `Members`."""
        self._watchers.append(changed)

    @asynccontextmanager
    async def running(self, name: str = "", address: str = "") -> AsyncIterator["Leased"]:
        """See `Members`."""
        api = await self._connect()
        try:
            holders = Holders(api, changed=self._see)
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(holders.run(), name="members")]
                if name:
                    member = Member(api, name, address)
                    running.append(tasks.create_task(member.run(), name="member"))
                try:
                    async with asyncio.timeout(SYNC_S_MAX):
                        await holders.synced()
                except TimeoutError:
                    log.warning("nobody says yet which shards there are")
                try:
                    yield self
                finally:
                    for task in running:
                        task.cancel()
        finally:
            await api.close()

    def _see(self, live: Mapping[str, str]) -> None:
        found = {name: parsed(address) for name, address in live.items()}
        for name in [name for name, address in found.items() if address is None]:
            log.warning("a shard without an address", extra={"shard": name})
        self._current = {name: address for name, address in found.items() if address is not None}
        for changed in self._watchers:
            changed()
