"""A database with a bit of everything in it, and the means to attack it in plain SQL."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import tuple_row

from engine.db.connect import Connection
from engine.errors import ConfigurationError, EngineError, RuleViolation, typed

DENIED = "permission denied"

ROLES = ("oms_owner", "oms_engine")

# Tables of a run, in the order in which a run fills them.
RUN_TABLES = (
    "strategy_run",
    "engine_state",
    "engine_status",
    "orders",
    "execution",
    "position",
    "split_applied",
    "mtm_ledger",
    "event_ledger",
    "sip_plan",
    "risk_limit",
)
# What belongs to a run at a broker or with many open orders, and what to a user's account there.
BROKER_TABLES = ("run_route", "execution_commission", "order_broker_id", "open_order_sum")
ACCOUNT_TABLES = (
    "broker_account",
    "broker_lease",
    "broker_command",
    "broker_event",
    "alert",
    "trading_halt",
    "circuit_breaker",
    "equity_peak",
    "flatten_request",
    "reconciliation",
    "reconciliation_difference",
)
HISTORY = ("execution", "event_ledger", "mtm_ledger", "split_applied")
LOOKUPS = (
    "instrument",
    "calendar_session",
    "price_bar",
    "corporate_action",
    "run_status",
    "run_transition",
    "order_status",
    "order_transition",
    "command_kind",
    "fx_rate",
    "system_halt",
    "breaker_kind",
    "limit_kind",
)

# The people of the world and their runs. Times are in January 2024.
NAMES: Mapping[str, str] = {
    "ann": "0a000000-0000-0000-0000-000000000000",
    "live": "0a000000-0000-0000-0000-000000000001",  # RUNNING, traded, marked, ticked
    "stopped": "0a000000-0000-0000-0000-000000000002",
    "created": "0a000000-0000-0000-0000-000000000003",
    "ben": "0b000000-0000-0000-0000-000000000000",
    "bens": "0b000000-0000-0000-0000-000000000001",  # RUNNING
    "eve": "0e000000-0000-0000-0000-000000000000",
    "failed": "0e000000-0000-0000-0000-000000000001",  # ERROR
    "max": "0c000000-0000-0000-0000-000000000000",
    "margin": "0c000000-0000-0000-0000-000000000001",  # RUNNING on margin, short
    "nobody": "0f000000-0000-0000-0000-000000000000",
    # Orders of the live run.
    "filled": "aa000000-0000-0000-0000-000000000001",
    "resting": "aa000000-0000-0000-0000-000000000002",  # LIMIT BUY 2 at 50, PENDING
    "partly": "aa000000-0000-0000-0000-000000000003",  # BUY 4 IBM, 1 of them filled
    "canceled": "aa000000-0000-0000-0000-000000000004",
    "rejected": "aa000000-0000-0000-0000-000000000005",
    "expired": "aa000000-0000-0000-0000-000000000006",
    "trailing": "aa000000-0000-0000-0000-000000000007",  # TRAIL SELL 1, stop at 90
    "stop": "aa000000-0000-0000-0000-000000000008",  # STOP SELL 1 at 80
    "theirs": "bb000000-0000-0000-0000-000000000001",  # Ben's, resting
    "new_order": "ff000000-0000-0000-0000-000000000001",
    "limit": "cc000000-0000-0000-0000-000000000001",
    # Who trades at a broker, their runs, and orders of Dan's (market_cases.py).
    "dan": "0d000000-0000-0000-0000-000000000000",
    "deals": "0d000000-0000-0000-0000-000000000001",  # RUNNING at A1, then A2
    "idle": "0d000000-0000-0000-0000-000000000002",  # CREATED, at A1
    "fay": "09000000-0000-0000-0000-000000000000",
    "fays": "09000000-0000-0000-0000-000000000001",  # RUNNING at an A1 of her own
    "connector": "05000000-0000-0000-0000-000000000000",
    "o_waits": "d0000000-0000-0000-0000-000000000001",  # NEW, no connector has it yet
    "o_sent": "d0000000-0000-0000-0000-000000000002",  # NEW, taken by a connector
    "o_routed": "d0000000-0000-0000-0000-000000000003",  # BUY 10 at 20, ROUTED; fill U.01 unbooked
    "o_partly": "d0000000-0000-0000-0000-000000000004",  # 4 of 10 filled: P.01
    "o_filled": "d0000000-0000-0000-0000-000000000005",  # F.01, its commission unbooked
    "o_busted": "d0000000-0000-0000-0000-000000000006",  # B.01, its bust unbooked
    "o_corrected": "d0000000-0000-0000-0000-000000000007",  # C.01, C.02 unbooked
    "o_canceling": "d0000000-0000-0000-0000-000000000008",
    "o_modifying": "d0000000-0000-0000-0000-000000000009",  # to 12
    "o_canceled": "d0000000-0000-0000-0000-00000000000a",
    "o_rejected": "d0000000-0000-0000-0000-00000000000b",  # by the gate
    "o_lost": "d0000000-0000-0000-0000-00000000000c",  # NEW, never arrived at A1
    "o_orphan": "d0000000-0000-0000-0000-00000000000d",  # known to the broker only
    "o_fays": "d0000000-0000-0000-0000-0000000000f1",  # Fay's, ROUTED
}
TIMES: Mapping[str, str] = {
    "t0": "2024-01-02 21:00+00",
    "t1": "2024-01-03 21:00+00",
    "t2": "2024-01-04 21:00+00",  # the live run's last tick
    "t3": "2024-01-05 21:00+00",
    "t4": "2024-01-08 21:00+00",
}

WORLD = """
INSERT INTO app_user (user_id, name) VALUES
    (:'ann', 'ann'), (:'ben', 'ben'), (:'eve', 'eve'), (:'max', 'max');
INSERT INTO corporate_action (symbol, ex_date, numerator, denominator) VALUES
    ('AAPL', '2024-01-05', 2, 1), ('AAPL', '2024-01-04', 3, 1), ('AAPL', '2023-06-01', 5, 1),
    ('IBM', '2024-01-05', 3, 2);
INSERT INTO price_bar (symbol, bar_start, bar_end, open, high, low, close) VALUES
    ('MSFT', '2024-01-02 14:30+00', '2024-01-02 21:00+00', 200, 200, 200, 200);
INSERT INTO calendar_session (calendar, session_date, open_at, close_at)
SELECT 'XNYS', day, day + interval '14:30', day + interval '21:00'
FROM unnest('{2024-01-02,2024-01-03,2024-01-04,2024-01-05,2024-01-08}'::timestamp[]) AS day;

INSERT INTO strategy_run (user_id, run_id, name, status, initial_cash) VALUES
    (:'ann', :'stopped', 'stopped', 'RUNNING', 1000);
INSERT INTO engine_status (user_id, run_id) VALUES (:'ann', :'stopped');
INSERT INTO sip_plan (user_id, run_id, plan, symbol, amount, start_on) VALUES
    (:'ann', :'stopped', 'old', 'AAPL', 10, '2024-01-01');
INSERT INTO risk_limit (user_id, run_id, kind, limit_value) VALUES
    (:'ann', :'stopped', 'MAX_POSITION', 500);
INSERT INTO orders (user_id, run_id, order_id, symbol, side, quantity, logical_time) VALUES
    (:'ann', :'stopped', 'dd000000-0000-0000-0000-000000000001', 'AAPL', 'BUY', 5, :'t0'),
    (:'ann', :'stopped', 'dd000000-0000-0000-0000-000000000002', 'AAPL', 'BUY', 1, :'t0');
INSERT INTO execution (user_id, run_id, order_id, execution_id, quantity, price) VALUES
    (:'ann', :'stopped', 'dd000000-0000-0000-0000-000000000001', 'D1', 5, 100);
INSERT INTO mtm_ledger (user_id, run_id) VALUES (:'ann', :'stopped');
INSERT INTO event_ledger (user_id, run_id, event_type) VALUES (:'ann', :'stopped', 'TICK');
INSERT INTO engine_state (user_id, run_id, last_logical_time) VALUES
    (:'ann', :'stopped', :'t0');
UPDATE strategy_run SET status = 'STOPPED' WHERE user_id = :'ann' AND run_id = :'stopped';

INSERT INTO strategy_run (user_id, run_id, name, status, initial_cash, account_type) VALUES
    (:'ann', :'live', 'live', 'RUNNING', 10000, 'CASH'),
    (:'ann', :'created', 'created', 'CREATED', 1000, 'CASH'),
    (:'ben', :'bens', 'bens', 'RUNNING', 10000, 'CASH'),
    (:'eve', :'failed', 'failed', 'ERROR', 1000, 'CASH'),
    (:'max', :'margin', 'margin', 'RUNNING', 1000, 'MARGIN');
INSERT INTO engine_status (user_id, run_id) VALUES (:'ann', :'live'), (:'ben', :'bens');
INSERT INTO sip_plan (user_id, run_id, plan, symbol, amount, start_on) VALUES
    (:'ann', :'live', 'apples', 'AAPL', 100, '2024-01-01');
INSERT INTO risk_limit (user_id, limit_id, run_id, kind, limit_value) VALUES
    (:'ann', :'limit', :'live', 'MAX_POSITION', 500);

INSERT INTO orders (user_id, run_id, order_id, client_order_id, symbol, side, quantity, order_type,
                    limit_price, logical_time) VALUES
    (:'ann', :'live', :'filled', 'first', 'AAPL', 'BUY', 10, 'MARKET', NULL, :'t0'),
    (:'ann', :'live', :'resting', NULL, 'AAPL', 'BUY', 2, 'LIMIT', 50, :'t0'),
    (:'ann', :'live', :'partly', NULL, 'IBM', 'BUY', 4, 'LIMIT', 20, :'t0'),
    (:'ann', :'live', :'canceled', NULL, 'AAPL', 'BUY', 1, 'LIMIT', 50, :'t0'),
    (:'ann', :'live', :'expired', NULL, 'AAPL', 'BUY', 1, 'LIMIT', 50, :'t0'),
    (:'ann', :'live', :'rejected', NULL, 'AAPL', 'BUY', 0, 'MARKET', NULL, :'t0');
INSERT INTO execution (user_id, run_id, order_id, execution_id, quantity, price, commission) VALUES
    (:'ann', :'live', :'filled', 'X1', 6, 100.25, 0.5),
    (:'ann', :'live', :'filled', 'X2', 4, 100.5, 0.5),
    (:'ann', :'live', :'partly', 'X3', 1, 19.5, 0);
INSERT INTO orders (user_id, run_id, order_id, symbol, side, quantity, order_type, trail_amount,
                    stop_price, logical_time) VALUES
    (:'ann', :'live', :'trailing', 'AAPL', 'SELL', 1, 'TRAIL', 10, 90, :'t0'),
    (:'ann', :'live', :'stop', 'AAPL', 'SELL', 1, 'STOP', NULL, 80, :'t0');
UPDATE orders SET status = 'PENDING' WHERE user_id = :'ann' AND order_id = :'resting';
UPDATE orders SET status = 'CANCELED' WHERE user_id = :'ann' AND order_id = :'canceled';
UPDATE orders SET status = 'EXPIRED' WHERE user_id = :'ann' AND order_id = :'expired';
UPDATE position SET mark_price = 101, marked_at = :'t1'
WHERE user_id = :'ann' AND run_id = :'live' AND symbol = 'AAPL';
INSERT INTO mtm_ledger (user_id, run_id, logical_time) VALUES (:'ann', :'live', :'t1');
INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, payload)
SELECT user_id, run_id, logical_time, 'TICK',
       jsonb_build_object('cash', cash, 'market_value', market_value, 'equity', equity)
FROM mtm_ledger WHERE user_id = :'ann' AND run_id = :'live' AND logical_time = :'t1';
INSERT INTO split_applied (user_id, run_id, symbol, ex_date, logical_time) VALUES
    (:'ann', :'live', 'AAPL', '2024-01-04', :'t2');
INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject) VALUES
    (:'ann', :'live', :'t2', 'SIP_EXECUTED', 'apples@2024-01');
INSERT INTO mtm_ledger (user_id, run_id, logical_time) VALUES (:'ann', :'live', :'t2');
INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, payload)
SELECT user_id, run_id, logical_time, 'TICK',
       jsonb_build_object('cash', cash, 'market_value', market_value, 'equity', equity)
FROM mtm_ledger WHERE user_id = :'ann' AND run_id = :'live' AND logical_time = :'t2';
INSERT INTO engine_state (user_id, run_id, last_logical_time) VALUES (:'ann', :'live', :'t2');

INSERT INTO orders (user_id, run_id, order_id, symbol, side, quantity, order_type, limit_price,
                    logical_time) VALUES
    (:'ben', :'bens', :'theirs', 'AAPL', 'BUY', 1, 'LIMIT', 50, :'t0');
INSERT INTO orders (user_id, run_id, order_id, symbol, side, quantity, logical_time) VALUES
    (:'max', :'margin', :'theirs', 'AAPL', 'SELL', 3, :'t0');
INSERT INTO execution (user_id, run_id, order_id, execution_id, quantity, price) VALUES
    (:'max', :'margin', :'theirs', 'M1', 3, 100);
"""


def said(text: str) -> bytes:
    """SQL with ``:'name'`` replaced as psql would, by the ids and times above."""
    known = {**NAMES, **TIMES}
    return re.sub(r":'(\w+)'", lambda found: f"'{known[found[1]]}'", text).encode()


ORDER = "INSERT INTO orders (user_id, run_id, order_id, symbol, side, quantity"
TRADE = "INSERT INTO execution (user_id, run_id, order_id, quantity, price"


def smallest_inserts(run: str, user: str = "ann") -> dict[str, str]:
    """The smallest insert into each table of a run."""
    key = f"(:'{user}', :'{run}'"
    return {
        "engine_state": f"INSERT INTO engine_state (user_id, run_id) VALUES {key})",
        "engine_status": f"INSERT INTO engine_status (user_id, run_id) VALUES {key})",
        "orders": f"{ORDER}) VALUES {key}, :'new_order', 'AAPL', 'BUY', 1)",
        "execution": f"{TRADE}) VALUES {key}, :'new_order', 1, 1)",
        "position": f"INSERT INTO position (user_id, run_id, symbol) VALUES {key}, 'MSFT')",
        "split_applied": "INSERT INTO split_applied (user_id, run_id, symbol, ex_date) "
        f"VALUES {key}, 'IBM', '2024-01-05')",
        "mtm_ledger": f"INSERT INTO mtm_ledger (user_id, run_id) VALUES {key})",
        "event_ledger": "INSERT INTO event_ledger (user_id, run_id, event_type) "
        f"VALUES {key}, 'NOTE')",
        "sip_plan": "INSERT INTO sip_plan (user_id, run_id, plan, symbol, amount) "
        f"VALUES {key}, 'new', 'AAPL', 1)",
        "risk_limit": "INSERT INTO risk_limit (user_id, run_id, kind, limit_value) "
        f"VALUES {key}, 'MAX_POSITION', 1)",
        "paper_order": "INSERT INTO paper_order (user_id, run_id, symbol, side, quantity) "
        f"VALUES {key}, 'AAPL', 'BUY', 1)",
        "paper_trade": "INSERT INTO paper_trade (user_id, run_id, order_id, quantity, price) "
        f"VALUES {key}, :'new_order', 1, 1)",
        "paper_position": "INSERT INTO paper_position (user_id, run_id, symbol) "
        f"VALUES {key}, 'MSFT')",
        "paper_equity_curve": f"INSERT INTO paper_equity_curve (user_id, run_id) VALUES {key})",
    }


def build_world(conn: Connection) -> None:
    """Fill an empty database; every row comes by plain SQL."""
    with conn.transaction():
        conn.execute(said(WORLD))
        conn.execute("SET CONSTRAINTS ALL IMMEDIATE")
    assert findings(conn) == []


_CONTENTS = sql.SQL(" UNION ALL ").join(
    sql.SQL(
        "SELECT {}, count(*), md5(coalesce(string_agg(t::text, '|' ORDER BY t::text), '')) "
        "FROM public.{} t"
    ).format(sql.Literal(table), sql.Identifier(table))
    for table in (*RUN_TABLES, *BROKER_TABLES, *ACCOUNT_TABLES, *LOOKUPS, "app_user")
)


def contents(conn: Connection) -> dict[str, tuple[int, str]]:
    """Of every table how many rows there are, and a fingerprint of all that is in them."""
    return {table: (count, content) for table, count, content in conn.execute(_CONTENTS).fetchall()}


def findings(conn: Connection) -> list[tuple[Any, ...]]:
    """What the audit views find in the rows, with the view's name first."""
    views = conn.execute(
        "SELECT viewname FROM pg_views "
        "WHERE viewname LIKE 'audit\\_%' AND viewname <> 'audit_guard' ORDER BY viewname"
    ).fetchall()
    query = sql.SQL("SELECT {}, subject, finding FROM public.{} ORDER BY length(subject), 2, 3")
    return [
        row
        for (view,) in views
        for row in conn.execute(query.format(sql.Literal(view), sql.Identifier(view))).fetchall()
    ]


@contextmanager
def acting_as(conn: Connection, role: str) -> Iterator[None]:
    """Act as a role for the length of a block, inside a transaction."""
    conn.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(role)))
    try:
        yield
    finally:
        if conn.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS:
            conn.execute("RESET ROLE")


def refusal(conn: Connection, text: str, role: str) -> EngineError:
    """The typed error by which an attack fails; it must leave nothing."""
    before = contents(conn)
    caught: psycopg.Error | None = None
    try:
        with conn.transaction(), acting_as(conn, role):
            conn.execute(said(text))
            conn.execute("SET CONSTRAINTS ALL IMMEDIATE")
    except psycopg.Error as error:
        caught = error
    assert contents(conn) == before, "the attack has left something"
    assert caught is not None, "the attack was not refused"
    meaning = typed(caught)
    assert meaning is not None, f"no rule of ours: {caught.sqlstate} {caught}"
    return meaning


def assert_refused(conn: Connection, text: str, role: str, rule: str) -> None:
    """An attack fails by the named rule, with a hint; or, for DENIED, for want of a right."""
    meaning = refusal(conn, text, role)
    if rule == DENIED:
        assert isinstance(meaning, ConfigurationError), meaning
        return
    assert isinstance(meaning, RuleViolation), meaning
    assert (meaning.constraint, bool(meaning.hint)) == (rule, True), meaning


def rows(conn: psycopg.Connection[Any], query: str) -> list[tuple[Any, ...]]:
    with conn.cursor(row_factory=tuple_row) as cursor:
        return cursor.execute(said(query)).fetchall()
