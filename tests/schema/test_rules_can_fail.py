"""That the rules are what refuses: without the constraint or trigger, the attack succeeds.

Each case is refused first, then the guards that are named are dropped, and the same SQL goes
through. Where two guards hold a rule, both have to go: that is said by dropping both.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
from market_cases import CHARGE, COMMAND, book
from schema_cases import NAMES, assert_refused, findings, said

from engine.db.connect import Connection, open_connection


class Case(NamedTuple):
    """An attack, the rule that refuses it, the guards to drop, and the audit that sees it then.

    ``seen_by`` is empty where what the attack leaves contradicts no other row.
    """

    name: str
    attack: str
    rule: str
    drop: str
    seen_by: str


_EVENT = """INSERT INTO event_ledger (user_id, run_id, seq, logical_time, event_type, hash)
    VALUES (:'ann', :'live', {seq}, {at}, '{kind}', sha256('x'))"""

_UNGUARDED = (
    "DROP TRIGGER event_ledger_a_append ON event_ledger; "
    "DROP TRIGGER event_ledger_m_prove ON event_ledger; "
    "ALTER TABLE event_ledger ALTER recorded_at SET DEFAULT now()"
)

CASES = [
    Case(
        "a write into a stopped run",
        "INSERT INTO engine_status (user_id, run_id) VALUES (:'eve', :'failed')",
        "engine_status_run_is_running",
        "DROP TRIGGER engine_status_a_guard_write ON engine_status",
        "",
    ),
    Case(
        "a row of one user with another's run",
        "INSERT INTO engine_status (user_id, run_id) VALUES (:'ben', :'live')",
        "engine_status_belongs_to_run",
        "DROP TRIGGER engine_status_a_guard_write ON engine_status; "
        "ALTER TABLE engine_status DROP CONSTRAINT engine_status_belongs_to_run",
        "audit_orphan",
    ),
    Case(
        "a second RUNNING run",
        "INSERT INTO strategy_run (user_id, status, cash) VALUES (:'ann', 'RUNNING', 0)",
        "strategy_run_one_running_per_user",
        "DROP TRIGGER strategy_run_a_prepare_insert ON strategy_run; "
        "DROP INDEX strategy_run_one_running_per_user",
        "audit_running",
    ),
    Case(
        "an ended run that runs again",
        "UPDATE strategy_run SET status = 'RUNNING', stopped_at = NULL WHERE run_id = :'failed'",
        "strategy_run_status_transition",
        "DROP TRIGGER strategy_run_a_check_update ON strategy_run; "
        "DROP TRIGGER strategy_run_b_check_move ON strategy_run",
        "",
    ),
    Case(
        "an illegal order move",
        "UPDATE orders SET status = 'NEW', status_at = :'t2' "
        "WHERE order_id = :'canceled' AND run_id = :'live'",
        "orders_status_transition",
        "DROP TRIGGER orders_b_check_move ON orders",
        "audit_event",
    ),
    Case(
        "an overfill",
        "INSERT INTO execution (user_id, run_id, order_id, quantity, price) "
        "VALUES (:'ann', :'live', :'partly', 9, 20)",
        "orders_not_overfilled_on_paper",
        "ALTER TABLE orders DROP CONSTRAINT orders_not_overfilled_on_paper",
        "",
    ),
    Case(
        "a trade on a closed order",
        "INSERT INTO execution (user_id, run_id, order_id, symbol, side, quantity, price, "
        "commission_currency, logical_time, event_at) "
        "VALUES (:'ann', :'live', :'canceled', 'AAPL', 'BUY', 1, 50, 'USD', :'t3', :'t3')",
        "execution_order_is_open",
        "DROP TRIGGER execution_a_prepare_insert ON execution; "
        "ALTER TABLE execution ALTER recorded_at SET DEFAULT now(); "
        "DROP TRIGGER orders_b_check_move ON orders",
        "audit_event",
    ),
    Case(
        "a filled quantity that no trade makes",
        "UPDATE orders SET filled_quantity = 2 WHERE order_id = :'partly' AND run_id = :'live'",
        "orders_filled_from_executions",
        "DROP TRIGGER orders_a_check_update ON orders",
        "audit_order",
    ),
    Case(
        "cash that no trade makes",
        "UPDATE strategy_run SET cash = cash + 1 WHERE run_id = :'live'",
        "strategy_run_cash_from_executions",
        "DROP TRIGGER strategy_run_a_check_update ON strategy_run",
        "audit_cash",
    ),
    Case(
        "cash below zero",
        # By its commission: a purchase that costs too much is refused with its event, too.
        "INSERT INTO execution (user_id, run_id, order_id, quantity, price, commission) "
        "VALUES (:'ann', :'live', :'stop', 1, 80, 20000)",
        "strategy_run_cash_not_negative_in_cash_account",
        "ALTER TABLE strategy_run DROP CONSTRAINT strategy_run_cash_not_negative_in_cash_account",
        "audit_cash",
    ),
    Case(
        "a position that no trade makes",
        "UPDATE position SET quantity = quantity + 1 WHERE run_id = :'live'",
        "position_from_executions",
        "DROP TRIGGER position_a_check_write ON position",
        "audit_position",
    ),
    Case(
        "an edit of history",
        "UPDATE event_ledger SET payload = '{\"cash\": 1}' WHERE run_id = :'live' AND seq = 15",
        "event_ledger_append_only",
        "DROP TRIGGER event_ledger_z_refuse_change ON event_ledger",
        "audit_chain",
    ),
    Case(
        "a deletion of history",
        "DELETE FROM execution WHERE run_id = :'live' AND execution_id = 'X1'",
        "execution_append_only",
        "DROP TRIGGER execution_z_refuse_change ON execution",
        "audit_event",
    ),
    Case(
        "a skipped event",
        _EVENT.format(seq=99, at=":'t3'", kind="NOTE"),
        "event_ledger_seq_without_gap",
        f"{_UNGUARDED}",
        "audit_chain",
    ),
    Case(
        "a forged event",
        "INSERT INTO event_ledger (user_id, run_id, event_type, subject) "
        "VALUES (:'ann', :'live', 'ORDER_CANCELED', :'resting')",
        "event_ledger_tells_what_happened",
        "DROP TRIGGER event_ledger_m_prove ON event_ledger",
        "audit_event",
    ),
    Case(
        "an end that did not come",
        "INSERT INTO event_ledger (user_id, run_id, event_type) "
        "VALUES (:'ann', :'live', 'RUN_STOPPED')",
        "event_ledger_tells_what_happened",
        "DROP TRIGGER event_ledger_m_check_end ON event_ledger",
        "audit_event",
    ),
    Case(
        "an event before the last one",
        "INSERT INTO event_ledger (user_id, run_id, logical_time, event_type) "
        "VALUES (:'ann', :'live', :'t0', 'NOTE')",
        "event_ledger_time_moves_forward",
        f"{_UNGUARDED}; "
        "ALTER TABLE event_ledger ALTER seq SET DEFAULT 22, ALTER hash SET DEFAULT sha256('x')",
        "audit_chain",
    ),
    Case(
        "two ticks at one logical time",
        "INSERT INTO event_ledger (user_id, run_id, logical_time, event_type) "
        "VALUES (:'ann', :'live', :'t2', 'TICK')",
        "event_ledger_once_per_logical_time",
        f"{_UNGUARDED}; "
        "ALTER TABLE event_ledger DROP CONSTRAINT event_ledger_once_per_logical_time; "
        "ALTER TABLE event_ledger ALTER seq SET DEFAULT 22, ALTER hash SET DEFAULT sha256('x')",
        "audit_duplicate",
    ),
    Case(
        "two marks at one logical time",
        "INSERT INTO mtm_ledger (user_id, run_id, logical_time) VALUES (:'ann', :'live', :'t2')",
        "mtm_ledger_one_per_logical_time",
        "ALTER TABLE mtm_ledger DROP CONSTRAINT mtm_ledger_one_per_logical_time",
        "audit_duplicate",
    ),
    Case(
        "equity that is not cash and market value",
        "INSERT INTO mtm_ledger (user_id, run_id, logical_time, equity) "
        "VALUES (:'ann', :'live', :'t3', 1000000)",
        "mtm_ledger_equity_generated",
        "DROP VIEW audit_mark, paper_equity_curve; "
        "ALTER TABLE mtm_ledger ALTER equity DROP EXPRESSION",
        "",
    ),
    Case(
        "a split that nobody announced",
        "INSERT INTO split_applied (user_id, run_id, symbol, ex_date, logical_time, "
        "quantity_before, quantity_after) "
        "VALUES (:'ann', :'live', 'AAPL', '2024-01-08', :'t4', 30, 300)",
        "split_applied_is_announced",
        "DROP TRIGGER split_applied_a_prepare_insert ON split_applied; "
        "DROP TRIGGER split_applied_m_apply ON split_applied; "
        "ALTER TABLE split_applied DROP CONSTRAINT split_applied_is_announced",
        "audit_event",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_without_its_guard_the_attack_succeeds(world: Connection, case: Case) -> None:
    _assert_holds_by_its_guard(world, case)


def _assert_holds_by_its_guard(conn: Connection, case: Case) -> None:
    assert_refused(conn, case.attack, "oms_owner", case.rule)
    conn.execute(said(case.drop))
    assert findings(conn) == []
    conn.execute(said(case.attack))
    conn.execute("SET CONSTRAINTS ALL IMMEDIATE")
    if case.seen_by:
        assert case.seen_by in {view for view, *_ in findings(conn)}


_OF_DAN = "WHERE user_id = :'dan' AND order_id = :'o_routed'"

AT_BROKERS = [
    *(
        Case(
            f"{status} by nobody's word",
            f"UPDATE orders SET status = '{status}'{more} {_OF_DAN}",
            "orders_end_said_by_broker",
            "DROP TRIGGER orders_m_prove_end ON orders",
            "",
        )
        for status, more in (
            ("CANCELED", ""),
            ("EXPIRED", ""),
            ("REJECTED", ", reject_source = 'BROKER', reject_code = 'X'"),
        )
    ),
    Case(
        "a broker's id by nobody's word",
        f"UPDATE orders SET perm_id = 7 {_OF_DAN}",
        "orders_ids_said_by_broker",
        "DROP TRIGGER orders_m_check_ids ON orders",
        "audit_broker",
    ),
    Case(
        "whose order an id means by nobody's word",
        "INSERT INTO order_broker_id (user_id, run_id, order_id, account, perm_id, since) "
        "VALUES (:'dan', :'deals', :'o_routed', 'A1', 7, :'t1')",
        "order_broker_id_said_by_broker",
        "DROP TRIGGER order_broker_id_m_prove ON order_broker_id",
        "",
    ),
    Case(
        "a route to another broker",
        "INSERT INTO broker_account (user_id, account, broker) VALUES (:'dan', 'I1', 'ibkr'); "
        "INSERT INTO run_route (user_id, run_id, preference, account) "
        "VALUES (:'dan', :'deals', 3, 'I1')",
        "run_route_at_runs_broker",
        "DROP TRIGGER run_route_a_check_write ON run_route",
        "",
    ),
    Case(
        "a fill by nobody's word",
        book("o_routed", "X.01", 3),
        "execution_said_by_broker",
        "CREATE OR REPLACE FUNCTION execution_check_broker(e execution) RETURNS void "
        "LANGUAGE sql STABLE RETURN NULL",
        "audit_broker",
    ),
    Case(
        "a commission by nobody's word",
        f"{CHARGE}, rate, cost, logical_time) VALUES (:'dan', :'deals', 'F.01', -1000, 'USD', "
        ":'t1', 1, -1000, run_last_time(:'dan', :'deals'))",
        "execution_commission_said_by_broker",
        "DROP TRIGGER execution_commission_a_prepare_insert ON execution_commission",
        "audit_broker",
    ),
    Case(
        "a command past the gate",
        f"{COMMAND}) SELECT user_id, account, 'MODIFY', run_id, order_id, version + 1, "
        'orders_command_payload(o) || \'{"symbol": "IBM"}\' FROM orders o ' + _OF_DAN,
        "broker_command_agrees_with_order",
        "DROP TRIGGER broker_command_b_prove ON broker_command",
        "audit_broker",
    ),
    Case(
        "what is worked said to have never arrived",
        f"UPDATE broker_command SET outcome = 'NEVER_ARRIVED' {_OF_DAN}",
        "broker_command_outcome_said_by_broker",
        "DROP TRIGGER broker_command_b_prove_change ON broker_command",
        "",
    ),
]


@pytest.mark.parametrize("case", AT_BROKERS, ids=lambda case: case.name)
def test_without_its_guard_the_attack_at_a_broker_succeeds(market: Connection, case: Case) -> None:
    _assert_holds_by_its_guard(market, case)


def test_without_its_index_a_second_running_run_gets_through_a_race(
    scratch: Connection,
) -> None:
    """The trigger that says it with a hint sees committed rows only: the index is what holds."""
    scratch.execute("DROP INDEX strategy_run_one_running_per_user")
    start = said("INSERT INTO strategy_run (user_id, status) VALUES (:'eve', 'RUNNING')")
    with open_connection(scratch.info.dsn) as first, open_connection(scratch.info.dsn) as second:
        for conn in (first, second):
            conn.execute("BEGIN")
            conn.execute(start)
        for conn in (first, second):
            conn.execute("COMMIT")
    assert [view for view, *_ in findings(scratch)] == ["audit_running"]


def test_without_its_lock_a_write_gets_past_a_stop(scratch: Connection) -> None:
    """Reading the run's status is not enough: the row has to be locked until the commit."""
    body = """
        SELECT * INTO run FROM strategy_run WHERE user_id = of_user AND run_id = of_run;
        IF run.status <> ALL (allowed) THEN RAISE EXCEPTION 'no'; END IF;
        RETURN run;"""
    scratch.execute(
        "CREATE OR REPLACE FUNCTION run_lock(of_user uuid, of_run uuid, for_table text, "
        "VARIADIC allowed text[]) RETURNS strategy_run LANGUAGE plpgsql AS "
        f"$$ DECLARE run strategy_run; BEGIN {body} END $$"
    )
    with open_connection(scratch.info.dsn) as stopper, open_connection(scratch.info.dsn) as writer:
        stopper.execute("BEGIN")
        stopper.execute(said("UPDATE strategy_run SET status = 'STOPPED' WHERE run_id = :'bens'"))
        writer.execute(said("UPDATE engine_status SET lag_seconds = 1 WHERE run_id = :'bens'"))
        stopper.execute("COMMIT")
    row = scratch.execute(
        "SELECT lag_seconds FROM engine_status WHERE run_id = %s", [NAMES["bens"]]
    ).fetchone()
    assert row == (1,)


def test_without_the_gate_the_position_still_holds(world: Connection) -> None:
    """A sale of more than is held is refused twice: when it is ordered and when it is traded."""
    world.execute("DROP TRIGGER orders_b_pass_gate ON orders")
    sale = (
        "INSERT INTO orders (user_id, run_id, order_id, symbol, side, quantity) "
        "VALUES (:'ann', :'live', :'new_order', 'AAPL', 'SELL', 31); "
        "INSERT INTO execution (user_id, run_id, order_id, quantity, price) "
        "VALUES (:'ann', :'live', :'new_order', {}, 30)"
    )
    for role in ("oms_owner", "oms_engine"):
        assert_refused(world, sale.format(31), role, "position_not_short_in_cash_account")
    world.execute(said(sale.format(30)))
