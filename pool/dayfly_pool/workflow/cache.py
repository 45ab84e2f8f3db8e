"""Steps that need not run again: what they left, by the digest of all that it depends on.

    ROOT/NAMESPACE/HEX    results and outputs' references, as JSON, of one step

A step's key is the digest of its code, its environment, its parameters and the digests of its
inputs. Entries are files, written whole or not at all; one whose artifacts are gone is no entry.
Every method waits for the disk: call it in a thread.
"""

import contextlib
import hashlib
import os
import time
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from dayfly_pool.workflow import facts
from dayfly_pool.workflow.facts import Invoke
from dayfly_pool.workflow.model import Step, TaskSpec

ENTRY_BYTES_MAX: Final = 2 << 20
KEPT_S: Final = 30 * 86400.0


class Cached(Struct, frozen=True):
    """What a step left when it ran, and in which run that was."""

    results: dict[str, Any]
    outputs: dict[str, facts.Artifact]
    run: str
    at: float

    @property
    def artifacts(self) -> dict[str, facts.Artifact]:
        """All that it refers to: outputs, and results that were too large to be written down."""
        found = dict(self.outputs)
        for name, value in self.results.items():
            if isinstance(value, dict) and value.keys() == {facts.LARGE}:
                reference = msgspec.convert(value[facts.LARGE], facts.Artifact)
                found[f"{name} (a result)"] = reference
        return found


def is_pure(invoke: Invoke) -> bool:
    """Whether a step is declared to leave the same whenever it is given the same."""
    does: Step | TaskSpec = invoke.task or invoke.step
    asked = invoke.step.cache or (invoke.task is not None and invoke.task.cache)
    network = invoke.step.network or (invoke.task.network if invoke.task is not None else "none")
    return asked and network == "none" and not invoke.workspaces and does.function is None


def key_of(identity: str, event: bytes, invoke: Invoke) -> str:
    """What the step's result depends on, as a digest. *identity* is of its code and environment."""
    does: Step | TaskSpec = invoke.task or invoke.step
    declared = [[each.name, each.path] for each in does.outputs]
    results = [[each.name, each.type] for each in does.results]
    inputs = {name: _digests(value) for name, value in invoke.inputs.items()}
    whole = [identity, event, inputs, declared, results]
    return hashlib.sha256(msgspec.json.encode(whole, order="deterministic")).hexdigest()


def _digests(value: Any) -> Any:
    """Of artifacts only what is in them."""
    if isinstance(value, dict) and "sha256" in value:
        return [value.get("uri", ""), value["sha256"]]
    if isinstance(value, list | tuple):
        return [_digests(each) for each in value]
    return value


class StepCache:
    """The entries in *folder*."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def open(self) -> None:
        """Have the folder."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def get(self, namespace: str, key: str) -> Cached | None:
        """What the step left; None when it has not run, or its entry cannot be read."""
        path = self._folder / namespace / key
        try:
            found = _read(path)
            os.utime(path)
        except (OSError, msgspec.DecodeError):
            return None
        return found

    def put(self, namespace: str, key: str, cached: Cached) -> None:
        """Keep it. An entry that is lost is only a step that runs again."""
        content = msgspec.json.encode(cached)
        if len(content) > ENTRY_BYTES_MAX:
            return
        folder = self._folder / namespace
        folder.mkdir(mode=0o700, exist_ok=True)
        unfinished = folder / f".{key}.{os.urandom(4).hex()}"
        unfinished.write_bytes(content)
        unfinished.replace(folder / key)

    def uris(self) -> set[str]:
        """The artifacts that entries refer to."""
        found: set[str] = set()
        for path in self._folder.glob("*/*"):
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                found.update(artifact.uri for artifact in _read(path).artifacts.values())
        return found

    def sweep(self, now: float | None = None) -> int:
        """Forget what was not asked for lately; returns how many."""
        before = (now if now is not None else time.time()) - KEPT_S
        removed = 0
        for path in self._folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < before:
                    path.unlink()
                    removed += 1
        return removed


def _read(path: Path) -> Cached:
    """An entry. Raises `OSError`, and `DecodeError` for what is none."""
    with path.open("rb") as file:
        text = file.read(ENTRY_BYTES_MAX + 1)
    if len(text) > ENTRY_BYTES_MAX:
        raise msgspec.DecodeError(f"over {ENTRY_BYTES_MAX} bytes")
    return msgspec.json.decode(text, type=Cached)
