"""What overtakes what: requests and answers, halves of one story, runs that end meanwhile."""

from __future__ import annotations

import threading
from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
from broker_cases import NOW, SECOND, Wire, a_broker_run
from waits import SECONDS_MAX, wait_until_blocked

from engine import inbox, ledger
from engine.audit import audit
from engine.db.connect import Connection, open_connection
from engine.errors import EngineError, HistoryIsFixed, translated
from engine.inbox import apply_batch, retry_held
from engine.orders.write import cancel_order, modify_order
from engine.runs import set_status
from engine.stop import settle_stopping, stop_run
from engine.worker import book_held

START = Decimal(100_000)


def assert_is(wire: Wire, order_id: UUID, status: str, filled: int = 0) -> None:
    order = wire.order(order_id)
    assert (order["status"], order["filled_quantity"]) == (status, filled)
    assert audit(wire.conn) == []


def books(wire: Wire) -> tuple[object, object]:
    """What the run holds of AAPL, and its cash."""
    return wire.position(), wire.cash()


def outcomes(wire: Wire, order_id: UUID) -> list[tuple[str, str | None]]:
    return wire.conn.execute(
        "SELECT kind, outcome FROM broker_command WHERE order_id = %s ORDER BY order_version",
        [order_id],
    ).fetchall()


def commission(wire: Wire, name: str, amount: str = "1.5", currency: str = "USD") -> int:
    return wire.say("COMMISSION", None, execution_id=name, amount=amount, currency=currency)


def move_time_on(wire: Wire) -> None:
    """Let the run stand an hour later."""
    at = wire.stands_at() + timedelta(hours=1)
    ledger.append(wire.conn, wire.run.user_id, wire.run.run_id, at, [ledger.Event("NOTED", "", {})])


def test_a_cancel_of_a_queued_order_withdraws_it(wire: Wire) -> None:
    order_id = wire.place()
    assert wire.cancel(order_id) == "CANCELED"
    assert outcomes(wire, order_id) == [("SUBMIT", "WITHDRAWN")]
    assert wire.cancel(order_id) == "CANCEL_IGNORED"
    assert_is(wire, order_id, "CANCELED")


def test_a_queued_order_is_changed_at_once(wire: Wire) -> None:
    order_id = wire.place(limit_price="100")
    assert wire.modify(order_id, quantity="7", limit_price="99") == "MODIFIED"
    payload = wire.conn.execute("SELECT payload FROM broker_command").fetchone()
    assert payload is not None
    assert (payload[0]["quantity"], payload[0]["limit_price"]) == ("7", "99")
    assert wire.order(order_id)["quantity"] == 7
    assert_is(wire, order_id, "NEW")


@pytest.mark.parametrize("claims_first", [True, False])
def test_a_cancel_and_a_claim_at_once_are_one_or_the_other(
    owner_conn: Connection, dsn: str, claims_first: bool
) -> None:
    wire = Wire(owner_conn, a_broker_run(owner_conn))
    order_id = wire.place()
    claim = "UPDATE broker_command SET claimed_by = %s WHERE claimed_by IS NULL AND done_at IS NULL"
    came_to: list[str] = []
    claimed: list[int] = []
    with open_connection(dsn) as one, open_connection(dsn) as other:

        def cancel(conn: Connection) -> None:
            came_to.append(cancel_order(conn, wire.run, order_id, "USER"))

        def take(conn: Connection) -> None:
            claimed.append(conn.execute(claim, [wire.holder]).rowcount)

        first, second = (take, cancel) if claims_first else (cancel, take)
        with one.transaction():
            first(one)
            thread = threading.Thread(target=second, args=(other,))
            thread.start()
            wait_until_blocked(owner_conn, other, by=one)
        thread.join(SECONDS_MAX)
    assert not thread.is_alive()
    if claims_first:
        assert (claimed, came_to) == ([1], ["PENDING_CANCEL"])
        assert outcomes(wire, order_id) == [("SUBMIT", None), ("CANCEL", None)]
    else:
        assert (claimed, came_to) == ([0], ["CANCELED"])
        assert outcomes(wire, order_id) == [("SUBMIT", "WITHDRAWN")]


def test_who_saw_an_older_version_is_refused(wire: Wire) -> None:
    order_id = wire.working(limit_price="100")
    seen = wire.order(order_id)["version"]
    wire.fill(order_id, "1", "100", "e")
    wire.apply()
    with pytest.raises(HistoryIsFixed) as refused, translated(), wire.conn.transaction():
        modify_order(wire.conn, wire.run, order_id, seen, quantity=Decimal(8))
    assert refused.value.constraint == "orders_version_seen"
    assert wire.modify(order_id, quantity="12") == "PENDING_MODIFY"
    assert_is(wire, order_id, "PENDING_MODIFY", 1)


@pytest.mark.parametrize("answer", ["MODIFIED", "MODIFY_REJECTED"])
def test_a_cancel_follows_a_modification(wire: Wire, answer: str) -> None:
    order_id = wire.working(limit_price="100")
    wire.modify(order_id, quantity="12")
    assert wire.cancel(order_id) == "PENDING_CANCEL"
    wire.sent(order_id)
    assert wire.kinds(order_id) == ["SUBMIT", "MODIFY", "CANCEL"]
    wire.fill(order_id, "3", "100", "e")
    wire.say(answer, order_id, quantity="12", limit_price="100", code="TOO_LATE")
    wire.apply()
    assert wire.order(order_id)["quantity"] == (12 if answer == "MODIFIED" else 10)
    assert_is(wire, order_id, "PENDING_CANCEL", 3)
    wire.status(order_id, "CANCELED")
    wire.apply()
    assert_is(wire, order_id, "CANCELED", 3)


@pytest.mark.parametrize(("kind", "code"), [("CANCEL_REJECTED", "OTHER"), ("MODIFY_REJECTED", "X")])
@pytest.mark.parametrize("filled", [0, 4])
def test_a_refused_request_leaves_the_order_working(
    wire: Wire, kind: str, code: str, filled: int
) -> None:
    order_id = wire.working(limit_price="100")
    if kind == "CANCEL_REJECTED":
        wire.cancel(order_id)
    else:
        wire.modify(order_id, quantity="12")
    wire.sent(order_id)
    if filled:
        wire.fill(order_id, str(filled), "100", "e")
    number = wire.say(kind, order_id, code=code, message="")
    wire.apply()
    assert wire.finding(number)[0] == "NEW"
    assert_is(wire, order_id, "PARTIALLY_FILLED" if filled else "ROUTED", filled)


def test_a_cancel_that_is_not_found_waits_for_the_broker_to_be_asked(wire: Wire) -> None:
    order_id = wire.working()
    wire.cancel(order_id)
    wire.sent(order_id)
    number = wire.say("CANCEL_REJECTED", order_id, code="NOT_FOUND", message="")
    wire.apply()
    assert wire.finding(number) == ("NEW", "CANCEL_NOT_FOUND")
    assert wire.order(order_id)["pending_reconcile"]
    assert_is(wire, order_id, "PENDING_CANCEL")


def test_a_modification_that_was_claimed_and_not_noted_as_sent_is_confirmed(wire: Wire) -> None:
    order_id = wire.working(limit_price="100")
    wire.modify(order_id, quantity="12")
    wire.conn.execute(
        "UPDATE broker_command SET claimed_by = %s WHERE kind = 'MODIFY'", [wire.holder]
    )
    wire.say("MODIFIED", order_id, quantity="12", limit_price="100")
    wire.apply()
    assert wire.order(order_id)["quantity"] == 12
    assert_is(wire, order_id, "ROUTED")


@pytest.mark.parametrize("end", ["CANCELED", "EXPIRED", "FILLED", None])
def test_a_bust_of_all_fills_is_told_whenever_it_comes(wire: Wire, end: str | None) -> None:
    order_id = wire.working()
    wire.fill(order_id, "10" if end == "FILLED" else "4", "100", "e")
    if end not in ("FILLED", None):
        wire.status(order_id, str(end))
    wire.apply()
    move_time_on(wire)
    first, again = wire.say("BUST", order_id, execution_id="e"), None
    wire.apply()
    again = wire.say("BUST", order_id, execution_id="e")
    wire.apply()
    assert [wire.finding(n)[0] for n in (first, again)] == ["CORRECTION", "REPEAT"]
    assert_is(wire, order_id, {"FILLED": "CANCELED", None: "ROUTED"}.get(end, str(end)))
    assert books(wire) == (0, START)


@pytest.mark.parametrize("turned", [True, False])
def test_a_correction_of_price_and_quantity(wire: Wire, turned: bool) -> None:
    order_id = wire.working()
    words = [("4", "100", "x.01"), ("3", "101", "x.02")]
    for place, (quantity, price, name) in sorted(enumerate(words), reverse=turned):
        wire.fill(order_id, quantity, price, name, at=NOW + place * SECOND)
        wire.apply()
        move_time_on(wire)
    assert books(wire) == (3, START - 303)
    assert_is(wire, order_id, "PARTIALLY_FILLED", 3)


def test_halves_that_come_first_are_held(wire: Wire) -> None:
    order_id = wire.working()
    bust = wire.say("BUST", order_id, execution_id="b")
    fee = commission(wire, "a")
    wire.apply()
    assert [wire.finding(n)[0] for n in (bust, fee)] == ["HELD", "HELD"]
    assert retry_held(wire.conn, wire.run.user_id, wire.account) == 0
    wire.fill(order_id, "2", "100", "a")
    wire.fill(order_id, "3", "100", "b")
    wire.apply()
    assert [wire.finding(n)[0] for n in (bust, fee)] == ["CORRECTION", "NEW"]
    assert books(wire) == (2, START - Decimal("201.5"))
    repeat, other = commission(wire, "a"), commission(wire, "a", "9")
    wire.apply()
    assert wire.finding(repeat)[0] == "REPEAT"
    assert wire.finding(other) == ("CONTRADICTION", "COMMISSION_CONTRADICTION")
    assert_is(wire, order_id, "PARTIALLY_FILLED", 2)


@pytest.mark.parametrize("known", [True, False])
def test_a_commission_in_another_currency_waits_for_its_rate(wire: Wire, known: bool) -> None:
    def import_rate() -> None:
        wire.conn.execute("INSERT INTO fx_rate VALUES ('EUR', 'USD', %s, 1.1)", [NOW])

    order_id = wire.working()
    if known:
        import_rate()
    wire.fill(order_id, "1", "100", "a")
    number = commission(wire, "a", "2", "EUR")
    wire.apply()
    if not known:
        assert wire.finding(number) == ("HELD", "FX_RATE_MISSING")
        assert (wire.cash(), wire.alerts()) == (START - 100, ["FX_RATE_MISSING"])
        book_held(wire.conn, wire.run.user_id, NOW)
        assert wire.finding(number)[0] == "HELD"
        import_rate()
        book_held(wire.conn, wire.run.user_id, NOW)
    assert wire.finding(number) == ("NEW", None)
    assert wire.cash() == START - 100 - Decimal("2.2")
    assert_is(wire, order_id, "PARTIALLY_FILLED", 1)


def test_an_orphan_is_taken_up_where_a_run_is(wire: Wire) -> None:
    unknown = uuid4()
    number = wire.fill(unknown, "5", "100", "a", symbol="AAPL", side="BUY")
    wire.apply()
    assert wire.finding(number) == ("ORPHAN", "ORPHAN_FILL")
    assert wire.order(unknown)["recovered"]
    assert wire.alerts() == ["ORPHAN_FILL"]
    assert books(wire) == (5, START - 500)
    assert_is(wire, unknown, "FILLED", 5)


@pytest.mark.parametrize(
    "wrong", [{"side": "LEFT"}, {"symbol": None}, {"quantity": "0"}, {"price": "x"}]
)
def test_an_orphan_that_lacks_its_facts_is_refused(wire: Wire, wrong: dict[str, Any]) -> None:
    facts: dict[str, Any] = {"execution_id": "a", "symbol": "AAPL", "side": "BUY"}
    facts |= {"quantity": "1", "price": "1"}
    facts = {name: value for name, value in (facts | wrong).items() if value is not None}
    number = wire.say("EXECUTION", uuid4(), **facts)
    wire.apply()
    assert wire.finding(number) == ("REFUSED", "EXECUTION_INCOMPLETE")
    assert wire.alerts() == ["EXECUTION_INCOMPLETE"]


def test_an_orphan_without_a_run_is_held_and_raised(wire: Wire) -> None:
    set_status(wire.conn, wire.run.user_id, wire.run.run_id, "STOPPED")
    status = wire.status(uuid4(), "ROUTED")
    number = wire.fill(uuid4(), "5", "100", "a", symbol="AAPL", side="BUY")
    wire.apply()
    assert wire.finding(status) == ("ORPHAN", "ORPHAN_ORDER")
    assert wire.finding(number) == ("HELD", "ORPHAN_FILL")
    assert wire.alerts() == ["ORPHAN_FILL"]
    assert wire.cash() == START
    assert audit(wire.conn) == []


def test_what_is_not_ours_is_watched_and_not_touched(wire: Wire) -> None:
    numbers = [
        wire.say("ORDER_STATUS", None, status="ROUTED", perm_id=9),
        wire.say("EXECUTION", None, execution_id="z", quantity="1", price="1", perm_id=9),
    ]
    wire.apply()
    assert [wire.finding(n) for n in numbers] == [("FOREIGN", "FOREIGN_ORDER")] * 2
    assert wire.alerts() == ["FOREIGN_ORDER"]
    assert books(wire) == (0, START)
    assert audit(wire.conn) == []


def test_a_fill_after_the_run_has_stopped_is_held_and_its_books_stay(wire: Wire) -> None:
    order_id = wire.working()
    wire.status(order_id, "CANCELED")
    wire.apply()
    stop_run(wire.conn, wire.run.user_id, wire.run.run_id)
    late = wire.status(order_id, "CANCELED")
    number = wire.fill(order_id, "10", "100", "a")
    fee = commission(wire, "a")
    wire.apply()
    assert wire.finding(number) == ("HELD", "FILL_AFTER_STOP")
    assert [wire.finding(n)[0] for n in (late, fee)] == ["HELD", "HELD"]
    assert wire.alerts() == ["FILL_AFTER_STOP"]
    assert books(wire) == (0, START)
    assert_is(wire, order_id, "CANCELED")


def test_a_stopping_run_takes_its_fills_and_settles(wire: Wire) -> None:
    order_id = wire.working()
    assert stop_run(wire.conn, wire.run.user_id, wire.run.run_id).status == "STOPPING"
    assert settle_stopping(wire.conn, wire.run.user_id) == []
    wire.sent(order_id)
    wire.fill(order_id, "4", "100", "a")
    commission(wire, "a")
    wire.status(order_id, "CANCELED")
    wire.apply()
    assert settle_stopping(wire.conn, wire.run.user_id) == [wire.run.run_id]
    assert books(wire) == (4, START - Decimal("401.5"))
    assert_is(wire, order_id, "CANCELED", 4)


def test_an_overfill_and_a_short_are_what_the_broker_did(wire: Wire) -> None:
    order_id = wire.working()
    wire.fill(order_id, "10", "100", "a")
    number = wire.fill(order_id, "2", "100", "b")
    wire.apply()
    assert wire.finding(number) == ("NEW", "OVERFILL")
    assert_is(wire, order_id, "FILLED", 12)
    selling = wire.working(side="SELL")
    wire.fill(selling, "15", "100", "c")
    wire.apply()
    assert wire.alerts() == ["OVERFILL", "OVERFILL"]
    assert books(wire) == (-3, START + 300)
    assert_is(wire, selling, "FILLED", 15)


@pytest.mark.parametrize("quantity", ["1.123456789", "1e40"])
def test_a_poisoned_word_is_set_aside_and_those_around_it_applied(
    wire: Wire, caplog: pytest.LogCaptureFixture, quantity: str
) -> None:
    order_id = wire.working()
    good = [wire.fill(order_id, "1", "100", f"a{n}") for n in range(3)]
    poison = wire.fill(order_id, quantity, "100", "poison")
    good += [wire.fill(order_id, "1", "100", f"b{n}") for n in range(4)]
    wire.apply()
    assert wire.finding(poison) == ("REFUSED", "EVENT_REFUSED")
    assert [wire.finding(n)[0] for n in good] == ["NEW"] * 7
    assert wire.alerts() == ["EVENT_REFUSED"]
    assert caplog.messages.count("EVENT_REFUSED") == 1
    assert_is(wire, order_id, "PARTIALLY_FILLED", 7)


def test_a_word_that_another_worker_has_set_aside_is_left_alone(wire: Wire) -> None:
    number = wire.say("NOTICE", None, code="1")
    wire.apply()
    batch = inbox._Batch(wire.conn, wire.run.user_id, wire.account, inbox.Part())
    assert batch.set_aside(number, EngineError("no")) == inbox.Applied(1)
    assert (wire.finding(number), wire.alerts()) == (("NEW", None), [])


def test_a_throttled_order_is_pending_until_it_goes(wire: Wire) -> None:
    order_id, other = wire.place(), wire.place()
    command = wire.conn.execute(
        "SELECT command_id FROM broker_command WHERE order_id = %s", [order_id]
    ).fetchone()
    assert command is not None
    number = wire.say("THROTTLED", None, command_id=str(command[0]), wait_seconds="1")
    limited = wire.say("THROTTLED", None, command_id=str(uuid4()), code="RATE_LIMIT")
    wire.apply()
    assert wire.finding(number) == ("NEW", "THROTTLED")
    assert wire.finding(limited) == ("NEW", "RATE_LIMIT")
    assert len(wire.events("THROTTLED")) == 1
    assert wire.order(order_id)["status_reason"] == "THROTTLED"
    assert_is(wire, order_id, "PENDING")
    assert_is(wire, other, "NEW")
    wire.sent(order_id)
    wire.status(order_id, "ROUTED")
    wire.apply()
    assert_is(wire, order_id, "ROUTED")


def test_a_connection_that_ends_leaves_submits_pending(
    wire: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    sent, queued, answered = wire.place(), wire.place(), wire.working()
    wire.sent(sent)
    wire.say("DISCONNECTED", None, reason="reset")
    wire.apply()
    ((_, _),) = wire.events("SUBMIT_PENDING")
    assert caplog.messages.count("SUBMIT_PENDING") == 1
    assert_is(wire, sent, "NEW")
    assert_is(wire, queued, "NEW")
    assert_is(wire, answered, "ROUTED")


@pytest.mark.parametrize(
    ("kind", "code", "alerts"),
    [
        ("STOLEN", "CONNECTION_STOLEN", ["CONNECTION_STOLEN"]),
        ("ACCOUNT_MISMATCH", "ACCOUNT_MISMATCH", ["ACCOUNT_MISMATCH"]),
        ("SEND_FAILED", "SEND_FAILED", ["SEND_FAILED"]),
        ("LOGON", None, []),
    ],
)
def test_words_of_the_connection(
    wire: Wire, kind: str, code: str | None, alerts: list[str]
) -> None:
    number = wire.say(kind, None)
    wire.apply()
    assert (wire.finding(number), wire.alerts()) == (("NEW", code), alerts)


def test_a_reference_of_somebody_else_is_foreign(wire: Wire) -> None:
    number = wire.status("by hand", "ROUTED")
    wire.apply()
    assert wire.finding(number) == ("FOREIGN", "FOREIGN_ORDER")


def test_ids_that_say_nothing_new_of_a_closed_order_change_nothing(wire: Wire) -> None:
    order_id = wire.working()
    wire.say("REJECTED", order_id, code="201", message="no", broker_order_id=5)
    wire.status(order_id, "INACTIVE", perm_id=7)
    wire.apply()
    number = wire.status(order_id, "INACTIVE", broker_order_id=5, perm_id=7)
    wire.apply()
    assert wire.finding(number)[0] == "STALE"
    assert wire.order(order_id)["reject_code"] == "201"
    assert_is(wire, order_id, "REJECTED")


@pytest.mark.parametrize(("at", "now"), [(SECOND, "ROUTED"), (-SECOND, "CANCELED")])
def test_an_end_that_was_our_guess_is_proven_wrong_by_a_newer_word(
    wire: Wire, at: timedelta, now: str
) -> None:
    order_id = wire.working()
    heard_at = wire.now
    whole: dict[str, Any] = {"snapshot_id": str(uuid4()), "part": 1, "parts": 1, "open_orders": []}
    wire.say("SNAPSHOT", lag=timedelta(days=9999), **whole)
    wire.conn.execute("UPDATE orders SET status = 'CANCELED', status_reason = 'RECONCILE_MISMATCH'")
    number = wire.status(order_id, "ROUTED", at=heard_at + at)
    wire.apply()
    told = "STATUS_CONTRADICTION" if now == "ROUTED" else None
    assert wire.finding(number)[1] == told
    assert_is(wire, order_id, now)


def test_moves_of_one_batch_are_each_told(wire: Wire) -> None:
    order_id = wire.place()
    wire.sent(order_id)
    wire.status(order_id, "PENDING_SUBMIT")
    wire.status(order_id, "ROUTED")
    wire.fill(order_id, "4", "100", "a")
    wire.status(order_id, "EXPIRED")
    wire.apply()
    moves = ("ORDER_PENDING_SUBMIT", "ORDER_ROUTED", "EXECUTION", "ORDER_EXPIRED")
    assert [told for told, _ in wire.events(*moves)] == list(moves)
    assert_is(wire, order_id, "EXPIRED", 4)


def test_terms_confirmed_after_a_later_end_measure_the_fills(wire: Wire) -> None:
    order_id = wire.working(quantity="4", limit_price="100")
    wire.modify(order_id, quantity="5")
    wire.sent(order_id)
    wire.status(order_id, "CANCELED", at=NOW + 60 * SECOND)
    wire.apply()
    wire.say("MODIFIED", order_id, quantity="5", limit_price="100", at=NOW + 20 * SECOND)
    wire.apply()
    assert wire.order(order_id)["quantity"] == 5
    wire.fill(order_id, "4", "100", "a", at=NOW + 30 * SECOND)
    wire.apply()
    assert_is(wire, order_id, "CANCELED", 4)


def test_nothing_waits_in_an_empty_inbox(wire: Wire) -> None:
    assert apply_batch(wire.conn, wire.run.user_id, wire.account).events == 0
