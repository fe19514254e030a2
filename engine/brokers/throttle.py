"""How many messages may go now: a sliding window, so that no second ever holds more than allowed.

A token bucket, or windows that begin anew, would let two bursts follow each other; here every
message remembers its time, and the next may go when the oldest of as many as are allowed is a
whole second old. Times are seconds of a clock that only moves forward and that the caller reads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

WINDOW_SECONDS = 1.0
# What a wire may squeeze together is still apart at its other end; it costs half a per cent.
MARGIN_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class Free:
    """How many may go at once: messages of any kind, and new orders among them."""

    messages: int
    orders: int


class Window:
    """At most ``limit`` in any one second."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._sent: deque[float] = deque(maxlen=limit)

    def free(self, now: float) -> int:
        """How many may go at ``now``."""
        while self._sent and self._sent[0] <= now - WINDOW_SECONDS - MARGIN_SECONDS:
            self._sent.popleft()
        return self.limit - len(self._sent)

    def delay(self, now: float) -> float:
        """Seconds until the next may go; 0 where it may go at once."""
        if self.free(now):
            return 0.0
        return max(0.0, self._sent[0] + WINDOW_SECONDS + MARGIN_SECONDS - now)

    def note(self, at: float) -> None:
        """One was sent; it is counted from the moment at which its writing ended."""
        self._sent.append(at)


class Throttle:
    """The two limits of an account: new orders a second, and messages of any kind a second."""

    def __init__(self, orders_per_second: int, messages_per_second: int) -> None:
        self._orders = Window(orders_per_second)
        self._messages = Window(messages_per_second)

    def free(self, now: float) -> Free:
        """How many may go at ``now``; a cancel is a message and no order, so it goes first."""
        messages = self._messages.free(now)
        return Free(messages, min(messages, self._orders.free(now)))

    def delay(self, now: float, *, is_order: bool) -> float:
        """Seconds until the next message, or new order, may go."""
        of_messages = self._messages.delay(now)
        return max(of_messages, self._orders.delay(now)) if is_order else of_messages

    def note(self, at: float, *, is_order: bool) -> None:
        """A message was sent."""
        self._messages.note(at)
        if is_order:
            self._orders.note(at)

    def resume(self, now: float, sent: Iterable[tuple[float, bool]]) -> None:
        """Begin with what was sent before a restart: seconds ago, and whether a new order."""
        for ago, is_order in sorted(sent, reverse=True):
            self.note(now - ago, is_order=is_order)

    def wait_seconds(self, now: float, place: int, *, is_order: bool) -> float:
        """About how long the ``place``-th in the queue (from 0) will wait."""
        window = self._orders if is_order and self.limits_orders(now) else self._messages
        return window.delay(now) + place // window.limit * WINDOW_SECONDS

    def limits_orders(self, now: float) -> bool:
        """Whether new orders wait for their own limit, and not for that of all messages."""
        return self._orders.free(now) == 0 and self._messages.free(now) > 0
