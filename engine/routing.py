"""Routing: another account takes over what certainly never reached the first (ROUTE-01).

Certain is what no connector has taken yet, and what a broker, asked for all that it knows, does not
have. An order of which nobody knows whether it arrived stays where it is.
"""

from __future__ import annotations

import logging
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from engine.db.connect import Connection
from engine.differences import Subject, alert
from engine.errors import translated
from engine.log import tell
from engine.outbox import wake

__all__ = ["Rerouted", "reroute"]

# How long an account's connector may be away before its orders go elsewhere.
DOWN_SECONDS = 30


class Rerouted(NamedTuple):
    """An order that another account has taken over; ``why`` is ACCOUNT_DOWN or NEVER_ARRIVED."""

    run_id: UUID
    order_id: UUID
    account: str
    next_account: str
    why: str


_WAITING = "SELECT run_id, order_id, account, next_account, why FROM orders_to_reroute(%s, %s, %s)"


def reroute(
    conn: Connection, user_id: UUID, now: datetime, *, down_seconds: int = DOWN_SECONDS
) -> list[Rerouted]:
    """Send orders that never reached their account to the next one of their run that is up."""
    parameters = [user_id, now, down_seconds]
    with translated():
        if not conn.execute(_WAITING, parameters).fetchall():
            return []
    with translated(), conn.transaction():
        conn.execute(
            """SELECT FROM strategy_run WHERE user_id = %s AND status = 'RUNNING'
               FOR NO KEY UPDATE""",
            [user_id],
        )
        wanted = [Rerouted(*row) for row in conn.execute(_WAITING, parameters)]
        # A connector that is just taking one keeps it: it is no longer among the unclaimed.
        free = _withdraw(conn, user_id, [each for each in wanted if each.why == "ACCOUNT_DOWN"])
        moved = [each for each in wanted if each.why != "ACCOUNT_DOWN" or each.order_id in free]
        _move(conn, user_id, moved)
        for account in dict.fromkeys(each.account for each in moved):
            words = f"{account} is down or lost orders; the next accounts of their runs have them"
            alert(conn, Subject(user_id, account), "ROUTE_FAILOVER", account, words, None)
        wake(conn)
    for each in moved:
        tell("ROUTE_FAILOVER", level=logging.WARNING, **each._asdict())
    return moved


def _withdraw(conn: Connection, user_id: UUID, waiting: list[Rerouted]) -> set[UUID]:
    rows = conn.execute(
        """UPDATE broker_command c SET outcome = 'WITHDRAWN', done_at = clock_timestamp()
           FROM unnest(%s::uuid[], %s::text[]) AS d (order_id, account)
           WHERE c.user_id = %s AND c.account = d.account AND c.order_id = d.order_id
             AND c.kind = 'SUBMIT' AND c.claimed_by IS NULL AND c.done_at IS NULL
           RETURNING c.order_id""",
        [[each.order_id for each in waiting], [each.account for each in waiting], user_id],
    ).fetchall()
    return {order_id for (order_id,) in rows}


def _move(conn: Connection, user_id: UUID, moved: list[Rerouted]) -> None:
    conn.execute(
        """WITH moved AS (
               UPDATE orders o SET account = d.next_account
               FROM unnest(%s::uuid[], %s::uuid[], %s::text[], %s::text[], %s::text[])
                    AS d (run_id, order_id, account, next_account, why)
               WHERE o.user_id = %s AND o.run_id = d.run_id AND o.order_id = d.order_id
               RETURNING o.run_id, o.order_id, o.version, d.account, d.next_account, d.why)
           INSERT INTO event_ledger (user_id, run_id, event_type, subject, payload)
           SELECT %s, m.run_id, 'ROUTE_FAILOVER', m.order_id || '@' || m.version,
                  jsonb_build_object('from', m.account, 'to', m.next_account, 'why', m.why)
           FROM moved m ORDER BY m.order_id""",
        [
            [each.run_id for each in moved],
            [each.order_id for each in moved],
            [each.account for each in moved],
            [each.next_account for each in moved],
            [each.why for each in moved],
            user_id,
            user_id,
        ],
    )
