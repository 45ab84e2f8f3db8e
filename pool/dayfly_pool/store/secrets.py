"""Secrets that triggers and destinations name: files that only the server's user can read.

A folder that somebody else keeps, as one that Kubernetes mounts, is only read.
A secret's text is in no manifest, no answer of the API, no log line and no command line.
"""

import os
import re
import tempfile
from pathlib import Path
from typing import Final

from dayfly_pool.errors import BadInput, DataFolderUnusable, SecretNotFound, SecretsAreMounted

BYTES_MAX: Final = 64 * 1024
NUMBER_MAX: Final = 10_000
_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")


class Secrets:
    """The secrets of all namespaces, in *folder*: `NAMESPACE/NAME`. Waits for the disk, briefly.

    One that is not ours (*is_ours*) is only read, and then `put` and `delete` raise
    `SecretsAreMounted`.
    """

    def __init__(self, folder: Path, *, is_ours: bool = True) -> None:
        self._folder, self._is_ours = folder, is_ours

    def put(self, namespace: str, name: str, text: bytes) -> None:
        """Keep *text*, in the place of what was there. Raises `BadInput`, `DataFolderUnusable`.

        A line break at its end is not part of it.
        """
        path = self._path_to_change(namespace, name)
        text = _without_end(text)
        if not text or len(text) > BYTES_MAX:
            raise BadInput(f"a secret is 1 to {BYTES_MAX} bytes")
        try:
            text.decode()
        except UnicodeDecodeError:
            raise BadInput("a secret is text in UTF-8") from None
        if not path.exists() and len(self.names()) >= NUMBER_MAX:
            raise BadInput(f"there are {NUMBER_MAX} secrets: delete some")
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            _write(path, text)
        except OSError as error:
            raise DataFolderUnusable(f"{path}: {error.strerror}") from error

    def get(self, namespace: str, name: str) -> str:
        """The text. Raises `SecretNotFound`, `DataFolderUnusable`."""
        path = self._path(namespace, name)
        try:
            text = path.read_bytes()  # as text its line breaks would be others
            return (text if self._is_ours else _without_end(text)).decode()
        except FileNotFoundError:
            raise SecretNotFound(f"no secret {namespace}/{name}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataFolderUnusable(f"{path}: {error}") from error

    def delete(self, namespace: str, name: str) -> None:
        """Forget it. Raises `SecretNotFound`."""
        try:
            self._path_to_change(namespace, name).unlink()
        except FileNotFoundError:
            raise SecretNotFound(f"no secret {namespace}/{name}") from None
        except OSError as error:
            raise DataFolderUnusable(f"{self._folder}: {error.strerror}") from error

    def names(self) -> list[tuple[str, str]]:
        """(namespace, name) of each, sorted."""
        paths = self._folder.glob("*/*")
        return sorted((p.parent.name, p.name) for p in paths if _NAME.match(p.name))

    def _path_to_change(self, namespace: str, name: str) -> Path:
        if not self._is_ours:
            raise SecretsAreMounted(f"the secrets in {self._folder} are only read here")
        return self._path(namespace, name)

    def _path(self, namespace: str, name: str) -> Path:
        if not (_NAME.match(namespace) and _NAME.match(name)):
            raise BadInput("names are lower-case letters, digits and dashes, at most 63")
        return self._folder / namespace / name


def _without_end(text: bytes) -> bytes:
    return text.removesuffix(b"\n").removesuffix(b"\r")


def _write(path: Path, text: bytes) -> None:
    """Have *text* there, whole and on the disk, whoever else writes at the same time."""
    descriptor, part = tempfile.mkstemp(prefix=".", dir=path.parent)  # 0600
    try:
        with os.fdopen(descriptor, "wb") as to:
            to.write(text)
            to.flush()
            os.fsync(to.fileno())
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
