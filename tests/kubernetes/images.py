"""The images that the two Dockerfiles make, as plain folders, for machines without Docker.

They hold what this interpreter runs with: the interpreter itself, its libraries, the packages of
the lock and the project's own, at the places where the Dockerfiles put them. A third one is
Debian's PostgreSQL, which knows those settings of Docker's official image that the chart gives.

    python -m tests.kubernetes.images FOLDER          make the folders
    python -m tests.kubernetes.images FOLDER --load   ... and hand each to the cluster

What brings them into a cluster is a command of the machine's, which $DAYFLY_TEST_IMAGE_LOADER
names. It is given an image's name, its folder, and the command that its containers run. The tag is
$DAYFLY_TEST_IMAGE_TAG, or `test`.
"""

import compileall
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Final, NamedTuple

from dayfly_pool.drivers import guest

ROOT: Final = Path(__file__).parents[2]
LOADER: Final = "DAYFLY_TEST_IMAGE_LOADER"
TAG: Final = os.environ.get("DAYFLY_TEST_IMAGE_TAG", "test")
PYTHON: Final = f"python{sys.version_info.major}.{sys.version_info.minor}"
SCRIPT: Final = "#!/usr/local/bin/python3 -I\nfrom dayfly_gateway.cli import main\nmain()\n"
UNUSED: Final = shutil.ignore_patterns(
    "config-*", "ensurepip", "idlelib", "lib2to3", "site-packages", "test", "tests", "tkinter",
    "turtledemo", "*.opt-[12].pyc", "_test*.so", "_ctypes_test*", "_xxtest*", "xxlimited*",
    "_tkinter*",
)  # fmt: skip
ACCOUNTS: Final = {
    "passwd": "root:x:0:0::/:/nologin\ndayfly:x:65532:65532::/tmp:/nologin\n",
    "group": "root:x:0:\ndayfly:x:65532:\n",
}
CERTIFICATES: Final = {
    "usr/lib/ssl/cert.pem": "/etc/ssl/certs/ca-certificates.crt",
    "usr/lib/ssl/openssl.cnf": "/etc/ssl/openssl.cnf",
}
POSTGRES: Final = "dayfly-postgres-entrypoint"
PROGRAMS: Final = (
    "bash", "coreutils", "dash", "diffutils", "findutils", "grep", "gzip", "mawk", "sed", "tar",
)  # fmt: skip
"""Debian's packages of what scripts count on, as Python's official image has them."""


class Image(NamedTuple):
    """A root file system, and what its containers run."""

    name: str
    root: Path
    command: list[str]


def runtime(root: Path, name: str = f"dayfly-runtime:{TAG}", more: tuple[str, ...] = ()) -> Image:
    """The generic sandbox: the interpreter, a shell, `dayfly` and msgpack, and nothing else.

    But for *more*: Debian's packages of programs, as somebody's own image may have them.
    """
    _interpreter(root)
    _programs(root, (*PROGRAMS, *more))
    with tempfile.TemporaryDirectory() as building:
        made = guest.install(Path(building))
        shutil.copytree(made, root / "dayfly")
    _libraries(root, [root / "dayfly", root / "usr/bin"])
    return Image(name, root, ["python3"])  # the pool gives each pod its command


def server(root: Path, name: str = f"dayfly:{TAG}") -> Image:
    """Gateway and pool: the interpreter, what requirements/server.txt names, and the project."""
    _interpreter(root)
    site = root / "usr/local/lib" / PYTHON / "site-packages"
    for wanted in _distributions():
        _install(wanted, site, root / "usr/local/bin")
    for package in ("runtime/dayfly", "pool/dayfly_pool", "gateway/dayfly_gateway"):
        source = ROOT / package
        shutil.copytree(source, site / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(site, quiet=2, workers=0)
    _script(root / "usr/local/bin/dayfly", SCRIPT)
    _libraries(root, [site])
    return Image(name, root, ["dayfly"])


def postgres(root: Path, name: str = f"dayfly-postgres:{TAG}") -> Image:
    """PostgreSQL as Debian packages it, on the interpreter. Raises `FileNotFoundError`."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        raise FileNotFoundError("no PostgreSQL in /usr/lib/postgresql: install postgresql")
    home = found[-1].parents[1]
    share = Path("/usr/share/postgresql", home.name)
    _interpreter(root)
    for folder in (home, share):
        shutil.copytree(folder, root / folder.relative_to("/"), ignore=_not_for_a_server)
    shutil.copytree("/usr/share/zoneinfo", root / "usr/share/zoneinfo", symlinks=True)
    _copy_file(Path("/bin/sh"), root)  # initdb runs its programs with it
    text = Path(__file__).with_name("postgres_entrypoint.py").read_text()
    _script(root / "usr/local/bin" / POSTGRES, f"#!/usr/local/bin/python3 -I\n{text}")
    (root / "var/run/postgresql").mkdir(parents=True)
    _libraries(root, [root / home.relative_to("/"), root / "usr/bin"])
    return Image(name, root, [POSTGRES])


ALL: Final = (runtime, server, postgres)


def load(image: Image) -> None:
    """Bring *image* into the cluster. Raises `CalledProcessError`, `KeyError` without a loader."""
    command = [*shlex.split(os.environ[LOADER]), image.name, str(image.root), *image.command]
    subprocess.run(command, check=True, timeout=300, cwd=ROOT)


# ---- what the images are made of ----------------------------------------------------------------


def _interpreter(root: Path) -> None:
    """Below /usr/local, as in Python's official image; with the /etc of a sandbox."""
    for alias in ("bin", "lib", "lib64", "sbin"):
        (root / "usr" / alias).mkdir(parents=True)
        (root / alias).symlink_to(f"usr/{alias}")
    for folder in ("usr/local/bin", "usr/local/lib", "proc", "sys", "dev"):
        (root / folder).mkdir(parents=True)
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    standard = Path(os.__file__).parent
    shutil.copytree(standard, root / "usr/local/lib" / PYTHON, symlinks=True, ignore=UNUSED)
    compileall.compile_dir(root / "usr/local/lib" / PYTHON, quiet=2, workers=0)
    program = root / "usr/local/bin" / PYTHON
    shutil.copyfile(Path(sys.executable).resolve(), program)
    program.chmod(0o755)
    for alias in ("python3", "python"):
        program.with_name(alias).symlink_to(PYTHON)
    guest.install_etc(root)
    for name, text in ACCOUNTS.items():
        (root / "etc" / name).write_text(text)
    for path, target in CERTIFICATES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).symlink_to(target)
    _libraries(root, [root / "usr/local"])
    if strip := shutil.which("strip"):  # a Python that was built here may have what debuggers want
        found = [path for path in root.rglob("*") if _is_elf(path)]
        subprocess.run([strip, "--strip-unneeded", *found], check=True)


def _programs(root: Path, packages: Iterable[str] = PROGRAMS) -> None:
    """The programs of *packages*, as far as they are on this machine."""
    for package in packages:
        listed = Path(f"/var/lib/dpkg/info/{package}.list")
        for line in listed.read_text().splitlines() if listed.exists() else ():
            path = Path(line)
            if path.parent.name == "bin" and path.is_symlink():
                target = root / path.parent.resolve().relative_to("/") / path.name
                target.symlink_to(path.readlink())
            elif path.parent.name == "bin" and path.is_file():
                _copy_file(path, root)
    awk = root / "usr/bin/awk"  # an alternative, which no package lists
    if not awk.is_symlink() and (root / "usr/bin/mawk").exists():
        awk.symlink_to("mawk")


def _libraries(root: Path, places: Iterable[Path]) -> None:
    """Every library of this machine's that a program or library below *places* asks for."""
    objects = [path for place in places for path in place.rglob("*") if _is_elf(path)]
    said = subprocess.run(["ldd", *objects], capture_output=True, text=True, check=False).stdout
    for found in {*re.findall(r"(?:=> |^\s)(/\S+) \(0x", said, re.M)}:
        if not Path(found).is_relative_to(root):
            _copy_file(Path(found), root)
    for lazily in ("libgcc_s.so.1", "libnss_files.so.2", "libnss_dns.so.2"):
        for path in Path("/usr/lib").glob(f"*-linux-gnu/{lazily}"):
            _copy_file(path, root)


def _copy_file(path: Path, root: Path) -> None:
    """To the same place, its folder's links resolved, so that nothing has to be linked."""
    target = root / path.parent.resolve().relative_to("/") / path.name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)


def _is_elf(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def _distributions() -> list[metadata.Distribution]:
    """What the lock names, but for what it names for other machines."""
    found = []
    for line in (ROOT / "requirements/server.txt").read_text().splitlines():
        if match := re.match(r"([A-Za-z0-9._-]+)==\S+ (; )?", line):
            try:
                found.append(metadata.distribution(match[1]))
            except metadata.PackageNotFoundError:
                if not match[2]:
                    raise
    return found


def _install(wanted: metadata.Distribution, site: Path, programs: Path) -> None:
    for file in wanted.files or ():
        source = Path(str(file.locate()))
        if file.suffix == ".pyi" or not source.exists():  # pip names what was compiled, and is gone
            continue
        target = programs / file.name if ".." in file.parts else site / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _not_for_a_server(folder: str, names: list[str]) -> set[str]:
    if Path(folder).name == "bin":
        return set(names) - {"initdb", "postgres"}
    return {name for name in names if name.startswith(("bitcode", "llvmjit", "pgxs"))}


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def main() -> None:
    """Make them all, below the folder that the command line names."""
    folder = Path(sys.argv[1]).resolve()
    for make in ALL:
        shutil.rmtree(folder / make.__name__, ignore_errors=True)
        image = make(folder / make.__name__)
        print(image.name, image.root, shlex.join(image.command), sep="\t", flush=True)
        if "--load" in sys.argv:
            load(image)


if __name__ == "__main__":
    main()
