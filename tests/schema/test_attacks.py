"""Every rule attacked in plain SQL, by the owner of the tables and by the engine's role.

Each attack fails by the rule that is named beside it and leaves nothing. Where the engine's role
has no right to try, that is said instead.
"""

from __future__ import annotations

from typing import NamedTuple

import psycopg
import pytest
from schema_cases import (
    DENIED,
    HISTORY,
    ORDER,
    ROLES,
    RUN_TABLES,
    TRADE,
    acting_as,
    assert_refused,
    contents,
    findings,
    refusal,
    rows,
    said,
    smallest_inserts,
)

from engine.db.connect import Connection
from engine.errors import BadInput, RuleViolation, typed


class Attack(NamedTuple):
    """SQL, the rule that the owner meets and the one that the engine's role meets."""

    name: str
    sql: str
    owner: str
    engine: str


def _attack(name: str, sql: str, owner: str, engine: str | None = None) -> Attack:
    return Attack(name, sql, owner, owner if engine is None else engine)


EVENT = "INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)"
_BASE = {
    "paper_order": "orders",
    "paper_trade": "execution",
    "paper_position": "position",
    "paper_equity_curve": "mtm_ledger",
}
# What the engine's role may not insert at all.
_NOT_THE_ENGINE = ("position", "paper_position", "risk_limit")


def _rule_of(table: str, what: str) -> tuple[str, str]:
    rule = f"{_BASE.get(table, table)}_{what}"
    return rule, DENIED if table in _NOT_THE_ENGINE else rule


def _writes_into_a_run_that_does_not_run() -> list[Attack]:
    return [
        _attack(f"{table} of a {run} run", sql, *_rule_of(table, "run_is_running"))
        for run, user in (("stopped", "ann"), ("failed", "eve"), ("created", "ann"))
        for table, sql in smallest_inserts(run, user).items()
        # Plans and limits are made before a run starts.
        if run != "created" or table not in ("sip_plan", "risk_limit")
    ]


def _writes_with_another_users_run() -> list[Attack]:
    found = []
    for table, sql in smallest_inserts("live", "ben").items():
        found.append(
            _attack(f"{table} of ann's run by ben", sql, *_rule_of(table, "belongs_to_run"))
        )
    for table, sql in smallest_inserts("live", "nobody").items():
        found.append(
            _attack(f"{table} of ann's run by nobody", sql, *_rule_of(table, "belongs_to_run"))
        )
    return found


_STOPPED_ROWS = [
    _attack(
        "engine_state of a stopped run",
        "UPDATE engine_state SET state = '{\"x\": 1}' WHERE run_id = :'stopped'",
        "engine_state_run_is_running",
    ),
    _attack(
        "engine_status of a stopped run",
        "UPDATE engine_status SET heartbeat_at = now() WHERE run_id = :'stopped'",
        "engine_status_run_is_running",
    ),
    _attack(
        "plan of a stopped run",
        "UPDATE sip_plan SET status = 'PAUSED' WHERE run_id = :'stopped'",
        "sip_plan_run_is_running",
    ),
    _attack(
        "limit of a stopped run",
        "UPDATE risk_limit SET limit_value = 0 WHERE run_id = :'stopped'",
        "risk_limit_run_is_running",
        DENIED,
    ),
    _attack(
        "mark of a stopped run's position",
        "UPDATE position SET mark_price = 5 WHERE run_id = :'stopped'",
        "position_run_is_running",
    ),
    _attack(
        "order of a stopped run",
        "UPDATE orders SET status = 'CANCELED' WHERE run_id = :'stopped'",
        "orders_run_is_running",
    ),
    _attack(
        "name of a stopped run",
        "UPDATE strategy_run SET name = 'x' WHERE run_id = :'stopped'",
        "strategy_run_run_is_running",
        DENIED,
    ),
    _attack(
        "status of a stopped run to itself",
        "UPDATE strategy_run SET status = status WHERE run_id = :'stopped'",
        "strategy_run_run_is_running",
    ),
    _attack(
        "stopped_at of a stopped run",
        "UPDATE strategy_run SET stopped_at = NULL WHERE run_id = :'stopped'",
        "strategy_run_run_is_running",
        DENIED,
    ),
    _attack(
        "engine_state moved out of a stopped run",
        "UPDATE engine_state SET user_id = :'ben', run_id = :'bens', last_logical_time = NULL "
        "WHERE run_id = :'stopped'",
        "engine_state_keeps_its_run",
        DENIED,
    ),
    _attack(
        "engine_status moved out of a stopped run",
        "UPDATE engine_status SET user_id = :'max', run_id = :'margin' WHERE run_id = :'stopped'",
        "engine_status_keeps_its_run",
        DENIED,
    ),
    _attack(
        "plan moved out of a stopped run",
        "UPDATE sip_plan SET run_id = :'live' WHERE run_id = :'stopped'",
        "sip_plan_keeps_its_run",
        DENIED,
    ),
    _attack(
        "plan moved into a stopped run",
        "UPDATE sip_plan SET run_id = :'stopped' WHERE run_id = :'live'",
        "sip_plan_run_is_running",
        DENIED,
    ),
    _attack(
        "limit moved to another user",
        "UPDATE risk_limit SET user_id = :'ben', run_id = :'bens' WHERE run_id = :'live'",
        "risk_limit_keeps_its_run",
        DENIED,
    ),
    _attack(
        "limit freed of its run",
        "UPDATE risk_limit SET run_id = NULL WHERE run_id = :'live'",
        "risk_limit_keeps_its_run",
        DENIED,
    ),
    _attack(
        "order moved to another run",
        "UPDATE orders SET user_id = :'ben', run_id = :'bens' WHERE order_id = :'resting'",
        "orders_terms_fixed",
        DENIED,
    ),
    _attack(
        "position moved to another run",
        "UPDATE position SET user_id = :'ben', run_id = :'bens' "
        "WHERE run_id = :'live' AND symbol = 'IBM'",
        "position_keeps_its_run",
        DENIED,
    ),
    _attack(
        "stop and write in one statement",
        "WITH s AS (UPDATE strategy_run SET status = 'STOPPED' WHERE run_id = :'live' "
        f"RETURNING user_id, run_id) {ORDER}) "
        "SELECT user_id, run_id, :'new_order', 'AAPL', 'BUY', 1 FROM s",
        "orders_run_is_running",
    ),
    _attack(
        "the end of a stopped run told again",
        f"{EVENT} VALUES (:'ann', :'stopped', :'t3', 'RUN_STOPPED', '', '{{}}')",
        "event_ledger_run_is_running",
    ),
]

_RUNS = [
    _attack(
        "second RUNNING run inserted",
        "INSERT INTO strategy_run (user_id, status) VALUES (:'ann', 'RUNNING')",
        "strategy_run_one_running_per_user",
    ),
    _attack(
        "second RUNNING run by update",
        "UPDATE strategy_run SET status = 'RUNNING' WHERE run_id = :'created'",
        "strategy_run_one_running_per_user",
    ),
    _attack(
        "two RUNNING runs in one statement",
        "INSERT INTO strategy_run (user_id, status) VALUES (:'eve', 'RUNNING'), "
        "(:'eve', 'RUNNING')",
        "strategy_run_one_running_per_user",
    ),
    _attack(
        "second RUNNING run by ON CONFLICT DO UPDATE",
        "INSERT INTO strategy_run (user_id, run_id, status) VALUES (:'ann', :'created', 'CREATED') "
        "ON CONFLICT (user_id, run_id) DO UPDATE SET status = 'RUNNING'",
        "strategy_run_one_running_per_user",
    ),
    _attack(
        "run of nobody",
        "INSERT INTO strategy_run (user_id) VALUES (:'nobody')",
        "strategy_run_belongs_to_user",
    ),
    _attack(
        "run of a status that is none",
        "INSERT INTO strategy_run (user_id, status) VALUES (:'ann', 'running')",
        "strategy_run_status_known",
    ),
    _attack(
        "new run with other cash than its initial cash",
        "INSERT INTO strategy_run (user_id, initial_cash, cash) VALUES (:'ann', 1, 1000000)",
        "strategy_run_cash_from_executions",
        DENIED,
    ),
    _attack(
        "new run that has taken up events",
        "INSERT INTO strategy_run (user_id, books_seq) VALUES (:'ann', 7)",
        "strategy_run_cash_from_executions",
        DENIED,
    ),
    *(
        _attack(
            f"initial cash {cash}",
            f"INSERT INTO strategy_run (user_id, initial_cash) VALUES (:'ann', '{cash}')",
            rule,
        )
        for cash, rule in (
            ("-1", "strategy_run_initial_cash_in_range"),
            ("1e18", "strategy_run_initial_cash_in_range"),
            ("0.000000001", "strategy_run_initial_cash_in_range"),
            ("NaN", "strategy_run_cash_in_range"),
            ("Infinity", "strategy_run_cash_in_range"),
        )
    ),
    _attack(
        "initial cash changed",
        "UPDATE strategy_run SET initial_cash = 1e6 WHERE run_id = :'live'",
        "strategy_run_terms_fixed",
        DENIED,
    ),
    _attack(
        "initial cash changed before the start",
        "UPDATE strategy_run SET initial_cash = 1e6, cash = 1e6 WHERE run_id = :'created'",
        "strategy_run_terms_fixed",
        DENIED,
    ),
    _attack(
        "account turned into a margin account",
        "UPDATE strategy_run SET account_type = 'MARGIN' WHERE run_id = :'live'",
        "strategy_run_terms_fixed",
        DENIED,
    ),
    _attack(
        "parameters changed behind the ledger's back",
        "UPDATE strategy_run SET parameters = '{\"x\": 1}' WHERE run_id = :'live'",
        "strategy_run_terms_fixed",
        DENIED,
    ),
    _attack(
        "run given to another user",
        "UPDATE strategy_run SET user_id = :'ben' WHERE run_id = :'created'",
        "strategy_run_terms_fixed",
        DENIED,
    ),
    _attack(
        "run deleted by the engine",
        "DELETE FROM strategy_run WHERE run_id = :'nobody' AND user_id = :'nobody'; "
        "TRUNCATE strategy_run CASCADE",
        "strategy_run_kept",
        DENIED,
    ),
    _attack(
        "cash set by hand",
        "UPDATE strategy_run SET cash = cash + 1 WHERE run_id = :'live'",
        "strategy_run_cash_from_executions",
        DENIED,
    ),
    _attack(
        "cash of a stopped run set by hand",
        "UPDATE strategy_run SET cash = cash + 1 WHERE run_id = :'stopped'",
        "strategy_run_cash_from_executions",
        DENIED,
    ),
    _attack(
        "cash NaN",
        "UPDATE strategy_run SET cash = 'NaN' WHERE run_id = :'live'",
        "strategy_run_cash_from_executions",
        DENIED,
    ),
    _attack(
        "books taken back to before a trade, to have it applied again",
        "UPDATE strategy_run SET books_seq = 0 WHERE run_id = :'live'",
        "strategy_run_cash_from_executions",
        DENIED,
    ),
    _attack(
        "books moved ahead, past trades to come",
        "UPDATE strategy_run SET books_seq = 999 WHERE run_id = :'live'",
        "strategy_run_cash_from_executions",
        DENIED,
    ),
    _attack(
        "broker that is no word",
        "INSERT INTO strategy_run (user_id, broker) VALUES (:'ann', 'Paper ')",
        "strategy_run_broker_format",
    ),
    _attack(
        "name too long",
        "INSERT INTO strategy_run (user_id, name) VALUES (:'ann', repeat('x', 101))",
        "strategy_run_words_short",
    ),
]

_ORDERS = [
    *(
        _attack(
            f"order born {status}",
            f"{ORDER}, status) VALUES (:'ann', :'live', :'new_order', 'AAPL', 'BUY', 1, "
            f"'{status}')",
            "orders_status_transition",
            DENIED,
        )
        for status in ("FILLED", "CANCELED", "ROUTED", "PARTIALLY_FILLED", "pending", "NONSENSE")
    ),
    _attack(
        "order born filled",
        f"{ORDER}, filled_quantity) VALUES (:'ann', :'live', :'new_order', 'AAPL', 'BUY', 1, 1)",
        "orders_filled_from_executions",
        DENIED,
    ),
    _attack(
        "order born with a value",
        f"{ORDER}, filled_notional) VALUES (:'ann', :'live', :'new_order', 'AAPL', 'BUY', 1, 1)",
        "orders_filled_from_executions",
        DENIED,
    ),
    _attack(
        "order born REJECTED without a reason",
        f"{ORDER}, status) VALUES (:'ann', :'live', :'new_order', 'AAPL', 'BUY', -1, 'REJECTED')",
        "orders_reject_has_source_and_code",
        DENIED,
    ),
    _attack(
        "order before the run's last event",
        f"{ORDER}, logical_time) VALUES (:'ann', :'live', :'new_order', 'AAPL', 'BUY', 1, :'t1')",
        "event_ledger_time_moves_forward",
    ),
    *(
        _attack(
            f"order of {quantity}",
            f"{ORDER}) VALUES (:'ann', :'live', :'new_order', 'IBM', 'BUY', '{quantity}')",
            "orders_quantity_in_range",
        )
        for quantity in ("NaN", "Infinity", "-Infinity", "1e15", "-1e15", "0.000000001")
    ),
    *(
        _attack(
            f"order with a {column} of {price}",
            f"{ORDER}, order_type, {column}) "
            f"VALUES (:'ann', :'live', :'new_order', 'AAPL', 'SELL', 1, '{kind}', '{price}')",
            rule,
        )
        for column, kind, rule in (
            ("limit_price", "LIMIT", "orders_prices_in_range"),
            ("stop_price", "STOP", "orders_prices_in_range"),
            ("reference_price", "MARKET", "orders_prices_in_range"),
            ("trail_amount", "TRAIL", "orders_trail_in_range"),
            ("trail_percent", "TRAIL", "orders_trail_in_range"),
        )
        for price in ("NaN", "Infinity", "1e15", "0.000000001")
        if (column, price) not in {("trail_percent", "Infinity"), ("trail_percent", "1e15")}
    ),
    *(
        _attack(
            f"order with {column} {word!r}",
            "INSERT INTO orders (user_id, run_id, symbol, side, quantity, "
            f"{column}) VALUES (:'ann', :'live', 'IBM', 'BUY', 1, '{word}')",
            rule,
        )
        for column, word, rule in (
            ("order_type", "ICEBERG", "orders_order_type_known"),
            ("time_in_force", "SOON", "orders_time_in_force_known"),
            ("expire_at", "infinity", "orders_times_in_range"),
            ("logical_time", "infinity", "orders_times_in_range"),
            ("client_order_id", "x" * 129, "orders_client_order_id_short"),
        )
    ),
    _attack(
        "order of a side that is none",
        f"{ORDER}) VALUES (:'ann', :'live', :'new_order', 'AAPL', 'HOLD', 1)",
        "orders_side_known",
    ),
    _attack(
        "order of a symbol that is none",
        f"{ORDER}) VALUES (:'ann', :'live', :'new_order', 'A; DROP', 'BUY', 1)",
        "orders_symbol_format",
    ),
    _attack(
        "order without a side",
        "INSERT INTO orders (user_id, run_id, symbol, quantity) "
        "VALUES (:'ann', :'live', 'AAPL', 1)",
        "orders_side_given",
    ),
    _attack(
        "the same client order twice",
        f"{ORDER}, client_order_id) "
        "VALUES (:'ann', :'live', :'new_order', 'AAPL', 'BUY', 1, 'first')",
        "orders_client_order_id_once",
    ),
    _attack(
        "the same order twice",
        f"{ORDER}) VALUES (:'ann', :'live', :'filled', 'AAPL', 'BUY', 1)",
        "orders_pkey",
    ),
    *(
        _attack(
            f"{column} of a resting order changed",
            f"UPDATE orders SET {column} = {value} "
            "WHERE order_id = :'resting' AND run_id = :'live'",
            rule,
            engine,
        )
        for column, value, rule, engine in (
            ("quantity", "quantity + 1", "orders_terms_fixed", None),
            ("limit_price", "1000000", "orders_terms_fixed", None),
            ("trail_amount", "1", "orders_terms_fixed", None),
            ("purpose", "'FLATTEN'", "orders_terms_fixed", DENIED),
            ("recovered", "true", "orders_terms_fixed", DENIED),
            ("account", "'A1'", "orders_terms_fixed", None),
            ("broker_order_id", "7", "orders_account_unless_paper", None),
            ("perm_id", "7", "orders_account_unless_paper", None),
            ("pending_reconcile", "true", "orders_account_unless_paper", None),
            ("reference_price", "-1", "orders_terms_fixed", DENIED),
            ("symbol", "'IBM'", "orders_terms_fixed", DENIED),
            ("side", "'SELL'", "orders_terms_fixed", DENIED),
            ("order_type", "'MARKET'", "orders_terms_fixed", DENIED),
            ("time_in_force", "'GTC'", "orders_terms_fixed", DENIED),
            ("client_order_id", "'x'", "orders_terms_fixed", DENIED),
            ("order_id", ":'new_order'", "orders_terms_fixed", DENIED),
            ("logical_time", "logical_time - interval '1 day'", "orders_terms_fixed", DENIED),
            ("recorded_at", "'2001-01-01'", "orders_terms_fixed", DENIED),
            ("broker", "'other'", "orders_terms_fixed", DENIED),
            ("filled_quantity", "1", "orders_filled_from_executions", DENIED),
            ("filled_notional", "1", "orders_filled_from_executions", DENIED),
            ("avg_fill_price", "1", "orders_avg_fill_price_generated", None),
            ("reserved_cash", "0", "orders_reserved_cash_generated", None),
            ("status_at", "status_at + interval '1 day'", "orders_terms_fixed", None),
            ("status_at", "'9999-01-01'", "orders_terms_fixed", None),
            ("status_reason", "'because'", "orders_terms_fixed", None),
            ("stop_price", "1", "orders_terms_fixed", None),
        )
    ),
    _attack(
        "a stop moved",
        "UPDATE orders SET stop_price = 1 WHERE order_id = :'stop' AND run_id = :'live'",
        "orders_terms_fixed",
    ),
    _attack(
        "a trailing stop loosened",
        "UPDATE orders SET stop_price = stop_price - 1 "
        "WHERE order_id = :'trailing' AND run_id = :'live'",
        "orders_terms_fixed",
    ),
    _attack(
        "a trailing stop taken away",
        "UPDATE orders SET stop_price = NULL WHERE order_id = :'trailing' AND run_id = :'live'",
        "orders_terms_fixed",
    ),
    _attack(
        "a day's end put off",
        "UPDATE orders SET expire_at = :'t3' WHERE order_id = :'resting' AND run_id = :'live'; "
        "UPDATE orders SET expire_at = :'t4' WHERE order_id = :'resting' AND run_id = :'live'",
        "orders_terms_fixed",
    ),
    _attack(
        "a trigger untold",
        "UPDATE orders SET triggered_at = :'t3' WHERE order_id = :'stop' AND run_id = :'live'; "
        "UPDATE orders SET triggered_at = NULL WHERE order_id = :'stop' AND run_id = :'live'",
        "orders_terms_fixed",
    ),
    _attack(
        "moved at a time before the last event",
        "UPDATE orders SET status = 'CANCELED', status_at = :'t1' "
        "WHERE order_id = :'resting' AND run_id = :'live'",
        "event_ledger_time_moves_forward",
    ),
    _attack(
        "moved at a time before its birth",
        "UPDATE orders SET status = 'CANCELED', status_at = '2001-01-01' "
        "WHERE order_id = :'resting' AND run_id = :'live'",
        "orders_status_after_birth",
    ),
    _attack(
        "moved at the end of time",
        "UPDATE orders SET status = 'CANCELED', status_at = 'infinity' "
        "WHERE order_id = :'resting' AND run_id = :'live'",
        "orders_times_in_range",
    ),
    *(
        _attack(
            f"a {status} order said to be FILLED",
            f"UPDATE orders SET status = 'FILLED' WHERE order_id = :'{status}' "
            "AND run_id = :'live'",
            rule,
        )
        for status, rule in (
            ("resting", "orders_status_agrees_with_fills"),
            ("partly", "orders_status_agrees_with_fills"),
            ("canceled", "orders_status_transition"),
            ("rejected", "orders_status_transition"),
            ("expired", "orders_status_transition"),
        )
    ),
    _attack(
        "said to be filled and made so",
        "UPDATE orders SET status = 'FILLED', filled_quantity = quantity "
        "WHERE order_id = :'resting' AND run_id = :'live'",
        "orders_filled_from_executions",
        DENIED,
    ),
    _attack(
        "a partly filled order back to PENDING",
        "UPDATE orders SET status = 'PENDING' WHERE order_id = :'partly' AND run_id = :'live'",
        "orders_status_transition",
    ),
    _attack(
        "a closed order's reason changed",
        "UPDATE orders SET status_reason = 'x' WHERE order_id = :'canceled' AND run_id = :'live'",
        "orders_closed_fixed",
    ),
    _attack(
        "rejected without a reason",
        "UPDATE orders SET status = 'REJECTED' WHERE order_id = :'resting' AND run_id = :'live'",
        "orders_reject_has_source_and_code",
    ),
    _attack(
        "order deleted",
        "DELETE FROM orders WHERE order_id = :'resting' AND run_id = :'live'",
        "orders_kept",
        DENIED,
    ),
    _attack(
        "order deleted through the view",
        "DELETE FROM paper_order WHERE order_id = :'resting' AND run_id = :'live'",
        "orders_kept",
        DENIED,
    ),
]

_TRADES = [
    *(
        _attack(
            f"trade on a {state} order",
            f"{TRADE}) VALUES (:'ann', :'live', :'{state}', 1, 50)",
            "execution_order_is_open",
        )
        for state in ("filled", "canceled", "rejected", "expired")
    ),
    _attack(
        "trade through the view on a filled order",
        "INSERT INTO paper_trade (user_id, run_id, order_id, quantity, price) "
        "VALUES (:'ann', :'live', :'filled', 1, 50)",
        "execution_order_is_open",
    ),
    _attack(
        "overfill",
        f"{TRADE}) VALUES (:'ann', :'live', :'partly', 3.00000001, 20)",
        "orders_not_overfilled_on_paper",
    ),
    _attack(
        "overfill by several trades in one statement",
        f"{TRADE}) VALUES (:'ann', :'live', :'partly', 2, 20), (:'ann', :'live', :'partly', 2, 20)",
        "orders_not_overfilled_on_paper",
    ),
    _attack(
        "overfill by INSERT ... SELECT",
        f"{TRADE}) SELECT :'ann', :'live', :'partly', 1, 20 FROM generate_series(1, 4)",
        "orders_not_overfilled_on_paper",
    ),
    _attack(
        "trade on another run's order",
        f"{TRADE}) VALUES (:'ann', :'live', :'theirs', 1, 50)",
        "execution_belongs_to_order",
    ),
    _attack(
        "trade before the last event",
        f"{TRADE}, logical_time) VALUES (:'ann', :'live', :'resting', 1, 16, :'t1')",
        "event_ledger_time_moves_forward",
    ),
    _attack(
        "trade that the cash does not cover",
        f"{TRADE}) VALUES (:'ann', :'live', :'resting', 1, 8976.01)",
        "strategy_run_cash_not_negative_in_cash_account",
    ),
    _attack(
        "trades that fit the cash one by one but not together",
        f"{TRADE}) VALUES (:'ann', :'live', :'resting', 1, 5000), "
        "(:'ann', :'live', :'partly', 1, 5000)",
        "strategy_run_cash_not_negative_in_cash_account",
    ),
    _attack(
        "commission that the cash does not cover",
        f"{TRADE}, commission) VALUES (:'ann', :'live', :'resting', 1, 16, 9000)",
        "strategy_run_cash_not_negative_in_cash_account",
    ),
    _attack(
        "sale of what is not held",
        f"{ORDER}) VALUES (:'ann', :'live', :'new_order', 'IBM', 'SELL', 1.00000001); "
        f"{TRADE}) VALUES (:'ann', :'live', :'new_order', 1, 20)",
        "execution_order_is_open",
    ),
    *(
        _attack(
            f"trade of {quantity}",
            f"{TRADE}) VALUES (:'ann', :'live', :'resting', '{quantity}', 16)",
            "execution_quantity_positive",
        )
        for quantity in ("0", "-1", "NaN", "Infinity", "1e15", "0.000000001")
    ),
    *(
        _attack(
            f"trade at {price}",
            f"{TRADE}) VALUES (:'ann', :'live', :'resting', 1, '{price}')",
            rule,
        )
        for price, rule in (
            ("0", "execution_price_positive"),
            ("-1", "execution_price_positive"),
            ("-Infinity", "execution_price_positive"),
            ("NaN", "execution_price_in_range"),
            ("Infinity", "execution_price_in_range"),
            ("1e15", "execution_price_in_range"),
            ("0.000000001", "execution_price_in_range"),
        )
    ),
    *(
        _attack(
            f"trade with a commission of {commission}",
            f"{TRADE}, commission) VALUES (:'ann', :'live', :'resting', 1, 16, '{commission}')",
            "execution_commission_in_range",
        )
        for commission in ("NaN", "Infinity", "-Infinity", "-1e15", "1e-17")
    ),
    _attack(
        "commission in another currency, taken as if it were the run's",
        f"{TRADE}, commission, commission_currency) "
        "VALUES (:'ann', :'live', :'resting', 1, 16, 1, 'JPY')",
        "execution_commission_in_run_currency",
    ),
    _attack(
        "currency that is none",
        f"{TRADE}, commission_currency) VALUES (:'ann', :'live', :'resting', 1, 16, 'usd')",
        "execution_commission_currency_format",
    ),
    _attack(
        "trade at the end of time",
        f"{TRADE}, event_at) VALUES (:'ann', :'live', :'resting', 1, 16, 'infinity')",
        "execution_event_at_in_range",
    ),
    _attack(
        "the same execution twice",
        f"{TRADE}, execution_id) VALUES (:'ann', :'live', :'resting', 1, 16, 'X1')",
        "execution_pkey",
    ),
    _attack(
        "execution id that nobody can read",
        f"{TRADE}, execution_id) VALUES (:'ann', :'live', :'resting', 1, 16, E'X\\n1')",
        "execution_execution_id_format",
    ),
    _attack(
        "the same execution with other figures by ON CONFLICT DO UPDATE",
        f"{TRADE}, execution_id) VALUES (:'ann', :'live', :'resting', 1, 16, 'X1') "
        "ON CONFLICT (user_id, run_id, execution_id) DO UPDATE SET price = 1",
        "execution_append_only",
        DENIED,
    ),
]

_POSITIONS = [
    *(
        _attack(
            f"{column} of a position set by hand",
            f"UPDATE position SET {column} = {value} WHERE run_id = :'live' AND symbol = 'AAPL'",
            rule,
            engine,
        )
        for column, value, rule, engine in (
            ("quantity", "quantity + 1", "position_from_executions", DENIED),
            ("quantity", "0", "position_from_executions", DENIED),
            ("quantity", "'NaN'", "position_from_executions", DENIED),
            ("cost_basis", "0", "position_from_executions", DENIED),
            ("realized_pnl", "1e6", "position_from_executions", DENIED),
            ("symbol", "'MSFT'", "position_from_executions", DENIED),
            ("avg_cost", "1", "position_avg_cost_generated", None),
            ("market_value", "1e6", "position_market_value_generated", None),
            ("mark_price", "'NaN'", "position_mark_price_in_range", None),
            ("mark_price", "'Infinity'", "position_mark_price_in_range", None),
            ("mark_price", "1e15", "position_mark_price_in_range", None),
            ("mark_price", "NULL", "position_holding_has_mark", None),
            ("marked_at", ":'t0'", "position_mark_moves_forward", None),
            ("marked_at", "NULL", "position_mark_moves_forward", None),
            ("marked_at", "'infinity'", "position_marked_at_in_range", None),
        )
    ),
    _attack(
        "position set by hand through the view",
        "UPDATE paper_position SET quantity = 1 WHERE run_id = :'live'",
        "position_from_executions",
        DENIED,
    ),
    _attack(
        "position made by hand",
        "INSERT INTO position (user_id, run_id, symbol, quantity, mark_price, marked_at) "
        "VALUES (:'ann', :'live', 'MSFT', 5, 1, :'t2')",
        "position_from_executions",
        DENIED,
    ),
    _attack(
        "position made by hand through the view",
        "INSERT INTO paper_position (user_id, run_id, symbol, quantity, mark_price, marked_at) "
        "VALUES (:'ann', :'live', 'MSFT', 5, 1, :'t2')",
        "position_from_executions",
        DENIED,
    ),
    _attack(
        "position made by hand over one that is there",
        "INSERT INTO position (user_id, run_id, symbol) VALUES (:'ann', :'live', 'AAPL') "
        "ON CONFLICT (user_id, run_id, symbol) DO UPDATE SET quantity = 7",
        "position_from_executions",
        DENIED,
    ),
    _attack(
        "position deleted",
        "DELETE FROM position WHERE run_id = :'live'",
        "position_kept",
        DENIED,
    ),
]

_SPLITS = [
    _attack(
        "unannounced split",
        "INSERT INTO split_applied (user_id, run_id, symbol, ex_date, logical_time) "
        "VALUES (:'ann', :'live', 'AAPL', '2024-01-08', :'t4')",
        "split_applied_is_announced",
    ),
    _attack(
        "split of long ago",
        "INSERT INTO split_applied (user_id, run_id, symbol, ex_date, logical_time) "
        "VALUES (:'ann', :'live', 'AAPL', '2023-06-01', :'t3')",
        "split_applied_when_due",
    ),
    _attack(
        "split of tomorrow",
        "INSERT INTO split_applied (user_id, run_id, symbol, ex_date, logical_time) "
        "VALUES (:'ann', :'live', 'AAPL', '2024-01-05', :'t2')",
        "split_applied_when_due",
    ),
    _attack(
        "split of the day of the last tick, again",
        "INSERT INTO split_applied (user_id, run_id, symbol, ex_date, logical_time) "
        "VALUES (:'ann', :'live', 'AAPL', '2024-01-04', :'t3')",
        "split_applied_when_due",
    ),
    _attack(
        "split twice in one statement",
        "INSERT INTO split_applied (user_id, run_id, symbol, ex_date, logical_time) "
        "VALUES (:'ann', :'live', 'AAPL', '2024-01-05', :'t3'), "
        "(:'ann', :'live', 'AAPL', '2024-01-05', :'t3')",
        "split_applied_pkey",
    ),
    _attack(
        "split and trade in one statement",
        "WITH s AS (INSERT INTO split_applied (user_id, run_id, symbol, ex_date, logical_time) "
        "VALUES (:'ann', :'live', 'AAPL', '2024-01-05', :'t3')) "
        f"{TRADE}, logical_time) VALUES (:'ann', :'live', :'resting', 6, 16, :'t3')",
        "split_applied_starts_from_position",
    ),
    _attack(
        "split of a size of one's own",
        "INSERT INTO split_applied (user_id, run_id, symbol, ex_date, logical_time, "
        "quantity_before, quantity_after) "
        "VALUES (:'ann', :'live', 'AAPL', '2024-01-08', :'t4', 1, 1e6)",
        "split_applied_is_announced",
        DENIED,
    ),
    _attack(
        "order restated without a split",
        "UPDATE orders SET quantity = quantity * 3, limit_price = round(limit_price / 3, 8) "
        "WHERE order_id = :'resting' AND run_id = :'live'",
        "orders_terms_fixed",
    ),
]

# Postgres refuses a value for a generated column before it asks for the right to give one.
_MARKS = [
    _attack(
        "equity by hand",
        "INSERT INTO mtm_ledger (user_id, run_id, logical_time, equity) "
        "VALUES (:'ann', :'live', :'t3', 1e6)",
        "mtm_ledger_equity_generated",
    ),
    _attack(
        "equity by hand through the view",
        "INSERT INTO paper_equity_curve (user_id, run_id, logical_time, equity) "
        "VALUES (:'ann', :'live', :'t3', 1e6)",
        "mtm_ledger_equity_generated",
    ),
    *(
        _attack(
            f"{column} of a mark by hand",
            f"INSERT INTO {table} (user_id, run_id, logical_time, {column}) "
            f"VALUES (:'ann', :'live', :'t3', {value})",
            "mtm_ledger_equals_books",
            DENIED,
        )
        for table in ("mtm_ledger", "paper_equity_curve")
        for column in ("cash", "market_value")
        for value in ("1", "'NaN'", "'Infinity'")
    ),
    _attack(
        "two marks at one logical time",
        "INSERT INTO mtm_ledger (user_id, run_id, logical_time) VALUES (:'ann', :'live', :'t2')",
        "mtm_ledger_one_per_logical_time",
    ),
    _attack(
        "mark before the last one",
        "INSERT INTO mtm_ledger (user_id, run_id, logical_time) VALUES (:'ann', :'live', :'t1')",
        "mtm_ledger_time_moves_forward",
    ),
    _attack(
        "today's books as a mark of before the last event",
        f"{EVENT} VALUES (:'ann', :'live', :'t4', 'NOTE', '', '{{}}'); "
        "INSERT INTO mtm_ledger (user_id, run_id, logical_time) VALUES (:'ann', :'live', :'t3')",
        "mtm_ledger_time_moves_forward",
    ),
    _attack(
        "mark at the end of time",
        "INSERT INTO mtm_ledger (user_id, run_id, logical_time) "
        "VALUES (:'ann', :'live', 'infinity')",
        "mtm_ledger_logical_time_in_range",
    ),
]

_LEDGER = [
    _attack(
        "two ticks at one logical time",
        f"{EVENT} VALUES (:'ann', :'live', :'t2', 'TICK', '', '{{}}')",
        "event_ledger_once_per_logical_time",
    ),
    _attack(
        "a second tick under another subject",
        f"{EVENT} VALUES (:'ann', :'live', :'t2', 'TICK', 'again', '{{}}')",
        "event_ledger_tick_has_no_subject",
    ),
    _attack(
        "two ticks in one statement",
        f"{EVENT} VALUES (:'ann', :'live', :'t3', 'TICK', '', '{{}}'), "
        "(:'ann', :'live', :'t3', 'TICK', '', '{}')",
        "event_ledger_once_per_logical_time",
    ),
    _attack(
        "tick before the last one",
        f"{EVENT} VALUES (:'ann', :'live', :'t1', 'TICK', '', '{{}}')",
        "event_ledger_time_moves_forward",
    ),
    _attack(
        "event before the last one",
        f"{EVENT} VALUES (:'ann', :'live', '2001-01-01', 'NOTE', '', '{{}}')",
        "event_ledger_time_moves_forward",
    ),
    _attack(
        "event at the end of time",
        f"{EVENT} VALUES (:'ann', :'live', 'infinity', 'NOTE', '', '{{}}')",
        "event_ledger_logical_time_in_range",
    ),
    _attack(
        "events in one statement that go back in time",
        f"{EVENT} VALUES (:'ann', :'live', :'t4', 'NOTE', '', '{{}}'), "
        "(:'ann', :'live', :'t3', 'NOTE', '', '{}')",
        "event_ledger_time_moves_forward",
    ),
    *(
        _attack(
            f"event number {seq}",
            "INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, seq) "
            f"VALUES (:'ann', :'live', :'t3', 'NOTE', {seq})",
            "event_ledger_seq_without_gap",
            DENIED,
        )
        for seq in ("0", "-1", "1", "21", "23", "9223372036854775807")
    ),
    _attack(
        "event with a forged hash",
        "INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, hash) "
        "VALUES (:'ann', :'live', :'t3', 'NOTE', sha256('x'))",
        "event_ledger_hash_chain",
        DENIED,
    ),
    *(
        _attack(f"event type {word!r}", sql, "event_ledger_event_type_format")
        for word, sql in (
            (word, f"{EVENT} VALUES (:'ann', :'live', :'t3', '{word}', '', '{{}}')")
            for word in ("tick", "TICK ", "", "1TICK")
        )
    ),
    _attack(
        "event with a payload that is no object",
        f"{EVENT} VALUES (:'ann', :'live', :'t3', 'NOTE', '', '[]')",
        "event_ledger_payload_is_object",
    ),
    _attack(
        "event with an endless subject",
        f"{EVENT} VALUES (:'ann', :'live', :'t3', 'NOTE', repeat('x', 10000), '{{}}')",
        "event_ledger_subject_short",
    ),
    _attack(
        "a plan's occasion a second time",
        f"{EVENT} VALUES (:'ann', :'live', :'t3', 'SIP_REJECTED', 'apples@2024-01', '{{}}')",
        "event_ledger_occasion_once",
    ),
    *(
        _attack(
            f"forged {event_type}",
            f"{EVENT} VALUES (:'ann', :'live', :'t3', '{event_type}', {subject}, '{payload}')",
            "event_ledger_tells_what_happened",
        )
        for event_type, subject, payload in (
            ("TICK", "''", '{"cash": 1, "market_value": 1, "equity": 2}'),
            ("TICK", "''", '{"equity": 1000000}'),
            (
                "EXECUTION",
                ":'resting' || '/F1'",
                '{"symbol": "AAPL", "side": "SELL", "quantity": 1, "price": 1000000, '
                '"commission": 0}',
            ),
            ("EXECUTION", ":'filled' || '/X1'", "{}"),
            ("EXECUTION", "'x'", "{}"),
            ("SPLIT_APPLIED", "'AAPL@2024-01-05'", '{"symbol": "AAPL", "quantity_after": 1000}'),
            ("SPLIT_APPLIED", "'AAPL@2024-01-04'", '{"symbol": "AAPL", "quantity_after": 1000}'),
            ("ORDER_PLACED", ":'resting'", "{}"),
            ("ORDER_PLACED", ":'new_order'", "{}"),
            ("ORDER_PLACED", ":'theirs'", "{}"),
            ("ORDER_PLACED", "'nonsense'", "{}"),
            ("ORDER_PLACED", "repeat('-', 36)", "{}"),
            ("ORDER_CANCELED", ":'resting'", "{}"),
            ("ORDER_CANCELED", ":'canceled'", "{}"),
            ("ORDER_RESTATED", ":'resting' || '@2024-01-05'", "{}"),
            ("ORDER_FILLED", ":'filled'", "{}"),
            ("ORDER_ANYTHING", "''", "{}"),
            ("RUN_STOPPED", "''", "{}"),
            ("RUN_ERROR", "''", "{}"),
            ("RUN_STOPPING", "''", "{}"),
        )
    ),
    _attack(
        "a rejected order told as placed",
        f"{ORDER}, logical_time) VALUES (:'ann', :'live', :'new_order', 'AAPL', 'BUY', 0, :'t3'); "
        f"{EVENT} VALUES (:'ann', :'live', :'t3', 'ORDER_PLACED', :'new_order', '{{}}')",
        "event_ledger_tells_what_happened",
    ),
    _attack(
        "a placed order told under a longer name",
        f"{ORDER}, logical_time) VALUES (:'ann', :'live', :'new_order', 'AAPL', 'SELL', 1, :'t3'); "
        f"{EVENT} VALUES (:'ann', :'live', :'t3', 'ORDER_PLACED', :'new_order' || '@x', '{{}}')",
        "event_ledger_tells_what_happened",
    ),
    _attack(
        "the end of a run told before it ends",
        f"{EVENT} VALUES (:'ann', :'live', :'t3', 'RUN_STOPPED', '', '{{}}'), "
        "(:'ann', :'live', :'t4', 'NOTE', '', '{}'); "
        "UPDATE strategy_run SET status = 'STOPPED' WHERE run_id = :'live'",
        "event_ledger_run_ends_once",
    ),
    _attack(
        "engine_state that forgets the last tick",
        "UPDATE engine_state SET last_logical_time = NULL WHERE run_id = :'live'",
        "engine_state_time_is_last_tick",
    ),
    _attack(
        "engine_state ahead of the last tick",
        "UPDATE engine_state SET last_logical_time = :'t3' WHERE run_id = :'live'",
        "engine_state_time_is_last_tick",
    ),
    _attack(
        "engine_state of a run that ticked, as if it had not",
        "INSERT INTO engine_state (user_id, run_id, last_logical_time) "
        "VALUES (:'ben', :'bens', :'t1')",
        "engine_state_time_is_last_tick",
    ),
    _attack(
        "engine_state that is no object",
        "UPDATE engine_state SET state = '7' WHERE run_id = :'live'",
        "engine_state_state_is_object",
    ),
    _attack(
        "error without a time",
        "UPDATE engine_status SET last_error = 'x' WHERE run_id = :'live'",
        "engine_status_error_has_time",
    ),
    _attack(
        "lag that is no number",
        "UPDATE engine_status SET lag_seconds = 'NaN' WHERE run_id = :'live'",
        "engine_status_lag_in_range",
    ),
    _attack(
        "heartbeat at the end of time",
        "UPDATE engine_status SET heartbeat_at = 'infinity' WHERE run_id = :'live'",
        "engine_status_times_in_range",
    ),
    _attack(
        "plan renamed, to buy again",
        "UPDATE sip_plan SET plan = 'pears' WHERE run_id = :'live'",
        "sip_plan_name_fixed",
        DENIED,
    ),
]


def _edits_of_history() -> list[Attack]:
    found = [
        _attack(f"{verb} {table}", f"{verb} {table} {rest}", f"{table}_append_only", DENIED)
        for table in HISTORY
        for verb, rest in (
            ("UPDATE", "SET logical_time = logical_time WHERE run_id = :'live'"),
            ("UPDATE", "SET recorded_at = '2001-01-01' WHERE run_id = :'stopped'"),
            ("DELETE FROM", "WHERE run_id = :'live'"),
            ("DELETE FROM", "WHERE run_id = :'stopped'"),
            ("TRUNCATE", ""),
            ("TRUNCATE", "CASCADE"),
        )
        # The stopped run went through no split; Postgres itself refuses to empty what others name.
        if not (table == "split_applied" and "stopped" in rest)
        and (table, verb, rest) != ("execution", "TRUNCATE", "")
    ]
    kept = [table for table in RUN_TABLES if table not in (*HISTORY, "risk_limit")]
    found += [
        _attack(f"TRUNCATE {table}", f"TRUNCATE {table} CASCADE", f"{table}_kept", DENIED)
        for table in kept
    ]
    found += [
        _attack(
            f"DELETE FROM {table}",
            f"DELETE FROM {table} WHERE run_id = :'live'",
            f"{table}_kept",
            DENIED,
        )
        for table in ("engine_state", "engine_status", "orders", "position", "sip_plan")
    ]
    found.append(
        _attack("TRUNCATE app_user", "TRUNCATE app_user CASCADE", "strategy_run_kept", DENIED)
    )
    return found


_TRICKS = [
    _attack(
        "a temporary table in the place of strategy_run",
        "CREATE TEMP TABLE strategy_run (LIKE public.strategy_run); "
        "INSERT INTO pg_temp.strategy_run SELECT * FROM public.strategy_run; "
        "UPDATE pg_temp.strategy_run SET status = 'RUNNING'; "
        "INSERT INTO public.orders (user_id, run_id, order_id, symbol, side, quantity) "
        "VALUES (:'ann', :'stopped', :'new_order', 'AAPL', 'BUY', 1)",
        "orders_run_is_running",
    ),
    _attack(
        "a temporary table in the place of orders",
        "SET LOCAL search_path = pg_temp, public; "
        "CREATE TEMP TABLE orders (LIKE public.orders); "
        "INSERT INTO pg_temp.orders SELECT * FROM public.orders; "
        "UPDATE pg_temp.orders SET status = 'NEW', filled_quantity = 0; "
        "INSERT INTO public.execution (user_id, run_id, order_id, quantity, price) "
        "VALUES (:'ann', :'live', :'canceled', 1, 50)",
        "execution_order_is_open",
    ),
    _attack(
        "a temporary table in the place of order_transition",
        "SET LOCAL search_path = pg_temp, public; "
        "CREATE TEMP TABLE order_transition AS SELECT 'PARTIALLY_FILLED' AS from_status, "
        "'NEW' AS to_status; "
        "UPDATE public.orders SET status = 'NEW' "
        "WHERE order_id = :'partly' AND run_id = :'live'",
        "orders_status_transition",
    ),
    _attack(
        "a temporary function in the place of run_lock",
        "CREATE FUNCTION pg_temp.run_lock(uuid, uuid, text, VARIADIC text[]) "
        "RETURNS public.strategy_run LANGUAGE sql "
        "AS 'SELECT r FROM public.strategy_run r LIMIT 1'; "
        "SET LOCAL search_path = pg_temp, public; "
        "INSERT INTO public.orders (user_id, run_id, order_id, symbol, side, quantity) "
        "VALUES (:'ann', :'stopped', :'new_order', 'AAPL', 'BUY', 1)",
        "orders_run_is_running",
    ),
    _attack(
        "a function of one's own in the place of sha256",
        "CREATE FUNCTION pg_temp.sha256(bytea) RETURNS bytea LANGUAGE sql "
        "AS $$SELECT decode(repeat('00', 32), 'hex')$$; "
        "SET LOCAL search_path = pg_temp, public, pg_catalog; "
        "INSERT INTO public.event_ledger (user_id, run_id, logical_time, event_type, hash) "
        "VALUES (:'ann', :'live', :'t3', 'NOTE', decode(repeat('00', 32), 'hex'))",
        "event_ledger_hash_chain",
        DENIED,
    ),
    # A trigger on a table of one's own is as deep as ours are.
    *(
        _attack(
            f"{name}, from a trigger of one's own",
            "CREATE TEMP TABLE mine (x int); "
            "CREATE FUNCTION pg_temp.deep() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN {sql}; RETURN NULL; END $$; "
            "CREATE TRIGGER deep AFTER INSERT ON mine FOR EACH ROW "
            "EXECUTE FUNCTION pg_temp.deep(); INSERT INTO mine VALUES (1)",
            rule,
            # New terms may be the engine's to write, where a broker has them.
            rule if name == "a quantity" else DENIED,
        )
        for name, sql, rule in (
            (
                "cash",
                "UPDATE public.strategy_run SET cash = 1e6 WHERE run_id = :'live'",
                "strategy_run_cash_from_executions",
            ),
            (
                "a filled quantity",
                "UPDATE public.orders SET filled_quantity = 1, status = 'PARTIALLY_FILLED' "
                "WHERE order_id = :'resting' AND run_id = :'live'",
                "orders_filled_from_executions",
            ),
            (
                "a quantity",
                "UPDATE public.orders SET quantity = 1 "
                "WHERE order_id = :'resting' AND run_id = :'live'",
                "orders_terms_fixed",
            ),
            (
                "a position",
                "UPDATE public.position SET quantity = 1e6 WHERE run_id = :'live'",
                "position_from_executions",
            ),
            (
                "a new position",
                "INSERT INTO public.position (user_id, run_id, symbol, quantity, mark_price, "
                "marked_at) VALUES (:'ann', :'live', 'MSFT', 1e6, 1, now())",
                "position_from_executions",
            ),
            *(
                (
                    f"the deletion of {table}",
                    f"DELETE FROM public.{table} WHERE run_id = :'live'",
                    f"{table}_append_only" if table in HISTORY else f"{table}_kept",
                )
                for table in RUN_TABLES
                if table not in ("strategy_run", "risk_limit")
            ),
            *(
                (
                    f"an edit of {table}",
                    f"UPDATE public.{table} SET recorded_at = now() WHERE run_id = :'live'",
                    f"{table}_append_only",
                )
                for table in HISTORY
            ),
        )
    ),
    _attack(
        "our trigger on a table of one's own: executions that never were",
        "CREATE TEMP TABLE mine (LIKE public.execution); "
        "CREATE TRIGGER t AFTER INSERT ON mine REFERENCING NEW TABLE AS new_rows "
        "FOR EACH STATEMENT EXECUTE FUNCTION public.execution_apply(); "
        "INSERT INTO mine (user_id, run_id, order_id, execution_id, symbol, side, quantity, price, "
        "commission, commission_currency, logical_time, event_at, recorded_at) "
        "VALUES (:'ann', :'live', :'stop', 'F1', 'AAPL', 'SELL', 3, 1e6, 0, 'USD', :'t3', "
        ":'t3', :'t3')",
        "event_ledger_tells_what_happened",
        DENIED,
    ),
    _attack(
        "foreign keys put off",
        f"SET CONSTRAINTS ALL DEFERRED; {smallest_inserts('live', 'ben')['engine_status']}",
        "engine_status_belongs_to_run",
    ),
    _attack(
        "triggers switched off for the session",
        "SET LOCAL session_replication_role = replica; DELETE FROM event_ledger",
        DENIED,
    ),
    _attack(
        "a generated column by UPDATE ... DEFAULT and more",
        "UPDATE position SET market_value = DEFAULT, quantity = 1 WHERE run_id = :'live'",
        "position_from_executions",
        DENIED,
    ),
    _attack(
        "an update hidden in a query",
        "WITH w AS (UPDATE strategy_run SET cash = 1e6 WHERE run_id = :'live' RETURNING cash) "
        "SELECT cash FROM w",
        "strategy_run_cash_from_executions",
        DENIED,
    ),
    _attack(
        "a trade and its cash in one statement",
        "WITH w AS (UPDATE strategy_run SET cash = cash + 500 WHERE run_id = :'live') "
        f"{TRADE}) VALUES (:'ann', :'live', :'resting', 1, 16)",
        "strategy_run_cash_from_executions",
        DENIED,
    ),
    _attack(
        "history deleted beside an insert",
        "WITH d AS (DELETE FROM event_ledger WHERE run_id = :'live') "
        f"{EVENT} VALUES (:'ann', :'live', :'t3', 'NOTE', '', '{{}}')",
        "event_ledger_append_only",
        DENIED,
    ),
    _attack(
        "MERGE that updates an order",
        "MERGE INTO orders o USING (SELECT :'resting'::uuid AS id) s "
        "ON o.order_id = s.id AND o.run_id = :'live' "
        "WHEN MATCHED THEN UPDATE SET quantity = 1",
        "orders_terms_fixed",
    ),
    _attack(
        "MERGE that deletes history",
        "MERGE INTO event_ledger e USING (SELECT :'live'::uuid AS id) s ON e.run_id = s.id "
        "WHEN MATCHED THEN DELETE",
        "event_ledger_append_only",
        DENIED,
    ),
    _attack(
        "MERGE that inserts into a stopped run",
        "MERGE INTO engine_status e USING (SELECT :'failed'::uuid AS id) s ON e.run_id = s.id "
        "WHEN NOT MATCHED THEN INSERT (user_id, run_id) VALUES (:'eve', s.id)",
        "engine_status_run_is_running",
    ),
]

ATTACKS = [
    *_writes_into_a_run_that_does_not_run(),
    *_writes_with_another_users_run(),
    *_STOPPED_ROWS,
    *_RUNS,
    *_ORDERS,
    *_TRADES,
    *_POSITIONS,
    *_SPLITS,
    *_MARKS,
    *_LEDGER,
    *_edits_of_history(),
    *_TRICKS,
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_in_plain_sql_is_refused(world: Connection, attack: Attack) -> None:
    for role, rule in (("oms_owner", attack.owner), ("oms_engine", attack.engine)):
        assert_refused(world, attack.sql, role, rule)


def _copy(conn: Connection, table: str, values: dict[str, str]) -> None:
    columns = ", ".join(values)
    with conn.cursor().copy(f"COPY {table} ({columns}) FROM STDIN".encode()) as copy:
        copy.write_row([said(value).decode().strip("'") for value in values.values()])


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("table", "values", "rule"),
    [
        ("execution", {"order_id": ":'filled'", "quantity": "1", "price": "5"}, "order_is_open"),
        ("orders", {"symbol": "AAPL", "side": "BUY", "quantity": "NaN"}, "quantity_in_range"),
        (
            "event_ledger",
            {"logical_time": ":'t2'", "event_type": "TICK"},
            "once_per_logical_time",
        ),
        ("mtm_ledger", {"logical_time": ":'t1'"}, "time_moves_forward"),
    ],
)
def test_copy_meets_the_same_rules(
    world: Connection, role: str, table: str, values: dict[str, str], rule: str
) -> None:
    key = {"user_id": ":'ann'", "run_id": ":'live'"}
    before = contents(world)
    with pytest.raises(psycopg.Error) as caught, world.transaction(), acting_as(world, role):
        _copy(world, table, key | values)
    meaning = typed(caught.value)
    assert isinstance(meaning, RuleViolation)
    assert (meaning.constraint, bool(meaning.hint)) == (f"{table}_{rule}", True)
    assert contents(world) == before


@pytest.mark.parametrize(
    ("table", "given"),
    [
        ("orders", "symbol, side, quantity) VALUES (:'ann', :'live', NOW, 'AAPL', 'SELL', 1)"),
        ("execution", "order_id, quantity, price) VALUES (:'ann', :'live', NOW, :'stop', 1, 27)"),
        ("mtm_ledger", "logical_time) VALUES (:'ann', :'live', NOW, :'t3')"),
        ("event_ledger", "event_type) VALUES (:'ann', :'live', NOW, 'NOTE')"),
        (
            "split_applied",
            "symbol, ex_date, logical_time) "
            "VALUES (:'ann', :'live', NOW, 'AAPL', '2024-01-05', :'t3')",
        ),
        ("engine_state", "state) VALUES (:'ben', :'bens', NOW, '{}')"),
    ],
)
def test_when_a_row_was_recorded_is_not_for_its_writer_to_say(
    world: Connection, table: str, given: str
) -> None:
    sql = f"INSERT INTO {table} (user_id, run_id, recorded_at, {given}".replace(
        "NOW", "'2001-01-01'"
    )
    assert rows(world, f"{sql} RETURNING recorded_at = now()") == [(True,)]


def test_when_a_run_or_plan_was_made_is_not_for_its_writer_to_say(world: Connection) -> None:
    assert rows(
        world,
        "INSERT INTO strategy_run (user_id, status, created_at, stopped_at) "
        "VALUES (:'eve', 'STOPPED', '2001-01-01', '2001-01-02') "
        "RETURNING created_at = now(), stopped_at = now()",
    ) == [(True, True)]
    assert rows(
        world,
        "INSERT INTO sip_plan (user_id, run_id, plan, symbol, amount, created_at) "
        "VALUES (:'ann', :'live', 'pears', 'AAPL', 1, '2001-01-01') RETURNING created_at = now()",
    ) == [(True,)]


def test_an_execution_is_of_its_orders_symbol_and_side_whatever_it_says(world: Connection) -> None:
    assert rows(
        world,
        "INSERT INTO execution (user_id, run_id, order_id, symbol, side, quantity, price) "
        "VALUES (:'ann', :'live', :'stop', 'MSFT', 'BUY', 1, 27) RETURNING symbol, side",
    ) == [("AAPL", "SELL")]


def test_two_buys_in_one_statement_share_the_cash(world: Connection) -> None:
    """The gate sees the rows of its own statement too."""
    found = rows(
        world,
        "INSERT INTO orders (user_id, run_id, symbol, side, quantity, order_type, limit_price) "
        "SELECT :'ann', :'live', 'MSFT', 'BUY', 1, 'LIMIT', 5000 FROM generate_series(1, 2) "
        "RETURNING status, reject_code",
    )
    assert sorted(found) == [("NEW", None), ("REJECTED", "INSUFFICIENT_CASH")]


def test_two_sales_in_one_statement_share_the_position(world: Connection) -> None:
    found = rows(
        world,
        "INSERT INTO orders (user_id, run_id, symbol, side, quantity) "
        "SELECT :'ann', :'live', 'AAPL', 'SELL', 15 FROM generate_series(1, 2) "
        "RETURNING status, reject_code",
    )
    assert sorted(found) == [("NEW", None), ("REJECTED", "INSUFFICIENT_POSITION")]


def test_a_negative_reference_price_does_not_make_room_for_others(world: Connection) -> None:
    """It would count as cash that the order gives back."""
    order = (
        "INSERT INTO orders (user_id, run_id, symbol, side, quantity, reference_price) "
        "VALUES (:'ann', :'live', 'IBM', 'BUY', 1, {}) RETURNING reject_code, reserved_cash"
    )
    assert rows(world, order.format("-1000000")) == [("PRICE_NOT_POSITIVE", 0)]
    assert rows(world, order.format("0")) == [("PRICE_NOT_POSITIVE", 0)]


@pytest.mark.parametrize("view", ["paper_order", "paper_trade", "paper_equity_curve"])
def test_a_view_takes_no_row_of_a_run_that_is_not_on_paper(world: Connection, view: str) -> None:
    world.execute(
        said(
            "INSERT INTO strategy_run (user_id, run_id, status, broker, initial_cash) "
            "VALUES (:'eve', :'new_order', 'RUNNING', 'dummy', 1000); "
            "INSERT INTO broker_account (user_id, account, broker) "
            "VALUES (:'eve', 'A1', 'dummy'); "
            "INSERT INTO run_route (user_id, run_id, account) VALUES (:'eve', :'new_order', 'A1'); "
            "INSERT INTO orders (user_id, run_id, order_id, symbol, side, quantity) "
            "VALUES (:'eve', :'new_order', :'new_order', 'AAPL', 'BUY', 1)"
        )
    )
    sql = smallest_inserts("new_order", "eve")[view]
    assert_refused(world, sql, "oms_owner", f"{view}_shows_the_row")
    assert_refused(world, sql, "oms_engine", f"{view}_shows_the_row")


@pytest.mark.parametrize("run", ["live", "stopped", "created", "bens", "failed", "margin"])
def test_a_deleted_run_takes_everything_with_it_and_nothing_else(
    world: Connection, run: str
) -> None:
    query = "SELECT count(*) FROM {} WHERE run_id {} :'" + run + "'"
    others = [rows(world, query.format(table, "<>")) for table in RUN_TABLES]
    world.execute(said(f"DELETE FROM strategy_run WHERE run_id = :'{run}'"))
    assert [rows(world, query.format(table, "=")) for table in RUN_TABLES] == [[(0,)]] * len(
        RUN_TABLES
    )
    assert [rows(world, query.format(table, "<>")) for table in RUN_TABLES] == others
    assert findings(world) == []


def test_a_deleted_user_takes_the_runs_along(world: Connection) -> None:
    world.execute(said("DELETE FROM app_user WHERE user_id = :'ann'"))
    left = [
        rows(world, f"SELECT count(*) FROM {table} WHERE user_id = :'ann'") for table in RUN_TABLES
    ]
    assert left == [[(0,)]] * len(RUN_TABLES)


def test_the_engine_can_not_delete_a_run(world: Connection) -> None:
    sql = "DELETE FROM strategy_run WHERE run_id = :'stopped'"
    assert_refused(world, sql, "oms_engine", DENIED)


@pytest.mark.parametrize("statement", ["SELECT grant_roles()", "CREATE TABLE public.mine (x int)"])
def test_the_engine_can_not_give_itself_rights_or_tables(world: Connection, statement: str) -> None:
    assert_refused(world, statement, "oms_engine", DENIED)


@pytest.mark.parametrize(
    "value", ["'1e200000'::numeric", "'x'::numeric", "'not-a-uuid'::uuid", "'2024-13-01'::date"]
)
def test_a_value_that_postgres_can_not_take_is_bad_input(world: Connection, value: str) -> None:
    """No constraint is asked then; that nothing is written holds all the same."""
    assert isinstance(refusal(world, f"SELECT {value}", "oms_engine"), BadInput)
