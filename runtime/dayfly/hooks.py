"""What user code asks to be called when its function is initialized once and forked many times."""

TYPE_CHECKING = False  # see `record`
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    Hook = TypeVar("Hook", bound=Callable[[], Any])

before: "list[Callable[[], Any]]" = []
after: "list[Callable[[], Any]]" = []


def before_zygote(hook: "Hook") -> "Hook":
    """Call *hook* once after the import, in the process that sandboxes will be forked from.

    It closes what forks must not share (connections, open files) and stops threads. It is not
    called where the function is imported anew in each sandbox.
    """
    before.append(hook)
    return hook


def after_fork(hook: "Hook") -> "Hook":
    """Call *hook* in every sandbox that was forked after the import, before its first event.

    It opens again what `before_zygote` closed, and seeds the module's own random generators.
    """
    after.append(hook)
    return hook
