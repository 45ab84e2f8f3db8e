"""What we declare in Kubernetes: custom resources with the schemas of our own models. Pure.

Structural schemas hold no references and no choice of types: what the models take in several forms
is left open here, and judged by the models later. There are no defaults in them: a default that the
API server writes down would stay what it was when the thing was applied, whatever a newer release
says. Descriptions tell them.

`python -m dayfly_pool.cluster.crds FOLDER` writes one file for each.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import msgspec
from msgspec import Struct, inspect

from dayfly_pool.batch.model import JobSpec
from dayfly_pool.brokers import PostgresSource
from dayfly_pool.models import (
    API_VERSION,
    DESTINATIONS,
    SOURCES,
    Destination,
    EnvironmentSpec,
    FunctionSpec,
    Metadata,
    TriggerSpec,
)
from dayfly_pool.workflow.model import BODIES, Step, TaskSpec, WorkflowSpec

Schema = dict[str, Any]
GROUP, _, VERSION = API_VERSION.partition("/")

LABELS: Final = {"app.kubernetes.io/part-of": "dayfly"}
"""By which all of them are found."""

ANYTHING: Final = "x-kubernetes-preserve-unknown-fields"
ONE_OF: Final[Mapping[type, Sequence[str | tuple[str, str]]]] = {
    FunctionSpec: ("handler", "image"),
    Destination: DESTINATIONS,
    TriggerSpec: SOURCES,
    PostgresSource: ("table", "channel"),
    JobSpec: ("function", "script", "image", ("command", "image")),
    Step: (*BODIES, "taskRef", "taskSpec"),
    TaskSpec: (*BODIES[:4], "steps"),
    WorkflowSpec: ("steps", "tasks"),
}
"""Of these fields there is exactly one; of two, the first if the second is not there."""

OPEN: Final[Mapping[type, Sequence[str]]] = {
    EnvironmentSpec: ("requirements",),
    WorkflowSpec: ("params", "workspaces", "results", "timeouts"),
    Step: ("params", "inputs", "workspaces", "when", "matrix", "results", "outputs", "env"),
    TaskSpec: ("params", "results", "inputs", "outputs", "workspaces", "env"),
}
"""Fields that are also taken in other shapes than the model's own: see `workflow.shapes`."""

RESHAPED: Final = (WorkflowSpec, Step, TaskSpec)
"""These take Tekton's words besides their own, so none is dropped."""

REPLACED: Final[Mapping[type, Sequence[str]]] = {WorkflowSpec: ("steps",)}
"""Required fields that there is another word for."""


# ---- what we say of them ------------------------------------------------------------------------


class Condition(Struct, frozen=True, rename="camel", omit_defaults=True):
    """One thing that is known of it, as of `observedGeneration` of its spec."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str
    last_transition_time: str
    observed_generation: int


class Status(Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """What has become of what was declared."""

    observed_generation: int = 0
    conditions: tuple[Condition, ...] = ()


class FunctionStatus(Status, frozen=True, kw_only=True):
    """What has become of it: where it answers, which version that is, and of which code."""

    url: str = ""
    version: int = 0
    package: str = ""


class EnvironmentStatus(Status, frozen=True, kw_only=True):
    """What has become of it: what was built."""

    digest: str = ""


class TriggerStatus(Status, frozen=True, kw_only=True):
    """What has become of it: what it is asked of, and for whom."""

    source: str = ""
    function: str = ""


class JobStatus(Status, frozen=True, kw_only=True):
    """How far it is."""

    state: str = ""
    total: int = 0
    succeeded: int = 0
    failed: int = 0
    started_at: str = ""
    ended_at: str = ""


class WorkflowStatus(Status, frozen=True, kw_only=True):
    """What has become of it: how many steps it has, and of which code."""

    steps: int = 0
    package: str = ""


class TaskStatus(Status, frozen=True, kw_only=True):
    """What has become of it: of which code it is."""

    package: str = ""


# ---- the kinds ----------------------------------------------------------------------------------


class Resource(NamedTuple):
    """One kind of ours. *columns* are (heading, type, JSON path)."""

    kind: str
    plural: str
    short: str
    spec: type[Struct]
    status: type[Status]
    columns: tuple[tuple[str, str, str], ...]


RESOURCES: Final = (
    Resource("Function", "functions", "fn", FunctionSpec, FunctionStatus, (
        ("Version", "integer", ".status.version"),
        ("URL", "string", ".status.url"),
    )),
    Resource("Environment", "environments", "dfenv", EnvironmentSpec, EnvironmentStatus, ()),
    Resource("Trigger", "triggers", "dftrig", TriggerSpec, TriggerStatus, (
        ("Source", "string", ".status.source"),
        ("Function", "string", ".spec.function"),
    )),
    Resource("Job", "jobs", "dfjob", JobSpec, JobStatus, (
        ("State", "string", ".status.state"),
        ("Total", "integer", ".status.total"),
        ("Succeeded", "integer", ".status.succeeded"),
        ("Failed", "integer", ".status.failed"),
    )),
    Resource("Workflow", "workflows", "dfwf", WorkflowSpec, WorkflowStatus, (
        ("Steps", "integer", ".status.steps"),
    )),
    Resource("Task", "tasks", "dftask", TaskSpec, TaskStatus, ()),
)  # fmt: skip
_EVERYWHERE: Final = (
    ("Ready", "string", '.status.conditions[?(@.type=="Ready")].status'),
    ("Reason", "string", '.status.conditions[?(@.type=="Ready")].reason'),
    ("Age", "date", ".metadata.creationTimestamp"),
)


def definition(resource: Resource) -> dict[str, Any]:
    """The CustomResourceDefinition of one kind."""
    singular = resource.kind.lower()
    columns = [
        {"name": name, "type": type_, "jsonPath": path}
        for name, type_, path in (*resource.columns, *_EVERYWHERE)
    ]
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": columns,
        "schema": {"openAPIV3Schema": _whole(resource)},
    }
    names = {
        "kind": resource.kind,
        "listKind": f"{resource.kind}List",
        "plural": resource.plural,
        "singular": singular,
        "shortNames": [resource.short],
        "categories": ["dayfly"],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{resource.plural}.{GROUP}", "labels": LABELS},
        "spec": {"group": GROUP, "scope": "Namespaced", "names": names, "versions": [version]},
    }


def _whole(resource: Resource) -> Schema:
    name = schema(inspect.type_info(Metadata))["properties"]["name"]
    return {
        "type": "object",
        "description": f"{resource.kind} of Dayfly.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object", "properties": {"name": name}},
            "spec": schema(inspect.type_info(resource.spec)),
            "status": schema(inspect.type_info(resource.status)),
        },
    }


# ---- from models to schemas ---------------------------------------------------------------------


def schema(type_: inspect.Type) -> Schema:
    """The structural schema of what msgspec takes for *type_*."""
    match type_:
        case inspect.Metadata():
            return schema(type_.type)
        case inspect.AnyType():
            return {ANYTHING: True}
        case inspect.BoolType():
            return {"type": "boolean"}
        case inspect.LiteralType(values=values):
            return {"type": "string", "enum": list(values)}
        case inspect.IntType():
            return {"type": "integer", "format": "int64"} | _bounds(type_)
        case inspect.FloatType():
            return {"type": "number"} | _bounds(type_)
        case inspect.StrType():
            pattern = {"pattern": _pattern(type_.pattern)} if type_.pattern else {}
            return {"type": "string"} | _lengths(type_, "Length") | pattern
        case inspect.VarTupleType() | inspect.ListType():
            items = schema(type_.item_type)
            return {"type": "array", "items": items} | _lengths(type_, "Items") | _keyed(type_)
        case inspect.DictType():
            return {"type": "object"} | _values(schema(type_.value_type))
        case inspect.UnionType(types=types):
            return _choice(types)
        case inspect.StructType():
            return _object(type_)
        case _:
            raise TypeError(f"no structural schema says {type_}")


def _choice(types: Sequence[inspect.Type]) -> Schema:
    """One type, and perhaps null; anything, where there are several."""
    several = [type_ for type_ in types if not isinstance(type_, inspect.NoneType)]
    if len(several) != 1:
        return {ANYTHING: True}
    found = schema(several[0])
    if len(types) > 1 and "type" in found and "enum" not in found:  # null is no choice there
        found["nullable"] = True
    return found


def _values(of: Schema) -> Schema:
    return of if of == {ANYTHING: True} else {"additionalProperties": of}


def _object(type_: inspect.StructType) -> Schema:
    model = type_.cls
    properties, required = {}, []
    for field in type_.fields:
        is_open = field.encode_name in OPEN.get(model, ())
        found: Schema = {ANYTHING: True} if is_open else schema(field.type)
        if text := _default(field):
            found["description"] = f"{found.get('description', '')} {text}".lstrip()
        properties[field.encode_name] = found
        if field.required and field.encode_name not in REPLACED.get(model, ()):
            required.append(field.encode_name)
    whole: Schema = {"type": "object", "description": _described(model), "properties": properties}
    if required:
        whole["required"] = required
    if model in RESHAPED:
        whole[ANYTHING] = True
    if names := ONE_OF.get(model):
        whole["oneOf"] = [_given(name) for name in names]
    return whole


def _given(names: str | tuple[str, str]) -> Schema:
    if isinstance(names, str):
        return {"required": [names]}
    return {"required": [names[0]], "not": {"required": [names[1]]}}


def _default(field: inspect.Field) -> str:
    """What it is when it is left out, if that says something."""
    value = field.default
    if value in (None, "", (), {}, msgspec.NODEFAULT) or isinstance(value, Struct):
        return ""
    return f"Default: {msgspec.json.encode(value).decode()}."


def _bounds(type_: inspect.IntType | inspect.FloatType) -> Schema:
    found: Schema = {}
    for name, closed, is_open in (("minimum", type_.ge, type_.gt), ("maximum", type_.le, type_.lt)):
        if closed is not None:
            found[name] = closed
        elif is_open is not None:
            found[name] = is_open
            found[f"exclusive{name.title()}"] = True
    return found


def _lengths(type_: inspect.StrType | inspect.VarTupleType | inspect.ListType, of: str) -> Schema:
    both = {f"min{of}": type_.min_length, f"max{of}": type_.max_length}
    return {name: length for name, length in both.items() if length is not None}


def _keyed(of: inspect.VarTupleType | inspect.ListType) -> Schema:
    """A list of conditions has one of each type."""
    if not (isinstance(of.item_type, inspect.StructType) and of.item_type.cls is Condition):
        return {}
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}


def _pattern(pattern: str) -> str:
    r"""Python's, as Go and JavaScript have it: `\Z` is `$` there, and the end of it all."""
    assert "(?" not in pattern, pattern
    return pattern.removesuffix(r"\Z") + "$" * pattern.endswith(r"\Z")


def _described(model: type) -> str:
    """The first paragraph of its docstring, with fields as they are written in YAML."""
    text = " ".join((model.__doc__ or "").split("\n\n")[0].split())
    return re.sub(r"\*(\w+)\*", lambda found: _camel(found[1]), text).replace("`", "")


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.title() for word in rest)


def documents() -> dict[str, str]:
    """The definitions as YAML, by the name of their file."""
    import yaml

    head = "# Made from the models by `make crds`.\n"
    return {
        f"{resource.plural}.yaml": head + yaml.safe_dump(definition(resource), sort_keys=False)
        for resource in RESOURCES
    }


if __name__ == "__main__":
    for file, text in documents().items():
        (Path(sys.argv[1]) / file).write_text(text)
