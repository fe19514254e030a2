"""Profit and loss, as the database reckons it (sql/84_pnl.sql): by position, by lot, by day."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from uuid import UUID

from psycopg.rows import class_row

from engine.db.connect import Connection, snapshot
from engine.runs import Run

__all__ = ["DayPnl", "Lot", "Pnl", "PositionPnl", "pnl"]


@dataclass(frozen=True, slots=True)
class PositionPnl:
    """Profit in one symbol, in ``currency``: realised and unrealised before commission.

    ``total_pnl`` is after it. Without a mark, what is unrealised is not known.
    """

    run_id: UUID
    symbol: str
    pnl_method: str
    currency: str
    quantity: Decimal
    cost_basis: Decimal
    avg_cost: Decimal | None
    mark_price: Decimal | None
    marked_at: datetime | None
    realized_pnl: Decimal
    unrealized_pnl: Decimal | None
    commission: Decimal
    total_pnl: Decimal | None


@dataclass(frozen=True, slots=True)
class DayPnl:
    """What a session brought, by the broker's time; ``equity`` is that of its last mark."""

    session_date: date
    currency: str
    realized_pnl: Decimal
    commission: Decimal
    equity: Decimal | None
    total_pnl: Decimal | None


@dataclass(frozen=True, slots=True)
class Lot:
    """What is still open of an execution, first in first out; negative when short."""

    symbol: str
    opened_by: str
    opened_at: datetime
    quantity: Decimal
    cost: Decimal


@dataclass(frozen=True, slots=True)
class Pnl:
    """The profit of a run; ``days`` oldest first, ``lots`` where its method is FIFO."""

    positions: list[PositionPnl]
    days: list[DayPnl]
    lots: list[Lot]


def pnl(conn: Connection, run: Run) -> Pnl:
    """The profit of a run, all of it as of one moment."""
    key = [run.user_id, run.run_id]
    with snapshot(conn):
        with conn.cursor(row_factory=class_row(PositionPnl)) as cursor:
            positions = cursor.execute(
                """SELECT run_id, symbol, pnl_method, currency, quantity, cost_basis, avg_cost,
                          mark_price, marked_at, realized_pnl, unrealized_pnl, commission,
                          total_pnl
                   FROM position_pnl WHERE user_id = %s AND run_id = %s ORDER BY symbol""",
                key,
            ).fetchall()
        with conn.cursor(row_factory=class_row(DayPnl)) as cursor:
            days = cursor.execute(
                """SELECT session_date, currency, realized_pnl, commission, equity, total_pnl
                   FROM pnl_daily WHERE user_id = %s AND run_id = %s ORDER BY session_date""",
                key,
            ).fetchall()
        with conn.cursor(row_factory=class_row(Lot)) as cursor:
            lots = cursor.execute(
                """SELECT p.symbol, l.opened_by, l.opened_at, l.quantity, l.cost
                   FROM position_pnl p
                   CROSS JOIN LATERAL position_lots(p.user_id, p.run_id, p.symbol) l
                   WHERE p.user_id = %s AND p.run_id = %s AND p.pnl_method = 'FIFO'
                   ORDER BY p.symbol, l.opened_at, l.opened_by""",
                key,
            ).fetchall()
    return Pnl(positions, days, lots)
