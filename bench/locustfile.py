"""A load of several functions with a Zipf mix: the first is called most, the last hardly ever.

make load          (against a running `make run`; DAYFLY_HTTP and DAYFLY_URL name another server)
"""

import io
import json
import os
import random
import urllib.request
import zipfile

from locust import FastHttpUser, between, events, task

FUNCTIONS = 20
EXPONENT = 1.1
ADMIN = os.environ.get("DAYFLY_URL", "http://127.0.0.1:8081")
WEIGHTS = [1 / (rank + 1) ** EXPONENT for rank in range(FUNCTIONS)]
SOURCE = """
import json

def handler(event, context):
    return {"statusCode": 200, "body": json.dumps({"sum": sum(range(%d))})}
"""


def ask(method: str, path: str, body: bytes) -> dict[str, str]:
    """One call of the admin plane."""
    request = urllib.request.Request(ADMIN + path, body, method=method)
    with urllib.request.urlopen(request, timeout=60) as response:
        return dict(json.load(response))


@events.test_start.add_listener
def deploy(**_: object) -> None:
    """Deploy the functions that the users call."""
    for rank in range(FUNCTIONS):
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            archive.writestr("main.py", SOURCE % (rank * 100))
        spec = {
            "handler": "main:handler",
            "package": ask("POST", "/packages", data.getvalue())["digest"],
        }
        ask("PUT", f"/namespaces/default/functions/load-{rank}", json.dumps(spec).encode())


class Caller(FastHttpUser):
    """One client."""

    host = os.environ.get("DAYFLY_HTTP", "http://127.0.0.1:8080")
    wait_time = between(0.0, 0.02)

    @task
    def call(self) -> None:
        """One request to a function drawn from the mix."""
        (rank,) = random.choices(range(FUNCTIONS), WEIGHTS)
        self.client.post(f"/fn/load-{rank}", json={}, name="/fn/load-[rank]")
