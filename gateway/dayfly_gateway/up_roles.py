"""`dayfly pool` and `dayfly gateway`: from settings to a running shard or gateway."""

import logging
import os
import re
from pathlib import Path
from typing import Final

from msgspec import Struct

from dayfly_gateway import up
from dayfly_gateway.config import GatewayConfig
from dayfly_gateway.deploy import reachable
from dayfly_gateway.events import parse_networks
from dayfly_gateway.logformat import Outbox
from dayfly_gateway.roles import Gateway, Shard
from dayfly_pool.cluster.members import Fixed, Members, parsed
from dayfly_pool.errors import BadInput
from dayfly_pool.tls import Identity

log = logging.getLogger("dayfly.up")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")


class PoolSettings(Struct, frozen=True, kw_only=True):
    """What `dayfly pool` is told, besides what `dayfly up` is."""

    wire: str
    advertise: str
    tls: Path
    name: str
    members: str
    shards: tuple[str, ...]
    watched: tuple[str, ...]


class GatewaySettings(Struct, frozen=True, kw_only=True):
    """What `dayfly gateway` is told."""

    http: str
    admin: str
    admin_token: str
    tls: Path
    members: str
    shards: tuple[str, ...]
    trusted_proxies: tuple[str, ...]
    queue_seconds_max: float


def serve_pool(settings: PoolSettings, whole: up.Settings, log_form: str) -> None:
    """Run until SIGTERM or SIGINT. Raises `PlatformError` when it cannot start."""
    if not _NAME.match(settings.name):
        raise BadInput(f"--name {settings.name}: give letters, digits, dots and dashes")
    config, gateway = up.configs(whole)
    wire = up.address("--wire", settings.wire)
    identity = Identity(settings.tls.expanduser())
    shards = settings.shards or (f"{settings.name}={reachable(str(wire))}",)
    members = _members(settings.members, shards)
    if settings.members == "static" and settings.name not in members.current():
        raise BadInput(f"--shard names {sorted(members.current())}, and not --name {settings.name}")
    advertised = settings.advertise or reachable(str(wire))
    if parsed(advertised) is None:
        raise BadInput(f"--advertise {advertised}: give HOST:PORT")

    async def main(outbox: Outbox) -> None:
        async def on_ready() -> None:
            extra = {"shard": settings.name, "wire": str(wire), "admin": str(gateway.admin)}
            extra |= {"driver": config.driver, "data": str(config.data)}
            log.info("dayfly pool is up", extra=extra | {"pid": os.getpid()})

        where = (wire, identity, settings.name, members, advertised)
        shard = Shard(config, gateway, *where, watched=settings.watched)
        await shard.run(on_ready)

    up.run(log_form, main)


def serve_gateway(settings: GatewaySettings, log_form: str) -> None:
    """Run until SIGTERM or SIGINT. Raises `PlatformError` when it cannot start."""
    admin = up.address("--admin", settings.admin)
    try:
        config = GatewayConfig(
            http=up.address("--http", settings.http),
            admin=admin,
            admin_token=settings.admin_token,
            trusted_proxies=parse_networks(settings.trusted_proxies),
        )
    except ValueError as error:
        raise BadInput(str(error)) from None
    if not 0 < settings.queue_seconds_max <= 3600:
        raise BadInput("--queue-seconds-max is above 0 and at most 3600")
    identity = Identity(settings.tls.expanduser())
    identity.refresh()  # what is wrong with them is better said now
    members = _members(settings.members, settings.shards)

    async def main(outbox: Outbox) -> None:
        async def on_ready() -> None:
            extra = {"http": str(config.http), "admin": str(config.admin)}
            log.info("dayfly gateway is up", extra=extra | {"pid": os.getpid()})

        gateway = Gateway(config, identity, members, settings.queue_seconds_max)
        await gateway.run(on_ready)

    up.run(log_form, main)


def _members(kind: str, shards: tuple[str, ...]) -> Members:
    """Who is there: those that are named, or that have a Lease. Raises `BadInput`."""
    if kind == "kubernetes":
        from dayfly_pool.cluster.leased import Leased

        return Leased()
    if not shards:
        raise BadInput("there is no shard: give --shard NAME=HOST:PORT for each")
    return Fixed.parse(shards)
