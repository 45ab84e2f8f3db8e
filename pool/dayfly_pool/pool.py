"""The pool: carries out what `state` decides, and owns every task, sandbox and waiting caller."""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from itertools import chain
from typing import Any, Final, assert_never

from msgspec import structs

from dayfly.protocol import Failed, Invoke, Log, Message, Result
from dayfly_pool import autoscale, commands, memory, records, state
from dayfly_pool.config import Config
from dayfly_pool.containers import Ran, Served
from dayfly_pool.deadlines import Deadlines
from dayfly_pool.driver import Driver, Survivor
from dayfly_pool.errors import (
    BadInput,
    Draining,
    FunctionNotFound,
    NoCapacity,
    NotReadyHere,
    PlatformError,
    QueueFull,
    SandboxStartFailed,
    ZygoteUnfit,
)
from dayfly_pool.logs import Logs, clean
from dayfly_pool.metrics import Metrics
from dayfly_pool.models import (
    Environment,
    Failure,
    Function,
    FunctionId,
    Invocation,
    InvocationId,
    LogLine,
    Mold,
    Outcome,
    SandboxId,
    Success,
    Timing,
)
from dayfly_pool.pace import Pace
from dayfly_pool.sandbox import Lost, Sandbox, left_behind

log = logging.getLogger("dayfly.pool")

REFILL_DELAY_S: Final = 0.01
"""A refill waits this long, not to compete with the cold start that took the last one."""

BACKGROUND_S_MAX: Final = 0.25
ADOPT_S_MAX: Final = 2.0
"""A generic sandbox of an earlier server that does not answer by then is not waited for."""

LATE_SHARE: Final = 0.5
"""Of the time that a start or a load may take, a batch's has what others leave for this share."""

ARRIVAL_S_MAX: Final = 30.0
"""A sandbox of an earlier server, whose function is not known by then, is in nobody's use."""

TRACEBACK_LINES_MAX: Final = 200
LAST_WORDS_MAX: Final = 200
OWN_FOLDER: Final = re.compile(r"/tmp/\.dayfly-[0-9a-f]{16}/")
"""Where a script is that is run: another one each time."""


GONE: Final = Environment("")
"""In place of the container of a function that has been deleted meanwhile, or is another by now."""

AnySandbox = Sandbox | Served | Ran


class _Call:
    """One invocation on its way: who waits for it, since when, where it runs."""

    __slots__ = (
        "assigned_at", "box", "future", "invocation", "submitted_at", "timeout_s", "timing",
    )  # fmt: skip

    def __init__(self, invocation: Invocation, future: asyncio.Future[Outcome], now: float) -> None:
        self.invocation, self.future, self.submitted_at = invocation, future, now
        self.assigned_at = self.timeout_s = 0.0
        self.box: _Box
        self.timing = Timing()


class _Box:
    """A live sandbox with what the pool itself must know of it."""

    __slots__ = ("calls", "create_s", "function", "grave", "sandbox", "specialize_s")

    def __init__(self, sandbox: Sandbox | Served | Ran) -> None:
        self.grave: asyncio.Future[None] | None = None
        """Done when every process is dead, if somebody waits for that."""

        self.sandbox = sandbox
        self.function: Function | None = None
        self.calls: dict[int, _Call] = {}
        self.create_s, self.specialize_s = 0.0, 0.0

    def bury(self) -> None:
        """Every process of it is dead."""
        if self.grave is not None and not self.grave.done():
            self.grave.set_result(None)


class Pool:
    """Runs invocations in sandboxes. Use it inside `async with pool.running():`."""

    def __init__(self, config: Config, driver: Driver) -> None:
        self.config = config
        self.state = state.PoolState(
            generic_max=config.generic_max,
            sandboxes_max=config.sandboxes_max,
            starts_max=config.starts_max,
            zygotes=records.ZygoteLimits(
                config.zygote_forks_max,
                config.zygote_s_max,
                config.zygote_idle_s,
                config.initialize_once_s,
            ),
            unknown_weight=autoscale.SHORT_IMPORT_WEIGHT,
        )
        self.metrics = Metrics(self.state)
        self.logs = Logs()
        self.pace = Pace()
        self.unready: dict[FunctionId, str] = {}
        """Functions that are declared and cannot run here yet, and why."""

        self._driver = driver
        self._environments: dict[str, Environment] = {}
        self._boxes: dict[SandboxId, _Box] = {}
        self._calls: dict[InvocationId, _Call] = {}
        self._leavers: set[SandboxId] = set()
        """Those that others are about to end, and that were not ours to let go of then."""

        self._waiting_for: set[asyncio.Task[None]] = set()
        """Sandboxes on their way to us, which may never come."""

        self._warming: set[asyncio.Task[None]] = set()
        """The life of every zygote."""

        self._zygotes: dict[SandboxId, _Box] = {}
        """Those that hold a function."""

        self._once: dict[FunctionId, list[_Box]] = {}
        """By function that runs once: its sandboxes, of which all but the last were killed."""

        self._tasks: asyncio.TaskGroup
        self._loop: asyncio.AbstractEventLoop
        self._memory_groups: tuple[memory.Group, ...]
        self._is_draining = False
        self._restored = asyncio.Event()
        self._awaited: dict[FunctionId, asyncio.Event] = {}
        """Functions that sandboxes of an earlier server hold, and that are not known yet."""

        self._last_start_error = ""
        self._waiting: Deadlines[_Call] = Deadlines(self._give_up)
        self._running: Deadlines[_Call] = Deadlines(self._time_out)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Pool"]:
        """Serve while the block runs. Every task and sandbox of the pool ends with it."""
        self._loop = asyncio.get_running_loop()
        self._driver.on_leaving = self._leaving
        await self._driver.open()
        self._memory_groups = memory.groups()  # the driver may have moved us
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                ticking = tasks.create_task(self._tick(), name="pool-tick")
                await self._adopt_generic()
                try:
                    yield self
                finally:
                    self._is_draining = True
                    ticking.cancel()
                    self._turn_away()
                    for zygote in self._warming:
                        zygote.cancel()
                    if self._driver.outlives:
                        for arrival in self._waiting_for:
                            arrival.cancel()
                    else:
                        for box in list(self._boxes.values()):
                            tasks.create_task(self._destroy(box, "closed"))
        finally:
            for box in self._boxes.values():
                box.sandbox.leave()
            await self._driver.close()
            for box in chain.from_iterable(self._once.values()):
                box.bury()

    def _turn_away(self) -> None:
        """Tell those who still wait that nothing will come of it here."""
        for call in self._calls.values():
            if not call.assigned_at and not call.future.done():
                call.future.set_exception(Draining())

    async def drain(self, timeout_s: float) -> bool:
        """Let everything that was accepted end; False when some did not in time."""
        deadline = time.monotonic() + timeout_s
        while self._calls and (left_s := deadline - time.monotonic()) > 0:
            await asyncio.wait([call.future for call in self._calls.values()], timeout=left_s)
            await asyncio.sleep(0)  # the callers take their outcomes
        return not self._calls

    async def _adopt_generic(self) -> None:
        """Take over the generic sandboxes of an earlier server, before any is made."""
        generic = [s for s in self._driver.survivors() if s.holds is None]
        if generic:
            async with asyncio.TaskGroup() as tasks:
                for survivor in generic:
                    tasks.create_task(self._adopt(survivor, ADOPT_S_MAX))

    def adopt(self) -> None:
        """All functions are known again: take over the sandboxes that hold one.

        Each is ours as soon as it has ended what it is doing.
        """
        self._restored.set()
        for survivor in self._driver.survivors():
            self._await_arrival(self._adopt(survivor, self.config.start_timeout_s))

    async def _adopt(self, survivor: Survivor, timeout_s: float) -> None:
        id_, mold, function = survivor.sandbox, survivor.mold, None
        sandbox = self._sandbox(id_, Served if mold.container else Sandbox)
        try:
            if survivor.holds is not None:
                await self._known(survivor.holds[0])
                function = self._held(*survivor.holds, mold)
                timeout_s += function.spec.timeout_seconds  # it may be busy
            hello = await sandbox.adopt(function, timeout_s)
            if function is not None:
                self._held(function.id, function.version, mold)  # still
        except SandboxStartFailed as error:
            log.info("sandbox not adopted", extra={"sandbox": id_, "why": error.detail})
            await sandbox.destroy()
            self._leavers.discard(id_)
            return
        box = self._boxes[id_] = _Box(sandbox)
        box.function = function
        log.info("sandbox adopted", extra={"sandbox": id_, "function": function and function.id})
        now = time.monotonic()
        if function is None:
            self._carry_out(self.state.survived(id_, mold, now))
        else:
            self._carry_out(self.state.survived_with(id_, function, hello.slots, now))
        self._let_go_of(id_)

    async def _known(self, id_: FunctionId) -> None:
        """Wait until the function is there: what it needs may be on its way to this server."""
        if id_ not in self.state.functions:
            arrived = self._awaited.setdefault(id_, asyncio.Event())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ARRIVAL_S_MAX):
                    await arrived.wait()

    def _held(self, id_: FunctionId, version: str, mold: Mold) -> Function:
        """The function that a survivor holds. Raises `SandboxStartFailed` if it is another now."""
        record = self.state.functions.get(id_)
        if record is None or (record.function.version, record.function.mold) != (version, mold):
            raise SandboxStartFailed(f"{id_}@{version} is not what runs now")
        return record.function

    def _leaving(self, id_: SandboxId) -> None:
        log.info("sandbox leaves", extra={"sandbox": id_})
        self._leavers.add(id_)
        record = self.state.sandboxes.get(id_)
        if record is not None and record.phase is not records.Phase.LOADING:
            self._let_go_of(id_)

    def _let_go_of(self, id_: SandboxId) -> None:
        """If it is to leave: what runs in it ends, and nothing comes."""
        if id_ in self._leavers:
            self._leavers.discard(id_)
            self._carry_out(self.state.leaving(id_, time.monotonic()))

    # ---- declarations -------------------------------------------------------------------------

    def keep_generic(self, mold: Mold, environment: Environment, least: int) -> None:
        """Have at least *least* generic sandboxes of *mold* ready from now on."""
        self._environments[environment.digest] = environment
        self._carry_out(self.state.add_mold(mold, least, time.monotonic()))

    def deploy(self, function: Function, environment: Environment) -> None:
        """When this returns, no new invocation runs another version of the function."""
        self._forget_container(function.id)
        self._environments[environment.digest] = environment
        now = time.monotonic()
        if function.mold not in self.state.molds:
            least = 0 if function.mold.batch else environment.generic_min
            self._carry_out(self.state.add_mold(function.mold, least, now, pinned=False))
        self._carry_out(self.state.deploy(function, now))
        if arrived := self._awaited.pop(function.id, None):
            arrived.set()

    def keep(self, id_: FunctionId, least: int) -> None:
        """Have *least* sandboxes of the function, whatever it was deployed with."""
        self._carry_out(self.state.keep(id_, least, time.monotonic()))

    def remove(self, id_: FunctionId, *, keep_logs: bool = False) -> None:
        """The function is gone; running invocations end, waiting ones are refused."""
        self._forget_container(id_)
        self._carry_out(self.state.remove(id_, time.monotonic()))
        self.metrics.forget(id_)
        if not keep_logs:
            self.logs.forget(id_)

    def _forget_container(self, id_: FunctionId) -> None:
        record = self.state.functions.get(id_)
        if record is not None and record.function.mold.container:
            self._environments.pop(record.function.mold.environment, None)

    # ---- invocations --------------------------------------------------------------------------

    async def invoke(self, invocation: Invocation) -> Outcome:
        """Run *invocation* to its outcome. Raises `PlatformError` when it could not be run."""
        id_ = invocation.id
        try:
            if self._is_draining:
                raise Draining
            if len(self._calls) >= self.config.invocations_max:
                raise QueueFull(f"{len(self._calls)} invocations are under way in this pool")
            if why := self.unready.get(invocation.function):
                raise NotReadyHere(why)
            now = time.monotonic()
            call = self._calls[id_] = _Call(invocation, self._loop.create_future(), now)
            try:
                self._carry_out(self.state.submit(id_, invocation.function, now))
                if not call.assigned_at and not call.future.done():
                    self._waiting.add(call, invocation.queue_s_max, now)
                return await call.future
            finally:
                del self._calls[id_]
                if self.state.abandon(id_):
                    self._waiting.remove(call, invocation.queue_s_max)
        except PlatformError as error:
            self.metrics.refused(type(error))
            raise

    async def run_once(
        self,
        function: Function,
        environment: Environment,
        invocation: Invocation,
        returned: Callable[[Outcome], None] = lambda outcome: None,
    ) -> Outcome:
        """Run *invocation* in a sandbox that nobody had before it, and that ends with it.

        *function* has an id of its own, and is known for as long as this takes. When it returns or
        raises, also because it was cancelled, every process in the sandbox is dead, so that nobody
        writes to the function's mounts any more; *returned* hears the outcome before that. `stop`
        ends it as it ends any other. Raises `PlatformError` when it could not be run.
        """
        mounts, id_ = function.mounts, function.id
        assert id_ not in self.state.functions, id_
        if self._is_draining:
            raise Draining
        if mounts is not None and mounts.workspaces and not self._driver.isolated:
            raise BadInput(
                f"workspace {mounts.workspaces[0][0]} needs isolation, which the driver process has"
                f" not: start the server with --driver linux"
            )
        boxes = self._once[id_] = []
        try:
            self.deploy(_for_once(function), environment)
            outcome = await self.invoke(invocation)
            returned(outcome)
            return outcome
        finally:
            self.remove(id_, keep_logs=True)
            for box in boxes:
                self._carry_out(self.state.died(box.sandbox.id, time.monotonic()))
            try:
                await _all_buried(boxes)
            finally:
                del self._once[id_]

    def _give_up(self, call: _Call) -> None:
        """No sandbox in time."""
        if self.state.abandon(call.invocation.id) and not call.future.done():
            why = f"none for {call.invocation.function} in {call.invocation.queue_s_max:g} s"
            if trouble := self._trouble(call.invocation.function):
                why += f"; its pod waits: {trouble}"
            elif self._last_start_error:
                why += f"; the last start failed: {self._last_start_error}"
            call.future.set_exception(NoCapacity(why))

    def _trouble(self, id_: FunctionId) -> str:
        """What keeps the pod of a container from running."""
        record = self.state.functions.get(id_)
        if record is None or not record.function.mold.container:
            return ""
        return next(filter(None, map(self._driver.trouble, record.sandboxes)), "")

    def _assign(self, command: commands.Assign) -> None:
        call = self._calls[command.invocation]
        box = self._boxes[command.sandbox]
        if box.sandbox.is_over:
            self._assign_again(call, box)
            return
        function = box.function
        assert function is not None
        invocation = call.invocation
        self._waiting.remove(call, invocation.queue_s_max)
        now = time.monotonic()
        call.assigned_at = now
        call.box = box
        if not function.is_batch:
            self.pace.seen_at = now
        timing = call.timing
        timing.start = command.start
        waited = now - call.submitted_at
        if command.start != "warm":
            timing.specialize_s = box.specialize_s
            waited -= box.specialize_s
        if command.start in ("created", "forked"):
            timing.create_s = min(box.create_s, max(0.0, waited))
            waited -= timing.create_s
        timing.queue_s = max(0.0, waited)
        timeout_s = function.spec.timeout_seconds
        if invocation.timeout_s is not None:
            timeout_s = min(timeout_s, invocation.timeout_s)
        call.timeout_s = timeout_s
        self._running.add(call, timeout_s, now)
        request = Invoke.of(
            {
                "id": invocation.id,
                "remaining_s": timeout_s,
                "http": invocation.http,
                "trace": invocation.trace,
                "env": invocation.env,
            }
        )
        number = box.sandbox.number + 1
        box.calls[number] = call
        answer = partial(self._answered, call, function, number)
        box.sandbox.invoke(request, invocation.body, answer)

    def _assign_again(self, call: _Call, box: _Box) -> None:
        """The sandbox died idle, and the state does not know yet: not the caller's fault."""
        now = time.monotonic()
        self._carry_out(self.state.died(box.sandbox.id, now))
        try:
            self._carry_out(self.state.submit(call.invocation.id, call.invocation.function, now))
        except PlatformError as error:
            if not call.future.done():
                call.future.set_exception(error)

    def _answered(
        self, call: _Call, function: Function, number: int, message: Message | Lost, body: bytes
    ) -> None:
        """The guest answered, or is lost; the place in it is free again."""
        self._running.remove(call, call.timeout_s)
        box = call.box
        box.calls.pop(number, None)
        timing = call.timing
        outcome: Outcome
        if isinstance(message, Result):
            timing.handler_s = message.handler_s
            outcome = Success(body, timing, message.status, message.headers)
        elif isinstance(message, Lost):
            if message.error is not None and not call.future.done():
                call.future.set_exception(message.error)
            timing.handler_s = time.monotonic() - call.assigned_at
            outcome = Failure(message.kind, message.message, "", timing, message.was_killed)
        else:
            assert isinstance(message, Failed)  # `Sandbox` takes nothing else for an invocation
            timing.handler_s = message.handler_s
            code = message.exit_code if 0 <= message.exit_code <= 255 else None
            why = self._with_last_words(call, message)
            outcome = Failure(message.kind, why, message.traceback, timing, exit_code=code)
        self._settle(call, box.sandbox.id, outcome)
        if not isinstance(message, Lost):
            now = time.monotonic()
            # the handler's own time, not the way there and back: on a busy machine more sandboxes
            # would only lengthen that
            took_s = min(max(timing.handler_s, 0.0), now - call.assigned_at)
            id_ = call.invocation.id
            self._carry_out(self.state.finished(box.sandbox.id, id_, took_s, now))

    def _with_last_words(self, call: _Call, failed: Failed) -> str:
        """Its message; of a command that tells no more than its exit code, also what it said."""
        if failed.message != f"exit code {failed.exit_code}":
            return failed.message
        said = self.logs.last_error(call.invocation.function, call.invocation.id)
        said = OWN_FOLDER.sub("", said)[:LAST_WORDS_MAX]
        return f"{failed.message}: {said}" if said else failed.message

    def _settle(self, call: _Call, sandbox: str, outcome: Outcome) -> None:
        """Give the caller its outcome, once, and note it."""
        if call.future.done():
            return
        call.future.set_result(outcome)
        function = call.invocation.function
        if function not in self.state.functions:
            return  # deleted meanwhile: it leaves neither series nor lines behind
        self.metrics.ended(function, outcome, call.timing)
        if isinstance(outcome, Failure):
            self._explain(function, sandbox, call.invocation.id, outcome)

    def _explain(self, function: FunctionId, sandbox: str, invocation: str, why: Failure) -> None:
        """Platform lines in the function's log: what failed."""
        self._say(function, sandbox, invocation, f"{why.kind}: {why.message}")
        for line in why.traceback.splitlines()[-TRACEBACK_LINES_MAX:]:
            self._say(function, sandbox, invocation, f"  {line}")  # so that it forges none of ours

    def _say(self, function: FunctionId, sandbox: str, invocation: str, text: str) -> None:
        line = LogLine(time.time(), function, sandbox, invocation, "platform", clean(text))
        self.logs.write(line)

    def stop(self, id_: InvocationId, why: str) -> None:
        """End an invocation, and its sandbox if it runs; its outcome is the failure `Stopped`."""
        call = self._calls.get(id_)
        if call is None or call.future.done():
            return
        failure = Failure("Stopped", why, "", call.timing)
        if call.assigned_at:
            self._end(call, failure)
        elif self.state.abandon(id_):
            self._waiting.remove(call, call.invocation.queue_s_max)
            call.future.set_result(failure)

    def _time_out(self, call: _Call) -> None:
        """The deadline: the caller is told now, the sandbox ends with all its processes."""
        limit_s = time.monotonic() - call.assigned_at
        call.timing.handler_s = limit_s
        failure = Failure("TimedOut", f"still running after {limit_s:.3g} s", "", call.timing)
        self._end(call, failure)

    def _end(self, call: _Call, failure: Failure) -> None:
        box = call.box
        self._settle(call, box.sandbox.id, failure)
        self._boxes.pop(box.sandbox.id, None)
        self._spawn(self._stop(box))
        self._carry_out(self.state.died(box.sandbox.id, time.monotonic()))

    async def _stop(self, box: _Box) -> None:
        why = "another invocation in the same sandbox ran out of time"
        try:
            await box.sandbox.stop("Crashed", why, self.config.grace_s)
        finally:
            self._leavers.discard(box.sandbox.id)
            box.bury()

    # ---- commands -----------------------------------------------------------------------------

    def _carry_out(self, decided: Iterable[commands.Command]) -> None:
        for command in decided:
            match command:
                case commands.Assign():
                    self._assign(command)
                case commands.Create() | commands.Warm() if self._is_draining:
                    pass  # what is destroyed now is not to be replaced
                case commands.Create():
                    self._await_arrival(self._create(command))
                case commands.Warm():
                    self._spawn_zygote(command)
                case commands.Retire(zygote=id_):
                    self._spawn(self._driver.retire(id_))
                case commands.Specialize(sandbox=id_, function=function):
                    if function.id in self._once and (box := self._boxes.get(id_)):
                        box.grave = self._loop.create_future()
                        self._once[function.id].append(box)
                    start = self._await_arrival if function.mold.container else self._spawn
                    start(self._specialize(command))
                case commands.Destroy(sandbox=id_, reason=reason):
                    if box := self._boxes.pop(id_, None):
                        self._spawn(self._destroy(box, reason))
                case commands.Refuse():
                    self._refuse(command)
                case _:
                    assert_never(command)

    def _refuse(self, command: commands.Refuse) -> None:
        call = self._calls.get(command.invocation)
        if call is None or call.future.done():
            return
        self._waiting.remove(call, call.invocation.queue_s_max)
        if command.failure is None:
            call.future.set_exception(FunctionNotFound("it was deleted"))
        else:
            failure = command.failure
            call.timing.start = "generic"
            call.timing.queue_s = time.monotonic() - call.submitted_at
            told = Failure(failure.kind, failure.message, failure.traceback, call.timing)
            self._settle(call, "", told)

    def _sandbox(self, id_: SandboxId, kind: type[AnySandbox]) -> AnySandbox:
        return kind(id_, self._driver, on_log=self._on_log, on_death=self._died, spawn=self._spawn)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
        try:
            return self._tasks.create_task(guarded := _guarded(work))
        except RuntimeError:  # the pool has ended: the driver's close sees to the rest
            guarded.close()
            work.close()
            return None

    def _await_arrival(self, work: Coroutine[Any, Any, None]) -> None:
        """As `_spawn`; what has not come when the pool ends is not waited for, if it lives on."""
        if task := self._spawn(work):
            self._waiting_for.add(task)
            task.add_done_callback(self._waiting_for.discard)
            task.add_done_callback(lambda _: work.close())  # one that was cancelled unbegun

    async def _create(self, command: commands.Create) -> None:
        id_ = command.sandbox
        environment = self._environments.get(command.mold.environment, GONE)
        sandbox = self._sandbox(id_, _kind(environment))
        box = self._boxes[id_] = _Box(sandbox)
        if self._is_draining:
            return
        if command.mold.container and environment is GONE:
            self._died(id_, "its function has gone")
            return
        if not command.claimed:
            await asyncio.sleep(REFILL_DELAY_S)
        self.metrics.created()
        started = time.monotonic()
        ids = (id_,) if command.zygote is None else (id_, command.zygote)
        try:
            timeout_s = self.config.start_timeout_s
            with self._giving_way(command.behind, *ids, late_s=_late_s(command.mold, timeout_s)):
                await sandbox.start(
                    command.mold, environment, timeout_s, command.zygote, background=command.behind
                )
        except SandboxStartFailed as error:
            self._last_start_error = error.detail
            log.warning("sandbox did not start", extra={"sandbox": id_, "why": error.detail})
            self._died(id_, error.detail)
            return
        box.create_s = time.monotonic() - started
        log.info("sandbox ready", extra={"sandbox": id_, "took_s": box.create_s})
        self._carry_out(self.state.ready(id_, time.monotonic()))

    @contextmanager
    def _giving_way(self, background: bool, *ids: SandboxId, late_s: float = 0.0) -> Iterator[None]:
        """While the block runs *ids* let others go first, or are not kept behind any more.

        For `BACKGROUND_S_MAX` at most: handlers may want the processors for as long as they like.
        With *late_s* they are always behind, but for the part of the block after that.
        """
        self._give_way(ids, background=background or late_s > 0)
        if not background and not late_s:
            yield
            return
        timer = self._loop.call_later(late_s or BACKGROUND_S_MAX, partial(self._give_way, ids))
        try:
            yield
        finally:
            timer.cancel()
            if late_s:
                self._give_way(ids, background=True)

    def _give_way(self, ids: Iterable[SandboxId], *, background: bool = False) -> None:
        for id_ in ids:
            self._driver.give_way(id_, background=background)

    def _spawn_zygote(self, command: commands.Warm) -> None:
        work = self._warm(command)
        task = self._spawn(work)
        if task is not None:
            task.add_done_callback(lambda _: work.close())  # one that was cancelled unbegun
            self._warming.add(task)
            task.add_done_callback(self._warming.discard)

    async def _warm(self, command: commands.Warm) -> None:
        """A zygote's life: warmed, at work, gone."""
        zygote, unfit, failure = command.zygote, "", None
        environment = self._environments[command.mold.environment]
        started = time.monotonic()
        try:
            if command.function is None:
                timeout_s = self.config.start_timeout_s
                with self._giving_way(False, zygote, late_s=_late_s(command.mold, timeout_s)):
                    async with asyncio.timeout(timeout_s):
                        await self._driver.warm(zygote, command.mold, environment)
            elif failure := await self._load_zygote(command, command.function):
                raise ZygoteUnfit(f"{failure.kind}: {failure.message}")
            log.info("zygote ready", extra={"zygote": zygote, "took_s": time.monotonic() - started})
            self._carry_out(self.state.warmed(zygote, time.monotonic()))
            await self._driver.exited(zygote)
        except Exception as error:  # whatever it is, the state must hear that there is none
            if isinstance(error, ZygoteUnfit) and failure is None:
                unfit = error.detail
            log.warning("no zygote", extra={"mold": str(command.mold), "why": repr(error)})
        finally:
            box = self._zygotes.pop(zygote, None)
            with contextlib.suppress(SandboxStartFailed):  # the launcher is gone, and it as well
                await (box.sandbox.destroy() if box else self._driver.destroy(zygote))
        log.info("zygote gone", extra={"zygote": zygote})
        now = time.monotonic()
        self._carry_out(self.state.chilled(zygote, now, unfit=unfit, failure=failure))

    async def _load_zygote(self, command: commands.Warm, function: Function) -> Failure | None:
        """Have a function's zygote forked from its environment's, and import the function there.

        What user code does wrong is returned. Raises `SandboxStartFailed`, `ZygoteUnfit`.
        """
        zygote = command.zygote
        sandbox = Sandbox(
            zygote,
            self._driver,
            on_log=self._on_log,
            on_death=self._zygote_ended,
            spawn=self._spawn,
        )
        box = self._zygotes[zygote] = _Box(sandbox)
        box.function = function
        environment = self._environments[command.mold.environment]
        timeout_s = self.config.start_timeout_s
        await sandbox.start(command.mold, environment, timeout_s, command.parent, function)
        timeout_s = self.config.init_timeout_s
        loaded = await sandbox.load(function, environment, timeout_s, as_zygote=True)
        if isinstance(loaded, Failure):
            return loaded
        if loaded is None:
            raise SandboxStartFailed("it was killed while importing the function")
        left = left_behind(loaded)
        if loaded.threads or loaded.children or (left and function.spec.initialize != "once"):
            raise ZygoteUnfit(f"its import left {left}, which no fork would have")
        return None

    def _zygote_ended(self, zygote: SandboxId, why: str) -> None:
        """Its connection is gone: so is what is left of it, and `_warm` hears of that."""
        log.info("zygote died", extra={"zygote": zygote, "why": why})

        async def destroy() -> None:
            await self._driver.destroy(zygote)

        self._spawn(destroy())

    async def _specialize(self, command: commands.Specialize) -> None:
        function = command.function
        box = self._boxes.get(command.sandbox)
        if box is None:
            return  # it was killed before its turn came
        box.function = function
        started = time.monotonic()
        environment = self._environments[function.mold.environment]
        timeout_s = self.config.init_timeout_s
        if environment.container is not None:
            timeout_s = self.config.image_timeout_s
        late_s = _late_s(function.mold, timeout_s)
        with self._giving_way(command.behind, command.sandbox, late_s=late_s):
            loaded = await box.sandbox.load(function, environment, timeout_s)
        self._driver.give_way(command.sandbox, background=function.is_batch)
        now = time.monotonic()
        if loaded is None:
            self._carry_out(self.state.died(command.sandbox, now))
            return
        if isinstance(loaded, Failure):
            who = {"sandbox": command.sandbox, "function": function.id}
            log.info("function did not load", extra=who | {"why": loaded.kind})
            self._carry_out(self.state.load_failed(command.sandbox, loaded, now))
            return
        box.specialize_s = now - started
        self._driver.note(command.sandbox, function)
        extra = {
            "sandbox": command.sandbox,
            "function": function.id,
            "took_s": box.specialize_s,
            "lockdown_s": loaded.lockdown_s,
            "import_s": loaded.import_s,
        }
        log.info("sandbox specialized", extra=extra)
        ready = self.state.loaded(
            command.sandbox,
            loaded.slots,
            now,
            memory_bytes=self._driver.memory_bytes(command.sandbox),
            import_s=loaded.import_s,
            busy_s=loaded.busy_s,
            leftovers=left_behind(loaded),
        )
        self._carry_out(ready)
        self._let_go_of(command.sandbox)

    async def _destroy(self, box: _Box, reason: str) -> None:
        self._boxes.pop(box.sandbox.id, None)
        self.metrics.destroyed(reason)
        try:
            is_awaited = box.grave is not None
            with self._giving_way(not is_awaited, box.sandbox.id):
                await box.sandbox.destroy()
        finally:
            self._leavers.discard(box.sandbox.id)
            box.bury()
        log.info("sandbox destroyed", extra={"sandbox": box.sandbox.id, "reason": reason})

    def _died(self, id_: SandboxId, why: str) -> None:
        log.info("sandbox died", extra={"sandbox": id_, "why": why})
        record = self.state.sandboxes.get(id_)
        if record is not None and record.phase is records.Phase.LOADING:
            return  # `_specialize` is told as well, and knows whose failure it is
        self._carry_out(self.state.died(id_, time.monotonic()))
        if box := self._boxes.pop(id_, None):
            self._spawn(self._destroy(box, "failed"))

    async def _tick(self) -> None:
        if self._driver.outlives:
            await self._restored.wait()  # or what is not known yet would be ended as surplus
        while True:
            await asyncio.sleep(self.config.tick_s)
            is_short = False
            if self._driver.shares_machine:
                available = memory.available_bytes(self._memory_groups)
                is_short = available < self.config.memory_reserve_mb << 20
            if is_short != self.state.is_short_of_memory:
                text = "short of memory" if is_short else "no longer short of memory"
                log.warning("the machine is %s", text)
            self._carry_out(self.state.tick(time.monotonic(), is_short_of_memory=is_short))

    # ---- logs and looks -----------------------------------------------------------------------

    def _on_log(self, sandbox: SandboxId, number: int, message: Log, body: bytes) -> None:
        box = self._boxes.get(sandbox) or self._zygotes.get(sandbox)
        if box is None or box.function is None or box.function.id not in self.state.functions:
            return
        call = box.calls.get(number)
        invocation = call.invocation.id if call is not None else ""
        stream = "stderr" if message.stream == "stderr" else "stdout"
        now, function = time.time(), box.function.id
        for text in body.decode(errors="replace").split("\n"):
            if text:
                self.logs.write(
                    LogLine(now, function, sandbox, invocation, stream, clean(text))  # type: ignore[arg-type]
                )
        if message.dropped > 0:
            self.metrics.log_dropped(message.dropped)
            self._say(function, sandbox, invocation, f"{message.dropped} bytes of output dropped")

    def memory_bytes(self, sandbox: SandboxId) -> int:
        """What the sandbox uses now; 0 when unknown."""
        return self._driver.memory_bytes(sandbox)

    def zygote_of(self, function: Function) -> SandboxId | None:
        """The zygote that holds this version of the function, if there is one."""
        mold = self.state.molds.get(records.own_mold(function))
        return mold.zygote.id if mold is not None and mold.zygote is not None else None

    @property
    def under_way(self) -> int:
        """Invocations waiting or running."""
        return len(self._calls)


async def _all_buried(boxes: list[_Box]) -> None:
    """Wait until they are dead; who is cancelled meanwhile hears of it then, which is soon."""
    cancelled = None
    while graves := [box.grave for box in boxes if box.grave and not box.grave.done()]:
        try:
            await asyncio.wait(graves)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


def _late_s(mold: Mold, timeout_s: float) -> float:
    """When work on a sandbox of *mold* is late because others keep it from the processors.

    0 for those that are not kept behind for longer than that of others is.
    """
    return timeout_s * LATE_SHARE if mold.batch else 0.0


def _kind(environment: Environment) -> type[AnySandbox]:
    if environment.container is None:
        return Sandbox
    return Served if environment.container.port else Ran


def _for_once(function: Function) -> Function:
    """What makes it one sandbox's: nothing is kept for the next, because there is none."""
    spec = structs.replace(function.spec, initialize="each", min_scale=0, max_scale=1)
    mold = structs.replace(function.mold, steps=True)
    return structs.replace(function, spec=spec, mold=mold)


async def _guarded(work: Coroutine[Any, Any, None]) -> None:
    """A defect in the care for one sandbox must not end the others."""
    try:
        await work
    except Exception:
        log.exception("a task of the pool failed")
