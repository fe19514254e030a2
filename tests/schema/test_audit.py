"""Every audit view finds what it is for: one thing is corrupted past all rules, by the owner.

The triggers are switched off, and on again before the views are asked; where a constraint stands
in the way, it is dropped. All of it happens in a transaction on a filled database and is rolled
back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
from market_cases import BOOK
from psycopg import sql
from schema_cases import BROKER_TABLES, NAMES, RUN_TABLES, findings, rows, said

from engine.db.connect import Connection

VIEWS = (
    "audit_broker",
    "audit_cash",
    "audit_chain",
    "audit_duplicate",
    "audit_event",
    "audit_guard",
    "audit_mark",
    "audit_order",
    "audit_orphan",
    "audit_position",
    "audit_running",
)

# What a forger with all rights does next: every hash is made to fit again.
_RECHAIN = """
DO $$
DECLARE
    e        event_ledger;
    previous bytea;
    of_run   uuid;
BEGIN
    FOR e IN SELECT * FROM event_ledger ORDER BY user_id, run_id, seq LOOP
        IF of_run IS DISTINCT FROM e.run_id THEN
            previous := '';
            of_run := e.run_id;
        END IF;
        previous := event_hash(previous, e.user_id, e.run_id, e.seq, e.logical_time, e.event_type,
                               e.subject, e.payload, e.recorded_at);
        UPDATE event_ledger SET hash = previous
        WHERE user_id = e.user_id AND run_id = e.run_id AND seq = e.seq;
    END LOOP;
END $$;
"""


class Case(NamedTuple):
    """SQL that corrupts one thing, and what which views say about it.

    In ``subject`` a name of ``_EVENTS`` in braces is the number of that event.

    ``also`` names the other views that must see it too; all the rest must stay empty. ``forged``
    is a change of the ledger with all its hashes made anew.
    """

    name: str
    corrupt: str
    view: str
    subject: str
    finding: str
    also: frozenset[str]
    user: str | None
    run: str | None
    forged: bool


def _case(
    name: str,
    view: str,
    corrupt: str,
    subject: str,
    finding: str,
    *also: str,
    user: str | None = "ann",
    run: str | None = "live",
    forged: bool = False,
) -> Case:
    return Case(name, corrupt, view, subject, finding, frozenset(also), user, run, forged)


_LIVE = "user_id = :'ann' AND run_id = :'live'"
_STOPPED = "user_id = :'ann' AND run_id = :'stopped'"
_TICK_1 = f"event_type = 'TICK' AND {_LIVE} AND logical_time = :'t1'"
_SIP = "event_type = 'SIP_EXECUTED'"
# Events that cases are about; their numbers are asked for before anything is corrupted.
_EVENTS: Mapping[str, str] = {
    "sip": f"{_LIVE} AND {_SIP}",
    "canceling": f"{_LIVE} AND event_type = 'ORDER_CANCELED' AND subject = :'canceled'",
    "rejecting": f"{_LIVE} AND event_type = 'ORDER_REJECTED' AND subject = :'rejected'",
    "placing": f"{_LIVE} AND event_type = 'ORDER_PLACED' AND subject = :'resting'",
    "trade": f"{_LIVE} AND event_type = 'EXECUTION' AND subject LIKE '%/X1'",
    "split": f"{_LIVE} AND event_type = 'SPLIT_APPLIED'",
    "end": f"{_STOPPED} AND event_type = 'RUN_STOPPED'",
    "last": f"{_LIVE} ORDER BY seq DESC LIMIT 1",
}
_OF_NOBODY = ":'ann', :'nobody'"


def _update(table: str, change: str, where: str) -> str:
    return f"UPDATE {table} SET {change} WHERE {where};"


def _run(change: str, where: str = _LIVE) -> str:
    return _update("strategy_run", change, where)


def _order(order: str, change: str) -> str:
    return _update("orders", change, f"{_LIVE} AND order_id = :'{order}'")


def _position(change: str) -> str:
    return _update("position", change, f"{_LIVE} AND symbol = 'AAPL'")


def _execution(change: str) -> str:
    return _update("execution", change, f"{_LIVE} AND execution_id = 'X1'")


def _event(change: str, where: str) -> str:
    return _update("event_ledger", change, f"{_LIVE} AND {where}")


def _append(
    event_type: str, subject: str = "", payload: str = "{}", at: str = "t2", where: str = _LIVE
) -> str:
    """An event at the end of a chain."""
    return f"""
        INSERT INTO event_ledger (user_id, run_id, seq, logical_time, event_type, subject, payload,
                                  recorded_at, hash)
        SELECT user_id, run_id, max(seq) + 1, :'{at}', '{event_type}', {subject or "''"},
               '{payload}', now(), sha256('')
        FROM event_ledger WHERE {where} GROUP BY user_id, run_id;"""


def _drop(table: str, *constraints: str) -> str:
    return "".join(f"ALTER TABLE {table} DROP CONSTRAINT {name};" for name in constraints)


def _orphan(table: str, columns: str, values: str, subject: str, *also: str) -> Case:
    name = "execution_belongs_to_order" if table == "execution" else f"{table}_belongs_to_run"
    if table in ("orders", "execution", "mtm_ledger", "event_ledger"):
        columns, values = f"{columns}, recorded_at", f"{values}, now()"
    return _case(
        f"orphan in {table}",
        "audit_orphan",
        _drop(table, name)
        + f"INSERT INTO {table} (user_id, run_id{columns}) VALUES ({_OF_NOBODY}{values});",
        subject,
        "belongs to no run",
        *also,
        run="nobody",
        forged=table == "event_ledger",
    )


_AGREES = _drop("orders", "orders_status_agrees_with_fills")
_PAYLOAD = (
    '{"symbol": "AAPL", "side": "BUY", "quantity": 1, "price": 1, "commission": 0, '
    '"commission_currency": "USD", "event_at": "2024-01-04T21:00:00+00:00"}'
)
_MARK = "user_id, run_id, logical_time, cash, market_value, recorded_at"

ORPHANS = (
    _orphan("engine_state", "", "", "engine_state"),
    _orphan("engine_status", "", "", "engine_status"),
    _orphan(
        "orders",
        ", order_id, symbol, side, quantity, status_at, logical_time",
        ", :'new_order', 'AAPL', 'BUY', 1, :'t0', :'t0'",
        f"orders {NAMES['new_order']}",
        "audit_event",  # nor has it an event
    ),
    _orphan(
        "execution",
        ", execution_id, order_id, symbol, side, quantity, price, commission_currency, "
        "logical_time, event_at",
        ", 'E1', :'new_order', 'AAPL', 'BUY', 1, 1, 'USD', :'t0', :'t0'",
        "execution E1",
        "audit_event",
    ),
    _orphan("position", ", symbol", ", 'MSFT'", "position MSFT"),
    _orphan(
        "mtm_ledger",
        ", logical_time, cash, market_value",
        ", :'t0', 1, 1",
        "mtm_ledger 2024-01-02 21:00:00+00",
    ),
    _orphan(
        "event_ledger",
        ", seq, logical_time, event_type, hash",
        ", 1, :'t0', 'NOTE', sha256('')",
        "event_ledger 1",
    ),
    _orphan(
        "sip_plan",
        ", plan, symbol, amount, start_on",
        ", 'lost', 'AAPL', 1, '2024-01-01'",
        "sip_plan lost",
    ),
    _orphan(
        "split_applied",
        ", symbol, ex_date, logical_time, quantity_before, quantity_after",
        ", 'IBM', '2024-01-05', :'t3', 2, 3",
        "split_applied IBM",
        "audit_event",
    ),
    _orphan(
        "risk_limit",
        ", limit_id, kind, limit_value",
        ", :'new_order', 'MAX_POSITION', 1",
        f"risk_limit {NAMES['new_order']}",
    ),
)

# Of a run's tables at brokers: everything else of the run is there no more either.
ORPHANS_AT_BROKERS = {
    "run_route": "run_route A1",
    "execution_commission": "commission of F.01",
    "order_broker_id": f"order_broker_id {NAMES['o_routed']}",
    "broker_command": "broker_command",
}

RUNS = (
    _case(
        "two RUNNING runs",
        "audit_running",
        "DROP INDEX strategy_run_one_running_per_user;"
        + _run("status = 'RUNNING'", "user_id = :'ann' AND run_id = :'created'"),
        "strategy_run",
        "2 runs are RUNNING",
        run=None,
    ),
    _case("cash", "audit_cash", _run("cash = cash + 0.01"), "cash", "the executions make it"),
    _case(
        "cash of a run without executions",
        "audit_cash",
        _run("cash = 10000.00000001", "user_id = :'ben'"),
        "cash",
        "is 10000.00000001, the executions make it 10000",
        user="ben",
        run="bens",
    ),
    _case(
        "debt in a cash account",
        "audit_cash",
        _drop("strategy_run", "strategy_run_cash_not_negative_in_cash_account") + _run("cash = -5"),
        "cash",
        "is -5 in a cash account",
    ),
    _case(
        "initial cash",
        "audit_cash",
        _run("initial_cash = initial_cash + 1"),
        "cash",
        "the executions make it",
        "audit_mark",  # the ticks told of the cash, too
    ),
    _case(
        "books_seq behind",
        "audit_cash",
        _run("books_seq = books_seq - 1"),
        "books_seq",
        "the last event that the books follow is",
    ),
    _case(
        "books_seq without events",
        "audit_cash",
        _run("books_seq = 7", "user_id = :'ben'"),
        "books_seq",
        "is 7, the last event that the books follow is 0",
        user="ben",
        run="bens",
    ),
    _case(
        "open orders in a stopped run",
        "audit_order",
        _run("status = 'STOPPED', stopped_at = now()"),
        f"order {NAMES['resting']}",
        "is PENDING in a run that is STOPPED",
        "audit_event",
    ),
    _case(
        "open order in a failed run",
        "audit_order",
        _run("status = 'ERROR', stopped_at = now()", "user_id = :'ben'"),
        f"order {NAMES['theirs']}",
        "is NEW in a run that is ERROR",
        "audit_event",
        user="ben",
        run="bens",
    ),
    _case(
        "order of a stopped run opened again",
        "audit_order",
        _update("orders", "status = 'NEW'", f"{_STOPPED} AND status = 'CANCELED'"),
        "order dd000000-0000-0000-0000-000000000002",
        "is NEW in a run that is STOPPED",
        "audit_event",  # its cancel is told
        run="stopped",
    ),
    _case(
        "engine_state's time is later",
        "audit_event",
        _update("engine_state", "last_logical_time = :'t3'", _LIVE),
        "engine_state",
        "stands at 2024-01-05 21:00:00+00, the last TICK is at 2024-01-04 21:00:00+00",
    ),
    _case(
        "engine_state has forgotten its tick",
        "audit_event",
        _update("engine_state", "last_logical_time = NULL", _LIVE),
        "engine_state",
        "the last TICK is at 2024-01-04 21:00:00+00",
    ),
    _case(
        "stopped run goes on",
        "audit_event",
        _run("status = 'CREATED', stopped_at = NULL", _STOPPED),
        "event_ledger {end}",
        "tells of an end, the run is CREATED",
        run="stopped",
    ),
)

ORDERS = (
    _case(
        "filled quantity",
        "audit_order",
        _order("partly", "filled_quantity = 3"),
        f"order {NAMES['partly']}",
        "says 3 filled for 19.5, its executions say 1 for 19.5",
    ),
    _case(
        "filled notional",
        "audit_order",
        _order("partly", "filled_notional = 19"),
        f"order {NAMES['partly']}",
        "says 1 filled for 19, its executions say 1 for 19.5",
    ),
    _case(
        "filled without an execution",
        "audit_order",
        _order("resting", "filled_quantity = quantity, filled_notional = 300, status = 'FILLED'"),
        f"order {NAMES['resting']}",
        "its executions say 0 for 0",
    ),
    _case(
        "FILLED but not filled",
        "audit_order",
        _AGREES + _order("partly", "status = 'FILLED'"),
        f"order {NAMES['partly']}",
        "is FILLED with 1 of 4 filled",
    ),
    _case(
        "PARTIALLY_FILLED with nothing",
        "audit_order",
        _AGREES + _order("resting", "status = 'PARTIALLY_FILLED'"),
        f"order {NAMES['resting']}",
        "is PARTIALLY_FILLED with 0 of",
    ),
    _case(
        "PARTIALLY_FILLED with all",
        "audit_order",
        _AGREES + _order("filled", "status = 'PARTIALLY_FILLED'"),
        f"order {NAMES['filled']}",
        "is PARTIALLY_FILLED with 10 of 10 filled",
    ),
    _case(
        "NEW with a fill",
        "audit_order",
        _AGREES + _order("partly", "status = 'NEW'"),
        f"order {NAMES['partly']}",
        "is NEW with 1 of 4 filled",
    ),
    _case(
        "CANCELED with all filled",
        "audit_order",
        _AGREES + _order("filled", "status = 'CANCELED'"),
        f"order {NAMES['filled']}",
        "is CANCELED with 10 of 10 filled",
        "audit_event",
    ),
    _case(
        "status that no event tells",
        "audit_event",
        _order("partly", "status = 'CANCELED'"),
        f"order {NAMES['partly']}",
        "is CANCELED since 2024-01-02 21:00:00+00, which no event tells",
    ),
    _case(
        "canceled order opened again",
        "audit_event",
        _order("canceled", "status = 'NEW'"),
        "event_ledger {canceling}",
        "tells of an order that is NEW",
    ),
    _case(
        "rejected order opened again",
        "audit_event",
        _drop("orders", "orders_quantity_positive_unless_rejected")
        + _AGREES
        + _order("rejected", "status = 'EXPIRED', reject_source = NULL, reject_code = NULL"),
        "event_ledger {rejecting}",
        "tells of an order that is EXPIRED",
        "audit_order",  # none of its zero units are missing
    ),
    *(
        _case(
            f"order's {change.partition(' ')[0]}",
            "audit_event",
            _order(order, change),
            f"order {NAMES[order]}",
            "is not what its event tells",
        )
        for order, change in (
            ("partly", "limit_price = 21"),
            ("partly", "quantity = 5"),
            ("partly", "time_in_force = 'GTC'"),
            ("partly", "client_order_id = 'other'"),
            ("resting", "symbol = 'MSFT'"),
            ("resting", "side = 'SELL'"),
            ("resting", "order_type = 'STOP_LIMIT'"),
            ("stop", "stop_price = 81"),
            ("trailing", "trail_amount = 11"),
            ("trailing", "trail_percent = 5"),
        )
    ),
    _case(
        "order is gone",
        "audit_event",
        f"DELETE FROM orders WHERE {_LIVE} AND order_id = :'resting';",
        "event_ledger {placing}",
        "tells of an order that is not there",
    ),
)

EXECUTIONS = (
    _case(
        "execution's price",
        "audit_event",
        _execution("price = price + 1"),
        "execution X1",
        "has no event, or one that says otherwise",
        "audit_order",
        "audit_cash",
    ),
    _case(
        "execution's commission",
        "audit_cash",
        _execution("commission = 0"),
        "cash",
        "the executions make it",
        "audit_event",
    ),
    _case(
        "execution's side",
        "audit_order",
        _execution("side = 'SELL'"),
        "execution X1",
        "is SELL AAPL, its order BUY AAPL",
        "audit_event",
        "audit_cash",
    ),
    _case(
        "execution's symbol",
        "audit_order",
        _execution("symbol = 'MSFT'"),
        "execution X1",
        "is BUY MSFT, its order BUY AAPL",
        "audit_event",
    ),
    _case(
        "execution's moment",
        "audit_event",
        _execution("event_at = :'t1'"),
        "execution X1",
        "has no event, or one that says otherwise",
    ),
    _case(
        "execution is gone",
        "audit_event",
        f"DELETE FROM execution WHERE {_LIVE} AND execution_id = 'X1';",
        "event_ledger {trade}",
        "tells of an execution that is not there",
        "audit_order",
        "audit_cash",
    ),
    _case(
        "execution without event",
        "audit_event",
        "INSERT INTO execution (user_id, run_id, order_id, execution_id, symbol, side, quantity, "
        "price, commission_currency, logical_time, event_at, recorded_at) "
        "VALUES (:'ann', :'live', :'partly', 'X9', 'IBM', 'BUY', 1, 20, 'USD', :'t2', :'t2', "
        "now());",
        "execution X9",
        "has no event, or one that says otherwise",
        "audit_order",
        "audit_cash",
    ),
)

POSITIONS = (
    _case(
        "position's quantity",
        "audit_position",
        _position("quantity = quantity + 1"),
        "position AAPL",
        "is 31.00000000 at cost",
    ),
    _case(
        "position's cost",
        "audit_position",
        _position("cost_basis = cost_basis + 0.000000000001"),
        "position AAPL",
        "the ledger makes it 30.00000000 at",
    ),
    _case(
        "position's profit",
        "audit_position",
        _position("realized_pnl = 1"),
        "position AAPL",
        "with 1 realised, the ledger makes it",
    ),
    _case(
        "position is gone",
        "audit_position",
        f"DELETE FROM position WHERE {_LIVE} AND symbol = 'IBM';",
        "position IBM",
        "is 0 at cost 0 with 0 realised, the ledger makes it 1 at 19.5 with 0",
    ),
    _case(
        "position that nobody traded",
        "audit_position",
        "INSERT INTO position (user_id, run_id, symbol, quantity, cost_basis, mark_price, "
        "marked_at) VALUES (:'ann', :'live', 'MSFT', 1, 200, 200, :'t2');",
        "position MSFT",
        "is 1 at cost 200 with 0 realised, the ledger makes it 0 at 0 with 0",
    ),
    _case(
        "short position",
        "audit_position",
        _update("position", "quantity = -2", "user_id = :'max'"),
        "position AAPL",
        "the ledger makes it -3 at -300 with 0",
        user="max",
        run="margin",
    ),
    _case(
        "split's quantity",
        "audit_event",
        _update("split_applied", "quantity_after = 31", _LIVE),
        "split_applied AAPL@2024-01-04",
        "has no event, or one that says otherwise",
    ),
    _case(
        "split is gone",
        "audit_event",
        f"DELETE FROM split_applied WHERE {_LIVE};",
        "event_ledger {split}",
        "tells of a split that is not there",
    ),
)

MARKS = (
    _case(
        "mark's cash",
        "audit_mark",
        _update("mtm_ledger", "cash = cash + 1", f"{_LIVE} AND logical_time = :'t1'"),
        "event_ledger TICK 2024-01-03 21:00:00+00",
        "the mark says",
    ),
    _case(
        "mark's parts, with the same sum",
        "audit_mark",
        _update(
            "mtm_ledger",
            "cash = cash + 1, market_value = market_value - 1",
            f"{_LIVE} AND logical_time = :'t1'",
        ),
        "event_ledger TICK 2024-01-03 21:00:00+00",
        "the mark says",
    ),
    _case(
        "mark's equity",
        "audit_mark",
        "ALTER TABLE mtm_ledger ALTER COLUMN equity DROP EXPRESSION;"
        + _update("mtm_ledger", "equity = 0", _STOPPED),
        "mtm_ledger 2024-01-02 21:00:00+00",
        "equity 0 is not cash",
        run="stopped",
    ),
    _case(
        "mark is gone",
        "audit_mark",
        f"DELETE FROM mtm_ledger WHERE {_LIVE} AND logical_time = :'t1';",
        "event_ledger TICK 2024-01-03 21:00:00+00",
        "the mark says",
    ),
    _case(
        "tick's equity",
        "audit_mark",
        _update("event_ledger", "payload = jsonb_set(payload, '{equity}', '1')", _TICK_1),
        "event_ledger TICK 2024-01-03 21:00:00+00",
        "says equity 1, the mark says",
        forged=True,
    ),
    _case(
        "tick without its cash",
        "audit_mark",
        _update("event_ledger", "payload = payload - 'cash'", _TICK_1),
        "event_ledger TICK 2024-01-03 21:00:00+00",
        "the mark says",
        forged=True,
    ),
    _case(
        "tick and mark tell the same lie",
        "audit_mark",
        _update("mtm_ledger", "cash = 5", f"{_LIVE} AND logical_time = :'t1'")
        + """UPDATE event_ledger t
             SET payload = jsonb_build_object('cash', m.cash, 'market_value', m.market_value,
                                              'equity', m.equity)
             FROM mtm_ledger m
             WHERE m.run_id = t.run_id AND m.logical_time = t.logical_time
               AND t.event_type = 'TICK' AND t.run_id = :'live' AND t.logical_time = :'t1';""",
        "event_ledger TICK 2024-01-03 21:00:00+00",
        "says cash 5, the executions before it make it",
        forged=True,
    ),
)

_DUPLICATE = _drop("event_ledger", "event_ledger_once_per_logical_time")

DUPLICATES = (
    _case(
        "marked twice",
        "audit_duplicate",
        _drop("mtm_ledger", "mtm_ledger_one_per_logical_time")
        + f"INSERT INTO mtm_ledger ({_MARK}) SELECT {_MARK} FROM mtm_ledger "
        f"WHERE {_LIVE} AND logical_time = :'t1';",
        "mtm_ledger 2024-01-03 21:00:00+00",
        "marked 2 times",
    ),
    _case(
        "ticked twice",
        "audit_duplicate",
        _DUPLICATE + _append("TICK"),
        "event_ledger TICK 2024-01-04 21:00:00+00",
        "ticked 2 times",
        forged=True,
    ),
    _case(
        "plan's occasion twice",
        "audit_duplicate",
        "DROP INDEX event_ledger_occasion_once;" + _append("SIP_SKIPPED", "'apples@2024-01'"),
        "event_ledger apples@2024-01",
        "happened 2 times",
        forged=True,
    ),
    _case(
        "rebalanced twice",
        "audit_duplicate",
        "DROP INDEX event_ledger_occasion_once;"
        + _append("REBALANCED", "'2024-W01'")
        + _append("REBALANCED", "'2024-W01'", at="t3"),
        "event_ledger 2024-W01",
        "happened 2 times",
        forged=True,
    ),
)


CHAIN = (
    *(
        _case(
            f"event's {change.partition(' ')[0]}",
            "audit_chain",
            _event(change, _SIP),
            "event_ledger {sip}",
            "its hash is wrong",
        )
        for change in (
            "hash = sha256('')",
            """payload = '{"amount": 1}'""",
            "subject = 'apples@2024-02'",
            "event_type = 'NOTE'",
            "recorded_at = recorded_at + interval '1 microsecond'",
            "logical_time = logical_time + interval '1 microsecond'",
        )
    ),
    _case(
        "first event's payload",
        "audit_chain",
        _event("""payload = payload || '{"more": 1}'""", "seq = 1"),
        "event_ledger 1",
        "its hash is wrong",
    ),
    _case(
        "event is gone",
        "audit_chain",
        f"DELETE FROM event_ledger WHERE {_LIVE} AND {_SIP};",
        "event_ledger {last}",
        "in the chain",
    ),
    _case(
        "event is gone and the hashes are made anew",
        "audit_chain",
        f"DELETE FROM event_ledger WHERE {_LIVE} AND {_SIP};",
        "event_ledger {last}",
        "in the chain",
        forged=True,
    ),
    _case(
        "first event is gone",
        "audit_chain",
        f"DELETE FROM event_ledger WHERE {_LIVE} AND seq = 1;",
        "event_ledger 2",
        "is number 1 in the chain",
        "audit_event",  # it told of an order
    ),
    _case(
        "time goes backwards",
        "audit_chain",
        _event("logical_time = :'t0'", _SIP),
        "event_ledger {sip}",
        "is earlier than the event before it",
        forged=True,
    ),
)

LEDGER = (
    _case(
        "no ORDER_PLACED event",
        "audit_event",
        _event("event_type = 'NOTE'", "event_type = 'ORDER_PLACED' AND subject = :'filled'"),
        f"order {NAMES['filled']}",
        "has no event of its placing",
        forged=True,
    ),
    _case(
        "no ORDER_REJECTED event",
        "audit_event",
        _event("event_type = 'NOTE'", "event_type = 'ORDER_REJECTED'"),
        f"order {NAMES['rejected']}",
        "is REJECTED since 2024-01-02 21:00:00+00, which no event tells",
        forged=True,
    ),
    _case(
        "ORDER_PLACED tells of another price",
        "audit_event",
        _event(
            "payload = jsonb_set(payload, '{limit_price}', '19')",
            "event_type = 'ORDER_PLACED' AND subject = :'partly'",
        ),
        f"order {NAMES['partly']}",
        "is not what its event tells",
        forged=True,
    ),
    _case(
        "ORDER_PLACED without its order",
        "audit_event",
        _append("ORDER_PLACED", ":'new_order'"),
        "event_ledger {last+1}",
        "tells of an order that is not there",
        forged=True,
    ),
    _case(
        "ORDER_CANCELED of an open order",
        "audit_event",
        _append("ORDER_CANCELED", ":'partly'"),
        "event_ledger {last+1}",
        "tells of an order that is PARTIALLY_FILLED",
        forged=True,
    ),
    _case(
        "EXECUTION without its row",
        "audit_event",
        _append("EXECUTION", ":'partly' || '/X9'", _PAYLOAD),
        "event_ledger {last+1}",
        "tells of an execution that is not there",
        "audit_cash",
        "audit_position",
        forged=True,
    ),
    _case(
        "EXECUTION tells of another price",
        "audit_event",
        _event(
            "payload = jsonb_set(payload, '{price}', '1')",
            "event_type = 'EXECUTION' AND subject LIKE '%/X1'",
        ),
        "execution X1",
        "has no event, or one that says otherwise",
        "audit_position",
        "audit_mark",
        forged=True,
    ),
    _case(
        "SPLIT_APPLIED without its row",
        "audit_event",
        _append(
            "SPLIT_APPLIED",
            "'MSFT@2024-01-04'",
            '{"symbol": "MSFT", "ex_date": "2024-01-04", "numerator": 2, "denominator": 1, '
            '"quantity_before": 0, "quantity_after": 0}',
        ),
        "event_ledger {last+1}",
        "tells of a split that is not there",
        "audit_cash",  # the books have not followed it
        forged=True,
    ),
    _case(
        "last TICK is no tick",
        "audit_event",
        _event("event_type = 'NOTE'", "event_type = 'TICK' AND logical_time = :'t2'"),
        "engine_state",
        "the last TICK is at 2024-01-03 21:00:00+00",
        forged=True,
    ),
    _case(
        "RUN_STOPPED of a run that goes on",
        "audit_event",
        _append("RUN_STOPPED"),
        "event_ledger {last+1}",
        "tells of an end, the run is RUNNING",
        forged=True,
    ),
    _case(
        "end of a stopped run cut off",
        "audit_event",
        f"DELETE FROM event_ledger WHERE {_EVENTS['end']};",
        "strategy_run",
        "is STOPPED, its last event is ORDER_CANCELED",
        run="stopped",
    ),
    _case(
        "RUN_ERROR of a run that stopped",
        "audit_event",
        _update("event_ledger", "event_type = 'RUN_ERROR'", _EVENTS["end"]),
        "event_ledger {end}",
        "tells of an end, the run is STOPPED",
        run="stopped",
        forged=True,
    ),
    _case(
        "event after the end",
        "audit_event",
        _append("NOTE", where=_STOPPED),
        "event_ledger {end}",
        "tells of an end, the run is STOPPED and its last event is",
        run="stopped",
        forged=True,
    ),
)

_ADD_UNCHECKED = "ALTER TABLE {} ADD CONSTRAINT {} CHECK (true) NOT VALID;"

# Here the guards themselves are what is corrupted, and stay so.
GUARDS = tuple(
    _case(name, "audit_guard", corrupt, subject, finding, user=None, run=None)
    for name, corrupt, subject, finding in (
        (
            "trigger off",
            "ALTER TABLE orders DISABLE TRIGGER orders_b_pass_gate;",
            "trigger orders_b_pass_gate of orders",
            "is switched off",
        ),
        (
            "trigger for replicas only",
            "ALTER TABLE mtm_ledger ENABLE REPLICA TRIGGER mtm_ledger_z_refuse_change;",
            "trigger mtm_ledger_z_refuse_change of mtm_ledger",
            "is switched off",
        ),
        (
            "all triggers of a table off",
            "ALTER TABLE event_ledger DISABLE TRIGGER USER;",
            "trigger event_ledger_a_append of event_ledger",
            "is switched off",
        ),
        (
            "constraint unchecked",
            _drop("strategy_run", "strategy_run_cash_not_negative_in_cash_account")
            + _ADD_UNCHECKED.format(
                "strategy_run", "strategy_run_cash_not_negative_in_cash_account"
            ),
            "constraint strategy_run_cash_not_negative_in_cash_account of strategy_run",
            "was not checked",
        ),
        (
            "table behind a table",
            "CREATE TABLE public.behind () INHERITS (public.orders);",
            "table behind",
            "puts rows into orders past its triggers",
        ),
        (
            "somebody is the keeper",
            "GRANT oms_keeper TO oms_auditor;",
            "role oms_auditor",
            "may write what nobody proves",
        ),
        (
            "the keeper has another function",
            """CREATE FUNCTION public.more() RETURNS void LANGUAGE sql AS '';
            GRANT oms_keeper TO oms_owner; GRANT CREATE ON SCHEMA public TO oms_keeper;
            ALTER FUNCTION public.more OWNER TO oms_keeper; REVOKE oms_keeper FROM oms_owner;""",
            "function more()",
            "writes what nobody proves",
        ),
    )
)

CASES = (
    *GUARDS,
    *ORPHANS,
    *RUNS,
    *ORDERS,
    *EXECUTIONS,
    *POSITIONS,
    *MARKS,
    *DUPLICATES,
    *CHAIN,
    *LEDGER,
)


# --- What lives at a broker ---------------------------------------------------------------------

_DEALS = "user_id = :'dan' AND run_id = :'deals'"


def _at_broker(
    name: str, corrupt: str, subject: str, finding: str, *also: str, forged: bool = False
) -> Case:
    return _case(
        name,
        "audit_broker",
        corrupt,
        subject,
        finding,
        *also,
        user="dan",
        run="deals",
        forged=forged,
    )


def _told(event_type: str, subject: str, payload: str) -> str:
    """An event at the end of Dan's chain, which the books are said to follow."""
    return f"""
        INSERT INTO event_ledger (user_id, run_id, seq, logical_time, event_type, subject, payload,
                                  recorded_at, hash)
        SELECT l.user_id, l.run_id, l.seq + 1, l.logical_time, '{event_type}', {subject},
               ({payload}), now(), sha256('')
        FROM event_ledger l WHERE {_DEALS} ORDER BY l.seq DESC LIMIT 1;
        UPDATE strategy_run SET books_seq = (SELECT max(seq) FROM event_ledger WHERE {_DEALS})
        WHERE {_DEALS};"""


# All that follows from a fill, written by somebody who knows what the other views look at.
_FILL = f"""
    {BOOK}, symbol, side, commission_currency, logical_time, recorded_at)
    VALUES (:'dan', :'deals', :'o_routed', 'Z.01', 3, 20, :'t1', 'AAPL', 'BUY', 'USD',
            run_last_time(:'dan', :'deals'), now());
    UPDATE orders SET filled_quantity = 3, filled_notional = 60, status = 'PARTIALLY_FILLED'
    WHERE {_DEALS} AND order_id = :'o_routed';
    UPDATE position SET quantity = quantity + 3, cost_basis = cost_basis + 60 WHERE {_DEALS};
    {_run("cash = cash - 60", _DEALS)}"""
_REBATE = f"""
    INSERT INTO execution_commission (user_id, run_id, execution_id, amount, currency, rate, cost,
                                      logical_time, event_at)
    VALUES (:'dan', :'deals', 'P.01', -1000, 'USD', 1, -1000,
            run_last_time(:'dan', :'deals'), :'t1');
    {_run("cash = cash + 1000", _DEALS)}"""
_REVERSAL = f"""
    {BOOK}, symbol, side, commission_currency, logical_time, recorded_at, reverses)
    VALUES (:'dan', :'deals', :'o_partly', 'P.01-R', -4, 20, :'t1', 'AAPL', 'BUY', 'USD',
            run_last_time(:'dan', :'deals'), now(), 'P.01');
    UPDATE orders SET filled_quantity = 0, filled_notional = 0, status = 'ROUTED',
                      status_at = run_last_time(user_id, run_id)
    WHERE {_DEALS} AND order_id = :'o_partly';
    UPDATE position SET quantity = quantity - 4, cost_basis = cost_basis - 80 WHERE {_DEALS};
    {_run("cash = cash + 80", _DEALS)}"""


def _row_of(execution: str) -> str:
    return f"FROM execution e WHERE {_DEALS} AND execution_id = '{execution}'"


AT_BROKERS = (
    _at_broker(
        "a fill, all books and hashes made to fit",
        _FILL
        + _told(
            "EXECUTION",
            ":'o_routed' || '/Z.01'",
            f"SELECT execution_event_payload(e) {_row_of('Z.01')}",
        ),
        "execution Z.01",
        "no broker said BUY of 3 at 20",
        forged=True,
    ),
    _at_broker(
        "a fill taken back, all books and hashes made to fit",
        _REVERSAL
        + _told(
            "EXECUTION",
            ":'o_partly' || '/P.01-R'",
            f"SELECT execution_event_payload(e) {_row_of('P.01-R')}",
        ),
        "execution P.01-R",
        "no broker took back P.01",
        forged=True,
    ),
    _at_broker(
        "a commission, cash and hashes made to fit",
        _REBATE
        + _told(
            "COMMISSION",
            "'P.01'",
            "SELECT execution_commission_payload(c) FROM execution_commission c "
            f"WHERE {_DEALS} AND execution_id = 'P.01'",
        ),
        "commission of P.01",
        "no broker said -1000 USD",
        forged=True,
    ),
    _at_broker(
        "the broker's word on a fill",
        _update("broker_event", 'payload = payload || \'{"price": "1"}\'', "execution_id = 'F.01'"),
        "execution F.01",
        "no broker said BUY of 10 at 20",
    ),
    _at_broker(
        "the broker's word on a fill gone",
        "DELETE FROM broker_event WHERE execution_id = 'F.01';",
        "execution F.01",
        "no broker said",
    ),
    _at_broker(
        "what waits in the outbox is more than was ordered",
        _update(
            "broker_command",
            "command_id = :'new_order', payload = payload || '{\"quantity\": \"1000\"}'",
            "order_id = :'o_waits'",
        ),
        f"broker_command {NAMES['new_order']}",
        "is a SUBMIT that its order, NEW at A1, does not bear out",
    ),
    _at_broker(
        "what went was something else",
        _update(
            "broker_command",
            "command_id = :'new_order', payload = payload || '{\"side\": \"SELL\"}'",
            "order_id = :'o_routed'",
        ),
        f"broker_command {NAMES['new_order']}",
        "is a SUBMIT that its order, ROUTED at A1, does not bear out",
    ),
    _at_broker(
        "what waits is over",
        _update("broker_command", "command_id = :'new_order'", "order_id = :'o_waits'")
        + _update("orders", "status = 'CANCELED'", "order_id = :'o_waits'"),
        f"broker_command {NAMES['new_order']}",
        "is a SUBMIT that its order, CANCELED at A1, does not bear out",
        "audit_event",
    ),
    _at_broker(
        "a submit gone",
        "DELETE FROM broker_command WHERE order_id = :'o_waits';",
        f"order {NAMES['o_waits']}",
        "is NEW at A1 and no command sent it there",
    ),
    _at_broker(
        "an order at another account",
        _update("orders", "account = 'A3'", "order_id = :'o_routed'"),
        f"order {NAMES['o_routed']}",
        "is ROUTED at A3 and no command sent it there",
    ),
    _at_broker(
        "a cancel gone",
        "DELETE FROM broker_command WHERE order_id = :'o_canceling' AND kind = 'CANCEL';",
        f"order {NAMES['o_canceling']}",
        "is PENDING_CANCEL and no command asks for it",
    ),
    _at_broker(
        "an account at another broker",
        _update("broker_account", "broker = 'ibkr'", "user_id = :'dan' AND account = 'A1'"),
        f"order {NAMES['o_routed']}",
        "of a run at dummy is at A1, which is at ibkr",
    ),
    _at_broker(
        "an id that no broker gave",
        _update("orders", "perm_id = 7", "order_id = :'o_routed'"),
        f"order {NAMES['o_routed']}",
        "and 7, under which no broker knows it",
    ),
    *(
        _case(
            f"a {kind} applied and not booked",
            "audit_broker",
            _update(
                "broker_event",
                f"applied_at = now(), finding = '{finding}'",
                f"user_id = :'dan' AND kind = '{kind}' AND execution_id = '{execution}'",
            ),
            f"broker_event {number} of A1",
            f"is a {kind} that was found {finding}, and no book has it",
            user="dan",
            run=None,
        )
        for kind, finding, execution, number in (
            ("EXECUTION", "NEW", "U.01", 11),
            ("EXECUTION", "CORRECTION", "C.02", 14),
            ("EXECUTION", "ORPHAN", "O.01", 15),
            ("COMMISSION", "NEW", "F.01", 12),
            ("BUST", "CORRECTION", "B.01", 13),
        )
    ),
)


@pytest.mark.parametrize("case", AT_BROKERS, ids=[case.name for case in AT_BROKERS])
def test_corruption_of_what_is_at_a_broker_is_found(market: Connection, case: Case) -> None:
    _assert_found(market, case)


def _views(conn: Connection) -> list[str]:
    return [
        str(view)
        for (view,) in rows(
            conn,
            "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace "
            "AND relkind = 'v' AND relname LIKE 'audit\\_%' ORDER BY relname",
        )
    ]


def _subject(conn: Connection, text: str) -> str:
    """A subject with the numbers of its events."""

    def number(named: re.Match[str]) -> str:
        ((seq,),) = rows(conn, f"SELECT seq FROM event_ledger WHERE {_EVENTS[named[1]]}")
        return str(seq + int(named[2] or 0))

    return re.sub(r"\{(\w+)(\+\d+)?\}", number, text)


def _found(conn: Connection, view: str) -> list[tuple[Any, ...]]:
    """User, run, subject and finding of a view's rows."""
    query = sql.SQL("SELECT user_id::text, run_id::text, subject, finding FROM public.{}")
    return conn.execute(query.format(sql.Identifier(view))).fetchall()


def _switch_triggers(conn: Connection, how: str) -> None:
    for table in (*RUN_TABLES, *BROKER_TABLES, "broker_command", "broker_event"):
        conn.execute(
            sql.SQL("ALTER TABLE public.{} {} TRIGGER USER").format(
                sql.Identifier(table), sql.SQL(how)
            )
        )


@contextmanager
def _without_triggers(conn: Connection) -> Iterator[None]:
    _switch_triggers(conn, "DISABLE")
    yield
    _switch_triggers(conn, "ENABLE")


def _corrupt(conn: Connection, case: Case) -> None:
    with nullcontext() if case in GUARDS else _without_triggers(conn):
        conn.execute(said(case.corrupt))
        if case.forged:
            conn.execute(_RECHAIN.encode())


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_corruption_is_found_by_its_view(world: Connection, case: Case) -> None:
    _assert_found(world, case)


def _assert_found(conn: Connection, case: Case) -> None:
    subject = _subject(conn, case.subject)
    _corrupt(conn, case)
    found = {view: _found(conn, view) for view in _views(conn)}
    assert {view for view, rows_ in found.items() if rows_} == {case.view, *case.also}, found
    about = {(row[0], row[1]) for rows_ in found.values() for row in rows_}
    assert about == {(case.user and NAMES[case.user], case.run and NAMES[case.run])}, found
    assert any(row[2] == subject and case.finding in row[3] for row in found[case.view]), found


def test_corrupted_event_is_named_by_its_number(world: Connection) -> None:
    ((seq,),) = rows(world, f"SELECT seq FROM event_ledger WHERE {_LIVE} AND {_SIP}")
    with _without_triggers(world):
        world.execute(said(_event("hash = sha256('')", _SIP)))
    # The next one was chained to the true hash, the one after it is whole again.
    assert sorted(row[2] for row in _found(world, "audit_chain")) == sorted(
        [f"event_ledger {seq}", f"event_ledger {seq + 1}"]
    )


def test_missing_event_is_named_by_all_that_follow_it(world: Connection) -> None:
    ((seq, last),) = rows(
        world,
        f"SELECT (SELECT seq FROM event_ledger WHERE {_LIVE} AND {_SIP}), max(seq) "
        f"FROM event_ledger WHERE {_LIVE}",
    )
    with _without_triggers(world):
        world.execute(said(f"DELETE FROM event_ledger WHERE {_LIVE} AND {_SIP}"))
    assert {(row[2], row[3]) for row in _found(world, "audit_chain")} == {
        (f"event_ledger {number}", f"is number {number - 1} in the chain")
        for number in range(seq + 1, last + 1)
    }


def test_run_that_is_gone_leaves_an_orphan_in_every_table(world: Connection) -> None:
    children = [table for table in RUN_TABLES if table != "strategy_run"]
    with _without_triggers(world):
        for table in children:
            if table != "execution":
                world.execute(_drop(table, f"{table}_belongs_to_run").encode())
        world.execute(said(f"DELETE FROM strategy_run WHERE {_LIVE}"))
    tables = {row[2].partition(" ")[0] for row in _found(world, "audit_orphan")}
    assert tables == set(children)


def test_a_run_that_is_gone_leaves_an_orphan_in_every_table_of_brokers(
    market: Connection,
) -> None:
    with _without_triggers(market):
        for table, name in (
            ("run_route", "run_route_belongs_to_run"),
            ("execution_commission", "execution_commission_of_execution"),
            ("order_broker_id", "order_broker_id_of_order"),
            ("broker_command", "broker_command_of_order"),
        ):
            market.execute(_drop(table, name).encode())
        market.execute(
            said(
                "INSERT INTO execution_commission (user_id, run_id, execution_id, amount, "
                "currency, rate, cost, logical_time, event_at) "
                "VALUES (:'dan', :'deals', 'F.01', 1, 'USD', 1, 1, :'t1', :'t1'); "
                "INSERT INTO order_broker_id (user_id, run_id, order_id, account, perm_id, since) "
                "VALUES (:'dan', :'deals', :'o_routed', 'A1', 7, :'t1'); "
                f"DELETE FROM strategy_run WHERE {_DEALS}"
            )
        )
    found = [row[2] for row in _found(market, "audit_orphan")]
    for subject in ORPHANS_AT_BROKERS.values():
        assert any(named.startswith(subject) for named in found), subject


def test_several_corrupted_runs_are_each_named(world: Connection) -> None:
    with _without_triggers(world):
        world.execute(said(_run("cash = cash + 1", "status = 'RUNNING'")))
    assert {(row[0], row[1]) for row in _found(world, "audit_cash")} == {
        (NAMES["ann"], NAMES["live"]),
        (NAMES["ben"], NAMES["bens"]),
        (NAMES["max"], NAMES["margin"]),
    }


@pytest.mark.parametrize("view", VIEWS)
def test_clean_data_gives_no_rows(world: Connection, view: str) -> None:
    assert _found(world, view) == []


@pytest.mark.parametrize("view", VIEWS)
def test_empty_database_gives_no_rows(conn: Connection, view: str) -> None:
    assert _found(conn, view) == []


def test_switching_off_and_rechaining_alone_gives_no_rows(world: Connection) -> None:
    # Else the forged cases would prove nothing.
    before = rows(world, "SELECT user_id, run_id, seq, hash FROM event_ledger ORDER BY 1, 2, 3")
    with _without_triggers(world):
        world.execute(_RECHAIN.encode())
    assert findings(world) == []
    after = rows(world, "SELECT user_id, run_id, seq, hash FROM event_ledger ORDER BY 1, 2, 3")
    assert after == before


def test_every_view_is_corrupted_by_a_case(conn: Connection) -> None:
    cases = (*CASES, *AT_BROKERS)
    assert _views(conn) == sorted({case.view for case in cases}) == list(VIEWS)
