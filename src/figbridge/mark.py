"""What a reverse transaction says of itself in the WAL, and the forward path reads: the words both sides share.

    figbridge.mark     first in the transaction: {"shapes": …, "moving": …, "events": …}, see `Shape` and `Entry`; may
                       come several times. With ``loop-guard: message`` it is also the mark that the transaction is ours
    figbridge.cause    [source, idempotency key]: what follows is done for that event; null: for none in particular
    figbridge.canary   the nonce of a canary (`figbridge.canary`), where no row carries it

All are transactional logical messages, so they commit with the rows or not at all. JSON in ASCII, so that no encoding
of a database can spoil them.

WHY THE LIST IS NOT IN THE INBOX ROW. That is kept for a month, and the claim would write it for every event although
nobody reads it again; a message is gone with its WAL, and may be as long as it likes.

WHY DIGESTS. What a trigger did to a row is found by comparing what was asked for with what the WAL says. Both have to
be in one form, and only PostgreSQL knows how a type prints a value. So PostgreSQL casts what was asked for with the
column's type and prints it as the walsender prints (`SETTINGS`); and since a comparison needs no value, only its digest
goes into the WAL. https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-REPLICATION
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import orjson

MARK: Final = "figbridge.mark"
CAUSE: Final = "figbridge.cause"
CANARY: Final = "figbridge.canary"
UNLISTED: Final = "{}"  # a MARK that says nothing but that the transaction is ours

# How the walsender prints values. Whoever compares with what it prints has to print under the same.
SETTINGS: Final = {
    "datestyle": "ISO",
    "intervalstyle": "postgres",
    "extra_float_digits": "3",
    "bytea_output": "hex",
    "timezone": "UTC",
}
DIGITS: Final = 32  # hexadecimal, of a SHA-256


class Shape(NamedTuple):
    """A statement without its values.

    tables   the names under which the WAL may show its table: itself, the partitioned table it is a part of, …
    action   insert, update, upsert, delete, soft
    moves    whether its table is partitioned, so that an UPDATE may be a DELETE here and an INSERT there
    """

    tables: Sequence[Sequence[str]]
    action: str
    key: Sequence[str]
    columns: Sequence[str]
    moves: bool


class Entry(NamedTuple):
    """An event. `rows` has (index of the shape, digest of its key, digest of key and columns) for each statement.

    None: nobody knows what its statements touch (SQL of the user's own, a view), so all they do is an echo.
    """

    source: str
    key: str
    hops: int
    rows: Sequence[tuple[int, str, str]] | None


def digest(values: Iterable[bytes | None]) -> str:
    """The digest of printed values, None for NULL; `figbridge.reverse.touched` has the same in SQL."""
    told = b"".join([b"n" if value is None else b"%d:%b" % (len(value), value) for value in values])
    return hashlib.sha256(told).hexdigest()[:DIGITS]


def write(shapes: Sequence[Shape], entries: Sequence[Entry]) -> str:
    """The content of a `MARK`."""
    told = {  # what moves is said apart: an older bridge reads four fields of each shape
        "shapes": [it[:4] for it in shapes],
        "moving": [index for index, it in enumerate(shapes) if it.moves],
        "events": entries,
    }
    return json.dumps(told, separators=(",", ":"))


def write_cause(source: str, key: str) -> str:
    """The content of a `CAUSE`."""
    return json.dumps([source, key])


def read(content: bytes) -> tuple[list[Shape], list[Entry]]:
    """The content of a `MARK`. Raises ValueError when it is none of ours."""
    told = orjson.loads(content)
    try:
        moving = told.get("moving")  # an older bridge does not say: a move that left in half would be a row lost
        shapes = [
            Shape(tables, action, key, columns, moving is None or index in moving)
            for index, (tables, action, key, columns) in enumerate(told.get("shapes", ()))
        ]
        entries = [Entry(*it) for it in told.get("events", ())]
    except (AttributeError, TypeError) as error:
        raise ValueError(f"not a mark: {error}") from error
    return shapes, entries


def read_cause(content: bytes) -> tuple[str, str] | None:
    """The content of a `CAUSE`. Raises ValueError when it is none of ours."""
    told: Any = orjson.loads(content)
    if told is None:
        return None
    if not isinstance(told, list) or len(told) != 2 or not all(isinstance(it, str) for it in told):
        raise ValueError("not a cause")
    return told[0], told[1]
