"""JMESPath's functions over exact numbers: int and Decimal, as events have them. The library's own know int and float.

Those take a Decimal for no number, or cut it off. What a sum or an average cannot say exactly, or with more digits
than any numeric has, is an error. Expressions are parsed by `figbridge.digits`, whose literals are exact, too.
https://jmespath.org/specification.html#built-in-functions
"""

import contextlib
import decimal
import sys
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal, Inexact, InvalidOperation
from typing import Any, Final

import jmespath
from jmespath.functions import Functions, signature

from figbridge.reverse.message import write

# numeric's digits before and after the point: https://www.postgresql.org/docs/current/datatype-numeric.html
_EXACT: Final = Context(
    prec=131_072 + 16_383, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX, traps=[Inexact, InvalidOperation]
)
_MORE: Final = 20  # digits of an average beyond those of the sum
_LONGEST: Final = sys.int_info.default_max_str_digits  # of an int that can be written


class _Functions(Functions):
    """The built-in functions, for Decimal too."""

    def _get_allowed_pytypes(self, types: list[str]) -> tuple[list[str], list[tuple[str, ...]]]:
        allowed, elements = super()._get_allowed_pytypes(types)  # type: ignore[misc]
        return (
            [*allowed, "Decimal"] if "float" in allowed else allowed,
            [(*names, "Decimal") if "float" in names else names for names in elements],
        )

    def _convert_to_jmespath_type(self, name: str) -> str:
        return "number" if name == "Decimal" else str(super()._convert_to_jmespath_type(name))  # type: ignore[misc]

    @signature({"types": []})
    def _func_type(self, value: Any) -> Any:
        return "number" if isinstance(value, Decimal) else super()._func_type(value)  # type: ignore[misc]

    @signature({"types": []})
    def _func_to_number(self, value: Any) -> int | Decimal | None:
        if isinstance(value, int | Decimal) and not isinstance(value, bool):
            return value
        if not isinstance(value, str):
            return None
        with contextlib.suppress(ValueError):  # or it is longer than Python likes
            return int(value)
        try:
            return Decimal(value)
        except InvalidOperation:
            if _is_number(value):  # its exponent is beyond any number's
                raise
            return None

    @signature({"types": []})
    def _func_to_string(self, value: Any) -> str:
        return value if isinstance(value, str) else write(value, "the argument of to_string")

    @signature({"types": ["number"]})
    def _func_abs(self, value: Any) -> Any:
        return value.copy_abs() if isinstance(value, Decimal) else abs(value)

    @signature({"types": ["number"]})
    def _func_ceil(self, value: Any) -> Any:
        return _whole(value, ROUND_CEILING)

    @signature({"types": ["number"]})
    def _func_floor(self, value: Any) -> Any:
        return _whole(value, ROUND_FLOOR)

    @signature({"types": ["array-number"]})
    def _func_sum(self, values: Any) -> int | Decimal:
        total: int | Decimal = sum(value for value in values if isinstance(value, int))
        for value in values:
            if isinstance(value, Decimal):
                total = _EXACT.add(value, total)
        return total

    @signature({"types": ["array-number"]})
    def _func_avg(self, values: Any) -> Any:
        if not values:
            return None
        total = Decimal(self._func_sum(values))
        return Context(prec=len(total.as_tuple().digits) + _MORE, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX).divide(
            total, len(values)
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _whole(value: Any, rounding: str) -> Any:
    if isinstance(value, int):
        return value
    whole = value.to_integral_value(rounding=rounding)
    return int(whole) if whole.adjusted() < _LONGEST else whole


OPTIONS: Final = jmespath.Options(custom_functions=_Functions())
