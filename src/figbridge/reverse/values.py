"""What a mapping's paths yield for an event. A path of names alone is walked by us, any other by JMESPath.

Why: JMESPath answers "null" and "nothing there" alike, and the difference is what a partial update stands on. So a path
that only descends (names, and positions of lists) is compiled to a walk that tells `ABSENT` from None, which is also
five times as fast. What any other expression yields counts as there.

Numbers stay exact in either, see `exact`.
"""

import math
from collections.abc import Callable, Iterable
from decimal import Decimal
from operator import itemgetter
from typing import Any, Final, cast

import jmespath
import jmespath.exceptions

from figbridge import digits
from figbridge.config import Value
from figbridge.reverse import exact
from figbridge.reverse.message import Malformed

Document = dict[str, Any]


class Absent:
    """The type of `ABSENT`: the event has no such field."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Final = Absent()


class Path:
    """A compiled JMESPath expression that names its place in the configuration."""

    __slots__ = ("get", "name")

    def __init__(self, expression: str, place: str) -> None:
        self.name = f"{expression} ({place})"
        expressed = digits.parsed(expression)
        steps = _steps(cast("dict[str, Any]", expressed.parsed))
        # `get` yields ABSENT when the path leads nowhere, and raises Malformed when it cannot be evaluated
        self.get: Callable[[Document], Any] = _walk(steps) if steps else _search(expressed, self.name)


def compiled(value: Value, place: str) -> tuple[str, Callable[[Document], Any]]:
    """(name for messages, function from the event's document to a value or ABSENT). The function raises Malformed."""
    if value.path is None:
        constant = value.constant
        return place, lambda _document: constant
    path = Path(value.path, place)
    if not value.has_default:
        return path.name, path.get
    get, default = path.get, value.default

    def with_default(document: Document) -> Any:
        found = get(document)
        return default if found is ABSENT else found

    return path.name, with_default


class Fields:
    """Several values at once, where each is a field of one object of the event, such as ``detail``. Nearly always so.

    Then one lookup each is all it takes. `get` is None where a path is of another kind.
    """

    __slots__ = ("get",)

    def __init__(self, values: Iterable[Value]) -> None:
        paths = [None if value.has_default else value.path for value in values]
        steps = [_steps(cast("dict[str, Any]", jmespath.compile(path).parsed)) for path in paths if path is not None]
        flat = [step for step in steps if step and len(step) == 2 and type(step[0]) is type(step[1]) is str]
        # from the event's document to a tuple of values, None when one is absent or there is no such object
        self.get: Callable[[Document], tuple[Any, ...] | None] | None = None
        if len(flat) == len(paths) > 1 and len({step[0] for step in flat}) == 1:
            self.get = _fields(str(flat[0][0]), [str(step[1]) for step in flat])


def _fields(head: str, names: list[str]) -> Callable[[Document], tuple[Any, ...] | None]:
    get = itemgetter(*names)

    def fields(document: Document) -> tuple[Any, ...] | None:
        try:
            found: tuple[Any, ...] = get(document[head])
        except (KeyError, TypeError, IndexError):
            return None
        return found

    return fields


def _steps(node: dict[str, Any]) -> list[str | int] | None:
    """The names and positions that an expression descends by; None when it does anything else."""
    match node:
        case {"type": "field", "value": name}:
            return [name]
        case {"type": "index", "value": position}:
            return [position]
        case {"type": "subexpression" | "index_expression", "children": children}:
            found = [_steps(child) for child in children]
            return None if None in found else [step for steps in found for step in steps or ()]
    return None


def _walk(steps: list[str | int]) -> Callable[[Document], Any]:
    match steps:
        case [str(head), str(name)]:
            return _field(head, name)

    def walk(document: Document) -> Any:
        found: Any = document
        for step in steps:
            if type(found) is dict:
                found = found.get(step, ABSENT)
            elif type(found) is list and type(step) is int and -len(found) <= step < len(found):
                found = found[step]
            else:
                return ABSENT
        return found

    return walk


def _field(head: str, name: str) -> Callable[[Document], Any]:
    """As `_walk`, for a field of an object of the event: nearly all are."""

    def field(document: Document) -> Any:
        found = document.get(head, ABSENT)
        return found.get(name, ABSENT) if type(found) is dict else ABSENT

    return field


def _search(expression: Any, name: str) -> Callable[[Document], Any]:
    def search(document: Document) -> Any:
        try:
            found = expression.search(document, exact.OPTIONS)
        # a function of JMESPath that is given what it cannot work with says so in any of these ways
        except (jmespath.exceptions.JMESPathError, ArithmeticError, RecursionError, TypeError, ValueError) as error:
            raise Malformed(name, "cannot be evaluated", expected="values that its functions take") from error
        if not finite(found):
            raise Malformed(name, "yields a number that JSON has not", expected="a finite number")
        return found

    return search


def finite(value: Any) -> bool:
    """Whether JSON has every number in `value`."""
    if isinstance(value, Decimal):
        return value.is_finite()
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list):
        return all(map(finite, value))
    return all(map(finite, value.values())) if isinstance(value, dict) else True
