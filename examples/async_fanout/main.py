"""Does many things at once with asyncio; one sandbox serves twenty such calls at the same time."""

import asyncio
import json


async def fetch(number):
    await asyncio.sleep(0.1)  # stands for a call to something slow
    return number * number


async def handler(event, context):
    width = min(int(json.loads(event.get("body") or "{}").get("width", 10)), 1000)
    squares = await asyncio.gather(*(fetch(number) for number in range(width)))
    return {"sum": sum(squares), "width": width}
