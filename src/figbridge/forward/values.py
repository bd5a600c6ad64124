r"""PostgreSQL's text output → JSON, by column type: what the database holds is what the event says.

The rule is ``to_json`` of the server (``to_jsonb`` would already drop a json column's duplicate keys and refuse its
lone surrogates). docs/types.md lists every type. The exceptions, so that an event survives any JSON parser and any DDL:

* with ``numbers: safe`` a number that a double cannot hold to its last digit is a string of its exact digits.
* an array with explicit lower bounds stays PostgreSQL's literal, a string: a JSON array has no bounds.
* a composite value stays its literal, ``(1,"a b")``, a string. Its attributes are known from the catalogue alone, and
  the catalogue is of now while the row is of then: ALTER TYPE … RENAME, DROP or ADD ATTRIBUTE in between, which neither
  PostgreSQL forbids nor the stream tells, would put values under wrong names. A wrong row is worse than a literal.
* a type of an extension (hstore, citext, vector) is a string of its text output, also where it has a cast to json.
* a byte that is not UTF-8 is the escape ``\udc80`` … ``\udcff``. A database of encoding UTF8 can hold one by a fault of
  old, and sends it unchecked; from one of encoding SQL_ASCII the server refuses to send it at all.

A domain is encoded as its base type, an array of whatever type as a JSON array: both are fixed when the type is made,
so they can be looked up late. A type that is gone by then leaves as text: nothing is dropped, nulled or clamped.

No encoder emits a line break (a line of a file sink is one event) or anything but JSON in UTF-8.

The encoders rely on the session settings that `source` makes: ISO dates, UTC, intervalstyle postgres,
extra_float_digits 3, bytea_output hex, client_encoding UTF8.
"""

import functools
import json
import re
from collections.abc import Callable
from typing import Final, Literal

import orjson
from psycopg.postgres import types as _registry

from figbridge.legacy import TypeDescription

Encoder = Callable[[bytes], bytes]

_dumps: Final = orjson.dumps
_BRACKETS: Final = bytes.maketrans(b"{}", b"[]")
_LAST_DIGIT: Final = ord("9")
# bytes: 15 significant decimal digits always survive a double; a sign and a point take two more
SAFE_LENGTH: Final = 15
_QUOTE, _LINE_FEED, _RETURN = b'"\n\r'  # as numbers: `in` is then three times as fast
_PG_SNAPSHOTS: Final = 5039  # pg_snapshot[], which psycopg's list of built-in types leaves out


def text(value: bytes) -> bytes:
    """A JSON string."""
    # decode and dumps are together faster than a search for what needs an escape
    try:
        return _dumps(value.decode())
    except UnicodeDecodeError:
        return json.dumps(value.decode(errors="surrogateescape")).encode()


def boolean(value: bytes) -> bytes:
    """``t`` and ``f``."""
    return b"true" if value == b"t" else b"false"


def char(value: bytes) -> bytes:
    """The one-byte type ``"char"``: a byte beyond ASCII as the octal escape that later servers print themselves."""
    return text(value) if value.isascii() else b'"\\\\%03o"' % value[0]


def document(value: bytes) -> bytes:
    """Columns of type json and jsonb hold JSON already; a line break in it can only stand between tokens."""
    if _LINE_FEED in value or _RETURN in value:
        value = value.replace(b"\n", b" ").replace(b"\r", b" ")
    if not value.isascii():
        # unchanged where it is UTF-8; backslashreplace writes a surrogate as JSON does
        return value.decode(errors="surrogateescape").encode(errors="backslashreplace")
    return value


def float_(value: bytes) -> bytes:
    """A JSON number; NaN and ±Infinity, whose last byte is a letter, as strings."""
    return value if value[-1] <= _LAST_DIGIT else b'"%b"' % value


def exact_number(value: bytes) -> bytes:
    """int8 and numeric with PostgreSQL's digits, whatever their number."""
    return value if value[-1] <= _LAST_DIGIT else b'"%b"' % value


def safe_number(value: bytes) -> bytes:
    """int8 and numeric as a number when every double-based parser reads it back to the digit, else as a string."""
    if value[-1] <= _LAST_DIGIT and (len(value) <= SAFE_LENGTH or _survives_double(value)):
        return value
    return b'"%b"' % value


def _survives_double(value: bytes) -> bool:
    if len(value) > 300:
        return False  # beyond the smallest and the largest double
    digits = value.lstrip(b"-")
    if b"." not in digits:
        # the range that https://www.rfc-editor.org/rfc/rfc8259#section-6 calls interoperable, JavaScript's safe
        # integers; some larger ones a double holds too, which would be a lottery
        return int(digits) < 2**53
    return len(digits.replace(b".", b"").lstrip(b"0")) <= 15


def timestamp(value: bytes) -> bytes:
    """``2026-11-23 10:08:02.69654`` → ``2026-11-23T10:08:02.69654``; infinity and a trailing BC as they are."""
    return b'"%b"' % value.replace(b" ", b"T", 1)


def timestamptz(value: bytes) -> bytes:
    """The same with ``+00:00``: the session's time zone is UTC."""
    value = value.replace(b" ", b"T", 1)
    if value.endswith(b"+00"):
        return b'"%b:00"' % value
    return b'"%b"' % value.replace(b"+00 ", b"+00:00 ")


def array(element: Encoder, delimiter: str = ",") -> Encoder:
    """An encoder of array literals, nested as deep as they come.

    https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO
    """
    if element is raw:
        return _integers
    comma = delimiter.encode()
    separator = re.escape(comma)
    # possessive (++, *+): what could be given back on the way would cost 170 bytes of memory a byte of a quoted element
    tokens = re.compile(
        rb'([{}]|%b)|([^{}"%b]++)|"([^"\\]*+(?:\\.[^"\\]*+)*+)"' % (separator, separator), re.DOTALL
    ).findall
    punctuation = {b"{": b"[", b"}": b"]", comma: b","}

    def flat(value: bytes) -> bytes:
        if value == b"{}":
            return b"[]"
        return b"[%b]" % b",".join([b"null" if it == b"NULL" else element(it) for it in value[1:-1].split(comma)])

    def encode(value: bytes) -> bytes:
        if not value.startswith(b"{"):
            return text(value)  # explicit bounds: [0:1]={…}
        if _QUOTE not in value and value.count(b"{") == 1:
            return flat(value)
        parts = []
        for mark, bare, quoted in tokens(value):
            if mark:
                parts.append(punctuation[mark])
            elif bare:
                parts.append(b"null" if bare == b"NULL" else element(bare))
            else:
                # the only two that array_out escapes, in this order
                parts.append(element(quoted.replace(b'\\"', b'"').replace(b"\\\\", b"\\")))
        return b"".join(parts)

    return encode


def _integers(value: bytes) -> bytes:
    """The same, where no element can need a quote."""
    if not value.startswith(b"{"):
        return text(value)
    return value.translate(_BRACKETS).replace(b"NULL", b"null")


def vector(element: Encoder) -> Encoder:
    """An encoder of int2vector and oidvector, the arrays of the system catalogues: elements with spaces between."""

    def encode(value: bytes) -> bytes:
        return b"[%b]" % b",".join(map(element, value.split()))

    return encode


def raw(value: bytes) -> bytes:
    """An integer that every parser reads."""
    return value


class Encoders:
    """Type OID → encoder, for whatever type a column has. Belongs to one thread.

    `describe` is asked once for each OID that PostgreSQL does not fix itself; None, for a type that is gone, is an
    answer too.
    """

    def __init__(self, numbers: Literal["safe", "exact"], describe: Callable[[int], TypeDescription | None]) -> None:
        self._known = dict(_built_in(numbers))
        self._describe = describe

    @functools.cached_property
    def exact(self) -> "Encoders":
        """The same, by which each number is one, for readers to whom its digits are not too many."""
        return Encoders("exact", self._describe)

    def of(self, type_oid: int) -> Encoder:
        """The encoder of the type. Raises what `describe` raises, and then asks again the next time."""
        found = self._known.get(type_oid)
        if found is None:
            found = self._known[type_oid] = self._made(self._describe(type_oid))
        return found

    def _made(self, described: TypeDescription | None) -> Encoder:
        if described is not None and described.base:
            return self.of(described.base)
        if described is not None and described.element:
            return array(self.of(described.element), described.delimiter)
        return text


def encoders(numbers: Literal["safe", "exact"]) -> dict[int, Encoder]:
    """Type OID → encoder, of every built-in type that is not plain text; all others are `text`."""
    return {oid: encoder for oid, encoder in _built_in(numbers).items() if encoder is not text}


@functools.lru_cache
def _built_in(numbers: Literal["safe", "exact"]) -> dict[int, Encoder]:
    number = safe_number if numbers == "safe" else exact_number
    scalars = {
        "bool": boolean,
        '"char"': char,
        "int2": raw,
        "int4": raw,
        "int8": number,
        "int2vector": vector(raw),
        "oidvector": vector(text),
        "numeric": number,
        "float4": float_,
        "float8": float_,
        "json": document,
        "jsonb": document,
        "timestamp": timestamp,
        "timestamptz": timestamptz,
    }
    found: dict[int, Encoder] = {_PG_SNAPSHOTS: array(text)}
    for info in _registry:
        found[info.oid] = encoder = scalars.get(info.name, text)
        if info.array_oid:
            found[info.array_oid] = array(encoder, info.delimiter)
    return found
