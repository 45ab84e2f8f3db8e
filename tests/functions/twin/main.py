"""What sandboxes that were forked after one import have in common, and what they must not."""

import os
import random
import secrets
import socket
import tempfile
import time
import uuid

TOKEN = uuid.uuid4().hex
generator = random.Random(7)
ALIKE = None
print("imported")
with open("/tmp/of-the-import", "w") as file:
    file.write(TOKEN)
listener = socket.socket(socket.AF_UNIX)
listener.bind("\0of-the-import")
listener.listen()
FORK = ""


def reaches(name):
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(f"\0{name}")
        except OSError:
            return False
    return True


def handler(event, context):
    global FORK, ALIKE
    if not FORK:
        FORK, ALIKE = os.urandom(8).hex(), generator.random()
    temporary = os.listdir("/tmp")
    time.sleep(event.get("seconds", 0))
    with open("/proc/self/status") as file:
        status = {name: value.strip() for name, _, value in (l.partition(":") for l in file)}
    return {
        "token": TOKEN,
        "version": os.environ.get("VERSION"),
        "alike": ALIKE,
        "differs": {
            "fork": FORK,
            "pid": os.getpid(),
            "random": random.random(),
            "Random": random.Random().random(),
            "urandom": os.urandom(8).hex(),
            "secrets": secrets.token_hex(8),
            "uuid1": str(uuid.uuid1()).split("-", 1)[1],
            "uuid4": str(uuid.uuid4()),
            "temporary name": next(tempfile._get_candidate_names()),
            **{
                name: os.readlink(f"/proc/self/ns/{name}")
                for name in ("pid", "mnt", "ipc", "uts", "cgroup", "net", "user")
            },
        },
        "jail": {
            "processes": len([name for name in os.listdir("/proc") if name.isdigit()]),
            "parent": os.getppid(),
            "temporary files": temporary,
            "shared files": os.listdir("/dev/shm"),
            "packages": os.listdir("/packages"),
            "working folder": os.getcwd(),
            "the import's socket": reaches("of-the-import"),
            "host name": os.uname().nodename,
            "ids": [os.getuid(), os.getgid()],
            **{
                name: int(status[name], 16)
                for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
            },
            "NoNewPrivs": status["NoNewPrivs"],
            "Seccomp": status["Seccomp"],
        },
    }
