import logging
import os
import subprocess
import sys
import threading


def handler(event, context):
    print("by print", event)
    print("by stderr", file=sys.stderr)
    logging.getLogger("mine").warning("by logging")
    subprocess.run(["/bin/echo", "by a child"], check=True)
    os.write(1, b"by descriptor 1\n")
    os.write(2, b"by descriptor 2\n")
    thread = threading.Thread(target=print, args=("by a thread",))
    thread.start()
    thread.join()
    sys.stdout.write("without a newline")
    return "said"
