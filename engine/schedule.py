"""The schedule: a clock that asks Postgres what is due.

APScheduler only wakes us. What is due are the sessions of each RUNNING run's calendar since its
last committed tick; whether it was done is the tick's key in the ledger. Any number of schedulers
may run, be killed and be started again: every planned time is ticked once.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import NamedTuple
from uuid import UUID

from engine.books import Opened, open_many
from engine.clock import Clock, utc_now
from engine.db.connect import Connection, pool, pooled
from engine.errors import (
    BadInput,
    DatabaseUnavailable,
    EngineError,
    RunNotRunning,
    translated,
)
from engine.feeds import StoredPrices, symbols_of
from engine.log import tell
from engine.market.calendar import ensure_sessions
from engine.strategies.sip import ON_TIME_HOURS_MAX
from engine.tick import Planned, run_ticks

# Planned times that one round takes up of one run; the next round goes on from there.
CATCH_UP_TICKS_MAX = 500
# Runs that are read together, and whose ticks are sent together: the last one of them is ticked on
# what was read some milliseconds before.
BATCH_RUNS_MAX = 32


@dataclass(frozen=True, slots=True)
class Due:
    """A planned time of a run that has come and isn't in the ledger."""

    user_id: UUID
    run_id: UUID
    planned_at: datetime


@dataclass(slots=True)
class Round:
    """What one round did: ticks committed, and by run why it could not go on."""

    ticks: int = 0
    repeated: int = 0
    stuck: dict[UUID, str] = field(default_factory=dict)


def due(conn: Connection, now: datetime, *, per_run_max: int = CATCH_UP_TICKS_MAX) -> list[Due]:
    """Planned times up to ``now`` of all RUNNING runs since their last tick, oldest first."""
    _store_sessions(conn, now)
    rows = conn.execute(
        """SELECT r.user_id, r.run_id, p.planned_at
           FROM strategy_run r
           LEFT JOIN engine_state s ON s.user_id = r.user_id AND s.run_id = r.run_id
           CROSS JOIN LATERAL (SELECT coalesce(s.last_logical_time, r.created_at) AS since) l
           CROSS JOIN LATERAL (
               SELECT CASE WHEN r.tick_at = 'OPEN' THEN c.open_at ELSE c.close_at END AS planned_at
               FROM calendar_session c
               WHERE c.calendar = r.calendar
                 AND c.session_date BETWEEN (l.since AT TIME ZONE 'UTC')::date - 1
                                        AND (%(now)s AT TIME ZONE 'UTC')::date + 1
                 AND CASE WHEN r.tick_at = 'OPEN' THEN c.open_at ELSE c.close_at END > l.since
                 AND CASE WHEN r.tick_at = 'OPEN' THEN c.open_at ELSE c.close_at END <= %(now)s
               ORDER BY c.session_date LIMIT %(limit)s) p
           WHERE r.status = 'RUNNING'
           ORDER BY p.planned_at, r.user_id""",
        {"now": now, "limit": per_run_max},
    ).fetchall()
    return [Due(*row) for row in rows]


class Share(NamedTuple):
    """The users whom a scheduler serves first, of several that share the work: ``part`` of ``of``.

    It goes on with what the others have left undone, so that none of them must be there.
    """

    part: int = 1
    of: int = 1

    def takes(self, user_id: UUID) -> bool:
        """Whether a user is of this share."""
        return user_id.int % self.of == self.part - 1


ALL = Share()


def drive(conn: Connection, clock: Clock = utc_now, share: Share = ALL) -> Round:
    """One round: tick whatever is due, oldest first; a run that is stuck holds up no other."""
    done = Round()
    _take(conn, clock, [d for d in due(conn, clock()) if share.takes(d.user_id)], done)
    if share.of > 1:
        # From the other end, so as not to follow in the steps of whose share it is.
        left = [d for d in due(conn, clock()) if not share.takes(d.user_id)]
        runs = {d.run_id: None for d in left}
        place = {run_id: -number for number, run_id in enumerate(runs)}
        _take(conn, clock, sorted(left, key=lambda d: (d.planned_at, place[d.run_id])), done)
    return done


def _take(conn: Connection, clock: Clock, planned: Sequence[Due], done: Round) -> None:
    prices = StoredPrices(conn)
    for batch in _batches(planned, done):
        opened = open_many(conn, [(each.user_id, each.run_id, each.planned_at) for each in batch])
        ready: list[tuple[Planned, Opened]] = []
        for each in batch:
            with _others_go_on(each, done):
                tick = _ready(conn, each, opened.get(each.run_id), prices, clock(), done)
                if tick is not None:
                    ready.append(tick)
        by_run = {each.run_id: each for each in batch}
        for (ticked, _), result in zip(ready, run_ticks(conn, ready), strict=True):
            with _others_go_on(by_run[ticked.run_id], done):
                if isinstance(result, Exception):
                    raise result
                done.ticks += not result.repeated
                done.repeated += result.repeated


def _batches(planned: Sequence[Due], done: Round) -> Iterator[list[Due]]:
    """Ticks that are taken up together, in their order: no more than one of a run, none stuck."""
    batch: dict[UUID, Due] = {}
    for each in planned:
        if each.run_id in done.stuck:
            continue
        if each.run_id in batch or len(batch) == BATCH_RUNS_MAX:
            yield list(batch.values())
            batch = {}
            if each.run_id in done.stuck:
                continue
        batch[each.run_id] = each
    if batch:
        yield list(batch.values())


@contextmanager
def _others_go_on(planned: Due, done: Round) -> Iterator[None]:
    """Whatever becomes of a run, unless there is no database any more."""
    try:
        yield
    except RunNotRunning:
        done.stuck[planned.run_id] = "was stopped meanwhile"
    except DatabaseUnavailable:
        raise
    except Exception as error:  # whatever it is, the other runs go on
        done.stuck[planned.run_id] = str(error)
        tell(
            "TICK_FAILED",
            level=logging.ERROR,
            run_id=planned.run_id,
            planned_at=planned.planned_at,
            error=repr(error),
        )


def _ready(
    conn: Connection,
    planned: Due,
    opened: Opened | None,
    prices: StoredPrices,
    now: datetime,
    done: Round,
) -> tuple[Planned, Opened] | None:
    """A tick with its prices; ``None`` where it waits for some, which is noted."""
    if opened is None:
        raise BadInput(f"run {planned.run_id} was deleted")
    run = opened.run
    symbols = symbols_of(conn, run, opened.symbols)
    bars = prices.at(run.calendar, planned.planned_at, symbols)
    missing = symbols - {bar.symbol for bar in bars}
    if missing and now - planned.planned_at <= timedelta(hours=ON_TIME_HOURS_MAX):
        reason = (
            f"waits for the prices of {', '.join(sorted(missing))} at "
            f"{planned.planned_at.isoformat()}; import them with `oms data import`"
        )
        done.stuck[planned.run_id] = reason
        _note_waiting(conn, planned, reason, now)
        return None
    return Planned(run.user_id, run.run_id, planned.planned_at, bars, now), opened


def _note_waiting(conn: Connection, planned: Due, reason: str, now: datetime) -> None:
    with translated():
        conn.execute(
            """UPDATE engine_status SET heartbeat_at = %s, last_error = %s, error_at = %s
               WHERE user_id = %s AND run_id = %s""",
            [now, reason, now, planned.user_id, planned.run_id],
        )


def _store_sessions(conn: Connection, now: datetime) -> None:
    """Make sure that the calendars of RUNNING runs are stored from their last ticks up to now."""
    rows = conn.execute(
        """SELECT r.calendar, min(coalesce(s.last_logical_time, r.created_at))
           FROM strategy_run r
           LEFT JOIN engine_state s ON s.user_id = r.user_id AND s.run_id = r.run_id
           WHERE r.status = 'RUNNING' GROUP BY r.calendar"""
    ).fetchall()
    for calendar, since in rows:
        ensure_sessions(conn, calendar, min(since, now).date(), now.date())


def serve(
    dsn: str,
    *,
    every_seconds: int,
    report: Callable[[Round], None] = lambda done: None,
    clock: Clock = utc_now,
    share: Share = ALL,
    signals: Iterable[signal.Signals] = (signal.SIGINT, signal.SIGTERM),
) -> None:
    """Drive a round every ``every_seconds`` until a signal comes; the round under way is finished.

    A database that is away is asked again at the next round.
    """
    from apscheduler.schedulers.background import BackgroundScheduler

    connections = pool(dsn)
    stopped = threading.Event()

    def round_() -> None:
        try:
            with translated(), pooled(connections) as conn:
                report(drive(conn, clock, share))
        except EngineError as error:
            tell("SCHEDULE_WAITS", level=logging.ERROR, error=str(error))

    scheduler = BackgroundScheduler(timezone="UTC")
    scheduler.add_job(
        round_,
        "interval",
        seconds=every_seconds,
        max_instances=1,
        coalesce=True,
        misfire_grace_time=None,
        next_run_time=utc_now(),
    )
    for number in signals:
        signal.signal(number, lambda *_: stopped.set())
    scheduler.start()
    stopped.wait()
    scheduler.shutdown(wait=True)
    connections.dispose()
