"""An account with its outbox and inbox, a broker that does what a test says, and a connector
between them that runs in a thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
from psycopg.types.json import Jsonb
from waits import SECONDS_MAX, wait_until

from engine.brokers.connector import Connector, Ended, Pace
from engine.brokers.protocol import (
    BrokerOrder,
    BrokerUnavailable,
    Message,
    MessageKind,
    Position,
    Snapshot,
)
from engine.brokers.store import Store
from engine.db.connect import Connection

ACCOUNT = "DU1"
QUICK = Pace(
    lease=6, poll=0.05, ping=0.1, retry_first=0.01, retry_max=0.05, connect_max=1.0, leave_max=5.0
)


def now() -> datetime:
    return datetime.now(UTC)


@dataclass
class Wire:
    """What the broker was told, and what it is to do. All connections of a test share it."""

    account: str = ACCOUNT
    sent: list[tuple[float, str, str]] = field(default_factory=list)
    connects: int = 0
    closes: int = 0
    connected: int = 0
    refuse_connects: int = 0
    # Called before a command is taken, with its kind and order; it may wait, or raise.
    before: Callable[[str, str], Any] | None = None
    after: Callable[[str, str], Any] | None = None
    snapshot_gate: asyncio.Event | None = None
    positions: int = 1
    is_silent: bool = False
    clock: Callable[[], datetime] = now
    current: ScriptedBroker | None = None
    loop: asyncio.AbstractEventLoop | None = None

    def refs(self, kind: str | None = None) -> list[str]:
        return [ref for _, of_kind, ref in self.sent if kind in (None, of_kind)]

    def say(self, kind: MessageKind, ref: str | None = None, **payload: Any) -> None:
        """Have the broker say something, from any thread."""
        broker, loop = self.current, self.loop
        assert broker is not None
        assert loop is not None
        message = Message(kind, self.clock(), payload, ref)
        loop.call_soon_threadsafe(broker.heard.put_nowait, message)

    def drop(self, error: Exception | None = None) -> None:
        """Break the connection."""
        broker, loop = self.current, self.loop
        assert broker is not None
        assert loop is not None
        loop.call_soon_threadsafe(
            broker.heard.put_nowait, error or BrokerUnavailable("the wire was cut")
        )


class ScriptedBroker:
    """One connection to a scripted broker."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.heard: asyncio.Queue[Message | Exception | None] = asyncio.Queue()
        self._open = False

    async def connect(self) -> str:
        self.wire.connects += 1
        self.wire.loop = asyncio.get_running_loop()
        if self.wire.refuse_connects:
            self.wire.refuse_connects -= 1
            raise BrokerUnavailable("nobody answers")
        self.wire.current, self._open = self, True
        self.wire.connected += 1
        return self.wire.account

    async def messages(self) -> AsyncIterator[Message]:
        while (message := await self.heard.get()) is not None:
            if isinstance(message, Exception):
                raise message
            yield message

    async def submit(self, order: BrokerOrder) -> None:
        await self._take("SUBMIT", order.order_ref)

    async def modify(self, order: BrokerOrder, broker_order_id: int | None) -> None:
        await self._take("MODIFY", order.order_ref)

    async def cancel(self, order_ref: str, broker_order_id: int | None) -> None:
        await self._take("CANCEL", order_ref)

    async def _take(self, kind: str, ref: str) -> None:
        if not self._open:
            raise BrokerUnavailable("not connected")
        await _run(self.wire.before, kind, ref)
        self.wire.sent.append((time.monotonic(), kind, ref))
        await _run(self.wire.after, kind, ref)

    async def snapshot(self, since: datetime | None) -> Snapshot:
        if self.wire.snapshot_gate is not None:
            await self.wire.snapshot_gate.wait()
        positions = [Position(f"S{n}", Decimal(n)) for n in range(self.wire.positions)]
        return Snapshot(self.wire.clock(), [], [], positions, {"USD": Decimal("100.25")})

    async def what_if(self, order: BrokerOrder) -> Mapping[str, Any]:
        return {"initial_margin": order.quantity * 2, "accepted": True}

    async def ping(self) -> datetime:
        if self.wire.is_silent:
            await asyncio.Event().wait()
        return self.wire.clock()

    async def close(self) -> None:
        if self._open:
            self._open = False
            self.wire.closes += 1
            self.wire.connected -= 1
            self.heard.put_nowait(None)


async def _run(hook: Callable[[str, str], Any] | None, kind: str, ref: str) -> None:
    if hook is not None and asyncio.iscoroutine(found := hook(kind, ref)):
        await found


ORDER = {
    "symbol": "AAPL",
    "side": "BUY",
    "quantity": "1.5",
    "order_type": "LIMIT",
    "time_in_force": "DAY",
    "limit_price": "100.25",
}


class Desk:
    """An account of one user with a run at its broker, and orders to send.

    To place an order is to send it, as in life; what is odd about a command (its terms, its turn)
    is written by hand, past the proof that its order bears it out.
    """

    def __init__(self, conn: Connection, account: str = ACCOUNT, **settings: Any) -> None:
        self.conn = conn
        self.user_id, self.run_id = uuid4(), uuid4()
        self.account = account
        # Open all day but for the moment at which it closes to open again.
        values = {"broker": "scripted", "opens_at": "00:00", "closes_at": "23:59:59.999999"}
        values |= settings
        conn.execute("INSERT INTO app_user (user_id) VALUES (%s)", [self.user_id])
        conn.execute(
            """INSERT INTO strategy_run (user_id, run_id, status, initial_cash, broker,
                                         account_type)
               VALUES (%s, %s, 'RUNNING', 1e9, %s, 'MARGIN')""",
            [self.user_id, self.run_id, values["broker"]],
        )
        names = ", ".join(values)
        marks = ", ".join(["%s"] * (len(values) + 2))
        conn.execute(
            f"INSERT INTO broker_account (user_id, account, {names}) VALUES ({marks})".encode(),
            [self.user_id, account, *values.values()],
        )
        conn.execute(
            "INSERT INTO run_route (user_id, run_id, account) VALUES (%s, %s, %s)",
            [self.user_id, self.run_id, account],
        )

    def orders(self, count: int) -> list[UUID]:
        """The ids of orders to come; with its first command an order is placed."""
        return [uuid4() for _ in range(count)]

    def _place(self, ids: Sequence[UUID]) -> None:
        self.conn.execute(
            """INSERT INTO orders (user_id, run_id, order_id, symbol, side, quantity, order_type,
                                   time_in_force, limit_price)
               SELECT %s, %s, o.id, t.symbol, t.side, t.quantity, t.order_type, t.time_in_force,
                      t.limit_price
               FROM unnest(%s::uuid[]) AS o (id)
               CROSS JOIN jsonb_populate_record(NULL::orders, %s) t""",
            [self.user_id, self.run_id, ids, Jsonb(ORDER)],
        )

    @contextmanager
    def _by_hand(self) -> Iterator[None]:
        """Without the proofs of what an order bears out."""
        triggers = ("b_prove", "b_prove_change", "m_move_order", "a_check_update")
        with self.conn.transaction():
            for how in ("DISABLE", "ENABLE"):
                for trigger in triggers:
                    name = f"broker_command_{trigger}"
                    self.conn.execute(f"ALTER TABLE broker_command {how} TRIGGER {name}".encode())
                if how == "DISABLE":
                    yield

    def _is_placed(self, order_id: UUID) -> bool:
        return bool(
            self.rows("SELECT 1 FROM orders WHERE user_id = %s AND order_id = %s", order_id)
        )

    def command(
        self,
        kind: str,
        order_id: UUID | None = None,
        version: int = 1,
        priority: int = 2,
        payload: Mapping[str, Any] | None = None,
        not_before: datetime | None = None,
    ) -> UUID:
        if payload is None and kind in ("MODIFY", "WHAT_IF"):
            payload = ORDER
        if order_id is None:
            return self._write(kind, None, None, priority, payload or {}, not_before)
        if kind == "SUBMIT" and not self._is_placed(order_id):
            return self._submit(order_id, priority, payload, not_before)
        with self._by_hand():
            if not self._is_placed(order_id):
                # It went before the test began.
                self._place([order_id])
                self.conn.execute(
                    """UPDATE broker_command SET claimed_by = %s, claimed_at = clock_timestamp(),
                           sent_at = clock_timestamp() - interval '1 minute',
                           done_at = clock_timestamp(), outcome = 'SENT'
                       WHERE user_id = %s AND order_id = %s""",
                    [uuid4(), self.user_id, order_id],
                )
                version += 1
            return self._write(kind, order_id, version, priority, payload or {}, not_before)

    def _submit(
        self,
        order_id: UUID,
        priority: int,
        payload: Mapping[str, Any] | None,
        not_before: datetime | None,
    ) -> UUID:
        changes: dict[str, Any] = {"priority": priority, "not_before": not_before}
        if payload is not None:
            changes["payload"] = Jsonb(payload)
        is_odd = payload is not None or priority != 2 or not_before is not None
        # Nobody takes it before it is as the test wants it.
        with self._by_hand() if is_odd else self.conn.transaction():
            self._place([order_id])
            if is_odd:
                pairs = ", ".join(f"{name} = %s" for name in changes)
                which = "WHERE user_id = %s AND order_id = %s"
                self.conn.execute(
                    f"UPDATE broker_command SET {pairs} {which}".encode(),
                    [*changes.values(), self.user_id, order_id],
                )
        (row,) = self.rows(
            "SELECT command_id FROM broker_command WHERE user_id = %s AND order_id = %s", order_id
        )
        command_id = row[0]
        assert isinstance(command_id, UUID)
        return command_id

    def _write(
        self,
        kind: str,
        order_id: UUID | None,
        version: int | None,
        priority: int,
        payload: Mapping[str, Any],
        not_before: datetime | None,
    ) -> UUID:
        command_id = uuid4()
        self.conn.execute(
            """INSERT INTO broker_command (user_id, account, command_id, priority, kind, run_id,
                                           order_id, order_version, payload, not_before)
               VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)""",
            [
                self.user_id,
                self.account,
                command_id,
                priority,
                kind,
                self.run_id if order_id else None,
                order_id,
                version,
                Jsonb(payload),
                not_before,
            ],
        )
        return command_id

    def submits(self, count: int) -> list[str]:
        """Commit that many new orders at once; returns their references in order."""
        ids = self.orders(count)
        self._place(ids)
        self.wake()
        return [str(order_id) for order_id in ids]

    def wake(self) -> None:
        self.conn.execute("SELECT pg_notify('oms_command', %s)", [self.account])

    def rows(self, query: str, *arguments: Any) -> list[tuple[Any, ...]]:
        return self.conn.execute(query.encode(), [self.user_id, *arguments]).fetchall()

    def outcomes(self) -> dict[UUID, str | None]:
        rows = self.rows("SELECT command_id, outcome FROM broker_command WHERE user_id = %s")
        return dict(rows)

    def undone(self) -> int:
        (row,) = self.rows(
            "SELECT count(*) FROM broker_command WHERE user_id = %s AND done_at IS NULL"
        )
        return int(row[0])

    def events(self, kind: str) -> list[Any]:
        rows = self.rows(
            "SELECT payload FROM broker_event WHERE user_id = %s AND kind = %s ORDER BY number",
            kind,
        )
        return [payload for (payload,) in rows]

    def kinds(self) -> list[str]:
        rows = self.rows("SELECT kind FROM broker_event WHERE user_id = %s ORDER BY number")
        return [kind for (kind,) in rows]

    def lease(self) -> tuple[Any, ...]:
        """Whether it is held, connected, when the broker was heard, and the clocks' difference."""
        rows = self.rows(
            """SELECT expires_at > clock_timestamp(), connected, last_heard_at, clock_skew
               FROM broker_lease WHERE user_id = %s"""
        )
        return rows[0] if rows else (False, False, None, None)

    def wait_for(self, kind: str, count: int = 1) -> list[Any]:
        wait_until(lambda: len(self.events(kind)) >= count, f"{count} x {kind}")
        return self.events(kind)

    def wait_until_done(self) -> None:
        wait_until(lambda: self.undone() == 0, "every command to be done")


class Running:
    """A connector in a thread."""

    def __init__(self, dsn: str, desk: Desk, wire: Wire, **options: Any) -> None:
        self.ended: Ended | None = None
        self.error: BaseException | None = None
        self._ready = threading.Event()
        options = {"jitter": lambda: 0.0, "pace": QUICK} | options
        self._thread = threading.Thread(target=self._run, args=(dsn, desk, wire, options))
        self._thread.start()
        assert self._ready.wait(SECONDS_MAX)

    def _run(self, dsn: str, desk: Desk, wire: Wire, options: dict[str, Any]) -> None:
        try:
            asyncio.run(self._serve(dsn, desk, wire, options))
        except BaseException as error:
            self.error = error
        finally:
            self._ready.set()

    async def _serve(self, dsn: str, desk: Desk, wire: Wire, options: dict[str, Any]) -> None:
        store = Store(dsn, desk.user_id, desk.account, uuid4())
        try:
            self._loop = asyncio.get_running_loop()
            self._connector = Connector(
                store,
                await store.account(),
                lambda: ScriptedBroker(wire),
                **options,
            )
            self._ready.set()
            self.ended = await self._connector.run("a test")
        finally:
            await store.close()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._connector.stop)

    def join(self) -> Ended | None:
        """Wait for its end; raises what it ended by."""
        self._thread.join(SECONDS_MAX)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error
        return self.ended

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()


@contextmanager
def connector(dsn: str, desk: Desk, wire: Wire, **options: Any) -> Iterator[Running]:
    """A connector for the length of a block, connected if the broker lets it."""
    running = Running(dsn, desk, wire, **options)
    try:
        if not wire.refuse_connects and not options:
            wait_until(lambda: wire.connected or running.is_over, "the connector to connect")
        yield running
    finally:
        if not running.is_over:
            running.stop()
        if running.error is None:
            running.join()


@pytest.fixture
def wire() -> Wire:
    """The wire to a scripted broker."""
    return Wire()


@pytest.fixture
def desk(owner_conn: Connection) -> Desk:
    """An account whose limits are far away."""
    return Desk(owner_conn, orders_per_second=1000, messages_per_second=1000)
