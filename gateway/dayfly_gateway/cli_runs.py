"""`dayfly run`: runs of workflows, from a shell."""

import getpass
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from dayfly_gateway import show
from dayfly_gateway.client import Misused, Told, printable
from dayfly_gateway.session import Session, client_command, looks

OVER: Final = ("Succeeded", "Completed", "Failed", "TimedOut", "Cancelled")
WELL: Final = ("Succeeded", "Completed")
INTERRUPTED: Final = 130
WAIT_S: Final = 30
"""For a run's end, with one request."""


@click.group()
def run() -> None:
    """Runs of workflows: start, watch, cancel, retry.

    \b
      dayfly run start pipeline -p url=https://example.com/data.csv
      dayfly run list
      dayfly run show pipeline-3f2a1b
    """


@run.command()
@click.argument("workflow")
@click.option("-p", "--param", "params", metavar="K=V", multiple=True, help="JSON, else text.")
@click.option("--params", "file", metavar="FILE|-", help="All of them, as JSON.")
@click.option("--name", default="", help="Default: made of the workflow's, and new.")
@click.option("--detach", "-d", is_flag=True, help="Do not wait for its end.")
@client_command
def start(
    session: Session,
    workflow: str,
    params: Sequence[str],
    file: str | None,
    name: str,
    detach: bool,
) -> None:
    """Begin a run of WORKFLOW, and wait for its end.

    Ctrl-C ends the waiting, not the run. Exits with 1 if it does not succeed.

    \b
      dayfly run start pipeline
      dayfly run start pipeline -p rows=1000 -p 'kinds=["tree", "linear"]'
      dayfly run start pipeline --params params.json --detach
    """
    given = _params(params, file)
    if any(not isinstance(value, str) for value in given.values()) and params:
        _keep_text(given, params, session.client.workflow(session.namespace, workflow))
    wanted = {"params": given, "name": name, "by": _user()}
    view = session.client.start_run(session.namespace, workflow, wanted)
    _begun(session, view, detach)


def _begun(session: Session, view: Mapping[str, Any], detach: bool) -> None:
    name = view["metadata"]["name"]
    if detach:
        session.show(view, lambda _: click.echo(name))
        return
    try:
        click.echo(f"{name} begins", err=True)
        view = _watched(session, name)
    except KeyboardInterrupt:
        click.echo(f"\nit goes on: dayfly run show {name}", err=True)
        sys.exit(INTERRUPTED)
    session.show(view, _show_end)
    if view["status"]["state"] not in WELL:
        sys.exit(1)


def _watched(session: Session, name: str) -> dict[str, Any]:
    """Until it is over; its steps are drawn on a terminal."""
    told: set[str] = set()
    if session.is_json or not sys.stdout.isatty():
        wait_s = 1
        for _ in looks():
            view = session.client.run_over(session.namespace, name, wait_s)
            if view["status"]["state"] in OVER:
                break
            _tell_waits(view, told)
            wait_s = min(WAIT_S, wait_s * 2)
        return session.client.run(session.namespace, name)
    from dayfly_gateway import run_tree

    last: dict[str, Any] = {}

    def views() -> Iterator[Any]:
        nonlocal last
        for _ in looks():
            last = session.client.run(session.namespace, name)
            _tell_waits(last, told)
            if last["view"]["tree"] is not None:
                yield last["view"]
            if last["status"]["state"] in OVER:
                return

    run_tree.watch(views())
    return last


def _tell_waits(view: Mapping[str, Any], told: set[str]) -> None:
    """Say once of each step that waits for somebody how the run goes on."""
    name = view["metadata"]["name"]
    for each in view.get("expected", []):
        if each["key"] in told:
            continue
        told.add(each["key"])
        if each["kind"] == "approval":
            click.echo(f"{each['key']} waits for approval: {printable(each['what'])}", err=True)
            click.echo(f"  dayfly run approve {name} {each['key']}", err=True)
        else:
            click.echo(f"{each['key']} waits for a callback: dayfly run show {name}", err=True)


def _params(params: Sequence[str], file: str | None) -> dict[str, Any]:
    given: dict[str, Any] = {}
    if file is not None:
        text = sys.stdin.read() if file == "-" else Path(file).read_text("utf-8")
        try:
            given = json.loads(text)
        except ValueError as error:
            raise Misused(f"--params {file}: not valid JSON: {error}") from None
        if not isinstance(given, dict):
            raise Misused(f"--params {file}: a mapping of parameters is needed")
    for text in params:
        key, is_given, value = text.partition("=")
        if not is_given:
            raise Misused(f"-p {text}: give NAME=VALUE")
        try:
            given[key] = json.loads(value)
        except ValueError:
            given[key] = value
    return given


def _keep_text(given: dict[str, Any], params: Sequence[str], workflow: Mapping[str, Any]) -> None:
    """What is declared as text is text: `-p version=1.2` means the letters."""
    texts = {
        each["name"]
        for each in workflow["spec"].get("params", [])
        if each.get("type", "string") == "string"
    }
    for text in params:
        key, _, value = text.partition("=")
        if key in texts and not isinstance(given[key], str):
            given[key] = value


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return ""


def _show_end(view: Mapping[str, Any]) -> None:
    status, name = view["status"], view["metadata"]["name"]
    state = show.state(status["state"])
    click.echo(f"{show.bold(name)} {state} in {show.took(status)}")
    if status["message"]:
        click.echo(f"  {status['kind']}: {printable(status['message'])}")
    for key, value in status["results"].items():
        click.echo(f"  {key}: {printable(json.dumps(value, ensure_ascii=False))}")


@run.command("list")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, metavar="N", help="[50]")
@click.option("--before", metavar="ID", help="Go on after this one.")
@client_command
def list_(session: Session, limit: int, before: str | None) -> None:
    """List runs, the newest first.

    \b
      dayfly run list
      dayfly run list --json | jq '.[].status.state'
    """
    which = {"limit": str(limit)} | ({"before": before} if before else {})
    if session.is_namespace_given:
        which["namespace"] = session.namespace
    found = session.client.runs(**which)
    if not found and not session.is_json:
        click.echo("no runs: `dayfly run start WORKFLOW` begins one", err=True)
        return
    session.show(found, _table)


def _table(views: Sequence[Mapping[str, Any]]) -> None:
    rows = []
    for view in views:
        status, name = view["status"], view["metadata"]["name"]
        steps = f"{status['succeeded']} ok, {status['failed']} failed"
        row = (name, status["workflow"], status["state"], steps, show.took(status), status["kind"])
        rows.append(row)
    show.table(("NAME", "WORKFLOW", "STATE", "ATTEMPTS", "TOOK", "WHY"), rows)


@run.command("show")
@click.argument("name")
@client_command
def show_(session: Session, name: str) -> None:
    """Show a run's steps, what they wait for, and its results.

    \b
      dayfly run show pipeline-3f2a1b
      dayfly run show pipeline-3f2a1b --json | jq .status.results
    """
    session.show(session.client.run(session.namespace, name), _show_run)


def _show_run(view: Mapping[str, Any]) -> None:
    from dayfly_gateway import run_tree

    if view["view"]["tree"] is not None:
        run_tree.print_once(view["view"])
    for key, value in view["status"]["results"].items():
        click.echo(f"{key}: {printable(json.dumps(value, ensure_ascii=False))}")
    for each in view.get("expected", []):
        if each["kind"] == "approval":
            click.echo(f"{each['key']} waits for approval: {printable(each['what'])}")
            click.echo(f"  dayfly run approve {view['metadata']['name']} {each['key']}")
        else:
            click.echo(f"{each['key']} waits for a callback: {each['token']}")


@run.command()
@click.argument("name")
@click.option("--step", default="", metavar="KEY", help="Of this step alone.")
@click.option("--tail", type=click.IntRange(0), default=100, metavar="N", help="Lines [100].")
@client_command
def logs(session: Session, name: str, step: str, tail: int) -> None:
    """Show what a run's steps wrote, each line with its step.

    \b
      dayfly run logs pipeline-3f2a1b
      dayfly run logs pipeline-3f2a1b --step train[2]
    """
    from dayfly_gateway.run_views import step_of

    lines = session.client.run_logs(session.namespace, name, step, tail)
    size = max((len(step_of(line["invocation"])) for line in lines), default=0)
    for line in lines:
        session.show(line, lambda line: show.log_line(line, step_of(line["invocation"]), size))


@run.command()
@click.argument("name")
@client_command
def explain(session: Session, name: str) -> None:
    """Say where each step of a run ran, and why there.

    \b
      dayfly run explain pipeline-3f2a1b
    """
    view = session.client.run(session.namespace, name)
    session.show(view, _show_why)


def _show_why(view: Mapping[str, Any]) -> None:
    from dayfly_gateway.run_views import leaves

    rows = [
        (
            leaf["key"],
            leaf["state"],
            "cache" if leaf.get("wasCached") else leaf.get("start") or "-",
            str(leaf.get("bytesMoved", 0)),
            leaf.get("why", ""),
        )
        for leaf in leaves(view["view"]["tree"])
    ]
    show.table(("STEP", "STATE", "START", "MOVED", "WHY"), rows)


@run.command()
@click.argument("name")
@click.option("-o", "--output", metavar="FILE", help="Default: NAME.html.")
@client_command
def timeline(session: Session, name: str, output: str | None) -> None:
    """Write a run's timeline as one HTML file that needs nothing else.

    \b
      dayfly run timeline pipeline-3f2a1b
      dayfly run timeline pipeline-3f2a1b -o - > run.html
    """
    from dayfly_gateway import timeline as drawing

    text = drawing.page(session.client.run(session.namespace, name)["view"])
    if output == "-":
        click.echo(text, nl=False)
        return
    file = Path(output or f"{name}.html")
    file.write_text(text, "utf-8")
    session.show({"file": str(file)}, lambda _: click.echo(str(file)))


@run.command()
@click.argument("name")
@click.option("--hard", is_flag=True, help="At once: what runs finally does not run.")
@client_command
def cancel(session: Session, name: str, hard: bool) -> None:
    """End a run; what runs finally still does.

    \b
      dayfly run cancel pipeline-3f2a1b
    """
    view = session.client.cancel_run(session.namespace, name, {"hard": hard, "by": _user()})
    session.show(view, lambda _: click.echo(f"{name} is being cancelled"))


@run.command()
@click.argument("name")
@click.option("--detach", "-d", is_flag=True, help="Do not wait for its end.")
@client_command
def retry(session: Session, name: str, detach: bool) -> None:
    """Begin another run with what succeeded in NAME.

    Only what failed, and what never ran, runs; with the code that NAME began with. To try a fix,
    deploy it and start another run.

    \b
      dayfly run retry pipeline-3f2a1b
    """
    _begun(session, session.client.retry_run(session.namespace, name), detach)


def _decided(session: Session, name: str, step: str, note: str, *, approved: bool) -> None:
    decision = {"key": step, "approved": approved, "by": _user(), "note": note}
    session.client.decide(session.namespace, name, decision)
    what = "approved" if approved else "refused"
    session.show(decision, lambda _: click.echo(f"{step} of {name} is {what}"))


@run.command()
@click.argument("name")
@click.argument("step")
@click.option("--note", default="", help="Why.")
@client_command
def approve(session: Session, name: str, step: str, note: str) -> None:
    """Let a run go on that waits for approval.

    \b
      dayfly run approve release-3f2a1b sign-off --note "looks good"
    """
    _decided(session, name, step, note, approved=True)


@run.command()
@click.argument("name")
@click.argument("step")
@click.option("--note", default="", help="Why.")
@client_command
def refuse(session: Session, name: str, step: str, note: str) -> None:
    """Have a step fail that waits for approval.

    \b
      dayfly run refuse release-3f2a1b sign-off --note "not today"
    """
    _decided(session, name, step, note, approved=False)


@run.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@client_command
def delete(session: Session, names: tuple[str, ...], yes: bool) -> None:
    """Forget runs that are over.

    \b
      dayfly run delete pipeline-3f2a1b --yes
    """
    if not yes and sys.stdin.isatty() and not click.confirm(f"delete {', '.join(names)}?"):
        raise Told("not deleted")
    for name in names:
        session.client.delete(session.namespace, "runs", name)
    session.show({"deleted": list(names)}, lambda _: click.echo(f"deleted {', '.join(names)}"))
