"""Accounts at brokers: made, changed, listed. How fast and when they trade stands in their row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime, time
from decimal import Decimal
from typing import Any
from uuid import UUID

from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from engine.brokers.protocol import KINDS
from engine.db.connect import Connection
from engine.errors import BadInput, translated
from engine.market.calendar import require_calendar
from engine.runs import PAPER


@dataclass(frozen=True, slots=True)
class AccountTerms:
    """How an account is traded; ``opening_cash`` is in ``currency``.

    ``opens_at`` and ``closes_at`` (of ``time_zone``) win over ``calendar``'s sessions.
    ``out_of_session`` is QUEUE or REFUSE. ``heartbeat_seconds`` is how long the broker may be
    silent before nothing new is sent, ``stale_seconds`` how long about a working order before it
    is asked. ``settings`` is what the broker's adapter needs.
    """

    broker: str
    currency: str = "USD"
    opening_cash: Decimal = Decimal(0)
    calendar: str = "XNYS"
    time_zone: str = "UTC"
    opens_at: time | None = None
    closes_at: time | None = None
    out_of_session: str = "QUEUE"
    orders_per_second: int = 10
    messages_per_second: int = 45
    heartbeat_seconds: int = 60
    stale_seconds: int = 300
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Account:
    """A row of ``broker_account``, with who is connected to it."""

    user_id: UUID
    user_name: str | None
    account: str
    broker: str
    currency: str
    opening_cash: Decimal
    calendar: str
    time_zone: str
    opens_at: time | None
    closes_at: time | None
    out_of_session: str
    orders_per_second: int
    messages_per_second: int
    heartbeat_seconds: int
    stale_seconds: int
    settings: Mapping[str, Any]
    connected: bool
    holder_name: str | None
    expires_at: datetime | None


def add_account(conn: Connection, user_id: UUID, account: str, terms: AccountTerms) -> None:
    """Make an account. Raises BadInput, UnknownReference, InvalidValue and AlreadyHappened."""
    if terms.broker == PAPER:
        raise BadInput("the paper book needs no account; start the run without --account")
    if terms.broker not in KINDS:
        known = ", ".join(sorted(KINDS))
        raise BadInput(f"there is no kind of broker {terms.broker!r}; there are: {known}")
    require_calendar(terms.calendar)
    given = {each.name: getattr(terms, each.name) for each in fields(terms)}
    given["settings"] = Jsonb(dict(terms.settings))
    with translated():
        # Raises BadInput for a zone that the server doesn't know.
        conn.execute("SELECT now() AT TIME ZONE %s", [terms.time_zone])
        conn.execute(
            f"""INSERT INTO broker_account (user_id, account, {", ".join(given)})
                VALUES (%s, %s, {", ".join(["%s"] * len(given))})""",
            [user_id, account, *given.values()],
        )


def list_accounts(conn: Connection, *, user: str | None = None) -> list[Account]:
    """Accounts by user and name; ``user`` is a user's name."""
    with conn.cursor(row_factory=class_row(Account)) as cursor:
        return cursor.execute(
            """SELECT a.user_id, u.name AS user_name, a.account, a.broker, a.currency,
                      a.opening_cash, a.calendar, a.time_zone, a.opens_at, a.closes_at,
                      a.out_of_session, a.orders_per_second, a.messages_per_second,
                      a.heartbeat_seconds, a.stale_seconds, a.settings,
                      coalesce(l.connected AND l.expires_at > now(), false) AS connected,
                      l.holder_name, l.expires_at
               FROM broker_account a
               JOIN app_user u ON u.user_id = a.user_id
               LEFT JOIN broker_lease l ON l.user_id = a.user_id AND l.account = a.account
               WHERE coalesce(u.name = %(user)s, %(user)s::text IS NULL)
               ORDER BY u.name, a.account""",
            {"user": user},
        ).fetchall()


def require_account(conn: Connection, user_id: UUID, account: str | None) -> None:
    """Raise BadInput where an account is named that the user doesn't have."""
    if account is None:
        return
    found = conn.execute(
        "SELECT FROM broker_account WHERE user_id = %s AND account = %s", [user_id, account]
    ).fetchone()
    if found is None:
        raise BadInput(f"the user has no account {account!r}; `oms account list` shows them")
