"""Orders that a person places, cancels and modifies, outside of any tick.

They are the run's like any other: the same gate, the same books. Orders of a paper run wait for its
next tick.
"""

from __future__ import annotations

from decimal import Decimal
from uuid import UUID, uuid4

from engine.db.connect import Connection
from engine.errors import BadInput, translated
from engine.orders import write
from engine.orders.model import Order
from engine.outbox import wake
from engine.runs import lock_run, require_running
from engine.safety import tell_refusals
from engine.strategies.base import PlaceOrder


def place_order(conn: Connection, user_id: UUID, run_id: UUID, wanted: PlaceOrder) -> UUID:
    """Place an order where the run stands; returns its id. What the gate refuses is REJECTED.

    Raises BadInput for an unknown run and RunNotRunning.
    """
    with translated(), conn.transaction():
        run = lock_run(conn, user_id, run_id)
        require_running(run)
        row = conn.execute("SELECT run_last_time(%s, %s)", [user_id, run_id]).fetchone()
        assert row is not None
        order = Order(
            uuid4(),
            wanted.symbol,
            wanted.side,
            wanted.quantity,
            wanted.order_type,
            wanted.time_in_force,
            row[0],
            wanted.limit_price,
            wanted.stop_price,
            wanted.trail_amount,
            wanted.trail_percent,
            wanted.expire_at,
        )
        refused = write.insert_orders(conn, run, [order], [None], [wanted.client_order_id])
        if refused:
            tell_refusals(conn, user_id, run_id, list(refused))
        wake(conn)
    return order.order_id


def cancel_order(conn: Connection, user_id: UUID, run_id: UUID, order_id: UUID) -> str:
    """Cancel an order: CANCELED, PENDING_CANCEL at its broker, or CANCEL_IGNORED.

    Raises BadInput for an unknown run, UnknownReference for an unknown order, RunNotRunning.
    """
    with translated(), conn.transaction():
        run = lock_run(conn, user_id, run_id)
        result = write.cancel_order(conn, run, order_id, "USER")
        wake(conn)
    return result


def cancel_all(conn: Connection, user_id: UUID, run_id: UUID) -> dict[UUID, str]:
    """Cancel all open orders of a run, by their ids; raises what ``cancel_order`` raises."""
    with translated(), conn.transaction():
        run = lock_run(conn, user_id, run_id)
        open_orders = conn.execute(
            """SELECT order_id FROM orders WHERE user_id = %s AND run_id = %s
               AND status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED', 'PENDING_CANCEL')
               ORDER BY order_id""",
            [user_id, run_id],
        ).fetchall()
        results = {
            order_id: write.cancel_order(conn, run, order_id, "USER") for (order_id,) in open_orders
        }
        wake(conn)
    return results


def modify_order(
    conn: Connection,
    user_id: UUID,
    run_id: UUID,
    order_id: UUID,
    *,
    version: int | None = None,
    quantity: Decimal | None = None,
    limit_price: Decimal | None = None,
    stop_price: Decimal | None = None,
) -> str:
    """Ask for other terms; see ``engine.orders.write.modify_order``.

    Raises BadInput where nothing is asked for, besides.
    """
    if quantity is limit_price is stop_price is None:
        raise BadInput("nothing is to be modified; give a quantity or a price")
    with translated(), conn.transaction():
        run = lock_run(conn, user_id, run_id)
        result = write.modify_order(
            conn,
            run,
            order_id,
            version,
            quantity=quantity,
            limit_price=limit_price,
            stop_price=stop_price,
        )
        wake(conn)
    return result
