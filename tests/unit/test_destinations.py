"""Whom we tell: what one of them does is nothing to the others."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from dayfly_gateway import destinations as module
from dayfly_gateway.destinations import TOPICS_MAX, Teller
from dayfly_gateway.triggers.source import SourceFailed
from dayfly_pool.brokers import NatsTopic
from dayfly_pool.models import Destination, Failure, InvocationId, Outcome, Success
from dayfly_pool.store.secrets import Secrets


class FakeTopic:
    """A topic that is told when it may be; whoever it is *closed* under would never come back."""

    def __init__(self, topics: "Topics", spec: NatsTopic) -> None:
        self._topics, self.subject = topics, spec.subject
        self.opened = self.closed = self.telling = 0

    async def open(self) -> None:
        self.opened += 1
        await asyncio.sleep(0)
        if self._topics.is_down:
            raise SourceFailed("down")

    async def close(self) -> None:
        assert not self.telling, "closed under somebody"
        self.closed += 1

    async def tell(self, id_: str, body: bytes) -> None:
        self.telling += 1
        try:
            await self._topics.may_end.wait()
        finally:
            self.telling -= 1
        if body == b"too long":
            raise SourceFailed("too long")


class Topics:
    """All that were made."""

    def __init__(self) -> None:
        self.is_down = False
        self.may_end = asyncio.Event()
        self.made: list[FakeTopic] = []

    def make(self, spec: NatsTopic, secret: str) -> FakeTopic:
        self.made.append(FakeTopic(self, spec))
        return self.made[-1]


@pytest.fixture
async def topics(monkeypatch: pytest.MonkeyPatch) -> Topics:
    topics = Topics()
    monkeypatch.setattr(module, "adapter", lambda kind: SimpleNamespace(Topic=topics.make))
    return topics


@pytest.fixture
async def teller(tmp_path: Path) -> AsyncIterator[Teller]:
    async with Teller(Secrets(tmp_path)).running() as teller:
        yield teller


async def publish(teller: Teller, subject: str, body: bytes = b"{}") -> Outcome:
    where = Destination(nats=NatsTopic(subject=subject))
    return await teller(where, "default", InvocationId("1"), body)


async def test_a_topic_is_not_closed_while_somebody_tells_it_something(
    topics: Topics, teller: Teller
):
    """When there are too many, the one that was used least lately is left, and closed later."""
    async with asyncio.TaskGroup() as tasks:
        first = tasks.create_task(publish(teller, "first"))
        while not (topics.made and topics.made[0].telling):  # noqa: ASYNC110
            await asyncio.sleep(0)
        more = [tasks.create_task(publish(teller, f"s{n}")) for n in range(TOPICS_MAX)]
        while sum(topic.telling for topic in topics.made) <= TOPICS_MAX:  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert topics.made[0].closed == 0
        topics.may_end.set()

    assert all(isinstance(each.result(), Success) for each in [first, *more])
    assert [topic.closed for topic in topics.made] == [1] + [0] * TOPICS_MAX


async def test_a_word_that_a_topic_does_not_take_takes_no_other_with_it(
    topics: Topics, teller: Teller
):
    topics.may_end.set()
    async with asyncio.TaskGroup() as tasks:
        words = [b"{}", b"too long", b"{}"]
        telling = [tasks.create_task(publish(teller, "s", word)) for word in words]

    kinds = [type(each.result()) for each in telling]
    assert kinds == [Success, Failure, Success]
    assert [(topic.opened, topic.closed) for topic in topics.made] == [(1, 1)]


async def test_of_those_who_wait_for_a_topic_that_is_down_one_tries(topics: Topics, teller: Teller):
    """And no connection is left that nobody knows of."""
    topics.is_down = True
    async with asyncio.TaskGroup() as tasks:
        telling = [tasks.create_task(publish(teller, "s")) for _ in range(16)]

    assert [each.result() for each in telling] == [Failure("NotTold", "down")] * 16
    (topic,) = topics.made
    assert (topic.opened, topic.closed > 0) == (1, True)


@asynccontextmanager
async def answering(answer: bytes | None, asked: list[bytes]) -> AsyncIterator[str]:
    """A URL that answers so, or never, and keeps connections."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(2)
                asked.append(head)
                if answer is not None:
                    writer.write(answer)
        except asyncio.IncompleteReadError:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1000)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    finally:
        server.close()
        await server.wait_closed()


async def test_what_one_answer_sets_is_sent_to_nobody(teller: Teller):
    """A session's cookies would be kept for ever, and be another tenant's at the same host."""
    asked: list[bytes] = []
    cookie = b"HTTP/1.1 204 No Content\r\nSet-Cookie: tenant=a; Path=/; Domain=localhost\r\n\r\n"
    async with answering(cookie, asked) as url:
        where = Destination(url=url.replace("127.0.0.1", "localhost"))
        for _ in range(2):
            assert isinstance(await teller(where, "x", InvocationId("1"), b"{}"), Success)

    assert not any(b"ookie" in head for head in asked)


async def test_those_who_never_answer_keep_no_other_from_being_told(teller: Teller):
    """How many are told at once is the queue's to say."""
    asked: list[bytes] = []
    async with answering(None, asked) as never, asyncio.TaskGroup() as tasks:
        where = Destination(url=never)
        telling = [
            tasks.create_task(teller(where, "x", InvocationId("1"), b"{}")) for _ in range(150)
        ]
        while len(asked) < 150:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        for each in telling:
            each.cancel()
