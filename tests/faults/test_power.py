"""The power goes out: what was said to be on the disk is there, and ends once all the same.

DAYFLY_SEED makes the same moments again.
"""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.faults import disk
from tests.faults.keeps_events import body_of
from tests.faults.keeps_journals import TOGETHER
from tests.faults.keeps_journals import body_of as body_of_entry

from dayfly_pool.models import InvocationId
from dayfly_pool.store.events import State
from dayfly_pool.store.journals import JournalId
from dayfly_pool.store.sqlite_events import SqliteEvents
from dayfly_pool.store.sqlite_journals import SqliteJournals

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
SEED = int(os.environ.get("DAYFLY_SEED", "0")) or random.randrange(1, 1 << 30)
EVENTS, OUTAGES = 90, 50


@pytest.fixture(
    scope="module",
    params=[(what, how) for what in ("events", "journals") for how in ("FULL", "OFF")],
    ids=" ".join,
)
def recorded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str, Path, list[disk.Step]]:
    """All that a process wrote that kept events or journals with this `synchronous`."""
    what, synchronous = request.param
    folder = tmp_path_factory.mktemp("recorded").resolve()
    log = folder / "log"
    keeper = Path(__file__).parent / f"keeps_{what}.py"
    program = [sys.executable, str(keeper), str(folder), str(EVENTS), synchronous]
    command = [*disk.STRACE, str(log), *program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("accepted" if what == "events" else "appended") == EVENTS
    return what, synchronous, folder, disk.read(log)


async def lost_events(folder: Path, words: list[str]) -> list[str]:
    """Of what was told, what is not so after the next start."""
    store = SqliteEvents(folder / "events.sqlite", folder / "bodies")
    await store.open("again")
    try:
        await store.fence("us")
        missing = []
        for word in words:
            what, id_ = word.split()
            shown = await store.get(InvocationId(id_))
            is_kept = shown is not None and (
                shown.body == body_of(id_) or shown.state is State.SUCCEEDED
            )
            is_ended = shown is not None and shown.state is State.SUCCEEDED
            if not (is_ended if what == "ended" else is_kept):
                missing.append(word)
        return missing
    finally:
        await store.close()


async def lost_journals(folder: Path, words: list[str]) -> list[str]:
    """The same, and what is there twice, or is not what was written, or was to be gone."""
    store = SqliteJournals(folder / "journals.sqlite", folder / "bodies")
    await store.open("again")
    try:
        missing = []
        for id_ in {word.split()[1] for word in words}:
            journal = await store.get(JournalId(id_))
            told = [word.split() for word in words if id_ in word]
            last = max(int(number) for _, _, number in told)
            found = {entry.number: entry.body for entry in await store.entries(JournalId(id_))}
            if journal is None or (["ended", id_, "0"] in told and not journal.is_over):
                missing.append(f"{id_} or its end")
                continue
            # the next one was perhaps written, and not told any more
            at = journal.last
            first = (at - 1) // TOGETHER * TOGETHER + 1
            wanted = {number: body_of_entry(id_, number) for number in range(first, at + 1)}
            if at not in (last, last + 1) or found != wanted or journal.head != b"%d" % at:
                missing.append(f"{id_} {last}: {at} {sorted(found)} {journal.damage}")
        return missing
    finally:
        await store.close()


async def test_what_was_acknowledged_survives_the_power_going_out(
    recorded: tuple[str, str, Path, list[disk.Step]], tmp_path: Path
):
    """At any moment; and the test sees it where nothing is synchronized."""
    what, synchronous, was, steps = recorded
    lost = lost_events if what == "events" else lost_journals
    draw = random.Random(SEED)
    failed: list[str] = []
    for number in range(OUTAGES):
        at = disk.out_at(steps, draw)
        left = disk.Disk(steps[:at], draw, ignored="-shm")
        folder = tmp_path / str(number)
        folder.mkdir()
        left.write_to(folder, was)
        try:
            missing = await lost(folder, left.words)
        except Exception as error:  # the file itself is damaged
            missing = [repr(error)]
        failed += [f"seed {SEED}, outage {number}, step {at}: {word}" for word in missing]
        shutil.rmtree(folder)
    if synchronous == "FULL":
        assert failed == []
    else:
        assert failed
