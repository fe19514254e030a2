"""What comes from outside and can't be used: one clear sentence, and nothing written."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
from market_days import (
    MON,
    TUE,
    a_bar,
    a_plan,
    a_run,
    at_price,
    audited,
    buy,
    close_on,
    fresh,
    one,
    open_on,
    rows,
    snapshot,
    statuses,
)

from engine.db.connect import Connection
from engine.errors import BadInput, InvalidValue, RunNotRunning, TimeMovesForward, translated
from engine.market.model import Bar
from engine.market.view import Prices
from engine.runs import Run
from engine.tick import log_mtm, place_orders, run_tick, try_execute_sip

__all__ = ["audited"]

NAIVE = datetime(2001, 5, 8, 20, 0)  # noqa: DTZ001

Call = Callable[[Connection, UUID, UUID, datetime, Prices], object]

CALLS: dict[str, Call] = {
    "run_tick": run_tick,
    "try_execute_sip": try_execute_sip,
    "place_orders": lambda c, u, r, at, prices: place_orders(c, u, r, at, prices, [buy("1")]),
    "log_mtm": log_mtm,
}
EVERY_CALL = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def changed(bar: Bar, **values: Any) -> Bar:
    fields = {name: getattr(bar, name) for name in Bar.__slots__}
    return Bar(**(fields | values))


GOOD = a_bar(TUE, "100 110 90 105", volume="5")

PRICES: dict[str, tuple[Any, str]] = {
    "NaN": (at_price("NaN"), "NaN is no price for AAPL; give a finite number below 10^15"),
    "signalling NaN": (at_price("sNaN"), "sNaN is no price for AAPL"),
    "infinite": (at_price("Infinity"), "Infinity is no price for AAPL"),
    "huge": (at_price("1e15"), "1E+15 is no price for AAPL"),
    "very huge": (at_price("-1e999999"), "-1E+999999 is no price for AAPL"),
    "negative": (at_price("-0.01"), "-0.01 is no price for AAPL; give one above zero"),
    "zero": (at_price("0"), "0 is no price for AAPL; give one above zero"),
    "too fine": (at_price("1.123456789"), "the price 1.123456789 of AAPL has more than 8 decimals"),
    "much too fine": (at_price("1e-400000"), "has more than 8 decimals"),
    "a float": ({"AAPL": 1.5}, "the price 1.5 of AAPL is no Decimal"),
    "text": ({"AAPL": "100"}, "the price '100' of AAPL is no Decimal"),
    "missing": ({"AAPL": None}, "the price None of AAPL is no Decimal"),
    "an unknown symbol": (
        at_price("1", "NOPE"),
        "unknown symbol NOPE; import its prices with `oms data import`",
    ),
    "two unknown symbols": (at_price("1", "NOPE") | at_price("1", "NADA"), "symbol NADA, NOPE;"),
    "no symbol": (at_price("1", ""), "unknown symbol ;"),
    "two prices": ([GOOD, GOOD], "AAPL has two prices at 2001-05-08T20:00:00+00:00; give one"),
    "two spellings": (at_price("1") | at_price("2", "aapl"), "AAPL has two prices"),
    "a bar after the tick": (
        [a_bar("2001-05-09")],
        "the price of AAPL is from 2001-05-09T20:00:00+00:00, after the tick at "
        "2001-05-08T20:00:00+00:00",
    ),
    "a naive bar": ([changed(GOOD, end=NAIVE)], "the bar of AAPL at 2001-05-08T20:00:00 has no"),
    "a bar with a naive start": ([changed(GOOD, start=NAIVE)], "has no time zone"),
    "a bar that ends before it starts": (
        [changed(GOOD, start=GOOD.end + timedelta(seconds=1))],
        "the bar of AAPL at 2001-05-08T20:00:00+00:00 ends before it starts",
    ),
    "an open above the high": (
        [changed(GOOD, open=Decimal("110.01"))],
        "the bar of AAPL has prices outside of its low and high",
    ),
    "a close below the low": ([changed(GOOD, close=Decimal("89.99"))], "outside of its low and"),
    "a high below the low": (
        [changed(GOOD, high=Decimal(90), low=Decimal(110))],
        "outside of its low and high",
    ),
    "a NaN inside a bar": ([changed(GOOD, low=Decimal("NaN"))], "NaN is no price for AAPL"),
    "a negative low": ([changed(GOOD, low=Decimal(-1))], "-1 is no price for AAPL"),
    "a negative volume": ([changed(GOOD, volume=Decimal(-1))], "-1 is no volume for AAPL"),
    "a volume that is none": ([changed(GOOD, volume=Decimal("NaN"))], "NaN is no volume for AAPL"),
}


@pytest.mark.parametrize(("prices", "message"), PRICES.values(), ids=PRICES.keys())
def test_a_price_that_is_none_is_refused_and_nothing_is_written(
    conn: Connection, prices: Any, message: str
) -> None:
    run = a_run(conn)
    a_plan(conn, run, day_of_month=8)
    key = run.user_id, run.run_id
    run_tick(conn, *key, close_on(MON), at_price("100"), intents=[buy("1")])
    before = snapshot(conn)
    for name, call in CALLS.items():
        with pytest.raises(BadInput) as caught:
            call(conn, *key, close_on(TUE), prices)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
        assert snapshot(conn) == before, name


@EVERY_CALL
def test_the_same_calls_with_a_good_price_write(conn: Connection, call: Call) -> None:
    run = a_run(conn)
    a_plan(conn, run, day_of_month=8)
    key = run.user_id, run.run_id
    run_tick(conn, *key, close_on(MON), at_price("100"), intents=[buy("1")])
    before = snapshot(conn)
    call(conn, *key, close_on(TUE), [GOOD])
    assert snapshot(conn) != before


@EVERY_CALL
@pytest.mark.parametrize(
    ("at", "message"),
    [
        (
            NAIVE,
            "logical_time 2001-05-08T20:00:00 has no time zone; write for instance "
            "2001-05-08T20:00:00+00:00",
        ),
        (
            close_on("1969-05-08"),
            "The calendar XNYS is known from 1970-01-01",
        ),
        (close_on("2999-05-08"), "says nothing about"),
    ],
    ids=["naive", "before any calendar", "after any calendar"],
)
def test_a_time_that_is_none_is_refused_and_nothing_is_written(
    conn: Connection, call: Call, at: datetime, message: str
) -> None:
    run = a_run(conn)
    before = snapshot(conn)
    with pytest.raises(BadInput, match=re.escape(message)):
        call(conn, run.user_id, run.run_id, at, at_price("100"))
    assert snapshot(conn) == before


def test_a_naive_time_is_refused_also_where_the_tick_is_there_already(conn: Connection) -> None:
    run = a_run(conn)
    key = run.user_id, run.run_id
    run_tick(conn, *key, close_on(TUE), at_price("100"))
    with pytest.raises(BadInput, match="has no time zone"):
        run_tick(conn, *key, NAIVE, at_price("100"))
    with pytest.raises(BadInput, match="has no time zone"):
        log_mtm(conn, *key, NAIVE, at_price("100"))


def test_a_naive_wall_clock_is_refused(conn: Connection) -> None:
    run = a_run(conn)
    before = snapshot(conn)
    with pytest.raises(BadInput, match="now 2001-05-08T20:00:00 has no time zone"):
        run_tick(conn, run.user_id, run.run_id, close_on(TUE), {}, now=NAIVE)
    assert snapshot(conn) == before


@EVERY_CALL
def test_a_time_that_has_passed_is_refused(conn: Connection, call: Call) -> None:
    run = a_run(conn)
    a_plan(conn, run)
    key = run.user_id, run.run_id
    run_tick(conn, *key, close_on(TUE), at_price("100", "IBM"))
    before = snapshot(conn)
    with pytest.raises(TimeMovesForward) as caught:
        call(conn, *key, close_on(MON), at_price("100"))
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    assert snapshot(conn) == before


@EVERY_CALL
def test_an_unknown_run_is_refused(conn: Connection, call: Call) -> None:
    run = a_run(conn)
    for user_id, run_id in ((run.user_id, uuid4()), (uuid4(), run.run_id)):
        with pytest.raises(BadInput) as caught:
            call(conn, user_id, run_id, close_on(MON), at_price("1"))
        expected = f"user {user_id} has no run {run_id}; `oms run list` shows the runs"
        assert str(caught.value) == expected
    assert rows(conn, "SELECT 1 FROM event_ledger") == []


@EVERY_CALL
def test_a_run_that_has_not_started_is_refused(conn: Connection, call: Call) -> None:
    run = a_run(conn, start=False)
    with pytest.raises(RunNotRunning, match="CREATED"):
        call(conn, run.user_id, run.run_id, close_on(MON), at_price("1"))
    assert rows(conn, "SELECT 1 FROM event_ledger") == []
    assert fresh(conn, run).status == "CREATED"


def test_times_of_other_zones_are_the_same_moment(conn: Connection) -> None:
    run = a_run(conn)
    key = run.user_id, run.run_id
    in_tokyo = close_on(MON).astimezone(timezone(timedelta(hours=9)))
    bar = changed(a_bar(MON), end=in_tokyo, start=open_on(MON))
    first = run_tick(conn, *key, in_tokyo, [bar], intents=[buy("1")])
    again = run_tick(conn, *key, close_on(MON), {})
    assert (first.repeated, again.repeated) == (False, True)
    assert first.logical_time.isoformat() == "2001-05-07T20:00:00+00:00"
    assert one(conn, "SELECT price FROM execution") == 105


def test_symbols_are_taken_in_any_case(conn: Connection) -> None:
    run = a_run(conn)
    prices = {"aapl": Decimal(100)}
    run_tick(conn, run.user_id, run.run_id, close_on(MON), prices, intents=[buy("1")])
    assert statuses(conn, run) == ["FILLED"]


def test_a_price_may_be_written_with_more_zeros_than_decimals(conn: Connection) -> None:
    run = a_run(conn)
    prices = at_price("100.1234567800000000")
    run_tick(conn, run.user_id, run.run_id, close_on(MON), prices, intents=[buy("1")])
    assert one(conn, "SELECT price FROM execution") == Decimal("100.12345678")


@pytest.mark.parametrize(
    ("order", "constraint"),
    [
        ({"quantity": "1e15"}, "orders_quantity_in_range"),
        ({"quantity": "NaN"}, "orders_quantity_in_range"),
        ({"quantity": "0.000000001"}, "orders_quantity_in_range"),
        ({"side": "HOLD"}, "orders_side_known"),
        ({"order_type": "MAGIC"}, "orders_order_type_known"),
        ({"time_in_force": "SOON"}, "orders_time_in_force_known"),
        ({"symbol": "no/symbol?"}, "orders_symbol_format"),
        ({"order_type": "LIMIT", "limit_price": "NaN"}, "orders_prices_in_range"),
    ],
)
def test_an_order_from_psql_that_can_not_be_is_refused(
    conn: Connection, order: dict[str, str], constraint: str
) -> None:
    run = a_run(conn)
    run_tick(conn, run.user_id, run.run_id, close_on(MON), at_price("100"))
    given: dict[str, Any] = {
        "user_id": run.user_id,
        "run_id": run.run_id,
        "symbol": "AAPL",
        "side": "BUY",
        "quantity": "1",
    }
    given |= order
    before = snapshot(conn)
    places = ", ".join("%s::text::numeric" if k in NUMBERS else "%s" for k in given)
    with pytest.raises(InvalidValue) as caught, translated(), conn.transaction():
        conn.execute(
            f"INSERT INTO paper_order ({', '.join(given)}) VALUES ({places})", [*given.values()]
        )
    assert caught.value.constraint == constraint
    assert snapshot(conn) == before


NUMBERS = ("quantity", "limit_price")


def test_what_a_run_needs_is_told_apart(conn: Connection) -> None:
    """The run, not the caller, knows whether it runs: the hint says what to do."""
    run = a_run(conn, start=False)
    key = run.user_id, run.run_id
    with pytest.raises(RunNotRunning, match="Start it first"):
        run_tick(conn, *key, close_on(MON), {})
    ended: Run = a_run(conn, user="ben")
    conn.execute("UPDATE strategy_run SET status = 'STOPPED' WHERE run_id = %s", [ended.run_id])
    with pytest.raises(RunNotRunning, match="Make a new run"):
        run_tick(conn, ended.user_id, ended.run_id, close_on(MON), {})
