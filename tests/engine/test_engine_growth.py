"""A tick reads as much after thousands of ticks as after some: plans, and rows that are read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from market_days import a_run, at_price, audited, buy, rows, sell
from scripted import SCRIPTED, Hooks, hooks

from engine import books, ledger
from engine.db.connect import ENGINE_ROLE, Connection, open_connection
from engine.market.calendar import store_sessions
from engine.market.model import Bar
from engine.replay import replay
from engine.runs import Run
from engine.strategies.base import Context, PlaceOrder
from engine.tick import run_tick

__all__ = ["audited", "hooks"]

START = datetime(2001, 5, 7, 14, 0, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
BIG = {"event_ledger", "orders", "execution", "mtm_ledger"}
READ_PER_TICK_MAX = 60  # rows of all tables, sequentially or by index


def a_trade(place: int) -> PlaceOrder:
    return sell("1") if place % 2 else buy("1")


def a_minute(place: int) -> tuple[datetime, list[Bar]]:
    at = START + place * MINUTE
    return at, [Bar.of_price("AAPL", Decimal(100), at)]


@pytest.fixture
def engine(dsn: str, owner_conn: Connection) -> Iterator[Connection]:
    store_sessions(owner_conn, "XNYS", START.date(), START.date())
    with open_connection(dsn, role=ENGINE_ROLE) as conn:
        yield conn


def rows_read(conn: Connection, watch: Connection) -> int:
    """Rows that were read from the tables that grow, by everybody so far."""
    conn.execute("SELECT pg_stat_force_next_flush()")
    conn.execute("SELECT 1")
    return int(
        rows(
            watch,
            """SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::bigint
               FROM pg_stat_user_tables
               WHERE relname IN ('event_ledger', 'orders', 'execution', 'mtm_ledger')""",
        )[0]
        or 0
    )


def read_by_ticks(conn: Connection, watch: Connection, run: Run, first: int, ticks: int) -> float:
    """Rows that a live tick with one trade reads, on average."""
    before = rows_read(conn, watch)
    for place in range(first, first + ticks):
        at = START + place * MINUTE
        prices = at_price("100")
        run_tick(conn, run.user_id, run.run_id, at, prices, intents=[a_trade(place)])
    return (rows_read(conn, watch) - before) / ticks


def test_what_a_live_tick_reads_does_not_grow_with_its_run(
    engine: Connection, owner_conn: Connection, hooks: Hooks
) -> None:
    """Without statistics an index of the run will do for one, as long as the run is short."""
    run = a_run(engine, strategy=SCRIPTED)
    read_by_ticks(engine, owner_conn, run, 0, 2)  # the first also reads what is kept
    few = read_by_ticks(engine, owner_conn, run, 2, 20)
    hooks["on_bar"] = lambda context, bar: [a_trade(_minute_of(context))]
    feed = [a_minute(place) for place in range(22, 3_022)]
    replay(engine, run.user_id, run.run_id, feed)
    hooks.clear()
    many = read_by_ticks(engine, owner_conn, run, 3_022, 20)
    assert few > 0
    assert many < READ_PER_TICK_MAX


def _minute_of(context: Context) -> int:
    return int((context.logical_time - START) / MINUTE)


def test_what_a_replayed_tick_reads_does_not_grow(
    engine: Connection, owner_conn: Connection, hooks: Hooks
) -> None:
    run = a_run(engine, strategy=SCRIPTED)
    hooks["on_bar"] = lambda context, bar: [a_trade(_minute_of(context))]
    read = []
    for first in range(0, 3_000, 1_000):
        before = rows_read(engine, owner_conn)
        feed = [a_minute(place) for place in range(first, first + 1_000)]
        replay(engine, run.user_id, run.run_id, feed)
        read.append((rows_read(engine, owner_conn) - before) / 1_000)
    assert max(read[1:]) < READ_PER_TICK_MAX


HOT: dict[str, tuple[str, Any]] = {
    "a run and its books": (books._READ, None),
    "open orders": (books._OPEN_ORDERS, "key"),
    "runs and their books": (books._READ_MANY, "keys"),
    "what ticks told": (
        f"""SELECT logical_time, {ledger.TOLD} FROM event_ledger
            WHERE user_id = %s AND run_id = %s AND logical_time = ANY(%s)
              AND event_type = 'TICK' AND subject = ''""",
        "times",
    ),
}


@pytest.mark.parametrize("name", HOT)
@pytest.mark.parametrize("known", [False, True], ids=["no statistics", "statistics"])
def test_the_hot_statements_find_their_rows_by_an_index(
    engine: Connection, owner_conn: Connection, hooks: Hooks, name: str, known: bool
) -> None:
    run = a_run(engine, strategy=SCRIPTED)
    hooks["on_bar"] = lambda context, bar: [a_trade(_minute_of(context))]
    ticks = 1_500 if known else 60
    replay(engine, run.user_id, run.run_id, [a_minute(place) for place in range(ticks)])
    if known:
        owner_conn.execute("ANALYZE")
    query, kind = HOT[name]
    key = [run.user_id, run.run_id]
    parameters: Any = {
        None: {"at": START, "user": run.user_id, "run": run.run_id},
        "key": key,
        "keys": {"users": [run.user_id], "runs": [run.run_id], "ats": [START]},
        "times": [*key, [START]],
    }[kind]
    (plan,) = rows(owner_conn, "SELECT 1") and [
        owner_conn.execute(f"EXPLAIN (FORMAT JSON) {query}", parameters).fetchone()
    ]
    assert plan is not None
    text = json.dumps(plan[0])
    scans = re.findall(r'"Node Type": "([^"]+)"[^{}]*?"Relation Name": "([^"]+)"', text)
    assert scans
    assert [scan for scan in scans if scan[0] == "Seq Scan" and scan[1] in BIG] == []
