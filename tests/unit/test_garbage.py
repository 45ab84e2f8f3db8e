"""What nothing refers to goes, and nothing else: artifacts, layers, results in the step cache."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.unit.test_runs import Work, serving, step

from dayfly_pool.errors import StoreFailed
from dayfly_pool.ids import new_id
from dayfly_pool.journal import Journals
from dayfly_pool.store.journals import Entry, Journal, JournalId, NewEntry
from dayfly_pool.store.memory_journals import MemoryJournals
from dayfly_pool.workflow import facts
from dayfly_pool.workflow.cache import KEPT_S, Cached, StepCache
from dayfly_pool.workflow.facts import Invoke
from dayfly_pool.workflow.garbage import Garbage, needed
from dayfly_pool.workflow.handover import Handover, Left
from dayfly_pool.workflow.model import Output, Param, Step
from dayfly_pool.workflow.run import KEPT, LEFT
from dayfly_pool.workflow.workspaces import Workspace

NEVER = 1e12
"""Whatever there is is older: only what is referred to is kept."""


class House:
    """A server's stores and journals."""

    def __init__(self, data: Path) -> None:
        self.data, self.store = data, MemoryJournals()
        self.journals = Journals(self.store, owner="us", is_alone=True)
        self.handover = Handover(data, os.geteuid())
        self.cache = StepCache(data / "cache")
        self.garbage = Garbage(self.journals, self.handover, self.cache, 3600.0)

    def artifact(self, text: str) -> facts.Artifact:
        """One that nothing refers to."""
        found = self.handover.artifacts.put_value("default", text.encode())
        return facts.Artifact(found.uri, found.sha256, found.bytes)

    def layers(self, *names: str) -> Workspace:
        """A workspace with a layer for each of the files *names*."""
        found = Workspace()
        for name in names:
            folders = self.handover._steps.make(str(new_id()), ["w"])
            (folders.uppers["w"] / name).write_text(name)
            found = self.handover._workspaces.take(found, folders.uppers["w"])
            self.handover._steps.remove(folders.id)
        return found

    async def run(self, name: str, *uris: str, left: tuple[Left, ...] = ()) -> JournalId:
        """A run that refers to these."""
        id_ = JournalId(new_id())
        entries = [NewEntry(KEPT, body=msgspec.msgpack.encode(uris))]
        entries.append(NewEntry(LEFT, body=msgspec.msgpack.encode(left)))
        journal = Journal(
            id=id_, kind="run", namespace="default", name=name, created_at=1.0, ended_at=2.0
        )
        await self.store.create(journal, entries)
        return id_

    def is_there(self, artifact: facts.Artifact) -> bool:
        return (self.data / f"artifacts/objects/default/file-{artifact.sha256}").exists()

    def shelf(self) -> set[str]:
        """The layers that there are."""
        return set(os.listdir(self.data / "workspaces/layers"))


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    made.handover.open()
    made.cache.open()
    yield made
    made.handover.close()


def ids(workspace: Workspace) -> set[str]:
    return {layer.id for layer in workspace.layers}


# ---- what is kept -------------------------------------------------------------------------------


async def test_what_a_run_refers_to_stays_until_the_run_is_deleted(house: House):
    kept, other = house.artifact("kept"), house.artifact("other")
    used, unused = house.layers("a", "b"), house.layers("c")
    run = await house.run("one", kept.uri, left=(Left("w", "step", used),))

    assert await house.garbage.collect(NEVER) == 2
    assert (house.is_there(kept), house.is_there(other)) == (True, False)
    assert house.shelf() == ids(used)
    assert not ids(unused) & house.shelf()

    await house.store.delete(run)
    assert await house.garbage.collect(NEVER) == 3
    assert not house.is_there(kept)
    assert house.shelf() == set()


async def test_what_came_or_was_used_lately_stays(house: House):
    """Between being stored and being written down, nothing else speaks for it."""
    made = house.artifact("made")
    place = house.data / f"artifacts/objects/default/file-{made.sha256}"
    layers = house.layers("a")

    assert await house.garbage.collect(place.stat().st_mtime - 1) == 0
    assert house.shelf() == ids(layers)
    os.utime(place, (1000.0, 1000.0))
    house.handover.found("default", "x", made.as_value())
    assert await house.garbage.collect(2000.0) == 0
    os.utime(place, (1000.0, 1000.0))
    assert await house.garbage.collect(2000.0) == 1


async def test_what_a_cached_step_left_stays_as_long_as_its_entry(house: House):
    """Large results too; and looking at an entry makes it no younger."""
    output, large = house.artifact("output"), house.artifact("large")
    results: dict[str, Any] = {"result": large.as_result()}
    house.cache.put("default", "k" * 64, Cached(results, {"out": output}, "default/one", 1.0))
    (entry,) = (house.data / "cache").glob("*/*")

    assert await house.garbage.collect(NEVER) == 0
    assert house.is_there(output)
    assert house.is_there(large)
    at = entry.stat().st_mtime - KEPT_S - 60
    os.utime(entry, (at, at))
    assert await house.garbage.collect(NEVER) == 2


async def test_what_a_step_has_before_it_stays_until_the_step_is_over(house: House):
    given = house.artifact("given")
    joined = house.layers("a")
    invoke = Invoke(
        key="s",
        attempt=1,
        step=Step(name="s", script="true", outputs=(Output(name="o", stream=True),)),
        params={},
        inputs={"given": given.as_value()},
        workspaces={"w": facts.View("w", ("before",))},
    )
    versions = {("w", "before"): joined}
    prepared = house.handover.prepare("default", invoke, versions, frozenset({"w"}))

    assert await house.garbage.collect(NEVER) == 0
    house.handover.drop(prepared)
    assert await house.garbage.collect(NEVER) == 2


async def test_what_cannot_be_read_is_no_reason_to_remove_anything(house: House):
    made = house.artifact("made")
    run = await house.run("one", made.uri)
    for number, entry in house.store._rows[run].entries.items():
        damaged = Entry(number, entry.part, 0, 0, b"", damage="not what was written")
        house.store._rows[run].entries[number] = damaged

    with pytest.raises(StoreFailed, match=f"of run {run}: not what was written"):
        await house.garbage.collect(NEVER)
    assert house.is_there(made)


async def test_a_run_that_begins_while_the_others_are_looked_at_is_seen(
    house: House, monkeypatch: pytest.MonkeyPatch
):
    """It may be tried again from one that was deleted after that."""
    first = await house.run("one", "dayfly://default/file/sha256/1")
    entries = house.store.entries

    async def retried(id_: JournalId, **words: Any) -> list[Entry]:
        if id_ == first:
            monkeypatch.setattr(house.store, "entries", entries)
            await house.run("one-r1", "dayfly://default/file/sha256/2")
        return await entries(id_, **words)

    monkeypatch.setattr(house.store, "entries", retried)
    assert {uri[-1] for uri in (await needed(house.journals)).uris} == {"1", "2"}


# ---- runs ---------------------------------------------------------------------------------------


async def test_an_artifact_that_a_run_is_given_is_kept_for_it():
    async with serving(Work()) as server:
        server.declare(step("a"), params=(Param(name="data", type="any"),))
        given = {"uri": "dayfly://default/file/sha256/" + "a" * 64, "sha256": "a" * 64}
        foreign = {"uri": "dayfly://others/file/sha256/" + "b" * 64}
        await server.start(data=[given, foreign])
        await server.over()

        assert (await needed(server.journals)).uris == {given["uri"]}
