"""`dayfly environment build`: the Dockerfile of an environment's image."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from dayfly_gateway.cli import cli
from dayfly_gateway.cli_environments import Recipe, dockerfile

GOLDEN = Path(__file__).parents[1] / "golden" / "environment.Dockerfile"
RECIPE = Recipe(
    image="registry.example.com/thumbs:1",
    locked=f"humanize==4.12.0 --hash=sha256:{'a' * 64}\n"
    f"tzdata==2025.2 ; sys_platform == 'win32' --hash=sha256:{'b' * 64}\n",
    runtime="registry.example.com/dayfly-runtime:0.1.0",
    uv="0.8.0",
    python="3.11",
)


def test_the_dockerfile_is_as_reviewed() -> None:
    """Write it anew with DAYFLY_TEST_GOLDEN=1, and look at the difference."""
    made = dockerfile(RECIPE, "Dockerfile")
    if os.environ.get("DAYFLY_TEST_GOLDEN"):
        GOLDEN.write_text(made)

    assert made == GOLDEN.read_text()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "requirements.txt").write_text("six==1.17.0\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def build(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, ["environment", "build", *arguments])
    return done.exit_code, done.output


def test_what_is_listed_is_locked_by_hash(folder: Path) -> None:
    """And the next steps are said."""
    code, said = build(".", "--image", "thumbs:1")
    text = (folder / "Dockerfile").read_text()

    assert code == 0, said
    assert "six==1.17.0 --hash=sha256:" in text
    assert "docker build -t thumbs:1 - < Dockerfile" in said
    assert 'environments: {ENVIRONMENT: "thumbs:1"}' in said
    assert build(".", "--image", "thumbs:2")[0] == 0, "its own it writes again"


def test_the_shell_of_the_dockerfile_builds_the_folder(folder: Path) -> None:
    """Its RUN line, as a builder would run it, but below this folder."""
    _, said = build(".", "--image", "thumbs:1=-")
    lines = said[said.index("<<'LOCKED'") :].splitlines()
    end = lines.index("LOCKED")
    (folder / "locked.txt").write_text("\n".join(lines[1:end]) + "\n")
    run = "\n".join(lines[end + 1 :]).partition("\n\n")[0].removeprefix("RUN ")
    run = run.replace("/requirements.txt", str(folder / "locked.txt"))
    run = run.replace("/environment", str(folder / "made")).replace("--no-cache ", "")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path}
    subprocess.run(["sh", "-ec", run], check=True, capture_output=True, timeout=100, env=env)
    made = folder / "made"

    assert (made / "six.py").is_file()
    (compiled,) = made.rglob("six.*.pyc")
    assert compiled.read_bytes()[4:8] == b"\1\0\0\0"
    assert not (made / ".lock").exists()


def test_a_dockerfile_of_ones_own_is_left_alone(folder: Path) -> None:
    (folder / "Dockerfile").write_text("FROM scratch\n")
    code, said = build(".", "--image", "thumbs:1")

    assert code == 2
    assert "is there already" in said
    assert (folder / "Dockerfile").read_text() == "FROM scratch\n"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((".", "--image", "a b"), "is no image"),
        ((".", "--image", "-x"), "is no image"),
        ((".", "--image", "a", "--runtime", "a\nRUN x"), "is no image"),
        (("nothing", "--image", "a"), "No such file"),
        (("empty.txt", "--image", "a"), "lists nothing"),
        (("bad.txt", "--image", "a"), "is an option"),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, arguments: tuple[str, ...], why: str) -> None:
    """And nothing is written."""
    (folder / "empty.txt").write_text("# nothing\n")
    (folder / "bad.txt").write_text("--index-url https://example.com\n")
    code, said = build(*arguments)

    assert code == 2
    assert why in said
    assert not (folder / "Dockerfile").exists()


def test_it_explains_itself_by_example() -> None:
    assert "dayfly environment build examples/humanize --image" in build("--help")[1]
