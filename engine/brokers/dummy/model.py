"""What the exchange knows, as values. Quantities are in units, prices in currency per unit."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any

from engine.quantities import EXACT

__all__ = [
    "BUY",
    "ENDED",
    "HAND",
    "SELL",
    "ZERO",
    "Account",
    "Holding",
    "Order",
    "Report",
    "Symbol",
    "Trade",
]

BUY, SELL = "BUY", "SELL"
ZERO = Decimal(0)

# Who places an order by hand is no client.
HAND = -1

ENDED = frozenset({"FILLED", "CANCELED", "EXPIRED", "INACTIVE", "REJECTED"})


@dataclass(slots=True)
class Order:
    """An order as the exchange holds it. ``number`` is its own; ids that it gives out are not.

    ``stop_price`` of a TRAIL is where its stop stands now. ``aside``: accepted, but in no book,
    because a fault decides what becomes of it: it fills when the session closes.
    """

    number: int
    account: str
    client_id: int
    order_ref: str
    symbol: str
    side: str
    quantity: Decimal
    order_type: str
    time_in_force: str
    placed_at: datetime
    limit_price: Decimal | None = None
    stop_price: Decimal | None = None
    trail_amount: Decimal | None = None
    trail_percent: Decimal | None = None
    expire_at: datetime | None = None
    broker_order_id: int = 0
    perm_id: int = 0
    status: str = "PENDING_SUBMIT"
    filled: Decimal = ZERO
    triggered: bool = False
    aside: bool = False
    reason: str = ""
    ended_at: datetime | None = None

    @property
    def remaining(self) -> Decimal:
        """What may still trade; nothing of an order that was overfilled."""
        return max(EXACT.subtract(self.quantity, self.filled), ZERO)

    @property
    def is_open(self) -> bool:
        return self.status not in ENDED


@dataclass(frozen=True, slots=True)
class Trade:
    """What a book decided: so much of an order at a price; ``filled`` counts it in."""

    order: Order
    quantity: Decimal
    price: Decimal
    filled: Decimal


@dataclass(slots=True)
class Symbol:
    """What is traded, and how. ``liquidity``: units a side and price, ``None`` without end."""

    name: str
    price: Decimal | None = None
    liquidity: Decimal | None = None
    currency: str = "USD"
    negative_prices: bool = False
    walk_bps: Decimal = ZERO
    steps: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """An EXECUTION, a BUST of one or a COMMISSION for one: history, never changed."""

    number: int
    account: str
    kind: str
    at: datetime
    order_number: int
    execution_id: str
    symbol: str = ""
    side: str = ""
    quantity: Decimal = ZERO
    price: Decimal = ZERO
    amount: Decimal = ZERO
    currency: str = ""

    @property
    def payload(self) -> dict[str, Any]:
        """What a message says of it."""
        said: dict[str, Any] = {"execution_id": self.execution_id}
        if self.kind == "EXECUTION":
            said |= {
                "symbol": self.symbol,
                "side": self.side,
                "quantity": f"{self.quantity:f}",
                "price": f"{self.price:f}",
            }
        elif self.kind == "COMMISSION":
            said |= {"amount": f"{self.amount:f}", "currency": self.currency}
        return said


@dataclass(slots=True)
class Holding:
    """A position: its units, and what they cost together."""

    quantity: Decimal = ZERO
    cost: Decimal = ZERO

    def trade(self, signed: Decimal, price: Decimal) -> None:
        """Buy (or with a negative quantity sell) so many units, at average cost."""
        after = EXACT.add(self.quantity, signed)
        if self.quantity * signed >= 0:
            self.cost = EXACT.add(self.cost, EXACT.multiply(signed, price))
        elif self.quantity * after > 0:
            share = EXACT.divide(after, self.quantity)
            self.cost = EXACT.multiply(self.cost, share)
        else:
            self.cost = EXACT.multiply(after, price)
        self.quantity = after


@dataclass(slots=True)
class Account:
    """Money by currency, positions by symbol."""

    name: str
    cash: dict[str, Decimal] = field(default_factory=dict)
    opening_cash: dict[str, Decimal] = field(default_factory=dict)
    holdings: dict[str, Holding] = field(default_factory=dict)

    def pay(self, currency: str, amount: Decimal) -> None:
        """Take money away (or with a negative amount add it)."""
        self.cash[currency] = EXACT.subtract(self.cash.get(currency, ZERO), amount)
