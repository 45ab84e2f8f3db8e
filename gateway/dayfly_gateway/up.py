"""`dayfly up`: from settings to a running server, with its log on stdout."""

import asyncio
import gc
import logging
import os
import resource
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from msgspec import Struct

from dayfly_gateway.client import Client, Told
from dayfly_gateway.config import Address, GatewayConfig
from dayfly_gateway.deploy import deploy as deploy_plan
from dayfly_gateway.deploy import reachable
from dayfly_gateway.events import parse_networks
from dayfly_gateway.logformat import Outbox
from dayfly_gateway.manifests import has_workflow, plan
from dayfly_gateway.server import Server
from dayfly_pool import pods
from dayfly_pool.config import Config
from dayfly_pool.errors import BadInput, PlatformError
from dayfly_pool.pods import Pods

log = logging.getLogger("dayfly.up")
T = TypeVar("T")

DEFAULTS: Final = Config(data=Path())
GENERIC_MIN: Final = DEFAULTS.generic_min
GENERIC_MAX: Final = DEFAULTS.generic_max
SANDBOXES_MAX: Final = DEFAULTS.sandboxes_max
ZYGOTE_FORKS_MAX: Final = DEFAULTS.zygote_forks_max
ZYGOTE_MINUTES_MAX: Final = DEFAULTS.zygote_s_max / 60
INITIALIZE_ONCE_MS: Final = DEFAULTS.initialize_once_s * 1000
POD_STARTS_MAX: Final = 16
"""Pods that may be starting at once: others start them."""

GC_THRESHOLD: Final = 20_000
"""New objects between two collections; reference counts free nearly all of a request's."""


class Settings(Struct, frozen=True, kw_only=True):
    """What the command line says, as it says it; None where it is silent."""

    data: Path
    http: str
    admin: str
    admin_token: str
    events_dsn: str = ""
    secrets: Path | None = None
    driver: Literal["linux", "process", "kubernetes"]
    kubernetes: Path | None = None
    name: str = DEFAULTS.shard
    generic_min: int | None
    generic_max: int | None
    sandboxes_max: int | None
    memory_reserve_mb: int | None
    foreign_namespaces: tuple[str, ...]
    exec_namespaces: tuple[str, ...]
    prewarm: str
    zygote_forks_max: int | None
    zygote_minutes_max: float | None
    initialize_once_ms: float | None
    trusted_proxies: tuple[str, ...]
    resources: tuple[str, ...] = ()
    package_hosts: tuple[str, ...] = ()


def configs(settings: Settings) -> tuple[Config, GatewayConfig]:
    """The two configurations that *settings* mean. Raises `BadInput`."""
    try:
        return _pool_config(settings), _gateway_config(settings)
    except ValueError as error:
        raise BadInput(str(error)) from None


def _pool_config(settings: Settings) -> Config:
    """A bound that is not given follows those that are: `--generic-min 40` alone must work."""
    most = settings.sandboxes_max if settings.sandboxes_max is not None else SANDBOXES_MAX
    generic_max, generic_min = settings.generic_max, settings.generic_min
    if generic_max is None:
        generic_max = max(min(GENERIC_MAX, most), generic_min or 0)
    if generic_min is None:
        generic_min = min(GENERIC_MIN, generic_max)
    return Config(
        data=settings.data.expanduser().resolve(),
        events_dsn=settings.events_dsn,
        secrets=settings.secrets.expanduser().resolve() if settings.secrets else None,
        pods=_pods(settings.kubernetes) if settings.kubernetes else None,
        shard=settings.name,
        starts_max=POD_STARTS_MAX if settings.driver == "kubernetes" else DEFAULTS.starts_max,
        driver=settings.driver,
        generic_min=generic_min,
        generic_max=generic_max,
        sandboxes_max=most,
        memory_reserve_mb=_given(settings.memory_reserve_mb, DEFAULTS.memory_reserve_mb),
        foreign_namespaces=settings.foreign_namespaces,
        exec_namespaces=settings.exec_namespaces,
        resources=dict(map(_resource, settings.resources)),
        package_hosts=settings.package_hosts,
        prewarm="exec" if settings.prewarm == "exec" else "fork",
        zygote_forks_max=_given(settings.zygote_forks_max, ZYGOTE_FORKS_MAX),
        zygote_s_max=_given(settings.zygote_minutes_max, ZYGOTE_MINUTES_MAX) * 60,
        initialize_once_s=_given(settings.initialize_once_ms, INITIALIZE_ONCE_MS) / 1000,
    )


def _pods(file: Path) -> Pods:
    try:
        return pods.read(file.read_bytes())
    except OSError as error:
        raise BadInput(f"--kubernetes {file}: {error.strerror}") from None
    except ValueError as error:
        raise BadInput(f"--kubernetes {file}: {error}") from None


def _resource(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    if not (name.isidentifier() and number.isascii() and number.isdigit()):
        raise BadInput(f"--resource {text}: give NAME=N, like gpu=2")
    return name, float(number[:9])


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


def _gateway_config(settings: Settings) -> GatewayConfig:
    admin = address("--admin", settings.admin)
    if not admin.is_loopback and not settings.admin_token:
        raise BadInput(
            f"refusing to serve the admin plane on {admin} without a token, as anybody who reaches "
            "it could run code here: give --admin-token-file FILE, or set DAYFLY_ADMIN_TOKEN"
        )
    return GatewayConfig(
        http=address("--http", settings.http),
        admin=admin,
        admin_token=settings.admin_token,
        trusted_proxies=parse_networks(settings.trusted_proxies),
    )


def address(option: str, text: str) -> Address:
    """What *option* gives. Raises `BadInput`."""
    try:
        return Address.parse(text)
    except ValueError as error:
        raise BadInput(f"{option}: {error}") from None


def serve(settings: Settings, log_form: str, deploy: Path | None) -> None:
    """Run until SIGTERM or SIGINT. Raises `PlatformError` when it cannot start."""
    config, gateway = configs(settings)

    async def main(outbox: Outbox) -> None:
        async def on_ready(server: Server) -> None:
            extra = {"http": str(gateway.http), "admin": str(gateway.admin)}
            extra |= {"driver": config.driver, "data": str(config.data)}
            log.info("dayfly is up", extra=extra | {"pid": os.getpid()})
            if deploy is not None:
                await asyncio.to_thread(_deploy_all, deploy, gateway, outbox)

        await Server(config, gateway).run(on_ready)

    run(log_form, main)


def run(log_form: str, main: Callable[[Outbox], Coroutine[Any, Any, None]]) -> None:
    """Run *main* on a loop of its own, with the log on stdout. Raises `PlatformError`."""
    import uvloop

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    gc.freeze()  # what is loaded by now stays: the collector need not look at it again
    gc.set_threshold(GC_THRESHOLD)
    outbox = Outbox(log_form)
    outbox.install()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main(outbox))
        log.info("dayfly has ended")
    except BaseExceptionGroup as group:
        raise_ours(group)
        raise
    finally:
        outbox.close()


def raise_ours(group: BaseExceptionGroup[BaseException]) -> None:
    """Raise the first error of ours in *group*, if it holds nothing else."""
    leaves = list(_leaves(group))
    if all(isinstance(leaf, PlatformError) for leaf in leaves):
        raise leaves[0] from None


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
    return [error]


class _Logged:
    """Progress that goes to the server's log."""

    def uploaded(self, done: int, total: int) -> None:
        """Not worth a line."""

    def building(self, environment: str, text: str) -> None:
        """One line."""
        log.info("environment builds", extra={"environment": environment, "said": text})


def _deploy_all(folder: Path, gateway: GatewayConfig, outbox: Outbox) -> None:
    """Deploy each folder and file in *folder*, through the admin plane like anybody else."""
    client = Client(f"http://{reachable(str(gateway.admin))}", gateway.admin_token)
    urls = {}
    for path in deployable(folder):
        try:
            what = plan(path, name=None, namespace="default", spec={})
            view = deploy_plan(client, what, _Logged())
        except (PlatformError, Told, OSError, UnicodeError) as error:
            log.error("not deployed", extra={"path": str(path), "why": str(error)})
            continue
        url = f"http://{reachable(str(gateway.http))}{view['status']['url']}"
        urls[what.manifest.metadata.name] = url
    for name, url in urls.items():
        if outbox.is_text:
            outbox.say(f"    curl -i {url}")
        else:
            log.info("try it", extra={"function": name, "url": url})


def deployable(folder: Path) -> list[Path]:
    """The functions in *folder*: its Python files, and its folders that hold some, but for
    workflows: to know these, their code would have to be run."""
    found = [path for path in sorted(folder.iterdir()) if path.name[0] not in "._"]
    code = [path for path in found if path.suffix == ".py" or any(path.glob("*.py"))]
    return [path for path in code if not has_workflow(path)]
