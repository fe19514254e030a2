"""Orders at a broker: how fast its words are booked, how long reconciliation takes, how soon a
connector sees a command, and how exact the throttle is.

The broker's side is written into the inbox as a connector would; what is measured is ours.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from statistics import quantiles
from uuid import UUID, uuid4

from psycopg.types.json import Jsonb

from bench.ground import INITIAL_CASH, Ground
from bench.harness import Row, child, result_of, seconds_of
from bench.sizes import Sizes
from engine.accounts import AccountTerms, add_account
from engine.brokers.protocol import SNAPSHOT_ROWS_MAX
from engine.brokers.throttle import Throttle
from engine.db.connect import ENGINE_ROLE, Connection, open_connection
from engine.errors import ConfigurationError
from engine.orders.model import Order, OrderType, Side, TimeInForce
from engine.orders.write import insert_orders
from engine.outbox import COMMANDS, wake
from engine.reconcile import Reconciliation, reconcile, request_snapshot
from engine.runs import Run, Terms, add_user, create_run, start_run
from engine.worker import work_through

__all__ = ["Desk", "measure"]

FILLS_MUST = 2_000.0
VISIBLE_MS_MUST = 20.0
RECONCILE_MUST = {10_000: 5.0, 100_000: 60.0}
MEMORY_MB_MUST = 500.0
THROTTLE_MUST = 0.99
ORDERS_PER_SECOND = 50
_ACCOUNT = "BENCH"
_SYMBOL = "AAPL"
_BATCH = 500
_MB = 1_000_000


def measure(on: Ground, sizes: Sizes) -> list[Row]:
    """The rows of orders at brokers."""
    rows = [_fills(on, sizes.broker_fills)]
    rows += [row for orders in sizes.broker_open_orders for row in _reconciled(on, orders)]
    return [*rows, _visible(on, sizes.broker_seconds), *_throttled(sizes.broker_seconds)]


@dataclass
class Desk:
    """A run with an account, both sides of it: places orders, and says what a broker says."""

    engine: Connection
    owner: Connection
    run: Run
    holder: UUID = field(default_factory=uuid4)
    said: int = 0

    @classmethod
    def open(cls, dsn: str) -> Desk:
        """A desk in a database, with a user, an account that never closes and a run of its own."""
        engine, owner = open_connection(dsn, role=ENGINE_ROLE), open_connection(dsn)
        user_id = add_user(engine, f"bench-{uuid4()}")
        terms = AccountTerms("dummy", calendar="24/7", opening_cash=INITIAL_CASH)
        add_account(engine, user_id, _ACCOUNT, terms)
        run = create_run(
            engine,
            user_id,
            Terms(
                "engine.strategies.base:Strategy", initial_cash=INITIAL_CASH, accounts=(_ACCOUNT,)
            ),
        )
        return cls(engine, owner, start_run(engine, user_id, run.run_id))

    def close(self) -> None:
        """Leave; autovacuum, which would have looked at so many rows soon, is not waited for."""
        self.owner.execute("ANALYZE")
        self.engine.close()
        self.owner.close()

    def place(self, count: int) -> list[UUID]:
        """Place limit orders of one unit at 1, in transactions of some hundreds."""
        placed: list[UUID] = []
        at = datetime.now(UTC)
        for start in range(0, count, _BATCH):
            orders = [
                Order(
                    uuid4(),
                    _SYMBOL,
                    Side.BUY,
                    Decimal(1),
                    OrderType.LIMIT,
                    TimeInForce.GTC,
                    at,
                    Decimal(1),
                )
                for _ in range(min(_BATCH, count - start))
            ]
            nothing = [None] * len(orders)
            with self.engine.transaction():
                insert_orders(self.engine, self.run, orders, nothing, nothing)
            placed += [order.order_id for order in orders]
        return placed

    def send(self) -> None:
        """Mark all that waits in the outbox as sent."""
        self.owner.execute(
            """UPDATE broker_command SET claimed_by = %s, claimed_at = clock_timestamp(),
                      sent_at = clock_timestamp(), done_at = clock_timestamp(), outcome = 'SENT'
               WHERE user_id = %s AND done_at IS NULL""",
            [self.holder, self.run.user_id],
        )

    def say(self, words: Sequence[tuple[str, str | None, str | None, dict[str, object]]]) -> None:
        """Put words into the inbox: kind, order, execution, payload."""
        now = datetime.now(UTC)
        with (
            self.owner.transaction(),
            self.owner.cursor() as cursor,
            cursor.copy(
                """COPY broker_event (user_id, account, number, holder, kind, order_ref,
                       broker_order_id, perm_id, execution_id, payload, event_at, received_at)
                   FROM STDIN"""
            ) as copy,
        ):
            for kind, ref, execution, payload in words:
                self.said += 1
                number = None if ref is None else int(ref[:8], 16)
                copy.write_row(
                    (
                        self.run.user_id,
                        _ACCOUNT,
                        self.said,
                        self.holder,
                        kind,
                        ref,
                        number,
                        number,
                        execution,
                        Jsonb(payload),
                        now,
                        now,
                    )
                )

    def route(self, orders: Sequence[UUID]) -> None:
        """Have the broker take the orders, and book that."""
        for start in range(0, len(orders), 10 * _BATCH):
            part = orders[start : start + 10 * _BATCH]
            self.say([("ORDER_STATUS", str(o), None, {"status": "ROUTED"}) for o in part])
            work_through(self.engine)

    def fill(self, orders: Sequence[UUID]) -> None:
        """Have the broker say that it filled the orders whole."""
        facts: dict[str, object] = {"symbol": _SYMBOL, "side": "BUY", "quantity": "1", "price": "1"}
        self.say([("EXECUTION", str(o), f"{o}.01", facts) for o in orders])

    def answer(self, snapshot_id: UUID, orders: Sequence[UUID]) -> None:
        """Answer a snapshot: the broker works these orders."""
        self.send()
        taken_at = datetime.now(UTC)
        parts = max(1, -(-len(orders) // SNAPSHOT_ROWS_MAX))
        for part in range(parts):
            some = orders[part * SNAPSHOT_ROWS_MAX : (part + 1) * SNAPSHOT_ROWS_MAX]
            payload = {
                "snapshot_id": str(snapshot_id),
                "part": part + 1,
                "parts": parts,
                "taken_at": taken_at.isoformat(),
                "open_orders": [_open_order(order) for order in some],
                "closed_orders": [],
                "executions": [],
                "positions": [],
                "cash": {"USD": str(INITIAL_CASH)},
            }
            self.say([("SNAPSHOT", None, None, json.loads(json.dumps(payload)))])


def _open_order(order: UUID) -> dict[str, object]:
    number = int(str(order)[:8], 16)
    return {
        "order_ref": str(order),
        "symbol": _SYMBOL,
        "side": "BUY",
        "quantity": "1",
        "order_type": "LIMIT",
        "time_in_force": "GTC",
        "limit_price": "1",
        "status": "ROUTED",
        "filled": "0",
        "broker_order_id": number,
        "perm_id": number,
        "ours": True,
    }


def _fills(on: Ground, count: int) -> Row:
    """Fills that one worker books a second, those of orders that the broker works."""
    desk = Desk.open(on.database("fills"))
    orders = desk.place(count)
    desk.send()
    desk.route(orders)
    desk.fill(orders)
    seconds = seconds_of(lambda: work_through(desk.engine))
    desk.close()
    note = f"{count:,} fills in the inbox, one worker"
    return Row("fills applied", count / seconds, "fills/s", FILLS_MUST, note=note)


def _reconciled(on: Ground, orders: int) -> list[Row]:
    """How long it takes to compare so many open orders with a broker's, and what memory."""
    dsn = on.database(f"open_{orders}")
    told = result_of(child("workers.reconcile", dsn, str(orders)))
    note = f"{orders:,} open orders, all as the broker has them"
    name = f"reconcile {orders:,} orders"
    return [
        Row(name, told["seconds"], "s", RECONCILE_MUST.get(orders), better="less", note=note),
        Row(
            f"memory, {orders:,} orders",
            told["peak"] / _MB,
            "MB",
            MEMORY_MB_MUST,
            better="less",
            note=f"{note}; the process that placed, routed and reconciled them",
        ),
    ]


def reconcile_open_orders(dsn: str, count: int) -> float:
    """Place, route and reconcile so many orders; returns the seconds of the reconciliation."""
    desk = Desk.open(dsn)
    orders = desk.place(count)
    desk.send()
    desk.route(orders)
    snapshot_id = request_snapshot(desk.engine, desk.run.user_id, _ACCOUNT, "DEMAND")
    desk.answer(snapshot_id, orders)
    work_through(desk.engine)
    done: list[Reconciliation | None] = []

    def compare() -> None:
        done.append(reconcile(desk.engine, desk.run.user_id, _ACCOUNT, datetime.now(UTC)))

    seconds = seconds_of(compare)
    if done[0] is None or done[0].open_orders != count or done[0].differences:
        raise ConfigurationError(f"the snapshot was not compared as it is: {done[0]}")
    desk.close()
    return seconds


def _visible(on: Ground, seconds: int) -> Row:
    """From the call that places an order until a connector has claimed its command, p95."""
    dsn = on.database("visible")
    desk = Desk.open(dsn)
    with ThreadPoolExecutor(1) as pool, open_connection(dsn) as connector:
        connector.execute(
            "SELECT lease_take(%s, %s, %s, 'bench', 3600)",
            [desk.run.user_id, _ACCOUNT, desk.holder],
        )
        connector.execute(f"LISTEN {COMMANDS}")
        count = seconds * ORDERS_PER_SECOND
        claiming = pool.submit(_claim, connector, desk, count)
        began = _place_evenly(desk, count)
        seen = claiming.result()
    desk.close()
    waits = [(seen[order] - at) * 1_000 for order, at in began.items()]
    p95 = quantiles(waits, n=20)[-1]
    note = f"{ORDERS_PER_SECOND} orders a second, placed one by one, for {seconds} s"
    return Row("order visible, p95", p95, "ms", VISIBLE_MS_MUST, better="less", note=note)


def _place_evenly(desk: Desk, count: int) -> dict[UUID, float]:
    """Place orders at an even pace; when each was begun."""
    began: dict[UUID, float] = {}
    start = time.perf_counter()
    for number in range(count):
        time.sleep(max(0.0, start + number / ORDERS_PER_SECOND - time.perf_counter()))
        at = time.perf_counter()
        (order,) = desk.place(1)
        wake(desk.engine)
        began[order] = at
    return began


def _claim(connector: Connection, desk: Desk, count: int) -> dict[UUID, float]:
    """Claim commands as they come; when each was."""
    seen: dict[UUID, float] = {}
    while len(seen) < count:
        for _ in connector.notifies(timeout=1.0, stop_after=1):
            pass
        rows = connector.execute(
            "SELECT order_id, command_id FROM commands_claim(%s, %s, %s, 1000, 1000)",
            [desk.run.user_id, _ACCOUNT, desk.holder],
        ).fetchall()
        at = time.perf_counter()
        seen |= {order_id: at for order_id, _ in rows}
    return seen


def _throttled(seconds: int) -> list[Row]:
    """The throttle's pace beside what it allows, and what it lets through in any one second."""
    limit = ORDERS_PER_SECOND
    throttle = Throttle(orders_per_second=limit, messages_per_second=10 * limit)
    sent: list[float] = []
    began = time.monotonic()
    while (now := time.monotonic()) < began + seconds:
        delay = throttle.delay(now, is_order=True)
        if delay:
            time.sleep(delay)
            continue
        throttle.note(now, is_order=True)
        sent.append(now)
    most = max(sum(at <= other < at + 1 for other in sent) for at in sent)
    pace = len(sent) / seconds
    note = f"{limit} a second for {seconds} s by the wall clock"
    return [
        Row("throttle", pace, "orders/s", THROTTLE_MUST, float(limit), "what it allows", note=note),
        Row("throttle, most in 1 s", most, "orders", float(limit), better="less", note=note),
    ]
