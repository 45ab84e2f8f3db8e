"""The declared triggers, kept running: schedules fire, and every other source has its pump."""

import asyncio
import importlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, cast

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dayfly_gateway.triggers.filters import Filter
from dayfly_gateway.triggers.pump import Counts, Pump
from dayfly_gateway.triggers.schedules import Schedules
from dayfly_gateway.triggers.source import Source
from dayfly_pool.errors import BadInput
from dayfly_pool.models import TriggerManifest, TriggerSpec, function_id
from dayfly_pool.service import Service
from dayfly_pool.store.declarations import StoredTrigger

log = logging.getLogger("dayfly.triggers")
LOOK_S: Final = 1.0
Named = tuple[str, str]
"""A trigger: its namespace and its name."""

WAITED_FOR: Final = ("cron", "webhook", "events")
"""Sources that nobody asks: what comes of them comes by itself."""


def adapter(kind: str) -> Any:
    """The module that speaks to brokers of that *kind*. Raises `BadInput` without its extra."""
    try:
        return importlib.import_module(f"dayfly_gateway.triggers.{kind}")
    except ImportError as error:
        raise BadInput(f"{kind} needs an extra ({error}): pip install 'dayfly[{kind}]'") from None


class Triggers(Collector):
    """Runs what *service* has declared and owns.

    *sent* tells what was sent to those that nobody asks.
    """

    def __init__(self, service: Service, sent: Callable[[], Mapping[Named, Counts]] = dict) -> None:
        self.schedules = Schedules(service)
        self._service, self._sent = service, sent
        self._pumps: dict[tuple[str, str], tuple[Pump, asyncio.Task[None]]] = {}
        self._changed = asyncio.Event()
        service.watch_triggers(self._look)
        service.pool.metrics.registry.register(self)

    def _look(self) -> None:
        self._changed.set()
        self.schedules.look_soon()

    async def declare(self, manifest: TriggerManifest) -> StoredTrigger:
        """Add or change a trigger. Raises `BadInput`, `FunctionNotFound`, and changes nothing."""
        spec, namespace = manifest.spec, manifest.metadata.namespace
        if spec.folder is not None and namespace in self._service.config.foreign_namespaces:
            raise BadInput(
                f"spec.folder is a folder of the server's own, and namespace {namespace!r} is"
                " foreign: no trigger of it reads one"
            )
        if spec.source not in WAITED_FOR:
            await asyncio.to_thread(adapter, spec.source)
        Filter(spec.filter)
        if (name := secret_of(spec)) is not None:
            await asyncio.to_thread(self._service.secrets.get, namespace, name)
        stored = await self.schedules.declare(manifest)
        self._changed.set()
        return stored

    async def delete(self, namespace: str, name: str) -> None:
        """Forget a trigger. Raises `TriggerNotFound`."""
        await self._service.delete_trigger(namespace, name)
        self._changed.set()

    async def run(self) -> None:
        """Keep them running, for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.schedules.run(), name="schedules")
            while True:
                self._changed.clear()
                await self._adjust(tasks)
                try:
                    async with asyncio.timeout(LOOK_S):
                        await self._changed.wait()
                except TimeoutError:
                    pass

    async def _adjust(self, tasks: asyncio.TaskGroup) -> None:
        """Have a pump for each trigger that is to have one, and no other."""
        wanted = {
            key: trigger
            for key, trigger in self._service.triggers.items()
            if trigger.spec.source not in WAITED_FOR
            and not trigger.spec.paused
            and self._service.owns(function_id(trigger.namespace, trigger.spec.function))
        }
        for key, (pump, task) in list(self._pumps.items()):
            if key not in wanted or wanted[key].spec != pump.trigger.spec:
                task.cancel()
                await asyncio.wait((task,))
                del self._pumps[key]
        for key in wanted.keys() - self._pumps.keys():
            trigger = wanted[key]
            pump = Pump(trigger, self._service.events, lambda trigger=trigger: self._make(trigger))  # type: ignore[misc]
            self._pumps[key] = pump, tasks.create_task(pump.run(), name=f"pump {'/'.join(key)}")

    def _make(self, trigger: StoredTrigger) -> Source:
        """A source for it, not open. Raises `PlatformError`."""
        spec = trigger.spec
        named = secret_of(spec)
        secret = self._service.secrets.get(trigger.namespace, named) if named else ""
        name = f"{trigger.namespace}_{trigger.name}"  # no two triggers have the same
        made = adapter(spec.source).Source(getattr(spec, spec.source), name, secret)
        return cast("Source", made)

    def view(self, trigger: StoredTrigger) -> dict[str, Any]:
        """A trigger as the API shows it."""
        status: dict[str, Any] = {"source": trigger.spec.source, "updated": trigger.updated}
        spec = msgspec.to_builtins(trigger.spec)
        if trigger.spec.source == "cron":
            status |= self.schedules.status(trigger)
        elif (found := self._pumps.get((trigger.namespace, trigger.name))) is not None:
            pump = found[0]
            status |= {
                "up": pump.is_up,
                "lag": pump.lag,
                "held": pump.held,
                "lastError": pump.error,
            }
            status |= _shown(pump.counts)
        elif trigger.spec.source in WAITED_FOR:
            status |= _shown(self._sent().get((trigger.namespace, trigger.name), Counts()))
        return {
            "apiVersion": "dayfly.dev/v1",
            "kind": "Trigger",
            "metadata": {"namespace": trigger.namespace, "name": trigger.name},
            "spec": {name: value for name, value in spec.items() if value is not None},
            "status": status,
        }

    def collect(self) -> Iterable[Metric]:
        """The metrics of those that have a pump, or are sent something."""
        pumps = [("/".join(key), pump) for key, (pump, _) in list(self._pumps.items())]
        counts = {"/".join(key): counts for key, counts in list(self._sent().items())}
        counts |= {trigger: pump.counts for trigger, pump in pumps}
        for name, text in (
            ("fetched", "Messages that sources gave out"),
            ("acknowledged", "Messages that are done with, and the source knows"),
            ("known", "Messages that came again and were not run again for it"),
            ("filtered", "Messages that the filter did not mean"),
            ("filter_errors", "Messages for which the filter had no value"),
            ("refused", "Messages that could be given to no function"),
            ("failures", "Errors of the source"),
        ):
            family = CounterMetricFamily(f"dayfly_trigger_{name}", text, labels=("trigger",))
            for trigger, counted in counts.items():
                family.add_metric((trigger,), getattr(counted, name))
            yield family
        up = GaugeMetricFamily("dayfly_trigger_up", "Whether it listens", labels=("trigger",))
        lag = GaugeMetricFamily(
            "dayfly_trigger_lag", "Messages that wait at the source", labels=("trigger",)
        )
        for trigger, pump in pumps:
            up.add_metric((trigger,), pump.is_up)
            if pump.lag is not None:
                lag.add_metric((trigger,), pump.lag)
        yield from (up, lag)


def secret_of(spec: TriggerSpec) -> str | None:
    """The name of the secret that its source needs, if any."""
    return getattr(getattr(spec, spec.source), "secret", None)


def _shown(counts: Counts) -> dict[str, int]:
    return {_camel(name): number for name, number in msgspec.to_builtins(counts).items()}


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.title() for word in rest)
