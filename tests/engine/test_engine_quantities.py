"""The engine's arithmetic is the database's, to the last digit: quotients, costs, books."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from itertools import count
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from market_days import MON, a_run, audited, open_on, rows
from psycopg import sql

from engine.books import Books, after_trade, read_books
from engine.db.connect import Connection
from engine.market.store import add_instrument
from engine.orders.model import Fill, OrderType, Side
from engine.quantities import EXACT, quotient
from engine.strategies.base import Holding, PlaceOrder
from engine.tick import _whole_or_nothing, run_tick

__all__ = ["audited"]

# A connection lives longer than one example; every example asks it anew.
ASKING = settings(max_examples=60)
USERS = count(1)


def number(digits_max: int, decimals_max: int) -> st.SearchStrategy[Decimal]:
    """Anything from tiny to huge, and what stands just below and above a power of ten."""
    digits = st.one_of(
        st.integers(0, 10**digits_max - 1),
        st.integers(0, 10**4),
        st.integers(1, digits_max).map(lambda power: 10**power - 1),
        st.integers(0, digits_max - 1).map(lambda power: 10**power),
    )
    return st.builds(
        lambda minus, coefficient, places: Decimal(
            (minus, tuple(map(int, str(coefficient))), -places)
        ),
        st.integers(0, 1),
        digits,
        st.integers(0, decimals_max),
    )


class Division(NamedTuple):
    dividend: Decimal
    divisor: Decimal
    decimals: int


def a_tie(divisor: Decimal, decimals: int, half: int) -> Division:
    """A quotient that ends in a 5 just behind the last decimal that is kept."""
    odd = Decimal(2 * half + 1).scaleb(-decimals, EXACT)
    return Division(EXACT.divide(EXACT.multiply(divisor, odd), Decimal(2)), divisor, decimals)


DIVISORS = number(23, 16).filter(bool)
DECIMALS = st.integers(0, 20)
DIVISIONS = st.lists(
    st.one_of(
        st.builds(Division, number(45, 24), DIVISORS, DECIMALS),
        st.builds(a_tie, DIVISORS, DECIMALS, st.integers(-(10**9), 10**9)),
    ),
    min_size=1,
    max_size=40,
)


# More digits than Python's decimals keep by default, and the last one rounds all of them up.
NINES = Division(Decimal("9" * 32), Decimal("9999" + "1234567" * 4), 18)


@ASKING
@given(DIVISIONS)
@example([NINES])
def test_a_quotient_is_what_postgres_makes_of_it(
    conn: Connection, divisions: list[Division]
) -> None:
    theirs = rows(
        conn,
        sql.SQL(
            """SELECT round(a / b, n)
               FROM unnest({}::numeric[], {}::numeric[], {}::integer[])
                    WITH ORDINALITY AS t (a, b, n, place) ORDER BY place"""
        )
        .format(*([*column] for column in zip(*divisions, strict=True)))
        .as_string(conn),
    )
    wrong = [
        (division, quotient(*division), their)
        for division, their in zip(divisions, theirs, strict=True)
        if quotient(*division) != their
    ]
    assert wrong == []


class Trade(NamedTuple):
    delta: Decimal
    price: Decimal


# As much of either as a real run has: nine digits before the point, eight after it.
TRADES = st.lists(
    st.builds(Trade, number(17, 8).filter(bool), number(17, 8)), min_size=1, max_size=30
)


@ASKING
@given(TRADES, st.lists(st.booleans(), min_size=30, max_size=30))
def test_the_cost_after_a_trade_is_what_the_schema_makes_of_it(
    conn: Connection, trades: list[Trade], closing: list[bool]
) -> None:
    steps: list[tuple[Decimal, ...]] = []
    quantity = cost = Decimal(0)
    for trade, closes in zip(trades, closing, strict=False):
        # Nearly nobody hits zero by chance.
        delta = EXACT.minus(quantity) if closes and quantity else trade.delta
        after = EXACT.add(quantity, delta)
        cost_after = after_trade(quantity, cost, delta, trade.price)
        steps.append((quantity, cost, delta, trade.price, after, cost_after))
        quantity, cost = after, cost_after
    wrong = rows(
        conn,
        sql.SQL(
            """SELECT t.*, p.quantity_after, p.cost_after
               FROM unnest({}::numeric[], {}::numeric[], {}::numeric[], {}::numeric[],
                           {}::numeric[], {}::numeric[])
                    AS t (quantity, cost, delta, price, quantity_here, cost_here),
                    position_after(quantity, cost, delta, price) p
               WHERE (quantity_here, cost_here) IS DISTINCT FROM (quantity_after, cost_after)"""
        )
        .format(*([*column] for column in zip(*steps, strict=True)))
        .as_string(conn),
    )
    assert wrong == []


class Ordered(NamedTuple):
    symbol: str
    side: Side
    quantity: Decimal
    price: Decimal


def some(digits: int) -> st.SearchStrategy[Decimal]:
    """Something above zero with eight decimals, often with as many digits as there may be."""
    units = st.integers(1, 10**digits) | st.integers(10 ** (digits - 1), 10**digits)
    return units.map(lambda units: Decimal(units).scaleb(-8))


ORDERS = st.lists(
    st.builds(
        Ordered,
        st.sampled_from(["FINE", "OTHER"]),
        st.sampled_from(Side),
        some(16),
        some(15),
    ),
    min_size=1,
    max_size=12,
)


# Each of these has more digits, before and after the point, than Python's decimals keep by default.
LARGE = Decimal("99999999.12345678"), Decimal("9999999.12345679")


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> list[UUID]:
    """The runs whose ticks were worked out again in steps."""
    again: list[UUID] = []

    def noting(conn: Connection, user_id: UUID, run_id: UUID, *more: Any) -> Any:
        again.append(run_id)
        return _whole_or_nothing(conn, user_id, run_id, *more)

    monkeypatch.setattr("engine.tick._whole_or_nothing", noting)
    return again


@settings(ASKING, max_examples=20)
@given(ORDERS)
@example([Ordered("FINE", Side.BUY, *LARGE), Ordered("FINE", Side.SELL, *LARGE)])
def test_books_that_take_up_fills_are_those_of_the_database(
    owner_conn: Connection, dsn: str, stepped: list[UUID], orders: list[Ordered]
) -> None:
    conn = owner_conn
    for symbol in ("FINE", "OTHER"):
        add_instrument(conn, symbol, quantity_decimals=8)
    paper = {"quantity_decimals": 8, "commission": {"model": "PERCENT", "percent": "0.1"}}
    run = a_run(conn, user=f"user {next(USERS)}", account_type="MARGIN", paper=paper)
    books = Books(cash=run.cash)
    for minutes, order in enumerate(orders):
        at = open_on(MON) + timedelta(minutes=minutes)
        wanted = PlaceOrder(order.symbol, order.side, order.quantity, OrderType.MARKET)
        prices = {order.symbol: order.price}
        run_tick(conn, run.user_id, run.run_id, at, prices, intents=[wanted])
        ((order_id, execution_id, quantity, price, commission, event_at),) = rows(
            conn,
            f"""SELECT order_id, execution_id, quantity, price, commission, event_at
                FROM execution WHERE :run AND logical_time = '{at.isoformat()}'""",
            run,
        )
        traded = order.symbol, order.side, quantity, price, commission
        books.fill(Fill(order_id, execution_id, *traded, event_at), at)
    theirs = read_books(conn, run)
    assert books.cash == theirs.cash
    assert by_value(books.holdings) == by_value(theirs.holdings)
    assert books.costs == theirs.costs
    assert books.marks == theirs.marks
    assert books.market_value == theirs.market_value
    # Had the engine's books been others, the database would have refused them.
    assert run.run_id not in stepped


def by_value(holdings: dict[str, Holding]) -> dict[str, tuple[Any, ...]]:
    return {
        symbol: (held.quantity, held.avg_cost, held.mark_price) for symbol, held in holdings.items()
    }
