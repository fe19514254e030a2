"""Orders and fills as values, in the words that the database stores."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from uuid import UUID

_ALIASES = {
    "MKT": "MARKET",
    "LMT": "LIMIT",
    "STP": "STOP",
    "STP_LMT": "STOP_LIMIT",
    "MOC": "MARKET",
    "LOC": "LIMIT",
}


class _Word(StrEnum):
    """A word as the database stores it; made from one in any case, or from its alias."""

    @classmethod
    def _missing_(cls, value: object) -> _Word | None:
        word = str(value).strip().upper()
        return cls.__members__.get(_ALIASES.get(word, word))


class Side(_Word):
    BUY = "BUY"
    SELL = "SELL"


class OrderType(_Word):
    MARKET = "MARKET"
    LIMIT = "LIMIT"
    STOP = "STOP"
    STOP_LIMIT = "STOP_LIMIT"
    TRAIL = "TRAIL"


class TimeInForce(_Word):
    DAY = "DAY"
    GTC = "GTC"
    IOC = "IOC"
    FOK = "FOK"
    GTD = "GTD"
    OPG = "OPG"
    CLS = "CLS"


@dataclass(frozen=True, slots=True)
class Order:
    """An order as the paper book works it; one row of ``orders``.

    Quantities are in units of the instrument, prices in its currency per unit.
    ``trail_amount`` is in currency, ``trail_percent`` in percent of the price (5 is 5 %); a
    TRAIL order has one of the two, and ``stop_price`` is where its stop stands now (``None``
    until it has seen a price). ``triggered_at`` is when a stop was reached. ``expire_at`` is
    the last moment at which it may fill (``None``: no end).
    """

    order_id: UUID
    symbol: str
    side: Side
    quantity: Decimal
    order_type: OrderType
    time_in_force: TimeInForce
    logical_time: datetime
    limit_price: Decimal | None = None
    stop_price: Decimal | None = None
    trail_amount: Decimal | None = None
    trail_percent: Decimal | None = None
    expire_at: datetime | None = None
    triggered_at: datetime | None = None
    filled_quantity: Decimal = Decimal(0)

    def filled_by(self, filled_quantity: Decimal) -> Order:
        """The order with so much filled. Spelled out: ``dataclasses.replace`` costs five times."""
        return Order(
            self.order_id,
            self.symbol,
            self.side,
            self.quantity,
            self.order_type,
            self.time_in_force,
            self.logical_time,
            self.limit_price,
            self.stop_price,
            self.trail_amount,
            self.trail_percent,
            self.expire_at,
            self.triggered_at,
            filled_quantity,
        )

    @property
    def remaining(self) -> Decimal:
        return self.quantity - self.filled_quantity


@dataclass(frozen=True, slots=True)
class Fill:
    """One execution: ``price`` in currency per unit, ``commission`` in the same currency."""

    order_id: UUID
    execution_id: str
    symbol: str
    side: Side
    quantity: Decimal
    price: Decimal
    commission: Decimal
    event_at: datetime
