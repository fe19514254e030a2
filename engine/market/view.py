"""What one tick sees of the market: its bars, checked, and where they stand in the session."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

from engine.errors import BadInput
from engine.market.model import Bar, Session
from engine.paper.book import Moment
from engine.reference import Reference

PRICE_MAX = Decimal(10) ** 15
PRICE_DECIMALS_MAX = 8

Prices = Iterable[Bar] | Mapping[str, Decimal]


@dataclass(frozen=True, slots=True)
class View:
    """Bars and closes by symbol at ``logical_time``; both sessions are of the run's calendar."""

    logical_time: datetime
    now: datetime
    bars: Mapping[str, Bar]
    prices: Mapping[str, Decimal]
    quantity_decimals: Mapping[str, int]
    session: Session | None
    next_session: Session | None
    market_open: bool

    def moment(self, bar: Bar) -> Moment:
        """Where ``bar`` stands in the session."""
        if self.session is None:
            return Moment(opens_session=False, closes_session=False)
        return Moment(
            opens_session=bar.start <= self.session.open_at <= bar.end,
            closes_session=bar.end == self.session.close_at,
        )

    def day_ends(self, arrived: datetime) -> datetime | None:
        """Until when a DAY order that arrived then may fill: its session's close, or the next's."""
        for session in (self.session, self.next_session):
            if session is not None and arrived < session.close_at:
                return session.close_at
        return None


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
    if logical_time.tzinfo is None:
        raise BadInput(
            f"logical_time {logical_time.isoformat()} has no time zone; write for instance "
            f"{logical_time.isoformat()}+00:00"
        )
    logical_time = logical_time.astimezone(UTC)
    bars: dict[str, Bar] = {}
    for bar in _as_bars(prices, logical_time):
        if bar.symbol in bars:
            raise BadInput(f"{bar.symbol} has two prices at {logical_time.isoformat()}; give one")
        bars[bar.symbol] = _checked(bar, logical_time)
    session = reference.session_at(logical_time)
    if market_open is None:
        market_open = session is not None and logical_time <= session.close_at
    return View(
        logical_time,
        now or logical_time,
        bars,
        {symbol: bar.close for symbol, bar in bars.items()},
        reference.quantity_decimals(bars),
        session,
        reference.session_after(logical_time),
        market_open,
    )


def _as_bars(prices: Prices, at: datetime) -> Iterable[Bar]:
    if isinstance(prices, Mapping):
        return [Bar.of_price(symbol, price, at) for symbol, price in prices.items()]
    return prices


def _checked(bar: Bar, logical_time: datetime) -> Bar:
    for price in (bar.open, bar.high, bar.low, bar.close):
        exponent = price.as_tuple().exponent
        if not isinstance(exponent, int) or abs(price) >= PRICE_MAX:
            raise BadInput(f"{price} is no price for {bar.symbol}; give a finite number")
        if -exponent > PRICE_DECIMALS_MAX and price != round(price, PRICE_DECIMALS_MAX):
            raise BadInput(
                f"the price {price} of {bar.symbol} has more than {PRICE_DECIMALS_MAX} decimals"
            )
    if bar.end.tzinfo is None or bar.start.tzinfo is None:
        raise BadInput(f"the bar of {bar.symbol} at {bar.end.isoformat()} has no time zone")
    if bar.end > logical_time:
        raise BadInput(
            f"the price of {bar.symbol} is from {bar.end.isoformat()}, after the tick at "
            f"{logical_time.isoformat()}"
        )
    return bar
