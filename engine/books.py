"""A run's books as a tick sees them: read once, kept in step with what the tick writes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from engine.db.connect import Connection
from engine.orders.model import Order, OrderType, Side, TimeInForce
from engine.runs import Run
from engine.strategies.base import Holding


@dataclass(slots=True)
class Books:
    """Cash (currency), holdings and open orders by key, and the strategy's state.

    ``statuses``, ``reserved`` and ``executions`` are those of the open orders: their status as
    stored, the cash that each holds back, and how many executions each has had. ``began`` is the
    logical time of the first event of a run that hasn't ticked yet.
    """

    cash: Decimal
    holdings: dict[str, Holding]
    orders: dict[UUID, Order]
    statuses: dict[UUID, str]
    reserved: dict[UUID, Decimal]
    executions: dict[UUID, int]
    state: dict[str, Any]
    last_tick: datetime | None
    began: datetime | None = None

    @property
    def available_cash(self) -> Decimal:
        return self.cash - sum(self.reserved.values())

    def symbols(self) -> set[str]:
        """What a price matters for: everything held or ordered."""
        return self.holdings.keys() | {order.symbol for order in self.orders.values()}


def read_books(conn: Connection, run: Run) -> Books:
    """Read the books of a locked run."""
    key = [run.user_id, run.run_id]
    with conn.pipeline():
        state = conn.execute(
            "SELECT last_logical_time, state FROM engine_state WHERE user_id = %s AND run_id = %s",
            key,
        )
        books = Books(run.cash, {}, {}, {}, {}, {}, {}, None)
        reread(conn, run, books)
    row = state.fetchone()
    if row is not None:
        books.last_tick, books.state = row
    if books.last_tick is None:
        first = conn.execute(
            """SELECT logical_time FROM event_ledger
               WHERE user_id = %s AND run_id = %s ORDER BY seq LIMIT 1""",
            key,
        ).fetchone()
        books.began = first[0] if first else None
    return books


def reread(conn: Connection, run: Run, books: Books) -> None:
    """Read again what executions, splits and moves change: cash, holdings and open orders."""
    key = [run.user_id, run.run_id]
    with conn.pipeline():
        cash = conn.execute("SELECT cash FROM strategy_run WHERE user_id = %s AND run_id = %s", key)
        holdings = conn.execute(
            """SELECT symbol, quantity, avg_cost, mark_price FROM position
               WHERE user_id = %s AND run_id = %s AND quantity <> 0 ORDER BY symbol""",
            key,
        )
        orders = conn.execute(
            """SELECT status, reserved_cash,
                      CASE WHEN filled_quantity = 0 THEN 0
                           ELSE (SELECT count(*) FROM execution e
                                 WHERE e.user_id = o.user_id AND e.run_id = o.run_id
                                   AND e.order_id = o.order_id) END,
                      order_id, symbol, side, quantity, order_type,
                      time_in_force, logical_time, limit_price, stop_price, trail_amount,
                      trail_percent, expire_at, triggered_at, filled_quantity
               FROM orders o
               WHERE user_id = %s AND run_id = %s
                 AND status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
               ORDER BY order_id""",
            key,
        )
    row = cash.fetchone()
    assert row is not None
    books.cash = row[0]
    books.holdings = {row[0]: Holding(*row) for row in holdings}
    rows = orders.fetchall()
    books.orders = {row[3]: _order(row[3:]) for row in rows}
    books.statuses = {row[3]: row[0] for row in rows}
    books.reserved = {row[3]: row[1] for row in rows}
    books.executions = {row[3]: row[2] for row in rows}


def _order(row: tuple[Any, ...]) -> Order:
    order_id, symbol, side, quantity, order_type, time_in_force, *rest = row
    return Order(
        order_id,
        symbol,
        Side(side),
        quantity,
        OrderType(order_type),
        TimeInForce(time_in_force),
        *rest,
    )
