"""Looks for what another function left."""

import builtins
import json
import os
import random
import signal
import socket
import sys

MARK = "left-behind"


def reaches(address):
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(address)
        return True
    except OSError:
        return False


def handler(event, context):
    found = []
    for place, folders, files in os.walk("/"):
        if place.startswith(("/proc", "/usr")):
            folders.clear()
        found += [os.path.join(place, name) for name in folders + files if MARK in name]
    for entry in os.listdir("/proc"):
        for name in ("cmdline", "environ", "comm"):
            try:
                with open(f"/proc/{entry}/{name}", "rb") as file:
                    if MARK.encode() in file.read():
                        found.append(f"/proc/{entry}/{name}")
            except OSError:
                pass
    found += [a for a in (f"\0{MARK}", f"/tmp/{MARK}.sock") if reaches(a)]
    found += [str(m) for m in (builtins, json, random) if hasattr(m, "MARK")]
    if json.dumps([1]) != "[1]":
        found.append("json.dumps")
    if MARK in sys.path or "MARK" in os.environ or os.getcwd() != "/code":
        found.append("interpreter state")
    umask = os.umask(0o22)
    if umask == 0 or signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL:
        found.append("process state")
    return found
