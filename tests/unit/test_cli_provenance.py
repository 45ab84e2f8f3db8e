"""`dayfly provenance`: what it shows, what it believes, how it ends."""

import base64
import hashlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dayfly_gateway.cli import cli
from dayfly_gateway.client import Misused
from dayfly_gateway.digests import digest_of, manifest
from dayfly_pool.workflow.facts import Artifact
from dayfly_pool.workflow.provenance import Observed, StepSeen, statement
from dayfly_pool.workflow.signing import InstallationKey

ROOT = Path(__file__).parents[2]
REPORT = b"<h1>Report</h1>\n"
HOSTILE = "\x1b[2Jreport"


def artifact(kind: str, digest: str) -> Artifact:
    return Artifact(f"dayfly://default/{kind}/sha256/{digest}", digest)


def observed(folder_digest: str) -> Observed:
    outputs = {
        HOSTILE: artifact("file", hashlib.sha256(REPORT).hexdigest()),
        "site": artifact("tree", folder_digest),
    }
    made = StepSeen(
        key="make", body="script", outputs=outputs, build_outputs=(HOSTILE, "site"),
        inputs={"raw": artifact("file", "5" * 64)}, was_cached=True, cached_from="r0",
    )  # fmt: skip
    return Observed(
        run="r1", namespace="default", workflow="forecast", definition_sha256="d" * 64,
        version="0.1.0", began_at=1.0, ended_at=2.0, status="Succeeded", by="ada",
        params={"city": "Köln"}, steps=(made,),
    )  # fmt: skip


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "page.html").write_bytes(REPORT)
    (folder / "a-b").write_text("sorted before a/page.html")
    (folder / "run").write_text("#!/bin/sh\n")
    (folder / "run").chmod(0o755)
    (folder / "zwölf 12").symlink_to("a/../a")
    return folder


@pytest.fixture
def there(tmp_path: Path, site: Path) -> Path:
    """A folder with an envelope, its key, and what it is about."""
    key = InstallationKey(tmp_path / "data")
    envelope = key.sign(statement(observed(digest_of(site)["dayflyTreeV1"])))
    (tmp_path / "provenance.json").write_bytes(envelope)
    (tmp_path / "key.pem").write_bytes(key.public_pem)
    (tmp_path / "report.html").write_bytes(REPORT)
    return tmp_path


def dayfly(*args: str | Path, url: str = "http://127.0.0.1:9") -> Result:
    clean = {"DAYFLY_URL": url, "DAYFLY_TOKEN": None, "DAYFLY_NAMESPACE": None}
    return CliRunner().invoke(cli, ["provenance", *map(str, args)], env=clean, prog_name="dayfly")


def verify(there: Path, *args: str | Path) -> Result:
    return dayfly("verify", there / "provenance.json", "--key", there / "key.pem", *args)


# ---- verify -------------------------------------------------------------------------------------


def test_a_file_is_verified_without_a_server(there: Path):
    done = verify(there)

    assert (done.exit_code, done.stderr) == (0, "")
    assert "verified: run r1, 2 subjects" in done.stdout


def test_a_file_that_is_a_subject_is_named(there: Path):
    done = verify(there, "--artifact", there / "report.html", "--json")

    assert json.loads(done.stdout)["subjects"] == [f"make/{HOSTILE}"]


def test_a_folder_that_is_a_subject_is_named(there: Path):
    done = verify(there, "--artifact", there / "site")

    assert "site is make/site" in done.stdout


def test_a_file_that_was_changed_is_none_of_its_subjects(there: Path):
    (there / "report.html").write_bytes(REPORT + b" ")
    done = verify(there, "--artifact", there / "report.html")

    assert done.exit_code == 1
    assert "none of its 2 subjects" in done.stderr


@pytest.mark.parametrize("change", ["mode", "content", "name", "link", "more"])
def test_a_folder_in_which_anything_was_changed_is_no_subject(there: Path, change: str):
    match change:
        case "mode":
            (there / "site" / "run").chmod(0o644)
        case "content":
            (there / "site" / "a" / "page.html").write_text("other")
        case "name":
            (there / "site" / "run").rename(there / "site" / "walk")
        case "link":
            (there / "site" / "zwölf 12").unlink()
            (there / "site" / "zwölf 12").symlink_to("b")
        case _:
            (there / "site" / "more").mkdir()

    assert verify(there, "--artifact", there / "site").exit_code == 1


def test_the_manifest_of_a_folder_as_a_file_is_not_the_folder(there: Path):
    """They have the same sha256."""
    (there / "manifest").write_bytes(manifest(there / "site"))

    assert verify(there, "--artifact", there / "manifest").exit_code == 1


def test_a_changed_envelope_is_not_believed(there: Path):
    envelope = json.loads((there / "provenance.json").read_bytes())
    payload = base64.b64decode(envelope["payload"]).replace(b'"by', b'"bz')
    envelope["payload"] = base64.b64encode(payload + b" ").decode()
    (there / "provenance.json").write_text(json.dumps(envelope))
    done = verify(there)

    assert done.exit_code == 1
    assert "was changed" in done.stderr
    assert done.stderr.count("\n") == 1


def test_another_key_is_not_believed(there: Path):
    (there / "key.pem").write_bytes(InstallationKey(there / "other").public_pem)

    assert verify(there).exit_code == 1


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[" * 100_000])
def test_what_is_no_envelope_is_misuse_and_no_traceback(there: Path, content: bytes):
    (there / "provenance.json").write_bytes(content)
    done = verify(there)

    assert done.exit_code == 2
    assert "DSSE envelope" in done.stderr


@pytest.mark.parametrize("name", ["nothing.json", "no/where"])
def test_a_file_that_is_not_there_is_not_asked_for_as_a_run(there: Path, name: str):
    done = dayfly("verify", name, "--key", there / "key.pem")

    assert done.exit_code == 2
    assert "there is no file" in done.stderr


def test_without_a_key_nothing_is_verified(there: Path):
    assert dayfly("verify", there / "provenance.json").exit_code == 2


# ---- show ---------------------------------------------------------------------------------------


def test_what_a_run_says_is_shown_to_people(there: Path):
    done = dayfly("show", there / "provenance.json")

    assert done.exit_code == 0
    for said in ("default/forecast", "ada", "Köln", "SUBJECTS", "make/site", "dayflyTreeV1:",
                 "DEPENDENCIES", "make/raw", "definition", "STEPS", "cached, by r0"):  # fmt: skip
        assert said in done.stdout
    assert "\x1b[2J" not in done.stdout


def test_in_json_it_is_the_statement(there: Path):
    envelope = json.loads((there / "provenance.json").read_bytes())
    done = dayfly("show", there / "provenance.json", "--json")

    assert json.loads(done.stdout) == json.loads(base64.b64decode(envelope["payload"]))


class Admin(BaseHTTPRequestHandler):
    """Answers as the admin plane does."""

    answers: dict[str, bytes]

    def do_GET(self) -> None:
        """One answer."""
        body = self.answers.get(self.path, b"")
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def url(there: Path) -> Iterator[str]:
    envelope, key = (there / "provenance.json").read_bytes(), (there / "key.pem").read_bytes()
    answers = {"/namespaces/default/runs/r1/provenance": envelope, "/provenance/key": key}
    with HTTPServer(("127.0.0.1", 0), type("Of", (Admin,), {"answers": answers})) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_of_a_run_it_is_asked_of_the_server(url: str, there: Path):
    envelope = (there / "provenance.json").read_bytes()

    assert dayfly("show", "r1", "--envelope", url=url).stdout_bytes == envelope
    assert dayfly("key", url=url).stdout_bytes == (there / "key.pem").read_bytes()
    assert "verified" in dayfly("verify", "r1", "--key", there / "key.pem", url=url).stdout


# ---- digests ------------------------------------------------------------------------------------


def test_the_page_says_how_a_folders_digest_is_made(site: Path):
    """Literally: what is printed there is what is run here."""
    page = (ROOT / "docs" / "provenance.md").read_text()
    block = page.split("```bash\n")[1].partition("```")[0]
    done = subprocess.run(
        ["/bin/bash", "-e", "-c", block], cwd=site, capture_output=True, check=True, timeout=30
    )

    assert done.stdout.decode().split()[0] == digest_of(site)["dayflyTreeV1"]


def test_what_can_be_in_no_artifact_has_no_digest(site: Path):

    os.mkfifo(site / "pipe")
    for path in (site, site / "pipe"):
        with pytest.raises(Misused, match="neither a file nor a folder"):
            digest_of(path)
