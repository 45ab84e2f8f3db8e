"""Sandboxes as pods. All that is slow is done before: a cold start writes nothing to the API.

A pod's porter (see `dayfly.porter`) answers on TCP. We have two connections to each: a line to the
porter, for orders and for word of the end, and the guest's own. What a pod is and holds is said by
its labels; so whoever comes after us finds it (`survivors`), and what nobody knows is deleted.
"""

import asyncio
import contextlib
import logging
import os
import random
import secrets
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from dayfly import greeting
from dayfly_pool import pods as manifests
from dayfly_pool.cluster.api import LEASE, POD, Api, ApiError, Exists, Kind, NotFound
from dayfly_pool.cluster.reflector import Change, Reflector
from dayfly_pool.config import Config
from dayfly_pool.driver import Exit, Survivor
from dayfly_pool.drivers import cargo, guest
from dayfly_pool.drivers.pod_keys import Keys
from dayfly_pool.drivers.porters import Line, greeted
from dayfly_pool.errors import DriverUnavailable, SandboxStartFailed, ZygoteUnfit
from dayfly_pool.models import (
    Container,
    Environment,
    Function,
    Limits,
    Mold,
    Mounts,
    SandboxId,
)
from dayfly_pool.pods import Key, Pods

log = logging.getLogger("dayfly.driver")

LISTS_S_MAX: Final = 30.0
KILL_S_MAX: Final = 2.0
"""A porter ends its pod in milliseconds; without word for so long, the kubelet does."""

WORD_S_MAX: Final = 3.0
"""How long the API server may take to tell how a pod ended whose porter could not."""

BURY_S, BURY_S_MAX = 0.2, 10.0
SWEEP_S: Final = 30.0
AGAIN_S: Final = 1.0
NOTES_MAX: Final = 10_000
NAME_CHARACTERS_MAX: Final = 40
ANCHOR: Final = "dayfly-shard-"
"""What the Lease that owns a shard's pods is called, before the shard's name."""

SHARDS: Final = "sandboxes"
"""The component that these are."""

CARRIERS_MAX: Final = 16
"""Steps whose folders are fetched at once; others wait, and live on."""

REFUSED: Final = (400, 413, 422)
"""What the API server answers to a manifest that it would refuse again."""

LET_IN_S_MAX: Final = 10.0
"""What runs in a pod can keep its porter busy; longer than this no carrier waits for it."""

OUT_OF_MEMORY: Final = "OOMKilled"
OUTPUT_LINES, OUTPUT_BYTES = 1000, 256 * 1024


class KubernetesDriver:
    """See `Driver`. Zygotes are of no use here: what is ready is a pod, and ready it is."""

    isolated = True
    can_fork = False
    sets_apart = False
    outlives = True
    shares_machine = False
    report_s = WORD_S_MAX + 0.5
    sends_environments = True
    carries = True
    runs_images = True

    def __init__(self, config: Config) -> None:
        if config.pods is None:
            raise DriverUnavailable("driver kubernetes: say how pods are made, with --kubernetes")
        self._pods: Pods = config.pods
        self._shard, self._prefix = config.shard, config.shard[:NAME_CHARACTERS_MAX]
        self._foreign = config.foreign_namespaces
        self._data = config.data
        self._packages = config.data / "packages" / "archives"
        self._carriers = ThreadPoolExecutor(CARRIERS_MAX, "carrier")
        self.steps_owner = os.geteuid()
        self.on_leaving: Callable[[SandboxId], None] = lambda sandbox: None
        self._api: Api
        self._reflector: Reflector
        self._owner: dict[str, Any] = {}
        self._known: dict[SandboxId, _Pod] = {}
        self._named: dict[str, _Pod] = {}
        """By the names of the pods: of those that are known, and of the survivors."""

        self._survivors: dict[SandboxId, _Pod] = {}
        """Those that were there before us, until somebody has them."""

        self._has_found = False
        """Whether the survivors are known: whoever comes now, and is not, nobody wants."""

        self._keys: Keys
        self._carrying = asyncio.Semaphore(CARRIERS_MAX)
        self._graves: dict[str, tuple[str, int]] = {}
        """Pods that are to be deleted: their uids, and how long each has to end."""

        self._pods_max = config.sandboxes_max
        self._asked: set[str] = set()
        """Pods that are being made, and have not been seen yet."""

        self._fewer = asyncio.Event()
        self._dug = asyncio.Event()
        self._notes: dict[str, Function] = {}
        self._noted = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    # ---- life ---------------------------------------------------------------------------------

    async def open(self) -> None:
        """Find what lives. Raises `DriverUnavailable` when there is no cluster, or no right to."""
        try:
            await self._open()
        except BaseException as error:
            await self.close()
            if isinstance(error, ApiError):
                raise DriverUnavailable(f"driver kubernetes: {error}") from error
            raise

    async def _open(self) -> None:
        self._api = await Api.connect(self._pods.kubeconfig, self._pods.namespace)
        self._owner = await self._anchor()
        self._keys = Keys(self._api, self._shard, self._prefix, self._owner)
        labels = manifests.selector(manifests.SANDBOX, self._shard)
        self._reflector = Reflector(self._api, POD, labels=labels, changed=self._changed)
        self._start(self._reflector.run, "pods")
        try:
            async with asyncio.timeout(LISTS_S_MAX):
                await self._reflector.synced()
        except TimeoutError:
            raise DriverUnavailable("driver kubernetes: the API server lists no pods") from None
        await self._find_survivors()
        self._start(self._bury, "bury-pods")
        self._start(self._sweep, "sweep-pods")
        self._start(self._note, "note-pods")

    async def close(self) -> None:
        """Let go of the pods: they live on, for whoever comes after us."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for pod in self._known.values():
            pod.hang_up()
        self._tasks.clear()
        self._carriers.shutdown(wait=False, cancel_futures=True)
        if hasattr(self, "_api"):
            await self._api.close()

    def _start(self, work: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        self._tasks.append(asyncio.create_task(_kept_up(work), name=name))

    async def _anchor(self) -> dict[str, Any]:
        """What owns our pods: a Lease in our name, so that they go when it is deleted."""
        name = f"{ANCHOR}{self._shard}"
        try:
            lease = await self._api.get(LEASE, name)
        except NotFound:
            labels = manifests.labels(SHARDS, self._shard)
            metadata: dict[str, Any] = {"name": name, "labels": labels}
            if self._pods.owner:
                metadata["ownerReferences"] = [await self._owner_of_all()]
            try:
                lease = await self._api.create(LEASE, {"metadata": metadata, "spec": {}})
            except Exists:
                lease = await self._api.get(LEASE, name)
        return _reference(LEASE, lease)

    async def _owner_of_all(self) -> dict[str, Any]:
        plural, _, name = self._pods.owner.partition("/")
        kinds = {
            "statefulset": Kind("apps", "v1", "statefulsets", "StatefulSet"),
            "deployment": Kind("apps", "v1", "deployments", "Deployment"),
        }
        if plural.lower() not in kinds:
            raise DriverUnavailable(f"owner: {self._pods.owner!r} is not one of {', '.join(kinds)}")
        kind = kinds[plural.lower()]
        return _reference(kind, await self._api.get(kind, name))

    # ---- making -------------------------------------------------------------------------------

    async def create(
        self,
        sandbox: SandboxId,
        mold: Mold,
        environment: Environment,
        zygote: SandboxId | None = None,
        keeps: Function | None = None,
        *,
        background: bool = False,
    ) -> socket.socket:
        """Make a pod and wait for its guest; raises `SandboxStartFailed`."""
        assert zygote is None
        if environment.path and environment.parcel is None:
            raise SandboxStartFailed("the environment was built for another driver: apply it again")
        pod = self._pod(sandbox, f"{self._prefix}-{secrets.token_hex(5)}")
        self._known[sandbox] = pod
        try:
            pod.key, pod.secret = await self._keys.take()
            manifest = manifests.pod(
                self._pods,
                name=pod.name,
                shard=self._shard,
                owner=self._owner,
                mold=mold,
                command=self._command(mold, environment),
                environment=environment,
                key=pod.key,
                uid=self._pods.uid_first + random.randrange(self._pods.uid_count),
            )
            async with self._room(pod):
                try:
                    made = await self._api.create(POD, manifest)
                except Exists:  # the answer to our first try was lost
                    made = await self._api.get(POD, pod.name)
            pod.uid = made["metadata"]["uid"]
            return await self._reach(pod, has_function=False)
        except ApiError as error:
            raise SandboxStartFailed(str(error)) from error

    async def run(
        self,
        sandbox: SandboxId,
        function: Function,
        container: Container,
        env: Mapping[str, str] = {},
    ) -> str:
        """Make a pod of a user's own image; see `Driver`. Raises `SandboxStartFailed`."""
        pod = self._pod(sandbox, f"{self._prefix}-{secrets.token_hex(5)}")
        pod.has_porter = False
        self._known[sandbox] = pod
        manifest = manifests.container_pod(
            self._pods,
            name=pod.name,
            shard=self._shard,
            owner=self._owner,
            function=function,
            container=container,
            env=env,
        )
        pod.uid = (await self._made(pod, manifest))["metadata"]["uid"]
        if self._known.get(sandbox) is not pod:  # destroyed meanwhile
            self._dig(pod.name, pod.uid)
            raise SandboxStartFailed("it was ended")
        either: set[asyncio.Future[Any]] = {pod.running, pod.exit}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        return "" if pod.exit.done() else pod.running.result()

    async def _made(self, pod: "_Pod", manifest: dict[str, Any]) -> dict[str, Any]:
        """The pod; a quota that is full or an API server that is away is waited for."""
        wait_s = BURY_S
        while True:
            try:
                async with self._room(pod):
                    return await self._api.create(POD, manifest)
            except Exists:  # the answer to an earlier try was lost
                return await self._api.get(POD, pod.name)
            except ApiError as error:
                pod.why = f"not made: {error}"
                if error.status in REFUSED or pod.exit.done():
                    raise SandboxStartFailed(pod.why) from error
            await asyncio.sleep(wait_s * (0.5 + random.random()))
            wait_s = min(wait_s * 2, BURY_S_MAX)

    @contextlib.asynccontextmanager
    async def _room(self, pod: "_Pod") -> AsyncIterator[None]:
        """Wait until there may be one more pod: what is being deleted is one until it is gone."""
        while len(self._asked) + len(self._reflector.objects) >= self._pods_max:
            pod.why = f"{self._pods_max} pods are there, with those that are being deleted"
            self._fewer.clear()
            await self._fewer.wait()
            if pod.exit.done():
                raise SandboxStartFailed("it was ended")
        pod.why = ""
        self._asked.add(pod.name)
        try:
            yield
        except BaseException:
            self._less(pod.name)
            raise

    def _less(self, name: str) -> None:
        self._asked.discard(name)
        self._fewer.set()

    async def rejoin(self, sandbox: SandboxId) -> str:
        """The address of a survivor that is a user's own image. Raises `SandboxStartFailed`."""
        pod = self._survivors.pop(sandbox, None)
        if pod is None or pod.exit.done():
            raise SandboxStartFailed("it is gone")
        self._known[sandbox] = pod
        return await pod.running

    async def output(self, sandbox: SandboxId) -> bytes:
        """The end of what a user's own image wrote; nothing when the API server does not say."""
        pod = self._known.get(sandbox)
        if pod is None or not pod.uid:
            return b""
        try:
            return await self._api.output(pod.name, lines=OUTPUT_LINES, most=OUTPUT_BYTES)
        except ApiError as error:
            log.warning("no output of %s: %s", pod.name, error)
            return b""

    def _pod(self, sandbox: SandboxId, name: str) -> "_Pod":
        pod = self._named[name] = _Pod(sandbox, name, lambda: self.on_leaving(sandbox))
        return pod

    def _command(self, mold: Mold, environment: Environment) -> list[str]:
        secret = f"{manifests.SECRET_FOLDER}/{manifests.SECRET_FILE}"
        return guest.command(
            "python3",
            "/dayfly",
            "/code",
            manifests.ENVIRONMENT,
            environment,
            isolated=True,
            limit_memory=False,
            has_network=mold.network != "none",
            pod={"port": self._pods.port, "secret": secret},
        )

    async def _reach(self, pod: "_Pod", *, has_function: bool) -> socket.socket:
        """Our two connections to the pod, when it is up; the guest's is returned."""
        async with self._while_it_lives(pod) as place:
            words = (place, pod.secret)
            pod.line = await Line.to(*words, pod.reported, pod.lost, has_function=has_function)
            pod.guest = await greeted(*words, greeting.GUEST, has_function=has_function)
            return pod.guest

    @contextlib.asynccontextmanager
    async def _while_it_lives(self, pod: "_Pod") -> AsyncIterator[tuple[str, int]]:
        """Where its porter listens. Raises `SandboxStartFailed` in the block when it ends."""
        try:
            async with asyncio.timeout(None) as limit:
                with pod.when_ended(lambda: limit.reschedule(0)):
                    yield await pod.running, self._pods.port
        except TimeoutError:
            raise SandboxStartFailed(f"the pod has ended: {pod.exit.result()}") from None

    # ---- those that were there before ---------------------------------------------------------

    async def _find_survivors(self) -> None:
        for where, found in list(self._reflector.objects.items()):
            key = manifests.key_of(found)
            secret = await self._keys.read(key) if key is not None else None
            obj = self._reflector.objects.get(where)
            if obj is None:
                continue  # it has gone meanwhile
            name, uid = obj["metadata"]["name"], obj["metadata"]["uid"]
            mold = manifests.mold_of(obj)
            why, _ = manifests.trouble(obj)
            address = (obj.get("status") or {}).get("podIP")
            is_leaving = "deletionTimestamp" in obj["metadata"]
            if mold is not None and mold.container:
                if not address or why or is_leaving or manifests.holds(obj) is None:
                    self._dig(name, uid)  # what ran to its end is begun anew
                    continue
                pod = self._pod(SandboxId(f"sb-{name}"), name)
                pod.uid, pod.has_porter = uid, False
                pod.seen(obj)
                self._survivors[pod.sandbox] = pod
                continue
            if mold is None or secret is None or not address or why or is_leaving:
                self._dig(name, uid)
                continue
            pod = self._pod(SandboxId(f"sb-{name}"), name)
            pod.uid, pod.key, pod.secret = uid, key, secret
            pod.seen(obj)
            self._survivors[pod.sandbox] = pod
        self._has_found = True

    def survivors(self) -> list[Survivor]:
        """The sandboxes of an earlier server that are still there; each is adopted or destroyed."""
        found = []
        for pod in self._survivors.values():
            obj = self._reflector.objects.get(f"{self._api.namespace}/{pod.name}")
            mold = manifests.mold_of(obj) if obj is not None else None
            if obj is not None and mold is not None:
                found.append(Survivor(pod.sandbox, mold, manifests.holds(obj)))
        return found

    async def adopt(self, sandbox: SandboxId, *, has_function: bool) -> socket.socket:
        """Connect to a survivor. Raises `SandboxStartFailed` when it is not what it should be.

        One whose function was not noted before the end is in nobody's books.
        """
        pod = self._survivors.pop(sandbox, None)
        if pod is None:
            raise SandboxStartFailed("it is gone")
        self._known[sandbox] = pod
        return await self._reach(pod, has_function=has_function)

    def note(self, sandbox: SandboxId, function: Function) -> None:
        """Write down what a sandbox holds, soon."""
        if (pod := self._known.get(sandbox)) and pod.has_porter:
            self._notes[pod.name] = function
            self._noted.set()

    async def _note(self) -> None:
        while True:
            await self._noted.wait()
            self._noted.clear()
            while self._notes:
                name = next(iter(self._notes))
                function = self._notes.pop(name)
                patch = {"metadata": {"labels": manifests.held(function)}}
                try:
                    await self._api.merge(POD, name, patch)
                except NotFound:
                    pass  # it has gone meanwhile
                except ApiError as error:
                    log.warning("not noted", extra={"pod": name, "why": str(error)})
                    if len(self._notes) < NOTES_MAX:
                        self._notes.setdefault(name, function)
                    await asyncio.sleep(BURY_S_MAX * random.random())

    # ---- what is seen and said ----------------------------------------------------------------

    def _changed(self, change: Change) -> None:
        obj = change.after or change.before
        assert obj is not None
        name = obj["metadata"]["name"]
        pod = self._named.get(name)
        self._less(name)
        if change.after is None:
            self._graves.pop(name, None)
            self._notes.pop(name, None)
            if pod is not None:
                pod.ended(Exit(-signal.SIGKILL))
                if self._survivors.pop(pod.sandbox, None):
                    del self._named[name]  # nobody has it who would do that
        elif pod is not None:
            pod.seen(obj)
        elif self._has_found and change.before is None:
            self._dig(name, obj["metadata"]["uid"])  # it was given up while it was asked for

    async def terminate(self, sandbox: SandboxId) -> None:
        """Send SIGTERM to the guest, or have the kubelet send it."""
        pod = self._known.get(sandbox)
        if pod is not None and pod.line is not None:
            pod.line.order(greeting.TERMINATE)
        elif pod is not None and not pod.has_porter and pod.uid:
            self._dig(pod.name, pod.uid, manifests.CONTAINER_ENDS_S)

    async def destroy(self, sandbox: SandboxId) -> Exit:
        """Have the porter kill everything in the pod; the pod itself is deleted in due time."""
        pod = self._known.get(sandbox) or self._survivors.pop(sandbox, None)
        if pod is None:
            return Exit(0)
        if pod.line is not None:
            pod.line.order(greeting.KILL)  # also to one that the API server has forgotten
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KILL_S_MAX):
                    await asyncio.shield(pod.exit)
        self._known.pop(sandbox, None)
        self._named.pop(pod.name, None)
        self._notes.pop(pod.name, None)
        pod.hang_up()
        pod.ended(Exit(-signal.SIGKILL))  # whoever waits for it need not any more
        self._fewer.set()
        self._dig(pod.name, pod.uid, 1 if pod.has_porter else manifests.CONTAINER_ENDS_S)
        return pod.exit.result()

    async def exited(self, sandbox: SandboxId) -> Exit:
        """How it ended, as soon as it has."""
        pod = self._known.get(sandbox)
        return Exit(0) if pod is None else await asyncio.shield(pod.exit)

    def _dig(self, name: str, uid: str, ends_s: int = 1) -> None:
        self._graves.setdefault(name, (uid, ends_s))
        self._dug.set()

    async def _bury(self) -> None:
        """Delete the pods of what was destroyed, however long the API server is away."""
        wait_s = BURY_S
        while True:
            await self._dug.wait()
            self._dug.clear()
            for name, (uid, ends_s) in list(self._graves.items()):
                try:
                    await self._api.delete(POD, name, grace_s=ends_s, uid=uid)
                    self._graves.pop(name, None)
                    self._less(name)  # also one that was never seen
                    wait_s = BURY_S
                except ApiError as error:
                    log.warning("pod not deleted", extra={"pod": name, "why": str(error)})
                    if name in self._graves:
                        self._graves[name] = self._graves.pop(name)  # after all others
                    self._dug.set()
                    await asyncio.sleep(wait_s * (0.5 + random.random()))
                    wait_s = min(wait_s * 2, BURY_S_MAX)
                    break

    async def _sweep(self) -> None:
        """Delete what nobody knows: pods of ours that are in no books, and secrets of none."""
        while True:
            await asyncio.sleep(SWEEP_S * (0.5 + random.random()))
            for obj in self._reflector.objects.values():
                metadata = obj["metadata"]
                if metadata["name"] not in self._named and "deletionTimestamp" not in metadata:
                    self._dig(metadata["name"], metadata["uid"])
            try:
                await self._keys.drop(self._used)
            except ApiError as error:
                log.warning("secrets not swept", extra={"why": str(error)})

    def _used(self) -> set[str]:
        """The Secrets that pods have, or that pods being made just now may have."""
        keys = [manifests.key_of(obj) for obj in self._reflector.objects.values()]
        keys += [pod.key for pod in self._named.values()]
        return {key.secret for key in keys if key is not None}

    # ---- what is different here ---------------------------------------------------------------

    def size(self, limits: Limits) -> int:
        """Of the class that has the memory. Raises ValueError when there is none."""
        fitting = self._pods.fitting(limits)
        if fitting is None:
            most = self._pods.classes[-1].memory_mb
            raise ValueError(f"limits.memoryMb is {limits.memory_mb}: pods have {most} at most")
        return fitting.memory_mb

    def archive(self, digest: str) -> Path | None:
        """Where a guest that asks for a package gets it from."""
        return self._packages / f"{digest}.zip"

    async def shards(self) -> list[str]:
        """By their anchors; none while the API server is away."""
        try:
            page = await self._api.page(LEASE, labels=manifests.selector(SHARDS))
        except ApiError:
            return []
        return [obj["metadata"]["labels"].get(manifests.SHARD, "") for obj in page["items"]]

    async def bury_shard(self, name: str) -> None:
        """Delete its anchor: the cluster deletes with it what it owns."""
        try:
            await self._api.delete(LEASE, f"{ANCHOR}{name}")
        except ApiError as error:
            log.warning("shard not buried", extra={"shard": name, "why": str(error)})

    def image(self, namespace: str, name: str, asked: str) -> str:
        """As pods.yaml says, else as *asked*. Raises ValueError where strangers may not ask."""
        named = self._pods.environments
        if image := named.get(f"{namespace}/{name}") or named.get(name):
            return image
        if asked and namespace in self._foreign and not self._pods.environment_images:
            raise ValueError("image: the operator does not allow it here (environmentImages)")
        return asked

    def folders(self, mounts: Mounts) -> Iterator[bytes]:
        """What a guest gets that asks for its step's folders."""
        return cargo.sent(self._data, mounts)

    async def collect(self, sandbox: SandboxId, mounts: Mounts) -> None:
        """Have the porter kill everything in the pod and send what the step has left."""
        pod = self._known.get(sandbox)
        if pod is None:
            raise SandboxStartFailed("it is gone")
        async with self._carrying:
            async with self._while_it_lives(pod) as place:
                try:
                    async with asyncio.timeout(LET_IN_S_MAX):
                        end = await greeted(place, pod.secret, greeting.LEFT, has_function=True)
                except TimeoutError:
                    why = f"its porter has let nobody in for {LET_IN_S_MAX:g} s"
                    raise SandboxStartFailed(why) from None
            try:
                taking = asyncio.get_running_loop().run_in_executor(
                    self._carriers, cargo.take, end, self._data, mounts
                )
                try:
                    await asyncio.shield(taking)
                except asyncio.CancelledError:
                    with contextlib.suppress(OSError):  # it has been reset
                        end.shutdown(socket.SHUT_RDWR)  # the thread sees it, and writes no more
                    await asyncio.wait((taking,))
                    taking.exception()
                    raise
            finally:
                end.close()

    def trouble(self, sandbox: SandboxId) -> str:
        """What the API server says of a pod that does not run."""
        pod = self._known.get(sandbox)
        return pod.why if pod is not None else ""

    async def warm(self, zygote: SandboxId, mold: Mold, environment: Environment) -> None:
        """Nothing is forked here: raises `ZygoteUnfit`."""
        raise ZygoteUnfit("pods are made, not forked")

    async def retire(self, zygote: SandboxId) -> None:
        """There is none."""

    def limit(self, sandbox: SandboxId, limits: Limits) -> None:
        """A pod has its limits from the start: see `size`."""

    def give_way(self, sandbox: SandboxId, *, background: bool) -> None:
        """The nodes' own affair."""

    def memory_bytes(self, sandbox: SandboxId) -> int:
        """Not known here."""
        return 0

    def oom_kills(self, sandbox: SandboxId) -> int:
        """Known when it has ended."""
        return 0


class _Pod:
    """One pod that is ours: its connections, how far it is, how it ended."""

    def __init__(self, sandbox: SandboxId, name: str, on_leaving: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self.sandbox, self.name = sandbox, name
        self.uid, self.secret = "", b""
        self.has_porter = True
        """Else it is a user's own image, and the kubelet tells of its end."""

        self._is_leaving = False
        self.key: Key | None = None
        self.why = ""
        """What keeps it from running, as far as the API server knows."""

        self.line: Line | None = None
        self.guest: socket.socket | None = None
        self.running: asyncio.Future[str] = self._loop.create_future()
        """Its address."""

        self.exit: asyncio.Future[Exit] = self._loop.create_future()
        self._on_leaving = on_leaving
        self._waiting: asyncio.TimerHandle | None = None

    def seen(self, obj: Mapping[str, Any]) -> None:
        """The API server says this of it."""
        status = obj.get("status") or {}
        self.why, is_hopeless = manifests.trouble(obj)
        end = manifests.ended(obj)
        if not self.has_porter:
            is_hopeless = is_hopeless or manifests.is_unpullable(obj)
            is_going = end is None and "deletionTimestamp" in obj["metadata"]
            if is_going and not self._is_leaving:
                self._is_leaving = True
                self._on_leaving()
        if is_hopeless:
            if not self.running.done():
                self.running.set_exception(SandboxStartFailed(self.why))
                self.running.exception()
        elif status.get("phase") == "Running" and status.get("podIP") and not self.running.done():
            self.running.set_result(status["podIP"])
        if end is not None:
            self.ended(Exit(end.code, int(end.why == OUT_OF_MEMORY), 0, end.why, end.said))

    def reported(self, what: int, exit_: Exit) -> None:
        """Its porter says this."""
        if what == greeting.ENDED:
            self.ended(exit_)
        elif what == greeting.LEAVING and not self._is_leaving:  # once, however often it is said
            self._is_leaving = True
            self._on_leaving()

    def lost(self) -> None:
        """The line is broken, and without a word: the API server may know more, and soon."""
        if self.exit.done():
            return
        if self.guest is not None:
            with contextlib.suppress(OSError):  # it is closed
                self.guest.shutdown(socket.SHUT_RDWR)  # what is said there is heard by nobody
        self._waiting = self._loop.call_later(WORD_S_MAX, self.ended, Exit(-signal.SIGKILL))

    def ended(self, exit_: Exit) -> None:
        """It is over; what comes first counts."""
        if self._waiting is not None:
            self._waiting.cancel()
        if not self.exit.done():
            self.exit.set_result(exit_)
        if not self.running.done():
            self.running.set_exception(SandboxStartFailed("the pod has ended"))
            self.running.exception()

    @contextlib.contextmanager
    def when_ended(self, action: Callable[[], None]) -> Iterator[None]:
        """Call *action* if it has ended, or does while the block runs."""

        def act(_: object) -> None:
            action()

        self.exit.add_done_callback(act)
        try:
            yield
        finally:
            self.exit.remove_done_callback(act)

    def hang_up(self) -> None:
        """Let go of the line."""
        if self._waiting is not None:
            self._waiting.cancel()
        if self.line is not None:
            self.line.hang_up()


async def _kept_up(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """A defect in it must not end it for good: pods would stay."""
    while True:
        try:
            await work()
        except Exception:
            log.exception("a task of the driver failed")
        await asyncio.sleep(AGAIN_S)


def _reference(kind: Kind, obj: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": kind.api_version,
        "kind": kind.name,
        "name": obj["metadata"]["name"],
        "uid": obj["metadata"]["uid"],
    }
