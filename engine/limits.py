"""Risk limits as rows: adding, listing and removing them is the right of the tables' owner.

The engine that trades can't loosen its own limits; what they decide is in the database.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from uuid import UUID

from psycopg.rows import class_row

from engine.db.connect import Connection
from engine.errors import BadInput, translated


@dataclass(frozen=True, slots=True)
class Limit:
    """A row of ``risk_limit``; ``unit`` is what ``limit_value`` counts."""

    user_id: UUID
    limit_id: UUID
    run_id: UUID | None
    account: str | None
    kind: str
    symbol: str | None
    limit_value: Decimal | None
    unit: str
    seconds: Decimal | None
    valid_from: date | None
    valid_to: date | None
    code: str


@dataclass(frozen=True, slots=True)
class NewLimit:
    """What a limit is to be; without a run, an account or a symbol it holds for all of them."""

    kind: str
    limit_value: Decimal | None = None
    run_id: UUID | None = None
    account: str | None = None
    symbol: str | None = None
    seconds: Decimal | None = None
    valid_from: date | None = None
    valid_to: date | None = None


_SELECT = """SELECT l.user_id, l.limit_id, l.run_id, l.account, l.kind, l.symbol, l.limit_value,
                    k.unit, l.seconds, l.valid_from, l.valid_to, k.code
             FROM risk_limit l JOIN limit_kind k ON k.kind = l.kind"""


def add_limit(conn: Connection, user_id: UUID, new: NewLimit) -> Limit:
    """Add a limit, which holds from the next order on.

    Raises InvalidValue for an unknown kind or values that don't fit it, and UnknownReference for
    a run or account that isn't the user's.
    """
    with translated():
        row = conn.execute(
            """INSERT INTO risk_limit (user_id, kind, limit_value, run_id, account, symbol, seconds,
                                       valid_from, valid_to)
               VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s) RETURNING limit_id""",
            [
                user_id,
                new.kind.upper(),
                new.limit_value,
                new.run_id,
                new.account,
                new.symbol,
                new.seconds,
                new.valid_from,
                new.valid_to,
            ],
        ).fetchone()
    assert row is not None
    return next(limit for limit in list_limits(conn, user_id) if limit.limit_id == row[0])


def list_limits(conn: Connection, user_id: UUID | None = None) -> list[Limit]:
    """The limits of a user, or of everybody, in the order in which a refusal names them."""
    with conn.cursor(row_factory=class_row(Limit)) as cursor:
        return cursor.execute(
            f"""{_SELECT} WHERE l.user_id = %(user)s OR %(user)s::uuid IS NULL
                ORDER BY l.user_id, k.place, l.limit_value, l.limit_id""".encode(),
            {"user": user_id},
        ).fetchall()


def remove_limit(conn: Connection, named: str) -> Limit:
    """Remove the limit with this id, or these first digits of it; from the next order on.

    Raises BadInput where there is none, or more than one.
    """
    found = [limit for limit in list_limits(conn) if str(limit.limit_id).startswith(named.lower())]
    if len(found) != 1 or not named:
        how_many = "no limit" if not found else f"{len(found)} limits"
        raise BadInput(f"there is {how_many} {named!r}; `oms limit list` shows them")
    with translated():
        conn.execute(
            "DELETE FROM risk_limit WHERE user_id = %s AND limit_id = %s",
            [found[0].user_id, found[0].limit_id],
        )
    return found[0]
