"""`dayfly workflow`: what workflows are, before they run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from dayfly_gateway import show
from dayfly_gateway.client import Misused
from dayfly_gateway.session import Session, client_command


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


@workflow.command()
@click.argument("source", metavar="FILE[:NAME]")
@client_command
def deploy(session: Session, source: str) -> None:
    """Declare the workflows of a Python file, with its code.

    If it imports what lies beside it, all of its folder is sent, but for what .dayflyignore names;
    what steps open there is sent with `@workflow(source=".")`. A requirements.txt beside it is
    the environment of workflows that name none. Those in YAML are applied: dayfly apply -f FILE.

    \b
      dayfly workflow deploy pipeline.py
      dayfly workflow deploy flows/pipeline.py:nightly
    """
    from dayfly_gateway.deploy import declare_file

    path, colon, name = source.rpartition(":")
    if not colon or Path(source).exists():
        path, name = source, ""
    file = Path(path)
    if not file.is_file():
        raise Misused(f"there is no file {file}: name a Python file")
    if file.suffix != ".py":
        raise Misused(f"{file} is no Python file: apply YAML with `dayfly apply -f`")
    with show.progress() as progress:
        views = declare_file(session.client, file, session.namespace, progress, name)
    session.show(views, _show_deployed)


def _show_deployed(views: Sequence[Mapping[str, Any]]) -> None:
    for view in views:
        sent = view.get("sent")
        code = f", with the folder {Path(sent).resolve()}" if sent and Path(sent).is_dir() else ""
        click.echo(f"{view['metadata']['name']}: {view['status']['steps']} steps{code}")
    click.echo(f"  dayfly run start {views[-1]['metadata']['name']}")


@workflow.command("list")
@client_command
def list_(session: Session) -> None:
    """List workflows.

    \b
      dayfly workflow list
    """
    found = session.client.workflows()
    if session.is_namespace_given:
        found = [view for view in found if view["metadata"]["namespace"] == session.namespace]
    if not found and not session.is_json:
        click.echo("no workflows: `dayfly workflow deploy FILE` declares some", err=True)
        return
    session.show(found, _table)


def _table(views: Sequence[Mapping[str, Any]]) -> None:
    rows = [
        (
            view["metadata"]["namespace"],
            view["metadata"]["name"],
            str(view["status"]["steps"]),
            ", ".join(view["status"]["params"]),
        )
        for view in views
    ]
    show.table(("NAMESPACE", "NAME", "STEPS", "PARAMETERS"), rows)


@workflow.command()
@click.argument("name")
@client_command
def delete(session: Session, name: str) -> None:
    """Forget a workflow; its runs go on.

    \b
      dayfly workflow delete pipeline
    """
    session.client.delete(session.namespace, "workflows", name)
    session.show({"deleted": name}, lambda _: click.echo(f"deleted {name}"))
