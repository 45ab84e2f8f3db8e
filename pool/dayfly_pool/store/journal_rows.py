"""What the two databases of journals have in common: their tables are the same, and their rows."""

import zlib
from collections.abc import Sequence
from typing import Any, Final

from dayfly_pool.store import rows
from dayfly_pool.store.journals import Journal, NewEntry

JOURNAL: Final = (
    "id, kind, namespace, name, created_at, ended_at, is_draft, owner, fence, last, head,"
    " head_checksum"
)
"""The columns of `journal`; the last two tell whether the head is what was written."""

ENTRY: Final = "number, part, low, high, body, file, checksum"


def head_checksum(head: bytes) -> int:
    """Tells whether a head is what was written."""
    return zlib.crc32(head)


def place(number: int, entry: NewEntry) -> bytes:
    """What belongs to an entry besides its body: its checksum is of both."""
    return place_of(number, entry.part, entry.low, entry.high)


def place_of(number: int, part: int, low: int, high: int) -> bytes:
    """The same, from a row."""
    return b"%d %d %d %d" % (number, part, low, high)


def journal(row: Sequence[Any], spec: bytes = b"", damage: str = "") -> Journal:
    """A journal, from its row, with the spec that the caller has fetched and checked."""
    (id_, kind, namespace, name, created_at, ended_at, is_draft, owner, fence, last) = row[:10]
    head, checksum = bytes(row[10]), row[11]
    if head_checksum(head) != checksum:
        head, damage = b"", f"its head: {rows.DAMAGED}"
    return Journal(
        id=id_,
        kind=kind,
        namespace=namespace,
        name=name,
        created_at=created_at,
        ended_at=ended_at,
        head=head,
        spec=spec,
        is_draft=bool(is_draft),
        owner=owner,
        fence=fence,
        last=last,
        damage=damage,
    )
