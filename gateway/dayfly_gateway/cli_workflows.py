"""`dayfly workflow`: what workflows are, before they run."""

from pathlib import Path

import click

from dayfly_gateway.client import Misused


@click.group()
def workflow() -> None:
    """Workflows: see one in Python as YAML, and one in YAML as Python.

    \b
      dayfly workflow compile pipeline.py
    """


@workflow.command("compile")
@click.argument("source", metavar="FILE[:NAME]")
@click.option("--to", type=click.Choice(["yaml", "python"]), help="Default: the other one.")
def compile_(source: str, to: str | None) -> None:
    """Print a workflow's other face.

    Of a Python file, which is imported, its workflows in YAML; of a YAML file Python. With NAME
    only that one, and those that it runs. Nothing is sent to a server.

    \b
      dayfly workflow compile pipeline.py > pipeline.yaml
      dayfly workflow compile pipeline.py:nightly
      dayfly workflow compile pipeline.yaml --to python
    """
    from dayfly_gateway import faces

    path, colon, name = source.rpartition(":")
    if not colon or Path(source).exists():
        path, name = source, ""
    file = Path(path)
    if not file.is_file():
        raise Misused(f"there is no file {file}: name a Python or YAML file")
    if file.suffix == ".py":
        flows = faces.from_python(file, name)
    else:
        flows = faces.from_yaml(file.read_text("utf-8"), str(file))
        if name:
            flows = [flow for flow in flows if flow.metadata.name == name]
        if not flows:
            raise Misused(f"{file} has no workflow {name!r}")
    to = to or ("yaml" if file.suffix == ".py" else "python")
    click.echo(faces.to_yaml(flows) if to == "yaml" else faces.to_python(flows), nl=False)
