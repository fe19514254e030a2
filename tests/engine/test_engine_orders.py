"""Orders in a run's paper book: until when they rest, what they hold back, how they end."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from market_days import (
    FRI,
    MON,
    THU,
    TUE,
    WED,
    a_bar,
    a_run,
    at_price,
    audited,
    buy,
    close_on,
    events,
    fresh,
    new_york,
    one,
    open_on,
    order_ids,
    rows,
    sell,
    statuses,
)
from scripted import SCRIPTED, Hooks, hooks

from engine.db.connect import Connection
from engine.market.model import Bar
from engine.market.store import add_instrument
from engine.runs import Run
from engine.strategies.base import CancelOrder, Intent, PlaceOrder
from engine.tick import TickResult, place_orders, run_tick

__all__ = ["audited", "hooks"]


def tick(conn: Connection, run: Run, day: str, prices: str, *intents: Intent) -> TickResult:
    """A tick at the close of a day, with a bar from its open on."""
    bars = [a_bar(day, prices)]
    return run_tick(conn, run.user_id, run.run_id, close_on(day), bars, intents=intents)


def insert(conn: Connection, run: Run, order: PlaceOrder, **more: Any) -> None:
    """Insert an order as somebody in psql does."""
    given: dict[str, Any] = {
        "user_id": run.user_id,
        "run_id": run.run_id,
        "symbol": order.symbol,
        "side": str(order.side),
        "quantity": order.quantity,
        "order_type": str(order.order_type),
        "time_in_force": str(order.time_in_force),
        "limit_price": order.limit_price,
        "stop_price": order.stop_price,
        "trail_amount": order.trail_amount,
        "trail_percent": order.trail_percent,
    }
    given |= more
    conn.execute(
        f"INSERT INTO paper_order ({', '.join(given)}) VALUES ({', '.join(['%s'] * len(given))})",
        [*given.values()],
    )


def trade(conn: Connection, run: Run) -> tuple[Any, ...]:
    """Price and day of the run's only trade."""
    price, at = one(conn, "SELECT price, logical_time FROM execution WHERE :run", run)
    return f"{price.normalize():f}", at


# Orders that rest until their price comes: (order, bars of TUE, WED, THU, the day's fill)
GTC = {"time_in_force": "GTC"}
LATER: dict[str, tuple[PlaceOrder, list[str], tuple[str, str]]] = {
    "limit buy": (
        buy("1", order_type="LIMIT", limit_price="95", **GTC),
        ["100 103 96 99", "99 99 94 98", "98 99 90 91"],
        ("95", WED),
    ),
    "limit sell": (
        sell("1", order_type="LIMIT", limit_price="105", **GTC),
        ["100 104 96 99", "99 99 94 98", "107 109 100 101"],
        ("107", THU),
    ),
    "stop buy": (
        buy("1", order_type="STOP", stop_price="110", **GTC),
        ["100 109 96 99", "99 111 94 98", "98 99 90 91"],
        ("110", WED),
    ),
    "stop sell, through a gap": (
        sell("1", order_type="STOP", stop_price="90", **GTC),
        ["100 103 96 99", "85 88 84 86", "98 99 90 91"],
        ("85", WED),
    ),
    "stop limit buy, triggered a day before it fills": (
        buy("1", order_type="STOP_LIMIT", stop_price="110", limit_price="105", **GTC),
        ["100 103 96 99", "99 112 98 111", "109 111 104 108"],
        ("105", THU),
    ),
    "trail sell by amount": (
        sell("1", order_type="TRAIL", trail_amount="10", **GTC),
        ["100 120 99 119", "119 130 118 121", "122 123 119 119"],
        ("120", THU),
    ),
    "trail buy by percent": (
        buy("1", order_type="TRAIL", trail_percent="10", **GTC),
        ["100 101 90 91", "91 92 80 81", "82 89 81 88"],
        ("88", THU),
    ),
}


@pytest.mark.parametrize("way", ["tick", "psql"])
@pytest.mark.parametrize(("order", "bars", "fill"), LATER.values(), ids=LATER.keys())
def test_a_resting_order_fills_when_its_price_comes(
    conn: Connection, order: PlaceOrder, bars: list[str], fill: tuple[str, str], way: str
) -> None:
    run = a_run(conn, account_type="MARGIN")
    if way == "tick":
        tick(conn, run, MON, "100", order)
    else:
        tick(conn, run, MON, "100")
        insert(conn, run, order)
    for day, prices in zip((TUE, WED, THU), bars, strict=True):
        tick(conn, run, day, prices)
    assert statuses(conn, run) == ["FILLED"]
    assert trade(conn, run) == (fill[0], close_on(fill[1]))


def test_a_trailing_stop_is_stored_as_it_is_drawn(conn: Connection) -> None:
    run = a_run(conn, account_type="MARGIN")
    tick(conn, run, MON, "100", sell("1", order_type="TRAIL", trail_amount="10", **GTC))
    stops = []
    bars = ["100 120 99 119", "119 125 118 121", "120 121 116 117"]
    for day, prices in zip((TUE, WED, THU), bars, strict=True):
        tick(conn, run, day, prices)
        stops.append(one(conn, "SELECT stop_price FROM orders WHERE :run", run))
    assert stops == [110, 115, 115]


def test_a_triggered_stop_limit_remembers_that_it_was(conn: Connection) -> None:
    run = a_run(conn)
    order = buy("1", order_type="STOP_LIMIT", stop_price="110", limit_price="105", **GTC)
    tick(conn, run, MON, "100", order)
    tick(conn, run, TUE, "100 112 98 111")
    triggered = one(conn, "SELECT triggered_at FROM orders WHERE :run", run)
    assert triggered == close_on(TUE)
    # Not triggered again, though the price stays below the stop.
    tick(conn, run, WED, "106 107 104 104")
    assert trade(conn, run) == ("105", close_on(WED))


def test_an_order_without_an_end_from_psql_gets_the_end_of_its_day(conn: Connection) -> None:
    run = a_run(conn)
    tick(conn, run, MON, "100")
    insert(conn, run, buy("1", order_type="LIMIT", limit_price="50"))
    assert one(conn, "SELECT status, expire_at FROM orders", None) == ("NEW", None)
    # It came with Monday's close, so its day is Tuesday.
    key = run.user_id, run.run_id
    run_tick(conn, *key, new_york(TUE, "12:00"), at_price("100"))
    assert one(conn, "SELECT status, expire_at FROM orders", None) == ("PENDING", close_on(TUE))
    run_tick(conn, *key, close_on(TUE), at_price("100"))
    assert statuses(conn, run) == ["EXPIRED"]


DAY_ENDS = [
    (new_york(MON, "12:00"), MON),
    (new_york(MON, "09:29"), MON),
    (close_on(MON), TUE),
    (new_york(MON, "20:00"), TUE),
    (close_on(FRI), "2001-05-14"),
    (new_york("2001-05-12", "12:00"), "2001-05-14"),
    (close_on("2001-05-25"), "2001-05-29"),
    (close_on("2001-09-10"), "2001-09-17"),
]


@pytest.mark.parametrize(("placed_at", "last_day"), DAY_ENDS)
def test_a_day_order_ends_with_the_session_that_it_can_still_trade_in(
    conn: Connection, placed_at: Any, last_day: str
) -> None:
    run = a_run(conn)
    order = buy("1", order_type="LIMIT", limit_price="50")
    place_orders(conn, run.user_id, run.run_id, placed_at, {}, [order])
    assert one(conn, "SELECT expire_at FROM orders WHERE :run", run) == close_on(last_day)


def test_a_day_order_expires_at_its_sessions_end_and_may_fill_until_then(
    conn: Connection,
) -> None:
    run = a_run(conn)
    key = run.user_id, run.run_id
    orders = [buy("1", order_type="LIMIT", limit_price=limit) for limit in ("95", "90")]
    run_tick(conn, *key, new_york(MON, "12:00"), at_price("100"), intents=orders)
    run_tick(conn, *key, new_york(MON, "15:59"), at_price("94"))
    assert statuses(conn, run) == ["FILLED", "PENDING"]
    run_tick(conn, *key, close_on(MON), at_price("91"))
    assert statuses(conn, run) == ["FILLED", "EXPIRED"]
    reason = one(conn, "SELECT status_reason FROM orders WHERE status = 'EXPIRED'", None)
    assert reason == "EXPIRED_DAY"
    assert events(conn, run)[-2:] == ["ORDER_EXPIRED", "TICK"]


def test_a_day_order_whose_close_was_never_ticked_does_not_fill_the_day_after(
    conn: Connection,
) -> None:
    run = a_run(conn)
    order = buy("1", order_type="LIMIT", limit_price="95")
    key = run.user_id, run.run_id
    run_tick(conn, *key, new_york(MON, "12:00"), at_price("100"), intents=[order])
    run_tick(conn, *key, close_on(TUE), [a_bar(TUE, "90")])
    assert statuses(conn, run) == ["EXPIRED"]


def test_a_good_till_date_order_ends_at_its_date(conn: Connection) -> None:
    run = a_run(conn)
    until: dict[str, Any] = {"time_in_force": "GTD", "expire_at": close_on(TUE)}
    tick(conn, run, MON, "100", buy("1", order_type="LIMIT", limit_price="90", **until))
    tick(conn, run, TUE, "100 101 91 100")
    assert statuses(conn, run) == ["EXPIRED"]


def test_the_auctions_of_a_session(conn: Connection) -> None:
    run = a_run(conn)
    key = run.user_id, run.run_id
    auctions: list[Intent] = [
        buy("1", time_in_force="OPG"),
        buy("1", time_in_force="CLS"),
        buy("1", time_in_force="CLS", order_type="LIMIT", limit_price="50"),
    ]
    run_tick(conn, *key, close_on(MON), at_price("100"), intents=auctions)
    # Monday's close is a close for those that came with it; the opening comes tomorrow.
    assert statuses(conn, run) == ["PENDING", "FILLED", "EXPIRED"]
    noon = Bar.of_price("AAPL", Decimal(101), new_york(TUE, "12:00"))
    run_tick(conn, *key, noon.end, [noon])
    assert statuses(conn, run)[0] == "PENDING"
    run_tick(conn, *key, close_on(TUE), [a_bar(TUE, "97 103 96 102")])
    # The bar that opens the session began at its open, before which the order was there.
    assert statuses(conn, run)[0] == "FILLED"
    prices = rows(conn, "SELECT price FROM execution WHERE :run ORDER BY logical_time", run)
    assert prices == [100, 97]


def test_immediate_orders_take_what_there_is_or_nothing(conn: Connection) -> None:
    run = a_run(conn, paper={"max_volume_share": "0.5"})
    bars = [a_bar(MON, "100", volume="10")]
    run_tick(
        conn,
        run.user_id,
        run.run_id,
        close_on(MON),
        bars,
        intents=[buy("6", time_in_force="FOK"), buy("7", time_in_force="IOC")],
    )
    assert rows(
        conn, "SELECT status, filled_quantity, status_reason FROM orders ORDER BY order_id"
    ) == [("CANCELED", 0, "FOK_NOT_FILLABLE"), ("CANCELED", 5, "IOC_REMAINDER")]


def test_partial_fills_go_on_over_several_bars_and_add_up(conn: Connection) -> None:
    run = a_run(conn, paper={"max_volume_share": "0.1"})
    key = run.user_id, run.run_id
    days = [(MON, "100", "30"), (TUE, "101", "25"), (WED, "102", "0"), (THU, "103", "1000")]
    for number, (day, price, volume) in enumerate(days):
        order = [buy("10", **GTC)] if number == 0 else []
        run_tick(conn, *key, close_on(day), [a_bar(day, price, volume=volume)], intents=order)
        assert statuses(conn, run) == ["PARTIALLY_FILLED" if day != THU else "FILLED"]
    trades = rows(
        conn,
        "SELECT quantity, price, right(execution_id, 2) FROM execution ORDER BY execution_id",
    )
    assert trades == [
        (Decimal("3"), 100, "-1"),
        (Decimal("2.5"), 101, "-2"),
        (Decimal("4.5"), 103, "-3"),
    ]
    average = one(conn, "SELECT avg_fill_price FROM orders", None)
    assert average == Decimal("3") * 10 + Decimal("25.25") + Decimal("46.35")
    assert fresh(conn, run).cash == 10_000 - 10 * average


def test_a_partly_filled_order_can_be_cancelled_or_expire(conn: Connection) -> None:
    run = a_run(conn, paper={"max_volume_share": "0.1"})
    key = run.user_id, run.run_id
    noon = new_york(MON, "12:00")
    bars = [Bar.of_price(s, Decimal(100), noon, Decimal(10)) for s in ("AAPL", "IBM")]
    run_tick(conn, *key, noon, bars, intents=[buy("2", **GTC), buy("2", "IBM")])
    assert statuses(conn, run) == ["PARTIALLY_FILLED", "PARTIALLY_FILLED"]
    cancel = CancelOrder(order_ids(conn, run)[0])
    run_tick(conn, *key, close_on(MON), {}, intents=[cancel])
    assert rows(conn, "SELECT status, filled_quantity FROM orders ORDER BY order_id") == [
        ("CANCELED", 1),
        ("EXPIRED", 1),
    ]
    run_tick(conn, *key, close_on(TUE), [a_bar(TUE, "100"), a_bar(TUE, "100", "IBM")])
    assert rows(conn, "SELECT quantity FROM position ORDER BY symbol") == [1, 1]


def test_a_bar_is_shown_to_an_order_once(conn: Connection) -> None:
    """A feed that stands still gives its volume once, and no second chance."""
    run = a_run(conn, paper={"max_volume_share": "0.1"})
    key = run.user_id, run.run_id
    bar = a_bar(MON, "100", volume="10")
    run_tick(conn, *key, close_on(MON), [bar], intents=[buy("3", **GTC)])
    for day in (TUE, WED):
        run_tick(conn, *key, close_on(day), [bar])
    assert one(conn, "SELECT status, filled_quantity FROM orders", None) == ("PARTIALLY_FILLED", 1)
    run_tick(conn, *key, close_on(THU), [a_bar(THU, "100", volume="10")])
    assert one(conn, "SELECT filled_quantity FROM orders", None) == 2


@pytest.mark.parametrize(("age", "status"), [("13:00", "FILLED"), ("13:01", "PENDING")])
def test_a_stale_price_fills_nothing(conn: Connection, age: str, status: str) -> None:
    run = a_run(conn, paper={"stale_after_seconds": 3600})
    key = run.user_id, run.run_id
    order = buy("1", order_type="LIMIT", limit_price="100", **GTC)
    place_orders(conn, *key, new_york(MON, "10:00"), {}, [order])
    noon = Bar.of_price("AAPL", Decimal(100), new_york(MON, "12:00"))
    run_tick(conn, *key, new_york(MON, age), [noon])
    assert statuses(conn, run) == [status]


# Cash that isn't there when an order fills

SLIP = {"slippage": {"model": "BPS", "bps": "100"}}
FEE = {"commission": {"model": "FIXED", "amount": "1"}}


@pytest.mark.parametrize(
    ("paper", "needs"), [(SLIP, "1010"), (FEE, "1001")], ids=["slippage", "commission"]
)
def test_an_order_that_the_cash_covers_but_its_costs_do_not_is_rejected(
    conn: Connection, paper: dict[str, Any], needs: str
) -> None:
    run = a_run(conn, cash="1000", paper=paper)
    tick(conn, run, MON, "100", buy("10"))
    tick(conn, run, TUE, "100", buy("1"))
    assert statuses(conn, run) == ["REJECTED", "FILLED"]
    source, code, reason = one(
        conn,
        "SELECT reject_source, reject_code, status_reason FROM orders WHERE status = 'REJECTED'",
        None,
    )
    assert (source, code) == ("RISK", "INSUFFICIENT_CASH")
    assert reason == f"INSUFFICIENT_CASH: has 1000, needs {needs}"
    assert "ORDER_REJECTED" in events(conn, run)


def test_a_resting_order_whose_gap_costs_more_than_the_cash_is_rejected(
    conn: Connection,
) -> None:
    run = a_run(conn, cash="1000")
    tick(conn, run, MON, "100", buy("9", order_type="STOP", stop_price="110", **GTC))
    tick(conn, run, TUE, "120 121 119 120")
    assert statuses(conn, run) == ["REJECTED"]
    reason = one(conn, "SELECT status_reason FROM orders", None)
    assert reason == "INSUFFICIENT_CASH: has 1000, needs 1080"
    assert fresh(conn, run).cash == 1000


def test_the_rest_of_a_partly_filled_order_that_can_not_be_paid_is_cancelled(
    conn: Connection,
) -> None:
    run = a_run(conn, cash="1000", paper={"max_volume_share": "0.1"})
    key = run.user_id, run.run_id
    bars = [a_bar(MON, "100", volume="50")]
    run_tick(conn, *key, close_on(MON), bars, intents=[buy("10", **GTC)])
    run_tick(conn, *key, close_on(TUE), [a_bar(TUE, "101", volume="1000")])
    status, filled, reason = one(
        conn, "SELECT status, filled_quantity, status_reason FROM orders", None
    )
    assert (status, filled) == ("CANCELED", 5)
    assert reason == "INSUFFICIENT_CASH: has 500, needs 505"


def test_a_margin_account_may_owe(conn: Connection) -> None:
    run = a_run(conn, cash="1000", account_type="MARGIN", paper=FEE)
    tick(conn, run, MON, "100", buy("30"))
    assert statuses(conn, run) == ["FILLED"]
    assert fresh(conn, run).cash == -2001


def test_costs_are_weighed_to_the_last_digit(conn: Connection) -> None:
    """28 digits, which Python keeps by itself, would round this cost down to the cash."""
    step = {"model": "TICKS", "ticks": 1, "tick_size": "0.00000001"}
    run = a_run(conn, cash="9999999999999998", paper={"slippage": step, "quantity_decimals": 8})
    # The gate sees a price that is a step lower, so that it is the fill that costs 1e-16 too much.
    tick(conn, run, MON, "99999999.99999998", buy("99999999.99999999"))
    assert rows(conn, "SELECT status, status_reason FROM orders") == [
        (
            "REJECTED",
            "INSUFFICIENT_CASH: has 9999999999999998, needs 9999999999999998.0000000000000001",
        )
    ]


# Buying power and short sales


def test_what_rests_holds_cash_back_until_it_ends(conn: Connection) -> None:
    run = a_run(conn, cash="100")
    rest = buy("1", order_type="LIMIT", limit_price="60", time_in_force="GTC")
    tick(conn, run, MON, "100", rest, buy("0.41"), buy("0.4"))
    assert statuses(conn, run) == ["PENDING", "REJECTED", "FILLED"]
    assert one(conn, "SELECT sum(reserved_cash) FROM orders", None) == 60
    tick(conn, run, TUE, "100", CancelOrder(order_ids(conn, run)[0]), buy("0.6"))
    assert statuses(conn, run)[-1] == "FILLED"
    assert fresh(conn, run).cash == 0


def test_a_cash_account_sells_no_more_than_it_holds_and_has_not_offered(
    conn: Connection,
) -> None:
    run = a_run(conn)
    offer = sell("2", order_type="LIMIT", limit_price="200", **GTC)
    tick(conn, run, MON, "100", buy("3"), offer, sell("1.000001"), sell("1"))
    assert statuses(conn, run) == ["FILLED", "PENDING", "REJECTED", "FILLED"]
    reason = one(conn, "SELECT status_reason FROM orders WHERE status = 'REJECTED'", None)
    assert reason == "INSUFFICIENT_POSITION: holds 1, would sell 1.000001"


def test_a_margin_account_may_be_short(conn: Connection) -> None:
    run = a_run(conn, account_type="MARGIN")
    tick(conn, run, MON, "100", sell("5"))
    tick(conn, run, TUE, "90", buy("8"))
    quantity, cost, realized = one(
        conn, "SELECT quantity, cost_basis, realized_pnl FROM position", None
    )
    assert (quantity, cost, realized) == (3, 270, 50)
    equity = rows(conn, "SELECT equity FROM mtm_ledger ORDER BY logical_time")
    assert equity == [10_000, 10_050]


def test_an_instrument_may_allow_negative_prices(conn: Connection) -> None:
    add_instrument(conn, "SPREAD", negative_price_allowed=True)
    run = a_run(conn, account_type="MARGIN", paper=SLIP)
    key = run.user_id, run.run_id
    for day, price in ((MON, "-10"), (TUE, "0"), (WED, "-3")):
        prices = at_price(price, "SPREAD")
        run_tick(conn, *key, close_on(day), prices, intents=[buy("1", "SPREAD")])
    paid = rows(conn, "SELECT price FROM execution ORDER BY logical_time")
    assert paid == [Decimal("-9.9"), 0, Decimal("-2.97")]
    assert one(conn, "SELECT market_value FROM position", None) == -9


def test_an_order_on_a_symbol_without_a_price_waits_for_one(conn: Connection) -> None:
    run = a_run(conn)
    tick(conn, run, MON, "100", buy("1", "IBM", **GTC))
    assert statuses(conn, run) == ["PENDING"]
    run_tick(conn, run.user_id, run.run_id, close_on(TUE), [a_bar(TUE, "50", "IBM")])
    assert statuses(conn, run) == ["FILLED"]


def test_the_ids_of_orders_follow_their_time_and_number(conn: Connection, hooks: Hooks) -> None:
    """Also when several calls place orders at one logical time."""
    run = a_run(conn, strategy=SCRIPTED)
    key = run.user_id, run.run_id
    hooks["on_tick"] = lambda context: [buy("3"), buy("4")]
    place_orders(conn, *key, open_on(MON), at_price("1"), [buy("1")])
    place_orders(conn, *key, open_on(MON), at_price("1"), [buy("2")])
    run_tick(conn, *key, open_on(MON), at_price("1"))
    place_orders(conn, *key, open_on(MON), at_price("1"), [buy("5")])
    run_tick(conn, *key, close_on(MON), at_price("1"))
    ordered = rows(conn, "SELECT quantity FROM orders ORDER BY order_id")
    assert ordered == [1, 2, 3, 4, 5, 3, 4]
    placed = rows(
        conn,
        """SELECT o.quantity FROM event_ledger l JOIN orders o ON o.order_id::text = l.subject
           WHERE l.event_type = 'ORDER_PLACED' ORDER BY l.seq""",
    )
    assert placed == ordered
