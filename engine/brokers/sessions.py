"""Before a connector starts: its account's calendar is stored.

A connector may read the sessions of an exchange and not write them, so whoever starts it does.
"""

from __future__ import annotations

from datetime import date
from uuid import UUID

from engine.db.connect import Connection
from engine.errors import BadInput
from engine.market.calendar import ensure_sessions

__all__ = ["prepare"]


def prepare(conn: Connection, user_id: UUID, account: str, today: date) -> None:
    """Store the sessions of the account's exchange for this year.

    Raises BadInput where none of the user's accounts has that name.
    """
    row = conn.execute(
        "SELECT calendar, opens_at FROM broker_account WHERE user_id = %s AND account = %s",
        [user_id, account],
    ).fetchone()
    if row is None:
        raise BadInput(f"the user has no account {account!r}; add it first")
    calendar, opens_at = row
    if opens_at is None:
        ensure_sessions(conn, calendar, today, today)
