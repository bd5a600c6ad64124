"""Claim checks: an event too large for its sink is kept in S3, and a small one that says where takes its place.

Invariant: the object is durable before the event that names it is sent. It is the whole message, under a name made
from the event's id, so a repetition writes the same object again and nothing has to be cleaned up after a crash.

The small event has the id, source, detail-type and time of the large one. Of its detail is left what routing and order
need: id, op, schema, table, key, position, committed_at; and ``claim_check``: bucket, key, bytes, sha256. Objects are
not deleted: give the prefix a lifecycle rule that outlasts every consumer and replay.
https://docs.aws.amazon.com/AmazonS3/latest/API/API_PutObject.html
"""

import hashlib
import json
from decimal import Decimal
from typing import Any, Final

import orjson

from figbridge.config import ClaimCheckSection
from figbridge.errors import SinkError, SinkRefused, SinkUnavailable
from figbridge.event import Event
from figbridge.transports import aws
from figbridge.transports.awsclient import Client

_KEPT: Final = ("id", "op", "schema", "table", "key", "position", "committed_at", "hops")
_KEPT_OF_DEBEZIUM: Final = ("figbridge", "op", "source", "ts_ms", "ts_us", "ts_ns", "transaction")


class ClaimChecks:
    """A bucket for large events. Raises BridgeError when made without a region or credentials."""

    def __init__(self, section: ClaimCheckSection) -> None:
        self._bucket = section.bucket
        self._prefix = section.prefix
        self._client = Client("s3", section)

    def check(self) -> None:
        """The bucket is there (HeadBucket). Raises SinkRefused, SinkUnavailable."""
        try:
            with aws.reading():
                self._client.boto.head_bucket(Bucket=self._bucket)
        except aws.ERRORS as error:
            raise self._translated(error, "s3:ListBucket") from error

    def deposit(self, event: Event) -> Event:
        """Put `event` into the bucket; the small event that takes its place. Raises SinkRefused, SinkUnavailable."""
        body = event.body()
        name = f"{self._prefix}{event.id}.json"
        try:
            with aws.reading():
                answer = self._client.boto.put_object(
                    Bucket=self._bucket, Key=name, Body=body, ContentType="application/json"
                )
                aws.proven(answer, "ETag")
        except aws.ERRORS as error:
            raise self._translated(error, "s3:PutObject") from error
        digest = hashlib.sha256(body).hexdigest()
        claim = {"bucket": self._bucket, "key": name, "bytes": len(body), "sha256": digest}
        return event._replace(detail=orjson.dumps({**_kept(event.detail), "claim_check": claim}))

    def close(self) -> None:
        """Close the client's connections."""
        self._client.close()

    def _translated(self, error: Exception, action: str) -> SinkError:
        code, retryable = aws.classify(error)
        resource = f"the bucket {self._bucket}"
        what = f"{action} on {resource}: {code}: {error}"
        if aws.expired(code):
            return self._client.expired(SinkUnavailable(what))
        if retryable:
            return SinkUnavailable(what, hint="nothing is lost; the bridge tries again")
        # HeadBucket has no body, so its errors have no code but the status
        code = {"404": "NoSuchBucket", "403": "AccessDenied"}.get(code, code)
        return SinkRefused(what, hint=aws.remedy(code, action=action, resource=resource))


def _kept(detail: bytes) -> dict[str, Any]:
    """What routing and order need. A number that a double may not hold is left out rather than changed."""
    try:
        whole = json.loads(detail, parse_float=Decimal)
    except ValueError:  # the sink's business, not ours: the object is there whatever it is
        return {}
    found = {}
    for name in dict.fromkeys((*_KEPT, *_KEPT_OF_DEBEZIUM)):
        if isinstance(whole, dict) and name in whole:
            try:
                orjson.dumps(whole[name])
            except TypeError:  # a Decimal, or an integer beyond 64 bits
                continue
            found[name] = whole[name]
    return found
