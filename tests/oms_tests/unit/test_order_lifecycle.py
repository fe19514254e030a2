"""What a word is to an order, rule by rule and from both sides; without a database."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from engine.orders.lifecycle import (
    LAST_BROKER_ORDER_ID,
    Change,
    Charge,
    Execute,
    Finding,
    Heard,
    Identify,
    OrderState,
    Tell,
    Terms,
    Verdict,
    hear,
)
from engine.orders.model import Side

AT = datetime(2024, 1, 4, 15, 0, tzinfo=UTC)
WORKING = ("NEW", "PENDING", "PENDING_SUBMIT", "ROUTED", "PARTIALLY_FILLED")
PENDING = ("PENDING_CANCEL", "PENDING_MODIFY")


def order_in(status: str, **more: Any) -> OrderState:
    """An order for 10, of which as much is filled as its status says."""
    order = OrderState(UUID(int=1), UUID(int=2), "AAPL", Side.BUY, status, Terms(Decimal(10)))
    filled = {"FILLED": "10", "PARTIALLY_FILLED": "4"}.get(status)
    if filled is not None:
        order.status = "ROUTED"
        fill(order, "first", filled, at=-100)
    if status in ("CANCELED", "EXPIRED", "REJECTED"):
        order.end, order.closed_at = status, AT
    for name, value in more.items():
        setattr(order, name, value)
    assert order.status == status
    return order


def say(order: OrderState, kind: str, *, at: float = 1, **more: Any) -> Verdict:
    """Hear a word of ``at`` seconds after AT."""
    of_word = ("execution_id", "broker_order_id", "perm_id", "received_at")
    known = {name: more.pop(name) for name in of_word if name in more}
    event_at = AT + timedelta(seconds=at)
    known.setdefault("received_at", event_at)
    return hear(order, Heard(1, kind, more, event_at, **known))


def fill(
    order: OrderState, name: str | None, quantity: Any = "1", price: Any = "100", **more: Any
) -> Verdict:
    return say(order, "EXECUTION", execution_id=name, quantity=quantity, price=price, **more)


def status(order: OrderState, said: str, **more: Any) -> Verdict:
    return say(order, "ORDER_STATUS", status=said, **more)


def changes(verdict: Verdict) -> list[str | None]:
    return [effect.status for effect in verdict.effects if isinstance(effect, Change)]


def booked(verdict: Verdict) -> list[tuple[str, int, str | None]]:
    return [
        (effect.execution_id, int(effect.quantity), effect.reverses)
        for effect in verdict.effects
        if isinstance(effect, Execute)
    ]


def alarms(verdict: Verdict) -> list[str]:
    return [e.code for e in verdict.effects if isinstance(e, Tell) and e.alarm is not None]


NEW, REPEAT, STALE = Finding.NEW, Finding.REPEAT, Finding.STALE


@pytest.mark.parametrize(
    ("was", "said", "finding", "now"),
    [
        ("NEW", "PENDING_SUBMIT", NEW, "PENDING_SUBMIT"),
        ("PENDING", "PENDING_SUBMIT", NEW, "PENDING_SUBMIT"),
        ("PENDING_SUBMIT", "PENDING_SUBMIT", REPEAT, "PENDING_SUBMIT"),
        ("ROUTED", "PENDING_SUBMIT", STALE, "ROUTED"),
        ("FILLED", "PENDING_SUBMIT", STALE, "FILLED"),
        ("NEW", "ROUTED", NEW, "ROUTED"),
        ("PENDING", "ROUTED", NEW, "ROUTED"),
        ("PENDING_SUBMIT", "ROUTED", NEW, "ROUTED"),
        ("ROUTED", "ROUTED", REPEAT, "ROUTED"),
        ("PARTIALLY_FILLED", "ROUTED", STALE, "PARTIALLY_FILLED"),
        ("PENDING_CANCEL", "ROUTED", STALE, "PENDING_CANCEL"),
        ("PENDING_MODIFY", "ROUTED", STALE, "PENDING_MODIFY"),
        ("FILLED", "ROUTED", STALE, "FILLED"),
        ("EXPIRED", "ROUTED", STALE, "EXPIRED"),
        ("ROUTED", "FILLED", Finding.IGNORED, "ROUTED"),
        ("FILLED", "FILLED", REPEAT, "FILLED"),
        *((was, "CANCELED", NEW, "CANCELED") for was in WORKING + PENDING),
        *((was, "EXPIRED", NEW, "EXPIRED") for was in WORKING + PENDING),
        ("CANCELED", "CANCELED", REPEAT, "CANCELED"),
        ("EXPIRED", "EXPIRED", REPEAT, "EXPIRED"),
        ("CANCELED", "INACTIVE", REPEAT, "CANCELED"),
        ("CANCELED", "EXPIRED", STALE, "CANCELED"),
        ("REJECTED", "CANCELED", STALE, "REJECTED"),
        ("FILLED", "CANCELED", STALE, "FILLED"),
        ("NEW", "INACTIVE", NEW, "REJECTED"),
        ("PARTIALLY_FILLED", "INACTIVE", NEW, "CANCELED"),
        ("PENDING_CANCEL", "INACTIVE", NEW, "CANCELED"),
    ],
)
def test_a_status_moves_an_order_from_where_it_stands(
    was: str, said: str, finding: Finding, now: str
) -> None:
    order = order_in(was)
    verdict = status(order, said)
    assert (verdict.finding, order.status) == (finding, now)
    assert changes(verdict) == ([now] if finding is NEW else [])
    assert alarms(verdict) == []


@pytest.mark.parametrize(
    ("said", "at", "now"), [("CANCELED", 2, "CANCELED"), ("CANCELED", 0, "ROUTED")]
)
def test_an_end_from_before_the_broker_worked_it_is_stale(said: str, at: int, now: str) -> None:
    order = order_in("NEW")
    status(order, "ROUTED", at=1)
    verdict = status(order, said, at=at, reason="USER")
    assert order.status == now
    assert verdict.finding is (NEW if now == "CANCELED" else STALE)
    if now == "CANCELED":
        assert verdict.effects == [Change("CANCELED", "USER")]


@pytest.mark.parametrize("was", ["CANCELED", "REJECTED"])
@pytest.mark.parametrize(("at", "now"), [(1, "ROUTED"), (0, None), (-1, None)])
def test_only_a_newer_word_proves_an_end_wrong(was: str, at: int, now: str | None) -> None:
    order = order_in(was)
    verdict = status(order, "ROUTED", at=at)
    assert order.status == (now or was)
    assert verdict.code == (None if now is None else "STATUS_CONTRADICTION")
    assert alarms(verdict) == ([] if now is None else ["STATUS_CONTRADICTION"])


def test_an_end_without_a_time_is_not_proven_wrong() -> None:
    order = order_in("CANCELED", closed_at=None)
    assert status(order, "ROUTED").finding is STALE
    assert status(order, "CANCELED", at=2).finding is REPEAT
    assert order.closed_at is None


def test_what_was_inactive_and_turns_out_to_have_been_worked_is_canceled() -> None:
    order = order_in("NEW")
    assert changes(status(order, "INACTIVE", at=2)) == ["REJECTED"]
    verdict = status(order, "ROUTED", at=1)
    assert (verdict.finding, changes(verdict)) == (NEW, ["ROUTED", "CANCELED"])


def test_a_newer_end_of_the_same_kind_is_the_end() -> None:
    order = order_in("CANCELED")
    status(order, "CANCELED", at=5)
    assert status(order, "ROUTED", at=4).finding is STALE
    assert status(order, "ROUTED", at=6).finding is Finding.CONTRADICTION


def test_an_unknown_status_alarms() -> None:
    verdict = status(order_in("ROUTED"), "SLEEPING")
    assert (verdict.finding, verdict.code) == (Finding.CONTRADICTION, "STATUS_UNKNOWN")
    assert alarms(verdict) == ["STATUS_UNKNOWN"]


def test_a_kind_that_is_not_of_orders_is_ignored() -> None:
    assert say(order_in("ROUTED"), "NOTICE").finding is Finding.IGNORED


@pytest.mark.parametrize("was", ["NEW", "PENDING", "PENDING_SUBMIT", "ROUTED", *PENDING])
def test_a_refusal_rejects_what_is_not_filled(was: str) -> None:
    verdict = say(order_in(was, pending_reconcile=True), "REJECTED", code="201", message="no")
    assert verdict.effects == [Change("REJECTED", "201: no", "201", pending_reconcile=False)]


def test_a_refusal_of_the_rest_cancels_it() -> None:
    order = order_in("PARTIALLY_FILLED")
    assert say(order, "REJECTED", code="201").effects == [Change("CANCELED", "201")]


@pytest.mark.parametrize(
    ("was", "finding"),
    [("REJECTED", REPEAT), ("CANCELED", STALE), ("EXPIRED", STALE)],
)
def test_a_refusal_of_what_is_over_moves_nothing(was: str, finding: Finding) -> None:
    verdict = say(order_in(was), "REJECTED", code="201")
    assert (verdict.finding, verdict.effects) == (finding, [])


def test_a_refusal_of_what_was_filled_is_a_contradiction_once() -> None:
    order = order_in("FILLED")
    verdict = say(order, "REJECTED", code="201")
    assert (verdict.finding, alarms(verdict)) == (
        Finding.CONTRADICTION,
        ["STATUS_CONTRADICTION"],
    )
    assert say(order, "REJECTED", code="201").finding is REPEAT


@pytest.mark.parametrize(("first", "then"), [("fill", "refusal"), ("refusal", "fill")])
@pytest.mark.parametrize(("at", "now"), [(1, "CANCELED"), (3, "PARTIALLY_FILLED")])
def test_a_fill_from_after_a_refusal_proves_it_wrong(
    first: str, then: str, at: int, now: str
) -> None:
    order = order_in("NEW")
    for what in (first, then):
        if what == "fill":
            fill(order, "e", "4", at=at)
        else:
            say(order, "REJECTED", code="201", at=2)
    assert order.status == now
    assert order.pending_reconcile is (now == "PARTIALLY_FILLED")


@pytest.mark.parametrize("code", ["ALREADY_CANCELED", "INACTIVE"])
@pytest.mark.parametrize("was", [*WORKING, *PENDING])
def test_the_broker_wins_when_it_has_cancelled_already(code: str, was: str) -> None:
    order = order_in(was)
    verdict = say(order, "CANCEL_REJECTED", code=code)
    assert (order.status, verdict.code) == ("CANCELED", "CANCEL_REDUNDANT")
    assert changes(verdict) == ["CANCELED"]


def test_cancelled_already_from_before_it_was_worked_is_stale() -> None:
    order = order_in("PENDING_CANCEL", worked_at=AT + timedelta(seconds=5))
    assert say(order, "CANCEL_REJECTED", code="ALREADY_CANCELED").finding is STALE


@pytest.mark.parametrize(
    ("was", "finding"),
    [("CANCELED", REPEAT), ("FILLED", Finding.IGNORED), ("EXPIRED", Finding.IGNORED)],
)
def test_a_cancel_of_what_is_over_is_ignored(was: str, finding: Finding) -> None:
    verdict = say(order_in(was), "CANCEL_REJECTED", code="ALREADY_FILLED")
    assert (verdict.finding, verdict.code) == (finding, "CANCEL_IGNORED")
    assert changes(verdict) == []


def test_not_found_asks_the_broker() -> None:
    order = order_in("PENDING_CANCEL")
    verdict = say(order, "CANCEL_REJECTED", code="NOT_FOUND")
    assert (order.status, order.pending_reconcile) == ("PENDING_CANCEL", True)
    assert (verdict.code, verdict.effects) == ("CANCEL_NOT_FOUND", [Change(pending_reconcile=True)])


@pytest.mark.parametrize(("filled", "now"), [("0", "ROUTED"), ("4", "PARTIALLY_FILLED")])
@pytest.mark.parametrize(
    ("was", "kind", "code"),
    [
        ("PENDING_CANCEL", "CANCEL_REJECTED", "CANCEL_IGNORED"),
        ("PENDING_MODIFY", "MODIFY_REJECTED", "MODIFY_REJECTED"),
    ],
)
def test_a_refused_request_leaves_the_order_working_once(
    filled: str, now: str, was: str, kind: str, code: str
) -> None:
    order = order_in(was, filled=Decimal(filled))
    verdict = say(order, kind, code="TOO_LATE")
    assert (order.status, verdict.code) == (now, code)
    assert [e for e in verdict.effects if isinstance(e, Change)] == [
        Change(now, f"{kind}: TOO_LATE")
    ]
    order.status = was  # asked again: an old answer is none
    assert say(order, kind, code="TOO_LATE").finding is REPEAT
    assert order.status == was


@pytest.mark.parametrize("kind", ["CANCEL_REJECTED", "MODIFY_REJECTED"])
def test_an_answer_to_what_was_not_asked_is_stale(kind: str) -> None:
    assert say(order_in("ROUTED"), kind, code="TOO_LATE").finding is STALE


def modified(order: OrderState, quantity: str, **more: Any) -> Verdict:
    return say(order, "MODIFIED", quantity=quantity, **more)


@pytest.mark.parametrize(
    ("was", "quantity", "now"),
    [
        ("PENDING_MODIFY", "8", "ROUTED"),
        ("PENDING_CANCEL", "8", "PENDING_CANCEL"),
        ("NEW", "8", "NEW"),
        ("ROUTED", "8", "ROUTED"),
        ("PARTIALLY_FILLED", "8", "PARTIALLY_FILLED"),
        ("PARTIALLY_FILLED", "4", "FILLED"),
        ("FILLED", "12", "PARTIALLY_FILLED"),
    ],
)
def test_terms_that_were_asked_for_hold(was: str, quantity: str, now: str) -> None:
    terms = Terms(Decimal(quantity))
    order = order_in(was, asked=[terms])
    verdict = modified(order, quantity)
    assert (verdict.finding, order.status, order.terms) == (NEW, now, terms)
    (change,) = [effect for effect in verdict.effects if isinstance(effect, Change)]
    assert change.terms == terms
    assert change.status in (now, None)
    assert modified(order, quantity).finding is REPEAT


def test_terms_without_a_quantity_keep_it() -> None:
    terms = Terms(Decimal(10), Decimal("99"))
    order = order_in("PENDING_MODIFY", asked=[terms])
    say(order, "MODIFIED", limit_price="99")
    assert (order.status, order.terms) == ("ROUTED", terms)


def test_a_modification_to_the_terms_that_it_has_is_confirmed() -> None:
    order = order_in("PENDING_MODIFY")
    assert (modified(order, "10").finding, order.status) == (NEW, "ROUTED")
    assert modified(order, "10", at=2).finding is REPEAT


def test_older_terms_are_stale() -> None:
    asked = [Terms(Decimal(8)), Terms(Decimal(6))]
    order = order_in("ROUTED", asked=asked)
    modified(order, "6", at=2)
    assert (modified(order, "8", at=1).finding, order.terms) == (STALE, asked[1])


def test_an_old_confirmation_does_not_answer_a_newer_question() -> None:
    order = order_in("PENDING_MODIFY", asked=[Terms(Decimal(8))])
    modified(order, "8")
    order.status = "PENDING_MODIFY"
    assert (modified(order, "8").finding, order.status) == (REPEAT, "PENDING_MODIFY")


@pytest.mark.parametrize("was", ["CANCELED", "EXPIRED", "REJECTED", "FILLED"])
def test_a_closed_order_takes_only_terms_that_were_asked_for(was: str) -> None:
    quantity = "9" if was == "FILLED" else "8"
    order = order_in(was, asked=[Terms(Decimal(quantity))])
    verdict = modified(order, quantity)
    assert (verdict.finding, order.status) == (NEW, was)
    assert verdict.effects == [Change(terms=Terms(Decimal(quantity)))]
    assert modified(order_in(was), "3").finding is STALE


def test_less_than_was_filled_by_a_cancelled_order_makes_it_filled() -> None:
    order = order_in("PARTIALLY_FILLED", asked=[Terms(Decimal(4))])
    status(order, "CANCELED", at=5)
    verdict = modified(order, "4", at=1)
    assert (changes(verdict), order.status) == (["FILLED"], "FILLED")


def test_a_filled_order_that_was_larger_and_cancelled_ends_canceled() -> None:
    order = order_in("FILLED", asked=[Terms(Decimal(12))])
    status(order, "CANCELED", at=5)
    verdict = modified(order, "12", at=-200)
    assert (changes(verdict), order.status) == (["PARTIALLY_FILLED", "CANCELED"], "CANCELED")


def test_terms_that_nobody_asked_for_alarm() -> None:
    order = order_in("ROUTED")
    verdict = modified(order, "8")
    assert (verdict.code, order.pending_reconcile) == ("TERMS_CONTRADICTION", True)
    assert alarms(verdict) == ["TERMS_CONTRADICTION"]
    assert order.terms.quantity == 10


@pytest.mark.parametrize(
    ("name", "quantity", "price", "more", "code"),
    [
        (None, "1", "100", {}, "EXECUTION_INCOMPLETE"),
        ("e", None, "100", {}, "EXECUTION_INCOMPLETE"),
        ("e", "1", None, {}, "EXECUTION_INCOMPLETE"),
        ("e", "one", "100", {}, "EXECUTION_INCOMPLETE"),
        ("e", "1", "NaN", {}, "EXECUTION_INCOMPLETE"),
        ("e", "Infinity", "100", {}, "EXECUTION_INCOMPLETE"),
        ("e", "-1", "100", {}, "NEGATIVE_QTY"),
        ("e", "1", "-1", {}, "NEGATIVE_PRICE"),
        ("e", "1", "0", {}, "NEGATIVE_PRICE"),
        ("e", "1", "100", {"symbol": "IBM"}, "EXECUTION_CONTRADICTION"),
        ("e", "1", "100", {"side": "SELL"}, "EXECUTION_CONTRADICTION"),
    ],
)
def test_what_can_not_be_is_not_booked_and_alarms(
    name: str | None, quantity: Any, price: Any, more: dict[str, Any], code: str
) -> None:
    order = order_in("ROUTED")
    verdict = fill(order, name, quantity, price, **more)
    assert (verdict.code, booked(verdict), alarms(verdict)) == (code, [], [code])
    assert (int(order.filled), order.status) == (0, "ROUTED")


def test_a_fill_of_nothing_is_ignored() -> None:
    verdict = fill(order_in("ROUTED"), "e", "0")
    assert (verdict.finding, verdict.codes) == (Finding.IGNORED, ["FILL_ZERO_QTY"])


def test_below_zero_where_it_is_allowed() -> None:
    order = order_in("ROUTED", negative_price_allowed=True)
    assert fill(order, "e", "1", "-1").finding is NEW


@pytest.mark.parametrize(
    ("was", "quantity", "now"),
    [
        *((was, "10", "FILLED") for was in (*WORKING[:4], *PENDING, "CANCELED", "EXPIRED")),
        *((was, "4", "PARTIALLY_FILLED") for was in WORKING[:4]),
        *((was, "4", was) for was in (*PENDING, "CANCELED", "EXPIRED")),
        ("PARTIALLY_FILLED", "6", "FILLED"),
        ("PARTIALLY_FILLED", "5", "PARTIALLY_FILLED"),
        ("REJECTED", "10", "FILLED"),
    ],
)
def test_a_fill_is_a_fact_wherever_it_arrives(was: str, quantity: str, now: str) -> None:
    order = order_in(was)
    verdict = fill(order, "e", quantity)
    assert (verdict.finding, order.status) == (NEW, now)
    assert booked(verdict) == [("e", int(quantity), None)]
    late = was in ("CANCELED", "EXPIRED", "REJECTED")
    assert verdict.code == ("FILL_AFTER_CANCEL" if late else None)
    assert changes(verdict) == ([now] if late and now == was else [])


@pytest.mark.parametrize("recovered", [True, False])
def test_an_overfill_is_accepted_and_flagged(recovered: bool) -> None:
    order = order_in("FILLED", recovered=recovered)
    verdict = fill(order, "e", "2")
    assert (order.status, int(order.filled), verdict.finding) == ("FILLED", 12, NEW)
    assert alarms(verdict) == ([] if recovered else ["OVERFILL"])


def test_the_same_execution_again_is_a_repeat_and_another_of_its_id_a_contradiction() -> None:
    order = order_in("ROUTED")
    fill(order, "e", "4")
    assert fill(order, "e", "4.0", at=9).code == "FILL_DUPLICATE"
    for quantity, price in (("5", "100"), ("4", "101")):
        verdict = fill(order, "e", quantity, price)
        assert (verdict.finding, booked(verdict)) == (Finding.CONTRADICTION, [])
    assert order.filled == 4


@pytest.mark.parametrize("quantity", ["3", "4", "6"])
def test_a_correction_replaces_in_either_sequence(quantity: str) -> None:
    order, turned = order_in("ROUTED"), order_in("ROUTED")
    fill(order, "x.01", "4", at=1)
    verdict = fill(order, "x.02", quantity, "101", at=2)
    assert (verdict.finding, verdict.code) == (Finding.CORRECTION, "EXECUTION_CORRECTED")
    assert booked(verdict) == [("x.01-R", -4, "x.01"), ("x.02", int(quantity), None)]
    fill(turned, "x.02", quantity, "101", at=2)
    verdict = fill(turned, "x.01", "4", at=1)
    assert verdict.code == "EXECUTION_SUPERSEDED"
    assert booked(verdict) == [("x.01", 4, None), ("x.01-R", -4, "x.01")]
    for state in (order, turned):
        assert (int(state.filled), state.status) == (int(quantity), "PARTIALLY_FILLED")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x.01", "y.02"),
        ("x01", "x02"),
        ("x.1", "x.01"),
        ("x.a", "x.b"),
        ("x.01", "x.b"),
        (".1", "1"),
    ],
)
def test_other_ids_are_other_executions(one: str, other: str) -> None:
    order = order_in("ROUTED")
    fill(order, one, "2")
    assert (fill(order, other, "3").finding, int(order.filled)) == (NEW, 5)


def test_what_is_busted_stays_gone_when_an_older_revision_arrives() -> None:
    order = order_in("ROUTED")
    fill(order, "x.02", "4", at=2)
    say(order, "BUST", execution_id="x.02", at=3)
    fill(order, "x.01", "5", at=1)
    assert (int(order.filled), order.status) == (0, "ROUTED")


@pytest.mark.parametrize(
    ("was", "now", "moves"),
    [
        ("FILLED", "CANCELED", ["CANCELED"]),
        ("PARTIALLY_FILLED", "ROUTED", ["ROUTED"]),
    ],
)
def test_a_bust_takes_a_fill_back(was: str, now: str, moves: list[str]) -> None:
    order = order_in(was)
    verdict = say(order, "BUST", execution_id="first")
    assert (verdict.finding, verdict.code) == (Finding.CORRECTION, "EXECUTION_BUSTED")
    assert (order.status, int(order.filled), changes(verdict)) == (now, 0, moves)
    assert alarms(verdict) == ["EXECUTION_BUSTED"]
    assert say(order, "BUST", execution_id="first").finding is REPEAT


@pytest.mark.parametrize("end", ["CANCELED", "EXPIRED"])
def test_a_bust_after_the_end_leaves_it_ended(end: str) -> None:
    order = order_in("PARTIALLY_FILLED")
    status(order, end)
    assert changes(say(order, "BUST", execution_id="first", at=2)) == [end]


@pytest.mark.parametrize("was", PENDING)
def test_a_bust_leaves_what_is_asked_pending(was: str) -> None:
    order = order_in(was)
    fill(order, "e", "4")
    assert changes(say(order, "BUST", execution_id="e", at=2)) == []
    assert order.status == was


def test_a_bust_from_before_the_last_fill_leaves_it_working() -> None:
    order = order_in("ROUTED")
    fill(order, "a", "4", at=1)
    fill(order, "b", "6", at=3)
    assert order.status == "FILLED"
    verdict = say(order, "BUST", execution_id="a", at=2)
    assert (order.status, changes(verdict)) == ("PARTIALLY_FILLED", ["PARTIALLY_FILLED"])


def test_what_was_filled_by_later_terms_was_not_filled_before_them() -> None:
    order = order_in("ROUTED", asked=[Terms(Decimal(4))])
    fill(order, "a", "4", at=1)
    say(order, "BUST", execution_id="a", at=2)
    modified(order, "4", at=3)
    assert order.status == "ROUTED"


def test_an_execution_without_a_time_is_not_asked_when_it_was_whole() -> None:
    order = order_in("FILLED")
    order.executions["first"] = type(order.executions["first"])(Decimal(10), Decimal(100))
    say(order, "BUST", execution_id="first")
    assert order.status == "ROUTED"


def test_a_bust_or_commission_before_its_execution_is_held() -> None:
    order = order_in("ROUTED")
    assert say(order, "BUST", execution_id="e").finding is Finding.HELD
    facts: dict[str, Any] = {"execution_id": "e", "amount": "1", "currency": "USD"}
    assert say(order, "COMMISSION", **facts).finding is Finding.HELD


def test_a_commission_is_charged_once() -> None:
    order = order_in("PARTIALLY_FILLED")
    facts: dict[str, Any] = {"execution_id": "first", "amount": "1", "currency": "USD"}
    verdict = say(order, "COMMISSION", **facts)
    charge = Charge("first", Decimal(1), "USD", AT + timedelta(seconds=1))
    assert (verdict.finding, verdict.effects) == (NEW, [charge])
    assert say(order, "COMMISSION", **facts).finding is REPEAT
    for other in ({"amount": "2"}, {"currency": "EUR"}):
        verdict = say(order, "COMMISSION", **(facts | other))
        assert (verdict.code, booked(verdict)) == ("COMMISSION_CONTRADICTION", [])
    verdict = say(order, "COMMISSION", **(facts | {"amount": "much"}))
    assert (verdict.finding, verdict.code) == (Finding.REFUSED, "COMMISSION_INCOMPLETE")


def test_ids_are_noted_once_and_their_changes_told() -> None:
    order = order_in("ROUTED")
    assert status(order, "ROUTED", broker_order_id=5).effects == [
        Identify(5, 0, AT + timedelta(seconds=1))
    ]
    assert status(order, "ROUTED", broker_order_id=5).effects == []
    assert status(order, "ROUTED", broker_order_id=5, perm_id=7).codes == []
    assert status(order, "ROUTED", broker_order_id=5, perm_id=8).codes == ["PERM_ID_CHANGED"]
    assert status(order, "ROUTED", broker_order_id=LAST_BROKER_ORDER_ID - 1, perm_id=8).codes == []
    assert status(order, "ROUTED", broker_order_id=LAST_BROKER_ORDER_ID, perm_id=8).codes == [
        "ORDER_ID_WRAP"
    ]


@pytest.mark.parametrize(("seconds", "told"), [(30, []), (31, ["TIME_SKEW"]), (-3600, [])])
def test_a_word_from_the_future_tells_the_skew(seconds: int, told: list[str]) -> None:
    order = order_in("NEW")
    verdict = status(order, "ROUTED", received_at=AT + timedelta(seconds=1 - seconds))
    assert (verdict.codes, order.status) == (told, "ROUTED")
