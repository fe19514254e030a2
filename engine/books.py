"""A run's books as a tick sees them: read once, kept in step with what the tick does.

What is kept in step here is what the database computes too, and it is the database that is right:
a write whose cash or market value isn't what the ledger makes of it is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

from engine.db.connect import Connection
from engine.errors import BadInput
from engine.ledger import TOLD, Told
from engine.market.model import Session
from engine.orders.model import Fill, Order, OrderType, Side, TimeInForce
from engine.quantities import EXACT, quotient
from engine.runs import RUN_COLUMNS, Run, run_of
from engine.strategies.base import Holding, SipDue

ZERO = Decimal(0)
_COST_DECIMALS = 12
_AVERAGE_DECIMALS = 10

# One statement, so that all of it is of one moment.
_READ_FROM = f"""
    SELECT r.cash, s.last_logical_time, s.state, h.seq, h.logical_time,
           (SELECT jsonb_agg(jsonb_build_array(p.symbol, p.quantity::text, p.cost_basis::text,
                                               p.avg_cost::text, p.mark_price::text, p.marked_at))
            FROM position p WHERE p.user_id = r.user_id AND p.run_id = r.run_id),
           (SELECT true FROM orders o
            WHERE o.user_id = r.user_id AND o.run_id = r.run_id
              AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
            ORDER BY o.symbol LIMIT 1),
           -- What is due of its plans, for the strategy that carries them out.
           u.upto,
           (SELECT jsonb_agg(jsonb_build_array(
                       d.plan, d.symbol, d.amount::text, d.missed_policy, d.occasion, d.planned_on,
                       d.next_open_at, d.session_date, d.open_at, d.close_at))
            FROM sip_due(r.user_id, r.run_id, u.upto) d WHERE u.upto IS NOT NULL),
           ARRAY(SELECT a.symbol FROM sip_plan a
                 WHERE a.user_id = r.user_id AND a.run_id = r.run_id AND a.status = 'ACTIVE'),
           t.*, {", ".join(f"r.{column}" for column in RUN_COLUMNS)}
    FROM {{keys}}
    JOIN strategy_run r ON r.user_id = k.user_id AND r.run_id = k.run_id
    LEFT JOIN engine_state s ON s.user_id = r.user_id AND s.run_id = r.run_id
    LEFT JOIN LATERAL (SELECT l.seq, l.logical_time FROM event_ledger l
                       WHERE l.user_id = r.user_id AND l.run_id = r.run_id
                       ORDER BY l.seq DESC LIMIT 1) h ON true
    LEFT JOIN LATERAL (SELECT {TOLD} FROM event_ledger l
                       WHERE l.user_id = r.user_id AND l.run_id = r.run_id
                         AND l.logical_time = k.at AND l.event_type = 'TICK' AND l.subject = ''
                      ) t ON true
    LEFT JOIN LATERAL (SELECT (calendar_session_at(r.calendar, k.at)).session_date AS upto
                       WHERE r.strategy = 'sip') u ON true"""
_READ = _READ_FROM.format(
    keys="(SELECT %(user)s::uuid AS user_id, %(run)s::uuid AS run_id,"
    " %(at)s::timestamptz AS at) AS k"
)
_READ_MANY = _READ_FROM.format(
    keys="unnest(%(users)s::uuid[], %(runs)s::uuid[], %(ats)s::timestamptz[])"
    " AS k (user_id, run_id, at)"
)

_OPEN_ORDERS = """
    SELECT status, reserved_cash,
           CASE WHEN filled_quantity = 0 THEN 0
                ELSE (SELECT count(*) FROM execution e
                      WHERE e.user_id = o.user_id AND e.run_id = o.run_id
                        AND e.order_id = o.order_id) END,
           order_id, symbol, side, quantity, order_type, time_in_force, logical_time, limit_price,
           stop_price, trail_amount, trail_percent, expire_at, triggered_at, filled_quantity
    FROM orders o
    WHERE user_id = %s AND run_id = %s
      AND status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
    ORDER BY order_id"""


@dataclass(slots=True)
class Books:
    """Cash (currency), holdings and open orders by key, and the strategy's state.

    ``head`` is the number of the newest event in the ledger (0: none), ``stands_at`` its logical
    time. ``costs`` and ``marks`` are by symbol: what is held cost so much, in currency, and was
    last seen at such a price at such a time, of everything that was ever held.

    ``remembered``: the strategy has asked for this ``state``, which isn't written yet.

    ``statuses``, ``reserved`` and ``executions`` are those of the open orders: their status as
    stored, the cash that each holds back, and how many executions each has had. ``began`` is the
    logical time of the first event of a run that hasn't ticked yet.
    """

    cash: Decimal = ZERO
    holdings: dict[str, Holding] = field(default_factory=dict)
    costs: dict[str, Decimal] = field(default_factory=dict)
    marks: dict[str, tuple[Decimal, datetime]] = field(default_factory=dict)
    orders: dict[UUID, Order] = field(default_factory=dict)
    statuses: dict[UUID, str] = field(default_factory=dict)
    reserved: dict[UUID, Decimal] = field(default_factory=dict)
    executions: dict[UUID, int] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    remembered: bool = False
    last_tick: datetime | None = None
    began: datetime | None = None
    head: int = 0
    stands_at: datetime | None = None

    @property
    def available_cash(self) -> Decimal:
        free = self.cash
        for reserved in self.reserved.values():
            free = EXACT.subtract(free, reserved)
        return free

    @property
    def market_value(self) -> Decimal:
        """What the holdings are worth at their marks."""
        value = ZERO
        for holding in self.holdings.values():
            value = EXACT.add(
                value, EXACT.multiply(holding.quantity, self.marks[holding.symbol][0])
            )
        return value

    def symbols(self) -> set[str]:
        """What a price matters for: everything held or ordered."""
        return self.holdings.keys() | {order.symbol for order in self.orders.values()}

    def fill(self, fill: Fill, at: datetime) -> None:
        """Take up an execution at a tick: cash, holding, cost and mark."""
        units = EXACT.multiply(fill.quantity, fill.price)
        bought = fill.side is Side.BUY
        flow = EXACT.minus(units) if bought else units
        self.cash = EXACT.subtract(EXACT.add(self.cash, flow), fill.commission)
        delta = fill.quantity if bought else -fill.quantity
        held = self.holdings.get(fill.symbol)
        quantity = held.quantity if held else ZERO
        cost = after_trade(quantity, self.costs.get(fill.symbol, ZERO), delta, fill.price)
        mark = self.marks.get(fill.symbol)
        if mark is None or mark[1] < at:
            mark = self.marks[fill.symbol] = fill.price, at
        self.costs[fill.symbol] = cost
        quantity = EXACT.add(quantity, delta)
        if quantity:
            average = quotient(cost, quantity, _AVERAGE_DECIMALS)
            self.holdings[fill.symbol] = Holding(fill.symbol, quantity, average, mark[0])
        else:
            del self.holdings[fill.symbol]

    def mark(self, symbol: str, price: Decimal, at: datetime) -> bool:
        """Give a holding a price seen at ``at``; false if it has a newer one."""
        if self.marks[symbol][1] > at:
            return False
        self.marks[symbol] = price, at
        held = self.holdings[symbol]
        self.holdings[symbol] = Holding(symbol, held.quantity, held.avg_cost, price)
        return True


def after_trade(quantity: Decimal, cost: Decimal, delta: Decimal, price: Decimal) -> Decimal:
    """The cost of a position after a trade of ``delta`` units: position_after of the schema."""
    if quantity * delta >= 0:
        return EXACT.add(cost, EXACT.multiply(delta, price))
    closed = min(abs(delta), abs(quantity)).copy_sign(delta)
    removed = cost
    if closed != -quantity:
        removed = quotient(EXACT.multiply(cost, -closed), quantity, _COST_DECIMALS)
    opened = EXACT.multiply(EXACT.subtract(delta, closed), price)
    return EXACT.add(EXACT.subtract(cost, removed), opened)


class Opened(NamedTuple):
    """A run and its books at one moment, and what its TICK at a logical time told, if any.

    ``due`` is a session and the occasions of its plans that are due at it, where its strategy
    carries them out and the session is stored. ``symbols`` are those that the run holds, has
    ordered or plans to buy.
    """

    run: Run
    books: Books
    told: Told | None = None
    due: tuple[date, tuple[SipDue, ...]] | None = None
    symbols: frozenset[str] = frozenset()


def open_books(conn: Connection, user_id: UUID, run_id: UUID, at: datetime | None = None) -> Opened:
    """Read a run and its books, and the TICK at ``at``. Raises BadInput for an unknown run."""
    row = conn.execute(_READ, {"at": at, "user": user_id, "run": run_id}, prepare=True).fetchone()
    if row is None:
        raise BadInput(f"user {user_id} has no run {run_id}; `oms run list` shows the runs")
    return _opened(conn, row)


def open_many(conn: Connection, keys: Sequence[tuple[UUID, UUID, datetime]]) -> dict[UUID, Opened]:
    """Read several runs as ``open_books`` does, by run; ``keys`` are users, runs and times.

    Unknown runs are left out.
    """
    users, runs, times = zip(*keys, strict=True) if keys else ((), (), ())
    with conn.transaction():
        # A plan that was made while a table was empty reads all of it for as long as it is kept.
        conn.execute("SET LOCAL enable_seqscan = off")
        rows = conn.execute(
            _READ_MANY, {"users": [*users], "runs": [*runs], "ats": [*times]}, prepare=True
        ).fetchall()
    opened = (_opened(conn, row) for row in rows)
    return {each.run.run_id: each for each in opened}


def _opened(conn: Connection, row: tuple[Any, ...]) -> Opened:
    books, told, run = Books(), row[10:15], run_of(row[15:])
    books.last_tick, books.state = row[1], row[2] or {}
    _take_up(conn, run, books, row)
    if books.last_tick is None and books.head:
        first = conn.execute(
            """SELECT logical_time FROM event_ledger
               WHERE user_id = %s AND run_id = %s ORDER BY seq LIMIT 1""",
            [run.user_id, run.run_id],
        ).fetchone()
        books.began = first[0] if first else None
    due = None
    if row[7] is not None:
        due = row[7], tuple(_due(run.calendar, *occasion) for occasion in row[8] or ())
    symbols = frozenset(books.symbols().union(row[9]))
    return Opened(run, books, None if told[0] is None else Told(*told), due, symbols)


def read_books(conn: Connection, run: Run) -> Books:
    """The books of a run."""
    return open_books(conn, run.user_id, run.run_id).books


def reread(conn: Connection, run: Run, books: Books) -> None:
    """Read again what writes change: all but the last tick and the strategy's state."""
    key = {"at": None, "user": run.user_id, "run": run.run_id}
    row = conn.execute(_READ, key, prepare=True).fetchone()
    assert row is not None
    _take_up(conn, run, books, row)


def _take_up(conn: Connection, run: Run, books: Books, row: tuple[Any, ...]) -> None:
    books.cash, _, _, head, books.stands_at, positions, has_open_orders = row[:7]
    books.head = head or 0
    books.holdings, books.costs, books.marks = {}, {}, {}
    for symbol, quantity, cost, average, mark, marked_at in sorted(positions or ()):
        books.costs[symbol] = Decimal(cost)
        if mark is not None:
            books.marks[symbol] = Decimal(mark), datetime.fromisoformat(marked_at)
        if average is not None:
            books.holdings[symbol] = Holding(
                symbol, Decimal(quantity), Decimal(average), books.marks[symbol][0]
            )
    rows: list[tuple[Any, ...]] = []
    if has_open_orders:
        rows = conn.execute(_OPEN_ORDERS, [run.user_id, run.run_id]).fetchall()
    books.orders = {row[3]: _order(row[3:]) for row in rows}
    books.statuses = {row[3]: row[0] for row in rows}
    books.reserved = {row[3]: row[1] for row in rows}
    books.executions = {row[3]: row[2] for row in rows}


def _due(
    calendar: str, plan: str, symbol: str, amount: str, policy: str, occasion: str, *moments: str
) -> SipDue:
    planned_on, next_open_at, day, open_at, close_at = moments
    session = Session(
        calendar,
        date.fromisoformat(day),
        datetime.fromisoformat(open_at),
        datetime.fromisoformat(close_at),
    )
    following = datetime.fromisoformat(next_open_at) if next_open_at else None
    on = date.fromisoformat(planned_on)
    return SipDue(plan, symbol, Decimal(amount), policy, occasion, on, following, session)


def _order(row: tuple[Any, ...]) -> Order:
    order_id, symbol, side, quantity, order_type, time_in_force, *rest = row
    return Order(
        order_id,
        symbol,
        Side(side),
        quantity,
        OrderType(order_type),
        TimeInForce(time_in_force),
        *rest,
    )
