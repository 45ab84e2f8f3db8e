"""What all client commands share: where the server is, as whom, in which form to answer."""

import errno
import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import click

from dayfly_gateway import show
from dayfly_gateway.client import Client, Misused, Told, sentence
from dayfly_pool.errors import BadInput, PlatformError

DEFAULT_URL: Final = "http://127.0.0.1:8081"
PATH: Final = click.Path(path_type=Path)
LOOK_FIRST_S: Final = 0.02
LOOK_S: Final = 0.25
Command = Callable[..., None]


class Session(NamedTuple):
    """What every client command is given."""

    client: Client
    namespace: str
    is_namespace_given: bool
    is_json: bool

    def show(self, value: Any, shown: Callable[[Any], None]) -> None:
        """*value* as JSON for scripts, or as *shown* prints it for people."""
        if self.is_json:
            click.echo(json.dumps(value))
        else:
            shown(value)


class Dayfly(click.Group):
    """Ends every command with one line, never with a traceback of what is not a defect."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they are met, not of the alphabet."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run it; our own errors become lines."""
        if show.is_colourless():
            ctx.color = False
        try:
            return super().invoke(ctx)
        except BadInput as error:
            raise Misused(error.detail or sentence(error)) from None
        except PlatformError as error:
            raise Told(sentence(error)) from None
        except UnicodeDecodeError as error:
            raise Misused(f"a file is not UTF-8 text: {error}") from None
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # whoever read our output has gone: click ends quietly
            raise Misused(f"{error.filename or 'cannot go on'}: {error.strerror}") from None


def options(*given: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several of click's decorators as one; help shows them in this order."""
    return lambda command: functools.reduce(lambda c, option: option(c), given[::-1], command)


connection: Final = options(
    click.option("--url", metavar="URL", help=f"Admin API [DAYFLY_URL; {DEFAULT_URL}]."),
    click.option("--token-file", type=PATH, help="File with its token [DAYFLY_TOKEN]."),
    click.option("-n", "--namespace", metavar="NS", help="[DAYFLY_NAMESPACE; default]."),
)
"""On the group and on each command; the command's wins, then the group's, then the variable."""


def client_command(function: Command) -> Command:
    """Give *function* a `Session` made of the connection's options and --json."""

    @connection
    @click.option("--json", "is_json", is_flag=True, help="Answer in JSON.")
    @functools.wraps(function)
    def run(
        url: str | None,
        token_file: Path | None,
        namespace: str | None,
        is_json: bool,
        **given: Any,
    ) -> None:
        above = click.get_current_context().find_root().params
        url = url or above.get("url") or os.environ.get("DAYFLY_URL") or DEFAULT_URL
        token = secret(token_file or above.get("token_file"), "DAYFLY_TOKEN")
        named = namespace or above.get("namespace") or os.environ.get("DAYFLY_NAMESPACE")
        function(Session(Client(url, token), named or "default", bool(named), is_json), **given)

    return run


def secret(file: Path | None, variable: str) -> str:
    """What *file* holds, else what the environment does; never from the command line."""
    if file is None:
        return os.environ.get(variable, "")
    found = file.read_text("utf-8").strip()
    if not found:
        raise Misused(f"{file} is empty: write the token into it, or set {variable}")
    return found


def variables(lines: Iterable[str]) -> dict[str, str]:
    """`K=V` lines; `K` alone takes the value that it has here; comments are left out."""
    found = {}
    for line in (line.strip().removeprefix("export ") for line in lines):
        if not line or line.startswith("#"):
            continue
        name, has_value, value = line.partition("=")
        if not has_value:
            if name not in os.environ:
                raise Misused(f"--env {name}: it is not set here either: give {name}=VALUE")
            value = os.environ[name]
        elif len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        found[name.strip()] = value
    return found


def looks() -> Iterator[None]:
    """Look again each time: soon at first, then four times a second."""
    pause_s = LOOK_FIRST_S
    while True:
        yield
        time.sleep(pause_s)
        pause_s = min(LOOK_S, pause_s * 2)
