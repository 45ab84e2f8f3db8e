"""The examples that listen, as a reader runs them: a real server, and real brokers."""

import importlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.brokers.redis import Redis
from tests.brokers.sqs import SECRET
from tests.contract.test_sources import BROKERS
from tests.examples import (
    ADDRESSES,
    EXAMPLES,
    KEY,
    LISTENING,
    LONG_S,
    README,
    applied,
    copied,
    dayfly,
    fires,
    listens,
    status,
    takes_events,
    takes_webhooks,
    trigger_of,
)
from tests.harness import DAYFLY, Server, eventually, free_port

from dayfly_gateway.up import deployable

pytestmark = pytest.mark.waits


@pytest.mark.parametrize("broker", BROKERS)
async def test_an_example_does_what_its_line_says_with_all_that_is_published(
    server: Server, tmp_path: Path, broker: str
):
    if broker == "sqs":
        dayfly(server, "secret", "put", "sqs", text=SECRET)
    with getattr(importlib.import_module(f"tests.brokers.{broker}"), BROKERS[broker])() as up:
        place = await up.place(LISTENING[broker].place)
        address = next(getattr(place.spec, f) for f in ADDRESSES if hasattr(place.spec, f))
        await listens(server, copied(f"on_{broker}", tmp_path, address), place)


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


def test_the_webhook_of_the_example_is_run_when_it_is_signed(server: Server, tmp_path: Path):
    dayfly(server, "secret", "put", "webhook", text=KEY)
    takes_webhooks(server, copied("on_webhook", tmp_path))


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
    takes_events(server, copied("on_event", tmp_path))


def test_the_schedule_of_the_example_runs_its_function(server: Server, tmp_path: Path):
    fires(server, copied("report", tmp_path))


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
