"""Connections to the porters of pods: see `dayfly.porter` for the other end."""

import asyncio
import secrets
import socket
from collections.abc import Callable
from typing import Final, cast

from dayfly import greeting
from dayfly_pool.driver import Exit
from dayfly_pool.errors import SandboxStartFailed

ANSWER_S_MAX: Final = 5.0
KNOCK_S: Final = 0.02
"""Between two tries to reach a porter that is not up yet."""

LOST_S_MAX: Final = 5.0
"""How long a pod's node may say nothing before its connections count as broken."""

KEEP_ALIVE: Final = {
    getattr(socket, "TCP_KEEPIDLE", 4): 2,
    getattr(socket, "TCP_KEEPINTVL", 5): 1,
    getattr(socket, "TCP_KEEPCNT", 6): 3,
}
"""A node that is gone says nothing: then what is idle breaks after `LOST_S_MAX`."""

USER_TIMEOUT: Final = getattr(socket, "TCP_USER_TIMEOUT", 18)
"""The same for what is being sent. Not to the guest: it may be too busy to read for longer, which
this counts as well. So the line tells of both; the porter always reads."""


class _TurnedAway(ValueError):
    """It has closed the connection: there were too many at once, or it is no porter."""


class Line(asyncio.Protocol):
    """Our end of the line to a porter: reports in, orders out."""

    def __init__(self, on_report: Callable[[int, Exit], None], on_loss: Callable[[], None]) -> None:
        self._on_report, self._on_loss = on_report, on_loss
        self._data = b""
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def to(
        cls,
        place: tuple[str, int],
        secret: bytes,
        on_report: Callable[[int, Exit], None],
        on_loss: Callable[[], None],
        *,
        has_function: bool,
    ) -> "Line":
        """The line to the porter at *place*. Raises `SandboxStartFailed`."""
        end = await greeted(place, secret, greeting.LINE, has_function=has_function)
        end.setsockopt(socket.IPPROTO_TCP, USER_TIMEOUT, int(LOST_S_MAX * 1000))
        made = cls(on_report, on_loss)
        await asyncio.get_running_loop().create_connection(lambda: made, sock=end)
        return made

    def order(self, what: bytes) -> None:
        """TERMINATE or KILL; nothing, when it is broken."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(what)

    def hang_up(self) -> None:
        """Let go of it; nothing is told any more."""
        self._on_report, self._on_loss = lambda what, exit_: None, lambda: None
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._data += data
        size = greeting.REPORT.size
        while len(self._data) >= size:
            what, code, kills, peak = greeting.REPORT.unpack_from(self._data)
            self._data = self._data[size:]
            self._on_report(what, Exit(code, kills, peak))

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._on_loss()


async def greeted(
    place: tuple[str, int], secret: bytes, kind: int, *, has_function: bool
) -> socket.socket:
    """A connection to a porter that knows the secret. Raises `SandboxStartFailed`.

    The caller limits how long it waits for one that is not up, or has too many callers.
    """
    while True:
        end = await _connected(place)
        try:
            async with asyncio.timeout(ANSWER_S_MAX):
                await _greet(end, secret, kind, has_function=has_function)
            return end
        except _TurnedAway:
            end.close()
            await asyncio.sleep(KNOCK_S)
        except (OSError, ValueError) as error:  # a TimeoutError is an OSError
            end.close()
            why = str(error) or "no answer"
            raise SandboxStartFailed(f"the pod's porter at {place[0]}: {why}") from error
        except BaseException:
            end.close()
            raise


async def _greet(end: socket.socket, secret: bytes, kind: int, *, has_function: bool) -> None:
    loop = asyncio.get_running_loop()
    nonce = secrets.token_bytes(greeting.NONCE_BYTES)
    try:
        await loop.sock_sendall(end, greeting.opening(kind, nonce))
        answer = await _read(end, greeting.ANSWER.size)
    except ConnectionError as error:
        raise _TurnedAway(str(error)) from error
    found, proof = greeting.read_answer(secret, kind, nonce, answer)
    if found != has_function:
        raise ValueError("it holds another function than is written down")
    await loop.sock_sendall(end, proof)


async def _connected(place: tuple[str, int]) -> socket.socket:
    """Knock until somebody opens; the caller limits how long."""
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
    while True:
        end = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in KEEP_ALIVE.items():
                end.setsockopt(socket.IPPROTO_TCP, option, value)
            await loop.sock_connect(end, place)
            return end
        except OSError:
            end.close()
            await asyncio.sleep(KNOCK_S)
        except BaseException:
            end.close()
            raise


async def _read(end: socket.socket, size: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < size:
        more = await loop.sock_recv(end, size - len(data))
        if not more:
            raise _TurnedAway("it turned us away")
        data += more
    return data
