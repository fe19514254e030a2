"""The bars and orders that the tests of the paper book start from."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from engine.market.model import Bar
from engine.orders.model import Order, OrderType, Side, TimeInForce
from engine.paper.book import Moment, Outcome, match
from engine.paper.costs import PaperSettings

OPEN = datetime(2024, 1, 2, 14, 30, tzinfo=UTC)
CLOSE = datetime(2024, 1, 2, 21, 0, tzinfo=UTC)
SECOND = timedelta(seconds=1)
DAY = timedelta(days=1)

INSIDE = Moment(opens_session=False, closes_session=False)
OPENING = Moment(opens_session=True, closes_session=False)
CLOSING = Moment(opens_session=False, closes_session=True)

PLAIN = PaperSettings()


def dec(value: str | int | None) -> Decimal | None:
    return None if value is None else Decimal(value)


def a_bar(
    prices: str = "100 110 90 105",
    *,
    start: datetime = OPEN,
    end: datetime = CLOSE,
    volume: str | int | None = None,
    symbol: str = "SPY",
) -> Bar:
    """A bar from its open, high, low and close."""
    first, high, low, last = (Decimal(price) for price in prices.split())
    return Bar(symbol, start, end, first, high, low, last, dec(volume))


def an_order(
    order_type: str = "MARKET",
    side: str = "BUY",
    *,
    quantity: str | int = 10,
    tif: str = "GTC",
    at: datetime = OPEN,
    limit: str | int | None = None,
    stop: str | int | None = None,
    trail: str | int | None = None,
    percent: str | int | None = None,
    expire_at: datetime | None = None,
    triggered_at: datetime | None = None,
    filled: str | int = 0,
    number: int = 1,
    symbol: str = "SPY",
) -> Order:
    return Order(
        order_id=UUID(int=number),
        symbol=symbol,
        side=Side(side),
        quantity=Decimal(quantity),
        order_type=OrderType(order_type),
        time_in_force=TimeInForce(tif),
        logical_time=at,
        limit_price=dec(limit),
        stop_price=dec(stop),
        trail_amount=dec(trail),
        trail_percent=dec(percent),
        expire_at=expire_at,
        triggered_at=triggered_at,
        filled_quantity=Decimal(filled),
    )


def work(
    order: Order,
    bar: Bar,
    *,
    moment: Moment = INSIDE,
    settings: PaperSettings = PLAIN,
    now: datetime | None = None,
    volume_left: str | int | None = None,
    fills_before: int = 0,
) -> Outcome:
    """``match``, at the end of the bar unless told otherwise."""
    return match(
        order,
        bar,
        moment=moment,
        settings=settings,
        now=bar.end if now is None else now,
        volume_left=dec(volume_left),
        fills_before=fills_before,
    )


def price_of(outcome: Outcome) -> Decimal | None:
    """What the order paid; ``None``: nothing filled."""
    return outcome.fills[0].price if outcome.fills else None


def settings_of(**values: Any) -> PaperSettings:
    return PaperSettings.model_validate(values)
