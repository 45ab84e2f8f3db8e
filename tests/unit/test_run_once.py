"""A function that runs once: its sandbox is nobody else's, and is dead when that is told."""

import asyncio
import itertools
from typing import Any

import msgspec
import pytest
from msgspec import structs
from tests.unit.test_pool import ENVIRONMENT, GREET, Gate, eventually, hang, hello, log_of, running

from dayfly.protocol import Invoke
from dayfly_pool.driver import Exit
from dayfly_pool.errors import BadInput, Draining, NoCapacity, SandboxStartFailed
from dayfly_pool.models import (
    Failure,
    Function,
    Invocation,
    InvocationId,
    Mounts,
    Outcome,
    SandboxId,
    Success,
)
from dayfly_pool.pool import Pool
from dayfly_pool.testing import FakeDriver, FakeGuest, function

MOUNTS = Mounts("step", (("a", "default/file-" + "0" * 64 + "/content"),), (("w", "options"),), 7)
numbers = itertools.count(1)


def step(name: str = "greet", **spec: Any) -> Function:
    found = function(name, namespace="default", **spec)
    return structs.replace(found, id=f"default/flow.{name}.{next(numbers)}", mounts=MOUNTS)


def once(pool: Pool, each: Function, **changed: Any) -> "asyncio.Task[Outcome]":
    invocation = Invocation(InvocationId(f"o{next(numbers)}"), each.id, b"Ada", **changed)
    return asyncio.ensure_future(pool.run_once(each, ENVIRONMENT, invocation))


class Slow(FakeDriver):
    """Killing takes until the test says so."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.asked, self.go = asyncio.Event(), asyncio.Event()

    async def destroy(self, sandbox: SandboxId) -> Exit:
        self.asked.set()
        await self.go.wait()
        return await super().destroy(sandbox)


async def test_every_run_has_a_sandbox_of_its_own_and_leaves_only_what_it_wrote():
    async def write(guest: FakeGuest, request: Invoke, body: bytes) -> bytes:
        assert msgspec.json.decode(guest.folders, type=Mounts) == MOUNTS
        assert guest.mold.steps
        await guest.log("it runs\n", 1)
        return guest.sandbox.encode()

    driver = FakeDriver({"main:greet": write})
    async with running(driver) as pool:
        steps = [step(initialize="once", min_scale=2), step(), step()]
        outcomes = [await once(pool, each) for each in steps]

        assert all(isinstance(outcome, Success) for outcome in outcomes), outcomes
        used = [outcome.body.decode() for outcome in outcomes if isinstance(outcome, Success)]
        assert len(set(used)) == 3
        assert set(used) <= set(driver.destroyed)
        assert not pool.state.functions
        assert not pool._once
        assert not pool.metrics._invocations
        assert not {box.function for box in pool._boxes.values()} - {None}
        assert [[text for _, _, text in log_of(pool, each)] for each in steps] == [["it runs"]] * 3


async def test_it_returns_when_its_sandbox_is_dead_and_not_before():
    driver = Slow({"main:greet": hello})
    async with running(driver) as pool:
        outcome = once(pool, step())
        await driver.asked.wait()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not outcome.done()

        driver.go.set()
        assert isinstance(await outcome, Success)


@pytest.mark.parametrize("how", ["cancel", "stop", "time out"])
async def test_whatever_ends_it_its_sandbox_is_dead_then(how: str):
    driver = FakeDriver({"main:greet": hang})
    async with running(driver) as pool:
        each = step(timeout_seconds=0.05 if how == "time out" else 60.0)
        outcome = once(pool, each)
        await eventually(lambda: any(guest.load for guest in driver.guests.values()))
        used = {guest.sandbox for guest in driver.guests.values() if guest.load}
        if how == "cancel":
            outcome.cancel()
        elif how == "stop":
            while not outcome.done():
                pool.stop(next(iter(pool._calls), InvocationId("")), "the run was cancelled")
                await asyncio.sleep(0)
        await asyncio.wait({outcome})

        assert outcome.cancelled() == (how == "cancel")
        assert used <= set(driver.destroyed)
        assert not pool.state.functions
        assert not pool._once


async def test_who_is_cancelled_before_it_was_loaded_has_nothing_loaded():
    """At any await on the way there, and on the way back."""
    driver = FakeDriver({"main:greet": hello})
    async with running(driver) as pool:
        for turns in range(60):
            outcome = once(pool, step())
            for _ in range(turns):
                await asyncio.sleep(0)
            outcome.cancel()
            await asyncio.wait({outcome})
            loaded = {guest.sandbox for guest in driver.guests.values() if guest.load}

            assert not loaded
            assert not pool.state.functions
            assert not pool._once


async def test_a_pool_that_ends_takes_its_runs_with_it():
    """Those that run are told that they crashed; later ones that the pool is draining."""
    gate = Gate()
    driver = FakeDriver({"main:greet": gate})
    async with running(driver) as pool:
        under_way = once(pool, step())
        await gate.reached()
    outcome = await under_way

    assert isinstance(outcome, Failure)
    assert outcome.kind == "Crashed"
    with pytest.raises(Draining):
        await once(pool, step())
    assert not pool._once


async def test_what_cannot_start_is_not_kept():
    driver = FakeDriver({"main:greet": hello})
    driver.refusal = SandboxStartFailed("no")
    async with running(driver) as pool:
        with pytest.raises(NoCapacity, match="no"):
            await once(pool, step(), queue_s_max=0.05)

        assert not pool.state.functions
        assert not pool._once


async def test_without_isolation_there_are_no_workspaces():
    driver = FakeDriver({"main:greet": hello}, isolated=False)
    async with running(driver) as pool:
        with pytest.raises(BadInput, match="workspace w needs isolation"):
            await once(pool, step())
        plain = structs.replace(step(), mounts=structs.replace(MOUNTS, workspaces=()))

        assert isinstance(await once(pool, plain), Success)


async def test_functions_and_steps_share_no_sandbox():
    driver = FakeDriver({"main:greet": hello})
    async with running(driver, GREET) as pool:
        await once(pool, step())
        invocation = Invocation(InvocationId("plain"), GREET.id, b"")
        await pool.invoke(invocation)
        plain = next(box for box in pool._boxes.values() if box.function is GREET)

        assert not driver.guests[plain.sandbox.id].mold.steps
