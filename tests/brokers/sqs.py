"""Amazon SQS as moto has it, in memory."""

import base64
import functools
import os
import sys
import urllib.request
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, Final

from aiobotocore.session import AioSession
from tests.brokers import Broker

from dayfly_gateway.triggers.sqs import Source, Topic
from dayfly_pool.brokers import SqsSource, SqsTopic

SECRET: Final = "testing:hunter2"
AMBIENT: Final = {
    "AWS_ACCESS_KEY_ID": "ambient",
    "AWS_SECRET_ACCESS_KEY": "ambient",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/nowhere",
    "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
}
"""What boto finds when there is no secret."""

fresh = count()


@functools.cache
def session() -> AioSession:
    """One for all: it reads for a third of a second."""
    return AioSession()


def client(url: str) -> Any:
    """A client that is not the adapter's. Use it as a context manager."""
    return session().create_client(
        "sqs",
        region_name="us-east-1",
        endpoint_url=url,
        aws_access_key_id="testing",
        aws_secret_access_key="hunter2",
    )


class Sqs(Broker):
    """See `tests.brokers`."""

    name = "sqs"
    survives = False
    has_order = False

    def command(self) -> list[str]:
        """See `Broker`."""
        program = Path(sys.executable).parent / "moto_server"
        return [str(program), "-H", "127.0.0.1", "-p", str(self.port)]

    def start(self) -> None:
        """See `Broker`: it listens long before it answers for the first time."""
        super().start()
        urllib.request.urlopen(
            f"http://127.0.0.1:{self.port}/moto-api/data.json", timeout=60
        ).close()

    async def place(self, name: str, attributes: Mapping[str, str] | None = None) -> "Place":
        """A queue of its own each time: it is purged once a minute at most."""
        url, name = f"http://127.0.0.1:{self.port}", f"{next(fresh)}-{name}"
        async with client(url) as sqs:
            made = await sqs.create_queue(QueueName=name, Attributes=dict(attributes or {}))
        return Place(url, made["QueueUrl"], name)

    def __enter__(self) -> Broker:
        self._before = {name: os.environ.get(name) for name in AMBIENT}
        os.environ.update(AMBIENT)
        return super().__enter__()

    def __exit__(self, *about: object) -> None:
        super().__exit__(*about)
        for name, value in self._before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


class Place:
    """See `tests.brokers.Place`."""

    def __init__(self, url: str, queue: str, name: str) -> None:
        self.spec, self.topic_spec = SqsSource(queue=queue), SqsTopic(queue=queue)
        self._url, self._name = url, name

    async def publish(self, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """See `tests.brokers.Place`: as the adapter's docstring says that bodies travel."""
        headers = dict(headers or {})
        if not body or not body.isascii() or b"\0" in body:
            body, headers["dayfly-encoding"] = base64.b64encode(body) or b" ", "base64"
        attributes = {n: {"DataType": "String", "StringValue": v} for n, v in headers.items()}
        await self.send(MessageBody=body.decode(), MessageAttributes=attributes)

    async def send(self, **message: Any) -> None:
        """A message as SQS has it."""
        async with client(self._url) as sqs:
            await sqs.send_message(QueueUrl=self.spec.queue, **message)

    def source(self, lease_s: float = 30.0, call_s: float = 10.0) -> Source:
        """See `tests.brokers.Place`."""
        return Source(self.spec, self._name, SECRET, lease_s, call_s)

    def topic(self) -> Topic:
        """See `tests.brokers.Place`."""
        return Topic(self.topic_spec, SECRET)
