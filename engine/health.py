"""Whether it is well, and how it stands: what `oms health` and `oms status` say.

Being up is not being well: a process that answers while its positions are wrong is worse than one
that is down. So positions are compared with the ledger and with what brokers said last, each time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from uuid import UUID

from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from engine.db.connect import Connection
from engine.log import tell

__all__ = ["AccountStatus", "Check", "Health", "Latency", "Status", "health", "status"]

HEALTH_POSITIONS = "HEALTH_POSITIONS"
HEARTBEAT_LOST = "HEARTBEAT_LOST"
INBOX_BACKLOG = "INBOX_BACKLOG"
INBOX_SECONDS_MAX = 60
LATENCY_WINDOW = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at; ``code`` names what is wrong, ``None``: nothing is."""

    check: str
    subject: str
    code: str | None
    detail: str

    @property
    def healthy(self) -> bool:
        return self.code is None


@dataclass(frozen=True, slots=True)
class Health:
    """What was looked at, and whether all of it was well."""

    healthy: bool
    checks: Sequence[Check]


@dataclass(frozen=True, slots=True)
class AccountStatus:
    """An account at a moment; counts are of commands unless they say otherwise."""

    account: str
    broker: str
    is_open: bool
    opens_at: datetime | None
    connected: bool
    holder_name: str | None
    last_heard_at: datetime | None
    heartbeat_is_late: bool
    clock_skew_seconds: Decimal | None
    queued: int
    queued_for_session: int
    in_flight: int
    oldest_queued_at: datetime | None
    orders_per_second: int
    sent_last_second: int
    throttled: int
    inbox_waiting: int
    open_orders: int


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds that a step of orders took: CLAIM, SEND; from there on RESPONSE and FILL."""

    account: str
    step: str
    orders: int
    p50: Decimal
    p95: Decimal
    p99: Decimal


@dataclass(frozen=True, slots=True)
class Halt:
    """What stands still, and why."""

    name: str
    scope: str
    trading_state: str
    reason: str


@dataclass(frozen=True, slots=True)
class Status:
    """A user's accounts, how long their orders took, what is halted, and open alerts by code."""

    accounts: Sequence[AccountStatus]
    latencies: Sequence[Latency]
    halts: Sequence[Halt]
    alerts: dict[str, int]


def status(conn: Connection, user_id: UUID, now: datetime) -> Status:
    """How a user's accounts stand at ``now``; latencies of the last LATENCY_WINDOW."""
    with conn.cursor(row_factory=class_row(AccountStatus)) as cursor:
        accounts = cursor.execute("SELECT * FROM account_status(%s, %s)", [user_id, now]).fetchall()
    with conn.cursor(row_factory=class_row(Latency)) as cursor:
        latencies = cursor.execute(
            "SELECT * FROM latency_since(%s, %s)", [user_id, now - LATENCY_WINDOW]
        ).fetchall()
    with conn.cursor(row_factory=class_row(Halt)) as cursor:
        halts = cursor.execute(
            """SELECT name, scope, trading_state, reason FROM trading_halt
               WHERE user_id = %s AND lifted_at IS NULL ORDER BY placed_at, name""",
            [user_id],
        ).fetchall()
    alerts = conn.execute(
        """SELECT code, count(*) FROM alert WHERE user_id = %s AND acknowledged_at IS NULL
           GROUP BY code ORDER BY code""",
        [user_id],
    ).fetchall()
    return Status(accounts, latencies, halts, dict(alerts))


def health(conn: Connection, user_id: UUID, now: datetime) -> Health:
    """Look at everything that must be well for a user to trade.

    What is wrong with positions is told to the log and raised as an alert, once until somebody
    acknowledges it.
    """
    checks = [*_positions(conn, user_id), *_connections(conn, user_id, now)]
    for check in checks:
        if check.code == HEALTH_POSITIONS:
            _raise(conn, user_id, check)
    return Health(all(check.healthy for check in checks), checks)


def _positions(conn: Connection, user_id: UUID) -> list[Check]:
    rows = conn.execute(
        "SELECT run_id, account, symbol, ours, brokers, ledger FROM health_positions(%s)",
        [user_id],
    ).fetchall()
    wrong = [
        Check(
            "positions",
            f"{account or run_id}/{symbol}",
            HEALTH_POSITIONS,
            f"{symbol}: ours {_number(ours)}, the broker's {_number(brokers)}, "
            f"the ledger's {_number(ledger)}",
        )
        for run_id, account, symbol, ours, brokers, ledger in rows
    ]
    return wrong or [Check("positions", "all", None, "ours are the ledger's and the brokers'")]


def _number(value: Decimal | None) -> str:
    return "not known" if value is None else f"{value.normalize():f}"


def _connections(conn: Connection, user_id: UUID, now: datetime) -> list[Check]:
    """Accounts that a live run trades at: connected, heard from, and their inbox applied."""
    rows = conn.execute(
        """SELECT s.account, s.connected, s.heartbeat_is_late, s.is_open, s.last_heard_at,
                  (SELECT min(e.received_at) FROM broker_event e
                   WHERE e.user_id = %(user)s AND e.account = s.account AND e.applied_at IS NULL)
           FROM account_status(%(user)s, %(now)s) s
           WHERE EXISTS (SELECT FROM run_route t
                         JOIN strategy_run r ON r.user_id = %(user)s AND r.run_id = t.run_id
                         WHERE t.user_id = %(user)s AND t.account = s.account
                           AND r.status IN ('RUNNING', 'STOPPING'))""",
        {"user": user_id, "now": now},
    ).fetchall()
    checks = []
    for account, connected, is_late, is_open, heard_at, waiting_since in rows:
        lost = is_open and (is_late or not connected)
        heard = "never heard" if heard_at is None else f"last heard at {heard_at.isoformat()}"
        checks.append(Check("heartbeat", account, HEARTBEAT_LOST if lost else None, heard))
        late = waiting_since is not None and now - waiting_since > timedelta(
            seconds=INBOX_SECONDS_MAX
        )
        waits = "nothing waits" if waiting_since is None else f"waits since {waiting_since}"
        checks.append(Check("inbox", account, INBOX_BACKLOG if late else None, waits))
    return checks


def _raise(conn: Connection, user_id: UUID, check: Check) -> None:
    tell(
        HEALTH_POSITIONS,
        level=logging.ERROR,
        user_id=user_id,
        subject=check.subject,
        detail=check.detail,
    )
    account, _, symbol = check.subject.rpartition("/")
    conn.execute(
        """INSERT INTO alert (user_id, code, subject, message, payload)
           VALUES (%s, %s, %s, %s, %s)
           ON CONFLICT (user_id, code, subject) WHERE acknowledged_at IS NULL DO NOTHING""",
        [
            user_id,
            HEALTH_POSITIONS,
            check.subject,
            check.detail,
            Jsonb({"of": account, "symbol": symbol}),
        ],
    )
