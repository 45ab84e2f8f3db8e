"""What running a step means: which function of the pool it is, and what that is given. Pure."""

import hashlib
from typing import Any, Final

import msgspec
from msgspec import Struct, structs

from dayfly_pool.errors import BadInput
from dayfly_pool.models import FunctionSpec, Limits
from dayfly_pool.workflow.facts import Invoke
from dayfly_pool.workflow.model import RESULT, Declared, Step, TaskSpec, WorkflowSpec
from dayfly_pool.workflow.references import Scope, arguments, substitute_text
from dayfly_pool.workflow.values import is_fit, type_of

COMMAND: Final = "dayfly.process:run"
TIMEOUT_S: Final = 3600.0
"""Of a step that says nothing (Tekton's)."""

KEEP_ALIVE_S: Final = 30.0
RESULTS_AT: Final = "/tmp/.dayfly-PLACE/results"
IN_AT, OUT_AT = "/tmp/.dayfly-IN", "/tmp/.dayfly-OUT"
"""As `dayfly.process` has them: where these are, only the sandbox knows."""


class Body(Struct, frozen=True):
    """A step that can be run: *function* is a deployed one's name, else *spec* says what it is."""

    event: bytes
    function: str = ""
    spec: FunctionSpec | None = None
    script: str = ""
    """What is not the same is not run in the same sandbox."""

    env: dict[str, str] = {}
    """Variables that are not the same for all attempts."""

    timeout_s: float | None = None
    """Of this attempt; None: the function's."""


def body_of(invoke: Invoke, workflow: WorkflowSpec, empty_package: str) -> Body:
    """How *invoke* is run, a step of *workflow*. Raises `BadInput`."""
    step = invoke.step
    does: Step | TaskSpec = invoke.task or step
    given, scope = invoke.params, invoke.scope
    if does.function is not None:
        env = _env(invoke)
        return Body(
            msgspec.json.encode(given),
            function=does.function,
            env=env,
            timeout_s=invoke.timeout_s,
        )
    if does.handler is None:
        assert scope is not None
        scope = _placed(does, scope)
    same, own = {}, _env(structs.replace(invoke, scope=scope))
    for name, text in ((invoke.task.env if invoke.task is not None else {}) | step.env).items():
        if own[name] == text:  # the same for all: they share sandboxes, and see it on import
            same[name] = own.pop(name)
    package = invoke.task.package if invoke.task is not None else workflow.package
    spec = FunctionSpec(
        handler=does.handler or COMMAND,
        package=package or empty_package,
        environment=step.environment or _environment(invoke.task, workflow),
        env=same,
        limits=step.limits or (invoke.task and invoke.task.limits) or Limits(),
        network=step.network or (invoke.task.network if invoke.task is not None else "none"),
        timeout_seconds=86400.0,
        max_scale=10_000,
        queue_max=1_000_000,
        keep_alive_seconds=KEEP_ALIVE_S,
    )
    event = given if does.handler is not None else _command(does, given, scope)
    script = does.script or "\0".join(does.command or ())
    timeout_s = invoke.timeout_s or TIMEOUT_S
    return Body(msgspec.json.encode(event), spec=spec, script=script, env=own, timeout_s=timeout_s)


def identity(namespace: str, workflow: str, body: Body, environment: str) -> str:
    """What the pool calls it: the same for all that may share sandboxes."""
    spec = body.spec
    assert spec is not None
    whole = msgspec.json.encode([spec, body.script, environment], order="deterministic")
    what = "script" if spec.handler == COMMAND else (spec.handler or "").rpartition(":")[2]
    return f"{namespace}/{workflow}.{what}.{hashlib.sha256(whole).hexdigest()[:16]}"


def unlimited(body: Body) -> Body:
    """The same, whatever it may use: what it leaves does not depend on that."""
    if body.spec is None:
        return body
    return structs.replace(body, spec=structs.replace(body.spec, limits=Limits()))


def results_of(invoke: Invoke, returned: Any) -> dict[str, Any]:
    """A step's results, as what it *returned* has them. Raises `BadInput`."""
    does: Step | TaskSpec = invoke.task or invoke.step
    is_process = does.script is not None or does.command is not None
    left = returned
    if is_process and does.results:  # else `dayfly.process` returns just the one
        if not isinstance(returned, dict):
            raise BadInput("its results are not what a process leaves")
        left, returned = returned.get("results"), returned.get("result")
    found = {RESULT: returned}
    for each in does.results:
        if isinstance(left, dict) and each.name in left:
            value = left[each.name]
            found[each.name] = _decoded(each, str(value)) if is_process else value
        if each.name in found and not is_fit(each.type, type_of(found[each.name])):
            what = type_of(found[each.name])
            raise BadInput(f"result {each.name!r} is declared as {each.type}, this is {what}")
    return found


def _decoded(declared: Declared, text: str) -> Any:
    """What a process wrote, without the newline at its end. Raises `BadInput`."""
    if declared.type in ("string", "any"):
        return text.removesuffix("\n")
    try:
        return msgspec.json.decode(text.strip())
    except msgspec.DecodeError as error:
        raise BadInput(f"result {declared.name!r} is no {declared.type}: {error}") from None


def _environment(task: TaskSpec | None, workflow: WorkflowSpec) -> str:
    return task.environment if task is not None else workflow.environment


def _env(invoke: Invoke) -> dict[str, str]:
    env, scope = (invoke.task or invoke.step).env, invoke.scope
    if scope is not None:
        env = {name: substitute_text(text, scope) for name, text in env.items()}
    env = env | invoke.env
    for name, text in env.items():
        if "\0" in text:
            raise BadInput(f"env {name!r} would hold a NUL: no process can be given that")
    return dict(env)


def _command(does: Step | TaskSpec, given: dict[str, Any], scope: Scope | None) -> dict[str, Any]:
    assert scope is not None
    command = list(arguments(does.command, scope)) if does.command is not None else None
    script = substitute_text(does.script, scope) if does.script is not None else None
    return {"command": command, "script": script, "item": given or None,
            "results": [each.name for each in does.results]}  # fmt: skip


def _placed(does: Step | TaskSpec, scope: Scope) -> Scope:
    """With what stands for the paths of its inputs, outputs and results."""
    return structs.replace(
        scope,
        inputs={n: f"{IN_AT}{path.removeprefix('/in')}" for n, path in scope.inputs.items()},
        outputs={n: f"{OUT_AT}{path.removeprefix('/out')}" for n, path in scope.outputs.items()},
        results={each.name: f"{RESULTS_AT}/{each.name}" for each in does.results},
    )
