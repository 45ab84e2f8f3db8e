"""Says numbers as people do, with a library that requirements.txt asks for."""

import json

import humanize


def handler(event, context):
    body = json.loads(event.get("body") or "{}")
    number = body.get("bytes", 5_368_709_120)
    return {"bytes": number, "said": humanize.naturalsize(number, binary=True)}
