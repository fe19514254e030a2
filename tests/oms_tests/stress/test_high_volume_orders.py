"""Many orders and many fills: what must stay true, and what must stay fast."""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from datetime import datetime
from decimal import Decimal
from uuid import UUID, uuid4

import pytest
from broker_cases import NOW, SECOND, Wire, a_broker_run
from connector_cases import Desk, connector
from connector_cases import Wire as Played
from waits import SECONDS_MAX, wait_until

from engine.audit import audit
from engine.db.connect import ENGINE_ROLE, Connection, open_connection
from engine.orders.by_hand import place_order
from engine.orders.model import Order, OrderType, Side, TimeInForce
from engine.orders.write import insert_orders
from engine.strategies.base import PlaceOrder
from engine.worker import serve, work_through

MEGABYTE = 2**20
TRIES_MAX = 3


def place_many(
    wire: Wire, count: int, conn: Connection | None = None, at: datetime | None = None
) -> list[UUID]:
    """Limit orders for 10 at 1, placed in one statement."""
    at = at or wire.stands_at()
    orders = [
        Order(
            uuid4(),
            "AAPL",
            Side.BUY,
            Decimal(10),
            OrderType.LIMIT,
            TimeInForce.DAY,
            at,
            Decimal(1),
        )
        for _ in range(count)
    ]
    refused = insert_orders(
        conn or wire.conn, wire.run, orders, [Decimal(1)] * count, [None] * count
    )
    assert refused == {}
    return [order.order_id for order in orders]


def send_all(wire: Wire) -> None:
    wire.conn.execute(
        """UPDATE broker_command SET claimed_by = %s, claimed_at = now(), sent_at = now(),
                  done_at = now(), outcome = 'SENT' WHERE done_at IS NULL""",
        [wire.holder],
    )


def say_fills(conn: Connection, wire: Wire, first: int, orders: list[UUID]) -> None:
    """One unit of each order, under numbers from ``first`` on."""
    rows = []
    for place, order_id in enumerate(orders):
        facts = {
            "execution_id": f"e{first + place}",
            "symbol": "AAPL",
            "side": "BUY",
            "quantity": "1",
            "price": "1",
        }
        rows.append(
            [
                wire.run.user_id,
                wire.account,
                first + place,
                wire.holder,
                str(order_id),
                facts["execution_id"],
                json.dumps(facts),
                NOW + place * SECOND / 1000,
            ]
        )
    with conn.cursor() as cursor:
        cursor.executemany(
            """INSERT INTO broker_event (user_id, account, number, holder, kind, order_ref,
                                         execution_id, payload, event_at)
               VALUES (%s, %s, %s, %s, 'EXECUTION', %s, %s, %s, %s)""",
            rows,
        )


def waiting(conn: Connection) -> int:
    row = conn.execute("SELECT count(*) FROM broker_event WHERE applied_at IS NULL").fetchone()
    assert row is not None
    return int(row[0])


@pytest.fixture
def wire(owner_conn: Connection) -> Wire:
    """A rich run in a database of its own."""
    run = a_broker_run(owner_conn, initial_cash=Decimal(10**9), account_type="CASH")
    return Wire(owner_conn, run)


@pytest.mark.scenario("EVENT-ORDER")
def test_concurrent_submit_uses_single_writer_and_consistent_ids(wire: Wire, dsn: str) -> None:
    threads_count, each = 6, 10
    at_once = threading.Barrier(threads_count)
    placed: list[UUID] = []
    failed: list[BaseException] = []
    wanted = PlaceOrder("AAPL", Side.BUY, Decimal(10), OrderType.LIMIT, limit_price=Decimal(1))

    def place(conn: Connection, by_hand: bool) -> UUID:
        if not by_hand:
            return place_order(conn, wire.run.user_id, wire.run.run_id, wanted)
        row = conn.execute(
            """INSERT INTO orders (user_id, run_id, symbol, side, quantity, order_type, limit_price)
               VALUES (%s, %s, 'AAPL', 'BUY', 10, 'LIMIT', 1) RETURNING order_id""",
            [wire.run.user_id, wire.run.run_id],
        ).fetchone()
        assert row is not None
        order_id: UUID = row[0]
        return order_id

    def submit(by_hand: bool) -> None:
        try:
            with open_connection(dsn, role=ENGINE_ROLE) as conn:
                at_once.wait(SECONDS_MAX)
                placed.extend(place(conn, by_hand) for _ in range(each))
        except BaseException as error:
            failed.append(error)

    threads = [
        threading.Thread(target=submit, args=[number % 2 == 0]) for number in range(threads_count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS_MAX)
        assert not thread.is_alive()
    assert failed == []
    assert len(set(placed)) == threads_count * each
    stored = {order_id for (order_id,) in wire.conn.execute("SELECT order_id FROM orders")}
    sent = wire.conn.execute("SELECT order_id FROM broker_command WHERE kind = 'SUBMIT'").fetchall()
    assert stored == set(placed)
    assert sorted(order_id for (order_id,) in sent) == sorted(placed)  # each once
    seqs = [seq for (seq,) in wire.conn.execute("SELECT seq FROM event_ledger ORDER BY seq")]
    assert seqs == list(range(1, len(seqs) + 1))
    assert audit(wire.conn) == []


def _backlog_of_three_seconds(wire: Wire, told: int) -> int:
    """The most that waited while a hundred fills a second came, after so many were told."""
    orders = place_many(wire, 50)
    send_all(wire)
    backlog = []
    began = time.monotonic()
    for beat in range(30):
        say_fills(wire.conn, wire, told + 10 * beat + 1, orders[beat % 5 * 10 :][:10])
        wire.conn.execute("NOTIFY oms_event")
        time.sleep(max(0.0, began + (beat + 1) / 10 - time.monotonic()))
        backlog.append(waiting(wire.conn))
    wait_until(lambda: waiting(wire.conn) == 0, "the inbox to be empty")
    return max(backlog)


@pytest.mark.scenario("PERF-02")
@pytest.mark.slow
def test_hundred_fills_per_second_no_backlog(
    wire: Wire, dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The broker tells ten fills each tenth of a second; a worker keeps up.

    What else the machine does may hold the worker up, but not whenever it is tried.
    """
    stopped = threading.Event()
    worker = threading.Thread(target=serve, args=(dsn, stopped))
    worker.start()
    backlogs: list[int] = []
    try:
        while len(backlogs) < TRIES_MAX and min(backlogs, default=sys.maxsize) > 100:
            backlogs.append(_backlog_of_three_seconds(wire, 300 * len(backlogs)))
    finally:
        stopped.set()
        worker.join(SECONDS_MAX)
    # It doesn't grow: at no time more than one second's worth waits.
    assert min(backlogs) <= 100
    assert wire.position() == 300 * len(backlogs)
    told = [record for record in caplog.records if record.message == "FILL_RATE"]
    fields = [record.fields for record in told]  # type: ignore[attr-defined]
    assert sum(line["fills"] for line in fields) == 300 * len(backlogs)
    assert all(line["per_second"] > 0 for line in fields)
    assert audit(wire.conn) == []


def _peak_bytes() -> int:
    """The most memory that this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.scenario("PERF-01")
@pytest.mark.slow
def test_ten_thousand_open_orders_memory_and_speed_ok(wire: Wire) -> None:
    """The last five hundred cost what the first cost."""
    before = _peak_bytes()
    spent = []
    orders: list[UUID] = []
    for _ in range(20):
        began = time.process_time(), time.monotonic()
        orders += place_many(wire, 500)
        spent.append(time.monotonic() - began[1])
    send_all(wire)
    wire.conn.execute("ANALYZE")
    began_at = time.monotonic()
    say_fills(wire.conn, wire, 1, orders[:1000])
    assert work_through(wire.conn).words == 1000
    applied = time.monotonic() - began_at
    print(f"placing 500: {spent[0]:.2f} s, then {spent[-1]:.2f} s; 1000 fills: {applied:.2f} s")
    # What other tests have filled this process with doesn't count.
    assert _peak_bytes() - before < 300 * MEGABYTE
    open_orders = wire.conn.execute(
        "SELECT count(*) FROM orders WHERE status IN ('NEW', 'PARTIALLY_FILLED')"
    ).fetchone()
    assert open_orders == (10_000,)
    # Quadratic growth would make the last batch cost as many times the first as there are batches;
    # the best of some is what the machine can, whatever else it does.
    assert min(spent[-5:]) < 4 * min(spent[:5])
    assert applied < 30


def _orders_told_to_wait(dsn: str, owner_conn: Connection) -> int:
    """Submit 250 orders where 200 messages a second may go; returns how many were told to wait."""
    # The pings of a second are messages too: they count, and are few.
    desk, wire = Desk(owner_conn, orders_per_second=10_000, messages_per_second=200), Played()
    with connector(dsn, desk, wire):
        refs = desk.submits(250)
        desk.wait_until_done()
    told = desk.events("THROTTLED")
    assert wire.refs("SUBMIT") == refs
    assert (wire.connects, wire.closes) == (1, 1), "nobody was disconnected"
    assert len(desk.events("DISCONNECTED")) == 1, "but by us, at the end"
    at = [when for when, *_ in wire.sent]
    assert max(sum(start <= t < start + 1 for t in at) for start in at) <= 200
    assert at[-1] - at[0] >= 1
    assert {each["code"] for each in told} <= {"RATE_LIMIT"}
    assert len(told) <= 75, "those beyond the limit, and what pings cost"
    assert desk.rows(
        "SELECT count(*), count(*) FILTER (WHERE outcome = 'SENT') FROM broker_command "
        "WHERE user_id = %s"
    ) == [(250, 250)]
    return len(told)


@pytest.mark.scenario("EDGE-04")
def test_api_rate_limit_queues_and_throttles_without_disconnect(
    dsn: str, owner_conn: Connection
) -> None:
    # A machine that is too busy to send two hundred in a second makes fewer wait.
    assert any(_orders_told_to_wait(dsn, owner_conn) >= 50 for _ in range(4))
