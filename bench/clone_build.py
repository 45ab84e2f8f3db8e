"""Clone, then build: as two tasks beside their data, as one merged by hand, with a copy between.

    python -m bench.clone_build [MB]

A git repository of MB (200) megabytes, 2,000 Python files and the rest in files of 8 MB, is made by
a run of its own, as a bundle: an artifact, which all the others take from there. `clone` is
`git clone` of it. `build` reads every file: it compiles the Python files and leaves a manifest
with the sha256 of each. Three ways, in turns, from the run's beginning to its end:

one task     both in one sandbox, in a folder that goes with it: what an author gets who rewrites
             two tasks into one
two tasks    each in its own sandbox; what one cloned the other finds in a workspace, which is kept
             and made durable between the two
a volume     the same two; what was cloned is copied into the workspace, file by file: what a volume
             costs at its best, on the same disk and with no network
"""

import json
import sys
import time
from datetime import datetime
from typing import Any

from bench import harness

TURNS, RATIO_MAX = 3, 1.05
SOURCES, SOURCE_FUNCTIONS, LARGE_BYTES = 2000, 16, 8_000_000
MEMORY_MB = 2048
WAYS = {"one": "one task, merged by hand", "two": "two tasks", "volume": "two tasks and a volume"}
STEPS = f"""
import hashlib, os, shutil, subprocess, time

WORKSPACE = "/workspaces/source/repository"
FUNCTION = '''
def step_{{number}}(items, limit={{number}}):
    found = []
    for item in items:
        if item > limit and item % {{number}}:
            found.append((item, str(item).rjust(limit)))
        else:
            found.append((limit, "none of these"))
    return dict(found)
'''


def git(*words, **options):
    own = {{"HOME": "/tmp", "GIT_CONFIG_NOSYSTEM": "1"}}
    for who in ("AUTHOR", "COMMITTER"):
        own |= {{f"GIT_{{who}}_NAME": "bench", f"GIT_{{who}}_EMAIL": "bench@localhost"}}
    done = subprocess.run(["git", *words], env=os.environ | own, capture_output=True, text=True,
                          **options)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


def make(event, context):
    place = "/out/repository"
    os.makedirs(f"{{place}}/large")
    for folder in range({SOURCES} // 100):
        os.makedirs(f"{{place}}/source/{{folder}}")
    for number in range({SOURCES}):
        with open(f"{{place}}/source/{{number // 100}}/m{{number}}.py", "w") as file:
            for function in range({SOURCE_FUNCTIONS}):
                file.write(FUNCTION.format(number=number + function + 1))
    for number in range(event["large"]):
        with open(f"{{place}}/large/{{number}}", "wb") as file:
            file.write(os.urandom({LARGE_BYTES}))
    git("init", "-q", "-b", "main", place)
    git("-c", "core.compression=0", "add", ".", cwd=place)
    git("commit", "-q", "-m", "all", cwd=place)
    git("-c", "pack.compression=0", "bundle", "create", "-q", "/out/bundle", "HEAD", cwd=place)
    shutil.rmtree(place)
    return os.stat("/out/bundle").st_size


def _clone(place):
    git("clone", "-q", "/in/bundle", place)


def _build(place):
    told = []
    for folder, folders, names in os.walk(place):
        folders[:] = sorted(name for name in folders if name != ".git")
        for name in sorted(names):
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                content = file.read()
            if name.endswith(".py"):
                compile(content, path, "exec")
            told.append((hashlib.sha256(content).hexdigest(), os.path.relpath(path, place)))
    with open("/out/manifest", "w") as file:
        for digest, path in told:
            file.write(f"{{digest}}  {{path}}\\n")
    return len(told)


def one(event, context):
    _clone("/out/repository")
    return _build("/out/repository")


def clone(event, context):
    _clone(WORKSPACE)


def clone_and_copy(event, context):
    _clone("/out/repository")
    copied = 0

    def copy(source, target):
        nonlocal copied
        copied += os.stat(source).st_size
        shutil.copy2(source, target)

    shutil.copytree("/out/repository", WORKSPACE, symlinks=True, copy_function=copy)
    return copied


def build(event, context):
    return _build(WORKSPACE)
"""


def declare(server: harness.Server, name: str, *steps: dict[str, Any], **spec: Any) -> None:
    """Have a workflow."""
    path = f"/namespaces/default/workflows/{name}"
    server.admin("PUT", path, json.dumps({"steps": steps} | spec).encode())


def workflows(server: harness.Server) -> None:
    """Declare all of them; each step is a function, for its memory."""
    package = server.upload(STEPS)
    for name in ("make", "one", "clone", "clone_and_copy", "build"):
        limits = {"memoryMb": MEMORY_MB, "cpu": 2}
        function = name.replace("_", "-")
        server.deploy(function, package, handler=f"main:{name}", limits=limits, timeoutSeconds=600)
    make = {"name": "make", "function": "make", "params": {"large": "$(params.large)"}}
    declare(
        server,
        "make",
        make | {"outputs": [{"name": "bundle"}]},
        params=[{"name": "large", "type": "integer"}],
        results={"bundle": "$(steps.make.outputs.bundle)", "bytes": "$(steps.make.results.result)"},
    )
    params = [{"name": "bundle", "type": "artifact"}]
    bundle = {"inputs": {"bundle": "$(params.bundle)"}}
    left = {"outputs": [{"name": "manifest"}]}
    source = {"workspaces": {"source": "source"}}
    build = {"name": "build", "function": "build", "runAfter": ["clone"]} | source | left
    results = {
        "files": "$(steps.build.results.result)",
        "manifest": "$(steps.build.outputs.manifest)",
        "copied": "$(steps.clone.results.result)",
    }
    one = {"name": "build", "function": "one"} | bundle | left
    del_copied = {name: told for name, told in results.items() if name != "copied"}
    declare(server, "one", one, params=params, results=del_copied)
    for name, function in (("two", "clone"), ("volume", "clone-and-copy")):
        first = {"name": "clone", "function": function} | bundle | source
        spec = {"params": params, "results": results, "workspaces": ["source"]}
        declare(server, name, first, build, **spec)


def run(server: harness.Server, name: str, **params: Any) -> dict[str, Any]:
    """A run's results, with its `seconds`, `sandboxes`, and `moved` in bytes."""
    before = specialized(server)
    path = f"/namespaces/default/workflows/{name}/runs"
    started = server.admin("POST", path, json.dumps({"params": params}).encode())
    path = f"/namespaces/default/runs/{started['metadata']['name']}"
    while not (found := server.admin("GET", f"{path}?brief"))["status"]["endedAt"]:
        time.sleep(0.05)
    status = found["status"]
    if status["state"] != "Succeeded":
        raise RuntimeError(json.dumps(found))
    results: dict[str, Any] = status["results"]
    began, ended = (datetime.fromisoformat(status[word]) for word in ("startedAt", "endedAt"))
    tree = server.admin("GET", path)["view"]["tree"]
    moved = sum(step.get("bytesMoved", 0) for step in [tree, *tree["children"]])
    return results | {
        "seconds": (ended - began).total_seconds(),
        "sandboxes": specialized(server) - before,
        "moved": moved + (results.get("copied") or 0),
    }


def specialized(server: harness.Server) -> int:
    """How many sandboxes have become a function's."""
    return server.log.read_text().count('"sandbox specialized"')


def main(megabytes: int) -> None:
    """Measure and report."""
    report = harness.Report("clone_build")
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with harness.server() as server:
        workflows(server)
        large = max(1, (megabytes * 1_000_000 - SOURCES * 5000) // LARGE_BYTES)
        made = run(server, "make", large=large)
        report.row("the repository's bundle", bytes=made["bytes"])
        for way in WAYS:
            run(server, way, bundle=made["bundle"])
        for _ in range(TURNS):
            for way, found in runs.items():
                found.append(run(server, way, bundle=made["bundle"]))
    manifests = {each["manifest"]["sha256"] for found in runs.values() for each in found}
    files = {each["files"] for found in runs.values() for each in found}
    if len(manifests) > 1 or files != {SOURCES + large}:
        raise RuntimeError(f"they have not built the same, or not all of it: {files} files")
    seconds = {way: [each["seconds"] for each in found] for way, found in runs.items()}
    for way, what in WAYS.items():
        last = runs[way][-1]
        report.row(
            what,
            seconds=round(harness.median(seconds[way]), 2),
            least=round(min(seconds[way]), 2),
            sandboxes=last["sandboxes"],
            bytes_moved=last["moved"],
        )
    pairs = zip(seconds["two"], seconds["one"], strict=True)
    ratio = harness.median([two / one for two, one in pairs])
    report.bar("two tasks / one", ratio, RATIO_MAX)
    pairs = zip(seconds["volume"], seconds["one"], strict=True)
    report.row("with a volume / one", seconds=round(harness.median([a / b for a, b in pairs]), 2))
    report.bar("two tasks: bytes moved", max(each["moved"] for each in runs["two"]), 0)
    report.finish()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
