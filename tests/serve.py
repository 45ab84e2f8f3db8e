"""A server with settings that the command line does not offer: deadlines short enough for tests."""

import asyncio
import json
import sys
from pathlib import Path

import uvloop

from dayfly_gateway.config import Address, GatewayConfig
from dayfly_gateway.logformat import Outbox
from dayfly_gateway.server import Server
from dayfly_pool.config import Config

GATEWAY = set(GatewayConfig.__struct_fields__)


async def ready(_: Server) -> None:
    """Nothing to do: the tests ask /ready."""


def main() -> None:
    """The arguments are JSON: settings of the pool and the gateway, and where to listen."""
    settings, where = json.loads(sys.argv[1]), json.loads(sys.argv[2])
    addresses = {plane: Address.parse(text) for plane, text in where.items()}
    gateway = {name: settings.pop(name) for name in GATEWAY & settings.keys()}
    config = Config(**settings | {"data": Path(settings["data"])})
    outbox = Outbox("json")
    outbox.install()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(Server(config, GatewayConfig(**addresses, **gateway)).run(ready))
    finally:
        outbox.close()


if __name__ == "__main__":
    main()
