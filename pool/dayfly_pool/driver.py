"""What a driver promises, and which there are.

Drivers make and destroy sandboxes on one kind of machine; they keep no policy.

Chosen by name (`DRIVERS`), imported when chosen.
"""

import socket
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from dayfly_pool.config import Config
from dayfly_pool.errors import SandboxStartFailed
from dayfly_pool.models import (
    Container,
    Environment,
    Function,
    FunctionId,
    Limits,
    Mold,
    Mounts,
    SandboxId,
)

DRIVERS: Final[Mapping[str, str]] = {
    "linux": "dayfly_pool.drivers.linux:LinuxDriver",
    "process": "dayfly_pool.drivers.process:ProcessDriver",
    "kubernetes": "dayfly_pool.drivers.kubernetes:KubernetesDriver",
}
GENERIC_LIMITS: Final = Limits()
"""What a generic sandbox has; a function that asks for no other is spared the writes."""

MEMORY_HEADROOM_MB: Final = 16
"""What the guest itself uses, on top of the memory that a function may use."""


class Exit(NamedTuple):
    """How a sandbox ended: its exit code (negative or over 128: a signal) and its memory.

    Of a container also what whoever ran it says of that, and what it said itself.
    """

    code: int
    oom_kills: int = 0
    peak_bytes: int = 0
    why: str = ""
    said: str = ""


class Survivor(NamedTuple):
    """A sandbox of an earlier server. It *holds* (function, version), or is generic: None."""

    sandbox: SandboxId
    mold: Mold
    holds: tuple[FunctionId, str] | None


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
    Nobody else sees anything of the stores. Without isolation there are no workspaces. A driver
    that `carries` has them sent: `folders` is what goes to the guest, and `collect` ends a sandbox
    whose step has succeeded and brings what that left to where a mount would have had it. It raises
    `BadTree`, `DiskFull`, and OSError or `SandboxStartFailed` when the sandbox is lost.

    `oom_kills`: how many processes of a sandbox that lives the kernel has killed for its memory
    so far; 0 where nobody knows.

    A sandbox that *keeps* a function is, once that is loaded into it, a zygote too: what it forks
    holds the function, and says `Loaded` to its own `Load` without importing anything.

    Where a sandbox *outlives* the server, `close` leaves them as they are, and `open` finds the
    `survivors`: each is taken over with `adopt`, or destroyed. What a sandbox holds is `note`d for
    that. *on_leaving* is told of a sandbox that others are about to end: it takes nothing more.
    A driver whose sandboxes do not share the server's machine does not mind that one's memory.
    Word of how a sandbox ended comes within *report_s* of the end of its connection, or not at all.

    `size` is what a mold says of its sandboxes' memory where that cannot be changed later, else 0;
    ValueError when there is none so large. `archive` is where the package is that a guest asks for,
    None where guests see the packages. Where it *sends_environments* they do not see those either
    and ask for the parcel. `image` is what an environment's sandboxes run, by the operator's word
    or as its declaration *asked*, empty where its libraries are installed; ValueError where that is
    not allowed. `trouble` is why a sandbox is not up yet, if that is known.

    `shards` are those that have or had sandboxes here which outlive them; `bury_shard` deletes all
    that one had, whose pool will not come back.

    A driver that `runs_images` makes pods of a function's own image: `run` makes one, with *env*
    for this one alone, and returns its address when its container runs, empty when that has ended
    already. It waits for room and for the image as long as it is let. `rejoin` is the address of a
    survivor. `output` is the end of what it wrote. `destroy` asks it to end and does not wait.
    """

    isolated: bool
    can_fork: bool
    steps_owner: int
    outlives: bool
    shares_machine: bool
    report_s: float
    sends_environments: bool
    carries: bool
    runs_images: bool
    on_leaving: Callable[[SandboxId], None]

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
    def survivors(self) -> list[Survivor]: ...
    async def adopt(self, sandbox: SandboxId, *, has_function: bool) -> socket.socket: ...
    def note(self, sandbox: SandboxId, function: Function) -> None: ...
    def size(self, limits: Limits) -> int: ...
    def archive(self, digest: str) -> Path | None: ...
    def image(self, namespace: str, name: str, asked: str) -> str: ...
    def trouble(self, sandbox: SandboxId) -> str: ...
    async def shards(self) -> list[str]: ...
    async def bury_shard(self, name: str) -> None: ...
    def folders(self, mounts: Mounts) -> Iterator[bytes]: ...
    async def collect(self, sandbox: SandboxId, mounts: Mounts) -> None: ...
    async def run(
        self,
        sandbox: SandboxId,
        function: Function,
        container: Container,
        env: Mapping[str, str] = {},
    ) -> str: ...
    async def rejoin(self, sandbox: SandboxId) -> str: ...
    async def output(self, sandbox: SandboxId) -> bytes: ...


class OnThisMachine:
    """What drivers have in common whose sandboxes end with the server."""

    outlives = False
    shares_machine = True
    report_s = 0.08
    sends_environments = False
    carries = False
    runs_images = False

    def __init__(self) -> None:
        self.on_leaving: Callable[[SandboxId], None] = lambda sandbox: None

    def survivors(self) -> list[Survivor]:
        """None: whatever was left has been destroyed."""
        return []

    async def adopt(self, sandbox: SandboxId, *, has_function: bool) -> socket.socket:
        """There is nothing to adopt."""
        raise SandboxStartFailed("nothing outlives a server here")

    def note(self, sandbox: SandboxId, function: Function) -> None:
        """Nobody comes after us who would read it."""

    def size(self, limits: Limits) -> int:
        """Any sandbox can be given any limits."""
        return 0

    def archive(self, digest: str) -> Path | None:
        """Guests see the packages."""
        return None

    def image(self, namespace: str, name: str, asked: str) -> str:
        """There are no images: libraries are installed."""
        return ""

    def trouble(self, sandbox: SandboxId) -> str:
        """Nothing is known."""
        return ""

    async def shards(self) -> list[str]:
        """Of nobody: nothing outlives a server."""
        return []

    async def bury_shard(self, name: str) -> None:
        """There is nothing left of it."""

    def folders(self, mounts: Mounts) -> Iterator[bytes]:
        """They are mounted."""
        return iter(())

    async def collect(self, sandbox: SandboxId, mounts: Mounts) -> None:
        """What a step leaves is here already."""

    async def run(
        self,
        sandbox: SandboxId,
        function: Function,
        container: Container,
        env: Mapping[str, str] = {},
    ) -> str:
        """There are no pods here."""
        raise SandboxStartFailed("images need pods")

    async def rejoin(self, sandbox: SandboxId) -> str:
        """There is nothing to rejoin."""
        raise SandboxStartFailed("nothing outlives a server here")

    async def output(self, sandbox: SandboxId) -> bytes:
        """Guests say theirs themselves."""
        return b""


def load(config: Config) -> Driver:
    """The driver that *config* names; `ValueError` names those there are."""
    name = config.driver
    if name not in DRIVERS:
        raise ValueError(f"no driver {name!r}; there are {', '.join(DRIVERS)}")
    module, _, attribute = DRIVERS[name].partition(":")
    driver: Driver = getattr(import_module(module), attribute)(config)
    return driver
