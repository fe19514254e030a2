"""The paper book: given a working order and one bar, what fills.

Pure: no database, no clock, no state. ``docs/paper-book.md`` states every rule with its reason.

The rules are written once, for a buy. A sell is a buy in the mirror: its prices and the bar's
are negated, so that the bar's low becomes its high, and what is found is negated back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal, localcontext
from types import MappingProxyType
from typing import Literal, NamedTuple
from uuid import UUID

from engine.market.model import Bar
from engine.orders.model import Fill, Order, OrderType, Side, TimeInForce
from engine.paper.costs import EXACT, PaperSettings

__all__ = ["Moment", "Outcome", "Status", "match", "match_all", "priority", "volume_cap"]

Status = Literal["PENDING", "PARTIALLY_FILLED", "FILLED", "CANCELED", "EXPIRED"]

_STOPS = frozenset({OrderType.STOP, OrderType.STOP_LIMIT, OrderType.TRAIL})
_LIMITS = frozenset({OrderType.LIMIT, OrderType.STOP_LIMIT})

# What becomes of the rest of an order that has had its one chance to trade.
_AFTER_ITS_CHANCE: Mapping[TimeInForce, tuple[Status, str]] = MappingProxyType(
    {
        TimeInForce.IOC: ("CANCELED", "IOC_REMAINDER"),
        TimeInForce.FOK: ("CANCELED", "FOK_NOT_FILLABLE"),
        TimeInForce.OPG: ("EXPIRED", "OPG_MISSED"),
        TimeInForce.CLS: ("EXPIRED", "CLS_MISSED"),
    }
)
_NO_FILLS: Mapping[UUID, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Moment:
    """Where a bar stands in its session: a daily bar both opens and closes it."""

    opens_session: bool
    closes_session: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """An order as it stands after a bar, and what filled.

    ``reason`` is a stable code, given when ``status`` is CANCELED or EXPIRED.
    """

    order: Order
    fills: tuple[Fill, ...]
    status: Status
    reason: str | None


class _Touch(NamedTuple):
    """A price that an order gets, before slippage, and when it was there."""

    price: Decimal
    at: datetime


def match(
    order: Order,
    bar: Bar,
    *,
    moment: Moment,
    settings: PaperSettings,
    now: datetime,
    volume_left: Decimal | None,
    fills_before: int,
) -> Outcome:
    """Work an order against one bar, which it must not have met before.

    ``now`` is the tick's logical time. ``volume_left`` is what is left for the order, in units,
    of the bar's capped volume (``None``: no cap). ``fills_before`` counts the order's earlier
    executions, so that execution ids go on where they ended.

    Raises ``ValueError`` for what only a bug can ask: another symbol's bar, a bar that ends
    after ``now``, an order without a price that its type needs, a partly filled order whose
    fills aren't counted.
    """
    _refuse_bugs(order, bar, now, fills_before)
    with localcontext(EXACT):
        met = _meets(order, bar, moment)
        fill = None
        if met and (seen := _visible(order, bar, settings, now)):
            order, touch = _work(order, seen, settings)
            if touch is not None:
                fill = _fill(order, touch, settings, volume_left, fills_before + 1)
        if fill is None:
            return _settle(order, (), met=met, settings=settings, now=now)
        order = order.filled_by(order.filled_quantity + fill.quantity)
        return _settle(order, (fill,), met=met, settings=settings, now=now)


def match_all(
    orders: Iterable[Order],
    bars: Mapping[str, Bar],
    *,
    moment: Moment,
    settings: PaperSettings,
    now: datetime,
    fills_before: Mapping[UUID, int] = _NO_FILLS,
) -> list[Outcome]:
    """Work orders, in their priority, against the bars of their symbols.

    The orders of a symbol share its bar's volume cap: who comes first takes first. An order
    whose symbol has no bar only ages. ``fills_before`` counts earlier executions by order.
    """
    left = {symbol: volume_cap(bar, settings) for symbol, bar in bars.items()}
    outcomes = []
    for order in priority(orders):
        bar = bars.get(order.symbol)
        if bar is None:
            outcomes.append(_settle(order, (), met=False, settings=settings, now=now))
            continue
        volume_left = left[order.symbol]
        outcome = match(
            order,
            bar,
            moment=moment,
            settings=settings,
            now=now,
            volume_left=volume_left,
            fills_before=fills_before.get(order.order_id, 0),
        )
        if volume_left is not None:
            filled = sum((fill.quantity for fill in outcome.fills), Decimal(0))
            left[order.symbol] = EXACT.subtract(volume_left, filled)
        outcomes.append(outcome)
    return outcomes


def priority(orders: Iterable[Order]) -> list[Order]:
    """Sort by arrival; the id breaks ties, so that a replay shares volume in the same way."""
    return sorted(orders, key=lambda order: (order.logical_time, order.order_id))


def volume_cap(bar: Bar, settings: PaperSettings) -> Decimal | None:
    """How many units of a bar the orders of its symbol may take together; ``None``: no cap."""
    if settings.max_volume_share is None or bar.volume is None:
        return None
    return settings.cut(EXACT.multiply(bar.volume, settings.max_volume_share))


def _refuse_bugs(order: Order, bar: Bar, now: datetime, fills_before: int) -> None:
    if bar.symbol != order.symbol:
        raise ValueError(f"order {order.order_id} is for {order.symbol}, the bar for {bar.symbol}")
    if bar.end > now:
        raise ValueError(f"the bar of {bar.symbol} ends at {bar.end}, after the tick at {now}")
    if order.filled_quantity and not fills_before:
        raise ValueError(f"order {order.order_id} is partly filled, but fills_before is 0")


def _meets(order: Order, bar: Bar, moment: Moment) -> bool:
    """Whether the bar is one that the order waits for: the only one for IOC, FOK, OPG and CLS."""
    if order.time_in_force is TimeInForce.OPG:
        return moment.opens_session and order.logical_time <= bar.start
    if order.time_in_force is TimeInForce.CLS and not moment.closes_session:
        return False
    return order.logical_time <= bar.end


def _visible(order: Order, bar: Bar, settings: PaperSettings, now: datetime) -> Bar | None:
    """The part of a bar that the order may trade on, if any."""
    age_max = settings.stale_after_seconds
    if age_max is not None and now - bar.end > timedelta(seconds=age_max):
        return None
    if order.time_in_force is TimeInForce.OPG:
        seen = Bar.of_price(bar.symbol, bar.open, bar.start)
    # A stop that was reached inside the bar knows no more of its path than an order that
    # arrived there: what is left to trade on is the close.
    elif order.time_in_force is TimeInForce.CLS or bar.start < (
        order.triggered_at or order.logical_time
    ):
        seen = bar.at_close()
    else:
        seen = bar
    if order.expire_at is not None and seen.end > order.expire_at:
        return None
    return seen


def _work(order: Order, bar: Bar, settings: PaperSettings) -> tuple[Order, _Touch | None]:
    """Follow the order through the bar: the order with its trigger or trail, and its price."""
    seen = _mirrored(bar) if order.side is Side.SELL else bar
    if order.order_type in _STOPS and order.triggered_at is None:
        rest = _after_trigger(order, seen)
        if rest is None:
            return _trailed(order, seen, settings), None
        seen = rest
        order = replace(order, triggered_at=seen.start)
    touch = _touch(order, seen)
    if touch is None:
        return order, None
    return order, _Touch(_as_buy(touch.price, order.side), touch.at)


def _as_buy(price: Decimal, side: Side) -> Decimal:
    # copy_negate and not minus, which would round to the context's precision.
    return price.copy_negate() if side is Side.SELL else price


def _mirrored(bar: Bar) -> Bar:
    return Bar(
        bar.symbol,
        bar.start,
        bar.end,
        open=bar.open.copy_negate(),
        high=bar.low.copy_negate(),
        low=bar.high.copy_negate(),
        close=bar.close.copy_negate(),
    )


def _price_of(order: Order, name: Literal["limit_price", "stop_price", "trail_percent"]) -> Decimal:
    price: Decimal | None = getattr(order, name)
    if price is None:
        raise ValueError(f"order {order.order_id} is {order.order_type} but has no {name}")
    return price


def _after_trigger(order: Order, seen: Bar) -> Bar | None:
    """What is left of the bar once the stop is reached, starting at the price that reached it.

    All of the bar if it opens there. Reached later, the bar's low may lie before the trigger, so
    that the stop price is the only one known to come after it.
    """
    if order.order_type is OrderType.TRAIL and order.stop_price is None:
        return None
    stop = _as_buy(_price_of(order, "stop_price"), order.side)
    if seen.open >= stop:
        return seen
    if seen.high >= stop:
        return Bar.of_price(seen.symbol, stop, seen.end)
    return None


def _trailed(order: Order, seen: Bar, settings: PaperSettings) -> Order:
    """The order with its stop drawn after the bar's best price, never loosened."""
    if order.order_type is not OrderType.TRAIL:
        return order
    trail = order.trail_amount
    if trail is None:
        trail = abs(seen.low) * _price_of(order, "trail_percent") / 100
    best = settings.price_against(_as_buy(seen.low + trail, order.side), order.side)
    if order.stop_price is not None:
        tighter = min if order.side is Side.BUY else max
        best = tighter(best, order.stop_price)
    return replace(order, stop_price=best)


def _touch(order: Order, seen: Bar) -> _Touch | None:
    """The first price that a buy gets: the open, or its limit if the bar comes down to it."""
    if order.order_type in _LIMITS:
        limit = _as_buy(_price_of(order, "limit_price"), order.side)
        if seen.open > limit:
            return _Touch(limit, seen.end) if seen.low <= limit else None
    return _Touch(seen.open, seen.start)


def _fill(
    order: Order, touch: _Touch, settings: PaperSettings, volume_left: Decimal | None, n: int
) -> Fill | None:
    """The order's ``n``-th execution, as large as the volume allows."""
    wanted = order.remaining if volume_left is None else min(order.remaining, volume_left)
    quantity = settings.cut(wanted)
    all_or_none = order.time_in_force is TimeInForce.FOK
    if quantity <= 0 or (all_or_none and quantity < order.remaining):
        return None
    # A dash: after a last dot, a broker's digits number the corrections of one execution.
    execution_id = f"{order.order_id}-{n}"
    limit = order.limit_price if order.order_type in _LIMITS else None
    # Not by the order's id, which is each run's own: one feed slips alike in every run.
    placed_at = order.logical_time.astimezone(UTC).isoformat()
    key = f"{order.symbol}@{placed_at}#{order.quantity.normalize():f}-{n}"
    price = settings.fill_price(touch.price, order.side, limit=limit, key=key)
    return Fill(
        order_id=order.order_id,
        execution_id=execution_id,
        symbol=order.symbol,
        side=order.side,
        quantity=quantity,
        price=price,
        commission=settings.commission_on(quantity, price),
        event_at=touch.at,
    )


def _settle(
    order: Order, fills: tuple[Fill, ...], *, met: bool, settings: PaperSettings, now: datetime
) -> Outcome:
    """What the order is after the bar; ``met``: the bar was one that it waited for."""
    remaining = EXACT.subtract(order.quantity, order.filled_quantity)
    if remaining <= 0:
        return Outcome(order, fills, "FILLED", None)
    if met and order.time_in_force in _AFTER_ITS_CHANCE:
        return Outcome(order, fills, *_AFTER_ITS_CHANCE[order.time_in_force])
    if order.expire_at is not None and order.expire_at <= now:
        return Outcome(order, fills, "EXPIRED", f"EXPIRED_{order.time_in_force}")
    if settings.cut(remaining) == 0:
        # Too small to ever fill; left open, it would rest for good.
        return Outcome(order, fills, "CANCELED", "BELOW_QUANTITY_STEP")
    return Outcome(order, fills, "PARTIALLY_FILLED" if order.filled_quantity else "PENDING", None)
