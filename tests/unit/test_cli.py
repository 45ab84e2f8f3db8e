"""The command line: what it understands, what it sends, what it says, how it ends."""

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, get_args
from zipfile import ZipFile

import pytest
from click.testing import CliRunner, Result

from dayfly_gateway import cli_jobs, manifests, show, up
from dayfly_gateway.cli import cli
from dayfly_gateway.deploy import reachable
from dayfly_gateway.logformat import JsonFormatter, Outbox, TextFormatter
from dayfly_gateway.manifests import FlowPlan, Plan, find_handler, name_of, plan, plans
from dayfly_pool.errors import BadInput, DataFolderUnusable
from dayfly_pool.models import SOURCES, EnvironmentManifest

HANDLER = "def handler(event, context):\n    return event\n"
TIMING = "queue;dur=0.100, specialize;dur=1.500, handler;dur=0.250"
HEAVY = {"aiohttp", "asyncio", "uvloop", "prometheus_client", "rich", "dayfly_pool.pool"}


def view(name: str, spec: dict[str, Any] | None = None, **status: Any) -> dict[str, Any]:
    """A function as the admin API shows it."""
    shown = {"version": 1, "sandboxes": 0, "busy": 0, "updated": 0.0, "url": f"/fn/{name}"}
    return {
        "kind": "Function",
        "metadata": {"namespace": "default", "name": name},
        "spec": spec or {},
        "status": shown | status,
    }


def environment_view(name: str) -> dict[str, Any]:
    """An environment as the admin API shows it."""
    return {
        "kind": "Environment",
        "metadata": {"namespace": "default", "name": name},
        "spec": {"requirements": "six", "preload": []},
        "status": {"digest": "e" * 64},
    }


def trigger_view(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """A trigger as the admin API shows it."""
    declared = {key: value for key, value in spec.items() if value is not None}
    (source,) = declared.keys() & set(SOURCES)
    fires = {"fired": 0, "next": "2026-01-02T00:00:00Z"} if source == "cron" else {}
    return {
        "kind": "Trigger",
        "metadata": {"namespace": "default", "name": name},
        "spec": declared,
        "status": {"source": source, "updated": 0.0} | fires,
    }


POOL = {
    "phases": {"generic": 1, "busy": 1},
    "waiting": 0,
    "underWay": 1,
    "misses": 0,
    "sandboxesMax": 8,
    "sandboxes": [
        {
            "id": id_,
            "phase": phase,
            "function": function,
            "version": "1" if function else None,
            "environment": "base",
            "network": "none",
            "forSeconds": 2.0,
            "running": int(bool(function)),
            "memoryBytes": 1 << 20,
        }
        for id_, phase, function in [("sb-1", "generic", None), ("sb-2", "busy", "default/greet")]
    ],
    "zygotes": [
        {
            "id": id_,
            "namespace": "default",
            "function": function,
            "environment": "base",
            "network": "none",
            "isReady": True,
            "forSeconds": 9.0,
            "forks": 7,
            "memoryBytes": 8 << 20,
        }
        for id_, function in [("sb-z3", ""), ("sb-z4", "default/greet@1")]
    ],
}
LINE = {
    "time": 0.0,
    "function": "default/greet",
    "sandbox": "sb-1",
    "invocation": "i1",
    "stream": "stdout",
    "text": "hi \x1b[31mthere",
}
PROBLEMS: dict[str, tuple[int, dict[str, Any]]] = {
    "raises": (
        502,
        {"title": "Raised", "detail": "ValueError: no", "traceback": "Traceback:\n no"},
    ),
    "full": (429, {"title": "Too many", "detail": "its queue\nis full. Retry later"}),
}


RESULTS = '{"index":0,"result":"\x9b2J"}\n{"index":1,"result":"a\u2028b\x85c \\u001b[2J"}\n'
"""Of a job: all of it may be in JSON."""


class Admin(BaseHTTPRequestHandler):
    """A fake of the admin plane: answers as the real one does, and notes what it was asked."""

    server: "AdminServer"

    def answer(self) -> None:
        """One request."""
        length = int(self.headers.get("Content-Length") or 0)
        path, _, query = self.path.partition("?")
        self.server.asked.append((self.command, self.path, self.rfile.read(length)))
        self.server.tokens.append(self.headers.get("Authorization"))
        name = path.split("/")[4] if path.startswith("/namespaces/") else ""
        match self.command, path.removeprefix(f"/namespaces/default/functions/{name}"):
            case "GET", "/live":
                self.reply(200, {"status": "alive", "http": "0.0.0.0:9000"})
            case "GET", "/functions":
                self.reply(200, [view("greet")])
            case "GET", "/environments":
                self.reply(200, [environment_view("web")])
            case "GET", "/pool":
                self.reply(200, POOL)
            case "POST", "/packages":
                self.reply(201, {"digest": "d" * 64})
            case (("PUT" | "GET"), ""):
                self.reply(200, view(name, json.loads(self.server.asked[-1][2] or b"{}")))
            case "POST", "/invocations" if name in PROBLEMS:
                self.reply(*PROBLEMS[name])
            case "POST", "/invocations":
                headers = {"Dayfly-Start": "generic", "Server-Timing": TIMING}
                self.reply(200, {"got": json.loads(self.server.asked[-1][2])}, headers)
            case "GET", "/logs" if "follow" in query:
                self.send(200, b"data: " + json.dumps(LINE).encode() + b"\n\n", {})
            case "GET", "/logs":
                self.reply(200, [LINE])
            case "PUT", "/namespaces/default/environments/broken":
                self.reply_lines(
                    {"progress": "resolving"}, {"problem": {"detail": "no such wheel"}}
                )
            case "PUT", _ if "/environments/" in path:
                built = {"environment": environment_view(name)}
                self.reply_lines({"progress": "resolving"}, built)
            case "PUT", _ if "/triggers/" in path:
                self.reply(200, trigger_view(name, json.loads(self.server.asked[-1][2])))
            case "PUT", _ if "/workflows/" in path:
                self.reply(200, view(name, steps=1))
            case "GET", "/namespaces/default/jobs/hostile/results":
                self.send(200, RESULTS.encode(), {})
            case "DELETE", _:
                self.send(204, b"", {})
            case _:
                self.send(404, b"<html>nothing here", {})

    do_GET = do_PUT = do_POST = do_DELETE = answer

    def reply(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        """JSON."""
        self.send(status, json.dumps(value).encode(), headers or {})

    def reply_lines(self, *values: Any) -> None:
        """JSON lines."""
        self.send(200, b"".join(json.dumps(value).encode() + b"\n" for value in values), {})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        """One answer."""
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class AdminServer(ThreadingHTTPServer):
    """Serves `Admin` on a free port."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Admin)
        self.asked: list[tuple[str, str, bytes]] = []
        self.tokens: list[str | None] = []

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.server_port}"

    def sent(self, method: str, path: str) -> Any:
        """The JSON that was sent there."""
        (body,) = [b for m, p, b in self.asked if (m, p) == (method, path)]
        return json.loads(body)


@pytest.fixture
def admin() -> Iterator[AdminServer]:
    with AdminServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def hello(tmp_path: Path) -> Path:
    return package(tmp_path / "hello", {"main.py": HANDLER})


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written goes to somebody who looks."""
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda _: True, raising=False)


def package(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def dayfly(*args: str, url: str = "", input: str = "", **env: str | None) -> Result:
    """Run the command in this process, in an environment without the developer's own settings."""
    clean = {"DAYFLY_URL": url, "DAYFLY_TOKEN": None, "DAYFLY_NAMESPACE": None, "NO_COLOR": None}
    return CliRunner().invoke(cli, args, input=input, env=clean | env, prog_name="dayfly")


# ---- finding the handler ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "handler"),
    [
        (HANDLER, "handler"),
        ("async def handler(event, context): ...", "handler"),
        ("def lambda_handler(event, context): ...", "lambda_handler"),
        ("def main(event, context): ...", "main"),
        ("handler = make(1)", "handler"),
        ("from app import run as handler", "handler"),
        ("try:\n    import x\nexcept ImportError:\n    x = None\n" + HANDLER, "handler"),
        ("def main(event): ...\n" + HANDLER, "handler"),
        ("raise SystemExit('it was run')\n" + HANDLER, "handler"),
    ],
)
def test_the_handler_is_found_by_reading_the_code(tmp_path: Path, code: str, handler: str) -> None:
    """Never by running it."""
    file = tmp_path / "greet.py"
    file.write_text(code)

    assert find_handler(file) == f"greet:{handler}"


@pytest.mark.parametrize(
    ("files", "module"),
    [
        (("main", "app", "zebra"), "main"),
        (("app", "lambda_function"), "app"),
        (("zebra", "__init__", "_private"), "zebra"),
    ],
)
def test_a_folder_has_one_module_that_is_looked_into(
    tmp_path: Path, files: tuple[str, ...], module: str
) -> None:
    """A usual name first, else the only one there is."""
    folder = package(tmp_path / "f", {f"{file}.py": HANDLER for file in files})

    assert find_handler(folder) == f"{module}:handler"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"main.py": "def greet(): ...\nclass X: ..."}, "main.py defines greet, X; name one with"),
        ({"main.py": "def main(): ..."}, "main.py defines nothing; add `def handler"),
        ({"one.py": HANDLER, "two.py": HANDLER}, "which of one.py, two.py holds the handler"),
        ({"main.py": "x = 1\ndef handler(:"}, "main.py, line 2: "),
        ({"data.txt": ""}, "no Python file in"),
        ({"my-tool.py": HANDLER}, "my-tool.py cannot be imported: rename it"),
    ],
)
def test_a_missing_handler_is_explained(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    """With what was found instead, and what to do."""
    with pytest.raises(BadInput, match=message):
        find_handler(package(tmp_path / "f", files))


@pytest.mark.parametrize(
    ("folder", "name"), [("Hello_World", "hello-world"), ("--x--", "x"), ("a" * 70, "a" * 63)]
)
def test_a_name_is_made_of_the_folders(tmp_path: Path, folder: str, name: str) -> None:
    """Lower-case letters, digits and dashes, at most 63."""
    assert name_of(tmp_path / folder) == name


# ---- plans and manifests ------------------------------------------------------------------------


def test_flags_win_over_the_folders_manifest(tmp_path: Path) -> None:
    """Entry by entry in env and limits."""
    manifest = """
        kind: Function
        metadata: {name: greeter}
        spec: {timeoutSeconds: 5, concurrency: 3, env: {A: a, B: b}, limits: {memoryMb: 64, cpu: 2}}
    """
    folder = package(tmp_path / "f", {"main.py": HANDLER, "dayfly.yaml": manifest})
    flags = {"timeoutSeconds": 9.0, "env": {"B": "other"}, "limits": {"cpu": 1.0}}
    spec = plan(folder, name=None, namespace="ns", spec=flags).manifest.spec

    assert (spec.timeout_seconds, spec.concurrency, spec.handler) == (9.0, 3, "main:handler")
    assert spec.env == {"A": "a", "B": "other"}
    assert (spec.limits.memory_mb, spec.limits.cpu) == (64, 1.0)


def test_requirements_ask_for_an_environment_of_the_functions_name(tmp_path: Path) -> None:
    """It is built first, and the function uses it."""
    folder = package(tmp_path / "web", {"main.py": HANDLER, "requirements.txt": "six\n"})
    found = plan(folder, name=None, namespace="ns", spec={}, preload=["six"])

    assert found.environment is not None
    assert found.environment.metadata == found.manifest.metadata
    assert found.environment.spec.preload == ("six",)
    assert found.manifest.spec.environment == "web"


def test_a_named_environment_is_used_as_it_is(tmp_path: Path) -> None:
    """Whatever requirements.txt says; preload belongs to the environment."""
    folder = package(tmp_path / "web", {"main.py": HANDLER, "requirements.txt": "six\n"})
    spec = {"environment": "shared"}

    assert plan(folder, name=None, namespace="ns", spec=spec).environment is None
    with pytest.raises(BadInput, match="--preload belongs to an environment"):
        plan(folder, name=None, namespace="ns", spec=spec, preload=["six"])


GOOD = """\
kind: Environment
metadata: {name: web}
spec: {requirements: six}
---
kind: Function
metadata:
  name: greet
spec:
  source: hello
  env:
    A: "1"
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("source:", "sauce: 1\n  source:", r"m.yaml, line 9 \(document 2\): spec: .*`sauce`"),
        ("kind: Function", "kind: Fun", r"m.yaml, line 5 \(document 2\): kind: 'Fun' is unknown"),
        ("kind: Function", "x: 1", r"m.yaml, line 5 \(document 2\): kind: None is unknown"),
        ('"1"', "1", r"m.yaml, line 10 \(document 2\): spec.env: .* put it in quotes"),
        ("name: greet", "name: Greet", r"m.yaml, line 7 .*metadata.name: names are lower-case"),
        ("source: hello", "source: nope", r"m.yaml, line 9 .*spec.source: there is no"),
        ("  source: hello\n", "", r"m.yaml, line 8 .*`source` must name the file or folder"),
        ("{requirements", "{requirements: [", r"m.yaml, line 3: not valid YAML"),
        ("{requirements", "[" * 20_000, r"m.yaml: it is nested too deeply"),
        ("spec: {req", "spec: 7\nx: {req", r"m.yaml, line 3 \(document 1\): spec: Expected a map"),
    ],
)
def test_a_wrong_manifest_is_refused_with_its_line(
    hello: Path, old: str, new: str, message: str
) -> None:
    """File, line and document: a folder of manifests may be long."""
    with pytest.raises(BadInput, match=message):
        plans("m.yaml", GOOD.replace(old, new, 1), hello.parent, "default")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {name: a, script: x}\n  - {name: b, scrip: y}", r"line 6 .*step 'b': .*`script`"),
        ("- {name: a, script: x}\n  - {name: b, task: t,\n     runAfter: [c]}", r"line 7 .*'c'"),
        ("  a: {script: x}", r"line 4 .*spec.steps: a list is wanted.*write `- name: a`"),
    ],
)
def test_a_wrong_step_is_refused_with_its_line(text: str, message: str) -> None:
    """Before anything is sent; a task that is not in the file may be declared already."""
    whole = f"kind: Workflow\nmetadata: {{name: w}}\nspec:\n  steps:\n  {text}"
    with pytest.raises(BadInput, match=message):
        plans("m.yaml", whole, Path(), "default")


def test_another_api_version_is_refused_with_ours() -> None:
    """And not as an enum's value."""
    text = "apiVersion: dayfly/v1\nkind: Environment\nmetadata: {name: e}\nspec: {}"
    with pytest.raises(BadInput, match=r"line 1 .*apiVersion: it must be dayfly.dev/v1"):
        plans("m.yaml", text, Path(), "default")


def test_a_good_manifest_becomes_plans(hello: Path) -> None:
    """`source` is relative to the manifest; the namespace is the command's where it is silent."""
    first, second = plans("m.yaml", GOOD, hello.parent, "ours")

    assert isinstance(first, EnvironmentManifest)
    assert isinstance(second, Plan)
    assert second.source == hello
    assert (second.manifest.metadata.namespace, second.manifest.spec.handler) == (
        "ours",
        "main:handler",
    )


def test_a_manifest_may_name_an_uploaded_package() -> None:
    """Then there is no code to pack."""
    text = f"kind: Function\nmetadata: {{name: x}}\nspec: {{handler: 'a:b', package: {'d' * 64}}}"
    (found,) = plans("m.yaml", text, Path(), "default")

    assert isinstance(found, Plan)
    assert found.source is None


# ---- deploying ----------------------------------------------------------------------------------


def test_deploy_uploads_then_declares(admin: AdminServer, hello: Path) -> None:
    """And says how to call it, at the address that the server tells."""
    flags = ["--env", "A=1", "--memory", "64", "--route", "api.test/x/{id}", "--min-scale", "1"]
    result = dayfly("deploy", str(hello), *flags, url=admin.url)
    spec = admin.sent("PUT", "/namespaces/default/functions/hello")

    assert result.exit_code == 0, result.stderr
    assert result.stdout == "hello version 1\n  curl -i http://127.0.0.1:9000/fn/hello\n"
    assert (spec["package"], spec["env"], spec["minScale"]) == ("d" * 64, {"A": "1"}, 1)
    assert spec["limits"]["memoryMb"] == 64
    assert spec["routes"] == [{"path": "/x/{id}", "host": "api.test", "methods": []}]


def test_deploy_answers_scripts_in_json(admin: AdminServer, hello: Path) -> None:
    """The function as the API shows it, and its URL."""
    result = dayfly("deploy", str(hello), "--name", "hi", "--json", url=admin.url)
    answer = json.loads(result.stdout)

    assert (answer["metadata"]["name"], answer["url"]) == ("hi", "http://127.0.0.1:9000/fn/hi")


def test_deploy_builds_the_environment_first(admin: AdminServer, tmp_path: Path) -> None:
    """The server's progress goes to stderr."""
    folder = package(tmp_path / "web", {"main.py": HANDLER, "requirements.txt": "six\n"})
    result = dayfly("deploy", str(folder), url=admin.url)

    assert result.stderr == "environment web: resolving\n"
    assert [(method, path.split("/")[-2]) for method, path, _ in admin.asked][:3] == [
        ("PUT", "environments"),
        ("POST", ""),
        ("PUT", "functions"),
    ]


def test_a_failed_build_ends_the_deployment(admin: AdminServer, tmp_path: Path) -> None:
    """Nothing is uploaded after it."""
    folder = package(tmp_path / "broken", {"main.py": HANDLER, "requirements.txt": "six\n"})
    result = dayfly("deploy", str(folder), url=admin.url)

    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "dayfly: no such wheel"
    assert len(admin.asked) == 1


FLOW = """from dayfly import step, workflow

@step
def one() -> int:
    {}return 1

@workflow{}
def flow():
    return one()
"""


@pytest.mark.parametrize(
    ("code", "options", "files"),
    [
        ("", "", {"flow.py"}),
        ("from helper import two; ", "", {"flow.py", "helper.py", "data.csv"}),
        ("import helper.more; ", "", {"flow.py", "helper.py", "data.csv"}),
        ("import json; ", "", {"flow.py"}),
        ("", '(source=".")', {"flow.py", "helper.py", "data.csv"}),
        ("import helper; ", '(source="flow.py")', {"flow.py"}),
    ],
)
def test_a_workflow_is_sent_with_its_folder_if_it_imports_what_lies_there(
    admin: AdminServer, tmp_path: Path, code: str, options: str, files: set[str]
) -> None:
    """And it is said then; a file that stands alone may lie among strangers."""
    texts = {"flow.py": FLOW.format(code, options), "helper.py": "two = 2\n", "data.csv": "1\n"}
    folder = package(tmp_path / "flows", texts)
    result = dayfly("workflow", "deploy", str(folder / "flow.py"), url=admin.url)

    (archive,) = [body for _, path, body in admin.asked if path == "/packages"]
    assert set(ZipFile(BytesIO(archive)).namelist()) == files
    assert (f"with the folder {folder}" in result.stdout) == (len(files) > 1)


@pytest.mark.parametrize("options", ["", '(environment="base")'])
def test_requirements_beside_a_workflow_are_its_environment(
    admin: AdminServer, tmp_path: Path, options: str
) -> None:
    """Built before it is declared, and only if it names none."""
    texts = {"flow.py": FLOW.format("", options), "requirements.txt": "six\n"}
    folder = package(tmp_path / "flows", texts)
    dayfly("workflow", "deploy", str(folder / "flow.py"), url=admin.url)

    declared = admin.sent("PUT", "/namespaces/default/workflows/flow")
    assert declared.get("environment") == (None if options else "flow-workflow")
    assert admin.asked[0][1].endswith("/packages" if options else "/environments/flow-workflow")


def test_requirements_beside_an_applied_workflows_code_are_its_environment(tmp_path: Path) -> None:
    """As beside a function's; what names an environment has that one."""
    text = (
        "kind: Workflow\nmetadata: {name: w}\nspec:\n  source: code\n"
        "  steps: [{name: a, handler: 'a:b'}]"
    )
    package(tmp_path / "code", {"a.py": HANDLER, "requirements.txt": "six\n"})
    (own,) = plans("m.yaml", text, tmp_path, "ours")
    (named,) = plans("m.yaml", f"{text}\n  environment: base", tmp_path, "ours")

    assert isinstance(own, FlowPlan)
    assert isinstance(named, FlowPlan)
    assert own.environment is not None
    assert own.environment.metadata.namespace == "ours"
    assert own.manifest.spec.environment == own.environment.metadata.name
    assert named.environment is None


def test_requirements_may_be_a_list() -> None:
    """Each is a line."""
    text = "kind: Environment\nmetadata: {name: e}\nspec: {requirements: [six, attrs]}"
    (found,) = plans("m.yaml", text, Path(), "default")

    assert isinstance(found, EnvironmentManifest)
    assert found.spec.requirements == "six\nattrs"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nope"], "there is no file or folder nope"),
        ([".", "--env", "NOT_SET_HERE"], "it is not set here either"),
        ([".", "--route", "users"], "--route users: give [HOST]/PATH"),
        ([".", "--timeout", "-1"], "spec.timeoutSeconds: Expected `float` > 0.0"),
        ([".", "--name", "A B"], "metadata.name: names are lower-case letters"),
    ],
)
def test_what_cannot_be_deployed_is_never_sent(
    admin: AdminServer, hello: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    """One line, exit code 2."""
    monkeypatch.chdir(hello)
    result = dayfly("deploy", *args, url=admin.url)

    assert (result.exit_code, admin.asked, result.stdout) == (2, [], "")
    assert result.stderr.startswith("dayfly: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_env_files_are_read_and_flags_win(admin: AdminServer, hello: Path, tmp_path: Path) -> None:
    """Comments, `export` and quotes as in every .env file; a bare name takes our own value."""
    file = tmp_path / ".env"
    file.write_text("# secrets\nexport A='a b'\nB=b=c\n\nC=old\n")
    flags = ["--env-file", str(file), "--env", "C=new", "--env", "HERE"]
    dayfly("deploy", str(hello), *flags, url=admin.url, HERE="ours")
    sent = admin.sent("PUT", "/namespaces/default/functions/hello")

    assert sent["env"] == {"A": "a b", "B": "b=c", "C": "new", "HERE": "ours"}


def test_apply_takes_environments_first(admin: AdminServer, hello: Path) -> None:
    """Whatever their order in the file."""
    first, second = GOOD.split("---\n")
    (hello.parent / "m.yaml").write_text(f"{second}---\n{first}")
    result = dayfly("apply", "-f", str(hello.parent), url=admin.url)

    assert (
        result.stdout == "Environment default/web eeeeeeeeeeee\nFunction default/greet version 1\n"
    )


@pytest.mark.parametrize("text", ["", "---\n", "# nothing yet\n"])
def test_a_file_without_a_manifest_is_not_applied(admin: AdminServer, text: str) -> None:
    """Who sends nothing has mistaken the file."""
    result = dayfly("apply", "-f", "-", url=admin.url, input=text)

    assert (result.exit_code, admin.asked) == (2, [])
    assert "there is no manifest in -" in result.stderr


def test_apply_says_what_a_trigger_listens_to(admin: AdminServer, hello: Path) -> None:
    """Or when a schedule fires next; what is sent to us has no place."""
    sources = (
        "nats: {subject: orders}",
        "postgres: {server: host=db, channel: news}",
        'cron: {schedule: "0 0 * * *"}',
        "events: {}",
    )
    text = "---\n".join(
        f"kind: Trigger\nmetadata: {{name: t{n}}}\nspec: {{function: greet, {source}}}\n"
        for n, source in enumerate(sources)
    )
    result = dayfly("apply", "-f", "-", url=admin.url, input=text)

    assert result.stdout.splitlines() == [
        "Trigger default/t0 nats orders",
        "Trigger default/t1 postgres news",
        "Trigger default/t2 2026-01-02T00:00:00Z",
        "Trigger default/t3 events",
    ]


def test_apply_checks_everything_before_it_sends_anything(admin: AdminServer, hello: Path) -> None:
    """A wrong last document leaves the first ones undone, too."""
    result = dayfly("apply", "-f", "-", url=admin.url, input=GOOD.replace("hello", "nope"))

    assert (result.exit_code, admin.asked) == (2, [])
    assert result.stderr.startswith("dayfly: stdin, line 9 (document 2)")


# ---- using --------------------------------------------------------------------------------------


def test_invoke_prints_the_result_and_nothing_else(admin: AdminServer) -> None:
    """So that it can be piped; the timing goes to stderr."""
    result = dayfly("invoke", "greet", "-d", '{"a": 1}', "--timing", url=admin.url)
    words = [line.split() for line in result.stderr.splitlines()]

    assert json.loads(result.stdout) == {"got": {"a": 1}}
    assert [line[0] for line in words] == ["start", "queue", "specialize", "handler", "total"]
    assert words[0][1] == "generic"
    assert words[2][1:3] == ["1.500", "ms"]


@pytest.mark.parametrize("event", ["@event.json", "-"])
def test_the_event_may_come_from_a_file_or_stdin(
    admin: AdminServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str
) -> None:
    """As curl and the AWS command do it."""
    monkeypatch.chdir(tmp_path)
    Path("event.json").write_text("[1, 2]")
    result = dayfly("invoke", "greet", "-d", event, "--json", url=admin.url, input="[1, 2]")
    answer = json.loads(result.stdout)

    assert (answer["result"], answer["start"]) == ({"got": [1, 2]}, "generic")
    assert answer["timingMs"]["specialize"] == 1.5


def test_a_failed_function_ends_with_its_traceback_and_1(admin: AdminServer) -> None:
    """On stderr: stdout holds results only."""
    result = dayfly("invoke", "raises", url=admin.url)

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Raised: ValueError: no\nTraceback:\n no\n"


def test_a_failed_function_is_data_for_scripts(admin: AdminServer) -> None:
    """The failure as an object; the exit code is 1 all the same."""
    result = dayfly("invoke", "raises", "--json", url=admin.url)

    assert result.exit_code == 1
    assert json.loads(result.stdout)["failure"]["kind"] == "Raised"


def test_an_event_that_is_not_json_is_not_sent(admin: AdminServer) -> None:
    """The line and column are named."""
    result = dayfly("invoke", "greet", "-d", "{x", url=admin.url)

    assert (result.exit_code, admin.asked) == (2, [])
    assert "-d is not JSON: " in result.stderr


def test_a_refusal_of_the_server_is_one_line(admin: AdminServer) -> None:
    """Its detail, exit code 1."""
    result = dayfly("invoke", "full", url=admin.url)

    assert (result.exit_code, result.stderr) == (1, "dayfly: its queue is full. Retry later\n")


def test_a_server_that_is_not_there_is_told_with_the_remedy() -> None:
    """Exit code 3."""
    result = dayfly("list", url="http://127.0.0.1:1")

    assert result.exit_code == 3
    assert result.stderr == (
        "dayfly: no server at http://127.0.0.1:1: "
        "start one with `dayfly up`, or name it with --url\n"
    )


def test_a_server_that_is_not_dayfly_is_told(admin: AdminServer) -> None:
    """No traceback of a JSON parser."""
    result = dayfly("list", url=f"{admin.url}/elsewhere")

    assert result.exit_code == 1
    assert "answered 404: is it Dayfly's admin URL?" in result.stderr


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:port"])
def test_what_is_no_url_is_refused(url: str) -> None:
    """Exit code 2."""
    result = dayfly("list", "--url", url)

    assert result.exit_code == 2
    assert "is not a URL: give http://HOST:PORT with --url" in result.stderr


def test_the_token_comes_from_a_file_or_the_environment(admin: AdminServer, tmp_path: Path) -> None:
    """Never from the command line, where every user of the machine could read it."""
    file = tmp_path / "token"
    file.write_text("from-file\n")
    dayfly("list", url=admin.url, DAYFLY_TOKEN="from-environment")
    dayfly("list", "--token-file", str(file), url=admin.url, DAYFLY_TOKEN="from-environment")
    dayfly("--token-file", str(file), "list", url=admin.url)

    assert admin.tokens == ["Bearer from-environment", "Bearer from-file", "Bearer from-file"]
    assert "--token " not in dayfly("list", "--help").stdout


def test_options_may_stand_before_or_after_the_command(admin: AdminServer) -> None:
    """After wins over before, before wins over the environment."""
    elsewhere = "http://127.0.0.1:1"

    assert dayfly("--url", admin.url, "list", url=elsewhere).exit_code == 0
    assert dayfly("--url", elsewhere, "list", "--url", admin.url).exit_code == 0


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (["list"], ["greet", "/fn/greet"]),
        (["list", "environments"], ["web", "eeeeeeeeeeee", "six"]),
        (["describe", "greet"], ["metadata.name", "greet"]),
        (["describe", "--environment", "web"], ["status.digest", "e" * 64]),
        (["delete", "greet"], ["deleted default/greet"]),
        (["delete", "--environment", "web"], ["deleted default/web"]),
        (["top"], ["1 generic, 1 busy", "sb-1", "default/greet v1"]),
        (["logs", "greet"], ["stdout", r"hi \x1b[31mthere"]),
    ],
)
def test_looks_are_shown_to_people_and_to_scripts(
    admin: AdminServer, args: list[str], shown: list[str]
) -> None:
    """In both forms, without a byte that commands a terminal."""
    text = dayfly(*args, url=admin.url)
    document = dayfly(*args, "--json", url=admin.url)

    assert (text.exit_code, document.exit_code) == (0, 0), text.stderr
    assert all(word in text.stdout for word in shown)
    assert "\x1b" not in text.stdout
    json.loads(document.stdout)


def test_a_job_that_has_not_begun_took_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    status = {"state": "Pending", "succeeded": 0, "total": 4, "failed": 0, "message": ""}
    cli_jobs._show_end({"metadata": {"name": "sums"}, "status": status | {"startedAt": None}})

    assert capsys.readouterr().out == "sums Pending: 0 of 4 tasks succeeded\n"


def test_top_shows_what_works_first() -> None:
    """A busy sandbox stands above a generic one, and the zygotes below all."""
    assert [row[0] for row in show.sandbox_rows(POOL)] == ["sb-2", "sb-1", "sb-z3", "sb-z4"]


def test_top_says_whose_every_zygote_is() -> None:
    """An environment's is its namespace's, and a function's names the version that it holds."""
    whose = [row[-1] for row in show.sandbox_rows(POOL)[2:]]

    assert whose == ["default, 7 forks", "default/greet@1, 7 forks"]


def test_a_followed_log_says_when_it_ends(admin: AdminServer) -> None:
    """A server that stops must not look like a function that is silent."""
    result = dayfly("logs", "greet", "-f", "--tail", "5", "--json", url=admin.url)

    assert admin.asked[0][1] == "/namespaces/default/functions/greet/logs?tail=5&follow=1"
    assert json.loads(result.stdout)["invocation"] == "i1"
    assert (result.exit_code, "the server ended the log" in result.stderr) == (1, True)


def test_a_list_of_nothing_says_how_to_get_something(admin: AdminServer) -> None:
    """On stderr; scripts get an empty list."""
    result = dayfly("list", "-n", "elsewhere", url=admin.url)

    assert (result.stdout, result.stderr) == ("", "no functions: `dayfly deploy PATH` makes some\n")


@pytest.mark.parametrize("most", [40, 60, None])
def test_tables_fit_the_terminal(most: int | None) -> None:
    """The widest column gives way, the last one wraps."""
    rows = [["a" * 40, "short", "these are words " * 6]]
    lines = list(show.lines_of(("ONE", "TWO", "THREE"), rows, most))

    assert most is None or all(len(line) <= most for line in lines[1:])
    assert "short" in lines[1]


def test_every_command_explains_itself_by_example() -> None:
    """And the exit codes are documented."""
    helps = {name: dayfly(name, "--help").stdout for name in cli.commands}

    assert all(f"  dayfly {name}" in text.partition("Options:")[0] for name, text in helps.items())
    assert "3  the server cannot be reached" in dayfly("--help").stdout


def test_client_commands_import_neither_the_server_nor_the_pool(
    admin: AdminServer, hello: Path
) -> None:
    """A command that only asks must be there at once."""
    commands = [["--help"], ["list"], ["logs", "x"], ["invoke", "x"], ["deploy", str(hello)]]
    program = (
        "import sys; from dayfly_gateway.cli import cli\n"
        f"for args in {commands}:\n"
        "    cli(args, standalone_mode=False)\n"
        "    print('after', *sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env={"DAYFLY_URL": admin.url},
    )
    loaded = [set(line.split()) for line in done.stderr.splitlines() if line.startswith("after")]

    assert len(loaded) == 5, done.stderr
    assert loaded[-1] & HEAVY == set()
    assert loaded[0] & {"yaml", "msgspec", "http.client", "zipfile"} == set()


# ---- the server's side --------------------------------------------------------------------------


def settings(**given: Any) -> up.Settings:
    defaults: dict[str, Any] = {
        "data": Path("/data"),
        "http": "127.0.0.1:8080",
        "admin": "127.0.0.1:8081",
        "admin_token": "",
        "driver": "linux",
        "generic_min": None,
        "generic_max": None,
        "sandboxes_max": None,
        "memory_reserve_mb": None,
        "foreign_namespaces": (),
        "exec_namespaces": (),
        "prewarm": "fork",
        "zygote_forks_max": None,
        "zygote_minutes_max": None,
        "initialize_once_ms": None,
        "trusted_proxies": (),
    }
    return up.Settings(**(defaults | given))


@pytest.mark.parametrize(
    ("given", "bounds"),
    [
        ({}, (4, 32, 512)),
        ({"generic_min": 40}, (40, 40, 512)),
        ({"generic_max": 2}, (2, 2, 512)),
        ({"sandboxes_max": 3}, (3, 3, 3)),
    ],
)
def test_bounds_that_are_not_given_follow_those_that_are(
    given: dict[str, int], bounds: tuple[int, int, int]
) -> None:
    """One flag must never need a second one."""
    config, _ = up.configs(settings(**given))

    assert (config.generic_min, config.generic_max, config.sandboxes_max) == bounds


@pytest.mark.parametrize(("given", "once_s"), [(None, 0.25), (40.0, 0.04), (0.0, 0.0)])
def test_how_long_an_import_may_take_before_it_is_done_once(
    given: float | None, once_s: float
) -> None:
    """Given in milliseconds; 0 is every import."""
    config, _ = up.configs(settings(initialize_once_ms=given))

    assert config.initialize_once_s == once_s


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"generic_min": 5, "generic_max": 4}, "need 0 <= generic-min <= generic-max"),
        ({"http": "nonsense"}, "--http: 'nonsense' is not HOST:PORT"),
        ({"admin": "0.0.0.0:1"}, "give --admin-token-file FILE, or set DAYFLY_ADMIN_TOKEN"),
        ({"trusted_proxies": ("x",)}, "--trusted-proxy: 'x' does not appear"),
        ({"zygote_forks_max": 0}, "zygote-forks-max"),
        ({"initialize_once_ms": -1}, "initialize-once-ms"),
        ({"memory_reserve_mb": -1}, "memory-reserve-mb"),
    ],
)
def test_wrong_settings_are_refused_by_name(given: dict[str, Any], message: str) -> None:
    """Before anything is started."""
    with pytest.raises(BadInput, match=message.replace("(", r"\(")):
        up.configs(settings(**given))


def test_wrong_settings_of_up_end_with_one_line_and_2() -> None:
    """No traceback."""
    result = dayfly("up", "--http", "nonsense")

    assert (result.exit_code, result.stderr) == (2, "dayfly: --http: 'nonsense' is not HOST:PORT\n")


def test_settings_of_up_come_from_the_environment() -> None:
    """--generic-min is DAYFLY_GENERIC_MIN."""
    result = dayfly("up", DAYFLY_HTTP="nonsense")

    assert "--http: 'nonsense'" in result.stderr


def test_an_empty_token_file_is_refused(tmp_path: Path) -> None:
    """It would mean a server without a token."""
    (tmp_path / "token").write_text("\n")
    result = dayfly("up", "--admin-token-file", str(tmp_path / "token"))

    assert result.exit_code == 2
    assert "token is empty: write the token into it, or set DAYFLY_ADMIN_TOKEN" in result.stderr


def test_errors_of_ours_are_found_inside_groups() -> None:
    """A task group wraps what happens at the start; a defect keeps its traceback."""
    ours = DataFolderUnusable("full")
    with pytest.raises(DataFolderUnusable):
        up.raise_ours(ExceptionGroup("a", [ExceptionGroup("b", [ours])]))

    up.raise_ours(ExceptionGroup("a", [ours, KeyError("a defect")]))


def test_every_function_in_the_folder_is_deployed(tmp_path: Path) -> None:
    """Folders with Python in them and Python files; not what begins with a dot or underscore, and
    no workflows."""
    for name in ("b", "a", ".hidden", "empty", "flow", "broken"):
        (tmp_path / name).mkdir()
    for name in ("a/main.py", "b/x.py", ".hidden/main.py", "c.py", "_d.py", "README.md"):
        (tmp_path / name).write_text("")
    for name, line in (("flow/main.py", "@workflow(source='.')"), ("e.py", "@dayfly.workflow")):
        (tmp_path / name).write_text(f"{line}\ndef flow(): ...")
    (tmp_path / "broken/main.py").write_text("def (")

    assert [path.name for path in up.deployable(tmp_path)] == ["a", "b", "broken", "c.py"]


@pytest.mark.parametrize(
    ("address", "seen"),
    [("0.0.0.0:80", "127.0.0.1:80"), ("[::]:80", "127.0.0.1:80"), ("10.0.0.1:80", "10.0.0.1:80")],
)
def test_an_address_that_means_every_is_called_by_loopback(address: str, seen: str) -> None:
    """Nobody can connect to 0.0.0.0 everywhere."""
    assert reachable(address) == seen


def record(message: str, level: int = logging.INFO, **extra: Any) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "dayfly.x", "msg": message, "levelno": level} | extra)
    made.levelname, made.created = logging.getLevelName(level), 0.0
    return made


def test_a_log_line_is_one_json_object_with_its_fields() -> None:
    """Whatever is in the message: a line break cannot forge a second line."""
    line = JsonFormatter().format(record("ready\n{}", took_s=0.1234567, sandbox="sb-1", name_=1))

    assert "\n" not in line
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:00.000Z",
        "level": "info",
        "logger": "dayfly.x",
        "message": "ready\n{}",
        "took_s": 0.123457,
        "sandbox": "sb-1",
        "name_": 1,
    }


def test_a_log_line_for_people_is_a_sentence_with_fields() -> None:
    """The level is said when it matters."""
    text = TextFormatter().format(record("it died", logging.WARNING, sandbox="sb-1"))

    assert text.split(" ", 1)[1] == "warning: it died sandbox=sb-1"


def test_the_log_is_written_in_order_and_whole() -> None:
    """Up to the last line before the end."""
    stream = StringIO()
    outbox = Outbox("text", stream)
    outbox.start()
    for number in range(100):
        outbox.say(str(number))
    outbox.close()

    assert stream.getvalue().split() == [str(number) for number in range(100)]


def test_a_reader_that_is_too_slow_never_stops_the_server() -> None:
    """Lines over the limit are counted, and the count is told."""
    stream = StringIO()
    outbox = Outbox("json", stream)
    for number in range(12_000):
        outbox.say(str(number))
    outbox.start()
    outbox.close()
    told = [json.loads(line) for line in stream.getvalue().splitlines() if line.startswith("{")]

    assert [line["dropped"] for line in told] == [2000]


def test_the_manifest_kinds_are_the_models() -> None:
    """What `apply` names as known is what can be read."""
    tags = [kind.__struct_config__.tag for kind in get_args(manifests.Declared)]
    assert sorted(manifests.KINDS) == sorted(tags)


def test_a_tasks_result_commands_no_terminal_and_is_one_line(
    admin: AdminServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a pipe it is JSON as it was returned; whatever ends a line elsewhere is text."""
    piped = dayfly("job", "results", "hostile", url=admin.url).output
    on_a_terminal(monkeypatch)
    shown = dayfly("job", "results", "hostile", url=admin.url).output

    assert piped == RESULTS
    assert shown == (
        '{"index":0,"result":"\\x9b2J"}\n{"index":1,"result":"a\\u2028b\\x85c \\u001b[2J"}\n'
    )


# ---- several machines ----------------------------------------------------------------------------


def test_certificates_are_made_for_each_role_and_again(tmp_path: Path) -> None:
    """The authority stays, the rest is new; nobody else can read them."""
    first, again = (dayfly("certificates", str(tmp_path)) for _ in range(2))

    assert first.stdout.split() == again.stdout.split()
    assert [Path(line).name for line in first.stdout.split()] == ["gateway", "pool"]
    for role in ("gateway", "pool"):
        names = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / role).iterdir()}
        assert names == dict.fromkeys(("ca.crt", "tls.crt", "tls.key"), 0o600)
    assert (tmp_path / "pool" / "ca.crt").read_bytes() == (tmp_path / "ca.crt").read_bytes()


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("gateway", "--tls", "nowhere", "--shard", "a=h:1"), "No such file"),
        (("gateway", "--tls", "{made}"), "give --shard NAME=HOST:PORT"),
        (("gateway", "--tls", "{made}", "--shard", "a"), "give NAME=HOST:PORT"),
        (("gateway", "--tls", "{made}", "--shard", "a=h:1", "--admin", "0.0.0.0:1"), "refusing"),
        (("pool", "--tls", "{made}", "--name", "a", "--shard", "b=h:1"), "not --name a"),
        (("pool", "--tls", "{made}", "--name", "a b"), "give letters"),
        (("pool", "--tls", "{made}", "--name", "a", "--advertise", "h"), "give HOST:PORT"),
    ],
)
def test_a_role_that_cannot_begin_says_why(tmp_path: Path, args: tuple[str, ...], why: str) -> None:
    dayfly("certificates", str(tmp_path))
    given = [arg.format(made=tmp_path / "gateway") for arg in args]
    told = dayfly(*given)

    assert told.exit_code in (1, 2)
    assert why in told.stderr
