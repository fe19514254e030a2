"""Reconciliation: our books against all that a broker knows, whenever there may be a difference.

A broker is asked for a snapshot (``request_snapshot``), which its connector puts into the inbox,
behind every execution in it that the inbox did not have. When all that was heard before it is
applied, ``reconcile`` compares: open orders, executions, positions and cash, as we hold them, as
the broker says, and as the ledger tells. Nothing is guessed: what may still be on its way is left
undecided, and looked at again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from psycopg.rows import namedtuple_row
from psycopg.types.json import Jsonb

from engine.db.connect import Connection
from engine.differences import UNDECIDED, Difference, Subject, adopt, note, settle, settle_doubts
from engine.errors import BadInput, EngineError, translated
from engine.log import tell
from engine.outbox import wake

__all__ = [
    "NoAnswer",
    "Reconciliation",
    "compare_now",
    "due_reconciliations",
    "mark_stale",
    "on_start",
    "reconcile",
    "request_snapshot",
    "stored",
    "watch",
]

# Below the default stale_seconds of accounts: what works is known to work before it is stale.
RECONCILE_EVERY_SECONDS = 240
# Between two questions, where one was not enough.
ASK_AGAIN_SECONDS = 5
# Executions are asked for from so long before the last reconciliation on: brokers book late, too.
OVERLAP_SECONDS = 3600
ANSWER_SECONDS_MAX = 60.0
POLL_SECONDS = 0.1


class NoAnswer(EngineError):
    """The broker's answer didn't come in time."""


class Due(NamedTuple):
    """An account that has to be reconciled, and why."""

    user_id: UUID
    account: str
    why: str


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """What a comparison with a snapshot found, and what was done.

    ``undecided`` counts orders that can't be judged yet: what was asked for them may be on its way.
    """

    account: str
    snapshot_id: UUID
    why: str
    taken_at: datetime
    dry_run: bool
    open_orders: int
    undecided: int
    differences: list[Difference] = field(default_factory=list)


def request_snapshot(
    conn: Connection, user_id: UUID, account: str, why: str, *, dry_run: bool = False
) -> UUID:
    """Have a broker asked for all that it knows of an account; returns the snapshot's id.

    What is asked for a dry run is compared by who asked, and by nobody else.
    """
    snapshot_id = uuid4()
    with translated(), conn.transaction():
        row = conn.execute(
            """SELECT (SELECT max(e.number) FROM broker_event e
                       WHERE e.user_id = a.user_id AND e.account = a.account),
                      coalesce((SELECT max(r.taken_at) FROM reconciliation r
                                WHERE r.user_id = a.user_id AND r.account = a.account),
                               a.created_at)
               FROM broker_account a WHERE a.user_id = %s AND a.account = %s""",
            [user_id, account],
        ).fetchone()
        if row is None:
            raise BadInput(f"there is no account {account}")
        payload: dict[str, Any] = {
            "snapshot_id": str(snapshot_id),
            "since": (row[1] - timedelta(seconds=OVERLAP_SECONDS)).isoformat(),
            "why": why,
            "after_number": row[0] or 0,
        }
        if dry_run:
            payload["dry_run"] = True
        conn.execute(
            """INSERT INTO broker_command (user_id, account, command_id, priority, kind, payload)
               VALUES (%s, %s, %s, 1, 'SNAPSHOT', %s)""",
            [user_id, account, snapshot_id, Jsonb(payload)],
        )
        wake(conn)
    return snapshot_id


def reconcile(
    conn: Connection,
    user_id: UUID,
    account: str,
    now: datetime,
    dry_run: bool = False,
    snapshot_id: UUID | None = None,
) -> Reconciliation | None:
    """Compare our books with the newest snapshot, or the one given, and settle what differs.

    Returns ``None`` where there is none, or where news from before it still waits to be applied.
    A dry run settles and stores nothing. Comparing again with the same snapshot does nothing.
    """
    whose = Subject(user_id, account)
    with translated(), conn.transaction():
        # Whatever moves an order of these runs, a fill above all, waits for us or is seen by us.
        runs = set() if dry_run else _lock_runs(conn, whose)
        facts = _facts(conn, whose, snapshot_id)
        if facts is None or not facts.is_whole or facts.is_waiting:
            return None
        conn.execute("SELECT reconcile_analyze()")
        compared = _Comparison(conn, whose, facts)
        found = compared.orders(None if dry_run else runs)
        if not dry_run and not compared.begin(now):
            return None
        if not dry_run:
            adopt(conn, whose, [d for d in found if d.action == "ADOPTED"])
            settle(conn, whose, [d for d in found if d.action != "HELD"], facts.taken_at)
            settle_doubts(conn, whose, facts.snapshot_id)
        found += compared.books()
        if not dry_run:
            compared.finish(found, runs)
            wake(conn)
    return Reconciliation(
        account,
        facts.snapshot_id,
        facts.why,
        facts.taken_at,
        dry_run,
        compared.open_orders,
        len(compared.undecided),
        found,
    )


def _lock_runs(conn: Connection, whose: Subject) -> set[UUID]:
    rows = conn.execute(
        """SELECT r.run_id FROM strategy_run r
           WHERE r.user_id = %s AND r.status IN ('RUNNING', 'STOPPING')
             AND r.run_id IN (SELECT t.run_id FROM run_route t
                              WHERE t.user_id = %s AND t.account = %s)
           ORDER BY r.run_id FOR NO KEY UPDATE""",
        [whose.user_id, *whose],
    ).fetchall()
    return {run_id for (run_id,) in rows}


def _facts(conn: Connection, whose: Subject, snapshot_id: UUID | None) -> Any:
    """What there is to know of the snapshot, as ``snapshot_facts`` says; ``None`` without one."""
    with conn.cursor(row_factory=namedtuple_row) as cursor:
        return cursor.execute(
            """SELECT n.snapshot_id, f.is_whole, f.is_waiting, f.why, f.taken_at, f.last_number
               FROM (SELECT coalesce(%(snapshot)s, snapshot_newest(%(user_id)s, %(account)s)))
                    AS n (snapshot_id)
               CROSS JOIN LATERAL snapshot_facts(%(user_id)s, %(account)s, n.snapshot_id) f
               WHERE n.snapshot_id IS NOT NULL""",
            {**whose._asdict(), "snapshot": snapshot_id},
        ).fetchone()


_ORDER_COLUMNS = """class, run_id, order_id, subject, becomes, action, reason, ours, brokers,
    command_id, outcome, broker_order_id, perm_id"""
_OF_ORDERS = ("missing", "working", "strangers", "contracts")
_OF_BOOKS = {
    "executions": ("EXECUTION_DIFFERS", "the broker executed it, and no run's books have it"),
    "positions": ("POSITION_DIFFERS", "the executions do not add up to what the broker holds"),
    "cash": ("CASH_DIFFERS", "the flows do not add up to what the broker holds"),
}


class _Comparison:
    """One snapshot against our books, in one transaction."""

    def __init__(self, conn: Connection, whose: Subject, facts: Any) -> None:
        self.conn = conn
        self.whose = whose
        self.facts = facts
        self.undecided: list[Difference] = []
        self.open_orders = self._count_open()
        self._before = self._known_before()

    def _count_open(self) -> int:
        row = self._rows("SELECT count(*) FROM snapshot_orders(%s, %s, %s)")[0]
        return int(row[0])

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        snapshot = [*self.whose, self.facts.snapshot_id]
        return self.conn.execute(query.encode(), snapshot).fetchall()

    def _known_before(self) -> set[tuple[str, str, str, str]]:
        """What the last reconciliation found: told once, it is not told again."""
        rows = self.conn.execute(
            """SELECT d.class, d.subject, d.ours, d.brokers
               FROM reconciliation_difference d
               WHERE d.user_id = %(user_id)s AND d.account = %(account)s AND d.snapshot_id = (
                   SELECT r.snapshot_id FROM reconciliation r
                   WHERE r.user_id = %(user_id)s AND r.account = %(account)s
                   ORDER BY r.up_to_number DESC LIMIT 1)""",
            self.whose._asdict(),
        ).fetchall()
        return {(kind, subject, repr(ours), repr(theirs)) for kind, subject, ours, theirs in rows}

    def begin(self, now: datetime) -> bool:
        """Store that it is compared; False where somebody has done it before."""
        begun = self.conn.execute(
            """INSERT INTO reconciliation (user_id, account, snapshot_id, why, taken_at,
                                           up_to_number, open_orders, undecided, began_at)
               VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)
               ON CONFLICT DO NOTHING RETURNING true""",
            [
                *self.whose,
                self.facts.snapshot_id,
                self.facts.why,
                self.facts.taken_at,
                self.facts.last_number,
                self.open_orders,
                len(self.undecided),
                now,
            ],
        ).fetchone()
        return begun is not None

    def orders(self, runs: set[UUID] | None) -> list[Difference]:
        """How orders differ; those of runs that have ended can't be settled, and are HELD."""
        found: list[Difference] = []
        for part in _OF_ORDERS:
            seen = {d.order_id for d in found if d.becomes == "CANCELED" or d.kind == part}
            rows = self._rows(f"SELECT {_ORDER_COLUMNS} FROM reconcile_{part}(%s, %s, %s)")
            for difference in (Difference(*row) for row in rows):
                if difference.kind == UNDECIDED:
                    self.undecided.append(difference)
                elif part != "contracts" or difference.order_id not in seen:
                    found.append(_held_if_over(difference, runs))
        return self._with_derived(found)

    def _with_derived(self, found: list[Difference]) -> list[Difference]:
        orders = [d.order_id for d in found if d.order_id is not None and d.kind != "ORPHAN"]
        if not orders:
            return found
        rows = self.conn.execute(
            "SELECT order_id, derived FROM orders_derived(%s, %s)", [self.whose.user_id, orders]
        ).fetchall()
        derived: dict[UUID, Any] = dict(rows)
        return [d._replace(derived=derived.get(d.order_id)) if d.order_id else d for d in found]

    def books(self) -> list[Difference]:
        """How executions, positions and cash differ."""
        row = self.conn.execute("SELECT account_run(%s, %s)", [*self.whose]).fetchone()
        run_id = row[0] if row else None
        parts = ["executions"] if self._fills_wait() else list(_OF_BOOKS)
        return [
            Difference(kind, run_id, None, subject, None, "ALERTED", reason, ours, theirs)._replace(
                derived=derived
            )
            for part in parts
            for kind, reason in [_OF_BOOKS[part]]
            for subject, ours, theirs, derived in self._rows(
                f"SELECT subject, ours, brokers, derived FROM reconcile_{part}(%s, %s, %s)"
            )
        ]

    def _fills_wait(self) -> bool:
        """Whether fills have arrived since, of which the broker's holdings may know already."""
        row = self.conn.execute(
            """SELECT EXISTS (SELECT FROM broker_event
                              WHERE user_id = %s AND account = %s AND applied_at IS NULL
                                AND kind IN ('EXECUTION', 'BUST', 'COMMISSION'))""",
            [*self.whose],
        ).fetchone()
        return row is not None and bool(row[0])

    def finish(self, found: Sequence[Difference], runs: set[UUID]) -> None:
        """Store what was found, tell of what is new, and end the question that is answered."""
        self._store(found)
        news = [d for d in found if d.key not in self._before]
        note(self.conn, self.whose, news, runs, self.facts.last_number)
        self.conn.execute(
            """UPDATE orders SET pending_reconcile = false
               WHERE user_id = %s AND account = %s AND pending_reconcile AND run_id = ANY(%s)
                 AND order_id <> ALL(%s)""",
            [*self.whose, list(runs), [d.order_id for d in self.undecided]],
        )
        # Older snapshots, and parts that nothing completes, have nothing more to say.
        self.conn.execute(
            """UPDATE broker_event SET applied_at = now(),
                      finding = CASE WHEN payload ->> 'snapshot_id' = %s THEN 'NEW'
                                     ELSE 'STALE' END
               WHERE user_id = %s AND account = %s AND kind = 'SNAPSHOT' AND applied_at IS NULL
                 AND number <= %s""",
            [str(self.facts.snapshot_id), *self.whose, self.facts.last_number],
        )
        tell(
            "RECONCILE",
            account=self.whose.account,
            why=self.facts.why,
            open_orders=self.open_orders,
            differences=len(found),
            undecided=len(self.undecided),
        )

    def _store(self, found: Sequence[Difference]) -> None:
        self.conn.execute(
            """INSERT INTO reconciliation_difference (user_id, account, snapshot_id, number, class,
                   subject, ours, brokers, derived, action, reason)
               SELECT %s, %s, %s, d.number, d.class, d.subject, d.ours, d.brokers, d.derived,
                      d.action, d.reason
               FROM unnest(%s::text[], %s::text[], %s::jsonb[], %s::jsonb[], %s::jsonb[],
                           %s::text[], %s::text[]) WITH ORDINALITY
                    AS d (class, subject, ours, brokers, derived, action, reason, number)""",
            [
                *self.whose,
                self.facts.snapshot_id,
                [d.kind for d in found],
                [d.subject for d in found],
                [_json(d.ours) for d in found],
                [_json(d.brokers) for d in found],
                [_json(d.derived) for d in found],
                [d.action for d in found],
                [d.reason for d in found],
            ],
        )


def _json(value: Any) -> Jsonb | None:
    return None if value is None else Jsonb(value)


def _held_if_over(difference: Difference, runs: set[UUID] | None) -> Difference:
    if runs is None or difference.run_id is None or difference.run_id in runs:
        return difference
    reason = f"{difference.reason}; its run has ended"
    return difference._replace(action="HELD", becomes=None, outcome=None, reason=reason)


# --- When ---------------------------------------------------------------------------------------


def due_reconciliations(
    conn: Connection, now: datetime, *, user_id: UUID | None = None
) -> list[Due]:
    """The connected accounts of which a snapshot is due and not yet asked for, and why.

    CONNECTED after every connection, the first included; CONTRACT_CHANGED; UNDECIDED and PENDING
    where the last answer left something open; else by TIMER.
    """
    rows = conn.execute(
        """SELECT a.user_id, a.account, CASE
                  WHEN c.asked_at IS NULL OR h.connected_at > c.asked_at THEN 'CONNECTED'
                  WHEN h.changed_at > c.asked_at THEN 'CONTRACT_CHANGED'
                  WHEN k.undecided > 0 THEN 'UNDECIDED'
                  WHEN p.is_pending THEN 'PENDING'
                  ELSE 'TIMER' END
           FROM broker_account a
           CROSS JOIN LATERAL (
               SELECT max(b.claimed_at) FILTER (WHERE b.outcome = 'SENT') AS asked_at,
                      max(b.created_at) AS tried_at,
                      bool_or(b.done_at IS NULL AND coalesce(b.claimed_by = l.holder, true))
                          AS is_waiting
               FROM broker_command b JOIN broker_lease l
                 ON l.user_id = b.user_id AND l.account = b.account
               WHERE b.user_id = a.user_id AND b.account = a.account AND b.kind = 'SNAPSHOT'
                 AND NOT b.payload ? 'dry_run') c
           CROSS JOIN LATERAL (
               SELECT max(e.received_at) FILTER (WHERE e.kind = 'CONNECTED') AS connected_at,
                      max(e.received_at) FILTER (WHERE e.kind = 'CONTRACT_CHANGED') AS changed_at
               FROM broker_event e
               WHERE e.user_id = a.user_id AND e.account = a.account
                 AND e.kind IN ('CONNECTED', 'CONTRACT_CHANGED')) h
           LEFT JOIN LATERAL (
               SELECT r.undecided FROM reconciliation r
               WHERE r.user_id = a.user_id AND r.account = a.account
               ORDER BY r.up_to_number DESC LIMIT 1) k ON true
           CROSS JOIN LATERAL (
               SELECT EXISTS (SELECT FROM orders o
                              WHERE o.user_id = a.user_id AND o.account = a.account
                                AND o.pending_reconcile
                                AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED'))
                   AS is_pending) p
           WHERE account_is_up(a.user_id, a.account, %(now)s)
             AND coalesce(a.user_id = %(user)s, true) AND c.is_waiting IS NOT TRUE
             AND (c.asked_at IS NULL OR h.connected_at > c.asked_at OR h.changed_at > c.asked_at
                  OR (k.undecided > 0 OR p.is_pending)
                     AND c.asked_at <= %(now)s - make_interval(secs => %(again)s)
                  OR c.asked_at <= %(now)s - make_interval(secs => %(every)s))
             AND (coalesce(c.tried_at, '-infinity') <= %(now)s - make_interval(secs => %(again)s)
                  OR greatest(h.connected_at, h.changed_at) > c.tried_at)
           ORDER BY a.user_id, a.account""",
        {
            "now": now,
            "user": user_id,
            "again": ASK_AGAIN_SECONDS,
            "every": RECONCILE_EVERY_SECONDS,
        },
    ).fetchall()
    return [Due(*row) for row in rows]


def mark_stale(conn: Connection, user_id: UUID, account: str, now: datetime) -> int:
    """Mark orders of which nothing was heard for too long as to be reconciled (STATUS_STALE)."""
    whose = Subject(user_id, account)
    query = "SELECT run_id, order_id, heard_at FROM orders_stale(%s, %s, %s)"
    if not conn.execute(query, [*whose, now]).fetchall():
        return 0
    with translated(), conn.transaction():
        runs = _lock_runs(conn, whose)
        stale = [row for row in conn.execute(query, [*whose, now]) if row[0] in runs]
        marked = conn.execute(
            """WITH marked AS (
                   UPDATE orders o SET pending_reconcile = true
                   FROM unnest(%(runs)s::uuid[], %(orders)s::uuid[], %(heard)s::timestamptz[])
                        AS d (run_id, order_id, heard_at)
                   WHERE o.user_id = %(user)s AND o.run_id = d.run_id AND o.order_id = d.order_id
                   RETURNING o.run_id, o.order_id, o.version, o.status, d.heard_at)
               INSERT INTO event_ledger (user_id, run_id, event_type, subject, payload)
               SELECT %(user)s, m.run_id, 'STATUS_STALE', m.order_id || '@' || m.version,
                      jsonb_build_object('status', m.status, 'heard_at', event_moment(m.heard_at))
               FROM marked m ORDER BY m.order_id RETURNING subject""",
            {
                "user": user_id,
                "runs": [run_id for run_id, _, _ in stale],
                "orders": [order_id for _, order_id, _ in stale],
                "heard": [heard_at for _, _, heard_at in stale],
            },
        ).fetchall()
    for (subject,) in marked:
        tell("STATUS_STALE", account=account, order_id=subject.partition("@")[0])
    return len(marked)


def watch(conn: Connection, user_id: UUID, now: datetime) -> None:
    """Compare what was answered, mark what is stale, and ask what is due, of a user's accounts."""
    with translated():
        rows = conn.execute(
            "SELECT account FROM broker_account WHERE user_id = %s ORDER BY account", [user_id]
        ).fetchall()
        for (account,) in rows:
            reconcile(conn, user_id, account, now)
            if mark_stale(conn, user_id, account, now):
                request_snapshot(conn, user_id, account, "STALE")
        for due in due_reconciliations(conn, now, user_id=user_id):
            request_snapshot(conn, *due)


def on_start(conn: Connection, user_id: UUID, now: datetime) -> None:
    """Ask about every connected account, whatever was asked before this process began."""
    rows = conn.execute(
        """SELECT a.account FROM broker_account a
           WHERE a.user_id = %s AND account_is_up(a.user_id, a.account, %s) ORDER BY a.account""",
        [user_id, now],
    ).fetchall()
    for (account,) in rows:
        request_snapshot(conn, user_id, account, "START")


def compare_now(
    conn: Connection,
    user_id: UUID,
    account: str,
    now: datetime,
    *,
    dry_run: bool = False,
    wait_seconds: float = ANSWER_SECONDS_MAX,
) -> Reconciliation:
    """Ask the broker now and compare; raises NoAnswer where the answer doesn't come in time."""
    snapshot_id = request_snapshot(conn, user_id, account, "DEMAND", dry_run=dry_run)
    ends_at = time.monotonic() + wait_seconds
    while True:
        done = reconcile(conn, user_id, account, now, dry_run, snapshot_id)
        if done is None and not dry_run:
            done = stored(conn, user_id, account, snapshot_id)
        if done is not None:
            return done
        if time.monotonic() >= ends_at:
            raise NoAnswer(
                f"no snapshot of {account} within {wait_seconds:g} s; "
                "see that `oms connect` and `oms work` run"
            )
        time.sleep(POLL_SECONDS)


def stored(
    conn: Connection, user_id: UUID, account: str, snapshot_id: UUID
) -> Reconciliation | None:
    """A reconciliation as it was stored, whoever did it; ``None`` where there is none."""
    key = [user_id, account, snapshot_id]
    row = conn.execute(
        """SELECT why, taken_at, open_orders, undecided FROM reconciliation
           WHERE user_id = %s AND account = %s AND snapshot_id = %s""",
        key,
    ).fetchone()
    if row is None:
        return None
    why, taken_at, open_orders, undecided = row
    found = [
        Difference(kind, None, None, subject, None, action, reason, ours, brokers)._replace(
            derived=derived
        )
        for kind, subject, action, reason, ours, brokers, derived in conn.execute(
            """SELECT class, subject, action, reason, ours, brokers, derived
               FROM reconciliation_difference
               WHERE user_id = %s AND account = %s AND snapshot_id = %s ORDER BY number""",
            key,
        )
    ]
    return Reconciliation(account, snapshot_id, why, taken_at, False, open_orders, undecided, found)
