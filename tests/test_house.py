"""The rules of the house, as tests."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest

import dayfly

ROOT = Path(__file__).parents[1]
FLOORS = ("runtime", "pool", "gateway")
SOURCES = {
    str(path.relative_to(ROOT)): path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")
}
TREES = {name: ast.parse(path.read_text()) for name, path in SOURCES.items()}
TESTS = {str(path.relative_to(ROOT)): path for path in (ROOT / "tests").rglob("test_*.py")}
FUNCTION_LINES_MAX = 60
VAGUE = {"utils", "util", "helpers", "helper", "common", "core", "base", "manager", "interfaces"}
UNSAFE_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "tarfile", "telnetlib"}
UNSAFE_CALLS = {"eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load",
                "zipfile.ZipFile.extractall", "tempfile.mktemp"}  # fmt: skip
SERVER_ONLY = {"aiohttp", "msgspec", "prometheus_client", "uvloop", "sqlite3", "yaml", "rich",
               "asyncio", "dayfly_pool.models", "dayfly_pool.service"}  # fmt: skip
COSTLY = {"asyncio", "typing", "dataclasses", "socket", "threading", "inspect", "logging",
          "pathlib", "subprocess", "traceback", "urllib", "tempfile"}  # fmt: skip
"""3 to 35 ms each, in every sandbox's start."""

every_source = pytest.mark.parametrize("name", sorted(SOURCES))


def loaded_by(code: str, *, path: list[str]) -> set[str]:
    """The top-level modules that an interpreter has loaded after *code*."""
    program = f"import sys; sys.path[:0] = {path!r}\nbefore = set(sys.modules)\n{code}\n"
    program += "print(*{m.partition('.')[0] for m in set(sys.modules) - before})"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, check=True, timeout=60
    )
    return set(done.stdout.decode().split())


def in_a_guest(code: str) -> set[str]:
    site = str(Path(str(msgpack.__file__)).parents[1])
    return loaded_by(code, path=[str(ROOT / "runtime"), site])


# ---- the sandbox --------------------------------------------------------------------------------


def test_the_sandbox_imports_only_the_standard_library_and_msgpack():
    """Whatever else it imported, every user's code could see, and every start would pay."""
    loaded = in_a_guest("import dayfly.__main__, dayfly.lockdown, dayfly.seccomp")

    of_msgpack = {name for name in loaded if "cython" in name}
    assert loaded - sys.stdlib_module_names - of_msgpack == {"dayfly", "msgpack"}


def test_the_sandbox_imports_nothing_costly_before_it_is_generic():
    """asyncio, 35 ms, comes with the first coroutine handler and not before."""
    loaded = in_a_guest("import dayfly.__main__")

    assert loaded & COSTLY == set()


def test_no_module_has_the_name_of_what_user_code_imports():
    """Once it is imported it would be what `from dayfly import` finds."""
    modules = {path.stem for path in (ROOT / "runtime" / "dayfly").glob("*.py")}

    assert modules.isdisjoint(dayfly.__all__)


def test_the_runtime_imports_nothing_of_the_floors_above():
    """Also not in a branch that no test takes."""
    for name, tree in TREES.items():
        if name.startswith("runtime/"):
            assert imports(tree) <= sys.stdlib_module_names | {"dayfly", "msgpack"}, name


# ---- the client ---------------------------------------------------------------------------------


def test_the_command_imports_no_server():
    """`dayfly --help` is answered at once."""
    modules = sorted(SERVER_ONLY)
    code = f"import dayfly_gateway.cli, sys; print([m for m in {modules!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, timeout=60, cwd=ROOT
    )

    assert done.stdout.decode().strip() == "[]"


# ---- the source ---------------------------------------------------------------------------------


def imports(tree: ast.AST) -> set[str]:
    """The top-level names of all modules that are imported anywhere in *tree*."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).partition(".")[0])
    return found - {"__future__"}


@every_source
def test_nothing_that_runs_foreign_bytes_is_used(name: str):
    """Unpickling, evaluating, unpacking tar files, shells: each of them runs what it is given."""
    assert imports(TREES[name]) & UNSAFE_MODULES == set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            shell = [k.value for k in node.keywords if k.arg == "shell"]

            assert called not in UNSAFE_CALLS, f"{called} in line {node.lineno}"
            assert not shell, f"shell= in line {node.lineno}"


@every_source
def test_modules_have_names_that_say_what_is_in_them(name: str):
    assert not VAGUE & set(Path(name).with_suffix("").parts)


def definitions(
    tree: ast.Module,
) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Every public function, class and method, but not what is inside functions."""
    todo: list[ast.stmt] = list(tree.body)
    while todo:
        node = todo.pop()
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function or isinstance(node, ast.ClassDef):
            if node.name.startswith("_"):
                continue
            yield node
            if isinstance(node, ast.ClassDef):
                todo += node.body
        elif isinstance(node, ast.If):
            todo += node.body if "TYPE_CHECKING" not in ast.unparse(node.test) else []


@every_source
def test_everything_public_has_a_docstring(name: str):
    """A promise in words; but for what a framework names (`emit`) it may say "See `Driver`."."""
    missing = [] if ast.get_docstring(TREES[name]) else ["the module"]
    for node in definitions(TREES[name]):
        is_stub = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (
            ast.unparse(node.body) == "..."
        )
        if not is_stub and not ast.get_docstring(node):
            missing.append(f"{node.name} in line {node.lineno}")

    assert missing == []


@every_source
def test_a_function_fits_a_screen(name: str):
    """30 lines is the aim, 60 is the wall."""
    long = [
        f"{node.name} has {size} lines"
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (size := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES_MAX
    ]

    assert long == []


@every_source
def test_no_task_is_started_without_a_parent(name: str):
    """A bare `asyncio.create_task` may be collected while it runs, and nobody hears its error."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            called = ast.unparse(node.value.func)

            assert called not in ("asyncio.create_task", "asyncio.ensure_future"), node.lineno


DECIDES = ["state", "autoscale"]
DECIDES += ["batch/asks", "batch/preemption", "batch/queues", "batch/quota"]
DECIDES += ["workflow/engine", "workflow/walk", "workflow/words", "workflow/plan"]
DECIDES += ["workflow/merging"]


@pytest.mark.parametrize("name", DECIDES)
def test_what_decides_performs_no_io_and_knows_no_time(name: str):
    """Time is an argument: that is why a day of it can be tested in a millisecond."""
    allowed = {"collections", "dataclasses", "enum", "itertools", "typing", "math"}
    allowed |= {"bisect", "functools", "heapq", "msgspec", "stat", "dayfly_pool"}

    assert imports(TREES[f"pool/dayfly_pool/{name}.py"]) <= allowed


# ---- the tests ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TESTS))
def test_a_test_is_a_sentence(name: str):
    """`test_invoke` says nothing when it fails: a subject, a verb and what it does, at least."""
    tree = ast.parse(TESTS[name].read_text())
    short = [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and len(node.name.split("_")) < 4
    ]

    assert ast.get_docstring(tree)
    assert short == []


@pytest.mark.parametrize("name", sorted(TESTS))
def test_no_mock_stands_for_a_fake(name: str):
    """A mock agrees with whatever the code does; a fake keeps promises (`dayfly_pool.testing`)."""
    assert "mock" not in imports(ast.parse(TESTS[name].read_text()))
    assert "unittest" not in imports(ast.parse(TESTS[name].read_text()))


def test_the_shipped_fakes_need_no_test_framework():
    """Programs built on Dayfly use them with theirs."""
    allowed = sys.stdlib_module_names | {"dayfly", "dayfly_pool"}

    assert imports(TREES["pool/dayfly_pool/testing.py"]) <= allowed


def test_a_server_with_the_process_driver_needs_nothing_of_linux():
    """`dayfly.lockdown` asks the C library for Linux's own calls when it is imported."""
    wanted = "dayfly_gateway.up, dayfly_pool.pool, dayfly_pool.service, dayfly_pool.drivers.process"
    code = f"import sys, {wanted}; sys.exit('dayfly.lockdown' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_house_is_all_here():
    """An empty glob would make every rule above true."""
    assert len(SOURCES) > 25
    assert {Path(name).parts[0] for name in SOURCES} == set(FLOORS)
    assert json.dumps(sorted(TESTS))
