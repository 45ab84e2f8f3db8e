"""A step's folders, as its sandbox finds them: forked or started, of a server that is root or not.

Run by root it asks all of it again of a server that is not root, as another user.
"""

import asyncio
import errno
import json
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.faults.test_escape import (
    ALLOWED,
    ALLOWED_WITHOUT_ROOT,
    ORDINARY_UID,
    PROBES_MIN,
    SECRET,
    opened,
    ordinary_user,
    planted_on_host,
)
from tests.harness import FUNCTIONS, ROOT, eventually

from dayfly_pool import driver as drivers
from dayfly_pool.config import Config
from dayfly_pool.driver import Driver
from dayfly_pool.drivers.linux import LinuxDriver, find_bwrap
from dayfly_pool.errors import BadInput, Draining
from dayfly_pool.models import (
    BASE,
    Environment,
    Failure,
    Function,
    FunctionSpec,
    Invocation,
    InvocationId,
    Limits,
    Mold,
    Mounts,
    Outcome,
    Success,
    function_id,
)
from dayfly_pool.pool import Pool
from dayfly_pool.workflow.artifacts import Artifact, Artifacts
from dayfly_pool.workflow.steps import Steps
from dayfly_pool.workflow.workspaces import Workspace, Workspaces, fork, overlay

DIGEST = "c0de" * 16
UID_FIRST = 3_700_000
ENVIRONMENT = Environment(digest=BASE)
SOON_S = 60.0
STORES = ("/artifacts", "/steps", "/layers")

CODE = """
import ctypes, errno, os, shutil, signal, subprocess, sys, time
from pathlib import Path

def told(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

def run(event, context):
    # *event* is a program; what it calls `found` is what it found
    names = dict(globals(), context=context)
    exec(event, names)
    return names.get("found")
"""


class House:
    """The stores, and a pool whose sandboxes may have of them what is mounted."""

    def __init__(self, data: Path, driver: Driver, pool: Pool, namespace: str) -> None:
        self.data, self.driver, self.pool, self._namespace = data, driver, pool, namespace
        owner = driver.steps_owner
        self.artifacts = Artifacts(data / "artifacts")
        self.steps = Steps(data / "steps", owner)
        self.workspaces = Workspaces(data / "workspaces", owner)
        self._number = 0

    def function(self, name: str, mounts: Mounts | None = None, **spec: Any) -> Function:
        declared = FunctionSpec(handler="main:run", package=DIGEST, **spec)
        id_ = function_id("default", name)
        return Function(id_, "1", declared, Mold(BASE, "none", self._namespace), mounts=mounts)

    async def run(
        self,
        program: str,
        inputs: dict[str, Artifact] | None = None,
        workspaces: dict[str, Workspace] | None = None,
        *,
        keeps: bool = False,
        file_bytes_max: int = 0,
        **spec: Any,
    ) -> tuple[Outcome, str]:
        """Run *program* as a step; its outcome, and what the step is called, for `left`."""
        self._number += 1
        name = f"step-{self._number}"
        workspaces = workspaces or {}
        self.steps.make(name, workspaces)
        given = tuple((n, self.place(artifact)) for n, artifact in (inputs or {}).items())
        shared = tuple((n, self.options(name, n, w)) for n, w in workspaces.items())
        mounts = Mounts(name, given, shared, file_bytes_max)
        function = self.function(f"flow.{name}.1", mounts, **spec)
        invocation = Invocation(InvocationId(name), function.id, json.dumps(program).encode())
        async with asyncio.timeout(SOON_S):
            outcome = await self.pool.run_once(function, ENVIRONMENT, invocation)
        return outcome, name

    async def found(self, program: str, *arguments: Any, **more: Any) -> Any:
        outcome, _ = await self.run(program, *arguments, **more)
        assert isinstance(outcome, Success), outcome
        return json.loads(outcome.body)

    async def made(self, program: str, output: str = "made") -> Artifact:
        """What a step left as *output*."""
        outcome, name = await self.run(program)
        assert isinstance(outcome, Success), outcome
        artifact = self.artifacts.put("default", self.out(name), output)
        self.steps.remove(name)
        return artifact

    async def changed(self, workspace: Workspace, program: str) -> Workspace:
        """What *workspace* is after a step."""
        outcome, name = await self.run(
            f"os.chdir('/workspaces/w')\n{program}", {}, {"w": workspace}
        )
        assert isinstance(outcome, Success), outcome
        upper = self.data / "steps" / "steps" / name / "workspaces" / "w" / "upper"
        taken = self.workspaces.take(workspace, upper)
        self.steps.remove(name)
        return taken

    def out(self, name: str) -> Path:
        return self.data / "steps" / "steps" / name / "out"

    def place(self, artifact: Artifact) -> str:
        return str(self.artifacts.path(artifact).relative_to(self.data / "artifacts" / "objects"))

    @staticmethod
    def options(step: str, name: str, workspace: Workspace) -> str:
        return overlay(workspace, step, name, layers="/layers", steps="/steps")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    package = folder / "packages" / "unpacked" / DIGEST
    package.mkdir(parents=True)
    (package / "main.py").write_text(CODE)
    (package / "escape.py").write_bytes((FUNCTIONS / "escape" / "main.py").read_bytes())
    for path in (folder / "packages", folder / "packages" / "unpacked", package):
        path.chmod(0o755)
    folder.chmod(0o700)
    return folder


async def house_in(stack: AsyncExitStack, data: Path, kind: str, namespace: str) -> House:
    if kind == "linux" and find_bwrap() is None:
        why = "bwrap is missing: apt-get install bubblewrap"
        if os.environ.get("DAYFLY_TEST_NO_LINUX"):
            pytest.skip(why)
        pytest.fail(why)
    driver = drivers.load(Config(data=data, driver=kind, uid_first=UID_FIRST))
    config = Config(data=data, generic_min=0, grace_s=0.2)
    pool = await stack.enter_async_context(Pool(config, driver).running())
    house = House(data, driver, pool, namespace)
    for store in (house.artifacts, house.steps, house.workspaces):
        store.open()
        stack.callback(store.close)
    return house


@pytest.fixture(params=["forked", "started"])
async def house(request: pytest.FixtureRequest, data: Path) -> AsyncIterator[House]:
    """Of a namespace whose sandboxes are forked, and of one where each is started by itself."""
    async with AsyncExitStack() as stack:
        namespace = "default" if request.param == "forked" else ""
        house = await house_in(stack, data, "linux", namespace)
        if namespace:
            await warmed(house)
        yield house


async def warmed(house: House) -> None:
    """Have a zygote that forks the rest."""
    async with asyncio.timeout(SOON_S):
        while True:
            outcome, _ = await house.run("pass")
            if outcome.timing.start in ("forked", "generic"):
                return


def below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def mounts_of(pid: int | str) -> list[str]:
    return Path(f"/proc/{pid}/mountinfo").read_text().splitlines()


# ---- what it is given ---------------------------------------------------------------------------

TREE = """
made = Path("/out/made")
(made / "deep").mkdir(parents=True)
(made / "deep" / "file").write_text("what was made")
(made / "tool").write_text("#!/bin/sh\\necho run $1\\n")
(made / "tool").chmod(0o755)
"""


async def test_a_step_reads_what_another_left(house: House):
    tree = await house.made(TREE)
    file = await house.made("Path('/out/made').write_text('alone')")
    program = """
found = [Path("/in/a/deep/file").read_text(), Path("/in/b").read_text(), sorted(os.listdir("/in"))]
found += [subprocess.run(["/in/a/tool", "it"], capture_output=True, text=True).stdout]
"""

    assert await house.found(program, {"a": tree, "b": file}) == [
        "what was made",
        "alone",
        ["a", "b"],
        "run it\n",
    ]


async def test_of_several_artifacts_each_has_its_number(house: House):
    """Also when there are many, and names of all kinds."""
    made = [await house.made(f"Path('/out/made').write_text('{n}')") for n in range(3)]
    inputs = {f"my_Parts-1/{n}": made[n % 3] for n in range(200)}
    program = """
where = Path(context.in_folder, "my_Parts-1")
found = [len(os.listdir(where)), [(where / str(n)).read_text() for n in (0, 1, 199)]]
"""

    assert await house.found(program, inputs) == [200, ["0", "1", "1"]]


OPENINGS = {
    "write": "open, '/in/a/deep/file', 'w'",
    "append": "open, '/in/a/deep/file', 'a'",
    "truncate": "os.truncate, '/in/a/deep/file', 0",
    "remove": "os.unlink, '/in/a/deep/file'",
    "create": "open, '/in/a/deep/new', 'x'",
    "make a folder": "os.mkdir, '/in/a/new'",
    "rename": "os.rename, '/in/a/deep', '/in/a/shallow'",
    "move out": "os.rename, '/in/a/deep/file', '/out/file'",
    "link out": "os.link, '/in/a/deep/file', '/out/file'",
    "replace": "os.rename, '/tmp/mine', '/in/a/deep/file'",
    "change the mode": "os.chmod, '/in/a/deep/file', 0o777",
    "change the mode of all": "os.chmod, '/in/a', 0o777",
    "change the owner": "os.chown, '/in/a/deep/file', 1000, 1000",
    "change the time": "os.utime, '/in/a/deep/file', (0, 0)",
    "say more of": "os.setxattr, '/in/a/deep/file', 'user.x', b'x'",
    "remove all": "shutil.rmtree, '/in/a'",
    "remove the place": "os.rmdir, '/in/a'",
    "rename the place": "os.rename, '/in/a', '/in/b'",
    "create a place": "os.mkdir, '/in/b'",
}


async def test_what_it_is_given_stays_as_it_is(house: House):
    """Whatever is done to it fails, and says that it is read-only, or that it may not be."""
    tree = await house.made(TREE)
    rows = "".join(f"  {what!r}: told({call}),\n" for what, call in OPENINGS.items())
    found = await house.found(f"Path('/tmp/mine').touch()\nfound = {{\n{rows}}}", {"a": tree})

    assert set(found.values()) <= {"EROFS", "EACCES", "EXDEV", "EPERM", "EBUSY"}
    assert {found[what] for what in ("write", "create", "remove", "remove all")} == {"EROFS"}
    house.artifacts.verify(tree)


async def test_a_step_that_deletes_its_inputs_fails(house: House):
    tree = await house.made(TREE)
    outcome, _ = await house.run("shutil.rmtree('/in/a')", {"a": tree})

    assert isinstance(outcome, Failure)
    assert outcome.kind == "Raised"
    assert os.strerror(errno.EROFS) in outcome.message
    house.artifacts.verify(tree)


async def test_an_artifact_that_is_gone_is_the_failure_of_its_step(house: House):
    tree = await house.made("os.mkdir('/out/made')")
    house.artifacts.sweep(lambda uri: False, 1e12)
    mounts = Mounts("gone", (("a", f"default/tree-{tree.sha256}/content"),))
    house.steps.make("gone")
    function = house.function("flow.gone.1", mounts)
    invocation = Invocation(InvocationId("i"), function.id, b'"pass"')
    outcome = await house.pool.run_once(function, ENVIRONMENT, invocation)

    assert isinstance(outcome, Failure)
    assert outcome.kind == "ImportFailed"
    assert "the step's folders cannot be mounted" in outcome.message
    assert os.strerror(errno.ENOENT) in outcome.message


async def test_a_tree_of_two_thousand_files_is_handed_over(house: House):
    many = """
for n in range(20):
    os.makedirs(f"/out/made/{n}")
    for m in range(100):
        with open(f"/out/made/{n}/{m}", "w") as file:
            file.write(str(n * m))
"""
    tree = await house.made(many)
    read = (
        "found = sum(int(path.read_text()) for path in Path('/in/a').rglob('*') if path.is_file())"
    )

    assert tree.files == 2000
    assert await house.found(read, {"a": tree}) == sum(n * m for n in range(20) for m in range(100))


# ---- what it leaves -----------------------------------------------------------------------------


async def test_what_it_leaves_belongs_to_nobody_who_runs(house: House):
    """Any file, made in any way; nothing of it is the server's or the sandbox's own user's."""
    program = """
assert os.listdir("/out") == []
os.makedirs("/out/a/b")
Path("/out/a/b/c").write_text("x")
os.rename("/out/a/b/c", "/out/a/d")
os.link("/out/a/d", "/out/e")
os.symlink("/etc/passwd", "/out/link")
os.mkfifo("/out/pipe")
subprocess.run(["cp", "/out/e", "/out/f"], check=True)
os.truncate("/out/f", 0)
found = sorted({os.lstat(path).st_uid for path in (Path("/out"), *Path("/out").rglob("*"))})
"""
    outcome, name = await house.run(program)
    out = house.out(name)

    assert isinstance(outcome, Success), outcome
    assert json.loads(outcome.body) == [1000]
    assert below(out) == ["a", "a/b", "a/d", "e", "f", "link", "pipe"]
    assert {path.lstat().st_uid for path in (out, *out.rglob("*"))} == {house.driver.steps_owner}
    assert os.geteuid() or house.driver.steps_owner == UID_FIRST - 1


async def test_no_file_is_larger_than_it_may_be(house: House):
    program = """
found = [told(Path("/out/a").write_bytes, bytes(n)) for n in (1 << 16, (1 << 16) + 1)]
"""
    assert await house.found(program, file_bytes_max=1 << 16) == ["done", "EFBIG"]


async def test_nothing_special_can_be_left(house: House):
    """No device, no program that is somebody else's."""
    program = """
Path("/out/a").write_bytes(b"")
os.chmod("/out/a", 0o4755)
found = [told(os.mknod, "/out/null", 0o20666, os.makedev(1, 3)), told(os.chown, "/out/a", 0, 0)]
found += [bool(os.statvfs(p).f_flag & os.ST_NOSUID) for p in ("/out", "/in", "/workspaces/w")]
"""
    tree = await house.made("os.mkdir('/out/made')")
    found = await house.found(program, {"a": tree}, {"w": Workspace()})

    assert found == ["EPERM", "EINVAL", True, True, True]


# ---- workspaces ---------------------------------------------------------------------------------


async def test_a_workspace_passes_down_a_chain(house: House):
    """Changes of what was there are copies up; what is removed stays away, what is below does not
    come back."""
    first = await house.changed(Workspace(), "os.makedirs('d/e'); Path('d/f').write_text('one')")
    program = "Path('d/f').open('a').write('two'); os.chmod('d/f', 0o600); shutil.rmtree('d/e')"
    second = await house.changed(first, program)
    third = await house.changed(second, "shutil.rmtree('d'); os.mkdir('d'); Path('d/new').touch()")
    look = """
os.chdir("/workspaces/w")
found = sorted(map(str, Path().rglob("*")))
found += [Path(path).read_text() for path in found if path == "d/f"]
found += [os.stat(path).st_uid for path in found[:1]]
"""
    found = [await house.found(look, {}, {"w": stack}) for stack in (first, second, third)]

    assert found == [
        ["d", "d/e", "d/f", "one", 1000],
        ["d", "d/f", "onetwo", 1000],
        ["d", "d/new", 1000],
    ]


async def test_branches_change_nothing_for_each_other(house: House):
    base = await house.changed(Workspace(), "Path('f').write_text('base')")
    forked = fork(base)
    branches = [
        await house.changed(forked, f"Path('{n}').write_text(Path('f').read_text() + '{n}')")
        for n in range(2)
    ]
    joined = house.workspaces.join(base, branches)
    look = "found = {p.name: p.read_text() for p in Path('/workspaces/w').iterdir()}"

    assert await house.found(look, {}, {"w": joined}) == {"f": "base", "0": "base0", "1": "base1"}


async def test_several_workspaces_and_names_of_all_kinds(house: House):
    program = """
for name in os.listdir("/workspaces"):
    Path("/workspaces", name, "f").write_text(name)
found = sorted(os.listdir(context.workspace_folder)) + [told(os.mkdir, "/workspaces/new")]
"""
    names = dict.fromkeys(("a", "My_Work-space2", "_"), Workspace())

    assert await house.found(program, {}, names) == ["My_Work-space2", "_", "a", "EROFS"]


async def test_overlays_own_marks_are_not_to_be_made(house: House):
    """What would hide a folder's contents, or redirect it, is not taken from users."""
    first = await house.changed(Workspace(), "os.mkdir('d'); Path('d/f').write_text('secret')")
    program = """
os.chdir("/workspaces/w")
marks = ("user.overlay.opaque", "user.overlay.redirect", "trusted.overlay.opaque")
found = [told(os.setxattr, "d", mark, b"y") for mark in marks]
found += [told(os.mknod, "white", 0o20000, 0), os.listdir("d")]
found += [[name for name in os.listxattr("d") if "overlay" in name]]
"""
    outcome, name = await house.run(program, {}, {"w": first})
    upper = house.data / "steps" / "steps" / name / "workspaces" / "w" / "upper"

    assert isinstance(outcome, Success), outcome
    assert json.loads(outcome.body)[4] == ["f"]
    assert "EPERM" in json.loads(outcome.body)[2:4]
    marks = [os.listxattr(path) for path in upper.rglob("*")]
    assert not {"user.overlay.redirect"} & {mark for each in marks for mark in each}
    assert "d" not in [change.path for change in house.workspaces._changes(first.layers[0])][1:]


async def test_what_a_first_step_says_in_overlays_own_words_hides_nothing(house: House):
    """It has no overlay: what it writes is what will lie below the next one's."""
    first = await house.changed(
        Workspace(),
        """
for name in ("d", "e"):
    os.mkdir(name)
    Path(name, "f").write_text("there")
Path("empty").touch()
for place in (".", "d", "d/f", "empty"):
    for mark in ("opaque", "redirect", "metacopy", "whiteout", "origin", "impure"):
        for value in (b"y", b"x", b"/e"):
            told(os.setxattr, place, f"user.overlay.{mark}", value)
    os.setxattr(place, "user.mine", b"kept")
os.chmod("d/f", 0o444)
told(os.mknod, "white", 0o20000, 0)
""",
    )
    program = """
os.chdir("/workspaces/w")
result = [sorted(os.listdir(".")), Path("d/f").read_text(), os.listdir("d"),
          os.getxattr("d/f", "user.mine").decode(), os.stat("d/f").st_mode & 0o777]
"""
    found = await house.found(program.replace("result = ", "found = "), {}, {"w": first})

    assert found == [["d", "e", "empty"], "there", ["f"], "kept", 0o444]
    (layer,) = first.layers
    tree = house.workspaces._tree(layer)
    marks = {mark for path in (tree, *tree.rglob("*")) for mark in os.listxattr(path)}
    assert marks == {"user.mine"}


# ---- what nobody sees ---------------------------------------------------------------------------


@pytest.mark.parametrize("has_folders", [True, False])
async def test_nothing_else_of_the_stores_can_be_seen(house: House, has_folders: bool):
    """Other steps' folders, other artifacts, other layers: not listed, not found by name."""
    other = await house.made("Path('/out/made').write_text('secret')")
    await house.changed(Workspace(), "Path('f').write_text('secret')")
    house.steps.make("other")
    layer = os.listdir(house.data / "workspaces" / "layers")[0]
    paths = [
        *STORES,
        f"/artifacts/{house.place(other)}",
        "/steps/other/out",
        f"/layers/{layer}/tree",
    ]
    program = f"""
paths = {paths!r}
paths += ["/proc/self/root" + path for path in paths]
paths += ["/out/../steps/other", "/in/../steps/other"]
found = [path for path in paths if os.path.exists(path) and os.listdir(path)]
found += [line for line in open("/proc/self/mountinfo") if "/other" in line]
"""
    if has_folders:
        assert await house.found(program) == []
        return
    function = house.function("flow.bare.1")
    invocation = Invocation(InvocationId("i"), function.id, json.dumps(program).encode())
    outcome = await house.pool.run_once(function, ENVIRONMENT, invocation)

    assert isinstance(outcome, Success), outcome
    assert json.loads(outcome.body) == []


async def test_functions_that_are_no_steps_have_nothing_of_it(house: House):
    """Not even the places."""
    await house.made("Path('/out/made').write_text('secret')")
    function = house.function("plain")
    house.pool.deploy(function, ENVIRONMENT)
    places = [*STORES, "/in", "/out", "/workspaces"]
    program = json.dumps(f"found = [path for path in {places!r} if os.path.lexists(path)]")
    invocation = Invocation(InvocationId("i"), function.id, program.encode())
    outcome = await house.pool.invoke(invocation)
    house.pool.remove(function.id)

    assert isinstance(outcome, Success), outcome
    assert json.loads(outcome.body) == []


async def test_a_sandbox_that_was_not_made_for_steps_takes_no_folders(house: House):
    house.steps.make("s")
    function = house.function("plain", Mounts("s"))
    house.pool.deploy(function, ENVIRONMENT)
    invocation = Invocation(InvocationId("i"), function.id, b'"pass"')
    outcome = await house.pool.invoke(invocation)
    house.pool.remove(function.id)
    house.steps.remove("s")

    assert isinstance(outcome, Failure)
    assert outcome.kind == "ImportFailed"
    assert "not made for steps" in outcome.message


async def test_code_in_a_step_finds_no_more_open_than_in_a_function(house: House):
    """The whole battery, against its own folders too; what it may do in these is asked above."""
    made = await house.made("os.mkdir('/out/made'); Path('/out/made/file').write_text('x')")
    base = await house.changed(
        Workspace(), f"os.mkdir('d'); Path('d/f').write_text({SECRET[:8]!r})"
    )
    port = 1
    with planted_on_host(house.data, os.getpid(), os.geteuid(), port) as given:
        program = f"import escape\nfound = escape.battery({given!r})"
        limits = Limits(tmp_mb=given["tmp_mb"])
        more = {"timeout_seconds": 60.0, "limits": limits}
        verdicts = await house.found(program, {"a": made}, {"w": base}, **more)
    may = ALLOWED if os.geteuid() == 0 else ALLOWED_WITHOUT_ROOT

    assert not {name: v for name, v in verdicts.items() if v.startswith("error")}
    assert len(verdicts) >= PROBES_MIN
    assert opened(verdicts) <= set(may)
    house.artifacts.verify(made)


# ---- its end ------------------------------------------------------------------------------------

LINGER = """
ready, unready = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.set_inheritable(unready, True)
        os.write(unready, b"x")
        os.close(unready)
        while True:
            with open("/out/beat", "a") as file:
                file.write("x")
            with open("/workspaces/w/beat", "a") as file:
                file.write("x")
    os._exit(0)
os.wait()
os.read(ready, 1)
"""


async def test_when_it_has_returned_nobody_writes_any_more(house: House):
    """Not even a daemon that it left; and nothing of it stays: no mount, no process."""
    outcome, name = await house.run(LINGER, {}, {"w": Workspace()})
    folder = house.data / "steps" / "steps" / name
    beats = [folder / "out" / "beat", folder / "workspaces" / "w" / "upper" / "beat"]
    before = [beat.stat().st_size if beat.exists() else 0 for beat in beats]
    assert isinstance(outcome, Success), outcome
    for _ in range(20):
        await asyncio.sleep(0)
    after = [beat.stat().st_size if beat.exists() else 0 for beat in beats]

    assert before == after
    assert not [line for line in mounts_of("self") if name in line]
    assert isinstance(house.driver, LinuxDriver)
    assert house.driver._launcher is not None
    assert not [line for line in mounts_of(house.driver._launcher.pid) if name in line]
    assert steps_at(name) == []
    assert sorted(os.listdir(folder)) == ["out", "workspaces"]
    house.steps.remove(name)


def steps_at(name: str) -> list[str]:
    """The processes that have something of the step mounted."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "mountinfo").read_text()
        except OSError:
            continue
        if f"/{name}/" in text:
            found.append(folder.name)
    return found


async def test_who_is_over_its_time_is_dead_when_that_is_told(house: House):
    program = LINGER + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(86400)"
    outcome, name = await house.run(program, {}, {"w": Workspace()}, timeout_seconds=0.3)

    assert isinstance(outcome, Failure)
    assert outcome.kind == "TimedOut"
    assert steps_at(name) == []


async def test_who_is_cancelled_leaves_nobody_behind(house: House):
    running = asyncio.ensure_future(house.run(LINGER + "time.sleep(86400)", {}, {"w": Workspace()}))
    beat = house.out("step-1").parent.parent
    assert await asyncio.to_thread(eventually, lambda: list(beat.glob("*/out/beat")))
    (name,) = [path.parent.parent.name for path in beat.glob("*/out/beat")]
    running.cancel()
    await asyncio.wait({running})

    assert running.cancelled()
    assert steps_at(name) == []
    assert not house.pool.state.functions
    house.steps.remove(name)


# ---- without isolation, and without root --------------------------------------------------------


async def test_without_isolation_the_same_step_finds_its_folders(data: Path):
    """By links, where its context says; and is told that there are no workspaces."""
    async with AsyncExitStack() as stack:
        house = await house_in(stack, data, "process", "")
        house.artifacts.put_value("default", b"x")
        outcome, name = await house.run("Path(context.out_folder, 'made').write_text('it')")
        assert isinstance(outcome, Success), outcome
        made = house.artifacts.put("default", house.out(name), "made")
        program = "found = [Path(context.in_folder, n).read_text() for n in ('a', 'b/0')]"

        assert await house.found(program, {"a": made, "b/0": made}) == ["it", "it"]
        with pytest.raises(BadInput, match="workspace w needs isolation"):
            await house.run("pass", {}, {"w": Workspace()})
        assert not house.pool.state.functions


async def test_a_pool_that_ends_takes_no_step(data: Path):
    async with AsyncExitStack() as stack:
        house = await house_in(stack, data, "process", "")
        house.pool._is_draining = True
        with pytest.raises(Draining):
            await house.run("pass")


@pytest.mark.skipif(os.geteuid() != 0, reason="the suite itself runs without root")
@pytest.mark.timeout(300)
def test_all_of_it_holds_for_a_server_that_is_not_root():
    prefix, env = ordinary_user()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir="/tmp"))
        os.chown(folder, ORDINARY_UID, ORDINARY_UID)
        arguments = ["-m", "pytest", "-p", "no:cacheprovider", "--basetemp", f"{folder}/base"]
        arguments += ["-k", "not started"]  # one more way to the same sandbox
        done = subprocess.run(
            [*prefix, *arguments, __file__],
            env=os.environ | env | {"TMPDIR": folder, "HOME": folder},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=280,
        )

    assert done.returncode == 0, done.stdout + done.stderr
