"""What a reconciliation finds, and what is done about it.

Each step is one statement for any number of orders. The broker is right about what happened: an
order that it doesn't work any more is CANCELED, one that it does work is taken back, on the terms
that we asked for. What nobody asked for is not guessed: a person is told.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from psycopg.types.json import Jsonb

from engine.db.connect import Connection
from engine.log import tell

__all__ = [
    "UNDECIDED",
    "Difference",
    "Subject",
    "adopt",
    "alert",
    "code_of",
    "note",
    "settle",
    "settle_doubts",
]

UNDECIDED = "UNDECIDED"
ALERTS_MAX = 100  # of one class in one reconciliation; the rest is in reconciliation_difference

_CODES = {
    "MISSING_AT_BROKER": "RECONCILE_MISMATCH",
    "ORPHAN": "ORPHAN_ORDER",
    "FOREIGN": "FOREIGN_ORDER",
    "CONTRACT_CHANGED": "CONTRACT_CHANGED",
}
_TELLS_PEOPLE = frozenset({"ALERTED", "HELD"})


class Subject(NamedTuple):
    """An account of a user: what is reconciled."""

    user_id: UUID
    account: str


class Difference(NamedTuple):
    """Something that we and a broker see differently, three ways, and what is done about it.

    ``kind`` is its class; ``subject`` an order's id, an execution, a symbol or a currency.
    ``becomes`` is the order's status then, ``outcome`` that of the command that asked for it.
    """

    kind: str
    run_id: UUID | None
    order_id: UUID | None
    subject: str
    becomes: str | None
    action: str
    reason: str
    ours: Any = None
    brokers: Any = None
    command_id: UUID | None = None
    outcome: str | None = None
    broker_order_id: int | None = None
    perm_id: int | None = None
    derived: Any = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What makes it the same finding as one of another reconciliation."""
        return self.kind, self.subject, repr(self.ours), repr(self.brokers)


def code_of(difference: Difference) -> str:
    """The stable code of a difference: the event's type, the alert's code, the log's event."""
    if difference.kind in _CODES:
        return _CODES[difference.kind]
    return "RECONCILE_MISMATCH" if difference.action in _TELLS_PEOPLE else "RECONCILE"


def adopt(conn: Connection, whose: Subject, orphans: Sequence[Difference]) -> None:
    """Take orders that only the broker knew into the run that is there for them."""
    if not orphans:
        return
    conn.execute(
        """INSERT INTO orders (user_id, run_id, order_id, symbol, side, quantity, order_type,
                               time_in_force, limit_price, stop_price, trail_amount, trail_percent,
                               expire_at, account, recovered)
           SELECT %s, d.run_id, d.order_id, t.symbol, t.side, t.quantity,
                  coalesce(t.order_type, 'MARKET'), coalesce(t.time_in_force, 'DAY'),
                  t.limit_price, t.stop_price, t.trail_amount, t.trail_percent, t.expire_at, %s,
                  true
           FROM unnest(%s::uuid[], %s::uuid[], %s::jsonb[]) AS d (run_id, order_id, brokers)
           CROSS JOIN LATERAL jsonb_populate_record(NULL::snapshot_order, d.brokers) t
           ORDER BY d.order_id ON CONFLICT DO NOTHING""",
        [
            *whose,
            [d.run_id for d in orphans],
            [d.order_id for d in orphans],
            [Jsonb(d.brokers) for d in orphans],
        ],
    )


def settle(conn: Connection, whose: Subject, found: Sequence[Difference], at: datetime) -> None:
    """Do what is to be done about orders; ``at`` is the broker's time of it."""
    _settle_commands(conn, whose, found)
    _record_ids(conn, whose, found, at)
    _take_terms(conn, whose, [d for d in found if d.action == "TERMS_TAKEN" and not d.becomes])
    _move(conn, whose, [d for d in found if d.becomes])
    _cancel(conn, whose, [d for d in found if d.action == "CANCEL_SENT"])


def _settle_commands(conn: Connection, whose: Subject, found: Sequence[Difference]) -> None:
    judged = [d for d in found if d.command_id and d.outcome]
    conn.execute(
        """UPDATE broker_command c
           SET outcome = d.outcome, done_at = coalesce(c.done_at, clock_timestamp())
           FROM unnest(%s::uuid[], %s::text[]) AS d (command_id, outcome)
           WHERE c.user_id = %s AND c.account = %s AND c.command_id = d.command_id
             AND coalesce(c.outcome, 'UNKNOWN') IN ('UNKNOWN', 'SENT')""",
        [[d.command_id for d in judged], [d.outcome for d in judged], *whose],
    )
    # Whatever the broker knows has arrived, if we were in doubt.
    conn.execute(
        """UPDATE broker_command c
           SET outcome = 'ARRIVED', done_at = coalesce(c.done_at, clock_timestamp())
           WHERE c.user_id = %s AND c.account = %s AND c.order_id = ANY(%s) AND c.kind = 'SUBMIT'
             AND c.claimed_by IS NOT NULL AND coalesce(c.outcome, 'UNKNOWN') = 'UNKNOWN'""",
        [*whose, [d.order_id for d in found if d.brokers and d.kind != "ORPHAN"]],
    )


def settle_doubts(conn: Connection, whose: Subject, snapshot_id: UUID) -> None:
    """Say what became of commands in doubt of orders that don't differ."""
    conn.execute(
        """UPDATE broker_command c
           SET outcome = d.outcome, done_at = coalesce(c.done_at, clock_timestamp())
           FROM reconcile_commands(%s, %s, %s) d
           WHERE c.user_id = %s AND c.account = %s AND c.command_id = d.command_id
             AND c.outcome IS DISTINCT FROM d.outcome""",
        [*whose, snapshot_id, *whose],
    )


def _record_ids(
    conn: Connection, whose: Subject, found: Sequence[Difference], at: datetime
) -> None:
    named = [d for d in found if d.order_id and (d.broker_order_id or d.perm_id)]
    columns: list[Any] = [
        [d.run_id for d in named],
        [d.order_id for d in named],
        [d.broker_order_id for d in named],
        [d.perm_id for d in named],
    ]
    conn.execute(
        """INSERT INTO order_broker_id (user_id, run_id, order_id, account, broker_order_id,
                                        perm_id, since)
           SELECT DISTINCT %s::uuid, d.run_id, d.order_id, %s, coalesce(d.broker_order_id, 0),
                  coalesce(d.perm_id, 0), %s::timestamptz
           FROM unnest(%s::uuid[], %s::uuid[], %s::bigint[], %s::bigint[])
                AS d (run_id, order_id, broker_order_id, perm_id)
           ON CONFLICT DO NOTHING""",
        [*whose, at, *columns],
    )
    conn.execute(
        """UPDATE orders o
           SET broker_order_id = coalesce(d.broker_order_id, o.broker_order_id),
               perm_id = coalesce(d.perm_id, o.perm_id)
           FROM unnest(%s::uuid[], %s::uuid[], %s::bigint[], %s::bigint[])
                AS d (run_id, order_id, broker_order_id, perm_id)
           WHERE o.user_id = %s AND o.run_id = d.run_id AND o.order_id = d.order_id
             AND (coalesce(d.broker_order_id, o.broker_order_id), coalesce(d.perm_id, o.perm_id))
                 IS DISTINCT FROM (o.broker_order_id, o.perm_id)""",
        [*columns, whose.user_id],
    )


_TERMS = """quantity = coalesce((c.payload ->> 'quantity')::numeric, o.quantity),
    limit_price = CASE WHEN c.payload IS NULL THEN o.limit_price
                       ELSE (c.payload ->> 'limit_price')::numeric END,
    stop_price = CASE WHEN c.payload IS NULL THEN o.stop_price
                      ELSE (c.payload ->> 'stop_price')::numeric END,
    trail_amount = CASE WHEN c.payload IS NULL THEN o.trail_amount
                        ELSE (c.payload ->> 'trail_amount')::numeric END"""


def _take_terms(conn: Connection, whose: Subject, taken: Sequence[Difference]) -> None:
    conn.execute(
        f"""UPDATE orders o SET {_TERMS}
            FROM broker_command c
            WHERE c.user_id = %s AND c.account = %s AND c.command_id = ANY(%s)
              AND o.user_id = c.user_id AND o.run_id = c.run_id AND o.order_id = c.order_id""",
        [*whose, [d.command_id for d in taken]],
    )


def _move(conn: Connection, whose: Subject, moved: Sequence[Difference]) -> None:
    """Move orders; where a modification turned out to have arrived, on its terms."""
    conn.execute(
        f"""UPDATE orders o
            SET status = d.status, status_reason = d.reason,
                reject_source = CASE WHEN d.status = 'REJECTED' THEN 'BROKER' END,
                reject_code = CASE WHEN d.status = 'REJECTED' THEN d.reason END, {_TERMS}
            FROM unnest(%s::uuid[], %s::uuid[], %s::text[], %s::text[], %s::uuid[])
                 AS d (run_id, order_id, status, reason, command_id)
            LEFT JOIN broker_command c
                   ON c.user_id = %s AND c.account = %s AND c.command_id = d.command_id
            WHERE o.user_id = %s AND o.run_id = d.run_id AND o.order_id = d.order_id
              AND o.status <> d.status""",
        [
            [d.run_id for d in moved],
            [d.order_id for d in moved],
            [d.becomes for d in moved],
            [code_of(d) for d in moved],
            [d.command_id if d.action == "TERMS_TAKEN" else None for d in moved],
            *whose,
            whose.user_id,
        ],
    )


def _cancel(conn: Connection, whose: Subject, wanted: Sequence[Difference]) -> None:
    """Ask again for a cancel that was lost, for the reason that it had; or for a new one."""
    conn.execute(
        """SELECT order_cancel(%s, d.run_id, d.order_id, d.why)
           FROM unnest(%s::uuid[], %s::uuid[], %s::text[]) AS d (run_id, order_id, why)""",
        [
            whose.user_id,
            [d.run_id for d in wanted],
            [d.order_id for d in wanted],
            [
                d.kind
                if d.kind == "CONTRACT_CHANGED"
                else (d.ours or {}).get("status_reason") or code_of(d)
                for d in wanted
            ],
        ],
    )


def note(
    conn: Connection,
    whose: Subject,
    found: Iterable[Difference],
    runs: Collection[UUID],
    number: int,
) -> None:
    """Tell the runs' ledgers, the people and the log; ``number`` is the snapshot's last row.

    A run may stand at one logical time for days: the number tells findings of that time apart.
    """
    found = list(found)
    told = [d for d in found if d.run_id in runs]
    conn.execute(
        """INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)
           SELECT %(user)s, d.run_id, run_last_time(%(user)s, d.run_id), d.code,
                  left(coalesce(o.order_id || '@' || o.version || '/' || d.kind,
                                %(account)s || '/' || d.kind || '/' || d.subject), 180)
                  || '/' || %(number)s::bigint, d.payload
           FROM unnest(%(runs)s::uuid[], %(orders)s::uuid[], %(codes)s::text[], %(kinds)s::text[],
                       %(subjects)s::text[], %(payloads)s::jsonb[]) WITH ORDINALITY
                AS d (run_id, order_id, code, kind, subject, payload, place)
           LEFT JOIN orders o
                  ON o.user_id = %(user)s AND o.run_id = d.run_id AND o.order_id = d.order_id
           ORDER BY d.place""",
        {
            "user": whose.user_id,
            "account": whose.account,
            "number": number,
            "runs": [d.run_id for d in told],
            "orders": [d.order_id for d in told],
            "codes": [code_of(d) for d in told],
            "kinds": [d.kind for d in told],
            "subjects": [d.subject for d in told],
            "payloads": [Jsonb(_payload(d)) for d in told],
        },
    )
    for difference in found:
        tell(
            code_of(difference),
            level=logging.WARNING,
            account=whose.account,
            subject=difference.subject,
            order_id=difference.order_id,
            action=difference.action,
            reason=difference.reason,
            found=difference.kind,
        )
    _alert(conn, whose, found)


def _payload(difference: Difference) -> dict[str, Any]:
    return {
        "class": difference.kind,
        "ours": difference.ours,
        "brokers": difference.brokers,
        "derived": difference.derived,
        "action": difference.action,
        "reason": difference.reason,
    }


def _alert(conn: Connection, whose: Subject, found: Iterable[Difference]) -> None:
    counts: dict[str, int] = {}
    for d in found:
        if d.action in _TELLS_PEOPLE or d.kind in ("MISSING_AT_BROKER", *_CODES):
            counts[d.kind] = counts.get(d.kind, 0) + 1
            if counts[d.kind] <= ALERTS_MAX:
                message = f"{d.subject} at {whose.account}: {d.reason}"
                subject = f"{whose.account} {d.kind} {d.subject}"
                alert(conn, whose, code_of(d), subject, message, d.run_id)


def alert(
    conn: Connection, whose: Subject, code: str, subject: str, message: str, run_id: UUID | None
) -> None:
    """Raise an alert, unless the same one is open."""
    conn.execute(
        """INSERT INTO alert (user_id, code, subject, account, run_id, message)
           VALUES (%s, %s, %s, %s, %s, %s)
           ON CONFLICT (user_id, code, subject) WHERE acknowledged_at IS NULL DO NOTHING""",
        [whose.user_id, code, subject[:200], whose.account, run_id, message[:2000]],
    )
