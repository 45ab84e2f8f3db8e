"""What runs have left, fetched at the command line."""

import os
import subprocess
from pathlib import Path

from tests.acceptance.test_runs import Flows
from tests.harness import Server

LEAVES = """
from dayfly import Folder, out, step, workflow


@step(outputs=("page",))
def leave() -> Folder:
    out("page").write_text("for people\\n")
    (out() / "below").mkdir(parents=True)
    (out() / "below" / "a.txt").write_text("a")
    (out() / "run.sh").write_text("#!/bin/sh\\necho ran\\n")
    (out() / "run.sh").chmod(0o755)
    (out() / "link").symlink_to("below/a.txt")
    return out()


@workflow
def leaves():
    return leave()
"""


def test_what_a_run_has_left_is_written_to_new_files(server: Server, tmp_path: Path) -> None:
    flows = Flows(server, tmp_path)
    (tmp_path / "leaves.py").write_text(LEAVES)
    flows("workflow", "deploy", "leaves.py")
    folder = flows.start("leaves", "--name", "leaves-1")["status"]["results"]["result"]["uri"]

    flows("artifact", "get", folder, "-o", "got")
    got = tmp_path / "got"
    assert (got / "below" / "a.txt").read_text() == "a"
    assert os.readlink(got / "link") == "below/a.txt"
    assert subprocess.check_output([got / "run.sh"]) == b"ran\n"
    assert "is there already" in flows("artifact", "get", folder, "-o", "got", code=2)


def test_what_is_no_artifact_is_refused_in_words(server: Server, tmp_path: Path) -> None:
    flows = Flows(server, tmp_path)
    gone = f"dayfly://default/file/sha256/{'0' * 64}"

    assert "is no artifact: give dayfly://" in flows("artifact", "get", "report.md", code=2)
    assert "not stored" in flows("artifact", "get", gone, code=1)
    assert os.listdir(tmp_path) == []
