"""Which task of a job runs next, and what the end of one means: Kubernetes' Indexed Job. Pure.

The rules are those of `batch/v1` with `completionMode: Indexed`: an index succeeds once; failures
are counted for the job (`backoffLimit`) or for each index (`backoffLimitPerIndex`); rules may
make a failure count, not count, fail its index or fail the job; and a job may be complete before
all of its indices are. What failed on our side is tried again and never counts.

What has happened since the last `drain` is one `Segment`; all of a job's segments in their order
make its state again (`replay`), and so does a `Snapshot` with those after it.
"""

from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush
from typing import Any, Final, Literal

from msgspec import Struct

from dayfly_pool.batch.indices import IndexSet, parse
from dayfly_pool.batch.model import FAILED_OF_MANY_MAX, MANY, Action, FailureRule, JobSpec
from dayfly_pool.errors import BadInput
from dayfly_pool.models import CANNOT_RUN
from dayfly_pool.retry import KILLS_MAX, THROTTLE_FIRST_S, THROTTLE_MAX_S, backoff_s

RETRYING_MAX: Final = 10_000
"""With so many indices waiting to be tried again, no new one is begun."""

BACKOFF_MAX_S: Final = 360.0
MESSAGE_CHARACTERS_MAX: Final = 1024
FAILURES_TOLD_MAX: Final = 1000
"""Of one job: so many failed tasks are kept with what they said."""

End = Literal["Complete", "Failed", "Cancelled"]


class Verdict(Struct, frozen=True, array_like=True):
    """How a job has ended, and why (Kubernetes' reasons where it has them)."""

    state: End
    reason: str = ""
    message: str = ""


class Task(Struct, frozen=True, array_like=True):
    """One index to be run. *retry* is how many failures of it have counted."""

    index: int
    retry: int = 0


class TaskFailed(Struct, frozen=True, array_like=True):
    """Why a task did not succeed. *is_ours* when no user code can be blamed."""

    kind: str
    message: str = ""
    exit_code: int | None = None
    is_ours: bool = False
    was_killed: bool = False


class Told(Struct, frozen=True, array_like=True):
    """What is kept of a failure for people."""

    index: int
    retry: int
    at: float
    kind: str
    message: str


class Segment(Struct, array_like=True):
    """What has happened to a job between two commits."""

    succeeded: list[tuple[int, int]] = []
    failed: list[tuple[int, int]] = []
    failures: int = 0
    """Counted since then."""

    tries: dict[int, int] = {}
    """The counted failures of indices that are to be tried again."""

    told: list[Told] = []
    verdict: Verdict | None = None


class Snapshot(Struct, array_like=True):
    """All that `Segment`s have said so far."""

    succeeded: bytes
    failed: bytes
    failures: int
    tries: dict[int, int]
    told: list[Told]
    verdict: Verdict | None = None


class _Counts:
    """How far one rule of a success policy is."""

    def __init__(self, wanted: IndexSet | None, count: int | None) -> None:
        self._wanted = wanted
        self._needed = count if count is not None else len(wanted or ())
        self._found = 0

    def add(self, index: int) -> bool:
        """*index* has succeeded; whether the rule is met now."""
        if self._wanted is None or index in self._wanted:
            self._found += 1
        return self._found >= self._needed


class Tasks:
    """The indices of one job. Times are Unix seconds."""

    def __init__(self, spec: JobSpec, indices: IndexSet, most: int) -> None:
        self._spec, self._indices, self._most = spec, indices, most
        self.total = len(indices)
        self.succeeded, self.failed = IndexSet(most), IndexSet(most)
        self.failures = 0
        self.running: set[int] = set()
        self.told: list[Told] = []
        self.verdict: Verdict | None = None
        self._tries: dict[int, int] = {}
        self._again: list[tuple[float, int]] = []
        self._waits: set[int] = set()
        """Those in `_again`."""

        self._unlucky: dict[int, int] = {}
        """Failures in a row that were not the task's own, or are not to count."""

        self._fresh = iter(indices)
        self._success = [_rule(rule.succeeded_indexes, rule.succeeded_count) for rule in _met(spec)]
        self._new = Segment()

    def __repr__(self) -> str:
        done = f"{len(self.succeeded)} succeeded, {len(self.failed)} failed"
        return f"<Tasks {done}, {len(self.running)} running of {self.total} {self.verdict or ''}>"

    # ---- what is to be run --------------------------------------------------------------------

    def take(self, now: float) -> Task | None:
        """The next one; it is running now. None when there is none to be begun."""
        if self.verdict is not None:
            return None
        if self._again and self._again[0][0] <= now:
            _, index = heappop(self._again)
            self._waits.discard(index)
            return self._begin(index)
        if len(self._again) >= RETRYING_MAX:
            return None
        for index in self._fresh:
            if not self._is_known(index):
                return self._begin(index)
        return None

    def _begin(self, index: int) -> Task:
        self.running.add(index)
        return Task(index, self._tries.get(index, 0))

    def _is_known(self, index: int) -> bool:
        is_over = index in self.succeeded or index in self.failed
        return is_over or index in self._waits or index in self.running

    @property
    def due_at(self) -> float | None:
        """When the next one that failed is to be tried again."""
        return self._again[0][0] if self._again else None

    # ---- what has happened --------------------------------------------------------------------

    def succeed(self, index: int) -> None:
        """A task has done its work."""
        self.running.discard(index)
        if self.verdict is not None or not self.succeeded.add(index):
            return
        _extend(self._new.succeeded, index)
        self._over(index)
        if any([rule.add(index) for rule in self._success]):
            self.end(Verdict("Complete", "SuccessPolicy", "enough of its indices succeeded"))
        else:
            self._judge()

    def fail(self, index: int, why: TaskFailed, now: float, draw: float) -> None:
        """A task has not done its work. *draw* is random, from [0, 1)."""
        self.running.discard(index)
        if self.verdict is not None:
            return
        unlucky = self._unlucky.get(index, 0)
        if why.is_ours or (why.was_killed and unlucky < KILLS_MAX):
            self._unlucky[index] = unlucky + 1
            self._try_again(index, now + backoff_s(THROTTLE_FIRST_S, THROTTLE_MAX_S, unlucky, draw))
            return
        action = self._action(why)
        tries = self._tries.get(index, 0)
        if len(self.told) < FAILURES_TOLD_MAX:
            message = why.message[:MESSAGE_CHARACTERS_MAX]
            self._tell(Told(index, tries, now, why.kind, message))
        if action in ("FailJob", CANNOT_RUN):
            self._count(index, tries)
            what = f"index {index}: {why.kind}: {why.message}"[:MESSAGE_CHARACTERS_MAX]
            reason = "FailurePolicy" if action == "FailJob" else CANNOT_RUN
            self.end(Verdict("Failed", reason, what))
        elif action == "FailIndex":
            self._count(index, tries)
            self._fail_index(index)
        elif action == "Ignore":
            self._unlucky[index] = unlucky + 1
            self._try_again(index, now + self._backoff_s(unlucky + 1))
        else:
            self._count(index, tries)
            self._after_counted(index, tries + 1, now)

    def _after_counted(self, index: int, tries: int, now: float) -> None:
        """Kubernetes' order: first the job's limit, then the index's."""
        if self.failures > self._spec.failures_max:
            what = f"{self.failures} failures, backoffLimit {self._spec.failures_max}"
            self.end(Verdict("Failed", "BackoffLimitExceeded", what))
            return
        per_index = self._spec.backoff_limit_per_index
        if per_index is not None and tries > per_index:
            self._fail_index(index)
            return
        self._new.tries[index] = tries
        self._try_again(index, now + self._backoff_s(tries))

    def give_back(self, index: int, now: float) -> None:
        """It was stopped by us before it ended: it runs again, and nothing is counted."""
        self.running.discard(index)
        if self.verdict is None:
            self._try_again(index, now)

    def end(self, verdict: Verdict) -> None:
        """Whatever still runs, this is how the job has ended."""
        if self.verdict is None:
            self.verdict = self._new.verdict = verdict

    def _action(self, why: TaskFailed) -> Action | Literal["CannotRun"]:
        policy = self._spec.failure_policy
        for rule in policy.rules if policy is not None else ():
            if _matches(rule, why):
                return rule.action
        return CANNOT_RUN if why.kind == CANNOT_RUN else "Count"

    def _count(self, index: int, tries: int) -> None:
        self.failures += 1
        self._new.failures += 1
        self._tries[index] = tries + 1

    def _fail_index(self, index: int) -> None:
        self.failed.add(index)
        _extend(self._new.failed, index)
        self._over(index)
        most = self._spec.max_failed_indexes
        if most is not None and len(self.failed) > most:
            what = f"{len(self.failed)} indices failed, maxFailedIndexes {most}"
            self.end(Verdict("Failed", "MaxFailedIndexesExceeded", what))
        else:
            self._judge()

    def _over(self, index: int) -> None:
        self._unlucky.pop(index, None)
        self._new.tries.pop(index, None)
        self._tries.pop(index, None)

    def _judge(self) -> None:
        if len(self.succeeded) + len(self.failed) < self.total:
            return
        if self.failed:
            what = f"{len(self.failed)} of {self.total} indices failed"
            self.end(Verdict("Failed", "FailedIndexes", what))
        else:
            self.end(Verdict("Complete", "CompletionsReached"))

    def _try_again(self, index: int, at: float) -> None:
        self._waits.add(index)
        heappush(self._again, (at, index))

    def _backoff_s(self, number: int) -> float:
        """Exponential, as Kubernetes does it, from the job's own first wait."""
        return float(min(BACKOFF_MAX_S, self._spec.backoff_seconds * 2.0 ** min(number - 1, 60)))

    def _tell(self, told: Told) -> None:
        self.told.append(told)
        self._new.told.append(told)

    # ---- the journal --------------------------------------------------------------------------

    @property
    def has_news(self) -> int:
        """Of how many indices something is to be written down, about."""
        new = self._new
        lists = len(new.succeeded) + len(new.failed) + len(new.tries) + len(new.told)
        return lists + (new.verdict is not None)

    def drain(self) -> Segment:
        """What has happened since this was asked last."""
        new, self._new = self._new, Segment()
        new.succeeded, new.failed = _merged(new.succeeded), _merged(new.failed)
        return new

    def snapshot(self) -> Snapshot:
        """All that was drained; nothing else may be under way to the journal."""
        tries = {i: n for i, n in self._tries.items() if n}
        packed = self.succeeded.packed(), self.failed.packed()
        return Snapshot(*packed, self.failures, tries, list(self.told), self.verdict)

    def replay(self, snapshot: Snapshot | None, segments: Iterable[Segment], now: float) -> None:
        """Be what the journal says. Raises `ValueError` when that is not of this job."""
        if snapshot is not None:
            self.succeeded.unpack(snapshot.succeeded)
            self.failed.unpack(snapshot.failed)
            self.failures, self._tries = snapshot.failures, dict(snapshot.tries)
            self.told, self.verdict = list(snapshot.told), snapshot.verdict
        for segment in segments:
            for low, high in segment.succeeded:
                self._check(high)
                self.succeeded.add_range(low, high)
            for low, high in segment.failed:
                self._check(high)
                self.failed.add_range(low, high)
            self.failures += segment.failures
            self._tries |= segment.tries
            self.told += segment.told
            self.verdict = self.verdict or segment.verdict
        over = [i for i in self._tries if i in self.succeeded or i in self.failed]
        for index in over:
            del self._tries[index]
        self._again = [(now, index) for index in self._tries]
        self._waits = set(self._tries)
        heapify(self._again)
        self._fresh = iter(self._indices.without(self.succeeded, self.failed))
        if self._success:
            self._recount()
        if self.verdict is None and self.total:
            self._judge()

    def _check(self, index: int) -> None:
        if index > self._most:
            raise ValueError(f"index {index} in the journal of a job up to {self._most}")

    def _recount(self) -> None:
        for index in self.succeeded:
            if any([rule.add(index) for rule in self._success]):
                what = "enough of its indices succeeded"
                self.end(Verdict("Complete", "SuccessPolicy", what))
                return


def check(spec: JobSpec, indices: IndexSet) -> None:
    """What the model alone cannot see. Raises `BadInput`."""
    total = len(indices)
    most = spec.max_failed_indexes
    if most is not None and most > total:
        raise BadInput(f"spec.maxFailedIndexes: {most} of {total} indices cannot fail")
    if total > MANY and most is not None and most > FAILED_OF_MANY_MAX:
        raise BadInput(f"spec.maxFailedIndexes: at most {FAILED_OF_MANY_MAX} of over {MANY}")
    if spec.min_count > total:
        raise BadInput(f"spec.minCount: {spec.min_count} tasks together, but there are {total}")
    for number, rule in enumerate(_met(spec)):
        where = f"spec.successPolicy.rules[{number}]"
        wanted = None
        if rule.succeeded_indexes is not None:
            wanted = parse(rule.succeeded_indexes)
            missing = next((index for index in wanted if index not in indices), None)
            if missing is not None:
                raise BadInput(f"{where}.succeededIndexes: {missing} is no index of this job")
        limit = total if wanted is None else len(wanted)
        if rule.succeeded_count is not None and rule.succeeded_count > limit:
            raise BadInput(f"{where}.succeededCount: {rule.succeeded_count} of {limit} indices")


def _met(spec: JobSpec) -> tuple[Any, ...]:
    return spec.success_policy.rules if spec.success_policy is not None else ()


def _rule(indexes: str | None, count: int | None) -> _Counts:
    return _Counts(None if indexes is None else parse(indexes), count)


def _matches(rule: FailureRule, why: TaskFailed) -> bool:
    if rule.on_exit_codes is not None:
        codes = rule.on_exit_codes
        if why.exit_code is None or why.exit_code == 0:
            return False
        return (why.exit_code in codes.values) == (codes.operator == "In")
    kinds = rule.on_kinds
    return kinds is not None and (why.kind in kinds.values) == (kinds.operator == "In")


def _extend(ranges: list[tuple[int, int]], index: int) -> None:
    """Add *index*, to the last range if it is its neighbour."""
    if ranges and ranges[-1][1] == index - 1:
        ranges[-1] = ranges[-1][0], index
    else:
        ranges.append((index, index))


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return list(_neighbours(sorted(ranges)))


def _neighbours(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    low = high = -2
    for next_low, next_high in ranges:
        if next_low == high + 1:
            high = next_high
            continue
        if low >= 0:
            yield low, high
        low, high = next_low, next_high
    if low >= 0:
        yield low, high
