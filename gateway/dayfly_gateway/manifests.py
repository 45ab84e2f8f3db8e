"""What to deploy: manifests read with their line numbers, handlers found without importing them.

Nothing here speaks to a server. What is wrong is `BadInput`, which names the file and the line.
"""

import ast
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import yaml

from dayfly_pool.batch.model import JobManifest, JobSpec, QueueManifest
from dayfly_pool.errors import BadInput
from dayfly_pool.models import (
    API_VERSION,
    BASE,
    EnvironmentManifest,
    EnvironmentSpec,
    FunctionManifest,
    Manifest,
    Metadata,
    TriggerManifest,
)
from dayfly_pool.workflow.model import TaskManifest, WorkflowManifest, plain
from dayfly_pool.workflow.shapes import task_of, workflow_of
from dayfly_pool.workflow.values import BadDefinition

MANIFEST_FILE: Final = "dayfly.yaml"
REQUIREMENTS_FILE: Final = "requirements.txt"
MODULES: Final = ("main", "handler", "app", "lambda_function", "function")
"""Where a folder's handler is looked for, in this order; else in its only module."""
HANDLERS: Final = ("handler", "lambda_handler", "main")
Declared = Manifest | QueueManifest | TaskManifest | WorkflowManifest | JobManifest
KINDS: Final = ("Function", "Environment", "Trigger", "Queue", "Task", "Workflow", "Job")


class Plan(NamedTuple):
    """One thing to deploy: *source* is packed and uploaded, *environment* is built, both first."""

    manifest: FunctionManifest
    source: Path | None
    environment: EnvironmentManifest | None = None


class FlowPlan(NamedTuple):
    """A workflow or task: *source* is packed and uploaded, *environment* is built, both first."""

    manifest: WorkflowManifest | TaskManifest
    source: Path | None
    environment: EnvironmentManifest | None = None


class JobPlan(NamedTuple):
    """A job to be run: *source* is packed and uploaded first."""

    manifest: JobManifest
    source: Path | None


# ---- one folder or file -------------------------------------------------------------------------


def plan(
    path: Path,
    *,
    name: str | None,
    namespace: str,
    spec: Mapping[str, Any],
    preload: Sequence[str] = (),
) -> Plan:
    """The plan for `deploy PATH`: what the folder's dayfly.yaml says, overridden by *spec*."""
    document = _own_manifest(path)
    metadata = {"namespace": namespace, **document.section("metadata")}
    metadata["name"] = name or metadata.get("name") or name_of(path)
    merged = _merged(document.section("spec"), spec)
    for other in ("source", "files", "packageUrl"):  # the code is at *path*
        merged.pop(other, None)
    own = _own_environment(path, metadata, merged, preload)
    if own is not None:
        merged["environment"] = own.metadata.name
    if "handler" not in merged:
        merged["handler"] = find_handler(path)
    manifest = document.converted({"kind": "Function", "metadata": metadata, "spec": merged})
    assert isinstance(manifest, FunctionManifest)
    return Plan(manifest, path, own)


def _own_manifest(path: Path) -> "Document":
    file = path / MANIFEST_FILE
    if not path.is_dir() or not file.is_file():
        return Document(str(path), 1, None, {})
    documents = list(read(file.read_text("utf-8"), str(file)))
    if len(documents) != 1 or documents[0].kind != "Function":
        raise BadInput(f"{file} must hold one `kind: Function`: use `dayfly apply -f` for others")
    return documents[0]


def _merged(declared: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """*given* wins; the entries of `env` and `limits` are merged one by one."""
    merged = {**declared, **given}
    for key in ("env", "limits"):
        both = (declared.get(key), given.get(key))
        if all(isinstance(value, Mapping) for value in both):
            merged[key] = {**both[0], **both[1]}  # type: ignore[dict-item]
    return merged


def _own_environment(
    path: Path, metadata: Mapping[str, Any], spec: Mapping[str, Any], preload: Sequence[str]
) -> EnvironmentManifest | None:
    """The environment that requirements.txt or --preload asks for, named after the function."""
    if "environment" in spec:
        if preload:
            raise BadInput(
                "--preload belongs to an environment, and this function names one: "
                "declare `preload` there, or leave --environment out"
            )
        return None
    file = path / REQUIREMENTS_FILE
    requirements = file.read_text("utf-8") if file.is_file() else ""
    if not requirements.strip() and not preload:
        return None
    name = metadata["name"] if metadata["name"] != BASE else f"{BASE}-env"
    try:
        return EnvironmentManifest(
            metadata=msgspec.convert({"name": name, "namespace": metadata["namespace"]}, Metadata),
            spec=msgspec.convert(
                {"requirements": requirements, "preload": list(preload)}, EnvironmentSpec
            ),
        )
    except msgspec.ValidationError as error:
        raise BadInput(_explained(str(error), f"the environment {name!r}")) from None


def with_requirements(flow: FlowPlan, folder: Path) -> FlowPlan:
    """*flow*, whose environment is the one that requirements.txt in *folder* asks for, if any."""
    metadata = flow.manifest.metadata
    named = {"name": f"{metadata.name[:54]}-workflow", "namespace": metadata.namespace}
    own = _own_environment(folder, named, {}, ())
    if own is None:
        return flow
    replaced = msgspec.structs.replace
    spec = replaced(flow.manifest.spec, environment=own.metadata.name)
    return FlowPlan(replaced(flow.manifest, spec=spec), flow.source, own)


def imports_beside(file: Path) -> bool:
    """Whether *file* imports what lies in its folder; read, never run."""
    names: set[str] = set()
    for node in ast.walk(ast.Module(_nodes(file), [])):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    beside, own = [str(file.resolve().parent)], file.stem
    found = (PathFinder.find_spec(name, beside) for name in {n.partition(".")[0] for n in names})
    return any(spec is not None and spec.name != own for spec in found)


def name_of(path: Path) -> str:
    """A valid function name made of a file's or folder's name."""
    path = path.resolve()
    name = path.stem if path.is_file() else path.name
    valid = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:63].strip("-")
    if not valid:
        raise BadInput(f"no function name can be made of {name!r}: give one with --name")
    return valid


def find_handler(path: Path) -> str:
    """`module:function` of the code at *path*, found by reading it. Raises `BadInput`."""
    if path.is_file() and path.suffix != ".py":
        raise BadInput(f"{path} is no Python file: deploy a .py file or a folder")
    candidates = [path] if path.is_file() else _modules(path)
    for file in candidates:
        if name := _handler_in(file):
            if not file.stem.isidentifier():
                raise BadInput(f"{file.name} cannot be imported: rename it to a Python name")
            return f"{file.stem}:{name}"
    raise BadInput(f"no handler found: {'; '.join(map(_told, candidates))}")


def _modules(folder: Path) -> list[Path]:
    if preferred := [folder / f"{m}.py" for m in MODULES if (folder / f"{m}.py").is_file()]:
        return preferred
    found = sorted(file for file in folder.glob("*.py") if not file.name.startswith("_"))
    if len(found) == 1:
        return found
    if not found:
        raise BadInput(f"no Python file in {folder}: put the code in {MODULES[0]}.py there")
    names = ", ".join(file.name for file in found[:8])
    raise BadInput(f"which of {names} holds the handler? Name it: --handler MODULE:FUNCTION")


def _handler_in(file: Path) -> str | None:
    names = _names(file)
    return next((name for name in HANDLERS if name in names), None)


def has_workflow(path: Path) -> bool:
    """Whether the file, or one in the folder, declares a workflow; read, never run."""
    files = path.glob("*.py") if path.is_dir() else [path]
    return any(map(_is_workflow, (node for file in files for node in _nodes(file))))


def _nodes(file: Path) -> list[ast.stmt]:
    try:
        return ast.parse(file.read_bytes()).body
    except (SyntaxError, ValueError):
        return []


def _is_workflow(node: ast.stmt) -> bool:
    """Whether it is a function with `@workflow`, in one of the ways to write that."""
    if not isinstance(node, ast.FunctionDef):
        return False
    called = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    names = [d.attr if isinstance(d, ast.Attribute) else getattr(d, "id", "") for d in called]
    return "workflow" in names


def _told(file: Path) -> str:
    names = _names(file)
    if not names:
        return f"{file.name} defines nothing; add `def handler(event, context):`"
    listed = ", ".join(list(names)[:12])
    return f"{file.name} defines {listed}; name one with --handler {file.stem}:NAME"


def _names(file: Path) -> dict[str, None]:
    """What *file* could export as a handler, in order; read, never run."""
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        why = error.msg if isinstance(error, SyntaxError) else str(error)
        raise BadInput(f"{file}{line}: {why}") from None
    return dict.fromkeys(_bound(tree.body))


def _bound(body: Sequence[ast.stmt]) -> Iterator[str]:
    for statement in body:
        match statement:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                if statement.name != "main" or _takes_an_event(statement.args):
                    yield statement.name
            case ast.ClassDef(name=name):
                yield name
            case ast.ImportFrom(names=names):
                yield from (a.asname or a.name for a in names if (a.asname or a.name) in HANDLERS)
            case ast.Assign(targets=targets):
                yield from (t.id for t in targets if isinstance(t, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr()):
                yield name
            case ast.If(body=inner, orelse=other) | ast.Try(body=inner, orelse=other):
                yield from _bound([*inner, *other])
            case _:
                pass


def _takes_an_event(arguments: ast.arguments) -> bool:
    """A script's own `def main():` is no handler."""
    return bool(arguments.posonlyargs or arguments.args or arguments.vararg)


# ---- manifests ----------------------------------------------------------------------------------


class Document(NamedTuple):
    """One YAML document, and where each of its parts stands."""

    file: str
    number: int
    node: yaml.Node | None
    value: dict[str, Any]

    @property
    def kind(self) -> Any:
        """What it declares."""
        return self.value.get("kind")

    def section(self, name: str) -> dict[str, Any]:
        """A mapping in it; empty when it is missing. Raises `BadInput` when it is no mapping."""
        found = self.value.get(name)
        if found is not None and not isinstance(found, dict):
            raise self.refused(f"Expected a mapping - at `$.{name}`")
        return dict(found or {})

    def converted(self, value: Mapping[str, Any]) -> Declared:
        """The manifest that *value*, made of this document, is. Raises `BadInput`."""
        whole = {key: v for key, v in self.value.items() if key not in value} | dict(value)
        try:
            manifest: Declared = msgspec.convert(whole, Declared)
            return manifest
        except msgspec.ValidationError as error:
            raise self.refused(str(error)) from None

    def refused(self, message: str) -> BadInput:
        """The error for *message* (msgspec's form), with the line that it is about."""
        place = self.file
        if self.node is not None:
            place += f", line {_line(self.node, message)} (document {self.number})"
        return BadInput(_explained(message, place))


def read(text: str, file: str, kinds: Sequence[str] = KINDS) -> Iterator[Document]:
    """The documents of a manifest file, each of one of *kinds*; empty ones are left out.

    Raises `BadInput`.
    """
    loader = yaml.SafeLoader(text)
    try:
        number = 0
        while loader.check_node():
            number += 1
            node = loader.get_node()
            value = loader.construct_document(node)
            if value is None:
                continue
            document = Document(file, number, node, value if isinstance(value, dict) else {})
            if document.kind not in kinds:
                known = f"{', '.join(kinds[:-1])} and {kinds[-1]}"
                raise document.refused(
                    f"{document.kind!r} is unknown; there are {known} - at `$.kind`"
                )
            yield document
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or error
        raise BadInput(f"{file}{line}: not valid YAML: {problem}") from None
    except RecursionError:
        raise BadInput(f"{file}: it is nested too deeply") from None
    finally:
        loader.dispose()


Applied = Plan | EnvironmentManifest | TriggerManifest | QueueManifest | FlowPlan | JobPlan


def job_in(file: Path, namespace: str) -> tuple[str, dict[str, Any], Path | None]:
    """(name, spec, what is to be packed) of the one job that *file* (`-`: stdin) declares."""
    if str(file) == "-":
        found = plans("stdin", sys.stdin.read(), Path(), namespace)
    else:
        found = plans(str(file), file.read_text("utf-8"), file.parent, namespace)
    if len(found) != 1 or not isinstance(found[0], JobPlan):
        raise BadInput(f"{file} must hold one `kind: Job`: use `dayfly apply -f` for others")
    manifest, source = found[0]
    return manifest.metadata.name, job_spec(manifest), source


def job_spec(manifest: JobManifest) -> dict[str, Any]:
    """Its spec as it is sent."""
    spec: dict[str, Any] = msgspec.to_builtins(manifest.spec)
    defaults: dict[str, Any] = msgspec.to_builtins(JobSpec(function="any"))
    return {key: v for key, v in spec.items() if key != "source" and v != defaults.get(key)}


def plans(file: str, text: str, folder: Path, namespace: str) -> list[Applied]:
    """What `apply` does for one file; `spec.source` is relative to *folder*."""
    return [_applied(document, folder, namespace) for document in read(text, file)]


def _applied(document: Document, folder: Path, namespace: str) -> Applied:
    metadata = {"namespace": namespace, **document.section("metadata")}
    spec = document.section("spec")
    is_environment_named = "environment" in spec
    if document.kind in ("Workflow", "Task"):
        spec = _shaped(document, spec)
    listed = spec.get("requirements")
    if document.kind == "Environment" and isinstance(listed, list):
        spec["requirements"] = "\n".join(map(str, listed))
    if document.kind != "Function":
        manifest = document.converted({"metadata": metadata, "spec": spec})
        assert not isinstance(manifest, FunctionManifest)
        if isinstance(manifest, JobManifest):
            return JobPlan(manifest, _own_source(document, spec, folder))
        if isinstance(manifest, TaskManifest | WorkflowManifest):
            flow = FlowPlan(manifest, _own_source(document, spec, folder))
            if flow.source is None or is_environment_named:
                return flow
            code = flow.source
            return with_requirements(flow, code if code.is_dir() else code.parent)
        return manifest
    source = _source(document, spec, folder)
    if source is not None and "handler" not in spec:
        spec["handler"] = find_handler(source)
    own = _own_environment(source, metadata, spec, ()) if source and metadata.get("name") else None
    if own is not None:
        spec["environment"] = own.metadata.name
    manifest = document.converted({"metadata": metadata, "spec": spec})
    assert isinstance(manifest, FunctionManifest)
    return Plan(manifest, source, own)


def _shaped(document: Document, spec: dict[str, Any]) -> dict[str, Any]:
    """As we write it, however it was written: Tekton's shapes are known."""
    from dayfly_pool.workflow.graph import check, check_task

    try:
        if document.kind == "Workflow":
            flow = workflow_of(spec)
            check(flow, {}, {}, is_all=False)
            return plain(flow)
        task = task_of(spec)
        check_task(task)
    except BadDefinition as error:
        where = error.path.removeprefix("$")
        raise document.refused(f"{error.what} - at `$.spec{where}`") from None
    return plain(task)


def _own_source(document: Document, spec: Mapping[str, Any], folder: Path) -> Path | None:
    given = spec.get("source")
    if given is None:
        return None
    path = folder / str(given)
    if not path.exists():
        raise document.refused(f"there is no {path} - at `$.spec.source`")
    return path


def _source(document: Document, spec: Mapping[str, Any], folder: Path) -> Path | None:
    """Where the function's code is: spec.source, or beside a dayfly.yaml; None for a package."""
    if ("package" in spec or "files" in spec or "image" in spec) and "source" not in spec:
        return None
    given = spec.get("source")
    if given is None and Path(document.file).name == MANIFEST_FILE:
        given = "."
    if not isinstance(given, str):
        raise document.refused("`source` must name the file or folder of the code - at `$.spec`")
    path = folder / given
    if not path.exists():
        raise document.refused(f"there is no {path} - at `$.spec.source`")
    return path


def _explained(message: str, place: str) -> str:
    what, _, where = message.partition(" - at ")
    where = where.strip("`").removeprefix("$").removeprefix(".").removesuffix("[...]")
    if "matching regex" in what and where.startswith("metadata"):
        what = "names are lower-case letters, digits and dashes, at most 63"
    if what.startswith("Expected `str`, got"):
        what += ": put it in quotes"
    if where == "apiVersion" and what.startswith("Invalid enum value"):
        what = f"it must be {API_VERSION}"
    return f"{place}: {where}: {what}" if where else f"{place}: {what}"


def _line(node: yaml.Node, message: str) -> int:
    """The line of what *message* speaks of: its path, then the unknown field if it names one."""
    _, _, path = message.partition(" - at `$")
    unknown = re.search(r"unknown field `([^`]*)`", message)
    steps: list[str] = re.findall(r"[^.\[\]`]+", path)
    line = int(node.start_mark.line) + 1
    for step in [*steps, *([unknown[1]] if unknown else [])]:
        if isinstance(node, yaml.MappingNode):
            found = [(k, v) for k, v in node.value if k.value == step]
        elif isinstance(node, yaml.SequenceNode) and step.isdigit():
            found = [(v, v) for v in node.value[int(step) : int(step) + 1]]
        else:
            found = []
        if not found:
            break
        key, node = found[0]
        line = int(key.start_mark.line) + 1
    return line
