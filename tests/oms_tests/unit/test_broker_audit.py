"""What the audit of orders at brokers reads: so much an order, with statistics or without."""

from __future__ import annotations

from typing import Any

import pytest
from broker_cases import Wire, a_broker_run

from engine.db.connect import Connection

ORDERS = 1_000
RECOVERED = 200
# Pages that are looked at for an order, its command, its fill and the words about it: some lookups
# of two or three pages each. One look at all fills for each order would be hundreds already.
PAGES_PER_ORDER_MAX = 60

_GROW = ("orders", "broker_command", "broker_event", "execution", "event_ledger", "order_broker_id")
_PLACE = """
    INSERT INTO orders (user_id, run_id, order_id, symbol, side, quantity, order_type, limit_price)
    SELECT %(user)s, %(run)s, gen_random_uuid(), 'AAPL',
           CASE WHEN n %% 2 = 0 THEN 'BUY' ELSE 'SELL' END, 1, 'LIMIT', 1
    FROM generate_series(1, %(count)s) n"""
_SEND = """
    UPDATE broker_command SET claimed_by = %(holder)s, claimed_at = clock_timestamp(),
           sent_at = clock_timestamp(), done_at = clock_timestamp(), outcome = 'SENT'
    WHERE user_id = %(user)s"""
_FILL = """
    INSERT INTO broker_event (user_id, account, number, holder, kind, order_ref, execution_id,
                              broker_order_id, payload, event_at)
    SELECT %(user)s, 'DU1', n, %(holder)s, 'EXECUTION', ref, 'X' || n, n,
           jsonb_build_object('execution_id', 'X' || n, 'symbol', 'AAPL', 'side', side,
                              'quantity', '1', 'price', '1'), '2024-01-04T15:00Z'
    FROM (SELECT row_number() OVER () AS n, ref, side
          FROM (SELECT order_id::text AS ref, side FROM orders WHERE user_id = %(user)s
                UNION ALL
                SELECT gen_random_uuid()::text, 'BUY' FROM generate_series(1, %(unknown)s)) o) f"""


@pytest.fixture
def filled(owner_conn: Connection) -> Connection:
    """A database that thousands of rows came into at once, before anybody could look."""
    for table in _GROW:
        owner_conn.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)".encode())
    wire = Wire(owner_conn, a_broker_run(owner_conn, account_type="MARGIN"))
    parameters = {
        "user": wire.run.user_id,
        "run": wire.run.run_id,
        "holder": wire.holder,
        "count": ORDERS,
        "unknown": RECOVERED,
    }
    for statement in (_PLACE, _SEND, _FILL):
        owner_conn.execute(statement, parameters)
    wire.apply()
    booked = owner_conn.execute(
        "SELECT count(*), count(*) FILTER (WHERE recovered) FROM orders WHERE status = 'FILLED'"
    ).fetchone()
    assert booked == (ORDERS + RECOVERED, RECOVERED)
    return owner_conn


def _pages(conn: Connection) -> int:
    """Pages that the audit looks at; it finds nothing."""
    assert conn.execute("SELECT * FROM audit_broker").fetchall() == []
    row = conn.execute(
        "EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) SELECT * FROM audit_broker"
    ).fetchone()
    assert row is not None
    plan = row[0][0]["Plan"]
    return int(plan["Shared Hit Blocks"]) + int(plan["Shared Read Blocks"])


def test_the_audit_of_brokers_reads_so_much_an_order(filled: Connection) -> None:
    # The run's thousandth event came before its first fill: of executions nothing is known.
    known = filled.execute("SELECT count(*) FROM pg_stats WHERE tablename = 'execution'")
    assert known.fetchone() == (0,)
    assert _pages(filled) / (ORDERS + RECOVERED) < PAGES_PER_ORDER_MAX
    filled.execute("ANALYZE")
    assert _pages(filled) / (ORDERS + RECOVERED) < PAGES_PER_ORDER_MAX


def _joined_in_vain(plan: dict[str, Any]) -> int:
    """Pairs of rows that a plan looked at and threw away."""
    own = int(plan.get("Rows Removed by Join Filter", 0)) * int(plan.get("Actual Loops", 1))
    return own + sum(_joined_in_vain(each) for each in plan.get("Plans", ()))


def test_orders_that_ended_at_one_moment_are_not_compared_each_with_each(
    owner_conn: Connection,
) -> None:
    wire = Wire(owner_conn, a_broker_run(owner_conn, account_type="MARGIN"))
    whose = {"user": wire.run.user_id, "run": wire.run.run_id, "count": ORDERS}
    owner_conn.execute(_PLACE, whose)
    owner_conn.execute(
        "SELECT order_cancel(user_id, run_id, order_id, 'USER') FROM orders WHERE user_id = %s",
        [wire.run.user_id],
    )
    for _ in range(2):
        row = owner_conn.execute(
            "EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) SELECT * FROM audit_event"
        ).fetchone()
        assert row is not None
        assert row[0][0]["Plan"]["Actual Rows"] == 0
        assert _joined_in_vain(row[0][0]["Plan"]) <= ORDERS
        owner_conn.execute("ANALYZE")
