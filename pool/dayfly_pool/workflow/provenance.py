"""What a run says of itself when it is over: which artifacts came of what, as it was observed.

An in-toto Statement v1 (https://github.com/in-toto/attestation, spec/v1) with provenance as SLSA v1
has it (https://slsa.dev/spec/v1.0/provenance). Nothing depends on what a result is called: what a
step was given and what it left were hashed by the runtime, which is who says so.

    subject               artifacts that are marked as the build's; if none is, those that no later
                          step took in; if there are none, the run's results as JSON
    resolvedDependencies  the definition, code, environments and their locked requirements; input
                          artifacts that no step had made by then; runs that cached steps are of
    byproducts            the other artifacts; logs; the journal; every step, in `annotations`

Subjects and dependencies are never left out: a statement that has no room for them is refused. The
same observation gives the same bytes. Nothing here performs I/O.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct

from dayfly_pool.commands import StartKind
from dayfly_pool.errors import BadInput
from dayfly_pool.workflow.facts import Artifact

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://slsa.dev/provenance/v1"
BUILD_TYPE: Final = "https://dayfly.dev/workflow/v1"
BUILDER: Final = "https://dayfly.dev/runtime/"
"""The runtime's version is added to it."""

SCHEME: Final = "dayfly://"
TREE_DIGEST: Final = "dayflyTreeV1"
"""Of a folder: lower-case hex of the sha256 of its manifest. A name of its own, because a file that
holds the manifest's bytes has that sha256 too, and is not the folder."""

STATEMENT_BYTES_MAX: Final = 32 << 20
PARAM_BYTES_MAX: Final = 64 << 10
"""A longer parameter is there by its digest."""

STEPS_MAX: Final = 10_000
BYPRODUCTS_MAX: Final = 10_000
"""More steps, or intermediate artifacts, are there by the digest of them all."""

TEXT_CHARACTERS_MAX: Final = 4096
TIME_S_MAX: Final = 253402300799.0  # the end of the year 9999
_DIGEST: Final = re.compile(r"[0-9a-f]{64}\Z")
_OURS: Final = re.compile(rf"{SCHEME}[^/]+/(file|tree)/sha256/(.*)\Z", re.DOTALL)

Body = Literal["handler", "function", "script", "command", "wait"]


# ---- what is observed ---------------------------------------------------------------------------


class StepSeen(Struct, frozen=True, kw_only=True):
    """One step or instance that was not skipped, by its last attempt. Digests are sha256, in hex;
    empty where there is none. Times are Unix seconds by one clock.

    *inputs* are what was mounted or put into it, by its own name for it; *outputs*, what it left.
    *build_outputs* are those marked `is_build`. *asked_at*: when the attempt was commanded, so that
    what it was given is older. *cached_from* is the run that did it, if it *was_cached*.
    """

    key: str
    body: Body
    state: str = "succeeded"
    attempt: int = 1
    package_sha256: str = ""
    environment: str = ""
    environment_sha256: str = ""
    requirements_sha256: str = ""
    script_sha256: str = ""
    inputs: dict[str, Artifact] = {}
    outputs: dict[str, Artifact] = {}
    build_outputs: tuple[str, ...] = ()
    was_cached: bool = False
    cached_from: str = ""
    start: StartKind | None = None
    asked_at: float = 0.0
    began_at: float = 0.0
    ended_at: float = 0.0


class Observed(Struct, frozen=True, kw_only=True):
    """All that is said of a run. *internal* is what the installation decided: pool, host, feature
    flags; JSON values. *logs_sha256* and *history_sha256* are of the bytes as they are served."""

    run: str
    namespace: str
    workflow: str
    definition_sha256: str
    version: str
    began_at: float
    ended_at: float
    status: str
    by: str = ""
    params: dict[str, Any] = {}
    results: dict[str, Any] = {}
    internal: dict[str, Any] = {}
    steps: tuple[StepSeen, ...] = ()
    logs_sha256: str = ""
    history_sha256: str = ""


# ---- what is said -------------------------------------------------------------------------------


class _Said(Struct, frozen=True, kw_only=True, omit_defaults=True, rename="camel"):
    """Fields that this version does not know are passed over, as in-toto asks of readers."""


class Resource(_Said, frozen=True):
    """Anything, by digest (in-toto's ResourceDescriptor)."""

    name: str = ""
    uri: str = ""
    digest: dict[str, str] = {}
    media_type: str = ""
    annotations: dict[str, Any] = {}


class BuildDefinition(_Said, frozen=True):
    """What was to be done, and with what."""

    build_type: str
    external_parameters: dict[str, Any]
    internal_parameters: dict[str, Any] = {}
    resolved_dependencies: tuple[Resource, ...] = ()


class Builder(_Said, frozen=True):
    """Who says so."""

    id: str
    version: dict[str, str] = {}


class BuildMetadata(_Said, frozen=True):
    """Which run, and when."""

    invocation_id: str = ""
    started_on: str = ""
    finished_on: str = ""


class RunDetails(_Said, frozen=True):
    """How it went."""

    builder: Builder
    metadata: BuildMetadata = BuildMetadata()
    byproducts: tuple[Resource, ...] = ()


class Provenance(_Said, frozen=True):
    """SLSA's predicate."""

    build_definition: BuildDefinition
    run_details: RunDetails


class Statement(_Said, frozen=True, rename={"type": "_type", "predicate_type": "predicateType"}):
    """in-toto's statement: this is true of these subjects."""

    type: str
    subject: tuple[Resource, ...]
    predicate_type: str
    predicate: Provenance

    @property
    def run(self) -> dict[str, Any]:
        """`status` and `steps` of the run; empty in what others wrote."""
        for each in self.predicate.run_details.byproducts:
            if each.name == "run":
                return each.annotations
        return {}


def canonical(value: Any) -> bytes:
    """JSON, keys sorted, without spaces, UTF-8: the same value gives the same bytes."""
    try:
        return msgspec.json.encode(value, order="sorted")
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise BadInput(f"what was observed cannot be written down: {error}") from error


def encode(statement: Statement) -> bytes:
    """What is signed. Raises `BadInput` if it is too large."""
    encoded = canonical(statement)
    if len(encoded) > STATEMENT_BYTES_MAX:
        raise BadInput(
            f"the provenance has {len(encoded)} bytes, {STATEMENT_BYTES_MAX} go in one statement: "
            "mark fewer outputs with isBuild, or leave folders instead of files"
        )
    return encoded


def decode(payload: bytes) -> Statement:
    """The statement that was signed. Raises `BadInput` for what is none of these types."""
    if len(payload) > STATEMENT_BYTES_MAX:
        raise BadInput(f"a statement of {len(payload)} bytes: {STATEMENT_BYTES_MAX} are read")
    try:
        found = msgspec.json.decode(payload, type=Statement)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadInput(f"the payload is no statement: {error}") from error
    for given, wanted in ((found.type, STATEMENT_TYPE), (found.predicate_type, PREDICATE_TYPE)):
        if given != wanted:
            raise BadInput(f"the payload is of type {given[:200]!r}: only {wanted} is read here")
    return found


def statement(observed: Observed) -> Statement:
    """What is to be signed of a run that is over. Raises `BadInput` naming what cannot be."""
    _check(observed)
    outside, passed_on = _taken(observed)
    subjects = _subjects(observed, passed_on)
    external = {
        "workflow": {"namespace": observed.namespace, "name": observed.workflow},
        "params": {name: _short(value) for name, value in observed.params.items()},
    }
    internal = observed.internal | ({"requestedBy": observed.by} if observed.by else {})
    metadata = BuildMetadata(
        invocation_id=observed.run,
        started_on=_moment(observed.began_at, "seconds"),
        finished_on=_moment(observed.ended_at, "seconds"),
    )
    return Statement(
        type=STATEMENT_TYPE,
        subject=subjects,
        predicate_type=PREDICATE_TYPE,
        predicate=Provenance(
            build_definition=BuildDefinition(
                build_type=BUILD_TYPE,
                external_parameters=external,
                internal_parameters=internal,
                resolved_dependencies=tuple(_dependencies(observed, outside)),
            ),
            run_details=RunDetails(
                builder=Builder(
                    id=f"{BUILDER}{observed.version}", version={"dayfly": observed.version}
                ),
                metadata=metadata,
                byproducts=tuple(_byproducts(observed, subjects)),
            ),
        ),
    )


def described(name: str, artifact: Artifact) -> Resource:
    """An artifact as in-toto has it: a folder's digest is not said to be a file's."""
    ours = _OURS.match(artifact.uri)
    algorithm = TREE_DIGEST if ours and ours[1] == "tree" else "sha256"
    return Resource(name=name, uri=artifact.uri, digest={algorithm: artifact.sha256})


# ---- which artifact is what ---------------------------------------------------------------------


def _outputs(steps: Iterable[StepSeen]) -> Iterator[tuple[StepSeen, str, Artifact]]:
    for step in steps:
        for name, artifact in step.outputs.items():
            yield step, name, artifact


def _made(steps: Iterable[StepSeen]) -> dict[str, float]:
    """When each artifact was there for others, by its URI."""
    made: dict[str, float] = {}
    for step, _, artifact in _outputs(steps):
        made[artifact.uri] = min(step.ended_at, made.get(artifact.uri, step.ended_at))
    return made


def _taken(observed: Observed) -> tuple[dict[str, Resource], set[str]]:
    """Inputs that came from outside, and the URIs of those that steps made for other steps.

    An artifact may be both: what a step passes on unchanged came from outside first.
    """
    made, passed_on = _made(observed.steps), set()
    outside: dict[str, Resource] = {}
    for step in sorted(observed.steps, key=lambda each: each.key):
        for name, artifact in sorted(step.inputs.items()):
            if made.get(artifact.uri, float("inf")) <= step.asked_at:
                passed_on.add(artifact.uri)
            else:
                outside.setdefault(artifact.uri, described(f"{step.key}/{name}", artifact))
    return outside, passed_on


def _subjects(observed: Observed, passed_on: set[str]) -> tuple[Resource, ...]:
    marked, final, every = [], [], []
    for step, name, artifact in _outputs(observed.steps):
        found = described(f"{step.key}/{name}", artifact)
        every.append(found)
        if name in step.build_outputs:
            marked.append(found)
        if artifact.uri not in passed_on:
            final.append(found)
    if subjects := _distinct(marked or final or every):
        return subjects
    digest = hashlib.sha256(canonical(observed.results)).hexdigest()
    uri = f"{SCHEME}{observed.namespace}/runs/{observed.run}/results"
    kind = "application/json"
    return (Resource(name="results", uri=uri, digest={"sha256": digest}, media_type=kind),)


def _dependencies(observed: Observed, outside: Mapping[str, Resource]) -> Iterator[Resource]:
    space = f"{SCHEME}{observed.namespace}"
    definition = {"sha256": observed.definition_sha256}
    yield Resource(
        name="definition", uri=f"{space}/workflows/{observed.workflow}", digest=definition
    )
    for what, field in (
        ("package", "package_sha256"),
        ("environment", "environment_sha256"),
        ("requirements", "requirements_sha256"),
    ):
        for digest in sorted({getattr(step, field) for step in observed.steps} - {""}):
            uri = f"{space}/{what}/sha256/{digest}"
            yield Resource(name=what, uri=uri, digest={"sha256": digest})
    yield from _distinct(outside.values())
    for run in sorted({step.cached_from for step in observed.steps if step.was_cached} - {""}):
        yield Resource(name="cached", uri=f"{space}/runs/{run}")


def _byproducts(observed: Observed, subjects: tuple[Resource, ...]) -> Iterator[Resource]:
    ends = {subject.uri for subject in subjects}
    between = _distinct(
        described(f"{step.key}/{name}", artifact)
        for step, name, artifact in _outputs(observed.steps)
        if artifact.uri not in ends
    )
    if len(between) <= BYPRODUCTS_MAX:
        yield from between
    else:
        yield _counted("artifacts", between)
    for what, digest in (("logs", observed.logs_sha256), ("history", observed.history_sha256)):
        if digest:
            uri = f"{SCHEME}{observed.namespace}/runs/{observed.run}/{what}"
            yield Resource(name=what, uri=uri, digest={"sha256": digest})
    steps = [_step(step) for step in sorted(observed.steps, key=lambda each: each.key)]
    run: dict[str, Any] = {"status": observed.status, "steps": steps}
    if len(steps) > STEPS_MAX:
        run |= {"steps": steps[:STEPS_MAX], "stepsLeftOut": len(steps) - STEPS_MAX}
    yield _of(
        "run", {"status": observed.status, "steps": steps}, run, observed.namespace, observed.run
    )


def _counted(name: str, resources: tuple[Resource, ...]) -> Resource:
    digest = hashlib.sha256(canonical(resources)).hexdigest()
    return Resource(name=name, digest={"sha256": digest}, annotations={"number": len(resources)})


def _of(name: str, whole: Any, shown: dict[str, Any], namespace: str, run: str) -> Resource:
    digest = hashlib.sha256(canonical(whole)).hexdigest()
    return Resource(
        name=name,
        uri=f"{SCHEME}{namespace}/runs/{run}",
        digest={"sha256": digest},
        media_type="application/json",
        annotations=shown,
    )


def _step(step: StepSeen) -> dict[str, Any]:
    """For people and for questions that the standard has no field for."""
    said: dict[str, Any] = {
        "key": step.key,
        "body": step.body,
        "state": step.state,
        "attempt": step.attempt,
        "package": step.package_sha256,
        "environment": step.environment,
        "environmentSha256": step.environment_sha256,
        "requirements": step.requirements_sha256,
        "script": step.script_sha256,
        "inputs": {name: artifact.uri for name, artifact in step.inputs.items()},
        "outputs": {name: artifact.uri for name, artifact in step.outputs.items()},
        "wasCached": step.was_cached,
        "cachedFrom": step.cached_from,
        "start": step.start,
        "startedOn": _moment(step.began_at) if step.began_at else "",
        "finishedOn": _moment(step.ended_at) if step.ended_at else "",
    }
    return {name: value for name, value in said.items() if value}


def _distinct(resources: Iterable[Resource]) -> tuple[Resource, ...]:
    """One for each URI, by name."""
    found: dict[str, Resource] = {}
    for each in sorted(resources, key=lambda resource: (resource.name, resource.uri)):
        found.setdefault(each.uri, each)
    return tuple(found.values())


def _short(value: Any) -> Any:
    encoded = canonical(value)
    if len(encoded) <= PARAM_BYTES_MAX:
        return value
    return {"sha256": hashlib.sha256(encoded).hexdigest(), "bytes": len(encoded)}


def _moment(at: float, precision: Literal["seconds", "milliseconds"] = "milliseconds") -> str:
    """RFC 3339. Seconds where SLSA's schema has nothing finer."""
    moment = datetime.fromtimestamp(round(at, 3), UTC)
    return moment.isoformat(timespec=precision).replace("+00:00", "Z")


# ---- what cannot be -----------------------------------------------------------------------------


def _check(observed: Observed) -> None:
    for name in ("run", "namespace", "workflow", "version", "status", "by"):
        _check_text(name, getattr(observed, name), may_be_empty=name == "by")
    _check_digest("definition", observed.definition_sha256)
    for name in ("logs", "history"):
        _check_digest(name, getattr(observed, f"{name}_sha256"), may_be_empty=True)
    _check_times("the run", observed.began_at, observed.ended_at)
    keys = {step.key for step in observed.steps}
    if len(keys) != len(observed.steps):
        raise BadInput("two steps of a run have the same key: observe the last attempt of each")
    for step in observed.steps:
        _check_step(step)


def _check_step(step: StepSeen) -> None:
    _check_text("key", step.key)
    where = f"step {step.key!r}"
    for name in ("environment", "cached_from", "state"):
        _check_text(f"{where}: {name}", getattr(step, name), may_be_empty=True)
    for name in ("package", "environment", "requirements", "script"):
        _check_digest(f"{where}: {name}", getattr(step, f"{name}_sha256"), may_be_empty=True)
    _check_times(where, step.asked_at, step.began_at, step.ended_at)
    for artifacts in (step.inputs, step.outputs):
        for name, artifact in artifacts.items():
            _check_artifact(f"{where}: {name}", name, artifact)
    if unknown := set(step.build_outputs) - set(step.outputs):
        raise BadInput(f"{where}: {min(unknown)!r} is marked as a build's output, and is none")


def _check_artifact(where: str, name: str, artifact: Artifact) -> None:
    _check_text(where, name)
    _check_text(where, artifact.uri)
    _check_digest(where, artifact.sha256)
    ours = _OURS.match(artifact.uri)
    if ours and ours[2] != artifact.sha256:
        raise BadInput(f"{where}: {artifact.uri} is not of the digest {artifact.sha256}")


def _check_text(where: str, text: str, *, may_be_empty: bool = False) -> None:
    if not (text or may_be_empty) or len(text) > TEXT_CHARACTERS_MAX:
        raise BadInput(f"{where[:200]} has 1 to {TEXT_CHARACTERS_MAX} characters, not {len(text)}")


def _check_digest(where: str, digest: str, *, may_be_empty: bool = False) -> None:
    if not (_DIGEST.match(digest) or (may_be_empty and not digest)):
        raise BadInput(f"{where[:200]}: {digest[:80]!r} is no sha256 in lower-case hex")


def _check_times(where: str, *times: float) -> None:
    if not all(0 <= at <= TIME_S_MAX for at in times):
        raise BadInput(f"{where[:200]}: its times are not Unix seconds")


def matches(statement: Statement, digest: Mapping[str, str]) -> list[Resource]:
    """The subjects that are what has one of these digests."""
    return [
        subject
        for subject in statement.subject
        if any(subject.digest.get(name) == value for name, value in digest.items())
    ]
