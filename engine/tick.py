"""The tick: one step of a run at one logical time, in one transaction, exactly once.

Lock the run, ask the ledger whether the tick is there already, apply splits, let the paper book
fill what rests, ask the strategy, place and fill what it wants, mark to market, close with the
TICK event. The database refuses whatever would break the books on the way; this module decides
only what is asked for. Locks are taken in one order: run, orders by id, ledger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal, localcontext
from functools import cached_property
from itertools import groupby
from types import MappingProxyType
from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from engine import ledger
from engine.books import Books, read_books, reread
from engine.clock import utc_now
from engine.db.connect import Connection
from engine.errors import (
    AlreadyHappened,
    BadInput,
    InvalidValue,
    RunNotRunning,
    StrategyFailed,
    TimeMovesForward,
    translated,
)
from engine.ids import ORDERS_PER_TICK_MAX, order_id_of, run_salt
from engine.ledger import Told
from engine.market.model import Bar, Session
from engine.market.view import Prices, View, look
from engine.orders import write
from engine.orders.model import Fill, Order, Side, TimeInForce
from engine.paper.book import Moment, Outcome, match_all
from engine.quantities import EXACT
from engine.reference import Reference
from engine.runs import Run, fail_run, lock_run, require_aware, require_running
from engine.strategies.base import (
    Announce,
    CancelOrder,
    Context,
    Intent,
    Intents,
    Parameters,
    PlaceOrder,
    Remember,
    SipDue,
    Strategy,
)
from engine.strategies.registry import make
from engine.strategies.sip import Sip

# How often fills may lead to orders that fill again within one tick.
FILL_ROUNDS_MAX = 8
# How many occasions of plans one tick takes up; the rest is still due at the next one.
SIPS_DUE_MAX = 1_000

_ENDLESS = (TimeInForce.GTC, TimeInForce.GTD)
_NO_MOMENT = Moment(opens_session=False, closes_session=False)
_OURS = ("TICK", "EXECUTION", "ORDER_", "RUN_", "SPLIT_", "SIP_EXECUTED", "SIP_REJECTED")


@dataclass(frozen=True, slots=True)
class TickResult:
    """What a tick did, or what it had done when it was committed first (``repeated``).

    ``cash``, ``market_value`` and ``equity`` are in the run's currency.
    """

    logical_time: datetime
    orders: int
    executions: int
    cash: Decimal
    market_value: Decimal
    equity: Decimal
    repeated: bool

    @classmethod
    def told(cls, logical_time: datetime, told: Told, *, repeated: bool) -> TickResult:
        """The result that a TICK event tells."""
        return cls(logical_time, *told, repeated=repeated)


def run_tick(
    conn: Connection,
    user_id: UUID,
    run_id: UUID,
    logical_time: datetime,
    prices: Prices,
    *,
    now: datetime | None = None,
    market_open: bool | None = None,
    intents: Sequence[Intent] = (),
) -> TickResult:
    """Tick a run once at ``logical_time``; a second call returns the first one's result.

    ``prices`` are bars, or prices by symbol observed at ``logical_time``. ``now`` is the wall
    clock of a live tick (default: ``logical_time``); ``market_open`` overrides the calendar;
    ``intents`` are carried out besides the strategy's. Runs in a transaction of its own, or as
    a savepoint of the caller's.

    Raises BadInput, RunNotRunning, TimeMovesForward, and StrategyFailed after which the run is in
    ERROR; nothing of the tick is written then.
    """
    logical_time = require_aware(logical_time, "logical_time")
    with _whole_or_nothing(conn, user_id, run_id, now):
        run = lock_run(conn, user_id, run_id)
        done = ledger.ticked(conn, user_id, run_id, [logical_time])
        if done:
            return TickResult.told(logical_time, done[logical_time], repeated=True)
        require_running(run)
        reference = Reference(conn, run.calendar)
        view = look(reference, logical_time, prices, now=now, market_open=market_open)
        work = Work(conn, run, strategy_of(run), reference, read_books(conn, run), view)
        return work.tick(intents, live=now is not None)


@contextmanager
def _whole_or_nothing(
    conn: Connection, user_id: UUID, run_id: UUID, now: datetime | None
) -> Iterator[None]:
    """A transaction of its own or a savepoint; a strategy that failed in it ends its run."""
    try:
        with translated(), conn.transaction():
            yield
    except StrategyFailed as failure:
        # A stop that waited for this call has come first: the run has ended, as it was asked to.
        with suppress(RunNotRunning):
            fail_run(conn, user_id, run_id, str(failure), now or utc_now())
        raise


def try_execute_sip(
    conn: Connection,
    user_id: UUID,
    run_id: UUID,
    logical_time: datetime,
    prices: Prices,
    *,
    market_open: bool | None = None,
    now: datetime | None = None,
) -> int:
    """Execute what is due of a run's investment plans; returns how many orders were placed.

    Orders, executions, positions, cash and events are written, no mark and no TICK. With the
    market closed, nothing is. Each occasion of a plan is executed once, however often this is
    called. Raises what ``run_tick`` raises.
    """
    with _whole_or_nothing(conn, user_id, run_id, now):
        work = open_work(
            conn, user_id, run_id, logical_time, prices, market_open=market_open, now=now
        )
        work.invest()
        return work.placed


def place_orders(
    conn: Connection,
    user_id: UUID,
    run_id: UUID,
    logical_time: datetime,
    prices: Prices,
    orders: Sequence[PlaceOrder],
) -> int:
    """Place orders in a run outside a tick and let the paper book fill what fills at once.

    Returns how many executions there were. No mark and no TICK is written. Raises what
    ``run_tick`` raises.
    """
    with _whole_or_nothing(conn, user_id, run_id, None):
        work = open_work(
            conn, user_id, run_id, logical_time, prices, symbols={o.symbol for o in orders}
        )
        work.carry_out(orders)
        return work.executed


def log_mtm(
    conn: Connection, user_id: UUID, run_id: UUID, logical_time: datetime, prices: Prices
) -> Decimal:
    """Mark a run to market: one row of mtm_ledger; returns its equity, in currency.

    A second call at the same logical time returns the first one's equity and writes nothing.
    """
    logical_time = require_aware(logical_time, "logical_time")
    with translated(), conn.transaction():
        run = lock_run(conn, user_id, run_id)
        row = conn.execute(
            """SELECT equity FROM mtm_ledger
               WHERE user_id = %s AND run_id = %s AND logical_time = %s""",
            [user_id, run_id, logical_time],
        ).fetchone()
        if row is None:
            reference = Reference(conn, run.calendar)
            view = look(reference, logical_time, prices)
            apply_splits(conn, run, reference, read_books(conn, run), view)
            write.mark(conn, run, view)
            row = write.mtm(conn, run, view.logical_time)
        equity: Decimal = row[0]
        return equity


def strategy_of(run: Run) -> Strategy:
    """The run's strategy with its stored parameters. Raises StrategyFailed if it can't be made."""
    try:
        return make(run.strategy, run.parameters)
    except BadInput as error:
        raise StrategyFailed(str(error)) from error


def open_work(
    conn: Connection,
    user_id: UUID,
    run_id: UUID,
    logical_time: datetime,
    prices: Prices,
    *,
    market_open: bool | None = None,
    now: datetime | None = None,
    symbols: Set[str] = frozenset(),
) -> Work:
    """The run locked, its books read and its splits applied, for a call outside a tick.

    ``symbols`` are what the call trades, besides those that ``prices`` names.
    """
    run = lock_run(conn, user_id, run_id)
    require_running(run)
    reference = Reference(conn, run.calendar)
    view = look(reference, logical_time, prices, now=now, market_open=market_open)
    books = read_books(conn, run)
    # Of what isn't held yet too: what it trades now is in new units, and the tick that comes
    # after it must find the split done.
    apply_splits(conn, run, reference, books, view, also=view.prices.keys() | symbols)
    return Work(conn, run, strategy_of(run), reference, books, view)


def apply_splits(
    conn: Connection,
    run: Run,
    reference: Reference,
    books: Books,
    view: View,
    *,
    also: Set[str] = frozenset(),
) -> None:
    """Apply the splits since the run's last tick to what it holds and has ordered, and ``also``.

    Each is applied once, by its key; a run that hasn't ticked counts from its first event.
    """
    since, symbols = books.last_tick or books.began, books.symbols() | also
    before, now = reference.session_at(since) if since else None, view.session
    if before is None or now is None or before.day == now.day or not symbols:
        return
    for split in reference.splits(symbols, before.day, now.day):
        write.apply_split(conn, run, view.logical_time, split)
        reread(conn, run, books)


class Work:
    """One tick under way. It holds the run's lock and lives inside the caller's transaction."""

    def __init__(
        self,
        conn: Connection,
        run: Run,
        strategy: Strategy,
        reference: Reference,
        books: Books,
        view: View,
    ) -> None:
        self.conn = conn
        self.run = run
        self.strategy = strategy
        self.reference = reference
        self.books = books
        self.view = view
        self.placed = 0
        self.executed = 0
        self._unpaid: dict[UUID, str] = {}
        self._plans = isinstance(strategy, Sip)
        self._salt = run_salt(run.user_id, run.run_id)

    def tick(self, intents: Sequence[Intent], *, live: bool) -> TickResult:
        """Everything that a tick does after its claim."""
        self._require_later()
        wanted: list[Intent] = []
        apply_splits(self.conn, self.run, self.reference, self.books, self.view)
        if self.books.last_tick is None:
            self._record_start()
            wanted += self.ask("on_start", self.strategy.on_start)
        for fill in self._match_resting():
            wanted += self.ask_about_fill(fill)
        for symbol in sorted(self.view.bars):
            wanted += self.ask_about_bar(self.view.bars[symbol])
        wanted += self.ask("on_tick", self.strategy.on_tick)
        self.carry_out(wanted, for_strategy=True)
        self.carry_out(intents)
        return self._close(live=live)

    def _require_later(self) -> None:
        """Raise TimeMovesForward before the strategy is asked about a time that has passed."""
        last = self.books.last_tick
        if last is not None and self.view.logical_time < last:
            raise TimeMovesForward(
                f"run {self.run.run_id} has ticked at {last.isoformat()}, after "
                f"{self.view.logical_time.isoformat()}",
                "event_ledger_time_moves_forward",
                "23T07",
                "A run only moves forward; use a later logical_time.",
            )

    def invest(self) -> None:
        """Execute what is due of the run's investment plans, whatever its strategy."""
        self._plans = True
        self.carry_out(self.ask("on_tick", Sip(Parameters()).on_tick), for_strategy=True)

    def ask(self, hook: str, call: Callable[[Context], Intents]) -> list[Intent]:
        """What a hook of the strategy wants. Raises StrategyFailed if it raises."""
        try:
            return list(call(self.context()) or ())
        except Exception as error:  # a user's code may raise anything
            raise StrategyFailed(
                f"strategy {self.run.strategy} failed in {hook} at "
                f"{self.view.logical_time.isoformat()}: {error!r}"
            ) from error

    def ask_about_bar(self, bar: Bar) -> list[Intent]:
        return self.ask("on_bar", lambda context: self.strategy.on_bar(context, bar))

    def ask_about_fill(self, fill: Fill) -> list[Intent]:
        return self.ask("on_fill", lambda context: self.strategy.on_fill(context, fill))

    def context(self) -> Context:
        """What the strategy may know now."""
        books, view = self.books, self.view
        market_value = sum(
            holding.quantity * view.prices.get(holding.symbol, holding.mark_price or Decimal(0))
            for holding in books.holdings.values()
        )
        return Context(
            self.run.user_id,
            self.run.run_id,
            view.logical_time,
            view.now,
            view.session,
            view.market_open,
            MappingProxyType(dict(view.bars)),
            MappingProxyType(dict(view.prices)),
            MappingProxyType(dict(view.quantity_decimals)),
            books.cash,
            books.available_cash,
            books.cash + market_value,
            MappingProxyType(dict(books.holdings)),
            tuple(books.orders.values()),
            MappingProxyType(deepcopy(books.state)),
            self._sips_due if self._plans else (),
        )

    def carry_out(self, intents: Iterable[Intent], *, for_strategy: bool = False) -> None:
        """Do what was asked for, and what the fills of it lead to, round by round.

        ``for_strategy``: it was the strategy that asked, as it always is from the second round on.
        """
        wanted = list(intents)
        for number in range(FILL_ROUNDS_MAX):
            with self._answered_for() if for_strategy or number else nullcontext():
                fills = self._carry_out_once(wanted)
            wanted = [intent for fill in fills for intent in self.ask_about_fill(fill)]
            if not wanted:
                return
        raise StrategyFailed(
            f"strategy {self.run.strategy} still trades on its own fills after "
            f"{FILL_ROUNDS_MAX} rounds at {self.view.logical_time.isoformat()}"
        )

    @contextmanager
    def _answered_for(self) -> Iterator[None]:
        """The strategy answers for what it asked for: what can't be is its failure."""
        try:
            with translated():
                yield
        except (BadInput, InvalidValue, AlreadyHappened) as error:
            raise StrategyFailed(
                f"strategy {self.run.strategy} asked at {self.view.logical_time.isoformat()} "
                f"for what can't be: {error}"
            ) from error

    def _carry_out_once(self, intents: Sequence[Intent]) -> list[Fill]:
        fills: list[Fill] = []
        # Orders of one side go together, in the order asked for: sells are filled, and their cash
        # is there, before the buys after them are weighed.
        for side, group in groupby(intents, key=_side):
            if side is None:
                for intent in group:
                    self._do(intent)
            else:
                fills += self._place([i for i in group if isinstance(i, PlaceOrder)])
        return fills

    def _do(self, intent: Intent) -> None:
        """Anything but an order."""
        match intent:
            case CancelOrder(order_id):
                if order_id not in self.books.orders:
                    raise BadInput(f"there is no open order {order_id} to cancel")
                moved = [write.Move(order_id, "CANCELED", "STRATEGY")]
                write.move_orders(self.conn, self.run, self.view.logical_time, moved)
                reread(self.conn, self.run, self.books)
            case Remember(state):
                self.books.state = dict(state)
            case Announce(event_type, subject, payload):
                if event_type.startswith(_OURS):
                    raise BadInput(f"{event_type} is an event that only the engine writes")
                self._record(ledger.Event(event_type, subject, payload))
            case _:
                raise BadInput(f"{intent!r} is no intent")

    @cached_property
    def _numbered(self) -> int:
        """Orders that were placed at this logical time before this piece of work."""
        return write.count_orders_at(self.conn, self.run, self.view.logical_time)

    @cached_property
    def _sips_due(self) -> tuple[SipDue, ...]:
        """Occasions of plans that are due, if they can be executed now."""
        session = self.view.session
        if session is None or not self.view.market_open:
            return ()
        rows = self.conn.execute(
            "SELECT * FROM sip_due(%s, %s, %s) LIMIT %s",
            [self.run.user_id, self.run.run_id, session.day, SIPS_DUE_MAX],
        )
        return tuple(
            SipDue(*row[:7], Session(self.run.calendar, *row[7:]))  # type: ignore[call-arg]
            for row in rows.fetchall()
        )

    def _record(self, *events: ledger.Event) -> None:
        ledger.append(self.conn, self.run.user_id, self.run.run_id, self.view.logical_time, events)

    def _record_start(self) -> None:
        facts = {
            "strategy": self.run.strategy,
            "parameters": dict(self.run.parameters),
            "initial_cash": str(self.run.initial_cash),
        }
        self._record(ledger.Event("RUN_STARTED", "", facts))

    def _match_resting(self) -> list[Fill]:
        """Show what rests the bars that it hasn't seen: those from after the last tick."""
        resting = [self._with_end(order) for order in self.books.orders.values()]
        last = self.books.last_tick
        new = {s: bar for s, bar in self.view.bars.items() if last is None or bar.end > last}
        return self._settle(self._match(resting, new)) if resting else []

    def _with_end(self, order: Order) -> Order:
        """An order with the end of its day, which one that came by psql doesn't have."""
        if order.expire_at is not None or order.time_in_force in _ENDLESS:
            return order
        session = self.reference.session_at(order.logical_time)
        if session is None or order.logical_time >= session.close_at:
            session = self.reference.session_after(order.logical_time)
        return replace(order, expire_at=session.close_at if session else None)

    def _match(self, orders: Sequence[Order], bars: Mapping[str, Bar]) -> list[Outcome]:
        """Show the bars to the orders, by where the bars stand in the session."""
        outcomes: list[Outcome] = []
        by_moment: dict[Any, list[Order]] = {}
        for order in orders:
            bar = bars.get(order.symbol)
            key = self.view.moment(bar) if bar else _NO_MOMENT
            by_moment.setdefault(key, []).append(order)
        for moment, group in by_moment.items():
            outcomes += match_all(
                group,
                bars,
                moment=moment,
                settings=self.run.paper,
                now=self.view.logical_time,
                fills_before=self.books.executions,
            )
        return outcomes

    def _place(self, wanted: Sequence[PlaceOrder]) -> list[Fill]:
        """Insert orders of one side, let the gate decide, fill what fills at once."""
        first = self._numbered + self.placed
        if first + len(wanted) > ORDERS_PER_TICK_MAX:
            raise BadInput(f"more than {ORDERS_PER_TICK_MAX} orders at one logical_time")
        self.reference.quantity_decimals({place.symbol for place in wanted})
        for due in (place.occasion for place in wanted if place.occasion):
            if due.symbol not in self.view.prices:
                raise BadInput(f"plan {due.plan} can't be executed without a price of {due.symbol}")
        orders = [
            self._order_of(place, order_id_of(self._salt, self.view.logical_time, first + number))
            for number, place in enumerate(wanted)
        ]
        references = [self.view.prices.get(order.symbol) for order in orders]
        keys = [place.client_order_id for place in wanted]
        rejected = write.insert_orders(self.conn, self.run, orders, references, keys)
        self.placed += len(orders)
        taken = [order for order in orders if order.order_id not in rejected]
        fills = self._settle(self._match(taken, self.view.bars))
        self._record_occasions(wanted, orders, rejected | self._unpaid)
        return fills

    def _order_of(self, place: PlaceOrder, order_id: UUID) -> Order:
        order = Order(
            order_id,
            place.symbol,
            place.side,
            place.quantity,
            place.order_type,
            place.time_in_force,
            self.view.logical_time,
            place.limit_price,
            place.stop_price,
            place.trail_amount,
            place.trail_percent,
            place.expire_at,
        )
        return self._with_end(order)

    def _settle(self, outcomes: Sequence[Outcome]) -> list[Fill]:
        """Write what the paper book decided: executions first, then what else became of orders."""
        cash = self.books.cash
        fills: list[Fill] = []
        moves: list[write.Move] = []
        for outcome in outcomes:
            cost = _cost(outcome)
            left = EXACT.subtract(cash, cost)
            if self.run.account_type == "CASH" and left < 0:
                moves.append(self._refuse(outcome, cash, cost))
                continue
            cash = left
            fills += outcome.fills
            move = self._move(outcome)
            if move is not None:
                moves.append(move)
        write.insert_executions(self.conn, self.run, self.view.logical_time, fills)
        write.move_orders(self.conn, self.run, self.view.logical_time, moves)
        self.executed += len(fills)
        if fills or moves:
            reread(self.conn, self.run, self.books)
        return fills

    def _refuse(self, outcome: Outcome, cash: Decimal, cost: Decimal) -> write.Move:
        """End an order whose fill the cash doesn't cover: slippage, a gap or commission."""
        order_id = outcome.order.order_id
        reason = f"INSUFFICIENT_CASH: has {_plain(cash)}, needs {_plain(cost)}"
        if sum(fill.quantity for fill in outcome.fills) < outcome.order.filled_quantity:
            return write.Move(order_id, "CANCELED", reason)
        self._unpaid[order_id] = "INSUFFICIENT_CASH"
        return write.Move(order_id, "REJECTED", reason, reject_code="INSUFFICIENT_CASH")

    def _move(self, outcome: Outcome) -> write.Move | None:
        """What to write of an outcome besides its executions, which move the order themselves."""
        order = outcome.order
        before = self.books.orders.get(order.order_id)
        if outcome.status in ("CANCELED", "EXPIRED"):
            return write.Move(order.order_id, outcome.status, outcome.reason)
        status = None
        if outcome.status == "PENDING" and self.books.statuses.get(order.order_id) != "PENDING":
            status = "PENDING"
        drawn = before is None or (order.stop_price, order.triggered_at, order.expire_at) != (
            before.stop_price,
            before.triggered_at,
            before.expire_at,
        )
        if status is None and (outcome.status == "FILLED" or not drawn):
            return None
        return write.Move(
            order.order_id,
            status,
            None,
            stop_price=order.stop_price,
            triggered_at=order.triggered_at,
            expire_at=order.expire_at,
        )

    def _record_occasions(
        self, wanted: Sequence[PlaceOrder], orders: Sequence[Order], rejected: dict[UUID, str]
    ) -> None:
        """Tell the ledger what became of the plans' occasions that these orders were for."""
        events = []
        for place, order in zip(wanted, orders, strict=True):
            due = place.occasion
            if due is None:
                continue
            facts = {
                "plan": due.plan,
                "symbol": due.symbol,
                "amount": str(due.amount),
                "planned_on": due.planned_on.isoformat(),
                "quantity": str(order.quantity),
                "price": str(self.view.prices[due.symbol]),
            }
            code = rejected.get(order.order_id)
            events.append(
                ledger.Event("SIP_EXECUTED", due.occasion, facts)
                if code is None
                else ledger.Event("SIP_REJECTED", due.occasion, facts | {"reject_code": code})
            )
        self._record(*events)

    def _close(self, *, live: bool) -> TickResult:
        """Mark to market and write the TICK event, which makes the tick have happened."""
        facts = {
            "orders": self.placed,
            "executions": self.executed,
            "prices": {
                symbol: str(self.view.prices[symbol])
                for symbol in sorted(self.books.symbols() & self.view.prices.keys())
            },
        }
        payload = write.close_tick(
            self.conn, self.run, self.view, Jsonb(facts), Jsonb(self.books.state), live=live
        )
        self.books.last_tick = self.view.logical_time
        return TickResult.told(self.view.logical_time, payload, repeated=False)


def _side(intent: Intent) -> Side | None:
    """The side of an order; ``None`` for what is no order."""
    return Side(intent.side) if isinstance(intent, PlaceOrder) else None


def _cost(outcome: Outcome) -> Decimal:
    """What an outcome's fills take from cash; negative where they bring some."""
    sign = 1 if outcome.order.side is Side.BUY else -1
    with localcontext(EXACT):
        return sum(
            (sign * fill.quantity * fill.price + fill.commission for fill in outcome.fills),
            Decimal(0),
        )


def _plain(number: Decimal) -> str:
    """A number in words for people: without trailing zeros or an exponent."""
    return f"{number.normalize(EXACT):f}"
