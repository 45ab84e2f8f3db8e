"""Runs of workflows on a pool of fake sandboxes, in journals that can be broken or cut short: what
is run, what is written down before what, and what is not run again.
"""

import asyncio
import itertools
import json
import tempfile
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings
from msgspec import structs

from dayfly.protocol import Failed, Invoke
from dayfly_pool import autoscale
from dayfly_pool import journal as journal_module
from dayfly_pool import ours as ours_module
from dayfly_pool.clock import Clock
from dayfly_pool.config import Config
from dayfly_pool.errors import (
    BadInput,
    DiskFull,
    EnvironmentNotFound,
    FunctionNotFound,
    PackageDamaged,
    PlatformError,
    RunNotFound,
    SandboxStartFailed,
    StoreFailed,
    TakingEnded,
    WorkflowNotFound,
)
from dayfly_pool.journal import Journals
from dayfly_pool.models import (
    BASE,
    Environment,
    Function,
    FunctionId,
    FunctionSpec,
    Invocation,
    Mold,
    Mounts,
    Outcome,
    Success,
    Timing,
    function_id,
)
from dayfly_pool.pool import Pool
from dayfly_pool.retry import KILLS_MAX
from dayfly_pool.store.journals import Append, Entry, JournalId
from dayfly_pool.store.memory_journals import MemoryJournals
from dayfly_pool.testing import DIGEST, Ended, FakeDriver, FakeGuest
from dayfly_pool.workflow import facts
from dayfly_pool.workflow import facts as facts_module
from dayfly_pool.workflow import run as run_module
from dayfly_pool.workflow import runs as module
from dayfly_pool.workflow.attempts import Means
from dayfly_pool.workflow.bodies import COMMAND, Body, identity
from dayfly_pool.workflow.cache import StepCache
from dayfly_pool.workflow.facts import VALUE_BYTES_MAX
from dayfly_pool.workflow.handover import Given, Handover, Taking, owner_of
from dayfly_pool.workflow.model import (
    Declared,
    Matrix,
    Output,
    Param,
    Step,
    TaskSpec,
    Wait,
    WorkflowSpec,
)
from dayfly_pool.workflow.provenance import encode
from dayfly_pool.workflow.run import AskCancel, Call, Decide, LiveRun, token_of
from dayfly_pool.workflow.runs import Runs, View
from dayfly_pool.workflow.threads import SHARE, Threads

SOON_S = 10.0
"""What must happen happens at once; this is for a machine that is very busy."""

RAISED = Failed(kind="Raised", message="no", traceback="")
owners = itertools.count(1)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for seconds waits for hundredths of one."""
    monkeypatch.setattr(autoscale, "BACKOFF_FIRST_S", 0.01)
    monkeypatch.setattr(journal_module, "REPAIR_S", 0.01)
    monkeypatch.setattr(ours_module, "AGAIN_S", 0.01)
    monkeypatch.setattr(module, "SWEEP_S", 0.01)
    monkeypatch.setattr(run_module, "HEAD_S", 0.0)
    monkeypatch.setattr(run_module, "LAST_WRITE_S", 0.01)


class Hands(Clock):
    """A clock that is also put forward."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead_s = 0.0

    def now(self) -> float:
        return super().now() + self.ahead_s


class Work:
    """What steps do: each as its key's next word of *script* says, and then return its params."""

    def __init__(self, script: Mapping[str, Iterable[Any]] | None = None) -> None:
        self.script = {key: list(words) for key, words in (script or {}).items()}
        self.ran: list[tuple[str, str]] = []
        """Key and attempt, as they began."""

        self.ended: Counter[str] = Counter()
        self.env: dict[str, dict[str, str]] = {}
        self.bodies: dict[str, Any] = {}
        self.boxes: dict[str, str] = {}
        self.now = self.most = 0
        self.gate = asyncio.Event()
        self.gate.set()
        """No step ends before it is set."""

    @property
    def keys(self) -> Counter[str]:
        return Counter(key for key, _ in self.ran)

    def word(self, key: str, attempt: int) -> Any:
        """What it does this time."""
        words = self.script.get(key)
        return words.pop(0) if words else self.bodies[key]

    async def __call__(self, guest: FakeGuest, request: Invoke, body: bytes) -> Any:
        assert request.env is not None
        key = request.env["DAYFLY_STEP"]
        self.ran.append((key, request.env["DAYFLY_ATTEMPT"]))
        self.env[key], self.bodies[key] = request.env, json.loads(body)
        self.boxes[key] = guest.sandbox
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.gate.wait()
            await asyncio.sleep(0)
            word = self.word(key, int(request.env["DAYFLY_ATTEMPT"]))
            if isinstance(word, Exception):
                raise word
            if isinstance(word, Failed):
                return word
            self.ended[key] += 1
            return word if isinstance(word, bytes) else msgspec.json.encode(word)
        finally:
            self.now -= 1


class Server:
    """The runs of a server, and what they stand on."""

    def __init__(self, runs: Runs, pool: Pool, journals: Journals, known: dict[str, Any]) -> None:
        self.runs, self.pool, self.journals, self.known = runs, pool, journals, known

    def declare(self, *steps: Step, name: str = "flow", **fields: Any) -> None:
        spec = WorkflowSpec(steps=steps, package=DIGEST, **fields)
        self.known["workflows"]["default", name] = spec

    async def start(self, name: str = "flow", run: str = "one", **params: Any) -> View:
        return await self.runs.start("default", name, params, run)

    async def get(self, run: str = "one") -> View:
        return await self.runs.get("default", run)

    async def over(self, run: str = "one") -> View:
        """The run when it is over."""
        while not (view := await self.get(run)).journal.is_over:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        return view

    async def run(self, *steps: Step, **fields: Any) -> View:
        """One run of these, to its end."""
        self.declare(*steps, **fields)
        await self.start()
        return await self.over()

    async def ask(self, wanted: Any, run: str = "one") -> View:
        return await self.runs.ask("default", run, wanted)

    async def token(self, key: str, attempt: int = 1, run: str = "one") -> str:
        return token_of((await self.get(run)).stored, key, attempt)

    async def states(self, run: str = "one") -> dict[str, str]:
        """What people see of its steps."""
        tree = await self.runs.tree(await self.get(run))
        assert tree is not None
        return {child.key: child.state for child in tree.children}

    @property
    def live(self) -> LiveRun:
        (found,) = self.runs._live.values()
        return found


@asynccontextmanager
async def serving(
    work: Work, store: MemoryJournals | None = None, **changed: Any
) -> AsyncIterator[Server]:
    """A server whose steps do *work*."""
    settings = {
        "data": Path("/nowhere"),
        "generic_min": 0,
        "generic_max": 0,
        "sandboxes_max": 16,
        "starts_max": 8,
        "tick_s": 0.01,
        "grace_s": 0.05,
        "memory_reserve_mb": 0,
    }
    driver = FakeDriver({"main:work": work, COMMAND: work})
    pool = Pool(Config(**settings), driver)
    is_alone = changed.pop("is_alone", True)
    journals = Journals(
        store or MemoryJournals(), owner=f"server-{next(owners)}", is_alone=is_alone, **changed
    )
    known: dict[str, Any] = {
        "workflows": {},
        "tasks": {},
        "refusals": [],
        "functions": {},
        "began": [],
        "verifying": threading.Event(),
    }
    known["verifying"].set()
    folders = tempfile.TemporaryDirectory()
    known["data"] = Path(folders.name)

    def prepare(namespace: str, workflow: str, body: Body) -> FunctionId:
        if known["refusals"]:
            raise known["refusals"].pop(0)
        if body.spec is None:
            if body.function not in known["functions"]:
                raise FunctionNotFound(f"no function {body.function}")
            return function_id(namespace, body.function)
        id_ = FunctionId(identity(namespace, workflow, body, BASE))
        if id_ not in pool.state.functions:
            pool.deploy(Function(id_, "1", body.spec, Mold(BASE, "none", "")), Environment(BASE))
        return id_

    def identify(namespace: str, workflow: str, body: Body) -> FunctionId:
        return FunctionId(identity(namespace, workflow, body, BASE))

    async def once(
        function: FunctionId,
        body: Body,
        mounts: Mounts,
        invocation: Invocation,
        returned: Callable[[Outcome], None],
    ) -> Outcome:
        """What it has as params it leaves as a file."""
        known["began"].append(invocation.env["DAYFLY_STEP"])
        out = known["data"] / "steps" / "steps" / mounts.step / "out"
        (out / "file").write_bytes(body.event)
        done = Success(b"null", Timing())
        returned(done)
        return done

    cache = StepCache(known["data"] / "cache")
    cache.open()
    handover = Handover(known["data"], owner_of(3_000_000))
    handover.open()
    means = Means(
        pool=pool,
        journals=journals,
        clock=journals.clock,
        prepare=prepare,
        identify=identify,
        once=once,
        verify=lambda namespace, body: known["verifying"].wait(),
        handover=handover,
        cache=cache,
        environment=lambda namespace, name: Environment(BASE),
        sign=encode,
        internal={},
        empty_package=DIGEST,
        flights={},
    )
    runs = Runs(means, known["workflows"], known["tasks"])
    with folders:
        async with asyncio.timeout(SOON_S), pool.running(), journals.running(), runs.running():
            yield Server(runs, pool, journals, known)
        handover.close()


def step(name: str, *after: str, **fields: Any) -> Step:
    """A handler, unless *fields* say otherwise."""
    if not {"script", "command", "task", "workflow", "wait", "function"} & fields.keys():
        fields["handler"] = "main:work"
    return Step(name=name, run_after=after, **fields)


def result(name: str) -> str:
    return f"$(steps.{name}.results.result)"


def chain(number: int) -> list[Step]:
    """Each comes after the one before."""
    after = [(), *((f"s{n}",) for n in range(number - 1))]
    return [step(f"s{n}", *after[n], params={"n": n}) for n in range(number)]


async def until(question: Callable[[], object]) -> None:
    """Let everybody else go on until it is so; the test's own deadline ends it."""
    while not question():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


# ---- steps --------------------------------------------------------------------------------------


async def test_steps_run_in_order_and_hand_on_what_they_return():
    work = Work({"a": [{"x": 1}], "b": [[1, 2]]})
    async with serving(work) as server:
        view = await server.run(
            step("a", params={"n": 7}),
            step("b", params={"n": "$(steps.a.results.result.x)"}),
            step("c", params={"n": result("b"), "text": "of $(steps.a.results.result.x)"}),
            results={"last": result("c")},
        )

    assert view.status.state == "Succeeded"
    assert [key for key, _ in work.ran] == ["a", "b", "c"]
    assert work.bodies == {"a": {"n": 7}, "b": {"n": 1}, "c": {"n": [1, 2], "text": "of 1"}}
    assert view.status.results == {"last": {"n": [1, 2], "text": "of 1"}}
    assert (view.status.succeeded, view.status.failed) == (3, 0)
    assert 0 < view.status.started_at <= view.status.ended_at


async def test_a_step_is_told_who_it_is():
    work = Work({"a": [RAISED]})
    async with serving(work) as server:
        await server.run(step("a", retries=1, env={"MODE": "fast", "TRY": "$(retry.count)"}))

    assert {name: value for name, value in work.env["a"].items() if name != "MODE"} == {
        "DAYFLY_RUN": "default/one",
        "DAYFLY_STEP": "a",
        "DAYFLY_ATTEMPT": "2",
        "TRY": "1",
    }


async def test_a_fan_of_many_has_no_more_at_the_pool_than_the_limit(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(run_module, "AT_ONCE", 5)
    work = Work()
    async with serving(work) as server:
        server.declare(step("a", matrix=Matrix(params={"n": "$(params.n)"})), params=NUMBERS)
        await server.start(n=list(range(500)))
        most = 0

        def look() -> bool:
            nonlocal most
            most = max(most, len(server.pool._calls))
            return not server.runs._live

        await until(look)
        view = await server.over()

    assert most <= 5
    assert (view.status.state, view.status.succeeded) == ("Succeeded", 500)
    assert work.keys == Counter(f"a[{n}]" for n in range(500))


NUMBERS = (Param(name="n", type="array"),)


async def test_steps_that_are_the_same_share_sandboxes_and_others_do_not():
    """Whatever they are given; but a script that is another never finds what one has left."""
    work = Work()
    async with serving(work) as server:
        await server.run(
            step("a", params={"n": 1}),
            step("b", "a", params={"n": 2}, timeout="5s"),
            step("c", "b", script="echo 1", env={"N": "$(run.name)"}),
            step("d", "c", script="echo 1"),
            step("e", "d", script="echo 2"),
            step("f", "e", matrix=Matrix(params={"n": [1, 2, 3]}, parallelism=1),
                 script="echo 3", env={"N": "$(item.n)"}),
        )  # fmt: skip

    boxes = work.boxes
    assert boxes["a"] == boxes["b"]
    assert boxes["c"] == boxes["d"]
    assert boxes["f[0]"] == boxes["f[1]"] == boxes["f[2]"]
    assert len({boxes[key] for key in ("a", "c", "e", "f[0]")}) == 4
    assert [work.env[f"f[{n}]"]["N"] for n in range(3)] == ["1", "2", "3"]


async def test_what_a_process_wrote_has_the_type_that_is_declared():
    work = Work({"a": [{"result": None, "results": {"n": "5\n", "text": "5\n"}}]})
    declared = (Declared(name="n", type="integer"), Declared(name="text"))
    async with serving(work) as server:
        view = await server.run(
            step("a", script="whatever", results=declared),
            results={"n": "$(steps.a.results.n)", "text": "$(steps.a.results.text)"},
        )

    assert view.status.results == {"n": 5, "text": "5"}


async def test_large_values_are_together_no_more_than_a_step_can_be_given():
    """However little stands for them: 40 references to one are 40 times the one."""
    large = "x" * VALUE_BYTES_MAX
    work = Work({"a": [large]})
    async with serving(work) as server:
        many = [result("a")] * 40
        server.declare(step("a"), step("b", params={"n": many}))
        await server.start()
        view = await server.over()

    assert (view.status.state, work.keys["b"]) == ("Failed", 0)
    assert "over 6 MiB" in view.status.message


@pytest.mark.parametrize("kind", ["text", "bytes", "nested", "folder"])
async def test_what_only_stands_for_a_value_fails_the_step_that_is_given_it(kind: str):
    """Anybody can write a reference; what it leads to need be no value."""
    work = Work()
    async with serving(work) as server:
        out = server.known["data"] / "out"
        out.mkdir()
        if kind == "folder":
            (out / "x").mkdir()
        else:
            there = {
                "text": b"no JSON",
                "bytes": b'"\xff"',
                "nested": b"[" * 200_000 + b"]" * 200_000,
            }
            (out / "x").write_bytes(there[kind])
        handover = server.runs._means.handover
        kept = handover.artifacts.put("default", out, "x")
        forged = {"$large": {"uri": kept.uri, "sha256": kept.sha256}}
        server.declare(
            step("a", params={"n": "$(params.n)"}), params=(Param(name="n", type="any"),)
        )
        await server.start(n=forged)
        view = await server.over()

    assert (view.status.state, work.ran) == ("Failed", [])
    assert "is no value" in view.status.message or "a value is one file" in view.status.message


async def test_a_large_value_is_stored_and_the_next_step_is_given_it_whole():
    large = "x" * VALUE_BYTES_MAX
    work = Work({"a": [large]})
    async with serving(work) as server:
        view = await server.run(
            step("a"), step("b", params={"n": result("a")}), results={"n": result("a")}
        )

        assert view.status.state == "Succeeded"
        assert work.bodies["b"]["n"] == large
        assert view.status.results["n"]["$large"]["size_bytes"] == VALUE_BYTES_MAX + 2


@pytest.mark.parametrize(
    ("returned", "declared", "why"),
    [
        (b"{no json", (), "no JSON"),
        (b"\xff\xfe", (), "no JSON"),
        (b"[" * 100_000, (), "no JSON"),
        (b"", (), "no JSON"),
        (b"[" * 500 + b"]" * 500, (), "nested"),
        ({"n": "5"}, (Declared(name="n", type="integer"),), "result 'n' is declared as integer"),
    ],
)
async def test_an_answer_that_is_no_result_fails_the_step_and_says_why(
    returned: Any, declared: tuple[Declared, ...], why: str
):
    work = Work({"a": [returned]})
    async with serving(work) as server:
        view = await server.run(step("a", results=declared))

    assert (view.status.state, view.status.kind) == ("Failed", "BadResult")
    assert why in view.status.message


@pytest.mark.parametrize("returned", [b"[]", b'{"results": 3}', b'{"result": 1}', b"7"])
async def test_a_process_that_leaves_something_strange_fails_nothing_else(returned: bytes):
    work = Work({"a": [returned]})
    async with serving(work) as server:
        view = await server.run(
            step("a", script="x", results=(Declared(name="n"),), on_error="continue"),
            step("b", "a"),
        )

    assert view.status.state == "Succeeded"
    assert view.status.kind != "InternalError"


async def test_a_step_that_failed_is_tried_again_and_then_the_run_fails():
    work = Work({"a": [RAISED] * 9})
    async with serving(work) as server:
        view = await server.run(step("a", retries=2), step("b", "a"))

    assert (view.status.state, view.status.kind) == ("Failed", "Raised")
    assert view.status.message == "step 'a': no"
    assert work.ran == [("a", "1"), ("a", "2"), ("a", "3")]
    assert (view.status.succeeded, view.status.failed) == (0, 3)


async def test_a_step_that_takes_too_long_is_ended():
    work = Work()
    work.gate.clear()
    async with serving(work) as server:
        view = await server.run(step("a", timeout=0.05))

    assert (view.status.state, view.status.kind) == ("Failed", "TimedOut")


async def test_a_deployed_function_ends_with_its_steps_timeout():
    """Though its own is longer."""
    work = Work()
    work.gate.clear()
    async with serving(work) as server:
        deploy(server, "greet")
        view = await server.run(step("a", function="greet", timeout=0.05))

    assert (view.status.state, view.status.kind) == ("Failed", "TimedOut")


def deploy(server: Server, name: str) -> None:
    spec = FunctionSpec(handler="main:work", package=DIGEST, timeout_seconds=30.0)
    server.known["functions"][name] = spec
    id_ = function_id("default", name)
    server.pool.deploy(Function(id_, "1", spec, Mold(BASE, "none", "")), Environment(BASE))


@pytest.mark.parametrize(
    "why",
    [FunctionNotFound("it"), EnvironmentNotFound("it"), PackageDamaged("it"), BadInput("it")],
)
async def test_what_a_step_needs_and_is_gone_ends_it_at_once(why: PlatformError):
    work = Work()
    async with serving(work) as server:
        server.known["refusals"] += [why]
        view = await server.run(step("a", retries=50))

    assert (view.status.state, view.status.kind) == ("Failed", type(why).__name__)
    assert not work.ran


async def test_what_is_not_the_steps_fault_uses_up_none_of_its_retries():
    work = Work()
    async with serving(work) as server:
        server.known["refusals"] += [SandboxStartFailed("for a while")] * 3
        view = await server.run(step("a"))

    assert view.status.state == "Succeeded"
    assert work.ran == [("a", "4")]


@pytest.mark.parametrize("kills", [KILLS_MAX, KILLS_MAX + 1])
async def test_sandboxes_that_were_killed_are_not_counted_a_few_times(kills: int):
    work = Work({"a": [Ended()] * kills})
    async with serving(work) as server:
        view = await server.run(step("a"))

    assert view.status.state == ("Succeeded" if kills <= KILLS_MAX else "Failed")


async def test_results_that_are_too_many_for_the_summary_are_found_all_the_same():
    """A run whose results are large ends as any other."""
    large = ["x" * 200_000, "y" * 200_000]
    work = Work({"a": [large[0]], "b": [large[1]]})
    async with serving(work) as server:
        view = await server.run(step("a"), step("b"), results={"a": result("a"), "b": result("b")})
        found = await server.runs.results(view)

    assert view.status.state == "Succeeded"
    assert found == {"a": large[0], "b": large[1]}


async def test_a_fan_of_large_results_is_written_in_several_entries():
    store, work = MemoryJournals(), Work({f"a[{n}]": ["x" * 250_000] for n in range(100)})
    work.gate.clear()
    async with serving(work, store) as server:
        server.declare(step("a", matrix=Matrix(params={"n": "$(params.n)"})), params=NUMBERS)
        view = await server.start(n=list(range(100)))
        work.gate.set()
        view = await server.over()
        entries = await store.entries(view.journal.id)

    assert view.status.state == "Succeeded"
    assert max(len(entry.body) for entry in entries) < 2 * run_module.ENTRY_BYTES
    assert work.keys == Counter(f"a[{n}]" for n in range(100))


# ---- waits --------------------------------------------------------------------------------------


async def test_a_timer_holds_nothing_and_goes_off_by_the_clock():
    clock, work = Hands(), Work()
    async with serving(work, clock=clock) as server:
        server.declare(step("a"), step("t", "a", wait=Wait(timer="1h")), step("b", "t"))
        await server.start()
        await until(lambda: work.keys["a"] and not work.now)
        await asyncio.sleep(0.02)
        assert not work.keys["b"]
        clock.ahead_s = 3601.0
        server.live._wake.set()

        assert (await server.over()).status.state == "Succeeded"


async def test_a_timer_goes_off_after_a_restart_when_it_was_to_go_off():
    clock, work, store = Hands(), Work(), MemoryJournals()
    async with serving(work, store, clock=clock) as server:
        server.declare(step("t", wait=Wait(timer="1h")), step("b", "t"))
        await server.start()
        await until(lambda: server.runs._live and server.live.engine.wake_at)
    clock.ahead_s = 3601.0
    async with serving(work, store, clock=clock) as server:
        assert (await server.over()).status.state == "Succeeded"


WAITS = (step("w", wait=Wait(callback=True)), step("b", params={"n": result("w")}))


async def expecting(server: Server) -> None:
    await until(lambda: server.runs._live and server.live.expected)


async def test_a_callback_is_answered_once_by_who_has_the_token():
    work = Work()
    async with serving(work) as server:
        server.declare(*WAITS, step("late", "b", wait=Wait(callback=True)))
        await server.start()
        await expecting(server)
        token = await server.token("w")
        with pytest.raises(BadInput, match="nobody waits"):
            await server.runs.call_back("default", "one", "wrong" + token, 1)
        with pytest.raises(RunNotFound):
            await server.runs.call_back("default", "other", token, 1)
        await server.runs.call_back("default", "one", token, {"x": [1]})
        await until(lambda: work.keys["b"])
        await until(lambda: "late" in server.live.expected)
        with pytest.raises(BadInput, match="nobody waits"):
            await server.runs.call_back("default", "one", token, 2)
        assert [each.key for each in server.runs.expected((await server.get()).journal)] == ["late"]
        await server.runs.call_back("default", "one", await server.token("late"), None)
        await server.over()
        with pytest.raises(BadInput, match="nobody waits"):
            await server.runs.call_back("default", "one", token, 2)

    assert work.bodies["b"] == {"n": {"x": [1]}}


@pytest.mark.parametrize("value", [10**30, json.loads("[" * 100 + "]" * 100)])
async def test_an_answer_that_cannot_be_written_down_is_refused(value: Any):
    async with serving(Work()) as server:
        server.declare(*WAITS)
        await server.start()
        await expecting(server)
        token = await server.token("w")
        with pytest.raises(BadInput):
            await server.runs.call_back("default", "one", token, value)
        await server.runs.call_back("default", "one", token, 1)
        view = await server.over()

    assert view.status.state == "Succeeded"


@pytest.mark.parametrize("body", [b"{", msgspec.json.encode(Call("w", 1, [[[[]]]] * 3))[:-1]])
async def test_a_wish_that_cannot_be_read_stops_no_run(body: bytes):
    store = MemoryJournals()
    async with serving(Work(), store) as server:
        server.declare(*WAITS)
        view = await server.start()
        await expecting(server)
        await server.journals.wish(view.journal.id, body)
        await server.runs.call_back("default", "one", await server.token("w"), 1)
        view = await server.over()

    assert view.status.state == "Succeeded"


async def test_a_callback_that_came_is_known_after_a_restart_and_not_waited_for():
    store, work = MemoryJournals(), Work()
    work.gate.clear()
    async with serving(work, store) as server:
        server.declare(*WAITS)
        await server.start()
        await expecting(server)
        await server.runs.call_back("default", "one", await server.token("w"), 5)
        await until(lambda: work.keys["b"])
    work.gate.set()
    async with serving(work, store) as server:
        view = await server.over()

    assert (view.status.state, work.bodies["b"]) == ("Succeeded", {"n": 5})


async def test_a_callback_that_came_while_nobody_ran_it_is_heard_by_who_runs_it_next():
    store, work = MemoryJournals(), Work()
    async with serving(work, store) as server:
        server.declare(*WAITS)
        view = await server.start()
        await expecting(server)
    await store.wish(view.journal.id, msgspec.json.encode(Call("w", 1, 6)))
    async with serving(work, store) as server:
        view = await server.over()

    assert work.bodies["b"] == {"n": 6}


async def test_what_is_read_while_a_run_is_being_read_is_what_is_written(
    monkeypatch: pytest.MonkeyPatch,
):
    """Who calls back just after a restart is not told that nobody waits."""
    store, work = MemoryJournals(), Work()
    async with serving(work, store) as server:
        server.declare(*WAITS)
        await server.start()
        await expecting(server)
        token = await server.token("w")
    reading, gate = run_module.log_of, asyncio.Event()
    first = True

    async def slowly(journals: Journals, id_: JournalId, *part: int) -> list[Entry]:
        nonlocal first
        if first:
            first = False
            await gate.wait()
        return await reading(journals, id_, *part)

    monkeypatch.setattr(run_module, "log_of", slowly)
    async with serving(work, store) as server:
        await until(lambda: server.runs._live)
        await server.runs.call_back("default", "one", token, 8)
        gate.set()
        await server.over()

    assert work.bodies["b"] == {"n": 8}


@pytest.mark.parametrize("is_approved", [True, False])
async def test_somebody_approves_or_refuses(is_approved: bool):
    work = Work()
    async with serving(work) as server:
        server.declare(
            step("w", wait=Wait(approval="all well?")),
            step("b", params={"by": "$(steps.w.results.result.by)"}),
        )
        await server.start()
        await expecting(server)
        decided = Decide("", 0, is_approved, "ann", "looks good")
        with pytest.raises(BadInput, match="waits for no approval"):
            await server.runs.decide("default", "one", "b", decided)
        await server.runs.decide("default", "one", "w", decided)
        view = await server.over()

    assert view.status.state == ("Succeeded" if is_approved else "Failed")
    assert work.bodies == ({"b": {"by": "ann"}} if is_approved else {})
    assert is_approved or (view.status.kind, "ann" in view.status.message) == ("Refused", True)


async def test_a_callback_cannot_be_approved():
    async with serving(Work()) as server:
        server.declare(*WAITS)
        await server.start()
        await expecting(server)
        with pytest.raises(BadInput, match="waits for no approval"):
            await server.runs.decide("default", "one", "w", Decide("", 0, True))


async def test_what_is_wished_in_vain_takes_no_room():
    """However often: who may answer is heard all the same."""
    work = Work()
    async with serving(work) as server:
        server.declare(*WAITS)
        view = await server.start()
        await expecting(server)
        for _ in range(200):
            await server.journals.wish(view.journal.id, msgspec.json.encode(Call("w", 9)))
            await until(lambda: server.live._fed == server.live._heard)
            await asyncio.sleep(0)
        await server.runs.call_back("default", "one", await server.token("w"), 1)

        assert (await server.over()).status.state == "Succeeded"


# ---- ends ---------------------------------------------------------------------------------------


async def test_a_cancelled_run_stops_what_runs_and_does_what_runs_finally():
    work = Work()
    work.gate.clear()
    async with serving(work) as server:
        server.declare(step("a"), step("b", "a"), finally_=(step("last"),))
        await server.start()
        await until(lambda: work.now)
        await server.ask(AskCancel(by="ann"))
        await until(lambda: work.keys["last"])
        work.gate.set()
        view = await server.over()

    assert (view.status.state, view.status.message) == ("Cancelled", "cancelled by ann")
    assert work.keys == {"a": 1, "last": 1}
    assert work.ended == {"last": 1}


async def test_a_run_that_is_cancelled_hard_is_over_at_once():
    work = Work()
    work.gate.clear()
    async with serving(work) as server:
        server.declare(step("a"), finally_=(step("last"),))
        await server.start()
        await until(lambda: work.now)
        await server.ask(AskCancel(hard=True))
        view = await server.over()
        await until(lambda: not work.now)

    assert (view.status.state, work.keys) == ("Cancelled", {"a": 1})


async def test_steps_that_have_not_begun_are_cancelled_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_module, "AT_ONCE", 2)
    work = Work()
    work.gate.clear()
    async with serving(work) as server:
        server.declare(step("a", matrix=Matrix(params={"n": list(range(50))})))
        await server.start()
        await until(lambda: work.now == 2)
        await server.ask(AskCancel())
        view = await server.over()

    assert (view.status.state, len(work.ran)) == ("Cancelled", 2)


async def test_a_step_that_is_being_made_ready_is_cancelled_too():
    """The pool does not know of it yet, and is never told of it."""
    async with serving(Work()) as server:
        leaves = (Output(name="file"),)
        server.declare(step("a", outputs=leaves), finally_=(step("last"),))
        server.known["verifying"].clear()
        await server.start()
        await until(lambda: server.runs._live and server.live._running)
        await server.ask(AskCancel())
        await until(lambda: server.live._attempts._unwanted)
        server.known["verifying"].set()
        view = await server.over()

    assert (view.status.state, server.known["began"]) == ("Cancelled", [])


async def test_what_was_cancelled_stays_so_after_a_restart():
    store, work = MemoryJournals(), Work()
    work.gate.clear()
    async with serving(work, store) as server:
        server.declare(step("a"), step("b", "a"), finally_=(step("last"),))
        await server.start()
        await until(lambda: work.now)
        await server.ask(AskCancel())
        await until(lambda: work.keys["last"])
    work.gate.set()
    async with serving(work, store) as server:
        view = await server.over()

    assert view.status.state == "Cancelled"
    assert (work.keys["a"], work.keys["b"], work.ended["last"]) == (1, 0, 1)


async def test_who_waits_for_a_runs_end_is_told_of_it():
    work = Work()
    work.gate.clear()
    async with serving(work) as server:
        server.declare(step("a"))
        await server.start()
        _, early = await server.runs.over("default", "one", 0.01)
        waiting = asyncio.create_task(server.runs.over("default", "one", SOON_S))
        await until(lambda: work.now)
        work.gate.set()
        _, late = await waiting
        _, after = await server.runs.over("default", "one", SOON_S)

        assert (early.state, late.state, after.state) == ("Running", "Succeeded", "Succeeded")
        with pytest.raises(RunNotFound):
            await server.runs.over("default", "none", SOON_S)


async def test_nobody_waits_for_the_end_of_a_run_that_another_server_is_to_go_on_with():
    work = Work()
    work.gate.clear()
    async with serving(work) as server:
        server.declare(step("a"))
        await server.start()
        await until(lambda: work.now)
        waiting = asyncio.create_task(server.runs.over("default", "one", SOON_S))
        await asyncio.sleep(0)
        server.runs.hold()
        _, status = await waiting
        work.gate.set()

    assert status.state == "Running"


async def test_nothing_can_be_wanted_of_a_run_that_is_over():
    async with serving(Work()) as server:
        await server.run(step("a"))

        with pytest.raises(BadInput, match="is over: Succeeded"):
            await server.ask(AskCancel())
        with pytest.raises(BadInput, match="only what failed"):
            await server.runs.retry("default", "one")
        with pytest.raises(RunNotFound, match="default/other"):
            await server.ask(AskCancel(), "other")
        with pytest.raises(WorkflowNotFound, match="default/other"):
            await server.start("other")
        with pytest.raises(BadInput, match="no parameter 'x'"):
            await server.start(run="two", x=1)


async def test_a_failed_run_is_retried_as_another_with_what_succeeded():
    work = Work({"b": [RAISED, RAISED]})
    async with serving(work) as server:
        first = await server.run(
            step("a"), step("b", "a"), step("c", "b"), results={"c": result("c")}
        )
        again = await server.runs.retry("default", "one")
        await server.over(again.journal.name)
        third = await server.runs.retry("default", again.journal.name)
        view = await server.over(third.journal.name)
        also = await server.runs.retry("default", "one")
        await server.over(also.journal.name)

    assert first.status.state == "Failed"
    names = [each.journal.name for each in (again, third, also)]
    assert names == ["one-r1", "one-r2", "one-r3"]
    assert view.status.state == "Succeeded"
    assert work.ended == {"a": 1, "b": 2, "c": 2}
    assert [each for each in work.ran if each[0] == "b"][:3] == [("b", "1"), ("b", "2"), ("b", "3")]


async def test_a_run_that_is_over_can_be_forgotten_and_one_that_goes_on_cannot():
    work = Work()
    work.gate.clear()
    async with serving(work) as server:
        server.declare(step("a"))
        await server.start()
        with pytest.raises(BadInput, match="cancel it first"):
            await server.runs.delete("default", "one")
        work.gate.set()
        await server.over()
        await server.runs.delete("default", "one")
        with pytest.raises(RunNotFound):
            await server.get()


async def test_old_runs_are_forgotten():
    clock = Hands()
    async with serving(Work(), clock=clock) as server:
        await server.run(step("a"))
        clock.ahead_s = module.KEPT_S + 1
        await server.start(run="young")
        await server.over("young")
        while await server.journals.store.find("run", "default", "one"):  # noqa: ASYNC110
            await asyncio.sleep(0.005)

        assert [journal.name for journal, _ in await server.runs.page(None, 9, None)] == ["young"]


# ---- restarts -----------------------------------------------------------------------------------


async def test_what_has_ended_does_not_run_again_and_is_counted_once():
    """The counts are of the whole run, whenever the summary was written last."""
    store, work = MemoryJournals(), Work({"s1": [RAISED]})
    async with serving(work, store) as server:
        steps = chain(9)
        server.declare(steps[0], structs.replace(steps[1], retries=1), *steps[2:])
        await server.start()
        await until(lambda: work.ended["s3"])
    async with serving(work, store) as server:
        view = await server.over()

    assert (view.status.succeeded, view.status.failed) == (9, 1)
    assert all(work.ended[f"s{n}"] == 1 for n in range(3))


async def test_a_long_run_is_kept_as_a_snapshot_now_and_then(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_module, "SNAPSHOT_FACTS", 20)
    store, work = MemoryJournals(), Work()
    async with serving(work, store) as server:
        server.declare(*chain(100), results={"last": result("s99")})
        view = await server.start()
        await until(lambda: work.ended["s70"])
    entries = await store.entries(view.journal.id)
    async with serving(work, store) as server:
        view = await server.over()

    assert len(entries) <= 25
    assert (view.status.state, view.status.succeeded) == ("Succeeded", 100)
    assert max(work.ended.values()) <= 2
    assert sum(work.ended.values()) <= 101


async def test_a_run_that_is_too_large_for_a_snapshot_goes_on_without(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(run_module, "SNAPSHOT_FACTS", 5)
    monkeypatch.setattr(run_module, "SNAPSHOT_BYTES_MAX", 100)
    store, work = MemoryJournals(), Work()
    async with serving(work, store) as server:
        view = await server.run(*chain(30))
        entries = await store.entries(view.journal.id)

    assert (view.status.state, len(entries) >= 30) == ("Succeeded", True)


async def test_a_server_that_goes_down_writes_what_has_ended_and_begins_nothing():
    store, work = MemoryJournals(), Work()
    work.gate.clear()
    async with serving(work, store) as server:
        server.declare(step("a", matrix=Matrix(params={"n": [1, 2, 3]})), step("b", "a"))
        await server.start()
        await until(lambda: work.now == 3)
        server.runs.hold()
        work.gate.set()
        await until(lambda: not server.runs._live)
    assert work.keys["b"] == 0
    async with serving(work, store) as server:
        view = await server.over()

    assert view.status.state == "Succeeded"
    assert work.ended == {"a[0]": 1, "a[1]": 1, "a[2]": 1, "b": 1}


async def test_what_ends_at_the_very_end_is_written_too():
    """Whatever was being written then."""

    class Slow(MemoryJournals):
        is_slow = False

        async def append(self, appends: Any) -> Any:
            if self.is_slow:
                await asyncio.sleep(0.02)
            return await super().append(appends)

    store, work = Slow(), Work()
    async with serving(work, store) as server:
        server.declare(step("a", matrix=Matrix(params={"n": "$(params.n)"})), params=NUMBERS)
        await server.start(n=list(range(300)))
        store.is_slow = True
        await until(lambda: work.ended.total() > 40)
        server.runs.hold()
        assert await server.pool.drain(5)
    store.is_slow = False
    ended = work.ended.total()
    async with serving(work, store) as server:
        await server.over()

    assert ended < 300
    assert work.ended == Counter(f"a[{n}]" for n in range(300))


async def test_a_run_that_somebody_else_has_is_stopped_here():
    store, work = MemoryJournals(), Work()
    work.gate.clear()
    async with serving(work, store, is_alone=False) as server:
        server.declare(step("a"), step("b", wait=Wait(callback=True)))
        view = await server.start()
        await until(lambda: work.now)
        row = store._rows[view.journal.id]
        row.change(owner="another", fence=row.journal.fence + 1)
        server.live.hear(run_module.Wish(10**9, msgspec.json.encode(Call("b", 1))))
        await until(lambda: not server.runs._live and not work.now)

        assert not (await server.get()).journal.is_over
    assert not work.ended


async def test_a_run_that_is_lost_and_ours_again_goes_on_once():
    """Not twice at the same time."""
    store, work = MemoryJournals(), Work()
    work.gate.clear()
    async with serving(work, store, is_alone=False) as server:
        server.declare(step("a"), step("b", "a"))
        view = await server.start()
        await until(lambda: work.now)
        held = server.journals._held[view.journal.id]
        await store.fence(server.journals._owner)
        server.journals._lose(view.journal.id, held.fence)
        server.journals.look()
        await until(lambda: len(work.ran) == 2)
        assert work.now == 1
        work.gate.set()
        await server.over()

    assert work.ended == {"a": 1, "b": 1}


async def test_a_store_that_fails_for_a_while_holds_a_run_up_and_loses_nothing():
    store, work = MemoryJournals(), Work()
    work.gate.clear()
    async with serving(work, store) as server:
        server.declare(*chain(5))
        await server.start()
        await until(lambda: work.now)
        store.broken = StoreFailed("no space left")
        work.gate.set()
        await until(lambda: work.ended["s0"])
        await asyncio.sleep(0.05)
        assert work.ended.total() == 1
        store.broken = None
        view = await server.over()

    assert view.status.state == "Succeeded"
    assert work.ended == Counter(f"s{n}" for n in range(5))


async def test_a_damaged_journal_is_not_run_and_harms_no_other():
    class Damaged(MemoryJournals):
        id = ""

        async def entries(self, id_: Any, *more: Any, **which: Any) -> list[Entry]:
            found = await super().entries(id_, *more, **which)
            if id_ != self.id:
                return found
            return [structs.replace(entry, body=b"", damage="bits fell") for entry in found]

    store, work = Damaged(), Work()
    work.gate.clear()
    async with serving(work, store) as server:
        server.declare(step("a"))
        view = await server.start()
        await until(lambda: work.now)
    store.id, ran = view.journal.id, len(work.ran)
    work.gate.set()
    async with serving(work, store) as server:
        server.declare(step("a"))
        await server.start(run="two")
        await server.over("two")
        assert not (await server.get()).journal.is_over
        with pytest.raises(StoreFailed, match="bits fell"):
            await server.runs.tree(await server.get())
    assert len(work.ran) == ran + 1


async def test_what_was_wished_is_heard_though_the_run_had_to_be_begun_again():
    """A defect of ours, or a store that fails at the wrong moment: nothing said is lost."""
    store, work = MemoryJournals(), Work()
    async with serving(work, store) as server:
        server.declare(*WAITS)
        await server.start()
        await expecting(server)
        live = server.live

        def fail(fact: Any) -> Any:
            raise RuntimeError("a defect")

        live.engine.feed = fail  # type: ignore[method-assign]
        await server.runs.call_back("default", "one", await server.token("w"), 3)
        view = await server.over()

    assert (view.status.state, work.bodies["b"]) == ("Succeeded", {"n": 3})


async def test_functions_of_steps_are_kept_while_a_run_needs_them_and_then_dropped(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(module, "FUNCTION_IDLE_S", 0.02)
    async with serving(Work()) as server:
        server.declare(step("a"), step("w", "a", wait=Wait(callback=True)))
        await server.start()
        await expecting(server)
        await asyncio.sleep(0.1)
        assert server.pool.state.functions
        await server.runs.call_back("default", "one", await server.token("w"), None)
        await server.over()
        await until(lambda: not server.pool.state.functions)
        await server.start(run="two")
        await until(lambda: server.runs._live and server.live.expected)

        assert (await server.states("two"))["a"] == "succeeded"


async def test_ten_runs_share_the_sandboxes_and_all_end():
    work = Work()
    async with serving(work) as server:
        server.declare(*chain(5), step("f", "s4", matrix=Matrix(params={"n": [1, 2, 3]})))
        for number in range(10):
            await server.start(run=f"run-{number}")
        for number in range(10):
            assert (await server.over(f"run-{number}")).status.state == "Succeeded"

    assert work.most <= 16
    assert set(work.ended.values()) == {10}


# ---- what is written before what ----------------------------------------------------------------


class Cut(MemoryJournals):
    """Dies after its *n*th append, as with its server: nothing of what comes later is kept."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after
        self.died = asyncio.Event()

    async def append(self, appends: Any) -> Any:
        if self.left <= 0:
            self.died.set()
            raise StoreFailed("the server was killed")
        self.left -= 1
        return await super().append(appends)


class Sure(Work):
    """An attempt does what it does, however often it is made."""

    def word(self, key: str, attempt: int) -> Any:
        words = self.script.get(key, [])
        return words[attempt - 1] if attempt <= len(words) else self.bodies[key]


OUTCOMES = ("well", "raises once", "raises", "is killed", "raises, and is let")


@st.composite
def graphs(draw: Any) -> tuple[list[Step], dict[str, list[Any]], tuple[Step, ...]]:
    """Up to six steps, what each of them does, and perhaps one that runs finally."""
    steps: list[Step] = []
    script: dict[str, list[Any]] = {}
    for n in range(draw(st.integers(1, 6))):
        name = f"s{n}"
        others = st.sampled_from([each.name for each in steps] or [""])
        after = draw(st.lists(others, max_size=2, unique=True)) if steps else []
        outcome = draw(st.sampled_from(OUTCOMES))
        fields: dict[str, Any] = {"retries": 1 if outcome == "raises once" else 0}
        if outcome == "raises, and is let":
            fields["on_error"] = "continue"
        keys = [name]
        kind = draw(st.sampled_from(["handler", "handler", "matrix", "timer", "nested"]))
        if kind == "matrix":
            number = draw(st.integers(0, 3))
            fields["matrix"] = Matrix(params={"n": list(range(number))}, parallelism=2)
            keys = [f"{name}[{i}]" for i in range(number)]
        elif kind == "timer":
            fields = {"wait": Wait(timer=0.001)}
        elif kind == "nested":
            fields = {"workflow": "inner"}
            keys = [f"{name}/in"]
        words = {"raises once": [RAISED], "raises": [RAISED] * 9, "is killed": [Ended()]}
        for key in keys:
            script[key] = list(words.get(outcome.partition(",")[0], []))
        steps.append(step(name, *after, params={"n": n} if
                          kind == "handler" else {}, **fields))  # fmt: skip
    last = (step("last"),) if draw(st.booleans()) else ()
    return steps, script, last


def cut_and_go_on(
    steps: list[Step], script: dict[str, list[Any]], last: tuple[Step, ...], cut: int
) -> tuple[Work, list[View], list[str], dict[str, str]]:
    async def tell() -> tuple[Work, list[View], list[str], dict[str, str]]:
        store = Cut(cut)
        work = Sure(script)
        written: list[str] = []
        views: list[View] = []
        while not views:
            async with serving(work, store) as server:
                server.declare(step("in"), name="inner", results={"r": result("in")})
                server.declare(*steps, finally_=last)
                if await store.find("run", "default", "one") is None:
                    await server.start()
                over = asyncio.ensure_future(server.over())
                died = asyncio.ensure_future(store.died.wait())
                await asyncio.wait([over, died], return_when=asyncio.FIRST_COMPLETED)
                if not died.done():
                    views.append(over.result())
                    states = await server.states()
                else:
                    view = await server.get()
                    entries = await store.entries(view.journal.id)
                    engine, _ = run_module.replayed(view.stored.definition, entries)
                    written = [
                        key for key, node in engine._nodes.items() if node.phase.name == "SUCCEEDED"
                    ]
                    work.ran.append(("--- killed", ""))
                over.cancel()
                died.cancel()
            store.left, store.died = 10**9, asyncio.Event()
        return work, views, written, states

    return asyncio.run(tell())


@settings(max_examples=30, deadline=None)
@given(graphs(), st.integers(0, 12))
def test_wherever_a_run_is_cut_it_ends_as_if_nothing_had_been(
    graph: tuple[list[Step], dict[str, list[Any]], tuple[Step, ...]], cut: int
):
    """What was written as ended is not run again, and how it all ends is the same."""
    steps, script, last = graph

    def fresh() -> dict[str, list[Any]]:
        return {key: list(words) for key, words in script.items()}

    _, (calm,), _, calm_states = cut_and_go_on(steps, fresh(), last, 10**9)
    work, (view,), written, states = cut_and_go_on(steps, fresh(), last, cut)

    again = {key for key, _ in work.ran[work.ran.index(("--- killed", "")) + 1 :]} if (
        ("--- killed", "") in work.ran) else set()  # fmt: skip
    assert not again & set(written)
    assert view.status.state == calm.status.state
    if calm.status.state != "Failed":  # else it depends on who was first what else has begun
        assert view.status.results == calm.status.results
        assert states == calm_states


async def test_nothing_is_begun_before_what_it_follows_from_is_written():
    """A step is given to the pool only after the end of the one before is in the store."""
    seen: list[str] = []

    class Watched(MemoryJournals):
        async def append(self, appends: list[Append]) -> Any:
            await asyncio.sleep(0.001)
            late = await super().append(appends)
            seen.extend(f"written {entry.number}" for append in appends for entry in
                        [Entry(append.after + n + 1, 0, 0, 0, b"") for n in
                         range(len(append.entries))])  # fmt: skip
            return late

    class Telling(Work):
        async def __call__(self, guest: FakeGuest, request: Invoke, body: bytes) -> Any:
            assert request.env is not None
            seen.append(request.env["DAYFLY_STEP"])
            return await super().__call__(guest, request, body)

    async with serving(Telling(), Watched()) as server:
        await server.run(*chain(4))

    assert seen[:7] == ["s0", "written 2", "s1", "written 3", "s2", "written 4", "s3"]


async def test_a_wish_is_heard_with_what_it_leads_to_and_not_before(
    monkeypatch: pytest.MonkeyPatch,
):
    """Else a server that dies in between has forgotten it."""
    monkeypatch.setattr(run_module, "FACTS_AT_ONCE", 1)
    heard: list[tuple[int, list[str]]] = []

    class Watched(MemoryJournals):
        async def append(self, appends: Any) -> Any:
            await asyncio.sleep(0.005)
            for append in appends:
                names = [
                    type(facts.decode(fact)).__name__
                    for entry in append.entries
                    for fact in msgspec.msgpack.decode(entry.body)[1]
                ]
                heard.append((append.heard, names))
            return await super().append(appends)

    work = Work()
    work.gate.clear()
    async with serving(work, Watched()) as server:
        many = step("a", matrix=Matrix(params={"n": [1, 2, 3, 4, 5]}))
        server.declare(many, *WAITS, step("end", "a", "b", wait=Wait(callback=True)))
        await server.start()
        await until(lambda: work.now == 5)
        work.gate.set()
        await until(lambda: work.ended.total() >= 5)
        await server.runs.call_back("default", "one", await server.token("w"), 1)
        await until(lambda: "end" in server.live.expected)

    first = next(number for number, (wish, _) in enumerate(heard) if wish)
    assert "Called" in [name for _, names in heard[: first + 1] for name in names]
    assert heard[first][1] == ["Called"]


async def test_variables_of_a_step_that_is_a_task_are_the_workflows_words():
    """And those of the task are the task's."""
    work = Work()
    async with serving(work) as server:
        server.known["tasks"]["default", "t"] = TaskSpec(
            params=(Param(name="word"),),
            handler="main:work",
            package=DIGEST,
            env={"TASKS": "$(params.word)"},
        )
        view = await server.run(
            step("a", task="t", params={"word": "inner"}, env={"STEPS": "$(params.outer)"}),
            params=(Param(name="outer", default="o"),),
        )

    assert view.status.message == ""
    assert (work.env["a"]["TASKS"], work.env["a"]["STEPS"]) == ("inner", "o")


# ---- files that are handed over ------------------------------------------------------------------

FILES = (
    step("a", outputs=(Output(name="file"),)),
    step("b", inputs={"file": "$(steps.a.outputs.file)"}, outputs=(Output(name="file"),)),
)


async def test_the_next_step_begins_while_the_disk_is_at_what_the_last_one_left(
    monkeypatch: pytest.MonkeyPatch,
):
    """And the end of that one is written when the disk has it, before the end of the next."""
    settled, gate = threading.Event(), threading.Event()
    settle = Handover.settle

    def settle_later(self: Handover, given: Given) -> None:
        assert gate.wait(SOON_S)
        settle(self, given)
        settled.set()

    monkeypatch.setattr(Handover, "settle", settle_later)
    async with serving(Work()) as server:
        server.declare(*FILES)
        await server.start()
        await until(lambda: server.known["began"] == ["a", "b"])
        written = (await server.get()).status.succeeded, settled.is_set()
        told = [fact for fact in await server.runs.told(await server.get())]
        gate.set()
        view = await server.over()

    assert not any(isinstance(fact, facts_module.Ended) for fact in told)
    assert not written[1]
    assert view.status.state == "Succeeded"


async def test_the_disk_gets_what_a_step_left_when_the_next_has_its_folders(
    monkeypatch: pytest.MonkeyPatch,
):
    """A disk that is writing much has nobody make a folder."""
    did: list[str] = []
    prepare, settle = Handover.prepare, Handover.settle

    def note_prepare(self: Handover, *given: Any) -> Any:
        did.append("prepare")
        return prepare(self, *given)

    def note_settle(self: Handover, given: Given) -> None:
        did.append("settle")
        settle(self, given)

    monkeypatch.setattr(Handover, "prepare", note_prepare)
    monkeypatch.setattr(Handover, "settle", note_settle)
    async with serving(Work()) as server:
        await server.run(*FILES)

    assert did == ["prepare", "prepare", "settle", "settle"]


async def test_what_the_disk_refuses_is_not_written_down(monkeypatch: pytest.MonkeyPatch):
    """The run goes on from what is: the step runs again."""
    refusals, settle = [DiskFull("there is no room left")], Handover.settle

    def refuse(self: Handover, given: Given) -> None:
        if refusals:
            raise refusals.pop()
        settle(self, given)

    monkeypatch.setattr(Handover, "settle", refuse)
    async with serving(Work()) as server:
        view = await server.run(*FILES)
        began = Counter(server.known["began"])

    assert view.status.state == "Succeeded"
    assert began["a"] == 2


async def test_while_steps_are_hashed_everything_else_goes_on(monkeypatch: pytest.MonkeyPatch):
    """The rest of the server, other namespaces, and steps that leave nothing."""
    gate, began = threading.Event(), threading.Semaphore(0)
    take = Handover.take

    def take_long(self: Handover, *given: Any) -> Any:
        began.release()
        assert gate.wait(SOON_S)
        return take(self, *given)

    monkeypatch.setattr(Handover, "take", take_long)
    most = SHARE + 2
    async with serving(Work()) as server:
        threads = server.runs._means.handover.threads
        many = step("a", matrix=Matrix(params={"n": list(range(most))}), outputs=FILES[0].outputs)
        server.declare(many)
        await server.start()
        await until(lambda: len(server.known["began"]) == most)
        for _ in range(SHARE):
            assert await asyncio.to_thread(began.acquire, timeout=SOON_S)

        assert await threads.hash("other", lambda: "hashed") == "hashed"
        assert await threads.do(lambda: "short") == "short"
        assert not began.acquire(blocking=False)
        gate.set()
        view = await server.over()

    assert view.status.succeeded == most
    assert not threads._shares


async def test_a_thread_counts_until_it_has_ended_whoever_waits_for_it():
    """Or who is cancelled again and again would have them all."""
    threads, gate = Threads(share=1), threading.Event()
    for _ in range(2):
        waiting = asyncio.ensure_future(threads.hash("a", gate.wait))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
    late = asyncio.ensure_future(threads.hash("a", lambda: "late"))

    assert await threads.hash("b", lambda: "other") == "other"
    assert not late.done()
    gate.set()
    assert await late == "late"
    assert not threads._shares
    threads.close()


@pytest.mark.parametrize("is_hard", [True, False])
async def test_who_cancels_a_step_does_not_wait_for_what_it_left_to_be_hashed(
    monkeypatch: pytest.MonkeyPatch, is_hard: bool
):
    began, take = asyncio.Event(), Handover.take
    loop = asyncio.get_running_loop()

    def take_for_ever(self: Handover, *given: Any) -> Any:
        loop.call_soon_threadsafe(began.set)
        assert given[-1]._stopped.wait(SOON_S)
        return take(self, *given)

    monkeypatch.setattr(Handover, "take", take_for_ever)
    async with serving(Work()) as server:
        server.declare(*FILES)
        await server.start()
        await began.wait()
        await server.ask(AskCancel(hard=is_hard))
        view = await server.over()
        states = await server.states()
        stored = list((server.known["data"] / "artifacts/objects").glob("*/*"))

    assert view.status.state == "Cancelled"
    assert states["a"] != "Succeeded"
    assert stored == []


async def test_a_server_that_goes_down_does_not_wait_for_what_is_hashed(
    monkeypatch: pytest.MonkeyPatch,
):
    """Whoever goes on with the run has the step run again."""
    began = asyncio.Event()
    loop = asyncio.get_running_loop()
    stopped = []

    def take_for_ever(self: Handover, *given: Any) -> Any:
        loop.call_soon_threadsafe(began.set)
        stopped.append(given[-1]._stopped.wait(SOON_S))
        given[-1].go_on()

    monkeypatch.setattr(Handover, "take", take_for_ever)
    store = MemoryJournals()
    async with serving(Work(), store) as server:
        server.declare(*FILES)
        await server.start()
        await began.wait()
    monkeypatch.undo()
    async with serving(Work(), store) as server:
        view = await server.over()

    assert stopped == [True]
    assert view.status.state == "Succeeded"


async def test_the_time_that_it_takes_to_hash_is_the_steps():
    async with serving(Work()) as server:
        view = await server.run(step("a", outputs=FILES[0].outputs, timeout=0.000001))

    assert (view.status.state, view.status.kind) == ("Failed", "TimedOut")
    assert "what it left was still being read after 1e-06 s" in view.status.message


def test_the_time_that_a_step_ran_counts_and_that_between_two_readings_does_not(
    monkeypatch: pytest.MonkeyPatch,
):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    taking = Taking(10.0)
    taking.ran_s = 4.0
    with taking.reading():
        now[0] += 5.0
        taking.go_on()
    now[0] += 100.0
    with taking.reading():
        taking.go_on()
        now[0] += 2.0
        with pytest.raises(TakingEnded, match="still being read after 10 s"):
            taking.go_on()
    assert taking.is_late
