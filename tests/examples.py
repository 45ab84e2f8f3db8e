"""The examples that listen, as whoever reads about them runs them: on one machine or a cluster."""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml
from standardwebhooks.webhooks import Webhook
from tests.brokers import Place
from tests.harness import DAYFLY, ROOT, Reply, Server, eventually

from dayfly_pool.brokers import FolderSource

EXAMPLES: Final = ROOT / "examples"
README: Final = (EXAMPLES / "README.md").read_text()
ADDRESSES: Final = ("url", "servers", "server", "path", "queue")
"""Which field of a source says where the broker is; the first that there is."""

NUMBER: Final = 20
LONG_S: Final = 60.0
COMMAND_S_MAX: Final = 120
KEY: Final = "whsec_" + base64.b64encode(b"a secret of thirty-two bytes....").decode()


class Example(NamedTuple):
    """What is published to *place*, by number, and the line that the function then writes."""

    place: str
    body: Callable[[int], Any]
    line: str
    is_meant: Callable[[int], bool] = lambda _: True
    headers: dict[str, str] = {}  # noqa: RUF012 (nobody changes it)
    is_ordered: bool = False
    dead: tuple[bytes, ...] = ()
    """What else is published, and ends as a dead letter."""


LISTENING: Final = {
    "nats": Example(
        "orders",
        lambda n: {"item": "lamp", "number": n},
        "packing {n} of lamp",
        dead=(b'{"item": "unicorn", "number": 1}',),
    ),
    "redis": Example(
        "uploads",
        lambda n: {"name": f"cat-{n}.jpg", "width": 1024, "height": 512},
        "cat-{n}.jpg becomes 128 by 64",
    ),
    "rabbitmq": Example(
        "mails",
        lambda n: f"Table {n} is yours",
        "mail to ada@example.org: Table {n} is yours",
        headers={"To": "ada@example.org"},
    ),
    "kafka": Example(
        "accounts",
        lambda n: {"account": "ada", "cents": n},
        "ada: +{n} cents",
        is_ordered=True,
    ),
    "mqtt": Example(
        "rooms/kitchen/temperature",
        lambda n: {"celsius": 40 - n},
        "cooling the kitchen: it has {hot} degrees",
        is_meant=lambda n: 40 - n > 30,
    ),
    "sqs": Example(
        "bookings",
        lambda n: {"name": "Ada", "euros": n + 0.5},
        "booked {n}.50 euros for Ada",
        dead=(b'{"name": "Ada"}',),
    ),
    "postgres": Example(
        "welcomes",
        lambda n: {"name": "Ada", "number": n},
        "welcome, Ada, number {n}",
    ),
    "folder": Example(
        "inbox",
        lambda n: f"item,number\nlamp,{n}\ntable,1\n",
        "order-{n}.csv: {more} things in 2 rows",
    ),
}


def said(example: Example, number: int) -> str:
    return example.line.format(n=number, hot=40 - number, more=number + 1)


def dayfly(server: Server, *arguments: str, text: str = "") -> str:
    """What the command says."""
    command = [str(DAYFLY), *arguments, "--url", f"http://{server.admin}"]
    env = os.environ | ({"DAYFLY_TOKEN": server.token} if server.token else {})
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, timeout=COMMAND_S_MAX, env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def trigger_of(folder: Path) -> Any:
    """What the folder declares besides its function."""
    (file,) = (file for file in folder.glob("*.yaml") if file.name != "dayfly.yaml")
    return yaml.safe_load(file.read_text())


def copied(name: str, to: Path, address: str = "") -> Path:
    """The example's folder with another address in the place of the one that it has."""
    folder = Path(shutil.copytree(EXAMPLES / name, to / name))
    if address:
        spec = trigger_of(folder)["spec"][name.removeprefix("on_")]
        old = next(spec[field] for field in ADDRESSES if field in spec)
        for file in folder.glob("*.yaml"):
            file.write_text(file.read_text().replace(old, address))
        assert address in str(trigger_of(folder))
    return folder


@contextmanager
def applied(server: Server, folder: Path) -> Iterator[str]:
    """Function and trigger, in one go; the name that both have. Gone at the end."""
    name, trigger = folder.name.replace("_", "-"), trigger_of(folder)["metadata"]["name"]
    told = dayfly(server, "apply", "-f", str(folder))
    assert f"Function default/{name} version " in told
    assert f"Trigger default/{trigger} " in told
    try:
        yield name
    finally:
        server.ask("DELETE", f"/namespaces/default/triggers/{trigger}")
        assert server.delete(name).status in (200, 204)
    assert not server.errors()


def status(server: Server, trigger: str) -> Any:
    found = server.ask("GET", "/triggers").json()
    return next(view["status"] for view in found if view["metadata"]["name"] == trigger)


def lines(server: Server, name: str) -> list[str]:
    return [line["text"] for line in server.logs(name) if line["stream"] == "stdout"]


def states(server: Server, name: str) -> list[str]:
    found = server.ask("GET", f"/events?function=default/{name}&limit=1000").json()
    return [event["state"] for event in found]


def content(example: Example, number: int) -> bytes:
    body = example.body(number)
    return body.encode() if isinstance(body, str) else json.dumps(body).encode()


async def publish_all(place: Place, example: Example) -> int:
    """How many messages that were."""
    for number in range(1, NUMBER + 1):
        if isinstance(place.spec, FolderSource):
            (Path(place.spec.path) / f"order-{number}.csv").write_bytes(content(example, number))
        else:
            await place.publish(content(example, number), example.headers)
    for body in example.dead:
        await place.publish(body, example.headers)
    return NUMBER + len(example.dead)


async def listens(server: Server, folder: Path, place: Place) -> None:
    """Each message is run, acknowledged, and nothing is said about it but by the function."""
    example = LISTENING[folder.name.removeprefix("on_")]
    assert said(example, 2) in README
    with applied(server, folder) as function:
        assert eventually(lambda: status(server, function).get("up"), LONG_S), server.ask(
            "GET", "/triggers"
        ).body
        published = await publish_all(place, example)
        assert eventually(lambda: status(server, function)["acknowledged"] >= published, LONG_S), (
            status(server, function)
        )

        shown = status(server, function)
        meant = [number for number in range(1, NUMBER + 1) if example.is_meant(number)]
        expected = [said(example, number) for number in meant]
        ran = [line for line in lines(server, function) if line in expected]
        assert ran == expected if example.is_ordered else sorted(ran) == sorted(expected)
        assert (shown["acknowledged"], shown["lastError"]) == (published, "")
        assert shown["filtered"] == NUMBER - len(meant)
        assert (shown["filterErrors"], shown["refused"], shown["failures"]) == (0, 0, 0)
        assert states(server, function).count("dead") == len(example.dead)
        assert not {"waiting", "running"} & set(states(server, function))


# ---- what is sent, and what comes by itself -----------------------------------------------------


def over(server: Server, reply: Reply) -> list[str]:
    """What became of the events that were accepted."""
    assert reply.status == 202, reply.body
    paths = [f"/invocations/{id_}" for id_ in reply.json()["accepted"]]
    wait = {"Prefer": "wait=20"}
    return [server.ask("GET", path, headers=wait, plane="http").json()["state"] for path in paths]


def takes_webhooks(server: Server, folder: Path) -> None:
    """Its secret is KEY. What is signed is run, once; what is forged is refused."""
    body = b'{"type": "invoice.paid", "data": {"name": "Ada", "euros": 42}}'
    at = datetime.now(UTC)
    headers = {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(KEY).sign("msg_1", at, body.decode()),
    }
    with applied(server, folder) as function:
        path = "/hooks/default/on-webhook"
        refused = server.ask("POST", path, body + b" ", headers=headers, plane="http")
        sent = [server.ask("POST", path, body, headers=headers, plane="http") for _ in range(2)]

        assert refused.status == 401
        assert [over(server, reply) for reply in sent] == [["succeeded"]] * 2
        assert lines(server, function) == ["paid: 42 euros by Ada"]
        assert "paid: 42 euros by Ada" in README


def takes_events(server: Server, folder: Path) -> None:
    """Those that its filter means, and no others."""

    def post(id_: str, kind: str, euros: int) -> Reply:
        event = {"specversion": "1.0", "id": id_, "source": "/shop", "type": kind}
        headers = {"Content-Type": "application/cloudevents+json"}
        body = json.dumps(event | {"data": {"euros": euros}}).encode()
        return server.ask("POST", "/events", body, headers=headers, plane="http")

    with applied(server, folder) as function:
        assert over(server, post("6", "order.placed", 999)) == []
        assert over(server, post("8", "order.paid", 2000)) == []
        assert over(server, post("7", "order.placed", 1200)) == ["succeeded"]
        assert lines(server, function) == ["big order 7: 1200 euros from /shop"]
        assert "big order 7: 1200 euros from /shop" in README


def fires(server: Server, folder: Path) -> None:
    """Each second, as nobody waits for a minute."""
    file = folder / "schedule.yaml"
    file.write_text(file.read_text().replace('"* * * * *"', '"* * * * * *"'))
    with applied(server, folder) as function:
        wrote = eventually(lambda: lines(server, function))

        assert wrote
        assert wrote[0].startswith("reporting to ada@example.org for 20")
        assert "reporting to ada@example.org for 20" in README
