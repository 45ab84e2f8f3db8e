"""What the state has others do: each once, in the order in which they come."""

from typing import Literal

from msgspec import Struct

from dayfly_pool.models import Failure, Function, InvocationId, Mold, SandboxId

StartKind = Literal["warm", "generic", "forked", "created"]


class Create(Struct, frozen=True):
    """Start a generic sandbox, or have *zygote* fork it; *claimed* when somebody waits for one.

    *behind*: whose it is has more under way than its part, and others go first.
    """

    sandbox: SandboxId
    mold: Mold
    claimed: bool
    zygote: SandboxId | None = None
    behind: bool = False


class Warm(Struct, frozen=True):
    """Start a zygote; with a *function*, have *parent* fork it and load the function into it."""

    zygote: SandboxId
    mold: Mold
    function: Function | None = None
    parent: SandboxId | None = None


class Retire(Struct, frozen=True):
    """Let a zygote end after the last of its sandboxes."""

    zygote: SandboxId


class Specialize(Struct, frozen=True):
    """Load *function* into a generic sandbox; *behind* as in `Create`."""

    sandbox: SandboxId
    function: Function
    behind: bool = False


class Assign(Struct, frozen=True):
    """Run the invocation there."""

    sandbox: SandboxId
    invocation: InvocationId
    start: StartKind


class Destroy(Struct, frozen=True):
    """End a sandbox: reaped, evicted, updated, removed, surplus, failed."""

    sandbox: SandboxId
    reason: str


class Refuse(Struct, frozen=True):
    """The invocation will not run: its function cannot be loaded, or is gone."""

    invocation: InvocationId
    failure: Failure | None


Command = Create | Warm | Retire | Specialize | Assign | Destroy | Refuse
