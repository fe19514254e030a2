"""What tests of runs and ticks start from: sessions of New York, prices, runs, and their audit.

A test module that imports ``audited`` has every test of it followed by the three queries of the
production plan and by every audit view of the schema.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from psycopg import sql

from engine.db.connect import Connection, open_connection
from engine.market.model import Bar
from engine.orders.model import Side
from engine.runs import Run, Terms, add_user, create_run, find_run, start_run
from engine.sips import Plan, add_plan
from engine.strategies.base import PlaceOrder

NEW_YORK = ZoneInfo("America/New_York")

# A week of sessions of the New York exchange.
MON, TUE, WED, THU, FRI = (f"2001-05-{day:02}" for day in range(7, 12))

# Word for word from the production plan (seed 002): each must return nothing but zero.
PLAN_QUERIES = (
    "SELECT COUNT(*) FROM engine_state es LEFT JOIN strategy_run sr ON sr.user_id=es.user_id"
    " AND sr.run_id=es.run_id WHERE sr.run_id IS NULL;",
    "SELECT user_id, run_id, logical_time, COUNT(*) FROM mtm_ledger GROUP BY user_id, run_id,"
    " logical_time HAVING COUNT(*) > 1;",
    "SELECT user_id, COUNT(*) FROM strategy_run WHERE status='RUNNING' GROUP BY user_id"
    " HAVING COUNT(*) > 1;",
)


def new_york(day: str, time: str) -> datetime:
    """A wall clock time in New York, in UTC."""
    return datetime.fromisoformat(f"{day}T{time}").replace(tzinfo=NEW_YORK).astimezone(UTC)


def open_on(day: str) -> datetime:
    return new_york(day, "09:30")


def close_on(day: str) -> datetime:
    return new_york(day, "16:00")


def a_bar(
    day: str,
    prices: str = "100 110 90 105",
    symbol: str = "AAPL",
    *,
    volume: str | None = None,
) -> Bar:
    """A daily bar from its open, high, low and close, or from its only price."""
    first, *rest = (Decimal(price) for price in prices.split())
    high, low, last = rest or [first] * 3
    traded = None if volume is None else Decimal(volume)
    return Bar(symbol, open_on(day), close_on(day), first, high, low, last, traded)


def at_price(price: str, symbol: str = "AAPL") -> dict[str, Decimal]:
    return {symbol: Decimal(price)}


def buy(quantity: str, symbol: str = "AAPL", **terms: Any) -> PlaceOrder:
    return PlaceOrder(symbol, Side.BUY, Decimal(quantity), **_exact(terms))


def sell(quantity: str, symbol: str = "AAPL", **terms: Any) -> PlaceOrder:
    return PlaceOrder(symbol, Side.SELL, Decimal(quantity), **_exact(terms))


def _exact(terms: Mapping[str, Any]) -> dict[str, Any]:
    """Prices may be given as text."""
    prices = ("limit_price", "stop_price", "trail_amount", "trail_percent")
    return {name: Decimal(value) if name in prices else value for name, value in terms.items()}


def a_run(
    conn: Connection, *, user: str = "ann", start: bool = True, cash: str = "10000", **terms: Any
) -> Run:
    """A run of the user called ``user``, RUNNING unless told otherwise."""
    run = create_run(conn, add_user(conn, user), Terms(initial_cash=Decimal(cash), **terms))
    return start_run(conn, run.user_id, run.run_id) if start else run


def a_plan(conn: Connection, run: Run, **terms: Any) -> Plan:
    """A plan of 500 a month into AAPL on day 7, from May 2001 on: due on MON."""
    given: dict[str, Any] = {
        "plan": "apples",
        "symbol": "AAPL",
        "amount": Decimal(500),
        "day_of_month": 7,
        "start_on": date(2001, 5, 1),
    }
    plan = Plan(**(given | terms))
    add_plan(conn, run.user_id, run.run_id, plan)
    return plan


def fresh(conn: Connection, run: Run) -> Run:
    """The run as the database has it now."""
    return find_run(conn, run.run_id)


def rows(conn: Connection, query: str, run: Run | None = None) -> list[Any]:
    """Rows of a query, in which ``:run`` stands for the run's condition; bare values of one."""
    key = None if run is None else [run.user_id, run.run_id]
    found = conn.execute(query.replace(":run", "user_id = %s AND run_id = %s"), key).fetchall()
    return [row[0] if len(row) == 1 else row for row in found]


def one(conn: Connection, query: str, run: Run | None = None) -> Any:
    (row,) = rows(conn, query, run)
    return row


def events(conn: Connection, run: Run) -> list[str]:
    """The types of a run's events, in order."""
    return rows(conn, "SELECT event_type FROM event_ledger WHERE :run ORDER BY seq", run)


def statuses(conn: Connection, run: Run) -> list[str]:
    """The statuses of a run's orders, in the order of their placing."""
    return rows(conn, "SELECT status FROM orders WHERE :run ORDER BY order_id", run)


def tables(conn: Connection) -> list[str]:
    """Every table of the schema."""
    return rows(
        conn,
        """SELECT relname::text FROM pg_class
           WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') ORDER BY 1""",
    )


def run_tables(conn: Connection) -> list[str]:
    """Every table that hangs on a run."""
    return rows(
        conn,
        """SELECT DISTINCT t.relname::text
           FROM pg_constraint f JOIN pg_class t ON t.oid = f.conrelid
           WHERE f.contype = 'f' AND f.confrelid IN ('strategy_run'::regclass, 'orders'::regclass)
           ORDER BY 1""",
    )


def snapshot(conn: Connection) -> dict[str, tuple[int, str]]:
    """Every table with its number of rows and a digest of them."""
    return {name: _digest(conn, name) for name in tables(conn)}


def _digest(conn: Connection, table: str) -> tuple[int, str]:
    row = conn.execute(
        sql.SQL(
            """SELECT count(*), md5(coalesce(string_agg(t::text, '|' ORDER BY t::text), ''))
               FROM {} t"""
        ).format(sql.Identifier(table))
    ).fetchone()
    assert row is not None
    return row[0], row[1]


def counts(conn: Connection, run: Run) -> dict[str, int]:
    """How many rows a run has in each table that hangs on it."""
    return {
        table: one(conn, f"SELECT count(*) FROM {table} WHERE :run", run)
        for table in run_tables(conn)
    }


def waiting_for_advisory_locks(conn: Connection) -> int:
    """How many connections wait for an advisory lock."""
    waiting: int = one(
        conn, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    )
    return waiting


def order_ids(conn: Connection, run: Run) -> list[UUID]:
    return rows(conn, "SELECT order_id FROM orders WHERE :run ORDER BY order_id", run)


def assert_sound(conn: Connection) -> None:
    """The plan's queries and every audit view find nothing."""
    for query in PLAN_QUERIES:
        found = [row for row in conn.execute(query) if row != (0,)]
        assert not found, query
    views = rows(
        conn,
        """SELECT relname::text FROM pg_class
           WHERE relkind = 'v' AND starts_with(relname, 'audit_') ORDER BY 1""",
    )
    assert len(views) >= 8, views
    findings = {view: rows(conn, f"SELECT * FROM {view}") for view in views}
    findings = {view: found for view, found in findings.items() if found}
    assert not findings, findings


@pytest.fixture(autouse=True)
def audited(request: pytest.FixtureRequest) -> Iterator[None]:
    """After the test its database is sound. Imported by the modules whose tests it follows."""
    used = {
        name: request.getfixturevalue(name)
        for name in ("conn", "dsn")
        if name in request.fixturenames
    }
    yield
    if "conn" in used:
        assert_sound(used["conn"])
    if "dsn" in used:
        with open_connection(used["dsn"]) as owner:
            assert_sound(owner)
