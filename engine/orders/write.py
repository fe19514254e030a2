"""What a tick in steps writes, each step one statement for any number of rows, which is checked."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

from engine.db.connect import Connection
from engine.ids import ORDERS_PER_TICK_MAX, SALT_BITS, order_id_of
from engine.log import tell
from engine.market.model import Split
from engine.market.view import View
from engine.orders.model import Fill, Order, Side
from engine.runs import Run


class Move(NamedTuple):
    """A change of an order that no execution makes. ``status`` None leaves the status alone."""

    order_id: UUID
    status: str | None
    reason: str | None
    reject_code: str | None = None
    stop_price: Decimal | None = None
    triggered_at: datetime | None = None
    expire_at: datetime | None = None


def insert_orders(
    conn: Connection,
    run: Run,
    orders: Sequence[Order],
    reference_prices: Sequence[Decimal | None],
    client_order_ids: Sequence[str | None],
) -> dict[UUID, str]:
    """Insert orders in their order; returns the reject codes of those that the gate refused."""
    if not orders:
        return {}
    rows = conn.execute(
        """INSERT INTO orders (user_id, run_id, order_id, symbol, side, quantity, order_type,
                               time_in_force, logical_time, limit_price, stop_price, trail_amount,
                               trail_percent, expire_at, reference_price, client_order_id)
           SELECT %s, %s, o.order_id, o.symbol, o.side, o.quantity, o.order_type, o.time_in_force,
                  o.logical_time, o.limit_price, o.stop_price, o.trail_amount, o.trail_percent,
                  o.expire_at, o.reference_price, o.client_order_id
           FROM unnest(%s::uuid[], %s::text[], %s::text[], %s::numeric[], %s::text[], %s::text[],
                       %s::timestamptz[], %s::numeric[], %s::numeric[], %s::numeric[],
                       %s::numeric[], %s::timestamptz[], %s::numeric[], %s::text[])
                AS o (order_id, symbol, side, quantity, order_type, time_in_force, logical_time,
                      limit_price, stop_price, trail_amount, trail_percent, expire_at,
                      reference_price, client_order_id)
           ORDER BY o.order_id
           RETURNING order_id, reject_code""",
        [
            run.user_id,
            run.run_id,
            [o.order_id for o in orders],
            [o.symbol for o in orders],
            [str(o.side) for o in orders],
            [o.quantity for o in orders],
            [str(o.order_type) for o in orders],
            [str(o.time_in_force) for o in orders],
            [o.logical_time for o in orders],
            [o.limit_price for o in orders],
            [o.stop_price for o in orders],
            [o.trail_amount for o in orders],
            [o.trail_percent for o in orders],
            [o.expire_at for o in orders],
            list(reference_prices),
            list(client_order_ids),
        ],
    ).fetchall()
    return {order_id: code for order_id, code in rows if code is not None}


def insert_executions(
    conn: Connection, run: Run, logical_time: datetime, fills: Sequence[Fill]
) -> None:
    """Insert executions; the database moves orders, positions and cash, and writes the events."""
    if not fills:
        return
    conn.execute(
        """INSERT INTO execution (user_id, run_id, order_id, execution_id, symbol, side, quantity,
                                  price, commission, commission_currency, logical_time, event_at)
           SELECT %s, %s, e.order_id, e.execution_id, e.symbol, e.side, e.quantity, e.price,
                  e.commission, %s, %s, e.event_at
           FROM unnest(%s::uuid[], %s::text[], %s::text[], %s::text[], %s::numeric[],
                       %s::numeric[], %s::numeric[], %s::timestamptz[]) WITH ORDINALITY
                AS e (order_id, execution_id, symbol, side, quantity, price, commission, event_at,
                      place)
           ORDER BY e.place""",
        [
            run.user_id,
            run.run_id,
            run.currency,
            logical_time,
            [f.order_id for f in fills],
            [f.execution_id for f in fills],
            [f.symbol for f in fills],
            [str(f.side) for f in fills],
            [f.quantity for f in fills],
            [f.price for f in fills],
            [f.commission for f in fills],
            [f.event_at for f in fills],
        ],
    )


def move_orders(conn: Connection, run: Run, logical_time: datetime, moves: Sequence[Move]) -> None:
    """Move orders, and note where their stops stand."""
    if not moves:
        return
    conn.execute(
        """UPDATE orders o
           SET status = coalesce(m.status, o.status),
               status_at = CASE WHEN m.status IS NULL THEN o.status_at ELSE %s END,
               status_reason = coalesce(m.reason, o.status_reason),
               reject_source = CASE WHEN m.reject_code IS NULL THEN o.reject_source
                                    ELSE 'RISK' END,
               reject_code = coalesce(m.reject_code, o.reject_code),
               stop_price = coalesce(m.stop_price, o.stop_price),
               triggered_at = coalesce(m.triggered_at, o.triggered_at),
               expire_at = coalesce(m.expire_at, o.expire_at)
           FROM unnest(%s::uuid[], %s::text[], %s::text[], %s::text[], %s::numeric[],
                       %s::timestamptz[], %s::timestamptz[])
                AS m (order_id, status, reason, reject_code, stop_price, triggered_at, expire_at)
           WHERE o.user_id = %s AND o.run_id = %s AND o.order_id = m.order_id""",
        [
            logical_time,
            [m.order_id for m in moves],
            [m.status for m in moves],
            [m.reason for m in moves],
            [m.reject_code for m in moves],
            [m.stop_price for m in moves],
            [m.triggered_at for m in moves],
            [m.expire_at for m in moves],
            run.user_id,
            run.run_id,
        ],
    )


def cancel_order(
    conn: Connection, run: Run, order_id: UUID, reason: str, at: datetime | None = None
) -> str:
    """Cancel an order of any broker, at logical time ``at`` (default: where the run stands).

    Returns CANCELED; PENDING_CANCEL where its broker has it; CANCEL_IGNORED where there is nothing
    left to cancel. Raises UnknownReference for an order that the run doesn't have.
    """
    row = conn.execute(
        "SELECT order_cancel(%s, %s, %s, %s, %s)", [run.user_id, run.run_id, order_id, reason, at]
    ).fetchone()
    assert row is not None
    if row[0] == "CANCEL_IGNORED":
        tell("CANCEL_IGNORED", run_id=run.run_id, order_id=order_id, reason=reason)
    return str(row[0])


# What order_modify returns unless it refuses.
MODIFIED = ("MODIFIED", "PENDING_MODIFY")


def modify_order(
    conn: Connection,
    run: Run,
    order_id: UUID,
    version: int | None,
    *,
    quantity: Decimal | None = None,
    limit_price: Decimal | None = None,
    stop_price: Decimal | None = None,
) -> str:
    """Ask for other terms of an order at a broker; ``version`` is the one that was looked at.

    ``None`` leaves a term as it is, a version ``None`` takes the order as it is now. Returns
    MODIFIED where it hadn't gone yet, PENDING_MODIFY where its broker must agree, or why the gate
    refuses. Raises HistoryIsFixed where it can't be modified or has changed since, and
    UnknownReference for an order that the run doesn't have.
    """
    if version is None:
        found = conn.execute(
            "SELECT version FROM orders WHERE user_id = %s AND run_id = %s AND order_id = %s",
            [run.user_id, run.run_id, order_id],
        ).fetchone()
        version = found[0] if found else 1
    row = conn.execute(
        "SELECT order_modify(%s, %s, %s, %s, %s, %s, %s)",
        [run.user_id, run.run_id, order_id, version, quantity, limit_price, stop_price],
    ).fetchone()
    assert row is not None
    return str(row[0])


def fills_since_tick(conn: Connection, run: Run) -> list[Fill]:
    """What a broker has filled since the run's last tick, in the order in which it was booked."""
    rows = conn.execute(
        """SELECT e.order_id, e.execution_id, e.symbol, e.side, e.quantity, e.price, e.commission,
                  e.event_at
           FROM event_ledger l
           JOIN execution e ON e.user_id = l.user_id AND e.run_id = l.run_id
                           AND e.execution_id = substr(l.subject, 38)
           WHERE l.user_id = %(user)s AND l.run_id = %(run)s AND l.event_type = 'EXECUTION'
             AND e.reverses IS NULL
             AND l.seq > coalesce((SELECT t.seq FROM event_ledger t
                                   WHERE t.user_id = %(user)s AND t.run_id = %(run)s
                                     AND t.event_type = 'TICK'
                                   ORDER BY t.logical_time DESC LIMIT 1), 0)
           ORDER BY l.seq""",
        {"user": run.user_id, "run": run.run_id},
    ).fetchall()
    return [
        Fill(order_id, execution_id, symbol, Side(side), *rest)
        for order_id, execution_id, symbol, side, *rest in rows
    ]


def count_orders_at(conn: Connection, run: Run, logical_time: datetime) -> int:
    """How many orders of the run have an id of this logical time."""
    row = conn.execute(
        """SELECT count(*) FROM orders
           WHERE user_id = %s AND run_id = %s AND order_id BETWEEN %s AND %s""",
        [
            run.user_id,
            run.run_id,
            order_id_of(0, logical_time, 0),
            order_id_of((1 << SALT_BITS) - 1, logical_time, ORDERS_PER_TICK_MAX - 1),
        ],
    ).fetchone()
    return row[0] if row else 0


def apply_split(conn: Connection, run: Run, logical_time: datetime, split: Split) -> None:
    """Apply an announced split to the run's position and resting orders, once."""
    conn.execute(
        """INSERT INTO split_applied (user_id, run_id, symbol, ex_date, logical_time)
           VALUES (%s, %s, %s, %s, %s) ON CONFLICT DO NOTHING""",
        [run.user_id, run.run_id, split.symbol, split.ex_date, logical_time],
    )


def mark(conn: Connection, run: Run, view: View) -> None:
    """Give the positions the view's prices."""
    if not view.prices:
        return
    conn.execute(
        """UPDATE position p SET mark_price = v.price, marked_at = v.at
           FROM unnest(%s::text[], %s::numeric[], %s::timestamptz[]) AS v (symbol, price, at)
           WHERE p.user_id = %s AND p.run_id = %s AND p.symbol = v.symbol AND p.quantity <> 0
             AND p.marked_at <= v.at""",
        [
            list(view.prices),
            list(view.prices.values()),
            [view.bars[symbol].end for symbol in view.prices],
            run.user_id,
            run.run_id,
        ],
    )


def mtm(conn: Connection, run: Run, logical_time: datetime) -> Any:
    """Write the mark; the database computes it. Returns (equity,)."""
    return conn.execute(
        """INSERT INTO mtm_ledger (user_id, run_id, logical_time) VALUES (%s, %s, %s)
           RETURNING equity""",
        [run.user_id, run.run_id, logical_time],
    ).fetchone()
