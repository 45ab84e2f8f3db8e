"""Secrets in their folder: as they were put, also when two put at once."""

import threading
from pathlib import Path

import pytest

from dayfly_pool.errors import SecretNotFound, SecretsAreMounted
from dayfly_pool.store import secrets as module
from dayfly_pool.store.secrets import Secrets


def test_a_secret_is_read_as_it_was_put_whatever_its_lines_end_with(tmp_path: Path):
    """A key is bytes to whoever signs with it."""
    secrets = Secrets(tmp_path / "secrets")
    secrets.put("default", "key", "BEGIN\r\nzwölf\rEND\r\n".encode())

    assert secrets.get("default", "key") == "BEGIN\r\nzwölf\rEND"


def test_nobody_else_may_look_into_the_folder(tmp_path: Path):
    secrets = Secrets(tmp_path / "secrets")
    secrets.put("default", "key", b"x")

    modes = [path.stat().st_mode & 0o777 for path in sorted((tmp_path / "secrets").rglob("*"))]
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    assert modes == [0o700, 0o600]


def test_of_two_that_are_put_at_once_one_is_there_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Both have been told that it is kept."""
    secrets, both = Secrets(tmp_path / "secrets"), threading.Barrier(2, timeout=10)
    sync = module.os.fsync

    def meet(descriptor: int) -> None:
        sync(descriptor)
        if not both.broken and both.n_waiting < 2:
            both.wait()

    monkeypatch.setattr(module.os, "fsync", meet)
    errors: list[Exception] = []

    def put(text: bytes) -> None:
        try:
            secrets.put("default", "key", text)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=put, args=(text * 1000,)) for text in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    assert secrets.get("default", "key") in ("a" * 1000, "b" * 1000)
    assert [path.name for path in (tmp_path / "secrets" / "default").iterdir()] == ["key"]


def test_one_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    secrets = Secrets(tmp_path / "secrets")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", fail)
    with pytest.raises(module.DataFolderUnusable, match="No space"):
        secrets.put("default", "key", b"x")

    assert list((tmp_path / "secrets" / "default").iterdir()) == []
    with pytest.raises(SecretNotFound):
        secrets.get("default", "key")


def test_those_that_somebody_else_keeps_are_read_and_never_changed(tmp_path: Path):
    """As Kubernetes mounts them: links to a folder that is replaced as a whole."""
    told = tmp_path / "secrets" / "default"
    (told / "..data").mkdir(parents=True)
    (told / "..data" / "key").write_bytes(b"x\n")
    (told / "key").symlink_to("..data/key")
    secrets = Secrets(tmp_path / "secrets", is_ours=False)

    assert secrets.get("default", "key") == "x"
    assert secrets.names() == [("default", "key")]
    with pytest.raises(SecretsAreMounted, match="only read"):
        secrets.put("default", "key", b"y")
    with pytest.raises(SecretsAreMounted, match="only read"):
        secrets.delete("default", "key")
    assert secrets.get("default", "key") == "x"
