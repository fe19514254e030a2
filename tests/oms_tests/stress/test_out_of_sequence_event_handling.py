"""The same life of an order, heard in any sequence, ends in the same books."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from itertools import pairwise
from typing import Any
from uuid import UUID

import pytest
from broker_cases import NOW, SECOND, Wire, a_broker_run
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.audit import audit
from engine.db.connect import Connection
from engine.inbox import Part, apply_batch

START = Decimal(100_000)


@dataclass(frozen=True)
class Word:
    """What the broker says at ``at``; a commission need not name the order."""

    kind: str
    at: datetime
    payload: Mapping[str, Any]
    names_order: bool = True


@dataclass
class Life:
    """An order at a broker that is never wrong: what it says, and what is so in the end."""

    quantity: int
    placed: int = 0
    new_quantity: int | None = None
    asks_cancel: bool = False
    words: list[Word] = field(default_factory=list)
    live: dict[str, tuple[int, int]] = field(default_factory=dict)
    charged: dict[str, int] = field(default_factory=dict)
    is_open: bool = True
    status: str = ""
    said: int = 0

    @property
    def filled(self) -> int:
        return sum(quantity for quantity, _ in self.live.values())

    def say(self, kind: str, *, names_order: bool = True, **payload: Any) -> None:
        self.said += 1
        self.words.append(Word(kind, NOW + self.said * 10 * SECOND, payload, names_order))

    def trade(self, name: str, quantity: int, price: int) -> None:
        self.say("EXECUTION", execution_id=name, quantity=str(quantity), price=str(price))
        family = name.rpartition(".")[0]
        for other in [other for other in self.live if other.rpartition(".")[0] == family]:
            del self.live[other]
        self.live[name] = (quantity, price)
        if self.is_open and self.filled >= self.quantity:
            self.is_open, self.status = False, "FILLED"
        elif self.status == "FILLED" and self.filled < self.quantity:
            self.status = "CANCELED"  # what the exchange was done with it doesn't take up again

    def bust(self, name: str) -> None:
        self.say("BUST", execution_id=name)
        del self.live[name]
        if self.status == "FILLED" and self.filled < self.quantity:
            self.status = "CANCELED"

    def charge(self, name: str, amount: int, *, names_order: bool) -> None:
        self.say(
            "COMMISSION",
            execution_id=name,
            amount=str(amount),
            currency="USD",
            names_order=names_order,
        )
        self.charged[name] = amount

    def modify(self, *, agrees: bool) -> None:
        if self.new_quantity is None or not self.is_open or self.filled > self.new_quantity:
            agrees = False
        if not agrees:
            self.say("MODIFY_REJECTED", code="TOO_LATE", message="")
            return
        assert self.new_quantity is not None
        self.quantity = self.new_quantity
        self.say("MODIFIED", quantity=str(self.quantity), limit_price="100")
        if self.filled >= self.quantity:
            self.is_open, self.status = False, "FILLED"

    def end(self, how: str) -> None:
        if how == "CANCEL_REJECTED" or not self.is_open:
            if self.asks_cancel:
                self.say("CANCEL_REJECTED", code="TOO_LATE", message="")
            if self.status == "FILLED":
                self.say("ORDER_STATUS", status="FILLED")
        elif how == "REJECTED":
            self.say("REJECTED", code="201", message="no")
            traded = any(word.kind == "EXECUTION" for word in self.words)
            self.is_open, self.status = False, "CANCELED" if traded else "REJECTED"
        else:
            self.say("ORDER_STATUS", status=how)
            self.is_open, self.status = False, "CANCELED" if how == "INACTIVE" else how
        if self.is_open:
            self.status = "PARTIALLY_FILLED" if self.filled else "ROUTED"


ENDS = ("CANCELED", "EXPIRED", "REJECTED", "INACTIVE", "CANCEL_REJECTED")


@st.composite
def lives(draw: st.DrawFn) -> Life:
    quantity = draw(st.integers(4, 12))
    life = Life(quantity, placed=quantity, asks_cancel=draw(st.booleans()))
    if draw(st.booleans()):
        life.new_quantity = draw(st.integers(4, 14).filter(lambda q: q != life.quantity))
    if draw(st.booleans()):
        life.say("ORDER_STATUS", status="PENDING_SUBMIT")
    life.say("ORDER_STATUS", status="ROUTED")
    fills = draw(st.integers(0, 4))
    modified_after = draw(st.integers(0, fills))
    for number in range(fills + 1):
        if number == modified_after and life.new_quantity is not None:
            life.modify(agrees=draw(st.booleans()))
        if number == fills or not life.is_open:
            continue
        name = f"f{number}.01"
        most = life.quantity - life.filled
        life.trade(name, draw(st.integers(1, most)), draw(st.integers(98, 102)))
        if draw(st.booleans()):
            life.charge(name, draw(st.integers(-1, 3)), names_order=draw(st.booleans()))
        for revision in range(2, 2 + draw(st.sampled_from((0, 0, 1, 2)))):
            quantity = life.live[name][0]
            name = f"f{number}.{revision:02}"
            life.trade(name, draw(st.integers(1, quantity)), draw(st.integers(98, 102)))
        if draw(st.sampled_from((False, False, True))):
            life.bust(name)
    life.end(draw(st.sampled_from(ENDS)))
    return life


@st.composite
def arrivals(draw: st.DrawFn) -> tuple[Life, list[list[Word]], int]:
    """A life, its words in any sequence with repeats, cut into batches, and how many workers."""
    life = draw(lives())
    repeats = draw(st.lists(st.sampled_from(life.words), max_size=4))
    words = draw(st.permutations(life.words + repeats))
    cuts = sorted(draw(st.lists(st.integers(0, len(words)), max_size=3)))
    bounds = [0, *cuts, len(words)]
    batches = [words[a:b] for a, b in pairwise(bounds)]
    return life, batches, draw(st.sampled_from((1, 2)))


def placed(wire: Wire, life: Life) -> UUID:
    """The order as it is when the words come: asked to be modified or cancelled, or just sent."""
    order_id = wire.place(quantity=str(life.placed), limit_price="100")
    wire.sent(order_id)
    if life.new_quantity is not None:
        wire.status(order_id, "ROUTED", at=NOW)
        wire.apply()
        assert wire.modify(order_id, quantity=str(life.new_quantity)) == "PENDING_MODIFY"
    if life.asks_cancel:
        assert wire.cancel(order_id) == "PENDING_CANCEL"
    wire.sent(order_id)
    return order_id


def hear_all(wire: Wire, order_id: UUID, words: list[Word], workers: int) -> None:
    for word in words:
        payload = dict(word.payload)
        if word.kind == "EXECUTION":
            payload |= {"symbol": "AAPL", "side": "BUY"}
        wire.say(word.kind, order_id if word.names_order else None, at=word.at, **payload)
    for number in range(workers):
        part = Part(number + 1, workers)
        while apply_batch(wire.conn, wire.run.user_id, wire.account, part=part).events:
            pass


def assert_so(wire: Wire, order_id: UUID, life: Life) -> None:
    order = wire.order(order_id)
    heard = wire.conn.execute(
        """SELECT e.execution_id, e.quantity, e.price FROM execution e
           WHERE e.order_id = %s AND e.reverses IS NULL
             AND NOT EXISTS (SELECT FROM execution r WHERE r.reverses = e.execution_id)""",
        [order_id],
    ).fetchall()
    assert {name: (quantity, price) for name, quantity, price in heard} == life.live
    charged = wire.conn.execute("SELECT execution_id, amount FROM execution_commission").fetchall()
    assert dict(charged) == life.charged
    notional = sum(quantity * price for quantity, price in life.live.values())
    average = round(Decimal(notional) / life.filled, 10) if life.filled else None
    assert (order["filled_quantity"], order["avg_fill_price"]) == (life.filled, average)
    assert wire.position() == life.filled
    assert wire.cash() == START - notional - sum(life.charged.values())
    assert order["status"] == life.status
    assert audit(wire.conn) == []


def test_what_seemed_filled_for_a_while_has_expired(conn: Connection) -> None:
    """Taken for done with, since a bust and corrections come last, in another batch."""
    life = Life(4, placed=4)
    life.say("ORDER_STATUS", status="ROUTED")
    for name, quantity in (("f0.01", 1), ("f0.02", 1)):
        life.trade(name, quantity, 98)
    life.bust("f0.02")
    for name, quantity in (("f1.01", 1), ("f2.01", 2), ("f2.02", 1), ("f2.03", 1)):
        life.trade(name, quantity, 98)
    life.end("EXPIRED")
    first, second = (0, 4, 2, 5, 6, 8), (1, 7, 3)
    assert_heard(conn, life, [[life.words[n] for n in batch] for batch in (first, second)], 1)


@pytest.mark.slow
@settings(max_examples=150)
@given(arrival=arrivals())
def test_any_sequence_of_arrival_leads_to_the_same_books(
    conn: Connection, arrival: tuple[Life, list[list[Word]], int]
) -> None:
    assert_heard(conn, *arrival)


def assert_heard(conn: Connection, life: Life, batches: list[list[Word]], workers: int) -> None:
    """Whatever came first: the books are the same, and no word is left."""
    with conn.transaction(force_rollback=True):
        wire = Wire(conn, a_broker_run(conn))
        order_id = placed(wire, life)
        for words in batches:
            hear_all(wire, order_id, words, workers)
        assert_so(wire, order_id, life)
        unheard = conn.execute("SELECT count(*) FROM broker_event WHERE finding IS NULL").fetchone()
        assert unheard == (0,)
