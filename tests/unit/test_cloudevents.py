"""CloudEvents from HTTP and brokers, and of what is none."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dayfly_gateway import cloudevents
from dayfly_gateway.cloudevents import BadCloudEvent
from dayfly_gateway.triggers.source import Delivery

NAMED = {"ce-specversion": "1.0", "ce-id": "1", "ce-source": "/shop", "ce-type": "order"}
PLAIN = {"specversion": "1.0", "id": "1", "source": "/shop", "type": "order"}
STRUCTURED = {"content-type": "application/cloudevents+json; charset=utf-8"}


def test_binary_and_structured_messages_are_the_same_event():
    binary = cloudevents.parse(
        NAMED | {"content-type": "application/json", "ce-traceparent": "00-1"}, b'{"n": 1}'
    )
    told = PLAIN | {"datacontenttype": "application/json", "traceparent": "00-1", "data": {"n": 1}}
    structured = cloudevents.parse(STRUCTURED, json.dumps(told).encode())

    assert binary == structured == told


@pytest.mark.parametrize(
    ("media", "body", "expected"),
    [
        ("text/plain", b"hi", {"data": "hi"}),
        ("application/octet-stream", b"\xff\x00", {"data_base64": "/wA="}),
        ("application/vnd.x+json", b"[1]", {"data": [1]}),
    ],
)
def test_data_is_told_as_what_it_is(media: str, body: bytes, expected: dict[str, Any]):
    event = cloudevents.parse(NAMED | {"content-type": media}, body)
    assert event == PLAIN | {"datacontenttype": media} | expected


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, b""),
        ({"content-type": "application/json"}, b"{}"),
        ({"content-type": "application/cloudevents-batch+json"}, b"[]"),
        ({"content-type": "application/cloudevents+avro"}, b"x"),
        (STRUCTURED, b"[]"),
        (STRUCTURED, b"nope"),
        (STRUCTURED, b"\xff"),
        (STRUCTURED, b"[" * 100_000),
        (STRUCTURED, json.dumps(PLAIN | {"specversion": "0.7"}).encode()),
        (STRUCTURED, json.dumps(PLAIN | {"id": ""}).encode()),
        (STRUCTURED, json.dumps(PLAIN | {"id": 1}).encode()),
        (STRUCTURED, json.dumps(PLAIN | {"time": 5}).encode()),
        (STRUCTURED, json.dumps(PLAIN | {"data_base64": "!!"}).encode()),
        (NAMED | {"ce-time": "yesterday"}, b""),
        (NAMED | {"ce-bad_name": "x"}, b""),
        ({n: v for n, v in NAMED.items() if n != "ce-id"}, b""),
        ({n: v for n, v in NAMED.items() if n != "ce-type"}, b""),
    ],
)
def test_what_is_no_event_is_refused_by_name(headers: dict[str, str], body: bytes):
    with pytest.raises(BadCloudEvent) as caught:
        cloudevents.parse(headers, body)
    assert caught.value.detail


@given(
    st.dictionaries(st.sampled_from([*NAMED, "content-type", "ce-time", "ce-x"]), st.text()),
    st.binary(),
)
def test_foreign_bytes_are_an_event_or_refused(headers: dict[str, str], body: bytes):
    try:
        assert cloudevents.encode(cloudevents.parse(headers, body))
    except BadCloudEvent:
        pass


def test_a_message_that_is_none_becomes_the_data_of_one():
    delivery = Delivery(
        id="s/7",
        topic="orders.eu",
        body=b'{"n": 1}',
        at=0.5,
        headers={"traceparent": "00-1", "x-order_id": "7", "id": "no", "long": "x" * 2000, "-": ""},
    )
    assert cloudevents.of_delivery(delivery, "nats", "default/orders") == {
        "specversion": "1.0",
        "id": "s/7",
        "source": "/triggers/default/orders",
        "type": "dev.dayfly.nats",
        "subject": "orders.eu",
        "time": "1970-01-01T00:00:00.500Z",
        "traceparent": "00-1",
        "xorderid": "7",
        "datacontenttype": "application/json",
        "data": {"n": 1},
    }
    assert cloudevents.of_delivery(Delivery(id="", topic="", body=b"\xff"), "mqtt", "a/b")[
        "data_base64"
    ]


@pytest.mark.parametrize("prefix", ["ce-", "ce_", "cloudEvents:", "cloudEvents_", ""])
def test_a_message_that_is_one_is_given_as_it_is(prefix: str):
    headers = {prefix + name: value for name, value in PLAIN.items()}
    delivery = Delivery(id="x", topic="t", body=b'{"n": 1}', headers=headers)
    assert cloudevents.of_delivery(delivery, "kafka", "a/b") == PLAIN | {"data": {"n": 1}}


def test_a_message_that_says_it_is_one_and_is_not_is_refused():
    delivery = Delivery(id="x", topic="t", body=b"", headers={"ce-specversion": "1.0"})
    with pytest.raises(BadCloudEvent, match="no id"):
        cloudevents.of_delivery(delivery, "nats", "a/b")
