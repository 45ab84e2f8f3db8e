"""A process that keeps journals, and says so of each entry on stdout once it is on the disk.

python keeps_journals.py FOLDER NUMBER SYNCHRONOUS
"""

import asyncio
import os
import sys
from pathlib import Path

from dayfly_pool.store.journals import ROW_BYTES_MAX, Append, Journal, JournalId, NewEntry
from dayfly_pool.store.sqlite_journals import SqliteJournals

AT_ONCE = 3
TOGETHER = 5
"""Every so many entries are replaced by one."""


def told(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def id_of(number: int) -> JournalId:
    return JournalId(f"{number:032x}")


def body_of(id_: str, number: int) -> bytes:
    """Every seventh is a long one, which is a file of its own."""
    return f"{id_} {number} ".encode() * (ROW_BYTES_MAX // 30 if number % 7 == 0 else 5)


async def main(folder: Path, number: int, synchronous: str) -> None:
    """Append to three journals at once, replace what is older, end one of them."""
    store = SqliteJournals(folder / "journals.sqlite", folder / "bodies")
    await store.open("us")
    store._database.into.execute(f"PRAGMA synchronous = {synchronous}")
    ids = [id_of(n) for n in range(AT_ONCE)]
    for id_ in ids:
        made = Journal(id=id_, kind="job", namespace="n", name=id_, created_at=1.0)
        await store.create(made, is_ours=True)
    for at in range(1, number // AT_ONCE + 1):
        replaced = tuple(range(at - TOGETHER, at)) if at % TOGETHER == 1 and at > 1 else ()
        appends = [
            Append(
                id=id_,
                fence=1,
                after=at - 1,
                entries=(NewEntry(body=body_of(id_, at)),),
                head=b"%d" % at,
                replaces=replaced,
            )
            for id_ in ids
        ]
        await store.append(appends)
        for id_ in ids:
            told(f"appended {id_} {at}")
        await store.sweep(0.0, 1e9, 1e9)
    end = Append(id=ids[0], fence=1, after=number // AT_ONCE, ended_at=2.0)
    await store.append([end])
    told(f"ended {ids[0]} 0")
    os._exit(0)  # without closing: nothing is tidied up


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
