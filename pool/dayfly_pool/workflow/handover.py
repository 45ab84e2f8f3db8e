"""What steps hand over: artifacts, workspaces and large values, from one sandbox to the next.

Before a step its inputs are looked for and its folders made; they are mounted in its sandbox, and
nothing is copied. When the sandbox is dead, what the step left is moved into the stores.
Every method waits for the disk: call it in one of its `threads`.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from dayfly.protocol import BODY_BYTES_MAX
from dayfly_pool.errors import BadInput, BodyTooLarge, TakingEnded
from dayfly_pool.ids import new_id
from dayfly_pool.models import Mounts
from dayfly_pool.workflow import facts, trees, workspaces
from dayfly_pool.workflow.artifacts import Artifact, Artifacts, Output, place_of, uri_of
from dayfly_pool.workflow.facts import LARGE, Invoke
from dayfly_pool.workflow.model import Step, TaskSpec
from dayfly_pool.workflow.steps import StepFolders, Steps
from dayfly_pool.workflow.threads import Threads
from dayfly_pool.workflow.workspaces import Workspace, Workspaces

LAYERS, STEPS, EMPTY = "/layers", "/steps", "/empty"
"""Where a sandbox has them until its mounts are made."""

INPUTS_MAX: Final = 1000
"""As `dayfly.folders` has it."""

Versions = dict[tuple[str, str], Workspace]
"""By workspace and the key of the step that left it."""

Early = dict[str, trees.Early]
"""By output: what was hashed while the step was being ended. It is open: close it."""


class Left(Struct, frozen=True, array_like=True):
    """A version of a workspace, for the journal."""

    workspace: str
    key: str
    version: Workspace


class Taking:
    """How long what one attempt left may be read: see `stop`, and what is left of its timeout."""

    def __init__(self, limit_s: float | None) -> None:
        self._limit_s = limit_s
        self.ran_s = 0.0
        """How long its code ran."""

        self.is_late = False
        """Whether it was out of time."""

        self._read_s = self._since = 0.0
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End it, whatever it is at; from any thread."""
        self._stopped.set()

    @property
    def is_stopped(self) -> bool:
        """Whether somebody wanted it to end."""
        return self._stopped.is_set()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Its time counts in here, and not while it waits for its turn."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._read_s += time.monotonic() - self._since

    def go_on(self) -> None:
        """Raise `TakingEnded` when it is to end."""
        if self.is_stopped:
            raise TakingEnded("it was stopped")
        used_s = self.ran_s + self._read_s + time.monotonic() - self._since
        if self._limit_s is not None and used_s > self._limit_s:
            self.is_late = True
            raise TakingEnded(f"what it left was still being read after {self._limit_s:.3g} s")


class Prepared(Struct, frozen=True):
    """A step that can be run: what is to be mounted, and what its workspaces were before.

    *branches* are, by workspace, what it is to decide between."""

    mounts: Mounts
    folders: StepFolders
    views: dict[str, Workspace]
    branches: dict[str, list[Workspace]]
    streams: dict[str, Output]

    def seen(self) -> Iterator[Workspace]:
        """Whose layers are mounted."""
        yield from self.views.values()
        for there in self.branches.values():
            yield from there


class Given(Struct, frozen=True):
    """What a step has left, which a power loss may take until it is settled."""

    outputs: dict[str, facts.Artifact]
    left: list[Left]

    @property
    def uris(self) -> list[str]:
        """All artifacts that must be kept for it."""
        return [artifact.uri for artifact in self.outputs.values()]


def is_furnished(invoke: Invoke) -> bool:
    """Whether a step takes or leaves anything but values."""
    does: Step | TaskSpec = invoke.task or invoke.step
    return bool(invoke.inputs or does.outputs or invoke.workspaces)


class Handover:
    """The stores of one server, in the folder *data*."""

    def __init__(self, data: Path, owner: int) -> None:
        self.artifacts = Artifacts(data / "artifacts")
        self.threads = Threads()
        self._steps = Steps(data / "steps", owner)
        self._workspaces = Workspaces(data / "workspaces", owner)
        self._owner = owner
        self._prepared: dict[str, Prepared] = {}
        """What steps that run have before them, by their folders."""

    def open(self) -> None:
        """Have the folders; what a crash left half done is removed."""
        self.artifacts.open()
        self._steps.open()
        self._workspaces.open()

    def close(self) -> None:
        """Let go of them, when nobody is at them any more."""
        self.threads.close()
        self._workspaces.close()
        self._steps.close()
        self.artifacts.close()

    # ---- before a step ------------------------------------------------------------------------

    def prepare(
        self, namespace: str, invoke: Invoke, versions: Versions, shared: frozenset[str]
    ) -> Prepared:
        """Have all that a step is to find. *shared* workspaces have branches beside each other.

        Raises `BadInput` for what is no artifact, `ArtifactGone`, `ArtifactDamaged`,
        `WorkspaceConflict`, `DiskFull`.
        """
        inputs = tuple(
            (name, place)
            for name, value in invoke.inputs.items()
            for name, place in self._places(namespace, name, value)
        )
        if len(inputs) > INPUTS_MAX:
            most = INPUTS_MAX
            raise BadInput(f"a step takes {most} inputs at most, not {len(inputs)}:"
                           " leave them as one folder in a step before it")  # fmt: skip
        branches = {
            name: [versions.get((view.workspace, key), Workspace()) for key in view.merge]
            for name, view in invoke.workspaces.items()
        }
        views = {
            name: self._view(invoke, view.merge, branches[name], view.workspace in shared)
            for name, view in invoke.workspaces.items()
        }
        if invoke.step.merge != "reduce":
            branches = {}
        folders = self._steps.make(str(new_id()), views)
        streams: dict[str, Output] = {}
        try:
            seen = self._told(folders, branches)
            self._open_streams(namespace, invoke, folders, streams)
        except BaseException:
            for output in streams.values():
                output.abandon()
            self._steps.remove(folders.id)
            raise
        mounted = tuple(
            (
                name,
                workspaces.overlay(view, folders.id, name, layers=LAYERS, steps=STEPS),
            )
            for name, view in views.items()
        )
        mounts = Mounts(step=folders.id, inputs=inputs, workspaces=mounted, branches=seen)
        prepared = Prepared(mounts, folders, views, branches, streams)
        self._prepared[folders.id] = prepared
        return prepared

    def _open_streams(
        self, namespace: str, invoke: Invoke, folders: StepFolders, streams: dict[str, Output]
    ) -> None:
        for each in (invoke.task or invoke.step).outputs:
            if each.stream:
                path = each.path or each.name
                stream = self.artifacts.stream(namespace, folders.out, path, self._owner)
                streams[each.name] = stream

    def _told(
        self, folders: StepFolders, branches: Mapping[str, Sequence[Workspace]]
    ) -> tuple[tuple[str, str], ...]:
        """What a step sees of the branches that it joins; what they disagree about is in files."""
        seen = []
        for name, there in branches.items():
            conflicts = self._workspaces.conflicts(_common(there), there) if there else ()
            paths = [conflict.path for conflict in conflicts]
            if any("\n" in path for path in paths):
                raise BadInput("parallel branches changed a path that is more than one line:"
                               " rename it, or have `merge: ordered`")  # fmt: skip
            self._steps.tell(folders.id, name, paths)
            for number, branch in enumerate(there):
                self._workspaces.lower(branch)
                options = workspaces.read_only(branch, layers=LAYERS, empty=EMPTY)
                seen.append((f"{name}/{number}", options))
        if len(seen) > workspaces.BRANCHES_MAX:
            most = workspaces.BRANCHES_MAX
            raise BadInput(f"a step decides between {most} branches at most, not {len(seen)}:"
                           " join some of them in steps before it")  # fmt: skip
        return tuple(seen)

    def _places(self, namespace: str, name: str, value: Any) -> list[tuple[str, str]]:
        """(where below /in, where below the store) of what an input stands for."""
        if value is None:
            return []
        if isinstance(value, list | tuple):
            return [
                place
                for n, each in enumerate(value)
                for place in self._places(namespace, f"{name}/{n}", each)
            ]
        artifact = self.found(namespace, name, value)
        return [(name, place_of(artifact))]

    def found(self, namespace: str, name: str, value: Any) -> Artifact:
        """The artifact of the namespace that a *value* refers to, as it was when it was stored."""
        try:
            uri = msgspec.convert(value, facts.Artifact).uri
        except msgspec.ValidationError:
            raise BadInput(f"input {name!r} is no artifact: give another step's output") from None
        if not uri.startswith(f"dayfly://{namespace}/"):
            raise BadInput(f"input {name!r} is no artifact of namespace {namespace!r}: {uri[:200]}")
        artifact = _referred_to(uri)
        self.artifacts.path(artifact)
        return artifact

    def _view(
        self,
        invoke: Invoke,
        merge: Sequence[str],
        there: Sequence[Workspace],
        is_shared: bool,
    ) -> Workspace:
        """What a step finds in a workspace: *there* are the branches that *merge* names."""
        if not there:
            return Workspace()
        view, policy = there[0], invoke.step.merge or "fail"
        if len(there) > 1:
            base = _common(there)
            view = self._workspaces.join(base, there, policy, list(merge), is_synced=False)
        self._workspaces.lower(view)
        return workspaces.fork(view) if is_shared else view

    # ---- after it -----------------------------------------------------------------------------

    def hash_early(self, invoke: Invoke, prepared: Prepared, taking: Taking) -> Early:
        """Begin with what a step has left that has returned, and is being ended."""
        found: Early = {}
        with taking.reading(), trees.opened_folder(None, prepared.folders.out) as out:
            for each in (invoke.task or invoke.step).outputs:
                if each.stream:
                    continue
                early = trees.seal_early(out, each.path or each.name, taking.go_on)
                if early is not None:
                    found[each.name] = early
        return found

    def take(
        self, namespace: str, invoke: Invoke, prepared: Prepared, early: Early, taking: Taking
    ) -> Given:
        """Store what a step that succeeded has left; its sandbox is dead.

        The next step can have it; before a journal tells of it, `settle` it. Raises `BadInput` for
        an output that is not there, `BadTree`, `DiskFull`, `TakingEnded`.
        """
        with taking.reading():
            return self._take(namespace, invoke, prepared, early, taking)

    def _take(
        self, namespace: str, invoke: Invoke, prepared: Prepared, early: Early, taking: Taking
    ) -> Given:
        outputs: dict[str, facts.Artifact] = {}
        for each in (invoke.task or invoke.step).outputs:
            if each.name in prepared.streams:
                artifact = prepared.streams.pop(each.name).finish(is_synced=False)
            else:
                path = each.path or each.name
                artifact = self.artifacts.put(
                    namespace,
                    prepared.folders.out,
                    path,
                    is_synced=False,
                    early=early.get(each.name),
                    go_on=taking.go_on,
                )
            outputs[each.name] = facts.Artifact(artifact.uri, artifact.sha256, artifact.bytes)
        left = []
        for name, view in invoke.workspaces.items():
            upper = prepared.folders.uppers[name]
            version = self._workspaces.take(prepared.views[name], upper, is_synced=False)
            left.append(Left(view.workspace, invoke.key, version))
        return Given(outputs, left)

    def settle(self, given: Given) -> None:
        """After this returns the disk has it. Raises `ArtifactGone`, `DiskFull`."""
        for stored in given.outputs.values():
            self.artifacts.settle(_referred_to(stored.uri))
        for left in given.left:
            self._workspaces.settle(left.version)

    def drop(self, prepared: Prepared) -> None:
        """Forget a step's folders."""
        self._prepared.pop(prepared.folders.id, None)
        for output in prepared.streams.values():
            output.abandon()
        self._steps.remove(prepared.folders.id)

    # ---- garbage ------------------------------------------------------------------------------

    def sweep(self, uris: Container[str], layers: Container[str], before: float) -> int:
        """Remove what is not among these, no step has before it, and nobody used since *before*.

        Returns how many artifacts and layers that were. Raises `DataFolderUnusable`.
        """
        running = list(self._prepared.values())
        places = {place for each in running for _, place in each.mounts.inputs}
        in_use = {layer.id for each in running for view in each.seen() for layer in view.layers}
        in_use_uris = set(map(uri_of, places))
        removed = self.artifacts.sweep(lambda uri: uri in uris or uri in in_use_uris, before)
        return removed + self._workspaces.sweep(lambda id_: id_ in layers or id_ in in_use, before)

    # ---- large values -------------------------------------------------------------------------

    def referred(
        self, namespace: str, results: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """(results of which the large ones are references, the artifacts that these are)."""
        found, uris = dict(results), []
        for name in facts.to_refer(results):
            stored = self.artifacts.put_value(namespace, msgspec.json.encode(results[name]))
            reference = facts.Artifact(stored.uri, stored.sha256, stored.bytes)
            found[name] = reference.as_result()
            uris.append(stored.uri)
        return found, uris

    def whole(self, namespace: str, value: Any) -> Any:
        """*value* with what stands in it for large ones put back, as JSON that is not decoded.

        Raises `BadInput` if they are more than a step can be given, or one is no JSON.
        """
        left = BODY_BYTES_MAX

        def put_back(each: Any) -> Any:
            if isinstance(each, list | tuple):
                return list(map(put_back, each))
            if not isinstance(each, dict):
                return each
            return large(each[LARGE]) if each.keys() == {LARGE} else _mapped(put_back, each)

        def large(reference: Any) -> msgspec.Raw:
            nonlocal left
            artifact = self.found(namespace, LARGE, reference)
            try:
                found = self.artifacts.value(artifact, left)
            except BodyTooLarge:
                raise BadInput(
                    f"what the step is to be given is over {BODY_BYTES_MAX >> 20} MiB: leave it as"
                    " a file, and take that as an input"
                ) from None
            left -= len(found)
            try:
                return msgspec.json.decode(found.decode(), type=msgspec.Raw)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                raise BadInput(f"{artifact.uri} is no value: it is not JSON") from None

        return put_back(value)


def _referred_to(uri: str) -> Artifact:
    place, _, digest = uri.partition("/sha256/")
    return Artifact(uri, digest, "tree" if place.endswith("/tree") else "file", 0, 0)


def _mapped(change: Callable[[Any], Any], mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {key: change(each) for key, each in mapping.items()}


def _common(branches: Sequence[Workspace]) -> Workspace:
    """What they all come from."""
    layers = []
    for each in zip(*(branch.layers for branch in branches), strict=False):
        if any(layer != each[0] for layer in each):
            break
        layers.append(each[0])
    return Workspace(tuple(layers), min(branch.floor for branch in branches))


def owner_of(uid_first: int) -> int:
    """Whose the folders of steps are: as root a user that no sandbox is, else our own."""
    return uid_first - 1 if os.geteuid() == 0 else os.geteuid()
