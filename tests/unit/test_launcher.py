"""The launcher and what zygotes say: believed about themselves and what was asked of them."""

import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from dayfly_pool.drivers.launcher import Launcher


class Talk:
    """A launcher, its server's end, and two zygotes that say whatever they like."""

    def __init__(self) -> None:
        self.server, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.server.setblocking(False)
        self.launcher = Launcher(theirs)
        self.zygotes = {
            name: socket.socket(fileno=self.launcher._connect(name)) for name in ("one", "other")
        }

    def say(self, zygote: str, answer: object, *descriptors: int) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        socket.send_fds(self.zygotes[zygote], [data], list(descriptors))
        self.launcher._hear(zygote)

    def told(self) -> list[dict[str, Any]]:
        """All that the server has been told since it asked last."""
        found = []
        while True:
            try:
                found.append(json.loads(self.server.recv(65536)))
            except BlockingIOError:
                return found

    def close(self) -> None:
        for end in (self.server, self.launcher._control, *self.zygotes.values()):
            end.close()
        for end in self.launcher._zygotes.values():
            end.close()
        self.launcher._selector.close()
        os.close(self.launcher._null)


@pytest.fixture
def talk() -> Iterator[Talk]:
    talk = Talk()
    yield talk
    talk.close()


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\xff",
        b"{",
        [],
        5,
        {},
        {"say": "exited", "sandbox": "asked"},
        {"say": "exited", "sandbox": "asked", "code": "x"},
        {"say": "refused", "sandbox": []},
        b"[" * 4000,
    ],
    ids=repr,
)
def test_a_zygote_that_says_nonsense_is_left_and_nobody_else(
    talk: Talk, capfd: pytest.CaptureFixture[str], nonsense: object
):
    talk.launcher._asked["asked"] = "one", []
    talk.say("one", nonsense)

    assert set(talk.launcher._zygotes) == {"other"}
    assert [(t["say"], t["sandbox"]) for t in talk.told()] == [("refused", "asked")]
    assert "one says nonsense" in capfd.readouterr().err
    talk.say("other", {"say": "ready"})
    assert talk.told() == [{"say": "ready", "sandbox": "other"}]


@pytest.mark.parametrize("say", ["exited", "refused"])
def test_a_zygote_is_not_believed_about_what_was_asked_of_another(talk: Talk, say: str):
    talk.launcher._asked["asked"] = "other", []
    talk.say("one", {"say": say, "sandbox": "asked", "code": 0, "why": "no"})

    assert talk.told() == []
    assert talk.launcher._asked == {"asked": ("other", [])}
    assert talk.launcher._codes == {}


@pytest.mark.parametrize("sandbox", ["unknown", "asked"])
def test_a_fork_that_was_not_asked_of_it_is_killed(talk: Talk, sandbox: str):
    """Given up meanwhile, or another's: nobody would know of it."""
    talk.launcher._asked["asked"] = "other", []
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(theirs)
        os.read(ours, 1)  # until it is killed, or this test is over
        os._exit(0)
    pidfd = os.pidfd_open(pid)
    talk.say("one", {"say": "forked", "sandbox": sandbox}, pidfd)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    for descriptor in (pidfd, ours, theirs):
        os.close(descriptor)
    assert talk.launcher._forked == {}
    assert talk.told() == []


@pytest.mark.parametrize("what", ["the dead", "a pipe"])
def test_a_fork_that_was_not_asked_for_may_be_dead_or_none(talk: Talk, what: str):
    """Every other sandbox would die with the launcher."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    pidfd = os.pidfd_open(pid)
    os.waitpid(pid, 0)
    talk.say("one", {"say": "forked", "sandbox": "unknown"}, pidfd if what == "the dead" else ours)

    for descriptor in (pidfd, ours, theirs):
        os.close(descriptor)
    assert set(talk.launcher._zygotes) == {"one", "other"}


def test_descriptors_that_nobody_asked_for_are_closed(talk: Talk):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        talk.say("one", {"say": "ready"}, 0)

    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("is_deaf", [False, True])
def test_a_server_that_is_gone_is_the_end_whether_it_heard_all_or_not(talk: Talk, is_deaf: bool):
    """The kernel calls a connection reset that was closed with something unread in it."""
    if is_deaf:
        talk.launcher._tell({"say": "ready", "sandbox": "one"})
    talk.server.close()

    assert not talk.launcher._serve()
