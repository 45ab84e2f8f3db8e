"""What jobs and their queues count, for Prometheus."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from dayfly_pool.batch.jobs import Jobs


class JobMetrics(Collector):
    """Reads *jobs* when it is asked."""

    def __init__(self, jobs: Jobs, registry: CollectorRegistry) -> None:
        self._jobs = jobs
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """Every family, as it is now."""
        tasks = CounterMetricFamily("dayfly_job_tasks", "Tasks by their end", labels=("outcome",))
        for outcome, number in self._jobs.tasks_ended().items():
            tasks.add_metric((outcome,), number)
        yield tasks
        ended = CounterMetricFamily("dayfly_jobs_ended", "Jobs by their end", labels=("state",))
        for state, number in list(self._jobs.ended.items()):
            ended.add_metric((state,), number)
        yield ended
        running = GaugeMetricFamily("dayfly_queue_tasks", "Places held", labels=("queue",))
        waiting = GaugeMetricFamily("dayfly_queue_waiting", "Jobs with none", labels=("queue",))
        share = GaugeMetricFamily("dayfly_queue_share", "Borrowed, weighed", labels=("queue",))
        for use in self._jobs.queues():
            running.add_metric((use.name,), use.held.get("tasks", 0))
            waiting.add_metric((use.name,), use.waiting)
            share.add_metric((use.name,), use.share)
        yield from (running, waiting, share)
