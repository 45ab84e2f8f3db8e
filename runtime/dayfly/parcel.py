"""What is on its way into a pod, a package or an environment: verified by its digest, unpacked."""

from __future__ import annotations

import _socket
import hashlib
import os
import tempfile
import zipfile

from dayfly.protocol import Fetch, FrameReader, Piece, decode, encode

TYPE_CHECKING = False  # see `record`
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO

    from dayfly.protocol import Frame

IN_MEMORY_BYTES_MAX = 1 << 20
RECEIVE_BYTES = 256 * 1024


def bring(connection: int, digest: str, folder: str) -> None:
    """Have the environment called *digest* sent, into *folder*: before `Hello`, once.

    Raises ValueError for another one, OSError when there is no room; ends with the connection.
    """
    end = _socket.socket(fileno=connection)
    try:
        end.sendall(encode(Fetch(digest=digest)))
        with receive(_frames(end), digest, folder) as archive:
            unpack(archive, folder, with_bytecode=True)
    finally:
        end.detach()


def _frames(end: _socket.socket) -> Iterator[Frame]:
    reader = FrameReader()
    while data := end.recv(RECEIVE_BYTES):
        yield from reader.feed(data)
    raise SystemExit(0)  # a pool that comes later is not to find half of it


def receive(frames: Iterator[Frame], digest: str, folder: str) -> IO[bytes]:
    """The zip that comes as `Piece`s; a large one is kept in *folder* meanwhile.

    Raises ValueError unless it is the one called *digest*.
    """
    data: IO[bytes] = tempfile.SpooledTemporaryFile(  # noqa: SIM115  (it is returned)
        IN_MEMORY_BYTES_MAX, dir=folder
    )
    try:
        _take(frames, digest, data)
    except BaseException:
        data.close()
        raise
    return data


def _take(frames: Iterator[Frame], digest: str, data: IO[bytes]) -> None:
    found = hashlib.sha256()
    for body in bodies(frames):
        found.update(body)
        data.write(body)
    if found.hexdigest() != digest:
        raise ValueError(f"{digest[:12]} was damaged on its way")


def bodies(frames: Iterator[Frame]) -> Iterator[bytes]:
    """What comes as `Piece`s, up to the last. Raises ValueError for anything else."""
    while True:
        frame = next(frames)
        piece = decode(frame, is_trusted=True)
        if not isinstance(piece, Piece):
            raise ValueError(f"{type(piece).__name__} instead of a piece")
        yield frame.body
        if piece.is_last:
            return


def unpack(archive: IO[bytes], folder: str, *, with_bytecode: bool = False) -> None:
    """Put the zip's files below *folder*. The pool has checked every name, or made the zip.

    Bytecode only where the pool has compiled it: anybody else's may not be its source's.
    """
    with zipfile.ZipFile(archive) as package:
        for entry in package.infolist():
            path = os.path.join(folder, entry.filename)
            if entry.is_dir():
                os.makedirs(path, exist_ok=True)
                continue
            if path.endswith(".pyc") and not with_bytecode:
                continue
            os.makedirs(os.path.dirname(path), exist_ok=True)
            mode = 0o755 if entry.external_attr >> 16 & 0o111 else 0o644
            made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            with open(made, "wb") as file, package.open(entry) as source:
                while data := source.read(RECEIVE_BYTES):
                    file.write(data)
