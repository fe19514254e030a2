"""At what circuit breakers trip: looking and setting. To set one is the right of the tables' owner.

What trips, and what then happens, is in ``engine.safety``.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple
from uuid import UUID

from psycopg.rows import class_row

from engine.db.connect import Connection
from engine.errors import BadInput, translated


@dataclass(frozen=True, slots=True)
class Breaker:
    """At what a kind of breaker trips; without a user it is the default, without a threshold off.

    Without an account it holds for every account of the user that has none of its own.
    """

    kind: str
    user_id: UUID | None
    account: str | None
    threshold: Decimal | None
    unit: str
    seconds: int | None
    why: str


class Setting(NamedTuple):
    """What a breaker is to trip at; no threshold: never. ``seconds`` is the window it looks at."""

    threshold: Decimal | None = None
    seconds: int | None = None


def list_breakers(conn: Connection, user_id: UUID | None = None) -> list[Breaker]:
    """All defaults, each followed by what a user, or everybody, has set instead."""
    with conn.cursor(row_factory=class_row(Breaker)) as cursor:
        return cursor.execute(
            """SELECT k.kind, NULL::uuid AS user_id, NULL AS account, k.threshold, k.unit,
                      k.seconds, k.why
               FROM breaker_kind k
               UNION ALL
               SELECT k.kind, b.user_id, b.account, b.threshold, k.unit,
                      coalesce(b.seconds, k.seconds), k.why
               FROM breaker_kind k JOIN circuit_breaker b ON b.kind = k.kind
               WHERE b.user_id = %(user)s OR %(user)s::uuid IS NULL
               ORDER BY kind, user_id NULLS FIRST, account NULLS FIRST""",
            {"user": user_id},
        ).fetchall()


def set_breaker(
    conn: Connection, user_id: UUID, kind: str, account: str | None, setting: Setting | None
) -> Breaker:
    """Set at what a user's breaker trips, of one account or of all; ``None``: as by default.

    Returns what holds now. Raises InvalidValue for an unknown kind (BadInput where it is to be set
    back) or a value out of range, and UnknownReference for an account that isn't the user's.
    """
    kind = kind.upper()
    with translated(), conn.transaction():
        conn.execute(
            """DELETE FROM circuit_breaker
               WHERE user_id = %s AND kind = %s AND account IS NOT DISTINCT FROM %s""",
            [user_id, kind, account],
        )
        if setting is not None:
            conn.execute(
                """INSERT INTO circuit_breaker (user_id, kind, account, threshold, seconds)
                   VALUES (%s, %s, %s, %s, %s)""",
                [user_id, kind, account, *setting],
            )
        holds = [
            each
            for each in list_breakers(conn, user_id)
            if each.kind == kind and each.account in (None, account)
        ]
    if not holds:
        raise BadInput(f"there is no breaker {kind!r}; `oms breaker list` shows them")
    return holds[-1]
