"""Fault plans: what the dummy broker does wrong on purpose, and when.

A plan is a TOML file: how the exchange is (``[exchange]``, ``[[symbol]]``), and what happens to it
(``[[fault]]``). A fault strikes at a point (``on``: a request that came or a thing that happened;
``message``: a kind of message on its way out), each time or only at the ``nth`` (a number or
several), at ``every`` so-many-th, or with a ``probability``, at most ``times`` times; ``symbol``,
``side`` and ``status`` narrow it down. What it counts survives a restart of the exchange.

Randomness comes from the seed alone, and each fault has a generator of its own: the same seed, the
same plan and the same requests give the same run.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Iterable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from engine.brokers.protocol import MessageKind
from engine.errors import BadInput
from engine.resources import plans_dir

__all__ = [
    "ORDER_ID_MAX",
    "AnyFault",
    "ExchangePlan",
    "Fault",
    "Faults",
    "Plan",
    "SymbolPlan",
    "find_plan",
    "list_plans",
    "load_plan",
    "with_changes",
]

ORDER_ID_MAX = 2**31 - 1
FAULTS_MAX = 1_000

Name = Annotated[str, Field(min_length=1, max_length=64)]
Currency = Annotated[str, Field(pattern=r"^[A-Z]{3}$")]
Amount = Annotated[Decimal, Field(ge=0, max_digits=28)]
Seconds = Annotated[Decimal, Field(ge=0, le=86_400)]
OrderId = Annotated[int, Field(ge=1, le=ORDER_ID_MAX)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]

# What comes from a client, and what happens by itself.
Request = Literal["LOGON", "SUBMIT", "MODIFY", "CANCEL", "WHAT_IF", "SNAPSHOT", "PING"]
Happening = Literal["START", "FILL", "CANCELED", "OPEN", "CLOSE"]
Point = Request | Happening
Moment = Literal["BEFORE", "AFTER"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ExchangePlan(_Part):
    """How the exchange is."""

    cash: dict[Currency, Decimal] = {"USD": Decimal(1_000_000)}
    first_order_id: OrderId = 1
    clock_skew_seconds: Annotated[Decimal, Field(ge=-86_400_000, le=86_400_000)] = Decimal(0)
    # An order, a change or a cancel reaches the book so much later than it is accepted.
    latency_seconds: Seconds = Decimal(0)
    session: Annotated[str, Field(pattern=r"^(OPEN|CLOSED|\d\d:\d\d-\d\d:\d\d)$")] = "OPEN"
    out_of_session: Literal["REJECT", "QUEUE"] = "REJECT"
    commission_per_unit: Amount = Decimal("0.005")
    commission_currency: Currency | None = None
    # What a position needs of its value; an order that needs more than there is is rejected.
    margin_rate: Annotated[Decimal, Field(ge=0, le=1)] = Decimal("0.25")
    step_seconds: Annotated[Decimal, Field(gt=0, le=86_400)] = Decimal(1)
    # Who sends more in any one second is thrown out, as some brokers do.
    messages_per_second_max: Count | None = None

    @field_validator("session")
    @classmethod
    def _times(cls, session: str) -> str:
        opens, dash, closes = session.partition("-")
        if dash and not (_is_time(opens) and _is_time(closes) and opens != closes):
            raise ValueError("write OPEN, CLOSED or two different times such as 14:30-21:00 (UTC)")
        return session


class SymbolPlan(_Part):
    """A symbol: its price, how much can be had on each side, how far it walks a step."""

    name: Name
    price: Decimal | None = None
    liquidity: Annotated[Decimal, Field(gt=0)] | None = None
    currency: Currency = "USD"
    negative_prices: bool = False
    walk_bps: Annotated[Decimal, Field(ge=0, lt=10_000)] = Decimal(0)


class Fault(_Part):
    """What all faults have: when they strike."""

    nth: Count | tuple[Count, ...] | None = None
    every: Count | None = None
    probability: Annotated[float, Field(gt=0, le=1)] | None = None
    times: Count | None = None
    symbol: Name | None = None
    side: Literal["BUY", "SELL"] | None = None

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if sum(value is not None for value in (self.nth, self.every, self.probability)) > 1:
            raise ValueError("give one of nth, every and probability")
        return self

    @property
    def point(self) -> str:
        """Where it strikes."""
        return str(getattr(self, "on", ""))

    @property
    def is_first(self) -> bool:
        """Whether it strikes before what it strikes at is done."""
        return getattr(self, "moment", "AFTER") == "BEFORE"


# --- Connections ------------------------------------------------------------------------------


class Drop(Fault):
    """Drop the connection: BEFORE the request is accepted, or AFTER, with nothing said of it."""

    do: Literal["DROP"]
    on: Point = "SUBMIT"
    moment: Moment = "BEFORE"


class Silence(Fault):
    """Say nothing any more on this connection, for so many seconds or for good; it stays open."""

    do: Literal["SILENCE"]
    on: Point = "SUBMIT"
    moment: Moment = "AFTER"
    seconds: Seconds | None = None


class Steal(Fault):
    """Another program logs on with the same client id."""

    do: Literal["STEAL"]
    on: Point = "SUBMIT"
    moment: Moment = "AFTER"
    by: Name = "another program"


class SwitchAccount(Fault):
    """The session goes on with another account."""

    do: Literal["SWITCH_ACCOUNT"]
    on: Point = "SUBMIT"
    moment: Moment = "AFTER"
    account: Name


class RefuseLogon(Fault):
    """Nobody is let in."""

    do: Literal["REFUSE_LOGON"]
    on: Literal["LOGON"] = "LOGON"


# --- Messages ---------------------------------------------------------------------------------

Kind = Literal["ANY", "PONG"] | MessageKind


class OnMessage(Fault):
    """What strikes at messages on their way out."""

    message: Kind
    status: Name | None = None

    @property
    def point(self) -> str:
        return f"say {self.message}"


class Swallow(OnMessage):
    """The message is never sent."""

    do: Literal["SWALLOW"]


class Repeat(OnMessage):
    """The message is sent again, so many times."""

    do: Literal["REPEAT"]
    copies: Annotated[int, Field(ge=1, le=100)] = 1


class Reorder(OnMessage):
    """So many later messages overtake it."""

    do: Literal["REORDER"]
    by: Annotated[int, Field(ge=1, le=1_000)] = 1


class Delay(OnMessage):
    """The message comes so much later; others overtake it."""

    do: Literal["DELAY"]
    seconds: Seconds


# --- Orders -----------------------------------------------------------------------------------


class Reject(Fault):
    """The request is refused."""

    do: Literal["REJECT"]
    on: Literal["SUBMIT", "MODIFY", "CANCEL", "WHAT_IF"] = "SUBMIT"
    code: Name = "MARGIN"
    text: Annotated[str, Field(max_length=1_000)] = "refused by the fault plan"


class Freeze(Fault):
    """The market is frozen from here on: every order is rejected, and nothing trades."""

    do: Literal["FREEZE"]
    on: Point = "START"
    moment: Moment = "AFTER"


class Forget(Fault):
    """The order is accepted, confirmed and then lost, without a word."""

    do: Literal["FORGET"]
    on: Literal["SUBMIT"] = "SUBMIT"


class Inactive(Fault):
    """At a cancel the broker says that it holds the order no more."""

    do: Literal["INACTIVE"]
    on: Literal["CANCEL"] = "CANCEL"
    moment: Literal["BEFORE"] = "BEFORE"
    says: Literal["INACTIVE", "ALREADY_CANCELED"] = "INACTIVE"


class Fill(Fault):
    """Fill the order, or all that are open where it isn't about one, whatever their prices."""

    do: Literal["FILL"]
    on: Point
    moment: Moment = "AFTER"
    quantity: Annotated[Decimal, Field(gt=0)] | None = None


class Slice(_Part):
    quantity: Annotated[Decimal, Field(gt=0)]
    price: Decimal


class Fills(Fault):
    """The order fills in these slices; what is left goes to the book."""

    do: Literal["FILLS"]
    on: Literal["SUBMIT"] = "SUBMIT"
    slices: Annotated[tuple[Slice, ...], Field(min_length=1, max_length=10_000)]


class FillAfterClose(Fault):
    """The order rests, and fills when the session has closed."""

    do: Literal["FILL_AFTER_CLOSE"]
    on: Literal["SUBMIT"] = "SUBMIT"


class Overfill(Fault):
    """The order fills by so much more than it was for."""

    do: Literal["OVERFILL"]
    on: Literal["FILL"] = "FILL"
    quantity: Annotated[Decimal, Field(gt=0)]


class Correct(Fault):
    """The execution is corrected by so much."""

    do: Literal["CORRECT"]
    on: Literal["FILL"] = "FILL"
    price_change: Decimal = Decimal(0)
    quantity_change: Decimal = Decimal(0)


class Bust(Fault):
    """The execution is taken back."""

    do: Literal["BUST"]
    on: Literal["FILL"] = "FILL"


class ZeroFill(Fault):
    """An execution of no quantity is told; the exchange's own books know nothing of it."""

    do: Literal["ZERO_FILL"]
    on: Literal["SUBMIT", "FILL"] = "SUBMIT"


class NegativeFill(Fault):
    """An execution at a negative price is told; the exchange's own books know nothing of it."""

    do: Literal["NEGATIVE_FILL"]
    on: Literal["SUBMIT", "FILL"] = "SUBMIT"
    quantity: Annotated[Decimal, Field(gt=0)] = Decimal(1)
    price: Annotated[Decimal, Field(lt=0)] = Decimal(-1)


class CommissionFirst(Fault):
    """The commission is told before its execution."""

    do: Literal["COMMISSION_FIRST"]
    on: Literal["FILL"] = "FILL"


class CommissionIn(Fault):
    """The commission is charged in another currency."""

    do: Literal["COMMISSION_IN"]
    on: Literal["FILL"] = "FILL"
    currency: Currency


# --- Ids, time, market ------------------------------------------------------------------------


class RestartOrderIds(Fault):
    """The broker's order ids begin anew."""

    do: Literal["RESTART_ORDER_IDS"]
    on: Point = "SUBMIT"
    moment: Moment = "BEFORE"
    next: OrderId = 1


class WrapOrderIds(Fault):
    """The broker's order ids are at their end: the one after 2^31-1 is 1."""

    do: Literal["WRAP_ORDER_IDS"]
    on: Point = "START"
    moment: Moment = "BEFORE"
    next: OrderId = ORDER_ID_MAX


class ChangePermId(Fault):
    """The order has another permId from here on."""

    do: Literal["CHANGE_PERM_ID"]
    on: Literal["SUBMIT", "MODIFY", "CANCEL", "FILL"] = "FILL"


class SkewClock(Fault):
    """The exchange's clock is off by so much from here on."""

    do: Literal["SKEW_CLOCK"]
    on: Point = "START"
    moment: Moment = "BEFORE"
    seconds: Annotated[Decimal, Field(ge=-86_400_000, le=86_400_000)]


class ManualOrder(Fault):
    """Somebody places an order in the account by hand."""

    do: Literal["MANUAL_ORDER"]
    on: Point = "SUBMIT"
    moment: Moment = "AFTER"
    of: Name | None = None
    direction: Literal["BUY", "SELL"] = "BUY"
    quantity: Annotated[Decimal, Field(gt=0)] = Decimal(10)
    limit_price: Decimal | None = None


class OrphanOrder(Fault):
    """An order with a reference of our kind, which we have lost, is there and fills."""

    do: Literal["ORPHAN_ORDER"]
    on: Point = "LOGON"
    moment: Moment = "AFTER"
    of: Name
    direction: Literal["BUY", "SELL"] = "BUY"
    quantity: Annotated[Decimal, Field(gt=0)] = Decimal(10)


class ChangeSymbol(Fault):
    """A symbol is renamed; its orders are cancelled, its positions go on under the new name."""

    do: Literal["CHANGE_SYMBOL"]
    on: Point = "SUBMIT"
    moment: Moment = "AFTER"
    old: Name
    new: Name


class SetPrice(Fault):
    """The market moves to a price."""

    do: Literal["SET_PRICE"]
    on: Point
    moment: Moment = "AFTER"
    of: Name
    price: Decimal


class SetSession(Fault):
    """The session opens or closes."""

    do: Literal["SET_SESSION"]
    on: Point
    moment: Moment = "AFTER"
    to: Literal["OPEN", "CLOSED"]


AnyFault = Annotated[
    Drop
    | Silence
    | Steal
    | SwitchAccount
    | RefuseLogon
    | Swallow
    | Repeat
    | Reorder
    | Delay
    | Reject
    | Freeze
    | Forget
    | Inactive
    | Fill
    | Fills
    | FillAfterClose
    | Overfill
    | Correct
    | Bust
    | ZeroFill
    | NegativeFill
    | CommissionFirst
    | CommissionIn
    | RestartOrderIds
    | WrapOrderIds
    | ChangePermId
    | SkewClock
    | ManualOrder
    | OrphanOrder
    | ChangeSymbol
    | SetPrice
    | SetSession,
    Field(discriminator="do"),
]


class Plan(_Part):
    """A fault plan."""

    title: Annotated[str, Field(min_length=1, max_length=200)] = "Nothing goes wrong"
    seed: int = 0
    exchange: ExchangePlan = ExchangePlan()
    symbols: tuple[SymbolPlan, ...] = Field(default=(), alias="symbol")
    faults: tuple[AnyFault, ...] = Field(default=(), alias="fault", max_length=FAULTS_MAX)

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


# --- Files ------------------------------------------------------------------------------------


def load_plan(path: Path) -> Plan:
    """Read a plan. Raises BadInput with one sentence that says what is wrong where."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"The fault plan {path} can't be read; name a file that is there."
        ) from error
    try:
        return Plan.model_validate(tomllib.loads(text, parse_float=Decimal))
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"The fault plan {path} isn't TOML: {error}.") from error
    except ValidationError as error:
        raise BadInput(f"The fault plan {path}: {_first(error)}") from error


def with_changes(plan: Plan, *, prices: Mapping[str, str], session: str | None) -> Plan:
    """The plan with first prices and a session of one's own. Raises BadInput."""
    known = {symbol.name: symbol for symbol in plan.symbols}
    try:
        for name, price in prices.items():
            before = known[name].model_dump() if name in known else {"name": name}
            known[name] = SymbolPlan.model_validate(before | {"price": price})
        how = plan.exchange.model_dump()
        exchange = ExchangePlan.model_validate(
            how if session is None else how | {"session": session}
        )
    except ValidationError as error:
        raise BadInput(f"What the command says of the exchange: {_first(error)}") from error
    return plan.model_copy(update={"symbols": tuple(known.values()), "exchange": exchange})


def find_plan(name: str) -> Path:
    """The file of a plan: a path, or one that travels with the program (``CONN-01``)."""
    given = Path(name)
    if given.is_file():
        return given
    shipped = plans_dir() / f"{given.name.removesuffix('.toml')}.toml"
    if given.parent.name in ("", "plans") and shipped.is_file():
        return shipped
    raise BadInput(f"There is no fault plan {name!r}; `oms broker plans` lists those there are.")


def list_plans() -> dict[str, Plan]:
    """The plans that travel with the program, by name."""
    return {path.stem: load_plan(path) for path in sorted(plans_dir().glob("*.toml"))}


def _first(error: ValidationError) -> str:
    found = error.errors()[0]
    words = [str(part + 1) if isinstance(part, int) else part for part in found["loc"]]
    place = " ".join(words) or "as a whole"
    said = found["msg"].removeprefix("Value error, ")
    value = found["input"]
    shown = f", not {value!r}" if isinstance(value, str | int | float | Decimal) else ""
    return f"{place}: {said[:1].lower()}{said[1:]}{shown}."


def _is_time(text: str) -> bool:
    hours, _, minutes = text.partition(":")
    return int(hours) < 24 and int(minutes) < 60


# --- When they strike -------------------------------------------------------------------------


class Faults:
    """Counts what happens, and says which faults strike."""

    def __init__(self, plan: Plan, seed: int, counted: Mapping[str, list[int]]) -> None:
        self.counted: dict[str, list[int]] = {}
        self._by_point: dict[str, list[tuple[str, Fault, random.Random]]] = {}
        for number, fault in enumerate(plan.faults, 1):
            key = str(number)
            seen, struck = counted.get(key, (0, 0))
            self.counted[key] = [seen, struck]
            generator = random.Random(f"{seed}/{number}")
            if fault.probability is not None:
                for _ in range(seen):
                    generator.random()
            self._by_point.setdefault(fault.point, []).append((key, fault, generator))

    def at(self, point: str, symbol: str = "", side: str = "", status: str = "") -> list[Fault]:
        """The faults that strike here, in the order of the plan."""
        known = self._by_point.get(point)
        if known is None:
            return []
        return [
            fault
            for key, fault, generator in known
            if _concerns(fault, symbol, side, status) and self._strikes(key, fault, generator)
        ]

    def at_message(self, kind: str, symbol: str, side: str, status: str) -> list[Fault]:
        """The faults that strike at a message of this kind."""
        if not self._by_point:
            return []
        found: Iterable[str] = (f"say {kind}", "say ANY")
        return [fault for point in found for fault in self.at(point, symbol, side, status)]

    def _strikes(self, key: str, fault: Fault, generator: random.Random) -> bool:
        counts = self.counted[key]
        counts[0] += 1
        chosen = _chosen(fault, counts[0], generator)
        if not chosen or (fault.times is not None and counts[1] >= fault.times):
            return False
        counts[1] += 1
        return True


def _concerns(fault: Fault, symbol: str, side: str, status: str) -> bool:
    wanted: Any = getattr(fault, "status", None)
    return (
        (fault.symbol is None or fault.symbol == symbol)
        and (fault.side is None or fault.side == side)
        and (wanted is None or wanted == status)
    )


def _chosen(fault: Fault, seen: int, generator: random.Random) -> bool:
    if fault.nth is not None:
        return seen in fault.nth if isinstance(fault.nth, tuple) else seen == fault.nth
    if fault.every is not None:
        return seen % fault.every == 0
    if fault.probability is not None:
        return generator.random() < fault.probability
    return True
