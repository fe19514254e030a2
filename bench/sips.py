"""A SIP day: every user's plan is due at one close, and two schedulers execute them, once each."""

from __future__ import annotations

import subprocess
import time
from contextlib import ExitStack
from datetime import datetime, timedelta
from decimal import Decimal

from psycopg.types.json import Jsonb

from bench.ground import Ground
from bench.harness import Row, child, result_of
from bench.market import CALENDAR, SYMBOL, feed, sessions_of
from bench.sizes import Sizes
from engine.db.connect import Connection, open_connection
from engine.errors import ConfigurationError
from engine.market.model import Session
from engine.market.store import import_bars
from engine.paper.costs import PaperSettings

__all__ = ["measure", "set_up"]

MUST = 2_000.0
WORKERS = 2
AMOUNT = Decimal(500)
INITIAL_CASH = Decimal(10_000)
# The session of the day, far enough from the first that the schedule has a past to look at.
_SESSION = 25


def measure(on: Ground, sizes: Sizes) -> list[Row]:
    """The row of the SIP day. Raises ConfigurationError unless each plan was executed once."""
    dsn = on.database("sip_day")
    with open_connection(dsn) as owner:
        now = set_up(owner, sizes.sip_runs)
        seconds = _drive(dsn, now)
        _require_once(owner, sizes.sip_runs)
    return [
        Row(
            "SIP day",
            sizes.sip_runs / seconds,
            "executions/s",
            MUST,
            note=f"{sizes.sip_runs:,} runs' plans at one close, {WORKERS} workers, each once",
        )
    ]


def set_up(owner: Connection, runs: int) -> datetime:
    """Make so many users with a run and a plan that is due; returns the moment of the workers.

    Written by few statements as the owner, who alone may say that a run was made in the past.
    """
    before, day = sessions_of(owner)[_SESSION - 1 : _SESSION + 1]
    _import_close(owner, day)
    values = {
        "runs": runs,
        "paper": Jsonb(PaperSettings().model_dump(mode="json")),
        "cash": INITIAL_CASH,
        "calendar": CALENDAR,
        "made": before.close_at + timedelta(minutes=1),
        "symbol": SYMBOL,
        "amount": AMOUNT,
        "day": day.day,
    }
    with owner.transaction():
        for statement in _STATEMENTS:
            owner.execute(statement, values if "%(" in statement else None)
    # Not the tables that are still empty: a plan for an empty table reads all of it.
    owner.execute("ANALYZE app_user, strategy_run, engine_status, sip_plan")
    return day.close_at + timedelta(minutes=1)


def _import_close(owner: Connection, day: Session) -> None:
    minutes = (_SESSION + 1) * 390
    bars = [bar for at, (bar,) in feed(sessions_of(owner), minutes) if at <= day.close_at]
    import_bars(owner, bars[-1:])


_STATEMENTS = (
    """INSERT INTO app_user (user_id, name)
       SELECT gen_random_uuid(), 'sip-' || n FROM generate_series(1, %(runs)s) AS n""",
    """INSERT INTO strategy_run (user_id, name, strategy, paper, initial_cash, calendar)
       SELECT user_id, name, 'sip', %(paper)s, %(cash)s, %(calendar)s FROM app_user""",
    # Before the first event, so that it is still the owner's to say.
    "UPDATE strategy_run SET created_at = %(made)s",
    "UPDATE strategy_run SET status = 'RUNNING'",
    "INSERT INTO engine_status (user_id, run_id) SELECT user_id, run_id FROM strategy_run",
    """INSERT INTO sip_plan (user_id, run_id, plan, symbol, amount, day_of_month, start_on)
       SELECT user_id, run_id, %(symbol)s, %(symbol)s, %(amount)s,
              extract(day FROM %(day)s::date)::integer, %(day)s::date
       FROM strategy_run""",
)


def _drive(dsn: str, now: datetime) -> float:
    """Let the workers execute what is due; returns the seconds until the last of them is done."""
    with ExitStack() as stack:
        workers = [
            child("workers.sips", dsn, now.isoformat(), str(part), str(WORKERS))
            for part in range(1, WORKERS + 1)
        ]
        for worker in workers:
            stack.enter_context(worker)
            stack.callback(worker.kill)  # comes first; of those that have ended it kills none
        for worker in workers:
            _await_ready(worker)
        began = time.monotonic()
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        return max(float(result_of(worker)["ended"]) for worker in workers) - began


def _await_ready(worker: subprocess.Popen[str]) -> None:
    assert worker.stdout is not None
    if worker.stdout.readline() != "ready\n":
        result_of(worker)  # it has failed, and says why


def _require_once(owner: Connection, runs: int) -> None:
    row = owner.execute(
        """SELECT (SELECT count(*) FROM event_ledger WHERE event_type = 'SIP_EXECUTED'),
                  (SELECT count(DISTINCT run_id) FROM event_ledger
                   WHERE event_type = 'SIP_EXECUTED'),
                  (SELECT count(*) FROM execution),
                  (SELECT count(*) FROM event_ledger WHERE event_type = 'TICK')"""
    ).fetchone()
    if row != (runs, runs, runs, runs):
        raise ConfigurationError(
            f"of {runs:,} plans there are SIP_EXECUTED, runs, executions and ticks {row}"
        )
