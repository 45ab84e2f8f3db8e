"""The admin plane: who may use it, what it refuses, what it says of itself."""

import json

import pytest
from tests.harness import DAYFLY, Server, eventually, free_port, pack


def problem(reply) -> dict:
    assert reply.headers["Content-Type"] == "application/problem+json", reply.body
    return reply.json()


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.test"},
        {"Origin": "http://localhost:8081"},
        {"Origin": "null"},
        {"Host": "evil.test:8081"},
        {"Host": "evil.test"},
        {"Host": "127.0.0.1.evil.test:8081"},
        {"Host": "localhost.evil.test"},
        {"Host": ""},
    ],
)
def test_a_browser_page_cannot_use_the_admin_plane(server: Server, headers: dict[str, str]):
    """Neither across origins nor by a name that was bound anew to 127.0.0.1 (DNS rebinding)."""
    for method, path in (("GET", "/functions"), ("POST", "/packages"), ("GET", "/metrics")):
        reply = server.ask(method, path, headers=headers)

        assert reply.status == 403
        assert problem(reply)["status"] == 403


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:1", "127.0.0.1:80", "[::1]:8081", "[::1]"]
)
def test_the_names_of_this_machine_are_served(server: Server, host: str):
    """What a client on this machine calls it."""
    assert server.ask("GET", "/functions", headers={"Host": host}).status == 200


def test_with_a_token_nothing_is_told_without_it(new_server, tmp_path):
    """Only liveness and readiness are open; a wrong or strange token is 401, never a 500."""
    (tmp_path / "token").write_text("s3cret\n")
    server = new_server("--admin-token-file", str(tmp_path / "token"), token="s3cret")
    paths = ("/functions", "/metrics", "/openapi.json", "/pool", "/environments")

    for wrong in ("", "Bearer", "Bearer wrong", "Bearer s3cre", b"Bearer \xff\xfe", "Basic s3cret"):
        for path in paths:
            reply = server.ask("GET", path, headers={"Authorization": wrong})

            assert reply.status == 401
            assert b"s3cret" not in reply.body
    assert [server.ask("GET", path).status for path in paths] == [200] * 5
    nobody = {"Authorization": ""}
    assert server.ask("GET", "/live", headers=nobody).status == 200
    assert server.ask("GET", "/ready", headers=nobody).status == 200
    name = server.deploy("hello")
    assert server.call(name).status == 200


def run(*arguments: str) -> tuple[int, str]:
    """`dayfly up` that is to fail: its exit code and what it says."""
    import subprocess

    done = subprocess.run(
        [str(DAYFLY), "up", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_an_open_admin_plane_without_a_token_is_refused_at_start(tmp_path):
    """Anybody who reached it could run code here."""
    for address in (f"0.0.0.0:{free_port()}", f"[::]:{free_port()}"):
        code, said = run("--data", str(tmp_path / "d"), "--admin", address)

        assert code != 0
        assert "token" in said
        assert "Traceback" not in said


def test_bad_input_is_refused_by_name_and_changes_nothing(server: Server):
    """A clear 400 for each, and not a single function more."""
    before = server.ask("GET", "/functions").json()
    digest = server.ask("POST", "/packages", pack({"main.py": "x = 1"})).json()["digest"]
    good = {"handler": "main:handler", "package": digest}
    bad = [
        b"{",
        b"[]",
        {},
        good | {"handler": ""},
        good | {"unknown": 1},
        good | {"package": "0" * 64},
        good | {"package": "../../etc"},
        good | {"timeoutSeconds": 0},
        good | {"timeoutSeconds": 1e99},
        good | {"timeoutSeconds": "NaN"},
        good | {"concurrency": 0},
        good | {"minScale": 3, "maxScale": 2},
        good | {"limits": {"memoryMb": 1}},
        good | {"env": {"A=B": "x"}},
        good | {"env": {"A": "\0"}},
        good | {"env": {"A": "x" * 40000}},
        good | {"network": "everything"},
        good | {"environment": "nowhere"},
        good | {"routes": [{"path": "no-slash"}]},
        good | {"routes": [{"path": "/a{b}"}]},
        good | {"routes": [{"path": "/{a}/{a}"}]},
    ]
    for body in bad:
        reply = server.ask("PUT", "/namespaces/default/functions/bad", body)

        assert 400 <= reply.status < 500, (body, reply)
        assert problem(reply)["detail"]
    for name in ("Upper", "a_b", "-a", "a" * 64, "..", "%2e%2e", "a%2fb", "%00"):
        assert 400 <= server.ask("PUT", f"/namespaces/default/functions/{name}", good).status < 500
    assert server.ask("POST", "/packages", b"not a zip").status == 400
    assert server.ask("GET", "/functions").json() == before


def test_openapi_describes_the_plane_that_is_there(server: Server):
    """Every path that it names answers, and every reference in it leads somewhere."""
    document = server.ask("GET", "/openapi.json").json()
    schemas = document["components"]["schemas"]

    def references(value: object) -> set[str]:
        if isinstance(value, dict):
            own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
            return own.union(*map(references, value.values()))
        return set().union(*map(references, value)) if isinstance(value, list) else set()

    assert document["openapi"].startswith("3.1")
    assert {r.rpartition("/")[2] for r in references(document)} <= schemas.keys()
    assert all(r.startswith("#/components/schemas/") for r in references(document))
    for path, operations in document["paths"].items():
        if "get" in operations:
            real = path.replace("{namespace}", "default").replace("{name}", "nobody")
            status = server.ask("GET", real).status

            assert str(status) in operations["get"]["responses"], (path, status)
    assert {"FunctionSpec", "EnvironmentSpec", "Problem"} <= schemas.keys()


def test_metrics_count_what_happens(server: Server):
    """By function and outcome, by kind of start; sandboxes by phase; the build."""
    name = server.deploy("hello", "counted")
    server.call(name)
    server.call(name)
    text = server.ask("GET", "/metrics").body.decode()

    labels = f'{{function="default/{name}",outcome="Success"}}'
    assert server.metric(f"dayfly_invocations_total{labels}") == 2
    assert server.metric('dayfly_starts_total{start="warm"}') >= 1
    for family in (
        "dayfly_phase_seconds_bucket",
        "dayfly_sandboxes{",
        "dayfly_sandboxes_created_total",
        "dayfly_pool_misses",
        "dayfly_waiting",
        "dayfly_build_info{",
    ):
        assert family in text
    server.delete(name)
    assert name not in server.ask("GET", "/metrics").body.decode()


def test_the_log_of_the_server_is_one_json_object_a_line(server: Server):
    """With the same names everywhere, for every change of a sandbox's life."""
    server.call(server.deploy("hello", "logged"))

    def specialized() -> list[dict[str, object]]:
        lines = [json.loads(line) for line in list(server.log)]
        ours = [line for line in lines if line.get("function") == "default/logged"]
        return [line for line in ours if line["message"] == "sandbox specialized"]

    (line,) = eventually(specialized)
    assert {"time", "level", "logger", "message", "sandbox", "took_s"} <= set(line)
