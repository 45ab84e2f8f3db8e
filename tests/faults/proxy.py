"""A wire that can be cut: what goes through it stands still, or ends, when a test says so."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any


class Proxy:
    """Passes connections on to *port* of *host*. Use it as a context manager.

    It listens at *at*: at the same port, if that is another address.
    """

    def __init__(self, port: int, host: str = "127.0.0.1", at: str = "127.0.0.1") -> None:
        self._to, self._at = (host, port), (at, 0 if at == host else port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._wires: set[asyncio.Task[None]] = set()
        self._flows: asyncio.Event
        self._is_cut, self._delay_s = False, 0.0
        self.port = 0

    def hold(self) -> None:
        """Nothing passes, in either direction, and nobody is told; new connections wait too."""
        self._do(self._set(flows=False, is_cut=False))

    def cut(self) -> None:
        """Every connection ends, and new ones do at once."""
        self._do(self._set(flows=True, is_cut=True))

    def mend(self) -> None:
        """As if nothing had been; what stood still goes on."""
        self._do(self._set(flows=True, is_cut=False))

    def slow(self, delay_s: float) -> None:
        """Whatever passes, in either direction, takes so long."""
        self._delay_s = delay_s

    async def _set(self, *, flows: bool, is_cut: bool) -> None:
        self._is_cut = is_cut
        if flows:
            self._flows.set()
        else:
            self._flows.clear()
        if is_cut:
            for wire in list(self._wires):
                wire.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = asyncio.current_task()
        assert wire is not None
        self._wires.add(wire)
        to: asyncio.StreamWriter | None = None
        try:
            await self._flows.wait()
            if self._is_cut:
                return
            opening = asyncio.ensure_future(asyncio.open_connection(*self._to))
            try:
                back, to = await asyncio.shield(opening)
            except asyncio.CancelledError:
                opening.add_done_callback(_abort)
                raise
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pass(reader, to))
                tasks.create_task(self._pass(back, writer))
        except (OSError, BaseExceptionGroup, asyncio.CancelledError):  # cut: by one end, or by us
            pass
        finally:
            self._wires.discard(wire)
            for end in (writer, to):
                if end is not None:
                    end.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if self._delay_s:
                await asyncio.sleep(self._delay_s)
            await self._flows.wait()
            writer.write(data)
            await writer.drain()
        raise ConnectionError("one end has closed")

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> asyncio.Server:
        self._flows = asyncio.Event()
        self._flows.set()
        return await asyncio.start_server(self._accept, *self._at)

    def __enter__(self) -> "Proxy":
        self._thread.start()
        self._server = self._do(self._listen())
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        self._is_cut = True
        await asyncio.sleep(0)  # whoever connected just now has a wire
        while wires := list(self._wires):
            for wire in wires:
                wire.cancel()
            await asyncio.wait(wires, timeout=5)


def _abort(opened: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> None:
    if not opened.cancelled() and opened.exception() is None:
        opened.result()[1].transport.abort()
