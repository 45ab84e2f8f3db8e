"""The fake API server, and the real one that `DAYFLY_TEST_KUBECONFIG` names."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.kubernetes.fake_api import FakeApi

from dayfly_pool.cluster.api import NAMESPACE, Api

REAL = os.environ.get("DAYFLY_TEST_KUBECONFIG", "")
SERVERS = ["fake", pytest.param("real", marks=pytest.mark.cluster)]


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeApi]:
    """In the test's own loop."""
    async with FakeApi(tmp_path) as up:
        yield up


@pytest.fixture
async def api(fake: FakeApi) -> AsyncIterator[Api]:
    """Connected to the fake."""
    found = await Api.connect(str(fake.kubeconfig))
    yield found
    await found.close()


@pytest.fixture(params=SERVERS)
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Api]:
    """Connected to each server in turn, in a namespace of its own."""
    name = f"dayfly-test-{os.urandom(4).hex()}"
    if request.param == "real":
        async for found in _in(name, REAL):
            yield found
    else:
        async with FakeApi(tmp_path) as up:
            async for found in _in(name, str(up.kubeconfig)):
                yield found


@pytest.fixture
def namespace() -> Iterator[str]:
    """One of the test's own in the real cluster."""
    with a_namespace() as name:
        yield name


@contextmanager
def a_namespace() -> Iterator[str]:
    """One of the real cluster, while the block runs; not to be entered where a loop runs."""
    name = f"dayfly-test-{os.urandom(4).hex()}"

    async def change(*, is_there: bool) -> None:
        api = await Api.connect(REAL)
        try:
            if is_there:
                await api.create(NAMESPACE, {"metadata": {"name": name}})
            else:
                await api.delete(NAMESPACE, name)
        finally:
            await api.close()

    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:  # the test's loop stays
        runner.run(change(is_there=True))
        try:
            yield name
        finally:
            runner.run(change(is_there=False))


async def _in(name: str, kubeconfig: str) -> AsyncIterator[Api]:
    found = await Api.connect(kubeconfig, name)
    namespace: dict[str, Any] = {"metadata": {"name": name}}
    await found.create(NAMESPACE, namespace)
    try:
        yield found
    finally:
        await found.delete(NAMESPACE, name)
        await found.close()
