"""`dayfly job`: batch jobs, from a shell."""

import functools
import json
import secrets
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from dayfly_gateway import show
from dayfly_gateway.client import Misused, Told, printable
from dayfly_gateway.session import PATH, Session, client_command, looks, options, variables

OVER: Final = ("Complete", "Failed", "Cancelled")
INTERRUPTED: Final = 130
LINE_CHARACTERS: Final = 200
FAILURES_SHOWN: Final = 5
TASK_NUMBER: Final = click.IntRange(0)
WORK: Final = {"function": "--function", "script": "--script", "command": "a command"}


def _seconds(text: str) -> float:
    """A number of seconds, or a duration as workflows have it (`1h30m`)."""
    from dayfly_pool.workflow.model import duration_s

    try:
        return duration_s(float(text) if _is_number(text) else text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@click.group()
def job() -> None:
    """Batch jobs: many tasks of a function, a command or a script.

    \b
      dayfly job run --function resize --items photos.jsonl
      dayfly job run --size 100 --parallelism 8 -- ./simulate.sh
      dayfly job list
    """


_RUN_OPTIONS: Final = options(
    click.option("-f", "--file", "file", type=PATH, help="Manifest with `kind: Job`; - is stdin."),
    click.option("--name", help="Default: made of what it runs, and new."),
    click.option("--function", metavar="NAME", help="What each task is: a deployed function..."),
    click.option("--script", type=PATH, help="...or a script; a command stands after --."),
    click.option("--image", metavar="IMAGE", help="A container's; a command is run in it."),
    click.option("--source", type=PATH, help="Folder or file that the command works with."),
    click.option("--environment", metavar="NAME", help="For a command or script."),
    click.option("--env", metavar="K=V", multiple=True, help="Variable. Repeatable."),
    click.option("--size", type=click.IntRange(1), metavar="N", help="Indices 0 to N - 1..."),
    click.option("--indices", metavar="LIST", help="...or these, like 1,3,6-9..."),
    click.option("--items", metavar="FILE|-", help="...or one for each line of JSON."),
    click.option("--parallelism", type=click.IntRange(1), metavar="N", help="At once, at most."),
    click.option("--memory", type=click.IntRange(16), metavar="MB", help="Of one task [256]."),
    click.option(
        "--timeout", "timeoutSeconds", type=_seconds, metavar="TIME", help="Of one task: 30s, 15m."
    ),
    click.option(
        "--deadline",
        "activeDeadlineSeconds",
        type=_seconds,
        metavar="TIME",
        help="Of the whole job.",
    ),
    click.option(
        "--backoff-limit", "backoffLimit", type=TASK_NUMBER, metavar="N", help="Failures [6]."
    ),
    click.option(
        "--backoff-limit-per-index",
        "backoffLimitPerIndex",
        type=TASK_NUMBER,
        metavar="N",
        help="Retries of each index; then the others go on.",
    ),
    click.option(
        "--max-failed-indexes",
        "maxFailedIndexes",
        type=TASK_NUMBER,
        metavar="N",
        help="With more than these the job is over.",
    ),
    click.option("--priority", type=click.IntRange(-100, 100), metavar="N", help="[0]"),
    click.option("--suspend", is_flag=True, help="Begin nothing until `dayfly job resume`."),
    click.option("--detach", "-d", is_flag=True, help="Do not wait for its end."),
)


@job.command("run")
@_RUN_OPTIONS
@click.argument("command", nargs=-1, metavar="[-- COMMAND...]")
@client_command
def run_(session: Session, file: Path | None, detach: bool, **given: Any) -> None:
    """Run a job, and wait for its end.

    Ctrl-C ends the waiting, not the job. Exits with 1 if the job fails.

    \b
      dayfly job run --function square --size 1000
      dayfly job run --function resize --items photos.jsonl --parallelism 16
      dayfly job run --script train.sh --source model/ --indices 1,3,6-9
      cat lines.jsonl | dayfly job run --function load --items -
      dayfly job run -f job.yaml --detach
    """
    items = given.pop("items")
    name, spec, source = _wanted(file, session.namespace, **given)
    if source is not None:
        from dayfly_pool.packages import pack

        with show.progress() as progress:
            spec["package"] = session.client.put_package(pack(source), progress.uploaded)
    if items is None:
        view = session.client.put_job(session.namespace, name, spec)
    else:
        view = _sent(session, name, spec, items)
    _begun(session, view, is_detached=detach or bool(spec.get("suspend")))


def _begun(session: Session, view: Mapping[str, Any], *, is_detached: bool) -> None:
    name = view["metadata"]["name"]
    if is_detached:
        session.show(view, lambda _: click.echo(name))
        return
    _wait(session, name)


def _wanted(
    file: Path | None, namespace: str, **given: Any
) -> tuple[str, dict[str, Any], Path | None]:
    """(name, spec, what is to be packed) as the manifest and the options have it."""
    spec: dict[str, Any] = {}
    name = given.pop("name")
    source, script = given.pop("source"), given.pop("script")
    if file is not None:
        from dayfly_gateway.manifests import job_in

        name_there, spec, source_there = job_in(file, namespace)
        name, source = name or name_there, source or source_there
    command, env, memory_mb = (given.pop(key) for key in ("command", "env", "memory"))
    unset = (None, False)  # by identity: 0 is a number that was given
    if given["indices"] is not None and not given["indices"].strip():
        why = "what has not succeeded in another job runs again with `dayfly job retry NAME`"
        raise Misused(f"--indices is empty: name some, like 1,3,6-9; {why}")
    spec |= {k: v for k, v in given.items() if not any(v is nothing for nothing in unset)}
    if script is not None:
        spec["script"] = script.read_text("utf-8")
    if command:
        spec["command"] = list(command)
    if env:
        spec["env"] = spec.get("env", {}) | variables(env)
    if memory_mb is not None:
        if spec.get("function"):
            raise Misused("--memory: a function has its own limits: deploy it with others")
        spec["limits"] = spec.get("limits", {}) | {"memoryMb": memory_mb}
    if spec.get("image"):
        return name or _named(spec, script), spec, source
    work = [said for key, said in WORK.items() if spec.get(key) is not None]
    if len(work) > 1:
        raise Misused(f"{' and '.join(work)}: give only one")
    if not work:
        raise Misused(
            "what is it to run? Name --function, --script or --image, or a command after --"
        )
    return name or _named(spec, script), spec, source


def _program(spec: Mapping[str, Any]) -> str:
    return Path(spec["command"][0]).name


def _named(spec: Mapping[str, Any], script: Path | None) -> str:
    """A new name that tells what it runs."""
    from dayfly_gateway.manifests import name_of

    image = str(spec.get("image") or "").rpartition("/")[2].partition(":")[0].partition("@")[0]
    what = spec.get("function") or (script and script.stem) or image or _program(spec)
    return f"{name_of(Path(str(what)))[:50]}-{secrets.token_hex(3)}"


def _sent(session: Session, name: str, spec: Mapping[str, Any], items: str) -> dict[str, Any]:
    """Keep the job with the lines of a file."""

    def lines() -> Iterator[bytes]:
        yield json.dumps(spec).encode() + b"\n"
        if items == "-":
            yield from sys.stdin.buffer
            return
        with Path(items).open("rb") as file:
            while part := file.read(1 << 16):
                yield part

    if items != "-" and not Path(items).is_file():
        raise Misused(f"--items {items}: there is no such file")
    return session.client.put_job_items(session.namespace, name, lines())


def _wait(session: Session, name: str) -> None:
    """Until it is over, with a bar on a terminal."""
    try:
        if not sys.stderr.isatty():  # else the bar has its name
            click.echo(f"{name} begins", err=True)
        view = _watch(session, name)
    except KeyboardInterrupt:
        click.echo(f"\nit goes on: dayfly job show {name}", err=True)
        sys.exit(INTERRUPTED)
    session.show(view, _show_end)
    if view["status"]["state"] != "Complete":
        sys.exit(1)


def _watch(session: Session, name: str) -> dict[str, Any]:
    with show.tasks(name) as moved:
        for _ in looks():
            view = session.client.job(session.namespace, name, is_brief=True)
            moved(view["status"])
            if view["status"]["state"] in OVER:
                break
    return session.client.job(session.namespace, name)


def _show_end(view: Mapping[str, Any]) -> None:
    status, name = view["status"], view["metadata"]["name"]
    state = show.state(status["state"])
    counts = f"{status['succeeded']} of {status['total']} tasks succeeded"
    if status["failed"]:
        counts += f", {status['failed']} failed"
    if status["startedAt"]:
        counts += f" in {show.took(status)}"
    click.echo(f"{show.bold(name)} {state}: {counts}")
    if status["message"]:
        click.echo(f"  {status['reason']}: {printable(status['message'])}")
    told = status.get("failedTasks", [])
    for failed in told[:FAILURES_SHOWN]:
        click.echo(f"  {failed['index']}: {failed['kind']}: {printable(failed['message'])}")
    if len(told) > FAILURES_SHOWN:
        click.echo("  ...")


@job.command("list")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, metavar="N", help="[50]")
@click.option("--before", metavar="ID", help="Go on after this one.")
@client_command
def list_(session: Session, limit: int, before: str | None) -> None:
    """List jobs, the newest first.

    \b
      dayfly job list
      dayfly job list --json | jq '.[].status.state'
    """
    which = {"limit": str(limit)} | ({"before": before} if before else {})
    if session.is_namespace_given:
        which["namespace"] = session.namespace
    found = session.client.jobs(**which)
    if not found and not session.is_json:
        click.echo("no jobs: `dayfly job run` makes one", err=True)
        return
    session.show(found, _table)


def _table(views: Sequence[Mapping[str, Any]]) -> None:
    rows = []
    for view in views:
        status, metadata = view["status"], view["metadata"]
        done = f"{status['succeeded']}/{status['total']}"
        row = (metadata["name"], status["state"], done, str(status["failed"]))
        rows.append((*row, str(status["running"]), show.took(status), status["reason"]))
    show.table(("NAME", "STATE", "DONE", "FAILED", "RUNNING", "TOOK", "REASON"), rows)


@job.command("show")
@click.argument("name")
@client_command
def show_(session: Session, name: str) -> None:
    """Show what a job runs, how far it is, and what failed first.

    \b
      dayfly job show squares
      dayfly job show squares --json | jq -r .status.failedIndexes
    """
    session.show(session.client.job(session.namespace, name), _show_job)


def _show_job(view: Mapping[str, Any]) -> None:
    status = view["status"]
    _show_end(view)
    facts = {
        "runs": _work(view["spec"]),
        "running": str(status["running"] or ""),
        "waits for": status.get("waitsFor", ""),
        "failed indexes": show.cut(status.get("failedIndexes", ""), LINE_CHARACTERS),
    }
    for what, value in facts.items():
        if value:
            click.echo(f"  {what}: {printable(value)}")
    click.echo(f"  all of it: dayfly job show {view['metadata']['name']} --json")


def _work(spec: Mapping[str, Any]) -> str:
    """What each task is, in a line."""
    if spec.get("function"):
        return f"function {spec['function']}"
    if spec.get("command"):
        return show.cut(shlex.join(spec["command"]).replace("\n", " "), LINE_CHARACTERS)
    lines = len(spec["script"].splitlines())
    return f"a script of {lines} lines" if lines != 1 else "a script of a line"


@job.command()
@click.argument("name")
@click.option("--index", type=click.IntRange(0), metavar="N", help="Of this task alone.")
@client_command
def results(session: Session, name: str, index: int | None) -> None:
    """Print what tasks returned, a line of JSON each.

    A task that returned nothing has no line.

    \b
      dayfly job results squares
      dayfly job results squares --index 7 | jq .result
    """
    is_found = False
    for line in session.client.job_results(session.namespace, name, index):
        is_found = True
        click.echo(printable(line) if sys.stdout.isatty() else line)
    if index is not None and not is_found:
        raise Told(f"task {index} has no result: it returned nothing, or is not done")


@job.command()
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Go on with every line until it is over.")
@click.option("--tail", type=click.IntRange(0), default=100, metavar="N", help="Lines [100].")
@click.option("--index", type=click.IntRange(0), metavar="N", help="Of this task alone.")
@client_command
def logs(session: Session, name: str, follow: bool, tail: int, index: int | None) -> None:
    """Show what the tasks wrote, each line with its task's index.

    \b
      dayfly job logs squares
      dayfly job logs squares --index 7
      dayfly job logs squares -f
    """
    which = {"kind": "jobs"} | ({} if index is None else {"index": str(index)})
    find = session.client.follow if follow else session.client.logs
    try:
        for line in find(session.namespace, name, tail, **which):
            session.show(line, lambda line: show.log_line(line, _index(line)))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _index(line: Mapping[str, Any]) -> str:
    """Of the task that wrote it: an invocation is called ID-INDEX-RETRY."""
    return "".join(str(line["invocation"]).split("-")[-2:-1])


def _changed(session: Session, name: str, what: str, change: Mapping[str, Any]) -> None:
    view = session.client.change_job(session.namespace, name, change)
    session.show(view, lambda _: click.echo(f"{name} {what}"))


@job.command()
@click.argument("name")
@click.option("--soft", is_flag=True, help="Let the tasks end that run.")
@client_command
def cancel(session: Session, name: str, soft: bool) -> None:
    """End a job; what runs is stopped.

    \b
      dayfly job cancel squares
    """
    _changed(session, name, "is cancelled", {"cancel": "soft" if soft else "hard"})


@job.command()
@click.argument("name")
@client_command
def suspend(session: Session, name: str) -> None:
    """Stop what runs and begin nothing, until it is resumed.

    Tasks that were stopped run again then, and are not counted as failed.

    \b
      dayfly job suspend squares
    """
    _changed(session, name, "is suspended", {"suspend": True})


@job.command()
@click.argument("name")
@client_command
def resume(session: Session, name: str) -> None:
    """Go on with a suspended job.

    \b
      dayfly job resume squares
    """
    _changed(session, name, "goes on", {"suspend": False})


@job.command()
@click.argument("name")
@click.argument("parallelism", type=click.IntRange(1, 100_000))
@client_command
def scale(session: Session, name: str, parallelism: int) -> None:
    """Have so many tasks of a job run at once.

    \b
      dayfly job scale squares 16
    """
    _changed(session, name, f"runs {parallelism} at once", {"parallelism": parallelism})


@job.command()
@click.argument("name")
@click.option("--name", "new_name", default="", help="Default: made of NAME, and new.")
@click.option("--detach", "-d", is_flag=True, help="Do not wait for its end.")
@client_command
def retry(session: Session, name: str, new_name: str, detach: bool) -> None:
    """Begin another job with all of NAME that has not succeeded.

    It has the same indices, items and settings; a function is what it is now.

    \b
      dayfly job retry squares
      dayfly job retry squares --name the-rest --detach
    """
    view = session.client.retry_job(session.namespace, name, new_name)
    _begun(session, view, is_detached=detach)


@job.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@client_command
def delete(session: Session, names: tuple[str, ...], yes: bool) -> None:
    """Forget jobs with all their results; one that runs is cancelled.

    \b
      dayfly job delete squares --yes
    """
    if not yes and sys.stdin.isatty() and not click.confirm(f"delete {', '.join(names)}?"):
        raise Told("not deleted")
    for name in names:
        session.client.delete(session.namespace, "jobs", name)
    shown = functools.partial(click.echo, f"deleted {', '.join(names)}")
    session.show({"deleted": list(names)}, lambda _: shown())


@click.group()
def queue() -> None:
    """What jobs share the machine: list, delete. Declared in files: dayfly apply -f FILE.

    \b
      dayfly queue list
    """


@queue.command("list")
@client_command
def list_queues(session: Session) -> None:
    """List queues: those that are declared, and those in which there are jobs.

    \b
      dayfly queue list
      dayfly queue list --json | jq '.[].status.share'
    """
    found = session.client.queues()
    if session.is_namespace_given:
        found = [view for view in found if view["metadata"]["namespace"] == session.namespace]
    if not found and not session.is_json:
        click.echo("no queues: there are no jobs, and nothing is declared", err=True)
        return
    session.show(found, _queues_table)


def _queues_table(views: Sequence[Mapping[str, Any]]) -> None:
    rows = []
    for view in views:
        metadata, spec, status = view["metadata"], view["spec"], view["status"]
        held = status.get("held", {})
        rows.append(
            (
                f"{metadata['namespace']}/{metadata['name']}",
                spec["cohort"],
                f"{spec['weight']:g}",
                str(status.get("running", 0)),
                str(status.get("waiting", 0)),
                str(held.get("tasks", 0)),
                f"{status.get('share', 0):.3f}",
            )
        )
    show.table(("QUEUE", "COHORT", "WEIGHT", "JOBS", "WAITING", "TASKS", "SHARE"), rows)


@queue.command("delete")
@click.argument("name")
@client_command
def delete_queue(session: Session, name: str) -> None:
    """Forget what is declared of a queue; its jobs go on.

    \b
      dayfly queue delete default
    """
    session.client.delete(session.namespace, "queues", name)
    shown = functools.partial(click.echo, f"deleted {name}")
    session.show({"deleted": name}, lambda _: shown())
