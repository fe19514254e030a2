"""Stopping a run: the strategy is told, then the database ends it and its open orders."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from engine import ledger
from engine.books import read_books
from engine.db.connect import Connection
from engine.errors import translated
from engine.market.view import look
from engine.outbox import wake
from engine.reference import Reference
from engine.runs import PAPER, Run, lock_run, set_status
from engine.work import Desk, Work, strategy_of


def stop_run(conn: Connection, user_id: UUID, run_id: UUID) -> Run:
    """Stop a run: STOPPED, its pending orders CANCELED, the events written, in one step.

    Where a broker works orders of it, they are asked back and the run is STOPPING until the last
    is settled; ``settle_stopping`` ends it then. Waits for a tick that is under way. The
    strategy's ``on_stop`` is called first; what it raises is noted in the ledger and stops
    nothing. Raises RunNotRunning when the run is STOPPED already, IllegalRunMove when it ended in
    ERROR, and BadInput for an unknown run.
    """
    with translated(), conn.transaction():
        run = lock_run(conn, user_id, run_id)
        if run.status == "RUNNING":
            _tell_strategy(conn, run)
        if run.broker != PAPER and run.status == "RUNNING":
            set_status(conn, user_id, run_id, "STOPPING")
            wake(conn)
        if has_open_orders(conn, user_id, run_id):
            return lock_run(conn, user_id, run_id)
        return set_status(conn, user_id, run_id, "STOPPED")


def has_open_orders(conn: Connection, user_id: UUID, run_id: UUID) -> bool:
    """Whether orders of the run are at a broker and not over."""
    row = conn.execute(
        """SELECT FROM orders WHERE user_id = %s AND run_id = %s AND broker <> 'paper'
           AND status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
           ORDER BY symbol LIMIT 1""",
        [user_id, run_id],
    ).fetchone()
    return row is not None


def settle_stopping(conn: Connection, user_id: UUID) -> list[UUID]:
    """End the user's STOPPING runs whose orders are all settled: STOPPED, or ERROR if it failed.

    Returns the runs that it ended.
    """
    ended = []
    for (run_id,) in conn.execute(
        "SELECT run_id FROM strategy_run WHERE user_id = %s AND status = 'STOPPING'", [user_id]
    ).fetchall():
        with translated(), conn.transaction():
            run = lock_run(conn, user_id, run_id)
            if run.status != "STOPPING" or has_open_orders(conn, user_id, run_id):
                continue
            failed = conn.execute(
                """SELECT FROM event_ledger
                   WHERE user_id = %s AND run_id = %s AND event_type = 'RUN_FAILED' LIMIT 1""",
                [user_id, run_id],
            ).fetchone()
            set_status(conn, user_id, run_id, "STOPPED" if failed is None else "ERROR")
            ended.append(run_id)
    return ended


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
