"""How a pool and a pod's porter make sure of one another, and what they say besides frames.

Nothing here performs I/O. Both know the pod's secret; it never travels. The pool begins:

    pool    MAGIC, kind, nonce                       23 bytes
    porter  nonce, has_function, mac("porter", ...)  49 bytes
    pool    mac("pool", ...)                         32 bytes

Each mac covers the kind, both nonces and what the porter says of its guest. Then the connection is
the guest's (kind GUEST: frames, see `dayfly.protocol`) or stays with the porter (kind LINE: the
pool's single-byte orders, the porter's reports; kind LEFT: everything is killed, and what a step
has left is sent, see `dayfly.freight`; the pool ends the connection when it has it).
"""

import hmac
import struct

MAGIC = b"DAYFLY"
NONCE_BYTES = 16
MAC_BYTES = 32
GUEST, LINE, LEFT = 1, 2, 3
KINDS = (GUEST, LINE, LEFT)
SECRET_BYTES_MIN = 32

OPENING = struct.Struct(f"!6sB{NONCE_BYTES}s")
ANSWER = struct.Struct(f"!{NONCE_BYTES}sB{MAC_BYTES}s")

TERMINATE, KILL = b"T", b"K"
"""Orders: SIGTERM to the guest; kill every process, and end."""

LEAVING, ENDED = 1, 2
"""Reports: the pod is being ended by others; the guest has ended."""

REPORT = struct.Struct("!BiIQ")
"""Which, the guest's exit code (negative: a signal), how many the kernel killed for their memory,
and the most bytes that were in use at once."""


def opening(kind: int, nonce: bytes) -> bytes:
    """The pool's first words."""
    return OPENING.pack(MAGIC, kind, nonce)


def read_opening(data: bytes) -> tuple[int, bytes]:
    """(kind, nonce). Raises ValueError for anything else than `opening` makes."""
    magic, kind, nonce = OPENING.unpack(data)
    if magic != MAGIC or kind not in KINDS:
        raise ValueError("this is no pool")
    return kind, nonce


def answer(secret: bytes, kind: int, theirs: bytes, ours: bytes, *, has_function: bool) -> bytes:
    """The porter's answer to a pool with the nonce *theirs*."""
    proof = _mac(secret, b"porter", kind, theirs, ours, has_function)
    return ANSWER.pack(ours, has_function, proof)


def read_answer(secret: bytes, kind: int, ours: bytes, data: bytes) -> tuple[bool, bytes]:
    """(has the guest ever been given a function, our proof). ValueError for an impostor."""
    theirs, state, proof = ANSWER.unpack(data)
    if state > 1 or not hmac.compare_digest(
        proof, _mac(secret, b"porter", kind, ours, theirs, bool(state))
    ):
        raise ValueError("it does not know the pod's secret")
    return bool(state), _mac(secret, b"pool", kind, ours, theirs, bool(state))


def is_pool(
    secret: bytes, kind: int, theirs: bytes, ours: bytes, proof: bytes, *, has_function: bool
) -> bool:
    """Whether *proof* is a pool's that knows the secret."""
    expected = _mac(secret, b"pool", kind, theirs, ours, has_function)
    return hmac.compare_digest(proof, expected)


def _mac(
    secret: bytes, who: bytes, kind: int, pool: bytes, porter: bytes, has_function: bool
) -> bytes:
    text = b"%s|%d|%s%s|%d" % (who, kind, pool, porter, has_function)
    return hmac.digest(secret, text, "sha256")
