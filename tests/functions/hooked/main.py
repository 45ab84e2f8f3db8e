"""Hooks of a function that is forked, and where they have run; RAISES names one that fails."""

import os

import dayfly

ran = []


@dayfly.before_zygote
def before():
    print("before")
    ran.append(["before", os.getpid()])
    if os.environ.get("RAISES") == "before":
        raise ValueError("before is broken")


@dayfly.after_fork
def after():
    print("after")
    ran.append(["after", os.getpid()])
    if os.environ.get("RAISES") == "after":
        raise ValueError("after is broken")


def handler(event, context):
    return {"ran": ran, "pid": os.getpid()}
