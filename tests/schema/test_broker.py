"""Orders at a broker, from both sides: what an honest program does passes, attacks are refused.

The outbox says what the orders say and the gate allows; the books take from a broker what stands
in its inbox, and nothing else. Attacks are plain SQL, by the owner of the tables and by the
engine's role.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any, NamedTuple

import pytest
from market_cases import (
    BOOK,
    CHARGE,
    COMMAND,
    PLACE,
    book,
    ended,
    filled,
    heard,
    snapshot,
    take_back,
)
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
        "broker_command_terms_fixed",
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
        "broker_command_said_once",
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
    _attack("a filled order's terms", _order("o_filled", "quantity = 20"), TERMS),
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

ENDED = "orders_end_said_by_broker"


def _named(order: str, number: int = 0, perm: int = 0, account: str = "A1") -> str:
    """Whose order a broker's ids mean, as the engine notes it."""
    return (
        "INSERT INTO order_broker_id (user_id, run_id, order_id, account, broker_order_id, "
        f"perm_id, since) VALUES (:'dan', :'deals', :'{order}', '{account}', {number}, {perm}, "
        ":'t1');"
    )


_ENDS_AND_IDS = [
    *(
        _attack(f"{status} of {order} by nobody's word", _order(order, change), ENDED)
        for order in ("o_routed", "o_partly", "o_canceling", "o_modifying")
        for status, change in (
            ("CANCELED", "status = 'CANCELED', status_reason = 'USER'"),
            ("EXPIRED", "status = 'EXPIRED'"),
            ("REJECTED", "status = 'REJECTED', reject_source = 'BROKER', reject_code = 'X'"),
        )
        if (order, status) != ("o_partly", "REJECTED")
    ),
    _attack(
        "many at once, one of them by nobody's word",
        "UPDATE orders SET status = 'CANCELED' WHERE user_id = :'dan' "
        "AND order_id IN (:'o_waits', :'o_sent', :'o_lost', :'o_routed')",
        ENDED,
    ),
    _attack(
        "of another user's order the broker says nothing",
        "UPDATE orders SET status = 'CANCELED' WHERE order_id = :'o_fays'",
        ENDED,
    ),
    _attack(
        "a broker's id that it never gave",
        _order("o_routed", "perm_id = 7"),
        "orders_ids_said_by_broker",
    ),
    _attack(
        "a broker's number that it never gave",
        _order("o_routed", "broker_order_id = 7"),
        "orders_ids_said_by_broker",
    ),
    _attack(
        "an order named by nobody", _named("o_routed", perm=7), "order_broker_id_said_by_broker"
    ),
    _attack(
        "an order named at another account",
        _named("o_routed", number=7, account="A2"),
        "order_broker_id_said_by_broker",
    ),
    _attack(
        "a route to an account at another broker",
        "INSERT INTO broker_account (user_id, account, broker) VALUES (:'dan', 'I1', 'ibkr'); "
        "INSERT INTO run_route (user_id, run_id, preference, account) "
        "VALUES (:'dan', :'deals', 3, 'I1')",
        "run_route_at_runs_broker",
    ),
    _attack(
        "a route that moves to an account at another broker",
        "INSERT INTO broker_account (user_id, account, broker) VALUES (:'dan', 'I1', 'ibkr'); "
        "UPDATE run_route SET account = 'I1' WHERE run_id = :'deals' AND preference = 2",
        "run_route_at_runs_broker",
        DENIED,
    ),
    _attack(
        "a route of a paper run",
        "INSERT INTO broker_account (user_id, account, broker) VALUES (:'ann', 'I1', 'ibkr'); "
        "INSERT INTO run_route (user_id, run_id, account) VALUES (:'ann', :'live', 'I1')",
        "run_route_at_runs_broker",
    ),
]

ATTACKS = (*_COMMANDS, *_ORDERS, *_EXECUTIONS, *_COMMISSIONS, *_CALLS, *_ENDS_AND_IDS)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_on_what_is_at_a_broker_is_refused(market: Connection, attack: Attack) -> None:
    for role, rule in zip(ROLES, (attack.owner, attack.engine), strict=True):
        if rule:
            assert_refused(market, attack.sql, role, rule)


def test_attacks_have_names_of_their_own() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)


# --- What an honest program does -----------------------------------------------------------------


def _as_engine(conn: Connection, sql: str) -> list[tuple[Any, ...]]:
    """Rows of a statement by the engine's role; the audit finds nothing afterwards."""
    with acting_as(conn, "oms_engine"):
        found = rows(conn, sql) if sql.startswith("SELECT") else _run(conn, sql)
    conn.execute("SET CONSTRAINTS ALL IMMEDIATE")
    conn.execute("SET CONSTRAINTS ALL DEFERRED")
    assert findings(conn) == []
    return found


def _run(conn: Connection, sql: str) -> list[tuple[Any, ...]]:
    conn.execute(said(sql))
    return []


def _commands(conn: Connection, order: str) -> list[tuple[Any, ...]]:
    """Kind, account, quantity and outcome of what the outbox holds about an order."""
    return rows(
        conn,
        "SELECT kind, account, payload ->> 'quantity', outcome FROM broker_command "
        f"WHERE user_id = :'dan' AND order_id = :'{order}' ORDER BY order_version",
    )


def _state(conn: Connection, order: str, columns: str = "status") -> tuple[Any, ...]:
    ((*state,),) = rows(
        conn, f"SELECT {columns} FROM orders WHERE user_id = :'dan' AND order_id = :'{order}'"
    )
    return tuple(state)


def _claim(conn: Connection, order: str) -> None:
    """What a connector does with all that waits about an order."""
    conn.execute(
        said(
            "UPDATE broker_command SET claimed_by = :'connector', claimed_at = clock_timestamp() "
            f"WHERE user_id = :'dan' AND order_id = :'{order}' AND claimed_by IS NULL"
        )
    )


def test_to_insert_an_order_is_to_send_it(market: Connection) -> None:
    _as_engine(
        market,
        f"{PLACE}) VALUES (:'dan', :'deals', :'new_order', 'AAPL', 'BUY', 3, 'LIMIT', 20.50, "
        ":'t1')",
    )
    assert _state(market, "new_order", "status, account, version") == ("NEW", "A1", 1)
    assert rows(
        market,
        "SELECT kind, account, order_version, priority, claimed_by, payload - 'order_ref' "
        "FROM broker_command WHERE order_id = :'new_order'",
    ) == [
        (
            "SUBMIT", "A1", 1, 2, None,
            {"symbol": "AAPL", "side": "BUY", "quantity": "3", "order_type": "LIMIT",
             "limit_price": "20.5", "time_in_force": "DAY"},
        )
    ]  # fmt: skip


def test_what_the_gate_refuses_is_not_sent(market: Connection) -> None:
    _as_engine(
        market,
        f"{PLACE}) VALUES (:'dan', :'deals', :'new_order', 'AAPL', 'BUY', 9999, 'LIMIT', 20, "
        ":'t1')",
    )
    assert _state(market, "new_order", "status, reject_code") == ("REJECTED", "INSUFFICIENT_CASH")
    assert _commands(market, "new_order") == []


def test_an_order_may_choose_among_its_runs_accounts(market: Connection) -> None:
    _as_engine(
        market,
        f"{PLACE}, account, purpose) VALUES (:'dan', :'deals', :'new_order', 'AAPL', 'SELL', 1, "
        "'LIMIT', 20, :'t1', 'A2', 'FLATTEN')",
    )
    assert _commands(market, "new_order") == [("SUBMIT", "A2", "1", None)]
    assert rows(market, "SELECT priority FROM broker_command WHERE order_id = :'new_order'") == [
        (0,)
    ]


@pytest.mark.parametrize("directly", [False, True])
def test_what_waits_is_changed_at_once_and_its_command_with_it(
    market: Connection, directly: bool
) -> None:
    if directly:
        _as_engine(market, _order("o_waits", "quantity = 12, limit_price = 19"))
    else:
        assert _as_engine(
            market, _call("order_modify", "dan", "deals", "o_waits", ", 1, 12, 19")
        ) == [("MODIFIED",)]
    assert _state(market, "o_waits", "status, quantity, limit_price, version") == (
        "NEW", 12, 19, 2,
    )  # fmt: skip
    assert _commands(market, "o_waits") == [("SUBMIT", "A1", "12", None)]


def test_what_a_broker_has_is_changed_when_the_broker_says_so(market: Connection) -> None:
    change = _call("order_modify", "dan", "deals", "o_routed", ", 2, 12")
    assert _as_engine(market, change) == [("PENDING_MODIFY",)]
    assert _state(market, "o_routed", "status, quantity, version") == ("PENDING_MODIFY", 10, 3)
    assert _commands(market, "o_routed") == [
        ("SUBMIT", "A1", "10", "SENT"),
        ("MODIFY", "A1", "12", None),
    ]
    _claim(market, "o_routed")
    other = _order("o_routed", "status = 'ROUTED', quantity = 13")
    for role in ROLES:
        assert_refused(market, other, role, TERMS)
    _as_engine(market, _order("o_routed", "status = 'ROUTED', quantity = 12"))
    assert _state(market, "o_routed", "status, quantity") == ("ROUTED", 12)
    # The last command counts, not whichever was ever given.
    back = _call("order_modify", "dan", "deals", "o_routed", ", 4, 10")
    assert _as_engine(market, back) == [("PENDING_MODIFY",)]
    _claim(market, "o_routed")
    _as_engine(market, _order("o_routed", "status = 'ROUTED', quantity = 10"))
    for role in ROLES:
        assert_refused(market, _order("o_routed", "quantity = 12"), role, TERMS)


@pytest.mark.parametrize(
    ("order", "terms", "reason"),
    [
        ("o_routed", "2, 1000", "INSUFFICIENT_CASH"),
        ("o_waits", "1, 1000", "INSUFFICIENT_CASH"),
        ("o_partly", "2, 4", "QUANTITY_BELOW_FILLED"),
        ("o_routed", "2, -1", "QUANTITY_BELOW_FILLED"),
        ("o_lost", "1, 11", "SUBMIT_UNANSWERED"),
        ("o_routed", "2, NULL, NULL, 5", "STOP_PRICE_NOT_ALLOWED"),
    ],
)
def test_a_change_that_the_gate_refuses_is_told_and_changes_nothing(
    market: Connection, order: str, terms: str, reason: str
) -> None:
    before = _commands(market, order), _state(market, order, "quantity, limit_price, version")
    ((told,),) = _as_engine(market, _call("order_modify", "dan", "deals", order, f", {terms}"))
    assert told.startswith(reason)
    after = _commands(market, order), _state(market, order, "quantity, limit_price, version")
    assert after == before
    assert rows(
        market,
        "SELECT event_type, payload ->> 'reason' FROM event_ledger WHERE run_id = :'deals' "
        "ORDER BY seq DESC LIMIT 1",
    ) == [("MODIFY_REFUSED", told)]


def test_a_user_s_limits_hold_for_a_change_too(market: Connection) -> None:
    market.execute(
        said(
            "INSERT INTO risk_limit (user_id, kind, limit_value) "
            "VALUES (:'dan', 'MAX_ORDER_QUANTITY', 11)"
        )
    )
    ((told,),) = _as_engine(market, _call("order_modify", "dan", "deals", "o_routed", ", 2, 12"))
    assert told.startswith("MAX_ORDER_QUANTITY")
    for sql in (
        _command("MODIFY", "o_routed", "version + 1", quantity="12"),
        _order("o_waits", "quantity = 12"),
    ):
        for role in ROLES:
            assert_refused(market, sql, role, AGREES if sql.startswith("INSERT") else TERMS)


def test_a_cancel_goes_where_the_order_is(market: Connection) -> None:
    def cancel(order: str) -> str:
        ((came_to,),) = _as_engine(market, _call("order_cancel", "dan", "deals", order))
        return str(came_to)

    assert cancel("o_waits") == "CANCELED"
    assert _commands(market, "o_waits") == [("SUBMIT", "A1", "10", "WITHDRAWN")]
    assert cancel("o_waits") == "CANCEL_IGNORED"
    assert cancel("o_sent") == "PENDING_CANCEL"
    assert _commands(market, "o_sent")[1:] == [("CANCEL", "A1", "10", None)]
    assert cancel("o_sent") == cancel("o_filled") == "CANCEL_IGNORED"
    assert cancel("o_lost") == "CANCELED"
    assert _commands(market, "o_filled") == [("SUBMIT", "A1", "10", "SENT")]


def test_a_connector_can_not_take_what_is_over(market: Connection) -> None:
    _as_engine(market, _call("order_cancel", "dan", "deals", "o_waits"))
    assert_refused(
        market,
        _outcome("o_waits", "claimed_by = :'connector'"),
        "oms_owner",
        "broker_command_withdrawn_unclaimed",
    )


def _cash(conn: Connection, run: str = "deals") -> Decimal:
    ((cash,),) = rows(conn, f"SELECT cash FROM strategy_run WHERE run_id = :'{run}'")
    return Decimal(cash)


def test_fills_busts_corrections_and_commissions_that_were_heard_are_booked(
    market: Connection,
) -> None:
    cash = _cash(market)
    _as_engine(market, book("o_routed", "U.01", 3))
    assert _state(market, "o_routed", "status, filled_quantity") == ("PARTIALLY_FILLED", 3)
    assert _cash(market) == cash - 60
    _as_engine(market, take_back("o_busted", "B.01", 10))
    assert _state(market, "o_busted", "status, filled_quantity, filled_notional") == (
        "ROUTED", 0, 0,
    )  # fmt: skip
    assert _cash(market) == cash - 60 + 200
    _as_engine(market, take_back("o_corrected", "C.01", 10) + book("o_corrected", "C.02", 10, 19))
    assert _state(market, "o_corrected", "status, filled_quantity, avg_fill_price") == (
        "FILLED", 10, 19,
    )  # fmt: skip
    _as_engine(market, _charge("F.01", "1.5"))
    assert _cash(market) == cash - 60 + 200 + 10 - Decimal("1.5")
    assert rows(
        market, "SELECT quantity FROM position WHERE user_id = :'dan' AND symbol = 'AAPL'"
    ) == [(4 + 10 + 3 + 10,)]


def test_more_than_was_ordered_is_real_exposure(market: Connection) -> None:
    market.execute(said(filled(30, "o_filled", "F2.01", 5)))
    _as_engine(market, book("o_filled", "F2.01", 5))
    assert _state(market, "o_filled", "status, filled_quantity") == ("FILLED", 15)


def test_a_commission_in_another_currency_needs_a_rate_of_its_time(market: Connection) -> None:
    charge = _charge("P.01", "-0.25", "EUR")
    for role in ROLES:
        assert_refused(market, charge, role, "execution_commission_has_rate")
    cash = _cash(market)
    market.execute(said("INSERT INTO fx_rate VALUES ('EUR', 'USD', :'t1', 1.1)"))
    _as_engine(market, charge)
    assert _cash(market) == cash + Decimal("0.275")


def test_rate_and_cost_of_a_commission_are_not_for_its_writer_to_say(market: Connection) -> None:
    sql = f"{CHARGE}, rate, cost) VALUES (:'dan', :'deals', 'F.01', 1.5, 'USD', :'t1', 0.01, 0.015)"
    assert_refused(market, sql, "oms_engine", DENIED)
    market.execute(said(sql))
    assert rows(
        market, "SELECT rate, cost FROM execution_commission WHERE execution_id = 'F.01'"
    ) == [(1, Decimal("1.5"))]
    assert findings(market) == []


def test_the_version_of_an_order_is_not_for_its_writer_to_say(market: Connection) -> None:
    sql = _order("o_routed", "version = 99")
    assert_refused(market, sql, "oms_engine", DENIED)
    market.execute(said(sql))
    assert _state(market, "o_routed", "version") == (3,)


def test_what_only_the_broker_knew_is_taken_up_with_its_fill(market: Connection) -> None:
    _as_engine(market, _recovered("o_orphan") + ";" + book("o_orphan", "O.01", 2))
    assert _state(market, "o_orphan", "status, filled_quantity, recovered") == (
        "PARTIALLY_FILLED", 2, True,
    )  # fmt: skip
    assert _commands(market, "o_orphan") == []
    # It is at the broker, whoever sent it: it is changed and cancelled there.
    for role in ROLES:
        assert_refused(market, _command("SUBMIT", "o_orphan"), role, AGREES)
    change = _call("order_modify", "dan", "deals", "o_orphan", ", 2, 6")
    assert _as_engine(market, change) == [("PENDING_MODIFY",)]
    assert _as_engine(market, _call("order_cancel", "dan", "deals", "o_orphan")) == [
        ("PENDING_CANCEL",)
    ]


def test_what_never_arrived_goes_to_the_next_account(market: Connection) -> None:
    _as_engine(market, _order("o_lost", "account = 'A2'"))
    assert _commands(market, "o_lost") == [
        ("SUBMIT", "A1", "10", "NEVER_ARRIVED"),
        ("SUBMIT", "A2", "10", None),
    ]
    # Not back again: it may be on its way now.
    for role in ROLES:
        assert_refused(market, _order("o_lost", "account = 'A1'"), role, TERMS)


def test_a_snapshot_without_an_order_shows_that_it_never_arrived(market: Connection) -> None:
    _as_engine(market, _outcome("o_sent", "outcome = 'NEVER_ARRIVED'"))
    # One that tells of it shows the contrary.
    market.execute(said(snapshot(40, "o_canceled")))
    for role in ROLES:
        assert_refused(
            market,
            _outcome("o_canceled", "outcome = 'NEVER_ARRIVED'"),
            role,
            "broker_command_outcome_said_by_broker",
        )


def test_the_engine_asks_brokers_on_its_own(market: Connection) -> None:
    _as_engine(
        market,
        "INSERT INTO broker_command (user_id, account, priority, kind) "
        "VALUES (:'dan', 'A2', 0, 'SNAPSHOT'), (:'dan', 'A1', 1, 'WHAT_IF')",
    )


# --- What the inbox bears out --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        *(
            ("ORDER_STATUS", {"status": status})
            for status in ("CANCELED", "EXPIRED", "INACTIVE", "REJECTED")
        ),
        ("REJECTED", {"code": "201"}),
        ("CANCEL_REJECTED", {"code": "ALREADY_CANCELED"}),
        ("CANCEL_REJECTED", {"code": "INACTIVE"}),
    ],
)
def test_an_order_is_over_when_its_broker_says_so(
    market: Connection, kind: str, payload: dict[str, str]
) -> None:
    market.execute(said(heard(40, kind, ":'o_routed'", **payload)))
    _as_engine(market, _order("o_routed", "status = 'CANCELED'"))


@pytest.mark.parametrize(
    "word",
    [
        heard(40, "ORDER_STATUS", ":'o_routed'", status="ROUTED"),
        heard(40, "ORDER_STATUS", ":'o_routed'", status="FILLED"),
        heard(40, "CANCEL_REJECTED", ":'o_routed'", code="TOO_LATE"),
        heard(40, "MODIFY_REJECTED", ":'o_routed'", code="INACTIVE"),
        heard(40, "THROTTLED", ":'o_routed'", status="CANCELED"),
        ended(40, "o_partly"),
        ended(40, "o_routed").replace("'A1'", "'A2'"),
        snapshot(40, "o_routed"),
        snapshot(40, parts=2),
        snapshot(40, user="fay"),
    ],
)
def test_a_word_that_ends_nothing_ends_nothing(market: Connection, word: str) -> None:
    market.execute(said(word))
    for role in ROLES:
        assert_refused(market, _order("o_routed", "status = 'CANCELED'"), role, ENDED)


def test_an_order_is_over_when_a_snapshot_does_not_tell_of_it(market: Connection) -> None:
    market.execute(said(snapshot(40, "o_partly")))
    _as_engine(market, _order("o_routed", "status = 'CANCELED'"))
    assert_refused(market, _order("o_partly", "status = 'CANCELED'"), "oms_engine", ENDED)


def test_what_was_just_sent_is_not_over_by_a_snapshot_from_before(market: Connection) -> None:
    """It is on its way to a broker that was asked before it left."""
    _claim(market, "o_waits")
    cancel = _order("o_waits", "status = 'CANCELED'")
    assert_refused(market, cancel, "oms_engine", ENDED)
    # Received since then, but asked for before.
    late = (
        snapshot(41)
        .replace("event_at)\n        SELECT", "event_at, received_at)\n        SELECT")
        .replace(
            ":'t1'\n        FROM asked", ":'t1', clock_timestamp() + '1 hour'\n        FROM asked"
        )
    )
    late = late.replace(
        "claimed_at = clock_timestamp()", "claimed_at = clock_timestamp() - interval '1 hour'"
    )
    assert "'1 hour'" in late
    market.execute(said(late))
    assert_refused(market, cancel, "oms_engine", ENDED)
    market.execute(said(snapshot(42)))
    _as_engine(market, cancel)


def test_what_no_connector_took_or_what_never_arrived_needs_no_word(market: Connection) -> None:
    for order in ("o_waits", "o_lost"):
        _as_engine(market, _order(order, "status = 'CANCELED'"))


@pytest.mark.parametrize("outcome", ["NEVER_ARRIVED", "REFUSED"])
def test_that_nothing_was_sent_is_for_its_connector_to_say(
    market: Connection, outcome: str
) -> None:
    _claim(market, "o_waits")
    change = _outcome("o_waits", f"outcome = '{outcome}', done_at = now()")
    for role in ROLES:
        assert_refused(market, change, role, "broker_command_outcome_said_by_broker")
    ((command,),) = rows(
        market, "SELECT command_id::text FROM broker_command WHERE order_id = :'o_waits'"
    )
    market.execute(said(heard(40, "SEND_FAILED", ":'o_waits'", command_id=command)))
    _as_engine(market, change)
    # There is nothing to be asked back.
    assert _as_engine(market, _call("order_cancel", "dan", "deals", "o_waits")) == [("CANCELED",)]


def _with_ids(word: str, number: int = 0, perm: int = 0) -> str:
    return word.replace(
        "payload, event_at)", "payload, event_at, broker_order_id, perm_id)"
    ).replace(":'t1');", f":'t1', {number}, {perm});")


def test_ids_are_those_that_the_broker_said(market: Connection) -> None:
    word = heard(40, "ORDER_STATUS", ":'o_routed'", status="ROUTED")
    market.execute(said(_with_ids(word, 5, 7)))
    # As the inbox writes it, and as reconciliation does.
    _as_engine(
        market,
        _order("o_routed", "broker_order_id = 5, perm_id = 7") + ";" + _named("o_routed", 5, 7),
    )
    for forged in (_named("o_routed", 5, 8), _named("o_routed", 6, 7), _named("o_partly", 5, 7)):
        assert_refused(market, forged, "oms_engine", "order_broker_id_said_by_broker")
    # Under a lasting id that is ours, the broker gives it another number.
    nameless = heard(41, "ORDER_STATUS", "NULL", status="CANCELED")
    market.execute(said(_with_ids(nameless, 6, 7)))
    _as_engine(market, _named("o_routed", 6, 7) + _order("o_routed", "broker_order_id = 6"))
    _as_engine(market, _order("o_routed", "status = 'CANCELED'"))


def test_a_stranger_s_fill_can_not_be_made_ours_by_its_id(market: Connection) -> None:
    market.execute(said(_with_ids(filled(40, "nobody", "Y.01", 3), 0, 99)))
    forged = _named("o_routed", perm=99) + book("o_routed", "Y.01", 3)
    for role in ROLES:
        assert_refused(market, forged, role, "order_broker_id_said_by_broker")
        assert_refused(market, book("o_routed", "Y.01", 3), role, SAID)


def test_ids_of_a_snapshot_are_the_broker_s_too(market: Connection) -> None:
    told = snapshot(40, "o_routed").replace(
        '{"order_ref"', '{"broker_order_id": 5, "perm_id": 7, "order_ref"'
    )
    market.execute(said(told))
    _as_engine(market, _named("o_routed", 5, 7) + _order("o_routed", "perm_id = 7"))
    assert_refused(market, _named("o_routed", 5, 9), "oms_engine", "order_broker_id_said_by_broker")


def test_ticks_of_a_run_at_a_broker_fill_nothing(market: Connection) -> None:
    """Orders born FILLED are the paper book's alone, also from the function that writes ticks."""
    call = """SELECT ticks_write(:'dan', :'deals',
        (SELECT max(seq) FROM event_ledger WHERE run_id = :'deals'), NULL,
        ARRAY[:'t1', :'t1']::timestamptz[], '{ORDER_PLACED,EXECUTION}', '{NULL,NULL}',
        '{NULL,NULL}', ARRAY[:'new_order']::uuid[], '{AAPL}', '{BUY}', '{2}', '{MARKET}', '{DAY}',
        '{NULL}', '{NULL}', '{20}', '{NULL}', '{20}', '{0}', ARRAY[:'t1']::timestamptz[], '{}',
        '{}', NULL, NULL)"""
    for role in ROLES:
        assert_refused(market, call, role, "orders_gate_decides")


# --- What a connector may not --------------------------------------------------------------------

_WORD = "INSERT INTO broker_event (user_id, account, number, holder, kind, event_at"
_OWN = "(:'dan', 'A1', 90, :'connector', 'NOTICE', :'t1'"
_DONE = (
    "SELECT lease_take(:'dan', 'A1', :'connector', 'x', 60); "
    "SELECT commands_claim(:'dan', 'A1', :'connector', 10, 10); "
    "SELECT commands_done(:'dan', 'A1', :'connector', ARRAY(SELECT command_id FROM broker_command "
    "WHERE order_id = :'o_waits'), ARRAY[NULL::timestamptz], ARRAY[{}])"
)
_BY_A_CONNECTOR = {
    _order("o_routed", "status = 'CANCELED'"): DENIED,
    _order("o_waits", "quantity = 1000"): DENIED,
    book("o_routed", "U.01", 3): DENIED,
    _charge("F.01", "1.5"): DENIED,
    _named("o_routed", 5, 7): DENIED,
    _command("SUBMIT", "o_lost"): DENIED,
    "INSERT INTO broker_command (user_id, account, kind) VALUES (:'dan', 'A1', 'SNAPSHOT')": DENIED,
    _outcome("o_waits", "claimed_by = :'connector'"): DENIED,
    _outcome("o_waits", 'payload = \'{"quantity": "1000"}\''): DENIED,
    "DELETE FROM broker_command WHERE user_id = :'dan'": DENIED,
    f"{_WORD}, applied_at, finding) VALUES {_OWN}, now(), 'IGNORED')": DENIED,
    "UPDATE broker_event SET payload = '{}' WHERE user_id = :'dan'": DENIED,
    "DELETE FROM broker_event WHERE user_id = :'dan'": DENIED,
    "TRUNCATE broker_event": DENIED,
    "SELECT payload FROM broker_event": DENIED,
    "UPDATE broker_lease SET expires_at = 'infinity'": DENIED,
    "UPDATE broker_account SET messages_per_second = 10000": DENIED,
    "INSERT INTO run_route (user_id, run_id, preference, account) "
    "VALUES (:'dan', :'deals', 3, 'A3')": DENIED,
    "INSERT INTO alert (user_id, code, message) VALUES (:'dan', 'X', 'x')": DENIED,
    "UPDATE strategy_run SET status = 'STOPPED' WHERE run_id = :'deals'": DENIED,
    "UPDATE trading_halt SET lifted_at = now(), lifted_by = 'x'": DENIED,
    "SELECT FROM orders": DENIED,
    "SELECT FROM execution_commission": DENIED,
    "SELECT FROM event_ledger": DENIED,
    _call("order_cancel", "dan", "deals", "o_routed"): DENIED,
    _call("order_modify", "dan", "deals", "o_routed", ", 2, 11"): DENIED,
    "SELECT halt_place(:'dan', 'x', 'USER', NULL, NULL, 'HALTED', 'x', 'x')": DENIED,
    "SELECT halt_lift(:'dan', 'x', 'x')": DENIED,
    "SELECT system_halt_lift('x', 'x')": DENIED,
    "SELECT run_equity_peak(:'dan', :'deals', now())": DENIED,
    "SELECT grant_roles()": DENIED,
    "CREATE TABLE theirs (user_id uuid)": DENIED,
    "CREATE TEMP TABLE theirs (user_id uuid); CREATE TRIGGER x AFTER INSERT ON theirs "
    "FOR EACH ROW EXECUTE FUNCTION orders_send_rerouted()": DENIED,
    "SELECT commands_claim(:'dan', 'A1', :'connector', 10, 10)": "broker_lease_is_held",
    "SELECT lease_take(:'dan', 'A1', :'connector', 'x', 60); "
    "SELECT lease_take(:'dan', 'A1', :'nobody', 'y', 60)": "broker_lease_one_holder",
    "SELECT lease_take(:'dan', 'X', :'connector', 'x', 60)": "broker_lease_of_account",
    "SELECT commands_done(:'dan', 'A1', :'nobody', ARRAY(SELECT command_id FROM broker_command "
    "WHERE order_id = :'o_waits'), ARRAY[now()], ARRAY['SENT'])": "broker_command_done_by_claimer",
    _DONE.format("'NEVER_ARRIVED'"): "broker_command_outcome_said_by_broker",
    _DONE.format("'REFUSED'"): "broker_command_outcome_said_by_broker",
    _DONE.format("'WITHDRAWN'"): "broker_command_withdrawn_unclaimed",
    _DONE.format("'SENT'"): "broker_command_sent_has_time",
    _DONE.format("NULL"): "broker_command_done_has_outcome",
    _DONE.format("'DONE'"): "broker_command_outcome_known",
    f"{_WORD}) VALUES {_OWN.replace('90', '1')})": "broker_event_pkey",
    f"{_WORD}) VALUES {_OWN.replace('90', '0')})": "broker_event_number_positive",
    f"{_WORD}) VALUES {_OWN.replace('A1', 'X')})": "broker_event_of_account",
}


@pytest.mark.parametrize("sql", _BY_A_CONNECTOR)
def test_a_connector_does_nothing_beyond_its_rights(market: Connection, sql: str) -> None:
    assert_refused(market, sql, "oms_connector", _BY_A_CONNECTOR[sql])


def test_a_connector_whose_clock_is_ahead_does_not_hide_a_silence(market: Connection) -> None:
    with acting_as(market, "oms_connector"):
        market.execute(said("SELECT lease_take(:'dan', 'A1', :'connector', 'x', 60)"))
        market.execute(
            said("SELECT lease_renew(:'dan', 'A1', :'connector', 60, true, 'infinity', NULL)")
        )
    assert rows(market, "SELECT last_heard_at <= clock_timestamp() FROM broker_lease") == [(True,)]


# --- A run that is stopping ----------------------------------------------------------------------

_STOP = "UPDATE strategy_run SET status = 'STOPPING' WHERE run_id = :'deals'"
_ASKED_BACK = ("o_sent", "o_routed", "o_partly", "o_canceling", "o_modifying", "o_orphan")
_IS_RUNNING = {
    "engine_state": "engine_state_run_is_running",
    "engine_status": "engine_status_run_is_running",
    "orders": "orders_run_is_running",
    "split_applied": "split_applied_run_is_running",
    "mtm_ledger": "mtm_ledger_run_is_running",
    "sip_plan": "sip_plan_run_is_running",
}


def test_a_run_that_stops_asks_its_orders_back(market: Connection) -> None:
    _as_engine(market, _STOP)
    assert dict(
        rows(
            market,
            "SELECT status, count(*) FROM orders WHERE user_id = :'dan' GROUP BY status",
        )
    ) == {"PENDING_CANCEL": 5, "FILLED": 3, "CANCELED": 3, "REJECTED": 1}
    assert rows(
        market,
        "SELECT count(*), min(priority), max(priority) FROM broker_command WHERE kind = 'CANCEL' "
        "AND run_id = :'deals' AND order_id <> :'o_canceling'",
    ) == [(4, 0, 0)]


@pytest.mark.parametrize("table", _IS_RUNNING)
def test_a_run_that_is_stopping_takes_nothing_new(market: Connection, table: str) -> None:
    market.execute(said(_STOP))
    for role in ROLES:
        assert_refused(market, smallest_inserts("deals", "dan")[table], role, _IS_RUNNING[table])


@pytest.mark.parametrize("event", ["TICK", "SIP_EXECUTED", "REBALANCED"])
def test_a_run_that_is_stopping_does_not_tick(market: Connection, event: str) -> None:
    market.execute(said(_STOP))
    sql = (
        "INSERT INTO event_ledger (user_id, run_id, event_type) "
        f"VALUES (:'dan', :'deals', '{event}')"
    )
    for role in ROLES:
        assert_refused(market, sql, role, "event_ledger_run_is_running")


def test_a_run_that_is_stopping_changes_no_order(market: Connection) -> None:
    market.execute(said(_STOP))
    for sql, rule in (
        (_call("order_modify", "dan", "deals", "o_routed", ", 3, 11"), "orders_run_is_running"),
        (
            _command("MODIFY", "o_routed", "version + 1", quantity="11"),
            "broker_command_run_is_running",
        ),
    ):
        for role in ROLES:
            assert_refused(market, sql, role, rule)


def test_a_run_that_is_stopping_still_books_what_its_broker_says(market: Connection) -> None:
    market.execute(said(_STOP))
    _as_engine(market, book("o_routed", "U.01", 3))
    assert _state(market, "o_routed", "status, filled_quantity") == ("PENDING_CANCEL", 3)
    _as_engine(market, take_back("o_busted", "B.01", 10))
    _as_engine(market, _order("o_busted", "status = 'CANCELED', status_reason = 'BUST'"))
    _as_engine(market, _charge("F.01", "1.5"))
    _as_engine(market, _recovered("o_orphan"))
    _as_engine(market, _call("order_cancel", "dan", "deals", "o_orphan"))
    for number, order in enumerate(_ASKED_BACK, 50):
        market.execute(said(ended(number, order)))
        _as_engine(market, _order(order, "status = 'CANCELED'"))
    _as_engine(market, "UPDATE strategy_run SET status = 'STOPPED' WHERE run_id = :'deals'")
    for sql, rule in (
        (book("o_corrected", "C.02", 10, 19), "execution_run_is_running"),
        (_charge("B.01", "1"), "execution_commission_run_is_running"),
        (_order("o_routed", "pending_reconcile = true"), "orders_run_is_running"),
        (_call("order_cancel", "dan", "deals", "o_routed"), "orders_run_is_running"),
    ):
        for role in ROLES:
            assert_refused(market, sql, role, rule)


def test_a_run_that_fails_asks_its_orders_back_and_is_closed(market: Connection) -> None:
    _as_engine(market, "UPDATE strategy_run SET status = 'ERROR' WHERE run_id = :'deals'")
    assert _state(market, "o_routed") == ("PENDING_CANCEL",)
    for role in ROLES:
        assert_refused(market, book("o_routed", "U.01", 3), role, "execution_run_is_running")
