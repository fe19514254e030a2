"""Runs: made, started, stopped, failed, deleted. The database holds the rules of their lives."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any
from uuid import UUID, uuid4

from psycopg.types.json import Jsonb
from pydantic import ValidationError

from engine.db.connect import Connection
from engine.errors import BadInput, RunNotRunning, translated
from engine.ids import user_id_of
from engine.market.calendar import require_calendar
from engine.paper.costs import PaperSettings
from engine.strategies.registry import make

# The broker that is our own book; any other has accounts, and a connector between.
PAPER = "paper"

# Decimals of the quantities and prices that orders and executions hold.
DECIMALS_MAX = 8


@dataclass(frozen=True, slots=True)
class Run:
    """A row of ``strategy_run``; ``cash`` and ``initial_cash`` are in ``currency``."""

    user_id: UUID
    run_id: UUID
    name: str | None
    status: str
    strategy: str
    parameters: Mapping[str, Any]
    broker: str
    paper: PaperSettings
    account_type: str
    calendar: str
    currency: str
    initial_cash: Decimal
    cash: Decimal


RUN_COLUMNS = (
    "user_id",
    "run_id",
    "name",
    "status",
    "strategy",
    "parameters",
    "broker",
    "paper",
    "account_type",
    "calendar",
    "currency",
    "initial_cash",
    "cash",
)
_COLUMNS = ", ".join(RUN_COLUMNS)


def run_of(row: tuple[Any, ...]) -> Run:
    """The run that a row of RUN_COLUMNS is."""
    before, (paper, *after) = row[:7], row[7:]
    return Run(*before, _stored_settings(json.dumps(paper)), *after)  # type: ignore[call-arg]


# They can't be changed, and nearly all runs have the same: they are checked once a process.
@lru_cache(maxsize=256)
def _stored_settings(paper: str) -> PaperSettings:
    return paper_settings(json.loads(paper))


def paper_settings(given: Mapping[str, Any]) -> PaperSettings:
    """The paper broker's settings, checked. Raises BadInput, naming the setting."""
    try:
        settings = PaperSettings.model_validate(dict(given))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise BadInput(f"paper setting {where}: {problem['msg']}") from error
    for name in ("quantity_decimals", "price_decimals"):
        if getattr(settings, name) > DECIMALS_MAX:
            raise BadInput(f"paper setting {name}: the books hold at most {DECIMALS_MAX} decimals")
    return settings


def add_user(conn: Connection, name: str) -> UUID:
    """Make the user called ``name``, or find it: one name is one user."""
    user_id = user_id_of(name)
    with translated():
        conn.execute(
            "INSERT INTO app_user (user_id, name) VALUES (%s, %s) ON CONFLICT DO NOTHING",
            [user_id, name],
        )
    return user_id


@dataclass(frozen=True, slots=True)
class Terms:
    """What a new run is made of; ``initial_cash`` is in ``currency``.

    ``parameters`` are the strategy's, ``paper`` the paper broker's settings, ``calendar`` is a
    code of exchange_calendars, ``account_type`` CASH or MARGIN, ``tick_at`` OPEN or CLOSE: the
    moment of a session at which the schedule ticks. ``accounts`` are the accounts at a broker that
    its orders go to, in order of preference; none: the paper book. ``pnl_method`` is AVERAGE or
    FIFO.
    """

    strategy: str = "sip"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    initial_cash: Decimal = Decimal(0)
    name: str | None = None
    calendar: str = "XNYS"
    paper: Mapping[str, Any] = field(default_factory=dict)
    account_type: str = "CASH"
    currency: str = "USD"
    tick_at: str = "CLOSE"
    accounts: Sequence[str] = ()
    pnl_method: str = "AVERAGE"


def create_run(conn: Connection, user_id: UUID, terms: Terms, *, run_id: UUID | None = None) -> Run:
    """Make a run in status CREATED, its strategy, parameters and settings checked.

    Raises BadInput for a strategy, parameter, setting or calendar that doesn't fit,
    UnknownReference for an unknown user, and InvalidValue for cash or words out of range.
    """
    made = make(terms.strategy, terms.parameters)
    settings = paper_settings(terms.paper)
    with translated(), conn.transaction():
        row = conn.execute(
            f"""INSERT INTO strategy_run (user_id, run_id, name, strategy, parameters, paper,
                    initial_cash, calendar, account_type, currency, tick_at, pnl_method, broker)
                VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
                RETURNING {_COLUMNS}""",
            [
                user_id,
                run_id or uuid4(),
                terms.name,
                terms.strategy,
                Jsonb(made.parameters.model_dump(mode="json")),
                Jsonb(settings.model_dump(mode="json")),
                terms.initial_cash,
                require_calendar(terms.calendar),
                terms.account_type,
                terms.currency,
                terms.tick_at,
                terms.pnl_method,
                _broker_of(conn, user_id, terms.accounts),
            ],
        ).fetchone()
        assert row is not None
        run = run_of(row)
        conn.execute(
            """INSERT INTO run_route (user_id, run_id, preference, account)
               SELECT %s, %s, a.preference, a.account
               FROM unnest(%s::text[]) WITH ORDINALITY AS a (account, preference)""",
            [user_id, run.run_id, list(terms.accounts)],
        )
    return run


def _broker_of(conn: Connection, user_id: UUID, accounts: Sequence[str]) -> str:
    """The kind of broker that the preferred account is at. Raises BadInput for an unknown one."""
    if not accounts:
        return PAPER
    known: dict[str, str] = dict(
        conn.execute(
            "SELECT account, broker FROM broker_account WHERE user_id = %s", [user_id]
        ).fetchall()
    )
    for account in accounts:
        if account not in known:
            raise BadInput(f"there is no account {account}; `oms account add` makes one")
    return known[accounts[0]]


def start_run(conn: Connection, user_id: UUID, run_id: UUID) -> Run:
    """Start a run: RUNNING, with its engine_status row.

    Raises RunAlreadyRunning when the user has a RUNNING run, IllegalRunMove when it isn't CREATED.
    """
    with translated(), conn.transaction():
        run = set_status(conn, user_id, run_id, "RUNNING")
        conn.execute(
            "INSERT INTO engine_status (user_id, run_id) VALUES (%s, %s)", [user_id, run_id]
        )
    return run


def fail_run(conn: Connection, user_id: UUID, run_id: UUID, error: str, at: datetime) -> Run:
    """End a run in ERROR, the error in engine_status and in the ledger (RUN_FAILED, RUN_ERROR).

    A run that has sent orders is STOPPING until they are settled, and ERROR then.

    ``at`` is the wall clock. Raises RunNotRunning when it has ended already.
    """
    with translated(), conn.transaction():
        run = lock_run(conn, user_id, run_id)
        conn.execute(
            """INSERT INTO engine_status AS s (user_id, run_id, last_error, error_at)
               VALUES (%(user)s, %(run)s, %(error)s, %(at)s)
               ON CONFLICT (user_id, run_id) DO UPDATE
               SET last_error = excluded.last_error, error_at = excluded.error_at""",
            {"user": user_id, "run": run_id, "error": error, "at": at},
        )
        conn.execute(
            """INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, payload)
               VALUES (%s, %s, run_last_time(%s, %s), 'RUN_FAILED', %s)""",
            [user_id, run_id, user_id, run_id, Jsonb({"error": error})],
        )
        # What a broker works is asked back first; the run ends when the last order is settled.
        waits = run.broker != PAPER and _has_sent(conn, user_id, run_id)
        return set_status(conn, user_id, run_id, "STOPPING" if waits else "ERROR")


def _has_sent(conn: Connection, user_id: UUID, run_id: UUID) -> bool:
    """Whether the run has ever sent something to a broker."""
    row = conn.execute(
        "SELECT FROM broker_command WHERE user_id = %s AND run_id = %s LIMIT 1", [user_id, run_id]
    ).fetchone()
    return row is not None


def delete_run(conn: Connection, user_id: UUID, run_id: UUID) -> None:
    """Delete a run with everything in it, the only way in which history goes; the owner's right.

    Raises BadInput for an unknown run and for one that is still RUNNING.
    """
    with translated(), conn.transaction():
        run = lock_run(conn, user_id, run_id)
        if run.status in ("RUNNING", "STOPPING"):
            raise BadInput(f"run {run_id} is {run.status}; stop it before it is deleted")
        conn.execute(
            "DELETE FROM strategy_run WHERE user_id = %s AND run_id = %s", [user_id, run_id]
        )


def find_run(conn: Connection, run_id: UUID) -> Run:
    """The run with this id, whoever owns it. Raises BadInput where there is none."""
    row = conn.execute(
        f"SELECT {_COLUMNS} FROM strategy_run WHERE run_id = %s", [run_id]
    ).fetchone()
    if row is None:
        raise BadInput(f"there is no run {run_id}; `oms run list` shows the runs")
    return run_of(row)


def lock_run(conn: Connection, user_id: UUID, run_id: UUID) -> Run:
    """Lock the run's row for this transaction, as the first of all locks, and return it.

    Raises BadInput for an unknown run.
    """
    row = conn.execute(
        f"""SELECT {_COLUMNS} FROM strategy_run
            WHERE user_id = %s AND run_id = %s FOR NO KEY UPDATE""",
        [user_id, run_id],
    ).fetchone()
    if row is None:
        raise BadInput(f"user {user_id} has no run {run_id}; `oms run list` shows the runs")
    return run_of(row)


def require_running(run: Run) -> None:
    """Raise RunNotRunning unless the run is RUNNING."""
    if run.status != "RUNNING":
        raise RunNotRunning(
            f"run {run.run_id} is {run.status}",
            "strategy_run_run_is_running",
            "23T03",
            "Start it first." if run.status == "CREATED" else "Make a new run.",
        )


def set_status(conn: Connection, user_id: UUID, run_id: UUID, status: str) -> Run:
    """Move a run to a status. Raises IllegalRunMove, and BadInput for an unknown run."""
    row = conn.execute(
        f"""UPDATE strategy_run SET status = %s WHERE user_id = %s AND run_id = %s
            RETURNING {_COLUMNS}""",
        [status, user_id, run_id],
    ).fetchone()
    if row is None:
        raise BadInput(f"user {user_id} has no run {run_id}; `oms run list` shows the runs")
    return run_of(row)


def require_aware(moment: datetime, what: str) -> datetime:
    """``moment`` in UTC. Raises BadInput for a naive one, which would name two moments."""
    if moment.tzinfo is None:
        raise BadInput(
            f"{what} {moment.isoformat()} has no time zone; write for instance "
            f"{moment.isoformat()}+00:00"
        )
    return moment.astimezone(UTC)
