"""What a store of declarations promises. SQLite keeps it for one server, PostgreSQL for several.

Of one name there is one declaration: who saves later wins. A store that servers share counts its
changes, so that each server can ask for what it does not know yet and miss nothing.
"""

from collections.abc import Callable
from typing import Final, Literal, Protocol, runtime_checkable

from msgspec import Struct

from dayfly_pool.models import (
    Environment,
    EnvironmentSpec,
    FunctionId,
    FunctionSpec,
    InvocationId,
    TriggerSpec,
)

Kind = Literal["Function", "Environment", "Trigger", "Queue", "Workflow", "Task", "Mark"]
CHANGES_MAX: Final = 1000
"""Told at once."""


class StoredFunction(Struct, frozen=True):
    """A declared function. *environment* is a digest, *updated* Unix time in seconds."""

    id: FunctionId
    version: int
    spec: FunctionSpec
    environment: str
    updated: float


class StoredEnvironment(Struct, frozen=True):
    """A declared environment and what was built for it. *updated* is Unix time in seconds.

    *locked* is what its requirements were resolved to: what another server builds of it is the
    same. The folder in *environment* is of the server that built it.
    """

    namespace: str
    name: str
    spec: EnvironmentSpec
    environment: Environment
    updated: float
    locked: str = ""


class StoredTrigger(Struct, frozen=True):
    """A declared trigger.

    *seen* is up to when its source has been looked at, in Unix time, *last* the event that it made
    last.
    """

    namespace: str
    name: str
    spec: TriggerSpec
    updated: float
    seen: float
    last: InvocationId = InvocationId("")


class Change(Struct, frozen=True):
    """What is declared of one name now; *stored* is None when that is nothing.

    The spec of what has nothing but a spec is as it was saved.
    """

    kind: Kind
    namespace: str
    name: str
    stored: StoredFunction | StoredEnvironment | StoredTrigger | bytes | None


class Changes(Struct, frozen=True):
    """What has changed up to *revision*, in the order of the last change of each name."""

    revision: int
    changes: list[Change]
    is_all: bool
    """Whether there is nothing after *revision* now."""


class Store(Protocol):
    """Every method may raise `DataFolderUnusable` or `StoreFailed`; nothing is changed then, or,
    after `StoreFailed`, nobody knows.

    What was saved is on the disk when the method returns. A caller that is cancelled while saving
    does not know whether it was.
    """

    async def open(self) -> None:
        """Make it ready: create it, or bring it up to date."""

    async def close(self) -> None:
        """After what is under way. Closing twice is harmless."""

    async def save_function(
        self, function: FunctionId, spec: FunctionSpec, environment: str, now: float
    ) -> int:
        """Declare a function; return its version: 1, 2, 3... over all its lives.

        The same spec and environment as before return the version that they have: nothing changes.
        """
        ...

    async def delete_function(self, function: FunctionId) -> bool:
        """Forget a function, all but its version. False if there was none."""
        ...

    async def functions(self) -> list[StoredFunction]:
        """All functions, by id."""
        ...

    async def save_environment(self, environment: StoredEnvironment) -> None:
        """Declare an environment, in the place of one of that name."""

    async def delete_environment(self, namespace: str, name: str) -> bool:
        """Forget an environment. False if there was none."""
        ...

    async def environments(self) -> list[StoredEnvironment]:
        """All environments, by namespace and name."""
        ...

    async def save_trigger(self, trigger: StoredTrigger) -> None:
        """Declare a trigger, in the place of one of that name; what it has seen stays."""

    async def note_seen(self, namespace: str, name: str, seen: float, last: InvocationId) -> None:
        """Its source has been looked at up to *seen*, and it made the event *last*."""

    async def delete_trigger(self, namespace: str, name: str) -> bool:
        """Forget a trigger. False if there was none."""
        ...

    async def triggers(self) -> list[StoredTrigger]:
        """All triggers, by namespace and name."""
        ...

    async def save_spec(self, kind: Kind, namespace: str, name: str, spec: bytes) -> None:
        """Declare something of *kind*, in the place of one of that name."""

    async def delete_spec(self, kind: Kind, namespace: str, name: str) -> bool:
        """Forget it. False if there was none."""
        ...

    async def specs(self, kind: Kind) -> list[tuple[str, str, bytes]]:
        """(namespace, name, spec) of all of *kind*, in order."""
        ...


@runtime_checkable
class SharedStore(Store, Protocol):
    """A store that other servers change as well."""

    async def revision(self) -> int:
        """How many changes there were."""
        ...

    async def changes(self, since: int) -> Changes:
        """What has changed after the revision *since*, by whomever; each name once, as it is now.

        At most `CHANGES_MAX`. Nothing that becomes visible later has a revision up to that which is
        returned.
        """
        ...

    async def listen(self, told: Callable[[], None]) -> None:
        """Call *told* when something was changed, by whomever, and once at the beginning; for ever.

        Raises `StoreFailed` when the connection is lost.
        """
