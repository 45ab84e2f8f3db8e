"""Hand-over: what it costs that a step's files become the next one's; and branches side by side.

    python -m bench.handover [MIB]

File: a step writes a file of MIB (1,024) and says when its handler ended; the next has it as an
input and says when its handler began. Between the two the first sandbox dies, the file is sealed
and hashed, made durable, named in the run's journal, and mounted in another sandbox. Two things of
this are the machine's and not ours, and are measured in the same run, on the same disk, in turns
with the hand-overs: the sha256 of such a file by hashlib, and how long its bytes take to the disk
(`fsync`), each of a file that has just been written in the same way. Both can go on at
the same time, so the least is the longer of the two. That nothing was copied is seen in the file:
the second step finds the inode that the first one wrote.

Stream: the same with `stream: true`, whose bytes are hashed and stored while they are written: how
long the step takes that only writes (to /out, and nothing is made of it), how long with the stream,
and the gap between the two steps.

Tree: 2,000 files of 4 KiB in place of one. Branches: 8 steps beside each other that each add and
change files in one workspace, and one after them that counts what it finds.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from bench import harness

TURNS, GAP_MS_MAX = 5, 5.0
MEMORY_MB = 2048
"""Of the step that writes: what is in the page cache for it counts as its memory, and what goes
from there has to be read again to be hashed."""

CHUNK_BYTES = 1 << 20
FILES, FILE_BYTES = 2000, 4096
BRANCHES, CHANGES = 8, 250
STEPS = f"""
import os, time




def nothing(event, context):
    return None


def write(event, context):
    block, began = os.urandom(1 << 20), time.time()
    if not os.path.exists("/out/data"):
        open("/out/none", "x").close()
    with open("/out/data", "wb", buffering=0) as file:
        for number in range(event["mib"]):
            left = memoryview(block[number:] + block[:number])
            while left:  # a pipe takes what it has room for
                left = left[file.write(left):]
    found = os.stat("/out/data")
    return {{"inode": found.st_ino, "began": began, "ended": time.time()}}


def read(event, context):
    began = time.time()
    found = os.stat("/in/data")
    return {{"began": began, "inode": found.st_ino, "bytes": found.st_size}}


def tree(event, context):
    block = os.urandom(1 << 20)
    os.mkdir("/out/data")
    for number in range({FILES}):
        with open(f"/out/data/{{number}}", "wb") as file:
            file.write(block[number : number + {FILE_BYTES}])
    return {{"inode": os.stat("/out/data/0").st_ino, "ended": time.time()}}


def read_tree(event, context):
    began = time.time()
    inode, number = os.stat("/in/data/0").st_ino, len(os.listdir("/in/data"))
    return {{"began": began, "inode": inode, "files": number}}


def base(event, context):
    for number in range({BRANCHES}):
        with open(f"/workspaces/shared/base-{{number}}", "w") as file:
            file.write("as it was")
    return {{"ended": time.time()}}


def branch(event, context):
    number = event["number"]
    for change in range({CHANGES}):
        with open(f"/workspaces/shared/{{number}}-{{change}}", "w") as file:
            file.write(f"{{number}} {{change}}")
    with open(f"/workspaces/shared/base-{{number}}", "w") as file:
        file.write(f"changed by {{number}}")


def count(event, context):
    began = time.time()
    wanted = {{f"base-{{n}}": f"changed by {{n}}" for n in range({BRANCHES})}}
    for n in range({BRANCHES}):
        wanted |= {{f"{{n}}-{{change}}": f"{{n}} {{change}}" for change in range({CHANGES})}}
    found = {{}}
    for name in os.listdir("/workspaces/shared"):
        with open(f"/workspaces/shared/{{name}}") as file:
            found[name] = file.read()
    lost = sum(found.get(name) != text for name, text in wanted.items())
    return {{"lost": lost, "changes": len(wanted), "began": began}}
"""


def declare(server: harness.Server, name: str, *steps: dict[str, Any], **spec: Any) -> None:
    """Have a workflow of these steps, whose results are what `first` and `second` return."""
    told = {step["name"]: f"$(steps.{step['name']}.results.result)" for step in steps}
    results = {name: told[name] for name in ("first", "second") if name in told}
    body = {"package": server.upload(STEPS), "steps": steps, "results": results} | spec
    path = f"/namespaces/default/workflows/{name}"
    server.admin("PUT", path, json.dumps(body).encode())


def run(server: harness.Server, name: str, **params: Any) -> dict[str, Any]:
    """What a run of it results in, when it is over; with `gap_s`, and `moved` in bytes."""
    path = f"/namespaces/default/workflows/{name}/runs"
    started = server.admin("POST", path, json.dumps({"params": params}).encode())
    path = f"/namespaces/default/runs/{started['metadata']['name']}"
    while not (found := server.admin("GET", f"{path}?brief"))["status"]["endedAt"]:
        time.sleep(0.02)
    if found["status"]["state"] != "Succeeded":
        raise RuntimeError(json.dumps(found))
    view = server.admin("GET", path)["view"]["tree"]
    moved = sum(step.get("bytesMoved", 0) for step in [view, *view["children"]])
    results: dict[str, Any] = found["status"]["results"]
    first, second = results["first"], results.get("second", results["first"])
    gap_s = second.get("began", first["ended"]) - first["ended"]
    return results | {"gap_s": gap_s, "moved": moved}


def workflows(server: harness.Server) -> None:
    """Declare them all."""
    limits = {"memoryMb": MEMORY_MB}
    server.deploy("write", server.upload(STEPS), handler="main:write", limits=limits)
    mib = {"params": [{"name": "mib", "type": "integer"}]}
    first = {"name": "first", "function": "write", "params": {"mib": "$(params.mib)"}}
    data = {"data": "$(steps.first.outputs.data)"}
    second = {"name": "second", "handler": "main:read", "inputs": data}
    file, stream = {"name": "data"}, {"name": "data", "stream": True}
    spare = {"name": "none", "path": "none"}
    declare(server, "file", first | {"outputs": [file]}, second, **mib)
    declare(server, "stream", first | {"outputs": [stream]}, second, **mib)
    declare(server, "write", first | {"outputs": [spare]}, **mib)
    tree = {"name": "first", "handler": "main:tree", "outputs": [file]}
    declare(server, "tree", tree, second | {"handler": "main:read_tree"})
    shared = {"workspaces": {"shared": "shared"}}
    numbers = {"params": {"number": list(range(BRANCHES))}}
    declare(
        server,
        "branches",
        {"name": "first", "handler": "main:base"} | shared,
        {"name": "branch", "handler": "main:branch", "matrix": numbers}
        | shared
        | {"runAfter": ["first"]},
        {"name": "second", "handler": "main:count", "runAfter": ["branch"]} | shared,
        workspaces=["shared"],
    )


def floors(folder: str, mib: int) -> tuple[float, float]:
    """Seconds that sha256 of a file takes that has just been written; and that the disk does."""
    block = os.urandom(CHUNK_BYTES)
    place = Path(folder) / "floor"
    took = []
    for work in (lambda file: hashlib.file_digest(file, "sha256"), os.fsync):
        with place.open("w+b", buffering=0) as file:
            for number in range(mib):
                file.write(block[number:] + block[:number])
            file.seek(0)
            started = time.perf_counter()
            work(file)
            took.append(time.perf_counter() - started)
        place.unlink()
    return took[0], took[1]


def files(server: harness.Server, report: harness.Report, mib: int) -> None:
    """A file, and the same as a stream, in turns with what the machine needs for them."""
    found: dict[str, list[dict[str, Any]]] = {"write": [], "file": [], "stream": []}
    hashed, synced = [], []
    for _ in range(TURNS):
        for name, runs in found.items():
            runs.append(run(server, name, mib=mib))
        hashed_s, synced_s = floors(server.data, mib)
        hashed.append(hashed_s)
        synced.append(synced_s)
    wrote = {
        name: harness.median([r["first"]["ended"] - r["first"]["began"] for r in runs])
        for name, runs in found.items()
    }
    gap = {name: harness.median([r["gap_s"] for r in runs]) for name, runs in found.items()}
    copied = sum(r["first"]["inode"] != r["second"]["inode"] for r in found["file"])
    moved = sum(r["moved"] for r in found["file"])
    hash_s, sync_s = harness.median(hashed), harness.median(synced)
    besides = harness.median([r["gap_s"] - s for r, s in zip(found["file"], hashed, strict=True)])
    what = f"{mib} MiB"
    report.row(f"sha256 of {what}, just written", ms=milliseconds(hash_s))
    report.row(f"fsync of {what}", ms=milliseconds(sync_s))
    report.row(f"a step writes {what}", ms=milliseconds(wrote["write"]))
    report.row(f"{what}, file", ms=milliseconds(wrote["file"]), gap_ms=milliseconds(gap["file"]))
    report.row(
        f"{what}, stream", ms=milliseconds(wrote["stream"]), gap_ms=milliseconds(gap["stream"])
    )
    total = {name: wrote[name] + gap[name] for name in found}
    report.bar(f"{what}: ms besides hashing", besides * 1000, GAP_MS_MAX)
    report.bar(f"{what} as a stream: ms, hashing is over", gap["stream"] * 1000, GAP_MS_MAX)
    both = (wrote["write"] + hash_s) / total["stream"]
    report.bar("writing, then hashing / the stream", both, 1, at_least=True)
    report.bar(f"{what}: runs whose file is another one", copied, 0)
    report.bar(f"{what}: bytes moved", moved, 0)


def milliseconds(seconds: float) -> float:
    """For a row."""
    return round(seconds * 1000, 1)


def others(server: harness.Server, report: harness.Report) -> None:
    """Small files, a folder, branches."""
    small = [run(server, "file", mib=1)["gap_s"] for _ in range(TURNS)]
    report.row("1 MiB, file", gap_ms=milliseconds(harness.median(small)))
    trees = [run(server, "tree") for _ in range(TURNS)]
    gap = harness.median([each["gap_s"] for each in trees])
    report.row(f"{FILES} files of {FILE_BYTES} bytes", gap_ms=milliseconds(gap))
    report.bar(
        f"{FILES} files: runs whose files are others",
        sum(each["first"]["inode"] != each["second"]["inode"] for each in trees),
        0,
    )
    runs = [run(server, "branches") for _ in range(TURNS)]
    took = harness.median([each["gap_s"] for each in runs])
    report.row(f"{BRANCHES} branches and their join", gap_ms=milliseconds(took))
    report.bar(
        f"changes lost, of {sum(each['second']['changes'] for each in runs)}",
        sum(each["second"]["lost"] for each in runs),
        0,
    )


def main(mib: int) -> None:
    """Measure and report."""
    report = harness.Report("handover")
    with harness.server() as server:
        workflows(server)
        run(server, "file", mib=1)
        server.wait_generic(1)
        files(server, report, mib)
        others(server, report)
    report.finish()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1024)
