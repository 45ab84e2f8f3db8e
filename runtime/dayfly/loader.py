"""Specialize: find the handler in the user's package, with the user's modules winning over ours.

Whatever goes wrong here is the user's failure and is told in their terms (`LoadFailure`).
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # see `record`
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Handler = Callable[[Any, Any], Any]

_OURS = ("dayfly", "msgpack")
MESSAGE_CHARACTERS_MAX = 2048
TRACEBACK_BYTES_MAX = 16384
_START_UP = frozenset(m for m in sys.modules if m.partition(".")[0] not in _OURS)
"""What was imported before us; a user's file never replaces these."""


class LoadFailure(Exception):
    """The function cannot be loaded; *kind* is one of the documented failure kinds."""

    def __init__(self, kind: str, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.kind, self.message, self.traceback = kind, message, traceback


def split_handler(handler: str) -> tuple[str, str]:
    """("package.module", "name") from `package.module:name` or AWS's `package.module.name`."""
    module, colon, name = handler.partition(":")
    if not colon:
        module, _, name = handler.rpartition(".")
    module = module.replace("/", ".")
    if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise LoadFailure(
            "HandlerMissing", f"handler {handler!r} is not of the form module:function"
        )
    return module, name


def load(code: str, handler: str) -> Handler:
    """Import the handler from the package at *code*. Raises `LoadFailure`, and nothing else."""
    module_name, name = split_handler(handler)
    _let_user_modules_win(code)
    try:
        __import__(module_name)
        found = getattr(sys.modules[module_name], name, None)
    except ModuleNotFoundError as error:
        if f"{module_name}.".startswith(f"{error.name}."):
            raise LoadFailure(
                "HandlerMissing",
                f"the package has no module {module_name!r}; it holds {_contents(code)}",
            ) from None
        message = said(error).removeprefix("ModuleNotFoundError: ")
        raise LoadFailure("ImportFailed", message, user_traceback(error, code)) from None
    except SyntaxError as error:
        raise LoadFailure(
            "SyntaxError",
            f"{_inside(error.filename, code)}, line {error.lineno}: {error.msg}",
            user_traceback(error, code),
        ) from None
    except BaseException as error:  # SystemExit and friends are user code's doing too
        raise LoadFailure("ImportFailed", said(error), user_traceback(error, code)) from None
    if not callable(found):
        what = "is not callable" if found is not None else "does not exist"
        raise LoadFailure("HandlerMissing", f"{name!r} {what} in module {module_name!r}")
    return found  # type: ignore[no-any-return]


def _let_user_modules_win(code: str) -> None:
    """Put *code* first on the path and forget every module that a file in it would replace."""
    sys.path.insert(0, code)
    ours = set(sys.modules) - _START_UP
    with os.scandir(code) as entries:
        theirs = {entry.name.partition(".")[0] for entry in entries}
    for name in ours:
        top = name.partition(".")[0]
        if (top in theirs or top == "msgpack") and top != "__main__":
            del sys.modules[name]


def _contents(code: str) -> str:
    names = sorted(name for name in os.listdir(code) if name != "__pycache__")
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "") or "nothing"


def _inside(path: str | None, code: str) -> str:
    path = path or "?"
    return path[len(code) + 1 :] if path.startswith(code + "/") else path


def said(error: BaseException) -> str:
    """The exception's kind and message, at most 2,048 characters, whatever its `__str__` does."""
    try:
        return f"{type(error).__name__}: {error}"[:MESSAGE_CHARACTERS_MAX]
    except BaseException:
        return type(error).__name__


def user_traceback(error: BaseException, code: str) -> str:
    """The traceback from the first frame of the user's own, at most 16 KiB."""
    start = error.__traceback__
    while start is not None and not start.tb_frame.f_code.co_filename.startswith(code + "/"):
        start = start.tb_next
    try:
        import traceback  # inside, because the user may have a file of that name

        lines = traceback.format_exception(type(error), error, start)
        text = "".join(lines).encode(errors="replace")
        return text[-TRACEBACK_BYTES_MAX:].decode(errors="ignore")
    except BaseException as broken:  # a hostile __str__ or __cause__
        return f"{type(error).__name__} (its traceback cannot be shown: {type(broken).__name__})"
