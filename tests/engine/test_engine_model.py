"""Random ticks, orders and cancels against a small model of the same run in Python.

The model knows cash, holdings, marks and open orders, and the rules of single prices: a market
order fills, a limit or stop order fills where the price is within or beyond its own. After every
step the run's books must be the model's, and at the end every audit must find nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from decimal import Decimal
from itertools import groupby
from typing import Any
from uuid import UUID

from hypothesis import given, settings
from hypothesis import strategies as st
from market_days import MON, a_run, assert_sound, fresh, open_on, rows

from engine.db.connect import Connection
from engine.orders.model import OrderType, Side
from engine.runs import Run
from engine.strategies.base import CancelOrder, Intent, PlaceOrder
from engine.tick import log_mtm, place_orders, run_tick

SYMBOLS = ("AAPL", "IBM")
CASH = Decimal(1_000)
PRICES = [Decimal(price) for price in ("90", "99.5", "100", "100.00000001", "110.25", "130")]
QUANTITIES = [Decimal(q) for q in ("-1", "0", "0.000001", "0.5", "1", "2.345678", "4", "9")]

Prices = dict[str, Decimal]


@dataclass
class Known:
    """An order as the model knows it."""

    order: PlaceOrder
    reference: Decimal | None
    status: str = "PENDING"
    key: tuple[Any, ...] = ()

    @property
    def is_open(self) -> bool:
        return self.status in ("NEW", "PENDING")

    @property
    def reserved(self) -> Decimal:
        order = self.order
        if order.side is Side.SELL or not self.is_open:
            return Decimal(0)
        return order.quantity * (order.limit_price or order.stop_price or self.reference or 0)

    def fills_at(self, price: Decimal) -> bool:
        order = self.order
        if order.order_type is OrderType.MARKET:
            return True
        bound = order.limit_price or order.stop_price
        assert bound is not None
        low_is_good = (order.order_type is OrderType.LIMIT) == (order.side is Side.BUY)
        return price <= bound if low_is_good else price >= bound


@dataclass
class Model:
    """A run without a database."""

    cash: Decimal = CASH
    held: dict[str, Decimal] = field(default_factory=dict)
    marks: Prices = field(default_factory=dict)
    orders: list[Known] = field(default_factory=list)

    def gate(self, order: PlaceOrder, price: Decimal | None) -> Known:
        """What becomes of an order when it arrives."""
        known = Known(order, price if price is not None else self.marks.get(order.symbol))
        value = order.limit_price or order.stop_price or known.reference
        mine = [k.order for k in self.orders if k.is_open and k.order.symbol == order.symbol]
        offered = sum(o.quantity for o in mine if o.side is Side.SELL)
        if (
            order.quantity <= 0
            or (
                order.side is Side.SELL
                and order.quantity > self.held.get(order.symbol, Decimal(0)) - offered
            )
            or (
                order.side is Side.BUY
                and value is not None
                and order.quantity * value > self.cash - sum(k.reserved for k in self.orders)
            )
        ):
            known.status = "REJECTED"
        self.orders.append(known)
        return known

    def match(self, orders: list[Known], prices: Prices) -> None:
        """Show a price to each of these orders, in turn."""
        for known in orders:
            order = known.order
            price = prices.get(order.symbol)
            if not known.is_open:
                continue
            known.status = "PENDING"
            if price is None or not known.fills_at(price):
                continue
            change = order.quantity if order.side is Side.BUY else -order.quantity
            if self.cash - change * price < 0:
                known.status = "REJECTED"
                continue
            self.cash -= change * price
            self.held[order.symbol] = self.held.get(order.symbol, Decimal(0)) + change
            self.marks[order.symbol] = price
            known.status = "FILLED"

    def place(self, orders: list[PlaceOrder], prices: Prices) -> None:
        for _, group in groupby(orders, key=lambda order: order.side):
            self.match([self.gate(order, prices.get(order.symbol)) for order in group], prices)

    def mark(self, prices: Prices) -> Decimal:
        """Mark what is held; returns equity."""
        self.marks |= {s: p for s, p in prices.items() if self.held.get(s)}
        return self.cash + sum(
            quantity * self.marks[symbol] for symbol, quantity in self.held.items()
        )


class Bench:
    """A run and its model, driven together."""

    def __init__(self, conn: Connection) -> None:
        self.conn = conn
        self.run: Run = a_run(conn, cash=str(CASH))
        self.model = Model()
        self.at = open_on(MON)
        self.do_tick({}, [], None)

    def do_tick(self, prices: Prices, orders: list[PlaceOrder], cancel: int | None) -> None:
        self.at += timedelta(hours=1)
        self.sort()
        resting = [known for known in self.model.orders if known.is_open]
        self.model.match(resting, prices)
        left = [known for known in resting if known.is_open]
        intents: list[Intent] = []
        if cancel is not None and left:
            known = left[cancel % len(left)]
            known.status = "CANCELED"
            intents.append(CancelOrder(known.key[1]))
        intents += orders
        self.model.place(orders, prices)
        equity = self.model.mark(prices)
        result = run_tick(
            self.conn, self.run.user_id, self.run.run_id, self.at, prices, intents=intents
        )
        assert (result.equity, result.cash) == (equity, self.model.cash)

    def do_place(self, prices: Prices, orders: list[PlaceOrder]) -> None:
        self.at += timedelta(hours=1)
        self.model.place(orders, prices)
        place_orders(self.conn, self.run.user_id, self.run.run_id, self.at, prices, orders)

    def do_insert(self, order: PlaceOrder) -> None:
        """As somebody in psql does: no price, no time, no matching."""
        known = self.model.gate(order, None)
        if known.is_open:
            known.status = "NEW"
        self.conn.execute(
            """INSERT INTO paper_order (user_id, run_id, symbol, side, quantity, order_type,
                                        time_in_force, limit_price, stop_price)
               VALUES (%s, %s, %s, %s, %s, %s, 'GTC', %s, %s)""",
            [
                self.run.user_id,
                self.run.run_id,
                order.symbol,
                str(order.side),
                order.quantity,
                str(order.order_type),
                order.limit_price,
                order.stop_price,
            ],
        )

    def do_mark(self, prices: Prices) -> None:
        self.at += timedelta(hours=1)
        equity = self.model.mark(prices)
        assert log_mtm(self.conn, self.run.user_id, self.run.run_id, self.at, prices) == equity

    def sort(self) -> None:
        """Give the model's newest orders their ids, by which the book serves them."""
        known = {order.key[1] for order in self.model.orders if order.key}
        found = rows(
            self.conn,
            """SELECT o.logical_time, o.order_id FROM orders o
               JOIN event_ledger l ON l.subject = o.order_id::text
               WHERE l.event_type IN ('ORDER_PLACED', 'ORDER_REJECTED')
                 AND o.logical_time = l.logical_time ORDER BY l.seq""",
        )
        new = [key for key in found if key[1] not in known]
        unnamed = [order for order in self.model.orders if not order.key]
        # Of one statement, the gate's refusals and the placed are told in the order asked for.
        for order, key in zip(unnamed, dict.fromkeys(new), strict=True):
            order.key = key
        self.model.orders.sort(key=lambda order: order.key)

    def compare(self) -> None:
        self.sort()
        assert fresh(self.conn, self.run).cash == self.model.cash
        held = dict(rows(self.conn, "SELECT symbol, quantity FROM position"))
        assert held == self.model.held
        stored: dict[UUID, str] = dict(rows(self.conn, "SELECT order_id, status FROM orders"))
        assert stored == {known.key[1]: known.status for known in self.model.orders}


@st.composite
def an_order(draw: st.DrawFn) -> PlaceOrder:
    kind = draw(st.sampled_from([OrderType.MARKET, OrderType.LIMIT, OrderType.STOP]))
    price = draw(st.sampled_from(PRICES))
    return PlaceOrder(
        draw(st.sampled_from(SYMBOLS)),
        draw(st.sampled_from(Side)),
        draw(st.sampled_from(QUANTITIES)),
        kind,
        "GTC",  # type: ignore[arg-type]
        limit_price=price if kind is OrderType.LIMIT else None,
        stop_price=price if kind is OrderType.STOP else None,
    )


A_MARKET = st.dictionaries(st.sampled_from(SYMBOLS), st.sampled_from(PRICES))
ORDERS = st.lists(an_order(), max_size=4)
A_STEP = st.one_of(
    st.tuples(st.just("do_tick"), A_MARKET, ORDERS, st.none() | st.integers(0, 9)),
    st.tuples(st.just("do_tick"), A_MARKET, ORDERS, st.none() | st.integers(0, 9)),
    st.tuples(st.just("do_place"), A_MARKET, ORDERS),
    st.tuples(st.just("do_insert"), an_order()),
    st.tuples(st.just("do_mark"), A_MARKET),
)


@settings(max_examples=20)
@given(steps=st.lists(A_STEP, min_size=8, max_size=24))
def test_whatever_is_done_the_books_are_the_models(
    conn: Connection, steps: list[tuple[Any, ...]]
) -> None:
    with conn.transaction(force_rollback=True):
        bench = Bench(conn)
        for name, *arguments in steps:
            getattr(bench, name)(*arguments)
            bench.compare()
        assert_sound(conn)
