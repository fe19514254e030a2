"""The book of one symbol: orders that wait, and what trades when the price moves.

The market is a price with so much to be had on each side; it is there anew whenever the price is
set. Orders trade against it and not against each other: market orders first, then limits by price,
then by arrival. A stop becomes a market order (or its limit) once the price is there, a trail's
stop follows the price and never goes back. Prices may be negative where the symbol allows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from decimal import Decimal
from heapq import heapify, heappop, heappush

from engine.brokers.dummy.model import BUY, SELL, ZERO, Order, Symbol, Trade
from engine.quantities import EXACT

__all__ = ["Book"]

_PERCENT_IN_ONE = Decimal(100)
_AT_ONCE = frozenset({"IOC", "FOK"})
# Left entries that a heap carries along before it is made anew.
_STALE_MIN = 1_000

_Entry = tuple[Decimal, int, Order]


class Book:
    """Orders of one symbol. An entry of a heap counts while its order still has that ticket.

    ``changed`` is told of each order that was triggered or whose stop has moved.
    """

    def __init__(self, symbol: Symbol, changed: Callable[[Order], None]) -> None:
        self.symbol = symbol
        self._changed = changed
        self._left: dict[str, Decimal | None] = {}
        self._tickets: dict[int, int] = {}
        self._next_ticket = 1
        self._markets: dict[int, Order] = {}
        self._trails: dict[int, Order] = {}
        # Smallest key first: what trades first, and what is triggered first.
        self._limits: dict[str, list[_Entry]] = {BUY: [], SELL: []}
        self._stops: dict[str, list[_Entry]] = {BUY: [], SELL: []}
        self.refill()

    def __len__(self) -> int:
        return len(self._tickets)

    def refill(self) -> None:
        """Let there be liquidity again, as after every new price."""
        self._left = dict.fromkeys((BUY, SELL), self.symbol.liquidity)

    def set_price(self, price: Decimal) -> list[Trade]:
        """Move the market and return what trades."""
        self.symbol.price = price
        self.refill()
        return self.sweep()

    def rest(self, order: Order) -> None:
        """Let an order wait without trading: the session is closed."""
        self._tickets[order.number] = self._next_ticket
        self._next_ticket += 1
        if order.order_type in ("STOP", "STOP_LIMIT") and not order.triggered:
            assert order.stop_price is not None
            key = order.stop_price if order.side == BUY else order.stop_price.copy_negate()
            self._push(self._stops[order.side], key, order)
        elif order.order_type == "TRAIL" and not order.triggered:
            self._trails[order.number] = order
        else:
            self._queue(order)

    def arrive(self, order: Order) -> list[Trade]:
        """Take an order in; what can't trade and may not wait isn't kept."""
        self.rest(order)
        trades = [] if self._must_be_killed(order) else self.sweep()
        if order.time_in_force in _AT_ONCE and order.number in self._tickets:
            self.remove(order)
        return trades

    def remove(self, order: Order) -> None:
        """Forget an order; one that isn't there is no matter."""
        self._tickets.pop(order.number, None)
        self._markets.pop(order.number, None)
        self._trails.pop(order.number, None)

    def sweep(self) -> list[Trade]:
        """Trigger what the price triggers, then trade what it allows."""
        price = self.symbol.price
        if price is None or not self._tickets:
            return []
        self._trigger(price)
        return [trade for side in (BUY, SELL) for trade in self._trades(side, price)]

    def _must_be_killed(self, order: Order) -> bool:
        left = self._left[order.side]
        return order.time_in_force == "FOK" and left is not None and left < order.remaining

    def _queue(self, order: Order) -> None:
        if order.limit_price is None:
            self._markets[order.number] = order
        else:
            key = order.limit_price.copy_negate() if order.side == BUY else order.limit_price
            self._push(self._limits[order.side], key, order)

    def _push(self, heap: list[_Entry], key: Decimal, order: Order) -> None:
        if len(heap) > _STALE_MIN and len(heap) > 2 * len(self._tickets):
            heap[:] = [entry for entry in heap if self._counts(entry)]
            heapify(heap)
        heappush(heap, (key, self._tickets[order.number], order))

    def _counts(self, entry: _Entry) -> bool:
        return self._tickets.get(entry[2].number) == entry[1]

    def _trigger(self, price: Decimal) -> None:
        for side, at in ((BUY, price), (SELL, price.copy_negate())):
            heap = self._stops[side]
            while heap and (heap[0][0] <= at or not self._counts(heap[0])):
                entry = heappop(heap)
                if self._counts(entry):
                    self._released(entry[2])
        for order in list(self._trails.values()):
            stood = order.stop_price
            if _trail(order, price):
                del self._trails[order.number]
                self._released(order)
            elif order.stop_price != stood:
                self._changed(order)

    def _released(self, order: Order) -> None:
        order.triggered = True
        self._queue(order)
        self._changed(order)

    def _trades(self, side: str, price: Decimal) -> Iterator[Trade]:
        for order in [order for order in self._markets.values() if order.side == side]:
            if self._left[side] == ZERO:
                return
            yield self._trade(order, price)
        heap = self._limits[side]
        # A buy trades at its limit or below it, a sell at its limit or above.
        at = price.copy_negate() if side == BUY else price
        while heap and self._left[side] != ZERO:
            if not self._counts(heap[0]):
                heappop(heap)
            elif heap[0][0] <= at:
                yield self._trade(heap[0][2], price)
            else:
                return

    def _trade(self, order: Order, price: Decimal) -> Trade:
        left = self._left[order.side]
        quantity = order.remaining if left is None else min(left, order.remaining)
        if left is not None:
            self._left[order.side] = EXACT.subtract(left, quantity)
        order.filled = EXACT.add(order.filled, quantity)
        if not order.remaining:
            self.remove(order)
        return Trade(order, quantity, price, order.filled)


def _trail(order: Order, price: Decimal) -> bool:
    """Draw a trail's stop after the price; whether the price has come back to it."""
    trail = order.trail_amount
    if trail is None:
        assert order.trail_percent is not None
        trail = EXACT.divide(EXACT.multiply(abs(price), order.trail_percent), _PERCENT_IN_ONE)
    away = trail if order.side == BUY else trail.copy_negate()
    drawn = EXACT.add(price, away)
    tighter = min if order.side == BUY else max
    order.stop_price = drawn if order.stop_price is None else tighter(order.stop_price, drawn)
    return price >= order.stop_price if order.side == BUY else price <= order.stop_price
