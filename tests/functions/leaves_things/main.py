"""Leaves something in every place it can think of, under one name."""

import atexit
import builtins
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile

MARK = "left-behind"
held = []


def tried(work):
    try:
        work()
        return True
    except OSError:
        return False


def write(path):
    with open(path, "w") as file:
        file.write(MARK)


def listen(address):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    held.append(listener)


def handler(event, context):
    places = {
        path: tried(lambda path=path: write(path))
        for path in (
            f"/tmp/{MARK}",
            f"/dev/shm/{MARK}",
            f"/var/tmp/{MARK}",
            f"/run/{MARK}",
            f"/code/{MARK}",
            f"/packages/{MARK}",
            f"/environment/{MARK}",
            f"/dayfly/{MARK}",
            f"/{MARK}",
            f"{tempfile.gettempdir()}/other-{MARK}",
            f"{os.path.expanduser('~')}/.{MARK}",
        )
    }
    places["abstract socket"] = tried(lambda: listen(f"\0{MARK}"))
    places["path socket"] = tried(lambda: listen(f"/tmp/{MARK}.sock"))
    process = [sys.executable, "-c", f"import time; time.sleep(3600); '{MARK}'"]
    held.append(subprocess.Popen(process, start_new_session=True, stdout=-3, stderr=-3))
    builtins.MARK = json.MARK = random.MARK = MARK
    json.dumps = lambda *a, **k: MARK
    os.environ["MARK"] = MARK
    sys.path.insert(0, MARK)
    os.umask(0)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    random.seed(7)
    atexit.register(print, MARK)
    places["cwd"] = tried(lambda: os.chdir("/tmp"))
    return {"statusCode": 200, "body": " ".join(sorted(p for p, done in places.items() if done))}
