"""The kubernetes driver on a cluster of its own: the fake one, or a namespace of the real one."""

import asyncio
import functools
import os
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.kubernetes import images
from tests.kubernetes.conftest import REAL
from tests.kubernetes.fake_api import FakeApi
from tests.kubernetes.fake_kubelet import Kubelet

from dayfly_pool.cluster.api import NAMESPACE, Api
from dayfly_pool.config import Config
from dayfly_pool.drivers.kubernetes import KubernetesDriver
from dayfly_pool.pods import PodClass, Pods

SMALL = (PodClass(memory_mb=256, cpu=0.1, ephemeral_mb=64),)


@functools.cache
def runtime_image() -> str:
    """What pods of the real cluster run: an image that is there, or made here and brought there."""
    if found := os.environ.get("DAYFLY_TEST_RUNTIME_IMAGE"):
        return found
    if images.LOADER not in os.environ:
        pytest.skip(f"neither DAYFLY_TEST_RUNTIME_IMAGE nor {images.LOADER} says what pods run")
    with tempfile.TemporaryDirectory() as folder:
        image = images.runtime(Path(folder, "runtime"))
        images.load(image)
    return image.name


def pods_of(kubeconfig: Path | str, **more: Any) -> Pods:
    """How pods are made there."""
    given: dict[str, Any] = {"image": "fake", "classes": SMALL, "kubeconfig": str(kubeconfig)}
    return Pods(**given | more)


class OnFakeCluster(KubernetesDriver):
    """The cluster is there as long as the driver is open."""

    def __init__(self, data: Path) -> None:
        self._place = tempfile.TemporaryDirectory(prefix="dayfly-fake-api-")
        self._fake = FakeApi(Path(self._place.name))
        self._stack = AsyncExitStack()
        pods = pods_of(self._fake.kubeconfig)
        super().__init__(Config(data=data, driver="kubernetes", pods=pods))

    async def open(self) -> None:
        await self._stack.enter_async_context(self._fake)
        kubelet = Kubelet(self._fake)
        await asyncio.to_thread(kubelet.__enter__)
        self._stack.push_async_callback(asyncio.to_thread, kubelet.__exit__)
        await super().open()

    async def close(self) -> None:
        await super().close()
        await self._stack.aclose()
        self._place.cleanup()


class OnRealCluster(KubernetesDriver):
    """The same in a namespace of the cluster that `DAYFLY_TEST_KUBECONFIG` names."""

    def __init__(self, data: Path) -> None:
        self._name = f"dayfly-test-{os.urandom(4).hex()}"
        image = {"image": runtime_image(), "image_pull_policy": "Never"}
        pods = pods_of(REAL, namespace=self._name, **image)
        super().__init__(Config(data=data, driver="kubernetes", pods=pods))
        self._admin: Api | None = None

    async def open(self) -> None:
        self._admin = await Api.connect(REAL, self._name)
        await self._admin.create(NAMESPACE, {"metadata": {"name": self._name}})
        await super().open()

    async def close(self) -> None:
        await super().close()
        if self._admin is not None:
            await self._admin.delete(NAMESPACE, self._name)
            await self._admin.close()
