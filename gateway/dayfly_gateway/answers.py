"""What the handlers of the admin plane have in common."""

from typing import Any

import msgspec
from aiohttp import web

from dayfly_pool.errors import BadInput
from dayfly_pool.models import Metadata
from dayfly_pool.store.events import PAGE_MAX


def metadata(request: web.Request) -> Metadata:
    """The namespace and name that its path gives. Raises `BadInput`."""
    return named(request.match_info["namespace"], request.match_info["name"])


def named(namespace: str, name: str) -> Metadata:
    """What has this name. Raises `BadInput` when it is none."""
    try:
        return msgspec.convert({"namespace": namespace, "name": name}, Metadata)
    except msgspec.ValidationError as error:
        raise BadInput(
            f"{error}: names are lower-case letters, digits and dashes, at most 63"
        ) from None


def number(request: web.Request, name: str, default: int, most: int) -> int:
    """What its query says for *name*. Raises `BadInput`."""
    text = request.query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and int(text[:12]) <= most):
        raise BadInput(f"{name} is a number up to {most}")
    return int(text)


def limit(request: web.Request) -> int:
    """How many a page is to have. Raises `BadInput`."""
    found = number(request, "limit", 100, PAGE_MAX)
    if not found:
        raise BadInput(f"limit is a number from 1 to {PAGE_MAX}")
    return found


def json(value: Any, status: int = 200) -> web.Response:
    """*value* as JSON."""
    return web.Response(
        status=status,
        body=msgspec.json.encode(value),
        headers={"Content-Type": "application/json"},
    )
