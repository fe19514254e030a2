"""Splits: positions, average cost and resting orders follow them, once, whoever comes first."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
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
    a_plan,
    a_run,
    at_price,
    audited,
    buy,
    close_on,
    counts,
    events,
    fresh,
    one,
    open_on,
    rows,
    sell,
    statuses,
)

from engine.db.connect import Connection
from engine.market.model import Split
from engine.market.store import import_splits
from engine.replay import replay
from engine.runs import Run
from engine.tick import log_mtm, place_orders, run_tick, try_execute_sip

__all__ = ["audited"]

GTC: dict[str, Any] = {"time_in_force": "GTC"}


def announce(conn: Connection, day: str, new: str, old: str = "1", symbol: str = "AAPL") -> None:
    import_splits(conn, [Split(symbol, date.fromisoformat(day), Decimal(new), Decimal(old))])


def ticks(conn: Connection, run: Run, *days: tuple[str, str]) -> None:
    for day, prices in days:
        run_tick(conn, run.user_id, run.run_id, close_on(day), [a_bar(day, prices)])


def position(conn: Connection) -> Any:
    return one(conn, "SELECT quantity, avg_cost, mark_price FROM position WHERE symbol = 'AAPL'")


def test_apples_split_of_2000_doubles_the_position_and_halves_its_cost(conn: Connection) -> None:
    announce(conn, "2000-06-21", "2")
    run = a_run(conn)
    key = run.user_id, run.run_id
    run_tick(conn, *key, close_on("2000-06-20"), at_price("101.25"), intents=[buy("3.5")])
    assert position(conn) == (Decimal("3.5"), Decimal("101.25"), Decimal("101.25"))
    before = one(conn, "SELECT equity FROM mtm_ledger")
    run_tick(conn, *key, close_on("2000-06-21"), at_price("55.63"))
    assert position(conn) == (7, Decimal("50.625"), Decimal("55.63"))
    after = rows(conn, "SELECT equity FROM mtm_ledger ORDER BY logical_time")[1]
    assert after - before == 7 * (Decimal("55.63") - Decimal("50.625"))
    assert one(
        conn,
        "SELECT symbol, ex_date::text, quantity_before, quantity_after FROM split_applied",
    ) == ("AAPL", "2000-06-21", Decimal("3.5"), 7)
    run_tick(conn, *key, close_on("2000-06-22"), at_price("55"))
    assert events(conn, run).count("SPLIT_APPLIED") == 1


def test_a_split_restates_what_rests_at_the_same_money(conn: Connection) -> None:
    announce(conn, TUE, "2")
    run = a_run(conn)
    resting = [
        buy("3", order_type="LIMIT", limit_price="90.5", **GTC),
        buy("5", order_type="STOP", stop_price="120", **GTC),
        sell("1", order_type="TRAIL", trail_amount="10", **GTC),
        sell("1", order_type="TRAIL", trail_percent="50", **GTC),
        sell("1", order_type="STOP_LIMIT", stop_price="60", limit_price="59", **GTC),
    ]
    key = run.user_id, run.run_id
    run_tick(conn, *key, close_on(MON), at_price("100"), intents=[buy("4"), *resting])
    reserved = one(conn, "SELECT sum(reserved_cash) FROM orders")
    ticks(conn, run, (TUE, "50"))
    found = rows(
        conn,
        """SELECT order_type, quantity, limit_price, stop_price, trail_amount, trail_percent
           FROM orders WHERE status = 'PENDING' ORDER BY order_id""",
    )
    assert found == [
        ("LIMIT", 6, Decimal("45.25"), None, None, None),
        ("STOP", 10, None, 60, None, None),
        # Drawn after Tuesday's 50, in new units.
        ("TRAIL", 2, None, 45, 5, None),
        ("TRAIL", 2, None, 25, None, 50),
        ("STOP_LIMIT", 2, Decimal("29.5"), 30, None, None),
    ]
    assert one(conn, "SELECT sum(reserved_cash) FROM orders") == reserved
    assert events(conn, run).count("ORDER_RESTATED") == 5
    ticks(conn, run, (WED, "50 50 45 46"))
    assert one(conn, "SELECT price FROM execution WHERE quantity = 6") == Decimal("45.25")


def test_the_rest_of_a_partly_filled_order_goes_on_in_new_units(conn: Connection) -> None:
    announce(conn, WED, "2")
    run = a_run(conn, paper={"max_volume_share": "0.1"})
    key = run.user_id, run.run_id
    order = buy("10", order_type="LIMIT", limit_price="100", **GTC)
    run_tick(conn, *key, close_on(MON), [a_bar(MON, "100", volume="10")], intents=[order])
    run_tick(conn, *key, close_on(TUE), [a_bar(TUE, "100", volume="20")])
    assert rows(conn, "SELECT status, filled_quantity FROM orders") == [("PARTIALLY_FILLED", 3)]
    run_tick(conn, *key, close_on(WED), [a_bar(WED, "51 52 48 49", volume="1000")])
    assert rows(
        conn,
        """SELECT status, quantity, filled_quantity, limit_price, status_reason, avg_fill_price
           FROM orders ORDER BY logical_time""",
    ) == [
        ("CANCELED", 10, 3, 100, "SPLIT", 100),
        # 7 of 10 are left, which are 14. They are a new order of this tick, so that of its bar
        # they see the close alone.
        ("FILLED", 14, 14, 50, "REST_AFTER_SPLIT", 49),
    ]
    assert one(conn, "SELECT quantity, cost_basis FROM position") == (20, 986)
    assert fresh(conn, run).cash == 9_014


def test_a_reverse_split_leaves_fractions_and_keeps_the_cost(conn: Connection) -> None:
    announce(conn, TUE, "1", "7")
    run = a_run(conn, paper={"quantity_decimals": 8})
    key = run.user_id, run.run_id
    resting = [
        buy("5", order_type="LIMIT", limit_price="9", **GTC),
        buy("0.00000006", order_type="LIMIT", limit_price="9", **GTC),
    ]
    run_tick(conn, *key, close_on(MON), at_price("10"), intents=[buy("100"), *resting])
    ticks(conn, run, (TUE, "70"))
    # 100 / 7, cut to 8 decimals; what was paid for them stays what it was.
    assert position(conn)[0] == Decimal("14.28571428")
    assert one(conn, "SELECT cost_basis FROM position") == 1000
    assert rows(
        conn, "SELECT quantity, limit_price, status, status_reason FROM orders ORDER BY order_id"
    )[1:] == [
        (Decimal("0.71428571"), 63, "PENDING", None),
        # Less than one of the new unit's decimals: nothing is left of it to order.
        (Decimal("0.00000006"), 9, "CANCELED", "SPLIT"),
    ]


def test_two_splits_between_two_ticks_are_applied_in_their_order(conn: Connection) -> None:
    announce(conn, THU, "3", "2")
    announce(conn, TUE, "2")
    announce(conn, WED, "5", symbol="IBM")
    announce(conn, MON, "9")
    announce(conn, "2001-05-14", "9")
    run = a_run(conn)
    key = run.user_id, run.run_id
    run_tick(
        conn,
        *key,
        close_on(MON),
        at_price("60") | at_price("50", "IBM"),
        intents=[buy("1"), buy("1", "IBM")],
    )
    ticks(conn, run, (FRI, "21"))
    assert rows(conn, "SELECT symbol, quantity FROM position ORDER BY symbol") == [
        ("AAPL", 3),
        ("IBM", 5),
    ]
    # IBM had no price on Friday: its mark is Monday's in the new unit.
    assert one(conn, "SELECT mark_price FROM position WHERE symbol = 'IBM'") == 10
    told = rows(
        conn, "SELECT subject FROM event_ledger WHERE event_type = 'SPLIT_APPLIED' ORDER BY seq"
    )
    assert told == [f"AAPL@{TUE}", f"IBM@{WED}", f"AAPL@{THU}"]


def test_a_short_position_splits_too(conn: Connection) -> None:
    announce(conn, TUE, "2")
    run = a_run(conn, account_type="MARGIN")
    key = run.user_id, run.run_id
    run_tick(conn, *key, close_on(MON), at_price("100"), intents=[sell("5")])
    ticks(conn, run, (TUE, "50"))
    assert position(conn) == (-10, 50, 50)


def test_what_is_bought_on_the_day_of_a_split_is_not_split(conn: Connection) -> None:
    announce(conn, TUE, "2")
    run = a_run(conn)
    key = run.user_id, run.run_id
    ticks(conn, run, (MON, "100"))
    run_tick(conn, *key, open_on(TUE), at_price("50"), intents=[buy("1")])
    ticks(conn, run, (TUE, "50"), (WED, "50"))
    assert position(conn)[0] == 1
    assert counts(conn, run)["split_applied"] == 0


BEFORE_THE_TICK: dict[str, Callable[[Connection, Run], object]] = {
    "try_execute_sip": lambda c, r: try_execute_sip(
        c, r.user_id, r.run_id, close_on(TUE), at_price("50")
    ),
    "place_orders": lambda c, r: place_orders(
        c, r.user_id, r.run_id, close_on(TUE), at_price("50"), [buy("10")]
    ),
    "place_orders without a price": lambda c, r: place_orders(
        c, r.user_id, r.run_id, open_on(TUE), {}, [buy("10", **GTC)]
    ),
}


@pytest.mark.parametrize("held", [True, False], ids=["held before", "not held before"])
@pytest.mark.parametrize("call", BEFORE_THE_TICK.values(), ids=BEFORE_THE_TICK.keys())
def test_what_a_call_before_the_tick_of_the_day_buys_is_not_split(
    conn: Connection, call: Callable[[Connection, Run], object], held: bool
) -> None:
    announce(conn, TUE, "2")
    # A strategy without wishes: the plan is executed by its own call, not by a tick.
    run = a_run(conn, strategy="engine.strategies.base:Strategy")
    a_plan(conn, run, day_of_month=8)
    key = run.user_id, run.run_id
    run_tick(conn, *key, close_on(MON), at_price("100"), intents=[buy("1")] if held else [])
    call(conn, run)
    ticks(conn, run, (TUE, "50"), (WED, "50"))
    assert statuses(conn, run) == ["FILLED"] * (1 + held)
    assert position(conn)[0] == 10 + 2 * held


def test_a_mark_on_the_day_of_a_split_is_of_the_new_units(conn: Connection) -> None:
    announce(conn, TUE, "2")
    run = a_run(conn)
    key = run.user_id, run.run_id
    run_tick(conn, *key, close_on(MON), at_price("100"), intents=[buy("1")])
    assert log_mtm(conn, *key, open_on(TUE), at_price("51")) == 10_002
    ticks(conn, run, (TUE, "50"))
    assert position(conn) == (2, 50, 50)


def test_what_was_bought_before_the_first_tick_is_split_by_it(conn: Connection) -> None:
    announce(conn, TUE, "2")
    run = a_run(conn)
    key = run.user_id, run.run_id
    place_orders(conn, *key, close_on(MON), at_price("100"), [buy("1")])
    ticks(conn, run, (TUE, "50"))
    assert position(conn) == (2, 50, 50)


@pytest.mark.parametrize("batch", [1, 100])
def test_a_replay_goes_through_a_split_in_the_middle_of_a_batch(
    conn: Connection, batch: int
) -> None:
    announce(conn, WED, "2")
    run = a_run(conn)
    place_orders(conn, run.user_id, run.run_id, open_on(MON), at_price("100"), [buy("1")])
    prices = {MON: "100", TUE: "100", WED: "50", THU: "50"}
    feed = [(close_on(day), [a_bar(day, price)]) for day, price in prices.items()]
    replay(conn, run.user_id, run.run_id, feed, batch=batch)
    assert position(conn) == (2, 50, 50)
    equity = rows(conn, "SELECT DISTINCT equity FROM mtm_ledger")
    assert equity == [10_000]


def test_a_split_of_what_is_not_held_is_not_applied(conn: Connection) -> None:
    announce(conn, TUE, "2")
    run = a_run(conn)
    key = run.user_id, run.run_id
    run_tick(conn, *key, close_on(MON), at_price("100"), intents=[buy("1"), sell("1")])
    ticks(conn, run, (TUE, "50"))
    assert counts(conn, run)["split_applied"] == 0
