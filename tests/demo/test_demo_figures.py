"""The demo's figures, recomputed from the CSV in a few lines that share no code with the engine."""

from __future__ import annotations

import csv
import gzip
from collections import defaultdict
from decimal import ROUND_DOWN, Decimal
from pathlib import Path

import pytest

from engine.audit import audit
from engine.db.connect import Connection, open_connection
from engine.demo import Demo, read_market, run_demo

DATA = Path(__file__).parents[2] / "data"
SIX = Decimal("0.000001")
Figures = tuple[Decimal, dict[str, Decimal], dict[str, Decimal]]


def _closes() -> dict[str, dict[str, Decimal]]:
    """Closing price by day and symbol."""
    closes: dict[str, dict[str, Decimal]] = defaultdict(dict)
    with gzip.open(DATA / "demo_prices.csv.gz", "rt") as file:
        for row in csv.DictReader(file):
            closes[row["date"]][row["symbol"]] = Decimal(row["close"])
    return dict(sorted(closes.items()))


def _splits() -> dict[tuple[str, str], Decimal]:
    with (DATA / "demo_splits.csv").open() as file:
        return {
            (row["ex_date"], row["symbol"]): Decimal(row["numerator"]) / Decimal(row["denominator"])
            for row in csv.DictReader(file)
        }


def _sip() -> Figures:
    """500 USD into each symbol at the close of the first session from the 5th of a month on."""
    cash = Decimal(250_000)
    units: dict[str, Decimal] = defaultdict(Decimal)
    cost: dict[str, Decimal] = defaultdict(Decimal)
    splits, done = _splits(), "2000-03"
    for day, close in _closes().items():
        for symbol in close:
            units[symbol] *= splits.get((day, symbol), 1)
        if day[:7] == done or int(day[8:]) < 5:
            continue
        done = day[:7]
        for symbol, price in close.items():
            quantity = (500 / price).quantize(SIX, ROUND_DOWN)
            units[symbol] += quantity
            cost[symbol] += quantity * price
            cash -= quantity * price
    return cash, units, cost


def _rebalance() -> Figures:
    """50/30/20 at the first session and at the first of every quarter, in six decimals."""
    weights = {"AAPL": Decimal("0.5"), "IBM": Decimal("0.3"), "MSFT": Decimal("0.2")}
    cash = Decimal(100_000)
    units: dict[str, Decimal] = defaultdict(Decimal)
    cost: dict[str, Decimal] = defaultdict(Decimal)
    splits, done = _splits(), ""
    for day, close in _closes().items():
        for symbol in close:
            units[symbol] *= splits.get((day, symbol), 1)
        quarter = f"{day[:4]}Q{(int(day[5:7]) - 1) // 3}"
        if quarter == done:
            continue
        done = quarter
        equity = cash + sum(units[symbol] * price for symbol, price in close.items())
        for symbol, price in close.items():
            target = (weights[symbol] * equity / price).quantize(SIX, ROUND_DOWN)
            change = target - units[symbol]
            if change > 0:
                cost[symbol] += change * price
            else:
                cost[symbol] *= target / units[symbol]
            units[symbol], cash = target, cash - change * price
    return cash, units, cost


def _counts(conn: Connection) -> list[tuple[str, int]]:
    tables = [
        name
        for (name,) in conn.execute(
            "SELECT relname FROM pg_class WHERE relkind = 'r'"
            " AND relnamespace = 'public'::regnamespace ORDER BY 1"
        ).fetchall()
    ]
    found = [conn.execute(f"SELECT '{name}', count(*) FROM {name}").fetchone() for name in tables]
    return [(row[0], row[1]) for row in found if row is not None]


@pytest.mark.slow
def test_the_demo_comes_to_what_the_prices_make_it_and_runs_once(dsn: str) -> None:
    market = read_market()
    demo = run_demo(dsn, market)
    assert (demo.written, demo.repeated) == (6540, 0)
    for run, expected in zip(demo.runs, (_sip(), _rebalance()), strict=True):
        _agrees(demo, run.name, expected)
    sip, rebalance = (run.history for run in demo.runs)
    assert (sip.ticks, len(sip.sips), sip.orders, sip.executions) == (3270, 465, 465, 465)
    assert (rebalance.ticks, len(rebalance.sips), rebalance.orders) == (3270, 0, 159)

    with open_connection(dsn) as conn:
        assert audit(conn) == []
        before = _counts(conn)
        again = run_demo(dsn, market)
        assert (again.written, again.repeated) == (0, 6540)
        assert _counts(conn) == before
    assert again.runs == demo.runs


def _agrees(demo: Demo, name: str, expected: Figures) -> None:
    """Cash and units to the last digit; a cost to what its cut at 12 decimals allows."""
    (history,) = (run.history for run in demo.runs if run.name == name)
    cash, units, cost = expected
    last = _closes()["2013-03-01"]
    market_value = sum(units[symbol] * price for symbol, price in last.items())
    end = history.equity[-1]
    assert (end.cash, end.market_value, end.equity) == (cash, market_value, cash + market_value)
    assert {h.symbol: h.quantity for h in history.holdings} == dict(units)
    for holding in history.holdings:
        avg_cost = cost[holding.symbol] / units[holding.symbol]
        assert abs(holding.avg_cost - avg_cost) < Decimal("1e-9")
