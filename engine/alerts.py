"""Alerts: what a person must know of, until somebody says that he does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from psycopg.rows import class_row

from engine.db.connect import Connection
from engine.errors import BadInput, translated


@dataclass(frozen=True, slots=True)
class Alert:
    """A row of ``alert``."""

    user_id: UUID
    alert_id: UUID
    code: str
    subject: str
    account: str | None
    run_id: UUID | None
    message: str
    payload: Mapping[str, Any]
    raised_at: datetime
    acknowledged_at: datetime | None
    acknowledged_by: str | None


_COLUMNS = """user_id, alert_id, code, subject, account, run_id, message, payload, raised_at,
    acknowledged_at, acknowledged_by"""


def list_alerts(
    conn: Connection, user_id: UUID | None = None, *, acknowledged: bool = False, limit: int = 50
) -> list[Alert]:
    """Alerts that nobody has acknowledged, or all, newest first."""
    with conn.cursor(row_factory=class_row(Alert)) as cursor:
        return cursor.execute(
            f"""SELECT {_COLUMNS} FROM alert
                WHERE (user_id = %s OR %s::uuid IS NULL) AND (acknowledged_at IS NULL OR %s)
                ORDER BY raised_at DESC, alert_id LIMIT %s""".encode(),
            [user_id, user_id, acknowledged, limit],
        ).fetchall()


def acknowledge(conn: Connection, named: str, by: str, now: datetime) -> list[Alert]:
    """Acknowledge the open alerts of a code, or the one with this id or first digits of it.

    The next finding of the same is raised anew. Raises BadInput where nothing open is meant, or
    the digits mean more than one.
    """
    with translated(), conn.transaction(), conn.cursor(row_factory=class_row(Alert)) as cursor:
        meant = cursor.execute(
            f"""SELECT {_COLUMNS} FROM alert WHERE acknowledged_at IS NULL
                  AND (code = upper(%(named)s)
                       OR length(%(named)s) >= 4 AND starts_with(alert_id::text, lower(%(named)s)))
                ORDER BY raised_at FOR UPDATE""".encode(),
            {"named": named},
        ).fetchall()
        if not meant:
            raise BadInput(f"there is no open alert {named!r}; `oms alert list` shows them")
        if len(meant) > 1 and any(alert.code != named.upper() for alert in meant):
            raise BadInput(f"{named!r} means {len(meant)} alerts; give more digits")
        for alert in meant:
            cursor.execute(
                """UPDATE alert SET acknowledged_at = %s, acknowledged_by = %s
                   WHERE user_id = %s AND alert_id = %s""",
                [now, by, alert.user_id, alert.alert_id],
            )
        return meant
