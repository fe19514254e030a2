"""Exact arithmetic on quantities and money."""

from __future__ import annotations

from decimal import ROUND_DOWN, Context, Decimal

# Wide enough for 15 digits before and 16 after the point, with room for products of them.
EXACT = Context(prec=60)


def cut(value: Decimal, decimals: int) -> Decimal:
    """``value`` cut, not rounded, to ``decimals`` places, towards zero."""
    return value.quantize(Decimal(1).scaleb(-decimals), rounding=ROUND_DOWN, context=EXACT)
