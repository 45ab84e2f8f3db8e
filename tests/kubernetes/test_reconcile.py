"""The queue of keys: once each, one run at a time, later after failures."""

import asyncio

import pytest
from tests.kubernetes.waiting import running, until

from dayfly_pool.cluster import reconcile as reconcile_module
from dayfly_pool.cluster.reconcile import BACKOFF_S_MAX, Reconciler, backoff_s
from dayfly_pool.errors import NoCapacity


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile_module, "BACKOFF_FIRST_S", 0.001)


async def test_a_key_that_waits_is_run_once():
    ran: list[str] = []

    async def note(key: str) -> None:
        ran.append(key)

    reconciler = Reconciler(note)
    for key in "aabab":
        reconciler.add(key)
    async with running(reconciler.run()):
        await until(lambda: reconciler.is_idle)

    assert ran == ["a", "b"]


async def test_a_key_that_is_added_while_it_runs_is_run_once_more_afterwards():
    ran: list[str] = []
    at_once, most = 0, 0
    go = asyncio.Event()

    async def slow(key: str) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        ran.append(key)
        await go.wait()
        at_once -= 1

    reconciler = Reconciler(slow, workers=3)
    async with running(reconciler.run()):
        reconciler.add("a")
        await until(lambda: ran)
        reconciler.add("a")
        reconciler.add("a")
        await asyncio.sleep(0)
        go.set()
        await until(lambda: reconciler.is_idle)

    assert ran == ["a", "a"]
    assert most == 1


async def test_no_more_run_at_once_than_there_are_workers():
    running_now: set[str] = set()
    go = asyncio.Event()

    async def slow(key: str) -> None:
        running_now.add(key)
        await go.wait()

    reconciler = Reconciler(slow, workers=2)
    for key in "abcd":
        reconciler.add(key)
    async with running(reconciler.run()):
        await until(lambda: len(running_now) == 2)

        assert repr(reconciler) == "<Reconciler [2 waiting, 2 running, 0 later]>"
        go.set()
        await until(lambda: reconciler.is_idle)


async def test_one_groups_slow_keys_leave_room_for_the_others():
    """And all of them are run in the end, those that fail once more, later."""
    running_now: set[str] = set()
    ran: list[str] = []
    go = asyncio.Event()

    async def slow(key: str) -> None:
        ran.append(key)
        if key.startswith("slow"):
            running_now.add(key)
            assert len(running_now) <= 2
            try:
                await go.wait()
                if ran.count(key) == 1:
                    raise NoCapacity
            finally:
                running_now.discard(key)

    reconciler = Reconciler(slow, group=lambda key: key.partition("/")[0], group_max=2)
    slow_keys = [f"slow/{n}" for n in range(6)]
    for key in slow_keys:
        reconciler.add(key)
    async with running(reconciler.run()):
        await until(lambda: len(running_now) == 2)
        reconciler.add("quick/1")
        await until(lambda: "quick/1" in ran)
        reconciler.add("slow/5")
        assert repr(reconciler) == "<Reconciler [4 waiting, 2 running, 0 later]>"
        go.set()
        await until(lambda: reconciler.is_idle)

    assert sorted(ran) == ["quick/1", *sorted(2 * slow_keys)]
    assert (reconciler._busy, reconciler._held) == ({}, {})


@pytest.mark.parametrize("error", [NoCapacity(), ValueError("ours")])
async def test_what_fails_is_run_until_it_succeeds_and_is_forgotten_then(error: Exception):
    tries = 0

    async def third(key: str) -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise error

    reconciler = Reconciler(third)
    reconciler.add("a")
    async with running(reconciler.run()):
        await until(lambda: tries == 3 and reconciler.is_idle)

    assert reconciler._failures == {}


async def test_a_run_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reconcile_module, "RUN_S_MAX", 0.01)
    tries = 0

    async def hangs(key: str) -> None:
        nonlocal tries
        tries += 1
        await asyncio.Event().wait()

    reconciler = Reconciler(hangs)
    reconciler.add("a")
    async with running(reconciler.run()):
        await until(lambda: tries > 1)


async def test_a_key_for_later_is_run_at_once_when_it_is_added_again():
    ran: list[str] = []

    async def note(key: str) -> None:
        ran.append(key)

    reconciler = Reconciler(note)
    reconciler.add("a", after_s=3600)
    reconciler.add("a", after_s=7200)
    async with running(reconciler.run()):
        reconciler.add("a")
        await until(lambda: reconciler.is_idle)

    assert ran == ["a"]


async def test_all_keys_are_run_again_now_and_then():
    ran: list[str] = []

    async def note(key: str) -> None:
        ran.append(key)

    reconciler = Reconciler(note, keys=lambda: "ab", resync_s=0.001)
    async with running(reconciler.run()):
        await until(lambda: ran.count("b") > 2)


def test_waits_double_up_to_a_limit():
    assert backoff_s(2) == 2 * backoff_s(1)
    assert backoff_s(10_000) == BACKOFF_S_MAX
