"""The pool's metrics: base units, bounded labels.

Counted in plain dictionaries and lists, without locks, and turned into Prometheus' families when
somebody asks: everything here runs on the event loop's thread.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

import dayfly
from dayfly_pool.errors import StoreFailed
from dayfly_pool.models import Failure, FunctionId, Outcome, Timing
from dayfly_pool.queue import Queue
from dayfly_pool.state import PoolState

BUCKETS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0)
PHASES: Final = ("queue", "create", "specialize", "handler")


class Histogram:
    """Observations in fixed buckets, in seconds."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """One more."""
        self.counts[bisect_left(BUCKETS, value)] += 1
        self.sum += value

    def cumulated(self) -> list[tuple[str, float]]:
        """(upper bound, number at most that), as Prometheus wants them."""
        pairs, total = [], 0
        for bound, number in zip((*map(str, BUCKETS), "+Inf"), self.counts, strict=True):
            total += number
            pairs.append((bound, float(total)))
        return pairs


class Metrics(Collector):
    """Counts what happens; the state is looked at when somebody asks."""

    def __init__(self, state: PoolState) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._state = state
        self._invocations: Counter[tuple[FunctionId, str]] = Counter()
        self._starts: Counter[str] = Counter()
        self._destroyed: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self.loop_lag_s = 0.0
        """How late the event loop was when somebody looked last."""

        self._created = 0
        self._log_bytes = 0
        self._phases = {phase: Histogram() for phase in PHASES}

    def ended(self, function: FunctionId, outcome: Outcome, timing: Timing) -> None:
        """One invocation has its outcome."""
        what = outcome.kind if isinstance(outcome, Failure) else "Success"
        self._invocations[function, what] += 1
        self._starts[timing.start] += 1
        phases = self._phases
        phases["queue"].observe(timing.queue_s)
        phases["handler"].observe(timing.handler_s)
        if timing.specialize_s is not None:
            phases["specialize"].observe(timing.specialize_s)
        if timing.create_s is not None:
            phases["create"].observe(timing.create_s)

    def refused(self, error: type[Exception]) -> None:
        """One invocation was not taken."""
        self._refused[error.__name__] += 1

    def created(self) -> None:
        """A sandbox is being started."""
        self._created += 1

    def destroyed(self, reason: str) -> None:
        """A sandbox ended; *reason* is one of the state's few words."""
        self._destroyed[reason] += 1

    def log_dropped(self, number: int) -> None:
        """A guest threw away log bytes."""
        self._log_bytes += number

    def forget(self, function: FunctionId) -> None:
        """Drop the series of a deleted function."""
        for key in [key for key in self._invocations if key[0] == function]:
            del self._invocations[key]

    def collect(self) -> Iterable[Metric]:
        """Every family, as it is now."""
        yield _counter("invocations", "Ended", ("function", "outcome"), self._invocations)
        yield _counter("starts", "Invocations by kind of start", ("start",), self._starts)
        yield _counter("sandboxes_destroyed", "Sandboxes ended", ("reason",), self._destroyed)
        yield _counter("refused", "Invocations not taken", ("error",), self._refused)
        yield CounterMetricFamily("dayfly_sandboxes_created", "Sandboxes started", self._created)
        yield CounterMetricFamily("dayfly_log_dropped_bytes", "Over the rate", self._log_bytes)
        misses = self._state.misses
        yield CounterMetricFamily("dayfly_pool_misses", "Claims with nothing ready", misses)
        phases = HistogramMetricFamily("dayfly_phase_seconds", "By phase", labels=("phase",))
        for phase, histogram in self._phases.items():
            phases.add_metric((phase,), histogram.cumulated(), histogram.sum)
        yield phases
        yield GaugeMetricFamily("dayfly_loop_lag_seconds", "Of the event loop", self.loop_lag_s)
        build = GaugeMetricFamily("dayfly_build_info", "Constant 1", labels=("version",))
        build.add_metric((dayfly.__version__,), 1)
        yield build
        yield from _state_families(self._state)


class EventMetrics(Collector):
    """What the queue of events counts. *look* before the families are asked for."""

    def __init__(self, queue: Queue, registry: CollectorRegistry) -> None:
        self._queue = queue
        self._oldest: dict[FunctionId, float] = {}
        registry.register(self)

    async def look(self) -> None:
        """Ask the store what only it knows."""
        try:
            self._oldest = await self._queue.oldest()
        except StoreFailed:
            self._oldest = {}

    def collect(self) -> Iterable[Metric]:
        """Every family, as it is now."""
        queue = self._queue
        for name, text, number in (
            ("accepted", "Events that were new", queue.accepted),
            ("duplicates", "Events whose idempotency key was known", queue.duplicates),
            ("late_results", "Results of runs that had lost their lease", queue.late),
            ("redriven", "Dead events that wait again", queue.redriven),
        ):
            yield CounterMetricFamily(f"dayfly_events_{name}", text, number)
        ended = CounterMetricFamily(
            "dayfly_events_runs", "Runs by what they brought", labels=("function", "state")
        )
        for (function, state), number in list(queue.outcomes.items()):
            ended.add_metric((function, state.name.lower()), number)
        yield ended
        for name, text, values in (
            ("waiting", "Events that wait for room", queue.waiting),
            ("running", "Events that are being run", queue.running_now),
            ("oldest_seconds", "Age of the next waiting event", self._oldest),
        ):
            family = GaugeMetricFamily(f"dayfly_events_{name}", text, labels=("function",))
            for function, value in list(values.items()):
                family.add_metric((function,), value)
            yield family
        yield GaugeMetricFamily(
            "dayfly_events_store_up", "Whether events can be written", not queue.failure
        )


def _counter(
    name: str,
    text: str,
    labels: tuple[str, ...],
    counts: Counter[str] | Counter[tuple[FunctionId, str]],
) -> Metric:
    family = CounterMetricFamily(f"dayfly_{name}", text, labels=labels)
    for key, number in list(counts.items()):
        family.add_metric((key,) if isinstance(key, str) else key, number)
    return family


def _state_families(state: PoolState) -> Iterable[Metric]:
    boxes = GaugeMetricFamily("dayfly_sandboxes", "By phase", labels=("phase", "environment"))
    counts = Counter(
        (box.phase.value, box.mold.environment[:12]) for box in list(state.sandboxes.values())
    )
    for labels, number in counts.items():
        boxes.add_metric(labels, number)
    yield boxes
    zygotes = GaugeMetricFamily("dayfly_zygotes", "By state", labels=("state",))
    ready = sum(zygote.is_ready for zygote in state.zygotes.values())
    zygotes.add_metric(("ready",), ready)
    zygotes.add_metric(("warming",), len(state.zygotes) - ready)
    yield zygotes
    queues = GaugeMetricFamily("dayfly_queue", "Invocations waiting", labels=("function",))
    for record in list(state.functions.values()):
        if record.queue:
            queues.add_metric((record.function.id,), len(record.queue))
    yield queues
    yield GaugeMetricFamily("dayfly_waiting", "Invocations waiting", state.waiting)
