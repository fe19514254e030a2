"""An order management system under fire, in one process, and what must hold of it afterwards.

The real connector talks over a real socket to the real exchange, both in a thread of their own;
the worker's rounds are called by the test, between a person's orders.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any, TypeVar
from uuid import UUID, uuid4

from broker_cases import Wire, a_broker_run
from psycopg.types.json import Jsonb
from settling import Settling
from waits import SECONDS_MAX

from engine.brokers.connector import Connector, Pace
from engine.brokers.dummy.adapter import DummyBroker
from engine.brokers.dummy.control import Control
from engine.brokers.dummy.exchange import Exchange
from engine.brokers.dummy.faults import Plan
from engine.brokers.dummy.server import serving
from engine.brokers.dummy.store import Store as ExchangeStore
from engine.brokers.protocol import BrokerOrder
from engine.brokers.store import Store
from engine.clock import utc_now
from engine.db.connect import Connection
from engine.errors import BadInput, RuleViolation
from engine.orders.by_hand import cancel_order, modify_order, place_order
from engine.orders.model import OrderType, Side, TimeInForce
from engine.reconcile import watch
from engine.strategies.base import PlaceOrder
from engine.worker import work_through

OPENING_CASH = Decimal(1_000_000)
QUICK = Pace(
    lease=15,
    poll=0.02,
    ping=2.0,
    connect_max=5.0,
    retry_first=0.002,
    retry_max=0.02,
    leave_max=5.0,
)

Got = TypeVar("Got")


class Loop:
    """An event loop in a thread, for exchanges and connectors."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, call: Coroutine[Any, Any, Got], seconds: float = SECONDS_MAX) -> Got:
        """Run a coroutine there, and wait for what it returns."""
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(seconds)

    def soon(self, act: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(act)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(SECONDS_MAX)
        self._loop.close()


@contextmanager
def a_loop() -> Iterator[Loop]:
    """A loop for the length of a block."""
    loop = Loop()
    try:
        yield loop
    finally:
        loop.close()


class Witness(DummyBroker):
    """An adapter that counts how often each order was sent."""

    def __init__(self, port: int, sent: Counter[str], account: str) -> None:
        super().__init__(port, client_id=7, account=account)
        self._sent = sent

    async def submit(self, order: BrokerOrder) -> None:
        self._sent[order.order_ref] += 1
        await super().submit(order)


@dataclass
class Stand(Settling):
    """A user's run at an exchange that follows a plan, and the connector between them."""

    dsn: str
    owner: Connection
    wire: Wire
    loop: Loop
    plan: Plan
    control: Control
    port: int
    sent: Counter[str] = field(default_factory=Counter)
    placed: list[UUID] = field(default_factory=list)
    _connector: Connector | None = None
    _running: asyncio.Task[None] | None = None

    @property
    def latency(self) -> float:
        return float(self.plan.exchange.latency_seconds)

    @property
    def key(self) -> tuple[UUID, UUID]:
        return self.wire.run.user_id, self.wire.run.run_id

    # --- Connector and worker ---------------------------------------------------------------

    @contextmanager
    def connected(self) -> Iterator[None]:
        """A connector for the length of a block."""
        self.loop.run(self._start())
        try:
            yield
        finally:
            self.loop.run(self._stop())

    def crash(self) -> None:
        """End the connector in the middle of whatever it does, and start another one."""
        self.loop.run(self._crash())
        # What the seconds do that its lease still runs.
        self.owner.execute(
            "UPDATE broker_lease SET expires_at = now() WHERE user_id = %s", [self.user_id]
        )
        self.loop.run(self._start())

    async def _start(self) -> None:
        store = Store(self.dsn, self.user_id, self.wire.account, uuid4())
        account = await store.account()

        def broker() -> Witness:
            return Witness(self.port, self.sent, self.wire.account)

        self._connector = Connector(store, account, broker, jitter=lambda: 0.0, pace=QUICK)
        self._running = asyncio.create_task(_serve(self._connector, store))

    async def _stop(self) -> None:
        assert self._connector is not None
        assert self._running is not None
        self._connector.stop()
        await self._running

    async def _crash(self) -> None:
        assert self._running is not None
        self._running.cancel()
        await asyncio.wait({self._running})

    def use(self, conn: Connection) -> None:
        """Go on with another connection."""
        self.conn.close()
        self.wire.conn = conn

    def place_one(self) -> UUID:
        """An order that the exchange may take at once."""
        wanted = PlaceOrder("AAPL", Side.BUY, Decimal(len(self.placed) + 1))
        self.placed.append(place_order(self.conn, *self.key, wanted))
        return self.placed[-1]

    def story(self) -> str:
        return f"plan: {self.plan.model_dump_json(exclude_defaults=True)}\n{super().story()}"

    def must_agree(self, *, was_restored: bool = False) -> None:
        """As for everybody; and nothing was sent twice, not even to be dropped on its way."""
        super().must_agree(was_restored=was_restored)
        twice = {ref: count for ref, count in self.sent.items() if count > 1}
        assert twice == {}, "sent more than once"

    def work(self) -> None:
        """A round of the worker."""
        work_through(self.conn)

    def look(self) -> None:
        """What the worker does when there was news of the connection."""
        self.work()
        watch(self.conn, self.user_id, utc_now())


async def _serve(connector: Connector, store: Store) -> None:
    try:
        await connector.run("chaos")
    finally:
        await store.close()


@asynccontextmanager
async def _exchange(folder: Path, plan: Plan) -> AsyncIterator[int]:
    """An exchange on its port; its books belong to the thread of the loop."""
    store = ExchangeStore(folder)
    try:
        exchange = Exchange(plan, store, seed=plan.seed, clock=utc_now)
        exchange.release()
        async with serving(exchange) as port:
            yield port
    finally:
        store.close()


@contextmanager
def a_stand(
    dsn: str,
    owner: Connection,
    engine: Connection,
    loop: Loop,
    folder: Path,
    plan: Plan,
    name: str,
) -> Iterator[Stand]:
    """An exchange by its plan, and a new user with an account and a run there.

    ``owner`` makes them; everything after that is done with the rights of ``engine``.
    """
    with ExitStack() as ending:
        exchange = _exchange(folder, plan)
        port = loop.run(exchange.__aenter__())
        ending.callback(lambda: loop.run(exchange.__aexit__(None, None, None)))
        control = ending.enter_context(Control(port))
        run = a_broker_run(owner, user=name, initial_cash=OPENING_CASH)
        owner.execute(
            """UPDATE broker_account SET settings = %s, opening_cash = %s,
                      opens_at = '00:00', closes_at = '23:59:59.999999',
                      orders_per_second = 1000, messages_per_second = 1000
               WHERE user_id = %s""",
            [Jsonb({"port": port}), OPENING_CASH, run.user_id],
        )
        yield Stand(dsn, owner, Wire(engine, run), loop, plan, control, port)


# --- A busy session -------------------------------------------------------------------------


_KINDS = (*[OrderType.MARKET] * 2, *[OrderType.LIMIT] * 3, OrderType.STOP)


class Session:
    """What people, the market and the network do, by lot: the same seed does the same."""

    STEPS = (25, 60)

    def __init__(self, stand: Stand, seed: int) -> None:
        self.stand = stand
        self.lot = Random(f"session/{seed}")
        self.prices = {name: Decimal(price) for name, price in (("AAPL", "100"), ("MSFT", "400"))}

    def run(self) -> None:
        acts = [self._place, self._cancel, self._modify, self._price, self._liquidity]
        acts += [self.stand.work, self.stand.look, self._breathe, self._drop, self.stand.crash]
        weights = [12, 3, 3, 6, 1, 6, 2, 3, 0.3, 0.3]
        for act in self.lot.choices(acts, weights, k=self.lot.randint(*self.STEPS)):
            act()

    def _place(self) -> None:
        symbol = self.lot.choice(list(self.prices))
        kind = self.lot.choice(_KINDS)
        price = self._near(symbol)
        wanted = PlaceOrder(
            symbol,
            self.lot.choice([Side.BUY, Side.BUY, Side.SELL]),
            Decimal(self.lot.randint(1, 20)),
            kind,
            TimeInForce(self.lot.choice(["DAY", "DAY", "GTC", "IOC"]))
            if kind is not OrderType.STOP
            else TimeInForce.DAY,
            price if kind is OrderType.LIMIT else None,
            price if kind is OrderType.STOP else None,
        )
        self.stand.placed.append(place_order(self.stand.conn, *self.stand.key, wanted))

    def _near(self, symbol: str) -> Decimal:
        return (self.prices[symbol] * Decimal(self.lot.randint(970, 1030)) / 1000).quantize(
            Decimal("0.01")
        )

    def _cancel(self) -> None:
        if self.stand.placed:
            cancel_order(self.stand.conn, *self.stand.key, self.lot.choice(self.stand.placed))

    def _modify(self) -> None:
        if not self.stand.placed:
            return
        order_id = self.lot.choice(self.stand.placed)
        order = self.stand.wire.order(order_id)
        quantity = limit = None
        if self.lot.random() < 0.5 or order["limit_price"] is None:
            quantity = Decimal(self.lot.randint(1, 25))
        else:
            limit = self._near(order["symbol"])
        # It may be over, or more filled than it is to have.
        with suppress(RuleViolation, BadInput):
            modify_order(
                self.stand.conn, *self.stand.key, order_id, quantity=quantity, limit_price=limit
            )

    def _price(self) -> None:
        symbol = self.lot.choice(list(self.prices))
        self.prices[symbol] = self._near(symbol)
        self.stand.control.set_price(symbol, self.prices[symbol])

    def _liquidity(self) -> None:
        symbol = self.lot.choice(list(self.prices))
        self.stand.control.set_liquidity(symbol, self.lot.choice([None, "2", "9"]))

    def _breathe(self) -> None:
        threading.Event().wait(self.lot.uniform(0, 0.02))

    def _drop(self) -> None:
        self.stand.control.drop()
