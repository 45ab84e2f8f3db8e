"""The digest of a file or folder on this machine, as a statement of provenance has it.

A folder's is of its manifest: see docs/provenance.md, which has it in shell too.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dayfly_gateway.client import Misused

FILE: Final = "sha256"
FOLDER: Final = "dayflyTreeV1"
ENTRIES_MAX: Final = 250_000
DEPTH_MAX: Final = 128


def digest_of(path: Path) -> dict[str, str]:
    """By the algorithm that is right for what is there. Raises `Misused`, `OSError`."""
    if path.is_dir():
        return {FOLDER: hashlib.sha256(manifest(path)).hexdigest()}
    if not stat.S_ISREG(path.stat().st_mode):
        raise Misused(f"{path} is neither a file nor a folder")
    return {FILE: _hashed(os.fsencode(path))}


def manifest(folder: Path) -> bytes:
    """Everything below *folder*, links not followed, sorted by the bytes of its path."""
    root = os.fsencode(folder)
    entries = []
    for path in _below(root, b"", 0):
        entries.append(path)
        if len(entries) > ENTRIES_MAX:
            raise Misused(f"{folder} holds more than {ENTRIES_MAX} entries: no artifact does")
    return b"".join(_described(root, path) for path in sorted(entries))


def _below(root: bytes, path: bytes, depth: int) -> Iterator[bytes]:
    if depth > DEPTH_MAX:
        raise Misused(f"{os.fsdecode(root)} is deeper than {DEPTH_MAX} folders: no artifact is")
    with os.scandir(os.path.join(root, path)) as found:
        for entry in found:
            inner = os.path.join(path, entry.name)
            yield inner
            if entry.is_dir(follow_symlinks=False):
                yield from _below(root, inner, depth + 1)


def _described(root: bytes, path: bytes) -> bytes:
    whole = os.path.join(root, path)
    status = os.lstat(whole)
    if stat.S_ISDIR(status.st_mode):
        return b"d %b\0" % path
    if stat.S_ISLNK(status.st_mode):
        return b"l %b\0%b\0" % (path, os.readlink(whole))
    if not stat.S_ISREG(status.st_mode):
        raise Misused(f"{os.fsdecode(whole)} is neither a file nor a folder: no artifact holds it")
    kind = b"x" if status.st_mode & 0o111 else b"f"
    return b"%b %d %b %b\0" % (kind, status.st_size, _hashed(whole).encode(), path)


def _hashed(path: bytes) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
