import ctypes
import os
import random
import secrets
import tempfile
import uuid


def handler(event, context):
    """What two sandboxes must not have in common."""
    with open("/proc/self/maps") as file:
        maps = file.read().splitlines()
    where = {line.split()[-1]: line.partition("-")[0] for line in maps if len(line.split()) > 5}
    with open("/proc/self/auxv", "rb") as file:
        auxv = file.read()
    words = [int.from_bytes(auxv[i : i + 8], "little") for i in range(0, len(auxv), 8)]
    at_random = dict(zip(words[::2], words[1::2]))[25]
    return {
        "random": random.random(),
        "Random": random.Random().random(),
        "hash": hash("x"),
        "urandom": os.urandom(8).hex(),
        "secrets": secrets.token_hex(8),
        "uuid4": str(uuid.uuid4()),
        "tempfile": next(tempfile._get_candidate_names()),
        "canary": ctypes.string_at(at_random, 16).hex(),
        "heap": where["[heap]"],
        "stack": where["[stack]"],
        "libc": next(at for path, at in where.items() if "libc" in path),
        "object": id(object()),
    }
