"""An order's life at its broker, rule by rule, through the real database."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import psycopg
import pytest
from broker_cases import NOW, SECOND, Wire, a_broker_run
from connector_cases import Desk

from engine.audit import audit
from engine.db.connect import CONNECTOR_ROLE, Connection
from engine.orders.lifecycle import LAST_BROKER_ORDER_ID

LOGGED = pytest.LogCaptureFixture
START = Decimal(100_000)


def assert_order(wire: Wire, order_id: UUID, status: str, filled: str, average: str | None) -> None:
    """The order, its executions and the audit say the same."""
    order = wire.order(order_id)
    assert (order["status"], order["filled_quantity"]) == (status, Decimal(filled))
    assert order["avg_fill_price"] == (None if average is None else Decimal(average))
    booked = wire.conn.execute(
        "SELECT coalesce(sum(quantity), 0) FROM execution WHERE user_id = %s AND order_id = %s",
        [wire.run.user_id, order_id],
    ).fetchone()
    assert booked == (Decimal(filled),)
    assert audit(wire.conn) == []


def assert_books(wire: Wire, position: str, spent: str) -> None:
    """What the run holds of AAPL, and how much cash is gone."""
    assert (wire.position(), wire.cash()) == (Decimal(position), START - Decimal(spent))


def assert_told(wire: Wire, logged: LOGGED, code: str, number: int | None) -> None:
    """The code stands in the ledger, in the log and, where a word brought it, on the word."""
    assert [told for told, _ in wire.events(code)] == [code]
    assert code in logged.messages
    if number is not None:
        assert wire.finding(number)[1] == code


def one(wire: Wire, query: str, *parameters: Any) -> Sequence[Any]:
    row = wire.conn.execute(query, parameters).fetchone()
    assert row is not None
    return row


@pytest.mark.scenario("CONN-05")
def test_time_skew_normalizes_to_broker_time(wire: Wire, caplog: LOGGED) -> None:
    order_id = wire.working()
    said_at = NOW + timedelta(minutes=10)
    number = wire.fill(order_id, "10", "100", "e1", at=said_at, lag=-31 * SECOND)
    wire.apply()
    assert_told(wire, caplog, "TIME_SKEW", number)
    assert wire.alerts() == ["TIME_SKEW"]
    assert one(wire, "SELECT event_at FROM execution WHERE order_id = %s", order_id) == (said_at,)
    (_, told), *_ = wire.events("EXECUTION")
    assert told["event_at"] == said_at.isoformat()
    assert_order(wire, order_id, "FILLED", "10", "100")
    assert_books(wire, "10", "1000")


def test_half_a_minute_of_skew_is_none(wire: Wire, caplog: LOGGED) -> None:
    order_id = wire.working()
    number = wire.fill(order_id, "10", "100", "e1", lag=-30 * SECOND)
    connected = [wire.say("CONNECTED", lag=lag * SECOND) for lag in (30, -30)]
    wire.apply()
    assert [wire.finding(n) for n in (number, *connected)] == [("NEW", None)] * 3
    assert (wire.events("TIME_SKEW"), wire.alerts()) == ([], [])
    assert "TIME_SKEW" not in caplog.messages


@pytest.mark.parametrize(("lag", "side"), [(31, "ahead of"), (-31, "behind")])
def test_a_connection_tells_the_skew_to_either_side(
    wire: Wire, caplog: LOGGED, lag: int, side: str
) -> None:
    number = wire.say("CONNECTED", lag=lag * SECOND)
    wire.apply()
    assert wire.finding(number) == ("NEW", "TIME_SKEW")
    assert f"31.0 s {side} the broker's" in one(wire, "SELECT message FROM alert")[0]
    assert "TIME_SKEW" in caplog.messages


@pytest.mark.scenario("LIFE-01")
def test_cancel_already_filled_is_ignored(wire: Wire, caplog: LOGGED) -> None:
    order_id = wire.working()
    wire.fill(order_id, "10", "100", "e1")
    wire.apply()
    assert wire.cancel(order_id) == "CANCEL_IGNORED"
    assert wire.kinds(order_id) == ["SUBMIT"]  # nothing was sent
    assert_told(wire, caplog, "CANCEL_IGNORED", None)
    assert_order(wire, order_id, "FILLED", "10", "100")
    assert_books(wire, "10", "1000")


@pytest.mark.scenario("LIFE-01")
def test_a_cancel_that_the_last_fill_overtakes_is_ignored(wire: Wire, caplog: LOGGED) -> None:
    order_id = wire.working()
    assert wire.cancel(order_id) == "PENDING_CANCEL"
    wire.sent(order_id)
    wire.fill(order_id, "10", "100", "e1")
    number = wire.say("CANCEL_REJECTED", order_id, code="ALREADY_FILLED", message="too late")
    wire.apply()
    assert wire.finding(number)[0] == "IGNORED"
    assert_told(wire, caplog, "CANCEL_IGNORED", number)
    assert_order(wire, order_id, "FILLED", "10", "100")
    assert_books(wire, "10", "1000")


@pytest.mark.scenario("LIFE-02")
@pytest.mark.parametrize("said", ["ALREADY_CANCELED", "INACTIVE", "status INACTIVE"])
@pytest.mark.parametrize("filled", ["0", "4"])
def test_cancel_redundant_sets_canceled_broker_wins(
    wire: Wire, caplog: LOGGED, said: str, filled: str
) -> None:
    order_id = wire.working()
    wire.cancel(order_id)
    wire.sent(order_id)
    if filled != "0":
        wire.fill(order_id, filled, "100", "e1")
    if said.startswith("status"):
        number = wire.status(order_id, "INACTIVE")
    else:
        number = wire.say("CANCEL_REJECTED", order_id, code=said, message="")
    wire.apply()
    assert_told(wire, caplog, "CANCEL_REDUNDANT", number)
    assert_order(wire, order_id, "CANCELED", filled, None if filled == "0" else "100")
    assert_books(wire, filled, str(int(filled) * 100))


@pytest.mark.scenario("LIFE-03")
@pytest.mark.parametrize("end", ["CANCELED", "EXPIRED"])
@pytest.mark.parametrize("quantity", ["10", "4"])
def test_fill_after_cancel_is_accepted_and_status_filled(
    wire: Wire, caplog: LOGGED, end: str, quantity: str
) -> None:
    order_id = wire.working()
    wire.status(order_id, end)
    wire.apply()
    assert_order(wire, order_id, end, "0", None)
    number = wire.fill(order_id, quantity, "101.5", "e1")
    wire.apply()
    assert_told(wire, caplog, "FILL_AFTER_CANCEL", number)
    assert_order(wire, order_id, "FILLED" if quantity == "10" else end, quantity, "101.5")
    assert_books(wire, quantity, str(Decimal(quantity) * Decimal("101.5")))


# Seventy units for 7020: 702/7 each, a number without an end.
FILLS = [
    ("1", "100.5"),
    ("2", "100.25"),
    ("3", "99.5"),
    ("4", "100.75"),
    ("5", "100.1"),
    ("6", "99.75"),
    ("7", "100.5"),
    ("8", "100.125"),
    ("9", "99"),
    ("25", "100.92"),
]


@pytest.mark.scenario("LIFE-04")
@pytest.mark.parametrize("at_once", [True, False])
def test_vwap_across_multiple_partial_fills_exact(wire: Wire, at_once: bool) -> None:
    order_id = wire.working(quantity="70")
    for number, (quantity, price) in enumerate(FILLS):
        wire.fill(order_id, quantity, price, f"e{number}")
        if not at_once:
            wire.apply()
    wire.apply()
    assert_order(wire, order_id, "FILLED", "70", "100.2857142857")
    assert wire.order(order_id)["filled_notional"] == 7020
    assert_books(wire, "70", "7020")


@pytest.mark.scenario("LIFE-05")
@pytest.mark.parametrize("apart", [True, False])
def test_duplicate_execdetails_ignored_by_execution_id(
    wire: Wire, caplog: LOGGED, apart: bool
) -> None:
    order_id = wire.working()
    first = wire.fill(order_id, "4", "100", "e1")
    if apart:
        wire.apply()
    number = wire.fill(order_id, "4", "100", "e1")
    wire.apply()
    assert [wire.finding(n)[0] for n in (first, number)] == ["NEW", "REPEAT"]
    assert_told(wire, caplog, "FILL_DUPLICATE", number)
    assert_order(wire, order_id, "PARTIALLY_FILLED", "4", "100")
    assert_books(wire, "4", "400")
    # Another id with the same facts is another execution.
    wire.fill(order_id, "4", "100", "e2")
    wire.apply()
    assert_order(wire, order_id, "PARTIALLY_FILLED", "8", "100")


@pytest.mark.scenario("LIFE-06")
def test_zero_quantity_fill_is_ignored(wire: Wire, caplog: LOGGED) -> None:
    order_id = wire.working()
    number = wire.fill(order_id, "0", "100", "e1")
    wire.apply()
    assert wire.finding(number)[0] == "IGNORED"
    assert_told(wire, caplog, "FILL_ZERO_QTY", number)
    assert_order(wire, order_id, "ROUTED", "0", None)
    assert_books(wire, "0", "0")


@pytest.mark.scenario("FAIL-05")
def test_orderid_reuse_uses_permid_as_primary_key(wire: Wire, caplog: LOGGED) -> None:
    yesterday, today = wire.place(quantity="5"), wire.place(quantity="5")
    wire.sent(yesterday)
    wire.sent(today)
    wire.status(yesterday, "ROUTED", broker_order_id=1, perm_id=71)
    wire.now = NOW + timedelta(days=1)
    reused = wire.status(today, "ROUTED", broker_order_id=1, perm_id=72)
    wire.apply()
    assert_told(wire, caplog, "ORDER_ID_REUSE", reused)
    # Without our reference: the lasting id decides, then the day.
    facts: dict[str, Any] = {"symbol": "AAPL", "side": "BUY", "price": "100"}
    wire.say("EXECUTION", perm_id=71, broker_order_id=1, execution_id="a", quantity="1", **facts)
    wire.say("EXECUTION", broker_order_id=1, execution_id="b", quantity="2", **facts)
    wire.say(
        "EXECUTION", broker_order_id=1, execution_id="c", quantity="3", at=NOW + SECOND, **facts
    )
    wire.apply()
    assert_order(wire, yesterday, "PARTIALLY_FILLED", "4", "100")
    assert_order(wire, today, "PARTIALLY_FILLED", "2", "100")
    assert_books(wire, "6", "600")


@pytest.mark.scenario("EDGE-01")
def test_negative_price_fill_is_rejected_and_alerted(wire: Wire, caplog: LOGGED) -> None:
    order_id = wire.working()
    number = wire.fill(order_id, "10", "-3.5", "e1")
    wire.apply()
    assert wire.finding(number)[0] == "REFUSED"
    assert_told(wire, caplog, "NEGATIVE_PRICE", number)
    assert wire.alerts() == ["NEGATIVE_PRICE"]
    assert_order(wire, order_id, "ROUTED", "0", None)
    assert_books(wire, "0", "0")


@pytest.mark.scenario("EDGE-01")
def test_an_instrument_may_be_marked_so_that_it_trades_below_zero(wire: Wire) -> None:
    wire.conn.execute("INSERT INTO instrument (symbol, negative_price_allowed) VALUES ('CL', true)")
    order_id = wire.working(symbol="CL", reference="10")
    wire.fill(order_id, "10", "-3.5", "e1")
    wire.apply()
    assert_order(wire, order_id, "FILLED", "10", "-3.5")
    assert (wire.position("CL"), wire.cash()) == (Decimal(10), START + 35)
    assert wire.alerts() == []


@pytest.mark.scenario("EDGE-03")
def test_orderid_wrap_around_switches_to_permid_mapping(wire: Wire, caplog: LOGGED) -> None:
    last, anew = wire.place(), wire.place(quantity="5")
    wire.sent(last)
    wire.sent(anew)
    before = wire.status(last, "ROUTED", broker_order_id=LAST_BROKER_ORDER_ID - 1, perm_id=70)
    number = wire.status(last, "ROUTED", broker_order_id=LAST_BROKER_ORDER_ID, perm_id=70)
    wire.status(anew, "ROUTED", broker_order_id=LAST_BROKER_ORDER_ID, perm_id=71)
    facts: dict[str, Any] = {"symbol": "AAPL", "side": "BUY", "quantity": "5", "price": "100"}
    wire.say("EXECUTION", broker_order_id=1, perm_id=70, execution_id="a", **facts)
    wire.say("EXECUTION", broker_order_id=2, perm_id=71, execution_id="b", **facts)
    wire.apply()
    assert wire.finding(before)[1] is None
    assert wire.finding(number)[1] == "ORDER_ID_WRAP"
    assert [told for told, _ in wire.events("ORDER_ID_WRAP")] == ["ORDER_ID_WRAP"] * 2
    assert "ORDER_ID_WRAP" in caplog.messages
    assert_order(wire, last, "PARTIALLY_FILLED", "5", "100")
    assert_order(wire, anew, "FILLED", "5", "100")
    assert_books(wire, "10", "1000")


@pytest.mark.scenario("TIME-DRIFT")
def test_event_time_drift_uses_broker_time_for_pnl_and_vwap(
    conn: Connection, caplog: LOGGED
) -> None:
    """Our clock jumps back between two fills that come in the wrong sequence."""
    wire = Wire(conn, a_broker_run(conn, pnl_method="FIFO"))
    bought = wire.working()
    late, early = NOW + timedelta(minutes=2), NOW + timedelta(minutes=1)
    number = wire.fill(bought, "5", "110", "e2", at=late, lag=-60 * SECOND)
    wire.fill(bought, "5", "100", "e1", at=early)
    wire.apply()
    selling = wire.working(side="SELL", quantity="5")
    wire.fill(selling, "5", "120", "e3", at=late + SECOND)
    wire.apply()
    assert_told(wire, caplog, "TIME_SKEW", number)
    # First in by the broker's time is the one at 100.
    realized = one(wire, "SELECT realized_pnl FROM position_pnl WHERE symbol = 'AAPL'")
    assert realized[0] == 100
    assert_order(wire, bought, "FILLED", "10", "105")
    assert_order(wire, selling, "FILLED", "5", "120")
    assert_books(wire, "5", "450")


@pytest.mark.scenario("MODIFY-01")
def test_replace_limit_price_preserves_fills_and_oms_id(wire: Wire) -> None:
    order_id = wire.working(limit_price="100")
    wire.fill(order_id, "4", "100", "e1")
    wire.apply()
    assert wire.modify(order_id, limit_price="101") == "PENDING_MODIFY"
    assert wire.order(order_id)["limit_price"] == 100  # until the broker says so
    wire.sent(order_id)
    number = wire.say("MODIFIED", order_id, quantity="10", limit_price="101")
    wire.apply()
    assert wire.finding(number) == ("NEW", None)
    assert wire.order(order_id)["limit_price"] == 101
    assert_order(wire, order_id, "PARTIALLY_FILLED", "4", "100")
    wire.fill(order_id, "6", "101", "e2")
    wire.apply()
    assert_order(wire, order_id, "FILLED", "10", "100.6")
    assert_books(wire, "10", "1006")
    assert wire.kinds(order_id) == ["SUBMIT", "MODIFY"]
    assert one(wire, "SELECT count(*) FROM orders") == (1,)


@pytest.mark.scenario("MODIFY-02")
def test_reduce_quantity_preserves_filled_qty_and_updates_remaining(wire: Wire) -> None:
    order_id = wire.working(limit_price="100")
    wire.fill(order_id, "4", "100", "e1")
    wire.apply()
    assert wire.modify(order_id, quantity="4").startswith("QUANTITY_BELOW_FILLED")
    assert wire.modify(order_id, quantity="6") == "PENDING_MODIFY"
    wire.sent(order_id)
    wire.say("MODIFIED", order_id, quantity="6", limit_price="100")
    wire.apply()
    order = wire.order(order_id)
    assert (order["quantity"], order["quantity"] - order["filled_quantity"]) == (6, 2)
    assert order["reserved_cash"] == 200
    assert_order(wire, order_id, "PARTIALLY_FILLED", "4", "100")
    assert_books(wire, "4", "400")
    wire.fill(order_id, "2", "100", "e2")
    wire.apply()
    assert_order(wire, order_id, "FILLED", "6", "100")
    assert_books(wire, "6", "600")


@pytest.mark.parametrize("heard", [None, "PENDING_SUBMIT"])
def test_an_order_without_an_answer_is_not_modified_until_it_has_one(
    wire: Wire, heard: str | None
) -> None:
    order_id = wire.place(limit_price="100")
    wire.sent(order_id)
    if heard is not None:
        wire.status(order_id, heard)
        wire.apply()
    assert wire.modify(order_id, limit_price="101").startswith("SUBMIT_UNANSWERED")
    assert wire.modify(order_id, limit_price="102").startswith("SUBMIT_UNANSWERED")
    wire.status(order_id, "ROUTED")
    wire.apply()
    assert wire.order(order_id)["limit_price"] == 100
    assert wire.modify(order_id, limit_price="101") == "PENDING_MODIFY"
    assert wire.kinds(order_id) == ["SUBMIT", "MODIFY"]
    told = wire.conn.execute(
        "SELECT count(*) FROM event_ledger WHERE event_type = 'MODIFY_REFUSED'"
    ).fetchone()
    assert told == (1,)


def test_the_audit_sees_what_these_tests_rely_on(conn: Connection) -> None:
    wire = Wire(conn, a_broker_run(conn, user="ben"))
    order_id = wire.working()
    conn.execute("RESET ROLE")
    conn.execute("ALTER TABLE orders DISABLE TRIGGER USER")
    conn.execute("UPDATE orders SET status = 'EXPIRED' WHERE order_id = %s", [order_id])
    conn.execute("ALTER TABLE orders ENABLE TRIGGER USER")
    assert [finding.rule for finding in audit(conn)] == ["audit_event"]


@pytest.mark.scenario("BOUNDARY-01")
@pytest.mark.parametrize(
    "attack",
    [
        "SELECT status FROM orders WHERE user_id = %(user)s",
        "SELECT FROM orders WHERE user_id = %(user)s FOR UPDATE",
        "UPDATE orders SET status = 'FILLED' WHERE user_id = %(user)s",
        "UPDATE paper_order SET status = 'CANCELED' WHERE user_id = %(user)s",
        "INSERT INTO orders (user_id, run_id, symbol, side, quantity) "
        "VALUES (%(user)s, %(run)s, 'AAPL', 'BUY', 1)",
        "DELETE FROM orders WHERE user_id = %(user)s",
        "INSERT INTO execution (user_id, run_id, order_id, quantity, price) "
        "VALUES (%(user)s, %(run)s, %(order)s, 1, 1)",
        "INSERT INTO broker_command (user_id, account, kind) VALUES (%(user)s, 'DU1', 'SNAPSHOT')",
        "UPDATE broker_command SET outcome = 'SENT' WHERE user_id = %(user)s",
        "UPDATE broker_event SET finding = 'NEW' WHERE user_id = %(user)s",
        "INSERT INTO broker_event (user_id, account, number, holder, kind, event_at, finding) "
        "VALUES (%(user)s, 'DU1', 1, %(user)s, 'NOTICE', now(), 'NEW')",
        "UPDATE broker_lease SET expires_at = 'infinity' WHERE user_id = %(user)s",
        "UPDATE broker_account SET orders_per_second = 9 WHERE user_id = %(user)s",
    ],
)
def test_connector_cannot_mutate_orderstate_directly(conn: Connection, attack: str) -> None:
    desk = Desk(conn)
    (order,) = desk.orders(1)
    desk.command("SUBMIT", order)
    conn.execute(f"SET LOCAL ROLE {CONNECTOR_ROLE}".encode())
    with pytest.raises(psycopg.errors.InsufficientPrivilege), conn.transaction():
        conn.execute(attack.encode(), {"user": desk.user_id, "run": desk.run_id, "order": order})
    conn.execute("RESET ROLE")
    assert desk.rows("SELECT status FROM orders WHERE user_id = %s") == [("NEW",)]
