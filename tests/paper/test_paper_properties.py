"""What must hold for every order, bar and setting."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal, localcontext
from typing import Any
from uuid import UUID

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from paper_cases import CLOSE, DAY, OPEN, work

from engine.market.model import Bar
from engine.orders.model import Fill, Order, OrderType, Side, TimeInForce
from engine.paper.book import Moment, Outcome, match_all
from engine.paper.costs import EXACT, PaperSettings

HOUR = timedelta(hours=1)


def decimals(low: str, high: str, places: int = 2) -> st.SearchStrategy[Decimal]:
    return st.decimals(low, high, places=places, allow_nan=False, allow_infinity=False)


PRICES = decimals("80", "120")
QUANTITIES = decimals("0.000001", "2000", places=6)
MOMENTS = st.builds(Moment, st.booleans(), st.booleans())
# Before, at and inside the first bar, at its end and after it.
ARRIVALS = st.sampled_from([OPEN - HOUR, OPEN, OPEN + HOUR, CLOSE, CLOSE + HOUR])
SLIPPAGES = st.one_of(
    st.just({"model": "NONE"}),
    decimals("0", "500").map(lambda bps: {"model": "BPS", "bps": bps}),
    decimals("0", "500").map(lambda bps: {"model": "UNIFORM_BPS", "max_bps": bps}),
    st.integers(0, 20).map(lambda n: {"model": "TICKS", "ticks": n, "tick_size": "0.01"}),
)
COMMISSIONS = st.one_of(
    st.just({"model": "NONE"}),
    decimals("0", "5").map(lambda amount: {"model": "FIXED", "amount": amount}),
    decimals("0", "1").map(lambda rate: {"model": "PER_UNIT", "rate": rate, "minimum": 1}),
    decimals("0", "1").map(lambda percent: {"model": "PERCENT", "percent": percent}),
)
SETTINGS = st.builds(
    lambda **values: PaperSettings.model_validate(values),
    slippage=SLIPPAGES,
    commission=COMMISSIONS,
    max_volume_share=st.none() | decimals("0.01", "1"),
    quantity_decimals=st.integers(0, 6),
    price_decimals=st.integers(2, 8),
    seed=st.integers(0, 3),
    stale_after_seconds=st.none() | st.just(3600),
)


@st.composite
def bars(draw: st.DrawFn, start: datetime = OPEN, end: datetime = CLOSE) -> Bar:
    low, first, last, high = sorted(draw(st.tuples(PRICES, PRICES, PRICES, PRICES)))
    if draw(st.booleans()):
        first, last = last, first
    volume = draw(st.none() | decimals("0", "3000"))
    bar = Bar("SPY", start, end, first, high, low, last, volume)
    return bar.at_close() if draw(st.sampled_from([False] * 4 + [True])) else bar


@st.composite
def orders(draw: st.DrawFn, kinds: Any = OrderType, number: int = 1) -> Order:
    kind = draw(st.sampled_from(kinds))
    trailing = kind is OrderType.TRAIL
    by_amount = draw(st.booleans())
    arrives = draw(ARRIVALS)
    return Order(
        order_id=UUID(int=number),
        symbol="SPY",
        side=draw(st.sampled_from(Side)),
        quantity=draw(QUANTITIES),
        order_type=kind,
        time_in_force=draw(st.sampled_from(TimeInForce)),
        logical_time=arrives,
        limit_price=draw(PRICES) if kind in (OrderType.LIMIT, OrderType.STOP_LIMIT) else None,
        stop_price=draw(PRICES) if kind in (OrderType.STOP, OrderType.STOP_LIMIT) else None,
        trail_amount=draw(decimals("0.01", "20")) if trailing and by_amount else None,
        trail_percent=draw(decimals("0.01", "20")) if trailing and not by_amount else None,
        expire_at=draw(st.none() | st.sampled_from([OPEN, CLOSE, CLOSE + DAY])),
    )


BOOKS = st.tuples(*(orders(number=n) for n in range(1, 6))).map(list)


def run(order: Order, bar: Bar, moment: Moment, rules: PaperSettings) -> Outcome:
    return work(order, bar, moment=moment, settings=rules, now=CLOSE + HOUR)


def sign(side: Side) -> int:
    return 1 if side is Side.BUY else -1


@given(
    orders([OrderType.LIMIT, OrderType.STOP_LIMIT]), st.tuples(bars(), bars()), MOMENTS, SETTINGS
)
def test_a_limit_is_never_violated(
    order: Order, two: tuple[Bar, Bar], moment: Moment, rules: PaperSettings
) -> None:
    assert order.limit_price is not None
    tomorrow = replace(two[1], start=two[1].start + DAY, end=two[1].end + DAY)
    first = run(order, two[0], moment, rules)
    count = len(first.fills)
    second = work(first.order, tomorrow, settings=rules, fills_before=count)
    for fill in first.fills + second.fills:
        assert sign(order.side) * (order.limit_price - fill.price) >= 0


@given(orders([OrderType.STOP, OrderType.STOP_LIMIT]), bars(), MOMENTS, SETTINGS)
def test_a_stop_order_fills_only_if_the_bar_reached_its_stop(
    order: Order, bar: Bar, moment: Moment, rules: PaperSettings
) -> None:
    assert order.stop_price is not None
    outcome = run(order, bar, moment, rules)
    worst = bar.high if order.side is Side.BUY else bar.low
    if outcome.order.triggered_at is not None:
        assert sign(order.side) * (worst - order.stop_price) >= 0
    else:
        assert outcome.fills == ()


@given(orders([OrderType.STOP]), bars(), MOMENTS, SETTINGS)
def test_a_stop_never_fills_better_than_its_stop(
    order: Order, bar: Bar, moment: Moment, rules: PaperSettings
) -> None:
    assert order.stop_price is not None
    for fill in run(order, bar, moment, rules).fills:
        assert sign(order.side) * (fill.price - order.stop_price) >= 0


@given(orders(), bars(), MOMENTS, SETTINGS)
def test_without_slippage_every_fill_is_at_a_price_of_the_bar(
    order: Order, bar: Bar, moment: Moment, rules: PaperSettings
) -> None:
    free = PaperSettings(max_volume_share=rules.max_volume_share)
    for fill in run(order, bar, moment, free).fills:
        assert bar.low <= fill.price <= bar.high
        assert bar.start <= fill.event_at <= bar.end
        assert order.logical_time <= fill.event_at


@given(orders(), bars(), MOMENTS, SETTINGS)
def test_slippage_and_commission_are_never_in_the_orders_favour(
    order: Order, bar: Bar, moment: Moment, rules: PaperSettings
) -> None:
    free = rules.model_copy(update={"slippage": PaperSettings().slippage})
    for paid, plain in zip(
        run(order, bar, moment, rules).fills, run(order, bar, moment, free).fills, strict=True
    ):
        assert sign(order.side) * (paid.price - plain.price) >= 0
        assert paid.commission >= 0
        assert (paid.quantity, paid.event_at) == (plain.quantity, plain.event_at)


@given(orders([OrderType.TRAIL]), st.lists(bars(), min_size=1, max_size=5), SETTINGS)
def test_a_trailing_stop_never_loosens(order: Order, days: list[Bar], rules: PaperSettings) -> None:
    order = replace(order, time_in_force=TimeInForce.GTC, expire_at=None)
    for n, bar in enumerate(days):
        today = replace(bar, start=bar.start + n * DAY, end=bar.end + n * DAY)
        before = order.stop_price
        # No volume: the trigger stays, and nothing fills.
        order = work(order, today, settings=rules, volume_left=0).order
        if before is not None:
            assert order.stop_price is not None
            assert sign(order.side) * (before - order.stop_price) >= 0


@given(orders(), bars(), bars(), MOMENTS, SETTINGS)
def test_an_order_that_arrives_at_the_end_is_blind_to_the_bar_but_its_close(
    order: Order, bar: Bar, other: Bar, moment: Moment, rules: PaperSettings
) -> None:
    assume(bar.start < bar.end and other.start < other.end)
    order = replace(order, logical_time=CLOSE)
    same_close = replace(other, close=bar.close, volume=bar.volume)
    assert run(order, bar, moment, rules) == run(order, same_close, moment, rules)


@given(BOOKS, bars(), MOMENTS, SETTINGS)
def test_the_volume_cap_is_never_exceeded_nor_a_quantity_lost(
    book: list[Order], bar: Bar, moment: Moment, rules: PaperSettings
) -> None:
    outcomes = match_all(book, {"SPY": bar}, moment=moment, settings=rules, now=CLOSE)
    filled = Decimal(0)
    for outcome in outcomes:
        of_this: Decimal = sum((fill.quantity for fill in outcome.fills), Decimal(0))
        filled += of_this
        assert outcome.order.filled_quantity == of_this
        assert of_this + outcome.order.remaining == outcome.order.quantity
        assert outcome.order.remaining >= 0
        assert (outcome.status == "FILLED") is (outcome.order.remaining == 0)
        assert (outcome.reason is not None) is (outcome.status in ("CANCELED", "EXPIRED"))
        assert all(fill.quantity > 0 for fill in outcome.fills)
        assert all(rules.cut(fill.quantity) == fill.quantity for fill in outcome.fills)
        if outcome.order.time_in_force is TimeInForce.FOK:
            assert of_this in (0, outcome.order.quantity)
    if rules.max_volume_share is not None and bar.volume is not None:
        assert filled <= rules.max_volume_share * bar.volume


@given(BOOKS, bars(), MOMENTS, SETTINGS, st.integers(0, 100))
def test_the_same_seed_gives_the_same_outcome_in_any_order(
    book: list[Order], bar: Bar, moment: Moment, rules: PaperSettings, shuffle: int
) -> None:
    again = list(book)
    random.Random(shuffle).shuffle(again)
    stored = PaperSettings.model_validate_json(rules.model_dump_json())
    assert match_all(book, {"SPY": bar}, moment=moment, settings=rules, now=CLOSE) == match_all(
        again, {"SPY": bar}, moment=moment, settings=stored, now=CLOSE
    )


def mirrored(value: Any) -> Any:
    """Buy for sell, and every price negated."""
    other = {Side.BUY: Side.SELL, Side.SELL: Side.BUY}
    match value:
        case Bar():
            first, last = -value.open, -value.close
            return replace(value, open=first, high=-value.low, low=-value.high, close=last)
        case Order():
            return replace(
                value,
                side=other[value.side],
                limit_price=None if value.limit_price is None else -value.limit_price,
                stop_price=None if value.stop_price is None else -value.stop_price,
            )
        case Fill():
            return replace(value, side=other[value.side], price=-value.price)
        case _:
            fills = tuple(mirrored(fill) for fill in value.fills)
            return replace(value, order=mirrored(value.order), fills=fills)


@given(orders(), bars(), MOMENTS, SETTINGS)
def test_buying_is_selling_in_the_mirror(
    order: Order, bar: Bar, moment: Moment, rules: PaperSettings
) -> None:
    with localcontext(EXACT):
        expected = mirrored(run(order, bar, moment, rules))
        assert run(mirrored(order), mirrored(bar), moment, rules) == expected


@settings(max_examples=50)
@given(
    orders([OrderType.MARKET, OrderType.LIMIT]),
    st.lists(bars(), min_size=1, max_size=6),
    decimals("0.01", "0.5"),
)
def test_a_resting_order_fills_up_bar_by_bar(order: Order, days: list[Bar], share: Decimal) -> None:
    order = replace(order, time_in_force=TimeInForce.GTC, expire_at=None)
    rules = PaperSettings(max_volume_share=share)
    seen: list[Fill] = []
    for n, bar in enumerate(days):
        today = replace(bar, start=bar.start + n * DAY, end=bar.end + n * DAY)
        (outcome,) = match_all(
            [order],
            {"SPY": today},
            moment=Moment(True, True),
            settings=rules,
            now=today.end,
            fills_before={order.order_id: len(seen)},
        )
        order = outcome.order
        seen.extend(outcome.fills)
    assert sum((fill.quantity for fill in seen), Decimal(0)) + order.remaining == order.quantity
    assert [fill.execution_id for fill in seen] == [
        f"{order.order_id}-{n}" for n in range(1, len(seen) + 1)
    ]
