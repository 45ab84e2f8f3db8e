"""Counts its calls: what a module keeps, a warm sandbox still knows at the next call."""

import time

started = time.time()
calls = 0


def handler(event, context):
    global calls
    calls += 1
    return {"calls": calls, "warm_for_s": round(time.time() - started, 3)}
