"""The SDK of workflows: plain functions are steps, plain calls of them make the graph.

    @step(retries=3)
    def fetch(url: str) -> File: ...

    @step
    def train(data: File, kind: str) -> float: ...

    @workflow
    def pipeline(url: str):
        return train.map(kind=["linear", "tree"], data=fetch(url))

`workflow.compile(pipeline)` is the manifest's spec; no server is asked. Inside a workflow's
function a call returns a handle of what the step will leave: it can be given to other steps,
indexed and compared, but not looked at, since nothing has run. Outside of one, calling a step just
runs it, and calling a workflow runs its steps one after the other in this process: for tests.

A step may take files: a parameter that is annotated `File` or `Folder` is an artifact, and the step
gets a `pathlib.Path`; what it returns for a return annotation of these is one too, and so is what
it writes to `out(NAME)` for each of its `outputs`.

Sandboxes import this with a step's module, so it imports nothing; what makes graphs is in `calls`.
"""

from __future__ import annotations

import os
import sys

from dayfly.context import Context

TYPE_CHECKING = False  # see `record`
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from pathlib import Path
    from typing import Any, TypeAlias

    from dayfly.graphs import Graph

    File: TypeAlias = Path
    Folder: TypeAlias = Path
    Workspace: TypeAlias = Path
else:

    class File:
        """A parameter's or return's annotation: an artifact that is a file, as a `pathlib.Path`."""

    class Folder:
        """The same for a folder."""

    class Workspace:
        """A parameter's annotation: a mutable folder of the run, as a `pathlib.Path`."""


OUTPUT = "output"
"""What a step returns as File or Folder, as an output."""

STEP_OPTIONS = frozenset(
    {"name", "retries", "timeout", "cache", "on_error", "environment", "network", "env", "limits",
     "outputs", "results", "merge"}
)  # fmt: skip
WORKFLOW_OPTIONS = frozenset({"name", "environment", "timeouts", "source", "package", "params"})

open_graphs: list[Graph] = []
"""Of the workflows whose functions are running, the innermost last."""

FOLDERS = {"in": "/in", "workspace": "/workspaces", "out": "/out"}
"""Where a step in a sandbox finds them, if its context does not say otherwise (`in_folder` ...)."""

_folders: dict[str, str] = {}
"""Where what runs here and now finds `in`, `workspace` and `out`."""


class GraphError(TypeError):
    """A workflow's function does what makes no graph. The message says what to do instead."""


class Step:
    """A function that is a step. Its code is run as it is; only calls in workflows are noted."""

    def __init__(self, func: Callable[..., Any], options: Mapping[str, Any]) -> None:
        unknown = options.keys() - STEP_OPTIONS
        if unknown:
            raise GraphError(
                f"@step has no {min(unknown)!r}; it has {', '.join(sorted(STEP_OPTIONS))}"
            )
        if not callable(func) or not hasattr(func, "__code__"):
            raise GraphError(f"@step is for functions, and {func!r} is none")
        if isinstance(options.get("outputs"), (str, dict)):
            raise GraphError(
                '@step\'s outputs are names: outputs=("model",), written to out("model")'
            )
        self.func, self.options = func, options
        self.__name__, self.__qualname__ = func.__name__, func.__qualname__
        self.__module__, self.__doc__ = func.__module__, func.__doc__
        self.__wrapped__ = func

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """In a workflow's function a handle; else what the function returns.

        With an event and a `Context` it is a handler: what the sandbox calls.
        """
        if len(args) == 2 and isinstance(args[1], Context):
            return self._handle(args[0], args[1])
        if open_graphs:
            from dayfly import calls

            return calls.call(self, args, kwargs)
        return self.func(*args, **kwargs)

    def map(self, rows: Any = None, /, **axes: Any) -> Any:
        """One run for each combination of the lists among *axes*.

        A handle is run over too where it is known to be a list and the parameter is none; or with
        `each(handle)`, and then handles without it are not. What is no list is the same for all.
        *rows* are further combinations, as mappings. It returns the list of what the runs return.
        """
        from dayfly import calls

        if not open_graphs:
            return calls.mapped_here(self.func, rows, axes)
        return calls.call_mapped(self, rows, axes)

    def _handle(self, event: Any, context: Context) -> Any:
        if not isinstance(event, dict):
            raise TypeError(f"step {self.__name__!r} is given a mapping of its parameters")
        for key, path in FOLDERS.items():
            _folders[key] = getattr(context, f"{key}_folder", path)
        code = self.func.__code__
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        given = {name: event[name] for name in names if name in event}
        unknown = event.keys() - given.keys()
        if unknown:
            raise TypeError(f"step {self.__name__!r} has no parameter {min(unknown)!r}")
        for name in names:
            if name not in given and (path := self._path(name)) is not None:
                given[name] = path
        value = self.func(**given)
        return _leave_later(value) if hasattr(value, "__await__") else _leave(value)

    def _path(self, name: str) -> Any:
        """Where the artifact or workspace for parameter *name* lies, if one does."""
        for folder in ("in", "workspace"):
            path = f"{_folders[folder]}/{name}"
            if os.path.lexists(path):
                from pathlib import Path

                if folder == "in" and self._is_several(name):
                    return [Path(path, item) for item in sorted(os.listdir(path), key=_numbers)]
                return Path(path)
        return None

    def _is_several(self, name: str) -> bool:
        """Whether the parameter is a list of files."""
        annotation = self.func.__annotations__.get(name)
        if isinstance(annotation, str):
            return annotation.startswith("list[")
        return getattr(annotation, "__origin__", None) is list

    def __repr__(self) -> str:
        return f"<step {self.__module__}:{self.__qualname__}>"


def _numbers(name: str) -> tuple[int, str]:
    return (int(name), name) if name.isdecimal() else (1 << 62, name)


def _leave(value: Any) -> Any:
    """What a step returns; a file or folder is moved to where its output belongs."""
    pathlib = sys.modules.get("pathlib")
    if pathlib is None or not isinstance(value, pathlib.PurePath):
        return value
    target = out(OUTPUT)
    if os.path.abspath(value) != os.path.abspath(target):
        from shutil import move

        move(os.fspath(value), os.fspath(target))
    return None


async def _leave_later(value: Coroutine[Any, Any, Any]) -> Any:
    return _leave(await value)


def out(name: str = OUTPUT) -> Path:
    """Where a step writes its output *name*. In a test it is below a new temporary folder."""
    from pathlib import Path

    if "out" not in _folders:
        from tempfile import mkdtemp

        _folders["out"] = mkdtemp(prefix="dayfly-out-")
    return Path(_folders["out"], name)


def branches(place: Path) -> list[Path]:
    """In a step with `merge="reduce"`: what each branch of the workspace left, read-only.

    In the order of the steps, and of a matrix's combinations. A rehearsal has one folder for all,
    and no branches.
    """
    from pathlib import Path

    folder = Path(f"{place}.branches")
    return sorted(folder.iterdir(), key=lambda branch: int(branch.name)) if folder.is_dir() else []


def conflicts(place: Path) -> list[str]:
    """In such a step: the paths that the branches disagree about, relative to the workspace.

    It finds there what was there before the branches.
    """
    from pathlib import Path

    told = Path(f"{place}.conflicts")
    return told.read_text().splitlines() if told.exists() else []


class Workflow:
    """A function whose calls of steps are a graph."""

    def __init__(self, func: Callable[..., Any], options: Mapping[str, Any]) -> None:
        unknown = options.keys() - WORKFLOW_OPTIONS
        if unknown:
            known = ", ".join(sorted(WORKFLOW_OPTIONS))
            raise GraphError(f"@workflow has no {min(unknown)!r}; it has {known}")
        self.func = func
        self.options = {key: value for key, value in options.items() if key != "name"}
        self.__name__, self.__qualname__ = func.__name__, func.__qualname__
        self.__module__, self.__doc__ = func.__module__, func.__doc__
        self.name = str(options.get("name") or func.__name__.strip("_").replace("_", "-").lower())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """In another workflow's function a step that runs it; else it is run here and now."""
        from dayfly import calls

        if open_graphs:
            return calls.call_nested(self, args, kwargs)
        from dayfly import rehearsal

        return rehearsal.run(self, args, kwargs)

    def __repr__(self) -> str:
        return f"<workflow {self.__module__}:{self.__qualname__}>"


def step(function: Any = None, /, **options: Any) -> Any:
    """Make a function a step; bare, or with options.

    *name*, *retries* (a number, or `{"limit": 3, "backoffSeconds": 1}`), *timeout* (seconds, or
    text like `15m`), *cache*, *on_error* (`continue`), *environment*, *network*, *env*, *limits*
    (`{"memoryMb": 512}`), *merge*;
    *outputs*, the names of what it writes to `out(NAME)`; *results*, types by name, for keys of
    the mapping that it returns which are results of their own.
    """
    if function is None:
        return lambda function: Step(function, options)
    return Step(function, options)


class _Decorator:
    """`@workflow`, and `workflow.compile`."""

    def __call__(self, function: Any = None, /, **options: Any) -> Any:
        if function is None:
            return lambda function: Workflow(function, options)
        return Workflow(function, options)

    @staticmethod
    def compile(flow: Workflow) -> dict[str, Any]:
        """The `spec` of a `kind: Workflow`: JSON values. Raises `GraphError`."""
        from dayfly import calls

        return calls.graph_of(flow).rendered()

    @staticmethod
    def nested(flow: Workflow) -> list[Workflow]:
        """The workflows that *flow* runs as steps, innermost first, and then itself."""
        from dayfly import calls

        return calls.nested_in(flow)


workflow = _Decorator()
"""Make a function a workflow; bare, or with *name*, *environment*, *timeouts* and *source*."""
