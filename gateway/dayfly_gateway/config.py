"""The gateway's settings: one frozen object, checked at birth."""

import ipaddress

from msgspec import Struct

from dayfly.protocol import BODY_BYTES_MAX
from dayfly_gateway.events import Networks


class Address(Struct, frozen=True):
    """Where a plane listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Address":
        """`HOST:PORT`, `:PORT` or `[V6]:PORT`. Raises `ValueError`."""
        host, _, port = text.rpartition(":")
        if not port.isdigit() or int(port) > 65535:
            raise ValueError(f"{text!r} is not HOST:PORT")
        return cls(host.strip("[]") or "127.0.0.1", int(port))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class GatewayConfig(Struct, frozen=True, kw_only=True):
    """How the two HTTP planes behave. Times are in seconds."""

    http: Address = Address("127.0.0.1", 8080)
    admin: Address = Address("127.0.0.1", 8081)
    admin_token: str = ""
    trusted_proxies: Networks = ()
    body_bytes_max: int = BODY_BYTES_MAX
    package_bytes_max: int = 256 * 1024 * 1024
    header_s_max: float = 10.0
    """A connection that has not sent a whole request head within this time is closed."""

    body_s_grace: float = 10.0
    body_bytes_per_s_min: int = 1024
    """After the grace a body must have come at this rate, or the request ends with 408."""

    write_s_max: float = 60.0
    connections_max: int = 10_000
    drain_s_max: float = 30.0

    def __post_init__(self) -> None:
        if not self.admin.is_loopback and not self.admin_token:
            raise ValueError(
                f"refusing to serve the admin plane on {self.admin} without --admin-token: "
                "anybody who reaches it could run code here"
            )
