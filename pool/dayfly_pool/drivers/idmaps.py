"""Mounts in which the files of one user are another's: as root, how steps' files are shared.

Sandboxes differ in uid, the files of workspaces outlive them, and an overlay copies up with the
owner that it finds. So the files on the disk belong to a user that nothing runs as, and each
sandbox sees them as its own. See mount_setattr(2); Linux 5.12, for tmpfs 6.3.
"""

import ctypes
import os
import struct
from typing import Final

from dayfly import lockdown

SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_MOUNT_SETATTR = 428, 429, 442  # on every machine
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH: Final = 4
AT_FDCWD, AT_EMPTY_PATH = -100, 0x1000
MOUNT_ATTR_IDMAP: Final = 0x00100000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def clones(places: list[str], owner: int, user: int) -> list[int]:
    """Mounts of *places*, attached nowhere yet, in which what is *owner*'s is *user*'s.

    They are the caller's to close. Raises OSError.
    """
    found: list[int] = []
    space = _user_namespace(owner, user)
    try:
        attributes = struct.pack("=QQQQ", MOUNT_ATTR_IDMAP, 0, 0, space)
        for place in places:
            flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC
            tree = _call(SYS_OPEN_TREE, AT_FDCWD, os.fsencode(place), flags, what=place)
            found.append(tree)
            what = f"{place} has a file system without id-mapped mounts"
            _call(SYS_MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH, attributes, 32, what=what)
    except BaseException:
        for tree in found:
            os.close(tree)
        raise
    finally:
        os.close(space)
    return found


def attach(tree: int, place: str) -> None:
    """Mount what `clones` has returned, in the mount namespace that the caller has by now."""
    to = os.fsencode(place)
    _call(SYS_MOVE_MOUNT, tree, b"", AT_FDCWD, to, MOVE_MOUNT_F_EMPTY_PATH, what=place)


def _user_namespace(owner: int, user: int) -> int:
    """One that maps *owner* to *user*, and has nobody in it. Takes 3 ms."""
    born, birth = os.pipe()
    mapped, mapping = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(mapping)
            lockdown.unshare(lockdown.CLONE_NEWUSER)
            os.write(birth, b"x")
            os.read(mapped, 1)
        finally:
            os._exit(0)
    os.close(birth)
    os.close(mapped)
    try:
        if not os.read(born, 1):
            raise OSError("no user namespace can be made")
        for name in ("uid_map", "gid_map"):
            lockdown.write(f"/proc/{pid}/{name}", f"{owner} {user} 1".encode())
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(born)
        os.close(mapping)
        os.waitpid(pid, 0)


def _call(number: int, *arguments: int | bytes, what: str) -> int:
    packed = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *packed))
    return lockdown.check(result, what)
