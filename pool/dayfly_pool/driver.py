"""What a driver promises, and which there are.

Drivers make and destroy sandboxes on one kind of machine; they keep no policy.

Chosen by name (`DRIVERS`), imported when chosen.
"""

import socket
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from dayfly_pool.models import Environment, Function, Limits, Mold, SandboxId

DRIVERS: Final[Mapping[str, str]] = {
    "linux": "dayfly_pool.drivers.linux:LinuxDriver",
    "process": "dayfly_pool.drivers.process:ProcessDriver",
}
GENERIC_LIMITS: Final = Limits()
"""What a generic sandbox has; a function that asks for no other is spared the writes."""

MEMORY_HEADROOM_MB: Final = 16
"""What the guest itself uses, on top of the memory that a function may use."""


class Exit(NamedTuple):
    """How a sandbox ended: its exit code (negative or over 128: a signal) and its memory."""

    code: int
    oom_kills: int = 0
    peak_bytes: int = 0


class Driver(Protocol):
    """Makes and destroys sandboxes on one kind of machine.

    A driver keeps no policy: it never decides when, how many or which. `create` returns our end
    of the guest's connection; the guest says `Hello` when it is up. `destroy` is idempotent,
    never raises for a sandbox that is gone, and returns when every process of it is dead.
    `exited` returns how the sandbox ended, once it has. `open` destroys what an earlier server
    on the same machine left behind.

    What is in the *background* has a processor only when nobody else wants one, on machines where
    that can be arranged; `give_way` puts a sandbox or a zygote there, and takes it back. That is
    among those of this server. Where it *sets_apart*, those of a mold for batch are made in the
    background of the whole machine, and stay there; as long as one of them is taken back, all are.

    A driver that `can_fork` also makes zygotes: `warm` returns when one is ready, `create` with
    *zygote* has it fork, and `retire` lets it end after the last of its sandboxes. Whoever
    destroys a zygote destroys its sandboxes. `exited` and `destroy` take zygotes as well.

    In sandboxes of a mold for *steps*, a function with mounts finds its folders; their files belong
    to the user *steps_owner* on this machine, which no sandbox runs as where they have a uid each.
    Nobody else sees anything of the stores. Without isolation there are no workspaces.

    `oom_kills`: how many processes of a sandbox that lives the kernel has killed for its memory
    so far; 0 where nobody knows.

    A sandbox that *keeps* a function is, once that is loaded into it, a zygote too: what it forks
    holds the function, and says `Loaded` to its own `Load` without importing anything.
    """

    isolated: bool
    can_fork: bool
    steps_owner: int

    @property
    def sets_apart(self) -> bool: ...

    async def open(self) -> None: ...
    async def close(self) -> None: ...
    async def create(
        self,
        sandbox: SandboxId,
        mold: Mold,
        environment: Environment,
        zygote: SandboxId | None = None,
        keeps: Function | None = None,
        *,
        background: bool = False,
    ) -> socket.socket: ...
    async def warm(self, zygote: SandboxId, mold: Mold, environment: Environment) -> None: ...
    async def retire(self, zygote: SandboxId) -> None: ...
    def limit(self, sandbox: SandboxId, limits: Limits) -> None: ...
    def give_way(self, sandbox: SandboxId, *, background: bool) -> None: ...
    async def terminate(self, sandbox: SandboxId) -> None: ...
    async def destroy(self, sandbox: SandboxId) -> Exit: ...
    async def exited(self, sandbox: SandboxId) -> Exit: ...
    def memory_bytes(self, sandbox: SandboxId) -> int: ...
    def oom_kills(self, sandbox: SandboxId) -> int: ...


def load(name: str, data: Path, uid_first: int) -> Driver:
    """The driver called *name*; `ValueError` names those there are."""
    if name not in DRIVERS:
        raise ValueError(f"no driver {name!r}; there are {', '.join(DRIVERS)}")
    module, _, attribute = DRIVERS[name].partition(":")
    driver: Driver = getattr(import_module(module), attribute)(data, uid_first)
    return driver
