"""PostgreSQL's text output → JSON, by column type: what the database holds is what the event says.

The rule is ``to_jsonb`` of the server, with three exceptions, because ours must survive any JSON parser:

* NaN and the infinities, which JSON does not know, are strings (as in to_jsonb).
* with ``numbers: safe`` a number that a double cannot hold to its last digit is a string of its exact digits.
* an array with explicit lower bounds stays PostgreSQL's literal, a string: a JSON array has no bounds.

A type that is not known here leaves as a string of its text output: nothing is dropped, nulled or clamped.

The encoders rely on the session settings that `source` makes: ISO dates, UTC, intervalstyle postgres,
extra_float_digits 3, bytea_output hex, client_encoding UTF8.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import orjson
from psycopg.postgres import types as _registry

Encoder = Callable[[bytes], bytes]

_needs_escape = re.compile(rb'[\x00-\x1f"\\]').search
_LAST_DIGIT = ord("9")


def text(value: bytes) -> bytes:
    """A JSON string."""
    if _needs_escape(value):
        return orjson.dumps(value.decode())
    return b'"%b"' % value


def boolean(value: bytes) -> bytes:
    """``t`` and ``f``."""
    return b"true" if value == b"t" else b"false"


def document(value: bytes) -> bytes:
    """Columns of type json and jsonb hold JSON already; a line break in it can only stand between tokens."""
    # a line of a file is one event
    if b"\n" in value or b"\r" in value:
        return value.replace(b"\n", b" ").replace(b"\r", b" ")
    return value


def float_(value: bytes) -> bytes:
    """A JSON number; NaN and ±Infinity, whose last byte is a letter, as strings."""
    return value if value[-1] <= _LAST_DIGIT else b'"%b"' % value


def exact_number(value: bytes) -> bytes:
    """int8 and numeric with PostgreSQL's digits, whatever their number."""
    return value if value[-1] <= _LAST_DIGIT else b'"%b"' % value


def safe_number(value: bytes) -> bytes:
    """int8 and numeric as a number when every double-based parser reads it back to the digit, else as a string."""
    if value[-1] > _LAST_DIGIT:
        return b'"%b"' % value
    # 15 significant decimal digits always survive a double; a sign and a point take two more bytes
    if len(value) <= 15 or _survives_double(value):
        return value
    return b'"%b"' % value


def _survives_double(value: bytes) -> bool:
    if len(value) > 300:
        return False  # beyond the smallest and the largest double
    digits = value.lstrip(b"-")
    if b"." not in digits:
        number = int(digits)
        # 2**53 + 1 is the first integer a double cannot hold; some larger ones it can, which would be a lottery
        return number <= 2**53
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
    separator = re.escape(delimiter.encode())
    token = re.compile(rb'[{}]|%b|"((?:[^"\\]|\\.)*)"|([^{}"%b]+)' % (separator, separator), re.DOTALL)
    unescape = re.compile(rb"\\(.)", re.DOTALL).sub
    punctuation = {b"{": b"[", b"}": b"]", delimiter.encode(): b","}

    def encode(value: bytes) -> bytes:
        if not value.startswith(b"{"):
            return text(value)  # explicit bounds: [0:1]={…}
        parts = []
        for match in token.finditer(value):
            if (mark := punctuation.get(match[0])) is not None:
                parts.append(mark)
            elif match[1] is not None:
                parts.append(element(unescape(rb"\1", match[1])))
            elif match[2] == b"NULL":
                parts.append(b"null")
            else:
                parts.append(element(match[2]))
        return b"".join(parts)

    return encode


def _raw(value: bytes) -> bytes:
    return value


def _scalars(numbers: Encoder) -> dict[str, Encoder]:
    return {
        "bool": boolean,
        "int2": _raw,
        "int4": _raw,
        "oid": _raw,
        "int8": numbers,
        "numeric": numbers,
        "float4": float_,
        "float8": float_,
        "json": document,
        "jsonb": document,
        "timestamp": timestamp,
        "timestamptz": timestamptz,
    }


@lru_cache
def encoders(numbers: Literal["safe", "exact"]) -> dict[int, Encoder]:
    """Type OID → encoder, of every built-in type that is not plain text; all others are `text`."""
    scalars = _scalars(safe_number if numbers == "safe" else exact_number)
    found: dict[int, Encoder] = {}
    for info in _registry:
        encoder = scalars.get(info.name, text)
        if encoder is not text:
            found[info.oid] = encoder
        if info.array_oid:
            found[info.array_oid] = array(encoder, info.delimiter)
    return found
