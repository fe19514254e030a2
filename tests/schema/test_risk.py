"""The risk gate, met by plain SQL: validation, limits, buying power and holdings.

Each limit is tried on both of its sides. What is refused is stored with its source, its code and
its reason, is told to the ledger, and can never trade.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import class_row
from schema_cases import acting_as

from engine.db.connect import Connection

T0 = "2024-01-02 21:00+00"
T1 = "2024-01-03 21:00+00"

Columns = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of an order."""

    order_id: UUID
    status: str
    reject_source: str | None
    reject_code: str | None
    status_reason: str | None
    reserved_cash: Decimal


def _insert(conn: Connection, table: str, rows: list[Columns]) -> list[tuple[Any, ...]]:
    """Insert rows by one statement; returns them whole."""
    columns = list(rows[0])
    query = sql.SQL("INSERT INTO {} ({}) VALUES {} RETURNING *").format(
        sql.Identifier(table),
        sql.SQL(", ").join(map(sql.Identifier, columns)),
        sql.SQL(", ").join(
            sql.SQL("({})").format(sql.SQL(", ").join([sql.Placeholder()] * len(columns)))
            for _ in rows
        ),
    )
    return conn.execute(query, [row[column] for row in rows for column in columns]).fetchall()


@dataclass(frozen=True, slots=True)
class Book:
    """A RUNNING run, and SQL into it; ``role`` is who places orders, the owner unless given."""

    conn: Connection
    user: UUID
    run: UUID
    role: str | None = None

    def place(self, *orders: Columns) -> list[Stored]:
        """Orders in one statement, BUY 1 AAPL unless they say otherwise; as they were stored."""
        names = {"symbol", "side", "quantity", "logical_time"}.union(*orders)
        base: dict[str, object] = {"symbol": "AAPL", "side": "BUY", "quantity": 1}
        base |= {"logical_time": T0}
        rows: list[Columns] = [
            {"user_id": self.user, "run_id": self.run}
            | {name: (base | dict(order)).get(name) for name in sorted(names)}
            for order in orders
        ]
        with acting_as(self.conn, self.role) if self.role else nullcontext():
            placed = _insert(self.conn, "orders", rows)
        return [self.stored(row[2]) for row in placed]

    def order(self, **columns: object) -> Stored:
        (stored,) = self.place(columns)
        return stored

    def limit_order(self, quantity: object, price: object, **columns: object) -> Stored:
        return self.order(quantity=quantity, order_type="LIMIT", limit_price=price, **columns)

    def stored(self, order: UUID) -> Stored:
        with self.conn.cursor(row_factory=class_row(Stored)) as cursor:
            found = cursor.execute(
                """SELECT order_id, status, reject_source, reject_code, status_reason, reserved_cash
                   FROM orders WHERE user_id = %s AND run_id = %s AND order_id = %s""",
                (self.user, self.run, order),
            ).fetchone()
        assert found is not None
        return found

    def move(self, order: Stored, status: str) -> None:
        self.conn.execute(
            "UPDATE orders SET status = %s WHERE user_id = %s AND run_id = %s AND order_id = %s",
            (status, self.user, self.run, order.order_id),
        )

    def trade(self, order: Stored, quantity: object, price: object) -> None:
        row = {"user_id": self.user, "run_id": self.run, "order_id": order.order_id}
        _insert(self.conn, "execution", [row | {"quantity": quantity, "price": price}])

    def hold(self, quantity: int, price: object = 10, symbol: str = "AAPL") -> None:
        """Buy, or sell short, and have it filled."""
        side = "BUY" if quantity > 0 else "SELL"
        order = self.limit_order(abs(quantity), price, side=side, symbol=symbol)
        assert order.status == "NEW", order
        self.trade(order, abs(quantity), price)

    def limit(
        self,
        kind: str,
        value: object = None,
        *,
        symbol: str | None = None,
        per_run: bool = True,
        **more: object,
    ) -> None:
        row: dict[str, object] = {
            "user_id": self.user,
            "run_id": self.run if per_run else None,
            "kind": kind,
            "symbol": symbol,
            "limit_value": value,
        }
        _insert(self.conn, "risk_limit", [row | more])

    def mark(self, price: object, at: str) -> None:
        """Everything that is held is worth ``price`` a unit, and the run is marked."""
        self.conn.execute(
            """UPDATE position SET mark_price = %s, marked_at = %s
               WHERE user_id = %s AND run_id = %s""",
            (price, at, self.user, self.run),
        )
        row = {"user_id": self.user, "run_id": self.run, "logical_time": at}
        _insert(self.conn, "mtm_ledger", [row])

    def session(self, day: str, opens: str, closes: str) -> None:
        """A session of the run's exchange, in UTC."""
        row = {"calendar": "XNYS", "session_date": day, "open_at": f"{day} {opens}+00"}
        _insert(self.conn, "calendar_session", [row | {"close_at": f"{day} {closes}+00"}])

    def events(self, order: Stored) -> list[tuple[str, dict[str, Any]]]:
        """Type and payload of an order's events."""
        return self.conn.execute(
            """SELECT event_type, payload FROM event_ledger
               WHERE user_id = %s AND run_id = %s AND subject = %s ORDER BY seq""",
            (self.user, self.run, str(order.order_id)),
        ).fetchall()


def _new_run(
    conn: Connection,
    *,
    cash: object = 1000,
    account: str = "CASH",
    user: UUID | None = None,
    status: str = "RUNNING",
) -> Book:
    if user is None:
        user = _insert(conn, "app_user", [{"name": "someone"}])[0][0]
    run = {"user_id": user, "status": status, "initial_cash": cash, "account_type": account}
    return Book(conn, user, _insert(conn, "strategy_run", [run])[0][1])


@pytest.fixture
def book(conn: Connection) -> Book:
    """A run with 1,000 in a cash account."""
    return _new_run(conn)


@pytest.fixture(params=[None, "oms_engine"])
def margin(conn: Connection, request: pytest.FixtureRequest) -> Book:
    """A run whose account sets no bounds but its limits; for the owner, and for the engine."""
    return replace(_new_run(conn, account="MARGIN"), role=request.param)


def _assert_accepted(order: Stored) -> None:
    assert (order.status, order.reject_source, order.reject_code, order.status_reason) == (
        "NEW",
        None,
        None,
        None,
    )


def _assert_refused(order: Stored, code: str, reason: str | None = None) -> None:
    assert (order.status, order.reject_source, order.reject_code) == ("REJECTED", "RISK", code)
    assert order.reserved_cash == 0
    if reason is not None:
        assert order.status_reason == reason


# Validation: what makes an order nonsense in itself.


class Nonsense(NamedTuple):
    code: str
    order: dict[str, object]


_LIMIT: dict[str, object] = {"order_type": "LIMIT", "limit_price": 10}
_STOP: dict[str, object] = {"order_type": "STOP", "stop_price": 10}
_STOP_LIMIT: dict[str, object] = _LIMIT | _STOP | {"order_type": "STOP_LIMIT"}
_TRAIL: dict[str, object] = {"order_type": "TRAIL", "trail_amount": 1}
_PERCENT: dict[str, object] = {"order_type": "TRAIL", "trail_percent": 1}

VALIDATION = (
    Nonsense("QUANTITY_NOT_POSITIVE", {"quantity": 0}),
    Nonsense("QUANTITY_NOT_POSITIVE", {"quantity": -1}),
    Nonsense("LIMIT_PRICE_MISSING", {"order_type": "LIMIT"}),
    Nonsense("LIMIT_PRICE_MISSING", _STOP | {"order_type": "STOP_LIMIT"}),
    Nonsense("LIMIT_PRICE_NOT_ALLOWED", {"limit_price": 10}),
    Nonsense("LIMIT_PRICE_NOT_ALLOWED", _STOP | {"limit_price": 10}),
    Nonsense("LIMIT_PRICE_NOT_ALLOWED", _TRAIL | {"limit_price": 10}),
    Nonsense("STOP_PRICE_MISSING", {"order_type": "STOP"}),
    Nonsense("STOP_PRICE_MISSING", _LIMIT | {"order_type": "STOP_LIMIT"}),
    Nonsense("STOP_PRICE_NOT_ALLOWED", {"stop_price": 10}),
    Nonsense("STOP_PRICE_NOT_ALLOWED", _LIMIT | {"stop_price": 10}),
    Nonsense("TRAIL_NEEDS_AMOUNT_OR_PERCENT", {"order_type": "TRAIL"}),
    Nonsense("TRAIL_NEEDS_AMOUNT_OR_PERCENT", _TRAIL | _PERCENT),
    Nonsense("TRAIL_NOT_ALLOWED", {"trail_amount": 1}),
    Nonsense("TRAIL_NOT_ALLOWED", _LIMIT | {"trail_percent": 1}),
    Nonsense("TRAIL_NOT_ALLOWED", _STOP | {"trail_amount": 1}),
    Nonsense("TRAIL_NOT_ALLOWED", _STOP_LIMIT | {"trail_percent": 1}),
    Nonsense("TRAIL_OUT_OF_RANGE", _TRAIL | {"trail_amount": 0}),
    Nonsense("TRAIL_OUT_OF_RANGE", _TRAIL | {"trail_amount": -1}),
    Nonsense("TRAIL_OUT_OF_RANGE", _PERCENT | {"trail_percent": 0}),
    Nonsense("TRAIL_OUT_OF_RANGE", _PERCENT | {"trail_percent": -1}),
    Nonsense("TRAIL_OUT_OF_RANGE", _PERCENT | {"trail_percent": 100}),
    Nonsense("EXPIRE_AT_MISSING", {"time_in_force": "GTD"}),
    Nonsense("ORDER_TYPE_NOT_ALLOWED_IN_AUCTION", _STOP | {"time_in_force": "OPG"}),
    Nonsense("ORDER_TYPE_NOT_ALLOWED_IN_AUCTION", _STOP | {"time_in_force": "CLS"}),
    Nonsense("ORDER_TYPE_NOT_ALLOWED_IN_AUCTION", _STOP_LIMIT | {"time_in_force": "OPG"}),
    Nonsense("ORDER_TYPE_NOT_ALLOWED_IN_AUCTION", _TRAIL | {"time_in_force": "CLS"}),
    Nonsense("PRICE_NOT_POSITIVE", _LIMIT | {"limit_price": 0}),
    Nonsense("PRICE_NOT_POSITIVE", _LIMIT | {"limit_price": -1}),
    Nonsense("PRICE_NOT_POSITIVE", _STOP | {"stop_price": 0}),
    Nonsense("PRICE_NOT_POSITIVE", _STOP_LIMIT | {"stop_price": -1}),
    Nonsense("PRICE_NOT_POSITIVE", _TRAIL | {"stop_price": 0}),
    Nonsense("PRICE_NOT_POSITIVE", {"reference_price": 0}),
    Nonsense("PRICE_NOT_POSITIVE", _LIMIT | {"reference_price": -1}),
    # It need not be an instrument that we know.
    Nonsense("PRICE_NOT_POSITIVE", _LIMIT | {"symbol": "UNKNOWN", "limit_price": 0}),
)

# The other side of each of them.
SENSE: tuple[dict[str, object], ...] = (
    {},
    {"quantity": "0.00000001"},
    {"reference_price": "0.00000001"},
    _LIMIT,
    _LIMIT | {"limit_price": "0.00000001"},
    _STOP,
    _STOP | {"stop_price": "0.00000001"},
    _STOP_LIMIT,
    _TRAIL,
    _TRAIL | {"trail_amount": "0.00000001"},
    _TRAIL | {"stop_price": 10},
    _PERCENT | {"trail_percent": "0.00000001"},
    _PERCENT | {"trail_percent": "99.99999999"},
    {"time_in_force": "GTD", "expire_at": T1},
    {"time_in_force": "DAY", "expire_at": T1},
    {"time_in_force": "OPG"},
    {"time_in_force": "CLS"},
    _LIMIT | {"time_in_force": "OPG"},
    _LIMIT | {"time_in_force": "CLS"},
    _STOP | {"time_in_force": "GTC"},
    _LIMIT | {"symbol": "UNKNOWN"},
)


def _name(order: Columns) -> str:
    return ",".join(f"{name}={value}" for name, value in order.items()) or "plain"


@pytest.mark.parametrize(
    ("code", "order"), VALIDATION, ids=[f"{n.code}-{_name(n.order)}" for n in VALIDATION]
)
def test_nonsense_is_stored_as_rejected(book: Book, code: str, order: Columns) -> None:
    stored = book.order(**order)
    assert (stored.status, stored.reject_source, stored.reject_code) == (
        "REJECTED",
        "VALIDATION",
        code,
    )
    assert stored.reserved_cash == 0
    _assert_told_and_dead(book, stored)


@pytest.mark.parametrize("order", SENSE, ids=_name)
def test_sense_is_accepted(book: Book, order: Columns) -> None:
    stored = book.order(**order)
    _assert_accepted(stored)
    assert [event for event, _ in book.events(stored)] == ["ORDER_PLACED"]


def _source(conn: Connection, function: str) -> str:
    row = conn.execute(
        "SELECT pg_get_functiondef(p.oid) FROM pg_proc p "
        "WHERE p.proname = %s AND p.pronamespace = 'public'::regnamespace",
        (function,),
    ).fetchone()
    assert row is not None
    return str(row[0])


def test_every_validation_code_is_reached(conn: Connection) -> None:
    codes = re.findall(r"THEN '([A-Z_]+)'", _source(conn, "orders_validation_code"))
    prices = re.findall(r"SELECT '([A-Z_]+)'", _source(conn, "orders_price_code"))
    assert len(codes) == 10
    assert len(prices) == 1
    assert {*codes, *prices} == {nonsense.code for nonsense in VALIDATION}


@pytest.mark.parametrize(
    "order",
    [
        _LIMIT | {"limit_price": -5},
        _LIMIT | {"limit_price": 0},
        _STOP | {"stop_price": -5},
        {"reference_price": -5},
    ],
    ids=_name,
)
def test_price_below_zero_where_the_instrument_allows_it(book: Book, order: Columns) -> None:
    _insert(book.conn, "instrument", [{"symbol": "SPREAD", "negative_price_allowed": True}])
    stored = book.order(**order, symbol="SPREAD")
    _assert_accepted(stored)
    assert stored.reserved_cash == 0


def test_first_of_several_faults_is_the_one_stored(book: Book) -> None:
    # Nonsense goes before limits, too.
    book.limit("FORBIDDEN_SYMBOL", symbol="AAPL")
    stored = book.order(quantity=0, order_type="LIMIT", trail_amount=0)
    assert stored.reject_code == "QUANTITY_NOT_POSITIVE"


def test_a_programs_own_refusal_is_kept_as_it_is(book: Book) -> None:
    book.limit("FORBIDDEN_SYMBOL", symbol="AAPL")
    stored = book.order(
        status="REJECTED",
        reject_source="COMPLIANCE",
        reject_code="RESTRICTED_LIST",
        status_reason="insider",
    )
    assert (stored.reject_source, stored.reject_code, stored.status_reason) == (
        "COMPLIANCE",
        "RESTRICTED_LIST",
        "insider",
    )
    _assert_told_and_dead(book, stored)


# What is refused: stored, told, dead.


def _assert_told_and_dead(book: Book, order: Stored) -> None:
    ((event, payload),) = book.events(order)
    assert event == "ORDER_REJECTED"
    assert (payload["reject_source"], payload["reject_code"]) == (
        order.reject_source,
        order.reject_code,
    )
    assert payload.get("status_reason") == order.status_reason
    before = _books(book)
    with pytest.raises(psycopg.Error) as caught, book.conn.transaction():
        book.trade(order, 1, 1)
    assert caught.value.diag.constraint_name == "execution_order_is_open"
    for status in ("NEW", "PENDING", "ROUTED", "FILLED"):
        with pytest.raises(psycopg.Error) as caught, book.conn.transaction():
            book.move(order, status)
        assert caught.value.diag.constraint_name == "orders_status_transition"
    assert book.stored(order.order_id) == order
    assert _books(book) == before


def _books(book: Book) -> tuple[Any, ...] | None:
    return book.conn.execute(
        """SELECT cash, books_seq,
                  (SELECT count(*) FROM execution e WHERE e.run_id = r.run_id),
                  (SELECT count(*) FROM position p WHERE p.run_id = r.run_id),
                  (SELECT count(*) FROM event_ledger l WHERE l.run_id = r.run_id)
           FROM strategy_run r WHERE user_id = %s AND run_id = %s""",
        (book.user, book.run),
    ).fetchone()


class Refusal(NamedTuple):
    """A limit (kind, value, symbol) or none, an order that breaks it and the reason stored."""

    code: str
    limit: tuple[str, object, str | None] | None
    order: dict[str, object]
    reason: str


REFUSALS = (
    Refusal(
        "MAX_POSITION",
        ("MAX_POSITION", "5.50", None),
        {"quantity": "5.510"},
        "MAX_POSITION: limit 5.5, would be 5.51",
    ),
    Refusal(
        "MAX_ORDER_QUANTITY",
        ("MAX_ORDER_QUANTITY", 3, None),
        {"quantity": 4},
        "MAX_ORDER_QUANTITY: limit 3, would be 4",
    ),
    Refusal(
        "MAX_ORDER_NOTIONAL",
        ("MAX_ORDER_NOTIONAL", 100, None),
        _LIMIT | {"quantity": 4, "limit_price": "25.50"},
        "MAX_ORDER_NOTIONAL: limit 100, would be 102",
    ),
    Refusal("FORBIDDEN_SYMBOL", ("FORBIDDEN_SYMBOL", None, "AAPL"), {}, "FORBIDDEN_SYMBOL: AAPL"),
    Refusal("SYMBOL_NOT_ALLOWED", ("ALLOWED_SYMBOL", None, "IBM"), {}, "SYMBOL_NOT_ALLOWED: AAPL"),
    Refusal(
        "INSUFFICIENT_POSITION",
        None,
        {"side": "SELL", "quantity": 2},
        "INSUFFICIENT_POSITION: holds 0, would sell 2",
    ),
    Refusal(
        "INSUFFICIENT_CASH",
        None,
        _LIMIT | {"quantity": 10, "limit_price": "100.01"},
        "INSUFFICIENT_CASH: has 1000, needs 1000.1",
    ),
)


@pytest.mark.parametrize("refusal", REFUSALS, ids=[refusal.code for refusal in REFUSALS])
def test_refusal_is_stored_told_and_final(book: Book, refusal: Refusal) -> None:
    if refusal.limit is not None:
        kind, value, symbol = refusal.limit
        book.limit(kind, value, symbol=symbol)
    stored = book.order(**refusal.order)
    _assert_refused(stored, refusal.code)
    assert stored.status_reason is not None
    assert stored.status_reason == refusal.reason
    _assert_told_and_dead(book, stored)


def test_every_risk_code_is_reached(conn: Connection) -> None:
    gate = re.findall(r"\bcode := '([A-Z_]+)'", _source(conn, "orders_gate"))
    assert {*gate} - {"FLATTEN_MUST_SHRINK"} == {
        refusal.code for refusal in REFUSALS if refusal.limit is None
    }
    codes = conn.execute("SELECT kind, code FROM limit_kind").fetchall()
    assert {(r.limit[0], r.code) for r in REFUSALS if r.limit} <= set(codes)


def test_every_kind_of_limit_is_tried_here(conn: Connection) -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    for (kind,) in conn.execute("SELECT kind FROM limit_kind").fetchall():
        assert re.search(rf'"{kind}"', text), kind


def test_the_refused_one_of_a_statement_does_not_harm_the_others(book: Book) -> None:
    book.limit("MAX_ORDER_QUANTITY", 3)
    placed = book.place({"quantity": 3}, {"quantity": 4}, {"quantity": 0}, {"quantity": 1})
    assert [order.reject_code for order in placed] == [
        None,
        "MAX_ORDER_QUANTITY",
        "QUANTITY_NOT_POSITIVE",
        None,
    ]


# MAX_ORDER_QUANTITY


@pytest.mark.parametrize("side", ["BUY", "SELL"])
def test_order_quantity_on_both_sides_of_its_limit(margin: Book, side: str) -> None:
    margin.limit("MAX_ORDER_QUANTITY", 10)
    _assert_accepted(margin.order(side=side, quantity=10))
    _assert_refused(
        margin.order(side=side, quantity="10.00000001"),
        "MAX_ORDER_QUANTITY",
        "MAX_ORDER_QUANTITY: limit 10, would be 10.00000001",
    )
    # It is a limit of each order, not of their sum.
    _assert_accepted(margin.order(side=side, quantity=10))


def test_limit_of_zero_allows_nothing(margin: Book) -> None:
    margin.limit("MAX_ORDER_QUANTITY", 0)
    _assert_refused(margin.order(quantity="0.00000001"), "MAX_ORDER_QUANTITY")


# MAX_ORDER_NOTIONAL


@pytest.mark.parametrize(
    "priced",
    [
        {"order_type": "LIMIT", "limit_price": 20},
        {"order_type": "STOP", "stop_price": 20},
        {"order_type": "STOP_LIMIT", "limit_price": 20, "stop_price": 500},
        {"reference_price": 20},
        {"order_type": "LIMIT", "limit_price": 20, "reference_price": 500},
        {"side": "SELL", "reference_price": 20},
    ],
    ids=_name,
)
def test_order_notional_on_both_sides_of_its_limit(margin: Book, priced: Columns) -> None:
    margin.limit("MAX_ORDER_NOTIONAL", 100)
    _assert_accepted(margin.order(**priced, quantity=5))
    _assert_refused(
        margin.order(**priced, quantity="5.00000001"),
        "MAX_ORDER_NOTIONAL",
        "MAX_ORDER_NOTIONAL: limit 100, would be 100.0000002",
    )


def test_market_order_is_valued_at_the_runs_own_mark(margin: Book) -> None:
    margin.hold(1, price=20)
    margin.limit("MAX_ORDER_NOTIONAL", 100)
    _assert_accepted(margin.order(quantity=5))
    _assert_refused(margin.order(quantity=6), "MAX_ORDER_NOTIONAL")


def test_market_order_is_valued_at_the_last_close_that_the_run_can_know(margin: Book) -> None:
    prices = {"open": 20, "high": 20, "low": 20, "close": 20, "symbol": "MSFT"}
    later = {"open": 1, "high": 1, "low": 1, "close": 1, "symbol": "MSFT"}
    _insert(margin.conn, "price_bar", [prices | {"bar_start": T0, "bar_end": T0}])
    _insert(margin.conn, "price_bar", [later | {"bar_start": T1, "bar_end": T1}])
    margin.limit("MAX_ORDER_NOTIONAL", 100)
    _assert_accepted(margin.order(symbol="MSFT", quantity=5))
    _assert_refused(margin.order(symbol="MSFT", quantity=6), "MAX_ORDER_NOTIONAL")
    _assert_accepted(margin.order(symbol="MSFT", quantity=100, logical_time=T1))


def test_order_that_nothing_values_is_not_within_a_notional_limit(margin: Book) -> None:
    _assert_accepted(margin.order(symbol="UNKNOWN"))
    margin.limit("MAX_ORDER_NOTIONAL", 100)
    _assert_refused(margin.order(symbol="UNKNOWN"), "MAX_ORDER_NOTIONAL")


def test_notional_of_a_negative_price_counts_in_full(margin: Book) -> None:
    _insert(margin.conn, "instrument", [{"symbol": "SPREAD", "negative_price_allowed": True}])
    margin.limit("MAX_ORDER_NOTIONAL", 100)
    _assert_accepted(margin.limit_order(5, -20, symbol="SPREAD"))
    _assert_refused(margin.limit_order(6, -20, symbol="SPREAD"), "MAX_ORDER_NOTIONAL")


# MAX_POSITION


@pytest.mark.parametrize(("side", "held"), [("BUY", 6), ("SELL", -6)])
def test_position_with_holdings_on_both_sides_of_its_limit(
    margin: Book, side: str, held: int
) -> None:
    margin.hold(held)
    margin.limit("MAX_POSITION", 10)
    _assert_refused(
        margin.order(side=side, quantity="4.00000001"),
        "MAX_POSITION",
        "MAX_POSITION: limit 10, would be 10.00000001",
    )
    _assert_accepted(margin.order(side=side, quantity=4))


@pytest.mark.parametrize("side", ["BUY", "SELL"])
@pytest.mark.parametrize("status", ["NEW", "PENDING"])
def test_open_orders_count_towards_the_position(margin: Book, side: str, status: str) -> None:
    margin.limit("MAX_POSITION", 10)
    resting = margin.limit_order(6, 10, side=side)
    if status != "NEW":
        margin.move(resting, status)
    _assert_refused(margin.order(side=side, quantity=5), "MAX_POSITION")
    _assert_accepted(margin.order(side=side, quantity=4))
    _assert_refused(margin.order(side=side, quantity="0.00000001"), "MAX_POSITION")


def test_open_orders_of_one_statement_count_towards_the_position(margin: Book) -> None:
    margin.limit("MAX_POSITION", 10)
    placed = margin.place({"quantity": 6}, {"quantity": 6}, {"quantity": 4}, {"quantity": 1})
    assert [order.status for order in placed] == ["NEW", "REJECTED", "NEW", "REJECTED"]


def test_partly_filled_order_counts_once(margin: Book) -> None:
    margin.limit("MAX_POSITION", 10)
    order = margin.limit_order(8, 10)
    margin.trade(order, 3, 10)  # holds 3, 5 are open
    _assert_refused(margin.order(quantity=3), "MAX_POSITION")
    _assert_accepted(margin.order(quantity=2))


@pytest.mark.parametrize("status", ["CANCELED", "EXPIRED"])
def test_closed_order_no_longer_counts(margin: Book, status: str) -> None:
    margin.limit("MAX_POSITION", 10)
    order = margin.limit_order(8, 10)
    margin.trade(order, 3, 10)
    margin.move(order, status)
    _assert_refused(margin.order(quantity=8), "MAX_POSITION")
    _assert_accepted(margin.order(quantity=7))


def test_open_sells_make_no_room_for_buys(margin: Book) -> None:
    margin.hold(10)
    margin.limit("MAX_POSITION", 10)
    _assert_accepted(margin.order(side="SELL", quantity=5))
    _assert_refused(margin.order(side="BUY", quantity=1), "MAX_POSITION")


def test_open_sells_take_no_room_from_buys_either(margin: Book) -> None:
    margin.limit("MAX_POSITION", 10)
    _assert_accepted(margin.order(side="SELL", quantity=6))
    _assert_accepted(margin.order(side="BUY", quantity=10))


def test_sale_through_zero_is_measured_at_its_end(margin: Book) -> None:
    margin.hold(6)
    margin.limit("MAX_POSITION", 10)
    _assert_refused(margin.order(side="SELL", quantity=17), "MAX_POSITION")
    _assert_accepted(margin.order(side="SELL", quantity=16))


@pytest.mark.parametrize(("held", "out", "more"), [(10, "SELL", "BUY"), (-10, "BUY", "SELL")])
def test_way_out_of_a_position_that_is_too_large_is_free(
    margin: Book, held: int, out: str, more: str
) -> None:
    margin.hold(held)
    margin.limit("MAX_POSITION", 4)
    _assert_refused(margin.order(side=more, quantity=1), "MAX_POSITION")
    _assert_accepted(margin.order(side=out, quantity=1))
    _assert_accepted(margin.order(side=out, quantity=9))


def test_way_out_leads_to_zero_and_not_through_it(margin: Book) -> None:
    margin.hold(-3)
    margin.limit("MAX_POSITION", 1)
    _assert_refused(margin.order(side="BUY", quantity=6), "MAX_POSITION")
    _assert_accepted(margin.order(side="BUY", quantity=3))


def test_position_in_another_symbol_does_not_count(margin: Book) -> None:
    margin.hold(10, symbol="IBM")
    margin.limit("MAX_POSITION", 10)
    _assert_accepted(margin.order(quantity=10))


# For whom and for what a limit holds.


def test_limit_of_a_symbol_leaves_others_alone(margin: Book) -> None:
    margin.limit("MAX_ORDER_QUANTITY", 10, symbol="AAPL")
    margin.limit("MAX_POSITION", 10, symbol="AAPL")
    margin.limit("MAX_ORDER_NOTIONAL", 100, symbol="AAPL")
    _assert_refused(margin.order(quantity=11), "MAX_ORDER_NOTIONAL")
    _assert_refused(margin.order(quantity=11, reference_price=1), "MAX_ORDER_QUANTITY")
    _assert_accepted(margin.order(quantity=11, symbol="IBM"))


@pytest.mark.parametrize("kind", ["MAX_ORDER_QUANTITY", "MAX_POSITION", "MAX_ORDER_NOTIONAL"])
def test_limit_without_a_symbol_holds_for_all(margin: Book, kind: str) -> None:
    margin.limit(kind, 10)
    for symbol in ("AAPL", "IBM", "UNKNOWN"):
        _assert_refused(margin.order(quantity=11, reference_price=1, symbol=symbol), kind)
        _assert_accepted(margin.order(quantity=10, reference_price=1, symbol=symbol))


@pytest.mark.parametrize(("of_all", "of_symbol"), [(5, 8), (8, 5)])
def test_strictest_limit_decides(margin: Book, of_all: int, of_symbol: int) -> None:
    margin.limit("MAX_ORDER_QUANTITY", of_all)
    margin.limit("MAX_ORDER_QUANTITY", of_symbol, symbol="AAPL", per_run=False)
    _assert_accepted(margin.order(quantity=5))
    _assert_refused(
        margin.order(quantity=9), "MAX_ORDER_QUANTITY", "MAX_ORDER_QUANTITY: limit 5, would be 9"
    )
    _assert_refused(margin.order(quantity=6), "MAX_ORDER_QUANTITY")


@pytest.mark.parametrize(
    ("kind", "value", "symbol", "code"),
    [
        ("MAX_POSITION", 3, None, "MAX_POSITION"),
        ("MAX_ORDER_QUANTITY", 3, None, "MAX_ORDER_QUANTITY"),
        ("MAX_ORDER_NOTIONAL", 3, None, "MAX_ORDER_NOTIONAL"),
        ("FORBIDDEN_SYMBOL", None, "AAPL", "FORBIDDEN_SYMBOL"),
        ("ALLOWED_SYMBOL", None, "IBM", "SYMBOL_NOT_ALLOWED"),
    ],
)
def test_limit_holds_for_its_user_or_its_run_alone(
    conn: Connection, kind: str, value: int | None, symbol: str | None, code: str
) -> None:
    order: Columns = {"quantity": 4, "reference_price": 1}
    of_run, stranger = _new_run(conn), _new_run(conn)
    of_run.limit(kind, value, symbol=symbol)
    _assert_refused(of_run.order(**order), code)
    _assert_accepted(stranger.order(**order))
    # Another run of the same user is not concerned by the run's limit ...
    conn.execute(
        "UPDATE strategy_run SET status = 'STOPPED' WHERE user_id = %s AND run_id = %s",
        (of_run.user, of_run.run),
    )
    next_run = _new_run(conn, user=of_run.user)
    _assert_accepted(next_run.order(**order))
    # ... but by the user's.
    next_run.limit(kind, value, symbol=symbol, per_run=False)
    _assert_refused(next_run.order(**order, symbol="AAPL"), code)
    _assert_accepted(stranger.order(**order))


def test_limit_made_before_the_run_starts_holds(conn: Connection) -> None:
    book = _new_run(conn, status="CREATED")
    book.limit("MAX_ORDER_QUANTITY", 3)
    conn.execute("UPDATE strategy_run SET status = 'RUNNING' WHERE run_id = %s", (book.run,))
    _assert_refused(book.order(quantity=4), "MAX_ORDER_QUANTITY")
    _assert_accepted(book.order(quantity=3))


def test_limit_that_is_removed_holds_no_longer(margin: Book) -> None:
    margin.limit("MAX_ORDER_QUANTITY", 3)
    _assert_refused(margin.order(quantity=4), "MAX_ORDER_QUANTITY")
    margin.conn.execute("DELETE FROM risk_limit WHERE user_id = %s", (margin.user,))
    _assert_accepted(margin.order(quantity=4))


# FORBIDDEN_SYMBOL and ALLOWED_SYMBOL


def test_forbidden_symbol_and_its_neighbour(book: Book) -> None:
    book.limit("FORBIDDEN_SYMBOL", symbol=" aapl ")
    _assert_refused(book.order(symbol="AAPL"), "FORBIDDEN_SYMBOL")
    _assert_refused(book.order(symbol="aapl"), "FORBIDDEN_SYMBOL")
    _assert_accepted(book.order(symbol="AAPLW"))
    _assert_accepted(book.order(symbol="IBM"))


def test_forbidden_symbol_can_not_be_sold_either(margin: Book) -> None:
    margin.hold(5)
    margin.limit("FORBIDDEN_SYMBOL", symbol="AAPL")
    _assert_refused(margin.order(side="SELL"), "FORBIDDEN_SYMBOL")


def test_allowed_symbols_are_the_only_ones(book: Book) -> None:
    _assert_accepted(book.order(symbol="MSFT"))
    book.limit("ALLOWED_SYMBOL", symbol="aapl")
    book.limit("ALLOWED_SYMBOL", symbol="IBM", per_run=False)
    _assert_accepted(book.order(symbol="AAPL"))
    _assert_accepted(book.order(symbol="ibm"))
    _assert_refused(book.order(symbol="MSFT"), "SYMBOL_NOT_ALLOWED")


def test_forbidden_goes_before_allowed(book: Book) -> None:
    book.limit("ALLOWED_SYMBOL", symbol="AAPL")
    book.limit("FORBIDDEN_SYMBOL", symbol="AAPL", per_run=False)
    _assert_refused(book.order(), "FORBIDDEN_SYMBOL")


# Buying power


@pytest.mark.parametrize(
    "priced",
    [
        {"order_type": "LIMIT", "limit_price": 100},
        {"order_type": "STOP", "stop_price": 100},
        {"order_type": "STOP_LIMIT", "limit_price": 100, "stop_price": 1},
        {"order_type": "TRAIL", "trail_amount": 1, "stop_price": 100},
        {"reference_price": 100},
    ],
    ids=_name,
)
def test_all_of_the_cash_and_not_a_cent_more(book: Book, priced: Columns) -> None:
    _assert_refused(
        book.order(**priced, quantity="10.0001"),
        "INSUFFICIENT_CASH",
        "INSUFFICIENT_CASH: has 1000, needs 1000.01",
    )
    order = book.order(**priced, quantity=10)
    _assert_accepted(order)
    assert order.reserved_cash == 1000


def test_cash_is_not_asked_for_on_margin(margin: Book) -> None:
    _assert_accepted(margin.limit_order(1000, 100))


def test_resting_buys_hold_cash_back(book: Book) -> None:
    assert book.limit_order(6, 100).reserved_cash == 600
    _assert_refused(
        book.limit_order(5, 100),
        "INSUFFICIENT_CASH",
        "INSUFFICIENT_CASH: has 400, needs 500",
    )
    # What was refused holds nothing back, whatever the symbol.
    _assert_accepted(book.limit_order(4, 100, symbol="IBM"))
    _assert_refused(book.limit_order(1, "0.01"), "INSUFFICIENT_CASH")


def test_orders_of_one_statement_share_the_cash(book: Book) -> None:
    limit = {"order_type": "LIMIT", "limit_price": 100}
    first, second, third, fourth = book.place(
        limit | {"quantity": 6},
        limit | {"quantity": 6},
        limit | {"quantity": 4, "symbol": "IBM"},
        limit | {"quantity": 1},
    )
    _assert_accepted(first)
    _assert_refused(second, "INSUFFICIENT_CASH", "INSUFFICIENT_CASH: has 400, needs 600")
    _assert_accepted(third)
    _assert_refused(fourth, "INSUFFICIENT_CASH", "INSUFFICIENT_CASH: has 0, needs 100")


def test_market_order_holds_back_its_reference_price(book: Book) -> None:
    book.hold(1, price=100)  # 900 left, and a mark of 100
    order = book.order(quantity=5)
    _assert_accepted(order)
    assert order.reserved_cash == 500
    _assert_refused(book.order(quantity=5), "INSUFFICIENT_CASH")
    _assert_accepted(book.order(quantity=4))


@pytest.mark.parametrize("status", ["CANCELED", "EXPIRED", "REJECTED"])
def test_end_of_an_order_frees_what_it_held_back(book: Book, status: str) -> None:
    order = book.limit_order(10, 100)
    _assert_refused(book.limit_order(10, 100), "INSUFFICIENT_CASH")
    if status == "REJECTED":
        book.conn.execute(
            """UPDATE orders SET status = 'REJECTED', reject_source = 'RISK', reject_code = 'LATE'
               WHERE order_id = %s""",
            (order.order_id,),
        )
    else:
        book.move(order, status)
    assert book.stored(order.order_id).reserved_cash == 0
    _assert_accepted(book.limit_order(10, 100))


def test_partly_filled_order_holds_back_the_rest(book: Book) -> None:
    order = book.limit_order(8, 100)
    book.trade(order, 3, 90)  # 730 left, 500 held back
    assert book.stored(order.order_id).reserved_cash == 500
    _assert_refused(book.limit_order(1, "230.01"), "INSUFFICIENT_CASH")
    _assert_accepted(book.limit_order(1, 230))
    # The end of the rest frees the rest, not what was paid.
    book.move(order, "CANCELED")
    _assert_refused(book.limit_order(1, "500.01"), "INSUFFICIENT_CASH")
    _assert_accepted(book.limit_order(1, 500))


def test_filled_order_holds_nothing_back(book: Book) -> None:
    book.hold(5, price=100)
    _assert_refused(book.limit_order(5, "100.01"), "INSUFFICIENT_CASH")
    _assert_accepted(book.limit_order(5, 100))


def test_resting_sells_hold_no_cash_back_and_bring_none(book: Book) -> None:
    book.hold(5, price=100)
    assert book.limit_order(5, 1000, side="SELL").reserved_cash == 0
    _assert_refused(book.limit_order(5, "100.01"), "INSUFFICIENT_CASH")
    _assert_accepted(book.limit_order(5, 100))


def test_orders_of_other_runs_hold_nothing_back(conn: Connection) -> None:
    first, second = _new_run(conn), _new_run(conn)
    _assert_accepted(first.limit_order(10, 100))
    _assert_accepted(second.limit_order(10, 100))


# Holdings


def test_sale_of_what_is_held_and_not_more(book: Book) -> None:
    book.hold(5)
    _assert_refused(
        book.order(side="SELL", quantity="5.00000001"),
        "INSUFFICIENT_POSITION",
        "INSUFFICIENT_POSITION: holds 5, would sell 5.00000001",
    )
    _assert_accepted(book.order(side="SELL", quantity=5))


def test_open_sells_count_against_what_is_held(book: Book) -> None:
    book.hold(5)
    resting = book.limit_order(3, 1000, side="SELL")
    _assert_refused(
        book.order(side="SELL", quantity=3),
        "INSUFFICIENT_POSITION",
        "INSUFFICIENT_POSITION: holds 2, would sell 3",
    )
    _assert_accepted(book.order(side="SELL", quantity=2))
    book.move(resting, "CANCELED")
    _assert_accepted(book.order(side="SELL", quantity=3))


def test_open_sells_of_one_statement_count(book: Book) -> None:
    book.hold(5)
    sell = {"side": "SELL", "quantity": 3}
    placed = book.place(sell, sell, sell | {"quantity": 2})
    assert [order.reject_code for order in placed] == [None, "INSUFFICIENT_POSITION", None]


def test_open_buys_are_not_held_yet(book: Book) -> None:
    book.limit_order(5, 10)
    _assert_refused(book.order(side="SELL"), "INSUFFICIENT_POSITION")


def test_holding_of_another_symbol_can_not_be_sold(book: Book) -> None:
    book.hold(5, symbol="IBM")
    _assert_refused(book.order(side="SELL"), "INSUFFICIENT_POSITION")


def test_margin_account_sells_short(margin: Book) -> None:
    _assert_accepted(margin.order(side="SELL", quantity=5))
    margin.hold(-5)
    _assert_accepted(margin.order(side="SELL", quantity=5))


# More kinds of limits. A window, a day and an hour of a paper run are those of its logical time.


def _at(seconds: float) -> str:
    """A logical time so many seconds after T0."""
    return (datetime(2024, 1, 2, 21, tzinfo=UTC) + timedelta(seconds=seconds)).isoformat()


@pytest.mark.parametrize("change", [{"side": "SELL"}, {"quantity": 2}, {"symbol": "IBM"}])
def test_same_intent_again_within_the_window(margin: Book, change: Columns) -> None:
    margin.limit("DUPLICATE_INTENT", 5)
    _assert_accepted(margin.order(**_LIMIT))
    _assert_refused(
        margin.order(**_LIMIT, logical_time=_at(4.5)),
        "DUPLICATE_INTENT",
        "DUPLICATE_INTENT: limit 5, would be 4.5",
    )
    _assert_accepted(margin.order(**(_LIMIT | {"limit_price": 11}), logical_time=_at(4.5)))
    _assert_accepted(margin.order(**_LIMIT, **change, logical_time=_at(4.5)))
    _assert_accepted(margin.order(**_LIMIT, logical_time=_at(5)))


def test_same_intent_twice_in_one_statement(margin: Book) -> None:
    margin.limit("DUPLICATE_INTENT", 5)
    placed = margin.place({"quantity": 3}, {"quantity": 3}, {"quantity": 4})
    assert [order.reject_code for order in placed] == [None, "DUPLICATE_INTENT", None]


def test_what_was_refused_is_no_first_intent(margin: Book) -> None:
    margin.limit("DUPLICATE_INTENT", 5)
    margin.limit("MAX_ORDER_QUANTITY", 1)
    _assert_refused(margin.order(quantity=2), "MAX_ORDER_QUANTITY")
    _assert_refused(margin.order(quantity=2), "MAX_ORDER_QUANTITY")


def test_order_rate_on_both_sides_of_its_limit(margin: Book) -> None:
    margin.limit("ORDER_RATE_MAX", 2)
    placed = margin.place({"quantity": 1}, {"quantity": 2}, {"quantity": 3})
    assert [order.reject_code for order in placed] == [None, None, "ORDER_RATE_MAX"]
    _assert_refused(
        margin.order(quantity=4, logical_time=_at(0.9)),
        "ORDER_RATE_MAX",
        "ORDER_RATE_MAX: limit 2, would be 3",
    )
    _assert_accepted(margin.order(quantity=4, logical_time=_at(1)))


def test_order_rate_counts_what_is_filled_and_cancelled_in_a_longer_window(margin: Book) -> None:
    margin.limit("ORDER_RATE_MAX", 2, seconds=60)
    margin.hold(1)
    margin.move(margin.order(), "CANCELED")
    _assert_refused(margin.order(logical_time=_at(59)), "ORDER_RATE_MAX")
    _assert_accepted(margin.order(logical_time=_at(60)))


def test_open_orders_on_both_sides_of_their_limit(margin: Book) -> None:
    margin.limit("OPEN_ORDERS_MAX", 2)
    first = margin.order()
    _assert_accepted(margin.order(symbol="IBM"))
    _assert_refused(margin.order(), "OPEN_ORDERS_MAX", "OPEN_ORDERS_MAX: limit 2, would be 3")
    margin.move(first, "CANCELED")
    _assert_accepted(margin.order())


def test_open_orders_of_a_symbol(margin: Book) -> None:
    margin.limit("OPEN_ORDERS_MAX", 1, symbol="AAPL")
    _assert_accepted(margin.order(symbol="IBM"))
    _assert_accepted(margin.order())
    _assert_refused(margin.order(), "OPEN_ORDERS_MAX")
    _assert_accepted(margin.order(symbol="IBM"))


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        (_LIMIT | {"limit_price": 110}, _LIMIT | {"limit_price": "110.01"}),
        (_LIMIT | {"limit_price": 90}, _LIMIT | {"limit_price": "89.99"}),
        (_STOP | {"stop_price": 110}, _STOP | {"stop_price": 111}),
        (_STOP_LIMIT | {"limit_price": 110, "stop_price": 90}, _STOP_LIMIT | {"limit_price": 100}),
    ],
)
def test_price_collar_on_both_sides(margin: Book, inside: Columns, outside: Columns) -> None:
    margin.hold(1, price=100)
    margin.limit("PRICE_COLLAR", 10)
    _assert_accepted(margin.order(**inside))
    _assert_refused(margin.order(**outside), "PRICE_COLLAR")
    _assert_accepted(margin.order(quantity=7))


def test_price_collar_where_nothing_is_known_of_the_price(margin: Book) -> None:
    margin.limit("PRICE_COLLAR", 10)
    _assert_refused(
        margin.order(**_LIMIT), "PRICE_COLLAR", "PRICE_COLLAR: limit 10, would be unknown"
    )


def test_price_collar_goes_by_the_newest_price(margin: Book) -> None:
    margin.hold(1, price=100)
    bar = {"symbol": "AAPL", "bar_start": T1, "bar_end": T1}
    _insert(margin.conn, "price_bar", [bar | {"open": 50, "high": 50, "low": 50, "close": 50}])
    margin.limit("PRICE_COLLAR", 10)
    _assert_refused(margin.limit_order(1, 50), "PRICE_COLLAR")
    _assert_accepted(margin.limit_order(1, 50, logical_time=T1))


def test_gross_exposure_on_both_sides_of_its_limit(margin: Book) -> None:
    margin.hold(5, price=100)
    margin.hold(-2, price=100, symbol="IBM")
    margin.limit("GROSS_EXPOSURE_MAX", 1000)
    _assert_refused(
        margin.limit_order(4, 100),
        "GROSS_EXPOSURE_MAX",
        "GROSS_EXPOSURE_MAX: limit 1000, would be 1100",
    )
    _assert_accepted(margin.limit_order(3, 100, symbol="MSFT"))
    _assert_refused(margin.limit_order(1, 100), "GROSS_EXPOSURE_MAX")
    # What only shrinks may always go.
    _assert_accepted(margin.limit_order(5, 100, side="SELL"))
    _assert_refused(margin.limit_order(1, 100, side="SELL", symbol="X"), "GROSS_EXPOSURE_MAX")


def test_net_exposure_takes_shorts_off(margin: Book) -> None:
    margin.hold(5, price=100)
    margin.hold(-2, price=100, symbol="IBM")
    margin.limit("NET_EXPOSURE_MAX", 500)
    _assert_refused(
        margin.limit_order(3, 100),
        "NET_EXPOSURE_MAX",
        "NET_EXPOSURE_MAX: limit 500, would be 600",
    )
    _assert_accepted(margin.limit_order(2, 100))


def test_concentration_on_both_sides_of_its_limit(margin: Book) -> None:
    # Equity is 1,000, whatever is bought.
    margin.hold(1, price=100, symbol="IBM")
    margin.limit("CONCENTRATION_MAX", 25)
    _assert_refused(
        margin.limit_order("2.51", 100),
        "CONCENTRATION_MAX",
        "CONCENTRATION_MAX: limit 25, would be 25.1",
    )
    _assert_accepted(margin.limit_order("2.5", 100))
    _assert_refused(margin.limit_order(2, 100, symbol="IBM"), "CONCENTRATION_MAX")


def test_leverage_on_both_sides_of_its_limit(margin: Book) -> None:
    margin.hold(15, price=100)
    margin.limit("LEVERAGE_MAX", 2)
    _assert_refused(
        margin.limit_order("5.5", 100), "LEVERAGE_MAX", "LEVERAGE_MAX: limit 2, would be 2.05"
    )
    _assert_accepted(margin.limit_order(5, 100))


def test_leverage_without_equity_is_unknown_and_only_shrinking_is_left(margin: Book) -> None:
    margin.hold(100, price=100)
    margin.mark(89, T1)
    margin.limit("LEVERAGE_MAX", 1000)
    _assert_refused(margin.limit_order(1, 89, symbol="IBM", logical_time=T1), "LEVERAGE_MAX")
    _assert_accepted(margin.limit_order(100, 89, side="SELL", logical_time=T1))


def test_daily_loss_counts_from_the_mark_before_the_session(margin: Book) -> None:
    margin.session("2024-01-02", "14:30", "21:00")
    margin.session("2024-01-03", "14:30", "21:00")
    margin.hold(10, price=100)
    margin.mark(110, T0)  # equity 1,100 at the end of the first session
    margin.limit("DAILY_LOSS_MAX", 50)
    margin.mark(105, "2024-01-03 15:00+00")  # 50 less
    _assert_accepted(margin.order(logical_time="2024-01-03 15:00+00"))
    margin.mark("104.99", "2024-01-03 16:00+00")
    refused = margin.order(logical_time="2024-01-03 16:00+00")
    _assert_refused(refused, "DAILY_LOSS_MAX", "DAILY_LOSS_MAX: limit 50, would be 50.1")
    _assert_accepted(margin.order(side="SELL", logical_time="2024-01-03 16:00+00"))
    # The next day counts from the mark of this one.
    margin.session("2024-01-04", "14:30", "21:00")
    _assert_accepted(margin.order(logical_time="2024-01-04 15:00+00"))


def test_drawdown_counts_from_the_highest_mark(margin: Book) -> None:
    margin.hold(10, price=100)
    margin.mark(100, T0)
    margin.limit("DRAWDOWN_MAX", 10)
    margin.mark(150, "2024-01-03 15:00+00")  # 1,500
    margin.mark(135, "2024-01-03 16:00+00")  # 10 % below
    _assert_accepted(margin.order(logical_time="2024-01-03 16:00+00"))
    margin.mark(134, "2024-01-03 17:00+00")
    refused = margin.order(logical_time="2024-01-03 17:00+00")
    _assert_refused(refused, "DRAWDOWN_MAX", "DRAWDOWN_MAX: limit 10, would be 10.66666667")
    _assert_accepted(margin.order(side="SELL", logical_time="2024-01-03 17:00+00"))


def test_highest_mark_is_kept_so_that_few_are_read(margin: Book) -> None:
    margin.hold(10, price=100)
    start = datetime(2024, 1, 2, 21, tzinfo=UTC)
    for number in range(120):
        margin.mark(200 if number == 3 else 100, (start + timedelta(minutes=number)).isoformat())
    margin.limit("DRAWDOWN_MAX", 10)
    late = (start + timedelta(minutes=200)).isoformat()
    for _ in range(2):
        refused = margin.order(logical_time=late)
        _assert_refused(refused, "DRAWDOWN_MAX", "DRAWDOWN_MAX: limit 10, would be 50")
    kept = margin.conn.execute(
        "SELECT equity, as_of FROM equity_peak WHERE user_id = %s AND run_id = %s",
        (margin.user, margin.run),
    ).fetchone()
    assert kept == (2000, start + timedelta(minutes=119))


def test_restricted_symbol_from_its_first_day_to_its_last(margin: Book) -> None:
    margin.limit("RESTRICTED_SYMBOL", symbol="AAPL", valid_from="2024-01-03", valid_to="2024-01-04")
    _assert_accepted(margin.order(logical_time="2024-01-02 23:59:59+00"))
    for moment in ("2024-01-03 00:00+00", "2024-01-04 23:59:59+00"):
        refused = margin.order(logical_time=moment)
        assert (refused.reject_source, refused.reject_code, refused.status_reason) == (
            "COMPLIANCE",
            "RESTRICTED_SYMBOL",
            "RESTRICTED_SYMBOL: AAPL",
        )
    _assert_accepted(margin.order(symbol="IBM", logical_time="2024-01-04 23:59:59+00"))
    _assert_accepted(margin.order(logical_time="2024-01-05 00:00+00"))


def test_restricted_symbol_without_days_is_always(margin: Book) -> None:
    margin.limit("RESTRICTED_SYMBOL", symbol="AAPL")
    assert margin.order().reject_code == "RESTRICTED_SYMBOL"
    assert margin.order(side="SELL").reject_code == "RESTRICTED_SYMBOL"


@pytest.mark.parametrize(
    ("resting", "crosses", "passes"),
    [
        ({"side": "SELL", "price": 100}, {"side": "BUY", "price": 100}, {"price": "99.99"}),
        ({"side": "BUY", "price": 100}, {"side": "SELL", "price": 100}, {"price": "100.01"}),
    ],
)
def test_wash_trade_on_both_sides(
    margin: Book, resting: dict[str, Any], crosses: dict[str, Any], passes: dict[str, Any]
) -> None:
    margin.limit("WASH_TRADE")
    margin.limit_order(5, resting["price"], side=resting["side"])
    refused = margin.limit_order(1, crosses["price"], side=crosses["side"])
    assert (refused.reject_source, refused.reject_code) == ("COMPLIANCE", "WASH_TRADE")
    assert margin.order(side=crosses["side"], quantity=1).reject_code == "WASH_TRADE"
    _assert_accepted(margin.limit_order(1, passes["price"], side=crosses["side"]))
    _assert_accepted(margin.limit_order(1, crosses["price"], side=crosses["side"], symbol="IBM"))
    # Those of one's own side, and stops that nothing has reached, trade with nobody.
    _assert_accepted(margin.limit_order(1, resting["price"], side=resting["side"]))
    _assert_accepted(margin.order(side=crosses["side"], **_STOP | {"stop_price": 100}))
    margin.conn.execute("UPDATE orders SET status = 'CANCELED' WHERE side = %s", [resting["side"]])
    _assert_accepted(margin.limit_order(1, crosses["price"], side=crosses["side"]))


def test_trading_hours_and_holidays(margin: Book) -> None:
    margin.session("2024-01-02", "14:30", "21:00")
    margin.limit("TRADING_HOURS")
    _assert_accepted(margin.order(logical_time="2024-01-02 14:30+00"))
    _assert_accepted(margin.order(logical_time="2024-01-02 21:00+00"))
    for moment, code in (
        ("2024-01-02 21:00:01+00", "MARKET_CLOSED"),
        ("2024-01-03 15:00+00", "MARKET_HOLIDAY"),
    ):
        refused = margin.order(logical_time=moment)
        assert (refused.reject_source, refused.reject_code) == ("COMPLIANCE", code)


def test_first_broken_limit_is_told_in_the_order_of_the_kinds(margin: Book) -> None:
    margin.limit("MAX_POSITION", 1)
    margin.limit("MAX_ORDER_QUANTITY", 2)
    margin.limit("MAX_ORDER_QUANTITY", 1)
    margin.limit("RESTRICTED_SYMBOL", symbol="IBM")
    _assert_refused(
        margin.order(quantity=3), "MAX_ORDER_QUANTITY", "MAX_ORDER_QUANTITY: limit 1, would be 3"
    )
    assert margin.order(quantity=3, symbol="IBM").reject_code == "RESTRICTED_SYMBOL"


def test_refusal_is_taken_apart_for_people(margin: Book) -> None:
    margin.limit("MAX_POSITION", "5.50")
    refused = margin.order(quantity=6)
    assert margin.conn.execute(
        "SELECT reject_code, log_code, limit_value, value FROM order_refusal WHERE order_id = %s",
        [refused.order_id],
    ).fetchall() == [("MAX_POSITION", "POSITION_LIMIT", Decimal("5.5"), 6)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "MAX_POSITION"},
        {"kind": "MAX_POSITION", "limit_value": -1},
        {"kind": "MAX_POSITION", "limit_value": 1, "seconds": 1},
        {"kind": "MAX_POSITION", "limit_value": 1, "valid_from": "2024-01-01"},
        {"kind": "ORDER_RATE_MAX", "limit_value": 1, "seconds": 0},
        {"kind": "ORDER_RATE_MAX", "limit_value": 1, "seconds": 86401},
        {"kind": "DUPLICATE_INTENT", "limit_value": 86401},
        {"kind": "RESTRICTED_SYMBOL"},
        {"kind": "RESTRICTED_SYMBOL", "symbol": "A", "limit_value": 1},
        {"kind": "WASH_TRADE", "limit_value": 1},
        {"kind": "TRADING_HOURS", "limit_value": 1},
        {
            "kind": "RESTRICTED_SYMBOL",
            "symbol": "A",
            "valid_from": "2024-01-02",
            "valid_to": "2024-01-01",
        },
        {"kind": "NO_SUCH_LIMIT", "limit_value": 1},
    ],
    ids=_name,
)
def test_limit_that_makes_no_sense_is_refused(margin: Book, wrong: Columns) -> None:
    with pytest.raises(psycopg.IntegrityError), margin.conn.transaction():
        _insert(margin.conn, "risk_limit", [{"user_id": margin.user} | dict(wrong)])
