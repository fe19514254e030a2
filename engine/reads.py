"""Lists and details of what the database holds, for faces.

Each query is composed with SQLAlchemy Core from names alone (the tables themselves are defined in
``sql/`` only) and runs on the caller's connection. Nothing here writes or locks. SQLAlchemy is
imported when the first query is composed, because a fifth of a second is long for a command that
asks nothing.

Money is in the run's currency, quantities are in units, moments are in UTC.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from psycopg.rows import class_row, scalar_row

from engine.db.connect import Connection, snapshot
from engine.errors import BadInput
from engine.runs import Run
from engine.runs import find_run as run_of_id

if TYPE_CHECKING:
    import sqlalchemy as sa

__all__ = [
    "EVENTS_MAX",
    "ID_DIGITS_MIN",
    "ROWS_MAX",
    "EventRow",
    "ExecutionRow",
    "OrderDetail",
    "OrderRow",
    "PlanRow",
    "PositionRow",
    "RunDetail",
    "RunHealth",
    "RunRow",
    "UserRow",
    "count_moments",
    "find_order",
    "find_run",
    "find_user",
    "list_events",
    "list_orders",
    "list_plans",
    "list_positions",
    "list_runs",
    "list_users",
    "order_detail",
    "run_detail",
    "run_row",
]

ROWS_MAX = 50  # rows of a list unless the caller says otherwise
EVENTS_MAX = 10  # newest events of a run's or an order's details
ID_DIGITS_MIN = 4  # hex digits of an id that may stand for the whole of it
CANDIDATES_MAX = 6  # ids that a refusal lists

_HEX_DIGITS = 32
_DIGITS = re.compile(r"[0-9a-f]+")

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class UserRow:
    """A user, how many runs they have, and the one that is RUNNING."""

    user_id: UUID
    name: str | None
    kind: str
    created_at: datetime
    runs: int
    running_run_id: UUID | None


@dataclass(frozen=True, slots=True)
class RunRow:
    """A run with its books at its last mark; before the first one, its cash."""

    user_id: UUID
    user_name: str | None
    run_id: UUID
    name: str | None
    status: str
    strategy: str
    broker: str
    account_type: str
    calendar: str
    currency: str
    initial_cash: Decimal
    cash: Decimal
    market_value: Decimal
    equity: Decimal
    last_logical_time: datetime | None
    created_at: datetime
    stopped_at: datetime | None


@dataclass(frozen=True, slots=True)
class RunHealth:
    """A run's terms and how it is doing; ``reserved_cash`` is held back by open buy orders."""

    parameters: Mapping[str, Any]
    paper: Mapping[str, Any]
    tick_at: str
    ticks: int
    events: int
    executions: int
    orders: Mapping[str, int]
    reserved_cash: Decimal
    heartbeat_at: datetime | None
    lag_seconds: Decimal | None
    last_error: str | None
    error_at: datetime | None


@dataclass(frozen=True, slots=True)
class OrderRow:
    """An order; ``commission`` is the sum of its executions'."""

    user_id: UUID
    run_id: UUID
    run_name: str | None
    order_id: UUID
    client_order_id: str | None
    logical_time: datetime
    symbol: str
    side: str
    quantity: Decimal
    order_type: str
    time_in_force: str
    limit_price: Decimal | None
    stop_price: Decimal | None
    trail_amount: Decimal | None
    trail_percent: Decimal | None
    expire_at: datetime | None
    triggered_at: datetime | None
    status: str
    status_at: datetime
    status_reason: str | None
    reject_source: str | None
    reject_code: str | None
    filled_quantity: Decimal
    avg_fill_price: Decimal | None
    commission: Decimal
    recorded_at: datetime


@dataclass(frozen=True, slots=True)
class ExecutionRow:
    """One execution of an order."""

    execution_id: str
    logical_time: datetime
    event_at: datetime
    quantity: Decimal
    price: Decimal
    commission: Decimal
    commission_currency: str


@dataclass(frozen=True, slots=True)
class EventRow:
    """A row of a run's ledger."""

    seq: int
    logical_time: datetime
    event_type: str
    subject: str
    payload: Mapping[str, Any]
    recorded_at: datetime


@dataclass(frozen=True, slots=True)
class PositionRow:
    """What a run holds of a symbol; costs and profits are before commission."""

    user_id: UUID
    run_id: UUID
    run_name: str | None
    symbol: str
    quantity: Decimal
    avg_cost: Decimal | None
    cost_basis: Decimal
    mark_price: Decimal | None
    marked_at: datetime | None
    market_value: Decimal
    unrealized_pnl: Decimal
    realized_pnl: Decimal


@dataclass(frozen=True, slots=True)
class PlanRow:
    """An investment plan and what became of its occasions so far."""

    user_id: UUID
    run_id: UUID
    run_name: str | None
    plan: str
    symbol: str
    amount: Decimal
    day_of_month: int
    start_on: date
    end_on: date | None
    status: str
    missed_policy: str
    executed: int
    rejected: int
    skipped: int
    last_logical_time: datetime | None


@dataclass(frozen=True, slots=True)
class RunDetail:
    """All about one run; ``events`` are its newest, newest first."""

    run: RunRow
    health: RunHealth
    positions: list[PositionRow]
    plans: list[PlanRow]
    events: list[EventRow]


@dataclass(frozen=True, slots=True)
class OrderDetail:
    """All about one order, its executions and its events oldest first."""

    order: OrderRow
    executions: list[ExecutionRow]
    events: list[EventRow]


# --- Lists ----------------------------------------------------------------------------------


def list_users(conn: Connection) -> list[UserRow]:
    """All users by name; those without a name last."""
    return _fetch(
        conn,
        UserRow,
        _select(
            """app_user u
               LEFT JOIN LATERAL (
                   SELECT count(*) AS runs,
                          (array_agg(run_id) FILTER (WHERE status = 'RUNNING'))[1] AS running_run_id
                   FROM strategy_run WHERE user_id = u.user_id) r ON true""",
            u="user_id name kind created_at",
            r="runs running_run_id",
        ).order_by(_column("u.name").nulls_last(), _column("u.user_id")),
    )


def list_runs(
    conn: Connection,
    *,
    user: str | None = None,
    status: str | None = None,
    limit: int | None = None,
) -> list[RunRow]:
    """Runs, newest first; of the user of that name, in that status.

    Raises BadInput for a status that runs don't have.
    """
    _require_status(conn, "run_status", status)
    statement = _runs().order_by(_column("r.created_at").desc(), _column("r.run_id"))
    if user is not None:
        statement = statement.where(_column("u.name") == user)
    return _fetch(conn, RunRow, _in_status(statement, "r.status", status).limit(limit))


def list_orders(
    conn: Connection,
    *,
    run: Run | None = None,
    status: str | None = None,
    symbol: str | None = None,
    limit: int | None = ROWS_MAX,
) -> list[OrderRow]:
    """Orders, newest first; of a run, in a status, in a symbol.

    Raises BadInput for a status that orders don't have.
    """
    _require_status(conn, "order_status", status)
    statement = _of_run(_orders(), "o", run)
    if symbol is not None:
        statement = statement.where(_column("o.symbol") == symbol.upper())
    statement = _in_status(statement, "o.status", status).limit(limit)
    newest = (_column("o.logical_time").desc(), _column("o.order_id").desc())
    return _fetch(conn, OrderRow, statement.order_by(*newest))


def list_positions(
    conn: Connection, *, run: Run | None = None, closed: bool = False
) -> list[PositionRow]:
    """Positions by run and symbol; with ``closed``, those too that are no longer held."""
    statement = _of_run(
        _select(
            "position p JOIN strategy_run r ON r.user_id = p.user_id AND r.run_id = p.run_id",
            "r.name AS run_name",
            "coalesce(p.market_value, 0) AS market_value",
            "coalesce(p.market_value, 0) - p.cost_basis AS unrealized_pnl",
            p="user_id run_id symbol quantity avg_cost cost_basis mark_price marked_at"
            " realized_pnl",
        ),
        "p",
        run,
    )
    if not closed:
        statement = statement.where(_column("p.quantity") != 0)
    ordered = statement.order_by(_column("r.created_at"), _column("r.run_id"), _column("p.symbol"))
    return _fetch(conn, PositionRow, ordered)


def list_plans(conn: Connection, *, run: Run | None = None) -> list[PlanRow]:
    """Investment plans by run and name, with what became of their occasions."""
    statement = _of_run(
        _select(
            """sip_plan p
               JOIN strategy_run r ON r.user_id = p.user_id AND r.run_id = p.run_id
               LEFT JOIN LATERAL (
                   SELECT count(*) FILTER (WHERE event_type = 'SIP_EXECUTED') AS executed,
                          count(*) FILTER (WHERE event_type = 'SIP_REJECTED') AS rejected,
                          count(*) FILTER (WHERE event_type = 'SIP_SKIPPED') AS skipped,
                          max(logical_time) AS last_logical_time
                   FROM event_ledger
                   WHERE user_id = p.user_id AND run_id = p.run_id
                     AND event_type IN ('SIP_EXECUTED', 'SIP_REJECTED', 'SIP_SKIPPED')
                     AND left(subject, length(p.plan) + 1) = p.plan || '@') e ON true""",
            "r.name AS run_name",
            p="user_id run_id plan symbol amount day_of_month start_on end_on status missed_policy",
            e="executed rejected skipped last_logical_time",
        ),
        "p",
        run,
    )
    ordered = statement.order_by(_column("r.created_at"), _column("r.run_id"), _column("p.plan"))
    return _fetch(conn, PlanRow, ordered)


def list_events(
    conn: Connection, run: Run, *, event_type: str | None = None, limit: int | None = EVENTS_MAX
) -> list[EventRow]:
    """A run's events, newest first; of one type."""
    statement = _of_run(_events(), "l", run).order_by(_column("l.seq").desc()).limit(limit)
    if event_type is not None:
        statement = statement.where(_column("l.event_type") == event_type.upper())
    return _fetch(conn, EventRow, statement)


def count_moments(conn: Connection, symbols: Iterable[str], after: datetime, upto: datetime) -> int:
    """At how many moments bars of these symbols end, after one moment and up to another."""
    ends = _column("b.bar_end")
    statement = _select("price_bar b", "count(DISTINCT b.bar_end)").where(
        _column("b.symbol").in_(sorted(symbols)), ends > after, ends <= upto
    )
    with conn.cursor(row_factory=scalar_row) as cursor:
        return int(cursor.execute(*_compiled(statement)).fetchone() or 0)


# --- Details --------------------------------------------------------------------------------


def run_row(conn: Connection, run: Run) -> RunRow:
    """The run as ``list_runs`` has it."""
    (row,) = _fetch(conn, RunRow, _of_run(_runs(), "r", run))
    return row


def run_detail(conn: Connection, run: Run, *, events_max: int = EVENTS_MAX) -> RunDetail:
    """All about a run, of one moment."""
    with snapshot(conn):
        (health,) = _fetch(conn, RunHealth, _of_run(_health(), "r", run))
        return RunDetail(
            run_row(conn, run),
            health,
            list_positions(conn, run=run, closed=True),
            list_plans(conn, run=run),
            list_events(conn, run, limit=events_max),
        )


def order_detail(conn: Connection, order: OrderRow) -> OrderDetail:
    """An order with its executions and its events."""
    of_order = {"user_id": order.user_id, "run_id": order.run_id}
    executions = _select(
        "execution e",
        e="execution_id logical_time event_at quantity price commission commission_currency",
    ).where(_column("e.order_id") == order.order_id)
    subject = _column("l.subject")
    told = _events().where(
        (subject == str(order.order_id))
        | subject.startswith(f"{order.order_id}/")
        | subject.startswith(f"{order.order_id}@")
    )
    return OrderDetail(
        order,
        _fetch(
            conn,
            ExecutionRow,
            _with_key(executions, "e", of_order).order_by(
                _column("e.logical_time"), _column("e.execution_id")
            ),
        ),
        _fetch(conn, EventRow, _with_key(told, "l", of_order).order_by(_column("l.seq"))),
    )


# --- What people name -----------------------------------------------------------------------


def find_user(conn: Connection, name: str) -> UserRow:
    """The user of that name. Raises BadInput where there is none."""
    found = [user for user in list_users(conn) if user.name == name]
    if not found:
        raise BadInput(f"there is no user {name!r}; `oms user add {name}` adds one")
    return found[0]


def find_run(conn: Connection, named: str) -> Run:
    """The run that ``named`` means: its id, the first digits of it, or its name.

    Raises BadInput where there is none, or more than one.
    """
    wanted = named.strip()
    statement = _runs().order_by(_column("r.created_at").desc()).limit(CANDIDATES_MAX)
    means = _column("r.name") == wanted
    between = _ids(wanted)
    if between is not None:
        means |= _column("r.run_id").between(*between)
    found = _fetch(conn, RunRow, statement.where(means))
    if len(found) == 1:
        return run_of_id(conn, found[0].run_id)
    if not found:
        raise BadInput(
            f"there is no run {wanted!r}; give its id, at least {ID_DIGITS_MIN} first digits of "
            "it, or its name: `oms run list` shows them"
        )
    raise BadInput(_ambiguous("runs", wanted, [run.run_id for run in found]))


def find_order(conn: Connection, named: str, *, run: Run | None = None) -> OrderRow:
    """The order that ``named`` means: its id, or the first digits of it.

    Raises BadInput where there is none, or more than one.
    """
    between = _ids(named.strip())
    statement = _of_run(_orders(), "o", run).limit(CANDIDATES_MAX)
    found = []
    if between is not None:
        found = _fetch(conn, OrderRow, statement.where(_column("o.order_id").between(*between)))
    if not found:
        raise BadInput(
            f"there is no order {named.strip()!r}; give its id, or at least {ID_DIGITS_MIN} first "
            "digits of it: `oms order list` shows them"
        )
    if len(found) > 1:
        raise BadInput(_ambiguous("orders", named.strip(), [order.order_id for order in found]))
    return found[0]


def _ids(digits: str) -> tuple[UUID, UUID] | None:
    """The lowest and the highest id that begin with these digits, if digits they are."""
    wanted = digits.lower().replace("-", "")
    if not (ID_DIGITS_MIN <= len(wanted) <= _HEX_DIGITS and _DIGITS.fullmatch(wanted)):
        return None
    return UUID(wanted.ljust(_HEX_DIGITS, "0")), UUID(wanted.ljust(_HEX_DIGITS, "f"))


def _ambiguous(what: str, wanted: str, ids: list[UUID]) -> str:
    shown = ", ".join(str(found) for found in ids[: CANDIDATES_MAX - 1])
    many = "several" if len(ids) == CANDIDATES_MAX else str(len(ids))
    return f"{wanted!r} may be any of {many} {what} ({shown}); give one of these ids in full"


# --- Composing ------------------------------------------------------------------------------


def _runs() -> sa.Select[Any]:
    return _select(
        """strategy_run r
           JOIN app_user u ON u.user_id = r.user_id
           LEFT JOIN engine_state s ON s.user_id = r.user_id AND s.run_id = r.run_id
           LEFT JOIN LATERAL (
               SELECT market_value, equity FROM mtm_ledger
               WHERE user_id = r.user_id AND run_id = r.run_id
               ORDER BY logical_time DESC LIMIT 1) m ON true""",
        "u.name AS user_name",
        "coalesce(m.market_value, 0) AS market_value",
        "coalesce(m.equity, r.cash) AS equity",
        r="user_id run_id name status strategy broker account_type calendar currency"
        " initial_cash cash created_at stopped_at",
        s="last_logical_time",
    )


def _health() -> sa.Select[Any]:
    return _select(
        """strategy_run r
           LEFT JOIN engine_status s ON s.user_id = r.user_id AND s.run_id = r.run_id
           CROSS JOIN LATERAL (
               SELECT count(*) AS events, count(*) FILTER (WHERE event_type = 'TICK') AS ticks,
                      count(*) FILTER (WHERE event_type = 'EXECUTION') AS executions
               FROM event_ledger WHERE user_id = r.user_id AND run_id = r.run_id) l
           CROSS JOIN LATERAL (
               SELECT coalesce(jsonb_object_agg(g.status, g.count), '{}') AS orders,
                      coalesce(sum(g.reserved), 0) AS reserved_cash
               FROM (SELECT status, count(*), sum(reserved_cash) AS reserved FROM orders
                     WHERE user_id = r.user_id AND run_id = r.run_id GROUP BY status) g) o""",
        r="parameters paper tick_at",
        s="heartbeat_at lag_seconds last_error error_at",
        l="events ticks executions",
        o="orders reserved_cash",
    )


def _orders() -> sa.Select[Any]:
    return _select(
        """orders o
           JOIN strategy_run r ON r.user_id = o.user_id AND r.run_id = o.run_id
           CROSS JOIN LATERAL (
               SELECT coalesce(sum(commission), 0) AS commission FROM execution
               WHERE user_id = o.user_id AND run_id = o.run_id AND order_id = o.order_id) e""",
        "r.name AS run_name",
        "e.commission",
        o="user_id run_id order_id client_order_id logical_time symbol side quantity order_type"
        " time_in_force limit_price stop_price trail_amount trail_percent expire_at triggered_at"
        " status status_at status_reason reject_source reject_code filled_quantity avg_fill_price"
        " recorded_at",
    )


def _events() -> sa.Select[Any]:
    return _select("event_ledger l", l="seq logical_time event_type subject payload recorded_at")


def _select(source: str, *expressions: str, **names: str) -> sa.Select[Any]:
    """``SELECT`` from ``source``: columns by the alias of their table, then expressions."""
    import sqlalchemy

    columns = [f"{alias}.{name}" for alias, listed in names.items() for name in listed.split()]
    return sqlalchemy.select(*map(_column, [*columns, *expressions])).select_from(
        sqlalchemy.text(source)
    )


def _column(name: str) -> sa.ColumnClause[Any]:
    import sqlalchemy

    return sqlalchemy.literal_column(name)


def _of_run(statement: sa.Select[Any], alias: str, run: Run | None) -> sa.Select[Any]:
    if run is None:
        return statement
    return _with_key(statement, alias, {"user_id": run.user_id, "run_id": run.run_id})


def _with_key(statement: sa.Select[Any], alias: str, key: Mapping[str, UUID]) -> sa.Select[Any]:
    return statement.where(*(_column(f"{alias}.{name}") == key[name] for name in key))


def _in_status(statement: sa.Select[Any], column: str, status: str | None) -> sa.Select[Any]:
    return statement if status is None else statement.where(_column(column) == status.upper())


def _require_status(conn: Connection, table: str, status: str | None) -> None:
    # An empty list would hide a slip of the pen.
    if status is None:
        return
    with conn.cursor(row_factory=scalar_row) as cursor:
        known = cursor.execute(*_compiled(_select(table, "status"))).fetchall()
    if status.upper() not in known:
        raise BadInput(f"there is no status {status!r}; use one of {', '.join(sorted(known))}")


@lru_cache(maxsize=1)
def _dialect() -> Any:
    from sqlalchemy.dialects.postgresql import psycopg

    dialect: Any = psycopg.dialect
    return dialect()


def _compiled(statement: sa.Select[Any]) -> tuple[bytes, dict[str, Any]]:
    """The statement's text, as bytes because it is no literal, and its parameters."""
    compiled = statement.compile(dialect=_dialect(), compile_kwargs={"render_postcompile": True})
    return str(compiled).encode(), dict(compiled.params)


def _fetch(conn: Connection, kind: type[Row], statement: sa.Select[Any]) -> list[Row]:
    with conn.cursor(row_factory=class_row(kind)) as cursor:
        return cursor.execute(*_compiled(statement)).fetchall()
