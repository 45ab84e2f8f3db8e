"""`dayfly artifact`: files and folders that runs have left."""

import hashlib
import os
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any, Final

import click

from dayfly_gateway.client import Misused, Told
from dayfly_gateway.session import PATH, Session, client_command

_URI: Final = re.compile(r"dayfly://([a-z0-9-]+)/(file|tree)/sha256/([0-9a-f]{64})\Z")


@click.group()
def artifact() -> None:
    """Files and folders that steps have left: get them.

    \b
      dayfly run show houses-3f2a1b --json | jq -r .status.results.report.uri
      dayfly artifact get dayfly://default/file/sha256/4ba0...
    """


@artifact.command()
@click.argument("uri")
@click.option("-o", "--output", type=PATH, help="File or folder; - for stdout. Default: by digest.")
@client_command
def get(session: Session, uri: str, output: Path | None) -> None:
    """Write an artifact to a new file or folder.

    What came is checked against its digest.

    \b
      dayfly artifact get dayfly://default/file/sha256/4ba0... -o report.md
      dayfly artifact get dayfly://default/file/sha256/4ba0... -o -
    """
    found = _URI.match(uri)
    if found is None:
        raise Misused(f"{uri!r} is no artifact: give dayfly://NAMESPACE/file/sha256/HEX")
    namespace, kind, digest = found.groups()
    target = output or Path(digest[:12])
    if str(target) == "-":
        if kind == "tree":
            raise Misused("a folder cannot be written to stdout: name one with -o")
        sys.stdout.buffer.write(_checked(session, namespace, kind, digest, "", digest))
        return
    if target.exists():
        raise Misused(f"{target} is there already: name another with -o")
    if kind == "file":
        target.write_bytes(_checked(session, namespace, kind, digest, "", digest))
    else:
        _write_folder(session, namespace, digest, target)
    session.show({"path": str(target)}, lambda _: click.echo(str(target)))


def _write_folder(session: Session, namespace: str, digest: str, target: Path) -> None:
    """Folders, then files; links last, so that none of them is written through."""
    entries = session.client.artifact_entries(namespace, digest)
    target.mkdir()
    for entry in entries:
        path = target / _inside(entry["path"])
        if entry["kind"] == "folder":
            path.mkdir(exist_ok=True)
        elif entry["kind"] == "file":
            path.parent.mkdir(parents=True, exist_ok=True)
            data = _checked(session, namespace, "tree", digest, entry["path"], entry["sha256"])
            path.write_bytes(data)
            if entry.get("isExecutable"):
                path.chmod(0o755)
    for entry in entries:
        if entry["kind"] == "link":
            os.symlink(entry["target"], target / _inside(entry["path"]))


def _inside(path: str) -> str:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts:
        raise Told(f"the server says that {path!r} is in it: nothing of that is written")
    return path


def _checked(
    session: Session, namespace: str, kind: str, digest: str, path: str, sha256: Any
) -> bytes:
    data = session.client.artifact(namespace, kind, digest, path)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Told(f"what came of {path or digest[:12]} is not what its digest says")
    return data
