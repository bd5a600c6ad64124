"""JSON, and the literals of JMESPath, whose numbers keep their digits: int and Decimal, never a float.

To a float 0.1 is unequal to the database's 0.1, and 9007199254740993 is 9007199254740992.

An integer is never made of a number with an exponent: 1e400000 has as many digits as it says.
"""

import contextlib
import json
import re
from decimal import Decimal, InvalidOperation
from typing import Any, Final

import msgspec
from jmespath.parser import ParsedResult, Parser

_LITERAL: Final = re.compile(r"`((?:\\.|[^`\\])*)`", re.DOTALL)


def parsed(expression: str) -> ParsedResult:
    """The JMESPath expression. Raises JMESPathError."""
    return _Parser().parse(expression)


def loads(text: bytes) -> Any:
    """JSON in UTF-8. Of a name that an object has twice the last one counts. Raises ValueError, RecursionError."""
    try:
        return FAST.decode(text)
    except (ValueError, InvalidOperation):
        return EXACT.decode(text.decode())


class _Parser(Parser):
    _CACHE: dict[str, ParsedResult] = {}  # noqa: RUF012 (the library's has other literals)

    def parse(self, expression: str) -> ParsedResult:
        self._text = expression
        return super().parse(expression)

    def _token_nud_literal(self, token: dict[str, Any]) -> dict[str, Any]:
        value = token["value"]
        if found := _LITERAL.match(self._text, token["start"]):  # not a 'raw string'
            with contextlib.suppress(ValueError):  # a word without its quotes, which the library takes for a string
                value = json.loads(found[1].replace("\\`", "`"), parse_float=_decimal, parse_constant=_decimal)
        return {"type": "literal", "value": value, "children": []}


def _decimal(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:  # its exponent is beyond any number's
        return Decimal("-Infinity" if text.startswith("-") else "Infinity")


def _exact(digits: str) -> Decimal:
    try:
        return Decimal(digits)  # construction never rounds, whatever the context's precision
    except InvalidOperation as error:
        raise ValueError("an exponent beyond any database's") from error


def _integer(digits: str) -> int | Decimal:
    if digits == "-0":
        return Decimal(digits)
    try:
        return int(digits)
    except ValueError:  # beyond sys.set_int_max_str_digits; a numeric may be that long
        return Decimal(digits)


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


# It refuses lone surrogates and very long integers, raises InvalidOperation for some exponents, and takes -0 for 0.
FAST: Final = msgspec.json.Decoder(float_hook=Decimal)
EXACT: Final = json.JSONDecoder(parse_float=_exact, parse_int=_integer, parse_constant=_no_number)
