"""The engine's side of the boundary: takes in what brokers say, and looks after what waits.

One worker or many (``Part``); each may die at any moment, since whatever it does is one
transaction. A notification wakes it, a poll makes sure.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Container
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import TypeVar
from uuid import UUID

from engine.clock import Clock, utc_now
from engine.db.connect import ANSWER_SECONDS_MAX, Connection, connected
from engine.errors import DatabaseUnavailable, EngineError, Retryable, translated
from engine.flatten import advance, mark_post_market
from engine.inbox import Applied, Part, apply_batch, retry_held, waiting
from engine.log import tell
from engine.outbox import EVENTS, wake
from engine.reconcile import on_start
from engine.reconcile import watch as watch_accounts
from engine.routing import reroute
from engine.safety import cancel_breaches, check_breakers, enforce_halts, raise_alert
from engine.stop import settle_stopping
from engine.unsendable import reject_unsendable

POLL_SECONDS = 1.0
# Between two looks at what time alone brings about: silence, staleness, runs that have settled.
WATCH_SECONDS = 5.0
RETRY_SECONDS = 1.0
# How long a batch waits for other transactions, how often in a row it is tried, and how long its
# account then rests while the others are served.
LOCK_TIMEOUT_MS = 10_000
ATTEMPTS_MAX = 3
REST_SECONDS = 30.0
# How long a worker that is told to end takes in what is there yet, and waits for whom in that.
LAST_SECONDS_MAX = 10.0
LAST_LOCK_TIMEOUT_MS = 1_000

Key = tuple[UUID, str]
Result = TypeVar("Result")
Watch = Callable[[Connection, UUID, datetime], object]


@dataclass(slots=True)
class Taken:
    """What a round took in: words, and whether some were about a connection or an account."""

    words: int = 0
    of_account: bool = False
    # Accounts whose words could not be applied, since others held what they are about.
    stuck: set[Key] = field(default_factory=set)


def work_through(
    conn: Connection,
    part: Part = Part(),  # noqa: B008
    resting: Container[Key] = frozenset(),
    ends_at: float = math.inf,
) -> Taken:
    """Apply all that waits in every inbox, and do at once what follows from it.

    ``resting`` are accounts that are left for later; after ``ends_at`` (monotonic) no batch is
    begun.
    """
    taken = Taken()
    for key in waiting(conn):
        if key in resting:
            continue
        try:
            while (
                time.monotonic() < ends_at
                and (done := _persist(partial(_apply, conn, *key, part))).events
            ):
                taken.words += done.events
                taken.of_account |= done.of_account
                _persist(partial(_follow_up, conn, key[0], done))
        except Retryable as error:
            taken.stuck.add(key)
            _tell_stuck(conn, key, error)
        wake(conn)
    return taken


def _persist(step: Callable[[], Result]) -> Result:
    """Do a step, again where other transactions were in its way; raises Retryable in the end."""
    for _ in range(ATTEMPTS_MAX - 1):
        with suppress(Retryable):
            return step()
    return step()


def _tell_stuck(conn: Connection, key: Key, error: Retryable) -> None:
    user_id, account = key
    words = f"{account}: what its broker said waits after {ATTEMPTS_MAX} attempts: {error}"
    tell("INBOX_STUCK", level=logging.ERROR, account=account, error=str(error))
    with translated():
        raise_alert(conn, user_id, "INBOX_STUCK", account, words, account=account)


def _apply(conn: Connection, user_id: UUID, account: str, part: Part) -> Applied:
    began = time.perf_counter()
    applied = apply_batch(conn, user_id, account, part=part)
    if applied.fills:
        rate = applied.fills / (time.perf_counter() - began)
        tell("FILL_RATE", account=account, fills=applied.fills, per_second=round(rate))
    return applied


def _follow_up(conn: Connection, user_id: UUID, done: Applied) -> None:
    """A fill may break a limit, whose rest is then cancelled, or be a late one of a flatten."""
    for run_id in sorted(done.runs):
        with translated(), conn.transaction():
            cancel_breaches(conn, user_id, run_id)
    for run_id, order_id in sorted(done.flattened):
        with translated(), conn.transaction():
            mark_post_market(conn, user_id, run_id, order_id)


def users_at_brokers(conn: Connection) -> list[UUID]:
    """The users who have accounts at brokers."""
    rows = conn.execute("SELECT DISTINCT user_id FROM broker_account").fetchall()
    return [user_id for (user_id,) in rows]


def look_after(conn: Connection, now: datetime, watches: tuple[Watch, ...]) -> None:
    """What time alone brings about, user by user; one user's trouble is not another's."""
    for user_id in users_at_brokers(conn):
        for watch in watches:
            try:
                watch(conn, user_id, now)
            except DatabaseUnavailable:
                raise
            except EngineError as error:
                tell("WATCH_FAILED", user_id=user_id, watch=watch.__name__, error=str(error))
    wake(conn)


def settle(conn: Connection, user_id: UUID, now: datetime) -> None:
    """End what was asked to stop and is settled."""
    for run_id in settle_stopping(conn, user_id):
        tell("RUN_SETTLED", run_id=run_id, at=now)


def keep_halted(conn: Connection, user_id: UUID, now: datetime) -> None:
    """Cancel what works although it is halted: a crash may have come between."""
    del now
    enforce_halts(conn, user_id)


def keep_limits(conn: Connection, user_id: UUID, now: datetime) -> None:
    """Cancel the rest of what has broken a limit, where whoever booked the fill did not."""
    del now
    for (run_id,) in conn.execute(
        """SELECT run_id FROM strategy_run
           WHERE user_id = %s AND status = 'RUNNING' AND broker <> 'paper' ORDER BY run_id""",
        [user_id],
    ).fetchall():
        with translated(), conn.transaction():
            cancel_breaches(conn, user_id, run_id)


def book_held(conn: Connection, user_id: UUID, now: datetime) -> None:
    """Book what was held for an execution or an exchange rate that has come since."""
    for (account,) in conn.execute(
        "SELECT account FROM broker_account WHERE user_id = %s ORDER BY account", [user_id]
    ).fetchall():
        if words := retry_held(conn, user_id, account):
            tell("HELD_BOOKED", account=account, words=words, at=now)


# In this order: what was answered is compared before anything is decided on it.
WATCHES: tuple[Watch, ...] = (
    book_held,
    watch_accounts,
    reject_unsendable,
    check_breakers,
    keep_halted,
    advance,
    reroute,
    settle,
)


def serve(
    dsn: str,
    stopped: threading.Event,
    *,
    part: Part = Part(),  # noqa: B008
    clock: Clock = utc_now,
    watches: tuple[Watch, ...] = WATCHES,
    report: Callable[[int], None] = lambda words: None,
) -> None:
    """Work until ``stopped`` is set; what is in the inbox by then is taken in first.

    A database that went away, or hangs, is asked for again, every second.
    """
    while not stopped.is_set():
        try:
            with translated(), connected(dsn, answer_seconds=ANSWER_SECONDS_MAX) as conn:
                conn.execute(f"SET lock_timeout = {LOCK_TIMEOUT_MS}")
                conn.execute(f"LISTEN {EVENTS}")
                _serve(conn, stopped, part, clock, watches, report)
        except (DatabaseUnavailable, EngineError) as error:
            tell("WORKER_WAITS", error=str(error))
            stopped.wait(RETRY_SECONDS)


def _serve(
    conn: Connection,
    stopped: threading.Event,
    part: Part,
    clock: Clock,
    watches: tuple[Watch, ...],
    report: Callable[[int], None],
) -> None:
    watched = 0.0
    rested: dict[Key, float] = {}
    # What follows from fills may have been left undone: by whoever died, or came to no end.
    owing = True
    for user_id in users_at_brokers(conn):
        # Whatever was asked before this process began.
        on_start(conn, user_id, clock())
    while not stopped.is_set():
        resting = {key: until for key, until in rested.items() if until > time.monotonic()}
        if owing or len(resting) < len(rested):
            look_after(conn, clock(), (keep_limits,))
            owing = False
        rested = resting
        taken = work_through(conn, part, rested)
        rested |= dict.fromkeys(taken.stuck, time.monotonic() + REST_SECONDS)
        if taken.words:
            report(taken.words)
        if taken.of_account or time.monotonic() - watched >= WATCH_SECONDS:
            look_after(conn, clock(), watches)
            watched = time.monotonic()
        # One notification is as good as many: everything that waits is taken at once.
        for _ in conn.notifies(timeout=POLL_SECONDS, stop_after=1):
            pass
    conn.execute(f"SET lock_timeout = {LAST_LOCK_TIMEOUT_MS}")
    taken = work_through(conn, part, rested, time.monotonic() + LAST_SECONDS_MAX)
    if taken.words:
        report(taken.words)
