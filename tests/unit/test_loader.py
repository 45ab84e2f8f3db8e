"""Finding the handler: the user's modules win, and the user's faults are told in their terms.

Each case runs in an interpreter of its own: loading edits `sys.modules` and `sys.path`.
"""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import msgpack
import pytest

import dayfly
from dayfly.loader import LoadFailure, split_handler

ROOTS = [str(Path(str(module.__file__)).parents[1]) for module in (dayfly, msgpack)]
GUEST = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
from dayfly import invoker, loader, output
code, handler = sys.argv[2:]
try:
    found = loader.load(code, handler)
except loader.LoadFailure as failure:
    answer = [failure.kind, failure.message, failure.traceback]
else:
    answer = found("event", "context")
print(json.dumps(answer))
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    return folder


def write(code: Path, **files: str) -> None:
    """Python files by name."""
    for name, text in files.items():
        path = code / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))


def load(code: Path, handler: str = "main:handle") -> Any:
    """What the handler returned; [kind, message, traceback] when it could not be loaded."""
    command = [sys.executable, "-I", "-S", "-c", GUEST, json.dumps(ROOTS), str(code), handler]
    done = subprocess.run(command, capture_output=True, timeout=30)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout.splitlines()[-1])


# ---- finding ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "handler", ["main:handle", "main.handle", "api.views:show", "api.views.show", "api/views.show"]
)
def test_a_handler_is_named_our_way_or_the_aws_way(code: Path, handler: str):
    """`module:name`, `module.name` and `folder/module.name` all name the same."""
    write(code, main="def handle(e, c): return 'hello'")
    write(code, **{"api/views": "def show(e, c): return 'hello'"})

    assert load(code, handler) == "hello"


@pytest.mark.parametrize(
    "source",
    [
        "handle = lambda e, c: [e, c]",
        "import functools\ndef f(x, e, c): return [e, c]\nhandle = functools.partial(f, 1)",
        "class Greeter:\n    def __call__(self, e, c): return [e, c]\nhandle = Greeter()",
        "class Greeter:\n    def greet(self, e, c): return [e, c]\nhandle = Greeter().greet",
        "from other import handle",
        "def __getattr__(name): return lambda e, c: [e, c]",
    ],
)
def test_anything_callable_is_a_handler(code: Path, source: str):
    write(code, main=source, other="def handle(e, c): return [e, c]")

    assert load(code) == ["event", "context"]


@pytest.mark.parametrize(
    "handler",
    ["main", "main:", ":handle", "main:a.b", "ma in:handle", "main:handle:x", "../main:handle",
     ".main:handle", "main..x:handle", "/etc/x.handle", "main:han-dle", "\0:x"],
)  # fmt: skip
def test_a_malformed_handler_is_said_to_be_one(handler: str):
    with pytest.raises(LoadFailure, match="is not of the form module:function") as raised:
        split_handler(handler)
    assert raised.value.kind == "HandlerMissing"


def test_nothing_is_imported_for_a_malformed_handler(code: Path):
    write(code, main="raise AssertionError('imported')")

    assert load(code, "main:a.b")[0] == "HandlerMissing"


def test_a_missing_module_is_told_with_what_there_is(code: Path):
    write(code, app="", helper="")
    kind, message, traceback = load(code)

    assert kind == "HandlerMissing"
    assert message == "the package has no module 'main'; it holds app.py, helper.py"
    assert traceback == ""


def test_an_empty_package_is_said_to_be_empty(code: Path):
    assert load(code)[1] == "the package has no module 'main'; it holds nothing"


def test_a_missing_submodule_is_missing_too(code: Path):
    write(code, **{"api/__init__": "", "api/other": ""})

    assert load(code, "api.views:show")[0] == "HandlerMissing"
    assert load(code, "nothere.views:show")[0] == "HandlerMissing"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("", "does not exist"),
        ("handle = 1", "is not callable"),
        ("handle = None", "does not exist"),
    ],
)
def test_a_module_without_the_handler_is_told(code: Path, source: str, why: str):
    write(code, main=source)

    assert load(code)[:2] == ["HandlerMissing", f"'handle' {why} in module 'main'"]


# ---- user code that does not load ---------------------------------------------------------------


def test_a_syntax_error_names_file_and_line(code: Path):
    write(code, main="import views", views="x = 1\ndef (\n")
    kind, message, traceback = load(code)

    assert kind == "SyntaxError"
    assert message == "views.py, line 2: invalid syntax"
    assert "import views" in traceback
    assert traceback.rstrip().endswith("SyntaxError: invalid syntax")


def test_a_syntax_error_in_the_handlers_own_module_shows_no_line_of_ours(code: Path):
    write(code, main="def (\n")
    traceback = load(code)[2]

    assert "def (" in traceback
    assert "loader.py" not in traceback
    assert "importlib" not in traceback


def test_a_missing_library_is_told_with_the_users_frames_only(code: Path):
    """The first frame is the user's own, not our import machinery's."""
    write(code, main="import views", views="import nothere")
    kind, message, traceback = load(code)
    files = [line.strip() for line in traceback.splitlines() if line.startswith("  File")]

    assert (kind, message) == ("ImportFailed", "No module named 'nothere'")
    assert files == [
        f'File "{code}/main.py", line 1, in <module>',
        f'File "{code}/views.py", line 1, in <module>',
    ]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt: "),
        ("raise BaseException('no')", "BaseException: no"),
        ("import sys; del sys.modules['main']", "KeyError: 'main'"),
    ],
)
def test_whatever_an_import_raises_is_the_users_failure(code: Path, source: str, said: str):
    """Exiting at import too: the guest survives to tell it."""
    write(code, main=source)

    assert load(code)[:2] == ["ImportFailed", said]


HOSTILE = {
    "a message that cannot be made": """
        class Evil(Exception):
            def __str__(self): raise RuntimeError("no")
        raise Evil
    """,
    "a message that ends the process": """
        class Evil(Exception):
            def __str__(self): raise SystemExit(1)
        raise Evil
    """,
    "a name that is no text": "raise ModuleNotFoundError('x', name=5)",
    "a message of a megabyte": "raise ValueError('x' * 10**6)",
    "a traceback of wide characters": "raise ValueError('\\U0001f600' * 10**5)",
    "a chain without end": """
        def fall(n):
            try: raise ValueError(n)
            except ValueError: fall(n + 1)
        fall(0)
    """,
    "lone surrogates": "raise ValueError('\\udcff')",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_exception_is_told_within_the_limits(code: Path, source: str):
    """`load` raises `LoadFailure` and nothing else, and what it holds fits one frame."""
    write(code, main=source)
    kind, message, traceback = load(code)

    assert kind == "ImportFailed"
    assert len(message.encode(errors="replace")) <= 8192
    assert len(traceback.encode(errors="replace")) <= 16384


def test_a_package_that_replaces_traceback_still_fails_as_itself(code: Path):
    write(code, main="raise ValueError('x')", traceback="")

    assert load(code)[:2] == ["ImportFailed", "ValueError: x"]


# ---- the user's modules win ---------------------------------------------------------------------


TAKEN = (
    "dayfly gateway loader logging msgpack output pool protocol queue record runtime seccomp "
    "typing utils"
)


def test_a_users_modules_win_over_ours_of_the_same_names(code: Path):
    """What the guest has imported for itself must not be what the user's `import` finds."""
    names = TAKEN.split()
    source = f"import {', '.join(names)}\ndef handle(e, c): return [m.MINE for m in MODULES]\n"
    write(code, main=f"{source}MODULES = {', '.join(names)}", **dict.fromkeys(names, "MINE = 1"))

    assert load(code) == [1] * len(names)


def test_a_users_folder_wins_too(code: Path):
    source = "import dayfly.protocol\ndef handle(e, c): return dayfly.protocol.MINE"
    write(code, main=source, **{"dayfly/__init__": "", "dayfly/protocol": "MINE = 1"})

    assert load(code) == 1


def test_the_sdk_is_there_when_no_module_of_the_user_hides_it(code: Path):
    write(code, main="from dayfly import Context\ndef handle(e, c): return Context.__name__")

    assert load(code) == "Context"


def test_a_library_may_bring_its_own_msgpack(code: Path):
    """Ours is forgotten, so that the environment's version is found first."""
    write(code, main="import sys\nSEEN = 'msgpack' in sys.modules\ndef handle(e, c): return SEEN")

    assert load(code) is False


def test_the_package_comes_first_on_the_path(code: Path):
    write(code, main="import sys\ndef handle(e, c): return sys.path[0]")

    assert load(code) == str(code)


def test_a_plain_handler_is_not_made_to_pay_for_asyncio(code: Path):
    """35 ms; only a coroutine handler needs it."""
    write(code, main="import sys\ndef handle(e, c): return 'asyncio' in sys.modules")

    assert load(code) is False
