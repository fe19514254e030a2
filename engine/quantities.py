"""Exact arithmetic on quantities and money."""

from __future__ import annotations

from decimal import ROUND_DOWN, ROUND_HALF_UP, Context, Decimal

# Wide enough for 15 digits before and 16 after the point, with room for products of them.
EXACT = Context(prec=60)

# As Postgres divides: digits in groups of four, at least 16 significant ones in a quotient.
_GROUP_DIGITS = 4
_MIN_SIGNIFICANT = 16
_WIDE = Context(prec=120)


def cut(value: Decimal, decimals: int) -> Decimal:
    """``value`` cut, not rounded, to ``decimals`` places, towards zero."""
    return value.quantize(Decimal(1).scaleb(-decimals), rounding=ROUND_DOWN, context=EXACT)


def quotient(dividend: Decimal, divisor: Decimal, decimals: int) -> Decimal:
    """``round(dividend / divisor, decimals)`` as Postgres computes it, to the last digit.

    Postgres first rounds the quotient to a scale of its own (select_div_scale in numeric.c: 16
    significant digits in groups of four, and no fewer decimals than its operands have). Both
    roundings are half away from zero.
    """
    if not dividend:
        return Decimal(0)
    weight, first = _leading_group(dividend)
    divisor_weight, divisor_first = _leading_group(divisor)
    groups = weight - divisor_weight - (first <= divisor_first)
    scale = max(
        _MIN_SIGNIFICANT - groups * _GROUP_DIGITS, _decimals(dividend), _decimals(divisor), 0
    )
    exact = _WIDE.divide(dividend, divisor)
    rounded = exact.quantize(Decimal(1).scaleb(-scale), ROUND_HALF_UP, _WIDE)
    return rounded.quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_UP, _WIDE)


def _leading_group(number: Decimal) -> tuple[int, int]:
    """The power of 10,000 of a number's first group of four digits, and that group's value."""
    weight = number.adjusted() // _GROUP_DIGITS
    return weight, int(number.copy_abs().scaleb(-weight * _GROUP_DIGITS, _WIDE))


def _decimals(number: Decimal) -> int:
    return -int(number.as_tuple().exponent)
