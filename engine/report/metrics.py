"""What a run earned and risked, as figures.

Rates and fractions are plain numbers (0.05 is 5 %), rounded half-even to ``RATE_DECIMALS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal, localcontext

from engine.report.model import CashFlow, EquityPoint, RunHistory

__all__ = [
    "Drawdown",
    "Summary",
    "max_drawdown",
    "money_weighted_return",
    "summary",
]

RATE_DECIMALS = 10
# Beyond these no annual rate means anything: a profit of a day, compounded for a year.
RATE_MIN = -0.999_999
RATE_MAX = 1_000_000.0

_YEAR = timedelta(days=365)
_ZERO = Decimal(0)
_RATE_UNIT = Decimal(1).scaleb(-RATE_DECIMALS)
_DIGITS_MAX = 60
_SCAN_FIRST = 0.01
_SCAN_GROWTH = 1.25
_BISECTIONS = 60


@dataclass(frozen=True, slots=True)
class Drawdown:
    """A fall of equity below an earlier peak: ``fraction`` of the peak that was lost."""

    fraction: Decimal
    peak_at: datetime
    trough_at: datetime


@dataclass(frozen=True, slots=True)
class Summary:
    """A run in one line, at its last mark; money in the run's currency.

    ``invested`` is the net cash put into positions. ``money_weighted_return`` is a year's rate,
    of the money put into positions rather than of all cash. Both it and ``max_drawdown`` are
    ``None`` where they don't exist.
    """

    invested: Decimal
    cash: Decimal
    market_value: Decimal
    equity: Decimal
    gain: Decimal
    money_weighted_return: Decimal | None
    max_drawdown: Drawdown | None
    orders: int
    executions: int
    ticks: int


def money_weighted_return(
    flows: Iterable[CashFlow], final_value: Decimal, at: datetime
) -> Decimal | None:
    """The annual rate at which ``flows`` grow to ``final_value`` at ``at`` (XIRR, actual/365).

    Money put in is negative, money taken out positive. Where several rates fit, the one nearest
    to zero is meant. ``None`` if no rate fits (nothing put in, nothing left, no time passed) or
    if it lies outside ``RATE_MIN`` to ``RATE_MAX``.

    Raises ``ValueError`` for a flow after ``at`` and for an amount that isn't finite.
    """
    amounts = _net_by_time([*flows, (at, final_value)], at)
    if not any(amount > 0 for amount in amounts.values()):
        return None
    if not any(amount < 0 for amount in amounts.values()):
        return None
    worth = _net_worth([(years, float(amount)) for years, amount in amounts.items()])
    bracket = _bracket(worth)
    if bracket is None:
        return None
    rate = math.expm1(_bisect(worth, *bracket))
    return Decimal(repr(rate)).quantize(_RATE_UNIT)


def max_drawdown(equity: Sequence[EquityPoint]) -> Drawdown | None:
    """The deepest fall below an earlier peak; the first of equals; ``None`` without points.

    Equity that never fell has a drawdown of 0 at its first point. A peak that isn't above zero
    has no fraction to lose.
    """
    if not equity:
        return None
    peak, deepest = equity[0], _ZERO
    fell_from = trough = peak
    for point in equity:
        if point.equity > peak.equity:
            peak = point
        elif point.equity < peak.equity and peak.equity > 0:
            fraction = (peak.equity - point.equity) / peak.equity
            if fraction > deepest:
                deepest, fell_from, trough = fraction, peak, point
    with localcontext(prec=_DIGITS_MAX):
        return Drawdown(deepest.quantize(_RATE_UNIT), fell_from.at, trough.at)


def summary(history: RunHistory) -> Summary:
    """A run's figures at its last mark; before the first one, its initial cash."""
    rate = None
    invested = market_value = _ZERO
    cash = equity = history.initial_cash
    if history.equity:
        last = history.equity[-1]
        invested, cash = last.invested, last.cash
        market_value, equity = last.market_value, last.equity
        rate = money_weighted_return(history.cash_flows, market_value, last.at)
    return Summary(
        invested=invested,
        cash=cash,
        market_value=market_value,
        equity=equity,
        gain=equity - history.initial_cash,
        money_weighted_return=rate,
        max_drawdown=max_drawdown(history.equity),
        orders=history.orders,
        executions=history.executions,
        ticks=history.ticks,
    )


def _net_by_time(flows: Sequence[CashFlow], at: datetime) -> dict[float, Decimal]:
    """Net amounts other than zero, by years since the first of them."""
    net: dict[datetime, Decimal] = {}
    for moment, amount in flows:
        if moment > at:
            raise ValueError(f"a flow at {moment} is later than the final value at {at}")
        if not amount.is_finite():
            raise ValueError(f"a flow at {moment} is {amount}: it must be a finite amount")
        net[moment] = net.get(moment, _ZERO) + amount
    moving = sorted(moment for moment, amount in net.items() if amount)
    return {(moment - moving[0]) / _YEAR: net[moment] for moment in moving}


def _net_worth(flows: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    """Net value of the flows as a function of the continuous rate, in sign and roots.

    Seen from the last moment below zero and from the first above it: then no power exceeds 1,
    so that a century at any rate doesn't overflow, and the two meet at zero.
    """
    end = flows[-1][0]

    def worth(rate: float) -> float:
        seen_from = end if rate < 0 else 0.0
        return math.fsum(amount * math.exp(rate * (seen_from - years)) for years, amount in flows)

    return worth


def _bracket(worth: Callable[[float], float]) -> tuple[float, float] | None:
    """Two continuous rates around the root nearest to zero, searched outwards from zero."""
    bounds = (math.log1p(RATE_MAX), math.log1p(RATE_MIN))
    reached = [0.0, 0.0]
    value = [worth(0.0)] * 2
    step = _SCAN_FIRST
    while reached != list(bounds):
        for side, direction in enumerate((1, -1)):
            limit = abs(bounds[side])
            there = direction * min(abs(reached[side]) + step, limit)
            worth_there = worth(there)
            if (worth_there > 0) != (value[side] > 0):
                return reached[side], there
            reached[side], value[side] = there, worth_there
        step *= _SCAN_GROWTH
    return None


def _bisect(worth: Callable[[float], float], low: float, high: float) -> float:
    # Halving can't be led astray by a shape, and sixty halvings cost less than one picture.
    above = worth(low) > 0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if (worth(middle) > 0) == above:
            low = middle
        else:
            high = middle
    return (low + high) / 2
