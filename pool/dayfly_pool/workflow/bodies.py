"""What running a step means: which function of the pool it is, and what that is given. Pure."""

import hashlib
from typing import Any, Final

import msgspec
from msgspec import Struct, structs

from dayfly_pool.errors import BadInput
from dayfly_pool.models import FunctionSpec
from dayfly_pool.workflow.facts import Invoke
from dayfly_pool.workflow.model import RESULT, Declared, Step, TaskSpec, WorkflowSpec
from dayfly_pool.workflow.references import Scope, arguments, substitute_text

COMMAND: Final = "dayfly.command:run"
TIMEOUT_S: Final = 3600.0
"""Of a step that says nothing (Tekton's)."""

KEEP_ALIVE_S: Final = 30.0
RESULTS_AT: Final = "/tmp/.dayfly-PLACE/results"
"""As `dayfly.command` has it."""


class Body(Struct, frozen=True):
    """A step that can be run: *function* is a deployed one's name, else *spec* says what it is."""

    event: bytes
    function: str = ""
    spec: FunctionSpec | None = None
    script: str = ""
    """What is not the same is not run in the same sandbox."""

    timeout_s: float = TIMEOUT_S


def body_of(invoke: Invoke, workflow: WorkflowSpec, empty_package: str) -> Body:
    """How *invoke* is run, a step of *workflow*. Raises `BadInput`."""
    step = invoke.step
    does: Step | TaskSpec = invoke.task or step
    given = invoke.params
    if does.function is not None:
        return Body(msgspec.json.encode(given), function=does.function)
    scope = invoke.scope
    package = invoke.task.package if invoke.task is not None else workflow.package
    spec = FunctionSpec(
        handler=does.handler or COMMAND,
        package=package or empty_package,
        environment=step.environment or _environment(invoke.task, workflow),
        env=_env(step, invoke.task, scope),
        network=step.network or (invoke.task.network if invoke.task is not None else "none"),
        timeout_seconds=min(invoke.timeout_s or TIMEOUT_S, 86400.0),
        max_scale=10_000,
        queue_max=1_000_000,
        keep_alive_seconds=KEEP_ALIVE_S,
    )
    event = given if does.handler is not None else _command(does, given, scope)
    script = does.script or "\0".join(does.command or ())
    return Body(msgspec.json.encode(event), spec=spec, script=script)


def identity(namespace: str, workflow: str, body: Body, environment: str) -> str:
    """What the pool calls it: the same for all that may share sandboxes."""
    spec = body.spec
    assert spec is not None
    whole = msgspec.json.encode([spec, body.script, environment], order="deterministic")
    what = "script" if spec.handler == COMMAND else spec.handler.rpartition(":")[2]
    return f"{namespace}/{workflow}.{what}.{hashlib.sha256(whole).hexdigest()[:16]}"


def results_of(invoke: Invoke, returned: Any) -> dict[str, Any]:
    """A step's results, as what it *returned* has them. Raises `BadInput`."""
    does: Step | TaskSpec = invoke.task or invoke.step
    if does.script is None and does.command is None:
        found = {RESULT: returned}
        if isinstance(returned, dict):
            found |= {
                each.name: returned[each.name] for each in does.results if each.name in returned
            }
        return found
    written = returned.get("results", {}) if isinstance(returned, dict) else {}
    found = {RESULT: returned.get("result") if isinstance(returned, dict) else returned}
    for each in does.results:
        if each.name in written:
            found[each.name] = _typed(each, written[each.name])
    return found


def _typed(declared: Declared, text: str) -> Any:
    """What a process wrote, with the type that is declared. Raises `BadInput`."""
    if declared.type in ("string", "any"):
        return text
    try:
        return msgspec.json.decode(text.strip())
    except msgspec.DecodeError as error:
        raise BadInput(f"result {declared.name!r} is no {declared.type}: {error}") from None


def _environment(task: TaskSpec | None, workflow: WorkflowSpec) -> str:
    return task.environment if task is not None else workflow.environment


def _env(step: Step, task: TaskSpec | None, scope: Scope | None) -> dict[str, str]:
    env = (task.env if task is not None else {}) | step.env
    if scope is None:
        return dict(env)
    return {name: substitute_text(text, scope) for name, text in env.items()}


def _command(does: Step | TaskSpec, given: dict[str, Any], scope: Scope | None) -> dict[str, Any]:
    assert scope is not None
    paths = {each.name: f"{RESULTS_AT}/{each.name}" for each in does.results}
    scope = structs.replace(scope, results=paths)
    command = list(arguments(does.command, scope)) if does.command is not None else None
    script = substitute_text(does.script, scope) if does.script is not None else None
    return {"command": command, "script": script, "item": given or None, "results": list(paths)}
