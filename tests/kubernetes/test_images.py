"""The images: what is in them is all that they need, and little else."""

import subprocess
from pathlib import Path

import pytest
from tests.kubernetes import images

RUNTIME_BYTES_MAX = 60 * 1024 * 1024


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> images.Image:
    return images.runtime(tmp_path_factory.mktemp("runtime"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> images.Image:
    return images.server(tmp_path_factory.mktemp("server"))


def inside(image: images.Image, *command: str) -> str:
    """What *command* prints with the image as its root: read-only, no capabilities, no network."""
    jail = ["bwrap", "--unshare-all", "--uid", "65532", "--gid", "65532", "--cap-drop", "ALL"]
    jail += ["--ro-bind", str(image.root), "/", "--proc", "/proc", "--dev", "/dev"]
    jail += ["--clearenv", "--setenv", "PATH", "/usr/local/bin:/usr/bin:/bin"]
    done = subprocess.run([*jail, *command], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_sandbox_starts_from_its_image_alone(runtime: images.Image):
    """Its own parts, and the standard library's modules in C, find all their libraries."""
    modules = "dayfly.__main__, dayfly.lockdown, msgpack, ssl, sqlite3, lzma, bz2, ctypes, uuid"
    code = f"import sys; sys.path.append('/dayfly'); import {modules}; print(dayfly.__file__)"

    said = inside(runtime, "python3", "-I", "-S", "-X", "utf8", "-c", code)

    assert said == "/dayfly/dayfly/__init__.py"


def test_nothing_is_compiled_when_a_sandbox_starts(runtime: images.Image):
    """Nobody can write there, so each start would pay for it."""
    sources = [*runtime.root.rglob("dayfly/**/*.py")]
    compiled = {path.parents[1] / path.name.partition(".")[0] for path in _compiled(runtime.root)}

    assert len(sources) > 10
    assert {path.with_suffix("") for path in sources} <= compiled


def test_scripts_find_in_a_sandbox_what_they_count_on(runtime: images.Image):
    script = "seq 3 | sort -r | awk '{s += $1} END {print s}' | sed s/6/six/ | tr a-z A-Z"

    assert inside(runtime, "/bin/sh", "-ec", script).strip() == "SIX"


def _compiled(root: Path) -> list[Path]:
    return [*root.rglob("*.pyc")]


def test_the_image_of_a_sandbox_is_small_and_holds_no_other_packages(runtime: images.Image):
    """Each node pulls it before its first sandbox; what is in it, every user's code can use."""
    size = sum(p.stat().st_size for p in runtime.root.rglob("*") if not p.is_symlink())

    assert size < RUNTIME_BYTES_MAX
    assert not [*runtime.root.rglob("site-packages")]
    assert not [*runtime.root.rglob("usr/bin/perl")]
    assert {path.name for path in (runtime.root / "dayfly").iterdir()} == {
        "dayfly", "msgpack", "seccomp.bpf", "seccomp-zygote.bpf",
    }  # fmt: skip


def test_the_server_starts_from_its_image_alone(server: images.Image):
    """With every broker's client, the cluster's, PostgreSQL's, and uv."""
    said = inside(server, *server.command, "--version")
    modules = "aiokafka, aiomqtt, nats, aio_pika, redis, aiobotocore, psycopg, kubernetes.aio"
    uv = inside(server, "python3", "-c", f"import uv, {modules}; print(uv.find_uv_bin())")

    assert said.startswith("dayfly ")
    assert uv == "/usr/local/bin/uv"


def test_no_tool_of_the_tests_is_in_the_server_image(server: images.Image):
    site = next(server.root.rglob("site-packages"))

    assert not {"pytest", "mypy", "hypothesis", "locust"} & {p.name for p in site.iterdir()}
