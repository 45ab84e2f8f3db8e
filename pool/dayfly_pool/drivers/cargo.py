"""A step's folders for sandboxes that do not see our disk: sent before it, fetched after it.

What is sent is ours. What comes back was made by strangers: it is unpacked name by name (see
`dayfly.freight`) into the step's own folders, where a mount would have had it, and then it is
sealed as that is. All of it waits for the disk or the network.
"""

import contextlib
import errno
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from dayfly import freight
from dayfly_pool.drivers.guest import STORES
from dayfly_pool.errors import BadTree, DiskFull
from dayfly_pool.models import Mounts

QUIET_S_MAX: Final = 60.0
"""Killing what runs in a pod takes a moment; who says nothing for longer is gone."""

_LAYER: Final = re.compile(r"/layers/([0-9a-f]{16})/tree")
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


def sent(data: Path, mounts: Mounts) -> Iterator[bytes]:
    """What a guest unpacks as the folders that *mounts* names, in its order. Raises OSError."""
    return freight.pieces(_sent(data, mounts))


def _sent(data: Path, mounts: Mounts) -> Iterator[bytes]:
    for _, place in mounts.inputs:
        yield from freight.tree([str(data / STORES["artifacts"] / place)])
    for _, options in mounts.workspaces:
        yield from _stack(data, options)
    for name in dict.fromkeys(name.partition("/")[0] for name, _ in mounts.branches):
        told = _own(data, mounts) / "workspaces" / name / "conflicts"
        yield from freight.tree([str(told)])
    for _, options in mounts.branches:
        yield from _stack(data, options)


def _stack(data: Path, options: str) -> Iterator[bytes]:
    layers = _LAYER.findall(options)
    if not layers:
        return freight.nothing()
    return freight.tree([str(data / STORES["layers"] / layer / "tree") for layer in layers])


def _own(data: Path, mounts: Mounts) -> Path:
    return data / STORES["steps"] / mounts.step


def take(end: socket.socket, data: Path, mounts: Mounts) -> None:
    """Have what a porter sends in the step's own folders, and let it go.

    Raises `BadTree`, `DiskFull`; OSError when it breaks off.
    """
    end.settimeout(QUIET_S_MAX)
    source = freight.Source(lambda: end.recv(freight.CHUNK_BYTES))
    own = _own(data, mounts)
    places = [(own / "out", False)]
    names = sorted(name for name, _ in mounts.workspaces)
    places += [(own / "workspaces" / name / "upper", True) for name in names]
    try:
        for place, is_layer in places:
            owner = place.stat().st_uid if os.geteuid() == 0 else None
            with _opened(place.parent) as folder:
                freight.Unpacking(source, owner=owner).tree(folder, place.name, layers=is_layer)
    except freight.Unfit as error:
        raise BadTree(str(error)) from None
    except freight.Malformed as error:
        raise ConnectionError(f"what the step left did not come whole: {error}") from None
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(f"there is no room left in {data} ({error.strerror})") from error
        raise
    with contextlib.suppress(OSError):
        end.sendall(b"K")


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield opened
    finally:
        os.close(opened)
