"""Greets whoever is named in the JSON body, in the query, or in the event of a direct invoke."""

import json


def handler(event, context):
    body = json.loads(event.get("body") or "{}")
    query = event.get("queryStringParameters", {})
    name = body.get("name") or query.get("name") or event.get("name") or "world"
    print(f"greeting {name}")
    return {"message": f"Hello, {name}!"}
