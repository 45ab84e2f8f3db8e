"""Waiting for what a test is about, with a limit."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any


async def until(is_so: Callable[[], object], limit_s: float = 20.0) -> None:
    """Look again and again."""
    async with asyncio.timeout(limit_s):
        while True:
            if is_so():
                return
            await asyncio.sleep(0.005)


@asynccontextmanager
async def running(*work: Coroutine[Any, Any, Any]) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """*work* beside the body, cancelled at its end."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in work]
        yield tasks
        for task in tasks:
            task.cancel()
