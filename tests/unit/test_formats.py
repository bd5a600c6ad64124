"""What leaves in each format: sizes, and CloudEvents as the official SDK reads them."""

import json
from datetime import UTC, datetime

import pytest
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent as Read
from hypothesis import given
from hypothesis import strategies as st

from conformance.events import ODD_DETAILS, event
from figbridge.event import Event
from figbridge.formats import KINDS, CloudEvent

TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
TIME = st.datetimes(datetime(1970, 1, 1), datetime(2100, 1, 1)).map(lambda it: it.replace(tzinfo=UTC))  # noqa: DTZ001


def cloud(it: Event) -> Event:
    return tuple.__new__(CloudEvent, it)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@given(TEXT, TEXT, TIME | TIME.map(lambda time: time.replace(microsecond=0)), st.lists(TEXT, max_size=2).map(tuple))
def test_the_size_of_a_body_is_its_length(
    kind: type[Event], name: str, key: str, time: datetime, resources: tuple[str, ...]
) -> None:
    made = tuple.__new__(kind, Event(name, name[::-1], "t", key, time, b'{"a":1}', None, False, resources))
    assert made.body_size() == len(made.body())
    assert made.content_size() == len(made.contents([made])[0])
    assert made.bodies([made, made]) == [made.body()] * 2


@pytest.mark.parametrize("detail", ODD_DETAILS.values(), ids=ODD_DETAILS)
def test_the_official_sdk_reads_a_cloud_event(detail: bytes) -> None:
    sent = cloud(event(7, detail=detail, key='shop.orders:{"id":"ä\\"\\n"}'))
    for body in (sent.body(), sent.contents([sent])[0]):
        read = JSONFormat().read(Read, body)  # raises CloudEventValidationError
        assert read.get_specversion() == "1.0"
        assert (read.get_id(), read.get_source(), read.get_type()) == (sent.id, sent.source, sent.detail_type)
        assert read.get_subject() == read.get_extension("partitionkey") == sent.key
        assert read.get_time() == sent.time
        assert read.get_datacontenttype() == "application/json"
        assert read.get_data() == json.loads(sent.detail)


def test_not_a_digit_of_the_detail_is_touched() -> None:
    detail = b'{"a":12.50,"b":0.10,"c":123456789012345678901234567890.12}'
    assert cloud(event(1)._replace(detail=detail)).body().endswith(b'"data":' + detail + b"}")


def test_a_format_survives_a_change_of_the_event() -> None:
    """A claim check takes the place of a large event, and leaves in the same format."""
    assert type(cloud(event(1))._replace(detail=b"{}")) is CloudEvent


def test_resources_are_where_eventbridge_has_them() -> None:
    arn = "arn:aws:rds:eu-west-1:123456789012:db:shop"
    assert json.loads(event(1, resources=(arn,)).body())["resources"] == [arn]
    assert "resources" not in json.loads(event(1).body())
