"""What a broker's adapter refused to send certainly never went out, so the order is over.

The adapter refuses what its broker can't be told: an order of a type that it doesn't have, terms
that don't fit. No other try would end otherwise, at this account or the next.
"""

from __future__ import annotations

import logging
from datetime import datetime
from uuid import UUID

from engine.db.connect import Connection
from engine.errors import translated
from engine.log import tell

__all__ = ["SEND_REFUSED", "reject_unsendable"]

SEND_REFUSED = "SEND_REFUSED"
_REFUSED = "SELECT run_id, order_id, account, error FROM orders_send_refused(%s)"


def reject_unsendable(conn: Connection, user_id: UUID, now: datetime) -> list[UUID]:
    """Move the user's orders whose SUBMIT was refused to REJECTED; returns their ids."""
    del now
    with translated():
        if not conn.execute(_REFUSED, [user_id]).fetchall():
            return []
    with translated(), conn.transaction():
        conn.execute(
            """SELECT FROM strategy_run WHERE user_id = %s AND status IN ('RUNNING', 'STOPPING')
               ORDER BY run_id FOR NO KEY UPDATE""",
            [user_id],
        )
        rows = conn.execute(_REFUSED, [user_id]).fetchall()
        conn.execute(
            """UPDATE orders o
               SET status = 'REJECTED', reject_source = 'BROKER', reject_code = %s,
                   status_reason = left(%s || coalesce(': ' || d.error, ''), 200)
               FROM unnest(%s::uuid[], %s::uuid[], %s::text[]) AS d (run_id, order_id, error)
               WHERE o.user_id = %s AND o.run_id = d.run_id AND o.order_id = d.order_id""",
            [
                SEND_REFUSED,
                SEND_REFUSED,
                [run_id for run_id, *_ in rows],
                [order_id for _, order_id, *_ in rows],
                [error for *_, error in rows],
                user_id,
            ],
        )
    for run_id, order_id, account, error in rows:
        tell(
            "SEND_REFUSED",
            level=logging.WARNING,
            run_id=run_id,
            order_id=order_id,
            account=account,
            error=error,
        )
    return [order_id for _, order_id, *_ in rows]
