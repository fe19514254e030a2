"""Flatten: close every position of a run, an account or a user, in an emergency.

What works is cancelled first; then, where the account's broker offers it, the broker is asked what
closing would do to the margin; then one safety order a position is sent ahead of everything else.
Safety orders pass halts and limits, since they only make positions smaller. Whatever becomes of
them, no flatten ever leads to another one: who wants another asks for it.

A flatten is a row (``flatten_request``) that ``advance`` moves on, so that a crash loses nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID, uuid4, uuid5

from psycopg.rows import class_row, dict_row
from psycopg.types.json import Jsonb

from engine.db.connect import Connection
from engine.errors import translated
from engine.log import tell
from engine.outbox import wake
from engine.safety import raise_alert, record, require_scope

# How long cancels, and answers about the margin, are waited for before positions are closed anyway.
CANCEL_WAIT = timedelta(seconds=30)
CHECK_WAIT = timedelta(seconds=10)
# How long after it was asked for a flatten may have orders at brokers that are not over, until a
# person is told. Those of a paper run wait for its next price by design.
CLOSE_WAIT = timedelta(minutes=5)
# The newest events of an account, among which the answers about the margin are.
EVENTS_SEEN_MAX = 10_000

_OVER = ("FILLED", "CANCELED", "REJECTED", "EXPIRED")


@dataclass(frozen=True, slots=True)
class Flatten:
    """A row of ``flatten_request``; ``repeated``: it ran already when it was asked for."""

    user_id: UUID
    flatten_id: UUID
    scope: str
    run_id: UUID | None
    account: str | None
    reason: str
    asked_by: str
    asked_at: datetime
    status: str
    checked_at: datetime | None
    finished_at: datetime | None
    summary: Mapping[str, Any] | None
    repeated: bool = False


class Scope(NamedTuple):
    """What is to be flattened: one run, one account, or, without either, all that a user has."""

    run_id: UUID | None = None
    account: str | None = None

    @property
    def name(self) -> str:
        return "RUN" if self.run_id else "ACCOUNT" if self.account else "USER"


class _Close(NamedTuple):
    """An order that closes what is open of a position."""

    run_id: UUID
    broker: str
    symbol: str
    account: str | None
    side: str
    quantity: Decimal


def flatten(
    conn: Connection, user_id: UUID, scope: Scope, reason: str, by: str, now: datetime
) -> Flatten:
    """Close every position of the scope. ``now`` is the wall clock.

    While a flatten of the user runs there is no second one: the running one is returned
    (``repeated``) and FLATTEN_RECURSION told. Raises UnknownReference for a run or account that
    isn't the user's.
    """
    require_scope(scope.run_id, scope.account)
    with translated(), conn.transaction():
        row = conn.execute(
            """INSERT INTO flatten_request (user_id, flatten_id, scope, run_id, account, reason,
                                            asked_by, asked_at)
               VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
               ON CONFLICT (user_id) WHERE finished_at IS NULL DO NOTHING RETURNING flatten_id""",
            [user_id, uuid4(), scope.name, *scope, reason, by, now],
        ).fetchone()
        asked = running(conn, user_id)
        assert asked is not None
        if row is None:
            _refuse_recursion(conn, asked, str(asked.flatten_id), {"reason": reason, "by": by})
            return replace(asked, repeated=True)
        _cancel_working(conn, asked)
    tell("FLATTEN", level=logging.WARNING, user_id=user_id, flatten_id=asked.flatten_id, by=by)
    return advance(conn, user_id, now) or asked


def running(conn: Connection, user_id: UUID) -> Flatten | None:
    """The user's flatten that isn't finished, locked for this transaction, if there is one."""
    with conn.cursor(row_factory=class_row(Flatten)) as cursor:
        return cursor.execute(
            """SELECT user_id, flatten_id, scope, run_id, account, reason, asked_by, asked_at,
                      status, checked_at, finished_at, summary
               FROM flatten_request WHERE user_id = %s AND finished_at IS NULL FOR UPDATE""",
            [user_id],
        ).fetchone()


def find(conn: Connection, user_id: UUID, flatten_id: UUID) -> Flatten | None:
    """A flatten as it stands."""
    with conn.cursor(row_factory=class_row(Flatten)) as cursor:
        return cursor.execute(
            """SELECT user_id, flatten_id, scope, run_id, account, reason, asked_by, asked_at,
                      status, checked_at, finished_at, summary
               FROM flatten_request WHERE user_id = %s AND flatten_id = %s""",
            [user_id, flatten_id],
        ).fetchone()


def advance(conn: Connection, user_id: UUID, now: datetime) -> Flatten | None:
    """Move the user's running flatten on as far as it goes; ``None`` where none runs.

    Call it on a timer and after every batch of what brokers said.
    """
    with translated(), conn.transaction():
        asked = running(conn, user_id)
        if asked is None:
            return None
        runs = _lock_runs(conn, asked)
        if asked.status == "CANCELLING" and _cancelled(conn, asked, runs, now):
            _check(conn, asked, runs, now)
            asked = running(conn, user_id) or asked
        if asked.status == "CHECKING":
            _judge(conn, asked, runs, now)
            asked = running(conn, user_id) or asked
        if asked.status == "CLOSING":
            _finish_if_done(conn, asked, runs, now)
        wake(conn)
        return find(conn, user_id, asked.flatten_id)


# --- Cancelling -------------------------------------------------------------------------------


def _lock_runs(conn: Connection, asked: Flatten) -> list[UUID]:
    row = conn.execute(
        "SELECT halt_lock_runs(%s, %s, %s)", [asked.user_id, asked.run_id, asked.account]
    ).fetchone()
    return list(row[0]) if row else []


_WORKING = """SELECT o.run_id, o.order_id FROM orders o
    WHERE o.user_id = %(user)s AND o.run_id = ANY(%(runs)s)
      AND (o.account = %(account)s OR %(account)s::text IS NULL)
      AND o.purpose IS NULL AND o.status <> ALL(%(over)s) ORDER BY o.run_id, o.order_id"""


def _working(conn: Connection, asked: Flatten, runs: Sequence[UUID]) -> list[tuple[Any, ...]]:
    return conn.execute(
        _WORKING,
        {
            "user": asked.user_id,
            "runs": list(runs),
            "account": asked.account,
            "over": list(_OVER),
        },
    ).fetchall()


def _cancel_working(conn: Connection, asked: Flatten) -> None:
    for run_id, order_id in _working(conn, asked, _lock_runs(conn, asked)):
        conn.execute(
            "SELECT order_cancel(%s, %s, %s, %s)",
            [asked.user_id, run_id, order_id, f"FLATTEN {asked.flatten_id}"],
        )


def _cancelled(conn: Connection, asked: Flatten, runs: Sequence[UUID], now: datetime) -> bool:
    """Whether nothing works any more, or was waited for long enough."""
    return now - asked.asked_at >= CANCEL_WAIT or not _working(conn, asked, runs)


# --- Asking the broker what it would do to the margin -----------------------------------------


def _check(conn: Connection, asked: Flatten, runs: Sequence[UUID], now: datetime) -> None:
    """Ask about every closing order whose account's broker offers it; place them where none."""
    wanted = _closes(conn, asked, runs)
    offering = {
        account
        for (account,) in conn.execute(
            """SELECT account FROM broker_account
               WHERE user_id = %s AND settings @> '{"what_if": true}'""",
            [asked.user_id],
        )
    }
    questions = [close for close in wanted if close.account in offering]
    if not questions:
        _place(conn, asked, wanted)
        return
    for close in questions:
        conn.execute(
            """INSERT INTO broker_command (user_id, account, command_id, priority, kind, payload)
               VALUES (%s, %s, %s, 0, 'WHAT_IF', %s)""",
            [asked.user_id, close.account, _id(asked, close, "what-if"), _terms(asked, close)],
        )
    conn.execute(
        """UPDATE flatten_request SET status = 'CHECKING', checked_at = %s
           WHERE user_id = %s AND flatten_id = %s""",
        [now, asked.user_id, asked.flatten_id],
    )


def _terms(asked: Flatten, close: _Close) -> Jsonb:
    return Jsonb(
        {
            "order_ref": str(_id(asked, close, "close")),
            "symbol": close.symbol,
            "side": close.side,
            "quantity": f"{close.quantity.normalize():f}",
            "order_type": "MARKET",
            "time_in_force": "DAY",
        }
    )


def _judge(conn: Connection, asked: Flatten, runs: Sequence[UUID], now: datetime) -> None:
    """Abort when the broker says that closing violates the margin; else place the orders.

    A broker that does not answer in time is no reason to keep the positions.
    """
    wanted = _closes(conn, asked, runs)
    questions = {_id(asked, close, "what-if"): close for close in wanted if close.account}
    answers = _answers(conn, asked, questions)
    refused = [
        {
            "symbol": questions[command].symbol,
            "account": questions[command].account,
            "message": answer.get("message"),
        }
        for command, answer in answers.items()
        if answer.get("accepted") is False
    ]
    if refused:
        _abort(conn, asked, runs, refused, now)
    elif _answered(conn, asked, questions, answers) or (
        asked.checked_at is not None and now - asked.checked_at >= CHECK_WAIT
    ):
        _place(conn, asked, wanted)


def _answers(
    conn: Connection, asked: Flatten, questions: Mapping[UUID, _Close]
) -> dict[UUID, Mapping[str, Any]]:
    accounts = {close.account for close in questions.values()}
    rows = [
        row
        for account in accounts
        for row in conn.execute(
            """SELECT e.payload ->> 'command_id', e.payload
               FROM (SELECT kind, payload FROM broker_event
                     WHERE user_id = %s AND account = %s ORDER BY number DESC LIMIT %s) e
               WHERE e.kind = 'WHAT_IF'""",
            [asked.user_id, account, EVENTS_SEEN_MAX],
        )
    ]
    return {UUID(command): payload for command, payload in rows if UUID(command) in questions}


def _answered(
    conn: Connection,
    asked: Flatten,
    questions: Mapping[UUID, _Close],
    answers: Mapping[UUID, Mapping[str, Any]],
) -> bool:
    """Whether every question that was asked has its answer, or will have none."""
    row = conn.execute(
        """SELECT count(*) FROM broker_command
           WHERE user_id = %s AND account = ANY(%s) AND command_id = ANY(%s)
             AND coalesce(outcome, '') NOT IN ('REFUSED', 'UNKNOWN') AND command_id <> ALL(%s)""",
        [
            asked.user_id,
            [close.account for close in questions.values()],
            list(questions),
            list(answers),
        ],
    ).fetchone()
    return row is not None and row[0] == 0


def _abort(
    conn: Connection,
    asked: Flatten,
    runs: Sequence[UUID],
    refused: Sequence[Mapping[str, Any]],
    now: datetime,
) -> None:
    exposed = _exposed(conn, asked, runs)
    _close_request(conn, asked, "ABORTED", {"refused": refused, "exposed": exposed}, now)
    _report(conn, asked, runs, "FLATTEN_ABORTED", {"refused": refused, "exposed": exposed})
    _alert(
        conn,
        asked,
        "FLATTEN_ABORTED",
        f"the broker says that closing {len(refused)} positions would violate the margin",
        {"refused": refused, "exposed": exposed},
    )


# --- Closing ----------------------------------------------------------------------------------


def _closes(conn: Connection, asked: Flatten, runs: Sequence[UUID]) -> list[_Close]:
    """What has to be sent so that nothing is left open."""
    wanted = []
    for run_id in runs:
        rows = conn.execute(
            """SELECT r.broker, p.symbol, p.account, p.quantity, p.closing
               FROM strategy_run r
               CROSS JOIN LATERAL flatten_positions(r.user_id, r.run_id, %s) p
               WHERE r.user_id = %s AND r.run_id = %s AND r.status = 'RUNNING'""",
            [asked.account, asked.user_id, run_id],
        ).fetchall()
        for broker, symbol, account, quantity, closing in rows:
            left = abs(quantity) - closing
            if left > 0:
                side = "SELL" if quantity > 0 else "BUY"
                wanted.append(_Close(run_id, broker, symbol, account, side, left))
    return wanted


def _id(asked: Flatten, close: _Close, what: str) -> UUID:
    """The same question, and the same order, however often it is come to."""
    return uuid5(asked.flatten_id, f"{what}/{close.run_id}/{close.account}/{close.symbol}")


def _client_id(asked: Flatten, close: _Close) -> str:
    return f"FLATTEN-{asked.flatten_id}-{close.symbol}-{close.account or close.broker}"[:128]


def _place(conn: Connection, asked: Flatten, wanted: Sequence[_Close]) -> None:
    for close in wanted:
        conn.execute(
            """INSERT INTO orders (user_id, run_id, order_id, client_order_id, symbol, side,
                                   quantity, order_type, time_in_force, account, purpose)
               VALUES (%s, %s, %s, %s, %s, %s, %s, 'MARKET', %s, %s, 'FLATTEN')""",
            [
                asked.user_id,
                close.run_id,
                _id(asked, close, "close"),
                _client_id(asked, close),
                close.symbol,
                close.side,
                close.quantity,
                # Our own book may see the next price days after a day has ended.
                "GTC" if close.broker == "paper" else "DAY",
                close.account,
            ],
        )
    conn.execute(
        """UPDATE flatten_request SET status = 'CLOSING'
           WHERE user_id = %s AND flatten_id = %s""",
        [asked.user_id, asked.flatten_id],
    )


def _finish_if_done(conn: Connection, asked: Flatten, runs: Sequence[UUID], now: datetime) -> None:
    """Report when every safety order is over."""
    with conn.cursor(row_factory=dict_row) as cursor:
        orders = cursor.execute(
            """SELECT run_id, order_id, symbol, account, side, quantity, filled_quantity, status,
                      reject_source, reject_code, status_reason
               FROM orders
               WHERE user_id = %s AND run_id = ANY(%s) AND purpose = 'FLATTEN'
                 AND starts_with(client_order_id, %s) ORDER BY run_id, symbol, account""",
            [asked.user_id, list(runs), f"FLATTEN-{asked.flatten_id}-"],
        ).fetchall()
    if waiting := [order for order in orders if order["status"] not in _OVER]:
        if now - asked.asked_at >= CLOSE_WAIT:
            _tell_stuck(conn, asked, runs, [order for order in waiting if order["account"]])
        return
    for order in orders:
        mark_post_market(conn, asked.user_id, order["run_id"], order["order_id"])
        if order["status"] == "REJECTED":
            facts = {"reject_code": order["reject_code"], "symbol": order["symbol"]}
            record(
                conn,
                asked.user_id,
                order["run_id"],
                "FLATTEN_RECURSION",
                str(order["order_id"]),
                facts,
            )
            tell(
                "FLATTEN_RECURSION",
                level=logging.ERROR,
                order_id=order["order_id"],
                flatten_id=asked.flatten_id,
                **facts,
            )
    _summarise(conn, asked, runs, orders, now)


def _tell_stuck(
    conn: Connection, asked: Flatten, runs: Sequence[UUID], waiting: Sequence[Mapping[str, Any]]
) -> None:
    """Raise a person once, whatever has become of the alert since."""
    told = conn.execute(
        "SELECT FROM alert WHERE user_id = %s AND code = 'FLATTEN_STUCK' AND subject = %s LIMIT 1",
        [asked.user_id, str(asked.flatten_id)],
    ).fetchone()
    if told is not None or not waiting:
        return
    names = ("order_id", "symbol", "account", "status")
    facts = {"orders": [{name: str(order[name]) for name in names} for order in waiting]}
    listed = ", ".join(f"{o['side']} {o['symbol']} {o['order_id']} {o['status']}" for o in waiting)
    words = f"flatten waits for what does not end: {listed}"
    _report(conn, asked, runs, "FLATTEN_STUCK", facts)
    _alert(conn, asked, "FLATTEN_STUCK", words, facts)


def _summarise(
    conn: Connection,
    asked: Flatten,
    runs: Sequence[UUID],
    orders: Sequence[Mapping[str, Any]],
    now: datetime,
) -> None:
    failed = [order for order in orders if order["status"] != "FILLED"]
    exposed = _exposed(conn, asked, runs)
    summary = {
        "orders": len(orders),
        "filled": len(orders) - len(failed),
        "failed": [
            {
                "order_id": str(order["order_id"]),
                "symbol": order["symbol"],
                "account": order["account"],
                "status": order["status"],
                "code": order["reject_code"],
                "reason": order["status_reason"],
            }
            for order in failed
        ],
        "exposed": exposed,
    }
    _close_request(conn, asked, "PARTIAL" if exposed else "DONE", summary, now)
    _report(conn, asked, runs, "FLATTEN_SUMMARY", summary)
    if failed and len(failed) < len(orders):
        _report(conn, asked, runs, "FLATTEN_PARTIAL", summary)
    if exposed:
        code = "FLATTEN_PARTIAL" if len(failed) < len(orders) else "FLATTEN_SUMMARY"
        words = ", ".join(f"{row['quantity']} {row['symbol']}" for row in exposed)
        _alert(conn, asked, code, f"still exposed after flatten: {words}", summary)


def mark_post_market(conn: Connection, user_id: UUID, run_id: UUID, order_id: UUID) -> int:
    """Mark the fills of a safety order that came after its account's close; returns how many.

    A fill that is marked is marked once. Call it also for a safety order that fills late, when
    its flatten has been reported.
    """
    fills = conn.execute(
        """SELECT e.execution_id, e.event_at, e.quantity, e.price, o.symbol, o.account
           FROM orders o
           JOIN execution e ON e.user_id = o.user_id AND e.run_id = o.run_id
                           AND e.order_id = o.order_id
           WHERE o.user_id = %s AND o.run_id = %s AND o.order_id = %s AND o.purpose = 'FLATTEN'
             AND o.broker <> 'paper'
             AND NOT (account_hours(o.user_id, o.account, e.event_at)).is_open
             AND NOT EXISTS (SELECT FROM alert a
                             WHERE a.user_id = o.user_id AND a.code = 'FLATTEN_POST_MARKET'
                               AND a.subject = e.order_id || '/' || e.execution_id)""",
        [user_id, run_id, order_id],
    ).fetchall()
    for execution_id, event_at, quantity, price, symbol, account in fills:
        subject = f"{order_id}/{execution_id}"
        facts = {
            "symbol": symbol,
            "account": account,
            "quantity": f"{quantity:f}",
            "price": f"{price:f}",
            "event_at": event_at.isoformat(),
        }
        record(conn, user_id, run_id, "FLATTEN_POST_MARKET", subject, facts)
        raise_alert(
            conn,
            user_id,
            "FLATTEN_POST_MARKET",
            subject,
            f"{quantity:f} {symbol} were closed after the close",
            account=account,
            run_id=run_id,
            payload=facts,
        )
        tell("FLATTEN_POST_MARKET", level=logging.WARNING, order_id=order_id, **facts)
    return len(fills)


# --- Telling ----------------------------------------------------------------------------------


def _exposed(conn: Connection, asked: Flatten, runs: Sequence[UUID]) -> list[dict[str, Any]]:
    """What is still held in the scope."""
    return [
        {"run_id": str(run_id), "symbol": symbol, "account": account, "quantity": f"{quantity:f}"}
        for run_id in runs
        for symbol, account, quantity in conn.execute(
            "SELECT symbol, account, quantity FROM flatten_positions(%s, %s, %s)",
            [asked.user_id, run_id, asked.account],
        )
    ]


def _close_request(
    conn: Connection, asked: Flatten, status: str, summary: Mapping[str, Any], now: datetime
) -> None:
    conn.execute(
        """UPDATE flatten_request SET status = %s, finished_at = %s, summary = %s
           WHERE user_id = %s AND flatten_id = %s""",
        [status, now, Jsonb(dict(summary)), asked.user_id, asked.flatten_id],
    )


def _refuse_recursion(
    conn: Connection, asked: Flatten, subject: str, facts: Mapping[str, Any]
) -> None:
    for run_id in _lock_runs(conn, asked):
        record(conn, asked.user_id, run_id, "FLATTEN_RECURSION", subject, facts)
    tell("FLATTEN_RECURSION", level=logging.WARNING, flatten_id=asked.flatten_id, **facts)


def _report(
    conn: Connection, asked: Flatten, runs: Sequence[UUID], code: str, facts: Mapping[str, Any]
) -> None:
    for run_id in runs:
        record(conn, asked.user_id, run_id, code, str(asked.flatten_id), facts)
    tell(code, level=logging.WARNING, flatten_id=asked.flatten_id, **facts)


def _alert(
    conn: Connection, asked: Flatten, code: str, message: str, payload: Mapping[str, Any]
) -> None:
    raise_alert(
        conn,
        asked.user_id,
        code,
        str(asked.flatten_id),
        message[:2000],
        account=asked.account,
        run_id=asked.run_id,
        payload=payload,
    )
