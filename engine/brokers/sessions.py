"""Before a connector starts: whose account it is, and that its calendar is stored.

A connector may read the sessions of an exchange and not write them, so whoever starts it does.
"""

from __future__ import annotations

from datetime import date
from uuid import UUID

from engine.db.connect import Connection
from engine.errors import BadInput
from engine.market.calendar import ensure_sessions
from engine.reads import find_user

__all__ = ["prepare"]


def prepare(conn: Connection, user: str, account: str, today: date) -> UUID:
    """Store the sessions of the account's exchange for this year; returns the user's id.

    Raises BadInput where there is no such user, or none of the user's accounts has that name.
    """
    user_id = find_user(conn, user).user_id
    row = conn.execute(
        "SELECT calendar, opens_at FROM broker_account WHERE user_id = %s AND account = %s",
        [user_id, account],
    ).fetchone()
    if row is None:
        raise BadInput(f"{user} has no account {account!r}")
    calendar, opens_at = row
    if opens_at is None:
        ensure_sessions(conn, calendar, today, today)
    return user_id
