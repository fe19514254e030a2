"""Every rule of docs/paper-book.md, on both of its sides."""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal, getcontext
from typing import Any
from uuid import UUID

import pytest
from paper_cases import (
    CLOSE,
    CLOSING,
    DAY,
    INSIDE,
    OPEN,
    OPENING,
    SECOND,
    a_bar,
    an_order,
    dec,
    price_of,
    settings_of,
    work,
)

from engine.market.model import Bar
from engine.paper.book import Moment, match_all, priority, volume_cap

MIDDAY = OPEN + (CLOSE - OPEN) / 2


# --- What an order may see of a bar ---------------------------------------------------------


@pytest.mark.parametrize(
    ("arrives", "price", "at"),
    [
        (OPEN - SECOND, "100", OPEN),
        (OPEN, "100", OPEN),
        (OPEN + SECOND, "105", CLOSE),
        (CLOSE - SECOND, "105", CLOSE),
        (CLOSE, "105", CLOSE),
        (CLOSE + SECOND, None, None),
    ],
)
def test_no_order_trades_on_a_price_from_before_it(
    arrives: datetime, price: str | None, at: datetime | None
) -> None:
    outcome = work(an_order(at=arrives), a_bar(), now=CLOSE + SECOND)
    assert price_of(outcome) == dec(price)
    assert [fill.event_at for fill in outcome.fills] == ([at] if at else [])
    assert outcome.status == ("FILLED" if price else "PENDING")


@pytest.mark.parametrize(("limit", "price"), [("95", None), ("104.99", None), ("105", "105")])
def test_a_limit_order_that_arrives_at_the_end_sees_only_the_close(
    limit: str, price: str | None
) -> None:
    outcome = work(an_order("LIMIT", limit=limit, at=CLOSE), a_bar())
    assert price_of(outcome) == dec(price)


def test_an_order_fills_at_a_single_price_of_its_own_moment() -> None:
    outcome = work(an_order(), Bar.of_price("SPY", Decimal("99.5"), OPEN))
    assert price_of(outcome) == Decimal("99.5")
    assert outcome.fills[0].event_at == OPEN


@pytest.mark.parametrize(
    ("stale_after", "age", "fills"),
    [(60, 60, True), (60, 61, False), (0, 0, True), (0, 1, False), (None, 10**8, True)],
)
def test_a_stale_price_never_fills(stale_after: int | None, age: int, fills: bool) -> None:
    settings = settings_of(stale_after_seconds=stale_after)
    now = CLOSE + timedelta(seconds=age)
    outcome = work(an_order(), a_bar(), settings=settings, now=now)
    assert bool(outcome.fills) is fills
    assert outcome.status == ("FILLED" if fills else "PENDING")


def test_a_stale_price_moves_no_stop() -> None:
    order = an_order("TRAIL", "SELL", trail=5)
    late = CLOSE + 2 * SECOND
    outcome = work(order, a_bar(), settings=settings_of(stale_after_seconds=1), now=late)
    assert outcome.order == order


# --- Order types ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "limit", "prices", "price", "at"),
    [
        ("BUY", "101", "100 110 90 105", "100", OPEN),
        ("BUY", "100", "100 110 90 105", "100", OPEN),
        ("BUY", "99.99", "100 110 90 105", "99.99", CLOSE),
        ("BUY", "90", "100 110 90 105", "90", CLOSE),
        ("BUY", "89.99", "100 110 90 105", None, None),
        ("SELL", "99", "100 110 90 105", "100", OPEN),
        ("SELL", "100", "100 110 90 105", "100", OPEN),
        ("SELL", "100.01", "100 110 90 105", "100.01", CLOSE),
        ("SELL", "110", "100 110 90 105", "110", CLOSE),
        ("SELL", "110.01", "100 110 90 105", None, None),
    ],
)
def test_a_limit_order_fills_at_a_better_open_or_at_its_limit(
    side: str, limit: str, prices: str, price: str | None, at: datetime | None
) -> None:
    outcome = work(an_order("LIMIT", side, limit=limit), a_bar(prices))
    assert price_of(outcome) == dec(price)
    assert [fill.event_at for fill in outcome.fills] == ([at] if at else [])
    assert outcome.status == ("FILLED" if price else "PENDING")


@pytest.mark.parametrize(
    ("side", "stop", "price", "at"),
    [
        ("BUY", "99", "100", OPEN),
        ("BUY", "100", "100", OPEN),
        ("BUY", "100.01", "100.01", CLOSE),
        ("BUY", "110", "110", CLOSE),
        ("BUY", "110.01", None, None),
        ("SELL", "101", "100", OPEN),
        ("SELL", "100", "100", OPEN),
        ("SELL", "99.99", "99.99", CLOSE),
        ("SELL", "90", "90", CLOSE),
        ("SELL", "89.99", None, None),
    ],
)
def test_a_stop_fills_at_its_stop_or_at_an_open_beyond_it(
    side: str, stop: str, price: str | None, at: datetime | None
) -> None:
    outcome = work(an_order("STOP", side, stop=stop), a_bar())
    assert price_of(outcome) == dec(price)
    assert outcome.order.triggered_at == at


@pytest.mark.parametrize(
    ("side", "price"), [("BUY", Decimal("103.0206")), ("SELL", Decimal("96.9806"))]
)
def test_a_stop_slips_after_its_trigger(side: str, price: Decimal) -> None:
    stop = "103" if side == "BUY" else "97"
    settings = settings_of(slippage={"model": "BPS", "bps": "2"})
    assert price_of(work(an_order("STOP", side, stop=stop), a_bar(), settings=settings)) == price


@pytest.mark.parametrize(
    ("side", "stop", "limit", "price", "triggered_at"),
    [
        # Triggered at the open: the whole bar comes after it.
        ("BUY", "100", "100", "100", OPEN),
        ("BUY", "99", "95", "95", OPEN),
        ("BUY", "99", "89", None, OPEN),
        # Triggered inside: only the stop price is known to come after it.
        ("BUY", "105", "105", "105", CLOSE),
        ("BUY", "105", "107", "105", CLOSE),
        ("BUY", "105", "104.99", None, CLOSE),
        ("BUY", "111", "112", None, None),
        ("SELL", "100", "100", "100", OPEN),
        ("SELL", "101", "105", "105", OPEN),
        ("SELL", "101", "111", None, OPEN),
        ("SELL", "95", "95", "95", CLOSE),
        ("SELL", "95", "93", "95", CLOSE),
        ("SELL", "95", "95.01", None, CLOSE),
        ("SELL", "89", "88", None, None),
    ],
)
def test_a_stop_limit_fills_only_where_it_was_certainly_triggered_before(
    side: str, stop: str, limit: str, price: str | None, triggered_at: datetime | None
) -> None:
    outcome = work(an_order("STOP_LIMIT", side, stop=stop, limit=limit), a_bar())
    assert price_of(outcome) == dec(price)
    assert outcome.order.triggered_at == triggered_at


@pytest.mark.parametrize(
    ("order_type", "start", "price"),
    [
        # The next bar: a limit order at 104, a market order, whatever the stop says now.
        ("STOP_LIMIT", CLOSE, "102"),
        ("STOP", CLOSE, "102"),
        ("TRAIL", CLOSE, "102"),
        # A bar that began before the trigger: only its close is after it.
        ("STOP_LIMIT", CLOSE - SECOND, "101"),
        ("STOP", CLOSE - SECOND, "101"),
    ],
)
def test_a_triggered_stop_goes_on_as_a_limit_or_market_order(
    order_type: str, start: datetime, price: str
) -> None:
    order = an_order(order_type, stop=120, limit=104, trail=5, triggered_at=CLOSE)
    outcome = work(order, a_bar("102 103 99 101", start=start, end=CLOSE + DAY))
    assert price_of(outcome) == dec(price)
    assert outcome.order.stop_price == 120


def test_a_triggered_stop_limit_waits_for_its_limit() -> None:
    order = an_order("STOP_LIMIT", stop=105, limit=95, triggered_at=OPEN)
    assert work(order, a_bar("100 110 95.01 105")).status == "PENDING"
    assert price_of(work(order, a_bar("100 110 95 105"))) == 95


@pytest.mark.parametrize(
    ("side", "trail", "percent", "before", "after", "price"),
    [
        # The first bar sets the stop, and doesn't reach it.
        ("SELL", "5", None, None, "105", None),
        ("BUY", "5", None, None, "95", None),
        ("SELL", None, "5", None, "104.5", None),
        ("BUY", None, "5", None, "94.5", None),
        # A better bar draws it along.
        ("SELL", "25", None, "80", "85", None),
        ("BUY", "25", None, "120", "115", None),
        # A worse bar never loosens it.
        ("SELL", "25", None, "89", "89", None),
        ("BUY", "25", None, "111", "111", None),
        # It is the stop as it stood before the bar that the bar reaches.
        ("SELL", "5", None, "90", "90", "90"),
        ("BUY", "5", None, "110", "110", "110"),
        # Through the open, at the open.
        ("SELL", "5", None, "101", "101", "100"),
        ("BUY", "5", None, "99", "99", "100"),
    ],
)
def test_a_trailing_stop_is_tested_first_and_drawn_along_after(
    side: str, trail: str | None, percent: str | None, before: str | None, after: str, price: Any
) -> None:
    order = an_order("TRAIL", side, trail=trail, percent=percent, stop=before)
    outcome = work(order, a_bar())
    assert outcome.order.stop_price == Decimal(after)
    assert price_of(outcome) == dec(price)
    assert (outcome.order.triggered_at is not None) is (price is not None)


@pytest.mark.parametrize(("side", "stop"), [("SELL", "106.85"), ("BUY", "92.53")])
def test_a_trail_is_rounded_against_its_order(side: str, stop: str) -> None:
    # 110.16 * 0.97 = 106.8552 and 89.83 * 1.03 = 92.5249: both away from the nearest cent.
    order = an_order("TRAIL", side, percent=3)
    outcome = work(order, a_bar("100 110.16 89.83 105"), settings=settings_of(price_decimals=2))
    assert outcome.order.stop_price == Decimal(stop)


def test_a_trail_of_a_negative_price_lies_on_the_losing_side() -> None:
    order = an_order("TRAIL", "SELL", percent=10)
    assert work(order, a_bar("-40 -30 -50 -35")).order.stop_price == -33


# --- Time in force --------------------------------------------------------------------------


@pytest.mark.parametrize("tif", ["DAY", "GTD", "GTC"])
@pytest.mark.parametrize(
    ("expire_at", "limit", "status"),
    [
        (CLOSE, 95, "FILLED"),
        (CLOSE, 80, "EXPIRED"),
        (CLOSE - SECOND, 95, "EXPIRED"),
        (CLOSE + SECOND, 80, "PENDING"),
        (None, 80, "PENDING"),
    ],
)
def test_an_order_fills_until_it_expires(
    tif: str, expire_at: datetime | None, limit: int, status: str
) -> None:
    outcome = work(an_order("LIMIT", limit=limit, tif=tif, expire_at=expire_at), a_bar())
    assert outcome.status == status
    assert outcome.reason == (f"EXPIRED_{tif}" if status == "EXPIRED" else None)


def test_an_order_ends_by_the_time_of_the_tick_but_fills_by_the_time_of_the_price() -> None:
    order = an_order("LIMIT", limit=95, tif="DAY", expire_at=CLOSE)
    late = CLOSE + DAY
    assert work(order, a_bar(), now=late).status == "FILLED"
    assert work(order, a_bar("100 110 96 105"), now=late).reason == "EXPIRED_DAY"


def test_the_rest_of_a_partly_filled_order_expires() -> None:
    order = an_order(tif="DAY", expire_at=CLOSE)
    outcome = work(order, a_bar(), volume_left=4)
    assert (outcome.status, outcome.reason) == ("EXPIRED", "EXPIRED_DAY")
    assert outcome.order.filled_quantity == 4


@pytest.mark.parametrize(
    ("tif", "volume_left", "filled", "status", "reason"),
    [
        ("GTC", 4, 4, "PARTIALLY_FILLED", None),
        ("IOC", 10, 10, "FILLED", None),
        ("IOC", 4, 4, "CANCELED", "IOC_REMAINDER"),
        ("IOC", 0, 0, "CANCELED", "IOC_REMAINDER"),
        ("FOK", 10, 10, "FILLED", None),
        ("FOK", "9.999999", 0, "CANCELED", "FOK_NOT_FILLABLE"),
        ("FOK", None, 10, "FILLED", None),
    ],
)
def test_immediate_orders_take_what_there_is_or_all_of_it(
    tif: str, volume_left: str | int | None, filled: int, status: str, reason: str | None
) -> None:
    outcome = work(an_order(tif=tif), a_bar(), volume_left=volume_left)
    assert sum(fill.quantity for fill in outcome.fills) == filled
    assert (outcome.status, outcome.reason) == (status, reason)


@pytest.mark.parametrize(("tif", "reason"), [("IOC", "IOC_REMAINDER"), ("FOK", "FOK_NOT_FILLABLE")])
def test_an_immediate_order_ends_on_the_first_bar_it_meets(tif: str, reason: str) -> None:
    order = an_order("LIMIT", limit=80, tif=tif, at=CLOSE)
    met = work(order, a_bar())
    assert (met.status, met.reason) == ("CANCELED", reason)
    before = work(order, a_bar(end=CLOSE - SECOND), now=CLOSE)
    assert (before.status, before.reason) == ("PENDING", None)


@pytest.mark.parametrize(
    ("tif", "moment", "at", "reason"),
    [
        ("IOC", INSIDE, CLOSE, "IOC_REMAINDER"),
        ("FOK", INSIDE, CLOSE, "FOK_NOT_FILLABLE"),
        ("OPG", OPENING, OPEN, "OPG_MISSED"),
        ("CLS", CLOSING, CLOSE, "CLS_MISSED"),
    ],
)
def test_a_stale_chance_is_a_missed_chance(
    tif: str, moment: Moment, at: datetime, reason: str
) -> None:
    order = an_order(tif=tif, at=at)
    settings = settings_of(stale_after_seconds=1)
    outcome = work(order, a_bar(), moment=moment, settings=settings, now=CLOSE + 2 * SECOND)
    assert (outcome.fills, outcome.reason) == ((), reason)


@pytest.mark.parametrize(
    ("at", "moment", "limit", "status", "reason"),
    [
        (OPEN, OPENING, None, "FILLED", None),
        (OPEN - DAY, OPENING, 100, "FILLED", None),
        (OPEN, OPENING, "99.99", "EXPIRED", "OPG_MISSED"),
        (OPEN, INSIDE, None, "PENDING", None),
        (OPEN, CLOSING, None, "PENDING", None),
        # Too late for this session's open: it waits for the next one.
        (OPEN + SECOND, OPENING, None, "PENDING", None),
        (CLOSE, Moment(True, True), None, "PENDING", None),
    ],
)
def test_opg_fills_only_at_the_sessions_open(
    at: datetime, moment: Moment, limit: Any, status: str, reason: str | None
) -> None:
    order = an_order("LIMIT" if limit else "MARKET", tif="OPG", at=at, limit=limit)
    outcome = work(order, a_bar(), moment=moment)
    assert (outcome.status, outcome.reason) == (status, reason)
    assert price_of(outcome) == (100 if status == "FILLED" else None)


def test_opg_fills_at_its_open_though_it_expires_before_the_bar_ends() -> None:
    order = an_order(tif="OPG", expire_at=OPEN)
    assert work(order, a_bar(), moment=OPENING).status == "FILLED"
    missed = work(order, a_bar(), moment=INSIDE)
    assert (missed.status, missed.reason) == ("EXPIRED", "EXPIRED_OPG")


def test_the_rest_of_an_opg_order_is_missed() -> None:
    outcome = work(an_order(tif="OPG"), a_bar(), moment=OPENING, volume_left=4)
    assert (outcome.status, outcome.reason) == ("EXPIRED", "OPG_MISSED")
    assert outcome.order.filled_quantity == 4


@pytest.mark.parametrize(
    ("at", "moment", "limit", "status", "reason"),
    [
        (OPEN, CLOSING, None, "FILLED", None),
        (CLOSE, CLOSING, None, "FILLED", None),
        (CLOSE, CLOSING, 105, "FILLED", None),
        # The bar's low doesn't count, its close does.
        (OPEN, CLOSING, "104.99", "EXPIRED", "CLS_MISSED"),
        (OPEN, INSIDE, None, "PENDING", None),
        (OPEN, OPENING, None, "PENDING", None),
        (CLOSE + SECOND, CLOSING, None, "PENDING", None),
    ],
)
def test_cls_fills_only_at_the_sessions_close(
    at: datetime, moment: Moment, limit: Any, status: str, reason: str | None
) -> None:
    order = an_order("LIMIT" if limit else "MARKET", tif="CLS", at=at, limit=limit)
    outcome = work(order, a_bar(), moment=moment, now=CLOSE + SECOND)
    assert (outcome.status, outcome.reason) == (status, reason)
    assert price_of(outcome) == (105 if status == "FILLED" else None)
    assert all(fill.event_at == CLOSE for fill in outcome.fills)


# --- Quantities -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "volume", "decimals", "cap"),
    [
        ("0.1", "1000", 6, "100"),
        ("0.1", "99", 0, "9"),
        ("0.1", "9", 0, "0"),
        ("1", "7.1234567", 6, "7.123456"),
        ("0.1", None, 6, None),
        (None, "1000", 6, None),
    ],
)
def test_a_bars_volume_cap_is_cut_and_not_rounded(
    share: str | None, volume: str | None, decimals: int, cap: str | None
) -> None:
    settings = settings_of(max_volume_share=share, quantity_decimals=decimals)
    assert volume_cap(a_bar(volume=volume), settings) == dec(cap)


@pytest.mark.parametrize(
    ("left", "filled", "status"),
    [
        (None, "10", "FILLED"),
        ("10", "10", "FILLED"),
        ("11", "10", "FILLED"),
        ("9.9999999", "9.999999", "PARTIALLY_FILLED"),
        ("0.0000009", "0", "PENDING"),
        ("0", "0", "PENDING"),
        ("-1", "0", "PENDING"),
    ],
)
def test_a_fill_takes_no_more_than_the_volume_left(
    left: str | None, filled: str, status: str
) -> None:
    outcome = work(an_order(), a_bar(), volume_left=left)
    assert outcome.order.filled_quantity == Decimal(filled)
    assert sum(fill.quantity for fill in outcome.fills) == Decimal(filled)
    assert outcome.status == status


def test_a_rest_that_can_never_fill_is_canceled() -> None:
    whole = settings_of(quantity_decimals=0)
    outcome = work(an_order(quantity="2.5"), a_bar(), settings=whole)
    assert outcome.order.filled_quantity == 2
    assert (outcome.status, outcome.reason) == ("CANCELED", "BELOW_QUANTITY_STEP")
    outcome = work(an_order(quantity="2"), a_bar(), settings=whole)
    assert (outcome.status, outcome.reason) == ("FILLED", None)


def test_fills_go_on_from_bar_to_bar_with_their_own_ids() -> None:
    order = an_order()
    first = work(order, a_bar(), volume_left=4)
    assert first.fills[0].execution_id == f"{order.order_id}-1"
    tomorrow = a_bar(start=OPEN + DAY, end=CLOSE + DAY)
    second = work(first.order, tomorrow, fills_before=1)
    assert second.fills[0].execution_id == f"{order.order_id}-2"
    assert second.fills[0].quantity == 6
    assert second.status == "FILLED"
    assert second.order.filled_quantity == 10


def test_an_order_that_is_filled_fills_no_more() -> None:
    outcome = work(an_order(filled=10), a_bar(), fills_before=1)
    assert (outcome.status, outcome.fills) == ("FILLED", ())


def test_quantities_and_commissions_are_exact_beyond_28_digits() -> None:
    assert getcontext().prec == 28
    quantity = "123456789012345678901234567.123457"
    settings = settings_of(commission={"model": "PER_UNIT", "rate": "1"})
    outcome = work(an_order(quantity=quantity), a_bar(), settings=settings, volume_left="0.123456")
    rest = work(outcome.order, a_bar(start=CLOSE, end=CLOSE + DAY), fills_before=1)
    assert str(outcome.order.filled_quantity) == "0.123456"
    assert str(rest.fills[0].quantity) == "123456789012345678901234567.000001"
    assert str(rest.order.filled_quantity) == quantity
    slipped = work(an_order(quantity=quantity), a_bar(), settings=settings)
    assert str(slipped.fills[0].commission) == quantity + "00"


# --- A fill's costs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order_type", "side", "limit", "price"),
    [
        ("MARKET", "BUY", None, "101"),
        ("MARKET", "SELL", None, "99"),
        ("LIMIT", "BUY", "102", "101"),
        ("LIMIT", "BUY", "100.5", "100.5"),
        ("LIMIT", "SELL", "98", "99"),
        ("LIMIT", "SELL", "99.5", "99.5"),
        # A limit price that the type has no use for binds nothing.
        ("MARKET", "BUY", "100.5", "101"),
    ],
)
def test_slippage_never_goes_beyond_the_limit(
    order_type: str, side: str, limit: str | None, price: str
) -> None:
    settings = settings_of(slippage={"model": "TICKS", "ticks": 4, "tick_size": "0.25"})
    outcome = work(an_order(order_type, side, limit=limit), a_bar(), settings=settings)
    assert price_of(outcome) == Decimal(price)


def test_a_fill_says_all_that_an_execution_needs() -> None:
    settings = settings_of(commission={"model": "PERCENT", "percent": "0.1"})
    order = an_order(side="SELL")
    (fill,) = work(order, a_bar(), settings=settings).fills
    assert (fill.order_id, fill.symbol, fill.side) == (order.order_id, "SPY", order.side)
    assert [fill.quantity, fill.price, fill.commission] == [10, 100, 1]


# --- Many orders ----------------------------------------------------------------------------


def test_priority_is_arrival_and_then_the_id() -> None:
    late = an_order(number=1, at=OPEN + SECOND)
    second = an_order(number=3, side="SELL")
    first = an_order(number=2)
    assert priority([late, second, first]) == [first, second, late]


def test_orders_of_a_symbol_share_its_volume_in_priority() -> None:
    orders = [
        an_order(number=3, quantity=5),
        an_order(number=1, quantity=5, side="SELL"),
        an_order(number=2, quantity=5, tif="FOK", at=OPEN - SECOND),
        an_order(number=4, quantity=5, symbol="QQQ"),
        an_order(number=5, quantity=5, symbol="TLT"),
    ]
    bars = {
        "SPY": a_bar(volume=80),
        "QQQ": a_bar(volume=40, symbol="QQQ"),
        "TLT": a_bar(symbol="TLT"),
    }
    settings = settings_of(max_volume_share="0.1")
    outcomes = match_all(orders, bars, moment=INSIDE, settings=settings, now=CLOSE)
    assert [[o.order.order_id.int, o.order.filled_quantity] for o in outcomes] == [
        [2, 5],
        [1, 3],
        [3, 0],
        [4, 4],
        [5, 5],
    ]


def test_a_fill_or_kill_that_is_not_filled_leaves_the_volume_to_the_next() -> None:
    orders = [an_order(number=1, quantity=9, tif="FOK"), an_order(number=2, quantity=9)]
    settings = settings_of(max_volume_share="1")
    bars = {"SPY": a_bar(volume=8)}
    outcomes = match_all(orders, bars, moment=INSIDE, settings=settings, now=CLOSE)
    assert [outcome.order.filled_quantity for outcome in outcomes] == [0, 8]


@pytest.mark.parametrize(
    ("expire_at", "status", "reason"),
    [(CLOSE, "EXPIRED", "EXPIRED_DAY"), (CLOSE + SECOND, "PENDING", None)],
)
def test_an_order_without_a_bar_only_ages(
    expire_at: datetime, status: str, reason: str | None
) -> None:
    order = an_order(tif="DAY", expire_at=expire_at)
    (outcome,) = match_all([order], {}, moment=INSIDE, settings=settings_of(), now=CLOSE)
    assert (outcome.order, outcome.fills) == (order, ())
    assert (outcome.status, outcome.reason) == (status, reason)


def test_match_all_goes_on_with_the_ids_of_earlier_fills() -> None:
    order = an_order(filled=4)
    (outcome,) = match_all(
        [order],
        {"SPY": a_bar()},
        moment=INSIDE,
        settings=settings_of(),
        now=CLOSE,
        fills_before={UUID(int=1): 2},
    )
    assert outcome.fills[0].execution_id == f"{order.order_id}-3"


# --- What only a bug can ask ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "bar", "complaint"),
    [
        (an_order(symbol="QQQ"), a_bar(), "for QQQ, the bar for SPY"),
        (an_order(), a_bar(end=CLOSE + SECOND), "after the tick"),
        (an_order(filled=1), a_bar(), "fills_before is 0"),
        (an_order("LIMIT"), a_bar(), "LIMIT but has no limit_price"),
        (an_order("STOP"), a_bar(), "STOP but has no stop_price"),
        (an_order("STOP_LIMIT", stop=99), a_bar(), "STOP_LIMIT but has no limit_price"),
        (an_order("TRAIL"), a_bar(), "TRAIL but has no trail_percent"),
    ],
)
def test_a_bug_is_refused_and_not_filled(order: Any, bar: Bar, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        work(order, bar, now=CLOSE)
