"""The history of a run as plain values: what a report is made of.

Every ``Decimal`` of money is in the run's currency; quantities are in units of the instrument;
moments are aware datetimes. Sequences are in order of time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from itertools import pairwise
from types import MappingProxyType

__all__ = [
    "CashFlow",
    "EquityPoint",
    "Holding",
    "PositionPoint",
    "RunHistory",
    "SipMark",
    "currency_prefix",
    "money",
]

# Money put into positions is negative, money taken out positive.
CashFlow = tuple[datetime, Decimal]

MINUS = "−"
_SIGNS: Mapping[str, str] = MappingProxyType(
    {"USD": "$", "EUR": "€", "GBP": "£", "INR": "₹", "JPY": "¥"}
)
_DIGITS_MAX = 60


@dataclass(frozen=True, slots=True)
class EquityPoint:
    """The mark of a run at one logical time.

    ``equity`` is ``cash + market_value``. ``invested`` is the net cash put into positions so far
    (buys with their costs, less what sells brought in): below zero once sells returned more.
    """

    at: datetime
    cash: Decimal
    market_value: Decimal
    equity: Decimal
    invested: Decimal


@dataclass(frozen=True, slots=True)
class PositionPoint:
    """What a run held of one symbol from ``at`` until the symbol's next point.

    A symbol without a point at some moment still holds what its last point says, so a position
    that was closed ends with a point of quantity 0.
    """

    at: datetime
    symbol: str
    quantity: Decimal
    market_value: Decimal


@dataclass(frozen=True, slots=True)
class SipMark:
    """One execution of a SIP: ``amount`` of cash paid, at ``price`` a unit as it traded."""

    at: datetime
    symbol: str
    amount: Decimal
    price: Decimal


@dataclass(frozen=True, slots=True)
class Holding:
    """A position as it stands at the end; ``avg_cost`` and ``mark_price`` are per unit."""

    symbol: str
    quantity: Decimal
    avg_cost: Decimal
    mark_price: Decimal
    market_value: Decimal
    unrealized_pnl: Decimal
    realized_pnl: Decimal


@dataclass(frozen=True, slots=True)
class RunHistory:
    """All that a report says about one run.

    ``cash_flows`` are the moments at which cash went into positions (negative) or came out of
    them (positive), without the final value. ``currency`` is an ISO 4217 code. ``first_at`` and
    ``last_at`` are the first and last logical time, ``None`` before the first tick.

    Raises ``ValueError`` if ``equity`` isn't in order of time.
    """

    name: str
    run_id: str
    user_id: str
    strategy: str
    calendar: str
    currency: str
    initial_cash: Decimal
    equity: Sequence[EquityPoint] = ()
    positions: Sequence[PositionPoint] = ()
    sips: Sequence[SipMark] = ()
    holdings: Sequence[Holding] = ()
    cash_flows: Sequence[CashFlow] = ()
    orders: int = 0
    executions: int = 0
    ticks: int = 0
    first_at: datetime | None = None
    last_at: datetime | None = None

    def __post_init__(self) -> None:
        for earlier, later in pairwise(self.equity):
            if later.at < earlier.at:
                raise ValueError(f"equity of {later.at} comes after that of {earlier.at}")


def currency_prefix(currency: str) -> str:
    """What stands before an amount of ``currency``: ``$``, or ``CHF`` and a no-break space."""
    return _SIGNS.get(currency, f"{currency}\u00a0" if currency else "")


def money(amount: Decimal, currency: str = "", *, decimals: int = 2, signed: bool = False) -> str:
    """Write an amount for people: ``$1,234.50``, ``−CHF 3.00``, with ``signed`` ``+$2.00``."""
    with localcontext(prec=_DIGITS_MAX):
        rounded = amount.quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_EVEN)
    sign = MINUS if rounded < 0 else "+" if signed and rounded > 0 else ""
    return f"{sign}{currency_prefix(currency)}{rounded.copy_abs():,f}"
