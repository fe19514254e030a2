"""Histories that the tests of the report start from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from engine.report.model import (
    EquityPoint,
    Holding,
    PositionPoint,
    RunHistory,
    SipMark,
)

START = datetime(2000, 3, 1, 21, 0, tzinfo=UTC)
DAY = timedelta(days=1)
CENT = Decimal("0.01")
MONTH_TICKS = 21
SIP_AMOUNT = Decimal(500)
INITIAL_CASH = Decimal(250_000)


def a_point(day: float, equity: str | int, *, cash: str | int = 0) -> EquityPoint:
    """A mark ``day`` days after START, of which ``cash`` is not invested."""
    value = Decimal(equity) - Decimal(cash)
    return EquityPoint(START + DAY * day, Decimal(cash), value, Decimal(equity), Decimal(100))


def points_of(*equities: str | int) -> list[EquityPoint]:
    return [a_point(day, equity) for day, equity in enumerate(equities)]


def a_history(equity: Sequence[EquityPoint] = (), **more: Any) -> RunHistory:
    """A run of its marks alone, unless told more."""
    given: dict[str, Any] = {
        "name": "demo",
        "run_id": "0198c0de-0000-7000-8000-00000000000a",
        "user_id": "0198c0de-0000-7000-8000-00000000000b",
        "strategy": "sip",
        "calendar": "XNYS",
        "currency": "USD",
        "initial_cash": INITIAL_CASH,
        "equity": equity,
        "ticks": len(equity),
        "first_at": equity[0].at if equity else None,
        "last_at": equity[-1].at if equity else None,
    }
    return RunHistory(**(given | more))


def a_sip_history(
    ticks: int = 60, symbols: Sequence[str] = ("AAPL", "IBM", "MSFT"), **more: Any
) -> RunHistory:
    """A run that buys each symbol for 500 a month, at prices that wander from a fixed seed."""
    draw = random.Random(2)
    prices = dict.fromkeys(symbols, Decimal(100))
    held = dict.fromkeys(symbols, Decimal(0))
    invested = Decimal(0)
    equity, positions, sips, flows = [], [], [], []
    for tick in range(ticks):
        at = START + DAY * tick
        for symbol in symbols:
            change = Decimal(repr(draw.gauss(1.0005, 0.02)))
            prices[symbol] = max(CENT, (prices[symbol] * change).quantize(CENT))
            if tick % MONTH_TICKS == 0:
                held[symbol] += (SIP_AMOUNT / prices[symbol]).quantize(Decimal("0.000001"))
                invested += SIP_AMOUNT
                sips.append(SipMark(at, symbol, SIP_AMOUNT, prices[symbol]))
                flows.append((at, -SIP_AMOUNT))
            value = held[symbol] * prices[symbol]
            positions.append(PositionPoint(at, symbol, held[symbol], value))
        market_value = sum((held[symbol] * prices[symbol] for symbol in symbols), Decimal(0))
        cash = INITIAL_CASH - invested
        equity.append(EquityPoint(at, cash, market_value, cash + market_value, invested))
    holdings = [a_holding(symbol, held[symbol], prices[symbol]) for symbol in symbols]
    counts = {"orders": len(sips), "executions": len(sips)}
    return a_history(
        equity,
        **({"positions": positions, "sips": sips, "cash_flows": flows, "holdings": holdings}
           | counts | more),
    )  # fmt: skip


def a_holding(symbol: str, quantity: Decimal, price: Decimal) -> Holding:
    value = quantity * price
    cost = quantity * Decimal(90)
    return Holding(symbol, quantity, Decimal(90), price, value, value - cost, Decimal(0))
