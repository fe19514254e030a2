"""What becomes of an order when its broker speaks: pure rules, without a database.

The broker is right about what happened; what it says may come twice, late, out of sequence or not
at all. So executions are facts that count once each, wherever in the sequence they arrive, what
ended an order is remembered even where fills hide it, and which of two words is the newer one the
broker's time decides: where an order stands follows from what was said, not from when it came.
``hear`` says what an event turns out to be and what is to be written; writing it is the inbox's
business (``engine.inbox``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from typing import Any
from uuid import UUID

from engine.orders.model import Side

CLOSED = frozenset({"FILLED", "CANCELED", "REJECTED", "EXPIRED"})
_BEFORE_ROUTED = ("NEW", "PENDING", "PENDING_SUBMIT")
# Answers to a cancel that mean: there is nothing left to cancel.
_GONE = ("ALREADY_CANCELED", "INACTIVE")
# Answers that mean: the broker doesn't find it.
_NOT_FOUND = ("NOT_FOUND", "UNKNOWN_ORDER")
# What a word says of an order's life, by its kind and its status or code.
_SAYS = {
    **{("ORDER_STATUS", end): end for end in ("ROUTED", "CANCELED", "EXPIRED", "INACTIVE")},
    **{("CANCEL_REJECTED", code): "CANCELED" for code in _GONE},
    ("REJECTED", ""): "REJECTED",
}
_REFUSALS = ("CANCEL_REJECTED", "MODIFY_REJECTED", "REJECTED")
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
        """A number of the payload, exactly as the broker said it; ``None`` for what is none."""
        try:
            value = Decimal(str(self.payload.get(key)))
        except InvalidOperation:
            return None
        return value if value.is_finite() else None


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
    event_at: datetime | None = field(default=None, compare=False)


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
    # What the broker said last of its end (CANCELED, EXPIRED, REJECTED or INACTIVE), and when, on
    # the broker's clock; without a time it ended here.
    end: str | None = None
    closed_at: datetime | None = None
    # When the broker last said that it works it, and what terms it has.
    worked_at: datetime | None = None
    terms_at: datetime | None = None
    executions: dict[str, Executed] = field(default_factory=dict)
    # When each was taken back.
    reversed: dict[str, datetime] = field(default_factory=dict)
    commissions: dict[str, tuple[Decimal, str]] = field(default_factory=dict)
    # Terms that commands have asked for: the broker may confirm these and no others.
    asked: list[Terms] = field(default_factory=list)
    # Refusals that were heard already; one that is repeated answers nothing newer.
    refusals: set[tuple[str, datetime]] = field(default_factory=set)
    ids: set[tuple[int, int]] = field(default_factory=set)

    @property
    def is_open(self) -> bool:
        return self.status not in CLOSED

    @property
    def working(self) -> str:
        """The status of an order that the broker works, by what is filled."""
        return "PARTIALLY_FILLED" if self.filled > 0 else "ROUTED"

    def remember(self, kind: str, payload: Mapping[str, Any], at: datetime) -> None:
        """Keep what a word says of the order's life, whatever is made of the word."""
        said = _SAYS.get((kind, str(payload.get("status" if kind == "ORDER_STATUS" else "code"))))
        said = said or _SAYS.get((kind, ""))
        if said == "ROUTED":
            self.worked_at = _later(self.worked_at, at)
        elif said is not None and self.ended is None:
            self.end, self.closed_at = said, _later(self.closed_at, at)
        elif said is not None and self.closed_at is not None:
            self.closed_at = max(self.closed_at, at)
        if kind in _REFUSALS:
            self.refusals.add((kind, at))

    @property
    def ended(self) -> str | None:
        """The status in which the broker ended it; ``None`` if it has worked it since."""
        if self.end is None:
            return None
        worked = None if self.end == "EXPIRED" else self.worked_at
        refused = self.end in ("REJECTED", "INACTIVE")
        if refused:
            # A fill from after a refusal proves it wrong, one from before it has its place.
            for done in self.executions.values():
                worked = _later(worked, done.event_at)
        if self.closed_at is not None and worked is not None and worked > self.closed_at:
            return None
        if self.end == "INACTIVE" and (self.worked_at is not None or self._asked_back):
            return "CANCELED"
        if refused:
            return "CANCELED" if self.executions else "REJECTED"
        return self.end

    @property
    def _asked_back(self) -> bool:
        return self.status in ("PENDING_CANCEL", "CANCELED")

    @property
    def stands(self) -> str:
        """The status in which it is by all that the broker has said of it, in whatever sequence."""
        if self.filled >= self.terms.quantity:
            return "FILLED"
        if (ended := self.ended) is not None:
            return ended
        if self._was_filled():
            return "CANCELED"
        if self.status in ("PENDING_CANCEL", "PENDING_MODIFY"):
            return self.status
        if self.status in _BEFORE_ROUTED and self.worked_at is None and not self.executions:
            return self.status
        return self.working

    def _was_filled(self) -> bool:
        """Whether it was filled in whole at a moment of the broker's, before a fill was taken back.

        An exchange doesn't take up again what it was done with.
        """
        if not self.reversed:
            return False
        spans = [
            (done.event_at, self._taken_back_at(name), done.quantity)
            for name, done in self.executions.items()
            if done.event_at is not None
        ]
        moments = {since for since, _, _ in spans}
        if self.terms_at is not None:
            moments = {max(moment, self.terms_at) for moment in moments}
        return any(
            sum(
                quantity
                for since, until, quantity in spans
                if since <= moment and (until is None or moment < until)
            )
            >= self.terms.quantity
            for moment in moments
        )

    def _taken_back_at(self, name: str) -> datetime | None:
        """When an execution was busted or first corrected."""
        if name not in self.reversed:
            return None
        moments = [self.reversed[name]]
        for other, done in self.executions.items():
            if _is_newer_revision(other, name) and done.event_at is not None:
                moments.append(done.event_at)
        return min(moments)


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
    effects: Sequence[Effect] = ()

    @property
    def codes(self) -> list[str]:
        return [effect.code for effect in self.effects if isinstance(effect, Tell)]


def hear(order: OrderState, event: Heard) -> Verdict:
    """Say what ``event`` is to ``order`` and what to write; the order is moved along."""
    identified = _identify(order, event)
    rule = _RULES.get(event.kind)
    verdict = rule(order, event) if rule else Verdict(Finding.IGNORED)
    order.remember(event.kind, event.payload, event.event_at)
    verdict.effects = [*identified, *verdict.effects]
    # What is held is heard again, and told of then.
    if event.event_at - event.received_at > SKEW_MAX and verdict.finding is not Finding.HELD:
        seconds = (event.received_at - event.event_at).total_seconds()
        skew = Tell("TIME_SKEW", {"seconds": seconds}, skew_words(seconds))
        verdict.effects = [*verdict.effects, skew]
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
    perms = {perm for _, perm in order.ids} - {0}
    order.ids.add(pair)
    effects: list[Effect] = [Identify(*pair, event.event_at)]
    if pair[0] >= LAST_BROKER_ORDER_ID:
        effects.append(Tell("ORDER_ID_WRAP", {"perm_id": pair[1]}))
    elif pair[1] and perms and pair[1] not in perms:
        effects.append(Tell("PERM_ID_CHANGED", {"perm_id": pair[1]}))
    return effects


def _move(
    order: OrderState, status: str, reason: str | None = None, reject_code: str | None = None
) -> list[Change]:
    """Move the order; what was refused and then turns out to have been worked goes by ROUTED."""
    moves = []
    if (order.status, status) == ("REJECTED", "CANCELED"):
        moves.append(Change("ROUTED", reason))
    order.status = status
    settled = False if order.pending_reconcile else None
    order.pending_reconcile = False
    return [*moves, Change(status, reason, reject_code, pending_reconcile=settled)]


def _later(one: datetime | None, other: datetime | None) -> datetime | None:
    if one is None or other is None:
        return one or other
    return max(one, other)


def _hear_status(order: OrderState, event: Heard) -> Verdict:
    said = str(event.payload.get("status"))
    if said == "PENDING_SUBMIT":
        if order.status in ("NEW", "PENDING"):
            return Verdict(Finding.NEW, None, _move(order, said))
        return Verdict(Finding.REPEAT if order.status == said else Finding.STALE)
    if said == "ROUTED":
        return _hear_routed(order, event)
    if said == "FILLED":
        # Executions tell what was filled, before this or after it; if none comes, the order goes
        # stale and the broker is asked.
        return Verdict(Finding.REPEAT if order.status == "FILLED" else Finding.IGNORED)
    if said in ("CANCELED", "EXPIRED", "INACTIVE"):
        return _hear_end(order, event, said)
    return Verdict(Finding.CONTRADICTION, "STATUS_UNKNOWN", [_alarm(order, "STATUS_UNKNOWN", said)])


def _hear_routed(order: OrderState, event: Heard) -> Verdict:
    was = order.status
    order.remember(event.kind, event.payload, event.event_at)
    stands = order.stands
    if stands == was:
        return Verdict(Finding.REPEAT if was == "ROUTED" else Finding.STALE)
    if order.is_open:
        return Verdict(Finding.NEW, None, _move(order, stands))
    moves = _move(order, stands, f"NOT_{was}")
    if not order.is_open:
        return Verdict(Finding.NEW, None, moves)
    alarm = _alarm(order, "STATUS_CONTRADICTION", f"was {was}, the broker works it")
    return Verdict(Finding.CONTRADICTION, "STATUS_CONTRADICTION", [*moves, alarm])


def _hear_end(order: OrderState, event: Heard, said: str) -> Verdict:
    was = order.status
    order.remember(event.kind, event.payload, event.event_at)
    if not order.is_open:
        same = was == said or (was, said) == ("CANCELED", "INACTIVE")
        return Verdict(Finding.REPEAT if same else Finding.STALE)
    stands = order.stands
    if stands not in CLOSED:
        # Older than the broker's word that it works it.
        return Verdict(Finding.STALE)
    reason = event.payload.get("reason")
    if said != "INACTIVE":
        return Verdict(Finding.NEW, None, _move(order, stands, reason))
    if stands == "REJECTED":
        words = f"INACTIVE: {reason or 'the broker holds it inactive'}"
        return Verdict(Finding.NEW, None, _move(order, stands, words, "INACTIVE"))
    effects = _move(order, stands, "CANCEL_REDUNDANT")
    return Verdict(Finding.NEW, None, [*effects, Tell("CANCEL_REDUNDANT", {"said": said})])


def _hear_rejected(order: OrderState, event: Heard) -> Verdict:
    """The broker won't have it; what it filled before stays filled."""
    code, message = str(event.payload.get("code")), str(event.payload.get("message", ""))
    if ("REJECTED", event.event_at) in order.refusals or order.status == "REJECTED":
        return Verdict(Finding.REPEAT)
    order.remember(event.kind, event.payload, event.event_at)
    words = f"{code}: {message}".rstrip(": ")
    if order.status in ("CANCELED", "EXPIRED"):
        return Verdict(Finding.STALE)
    stands = order.stands
    if stands in ("CANCELED", "REJECTED"):
        refusal = code if stands == "REJECTED" else None
        return Verdict(Finding.NEW, None, _move(order, stands, words, refusal))
    effects: list[Effect] = []
    if order.is_open:
        order.pending_reconcile = True
        effects.append(Change(pending_reconcile=True))
    said = f"is {order.status}, the broker says it refused it: {words}"
    effects.append(_alarm(order, "STATUS_CONTRADICTION", said))
    return Verdict(Finding.CONTRADICTION, "STATUS_CONTRADICTION", effects)


def _hear_cancel_rejected(order: OrderState, event: Heard) -> Verdict:
    code = str(event.payload.get("code"))
    if ("CANCEL_REJECTED", event.event_at) in order.refusals:
        return Verdict(Finding.REPEAT)
    if not order.is_open:
        found = Finding.REPEAT if order.status == "CANCELED" else Finding.IGNORED
        return Verdict(found, None, [Tell("CANCEL_IGNORED", {"status": order.status})])
    if code in _GONE:
        order.remember(event.kind, event.payload, event.event_at)
        if order.stands != "CANCELED":
            return Verdict(Finding.STALE)
        effects = _move(order, "CANCELED", "CANCEL_REDUNDANT")
        return Verdict(Finding.NEW, None, [*effects, Tell("CANCEL_REDUNDANT", {"said": code})])
    if code in _NOT_FOUND:
        # Not among the broker's orders may also mean: just filled. It is asked.
        order.pending_reconcile = True
        return Verdict(Finding.NEW, "CANCEL_NOT_FOUND", [Change(pending_reconcile=True)])
    if order.status != "PENDING_CANCEL":
        return Verdict(Finding.STALE)
    effects = _move(order, order.working, f"CANCEL_REJECTED: {code}")
    return Verdict(Finding.NEW, None, [*effects, Tell("CANCEL_IGNORED", {"code": code})])


def _hear_modified(order: OrderState, event: Heard) -> Verdict:
    quantity = event.amount("quantity")
    terms = Terms(
        order.terms.quantity if quantity is None else quantity,
        event.amount("limit_price"),
        event.amount("stop_price"),
    )
    if order.terms_at is not None and event.event_at <= order.terms_at:
        return Verdict(Finding.REPEAT if terms == order.terms else Finding.STALE)
    waits = order.status == "PENDING_MODIFY"
    if terms == order.terms:
        order.terms_at = event.event_at
        if waits:
            return Verdict(Finding.NEW, None, _move(order, order.working))
        return Verdict(Finding.REPEAT)
    if terms in order.asked:
        return _take_terms(order, event, terms)
    if not order.is_open:
        return Verdict(Finding.STALE)
    order.pending_reconcile = True
    alarm = _alarm(order, "TERMS_CONTRADICTION", f"nobody asked for {terms}")
    return Verdict(
        Finding.CONTRADICTION, "TERMS_CONTRADICTION", [Change(pending_reconcile=True), alarm]
    )


def _take_terms(order: OrderState, event: Heard, terms: Terms) -> Verdict:
    """Terms that were asked for hold from now on, and may show that an order is over, or isn't."""
    was = order.status
    order.terms, order.terms_at = terms, event.event_at
    if was in ("PENDING_MODIFY", "FILLED"):
        order.status = order.working
    stands = order.stands
    order.status = was
    if stands == was:
        # Of a closed order, too: a fill that is still on its way is measured by them.
        return Verdict(Finding.NEW, None, [Change(terms=terms)])
    # What was filled by its old terms works on by the new ones before anything can end it.
    works = Change("PARTIALLY_FILLED", terms=terms)
    change = replace(_move(order, stands)[-1], terms=terms)
    if was == "FILLED" and stands != works.status:
        return Verdict(Finding.NEW, None, [works, replace(change, terms=None)])
    return Verdict(Finding.NEW, None, [change])


def _hear_modify_rejected(order: OrderState, event: Heard) -> Verdict:
    if ("MODIFY_REJECTED", event.event_at) in order.refusals:
        return Verdict(Finding.REPEAT)
    if order.status != "PENDING_MODIFY":
        return Verdict(Finding.STALE)
    code = str(event.payload.get("code"))
    effects = _move(order, order.working, f"MODIFY_REJECTED: {code}")
    return Verdict(Finding.NEW, None, [*effects, Tell("MODIFY_REJECTED", {"code": code})])


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
    return _book(order, event, execution_id, Executed(quantity, price, event.event_at))


def _book(order: OrderState, event: Heard, execution_id: str, executed: Executed) -> Verdict:
    known = order.executions.get(execution_id)
    if known == executed:
        return Verdict(
            Finding.REPEAT, None, [Tell("FILL_DUPLICATE", {"execution_id": execution_id})]
        )
    if known is not None:
        words = f"execution {execution_id} was {known.quantity} at {known.price}"
        return _not_booked(order, event, Finding.CONTRADICTION, "EXECUTION_CONTRADICTION", words)
    was = order.status
    effects: list[Effect] = [
        Execute(execution_id, executed.quantity, executed.price, event.event_at)
    ]
    finding, code = Finding.NEW, None
    newer = [name for name in order.executions if _is_newer_revision(name, execution_id)]
    older = [
        name
        for name in order.executions
        if _is_newer_revision(execution_id, name) and name not in order.reversed
    ]
    order.executions[execution_id] = executed
    order.filled += executed.quantity
    if newer:
        # The correction came first: what it corrects is booked as it would have been, and gone.
        finding, code = Finding.CORRECTION, "EXECUTION_SUPERSEDED"
        known_at = min(order.executions[name].event_at or event.event_at for name in newer)
        effects.append(_take_back(order, execution_id, known_at))
        effects.append(Tell(code, {"execution_id": execution_id, "by": max(newer)}))
    for before in older:
        finding, code = Finding.CORRECTION, "EXECUTION_CORRECTED"
        effects.insert(0, _take_back(order, before, event.event_at))
        effects.append(Tell(code, {"execution_id": execution_id, "corrects": before}))
    effects += _follow_fills(order, was)
    if was in ("CANCELED", "EXPIRED", "REJECTED") and finding is Finding.NEW:
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
    effects: list[Effect] = [_take_back(order, execution_id, event.event_at)]
    effects += _follow_fills(order, was)
    effects.append(_alarm(order, "EXECUTION_BUSTED", f"execution {execution_id} was taken back"))
    return Verdict(Finding.CORRECTION, "EXECUTION_BUSTED", effects)


def _take_back(order: OrderState, execution_id: str, at: datetime) -> Execute:
    booked = order.executions[execution_id]
    order.reversed[execution_id] = at
    order.filled -= booked.quantity
    return Execute(f"{execution_id}-R", -booked.quantity, booked.price, at, execution_id)


def _follow_fills(order: OrderState, was: str) -> Sequence[Effect]:
    """Where the database puts the order when its fills change, and where it belongs then."""
    if order.filled >= order.terms.quantity:
        order.status = "FILLED"
        return []
    pending = was in ("PENDING_CANCEL", "PENDING_MODIFY")
    order.status = was if pending else order.working
    stands = order.stands
    if stands != order.status:
        reason = "FILL_AFTER_CANCEL" if was in ("CANCELED", "EXPIRED", "REJECTED") else "BUST"
        # From one end to another it goes by the work in between, which fills that are taken back at
        # once don't show.
        between = [Change(order.working)] if (was, stands) == ("CANCELED", "EXPIRED") else []
        return [*between, *_move(order, stands, reason)]
    if was == "REJECTED":
        # The refusal was a guess: whether the rest still works is the broker's to say.
        order.pending_reconcile = True
        return [Change(stands, pending_reconcile=True)]
    # The database looks at what a batch has filled in the end: a fill that is taken back at once
    # has moved nothing there.
    return [Change(stands)] if not pending and (order.filled == 0 or was == "FILLED") else []


def _is_newer_revision(one: str, other: str) -> bool:
    """Whether an execution id corrects another.

    Source: IB's execution ids, of which those that differ only in the number after the last dot
    are revisions of one execution.
    """
    family, its_family = one.rpartition("."), other.rpartition(".")
    if not family[1] or family[:2] != its_family[:2]:
        return False
    revision, its_revision = family[2], its_family[2]
    numbered = revision.isdecimal() and its_revision.isdecimal()
    return numbered and int(revision) > int(its_revision)


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
