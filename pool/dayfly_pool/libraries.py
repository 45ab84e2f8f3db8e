"""Environments by name: which there are, which are built here, what sandboxes are made of them."""

import hashlib
import logging
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from dayfly_pool.config import Config
from dayfly_pool.driver import Driver
from dayfly_pool.environments import EnvironmentStore
from dayfly_pool.errors import BadInput, EnvironmentNotFound, NotReadyHere
from dayfly_pool.models import (
    BASE,
    Container,
    Environment,
    EnvironmentManifest,
    FunctionId,
    FunctionSpec,
    Limits,
    Mold,
    Parcel,
)
from dayfly_pool.store.declarations import StoredEnvironment

log = logging.getLogger("dayfly.service")
Progress = Callable[[str], None]
DEFAULT_NAMESPACE: Final = "default"
BASE_ENVIRONMENT: Final = Environment(digest=BASE)
NOT_HERE: Final = "not built here"
"""In the place of an environment's folder."""


class Libraries:
    """One server's environments; *builds* has the folders of those that are installed here."""

    def __init__(self, config: Config, driver: Driver, builds: EnvironmentStore) -> None:
        self.declared: dict[tuple[str, str], StoredEnvironment] = {}
        """By namespace and name."""

        self._config, self._driver, self._builds = config, driver, builds
        self._can_fork = driver.can_fork and config.prewarm == "fork"

    # ---- by name ------------------------------------------------------------------------------

    def find(self, namespace: str, name: str) -> Environment:
        """The environment called *name*. Raises `EnvironmentNotFound`."""
        if name == BASE:
            return BASE_ENVIRONMENT
        if (stored := self._named(namespace, name)) is None:
            raise EnvironmentNotFound(f"no environment {name!r} in namespace {namespace!r}")
        return stored.environment

    def is_here(self, namespace: str, name: str) -> bool:
        """Whether it is declared, and built on this server."""
        try:
            return self.find(namespace, name).path != NOT_HERE
        except EnvironmentNotFound:
            return False

    def _named(self, namespace: str, name: str) -> StoredEnvironment | None:
        """The namespace's own, else one of the operator's."""
        keys = ((namespace, name), (DEFAULT_NAMESPACE, name))
        return next((self.declared[key] for key in keys if key in self.declared), None)

    # ---- what they are built of ---------------------------------------------------------------

    async def make(
        self, manifest: EnvironmentManifest, progress: Progress
    ) -> tuple[Environment, str]:
        """Build it; what it is, and the requirements as they were resolved.

        Raises `BadInput` and what `EnvironmentStore.build` does.
        """
        spec, metadata = manifest.spec, manifest.metadata
        if metadata.name == BASE:
            raise BadInput(f"{BASE!r} is the built-in environment: choose another name")
        early = metadata.namespace not in self._config.foreign_namespaces
        image = self._image(manifest)
        path, digest, locked, parcel = "", BASE, "", None
        if spec.requirements.strip() and not image:
            digest, folder, locked = await self._builds.build(spec.requirements, progress=progress)
            path, parcel = str(folder), await self._parcel(digest)
        whole = msgspec.json.encode([digest, spec.preload, early, *([image] if image else [])])
        environment = Environment(
            digest=hashlib.sha256(whole).hexdigest(),
            path=path,
            preload=spec.preload,
            early=early,
            generic_min=spec.generic_min,
            image=image,
            parcel=parcel,
        )
        return environment, locked

    def _image(self, manifest: EnvironmentManifest) -> str:
        """What its sandboxes run; empty where its requirements are installed. Raises `BadInput`."""
        spec, metadata = manifest.spec, manifest.metadata
        try:
            image = self._driver.image(metadata.namespace, metadata.name, spec.image)
        except ValueError as error:
            raise BadInput(f"spec.{error}") from None
        if spec.image and not image and not spec.requirements.strip():
            raise BadInput("spec.image is for pods, and there are none: give spec.requirements too")
        return image

    async def _parcel(self, digest: str) -> Parcel | None:
        """What sandboxes are sent of an environment that is built here."""
        return await self._builds.pack(digest) if self._driver.sends_environments else None

    def here(self, stored: StoredEnvironment) -> StoredEnvironment:
        """The same with our folder of it, which may have to be built, and under our rules."""
        before = self.declared.get((stored.namespace, stored.name))
        is_built = stored.spec.requirements.strip() and not stored.environment.image
        path, parcel = (NOT_HERE if is_built else ""), None
        if before is not None and before.environment.digest == stored.environment.digest:
            path, parcel = before.environment.path, before.environment.parcel
        is_ours = stored.namespace not in self._config.foreign_namespaces
        early = stored.environment.early and is_ours
        environment = msgspec.structs.replace(
            stored.environment, path=path, parcel=parcel, early=early
        )
        return msgspec.structs.replace(stored, environment=environment)

    async def bring(self, namespace: str, names: Iterable[str]) -> None:
        """Build those of *names* that other servers have declared and that are not here yet."""
        for name in names:
            stored = self._named(namespace, name)
            if stored is not None and stored.environment.path == NOT_HERE:
                await self._build_here(stored)

    async def _build_here(self, stored: StoredEnvironment) -> None:
        key = stored.namespace, stored.name
        log.info("an environment is built here too", extra={"environment": "/".join(key)})
        folder = await self._builds.install(stored.locked)
        parcel = await self._parcel(folder.name)
        if self.declared.get(key) is stored:
            environment = msgspec.structs.replace(
                stored.environment, path=str(folder), parcel=parcel
            )
            self.declared[key] = msgspec.structs.replace(stored, environment=environment)

    # ---- what sandboxes are made of -----------------------------------------------------------

    def mold(self, environment: Environment, namespace: str, spec: FunctionSpec) -> Mold:
        """What its sandboxes are made of: forked where the operator and the function allow it.

        Raises `NotReadyHere`, and `BadInput` for limits that no sandbox can have.
        """
        if spec.image:
            self.check_images()
        if environment.path == NOT_HERE:
            raise NotReadyHere("its environment is being built on this server")
        may_fork = (
            self._can_fork
            and spec.isolation == "fork"
            and environment.early
            and namespace not in self._config.foreign_namespaces
            and namespace not in self._config.exec_namespaces
        )
        tenant = namespace if may_fork else ""
        return Mold(environment.digest, spec.network, tenant, memory_mb=self._size(spec.limits))

    def container(
        self, id_: FunctionId, version: str, spec: FunctionSpec, port: int
    ) -> tuple[Environment, Mold]:
        """What the pods of a function's own image are made of, and run. Raises `BadInput`."""
        self.check_images()
        container = Container(
            image=spec.image,
            command=spec.command,
            args=spec.args,
            env=spec.env,
            port=port,
            startup_seconds=spec.startup_seconds,
            resources=spec.limits.resources,
        )
        whose = f"{id_}@{version}"
        digest = hashlib.sha256(f"{whose} ".encode() + msgspec.json.encode(container)).hexdigest()
        environment = Environment(digest, container=container)
        return environment, Mold(
            digest, spec.network, memory_mb=self._size(spec.limits), container=whose
        )

    def check_images(self) -> None:
        """Raises `BadInput` where sandboxes are no pods."""
        if not self._driver.runs_images:
            why = f"the driver {self._config.driver} has none: use --driver kubernetes"
            raise BadInput(f"spec.image: an image needs pods, and {why}")

    def _size(self, limits: Limits) -> int:
        try:
            return self._driver.size(limits)
        except ValueError as error:
            raise BadInput(str(error)) from None
