"""`dayfly environment`: what the libraries of functions are brought to pods in."""

import json
import re
import sys
from pathlib import Path
from typing import Final, NamedTuple

import click

import dayfly
from dayfly_gateway.client import Misused
from dayfly_gateway.session import PATH

_IMAGE: Final = re.compile(r"[A-Za-z0-9][\w./:@-]{0,511}")
PYTHON: Final = f"{sys.version_info.major}.{sys.version_info.minor}"
RUNTIME: Final = f"dayfly-runtime:{dayfly.__version__}"


class Recipe(NamedTuple):
    """What an environment's image is made of: *locked* on *runtime*, by that *uv*."""

    image: str
    locked: str
    runtime: str
    uv: str
    python: str = PYTHON


def dockerfile(recipe: Recipe, file: str) -> str:
    """The Dockerfile of an environment, which is to be written to *file*. It needs nothing else."""
    return f"""\
# syntax=docker/dockerfile:1
# Made by `dayfly environment build --image`: make it anew when the requirements change.
#   docker build -t {recipe.image} - < {file}
ARG RUNTIME={recipe.runtime}
ARG PYTHON=python:{recipe.python}-slim
ARG UV=ghcr.io/astral-sh/uv:{recipe.uv}

FROM ${{UV}} AS uv

FROM ${{PYTHON}} AS build
COPY --from=uv /uv /usr/local/bin/uv
COPY <<'LOCKED' /requirements.txt
{recipe.locked}LOCKED
RUN uv pip install --require-hashes --only-binary :all: --no-cache --link-mode copy \\
      --python python3 --target /environment -r /requirements.txt \\
 && rm -f /environment/.lock \\
 && find /environment -name __pycache__ -prune -exec rm -rf {{}} + \\
 && python3 -I -S -m compileall -q -j 0 --invalidation-mode unchecked-hash /environment \\
 && chmod -R a+rX /environment

FROM ${{RUNTIME}}
COPY --from=build /environment /environment
"""


@click.group()
def environment() -> None:
    """The libraries of functions: build an image of them.

    \b
      dayfly environment build examples/humanize --image registry.example.com/humanize:1
    """


@environment.command()
@click.argument("path", type=PATH)
@click.option(
    "--image",
    metavar="NAME[=FILE]",
    required=True,
    help="Write a Dockerfile for the image NAME, to FILE or - for stdout. Default: Dockerfile.",
)
@click.option("--runtime", default=RUNTIME, show_default=True, help="Image of sandboxes.")
def build(path: Path, image: str, runtime: str) -> None:
    """Write the Dockerfile of an environment.

    PATH is a requirements.txt or its folder. Everything in it is resolved here and now, for this
    system and Python, as uv is configured: the Dockerfile names each version by its hash.

    \b
      dayfly environment build examples/humanize --image registry.example.com/humanize:1
      dayfly environment build requirements.txt --image humanize:1=- | docker build -t humanize:1 -
    """
    name, _, file = image.partition("=")
    file = file or "Dockerfile"
    for given in (name, runtime):
        if not _IMAGE.fullmatch(given):
            raise Misused(f"{given!r} is no image: give one like registry.example.com/thumbs:1")
    import asyncio
    from importlib import metadata

    listed = path / "requirements.txt" if path.is_dir() else path
    locked = asyncio.run(_locked(listed.read_text("utf-8")))
    if not locked:
        raise Misused(f"{listed} lists nothing: the base environment has the standard library")
    recipe = Recipe(image=name, locked=locked, runtime=runtime, uv=metadata.version("uv"))
    if file == "-":
        click.echo(dockerfile(recipe, "Dockerfile"), nl=False)
        return
    if Path(file).exists() and not Path(file).read_text("utf-8").startswith(_OURS):
        raise Misused(f"{file} is there already: name another with --image {name}=FILE")
    Path(file).write_text(dockerfile(recipe, file), "utf-8")
    click.echo(f"{file}: {locked.count(chr(10))} packages, by hash")
    click.echo(f"  docker build -t {name} - < {file}")
    click.echo(f"  docker push {name}")
    click.echo("then name it, in the chart's values (sandboxes) or the file of --kubernetes:")
    click.echo(f"  environments: {{ENVIRONMENT: {json.dumps(name)}}}")


_OURS: Final = "# syntax=docker/dockerfile:1\n# Made by `dayfly environment build --image`"


async def _locked(requirements: str) -> str:
    """Every version and hash. Raises `BadInput`, `EnvironmentBuildFailed`."""
    import asyncio
    import tempfile

    from dayfly_pool.environments import EnvironmentStore

    with tempfile.TemporaryDirectory(prefix="dayfly-environment-") as folder:
        store = await asyncio.to_thread(EnvironmentStore, Path(folder))
        return await store.resolve(
            requirements, progress=lambda line: click.echo(f"  {line}", err=True)
        )
