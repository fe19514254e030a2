"""Halts and circuit breakers: what stops trading, by hand or by itself.

A halt is a row that the database's gate looks at before every order; what is here places and
lifts such rows, watches the circuit breakers and tells people.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from engine.db.connect import Connection
from engine.errors import BadInput, translated
from engine.log import tell
from engine.outbox import wake

# Who places and lifts what nobody asked for.
BREAKER = "breaker"

_HEARTBEAT = "HEARTBEAT"


@dataclass(frozen=True, slots=True)
class Halt:
    """A row of ``trading_halt``, or of ``system_halt`` where there is no user."""

    user_id: UUID | None
    halt_id: UUID
    name: str
    scope: str
    run_id: UUID | None
    account: str | None
    trading_state: str
    cancels: bool
    reason: str
    placed_by: str
    placed_at: datetime
    lifted_at: datetime | None
    lifted_by: str | None


class HaltOrder(NamedTuple):
    """What a halt is to be: of one run, one account, or, without either, the whole user."""

    reason: str
    by: str
    run_id: UUID | None = None
    account: str | None = None
    name: str | None = None
    trading_state: str = "HALTED"
    cancels: bool = True

    @property
    def scope(self) -> str:
        return "RUN" if self.run_id else "ACCOUNT" if self.account else "USER"

    def named(self) -> str:
        """Its name, or the one that follows from what it halts."""
        if self.name:
            return self.name
        what = f"run-{self.run_id}" if self.run_id else self.account and f"account-{self.account}"
        return f"{'reduce-' if self.trading_state == 'REDUCING' else ''}{what or 'user'}"


class Trip(NamedTuple):
    """A circuit breaker that tripped; ``value`` and ``threshold`` are in its kind's unit."""

    kind: str
    code: str
    run_id: UUID | None
    account: str | None
    threshold: Decimal
    value: Decimal
    halt: Halt


class Breach(NamedTuple):
    """An order whose rest breaks a limit now that some of it has filled."""

    order_id: UUID
    code: str
    limit_value: Decimal
    value: Decimal | None


_COLUMNS = """halt_id, name, scope, run_id, account, trading_state, cancels, reason, placed_by,
    placed_at, lifted_at, lifted_by"""
_SYSTEM_COLUMNS = """NULL::uuid AS user_id, halt_id, name, 'EVERYTHING' AS scope,
    NULL::uuid AS run_id, NULL AS account, trading_state, true AS cancels, reason, placed_by,
    placed_at, lifted_at, lifted_by"""


def place_halt(conn: Connection, user_id: UUID, order: HaltOrder) -> Halt:
    """Halt a run, an account or a user: at once, until it is lifted by name.

    New orders are refused and, unless ``cancels`` is False, working ones cancelled in the same
    transaction. A second call returns the first's halt. Raises AlreadyHappened where the name is
    that of another halt, and UnknownReference for a run or account that isn't the user's.
    """
    return _place(conn, user_id, order, order.scope)


def _place(conn: Connection, user_id: UUID, order: HaltOrder, scope: str) -> Halt:
    halt = _one(
        conn,
        f"SELECT user_id, {_COLUMNS} FROM halt_place(%s, %s, %s, %s, %s, %s, %s, %s, %s)",
        [
            user_id,
            order.named(),
            scope,
            order.run_id,
            order.account,
            order.trading_state,
            order.reason,
            order.by,
            order.cancels,
        ],
    )
    assert halt is not None
    wake(conn)
    _tell("KILL_SWITCH", halt, by=halt.placed_by, reason=halt.reason)
    return halt


def lift_halt(conn: Connection, user_id: UUID, name: str, by: str) -> Halt | None:
    """Lift the open halt of that name; ``None`` where there is none."""
    halt = _one(
        conn,
        f"SELECT user_id, {_COLUMNS} FROM halt_lift(%s, %s, %s)",
        [user_id, name, by],
    )
    if halt is not None:
        _tell("HALT_LIFTED", halt, by=by)
    return halt


def halt_everything(
    conn: Connection, reason: str, by: str, name: str = "everything", state: str = "HALTED"
) -> Halt:
    """Halt everybody's trading: new orders at once, then what works, one user after the other.

    Called again after a crash it goes on where it stopped.
    """
    halt = _one(
        conn,
        f"SELECT {_SYSTEM_COLUMNS} FROM system_halt_place(%s, %s, %s, %s)",
        [name, state, reason, by],
    )
    assert halt is not None
    for user_id in _users(conn):
        _place(conn, user_id, HaltOrder(reason, by, name=name, trading_state=state), "EVERYTHING")
    return halt


def lift_everything(conn: Connection, by: str, name: str = "everything") -> list[Halt]:
    """Lift a halt of everything by its name, at everybody; returns what was lifted."""
    system = _one(conn, f"SELECT {_SYSTEM_COLUMNS} FROM system_halt_lift(%s, %s)", [name, by])
    lifted = [] if system is None else [system]
    for user_id in _users(conn):
        copy = conn.execute(
            """SELECT FROM trading_halt WHERE user_id = %s AND name = %s
               AND scope = 'EVERYTHING' AND lifted_at IS NULL""",
            [user_id, name],
        ).fetchone()
        if copy is not None and (halt := lift_halt(conn, user_id, name, by)):
            lifted.append(halt)
    return lifted


def enforce_halts(conn: Connection, user_id: UUID) -> int:
    """Cancel what works although it is halted, after a crash for instance; how many orders."""
    with translated():
        row = conn.execute("SELECT halt_enforce(%s)", [user_id]).fetchone()
    return row[0] if row else 0


def list_halts(
    conn: Connection, user_id: UUID | None = None, *, lifted: bool = False
) -> list[Halt]:
    """Halts, newest first: those of everything, and a user's or everybody's."""
    with conn.cursor(row_factory=class_row(Halt)) as cursor:
        return cursor.execute(
            f"""SELECT {_SYSTEM_COLUMNS} FROM system_halt WHERE lifted_at IS NULL OR %(all)s
                UNION ALL
                SELECT user_id, {_COLUMNS} FROM trading_halt
                WHERE (user_id = %(user)s OR %(user)s::uuid IS NULL)
                  AND (lifted_at IS NULL OR %(all)s)
                ORDER BY placed_at DESC, name""".encode(),
            {"user": user_id, "all": lifted},
        ).fetchall()


def check_breakers(conn: Connection, user_id: UUID, now: datetime) -> list[Trip]:
    """Trip the circuit breakers that are due, and lift heartbeat halts that are over.

    Each trip is a halt, an alert and an event. What is halted already trips no more. Halts are
    carried out anew for what works under them. ``now`` is the wall clock. Call it on a timer and
    after every batch, outside of a transaction.
    """
    with translated():
        rows = conn.execute(
            """SELECT b.kind, k.log_code, b.run_id, b.account, b.threshold, b.value
               FROM breakers_tripped(%s, %s) b JOIN breaker_kind k ON k.kind = b.kind""",
            [user_id, now],
        ).fetchall()
    silent = {row[3] for row in rows if row[0] == _HEARTBEAT}
    opened = {halt.name for halt in list_halts(conn, user_id)}
    for name in opened:
        account = name.removeprefix(f"{_HEARTBEAT}-")
        if account != name and account not in silent and _heard(conn, user_id, account, now):
            lift_halt(conn, user_id, name, BREAKER)
    trips = []
    for kind, code, run_id, account, threshold, value in rows:
        name = f"{kind}-{account or run_id}"
        if name not in opened:
            subject = _Subject(name, kind, code, run_id, account)
            trips.append(_trip(conn, user_id, subject, threshold, value))
    if opened:
        enforce_halts(conn, user_id)
    return trips


class _Subject(NamedTuple):
    name: str
    kind: str
    code: str
    run_id: UUID | None
    account: str | None


def _trip(
    conn: Connection, user_id: UUID, what: _Subject, threshold: Decimal, value: Decimal
) -> Trip:
    reason = f"{what.code}: limit {threshold:f}, is {value:f}"
    order = HaltOrder(
        reason,
        BREAKER,
        what.run_id,
        what.account,
        what.name,
        # What works goes on working through a silence: the broker has it, and may be well.
        cancels=what.kind != _HEARTBEAT,
    )
    with translated(), conn.transaction():
        halt = place_halt(conn, user_id, order)
        facts = {"kind": what.kind, "threshold": str(threshold), "value": str(value)}
        for run_id in _live_runs(conn, user_id, what.run_id, what.account):
            record(conn, user_id, run_id, what.code, str(halt.halt_id), facts)
        raise_alert(
            conn,
            user_id,
            what.code,
            what.name,
            reason,
            account=what.account,
            run_id=what.run_id,
            payload=facts,
        )
    tell(
        what.code,
        level=logging.ERROR,
        user_id=user_id,
        run_id=what.run_id,
        account=what.account,
        **facts,
    )
    return Trip(what.kind, what.code, what.run_id, what.account, threshold, value, halt)


def inflight_breaches(conn: Connection, user_id: UUID, run_id: UUID) -> list[Breach]:
    """The orders that began to fill and whose rest is to be cancelled, since it breaks a limit."""
    rows = conn.execute(
        "SELECT order_id, code, limit_value, value FROM inflight_breaches(%s, %s)",
        [user_id, run_id],
    ).fetchall()
    return [Breach(*row) for row in rows]


def cancel_breaches(conn: Connection, user_id: UUID, run_id: UUID) -> list[Breach]:
    """Cancel the rest of orders whose fills have broken a limit; in the caller's transaction."""
    breaches = inflight_breaches(conn, user_id, run_id)
    for breach in breaches:
        why = f"HALT {breach.code}: limit {breach.limit_value:f}"
        conn.execute("SELECT order_cancel(%s, %s, %s, %s)", [user_id, run_id, breach.order_id, why])
        tell(
            log_code(conn, breach.code),
            level=logging.WARNING,
            order_id=breach.order_id,
            limit=breach.limit_value,
            value=breach.value,
        )
    return breaches


def log_code(conn: Connection, reject_code: str) -> str:
    """Under which event a refusal is logged: MAX_POSITION as POSITION_LIMIT, most as they are."""
    row = conn.execute("SELECT log_code FROM limit_kind WHERE code = %s", [reject_code]).fetchone()
    return row[0] if row else reject_code


def tell_refusals(conn: Connection, user_id: UUID, run_id: UUID, orders: Sequence[UUID]) -> int:
    """Log those of these orders that were refused, with limit and value; returns how many."""
    rows = conn.execute(
        """SELECT order_id, log_code, reject_source, reject_code, symbol, limit_value, value
           FROM order_refusal WHERE user_id = %s AND run_id = %s AND order_id = ANY(%s)""",
        [user_id, run_id, list(orders)],
    ).fetchall()
    for order_id, code, source, reject_code, symbol, limit, value in rows:
        tell(
            code,
            level=logging.WARNING,
            run_id=run_id,
            order_id=order_id,
            reject_source=source,
            reject_code=reject_code,
            symbol=symbol,
            limit=limit,
            value=value,
        )
    return len(rows)


def record(
    conn: Connection,
    user_id: UUID,
    run_id: UUID,
    event_type: str,
    subject: str,
    payload: Mapping[str, Any],
) -> None:
    """Write an event at the time at which the run stands, unless it stands there already."""
    conn.execute(
        """INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)
           SELECT %(user)s, %(run)s, n.at, %(type)s, %(subject)s, %(payload)s
           FROM (SELECT run_last_time(%(user)s, %(run)s) AS at) n
           WHERE NOT EXISTS (
               SELECT FROM event_ledger l
               WHERE l.user_id = %(user)s AND l.run_id = %(run)s AND l.logical_time = n.at
                 AND l.event_type = %(type)s AND l.subject = %(subject)s)""",
        {
            "user": user_id,
            "run": run_id,
            "type": event_type,
            "subject": subject,
            "payload": Jsonb(dict(payload)),
        },
    )


def raise_alert(
    conn: Connection,
    user_id: UUID,
    code: str,
    subject: str,
    message: str,
    *,
    account: str | None = None,
    run_id: UUID | None = None,
    payload: Mapping[str, Any] | None = None,
) -> None:
    """Tell a person, once until somebody has acknowledged it."""
    conn.execute(
        """INSERT INTO alert (user_id, code, subject, account, run_id, message, payload)
           VALUES (%s, %s, %s, %s, %s, %s, %s)
           ON CONFLICT (user_id, code, subject) WHERE acknowledged_at IS NULL DO NOTHING""",
        [user_id, code, subject, account, run_id, message, Jsonb(dict(payload or {}))],
    )


def _one(conn: Connection, query: str, values: Sequence[object]) -> Halt | None:
    with translated(), conn.cursor(row_factory=class_row(Halt)) as cursor:
        return cursor.execute(query.encode(), values).fetchone()


def _users(conn: Connection) -> list[UUID]:
    return [row[0] for row in conn.execute("SELECT user_id FROM app_user ORDER BY user_id")]


def _live_runs(
    conn: Connection, user_id: UUID, run_id: UUID | None, account: str | None
) -> list[UUID]:
    row = conn.execute("SELECT halt_lock_runs(%s, %s, %s)", [user_id, run_id, account]).fetchone()
    return list(row[0]) if row else []


def _heard(conn: Connection, user_id: UUID, account: str, now: datetime) -> bool:
    """Whether the broker was heard again: that nobody listens any more is no sign of life."""
    row = conn.execute(
        """SELECT e.connected
                  AND extract(epoch FROM %s - e.last_heard_at) <= a.heartbeat_seconds
           FROM broker_account a
           JOIN broker_lease e ON e.user_id = a.user_id AND e.account = a.account
           WHERE a.user_id = %s AND a.account = %s""",
        [now, user_id, account],
    ).fetchone()
    return bool(row and row[0])


def _tell(code: str, halt: Halt, **more: object) -> None:
    tell(
        code,
        level=logging.WARNING,
        user_id=halt.user_id,
        name=halt.name,
        scope=halt.scope,
        run_id=halt.run_id,
        account=halt.account,
        trading_state=halt.trading_state,
        **more,
    )


def require_scope(run_id: UUID | None, account: str | None) -> None:
    """Raise BadInput where both a run and an account are named."""
    if run_id is not None and account is not None:
        raise BadInput("name a run or an account, not both")
