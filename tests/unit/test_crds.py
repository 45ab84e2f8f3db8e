"""Our custom resources: schemas made of the models, which refuse what these refuse by shape."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dayfly_gateway.manifests import KINDS, plans
from dayfly_pool.cluster import crds
from dayfly_pool.errors import BadInput

ROOT = Path(__file__).parents[2]
CLUSTERLESS = ("Queue",)
"""Kinds that are no custom resources."""


def validator(kind: str) -> jsonschema.Draft4Validator:
    """OpenAPI 3.0 has Draft 4's bounds, and says otherwise that something may be null."""
    resource = next(each for each in crds.RESOURCES if each.kind == kind)
    whole = crds.definition(resource)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return jsonschema.Draft4Validator(_draft4(copy.deepcopy(whole)))


def _draft4(schema: Any) -> Any:
    if isinstance(schema, dict):
        schema = {key: _draft4(value) for key, value in schema.items()}
        if schema.pop("nullable", False) is True:
            schema = {"anyOf": [{"type": "null"}, schema]}
    elif isinstance(schema, list):
        schema = [_draft4(value) for value in schema]
    return schema


def manifests() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every manifest of ours in the examples and the documents, and where it stands."""
    texts = {str(file): file.read_text() for file in sorted(ROOT.glob("examples/**/*.yaml"))}
    for file in sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md"]):
        for number, text in enumerate(re.findall(r"```yaml\n(.*?)```", file.read_text(), re.S)):
            texts[f"{file}:{number}"] = text
    for place, text in texts.items():
        for document in yaml.safe_load_all(text) if "apiVersion: dayfly.dev" in text else ():
            if document["kind"] not in CLUSTERLESS:
                yield place, document


def test_the_charts_files_are_what_would_be_generated():
    folder = ROOT / "charts/dayfly/crds"
    found = {file.name: file.read_text() for file in folder.glob("*.yaml")}
    assert found == crds.documents(), "make crds"


def test_all_of_them_are_found_by_one_label():
    """Helm leaves definitions alone, so whoever removes them has to name them."""
    for resource in crds.RESOURCES:
        labels = crds.definition(resource)["metadata"]["labels"]

        assert labels == {"app.kubernetes.io/part-of": "dayfly"}


def test_there_is_one_for_each_kind_but_queues():
    assert {each.kind for each in crds.RESOURCES} == set(KINDS) - set(CLUSTERLESS)


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
    for value in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(value, dict | list):
            yield from _parts(value)


@pytest.mark.parametrize("resource", crds.RESOURCES, ids=lambda each: each.kind)
def test_schemas_are_structural(resource: crds.Resource):
    """As the API server wants them: no references, no choice of types, known patterns only."""
    whole = crds.definition(resource)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for part in _parts(whole):
        assert not part.keys() & {"$ref", "anyOf", "definitions", "default", "propertyNames"}
        assert isinstance(part.get("type", ""), str | dict)  # dict: a property called so
        if isinstance(pattern := part.get("pattern"), str):
            assert "\\Z" not in pattern
            assert "(?" not in pattern
            assert all(int(n) <= 1000 for n in re.findall(r"[{,](\d+)", pattern)), "Go's limit"
        if "properties" in part:
            assert all(
                isinstance(each.get("type"), str) or each.get(crds.ANYTHING)
                for each in part["properties"].values()
            )
            assert set(part.get("required", ())) <= part["properties"].keys()


@pytest.mark.parametrize(("place", "document"), [*manifests()], ids=lambda each: str(each)[-40:])
def test_what_we_show_is_taken(place: str, document: dict[str, Any]):
    validator(document["kind"]).validate(document)


def manifest(kind: str, name: str = "a", **spec: Any) -> dict[str, Any]:
    return {"apiVersion": "dayfly.dev/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}


CRON = {"cron": {"schedule": "* * * * *"}}
REFUSED = [
    manifest("Function"),
    manifest("Function", name="a.b", handler="m:h"),
    manifest("Function", handler=""),
    manifest("Function", handler=1),
    manifest("Function", handler="m:h", package="abc"),
    manifest("Function", handler="m:h", files={"main.py": 1}),
    manifest("Function", handler="m:h", env={"A": 1}),
    manifest("Function", handler="m:h", timeoutSeconds=0),
    manifest("Function", handler="m:h", timeoutSeconds=86401),
    manifest("Function", handler="m:h", maxScale=1.5),
    manifest("Function", handler="m:h", network="wide"),
    manifest("Function", handler="m:h", limits={"memoryMb": 1}),
    manifest("Function", handler="m:h", routes=[{"path": "no-slash"}]),
    manifest("Function", handler="m:h", routes=[{"path": "/", "methods": ["get"]}]),
    manifest("Function", handler="m:h", onFailure={}),
    manifest("Function", handler="m:h", onFailure={"function": "a", "url": "https://b"}),
    manifest("Environment", preload=["a b"]),
    manifest("Environment", genericMin=-1),
    manifest("Trigger", function="a"),
    manifest("Trigger", **CRON),
    manifest("Trigger", function="a", events={}, **CRON),
    manifest("Trigger", function="a", cron={}),
    manifest("Trigger", function="a", priority=101, **CRON),
    manifest("Trigger", function="a", postgres={"server": "host=a"}),
    manifest("Job"),
    manifest("Job", function="a", script="b"),
    manifest("Job", function="a", size=0),
    manifest("Job", command=[]),
    manifest("Job", function="a", successPolicy={"rules": []}),
    manifest("Workflow"),
    manifest("Workflow", steps=[{"name": "a"}]),
    manifest("Workflow", steps=[{"script": "a"}]),
    manifest("Workflow", steps=[{"name": "A", "script": "a"}]),
    manifest("Workflow", steps=[{"name": "a", "script": "a", "handler": "m:h"}]),
    manifest("Workflow", steps=[{"name": "a", "script": "a", "onError": "ignore"}]),
    manifest("Task"),
    manifest("Task", script="a", command=["b"]),
]


@pytest.mark.parametrize("document", REFUSED, ids=str)
def test_what_the_models_refuse_by_shape_is_refused(document: dict[str, Any], tmp_path: Path):
    with pytest.raises(BadInput):
        plans("a.yaml", yaml.safe_dump(document), tmp_path, "default")
    with pytest.raises(jsonschema.ValidationError):
        validator(document["kind"]).validate(document)


TAKEN = [
    manifest("Function", handler="m:h", files={"m.py": "def h(event): pass"}),
    manifest("Function", handler="m:h", package="0" * 64, packageUrl="https://a/b.zip"),
    manifest("Function", handler="m:h", package="0" * 64, onSuccess=None, timeoutSeconds=1),
    manifest("Environment", requirements=["numpy", "pandas"]),
    manifest("Environment", requirements="numpy\n"),
    manifest("Trigger", function="a", data={"any": [1, None, "b"]}, **CRON),
    manifest("Job", function="a", items=[1, "b", None, {"c": 2}]),
    manifest("Job", script="b", files={"b.txt": "c"}),
    manifest("Workflow", steps=[{"name": "a", "script": "a", "timeout": "1m", "retries": 2}]),
    manifest("Workflow", steps=[{"name": "a", "script": "a", "retries": {"limit": 1}}]),
    manifest("Workflow", tasks=[{"name": "a", "taskSpec": {"steps": [{"script": "b"}]}}]),
    manifest("Workflow", params={"a": "string"}, steps=[{"name": "a", "taskRef": {"name": "b"}}]),
    manifest("Task", steps=[{"script": "a", "env": [{"name": "A", "value": "b"}]}]),
]


@pytest.mark.parametrize("document", TAKEN, ids=str)
def test_what_dayfly_apply_takes_is_taken(document: dict[str, Any], tmp_path: Path):
    (tmp_path / "b").write_text("")
    assert plans("a.yaml", yaml.safe_dump(document), tmp_path, "default")
    validator(document["kind"]).validate(document)


def test_defaults_are_told_and_never_set():
    whole = crds.definition(crds.RESOURCES[0])["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    spec = whole["properties"]["spec"]["properties"]
    assert spec["maxScale"]["description"] == "Default: 100."
    assert "default" not in spec["maxScale"]
