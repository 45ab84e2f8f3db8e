"""Libraries: built once, shared, imported early where that is allowed."""

import json

import pytest
from tests.harness import FUNCTIONS, Server

SIX = (FUNCTIONS / "requires" / "requirements.txt").read_text()


def build(server: Server, name: str, namespace: str = "default", **spec: object) -> list[dict]:
    """What the admin plane says while it builds the environment."""
    path = f"/namespaces/{namespace}/environments/{name}"
    reply = server.ask("PUT", path, {"requirements": SIX} | spec, timeout_s=110)
    assert reply.status == 200, reply.body
    return [json.loads(line) for line in reply.body.splitlines()]


@pytest.fixture(scope="module")
def six(server: Server) -> str:
    """The name of an environment that holds six."""
    assert "environment" in build(server, "six")[-1]
    return "six"


def test_a_function_has_the_libraries_of_its_environment(server: Server, six: str):
    """And only those: the environment is read-only, below /environment."""
    name = server.deploy("requires", environment=six)

    reply = server.invoke(name).json()

    assert reply["six"] == "1.17.0"
    assert reply["file"].startswith("/environment")
    assert reply["before"] is False


def test_a_function_without_the_environment_has_not_its_libraries(server: Server, six: str):
    """The base environment is the standard library alone; the failure names the module."""
    name = server.deploy("requires", "without")

    reply = server.invoke(name)

    assert reply.status == 502
    assert (reply.json()["title"], reply.json()["detail"]) == (
        "ImportFailed",
        "No module named 'six'",
    )


def test_preloaded_modules_are_there_before_the_function(server: Server, six: str):
    """The operator's own are imported in the generic sandbox, before the lock-down."""
    view = build(server, "early", preload=["six"])[-1]["environment"]
    name = server.deploy("requires", "early", environment="early")

    assert view["status"]["preloadedEarly"] is True
    assert server.invoke(name).json()["before"] is True


def test_what_a_foreign_namespace_preloads_runs_after_the_lock_down(server: Server):
    """Anybody's modules see no right; the operator's saw them, so this tells the difference."""
    build(server, "theirs", namespace="strangers", preload=["six"])
    code = {
        "main.py": "import sys\n"
        "BEFORE = 'six' in sys.modules\n"
        "def handler(event, context):\n"
        "    return BEFORE\n"
    }
    name = server.deploy("x", "visitor", namespace="strangers", files=code, environment="theirs")
    views = server.ask("GET", "/environments").json()
    early = {view["metadata"]["name"]: view["status"]["preloadedEarly"] for view in views}

    assert early["theirs"] is False
    assert server.invoke(name, namespace="strangers").json() is True
    assert server.ask("GET", f"/ns/strangers/fn/{name}", plane="http").body == b"true"


def test_requirements_that_do_not_exist_are_a_clear_error(server: Server):
    """uv's own message, and nothing is declared."""
    path = "/namespaces/default/environments/impossible"
    reply = server.ask("PUT", path, {"requirements": "six==99.99.99\n"}, timeout_s=110)
    problem = json.loads(reply.body.splitlines()[-1])["problem"]

    assert problem["status"] == 422
    assert "six" in problem["detail"]
    names = [e["metadata"]["name"] for e in server.ask("GET", "/environments").json()]
    assert "impossible" not in names


def test_an_environment_in_use_cannot_be_deleted(server: Server, six: str):
    """The refusal names who uses it."""
    server.deploy("requires", "user-of-six", environment=six)

    refused = server.ask("DELETE", "/namespaces/default/environments/six")

    assert refused.status == 400
    assert "user-of-six" in refused.json()["detail"]
