"""What ticks told and nobody has written yet: columns for one call of ``ticks_write``.

Any number of ticks are written by one statement, which the database proves as a whole. Values are
put into the text of array literals as they come: a batch holds thousands, and the words, numbers
and times that go in are known to need no quoting. Whatever people may have written is quoted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from engine.db.connect import Connection
from engine.orders.model import Fill, Order

_TICKS_WRITE = """SELECT ticks_write(
    %s::uuid, %s::uuid, %s::bigint, %s::jsonb,
    %s::integer[], %s::timestamptz[], %s::uuid[], %s::text[], %s::text[], %s::numeric[],
    %s::text[], %s::text[], %s::numeric[], %s::timestamptz[], %s::numeric[], %s::text[],
    %s::numeric[], %s::numeric[], %s::timestamptz[],
    %s::integer[], %s::timestamptz[], %s::text[], %s::text[], %s::jsonb[],
    %s::integer[], %s::timestamptz[], %s::jsonb[], %s::numeric[], %s::numeric[],
    %s::timestamptz, %s::numeric)"""


class Journal:
    """Trades, events and ticks of one run, in the order in which the ledger will tell them.

    ``head`` is the number of the last event that is in the ledger. A trade is an order that its
    own tick filled whole, with one execution.
    """

    def __init__(self, head: int) -> None:
        self.head = head
        self._clear()

    def _clear(self) -> None:
        self._place = 0
        self._trades: list[tuple[str, ...]] = []
        self._events: list[tuple[str, ...]] = []
        self._ticks: list[tuple[str, ...]] = []

    @property
    def empty(self) -> bool:
        return self._place == 0

    def place(self) -> tuple[int, int, int, int]:
        """Where the story stands, for ``back_to``."""
        return self._place, len(self._trades), len(self._events), len(self._ticks)

    def back_to(self, place: tuple[int, int, int, int]) -> None:
        """Forget what was told since."""
        self._place, trades, events, ticks = place
        del self._trades[trades:], self._events[events:], self._ticks[ticks:]

    def trade(
        self, order: Order, reference: Decimal, client_order_id: str | None, fill: Fill
    ) -> None:
        """An order placed, and filled whole by ``fill``, its first execution."""
        at = str(order.logical_time)
        self._trades.append(
            (
                str(self._place + 1),
                at,
                str(order.order_id),
                f'"{order.symbol}"',
                order.side.value,
                str(order.quantity),
                order.order_type.value,
                order.time_in_force.value,
                "NULL" if order.limit_price is None else str(order.limit_price),
                "NULL" if order.expire_at is None else str(order.expire_at),
                str(reference),
                "NULL" if client_order_id is None else _quoted(client_order_id),
                str(fill.price),
                str(fill.commission),
                at if fill.event_at is order.logical_time else str(fill.event_at),
            )
        )
        self._place += 2

    def event(
        self, at: datetime, event_type: str, subject: str, payload: Mapping[str, Any]
    ) -> None:
        """Something else that happened, about ``subject``."""
        self._place += 1
        words = _quoted(event_type), _quoted(subject), _quoted(json.dumps(dict(payload)))
        self._events.append((str(self._place), str(at), *words))

    def tick(
        self,
        at: datetime,
        orders: int,
        executions: int,
        marks: Mapping[str, Decimal],
        marked: Mapping[str, datetime],
        cash: Decimal,
        market_value: Decimal,
    ) -> None:
        """A tick closed: how many orders and executions it had, and what the run is worth.

        ``marks`` are the prices that holdings were marked with, ``marked`` the times of those
        that are older than the tick.
        """
        self._place += 1
        prices = ",".join([f'\\"{symbol}\\":\\"{price}\\"' for symbol, price in marks.items()])
        facts = f'\\"orders\\":{orders},\\"executions\\":{executions},\\"prices\\":{{{prices}}}'
        if marked:
            times = ",".join([f'\\"{symbol}\\":\\"{time}\\"' for symbol, time in marked.items()])
            facts += f',\\"priced_at\\":{{{times}}}'
        self._ticks.append(
            (str(self._place), str(at), f'"{{{facts}}}"', str(cash), str(market_value))
        )

    def take(
        self,
        user_id: UUID,
        run_id: UUID,
        state: Mapping[str, Any],
        *,
        now: datetime | None = None,
        lag_seconds: Decimal | None = None,
    ) -> list[Any]:
        """The parameters that write all of it; the journal is empty afterwards.

        ``state`` is the strategy's after the last tick; ``now`` the wall clock of a live tick, for
        the run's heartbeat.
        """
        taken = [
            user_id,
            run_id,
            self.head,
            json.dumps(dict(state)),
            *_columns(self._trades, 15),
            *_columns(self._events, 5),
            *_columns(self._ticks, 5),
            now,
            lag_seconds,
        ]
        self.head += self._place
        self._clear()
        return taken


def write(conn: Connection, taken: list[Any]) -> None:
    """Write what was taken from a journal, in one statement.

    Raises Retryable when the run has moved since the journal was begun, and what the database
    refuses, in which case nothing is written.
    """
    conn.execute(_TICKS_WRITE, taken, prepare=True)


def _columns(rows: list[tuple[str, ...]], width: int) -> list[str]:
    if not rows:
        return ["{}"] * width
    return ["{" + ",".join(column) + "}" for column in zip(*rows, strict=True)]


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
