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

from dayfly_pool.models import InvocationId
from dayfly_pool.store.events import State
from dayfly_pool.store.sqlite_events import SqliteEvents

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
SEED = int(os.environ.get("DAYFLY_SEED", "0")) or random.randrange(1, 1 << 30)
EVENTS, OUTAGES = 90, 50


@pytest.fixture(scope="module", params=["FULL", "OFF"])
def recorded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, list[disk.Step]]:
    """All that a process wrote that kept events with this `synchronous`."""
    folder = tmp_path_factory.mktemp("recorded").resolve()
    log = folder / "log"
    program = [sys.executable, str(Path(__file__).parent / "keeps_events.py"), str(folder)]
    command = [*disk.STRACE, str(log), *program, str(EVENTS), request.param]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("accepted") == EVENTS
    return request.param, folder, disk.read(log)


async def lost(folder: Path, words: list[str]) -> list[str]:
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


async def test_what_was_acknowledged_survives_the_power_going_out(
    recorded: tuple[str, Path, list[disk.Step]], tmp_path: Path
):
    """At any moment; and the test sees it where nothing is synchronized."""
    synchronous, was, steps = recorded
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
