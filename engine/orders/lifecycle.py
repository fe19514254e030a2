"""What becomes of an order when its broker speaks: pure rules, without a database.

The broker is right about what happened; what it says may come twice, late, out of sequence or not
at all. So executions are facts that count once each, wherever in the sequence they arrive, and a
status only moves an order from where it stands. ``hear`` says what an event turns out to be and
what is to be written; writing it is the inbox's business (``engine.inbox``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any
from uuid import UUID

from engine.orders.model import Side

CLOSED = frozenset({"FILLED", "CANCELED", "REJECTED", "EXPIRED"})
_BEFORE_ROUTED = ("NEW", "PENDING", "PENDING_SUBMIT")
# Answers to a cancel that mean: there is nothing left to cancel.
_GONE = ("ALREADY_CANCELED", "INACTIVE")
# Order ids are 32-bit signed integers at IB; a broker that has reached the last starts anew.
LAST_BROKER_ORDER_ID = 2**31 - 1
# Further than this a broker's clock and ours are apart, which is told. Source: scenario CONN-05.
SKEW_MAX = timedelta(seconds=30)


class Finding(StrEnum):
    """What an event turns out to be."""

    NEW = "NEW"
    REPEAT = "REPEAT"
    STALE = "STALE"
    CORRECTION = "CORRECTION"
    CONTRADICTION = "CONTRADICTION"
    ORPHAN = "ORPHAN"
    FOREIGN = "FOREIGN"
    HELD = "HELD"
    IGNORED = "IGNORED"
    REFUSED = "REFUSED"


@dataclass(frozen=True, slots=True)
class Heard:
    """A row of the inbox. ``event_at`` is the broker's time, ``received_at`` ours."""

    number: int
    kind: str
    payload: Mapping[str, Any]
    event_at: datetime
    received_at: datetime
    execution_id: str | None = None
    broker_order_id: int | None = None
    perm_id: int | None = None

    def amount(self, key: str) -> Decimal | None:
        """A number of the payload, exactly as the broker said it."""
        value = self.payload.get(key)
        return None if value is None else Decimal(str(value))


@dataclass(frozen=True, slots=True)
class Terms:
    """What may be modified of an order."""

    quantity: Decimal
    limit_price: Decimal | None = None
    stop_price: Decimal | None = None


@dataclass(frozen=True, slots=True)
class Executed:
    """An execution as it is booked; units, and currency per unit."""

    quantity: Decimal
    price: Decimal


@dataclass(slots=True)
class OrderState:
    """An order as far as its broker's words concern it; ``hear`` moves it along."""

    order_id: UUID
    run_id: UUID
    symbol: str
    side: Side
    status: str
    terms: Terms
    filled: Decimal = Decimal(0)
    purpose: str | None = None
    recovered: bool = False
    pending_reconcile: bool = False
    negative_price_allowed: bool = False
    # The broker's time of what closed it; a word from before that is old news.
    closed_at: datetime | None = None
    executions: dict[str, Executed] = field(default_factory=dict)
    reversed: set[str] = field(default_factory=set)
    commissions: dict[str, tuple[Decimal, str]] = field(default_factory=dict)
    # Terms that commands have asked for: the broker may confirm these and no others.
    asked: list[Terms] = field(default_factory=list)
    ids: set[tuple[int, int]] = field(default_factory=set)

    @property
    def is_open(self) -> bool:
        return self.status not in CLOSED

    @property
    def working(self) -> str:
        """The status of an order that the broker works, by what is filled."""
        return "PARTIALLY_FILLED" if self.filled > 0 else "ROUTED"


@dataclass(frozen=True, slots=True)
class Execute:
    """Book an execution; ``reverses`` names the one that it takes back."""

    execution_id: str
    quantity: Decimal
    price: Decimal
    event_at: datetime
    reverses: str | None = None


@dataclass(frozen=True, slots=True)
class Charge:
    """Book the commission of an execution, in ``currency``."""

    execution_id: str
    amount: Decimal
    currency: str
    event_at: datetime


@dataclass(frozen=True, slots=True)
class Change:
    """Write to the order's row; ``None`` leaves a thing as it is."""

    status: str | None = None
    reason: str | None = None
    reject_code: str | None = None
    terms: Terms | None = None
    pending_reconcile: bool | None = None


@dataclass(frozen=True, slots=True)
class Identify:
    """The broker knows the order by these ids from ``since`` on; 0 is none."""

    broker_order_id: int
    perm_id: int
    since: datetime


@dataclass(frozen=True, slots=True)
class Tell:
    """Tell the ledger and the log; ``alarm`` raises a person."""

    code: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    alarm: str | None = None


Effect = Execute | Charge | Change | Identify | Tell


@dataclass(slots=True)
class Verdict:
    """What an event is, and what to write because of it, in this order."""

    finding: Finding
    code: str | None = None
    effects: list[Effect] = field(default_factory=list)

    @property
    def codes(self) -> list[str]:
        return [effect.code for effect in self.effects if isinstance(effect, Tell)]


def hear(order: OrderState, event: Heard) -> Verdict:
    """Say what ``event`` is to ``order`` and what to write; the order is moved along."""
    identified = _identify(order, event)
    rule = _RULES.get(event.kind)
    verdict = rule(order, event) if rule else Verdict(Finding.IGNORED)
    verdict.effects[:0] = identified
    if event.event_at - event.received_at > SKEW_MAX:
        seconds = (event.received_at - event.event_at).total_seconds()
        verdict.effects.append(Tell("TIME_SKEW", {"seconds": seconds}, skew_words(seconds)))
    verdict.code = verdict.code or next(iter(verdict.codes), None)
    return verdict


def skew_words(seconds: float) -> str:
    """How far our clock is off, in words; ``seconds`` is ours less the broker's."""
    side = "ahead of" if seconds > 0 else "behind"
    return f"our clock is {abs(seconds):.1f} s {side} the broker's; the broker's time is used"


def _identify(order: OrderState, event: Heard) -> list[Effect]:
    pair = (event.broker_order_id or 0, event.perm_id or 0)
    if pair == (0, 0) or pair in order.ids:
        return []
    first = not order.ids
    order.ids.add(pair)
    effects: list[Effect] = [Identify(*pair, event.event_at)]
    if pair[0] >= LAST_BROKER_ORDER_ID:
        effects.append(Tell("ORDER_ID_WRAP", {"perm_id": pair[1]}))
    elif not first and pair[1] and all(perm not in (0, pair[1]) for _, perm in order.ids - {pair}):
        effects.append(Tell("PERM_ID_CHANGED", {"perm_id": pair[1]}))
    return effects


def _move(order: OrderState, event: Heard, status: str, reason: str | None = None) -> Change:
    order.status = status
    order.closed_at = event.event_at if status in CLOSED else None
    settled = False if order.pending_reconcile else None
    order.pending_reconcile = False
    return Change(status, reason, pending_reconcile=settled)


def _hear_status(order: OrderState, event: Heard) -> Verdict:
    said = str(event.payload.get("status"))
    if said in ("PENDING_SUBMIT", "ROUTED"):
        return _hear_working(order, event, said)
    if said == "FILLED":
        # Executions tell what was filled, before this or after it; if none comes, the order goes
        # stale and the broker is asked.
        return Verdict(Finding.REPEAT if order.status == "FILLED" else Finding.IGNORED)
    if said in ("CANCELED", "EXPIRED", "INACTIVE"):
        return _hear_end(order, event, said)
    return Verdict(Finding.CONTRADICTION, "STATUS_UNKNOWN", [_alarm(order, "STATUS_UNKNOWN", said)])


def _hear_working(order: OrderState, event: Heard, said: str) -> Verdict:
    if order.status in _BEFORE_ROUTED and order.status != said:
        return Verdict(Finding.NEW, None, [_move(order, event, said)])
    if order.status == said:
        return Verdict(Finding.REPEAT)
    guessed = order.status in ("CANCELED", "REJECTED") and order.filled == 0 and said == "ROUTED"
    if guessed and order.closed_at is not None and event.event_at > order.closed_at:
        was = order.status
        change = _move(order, event, "ROUTED", f"NOT_{was}")
        return Verdict(
            Finding.CONTRADICTION,
            "STATUS_CONTRADICTION",
            [change, _alarm(order, "STATUS_CONTRADICTION", f"was {was}, the broker works it")],
        )
    return Verdict(Finding.STALE)


def _hear_end(order: OrderState, event: Heard, said: str) -> Verdict:
    if not order.is_open:
        same = order.status == said or (order.status, said) == ("CANCELED", "INACTIVE")
        return Verdict(Finding.REPEAT if same else Finding.STALE)
    reason = event.payload.get("reason")
    if said != "INACTIVE":
        return Verdict(Finding.NEW, None, [_move(order, event, said, reason)])
    if order.status in _BEFORE_ROUTED:
        return _refuse(order, event, "INACTIVE", str(reason or "the broker holds it inactive"))
    change = _move(order, event, "CANCELED", "CANCEL_REDUNDANT")
    return Verdict(Finding.NEW, None, [change, Tell("CANCEL_REDUNDANT", {"said": said})])


def _hear_rejected(order: OrderState, event: Heard) -> Verdict:
    code, message = str(event.payload.get("code")), str(event.payload.get("message", ""))
    if order.is_open:
        return _refuse(order, event, code, message)
    if order.status == "REJECTED":
        return Verdict(Finding.REPEAT)
    if order.status == "FILLED":
        words = f"is FILLED, the broker says it refused it: {code} {message}"
        alarm = _alarm(order, "STATUS_CONTRADICTION", words)
        return Verdict(Finding.CONTRADICTION, "STATUS_CONTRADICTION", [alarm])
    return Verdict(Finding.STALE)


def _refuse(order: OrderState, event: Heard, code: str, message: str) -> Verdict:
    """The broker won't have it; what it filled before stays filled."""
    words = f"{code}: {message}".rstrip(": ")
    if order.filled > 0:
        return Verdict(Finding.NEW, None, [_move(order, event, "CANCELED", words)])
    move = _move(order, event, "REJECTED", words)
    effects: list[Effect] = [
        Change(move.status, words, reject_code=code, pending_reconcile=move.pending_reconcile)
    ]
    return Verdict(Finding.NEW, None, effects)


def _hear_cancel_rejected(order: OrderState, event: Heard) -> Verdict:
    code = str(event.payload.get("code"))
    if not order.is_open:
        found = Finding.REPEAT if order.status == "CANCELED" else Finding.IGNORED
        return Verdict(found, None, [Tell("CANCEL_IGNORED", {"status": order.status})])
    if code in _GONE:
        change = _move(order, event, "CANCELED", "CANCEL_REDUNDANT")
        return Verdict(Finding.NEW, None, [change, Tell("CANCEL_REDUNDANT", {"said": code})])
    if code == "NOT_FOUND":
        # Not among the broker's orders may also mean: just filled. It is asked.
        order.pending_reconcile = True
        return Verdict(Finding.NEW, "CANCEL_NOT_FOUND", [Change(pending_reconcile=True)])
    if order.status != "PENDING_CANCEL":
        return Verdict(Finding.STALE)
    change = _move(order, event, order.working, f"CANCEL_REJECTED: {code}")
    return Verdict(Finding.NEW, None, [change, Tell("CANCEL_IGNORED", {"code": code})])


def _hear_modified(order: OrderState, event: Heard) -> Verdict:
    if not order.is_open:
        return Verdict(Finding.STALE)
    quantity = event.amount("quantity")
    terms = Terms(
        order.terms.quantity if quantity is None else quantity,
        event.amount("limit_price"),
        event.amount("stop_price"),
    )
    waits = order.status == "PENDING_MODIFY"
    if terms == order.terms:
        if waits:
            return Verdict(Finding.NEW, None, [_move(order, event, order.working)])
        return Verdict(Finding.REPEAT)
    if terms not in order.asked:
        order.pending_reconcile = True
        alarm = _alarm(order, "TERMS_CONTRADICTION", f"nobody asked for {terms}")
        return Verdict(
            Finding.CONTRADICTION, "TERMS_CONTRADICTION", [Change(pending_reconcile=True), alarm]
        )
    was, order.terms = order.status, terms
    if order.filled >= terms.quantity:
        move = _move(order, event, "FILLED")
    elif waits:
        move = _move(order, event, order.working)
    else:
        return Verdict(Finding.NEW, None, [Change(terms=terms)])
    status = None if move.status == was else move.status
    changed = Change(status, terms=terms, pending_reconcile=move.pending_reconcile)
    return Verdict(Finding.NEW, None, [changed])


def _hear_modify_rejected(order: OrderState, event: Heard) -> Verdict:
    if order.status != "PENDING_MODIFY":
        return Verdict(Finding.STALE)
    code = str(event.payload.get("code"))
    change = _move(order, event, order.working, f"MODIFY_REJECTED: {code}")
    return Verdict(Finding.NEW, None, [change, Tell("MODIFY_REJECTED", {"code": code})])


def _hear_execution(order: OrderState, event: Heard) -> Verdict:
    quantity, price = event.amount("quantity"), event.amount("price")
    execution_id = event.execution_id
    if execution_id is None or quantity is None or price is None:
        return _not_booked(order, event, Finding.REFUSED, "EXECUTION_INCOMPLETE", "lacks its facts")
    if quantity == 0:
        return Verdict(
            Finding.IGNORED, None, [Tell("FILL_ZERO_QTY", {"execution_id": execution_id})]
        )
    if quantity < 0:
        words = f"execution {execution_id} of {quantity} units"
        return _not_booked(order, event, Finding.REFUSED, "NEGATIVE_QTY", words)
    if price <= 0 and not order.negative_price_allowed:
        words = f"execution {execution_id} of {quantity} at {price}"
        return _not_booked(order, event, Finding.REFUSED, "NEGATIVE_PRICE", words)
    if (event.payload.get("symbol", order.symbol), event.payload.get("side", order.side)) != (
        order.symbol,
        order.side,
    ):
        words = f"execution {execution_id} is of another symbol or side"
        return _not_booked(order, event, Finding.CONTRADICTION, "EXECUTION_CONTRADICTION", words)
    return _book(order, event, execution_id, Executed(quantity, price))


def _book(order: OrderState, event: Heard, execution_id: str, executed: Executed) -> Verdict:
    known = order.executions.get(execution_id)
    if known == executed:
        return Verdict(
            Finding.REPEAT, None, [Tell("FILL_DUPLICATE", {"execution_id": execution_id})]
        )
    if known is not None:
        words = f"execution {execution_id} was {known.quantity} at {known.price}"
        return _not_booked(order, event, Finding.CONTRADICTION, "EXECUTION_CONTRADICTION", words)
    before = _revision_before(order, execution_id)
    if before == execution_id:
        return Verdict(Finding.STALE, "EXECUTION_SUPERSEDED")
    was = order.status
    effects: list[Effect] = []
    finding, code = Finding.NEW, None
    if before is not None:
        finding, code = Finding.CORRECTION, "EXECUTION_CORRECTED"
        effects.append(_take_back(order, event, before))
        effects.append(Tell(code, {"execution_id": execution_id, "corrects": before}))
    effects.insert(
        1 if before else 0, Execute(execution_id, executed.quantity, executed.price, event.event_at)
    )
    order.executions[execution_id] = executed
    order.filled += executed.quantity
    effects += _follow_fills(order, event, was)
    if was in ("CANCELED", "EXPIRED", "REJECTED") and before is None:
        effects.append(Tell("FILL_AFTER_CANCEL", {"execution_id": execution_id, "was": was}))
    if order.filled > order.terms.quantity and not order.recovered:
        over = order.filled - order.terms.quantity
        effects.append(_alarm(order, "OVERFILL", f"{over} more than ordered were filled"))
    return Verdict(finding, code, effects)


def _hear_bust(order: OrderState, event: Heard) -> Verdict:
    execution_id = event.execution_id or ""
    if execution_id in order.reversed:
        return Verdict(Finding.REPEAT)
    if execution_id not in order.executions:
        return Verdict(Finding.HELD)
    was = order.status
    effects: list[Effect] = [_take_back(order, event, execution_id)]
    effects += _follow_fills(order, event, was)
    effects.append(_alarm(order, "EXECUTION_BUSTED", f"execution {execution_id} was taken back"))
    return Verdict(Finding.CORRECTION, "EXECUTION_BUSTED", effects)


def _take_back(order: OrderState, event: Heard, execution_id: str) -> Execute:
    booked = order.executions[execution_id]
    order.reversed.add(execution_id)
    order.filled -= booked.quantity
    return Execute(
        f"{execution_id}-R", -booked.quantity, booked.price, event.event_at, execution_id
    )


def _follow_fills(order: OrderState, event: Heard, was: str) -> list[Effect]:
    """Where the database puts the order when its fills change, and where it belongs then."""
    if order.filled >= order.terms.quantity:
        order.status = "FILLED"
    elif was not in ("PENDING_CANCEL", "PENDING_MODIFY"):
        order.status = order.working
    if order.status == was or order.status == "FILLED":
        if order.status == "FILLED" != was:
            order.closed_at = event.event_at
        return []
    if was in ("CANCELED", "EXPIRED"):
        return [_move(order, event, was, "FILL_AFTER_CANCEL")]
    if was == "FILLED":
        return [_move(order, event, "CANCELED", "BUST")]
    if was == "REJECTED":
        # The refusal was a guess: whether the rest still works is the broker's to say.
        order.pending_reconcile = True
        return [Change(pending_reconcile=True)]
    return []


def _revision_before(order: OrderState, execution_id: str) -> str | None:
    """The booked revision of an execution that ``execution_id`` corrects.

    ``execution_id`` itself where a newer revision is booked already; ``None`` where it is the
    first. Source: IB's execution ids, of which those that differ only after the last dot are
    revisions of one execution.
    """
    family, dot, revision = execution_id.rpartition(".")
    if not dot:
        return None
    booked = [
        known
        for known in order.executions
        if known not in order.reversed and known.rpartition(".")[:2] == (family, dot)
    ]
    if not booked:
        return None
    newest = max(booked, key=lambda known: _order_of(known.rpartition(".")[2]))
    return newest if _order_of(newest.rpartition(".")[2]) < _order_of(revision) else execution_id


def _order_of(revision: str) -> tuple[int, str]:
    return (int(revision) if revision.isdigit() else -1, revision)


def _hear_commission(order: OrderState, event: Heard) -> Verdict:
    execution_id, amount = event.execution_id or "", event.amount("amount")
    currency = str(event.payload.get("currency"))
    if amount is None:
        return _not_booked(
            order, event, Finding.REFUSED, "COMMISSION_INCOMPLETE", "lacks its amount"
        )
    if execution_id not in order.executions:
        return Verdict(Finding.HELD)
    known = order.commissions.get(execution_id)
    if known == (amount, currency):
        return Verdict(Finding.REPEAT)
    if known is not None:
        words = f"commission of {execution_id} was {known[0]} {known[1]}, now {amount} {currency}"
        return _not_booked(order, event, Finding.CONTRADICTION, "COMMISSION_CONTRADICTION", words)
    order.commissions[execution_id] = (amount, currency)
    return Verdict(Finding.NEW, None, [Charge(execution_id, amount, currency, event.event_at)])


def _not_booked(
    order: OrderState, event: Heard, finding: Finding, code: str, words: str
) -> Verdict:
    return Verdict(finding, code, [_alarm(order, code, f"{words}; it was not booked")])


def _alarm(order: OrderState, code: str, words: str) -> Tell:
    return Tell(code, {"message": words}, f"order {order.order_id} in {order.symbol}: {words}")


_RULES: dict[str, Callable[[OrderState, Heard], Verdict]] = {
    "ORDER_STATUS": _hear_status,
    "REJECTED": _hear_rejected,
    "CANCEL_REJECTED": _hear_cancel_rejected,
    "MODIFIED": _hear_modified,
    "MODIFY_REJECTED": _hear_modify_rejected,
    "EXECUTION": _hear_execution,
    "BUST": _hear_bust,
    "COMMISSION": _hear_commission,
}
