"""From one stream of Redis to another: `dayfly apply -f examples/on_redis`."""


def handler(event, context):
    """What this returns is told to the stream `thumbnails`, as dayfly.yaml says."""
    if "specversion" not in event:
        return "I run when something is uploaded: dayfly apply -f examples/on_redis\n"
    photo = event["data"]
    scale = 128 / max(photo["width"], photo["height"])
    size = round(photo["width"] * scale), round(photo["height"] * scale)
    print(f"{photo['name']} becomes {size[0]} by {size[1]}")
    return {"name": photo["name"], "size": size}
