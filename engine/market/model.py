"""Market data as values: bars, single prices (a bar of one price) and splits."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal


@dataclass(frozen=True, slots=True)
class Bar:
    """One symbol's prices over ``[start, end]``, in the instrument's currency per unit.

    ``volume`` is in units traded; ``None`` means that it isn't known, so that no share of it
    limits a fill. A single observed price is a bar whose four prices are equal and whose
    ``start`` is its ``end``.
    """

    symbol: str
    start: datetime
    end: datetime
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    volume: Decimal | None = None

    @classmethod
    def of_price(
        cls, symbol: str, price: Decimal, at: datetime, volume: Decimal | None = None
    ) -> Bar:
        """A single price observed at ``at``."""
        return cls(symbol, at, at, price, price, price, price, volume)

    def at_close(self) -> Bar:
        """What an order that arrives at the end of this bar can trade on: the close alone."""
        return Bar.of_price(self.symbol, self.close, self.end, self.volume)


@dataclass(frozen=True, slots=True)
class Split:
    """``numerator`` new units for ``denominator`` old ones, from the open of ``ex_date`` on."""

    symbol: str
    ex_date: date
    numerator: Decimal
    denominator: Decimal


@dataclass(frozen=True, slots=True)
class FxRate:
    """From ``at`` on, one unit of ``currency`` costs ``rate`` of ``quote_currency``."""

    currency: str
    quote_currency: str
    at: datetime
    rate: Decimal


@dataclass(frozen=True, slots=True)
class Session:
    """One trading session of an exchange calendar; both moments are in UTC."""

    calendar: str
    day: date
    open_at: datetime
    close_at: datetime
