"""Messages in other clothes than EventBridge's: the same event, or one that the configuration makes an envelope for."""

import json
from typing import Any

import pytest

from figbridge.config import BareSection
from figbridge.reverse.bare import Bare
from figbridge.reverse.message import Malformed, parse

ENVELOPE = {"id": "e-1", "source": "shop.next", "detail-type": "order", "detail": {"n": 1}}
SYSTEM = {"ContentType": "application/eventbridge+json", "aws:EventId": "bus-1", "EventGroupId": "g"}


def section(**paths: str) -> Bare:
    given = {"id": "change_id", "source": "'shop.next'", "detail-type": "kind", **paths}
    return Bare(BareSection.model_validate(given))


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def test_a_custom_event_bus_delivers_the_envelope_raw_or_beside_its_metadata() -> None:
    beside = {"Data": ENVELOPE, "Metadata": {"tenant": "acme"}, "SystemMetadata": SYSTEM}
    assert parse(dumped(beside)) == parse(dumped(ENVELOPE))


def test_an_envelope_without_an_id_has_that_of_the_bus() -> None:
    data = {name: value for name, value in ENVELOPE.items() if name != "id"}
    assert parse(dumped({"Data": data, "SystemMetadata": SYSTEM})).id == "bus-1"


def test_raw_data_of_a_custom_event_bus_is_the_detail() -> None:
    message = {"Data": {"n": 1}, "Metadata": {"kind": "order"}, "SystemMetadata": SYSTEM}
    bare = section(**{"id": 'SystemMetadata."aws:EventId"', "detail-type": "Metadata.kind"})
    assert parse(dumped(message), bare)[:3] == ("bus-1", "shop.next", "order")
    assert parse(dumped(message), bare).document["detail"] == {"n": 1}


def test_what_a_transformer_made_is_the_detail() -> None:
    received = parse(b'{"change_id": 12345678901234567890, "kind": "order", "total": 1.10}', section())
    assert received[:3] == ("12345678901234567890", "shop.next", "order")
    assert str(received.document["detail"]["total"]) == "1.10"


def test_an_envelope_stays_one_also_where_bare_messages_are_taken() -> None:
    assert parse(dumped(ENVELOPE), section()) == parse(dumped(ENVELOPE))


def test_without_the_section_it_is_malformed_and_the_section_is_named() -> None:
    with pytest.raises(Malformed, match=r"reverse\.bare"):
        parse(b'{"change_id": 1}')


@pytest.mark.parametrize("body", [b"{}", b'{"change_id": null, "kind": "x"}', b'{"change_id": true, "kind": "x"}',
                                  b'{"change_id": [1], "kind": "x"}', b'{"change_id": "", "kind": "x"}',
                                  b'{"change_id": "a\\u0000", "kind": "x"}', b"[1]", b"1"])  # fmt: skip
def test_a_message_that_does_not_say_what_it_is_is_malformed(body: bytes) -> None:
    with pytest.raises(Malformed):
        parse(body, section())
