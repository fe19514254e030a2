"""DR: one feed through two runs makes the same rows, but for the ids that are each run's own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date
from decimal import Decimal
from typing import Any

import pytest
from market_days import a_bar, a_plan, a_run, audited, buy, counts, rows, run_tables, sell
from psycopg import sql
from scripted import SCRIPTED, Hooks, hooks

from engine.db.connect import Connection
from engine.market.calendar import sessions
from engine.market.model import Bar, Split
from engine.market.store import import_splits
from engine.replay import Feed, replay
from engine.runs import Run
from engine.strategies.base import Announce, CancelOrder, Context, Intent, Remember

__all__ = ["audited", "hooks"]

UUID_PATTERN = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# When a row was written, and what follows from that or from ids.
OUR_CLOCK = {"recorded_at", "created_at", "heartbeat_at", "hash"}

DAYS = [s.day for s in sessions("XNYS", date(2001, 5, 7), date(2001, 7, 6))]
SLIPPAGE = {
    "slippage": {"model": "UNIFORM_BPS", "max_bps": "50"},
    "commission": {"model": "PER_UNIT", "rate": "0.005", "minimum": "0.1"},
    "max_volume_share": "0.1",
    "seed": 7,
}


def a_feed(symbols: tuple[str, ...] = ("AAPL", "IBM"), *, last: str = "0") -> Feed:
    """Two months of bars that rise and fall; ``last`` is added to the last price of all."""
    for number, day in enumerate(DAYS):
        bars: list[Bar] = []
        for place, symbol in enumerate(symbols):
            base = 40 + 20 * place + (number * (7 + place)) % 11
            more = Decimal(last) if day == DAYS[-1] else Decimal(0)
            prices = [Decimal(base), Decimal(base + 3), Decimal(base - 3), Decimal(base + 1) + more]
            text = " ".join(str(price) for price in prices)
            bars.append(a_bar(day.isoformat(), text, symbol, volume="60"))
        yield bars[0].end, bars


def busy(context: Context) -> list[Intent]:
    """Orders of every kind, cancels, state and events, all decided by what the tick shows."""
    number = int(context.state.get("ticks", 0)) + 1
    intents: list[Intent] = [Remember({"ticks": number})]
    price = context.prices["IBM"]
    kinds: list[Mapping[str, Any]] = [
        {},
        {"order_type": "LIMIT", "limit_price": price - 2, "time_in_force": "GTC"},
        {"order_type": "STOP", "stop_price": price + 2, "time_in_force": "GTC"},
        {"order_type": "TRAIL", "trail_percent": "5", "time_in_force": "GTC"},
        {"order_type": "STOP_LIMIT", "stop_price": price + 1, "limit_price": price + 2},
        {"time_in_force": "OPG"},
        {"time_in_force": "IOC"},
        {"time_in_force": "FOK"},
        {"order_type": "MOC"},
    ]
    intents.append(buy(str(1 + number % 9), "IBM", **kinds[number % len(kinds)]))
    intents.append(buy("1.5", "AAPL"))
    held = context.positions.get("IBM")
    if held and number % 4 == 0:
        intents.append(sell(str(held.quantity / 2), "IBM"))
    if number % 10 == 0:
        intents.append(buy("1000", "IBM"))
    if number % 7 == 0:
        intents += [CancelOrder(order.order_id) for order in context.open_orders[:1]]
        intents.append(Announce("WEEK_OVER", f"week {number // 7}", {"equity": str(price)}))
    return intents


def normalised(conn: Connection, run: Run) -> dict[str, list[str]]:
    """Every row of a run, with its ids replaced by their places in the ledger."""
    known: dict[str, str] = {str(run.user_id): "the user", str(run.run_id): "the run"}
    tables = {
        table: conn.execute(
            sql.SQL("SELECT to_jsonb(t) FROM {} t WHERE user_id = %s AND run_id = %s").format(
                sql.Identifier(table)
            ),
            [run.user_id, run.run_id],
        ).fetchall()
        for table in [*run_tables(conn), "strategy_run"]
    }
    # Times are all alike: the database's own text of them.
    for (event,) in sorted(tables["event_ledger"], key=lambda row: int(row[0]["seq"])):
        for found in UUID_PATTERN.findall(json.dumps(event)):
            known.setdefault(found, f"id {len(known)}")
    return {
        table: sorted(
            UUID_PATTERN.sub(
                lambda match: known[match.group()],
                json.dumps({k: v for k, v in row.items() if k not in OUR_CLOCK}, sort_keys=True),
            )
            for (row,) in found
        )
        for table, found in tables.items()
    }


def replayed(
    conn: Connection, user: str, feed: Feed, paper: Mapping[str, Any] | None = None, batch: int = 9
) -> Run:
    run = a_run(conn, user=user, strategy=SCRIPTED, cash="5000", paper=paper or {})
    a_plan(conn, run, amount=Decimal(100))
    replay(conn, run.user_id, run.run_id, feed, batch=batch)
    return run


@pytest.mark.scenario("DR-01")
@pytest.mark.parametrize("paper", [{}, SLIPPAGE], ids=["plain", "random slippage"])
def test_one_feed_through_two_runs_makes_the_same_ledgers(
    conn: Connection, hooks: Hooks, paper: dict[str, Any]
) -> None:
    import_splits(conn, [Split("IBM", date(2001, 6, 4), Decimal(3), Decimal(2))])
    hooks["on_tick"] = busy
    a = replayed(conn, "ann", a_feed(), paper=paper)
    b = replayed(conn, "ben", a_feed(), paper=paper, batch=1)
    # It was no empty feed: much happened, of every kind.
    had = counts(conn, a)
    assert had["orders"] > 80
    assert had["execution"] > 60
    assert had["split_applied"] == 1
    found = set(rows(conn, "SELECT DISTINCT status FROM orders WHERE :run", a))
    assert found >= {"FILLED", "CANCELED", "EXPIRED", "REJECTED"}
    if paper:
        assert rows(conn, "SELECT 1 FROM execution WHERE commission > 0 LIMIT 1") == [1]
        slipped = "SELECT count(DISTINCT price) FROM execution WHERE price <> round(price, 2)"
        assert rows(conn, slipped)[0] > 20
    first, second = normalised(conn, a), normalised(conn, b)
    assert first.keys() == second.keys()
    for table in first:
        assert first[table] == second[table], table


@pytest.mark.scenario("DR-01")
def test_the_comparison_sees_one_other_price(conn: Connection, hooks: Hooks) -> None:
    hooks["on_tick"] = busy
    a = replayed(conn, "ann", a_feed())
    b = replayed(conn, "ben", a_feed(last="0.00000001"))
    first, second = normalised(conn, a), normalised(conn, b)
    different = {table for table in first if first[table] != second[table]}
    assert different >= {"mtm_ledger", "event_ledger", "position"}


@pytest.mark.scenario("DR-01")
def test_another_seed_slips_otherwise(conn: Connection, hooks: Hooks) -> None:
    hooks["on_tick"] = busy
    a = replayed(conn, "ann", a_feed(), paper=SLIPPAGE)
    b = replayed(conn, "ben", a_feed(), paper=SLIPPAGE | {"seed": 8})
    assert normalised(conn, a)["execution"] != normalised(conn, b)["execution"]
