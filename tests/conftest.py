"""Servers for the tests that need a real one. Shared wherever a test leaves its server well."""

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.harness import Server

CLUSTER = "DAYFLY_TEST_KUBECONFIG"
"""Names the cluster for tests. Not KUBECONFIG: custom resources are taken away there."""

CANARY = "DAYFLY-CANARY-" + os.urandom(8).hex()
"""In the environment of every server: no function may ever see it."""

IMPATIENT = {
    "generic_min": 2,
    "init_timeout_s": 2.0,
    "grace_s": 0.5,
    "queue_s_max": 20.0,
    "header_s_max": 1.0,
    "body_s_grace": 1.0,
    "write_s_max": 1.0,
}
"""Deadlines that a test can wait for."""


def pytest_configure(config: pytest.Config) -> None:
    """Makes a run like any other, whoever started it and whatever runs beside it.

    A shell has what it starts in the background ignore SIGINT, and that is inherited. And pytest
    tidies up the folders of earlier runs, all at one place, where runs side by side meet.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.option.basetemp is None:
        config.option.basetemp = tempfile.mkdtemp(prefix="dayfly-tests-")
        config.add_cleanup(partial(shutil.rmtree, config.option.basetemp, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a cluster is skipped where there is none."""
    if CLUSTER not in os.environ:
        for item in items:
            if item.get_closest_marker("cluster"):
                item.add_marker(pytest.mark.skip(reason=f"{CLUSTER} names no cluster"))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The one `dayfly up` of the session, real sandboxes and all."""
    env = {"DAYFLY_TEST_SECRET": CANARY}
    arguments = ("--foreign-namespace", "strangers")
    with Server(tmp_path_factory.mktemp("server"), *arguments, env=env) as up:
        yield up


@pytest.fixture(scope="session")
def process_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same with the driver that isolates nothing."""
    data = tmp_path_factory.mktemp("process")
    with Server(data, "--generic-min", "1", driver="process") as up:
        yield up


@pytest.fixture(params=["linux", "process"])
def anywhere(request: pytest.FixtureRequest) -> Server:
    """Each driver in turn: what a function sees must not depend on it."""
    name = "server" if request.param == "linux" else "process_server"
    found: Server = request.getfixturevalue(name)
    return found


@pytest.fixture(scope="session")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose deadlines are short."""
    with Server(tmp_path_factory.mktemp("impatient"), settings=IMPATIENT) as up:
        yield up


@pytest.fixture
def new_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Makes servers for this test alone; they are stopped, and looked after, at its end."""
    with ExitStack() as stack:

        def make(*arguments: str, **more: Any) -> Server:
            data = more.pop("data", tmp_path / "data")
            minimum = () if "settings" in more else ("--generic-min", "1")
            return stack.enter_context(Server(data, *minimum, *arguments, **more))

        yield make
