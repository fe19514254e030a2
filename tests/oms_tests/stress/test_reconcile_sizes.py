"""Reconciliation of as many orders as an account may have at once."""

from __future__ import annotations

import os
import time
from uuid import UUID

import pytest
from broker_cases import Wire
from snapshot_cases import Books

# The nightly job sets 100000.
OPEN_ORDERS = int(os.environ.get("OMS_OPEN_ORDERS", "10000"))
# Source: the requirements of bench/: 5 s for 10,000 open orders, 60 s for 100,000.
SECONDS_MAX = 5.0 if OPEN_ORDERS <= 10_000 else 60.0
LOST = 10


def _work(wire: Wire, count: int) -> None:
    """Open orders that the broker works, put there past the life of each."""
    for table in ("orders", "broker_command"):
        wire.conn.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER".encode())
    parameters = {"user": wire.run.user_id, "run": wire.run.run_id, "count": count}
    wire.conn.execute(
        """INSERT INTO orders (user_id, run_id, order_id, broker, account, symbol, side, quantity,
                               order_type, limit_price, status, status_at, logical_time,
                               recorded_at, broker_order_id)
           SELECT %(user)s, %(run)s, gen_random_uuid(), 'dummy', 'DU1', 'AAPL', 'BUY', 1, 'LIMIT',
                  50, 'ROUTED', now(), now(), now(), n
           FROM generate_series(1, %(count)s) n""",
        parameters,
    )
    wire.conn.execute(
        """INSERT INTO broker_command (user_id, account, kind, run_id, order_id, order_version,
                                       payload, claimed_by, claimed_at, sent_at, done_at, outcome)
           SELECT o.user_id, o.account, 'SUBMIT', o.run_id, o.order_id, 1,
                  orders_command_payload(o), gen_random_uuid(), now(), now(), now(), 'SENT'
           FROM orders o WHERE o.user_id = %(user)s""",
        parameters,
    )
    wire.conn.execute("SET CONSTRAINTS ALL IMMEDIATE")
    for table in ("orders", "broker_command"):
        wire.conn.execute(f"ALTER TABLE {table} ENABLE TRIGGER USER".encode())


@pytest.mark.slow
def test_many_open_orders_are_compared_in_time(wire: Wire) -> None:
    _work(wire, OPEN_ORDERS)
    books = Books(wire)
    ids: list[tuple[UUID, int]] = wire.conn.execute(
        "SELECT order_id, broker_order_id FROM orders ORDER BY broker_order_id"
    ).fetchall()
    for order_id, number in ids[LOST:]:
        books.orders[order_id] = {
            "order_ref": str(order_id),
            "broker_order_id": number,
            "status": "ROUTED",
            "filled": "0",
            "ours": True,
            "symbol": "AAPL",
            "side": "BUY",
            "quantity": "1",
            "order_type": "LIMIT",
            "time_in_force": "DAY",
            "limit_price": "50",
        }
    books.answer(books.ask())
    wire.apply()
    began = time.monotonic()
    done = books.compare()
    took = time.monotonic() - began
    assert done is not None
    assert [d.kind for d in done.differences] == ["MISSING_AT_BROKER"] * LOST
    assert (done.open_orders, done.undecided) == (OPEN_ORDERS - LOST, 0)
    assert took < SECONDS_MAX
