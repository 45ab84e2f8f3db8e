"""A copy that is kept current, whatever the API server does to it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kubernetes.fake_api import FakeApi, Fault
from tests.kubernetes.waiting import running, until

from dayfly_pool.cluster import api as api_module
from dayfly_pool.cluster import reflector as reflector_module
from dayfly_pool.cluster.api import CONFIG_MAP, Api, Kind
from dayfly_pool.cluster.reflector import Change, Reflector

Object = dict[str, Any]


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits that a test can wait for."""
    monkeypatch.setattr(reflector_module, "LIST_S", 0.05)
    monkeypatch.setattr(reflector_module, "WAIT_S_MAX", 0.05)
    monkeypatch.setattr(api_module, "WAIT_S_MAX", 0.02)


class Told:
    """What a reflector told, and what follows from it."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.level: dict[str, Object] = {}

    def __call__(self, change: Change) -> None:
        assert self.level.get(change.key) == change.before
        self.changes.append(change)
        if change.after is None:
            del self.level[change.key]
        else:
            self.level[change.key] = change.after

    @property
    def words(self) -> list[str]:
        return [
            ("+" if c.before is None else "-" if c.after is None else "~")
            + c.key.rpartition("/")[2]
            for c in self.changes
        ]


def config(name: str, colour: str = "red") -> Object:
    return {"metadata": {"name": name}, "data": {"colour": colour}}


async def test_what_is_there_and_what_happens_is_told_once(api: Api):
    told = Told()
    reflector = Reflector(api, CONFIG_MAP, changed=told)
    await api.create(CONFIG_MAP, config("a"))
    async with running(reflector.run()):
        await reflector.synced()
        await api.create(CONFIG_MAP, config("b"))
        await api.merge(CONFIG_MAP, "a", {"data": {"colour": "blue"}})
        await api.delete(CONFIG_MAP, "a")
        await until(lambda: len(told.changes) == 4)

    assert told.words == ["+a", "+b", "~a", "-a"]
    assert list(reflector.objects) == ["default/b"]
    assert reflector.objects == told.level
    assert reflector.lists == 1


async def test_a_list_of_many_pages_is_whole(api: Api):
    for number in range(7):
        await api.create(CONFIG_MAP, config(f"c{number}"))
    pages = api.page

    async def short(kind: Kind, **more: Any) -> Object:
        return await pages(kind, **more | {"limit": 3})

    api.page = short  # type: ignore[method-assign]
    reflector = Reflector(api, CONFIG_MAP)
    async with running(reflector.run()):
        await reflector.synced()

    assert len(reflector.objects) == 7
    assert api.requests["get", "configmaps"] == 3


@pytest.mark.parametrize("how", ["status", "stream"])
async def test_after_410_what_was_missed_is_told_and_nothing_else(
    fake: FakeApi, api: Api, how: str
):
    """The deletion too, of which no event is left."""
    told = Told()
    reflector = Reflector(api, CONFIG_MAP, changed=told)
    for name in ("a", "b", "c"):
        await api.create(CONFIG_MAP, config(name))
    async with running(reflector.run()):
        await until(lambda: fake.streams == 1)
        fake.faults.append(Fault("watch", times=1, slow_s=0.2))
        fake.drop_streams()
        await until(lambda: fake.streams == 0)
        await api.delete(CONFIG_MAP, "a")
        await api.merge(CONFIG_MAP, "b", {"data": {"colour": "blue"}})
        fake.compact()
        if how == "stream":
            await until(lambda: fake.streams == 1)
            fake.fail_streams(410)
        await until(lambda: reflector.lists > 1 and fake.streams == 1)

    assert sorted(told.words[3:]) == ["-a", "~b"]


async def test_a_stream_that_is_cut_is_gone_on_with(fake: FakeApi, api: Api):
    reflector = Reflector(api, CONFIG_MAP)
    async with running(reflector.run()):
        for number in range(5):
            await until(lambda: fake.streams == 1)
            fake.drop_streams()
            await api.create(CONFIG_MAP, config(f"c{number}"))
            await until(lambda n=number: f"default/c{n}" in reflector.objects)

    assert reflector.lists == 1


async def test_a_stream_that_is_half_open_is_noticed(
    fake: FakeApi, api: Api, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reflector_module, "STREAM_S_MIN", 1)
    monkeypatch.setattr(reflector_module, "STREAM_S_MAX", 1)
    monkeypatch.setattr(api_module, "WATCH_S_GRACE", 0.1)
    reflector = Reflector(api, CONFIG_MAP)
    async with running(reflector.run()):
        await until(lambda: fake.streams == 1)
        fake.freeze_streams()
        heard_s = reflector.heard_s
        await api.create(CONFIG_MAP, config("a"))
        await until(lambda: "default/a" in reflector.objects)

    assert reflector.lists == 1
    assert reflector.heard_s - heard_s < reflector_module.STREAM_S_SHORT


def test_a_half_open_stream_is_known_within_a_minute():
    longest_s = reflector_module.STREAM_S_MAX + api_module.WATCH_S_GRACE

    assert longest_s < 60


async def test_while_the_server_is_away_what_is_known_stays(fake: FakeApi, api: Api):
    told = Told()
    reflector = Reflector(api, CONFIG_MAP, changed=told)
    await api.create(CONFIG_MAP, config("a"))
    async with running(reflector.run()):
        await until(lambda: fake.streams == 1)
        await fake.down()
        heard_s = reflector.heard_s
        await until(lambda: reflector._is_failing)
        stale_s = reflector.staleness_s
        await until(lambda: reflector.staleness_s > stale_s)

        assert list(reflector.objects) == ["default/a"]
        assert reflector.heard_s == heard_s
        await fake.up()
        await until(lambda: fake.streams == 1)
        await api.create(CONFIG_MAP, config("b"))
        await until(lambda: "default/b" in reflector.objects)

    assert told.words == ["+a", "+b"]


async def test_a_server_that_is_away_at_first_is_waited_for(fake: FakeApi, api: Api):
    await fake.down()
    reflector = Reflector(api, CONFIG_MAP)
    async with running(reflector.run()):
        await until(lambda: reflector._is_failing)
        await fake.up()
        await reflector.synced()

    assert not reflector.objects


@pytest.mark.parametrize("status", [410, 500, 403])
async def test_refusals_without_end_make_no_hot_loop(
    fake: FakeApi, api: Api, monkeypatch: pytest.MonkeyPatch, status: int
):
    """However it refuses: after each failure there is a wait, and lists are a second apart."""
    waited: list[float] = []
    monkeypatch.setattr(reflector_module, "LIST_S", 1.0)
    monkeypatch.setattr(reflector_module, "WAIT_S_MAX", 5.0)
    fake.faults.append(Fault("watch", times=10**6, status=status))
    reflector = Reflector(api, CONFIG_MAP)

    def wait_s(failures: int) -> float:
        waited.append(Reflector._wait_s(reflector, failures))
        return 0.001

    monkeypatch.setattr(reflector, "_wait_s", wait_s)
    async with running(reflector.run()):
        await until(lambda: len(waited) > 8)

    assert all(later > 0 for later in waited)
    assert all(s >= 2.5 for s in waited[7:])


async def test_a_stream_that_ends_at_once_again_and_again_is_waited_for(
    fake: FakeApi, api: Api, monkeypatch: pytest.MonkeyPatch
):
    reflector = Reflector(api, CONFIG_MAP)
    waited: list[float] = []

    def wait_s(failures: int) -> float:
        waited.append(failures)
        return 0.0

    async def ends() -> None:
        reflector._since = "1"

    monkeypatch.setattr(reflector, "_wait_s", wait_s)
    monkeypatch.setattr(reflector, "_watch", ends)
    async with running(reflector.run()):
        await until(lambda: len(waited) > 5)

    assert waited[:4] == [1, 2, 3, 4]


async def test_what_is_sent_twice_or_late_is_told_once(fake: FakeApi, api: Api):
    told = Told()
    fake.duplicates = True
    reflector = Reflector(api, CONFIG_MAP, changed=told)
    async with running(reflector.run()):
        await until(lambda: fake.streams == 1)
        old = await api.create(CONFIG_MAP, config("a"))
        await api.merge(CONFIG_MAP, "a", {"data": {"colour": "blue"}})
        await until(lambda: len(told.changes) == 2)
        fake.send("MODIFIED", old)
        await api.delete(CONFIG_MAP, "a")
        await until(lambda: len(told.changes) == 3)
        fake.send("ADDED", old)
        fake.send("DELETED", old)
        await api.create(CONFIG_MAP, config("b"))
        await until(lambda: "default/b" in reflector.objects)

    assert told.words == ["+a", "~a", "-a", "+b"]


async def test_cancelling_it_leaves_no_stream(fake: FakeApi, api: Api):
    reflector = Reflector(api, CONFIG_MAP)
    async with running(reflector.run()):
        await until(lambda: fake.streams == 1)
    await api.create(CONFIG_MAP, config("a"))  # the fake notices when it writes

    await until(lambda: fake.streams == 0)


# ---- any order ----------------------------------------------------------------------------------


class Script:
    """Lists nothing, and then sends these events, in this order."""

    def __init__(self, events: list[tuple[str, Object]]) -> None:
        self.events, self.sent = events, asyncio.Event()

    async def page(self, kind: Kind, **more: Any) -> Object:
        return {"metadata": {"resourceVersion": "1"}, "items": []}

    async def watch(self, kind: Kind, **more: Any) -> AsyncIterator[tuple[str, Object]]:
        for event in self.events:
            yield event
        self.sent.set()
        await asyncio.Event().wait()


writes = st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=12)


@settings(max_examples=150, deadline=None)
@given(writes, st.data())
def test_in_whatever_order_events_come_the_level_is_the_same(
    history: list[tuple[str, bool]], data: st.DataObject
):
    """Twice, too. What is known in the end is what the last write of each name left."""
    level: dict[str, Object] = {}
    events = []
    for version, (name, is_deletion) in enumerate(history, 2):
        obj = {"metadata": {"name": name, "resourceVersion": str(version)}}
        if is_deletion and name not in level:
            continue
        what = "DELETED" if is_deletion else "MODIFIED" if name in level else "ADDED"
        events.append((what, obj))
        level.pop(name, None) if is_deletion else level.update({name: obj})
    twice = data.draw(st.permutations(events + data.draw(st.permutations(events))))

    async def follow() -> tuple[Reflector, Told]:
        script, told = Script(twice), Told()
        reflector = Reflector(script, CONFIG_MAP, changed=told)  # type: ignore[arg-type]
        async with running(reflector.run()):
            await script.sent.wait()
        return reflector, told

    reflector, told = asyncio.run(follow())

    assert reflector.objects == level
    assert told.level == level
