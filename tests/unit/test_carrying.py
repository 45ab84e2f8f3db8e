"""A step in a sandbox that does not see our disk: its answer counts when what it left is here."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from tests.unit.test_pool import eventually, hello, running
from tests.unit.test_run_once import MOUNTS, once, step

from dayfly.protocol import BODY_BYTES_MAX, Fetch
from dayfly_pool.errors import BadTree, DiskFull
from dayfly_pool.models import Failure, Mounts, SandboxId, Success
from dayfly_pool.testing import FakeDriver, FakeGuest


class Carrying(FakeDriver):
    """Its sandboxes are elsewhere; fetching takes until the test says so."""

    carries = True

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.asked, self.go, self.ended = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.error: Exception | None = None

    def folders(self, mounts: Mounts) -> Iterator[bytes]:
        assert mounts == MOUNTS
        yield b"x" * (BODY_BYTES_MAX // 2)
        yield b"y"

    async def collect(self, sandbox: SandboxId, mounts: Mounts) -> None:
        assert mounts == MOUNTS
        self.asked.set()
        try:
            await self.go.wait()
        finally:
            self.ended.set()
        if self.error is not None:
            raise self.error


async def test_the_answer_comes_when_all_is_here():
    driver = Carrying({"main:greet": hello})
    async with running(driver) as pool:
        run = once(pool, step())
        await driver.asked.wait()
        await asyncio.sleep(0)
        assert not run.done()
        driver.go.set()

        assert isinstance(await run, Success)
        assert driver.destroyed


@pytest.mark.parametrize("error", [BadTree("x is a device"), DiskFull("there is no room")])
async def test_what_cannot_be_taken_is_said_in_its_own_words(error: Exception):
    driver = Carrying({"main:greet": hello})
    driver.error = error
    driver.go.set()
    async with running(driver) as pool:
        with pytest.raises(type(error), match=str(error)):
            await once(pool, step())
        assert driver.destroyed


async def test_a_sandbox_that_is_lost_meanwhile_is_not_the_steps_fault():
    driver = Carrying({"main:greet": hello})
    driver.error = ConnectionResetError("gone")
    driver.go.set()
    async with running(driver) as pool:
        outcome = await once(pool, step())

    assert isinstance(outcome, Failure)
    assert (outcome.kind, outcome.was_killed) == ("Crashed", True)


async def test_its_time_is_also_for_what_it_leaves():
    driver = Carrying({"main:greet": hello})
    async with running(driver) as pool:
        outcome = await once(pool, step(timeout_seconds=0.05))

        assert isinstance(outcome, Failure)
        assert outcome.kind == "TimedOut"
        await eventually(driver.ended.is_set)


async def test_who_stops_it_stops_that_too():
    driver = Carrying({"main:greet": hello})
    async with running(driver) as pool:
        run = once(pool, step())
        await driver.asked.wait()
        pool.stop(next(iter(pool._calls)), "it was cancelled")

        outcome = await run
        assert isinstance(outcome, Failure)
        assert outcome.kind == "Stopped"
        assert driver.ended.is_set()


async def test_a_guest_has_its_folders_once():
    """It asks by the name of the step; whoever asks for anything else is ended."""

    async def ask(guest: FakeGuest) -> None:
        await guest.say(Fetch(digest=MOUNTS.step))
        if guest.load is not None and guest.load.handler == "main:again":
            await guest.say(Fetch(digest=MOUNTS.step))

    driver = Carrying({"main:greet": hello, "main:again": hello}, on_load=ask)
    driver.go.set()
    async with running(driver) as pool:
        assert isinstance(await once(pool, step()), Success)
        outcome = await once(pool, step("again"))

    assert isinstance(outcome, Failure)
    assert outcome.kind == "ProtocolViolation"
