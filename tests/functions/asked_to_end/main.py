"""Takes SIGTERM as an occasion to change its name, and goes on."""

import ctypes
import os
import signal
import time

libc = ctypes.CDLL(None)
PR_SET_NAME = 15


def rename(name):
    libc.prctl(PR_SET_NAME, name, 0, 0, 0)


def handler(event, context):
    signal.signal(signal.SIGTERM, lambda *_: rename(b"was-asked"))
    if event != "alone":
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if event == "with an orphan" and os.fork():
                os._exit(0)
            while True:
                time.sleep(60)
        if event == "with an orphan":
            os.waitpid(pid, 0)
    rename(b"is-working")
    while True:
        time.sleep(60)
