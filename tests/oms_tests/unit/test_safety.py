"""What keeps trading safe: limits, circuit breakers and flatten, at a broker that is played."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal

import pytest
from safety_cases import ACCOUNT, Live

from engine import flatten as flattening
from engine.clock import utc_now
from engine.db.connect import Connection
from engine.flatten import CHECK_WAIT, Scope, advance, flatten
from engine.safety import check_breakers, lift_halt


@pytest.fixture
def live(owner_conn: Connection, engine_conn: Connection) -> Live:
    return Live.start(owner_conn, engine_conn)


# --- Limits -----------------------------------------------------------------------------------


@pytest.mark.scenario("SAFETY-01")
def test_duplicate_intent_rejected_within_time_window(live: Live) -> None:
    live.limit("DUPLICATE_INTENT", 3600)
    first, code = live.place(quantity=2)
    assert code is None
    second, code = live.place(quantity=2)
    assert code == "DUPLICATE_INTENT"
    assert live.status(second) == "REJECTED"
    # Nothing of it goes to the broker.
    assert [c[2]["order_ref"] for c in live.commands("SUBMIT")] == [str(first)]
    assert live.place(quantity=3)[1] is None
    # Outside of the window it is no duplicate.
    live.owner.execute(
        "UPDATE risk_limit SET limit_value = 0.000001 WHERE user_id = %s", [live.user]
    )
    assert live.place(quantity=2)[1] is None


@pytest.mark.scenario("SAFETY-03")
def test_position_limit_rejects_oversized_order(live: Live) -> None:
    live.limit("MAX_POSITION", 10)
    live.hold(6)
    order, code = live.place(quantity=5)
    assert code == "MAX_POSITION"
    assert live.owner.execute(
        "SELECT log_code, limit_value, value FROM order_refusal WHERE order_id = %s", [order]
    ).fetchall() == [("POSITION_LIMIT", 10, 11)]
    assert live.place(quantity=4)[1] is None


# --- Circuit breakers -------------------------------------------------------------------------


@pytest.mark.scenario("SAFETY-04")
def test_daily_loss_circuit_breaker_halts_trading(live: Live) -> None:
    live.owner.execute(
        "INSERT INTO circuit_breaker (user_id, kind, threshold) VALUES (%s, 'DAILY_LOSS', 50)",
        [live.user],
    )
    live.hold(10)
    working = live.work(quantity=3, price=90)
    live.mark("95.01")
    assert check_breakers(live.engine, live.user, utc_now()) == []
    live.mark(95)
    (trip,) = check_breakers(live.engine, live.user, utc_now())
    assert (trip.kind, trip.code, trip.threshold, trip.value) == (
        "DAILY_LOSS",
        "CIRCUIT_BREAKER",
        Decimal(50),
        Decimal(50),
    )
    assert live.status(working) == "PENDING_CANCEL"
    assert [command[1] for command in live.commands("CANCEL")] == [0]
    assert live.place()[1] == "HALTED"
    assert live.alerts() == ["CIRCUIT_BREAKER"]
    assert [event["kind"] for event in live.events("CIRCUIT_BREAKER")] == ["DAILY_LOSS"]
    assert [event["by"] for event in live.events("KILL_SWITCH")] == ["breaker"]
    # What has tripped trips no more, and goes away by nothing but its name.
    live.mark(200)
    assert check_breakers(live.engine, live.user, utc_now()) == []
    assert live.place()[1] == "HALTED"
    assert lift_halt(live.engine, live.user, trip.halt.name, "ann") is not None
    assert live.place()[1] is None


# --- Flatten ----------------------------------------------------------------------------------


@pytest.mark.scenario("FAIL-03")
def test_flatten_recursion_prevented_by_flatten_flag(live: Live) -> None:
    live.hold(10)
    flatten(live.engine, live.user, Scope(), "test", "ann", utc_now())
    (order,) = live.safety_orders()
    live.send(order)
    live.hear("REJECTED", {"code": "201", "message": "no"}, order)
    live.apply()
    assert live.status(order) == "REJECTED"
    done = advance(live.engine, live.user, utc_now())
    assert done is not None
    assert done.status == "PARTIAL"
    assert [event["symbol"] for event in live.events("FLATTEN_RECURSION")] == ["AAPL"]
    # However often anybody looks: no other flatten, no other order.
    for _ in range(3):
        assert advance(live.engine, live.user, utc_now()) is None
    assert live.safety_orders() == [order]
    assert live.held() == {"AAPL": 10}
    assert live.alerts()[-1] == "FLATTEN_SUMMARY"


@pytest.mark.scenario("FLATTEN-DURING-FLATTEN")
def test_flatten_during_flatten_does_not_recurse(live: Live) -> None:
    live.hold(10)
    first = flatten(live.engine, live.user, Scope(), "first", "ann", utc_now())
    assert (first.status, first.repeated) == ("CLOSING", False)
    second = flatten(live.engine, live.user, Scope(), "second", "ben", utc_now())
    assert (second.flatten_id, second.repeated) == (first.flatten_id, True)
    assert len(live.safety_orders()) == 1
    assert [event["by"] for event in live.events("FLATTEN_RECURSION")] == ["ben"]
    # When it is done, another may be asked for.
    (order,) = live.safety_orders()
    live.send(order)
    live.fill(order, 10)
    done = advance(live.engine, live.user, utc_now())
    assert done is not None
    assert (done.status, done.summary) == (
        "DONE",
        {"orders": 1, "filled": 1, "failed": [], "exposed": []},
    )
    third = flatten(live.engine, live.user, Scope(), "third", "ann", utc_now())
    assert third.flatten_id != first.flatten_id


@pytest.mark.scenario("FAIL-07")
def test_flatten_aborted_on_margin_violation_and_alerted(live: Live) -> None:
    live.owner.execute("""UPDATE broker_account SET settings = '{"what_if": true}'""")
    live.hold(-10)
    asked = flatten(live.engine, live.user, Scope(), "test", "ann", utc_now())
    assert asked.status == "CHECKING"
    ((command, priority, payload),) = live.commands("WHAT_IF")
    assert (priority, payload["symbol"], payload["side"], payload["quantity"]) == (
        0,
        "AAPL",
        "BUY",
        "10",
    )
    live.hear("WHAT_IF", {"command_id": str(command), "accepted": False, "message": "margin"})
    done = advance(live.engine, live.user, utc_now())
    assert done is not None
    assert done.status == "ABORTED"
    assert live.safety_orders() == []
    assert live.alerts() == ["FLATTEN_ABORTED"]
    (event,) = live.events("FLATTEN_ABORTED")
    assert event["refused"] == [{"symbol": "AAPL", "account": ACCOUNT, "message": "margin"}]


def test_flatten_goes_on_when_the_broker_agrees_or_is_silent(live: Live) -> None:
    live.owner.execute("""UPDATE broker_account SET settings = '{"what_if": true}'""")
    live.hold(10)
    now = utc_now()
    asked = flatten(live.engine, live.user, Scope(), "test", "ann", now)
    assert asked.status == "CHECKING"
    assert _status(live, now + CHECK_WAIT - timedelta(seconds=1)) == "CHECKING"
    assert _status(live, now + CHECK_WAIT) == "CLOSING"
    (order,) = live.safety_orders()
    live.send(order)
    live.fill(order, 10)
    assert _status(live, now) == "DONE"
    live.hold(7)
    assert flatten(live.engine, live.user, Scope(), "again", "ann", now).status == "CHECKING"
    command = live.commands("WHAT_IF")[-1][0]
    live.hear("WHAT_IF", {"command_id": str(command), "accepted": True})
    assert _status(live, now) == "CLOSING"


def _status(live: Live, now: object) -> str:
    asked = advance(live.engine, live.user, now)  # type: ignore[arg-type]
    assert asked is not None
    return asked.status


def test_flatten_waits_for_cancels_and_closes_what_they_leave(live: Live) -> None:
    live.hold(10)
    selling = live.work("SELL", 4, 200)
    now = utc_now()
    asked = flatten(live.engine, live.user, Scope(run_id=live.run), "test", "ann", now)
    assert asked.status == "CANCELLING"
    assert live.status(selling) == "PENDING_CANCEL"
    live.fill(selling, 1, 200)
    live.hear("ORDER_STATUS", {"status": "CANCELED", "filled": "1"}, selling)
    live.apply()
    assert _status(live, now) == "CLOSING"
    (order,) = live.safety_orders()
    assert live.owner.execute(
        "SELECT side, quantity FROM orders WHERE order_id = %s", [order]
    ).fetchone() == ("SELL", 9)
    submit = live.commands("SUBMIT")[-1]
    assert (submit[1], submit[2]["order_ref"]) == (0, str(order))


def test_flatten_does_not_wait_for_a_cancel_for_ever(live: Live) -> None:
    live.hold(10)
    live.work("SELL", 4, 200)
    now = utc_now()
    flatten(live.engine, live.user, Scope(account=ACCOUNT), "test", "ann", now)
    assert _status(live, now + flattening.CANCEL_WAIT - timedelta(seconds=1)) == "CANCELLING"
    # What the stuck order may still sell is not sold twice.
    assert _status(live, now + flattening.CANCEL_WAIT) == "CLOSING"
    assert live.owner.execute(
        "SELECT quantity FROM orders WHERE purpose = 'FLATTEN'"
    ).fetchall() == [(6,)]


def test_flatten_reports_what_one_refused_order_left(live: Live) -> None:
    live.hold(10)
    live.hold(5, symbol="IBM")
    flatten(live.engine, live.user, Scope(), "test", "ann", utc_now())
    apple, ibm = live.safety_orders()
    for order in (apple, ibm):
        live.send(order)
    live.hear("REJECTED", {"code": "201", "message": "margin"}, apple)
    live.apply()
    assert _status(live, utc_now()) == "CLOSING"
    live.fill(ibm, 5)
    assert _status(live, utc_now()) == "PARTIAL"
    (partial,) = live.events("FLATTEN_PARTIAL")
    assert [row["symbol"] for row in partial["failed"]] == ["AAPL"]
    assert [(row["symbol"], row["quantity"]) for row in partial["exposed"]] == [("AAPL", "10")]
    assert live.events("FLATTEN_SUMMARY") == [partial]
    assert live.alerts()[-1] == "FLATTEN_PARTIAL"


def test_flatten_fill_after_the_close_is_marked_once(live: Live) -> None:
    live.hold(10)
    flatten(live.engine, live.user, Scope(), "test", "ann", utc_now())
    (order,) = live.safety_orders()
    live.send(order)
    # The account's hours are those around the next hour: what fills now fills outside of them.
    opens = utc_now() + timedelta(hours=1)
    live.owner.execute(
        "UPDATE broker_account SET opens_at = %s, closes_at = %s WHERE user_id = %s",
        [opens.time(), (opens + timedelta(hours=1)).time(), live.user],
    )
    live.fill(order, 10)
    assert _status(live, utc_now()) == "DONE"
    (marked,) = live.events("FLATTEN_POST_MARKET")
    assert (marked["symbol"], marked["quantity"]) == ("AAPL", "10")
    assert live.alerts() == ["FLATTEN_POST_MARKET"]
    assert flattening.mark_post_market(live.engine, live.user, live.run, order) == 0
