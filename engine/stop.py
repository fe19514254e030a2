"""Stopping a run: the strategy is told, then the database ends it and its pending orders."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from engine import ledger
from engine.books import read_books
from engine.db.connect import Connection
from engine.errors import translated
from engine.market.view import look
from engine.reference import Reference
from engine.runs import Run, lock_run, set_status
from engine.work import Desk, Work, strategy_of


def stop_run(conn: Connection, user_id: UUID, run_id: UUID) -> Run:
    """Stop a run: STOPPED, its pending paper orders CANCELED, the events written, in one step.

    Waits for a tick that is under way. The strategy's ``on_stop`` is called first; what it raises
    is noted in the ledger and stops nothing. Raises RunNotRunning when the run is STOPPED already,
    IllegalRunMove when it ended in ERROR, and BadInput for an unknown run.
    """
    with translated(), conn.transaction():
        run = lock_run(conn, user_id, run_id)
        if run.status == "RUNNING":
            _tell_strategy(conn, run)
        return set_status(conn, user_id, run_id, "STOPPED")


def _tell_strategy(conn: Connection, run: Run) -> None:
    at = _stands_at(conn, run)
    reference = Reference(conn, run.calendar)
    try:
        with conn.transaction():
            books, view = read_books(conn, run), look(reference, at, {})
            work = Work(Desk(conn, run, books, reference), strategy_of(run), view)
            work.strategy.on_stop(work.context())
    except Exception as error:  # a user's code; stopping must not depend on it
        event = ledger.Event("STRATEGY_FAILED_TO_STOP", "", {"error": repr(error)})
        ledger.append(conn, run.user_id, run.run_id, at, [event])


def _stands_at(conn: Connection, run: Run) -> datetime:
    """The logical time of the run's newest event; now for a run without any."""
    row = conn.execute("SELECT run_last_time(%s, %s)", [run.user_id, run.run_id]).fetchone()
    assert row is not None
    at: datetime = row[0]
    return at
