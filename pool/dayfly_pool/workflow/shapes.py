"""What people write, as the model has it: Tekton's shapes are taken where they mean the same.

Lists of `{name, value}` are mappings, `taskRef` is a task, an inline `taskSpec` the step's own
body. What of Tekton is not here is refused with what to use instead. JSON values in and out;
nothing is checked that the model checks.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, TypeVar, get_args, get_origin

import msgspec

from dayfly_pool.models import Limits
from dayfly_pool.workflow.model import (
    Condition,
    Declared,
    Matrix,
    Output,
    Param,
    Retries,
    Step,
    TaskSpec,
    Timeouts,
    Wait,
    WorkflowSpec,
)
from dayfly_pool.workflow.values import BadDefinition, check_json, meant

Spec = TypeVar("Spec", WorkflowSpec, TaskSpec)

NOT_HERE: Final[Mapping[str, str]] = {
    "pipelineRef": "a nested workflow is `workflow: NAME`",
    "pipelineSpec": "apply the nested workflow by itself, and name it with `workflow: NAME`",
    "image": "no container images are run: name an `environment`",
    "sidecars": "a step is alone in its sandbox: make what it talks to a function",
    "stepTemplate": "write it in each step, or make one Task of them",
    "volumes": "use `workspaces`, or an artifact as `inputs`",
    "volumeMounts": "use `workspaces`, or an artifact as `inputs`",
    "securityContext": "sandboxes are unprivileged already: leave it out",
    "resolver": "only tasks of the same namespace are referred to: apply the task, and name it",
    "bundle": "only tasks of the same namespace are referred to: apply the task, and name it",
    "computeResources": "write `limits: {memoryMb: 512, cpu: 1}`",
    "workingDir": "begin the script with `cd`",
    "displayName": "its name is shown; say more in `description`",
    "stdoutConfig": "let the script write to $(results.NAME.path)",
    "stderrConfig": "let the script write to $(results.NAME.path)",
    "envFrom": "name each variable under `env`",
    "ref": "there are no step actions: make a Task of it",
    "subPath": "use a workspace of its own",
    "optional": "workspaces are always there: leave it out",
    "readOnly": "hand it over as an artifact: artifacts are read-only",
    "resources": "Tekton has removed PipelineResources: use `inputs` and `outputs`",
    "conditions": "Tekton has removed conditions: use `when`",
    "serviceAccountName": "steps have no Kubernetes identity: leave it out",
    "taskRunSpecs": "write it in the step",
    "tolerations": "the planner places steps: leave it out",
    "nodeSelector": "the planner places steps: leave it out",
}


def workflow_of(value: Any) -> WorkflowSpec:
    """The workflow that the `spec` of a manifest declares. Raises `BadDefinition`."""
    return _converted(value, _workflow, WorkflowSpec)


def task_of(value: Any) -> TaskSpec:
    """The task that the `spec` of a manifest declares. Raises `BadDefinition`."""
    return _converted(value, _task, TaskSpec)


def _converted(value: Any, shaped: Callable[[Any, str], Any], kind: type[Spec]) -> Spec:
    try:
        found = shaped(value, "$")
    except BadDefinition as error:
        raise BadDefinition(_of_step(error.what, error.path, value), error.path) from None
    try:
        return msgspec.convert(found, kind)
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at ")
        path = path.strip("`") or "$"
        if "matching regex" in what:
            what = _names(path)
        elif what.startswith("Expected `str`, got"):
            what += ": put it in quotes"
        elif "unknown field" in what:
            what += _meant_field(what, path, kind)
        elif "Invalid enum value" in what:
            what = _meant_choice(what, path)
        raise BadDefinition(_of_step(what, path, found), path) from None


_FIELDS: Final[Mapping[str, type]] = {
    "steps": Step,
    "finally": Step,
    "retries": Retries,
    "wait": Wait,
    "matrix": Matrix,
    "when": Condition,
    "params": Param,
    "results": Declared,
    "outputs": Output,
    "limits": Limits,
    "timeouts": Timeouts,
}
"""What is declared where, by the last word of its path."""


def _last_word(path: str) -> str:
    words = re.findall(r"[A-Za-z]+", path)
    return words[-1] if words else ""


def _meant_field(what: str, path: str, kind: type) -> str:
    """What may have been meant by the unknown field that msgspec tells of in *what*."""
    fields = msgspec.structs.fields(_FIELDS.get(_last_word(path), kind))
    known = [field.encode_name for field in fields]
    close = difflib.get_close_matches(what.split("`")[1][:63], known, 1)
    return f": did you mean `{close[0]}`?" if close else ""


def _meant_choice(what: str, path: str) -> str:
    """What there is instead of the word that msgspec refuses in *what*."""
    word, given = _last_word(path), what.removeprefix("Invalid enum value ").strip("'")
    choices = _choices(word)
    return f"{word} is {given!r}{meant(given, choices)}" if choices else what


def _choices(word: str) -> list[str]:
    """The words that a field of this name takes, if it takes only some."""
    fields = (field for kind in _FIELDS.values() for field in msgspec.structs.fields(kind))
    for field in fields:
        if field.encode_name == word:
            types = (field.type, *get_args(field.type))  # it may be left out
            return [each for type_ in types if get_origin(type_) is Literal
                    for each in get_args(type_)]  # fmt: skip
    return []


def _of_step(what: str, path: str, spec: Any) -> str:
    """*what* with the name of the step that *path* is in."""
    place = re.match(r"\$\.(steps|finally)\[(\d+)\]", path)
    if (
        place is None
        or what.startswith("step ")
        or path.endswith(".name")
        or not isinstance(spec, dict)
    ):
        return what
    steps = spec.get(place[1], spec.get("tasks"))
    step = steps[int(place[2])] if isinstance(steps, list | tuple) else None
    name = step.get("name") if isinstance(step, dict) else None
    return f"step {name!r}: {what}" if isinstance(name, str) else what


def _names(path: str) -> str:
    if "steps" in path or "finally" in path:
        if path.rstrip("`").endswith((".name", ".task", ".workflow", ".function")):
            return "names are lower-case letters, digits and dashes, at most 63"
        if "runAfter" in path:
            return "runAfter names steps: lower-case letters, digits and dashes"
    return "names are letters, digits, `_` and `-`, at most 63, and no digit first"


def _map(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadDefinition(f"a mapping is wanted, this is {_called(value)}", path)
    for key in value:
        if not isinstance(key, str):
            raise BadDefinition(f"key {key!r:.80} is no text: put it in quotes", path)
        if key in NOT_HERE:
            raise BadDefinition(f"{key} is not here: {NOT_HERE[key]}", f"{path}.{key}")
    return dict(value)


def _list(value: Any, path: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise BadDefinition(f"a list is wanted, this is {_called(value)}", path)
    return list(value)


def _called(value: Any) -> str:
    if value is None:
        return "nothing"
    names: dict[type, str] = {dict: "a mapping", list: "a list", str: "text"}
    return names.get(type(value), type(value).__name__)


def _pairs(value: Any, path: str, word: str = "value") -> Any:
    """Tekton's list of `{name, value}` as a mapping."""
    if not isinstance(value, list):
        return value
    found: dict[str, Any] = {}
    for number, item in enumerate(value):
        here = f"{path}[{number}]"
        pair = _map(item, here)
        name = pair.get("name")
        if not isinstance(name, str) or pair.keys() - {"name", word, "type", "description"}:
            raise BadDefinition(f"an entry of this list is {{name, {word}}}", here)
        if name in found:
            raise BadDefinition(f"{name!r} is here twice", here)
        if word not in pair and word == "value":
            raise BadDefinition(f"{name!r} has no value", here)
        found[name] = pair.get(word, name)
    return found


def _named(value: Any, path: str) -> Any:
    """Names, or Tekton's list of `{name, description}`."""
    if not isinstance(value, list):
        return value
    names = []
    for number, item in enumerate(value):
        if isinstance(item, dict):
            here = f"{path}[{number}]"
            wrong = _map(item, here).keys() - {"name", "description"}
            if wrong or "name" not in item:
                raise BadDefinition("an entry of this list is a name", here)
            item = item["name"]
        names.append(item)
    return names


def _declared(value: Any, path: str) -> Any:
    """Parameters and results: a list of declarations, or a mapping of them or of types by name.

    As in Tekton, what has a list as its default is an array, and what has properties an object.
    """
    if isinstance(value, dict):
        value = [
            {"name": name, **(each if isinstance(each, dict) else {"type": each})}
            for name, each in value.items()
        ]
    if not isinstance(value, list):
        return value
    found = []
    for number, item in enumerate(value):
        each = _map({"name": item} if isinstance(item, str) else item, f"{path}[{number}]")
        if "type" not in each:
            shapes: dict[type, str] = {list: "array", dict: "object"}
            guess = shapes.get(type(each.get("default")))
            if guess := guess or ("object" if each.get("properties") else None):
                each["type"] = guess
        check_json(each, f"{path}[{number}]")
        found.append(each)
    return found


def _outputs(value: Any, path: str) -> Any:
    if isinstance(value, dict):
        return [{"name": k, "path": v or ""} for k, v in value.items()]
    return (
        [{"name": v} if isinstance(v, str) else v for v in value]
        if isinstance(value, list)
        else value
    )


def _when(value: Any, path: str) -> Any:
    conditions = []
    several = [value] if isinstance(value, dict | str) else _list(value, path)
    for number, item in enumerate(several):
        if isinstance(item, str):
            item = {"cel": item}
        if isinstance(item, dict):
            item = _map(item, f"{path}[{number}]")
            if "Input" in item or "Operator" in item:  # v1alpha1's
                raise BadDefinition("input, operator and values are written small", path)
        conditions.append(item)
    return conditions


def _matrix(value: Any, path: str) -> dict[str, Any]:
    matrix = _map(value, path)
    if "params" in matrix:
        matrix["params"] = _pairs(matrix["params"], f"{path}.params")
    if isinstance(matrix.get("include"), list):
        rows = []
        for number, row in enumerate(matrix["include"]):
            here = f"{path}.include[{number}]"
            row = _map(row, here)
            if isinstance(row.get("params"), list):  # Tekton's: the row's name says nothing
                row = _pairs(row["params"], f"{here}.params")
            rows.append(row)
        matrix["include"] = rows
    return matrix


def _workflow(value: Any, path: str) -> dict[str, Any]:
    spec = _map(value, path)
    spec.pop("description", None)
    if "tasks" in spec:
        if "steps" in spec:
            raise BadDefinition("steps and tasks are the same: write one of them", f"{path}.tasks")
        spec["steps"] = spec.pop("tasks")
    if "params" in spec:
        spec["params"] = _declared(spec["params"], f"{path}.params")
    if "workspaces" in spec:
        spec["workspaces"] = _named(spec["workspaces"], f"{path}.workspaces")
    if "results" in spec:
        spec["results"] = _pairs(spec["results"], f"{path}.results")
        check_json(spec["results"], f"{path}.results")
    if isinstance(spec.get("timeouts"), dict):
        timeouts = _map(spec["timeouts"], f"{path}.timeouts")
        for theirs, ours in (("pipeline", "workflow"), ("tasks", "steps")):
            if theirs in timeouts:
                timeouts[ours] = timeouts.pop(theirs)
        spec["timeouts"] = {k: v for k, v in timeouts.items() if v not in ("0", "0s", "0h0m0s")}
    for key in ("steps", "finally"):
        if key in spec:
            if isinstance(spec[key], dict):
                name = next(iter(spec[key]), "NAME")
                raise BadDefinition(
                    f"a list is wanted, this is a mapping: write `- name: {name}`", f"{path}.{key}"
                )
            steps = _list(spec[key], f"{path}.{key}")
            spec[key] = [_step(item, f"{path}.{key}[{n}]") for n, item in enumerate(steps)]
    return spec


def _step(value: Any, path: str) -> dict[str, Any]:
    step = _map(value, path)
    step.pop("description", None)
    if "taskRef" in step:
        reference = _map(step.pop("taskRef"), f"{path}.taskRef")
        if reference.get("kind", "Task") != "Task":
            raise BadDefinition(
                "there are neither cluster tasks nor custom tasks: apply a Task, and name it",
                f"{path}.taskRef.kind",
            )
        step["task"] = reference.get("name")
    if "params" in step:
        step["params"] = _pairs(step["params"], f"{path}.params")
    if "inputs" in step:
        step["inputs"] = _pairs(step["inputs"], f"{path}.inputs")
    if "taskSpec" in step:
        step = _inline(step, step.pop("taskSpec"), path)
    _container(step, path)
    if "workspaces" in step:
        step["workspaces"] = _workspaces(step["workspaces"], f"{path}.workspaces")
    if "when" in step:
        step["when"] = _when(step["when"], f"{path}.when")
    if "matrix" in step:
        step["matrix"] = _matrix(step["matrix"], f"{path}.matrix")
    if "results" in step:
        step["results"] = _declared(step["results"], f"{path}.results")
    if "outputs" in step:
        step["outputs"] = _outputs(step["outputs"], f"{path}.outputs")
    if isinstance(after := step.get("runAfter"), list) and all(isinstance(n, str) for n in after):
        step["runAfter"] = list(dict.fromkeys(after))
    if step.get("timeout") in ("0", "0s", "0h0m0s"):  # Tekton's word for none
        del step["timeout"]
    for word in ("retries", "timeout"):
        if isinstance(text := step.get(word), str) and "$(" in text:
            raise BadDefinition(f"{word} holds no reference: write its value", f"{path}.{word}")
    for word in ("params", "inputs", "when", "matrix"):
        if word in step:
            check_json(step[word], f"{path}.{word}")
    return step


def _workspaces(value: Any, path: str) -> Any:
    """As a mapping; a list of names binds each to the workflow's of the same name."""
    if isinstance(value, list):
        value = [{"name": item} if isinstance(item, str) else item for item in value]
    return _pairs(value, path, "workspace")


def _inline(step: dict[str, Any], task: Any, path: str) -> dict[str, Any]:
    """A step whose body was written as a task within it."""
    own = _task(task, f"{path}.taskSpec")
    defaults = {}
    for param in own.pop("params", ()):
        if isinstance(param, dict) and "default" in param:
            defaults[param.get("name")] = param["default"]
    if defaults:
        step["params"] = {**defaults, **(step.get("params") or {})}
    given = step.get("workspaces")
    if own.pop("workspaces", None) and not given:
        raise BadDefinition("the taskSpec's workspaces are not bound: add `workspaces`", path)
    if own.pop("inputs", None) and not step.get("inputs"):
        raise BadDefinition("the taskSpec's inputs are not given: add `inputs`", path)
    if twice := own.keys() & step.keys():
        where = f"{path}.taskSpec.{min(twice)}"
        raise BadDefinition(f"{min(twice)} is in the step and in its taskSpec", where)
    return {**step, **own}


def _task(value: Any, path: str) -> dict[str, Any]:
    task = _map(value, path)
    task.pop("description", None)
    if "steps" in task:
        steps = _list(task.pop("steps"), f"{path}.steps")
        if len(steps) != 1:
            raise BadDefinition(
                "a task is one step: make a workflow of them; they run beside one another's data",
                f"{path}.steps",
            )
        step = _map(steps[0], f"{path}.steps[0]")
        step.pop("name", None)
        if twice := step.keys() & task.keys():
            raise BadDefinition(f"{min(twice)} is there twice", f"{path}.steps[0]")
        task |= step
    _container(task, path)
    for word, shaped in (("params", _declared), ("results", _declared), ("outputs", _outputs)):
        if word in task:
            task[word] = shaped(task[word], f"{path}.{word}")
    for word in ("workspaces", "inputs"):
        if word in task:
            task[word] = _named(task[word], f"{path}.{word}")
    return task


def _container(step: dict[str, Any], path: str) -> None:
    """What Tekton has of Kubernetes' containers: `args` behind `command`, `env` as a list."""
    if "args" in step:
        if "script" in step:
            raise BadDefinition("a script has no args: write $(params.NAME) in it", f"{path}.args")
        if "command" not in step:
            raise BadDefinition("args need a command: there is no image to have one", path)
        command = _list(step["command"], f"{path}.command")
        step["command"] = [*command, *_list(step.pop("args"), f"{path}.args")]
    if isinstance(step.get("env"), list):
        for number, item in enumerate(step["env"]):
            if isinstance(item, dict) and "valueFrom" in item:
                raise BadDefinition(
                    "valueFrom is not here: write the value, or a reference to a parameter",
                    f"{path}.env[{number}]",
                )
        step["env"] = _pairs(step["env"], f"{path}.env")
