"""What the exchange asks of an order before it takes it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import NamedTuple

from engine.brokers.dummy.book import Book
from engine.brokers.dummy.ledger import Ledger
from engine.brokers.dummy.model import BUY, SELL, ZERO, Order, Symbol
from engine.quantities import EXACT

__all__ = ["Margin", "Refused", "check_terms", "margin_after"]

_TYPES = frozenset({"MARKET", "LIMIT", "STOP", "STOP_LIMIT", "TRAIL"})
_TIMES = frozenset({"DAY", "GTC", "IOC", "FOK", "GTD"})


class Refused(Exception):
    """A request is refused: a code and a sentence."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Margin(NamedTuple):
    """What the account needs with the order filled, what is then left, and whether it needs more
    than before."""

    initial: Decimal
    excess: Decimal
    grows: bool


def check_terms(order: Order, symbol: Symbol, now: datetime) -> None:
    """Raises Refused for an order whose terms make no sense."""
    if order.side not in (BUY, SELL):
        raise Refused("BAD_SIDE", f"There is no side {order.side}.")
    if order.quantity <= ZERO:
        raise Refused("BAD_QUANTITY", "The quantity must be positive.")
    if order.order_type not in _TYPES:
        raise Refused("UNSUPPORTED", f"There are no orders of type {order.order_type}.")
    if order.time_in_force not in _TIMES:
        raise Refused("UNSUPPORTED", f"There is no time in force {order.time_in_force}.")
    _check_prices(order, symbol)
    if order.time_in_force == "GTD" and (order.expire_at is None or order.expire_at <= now):
        raise Refused("BAD_EXPIRY", "A GTD order needs an end that lies ahead.")


def _check_prices(order: Order, symbol: Symbol) -> None:
    trails = [each for each in (order.trail_amount, order.trail_percent) if each is not None]
    complete = {
        "MARKET": order.limit_price is None and order.stop_price is None,
        "LIMIT": order.limit_price is not None,
        "STOP": order.stop_price is not None and order.limit_price is None,
        "STOP_LIMIT": order.stop_price is not None and order.limit_price is not None,
        "TRAIL": len(trails) == 1 and trails[0] > ZERO and order.limit_price is None,
    }
    if not complete[order.order_type]:
        raise Refused("BAD_PRICE", f"A {order.order_type} order has other prices.")
    prices = [each for each in (order.limit_price, order.stop_price) if each is not None]
    if not symbol.negative_prices and any(price <= ZERO for price in prices):
        raise Refused("BAD_PRICE", f"The price of {symbol.name} can't be zero or below.")


def margin_after(ledger: Ledger, books: Mapping[str, Book], order: Order, rate: Decimal) -> Margin:
    """What the order would do to the margin; money of all currencies counts alike."""
    account = ledger.account(order.account)
    worth = needed = ZERO
    for amount in account.cash.values():
        worth = EXACT.add(worth, amount)
    for name, holding in account.holdings.items():
        value = EXACT.multiply(holding.quantity, _price(books.get(name)))
        worth = EXACT.add(worth, value)
        needed = EXACT.add(needed, abs(value))
    held = account.holdings.get(order.symbol)
    before = ZERO if held is None else held.quantity
    left = order.remaining if order.side == BUY else order.remaining.copy_negate()
    after = EXACT.add(before, left)
    price = _price(books.get(order.symbol)) if order.limit_price is None else order.limit_price
    change = EXACT.multiply(EXACT.subtract(abs(after), abs(before)), abs(price))
    initial = EXACT.multiply(EXACT.add(needed, change), rate)
    return Margin(initial, EXACT.subtract(worth, initial), abs(after) > abs(before))


def _price(book: Book | None) -> Decimal:
    return ZERO if book is None or book.symbol.price is None else book.symbol.price
