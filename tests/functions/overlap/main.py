import asyncio

barrier = None


async def handler(event, context):
    """Ends only when ten of us run at the same moment, in this one process."""
    global barrier
    barrier = barrier or asyncio.Barrier(10)
    place = await barrier.wait()
    print("passed", place)
    return {"place": place, "id": context.aws_request_id}
