"""`dayfly provenance`: what came of what, and whether somebody who is trusted says so."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from dayfly_gateway import show
from dayfly_gateway.client import Misused, Told
from dayfly_gateway.session import PATH, Session, client_command

if TYPE_CHECKING:
    from dayfly_pool.workflow.provenance import Resource, Statement

FILE: Final = click.Path(path_type=Path, exists=True, dir_okay=False)
DIGEST_SHOWN: Final = 16
CELL_MAX: Final = 1000


@click.group()
def provenance() -> None:
    """What a run made, of what, and how: show, verify, key.

    \b
      dayfly provenance show RUN
      dayfly provenance key > key.pem
      dayfly provenance verify RUN --key key.pem --artifact report.html
    """


@provenance.command("show")
@click.argument("run", metavar="RUN|FILE")
@click.option("--envelope", is_flag=True, help="Only the signed envelope, as it is.")
@client_command
def show_(session: Session, run: str, envelope: bool) -> None:
    """Show what a run says of itself: subjects, dependencies, steps. Nothing is verified.

    \b
      dayfly provenance show 01a207568a0279867eed885ad4045c47
      dayfly provenance show 01a207568a0279867eed885ad4045c47 --envelope > provenance.json
      dayfly provenance show provenance.json --json | jq .subject
    """
    from dayfly_pool.workflow import signing

    found = _envelope(session, run)
    if envelope:
        sys.stdout.buffer.write(found)
        return
    statement = signing.unverified(found)
    session.show(_plain(statement), lambda _: _shown(statement))


@provenance.command()
@click.argument("run", metavar="RUN|FILE")
@click.option(
    "--key", "keys", type=FILE, multiple=True, required=True,
    help="Public key (PEM) that is trusted. Repeatable.",
)  # fmt: skip
@click.option("--artifact", type=PATH, help="File or folder that must be one of its subjects.")
@client_command
def verify(session: Session, run: str, keys: tuple[Path, ...], artifact: Path | None) -> None:
    """Check that a trusted key has signed it and, with --artifact, that it is about that.

    Of a FILE everything is checked on this machine, without a server.

    \b
      dayfly provenance verify provenance.json --key key.pem
      dayfly provenance verify provenance.json --key key.pem --artifact report.html
    """
    from dayfly_gateway.digests import digest_of
    from dayfly_pool.workflow import signing
    from dayfly_pool.workflow.provenance import matches

    statement = signing.verify(_envelope(session, run), [_read(key) for key in keys])
    names: list[str] = []
    if artifact is not None:
        digest = digest_of(artifact)
        names = [subject.name for subject in matches(statement, digest)]
        if not names:
            ((algorithm, value),) = digest.items()
            raise Told(
                f"the signature is right, but {artifact} ({algorithm} {value}) is none of its "
                f"{len(statement.subject)} subjects: it is another file, or was changed"
            )
    details = statement.predicate.run_details
    answer = {
        "verified": True,
        "run": details.metadata.invocation_id,
        "builder": details.builder.id,
        "subjects": names or [subject.name for subject in statement.subject],
    }
    session.show(answer, lambda _: _say(answer, artifact))


@provenance.command()
@client_command
def key(session: Session) -> None:
    """Print the public key that the server signs with, as PEM.

    Fetch it once, over a connection that you trust, and keep it.

    \b
      dayfly provenance key > key.pem
    """
    from dayfly_pool.workflow import signing

    pem = session.client.provenance_key()
    answer = {"id": signing.key_id(pem), "pem": pem.decode("ascii", "replace")}
    session.show(answer, lambda _: click.echo(answer["pem"], nl=False))


def _envelope(session: Session, run: str) -> bytes:
    """Of a file, if there is one of this name, else of the server."""
    path = Path(run)
    if "\0" not in run and path.is_file():
        return _read(path)
    if "/" in run or run.endswith(".json"):
        raise Misused(f"there is no file {run}: `dayfly provenance show RUN --envelope` writes one")
    return session.client.provenance(session.namespace, run)


def _read(path: Path) -> bytes:
    """All of it; a file that is too large for what it should be is read no further."""
    from dayfly_pool.workflow.signing import ENVELOPE_BYTES_MAX

    with path.open("rb") as file:
        return file.read(ENVELOPE_BYTES_MAX + 1)


def _plain(statement: "Statement") -> Any:
    import msgspec

    return msgspec.to_builtins(statement)


# ---- for people ---------------------------------------------------------------------------------


def _say(answer: dict[str, Any], artifact: Path | None) -> None:
    number = len(answer["subjects"])
    about = f"{artifact} is {', '.join(answer['subjects'])}" if artifact else f"{number} subjects"
    show.line(f"verified: run {answer['run']}, {about}")


def _shown(statement: "Statement") -> None:
    predicate = statement.predicate
    definition, details = predicate.build_definition, predicate.run_details
    workflow = definition.external_parameters.get("workflow")
    rows: list[tuple[str, Any]] = [
        ("run", details.metadata.invocation_id),
        ("workflow", _name(workflow)),
        ("status", statement.run.get("status", "")),
        ("asked by", definition.internal_parameters.get("requestedBy", "")),
        ("began", details.metadata.started_on),
        ("ended", details.metadata.finished_on),
        ("builder", details.builder.id),
    ]
    for name, value in rows:
        if value:
            show.line(f"{name:10}{value}")
    params = definition.external_parameters.get("params")
    if isinstance(params, dict) and params:
        show.heading("PARAMETERS")
        _table(("NAME", "VALUE"), sorted(params.items()))
    show.heading("SUBJECTS")
    _resources(statement.subject)
    show.heading("DEPENDENCIES")
    _resources(definition.resolved_dependencies)
    _steps(statement.run)


def _resources(resources: "Iterable[Resource]") -> None:
    rows = []
    for each in resources:
        digests = [f"{name}:{value[:DIGEST_SHOWN]}" for name, value in sorted(each.digest.items())]
        rows.append((each.name, " ".join(digests), each.uri))
    _table(("NAME", "DIGEST", "URI"), rows)


def _steps(run: dict[str, Any]) -> None:
    """Whatever is in an annotation may be of any shape."""
    steps = [each for each in _listed(run.get("steps")) if isinstance(each, dict)]
    if not steps:
        return
    show.heading("STEPS")
    rows = []
    for each in steps:
        cached = f"cached, by {each.get('cachedFrom', '')}" if each.get("wasCached") else ""
        how = cached or each.get("start") or ""
        made = ", ".join(map(str, _keys(each.get("outputs"))))
        rows.append((each.get("key", ""), each.get("state", ""), each.get("body", ""), how,
                     ", ".join(map(str, _keys(each.get("inputs")))), made))  # fmt: skip
    _table(("STEP", "STATE", "BODY", "START", "INPUTS", "OUTPUTS"), rows)
    if left_out := run.get("stepsLeftOut"):
        show.line(f"and {left_out} more")


def _table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Strangers' words: none of them makes a line of its own."""
    show.table(headers, [[" ".join(str(cell).split())[:CELL_MAX] for cell in row] for row in rows])


def _name(workflow: Any) -> str:
    if not isinstance(workflow, dict):
        return ""
    return f"{workflow.get('namespace', '')}/{workflow.get('name', '')}"


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _keys(value: Any) -> list[str]:
    return sorted(value) if isinstance(value, dict) else []
