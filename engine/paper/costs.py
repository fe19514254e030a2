"""What trading costs on paper: named slippage and commission models, and a book's settings.

Prices are in the instrument's currency per unit, quantities in units, commissions in the
instrument's currency. A setting is stored as JSON, its decimals as strings, and reads back equal.
"""

from __future__ import annotations

import hashlib
from decimal import (
    ROUND_CEILING,
    ROUND_DOWN,
    ROUND_FLOOR,
    ROUND_HALF_EVEN,
    Context,
    Decimal,
    DivisionByZero,
    InvalidOperation,
    Overflow,
    localcontext,
)
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from engine.orders.model import Side

__all__ = [
    "EXACT",
    "BpsSlippage",
    "Commission",
    "FixedCommission",
    "NoCommission",
    "NoSlippage",
    "PaperSettings",
    "PerUnitCommission",
    "PercentCommission",
    "Slippage",
    "TicksSlippage",
    "UniformBpsSlippage",
]

DECIMALS_MAX = 12
COMMISSION_DECIMALS = 8

# Wide enough that a quantity times a price is exact: Python's default of 28 digits would round
# it without a word.
EXACT = Context(
    prec=50, rounding=ROUND_HALF_EVEN, traps=[InvalidOperation, DivisionByZero, Overflow]
)

_ZERO = Decimal(0)
_BPS_IN_ONE = Decimal(10_000)
_PERCENT_IN_ONE = Decimal(100)
_UNITS = tuple(Decimal(1).scaleb(-decimals) for decimals in range(DECIMALS_MAX + 1))

Amount = Annotated[Decimal, Field(ge=0, max_digits=28, decimal_places=DECIMALS_MAX)]
# Below 10,000, since a sell that slips by all of its price would give the units away.
Bps = Annotated[Decimal, Field(ge=0, lt=_BPS_IN_ONE, decimal_places=DECIMALS_MAX)]
Percent = Annotated[Decimal, Field(ge=0, le=_PERCENT_IN_ONE, decimal_places=DECIMALS_MAX)]
Decimals = Annotated[int, Field(ge=0, le=DECIMALS_MAX)]


class _Setting(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NoSlippage(_Setting):
    """Fill at the bar's price."""

    model: Literal["NONE"] = "NONE"

    def distance(self, price: Decimal, key: str) -> Decimal:
        return _ZERO


class BpsSlippage(_Setting):
    """Move the price by ``bps`` basis points of itself."""

    model: Literal["BPS"] = "BPS"
    bps: Bps

    def distance(self, price: Decimal, key: str) -> Decimal:
        return abs(price) * self.bps / _BPS_IN_ONE


class UniformBpsSlippage(_Setting):
    """Move the price by 0 to ``max_bps`` basis points of itself, uniformly."""

    model: Literal["UNIFORM_BPS"] = "UNIFORM_BPS"
    max_bps: Bps

    def distance(self, price: Decimal, key: str) -> Decimal:
        # A hash of the fill's key, not a generator's next number: a replay that sees the orders
        # in another order, or only one of them, still draws the same slippage.
        drawn = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
        return abs(price) * self.max_bps / _BPS_IN_ONE * (Decimal(drawn) / 2**64)


class TicksSlippage(_Setting):
    """Move the price by ``ticks`` steps of ``tick_size`` (currency per unit)."""

    model: Literal["TICKS"] = "TICKS"
    ticks: Annotated[int, Field(ge=0, le=1_000_000)]
    tick_size: Annotated[Amount, Field(gt=0)]

    def distance(self, price: Decimal, key: str) -> Decimal:
        return self.ticks * self.tick_size


class NoCommission(_Setting):
    """Trade free of charge."""

    model: Literal["NONE"] = "NONE"

    def charge(self, quantity: Decimal, price: Decimal) -> Decimal:
        return _ZERO


class FixedCommission(_Setting):
    """Charge ``amount`` for every execution."""

    model: Literal["FIXED"] = "FIXED"
    amount: Amount

    def charge(self, quantity: Decimal, price: Decimal) -> Decimal:
        return self.amount


class PerUnitCommission(_Setting):
    """Charge ``rate`` a unit, and at least ``minimum`` an execution."""

    model: Literal["PER_UNIT"] = "PER_UNIT"
    rate: Amount
    minimum: Amount = _ZERO

    def charge(self, quantity: Decimal, price: Decimal) -> Decimal:
        return max(self.minimum, quantity * self.rate)


class PercentCommission(_Setting):
    """Charge ``percent`` of the notional (5 is 5 %), and at least ``minimum`` an execution."""

    model: Literal["PERCENT"] = "PERCENT"
    percent: Percent
    minimum: Amount = _ZERO

    def charge(self, quantity: Decimal, price: Decimal) -> Decimal:
        return max(self.minimum, abs(quantity * price) * self.percent / _PERCENT_IN_ONE)


def _upper_model(value: Any) -> Any:
    if isinstance(value, dict) and isinstance(value.get("model"), str):
        return {**value, "model": value["model"].upper()}
    return value


Slippage = Annotated[
    NoSlippage | BpsSlippage | UniformBpsSlippage | TicksSlippage,
    Field(discriminator="model"),
    BeforeValidator(_upper_model),
]
Commission = Annotated[
    NoCommission | FixedCommission | PerUnitCommission | PercentCommission,
    Field(discriminator="model"),
    BeforeValidator(_upper_model),
]


class PaperSettings(_Setting):
    """How a paper book fills.

    ``max_volume_share`` is the part of a bar's volume that all orders of its symbol may take
    together (``None``: no cap). ``stale_after_seconds`` is the age in seconds beyond which a
    price never fills (``None``: prices don't age). ``seed`` picks the random slippage.
    """

    slippage: Slippage = NoSlippage()
    commission: Commission = NoCommission()
    max_volume_share: Annotated[Decimal, Field(gt=0, le=1)] | None = None
    quantity_decimals: Decimals = 6
    price_decimals: Decimals = 8
    seed: int = 0
    stale_after_seconds: Annotated[int, Field(ge=0)] | None = None

    def cut(self, quantity: Decimal) -> Decimal:
        """Cut (never round up) to ``quantity_decimals``, so that no fill exceeds its limits."""
        return quantity.quantize(_UNITS[self.quantity_decimals], ROUND_DOWN, EXACT)

    def price_against(self, price: Decimal, side: Side) -> Decimal:
        """Round to ``price_decimals`` against the order: a buy's price up, a sell's down."""
        rounding = ROUND_CEILING if side is Side.BUY else ROUND_FLOOR
        return price.quantize(_UNITS[self.price_decimals], rounding, EXACT)

    def fill_price(self, price: Decimal, side: Side, *, limit: Decimal | None, key: str) -> Decimal:
        """What an order that gets ``price`` pays after slippage, never beyond its limit.

        ``key`` names the fill: the same seed and key draw the same random slippage. The result
        keeps the price's sign, since units sold for less than nothing would break the books.
        """
        buying = side is Side.BUY
        with localcontext(EXACT):
            slip = self.slippage.distance(price, f"{self.seed}:{key}")
            paid = self.price_against(price + slip if buying else price - slip, side)
            if price and price * paid <= 0:
                nearest = min(abs(price), _UNITS[self.price_decimals])
                paid = nearest.copy_sign(price)
            if limit is None:
                return paid
            return min(paid, limit) if buying else max(paid, limit)

    def commission_on(self, quantity: Decimal, price: Decimal) -> Decimal:
        """The commission of one execution, rounded half-even to 8 decimals."""
        with localcontext(EXACT):
            charge = self.commission.charge(quantity, price)
            return charge.quantize(_UNITS[COMMISSION_DECIMALS], ROUND_HALF_EVEN)
