"""What one tick sees of the market: its bars, checked, and where they stand in the session."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from engine.errors import BadInput
from engine.market.model import Bar, Session
from engine.paper.book import Moment
from engine.reference import Reference
from engine.runs import require_aware

PRICE_MAX = Decimal(10) ** 15
PRICE_DECIMALS_MAX = 8

Prices = Iterable[Bar] | Mapping[str, Decimal]


@dataclass(frozen=True, slots=True)
class View:
    """Bars and closes by symbol at ``logical_time``; ``session`` is of the run's calendar."""

    logical_time: datetime
    now: datetime
    bars: Mapping[str, Bar]
    prices: Mapping[str, Decimal]
    quantity_decimals: Mapping[str, int]
    session: Session | None
    market_open: bool

    def moment(self, bar: Bar) -> Moment:
        """Where ``bar`` stands in the session."""
        if self.session is None:
            return Moment(opens_session=False, closes_session=False)
        return Moment(
            opens_session=bar.start <= self.session.open_at <= bar.end,
            closes_session=bar.end == self.session.close_at,
        )


def look(
    reference: Reference,
    logical_time: datetime,
    prices: Prices,
    *,
    now: datetime | None = None,
    market_open: bool | None = None,
) -> View:
    """Check what a tick was given and put it in its place.

    Raises BadInput for a naive time, a price that is no price, a symbol that is unknown or named
    twice, and a bar from after ``logical_time``.
    """
    logical_time = require_aware(logical_time, "logical_time")
    now = logical_time if now is None else require_aware(now, "now")
    bars: dict[str, Bar] = {}
    for bar in _as_bars(prices, logical_time):
        if bar.symbol in bars:
            raise BadInput(f"{bar.symbol} has two prices at {logical_time.isoformat()}; give one")
        bars[bar.symbol] = _checked(bar, logical_time)
    quantity_decimals = reference.quantity_decimals(bars)
    for bar in bars.values():
        if bar.low <= 0 and not reference.may_be_negative(bar.symbol):
            raise BadInput(f"{bar.low} is no price for {bar.symbol}; give one above zero")
    session = reference.session_at(logical_time)
    if market_open is None:
        market_open = session is not None and logical_time <= session.close_at
    return View(
        logical_time,
        now,
        bars,
        {symbol: bar.close for symbol, bar in bars.items()},
        quantity_decimals,
        session,
        market_open,
    )


def _as_bars(prices: Prices, at: datetime) -> Iterable[Bar]:
    if isinstance(prices, Mapping):
        return [Bar.of_price(symbol.upper(), price, at) for symbol, price in prices.items()]
    return prices


def _checked(bar: Bar, logical_time: datetime) -> Bar:
    for price in (bar.open, bar.high, bar.low, bar.close):
        _check_price(price, bar.symbol)
    if not bar.low <= min(bar.open, bar.close) <= max(bar.open, bar.close) <= bar.high:
        raise BadInput(f"the bar of {bar.symbol} has prices outside of its low and high")
    if bar.volume is not None and not (bar.volume.is_finite() and bar.volume >= 0):
        raise BadInput(f"{bar.volume} is no volume for {bar.symbol}; give none if it isn't known")
    if bar.end.tzinfo is None or bar.start.tzinfo is None:
        raise BadInput(f"the bar of {bar.symbol} at {bar.end.isoformat()} has no time zone")
    if bar.start > bar.end:
        raise BadInput(f"the bar of {bar.symbol} at {bar.end.isoformat()} ends before it starts")
    if bar.end > logical_time:
        raise BadInput(
            f"the price of {bar.symbol} is from {bar.end.isoformat()}, after the tick at "
            f"{logical_time.isoformat()}"
        )
    return bar


def _check_price(price: Decimal, symbol: str) -> None:
    if not isinstance(price, Decimal):
        raise BadInput(f"the price {price!r} of {symbol} is no Decimal")
    if not price.is_finite() or abs(price) >= PRICE_MAX:
        raise BadInput(f"{price} is no price for {symbol}; give a finite number below 10^15")
    if price != round(price, PRICE_DECIMALS_MAX):
        raise BadInput(f"the price {price} of {symbol} has more than {PRICE_DECIMALS_MAX} decimals")
