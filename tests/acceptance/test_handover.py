"""What steps hand over, as a user sees it: files, folders, workspaces, large values, the cache."""

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.acceptance.test_runs import Flows, manifest, numbers, results
from tests.harness import ROOT, Server, eventually, eventually_none

pytestmark = pytest.mark.waits  # for the command, which looks again every 0.2 s

EXAMPLES = ROOT / "examples"
MIB = 1 << 20
FILES = """
from dayfly import File, Folder, out, step, workflow


@step
def numbers(most: int) -> File:
    out().write_text("\\n".join(map(str, range(most))))
    return out()


@step
def square(n: int, data: File) -> File:
    out().write_text(data.read_text().splitlines()[n] + " squared is " + str(n * n))
    return out()


@step
def gather(parts: list[File]) -> Folder:
    out().mkdir()
    for number, part in enumerate(parts):
        (out() / f"{number}.txt").write_bytes(part.read_bytes())
    return out()


@step(outputs=("sizes", "first"))
def look(folder: Folder) -> list[str]:
    found = sorted(folder.iterdir())
    out("sizes").write_text(str([path.stat().st_size for path in found]))
    out("first").write_bytes(found[0].read_bytes())
    return [path.read_text() for path in found]


@step
def read(sizes: File, first: File) -> list[str]:
    return [sizes.read_text(), first.read_text()]


@workflow(name="NAME")
def files(most: int = 3):
    looked = look(gather(square.map(n=[0, 1, 2], data=numbers(most))))
    return {"texts": looked, "read": read(looked.outputs["sizes"], looked.outputs["first"])}
"""


@pytest.fixture
def dayfly(anywhere: Server, tmp_path: Path) -> Flows:
    return Flows(anywhere, tmp_path)


@pytest.fixture
def sandboxed(server: Server, tmp_path: Path) -> Flows:
    return Flows(server, tmp_path)


def named(view: Any) -> str:
    return str(view["metadata"]["name"])


def why(view: Any) -> str:
    """Why a run has failed."""
    assert view["status"]["state"] == "Failed", view["status"]
    return str(view["status"]["message"])


def content(server: Server, artifact: Any) -> Path:
    """Where an artifact lies."""
    kind, _, digest = artifact["uri"].removeprefix("dayfly://default/").partition("/sha256/")
    return server.data / "artifacts/objects/default" / f"{kind}-{digest}" / "content"


def created(server: Server) -> float:
    """How many steps had to be run, each in some sandbox."""
    starts = ("warm", "generic", "forked", "created")
    return sum(server.metric(f'dayfly_starts_total{{start="{start}"}}') for start in starts)


def states(dayfly: Flows, run: str) -> dict[str, Any]:
    """By key: whether it was in the cache, or how it ended."""
    found = {}

    def look(shown: Any) -> None:
        for child in shown.get("children", ()):
            found[child["key"]] = "cached" if child.get("wasCached") else child["state"]
            look(child)

    look(dayfly.json("run", "show", run)["view"]["tree"])
    return found


# ---- files and folders --------------------------------------------------------------------------


def test_files_and_folders_go_from_step_to_step_in_python(dayfly: Flows):
    name = f"files-{dayfly.server.driver}"
    (dayfly.folder / "files.py").write_text(FILES.replace("NAME", name))
    dayfly("workflow", "deploy", "files.py")
    texts = ["0 squared is 0", "1 squared is 1", "2 squared is 4"]

    assert results(dayfly.start(name)) == {"texts": texts, "read": ["[14, 14, 14]", texts[0]]}


def test_scripts_have_their_inputs_and_outputs_at_their_paths(dayfly: Flows):
    """A list of outputs, of a matrix, is a folder with a file for each."""
    view = dayfly.flow(
        """
- name: part
  matrix: {params: {n: [1, 2, 3]}}
  script: |
    mkdir -p $(outputs.folder.path) $(dirname $(outputs.number.path))
    echo "part $(params.n)" > $(outputs.folder.path)/text
    echo $(params.n) > $(outputs.number.path)
  outputs: [{name: folder}, {name: number, path: some/where/number}]
- name: whole
  inputs: {folders: $(steps.part.outputs.folder), second: "$(steps.part.outputs.number[1])"}
  script: |
    cat $(inputs.folders.path)/*/text > $(outputs.text.path)
    cat $(inputs.second.path) > $(results.second.path)
    ls $(inputs.folders.path) | xargs > $(results.names.path)
  outputs: [{name: text}]
  results: [{name: second, type: integer}, {name: names}]
- name: last
  inputs: {text: $(steps.whole.outputs.text)}
  script: cp $(inputs.text.path) $(results.text.path)
  results: [{name: text}]
""",
        "results: {text: $(steps.last.results.text), second: $(steps.whole.results.second),"
        " names: $(steps.whole.results.names)}",
    )

    assert results(view) == {"text": "part 1\npart 2\npart 3", "second": 2, "names": "0 1 2"}


def test_a_stream_is_stored_while_it_is_written(sandboxed: Flows):
    view = sandboxed.flow(
        """
- name: write
  script: seq 200000 > $(outputs.numbers.path)
  outputs: [{name: numbers, stream: true}]
- name: read
  inputs: {numbers: $(steps.write.outputs.numbers)}
  script: |
    tail -n 1 $(inputs.numbers.path) > $(results.last.path)
    sha256sum < $(inputs.numbers.path) | cut -c-64 > $(results.sha256.path)
  results: [{name: last, type: integer}, {name: sha256}]
""",
        "results: {last: $(steps.read.results.last), sha256: $(steps.read.results.sha256),"
        " numbers: $(steps.write.outputs.numbers)}",
    )
    found = results(view)

    assert found["last"] == 200_000
    assert found["numbers"]["sha256"] == found["sha256"]
    assert found["numbers"]["size_bytes"] == 1_288_895


# ---- workspaces ---------------------------------------------------------------------------------


def test_a_workspace_passes_down_a_chain(sandboxed: Flows):
    """Each step sees what those before it left; one that fails has changed nothing."""
    view = sandboxed.flow(
        """
- name: one
  workspaces: {w: shared}
  script: cd $(workspaces.w.path); mkdir a; echo 1 > a/one; echo old > both
- name: two
  workspaces: {w: shared}
  runAfter: [one]
  script: cd $(workspaces.w.path); echo new > both; rm a/one; echo 2 > a/two
- name: fails
  workspaces: {w: shared}
  runAfter: [two]
  onError: continue
  script: cd $(workspaces.w.path); rm -r a; echo broken > both; exit 1
- name: three
  workspaces: {place: shared}
  runAfter: [fails]
  script: |
    cd $(workspaces.place.path)
    find . -type f | sort | xargs tail -n +1 > $(results.all.path)
  results: [{name: all}]
""",
        "workspaces: [shared]\nresults: {all: $(steps.three.results.all)}",
    )

    assert results(view) == {"all": "==> ./a/two <==\n2\n\n==> ./both <==\nnew"}


BRANCHES = """
- name: before
  workspaces: {w: shared}
  script: cd $(workspaces.w.path); mkdir sub; for n in 0 1 2 3 4 5 6 7; do echo old > sub/$n; done
- name: branch
  runAfter: [before]
  workspaces: {w: shared}
  matrix: {params: {n: [0, 1, 2, 3, 4, 5, 6, 7]}}
  script: |
    cd $(workspaces.w.path)
    test "$(cat sub/*)" = "$(yes old | head -8)"
    for i in $(seq 40); do echo $(params.n) > file-$(params.n)-$i; done
    echo $(params.n) > sub/$(params.n)
- name: after
  runAfter: [branch]
  workspaces: {w: shared}
  script: |
    cd $(workspaces.w.path)
    ls | grep -c file > $(results.files.path)
    cat sub/* | xargs > $(results.sub.path)
  results: [{name: files, type: integer}, {name: sub}]
"""


def test_eight_branches_on_one_workspace_lose_nothing(sandboxed: Flows):
    view = sandboxed.flow(
        BRANCHES,
        "workspaces: [shared]\n"
        "results: {files: $(steps.after.results.files), sub: $(steps.after.results.sub)}",
    )

    assert results(view) == {"files": 320, "sub": "0 1 2 3 4 5 6 7"}


CONFLICT = """
- {name: a, workspaces: {w: shared}, script: "cd $(workspaces.w.path); echo a > x; echo a > a"}
- {name: b, workspaces: {w: shared}, script: "cd $(workspaces.w.path); echo b > x; echo b > b"}
- name: join
  runAfter: [a, b]
  workspaces: {w: shared}
  script: cd $(workspaces.w.path); cat x a b | xargs > $(results.all.path)
  results: [{name: all}]
"""


LIMITED = """
- name: one
  limits: {openFiles: 77}
  script: ulimit -n > $(results.n.path)
  results: [{name: n}]
- name: two
  limits: {openFiles: 78}
  script: ulimit -n > $(outputs.n.path)
  outputs: [{name: n}]
- name: three
  inputs: {n: $(steps.two.outputs.n)}
  script: cat $(inputs.n.path) > $(results.n.path)
  results: [{name: n}]
"""


def test_a_step_has_its_limits_whether_it_has_a_sandbox_of_its_own_or_not(sandboxed: Flows):
    view = sandboxed.flow(
        LIMITED, "results: {one: $(steps.one.results.n), two: $(steps.three.results.n)}"
    )

    assert results(view) == {"one": "77", "two": "78"}


def test_branches_that_change_the_same_path_conflict_and_are_named(sandboxed: Flows):
    view = sandboxed.flow(CONFLICT, "workspaces: [shared]", code=1)

    told = why(view)
    assert view["status"]["kind"] == "WorkspaceConflict"
    assert "x (a, b)" in told.replace("'", "")


def test_in_order_the_later_branch_wins(sandboxed: Flows):
    view = sandboxed.flow(
        CONFLICT + "  merge: ordered\n",
        "workspaces: [shared]\nresults: {all: $(steps.join.results.all)}",
    )

    assert results(view) == {"all": "b a b"}


REDUCE = """
  merge: reduce
- name: told
  runAfter: [join]
  workspaces: {w: shared}
  script: cd $(workspaces.w.path); cat x a b | xargs > $(results.all.path)
  results: [{name: all}]
"""


def test_a_step_decides_what_comes_of_a_conflict(sandboxed: Flows):
    decides = """
  script: |
    cd $(workspaces.w.path)
    test ! -e x && test "$(cat $(workspaces.w.path).conflicts)" = x
    test "$(ls $(workspaces.w.path).branches | xargs)" = "0 1"
    ! echo new > $(workspaces.w.path).branches/0/x
    cat $(workspaces.w.path).branches/*/x > x
"""
    steps = CONFLICT[: CONFLICT.index("  script: cd $(workspaces.w.path); cat")]
    view = sandboxed.flow(
        steps + decides + REDUCE,
        "workspaces: [shared]\nresults: {all: $(steps.told.results.all)}",
    )

    assert results(view) == {"all": "a b a b"}


DECIDED = """
from dayfly import Workspace, branches, conflicts, step, workflow, workspace


@step
def count(place: Workspace, name: str) -> None:
    with (place / "counts").open("a") as file:
        file.write(name)


@step(merge="reduce")
def both(place: Workspace) -> list[str]:
    for path in conflicts(place):
        (place / path).write_text("".join((one / path).read_text() for one in branches(place)))
    return [*conflicts(place), (place / "counts").read_text()]


@workflow
def counted():
    place = workspace("place")
    count(place.branch(), "a")
    count(place.branch(), "b")
    return both(place)
"""


def test_the_same_in_python(sandboxed: Flows):
    (sandboxed.folder / "counted.py").write_text(DECIDED)
    sandboxed("workflow", "deploy", "counted.py")

    assert results(sandboxed.start("counted")) == {"result": ["counts", "ab"]}


def test_a_run_that_is_tried_again_has_its_workspaces(sandboxed: Flows):
    name = f"again-{next(numbers)}"
    sandboxed.server.deploy("gate", files={"main.py": "def handler(event, context): 1 / 0"})
    sandboxed.apply(
        manifest(
            name,
            """
- {name: one, workspaces: {w: shared}, script: "echo kept > $(workspaces.w.path)/file"}
- {name: gate, function: gate, runAfter: [one]}
- name: two
  runAfter: [gate]
  workspaces: {w: shared}
  script: cat $(workspaces.w.path)/file > $(results.text.path)
  results: [{name: text}]
""",
            "workspaces: [shared]\nresults: {text: $(steps.two.results.text)}",
        )
    )
    failed = sandboxed.start(name, code=1)
    sandboxed.server.deploy("gate", files={"main.py": "def handler(event, context): return 1"})
    again = sandboxed.json("run", "retry", named(failed))

    assert results(again) == {"text": "kept"}


# ---- large values -------------------------------------------------------------------------------


def test_a_large_result_goes_by_reference_and_is_whole_for_the_next_step(dayfly: Flows):
    name = f"large-{dayfly.server.driver}"
    (dayfly.folder / "large.py").write_text(
        "from dayfly import step, workflow\n\n"
        "@step(cache=True)\ndef make(n: int) -> dict:\n    return {'text': 'x' * n}\n\n"
        "@step\ndef length(value: dict) -> int:\n    return len(value['text'])\n\n"
        f"@workflow(name='{name}')\ndef flow(n: int = {MIB}):\n"
        "    made = make(n)\n    return {'length': length(made), 'made': made}\n"
    )
    dayfly("workflow", "deploy", "large.py")
    first, second = dayfly.start(name), dayfly.start(name)

    assert results(first)["length"] == results(second)["length"] == MIB
    reference = results(first)["made"]["$large"]
    assert reference["size_bytes"] == MIB + len('{"text":""}')
    assert states(dayfly, named(second)) == {"make": "cached", "length": "succeeded"}


# ---- the cache ----------------------------------------------------------------------------------

PURE = """
- name: make
  cache: true
  params: {word: $(params.word)}
  script: printf '%s' "$(params.word)" > $(outputs.text.path)
  outputs: [{name: text}]
- name: use
  cache: true
  inputs: {text: $(steps.make.outputs.text)}
  script: wc -c < $(inputs.text.path) > $(results.size.path)
  results: [{name: size, type: integer}]
"""
WORD = """
params: [{name: word}]
results: {size: $(steps.use.results.size), text: $(steps.make.outputs.text)}
"""


def test_a_second_run_of_an_unchanged_graph_starts_no_sandbox(dayfly: Flows):
    name = f"pure-{next(numbers)}"
    dayfly.apply(manifest(name, PURE, WORD))
    first = dayfly.start(name, "-p", f"word={name}")
    before = created(dayfly.server)
    second = dayfly.start(name, "-p", f"word={name}")

    assert created(dayfly.server) == before
    assert results(second) == results(first)
    assert states(dayfly, named(second)) == {"make": "cached", "use": "cached"}
    assert f"it left the same in run {named(first)}" in dayfly("run", "explain", named(second))
    third = dayfly.start(name, "-p", f"word={name}-longer")
    assert results(third)["size"] == len(name) + 7
    assert states(dayfly, named(third)) == {"make": "succeeded", "use": "succeeded"}


def test_a_step_that_is_given_the_same_by_another_is_not_run_again(dayfly: Flows):
    """What counts is what is in an artifact, not which step made it."""
    name = f"same-{next(numbers)}"
    dayfly.apply(manifest(name, PURE, WORD))
    dayfly.apply(manifest(f"{name}-b", PURE.replace("printf", "printf -- "), WORD))
    dayfly.start(name, "-p", f"word={name}")
    other = dayfly.start(f"{name}-b", "-p", f"word={name}")

    assert states(dayfly, named(other))["make"] == "succeeded"


def test_what_ran_before_decides_nothing_that_is_cached(dayfly: Flows):
    """It could have changed the interpreter, or anything else that a sandbox keeps."""
    name = f"before-{dayfly.server.driver}"
    (dayfly.folder / "before.py").write_text(
        "from dayfly import step, workflow\n\nseen = []\n\n"
        "@step(cache=True)\ndef pure(n: int) -> list:\n    seen.append(n)\n    return seen\n\n"
        f"@workflow(name='{name}')\ndef before(n: int):\n    return pure(n)\n"
    )
    dayfly("workflow", "deploy", "before.py")

    for number in (1, 2):
        assert results(dayfly.start(name, "-p", f"n={number}")) == {"result": [number]}


@pytest.mark.parametrize("how", ["gone", "changed"])
def test_a_cached_step_whose_artifact_is_gone_or_changed_is_run_again(sandboxed: Flows, how: str):
    name = f"gone-{next(numbers)}"
    sandboxed.apply(manifest(name, PURE, WORD))
    first = sandboxed.start(name, "-p", f"word={name}")
    file = content(sandboxed.server, results(first)["text"])
    if how == "gone":
        file.unlink()
    else:
        file.chmod(0o600)
        file.write_text("other" + name[5:])
    second = sandboxed.start(name, "-p", f"word={name}")

    assert states(sandboxed, named(second)) == {"make": "succeeded", "use": "cached"}
    assert results(second) == results(first)
    assert file.read_text() == name


def test_what_many_want_at_once_is_run_once(dayfly: Flows):
    name = f"flight-{next(numbers)}"
    dayfly.apply(
        manifest(
            name,
            """
- name: same
  cache: true
  matrix: {params: {n: [1, 2, 3, 4, 5, 6]}}
  params: {n: 0}
  script: sleep 0.5; date +%N > $(results.at.path)
  results: [{name: at}]
""",
            "results: {at: $(steps.same.results.at)}",
        )
    )
    before = created(dayfly.server)
    names = [f"{name}-{n}" for n in range(3)]
    for each in names:
        dayfly("run", "start", name, "--name", each, "-d")

    def ends() -> list[Any]:
        views = [dayfly.json("run", "show", each) for each in names]
        return views if all(view["status"]["endedAt"] for view in views) else []

    views = eventually(ends, 30)
    assert len({json.dumps(results(view)) for view in views}) == 1
    assert created(dayfly.server) - before == 6


# ---- what can be asked of a run -----------------------------------------------------------------


def test_what_a_run_did_can_be_asked_afterwards(sandboxed: Flows):
    name = f"asked-{next(numbers)}"
    sandboxed.apply(
        manifest(
            name,
            """
- {name: loud, script: "echo it is loud; seq 9 > $(outputs.nine.path)", outputs: [{name: nine}]}
- name: reads
  inputs: {nine: $(steps.loud.outputs.nine)}
  script: echo read it; cp $(inputs.nine.path) $(outputs.copy.path)
  outputs: [{name: copy, isBuild: true}]
- {name: plain, script: "echo plainly"}
""",
            "results: {copy: $(steps.reads.outputs.copy)}",
        )
    )
    run = named(view := sandboxed.start(name))

    said = sandboxed("run", "logs", run)
    assert [line in said for line in ("it is loud", "read it", "plainly")] == [True] * 3
    assert "it is loud" not in sandboxed("run", "logs", run, "--step", "reads")
    explained = sandboxed("run", "explain", run)
    assert re.search(
        r"reads +succeeded +\w+ +0 +a sandbox of its own; what it takes is mounted: 1", explained
    )
    page = sandboxed("run", "timeline", run, "-o", "-")
    assert page.lower().startswith("<!doctype html>")
    assert "reads" in page
    shown = sandboxed("provenance", "show", run)
    assert results(view)["copy"]["sha256"] in shown
    (sandboxed.folder / "key.pem").write_text(sandboxed("provenance", "key"))
    copied = content(sandboxed.server, results(view)["copy"]).read_bytes()
    (sandboxed.folder / "copy").write_bytes(copied)
    sandboxed("provenance", "verify", run, "--key", "key.pem", "--artifact", "copy")
    (sandboxed.folder / "copy").write_bytes(copied + b"!")
    sandboxed("provenance", "verify", run, "--key", "key.pem", "--artifact", "copy", code=1)


# ---- bad input ----------------------------------------------------------------------------------


def test_an_artifact_that_changed_on_the_disk_is_refused_and_named(sandboxed: Flows):
    name = f"changed-{next(numbers)}"
    sandboxed.apply(
        manifest(
            name,
            """
- name: make
  script: mkdir $(outputs.d.path); echo 1 > $(outputs.d.path)/one; echo 2 > $(outputs.d.path)/two
  outputs: [{name: d}]
- {name: ok, wait: {approval: "go on?"}, runAfter: [make]}
- name: use
  runAfter: [ok]
  inputs: {d: $(steps.make.outputs.d)}
  script: cat $(inputs.d.path)/*
""",
        )
    )
    sandboxed("run", "start", name, "--name", name, "-d")
    assert eventually(lambda: sandboxed.json("run", "show", name)["expected"])
    objects = sandboxed.server.data / "artifacts/objects/default"
    (file,) = (f for f in objects.glob("tree-*/content/two") if f.read_text() == "2\n")
    file.chmod(0o600)
    file.write_text("3\n")
    sandboxed("run", "approve", name, "ok")
    eventually(lambda: sandboxed.json("run", "show", name)["status"]["endedAt"])
    view = sandboxed.json("run", "show", name)

    assert view["status"]["kind"] == "ArtifactDamaged"
    assert "artifact changed on disk: two" in why(view)


def test_a_step_cannot_delete_or_change_its_inputs(sandboxed: Flows):
    view = sandboxed.flow(
        """
- name: make
  script: mkdir $(outputs.d.path); echo 1 > $(outputs.d.path)/one
  outputs: [{name: d}]
- name: delete
  inputs: {d: $(steps.make.outputs.d)}
  script: |
    cd $(inputs.d.path)
    ! rm one && ! sh -c 'echo 2 > one' && ! touch two && ! chmod 777 one && ! rm -r /in/d
    cat one > $(results.left.path)
  results: [{name: left, type: integer}]
""",
        "results: {left: $(steps.delete.results.left)}",
    )

    assert results(view) == {"left": 1}


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("true", "the output x is not there"),
        ("ln -s /etc/passwd $(outputs.x.path)", "link"),
        ("mkfifo $(outputs.x.path)", "x"),
        ("mkdir $(outputs.x.path); mkfifo $(outputs.x.path)/pipe", "pipe"),
        ("mkdir $(outputs.x.path); mknod $(outputs.x.path)/null c 1 3", ""),
    ],
)
def test_an_output_that_is_no_file_or_folder_is_refused_and_named(
    sandboxed: Flows, script: str, told: str
):
    view = sandboxed.flow(
        f"- {{name: bad, script: {json.dumps(script)}, outputs: [{{name: x}}]}}",
        code=1,
    )

    assert told in why(view), view["status"]


@pytest.mark.parametrize(
    "body",
    [
        "def handler(event, context):\n    return 'x' * (1 << 30)\n",
        "def handler(event, context):\n    return ['x' * 1000] * (1 << 20)\n",
    ],
)
def test_a_result_of_a_gibibyte_fails_its_step_and_nothing_else(sandboxed: Flows, body: str):
    sandboxed.server.deploy("huge", files={"main.py": body})
    view = sandboxed.flow("- {name: huge, function: huge}", code=1)

    assert view["status"]["state"] == "Failed"
    assert results(sandboxed.flow("- {name: small, script: 'true'}")) == {}


def test_a_result_of_a_gibibyte_that_a_script_writes_is_refused(sandboxed: Flows):
    view = sandboxed.flow(
        "- {name: huge, script: truncate -s 1G $(results.r.path), results: [{name: r}]}", code=1
    )

    assert "over 262144 bytes" in why(view)


def test_an_input_that_is_no_artifact_is_refused(sandboxed: Flows):
    view = sandboxed.flow(
        """
- {name: a, script: echo x > $(results.r.path), results: [{name: r, type: any}]}
- {name: b, inputs: {d: $(steps.a.results.r)}, script: "true"}
""",
        code=1,
    )

    assert "input 'd' is no artifact" in why(view)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a few MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a disk")
def test_a_disk_that_is_full_fails_the_step_and_is_usable_afterwards(
    small_disk: Path, new_server: Callable[..., Server], tmp_path: Path
):
    dayfly = Flows(server := new_server(data=small_disk / "data"), tmp_path)
    fill = "- {name: fill, script: head -c NM /dev/zero > $(outputs.x.path), outputs: [{name: x}]}"
    view = dayfly.flow(fill.replace("N", "64"), code=1)

    assert "No space left" in dayfly("run", "logs", named(view))
    assert "x" in results(
        dayfly.flow(fill.replace("N", "4"), "results: {x: $(steps.fill.outputs.x)}")
    )
    server.log[:] = [line for line in server.log if "journals cannot be written" not in line]


# ---- a server that is killed --------------------------------------------------------------------


def test_what_was_handed_over_is_there_after_the_server_was_killed(
    new_server: Callable[..., Server], tmp_path: Path
):
    """Outputs, workspaces, large values and the cache; no step that was over runs again."""
    server = new_server()
    (tmp_path / "flow.py").write_text(
        "import time\n"
        "from dayfly import File, Workspace, approval, out, step, workflow, workspace\n\n"
        "@step\ndef make(site: Workspace) -> File:\n"
        "    (site / 'at').write_text(str(time.time_ns()))\n"
        "    out().write_text((site / 'at').read_text())\n    return out()\n\n"
        "@step(cache=True)\ndef large() -> str:\n    return 'x' * 1_000_000\n\n"
        "@step\ndef use(site: Workspace, made: File, text: str) -> list:\n"
        "    return [made.read_text() == (site / 'at').read_text(), len(text)]\n\n"
        "@workflow\ndef survives():\n    site = workspace('site')\n"
        "    made, text = make(site), large()\n    ok = approval('go on?').after(made, text)\n"
        "    return {'used': use(site, made, text).after(ok)}\n"
    )
    dayfly = Flows(server, tmp_path)
    dayfly("workflow", "deploy", "flow.py")
    dayfly("run", "start", "survives", "--name", "one", "-d")
    assert eventually(lambda: dayfly.json("run", "show", "one")["expected"], 30)
    server.kill()
    server.wait()
    server.start()
    assert eventually(lambda: dayfly.json("run", "show", "one")["expected"], 30)
    dayfly("run", "approve", "one", "approval")
    eventually(lambda: dayfly.json("run", "show", "one")["status"]["endedAt"], 30)
    view = dayfly.json("run", "show", "one")

    assert results(view) == {"used": [True, 1_000_000]}
    assert view["status"]["succeeded"] == 3
    dayfly("run", "start", "survives", "--name", "two", "-d")
    assert eventually(lambda: states(dayfly, "two").get("large") == "cached", 30)
    dayfly("run", "cancel", "two", "--hard")


# ---- garbage ------------------------------------------------------------------------------------


def test_what_no_run_refers_to_any_more_goes(new_server: Callable[..., Server], tmp_path: Path):
    server = new_server(settings={"generic_min": 1, "garbage_s": 0.5})
    dayfly = Flows(server, tmp_path)
    steps = """
- name: make
  workspaces: {w: shared}
  script: echo "$(run.name)" | tee $(workspaces.w.path)/f > $(outputs.x.path)
  outputs: [{name: x}]
"""
    more = "workspaces: [shared]\nresults: {x: $(steps.make.outputs.x)}"
    kept, deleted = dayfly.flow(steps, more), dayfly.flow(steps, more)
    dayfly.apply(manifest("pure", PURE, WORD))
    cached = dayfly.start("pure", "-p", "word=kept")
    for view in (deleted, cached):
        dayfly("run", "delete", named(view), "-y")
    layers = server.data / "workspaces/layers"

    assert not eventually_none(
        lambda: [1] if content(server, results(deleted)["x"]).exists() else []
    )
    assert not eventually_none(lambda: os.listdir(layers)[1:])
    assert content(server, results(kept)["x"]).read_text() == named(kept) + "\n"
    assert content(server, results(cached)["text"]).exists()
    dayfly("run", "delete", named(kept), "-y")
    assert not eventually_none(lambda: os.listdir(layers))


# ---- examples -----------------------------------------------------------------------------------


def test_the_pipeline_trains_three_models_and_tells_which_is_best(dayfly: Flows):
    dayfly("workflow", "deploy", str(EXAMPLES / "pipeline/main.py"))
    view = dayfly.start("houses")
    found, run = results(view), named(view)

    assert (found["model"], found["euros"]) == ("neighbours", 24922)
    dayfly("artifact", "get", found["report"]["uri"], "-o", "report.md")
    report = (dayfly.folder / "report.md").read_text()
    assert "The best model is **neighbours**" in report
    assert len(report.splitlines()) == 9
    assert set(states(dayfly, run)) >= {"fetch", "clean", "train[0]", "train[2]", "report"}
    again = dayfly.start("houses")
    assert states(dayfly, named(again))["train[1]"] == "cached"


def test_what_is_cloned_is_built_by_a_task_that_knows_nothing_of_it(dayfly: Flows):
    dayfly("apply", "-f", str(EXAMPLES / "clone_build"))
    view = dayfly.start("clone-build")
    found = results(view)
    dayfly("artifact", "get", found["program"]["uri"], "-o", "greet.pyz")
    said = subprocess.run(
        ["python3", "greet.pyz", "Ada"], cwd=dayfly.folder, capture_output=True, text=True
    )

    assert found["commit"] == "e21978e40370ec464d563267ff09faab97652ea3"
    assert (said.stdout, said.stderr) == ("Hello, Ada!\n", "")
    again = dayfly.start("clone-build")
    assert states(dayfly, named(again)) == {"clone": "succeeded", "build": "cached"}


# ---- docs ---------------------------------------------------------------------------------------

VARIES = [
    (r"\d+\.\d s", "N s"),
    (r"\b(generic|forked|created|warm)\b *", "KIND "),
    (r"([0-9a-f]{6})([0-9a-f]{58}|\.\.\.)", r"\1"),
]
"""What is not the same each time."""


def masked(text: str) -> list[str]:
    for form, instead in VARIES:
        text = re.sub(form, instead, text)
    return [re.sub(" +", " ", line) for line in text.strip().splitlines()]


def test_what_the_documentation_says_of_hand_over_is_what_happens(
    new_server: Callable[..., Server], tmp_path: Path
):
    """Every block that is code is a file, and every command writes what stands below it."""
    dayfly = Flows(new_server(), tmp_path)
    text = (ROOT / "docs/handover.md").read_text()
    ran = 0
    for kind, block in re.findall(r"```(python|yaml|console)\n(.*?)```", text, re.DOTALL):
        if kind != "console":
            (tmp_path / block.split()[1]).write_text(block)
            continue
        for part in block.split("$ dayfly ")[1:]:
            command, _, expected = part.partition("\n")
            said = dayfly(*command.split())
            assert masked(dayfly.told + said) == masked(expected), command
            ran += 1

    assert ran == 12
