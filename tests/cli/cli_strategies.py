"""Strategies of a user's own, named to `oms run start` as cli_strategies:Class."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal

from engine.orders.model import OrderType, Side, TimeInForce
from engine.strategies.base import Context, PlaceOrder, Remember, Strategy


class Raises(Strategy):
    """Fails at its first tick."""

    def on_tick(self, context: Context) -> None:
        raise ValueError("on purpose")


class FailsLater(Strategy):
    """Fails at its second tick."""

    def on_tick(self, context: Context) -> Iterator[Remember]:
        if context.state:
            raise ValueError("on purpose")
        yield Remember({"ticked": True})


class BidsLow(Strategy):
    """Places orders that rest: a limit, a stop and a trail, one a tick."""

    def on_tick(self, context: Context) -> Iterator[PlaceOrder]:
        number = len(context.open_orders)
        good_till_cancelled = TimeInForce.GTC
        if number == 0:
            yield PlaceOrder(
                "AAPL",
                Side.BUY,
                Decimal(1),
                OrderType.LIMIT,
                good_till_cancelled,
                limit_price=Decimal(100),
            )
        elif number == 1:
            yield PlaceOrder(
                "AAPL",
                Side.BUY,
                Decimal(1),
                OrderType.STOP,
                good_till_cancelled,
                stop_price=Decimal(900),
                client_order_id="mine",
            )
        elif number == 2:
            yield PlaceOrder(
                "AAPL",
                Side.BUY,
                Decimal(1),
                OrderType.TRAIL,
                good_till_cancelled,
                trail_percent=Decimal(5),
            )


class Buys(Strategy):
    """Orders a unit a tick, and one that no cash suffices for."""

    def on_tick(self, context: Context) -> Iterator[PlaceOrder]:
        yield PlaceOrder("AAPL", Side.BUY, Decimal(1))
        yield PlaceOrder("AAPL", Side.BUY, Decimal(1_000_000))
