"""The guest's program as files: our runtime and msgpack, copied and compiled once a version."""

import compileall
import hashlib
import json
import os
import py_compile
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgpack

import dayfly
from dayfly import seccomp
from dayfly_pool.models import Environment

ETC_COPIED: Final = (
    "alternatives",
    "ld.so.cache",
    "localtime",
    "mime.types",
    "ssl/certs/ca-certificates.crt",
    "ssl/openssl.cnf",
)
ETC_WRITTEN: Final = {
    "passwd": "root:x:0:0::/:/bin/sh\nfunction:x:1000:1000::/tmp:/bin/sh\n",
    "group": "root:x:0:\nfunction:x:1000:\n",
    "hostname": "dayfly\n",
    "hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "resolv.conf": "",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "services": "",
    "protocols": "",
    "gai.conf": "",
}
STORES: Final = {
    "artifacts": "artifacts/objects",
    "steps": "steps/steps",
    "layers": "workspaces/layers",
}
"""What steps' folders are mounted from, below the data folder: see `dayfly_pool.workflow`."""

SECCOMP: Final = "seccomp.bpf"
ZYGOTE_SECCOMP: Final = "seccomp-zygote.bpf"
BOOT: Final = "import sys; sys.path.append({root!r}); from dayfly.__main__ import main; main()"


def install(data: Path) -> Path:
    """The folder with `dayfly` and `msgpack`, made below *data* unless it is there."""
    sources = [Path(str(module.__file__)).parent for module in (dayfly, msgpack)]
    digest = hashlib.sha256(sys.version.encode())
    for source in sources:
        for file in sorted(source.rglob("*")):
            if file.suffix in (".py", ".so"):
                digest.update(file.name.encode() + file.read_bytes())
    target = data / "guest" / digest.hexdigest()[:16]
    if target.exists():
        return target
    building = target.with_name(f"{target.name}.{os.getpid()}")
    for source in sources:
        shutil.copytree(
            source, building / source.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyi")
        )
    if (machine := os.uname().machine) in seccomp.ALLOWED:
        (building / SECCOMP).write_bytes(seccomp.program(machine))
        (building / ZYGOTE_SECCOMP).write_bytes(seccomp.program(machine, zygote=True))
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    compileall.compile_dir(
        building, quiet=2, stripdir=building, prependdir="/", invalidation_mode=mode
    )
    _open_to_all(building)
    building.rename(target)
    return target


def install_etc(data: Path) -> Path:
    """The sandboxes' /etc: what programs need of this machine's, and no account of its users.

    One folder, because each file bound by itself costs every sandbox half a millisecond.
    """
    target = data / "etc"
    building = data / f"etc.{os.getpid()}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    for name in ETC_COPIED:
        source = Path("/etc", name)
        if source.is_dir():
            shutil.copytree(source, building / name, symlinks=True)
        elif source.exists():
            (building / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, building / name)
    for name, text in ETC_WRITTEN.items():
        (building / name).write_text(text)
    _open_to_all(building)
    shutil.rmtree(target, ignore_errors=True)
    building.rename(target)
    return target


def install_stores(data: Path) -> None:
    """The folders that steps' are mounted from: those in them can be reached, not listed."""
    for store in STORES.values():
        (data / store).mkdir(parents=True, exist_ok=True)
        (data / store).chmod(0o711)


def _open_to_all(folder: Path) -> None:
    for place, _, files in os.walk(folder):
        os.chmod(place, 0o755)
        for name in files:
            if not os.path.islink(os.path.join(place, name)):
                os.chmod(os.path.join(place, name), 0o644)


def command(
    python: str,
    root: str,
    packages: str,
    libraries: str,
    environment: Environment,
    *,
    isolated: bool,
    limit_memory: bool,
    zygote: bool = False,
    has_network: bool = False,
    stores: dict[str, str] | None = None,
    pod: Mapping[str, Any] | None = None,
) -> list[str]:
    """The guest's, or a zygote's, command line; nothing in it is secret, user code may read it.

    *stores* are those of artifacts and steps, where it may be told to mount from them;
    *pod* is its porter's post, where it is in one.
    """
    settings = {
        "isolated": isolated,
        "seccomp": f"{root}/{SECCOMP}",
        "zygote_seccomp": f"{root}/{ZYGOTE_SECCOMP}",
        "packages": packages,
        "libraries": [libraries] if environment.path or environment.image else [],
        "preload": list(environment.preload) if environment.early else [],
        "late": [],
        "limit_memory": limit_memory,
        "zygote": zygote,
        "has_network": has_network,
        "stores": stores or {},
        "pod": pod,
        "parcel": environment.parcel.digest if pod and environment.parcel else "",
    }
    boot = BOOT.format(root=root)
    return [python, "-I", "-S", "-X", "utf8", "-c", boot, json.dumps(settings)]
