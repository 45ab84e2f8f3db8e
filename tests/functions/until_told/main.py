"""Works until a signal from outside says that it is done."""

import signal
import time

done = False


def tell(*_):
    global done
    done = True


signal.signal(signal.SIGUSR1, tell)


def handler(event, context):
    while event["seconds"] and not done:
        time.sleep(0.02)
    return "done"
