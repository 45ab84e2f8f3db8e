"""Several servers on one PostgreSQL: what is declared at one is declared at all."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from tests.faults.proxy import Proxy
from tests.harness import Server, eventually, pack, together
from tests.servers import Postgres

pytestmark = pytest.mark.waits

SAYS = "def handler(event, context):\n    return {word!r}\n"


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with Postgres() as started:
        yield started


@pytest.fixture
def dsn(postgres: Postgres, request: pytest.FixtureRequest) -> str:
    """A database of this test's own."""
    name = f"of_{abs(hash(request.node.name))}"
    with psycopg.connect(postgres.dsn, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return postgres.dsn.replace("dbname=postgres", f"dbname={name}")


@pytest.fixture
def sharing(dsn: str, tmp_path: Path, new_server: Callable[..., Server]) -> Callable[..., Server]:
    """Starts a server that keeps everything there."""

    def start(name: str, *arguments: str, dsn: str = dsn) -> Server:
        file = tmp_path / f"dsn-{name}"
        file.write_text(dsn)
        file.chmod(0o600)
        return new_server(
            "--events-dsn-file", str(file), *arguments, data=tmp_path / name, driver="process"
        )

    return start


def deploy(server: Server, word: str, name: str = "says", **spec: Any) -> None:
    server.deploy(name, files={"main.py": SAYS.format(word=word)}, **spec)


def says(server: Server, name: str = "says") -> Any:
    """What the function answers, or the status that it does not."""
    answer = server.call(name)
    return answer.body.decode() if answer.status == 200 else answer.status


def forgive(server: Server, words: str) -> None:
    """A line of its log with these *words* is no defect: the test has done that."""
    server.log[:] = [line for line in server.log if words not in line]


def test_what_is_deployed_at_one_answers_at_the_other_and_so_until_it_is_deleted(
    sharing: Callable[..., Server],
):
    one, other = sharing("one"), sharing("other")
    deploy(one, "hello", routes=[{"path": "/greeting"}])
    assert eventually(lambda: says(other) == "hello")
    assert other.ask("GET", "/greeting", plane="http").body == b"hello"

    deploy(other, "good day")
    assert says(other) == "good day"
    assert eventually(lambda: says(one) == "good day")
    assert one.describe("says")["status"]["version"] == 2

    assert one.delete("says").status == 204
    assert eventually(lambda: says(other) == 404)


def test_a_server_that_was_killed_has_all_when_it_comes_back(sharing: Callable[..., Server]):
    """What was declared before, and what was declared or deleted meanwhile."""
    one, other = sharing("one"), sharing("other")
    deploy(one, "before")
    deploy(one, "gone", "gone")
    assert eventually(lambda: (says(other), says(other, "gone")) == ("before", "gone"))
    other.kill(signal.SIGKILL)
    other.wait()
    deploy(one, "meanwhile", "new")
    assert one.delete("gone").status == 204
    other.start()

    assert says(other) == "before"
    assert eventually(lambda: says(other, "new") == "meanwhile")
    assert says(other, "gone") == 404


def test_a_server_that_is_new_has_all_that_the_others_have(sharing: Callable[..., Server]):
    """With an empty folder of its own."""
    one = sharing("one")
    deploy(one, "hello")
    queue = {"quota": {"tasks": 3}}
    done = one.ask("PUT", "/namespaces/default/queues/night", queue)
    assert done.status == 200, done.body
    other = sharing("other")

    assert eventually(lambda: says(other) == "hello")
    queues = [server.ask("GET", "/queues").json() for server in (one, other)]
    assert queues[0] == queues[1]
    assert [queue["spec"]["quota"] for queue in queues[1]] == [{"tasks": 3}]


def test_a_server_that_was_cut_off_serves_on_and_catches_up(
    sharing: Callable[..., Server], dsn: str, postgres: Postgres
):
    """It refuses to declare anything meanwhile, and afterwards is as the others are."""
    with Proxy(postgres.port) as way:
        one = sharing("one")
        other = sharing("other", dsn=dsn.replace(f"port={postgres.port}", f"port={way.port}"))
        deploy(one, "before")
        assert eventually(lambda: says(other) == "before")
        way.cut()
        deploy(one, "after")
        deploy(one, "new", "new")
        assert says(other) == "before"
        refused = other.delete("says")
        assert (refused.status, refused.json()["error"]) == (503, "StoreFailed")
        way.mend()

        assert eventually(lambda: says(other) == "after", 30)
        assert eventually(lambda: says(other, "new") == "new")
        forgive(other, "cannot be written")


def test_a_server_that_hears_nothing_and_is_not_told_so_catches_up(
    sharing: Callable[..., Server], dsn: str, postgres: Postgres
):
    """No connection ends: it stands still. What is deployed is served meanwhile."""
    with Proxy(postgres.port) as way:
        one = sharing("one")
        other = sharing("other", dsn=dsn.replace(f"port={postgres.port}", f"port={way.port}"))
        deploy(one, "before")
        assert eventually(lambda: says(other) == "before")
        way.hold()
        deploy(one, "after")
        noticed = "we do not know what others declare"
        assert eventually(lambda: any(noticed in line for line in list(other.log)), 60)
        assert says(other) == "before"
        way.mend()

        assert eventually(lambda: says(other) == "after", 60)
        forgive(other, "cannot be written")


def test_two_that_deploy_the_same_name_at_once_end_with_one_version(
    sharing: Callable[..., Server],
):
    """The later one, at both."""
    one, other = sharing("one"), sharing("other")
    for n in range(5):
        together(2, lambda i, n=n: deploy((one, other)[i], f"{n} by {i}"))
        assert eventually(lambda: says(one) == says(other))
        assert one.describe("says")["status"]["version"] == 2 * (n + 1)


def test_a_package_that_is_damaged_or_gone_here_is_fetched_again(
    sharing: Callable[..., Server], tmp_path: Path
):
    """Tree and archive: the folder is a cache. What is fetched is what its digest says."""
    one, other = sharing("one"), sharing("other")
    deploy(one, "hello")
    deploy(one, "bye", "bye")
    assert eventually(lambda: (says(other), says(other, "bye")) == ("hello", "bye"))
    other.stop()
    packages = tmp_path / "other" / "packages"
    for archive in packages.glob("archives/*.zip"):
        archive.write_bytes(b"damaged")
    for source in packages.glob("unpacked/*/main.py"):
        source.write_text("raise SystemExit('this is not what was uploaded')\n")
    other.start()

    assert eventually(lambda: (says(other), says(other, "bye")) == ("hello", "bye"))


def test_what_can_not_be_had_here_is_refused_with_the_reason(
    sharing: Callable[..., Server], dsn: str
):
    """Its package is damaged where all keep it: never run, and told from what is not there."""
    one = sharing("one")
    deploy(one, "hello")
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("UPDATE dayfly.package_pieces SET content = 'PK'")
    other = sharing("other")
    refused = eventually(lambda: (r := other.call("says")).status == 503 and r)

    assert refused.json()["error"] == "NotReadyHere"
    deploy(one, "hello")  # the same again repairs it
    assert eventually(lambda: says(other) == "hello", 40)


def test_what_a_server_lacks_is_known_by_the_time_that_it_is_referred_to(
    sharing: Callable[..., Server],
):
    """Whoever has been told that a function is there may declare its trigger anywhere."""
    one, other = sharing("one"), sharing("other")
    for n in range(10):
        deploy(one, "hello", f"f{n}")
        trigger = {"function": f"f{n}", "cron": {"schedule": "0 0 1 1 *"}}
        done = other.ask("PUT", f"/namespaces/default/triggers/t{n}", trigger)
        assert done.status == 200, done.body
    assert eventually(lambda: len(one.ask("GET", "/triggers").json()) == 10)


def test_mounted_secrets_are_read_and_not_changed(sharing: Callable[..., Server], tmp_path: Path):
    mounted = tmp_path / "secrets" / "default"
    mounted.mkdir(parents=True)
    (mounted / "login").write_text("user:word\n")
    server = sharing("one", "--secrets", str(mounted.parent))
    refused = server.ask("PUT", "/namespaces/default/secrets/login", b"other")

    assert (refused.status, refused.json()["error"]) == (409, "SecretsAreMounted")
    assert server.ask("GET", "/secrets").json() == [{"namespace": "default", "name": "login"}]
    assert (mounted / "login").read_text() == "user:word\n"


SIX = {"requirements": "six\n"}


def build(server: Server) -> None:
    """An environment `six` that holds the library."""
    reply = server.ask("PUT", "/namespaces/default/environments/six", SIX, timeout_s=110)
    assert b'"environment"' in reply.body.splitlines()[-1], reply.body


def test_an_environment_is_built_at_every_server_as_it_was_resolved_at_the_first(
    sharing: Callable[..., Server], tmp_path: Path
):
    """Its function moves there when it is; also when it is declared where it is not built yet."""
    one, other = sharing("one"), sharing("other")
    build(one)
    one.deploy("requires", environment="six")
    other.deploy("requires", "there", environment="six")
    assert other.invoke("there").json()["six"] == "1.17.0"
    assert eventually(lambda: other.invoke("requires").status == 200, 60)

    told = other.invoke("requires").json()
    assert (told["six"], one.invoke("requires").json()["six"]) == ("1.17.0", "1.17.0")
    assert str(tmp_path / "other") in told["file"]
    other.kill(signal.SIGKILL)
    other.wait()
    other.start()
    assert eventually(lambda: other.invoke("requires").status == 200, 60)


def test_a_function_whose_environment_cannot_be_built_here_says_why(
    sharing: Callable[..., Server], new_server: Callable[..., Server], tmp_path: Path, dsn: str
):
    """It is answered where it can be, and nobody takes it for one that is not there."""
    one = sharing("one")
    build(one)
    one.deploy("requires", environment="six")
    lost = {"UV_DEFAULT_INDEX": "http://127.0.0.1:9/simple", "UV_HTTP_RETRIES": "0"}
    lost |= {"UV_CACHE_DIR": str(tmp_path / "cache")}
    arguments = ("--events-dsn-file", str(tmp_path / "dsn-one"))
    other = new_server(*arguments, data=tmp_path / "other", driver="process", env=lost)

    def told() -> str:
        reply = other.invoke("requires")
        assert (reply.status, reply.json()["error"]) == (503, "NotReadyHere")
        return reply.json()["detail"] if "six" in reply.json()["detail"] else ""

    assert eventually(told, 30)
    assert one.invoke("requires").status == 200


def test_a_job_goes_on_at_another_server_with_the_package_that_it_was_made_with(
    sharing: Callable[..., Server],
):
    """Which only the server that was killed has needed until then."""
    one, other = sharing("one"), sharing("other")
    digest = one.ask("POST", "/packages", pack({"only-here.txt": "1"})).json()["digest"]
    spec = {"package": digest, "script": "sleep 0.1", "size": 60, "parallelism": 2}
    made = one.ask("PUT", "/namespaces/default/jobs/naps", spec)
    assert made.status == 201, made.body

    def status(server: Server) -> Any:
        return server.ask("GET", "/namespaces/default/jobs/naps").json()["status"]

    assert eventually(lambda: status(one)["succeeded"])
    one.kill(signal.SIGKILL)
    one.wait()

    assert eventually(lambda: status(other)["endedAt"], 60)
    assert status(other)["succeeded"] == 60
    assert list((other.data / "packages" / "unpacked").glob(digest))
    one.start()
