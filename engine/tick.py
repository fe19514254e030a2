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
from datetime import datetime
from decimal import Decimal
from typing import NamedTuple
from uuid import UUID
from weakref import WeakKeyDictionary

from psycopg.pq import TransactionStatus

from engine import journal as journals
from engine.agenda import Agenda
from engine.books import Books, Opened, open_books, read_books
from engine.clock import utc_now
from engine.db.connect import Connection
from engine.errors import (
    BadInput,
    DatabaseUnavailable,
    Retryable,
    RuleViolation,
    RunNotRunning,
    StrategyFailed,
    translated,
)
from engine.journal import Taken
from engine.market.view import Prices, View, look
from engine.orders import write
from engine.outbox import wake
from engine.reference import Reference
from engine.runs import PAPER, Run, fail_run, lock_run, require_aware, require_running
from engine.strategies.base import Intent, PlaceOrder
from engine.work import (
    FILL_ROUNDS_MAX,
    Desk,
    Mode,
    NeedsSteps,
    TickResult,
    Work,
    apply_splits,
    splits_due,
    strategy_of,
)

__all__ = [
    "FILL_ROUNDS_MAX",
    "Planned",
    "TickResult",
    "log_mtm",
    "place_orders",
    "run_tick",
    "run_ticks",
    "strategy_of",
    "try_execute_sip",
]


# How often a tick of many is tried again after a deadlock or a lock timeout.
ATTEMPTS_MAX = 3


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
    planned = Planned(user_id, run_id, logical_time, prices, now, market_open, tuple(intents))
    if conn.autocommit and conn.info.transaction_status == TransactionStatus.IDLE:
        with suppress(*_IN_STEPS), translated():
            return planned.at_once(conn)
    return planned.in_steps(conn)


def run_ticks(
    conn: Connection, ticks: Sequence[tuple[Planned, Opened]]
) -> list[TickResult | Exception]:
    """Tick several runs, each once and in a transaction of its own; none waits for another's end.

    Each comes with what was read of it, which needn't be so any more: what can't be written as it
    was worked out is ticked by itself, as ``run_tick`` does it. Returns for each what ``run_tick``
    would have returned or raised. The connection must be in autocommit, outside of a transaction.
    """
    kept = _kept.setdefault(conn, _Kept())
    for planned, opened in ticks:
        kept.reference(conn, opened.run).ask_anew(planned.logical_time)
    done = [_worked_out(conn, kept, planned, opened) for planned, opened in ticks]
    taken = [each.taken for each in done if each is not None and each.taken is not None]
    with translated():
        answers = iter(journals.write_each(conn, taken))
    results: list[TickResult | Exception] = []
    for (planned, _), each in zip(ticks, done, strict=True):
        if each is None or (each.taken is not None and next(answers) != each.taken.events):
            results.append(_by_itself(conn, planned))
        else:
            results.append(each.result)
    return results


class _WorkedOut(NamedTuple):
    """A tick's result, and what writes it; ``None`` where that was done before."""

    result: TickResult
    taken: Taken | None


def _worked_out(
    conn: Connection, kept: _Kept, planned: Planned, opened: Opened
) -> _WorkedOut | None:
    """A tick that can be written at once; ``None`` for one that must be ticked by itself."""
    if opened.told is not None:
        told = TickResult.told(planned.logical_time, opened.told, repeated=True)
        return _WorkedOut(told, None)
    # A state may be put right by hand, which no event tells: it is read just before it is used.
    if opened.books.state:
        return None
    with suppress(*_IN_STEPS), translated():
        desk, view = planned.desk(conn, kept, opened)
        result = planned.work_out(desk, view)
        return _WorkedOut(result, desk.take(planned.beat(view)))
    return None


def _by_itself(conn: Connection, planned: Planned) -> TickResult | Exception:
    """What becomes of a tick in steps; a deadlock or a lock timeout is tried again."""
    attempts = 0
    while True:
        attempts += 1
        try:
            return planned.in_steps(conn)
        except DatabaseUnavailable:
            raise
        except Exception as error:  # a user's code may raise anything; the other runs go on
            if attempts == ATTEMPTS_MAX or not isinstance(error, Retryable):
                return error


# What goes wrong at once goes wrong again, in steps, where it is told apart.
_IN_STEPS = (NeedsSteps, Retryable, RuleViolation, BadInput, StrategyFailed)


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

    def opened(self, user_id: UUID, run_id: UUID, at: datetime) -> Opened | None:
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
        return Opened(run, books)

    def keep(self, run: Run, books: Books) -> None:
        self.run, self.books = run, books


_kept: WeakKeyDictionary[Connection, _Kept] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Planned:
    """What a tick is called with: see ``run_tick``. ``logical_time`` is in UTC."""

    user_id: UUID
    run_id: UUID
    logical_time: datetime
    prices: Prices
    now: datetime | None = None
    market_open: bool | None = None
    intents: Sequence[Intent] = ()

    def at_once(self, conn: Connection) -> TickResult:
        """Work out without a lock, write in one statement. Raises NeedsSteps if that can't be."""
        kept = _kept.setdefault(conn, _Kept())
        known = kept.opened(self.user_id, self.run_id, self.logical_time)
        if known is not None:
            with suppress(Retryable, RuleViolation), translated():
                return self._kept_tick(conn, kept, known)
        opened = open_books(conn, self.user_id, self.run_id, self.logical_time)
        if opened.told is not None:
            return TickResult.told(self.logical_time, opened.told, repeated=True)
        kept.reference(conn, opened.run).ask_anew(self.logical_time)
        return self._kept_tick(conn, kept, opened)

    def _kept_tick(self, conn: Connection, kept: _Kept, opened: Opened) -> TickResult:
        desk, view = self.desk(conn, kept, opened)
        result = self.work_out(desk, view)
        desk.write_out(self.beat(view))
        if not desk.books.state:
            # A state may be put right by hand, which no event tells.
            kept.keep(desk.run, desk.books)
        return result

    def desk(self, conn: Connection, kept: _Kept, opened: Opened) -> tuple[Desk, View]:
        """Where the tick is worked out without a lock, and what it sees."""
        if opened.run.broker != PAPER:
            raise NeedsSteps  # its orders wait for a broker
        run, due, reference = opened.run, opened.due, kept.reference(conn, opened.run)
        view = self._look(run, reference)
        # What was read is of the session that was stored then, which may be an earlier one.
        read = due if due and view.session and due[0] == view.session.day else None
        agenda = Agenda(conn, run, read=read)
        return Desk(conn, run, opened.books, reference, Mode.AT_ONCE, agenda=agenda), view

    def in_steps(self, conn: Connection) -> TickResult:
        """Lock the run and write each step as it comes, in a transaction or a savepoint."""
        with _whole_or_nothing(conn, self.user_id, self.run_id, self.now):
            lock_run(conn, self.user_id, self.run_id)
            opened = open_books(conn, self.user_id, self.run_id, self.logical_time)
            if opened.told is not None:
                return TickResult.told(self.logical_time, opened.told, repeated=True)
            run, reference = opened.run, Reference(conn, opened.run.calendar)
            view = self._look(run, reference)
            desk = Desk(conn, run, opened.books, reference)
            result = self.work_out(desk, view)
            desk.write_out(self.beat(view))
            if run.broker != PAPER:
                wake(conn)
            return result

    def _look(self, run: Run, reference: Reference) -> View:
        """What the tick sees. Raises RunNotRunning and BadInput before anything is looked up."""
        require_running(run)
        return look(
            reference, self.logical_time, self.prices, now=self.now, market_open=self.market_open
        )

    def work_out(self, desk: Desk, view: View) -> TickResult:
        """Do the tick's work; its journal is still to be written."""
        return Work(desk, strategy_of(desk.run), view).tick(self.intents)

    def beat(self, view: View) -> View | None:
        """What the heartbeat is made of; only a live tick has one."""
        return None if self.now is None else view


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
