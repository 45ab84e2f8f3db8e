"""Functions that cannot be loaded: their callers are told, in their own terms; nobody else is."""

import pytest
from tests.harness import Server, eventually, together


@pytest.mark.parametrize(
    ("case", "handler", "kind", "told"),
    [
        ("no_handler", "main:missing", "HandlerMissing", "does not exist"),
        ("no_handler", "main:handler", "HandlerMissing", "is not callable"),
        ("no_handler", "nothing:handler", "HandlerMissing", "the package has no module 'nothing'"),
        ("no_handler", "main", "HandlerMissing", "module:function"),
        ("no_handler", "../main:handler", "HandlerMissing", "module:function"),
        ("syntax_error", "main:handler", "SyntaxError", "main.py, line 2"),
        ("import_fails", "main:handler", "ImportFailed", "no_such_module_anywhere"),
        ("import_raises", "main:handler", "ImportFailed", "ValueError: xxx"),
        ("import_exits", "main:handler", "ImportFailed", "SystemExit: 3"),
        ("import_dies", "main:handler", "InitCrashed", "exited with code 7"),
        ("import_segfaults", "main:handler", "InitCrashed", "signal 11"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_a_502_that_says_why(
    server: Server, case: str, handler: str, kind: str, told: str
):
    """The cause by name, to the caller and in the function's log."""
    name = server.deploy(case, f"load-{case.replace('_', '-')}", handler=handler)

    invoked, called = server.invoke(name), server.call(name)

    assert (invoked.status, called.status) == (502, 502)
    assert (invoked.json()["title"], called.json()["title"]) == (kind, kind)
    assert told in invoked.json()["detail"]
    assert any(kind in line["text"] for line in server.logs(name))
    server.delete(name)


def test_an_import_that_hangs_is_ended_at_the_init_limit(impatient: Server):
    """504 InitTimedOut, to all who wait, and no sandbox of it stays."""
    name = impatient.deploy("import_hangs")

    replies = together(3, lambda _: impatient.call(name, timeout_s=15))

    assert {(r.status, r.json()["title"]) for r in replies} == {(504, "InitTimedOut")}
    assert eventually(lambda: not impatient.sandboxes(name))
    impatient.delete(name)


def test_a_function_that_cannot_be_loaded_does_not_wear_out_the_pool(server: Server):
    """After a failed load its callers are refused for a while, at no cost of a sandbox."""
    name = server.deploy("import_segfaults", "worn")
    server.call(name)
    before = server.metric("dayfly_sandboxes_created_total")

    replies = [server.call(name) for _ in range(20)]

    assert {reply.json()["title"] for reply in replies} == {"InitCrashed"}
    assert server.metric("dayfly_sandboxes_created_total") - before < 10
    assert server.call(server.deploy("hello")).status == 200
    server.delete(name)


def test_a_corrected_function_is_served_at_once(server: Server):
    """A new version does not inherit the old one's penalty."""
    name = server.deploy("syntax_error", "corrected")
    assert server.call(name).status == 502

    server.deploy("hello", "corrected")

    assert server.call(name).status == 200
