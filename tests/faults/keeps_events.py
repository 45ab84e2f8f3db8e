"""A process that keeps events, and says so of each on stdout once it is on the disk.

python keeps_events.py FOLDER NUMBER SYNCHRONOUS
"""

import asyncio
import os
import sys
from pathlib import Path

from dayfly_pool.models import FunctionId, InvocationId
from dayfly_pool.store.events import ROW_BYTES_MAX, Ended, Event, State
from dayfly_pool.store.sqlite_events import SqliteEvents

GREET = FunctionId("default/greet")


def told(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def body_of(id_: str) -> bytes:
    """Every tenth is a long one, which is a file of its own."""
    is_long = int(id_.rpartition("-")[2]) % 10 == 0
    return id_.encode() * (ROW_BYTES_MAX // 6 if is_long else 5)


async def main(folder: Path, number: int, synchronous: str) -> None:
    """Accept, lease and end events, several in a write."""
    store = SqliteEvents(folder / "events.sqlite", folder / "bodies")
    await store.open("us")
    store._database.into.execute(f"PRAGMA synchronous = {synchronous}")
    for at in range(0, number, 3):
        ids = [InvocationId(f"event-{n}") for n in range(at, at + 3)]
        new = [
            Event(
                id=id_,
                function=GREET,
                meta=b"",
                body=body_of(id_),
                accepted_at=100.0,
                age_s=1e9,
            )
            for id_ in ids
        ]
        written = await store.write(100.0, accepted=new, wanted={GREET: 2})
        for id_ in ids:
            told(f"accepted {id_}")
        ended = [
            Ended(row=lease.row, fence=lease.fence, state=State.SUCCEEDED, at=110.0)
            for lease in written.leased
        ]
        await store.write(110.0, ended)
        for lease in written.leased:
            told(f"ended {lease.id}")
    os._exit(0)  # without closing: nothing is tidied up


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
