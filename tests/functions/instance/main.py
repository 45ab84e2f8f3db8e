import os
import time
import uuid

INSTANCE = uuid.uuid4().hex
calls = 0


def handler(event, context):
    """Which sandbox this is, and for the how many-th time."""
    global calls
    calls += 1
    return {"instance": INSTANCE, "calls": calls, "version": os.environ.get("VERSION")}
