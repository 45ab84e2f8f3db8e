"""The `dayfly` command: what can be typed, and what it does, a few lines each.

Imported for every command and for `--help`, so nothing heavy is imported here: neither the server
nor the pool, and what only some commands need is imported by them.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click

from dayfly_gateway import (
    cli_artifacts,
    cli_environments,
    cli_events,
    cli_jobs,
    cli_provenance,
    cli_runs,
    cli_workflows,
    show,
)
from dayfly_gateway.client import Misused, Problem, Reply, Told, printable
from dayfly_gateway.session import (
    PATH,
    Dayfly,
    Session,
    client_command,
    connection,
    options,
    secret,
    variables,
)

CONTEXT: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
INTERRUPTED: Final = 130
TOP_PERIOD_S: Final = 1.0


def _version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        import dayfly

        click.echo(f"dayfly {dayfly.__version__}")
        ctx.exit()


@click.group(cls=Dayfly, context_settings=CONTEXT)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Say it."
)
@connection
def cli(**_: Any) -> None:
    """Run functions on a pool of pre-warmed, isolated sandboxes.

    \b
      dayfly up                        start a server on this machine
      dayfly deploy examples/hello     pack, upload and declare a function
      curl -i localhost:8080/fn/hello  call it

    \b
    Exit codes:
      0  done
      1  the function or the server said no
      2  the command was not understood, or its input is not valid
      3  the server cannot be reached
    """


# ---- the server ---------------------------------------------------------------------------------


def _data_folder() -> Path:
    home = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(home) / "dayfly"


SERVES: Final = {**CONTEXT, "auto_envvar_prefix": "DAYFLY", "show_default": True}
_ADMIN: Final = options(
    click.option("--admin", metavar="HOST:PORT", default="127.0.0.1:8081", help="Admin plane."),
    click.option(
        "--admin-token-file",
        type=PATH,
        help="File with the token that the admin plane asks for; or set DAYFLY_ADMIN_TOKEN.",
    ),
)
_POOL: Final = options(
    click.option(
        "--data",
        type=PATH,
        default=_data_folder,
        show_default="~/.local/share/dayfly",
        help="Folder for code, environments and declarations.",
    ),
    click.option(
        "--driver",
        type=click.Choice(["linux", "process", "kubernetes"]),
        default="linux",
        help="linux isolates; process does not: for your own code on your own laptop; kubernetes"
        " makes pods.",
    ),
    click.option("--kubernetes", type=PATH, help="File that says how pods are made."),
    click.option("--generic-min", type=int, show_default="4", help="Generic sandboxes kept ready."),
    click.option("--generic-max", type=int, show_default="32", help="...and at most, when busy."),
    click.option("--sandboxes-max", type=int, show_default="512", help="Sandboxes at most."),
    click.option(
        "--resource",
        "resources",
        metavar="NAME=N",
        multiple=True,
        help="What else jobs may ask for, like gpu=2. Repeatable.",
    ),
    click.option(
        "--memory-reserve-mb",
        type=int,
        show_default="512",
        help="Below this much available memory idle sandboxes go.",
    ),
    click.option(
        "--foreign-namespace",
        "foreign_namespaces",
        metavar="NS",
        multiple=True,
        help="Holds anybody's code: nothing of it runs before the lock-down. Repeatable.",
    ),
    click.option(
        "--exec-namespace",
        "exec_namespaces",
        metavar="NS",
        multiple=True,
        help="Its sandboxes are started, never forked. Repeatable.",
    ),
    click.option(
        "--prewarm",
        type=click.Choice(["fork", "exec"]),
        default="fork",
        help="Fork sandboxes from zygotes where that is allowed, or start each.",
    ),
    click.option(
        "--zygote-forks-max", type=int, show_default="5000", help="Then it is replaced..."
    ),
    click.option("--zygote-minutes-max", type=float, show_default="60", help="...and at this age."),
    click.option(
        "--initialize-once-ms",
        type=float,
        show_default="250",
        help="A function whose import takes this long is forked after it.",
    ),
    click.option(
        "--package-host",
        "package_hosts",
        metavar="HOST",
        multiple=True,
        help="Packages come from here by http too, and from a private address. Repeatable.",
    ),
    click.option(
        "--events-dsn-file",
        type=PATH,
        help="File with the address of a PostgreSQL that keeps events, declarations and packages,"
        " for all servers that use it; or set DAYFLY_EVENTS_DSN.",
    ),
    click.option(
        "--secrets",
        type=PATH,
        help="Folder with secrets as NAMESPACE/NAME that somebody else keeps; only read.",
    ),
)
_PROXY: Final = options(
    click.option(
        "--trusted-proxy",
        "trusted_proxies",
        metavar="CIDR",
        multiple=True,
        help="Whose X-Forwarded headers are believed. Repeatable.",
    ),
)
_LOG: Final = options(
    click.option(
        "--log",
        type=click.Choice(["json", "text"]),
        show_default="text on a terminal, else json",
        help="Form of the log on stdout.",
    ),
)
_CLUSTER: Final = options(
    click.option(
        "--tls",
        type=PATH,
        required=True,
        help="Folder with ca.crt, tls.crt and tls.key: see `dayfly certificates`.",
    ),
    click.option(
        "--members",
        type=click.Choice(["static", "kubernetes"]),
        default="static",
        help="Who tells which shards there are: --shard, or Leases in this namespace.",
    ),
    click.option(
        "--shard",
        "shards",
        metavar="NAME=HOST:PORT",
        multiple=True,
        help="A shard, and where its --wire is. Repeatable.",
    ),
)


@cli.command(context_settings=SERVES)
@click.option("--http", metavar="HOST:PORT", default="127.0.0.1:8080", help="Data plane.")
@_ADMIN
@_POOL
@_PROXY
@click.option("--name", default="dayfly", help="By which its pods are found again.")
@click.option("--deploy", type=PATH, help="Deploy every function in this folder when up.")
@_LOG
def up(
    admin_token_file: Path | None,
    events_dsn_file: Path | None,
    deploy: Path | None,
    log: str | None,
    **given: Any,
) -> None:
    """Start the server.

    It serves until SIGTERM or Ctrl-C; no accepted request fails then. Every option can be set
    by a variable: --generic-min by DAYFLY_GENERIC_MIN.

    \b
      dayfly up --deploy examples
      dayfly up --http 0.0.0.0:80 --generic-min 16
      DAYFLY_ADMIN_TOKEN=... dayfly up --admin 0.0.0.0:8081
    """
    from dayfly_gateway import up as server

    if deploy is not None and not deploy.is_dir():
        raise Misused(f"--deploy {deploy}: there is no such folder")
    token = secret(admin_token_file, "DAYFLY_ADMIN_TOKEN")
    events_dsn = secret(events_dsn_file, "DAYFLY_EVENTS_DSN")
    settings = server.Settings(admin_token=token, events_dsn=events_dsn, **given)
    server.serve(settings, log or _log_form(), deploy)


def _log_form() -> str:
    return "text" if sys.stdout.isatty() else "json"


@cli.command(context_settings=SERVES)
@click.option("--name", metavar="SHARD", required=True, help="What gateways know it by.")
@click.option("--wire", metavar="HOST:PORT", default="127.0.0.1:8090", help="For gateways.")
@click.option("--advertise", metavar="HOST:PORT", default="", help="Where they find it [--wire].")
@click.option(
    "--watch-namespaces",
    metavar="NS ...",
    default="",
    help="Whose custom resources are declared here; * is all.",
)
@_CLUSTER
@_ADMIN
@_POOL
@_LOG
def pool(
    name: str,
    wire: str,
    advertise: str,
    tls: Path,
    members: str,
    shards: tuple[str, ...],
    watch_namespaces: str,
    admin_token_file: Path | None,
    events_dsn_file: Path | None,
    log: str | None,
    **given: Any,
) -> None:
    """Start a shard of a pool that several machines have.

    Gateways bring its requests. It serves until SIGTERM; gateways turn to other shards first,
    and no request fails. Several shards need one PostgreSQL: --events-dsn-file.

    \b
      dayfly certificates certs
      dayfly pool --name pool-0 --wire 10.0.0.7:8090 --tls certs/pool
    """
    from dayfly_gateway import up, up_roles

    token = secret(admin_token_file, "DAYFLY_ADMIN_TOKEN")
    events_dsn = secret(events_dsn_file, "DAYFLY_EVENTS_DSN")
    given |= {"name": name, "admin_token": token, "events_dsn": events_dsn}
    whole = up.Settings(http="127.0.0.1:0", trusted_proxies=(), **given)
    settings = up_roles.PoolSettings(
        wire=wire,
        advertise=advertise,
        tls=tls,
        name=name,
        members=members,
        shards=shards,
        watched=tuple(watch_namespaces.split()),
    )
    up_roles.serve_pool(settings, whole, log or _log_form())


@cli.command(context_settings=SERVES)
@click.option("--http", metavar="HOST:PORT", default="127.0.0.1:8080", help="Data plane.")
@_ADMIN
@_CLUSTER
@_PROXY
@click.option(
    "--queue-seconds-max",
    type=float,
    default=30.0,
    help="How long a request waits for a shard and a sandbox.",
)
@_LOG
def gateway(admin_token_file: Path | None, log: str | None, **given: Any) -> None:
    """Start a gateway to a pool that several machines have.

    It keeps nothing: start as many as you need, and a load balancer before them.

    \b
      dayfly gateway --tls certs/gateway --shard pool-0=10.0.0.7:8090
    """
    from dayfly_gateway import up_roles

    token = secret(admin_token_file, "DAYFLY_ADMIN_TOKEN")
    settings = up_roles.GatewaySettings(admin_token=token, **given)
    up_roles.serve_gateway(settings, log or _log_form())


@cli.command()
@click.argument("folder", type=PATH, metavar="DIR")
def certificates(folder: Path) -> None:
    """Make certificates for gateways and shards in DIR.

    An authority, and one certificate for each role, valid for a year. For trying out: who has
    ca.key is trusted by all of them. Again: new ones of the same authority.

    \b
      dayfly certificates certs
    """
    from dayfly_pool import tls

    for made in tls.make(folder):
        click.echo(made)


@cli.command()
@click.option("--data", type=PATH, default=_data_folder, help="The folder that `up` would use.")
@click.option("--json", "is_json", is_flag=True, help="Answer in JSON.")
def doctor(data: Path, is_json: bool) -> None:
    """Say which isolation this machine gives.

    And the exact fix for what is missing. The tiers are full (exit code 0), reduced and none
    (exit code 1).

    \b
      dayfly doctor
      dayfly doctor --json | jq .tier
    """
    from dayfly_gateway import doctor as examination

    report = examination.examine(data.expanduser())
    if is_json:
        click.echo(json.dumps(report.document()))
    else:
        report.show()
    sys.exit(report.exit_code)


# ---- deploying ----------------------------------------------------------------------------------

_DEPLOY_OPTIONS: Final = options(
    click.option("--name", help="Default: made of the folder's or file's name."),
    click.option("--handler", metavar="MODULE:FUNCTION", help="Default: found by reading it."),
    click.option("--environment", metavar="NAME", help="Default: what requirements.txt asks for."),
    click.option(
        "--env", metavar="K=V", multiple=True, help="Variable; K alone: yours. Repeatable."
    ),
    click.option("--env-file", type=PATH, help="Lines of K=V."),
    click.option("--timeout", "timeoutSeconds", type=float, metavar="S", help="Per invocation."),
    click.option("--memory", "memoryMb", type=int, metavar="MB", help="Per sandbox."),
    click.option("--cpu", type=float, metavar="N", help="Cores per sandbox."),
    click.option("--concurrency", type=int, metavar="N", help="Invocations a sandbox (async)."),
    click.option("--min-scale", "minScale", type=int, metavar="N", help="Sandboxes at least."),
    click.option("--max-scale", "maxScale", type=int, metavar="N", help="Sandboxes at most."),
    click.option(
        "--keep-alive", "keepAliveSeconds", type=float, metavar="S", help="Idle, until reaped."
    ),
    click.option(
        "--initialize",
        type=click.Choice(["auto", "once", "each"]),
        help="Import once and fork, or in each sandbox.",
    ),
    click.option("--network", type=click.Choice(["none", "host"]), help="Default: none."),
    click.option("--route", metavar="[HOST]/PATH", multiple=True, help="Way in. Repeatable."),
    click.option(
        "--preload",
        metavar="MODULE",
        multiple=True,
        help="Imported before it is needed. Repeatable.",
    ),
)


@cli.command()
@click.argument("path", type=PATH)
@client_command
@_DEPLOY_OPTIONS
def deploy(
    session: Session, path: Path, name: str | None, preload: Sequence[str], **given: Any
) -> None:
    """Deploy the file or folder PATH.

    It is packed, uploaded and declared as a function. A dayfly.yaml in the folder gives
    defaults; a requirements.txt there gives an environment; .dayflyignore names what to leave
    out, as .gitignore does.

    \b
      dayfly deploy examples/hello
      dayfly deploy thumbs.py --name thumbnail --memory 512 --timeout 60
      dayfly deploy api --env-file .env --route 'api.example.com/v1/{rest+}'
    """
    from dayfly_gateway import deploy as deployment
    from dayfly_gateway.manifests import plan

    if not path.exists():
        raise Misused(f"there is no file or folder {path}: name one that exists")
    spec = _declared(**given)
    planned = plan(path, name=name, namespace=session.namespace, spec=spec, preload=preload)
    with show.progress() as progress:
        view = deployment.deploy(session.client, planned, progress)
    url = deployment.url_of(session.client, view)
    session.show({**view, "url": url}, functools.partial(_show_deployed, url))


def _show_deployed(url: str, view: dict[str, Any]) -> None:
    click.echo(f"{show.bold(view['metadata']['name'])} version {view['status']['version']}")
    click.echo(f"  curl -i {url}")


def _declared(
    env: Sequence[str], env_file: Path | None, route: Sequence[str], **given: Any
) -> dict[str, Any]:
    """The spec's fields that flags give."""
    limits = {key: given.pop(key) for key in ("memoryMb", "cpu")}
    spec = {key: value for key, value in given.items() if value is not None}
    found = variables(env_file.read_text("utf-8").splitlines()) if env_file is not None else {}
    found |= variables(env)
    if found:
        spec["env"] = found
    if any(value is not None for value in limits.values()):
        spec["limits"] = {key: value for key, value in limits.items() if value is not None}
    if route:
        spec["routes"] = [_route(text) for text in route]
    return spec


def _route(text: str) -> dict[str, str]:
    host, slash, path = text.partition("/")
    if not slash:
        raise Misused(f"--route {text}: give [HOST]/PATH, like /users/{{id}} or example.com/")
    return {"host": host, "path": slash + path} if host else {"path": slash + path}


@cli.command()
@click.option("-f", "--file", "files", required=True, multiple=True, help="File, folder, or -.")
@client_command
def apply(session: Session, files: Sequence[str]) -> None:
    """Apply manifests.

    Environments first, then functions, then triggers. Everything is read and checked before the
    first thing is sent. `spec.source` names the code, relative to the manifest.

    \b
      dayfly apply -f functions.yaml
      dayfly apply -f deploy/
      kustomize build . | dayfly apply -f -
    """
    from dayfly_gateway import deploy as deployment

    wanted = [item for file in files for item in _manifests(file, session.namespace)]
    if not wanted:
        raise Misused(f"there is no manifest in {', '.join(files)}")
    wanted.sort(key=deployment.order)
    with show.progress() as progress:
        applied = [deployment.apply(session.client, item, progress) for item in wanted]
    session.show(applied, _show_applied)


def _manifests(file: str, namespace: str) -> list[Any]:
    from dayfly_gateway.manifests import plans

    if file == "-":
        return plans("stdin", sys.stdin.read(), Path(), namespace)
    path = Path(file)
    if not path.is_dir():
        return plans(file, path.read_text("utf-8"), path.parent, namespace)
    found = sorted(item for item in path.iterdir() if item.suffix in (".yaml", ".yml"))
    if not found:
        raise Misused(f"no .yaml file in {path}: name a file or folder of manifests")
    return [item for each in found for item in _manifests(str(each), namespace)]


def _show_applied(views: Sequence[dict[str, Any]]) -> None:
    for view in views:
        metadata, status = view["metadata"], view.get("status", {})
        match view["kind"]:
            case "Function":
                what = f"version {status['version']}"
            case "Environment":
                what = status["digest"][:12]
            case "Queue":
                what = f"weight {view['spec']['weight']:g}"
            case "Workflow":
                what = f"{status['steps']} steps"
            case "Task":
                what = ""
            case "Job":
                what = f"{status['total']} tasks"
            case _:
                what = status.get("next") or show.listens_to(view)
        click.echo(f"{view['kind']} {metadata['namespace']}/{metadata['name']} {what}".rstrip())


# ---- using --------------------------------------------------------------------------------------


@cli.command()
@click.argument("name")
@click.option("-d", "--data", metavar="JSON|@FILE|-", default="{}", help="The event [{}].")
@click.option("--timing", is_flag=True, help="Say on stderr where the time went.")
@click.option("--later", is_flag=True, help="Have it kept and run later; print its id.")
@click.option("--key", metavar="KEY", default="", help="Idempotency key, with --later.")
@client_command
def invoke(session: Session, name: str, data: str, timing: bool, later: bool, key: str) -> None:
    """Run the function NAME once.

    With a JSON event; prints what it returns.

    \b
      dayfly invoke hello -d '{"name": "Ada"}'
      dayfly invoke resize -d @event.json --timing
      echo '[1, 2, 3]' | dayfly invoke total -d -
      dayfly events show $(dayfly invoke hello --later)
    """
    event = _event(data)
    if key and not later:
        raise Misused("--key goes with --later")
    if later:
        id_ = session.client.accept(session.namespace, name, event, key)
        session.show({"id": id_}, lambda _: click.echo(id_))
        return
    started = time.perf_counter()
    try:
        reply = session.client.invoke(session.namespace, name, event)
    except Problem as problem:
        if not problem.is_of_the_function:
            raise
        _show_failure(session, problem)
        sys.exit(1)
    total_ms = (time.perf_counter() - started) * 1000
    took = show.phases(reply.headers.get("Server-Timing", ""))
    if session.is_json:
        click.echo(json.dumps(_invoked(reply, took, total_ms)))
    else:
        _show_result(reply.body)
    if timing:
        show.timing(reply.headers.get("Dayfly-Start", "?"), took, total_ms)


def _event(data: str) -> bytes:
    where = "-d"
    if data == "-":
        content, where = sys.stdin.buffer.read(), "stdin"
    elif data.startswith("@"):
        content, where = Path(data[1:]).read_bytes(), data[1:]
    else:
        content = data.encode()
    try:
        json.loads(content)
    except ValueError as error:
        raise Misused(f"{where} is not JSON: {error}") from None
    return content


def _invoked(reply: Reply, took: dict[str, float], total_ms: float) -> dict[str, Any]:
    try:
        result = json.loads(reply.body or b"null")
    except ValueError:
        result = reply.body.decode(errors="replace")
    return {
        "invocation": reply.headers.get("Dayfly-Invocation"),
        "start": reply.headers.get("Dayfly-Start"),
        "timingMs": {**took, "total": round(total_ms, 3)},
        "result": result,
    }


def _show_result(body: bytes) -> None:
    if sys.stdout.isatty():
        try:
            text = json.dumps(json.loads(body), indent=2, ensure_ascii=False)
            click.echo(printable(text))
            return
        except ValueError:
            body = printable(body.decode(errors="replace")).encode()
    click.echo(body, nl=not body.endswith(b"\n"))


def _show_failure(session: Session, problem: Problem) -> None:
    document = problem.document
    kind, message = str(document.get("title")), str(document.get("detail"))
    traceback = str(document.get("traceback") or "")
    if session.is_json:
        failure = {"kind": kind, "message": message, "traceback": traceback}
        click.echo(json.dumps({"invocation": document.get("invocation"), "failure": failure}))
    head = click.style(kind, fg="red", bold=True)
    click.echo(f"{head}: {printable(message)}", err=True)
    if traceback:
        click.echo(printable(traceback.rstrip()), err=True)


@cli.command()
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Go on with every new line.")
@click.option("--tail", type=click.IntRange(0), default=100, metavar="N", help="Lines [100].")
@client_command
def logs(session: Session, name: str, follow: bool, tail: int) -> None:
    """Show what the function NAME wrote.

    And what the platform says about its failures.

    \b
      dayfly logs hello --tail 20
      dayfly logs hello -f
    """
    if not follow:
        for line in session.client.logs(session.namespace, name, tail):
            session.show(line, show.log_line)
        return
    try:
        for line in session.client.follow(session.namespace, name, tail):
            session.show(line, show.log_line)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    raise Told("the server ended the log: it stopped, or too many follow this function")


@cli.command("list")
@click.argument("what", type=click.Choice(["functions", "environments"]), default="functions")
@client_command
def list_(session: Session, what: str) -> None:
    """List functions or environments.

    Of every namespace, or of one with --namespace.

    \b
      dayfly list
      dayfly list environments --json
    """
    is_functions = what == "functions"
    views = session.client.functions() if is_functions else session.client.environments()
    if session.is_namespace_given:
        views = [view for view in views if view["metadata"]["namespace"] == session.namespace]
    if not views and not session.is_json:
        click.echo(f"no {what}: `dayfly deploy PATH` makes some", err=True)
        return
    session.show(views, show.functions if is_functions else show.environments)


@cli.command()
@click.argument("name")
@click.option("--environment", is_flag=True, help="NAME is an environment.")
@client_command
def describe(session: Session, name: str, environment: bool) -> None:
    """Show all that is known of a function.

    \b
      dayfly describe hello
      dayfly describe --environment thumbnail
    """
    if not environment:
        session.show(session.client.function(session.namespace, name), show.described)
        return
    for view in session.client.environments():
        if view["metadata"] == {"namespace": session.namespace, "name": name}:
            session.show(view, show.described)
            return
    raise Told(f"no environment {name!r}: `dayfly list environments` shows those there are")


@cli.command()
@click.argument("name")
@click.option("--environment", is_flag=True, help="NAME is an environment.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@client_command
def delete(session: Session, name: str, environment: bool, yes: bool) -> None:
    """Delete a function or an environment.

    Asks first on a terminal.

    \b
      dayfly delete hello
      dayfly delete --environment thumbnail --yes
    """
    what = "environment" if environment else "function"
    full_name = f"{session.namespace}/{name}"
    if not yes and sys.stdin.isatty() and not click.confirm(f"delete {what} {full_name}?"):
        raise Told("not deleted")
    session.client.delete(session.namespace, f"{what}s", name)
    session.show({"deleted": full_name, "kind": what}, lambda _: click.echo(f"deleted {full_name}"))


@cli.command()
@client_command
def top(session: Session) -> None:
    """Watch the pool and its sandboxes.

    Printed once where stdout is no terminal.

    \b
      dayfly top
      dayfly top --json | jq .phases
    """
    pool = session.client.pool()
    if session.is_json or not sys.stdout.isatty():
        session.show(pool, show.top_once)
        return
    from rich.console import Console
    from rich.live import Live

    console = Console(no_color=show.is_colourless())
    try:
        with Live(console=console, auto_refresh=False, screen=True) as live:
            while True:
                live.update(show.top_table(pool, console.height - 4), refresh=True)
                time.sleep(TOP_PERIOD_S)
                pool = session.client.pool()
    except KeyboardInterrupt:
        return


cli.add_command(cli_environments.environment)
cli.add_command(cli_events.events)
cli.add_command(cli_events.trigger)
cli.add_command(cli_events.secret)
cli.add_command(cli_jobs.job)
cli.add_command(cli_jobs.queue)
cli.add_command(cli_workflows.workflow)
cli.add_command(cli_runs.run)
cli.add_command(cli_artifacts.artifact)
cli.add_command(cli_provenance.provenance)


def main() -> None:
    """Entry point."""
    cli(prog_name="dayfly")
