"""What user code may import from Dayfly: its context, hooks for being forked, and workflows.

What workflows are made of is imported when it is asked for: a plain function does not pay for it.
"""

from dayfly.context import Context
from dayfly.hooks import after_fork, before_zygote

TYPE_CHECKING = False  # see `record`
if TYPE_CHECKING:
    from typing import Any

    from dayfly.calls import (
        approval,
        callback,
        command,
        finally_,
        function,
        handler,
        nested,
        param,
        script,
        sleep,
        status,
        task,
        workspace,
    )
    from dayfly.graphs import cel, each, in_, text
    from dayfly.steps import (
        File,
        Folder,
        GraphError,
        Workspace,
        branches,
        conflicts,
        out,
        step,
        workflow,
    )

_LATER = {
    "steps": "File Folder GraphError Workspace branches conflicts out step workflow",
    "graphs": "cel each in_ text",
    "calls": "approval callback command finally_ function handler nested param script sleep status "
    "task workspace",
}

__all__ = [
    "Context",
    "File",
    "Folder",
    "GraphError",
    "Workspace",
    "__version__",
    "after_fork",
    "approval",
    "before_zygote",
    "branches",
    "callback",
    "cel",
    "command",
    "conflicts",
    "each",
    "finally_",
    "function",
    "handler",
    "in_",
    "nested",
    "out",
    "param",
    "script",
    "sleep",
    "status",
    "step",
    "task",
    "text",
    "workflow",
    "workspace",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> "Any":
    for module, names in _LATER.items():
        if name in names.split():
            from importlib import import_module

            found = globals()[name] = getattr(import_module(f"dayfly.{module}"), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
