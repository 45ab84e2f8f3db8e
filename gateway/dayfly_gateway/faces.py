"""The two faces of a workflow, each made of the other: Python and YAML.

A Python file is its author's own, run on their own machine, in a process of its own: that it ends,
or writes to stdout, does no harm. What comes out is what the server would read, and is the same
when it is made a second time.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from keyword import iskeyword
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import yaml

from dayfly_gateway.manifests import Document, imports_beside, name_of, read
from dayfly_pool.errors import BadInput
from dayfly_pool.models import API_VERSION, Metadata
from dayfly_pool.workflow.graph import check, check_task, in_order
from dayfly_pool.workflow.model import RESULT, Condition, Param, Step, TaskSpec, WorkflowSpec, plain
from dayfly_pool.workflow.references import WORDS, Malformed, Reference, literal, texts, whole
from dayfly_pool.workflow.shapes import task_of, workflow_of
from dayfly_pool.workflow.values import BadDefinition, meant

KINDS: Final = ("Workflow", "Task")
PYTHON_S_MAX: Final = 60.0
FOUND_BYTES_MAX: Final = 256 << 20
STDERR_CHARACTERS: Final = 2000

_PROGRAM: Final = """
import importlib.util, json, os, sys
answer, file, wanted = os.fdopen(int(sys.argv[1]), "w"), sys.argv[2], sys.argv[3]
sys.argv[1:] = []
sys.path.insert(0, os.path.dirname(file))
name = os.path.basename(file)[:-3]
spec = importlib.util.spec_from_file_location(name, file)
module = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from dayfly.steps import GraphError, Workflow, workflow
there = {n: w for n, w in vars(module).items() if isinstance(w, Workflow) and w.__module__ == name}
if wanted and wanted not in there:
    found = next((w for w in there.values() if w.name == wanted), None)
    there = {wanted: found} if found else there
    if not found:
        answer.write(json.dumps({"missing": sorted(there)}))
        sys.exit(0)
chosen = [there[wanted]] if wanted else list(there.values())
try:
    flows = list(dict.fromkeys(inner for flow in chosen for inner in workflow.nested(flow)))
    made = [{"name": flow.name, "spec": workflow.compile(flow)} for flow in flows]
except GraphError as error:
    made = {"refused": str(error)}
answer.write(json.dumps(made))
"""


class Flow(NamedTuple):
    """One workflow, by its name, as the server would read it."""

    metadata: Metadata
    spec: WorkflowSpec
    is_environment_named: bool = True


# ---- reading ------------------------------------------------------------------------------------


def from_python(file: Path, name: str = "") -> list[Flow]:
    """The workflows of a Python file, or the one called *name*; those that they run come first.

    Raises `BadInput` with what Python said.
    """
    if not file.stem.isidentifier():
        raise BadInput(f"{file.name} cannot be imported: rename it to a Python name")
    answer = _run(file, name)
    match answer:
        case {"refused": str(why)}:
            raise BadInput(f"{file}: {why}")
        case {"missing": there}:
            raise BadInput(f"{file} has no workflow {name!r}{meant(name, map(str, there))}")
        case []:
            raise BadInput(f"{file} has no workflow: put @workflow before the function")
    flows = []
    for made in answer:
        try:
            spec = workflow_of(made["spec"])
            metadata = msgspec.convert({"name": made["name"]}, Metadata)
        except (BadDefinition, msgspec.ValidationError) as error:
            raise BadInput(f"{file}: workflow {made['name']!r}: {error}") from None
        if not spec.source and any(s.handler for s in (*spec.steps, *spec.finally_)):
            source = "." if imports_beside(file) else file.name
            spec = msgspec.structs.replace(spec, source=source)
        flows.append(Flow(metadata, _ordered(spec), "environment" in made["spec"]))
    workflows = {flow.metadata.name: flow.spec for flow in flows}
    for flow in flows:
        try:
            check(flow.spec, {}, workflows, flow.metadata.name, is_all=False)
        except BadDefinition as error:
            raise BadInput(f"{file}: workflow {flow.metadata.name!r}: {error}") from None
    return flows


def _ordered(spec: WorkflowSpec) -> WorkflowSpec:
    """The same, with each step behind those that it names, as Python has to have it."""
    return msgspec.structs.replace(spec, steps=tuple(in_order(spec)))


def _run(file: Path, name: str) -> Any:
    """What a process of its own says about the workflows in *file*."""
    reading, writing = os.pipe()
    program = [sys.executable, "-c", _PROGRAM, str(writing), str(file.resolve()), name]
    with os.fdopen(reading, "rb") as answer:
        try:
            child = subprocess.Popen(
                program, pass_fds=[writing], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, env=_environment(),
            )  # fmt: skip
        finally:
            os.close(writing)
        with child:
            said, errors = _heard(child, answer)
    if not said:
        last = errors.strip().splitlines()[-1:] or [f"it ended with code {child.returncode}"]
        place = re.findall(rf'File "{re.escape(str(file.resolve()))}", line (\d+)', errors)
        where = f", line {place[-1]}" if place else ""
        raise BadInput(f"{file}{where}: importing it failed: {last[0][:STDERR_CHARACTERS]}")
    return json.loads(said)


def _heard(child: "subprocess.Popen[bytes]", answer: Any) -> tuple[bytes, str]:
    """(what it answered, what it wrote to stderr). What takes too long is ended."""
    from threading import Thread

    found: list[bytes] = []
    reader = Thread(target=lambda: found.append(answer.read(FOUND_BYTES_MAX)), daemon=True)
    reader.start()
    try:
        _, errors = child.communicate(timeout=PYTHON_S_MAX)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        raise BadInput(
            f"importing it took over {PYTHON_S_MAX:.0f} s: it must only define"
        ) from None
    reader.join(PYTHON_S_MAX)
    return b"".join(found), errors.decode(errors="replace")


def _environment() -> dict[str, str]:
    """Ours, so arranged that the child finds this very Dayfly."""
    import dayfly

    root = str(Path(str(dayfly.__file__)).parents[1])
    known = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{known}" if known else root}


def from_yaml(text: str, file: str, namespace: str = "default") -> list[Flow]:
    """The workflows of a YAML file; tasks are checked and left out. Raises `BadInput`."""
    documents, tasks = [], {}
    for document in read(text, file, KINDS):
        spec, metadata = spec_of(document), metadata_of(document, namespace)
        if isinstance(spec, WorkflowSpec):
            documents.append((document, Flow(metadata, spec)))
            continue
        try:
            check_task(spec)
        except BadDefinition as error:
            raise refused(document, error) from None
        tasks[metadata.name] = spec
    if not documents:
        raise BadInput(f"{file} has no `kind: Workflow`")
    workflows = {flow.metadata.name: flow.spec for _, flow in documents}
    for document, flow in documents:
        try:
            check(flow.spec, tasks, workflows, flow.metadata.name, is_all=False)
        except BadDefinition as error:
            raise refused(document, error) from None
    return [Flow(flow.metadata, _ordered(flow.spec)) for _, flow in documents]


def spec_of(document: Document) -> WorkflowSpec | TaskSpec:
    """What a document of `kind: Workflow` or `kind: Task` declares. Raises `BadInput`."""
    if document.value.get("apiVersion", API_VERSION) != API_VERSION:
        raise document.refused(f"Tekton's are not taken: write {API_VERSION} - at `$.apiVersion`")
    if unknown := document.value.keys() - {"apiVersion", "kind", "metadata", "spec"}:
        raise document.refused(f"Object contains unknown field `{min(unknown)}`")
    shaped = workflow_of if document.kind == "Workflow" else task_of
    try:
        return shaped(document.section("spec"))
    except BadDefinition as error:
        raise refused(document, error) from None


def refused(document: Document, error: BadDefinition) -> BadInput:
    """The error about a document's spec, with its file and line."""
    return document.refused(f"{error.what} - at `$.spec{error.path.removeprefix('$')}`")


def metadata_of(document: Document, namespace: str = "default") -> Metadata:
    """Its metadata. Raises `BadInput`."""
    metadata = {"namespace": namespace, **document.section("metadata")}
    if "name" not in metadata:
        metadata["name"] = name_of(Path(document.file))
    try:
        return msgspec.convert(metadata, Metadata)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        raise document.refused(f"{what} - at `$.metadata{where.rstrip('`')}`") from None


# ---- YAML ---------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block; everything else on one line, if it is short."""

    def ignore_aliases(self, data: Any) -> bool:
        """Nothing is written as a reference to what is above."""
        return True


def _put_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = None
    if re.search(r"[^\n -~\u00a1-\u2027\u202a-\ud7ff]", text):
        style = '"'  # what PyYAML would take for the end of a line, and what cannot be seen
    elif "\n" in text and not re.search(r" \n", text):
        style = "|"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _put_text)


def to_yaml(flows: Sequence[Flow]) -> str:
    """Manifests, one after the other."""
    return "---\n".join(
        str(
            yaml.dump(
                document(flow), Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True
            )
        )
        for flow in flows
    )


def document(flow: Flow) -> dict[str, Any]:
    """A workflow's manifest as JSON values, in the order in which people read it."""
    spec = plain(flow.spec)
    first = ("params", "workspaces", "environment", "source", "package", "timeouts")
    ordered = {name: spec[name] for name in (*first, "steps", "finally", "results") if name in spec}
    return {
        "apiVersion": API_VERSION,
        "kind": "Workflow",
        "metadata": plain(flow.metadata),
        "spec": ordered,
    }


# ---- Python -------------------------------------------------------------------------------------

_ANNOTATIONS: Final[Mapping[str, str]] = {
    "string": "str",
    "integer": "int",
    "number": "float",
    "boolean": "bool",
    "array": "list",
    "object": "dict",
    "artifact": "File",
    "any": "",
}
_WORDS: Final = frozenset(
    ["approval", "callback", "cel", "command", "each", "finally_", "function", "handler", "nested",
     "param", "script", "sleep", "status", "task", "text", "workflow", "workspace", "File"]
)  # fmt: skip
_OPTIONS: Final = ("workspaces", "retries", "timeout", "environment", "env", "network", "limits",
                   "cache", "merge")  # fmt: skip
_TAKEN: Final = frozenset(
    [*_OPTIONS, "name", "on_error", "params", "inputs", "matrix", "include", "parallelism",
     "results", "outputs", "after", "when", "is_named"]
)  # fmt: skip
"""What builders of `dayfly.calls` take besides parameters of these names."""


def to_python(flows: Sequence[Flow]) -> str:
    """A module that makes these workflows; handlers, tasks and functions are referred to."""
    written = [_Written(flow) for flow in flows]
    used = sorted({"workflow"}.union(*(each.used for each in written)))
    imports = f"from dayfly import {', '.join(used)}"
    if len(imports) > 100:
        imports = "from dayfly import (\n    " + ",\n    ".join(used) + ",\n)"
    lines = ['"""Made by `dayfly workflow compile`."""', "", imports]
    for each in written:
        lines += ["", "", *each.lines]
    return "\n".join(lines) + "\n"


def _is_free(name: str) -> bool:
    return name.isidentifier() and name.isascii() and not iskeyword(name)


class _Written:
    """One workflow, written as Python."""

    def __init__(self, flow: Flow) -> None:
        self.spec, self.used = flow.spec, set[str]()
        self.names: dict[str, str] = {}
        self.steps = {step.name: step for step in (*self.spec.steps, *self.spec.finally_)}
        self.kinds = {param.name: param.type for param in self.spec.params}
        self.is_plain = all(map(_is_simple, self.spec.params))
        body = [f"{self.word('workspace')}({_py(name)})" for name in self.spec.workspaces]
        reserved = {*_WORDS, *self.kinds, *dir(__builtins__)}
        for name in (step.name for step in (*in_order(self.spec), *self.spec.finally_)):
            variable = name.replace("-", "_")
            variable = (
                variable if _is_free(variable) else f"{variable}_".lstrip("0123456789_") or "s_"
            )
            while variable in reserved or not _is_free(variable):
                variable += "_"
            reserved.add(variable)
            self.names[name] = variable
        ordered = (*in_order(self.spec), *self.spec.finally_)
        body += [f"{self.names[step.name]} = {self.call(step)}" for step in ordered]
        if self.spec.finally_:
            names = ", ".join(self.names[step.name] for step in self.spec.finally_)
            body.append(f"{self.word('finally_')}({names})")
        if self.spec.results:
            body.append(f"return {self.returned()}")
        self.lines = [self.decorator(flow.metadata.name), self.head(flow.metadata.name)]
        self.lines += [f"    {line}" for line in body]

    def word(self, name: str) -> str:
        """A name of Dayfly's, which is imported."""
        self.used.add(name)
        return name

    def decorator(self, name: str) -> str:
        """`@workflow` with what the function does not say."""
        spec = plain(self.spec)
        words: tuple[str, ...] = ("environment", "timeouts", "source", "package")
        options = {key: spec[key] for key in words if key in spec}
        if not self.is_plain:
            options["params"] = spec["params"]
        given = ", ".join(f"{key}={_py(value)}" for key, value in {"name": name, **options}.items())
        return f"@workflow({given})"

    def head(self, name: str) -> str:
        """The function's first line."""
        function = re.sub(r"\W", "_", name)
        function = function if _is_free(function) and function not in _WORDS else f"flow_{function}"
        if not self.is_plain:
            return f"def {function}():"
        given = [self.parameter(param) for param in self.spec.params]
        required = [param.is_required for param in self.spec.params]
        if required != sorted(required, reverse=True):
            given.insert(0, "*")
        return f"def {function}({', '.join(given)}):"

    def parameter(self, param: Param) -> str:
        """One parameter with its annotation and default."""
        kind = _ANNOTATIONS[param.type]
        if kind == "File":
            self.word(kind)
        annotation = f": {kind}" if kind else ""
        if param.is_required:
            return param.name + annotation
        return f"{param.name}{annotation}{' = ' if annotation else '='}{_py(param.default)}"

    # ---- a step -------------------------------------------------------------------------------

    def call(self, step: Step) -> str:
        """The call that makes a step."""
        if step.wait is not None:
            wait = step.wait
            if wait.timer is not None:
                first = f"{self.word('sleep')}({_py(wait.timer)}"
            elif wait.approval:
                first = f"{self.word('approval')}({_py(wait.approval)}"
            else:
                first = f"{self.word('callback')}("
        elif step.script is not None:
            first = f"{self.word('script')}({_block(step.script)}"
        elif step.command is not None:
            first = f"{self.word('command')}({', '.join(map(self.command_word, step.command))}"
        else:
            builder = "nested" if step.workflow else step.body
            first = f"{self.word(builder)}({_py(getattr(step, step.body))}"
        given = [*self.options(step), *self.parameters(step)]
        comma = "" if first.endswith("(") else ", "
        line = f"{first}{comma}{', '.join(given)})"
        if len(line) + len(self.names[step.name]) < 90 and "\n" not in line:
            return line
        start = "" if first.endswith("(") else "\n        "
        open_, _, rest = first.partition("(")
        head = f"{open_}({start}{rest}{',' if rest else ''}"
        return head + "".join(f"\n        {each}," for each in given) + "\n    )"

    def command_word(self, word: str) -> str:
        """One word of a command; a builder takes references in it as they are."""
        return _py(word)

    def parameters(self, step: Step) -> list[str]:
        """What it is given: keywords, or a mapping if one of them is no keyword."""
        if not step.params:
            return []
        if all(_is_free(name) and name not in _TAKEN for name in step.params):
            return [f"{n}={self.value(v, is_param=True)}" for n, v in step.params.items()]
        return [f"params={self.value(step.params, is_param=True)}"]

    def options(self, step: Step) -> list[str]:
        """Everything else that is not left to its default."""
        declared = plain(step)
        found = [f"name={_py(step.name)}"]
        if step.inputs:
            found.append(f"inputs={self.value(step.inputs)}")
        found += [f"{key}={_py(declared[key])}" for key in _OPTIONS if key in declared]
        if step.on_error != "stopAndFail":
            found.append(f"on_error={_py(step.on_error)}")
        if step.results:
            found.append(f"results={_py(_declared(declared['results'], 'type', 'string'))}")
        if step.outputs:
            found.append(f"outputs={_py(_declared(declared['outputs'], 'path', ''))}")
        if step.matrix is not None:
            if step.matrix.params:
                found.append(f"matrix={self.value(step.matrix.params)}")
            if step.matrix.include:
                found.append(f"include={self.value(step.matrix.include)}")
            if step.matrix.parallelism:
                found.append(f"parallelism={step.matrix.parallelism}")
        if step.run_after:
            after = ", ".join(self.names.get(name) or _py(name) for name in step.run_after)
            found.append(f"after=[{after}]")
        if step.when:
            found.append(f"when=[{', '.join(map(self.condition, step.when))}]")
        return found

    def condition(self, condition: Condition) -> str:
        """A guard, as a comparison if it is one."""
        if condition.cel:
            return f"{self.word('cel')}({_py(condition.cel)})"
        handle = self.handle(condition.input) if isinstance(condition.input, str) else None
        values = condition.values
        is_in = condition.operator == "in"
        if handle is not None and isinstance(values, tuple):
            written = [self.value(value) for value in values]
            if len(values) == 1 and not _names_anything(values):
                return f"{handle} {'==' if is_in else '!='} {written[0]}"
            return f"{handle}.{'in_' if is_in else 'not_in'}([{', '.join(written)}])"
        pairs = {"input": condition.input, "operator": condition.operator, "values": values}
        return self.value(pairs)

    # ---- values -------------------------------------------------------------------------------

    def returned(self) -> str:
        """The workflow's results."""
        results = self.spec.results
        if list(results) == [RESULT] and isinstance(results[RESULT], str):
            handle = self.handle(results[RESULT])
            if handle is not None:
                return handle
        return self.value(results)

    def value(self, value: Any, *, is_param: bool = False) -> str:
        """A JSON value with references, as an expression."""
        if isinstance(value, str):
            return self.text(value, is_param=is_param)
        if isinstance(value, dict):
            pairs = [f"{_py(k)}: {self.value(v, is_param=is_param)}" for k, v in value.items()]
            return f"{{{', '.join(pairs)}}}"
        if isinstance(value, list | tuple):
            return f"[{', '.join([self.value(item, is_param=is_param) for item in value])}]"
        return _py(value)

    def text(self, text: str, *, is_param: bool) -> str:
        """A text; what is no handle and refers to something is `text()`.

        So is an artifact that is a parameter: its handle would be taken for an input.
        """
        if "$(" not in text:
            return _py(text)
        handle = self.handle(text)
        if handle is not None and not (is_param and self.is_artifact(text)):
            return handle
        bare = WORDS.sub(lambda found: found[0][1:] if found[1] else found[0], text)
        if literal(bare) == text:
            return _py(bare)
        return f"{self.word('text')}({_py(text)})"

    def handle(self, text: str) -> str | None:
        """The handle that a whole reference is, if there is one that is written the same again."""
        try:
            reference = whole(text)
        except Malformed:
            return None
        if reference is None or str(reference) != text or reference.is_star:
            return None
        if reference.root == "params":
            found = self.parameter_handle(reference)
        elif reference.root == "steps" and not reference.name:
            found = f"{self.word('status')}()"
        elif reference.root == "steps" and reference.name in self.names:
            found = self.step_handle(reference, self.steps[reference.name])
        else:
            return None
        return found and found + "".join(f"[{_py(part)}]" for part in reference.tail)

    def is_artifact(self, text: str) -> bool:
        """Whether a whole reference is one to an artifact."""
        found = whole(text)
        is_param = found is not None and found.root == "params"
        return found is not None and (
            found.field == "outputs" or (is_param and self.kinds[found.name] == "artifact")
        )

    def parameter_handle(self, reference: Reference) -> str | None:
        """A parameter of the workflow."""
        if reference.name not in self.kinds:
            return None
        if self.is_plain:
            return reference.name
        return f"{self.word('param')}({_py(reference.name)})"

    def step_handle(self, reference: Reference, step: Step) -> str | None:
        """What a step leaves."""
        variable = self.names[step.name]
        if reference.field == "status":
            return f"{variable}.status"
        if reference.field == "outputs":
            is_there = step.task or reference.key in {output.name for output in step.outputs}
            return f"{variable}.outputs[{_py(reference.key)}]" if is_there else None
        declared = {each.name for each in step.results}
        if step.script or step.command or step.task or step.workflow or reference.key != RESULT:
            is_known = reference.key in declared or step.task or step.workflow
            return f"{variable}[{_py(reference.key)}]" if is_known else None
        if reference.tail and (reference.tail[0] in declared or isinstance(reference.tail[0], int)):
            return None
        return variable


def _names_anything(value: Any) -> bool:
    return any("$(" in text for text in texts(value))


def _is_simple(param: Param) -> bool:
    """Whether a function's parameter says all of it."""
    return (
        _is_free(param.name)
        and param.name not in _WORDS
        and not (param.enum or param.properties or param.description)
    )


def _declared(items: Sequence[Mapping[str, Any]], word: str, default: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        rest = {key: value for key, value in item.items() if key != "name"}
        found[item["name"]] = rest.get(word, default) if rest.keys() <= {word} else rest
    return found


def _block(script: str) -> str:
    """A script as it would be written by hand, if that is the same text."""
    if (
        "\n" in script
        and '"""' not in script
        and "\\" not in script
        and script.isprintable() is False
    ):
        plain_text = all(c.isprintable() or c == "\n" for c in script)
        if plain_text and not script.endswith('"'):
            return f'"""{script}"""'
    return _py(script)


def _py(value: Any) -> str:
    """A plain value as it is written: as `repr` has it, in the quotes that most people use."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_py(k)}: {_py(v)}' for k, v in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_py, value))}]"
    if isinstance(value, str) and '"' not in value and "'" not in value:
        return f'"{repr(value)[1:-1]}"'
    return repr(value)
