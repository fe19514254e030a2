"""Holds a portfolio at fixed weights and brings it back to them once a period."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import Field, field_validator

from engine.market.model import Session
from engine.orders.model import Side
from engine.quantities import cut
from engine.strategies.base import (
    Announce,
    Context,
    Intent,
    Parameters,
    PlaceOrder,
    Remember,
    Strategy,
)

Weight = Annotated[Decimal, Field(gt=0, le=1)]
Period = Literal["MONTHLY", "QUARTERLY", "YEARLY"]


class RebalanceParameters(Parameters):
    """``weights`` by symbol, as shares of equity (1 is all of it; at most 1 together)."""

    weights: dict[str, Weight] = Field(min_length=1)
    period: Period = "QUARTERLY"

    @field_validator("weights")
    @classmethod
    def _at_most_all(cls, weights: dict[str, Decimal]) -> dict[str, Decimal]:
        if sum(weights.values()) > 1:
            raise ValueError("the weights add up to more than 1")
        upper = {symbol.upper(): weight for symbol, weight in weights.items()}
        if len(upper) < len(weights):
            raise ValueError("a symbol is named twice")
        return upper


class Rebalance(Strategy):
    """At the first tick of a period in which the market is open: sells, then buys, to the weights.

    A symbol's target is ``weight x equity / price`` cut to its decimals, so that the targets
    together never cost more than the equity.
    """

    Parameters = RebalanceParameters
    parameters: RebalanceParameters

    def symbols(self) -> frozenset[str]:
        return frozenset(self.parameters.weights)

    def on_tick(self, context: Context) -> Iterator[Intent]:
        if not context.market_open or context.session is None:
            return
        period = period_of(context.session, self.parameters.period)
        priced = self.parameters.weights.keys() <= context.prices.keys()
        if not priced or context.state.get("period") == period:
            return
        changes = {symbol: self._change(context, symbol) for symbol in self.parameters.weights}
        for symbol, change in changes.items():
            if change < 0:
                yield PlaceOrder(symbol, Side.SELL, -change)
        for symbol, change in changes.items():
            if change > 0:
                yield PlaceOrder(symbol, Side.BUY, change)
        yield Announce("REBALANCED", period, {s: str(c) for s, c in changes.items()})
        yield Remember({"period": period})

    def _change(self, context: Context, symbol: str) -> Decimal:
        """Units to buy (positive) or to sell (negative)."""
        money = self.parameters.weights[symbol] * context.equity
        target = cut(money / context.prices[symbol], context.quantity_decimals[symbol])
        held = context.positions.get(symbol)
        return target - (held.quantity if held else 0)


def period_of(session: Session, period: Period) -> str:
    """The key of the period that a session belongs to, e.g. ``2000-Q2``, ``2000-04``, ``2000``."""
    if period == "YEARLY":
        return f"{session.day.year}"
    if period == "QUARTERLY":
        return f"{session.day.year}-Q{(session.day.month - 1) // 3 + 1}"
    return f"{session.day:%Y-%m}"
