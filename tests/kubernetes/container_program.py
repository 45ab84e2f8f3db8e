"""What a user's own image runs in these tests: given to `python3 -c`, nothing of ours in it.

Over HTTP it answers with what it was asked, and does what the path says.
"""

import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ALL_HERE = threading.Barrier(4)


class Handler(BaseHTTPRequestHandler):
    """Each connection has a thread of its own."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Only what we print is in the log."""

    def do_POST(self) -> None:
        """Say what was asked; or crash, be large, wait for others."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        match self.path.partition("?")[0]:
            case "/crash":
                print("last words", flush=True)
                os._exit(3)
            case "/big":
                said = b"x" * int(body)
            case "/meet":
                said = json.dumps(ALL_HERE.wait(20)).encode()
            case "/memory":
                said = bytes(len(b"x" * (1 << 30)))
            case _:
                told = {
                    "method": self.command,
                    "path": self.path,
                    "headers": {name.lower(): value for name, value in self.headers.items()},
                    "size": len(body),
                    "uid": os.getuid(),
                    "greeting": os.environ.get("GREETING"),
                    "token": os.path.exists("/var/run/secrets/kubernetes.io"),
                }
                said = json.dumps(told).encode()
        self.send_response(201)
        self.send_header("X-Own", "yes")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    do_GET = do_POST


def serve() -> None:
    """On $PORT, until SIGTERM."""
    time.sleep(float(os.environ.get("STARTS_S", "0")))
    server = ThreadingHTTPServer(("0.0.0.0", int(os.environ["PORT"])), Handler)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    server.serve_forever()


def work() -> None:
    """One task: index 1 fails the first time."""
    index, retry = os.environ["JOB_INDEX"], os.environ["JOB_INDEX_RETRY_COUNT"]
    print(f"task {index} of {os.environ['JOB_ARRAY_SIZE']}, try {retry}", file=sys.stderr)
    if index == "1" and retry == "0":
        sys.exit("not yet")
    with open(os.environ["DAYFLY_RESULT"], "w") as file:
        file.write(json.dumps({"index": int(index), "item": os.environ.get("JOB_ITEM")}))


if __name__ == "__main__":
    work() if "JOB_INDEX" in os.environ else serve()
