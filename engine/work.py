"""One tick under way: what the strategy sees and wants, and what becomes of it.

Trades that a tick fills whole are put into a journal, which is written at the end of the tick or
of a batch of ticks, in one statement. Whatever else may become of orders (resting, cancelled,
refused, split) is written step by step, as the database decides it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal, localcontext
from enum import Enum
from functools import cached_property
from itertools import groupby
from types import MappingProxyType
from typing import Any
from uuid import UUID

from engine import journal as journals
from engine import ledger
from engine.agenda import Agenda
from engine.books import Books, reread
from engine.db.connect import Connection
from engine.errors import (
    AlreadyHappened,
    BadInput,
    HistoryIsFixed,
    InvalidValue,
    RuleViolation,
    StrategyFailed,
    TimeMovesForward,
    UnknownReference,
    translated,
)
from engine.ids import ORDERS_PER_TICK_MAX, order_id_of, run_salt
from engine.journal import Journal, Taken
from engine.ledger import Told
from engine.market.model import Bar, Split
from engine.market.view import View
from engine.orders import write
from engine.orders.model import Fill, Order, OrderType, Side, TimeInForce
from engine.paper.book import Moment, Outcome, match_all
from engine.quantities import EXACT
from engine.reference import Reference
from engine.runs import PAPER, Run
from engine.safety import tell_refusals
from engine.strategies.base import (
    Announce,
    CancelOrder,
    Context,
    Intent,
    Intents,
    ModifyOrder,
    Parameters,
    PlaceOrder,
    Remember,
    SipDue,
    Strategy,
)
from engine.strategies.registry import maker
from engine.strategies.sip import Sip

# How often fills may lead to orders that fill again within one tick.
FILL_ROUNDS_MAX = 8

_ENDLESS = (TimeInForce.GTC, TimeInForce.GTD)
_PLAIN = (OrderType.MARKET, OrderType.LIMIT)
_ZERO = Decimal(0)
_NOTHING: Mapping[str, Any] = MappingProxyType({})
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


def strategy_of(run: Run) -> Strategy:
    """The run's strategy with its stored parameters. Raises StrategyFailed if it can't be made."""
    return strategies_of(run)()


def strategies_of(run: Run) -> Callable[[], Strategy]:
    """Makes the run's strategy, a new one at each call. Raises StrategyFailed if that can't be."""
    try:
        return maker(run.strategy, run.parameters)
    except BadInput as error:
        raise StrategyFailed(str(error)) from error


class NeedsSteps(Exception):
    """What a tick wants can't be written at once at its end: it must be done step by step."""


def splits_due(
    run_books: Books, reference: Reference, view: View, *, also: Set[str] = frozenset()
) -> list[Split]:
    """The splits since the run's last tick of what it holds and has ordered, and of ``also``.

    A run that hasn't ticked counts from its first event.
    """
    since, symbols = run_books.last_tick or run_books.began, run_books.symbols() | also
    before, now = reference.session_at(since) if since else None, view.session
    if before is None or now is None or before.day == now.day or not symbols:
        return []
    return reference.splits(symbols, before.day, now.day)


def apply_splits(
    conn: Connection, run: Run, books: Books, view: View, splits: Iterable[Split]
) -> None:
    """Apply splits to what the run holds and has ordered; each once, by its key."""
    for split in splits:
        write.apply_split(conn, run, view.logical_time, split)
        reread(conn, run, books)


class Mode(Enum):
    """How the ticks of a run are written.

    STEPS: the run is locked in the caller's transaction, and each step is written as it comes; so
    are orders of one side that are filled whole, unless the gate refuses one. AT_ONCE: those are
    told, and nothing is written until the journal is; what needs a step raises NeedsSteps.
    """

    STEPS = "STEPS"
    AT_ONCE = "AT_ONCE"


class Desk:
    """What the ticks of one run share: its books, what is looked up, and the journal."""

    def __init__(
        self,
        conn: Connection,
        run: Run,
        books: Books,
        reference: Reference,
        mode: Mode = Mode.STEPS,
        *,
        agenda: Agenda | None = None,
    ) -> None:
        self.conn = conn
        self.run = run
        self.books = books
        self.reference = reference
        self.journal = Journal(books.head)
        self.agenda = agenda or Agenda(conn, run)
        self.mode = mode

    def write_out(self, beat: View | None = None) -> None:
        """Write what the journal holds, with the heartbeat of a live tick.

        Raises NeedsSteps where the gate refuses an order: its tick is not written.
        """
        if not self.journal.empty and not self._write(beat):
            raise NeedsSteps

    def _write(self, beat: View | None = None) -> bool:
        taken = self.take(beat)
        self.books.head = self.journal.head
        return journals.write(self.conn, taken) == taken.events

    def write_unless_refused(self, orders: int) -> bool:
        """Write the so many orders of the journal; false, and none is written, if one can't be."""
        try:
            # A single one is refused before anything is written.
            with translated(), self.conn.transaction() if orders > 1 else nullcontext():
                written = self._write()
        except RuleViolation:
            if orders == 1:
                raise
            written = False
        if not written:
            self._reread()
        return written

    def _reread(self) -> None:
        reread(self.conn, self.run, self.books)
        self.journal.head = self.books.head

    def take(self, beat: View | None = None) -> Taken:
        """What writes all that the journal holds; it is empty afterwards."""
        now = lag = None
        if beat is not None:
            now = beat.now
            lag = Decimal(str((beat.now - beat.logical_time).total_seconds()))
        # Only what the strategy has asked for: somebody else may have put it right meanwhile.
        state = None
        if self.books.remembered and self.journal.has_ticks:
            state, self.books.remembered = self.books.state, False
        run = self.run
        return self.journal.take(run.user_id, run.run_id, state, now=now, lag_seconds=lag)

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step that is written now; the books are read anew."""
        if self.mode is Mode.AT_ONCE:
            raise NeedsSteps
        yield
        self._reread()


class Work:
    """A tick's work at a run's desk, or that of a call outside of a tick."""

    def __init__(self, desk: Desk, strategy: Strategy, view: View) -> None:
        self.desk = desk
        self.conn = desk.conn
        self.run = desk.run
        self.reference = desk.reference
        self.books = desk.books
        self.strategy = strategy
        self.view = view
        self.placed = 0
        self.executed = 0
        # Whether there may be something for a broker's connector.
        self.sent = False
        self._unpaid: dict[UUID, str] = {}
        self._plans = isinstance(strategy, Sip)
        self._context: Context | None = None
        # Nothing has happened at this logical time yet, so that no order has an id of it.
        stands_at = desk.books.stands_at
        self._first_here = stands_at is None or stands_at < view.logical_time

    def tick(self, intents: Sequence[Intent] = ()) -> TickResult:
        """Everything that a tick does after its claim, up to what the journal still holds."""
        self._require_later()
        wanted: list[Intent] = []
        splits = splits_due(self.books, self.reference, self.view)
        if splits:
            with self._step():
                apply_splits(self.conn, self.run, self.books, self.view, splits)
        if self.books.last_tick is None:
            self._record_start()
            wanted += self.ask("on_start", self.strategy.on_start)
        for fill in self._news():
            wanted += self.ask_about_fill(fill)
        if self._has("on_bar"):
            for symbol in sorted(self.view.bars):
                wanted += self.ask_about_bar(self.view.bars[symbol])
        if self._has("on_tick"):
            wanted += self.ask("on_tick", self.strategy.on_tick)
        if wanted:
            self.carry_out(wanted, for_strategy=True)
        if intents:
            self.carry_out(intents)
        return self._close()

    @contextmanager
    def _step(self) -> Iterator[None]:
        with self.desk.step():
            yield
        self._context = None

    def _has(self, hook: str) -> bool:
        """Whether the strategy has a hook of its own."""
        own = getattr(type(self.strategy), hook) is not getattr(Strategy, hook)
        return own or hook in vars(self.strategy)

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
        if self._context is None:
            books, view = self.books, self.view
            equity = books.cash
            for symbol, held in books.holdings.items():
                price = view.prices.get(symbol) or held.mark_price or _ZERO
                equity = EXACT.add(equity, EXACT.multiply(held.quantity, price))
            self._context = Context(
                self.run.user_id,
                self.run.run_id,
                view.logical_time,
                view.now,
                view.session,
                view.market_open,
                MappingProxyType(view.bars),
                MappingProxyType(view.prices),
                MappingProxyType(view.quantity_decimals),
                books.cash,
                books.available_cash,
                equity,
                MappingProxyType(dict(books.holdings)),
                tuple(books.orders.values()),
                MappingProxyType(deepcopy(books.state)) if books.state else _NOTHING,
                self._sips_due if self._plans else (),
            )
        return self._context

    def carry_out(self, intents: Iterable[Intent], *, for_strategy: bool = False) -> None:
        """Do what was asked for, and what the fills of it lead to, round by round.

        ``for_strategy``: it was the strategy that asked, as it always is from the second round on.
        """
        wanted = list(intents)
        for number in range(FILL_ROUNDS_MAX):
            with self._answered_for() if for_strategy or number else nullcontext():
                fills = self._carry_out_once(wanted)
            if not (fills and self._has("on_fill")):
                return
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
                self.sent = self.run.broker != PAPER
                with self._step():
                    self._cancel(order_id)
            case ModifyOrder(order_id, quantity, limit_price, stop_price):
                self.sent = True
                with self._step():
                    self._modify(order_id, quantity, limit_price, stop_price)
            case Remember(state):
                self.books.state = dict(state)
                self.books.remembered = True
                self._context = None
            case Announce(event_type, subject, payload):
                if event_type.startswith(_OURS):
                    raise BadInput(f"{event_type} is an event that only the engine writes")
                self._record(ledger.Event(event_type, subject, payload))
                self.desk.agenda.told(subject)
            case _:
                raise BadInput(f"{intent!r} is no intent")

    def _cancel(self, order_id: UUID) -> None:
        try:
            with translated():
                write.cancel_order(
                    self.conn, self.run, order_id, "STRATEGY", self.view.logical_time
                )
        except UnknownReference as error:
            raise BadInput(f"there is no order {order_id} to cancel") from error

    def _modify(
        self,
        order_id: UUID,
        quantity: Decimal | None,
        limit_price: Decimal | None,
        stop_price: Decimal | None,
    ) -> None:
        try:
            with translated():
                write.modify_order(
                    self.conn,
                    self.run,
                    order_id,
                    None,
                    quantity=quantity,
                    limit_price=limit_price,
                    stop_price=stop_price,
                )
        except (UnknownReference, HistoryIsFixed) as error:
            raise BadInput(f"order {order_id} can't be modified: {error}") from error

    @cached_property
    def _numbered(self) -> int:
        """Orders that were placed at this logical time before this piece of work."""
        if self._first_here:
            return 0
        return write.count_orders_at(self.conn, self.run, self.view.logical_time)

    @cached_property
    def _sips_due(self) -> tuple[SipDue, ...]:
        """Occasions of plans that are due, if they can be executed now."""
        if self.view.session is None or not self.view.market_open:
            return ()
        return self.desk.agenda.due(self.view.session)

    def _record(self, *events: ledger.Event) -> None:
        at = self.view.logical_time
        if self.desk.mode is Mode.AT_ONCE:
            for event in events:
                self.desk.journal.event(at, *event)
        elif events:
            with self._step():
                ledger.append(self.conn, self.run.user_id, self.run.run_id, at, events)

    def _record_start(self) -> None:
        facts = {
            "strategy": self.run.strategy,
            "parameters": dict(self.run.parameters),
            "initial_cash": str(self.run.initial_cash),
            "broker": self.run.broker,
            "paper": self.run.paper.model_dump(mode="json"),
            "account_type": self.run.account_type,
            "calendar": self.run.calendar,
            "currency": self.run.currency,
        }
        self._record(ledger.Event("RUN_STARTED", "", facts))

    def _news(self) -> list[Fill]:
        """What was filled since the last tick: by the broker, or now by our own book."""
        if self.run.broker != PAPER:
            return write.fills_since_tick(self.conn, self.run)
        return self._match_resting()

    def _match_resting(self) -> list[Fill]:
        """Show what rests the bars that it hasn't seen: those from after the last tick."""
        if not self.books.orders:
            return []
        resting = [self._with_end(order) for order in self.books.orders.values()]
        last = self.books.last_tick
        new = {s: bar for s, bar in self.view.bars.items() if last is None or bar.end > last}
        return self._settle(self._match(resting, new))

    def _with_end(self, order: Order) -> Order:
        """An order with the end of its day, which one that came by psql doesn't have."""
        end = self._end_of(order.time_in_force, order.expire_at, order.logical_time)
        return order if end == order.expire_at else replace(order, expire_at=end)

    def _end_of(
        self, time_in_force: TimeInForce, expire_at: datetime | None, placed_at: datetime
    ) -> datetime | None:
        """When an order expires: where it names no moment, at the end of its day."""
        if expire_at is not None or time_in_force in _ENDLESS:
            return expire_at
        session = self.reference.session_at(placed_at)
        if session is None or placed_at >= session.close_at:
            session = self.reference.session_after(placed_at)
        return session.close_at if session else None

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
        salt = run_salt(self.run.user_id, self.run.run_id)
        orders = [
            self._order_of(place, order_id_of(salt, self.view.logical_time, first + number))
            for number, place in enumerate(wanted)
        ]
        self.placed += len(orders)
        fills = self._trade(orders, wanted)
        rejected: dict[UUID, str] = {}
        if fills is None:
            rejected = self._insert(orders, wanted)
            taken = [order for order in orders if order.order_id not in rejected]
            fills = self._settle(self._match_placed(taken)) if self.run.broker == PAPER else []
        self._record_occasions(wanted, orders, rejected | self._unpaid)
        return fills

    def _insert(self, orders: Sequence[Order], wanted: Sequence[PlaceOrder]) -> dict[UUID, str]:
        """Insert orders and let the gate decide; returns the reject codes of what it refused."""
        references = [self.view.prices.get(order.symbol) for order in orders]
        keys = [place.client_order_id for place in wanted]
        with self._step():
            rejected = write.insert_orders(self.conn, self.run, orders, references, keys)
            if rejected:
                tell_refusals(self.conn, self.run.user_id, self.run.run_id, list(rejected))
        self.sent = self.run.broker != PAPER
        return rejected

    def _trade(self, orders: Sequence[Order], wanted: Sequence[PlaceOrder]) -> list[Fill] | None:
        """Put orders that are all filled whole into the journal; ``None`` where they are not.

        In steps they are written now, and the gate may say no. Told in the same way in each mode,
        one and the same tick has the same events, however it is called.
        """
        if self.run.broker != PAPER or not all(self._is_plain(order) for order in orders):
            return None
        outcomes = self._match_placed(orders)
        if not self._are_trades(outcomes):
            return None
        fills = self._journal_trades(outcomes, wanted)
        if self.desk.mode is Mode.STEPS and not self.desk.write_unless_refused(len(fills)):
            self._context = None
            return None
        self.executed += len(fills)
        return fills

    def _match_placed(self, orders: Sequence[Order]) -> list[Outcome]:
        """What becomes at once of orders that were placed together, in the order of their ids."""
        outcomes = self._match(orders, self.view.bars)
        return sorted(outcomes, key=lambda outcome: outcome.order.order_id)

    def _is_plain(self, order: Order) -> bool:
        """Whether an order is one that may be a trade: what it needs is there, and nothing else."""
        needs_limit = order.order_type is OrderType.LIMIT
        return (
            order.order_type in _PLAIN
            and order.quantity > 0
            and (order.limit_price is not None) == needs_limit
            and order.stop_price is None
            and order.trail_amount is None
            and order.trail_percent is None
            and order.symbol in self.view.prices
        )

    def _are_trades(self, outcomes: Sequence[Outcome]) -> bool:
        """Whether all are filled whole, and the gate will hardly refuse one; it decides itself."""
        if any(outcome.status != "FILLED" for outcome in outcomes):
            return False
        if self.run.account_type != "CASH":
            return True
        cash, held = self.books.available_cash, {}
        free = cash
        for outcome in outcomes:
            order = outcome.order
            if order.symbol not in held:
                holding = self.books.holdings.get(order.symbol)
                held[order.symbol] = holding.quantity if holding else _ZERO
            if order.side is Side.BUY:
                price = order.limit_price or self.view.prices[order.symbol]
                wanted = EXACT.multiply(order.quantity, price)
                # In steps the gate weighs all of them before the first is filled.
                if wanted > free or wanted > cash:
                    return False
                free = EXACT.subtract(free, wanted)
                held[order.symbol] += order.quantity
            else:
                held[order.symbol] -= order.quantity
            cash = EXACT.subtract(cash, _cost(outcome))
            if cash < 0 or held[order.symbol] < 0:
                return False
        return True

    def _journal_trades(
        self, outcomes: Sequence[Outcome], wanted: Sequence[PlaceOrder]
    ) -> list[Fill]:
        """Tell the trades, and let the books take them up."""
        keys = [place.client_order_id for place in wanted]
        fills = []
        for outcome, key in zip(outcomes, keys, strict=True):
            (fill,) = outcome.fills
            reference = self.view.prices[outcome.order.symbol]
            self.desk.journal.trade(outcome.order, reference, key, fill)
            self.books.fill(fill, self.view.logical_time)
            fills.append(fill)
        self._context = None
        return fills

    def _order_of(self, place: PlaceOrder, order_id: UUID) -> Order:
        at = self.view.logical_time
        return Order(
            order_id,
            place.symbol,
            place.side,
            place.quantity,
            place.order_type,
            place.time_in_force,
            at,
            place.limit_price,
            place.stop_price,
            place.trail_amount,
            place.trail_percent,
            self._end_of(place.time_in_force, place.expire_at, at),
        )

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
        if fills or moves:
            with self._step():
                write.insert_executions(self.conn, self.run, self.view.logical_time, fills)
                write.move_orders(self.conn, self.run, self.view.logical_time, moves)
        self.executed += len(fills)
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
            self.desk.agenda.told(due.occasion)
        self._record(*events)

    def _close(self) -> TickResult:
        """Mark to market and tell the tick, which makes it have happened once it is written."""
        books, at = self.books, self.view.logical_time
        marks, marked = {}, {}
        for symbol, price in self.view.prices.items():
            if symbol in books.holdings:
                seen_at = self.view.bars[symbol].end
                if not books.mark(symbol, price, seen_at):
                    continue
                if seen_at != at:
                    marked[symbol] = seen_at
                marks[symbol] = price
            elif books.orders and symbol in books.symbols():
                marks[symbol] = price
        value = books.market_value
        told = Told(self.placed, self.executed, books.cash, value, EXACT.add(books.cash, value))
        self.desk.journal.tick(at, told, marks, marked)
        books.last_tick = books.stands_at = at
        return TickResult.told(at, told, repeated=False)


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
