"""Orders at a broker, from both sides: what an honest program does passes, attacks are refused.

The outbox says what the orders say and the gate allows; the books take from a broker what stands
in its inbox, and nothing else. Attacks are plain SQL, by the owner of the tables and by the
engine's role.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any, NamedTuple

import pytest
from market_cases import BOOK, CHARGE, COMMAND, PLACE, book, filled, heard, take_back
from schema_cases import (
    DENIED,
    ROLES,
    acting_as,
    assert_refused,
    findings,
    rows,
    said,
    smallest_inserts,
)

from engine.db.connect import Connection


class Attack(NamedTuple):
    """SQL, the rule that the owner meets and the one that the engine's role meets."""

    name: str
    sql: str
    owner: str
    engine: str


def _attack(name: str, sql: str, owner: str, engine: str | None = None) -> Attack:
    return Attack(name, sql, owner, owner if engine is None else engine)


def _order(order: str, change: str) -> str:
    return f"UPDATE orders SET {change} WHERE user_id = :'dan' AND order_id = :'{order}'"


def _command(
    kind: str, order: str, version: str = "version", account: str = "account", **terms: str
) -> str:
    """A command by hand, with the payload that its order has, but for some terms."""
    changed = "".join(f""" || '{{"{key}": "{value}"}}'""" for key, value in terms.items())
    return (
        f"{COMMAND}) SELECT user_id, {account}, '{kind}', run_id, order_id, {version}, "
        f"orders_command_payload(o){changed} FROM orders o "
        f"WHERE user_id = :'dan' AND order_id = :'{order}'"
    )


def _outcome(order: str, change: str, kind: str = "SUBMIT") -> str:
    return (
        f"UPDATE broker_command SET {change} WHERE user_id IN (:'dan', :'fay') "
        f"AND order_id = :'{order}' AND kind = '{kind}'"
    )


def _recovered(order: str, run: str = "deals", account: str = "'A1'", user: str = "dan") -> str:
    return (
        f"{PLACE}, account, recovered) VALUES (:'{user}', :'{run}', :'{order}', 'AAPL', 'BUY', 5, "
        f"'LIMIT', 20, :'t1', {account}, true)"
    )


AGREES = "broker_command_agrees_with_order"
_COMMANDS = [
    _attack("a submit of what the gate refused", _command("SUBMIT", "o_rejected"), AGREES),
    _attack("a submit of what is cancelled", _command("SUBMIT", "o_canceled"), AGREES),
    _attack(
        "a submit of what is worked, elsewhere",
        _command("SUBMIT", "o_routed", account="'A2'"),
        AGREES,
    ),
    _attack(
        "a submit of what waits, elsewhere", _command("SUBMIT", "o_waits", account="'A2'"), AGREES
    ),
    _attack("a submit of other terms", _command("SUBMIT", "o_lost", quantity="1000"), AGREES),
    _attack("a second submit", _command("SUBMIT", "o_waits"), "broker_command_submit_once"),
    _attack(
        "a second submit of what was sent",
        _command("SUBMIT", "o_sent"),
        "broker_command_submit_once",
    ),
    _attack("a cancel of what is worked", _command("CANCEL", "o_routed"), AGREES),
    _attack("a second cancel", _command("CANCEL", "o_canceling"), "broker_command_once_a_version"),
    _attack(
        "a cancel of another version", _command("CANCEL", "o_canceling", "version + 1"), AGREES
    ),
    _attack(
        "a change past the gate",
        _command("MODIFY", "o_routed", "version + 1", quantity="1000"),
        AGREES,
    ),
    _attack(
        "a change of the symbol",
        _command("MODIFY", "o_routed", "version + 1", symbol="IBM"),
        AGREES,
    ),
    _attack(
        "a change of the side", _command("MODIFY", "o_routed", "version + 1", side="SELL"), AGREES
    ),
    _attack(
        "a change below what is filled",
        _command("MODIFY", "o_partly", "version + 1", quantity="4"),
        AGREES,
    ),
    _attack("a change of the version seen", _command("MODIFY", "o_routed", quantity="11"), AGREES),
    _attack(
        "a second change",
        _command("MODIFY", "o_modifying", "version + 1", quantity="11"),
        AGREES,
    ),
    *(
        _attack(
            f"a change of {order}", _command("MODIFY", order, "version + 1", quantity="11"), AGREES
        )
        for order in ("o_waits", "o_lost", "o_filled", "o_canceled", "o_rejected", "o_canceling")
    ),
    _attack(
        "a command about another user's order",
        f"{COMMAND}) SELECT :'dan', 'A1', 'MODIFY', run_id, order_id, version + 1, "
        "orders_command_payload(o) FROM orders o WHERE order_id = :'o_fays'",
        "broker_command_belongs_to_run",
    ),
    _attack(
        "a submit of no order",
        "INSERT INTO broker_command (user_id, account, kind) VALUES (:'dan', 'A1', 'SUBMIT')",
        "broker_command_belongs_to_run",
    ),
    _attack(
        "a cancel of no order",
        "INSERT INTO broker_command (user_id, account, kind) VALUES (:'dan', 'A1', 'CANCEL')",
        AGREES,
    ),
    _attack(
        "a word that no broker knows",
        "INSERT INTO broker_command (user_id, account, kind) VALUES (:'dan', 'A1', 'BUY')",
        "broker_command_kind_known",
    ),
    _attack(
        "a question at nobody's account",
        "INSERT INTO broker_command (user_id, account, kind) VALUES (:'dan', 'X', 'SNAPSHOT')",
        "broker_command_of_account",
    ),
    _attack(
        "a command that was born sent",
        "INSERT INTO broker_command (user_id, account, kind, claimed_by, sent_at) "
        "VALUES (:'dan', 'A1', 'SNAPSHOT', :'connector', now())",
        "broker_command_begins_waiting",
        DENIED,
    ),
    _attack(
        "other terms for what waits",
        _outcome("o_waits", 'payload = payload || \'{"quantity": "1000"}\''),
        AGREES,
        DENIED,
    ),
    _attack(
        "other terms for what went",
        _outcome("o_sent", 'payload = payload || \'{"quantity": "1000"}\''),
        AGREES,
        DENIED,
    ),
    _attack(
        "a command claimed by the engine",
        _outcome("o_waits", "claimed_by = :'connector'"),
        "",
        DENIED,
    ),
    _attack(
        "what was heard of said to have never arrived",
        _outcome("o_routed", "outcome = 'NEVER_ARRIVED'"),
        "broker_command_outcome_said_by_broker",
    ),
    _attack(
        "said to have never arrived before the broker was asked",
        _outcome("o_fays", "outcome = 'NEVER_ARRIVED'"),
        "broker_command_outcome_said_by_broker",
    ),
    _attack(
        "what was sent withdrawn",
        _outcome("o_sent", "outcome = 'WITHDRAWN'"),
        "broker_command_withdrawn_unclaimed",
    ),
    _attack(
        "what waits said to be sent",
        _outcome("o_waits", "done_at = now(), outcome = 'SENT'"),
        "broker_command_sent_has_time",
    ),
    _attack(
        "what waits said to be unknown",
        _outcome("o_waits", "done_at = now(), outcome = 'UNKNOWN'"),
        "broker_command_withdrawn_unclaimed",
    ),
    _attack(
        "an outcome of what is not done",
        _outcome("o_waits", "outcome = 'WITHDRAWN'"),
        "broker_command_done_has_outcome",
    ),
    _attack(
        "a word put into the broker's mouth",
        filled(99, "o_routed", "Z.01", 10),
        "",
        DENIED,
    ),
    _attack(
        "a word of the broker changed",
        "UPDATE broker_event SET payload = '{}' WHERE user_id = :'dan'",
        "",
        DENIED,
    ),
    _attack(
        "a word of the broker deleted",
        "DELETE FROM broker_event WHERE user_id = :'dan'",
        "",
        DENIED,
    ),
]

TERMS = "orders_terms_fixed"
_ORDERS = [
    _attack("more of what is worked", _order("o_routed", "quantity = 12"), TERMS),
    _attack("another price of what is worked", _order("o_routed", "limit_price = 19"), TERMS),
    _attack("new terms before they went", _order("o_modifying", "quantity = 12"), TERMS),
    _attack("more of what was sent", _order("o_sent", "quantity = 12"), TERMS),
    _attack("more of what waits than the gate lets", _order("o_waits", "quantity = 1000"), TERMS),
    _attack("none of what waits", _order("o_waits", "quantity = 0"), TERMS),
    _attack(
        "more of what waits with its move",
        _order("o_waits", "quantity = 12, status = 'ROUTED'"),
        TERMS,
    ),
    _attack("more of what never arrived", _order("o_lost", "quantity = 12"), TERMS),
    _attack("another symbol of what waits", _order("o_waits", "symbol = 'IBM'"), TERMS, DENIED),
    _attack("a purpose", _order("o_waits", "purpose = 'FLATTEN'"), TERMS, DENIED),
    _attack("recovered, to be out of hours", _order("o_waits", "recovered = true"), TERMS, DENIED),
    _attack("what waits at another account", _order("o_waits", "account = 'A2'"), TERMS),
    _attack("what was sent at another account", _order("o_sent", "account = 'A2'"), TERMS),
    _attack("what is worked at another account", _order("o_routed", "account = 'A2'"), TERMS),
    _attack(
        "what never arrived at an account without a route",
        _order("o_lost", "account = 'A3'"),
        TERMS,
    ),
    _attack("of no account", _order("o_lost", "account = NULL"), TERMS),
    _attack("another broker", _order("o_waits", "broker = 'paper'"), TERMS, DENIED),
    _attack("a filled order's terms", _order("o_filled", "quantity = 20"), "orders_closed_fixed"),
    _attack(
        "a filled order's reason", _order("o_filled", "status_reason = 'x'"), "orders_closed_fixed"
    ),
    _attack(
        "a filled order's account", _order("o_filled", "account = 'A2'"), "orders_closed_fixed"
    ),
    _attack(
        "a filled order's fills",
        _order("o_filled", "filled_quantity = 11, filled_notional = 220"),
        "orders_filled_from_executions",
        DENIED,
    ),
    _attack(
        "filled without a fill",
        _order("o_routed", "status = 'FILLED'"),
        "orders_status_agrees_with_fills",
    ),
    _attack(
        "a change that was never sent",
        _order("o_routed", "status = 'PENDING_MODIFY'"),
        "orders_modified_by_command",
    ),
    _attack(
        "what the gate refused, worked all the same",
        _order("o_rejected", "status = 'ROUTED'"),
        "orders_status_transition",
    ),
    _attack(
        "an order for an account without a route",
        f"{PLACE}, account) VALUES (:'dan', :'deals', :'new_order', 'AAPL', 'BUY', 1, 'LIMIT', "
        "20, :'t1', 'A3')",
        "orders_account_is_routed",
    ),
    _attack(
        "an order past its run's start",
        f"{PLACE}) VALUES (:'dan', :'idle', :'new_order', 'AAPL', 'BUY', 1, 'LIMIT', 20, :'t1')",
        "orders_run_is_running",
    ),
    _attack(
        "recovered without the broker's word",
        _recovered("new_order"),
        "orders_recovered_from_broker",
    ),
    _attack(
        "recovered at an account that has not said it",
        _recovered("o_orphan", account="'A2'"),
        "orders_recovered_from_broker",
    ),
    _attack(
        "recovered by another user",
        _recovered("o_orphan", "fays", user="fay"),
        "orders_recovered_from_broker",
    ),
    _attack(
        "recovered at an account without a route",
        _recovered("o_orphan", account="'A3'"),
        "orders_account_is_routed",
    ),
    _attack(
        "recovered on paper, past the gate",
        "INSERT INTO orders (user_id, run_id, symbol, side, quantity, recovered) "
        "VALUES (:'ann', :'live', 'AAPL', 'BUY', 1000000, true)",
        "orders_account_unless_paper",
    ),
    _attack("recovered again", _recovered("o_routed"), "orders_pkey"),
    _attack(
        "one order in two runs",
        "UPDATE strategy_run SET status = 'STOPPING' WHERE run_id = :'deals'; "
        "UPDATE strategy_run SET status = 'RUNNING' WHERE run_id = :'idle'; "
        + _recovered("o_routed", "idle"),
        "orders_id_once_at_brokers",
    ),
    _attack(
        "born filled at a broker",
        "WITH o AS (INSERT INTO orders (user_id, run_id, order_id, broker, account, symbol, side, "
        "quantity, limit_price, order_type, status, status_at, filled_quantity, filled_notional, "
        "logical_time, recorded_at) VALUES (:'dan', :'deals', :'o_orphan', 'dummy', 'A1', 'AAPL', "
        "'BUY', 2, 20, 'LIMIT', 'FILLED', :'t1', 2, 40, :'t1', now())) "
        f"{BOOK}, symbol, side, commission_currency, logical_time, recorded_at) VALUES "
        "(:'dan', :'deals', :'o_orphan', 'O.01', 2, 20, :'t1', 'AAPL', 'BUY', 'USD', :'t1', "
        "now())",
        "orders_gate_decides",
        DENIED,
    ),
    _attack(
        "a broker's order deleted",
        "DELETE FROM orders WHERE order_id = :'o_waits'",
        "orders_kept",
        DENIED,
    ),
]

SAID = "execution_said_by_broker"
_EXECUTIONS = [
    _attack("a fill of which nobody heard", book("o_routed", "X.01", 3), SAID),
    _attack("a larger fill", book("o_routed", "U.01", 4), SAID),
    _attack("a cheaper fill", book("o_routed", "U.01", 3, 19), SAID),
    _attack("a fill of the other side", book("o_routed", "S.01", 3), SAID),
    _attack("another order's fill", book("o_waits", "U.01", 3), SAID),
    _attack("another user's fill", book("o_fays", "U.01", 3, run=":'fay', :'fays'"), SAID),
    _attack("a fill booked twice", book("o_filled", "F.01", 10), "execution_pkey"),
    _attack("a fill booked twice by another name", book("o_filled", "F.01x", 10), SAID),
    _attack("a negative fill", book("o_routed", "U.01", -3), "execution_quantity_positive"),
    _attack(
        "a fill with a commission",
        f"{BOOK}, commission) VALUES (:'dan', :'deals', :'o_routed', 'U.01', 3, 20, :'t1', 1)",
        SAID,
    ),
    _attack("a fill of no order", book("nobody", "U.01", 3), "execution_belongs_to_order"),
    _attack(
        "a complete fill of which nobody heard",
        f"{BOOK}, symbol, side, commission_currency, logical_time, recorded_at) VALUES "
        "(:'dan', :'deals', :'o_routed', 'X.01', 3, 20, :'t1', 'AAPL', 'BUY', 'USD', :'t1', "
        "now())",
        SAID,
        DENIED,
    ),
    _attack("a bust of which nobody heard", take_back("o_partly", "P.01", 4), SAID),
    _attack("a bust of half", take_back("o_busted", "B.01", 5), SAID),
    _attack("a bust at another price", take_back("o_busted", "B.01", 10, 25), SAID),
    _attack("a bust of another order's fill", take_back("o_filled", "B.01", 10), SAID),
    _attack("a bust of what was never booked", take_back("o_routed", "U.01", 3), SAID),
    _attack(
        "a bust that adds",
        f"{BOOK}, reverses) VALUES (:'dan', :'deals', :'o_busted', 'B.01-R', 10, 20, :'t1', "
        "'B.01')",
        SAID,
    ),
    _attack(
        "a bust twice",
        take_back("o_busted", "B.01", 10)
        + take_back("o_busted", "B.01", 10).replace("B.01-R", "B.01-RR"),
        "execution_reversed_once",
    ),
    _attack(
        "a bust of a bust",
        take_back("o_busted", "B.01", 10)
        + f"{BOOK}, reverses) VALUES (:'dan', :'deals', :'o_busted', 'B.01-RR', 10, 20, :'t1', "
        "'B.01-R')",
        SAID,
    ),
    _attack(
        "a correction taken back by what it corrected",
        take_back("o_corrected", "C.01", 10)
        + book("o_corrected", "C.02", 10, 19)
        + take_back("o_corrected", "C.02", 10, 19),
        SAID,
    ),
    *(
        _attack(f"{verb} executions", f"{verb} execution {rest}", "execution_append_only", DENIED)
        for verb, rest in (
            ("UPDATE", "SET price = 1 WHERE user_id = :'dan'"),
            ("DELETE FROM", "WHERE user_id = :'dan'"),
            ("TRUNCATE", "CASCADE"),
        )
    ),
]


def _charge(execution: str, amount: str, currency: str = "USD", at: str = ":'t1'") -> str:
    return f"{CHARGE}) VALUES (:'dan', :'deals', '{execution}', {amount}, '{currency}', {at});"


CHARGED = "execution_commission_said_by_broker"
_COMMISSIONS = [
    _attack("a commission of which nobody heard", _charge("P.01", "1"), CHARGED),
    _attack("a smaller commission", _charge("F.01", "0.5"), CHARGED),
    _attack("a rebate instead", _charge("F.01", "-1.5"), CHARGED),
    _attack("a commission in another currency", _charge("F.01", "1.5", "EUR"), CHARGED),
    _attack("a commission at another time", _charge("F.01", "1.5", at=":'t2'"), CHARGED),
    _attack("a commission on another fill", _charge("B.01", "1.5"), CHARGED),
    _attack("a commission on what is not booked", _charge("U.01", "1.5"), CHARGED),
    _attack(
        "a commission twice",
        _charge("F.01", "1.5") + _charge("F.01", "1.5"),
        "execution_commission_pkey",
    ),
    _attack(
        "a commission of another user's run",
        f"{CHARGE}) VALUES (:'fay', :'deals', 'F.01', 1.5, 'USD', :'t1')",
        "execution_commission_belongs_to_run",
    ),
    _attack(
        "a commission on paper",
        f"{CHARGE}) VALUES (:'ann', :'live', 'X1', 1.5, 'USD', :'t1')",
        CHARGED,
    ),
    _attack(
        "a commission told, not booked",
        "INSERT INTO event_ledger (user_id, run_id, event_type, subject, payload) VALUES "
        "(:'dan', :'deals', 'COMMISSION', 'F.01', '{\"cost\": -1000}')",
        "event_ledger_tells_what_happened",
    ),
    _attack(
        "a commission told again, later",
        _charge("F.01", "1.5")
        + "INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload) "
        "SELECT user_id, run_id, :'t4', event_type, subject, payload FROM event_ledger "
        "WHERE user_id = :'dan' AND event_type = 'COMMISSION'",
        "event_ledger_tells_what_happened",
    ),
    *(
        _attack(
            f"{verb} commissions",
            _charge("F.01", "1.5") + f"{verb} execution_commission {rest}",
            "execution_commission_append_only",
            DENIED,
        )
        for verb, rest in (
            ("UPDATE", "SET cost = 0 WHERE user_id = :'dan'"),
            ("DELETE FROM", "WHERE user_id = :'dan'"),
            ("TRUNCATE", ""),
        )
    ),
]


def _call(function: str, user: str, run: str, order: str, rest: str = "") -> str:
    return f"SELECT {function}(:'{user}', :'{run}', :'{order}'{rest})"


_CALLS = [
    *(
        attack
        for name, rest in (("order_cancel", ""), ("order_modify", ", 2, 11"))
        for attack in (
            _attack(
                f"{name} of another user's run",
                _call(name, "dan", "fays", "o_fays", rest),
                "orders_belongs_to_run",
            ),
            _attack(
                f"{name} of another run's order",
                _call(name, "dan", "deals", "o_fays", rest),
                "order_is_of_run",
            ),
            _attack(
                f"{name} of no order",
                _call(name, "dan", "deals", "nobody", rest),
                "order_is_of_run",
            ),
            _attack(
                f"{name} in a run that has ended",
                _call(name, "ann", "stopped", "resting", rest),
                "orders_run_is_running",
            ),
        )
    ),
    _attack(
        "a change of what was not seen",
        _call("order_modify", "dan", "deals", "o_routed", ", 1"),
        "orders_version_seen",
    ),
    _attack(
        "a change of what is yet to be",
        _call("order_modify", "dan", "deals", "o_routed", ", 3"),
        "orders_version_seen",
    ),
    _attack(
        "a change of what is filled",
        _call("order_modify", "dan", "deals", "o_filled", ", 2, 20"),
        TERMS,
    ),
    _attack(
        "a change of what is being cancelled",
        _call("order_modify", "dan", "deals", "o_canceling", ", 3, 20"),
        TERMS,
    ),
    _attack(
        "a change of what never arrived",
        _call("order_modify", "dan", "deals", "o_lost", ", 1, 11"),
        AGREES,
    ),
    _attack(
        "a run that calls itself stopped",
        "UPDATE strategy_run SET status = 'STOPPED' WHERE run_id = :'deals'",
        "strategy_run_orders_settled",
    ),
    _attack(
        "a run that is stopping and calls itself stopped",
        "UPDATE strategy_run SET status = 'STOPPING' WHERE run_id = :'deals'; "
        "UPDATE strategy_run SET status = 'STOPPED' WHERE run_id = :'deals'",
        "strategy_run_orders_settled",
    ),
    _attack(
        "a route to nobody's account",
        "INSERT INTO run_route (user_id, run_id, preference, account) "
        "VALUES (:'dan', :'deals', 3, 'X')",
        "run_route_to_account",
    ),
    _attack(
        "a route of another user's run",
        "INSERT INTO run_route (user_id, run_id, account) VALUES (:'fay', :'deals', 'A1')",
        "run_route_belongs_to_run",
    ),
    _attack(
        "a route twice",
        "INSERT INTO run_route (user_id, run_id, preference, account) "
        "VALUES (:'dan', :'deals', 3, 'A1')",
        "run_route_account_once",
    ),
    _attack(
        "a paper account",
        "INSERT INTO broker_account (user_id, account, broker) VALUES (:'dan', 'A9', 'paper')",
        "broker_account_broker_format",
    ),
]

ATTACKS = (*_COMMANDS, *_ORDERS, *_EXECUTIONS, *_COMMISSIONS, *_CALLS)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_on_what_is_at_a_broker_is_refused(market: Connection, attack: Attack) -> None:
    for role, rule in zip(ROLES, (attack.owner, attack.engine), strict=True):
        if rule:
            assert_refused(market, attack.sql, role, rule)


def test_attacks_have_names_of_their_own() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)
