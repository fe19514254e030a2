"""What each fault does to the exchange. Those that only change how something is done, such as
REJECT or COMMISSION_FIRST, act where it is done."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.brokers.dummy.faults import (
    Bust,
    ChangePermId,
    ChangeSymbol,
    Correct,
    Drop,
    Fault,
    Fill,
    Fills,
    Forget,
    Freeze,
    ManualOrder,
    NegativeFill,
    OrphanOrder,
    Overfill,
    RestartOrderIds,
    SetPrice,
    SetSession,
    Silence,
    SkewClock,
    Steal,
    SwitchAccount,
    WrapOrderIds,
    ZeroFill,
)
from engine.brokers.dummy.model import HAND, ZERO, Order, Report
from engine.brokers.dummy.post import Session
from engine.brokers.dummy.terms import Refused
from engine.brokers.protocol import BrokerOrder
from engine.quantities import EXACT

if TYPE_CHECKING:
    from decimal import Decimal

    from engine.brokers.dummy.exchange import Exchange

__all__ = ["Subject", "do_mischief", "place"]

# References that we never gave: the same for the same order, so that a run can be repeated.
_ORPHANS = uuid.UUID("0f5d8f8e-54b5-5f0c-9a60-2f6b8a4b9d11")
# Executions that are told and never were have numbers that no other has.
_FALSE_FROM = 900_000_000


@dataclass(slots=True)
class Subject:
    """What a fault strikes at."""

    account: str
    session: Session | None = None
    order: Order | None = None
    report: Report | None = None


def do_mischief(exchange: Exchange, fault: Fault, subject: Subject) -> None:
    """Do what a fault says."""
    act = _ACTS.get(type(fault))
    if act is not None:
        act(exchange, fault, subject)


def place(exchange: Exchange, wanted: BrokerOrder, account: str, client_id: int) -> Order:
    """Place an order that no client has asked for; returns it, even if it is rejected."""
    order = exchange.accept(wanted, account, client_id)
    try:
        exchange.check(order)
    except Refused as refused:
        exchange.end(order, "REJECTED", refused.code)
    else:
        exchange.work(order)
    return order


def _sessions(exchange: Exchange, subject: Subject) -> list[Session]:
    """The connection in question, or all of the account where it is about none."""
    sessions = exchange.post.sessions
    if subject.session is not None:
        found = sessions.get(subject.session.number)
        return [] if found is None else [found]
    return [session for session in sessions.values() if session.account == subject.account]


def _drop(exchange: Exchange, fault: Any, subject: Subject) -> None:
    for session in _sessions(exchange, subject):
        exchange.post.drop(session.number)


def _silence(exchange: Exchange, fault: Any, subject: Subject) -> None:
    seconds = None if fault.seconds is None else float(fault.seconds)
    for session in _sessions(exchange, subject):
        exchange.post.silence(session, seconds)


def _steal(exchange: Exchange, fault: Any, subject: Subject) -> None:
    for session in _sessions(exchange, subject):
        exchange.steal(session, fault.by)


def _switch_account(exchange: Exchange, fault: Any, subject: Subject) -> None:
    for session in _sessions(exchange, subject):
        exchange.switch_account(session, fault.account)


def _freeze(exchange: Exchange, fault: Any, subject: Subject) -> None:
    exchange.freeze(True)


def _forget(exchange: Exchange, fault: Any, subject: Subject) -> None:
    order = subject.order
    if order is not None and order.is_open:
        exchange.forget(order)


def _fill(exchange: Exchange, fault: Any, subject: Subject) -> None:
    concerned = [subject.order] if subject.order else exchange.open_orders(subject.account)
    for order in concerned:
        book = exchange.books.get(order.symbol)
        quantity = order.remaining
        if fault.quantity is not None:
            quantity = min(quantity, fault.quantity)
        if quantity > ZERO and book is not None and book.symbol.price is not None:
            exchange.fill(order, quantity, book.symbol.price)


def _fills(exchange: Exchange, fault: Any, subject: Subject) -> None:
    order = subject.order
    if order is None or not order.is_open:
        return
    for piece in fault.slices:
        quantity: Decimal = min(piece.quantity, order.remaining)
        if quantity > ZERO:
            exchange.fill(order, quantity, piece.price)
    if order.is_open and order.status == "ROUTED":
        exchange.put_in_book(order)
    else:
        order.aside = False


def _overfill(exchange: Exchange, fault: Any, subject: Subject) -> None:
    if subject.order is not None and subject.report is not None and not subject.order.remaining:
        order, price = subject.order, subject.report.price
        order.filled = EXACT.add(order.filled, fault.quantity)
        report = exchange.ledger.execution(order, fault.quantity, price, exchange.now())
        exchange.tell_report(report)
        exchange.tell_status(order)


def _correct(exchange: Exchange, fault: Any, subject: Subject) -> None:
    report = _current(exchange, subject)
    if report is not None:
        quantity = EXACT.add(report.quantity, fault.quantity_change)
        price = EXACT.add(report.price, fault.price_change)
        if quantity > ZERO:
            exchange.correct(report, quantity, price)


def _bust(exchange: Exchange, fault: Any, subject: Subject) -> None:
    report = _current(exchange, subject)
    if report is not None:
        exchange.bust(report)


def _current(exchange: Exchange, subject: Subject) -> Report | None:
    return subject.report and exchange.ledger.effective(subject.report.execution_id)


def _zero_fill(exchange: Exchange, fault: Any, subject: Subject) -> None:
    _tell_false_fill(exchange, subject, "0", None)


def _negative_fill(exchange: Exchange, fault: Any, subject: Subject) -> None:
    _tell_false_fill(exchange, subject, f"{fault.quantity:f}", f"{fault.price:f}")


def _tell_false_fill(
    exchange: Exchange, subject: Subject, quantity: str, price: str | None
) -> None:
    order = subject.order
    if order is None or order.number not in exchange.orders:
        return
    book = exchange.books.get(order.symbol)
    last = ZERO if book is None or book.symbol.price is None else book.symbol.price
    payload = {
        "execution_id": f"{_FALSE_FROM + 2 * order.number + (price is None)}.01",
        "symbol": order.symbol,
        "side": order.side,
        "quantity": quantity,
        "price": price or f"{last:f}",
    }
    exchange.say_of(order, "EXECUTION", payload)


def _next_order_id(exchange: Exchange, fault: Any, subject: Subject) -> None:
    exchange.set_next_order_id(fault.next)


def _change_perm_id(exchange: Exchange, fault: Any, subject: Subject) -> None:
    if subject.order is not None and subject.order.number in exchange.orders:
        exchange.change_perm_id(subject.order)


def _skew_clock(exchange: Exchange, fault: Any, subject: Subject) -> None:
    exchange.set_skew(float(fault.seconds))


def _manual_order(exchange: Exchange, fault: Any, subject: Subject) -> None:
    symbol = fault.of or (subject.order.symbol if subject.order else None)
    if symbol is None:
        return
    kind = "MARKET" if fault.limit_price is None else "LIMIT"
    wanted = BrokerOrder(
        "", symbol, fault.direction, fault.quantity, kind, "DAY", fault.limit_price
    )
    place(exchange, wanted, subject.account, HAND)


def _orphan_order(exchange: Exchange, fault: Any, subject: Subject) -> None:
    reference = str(uuid.uuid5(_ORPHANS, f"{subject.account}/{len(exchange.orders)}"))
    client_id = subject.session.client_id if subject.session else 0
    wanted = BrokerOrder(reference, fault.of, fault.direction, fault.quantity, "MARKET", "DAY")
    place(exchange, wanted, subject.account, client_id)


def _change_symbol(exchange: Exchange, fault: Any, subject: Subject) -> None:
    exchange.rename(fault.old, fault.new)


def _set_price(exchange: Exchange, fault: Any, subject: Subject) -> None:
    exchange.set_price(fault.of, fault.price)


def _set_session(exchange: Exchange, fault: Any, subject: Subject) -> None:
    exchange.set_session(fault.to == "OPEN")


_ACTS: dict[type[Fault], Callable[[Exchange, Any, Subject], None]] = {
    Drop: _drop,
    Silence: _silence,
    Steal: _steal,
    SwitchAccount: _switch_account,
    Freeze: _freeze,
    Forget: _forget,
    Fill: _fill,
    Fills: _fills,
    Overfill: _overfill,
    Correct: _correct,
    Bust: _bust,
    ZeroFill: _zero_fill,
    NegativeFill: _negative_fill,
    RestartOrderIds: _next_order_id,
    WrapOrderIds: _next_order_id,
    ChangePermId: _change_perm_id,
    SkewClock: _skew_clock,
    ManualOrder: _manual_order,
    OrphanOrder: _orphan_order,
    ChangeSymbol: _change_symbol,
    SetPrice: _set_price,
    SetSession: _set_session,
}
