"""The examples that listen, as a reader runs them: a real server, and real brokers."""

import base64
import importlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import yaml
from standardwebhooks.webhooks import Webhook
from tests.brokers import Place
from tests.brokers.redis import Redis
from tests.brokers.sqs import SECRET
from tests.contract.test_sources import BROKERS
from tests.harness import DAYFLY, ROOT, Reply, Server, eventually, free_port

from dayfly_gateway.up import deployable
from dayfly_pool.brokers import FolderSource

pytestmark = pytest.mark.waits

EXAMPLES: Final = ROOT / "examples"
README: Final = (EXAMPLES / "README.md").read_text()
ADDRESSES: Final = ("url", "servers", "server", "path", "queue")
"""Which field of a source says where the broker is; the first that there is."""

NUMBER: Final = 20
LONG_S: Final = 60.0


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
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
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


@pytest.mark.parametrize("broker", BROKERS)
async def test_an_example_does_what_its_line_says_with_all_that_is_published(
    server: Server, tmp_path: Path, broker: str
):
    """Each message is run, acknowledged, and nothing is said about it but by the function."""
    example, name = LISTENING[broker], f"on_{broker}"
    assert said(example, 2) in README
    if broker == "sqs":
        dayfly(server, "secret", "put", "sqs", text=SECRET)
    with getattr(importlib.import_module(f"tests.brokers.{broker}"), BROKERS[broker])() as up:
        place = await up.place(example.place)
        address = next(getattr(place.spec, f) for f in ADDRESSES if hasattr(place.spec, f))
        with applied(server, copied(name, tmp_path, address)) as function:
            assert eventually(lambda: status(server, function).get("up"), LONG_S)
            published = await publish_all(place, example)
            assert eventually(
                lambda: status(server, function)["acknowledged"] >= published, LONG_S
            ), status(server, function)

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


async def test_what_came_of_an_upload_is_told_to_the_stream_that_its_example_names(
    server: Server, tmp_path: Path
):
    with Redis() as up:
        place = await up.place("uploads")
        with applied(server, copied("on_redis", tmp_path, place.spec.url)):
            await place.publish(b'{"name": "cat.jpg", "width": 256, "height": 256}')
            await place.publish(b'{"name": "nothing.jpg"}')
            for stream, kind in (("thumbnails", "succeeded"), ("no-thumbnails", "dead")):
                source = (await up.place(stream)).source()
                await source.open()
                (told,) = await source.fetch(1, 20.0)
                await source.close()
                assert json.loads(told.body)["type"] == f"dev.dayfly.event.{kind}"


# ---- what is sent, and what comes by itself -----------------------------------------------------


def over(server: Server, reply: Reply) -> list[str]:
    """What became of the events that were accepted."""
    assert reply.status == 202, reply.body
    paths = [f"/invocations/{id_}" for id_ in reply.json()["accepted"]]
    wait = {"Prefer": "wait=20"}
    return [server.ask("GET", path, headers=wait, plane="http").json()["state"] for path in paths]


def test_the_webhook_of_the_example_is_run_when_it_is_signed(server: Server, tmp_path: Path):
    key = "whsec_" + base64.b64encode(b"a secret of thirty-two bytes....").decode()
    dayfly(server, "secret", "put", "webhook", text=key)
    body = b'{"type": "invoice.paid", "data": {"name": "Ada", "euros": 42}}'
    at = datetime.now(UTC)
    headers = {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(key).sign("msg_1", at, body.decode()),
    }
    with applied(server, copied("on_webhook", tmp_path)) as function:
        path = "/hooks/default/on-webhook"
        forged = server.ask("POST", path, body + b" ", headers=headers, plane="http")
        sent = [server.ask("POST", path, body, headers=headers, plane="http") for _ in range(2)]

        assert forged.status == 401
        assert [over(server, reply) for reply in sent] == [["succeeded"]] * 2
        assert lines(server, function) == ["paid: 42 euros by Ada"]
        assert "paid: 42 euros by Ada" in README


def test_a_webhook_whose_secret_is_missing_is_refused_with_the_remedy(
    new_server: Callable[..., Server],
):
    server = new_server()
    command = [str(DAYFLY), "apply", "-f", str(EXAMPLES / "on_webhook")]
    done = subprocess.run(
        [*command, "--url", f"http://{server.admin}"], capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 1
    assert "dayfly secret put" in done.stderr


def test_the_events_that_the_example_means_are_run(server: Server, tmp_path: Path):
    def post(id_: str, kind: str, euros: int) -> Reply:
        event = {"specversion": "1.0", "id": id_, "source": "/shop", "type": kind}
        headers = {"Content-Type": "application/cloudevents+json"}
        body = json.dumps(event | {"data": {"euros": euros}}).encode()
        return server.ask("POST", "/events", body, headers=headers, plane="http")

    with applied(server, copied("on_event", tmp_path)) as function:
        assert over(server, post("6", "order.placed", 999)) == []
        assert over(server, post("8", "order.paid", 2000)) == []
        assert over(server, post("7", "order.placed", 1200)) == ["succeeded"]
        assert lines(server, function) == ["big order 7: 1200 euros from /shop"]
        assert "big order 7: 1200 euros from /shop" in README


def test_the_schedule_of_the_example_runs_its_function(server: Server, tmp_path: Path):
    """Each second, as nobody waits for a minute."""
    folder = copied("report", tmp_path)
    file = folder / "schedule.yaml"
    file.write_text(file.read_text().replace('"* * * * *"', '"* * * * * *"'))
    with applied(server, folder) as function:
        wrote = eventually(lambda: lines(server, function))

        assert wrote
        assert wrote[0].startswith("reporting to ada@example.org for 20")
        assert "reporting to ada@example.org for 20" in README


# ---- all of them --------------------------------------------------------------------------------


def test_every_example_is_deployed_by_one_command_and_answers_whoever_calls_it(
    new_server: Callable[..., Server], tmp_path: Path
):
    """No broker is there: that is what a trigger's status is for, and nobody else minds."""
    names = [path.name for path in deployable(EXAMPLES)]
    for folder in filter(Path.is_dir, EXAMPLES.iterdir()):
        assert f"| [{folder.name}]" in README
    server = new_server("--deploy", str(EXAMPLES))
    functions = [name.replace("_", "-") for name in names]
    assert eventually(
        lambda: sum('"try it"' in line for line in server.log) == len(names), LONG_S
    ), server.log

    for name, function in zip(names, functions, strict=True):
        answer = server.call(function)
        assert answer.status == 200, (name, answer.body)
        if any(file.name != "dayfly.yaml" for file in (EXAMPLES / name).glob("*.yaml")):
            assert f"dayfly apply -f examples/{name}" in answer.body.decode()
    for broker in sorted(LISTENING.keys() - {"folder"}):
        if broker == "sqs":
            dayfly(server, "secret", "put", "sqs", text=SECRET)
        spec = trigger_of(EXAMPLES / f"on_{broker}")["spec"][broker]
        address = str(next(spec[field] for field in ADDRESSES if field in spec))
        nowhere = f"port={free_port()} {address}" if broker == "postgres" else moved(address)
        dayfly(server, "apply", "-f", str(copied(f"on_{broker}", tmp_path, nowhere)))
    for broker in LISTENING.keys() - {"folder"}:
        assert eventually(lambda b=broker: status(server, f"on-{b}")["lastError"], LONG_S), broker
        assert server.call(f"on-{broker}").status == 200


def moved(address: str) -> str:
    """The same with a port on which nobody listens."""
    before, _, after = address.partition("127.0.0.1:")
    return f"{before}127.0.0.1:{free_port()}{after.lstrip('0123456789')}"
