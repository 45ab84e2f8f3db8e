"""`dayfly events`: what was accepted to run later, what became of it, and what to do about that."""

from typing import Any, Final

import click

from dayfly_gateway import show
from dayfly_gateway.client import Misused
from dayfly_gateway.session import Session, client_command

STATES: Final = ("waiting", "running", "succeeded", "dead", "cancelled")


@click.group()
def events() -> None:
    """Accepted invocations: list, show, redrive, cancel.

    \b
      dayfly events list --state dead
      dayfly events show ID
      dayfly events redrive hello
    """


@events.command("list")
@click.argument("function", required=False)
@click.option("--state", type=click.Choice(STATES), help="Only these.")
@click.option(
    "--limit", type=click.IntRange(1, 1000), default=50, metavar="N", help="At most [50]."
)
@click.option("--before", metavar="ID", help="Go on after this one.")
@client_command
def list_(
    session: Session, function: str | None, state: str | None, limit: int, before: str | None
) -> None:
    """List accepted invocations, the newest first.

    Of one FUNCTION, or of all.

    \b
      dayfly events list
      dayfly events list hello --state dead --limit 10
      dayfly events list --json | jq .[].id
    """
    which = {"limit": str(limit)}
    if function:
        which["function"] = f"{session.namespace}/{function}"
    if state:
        which["state"] = state
    if before:
        which["before"] = before
    found = session.client.events(**which)
    if not found and not session.is_json:
        click.echo("no events: `dayfly invoke NAME --later` makes one", err=True)
        return
    session.show(found, show.events)


@events.command("show")
@click.argument("id_", metavar="ID")
@client_command
def show_(session: Session, id_: str) -> None:
    """Show an event: its payload, its result, every failure.

    \b
      dayfly events show 01a207568a0279867eed885ad4045c47
    """
    session.show(session.client.event(id_), show.described)


@events.command()
@click.argument("function")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@client_command
def redrive(session: Session, function: str, ids: tuple[str, ...]) -> None:
    """Let dead events of FUNCTION wait again, with all their attempts.

    All of them, or those that are named.

    \b
      dayfly events redrive hello
      dayfly events redrive hello 01a207568a0279867eed885ad4045c47
    """
    number = session.client.redrive(session.namespace, function, ids)
    session.show({"redriven": number}, lambda _: click.echo(f"{number} wait again"))


@events.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@client_command
def cancel(session: Session, ids: tuple[str, ...]) -> None:
    """Cancel events that are not over.

    One that is running goes on, but its result is not taken.

    \b
      dayfly events cancel 01a207568a0279867eed885ad4045c47
    """
    ended: list[dict[str, Any]] = [session.client.cancel(id_) for id_ in ids]
    session.show(ended, _show_cancelled)
    if not all(each["cancelled"] for each in ended):
        raise Misused("what is over cannot be cancelled")


def _show_cancelled(ended: list[dict[str, Any]]) -> None:
    for each in ended:
        what = "cancelled" if each["cancelled"] else f"is {each['state']} already"
        click.echo(f"{each['id']} {what}")
