import json

RESPONSES = {
    "json": {"a": [1, "ü", None]},
    "str": "plain ü",
    "bytes": b"\x00\xff",
    "none": None,
    "list": [1, 2],
    "status": {"statusCode": 201, "body": "made"},
    "status text": {"statusCode": "418", "body": "teapot"},
    "headers": {
        "statusCode": 200,
        "headers": {"X-One": "1", "Content-Type": "text/csv", "X-Number": 7},
        "multiValueHeaders": {"X-Many": ["a", "b"]},
        "body": "a,b",
    },
    "cookies": {"statusCode": 200, "cookies": ["a=1; HttpOnly", "b=2"], "body": ""},
    "binary": {
        "statusCode": 200,
        "headers": {"Content-Type": "image/png"},
        "isBase64Encoded": True,
        "body": "iVBORw0KGgo=",
    },
    "object body": {"statusCode": 200, "body": {"x": 1}},
    "no content": {"statusCode": 204, "body": "never sent"},
    "no body": {"statusCode": 200},
    "internal headers": {
        "statusCode": 200,
        "headers": {
            "Dayfly-Start": "forged",
            "Connection": "upgrade",
            "Transfer-Encoding": "chunked",
            "Content-Length": "1",
            "Server": "forged",
        },
        "body": "whole",
    },
    "1 MiB": "x" * (1 << 20),
}


def handler(event, context):
    if "rawPath" not in event:
        return RESPONSES[event]
    return RESPONSES[json.loads(event["body"])]
