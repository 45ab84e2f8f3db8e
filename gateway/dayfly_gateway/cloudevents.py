"""CloudEvents 1.0 as they come in: from HTTP, from brokers, and made of what is none.

A function is given every event in one form, the JSON format:
https://github.com/cloudevents/spec/blob/main/cloudevents/formats/json-format.md
"""

import base64
import binascii
import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from cloudevents.core.bindings.http import HTTPMessage, from_http_event
from cloudevents.core.formats.json import JSONFormat

from dayfly_gateway.triggers.source import Delivery
from dayfly_pool.errors import BadInput
from dayfly_pool.events import HOPS, rfc3339
from dayfly_pool.ids import new_id

STRUCTURED: Final = "application/cloudevents+json"
_PREFIXES: Final = ("ce_", "cloudevents:", "cloudevents_")
"""How attributes are called in the headers of Kafka and AMQP; MQTT has them without."""

EXTENSIONS_MAX, NAME_CHARACTERS_MAX, VALUE_CHARACTERS_MAX = 50, 20, 1024
"""Headers of a broker's message that its event has, and how long they may be."""

_ATTRIBUTES: Final = frozenset(
    ("specversion", "id", "source", "type", "subject", "time", "dataschema")
)
_RESERVED: Final = _ATTRIBUTES | {"data", "database64", "datacontenttype", "contenttype"}


class BadCloudEvent(BadInput):
    """This is no CloudEvent 1.0.

    Send `Content-Type: application/cloudevents+json` and the event in JSON, or its attributes as
    headers: ce-specversion, ce-id, ce-source, ce-type.
    """


def parse(headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """The event that an HTTP message is, in binary or structured mode; names in lower case.

    Raises `BadCloudEvent`.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    is_structured = kind.startswith("application/cloudevents")
    if is_structured and kind != STRUCTURED:
        raise BadCloudEvent(f"content type {kind[:100]!r}: one event at a time, in JSON")
    named = {name: value for name, value in headers.items() if name.startswith("ce-")}
    data: dict[str, Any] = {}
    if not is_structured and "ce-specversion" not in named:
        raise BadCloudEvent("neither content type application/cloudevents+json nor ce-specversion")
    try:
        if is_structured:
            told = json.loads(body)
            base64.b64decode(told.get("data_base64") or "", validate=True)
            named = {}
            if told.get("data") is not None and "data_base64" not in told:
                data = {"data": told.pop("data")}  # as it is: the library would copy it twice
                body = json.dumps(told).encode()
        else:
            told = {name.removeprefix("ce-"): value for name, value in named.items()}
            named["content-type"] = headers.get("content-type", "")
            named = {name: value for name, value in named.items() if value}
        if not told.get("id"):
            raise BadCloudEvent("it has no id")  # the library would make one up
        message = HTTPMessage(named or {"content-type": STRUCTURED}, body)
        event = json.loads(JSONFormat().write(from_http_event(message)))
    except BadCloudEvent:
        raise
    except binascii.Error:
        raise BadCloudEvent("data_base64 is not in base64") from None
    except Exception as error:  # the library lets through whatever its parsers raise
        why = f"{type(error).__name__}: {error}"[:500]  # and whatever the event has
        raise BadCloudEvent(why.encode(errors="backslashreplace").decode()) from None
    if "time" not in told:
        del event["time"]  # neither would it say when that was
    return dict(event) | data


def encode(event: Mapping[str, Any]) -> bytes:
    """The event in JSON. What JSON cannot say (infinity) is null. Raises `BadCloudEvent`."""
    try:
        return msgspec.json.encode(event)
    except UnicodeEncodeError:  # half a surrogate pair, as JSON may have it
        raise BadCloudEvent("it holds text that is no Unicode") from None
    except RecursionError:
        raise BadCloudEvent("it is nested too deep") from None


def hops(event: Mapping[str, Any]) -> int:
    """How many destinations of ours it has gone through, as the word to one outside says."""
    told = str(event.get(HOPS, "0"))
    return int(told) if re.fullmatch(r"[0-9]{1,3}", told) else 0


def of_delivery(delivery: Delivery, kind: str, trigger: str) -> dict[str, Any]:
    """The event that a broker's message is or, if it is none, one that has it as its data.

    *kind* is the broker's name, *trigger* the trigger's. Raises `BadCloudEvent` for a message that
    says that it is one, and is not.
    """
    headers = _as_http(delivery.headers)
    media = headers.get("content-type", "")
    if "ce-specversion" in headers or media.lower().startswith("application/cloudevents"):
        return parse(headers, delivery.body)
    event: dict[str, Any] = {
        "specversion": "1.0",
        "id": delivery.id or new_id(),
        "source": f"/triggers/{trigger}",
        "type": f"dev.dayfly.{kind}",
        "subject": delivery.topic,
    }
    if not delivery.topic:
        del event["subject"]
    if delivery.at:
        with contextlib.suppress(ValueError, OverflowError, OSError):  # who sends it says when
            event["time"] = rfc3339(delivery.at)
    return event | _data(delivery.body, media) | _extensions(delivery.headers, event)


def _extensions(headers: Mapping[str, str], event: Mapping[str, Any]) -> dict[str, str]:
    """A message's headers as attributes of the event: `X-Order-Id` is `xorderid`.

    Only what is short, and takes the place of nothing.
    """
    found: dict[str, str] = {}
    for name, value in headers.items():
        attribute = re.sub(r"[^a-z0-9]", "", name.lower())
        is_taken = attribute in event or attribute in _RESERVED or attribute in found
        is_long = len(attribute) > NAME_CHARACTERS_MAX or len(value) > VALUE_CHARACTERS_MAX
        if attribute and not is_taken and not is_long and len(found) < EXTENSIONS_MAX:
            found[attribute] = value
    return found


def _as_http(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers of a broker's message as those of HTTP."""
    found: dict[str, str] = {}
    for name, value in headers.items():
        lower = name.lower()
        for prefix in _PREFIXES:
            if lower.startswith(prefix):
                lower = f"ce-{lower.removeprefix(prefix)}"
        found[lower] = value
    if found.keys() >= {"specversion", "id", "source", "type"}:
        found |= {f"ce-{name}": found[name] for name in _ATTRIBUTES & found.keys()}
    return found


def _data(body: bytes, media: str) -> dict[str, Any]:
    """A body as an event's data: JSON when it is that, else text, else base64."""
    try:
        value = msgspec.json.decode(body)
        return {"datacontenttype": media or "application/json", "data": value}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass  # or it is nested deeper than we can look
    try:
        return {"datacontenttype": media or "text/plain", "data": body.decode()}
    except UnicodeDecodeError:
        kind = media or "application/octet-stream"
        return {"datacontenttype": kind, "data_base64": base64.b64encode(body).decode()}
