"""Which sandbox does what: facts in, commands out. Nothing here performs I/O or knows the time.

Every method takes a fact (an invocation arrived, a sandbox is ready, one died, time passed), moves
the state at once, and returns the commands that others carry out. The cases, for one function:

* A warm sandbox with a free place takes the head of the queue at once, the one used last first.
* Otherwise the invocation waits in the function's queue, bound to nothing. If a further start
  would pay, the function makes a claim on its mold. A ready generic sandbox answers it (a pool
  hit); else claims are answered in order, as sandboxes get ready (a pool miss).
* Whichever sandbox is free first takes the head of the queue. A claim that nobody needs any more
  is taken back at once; the sandbox that was started for it stays generic.
* Generic sandboxes are refilled as soon as one is taken; in a mold, claims come before that.
* Starting and loading keep processors busy, so `turns` shares them out between the tenants.
* Where a mold's zygote is ready, it forks them. A refill waits for a zygote that is being warmed;
  what somebody waits for does not, and is started.
* A function that initializes once has a mold of its own, whose zygote holds it already. Its claims
  wait for that zygote; without one it loads like any other.
* At the limit of sandboxes, a claim evicts the idle sandbox of least value; when the machine runs
  short of memory, so does a tick, and nothing is refilled.
* A new version empties the old one: idle sandboxes end now, busy ones after their invocation.

Everything is indexed by function, mold and phase; nothing scans.
"""

import math
from collections import Counter, OrderedDict
from itertools import count, islice
from typing import Final

from msgspec import structs

from dayfly_pool import autoscale, eviction, turns
from dayfly_pool.commands import (
    Assign,
    Command,
    Create,
    Destroy,
    Refuse,
    Retire,
    Specialize,
    StartKind,
    Warm,
)
from dayfly_pool.errors import FunctionNotFound, QueueFull
from dayfly_pool.models import Failure, Function, FunctionId, InvocationId, Mold, SandboxId
from dayfly_pool.records import (
    NEXT,
    FunctionRecord,
    MoldRecord,
    Phase,
    SandboxRecord,
    ZygoteLimits,
    ZygoteRecord,
)

DEFAULT_START_S: Final = 0.05
START_ENDS_S: Final = 0.25
"""A generic sandbox that dies this soon after it said that it is up did not start well."""

LOST_LOADS_MAX: Final = 3
"""So many sandboxes may be killed while importing a function before it is held against it."""

CLAIMS_LOOKED_AT: Final = 64
"""Of the claims on one mold, so many may be passed over because it is not their tenant's turn."""

SHED_SHARE: Final = 0.05
"""Of the idle sandboxes, this share is evicted a tick while the machine is short of memory."""

SPARE_IDLE_S: Final = 5.0
"""A zygote that is one more goes when it was unused for this long, and a function's while the
machine is short of memory."""

PASSING_IDLE_S: Final = 60.0
"""A mold for steps or batch, whose functions go with them, is kept for so long after the last."""

ZYGOTES_MAX: Final = 8
"""Of one mold."""

START_WEIGHT: Final = 1.0
FORK_WEIGHT: Final = 0.5
"""A fork passes from process to process, and leaves a processor idle as often as it uses one."""

PRELOADED_WEIGHT: Final = 0.25
"""Of a load whose import a zygote has done."""


def _weight(mold: MoldRecord) -> float:
    """Of starting one more. A container's own pod keeps no processor of ours busy."""
    if mold.mold.container:
        return 0.0
    return FORK_WEIGHT if mold.zygote else START_WEIGHT


class PoolState:
    """All that one pool knows of its sandboxes, functions and waiting invocations."""

    def __init__(
        self,
        *,
        generic_max: int,
        sandboxes_max: int,
        starts_max: int,
        zygotes: ZygoteLimits | None = None,
        unknown_weight: float = 1.0,
    ) -> None:
        self.generic_max = generic_max
        self.sandboxes_max = sandboxes_max
        self._unknown_weight = unknown_weight
        """Of a load of a function that has never been loaded."""

        self._unknown_loads_max = starts_max
        """Of such a function, at once: its import may be heavy."""

        self._turns = turns.Turns(starts_max)
        self._loads: Counter[str] = Counter()
        """Loads under way, by tenant."""

        self.zygote_limits = zygotes or ZygoteLimits()
        self.zygotes: dict[SandboxId, ZygoteRecord] = {}
        """Those that fork, or will."""

        self.sandboxes: dict[SandboxId, SandboxRecord] = {}
        self.functions: dict[FunctionId, FunctionRecord] = {}
        self.molds: dict[Mold, MoldRecord] = {}
        self.misses = 0
        self._queued: dict[InvocationId, FunctionId] = {}
        self._minimums: dict[FunctionId, FunctionRecord] = {}
        self._needy: dict[str, OrderedDict[Mold, MoldRecord]] = {}
        """By tenant: those that may lack something (a start, a load, a zygote)."""

        self._cramped: dict[Mold, MoldRecord] = {}
        """Those whose claims found no room in the pool, or wait for an unknown import to end."""

        self._shelf = eviction.Shelf(self.functions)
        self.is_short_of_memory = False
        self._numbers = count(1)

    def __repr__(self) -> str:
        parts = [f"{n} {phase.value}" for phase, n in self.phases().items() if n]
        return f"<PoolState [{', '.join(parts) or 'empty'} | {len(self._queued)} waiting]>"

    def phases(self) -> dict[Phase, int]:
        """How many sandboxes are in each phase."""
        counts = dict.fromkeys(Phase, 0)
        for sandbox in self.sandboxes.values():
            counts[sandbox.phase] += 1
        return counts

    @property
    def interactive(self) -> int:
        """Sandboxes that work, or get ready, for what is no batch. Looks at every one."""
        busy = (Phase.BUSY, Phase.LOADING)
        return sum(
            box.phase in busy and box.function is not None and not box.function.is_batch
            for box in self.sandboxes.values()
        )

    @property
    def waiting(self) -> int:
        """Invocations that wait for a sandbox."""
        return len(self._queued)

    # ---- facts about declarations -------------------------------------------------------------

    def add_mold(self, mold: Mold, least: int, now: float, *, pinned: bool = True) -> list[Command]:
        """Keep at least *least* generic sandboxes of *mold* from now on.

        If not *pinned*, only while there are functions of it.
        """
        record = self._mold(mold)
        record.least, record.pinned = least, pinned and least > 0
        record.used_at = now
        self._look_at(record)
        return self._start_where_needed(now)

    def deploy(self, function: Function, now: float) -> list[Command]:
        """A new function or version: what follows runs it, and nothing starts on the old one."""
        self._mold(function.mold).functions += 1
        record = self.functions.get(function.id)
        if record is None:
            return self._keep_min_scale(self._adopt(FunctionRecord(function), now), now)
        commands = self._outdate(record, "updated")
        self._leave_molds(record)
        fresh = self._adopt(FunctionRecord(function, record.queue, uses=record.uses), now)
        return commands + self._keep_min_scale(fresh, now) + self._dispatch(fresh, now)

    def keep(self, id_: FunctionId, least: int, now: float) -> list[Command]:
        """Have *least* sandboxes of the function from now on, whatever it was deployed with."""
        record = self.functions.get(id_)
        if record is None or record.function.spec.min_scale == least:
            return []
        spec = structs.replace(record.function.spec, min_scale=least)
        record.function = structs.replace(record.function, spec=spec)
        if not least:
            self._minimums.pop(id_, None)
            return []
        self._minimums[id_] = record
        return self._keep_min_scale(record, now)

    def remove(self, id_: FunctionId, now: float) -> list[Command]:
        """The function is gone: what waits for it is refused."""
        record = self.functions.pop(id_, None)
        if record is None:
            return []
        self._minimums.pop(id_, None)
        self._shelf.forget(id_)
        for invocation in record.queue:
            del self._queued[invocation]
        refused: list[Command] = [Refuse(invocation, None) for invocation in record.queue]
        record.queue.clear()
        self._leave_molds(record)
        return refused + self._outdate(record, "removed") + self._start_where_needed(now)

    # ---- facts about invocations --------------------------------------------------------------

    def submit(self, invocation: InvocationId, id_: FunctionId, now: float) -> list[Command]:
        """An invocation arrived. Raises FunctionNotFound or QueueFull, and then keeps nothing."""
        record = self.functions.get(id_)
        if record is None:
            raise FunctionNotFound(f"no function {id_!r}")
        if record.failure and now < record.broken_until and not record.sandboxes:
            return [Refuse(invocation, record.failure)]
        if not (record.queue or record.claims) and (box := self._free(record)):
            return [Assign(box.id, invocation, self._occupy(box, record, invocation))]
        if len(record.queue) >= record.function.spec.queue_max:
            raise QueueFull(f"{len(record.queue)} invocations of {id_} are waiting")
        record.queue[invocation] = now
        self._queued[invocation] = id_
        return self._dispatch(record, now)

    def abandon(self, invocation: InvocationId) -> bool:
        """Nobody waits for it any more. True when it had not been assigned yet."""
        id_ = self._queued.pop(invocation, None)
        if id_ is None:
            return False
        record = self.functions[id_]
        del record.queue[invocation]
        self._keep_claims(record, self._needed(record))
        return True

    def finished(
        self, sandbox: SandboxId, invocation: InvocationId, handler_s: float, now: float
    ) -> list[Command]:
        """An invocation ended there, and the sandbox is well."""
        box = self.sandboxes.get(sandbox)
        if box is None or invocation not in box.running:
            return []
        box.running.discard(invocation)
        if box.stale:
            if box.running:
                return []
            return [self._destroy(box, "updated"), *self._start_where_needed(now)]
        assert box.function is not None
        record = self.functions[box.function.id]
        record.handler_s = autoscale.smoothed(record.handler_s, handler_s)
        record.failures = 0
        if box.running:
            record.open[box.id] = box
        else:
            self._rest(box, record, now)
        # no further start is weighed here: the queue got shorter, and `tick` looks at it as well
        return self._serve(record) + self._use_room(now)

    # ---- facts about sandboxes ----------------------------------------------------------------

    def ready(self, sandbox: SandboxId, now: float) -> list[Command]:
        """A created sandbox is up and holds no user code."""
        box = self.sandboxes.get(sandbox)
        if box is None or box.phase is not Phase.STARTING:
            return []
        mold = self.molds[box.mold]
        mold.start_s = autoscale.smoothed(mold.start_s, now - box.since)
        mold.failures, mold.retry_at = 0, 0.0
        if box.zygote in self.zygotes:
            mold.zygote_failures = 0
        mold.starting -= 1
        self._end_work(box)
        self._end_fork(box)
        self._move(box, Phase.GENERIC)
        box.since = now
        if len(mold.claims) > len(mold.generic):  # somebody waited for it
            box.start = "created" if box.zygote is None else "forked"
        else:
            box.start = "generic"
        mold.generic[box.id] = box
        self._look_at(mold)
        return self._start_where_needed(now)

    def survived(self, sandbox: SandboxId, mold: Mold, now: float) -> list[Command]:
        """A generic sandbox is there that an earlier server made."""
        record = self._mold(mold)
        box = SandboxRecord(sandbox, mold, now, Phase.GENERIC, start="generic")
        self.sandboxes[box.id] = record.generic[box.id] = box
        self._look_at(record)
        return self._start_where_needed(now)

    def survived_with(
        self, sandbox: SandboxId, function: Function, slots: int, now: float
    ) -> list[Command]:
        """One is there that holds *function*, which is the version that there is."""
        record = self.functions[function.id]
        box = SandboxRecord(
            sandbox, function.mold, now, Phase.LOADING, function, slots=slots, start="warm"
        )
        self.sandboxes[box.id] = record.sandboxes[box.id] = box
        record.slots = slots
        self._rest(box, record, now)
        return self._dispatch(record, now) + self._start_where_needed(now)

    def leaving(self, sandbox: SandboxId, now: float) -> list[Command]:
        """Others are about to end it: it takes nothing more, and goes when it has finished."""
        box = self.sandboxes.get(sandbox)
        if box is None or box.stale:
            return []
        if box.phase is Phase.BUSY and box.function is not None:
            self._forsake(box, self.functions[box.function.id])
            return self._dispatch(self.functions[box.function.id], now)
        if box.phase is Phase.LOADING:
            return []  # it is soon something else, or dead
        commands: list[Command] = [self._destroy(box, "leaving")]
        return commands + self._start_where_needed(now)

    def _forsake(self, box: SandboxRecord, record: FunctionRecord) -> None:
        """It ends after what it runs, and counts as its function's no more."""
        record.sandboxes.pop(box.id, None)
        record.open.pop(box.id, None)
        box.stale = True

    def warmed(self, zygote: SandboxId, now: float) -> list[Command]:
        """A zygote is ready to fork, in place of the one before it."""
        record = self.zygotes.get(zygote)
        if record is None:
            return [Retire(zygote)]
        mold = self.molds[record.mold]
        commands: list[Command] = []
        self._end_work(record)
        record.is_ready, record.since, record.used_at = True, now, now
        mold.warming = None
        if mold.zygote is not None and not self.zygote_limits.is_worn(mold.zygote, now):
            mold.more[record.id] = record
        else:
            if mold.zygote is not None:
                commands += self._let_go(mold.zygote)
            mold.zygote = record
        mold.retry_at = 0.0  # of starts; a fork may well work
        self._zygote_changed(mold, now)
        return commands + self._start_where_needed(now)

    def chilled(
        self,
        zygote: SandboxId,
        now: float,
        *,
        unfit: str = "",
        failure: Failure | None = None,
    ) -> list[Command]:
        """A zygote could not be warmed, or is gone.

        *unfit* says why another one would not do either; *failure* why its function did not load.
        """
        record = self.zygotes.pop(zygote, None)
        if record is None:
            return []
        mold = self.molds[record.mold]
        mold.drop(record)
        self._end_work(record)
        mold.zygote_failures += 1
        pause_s = math.inf if unfit else autoscale.backoff_s(mold.zygote_failures)
        mold.zygote_retry_at = now + pause_s
        commands: list[Command] = []
        user = self._user(mold)
        if user is not None and failure is not None and user.slots is None:
            commands += self._break(user, failure, now)  # it has never been loaded anywhere
        elif user is not None and (unfit or failure):
            why = unfit or f"the import failed in its zygote: {failure and failure.message}"
            user.is_unfit = True
            self._initialize(user, once=False, why=why, now=now)
        self._zygote_changed(mold, now)
        return commands + self._start_where_needed(now)

    def loaded(
        self,
        sandbox: SandboxId,
        slots: int,
        now: float,
        *,
        memory_bytes: int = 0,
        import_s: float = 0.0,
        busy_s: float = 0.0,
        leftovers: str = "",
    ) -> list[Command]:
        """The function is in it.

        It takes *memory_bytes*, if that is known. Its import took *import_s*, needed a processor
        for *busy_s* of it, and has left behind what *leftovers* lists, which no fork could share.
        """
        box = self.sandboxes.get(sandbox)
        if box is None or box.phase is not Phase.LOADING:
            return []
        if box.stale:
            return [self._destroy(box, "updated"), *self._start_where_needed(now)]
        assert box.function is not None
        record = self.functions[box.function.id]
        record.loading -= 1
        self._end_work(box)
        record.slots, record.failure, record.lost_loads = slots, None, 0
        if not box.mold.container:  # what listens has yet to answer
            record.failures = 0
        if not box.mold.function:
            record.load_weight = autoscale.load_weight(import_s, busy_s)
            self._weigh_import(record, import_s, leftovers, now)
        record.specialize_s = autoscale.smoothed(record.specialize_s, now - box.since)
        record.memory_bytes = memory_bytes or record.memory_bytes
        box.slots = slots
        self._rest(box, record, now)
        commands = self._dispatch(record, now)
        box.start = "warm"  # whoever comes later has not waited for this start
        self._look_at_cramped()
        return commands + self._start_where_needed(now)

    def load_failed(self, sandbox: SandboxId, failure: Failure, now: float) -> list[Command]:
        """User code could not be loaded: whoever waits for it is told, then it is left alone."""
        box = self.sandboxes.get(sandbox)
        if box is None or box.phase is not Phase.LOADING:
            return []
        commands: list[Command] = []
        if not box.stale and box.function is not None:
            commands += self._break(self.functions[box.function.id], failure, now)
        return [*commands, self._destroy(box, "failed"), *self._start_where_needed(now)]

    def _break(self, record: FunctionRecord, failure: Failure, now: float) -> list[Command]:
        """It cannot be loaded: whoever waits for it is told, then it is left alone for a while."""
        commands: list[Command] = []
        record.failure, record.failures = failure, record.failures + 1
        record.broken_until = now + autoscale.backoff_s(record.failures)
        for invocation in record.queue:
            del self._queued[invocation]
            commands.append(Refuse(invocation, failure))
        record.queue.clear()
        self._keep_claims(record, 0)
        return commands

    def died(self, sandbox: SandboxId, now: float) -> list[Command]:
        """It is gone, whatever it was doing."""
        box = self.sandboxes.get(sandbox)
        if box is None:
            return []
        commands: list[Command] = []
        if box.phase is Phase.LOADING and box.function is not None and not box.stale:
            record = self.functions[box.function.id]
            record.lost_loads += 1
            if record.lost_loads > LOST_LOADS_MAX:
                why = f"{record.lost_loads} sandboxes in a row were killed while importing it"
                return self.load_failed(sandbox, Failure("InitCrashed", why), now)
        is_new = box.phase is Phase.GENERIC and now - box.since < START_ENDS_S
        if box.phase is Phase.STARTING or is_new:
            commands += self._start_failed(box, now)
        commands.append(self._destroy(box, "failed"))
        if box.function is not None and not box.stale:
            record = self.functions[box.function.id]
            if box.mold.container:  # not one pod after the other for a minScale
                record.failures += 1
                record.broken_until = now + autoscale.backoff_s(record.failures)
            commands += self._dispatch(record, now)
        return commands + self._start_where_needed(now)

    def tick(self, now: float, *, is_short_of_memory: bool = False) -> list[Command]:
        """Time passed: reap what is idle too long, keep the minimum, look at the queues again.

        While the machine *is_short_of_memory* nothing is kept ready, and some of what is idle goes.
        """
        self.is_short_of_memory = is_short_of_memory
        commands = self._reap(now)
        if is_short_of_memory:
            commands += self._shed()
        for id_ in set(self._queued.values()):
            commands += self._dispatch(self.functions[id_], now)
        for record in self._minimums.values():
            commands += self._keep_min_scale(record, now)
        for mold in list(self.molds.values()):
            commands += self._trim(mold, now)
        for mold in self.molds.values():
            self._look_at(mold)
        return commands + self._start_where_needed(now)

    # ---- decisions ----------------------------------------------------------------------------

    def _dispatch(self, record: FunctionRecord, now: float) -> list[Command]:
        """Give waiting invocations to free places, then claim as many sandboxes as pay."""
        commands = self._serve(record)
        if record.queue:
            commands += self._claim(record, self._starts_that_pay(record, now), now)
        return commands

    def _serve(self, record: FunctionRecord) -> list[Command]:
        """Give waiting invocations to free places; claims that they made needless are dropped."""
        commands: list[Command] = []
        while record.queue and (box := self._free(record)):
            invocation, _ = record.queue.popitem(last=False)
            del self._queued[invocation]
            commands.append(Assign(box.id, invocation, self._occupy(box, record, invocation)))
        if record.claims:
            self._keep_claims(record, self._needed(record))
        return commands

    def _free(self, record: FunctionRecord) -> SandboxRecord | None:
        if record.open:
            return next(reversed(record.open.values()))
        return next(reversed(record.idle.values())) if record.idle else None

    def _occupy(
        self, box: SandboxRecord, record: FunctionRecord, invocation: InvocationId
    ) -> StartKind:
        """Take a place in *box*, here and now, so that no later decision can take it too."""
        if box.phase is Phase.IDLE:
            self._leave_idle(box, record)
            self._move(box, Phase.BUSY)
        record.uses += 1
        box.running.add(invocation)
        if len(box.running) < box.slots:
            record.open[box.id] = box
        else:
            record.open.pop(box.id, None)
        start, box.start = box.start, "warm"
        return start

    def _starts_that_pay(self, record: FunctionRecord, now: float) -> int:
        spec, places = record.function.spec, record.places
        waiting = len(record.queue)
        needed = self._needed(record) - record.claims
        room = spec.max_scale - len(record.sandboxes) - record.claims
        if min(needed, room) <= 0:
            return 0
        serving = (len(record.sandboxes) - record.loading) * places
        waited = now - next(iter(record.queue.values()))
        mold = self.molds[record.home]
        start_s = record.specialize_s + (0 if mold.generic else mold.start_s or DEFAULT_START_S)
        pays = autoscale.start_pays(waiting, serving, record.handler_s, waited, start_s)
        return min(needed, room) if pays else 0

    def _needed(self, record: FunctionRecord) -> int:
        """Further sandboxes that the waiting invocations, or the minimum, can use."""
        waiting = -(-len(record.queue) // record.places) - record.loading
        return max(waiting, record.function.spec.min_scale - len(record.sandboxes), 0)

    def _keep_claims(self, record: FunctionRecord, number: int) -> None:
        """Take back all claims but *number*, so that nothing is started or evicted for nobody."""
        mold = self.molds[record.home]
        while record.claims > number:
            record.claims -= 1
            mold.claims.remove(record.function.id)
            if not mold.claims:  # what is ready was waited for by nobody who is still here
                for box in mold.generic.values():
                    box.start = "generic"

    def _claim(self, record: FunctionRecord, number: int, now: float) -> list[Command]:
        if number <= 0:
            return []
        self._settle(record, now)
        mold = self.molds[record.home]
        mold.used_at = now
        record.claims += number
        for _ in range(number):
            mold.claims.append(record.function.id)
            mold.rate.note(now)
        self.misses += min(number, max(0, len(mold.claims) - len(mold.generic)))
        self._look_at(mold)
        return self._start_where_needed(now)

    def _keep_min_scale(self, record: FunctionRecord, now: float) -> list[Command]:
        if now < record.broken_until:
            return []
        missing = record.function.spec.min_scale - len(record.sandboxes) - record.claims
        generic = len(self.molds[record.function.mold].generic)
        room = self.sandboxes_max - len(self.sandboxes) + generic  # it evicts nobody
        return self._claim(record, min(missing, room), now)

    def _look_at(self, mold: MoldRecord) -> None:
        """Something has changed: it may lack a start, a load or a zygote now."""
        whose = mold.mold.namespace or str(mold.mold)  # what tenants share stands by itself
        self._needy.setdefault(whose, OrderedDict())[mold.mold] = mold

    def _start_where_needed(self, now: float) -> list[Command]:
        """Load and start what is lacking, while there is a turn for it."""
        commands: list[Command] = []
        waiting = dict.fromkeys(self._needy)  # in the order in which they came
        while waiting:
            tenant = min(waiting, key=self._turns.under_way)
            molds = self._needy[tenant]
            mold = next(iter(molds.values()))
            step = self._step(mold, now)
            if step is None:
                del waiting[tenant]
            elif step:
                commands += step
                molds.move_to_end(mold.mold)
            else:
                del molds[mold.mold]
                if not molds:
                    del self._needy[tenant], waiting[tenant]
        return commands

    def _step(self, mold: MoldRecord, now: float) -> list[Command] | None:
        """One thing that *mold* lacks; [] when it lacks nothing, None when it is not its turn."""
        zygote = self._keep_zygote(mold, now)
        if zygote:
            return zygote
        is_turn = zygote is not None
        if mold.generic and mold.claims:
            load = self._load_next(mold, now)  # to start more would not get them loaded sooner
            return load if load or is_turn else None
        is_claimed = len(mold.claims) > mold.starting
        if now >= mold.retry_at and (is_claimed or self._lacks_generic(mold, now)):
            if mold.mold.function and not mold.zygote:
                pass  # it is for its zygote to fork them
            elif (tenant := self._starter(mold, is_claimed, now)) is None:
                is_turn = False
            elif started := self._start(mold, is_claimed, tenant, now):
                return started
            elif is_claimed:
                self._cramped[mold.mold] = mold
        return [] if is_turn else None

    def _starter(self, mold: MoldRecord, is_claimed: bool, now: float) -> str | None:
        """Whose turn it is to start one for *mold*: in one that tenants share, a claimant's."""
        weight, tenants = _weight(mold), [mold.mold.namespace]
        if is_claimed and not mold.mold.namespace:
            next_ones = islice(mold.claims, mold.starting, mold.starting + CLAIMS_LOOKED_AT)
            tenants = [self.functions[id_].function.namespace for id_ in next_ones]
        return next((t for t in tenants if self._turns.may(t, weight, now)), None)

    def _load_next(self, mold: MoldRecord, now: float) -> list[Command] | None:
        """Load the first function that has a claim on *mold*, and its turn; as `_step` answers."""
        is_turn = True
        for at, id_ in enumerate(islice(mold.claims, CLAIMS_LOOKED_AT)):
            record = self.functions[id_]
            tenant = record.function.namespace
            weight = PRELOADED_WEIGHT if mold.mold.function else record.load_weight
            weight = 0.0 if mold.mold.container else weight
            # a sandbox is ready for it: its own starts do not keep it from the first load
            if weight and self._loads[tenant] and not self._turns.may(tenant, weight, now):
                is_turn = False
                continue
            if record.slots is None and record.loading >= self._unknown_loads_max:
                continue
            del mold.claims[at]
            record.claims -= 1
            _, box = mold.generic.popitem()
            self._move(box, Phase.LOADING)
            box.function, box.since = record.function, now
            self._begin_work(box, tenant, weight, now)
            self._loads[tenant] += weight > 0
            record.sandboxes[box.id] = box
            record.loading += 1
            behind = self._turns.wants_more(tenant, now)
            return [Specialize(box.id, record.function, behind)]
        if not is_turn:
            return None
        self._cramped[mold.mold] = mold  # the other molds of the tenant need not wait for it
        return []

    def _lacks_generic(self, mold: MoldRecord, now: float) -> bool:
        if mold.warming and not (mold.zygote or mold.zygote_failures):
            return False  # forking what is kept ready costs less, and nobody waits for it
        have = mold.starting + len(mold.generic) - len(mold.claims)
        return have < self._target(mold, now)

    def _begin_work(
        self, worker: SandboxRecord | ZygoteRecord, tenant: str, weight: float, now: float
    ) -> None:
        if weight:
            worker.work = tenant, weight
            self._turns.begin(tenant, weight, now)

    def _end_work(self, worker: SandboxRecord | ZygoteRecord) -> None:
        """Its start or load is over: others may have their turn."""
        if worker.work is None:
            return
        tenant, weight = worker.work
        worker.work = None
        self._turns.end(tenant, weight)
        if isinstance(worker, SandboxRecord) and worker.phase is Phase.LOADING:
            self._loads[tenant] -= 1
            if not self._loads[tenant]:
                del self._loads[tenant]

    def _end_fork(self, box: SandboxRecord) -> None:
        """It is up, or dead."""
        if box.zygote is not None and box.zygote in self.zygotes:
            self.zygotes[box.zygote].forking -= 1

    def _start(self, mold: MoldRecord, claimed: bool, tenant: str, now: float) -> list[Command]:
        """Start one for *mold*; nothing when there is no room."""
        commands: list[Command] = []
        if len(self.sandboxes) >= self.sandboxes_max:
            victim = self._victim(mold) if claimed else None
            if victim is None:
                return []
            commands.append(self._evict(victim))
        return [*commands, self._create(mold, claimed, tenant, now)]

    def _use_room(self, now: float) -> list[Command]:
        """A sandbox fell idle: in a full pool that is what a claim has waited for."""
        self._look_at_cramped()
        is_full = len(self.sandboxes) >= self.sandboxes_max
        return self._start_where_needed(now) if is_full else []

    def _look_at_cramped(self) -> None:
        """There may be room now for those that found none."""
        while self._cramped:
            _, mold = self._cramped.popitem()
            self._look_at(mold)

    def _is_used(self, mold: MoldRecord, now: float) -> bool:
        """Whether it is to be kept ready; of those that pass a while longer: more may come."""
        is_passing = mold.mold.steps or mold.mold.batch
        is_awaited = is_passing and now - mold.used_at < PASSING_IDLE_S
        return bool(mold.functions or mold.pinned or is_awaited)

    def _target(self, mold: MoldRecord, now: float) -> int:
        if not self._is_used(mold, now) or self.is_short_of_memory or mold.mold.function:
            return 0
        if mold.mold.batch or mold.mold.container:
            return 0  # nobody waits for it, or it is made for who does
        start_s = mold.start_s or DEFAULT_START_S
        rate = mold.rate.per_s(now)
        return autoscale.desired_generic(rate, start_s, mold.least, self.generic_max)

    def _create(self, mold: MoldRecord, claimed: bool, tenant: str, now: float) -> Create:
        box = SandboxRecord(SandboxId(f"sb-{next(self._numbers)}"), mold.mold, now)
        self.sandboxes[box.id] = box
        mold.starting += 1
        self._begin_work(box, tenant, _weight(mold), now)
        mold.used_at = now
        if zygote := mold.least_busy():
            zygote.forks += 1
            zygote.forking += 1
            zygote.used_at = now
            box.zygote = zygote.id
        behind = self._turns.wants_more(tenant, now)
        return Create(box.id, mold.mold, claimed, box.zygote, behind)

    def _keep_zygote(self, mold: MoldRecord, now: float) -> list[Command] | None:
        """Have one while it is of use, and a fresh one in time; None when it is not its turn."""
        if not mold.mold.namespace:
            return []
        limits, current = self.zygote_limits, mold.zygote
        is_needed = self._is_used(mold, now) or mold.claims
        is_spare = self.is_short_of_memory and mold.mold.function
        idle_s = SPARE_IDLE_S if is_spare else limits.idle_s
        if not is_needed or (not mold.claims and now - mold.used_at >= idle_s):
            return self._let_go(current) if current else []
        for spare in mold.more.values():
            if self.zygote_limits.is_worn(spare, now) or now - spare.used_at >= SPARE_IDLE_S:
                return self._let_go(spare)
        freest = mold.least_busy()
        is_narrow = (
            freest is not None
            and freest.forking >= limits.at_once
            and len(mold.more) + 1 < ZYGOTES_MAX
            and not mold.mold.function  # another would have to import it as well
        )
        is_wanted = current is None or self.zygote_limits.is_worn(current, now) or is_narrow
        if mold.warming or now < mold.zygote_retry_at or not is_wanted:
            return []
        if self.is_short_of_memory:
            if user := self._user(mold):
                self._settle(user, now)  # what waits for it here must not wait for memory
            return []
        return self._warm_own(mold, now) if mold.mold.function else [self._warm(mold, now)]

    def _warm(self, mold: MoldRecord, now: float) -> Warm:
        zygote = ZygoteRecord(SandboxId(f"sb-z{next(self._numbers)}"), mold.mold, now)
        self.zygotes[zygote.id] = mold.warming = zygote
        return Warm(zygote.id, mold.mold)

    def _warm_own(self, mold: MoldRecord, now: float) -> list[Command] | None:
        """A function's zygote: forked from its environment's, once that is there."""
        base = self.molds[structs.replace(mold.mold, function="")]
        user = self._user(mold)
        if base.zygote is None or user is None or now < user.broken_until:
            base.used_at = now
            self._look_at(base)
            return []
        if not self._turns.may(mold.mold.namespace, START_WEIGHT, now):
            return None
        warm = self._warm(mold, now)
        self._begin_work(self.zygotes[warm.zygote], mold.mold.namespace, START_WEIGHT, now)
        return [structs.replace(warm, function=user.function, parent=base.zygote.id)]

    def _user(self, mold: MoldRecord) -> FunctionRecord | None:
        """The function whose own mold this is, unless it has another version by now."""
        record = self.functions.get(FunctionId(mold.mold.function.rpartition("@")[0]))
        return record if record is not None and record.own_mold == mold.mold else None

    def _has_zygote(self, mold: MoldRecord, now: float) -> bool:
        """Whether it has a zygote, or is about to get its first."""
        if mold.zygote or mold.zygote_failures or not mold.mold.namespace:
            return mold.zygote is not None
        can_warm = now >= mold.zygote_retry_at and not self.is_short_of_memory
        return mold.warming is not None or can_warm

    def _zygote_changed(self, mold: MoldRecord, now: float) -> None:
        """Claims go to where they are answered soonest now."""
        self._look_at(mold)
        if user := self._user(mold):
            self._settle(user, now)
            return
        for own in list(self.molds.values()):
            if own.mold.function and structs.replace(own.mold, function="") == mold.mold:
                self._look_at(own)
                if user := self._user(own):
                    self._settle(user, now)

    def _settle(self, record: FunctionRecord, now: float) -> None:
        """Have it make its claims, and move those that it has, to its own mold if that can do."""
        home = record.function.mold
        if record.once:
            own = self.molds[record.own_mold]
            is_coming = self._has_zygote(own, now) and self._has_zygote(self.molds[home], now)
            if own.zygote or is_coming:
                home = own.mold
        if home == record.home:
            return
        claims = record.claims
        self._keep_claims(record, 0)
        record.home, record.claims = home, claims
        self.molds[home].claims.extend([record.function.id] * claims)
        self._look_at(self.molds[home])

    def _initialize(self, record: FunctionRecord, *, once: bool, why: str, now: float) -> None:
        """From now on it has a zygote of its own, or has none."""
        if once and not record.once:
            self._mold(record.own_mold).functions += 1
        was_once, record.once, record.once_why = record.once, once, why
        self._settle(record, now)
        if was_once and not once:
            self._leave_mold(record.own_mold)

    def _weigh_import(
        self, record: FunctionRecord, import_s: float, leftovers: str, now: float
    ) -> None:
        """Whether it is worth a zygote, and can have one."""
        may_fork = record.function.mold.namespace and record.function.mold.network != "host"
        if record.function.spec.initialize != "auto" or not may_fork:
            return
        if record.once or record.is_unfit:
            return
        limit_s = self.zygote_limits.once_s
        took = f"its import took {import_s:.3g} s"
        if import_s < limit_s:
            self._initialize(record, once=False, why=f"{took}, under {limit_s:g}", now=now)
        elif leftovers:
            self._initialize(record, once=False, why=f"{took}, but left {leftovers}", now=now)
        else:
            self._initialize(record, once=True, why=took, now=now)
            own = self.molds[record.own_mold]
            own.used_at = now  # at once, so that the next start finds it
            self._look_at(own)

    def _let_go(self, zygote: ZygoteRecord) -> list[Command]:
        del self.zygotes[zygote.id]
        self.molds[zygote.mold].drop(zygote)
        return [Retire(zygote.id)]

    def _start_failed(self, box: SandboxRecord, now: float) -> list[Command]:
        """Leave alone for a while what failed: the zygote, if one was asked, else the mold."""
        mold = self.molds[box.mold]
        if box.zygote is not None:
            zygote = self.zygotes.get(box.zygote)
            if zygote is None:
                return []  # the first of its sandboxes that failed has told
            mold.zygote_failures += 1
            mold.zygote_retry_at = now + autoscale.backoff_s(mold.zygote_failures)
            commands = self._let_go(zygote)
            self._zygote_changed(mold, now)
            return commands
        if now >= mold.retry_at:  # those that were started together count once
            mold.failures += 1
            mold.retry_at = now + autoscale.backoff_s(mold.failures)
        return []

    def _victim(self, claimant: MoldRecord) -> SandboxRecord | None:
        """The idle one of least value, else a generic one of another mold, else a minScale's."""
        if victim := self._shelf.least():
            return victim
        for mold in self.molds.values():
            if mold is not claimant and len(mold.generic) > len(mold.claims):
                return next(iter(mold.generic.values()))
        return self._shelf.last_resort()

    def _evict(self, box: SandboxRecord) -> Destroy:
        self._shelf.evicted(box)
        record = self.functions[box.function.id] if box.function else None
        done = self._destroy(box, "evicted")
        if record is not None and not record.sandboxes:
            record.uses = 0
        return done

    def _shed(self) -> list[Command]:
        """Some of what is idle, the least valuable first."""
        commands: list[Command] = []
        for _ in range(math.ceil(len(self._shelf) * SHED_SHARE)):
            box = self._shelf.least()
            if box is None or box.value == math.inf:
                break
            commands.append(self._evict(box))
        return commands

    def _reap(self, now: float) -> list[Command]:
        commands: list[Command] = []
        for box in self._shelf.due(now):
            assert box.function is not None
            record = self.functions[box.function.id]
            if len(record.sandboxes) <= record.function.spec.min_scale:
                self._shelf.keep(box, record)
            else:
                commands.append(self._destroy(box, "reaped"))
        return commands

    def _trim(self, mold: MoldRecord, now: float) -> list[Command]:
        """End one surplus generic sandbox at a time; forget a mold that nobody uses."""
        if len(mold.generic) - len(mold.claims) > self._target(mold, now):
            return [self._destroy(next(iter(mold.generic.values())), "surplus")]
        is_used = self._is_used(mold, now) or mold.claims
        if not (is_used or mold.starting or mold.generic or mold.zygote or mold.warming):
            del self.molds[mold.mold]
        return []

    # ---- moves --------------------------------------------------------------------------------

    def _move(self, box: SandboxRecord, phase: Phase) -> None:
        assert phase in NEXT[box.phase], f"{box.id}: {box.phase} -> {phase}"
        box.phase = phase

    def _rest(self, box: SandboxRecord, record: FunctionRecord, now: float) -> None:
        """Become idle: last in the order of reaping, first in the order of use."""
        self._move(box, Phase.IDLE)
        box.since = now
        record.open.pop(box.id, None)
        record.idle[box.id] = box
        self._shelf.put(box, record)

    def _leave_idle(self, box: SandboxRecord, record: FunctionRecord) -> None:
        if record.idle.pop(box.id, None) is not None:
            self._shelf.take(box, record)

    def _outdate(self, record: FunctionRecord, reason: str) -> list[Command]:
        """Idle sandboxes end now, the others when they have finished."""
        commands: list[Command] = []
        for box in list(record.sandboxes.values()):
            is_waiting = box.phase is Phase.LOADING and box.mold.container
            if box.phase is Phase.IDLE or is_waiting:  # a pod may wait for room for long
                commands.append(self._destroy(box, reason, record))
            else:
                box.stale = True
        return commands

    def _destroy(
        self, box: SandboxRecord, reason: str, record: FunctionRecord | None = None
    ) -> Destroy:
        mold = self.molds.get(box.mold)
        if mold is not None:
            mold.generic.pop(box.id, None)
            if box.phase is Phase.STARTING:
                mold.starting -= 1
                self._end_fork(box)
            self._look_at(mold)
        self._end_work(box)
        self._look_at_cramped()
        if box.function is not None and not box.stale:
            record = record or self.functions[box.function.id]
            record.sandboxes.pop(box.id, None)
            record.open.pop(box.id, None)
            record.loading -= box.phase is Phase.LOADING
            self._leave_idle(box, record)
        self._move(box, Phase.DEAD)
        del self.sandboxes[box.id]
        return Destroy(box.id, reason)

    def _adopt(self, record: FunctionRecord, now: float) -> FunctionRecord:
        function = record.function
        self.functions[function.id] = record
        record.load_weight = self._unknown_weight
        if function.mold.steps:
            record.once, record.once_why = False, "its folders are for one sandbox"
        elif function.spec.initialize == "each":
            record.once, record.once_why = False, "it is declared so"
        elif not function.mold.namespace:
            record.once, record.once_why = False, "its sandboxes are started, not forked"
        elif function.mold.network == "host":  # a zygote is less confined than its forks are
            record.once, record.once_why = False, "its network is the host's"
        elif function.spec.initialize == "once":
            self._initialize(record, once=True, why="it is declared so", now=now)
        if function.spec.min_scale:
            self._minimums[function.id] = record
        else:
            self._minimums.pop(function.id, None)
        return record

    def _mold(self, mold: Mold) -> MoldRecord:
        return self.molds.setdefault(mold, MoldRecord(mold, 0))

    def _leave_molds(self, record: FunctionRecord) -> None:
        """This version claims nothing any more."""
        self._keep_claims(record, 0)
        self._leave_mold(record.function.mold)
        if record.once:
            self._leave_mold(record.own_mold)

    def _leave_mold(self, mold: Mold) -> None:
        record = self.molds.get(mold)
        if record is not None:
            record.functions -= 1
            self._look_at(record)
