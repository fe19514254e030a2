"""Investment plans: added, paused and resumed. What is due of them, the database says."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from uuid import UUID

from engine.db.connect import Connection
from engine.errors import BadInput, translated


@dataclass(frozen=True, slots=True)
class Plan:
    """A row of ``sip_plan``: ``amount`` in the run's currency, once a month from ``start_on`` on.

    ``missed_policy`` is RUN_EACH, RUN_ONCE or SKIP: what becomes of occasions that were missed.
    """

    plan: str
    symbol: str
    amount: Decimal
    day_of_month: int
    start_on: date
    end_on: date | None = None
    missed_policy: str = "RUN_EACH"


def add_plan(conn: Connection, user_id: UUID, run_id: UUID, plan: Plan) -> None:
    """Add a plan to a run that hasn't ended.

    Raises AlreadyHappened when the run has a plan of that name, UnknownReference for an unknown
    symbol or run, InvalidValue for an amount, day or word out of range, RunNotRunning when the
    run has ended.
    """
    with translated():
        conn.execute(
            """INSERT INTO sip_plan (user_id, run_id, plan, symbol, amount, day_of_month,
                                     start_on, end_on, missed_policy)
               VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)""",
            [
                user_id,
                run_id,
                plan.plan,
                plan.symbol.upper(),
                plan.amount,
                plan.day_of_month,
                plan.start_on,
                plan.end_on,
                plan.missed_policy,
            ],
        )


def pause_plan(conn: Connection, user_id: UUID, run_id: UUID, plan: str) -> None:
    """Pause a plan: nothing of it is due until it is resumed. Raises BadInput if unknown."""
    _update(conn, user_id, run_id, plan, "status = 'PAUSED'", [])


def resume_plan(conn: Connection, user_id: UUID, run_id: UUID, plan: str, on: date) -> None:
    """Resume a plan from ``on``; what was planned during the pause stays undone."""
    _update(
        conn, user_id, run_id, plan, "status = 'ACTIVE', start_on = greatest(start_on, %s)", [on]
    )


def _update(
    conn: Connection, user_id: UUID, run_id: UUID, plan: str, change: str, values: list[date]
) -> None:
    with translated():
        done = conn.execute(
            f"UPDATE sip_plan SET {change} WHERE user_id = %s AND run_id = %s AND plan = %s",
            [*values, user_id, run_id, plan],
        )
    if done.rowcount == 0:
        raise BadInput(f"run {run_id} has no plan {plan!r}; `oms sip list` shows its plans")
