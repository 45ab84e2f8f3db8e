"""Shards that have a Lease: who runs is seen by the others with its address, who ends is not."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from tests.kubernetes.fake_api import FakeApi

from dayfly_pool.cluster.api import LEASE, Api
from dayfly_pool.cluster.leased import Leased
from dayfly_pool.cluster.members import Address

SOON_S = 10.0


async def reached(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SOON_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_shard_is_seen_with_its_address_for_as_long_as_it_runs(fake: FakeApi):
    seen: list[dict[str, Address]] = []
    async with Leased(lambda: connect(fake)).running() as watching:
        watching.watch(lambda: seen.append(dict(watching.current())))
        async with Leased(lambda: connect(fake)).running("pool-0", "10.0.0.7:8090"):
            await reached(lambda: watching.current() == {"pool-0": Address("10.0.0.7", 8090)})
        await reached(lambda: not watching.current())

    assert seen == [{"pool-0": Address("10.0.0.7", 8090)}, {}]


async def test_one_without_an_address_is_none_of_them(fake: FakeApi):
    async with Leased(lambda: connect(fake)).running("pool-0", "[::1]:8090") as watching:
        await reached(lambda: watching.current() == {"pool-0": Address("::1", 8090)})
        api = await connect(fake)
        try:
            odd = {"metadata": {"name": "odd", "labels": {"dayfly.dev/role": "shard"}}}
            await api.create(LEASE, odd | {"spec": {"holderIdentity": "nowhere"}})
            even = {"metadata": {"name": "even", "labels": {"dayfly.dev/role": "shard"}}}
            await api.create(LEASE, even | {"spec": {"holderIdentity": "h:1"}})
        finally:
            await api.close()
        await reached(lambda: "even" in watching.current())

        assert {*watching.current()} == {"pool-0", "even"}


async def test_without_the_api_server_who_was_there_stays(fake: FakeApi):
    async with Leased(lambda: connect(fake)).running("pool-0", "h:1") as watching:
        await reached(watching.current)
        await fake.down()
        await asyncio.sleep(0)

        assert {*watching.current()} == {"pool-0"}
        await fake.up()


async def connect(fake: FakeApi) -> Api:
    return await Api.connect(str(Path(fake.kubeconfig)))
