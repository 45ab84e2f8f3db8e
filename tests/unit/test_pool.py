"""The pool on fake sandboxes: real sockets and frames, no processes. Whatever a guest does, its
caller is told, and nobody else notices.
"""

import asyncio
import errno
import gc
import itertools
import socket
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from dayfly.capabilities import ZYGOTE_CAP_EFF
from dayfly.protocol import (
    PROTOCOL,
    Failed,
    Hello,
    Invoke,
    Loaded,
    Log,
    Message,
    Result,
    encode,
)
from dayfly_pool import autoscale
from dayfly_pool.config import Config
from dayfly_pool.driver import Exit
from dayfly_pool.errors import (
    Draining,
    FunctionNotFound,
    NoCapacity,
    PlatformError,
    QueueFull,
    SandboxStartFailed,
    ZygoteUnfit,
)
from dayfly_pool.models import (
    BASE,
    Environment,
    Failure,
    Function,
    Invocation,
    InvocationId,
    Limits,
    Mold,
    Outcome,
    SandboxId,
    Success,
)
from dayfly_pool.pool import Pool, _Call
from dayfly_pool.sandbox import Sandbox, left_behind
from dayfly_pool.testing import Ended, FakeDriver, FakeGuest, function

ENVIRONMENT = Environment(digest=BASE)
GREET, SHOUT = function("greet"), function("shout")
SOON_S = 5.0
"""What must happen happens at once; this is for a machine that is very busy."""

numbers = itertools.count(1)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed to start is tried again after a hundredth of a second, not half of one."""
    monkeypatch.setattr(autoscale, "BACKOFF_FIRST_S", 0.01)


async def hello(guest: FakeGuest, request: Invoke, body: bytes) -> bytes:
    return b"hello " + body


async def shout(guest: FakeGuest, request: Invoke, body: bytes) -> bytes:
    return body.upper()


async def hang(guest: FakeGuest, request: Invoke, body: bytes) -> None:
    await asyncio.Event().wait()


class Gate:
    """A behaviour that answers when the test says so."""

    def __init__(self) -> None:
        self.running = 0
        self._changed = asyncio.Condition()
        self._opened = asyncio.Event()

    async def __call__(self, guest: FakeGuest, request: Invoke, body: bytes) -> bytes:
        async with self._changed:
            self.running += 1
            self._changed.notify_all()
        await self._opened.wait()
        return guest.sandbox.encode()

    async def reached(self, number: int = 1) -> None:
        """Wait until *number* invocations are inside."""
        async with asyncio.timeout(SOON_S), self._changed:
            await self._changed.wait_for(lambda: self.running >= number)

    def open(self) -> None:
        self._opened.set()


@asynccontextmanager
async def running(driver: FakeDriver, *functions: Function, **changed: Any) -> AsyncIterator[Pool]:
    """A pool in which *functions* are deployed."""
    settings = {
        "data": Path("/nowhere"),
        "generic_min": 0,
        "generic_max": 0,
        "sandboxes_max": 8,
        "starts_max": 8,
        "tick_s": 0.01,
        "grace_s": 0.05,
        "memory_reserve_mb": 0,
    }
    pool = Pool(Config(**settings | changed), driver)
    async with asyncio.timeout(30), pool.running():
        for each in functions:
            pool.deploy(each, ENVIRONMENT)
        yield pool


def invocation(each: Function, body: bytes = b"", **changed: Any) -> Invocation:
    return Invocation(InvocationId(f"i{next(numbers)}"), each.id, body, **changed)


async def call(pool: Pool, each: Function, body: bytes = b"", **changed: Any) -> Outcome:
    async with asyncio.timeout(SOON_S):
        return await pool.invoke(invocation(each, body, **changed))


async def succeed(pool: Pool, each: Function, body: bytes = b"") -> bytes:
    outcome = await call(pool, each, body)
    assert isinstance(outcome, Success), outcome
    return outcome.body


async def fail(pool: Pool, each: Function, **changed: Any) -> Failure:
    outcome = await call(pool, each, **changed)
    assert isinstance(outcome, Failure), outcome
    return outcome


async def eventually(question: Callable[[], object]) -> None:
    """Give the loop its turns until *question* is true."""
    async with asyncio.timeout(SOON_S):
        while not question():  # noqa: ASYNC110 - what changes knows nothing of tests
            await asyncio.sleep(0.001)


def log_of(pool: Pool, each: Function) -> list[tuple[str, str, str]]:
    return [(line.invocation, line.stream, line.text) for line in pool.logs.tail(each.id, 1000)]


# ---- the usual ----------------------------------------------------------------------------------


async def test_the_first_call_creates_and_the_second_is_warm():
    driver = FakeDriver({"main:greet": hello})
    async with running(driver, GREET) as pool:
        first = await call(pool, GREET, b"Ada")
        second = await call(pool, GREET, b"Bob")

        assert isinstance(first, Success)
        assert isinstance(second, Success)
        assert (first.body, second.body) == (b"hello Ada", b"hello Bob")
        assert (first.timing.start, second.timing.start) == ("created", "warm")
        assert first.timing.create_s is not None
        assert first.timing.specialize_s is not None
        assert second.timing.create_s is None
        assert repr(pool.state) == "<PoolState [1 idle | 0 waiting]>"


async def test_a_kept_generic_sandbox_makes_the_first_call_a_pool_hit():
    driver = FakeDriver({"main:greet": hello})
    async with running(driver, GREET) as pool:
        pool.keep_generic(Mold(BASE), ENVIRONMENT, 1)
        await eventually(lambda: pool.state.phases() and "1 generic" in repr(pool.state))
        outcome = await call(pool, GREET)

        assert outcome.timing.start == "generic"


async def test_an_http_invocation_has_status_and_headers():
    async def teapot(guest: FakeGuest, request: Invoke, body: bytes) -> Result:
        assert request.http == {"method": "GET"}
        return Result(handler_s=0.5, status=418, headers=[["x-a", "1"]])

    async with running(FakeDriver({"main:greet": teapot}), GREET) as pool:
        outcome = await call(pool, GREET, http={"method": "GET"})

        assert isinstance(outcome, Success)
        assert (outcome.status, outcome.headers) == (418, [["x-a", "1"]])
        assert outcome.timing.handler_s == 0.5


async def test_what_a_handler_raises_is_the_callers_failure_and_the_sandbox_lives():
    async def broken(guest: FakeGuest, request: Invoke, body: bytes) -> None:
        raise ValueError("no")

    driver = FakeDriver({"main:greet": broken})
    async with running(driver, GREET) as pool:
        failure = await fail(pool, GREET)

        assert (failure.kind, failure.message) == ("Raised", "ValueError: no")
        assert len(driver.guests) == 1


async def test_a_function_that_is_not_there_is_not_found():
    async with running(FakeDriver()) as pool:
        with pytest.raises(FunctionNotFound):
            await call(pool, GREET)
        assert pool.under_way == 0


async def test_concurrent_calls_share_what_is_made_for_them():
    """Single flight: ten first calls of a function with maxScale 3 make three sandboxes."""
    gate = Gate()
    each = function("greet", max_scale=3)
    driver = FakeDriver({"main:greet": gate})
    async with running(driver, each) as pool, asyncio.TaskGroup() as tasks:
        calls = [tasks.create_task(succeed(pool, each)) for _ in range(10)]
        await gate.reached(3)
        assert len(driver.created) == 3
        gate.open()
    assert {task.result() for task in calls} == {b"sb-1", b"sb-2", b"sb-3"}


async def test_a_sandbox_takes_as_many_at_once_as_its_function_declares():
    gate = Gate()
    each = function("greet", concurrency=4)
    driver = FakeDriver({"main:greet": gate})
    async with running(driver, each) as pool, asyncio.TaskGroup() as tasks:
        for _ in range(4):
            tasks.create_task(succeed(pool, each))
        await gate.reached(4)
        assert driver.created == ["sb-1"]
        gate.open()


async def test_a_sandbox_gets_the_limits_of_its_function():
    limits = Limits(memory_mb=512)
    each = function("greet", limits=limits)
    driver = FakeDriver({"main:greet": hello})
    async with running(driver, each) as pool:
        await succeed(pool, each)

        assert driver.guests["sb-1"].limits == limits


# ---- guests that die ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exit_", "kind", "message"),
    [
        (Exit(-9), "Crashed", "the sandbox was killed by signal 9"),
        (Exit(139), "Crashed", "the sandbox was killed by signal 11"),
        (Exit(3), "Crashed", "the sandbox exited with code 3"),
        (Exit(0), "Crashed", "the sandbox exited with code 0"),
        (Exit(-9, oom_kills=1, peak_bytes=300 << 20), "OutOfMemory",
         "killed by the kernel at its memory limit (peak 300 MiB): raise limits.memoryMb"),
    ],
)  # fmt: skip
async def test_a_crash_tells_its_caller_the_cause(exit_: Exit, kind: str, message: str):
    """And the next call finds another sandbox."""

    async def crash(guest: FakeGuest, request: Invoke, body: bytes) -> bytes:
        if body:
            return body
        raise Ended(exit_)

    driver = FakeDriver({"main:greet": crash})
    async with running(driver, GREET) as pool:
        failure = await fail(pool, GREET)

        assert (failure.kind, failure.message) == (kind, message)
        assert failure.was_killed == (exit_ == Exit(-9))
        assert await succeed(pool, GREET, b"again") == b"again"
        assert driver.destroyed == ["sb-1"]


async def test_a_process_of_a_guest_that_was_killed_for_its_memory_is_told_as_such():
    """Once: the next one that is killed in the same sandbox may have been killed by anybody."""

    async def kill(guest: FakeGuest, request: Invoke, body: bytes) -> Failed:
        guest.oom_kills += body == b"memory"
        killed = "killed by signal 9"
        return Failed(kind="Exited", message=killed, traceback="", exit_code=137)

    driver = FakeDriver({"main:greet": kill})
    async with running(driver, GREET) as pool:
        failures = [await fail(pool, GREET, body=body) for body in (b"", b"memory", b"")]

    assert [failure.kind for failure in failures] == ["Exited", "OutOfMemory", "Exited"]
    assert failures[1].message.endswith("at its memory limit: raise limits.memoryMb")
    assert failures[1].exit_code == 137
    assert driver.created == ["sb-1"]


async def test_a_command_that_failed_is_told_with_its_last_words():
    """The last line of its own on stderr, without the name of a folder that it never knew."""

    async def work(guest: FakeGuest, request: Invoke, body: bytes) -> Failed:
        number = int(body)
        if number == 1:
            await guest.log(
                "a traceback\n/tmp/.dayfly-0123456789abcdef/script: \x1b no\n \n", 1, "stderr"
            )
            await guest.log("goodbye\n", 1)
        if number == 3:
            await guest.log("x" * 300 + "\n", 3, "stderr")
        return Failed(kind="Exited", message="exit code 2", traceback="", exit_code=2)

    async with running(FakeDriver({"main:greet": work}), GREET) as pool:
        told = [(await fail(pool, GREET, body=b"%d" % n)).message for n in (1, 2, 3)]

    assert told == [r"exit code 2: script: \x1b no", "exit code 2", "exit code 2: " + "x" * 200]


async def test_a_crash_is_told_to_all_in_the_same_sandbox_and_to_nobody_else():
    gate, other = Gate(), Gate()

    async def crash(guest: FakeGuest, request: Invoke, body: bytes) -> bytes:
        if body == b"crash":
            raise Ended
        return await gate(guest, request, body)

    shared = function("greet", concurrency=3, max_scale=1)
    driver = FakeDriver({"main:greet": crash, "main:shout": other})
    async with running(driver, shared, SHOUT) as pool, asyncio.TaskGroup() as tasks:
        unharmed = tasks.create_task(succeed(pool, SHOUT))
        beside = [tasks.create_task(fail(pool, shared)) for _ in range(2)]
        await gate.reached(2)
        await other.reached()
        crashed = await fail(pool, shared, body=b"crash")
        other.open()

        assert crashed.kind == "Crashed"
        assert [(await task).kind for task in beside] == ["Crashed", "Crashed"]
        assert await unharmed


class Obscure(FakeDriver):
    """It takes a while until it can say how a sandbox ended."""

    told = asyncio.Event()

    async def exited(self, sandbox: SandboxId) -> Exit:
        await self.told.wait()
        return await super().exited(sandbox)


async def test_an_invocation_that_reached_no_guest_is_not_the_functions_failure():
    """The idle sandbox that was chosen is dead, which the pool learns a moment later."""
    driver = Obscure({"main:greet": hello})
    driver.told = asyncio.Event()
    async with running(driver, GREET) as pool:
        await succeed(pool, GREET)
        await driver.guests["sb-1"].end(Exit(-9))
        await eventually(lambda: pool._boxes["sb-1"].sandbox._is_over)
        assert repr(pool.state) == "<PoolState [1 idle | 0 waiting]>"
        calling = asyncio.create_task(call(pool, GREET, b"x"))
        await asyncio.sleep(0)
        driver.told.set()
        outcome = await calling

        assert isinstance(outcome, Success), outcome


async def test_an_idle_sandbox_that_dies_is_replaced_without_anybody_noticing():
    driver = FakeDriver({"main:greet": hello})
    async with running(driver, GREET) as pool:
        await succeed(pool, GREET)
        await driver.guests["sb-1"].end(Exit(-9))
        await eventually(lambda: "empty" in repr(pool.state))

        assert await succeed(pool, GREET, b"x") == b"hello x"


# ---- guests that lie ----------------------------------------------------------------------------


def result(number: int) -> bytes:
    return encode(Result(handler_s=0.0), number, b"forged")


LOADED = Loaded(
    slots=1,
    import_s=0,
    busy_s=0,
    lockdown_s=0,
    threads=0,
    children=0,
    descriptors=0,
    cap_eff=0,
    no_new_privs=1,
    seccomp=2,
    landlock=0,
)
LIES = {
    "noise": b"\xff" * 64,
    "a length of 4 GiB": b"\xff\xff\xff\xff" + bytes(12),
    "an answer to another invocation": result(2),
    "an answer to one that was long ago": result(0),
    "an answer to one that cannot be": result(2**64 - 1),
    "two answers": result(1) * 2,
    "hello again": encode(Hello(protocol=PROTOCOL, python="3", preload_failures=[])),
    "loaded again": encode(LOADED),
    "loaded as an answer": encode(LOADED, 1),
    "a message for guests": encode(Invoke(id="x", remaining_s=1), 1),
    "a time that cannot be": encode(Result(handler_s=float("nan")), 1),
    "a failure of ours": encode(Failed(kind="TimedOut", message="", traceback=""), 1),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
async def test_a_guest_that_breaks_the_protocol_ends_alone(lie: bytes):
    """Its caller is told, it is destroyed, and a call beside it goes on undisturbed."""

    async def violate(guest: FakeGuest, request: Invoke, body: bytes) -> None:
        await guest.send(lie)

    gate = Gate()
    driver = FakeDriver({"main:greet": violate, "main:shout": gate})
    async with running(driver, GREET, SHOUT) as pool, asyncio.TaskGroup() as tasks:
        beside = tasks.create_task(succeed(pool, SHOUT))
        await gate.reached()
        outcome = await call(pool, GREET)
        await eventually(lambda: "sb-2" in driver.destroyed)
        gate.open()

        assert isinstance(outcome, Failure) or outcome.body == b"forged"  # it was its own answer
        if isinstance(outcome, Failure):
            assert outcome.kind == "ProtocolViolation"
        assert await beside == b"sb-1"


async def test_an_answer_for_another_sandboxs_invocation_is_not_taken():
    """Numbers count in each connection: nobody can answer for a neighbour."""
    victim = Gate()

    async def forge(guest: FakeGuest, request: Invoke, body: bytes) -> None:
        for number in range(2, 50):
            await guest.send(result(number))

    driver = FakeDriver({"main:greet": forge, "main:shout": victim})
    async with running(driver, GREET, SHOUT) as pool, asyncio.TaskGroup() as tasks:
        calls = [tasks.create_task(succeed(pool, SHOUT)) for _ in range(3)]
        await victim.reached(3)
        assert (await fail(pool, GREET)).kind == "ProtocolViolation"
        victim.open()
    assert b"forged" not in [task.result() for task in calls]


async def test_a_guest_that_floods_the_log_ends():
    async def flood(guest: FakeGuest, request: Invoke, body: bytes) -> None:
        frame = encode(Log(stream="stdout"), 1)
        while True:
            await guest.send(frame * 1000)

    async with running(FakeDriver({"main:greet": flood}), GREET) as pool:
        assert (await fail(pool, GREET)).kind == "ProtocolViolation"


async def test_a_guest_that_does_not_confirm_its_lock_down_never_runs_user_code():
    """The kernel's word: capabilities, no_new_privs, seccomp."""
    ran = False

    async def run(guest: FakeGuest, request: Invoke, body: bytes) -> bytes:
        nonlocal ran
        ran = True
        return b""

    driver = FakeDriver({"main:greet": run}, isolated=False)
    async with running(driver, GREET) as pool:
        driver.isolated = True
        driver.guests.clear()
        original = driver.on_load

        async def claim_nothing(guest: FakeGuest) -> None:
            await original(guest)
            await guest.say(Loaded.of(LOADED.__dict__ | {"cap_eff": 1}))

        driver.on_load = claim_nothing
        failure = await fail(pool, GREET)

        assert failure.kind == "InitCrashed"
        assert "lock-down" in failure.message
        assert not ran


@pytest.mark.parametrize("slots", [0, -1, 3, 10**9])
async def test_a_guest_cannot_take_more_places_than_its_function_declares(slots: int):
    async def claim(guest: FakeGuest) -> None:
        await guest.say(Loaded.of(LOADED.__dict__ | {"slots": slots}))

    driver = FakeDriver({"main:greet": hello}, on_load=claim)
    async with running(driver, function("greet", concurrency=2)) as pool:
        assert (await fail(pool, GREET)).kind == "ProtocolViolation"


# ---- who goes first -----------------------------------------------------------------------------


class Watched(FakeDriver):
    """Notes who was in the background when it was up, and when its function was loaded."""

    def __init__(self, *arguments: Any, **changed: Any) -> None:
        super().__init__(*arguments, on_start=self._note, on_load=self._note, **changed)
        self.noted: list[tuple[str, bool]] = []

    async def _note(self, guest: FakeGuest) -> None:
        what = "load" if guest.load else "start"
        self.noted.append((what, guest.sandbox in self.background))


async def test_a_burst_runs_in_the_background_until_it_is_loaded():
    """The handlers run as all others do."""
    driver = Watched({"main:greet": hello})
    each = [function(f"f{n}", handler="main:greet") for n in range(4)]
    async with running(driver, *each, starts_max=1) as pool, asyncio.TaskGroup() as tasks:
        calls = [tasks.create_task(succeed(pool, one)) for one in each]
    assert all(task.result() for task in calls)

    assert driver.noted[0] == ("start", False)
    assert set(driver.noted[1:]) == {("load", True), ("start", True)}
    assert driver.background == set()


async def test_what_goes_behind_comes_forward_in_time(monkeypatch: pytest.MonkeyPatch):
    """Handlers may keep every processor for as long as they like; nobody may starve of that."""
    monkeypatch.setattr("dayfly_pool.pool.BACKGROUND_S_MAX", 0)
    behind = set()

    class Noting(FakeDriver):
        def give_way(self, sandbox: SandboxId, *, background: bool) -> None:
            super().give_way(sandbox, background=background)
            if background and sandbox in self.guests:
                behind.add(sandbox)

    async def come(guest: FakeGuest) -> None:
        await eventually(lambda: guest.sandbox not in driver.background)

    driver = Noting({"main:greet": hello}, on_start=come, on_load=come)
    each = [function(f"f{n}", handler="main:greet") for n in range(4)]
    async with running(driver, *each, starts_max=1) as pool, asyncio.TaskGroup() as tasks:
        for one in each:
            tasks.create_task(succeed(pool, one))
        await eventually(lambda: len(behind) >= 3)


async def test_a_batch_stays_behind_and_comes_forward_before_it_is_too_late(
    monkeypatch: pytest.MonkeyPatch,
):
    """Its start and its load may take their time, but not all of it."""
    monkeypatch.setattr("dayfly_pool.pool.LATE_SHARE", 0.001)
    late: list[SandboxId] = []

    async def come(guest: FakeGuest) -> None:
        assert guest.sandbox in driver.background
        await eventually(lambda: guest.sandbox not in driver.background)
        late.append(guest.sandbox)

    driver = FakeDriver({"main:greet": hello}, on_start=come, on_load=come)
    batch = structs.replace(GREET, mold=structs.replace(GREET.mold, batch=True), is_batch=True)
    async with running(driver, batch) as pool:
        await succeed(pool, batch)
        assert len(late) == 2
        assert late[0] in driver.background


async def test_a_sandbox_is_killed_before_it_can_see_its_connection_end():
    """It would wind itself up, and copy the pages for it that it shares with its siblings."""
    seen: list[int] = []

    class Witness(FakeDriver):
        async def destroy(self, sandbox: SandboxId) -> Exit:
            if sandbox in self.guests:
                with pytest.raises(BlockingIOError):
                    self.guests[sandbox].connection.recv(1, socket.MSG_PEEK)
                seen.append(len(self.background & {sandbox}))
            return await super().destroy(sandbox)

    async with running(Witness({"main:greet": hello}), GREET) as pool:
        await succeed(pool, GREET)
    assert seen == [1]


# ---- time ---------------------------------------------------------------------------------------


async def test_the_deadline_is_told_when_it_is_reached():
    """And the sandbox ends with all its processes: nobody knows what it is still doing."""
    each = function("greet", timeout_seconds=0.05)
    driver = FakeDriver({"main:greet": hang})
    async with running(driver, each) as pool:
        failure = await fail(pool, each)
        await eventually(lambda: driver.destroyed)

        assert failure.kind == "TimedOut"
        assert 0.05 <= failure.timing.handler_s < 1
        assert repr(pool.state) == "<PoolState [empty | 0 waiting]>"


async def test_a_guest_that_ignores_the_end_of_its_time_is_killed_after_the_grace():
    async def stubborn(guest: FakeGuest, request: Invoke, body: bytes) -> None:
        guest.ignores_terminate = True
        await guest.terminated.wait()
        await asyncio.Event().wait()

    each = function("greet", timeout_seconds=0.02)
    driver = FakeDriver({"main:greet": stubborn})
    async with running(driver, each, grace_s=0.02) as pool:
        assert (await fail(pool, each)).kind == "TimedOut"
        guest = driver.guests["sb-1"]
        await eventually(lambda: driver.destroyed)

        assert guest.terminated.is_set()
        assert guest.ended.result() == Exit(-9)


async def test_those_beside_one_that_ran_out_of_time_are_told_why():
    started = asyncio.Event()

    async def both(guest: FakeGuest, request: Invoke, body: bytes) -> None:
        started.set()
        await asyncio.Event().wait()

    each = function("greet", timeout_seconds=0.1, concurrency=2, max_scale=1)
    async with running(FakeDriver({"main:greet": both}), each) as pool:
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(fail(pool, each))
            await started.wait()
            await asyncio.sleep(0.02)  # the second shall have more time left than the first
            second = tasks.create_task(fail(pool, each))

        assert first.result().kind == "TimedOut"
        assert second.result().kind == "Crashed"
        assert "another invocation in the same sandbox" in second.result().message


async def test_an_invocation_that_finds_no_sandbox_in_time_is_told():
    gate = Gate()
    each = function("greet", max_scale=1)
    async with running(FakeDriver({"main:greet": gate}), each) as pool:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(succeed(pool, each))
            await gate.reached()
            with pytest.raises(NoCapacity, match=r"none for default/greet in 0\.05 s"):
                await call(pool, each, queue_s_max=0.05)
            gate.open()

        assert (pool.under_way, pool.state.waiting) == (0, 0)


# ---- limits -------------------------------------------------------------------------------------


async def test_a_full_queue_refuses_at_once():
    gate = Gate()
    each = function("greet", max_scale=1, queue_max=1)
    async with running(FakeDriver({"main:greet": gate}), each) as pool:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(succeed(pool, each))
            await gate.reached()
            tasks.create_task(succeed(pool, each))
            await eventually(lambda: pool.state.waiting == 1)
            with pytest.raises(QueueFull, match="1 invocations of default/greet are waiting"):
                await call(pool, each)
            gate.open()
        assert pool.under_way == 0


async def test_a_full_pool_refuses_whatever_the_function():
    gate = Gate()
    driver = FakeDriver({"main:greet": gate, "main:shout": shout})
    async with running(driver, GREET, SHOUT, invocations_max=1) as pool:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(succeed(pool, GREET))
            await gate.reached()
            with pytest.raises(QueueFull, match="in this pool"):
                await call(pool, SHOUT)
            gate.open()
        assert await succeed(pool, SHOUT, b"a") == b"A"


@pytest.mark.parametrize(
    "bad",
    [
        {"http": {"x": "y" * 70_000}},
        {"http": {"x": object()}},
        {"body": b"x" * (7 << 20)},
    ],
    ids=["meta", "type", "body"],
)
async def test_a_request_that_no_frame_can_hold_is_its_own_callers_problem(bad: dict[str, Any]):
    """The sandbox, and whoever else is there, does not notice."""
    driver = FakeDriver({"main:greet": hello})
    async with running(driver, GREET) as pool:
        failure = await fail(pool, GREET, **bad)

        assert failure.kind == "BadRequest"
        assert await succeed(pool, GREET, b"x") == b"hello x"
        assert driver.created == ["sb-1"]


# ---- callers that go away -----------------------------------------------------------------------


async def test_a_caller_that_is_cancelled_while_it_waits_leaves_nothing():
    gate = Gate()
    each = function("greet", max_scale=1)
    driver = FakeDriver({"main:greet": gate})
    async with running(driver, each) as pool, asyncio.TaskGroup() as tasks:
        tasks.create_task(succeed(pool, each))
        await gate.reached()
        impatient = tasks.create_task(call(pool, each))
        await eventually(lambda: pool.state.waiting == 1)
        impatient.cancel()
        await eventually(impatient.done)

        assert (pool.under_way, pool.state.waiting) == (1, 0)
        gate.open()


async def test_a_caller_that_went_away_is_not_kept_in_memory_until_its_time_is_up():
    """Its body may be 6 MiB, and clients that hang up come by the thousand."""
    gate = Gate()
    each = function("greet", max_scale=1)
    driver = FakeDriver({"main:greet": gate})
    async with running(driver, each) as pool, asyncio.TaskGroup() as tasks:
        tasks.create_task(succeed(pool, each))
        await gate.reached()
        left = invocation(each, b"much")
        impatient = asyncio.create_task(pool.invoke(left))
        await eventually(lambda: pool.state.waiting == 1)
        impatient.cancel()
        await eventually(impatient.done)
        del impatient
        gc.collect()
        calls = [thing for thing in gc.get_objects() if isinstance(thing, _Call)]
        gate.open()

        assert left.id not in [each.invocation.id for each in calls]


async def test_a_sandbox_that_has_ended_does_not_wait_for_the_collector():
    """What has lived long is looked at last: garbage of 10,000 cold starts would come together."""

    async def die(guest: FakeGuest, request: Invoke, body: bytes) -> None:
        raise Ended

    def kept() -> set[Sandbox]:
        return {thing for thing in gc.get_objects() if isinstance(thing, Sandbox)}

    others = kept()
    gc.disable()
    try:
        async with running(FakeDriver({"main:greet": hello, "main:shout": die})) as pool:
            for each in (GREET, SHOUT):
                pool.deploy(each, ENVIRONMENT)
                await call(pool, each)
            pool.remove(GREET.id)
            await eventually(lambda: kept() <= others)
            assert not pool.state.sandboxes
    finally:
        gc.enable()


async def test_a_caller_that_is_cancelled_while_it_runs_gives_its_place_back():
    """The handler runs on to its end; then the same sandbox takes the next."""
    gate = Gate()
    each = function("greet", max_scale=1)
    driver = FakeDriver({"main:greet": gate})
    async with running(driver, each) as pool:
        impatient = asyncio.create_task(call(pool, each))
        await gate.reached()
        impatient.cancel()
        await eventually(impatient.done)
        assert pool.under_way == 0
        assert repr(pool.state) == "<PoolState [1 busy | 0 waiting]>"
        gate.open()

        assert await succeed(pool, each) == b"sb-1"


async def test_a_caller_that_is_cancelled_does_not_lift_the_deadline():
    """Nobody waits for it any more, and still it may not run for ever."""
    each = function("greet", timeout_seconds=0.05)
    started = asyncio.Event()

    async def forever(guest: FakeGuest, request: Invoke, body: bytes) -> None:
        started.set()
        await asyncio.Event().wait()

    driver = FakeDriver({"main:greet": forever})
    async with running(driver, each) as pool:
        impatient = asyncio.create_task(call(pool, each))
        await started.wait()
        impatient.cancel()

        await eventually(lambda: driver.destroyed == ["sb-1"])


# ---- deploying and removing ---------------------------------------------------------------------


async def test_a_deploy_lets_what_runs_end_and_what_comes_run_the_new_version():
    gate = Gate()
    new = function("greet", version="2", handler="main:shout")
    driver = FakeDriver({"main:greet": gate, "main:shout": shout})
    async with running(driver, GREET) as pool:
        async with asyncio.TaskGroup() as tasks:
            old = tasks.create_task(succeed(pool, GREET))
            await gate.reached()
            pool.deploy(new, ENVIRONMENT)

            assert await succeed(pool, new, b"new") == b"NEW"
            gate.open()
        assert old.result() == b"sb-1"
        await eventually(lambda: driver.destroyed == ["sb-1"])


async def test_a_removed_function_refuses_who_waits_and_lets_end_who_runs():
    gate = Gate()
    each = function("greet", max_scale=1)
    driver = FakeDriver({"main:greet": gate})
    async with running(driver, each) as pool:
        async with asyncio.TaskGroup() as tasks:
            runs = tasks.create_task(succeed(pool, each))
            await gate.reached()
            waits = tasks.create_task(refused(pool, each))
            await eventually(lambda: pool.state.waiting == 1)
            pool.remove(each.id)
            gate.open()
        assert runs.result() == b"sb-1"
        assert isinstance(waits.result(), FunctionNotFound)
        await eventually(lambda: not driver.guests)


async def refused(pool: Pool, each: Function) -> PlatformError:
    with pytest.raises(PlatformError) as raised:
        await call(pool, each)
    return raised.value


# ---- starts that fail ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "refusal",
    [SandboxStartFailed("no user namespaces"), OSError(errno.EMFILE, "too many open files")],
    ids=["refused", "out of descriptors"],
)
async def test_a_driver_that_cannot_start_does_not_take_the_pool_down(refusal: Exception):
    """More failures than may start at once; when it can again, the same caller is served."""
    driver = FakeDriver({"main:greet": hello})
    driver.refusal = refusal
    async with running(driver, GREET, starts_max=1) as pool, asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(succeed(pool, GREET, b"x"))
        await eventually(lambda: pool.state.molds[GREET.mold].failures == 1)
        driver.refusal = None

        assert await waiting == b"hello x"


@pytest.mark.parametrize("how", ["crash", "noise", "other protocol", "hang"])
async def test_a_guest_that_does_not_come_up_is_tried_again(how: str):
    async def misbehave(guest: FakeGuest) -> None:
        if guest.sandbox != "sb-1":
            return
        match how:
            case "crash":
                raise Ended(Exit(1))
            case "noise":
                await guest.send(b"Fatal Python error: out of luck....")
            case "other protocol":
                await guest.say(Hello(protocol=99, python="3", preload_failures=[]))
            case "hang":
                await asyncio.Event().wait()

    driver = FakeDriver({"main:greet": hello}, on_start=misbehave)
    async with running(driver, GREET, start_timeout_s=0.1) as pool:
        assert await succeed(pool, GREET, b"x") == b"hello x"
        assert driver.destroyed == ["sb-1"]


async def test_who_gets_no_sandbox_is_told_why_none_starts():
    driver = FakeDriver()
    driver.refusal = SandboxStartFailed("no user namespaces")
    async with running(driver, GREET) as pool:
        with pytest.raises(NoCapacity, match="the last start failed: no user namespaces"):
            await call(pool, GREET, queue_s_max=0.05)


# ---- functions that do not load -----------------------------------------------------------------


async def test_a_function_that_cannot_be_imported_says_so_to_everyone_who_waits():
    async def no(guest: FakeGuest) -> None:
        raise ImportError("No module named 'nothere'")

    driver = FakeDriver({"main:greet": hello}, on_load=no)
    each = function("greet", max_scale=1)
    async with running(driver, each) as pool:
        failures = await asyncio.gather(*(fail(pool, each) for _ in range(3)))

        assert {f.kind for f in failures} == {"ImportFailed"}
        assert driver.created == ["sb-1"]
        again = await fail(pool, each)
        assert again.kind == "ImportFailed"
        assert driver.created == ["sb-1"]


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("crash", "InitCrashed", "killed by signal 11"),
        ("memory", "OutOfMemory", "memory limit"),
        ("noise", "ProtocolViolation", "broke the protocol"),
        ("hang", "InitTimedOut", "longer than 0.1 s"),
        ("result", "ProtocolViolation", "unasked Result"),
    ],
)
async def test_an_import_that_ends_the_sandbox_is_told_as_such(how: str, kind: str, message: str):
    """At once, and not tried again for ever: the module that crashes once will crash again."""

    async def misbehave(guest: FakeGuest) -> None:
        match how:
            case "crash":
                raise Ended(Exit(-11))
            case "memory":
                raise Ended(Exit(-9, oom_kills=1))
            case "noise":
                await guest.send(b"\xff" * 16)
            case "hang":
                await asyncio.Event().wait()
            case "result":
                await guest.send(result(1))

    driver = FakeDriver({"main:greet": hello}, on_load=misbehave)
    async with running(driver, GREET, init_timeout_s=0.1) as pool:
        failure = await fail(pool, GREET)
        await eventually(lambda: driver.destroyed == ["sb-1"])

        assert failure.kind == kind
        assert message in failure.message
        assert driver.created == ["sb-1"]


async def test_the_corrected_version_runs_at_once():
    fixed = function("greet", version="2", handler="main:shout")
    driver = FakeDriver({"main:shout": shout})
    async with running(driver, GREET) as pool:
        assert (await fail(pool, GREET)).kind == "HandlerMissing"
        pool.deploy(fixed, ENVIRONMENT)

        assert await succeed(pool, fixed, b"a") == b"A"


# ---- logs ---------------------------------------------------------------------------------------


async def test_lines_are_told_with_the_invocation_that_wrote_them():
    async def talk(guest: FakeGuest, request: Invoke, body: bytes) -> bytes:
        number = int(body)
        await guest.log("out\n", number)
        await guest.log("one\n\ntwo\n", number, "stderr")
        await guest.log("background\n", 0)
        await guest.log("of another\n", number + 7)
        await guest.send(encode(Log(stream="stdout"), number, b"\x1b[2J \xff\n"))
        return b""

    async with running(FakeDriver({"main:greet": talk}), GREET) as pool:
        for number in (b"1", b"2"):
            await succeed(pool, GREET, number)
        last = f"i{next(numbers) - 1}"

        assert log_of(pool, GREET)[-6:] == [
            (last, "stdout", "out"),
            (last, "stderr", "one"),
            (last, "stderr", "two"),
            ("", "stdout", "background"),
            ("", "stdout", "of another"),
            (last, "stdout", "\\x1b[2J \ufffd"),
        ]


async def test_a_failure_is_explained_in_the_functions_log():
    """Also what the caller is not told: the traceback."""

    async def broken(guest: FakeGuest, request: Invoke, body: bytes) -> Failed:
        return Failed(kind="Raised", message="ValueError: no", traceback="Traceback:\n  line 1")

    async with running(FakeDriver({"main:greet": broken}), GREET) as pool:
        await fail(pool, GREET)
        lines = [(stream, text) for _, stream, text in log_of(pool, GREET)]

        assert lines == [
            ("platform", "Raised: ValueError: no"),
            ("platform", "  Traceback:"),
            ("platform", "    line 1"),
        ]


async def test_dropped_output_is_said():
    async def drop(guest: FakeGuest, request: Invoke, body: bytes) -> bytes:
        await guest.say(Log(stream="stdout", dropped=5), 1)
        return b""

    async with running(FakeDriver({"main:greet": drop}), GREET) as pool:
        await succeed(pool, GREET)

        assert log_of(pool, GREET)[-1][1:] == ("platform", "5 bytes of output dropped")


async def test_a_generic_sandbox_cannot_write_to_any_log():
    async def chatter(guest: FakeGuest) -> None:
        await guest.log("I am nobody\n")

    driver = FakeDriver({"main:greet": hello}, on_start=chatter)
    async with running(driver, GREET) as pool:
        await succeed(pool, GREET)

        assert log_of(pool, GREET) == []


# ---- the end ------------------------------------------------------------------------------------


async def test_a_drained_pool_has_answered_everyone():
    gate = Gate()
    driver = FakeDriver({"main:greet": gate})
    async with running(driver, GREET) as pool, asyncio.TaskGroup() as tasks:
        accepted = tasks.create_task(succeed(pool, GREET))
        await gate.reached()
        assert not await pool.drain(0.01)
        draining = tasks.create_task(pool.drain(SOON_S))
        gate.open()

        assert await draining
        assert await accepted == b"sb-1"


async def test_the_end_of_the_pool_ends_every_sandbox_and_tells_every_caller():
    gate = Gate()
    driver = FakeDriver({"main:greet": gate})
    async with running(driver, GREET) as pool:
        pool.keep_generic(Mold(BASE), ENVIRONMENT, 2)
        caller = asyncio.create_task(call(pool, GREET))
        await gate.reached()
    outcome = await caller

    assert isinstance(outcome, Failure)
    assert (outcome.kind, outcome.message) == ("Crashed", "the sandbox was destroyed")
    assert (driver.guests, driver.is_open) == ({}, False)
    with pytest.raises(Draining):
        await pool.invoke(invocation(GREET))


async def test_the_end_of_the_pool_is_told_to_those_who_wait():
    """They were accepted and cannot be served any more: another server can."""
    gate = Gate()
    each = function("greet", max_scale=1)
    driver = FakeDriver({"main:greet": gate})
    async with running(driver, each) as pool:
        running_ = asyncio.create_task(call(pool, each))
        await gate.reached()
        waiting = asyncio.create_task(pool.invoke(invocation(each)))
        await eventually(lambda: pool.state.waiting == 1)
    await running_
    async with asyncio.timeout(0.2):
        with pytest.raises(Draining):
            await waiting


async def test_the_end_of_the_pool_does_not_wait_for_guests_that_start():
    """A start may take half a minute; the end of the server may not."""

    async def slow(guest: FakeGuest) -> None:
        await asyncio.Event().wait()

    driver = FakeDriver({"main:greet": hello}, on_start=slow)
    async with running(driver, GREET) as pool:
        pool.keep_generic(Mold(BASE), ENVIRONMENT, 3)
        await eventually(lambda: len(driver.created) == 3)

    assert driver.guests == {}


async def test_an_error_in_the_callers_block_ends_the_pool_as_well():
    driver = FakeDriver({"main:greet": hello})

    async def stumble() -> None:
        async with running(driver, GREET) as pool:
            await succeed(pool, GREET)
            raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as raised:
        await stumble()
    assert raised.group_contains(ZeroDivisionError)
    assert (driver.guests, driver.is_open) == ({}, False)


# ---- what stays ---------------------------------------------------------------------------------


async def test_an_environment_that_no_function_uses_any_more_keeps_no_sandbox_ready():
    """Each build of an environment is another one: the old ones' sandboxes would add up."""
    old = Environment(digest="1" * 64, generic_min=1)
    new = Environment(digest="2" * 64, generic_min=1)
    driver = FakeDriver({"main:greet": hello})
    async with running(driver) as pool:
        pool.deploy(function("greet", environment=old.digest), old)
        await eventually(lambda: "1 generic" in repr(pool.state))
        pool.deploy(function("greet", version="2", environment=new.digest), new)
        await eventually(lambda: len(driver.created) == 2)
        async with asyncio.timeout(0.2):
            await eventually(lambda: driver.destroyed == ["sb-1"])


async def test_a_removed_function_leaves_no_lines_behind():
    """Also those that come late, from its last sandbox."""
    gate = Gate()

    async def talk(guest: FakeGuest, request: Invoke, body: bytes) -> bytes:
        answer = await gate(guest, request, body)
        await guest.log("late\n", 1)
        return answer

    driver = FakeDriver({"main:greet": talk})
    async with running(driver, GREET) as pool:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(succeed(pool, GREET))
            await gate.reached()
            pool.remove(GREET.id)
            gate.open()
        await eventually(lambda: not driver.guests)

        assert log_of(pool, GREET) == []


# ---- zygotes ------------------------------------------------------------------------------------

FORKED = function("greet", namespace="own")
COLD = SandboxStartFailed("no interpreter")
CLOSE_S = 1.0
"""The end of a pool takes no time; this is long before anything would time out."""


def zygote_of(pool: Pool, mold: Mold = FORKED.mold) -> SandboxId | None:
    """The one that forks for *mold* now."""
    record = pool.state.molds.get(mold)
    return record.zygote.id if record is not None and record.zygote is not None else None


async def warmed(pool: Pool) -> SandboxId:
    """Wait until there is one."""
    await eventually(lambda: zygote_of(pool))
    zygote = zygote_of(pool)
    assert zygote is not None
    return zygote


class Warming(FakeDriver):
    """Its zygotes get ready when the test says so; *asked* and *ended* are those it was told of."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.asked: list[SandboxId] = []
        self.ended: list[SandboxId] = []
        self.may_warm = asyncio.Event()

    async def warm(self, zygote: SandboxId, mold: Mold, environment: Environment) -> None:
        self.asked.append(zygote)
        await super().warm(zygote, mold, environment)
        await self.may_warm.wait()

    async def destroy(self, sandbox: SandboxId) -> Exit:
        if sandbox in self.zygotes:
            self.ended.append(sandbox)
        return await super().destroy(sandbox)


async def test_a_miss_is_forked_once_the_zygote_is_there():
    """And the caller is told so."""
    driver = FakeDriver({"main:greet": hello})
    async with running(driver, FORKED) as pool:
        zygote = await warmed(pool)
        first, second = await call(pool, FORKED), await call(pool, FORKED)

        assert (first.timing.start, second.timing.start) == ("forked", "warm")
        assert list(driver.forked.values()) == [zygote]
        assert driver.created == list(driver.forked)


async def test_a_caller_does_not_wait_for_the_zygote_and_a_refill_does():
    driver = Warming({"main:greet": hello})
    async with running(driver, FORKED) as pool:
        pool.keep_generic(FORKED.mold, ENVIRONMENT, 1)
        outcome = await call(pool, FORKED)
        assert outcome.timing.start == "created"
        assert len(driver.created) == 1
        driver.may_warm.set()
        await eventually(lambda: "1 generic" in repr(pool.state))

        assert list(driver.forked) == driver.created[1:]
        assert len(driver.asked) == 1


async def test_without_a_namespace_there_is_no_zygote():
    driver = Warming({"main:greet": hello})
    async with running(driver, GREET, generic_max=1) as pool:
        pool.keep_generic(GREET.mold, ENVIRONMENT, 1)
        await eventually(lambda: "1 generic" in repr(pool.state))
        await succeed(pool, GREET)

        assert (driver.asked, driver.forked) == ([], {})


async def test_a_function_that_is_removed_takes_its_zygote_with_it():
    driver = FakeDriver({"main:greet": hello})
    async with running(driver, FORKED) as pool:
        zygote = await warmed(pool)
        await succeed(pool, FORKED)
        pool.remove(FORKED.id)
        await eventually(lambda: not driver.zygotes)

        assert driver.retired == {zygote}
        await eventually(lambda: not (pool.state.molds or pool.state.zygotes or pool._warming))


async def test_a_zygote_that_is_replaced_lives_until_the_last_of_its_sandboxes_has_ended():
    """Who runs there does not notice."""
    gate = Gate()
    driver = FakeDriver({"main:greet": gate})
    async with running(driver, FORKED, zygote_forks_max=1) as pool:
        old = await warmed(pool)
        async with asyncio.TaskGroup() as tasks:
            runs = tasks.create_task(succeed(pool, FORKED))
            await gate.reached()
            await eventually(lambda: zygote_of(pool) not in (None, old))
            await eventually(lambda: old in driver.retired)
            assert set(driver.zygotes) == {old, zygote_of(pool)}
            gate.open()
        assert driver.forked[SandboxId(runs.result().decode())] == old
        pool.deploy(function("greet", version="2", namespace="own"), ENVIRONMENT)
        await eventually(lambda: old not in driver.zygotes)

        assert zygote_of(pool) in driver.zygotes


@pytest.mark.parametrize("why", [COLD, TimeoutError()], ids=["refused", "timed out"])
async def test_while_no_zygote_can_be_warmed_sandboxes_are_started(why: Exception):
    """The caller is served at once; the zygote is tried again until there is one."""
    driver = FakeDriver({"main:greet": hello})
    driver.chill = why
    async with running(driver, FORKED) as pool:
        await eventually(lambda: pool.state.molds[FORKED.mold].zygote_failures > 1)
        outcome = await call(pool, FORKED)
        assert (outcome.timing.start, driver.forked) == ("created", {})
        driver.chill = None

        assert await warmed(pool) in driver.zygotes


async def test_an_unfit_environment_is_asked_for_one_zygote_and_never_again():
    class Unfit(Warming):
        async def warm(self, zygote: SandboxId, mold: Mold, environment: Environment) -> None:
            self.asked.append(zygote)
            raise ZygoteUnfit("3 threads run in it")

    driver = Unfit({"main:greet": hello})
    async with running(driver, FORKED) as pool:
        await eventually(lambda: pool.state.molds[FORKED.mold].zygote_failures)
        outcome = await call(pool, FORKED)
        pool._carry_out(pool.state.tick(time.monotonic() + 100))

        assert outcome.timing.start == "created"
        assert (len(driver.asked), pool._warming) == (1, set())


async def test_a_zygote_that_does_not_get_ready_in_time_is_given_up_and_destroyed():
    """Callers are served meanwhile, and another one is tried."""
    driver = Warming({"main:greet": hello})
    async with running(driver, FORKED, start_timeout_s=0.05) as pool:
        outcome = await call(pool, FORKED)
        await eventually(lambda: len(driver.asked) > 1)
        first = driver.asked[0]

        assert outcome.timing.start == "created"
        assert first in driver.ended
        assert first not in driver.zygotes
        driver.may_warm.set()
        assert await warmed(pool) != first


async def die(driver: FakeDriver, zygote: SandboxId) -> None:
    driver.zygotes[zygote].set_result(Exit(-9))


async def be_destroyed(driver: FakeDriver, zygote: SandboxId) -> None:
    await driver.destroy(zygote)


@pytest.mark.parametrize("end", [die, be_destroyed])
async def test_a_zygote_that_dies_takes_its_sandboxes_with_it_and_is_replaced(
    end: Callable[[FakeDriver, SandboxId], Awaitable[None]],
):
    """Who runs in them is told, who runs elsewhere is not, and who comes next is served."""
    gate, other = Gate(), Gate()
    driver = FakeDriver({"main:greet": gate, "main:shout": other})
    async with running(driver, FORKED, SHOUT) as pool, asyncio.TaskGroup() as tasks:
        old = await warmed(pool)
        inside = [tasks.create_task(fail(pool, FORKED)) for _ in range(2)]
        elsewhere = tasks.create_task(succeed(pool, SHOUT))
        await gate.reached(2)
        await other.reached()
        await end(driver, old)
        kinds = [(await task).kind for task in inside]
        gate.open()
        other.open()

        assert kinds == ["Crashed", "Crashed"]
        assert await elsewhere
        assert await succeed(pool, FORKED)
        assert await warmed(pool) != old
        assert old not in driver.zygotes


async def test_a_zygote_that_cannot_fork_costs_its_caller_nothing_but_the_try():
    """The sandbox is started instead, at once, and the zygote goes."""

    class Barren(FakeDriver):
        async def create(
            self,
            sandbox: SandboxId,
            mold: Mold,
            environment: Environment,
            zygote: SandboxId | None = None,
            keeps: Function | None = None,
            *,
            background: bool = False,
        ) -> socket.socket:
            if zygote is not None:
                raise SandboxStartFailed("no memory")
            return await super().create(sandbox, mold, environment)

    driver = Barren({"main:greet": hello})
    async with running(driver, FORKED) as pool:
        zygote = await warmed(pool)
        outcome = await call(pool, FORKED)

        assert outcome.timing.start == "created"
        assert pool.state.molds[FORKED.mold].failures == 0
        await eventually(lambda: zygote not in driver.zygotes)
        assert await warmed(pool) != zygote


async def test_a_fork_that_does_not_come_up_is_followed_by_a_start():
    async def misbehave(guest: FakeGuest) -> None:
        if guest.sandbox in driver.forked:
            raise Ended(Exit(1))

    driver = FakeDriver({"main:greet": hello}, on_start=misbehave)
    async with running(driver, FORKED) as pool:
        await warmed(pool)

        assert (await call(pool, FORKED)).timing.start == "created"


@pytest.mark.parametrize("is_warm", [True, False], ids=["warm", "warming"])
async def test_the_end_of_the_pool_ends_every_zygote_and_leaves_no_task(is_warm: bool):
    """Also one that is not ready yet, and one that was retired and waits for its last sandbox."""
    before = asyncio.all_tasks()
    driver = Warming({"main:greet": hello})
    async with running(driver, FORKED, zygote_forks_max=1) as pool:
        if is_warm:
            driver.may_warm.set()
            await warmed(pool)
            await succeed(pool, FORKED)
            await eventually(lambda: driver.retired)
        else:
            await eventually(lambda: driver.asked)
        assert pool._warming

    assert (driver.zygotes, driver.guests, pool._warming) == ({}, {}, set())
    assert set(driver.ended) == set(driver.asked)
    assert asyncio.all_tasks() == before


async def test_an_error_in_the_callers_block_ends_the_zygotes_as_well():
    driver = FakeDriver({"main:greet": hello})

    async def stumble() -> None:
        async with running(driver, FORKED) as pool:
            await warmed(pool)
            await succeed(pool, FORKED)
            raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as raised:
        await stumble()
    assert raised.group_contains(ZeroDivisionError)
    assert (driver.zygotes, driver.guests) == ({}, {})


@pytest.mark.parametrize("why", [OSError(errno.EMFILE, "too many open files"), ValueError("odd")])
async def test_whatever_keeps_a_zygote_from_being_warmed_it_is_tried_again(why: Exception):
    """Else the mold waits for it for ever: neither refills nor another zygote come."""
    driver = Warming({"main:greet": hello})
    driver.may_warm.set()
    driver.chill = why
    async with running(driver, FORKED) as pool:
        await eventually(lambda: driver.asked)
        await eventually(lambda: not pool._warming)
        assert not pool.state.zygotes
        driver.chill = None

        assert await warmed(pool)


async def test_a_zygote_that_cannot_be_destroyed_is_replaced_all_the_same():
    """The launcher is just being replaced: `destroy` cannot ask it."""

    class Helpless(FakeDriver):
        async def destroy(self, sandbox: SandboxId) -> Exit:
            await super().destroy(sandbox)
            if sandbox.startswith("sb-z"):
                raise SandboxStartFailed("the driver is closed, or gets another launcher")
            return Exit(0)

    driver = Helpless({"main:greet": hello})
    async with running(driver, FORKED) as pool:
        old = await warmed(pool)
        (life,) = pool._warming
        await die(driver, old)
        await asyncio.wait({life}, timeout=SOON_S)

        assert old not in pool.state.zygotes


async def test_the_end_of_the_pool_does_not_wait_for_forks_that_come_up():
    """Nothing new is made once the pool ends; a start may take half a minute."""

    async def slow(guest: FakeGuest) -> None:
        await asyncio.Event().wait()

    driver = FakeDriver({"main:greet": hello}, on_start=slow)
    async with asyncio.timeout(CLOSE_S), running(driver, FORKED) as pool:
        await warmed(pool)
        pool.keep_generic(FORKED.mold, ENVIRONMENT, 3)
        await eventually(lambda: len(driver.created) == 3)

    assert len(driver.created) == 3
    assert driver.guests == {}


async def test_no_zygote_is_warmed_once_the_pool_ends():
    """Nobody would end it, and the end of the pool would wait for it."""
    starting = asyncio.Event()

    async def slow(guest: FakeGuest) -> None:
        starting.set()
        await asyncio.Event().wait()

    driver = Warming({"main:greet": hello}, on_start=slow)
    driver.chill = COLD
    async with asyncio.timeout(CLOSE_S), running(driver, FORKED, tick_s=60) as pool:
        pool.keep_generic(FORKED.mold, ENVIRONMENT, 1)
        await starting.wait()
        mold = pool.state.molds[FORKED.mold]
        assert (len(driver.asked), mold.zygote_failures) == (1, 1)
        driver.chill = None
        mold.zygote_retry_at = 0.0  # the next fact about its sandboxes brings another

    assert pool.state.zygotes
    assert (len(driver.asked), driver.zygotes, pool._warming) == (1, {}, set())


async def test_the_end_of_the_pool_does_not_wait_for_what_was_to_start_at_this_moment():
    """Not of zygotes, but found with them: the sandbox was asked for in the last turn."""

    async def slow(guest: FakeGuest) -> None:
        await asyncio.Event().wait()

    driver = FakeDriver({"main:greet": hello}, on_start=slow)
    async with asyncio.timeout(CLOSE_S), running(driver, GREET) as pool:
        pool.keep_generic(GREET.mold, ENVIRONMENT, 1)

    assert driver.guests == {}


async def test_a_pool_that_ends_as_soon_as_a_zygote_is_wanted_leaves_no_warning():
    driver = FakeDriver()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        async with running(driver) as pool:
            pool.keep_generic(FORKED.mold, ENVIRONMENT, 1)
        del pool
        gc.collect()

    assert [text for each in told if "Pool." in (text := str(each.message))] == []
    assert driver.zygotes == {}


# ---- functions' zygotes -------------------------------------------------------------------------

KEPT = function("greet", namespace="own", initialize="once")
HEAVY = function("greet", namespace="own")
"""It says nothing of how it initializes; whether it is heavy is for the driver to say."""

HEAVY_S = 5.0


class Imports:
    """A hook that counts the imports, and knows which were a zygote's."""

    def __init__(self) -> None:
        self.by: list[SandboxId] = []
        self.zygotes: list[SandboxId] = []

    async def __call__(self, guest: FakeGuest) -> None:
        assert guest.load is not None
        self.by.append(guest.sandbox)
        if guest.load.as_zygote:
            self.zygotes.append(guest.sandbox)
            await self.of_zygote(guest)

    async def of_zygote(self, guest: FakeGuest) -> None:
        """What comes of it there."""


async def kept(pool: Pool, each: Function = KEPT, *, but: SandboxId | None = None) -> SandboxId:
    """Wait until there is a zygote that holds *each*, another one than *but*."""
    await eventually(lambda: pool.zygote_of(each) not in (None, but))
    zygote = pool.zygote_of(each)
    assert zygote is not None
    return zygote


def decided(pool: Pool, each: Function = KEPT) -> tuple[bool | None, str]:
    record = pool.state.functions[each.id]
    return record.once, record.once_why


async def test_a_function_that_initializes_once_is_imported_once_and_forked():
    """By a zygote that its environment's forked; callers are told that they were forked for."""
    gate, imports = Gate(), Imports()
    driver = FakeDriver({"main:greet": gate}, on_load=imports)
    async with running(driver, KEPT) as pool:
        async with asyncio.TaskGroup() as tasks:
            calls = [tasks.create_task(call(pool, KEPT)) for _ in range(3)]
            await gate.reached(3)
            gate.open()
        zygote = await kept(pool)

        assert (imports.by, driver.kept) == ([zygote], {zygote})
        assert driver.forked[zygote] == zygote_of(pool)
        outcomes = [task.result() for task in calls]
        assert [outcome.timing.start for outcome in outcomes] == ["forked"] * 3
        boxes = {SandboxId(o.body.decode()) for o in outcomes if isinstance(o, Success)}
        assert {driver.forked[box] for box in boxes} == {zygote}
        assert len(boxes) == 3


async def test_a_heavy_function_gets_its_zygote_after_its_first_import():
    """Who comes first does not wait for it; a sandbox that is made later holds it already."""
    gate, imports = Gate(), Imports()
    driver = FakeDriver({"main:greet": gate}, on_load=imports)
    driver.import_s = HEAVY_S
    async with running(driver, HEAVY) as pool:
        await warmed(pool)
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(succeed(pool, HEAVY))
            await gate.reached(1)
            zygote = await kept(pool, HEAVY)
            second = tasks.create_task(succeed(pool, HEAVY))
            await gate.reached(2)
            gate.open()

        assert imports.by == [first.result().decode(), zygote]
        assert driver.forked[SandboxId(second.result().decode())] == zygote
        assert decided(pool, HEAVY) == (True, "its import took 5 s")


def claiming(**said: object) -> Callable[[FakeGuest], Awaitable[None]]:
    """A hook whose guests say *said* of their import, and else what they would."""

    async def hook(guest: FakeGuest) -> None:
        say = guest.say

        async def claim(message: Message, invocation: int = 0, body: bytes = b"") -> None:
            if isinstance(message, Loaded):
                message = Loaded.of(message.__dict__ | said)
            await say(message, invocation, body)

        guest.say = claim  # type: ignore[method-assign]

    return hook


@pytest.mark.parametrize(("busy_s", "weight"), [(0.0, 0.1), (1.0, 0.25), (4.0, 1.0)])
async def test_a_function_weighs_what_its_guest_says_that_its_import_kept_busy(
    busy_s: float, weight: float
):
    driver = FakeDriver({"main:greet": hello}, on_load=claiming(import_s=4.0, busy_s=busy_s))
    async with running(driver, GREET) as pool:
        await succeed(pool, GREET)

        assert pool.state.functions[GREET.id].load_weight == weight


@pytest.mark.parametrize("field", ["import_s", "busy_s", "lockdown_s"])
@pytest.mark.parametrize("value", [-0.1, 1e9, float("nan"), float("inf")])
async def test_a_guest_whose_import_took_a_time_that_cannot_be_ends(field: str, value: float):
    """It would weigh nothing, or more than there is."""
    driver = FakeDriver({"main:greet": hello}, on_load=claiming(**{field: value}))
    async with running(driver, GREET) as pool:
        assert (await fail(pool, GREET)).kind == "ProtocolViolation"


async def test_a_heavy_function_whose_first_import_left_threads_is_not_tried_as_a_zygote():
    """It is known already that they would be missing."""
    driver = FakeDriver({"main:greet": hello}, on_load=(imports := Imports()))
    driver.import_s, driver.leaves = HEAVY_S, {"threads": 2}
    async with running(driver, HEAVY) as pool:
        await warmed(pool)
        await succeed(pool, HEAVY)

        assert decided(pool, HEAVY) == (False, "its import took 5 s, but left 2 threads")
        assert (imports.zygotes, pool._zygotes) == ([], {})


async def test_a_light_function_has_no_zygote_of_its_own():
    driver = FakeDriver({"main:greet": hello}, on_load=(imports := Imports()))
    driver.import_s = 0.01
    async with running(driver, HEAVY) as pool:
        await warmed(pool)
        await succeed(pool, HEAVY)

        assert decided(pool, HEAVY) == (False, "its import took 0.01 s, under 0.25")
        assert (imports.zygotes, pool._zygotes, pool.zygote_of(HEAVY)) == ([], {}, None)


async def test_what_is_written_while_the_zygote_imports_is_in_the_functions_log():
    """Once, with the zygote's name and no invocation."""

    class Talkative(Imports):
        async def of_zygote(self, guest: FakeGuest) -> None:
            await guest.log("loading a model\n")

    driver = FakeDriver({"main:greet": hello}, on_load=Talkative())
    async with running(driver, KEPT) as pool:
        await succeed(pool, KEPT)
        zygote = await kept(pool)
        lines = pool.logs.tail(KEPT.id, 10)

        assert log_of(pool, KEPT) == [("", "stdout", "loading a model")]
        assert [line.sandbox for line in lines] == [zygote]


@pytest.mark.parametrize(
    ("each", "left", "why"),
    [
        (KEPT, {"threads": 2}, "its import left 2 threads, which no fork would have"),
        (KEPT, {"children": 1}, "its import left 1 child processes, which no fork would have"),
        (HEAVY, {"threads": 1}, "its import left 1 threads, which no fork would have"),
        (HEAVY, {"descriptors": 1},
         "its import left 1 open files or sockets, which no fork would have"),
    ],
)  # fmt: skip
async def test_an_import_that_leaves_what_no_fork_would_have_is_done_in_each_sandbox(
    each: Function, left: dict[str, int], why: str
):
    """Whoever waits is answered, the zygote goes, and there is no other."""

    class Leaves(Imports):
        async def of_zygote(self, guest: FakeGuest) -> None:
            driver.leaves = left

    driver = FakeDriver({"main:greet": hello}, on_load=(imports := Leaves()))
    driver.import_s = HEAVY_S
    async with running(driver, each) as pool:
        await succeed(pool, each)
        await eventually(lambda: decided(pool, each)[0] is False)
        assert decided(pool, each) == (False, why)
        await eventually(lambda: not pool._zygotes)
        pool._carry_out(pool.state.tick(time.monotonic() + 100))

        assert await succeed(pool, each, b"x") == b"hello x"
        assert len(imports.zygotes) == 1
        assert imports.zygotes[0] in driver.destroyed
        assert pool.zygote_of(each) is None


async def test_who_declares_once_may_leave_files_open():
    """It says so, and has hooks to open them again; descriptors are shared, threads are not."""
    driver = FakeDriver({"main:greet": hello})
    driver.import_s, driver.leaves = HEAVY_S, {"descriptors": 3}
    async with running(driver, KEPT) as pool:
        outcome = await call(pool, KEPT)

        assert outcome.timing.start == "forked"
        assert pool.zygote_of(KEPT) in driver.kept


async def test_an_import_that_fails_in_the_zygote_is_told_and_logged():
    """As one in a sandbox is, to everyone who waits; it is not tried elsewhere first."""

    async def broken(guest: FakeGuest) -> None:
        raise ImportError("no module named nothere")

    driver = FakeDriver({"main:greet": hello}, on_load=broken)
    async with running(driver, KEPT) as pool:
        async with asyncio.TaskGroup() as tasks:
            calls = [tasks.create_task(fail(pool, KEPT)) for _ in range(2)]
        failures = [task.result() for task in calls]

        assert {(f.kind, f.message) for f in failures} == {
            ("ImportFailed", "no module named nothere")
        }
        assert ("ImportFailed: no module named nothere") in {line[2] for line in log_of(pool, KEPT)}
        await eventually(lambda: not pool._zygotes)
        assert set(driver.zygotes) == {zygote_of(pool)}


async def test_an_import_that_fails_only_in_the_zygote_costs_nobody_an_answer():
    """It is done in each sandbox, as before."""

    class Picky(Imports):
        async def of_zygote(self, guest: FakeGuest) -> None:
            raise ImportError("not here")

    driver = FakeDriver({"main:greet": hello}, on_load=Picky())
    driver.import_s = HEAVY_S
    async with running(driver, HEAVY) as pool:
        await succeed(pool, HEAVY)
        await eventually(lambda: decided(pool, HEAVY)[0] is False)

        assert decided(pool, HEAVY)[1] == "the import failed in its zygote: not here"
        assert await succeed(pool, HEAVY, b"x") == b"hello x"


@pytest.mark.parametrize(
    ("how", "kind", "init_timeout_s"),
    [
        ("hangs", "InitTimedOut", 0.05),
        ("exits", "InitCrashed", SOON_S),
        ("lies", "InitCrashed", SOON_S),
    ],
)
async def test_a_zygote_that_does_not_load_is_the_functions_failure(
    how: str, kind: str, init_timeout_s: float
):
    """Too slow, gone, or without the rights that the kernel should say it has."""

    class Misbehaves(Imports):
        async def of_zygote(self, guest: FakeGuest) -> None:
            if how == "hangs":
                await asyncio.Event().wait()
            elif how == "exits":
                raise Ended(Exit(3))
            await guest.say(LOADED)  # as a sandbox that has given away all rights

    driver = FakeDriver({"main:greet": hello}, on_load=Misbehaves())
    async with running(driver, KEPT, init_timeout_s=init_timeout_s) as pool:
        assert (await fail(pool, KEPT)).kind == kind
        await eventually(lambda: not pool._zygotes)

        assert set(driver.zygotes) == {zygote_of(pool)}


async def test_a_sandbox_that_has_a_zygotes_rights_never_runs_user_code():
    """What is enough for a zygote is too much for a sandbox that was forked from it."""
    zygotes_rights = Loaded.of(LOADED.__dict__ | {"cap_eff": ZYGOTE_CAP_EFF})

    async def claim(guest: FakeGuest) -> None:
        await guest.say(zygotes_rights)

    async with running(FakeDriver({"main:greet": hello}, on_load=claim), GREET) as pool:
        failure = await fail(pool, GREET)

        assert (failure.kind, "lock-down" in failure.message) == ("InitCrashed", True)


async def test_a_zygote_that_is_killed_while_it_imports_is_nobodys_failure():
    """By the kernel, when the machine is full: the caller gets a sandbox of the environment's."""

    class Killed(Imports):
        async def of_zygote(self, guest: FakeGuest) -> None:
            await driver.destroy(guest.sandbox)

    driver = FakeDriver({"main:greet": hello}, on_load=(imports := Killed()))
    async with running(driver, KEPT) as pool:
        assert await succeed(pool, KEPT, b"x") == b"hello x"
        assert imports.zygotes
        assert decided(pool) == (True, "it is declared so")


@pytest.mark.parametrize("end", [die, be_destroyed])
async def test_a_functions_zygote_that_dies_takes_its_sandboxes_with_it_and_is_replaced(
    end: Callable[[FakeDriver, SandboxId], Awaitable[None]],
):
    """Who runs in them is told, who runs elsewhere is not, and who comes next is served."""
    gate, other = Gate(), Gate()
    beside = function("shout", namespace="own", initialize="each")
    driver = FakeDriver({"main:greet": gate, "main:shout": other})
    async with running(driver, KEPT, beside) as pool, asyncio.TaskGroup() as tasks:
        inside = [tasks.create_task(fail(pool, KEPT)) for _ in range(2)]
        await gate.reached(2)
        old = await kept(pool)
        elsewhere = tasks.create_task(succeed(pool, beside))
        await other.reached()
        await end(driver, old)
        kinds = [(await task).kind for task in inside]
        gate.open()
        other.open()

        assert kinds == ["Crashed", "Crashed"]
        assert await elsewhere
        assert await kept(pool, but=old) in driver.zygotes
        assert await succeed(pool, KEPT)
        assert old not in driver.zygotes


async def test_a_zygote_whose_connection_ends_is_gone_and_replaced():
    """Its process lives on, perhaps: nobody could say to it what it is for."""
    driver = FakeDriver({"main:greet": hello})
    async with running(driver, KEPT) as pool:
        await succeed(pool, KEPT)
        old = await kept(pool)
        driver.guests[old]._writer.transport.abort()

        assert await kept(pool, but=old) in driver.zygotes
        assert old not in driver.zygotes
        assert await succeed(pool, KEPT, b"x") == b"hello x"


@pytest.mark.parametrize("lie", [LIES["noise"], result(1), encode(LOADED)])
async def test_a_zygote_that_breaks_the_protocol_ends(lie: bytes):
    """It has run user code: an answer to an invocation is none of its business."""
    driver = FakeDriver({"main:greet": hello})
    async with running(driver, KEPT) as pool:
        await succeed(pool, KEPT)
        old = await kept(pool)
        await driver.guests[old].send(lie)

        assert await kept(pool, but=old) in driver.zygotes
        assert old not in driver.zygotes
        assert await succeed(pool, KEPT, b"x") == b"hello x"


async def test_what_a_zygote_writes_later_is_in_the_functions_log_and_never_in_an_invocations():
    """Whatever number it says: it has none."""
    driver = FakeDriver({"main:greet": hello})
    async with running(driver, KEPT) as pool:
        await succeed(pool, KEPT)
        zygote = await kept(pool)
        await driver.guests[zygote].log("from a zygote\n", invocation=1)
        await eventually(lambda: log_of(pool, KEPT))

        assert log_of(pool, KEPT) == [("", "stdout", "from a zygote")]


async def test_a_new_version_has_a_zygote_of_its_own_and_the_old_one_goes():
    """With the last of its sandboxes: who runs there does not notice."""
    gate = Gate()
    second = function("greet", version="2", namespace="own", initialize="once", handler="main:new")
    driver = FakeDriver({"main:greet": gate, "main:new": hello})
    async with running(driver, KEPT) as pool:
        async with asyncio.TaskGroup() as tasks:
            runs = tasks.create_task(succeed(pool, KEPT))
            await gate.reached()
            old = await kept(pool)
            pool.deploy(second, ENVIRONMENT)
            assert await succeed(pool, second, b"x") == b"hello x"
            await eventually(lambda: old in driver.retired)
            assert old in driver.zygotes
            gate.open()
        assert driver.forked[SandboxId(runs.result().decode())] == old
        await eventually(lambda: old not in driver.zygotes)

        assert await kept(pool, second) in driver.zygotes
        assert pool.zygote_of(KEPT) is None


async def test_a_function_that_is_removed_takes_both_zygotes_with_it():
    driver = FakeDriver({"main:greet": hello})
    async with running(driver, KEPT) as pool:
        await succeed(pool, KEPT)
        zygotes = {await kept(pool), await warmed(pool)}
        pool.remove(KEPT.id)
        await eventually(lambda: not (driver.zygotes or driver.guests))

        assert driver.retired == zygotes
        await eventually(lambda: not (pool.state.molds or pool.state.zygotes or pool._warming))
        assert pool._zygotes == {}


async def test_the_limits_of_a_function_are_its_sandboxes():
    """A zygote's are the driver's to know: it must be able to fork for all of them."""
    each = function("greet", namespace="own", initialize="once", limits=Limits(memory_mb=512))
    driver = FakeDriver({"main:greet": hello})
    async with running(driver, each) as pool:
        await succeed(pool, each)
        zygote = await kept(pool, each)

        assert driver.guests[zygote].limits is None
        (box,) = (box for box, by in driver.forked.items() if by == zygote)
        assert driver.guests[box].limits == each.spec.limits


class Leaving(FakeDriver):
    """Others end every sandbox while we do."""

    async def destroy(self, sandbox: SandboxId) -> Exit:
        self.on_leaving(sandbox)
        return await super().destroy(sandbox)


@pytest.mark.parametrize("how", ["removed", "timed out"])
async def test_what_others_end_while_it_is_ended_is_not_remembered(how: str):
    each = function("greet", timeout_seconds=0.05)
    driver = Leaving({"main:greet": hello if how == "removed" else hang})
    async with running(driver, each) as pool:
        await call(pool, each)
        pool.remove(each.id)
        await eventually(lambda: driver.destroyed)
        await eventually(lambda: not pool._leavers)


@pytest.mark.parametrize("stage", ["ready", "importing", "starting", "retired"])
async def test_the_end_of_the_pool_ends_every_functions_zygote_and_leaves_no_task(stage: str):
    """Wherever it is in its life; an import may take ten seconds, and nobody waits for it."""
    before = asyncio.all_tasks()
    reached = asyncio.Event()

    async def hold(guest: FakeGuest) -> None:
        reached.set()
        await asyncio.Event().wait()

    class Slow(Imports):
        async def of_zygote(self, guest: FakeGuest) -> None:
            if stage == "importing":
                await hold(guest)

    async def start(guest: FakeGuest) -> None:
        if stage == "starting" and guest.sandbox.startswith("sb-z"):
            await hold(guest)

    driver = FakeDriver({"main:greet": hello}, on_load=Slow(), on_start=start)
    async with asyncio.timeout(CLOSE_S), running(driver, KEPT) as pool:
        caller = asyncio.create_task(pool.invoke(invocation(KEPT)))
        if stage in ("ready", "retired"):
            await caller
            zygote = await kept(pool)
        else:
            await reached.wait()
        if stage == "retired":
            pool.deploy(function("greet", version="2", namespace="own"), ENVIRONMENT)
            await eventually(lambda: zygote in driver.retired)

    if stage in ("importing", "starting"):
        with pytest.raises(Draining):
            await caller
    assert (driver.zygotes, driver.guests) == ({}, {})
    assert (pool._zygotes, pool._warming) == ({}, set())
    assert asyncio.all_tasks() == before


async def test_a_driver_that_has_no_room_for_a_zygote_costs_nobody_an_answer():
    """No control groups to limit it by, say: it is not asked again."""

    class Roomless(FakeDriver):
        async def create(
            self,
            sandbox: SandboxId,
            mold: Mold,
            environment: Environment,
            zygote: SandboxId | None = None,
            keeps: Function | None = None,
            *,
            background: bool = False,
        ) -> socket.socket:
            if keeps is not None:
                raise ZygoteUnfit("there are no control groups to limit it by")
            return await super().create(sandbox, mold, environment, zygote)

    async with running(Roomless({"main:greet": hello}), KEPT) as pool:
        assert await succeed(pool, KEPT, b"x") == b"hello x"
        assert decided(pool) == (False, "there are no control groups to limit it by")


@pytest.mark.parametrize(
    ("left", "words"),
    [
        ({}, ""),
        ({"threads": 1}, "1 threads"),
        ({"children": 2, "descriptors": 3}, "2 child processes, 3 open files or sockets"),
        (
            {"threads": 4, "children": 5, "descriptors": 6},
            "4 threads, 5 child processes, 6 open files or sockets",
        ),
        ({"threads": -1, "descriptors": -(2**40)}, ""),
    ],
)
def test_what_an_import_has_left_behind_is_told_in_words(left: dict[str, int], words: str):
    """Whatever a guest says: fewer than none are none."""
    assert left_behind(Loaded.of(LOADED.__dict__ | left)) == words
