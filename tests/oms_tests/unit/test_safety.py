"""What keeps trading safe: limits, circuit breakers, flatten, throttles and walls."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from connector_cases import Desk, Wire, connector
from safety_cases import ACCOUNT, Live

from engine import flatten as flattening
from engine.brokers.throttle import Free, Throttle
from engine.clock import utc_now
from engine.db.connect import Connection
from engine.flatten import CHECK_WAIT, Scope, advance, flatten
from engine.safety import check_breakers, lift_halt

ENGINE = Path(__file__).parents[3] / "engine"


class _Seconds:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def _send(throttle: Throttle, seconds: _Seconds, count: int, *, is_order: bool) -> list[float]:
    """Send as fast as the throttle allows; returns when each went."""
    sent = []
    for _ in range(count):
        while delay := throttle.delay(seconds(), is_order=is_order):
            seconds.now += delay
        throttle.note(seconds(), is_order=is_order)
        sent.append(seconds())
    return sent


def _most_in_a_second(sent: list[float]) -> int:
    """How many went in any one second, wherever it begins."""
    return max(sum(start <= at < start + 1 for at in sent) for start in sent)


@pytest.mark.scenario("SAFETY-02")
@pytest.mark.scenario("OMS-THROTTLE")
def test_max_orders_per_second_queues_and_throttles(dsn: str, owner_conn: Connection) -> None:
    desk, wire = Desk(owner_conn, orders_per_second=5, messages_per_second=100), Wire()
    with connector(dsn, desk, wire):
        refs = desk.submits(12)
        told = desk.wait_for("THROTTLED", 7)
        (cancelled,) = desk.orders(1)
        desk.command("CANCEL", cancelled)
        desk.wake()
        desk.wait_until_done()
    assert wire.refs("SUBMIT") == refs, "in the order of their arrival"
    at = [when for when, kind, _ in wire.sent if kind == "SUBMIT"]
    assert _most_in_a_second(at) == 5
    assert wire.refs().index(str(cancelled)) <= 10, "a cancel waits for no order"
    assert len(told) == len(desk.events("THROTTLED")) == 7, "each is told once"
    assert {each["code"] for each in told} == {"THROTTLED"}
    assert [round(float(each["wait_seconds"])) for each in told] == [1] * 5 + [2] * 2
    assert desk.rows(
        """SELECT array_agg(order_ref ORDER BY number) FROM broker_event
           WHERE user_id = %s AND kind = 'THROTTLED'"""
    ) == [(refs[5:],)]


@pytest.mark.scenario("RATE-01")
def test_rate_limit_50_orders_per_second_throttles_extra() -> None:
    seconds = _Seconds()
    throttle = Throttle(orders_per_second=1000, messages_per_second=50)
    sent = _send(throttle, seconds, 60, is_order=True)
    assert sent[:50] == [1000.0] * 50
    assert all(at >= 1001.0 for at in sent[50:])
    assert throttle.free(seconds()) == Free(40, 40)


def test_the_throttle_is_exact_over_ten_seconds_and_in_every_second() -> None:
    for limit in (1, 7, 50, 200):
        seconds = _Seconds()
        sent = _send(Throttle(limit, 1000), seconds, 10 * limit, is_order=True)
        assert _most_in_a_second(sent) <= limit
        assert 9 <= sent[-1] - sent[0] <= 9 * 1.01


def test_orders_that_trickle_in_are_not_held_back_by_a_burst_long_ago() -> None:
    seconds = _Seconds()
    throttle = Throttle(2, 10)
    for at in (0.0, 0.6, 1.1, 1.7):
        seconds.now = 1000 + at
        assert throttle.delay(seconds(), is_order=True) == 0, at
        throttle.note(seconds(), is_order=True)
    assert throttle.delay(1001.7, is_order=True) == pytest.approx(0.4, abs=0.01)


def test_a_cancel_is_a_message_and_no_order() -> None:
    throttle = Throttle(1, 3)
    throttle.note(0.0, is_order=True)
    assert throttle.free(0.0) == Free(2, 0)
    assert throttle.limits_orders(0.0)
    throttle.note(0.0, is_order=False)
    throttle.note(0.0, is_order=False)
    assert throttle.free(0.0) == Free(0, 0)
    assert not throttle.limits_orders(0.0)


def test_a_restart_remembers_the_last_second() -> None:
    throttle = Throttle(3, 10)
    throttle.resume(1000.0, [(0.2, True), (0.9, True), (5.0, True), (0.1, False)])
    assert throttle.free(1000.0) == Free(7, 1)
    assert throttle.free(1000.11) == Free(8, 2)


def test_a_restart_of_the_process_remembers_the_last_second(
    dsn: str, owner_conn: Connection
) -> None:
    desk, wire = Desk(owner_conn, orders_per_second=4, messages_per_second=100), Wire()
    for _ in range(2):
        with connector(dsn, desk, wire):
            desk.submits(4)
            desk.wait_until_done()
    assert _most_in_a_second([at for at, *_ in wire.sent]) == 4
    assert len(wire.sent) == 8


# --- The wall between engine and brokers ------------------------------------------------------


def _imports(path: Path) -> Iterator[str]:
    """What a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


# What speaks to brokers. What the engine may know of them are the words that both use.
ADAPTERS = (
    "engine.brokers.conversation",
    "engine.brokers.dummy",
    "engine.brokers.ibkr",
    "engine.brokers.registry",
    "engine.brokers.store",
    "ib_async",
    "ib_insync",
)


@pytest.mark.scenario("BOUNDARY-02")
def test_engine_never_calls_broker_api_directly(conn: Connection) -> None:
    looked = 0
    for path in ENGINE.rglob("*.py"):
        if path.is_relative_to(ENGINE / "brokers"):
            continue
        looked += 1
        assert [name for name in _imports(path) if name.startswith(ADAPTERS)] == [], path
    assert looked > 30
    rights = conn.execute(
        """SELECT has_any_column_privilege('oms_engine', 'broker_event', 'INSERT'),
                  bool_or(has_function_privilege('oms_engine', oid, 'EXECUTE'))
           FROM pg_proc WHERE pronamespace = 'public'::regnamespace
             AND proname IN ('lease_take', 'commands_claim', 'commands_done')"""
    ).fetchone()
    assert rights == (False, False), "the engine can't pretend to have heard a broker"


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


def test_flatten_whose_orders_do_not_end_raises_a_person_once(live: Live) -> None:
    live.hold(10)
    live.hold(5, symbol="IBM")
    now = utc_now()
    late = now + flattening.CLOSE_WAIT
    flatten(live.engine, live.user, Scope(), "test", "ann", now)
    apple, ibm = live.safety_orders()
    for order in (apple, ibm):
        live.send(order)
    live.fill(apple, 10)
    assert _status(live, late - timedelta(seconds=1)) == "CLOSING"
    assert live.alerts() == []
    assert [_status(live, late) for _ in range(3)] == ["CLOSING"] * 3
    assert live.alerts() == ["FLATTEN_STUCK"]
    ((words,),) = live.owner.execute("SELECT message FROM alert").fetchall()
    assert words == f"flatten waits for what does not end: SELL IBM {ibm} NEW"
    (told,) = live.events("FLATTEN_STUCK")
    assert [order["order_id"] for order in told["orders"]] == [str(ibm)]
    # Who has acknowledged it knows it.
    live.owner.execute("UPDATE alert SET acknowledged_at = now(), acknowledged_by = 'ann'")
    assert _status(live, late + timedelta(hours=1)) == "CLOSING"
    assert len(live.events("FLATTEN_STUCK")) == 1
    live.fill(ibm, 5)
    assert _status(live, late + timedelta(hours=2)) == "DONE"


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
