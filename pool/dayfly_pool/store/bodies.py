"""Bodies too long for a row: files, named by their digest. Who has the same shares one.

Its methods wait for the disk, and raise `OSError`.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from dayfly_pool.store import rows


class Bodies:
    """The files in *folder*: of all that is longer than *row_bytes_max*."""

    def __init__(self, folder: Path, row_bytes_max: int) -> None:
        self._folder, self._row_bytes_max = folder, row_bytes_max

    def open(self) -> None:
        """Have the folder."""
        self._folder.mkdir(mode=0o700, exist_ok=True)

    def apart(self, body: bytes) -> tuple[bytes, str]:
        """(what goes into the row, the digest of the file that holds the rest), on the disk."""
        if len(body) <= self._row_bytes_max:
            return body, ""
        digest = hashlib.sha256(body).hexdigest()
        path = self._folder / digest
        if not path.exists() or path.stat().st_size != len(body):
            unfinished = self._folder / f"{digest}.part"
            with open(unfinished, "wb", opener=_private) as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            unfinished.rename(path)
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        return b"", digest

    def whole(self, body: bytes, digest: str) -> bytes:
        """What was put apart: *body* itself, or the file that *digest* names."""
        return (self._folder / digest).read_bytes() if digest else body

    def checked(self, meta: bytes, body: bytes, digest: str, checksum: int) -> tuple[bytes, str]:
        """(the body, what is wrong with it); it does not raise."""
        try:
            whole = self.whole(body, digest)
        except OSError as error:
            return b"", f"its body is lost: {error}"
        if rows.checksum(meta, whole) != checksum:
            return b"", rows.DAMAGED
        return whole, ""

    def remove(self, digest: str) -> None:
        """Nobody needs it any more."""
        (self._folder / digest).unlink(missing_ok=True)

    def found(self) -> Iterator[str]:
        """The digests of all that are there; what a crash left unfinished is removed."""
        for path in list(self._folder.iterdir()):
            if path.suffix == ".part":
                path.unlink()
            else:
                yield path.name


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)
