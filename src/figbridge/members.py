"""The members of a JSON object, each parsed and as it was written.

A parser that prints a number again may lose its digits (a double has 17), so what is only to be passed on is cut out of
the text. Python's own parser is used, held to RFC 8259: it would take NaN and Infinity.
"""

import json
from typing import Any, Final, NamedTuple


class NotJson(ValueError):
    """The text is not what was asked for; the message says where and why."""


class Number(str):
    """A JSON number by its digits: an integer of any size stays what it is."""

    __slots__ = ()


class Member(NamedTuple):
    """A value: parsed, with `Number` for its numbers, and its text."""

    value: Any
    text: str


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


_JSON: Final = json.JSONDecoder(parse_int=Number, parse_float=Number, parse_constant=_refuse)
_SPACE: Final = " \t\n\r"


def check(text: str) -> None:
    """Return if `text` is JSON. Raises NotJson."""
    try:
        _JSON.decode(text)
    except RecursionError:
        raise NotJson("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise NotJson(f"at character {error.pos}: {error.msg}") from None
    except ValueError as error:
        raise NotJson(str(error)) from None


def of_object(text: str) -> dict[str, Member]:
    """Name → member. Raises NotJson, also for a name that is there twice: which of both would be meant?"""
    text = text.strip(_SPACE)
    if not text.startswith("{"):
        raise NotJson("it is not an object")
    check(text)  # once as a whole: below only well-formed text is taken apart
    members: dict[str, Member] = {}
    position = _skip(text, 1)
    while text[position] != "}":
        name, position = _JSON.raw_decode(text, position)
        start = _skip(text, _skip(text, position) + 1)  # behind the colon
        value, end = _JSON.raw_decode(text, start)
        if name in members:
            raise NotJson(f"{name!r} is there twice")
        members[name] = Member(value, text[start:end])
        position = _skip(text, end)
        if text[position] == ",":
            position = _skip(text, position + 1)
    return members


def _skip(text: str, position: int) -> int:
    while text[position] in _SPACE:
        position += 1
    return position
