"""One spelling for each key, as far as it can be told without the database: A0EE… and a0ee… are one uuid.

Entities are compared as text, before the database has seen the key. So a key of a type that has several spellings is
brought to one of them first: numbers and uuids to that of the server (without zeros behind the point), char(n) to its
value without the blanks. What cannot be read is left as it is, for the server to refuse. Of other types each spelling
is an entity of its own: what they mean depends on the session, a collation or an extension.
"""

import re
from collections.abc import Callable, Mapping
from decimal import ROUND_HALF_UP, Context, Decimal, InvalidOperation
from functools import partial
from typing import Final

import psycopg

Spell = Callable[[str], str]

# numeric's digits before and after the point: https://www.postgresql.org/docs/current/datatype-numeric.html
_BEFORE, _AFTER = 131_072, 16_383
_ROUNDING: Final = Context(prec=_BEFORE + _AFTER, rounding=ROUND_HALF_UP)
_UUID: Final = re.compile("(.{8})(.{4})(.{4})(.{4})(.{12})")
# the columns of a table, their types below any domain
_COLUMNS: Final = """
    WITH RECURSIVE found AS (
        SELECT a.attname::text AS name, a.atttypid AS type, a.atttypmod AS modifier
        FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = %s AND c.relname = %s AND a.attnum > 0 AND NOT a.attisdropped
        UNION ALL
        SELECT f.name, t.typbasetype, t.typtypmod FROM found f JOIN pg_type t ON t.oid = f.type WHERE t.typtype = 'd'
    )
    SELECT name, type::int8, modifier FROM found
"""


def of_table(connection: psycopg.Connection, schema: str, table: str) -> dict[str, Spell]:
    """Column → what brings its values to one spelling, where their type has several. Raises psycopg.Error."""
    rows = connection.execute(_COLUMNS, [schema, table]).fetchall()
    return {name: spell for name, type_oid, modifier in rows if (spell := _of_type(type_oid, modifier))}


def spelled(spelling: Mapping[str, Spell], column: str, text: str) -> str:
    """`text`, a value of `column`, as all of its spellings are written."""
    spell = spelling.get(column)
    return spell(text) if spell else text


def _of_type(oid: int, modifier: int) -> Spell | None:
    match oid:
        case 20 | 21 | 23:  # bigint, smallint, integer
            return _integer
        case 700 | 701:  # real, double precision
            return _number
        case 1700:
            # https://github.com/postgres/postgres/blob/master/src/backend/utils/adt/numeric.c (numeric_typmod_scale)
            scale = None if modifier < 0 else (((modifier - 4) & 0x7FF) ^ 1024) - 1024
            return partial(_number, scale=scale)
        case 1042:  # char(n)
            return lambda text: text.rstrip(" ")
        case 2950:
            return _uuid
    return None


def _integer(text: str) -> str:
    try:
        return str(int(text))
    except ValueError:
        return text


def _number(text: str, scale: int | None = None) -> str:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return text
    # that many digits are written below, and no more
    if not number.is_finite() or number.adjusted() > _BEFORE or (number and number.adjusted() < -_AFTER):
        return str(number)
    if scale is not None and number:
        number = _ROUNDING.quantize(number, Decimal((0, (1,), -scale)))
    if not number:
        return "0"
    written = f"{number:f}"
    return written.rstrip("0").rstrip(".") if "." in written else written


def _uuid(text: str) -> str:
    digits = text.removeprefix("{").removesuffix("}").replace("-", "").lower()
    found = _UUID.fullmatch(digits)
    return "-".join(found.groups()) if found else text
