"""What was observed of a run while it went on, made into what its provenance says. Pure."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from msgspec import Struct

import dayfly
from dayfly_pool.workflow.facts import Artifact, Ended, Invoke
from dayfly_pool.workflow.model import Step, TaskSpec
from dayfly_pool.workflow.provenance import Body, Observed, StepSeen
from dayfly_pool.workflow.tree import Shown


class Seen(Struct, frozen=True, array_like=True):
    """What an attempt of a step was made of, as it was begun. Digests are sha256, in hex."""

    key: str
    attempt: int
    body: Body
    package_sha256: str = ""
    environment: str = ""
    environment_sha256: str = ""
    script_sha256: str = ""
    inputs: dict[str, Artifact] = {}
    build_outputs: tuple[str, ...] = ()
    cached_from: str = ""


def seen_of(
    invoke: Invoke, package: str, environment: str, digest: str, script: str, cached_from: str = ""
) -> Seen:
    """What *invoke* is made of; *script* is what it runs, with its values."""
    does: Step | TaskSpec = invoke.task or invoke.step
    body: Body = "handler"
    if does.script is not None:
        body = "script"
    elif does.command is not None:
        body = "command"
    elif does.function is not None:
        body = "function"
    return Seen(
        key=invoke.key,
        attempt=invoke.attempt,
        body=body,
        package_sha256=package,
        environment=environment,
        environment_sha256=digest if len(digest) == 64 else "",
        script_sha256=hashlib.sha256(script.encode()).hexdigest() if script else "",
        inputs=dict(_artifacts(invoke.inputs)),
        build_outputs=tuple(each.name for each in does.outputs if each.is_build),
        cached_from=cached_from,
    )


def observed(
    about: Mapping[str, str],
    definition: bytes,
    tree: Shown,
    ends: Iterable[Ended],
    seen: Iterable[Seen],
    *,
    params: dict[str, Any],
    results: dict[str, Any],
    status: str,
    by: str,
    began_at: float,
    ended_at: float,
    internal: dict[str, Any],
    history_sha256: str,
) -> Observed:
    """All that is said of a run. *about* has its id, name, namespace and workflow."""
    outputs = {end.key: end.outputs for end in ends}
    made = {each.key: each for each in seen}
    return Observed(
        run=f"{about['namespace']}/{about['name']}",
        namespace=about["namespace"],
        workflow=about["workflow"],
        definition_sha256=hashlib.sha256(definition).hexdigest(),
        version=dayfly.__version__,
        began_at=began_at,
        ended_at=ended_at,
        status=status,
        by=by,
        params=params,
        results=results,
        internal=internal,
        steps=tuple(_steps(tree, made, outputs)),
        history_sha256=history_sha256,
    )


def _steps(
    shown: Shown, made: Mapping[str, Seen], outputs: Mapping[str, dict[str, Artifact]]
) -> Iterator[StepSeen]:
    if shown.children:
        for child in shown.children:
            yield from _steps(child, made, outputs)
        return
    seen = made.get(shown.key)
    if seen is None:
        return
    yield StepSeen(
        key=shown.key,
        body=seen.body,
        state=shown.state,
        attempt=shown.attempt,
        package_sha256=seen.package_sha256,
        environment=seen.environment,
        environment_sha256=seen.environment_sha256,
        script_sha256=seen.script_sha256,
        inputs=seen.inputs,
        outputs=outputs.get(shown.key, {}),
        build_outputs=tuple(
            name for name in seen.build_outputs if name in outputs.get(shown.key, {})
        ),
        was_cached=shown.was_cached,
        cached_from=seen.cached_from,
        start=shown.start,  # type: ignore[arg-type]
        asked_at=shown.asked_at,
        began_at=shown.began_at,
        ended_at=shown.ended_at,
    )


def _artifacts(inputs: Mapping[str, Any]) -> Iterator[tuple[str, Artifact]]:
    for name, value in inputs.items():
        if isinstance(value, dict) and "sha256" in value:
            size = value.get("size_bytes", 0)
            yield name, Artifact(str(value.get("uri", "")), str(value["sha256"]), size)
        elif isinstance(value, list | tuple):
            yield from _artifacts({f"{name}/{n}": each for n, each in enumerate(value)})
