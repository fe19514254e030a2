"""The tick: one step of a run at one logical time, in one transaction, exactly once.

Ask the ledger whether the tick is there already, apply splits, let the paper book fill what rests,
ask the strategy, place and fill what it wants, mark to market, close with the TICK event. The
database refuses whatever would break the books on the way.

A tick is first worked out on what was just read, without any lock, and written in one statement,
which takes the run's lock and refuses if the run has moved meanwhile. What can't be written so (an
order that rests, a refusal, a split) is done again step by step, with the run locked throughout.
Locks are taken in one order: run, orders by id, ledger.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from uuid import UUID
from weakref import WeakKeyDictionary

from psycopg.pq import TransactionStatus

from engine.agenda import Agenda
from engine.books import Books, open_books, read_books
from engine.clock import utc_now
from engine.db.connect import Connection
from engine.errors import (
    BadInput,
    Retryable,
    RuleViolation,
    RunNotRunning,
    StrategyFailed,
    translated,
)
from engine.market.view import Prices, View, look
from engine.orders import write
from engine.outbox import wake
from engine.reference import Reference
from engine.runs import PAPER, Run, fail_run, lock_run, require_aware, require_running
from engine.strategies.base import Intent, PlaceOrder, SipDue
from engine.work import (
    FILL_ROUNDS_MAX,
    Desk,
    NeedsSteps,
    TickResult,
    Work,
    apply_splits,
    splits_due,
    strategy_of,
)

__all__ = [
    "FILL_ROUNDS_MAX",
    "TickResult",
    "log_mtm",
    "place_orders",
    "run_tick",
    "strategy_of",
    "try_execute_sip",
]


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
    if not isinstance(prices, Mapping):
        prices = list(prices)  # they may be looked at twice
    planned = _Planned(user_id, run_id, logical_time, prices, now, market_open, tuple(intents))
    if conn.autocommit and conn.info.transaction_status == TransactionStatus.IDLE:
        # Whatever goes wrong goes wrong again, in steps, where it is told apart.
        with suppress(NeedsSteps, Retryable, RuleViolation, BadInput, StrategyFailed), translated():
            return planned.at_once(conn)
    with _whole_or_nothing(conn, user_id, run_id, now):
        return planned.in_steps(conn)


class _Kept:
    """What a connection's live ticks know from one to the next.

    Nothing of it is trusted: a tick that was worked out on books which are not those of the
    database any more is refused by it, and worked out again on what is read anew. Sessions never
    change; what else is looked up is so once a session.
    """

    def __init__(self) -> None:
        self.references: dict[str, Reference] = {}
        self.run: Run | None = None
        self.books: Books | None = None

    def reference(self, conn: Connection, run: Run) -> Reference:
        if run.calendar not in self.references:
            self.references[run.calendar] = Reference(conn, run.calendar)
        return self.references[run.calendar]

    def opened(self, user_id: UUID, run_id: UUID, at: datetime) -> tuple[Run, Books] | None:
        """The run and its books as its last tick here left them, if ``at`` is of its session."""
        run, books = self.run, self.books
        self.run = self.books = None
        if run is None or books is None or (run.user_id, run.run_id) != (user_id, run_id):
            return None
        if books.last_tick is None or at <= books.last_tick:
            return None
        reference = self.references[run.calendar]
        if reference.session_at(at) != reference.session_at(books.last_tick):
            return None
        return run, books

    def keep(self, run: Run, books: Books) -> None:
        self.run, self.books = run, books


_kept: WeakKeyDictionary[Connection, _Kept] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class _Planned:
    """What a tick was called with."""

    user_id: UUID
    run_id: UUID
    logical_time: datetime
    prices: Prices
    now: datetime | None
    market_open: bool | None
    intents: Sequence[Intent]

    def at_once(self, conn: Connection) -> TickResult:
        """Work out without a lock, write in one statement. Raises NeedsSteps if that can't be."""
        kept = _kept.setdefault(conn, _Kept())
        known = kept.opened(self.user_id, self.run_id, self.logical_time)
        if known is not None:
            with suppress(Retryable, RuleViolation), translated():
                return self._kept_tick(conn, kept, *known)
        run, books, told, due = open_books(conn, self.user_id, self.run_id, self.logical_time)
        if told is not None:
            return TickResult.told(self.logical_time, told, repeated=True)
        kept.reference(conn, run).ask_anew(self.logical_time)
        return self._kept_tick(conn, kept, run, books, due)

    def _kept_tick(
        self,
        conn: Connection,
        kept: _Kept,
        run: Run,
        books: Books,
        due: tuple[date, tuple[SipDue, ...]] | None = None,
    ) -> TickResult:
        if run.broker != PAPER:
            raise NeedsSteps  # its orders wait for a broker
        reference = kept.reference(conn, run)
        view = self._look(run, reference)
        # What was read is of the session that was stored then, which may be an earlier one.
        read = due if due and view.session and due[0] == view.session.day else None
        agenda = Agenda(conn, run, read=read)
        desk = Desk(conn, run, books, reference, at_once=True, agenda=agenda)
        result = self._tick(desk, view)
        if not books.state:
            # A state may be put right by hand, which no event tells.
            kept.keep(run, books)
        return result

    def in_steps(self, conn: Connection) -> TickResult:
        """Lock the run and write each step as it comes, in the caller's transaction."""
        lock_run(conn, self.user_id, self.run_id)
        run, books, told, _ = open_books(conn, self.user_id, self.run_id, self.logical_time)
        if told is not None:
            return TickResult.told(self.logical_time, told, repeated=True)
        reference = Reference(conn, run.calendar)
        view = self._look(run, reference)
        return self._tick(Desk(conn, run, books, reference), view)

    def _look(self, run: Run, reference: Reference) -> View:
        """What the tick sees. Raises RunNotRunning and BadInput before anything is looked up."""
        require_running(run)
        return look(
            reference, self.logical_time, self.prices, now=self.now, market_open=self.market_open
        )

    def _tick(self, desk: Desk, view: View) -> TickResult:
        work = Work(desk, strategy_of(desk.run), view)
        result = work.tick(self.intents)
        desk.write_out(None if self.now is None else view)
        if work.sent:
            wake(desk.conn)
        return result


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
        if work.sent:
            wake(conn)
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
        if work.sent:
            wake(conn)
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
            books = read_books(conn, run)
            apply_splits(conn, run, books, view, splits_due(books, reference, view))
            write.mark(conn, run, view)
            row = write.mtm(conn, run, view.logical_time)
        equity: Decimal = row[0]
        return equity


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
    also = view.prices.keys() | symbols
    apply_splits(conn, run, books, view, splits_due(books, reference, view, also=also))
    return Work(Desk(conn, run, books, reference), strategy_of(run), view)
