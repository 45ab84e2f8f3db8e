"""Schedules: a trigger that cannot fire says why, and costs the others nothing."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from dayfly_gateway.triggers import schedules as module
from dayfly_gateway.triggers.schedules import Schedules
from dayfly_pool.errors import StoreFailed
from dayfly_pool.models import Cron, Invocation, InvocationId, TriggerSpec
from dayfly_pool.store.declarations import StoredTrigger
from dayfly_pool.store.events import Accepted

NOW = 1_790_000_000.0
SOON_S = 5.0


class FakeService:
    """Has triggers and accepts what they make; *errors* says what that raises, by function."""

    def __init__(self, *triggers: StoredTrigger) -> None:
        self.triggers = {(each.namespace, each.name): each for each in triggers}
        self.owns: Callable[[str], bool] = lambda function: True
        self.errors: dict[str, Exception] = {}
        self.delays: dict[str, asyncio.Event] = {}
        self.accepted: list[str] = []
        self.events = self.queue = self

    async def accept(self, invocation: Invocation, **more: Any) -> Accepted:
        if invocation.function in self.errors:
            raise self.errors[invocation.function]
        if invocation.function in self.delays:
            await self.delays[invocation.function].wait()
        self.accepted.append(invocation.function)
        return Accepted(invocation.id)

    async def note_seen(self, trigger: StoredTrigger, seen: float, last: InvocationId) -> None:
        pass


def trigger(name: str, **cron: str) -> StoredTrigger:
    spec = TriggerSpec(function=name, cron=Cron(**{"schedule": "* * * * * *"} | cron))
    return StoredTrigger("default", name, spec, NOW, NOW - 1, InvocationId(""))


def schedules(service: FakeService) -> Schedules:
    return Schedules(service, lambda: NOW)  # type: ignore[arg-type]


def error(watched: Schedules, of: StoredTrigger) -> str:
    return str(watched.status(of)["lastError"])


@pytest.mark.parametrize(
    ("cron", "said"),
    [
        ({"schedule": "what is this"}, "cron.schedule"),
        ({"time_zone": "Mars/Base"}, "cron.timeZone"),
    ],
)
async def test_a_stored_schedule_that_is_none_any_more_says_so_and_the_others_fire(
    caplog: pytest.LogCaptureFixture, cron: dict[str, str], said: str
):
    """It was one for an older version, or on a machine with other time zones."""
    bad = trigger("bad", **cron)
    service = FakeService(bad, trigger("good"))
    watched = schedules(service)
    assert "next" not in watched.status(bad)
    for _ in range(3):
        await watched.look()

    assert set(service.accepted) == {"default/good"}
    assert said in error(watched, bad)
    assert [record.getMessage() for record in caplog.records] == ["a trigger cannot fire"]


async def test_a_defect_of_ours_over_one_trigger_is_logged_once_and_the_others_fire(
    caplog: pytest.LogCaptureFixture,
):
    bad = trigger("bad")
    service = FakeService(bad, trigger("good"))
    watched = schedules(service)
    for each in (StoreFailed("EIO"), KeyError("secret"), KeyError("secret")):
        service.errors = {"default/bad": each}
        await watched.look()

    assert "default/good" in service.accepted
    assert error(watched, bad) == "a defect of ours: KeyError"
    assert [bool(record.exc_info) for record in caplog.records] == [False, True]

    service.errors = {}
    await watched.look()
    assert (error(watched, bad), "default/bad" in service.accepted) == ("", True)


async def test_a_look_that_fails_is_logged_and_not_the_last_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Or no schedule would fire until the server is started again."""
    monkeypatch.setattr(module, "DEFECT_S", 0.001)
    service = FakeService(trigger("good"))
    declared, service.triggers = service.triggers, None  # type: ignore[assignment]
    async with asyncio.timeout(SOON_S), asyncio.TaskGroup() as tasks:
        firing = tasks.create_task(schedules(service).run())
        while not caplog.records:  # noqa: ASYNC110
            await asyncio.sleep(0)
        service.triggers = declared
        while not service.accepted:  # noqa: ASYNC110
            await asyncio.sleep(0)
        firing.cancel()

    assert caplog.records[0].exc_info
    assert set(service.accepted) == {"default/good"}


async def test_only_what_the_server_owns_fires_and_the_rest_when_it_owns_that():
    """From where it was; and what it owns no more is not waited for."""
    service = FakeService(trigger("ours"), trigger("theirs"))
    service.owns = lambda function: function == "default/ours"
    watched = schedules(service)
    await watched.look()
    assert service.accepted == ["default/ours"]

    service.owns = lambda function: function == "default/theirs"
    next_at = await watched.look()
    assert service.accepted == ["default/ours", "default/theirs"]
    assert next_at is not None

    service.owns = lambda function: False
    assert await watched.look() is None


async def test_one_that_has_a_lot_to_make_up_for_holds_up_no_other():
    service = FakeService(trigger("late"), trigger("punctual"))
    service.delays["default/late"] = asyncio.Event()
    async with asyncio.timeout(SOON_S), asyncio.TaskGroup() as tasks:
        looking = tasks.create_task(schedules(service).look())
        while not service.accepted:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert not looking.done()
        service.delays["default/late"].set()

    assert service.accepted == ["default/punctual", "default/late"]
