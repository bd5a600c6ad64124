"""Dead letters in S3: one object each, whose name sorts by the time of the event.

    <prefix>20261125T213000.123456Z-000000016B374880-00000002-<letter's id>.json

Time and position are the event's own, so a letter that is repeated after a crash is written to the same name. Names are
listed in order, a page at a time, and each letter is read when its turn comes.

Rights: s3:PutObject, s3:GetObject and s3:ListBucket; to redrive and to discard s3:DeleteObject, too.
https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html
"""

import contextlib
from collections.abc import Generator, Iterator, Sequence
from datetime import UTC
from typing import Any, Final

from figbridge.config import S3DeadLetters
from figbridge.deadletter import DeadLetter, Kept, Unreadable, Wanted, dump, parse
from figbridge.errors import BridgeError, SinkError, SinkRefused, SinkUnavailable
from figbridge.transports import aws
from figbridge.transports.awsclient import Client

_DELETED_AT_ONCE: Final = 1000  # https://docs.aws.amazon.com/AmazonS3/latest/API/API_DeleteObjects.html
_PAGE: Final = 1000  # names listed at once; no more are possible
_ID: Final = 64  # hexadecimal digits
_SUFFIX: Final = ".json"
_GONE: Final = ("NoSuchKey", "404")


class S3DeadLetterStore:
    """A bucket and a prefix. Raises BridgeError when made without a region or credentials."""

    def __init__(self, section: S3DeadLetters) -> None:
        self._bucket, self._prefix = section.bucket, section.prefix
        self._client = Client("s3", section)
        self.name = f"s3://{section.bucket}/{section.prefix}"

    def add(self, letters: Sequence[DeadLetter]) -> None:
        """See `DeadLetters.add`. Raises SinkUnavailable, SinkRefused."""
        for letter in letters:
            self._put(self._key(letter), letter)

    def check(self) -> None:
        """The bucket is there and may be written to, without writing. Raises SinkRefused, SinkUnavailable.

        A PutObject on condition of a version that no object has: rights are looked at before conditions.
        https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html
        """
        with self._asking("ListBucket"):
            self._client.boto.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
        try:
            with aws.reading():
                self._client.boto.put_object(Bucket=self._bucket, Key=f"{self._prefix}check", Body=b"", IfMatch='"0"')
        except aws.ERRORS as error:
            if aws.classify(error)[0] not in {*_GONE, "PreconditionFailed"}:
                raise self._translated(error, "PutObject") from error

    def scan(self, wanted: Wanted) -> Generator[Kept, None, None]:
        """See `DeadLetterStore.scan`: by the time of the event, each once. Ids of letters are found by their names."""
        if wanted.ids and (named := [key for key in self._keys(wanted) if _id(key).startswith(wanted.ids)]):
            yield from self._read(named, wanted)
        else:
            yield from self._read(self._keys(wanted), wanted)

    def remove(self, kept: Sequence[Kept]) -> None:
        """See `DeadLetterStore.remove`. Raises SinkUnavailable, SinkRefused."""
        for begin in range(0, len(kept), _DELETED_AT_ONCE):
            objects = [{"Key": it.place} for it in kept[begin : begin + _DELETED_AT_ONCE]]
            with self._asking("DeleteObject"):
                answer = self._client.boto.delete_objects(
                    Bucket=self._bucket, Delete={"Objects": objects, "Quiet": True}
                )
                errors = [(it.get("Code", "Unknown"), it.get("Message", "")) for it in answer.get("Errors", ())]
            for code, message in errors:
                if not aws.retryable(code):
                    raise SinkRefused(
                        f"s3:DeleteObject on {self.name}: {code}: {message}",
                        hint=aws.remedy(code, action="s3:DeleteObject", resource=self.name),
                    )
                raise SinkUnavailable(f"s3:DeleteObject on {self.name}: {code}", hint=_AGAIN)

    def update(self, kept: Sequence[Kept]) -> None:
        """See `DeadLetterStore.update`. Raises SinkUnavailable, SinkRefused."""
        for it in kept:
            self._put(it.place, it.letter)

    def close(self) -> None:
        """Close the client's connections."""
        self._client.close()

    def _key(self, letter: DeadLetter) -> str:
        time = letter.occurred_at.astimezone(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        return f"{self._prefix}{time}-{_place(letter)}{letter.id}{_SUFFIX}"

    def _put(self, key: str, letter: DeadLetter) -> None:
        with self._asking("PutObject"):
            answer = self._client.boto.put_object(Bucket=self._bucket, Key=key, Body=dump(letter), ContentType=_JSON)
            aws.proven(answer, "ETag")

    def _keys(self, wanted: Wanted) -> Iterator[str]:
        more: dict[str, Any] = {"MaxKeys": _PAGE}
        while True:
            with self._asking("ListBucket"):
                page = self._client.boto.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, **more)
                found = [(it["Key"], it["LastModified"]) for it in page.get("Contents", ())]
                token = page["NextContinuationToken"] if page.get("IsTruncated") else None
            for key, modified in found:
                if key.endswith(_SUFFIX) and (wanted.since is None or modified >= _floor(wanted)):
                    yield key
            if token is None:
                return
            more["ContinuationToken"] = token

    def _read(self, keys: Iterator[str] | list[str], wanted: Wanted) -> Iterator[Kept]:
        for key in keys:
            try:
                with self._asking("GetObject"):
                    text = self._client.boto.get_object(Bucket=self._bucket, Key=key)["Body"].read()
                letter = parse(text)
            except _Gone:  # somebody removed it meanwhile
                continue
            except Unreadable as error:
                raise BridgeError(
                    f"s3://{self._bucket}/{key}: {error}", hint="give the dead letters a prefix of their own"
                ) from error
            if letter in wanted:
                yield Kept(letter, key)

    @contextlib.contextmanager
    def _asking(self, action: str) -> Iterator[None]:
        """Around a call and the reading of its answer. Raises _Gone, SinkUnavailable or SinkRefused."""
        try:
            with aws.reading():
                yield
        except aws.ERRORS as error:
            if action == "GetObject" and aws.classify(error)[0] in _GONE:
                raise _Gone from error
            raise self._translated(error, action) from error

    def _translated(self, error: Exception, action: str) -> SinkError:
        code, retryable = aws.classify(error)
        what = f"s3:{action} on {self.name}: {code}: {error}"
        if aws.expired(code):
            return self._client.expired(SinkUnavailable(what))
        if retryable:
            return SinkUnavailable(what, hint=_AGAIN)
        return SinkRefused(what, hint=aws.remedy(code, action=f"s3:{action}", resource=f"the bucket {self._bucket}"))


_JSON: Final = "application/json"
_AGAIN: Final = "nothing is lost; the bridge tries again"


class _Gone(Exception):
    """An object that was listed and is not there any more."""


def _id(key: str) -> str:
    return key.removesuffix(_SUFFIX)[-_ID:]


def _floor(wanted: Wanted) -> Any:
    # S3 counts whole seconds, and a letter is written after it was made
    return wanted.since.replace(microsecond=0) if wanted.since else None


def _place(letter: DeadLetter) -> str:
    match letter.position:
        case {"commit_lsn": str(lsn), "ordinal": int(ordinal)}:
            high, _, low = lsn.partition("/")
            return f"{int(high, 16):08X}{int(low, 16):08X}-{ordinal:08X}-"
    return ""
