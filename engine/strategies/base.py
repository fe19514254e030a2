"""What a strategy is: hooks that see a read-only context and return intents.

A strategy never touches the database, the clock or a broker. It is called with a ``Context`` and
answers with ``Intent`` values; the engine turns them into orders, in one transaction with
everything else of the tick. What it wants to keep from tick to tick it returns as ``Remember``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any, ClassVar, TypeVar
from uuid import UUID

from pydantic import BaseModel, ConfigDict

from engine.market.model import Bar, Session
from engine.orders.model import Fill, Order, OrderType, Side, TimeInForce


class Parameters(BaseModel):
    """Base of a strategy's parameters: typed, checked when the run is made, no unknown names."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class Holding:
    """A position: units, cost per unit and last mark in the run's currency."""

    symbol: str
    quantity: Decimal
    avg_cost: Decimal | None
    mark_price: Decimal | None


@dataclass(frozen=True, slots=True)
class SipDue:
    """An occasion of an investment plan that is due; ``amount`` is in the run's currency.

    ``next_open_at`` is when the session of the plan's next occasion opens, if there is one.
    """

    plan: str
    symbol: str
    amount: Decimal
    missed_policy: str
    occasion: str
    planned_on: date
    next_open_at: datetime | None
    session: Session


@dataclass(frozen=True, slots=True)
class Context:
    """What a strategy may know at ``logical_time``; all of it read-only.

    ``bars`` and ``prices`` hold what the tick was given, by symbol. ``cash`` is in the run's
    currency, ``available_cash`` is what open buy orders leave of it, ``equity`` is cash and
    positions at the tick's prices. ``session`` is the session that is open or was last open,
    ``market_open`` whether it is open now. ``now`` is the wall clock of a live tick and
    ``logical_time`` in a replay.
    """

    user_id: UUID
    run_id: UUID
    logical_time: datetime
    now: datetime
    session: Session | None
    market_open: bool
    bars: Mapping[str, Bar]
    prices: Mapping[str, Decimal]
    quantity_decimals: Mapping[str, int]
    cash: Decimal
    available_cash: Decimal
    equity: Decimal
    positions: Mapping[str, Holding]
    open_orders: tuple[Order, ...]
    state: Mapping[str, Any]
    sips_due: tuple[SipDue, ...] = ()


NUMBER_MAX = Decimal(10) ** 15
NUMBER_DECIMALS_MAX = 8

_Word = TypeVar("_Word", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class PlaceOrder:
    """Buy or sell. ``occasion`` names the plan's occasion that the order is for, if any.

    Words are taken in any case and with their aliases (MKT, LMT, STP, STP_LMT, MOC, LOC). Raises
    ValueError for a word that is none, a naive time and a number that the books can't hold; a
    quantity that isn't positive is no error here, its order will be REJECTED.
    """

    symbol: str
    side: Side
    quantity: Decimal
    order_type: OrderType = OrderType.MARKET
    time_in_force: TimeInForce = TimeInForce.DAY
    limit_price: Decimal | None = None
    stop_price: Decimal | None = None
    trail_amount: Decimal | None = None
    trail_percent: Decimal | None = None
    expire_at: datetime | None = None
    client_order_id: str | None = None
    occasion: SipDue | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "symbol", str(self.symbol).strip().upper())
        if type(self.side) is not Side:
            put(self, "side", _word(Side, self.side))
        if type(self.time_in_force) is not TimeInForce:
            put(self, "time_in_force", _word(TimeInForce, self.time_in_force))
        if type(self.order_type) is not OrderType:
            if str(self.order_type).strip().upper() in ("MOC", "LOC"):
                put(self, "time_in_force", TimeInForce.CLS)
            put(self, "order_type", _word(OrderType, self.order_type))
        put(self, "quantity", _number("quantity", self.quantity))
        for name in ("limit_price", "stop_price", "trail_amount", "trail_percent"):
            value = getattr(self, name)
            if value is not None:
                put(self, name, _number(name, value))
        if self.expire_at is not None and self.expire_at.tzinfo is None:
            raise ValueError(
                f"expire_at {self.expire_at.isoformat()} has no time zone; give it one"
            )


def _word(kind: type[_Word], given: object) -> _Word:
    try:
        return kind(str(given))
    except ValueError as error:
        raise ValueError(f"{given!r} is none of {', '.join(kind)}") from error


def _number(name: str, given: object) -> Decimal:
    """A number as the books keep it, exactly; a float isn't one."""
    if isinstance(given, int) and not isinstance(given, bool):
        given = Decimal(given)
    if not isinstance(given, Decimal):
        raise ValueError(f"{name} {given!r} is no Decimal")
    if not given.is_finite() or abs(given) >= NUMBER_MAX:
        raise ValueError(f"{name} {given} is no number below 10^15")
    if given != round(given, NUMBER_DECIMALS_MAX):
        raise ValueError(f"{name} {given} has more than {NUMBER_DECIMALS_MAX} decimals; cut it")
    return given


def _json(given: Mapping[str, Any], what: str) -> dict[str, Any]:
    """A copy as it comes back from the database, so that a replay sees what a live run sees."""
    try:
        text = json.dumps(dict(given), allow_nan=False, ensure_ascii=False)
        text.encode()  # half a surrogate pair is no text
        if "\\u0000" in text.replace("\\\\", ""):
            raise ValueError("a text holds the character NUL")
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} is no JSON: {error}") from error
    copied: dict[str, Any] = json.loads(text)
    return copied


@dataclass(frozen=True, slots=True)
class CancelOrder:
    """Cancel an order of this run; where there is nothing left to cancel, that is noted."""

    order_id: UUID


@dataclass(frozen=True, slots=True)
class ModifyOrder:
    """Ask for other terms of an order at a broker; ``None`` leaves a term as it is.

    ``quantity`` is the whole, what is filled included. What was filled and the order's id stay.
    """

    order_id: UUID
    quantity: Decimal | None = None
    limit_price: Decimal | None = None
    stop_price: Decimal | None = None


@dataclass(frozen=True, slots=True)
class Remember:
    """Replace the strategy's state; JSON values only. Decimals go in as strings."""

    state: Mapping[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "state", _json(self.state, "the state to remember"))


@dataclass(frozen=True, slots=True)
class Announce:
    """Write an event into the ledger, at most once per logical time and subject."""

    event_type: str
    subject: str = ""
    payload: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "payload", _json(self.payload, f"the payload of {self.event_type}")
        )


Intent = PlaceOrder | CancelOrder | ModifyOrder | Remember | Announce
Intents = Iterable[Intent] | None


class Strategy:
    """Base of every strategy. Override the hooks you need; each returns intents or ``None``.

    Order of calls in a tick: ``on_start`` (first tick only), ``on_fill`` for resting orders that
    the tick's prices filled (at a broker: for what it has filled since the last tick), ``on_bar``
    per symbol in alphabetical order, ``on_tick``, then ``on_fill`` for what these orders filled.
    ``on_stop`` is called when the run is stopped and may place nothing any more.
    """

    Parameters: ClassVar[type[Parameters]] = Parameters

    def __init__(self, parameters: Any) -> None:
        self.parameters = parameters

    def symbols(self) -> frozenset[str]:
        """Symbols whose prices every tick needs, besides those held, ordered or planned."""
        return frozenset()

    def on_start(self, context: Context) -> Intents:
        """Called at the run's first tick, before anything else."""

    def on_tick(self, context: Context) -> Intents:
        """Called once a tick."""

    def on_bar(self, context: Context, bar: Bar) -> Intents:
        """Called for each bar that the tick was given."""

    def on_fill(self, context: Context, fill: Fill) -> Intents:
        """Called for each fill."""

    def on_stop(self, context: Context) -> None:
        """Called once, when the run is stopped."""
