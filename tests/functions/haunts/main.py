"""Leaves processes where they are not looked for: in the groups of every sandbox of its own.

They stay in the zygote's pid namespace, so no sandbox takes them with it when it ends. WHO says
who: a child of the zygote's, one after the other as they are killed, itself, or its keeper.
"""

import mmap
import os
import signal

from dayfly import zygote

NAMESPACES = 7
WHO = os.environ["WHO"]
left = mmap.mmap(-1, 4096)
received = zygote.receive


def receive(control):
    request = received(control)
    if request is None:
        return None
    left[0] += 1
    groups = request["descriptors"][NAMESPACES:]
    if WHO == "a child":
        if os.fork() == 0:
            stay(groups)
    elif WHO == "one after the other":
        if os.fork() == 0:
            while True:
                if os.fork() == 0:
                    stay(groups)
                os.wait()
    else:
        enter(groups, {"itself": b"0", "its keeper": b"1"}[WHO])
    return request


def stay(groups):
    enter(groups, b"0")
    while True:
        signal.pause()


def enter(groups, pid):
    for group in groups:
        os.write(group, pid)


zygote.receive = receive


def handler(event, context):
    return left[0]
