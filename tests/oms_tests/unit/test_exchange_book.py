"""The dummy exchange's own rules: what trades, what waits, what is refused, what the books say."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from exchange import order
from floor import START, Floor, explained

from engine.brokers.protocol import BrokerOrder

Make = Callable[..., Floor]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(*faults: dict[str, Any], **how: Any) -> Floor:
        floor = Floor(tmp_path, *faults, **how)
        floor.log_on()
        return floor

    return made


def test_a_market_order_fills_at_the_price(make: Make) -> None:
    floor = make()

    bought = floor.submit(order(quantity="10"))

    assert floor.statuses(bought) == ["PENDING_SUBMIT", "ROUTED", "FILLED"]
    (execution,) = floor.payloads("EXECUTION")
    assert execution == {
        "execution_id": "1.01",
        "symbol": "AAPL",
        "side": "BUY",
        "quantity": "10",
        "price": "100",
    }
    assert floor.payloads("COMMISSION") == [
        {"execution_id": "1.01", "amount": "0.050", "currency": "USD"}
    ]
    assert floor.books()["positions"] == {"AAPL": "10"}
    explained(floor.books())


def test_the_first_word_has_no_perm_id_and_the_next_has(make: Make) -> None:
    floor = make()
    floor.submit(order())
    first, second, *_ = floor.heard("ORDER_STATUS")
    assert first["perm_id"] == 0
    assert second["perm_id"] == 900_000_001
    assert first["broker_order_id"] == second["broker_order_id"] == 1


@pytest.mark.parametrize(
    ("side", "limit", "fills_at", "not_at"),
    [("BUY", "95", "95", "95.01"), ("SELL", "105", "105", "104.99")],
)
def test_a_limit_waits_for_its_price(
    make: Make, side: str, limit: str, fills_at: str, not_at: str
) -> None:
    floor = make()
    resting = floor.submit(order(side, limit_price=limit))
    floor.do("set_price", symbol="AAPL", price=not_at)
    assert floor.order(resting)["status"] == "ROUTED"
    floor.do("set_price", symbol="AAPL", price=fills_at)
    assert floor.order(resting)["status"] == "FILLED"


def test_a_limit_gets_the_better_price(make: Make) -> None:
    floor = make()
    floor.submit(order(limit_price="120"))
    assert floor.payloads("EXECUTION")[0]["price"] == "100"


@pytest.mark.parametrize(
    ("side", "stop", "not_at", "at"), [("BUY", "105", "104", "106"), ("SELL", "95", "96", "94")]
)
def test_a_stop_becomes_a_market_order(
    make: Make, side: str, stop: str, not_at: str, at: str
) -> None:
    floor = make()
    waiting = floor.submit(order(side, order_type="STOP", stop_price=stop))
    floor.do("set_price", symbol="AAPL", price=not_at)
    assert floor.order(waiting)["status"] == "ROUTED"
    floor.do("set_price", symbol="AAPL", price=at)
    assert floor.payloads("EXECUTION")[0]["price"] == at


def test_a_stop_limit_waits_for_both(make: Make) -> None:
    floor = make()
    waiting = floor.submit(order(order_type="STOP_LIMIT", stop_price="105", limit_price="104"))
    floor.do("set_price", symbol="AAPL", price="103")
    floor.do("set_price", symbol="AAPL", price="106")
    assert floor.order(waiting)["status"] == "ROUTED"
    floor.do("set_price", symbol="AAPL", price="104")
    assert floor.order(waiting)["status"] == "FILLED"


@pytest.mark.parametrize(
    "trail", [{"trail_amount": "5"}, {"trail_percent": "5"}], ids=["amount", "percent"]
)
def test_a_trail_follows_the_price_and_never_goes_back(make: Make, trail: dict[str, str]) -> None:
    floor = make()
    waiting = floor.submit(order("SELL", order_type="TRAIL", **trail))
    for price in ("100", "120", "116"):
        floor.do("set_price", symbol="AAPL", price=price)
    assert floor.order(waiting)["status"] == "ROUTED"
    floor.do("set_price", symbol="AAPL", price="114")
    assert floor.payloads("EXECUTION")[0]["price"] == "114"


def test_liquidity_makes_partial_fills_and_comes_back_with_the_next_price(make: Make) -> None:
    floor = make(symbols=[{"name": "AAPL", "price": "100", "liquidity": "4"}])
    bought = floor.submit(order(quantity="10"))
    assert [each["quantity"] for each in floor.payloads("EXECUTION")] == ["4"]
    assert floor.order(bought)["filled"] == "4"
    floor.do("set_price", symbol="AAPL", price="101")
    floor.do("set_price", symbol="AAPL", price="102")
    assert [each["quantity"] for each in floor.payloads("EXECUTION")] == ["4", "4", "2"]
    assert [each["remaining"] for each in floor.payloads("ORDER_STATUS")] == [
        "10", "10", "6", "2", "0",
    ]  # fmt: skip
    explained(floor.books())


def test_each_side_has_its_own_liquidity(make: Make) -> None:
    floor = make(symbols=[{"name": "AAPL", "price": "100", "liquidity": "4"}])
    floor.submit(order("BUY", quantity="4"))
    sold = floor.submit(order("SELL", quantity="4"))
    assert floor.order(sold)["status"] == "FILLED"


def test_better_prices_and_earlier_orders_come_first(make: Make) -> None:
    floor = make(symbols=[{"name": "AAPL", "price": "100", "liquidity": "4"}])
    worse = floor.submit(order(quantity="4", limit_price="90"))
    first = floor.submit(order(quantity="4", limit_price="95"))
    second = floor.submit(order(quantity="4", limit_price="95"))
    for filled in (first, second, worse):
        floor.do("set_price", symbol="AAPL", price="90")
        assert floor.order(filled)["status"] == "FILLED"
        assert floor.payloads("ORDER_STATUS")[-1]["status"] == "FILLED"
    assert [each["order_ref"] for each in floor.books()["executions"]] == [
        each.order_ref for each in (first, second, worse)
    ]


@pytest.mark.parametrize(
    ("time_in_force", "filled", "status"),
    [("IOC", "4", "CANCELED"), ("FOK", "0", "CANCELED"), ("GTC", "4", "ROUTED")],
)
def test_what_may_not_wait_is_cancelled(
    make: Make, time_in_force: str, filled: str, status: str
) -> None:
    floor = make(symbols=[{"name": "AAPL", "price": "100", "liquidity": "4"}])
    given = floor.submit(order(quantity="10", time_in_force=time_in_force))
    assert floor.order(given)["filled"] == filled
    assert floor.order(given)["status"] == status


def test_a_fok_that_can_fill_does(make: Make) -> None:
    floor = make(symbols=[{"name": "AAPL", "price": "100", "liquidity": "4"}])
    given = floor.submit(order(quantity="4", time_in_force="FOK"))
    assert floor.order(given)["status"] == "FILLED"


def test_a_gtd_expires_at_its_moment(make: Make) -> None:
    floor = make()
    end = START + timedelta(seconds=60)
    given = floor.submit(order(limit_price="90", time_in_force="GTD", expire_at=end))
    floor.wait(59)
    assert floor.order(given)["status"] == "ROUTED"
    floor.wait(1)
    assert floor.order(given)["status"] == "EXPIRED"


def test_day_orders_expire_at_the_close_and_gtc_orders_stay(make: Make) -> None:
    floor = make()
    day = floor.submit(order(limit_price="90"))
    gtc = floor.submit(order(limit_price="90", time_in_force="GTC"))
    floor.do("set_session", is_open=False)
    assert floor.order(day)["status"] == "EXPIRED"
    floor.do("set_price", symbol="AAPL", price="80")
    assert floor.order(gtc)["status"] == "ROUTED"
    floor.do("set_session", is_open=True)
    assert floor.order(gtc)["status"] == "FILLED"


@pytest.mark.parametrize(("rule", "status"), [("REJECT", "REJECTED"), ("QUEUE", "PENDING_SUBMIT")])
def test_outside_the_session(make: Make, rule: str, status: str) -> None:
    floor = make(session="CLOSED", out_of_session=rule)
    given = floor.submit(order())
    assert floor.order(given)["status"] == status
    floor.do("set_session", is_open=True)
    wanted = "FILLED" if rule == "QUEUE" else "REJECTED"
    assert floor.order(given)["status"] == wanted


def test_the_session_keeps_its_hours(make: Make) -> None:
    floor = make(session="14:30-21:00")
    assert floor.do("market")["is_open"]
    floor.wait(6 * 3600 - 1)
    assert floor.do("market")["is_open"]
    floor.wait(1)
    assert not floor.do("market")["is_open"]
    floor.wait(17.5 * 3600)
    assert floor.do("market")["is_open"]


def test_hours_over_midnight(make: Make) -> None:
    floor = make(session="22:00-16:00")
    assert floor.do("market")["is_open"]
    floor.wait(3600)
    assert not floor.do("market")["is_open"]
    floor.wait(6 * 3600)
    assert floor.do("market")["is_open"]


def test_a_frozen_market_rejects_and_trades_nothing(make: Make) -> None:
    floor = make()
    resting = floor.submit(order(limit_price="90"))
    floor.do("freeze", frozen=True)
    rejected = floor.submit(order())
    floor.do("set_price", symbol="AAPL", price="80")
    assert floor.payloads("REJECTED")[-1]["code"] == "FROZEN"
    assert floor.order(rejected)["status"] == "REJECTED"
    assert floor.order(resting)["status"] == "ROUTED"
    floor.do("freeze", frozen=False)
    assert floor.order(resting)["status"] == "FILLED"


@pytest.mark.parametrize(
    ("given", "code"),
    [
        (order(symbol="NONE"), "UNKNOWN_SYMBOL"),
        (order(side="HOLD"), "BAD_SIDE"),
        (order(quantity="0"), "BAD_QUANTITY"),
        (order(order_type="ICEBERG"), "UNSUPPORTED"),
        (order(time_in_force="OPG"), "UNSUPPORTED"),
        (order(order_type="LIMIT"), "BAD_PRICE"),
        (order(limit_price="-1"), "BAD_PRICE"),
        (order(order_type="TRAIL"), "BAD_PRICE"),
        (order(time_in_force="GTD"), "BAD_EXPIRY"),
        (order(quantity="50000"), "MARGIN"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_makes_no_sense_is_rejected(make: Make, given: BrokerOrder, code: str) -> None:
    floor = make()
    floor.submit(given)
    assert [each["code"] for each in floor.payloads("REJECTED")] == [code]
    assert floor.books()["executions"] == []


def test_margin_never_stops_what_shrinks_a_position(make: Make) -> None:
    floor = make()
    floor.submit(order(quantity="30000"))
    floor.do("set_price", symbol="AAPL", price="20")
    more = floor.submit(order(quantity="1"))
    less = floor.submit(order("SELL", quantity="30000"))
    assert floor.order(more)["status"] == "REJECTED"
    assert floor.order(less)["status"] == "FILLED"


def test_negative_prices_only_where_they_are_allowed(make: Make) -> None:
    floor = make(symbols=[{"name": "OIL", "price": "1", "negative_prices": True}])
    given = floor.submit(order(symbol="OIL", limit_price="-5"))
    floor.do("set_price", symbol="OIL", price="-7.5")
    assert floor.order(given)["status"] == "FILLED"
    assert floor.payloads("EXECUTION")[0]["price"] == "-7.5"
    explained(floor.books())


def test_a_change_keeps_fills_and_ids(make: Make) -> None:
    floor = make(symbols=[{"name": "AAPL", "price": "100", "liquidity": "4"}])
    given = floor.submit(order(quantity="10", limit_price="100"))
    before = floor.order(given)
    changed = order(quantity="8", limit_price="90", order_ref=given.order_ref)
    floor.ask("MODIFY", changed)
    after = floor.order(given)
    assert floor.payloads("MODIFIED") == [
        {"quantity": "8", "limit_price": "90", "stop_price": None}
    ]
    assert (after["filled"], after["quantity"], after["limit_price"]) == ("4", "8", "90")
    assert after["perm_id"] == before["perm_id"]
    floor.do("set_price", symbol="AAPL", price="95")
    assert floor.order(given)["filled"] == "4"
    floor.do("set_price", symbol="AAPL", price="90")
    assert floor.order(given)["status"] == "FILLED"


def test_a_change_to_what_is_filled_ends_the_order_and_below_is_refused(make: Make) -> None:
    floor = make(symbols=[{"name": "AAPL", "price": "100", "liquidity": "4"}])
    given = floor.submit(order(quantity="10", limit_price="100"))
    floor.ask("MODIFY", order(quantity="3", limit_price="100", order_ref=given.order_ref))
    assert floor.payloads("MODIFY_REJECTED")[0]["code"] == "QUANTITY_BELOW_FILLED"
    floor.ask("MODIFY", order(quantity="4", limit_price="100", order_ref=given.order_ref))
    assert floor.order(given)["status"] == "FILLED"
    floor.ask("MODIFY", order(quantity="5", limit_price="100", order_ref=given.order_ref))
    assert floor.payloads("MODIFY_REJECTED")[1]["code"] == "ALREADY_FILLED"


def test_a_cancel_and_what_it_may_hear(make: Make) -> None:
    floor = make()
    resting = floor.submit(order(limit_price="90"))
    filled = floor.submit(order())
    floor.cancel(resting)
    floor.cancel(resting)
    floor.cancel(filled)
    floor.cancel(order())
    assert floor.statuses(resting)[-1] == "CANCELED"
    assert [each["code"] for each in floor.payloads("CANCEL_REJECTED")] == [
        "ALREADY_CANCELED",
        "ALREADY_FILLED",
        "UNKNOWN_ORDER",
    ]


def test_latency_lets_a_fill_overtake_a_cancel(make: Make) -> None:
    floor = make(latency_seconds="0.5")
    given = floor.submit(order(limit_price="90"))
    assert floor.statuses(given) == ["PENDING_SUBMIT"]
    floor.wait(1)
    floor.cancel(given)
    floor.do("set_price", symbol="AAPL", price="80")
    floor.wait(1)
    assert floor.statuses(given) == ["PENDING_SUBMIT", "ROUTED", "FILLED"]
    assert floor.payloads("CANCEL_REJECTED")[0]["code"] == "ALREADY_FILLED"


def test_what_if_places_nothing(make: Make) -> None:
    floor = make()
    floor.ask("WHAT_IF", order(quantity="100"), request=1)
    floor.ask("WHAT_IF", order(quantity="100000"), request=2)
    fits, too_much = (answer["payload"] for answer in floor.answers())
    assert fits == {
        "accepted": True,
        "message": "",
        "initial_margin": "2500.00",
        "excess": "997500.00",
    }
    assert not too_much["accepted"]
    assert too_much["message"].startswith("MARGIN")
    assert floor.books()["orders"] == []


def test_corrections_and_busts_leave_books_that_are_explained(make: Make) -> None:
    floor = make()
    first = floor.submit(order(quantity="10"))
    floor.submit(order("SELL", quantity="25"))
    corrected = floor.do("correct", execution_id="1.01", quantity="8", price="101.5")
    again = floor.do("correct", execution_id="1.02", quantity=None, price="99")
    floor.do("bust", execution_id="2.01")
    assert (corrected, again) == ("1.02", "1.03")
    assert floor.order(first)["filled"] == "8"
    assert floor.books()["positions"] == {"AAPL": "8"}
    assert [each["execution_id"] for each in floor.payloads("BUST")] == ["2.01"]
    explained(floor.books())
    assert "busted" in floor.desk.answer({"op": "bust", "execution_id": "2.01"})["error"]


def test_a_bust_of_an_open_order_gives_the_quantity_back(make: Make) -> None:
    floor = make(symbols=[{"name": "AAPL", "price": "100", "liquidity": "4"}])
    given = floor.submit(order(quantity="10"))
    floor.do("bust", execution_id="1.01")
    assert floor.order(given)["filled"] == "0"
    for price in ("101", "102", "103"):
        floor.do("set_price", symbol="AAPL", price=price)
    assert floor.order(given)["filled"] == "10"
    explained(floor.books())


def test_money_comes_and_goes_in_the_symbols_currency(make: Make) -> None:
    floor = make(
        symbols=[{"name": "SAP", "price": "150.25", "currency": "EUR"}],
        cash={"EUR": "10000", "USD": "5"},
    )
    floor.submit(order(symbol="SAP", quantity="3"))
    assert floor.books()["cash"] == {"EUR": "9549.235", "USD": "5"}


def test_average_cost_over_buys_sells_and_a_change_of_side(make: Make) -> None:
    floor = make()
    floor.submit(order(quantity="10"))
    floor.do("set_price", symbol="AAPL", price="110")
    floor.submit(order(quantity="10"))
    floor.submit(order("SELL", quantity="5"))
    floor.ask("SNAPSHOT", request=1, since=None)
    floor.submit(order("SELL", quantity="20"))
    floor.ask("SNAPSHOT", request=2, since=None)
    before, after = (answer["positions"][0] for answer in floor.answers())
    assert (before["quantity"], Decimal(before["avg_cost"])) == ("15", Decimal(105))
    assert (after["quantity"], Decimal(after["avg_cost"])) == ("-5", Decimal(110))


def test_a_snapshot_is_one_moment_and_says_whose_orders_they_are(make: Make) -> None:
    floor = make(commission_per_unit="0")
    mine = floor.submit(order(limit_price="90"))
    gone = floor.submit(order(limit_price="90"))
    floor.cancel(gone)
    floor.do(
        "place",
        order={
            "symbol": "AAPL", "side": "BUY", "quantity": "1",
            "order_type": "MARKET", "time_in_force": "DAY",
        },
        account="DU1",
        client_id=None,
    )  # fmt: skip
    floor.log_on(2, client_id=5)
    other = floor.submit(order(limit_price="80"), number=2)

    floor.ask("SNAPSHOT", request=1, since=None)

    (said,) = floor.answers()
    opened = {row["order"]["order_ref"]: row["ours"] for row in said["open_orders"]}
    assert opened == {mine.order_ref: True, other.order_ref: False}
    closed = {row["order"]["order_ref"]: row["status"] for row in said["closed_orders"]}
    assert closed == {gone.order_ref: "CANCELED", "": "FILLED"}
    assert [row["order_ref"] for row in said["executions"]] == [None]
    assert said["cash"] == {"USD": "999900"}
    assert said["taken_at"] == floor.clock_at.isoformat()


def test_a_snapshot_since_a_moment_leaves_out_what_was_before(make: Make) -> None:
    floor = make()
    floor.submit(order())
    floor.wait(10)
    floor.submit(order())
    since = (START + timedelta(seconds=5)).isoformat()
    floor.ask("SNAPSHOT", request=1, since=since)
    (said,) = floor.answers()
    assert {row["payload"]["execution_id"] for row in said["executions"]} == {"2.01"}
    assert len(said["closed_orders"]) == 1
    assert said["positions"][0]["quantity"] == "20"


def test_a_large_snapshot_comes_in_parts(make: Make) -> None:
    floor = make()
    for _ in range(2_001):
        floor.submit(order(quantity="1", limit_price="10"))
    floor.ask("SNAPSHOT", request=1, since=None)
    said = floor.answers()
    assert [(part["part"], part["parts"]) for part in said] == [(1, 3), (2, 3), (3, 3)]
    assert sum(len(part["open_orders"]) for part in said) == 2_001


def test_who_hears_of_what(make: Make) -> None:
    floor = make()
    floor.log_on(2, client_id=5)
    floor.log_on(3, client_id=6)
    floor.log_on(4, client_id=5, account="DU2")
    given = floor.submit(order(), number=2)
    assert floor.statuses(given, 1) == floor.statuses(given, 2) != []
    assert floor.statuses(given, 3) == floor.statuses(given, 4) == []


def test_a_second_connection_steals_the_session(make: Make) -> None:
    floor = make()
    floor.log_on(2)
    assert floor.kinds(1)[-1] == "STOLEN"
    assert floor.ended == {1}
    given = floor.submit(order(), number=2)
    assert floor.statuses(given, 2)
    assert not floor.statuses(given, 1)


def test_another_client_id_or_account_steals_nothing(make: Make) -> None:
    floor = make()
    floor.log_on(2, client_id=1)
    floor.log_on(3, account="DU2")
    assert floor.ended == set()


def test_who_is_not_logged_on_is_not_heard(make: Make) -> None:
    floor = make()
    floor.submit(order(), number=9)
    assert 9 in floor.ended
    assert floor.books()["orders"] == []


def test_an_order_sent_twice_is_two_orders(make: Make) -> None:
    floor = make()
    given = order()
    floor.submit(given)
    floor.submit(given)
    assert [each["order_ref"] for each in floor.books()["orders"]] == [given.order_ref] * 2


def test_who_sends_too_fast_is_thrown_out_and_who_keeps_the_limit_is_not(make: Make) -> None:
    floor = make(messages_per_second_max=5)
    for _ in range(3):
        for _ in range(5):
            floor.submit(order())
        floor.wait(1)
    assert floor.ended == set()
    for _ in range(6):
        floor.submit(order())
    assert floor.ended == {1}
    assert floor.payloads("NOTICE")[-1]["code"] == "RATE_LIMIT"


def test_bad_requests_are_told(make: Make) -> None:
    floor = make()
    floor.ask("DANCE")
    floor.exchange.handle(1, {"op": "SUBMIT", "order": {"symbol": "AAPL"}})
    floor.exchange.handle(1, {"op": "SUBMIT", "order": {"quantity": "many", "symbol": "AAPL"}})
    floor.take()
    assert [each["code"] for each in floor.payloads("NOTICE")] == ["BAD_REQUEST"] * 3


def test_what_the_desk_does_not_know_is_said(make: Make) -> None:
    floor = make()
    for request in (
        {"op": "_order", "named": 1},
        {"op": "answer", "request": {}},
        {"op": "fill", "order": 7, "quantity": None, "price": None},
        {"op": "set_price", "symbol": "AAPL", "price": "high"},
        {"op": "set_price"},
    ):
        assert floor.desk.answer(request)["error"].endswith(".")


def test_everything_is_there_again_after_a_restart(make: Make) -> None:
    floor = make(symbols=[{"name": "AAPL", "price": "100", "liquidity": "4", "walk_bps": "10"}])
    resting = floor.submit(order(quantity="10", limit_price="100"))
    floor.submit(order("SELL", quantity="3", limit_price="200", time_in_force="GTC"))
    floor.submit(order(order_type="TRAIL", side="SELL", trail_amount="50"))
    floor.wait(3)
    floor.do("correct", execution_id="1.01", quantity=None, price="99.1234")
    floor.do("set_skew", seconds=12.5)
    before, market = floor.books(), floor.do("market")
    floor.close()

    floor.open()

    assert floor.books() == before
    assert floor.do("market")["prices"] == market["prices"]
    assert floor.exchange.skew == timedelta(seconds=12.5)
    floor.log_on()
    floor.do("set_liquidity", symbol="AAPL", liquidity=None)
    floor.do("set_price", symbol="AAPL", price="50")
    assert floor.order(resting)["status"] == "FILLED"
    fresh = floor.submit(order())
    assert floor.order(fresh)["number"] == 4
    assert floor.order(fresh)["broker_order_id"] == 4
    explained(floor.books())


def test_a_walk_goes_on_where_it_was(make: Make, tmp_path: Path) -> None:
    how: dict[str, Any] = {
        "symbols": [{"name": "AAPL", "price": "100", "walk_bps": "100"}],
        "seed": 4,
    }
    at_once = Floor(tmp_path / "a", **how)
    at_once.do("step", times=20)
    broken = Floor(tmp_path / "b", **how)
    broken.do("step", times=7)
    broken.close()
    broken.open()
    broken.do("step", times=13)
    assert broken.do("market")["prices"] == at_once.do("market")["prices"]


def test_a_renamed_symbol_stays_renamed(make: Make) -> None:
    floor = make()
    floor.submit(order(quantity="10"))
    floor.do("rename", old="AAPL", new="APL")
    floor.close()
    floor.open()
    floor.log_on()
    assert set(floor.do("market")["prices"]) == {"APL", "MSFT"}
    floor.submit(order("SELL", quantity="4", symbol="APL"))
    floor.do("correct", execution_id="1.01", quantity="12", price=None)
    assert floor.books()["positions"] == {"APL": "8"}
