"""What a task returned as it is kept: one line of JSON, whatever its sandbox has sent."""

from typing import Any, Final

import msgspec

from dayfly_pool.errors import BadInput

DEPTH_MAX: Final = 100
"""Who reads results has such a limit too: `jq` has 256, Python about 1000."""


def line_of(body: bytes) -> bytes:
    """*body* on one line, its numbers as they were written.

    Raises `BadInput` for what is not one JSON value in UTF-8, or is nested too deeply.
    """
    try:
        value = msgspec.json.decode(body)
        # a bracket in a text is counted too: that costs a second look, no more
        if len(body) > DEPTH_MAX and body.count(b"[") + body.count(b"{") > DEPTH_MAX:
            _check_depth(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"what it returned is no JSON: {error}") from None
    if b"\n" in body or b"\r" in body:
        return bytes(msgspec.json.format(body, indent=-1))
    return body


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEPTH_MAX):
        below: list[Any] = []
        for each in level:
            children = each.values() if isinstance(each, dict) else each
            below += [child for child in children if isinstance(child, dict | list)]
        if not below:
            return
        level = below
    raise BadInput(f"what it returned is nested more than {DEPTH_MAX} deep")
