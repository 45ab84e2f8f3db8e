"""What runs count, for Prometheus."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from dayfly_pool.workflow.runs import Runs


class RunMetrics(Collector):
    """Reads *runs* when it is asked."""

    def __init__(self, runs: Runs, registry: CollectorRegistry) -> None:
        self._runs = runs
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """Every family, as it is now."""
        ended = CounterMetricFamily("dayfly_runs_ended", "Runs by their end", labels=("state",))
        for state, number in list(self._runs.ended.items()):
            ended.add_metric((state,), number)
        yield ended
        steps = CounterMetricFamily("dayfly_steps", "Attempts by their end", labels=("outcome",))
        for outcome, number in self._runs.steps_ended().items():
            steps.add_metric((outcome,), number)
        yield steps
        yield GaugeMetricFamily("dayfly_runs", "Runs under way here", self._runs.under_way)
