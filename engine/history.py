"""A run's history, read from its ledger and marks, as the report wants it."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime
from decimal import Decimal
from uuid import UUID

from engine.db.connect import Connection, snapshot
from engine.report.model import EquityPoint, Holding, PositionPoint, RunHistory, SipMark
from engine.runs import Run, find_run


def read_history(conn: Connection, user_id: UUID, run_id: UUID) -> RunHistory:
    """All that a report says about a run. Raises BadInput for an unknown one."""
    with snapshot(conn):
        run = find_run(conn, run_id)
        equity = _equity(conn, run)
        orders, executions, ticks = _counts(conn, run)
        return RunHistory(
            name=run.name or str(run.run_id),
            run_id=str(run.run_id),
            user_id=str(user_id),
            strategy=run.strategy,
            calendar=run.calendar,
            currency=run.currency,
            initial_cash=run.initial_cash,
            equity=equity,
            positions=_positions(conn, run),
            sips=_sips(conn, run),
            holdings=_holdings(conn, run),
            cash_flows=_cash_flows(conn, run),
            orders=orders,
            executions=executions,
            ticks=ticks,
            first_at=equity[0].at if equity else None,
            last_at=equity[-1].at if equity else None,
        )


def _key(run: Run) -> list[UUID]:
    return [run.user_id, run.run_id]


def _equity(conn: Connection, run: Run) -> list[EquityPoint]:
    rows = conn.execute(
        """SELECT logical_time, cash, market_value, equity FROM mtm_ledger
           WHERE user_id = %s AND run_id = %s ORDER BY logical_time""",
        _key(run),
    )
    return [
        EquityPoint(at, cash, market_value, equity, run.initial_cash - cash)
        for at, cash, market_value, equity in rows
    ]


def _counts(conn: Connection, run: Run) -> tuple[int, int, int]:
    row = conn.execute(
        """SELECT (SELECT count(*) FROM orders WHERE user_id = %(user)s AND run_id = %(run)s),
                  (SELECT count(*) FROM execution WHERE user_id = %(user)s AND run_id = %(run)s),
                  (SELECT count(*) FROM event_ledger WHERE user_id = %(user)s
                   AND run_id = %(run)s AND event_type = 'TICK')""",
        {"user": run.user_id, "run": run.run_id},
    ).fetchone()
    assert row is not None
    return row[0], row[1], row[2]


def _positions(conn: Connection, run: Run) -> list[PositionPoint]:
    """Quantities by executions and splits, valued at the prices of each tick."""
    rows = conn.execute(
        # Numbers inside jsonb would come as floats.
        """SELECT logical_time, event_type, payload ->> 'symbol', payload ->> 'side',
                  coalesce(payload ->> 'quantity_after', payload ->> 'quantity')::numeric,
                  payload -> 'prices'
           FROM event_ledger
           WHERE user_id = %s AND run_id = %s
             AND event_type IN ('EXECUTION', 'SPLIT_APPLIED', 'TICK') ORDER BY seq""",
        _key(run),
    )
    held: dict[str, Decimal] = defaultdict(Decimal)
    points = []
    for at, event_type, symbol, side, quantity, prices in rows:
        if event_type == "SPLIT_APPLIED":
            held[symbol] = quantity
        elif event_type == "EXECUTION":
            held[symbol] += quantity if side == "BUY" else -quantity
            if held[symbol] == 0:
                points.append(PositionPoint(at, symbol, Decimal(0), Decimal(0)))
        else:
            points += [
                PositionPoint(at, priced, held[priced], held[priced] * Decimal(price))
                for priced, price in (prices or {}).items()
                if priced in held
            ]
    return points


def _sips(conn: Connection, run: Run) -> list[SipMark]:
    rows = conn.execute(
        """SELECT logical_time, payload ->> 'symbol',
                  (payload ->> 'quantity')::numeric * (payload ->> 'price')::numeric,
                  (payload ->> 'price')::numeric
           FROM event_ledger
           WHERE user_id = %s AND run_id = %s AND event_type = 'SIP_EXECUTED' ORDER BY seq""",
        _key(run),
    )
    return [SipMark(*row) for row in rows]


def _holdings(conn: Connection, run: Run) -> list[Holding]:
    rows = conn.execute(
        """SELECT symbol, quantity, coalesce(avg_cost, 0), coalesce(mark_price, 0),
                  coalesce(market_value, 0), coalesce(market_value, 0) - cost_basis, realized_pnl
           FROM position WHERE user_id = %s AND run_id = %s ORDER BY symbol""",
        _key(run),
    )
    return [Holding(*row) for row in rows]


def _cash_flows(conn: Connection, run: Run) -> list[tuple[datetime, Decimal]]:
    return conn.execute(
        """SELECT logical_time, sum(execution_cash_flow(side, quantity, price, commission))
           FROM execution WHERE user_id = %s AND run_id = %s
           GROUP BY logical_time ORDER BY logical_time""",
        _key(run),
    ).fetchall()
