"""`dayfly events`, `dayfly trigger` and `dayfly secret`: what runs later, and what makes it."""

import base64
import json
import sys
from collections.abc import Mapping
from typing import Any, Final

import click

from dayfly_gateway import show
from dayfly_gateway.client import Misused, Told
from dayfly_gateway.session import Session, client_command

SECRET_BYTES_MAX: Final = 64 * 1024
SHOWN_CHARACTERS: Final = 4096
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
@click.option("--payload", is_flag=True, help="Only what was sent, byte for byte.")
@client_command
def show_(session: Session, id_: str, payload: bool) -> None:
    """Show an event: its payload, its result, every failure.

    What is long is shown in part; --payload writes it whole, unless the event has succeeded: then
    it is not kept.

    \b
      dayfly events show 01a207568a0279867eed885ad4045c47
      dayfly events show 01a207568a0279867eed885ad4045c47 --payload > event.json
    """
    view = session.client.event(id_)
    if not payload:
        session.show(view, _show_event)
        return
    if "event" not in view:
        raise Told(f"{id_} has {view['state']}: what was sent is not kept")
    sys.stdout.buffer.write(_bytes(view["event"]))


def _show_event(view: Mapping[str, Any]) -> None:
    show.described(_in_part(view))


def _in_part(view: Mapping[str, Any]) -> dict[str, Any]:
    """The same with long bodies cut."""
    shown = dict(view)
    for name in ("event", "result"):
        body = view.get(name, {}).get("body", "")
        if len(body) > SHOWN_CHARACTERS:
            more = f"... ({len(body) - SHOWN_CHARACTERS} more characters)"
            shown[name] = view[name] | {"body": body[:SHOWN_CHARACTERS] + more}
    return shown


def _bytes(body: Mapping[str, Any]) -> bytes:
    text = str(body["body"])
    return base64.b64decode(text) if body["isBase64Encoded"] else text.encode()


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


@click.group()
def trigger() -> None:
    """What makes events: list, show, cron, pause, resume, delete.

    Those that listen to brokers, folders and webhooks are declared in files: dayfly apply -f FILE.

    \b
      dayfly trigger cron nightly --function report --schedule "30 2 * * *"
      dayfly trigger list
    """


@trigger.command("list")
@client_command
def list_triggers(session: Session) -> None:
    """List triggers, with when they fire next and what went wrong.

    \b
      dayfly trigger list
      dayfly trigger list --json
    """
    found = session.client.triggers()
    if session.is_namespace_given:
        found = [view for view in found if view["metadata"]["namespace"] == session.namespace]
    if not found and not session.is_json:
        click.echo("no triggers: `dayfly trigger cron NAME` makes one", err=True)
        return
    session.show(found, show.triggers)


@trigger.command()
@click.argument("name")
@click.option("--function", required=True, metavar="NAME", help="What it runs.")
@click.option("--schedule", required=True, metavar="CRON", help="Five fields; six have seconds.")
@click.option("--time-zone", default="UTC", metavar="ZONE", help="As in Europe/Berlin [UTC].")
@click.option("--overlap", type=click.Choice(["allow", "skip"]), default="allow")
@click.option("--catch-up", type=click.Choice(["none", "last", "all"]), default="last")
@click.option("-d", "--data", metavar="JSON", default="null", help="What its events say.")
@client_command
def cron(
    session: Session,
    name: str,
    function: str,
    schedule: str,
    time_zone: str,
    overlap: str,
    catch_up: str,
    data: str,
) -> None:
    """Run a function by a schedule.

    \b
      dayfly trigger cron nightly --function report --schedule "30 2 * * *"
      dayfly trigger cron tick --function tick --schedule "*/5 * * * *" --overlap skip
    """
    try:
        told = json.loads(data)
    except ValueError as error:
        raise Misused(f"-d is not JSON: {error}") from None
    source = {"schedule": schedule, "timeZone": time_zone, "overlap": overlap, "catchUp": catch_up}
    spec = {"function": function, "cron": source, "data": told}
    view = session.client.put_trigger(session.namespace, name, spec)
    session.show(view, lambda _: click.echo(f"trigger {name} runs {function}"))


@trigger.command("show")
@click.argument("name")
@client_command
def show_trigger(session: Session, name: str) -> None:
    """Show a trigger: what it declares, what it has done, and what went wrong.

    \b
      dayfly trigger show nightly
    """
    session.show(_trigger(session, name), show.described)


@trigger.command()
@click.argument("name")
@client_command
def pause(session: Session, name: str) -> None:
    """Have a trigger make nothing for a while; nothing of it is made up for.

    \b
      dayfly trigger pause nightly
    """
    _set_paused(session, name, paused=True)


@trigger.command()
@click.argument("name")
@client_command
def resume(session: Session, name: str) -> None:
    """Let a paused trigger go on.

    \b
      dayfly trigger resume nightly
    """
    _set_paused(session, name, paused=False)


@trigger.command("delete")
@click.argument("name")
@client_command
def delete_trigger(session: Session, name: str) -> None:
    """Delete a trigger; what it has made already is run.

    \b
      dayfly trigger delete nightly
    """
    session.client.delete(session.namespace, "triggers", name)
    session.show({"deleted": name}, lambda _: click.echo(f"deleted {name}"))


def _trigger(session: Session, name: str) -> dict[str, Any]:
    metadata = {"namespace": session.namespace, "name": name}
    found = [view for view in session.client.triggers() if view["metadata"] == metadata]
    if not found:
        raise Told(f"no trigger {name!r}: `dayfly trigger list` shows those there are")
    return found[0]


def _set_paused(session: Session, name: str, *, paused: bool) -> None:
    spec = _trigger(session, name)["spec"] | {"paused": paused}
    shown = session.client.put_trigger(session.namespace, name, spec)
    said = f"trigger {name} {'is paused' if paused else 'goes on'}"
    session.show(shown, lambda _: click.echo(said))


@click.group()
def secret() -> None:
    """Logins and keys that triggers and destinations name: put, list, delete.

    \b
      dayfly secret put nats-login < login.txt
      dayfly secret list
    """


@secret.command()
@click.argument("name")
@client_command
def put(session: Session, name: str) -> None:
    """Keep a secret, read from standard input; nobody can read it back.

    \b
      dayfly secret put nats-login < login.txt      # user:password
      openssl rand -base64 32 | sed s/^/whsec_/ | dayfly secret put webhook
    """
    if sys.stdin.isatty():
        text = click.prompt("secret", hide_input=True, confirmation_prompt=True).encode()
    else:
        text = sys.stdin.buffer.read(SECRET_BYTES_MAX + 2)
    session.client.put_secret(session.namespace, name, text)
    session.show({"put": name}, lambda _: click.echo(f"secret {name} is kept"))


@secret.command("list")
@client_command
def list_secrets(session: Session) -> None:
    """List the names of secrets.

    \b
      dayfly secret list
    """
    found = session.client.secrets()
    if session.is_namespace_given:
        found = [each for each in found if each["namespace"] == session.namespace]
    if not found and not session.is_json:
        click.echo("no secrets: `dayfly secret put NAME` keeps one", err=True)
        return
    session.show(found, show.secrets)


@secret.command("delete")
@click.argument("name")
@client_command
def delete_secret(session: Session, name: str) -> None:
    """Delete a secret. What names it fails from its next connection on.

    \b
      dayfly secret delete nats-login
    """
    session.client.delete(session.namespace, "secrets", name)
    session.show({"deleted": name}, lambda _: click.echo(f"deleted {name}"))
