"""Predicates over a row: a small part of JMESPath, parsed by its library and compiled here.

    status == 'paid' && (total > `100` || !note) && doc.address.country != 'GB'

There are columns (and members of a json column, by dots), literals, comparisons, ``&&``, ``||``, ``!`` and parentheses,
with the meaning that JMESPath gives them: what is null, false, "", [] or {} is not true, and an order is one of two
numbers or of two strings. There are no functions, projections and pipes: what decides whether a row leaves must be
cheap, and readable by whoever signs for it.
https://jmespath.org/specification.html
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, Final, Literal, NamedTuple

import jmespath.exceptions

from figbridge import digits

# values of the predicate's columns, in their order → what the expression is
Term = Callable[[Sequence[Any]], Any]

_ORDERS: Final = {"lt": operator.lt, "lte": operator.le, "gt": operator.gt, "gte": operator.ge}
_WORDS: Final = frozenset({"null", "true", "false"})
_NUMBERS: Final = (int, Decimal, float)
_NO_NUMBERS: Final = frozenset({"NaN", "Infinity", "-Infinity"})  # the texts that a numeric or a float may be

Kind = Literal["number", "string", "boolean"]


class Predicate(NamedTuple):
    """``holds`` takes the values of ``columns``, in their order, as JSON has them; numbers are int or Decimal.

    ``kinds`` has of each column that is compared with such literals of what kinds they are.
    """

    text: str
    columns: tuple[str, ...]
    holds: Callable[[Sequence[Any]], bool]
    kinds: Mapping[str, set[Kind]]

    def misfits(self, column: str, kind: Kind | None) -> bool:
        """Whether `column`, whose values are of this kind, is compared with literals of other kinds alone.

        None of these comparisons says anything about it: the column has another type than whoever wrote them thought.
        """
        kinds = self.kinds.get(column)
        return kinds is not None and kind is not None and kind not in kinds


def compiled(text: str) -> Predicate:
    """The predicate. Raises ValueError, in two parts: what is wrong; what to do."""
    try:
        tree = digits.parsed(text).parsed
    except jmespath.exceptions.JMESPathError as error:
        reason = str(error).partition("\n")[0].removesuffix(":").removesuffix(", for expression")
        raise ValueError(f"is not JMESPath ({reason}); such as status == 'paid' && total > `100`") from None
    columns: dict[str, int] = {}
    term = _term(tree, columns)
    kinds: defaultdict[str, set[Kind]] = defaultdict(set)
    for column, literal in _compared(tree):
        kinds[column] |= _kinds(literal)
    return Predicate(
        text, tuple(columns), lambda values: _true(term(values)), {it: kinds[it] for it in kinds if kinds[it]}
    )


def _compared(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The comparisons of a column with a literal."""
    children = node.get("children", ())
    if node["type"] == "comparator":
        sides = {child["type"]: child["value"] for child in children if child["type"] in {"field", "literal"}}
        if len(sides) == 2:
            yield sides["field"], sides["literal"]
    for child in children:
        yield from _compared(child)


def _kinds(literal: Any) -> set[Kind]:
    """The kinds of values that can be equal to it, or have an order with it."""
    match literal:
        case bool():
            return {"boolean"}
        case int() | Decimal():
            return {"number"}
        case str():
            return {"number", "string"} if literal in _NO_NUMBERS else {"string"}
    return set()


def _term(node: Mapping[str, Any], columns: dict[str, int]) -> Term:
    children = node.get("children", ())
    match node["type"]:
        case "literal":
            value = node["value"]
            if isinstance(value, Decimal) and not value.is_finite():
                raise ValueError("has a number that JSON has not; in events it is a text, so write 'NaN' or 'Infinity'")
            return lambda _: value
        case "field":
            return operator.itemgetter(_column(node["value"], columns))
        case "subexpression" if all(child["type"] == "field" for child in children):
            column = _column(children[0]["value"], columns)
            return _member(column, [child["value"] for child in children[1:]])
        case "not_expression":
            inner = _term(children[0], columns)
            return lambda values: not _true(inner(values))
        case "comparator" | "and_expression" | "or_expression":
            left, right = (_term(child, columns) for child in children)
            return _of_two(node, left, right)
    kind = node["type"].replace("_", " ")
    raise ValueError(f"has a {kind}, which is not known here; columns, literals, comparisons, &&, || and ! are")


def _of_two(node: Mapping[str, Any], left: Term, right: Term) -> Term:
    match node["type"]:
        case "and_expression":
            return lambda values: right(values) if _true(found := left(values)) else found
        case "or_expression":
            return lambda values: found if _true(found := left(values)) else right(values)
    return _comparison(node["value"], left, right)


def _column(name: str, columns: dict[str, int]) -> int:
    if name in _WORDS:
        raise ValueError(f"has {name} without backticks, which is a column of that name; write `{name}`")
    return columns.setdefault(name, len(columns))


def _member(column: int, path: Sequence[str]) -> Term:
    def member(values: Sequence[Any]) -> Any:
        value = values[column]
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    return member


def _comparison(sign: str, left: Term, right: Term) -> Term:
    if sign == "eq":
        return lambda values: _equal(left(values), right(values))
    if sign == "ne":
        return lambda values: not _equal(left(values), right(values))
    order = _ORDERS[sign]

    def compare(values: Sequence[Any]) -> bool | None:
        one, other = left(values), right(values)
        if (_number(one) and _number(other)) or (isinstance(one, str) and isinstance(other, str)):
            return bool(order(one, other))
        return None

    return compare


def _equal(one: Any, other: Any) -> bool:
    # to Python, true is 1 and false is 0
    if isinstance(one, bool) is not isinstance(other, bool):
        return False
    return bool(one == other)


def _number(value: Any) -> bool:
    return isinstance(value, _NUMBERS) and not isinstance(value, bool)


def _true(value: Any) -> bool:
    return not (value is None or value is False or value in ("", [], {}))
