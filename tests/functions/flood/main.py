import os
import sys
import time

CHUNK = b"z" * 65535 + b"\n"


def handler(event, context):
    """Writes as many MiB as it is told, by descriptor or by print; says how long that took."""
    started = time.monotonic()
    for _ in range(event["mib"] * 16):
        if event["by"] == "print":
            print("y" * 65535)
        else:
            os.write(1, CHUNK)
    print("the end", file=sys.stderr)
    return time.monotonic() - started
