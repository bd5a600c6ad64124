"""The formats in which events leave: what a sink sends of an event whose detail is made.

    native       EventBridge's envelope around the detail; a bus that makes the envelope itself is given the detail
    cloudevents  a CloudEvent 1.0 in the JSON format's structured mode, with the detail as its ``data``; the same is
                 the Detail on a bus that makes an envelope of its own
    debezium     the detail alone, which `figbridge.forward.debezium` made: a change event's value, as in Kafka

A format is a class of events: whoever holds an event needs not know which. docs/formats.md shows them.
https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/formats/json-format.md
"""

import functools
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Final

import orjson

from figbridge.event import Event, utc

_HEAD: Final = b'{"specversion":"1.0","id":'
_DATA: Final = b',"datacontenttype":"application/json","data":'


class CloudEvent(Event):
    """An event that leaves as a CloudEvent: ``type`` is its detail-type, ``subject`` its key.

    ``partitionkey`` is the extension of that name: https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/extensions/partitioning.md
    """

    __slots__ = ()

    def body_size(self) -> int:
        """See `Event.body_size`."""
        return len(_HEAD) + len(_attributes(self)) + len(self.detail) + 1

    def content_size(self) -> int:
        """See `Event.content_size`."""
        return self.body_size()

    @staticmethod
    def bodies(events: Sequence[Event]) -> list[bytes]:
        """See `Event.bodies`."""
        return [b"%b%b%b}" % (_HEAD, _attributes(event), event.detail) for event in events]

    @staticmethod
    def contents(events: Sequence[Event]) -> list[bytes]:
        """See `Event.contents`."""
        return CloudEvent.bodies(events)


class DebeziumEvent(Event):
    """An event whose detail is the whole message. Its id and key are in it, its source and detail-type are not."""

    __slots__ = ()

    def body_size(self) -> int:
        """See `Event.body_size`."""
        return len(self.detail)

    @staticmethod
    def bodies(events: Sequence[Event]) -> list[bytes]:
        """See `Event.bodies`."""
        return [event.detail for event in events]


KINDS: Final[Mapping[str, type[Event]]] = {"native": Event, "cloudevents": CloudEvent, "debezium": DebeziumEvent}


def _attributes(event: Event) -> bytes:
    """What stands between the head and the data."""
    key = orjson.dumps(event.key)
    names, time = _names(event.source, event.detail_type), _time(event.time)
    return b'%b,%b,"subject":%b,"partitionkey":%b,"time":%b%b' % (orjson.dumps(event.id), names, key, key, time, _DATA)


@functools.lru_cache(maxsize=4096)
def _names(source: str, detail_type: str) -> bytes:
    return orjson.dumps({"source": source, "type": detail_type})[1:-1]


@functools.lru_cache(maxsize=64)
def _time(time: datetime) -> bytes:
    return utc(time)
