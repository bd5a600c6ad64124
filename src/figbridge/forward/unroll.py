"""The inner loops of the forward path, unrolled: a row's bytes → its values → JSON.

Python pays for each turn of a loop and for each call, and a row has a turn per column. So the loops are written out, as
source text made once for each number of columns and each version of a table, and compiled: `reader` and `writer`. They
are half as dear as the loops were.

A `lane` is both in one, and the event around them, for the rows that are nearly all: an insert, or an update that left
the key alone, of a table that is known, each value sent or NULL. Many such rows follow each other, and a lane takes
them at half the cost of the way over `decode` and `shape`. It makes what they would make, which a test compares.

INVARIANT. The source text is made of numbers alone. Names of tables and columns, which anyone may choose, are data in
the functions' namespace, never part of their text.

What they refuse to do: repair or judge. A value's bytes are cut out and put in, and what is odd is left to the callers:
a lane ends before a message that is not as it expects.
"""

import functools
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import CodeType
from typing import Any, Final

import orjson

from figbridge.change import UNCHANGED, Row
from figbridge.event import Event
from figbridge.forward import values
from figbridge.forward.form import Parts
from figbridge.forward.place import Stamp

_U32: Final = struct.Struct(">I").unpack_from
_U64: Final = struct.Struct(">Q").unpack_from
TEXT, NULL, UNSENT = b"tnu"  # the kinds of a value in a TupleData

# (message, position) → (the row, the position behind it, whether a value was not sent).
# Raises IndexError or struct.error when the message ends too soon, and KindError.
Reader = Callable[[bytes, int], tuple[Row, int, bool]]
# row → (its key, the row): JSON objects; the row must be whole. Raises UnicodeDecodeError.
Writer = Callable[[Row], tuple[bytes, bytes]]


# (an XLogData message, those behind it, the ordinal of its row, the transaction, where to append)
# → (the first message that is not for this lane, empty when there is none; the ordinal of the next row)
Lane = Callable[[bytes, Iterator[bytes], int, Stamp, Callable[[Event], object]], tuple[bytes, int]]

Labels = Sequence[bytes | None]
# values in their text form → whether the row leaves
Keep = Callable[[Sequence[bytes | None]], bool]

HEAD: Final = slice(25, 33)  # of an XLogData: kind, relation, which part comes first, the part's number of columns
_LANE: Final[dict[str, Any]] = {
    "Event": Event,
    "new": tuple.__new__,  # what a NamedTuple's own constructor calls, for half
    "digits": tuple(f"{number:03X}" for number in range(4096)),
    "u64": _U64,
    "nothing": b"",
    # the message ends too soon; a text is not UTF-8, or none that its type can have
    "expected": (IndexError, struct.error, ValueError),
}


class KindError(Exception):
    """A value of a kind that does not exist, at ``position``."""

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


# The commonest case of an encoder, written out, where a call would cost as much again; `call` is the encoder itself.
_INLINE: Final[dict[values.Encoder, str]] = {
    values.raw: "{v}",
    values.text: "dumps({v}.decode())",  # what is no UTF-8 raises; the caller then goes column by column
    values.boolean: "b'true' if {v} == b't' else b'false'",
    values.safe_number: f"{{v}} if 0 < len({{v}}) <= {values.SAFE_LENGTH} and {{v}}[-1] <= {ord('9')} else {{call}}",
    values.document: "{v} if {v}.isascii() and 10 not in {v} and 13 not in {v} else {call}",  # line feed, return
    values.timestamp: "b'\"%b\"' % {v}.replace(b' ', b'T', 1)",
    values.timestamptz: "b'\"%b:00\"' % {v}.replace(b' ', b'T', 1) if {v}[-3:] == b'+00' else {call}",
}


@functools.lru_cache(maxsize=1024)
def reader(width: int) -> Reader:
    """The function that reads a TupleData of `width` columns, from behind its number of columns.

    https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html#PROTOCOL-LOGICALREP-MESSAGE-FORMATS-TUPLEDATA
    """
    # The length is unsigned: damaged, it points past the end, which the caller notices, and never backwards.
    columns = [
        f" if (kind := message[position]) == {TEXT}:\n"
        f"  size, = u32(message, position + 1)\n"
        f"  v{index} = message[position + 5:(position := position + 5 + size)]\n"
        f" elif kind == {NULL}: v{index} = None; position += 1\n"
        f" elif kind == {UNSENT}: v{index} = UNCHANGED; unsent = True; position += 1\n"
        f" else: raise KindError(position)"
        for index in range(width)
    ]
    end = f" return ({_listed(range(width))}), position, unsent"
    lines = ["def read(message, position):", " unsent = False", *columns, end]
    made: Reader = _compiled("\n".join(lines), "read", {"KindError": KindError})
    return made


def writer(labels: Labels, encoders: Sequence[values.Encoder], key: Sequence[int]) -> Writer:
    """The function that writes rows of one version of a table.

    `labels` are the columns' names as JSON, None for a column that stays; `key` are the positions of the columns that
    are the key; without any it is ``null``.
    """
    namespace = _templates(labels, key) | _named(encoders)
    lines = ["def write(row):", f" ({_listed(range(len(labels)))}) = row"]
    for index, encoder in enumerate(encoders):
        if labels[index] is None:
            continue
        lines.append(f" v{index} = null if v{index} is None else {_expression(encoder, index)}")
    lines.append(f" return {_key(key)}, {_image(labels)}")
    made: Writer = _compiled("\n".join(lines), "write", namespace)
    return made


def lane(
    head: bytes,
    labels: Labels,
    encoders: Sequence[values.Encoder],
    key: Sequence[int],
    *,
    order: str,
    parts: Parts,
    by_lsn: bool,
    where: tuple[Sequence[int], Keep] | None = None,
) -> Lane:
    """The function that makes the events of messages whose `HEAD` is `head`, as long as they are as it expects.

    `order` begins the ordering key of the events, `parts` are what their details have in common; `by_lsn`: the position
    begins with the row's own LSN, which is the message's. `where` has the positions of columns, and what says of their
    values whether the row leaves: one that does not ends the lane, for others to judge.
    """
    asked, keep = where or ((), None)
    lsn = "(lsn := u64(message, 1)[0]), sequence, lsn, " if by_lsn else ""
    start, between, end = (_escaped(it) for it in (parts.start, parts.between, parts.end))
    before = _escaped(parts.before + b"null" + parts.after)
    template = b"%b%%b%b%%b%b%b%b%b%%b%%d%%b" % (
        start, between, before, _template(labels), end, b"%d%b%d" if by_lsn else b"",
    )  # fmt: skip
    lines = [
        "def run(message, rest, ordinal, stamp, append):",
        " identity, place, tail, time, sequence, _, first = stamp",
        # an id ends with the ordinal in eight digits: the last three are looked up, the others made every 4096 rows
        ' block = f"{identity}{ordinal >> 12:05X}"',
        " try:",
        "  while message[25:33] == head:",
        "   position = 33",
    ]
    for index, encoder in enumerate(encoders):
        # of a column that stays, only the raw value is looked at, where the predicate asks for it
        encoded = labels[index] is not None and encoder is not values.raw
        raw = index in asked
        lines += [
            f"   if (kind := message[position]) == {TEXT}:",
            "    size, = u32(message, position + 1)",
            f"    v{index} = message[position + 5:(position := position + 5 + size)]",
            *([f"    r{index} = v{index}"] if raw else []),
            *([f"    v{index} = {_expression(encoder, index)}"] if encoded else []),
            f"   elif kind == {NULL}: v{index} = null; position += 1{f'; r{index} = None' if raw else ''}",
            "   else: break",
        ]
    lines += [
        "   if position != len(message): break",
        *([f"   if not keep(({''.join(f'r{index}, ' for index in asked)})): break"] if keep else []),
        f"   key = {_key(key)}",
        "   id = block + digits[ordinal & 4095]",
        f"   detail = template % (id.encode(), key, {_shown(labels)}{lsn}place,",
        f"    {'ordinal + first' if by_lsn else 'ordinal'}, tail)",
        "   append(new(Event, (id, source, detail_type, order + key.decode(), time, detail, None, False, resources)))",
        "   ordinal += 1",
        '   if not ordinal & 4095: block = f"{identity}{ordinal >> 12:05X}"',
        "   message = next(rest, nothing)",
        " except expected: pass",
        " return message, ordinal",
    ]
    constants = parts._asdict() | {"head": head, "template": template, "order": order, "keep": keep}
    made: Lane = _compiled("\n".join(lines), "run", _LANE | constants | _templates(labels, key) | _named(encoders))
    return made


def _expression(encoder: values.Encoder, index: int) -> str:
    """The value of column `index`, encoded."""
    return _INLINE.get(encoder, "{call}").format(v=f"v{index}", call=f"encode{index}(v{index})")


def _named(encoders: Sequence[values.Encoder]) -> dict[str, Any]:
    """What an `_expression` calls."""
    return {f"encode{index}": encoder for index, encoder in enumerate(encoders)}


def _templates(labels: Labels, key: Sequence[int]) -> dict[str, Any]:
    """What `_image` and `_key` fill."""
    return {"image": _template(labels), "key_template": _template([labels[index] for index in key])}


def _image(labels: Labels) -> str:
    return f"image % ({_shown(labels)})"


def _shown(labels: Labels) -> str:
    return _listed([index for index, label in enumerate(labels) if label is not None])


def _key(key: Sequence[int]) -> str:
    return f"key_template % ({_listed(key)})" if key else "null"


def _listed(columns: Iterable[int]) -> str:
    return "".join(f"v{index}, " for index in columns)


def _template(labels: Labels) -> bytes:
    return b"{" + b",".join(_escaped(label) + b":%b" for label in labels if label is not None) + b"}"


def _escaped(literal: bytes) -> bytes:
    return literal.replace(b"%", b"%%")


def _compiled(text: str, name: str, namespace: dict[str, Any]) -> Any:
    everywhere = {"UNCHANGED": UNCHANGED, "dumps": orjson.dumps, "null": b"null", "u32": _U32} | namespace
    exec(_code(text), everywhere)  # noqa: S102 (the text is made of numbers, above)
    return everywhere[name]


@functools.lru_cache(maxsize=256)
def _code(text: str) -> CodeType:
    """Compiled once for tables of one shape, such as partitions, and for the lanes of one table."""
    return compile(text, "<unrolled>", "exec")
