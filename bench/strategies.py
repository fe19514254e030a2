"""The strategy that every engine is measured with: buy one, sell one, every so many minutes."""

from __future__ import annotations

from decimal import Decimal

from pydantic import Field

from bench.market import is_ordering_bar
from engine.market.model import Bar
from engine.orders.model import Side
from engine.strategies.base import Context, Intent, Parameters, PlaceOrder, Strategy

__all__ = ["NAME", "Alternating"]

NAME = f"{__name__}:Alternating"
_ONE = Decimal(1)


class AlternatingParameters(Parameters):
    """``every``: minutes from one order to the next."""

    every: int = Field(ge=1)


class Alternating(Strategy):
    """Buys one unit, then sells it, by a market order at each bar of its minutes."""

    Parameters = AlternatingParameters

    def on_bar(self, context: Context, bar: Bar) -> list[Intent]:
        if not is_ordering_bar(bar.end, self.parameters.every):
            return []
        side = Side.SELL if bar.symbol in context.positions else Side.BUY
        return [PlaceOrder(bar.symbol, side, _ONE)]
