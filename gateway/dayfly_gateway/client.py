"""The admin API's client: standard library HTTP, and every failure in one line with its remedy."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import quote, urlencode, urlsplit

import click

from dayfly_pool.errors import PlatformError

if TYPE_CHECKING:
    from http.client import HTTPConnection, HTTPResponse

CONNECT_S_MAX: Final = 10.0
ANSWER_S_MAX: Final = 120.0
CHUNK_BYTES: Final = 256 << 10
LINE_BYTES_MAX: Final = 1 << 20
JSON_TYPE: Final = "application/json"
Uploaded = Callable[[int, int], None]


class Told(click.ClickException):
    """What the command ends with: one line on stderr, and an exit code. 1: somebody said no."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))

    def show(self, file: Any = None) -> None:
        """One line; nothing in it moves the cursor."""
        click.echo(f"dayfly: {printable(self.message)}", err=True)


class Misused(Told):
    """The command was given something that cannot work; nothing was sent."""

    exit_code = 2


class Unreachable(Told):
    """No Dayfly server answered."""

    exit_code = 3


class Problem(Told):
    """The server said no; *document* is what it sent (RFC 9457)."""

    def __init__(self, status: int, document: Mapping[str, Any]) -> None:
        title, detail = document.get("title"), document.get("detail")
        super().__init__(str(detail or title or f"the server answered {status}"))
        self.status, self.document = status, document

    @property
    def is_of_the_function(self) -> bool:
        """Whether user code failed, and not the platform."""
        return "traceback" in self.document


class Reply(NamedTuple):
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def printable(text: str) -> str:
    """*text* without what could command a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def sentence(error: PlatformError) -> str:
    """One of our own errors: what happened, then the remedy."""
    first = (error.detail or error.title()).rstrip(".")
    end = "" if first.endswith("?") else "."
    return f"{first}{end} {error.remedy()}" if error.remedy() else first


class Client:
    """Speaks to one server's admin plane. A connection a call: calls are rare, and may be long."""

    def __init__(self, url: str, token: str = "") -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
            raise Misused(f"{url!r} is not a URL: give http://HOST:PORT with --url")
        if not (token.isascii() and token.isprintable()):
            raise Misused("the token holds characters that no token has: give another file")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self.host = parts.hostname
        self._is_tls, self._port, self._prefix = parts.scheme == "https", port, parts.path
        import http.client  # noqa: F401 - 20 ms that no timing of a call shall hold

        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    # ---- verbs ----------------------------------------------------------------------------------

    def functions(self) -> list[dict[str, Any]]:
        """Every function, as the API shows it."""
        return self._listed("/functions")

    def environments(self) -> list[dict[str, Any]]:
        """Every environment."""
        return self._listed("/environments")

    def function(self, namespace: str, name: str) -> dict[str, Any]:
        """One function."""
        return self._document("GET", _path(namespace, "functions", name))

    def pool(self) -> dict[str, Any]:
        """The pool's counts and sandboxes."""
        return self._document("GET", "/pool")

    def live(self) -> dict[str, Any]:
        """The server's version and, where it says so, its data plane's address (`http`)."""
        return self._document("GET", "/live")

    def put_package(self, archive: bytes, uploaded: Uploaded) -> str:
        """Upload a package; returns its digest."""
        body = _chunks(archive, uploaded)
        headers = {"Content-Type": "application/zip", "Content-Length": str(len(archive))}
        answer = self._document("POST", "/packages", body, headers)
        return str(answer.get("digest"))

    def put_function(self, namespace: str, name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Declare a function; returns it as the API shows it."""
        return self._document("PUT", _path(namespace, "functions", name), json.dumps(spec).encode())

    def put_environment(
        self, namespace: str, name: str, spec: Mapping[str, Any], progress: Callable[[str], None]
    ) -> dict[str, Any]:
        """Build an environment; *progress* gets the server's sentences."""
        path = _path(namespace, "environments", name)
        with self.stream("PUT", path, json.dumps(spec).encode()) as lines:
            for line in lines:
                answer = json.loads(line)
                if "problem" in answer:
                    raise Problem(answer["problem"].get("status", 500), answer["problem"])
                if "environment" in answer:
                    return _mapping(answer["environment"])
                progress(str(answer.get("progress", "")))
        raise Told(f"{self.url} ended the build without a result: see the server's log")

    def triggers(self) -> list[dict[str, Any]]:
        """Every trigger."""
        return self._listed("/triggers")

    def put_trigger(self, namespace: str, name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Declare a trigger; returns it as the API shows it."""
        return self._document("PUT", _path(namespace, "triggers", name), json.dumps(spec).encode())

    def secrets(self) -> list[dict[str, Any]]:
        """The name of every secret."""
        return self._listed("/secrets")

    def put_secret(self, namespace: str, name: str, text: bytes) -> None:
        """Keep a secret."""
        self.call("PUT", _path(namespace, "secrets", name), text)

    def delete(self, namespace: str, kind: str, name: str) -> None:
        """Delete what is declared; *kind* is in the plural."""
        self.call("DELETE", _path(namespace, kind, name))

    def invoke(self, namespace: str, name: str, event: bytes) -> Reply:
        """Run a function once. Raises `Problem`; it may take as long as the function may."""
        path = _path(namespace, "functions", name) + "/invocations"
        return self.call("POST", path, event, timeout_s=None)

    def accept(self, namespace: str, name: str, event: bytes, key: str) -> str:
        """Have a function run later; returns the invocation's id."""
        headers = {"Prefer": "respond-async"} | ({"Idempotency-Key": key} if key else {})
        path = _path(namespace, "functions", name) + "/invocations"
        return str(self._document("POST", path, event, headers).get("id"))

    def events(self, **which: str) -> list[dict[str, Any]]:
        """A page of accepted events, the newest first."""
        return self._listed(f"/events?{urlencode(which)}")

    def event(self, id_: str) -> dict[str, Any]:
        """One event with its payload."""
        return self._document("GET", f"/events/{quote(id_, safe='')}")

    def cancel(self, id_: str) -> dict[str, Any]:
        """End an event unless it is over; as it was before, with `cancelled`."""
        return self._document("POST", f"/events/{quote(id_, safe='')}/cancel")

    def redrive(self, namespace: str, name: str, ids: Sequence[str]) -> int:
        """Let dead events of a function wait again, all if there are no *ids*; how many."""
        body = json.dumps({"ids": list(ids)} if ids else {}).encode()
        path = _path(namespace, "functions", name) + "/redrive"
        return int(self._document("POST", path, body).get("redriven", 0))

    def provenance(self, namespace: str, run: str) -> bytes:
        """The signed envelope of a run that is over, as it was signed."""
        return self.call("GET", _path(namespace, "runs", run) + "/provenance").body

    def provenance_key(self) -> bytes:
        """The public key that the server signs with, as PEM."""
        return self.call("GET", "/provenance/key").body

    def logs(
        self, namespace: str, name: str, tail: int, *, kind: str = "functions", **which: str
    ) -> list[dict[str, Any]]:
        """Its last lines, the oldest first."""
        asked = urlencode({"tail": str(tail)} | which)
        return self._listed(f"{_path(namespace, kind, name)}/logs?{asked}")

    def follow(
        self, namespace: str, name: str, tail: int, *, kind: str = "functions", **which: str
    ) -> Iterator[dict[str, Any]]:
        """Its last lines, then every new one."""
        asked = urlencode({"tail": str(tail), "follow": "1"} | which)
        path = f"{_path(namespace, kind, name)}/logs?{asked}"
        with self.stream("GET", path) as lines:
            for line in lines:
                if line.startswith(b"data: "):
                    yield _mapping(json.loads(line[6:]))

    def workflows(self) -> list[dict[str, Any]]:
        """Every workflow."""
        return self._listed("/workflows")

    def put_spec(
        self, namespace: str, kind: str, name: str, spec: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Declare something that has nothing but a spec; *kind* is in the plural."""
        return self._document("PUT", _path(namespace, kind, name), json.dumps(spec).encode())

    def start_run(self, namespace: str, workflow: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Begin a run."""
        path = _path(namespace, "workflows", workflow) + "/runs"
        return self._document("POST", path, json.dumps(wanted).encode())

    def workflow(self, namespace: str, name: str) -> dict[str, Any]:
        """One workflow with its spec."""
        return self._document("GET", _path(namespace, "workflows", name))

    def runs(self, **which: str) -> list[dict[str, Any]]:
        """A page of runs, the newest first."""
        return self._listed(f"/runs?{urlencode(which)}")

    def run(self, namespace: str, name: str) -> dict[str, Any]:
        """One run."""
        return self._document("GET", _path(namespace, "runs", name))

    def run_over(self, namespace: str, name: str, wait_s: int) -> dict[str, Any]:
        """One run, without its steps; when it is over, or after *wait_s*, at most 60."""
        path = _path(namespace, "runs", name)
        return self._document("GET", f"{path}?brief=1&wait={wait_s}")

    def run_logs(self, namespace: str, name: str, step: str, tail: int) -> list[dict[str, Any]]:
        """The last lines that its steps wrote."""
        which = urlencode({"step": step, "tail": str(tail)})
        return self._listed(f"{_path(namespace, 'runs', name)}/logs?{which}")

    def artifact(self, namespace: str, kind: str, digest: str, path: str = "") -> bytes:
        """What a file holds, or the file at *path* of a folder."""
        which = f"?{urlencode({'path': path})}" if path else ""
        where = f"/namespaces/{quote(namespace, '')}/artifacts/{kind}/{digest}{which}"
        return self.call("GET", where, timeout_s=None).body

    def artifact_entries(self, namespace: str, digest: str) -> list[dict[str, Any]]:
        """What is in a folder."""
        return self._listed(f"/namespaces/{quote(namespace, '')}/artifacts/tree/{digest}")

    def cancel_run(self, namespace: str, name: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """End a run."""
        path = _path(namespace, "runs", name) + "/cancel"
        return self._document("POST", path, json.dumps(wanted).encode())

    def retry_run(self, namespace: str, name: str) -> dict[str, Any]:
        """Begin another one, with what succeeded in this."""
        return self._document("POST", _path(namespace, "runs", name) + "/retry")

    def decide(self, namespace: str, name: str, decision: Mapping[str, Any]) -> None:
        """Approve or refuse."""
        path = _path(namespace, "runs", name) + "/decisions"
        self.call("POST", path, json.dumps(decision).encode())

    def queues(self) -> list[dict[str, Any]]:
        """Every queue."""
        return self._listed("/queues")

    def put_queue(self, namespace: str, name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Declare a queue; returns it as the API shows it."""
        return self._document("PUT", _path(namespace, "queues", name), json.dumps(spec).encode())

    def jobs(self, **which: str) -> list[dict[str, Any]]:
        """A page of jobs, the newest first."""
        return self._listed(f"/jobs?{urlencode(which)}")

    def job(self, namespace: str, name: str, *, is_brief: bool = False) -> dict[str, Any]:
        """One job; if *is_brief*, without what each of its tasks has come to."""
        path = _path(namespace, "jobs", name)
        return self._document("GET", f"{path}?brief=1" if is_brief else path)

    def put_job(self, namespace: str, name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Have a job run."""
        return self._document("PUT", _path(namespace, "jobs", name), json.dumps(spec).encode())

    def put_job_items(self, namespace: str, name: str, lines: Iterable[bytes]) -> dict[str, Any]:
        """Have a job run: of *lines* the first is its spec, each other one an item."""
        headers = {"Content-Type": "application/x-ndjson"}
        return self._document("PUT", _path(namespace, "jobs", name), lines, headers, None)

    def change_job(self, namespace: str, name: str, change: Mapping[str, Any]) -> dict[str, Any]:
        """Suspend, resume, cancel or scale a job."""
        return self._document("PATCH", _path(namespace, "jobs", name), json.dumps(change).encode())

    def retry_job(self, namespace: str, name: str, new_name: str) -> dict[str, Any]:
        """Begin another job with all that has not succeeded in this."""
        path = _path(namespace, "jobs", name) + "/retry"
        return self._document("POST", path, json.dumps({"name": new_name}).encode())

    def job_results(self, namespace: str, name: str, index: int | None) -> Iterator[str]:
        """What its tasks returned, a line of JSON each."""
        which = "" if index is None else f"&index={index}"
        after = "0"
        while after:
            path = f"{_path(namespace, 'jobs', name)}/results?after={after}{which}"
            reply = self.call("GET", path)
            # by newlines alone: a text in a result may have what else ends a line
            yield from filter(None, reply.body.decode().split("\n"))
            after = reply.headers.get("Dayfly-After", "")

    # ---- the wire -------------------------------------------------------------------------------

    def call(
        self,
        method: str,
        path: str,
        body: bytes | Iterable[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = ANSWER_S_MAX,
    ) -> Reply:
        """One request, one whole answer. Raises `Problem` or `Told`."""
        with self._exchange(method, path, body, headers, timeout_s) as response:
            return Reply(response.status, dict(response.getheaders()), response.read())

    @contextmanager
    def stream(
        self, method: str, path: str, body: bytes | None = None
    ) -> Iterator[Iterator[bytes]]:
        """One request; the answer's lines as they come."""
        with self._exchange(method, path, body, None, None) as response:
            yield _lines(response)

    def _document(self, *request: Any) -> dict[str, Any]:
        return _mapping(self._decoded(self.call(*request).body))

    def _listed(self, path: str) -> list[dict[str, Any]]:
        found = self._decoded(self.call("GET", path).body)
        return [_mapping(item) for item in found] if isinstance(found, list) else []

    def _decoded(self, body: bytes) -> Any:
        try:
            return json.loads(body)
        except ValueError:
            raise Told(f"{self.url} did not answer with JSON: is it Dayfly's admin URL?") from None

    @contextmanager
    def _exchange(
        self,
        method: str,
        path: str,
        body: bytes | Iterable[bytes] | None,
        headers: Mapping[str, str] | None,
        timeout_s: float | None,
    ) -> Iterator["HTTPResponse"]:
        with self._translated(), closing(self._connected()) as connection:
            connection.sock.settimeout(timeout_s)
            sent = {"Content-Type": JSON_TYPE, **self._headers, **(headers or {})}
            try:
                connection.request(method, self._prefix.rstrip("/") + path, body, sent)
            except (BrokenPipeError, ConnectionResetError):
                pass  # refused before all was sent: the answer says why
            with connection.getresponse() as response:
                if response.status >= 400:
                    raise _problem(self.url, response)
                yield response

    def _connected(self) -> "HTTPConnection":
        from http.client import HTTPConnection, HTTPSConnection

        kind = HTTPSConnection if self._is_tls else HTTPConnection
        connection = kind(self.host, self._port, timeout=CONNECT_S_MAX)
        connection.connect()
        return connection

    @contextmanager
    def _translated(self) -> Iterator[None]:
        from http.client import HTTPException

        try:
            yield
        except ConnectionRefusedError:
            raise Unreachable(
                f"no server at {self.url}: start one with `dayfly up`, or name it with --url"
            ) from None
        except TimeoutError:
            why = "did not answer in time: is it the admin plane's address, and not overloaded?"
            raise Unreachable(f"{self.url} {why}") from None
        except HTTPException as error:
            why = f"broke off its answer ({type(error).__name__}): look at the server's log"
            raise Unreachable(f"{self.url} {why}") from None
        except OSError as error:
            why = error.strerror or str(error)
            raise Unreachable(f"cannot reach {self.url} ({why}): correct --url") from None


def _problem(url: str, response: "HTTPResponse") -> Told:
    content = response.read(LINE_BYTES_MAX)
    try:
        document = json.loads(content)
    except ValueError:
        document = None
    if isinstance(document, dict) and "title" in document:
        return Problem(response.status, document)
    return Told(f"{url} answered {response.status}: is it Dayfly's admin URL? Name it with --url")


def _lines(response: "HTTPResponse") -> Iterator[bytes]:
    while line := response.readline(LINE_BYTES_MAX):
        yield line.rstrip(b"\r\n")


def _chunks(archive: bytes, uploaded: Uploaded) -> Iterator[bytes]:
    for start in range(0, len(archive), CHUNK_BYTES):
        yield archive[start : start + CHUNK_BYTES]
        uploaded(min(start + CHUNK_BYTES, len(archive)), len(archive))


def _path(namespace: str, kind: str, name: str) -> str:
    return f"/namespaces/{quote(namespace, '')}/{kind}/{quote(name, '')}"


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
